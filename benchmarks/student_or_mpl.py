"""Noisy Student beside Meta Pseudo Labels on the digits: the same labels, the same operations, paired over seeds.

    python benchmarks/student_or_mpl.py                                   # goes on where it was stopped
    python benchmarks/student_or_mpl.py --write benchmarks/results/student_or_mpl.md     # the table put there
    python benchmarks/student_or_mpl.py --miniature --out FILE            # in seconds, to see that it runs

Each method takes as many steps as cost the operations of Noisy Student with its two rounds: those of every phase, but
for labeling and finetuning (the count is last in commit 9007a994). The first teacher of those that have one takes the
steps that it has in Noisy Student, with the same weights, batches and rates, so for a seed all of them learn from the
same labels. Nothing was tuned for it: the settings are those of ``metapl noisy-student digits``, but for fewer steps,
two rounds and small batches. The committed rows are of ``metapl noisy-student digits --compare --seeds 0-9 --steps 600
--rounds 2 --labeled-batch 20`` at commit d3aeafaa.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from harness import NONE, RESULTS, Row

from metapl.apps.compare import Job
from metapl.apps.digits import METHODS, Digits, fitting
from metapl.apps.methods import Mpl, Trained, Training
from metapl.apps.noisy_student import FIRST, NoisyStudent, decay_interval, noisy_view, optimizer
from metapl.apps.train import evaluated
from metapl.data.draws import fold_in
from metapl.execution.batch import digest
from metapl.metrics.predictions import logits_of
from metapl.training import FitResult
from metapl.training.loss_trainer import LossTrainer
from metapl.training.selection import weights_of

RAW = RESULTS / "student_or_mpl.jsonl"
SEEDS, FIRST_STEPS, TAUGHT = range(10), 600, "first_teacher.json"


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
        torch.manual_seed(t.config.fitting.seed)  # whatever was drawn for the labels
        data = dataclasses.replace(data, unlabeled=selected, truth=None)
        if t.folder is not None:
            reached = evaluated(teacher, data.test).accuracy
            first = {"weights_fingerprint": int(digest(weights_of(teacher))), "test_accuracy": reached}
            harness.write_json(t.folder / TAUGHT, first)
        return super().train(dataclasses.replace(t, data=data))


def on_selected(name: str, first: int) -> OnSelected:
    usual: Any = METHODS[name]
    return OnSelected(**{each.name: getattr(usual, each.name) for each in dataclasses.fields(usual)}, first=first)


COMPARED: dict[str, tuple[str, int, Any]] = {  # title, steps, and the method by the steps of its first teacher
    "noisy_student": ("Noisy Student", 600, partial(Students, rounds=2)),
    "mpl_filtered": ("Meta Pseudo Labels, unlabeled examples selected", 394, partial(on_selected, "mpl")),
    "none_filtered": ("same loop, no feedback, unlabeled examples selected", 879, partial(on_selected, "none")),
    "noisy_student_clean": (
        *("Noisy Student, no noise on unlabeled", 600),
        partial(Students, rounds=2, unlabeled_noise="none"),
    ),
    "noisy_student_uneven": ("Noisy Student, not balanced", 600, partial(Students, rounds=2, balance=False)),
    "noisy_student_once": ("Noisy Student, one round", 1200, partial(Students, rounds=1)),
    "supervised": ("supervised, labeled data only", 5400, lambda first: METHODS["supervised"]),
    "uda": ("UDA alone", 989, lambda first: METHODS["uda"]),
}


def train(method: str, seed: int, miniature: bool) -> Row:
    """The row of a run."""
    _, steps, made = COMPARED[method]
    sizes = {"steps": steps, "labeled_batch": 20, "validate_every": round(steps / 6)}
    if miniature:
        sizes = {"steps": 4, "labeled_batch": 4, "validate_every": 2, "finetune_steps": 1}
    of = fitting(**sizes, schedule="exponential", lr=0.2, seed=seed)
    named, config = made(first=4 if miniature else FIRST_STEPS), Digits(hidden=(64, 64), fitting=of)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        result = Job(config, named, folder, resume=False, threads=1).run()
        taught = harness.loaded(folder / TAUGHT) if (folder / TAUGHT).exists() else None
    taught = result["rounds"][0]["teacher"] if "rounds" in result else taught
    row: Row = {"steps": config.fitting.steps}
    if taught is not None:
        row["first_teacher"], row["first_teacher_test_accuracy"] = (
            taught["weights_fingerprint"],
            taught["test_accuracy"],
        )
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


def main() -> None:
    given = harness.parsed(harness.arguments(__doc__, RAW))
    if given.runs:
        jobs = ({"method": m, "seed": seed} for seed in (SEEDS[:2] if given.miniature else SEEDS) for m in COMPARED)
        harness.go_on(given.out, jobs, partial(train, miniature=given.miniature), about=harness.environment())
    harness.show(given.write, "student-or-mpl", table(harness.read(given.out, "method")))


if __name__ == "__main__":
    main()
