"""The tables of pages are those of the committed rows; these are of runs as the studies say."""

import contextlib
import doctest
import functools
import importlib
import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_runs import (
    BENCHMARKS,
    MARKS,
    RESULTS,
    ROOT,
    SCRIPTS,
    SECOND,
    check_miniature,
    miniatures,
    run,
)
from tape import record_on_tape

from metapl.functional import capture, cuda_graphs

pytestmark = [pytest.mark.docs, pytest.mark.usefixtures("as_scripts")]

PAGES = [*(ROOT / "docs").rglob("*.md"), *RESULTS.glob("*.md")]


def test_every_command_is_run_here() -> None:
    found = {path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()}
    assert found == {*(script.split()[0] for script in SCRIPTS), "gpu"}
    marked = [
        mark for page in PAGES for mark in re.findall(r"<!-- ([\w-]+):begin -->", page.read_text())
    ]
    assert sorted(marked) == sorted(
        mark for script in SCRIPTS for mark in MARKS.get(script, [script])
    )


def test_the_jobs_of_a_card_run_in_miniature(tmp_path: Path) -> None:
    check_miniature("cifar_few_labels --card", tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_page_has_the_tables_of_the_committed_rows(script: str, tmp_path: Path) -> None:
    marks, copy = MARKS.get(script, [script]), tmp_path / "page.md"
    (page,) = [
        page
        for page in PAGES
        if all(f"<!-- {mark}:begin -->" in page.read_text() for mark in marks)
    ]
    emptied = text = re.sub(r"\n+(<!-- [\w-]+:end -->)", r"\n\1", page.read_text())
    for mark in marks:
        emptied = re.sub(
            f"(<!-- {mark}:begin -->\n).*?(<!-- {mark}:end -->)", r"\1\2", emptied, flags=re.DOTALL
        )
    copy.write_text(emptied)
    run(script, "--write", copy)
    assert copy.read_text() == text, (
        f"python benchmarks/{script.replace(' ', '.py ', 1)} --write {page}"
    )


@miniatures(SECOND)
def test_a_miniature_leaves_rows_and_tables(script: str, tmp_path: Path) -> None:
    check_miniature(script, tmp_path)


def test_the_rows_that_a_page_shows_are_those_of_the_whole_table() -> None:
    """``<!-- rows of NAME -->`` heads some rows and columns of ``benchmarks/results/NAME.md``."""

    def rows_of(text: str) -> list[dict[str, str]]:
        found = []
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            head, _, *body = (
                [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
            )
            found += [dict(zip(head, cells, strict=True)) for cells in body]
        return found

    for page in (ROOT / "docs").rglob("*.md"):
        for name, table in re.findall(r"<!-- rows of (\w+) -->\n((?:\|.*\n)+)", page.read_text()):
            whole = rows_of((RESULTS / f"{name}.md").read_text())
            for row in rows_of(table):
                assert any(row.items() <= one.items() for one in whole), f"{page.name}: {row}"


def test_the_sentences_about_silent_errors_follow_from_the_rows() -> None:
    rows = json.loads((RESULTS / "silent.json").read_text())["rows"]
    outcomes: dict[str, Counter[str]] = {}
    right: dict[str, set[str]] = {}
    for row in rows:
        outcomes.setdefault(row["way"], Counter())[row["outcome"]] += 1
        if row["outcome"] == "right":
            right.setdefault(row["way"], set()).add(row["kind"])
    verified = outcomes["metapl, forward"]
    others = {
        way: counts for way, counts in outcomes.items() if not way.startswith(("metapl", "bergson"))
    }
    assert (verified["wrong"], outcomes["metapl, unrolled"]["wrong"]) == (0, 0)
    assert outcomes["metapl.hypergradient"]["wrong"] == 0
    # The page has these two in words.
    unverified = ("metapl, forward, verify=False", "metapl.hypergradient, verify=False")
    assert [outcomes[way]["wrong"] for way in unverified] == [7, 12]

    right_elsewhere = set().union(*(right[way] for way in [*others, "bergson 2.5.1"]))
    page = " ".join((ROOT / "docs" / "peers.md").read_text().split())
    by_forward = len(right_elsewhere & right["metapl, forward"])
    assert (
        f"On {len(right_elsewhere)} students one of the others is right, and `forward` on "
        f"{by_forward} of" in page
    )
    missed = right_elsewhere - right["metapl, forward"]
    refused_by_name = {"Python's random numbers", "weight norm, the old one"}
    assert missed == {"a captured teacher", "a count in an attribute"} | refused_by_name
    assert missed - right["metapl, unrolled"] == {"a captured teacher"} | refused_by_name
    assert "silently wrong on seven, and `metapl.hypergradient` on twelve" in page


def test_the_table_of_the_readme_is_that_of_the_rows() -> None:
    readme = (ROOT / "README.md").read_text()
    part = readme.partition("## Beside the strongest rival")[2].partition("\n## ")[0]
    table = re.findall(r"^\| (.*) \| ([\d.]+) \| ([\d.]+), (.*) \| `(.*)` \|$", part, re.MULTILINE)
    assert len(table) == 5
    # Each stands beside its rivals on the page of evidence.
    claims = (ROOT / "docs" / "evidence.md").read_text().partition("## Claims")[2]
    claims = claims.partition("\n## ")[0]
    beside = [line for line in claims.splitlines() if "(README)" in line]

    def claim(words: str) -> tuple[str, str, str]:
        ((ours, rivals, rival),) = [line[1:4] for line in table if words in line[0]]
        assert any(ours in row.split("|")[1].replace(";", "").split() for row in beside), ours
        return ours, rivals, rival

    silent = json.loads((RESULTS / "silent.json").read_text())["rows"]
    wrong = {row["way"] for row in silent if row["outcome"] == "wrong"}
    right = Counter(row["way"] for row in silent if row["outcome"] == "right")
    others = {row["way"] for row in silent if not row["way"].startswith("metapl")}
    assert others - wrong == {"by hand, checked in place"}
    assert "metapl, forward" not in wrong
    pair = str(right["metapl, forward"]), str(right["by hand, checked in place"])
    assert claim("46 odd networks") == (*pair, "by hand with a check")
    assert len({row["kind"] for row in silent}) == 46

    memory = {
        row["arm"]: f"{row['bytes'] / 1e6:.0f}"
        for row in map(json.loads, (RESULTS / "something_simpler.jsonl").read_text().splitlines())
        if (row["case"], row.get("network")) == ("memory", "WRN-28-2")
    }
    least = min(memory.keys() - {"metapl, forward, teacher recomputed"}, key=memory.__getitem__)
    assert least.startswith("by hand")
    pair = memory["metapl, forward, teacher recomputed"], memory[least]
    assert claim("ten differentiated steps") == (*pair, "by hand with checkpoints")

    steps = {
        row["arm"]: f"{row['ratio']:.2f}"
        for row in map(json.loads, (RESULTS / "something_simpler.jsonl").read_text().splitlines())
        if (row["case"], row.get("network")) == ("steps", "mlp")
    }
    pair = (
        steps["`BilevelTrainer(compile=True)`"],
        steps["the same with the trainer's options of Inductor"],
    )
    assert claim("compiled step") == (*pair, "by hand with our options")

    leaderboard = BENCHMARKS / "leaderboard" / "rows.jsonl"
    scores = [json.loads(line) for line in leaderboard.read_text().splitlines()]
    for words, task, simplest in (
        ("perceptron", "perceptron", "influence"),
        ("the same,", "convolutional", "influence-damped"),
    ):
        lds = {row["method"]: row["lds"] for row in scores if row["task"] == f"digits-{task}"}
        assert f"{lds['bergson']:.2f}" == f"{lds['attribute']:.2f}"
        simple = lds.keys() - {"attribute", "bergson"}
        assert lds[simplest] == max(lds[name] for name in simple)
        rivals = f"bergson; {lds[simplest]:.2f}, influence functions"
        assert claim(words) == (f"{lds['attribute']:.2f}", f"{lds['bergson']:.2f}", rivals)


def test_the_harness_goes_on_shows_figures_as_it_says_and_keeps_the_committed_result(
    tmp_path: Path,
) -> None:
    harness, asked = importlib.import_module("harness"), list[int]()

    def study(seeds: int) -> list[int]:
        jobs = ({"arm": [1, 2], "seed": seed} for seed in range(seeds))
        rows = harness.go_on(
            tmp_path / "rows",
            jobs,
            lambda arm, seed: asked.append(seed) or {"found": seed},
            about=0,
        )
        return [row["found"] for row in rows if "found" in row]

    assert (study(2), study(3), asked) == ([0, 1], [0, 1, 2], [0, 1, 2])
    found = doctest.testmod(harness)
    assert (found.failed, found.attempted > 4) == (0, True)
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        run("step", "--miniature")
    assert "--out FILE" in said.getvalue()


@pytest.mark.long
def test_what_a_gpu_has_to_show_runs_on_the_cpu_in_miniature(tmp_path: Path) -> None:
    """The first call leaves a part that failed and one that is missing; the next goes on there."""
    harness = importlib.import_module("harness")
    gpu = importlib.import_module("gpu")
    parts = gpu.OF_MINIATURE

    def command() -> str:
        options = ("--device", "cpu", "--miniature", "--minutes", "30", "--out", str(tmp_path))
        asked = [sys.executable, BENCHMARKS / "gpu.py", *options]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout

    first = command()
    assert first.count(" ...\n") == len(parts)
    assert "| tests on the device | 1 passed, 0 failed | none failed |" in first
    ways = len(gpu.PARTS["compiled mlp"].ways)
    assert first.count(" of by hand") == ways + 2 * 3
    assert first.count(" TFLOP, ") == 4
    assert "| other libraries, MLP: metapl, forward |" in first
    assert "| ten steps ahead, MLP: metapl, forward |" in first
    assert "| a billion weights, table: `forward` |" in first
    assert first.count("| fashion-4k, five arms: ") == 5
    assert first.count("| GPT-2, whole training: ") == 7
    for file in tmp_path.glob("*.json"):
        made = harness.loaded(file)
        for row in made if isinstance(made, list) else []:
            assert {"commit", "switches"} <= row["measured_on"].keys(), file
    assert "not measured" not in first
    assert "| failed" not in first
    (tmp_path / "WRN-28-2-float32.json").rename(tmp_path / "kept.json")
    (tmp_path / "WRN-28-2-float32.log").write_text("what happened\n")
    assert "| WRN-28-2, float32 | failed: what happened | |" in run("gpu", "--table", tmp_path)
    # Rows that a part had measured before it was stopped stay, and the next call goes on behind
    # them.
    kept = harness.loaded(tmp_path / "kept.json")[:2]
    kept[0]["ratio"] = 0.125
    harness.write_json(tmp_path / "WRN-28-2-float32.part", kept)
    assert "`forward`, as it is" in run("gpu", "--table", tmp_path)
    second = command()
    assert second.count(" ...\n") == 1
    assert "0.12 of by hand" in second
    assert len(harness.loaded(tmp_path / "WRN-28-2-float32.json")) == 3


def test_the_share_of_the_card_is_measured_by_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape of operations stands for the graph, and none is compiled.

    A step of ours takes four to six times the operations of a plain step on all examples.
    """
    gpu = importlib.import_module("gpu")
    card = importlib.import_module("card")
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", record_on_tape)
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(capture, "compiled_graph", lambda graph, examples: graph)
    monkeypatch.setattr(card, "MOST", 0.0)
    name, precision, ways = gpu.SHARES[0]
    ways = (*ways, card.PLAIN_COMPILED, card.REPLAY)
    share = card.Share(name, gpu.SMALL, precision, ways)
    rows: list[dict[str, Any]] = []
    for new in card.measure(share, [], "cpu", is_small=True):
        rows += new
    assert [row["way"] for row in rows] == [*share.ways]
    assert [row["reason"] for row in rows if "reason" in row] == []
    operations = {row["way"]: row["operations"] for row in rows}
    assert 2 < operations[card.OURS] / operations[card.PLAIN] < 6
    assert operations[card.OURS] == operations[card.OURS_BY_GRAPHS] == operations[card.REPLAY]
    for row in rows:
        assert row["share"] is None
        assert row["share_of_product"] > 0
        assert row["way"] in gpu.shown(gpu.SHARE, row)[0]
    (last,) = card.measure(share, rows[:-1], "cpu", is_small=True)
    assert [row["way"] for row in last] == [card.REPLAY]
    # What stops is said, and the next way runs.
    step_by = card.step_by
    monkeypatch.setattr(card, "step_by", stopped_by_graphs(card, step_by, "it stopped"))
    again = [row for new in card.measure(share, [], "cpu", is_small=True) for row in new]
    assert [row["way"] for row in again if "reason" in row] == [card.OURS_BY_GRAPHS]
    # Behind an error of the device nothing runs in this process.
    text = "CUDA error: an illegal memory access"
    monkeypatch.setattr(card, "step_by", stopped_by_graphs(card, step_by, text))
    measured = card.measure(share, [], "cpu", is_small=True)
    seen = [next(measured)[0]["way"] for _ in range(2)]
    assert seen == [card.OURS, card.OURS_BY_GRAPHS]
    with pytest.raises(RuntimeError, match="illegal"):
        next(measured)


def stopped_by_graphs(card: Any, step_by: Any, text: str) -> Any:
    """Return ways' steps as they are, but that by graphs, which stops."""

    def step_or_stop(way: str, make: Any, place: Any) -> Any:
        if way == card.OURS_BY_GRAPHS:
            raise RuntimeError(text)
        return step_by(way, make, place)

    return step_or_stop


def test_a_part_that_fails_behind_new_rows_runs_again(tmp_path: Path) -> None:
    gpu = importlib.import_module("gpu")
    done = gpu.file_of("a part", tmp_path)
    partial_file = gpu.unfinished("a part", tmp_path)
    code = (
        "import json, pathlib, sys\n"
        f"done, partial = pathlib.Path({str(done)!r}), pathlib.Path({str(partial_file)!r})\n"
        "rows = json.loads(partial.read_text()) if partial.exists() else []\n"
        "rows.append({})\n"
        "(done if len(rows) == 3 else partial).write_text(json.dumps(rows))\n"
        "sys.exit(len(rows) < 3)\n"
    )
    gpu.run_part([sys.executable, "-c", code], "a part", tmp_path, seconds=60)
    assert len(json.loads(done.read_text())) == 3
    done.unlink()
    gpu.run_part([sys.executable, "-c", "raise SystemExit(1)"], "a part", tmp_path, seconds=60)
    assert not done.exists()


@pytest.mark.parametrize("name", ["digits_study", "noisy_student", "when"])
def test_settings_are_of_other_seeds_and_the_test_set_is_opened_by_final_runs_alone(
    name: str,
) -> None:
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
    names = ("digits_study", "when", "noisy_student", "harness")
    digits, when, student, harness = map(importlib.import_module, names)
    rows = harness.read(digits.RAW, "method")
    best, final = digits.chosen(rows), [row for row in rows if row["final"]]
    assert all(row["config"] == best[row["method"]] for row in final)
    assert len(final) == len(digits.FULL.seeds) * sum(map(len, digits.COMPARED.values()))
    rows = when.read()
    found = {when.arm_of(row): row for row in rows if row["final"]}
    assert {*found} == {*when.ARMS}
    assert all(when.Rule(**row["rule"]) == when.rule_of(arm, rows) for arm, row in found.items())
    rows = harness.read(student.RAW, "final")
    assert len([row for row in rows if row["final"]]) == len(student.ARMS)
    assert all((row["lr"], row["dropout"]) == student.tuned(rows) for row in rows if row["final"])


def test_every_arm_has_a_control_that_saw_the_same() -> None:
    when = importlib.import_module("when")
    silent = {
        arm.group
        for arm in when.ARMS
        if arm.method.split()[0] in ("none", "fixed") and not arm.of_worth
    }
    for arm in when.ARMS:
        where, rules = when.GRIDS[arm.tuned]
        assert len(rules) == 8 if arm.of_worth else arm.group in silent
        assert (where.condition == "right") == (arm.condition == "right")
