"""``metapl evaluate RUN``, on its own test set or on another folder"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from metapl.cli.inputs import TestFolder, require_finite
from metapl.cli.parse import WIDTH, Run, Switch
from metapl.errors import MetaplError
from metapl.experiments.load_run import LoadedRun, NetworkName, load_run
from metapl.metrics import (
    Evaluation,
    MultiLabelAccuracy,
    evaluate_logits,
    interval,
    multi_label_accuracy,
    predict_logits,
    read_label_sets,
)
from metapl.metrics.predictions import batches_of
from metapl.robustness.attacks import LEVELS, Attack
from metapl.robustness.corruptions import CORRUPTIONS, SEVERITIES
from metapl.robustness.measure import Robustness, measure
from metapl.runs.atomic import replacing
from metapl.runs.folder import weights_file
from metapl.training.progress import counting
from metapl.words import short, shown, table, tell

MOST_LETTERS, LEAST_LETTERS = 16, 3
"""Letters of a class that head a column, as many as there is room for, and that head a row."""

LEAST_WITH_DOTS = 9
"""Letters from which on a name loses its middle, not its end."""

MOST_IN_A_MATRIX = 20
"""Classes of which a terminal shows the confusion matrix."""

EPS = (2.0, 8.0)
"""Of attacks, in 1/255."""

LISTED = 10
"""Confusions, and classes, that are listed where there are more."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a run's network on its test set again: accuracy, calibration, and which classes it takes for which.

    It is the network that the run delivers, or the one named. The accuracy is the one in the run's result.json; where
    it is not, the output says so. Of a comparison, the run that the comparison delivers is measured: the best method's
    best seed by validation, and the first method's first seed where validation cannot tell. Beside it stand its 95 %
    interval, the chance level, which is what always naming the largest class gives, and what guessing evenly among them
    gives.

    A run without a test set is measured on its validation examples, and the accuracy is called so.

    With --test, it is measured on other pictures: one folder a class, called as the run's classes. A file that cannot
    be read is left out, with the reason on standard error; the exit code is then 1.

    With label sets, several classes of a picture can be right, or none: ReaL accuracy. The file is a JSON list with a
    list of classes for each test picture, such as ReaL's own real.json; or a JSON object of such lists by file name; or
    CSV with the columns file and labels, these with ; between them. A class is its name or its index.

    The pictures can also be damaged in 15 ways and 5 severities each, as in ImageNet-C (--corruptions), and be moved
    against the network (--attack); all accuracies are then written to --out, as evaluation.json and robustness.png.

    Args:
        run: the run folder.
        test: folder with one folder a class, to measure on instead of the run's own test set.
        network: which of the run's networks: the one that it delivers, the student, the student finetuned on the
            labeled data, or the teacher. Of a method that trains one network, such as uda, that is the student.
        label_sets: file with all the right labels of each test example.
        corruptions: measure on damaged pictures too: noise, blur, weather and digital damage.
        attack: measure on pictures that are moved against the network: by one step of the sign of the gradient (fgsm),
            or by ten (pgd).
        eps: how far each value of a picture may be moved, in 1/255 of the range from black to white; several can be
            given.
        out: folder for evaluation.json and robustness.png; made if need be.
        json: print JSON.
    """

    run: Run
    test: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    network: Annotated[NetworkName, tyro.conf.arg(help_behavior_hint="")] = "delivered"
    label_sets: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    corruptions: Switch = False
    attack: Annotated[Attack | None, tyro.conf.arg(help_behavior_hint="")] = None
    eps: Annotated[tuple[float, ...], tyro.conf.arg(metavar="E", help_behavior_hint="(default: 2 8)")] = ()
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    json: Switch = False

    def __call__(self) -> int:
        self._check()
        run = load_run(self.run)
        name, device = run.name(self.network), run.device
        network = run.network(name).to(device)
        on = _own(run, device) if self.test is None else _other(run, self.test)
        if self.label_sets is not None and on.part == "validation":
            raise MetaplError(f"--label-sets are of test pictures, and {_UNTESTED.format(self.run)}")
        logits, labels = predict_logits(network, on.batches())
        names = on.names()
        if names is not None and len(names) == len(logits):
            require_finite(logits, names)
        evaluation = evaluate_logits(logits, labels, run.recipe.classes)
        several = None
        if self.label_sets is not None:
            sets = read_label_sets(self.label_sets, run.recipe.classes, names)
            several = _against_sets(logits, sets, names)
        robustness = self._robustness(run, network, on)
        recorded = run.result.get(f"{name}_{on.part}_accuracy")
        if self.json:
            on_record = {"recorded_accuracy": recorded} if self.test is None else on.about
            about = {**self._about(run, name), "measured_on": on.part}
            content = {**about, **on_record, **_as_json(evaluation, several)}
            tell(json.dumps(content | ({} if robustness is None else robustness.to_json()), indent=2))
        else:
            where = "" if self.test is None else f"\non {self.test}"
            compared = _as_recorded(evaluation, recorded) + on.remark if self.test is None else ""
            tell(f"{run.heading(name)}{where}\n")
            tell(_figures(evaluation, several, on.part, compared))
            tell(_confusions(evaluation, run.recipe.classes))
            if robustness is not None:
                tell(f"\n{_robustness_table(robustness, evaluation)}")
        if self.out is not None:
            content = {**self._about(run, name), "measured_on": on.part, **_as_json(evaluation, several)}
            content |= {} if robustness is None else robustness.to_json()
            write_evaluation(self.out, content, f"{run.heading(name)}: accuracy on {on.part} pictures")
        if on.skipped():
            tell(f"metapl: {on.skipped()} file{'s' * (on.skipped() != 1)} left out", file=sys.stderr)
        return 1 if on.skipped() else 0

    def _check(self) -> None:
        """Refuse flags that say nothing together, before anything is read."""
        if self.eps and self.attack is None:
            raise MetaplError("--eps was given without --attack; expected --attack fgsm or --attack pgd.")
        for eps in self.eps:
            if not 0 <= eps <= LEVELS:
                raise MetaplError(f"--eps {eps:g}: expected 0 to {LEVELS}, in 1/{LEVELS} of the range.")
        if (self.corruptions or self.attack) and self.out is None and not self.json:
            raise MetaplError(
                "--corruptions and --attack were given without --out; expected --out DIR for evaluation.json and "
                "robustness.png, or --json."
            )
        if self.out is not None:
            check_folder(self.out)

    def _robustness(self, run: LoadedRun, network: nn.Module, on: _Measured) -> Robustness | None:
        if not self.corruptions and self.attack is None:
            return None
        with counting("pictures", shown=True) as update:
            return measure(
                network,
                on.batches(),
                corruptions=tuple(CORRUPTIONS) if self.corruptions else (),
                attacks=() if self.attack is None else (self.attack,),
                eps=self.eps or EPS,
                imagenet=getattr(run.recipe, "data", None) == "imagenet",
                progress=update,
            )

    def _about(self, run: LoadedRun, name: str) -> dict[str, str | int]:
        return {
            "run": str(self.run),
            "recipe": run.recipe.name,
            "method": run.result["method"],
            "seed": run.recipe.seed,
            "network": name,
            "weights": weights_file(name),
        }


_UNTESTED = "{} has no test set; give --test DIR, a folder of labeled pictures with one folder a class."


@dataclass(frozen=True)
class _Measured:
    """What is measured on.

    Args:
        batches: reads pictures and labels, as often as it is called.
        names: of the pictures, once the batches were read; None where they have none.
        part: what the accuracy is called.
        remark: what is printed beside it.
        skipped: how many files were left out, once the batches were read.
        about: for JSON.
    """

    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    names: Callable[[], Sequence[str] | None]
    part: Literal["test", "validation"] = "test"
    remark: str = ""
    skipped: Callable[[], int] = lambda: 0
    about: Mapping[str, Any] = field(default_factory=dict)


def _own(run: LoadedRun, device: torch.device) -> _Measured:
    """The run's own test set; where it has none, what it was validated on."""
    task = run.recipe.task(progress=True)
    if task.test is not None:
        return _Measured(lambda: batches_of(task.test, device), lambda: task.test_names)
    if task.validation is None:
        raise MetaplError(f"{_UNTESTED.format(run.folder.path)} It has no validation set either.")
    selected = run.result["delivered_by"] == "validation"
    remark = "\n  the network was selected on these examples: train was given no --test" * selected
    return _Measured(lambda: batches_of(task.validation, device), lambda: None, "validation", remark)


