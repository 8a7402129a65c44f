"""How large is the feedback beside the teacher's own gradient, at the weight 1, in each mode?

    python benchmarks/feedback_share.py     # minutes of a core; goes on
    python benchmarks/feedback_share.py --root CIFAR     # CIFAR-10 too, three hours more
    python benchmarks/feedback_share.py --write docs/studies/reproduce.md

A row is a training of 300 steps at a constant rate of 0.1, SGD with Nesterov momentum 0.9, on 64
labeled and 128 unlabeled examples a step. In every tenth step the ratio of the norms in the
teacher's weights is taken, ‖G_h‖ / ‖G_own‖: of the feedback, and of the teacher's cross-entropy on
the labels. Three problems are those of scikit-learn among the five of :mod:`five_problems`, which
need no files. CIFAR-10, in CIFAR/train/CLASS/*.png, has 4,000 labels and 8,000 other pictures a
seed, and `airbench_small` without changes of the pictures.

At the end of each training there, in the modes that are unbiased or exact up to a factor, the
feedback's gradient is taken 16 times without a step, on labeled and unlabeled pictures and labels
that are drawn anew: the signal to noise is ‖E g‖² / tr Var g, each without bias. This is done with
64, 256 and 1,024 labeled pictures.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from feedback_size import optimizer_of, rows_of_batches
from five_problems import PROBLEMS, Split
from harness import RESULTS, Row, grid, read, show
from people_labels import network_of, numbered, read_pictures
from something_simpler import random_photographs

import metapl
from metapl.feedback import Reinforce

RAW = RESULTS / "feedback_share.jsonl"
STEPS, EVERY = 300, 10
RATE = 0.1
LABELED_BATCH, UNLABELED_BATCH = 64, 128
SEEDS = (0, 1, 2)
NAMES = ("digits_mlp", "digits_conv", "table")
CIFAR = "cifar"
CIFAR_LABELS, CIFAR_UNLABELED = 4_000, 8_000
SIDE, SIDE_OF_MINIATURE = 32, 16
# Batches of labeled pictures that the student is judged on: as usual, and larger ones.
JUDGED = (LABELED_BATCH, 4 * LABELED_BATCH, 16 * LABELED_BATCH)
DRAWS = 16
MODES: dict[str, Any] = {
    "Algorithm 1, its mean (`reinforce`)": "reinforce",
    "Algorithm 1, the sum": Reinforce(reduction="sum"),
    "Algorithm 1, the cosine less a moving average": Reinforce(similarity="cosine", baseline=0.99),
    "a number for each example (`reinforce_per_example`)": "reinforce_per_example",
    "the difference of losses (`loss_difference`)": "loss_difference",
    "the exact gradient of soft labels (`forward`)": "forward",
}
# Those whose signal to noise is measured: that of the sum is that of the mean, and a moving average
# depends on steps before.
JUDGED_MODES = [name for name, mode in MODES.items() if not isinstance(mode, Reinforce)]


@lru_cache(maxsize=1)
def photographs(root: Path, seed: int, side: int) -> Split:
    """Draw the labeled and unlabeled training pictures of a seed; nothing is tested."""
    files = numbered(root / "train")
    classes = sorted({path.parent.name for path in files.values()})
    order = np.random.default_rng(seed).permutation(sorted(files)).tolist()
    labeled = order[:CIFAR_LABELS]
    unlabeled = order[CIFAR_LABELS:][:CIFAR_UNLABELED]
    if not unlabeled:
        # A miniature.
        labeled, unlabeled = order[: len(order) // 2], order[len(order) // 2 :]
    pictures = read_pictures([files[number] for number in labeled], side)
    labels = torch.tensor([classes.index(files[number].parent.name) for number in labeled])
    return Split(
        labeled_inputs=pictures,
        labels=labels,
        unlabeled_inputs=read_pictures([files[number] for number in unlabeled], side),
        test_inputs=pictures[:0],
        test_labels=labels[:0],
    )


def train(problem: str, mode: str, seed: int, steps: int, *, root: Path | None, side: int) -> Row:
    """Return the ratios of a training's first and last hundred steps, as medians.

    Args:
        root: where the pictures of CIFAR-10 are, of which the signal to noise is returned too.
        side: to which they are brought.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    if problem == CIFAR:
        assert root is not None, "its jobs are there where a root is"
        split = photographs(root, seed, side)
        teacher, student = (network_of(split.labeled_inputs) for _ in range(2))
    else:
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
    row: Row = {
        "early": statistics.median(ratios[:third]),
        "late": statistics.median(ratios[-third:]),
    }
    if problem == CIFAR and mode in JUDGED_MODES:
        draws = DRAWS if steps == STEPS else 3
        for size in JUDGED:
            row[f"snr_{size}"] = signal_to_noise(trainer, split, size=size, draws=draws)
    return row


