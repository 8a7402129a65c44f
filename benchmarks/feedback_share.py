"""How large is the feedback beside the teacher's own gradient, at the weight 1, in each mode?

    python benchmarks/feedback_share.py     # minutes of a core; goes on
    python benchmarks/feedback_share.py --write docs/studies/reproduce.md

A row is a training of 300 steps at a constant rate of 0.1, SGD with Nesterov momentum 0.9, on 64
labeled and 128 unlabeled examples a step. In every tenth step the ratio of the norms in the
teacher's weights is taken, ‖G_h‖ / ‖G_own‖: of the feedback, and of the teacher's cross-entropy on
the labels. Problems are those of scikit-learn among the five of :mod:`five_problems`, which need no
files.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import harness
import torch
from feedback_size import optimizer_of, rows_of_batches
from five_problems import PROBLEMS
from harness import RESULTS, Row, grid, read, show

import metapl
from metapl.feedback import Reinforce

RAW = RESULTS / "feedback_share.jsonl"
STEPS, EVERY = 300, 10
RATE = 0.1
LABELED_BATCH, UNLABELED_BATCH = 64, 128
SEEDS = (0, 1, 2)
NAMES = ("digits_mlp", "digits_conv", "table")
MODES: dict[str, Any] = {
    "Algorithm 1, its mean (`reinforce`)": "reinforce",
    "Algorithm 1, the sum": Reinforce(reduction="sum"),
    "Algorithm 1, the cosine less a moving average": Reinforce(similarity="cosine", baseline=0.99),
    "a number for each example (`reinforce_per_example`)": "reinforce_per_example",
    "the difference of losses (`loss_difference`)": "loss_difference",
    "the exact gradient of soft labels (`forward`)": "forward",
}


def train(problem: str, mode: str, seed: int, steps: int) -> Row:
    """Return the ratios of a training's first and last hundred steps, as medians."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    split = PROBLEMS[problem].split(seed, Path(), miniature=False)
    teacher, student = (PROBLEMS[problem].network() for _ in range(2))
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        MODES[mode],
        inner_optimizer=optimizer_of(student, RATE),
        outer_optimizer=optimizer_of(teacher, RATE),
        teacher_losses=[metapl.CrossEntropy(label_smoothing=0.1)],
        feedback_weight=1.0,
        verify=False,
    )
    count = len(split.labels)
    labeled = rows_of_batches(count, min(LABELED_BATCH, count), steps, seed=2 * seed)
    unlabeled = rows_of_batches(
        len(split.unlabeled_inputs), UNLABELED_BATCH, steps, seed=2 * seed + 1
    )
    ratios = []
    for number, (rows, others) in enumerate(zip(labeled, unlabeled, strict=True), 1):
        trainer.measures_feedback = number % EVERY == 0
        report = trainer.step(
            (split.labeled_inputs[rows], split.labels[rows]), split.unlabeled_inputs[others]
        )
        if trainer.measures_feedback:
            ratios.append(report.feedback_ratio)
    third = max(1, len(ratios) // 3)
    return {"early": statistics.median(ratios[:third]), "late": statistics.median(ratios[-third:])}


def table(rows: list[Row]) -> str:
    """Return the medians over seeds, early and late, by mode and problem."""
    lines = []
    for mode in MODES:
        line = [mode]
        for problem in NAMES:
            of_cell = [row for row in rows if row["mode"] == mode and row["problem"] == problem]
            medians = [
                statistics.median(row[part] for row in of_cell) for part in ("early", "late")
            ]
            line.append(" and ".join(f"{median:.2g}" for median in medians))
        lines.append(line)
    return grid(["mode", *(PROBLEMS[name].title for name in NAMES)], lines, 1)


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    args = harness.parsed(parser)
    if args.runs:
        seeds = SEEDS[:1] if args.miniature else SEEDS
        steps = 2 * EVERY if args.miniature else STEPS
        jobs: list[Row] = [
            {"problem": problem, "mode": mode, "seed": seed, "steps": steps}
            for problem in NAMES
            for mode in MODES
            for seed in seeds
        ]
        harness.go_on(args.out, jobs, train, environment=harness.environment())
    show(args.write, "feedback_share", table(read(args.out, having="problem")))


if __name__ == "__main__":
    main()
