"""Does the teacher's feedback help on pictures in folders? `metapl train images` on digits, MPL and its controls.

    python benchmarks/pictures_study.py                        # goes on where it was stopped; an hour on two cores
    python benchmarks/pictures_study.py --write docs/results.md

scikit-learn's digits are written out as grey PNG files of 16x16 pixels, two labeled ones a class, anew for each seed,
and go through the command as a user would run it, with its small convolutional network and the settings below for all
methods; 197 labeled validation pictures select the checkpoint of every run. Only the size of MPL's feedback is chosen,
by validation on three other seeds; the controls with altered feedback take the same. The test pictures are looked at
once, by the final runs. Every run is a row of the raw file, so the table is made from it alone.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import difference, spread
from machine import append, arguments, parsed, read, write_between_marks
from PIL import Image
from torch import Tensor

from metapl.apps.machine.environment import environment
from metapl.apps.pictures import load_digits_split

RAW = Path(__file__).parent / "results" / "pictures_study.jsonl"
TUNING_SEEDS, SEEDS = (100, 101, 102), tuple(range(10))
LABELS_PER_CLASS, SIDE = 2, 16
OPTIMIZER = ("algorithm sgd", "lr 0.05", "momentum 0.9", "nesterov", "weight-decay 5e-4")
FLAGS = (
    *("--network", "small_cnn", "--image-size", "16", "--grey", "True", "--no-channels-last"),
    *("--mean", "0.5", "--std", "0.25"),
    *("--randaugment", "--strong.writing", "--pad", "2", "--strong.cutout", "4", "--precision", "float32"),
    *("--labeled-batch", "32", "--unlabeled-batch", "64", "--label-smoothing", "0.1", "--ema-decay", "0.995"),
    *("--uda-temperature", "0.7", "--uda-threshold", "0.6", "--uda-align", "0"),
    *("--uda-ramp", "100", "--uda-start", "0"),
    *("--wait", "0", "--no-warm-start", "--warmup", "0", "--validate-every", "100"),
    *(part for who in ("student", "teacher") for flag in OPTIMIZER for part in f"--{who}.{flag}".split()),
)
"""All that decides the training, so that other defaults of the recipe do not change the study."""

SIZES = {
    "weight 0.3": ("--feedback-weight", "0.3"),
    "weight 1": ("--feedback-weight", "1"),
    "ratio 0.03": ("--feedback-ratio", "0.03"),
}
METHODS = {
    "mpl": "MPL, forward",
    "none": "same loop, no feedback",
    "supervised": "supervised, labeled data only",
    "label_smoothing": "the same with label smoothing",
    "pseudo_labels": "pseudo labels, fixed teacher, soft",
    "uda": "UDA alone",
    "permuted": "control: feedback permuted over the batch",
    "class_means": "control: class means of the feedback only",
    "random_sign": "control: feedback with random signs",
}
READ_OUTS = ("test_accuracy", "finetuned_test_accuracy")
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is run; ``images`` are of each part but the labeled one, None for all that there are."""

    methods: tuple[str, ...]
    sizes: tuple[str, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    flags: tuple[str, ...]
    images: int | None = None


FULL = Plan(tuple(METHODS), tuple(SIZES), TUNING_SEEDS, SEEDS, (*FLAGS, "--steps", "600"))
MINIATURE = Plan(
    methods=("mpl", "none"),
    sizes=("weight 1",),
    tuning_seeds=(100,),
    seeds=(0,),
    flags=(*FLAGS, "--steps", "2", "--finetune-steps", "2"),
    images=60,
)


def write_pictures(root: Path, seed: int, at_most: int | None) -> None:
    """The folders labeled, unlabeled, val and test of a seed's split."""
    split = load_digits_split(LABELS_PER_CLASS, seed)
    parts: dict[str, tuple[Tensor, Tensor | None]] = {
        "labeled": split.labeled,
        "unlabeled": (split.unlabeled[:at_most], None),
        "val": (split.validation[0][:at_most], split.validation[1][:at_most]),
        "test": (split.test[0][:at_most], split.test[1][:at_most]),
    }
    for name, (images, labels) in parts.items():
        for number, image in enumerate(images):
            folder = root / name if labels is None else root / name / str(int(labels[number]))
            folder.mkdir(parents=True, exist_ok=True)
            levels = (image[0].numpy() * 255).round().astype(np.uint8)
            Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number:04}.png")


def run(plan: Plan, seed: int, methods: Sequence[str], size: str, jobs: int) -> Iterator[Row]:
    """The command's results on a seed's pictures, a row per method."""
    with tempfile.TemporaryDirectory(prefix="metapl-") as scratch:
        root = Path(scratch)
        write_pictures(root, seed, plan.images)
        folders = [part for name in ("labeled", "unlabeled", "val", "test") for part in (f"--{name}", str(root / name))]
        command = [
            sys.executable,
            "-m",
            "metapl.apps",
            "train",
            "images",
            "--method",
            "mpl",
            *folders,
            *plan.flags,
            *SIZES[size],
        ]
        command += ["--compare", "--methods", *methods, "--seeds", str(seed), "--jobs", str(jobs)]
        subprocess.run([*command, "--out", str(root / "out")], check=True)
        for method in methods:
            result = json.loads((root / "out" / method / f"seed-{seed}" / "result.json").read_text())
            kept = {
                "validation_accuracy": result["student_validation_accuracy"],
                "finetuned_validation_accuracy": result["finetuned_validation_accuracy"],
                "test_accuracy": result["student_test_accuracy"],
                "finetuned_test_accuracy": result["finetuned_test_accuracy"],
                "best_step": result["best_step"],
            }
            yield {"method": method, "seed": seed, "size": size, **kept}


