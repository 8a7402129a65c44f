"""What is done with a run that has ended: ``metapl finetune`` and ``metapl export``."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

import torch

from metapl.apps.commands.inputs import Network, held
from metapl.apps.commands.parse import Command, Run, Switch, unset
from metapl.apps.commands.process import exit_code
from metapl.apps.experiments import experiment, galleries
from metapl.apps.experiments.folder import (
    WEIGHTS,
    LoadedRun,
    RunFolder,
    counts_of,
    describe,
    load_run,
    stored_data,
    stored_result,
)
from metapl.apps.export import export
from metapl.apps.export.network import can_run_onnx, require_onnx
from metapl.apps.machine.sealed import sha256_of
from metapl.apps.recipes.base import Recipe, Task
from metapl.apps.recipes.methods import title, titled
from metapl.apps.words import table, tell
from metapl.errors import MetaplError
from metapl.metrics import Evaluation
from metapl.runs.fields import AtLeastOne, Range
from metapl.runs.rows import Metrics
from metapl.training import FitResult
from metapl.training.selection import weights_of

# What the name of the folder begins with, within the run's, in which its records are kept until it has ended.
SCRATCH = ".finetune-"
ORDER = ("student", "teacher", "finetuned")  # the first of equals by validation is delivered


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
        tell(_compared(run, result))
        tell(f"the {run.titled('finetuned')} and its numbers in {self.folder} are new")
        by_rule = "by validation" if result["delivered_by"] == "validation" else "by rule"
        name, before = (run.titled(one["delivered"]) for one in (result, run.result))
        tell(f"delivered: {name} ({by_rule}{'' if name == before else f'; before: {before}'})")
        return 0


def _compared(run: LoadedRun, result: dict[str, Any]) -> str:
    """The network before finetuning, finetuned before and now, and on what they were measured."""
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
    return f"{run.title}\n\n{table(rows)}\n\n{validation}; {test}\n"


def _refuse_others(run: LoadedRun, task: Task) -> None:
    """Refuse other data than those of the run, and files that go into the new report and are not as they were written:
    the new checksums would hide that."""
    if json.loads(json.dumps(task.record))["hash"] != stored_data(run.folder)["hash"]:
        since = f"since the run in {run.folder.path} was started (see its data.json)"
        raise MetaplError(f"the data have changed {since}; put them back, or start another run with metapl train.")
    sealed, tuned = run.result.get("sha256", {}), run.folder.path / WEIGHTS["finetuned"]
    galleries.read_galleries(run.folder.path, sealed.get(galleries.FILE))
    # Where the last finetuning died between two files, the weights are the first of them, and this one mends it.
    if not tuned.is_file() or sha256_of(tuned) == sealed.get(tuned.name):
        experiment.last_fit(run.folder.path, run.result)


def _finetuned_anew(run: LoadedRun, recipe: Recipe) -> dict[str, Any]:
    """Finetune by ``recipe`` and replace the files of the run; the new content of ``result.json``."""
    device = run.device
    student, task = run.network("student").to(device), recipe.task()
    _refuse_others(run, task)
    torch.manual_seed(recipe.seed)
    for left in run.folder.path.glob(f"{SCRATCH}*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=run.folder.path) as scratch:
        anew = experiment.Experiment(recipe, RunFolder(scratch))
        before = FitResult(run.result.get("student_validation_accuracy"), run.result["best_step"], weights_of(student))
        tuned = anew.finetuned(task, student, before)
        rows = Metrics(Path(scratch) / "metrics.jsonl").rows("finetune")
        # The validation accuracies on record decide on delivery.
        recorded = {name: run.result.get(f"{name}_validation_accuracy") for name in run.networks}
        networks = {name: experiment.Network(name, {}, accuracy, None) for name, accuracy in recorded.items()}
        networks |= {"finetuned": tuned}
        networks = {name: networks[name] for name in ORDER if name in networks}
        name = experiment.delivered(run.result["method"], networks, anew.selects(task))
        chosen = networks[name]
        if name not in ("finetuned", run.result["delivered"]):
            network = run.network(name).to(device)
            chosen = anew.network(name, task, network, chosen.validation_accuracy, {})
    result = run.result | tuned.accuracies("finetuned_")
    result["validation_chance"] = task.validation_chance
    result["finetuned_with"] = {"steps": recipe.finetune_steps, "lr": recipe.finetune.lr}
    if name == "finetuned" or name != run.result["delivered"]:
        result |= chosen.as_delivered()
    # Each file is replaced whole. Should the machine die between two, the weights are refused, for their SHA-256 is not
    # the one on record, and finetuning again mends it.
    sealed = {tuned.file: run.folder.write_weights(tuned.file, tuned.weights)}
    metrics = Metrics(run.folder.path / "metrics.jsonl")
    metrics.cut("finetune", 0, then=rows)
    sealed[metrics.file.name] = sha256_of(metrics.file)
    result["sha256"] = run.result.get("sha256", {}) | sealed
    run.folder.write_json("result.json", result)
    evaluation = Evaluation(**result["evaluation"]) if "evaluation" in result else None
    experiment.Experiment(recipe, run.folder).report(result, evaluation, task)
    return result


# What stands on the card of a student's evaluation, beside its accuracy.
FIGURES = {"top5": "top-5 accuracy", "expected_calibration_error": "expected calibration error"}


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a run's network for others: a program that needs torch alone, its weights, and a card for both.

    model.pt2 is the whole network, with its normalization, as a program for torch.export.load: any number of pictures
    in, logits out. model.safetensors holds the weights under the names of torchvision or timm, where the network is
    theirs. MODEL_CARD.md has the code that loads each, the accuracies, the recipe without the paths of your files,
    hashes of the data, and versions. Files of these names that are there already are replaced.

    Programs are run without metapl and compared with the network before anything is written.

    Args:
        folder: the run folder; of a comparison, the run that it delivers.
        out: the folder to write them to; made if need be.
        onnx: model.onnx too; needs pip install 'metapl[onnx]'.
    """

    folder: Run
    out: Annotated[Path, unset("DIR")]
    network: Network = "delivered"
    onnx: Switch = False

    def run(self) -> int:
        run = load_run(self.folder)
        if self.onnx:
            require_onnx()
        name = run.name(self.network)
        with held(self.out):
            written = export(
                run.network(name),
                self.out,
                card=_card(run, name),
                architecture=run.recipe.architecture(),
                shape=run.recipe.input_shape,
                onnx=self.onnx,
            )
        tell(f"{run.heading(name)}\n")
        for file in filter(None, (written.weights, written.program, written.onnx)):
            about = "run without metapl: it gives what the network gives"
            if file == written.weights:
                about = f"SHA-256 {written.sha256}"
            elif file == written.onnx and not can_run_onnx():
                about = "not run: onnxruntime is not installed"
            tell(f"{file}: {file.stat().st_size / 1e6:.3g} MB\n  {about}")
        tell(f"{written.card}: how to load them, and how good they are")
        return 0


