"""Tar files of pictures: written, listed, read like the folder, and refused where they are not as they were written."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused, result, said
from PIL import Image
from tiny_runs import color_folders, images_command

from metapl.apps.commands import main
from metapl.apps.labels import LabelStore
from metapl.apps.machine import ownership
from metapl.apps.pictures import FileImages, scan_labeled, scan_unlabeled, shard_writer, shards
from metapl.apps.pictures.check import Finding, check_folders, verify_files
from metapl.apps.pictures.folders import hash_files
from metapl.apps.pictures.shard_writer import check_shards, write_shards
from metapl.errors import MetaplError
from metapl.runs import atomic


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """24 pictures, in the folder ``unlabeled`` of a small problem."""
    return color_folders(tmp_path / "data") / "unlabeled"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_tar(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def png(level: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_the_same_pictures_give_the_same_bytes_and_come_back_as_they_were(pictures: Path, tmp_path: Path) -> None:
    (pictures / "deep" / "er").mkdir(parents=True)
    (pictures / "blue-0.png").rename(pictures / "deep" / "er" / "blue.0.png")
    done: list[int] = []
    manifest = write_shards(pictures, tmp_path / "a", 10, done.append)
    write_shards(pictures, tmp_path / "b", 10)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert (manifest.total, [shard.pictures for shard in manifest.shards], done) == (3, [10, 10, 4], [10, 20, 24])
    files, sharded = scan_unlabeled(pictures), scan_unlabeled(tmp_path / "a")
    assert [name.split("/", 1)[1] for name in sharded.names] == list(files.names)
    assert sharded.names[0] == "000000.tar/blue-1.png"
    every = torch.arange(24)
    assert torch.equal(
        FileImages(sharded.paths(), size=(8, 8)).fetch(every)[0], FileImages(files.paths(), size=(8, 8)).fetch(every)[0]
    )
    for depth in ("size", "header", "decode"):
        assert verify_files(sharded, depth).sound == tuple(range(24))  # type: ignore[arg-type]  # all of a Depth
    before = hash_files(sharded)
    write_shards(pictures, tmp_path / "c", 24)
    assert hash_files(scan_unlabeled(tmp_path / "c")) != before  # other names
    assert check_shards(tmp_path / "a") == manifest


@pytest.mark.parametrize("moment", [1, 3, 5])
def test_a_stopped_writing_goes_on_with_the_same_bytes(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    write_shards(pictures, tmp_path / "whole", 10)
    calls, replace = 0, shard_writer.os.replace

    def stopped(source: str, target: str) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_shards(pictures, tmp_path / "out", 10)
    monkeypatch.undo()
    if moment > 2:
        with pytest.raises(MetaplError, match=r"has [12] of 3 shards.*goes on"):
            scan_unlabeled(tmp_path / "out")
    write_shards(pictures, tmp_path / "out", 10)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.long)])
def test_killed_at_any_moment_it_goes_on_and_leaves_nothing_beside_the_shards(
    kills: int, pictures: Path, tmp_path: Path
) -> None:
    """A process that writes six shards, which is killed some time after it began, again and again, in one folder."""
    whole, out, draw = tmp_path / "whole", tmp_path / "out", random.Random(kills)
    write_shards(pictures, tmp_path / "first", 4)  # which imports what it needs, and takes longer
    begun = time.monotonic()
    write_shards(pictures, whole, 4)
    seconds, killed = time.monotonic() - begun, 0
    for _ in range(kills):
        process = multiprocessing.get_context("fork").Process(target=write_shards, args=(pictures, out, 4))
        process.start()
        time.sleep(draw.uniform(0, seconds / 2))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if not killed % 3:  # else it is killed again on its way
            write_shards(pictures, out, 4)
            assert bytes_of(out) == bytes_of(whole)
            shutil.rmtree(out)
    assert killed
    write_shards(pictures, out, 4)
    assert bytes_of(out) == bytes_of(whole)


@pytest.mark.parametrize("moment", range(1, 9))
def test_killed_between_any_two_steps_of_a_shard(
    moment: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two files is opened, synced, renamed, and its folder synced."""
    write_shards(pictures, tmp_path / "whole", 24)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_killed_at, args=(moment, pictures, tmp_path / "out"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    write_shards(pictures, tmp_path / "out", 24)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def _killed_at(moment: int, pictures: Path, out: Path) -> None:
    """Write shards, and die in the place of a system call that writing makes."""
    calls = 0

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def or_die(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **named)

        return or_die

    atomic.secrets.token_hex = dying(atomic.secrets.token_hex)
    for name in ("fsync", "replace"):
        setattr(os, name, dying(getattr(os, name)))
    write_shards(pictures, out, 24)


def test_two_at_once_do_not_write_to_one_folder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "PATIENCE", 0.1)
    with ownership.owned(tmp_path / "out"), pytest.raises(MetaplError, match=r"another process is running in .*out"):
        write_shards(pictures, tmp_path / "out")


