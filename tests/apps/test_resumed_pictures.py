"""A fit that is resumed notices what is not as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import said
from tiny_runs import color_folders, images_command

from metapl.apps.commands import main

# ------------------------------------------------------------------------------------------------------- moved folders


def test_pictures_that_moved_are_pointed_to_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, moved, out = color_folders(tmp_path / "before"), tmp_path / "after", tmp_path / "run"
    said(capsys, *images_command(root), "--out", out)
    shutil.copytree(root, moved)
    (out / "result.json").unlink()  # as if it had been stopped
    shutil.rmtree(root)
    assert "is finished already" not in said(capsys, *images_command(moved), "--out", out, "--resume")
    fields = json.loads((out / "recipe.json").read_text())["recipe"]["fields"]
    assert fields["labeled"] == str(moved / "labeled")
    assert fields["test"] == str(moved / "test")
    said(capsys, "evaluate", out)
    # A finished run too, and never to other pictures.
    again = Path(shutil.copytree(moved, tmp_path / "again"))
    assert "is finished already" in said(capsys, *images_command(again), "--out", out, "--resume")
    (again / "unlabeled" / "red-0.png").write_bytes((again / "unlabeled" / "red-1.png").read_bytes())
    third = Path(shutil.copytree(again, tmp_path / "third"))
    capsys.readouterr()
    assert main([*images_command(third), "--out", str(out), "--resume"]) == 2
    assert "the data have changed since the run" in capsys.readouterr().err
    fields = json.loads((out / "recipe.json").read_text())["recipe"]["fields"]
    assert fields["labeled"] == str(again / "labeled")
