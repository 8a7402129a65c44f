"""Noisy Student beside Meta Pseudo Labels on the digits: the same labels, the same operations, paired over seeds.

    python benchmarks/student_or_mpl.py                                   # goes on where it was stopped
    python benchmarks/student_or_mpl.py --write benchmarks/results/student_or_mpl.md     # the table put there
    python benchmarks/student_or_mpl.py --miniature --out FILE            # in seconds, to see that it runs

Each method takes as many steps as cost the operations of Noisy Student with its two rounds: those of every phase, but
for labeling and finetuning. The first teacher of those that have one takes the steps that it has in Noisy Student, with
the same weights, batches and rates, so for a seed all of them learn from the same labels. Nothing was tuned for it: the
settings are those of ``metapl noisy-student digits``, but for fewer steps, two rounds and small batches.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from figures import difference, points
from machine import append, arguments, parsed, write_between_marks
from metapl.apps.experiments.experiment import Experiment
from metapl.apps.recipes import Digits
from metapl.apps.recipes.base import Phase, Phases, Run, Task, rehearse
from metapl.apps.recipes.methods import MetaPseudoLabels, WithoutFeedback
from metapl.apps.recipes.methods.noisy_student import FINETUNED, FIRST, NoisyStudent, decay_interval
from metapl.apps.recipes.settings import Optimizer, SelfTraining

from metapl.ablation.cost import flops
from metapl.apps.look import kinds_of_steps
from metapl.apps.machine.environment import environment
from metapl.apps.run import RunFolder
from metapl.execution.batch import to_device
from metapl.metrics.predictions import logits_of
from metapl.training import FitResult
from metapl.training.resuming import digest
from metapl.training.selection import weights_of

RAW = Path(__file__).parent / "results" / "student_or_mpl.jsonl"
COMMIT = "d3aeafaa"  # the last one whose metapl noisy-student --compare makes the committed rows
SEEDS, MINIATURE_SEEDS = range(10), range(2)
SIZES: dict[str, Any] = {"steps": 600, "labeled_batch": 20, "hidden": (64, 64)}
MINIATURE: dict[str, Any] = {"steps": 4, "labeled_batch": 4, "hidden": (4,), "finetune_steps": 1, "validate_every": 2}
RATE = Optimizer(lr=0.2, momentum=0.9)  # of what trains alone, and of teachers

Row = dict[str, Any]


def first_phase(phase: Phase, steps: int) -> Phase:
    """The first teacher's, by so many steps, whatever those of the rest are."""
    options = {"steps": steps, "decay_every": decay_interval(steps), "validate_every": min(steps, 100)}
    return dataclasses.replace(phase, options={**phase.options, **options})


@dataclass(frozen=True, kw_only=True)
class Students(NoisyStudent):
    """Noisy Student, whose first teacher takes ``first`` steps."""

    first: int

    def phases(self, run: Run) -> Phases:
        phases = super().phases(run)
        result = yield first_phase(next(phases), self.first)
        while True:
            try:
                phase = phases.send(result)
            except StopIteration:
                return
            result = yield phase


