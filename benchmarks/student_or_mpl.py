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
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from digits_study import training
from harness import NONE, RESULTS, Row

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


def on_selected(name: str, first: int) -> OnSelected:
    usual: Any = METHODS[name]
    return OnSelected(**{each.name: getattr(usual, each.name) for each in dataclasses.fields(usual)}, first=first)


COMPARED: dict[str, tuple[str, Any]] = {  # a title, and the method by the steps of its first teacher
    "noisy_student": ("Noisy Student", partial(Students, rounds=2)),
    "mpl_filtered": ("Meta Pseudo Labels, unlabeled examples selected", partial(on_selected, "mpl")),
    "none_filtered": ("same loop, no feedback, unlabeled examples selected", partial(on_selected, "none")),
    "noisy_student_clean": (
        "Noisy Student, no noise on unlabeled",
        partial(Students, rounds=2, unlabeled_noise="none"),
    ),
    "noisy_student_uneven": ("Noisy Student, not balanced", partial(Students, rounds=2, balance=False)),
    "noisy_student_once": ("Noisy Student, one round", partial(Students, rounds=1)),
    "supervised": ("supervised, labeled data only", lambda first: METHODS["supervised"]),
    "uda": ("UDA alone", lambda first: METHODS["uda"]),
}


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


def sized(sizes: dict[str, Any], seed: int) -> dict[str, tuple[Digits, Any]]:
    """The digits and each method, with the steps by which it costs what the first one does."""
    hidden, rates = TINY if sizes is MINIATURE else HIDDEN, {"schedule": "exponential", "lr": 0.2}
    config = Digits(hidden=hidden, fitting=fitting(**sizes, **rates, seed=seed))
    methods = {name: made(first=sizes["steps"]) for name, (_, made) in COMPARED.items()}
    data = config.data(print, False, None)
    spent = {name: operations(config, method, data) for name, method in methods.items()}
    whole, settings = sum(spent["noisy_student"].values()), {}
    for name, cost in spent.items():
        first, rest = cost.get(FIRST, 0.0), sum(phase for phase_name, phase in cost.items() if phase_name != FIRST)
        numbers = {each: getattr(config.fitting, each) for each in ("steps", "validate_every")}
        changed = {each: max(1, round((whole - first) / rest * number)) for each, number in numbers.items()}
        settings[name] = replaced(config, **changed), methods[name]
    return settings


def train(method: str, seed: int, settings: dict[str, tuple[Digits, Any]]) -> Row:
    """The row of a run."""
    config, named = settings[method]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        result = Job(config, named, folder, resume=False, threads=1).run()
        stored = harness.loaded(folder / TAUGHT) if (folder / TAUGHT).exists() else None
    taught = result["rounds"][0]["teacher"] if "rounds" in result else stored
    row: Row = {"steps": config.fitting.steps}
    row["operations"] = sum(operations(config, named, config.data(print, False, None)).values())
    if taught is not None:
        row["first_teacher_steps"], row["first_teacher"] = named.first, taught["weights_fingerprint"]
        row["first_teacher_test_accuracy"] = taught["test_accuracy"]
    names = ("delivered", "validation_accuracy", "test_accuracy", "student_test_accuracy")
    return row | {name: result[name] for name in names}


def error(values: Sequence[float]) -> float:
    """The standard error of the mean, in points, as it is shown.

    >>> error([0.8, 0.82, 0.84])
    1.2
    """
    return float(f"{100 * statistics.stdev(values) / len(values) ** 0.5:.1f}")


def table(rows: Sequence[Row]) -> str:
    """Each method, and what Noisy Student is above it; rows in the order of the seeds."""
    found: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        found.setdefault(row["method"], []).append(row["test_accuracy"])
    steps, lines = {row["method"]: row["steps"] for row in rows}, []
    for method in dict.fromkeys(row["method"] for row in rows):
        values, own = found[method], found[rows[0]["method"]]
        lead = [NONE, NONE]
        if values is not own:
            gain, p = harness.difference(own, values)
            lead = [f"{gain} ± {error([a - b for a, b in zip(own, values, strict=True)]):.1f}", p]
        shown = f"{harness.points(values):.1f} ± {error(values):.1f}"
        lines.append([COMPARED[method][0], f"{steps[method]:,}", shown, *lead])
    return harness.grid(["method", "steps", "test accuracy", "Noisy Student above it", "p"], lines)


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
        f"{teacher:,}, and reaches {harness.points([*taught.values()]):.1f} %. Operations differ by {apart:.2f} % at "
        f"most. {made}`python benchmarks/student_or_mpl.py` trains the same methods; raw rows: "
        f"`benchmarks/results/{RAW.name}`."
    )


def main() -> None:
    given = harness.parsed(harness.arguments(__doc__, RAW))
    if given.runs:
        small, about = given.miniature, {} if given.out.exists() else {"about": harness.environment()}
        for seed in MINIATURE_SEEDS if small else SEEDS:
            settings, jobs = sized(MINIATURE if small else SIZES, seed), ({"method": m, "seed": seed} for m in COMPARED)
            harness.go_on(given.out, jobs, partial(train, settings=settings), **about)
            about = {}
    rows, (about, *_) = (harness.read(given.out, column) for column in ("method", "about"))
    harness.show(given.write, "student-or-mpl", block(rows, about))


if __name__ == "__main__":
    main()
