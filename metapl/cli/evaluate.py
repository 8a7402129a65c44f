"""``metapl evaluate RUN``, on its own test set or on another folder"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

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
from metapl.runs.folder import weights_file
from metapl.words import short, shown, table, tell

MOST_LETTERS, LEAST_LETTERS = 16, 3
"""Letters of a class that head a column, as many as there is room for, and that head a row."""

LEAST_WITH_DOTS = 9
"""Letters from which on a name loses its middle, not its end."""

MOST_IN_A_MATRIX = 20
"""Classes of which a terminal shows the confusion matrix."""

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

    Args:
        run: the run folder.
        test: folder with one folder a class, to measure on instead of the run's own test set.
        network: which of the run's networks: the one that it delivers, the student, the student finetuned on the
            labeled data, or the teacher. Of a method that trains one network, such as uda, that is the student.
        label_sets: file with all the right labels of each test example.
        json: print JSON.
    """

    run: Run
    test: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    network: Annotated[NetworkName, tyro.conf.arg(help_behavior_hint="")] = "delivered"
    label_sets: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    json: Switch = False

    def __call__(self) -> int:
        run = load_run(self.run)
        name, device = run.name(self.network), run.device
        network = run.network(name).to(device)
        on = _own(run, device) if self.test is None else _other(run, self.test)
        if self.label_sets is not None and on.part == "validation":
            raise MetaplError(f"--label-sets are of test pictures, and {_UNTESTED.format(self.run)}")
        logits, labels = predict_logits(network, on.batches)
        names = on.names()
        if names is not None and len(names) == len(logits):
            require_finite(logits, names)
        evaluation = evaluate_logits(logits, labels, run.recipe.classes)
        several = None
        if self.label_sets is not None:
            sets = read_label_sets(self.label_sets, run.recipe.classes, names)
            several = _against_sets(logits, sets, names)
        recorded = run.result.get(f"{name}_{on.part}_accuracy")
        if self.json:
            on_record = {"recorded_accuracy": recorded} if self.test is None else on.about
            about = {**self._about(run, name), "measured_on": on.part}
            tell(json.dumps({**about, **on_record, **_as_json(evaluation, several)}, indent=2))
        else:
            where = "" if self.test is None else f"\non {self.test}"
            compared = _as_recorded(evaluation, recorded) + on.remark if self.test is None else ""
            tell(f"{run.heading(name)}{where}\n")
            tell(_figures(evaluation, several, on.part, compared))
            tell(_confusions(evaluation, run.recipe.classes))
        if on.skipped():
            tell(f"metapl: {on.skipped()} file{'s' * (on.skipped() != 1)} left out", file=sys.stderr)
        return 1 if on.skipped() else 0

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
        batches: pictures and labels.
        names: of the pictures, once the batches were read; None where they have none.
        part: what the accuracy is called.
        remark: what is printed beside it.
        skipped: how many files were left out, once the batches were read.
        about: for JSON.
    """

    batches: Iterable[tuple[Tensor, Tensor]]
    names: Callable[[], Sequence[str] | None]
    part: Literal["test", "validation"] = "test"
    remark: str = ""
    skipped: Callable[[], int] = lambda: 0
    about: Mapping[str, Any] = field(default_factory=dict)


def _own(run: LoadedRun, device: torch.device) -> _Measured:
    """The run's own test set; where it has none, what it was validated on."""
    task = run.recipe.task(progress=True)
    if task.test is not None:
        return _Measured(batches_of(task.test, device), lambda: task.test_names)
    if task.validation is None:
        raise MetaplError(f"{_UNTESTED.format(run.folder.path)} It has no validation set either.")
    selected = run.result["delivered_by"] == "validation"
    remark = "\n  the network was selected on these examples: train was given no --test" * selected
    return _Measured(batches_of(task.validation, device), lambda: None, "validation", remark)


def _other(run: LoadedRun, folder: Path) -> _Measured:
    """Other pictures of the same classes."""
    on = TestFolder(run.recipe, folder)
    about = {"test": str(folder), "missing_classes": list(on.missing)}
    return _Measured(on.batches(), lambda: on.names, skipped=lambda: on.skipped, about=about)


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
