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
from digits_study import training
from harness import RESULTS, Row, append, arguments, difference, environment, parsed, points, read, show

from metapl.ablation.cost import flops
from metapl.apps.compare import Job
from metapl.apps.digits import METHODS, Digits, fitting
from metapl.apps.look import kinds_of_steps
from metapl.apps.methods import Data, Mpl, Trained, Training
from metapl.apps.noisy_student import FINETUNED, FIRST, NoisyStudent, decay_interval, noisy_view, optimizer
from metapl.apps.settings import replaced
from metapl.apps.train import evaluated
from metapl.data.draws import fold_in
from metapl.execution.batch import to_device
from metapl.metrics.predictions import logits_of
from metapl.training import FitResult
from metapl.training.loss_trainer import LossTrainer
from metapl.training.resuming import digest
from metapl.training.selection import weights_of

RAW = RESULTS / "student_or_mpl.jsonl"
COMMIT = "d3aeafaa"  # the last one whose metapl noisy-student --compare makes the committed rows
SEEDS, MINIATURE_SEEDS = range(10), range(2)
SIZES: dict[str, Any] = {"steps": 600, "labeled_batch": 20}
MINIATURE: dict[str, Any] = {"steps": 4, "labeled_batch": 4, "finetune_steps": 1, "validate_every": 2}
HIDDEN, TINY = (64, 64), (4,)
TAUGHT = "first_teacher.json"


@dataclass(frozen=True, kw_only=True)
class Students(NoisyStudent):
    """Noisy Student, whose first teacher takes ``first`` steps, whatever those of the rest are."""

    first: int

    def train(self, t: Training) -> Trained:
        def fit(*sources: Any, phase: str, **own: Any) -> FitResult:
            return t.fit(*sources, **{"phase": phase, **own, **(of_first(self.first) if phase == FIRST else {})})

        return super().train(dataclasses.replace(t, fit=fit))


def of_first(steps: int) -> dict[str, Any]:
    """Options of the first teacher's phase, of so many steps."""
    return {"phase": FIRST, "steps": steps, "decay_every": decay_interval(steps), "validate_every": min(steps, 100)}


