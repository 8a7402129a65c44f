"""``metapl finetune RUN``"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from metapl.apps.commands.parse import Command, Run, unset
from metapl.apps.commands.process import exit_code
from metapl.apps.experiments.experiment import Experiment, Network, delivered
from metapl.apps.experiments.folder import RunFolder
from metapl.apps.experiments.load_run import LoadedRun, load_run
from metapl.apps.experiments.store import stored_result
from metapl.apps.recipes.base import Recipe
from metapl.apps.recipes.methods import titled
from metapl.errors import MetaplError
from metapl.metrics import Evaluation
from metapl.runs.fields import AtLeastOne, Range
from metapl.runs.rows import Metrics
from metapl.runs.sealed import sha256_of
from metapl.training import FitResult
from metapl.training.selection import weights_of
from metapl.words import table, tell

SCRATCH = ".finetune-"
"""What the name of the folder begins with, within the run's, in which its records are kept until it has ended."""

ORDER = ("student", "teacher", "finetuned")
"""The networks of a run: the first of equals by validation is delivered."""


@dataclass(frozen=True, kw_only=True)
class Finetune(Command):
    """Finetune a run's student, or its one network, on its labeled data again.

    Without options it repeats what train did. The finetuned network and its numbers in result.json are replaced when
    the new ones are there; the network before finetuning stays as it is. Which network the run delivers is decided
    anew. Choose options by the validation accuracy: the test set is to report on. A comparison that the run is part of
    keeps the networks and numbers that it was made with.

    Args:
        folder: the run folder.
        steps: finetuning steps; by default as in the recipe.
        lr: learning rate; by default as in the recipe.
    """

    folder: Run
    steps: Annotated[AtLeastOne | None, unset()] = None
    lr: Annotated[Annotated[float, Range(above=0)] | None, unset()] = None

    def run(self) -> int:
        run = load_run(self.folder)
        if run.is_comparison:
            run_folder = self.folder / run.result["method"] / f"seed-{run.result['seed']}"
            raise MetaplError(f"{self.folder} is a comparison; finetune one of its runs: metapl finetune {run_folder}")
        if run.finetuned_larger:
            raise MetaplError(
                f"{self.folder} was finetuned at a larger size, which is a part of its training; expected another run: "
                "metapl noisy-student with other --finetune-steps or --finetune.lr."
            )
        steps = self.steps or run.recipe.finetune_steps
        if not steps:
            raise MetaplError(f"the recipe has no finetuning steps; expected metapl finetune {self.folder} --steps 200")
        optimizer = dataclasses.replace(run.recipe.finetune, lr=self.lr or run.recipe.finetune.lr)
        recipe = dataclasses.replace(run.recipe, finetune_steps=steps, finetune=optimizer)
        try:
            with run.folder.claimed(run.description, resume=True):
                # Another process may have finetuned it since.
                run = dataclasses.replace(run, result=stored_result(run.folder))
                result = _finetuned_anew(run, recipe)
        except KeyboardInterrupt as stopped:
            tell(f"\nmetapl: stopped; {self.folder} is as it was.", file=sys.stderr)
            return exit_code(stopped)
        usual = {"steps": run.recipe.finetune_steps, "lr": run.recipe.finetune.lr}
        rows: list[tuple[str, ...]] = [("", "validation", "test", "steps", "learning rate")]
        for name, network, found, settings in (
            (titled(run.result["method"], "student"), "student", run.result, None),
            ("finetuned, before", "finetuned", run.result, run.result.get("finetuned_with", usual)),
            ("finetuned, now", "finetuned", result, result["finetuned_with"]),
        ):
            values = [found.get(f"{network}_{part}_accuracy") for part in ("validation", "test")]
            by = ("", "") if settings is None else (str(settings["steps"]), f"{settings['lr']:g}")
            rows.append((name, *("-" if value is None else f"{value:.2%}" for value in values), *by))
        n, on = result["validation_size"], result.get("evaluation")
        validation = f"validation: {n:,} examples" if n else "no validation set"
        test = "no test set was given"
        if on is not None:
            test = f"test: {on['n']:,} examples, chance {Evaluation(**on).chance:.2%}"
        by_rule = "by validation" if result["delivered_by"] == "validation" else "by rule"
        name, before = (run.titled(one["delivered"]) for one in (result, run.result))
        changed = "" if name == before else f"; before: {before}"
        tell(f"{run.title}\n\n{table(rows)}\n\n{validation}; {test}\n")
        tell(f"the {run.titled('finetuned')} and its numbers in {self.folder} are new")
        tell(f"delivered: {name} ({by_rule}{changed})")
        return 0


def _finetuned_anew(run: LoadedRun, recipe: Recipe) -> dict[str, Any]:
    """Finetune by ``recipe`` and replace the files of the run; the new content of ``result.json``."""
    device = run.device
    student, task = run.network("student").to(device), recipe.task()
    torch.manual_seed(recipe.seed)
    for left in run.folder.path.glob(f"{SCRATCH}*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=run.folder.path) as scratch:
        experiment = Experiment(recipe, RunFolder(scratch))
        before = FitResult(run.result.get("student_validation_accuracy"), run.result["best_step"], weights_of(student))
        tuned = experiment.finetuned(task, student, before)
        rows = Metrics(Path(scratch) / "metrics.jsonl").rows("finetune")
        # The validation accuracies on record decide on delivery.
        recorded = {name: run.result.get(f"{name}_validation_accuracy") for name in run.networks}
        networks = {name: Network(name, {}, accuracy, None) for name, accuracy in recorded.items()}
        networks |= {"finetuned": tuned}
        networks = {name: networks[name] for name in ORDER if name in networks}
        name = delivered(run.result["method"], networks, experiment.selects(task))
        chosen = networks[name]
        if name not in ("finetuned", run.result["delivered"]):
            network = run.network(name).to(device)
            chosen = experiment.network(name, task, network, chosen.validation_accuracy, {})
    result = run.result | tuned.accuracies("finetuned_")
    result["validation_chance"] = task.validation_chance
    result["finetuned_with"] = {"steps": recipe.finetune_steps, "lr": recipe.finetune.lr}
    if name == "finetuned" or name != run.result["delivered"]:
        result |= chosen.as_delivered()
    # Each file is replaced whole. Should the machine die between two, the weights are refused, for their SHA-256 is not
    # the one on record, and finetuning again mends it.
    sealed = {tuned.file: run.folder.write_weights(tuned.file, tuned.weights)}
    metrics = Metrics(run.folder.path / "metrics.jsonl")
    metrics.cut("finetune", 0)
    for row in rows:
        metrics.add(row)
    sealed[metrics.file.name] = sha256_of(metrics.file)
    result["sha256"] = run.result.get("sha256", {}) | sealed
    run.folder.write_json("result.json", result)
    evaluation = Evaluation(**result["evaluation"]) if "evaluation" in result else None
    Experiment(recipe, run.folder).report(result, evaluation, task)
    return result
