"""What is written takes the place of plain files alone: devices, pipes and links stay what they are."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from command import refused, said
from PIL import Image
from special_files import KINDS

from metapl import MetaplError
from metapl.apps.commands.compare import write_comparison
from metapl.apps.commands.evaluate import write_evaluation

EVALUATED: dict[str, Any] = {"n": 4, "accuracy": 0.5, "attacks": {"fgsm": {"2": 0.25}}}


@pytest.mark.parametrize("syncs", [1, 2])
@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_a_full_disk_leaves_figures_and_their_picture_or_neither(
    command: str, syncs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file that is on disk is the JSON, the second the picture."""

    def write(found: dict[str, Any]) -> None:
        if command == "evaluate":
            write_evaluation(tmp_path, found, "a title")
        else:
            write_comparison(tmp_path, {"a": found, "b": found})

    def left() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_at(number: int) -> None:
        calls = itertools.count(1)

        def fsync(descriptor: int) -> None:
            if next(calls) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("os.fsync", fsync)

    full_at(syncs)
    with pytest.raises(MetaplError, match="No space left on device"):
        write(EVALUATED)
    assert left() == {}
    full_at(0)
    write(EVALUATED)
    before = left()
    assert {Path(name).suffix for name in before} == {".json", ".png"}
    full_at(syncs)
    with pytest.raises(MetaplError, match="No space left on device"):
        write(EVALUATED | {"accuracy": 0.75})
    assert left() == before


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("flag", ["--out", "--grid"])
def test_predict_replaces_no_device_and_no_pipe(
    flag: str, kind: str, tiny: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, link = tmp_path / "there.png", tmp_path / "link.png"
    KINDS[kind](there)
    link.symlink_to(there)
    before = os.lstat(there)
    for given in (there, link):
        words = refused(capsys, "predict", tiny, digit, flag, given)
        assert f"{flag} {given} cannot be written: it is a {kind}, expected a plain file" in words
    assert f"{flag}: nothing was given" in refused(capsys, "predict", tiny, digit, flag, "")
    assert (os.lstat(there).st_mode, os.lstat(there).st_rdev) == (before.st_mode, before.st_rdev)


def test_predict_writes_through_a_link(
    tiny: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, name in (("--out", "table.csv"), ("--grid", "grid.png")):
        link = tmp_path / f"link-{name}"
        link.symlink_to(tmp_path / name)
        said(capsys, "predict", tiny, digit, flag, link)
        assert link.is_symlink()
    assert (tmp_path / "table.csv").read_text().startswith("file,class,probability\n")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_predict_does_not_replace_the_file_behind_a_stream(
    name: str, tiny: Path, digit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--out {name} is a stream; expected a file" in refused(capsys, "predict", tiny, digit, "--out", name)
