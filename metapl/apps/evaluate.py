"""``metapl evaluate RUN``, on its own test set or on another folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from metapl.apps.inputs import ROOM, Factory, HeldOut, Network, Run, check_out, held, plural
from metapl.apps.labeling import refuse_infinite
from metapl.apps.printing import WIDTH, short, table, tell
from metapl.apps.progress import count_bar
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, evaluate_logits, interval, predict_logits
from metapl.robustness import CORRUPTIONS, LEVELS, SEVERITIES, Attack, measure
from metapl.run_folder import WEIGHTS, EndedRun
from metapl.runs.fields import Range
from metapl.runs.files import write_whole
from metapl.words import shown

EVALUATION = "evaluation.json"

# How far an attack changes a value where --eps is not given.
USUAL_EPS = (2.0, 8.0)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a run's network on its test set again: accuracy, calibration and confusions.

    The accuracy is printed with its 95 % interval, and with the accuracy of always naming the
    largest class and of guessing evenly. The output says so if it is not the accuracy in the run's
    result.json. A run without a test set is measured on its validation examples, and the output
    says so.

    With --test, the network is measured on other pictures. They stand in one folder for each class,
    whose name is that of the class. A file that cannot be read is left out, with the reason on
    standard error; the exit code is then 1.

    With --corruptions the pictures are damaged in 15 ways and 5 severities each, as in ImageNet-C,
    and with --attack they are changed to mislead the network. All accuracies are then written to
    evaluation.json in the folder of --out.

    examples/robustness.py measures on ImageNet-A, -C, -P and ReaL, and takes files of weights.
    examples/compare_two_networks.py shows the pictures that one of two networks alone is right on.

    Args:
        folder: folder of a run.
        test: folder of labeled pictures to measure on, with a folder for each class in it.
        corruptions: measure on damaged pictures too: noise, blur, weather and digital damage.
        attack: measure also on pictures that are changed to mislead the network: fgsm takes one
            step along the sign of the gradient, pgd ten.
        eps: how far --attack may change each value of a picture, in 1/255 of the range from black
            to white. Several can be given. By default these are 2 and 8.
        out: folder that the figures are written to. It is made if it does not exist.
        json: print JSON.
    """

    folder: Run
    network: Network = "delivered"
    factory: Factory = None
    test: Path | None = None
    corruptions: bool = False
    attack: Attack | None = None
    eps: tuple[Annotated[float, Range(0, most=LEVELS)], ...] = ()
    out: Path | None = None
    json: bool = False

    def run(self) -> int:
        """Measure, print and write the figures; return 1 where files were left out."""
        if self.eps and self.attack is None:
            raise MetaplError(
                "--eps was given without --attack; expected --attack fgsm or --attack pgd."
            )
        run = EndedRun.load(self.folder)
        if self.out is not None:
            check_out(self.out, run.folder.recipe().get("fields", {}), {"test": self.test})
            if (self.out / EVALUATION).exists():
                raise MetaplError(f"{self.out / EVALUATION} is there; expected another --out.")
        with held(self.out):
            # 1. All that is refused is refused before anything is measured.
            name = run.name(self.network)
            network = run.network(name, self.factory).to(run.device)
            examples = HeldOut(run, name, self.test)

            # 2. The pictures as they are, then damaged and attacked.
            with count_bar("pictures", is_shown=True, total=len(examples)) as update:
                logits, labels = predict_logits(network, examples.batches(update))
            if examples.names:
                refuse_infinite(logits, examples.names)
            evaluation = evaluate_logits(logits, labels, run.classes)
            content = self.figures(run, name, examples, evaluation)
            blocks = [
                run.heading(name) + ("" if self.test is None else f"\non {self.test}"),
                table(summary_rows(evaluation, examples), left=2),
                confusions(evaluation, run.classes),
            ]
            if self.corruptions or self.attack is not None:
                damaged = self.measure_damaged(network, examples)
                content |= damaged
                blocks += robustness_tables(damaged, evaluation)

            # 3. The figures are printed, and written.
            tell(json.dumps(content, indent=2) if self.json else "\n\n".join(blocks))
            if self.out is not None:
                written = self.write(self.out, content)
                if not self.json:
                    tell(f"\n{written}")
            if examples.skipped:
                tell(f"metapl: {plural(examples.skipped, 'file')} left out", file=sys.stderr)
            return 1 if examples.skipped else 0

    def figures(
        self, run: EndedRun, name: str, examples: HeldOut, evaluation: Evaluation
    ) -> dict[str, Any]:
        """Return what evaluation.json says of the pictures as they are."""
        low, high = interval(round(evaluation.accuracy * evaluation.n), evaluation.n)
        return {
            "run": str(self.folder),
            "recipe": run.result["recipe"],
            "method": run.result["method"],
            "seed": run.result["seed"],
            "network": name,
            "weights": WEIGHTS[name],
            **examples.about,
            "measured_on": examples.part,
            **evaluation.to_json(),
            "interval": [low, high],
            "chance": evaluation.chance,
            "even_guess": 1 / len(evaluation.confusion),
        }

    def measure_damaged(self, network: nn.Module, examples: HeldOut) -> dict[str, Any]:
        """Measure on damaged and attacked pictures, and show how many are done."""
        corruptions: tuple[str, ...] = ()
        if self.corruptions:
            corruptions = tuple(CORRUPTIONS)
        attacks: tuple[Attack, ...] = ()
        if self.attack is not None:
            attacks = (self.attack,)
        with count_bar("damaged pictures", is_shown=True, total=len(examples)) as update:
            return measure(
                network,
                examples.batches(),
                corruptions=corruptions,
                attacks=attacks,
                eps=self.eps or USUAL_EPS,
                progress=update,
            )

    def write(self, out: Path, content: Mapping[str, Any]) -> str:
        """Write the figures, and return where they are."""
        write_whole(out / EVALUATION, f"{json.dumps(content, indent=1)}\n".encode(), ROOM)
        return f"the figures are in {out / EVALUATION}"


