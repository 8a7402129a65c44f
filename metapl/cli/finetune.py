"""``metapl finetune RUN``"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from metapl.cli.finished import Finished, finished
from metapl.cli.parse import Run
from metapl.cli.table import table
from metapl.errors import MetaplError
from metapl.evaluate import Evaluation
from metapl.fit import FitResult, Interrupted
from metapl.recipes.base import Recipe
from metapl.recipes.experiment import Experiment
from metapl.run_folder import Metrics, RunFolder


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Finetune a run's student on its labelled data again.

    Without options it repeats what train did. The finetuned student and its numbers in result.json are replaced when
    the new ones are there; the student before finetuning stays as it is. Choose options by the validation accuracy: the
    test set is to report on. A comparison that the run is part of keeps the numbers that it was made with.

    Args:
        run: the run folder.
        steps: finetuning steps; those of the recipe by default.
        lr: learning rate; that of the recipe by default.
    """

    run: Run
    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    lr: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")] = None

    def __call__(self) -> int:
        run = finished(self.run)
        if run.is_comparison:
            one = self.run / run.result["method"] / f"seed-{run.result['seed']}"
            raise MetaplError(f"{self.run} is a comparison; finetune one of its runs: metapl finetune {one}")
        recipe = self._recipe(run)
        try:
            with run.folder.claimed(run.description, resume=True):
                result = _finetuned_anew(run, recipe)
        except KeyboardInterrupt as stopped:
            print(f"\nmetapl: stopped; {self.run} is as it was.", file=sys.stderr)
            return 128 + (stopped.signal_number if isinstance(stopped, Interrupted) else 2)
        print(f"{run.title}\n")
        print(_before_and_after(run.result, result, run.recipe))
        on = Evaluation(**run.result["evaluation"])
        print(f"\ntest: {on.n:,} examples, chance {on.chance:.2%}")
        print(f"\nthe finetuned student and its numbers in {self.run} are new")
        return 0

    def _recipe(self, run: Finished) -> Recipe:
        """The run's recipe, with the options given."""
        steps = run.recipe.finetune_steps if self.steps is None else self.steps
        if steps < 1:
            given = "the recipe has no finetuning steps" if self.steps is None else f"--steps {steps}"
            raise MetaplError(f"{given}; expected 1 or more: metapl finetune {self.run} --steps 200")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise MetaplError(f"--lr {self.lr}: expected a number above 0.")
        optimizer = run.recipe.finetune if self.lr is None else dataclasses.replace(run.recipe.finetune, lr=self.lr)
        changed = {"finetune_steps": steps, "finetune": optimizer}
        recipe: Recipe = dataclasses.replace(run.recipe, **changed)  # type: ignore[type-var]  # recipes are dataclasses
        return recipe


def _finetuned_anew(run: Finished, recipe: Recipe) -> dict[str, Any]:
    """Finetune by ``recipe`` and replace the files of the run; the new content of ``result.json``."""
    student, task = run.student(finetuned=False), recipe.task()
    before = FitResult(run.result.get("validation_accuracy"), run.result.get("best_step", 0), student.state_dict())
    torch.manual_seed(recipe.seed)
    with tempfile.TemporaryDirectory(prefix="metapl-") as scratch:
        tuned, after = Experiment(recipe, RunFolder(scratch)).finetune(task, student, before)
        rows = Metrics(Path(scratch) / "metrics.jsonl").rows("finetune")
    result = run.result | {
        "finetuned_validation_accuracy": tuned.validation_accuracy,
        "finetuned_test_accuracy": after.accuracy,
        "finetuned_with": {"steps": recipe.finetune_steps, "lr": recipe.finetune.lr},
    }
    # Each file is replaced whole. Should the machine die between two, `metapl evaluate --finetuned` says that the
    # number on record is not that of the weights, and finetuning again mends it.
    run.folder.write_weights("finetuned_student.safetensors", tuned.weights)
    run.folder.write_json("result.json", result)
    metrics = Metrics(run.folder.path / "metrics.jsonl")
    metrics.cut("finetune", 0)
    for row in rows:
        metrics.add(row)
    Experiment(recipe, run.folder).report(result, Evaluation(**run.result["evaluation"]), task.classes)
    return result


def _before_and_after(before: dict[str, Any], after: dict[str, Any], recipe: Recipe) -> str:
    tuned_before = before.get("finetuned_with", {"steps": recipe.finetune_steps, "lr": recipe.finetune.lr})
    return table(
        [
            ("", "validation", "test", "steps", "learning rate"),
            ("student", _share(before, "validation_accuracy"), _share(before, "test_accuracy"), "", ""),
            ("finetuned, before", *_row(before, tuned_before)),
            ("finetuned, now", *_row(after, after["finetuned_with"])),
        ]
    )


def _row(result: dict[str, Any], how: dict[str, Any]) -> tuple[str, str, str, str]:
    validation, test = _share(result, "finetuned_validation_accuracy"), _share(result, "finetuned_test_accuracy")
    return validation, test, str(how["steps"]), f"{how['lr']:g}"


def _share(result: dict[str, Any], name: str) -> str:
    value = result.get(name)
    return "-" if value is None else f"{value:.2%}"
