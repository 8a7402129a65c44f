"""Runs of a few steps, and pictures, that tests of the edges spoil."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy
import pytest
from command import metapl
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits

TINY = (
    *(
        "train",
        "digits",
        "--steps",
        "6",
        "--hidden",
        "4",
        "--finetune-steps",
        "4",
        "--labeled-batch",
        "8",
    ),
    *("--unlabeled-batch", "8", "--log-every", "1", "--validate-every", "2", "--save-every", "2"),
)
"""A run of a second, all of whose files are there."""


NOISY_STUDENT = (
    *(
        "noisy-student",
        "digits",
        "--steps",
        "6",
        "--rounds",
        "2",
        "--hidden",
        "4",
        "--labeled-batch",
        "8",
    ),
    *(
        "--ratio",
        "2",
        "--threshold",
        "0.12",
        "--log-every",
        "1",
        "--validate-every",
        "3",
        "--save-every",
        "2",
    ),
)
"""A run of several phases, of a second or two."""


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """Return the folder that ``build`` fills once a session, in whichever process asks first."""
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
    """Return a run, which tests leave as it is."""
    return built_once(tmp_path_factory, "tiny", lambda out: metapl(*TINY, "--out", str(out)))


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    """Return a run to spoil."""
    # Metapl runs shows their day.
    return Path(shutil.copytree(tiny, tmp_path / "run", copy_function=shutil.copy))


@pytest.fixture(scope="session")
def ten_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write ten digits as pictures, and a file that is none."""
    folder = tmp_path_factory.mktemp("digits")
    for index, image in enumerate(load_digits().images[:10]):
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("not to be read")
    return folder


@pytest.fixture(scope="session")
def digit(ten_digits: Path) -> Path:
    return ten_digits / "0.png"


COLORS = ("blue", "green", "red")
# The spare pictures are drawn so that the unlabeled ones are those of the golden trainings.
PARTS = {"labeled": 8, "test": 6, "spare": 19, "unlabeled": 12}


def colored_pictures(
    root: Path, parts: Mapping[str, int] = PARTS, colors: Sequence[str] = COLORS, side: int = 20
) -> Path:
    """Write noisy pictures of each color in each part."""
    rng = numpy.random.default_rng(0)
    for part, count in parts.items():
        for color in colors:
            for number in range(count):
                levels = rng.integers(0, 256, (side, side, 3)) // 2
                levels[..., 2 - COLORS.index(color)] += 100
                label = "" if part == "unlabeled" else color
                folder = root / part / label
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(levels.astype("uint8")).save(folder / f"{color}-{number}.png")
    return root


def color_folders(root: Path, few: int = 6, many: int = 12, side: int = 16) -> Path:
    """Write red and blue pictures.

    ``labeled`` and ``test`` have a folder for each class; ``unlabeled`` has none.
    """
    return colored_pictures(
        root, {"labeled": few, "test": few, "unlabeled": many}, ("blue", "red"), side
    )


@pytest.fixture(scope="session")
def three_colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_once(tmp_path_factory, "three-colors", colored_pictures)


IMAGES = (
    *(
        "--steps",
        "4",
        "--image-size",
        "8",
        "--network",
        "small_cnn",
        "--finetune-steps",
        "2",
        "--precision",
        "float32",
    ),
    *(
        "--labeled-batch",
        "4",
        "--unlabeled-batch",
        "4",
        "--device",
        "cpu",
        "--log-every",
        "1",
        "--save-every",
        "2",
    ),
)
"""Flags of a run on such pictures that takes a second."""


def images_command(root: Path, *more: str) -> list[str]:
    """Return the command that trains on :func:`color_folders`, by UDA where no method is named."""
    folders = [f"--{part}={root / part}" for part in ("labeled", "unlabeled", "test")]
    is_named = any(word.startswith("--method") for word in more)
    method = [] if is_named else ["--method", "uda"]
    return ["train", "images", *folders, *IMAGES, *method, *more]


@pytest.fixture(scope="session")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return red and blue pictures, and a run on them, which tests leave as they are."""

    def build(root: Path) -> None:
        metapl(*images_command(color_folders(root)), "--out", str(root / "run"))

    return built_once(tmp_path_factory, "colors", build)
