"""The tables of the documentation are those that the raw files give."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
TABLES = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.md")]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import digits_tables

    yield digits_tables
    for name in (
        "digits_tables",
        "digits_study",
        "label_noise",
        "label_noise_tables",
        "noisy_student",
        "noisy_student_tables",
        "student_or_mpl",
        "suspects",
        "when",
        "when_tables",
        "figures",
        "machine",
    ):
        sys.modules.pop(name, None)


def shown(name: str) -> str:
    """What stands between the marks of a name, on whichever page."""
    (page,) = [text for path in TABLES if f"<!-- {name}:begin -->" in (text := path.read_text())]
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


def test_the_study_of_a_text_was_run_as_it_says(tables: object) -> None:
    import text_feedback as study

    rows = study.read(study.RAW)
    assert shown("text") == study.table(rows)
    assert len({(row["encoder"], row["text"]) for row in rows}) == 1
    assert len({len(grid) for grid in study.GRIDS.values()}) == 1
    for row in rows:
        assert ("student_test" in row) == (row["part"] == "final")
        assert row["seed"] in study.SEEDS[row["part"]]
    assert len(set().union(*study.SEEDS.values())) == sum(map(len, study.SEEDS.values()))
    cosines = [row["looks"]["as it is"][at][2] for row in rows if row["looks"] for at in (0, 1)]
    assert min(cosines) < 0 < 0.95 < max(cosines)
    assert all(row["looks"]["other labels in the outer batch"][0][2] > 0.9 for row in rows if row["looks"])
    for module in ("text_feedback", "text_corpus"):
        sys.modules.pop(module)


def test_the_pages_show_the_tables_of_the_classifiers_and_of_a_fresh_adam(tables: object) -> None:
    import json

    import fresh_adam
    import tables as classifiers

    assert shown("tables") == classifiers.table(classifiers.read(classifiers.RAW))
    assert shown("fresh_adam") == fresh_adam.table(json.loads(fresh_adam.RESULT.read_text()))
    for module in ("fresh_adam", "tables"):
        sys.modules.pop(module)


def test_the_page_shows_the_table_of_throughput(tables: object) -> None:
    import json

    import throughput

    assert shown("throughput") == throughput.table(json.loads((ROOT / throughput.RESULT).read_text()))
    for name in ("throughput", "modes"):
        sys.modules.pop(name)


def test_the_page_on_wrong_labels_shows_the_tables_of_the_raw_rows(tables: object) -> None:
    import label_noise
    import label_noise_tables
    import suspects

    assert shown("label_noise") == label_noise_tables.block(label_noise.RAW)
    assert shown("suspects") == suspects.table(suspects.read(suspects.RAW))


def test_the_study_of_label_noise_was_run_as_it_says(tables: object) -> None:
    import label_noise

    rows, seeds = label_noise.read(), set(label_noise.FULL.seeds)
    final: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        method, condition = row["method"], row["condition"]
        assert ("test_accuracy" in row) == row["final"]
        assert (row["seed"] in seeds) == row["final"]
        if row["final"]:
            assert row["config"] == label_noise.chosen(rows, method, condition)
            final.setdefault((method, condition), set()).add(row["seed"])
    assert final == {(name, condition): seeds for name in label_noise.ENTRIES for condition in label_noise.CONDITIONS}
    for name, entry in label_noise.ENTRIES.items():
        tuning = [row for row in rows if row["method"] == name and not row["final"]]
        assert len(tuning) == len(entry.grid) * 2 * 5
        assert len(entry.grid) in (0, 4)


def test_the_page_on_modes_shows_the_table_of_a_step(tables: object) -> None:
    import json

    import step

    assert shown("step") == step.table(json.loads(step.RESULT.read_text()))
    sys.modules.pop("step")


def test_the_page_on_reduced_mpl_shows_the_table_of_the_raw_file(tables: object) -> None:
    import json

    import reduced

    assert shown("reduced") == reduced.table(json.loads(reduced.RESULT.read_text()))
    sys.modules.pop("reduced")


def test_the_pages_on_peers_and_endurance_show_the_tables_of_the_raw_files(tables: object) -> None:
    import json

    import endurance
    import peers

    assert shown("peers") == peers.table(json.loads(peers.RESULT.read_text()))
    assert shown("endurance") == endurance.table(json.loads(endurance.RESULT.read_text()))
    for name in ("endurance", "peers"):
        sys.modules.pop(name)


def test_the_page_on_several_processes_shows_the_tables_of_the_raw_file(tables: object) -> None:
    import json

    import scale

    assert shown("scale") == scale.table(json.loads(scale.RESULT.read_text()))
    sys.modules.pop("scale")


def rows_of(text: str) -> list[dict[str, str]]:
    """The rows of all tables of a text, each with its cells by their columns."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        found += [dict(zip(head, cells, strict=True)) for cells in body]
    return found


def test_the_rows_that_a_page_shows_are_those_of_the_whole_table() -> None:
    """A table below ``<!-- rows of NAME -->`` has some rows and columns of ``benchmarks/results/NAME.md``."""
    for page in (ROOT / "docs").glob("*.md"):
        for name, table in re.findall(r"<!-- rows of (\w+) -->\n((?:\|.*\n)+)", page.read_text()):
            whole = rows_of((ROOT / "benchmarks" / "results" / f"{name}.md").read_text())
            for row in rows_of(table):
                assert any(row.items() <= one.items() for one in whole), f"{page.name}: {row}"


