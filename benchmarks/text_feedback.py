"""Why does feedback not help on a text? A small BERT says which package a docstring is from; one setting is changed
at a time, and the feedback itself is looked at along the run.

    python benchmarks/text_feedback.py                  # goes on where it was stopped
    python benchmarks/text_feedback.py --table          # the tables of the file's rows
    python benchmarks/text_feedback.py --write benchmarks/results/text_feedback.md

Texts and networks are those of ``text_corpus.py``. The weak view is the text; in the strong one 15 % of the words are
masked. First a new user's settings and one change at a time, on seeds of their own and validation texts; then as many
configurations with feedback as without it are tuned, on other seeds; then the test texts, for what was chosen and for a
new user's settings.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import text_corpus as texts
import torch
from harness import RESULTS, Row, arguments, between, difference, environment, go_on, grid, parsed, read, show, spread
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.data import StepSampler
from metapl.feedback import Forward
from metapl.metrics import predict_logits

RAW = RESULTS / "text_feedback.jsonl"
MASKED, BATCH = 0.15, 32


@dataclass(frozen=True)
class Settings:
    """A run; the defaults are what a new user has."""

    mode: str = "none"
    labels: int = 16  # a class
    steps: int = 200
    student_lr: float = 1e-3
    teacher_lr: float = 1e-3
    beta1: float | None = 0.9  # of AdamW; None: the optimizers that the trainer has by itself
    unlabeled: int = BATCH  # a batch
    dropout: float = 0.1  # of the student
    calm: bool = False  # no dropout in the outer pass
    uda: float = 1.0
    sharp: float = 1.0  # UDA's temperature
    kind: str | None = None
    temperature: float = 1.0
    normalization: str = "gradient"
    weight: float = 1.0
    ratio: float | None = None
    wait: float = 0.0  # share of the steps before the student begins, as a copy of the teacher


OF_FEEDBACK = {"ratio", "normalization", "weight", "calm"}  # without feedback these change nothing
BASE, NEW = Settings(), "as a new user"
ARMS: dict[str, Row] = {
    NEW: {},
    "feedback 0.3 of the own losses": {"ratio": 0.3},
    "the same, no dropout in the outer pass": {"ratio": 0.3, "calm": True},
    "feedback ÷ learning rate": {"normalization": "learning_rate"},
    "no dropout in the outer pass": {"calm": True},
    "no dropout in the student": {"dropout": 0.0},
    "128 unlabeled texts a batch": {"unlabeled": 128},
    "no UDA": {"uda": 0.0},
    "UDA sharpened, 0.5": {"sharp": 0.5},
    "labels sharpened, 0.5": {"temperature": 0.5},
    "hard labels": {"kind": "hard"},
    "the trainer's own SGD": {"beta1": None},
    "AdamW with β₁ = 0": {"beta1": 0.0},
    "teacher's rate × 0.3": {"teacher_lr": 3e-4},
    "student's rate × 3": {"student_lr": 3e-3},
    "student from the teacher, at half": {"wait": 0.5},
}
RATES = tuple({"student_lr": student, "teacher_lr": teacher} for student in (1e-3, 3e-3) for teacher in (3e-4, 1e-3))
GRIDS: dict[str, tuple[Row, ...]] = {  # as many for each
    "none": tuple({**rates, "dropout": dropout} for rates in RATES for dropout in (0.0, 0.1)),
    "forward": tuple({**rates, "dropout": 0.0, "ratio": size} for rates in RATES for size in (0.1, 0.3)),
}
SEEDS = {"look": (0, 1, 2), "tuning": (100, 101, 102), "final": tuple(range(10, 18))}
READ_OUTS = "student", "finetuned"


def adamw(model: nn.Module, rate: float, beta1: float | None) -> torch.optim.Optimizer | None:
    return None if beta1 is None else torch.optim.AdamW(model.parameters(), lr=rate, betas=(beta1, 0.999))


def measured(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Accuracy and cross-entropy."""
    logits, labels = predict_logits(model, [data])
    return float((logits.argmax(1) == labels).double().mean()), float(F.cross_entropy(logits, labels))


