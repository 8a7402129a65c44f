"""Wrong labels by `metapl attribute`, by the list of `metapl train noisy`, and by a network of clean pictures alone.

    python benchmarks/harmful_pictures.py --tune     # rates, on seeds 100 and 101
    python benchmarks/harmful_pictures.py            # seeds 0 to 4; goes on where it was stopped
    python benchmarks/harmful_pictures.py --write benchmarks/results/harmful_pictures.md

scikit-learn's digits are written out as grey PNG files of 16x16 pixels, anew for each seed: 600 in folders, 20 or 40 %
of which lie in that of another class, drawn evenly (symmetric) or the next one (asymmetric), and 10 clean ones a class.
`metapl train noisy` is run with its defaults but for 150 steps, and `metapl attribute` on its folder with its defaults.
Beside them a perceptron learns from the clean pictures alone, untuned; it was added when the others were known.
Of each list, the AUC and the share of mislabeled pictures among the first tenth are taken.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import append, arguments, parsed, read, show
from PIL import Image
from scipy.stats import rankdata, t
from suspects import CLEAN, write_folders
from torch import nn
from torch.nn import functional as F

from metapl.apps.pictures import load_digits_split

RAW = Path(__file__).parent / "results" / "harmful_pictures.jsonl"
PICTURES, FIRST, STEPS = 600, 0.1, 150
CONDITIONS = {
    "symmetric, 20 %": (0.2, False),
    "symmetric, 40 %": (0.4, False),
    "asymmetric, 20 %": (0.2, True),
    "asymmetric, 40 %": (0.4, True),
}
TUNED_ON, RATES, TUNING_SEEDS, SEEDS = "asymmetric, 40 %", (0.01, 0.03, 0.1), (100, 101), (0, 1, 2, 3, 4)
CHECKED = (*TUNING_SEEDS, 0)  # of the others the predictions are not checked, which costs more than the scores
# Of each list: its file, its column, and whether what is high there is wrong.
LISTS = {
    "`metapl attribute`, score": ("attribution.csv", "score", -1),
    "`metapl attribute`, loss after training": ("attribution.csv", "loss", 1),
    "`metapl train noisy`, its list": ("suspects.csv", "p_given", -1),
    "`metapl train noisy`, learned weight": ("suspects.csv", "weight", -1),
    "a perceptron of the clean ones alone, loss": ("clean.csv", "loss", 1),
}
Row = dict[str, Any]


def write_pictures(root: Path, condition: str, seed: int, at_most: int = PICTURES) -> set[str]:
    """The folders noisy and clean of a seed; the paths of the mislabeled pictures."""
    (share, next_one), split = CONDITIONS[condition], load_digits_split(CLEAN, seed)
    generator, truth = torch.Generator().manual_seed(seed), split.unlabeled_truth[:at_most]
    wrong = torch.zeros(len(truth), dtype=torch.bool)
    wrong[torch.randperm(len(truth), generator=generator)[: round(share * len(truth))]] = True
    away = torch.ones_like(truth) if next_one else torch.randint(1, 10, truth.shape, generator=generator)
    noisy = write_folders(root / "noisy", split.unlabeled[:at_most], torch.where(wrong, (truth + away) % 10, truth))
    write_folders(root / "clean", *split.labeled)
    return {path for path, planted in zip(noisy, wrong.tolist(), strict=True) if planted}


def by_clean(root: Path, seed: int, out: Path) -> None:
    """Write the loss of each noisy picture, by a perceptron of 100 steps on all of the clean ones."""

    def read_folders(name: str) -> tuple[list[Path], torch.Tensor, torch.Tensor]:
        files = sorted((root / name).resolve().glob("*/*.png"))
        pixels = np.stack([np.asarray(Image.open(file), np.float32) / 255 for file in files])
        return files, torch.from_numpy(pixels), torch.tensor([int(file.parent.name) for file in files])

    (_, x, y), (files, noisy, given) = read_folders("clean"), read_folders("noisy")
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    losses = F.cross_entropy(network(noisy), given, reduction="none").tolist()
    with out.open("w", newline="") as table:
        csv.writer(table).writerows([("file", "loss"), *zip(files, losses, strict=True)])


def metapl(*words: str) -> str:
    command = [sys.executable, "-m", "metapl.apps", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def run(condition: str, seed: int, lr: float | None, miniature: bool) -> Row:
    with tempfile.TemporaryDirectory(prefix="metapl-") as scratch:
        root = Path(scratch)
        wrong = write_pictures(root, condition, seed, 120 if miniature else PICTURES)
        trained = out = root / "run"
        few = ["--finetune-steps", "1", "--image-size", "8", "--network", "small_cnn"] if miniature else []
        steps = 3 if miniature or lr is not None else STEPS
        folders = ["--labeled", str(root / "noisy"), "--clean", str(root / "clean"), "--out", str(trained)]
        metapl("train", "noisy", *folders, "--seed", str(seed), "--steps", str(steps), "--precision", "float32", *few)
        given = ["--lr", str(lr)] if lr is not None else []
        given += ["--steps", "4", "--removals", "8"] if miniature else ["--removals", "0"] * (seed not in CHECKED)
        found = json.loads(metapl("attribute", str(trained), "--out", str(out), "--json", *given))
        by_clean(root, seed, out / "clean.csv")
        row: Row = {"condition": condition, "seed": seed, "lr": found["lr"], "tuned": lr is not None, "lists": {}}
        row |= {name: found[name] for name in ("steps", "loss", "spearman", "seconds")}
        for name, (file, column, sign) in LISTS.items():
            if lr is not None and file != "attribution.csv":
                continue  # of a run of a few steps
            with (out / file).open(newline="") as lines:
                values = {line["file"]: sign * float(line[column]) for line in csv.DictReader(lines)}
            row["lists"][name] = quality(values, wrong)
    return row


def quality(values: dict[str, float], wrong: set[str]) -> tuple[float, float]:
    """The AUC, and the share of wrong ones among the first tenth."""
    ranks = dict(zip(values, rankdata([*values.values()]), strict=True))
    n, m = len(wrong), len(values) - len(wrong)
    first = sorted(values, key=lambda file: -values[file])[: max(1, round(FIRST * len(values)))]
    area = (sum(ranks[file] for file in wrong) - n * (n + 1) / 2) / (n * m)
    return round(float(area), 4), round(statistics.fmean(file in wrong for file in first), 4)


def asked(tune: bool, miniature: bool) -> Iterator[tuple[str, int, float | None]]:
    if tune:
        yield from ((TUNED_ON, seed, lr) for seed in TUNING_SEEDS for lr in RATES)
    else:
        every = ((condition, seed, None) for seed in SEEDS for condition in CONDITIONS)
        yield from islice(every, 1 if miniature else None)


def spread(values: list[float], sign: str = "") -> str:
    """Mean and 95 % interval over the seeds, by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:{sign}.2f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:{sign}.2f} ± {half:.2f}"