def test_a_training_on_shards_is_that_on_the_folder(pictures: Path, tmp_path: Path) -> None:
    root = pictures.parent
    write_shards(pictures, tmp_path / "tars", 7)
    runs = {}
    for name, unlabeled in (("folder", pictures), ("shards", tmp_path / "tars")):
        command = [*images_command(root, "--out", str(tmp_path / name)), f"--unlabeled={unlabeled}"]
        assert main(command) == 0
        runs[name] = result(tmp_path / name)
    assert runs["folder"]["test_accuracy"] == runs["shards"]["test_accuracy"]
    metrics = [
        [
            {key: value for key, value in json.loads(line).items() if "second" not in key}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in runs
    ]
    assert metrics[0] == metrics[1]
    assert main(["label", str(tmp_path / "folder"), str(tmp_path / "tars"), "--out", str(tmp_path / "labels")]) == 0
    assert "000001.tar/blue-8.png" in LabelStore(tmp_path / "labels")


def test_the_command_writes_and_checks(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    text = said(capsys, "shards", pictures, "--out", out, "--pictures", "9")
    assert re.fullmatch(rf"24 pictures in 3 shards of \d\.\d MB together are written: {re.escape(str(out))}\n", text)
    assert "are as they were written" in said(capsys, "shards", out, "--check")
    (out / "000001.tar").write_bytes((out / "000001.tar").read_bytes()[:-1] + b"x")
    assert "the bytes of 000001.tar are not as they were written" in refused(capsys, "shards", out, "--check")
    (out / "000001.tar").write_bytes(b"")
    assert "000001.tar is not as written (missing, or of another size" in refused(capsys, "shards", out, "--check")
    with pytest.raises(MetaplError, match=r"000001\.tar is not as written"):
        scan_unlabeled(out)
    assert "expected --out DIR to write shards, or --check" in refused(capsys, "shards", pictures)
    assert "--out was given with --check" in refused(capsys, "shards", pictures, "--out", out, "--check")
    assert "has no shards.json" in refused(capsys, "shards", pictures, "--check")
    assert "--pictures 0" in refused(capsys, "shards", pictures, "--out", out, "--pictures", "0")


def test_shards_that_are_not_as_written_are_written_again(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    write_shards(pictures, out, 9)
    whole = bytes_of(out)
    for spoil in (lambda data: data[:-1] + b"x", lambda data: data[:700], lambda data: b""):
        for name in ("000000.tar", "000002.tar"):
            (out / name).write_bytes(spoil(whole[name]))
        (out / "000001.tar").unlink()
        write_shards(pictures, out, 9)
        assert bytes_of(out) == whole
    manifest = json.loads(whole["shards.json"])
    manifest["shards"][1]["pictures"] = 3
    (out / "shards.json").write_text(json.dumps(manifest))
    with pytest.raises(MetaplError, match=r"shards\.json names 24 pictures, and 18 by shard"):
        check_shards(out)


def test_shards_of_pictures_that_were_replaced_are_written_again(pictures: Path, tmp_path: Path) -> None:
    """Also where their names, sizes and times stay the same."""
    out, files = tmp_path / "shards", sorted(pictures.rglob("*.png"))
    files[-1].write_bytes(bytes(range(100)))
    write_shards(pictures, out, 9)
    before, status = bytes_of(out), files[-1].stat()
    files[-1].write_bytes(bytes(range(100))[::-1])
    os.utime(files[-1], ns=(status.st_atime_ns, status.st_mtime_ns))
    write_shards(pictures, out, 9)
    write_shards(pictures, tmp_path / "anew", 9)
    assert bytes_of(out) == bytes_of(tmp_path / "anew")
    assert {name for name, data in bytes_of(out).items() if data != before[name]} == {"000002.tar", "shards.json"}


def test_files_that_are_no_pictures_are_told_of(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "cut.png").write_bytes(png()[:20])
    (pictures / "text.png").write_text("no picture")
    text = " ".join(said(capsys, "shards", pictures, "--out", tmp_path / "shards").split())
    assert "2 files cannot be read as pictures, and will be left out of a training:" in text
    assert "cut.png" in text
    assert "text.png" in text
    assert "cannot be read" not in said(capsys, "shards", pictures, "--out", tmp_path / "shards")  # as it was
    (pictures / "nowhere.png").symlink_to("gone.png")
    (pictures / "loop.png").symlink_to("loop.png")
    os.mkfifo(pictures / "pipe.png")
    text = " ".join(said(capsys, "shards", pictures, "--out", tmp_path / "others").split())
    assert "26 pictures in 1 shard" in text
    assert "5 files cannot be read as pictures" in text
    assert all(name in text for name in ("nowhere.png", "loop.png", "pipe.png"))


def test_nothing_is_written_into_a_folder_of_something_else(pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "note.txt").write_text("mine")
    for out, words in (
        (other, r"has note\.txt in it"),
        (other / "note.txt", "is a file"),
        (pictures / "shards", "lies in"),
    ):
        with pytest.raises(MetaplError, match=words):
            write_shards(pictures, out)
    write_shards(pictures, tmp_path / "out", 10)
    before = bytes_of(tmp_path / "out")
    with pytest.raises(MetaplError, match="or of another size"):
        write_shards(pictures, tmp_path / "out", 12)
    (pictures / "blue-3.png").unlink()
    with pytest.raises(MetaplError, match="holds shards of 24 other pictures"):
        write_shards(pictures, tmp_path / "out", 10)
    assert bytes_of(tmp_path / "out") == before


def test_a_full_disk_loses_no_shard_that_was_written(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, *given: object, **named: object) -> None:
        if len(list((tmp_path / "out").glob("*.tar"))) == 2:
            raise OSError(28, "No space left on device")
        add(self, *given, **named)

    add = tarfile.TarFile.addfile
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(MetaplError, match=r"out cannot be written: No space left on device.*goes on"):
        write_shards(pictures, tmp_path / "out", 10)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.tar", "000001.tar", "shards.json"]
    write_shards(pictures, tmp_path / "out", 10)
    check_shards(tmp_path / "out")


def test_tar_files_of_others(tmp_path: Path) -> None:
    """As `tar cf` and WebDataset write them: names that begin with ./, labels beside pictures, hidden files."""
    root = tmp_path / "many"
    root.mkdir()
    write_tar(root / "b.tar", **{"./x/1.png": png(10), "./x/1.cls": b"3", "./.hidden/2.png": png(), "../3.png": png()})
    write_tar(root / "a.tar", **{"/9.png": png(90), "x/1.png": png(50)})
    files = scan_unlabeled(root)
    assert files.names == ("a.tar/9.png", "a.tar/x/1.png", "b.tar/x/1.png")
    assert dict(files.passed_over) == {".cls": 1}
    fetched, _ = FileImages(files.paths(), size=(2, 2)).fetch(torch.arange(3))
    assert fetched[:, 0, 0, 0].tolist() == [90, 50, 10]
    (root / "loose.png").write_bytes(png())
    assert scan_unlabeled(root).names == ("loose.png",)  # beside pictures, a tar file is a backup


@pytest.mark.parametrize("kind", ["cut", "compressed", "text", "twice"])
def test_a_tar_file_that_is_not_whole_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "many"
    root.mkdir()
    path = write_tar(root / "a.tar", **{"1.png": png(), "2.png": png()})
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:1500])
    if kind == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            tar.add(__file__, "1.png")
    if kind == "text":
        path.write_text("no tar file " * 100)
    if kind == "twice":
        with tarfile.open(path, "a") as tar:
            member = tarfile.TarInfo("1.png")
            tar.addfile(member, io.BytesIO())
        with pytest.raises(MetaplError, match=r"a\.tar has 1\.png more than once"):
            scan_unlabeled(root)
        return
    with pytest.raises(
        MetaplError, match=r"a\.tar cannot be read as a tar file: .*; expected a whole, uncompressed one"
    ):
        scan_unlabeled(root)


def test_a_tar_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", **{"1.png": png(10)})
    files = scan_unlabeled(tmp_path)
    assert FileImages(files.paths(), size=(2, 2)).fetch(torch.zeros(1, dtype=torch.int64))[0][0, 0, 0, 0] == 10
    write_tar(path, **{"0.png": png(1), "longer": b"x" * 9999, "1.png": png(20)})
    assert FileImages(files.paths(), size=(2, 2)).fetch(torch.zeros(1, dtype=torch.int64))[0][0, 0, 0, 0] == 20
    with pytest.raises(FileNotFoundError):
        shards.open_picture(path / "2.png")


def test_copies_of_test_pictures_are_found_in_shards_too(pictures: Path, tmp_path: Path) -> None:
    root = pictures.parent
    (pictures / "leaked.png").write_bytes((root / "test" / "red" / "red-2.png").read_bytes())
    write_shards(pictures, tmp_path / "shards", 10)
    found: list[Finding] = check_folders(
        scan_labeled(root / "labeled"), scan_unlabeled(tmp_path / "shards"), test=scan_labeled(root / "test")
    )
    assert any("is among" in finding.message or "are among" in finding.message for finding in found)
