"""ImageNet's released test sets in small: their folders, names and kinds of files, with pictures of 16 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy
from PIL import Image

from metapl.apps.evaluation.corruptions import CORRUPTIONS

WNIDS = tuple(f"n{1000000 + 37 * number:08}" for number in range(1000))
"""Names of ImageNet's form, in the order of the outputs."""

PERTURBATIONS = ("gaussian_noise", "shot_noise", "motion_blur", "zoom_blur", "snow", "brightness")
PERTURBATIONS += ("translate", "rotate", "tilt", "scale")

SIDE = 16


def picture(seed: int) -> Image.Image:
    """A picture that no other seed gives."""
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=numpy.uint8))


def save(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(file, "PNG")


def write_a(root: Path, outputs: Sequence[int]) -> Path:
    """ImageNet-A: 200 class folders with a picture each, and the README that is released with it."""
    for number, output in enumerate(outputs):
        save(root / WNIDS[output] / f"0.{number:06}_bee _ bee_0.9.jpg", number)
    (root / "README.txt").write_text("ImageNet-A\n")
    return root


def write_c(root: Path, outputs: Sequence[int], grouped: bool = False) -> Path:
    """ImageNet-C: corruption/severity/class/picture; ``grouped``: in the folders of the archives."""
    archives = {"gaussian_noise": "noise", "defocus_blur": "blur", "snow": "weather", "contrast": "digital"}
    archive = ""
    for kind, name in enumerate(CORRUPTIONS):
        archive = archives.get(name, archive)
        for severity in range(1, 6):
            for output in outputs:
                place = root / (archive if grouped else "") / name / str(severity) / WNIDS[output]
                save(place / f"ILSVRC2012_val_{output + 1:08}.JPEG", 100 * kind + 10 * severity + output)
    return root


def write_p(root: Path, outputs: Sequence[int], frames: int = 4) -> Path:
    """ImageNet-P, each sequence a folder of frames that are called as those its videos were made from."""
    for kind, name in enumerate(PERTURBATIONS):
        for output in outputs:
            for frame in range(frames):
                place = root / name / WNIDS[output] / f"ILSVRC2012_val_{output + 1:08}"
                save(place / f"img{frame + 8}.png", 1000 * kind + 10 * output + frame)
    return root


def write_video(file: Path, seeds: Sequence[int]) -> None:
    """An H.264 video of the pictures, without loss, one a second, as ImageNet-P has them."""
    import av

    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as video:
        stream = video.add_stream("libx264rgb", rate=Fraction(1))
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "rgb24"
        stream.options = {"crf": "0"}
        for seed in seeds:
            video.mux(stream.encode(av.VideoFrame.from_image(picture(seed))))
        video.mux(stream.encode())
