"""Links in circles, refused options, numbers that no float holds: what must end in words and leave nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from command import refused, rows, said
from tiny_runs import TINY

from metapl.apps import commands as cli
from metapl.apps.experiments.folder import RunFolder
from metapl.errors import MetaplError
from metapl.runs.rows import Metrics

HUGE = "1" + 400 * "0"


@pytest.mark.parametrize("target", ["..", "."])
def test_a_link_that_leads_back_gives_each_picture_once(
    target: str, tiny: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / "lp" / "s"
    inside.mkdir(parents=True)
    shutil.copy(digit, inside / "a.png")
    (inside / "link").symlink_to(target)
    found = rows(said(capsys, "predict", tiny, tmp_path / "lp"))
    assert [row["file"] for row in found] == [str(inside / "a.png")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--view.cutout", "99999999999999"),
            "--view.cutout 99999999999999: expected fewer pixels than the pictures' 8 a side",
        ),
        (("--view.cutout", "8"), "--view.cutout 8: expected fewer pixels"),
        (("--view.shift", "99999999999"), "--view.shift 99999999999: expected fewer pixels"),
        (("--view.noise", "inf"), "noise inf: expected a finite number"),
        (("--view.noise", "nan"), "noise nan: expected a finite number"),
        (("--feedback-weight", "nan"), "--feedback-weight nan: expected a finite number"),
        (("--feedback-weight", "inf"), "--feedback-weight inf: expected a finite number"),
    ],
)
def test_options_are_refused_before_anything_is_made(
    flags: Sequence[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, *TINY, *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def opened(folder: RunFolder) -> None:
    """What a fit opens before its first step."""
    Metrics(folder.path / "metrics.jsonl").cut("fit", 0)
    (folder.path / "tensorboard" / "fit").mkdir(parents=True)
    (folder.path / "tensorboard" / "fit" / "events").write_text("")


def failed(folder: RunFolder, *, resume: bool = False, after: Callable[[Path], object] = lambda path: None) -> None:
    """A run that opens its records, does what is ``after`` that, and fails."""
    with folder.claimed({}, resume=resume):
        opened(folder)
        after(folder.path)
        raise MetaplError("refused")


@pytest.mark.parametrize(
    "after",
    [
        lambda path: Metrics(path / "metrics.jsonl").add({"phase": "fit", "step": 1}),
        lambda path: (path / "checkpoints").mkdir(),
        lambda path: (path / "result.json").write_text("{}"),
    ],
    ids=["a row", "a checkpoint", "a result"],
)
def test_a_later_failure_leaves_all(after: Callable[[Path], object], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(MetaplError, match="refused"):
        failed(folder, after=after)
    assert {"recipe.json", "metrics.jsonl", "tensorboard"} <= {path.name for path in folder.path.iterdir()}


def test_a_resumed_run_that_fails_is_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.claimed({}, resume=False):
        pass
    with pytest.raises(MetaplError, match="refused"):
        failed(folder, resume=True)
    assert (folder.path / "tensorboard" / "fit" / "events").is_file()
    assert (folder.path / "metrics.jsonl").is_file()


def changed(folder: Path, text: str) -> None:
    """The result with an entry in the place of another's, as written."""
    result = json.loads((folder / "result.json").read_text())
    name = json.loads("{" + text + "}").popitem()[0]
    result.pop(name, None)
    (folder / "result.json").write_text("{" + text + ", " + json.dumps(result)[1:])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'"student_test_accuracy": {HUGE}', "student_test_accuracy is 1000"),
        (f'"validation_chance": {HUGE}', "validation_chance is 1000"),
        ('"validation_size": -1', "validation_size is -1; expected a whole number of 0 or more"),
    ],
)
def test_a_result_that_was_edited(text: str, words: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(run, text)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    said_of_it = refused(capsys, "evaluate", run)
    assert "result.json is damaged" in said_of_it
    assert words in said_of_it
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_row_with_a_number_that_no_float_holds_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"phase": "fit", "step": 1}\n{"phase": "fit", "step": 2, "loss": ' + HUGE + "}\n")
    assert [row["step"] for row in Metrics(file).rows()] == [1]


@pytest.mark.parametrize(
    "text",
    ["libtorch.so: failed to map segment from shared object", "x.so: cannot allocate memory"],
)
def test_a_library_that_memory_does_not_suffice_for(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(given: Any) -> int:
        raise ImportError(text)

    monkeypatch.setattr(cli, "_dispatch", refuse)
    assert "the memory of this machine does not suffice" in refused(capsys, "predict")
    for text in ("no module named x", "x.so: cannot allocate memory in static TLS block"):
        with pytest.raises(ImportError, match=text):
            cli.main(["predict"])


@pytest.mark.parametrize("name", ["recipe.json", "result.json"])
@pytest.mark.parametrize("command", ["evaluate", "predict", "train"])
def test_a_description_of_another_seed_under_the_same_name(
    command: str, name: str, run: Path, digit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (run / name).read_text()
    assert content.count('"seed": 0') == 1
    (run / name).write_text(content.replace('"seed": 0', '"seed": 1'))
    arguments = {"train": (*TINY, "--resume", "--out", run), "predict": ("predict", run, digit)}
    text = refused(capsys, *arguments.get(command, (command, run)))
    assert "recipe.json is damaged or was edited" in text or "result.json is damaged or of another" in text


def test_a_field_of_the_recipe_that_was_edited(run: Path, digit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every field, for some decide what a picture is to the network, and no later comparison sees them."""
    content = json.loads((run / "recipe.json").read_text())
    for name, value in content["recipe"]["fields"].items():
        other = {**content["recipe"]["fields"], name: "another" if value is None else None}
        changed = content | {"recipe": content["recipe"] | {"fields": other}}
        (run / "recipe.json").write_text(json.dumps(changed))
        assert "recipe.json is damaged or was edited" in refused(capsys, "predict", run, digit), name


SEALED = ("student.safetensors", "teacher.safetensors", "data.json", "metrics.jsonl")


@pytest.mark.parametrize("name", SEALED)
def test_a_finished_run_with_other_files_is_not_said_to_be_finished(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be missing, as they take room."""
    content = bytearray((run / name).read_bytes())
    content[-1] ^= 1
    (run / name).write_bytes(content)
    assert f"{name} is damaged or of another run" in refused(capsys, *TINY, "--resume", "--out", run)
    (run / name).unlink()
    assert "is finished already" in said(capsys, *TINY, "--resume", "--out", run)
