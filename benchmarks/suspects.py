"""How many of the suspects are mislabeled? `metapl train noisy` on digits in folders, 10 % of them in a wrong one.

    python benchmarks/suspects.py            # goes on where it was stopped
    python benchmarks/suspects.py --table    # the table of the file's rows
    python benchmarks/suspects.py --write docs/images.md
    python benchmarks/suspects.py --pictures DIR --seed 0    # write the folders of a seed alone, to try the command

scikit-learn's digits are written out as grey PNG files of 16x16 pixels, anew for each seed: about 1,100 in folders, of
which one in ten lies in that of another class, drawn evenly; 10 clean ones a class; and 400 to test on. The command is
run with its defaults but for the number of steps and the precision. Of suspects.csv, which has all of the 1,100, the
share of mislabeled pictures is counted among the first tenth.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import spread
from machine import append, arguments, parsed, read, show
from PIL import Image
from torch import Tensor

from metapl.apps.machine.environment import environment
from metapl.apps.pictures import load_digits_split

RAW = Path(__file__).parent / "results" / "suspects.jsonl"
CLEAN, WRONG, FIRST, SIDE = 10, 0.1, 0.1, 16
METHODS = {
    "example_weights": "example_weights (the default)",
    "meta_weight_net": "meta_weight_net",
    "label_correction": "label_correction",
    "noise_transition": "noise_transition",
    "plain": "plain, given and clean labels",
    "clean": "plain, clean labels alone",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is run; ``images`` are of each folder, None for all that there are."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    flags: tuple[str, ...]
    images: int | None = None


FULL = Plan(("example_weights", "plain", "noise_transition"), (0, 1, 2), ("--steps", "150", "--precision", "float32"))
MINIATURE = Plan(("example_weights", "plain"), (0,), ("--steps", "3", "--finetune-steps", "1"), images=60)


def write_pictures(root: Path, seed: int, at_most: int | None = None) -> set[str]:
    """The folders noisy, clean and test of a seed; the paths of the mislabeled pictures."""
    split = load_digits_split(CLEAN, seed)
    generator = torch.Generator().manual_seed(seed)
    truth = split.unlabeled_truth[:at_most]
    wrong = torch.zeros(len(truth), dtype=torch.bool)
    wrong[torch.randperm(len(truth), generator=generator)[: round(WRONG * len(truth))]] = True
    given = torch.where(wrong, (truth + torch.randint(1, 10, truth.shape, generator=generator)) % 10, truth)
    noisy = write_folders(root / "noisy", split.unlabeled[:at_most], given)
    write_folders(root / "clean", *split.labeled)
    write_folders(root / "test", split.test[0][:at_most], split.test[1][:at_most])
    return {path for path, planted in zip(noisy, wrong.tolist(), strict=True) if planted}


def write_folders(root: Path, images: Tensor, labels: Tensor) -> list[str]:
    paths = []
    for digit in range(10):
        (root / str(digit)).mkdir(parents=True)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        levels = (image[0].numpy() * 255).round().astype(np.uint8)
        path = root.resolve() / str(label) / f"{number:04}.png"
        Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
        paths.append(str(path))
    return paths


def run(plan: Plan, method: str, seed: int) -> Row:
    """One run of the command."""
    with tempfile.TemporaryDirectory(prefix="metapl-") as scratch:
        root = Path(scratch)
        wrong = write_pictures(root, seed, plan.images)
        folders = [part for name in ("labeled", "clean", "test") for part in (f"--{name}", str(root / NAMES[name]))]
        command = [
            sys.executable,
            "-m",
            "metapl.apps",
            "train",
            "noisy",
            *folders,
            "--method",
            method,
            "--seed",
            str(seed),
        ]
        subprocess.run([*command, *plan.flags, "--out", str(root / "out")], check=True, stdout=subprocess.DEVNULL)
        result = json.loads((root / "out" / "result.json").read_text())
        with (root / "out" / "suspects.csv").open(newline="") as file:
            suspects = [line["file"] for line in csv.DictReader(file)]
    first = suspects[: round(FIRST * len(suspects))]
    return {
        "method": method,
        "seed": seed,
        "precision": round(statistics.fmean(path in wrong for path in first), 4),
        "student_test_accuracy": result["student_test_accuracy"],
        "finetuned_test_accuracy": result["finetuned_test_accuracy"],
        "listed": len(suspects),
        "wrong": len(wrong),
        "flags": list(plan.flags),
        "made_with": environment(),
    }


NAMES = {"labeled": "noisy", "clean": "clean", "test": "test"}


def study(plan: Plan, raw: Path) -> None:
    """Whatever is not in the raw file yet."""
    done = {(row["method"], row["seed"]) for row in read(raw)}
    for seed in plan.seeds:
        for method in plan.methods:
            if (method, seed) not in done:
                row = run(plan, method, seed)
                append(raw, row)
                print(f"{method}, seed {seed}: {row['precision']:.3f}", file=sys.stderr, flush=True)


def table(rows: Sequence[Row]) -> str:
    """The table of the documentation, of the seeds that every method has."""
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    by_method = {name: {row["seed"]: row for row in rows if row["method"] == name} for name in methods}
    seeds = sorted(set.intersection(*(set(found) for found in by_method.values())))
    lines = [
        "| method | mislabeled among the first tenth, % | test accuracy, student, % | finetuned, % |",
        "|---|---:|---:|---:|",
    ]
    for name in methods:
        columns = [
            spread([by_method[name][seed][column] for seed in seeds])
            for column in ("precision", "student_test_accuracy", "finetuned_test_accuracy")
        ]
        lines.append("| " + " | ".join([METHODS[name], *columns]) + " |")
    steps = " ".join(rows[0]["flags"])
    return "\n".join(
        [
            *lines,
            "",
            f"Mean ± standard deviation over {len(seeds)} seeds; {rows[0]['listed']:,} pictures with given labels, of "
            f"which {rows[0]['wrong']:,} are wrong, 100 clean ones; `metapl train noisy` with {steps}. "
            "`python benchmarks/suspects.py`; raw rows: `benchmarks/results/suspects.jsonl`.",
        ]
    )


def main() -> None:
    parser = arguments(__doc__, RAW, page=True)
    parser.add_argument("--table", action="store_true", help="print the table of the file's rows and stop")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write the folders of a seed there and stop")
    parser.add_argument("--seed", type=int, default=0, help="with --pictures")
    options = parsed(parser)
    if options.pictures is not None:
        wrong = write_pictures(options.pictures, options.seed)
        print(f"{options.pictures} has noisy, clean and test; {len(wrong)} pictures of noisy are in a wrong folder")
        return
    if not (options.table or options.write):
        study(MINIATURE if options.miniature else FULL, options.out)
    show(options.write, "suspects", table(read(options.out)))


if __name__ == "__main__":
    main()
