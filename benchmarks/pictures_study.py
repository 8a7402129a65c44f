"""Does the teacher's feedback help on pictures in folders? `metapl train images` on digits, MPL and its controls.

    python benchmarks/pictures_study.py                        # goes on where it was stopped; an hour on two cores
    python benchmarks/pictures_study.py --write-readme README.md

scikit-learn's digits are written out as grey PNG files of 16x16 pixels, two labelled ones a class, anew for each seed,
and go through the command as a user would run it, with its small convolutional network and the settings below for all
methods. Only the size of MPL's feedback is chosen, by validation on three other seeds; the controls with altered
feedback take the same. The test pictures are looked at once, by the final runs. Every run is a row of the raw file, so
the table is made from it alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_readme
from PIL import Image
from torch import Tensor

from metapl.data import load_digits_split
from metapl.evaluate import paired_test
from metapl.run_folder import environment

RAW = Path(__file__).parent / "results" / "pictures_study.jsonl"
TUNING_SEEDS, SEEDS = (100, 101, 102), tuple(range(10))
LABELS_PER_CLASS, SIDE = 2, 16
FLAGS = (
    *("--image-size", "16", "--grey", "--strong.writing", "--pad", "2", "--strong.cutout", "4"),
    *("--steps", "600", "--labeled-batch", "32", "--unlabeled-batch", "64", "--uda-ramp", "100"),
)
SIZES = {
    "weight 0.3": ("--feedback-weight", "0.3"),
    "weight 1": ("--feedback-weight", "1"),
    "ratio 0.03": ("--feedback-ratio", "0.03"),
}
METHODS = {
    "mpl": "MPL, forward",
    "none": "same loop, no feedback",
    "supervised": "supervised, labelled data only",
    "label_smoothing": "the same with label smoothing",
    "pseudo_labels": "pseudo labels, fixed teacher, soft",
    "uda": "UDA alone",
    "permuted": "control: feedback permuted over the batch",
    "class_means": "control: class means of the feedback only",
    "random_sign": "control: feedback with random signs",
}
READ_OUTS = ("test_accuracy", "finetuned_test_accuracy")
Row = dict[str, Any]


def write_pictures(root: Path, seed: int) -> None:
    """The folders labeled, unlabeled, val and test of a seed's split."""
    split = load_digits_split(LABELS_PER_CLASS, seed)
    parts: dict[str, tuple[Tensor, Tensor | None]] = {
        "labeled": split.labeled,
        "unlabeled": (split.unlabeled, None),
        "val": split.validation,
        "test": split.test,
    }
    for name, (images, labels) in parts.items():
        for number, image in enumerate(images):
            folder = root / name if labels is None else root / name / str(int(labels[number]))
            folder.mkdir(parents=True, exist_ok=True)
            levels = (image[0].numpy() * 255).round().astype(np.uint8)
            Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number:04}.png")


def run(seed: int, methods: Sequence[str], size: str, jobs: int) -> Iterator[Row]:
    """The command's results on a seed's pictures, a row per method."""
    with tempfile.TemporaryDirectory(prefix="metapl-") as scratch:
        root = Path(scratch)
        write_pictures(root, seed)
        folders = [part for name in ("labeled", "unlabeled", "val", "test") for part in (f"--{name}", str(root / name))]
        command = [sys.executable, "-m", "metapl", "train", "images", *folders, *FLAGS, *SIZES[size]]
        command += ["--compare", "--methods", *methods, "--seeds", str(seed), "--jobs", str(jobs)]
        subprocess.run([*command, "--out", str(root / "out")], check=True)
        for method in methods:
            result = json.loads((root / "out" / method / f"seed-{seed}" / "result.json").read_text())
            kept = ("validation_accuracy", "finetuned_validation_accuracy", *READ_OUTS, "best_step")
            yield {"method": method, "seed": seed, "size": size, **{name: result[name] for name in kept}}


