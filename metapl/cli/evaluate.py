"""``metapl evaluate RUN``"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from metapl.cli.finished import Finished, finished, weights_file
from metapl.cli.parse import Run, Switch
from metapl.cli.table import table
from metapl.evaluate import Evaluation, evaluate_logits, predict_logits
from metapl.fit import batches_of

HEADING = 5
"""Letters of a class that head a column."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a run's student on its test set again: accuracy, calibration, and which classes it takes for which.

    The accuracy is the one in the run's result.json; where it is not, that is said. Of a comparison, it is the student
    that the comparison delivers: MPL's best by validation.

    Args:
        run: the run folder.
        finetuned: the student after finetuning on the labelled data.
        json: print JSON.
    """

    run: Run
    finetuned: Switch = False
    json: Switch = False

    def __call__(self) -> int:
        run = finished(self.run)
        student, task = run.student(self.finetuned), run.recipe.task()
        found = evaluate_logits(*predict_logits(student, batches_of(task.test, torch.device("cpu"))), task.classes)
        recorded = run.result["finetuned_test_accuracy" if self.finetuned else "test_accuracy"]
        if self.json:
            print(json.dumps({**self._about(run), "recorded_accuracy": recorded, **found.to_json()}, indent=2))
            return 0
        print(f"{run.title}, {weights_file(self.finetuned)}\n")
        print(f"test accuracy               {found.accuracy:.2%} of {found.n}, {_as_recorded(found, recorded)}")
        print(f"expected calibration error  {found.expected_calibration_error:.2%}")
        print(f"negative log-likelihood     {found.negative_log_likelihood:.3f}")
        print("\nhow many of a class (row) were taken for which (column), and how many rightly\n")
        print(_confusion(found, task.classes))
        return 0

    def _about(self, run: Finished) -> dict[str, str | int]:
        return {
            "run": str(self.run),
            "recipe": run.recipe.name,
            "method": run.result["method"],
            "seed": run.recipe.seed,
            "weights": weights_file(self.finetuned),
        }


def _as_recorded(found: Evaluation, recorded: float) -> str:
    if found.accuracy == recorded:
        return "as in result.json"
    return (
        f"but {recorded:.2%} in result.json:\n"
        "  the weights or the data have changed since, or this machine rounds otherwise"
    )


def _confusion(found: Evaluation, classes: tuple[str, ...]) -> str:
    """The confusion matrix with the accuracy of each class; a dot is 0."""
    width = max(len(str(n)) for counts in found.confusion for n in counts)
    rows = [("class", *(name[:HEADING].rjust(width) for name in classes), "right")]
    for name, counts, right in zip(classes, found.confusion, found.per_class, strict=True):
        rows.append((name, *(str(n) if n else "." for n in counts), "-" if right is None else f"{right:.1%}"))
    return table(rows)
