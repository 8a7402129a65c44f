"""The README's tables are those that the raw files give."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import digits_tables

    yield digits_tables
    for name in ("digits_tables", "digits_study", "figures", "machine"):
        sys.modules.pop(name, None)


def shown(name: str) -> str:
    """What stands between the README's marks of a name."""
    page = (ROOT / "README.md").read_text()
    return page.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip()


def test_readme_shows_the_table_of_the_raw_rows(tables: object) -> None:
    import digits_study

    rows = digits_study.read()
    assert shown("digits") == f"{tables.table(rows)}\n\n{tables.note(rows)}"


def test_every_method_was_tuned_alike_and_the_test_set_opened_for_final_runs_alone(tables: object) -> None:
    import digits_study

    rows = digits_study.read()
    assert all(("test_accuracy" in row) == row["final"] for row in rows)
    for name, entry in digits_study.ENTRIES.items():
        tuning = [row for row in rows if row["method"] == name and not row["final"]]
        assert len(tuning) == (60 if entry.grid else 0)
        assert not {row["seed"] for row in tuning} & set(digits_study.SEEDS)
        for labels in (2, 4) if name in digits_study.AT_FOUR else (2,):
            final = [r for r in rows if r["method"] == name and r["final"] and r["labels_per_class"] == labels]
            assert sorted(row["seed"] for row in final) == list(digits_study.SEEDS)
            assert len({str(row["config"]) for row in final}) == 1


def test_readme_shows_the_table_of_feedback_sizes(tables: object) -> None:
    import json

    import feedback_size

    assert shown("size") == feedback_size.table(json.loads(feedback_size.RAW.read_text())["rows"])
    sys.modules.pop("feedback_size")


def test_readme_shows_the_table_of_pictures(tables: object) -> None:
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
    """The README without its line breaks."""
    return " ".join((ROOT / "README.md").read_text().split())


def test_the_differences_between_pictures_that_the_readme_speaks_of_are_those_of_the_rows(tables: object) -> None:
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


def test_readme_shows_the_table_of_throughput(tables: object) -> None:
    import json

    import throughput

    assert shown("throughput") == throughput.table(json.loads((ROOT / throughput.RESULT).read_text()))
    for name in ("throughput", "modes"):
        sys.modules.pop(name)


def test_the_differences_that_the_readme_speaks_of_are_those_of_the_rows(tables: object) -> None:
    import digits_study

    found = tables.pairs(digits_study.read())
    for said in (
        "2 labels, test_accuracy: mpl - none = +2.6 points, p = 0.0012",
        "4 labels, test_accuracy: mpl - none = +1.6 points, p = 0.00052",
        "2 labels, test_accuracy: mpl - random_sign = +3.9 points, p = 1.7e-05",
        "2 labels, test_accuracy: mpl - difference = -0.7 points",
        "4 labels, finetuned_test_accuracy: mpl - pseudo_labels = -1.4 points, p = 0.0066",
    ):
        assert said in found