def _other(run: LoadedRun, folder: Path) -> _Measured:
    """Other pictures of the same classes."""
    on = TestFolder(run.recipe, folder)
    about = {"test": str(folder), "missing_classes": list(on.missing)}
    return _Measured(on.batches, lambda: on.names, skipped=lambda: on.skipped, about=about)


def _against_sets(logits: Tensor, sets: Sequence[frozenset[int]], names: Sequence[str] | None) -> MultiLabelAccuracy:
    """Accuracy against label sets, once it is sure that the two go together."""
    expected = len(logits) if names is None else len(names)
    if len(logits) < expected:
        raise MetaplError(
            f"{expected - len(logits):,} of the {expected:,} test files cannot be read and were left out, so it is not "
            "known which prediction is whose; mend or remove these files, then evaluate with --label-sets again."
        )
    return multi_label_accuracy(logits.max(dim=1).indices, sets)


def _as_json(evaluation: Evaluation, label_sets: MultiLabelAccuracy | None) -> dict[str, Any]:
    beside = {
        "interval": list(interval(round(evaluation.accuracy * evaluation.n), evaluation.n)),
        "chance": evaluation.chance,
        "even_guess": 1 / len(evaluation.confusion),
    }
    return evaluation.to_json() | beside | ({} if label_sets is None else {"multi_label": label_sets.to_json()})


