"""Wrong labels among pictures in folders: how many suspects are mislabeled, and by which list?

    python benchmarks/suspects.py            # the list of `metapl train noisy`; goes on
    python benchmarks/suspects.py --write docs/images.md
    python benchmarks/suspects.py --harmful  # beside `metapl attribute`: rates, then seeds 0 to 4
    python benchmarks/suspects.py --harmful --write benchmarks/results/harmful_pictures.md

scikit-learn's digits are written out as grey PNG files of 16x16 pixels, anew for each seed: in
folders, of which some lie in that of another class, drawn evenly (symmetric) or the next one
(asymmetric); 10 clean ones a class; and 400 to test on. The first study has about 1,100, of which
one in ten is wrong, and counts the share of mislabeled pictures in the first tenth of suspects.csv.
With ``--harmful`` there are 600, of which 20 or 40 % are wrong, and of each list the AUC is taken
too: of `metapl train noisy`, of `metapl attribute` on its folder, and of a perceptron that learns
from the clean pictures alone, untuned, which was added when the others were known. Commands are run
with their defaults but for the number of steps and the precision.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    RESULTS,
    Row,
    arguments,
    environment,
    every,
    go_on,
    grid,
    loaded,
    parsed,
    read,
    show,
)
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from metapl.apps.main import main as command
from metapl.metrics import paired_test
from metapl.pictures import load_digits_split

RAW = RESULTS / "suspects.jsonl"
CLEAN = 10
FIRST = 0.1
SIDE = 16
METHODS = {
    "example_weights": "example_weights",
    "noise_transition": "noise_transition",
    "plain": "plain, given and clean labels",
}
FLAGS, FEW = ("--steps", "150", "--precision", "float32"), ("--steps", "3", "--finetune-steps", "1")

PICTURES = 600
CONDITIONS = {
    f"{'a' * next_one}symmetric, {100 * p:g} %": (p, next_one)
    for next_one in (False, True)
    for p in (0.2, 0.4)
}
TUNED_ON, RATES, TUNING_SEEDS, SEEDS = (
    "asymmetric, 40 %",
    (0.01, 0.03, 0.1),
    (100, 101),
    (0, 1, 2, 3, 4),
)
# Of the others the predictions are not checked, which costs more than the scores.
CHECKED = (
    *TUNING_SEEDS,
    0,
)
# Of each list: its file, its column, and whether what is high there is wrong.
LISTS = {
    "`metapl attribute`, score": ("attribution.csv", "score", -1),
    "`metapl attribute`, loss after training": ("attribution.csv", "loss", 1),
    "`metapl train noisy`, its list": ("suspects.csv", "p_given", -1),
    "`metapl train noisy`, learned weight": ("suspects.csv", "weight", -1),
    "a perceptron of the clean ones alone, loss": ("clean.csv", "loss", 1),
}


def write_pictures(
    root: Path, seed: int, share: float = 0.1, next_one: bool = False, most: int | None = None
) -> set[str]:
    """Write the folders noisy, clean and test of a seed; return the mislabeled pictures' paths."""
    split = load_digits_split(CLEAN, seed)
    draw = torch.Generator().manual_seed(seed)
    truth = split.unlabeled_truth[:most]
    wrong = torch.zeros(len(truth), dtype=torch.bool)
    wrong[torch.randperm(len(truth), generator=draw)[: round(share * len(truth))]] = True
    away = torch.ones_like(truth) if next_one else torch.randint(1, 10, truth.shape, generator=draw)
    test = split.test[0][:most], split.test[1][:most]
    noisy = split.unlabeled[:most], torch.where(wrong, (truth + away) % 10, truth)
    planted = set()
    for name, (images, labels) in {"noisy": noisy, "clean": split.labeled, "test": test}.items():
        for digit in range(10):
            (root / name / str(digit)).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            levels = (image[0].numpy() * 255).round().astype(np.uint8)
            path = (root / name).resolve() / str(label) / f"{number:04}.png"
            Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
            planted |= {str(path)} if name == "noisy" and wrong[number] else set()
    return planted


