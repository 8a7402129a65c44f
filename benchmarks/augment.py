"""What the views cost per batch, beside torchvision's RandAugment image by image and once for the whole batch.

    python benchmarks/augment.py                                       # under a minute on one core
    python benchmarks/augment.py --table benchmarks/results/augment.json

torchvision draws one operation for all that it is given, so that only image by image does the same work; once for the
batch shows what one call costs. All get uint8 pictures on the device; with a CUDA device it is measured there as well.
Where other programs run beside it, the processor's time is the one to compare.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from machine import arguments, described, parsed, write_json
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import v2

from metapl.data import Chain, RandAugment, ResizedCrop, View, Weak

RESULT = Path(__file__).parent / "results" / "augment.json"
SHAPES = {"CIFAR-10": (448, 3, 32, 32), "ImageNet": (64, 3, 224, 224)}
MINIATURE_SHAPES = {"CIFAR-10": (4, 3, 32, 32), "ImageNet": (2, 3, 224, 224)}
SECONDS, MINIATURE_SECONDS = 2.5, 0.0


def pictures(shape: tuple[int, ...], device: str) -> Tensor:
    """Pieces of a photograph."""
    photograph = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    batch, _, height, width = shape
    generator = torch.Generator().manual_seed(0)
    tops = torch.randint(photograph.shape[1] - height + 1, (batch,), generator=generator).tolist()
    lefts = torch.randint(photograph.shape[2] - width + 1, (batch,), generator=generator).tolist()
    pieces = [photograph[:, y : y + height, x : x + width] for y, x in zip(tops, lefts, strict=True)]
    return torch.stack(pieces).to(device)


def ours(view: View) -> Callable[[Tensor, int], Tensor]:
    return lambda images, step: view(images, seed=0, step=step, examples=torch.arange(len(images)))


def theirs(images: Tensor, step: int) -> Tensor:
    operation = v2.RandAugment(2, 16)
    return torch.stack([operation(image) for image in images])


def cases(name: str) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """The views of one protocol, and torchvision's RandAugment."""
    cifar = name == "CIFAR-10"
    strong = RandAugment() if cifar else RandAugment(magnitude=17, translate=100 / 224, cutout=0)
    weak: View = Weak() if cifar else ResizedCrop(224)
    return {
        "weak": ours(weak),
        "RandAugment": ours(strong),
        "RandAugment, every operation takes place": ours(
            RandAugment(2, strong.magnitude, probability=(1, 1), translate=strong.translate, cutout=strong.cutout)
        ),
        "strong": ours(Chain((weak, strong, weak) if cifar else (weak, strong))),
        "torchvision, image by image": theirs,
        "torchvision, once for the batch": lambda images, step: v2.RandAugment(2, 16)(images),
    }


def measured(change: Callable[[Tensor, int], Tensor], images: Tensor, seconds: float) -> dict[str, Any]:
    """Milliseconds of the calls that fit into a time, after a first one, by the clock and of this process alone."""
    wait = torch.cuda.synchronize if images.is_cuda else lambda: None
    times, busy = [], []
    began = time.perf_counter()
    for step in range(200):
        wait()
        start, start_busy = time.perf_counter(), time.process_time()
        change(images, step)
        wait()
        times.append(1000 * (time.perf_counter() - start))
        busy.append(1000 * (time.process_time() - start_busy))
        if time.perf_counter() - began > seconds and step >= 3:
            break
    times, busy = times[1:], busy[1:]
    return {
        "ms": statistics.median(times),
        "least": min(times),
        "greatest": max(times),
        "processor_ms": statistics.mean(busy),
        "n": len(times),
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| device | batch | view | ms per batch, median (least to greatest) | of the processor, mean | n |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['device']} | {'x'.join(map(str, row['shape']))} | {row['view']} "
        f"| {row['ms']:.1f} ({row['least']:.1f} to {row['greatest']:.1f}) | {row['processor_ms']:.1f} | {row['n']} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, RESULT)
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result and stop")
    given = parsed(parser)
    if given.table:
        print(table(json.loads(given.table.read_text())))
        return
    shapes, seconds = (MINIATURE_SHAPES, MINIATURE_SECONDS) if given.miniature else (SHAPES, SECONDS)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for device in devices:
        for name, shape in shapes.items():
            images = pictures(shape, device)
            for view, change in cases(name).items():
                torch.manual_seed(0)
                rows.append({"device": device, "shape": shape, "view": view, **measured(change, images, seconds)})
    setup = {
        **described(devices[-1]),
        "torchvision": torchvision.__version__,
        "command": "python benchmarks/augment.py",
    }
    result = {"setup": setup, "rows": rows}
    write_json(given.out, result)
    print(table(json.loads(given.out.read_text())))


if __name__ == "__main__":
    main()
