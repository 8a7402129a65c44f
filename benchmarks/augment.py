"""What the views cost per batch, beside torchvision's image by image and, for RandAugment, once for the whole batch.

    python benchmarks/augment.py                                       # under a minute on one core
    python benchmarks/augment.py --table benchmarks/results/augment.json

torchvision draws one operation for all that it is given, so that only image by image does the same work; once for the
batch shows what one call costs. The views that change whole batches stand beside torchvision's affine map, colors and
erasing with the same settings. All get uint8 pictures on the device; with a CUDA device it is measured there as well.
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

from metapl.apps.pictures import Affine, Chain, Color, Flip, Hole, RandAugment, ResizedCrop, View, Weak
from metapl.apps.pictures.batches import in_unit_range

RESULT = Path(__file__).parent / "results" / "augment.json"
SHAPES = {"CIFAR-10": (448, 3, 32, 32), "ImageNet": (64, 3, 224, 224)}
WHOLE_BATCHES = {"64": (64, 3, 32, 32), "160": (160, 3, 32, 32)}
SECONDS = 2.5
MINIATURE_BATCH, MINIATURE_SECONDS = 2, 0.0


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


def whole_batches() -> dict[str, Callable[[Tensor, int], Tensor]]:
    """The views that change whole batches, alone and together, and torchvision's."""
    affine = Affine(degrees=15, translate=0.1, scale=(0.8, 1.2), shear=10, fill="reflect")
    color, hole = Color(0.4, 0.4, 0.4, 0.1), Hole((0.2, 0.5))
    moved = v2.RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 10, interpolation=v2.InterpolationMode.BILINEAR)
    strong = v2.Compose([v2.RandomHorizontalFlip(), moved, v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandomErasing(1)])
    views: dict[str, View] = {
        "Flip": Flip(),
        "Affine": affine,
        "Color": color,
        "Hole": hole,
        "Flip, Affine, Color, Hole": Chain((Flip(), affine, color, hole)),
        "Weak and RandAugment": Chain((Weak(), RandAugment(cutout=8))),
    }

    def in_range(view: View) -> Callable[[Tensor, int], Tensor]:
        change = ours(view)
        return lambda images, step: change(in_unit_range(images), step)

    return {name: in_range(view) for name, view in views.items()} | {
        "torchvision's flip, affine, colors, erasing, image by image": lambda images, step: torch.stack(
            [strong(image) for image in in_unit_range(images)]
        )
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
    seconds = MINIATURE_SECONDS if given.miniature else SECONDS
    # Once something large was freed, as in every training, the C library keeps memory instead of fetching it each time.
    torch.ones(2**22)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for device in devices:
        for name, whole in (SHAPES | WHOLE_BATCHES).items():
            shape = (MINIATURE_BATCH, *whole[1:]) if given.miniature else whole
            images = pictures(shape, device)
            for view, change in (cases(name) if name in SHAPES else whole_batches()).items():
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
