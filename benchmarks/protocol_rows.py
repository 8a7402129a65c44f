"""Does each row of CIFAR-10 and SVHN train, seen small, beside the same without feedback?

    python benchmarks/protocol_rows.py --root fashion-mnist/   # an hour; goes on
    python benchmarks/protocol_rows.py --cifar CIFAR           # the two of CIFAR-10, on CIFAR-10
    python benchmarks/protocol_rows.py --write docs/studies/protocols-small.md

The rows of ``examples/protocols.py`` with a few changes: in the place of WRN-28-2 a network of
94,762 weights with batch norm and pictures of 28 pixels, or ``airbench_small`` and the pictures of
CIFAR-10, which has train/CLASS/*.png and test/CLASS/*.png; and batches of 16 and 112. Waits,
warmups, ramps and finetuning are shortened by --scale-to 300. The values of ``cifar10-4k`` are for
300,000 steps: with its rates of 0.025 and its UDA weight of 8, reached in 5 steps, the student has
28.8 % after 300 on Fashion-MNIST. Here both rates are 0.1, and the weight is 1. Where pictures are
held out, they are 1,000. A row *trains* if its finetuned student, as the row evaluates it, is 20
points above chance, and at most 5 points below the same row with --method none.
"""

from __future__ import annotations

import gzip
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import harness
import numpy as np
import torch
from harness import RESULTS, Row, grid, read, show

sys.path.insert(0, str(harness.HERE.parent / "examples"))

RAW = RESULTS / "protocol_rows.jsonl"
ROWS = ("cifar10-4k", "cifar10-4k-paper", "svhn-1k", "svhn-1k-paper")
OF_CIFAR = ROWS[:2]
TITLES = {"fashion": "Fashion-MNIST", "cifar10": "CIFAR-10"}
METHODS = ("none", "mpl")
ROLES = ("teacher", "student", "finetuned")
STEPS = 300
CHANCE = 0.1
ABOVE_CHANCE = 0.2
CHANGES = {
    "cifar10-4k": (
        "--validation",
        "1000",
        "--student-lr",
        "0.1",
        "--teacher-lr",
        "0.1",
        "--uda-weight",
        "1",
    ),
    "cifar10-4k-paper": ("--validation", "1000"),
}
BEHIND_CONTROL = 0.05


# The flags of a set of pictures, by its name.
FLAGS_OF_DATA = {
    "fashion": ("--data", "fashion", "--image-size", "28", "--network", "pooled_cnn"),
    "cifar10": ("--data", "cifar10", "--image-size", "32", "--network", "airbench_small"),
}


def run(
    row: str,
    method: str,
    seed: int,
    steps: int,
    *,
    root: str,
    data: str,
    more: Sequence[str] = (),
) -> Row:
    """Train a row of the protocols, small, and return its accuracies.

    Args:
        data: the set of pictures in the folder ``root``.
        more: further flags.
    """
    import protocols

    words = [row, *FLAGS_OF_DATA[data], "--device", "cpu", "--num-workers", "0"]
    words += ["--labeled-batch", "16", "--unlabeled-batch", "112", "--scale-to", str(steps)]
    words += ["--method", method, "--seed", str(seed), "--root", root, *CHANGES.get(row, ())]
    words += ["--training-accuracy-on", "200", "--validate-every", "100", *more]
    with tempfile.TemporaryDirectory() as folder:
        settings = protocols.settings_of([*words, "--out", str(Path(folder) / "run")])
        result = protocols.train(settings)
    return {name: value for name, value in result.items() if isinstance(value, float)}


def write_noise(folder: Path, training: int = 80) -> None:
    """Write pictures of random levels to train on and 20 to test on, as the four files are."""
    rng = np.random.default_rng(0)
    for part, count in (("train", training), ("t10k", 20)):
        levels = rng.integers(0, 256, count * 28 * 28, dtype=np.uint8).tobytes()
        labels = (np.arange(count, dtype=np.uint8) % 10).tobytes()
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + levels))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels))


def table(rows: list[Row]) -> str:
    """Return the accuracies of each row and of its control, and whether it trains."""
    lines = []
    named = [("fashion", name) for name in ROWS]
    named += [("cifar10", name) for name in OF_CIFAR]
    for data, name in named:
        arms = {row["method"]: row for row in rows if (row["data"], row["row"]) == (data, name)}
        if set(arms) != set(METHODS):
            continue
        reached = {method: arms[method]["finetuned_test_accuracy"] for method in METHODS}
        figures = [arms[method][f"{role}_test_accuracy"] for method in METHODS for role in ROLES]
        cells = [TITLES[data], f"`{name}`", *(f"{100 * figure:.1f}" for figure in figures)]
        cells.append("yes" if trains(reached["mpl"], reached["none"]) else "**no**")
        lines.append(cells)
    head = [
        "on",
        "row",
        "teacher, no feedback",
        "student",
        "finetuned",
        "teacher, MPL",
        "student",
        "finetuned",
        "trains",
    ]
    return grid(head, lines, 2)


def trains(with_feedback: float, without: float) -> bool:
    return (
        min(with_feedback, without) >= CHANCE + ABOVE_CHANCE
        and with_feedback >= without - BEHIND_CONTROL
    )


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument(
        "--root", default="/usr/share/datasets/fashion-mnist", help="the folder of the four files"
    )
    parser.add_argument("--cifar", help="the folder of CIFAR-10, whose rows are run then")
    args = harness.parsed(parser)
    if args.runs:
        torch.set_num_threads(1)
        steps = 6 if args.miniature else STEPS
        data = "fashion"
        root = args.root
        rows_of_data = ROWS
        if args.cifar is not None:
            data = "cifar10"
            root = args.cifar
            rows_of_data = OF_CIFAR
        jobs = [
            {"row": row, "method": method, "seed": 0, "steps": steps, "data": data}
            for method in METHODS
            for row in rows_of_data
        ]
        with tempfile.TemporaryDirectory() as folder:
            train = partial(run, root=root)
            if args.miniature:
                if args.cifar is None:
                    write_noise(Path(folder))
                    root = folder
                few_pictures = ("--labels-per-class", "2", "--validation", "10")
                train = partial(run, root=root, more=few_pictures)
            harness.go_on(args.out, jobs, train, environment=harness.environment())
    show(args.write, "protocol_rows", table(read(args.out, having="row")))


if __name__ == "__main__":
    main()
