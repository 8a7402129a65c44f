"""Is ``airbench_small`` by the command as fast and as good as by a script of sixty lines?

    python benchmarks/small_pictures.py --root FOLDERS     # half an hour of a core; goes on
    python benchmarks/small_pictures.py --root FOLDERS --minutes 5    # by the clock
    python benchmarks/small_pictures.py --write docs/studies/picture-methods.md

A step: 64 pictures of 24 x 24 and of 32 x 32 by ``metapl.LossTrainer`` on the batches of ``metapl
train images --method supervised``, and by the script below, in turns on one thread, in processor
time, the median of 40. Accuracy: each program trains on FOLDERS, which has labeled, unlabeled and
test, until so many pictures went forward and back, and is tested once. Both learn from all labels,
and the command takes all but the steps by default: mild changes of pictures in the shorter run. The
rows were measured on 4,000 labels of CIFAR-10, 400 a class, drawn by NumPy's generator of seed
--draw, and tested on all test pictures.

By the clock, both programs train at the same time, each on one thread, from the start of the
program to its end. The command has its defaults; the script plans its steps for nine tenths of the
minutes by a few that it has timed.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import RESULTS, Row, grid, read, show
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

RAW = RESULTS / "small_pictures.jsonl"
BATCH = 64
SIDE = 32
SMALL_SIDE = 24
BUDGETS = (60_000, 120_000)
PROGRAMS = ("script", "metapl")

# -------------------------------------------------------------------------------------- the script


class Network(nn.Module):
    """The network of ``airbench_small``, written by itself."""

    def __init__(self, pictures: Tensor, classes: int) -> None:
        super().__init__()
        self.mean = pictures.mean((0, 2, 3), keepdim=True)
        self.std = pictures.std((0, 2, 3), keepdim=True)
        normalized = (pictures - self.mean) / self.std
        patches = normalized.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5)
        variances, directions = torch.linalg.eigh(torch.cov(patches.reshape(-1, 12).T))
        filters = (directions / (variances + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.filters = torch.cat([filters, -filters]).to(memory_format=torch.channels_last)
        layers: list[nn.Module] = [nn.GELU()]
        for inputs, outputs in ((24, 32), (32, 128), (128, 128)):
            first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            layers += [first, nn.MaxPool2d(2), nn.BatchNorm2d(outputs, momentum=0.2), nn.GELU()]
            layers += [second, nn.BatchNorm2d(outputs, momentum=0.2), nn.GELU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, classes, bias=False)

    def forward(self, pictures: Tensor) -> Tensor:
        whitened = F.conv2d((pictures - self.mean) / self.std, self.filters)
        logits: Tensor = self.head(self.body(whitened)) / 3
        return logits


def uniform(*shape: int) -> Tensor:
    return 2 * torch.rand(*shape) - 1


def augment(pictures: Tensor, side: int, mean: Tensor) -> Tensor:
    """Mirror, move, zoom, turn and resize in one sampling; then colors and a hole."""
    count = len(pictures)
    angle = uniform(count) * math.radians(7)
    zoom = 1.12 ** uniform(count)
    sign = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    first = torch.stack([sign * angle.cos() / zoom, -angle.sin() / zoom, uniform(count) / 4], 1)
    second = torch.stack([sign * angle.sin() / zoom, angle.cos() / zoom, uniform(count) / 4], 1)
    maps = torch.stack([first, second], 1)
    grid = F.affine_grid(maps, [count, 3, side, side], align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    level = moved.mean((1, 2, 3), keepdim=True)
    contrast = 1 + 0.2 * uniform(count, 1, 1, 1)
    brightness = 0.15 * uniform(count, 1, 1, 1) + 0.075 * uniform(count, 3, 1, 1)
    moved = (moved - level) * contrast + level + brightness
    rows = (torch.arange(side) - torch.randint(side, (count, 1))).abs() * 2 <= side // 4
    columns = (torch.arange(side) - torch.randint(side, (count, 1))).abs() * 2 <= side // 4
    hole = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(hole, mean, moved).contiguous(memory_format=torch.channels_last)


class Script:
    """Training on labeled pictures in memory; ``step`` takes one step."""

    def __init__(self, pictures: Tensor, labels: Tensor, unlabeled: Tensor, steps: int) -> None:
        self.pictures = pictures
        self.labels = labels
        self.steps = steps
        network = Network(unlabeled, int(labels.max()) + 1)
        self.network = network.to(memory_format=torch.channels_last)
        weights = [p for p in network.parameters() if p.ndim > 1]
        others = [p for p in network.parameters() if p.ndim <= 1]
        groups = [{"params": weights, "weight_decay": 2e-3}, {"params": others}]
        self.optimizer = torch.optim.SGD(groups, lr=0.06, momentum=0.9, nesterov=True)
        self.order = torch.empty(0, dtype=torch.int64)

    def step(self, number: int, side: int) -> None:
        share = number / self.steps
        factor = min((share + 1 / self.steps) / 0.15, (1 - share) / 0.85, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.06 * factor
        if len(self.order) < BATCH:
            self.order = torch.cat([self.order, torch.randperm(len(self.pictures))])
        rows, self.order = self.order[:BATCH], self.order[BATCH:]
        pictures = augment(self.pictures[rows], side, self.network.mean)
        logits = self.network(pictures)
        loss = F.cross_entropy(logits, self.labels[rows], label_smoothing=0.2)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def accuracy(self, pictures: Tensor, labels: Tensor, unlabeled: Tensor) -> float:
        """Estimate batch norm's statistics again, and measure by pictures and mirror images."""
        self.network.train()
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        for batch in unlabeled.split(250):
            self.network(batch)
        self.network.eval()
        right = 0
        for batch, expected in zip(pictures.split(500), labels.split(500), strict=True):
            logits = self.network(batch) + self.network(batch.flip(3))
            right += int((logits.argmax(1) == expected).sum())
        return right / len(labels)


