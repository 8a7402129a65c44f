"""What a run says before it begins and when it has ended, and what it asks for first."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from command import metapl, rows
from tiny_runs import TINY, images_command

from metapl.errors import origin


@pytest.mark.parametrize(
    ("words", "missing", "extra"),
    [
        ("noisy-student digits --out run", "pyarrow", "labels"),
        ("train digits --method reduced_mpl --out run", "pyarrow", "labels"),
        ("train digits --compare --methods uda reduced_mpl", "pyarrow", "labels"),
        ("train digits --out run", "matplotlib", "apps"),
        ("ablate digits --out there", "matplotlib", "apps"),
        ("evaluate {run} --attack fgsm --out there", "matplotlib", "apps"),
    ],
)
def test_a_package_of_a_later_part_is_asked_for_before_anything_is_made(
    words: str,
    missing: str,
    extra: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec

    def found(name: str, *more: Any) -> Any:
        return None if name == missing else find_spec(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.chdir(tmp_path)
    told = metapl(*words.format(run=tiny).split(), code=2)
    install = f"expected the package {missing}, which `pip install '{origin()}[{extra}]'` installs"
    assert install in told.stderr
    assert told.stdout == ""
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("train digits --method supervised", "6 steps, then 4 of finetuning"),
        ("train digits --method supervised --finetune-steps 0", "6 steps, seed"),
        ("train digits --method pseudo_labels", "6 steps of each of 2 networks, then 4 of"),
        ("train digits --method reduced_mpl", "6 steps of each of 2 networks, then 4 of"),
        ("noisy-student digits --rounds 1 --threshold 0.1", "6 steps of each of 2 networks, seed"),
    ],
)
def test_the_first_line_says_all_steps(words: str, steps: str, tmp_path: Path) -> None:
    flags = "--steps 6 --hidden 4 --labeled-batch 8 --log-every 1"
    if "--finetune-steps" not in words:
        flags += " --finetune-steps 4"
    said = metapl(*words.split(), *flags.split(), "--out", tmp_path / "run").stdout
    assert f": {steps}" in " ".join(said.partition(" -> ")[0].split()), said


def test_the_last_lines_are_what_one_looks_at_and_types_next(colors: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    *_, time, page, command = metapl(*images_command(colors), "--out", out).stdout.splitlines()
    assert re.match(r"after \d+ s the networks, the report and the figures are in ", time)
    assert Path(page.partition("  (")[0].strip()) == out / "report.html"
    assert (out / "report.html").is_file()
    words = shlex.split(command)
    assert words[0] == "metapl"
    words[words.index("PICTURES")] = str(colors / "test")
    assert len(rows(metapl(*words[1:]).stdout)) == 12


def test_a_comparison_ends_with_them_too(tmp_path: Path) -> None:
    words = [*TINY, "--compare", "--methods", "supervised", "uda", "--jobs", "1"]
    *_, page, command = metapl(*words, "--out", tmp_path / "compared").stdout.splitlines()
    assert str(tmp_path / "compared" / "report.html") in page
    assert command == f"  metapl predict {tmp_path / 'compared'} PICTURES"