def one_run(job: Row, miniature: bool) -> Row:
    """Train, and measure: on test texts in a final run, else on the validation texts."""
    (data, text), vectors, start = texts.corpus(miniature), texts.word_vectors(miniature), time.process_time()
    given, (x, y), draws = Settings(**job["settings"]), data["training"], torch.Generator().manual_seed(job["seed"])
    torch.manual_seed(job["seed"])
    by_class = [(y == c).nonzero()[:, 0] for c in range(len(texts.PACKAGES))]
    drawn = torch.stack([rows[torch.randperm(len(rows), generator=draws)[: 2 * given.labels]] for rows in by_class])
    known, extra = (part.flatten() for part in drawn.chunk(2, 1))

    def batches(rows: Tensor, size: int, stream: int) -> Iterator[Tensor]:
        sampler = StepSampler(len(rows), size, seed=job["seed"], stream=stream)
        return (rows[sampler.indices(step)] for step in range(given.steps))

    def masked(i: Tensor) -> Tensor:
        return x[i].masked_fill(torch.rand(x[i].shape, generator=draws) < MASKED, texts.MASK)

    labeled = [(x[i], y[i]) for i in batches(known, BATCH, 0)]
    unlabeled = [(x[i], masked(i)) for i in batches(torch.arange(len(x)), given.unlabeled, 1)]
    teacher, student = (texts.Calm(texts.network(rate, vectors)) for rate in (0.1, given.dropout))
    of_labels, uda = metapl.CrossEntropy(label_smoothing=0.1), metapl.UDA(given.sharp, weight=given.uda)
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        Forward(normalization=given.normalization) if given.mode == "forward" else given.mode,
        problem=(texts.CalmOuter if given.calm else metapl.PseudoLabels)(given.kind, given.temperature),
        inner_optimizer=adamw(student, given.student_lr, given.beta1),
        outer_optimizer=adamw(teacher, given.teacher_lr, given.beta1),
        teacher_losses=(of_labels, uda) if given.uda else (of_labels,),
        feedback_weight=given.weight,
        feedback_ratio=given.ratio,
    )
    held_out = tuple(t[:: max(1, len(t) // 128)] for t in data["validation"])
    sets = {"own": (x[known], y[known]), "other": (x[extra], y[extra]), "held_out": held_out}
    at = [given.steps // 4, given.steps * 3 // 4] if (job["part"], job["arm"]) == ("look", NEW) else []
    look, ratios = texts.Look(at, unlabeled[: 4 * texts.LOOKS], sets), list[float]()

    def heard(step: int, *_: Any) -> None:
        """The norm of the feedback's gradient over that of the own losses', by a step of a copy. Rows of metapl 0.2
        have it at the teacher's outputs, the median along the run."""
        if given.mode != "none" and step in (given.steps // 4, given.steps * 3 // 4):
            twin = copy.deepcopy(trainer)
            twin.feedback_ratio = 1.0
            if weight := twin.step(labeled[step - 1], unlabeled[step - 1]).feedback_weight:  # 0: the student waits
                ratios.append(given.weight / weight)

    told = trainer.fit(
        labeled,
        unlabeled,
        steps=given.steps,
        validation=data["validation"],
        log_every=max(1, given.steps // 20),
        wait=round(given.wait * given.steps),
        warm_start=given.wait > 0,
        callbacks=[look] if given.ratio else [look, heard],
        progress=False,
    )

    part = "test" if job["part"] == "final" else "validation"
    logged = [row for row in told.history if "agreement" in row]
    row: Row = {
        f"student_{part}": measured(student, data[part])[0],
        f"teacher_{part}": measured(teacher, data[part])[0],
        "labels_right": measured(teacher, (x, y))[0],
        "outer_loss": logged[-1].get("outer_loss"),
        "feedback_ratio": given.ratio or (statistics.fmean(ratios) if ratios else 0.0),
        "labeled_loss": measured(student, sets["own"])[1],
        "held_out_loss": measured(student, data["validation"])[1],
        "looks": look.found,
    }
    trainer.finetune(labeled, steps=min(50, given.steps), optimizer=adamw(student, 3e-4, 0.9), progress=False)
    row[f"finetuned_{part}"] = measured(student, data[part])[0]
    row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    return {**row, "encoder": texts.MADE_BY, "text": text, "seconds": round(time.process_time() - start, 1)}


def jobs(raw: Path, miniature: bool) -> Iterator[Row]:
    """All runs, in the order in which they are made; what the last ones are, the rows by then have chosen."""
    base, arms, few = (replace(BASE, steps=4), [*ARMS][:4], 1) if miniature else (BASE, list(ARMS), None)

    def job(part: str, arm: str, seed: int, settings: Settings) -> Row:
        return {"part": part, "arm": arm, "seed": seed, "settings": asdict(settings)}

    for some in (arms[:3], arms[3:]):
        for seed in SEEDS["look"][:few]:
            for arm in some:
                modes = list(GRIDS)[bool(ARMS[arm].keys() & OF_FEEDBACK) :]
                yield from (job("look", arm, seed, replace(base, mode=mode, **ARMS[arm])) for mode in modes)
    for seed in SEEDS["tuning"][:few]:
        for mode, options in GRIDS.items():
            yield from (job("tuning", "tuned", seed, replace(base, mode=mode, **one)) for one in options[: few and 2])
    best = chosen(read(raw))
    for seed in SEEDS["final"][:few]:
        for mode in GRIDS:
            yield job("final", NEW, seed, replace(base, mode=mode))
            yield job("final", "tuned", seed, best[mode])


def chosen(rows: Sequence[Row]) -> dict[str, Settings]:
    """Of each mode, the configuration with the best mean validation accuracy of its better read-out."""
    tried: dict[str, list[Row]] = {}
    for row in rows:
        if row["part"] == "tuning":
            tried.setdefault(json.dumps(row["settings"]), []).append(row)
    best = sorted(tried, key=lambda settings: statistics.fmean(scores(tried[settings])))
    return {given["mode"]: Settings(**given) for given in map(json.loads, best)}


def scores(rows: Sequence[Row]) -> list[float]:
    """Accuracies by the read-out whose mean is the greater one."""
    part = "test" if rows[0]["part"] == "final" else "validation"
    return max(([row[f"{name}_{part}"] for row in rows] for name in READ_OUTS), key=sum)


def table(rows: Sequence[Row]) -> str:
    """What the feedback is like along a run, and what it does when one thing is changed, and after tuning."""
    looks, lines = [row["looks"] for row in rows if row["looks"]], []
    for name in texts.VARIANTS if looks else ():
        cells = [statistics.fmean(one[name][at][0] / one["as it is"][at][0] for one in looks) for at in (0, 1)]
        cells += [math.sqrt(max(0, statistics.fmean(one[name][at][1] for one in looks))) for at in (0, 1)]
        cells += [statistics.fmean(one[name][at][2] for one in looks) for at in (0, 1)]
        lines.append([name, *(f"{cell:.2f}" for cell in cells)])
    heads = ["the feedback", "size", "at ¾", "signal to noise", "at ¾", "cosine with held-out", "at ¾"]
    of_looks, lines = grid(heads, lines), []
    for part, arm in [*(("look", arm) for arm in ARMS), ("final", NEW), ("final", "tuned")]:
        none, forward = paired(rows, part, arm)
        if none:
            a, b = scores(none), scores(forward)
            gained, p = difference(b, a)
            right = " → ".join(f"{100 * mean(side, 'labels_right'):.1f}" for side in (none, forward))
            cells = [len(a), spread(a), spread(b), gained, between(b, a), p, f"{mean(forward, 'feedback_ratio'):.3f}"]
            lines.append(["*test texts:* " * (part == "final") + arm, *cells, right])
    heads = ["changed", "pairs", "none", "feedback", "difference", "95 %", "p", "feedback ratio"]
    return f"{of_looks}\n\n{grid([*heads, 'labels right, none → feedback'], lines)}"


def paired(rows: Sequence[Row], part: str, arm: str) -> list[list[Row]]:
    """The rows without feedback and with it, of the seeds that have both."""
    control = NEW if ARMS.get(arm, {}).keys() & OF_FEEDBACK else arm
    sides = [
        {row["seed"]: row for row in rows if (row["part"], row["arm"], row["settings"]["mode"]) == (part, *one)}
        for one in ((control, "none"), (arm, "forward"))
    ]
    return [[side[seed] for seed in sorted(sides[0].keys() & sides[1].keys())] for side in sides]


def mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def main() -> None:
    given = parsed(arguments(__doc__, RAW))
    if given.runs:
        small = given.miniature
        go_on(given.out, jobs(given.out, small), lambda **job: one_run(job, small) | {"made_with": environment()})
    show(given.write, "text", table(read(given.out)))


if __name__ == "__main__":
    main()
