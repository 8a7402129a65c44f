"""The generated picture problems, the runs on them, and the tables made from their rows."""

import contextlib
import dataclasses
import doctest
import io
import itertools
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.harness import read
from benchmarks.pictures import problems, run, tables
from benchmarks.pictures.drawing import Problem
from benchmarks.pictures.problems import (
    FOREIGN,
    PROBLEMS,
    Pictures,
    arrays,
    class_counts,
    half,
    make,
)
from metapl.metrics import chance_level

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pictures.md"
PARTS = ("labeled", "unlabeled", "test")
TINY = ("--problems", "arrows", "--methods", "supervised", "--minutes", "0.1", "--jobs", "1")
SETTINGS = (
    "--set",
    "steps=3",
    "precision=float32",
    "finetune_steps=1",
    "image_size=8",
    "label_smoothing=0.2",
)


def command(module: ModuleType, *words: str | Path) -> str:
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        patch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        module.main()
    return printed.getvalue()


# By number: whoever tunes reads test names, and those of the unseen half say what is in it.
@pytest.mark.parametrize(
    "problem", [pytest.param(p, id=f"{p.half}{i}") for i, p in enumerate(PROBLEMS)]
)
def test_pictures_are_of_the_promised_kind_never_twice_and_a_function_of_the_seed(
    problem: Problem,
) -> None:
    def parts(pictures: Pictures) -> dict[str, tuple[Any, Any]]:
        return {
            part: (getattr(pictures, part), getattr(pictures, f"{part}_labels")) for part in PARTS
        }

    classes, few = len(problem.classes), min(problem.labels_per_class, 3)
    small = dataclasses.replace(
        problem, labels_per_class=few, unlabeled=3 * classes, test=2 * classes
    )
    found, again, other = (parts(arrays(small, seed)) for seed in (0, 0, 1))
    for part, count in zip(PARTS, (few * classes, 3 * classes, 2 * classes), strict=True):
        pictures, labels = found[part]
        assert pictures.shape == (count, problem.size, problem.size, problem.channels)
        # None is blank.
        assert (pictures.dtype, pictures.std(axis=(1, 2, 3)).min() > 1) == (
            np.uint8,
            True,
        )
        for one, two in zip(found[part], again[part], strict=True):
            np.testing.assert_array_equal(one, two)
        if part != "labeled":
            own = Counter(labels[labels != FOREIGN].tolist())
            counts = class_counts(classes, sum(own.values()), problem.imbalance)
            assert [own[k] for k in range(classes)] == counts
    foreign = int((found["unlabeled"][1] == FOREIGN).sum())
    assert foreign == round(problem.foreign * small.unlabeled)
    everything = [
        picture.tobytes()
        for pictures, _ in (*found.values(), *other.values())
        for picture in pictures
    ]
    assert len(set(everything)) == len(everything)
    # A picture depends on its number, and not on how many there are.
    more = arrays(dataclasses.replace(small, test=2 * classes, unlabeled=4 * classes), 0)
    np.testing.assert_array_equal(more.test, found["test"][0])


def test_the_halves_share_no_generator_the_command_shows_one_and_foreign_ones_are_of_the_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {p.draw for p in half("seen")}.isdisjoint(p.draw for p in half("unseen"))
    assert len({p.name for p in PROBLEMS}) == len({p.draw for p in PROBLEMS}) == len(PROBLEMS)
    assert doctest.testmod(problems).failed == 0
    shown, drawn = command(problems).strip(), set[str]()
    assert shown in (ROOT / "benchmarks" / "pictures" / "README.md").read_text()
    assert not any(problem.name in shown for problem in half("unseen"))

    def noting(
        rng: np.random.Generator, others: tuple[Problem, ...], problem: Problem
    ) -> np.ndarray:
        drawn.update(other.half for other in others)
        assert problem.name not in {other.name for other in others}
        return np.zeros((problem.size, problem.size, problem.channels), dtype=np.uint8)

    monkeypatch.setattr(problems, "_foreign", noting)
    arrays(
        dataclasses.replace(next(p for p in half("seen") if p.foreign), unlabeled=30, test=20),
        seed=0,
    )
    assert drawn == {"seen"}