def table(rows: list[Row]) -> str:
    score = next(iter(LISTS))
    head = "| wrong labels | seeds | list | AUC | the score's lead | wrong in the first tenth |"
    lines = [head, "|---|---:|---|---:|---:|---:|"]
    for condition in CONDITIONS:
        mine = [row["lists"] for row in rows if row["condition"] == condition and not row["tuned"]]
        for name in LISTS if mine else ():
            area, first = (spread([lists[name][which] for lists in mine]) for which in (0, 1))
            lead = "" if name == score else spread([lists[score][0] - lists[name][0] for lists in mine], "+")
            lines.append(f"| {condition} | {len(mine)} | {name} | {area} | {lead} | {first} |")
    lines += ["", "| wrong labels | rate | seed | AUC, score | the check, Spearman |", "|---|---:|---:|---:|---:|"]
    for row in sorted((row for row in rows if row["seed"] in CHECKED), key=lambda row: (not row["tuned"], row["lr"])):
        found = f"{row['lists'][score][0]:.2f} | {row['spearman']:.2f}"
        lines.append(f"| {row['condition']} | {row['lr']:g} | {row['seed']} | {found} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Mean ± 95 % interval over the seeds, {PICTURES} pictures; the lead in AUC is paired by seed. `python "
            "benchmarks/harmful_pictures.py`; raw rows: `benchmarks/results/harmful_pictures.jsonl`.",
        ]
    )


def main() -> None:
    parser = arguments(__doc__, RAW, page=True)
    parser.add_argument("--tune", action="store_true", help="the rates")
    given = parsed(parser)
    rows = read(given.out)
    there = {(row["condition"], row["seed"], row["lr"] if row["tuned"] else None) for row in rows}
    for job in () if given.write else asked(given.tune, given.miniature):
        if job not in there:
            rows.append(run(*job, given.miniature))
            append(given.out, rows[-1])
            print(*job, rows[-1], file=sys.stderr, flush=True)
    show(given.write, "harmful_pictures", table(rows))


if __name__ == "__main__":
    main()