def by_clean(root: Path, seed: int, out: Path) -> None:
    """Write each noisy picture's loss, by a perceptron of 100 steps on all of the clean ones."""
    parts = []
    for name in ("clean", "noisy"):
        files = sorted((root / name).resolve().glob("*/*.png"))
        pixels = np.stack([np.asarray(Image.open(file), np.float32) / 255 for file in files])
        parts.append(
            (torch.from_numpy(pixels), torch.tensor([int(file.parent.name) for file in files]))
        )
    (x, y), (noisy, labels) = parts
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    losses = F.cross_entropy(network(noisy), labels, reduction="none").tolist()
    with out.open("w", newline="") as table:
        csv.writer(table).writerows([("file", "loss"), *zip(files, losses, strict=True)])


def metapl(*words: Any) -> str:
    with redirect_stdout(io.StringIO()) as said:
        assert command([*map(str, words)]) == 0
    return said.getvalue()


def column(file: Path, name: str) -> dict[str, str]:
    """Return a column of a list, by the pictures' files in its order."""
    with file.open(newline="") as lines:
        return {line["file"]: line[name] for line in csv.DictReader(lines)}


def suspected(method: str, seed: int, miniature: bool) -> Row:
    """Return what the list of one run of the command has in its first tenth."""
    flags = FEW if miniature else FLAGS
    with tempfile.TemporaryDirectory(prefix="metapl-") as scratch:
        root = Path(scratch)
        wrong = write_pictures(root, seed, most=60 if miniature else None)
        parts = ["--labeled", root / "noisy", "--clean", root / "clean", "--test", root / "test"]
        metapl(
            "train",
            "noisy",
            *parts,
            "--method",
            method,
            "--seed",
            seed,
            *flags,
            "--out",
            root / "out",
        )
        result = loaded(root / "out" / "result.json")
        files = [*column(root / "out" / "suspects.csv", "file")]
    return {
        "precision": round(
            statistics.fmean(path in wrong for path in files[: round(FIRST * len(files))]), 4
        ),
        **{name: result[name] for name in ("student_test_accuracy", "finetuned_test_accuracy")},
        "listed": len(files),
        "wrong": len(wrong),
        "flags": flags,
        "made_with": environment(),
    }


def listed(condition: str, seed: int, tuned: bool, miniature: bool, lr: float | None = None) -> Row:
    """Return the quality of each list.

    With a rate, it is that of `metapl attribute` after a run of a few steps.
    """
    with tempfile.TemporaryDirectory(prefix="metapl-") as scratch:
        root = Path(scratch)
        wrong = write_pictures(root, seed, *CONDITIONS[condition], 120 if miniature else PICTURES)
        out = root / "run"
        few = (
            ["--finetune-steps", "1", "--image-size", "8", "--network", "small_cnn"]
            if miniature
            else []
        )
        few += [
            "--steps",
            3 if miniature or tuned else 150,
            "--precision",
            "float32",
            "--seed",
            seed,
        ]
        metapl(
            "train",
            "noisy",
            "--labeled",
            root / "noisy",
            "--clean",
            root / "clean",
            "--out",
            out,
            *few,
        )
        options = ["--lr", lr] if tuned else []
        options += (
            ["--steps", "4", "--removals", "8"]
            if miniature
            else ["--removals", "0"] * (seed not in CHECKED)
        )
        since = time.perf_counter()
        printed = " ".join(metapl("attribute", out, "--out", out, *options).split())
        matches = {
            name: re.search(rf"{name} [a-z ]+ (-?[0-9.]*[0-9])", printed)
            for name in ("Spearman", "loss there")
        }
        by_clean(root, seed, out / "clean.csv")
        row: Row = {"lr": lr or 0.03, "seconds": round(time.perf_counter() - since, 1), "lists": {}}
        row |= {
            name.split()[0].lower(): float(match[1])
            for name, match in matches.items()
            if match is not None
        }
        for name, (file, key, sign) in LISTS.items():
            if not tuned or file == "attribution.csv":
                values = {
                    path: sign * float(value) for path, value in column(out / file, key).items()
                }
                row["lists"][name] = quality(values, wrong)
    return row