# ---------------------------------------------------------------------------------------- measuring


def read_pictures(paths: list[Path]) -> Tensor:
    levels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return torch.from_numpy(levels).permute(0, 3, 1, 2).contiguous().float() / 255


def labeled_folder(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the pictures of a folder with a folder for each class, and their labels."""
    paths = sorted(folder.glob("*/*.png"))
    names = sorted({path.parent.name for path in paths})
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    return read_pictures(paths), labels


def accuracy_of_script(root: Path, steps: int, seed: int) -> Row:
    """Train by the script, and return what it reaches."""
    torch.manual_seed(seed)
    pictures, labels = labeled_folder(root / "labeled")
    paths = sorted((root / "unlabeled").glob("*.png"))
    unlabeled = read_pictures(paths[:: max(1, len(paths) // 1500)][:1500])
    begun = time.process_time()
    script = Script(pictures, labels, unlabeled, steps)
    for number in range(steps):
        script.step(number, SMALL_SIDE if number < 0.6 * steps else SIDE)
    seconds = time.process_time() - begun
    accuracy = script.accuracy(*labeled_folder(root / "test"), unlabeled)
    return {"test_accuracy": accuracy, "core_seconds": round(seconds, 1)}


def command_of(root: Path, out: str, *words: str) -> list[str]:
    """Return the words of the command on the folders of a draw."""
    command = [sys.executable, "-m", "metapl", "train", "images", "--device", "cpu", *words]
    for name in ("labeled", "unlabeled", "test"):
        command += [f"--{name}", str(root / name)]
    return [*command, "--out", out]


def accuracy_of_command(root: Path, steps: int, seed: int) -> Row:
    """Train by the command, and return what it delivers; its seconds are those of all it does."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--method", "supervised", "--finetune-steps", "0"]
        words += ["--steps", str(steps), "--seed", str(seed)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = command_of(root, f"{folder}/run", *words)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = json.loads(Path(folder, "run", "result.json").read_text())
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"test_accuracy": result["test_accuracy"], "core_seconds": round(seconds, 1)}