def _card(run: LoadedRun, name: str) -> dict[str, Any]:
    """What stands on the card: figures of the exported network, and of no others."""
    result, recipe, method = run.result, run.recipe, run.result["method"]
    metrics: dict[str, Any] = {}
    if "evaluation" in result:
        evaluation = Evaluation(**result["evaluation"])
        metrics |= {"test accuracy": result[f"{name}_test_accuracy"], "test examples": evaluation.n}
        metrics["test chance level"] = evaluation.chance
        if name == result["delivered"]:  # the evaluation is of that one
            metrics |= {f"test {words}": result["evaluation"][figure] for figure, words in FIGURES.items()}
    if f"{name}_validation_accuracy" in result:
        metrics["validation accuracy"] = result[f"{name}_validation_accuracy"]
        metrics["validation examples"] = result["validation_size"]
    data = stored_data(run.source)
    examples = {"data set": data["data"]} if "data" in data else {}
    examples |= {part: f"{count:,} examples" if count else "none" for part, count in counts_of(data).items()}
    fields = {
        # Of the places of files, the last names are left.
        field: PurePath(value).name if isinstance(value, str) and "/" in value else value
        for field, value in describe(recipe)["fields"].items()
        if field != "class_names"
    }
    run_by = {"name": recipe.name, "method": method, "best_step": result["best_step"]}
    if name == "finetuned" and "finetuned_with" in result:
        run_by["finetuned_with"] = result["finetuned_with"]
    return {
        "title": f"{recipe.name}: {title(method)}, {run.titled(name)}",
        "classes": recipe.classes,
        "metrics": {figure: value for figure, value in metrics.items() if value is not None},
        "data_hash": examples | {f"SHA-256 of {part}": f"`{digest}`" for part, digest in data["hash"].items()},
        "recipe": run_by | {"fields": fields},
        "notes": "\n".join(f"- {note}" for note in _notes(run, name)),
        "center": getattr(recipe, "center", 1.0),
    }


def _notes(run: LoadedRun, name: str) -> Iterator[str]:
    """Of which step these weights are, how they were chosen, and what they take."""
    result, by_validation = run.result, run.result["delivered_by"] == "validation"
    step, steps, student = result["best_step"], run.recipe.steps, run.titled("student")
    if name == "teacher":
        yield f"The weights are those of the teacher after the last step, {steps:,}."
    else:
        chosen = f"best {student} by validation" if by_validation else f"last {student}"
        unless = ", unless that lowered the validation accuracy" if by_validation else ""
        anew = f" They were finetuned on the labeled examples{unless}." if name == "finetuned" else ""
        yield f"The weights are those of the {chosen}: step {step:,} of {steps:,}.{anew}"
    why = "as the best by validation" if by_validation else "by a rule of its method"
    if name == result["delivered"]:
        names = ", ".join(map(run.titled, run.networks))
        yield f"Of the networks of the run ({names}) it delivers this one, {why}."
    else:
        yield f"The run delivers another of its networks, {why}: {run.titled(result['delivered'])}."
    if run.is_comparison:
        methods, seeds = (", ".join(map(str, result[part])) for part in ("methods", "seeds"))
        yield f"It was compared: methods {methods}; seeds {seeds}; {result['delivery']}."
    yield "Nothing was chosen by the test examples." if "evaluation" in result else "No test set was given."
    yield run.recipe.input_note
