"""Files that block, never end, or are larger than any memory, wherever they are met."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import refused, rows, said
from PIL import Image
from special_files import bound, device
from tiny_runs import color_folders, images_command

from metapl.apps.comparison import parse_seeds
from metapl.apps.main import main
from metapl.apps.pictures.check import check_folders, same_pictures, verify_files
from metapl.apps.pictures.csv_files import csv_rows
from metapl.apps.pictures.folders import hash_files, scan_labeled, scan_unlabeled
from metapl.apps.pictures.reader import UnreadableImage, gray_image, image_size, read_image
from metapl.apps.run import RunFolder
from metapl.errors import MetaplError


def looped(path: Path) -> None:
    path.symlink_to(path)


def endless(path: Path) -> None:
    """A device that never ends, of this test's own."""
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root may make devices")


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": bound,
    "device": device,
    "device that never ends": endless,
}
REASON = {name: f"it is a {name.split()[0]}" for name in KINDS}


@contextmanager
def promptly(seconds: float = 60.0) -> Iterator[None]:
    """What hangs ends the test, not the suite."""
    timer = threading.Timer(seconds, lambda: os._exit(99))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_refuses_what_is_not_a_plain_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    KINDS[kind](path)
    with promptly():
        for read in (read_image, image_size, lambda path: gray_image(path, 8)):
            with pytest.raises(UnreadableImage, match=REASON[kind]):
                read(path)
        with pytest.raises(MetaplError, match=REASON[kind]):
            csv_rows(path, 2, 1.0)
        verified = verify_files(scan_unlabeled(tmp_path))
        assert verified.sound == ()
        assert next(iter(verified.skipped.values())).startswith(REASON[kind])
        path.rename(tmp_path / "recipe.json")
        with pytest.raises(MetaplError, match=r"recipe\.json"):
            RunFolder(tmp_path).recipe()