def by_the_clock(root: Path, minutes: float, seed: int) -> list[Row]:
    """Train by both programs at the same time, and return what each reaches in its minutes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        words = ["--minutes", str(minutes), "--seed", str(seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        begun = time.monotonic()
        command = subprocess.Popen(
            command_of(root, f"{folder}/run", *words), stdout=subprocess.DEVNULL, env=environment
        )
        of_script = pool.submit(script_by_the_clock, root, minutes, seed)
        if command.wait():
            raise RuntimeError(f"the command ended with {command.returncode}")
        seconds = time.monotonic() - begun
        result = json.loads(Path(folder, "run", "result.json").read_text())
        row = {
            "program": "metapl",
            "test_accuracy": result["test_accuracy"],
            "seconds": round(seconds, 1),
            "steps": result["steps"] - result["skipped_steps"],
            "method": result["method"],
        }
        return [row, {"program": "script", **of_script.result()}]


def script_by_the_clock(root: Path, minutes: float, seed: int) -> Row:
    """Train by the script for as many steps as it has time for, and return what it reaches."""
    begun = time.monotonic()
    torch.set_num_threads(1)
    pictures, labels = labeled_folder(root / "labeled")
    paths = sorted((root / "unlabeled").glob("*.png"))
    unlabeled = read_pictures(paths[:: max(1, len(paths) // 1500)][:1500])

    def seconds_of_step(side: int) -> float:
        trial = Script(pictures, labels, unlabeled, steps=1000)
        trial.step(0, side)
        since = time.monotonic()
        for number in range(8):
            trial.step(number, side)
        return (time.monotonic() - since) / 8

    average = 0.6 * seconds_of_step(SMALL_SIDE) + 0.4 * seconds_of_step(SIDE)
    left = 0.9 * 60 * minutes - (time.monotonic() - begun)
    steps = max(1, int(left / average))
    torch.manual_seed(seed)
    script = Script(pictures, labels, unlabeled, steps)
    for number in range(steps):
        script.step(number, SMALL_SIDE if number < 0.6 * steps else SIDE)
    accuracy = script.accuracy(*labeled_folder(root / "test"), unlabeled)
    seconds = round(time.monotonic() - begun, 1)
    return {"test_accuracy": accuracy, "seconds": seconds, "steps": steps}


def step_seconds(side: int, calls: int) -> Row:
    """Take steps by both programs in turns, and return the medians of their processor time."""
    from metapl import CrossEntropy, LossTrainer
    from metapl.apps.images import Images, Pictures
    from metapl.apps.settings import Fitting
    from metapl.data import StepSampler
    from metapl.networks.airbench import patch_covariance
    from metapl.pictures import LabeledBatches, MemoryImages

    torch.manual_seed(0)
    levels = torch.randint(0, 256, (1024, 3, SIDE, SIDE), dtype=torch.uint8)
    pictures = levels / 255
    labels = torch.arange(1024) % 10
    script = Script(pictures, labels, pictures, steps=10 * calls)
    chosen = Pictures(
        network="airbench_small",
        image_size=SIDE,
        mirror=True,
        recolor=False,
        mean=(0.5,) * 3,
        std=(0.29,) * 3,
        patches=tuple(patch_covariance((pictures - 0.5) / 0.29).flatten().tolist()),
    )
    fitting = Fitting(steps=10 * calls, lr=chosen.rate, labeled_batch=BATCH)
    config = Images(
        labeled="", unlabeled="", pictures=chosen, fitting=fitting, classes=tuple("abcdefghij")
    )
    network = config.network()
    optimizer = config.optimizer("teacher", network)
    losses = (CrossEntropy(chosen.recipe.label_smoothing),)
    trainer = LossTrainer(network, losses, optimizer=optimizer, **config.trainer_options())
    sampler = StepSampler(len(labels), BATCH, seed=0)
    is_small = side < SIDE
    view = chosen.views(small_until=calls if is_small else 0).labeled
    batches = LabeledBatches(MemoryImages(levels), labels, sampler, view, seed=0)

    def seconds(step: Callable[[int], object], number: int) -> float:
        begun = time.process_time()
        step(number)
        return time.process_time() - begun

    times: dict[str, list[float]] = {program: [] for program in PROGRAMS}
    for number in range(calls):
        times["script"].append(seconds(lambda number: script.step(number, side), number))
        times["metapl"].append(seconds(lambda number: trainer.step(batches[number]), number))
    return {f"{name}_ms": 1e3 * statistics.median(of_name) for name, of_name in times.items()}


def write_noise(root: Path) -> None:
    """Write folders of random pictures, for the miniature."""
    rng = np.random.default_rng(0)
    for part, count in (("labeled", 12), ("unlabeled", 12), ("test", 6)):
        for number in range(count):
            label = "" if part == "unlabeled" else "ab"[number % 2]
            folder = root / part / label
            folder.mkdir(parents=True, exist_ok=True)
            levels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / f"{number}.png")


# ------------------------------------------------------------------------------------------- tables


def table_of_steps(rows: list[Row]) -> str:
    """Return the milliseconds of a step by each program."""
    lines = []
    for row in rows:
        ratio = row["metapl_ms"] / row["script_ms"]
        times = [f"{row[f'{program}_ms']:.1f}" for program in PROGRAMS]
        lines.append([f"{row['side']} x {row['side']}", *times, f"{ratio:.2f}"])
    return grid(["a step of 64 pictures", "script, ms", "`metapl`, ms", "ratio"], lines, 1)


def table_of_accuracies(rows: list[Row]) -> str:
    """Return the test accuracy of each program after so many pictures."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["pictures"], row["program"])):
        figures = [f"{100 * row['test_accuracy']:.1f}", f"{row['core_seconds']:.0f}"]
        lines.append([row["program"], f"{row['pictures']:,}", *figures])
    return grid(["program", "pictures forward and back", "test, %", "core-seconds"], lines, 1)


