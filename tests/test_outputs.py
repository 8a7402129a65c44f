"""What is written takes the place of plain files alone: devices, pipes and links stay what they are."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from command import refused, said
from PIL import Image
from tiny_runs import digit, tiny  # noqa: F401 - fixtures

from metapl import LossTrainer, MetaplError
from metapl.cli.evaluations import write_comparison
from metapl.cli.evaluators import write_evaluation
from metapl.runs import checkpoint
from metapl.runs.atomic import replacing
from metapl.runs.folder import RunFolder


def device(path: Path) -> None:
    """A character device that takes everything and gives nothing, of this test's own."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root may make devices")


def bound(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as there:
            there.bind(path.name)
    finally:
        os.chdir(before)


KINDS = {"pipe": os.mkfifo, "device": device, "socket": bound}


@pytest.mark.parametrize("through", ["itself", "a link"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_file_is_never_replaced(kind: str, through: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    KINDS[kind](there)
    given = there
    if through == "a link":
        given = tmp_path / "link"
        given.symlink_to(there)
    before, names = os.lstat(there), sorted(os.listdir(tmp_path))
    with pytest.raises(OSError, match=f"it is a {kind}, expected a plain file"), replacing(given) as file:
        file.write(b"lost")
    with pytest.raises(checkpoint.CheckpointError, match=f"could not be written: it is a {kind}"):
        checkpoint.save(given, {"step": 1})
    if kind != "socket":  # its name would be the folder's
        given.rename(tmp_path / "recipe.json")
        with pytest.raises(MetaplError, match=f"recipe.json could not be written: it is a {kind}"):
            RunFolder(tmp_path).write_json("recipe.json", {})
        (tmp_path / "recipe.json").rename(given)
    after = os.lstat(there)
    assert (after.st_mode, after.st_ino, after.st_rdev) == (before.st_mode, before.st_ino, before.st_rdev)
    assert sorted(os.listdir(tmp_path)) == names


def test_the_file_that_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link, chain = tmp_path / "elsewhere" / "target", tmp_path / "link", tmp_path / "chain"
    target.write_text("before")
    link.symlink_to("elsewhere/target")
    chain.symlink_to(link)
    with replacing(chain) as file:
        file.write(b"after")
    assert target.read_text() == "after"
    assert link.is_symlink()
    assert chain.is_symlink()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["target"]
    dangling = tmp_path / "dangling"
    dangling.symlink_to("elsewhere/new")
    with replacing(dangling) as file:
        file.write(b"new")
    assert (tmp_path / "elsewhere" / "new").read_text() == "new"


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


def test_a_name_that_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="could not be written: it is a folder"):
        checkpoint.save("", {"step": 1})
    model = torch.nn.Linear(2, 2)
    with pytest.raises(MetaplError, match="out='' was given"):
        LossTrainer(model, optimizer=torch.optim.SGD(model.parameters())).fit([], steps=1, out="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("flag", ["--out", "--grid"])
def test_predict_replaces_no_device_and_no_pipe(
    flag: str,
    kind: str,
    tiny: Path,  # noqa: F811
    digit: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there, link = tmp_path / "there.png", tmp_path / "link.png"
    KINDS[kind](there)
    link.symlink_to(there)
    before = os.lstat(there)
    for given in (there, link):
        words = refused(capsys, "predict", tiny, digit, flag, given)
        assert f"{flag} {given} is a {kind}; expected a plain file" in words
    assert "nothing was given after" in refused(capsys, "predict", tiny, digit, flag, "")
    assert (os.lstat(there).st_mode, os.lstat(there).st_rdev) == (before.st_mode, before.st_rdev)


def test_predict_writes_through_a_link(
    tiny: Path,  # noqa: F811
    digit: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
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
    name: str,
    tiny: Path,  # noqa: F811
    digit: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert f"--out {name} is a stream; expected a file" in refused(capsys, "predict", tiny, digit, "--out", name)
