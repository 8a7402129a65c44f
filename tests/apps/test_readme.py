"""The README's code runs as it stands there, and its figures are those of the documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest

from benchmarks.harness import RESULTS, read

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


def rows(text: str) -> dict[str, dict[str, str]]:
    """The rows of the first table of a text, by their first cell, each with its cells by their columns."""
    lines = re.search(r"(^\|.*\n)+", text, re.MULTILINE)
    assert lines is not None
    head, _, *body = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in lines[0].splitlines())
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in body}


def test_the_accuracies_on_pictures_are_those_of_the_committed_rows() -> None:
    now = rows((ROOT / "docs" / "pictures.md").read_text())
    methods = ("UDA, half aligned (the default)", "supervised, the same views", "FixMatch")
    uda, supervised, fixmatch = (now[f"{method}, 10 min"] for method in methods)
    shown = rows(README[README.index("| method | mean") :])
    assert [cells["mean test accuracy, %"] for cells in shown.values()] == [
        uda["mean"],
        fixmatch["mean"],
        supervised["mean"],
    ]


def test_pseudo_labels_stay_below_the_default_whatever_the_problems_not_run_would_give() -> None:
    found = {
        row["problem"]: 100 * row["test_accuracy"]
        for row in read(RESULTS / "pictures_unseen_pseudo.jsonl")
        if (row["method"], row["minutes"]) == ("pseudo_labels", 10)
    }
    whole = rows((ROOT / "docs" / "pictures.md").read_text())["UDA, half aligned (the default), 10 min"]
    problems = [name for name in found if name in whole]
    most = (sum(found.values()) + 100 * (9 - len(problems))) / 9
    assert most < float(whole["mean"])


def test_the_badges_say_what_the_project_says() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'requires-python = ">=([\d.]+)"', project)
    (license_,) = re.findall(r'^license = "(.+)"', project, re.MULTILINE)
    assert f": {version}+<" in (ROOT / "docs" / "badges" / "python.svg").read_text()
    assert f": {license_}<" in (ROOT / "docs" / "badges" / "license.svg").read_text()
    assert "[tool.mypy]" in project
    assert "strict = true" in project