# ------------------------------------------------------------------------------------------------------- what is shown


def _figures(evaluation: Evaluation, label_sets: MultiLabelAccuracy | None, part: str, of_accuracy: str) -> str:
    low, high = interval(round(evaluation.accuracy * evaluation.n), evaluation.n)
    even = 1 / len(evaluation.confusion)
    lines = {
        f"{part} accuracy": f"{evaluation.accuracy:.2%} of {evaluation.n:,}" + f", {of_accuracy}" * bool(of_accuracy),
        "95 % interval": f"{low:.2%} to {high:.2%}",
        "chance level": f"{evaluation.chance:.2%}, the largest class; even guesses: {even:.2%}",
    }
    if evaluation.top5 is not None:
        lines["top-5 accuracy"] = f"{evaluation.top5:.2%}"
    if label_sets is not None:
        without = label_sets.without_label
        none = f" ({without:,} {'has' if without == 1 else 'have'} none)" if without else ""
        lines["multi-label accuracy"] = f"{label_sets.accuracy:.2%} of {label_sets.n:,} with a label{none}"
    lines["expected calibration error"] = f"{evaluation.expected_calibration_error:.2%}"
    lines["negative log-likelihood"] = f"{evaluation.negative_log_likelihood:.3f}"
    return "\n".join(f"{name:<28}{value}" for name, value in lines.items())


def _robustness_table(found: Robustness, clean: Evaluation) -> str:
    """Accuracies by severity and by ε."""
    parts = []
    if found.corruptions:
        head = ("corruption, accuracy at severity", "none", *map(str, SEVERITIES), "mean error")
        rows = [
            (
                name,
                f"{clean.accuracy:.1%}",
                *(f"{a:.1%}" for a in accuracies),
                f"{1 - statistics.fmean(accuracies):.1%}",
            )
            for name, accuracies in found.corruptions.items()
        ]
        mean = f"mean accuracy under corruption {found.mean_corrupted_accuracy:.1%}"
        mce = found.mean_corruption_error
        parts.append(table([head, *rows]) + f"\n\n{mean}" + ("" if mce is None else f", mCE {mce:.1f} %"))
    if found.attacks:
        rows = [("attack", "ε in 1/255", "accuracy")]
        rows += [(name, eps, f"{a:.1%}") for name, by_eps in found.attacks.items() for eps, a in by_eps.items()]
        parts.append(table(rows))
    return "\n\n".join(parts)


