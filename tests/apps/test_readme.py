"""The README's code runs as it stands there, and its figures are those of the documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest

from benchmarks.pictures.run import RESULTS, read

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_examples_run_and_print_what_stands_beside_them(tmp_path: Path) -> None:
    code = pages.code(ROOT / "README.md")
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    pages.check_printed(code, done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_the_control_of_the_first_example_reaches_what_stands_below_it() -> None:
    first, *_ = pages.FENCED.findall(README)
    (promise,) = re.findall(r'With `mode="none"`.*\n.*prints (0\.\d+)', README)
    assert first.count('mode="forward"') == 1
    control = first.replace('mode="forward"', 'mode="none"').replace("# 0.811", f"# {promise}")
    command = [sys.executable, "-W", "error", "-c", control]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    pages.check_printed(control, done.stdout)


def test_the_first_example_is_short() -> None:
    first, *_ = pages.FENCED.findall(README)
    assert len([line for line in first.splitlines() if line.strip()]) <= 15


def rows(text: str) -> dict[str, dict[str, str]]:
    """The rows of the first table of a text, by their first cell, each with its cells by their columns."""
    lines = re.search(r"(^\|.*\n)+", text, re.MULTILINE)
    assert lines is not None
    head, _, *body = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in lines[0].splitlines())
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in body}


def test_the_rows_of_the_modes_are_those_of_the_whole_table() -> None:
    whole = rows((ROOT / "docs" / "modes.md").read_text().partition("<!-- modes:begin -->")[2])
    few = rows(README[README.index("## Four of the modes") :])
    assert len(few) == 4
    for name, cells in few.items():
        assert cells == {column: whole[name][column] for column in cells}


def test_the_accuracies_on_pictures_are_those_of_the_committed_rows() -> None:
    now = rows((ROOT / "docs" / "pictures.md").read_text())
    methods = ("UDA (the default)", "supervised, the same views", "FixMatch-like")
    uda, supervised, fixmatch = (now[f"{method}, 10 min"] for method in methods)
    prose = " ".join(README.split())
    assert (
        f"and 10 minutes of one core (the default is 5 of two): UDA {uda['mean']} %, supervised training with the same "
        f"views {supervised['mean']} %, which is nowhere more than {-float(uda['worst'])} points above UDA, FixMatch "
        f"{fixmatch['mean']} %" in prose
    )


def test_pseudo_labels_stay_below_the_default_whatever_the_problems_not_run_would_give() -> None:
    page = " ".join((ROOT / "docs" / "pictures.md").read_text().split())
    found = {
        row["problem"]: 100 * row["test_accuracy"]
        for row in read(RESULTS / "pictures_unseen_pseudo.jsonl")
        if (row["method"], row["minutes"]) == ("pseudo_labels", 10)
    }
    whole = rows((ROOT / "docs" / "pictures.md").read_text())["UDA (the default), 10 min"]
    problems = [name for name in found if name in whole]
    assert f"{', '.join(f'{name} {found[name]:.1f}' for name in whole if name in found)} (" in page
    most = (sum(found.values()) + 100 * (9 - len(problems))) / 9
    assert f"their mean would be {most:.1f}." in page
    assert most < float(whole["mean"])


def test_the_badges_say_what_the_project_says() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'requires-python = ">=([\d.]+)"', project)
    (license_,) = re.findall(r'^license = "(.+)"', project, re.MULTILINE)
    assert f": {version}+<" in (ROOT / "docs" / "badges" / "python.svg").read_text()
    assert f": {license_}<" in (ROOT / "docs" / "badges" / "license.svg").read_text()
    assert "[tool.mypy]" in project
    assert "strict = true" in project