def quality(values: dict[str, float], wrong: set[str]) -> tuple[float, float]:
    """Return the AUC, and the share of wrong ones among the first tenth."""
    first = sorted(values, key=lambda file: -values[file])[: max(1, round(FIRST * len(values)))]
    area = float(roc_auc_score([file in wrong for file in values], [*values.values()]))
    return round(area, 4), round(statistics.fmean(file in wrong for file in first), 4)


def with_interval(values: Sequence[float], sign: str = "", digits: int = 2) -> str:
    """Return the mean and its 95 % interval over the seeds, by Student's t."""
    mean, (low, high) = (
        statistics.fmean(values),
        paired_test(values, [0.0] * len(values)).interval or (0.0, 0.0),
    )
    return f"{mean:{sign}.{digits}f}" + (
        f" ± {(high - low) / 2:.{digits}f}" if len(values) > 1 else ""
    )


def table(rows: Sequence[Row]) -> str:
    """Return a table of the first tenth, of the seeds that every method has."""
    rows_by_method = {
        name: {row["seed"]: row for row in rows if row["method"] == name} for name in METHODS
    }
    rows_by_method = {
        name: rows_by_seed for name, rows_by_seed in rows_by_method.items() if rows_by_seed
    }
    seeds = sorted(
        set.intersection(*(set(rows_by_seed) for rows_by_seed in rows_by_method.values()))
    )
    columns = ("precision", "student_test_accuracy", "finetuned_test_accuracy")
    lines = [
        [
            METHODS[name],
            *(
                with_interval([100 * rows_by_seed[s][key] for s in seeds], digits=1)
                for key in columns
            ),
        ]
        for name, rows_by_seed in rows_by_method.items()
    ]
    head = [
        "method",
        "mislabeled among the first tenth, %",
        "test accuracy, student, %",
        "finetuned, %",
    ]
    return grid(head, lines)


def harmful_table(rows: Sequence[Row]) -> str:
    """Return how well each list finds the wrong ones, and what was tuned and checked."""
    score = next(iter(LISTS))
    lines = []
    for condition in CONDITIONS:
        mine = [row["lists"] for row in rows if row["condition"] == condition and not row["tuned"]]
        for name in LISTS if mine else ():
            area, first = (
                with_interval([lists[name][list_number] for lists in mine])
                for list_number in (0, 1)
            )
            lead = (
                ""
                if name == score
                else with_interval([lists[score][0] - lists[name][0] for lists in mine], "+")
            )
            lines.append([condition, len(mine), name, area, lead, first])
    checked = sorted(
        (row for row in rows if row["seed"] in CHECKED),
        key=lambda row: (not row["tuned"], row["lr"]),
    )
    tuning = [
        [
            row["condition"],
            f"{row['lr']:g}",
            row["seed"],
            f"{row['lists'][score][0]:.2f}",
            f"{row['spearman']:.2f}",
        ]
        for row in checked
    ]
    head = ["wrong labels", "seeds", "list", "AUC", "the score's lead", "wrong in the first tenth"]
    by_rate = grid(["wrong labels", "rate", "seed", "AUC, score", "the check, Spearman"], tuning)
    return f"{grid(head, lines, 'lrl')}\n\n{by_rate}"


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument(
        "--harmful", action="store_true", help="beside the lists of `metapl attribute`"
    )
    args = parsed(parser)
    small = args.miniature
    out = args.out
    if args.harmful:
        out = RAW.with_name("harmful_pictures.jsonl") if args.out == RAW else args.out
        jobs = [*every(condition=TUNED_ON, seed=TUNING_SEEDS, tuned=True, lr=RATES)]
        jobs += every(seed=SEEDS, condition=(*CONDITIONS,), tuned=False)
    else:
        jobs = [*every(seed=(0, 1, 2), method=(*METHODS,))]
    if small:
        jobs = [job for job in jobs if job["seed"] == 0][: 1 if args.harmful else 2]
    if args.runs:
        go_on(out, jobs, partial(listed if args.harmful else suspected, miniature=small))
    mark, tables = ("harmful_pictures", harmful_table) if args.harmful else ("suspects", table)
    show(args.write, mark, tables(read(out)))


if __name__ == "__main__":
    main()
