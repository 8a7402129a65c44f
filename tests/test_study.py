"""The tables of the documentation are those that the raw files give."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
STUDENT, FINETUNED = "test_accuracy", "finetuned_test_accuracy"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import digits_tables

    yield digits_tables
    for name in ("digits_tables", "digits_study", "figures", "machine"):
        sys.modules.pop(name, None)


def shown(name: str) -> str:
    """What stands between the marks of a name."""
    page = PAGE.read_text()
    return page.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip()


def test_the_page_shows_the_table_of_the_raw_rows(tables: object) -> None:
    import digits_study

    assert shown("digits") == tables.block(digits_study.read())


def test_every_method_was_tuned_alike_and_the_test_set_opened_for_final_runs_alone(tables: object) -> None:
    import digits_study

    rows = digits_study.read()
    best = digits_study.chosen(rows)
    for row in rows:
        assert ("test_accuracy" in row) == row["final"]
        assert not row["final"] or row["config"] == best[row["method"]]
    for name, entry in digits_study.ENTRIES.items():
        tuning = [row for row in rows if row["method"] == name and not row["final"]]
        assert len(tuning) == (60 if entry.grid else 0)
        assert not {row["seed"] for row in tuning} & set(digits_study.FULL.seeds)
        for labels in (2, 4) if name in digits_study.AT_FOUR else (2,):
            final = [r for r in rows if r["method"] == name and r["final"] and r["labels_per_class"] == labels]
            assert sorted(row["seed"] for row in final) == list(digits_study.FULL.seeds)


def test_the_page_shows_the_table_of_feedback_sizes(tables: object) -> None:
    import json

    import feedback_size

    assert shown("size") == feedback_size.table(json.loads(feedback_size.RAW.read_text())["rows"])
    sys.modules.pop("feedback_size")


def test_the_page_shows_the_table_of_pictures(tables: object) -> None:
    import pictures_study

    rows = pictures_study.read()
    assert shown("pictures") == pictures_study.table(rows)
    tuning = [row for row in rows if row["phase"] == "tuning"]
    assert not {row["seed"] for row in tuning} & set(pictures_study.SEEDS)
    final = [row for row in rows if row["phase"] == "final"]
    assert len(final) == len(pictures_study.METHODS) * len(pictures_study.SEEDS)
    assert {row["size"] for row in final} == {pictures_study.chosen(rows)}
    sys.modules.pop("pictures_study")


def prose() -> str:
    """The page without its line breaks."""
    return " ".join(PAGE.read_text().split())


def test_the_differences_between_pictures_that_the_page_speaks_of_are_those_of_the_rows(tables: object) -> None:
    import pictures_study as study
    from figures import difference

    rows = study.read()
    students = {method: study.column(rows, method, "test_accuracy") for method in study.METHODS}
    control = study.column(rows, "none", "finetuned_test_accuracy")

    def of(first: list[float], second: list[float]) -> str:
        points, p = difference(first, second)
        return f"{points.lstrip('+-')} points (p = {p})"

    mpl = students["mpl"]
    assert f"Over the control's better read-out MPL gains {of(mpl, control)}, student against" in prose()
    assert f"student against student {of(mpl, students['none'])}." in prose()
    assert f"{of(mpl, students['class_means'])} above its class means" in prose()
    assert f"{of(mpl, students['permuted'])} above permuted feedback" in prose()
    assert f"{of(students['uda'], mpl)} ahead of MPL" in prose()
    assert f"{of(students['uda'], control)} ahead of the loop without feedback" in prose()
    assert all(line in study.pairs(rows) for line in ("mpl - uda: -", "mpl - none: +"))
    sys.modules.pop("pictures_study")


def test_the_page_shows_the_table_of_throughput(tables: object) -> None:
    import json

    import throughput

    assert shown("throughput") == throughput.table(json.loads((ROOT / throughput.RESULT).read_text()))
    for name in ("throughput", "modes"):
        sys.modules.pop(name)


def test_the_differences_on_digits_that_the_page_speaks_of_are_those_of_the_rows(tables: object) -> None:
    import digits_study
    from figures import difference

    rows = digits_study.read()

    def of(labels: int, first: str, second: str, read_out: str = STUDENT, other: str | None = None) -> str:
        """By how much the first is better, in the words of the page."""
        mine = tables.column(rows, first, labels, read_out)
        points, p = difference(mine, tables.column(rows, second, labels, other or read_out))
        assert points.startswith("+")
        return f"{points[1:]} points (p = {p})"

    assert {tables.better_control(rows, labels)[0] for labels in (2, 4)} == {FINETUNED}
    control = [of(labels, "mpl", "none", other=FINETUNED) for labels in (2, 4)]
    assert f"student gains {control[0]} at 2 labels a class and {control[1]} at 4" in prose()
    students = [of(labels, "mpl", "none") for labels in (2, 4)]
    assert f"before finetuning, it gains {students[0]} and {students[1]}:" in prose()
    assert f"{of(2, 'difference', 'mpl')} between `forward` and `difference`" in prose()
    assert f"with random signs it does {of(2, 'mpl', 'random_sign')} worse" in prose()
    assert f"{of(4, 'pseudo_labels', 'mpl', FINETUNED)} better at 4" in prose()


def test_every_table_that_is_marked_is_compared_with_its_raw_file() -> None:
    others = [
        page for page in (ROOT / "docs").rglob("*.md") if page.name != "pictures.md"
    ]  # tests/test_picture_runs.py
    pages = "".join(page.read_text() for page in others)
    marked = set(re.findall(r"<!-- (\w+):begin -->", pages))
    tests = "".join((ROOT / "tests" / name).read_text() for name in ("test_study.py", "test_cost.py"))
    assert all(f'shown("{name}")' in tests or f"<!-- {name}:begin -->" in tests for name in marked)
