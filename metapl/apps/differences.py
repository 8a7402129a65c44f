"""Two networks picture by picture: which pictures one alone is right on, in numbers and as a sheet.

As Noisy Student's Figure 3, which shows pictures that only the network trained with noise is right
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from metapl.apps.inputs import UNTESTED, HeldOut
from metapl.apps.labeling import refuse_infinite
from metapl.apps.printing import short, table
from metapl.apps.report import png_of
from metapl.apps.run_folder import EndedRun, NetworkName, stored_data
from metapl.errors import MetaplError, few
from metapl.metrics.predictions import predict_logits

# How many pictures of each kind the sheet shows, and in how many columns.
SHOWN, COLUMNS = 12, 6


@dataclass(frozen=True)
class Example:
    """An example on which one network alone is right, and what each network says of it.

    ``margin`` is how much more probability the right network gives to the class than the other one
    does.
    """

    number: int
    name: str
    truth: str
    first: str
    second: str
    margin: float


@dataclass(frozen=True)
class Differences:
    """What two networks have in common on the same examples, and where one alone is right."""

    n: int
    both: int
    neither: int
    first_alone: list[Example]
    second_alone: list[Example]

    @property
    def p(self) -> float:
        """The p of McNemar's exact test: as many examples are expected on either side."""
        from scipy.stats import binomtest

        apart = len(self.first_alone) + len(self.second_alone)
        return 1.0 if not apart else float(binomtest(len(self.first_alone), apart).pvalue)

    def to_json(self) -> dict[str, Any]:
        def listed(examples: Sequence[Example]) -> list[dict[str, Any]]:
            names = ("name", "truth", "first", "second")
            return [{name: getattr(example, name) for name in names} for example in examples]

        return {
            "n": self.n,
            "both_right": self.both,
            "neither_right": self.neither,
            "first_alone": listed(self.first_alone),
            "second_alone": listed(self.second_alone),
            "p": self.p,
        }

    def text(self, first: str, second: str) -> str:
        rows = [
            ("right", "pictures"),
            ("both", f"{self.both:,}"),
            (f"{short(first)} alone", f"{len(self.first_alone):,}"),
            (f"{short(second)} alone", f"{len(self.second_alone):,}"),
            ("neither", f"{self.neither:,}"),
        ]
        test = f"p = {self.p:.2g} (McNemar's exact test, {self.n:,} pictures)"
        return f"picture by picture\n\n{table(rows)}\n\n{test}"


def check_comparable(
    first: EndedRun, second: EndedRun, names: tuple[str, str], *, has_test: bool
) -> None:
    """Refuse two networks that cannot be compared picture by picture, before either is run."""
    if first.folder.path.resolve() == second.folder.path.resolve() and names[0] == names[1]:
        raise MetaplError(
            f"--against {second.folder.path}: expected another network than the {names[0]} of the "
            "same run; --against-network names one of it."
        )
    if first.classes != second.classes:
        raise MetaplError(
            f"--against {second.folder.path} has the classes {few(second.classes)}; expected those "
            f"of {first.folder.path}: {few(first.classes)}."
        )
    kinds = [run.cards[name].input.kind for run, name in zip((first, second), names, strict=True)]
    if kinds[0] != kinds[1]:
        raise MetaplError(
            f"--against {second.folder.path} reads a {kinds[1]}, and {first.folder.path} a "
            f"{kinds[0]}; expected two networks that read the same pictures."
        )
    if has_test:
        return
    tested = []
    for run in (first, second):
        if "evaluation" not in run.result:
            raise MetaplError(UNTESTED.format(run.folder.path))
        tested.append(stored_data(run.source).get("hash", {}).get("test"))
    if tested[0] is None or tested[0] != tested[1]:
        raise MetaplError(
            f"--against {second.folder.path} was tested on other pictures than "
            f"{first.folder.path}; expected runs with one test set, or --test DIR, a folder of "
            "pictures that neither was trained on."
        )


@dataclass(frozen=True, eq=False)
class Judged:
    """What a network says of labeled examples.

    Logits (N, C), labels (N,), and names; of digits there are none.
    """

    logits: Tensor
    labels: Tensor
    names: list[str]

    @property
    def places(self) -> dict[str, int]:
        """The row of each example by its name, or its number where it has none."""
        names = self.names or [str(number) for number in range(len(self.labels))]
        return {name: number for number, name in enumerate(names)}