# ------------------------------------------------------------------------------------ what is shown

# Letters of a class that head a row, and the least that head a column.
MOST_LETTERS = 16
LEAST_LETTERS = 3

# Classes that are listed where there is no room for all.
LISTED = 10


def summary_rows(evaluation: Evaluation, examples: HeldOut) -> list[tuple[str, str]]:
    """Return the names of the figures of an evaluation, and the figures."""
    low, high = interval(round(evaluation.accuracy * evaluation.n), evaluation.n)
    even = 1 / len(evaluation.confusion)
    accuracy = f"{evaluation.accuracy:.2%} of {evaluation.n:,}{examples.remark(evaluation)}"
    chance = f"{evaluation.chance:.2%}, the largest class; even guesses: {even:.2%}"
    rows = [
        (f"{examples.part} accuracy", accuracy),
        ("95 % interval", f"{low:.2%} to {high:.2%}"),
        ("chance level", chance),
    ]
    if evaluation.top5 is not None:
        rows.append(("top-5 accuracy", f"{evaluation.top5:.2%}"))
    rows.append(("expected calibration error", f"{evaluation.expected_calibration_error:.2%}"))
    rows.append(("negative log-likelihood", f"{evaluation.negative_log_likelihood:.3f}"))
    return rows


def robustness_tables(damaged: Mapping[str, Any], clean: Evaluation) -> Iterator[str]:
    """Yield tables of what :func:`measure` found on damaged and on attacked pictures."""
    if "corruptions" in damaged:
        rows = [("corruption", "none", *map(str, SEVERITIES), "mean error")]
        for name, kind in damaged["corruptions"].items():
            accuracies = (clean.accuracy, *kind["accuracy_by_severity"])
            shares = [f"{accuracy:.1%}" for accuracy in accuracies]
            rows.append((name, *shares, f"{kind['error']:.1%}"))
        mean = f"mean accuracy under corruption {damaged['mean_corrupted_accuracy']:.1%}"
        yield f"accuracy by severity\n\n{table(rows)}\n\n{mean}"
    if "attacks" in damaged:
        attack_rows = [("attack", "ε in 1/255", "accuracy")]
        for name, accuracies_by_eps in damaged["attacks"].items():
            for eps, accuracy in accuracies_by_eps.items():
                attack_rows.append((name, eps, f"{accuracy:.1%}"))
        yield table(attack_rows)


def confusions(evaluation: Evaluation, classes: tuple[str, ...]) -> str:
    """Return the confusion matrix, or what matters most of it where there is no room for it."""
    shares = ["-" if right is None else f"{right:.1%}" for right in evaluation.per_class]
    widest = max(len(str(n)) for counts in evaluation.confusion for n in counts)
    # Two spaces are between columns.
    letters = min((WIDTH - MOST_LETTERS - 10) // len(classes) - 2, MOST_LETTERS)
    if letters >= max(LEAST_LETTERS, widest):
        heads = [shown(name)[:letters] for name in classes]
        rows = [("true \\ predicted", *heads, "right")]
        for name, counts, share in zip(classes, evaluation.confusion, shares, strict=True):
            cells = [str(n) if n else "." for n in counts]
            rows.append((short(name, MOST_LETTERS), *cells, share))
        head = "how many of a true class (row) were predicted as which class (column)"
        return f"{head}\n\n{table(rows)}"
    rows = [("true class", "right", "most often predicted as", "times")]
    by_share = sorted(range(len(classes)), key=lambda number: evaluation.per_class[number] or 0)
    for number in by_share[:LISTED]:
        wrong_counts = list(evaluation.confusion[number])
        wrong_counts[number] = 0
        most = max(wrong_counts)
        taken_for = short(classes[wrong_counts.index(most)]) if most else "-"
        rows.append((short(classes[number]), shares[number], taken_for, str(most)))
    head = f"the {len(rows) - 1} of {len(classes):,} classes that are right least often"
    return f"{head}\n\n{table(rows)}"
