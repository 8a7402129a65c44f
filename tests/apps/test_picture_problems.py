"""The generated picture problems: the same pictures again, the promised counts, and halves that do not meet."""

from __future__ import annotations

import dataclasses
import doctest
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.pictures import problems
from benchmarks.pictures.problem import Problem
from benchmarks.pictures.problems import FOREIGN, PROBLEMS, Pictures, arrays, class_counts, half, make, smaller, table

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
PARTS = ("labeled", "unlabeled", "test")
# By number: whoever tunes reads test names, and those of the unseen half say what is in it.
every_problem = pytest.mark.parametrize(
    "problem", [pytest.param(p, id=f"{name}{i}") for name in ("seen", "unseen") for i, p in enumerate(half(name))]
)


def miniature(problem: Problem) -> Problem:
    few = dataclasses.replace(problem, labels_per_class=min(problem.labels_per_class, 3))
    return smaller(few, unlabeled=3 * len(problem.classes), test=2 * len(problem.classes))


def parts(pictures: Pictures) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {part: (getattr(pictures, part), getattr(pictures, f"{part}_labels")) for part in PARTS}


@every_problem
def test_pictures_of_the_promised_kind_and_never_twice(problem: Problem) -> None:
    small = miniature(problem)
    found = parts(arrays(small, seed=0))
    sizes = {"labeled": small.labels_per_class * len(small.classes), "unlabeled": small.unlabeled, "test": small.test}
    for part, (pictures, labels) in found.items():
        assert pictures.dtype == np.uint8
        assert pictures.shape == (sizes[part], problem.size, problem.size, problem.channels)
        assert labels.shape == (sizes[part],)
        assert pictures.std(axis=(1, 2, 3)).min() > 1  # none is blank
    assert all(set(found[part][1]) == set(range(len(small.classes))) for part in ("labeled", "test"))
    assert np.count_nonzero(found["unlabeled"][1] == FOREIGN) == round(small.foreign * small.unlabeled)
    everything = [picture.tobytes() for pictures, _ in found.values() for picture in pictures]
    assert len(set(everything)) == len(everything)


@every_problem
def test_a_seed_gives_the_same_pictures_and_another_seed_others(problem: Problem) -> None:
    small = smaller(dataclasses.replace(problem, labels_per_class=1), len(problem.classes) + 2, len(problem.classes))
    first, again, other = (parts(arrays(small, seed)) for seed in (0, 0, 1))
    for part in PARTS:
        for one, two in zip(first[part], again[part], strict=True):
            np.testing.assert_array_equal(one, two)
        pictures = {picture.tobytes() for picture in first[part][0]}
        assert pictures.isdisjoint(picture.tobytes() for picture in other[part][0])


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(problems).failed == 0
    assert doctest.testmod(problems).attempted > 0


def test_a_picture_does_not_depend_on_how_many_there_are() -> None:
    problem = half("seen")[0]
    few, more = (arrays(smaller(problem, count, 12), seed=4) for count in (24, 36))
    np.testing.assert_array_equal(few.labeled, more.labeled)
    np.testing.assert_array_equal(few.test, more.test)


@pytest.mark.parametrize("which", ["seen", "unseen"])
def test_imbalance_is_in_the_unlabeled_and_the_test_pictures(which: str) -> None:
    uneven = [problem for problem in half(which) if problem.imbalance > 1]
    assert any(p.labels_as_found for p in uneven)
    assert not all(p.labels_as_found for p in uneven)
    for problem in uneven:
        classes = len(problem.classes)
        for total in (problem.unlabeled, problem.test):
            counts = class_counts(classes, total, problem.imbalance)
            assert sum(counts) == total
            assert counts == sorted(counts, reverse=True)
            assert counts[0] / counts[-1] == pytest.approx(problem.imbalance, rel=0.25)
        small = smaller(problem, 8 * classes, 6 * classes)
        pictures = arrays(small, seed=0)
        for labels in (pictures.unlabeled_labels, pictures.test_labels):
            found = Counter(labels.tolist())
            assert [found[k] for k in range(classes)] == class_counts(classes, len(labels), problem.imbalance)
        labeled = Counter(pictures.labeled_labels.tolist())
        assert min(labeled.values()) >= 1
        assert (len(set(labeled.values())) > 1) == problem.labels_as_found


