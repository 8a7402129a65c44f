"""Is a step of ``airbench_small`` by the command as fast as that of a script of sixty lines?

    python benchmarks/small_pictures.py step                      # both, in turns, processor time
    python benchmarks/small_pictures.py accuracy --few DIR --test DIR --pictures 60000

``step`` takes steps of 64 pictures of 32 x 32 and of 24 x 24 by ``metapl.LossTrainer`` on the
batches of ``metapl train images --method supervised``, and by the script below, in turns on one
thread, and appends the medians to benchmarks/results/small_pictures.jsonl. ``accuracy`` trains by
the script alone, on folders with a folder for each class, as the command reads them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

RAW = RESULTS / "small_pictures.jsonl"
BATCH = 64
SIDE = 32
SMALL_SIDE = 24

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


def read(paths: list[Path]) -> Tensor:
    levels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return torch.from_numpy(levels).permute(0, 3, 1, 2).contiguous().float() / 255


def labeled_folder(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the pictures of a folder with a folder for each class, and their labels."""
    paths = sorted(folder.glob("*/*.png"))
    names = sorted({path.parent.name for path in paths})
    return read(paths), torch.tensor([names.index(path.parent.name) for path in paths])


def append(row: dict[str, object]) -> None:
    line = json.dumps(row)
    print(line)
    with RAW.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def measure_accuracy(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    pictures, labels = labeled_folder(options.few)
    paths = sorted(options.unlabeled.rglob("*.png"))
    unlabeled = read(paths[:: max(1, len(paths) // 1500)][:1500])
    steps = options.pictures // BATCH
    script = Script(pictures, labels, unlabeled, steps)
    begun = time.process_time()
    for number in range(steps):
        script.step(number, SMALL_SIDE if number < 0.6 * steps else SIDE)
    seconds = time.process_time() - begun
    accuracy = script.accuracy(*labeled_folder(options.test), unlabeled)
    row = {"program": "script", "labels": len(labels), "draw": options.draw, "seed": options.seed}
    row |= {"pictures": steps * BATCH, "core_seconds": round(seconds, 1)}
    append({**row, "test_accuracy": accuracy})


def measure_step(options: argparse.Namespace) -> None:
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
    calls = options.calls
    script = Script(pictures, labels, pictures, steps=10 * calls)
    patches = tuple(patch_covariance((pictures - 0.5) / 0.29).flatten().tolist())
    chosen = Pictures(
        network="airbench_small",
        image_size=SIDE,
        mirror=True,
        recolor=False,
        mean=(0.5,) * 3,
        std=(0.29,) * 3,
        patches=patches,
    )
    classes = tuple("abcdefghij")
    fitting = Fitting(steps=10 * calls, lr=chosen.rate, labeled_batch=BATCH)
    config = Images(labeled="", unlabeled="", pictures=chosen, fitting=fitting, classes=classes)
    network = config.network()
    optimizer = config.optimizer("teacher", network)
    losses = (CrossEntropy(chosen.recipe.label_smoothing),)
    trainer = LossTrainer(network, losses, optimizer=optimizer, **config.trainer_options())
    sampler = StepSampler(len(labels), BATCH, seed=0)
    # The view changes to the larger side at step ``calls``.
    view = chosen.views(small_until=calls).labeled
    batches = LabeledBatches(MemoryImages(levels), labels, sampler, view, seed=0)

    def seconds(step: Callable[[int], object], number: int) -> float:
        begun = time.process_time()
        step(number)
        return time.process_time() - begun

    for side, first in ((SMALL_SIDE, 0), (SIDE, calls)):
        by_program: dict[str, list[float]] = {"script": [], "metapl": []}
        for number in range(first, first + calls):
            times = by_program["script"]
            times.append(seconds(lambda number, side=side: script.step(number, side), number))
            times = by_program["metapl"]
            times.append(seconds(lambda number: trainer.step(batches[number]), number))
        medians = {name: statistics.median(times) for name, times in by_program.items()}
        row: dict[str, object] = {"side": side, "batch": BATCH, "calls": calls}
        row |= {f"{name}_ms": round(1e3 * median, 2) for name, median in medians.items()}
        append({**row, "ratio": round(medians["metapl"] / medians["script"], 3)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step")
    step.add_argument("--calls", type=int, default=40)
    accuracy = commands.add_parser("accuracy")
    for name in ("few", "unlabeled", "test"):
        accuracy.add_argument(f"--{name}", type=Path, required=True)
    accuracy.add_argument("--draw", default="", help="what the row calls these labels")
    accuracy.add_argument("--pictures", type=int, default=60_000)
    accuracy.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "step":
        measure_step(options)
    else:
        measure_accuracy(options)


if __name__ == "__main__":
    main()
