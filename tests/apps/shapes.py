"""Pictures of bars and beams, some of them in the folder of the other class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

FLAGS = (
    "--image-size 8 --network small_cnn --precision float32 --labeled-batch 12 --clean-batch 6 --steps 24 "
    "--warm-steps 6 --finetune-steps 4 --log-every 2 --validate-every 6 --save-every 4"
)
SHAPES = ("bar", "beam")


def picture(shape: str, seed: int) -> Image.Image:
    """A bar stands, a beam lies."""
    draw = np.random.default_rng(seed)
    levels = draw.integers(0, 60, (8, 8)).astype(np.uint8)
    place = int(draw.integers(1, 6))
    levels[:, place : place + 2] = 255
    return Image.fromarray(levels if shape == "bar" else np.ascontiguousarray(levels.T))


def write(root: Path, each: int, seed: int, wrong: int = 0) -> set[str]:
    """``each`` pictures a class, the first ``wrong`` of them in the other folder; the paths of these."""
    misplaced = set()
    for number, shape in enumerate(SHAPES):
        for index in range(each):
            folder = SHAPES[1 - number] if index < wrong else shape
            path = root / folder / f"{shape}-{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(shape, seed + 100 * number + index).save(path)
            misplaced |= {str(path)} if index < wrong else set()
    return misplaced


def given(root: Path) -> list[str]:
    return ["--labeled", str(root / "noisy"), "--clean", str(root / "clean")]