def test_the_order_of_the_unlabeled_pictures_does_not_give_their_classes_away() -> None:
    problem = half("seen")[-1]
    labels = arrays(smaller(problem, 60, 6), seed=0).unlabeled_labels
    assert not np.array_equal(labels, np.sort(labels))


def test_the_halves_are_alike_in_numbers_and_share_no_generator() -> None:
    seen, unseen = half("seen"), half("unseen")
    assert seen + unseen == PROBLEMS
    assert len(seen) == len(unseen) >= 8
    assert {p.draw for p in seen}.isdisjoint(p.draw for p in unseen)
    assert len({p.name for p in PROBLEMS}) == len({p.draw for p in PROBLEMS}) == len(PROBLEMS)
    for problems_of_half in (seen, unseen):
        assert {p.channels for p in problems_of_half} == {1, 3}
        assert sum(p.foreign > 0 for p in problems_of_half) == 3
        assert sum(p.imbalance > 1 for p in problems_of_half) == 3
        for values, low, high in (
            ([p.size for p in problems_of_half], 16, 96),
            ([len(p.classes) for p in problems_of_half], 3, 20),
            ([p.labels_per_class for p in problems_of_half], 1, 25),
            ([p.unlabeled for p in problems_of_half], 300, 2000),
            ([p.test for p in problems_of_half], 500, 1000),
        ):
            assert (min(values), max(values)) == (low, high)


def test_folders_hold_the_arrays_as_a_user_would_have_them(tmp_path: Path) -> None:
    for problem in (next(p for p in half("seen") if p.channels == c and p.foreign) for c in (1, 3)):
        small, folder = miniature(problem), tmp_path / problem.name
        make(small, seed=2, folder=folder)
        pictures = arrays(small, seed=2)
        assert sorted(path.name for path in folder.iterdir()) == sorted(PARTS)
        unlabeled = sorted((folder / "unlabeled").iterdir())
        assert [path.name for path in unlabeled] == [f"{i:05}.png" for i in range(small.unlabeled)]
        read = np.stack([np.asarray(Image.open(path)) for path in unlabeled])
        np.testing.assert_array_equal(
            read, pictures.unlabeled.squeeze(-1) if small.channels == 1 else pictures.unlabeled
        )
        for part, labels in (("labeled", pictures.labeled_labels), ("test", pictures.test_labels)):
            counts = {path.name: len(list(path.glob("*.png"))) for path in (folder / part).iterdir()}
            assert counts == {name: int((labels == i).sum()) for i, name in enumerate(small.classes)}
        with pytest.raises(SystemExit, match="is not empty"):
            make(small, seed=2, folder=folder)


def test_foreign_pictures_come_from_the_same_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the seen half would show what is in the unseen one."""
    drawn = set[str]()

    def noting(rng: np.random.Generator, others: tuple[Problem, ...], problem: Problem) -> np.ndarray:
        drawn.update(other.half for other in others)
        assert problem.name not in {other.name for other in others}
        return np.zeros((problem.size, problem.size, problem.channels), dtype=np.uint8)

    monkeypatch.setattr(problems, "_foreign", noting)
    arrays(miniature(next(p for p in half("seen") if p.foreign)), seed=0)
    assert drawn == {"seen"}


def test_the_command_shows_the_seen_half_and_the_readme_has_its_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pictures.problems"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == table(half("seen"))
    assert done.stdout.strip() in (ROOT / "benchmarks" / "pictures" / "README.md").read_text()
    assert not any(problem.name in done.stdout for problem in half("unseen"))
