"""What is written takes the place of plain files alone: devices, pipes and links stay what they are."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
from command import refused, said
from special_files import KINDS

from metapl import MetaplError
from metapl.apps.commands.inputs import written
from metapl.apps.machine.sealed import replacing


@pytest.mark.parametrize("syncs", [1, 2])
def test_a_full_disk_leaves_what_stood_there(syncs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file that is on disk is the JSON, the second what is written beside it."""

    def write(text: str) -> None:
        with written(tmp_path, "found.json", text), replacing(tmp_path / "found.csv") as file:
            file.write(text.encode())

    def full_at(number: int) -> None:
        calls = itertools.count(1)

        def fsync(descriptor: int) -> None:
            if next(calls) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("os.fsync", fsync)

    def left() -> dict[str, str]:
        return {path.name: path.read_text() for path in tmp_path.iterdir()}

    full_at(syncs)
    with pytest.raises(MetaplError, match="No space left on device"):
        write("one")
    assert left() == {}
    full_at(0)
    write("one")
    full_at(syncs)
    with pytest.raises(MetaplError, match="No space left on device"):
        write("two")
    assert left() == {"found.json": "one", "found.csv": "one"}


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_predict_replaces_no_device_and_no_pipe(
    kind: str, tiny: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, link = tmp_path / "there.png", tmp_path / "link.png"
    KINDS[kind](there)
    link.symlink_to(there)
    before = os.lstat(there)
    for given in (there, link):
        words = refused(capsys, "predict", tiny, digit, "--out", given)
        assert f"--out {given} cannot be written: it is a {kind}, expected a plain file" in words
    assert "--out: nothing was given" in refused(capsys, "predict", tiny, digit, "--out", "")
    assert (os.lstat(there).st_mode, os.lstat(there).st_rdev) == (before.st_mode, before.st_rdev)


def test_predict_writes_through_a_link(
    tiny: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link.csv"
    link.symlink_to(tmp_path / "table.csv")
    said(capsys, "predict", tiny, digit, "--out", link)
    assert link.is_symlink()
    assert (tmp_path / "table.csv").read_text().startswith("file,class,probability\n")


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_predict_does_not_replace_the_file_behind_a_stream(
    name: str, tiny: Path, digit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--out {name} is a stream; expected a file" in refused(capsys, "predict", tiny, digit, "--out", name)