def table_by_the_clock(rows: list[Row]) -> str:
    """Return the test accuracy of both programs in equal minutes, by draw."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["minutes"], row["draw"], row["program"])):
        figures = [
            f"{row['seconds']:.0f}",
            f"{row['steps']:,}",
            f"{100 * row['test_accuracy']:.1f}",
        ]
        lines.append([f"{row['minutes']:g}", str(row["draw"]), row["program"], *figures])
    return grid(["minutes", "draw", "program", "seconds", "steps", "test, %"], lines, "rrlrrr")


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument("--root", type=Path, help="folder of labeled, unlabeled and test")
    parser.add_argument("--draw", type=int, default=12, help="seed by which the labels were drawn")
    parser.add_argument("--minutes", type=float, help="train both by the clock, at the same time")
    args = harness.parsed(parser)
    if args.runs:
        torch.set_num_threads(1)
        budgets = [BATCH * 2] if args.miniature else BUDGETS
        calls = 2 if args.miniature else 40
        jobs: list[Row] = [{"side": side, "calls": calls} for side in (SMALL_SIDE, SIDE)]
        for pictures in budgets:
            for program in PROGRAMS:
                job = {"program": program, "pictures": pictures, "draw": args.draw, "seed": 0}
                jobs.append(job)
        if args.minutes is not None:
            jobs = [{"minutes": args.minutes, "draw": args.draw, "seed": 0}]
        with tempfile.TemporaryDirectory() as folder:
            root = args.root
            if args.miniature:
                root = Path(folder)
                write_noise(root)

            def measure(**job: Any) -> Row | list[Row]:
                if "side" in job:
                    return step_seconds(**job)
                if "minutes" in job:
                    return by_the_clock(root, job["minutes"], job["seed"])
                steps = round(job["pictures"] / BATCH)
                if job["program"] == "script":
                    return accuracy_of_script(root, steps, seed=job["seed"])
                return accuracy_of_command(root, steps, seed=job["seed"])

            harness.go_on(args.out, jobs, measure, environment=harness.environment())
    show(args.write, "small_pictures-step", table_of_steps(read(args.out, having="side")))
    accuracies = read(args.out, having="pictures")
    show(args.write, "small_pictures", table_of_accuracies(accuracies))
    show(args.write, "small_pictures-clock", table_by_the_clock(read(args.out, having="minutes")))


if __name__ == "__main__":
    main()
