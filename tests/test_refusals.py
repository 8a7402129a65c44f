"""What the commands refuse before anything is read, written or measured."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path

import numpy
import pytest
from command import refused, said
from PIL import Image
from sklearn.datasets import load_digits

from metapl.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, which tests leave as it is."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "digits", "--steps", "2", "--finetune-steps", "1", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(load_digits().images[:2]):
        Image.fromarray((image * 255 / 16).astype(numpy.uint8)).save(folder / f"{index}.png")
    return folder


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder by its hash."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (("train", "images"), "--labeled DIR --unlabeled DIR"),
        (("predict",), "RUN"),
        (("evaluate",), "RUN"),
        (("finetune",), "RUN"),
        (("export",), "RUN --out DIR"),
    ],
)
def test_without_arguments(command: tuple[str, ...], missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"missing: {missing}. See metapl {' '.join(command)} --help." in refused(capsys, *command)


def test_predict_replaces_no_file_that_it_reads(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = pictures / "0.png"
    (tmp_path / "plain.txt").write_text("kept")
    (tmp_path / "link.png").symlink_to(tmp_path / "plain.txt")
    os.mkfifo(tmp_path / "pipe.png")
    before = content(tmp_path), content(run)
    same = tmp_path / "both.png"
    assert "--out and --grid are the same file" in refused(
        capsys, "predict", run, one, "--out", same, "--grid", pictures / ".." / "both.png"
    )
    for flag in ("--out", "--grid"):
        for source in (one, pictures):
            assert "is one of the files to be read" in refused(capsys, "predict", run, source, flag, one)
        inside = run / ("student.safetensors" if flag == "--out" else "report.png")
        assert f"lies in the run folder {run}" in refused(capsys, "predict", run, one, flag, inside)
        assert "is a symbolic link" in refused(capsys, "predict", run, one, flag, tmp_path / "link.png")
        assert "is a device or a pipe" in refused(capsys, "predict", run, one, flag, tmp_path / "pipe.png")
    assert (content(tmp_path), content(run)) == before
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "pipe.png").is_fifo()


def test_predict_replaces_what_it_wrote_before(run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, table = pictures / "grid.png", pictures / "table.csv"
    first = said(capsys, "predict", run, pictures, "--grid", grid, "--out", table)
    assert said(capsys, "predict", run, pictures, "--grid", grid, "--out", table) == first
