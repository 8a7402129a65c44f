"""Each benchmark runs in miniature and goes on with its rows; the tables of pages are those of the committed rows."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
PAGES = [*(ROOT / "docs").glob("*.md"), *RESULTS.glob("*.md")]
LONG = pytest.mark.long

SCRIPTS = {  # what is given to a miniature, and the marks of its tables in a page
    "attribution": ((), ["attribution", "attribution-settings", "attribution-smooth"]),
    "data_rater": ((), ["data_rater", "data_rater-scores", "data_rater-costs"]),
    "digits_study": (("--workers", "1"), ["digits"]),
    "endurance": ((), ["endurance"]),
    "hyperparameters": ((), ["hyperparameters", "schedule"]),
    "label_noise": ((), ["label_noise"]),
    "long_paths": ((), ["long_paths"]),
    "mnist": ((), ["mnist"]),
    "modes": ((), ["modes"]),
    "noisy_student": ((), ["noisy-student-studies"]),
    "peers": ((), ["peers"]),
    "reduced": ((), ["reduced"]),
    "rival_attribution": ((), ["rival_attribution", "rival_attribution-scores"]),
    "scale": ((), ["scale"]),
    "silent": ((), ["silent"]),
    "step": ((), ["step"]),
    "stored_labels": ((), ["stored_labels"]),
    "suspects": ((), ["suspects"]),
    "suspects --harmful": (("--harmful",), ["harmful_pictures"]),
    "tables": ((), ["tables"]),
    "when": ((), ["when", "feedback-worth"]),
}
MINUTES = ("endurance", "hyperparameters", "label_noise", "peers", "reduced", "rival_attribution", "silent")
MINUTES += ("stored_labels", "suspects", "suspects --harmful")
every_script = pytest.mark.parametrize("script", [pytest.param(s, marks=LONG) if s in MINUTES else s for s in SCRIPTS])


@pytest.fixture(autouse=True)
def _as_scripts_and_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before, threads = {path: path.read_bytes() for path in RESULTS.iterdir()}, torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(ROOT)
    yield
    torch.set_num_threads(threads)
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)
    assert {path: path.read_bytes() for path in RESULTS.iterdir()} == before


def run(script: str, *arguments: str | Path) -> str:
    """What a benchmark's command prints, in this process; endurance forks, which autograd's threads do not survive."""
    name, *options = script.split()
    words = [*options, *map(str, arguments)]
    if name == "endurance":
        command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [f"{name}.py", *words])
        importlib.import_module(name).main()
    return printed.getvalue()


def emptied(page: Path, marks: list[str], to: Path) -> Path:
    """A copy of a page without what stands between the marks."""
    text = page.read_text()
    for mark in marks:
        text = re.sub(f"(<!-- {mark}:begin -->\n).*?\n+(<!-- {mark}:end -->)", r"\1\2", text, flags=re.DOTALL)
    to.write_text(text)
    return to


def test_every_command_is_run_here() -> None:
    found = {path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()}
    assert found == {*(script.split()[0] for script in SCRIPTS), "gpu"}
    marked = {mark for page in PAGES for mark in re.findall(r"<!-- ([\w-]+):begin -->", page.read_text())}
    elsewhere = {"unseen"}  # tests/apps/test_picture_problems.py
    assert marked - elsewhere == {mark for _, marks in SCRIPTS.values() for mark in marks}


@every_script
def test_a_miniature_leaves_rows_that_it_goes_on_with_and_that_its_tables_are_made_of(
    script: str, tmp_path: Path
) -> None:
    options, marks = SCRIPTS[script]
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    run(script.split()[0], "--miniature", "--out", out, *options)
    if hasattr(importlib.import_module(script.split()[0]), "RAW"):  # rows that are there are not run again
        made = out.read_bytes()
        run(script.split()[0], "--miniature", "--out", out, *options)
        assert out.read_bytes() == made
    page.write_text("before\n" + "".join(f"<!-- {m}:begin -->\n<!-- {m}:end -->\n" for m in marks) + "after\n")
    run(script.split()[0], "--out", out, "--write", page, *options)
    printed, text = run(script.split()[0], "--out", out, "--table", *options), page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert printed.count("\n|") > 2
    assert all(table.strip() in text for table in printed.split("\n\n"))
    for figure in tmp_path.glob("*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_page_has_the_tables_of_the_committed_rows(script: str, tmp_path: Path) -> None:
    _, marks = SCRIPTS[script]
    (page,) = [page for page in PAGES if all(f"<!-- {mark}:begin -->" in page.read_text() for mark in marks)]
    copy = emptied(page, marks, tmp_path / page.name)
    run(script, "--write", copy)
    text = re.sub(r"\n+(<!-- [\w-]+:end -->)", r"\n\1", page.read_text())
    assert copy.read_text() == text, f"python benchmarks/{script.replace(' ', '.py ', 1)} --write {page}"


def test_the_rows_that_a_page_shows_are_those_of_the_whole_table() -> None:
    """A table below ``<!-- rows of NAME -->`` has some rows and columns of ``benchmarks/results/NAME.md``."""

    def rows_of(text: str) -> list[dict[str, str]]:
        found = []
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
            found += [dict(zip(head, cells, strict=True)) for cells in body]
        return found

    for page in (ROOT / "docs").glob("*.md"):
        for name, table in re.findall(r"<!-- rows of (\w+) -->\n((?:\|.*\n)+)", page.read_text()):
            whole = rows_of((RESULTS / f"{name}.md").read_text())
            for row in rows_of(table):
                assert any(row.items() <= one.items() for one in whole), f"{page.name}: {row}"


def test_the_harness_goes_on_shows_figures_as_it_says_and_keeps_the_committed_result(tmp_path: Path) -> None:
    harness, asked = importlib.import_module("harness"), list[int]()

    def study(seeds: int) -> list[int]:
        jobs = ({"arm": [1, 2], "seed": seed} for seed in range(seeds))
        rows = harness.go_on(tmp_path / "rows", jobs, lambda arm, seed: asked.append(seed) or {"found": seed}, about=0)
        return [row["found"] for row in rows if "found" in row]

    assert (study(2), study(3), asked) == ([0, 1], [0, 1, 2], [0, 1, 2])
    found = doctest.testmod(harness)
    assert (found.failed, found.attempted > 4) == (0, True)
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        run("step", "--miniature")
    assert "--out FILE" in said.getvalue()


@pytest.mark.long
def test_what_a_gpu_has_to_show_runs_on_the_cpu_in_miniature(tmp_path: Path) -> None:
    """The first call leaves one part that failed and one that is missing, and the next one goes on there."""

    def command() -> str:
        options = ("--device", "cpu", "--miniature", "--minutes", "30", "--out", str(tmp_path))
        asked = [sys.executable, BENCHMARKS / "gpu.py", *options]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout

    first = command()
    assert first.count(" ...\n") == 4
    assert first.count(" of by hand") == 3 + 2 * 3
    assert "not measured" not in first
    assert "| failed" not in first
    (tmp_path / "WRN-28-2-float32.json").rename(tmp_path / "kept.json")
    (tmp_path / "WRN-28-2-float32.log").write_text("what happened\n")
    assert "| WRN-28-2, float32 | failed: what happened | |" in run("gpu", "--table", tmp_path)
    assert command().count(" ...\n") == 1


# ------------------------------------------------------------------------------------------------ studies as they say


@pytest.mark.parametrize("name", ["digits_study", "label_noise", "noisy_student", "when"])
def test_settings_are_of_other_seeds_and_the_test_set_is_opened_by_final_runs_alone(name: str) -> None:
    study, harness = importlib.import_module(name), importlib.import_module("harness")
    tests = ("test_accuracy", "test", "teacher")
    rows = study.read() if name == "when" else harness.read(study.RAW, "final")
    seeds: dict[bool, set[int]] = {True: set(), False: set()}
    for row in rows:
        assert any(column in row for column in tests) == row["final"]
        seeds[row["final"]] |= {*row.get("seeds", [row.get("seed")])}
    assert len(seeds[True]) >= 5
    assert not seeds[True] & seeds[False]


def test_each_study_has_every_arm_with_the_settings_that_tuning_chose() -> None:
    names = ("digits_study", "label_noise", "when", "noisy_student", "harness")
    digits, noise, when, student, harness = map(importlib.import_module, names)
    rows = harness.read(digits.RAW, "method")
    best, final = digits.chosen(rows), [row for row in rows if row["final"]]
    assert all(row["config"] == best[row["method"]] for row in final)
    assert len(final) == len(digits.FULL.seeds) * sum(map(len, digits.COMPARED.values()))
    rows = harness.read(noise.RAW, "method")
    final = [row for row in rows if row["final"]]
    chosen = {at: noise.chosen(rows, *at) for at in {(row["method"], row["condition"]) for row in final}}
    assert all(row["config"] == chosen[row["method"], row["condition"]] for row in final)
    assert len(final) == len(noise.FULL.seeds) * len(noise.ENTRIES) * len(noise.CONDITIONS)
    rows = when.read()
    found = {when.arm_of(row): row for row in rows if row["final"]}
    assert {*found} == {*when.ARMS}
    assert all(when.Rule(**row["rule"]) == when.rule_of(arm, rows) for arm, row in found.items())
    rows = harness.read(student.RAW, "final")
    assert len([row for row in rows if row["final"]]) == len(student.ARMS)
    assert all((row["lr"], row["dropout"]) == student.tuned(rows) for row in rows if row["final"])


def test_every_arm_has_a_control_that_saw_the_same() -> None:
    when = importlib.import_module("when")
    silent = {arm.group for arm in when.ARMS if arm.method.split()[0] in ("none", "fixed") and not arm.of_worth}
    for arm in when.ARMS:
        where, rules = when.GRIDS[arm.tuned]
        assert len(rules) == 8 if arm.of_worth else arm.group in silent
        assert (where.condition == "right") == (arm.condition == "right")