def check_folder(folder: Path) -> None:
    """Refuse a place that no evaluation can be written to."""
    if folder.exists() and not folder.is_dir():
        raise MetaplError(f"--out {folder} is a file; expected a folder, or the name of a new one.")


def write_evaluation(folder: Path, content: Mapping[str, Any], title: str) -> None:
    """``evaluation.json``, and ``robustness.png`` where there is something to draw."""
    from metapl.report.robustness import draw_robustness

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "evaluation.json") as file:
            file.write(f"{json.dumps(content, indent=1)}\n".encode())
        if "corruptions" in content or "attacks" in content:
            draw_robustness(folder / "robustness.png", content, title)
    except OSError as error:
        raise MetaplError(
            f"--out {folder} cannot be written: {error.strerror}; expected a folder with room."
        ) from error


def _as_recorded(evaluation: Evaluation, recorded: float | None) -> str:
    if recorded is None:
        return "not in result.json"
    if evaluation.accuracy == recorded:
        return "as in result.json"
    return (
        f"but {recorded:.2%} in result.json:\n"
        "  the weights or the data have changed since, or this machine rounds otherwise"
    )


def _confusions(evaluation: Evaluation, classes: tuple[str, ...]) -> str:
    """The confusion matrix, or what matters most of it where a terminal has no room for the whole."""
    if len(classes) <= MOST_IN_A_MATRIX:
        for letters in range(MOST_LETTERS, LEAST_LETTERS - 1, -1):
            matrix = _matrix(evaluation, classes, letters)
            if len(matrix.partition("\n")[0]) <= WIDTH:
                head = "how many of a class (row) were taken for which (column), and how many rightly"
                return f"\n{head}\n\n{matrix}"
    return f"\nwhat is taken for what most often\n\n{_most(evaluation, classes)}\n\n{_worst(evaluation, classes)}"


def _matrix(evaluation: Evaluation, classes: tuple[str, ...], letters: int) -> str:
    """The confusion matrix with the accuracy of each class; a dot is 0."""
    width = max(len(str(n)) for counts in evaluation.confusion for n in counts)
    rows = [("class", *(_heading(name, letters).rjust(width) for name in classes), "right")]
    for name, counts, right in zip(classes, evaluation.confusion, evaluation.per_class, strict=True):
        rows.append((short(name, MOST_LETTERS), *(str(n) if n else "." for n in counts), _share(right)))
    return table(rows)


def _heading(name: str, letters: int) -> str:
    """
    >>> _heading("triangle_pointing_up", 12), _heading("triangle", 5)
    ('trian...g_up', 'trian')
    """
    return short(name, letters) if letters >= LEAST_WITH_DOTS else shown(name)[:letters]


def _most(evaluation: Evaluation, classes: tuple[str, ...]) -> str:
    """The pairs of classes that are confused most often."""
    cells = [(n, true, p) for true, row in enumerate(evaluation.confusion) for p, n in enumerate(row)]
    pairs = [cell for cell in cells if cell[0] and cell[1] != cell[2]]
    rows = [("class", "taken for", "times", "of")]
    for n, true, taken in sorted(pairs, key=lambda pair: -pair[0])[:LISTED]:
        rows.append((short(classes[true]), short(classes[taken]), f"{n:,}", f"{sum(evaluation.confusion[true]):,}"))
    return table(rows, left=2) if len(rows) > 1 else "nothing is taken for anything else"


def _worst(evaluation: Evaluation, classes: tuple[str, ...]) -> str:
    """The classes of which the smallest share is right."""
    known = [(right, index) for index, right in enumerate(evaluation.per_class) if right is not None]
    rows = [("class", "right", "of")]
    for right, index in sorted(known)[:LISTED]:
        rows.append((short(classes[index]), _share(right), f"{sum(evaluation.confusion[index]):,}"))
    least = f"the {len(rows) - 1} of {len(classes):,} classes that are right least often"
    return f"{least}\n\n{table(rows)}"


def _share(right: float | None) -> str:
    return "-" if right is None else f"{right:.1%}"