@pytest.mark.parametrize("kind", [*KINDS, "link to itself"])
def test_predict_passes_over_what_is_not_a_plain_file(
    kind: str, tiny: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(digit, folder / "b.png")
    for suffix in ("png", "csv"):
        KINDS.get(kind, looped)(folder / f"a.{suffix}")
    with promptly():
        assert main(["predict", str(tiny), str(folder)]) == 1
    told = capsys.readouterr()
    assert [Path(row["file"]).name for row in rows(told.out)] == ["b.png"]
    assert told.err.count("left out") == 3
    assert "Traceback" not in told.err


def test_training_passes_over_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = color_folders(tmp_path / "root")
    for place in ("labeled/red", "unlabeled", "test/blue"):
        os.mkfifo(root / place / "pipe.png")
        looped(root / place / "loop.png")
    with promptly(300):
        text = said(capsys, *images_command(root), "--out", tmp_path / "run")
        assert text.count("2 of") == 3
        assert "it is a pipe" in text
        assert main(["evaluate", str(tmp_path / "run"), "--test", str(root / "test")]) == 1


def dangling(path: Path) -> None:
    path.symlink_to("gone.png")


@pytest.mark.parametrize("kind", [looped, dangling, os.mkfifo])
def test_a_link_that_leads_nowhere_stops_no_comparison_of_folders(kind: Callable[[Path], None], tmp_path: Path) -> None:
    """It is the copy of nothing; whoever reads the pictures leaves it out by name."""
    root = color_folders(tmp_path / "root")
    places = ("labeled/red", "unlabeled", "test/blue")
    folders = (scan_labeled(root / "labeled"), scan_unlabeled(root / "unlabeled"), scan_labeled(root / "test"))
    before = (check_folders(folders[0], folders[1], None, folders[2]), [*same_pictures(*folders[:2])])
    for place in places:
        kind(root / place / "x.png")
    more = (scan_labeled(root / "labeled"), scan_unlabeled(root / "unlabeled"), scan_labeled(root / "test"))
    assert [len(files) for files in more] == [len(files) + 1 for files in folders]
    with promptly():
        assert (check_folders(more[0], more[1], None, more[2]), [*same_pictures(*more[:2])]) == before
        assert hash_files(more[1]) != hash_files(folders[1])
        assert hash_files(more[1]) == hash_files(more[1])


def test_a_link_that_leads_nowhere_stops_no_selection_and_no_suspects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = color_folders(tmp_path / "root")
    for folder in (root / "labeled" / "red", root / "test" / "red"):
        dangling(folder / "nowhere.png")
        looped(folder / "loop.png")
    flags = ("--steps", "2", "--image-size", "8", "--network", "small_cnn", "--finetune-steps", "1", "--device", "cpu")
    noisy = ("train", "noisy", "--labeled", root / "labeled", "--clean", root / "test", *flags)
    text = " ".join(said(capsys, *noisy, "--out", tmp_path / "run").split())
    assert "labeled: 2 of 14 files are left out" in text
    assert "clean: 2 of 14 files are left out" in text
    said(capsys, "label", tmp_path / "run", root / "unlabeled", "--out", tmp_path / "store")
    select = ("labels", "select", tmp_path / "store", "--out", tmp_path / "few", "--drop-overlap", root / "labeled")
    assert f" 2  files cannot be read in {root / 'labeled'}\n" in said(capsys, *select)
    links = [root / "test" / "red" / name for name in ("nowhere.png", "loop.png")]
    assert main(["predict", str(tmp_path / "run"), *map(str, links), str(root / "test" / "red" / "red-0.png")]) == 1
    assert "metapl: 2 of 3 files left out" in capsys.readouterr().err


def test_folders_a_thousand_deep(digit: Path, tmp_path: Path) -> None:
    """Python's own walk refuses them before 3.12."""
    top = tmp_path / "deep"
    top.mkdir()
    before = os.getcwd()
    os.chdir(top)
    try:
        for _ in range(1000):  # with short names, so that the whole path can still be opened
            os.mkdir("d")
            os.chdir("d")
        shutil.copy(digit, "x.png")
    finally:
        os.chdir(before)
    try:
        if sys.version_info >= (3, 12):
            assert len(scan_unlabeled(top).names) == 1
        else:
            with pytest.raises(MetaplError, match="folders in folders"):
                scan_unlabeled(top)
    finally:
        subprocess.run(["rm", "-rf", str(top)], check=True)  # Python's own rmtree calls itself


def test_the_walk_is_that_of_before(tmp_path: Path) -> None:
    """In the order of the names, links followed, each folder once, and what is taken from the list not gone into."""
    for name in ("b/2.png", "a/1.png", "a/x/3.png", "B/4.png", ".hidden/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert scan_unlabeled(tmp_path).names == ("B/4.png", "a/1.png", "a/x/3.png", "b/2.png")
    assert scan_labeled(tmp_path).classes == ("B", "a", "b")


@pytest.mark.parametrize(
    "flags",
    [
        ("--labeled-batch", "100000000000"),
        ("--unlabeled-batch", "100000000000"),
        ("--hidden", "1000000000000"),
        ("--hidden", *["1"] * 100),
        ("--threads", "2147483647"),
        ("--steps", "100000000000000"),
        ("--compare", "--seeds", "0-99999999999"),
        ("--compare", "--seeds", "99999999999999999999999999"),
        ("--compare", "--seeds", ",".join(f"{10_000 * k}-{10_000 * k + 9_999}" for k in range(3))),
    ],
)
def test_sizes_that_no_machine_has_are_refused(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with promptly():
        words = refused(capsys, "train", "digits", *flags, "--out", tmp_path / "run")
    assert "expected" in words
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags", [("--num-workers", "2147483647"), ("--image-size", "1000000"), ("--finetune-batch", "1000000000000")]
)
def test_sizes_of_pictures_that_no_machine_has_are_refused(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = refused(capsys, *images_command(tmp_path), *flags, "--out", tmp_path / "run")
    assert "expected" in words


def test_as_many_seeds_as_anybody_takes() -> None:
    assert len(parse_seeds("0-9999")) == 10_000


MEASURED = """
import resource, sys
from metapl.apps.pictures.reader import read_image, UnreadableImage
small, *huge = sys.argv[1:]
read_image(small, size=(8, 8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in huge:
    try:
        print(tuple(read_image(path, size=(32, 32)).shape))
    except UnreadableImage as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_a_huge_picture_takes_less_than_500_megabytes(tmp_path: Path) -> None:
    """Neither of those that are read, nor the one that is refused: their peak is that of the process."""
    files = [tmp_path / "small.png"]
    Image.new("RGB", (8, 8)).save(files[0])
    for mode, side in (("RGBA", 9_400), ("P", 9_400), ("1", 13_000)):
        files.append(tmp_path / f"{mode}.png")
        Image.new(mode, (side, side), (10, 20, 30, 255) if mode == "RGBA" else 1).save(files[-1], compress_level=1)
    command = [sys.executable, "-c", MEASURED, *map(str, files)]
    *read, refused, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert read == ["(3, 32, 32)"] * 2
    assert "more than the 89,478,485 pixels" in refused
    assert float(megabytes) < 500


def test_a_large_picture_is_shrunk_to_what_it_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy

    rng = numpy.random.default_rng(0)
    levels = rng.integers(0, 256, (6, 8, 3)).astype("uint8").repeat(50, 0).repeat(50, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image in (("rgb", Image.fromarray(levels)), ("rgba", Image.fromarray(levels).convert("RGBA"))):
        image.save(tmp_path / f"{name}.png", exif=exif)
        whole = read_image(tmp_path / f"{name}.png", size=(16, 12)).int()
        monkeypatch.setattr("metapl.apps.pictures.reader.LARGE", 100)
        shrunk = read_image(tmp_path / f"{name}.png", size=(16, 12)).int()
        monkeypatch.undo()
        assert (whole - shrunk).abs().float().mean() < 6
        assert whole.float().std() > 20