def study(jobs: int) -> None:
    """Whatever is not in the raw file yet."""
    rows = read()
    for size in SIZES:
        for seed in TUNING_SEEDS:
            if not any(r["phase"] == "tuning" and (r["seed"], r["size"]) == (seed, size) for r in rows):
                rows += _append("tuning", run(seed, ("mpl",), size, jobs))
    size = chosen(rows)
    for seed in SEEDS:
        missing = [m for m in METHODS if not any(r["phase"] == "final" and _is(r, m, seed) for r in rows)]
        if missing:
            rows += _append("final", run(seed, missing, size, jobs))


def _is(row: Row, method: str, seed: int) -> bool:
    return bool(row["method"] == method and row["seed"] == seed)


def _append(phase: str, found: Iterator[Row]) -> list[Row]:
    made_with = environment()
    rows = [{"phase": phase, **row, "made_with": made_with} for row in found]
    with RAW.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def read() -> list[Row]:
    """The rows so far."""
    return [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.exists() else []


def chosen(rows: Sequence[Row]) -> str:
    """The size with the best mean validation accuracy over the tuning seeds; of equals, the first."""
    return max(SIZES, key=lambda size: _validation(rows, size))


def _validation(rows: Sequence[Row], size: str) -> float:
    return statistics.fmean(r["validation_accuracy"] for r in rows if r["phase"] == "tuning" and r["size"] == size)


def table(rows: Sequence[Row]) -> str:
    """The README's table."""
    columns = {
        (method, name): [
            next(r[name] for r in rows if r["phase"] == "final" and _is(r, method, seed)) for seed in SEEDS
        ]
        for method in METHODS
        for name in READ_OUTS
    }
    better = max(READ_OUTS, key=lambda name: statistics.fmean(columns["none", name]))
    which = "finetuned student" if better.startswith("finetuned") else "student"
    lines = [
        f"| method | student | finetuned | student against the control's {which} | p |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, title in METHODS.items():
        test = paired_test(columns[method, "test_accuracy"], columns["none", better])
        compared = ["–", "–"] if method == "none" else [f"{100 * test.mean:+.1f}", f"{test.p:.2g}"]
        lines.append("| " + " | ".join([title, *(_spread(columns[method, r]) for r in READ_OUTS), *compared]) + " |")
    sizes = ", ".join(f"{size}: {100 * _validation(rows, size):.1f}" for size in SIZES)
    lines += [
        "",
        f"Test accuracy in %, mean ± standard deviation over {len(SEEDS)} seeds (400 test pictures each); p from a "
        "paired t-test, not corrected for the number of rows. Size of the feedback chosen by validation on three other "
        f"seeds ({sizes}): {chosen(rows)}. `python benchmarks/pictures_study.py`; raw rows: "
        "`benchmarks/results/pictures_study.jsonl`.",
    ]
    return "\n".join(lines)


PAIRS = tuple(("mpl", other) for other in ("none", "uda", "permuted", "class_means", "random_sign"))


def pairs(rows: Sequence[Row]) -> str:
    """Student against student, before finetuning."""
    lines = []
    for one, other in PAIRS:
        mine, theirs = (
            [next(r["test_accuracy"] for r in rows if r["phase"] == "final" and _is(r, m, seed)) for seed in SEEDS]
            for m in (one, other)
        )
        test = paired_test(mine, theirs)
        lines.append(f"{one} - {other}: {100 * test.mean:+.1f} (p = {test.p:.2g})")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print table and pairs from the raw file")
    parser.add_argument("--write-readme", type=Path, metavar="FILE", help="replace the table there")
    options = parser.parse_args()
    if options.table:
        print(f"{table(read())}\n\n{pairs(read())}")
    elif options.write_readme:
        write_readme(options.write_readme, "pictures", table(read()))
    else:
        study(options.jobs)
        print(table(read()))


if __name__ == "__main__":
    main()
