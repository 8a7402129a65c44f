"""``metapl evaluate RUN``"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from metapl.cli.finished import Finished, finished, weights_file
from metapl.cli.parse import WIDTH, Run, Switch
from metapl.cli.place import place
from metapl.cli.table import table
from metapl.errors import MetaplError
from metapl.evaluate import (
    Evaluation,
    MultiLabelAccuracy,
    evaluate_logits,
    multi_label_accuracy,
    predict_logits,
    read_label_sets,
)
from metapl.fit import batches_of
from metapl.recipes import Task

HEADINGS = (5, 4, 3)
"""Letters of a class that head a column, as many as there is room for."""

MOST_IN_A_MATRIX = 20
"""Classes of which a terminal shows the confusion matrix."""

LISTED = 10
"""Confusions, and classes, that are listed where there are more."""

NAME = 30
"""Letters of a class in a list."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a run's student on its test set again: accuracy, calibration, and which classes it takes for which.

    The accuracy is the one in the run's result.json; where it is not, that is said. Of a comparison, it is the student
    that the comparison delivers: the best by validation of the best method.

    With label sets, several classes of a picture can be right, or none: ReaL accuracy. The file is a JSON list with a
    list of classes for each test picture, such as ReaL's own real.json; or a JSON object of such lists by file name; or
    CSV with the columns file and labels, these with ; between them. A class is its name or its index.

    Args:
        run: the run folder.
        finetuned: the student after finetuning on the labelled data.
        label_sets: file with all the right labels of each test example.
        json: print JSON.
    """

    run: Run
    finetuned: Switch = False
    label_sets: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    json: Switch = False

    def __call__(self) -> int:
        run = finished(self.run)
        device = place(run.recipe)
        student, task = run.student(self.finetuned).to(device), run.recipe.task(progress=True)
        sets = None if self.label_sets is None else read_label_sets(self.label_sets, task.classes, task.test_names)
        logits, labels = predict_logits(student, batches_of(task.test, device))
        found = evaluate_logits(logits, labels, task.classes)
        several = None if sets is None else _against_sets(logits, sets, task)
        recorded = run.result["finetuned_test_accuracy" if self.finetuned else "test_accuracy"]
        if self.json:
            print(json.dumps({**self._about(run), "recorded_accuracy": recorded, **_as_json(found, several)}, indent=2))
            return 0
        print(f"{run.title}, {weights_file(self.finetuned)}\n")
        print(_figures(found, several, _as_recorded(found, recorded) + _selected_on(task)))
        print(_confusions(found, task.classes))
        return 0

    def _about(self, run: Finished) -> dict[str, str | int]:
        return {
            "run": str(self.run),
            "recipe": run.recipe.name,
            "method": run.result["method"],
            "seed": run.recipe.seed,
            "weights": weights_file(self.finetuned),
        }


def _against_sets(logits: Tensor, sets: Sequence[frozenset[int]], task: Task) -> MultiLabelAccuracy:
    """Accuracy against label sets, once it is sure that the two go together."""
    expected = len(logits) if task.test_names is None else len(task.test_names)
    if len(logits) < expected:
        raise MetaplError(
            f"{expected - len(logits):,} of the {expected:,} test files cannot be read and were left out, so it is not "
            "known which prediction is whose; mend or remove these files, then evaluate with --label-sets again."
        )
    return multi_label_accuracy(logits.max(dim=1).indices, sets)


def _as_json(found: Evaluation, several: MultiLabelAccuracy | None) -> dict[str, Any]:
    return found.to_json() | ({} if several is None else {"multi_label": several.to_json()})


# ------------------------------------------------------------------------------------------------------- what is shown


def _figures(found: Evaluation, several: MultiLabelAccuracy | None, of_accuracy: str) -> str:
    lines = {"test accuracy": f"{found.accuracy:.2%} of {found.n:,}, {of_accuracy}", "chance": f"{found.chance:.2%}"}
    if found.top5 is not None:
        lines["top-5 accuracy"] = f"{found.top5:.2%}"
    if several is not None:
        without = several.without_label
        none = f" ({without:,} {'has' if without == 1 else 'have'} none)" if without else ""
        lines["multi-label accuracy"] = f"{several.accuracy:.2%} of {several.n:,} with a label{none}"
    lines["expected calibration error"] = f"{found.expected_calibration_error:.2%}"
    lines["negative log-likelihood"] = f"{found.negative_log_likelihood:.3f}"
    return "\n".join(f"{name:<28}{value}" for name, value in lines.items())


def _as_recorded(found: Evaluation, recorded: float) -> str:
    if found.accuracy == recorded:
        return "as in result.json"
    return (
        f"but {recorded:.2%} in result.json:\n"
        "  the weights or the data have changed since, or this machine rounds otherwise"
    )


def _selected_on(task: Task) -> str:
    if not task.record.get("test_is_validation"):
        return ""
    return "\n  these are the pictures that it was selected on: train was given no --test"


def _confusions(found: Evaluation, classes: tuple[str, ...]) -> str:
    """The confusion matrix, or what matters most of it where a terminal has no room for the whole."""
    if len(classes) <= MOST_IN_A_MATRIX:
        for letters in HEADINGS:
            matrix = _matrix(found, classes, letters)
            if len(matrix.partition("\n")[0]) <= WIDTH:
                head = "how many of a class (row) were taken for which (column), and how many rightly"
                return f"\n{head}\n\n{matrix}"
    return f"\nwhat is taken for what most often\n\n{_most(found, classes)}\n\n{_worst(found, classes)}"


def _matrix(found: Evaluation, classes: tuple[str, ...], letters: int) -> str:
    """The confusion matrix with the accuracy of each class; a dot is 0."""
    width = max(len(str(n)) for counts in found.confusion for n in counts)
    rows = [("class", *(name[:letters].rjust(width) for name in classes), "right")]
    for name, counts, right in zip(classes, found.confusion, found.per_class, strict=True):
        rows.append((_short(name, 16), *(str(n) if n else "." for n in counts), _share(right)))
    return table(rows)


def _most(found: Evaluation, classes: tuple[str, ...]) -> str:
    """The pairs of classes that are confused most often."""
    pairs = [(n, true, p) for true, row in enumerate(found.confusion) for p, n in enumerate(row) if n and p != true]
    rows = [("class", "taken for", "times", "of")]
    for n, true, taken in sorted(pairs, key=lambda one: -one[0])[:LISTED]:
        rows.append((_short(classes[true]), _short(classes[taken]), f"{n:,}", f"{sum(found.confusion[true]):,}"))
    return table(rows, left=2) if len(rows) > 1 else "nothing is taken for anything else"


def _worst(found: Evaluation, classes: tuple[str, ...]) -> str:
    """The classes of which the smallest share is right."""
    known = [(right, index) for index, right in enumerate(found.per_class) if right is not None]
    rows = [("class", "right", "of")]
    for right, index in sorted(known)[:LISTED]:
        rows.append((_short(classes[index]), _share(right), f"{sum(found.confusion[index]):,}"))
    least = f"the {len(rows) - 1} of {len(classes):,} classes that are right least often"
    return f"{least}\n\n{table(rows)}"


def _share(right: float | None) -> str:
    return "-" if right is None else f"{right:.1%}"


def _short(name: str, most: int = NAME) -> str:
    """A name that fits, without its middle where need be: ends tell classes apart too.

    >>> _short("crane (n02012849)", 12)
    'crane...849)'
    """
    if len(name) <= most:
        return name
    tail = (most - 3) // 2
    return f"{name[: most - 3 - tail]}...{name[-tail:]}"