@dataclass(frozen=True, eq=False)
class Opponent:
    """The network of a run that another one is compared with."""

    run: EndedRun
    name: str

    @classmethod
    def load(cls, folder: Path, network: NetworkName) -> Opponent:
        run = EndedRun.load(folder)
        return cls(run, run.name(network))

    def judge(self, factory: str | None, test: Path | None) -> Judged:
        """Run it on the examples of a folder, or on its own test set, as it reads them."""
        on = HeldOut(self.run, self.name, test)
        network = self.run.network(self.name, factory).to(self.run.device)
        logits, labels = predict_logits(network, on.batches())
        if on.names:
            refuse_infinite(logits, on.names)
        return Judged(logits, labels, [*on.names])

    def titles(self, first: EndedRun, name: str) -> tuple[str, str]:
        """Return what the two networks are called.

        It is the names of their runs, or of the networks where they are of one run.
        """
        if first.folder.path.resolve() == self.run.folder.path.resolve():
            return first.cards[name].title, self.run.cards[self.name].title
        return str(first.folder.path), str(self.run.folder.path)


def differences(first: Judged, second: Judged, classes: Sequence[str]) -> Differences:
    """Compare what two networks say of the examples that both have read, each by its name."""
    rows_of_second = second.places
    rows = {
        name: (row, rows_of_second[name])
        for name, row in first.places.items()
        if name in rows_of_second
    }
    if not rows:
        raise MetaplError(
            "the two networks have read no picture in common; expected the same pictures for both."
        )
    first_probabilities = first.logits.double().softmax(dim=1)
    second_probabilities = second.logits.double().softmax(dim=1)
    both = 0
    neither = 0
    alone: dict[bool, list[Example]] = {True: [], False: []}
    for name, (number, place) in rows.items():
        truth = int(first.labels[number])
        of_first = first_probabilities[number]
        of_second = second_probabilities[place]
        said = int(of_first.argmax()), int(of_second.argmax())
        is_right = said[0] == truth, said[1] == truth
        if all(is_right):
            both += 1
        elif not any(is_right):
            neither += 1
        else:
            margin = float(of_first[truth] - of_second[truth])
            example = Example(
                number=number,
                name=name,
                truth=classes[truth],
                first=f"{classes[said[0]]} {float(of_first[said[0]]):.0%}",
                second=f"{classes[said[1]]} {float(of_second[said[1]]):.0%}",
                margin=margin if is_right[0] else -margin,
            )
            alone[is_right[0]].append(example)
    for examples in alone.values():
        examples.sort(key=lambda example: -example.margin)
    return Differences(len(rows), both, neither, first_alone=alone[True], second_alone=alone[False])


def sheet(compared: Differences, on: HeldOut, first: str, second: str) -> bytes:
    """Draw the examples that one network alone is right on, as PNG.

    Those with the greatest margin come first. Below each stands its class and what either network
    takes it for. ``on`` reads the pictures once more.
    """
    from matplotlib.figure import Figure

    groups = {
        f"{short(first)} alone is right: {len(compared.first_alone):,} of "
        f"{compared.n:,}": compared.first_alone[:SHOWN],
        f"{short(second)} alone is right: {len(compared.second_alone):,} of "
        f"{compared.n:,}": compared.second_alone[:SHOWN],
    }
    wanted = {example.number for examples in groups.values() for example in examples}
    pictures: dict[int, Tensor] = {}
    number = 0
    for x, _ in on.batches():
        pictures |= {number + row: x[row] for row in range(len(x)) if number + row in wanted}
        number += len(x)
    heights = [max(1, -(-len(examples) // COLUMNS)) for examples in groups.values()]
    figure = Figure((1.9 * COLUMNS, 2.5 * sum(heights) + 0.8), 120, layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, height, (title, examples) in zip(parts, heights, groups.items(), strict=True):
        part.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)
        places = part.subplots(height, COLUMNS, squeeze=False).ravel()
        for place in places:
            place.axis("off")
        for place, example in zip(places, examples, strict=False):
            levels = pictures[example.number].clamp(0, 1).permute(1, 2, 0).squeeze(-1)
            place.imshow(levels.numpy(), cmap="gray", vmin=0, vmax=1)
            words = [f"is {example.truth}", f"1: {example.first}", f"2: {example.second}"]
            place.set_title(
                "\n".join(short(word, 26) for word in words), fontsize=7, parse_math=False
            )
    return png_of(figure)
