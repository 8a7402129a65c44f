"""Runs of a few steps, and pictures, that tests of the edges spoil."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from command import metapl
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits

TINY = (
    *("train", "digits", "--steps", "6", "--hidden", "4", "--finetune-steps", "4", "--labeled-batch", "8"),
    *("--unlabeled-batch", "8", "--log-every", "1", "--validate-every", "2", "--save-every", "2"),
)
"""A run of a second, all of whose files are there."""


NOISY_STUDENT = (
    *("noisy-student", "digits", "--steps", "6", "--rounds", "2", "--hidden", "4", "--labeled-batch", "8"),
    *("--ratio", "2", "--threshold", "0.12", "--log-every", "1", "--validate-every", "3", "--save-every", "2"),
)
"""A run of several phases, of a second or two."""


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """The folder that ``build`` fills the first time that anybody of a session asks for it, in whichever process."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / "built" / name, root / "built" / f"{name}.done"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            build(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, which tests leave as it is."""
    return built_once(tmp_path_factory, "tiny", lambda out: metapl(*TINY, "--out", str(out)))


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    """A run to spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "run", copy_function=shutil.copy))  # metapl runs shows their day


@pytest.fixture(scope="session")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One digit as a picture."""
    path = tmp_path_factory.mktemp("digit") / "digit.png"
    Image.fromarray((load_digits().images[0] * 255 / 16).round().astype("uint8")).save(path)
    return path


def color_folders(root: Path, few: int = 6, many: int = 12, side: int = 16) -> Path:
    """Red and blue pictures: ``labeled`` and ``test`` with a folder for each class, and ``unlabeled``."""
    rng = numpy.random.default_rng(0)
    for part, count in (("labeled", few), ("test", few), ("unlabeled", many)):
        for index, name in enumerate(("blue", "red")):
            folder = root / part / ("" if part == "unlabeled" else name)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                levels = rng.integers(0, 256, (side, side, 3)) // 3
                levels[..., 2 - 2 * index] += 150
                Image.fromarray(levels.astype("uint8")).save(folder / f"{name}-{number}.png")
    return root


IMAGES = (
    *("--steps", "4", "--image-size", "8", "--network", "small_cnn", "--finetune-steps", "2", "--precision", "float32"),
    *("--labeled-batch", "4", "--unlabeled-batch", "4", "--device", "cpu", "--log-every", "1", "--save-every", "2"),
)
"""Flags of a run on such pictures that takes a second."""


def images_command(root: Path, *more: str) -> list[str]:
    """The command that trains on :func:`color_folders`."""
    folders = [f"--{part}={root / part}" for part in ("labeled", "unlabeled", "test")]
    return ["train", "images", *folders, *IMAGES, *more]


@pytest.fixture(scope="session")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red and blue pictures, and a run on them, which tests leave as they are."""

    def build(root: Path) -> None:
        metapl(*images_command(color_folders(root)), "--out", str(root / "run"))

    return built_once(tmp_path_factory, "colors", build)
