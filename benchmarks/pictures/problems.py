"""The registry of problems, and their pictures as arrays and as folders.

    python -m benchmarks.pictures.problems                      # a table of the seen half
    python -m benchmarks.pictures.problems --write arrows data/arrows --seed 3

README.md in this folder says what the two halves are for.
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import grid
from benchmarks.pictures import seen, unseen
from benchmarks.pictures.drawing import Bytes, Problem

PROBLEMS: tuple[Problem, ...] = (*seen.PROBLEMS, *unseen.PROBLEMS)
FOREIGN = -1  # in place of the label of an unlabeled picture that belongs to no class
PARTS = ("labeled", "unlabeled", "test")
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """A seed's pictures: uint8 of shape (n, size, size, channels), and labels of shape (n,).

    ``unlabeled_labels`` are known because the pictures are generated; no method may learn from
    them.
    """

    labeled: Bytes
    labeled_labels: Labels
    unlabeled: Bytes
    unlabeled_labels: Labels
    test: Bytes
    test_labels: Labels


def named(name: str) -> Problem:
    """Return the problem of a name."""
    return {problem.name: problem for problem in PROBLEMS}[name]


def half(name: str) -> tuple[Problem, ...]:
    """Return the problems of the "seen" or of the "unseen" half."""
    return tuple(problem for problem in PROBLEMS if problem.half == name)


def arrays(problem: Problem, seed: int) -> Pictures:
    """Return the pictures of a problem; a pure function of the problem and the seed."""
    classes, rng = len(problem.classes), _generator(problem, seed, "labels")
    labeled = _labels(problem, problem.labels_per_class * classes, problem.labels_as_found)
    foreign = round(problem.foreign * problem.unlabeled)
    own = _labels(problem, problem.unlabeled - foreign, as_found=True)
    unlabeled = rng.permutation(np.concatenate([own, np.full(foreign, FOREIGN)]))
    test = _labels(problem, problem.test, as_found=True)
    parts = zip(PARTS, (labeled, unlabeled, test), strict=True)
    return Pictures(
        *(both for part, labels in parts for both in (_drawn(problem, seed, part, labels), labels))
    )


def make(problem: Problem, seed: int, folder: Path) -> None:
    """Write the folders of a problem, as a user has them.

    They are folder/labeled/CLASS/*.png, folder/unlabeled/*.png and folder/test/CLASS/*.png.
    """
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(
            f"{folder} is not empty; name a new folder for the pictures of {problem.name}"
        )
    pictures = arrays(problem, seed)
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        labeled = part != "unlabeled"
        for name in problem.classes if labeled else ():
            (folder / part / name).mkdir()
        images, labels = getattr(pictures, part), getattr(pictures, f"{part}_labels")
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / part / problem.classes[label] if labeled else folder / part
            Image.fromarray(image[..., 0] if problem.channels == 1 else image).save(
                place / f"{number:05}.png"
            )


def class_counts(classes: int, total: int, imbalance: float) -> list[int]:
    """Return how many of ``total`` pictures each class gets, at least one; the first gets most.

    >>> class_counts(3, 12, imbalance=1)
    [4, 4, 4]
    >>> class_counts(3, 100, imbalance=10)
    [69, 23, 8]
    """
    shares = imbalance ** (-np.arange(classes) / max(classes - 1, 1))
    ends = np.rint(np.cumsum(shares) / shares.sum() * (total - classes)).astype(int)
    return [int(count) + 1 for count in np.diff(ends, prepend=0)]


def _labels(problem: Problem, total: int, as_found: bool) -> Labels:
    counts = class_counts(len(problem.classes), total, problem.imbalance if as_found else 1)
    return np.repeat(np.arange(len(counts)), counts)


def _generator(problem: Problem, seed: int, part: str, number: int = 0) -> np.random.Generator:
    """Return a picture's own generator, so it does not depend on how many others are drawn."""
    return np.random.default_rng([seed, zlib.crc32(f"{problem.name} {part}".encode()), number])


def _drawn(problem: Problem, seed: int, part: str, labels: Labels) -> Bytes:
    others = tuple(other for other in half(problem.half) if other.name != problem.name)
    pictures = []
    for number, label in enumerate(labels):
        rng = _generator(problem, seed, part, number)
        if label == FOREIGN:
            picture = _foreign(rng, others, problem)
        else:
            picture = problem.draw(rng, int(label), problem.size, part == "test")
        pictures.append(picture.reshape(problem.size, problem.size, problem.channels))
    return np.stack(pictures)


def _foreign(rng: np.random.Generator, others: tuple[Problem, ...], problem: Problem) -> Bytes:
    """Return a picture of another problem of the half in this one's size and channels.

    Every fifth time it is noise.
    """
    size, mode = (problem.size, problem.size), "L" if problem.channels == 1 else "RGB"
    if rng.random() < 0.2:
        cells = int(rng.integers(2, problem.size + 1))
        grid = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        image = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)
    else:
        other = others[rng.integers(len(others))]
        image = Image.fromarray(
            other.draw(rng, int(rng.integers(len(other.classes))), size=other.size, test=False)
        )
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image.convert(mode))


def table(problems: tuple[Problem, ...]) -> str:
    """Return the problems' numbers as a Markdown table."""
    lines = []
    for p in problems:
        kind = "grey" if p.channels == 1 else "color"
        found = " (as found)" if p.labels_as_found else ""
        cells = [
            p.name,
            f"{p.size} {kind}",
            len(p.classes),
            f"{p.labels_per_class}{found}",
            p.unlabeled,
        ]
        lines.append([*cells, f"{p.foreign:.0%}", p.test, f"1:{p.imbalance:g}"])
    head = [
        "problem",
        "pixels",
        "classes",
        "labels a class",
        "unlabeled",
        "foreign",
        "test",
        "imbalance",
    ]
    return grid(head, lines, "llrrrrrl")


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write", nargs=2, metavar=("PROBLEM", "FOLDER"), help="write a problem's pictures"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.write:
        make(named(args.write[0]), args.seed, Path(args.write[1]))
    else:
        print(table(half("seen")))


if __name__ == "__main__":
    main()