@dataclass(frozen=True, kw_only=True)
class OnSelected:
    """On the unlabeled examples that are most probably of each class, an even share of each, by the first teacher.

    Source: Meta Pseudo Labels, section 3.3.
    """

    first: int

    def phases(self, run: Run) -> Phases:
        phase = first_phase(next(NoisyStudent().phases(run)), self.first)
        yield phase
        teacher, source, classes = phase.trainer.student, run.task.unlabeled, len(run.task.classes)
        vars(run)["first"] = teacher
        p = logits_of(teacher, source.images.split(256)).softmax(dim=1)
        chosen = p.topk(-(-len(p) // classes), dim=0, sorted=False).indices.flatten().sort().values
        sampler = dataclasses.replace(source.sampler, size=len(chosen))
        selected = dataclasses.replace(source, images=source.images[chosen], sampler=sampler)
        run.task = dataclasses.replace(run.task, unlabeled=selected, truth=None)
        run.seed(run.recipe.seed)  # whatever was drawn for the labels
        yield from super().phases(run)  # type: ignore[misc]  # of the method that it is mixed into


@dataclass(frozen=True, kw_only=True)
class MetaOnSelected(OnSelected, MetaPseudoLabels, name="mpl_filtered", title="", control=None):
    """Meta Pseudo Labels on selected examples."""


@dataclass(frozen=True, kw_only=True)
class UnfedOnSelected(OnSelected, WithoutFeedback, name="none_filtered", title="", control=None):
    """The same loop without feedback."""


TITLES = {
    "noisy_student": "Noisy Student",
    "mpl_filtered": "Meta Pseudo Labels, unlabeled examples selected",
    "none_filtered": "same loop, no feedback, unlabeled examples selected",
    "noisy_student_clean": "Noisy Student, no noise on unlabeled",
    "noisy_student_uneven": "Noisy Student, not balanced",
    "noisy_student_once": "Noisy Student, one round",
    "supervised": "supervised, labeled data only",
    "uda": "UDA alone",
}
COMPARED = tuple(TITLES)
CHANGED: dict[str, dict[str, Any]] = {
    "noisy_student_clean": {"unlabeled_noise": "none"},
    "noisy_student_uneven": {"balance": False},
    "noisy_student_once": {"rounds": 1},
}


def recipe_of(method: str, sizes: dict[str, Any], seed: int) -> Digits:
    """Of a method with the steps of Noisy Student."""
    usual, first = {**Digits.settings, "teacher": RATE}, sizes["steps"]
    own: Any
    if method.startswith("noisy_student"):
        rounds = SelfTraining(**{"rounds": 2, **CHANGED.get(method, {})})
        own = Students(self_training=rounds, teacher=RATE, label_smoothing=usual["label_smoothing"], first=first)
    elif method.endswith("_filtered"):
        own = {"mpl_filtered": MetaOnSelected, "none_filtered": UnfedOnSelected}[method].of({**usual, "first": first})
    else:
        own = Digits.known[method].of(usual)
    return Digits(**sizes, schedule="exponential", seed=seed, method=own)


def operations(recipe: Digits, task: Task) -> dict[str, float]:
    """Floating-point operations of products and convolutions by phase: a step of each kind, times the steps."""
    spent: defaultdict[str, float] = defaultdict(float)

    def count(trainer: Any, labeled: Any, unlabeled: Any, task: Task, *, phase: str = "fit", **over: Any) -> FitResult:
        if not phase.endswith(FINETUNED):
            firsts = [None if source is None else source[0] for source in (labeled, unlabeled)]
            batches = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: to_device(t, trainer.device), firsts)
            for first, last, step in kinds_of_steps(trainer, over.get("steps", recipe.steps), over.get("wait", 0)):
                trainer.steps_done = first
                spent[phase] += (last - first) * flops(partial(step, *batches))
        return FitResult(None, 0, {})

    rehearse(recipe, task, count)
    return spent


def sized(methods: Sequence[str], sizes: dict[str, Any], seed: int) -> dict[str, Digits]:
    """The recipes by which the methods cost what the first one does."""
    recipes = {method: recipe_of(method, sizes, seed) for method in methods}
    task = recipes[methods[0]].task()
    spent = {method: operations(recipe, task) for method, recipe in recipes.items()}
    whole = sum(spent[methods[0]].values())
    for method, cost in spent.items():
        first, rest = cost.get(FIRST, 0.0), sum(phase for name, phase in cost.items() if name != FIRST)
        share = (whole - first) / rest
        steps, every = (max(1, round(share * getattr(recipes[method], name))) for name in ("steps", "validate_every"))
        recipes[method] = dataclasses.replace(recipes[method], steps=steps, validate_every=every)
    return recipes


def train(method: str, recipe: Digits) -> Row:
    """The row of a run."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(recipe, RunFolder(Path(folder)), progress=False, say=lambda text: None)
        torch.manual_seed(recipe.seed)
        task = recipe.task()
        run = experiment.train(task)
        networks = {name: run.keep(name) for name in recipe.method.kept}
        delivered = recipe.method.delivered(
            {name: one.validation_accuracy for name, one in networks.items()}, experiment.selects(task)
        )
        row: Row = {"method": method, "seed": recipe.seed, "steps": recipe.steps}
        row["operations"] = sum(operations(recipe, task).values())
        if hasattr(recipe.method, "first"):
            row["first_teacher_steps"] = recipe.method.first
            if recipe.method.is_noisy_student:
                taught = run.rounds.records[0]["teacher"]
                row["first_teacher"], reached = taught["weights_fingerprint"], taught["test_accuracy"]
            else:
                row["first_teacher"] = digest(weights_of(run.first))
                reached = experiment.network("", task, run.first, None, {}).accuracies()["test_accuracy"]
            row["first_teacher_test_accuracy"] = reached
    chosen = networks[delivered]
    row |= {"delivered": delivered, **chosen.accuracies()}
    return row | {"student_test_accuracy": networks["student"].accuracies()["test_accuracy"]}


def read(path: Path = RAW) -> list[Row]:
    """The rows of the runs."""
    return [row for row in map(json.loads, path.read_text().splitlines()) if "method" in row]


def accuracies(rows: Sequence[Row], name: str = "test_accuracy") -> dict[str, list[float]]:
    """Accuracies by method, in the order of the seeds."""
    found: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        found.setdefault(row["method"], []).append(row[name])
    return {method: found[method] for method in dict.fromkeys(row["method"] for row in rows)}


def error(values: Sequence[float]) -> float:
    """The standard error of the mean, in points, as it is shown.

    >>> error([0.8, 0.82, 0.84])
    1.2
    """
    return float(f"{100 * statistics.stdev(values) / len(values) ** 0.5:.1f}")


def table(rows: Sequence[Row]) -> str:
    """Each method, and what Noisy Student is above it."""
    found, steps = accuracies(rows), {row["method"]: row["steps"] for row in rows}
    first, *_ = found
    lines = [
        "| method | steps | test accuracy | Noisy Student above it | p |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, values in found.items():
        cells = [TITLES[method], f"{steps[method]:,}", f"{points(values):.1f} ± {error(values):.1f}"]
        if method == first:
            cells += ["–", "–"]
        else:
            gain, p = difference(found[first], values)
            between = error([a - b for a, b in zip(found[first], values, strict=True)])
            cells += [f"{gain} ± {between:.1f}", p]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def block(rows: Sequence[Row], about: Row) -> str:
    """The table, and how it was made."""
    seeds = sorted({row["seed"] for row in rows})
    costs = [row["operations"] for row in rows]
    taught = {row["seed"]: row["first_teacher_test_accuracy"] for row in rows if "first_teacher_steps" in row}
    (teacher,) = {row["first_teacher_steps"] for row in rows if "first_teacher_steps" in row}
    apart = 100 * max(max(costs) / costs[0] - 1, 1 - min(costs) / costs[0])
    made = f"`{about['command']}` at commit {COMMIT} made these rows; " if "command" in about else ""
    return (
        f"{table(rows)}\n\n"
        f"What each delivers, in % of 400 test images, mean ± standard error over {len(seeds)} seeds ({seeds[0]} to "
        f"{seeds[-1]}); differences in points, with the p of the paired t-test "
        "over draws of these images, not corrected for the number of rows. "
        f"Steps are those of each round, and of the main phase of methods without rounds. The first teacher takes "
        f"{teacher:,}, and reaches {points([*taught.values()]):.1f} %. Operations differ by {apart:.2f} % at most. "
        f"{made}`python benchmarks/student_or_mpl.py` trains the same methods; raw rows: "
        f"`benchmarks/results/{RAW.name}`."
    )


def main() -> None:
    parser = arguments(__doc__, RAW, page=True)
    given = parsed(parser)
    if given.write is not None:
        about = json.loads(given.out.read_text().splitlines()[0])
        write_between_marks(given.write, "student-or-mpl", block(read(given.out), about))
        return
    if not given.out.exists():
        append(given.out, {"about": environment()})
    there = {(row["method"], row["seed"]) for row in read(given.out)}
    for seed in MINIATURE_SEEDS if given.miniature else SEEDS:
        recipes = sized(COMPARED, MINIATURE if given.miniature else SIZES, seed)
        for method, recipe in recipes.items():
            if (method, seed) not in there:
                append(given.out, train(method, recipe))


if __name__ == "__main__":
    main()