def test_folders_hold_the_arrays_as_a_user_would_have_them(tmp_path: Path) -> None:
    for name in ("digits", "arrows"):
        problem = dataclasses.replace(problems.named(name), unlabeled=30, test=20)
        folder, pictures = tmp_path / problem.name, arrays(problem, seed=2)
        make(problem, seed=2, folder=folder)
        read = np.stack(
            [np.asarray(Image.open(path)) for path in sorted((folder / "unlabeled").iterdir())]
        )
        np.testing.assert_array_equal(read.reshape(pictures.unlabeled.shape), pictures.unlabeled)
        for part, labels in (("labeled", pictures.labeled_labels), ("test", pictures.test_labels)):
            counts = {
                path.name: len(list(path.glob("*.png"))) for path in (folder / part).iterdir()
            }
            assert counts == {
                name: int((labels == i).sum()) for i, name in enumerate(problem.classes)
            }
        with pytest.raises(SystemExit, match="empty"):
            make(problem, seed=2, folder=folder)


@pytest.mark.long
def test_a_run_leaves_a_row_and_is_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    command(run, *TINY, *SETTINGS, "--out", file)
    (row,) = read(file)
    assert [row[key] for key in ("half", "problem", "method", "steps", "image_size")] == [
        "seen",
        *TINY[1:4:2],
        3,
        8,
    ]
    assert row["test_accuracy"] == row[f"{row['delivered']}_test_accuracy"]
    before = file.read_text()
    command(run, *TINY, *SETTINGS, "--out", file)
    assert file.read_text() == before


def test_the_table_is_of_the_means_over_seeds(tmp_path: Path) -> None:
    rows, names = list[dict[str, Any]](), [problem.name for problem in half("unseen")]
    for (number, name), seed in itertools.product(enumerate(names), (0, 1)):
        for method, more in (("supervised", 0.0), ("uda", 0.02 * number)):
            reached = 0.5 + 0.03 * number + more + 0.01 * seed
            row = {
                "problem": name,
                "method": method,
                "test_accuracy": reached,
                "seconds": 60 + seed,
                "minutes": 1.5,
            }
            rows.append(row)
    shown = tables.table(rows)
    by = {
        row[0]: row[1:]
        for row in ([c.strip() for c in line.strip("|").split("|")] for line in shown.splitlines())
    }
    supervised = [*(f"{50.5 + 3 * number:.1f}" for number in range(9)), "62.5", "–", "–", "60", "2"]
    assert by["supervised, the same views, 1.5 min"] == supervised
    assert by["UDA, half aligned, 1.5 min"][-5:] == [
        "70.5",
        "+8.0",
        "+0.0",
        "60",
        "2",
    ]
    for problem, chance in zip(half("unseen"), by["chance"], strict=False):
        counts = class_counts(len(problem.classes), problem.test, problem.imbalance)
        assert chance == f"{100 * chance_level(counts):.1f}"
    page = tmp_path / "page.md"
    marked = "before\n<!-- {0}:begin -->\n{1}\n<!-- {0}:end -->\nafter\n"
    page.write_text("".join(marked.format(name, "old") for name in ("unseen", "backbone", "race")))
    command(tables, "--write", page)
    of_backbone = tables.from_backbone(
        [row for row in read(tables.BACKBONE) if row["half"] == "unseen"]
    )
    made = {
        "unseen": tables.table(read(tables.RAW)),
        "backbone": of_backbone,
        "race": tables.race(read(tables.RACE)),
    }
    assert page.read_text() == "".join(marked.format(*each) for each in made.items())
    assert all(marked.format(*each)[7:-7] in PAGE.read_text() for each in made.items())
    assert (tmp_path / "pictures.png").read_bytes().startswith(b"\x89PNG")