def test_every_table_that_is_marked_is_compared_with_its_raw_file() -> None:
    others = [page for page in TABLES if not page.name.startswith("pictures")]  # tests/apps/test_picture_runs.py
    pages = "".join(page.read_text() for page in others)
    marked = set(re.findall(r"<!-- (\w+):begin -->", pages))
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert all(f'shown("{name}")' in tests or f"<!-- {name}:begin -->" in tests for name in marked)


def test_the_page_on_when_feedback_helps_shows_the_tables_of_the_raw_rows(tables: object) -> None:
    import when
    import when_tables

    assert shown("when") == when_tables.block(when.read())


def test_the_study_of_what_feedback_is_worth_was_run_as_it_says(tables: object) -> None:
    import when
    import when_tables

    rows = when.read()
    assert shown("feedback-worth") == when_tables.worth_block(rows)
    found = when_tables.places(when_tables.collected(rows))
    study = [*found.values()]
    assert [*found] == ["2 labels a class, equal frequencies", *([*found][1:])]
    assert len(study) == len(when.PLACES) == 4
    for arms in study:
        picked = {name: when.Rule(**arms[name].row["rule"]) for name in ("push", "fixmatch", "mpl")}
        assert (picked["push"].size, picked["fixmatch"].threshold, picked["mpl"].size) == (0.1, 0.8, 1.0)


def test_the_study_of_when_feedback_helps_was_run_as_it_says(tables: object) -> None:
    import when

    rows = when.read()
    final = {when.arm_of(row): row for row in rows if row["final"]}
    assert set(final) == set(when.ARMS)
    assert len(final) == sum(row["final"] for row in rows)
    for arm, row in final.items():
        assert when.Rule(**row["rule"]) == when.rule_of(arm, rows)
    for name, (arm, rules) in when.GRIDS.items():
        tuning = [row for row in rows if row["tuned"] == name and not row["final"]]
        assert {when.arm_of(row) for row in tuning} == {arm}
        assert sorted(str(when.Rule(**row["rule"])) for row in tuning) == sorted(map(str, rules))
    for row in rows:
        seeds = when.Size().seeds(when.arm_of(row), row["final"])
        assert tuple(row["seeds"]) == seeds
        assert row["steps_run"] == row["steps"]
        assert len(row["student"]) == len(row["finetuned"]) == len(seeds)
        assert ("teacher" in row) == row["final"]


def test_the_page_on_the_studies_of_noisy_student_shows_the_tables_of_the_raw_rows(tables: object) -> None:
    import noisy_student
    import noisy_student_tables

    assert shown("noisy-student-studies") == noisy_student_tables.block(noisy_student.read())


def test_the_studies_of_noisy_student_were_run_as_they_say(tables: object) -> None:
    import noisy_student

    rows = noisy_student.read()
    final = [row for row in rows if row["final"]]
    assert [row["arm"] for row in final] == [dataclasses.asdict(arm) for arm in noisy_student.ARMS]
    grid = {(row["lr"], row["dropout"]) for row in rows if not row["final"]}
    assert grid == {(lr, dropout) for lr in noisy_student.RATES for dropout in noisy_student.DROPOUTS}
    for row in rows:
        seeds = noisy_student.FULL.seeds if row["final"] else noisy_student.FULL.tuning_seeds
        assert tuple(row["seeds"]) == seeds
        if row["final"]:
            assert (row["lr"], row["dropout"]) == noisy_student.tuned(rows)
            assert len(row["test"]) == len(seeds) >= 10


def test_the_papers_figures_beside_the_studies_of_noisy_student(tables: object) -> None:
    """Each has an arm here, and each arm but those that are marked has a figure."""
    import noisy_student
    import noisy_student_tables

    for study, printed in noisy_student_tables.PAPER.items():
        arms = noisy_student.STUDIES[study]
        assert printed.keys() <= arms.keys()
        without = {name for name in arms if name not in printed}
        # Curves that are lost, supervised networks that a table leaves out, and ratios that it does not have.
        expected = {"3": {*arms}, "4": {f"supervised {width}" for width in (16, 32, 64, 128)}}
        expected["7"] = {"width 16: 7:1", "width 128: 7:1"}
        assert without == expected.get(study, set())
        for name in arms:
            other = noisy_student_tables.reference(study, name)
            assert other is None or other in arms


def test_noisy_student_beside_mpl_is_what_the_raw_rows_say(tables: object) -> None:
    import student_or_mpl

    rows, about = student_or_mpl.read(), json.loads(student_or_mpl.RAW.read_text().splitlines()[0])
    assert shown("student-or-mpl") == student_or_mpl.block(rows, about)
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for method in student_or_mpl.COMPARED for seed in student_or_mpl.SEEDS
    ]
    for seed in student_or_mpl.SEEDS:  # the same labels, at the same cost
        taught = [row for row in rows if row["seed"] == seed and "first_teacher_steps" in row]
        assert len(taught) == 6
        assert len({row["store_sha256"] for row in taught}) == 1
    assert all(row["operations"] == pytest.approx(rows[0]["operations"], rel=0.01) for row in rows)
