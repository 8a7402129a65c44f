"""The runs on the generated problems, in miniature, and the table and the figure that are made from their rows."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pictures import feedback, run, tables
from benchmarks.pictures.problems import class_counts, half
from metapl.apps.machine.environment import environment
from metapl.metrics import chance_level

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pictures.md"
TINY = ("--problems", "fruits", "--methods", "supervised", "--minutes", "0.1", "--jobs", "1")
SETTINGS = ("--set", "steps=3", "precision=float32", "finetune_steps=1", "image_size=8", "label_smoothing=0.2")


def command(module: str, *arguments: str | Path, code: int = 0) -> str:
    """What ``python -m benchmarks.pictures.MODULE`` prints."""
    printed, said, found = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(said):
        patch.setattr(sys, "argv", [module, *map(str, arguments)])
        try:
            {"run": run, "tables": tables}[module].main()
        except SystemExit as ended:  # with a message, which Python prints
            found = 1
            said.write(str(ended.code))
    assert found == code, said.getvalue()
    return printed.getvalue() if code == 0 else said.getvalue()


@pytest.mark.long
def test_a_run_leaves_a_row_and_is_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    printed = command("run", *TINY, *SETTINGS, "--out", file)
    (row,) = run.read(file)
    assert (row["half"], row["problem"], row["method"], row["seed"]) == ("seen", "fruits", "supervised", 0)
    assert (row["steps"], row["image_size"], row["minutes"]) == (3, 8, 0.1)
    settings = {"steps": 3, "precision": "float32", "finetune_steps": 1, "image_size": 8, "label_smoothing": 0.2}
    assert row["settings"] == settings
    assert row["delivered"] in ("student", "finetuned")
    assert row["test_accuracy"] == row[f"{row['delivered']}_test_accuracy"]
    assert 0 <= row["test_accuracy"] <= 1
    assert row["made_with"] == {**environment(), "threads": row["made_with"]["threads"]}
    assert printed.startswith("[1/1] fruits supervised 3 steps: ")
    assert f"student_{100 * row['student_test_accuracy']:.1f}" in printed
    before = file.read_text()
    assert command("run", *TINY, *SETTINGS, "--out", file) == ""
    assert file.read_text() == before


def given(**fields: Any) -> Any:
    import argparse

    plain = {"half": "seen", "problems": [], "methods": ["uda"], "seeds": [0], "minutes": 1.5, "set": []}
    return argparse.Namespace(**plain | fields)


def test_what_is_missing_is_what_no_row_has() -> None:
    names = [problem.name for problem in half("seen")]
    assert list(run.missing(given(seeds=[0, 1]), [])) == [(name, "uda", seed) for seed in (0, 1) for name in names]
    there = [{"problem": names[0], "method": "uda", "seed": 0, "minutes": 1.5, "settings": {"a": 1, "b": (2, 3)}}]
    there = [json.loads(json.dumps(row)) for row in there]
    one = given(problems=names[:1], set=[("b", (2, 3)), ("a", 1)])
    assert list(run.missing(one, there)) == []
    for other in ({"minutes": 2.0}, {"set": []}, {"seeds": [1]}, {"methods": ["mpl"]}):
        assert len(list(run.missing(given(**vars(one) | other), there))) == 1


# -------------------------------------------------------------------------------------------------- table and figure


def rows() -> list[dict[str, Any]]:
    """Two seeds of three methods on all problems of the seen half."""
    made = []
    for number, problem in enumerate(half("seen")):
        for seed in (0, 1):
            for method, more in (("supervised", 0.0), ("uda", 0.02 * number), ("fixmatch", 0.04 - 0.01 * number)):
                accuracy = 0.5 + 0.03 * number + more + 0.01 * seed
                row = {"problem": problem.name, "method": method, "test_accuracy": accuracy, "seconds": 60 + seed}
                made.append(row | {"minutes": 1.5, "settings": {}})
    return made


def in_cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_table_is_of_the_means_over_seeds() -> None:
    names = [problem.name for problem in half("seen")]
    cells = in_cells(tables.table(rows(), "seen"))
    assert cells[0] == ["method", *names, "mean", "against supervised: mean", "worst", "seconds", "seeds"]
    assert len({len(row) for row in cells}) == 1
    by_title = {row[0]: row[1:] for row in cells[2:]}
    assert list(by_title) == [tables.TITLES[m] for m in ("uda", "fixmatch", "supervised")] + ["chance"]
    supervised = [50.5 + 3 * number for number in range(9)]
    assert by_title["supervised, the same views"] == [*(f"{v:.1f}" for v in supervised), "62.5", "–", "–", "60", "2"]
    assert by_title["UDA (the default)"][-5:] == ["70.5", "+8.0", "+0.0", "60", "2"]
    assert by_title["FixMatch-like"][-5:] == ["62.5", "+0.0", "-4.0", "60", "2"]
    chance = dict(zip(names, by_title["chance"], strict=False))
    for problem in half("seen"):
        counts = class_counts(len(problem.classes), problem.test, problem.imbalance)
        assert chance[problem.name] == f"{100 * chance_level(counts):.1f}"
    # Where the test set is imbalanced, naming its largest class is a better guess than any.
    uneven = [one for one in half("seen") if one.imbalance > 1]
    assert all(float(chance[one.name]) > 150 / len(one.classes) for one in uneven)
    assert len(uneven) > 0


def test_a_problem_that_one_method_lacks_is_left_out() -> None:
    missing = half("seen")[2].name
    few = [row for row in rows() if (row["method"], row["problem"]) != ("uda", missing)]
    assert missing not in tables.table(few, "seen")


def test_rows_of_other_settings_or_minutes_are_not_averaged() -> None:
    """Each has a line of its own, against supervised in the same minutes, and says how many seeds it has."""
    plain, better = rows(), [row for row in rows() if row["method"] == "uda"]
    for row in better:
        row["test_accuracy"] += 0.1
    settings = {"uda_threshold": 0.9, "uda_align": 0}
    longer = [row | {"minutes": 5.0} for row in better if row["seconds"] == 60]  # one seed, but for one problem
    together = [*plain, *(row | {"settings": settings} for row in better), *longer, longer[0]]
    cells = {row[0]: row[1:] for row in in_cells(tables.table(together, "seen"))[2:]}
    alone = {row[0]: row[1:] for row in in_cells(tables.table(plain, "seen"))[2:]}
    for name, row in alone.items():
        assert cells.get(f"{name}, 1.5 min", cells.get(name)) == row
    changed = cells["UDA (the default), 1.5 min, uda_align 0, uda_threshold 0.9"]
    assert changed[-5:] == ["80.5", "+18.0", "+10.0", "60", "2"]
    assert cells["UDA (the default), 5 min"][-4:] == ["–", "–", "60", "1-2"]
    assert len(cells) == len(alone) + 2


def test_a_table_of_no_problem_says_what_to_run() -> None:
    with pytest.raises(SystemExit, match=r"seen half was run with every one of: UDA \(the default\); FixMatch"):
        tables.table([row for row in rows() if (row["problem"] == "letters") == (row["method"] == "uda")], "seen")


def test_the_figure_and_the_page_are_made_from_the_rows(tmp_path: Path) -> None:
    raw, page, figure = tmp_path / "rows.jsonl", tmp_path / "page.md", tmp_path / "figure.png"
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    page.write_text("before\n<!-- seen:begin -->\nold\n<!-- seen:end -->\nafter\n")
    for _ in range(2):
        printed = command("tables", "--rows", raw, "--write", page, "--figure", figure)
        assert printed.strip() == tables.table(rows(), "seen")
        text = page.read_text()
        assert text == f"before\n<!-- seen:begin -->\n{printed}<!-- seen:end -->\nafter\n"
    assert figure.read_bytes().startswith(b"\x89PNG")
    page.write_text("a page without marks\n")
    assert "<!-- seen:begin -->" in command("tables", "--rows", raw, "--write", page, code=1)
    assert page.read_text() == "a page without marks\n"


def test_the_page_has_the_tables_of_the_committed_rows() -> None:
    shown = dict(re.findall(r"<!-- (\w+):begin -->\n(.*?)<!-- \1:end -->", PAGE.read_text(), re.DOTALL))
    assert "unseen" in shown
    for name, text in shown.items():
        raw = run.RESULTS / f"pictures_{name}.jsonl"
        expected = f"{tables.table(run.read(raw), name)}\n" if raw.exists() else ""
        assert text == expected, f"python -m benchmarks.pictures.tables --half {name} --write docs/pictures.md"
    if shown["unseen"]:
        assert PAGE.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_the_tables_of_the_study_of_feedback() -> None:
    rows = run.read(feedback.RAW)
    page = run.RESULTS / "pictures_feedback.md"
    shown = page.read_text().split("<!-- picture-feedback:begin -->\n")[1].split("\n<!-- picture-feedback:end -->")[0]
    assert shown == feedback.block(rows), "python -m benchmarks.pictures.feedback --write " + str(page)
    runs = [row for row in rows if "problem" in row]
    costs = feedback.costs_in(rows)
    for row in runs:
        asked = row["problem"], row["method"], row["configuration"]
        assert row["steps"] == feedback.steps_of(costs, *asked, row["minutes"])
    tuning = feedback.runs_in(runs, (feedback.TUNING_SEED,))
    assert len(tuning) == len(feedback.PROBLEMS) * sum(map(len, feedback.CONFIGURATIONS.values()))