@dataclass(frozen=True, kw_only=True)
class OnSelected(Mpl):
    """Meta Pseudo Labels on the unlabeled examples that are most probably of each class, an even share of each, by the
    first teacher of Noisy Student.

    Source: Meta Pseudo Labels, section 3.3.
    """

    first: int

    def train(self, t: Training) -> Trained:
        data, seed = t.data, fold_in(t.config.fitting.seed, 0)
        torch.manual_seed(seed)
        teacher = t.config.network()
        trainer = LossTrainer(teacher, optimizer=optimizer(t.config, teacher), **t.options)
        sampler = dataclasses.replace(data.labeled.sampler, seed=seed)
        noisy = dataclasses.replace(data.labeled, view=noisy_view(data), sampler=sampler, seed=seed)
        t.fit(trainer, noisy, None, **of_first(self.first))
        source, classes = data.unlabeled, len(data.classes)
        p = logits_of(teacher, source.images.split(256)).softmax(dim=1)
        chosen = p.topk(-(-len(p) // classes), dim=0, sorted=False).indices.flatten().sort().values
        sampler = dataclasses.replace(source.sampler, size=len(chosen))
        selected = dataclasses.replace(source, images=source.images[chosen], sampler=sampler)
        t.seed(t.config.fitting.seed)  # whatever was drawn for the labels
        data = dataclasses.replace(data, unlabeled=selected, truth=None)
        if t.run is not None:
            reached = evaluated(teacher, data.test).accuracy
            first = {"weights_fingerprint": digest(weights_of(teacher)), "test_accuracy": reached}
            t.run.folder.write_json(TAUGHT, first)
        return super().train(dataclasses.replace(t, data=data))


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


def settings_of(method: str, sizes: dict[str, Any], seed: int) -> tuple[Digits, Any]:
    """The digits, and a method, with the steps of Noisy Student."""
    first = sizes["steps"]
    named: Any
    if method.startswith("noisy_student"):
        named = Students(**{"rounds": 2, **CHANGED.get(method, {})}, first=first)
    elif method.endswith("_filtered"):
        usual: Any = METHODS[method.removesuffix("_filtered")]
        named = OnSelected(**{each.name: getattr(usual, each.name) for each in dataclasses.fields(usual)}, first=first)
    else:
        named = METHODS[method]
    rates = {"schedule": "exponential", "lr": 0.2}
    hidden = TINY if sizes is MINIATURE else HIDDEN
    return Digits(hidden=hidden, fitting=fitting(**sizes, **rates, seed=seed)), named


def operations(config: Digits, method: Any, data: Data) -> dict[str, float]:
    """Floating-point operations of products and convolutions by phase: a step of each kind, times the steps."""
    spent: defaultdict[str, float] = defaultdict(float)

    def count(trainer: Any, labeled: Any, unlabeled: Any, *, phase: str = "fit", **own: Any) -> FitResult:
        if not phase.endswith(FINETUNED):
            firsts = [None if source is None else source[0] for source in (labeled, unlabeled)]
            batches = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: to_device(t, trainer.device), firsts)
            steps = own.get("steps", config.fitting.steps)
            for first, last, step in kinds_of_steps(trainer, steps, own.get("wait", 0)):
                trainer.steps_done = first
                spent[phase] += (last - first) * flops(partial(step, *batches))
        return FitResult(None, 0, {})

    method.train(training(config, data, count))
    return spent


def sized(methods: Sequence[str], sizes: dict[str, Any], seed: int) -> dict[str, tuple[Digits, Any]]:
    """The settings by which the methods cost what the first one does."""
    settings = {method: settings_of(method, sizes, seed) for method in methods}
    data = settings[methods[0]][0].data(print, False, None)
    spent = {method: operations(*each, data) for method, each in settings.items()}
    whole = sum(spent[methods[0]].values())
    for method, cost in spent.items():
        first, rest = cost.get(FIRST, 0.0), sum(phase for name, phase in cost.items() if name != FIRST)
        config, named = settings[method]
        share = (whole - first) / rest
        names = ("steps", "validate_every")
        changed = {name: max(1, round(share * getattr(config.fitting, name))) for name in names}
        settings[method] = replaced(config, **changed), named
    return settings


def train(method: str, config: Digits, named: Any) -> Row:
    """The row of a run."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        result = Job(config, named, folder, resume=False, threads=1).run()
        stored = json.loads((folder / TAUGHT).read_text()) if (folder / TAUGHT).exists() else None
    taught = result["rounds"][0]["teacher"] if "rounds" in result else stored
    row: Row = {"method": method, "seed": config.fitting.seed, "steps": config.fitting.steps}
    row["operations"] = sum(operations(config, named, config.data(print, False, None)).values())
    if taught is not None:
        row["first_teacher_steps"], row["first_teacher"] = named.first, taught["weights_fingerprint"]
        row["first_teacher_test_accuracy"] = taught["test_accuracy"]
    names = ("delivered", "validation_accuracy", "test_accuracy", "student_test_accuracy")
    return row | {name: result[name] for name in names}


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
    given = parsed(arguments(__doc__, RAW))
    if given.runs:
        if not given.out.exists():
            append(given.out, {"about": environment()})
        there = {(row["method"], row["seed"]) for row in read(given.out, "method")}
        for seed in MINIATURE_SEEDS if given.miniature else SEEDS:
            for method, settings in sized(COMPARED, MINIATURE if given.miniature else SIZES, seed).items():
                if (method, seed) not in there:
                    append(given.out, train(method, *settings))
    show(given.write, "student-or-mpl", block(read(given.out, "method"), read(given.out, "about")[0]))


if __name__ == "__main__":
    main()