def study(plan: Plan, raw: Path, jobs: int) -> None:
    """Whatever is not in the raw file yet."""
    rows = read(raw)
    for size in plan.sizes:
        for seed in plan.tuning_seeds:
            if not any(r["phase"] == "tuning" and (r["seed"], r["size"]) == (seed, size) for r in rows):
                rows += _append(raw, "tuning", run(plan, seed, ("mpl",), size, jobs))
    size = chosen(rows)
    for seed in plan.seeds:
        missing = [m for m in plan.methods if not any(r["phase"] == "final" and _is(r, m, seed) for r in rows)]
        if missing:
            rows += _append(raw, "final", run(plan, seed, missing, size, jobs))


def _is(row: Row, method: str, seed: int) -> bool:
    return bool(row["method"] == method and row["seed"] == seed)


def _append(raw: Path, phase: str, found: Iterator[Row]) -> list[Row]:
    made_with = environment()
    rows = [{"phase": phase, **row, "made_with": made_with} for row in found]
    append(raw, *rows)
    return rows


def chosen(rows: Sequence[Row]) -> str:
    """The size with the best mean validation accuracy over the tuning seeds; of equals, the first."""
    return max(_sizes(rows), key=lambda size: _validation(rows, size))


def _sizes(rows: Sequence[Row]) -> list[str]:
    """Those that were tried."""
    return [size for size in SIZES if any(r["phase"] == "tuning" and r["size"] == size for r in rows)]


def _validation(rows: Sequence[Row], size: str) -> float:
    return statistics.fmean(r["validation_accuracy"] for r in rows if r["phase"] == "tuning" and r["size"] == size)


def _methods(rows: Sequence[Row]) -> list[str]:
    """Those that were run."""
    return [name for name in METHODS if any(r["phase"] == "final" and r["method"] == name for r in rows)]


def _seeds(rows: Sequence[Row]) -> list[int]:
    return sorted({r["seed"] for r in rows if r["phase"] == "final"})


def column(rows: Sequence[Row], method: str, read_out: str) -> list[float]:
    """A method's accuracies in the order of the seeds."""
    found = {r["seed"]: r[read_out] for r in rows if r["phase"] == "final" and r["method"] == method}
    return [found[seed] for seed in _seeds(rows)]


def table(rows: Sequence[Row]) -> str:
    """The table of the documentation."""
    controls = {name: column(rows, "none", name) for name in READ_OUTS}
    better = max(READ_OUTS, key=lambda name: statistics.fmean(controls[name]))
    which = "finetuned student" if better.startswith("finetuned") else "student"
    lines = [
        f"| method | student | finetuned | student against the control's {which} | p |",
        "|---|---:|---:|---:|---:|",
    ]
    for method in _methods(rows):
        student, finetuned = (column(rows, method, name) for name in READ_OUTS)
        compared = ("–", "–") if method == "none" else difference(student, controls[better])
        lines.append("| " + " | ".join([METHODS[method], spread(student), spread(finetuned), *compared]) + " |")
    return "\n".join([*lines, "", _note(rows)])


def _note(rows: Sequence[Row]) -> str:
    sizes = ", ".join(f"{size}: {100 * _validation(rows, size):.1f}" for size in _sizes(rows))
    tuned_on = len({r["seed"] for r in rows if r["phase"] == "tuning"})
    return (
        f"Test accuracy in %, mean ± standard deviation over {len(_seeds(rows))} seeds (400 test pictures each); "
        "differences are of the means as shown, p is from a paired t-test "
        "over draws of these images, not corrected for the number of rows. In "
        "every run 197 labeled validation pictures select the student's checkpoint. Size of the feedback chosen by "
        f"validation on {tuned_on} other seeds ({sizes}): {chosen(rows)}. `python benchmarks/pictures_study.py`; raw "
        "rows: `benchmarks/results/pictures_study.jsonl`."
    )


OTHERS = ("none", "uda", "permuted", "class_means", "random_sign")


def pairs(rows: Sequence[Row]) -> str:
    """MPL's student against each other method's, before finetuning."""
    lines = []
    for other in (name for name in OTHERS if name in _methods(rows)):
        points, p = difference(*(column(rows, name, "test_accuracy") for name in ("mpl", other)))
        lines.append(f"mpl - {other}: {points} (p = {p})")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, RAW, page=True)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print table and pairs from the file's rows and stop")
    options = parsed(parser)
    if options.write:
        write_between_marks(options.write, "pictures", table(read(options.out)))
        return
    if not options.table:
        study(MINIATURE if options.miniature else FULL, options.out, options.jobs)
    print(f"{table(read(options.out))}\n\n{pairs(read(options.out))}")


if __name__ == "__main__":
    main()
