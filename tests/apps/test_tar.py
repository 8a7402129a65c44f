"""Tar files of pictures: listed, read like the folder, and refused where they are not whole."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import color_folders, images_command

from metapl.apps.labels import LabelStore
from metapl.apps.main import main
from metapl.apps.pictures import FileImages, scan_labeled, scan_unlabeled
from metapl.apps.pictures.check import check_folders, verify_files
from metapl.apps.pictures.tar import open_picture
from metapl.errors import MetaplError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """24 pictures, in the folder ``unlabeled`` of a small problem."""
    return color_folders(tmp_path / "data") / "unlabeled"


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


def tarred(folder: Path, to: Path) -> Path:
    """The folder as one tar file, as the page says, in a folder of its own."""
    to.mkdir()
    subprocess.run(["tar", "--sort=name", "--mtime=@0", "-cf", to / "many.tar", "-C", folder, "."], check=True)
    return to


def test_a_tar_file_stands_for_the_folder(pictures: Path, tmp_path: Path) -> None:
    """Pictures, what is said of them, a training, labels, and copies of test pictures."""
    root, deep = pictures.parent, pictures / "deep" / "er"
    deep.mkdir(parents=True)
    (pictures / "blue-0.png").rename(deep / "blue.0.png")
    tars = tarred(pictures, tmp_path / "tars")
    assert (tars / "many.tar").read_bytes() == (tarred(pictures, tmp_path / "again") / "many.tar").read_bytes()
    files, inside = scan_unlabeled(pictures), scan_unlabeled(tars)
    assert [name.split("/", 1)[1] for name in inside.names] == list(files.names)
    loaded = [FileImages(each.paths(), size=(8, 8)).fetch(torch.arange(24))[0] for each in (files, inside)]
    assert torch.equal(*loaded)
    for depth in ("size", "header", "decode"):
        assert verify_files(inside, depth).sound == tuple(range(24))  # type: ignore[arg-type]  # all of a Depth
    losses = []
    for name, unlabeled in (("of-files", pictures), ("of-tars", tars)):
        assert main([*images_command(root, "--out", str(tmp_path / name)), f"--unlabeled={unlabeled}"]) == 0
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([{key: value for key, value in row.items() if "second" not in key} for row in rows])
    assert losses[0] == losses[1]
    assert main(["label", str(tmp_path / "of-files"), str(tars), "--out", str(tmp_path / "labels")]) == 0
    assert "many.tar/deep/er/blue.0.png" in LabelStore(tmp_path / "labels")
    (pictures / "leaked.png").write_bytes((root / "test" / "red" / "red-2.png").read_bytes())
    leaking = scan_unlabeled(tarred(pictures, tmp_path / "leaking"))
    findings = check_folders(scan_labeled(root / "labeled"), leaking, test=scan_labeled(root / "test"))
    assert any("among" in finding.message for finding in findings)


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
        with pytest.raises(MetaplError, match="once"):
            scan_unlabeled(root)
        return
    with pytest.raises(MetaplError, match=r"a\.tar"):
        scan_unlabeled(root)


def test_a_tar_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", **{"1.png": png(10)})
    files = scan_unlabeled(tmp_path)
    assert FileImages(files.paths(), size=(2, 2)).fetch(torch.zeros(1, dtype=torch.int64))[0][0, 0, 0, 0] == 10
    write_tar(path, **{"0.png": png(1), "longer": b"x" * 9999, "1.png": png(20)})
    assert FileImages(files.paths(), size=(2, 2)).fetch(torch.zeros(1, dtype=torch.int64))[0][0, 0, 0, 0] == 20
    with pytest.raises(FileNotFoundError):
        open_picture(path / "2.png")