def signal_to_noise(
    trainer: metapl.BilevelTrainer, split: Split, *, size: int, draws: int
) -> float:
    """Return ‖E g‖² / tr Var g of the feedback's gradient in the teacher's weights.

    Args:
        size: how many labeled pictures a gradient is judged on.
        draws: how many gradients are taken.
    """
    gradients = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        rows = torch.randperm(len(split.labels), generator=generator)[:size]
        others = torch.randperm(len(split.unlabeled_inputs), generator=generator)
        torch.manual_seed(draw)
        found = metapl.hypergradient(
            trainer.teacher,
            trainer.student,
            outer=(split.labeled_inputs[rows], split.labels[rows]),
            inner=split.unlabeled_inputs[others[:UNLABELED_BATCH]],
            mode=trainer.mode,
            inner_optimizer=trainer.inner_optimizer,
            verify=False,
        )
        gradients.append(torch.cat([g.flatten() for g in found.grads.values()]).double())
    g = torch.stack(gradients)
    square_of_mean = g.mean(0).square().sum()
    mean_square = g.square().sum(1).mean()
    variance = (mean_square - square_of_mean) * draws / (draws - 1)
    return float((square_of_mean - variance / draws) / variance)


def jobs(names: tuple[str, ...], *, miniature: bool) -> list[Row]:
    """Return all trainings of some problems."""
    seeds = SEEDS[:1] if miniature else SEEDS
    steps = 2 * EVERY if miniature else STEPS
    return [
        {"problem": problem, "mode": mode, "seed": seed, "steps": steps}
        for problem in names
        for mode in MODES
        for seed in seeds
    ]


def table(rows: list[Row]) -> str:
    """Return the medians over seeds, early and late, by mode and problem that has rows."""
    titles = {name: PROBLEMS[name].title for name in NAMES} | {CIFAR: "CIFAR-10, convolutions"}
    shown = [name for name in titles if any(row["problem"] == name for row in rows)]
    lines = []
    for mode in MODES:
        line = [mode]
        for problem in shown:
            of_cell = [row for row in rows if row["mode"] == mode and row["problem"] == problem]
            medians = [
                statistics.median(row[part] for row in of_cell) for part in ("early", "late")
            ]
            line.append(" and ".join(f"{median:.2g}" for median in medians))
        lines.append(line)
    return grid(["mode", *(titles[name] for name in shown)], lines, 1)


def table_of_noise(rows: list[Row]) -> str:
    """Return the signal to noise on CIFAR-10, each seed's, by mode and labeled pictures."""
    lines = []
    for mode in JUDGED_MODES:
        of_mode = [row for row in rows if row["problem"] == CIFAR and row["mode"] == mode]
        line = [mode]
        for size in JUDGED:
            line.append(", ".join(f"{row[f'snr_{size}']:.2g}" for row in of_mode))
        lines.append(line)
    return grid(["mode", *(f"{size:,} labeled" for size in JUDGED)], lines, 1)


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument("--root", type=Path, metavar="CIFAR", help="folder of train/CLASS")
    args = harness.parsed(parser)
    if args.runs:
        with tempfile.TemporaryDirectory() as place:
            root = random_photographs(Path(place)) if args.miniature else args.root
            side = SIDE_OF_MINIATURE if args.miniature else SIDE
            names = NAMES if root is None else (*NAMES, CIFAR)
            harness.go_on(
                args.out,
                jobs(names, miniature=args.miniature),
                partial(train, root=root, side=side),
                environment=harness.environment(),
            )
    rows = read(args.out, having="problem")
    show(args.write, "feedback_share", table(rows))
    if any(row["problem"] == CIFAR for row in rows):
        show(args.write, "feedback_share-noise", table_of_noise(rows))


if __name__ == "__main__":
    main()
