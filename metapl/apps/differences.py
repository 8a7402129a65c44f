"""Two networks picture by picture: which pictures one alone is right on, in numbers and as a sheet.

As Noisy Student's Figure 3, which shows pictures that only the network trained with noise is right
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from metapl.apps.inputs import UNTESTED, HeldOut
from metapl.apps.labeling import refuse_infinite
from metapl.apps.printing import short, table
from metapl.apps.progress import count_bar
from metapl.apps.report_picture import png_of
from metapl.errors import MetaplError, few
from metapl.metrics.predictions import predict_logits
from metapl.run_folder import EndedRun, NetworkName, stored_data

# How many pictures of each kind the sheet shows, and in how many columns.
SHOWN = 12
COLUMNS = 6


@dataclass(frozen=True)
class Example:
    """An example on which one network alone is right, and what each network says of it.

    Args:
        number: of the example among those that the first network has read.
        name: of its file, or its number.
        truth: its class.
        first, second: the class that each network takes it for, with its probability.
        margin: how much more probability the right network gives to the class than the other one.
    """

    number: int
    name: str
    truth: str
    first: str
    second: str
    margin: float

    def to_json(self) -> dict[str, str]:
        """Return what the example is and is taken for, for evaluation.json."""
        return {
            "name": self.name,
            "truth": self.truth,
            "first": self.first,
            "second": self.second,
        }


@dataclass(frozen=True)
class Differences:
    """What two networks have in common on the same examples, and where one alone is right.

    Args:
        n: the number of examples.
        both, neither: on how many of them both networks, or neither one, are right.
        first_alone, second_alone: those on which one network alone is right, with the greatest
            margin first.
    """

    n: int
    both: int
    neither: int
    first_alone: list[Example]
    second_alone: list[Example]

    @property
    def p(self) -> float:
        """Return the p of McNemar's exact test: as many are expected on either side."""
        from scipy.stats import binomtest

        apart = len(self.first_alone) + len(self.second_alone)
        if not apart:
            return 1.0
        return float(binomtest(len(self.first_alone), apart).pvalue)

    def to_json(self) -> dict[str, Any]:
        """Return the numbers and the examples, for evaluation.json."""
        return {
            "n": self.n,
            "both_right": self.both,
            "neither_right": self.neither,
            "first_alone": [example.to_json() for example in self.first_alone],
            "second_alone": [example.to_json() for example in self.second_alone],
            "p": self.p,
        }

    def text(self, first: str, second: str) -> str:
        """Return a table of the numbers, with the names of the two networks, and the test."""
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

    Args:
        logits: (N, C).
        labels: (N,).
        names: of the examples; of digits there are none.
    """

    logits: Tensor
    labels: Tensor
    names: list[str]

    @property
    def places(self) -> dict[str, int]:
        """Return the row of each example by its name, or its number where it has none."""
        names = self.names or [str(number) for number in range(len(self.labels))]
        return {name: number for number, name in enumerate(names)}


@dataclass(frozen=True, eq=False)
class Opponent:
    """The network of a run that another one is compared with."""

    run: EndedRun
    name: str

    @classmethod
    def load(cls, folder: Path, network: NetworkName) -> Opponent:
        """Read a finished run."""
        run = EndedRun.load(folder)
        return cls(run, run.name(network))

    def judge(self, factory: str | None, test: Path | None) -> Judged:
        """Run it on the examples of a folder, or on its own test set, as it reads them."""
        examples = HeldOut(self.run, self.name, test)
        network = self.run.network(self.name, factory).to(self.run.device)
        return judge(network, examples, "pictures of the other run")

    def titles(self, first: EndedRun, name: str) -> tuple[str, str]:
        """Return what the two networks are called.

        It is the names of their runs, or of the networks where they are of one run.
        """
        if first.folder.path.resolve() == self.run.folder.path.resolve():
            return first.cards[name].title, self.run.cards[self.name].title
        return str(first.folder.path), str(self.run.folder.path)


def judge(network: nn.Module, examples: HeldOut, counted_as: str) -> Judged:
    """Run a network on examples, and show how many are done.

    Args:
        network: on its device.
        examples: that it is run on.
        counted_as: what they are called where they are counted.
    """
    with count_bar(counted_as, is_shown=True, total=len(examples)) as update:
        logits, labels = predict_logits(network, examples.batches(update))
    if examples.names:
        refuse_infinite(logits, examples.names)
    return Judged(logits, labels, [*examples.names])


def differences(first: Judged, second: Judged, classes: Sequence[str]) -> Differences:
    """Compare what two networks say of the examples that both have read, each by its name."""
    rows_of_first = first.places
    rows_of_second = second.places
    shared = [name for name in rows_of_first if name in rows_of_second]
    if not shared:
        raise MetaplError(
            "the two networks have read no picture in common; expected the same pictures for both."
        )
    first_probabilities = first.logits.double().softmax(dim=1)
    second_probabilities = second.logits.double().softmax(dim=1)
    both = 0
    neither = 0
    first_alone: list[Example] = []
    second_alone: list[Example] = []
    for name in shared:
        number = rows_of_first[name]
        truth = int(first.labels[number])
        p_first = first_probabilities[number]
        p_second = second_probabilities[rows_of_second[name]]
        class_first = int(p_first.argmax())
        class_second = int(p_second.argmax())
        if class_first == truth and class_second == truth:
            both += 1
            continue
        if class_first != truth and class_second != truth:
            neither += 1
            continue
        is_first_right = class_first == truth
        margin = float(p_first[truth] - p_second[truth])
        if not is_first_right:
            margin = -margin
        example = Example(
            number=number,
            name=name,
            truth=classes[truth],
            first=f"{classes[class_first]} {float(p_first[class_first]):.0%}",
            second=f"{classes[class_second]} {float(p_second[class_second]):.0%}",
            margin=margin,
        )
        if is_first_right:
            first_alone.append(example)
        else:
            second_alone.append(example)
    for examples in (first_alone, second_alone):
        examples.sort(key=lambda example: -example.margin)
    return Differences(
        n=len(shared),
        both=both,
        neither=neither,
        first_alone=first_alone,
        second_alone=second_alone,
    )


def sheet(compared: Differences, read: HeldOut, first: str, second: str) -> bytes:
    """Draw the examples that one network alone is right on, as PNG.

    Those with the greatest margin come first. Below each stands its class and what either network
    takes it for.

    Args:
        compared: where the networks differ.
        read: reads the pictures once more.
        first, second: what the networks are called.
    """
    from matplotlib.figure import Figure

    first_title = f"{short(first)} alone is right: {len(compared.first_alone):,} of {compared.n:,}"
    second_title = (
        f"{short(second)} alone is right: {len(compared.second_alone):,} of {compared.n:,}"
    )
    groups = {
        first_title: compared.first_alone[:SHOWN],
        second_title: compared.second_alone[:SHOWN],
    }
    wanted: set[int] = set()
    for examples in groups.values():
        wanted.update(example.number for example in examples)
    pictures = pictures_of(read, wanted)
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
            lines = [f"is {example.truth}", f"1: {example.first}", f"2: {example.second}"]
            title_of_example = "\n".join(short(line, 26) for line in lines)
            place.set_title(title_of_example, fontsize=7, parse_math=False)
    return png_of(figure)


def pictures_of(read: HeldOut, wanted: set[int]) -> dict[int, Tensor]:
    """Return the pictures with these numbers, (C, H, W) each."""
    pictures: dict[int, Tensor] = {}
    number = 0
    for x, _ in read.batches():
        for picture in x:
            if number in wanted:
                pictures[number] = picture
            number += 1
    return pictures
