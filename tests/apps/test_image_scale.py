"""Folders as they come: long runs whose memory stays flat, 60,000 files, and files of every kind, broken ones too."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import metapl, unprompted
from PIL import Image

from metapl.apps.images import METHODS, Images, Pictures
from metapl.apps.look import settled
from metapl.apps.main import main
from metapl.apps.pictures import check
from metapl.apps.pictures.check import check_folders
from metapl.apps.pictures.folders import hash_files, scan_labeled, scan_unlabeled
from metapl.apps.pictures.store import replaced_files
from metapl.apps.settings import Fitting
from metapl.errors import MetaplError

TINY = (
    *("--image-size", "8", "--network", "small_cnn", "--precision", "float32", "--labeled-batch", "8"),
    *("--unlabeled-batch", "8", "--method", "mpl", "--mode", "loss_difference", "--steps", "6"),
    *(
        "--finetune-steps",
        "2",
    ),
    *("--validate-every", "3", "--log-every", "3", "--save-every", "3"),
)

SMALL: dict[str, Any] = {"pictures": Pictures(image_size=8, network="small_cnn"), "fitting": Fitting(steps=6)}


def picture(path: Path, seed: int, side: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return path


def pictures(root: Path, **counts: int) -> None:
    """So many pictures in each folder, no two the same; ``labeled__a`` is labeled/a."""
    seeds = iter(range(10_000))
    for name, count in counts.items():
        for number in range(count):
            picture(root / name.replace("__", "/") / f"{number}.png", next(seeds))


def folders(root: Path, *names: str) -> list[str]:
    return [part for name in names for part in (f"--{name}", str(root / name))]


# ------------------------------------------------------------------------------------------------------------- memory

GROWTH = """
import sys
from multiprocessing import active_children
from pathlib import Path

import torch
from torch import nn

import metapl
from metapl.apps.pictures import FileImages, EvaluationBatches, LabeledBatches, UnlabeledBatches
from metapl.data import StepSampler
from metapl.apps.pictures import Weak

held = []

def taken(process="self"):
    # Of its own, in kB: what is kept in shared memory grows until every picture was read once.
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

class Leaking(Weak):
    def __call__(self, images, **where):
        held.append(bytes(leak))
        return super().__call__(images, **where)

class Watched(metapl.BilevelTrainer):
    def step(self, labeled, unlabeled=None):
        if self.steps_done in (first, last):
            seen.append([taken(), *sorted(taken(child.pid) for child in active_children())])
        return super().step(labeled, unlabeled)

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2))

paths = sorted(Path(sys.argv[1]).rglob("*.png"))
labels = torch.arange(len(paths)) % 2
for number, line in enumerate(sys.stdin):
    workers, leak, first, last = map(int, line.split())
    seen = []
    images = FileImages(paths, size=(8, 8)).cached()
    sampler, view = StepSampler(len(paths), 4, seed=0), Leaking(1)
    Watched(network(), network(), "loss_difference").fit(
        LabeledBatches(images, labels, sampler, view, 0),
        UnlabeledBatches(images, sampler, Weak(1), view, 0),
        steps=last + 1,
        validation=EvaluationBatches(images, labels, 8),
        out=f"{sys.argv[1]}/run{number}",
        num_workers=workers,
        progress=False,
        save_every=200,
    )
    # Of this process, and of the worker that took most.
    growth = [after - before for before, after in zip(*seen, strict=True)]
    print(growth[0], max(growth[1:], default=0), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc as Linux has it")
@pytest.mark.long
def test_memory_is_flat(tmp_path: Path) -> None:
    """Over 1,000 steps, and a leak of 10 kB a step shows, in the process that trains and in those that read."""
    pictures(tmp_path, any=24)
    with subprocess.Popen(
        [sys.executable, "-c", GROWTH, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def growth(workers: int, leak: int, first: int, last: int) -> list[float]:
            """In MB per 1,000 steps."""
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{workers} {leak} {first} {last}\n")
            process.stdin.flush()
            return [int(kilobytes) / (last - first) for kilobytes in process.stdout.readline().split()]

        assert max(growth(0, 0, 200, 1200)) < 3
        assert max(growth(2, 0, 150, 550)) < 3
        assert growth(0, 10_000, 100, 400)[0] > 6
        # The two workers of a loader share the steps.
        assert growth(2, 10_000, 100, 400)[1] > 3


# ------------------------------------------------------------------------------------------------------- 60,000 files

OPENED: list[str] | None = None
"""The files that this process opens, while somebody asks."""


def _note(event: str, given: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open" and isinstance(given[0], str | bytes | os.PathLike):
        OPENED.append(os.fsdecode(given[0]))


@contextlib.contextmanager
def opened(root: Path) -> Iterator[list[str]]:
    """The pictures below a folder that are opened in the block, whoever opens them."""
    global OPENED
    if "installed" not in vars(_note):
        sys.addaudithook(_note)  # there is no way to take it off again
        vars(_note)["installed"] = True
    found: list[str] = []
    OPENED = []
    try:
        yield found
    finally:
        found += [path for path in OPENED if path.startswith(str(root)) and path.endswith(".png")]
        OPENED = None


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """60,000 unlabelled pictures, most of them under several names."""
    root = tmp_path_factory.mktemp("many")
    pictures(root, labeled__a=10, labeled__b=10, test__a=10, test__b=10)
    for part in range(60):
        one = picture(root / "unlabeled" / f"{part:02}" / "000.png", 1000 + part, side=20)
        for number in range(1, 1000):
            os.link(one, one.with_name(f"{number:03}.png"))
    yield root
    shutil.rmtree(root)  # pytest would keep them for three sessions


@pytest.mark.slow
def test_training_on_many_files_starts_at_once(many: Path) -> None:
    """No file is opened that no batch needs, but the few that are looked at as a whole."""
    folders = {name: str(many / name) for name in ("labeled", "unlabeled", "test")}
    config = settled(Images(**folders, **SMALL), METHODS["uda"], lambda text: None)[0]
    said: list[str] = []
    with opened(many) as before:
        task = config.data(said.append, False, None)
    assert said == ["20 labeled pictures of 2 classes (a, b), 60,000 unlabeled, none for validation, 20 to test on"]
    assert [path for path in before if "/unlabeled/" in path] == []
    assert 0 < len(before) <= 3 * 40
    assert task.record["unlabeled"] == 60_000
    assert task.record["hash"]["unlabeled"].startswith("names and sizes: ")
    with opened(many) as during:
        task.unlabeled[0]
    assert len(during) == len(set(during)) == config.fitting.unlabeled_batch


def test_unlabelled_files_are_looked_into_for_copies_of_held_out_ones_alone(tmp_path: Path) -> None:
    """Pictures without compression all have one size, which says nothing."""
    for number, name in enumerate(("labeled/a/1", "labeled/b/1", "unlabeled/1", "unlabeled/2", "test/a/1", "test/b/1")):
        path = picture(tmp_path / f"{name}.png", number)
        Image.open(path).save(path, "BMP")
    labeled, unlabeled = scan_labeled(tmp_path / "labeled"), scan_unlabeled(tmp_path / "unlabeled")
    with opened(tmp_path) as found:
        assert not [one for one in check_folders(labeled, unlabeled) if one.level == "error"]
    # Every labelled file may have a twin by its size, so the unlabelled ones are read for the note on that.
    parts = sorted(Path(path).relative_to(tmp_path).parts[0] for path in found)
    assert parts == ["labeled", "labeled", "unlabeled", "unlabeled"]
    with opened(tmp_path) as found:
        check_folders(labeled, unlabeled, test=scan_labeled(tmp_path / "test"))
    assert len(found) == 6


def test_large_folders_are_known_by_names_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changes() -> Iterator[str]:
        """Of a folder: as it is; other bytes; another size; another name."""
        path = tmp_path / "a.png"
        path.write_bytes(b"123")
        for content, name in ((b"123", "a"), (b"124", "a"), (b"1234", "a"), (b"1234", "b")):
            path = path.rename(tmp_path / f"{name}.png")
            path.write_bytes(content)
            yield hash_files(scan_unlabeled(tmp_path))

    assert len(set(changes())) == 4
    (tmp_path / "b.png").unlink()
    for limit in ("WHOLE_UP_TO", "WHOLE_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(f"metapl.apps.pictures.folders.{limit}", 0)
            first, *others = changes()
            assert first.startswith("names and sizes: ")
            assert [one == first for one in others] == [True, False, False]
        (tmp_path / "b.png").unlink()


def test_how_far_files_are_looked_into_depends_on_their_sizes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "1.png", 1)
    files = scan_unlabeled(tmp_path)
    assert check.verify_files(files).depth == "decode"
    monkeypatch.setattr(check, "DECODE_BYTES", 10)
    assert check.verify_files(files).depth == "header"


# ------------------------------------------------------------------------------------------------------- the terminal

# Every look is shown, however fast the machine is.
SHOWING_ALL = (
    "import sys, metapl.apps.machine.progress as p; p.EVERY = 0; from metapl.apps.main import main; sys.exit(main())"
)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.file = pty.fork()
        if not self.pid:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background was born ignoring it
            os.execv(sys.executable, [sys.executable, "-c", SHOWING_ALL, *arguments])
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.shown = ""

    def until(self, words: str | None) -> None:
        """Read on until something is shown; None: to the end."""
        while words is None or words not in self.shown:
            try:
                new = os.read(self.file, 65536)
            except OSError:  # the other end is closed
                break
            if not new:
                break
            self.shown += new.decode(errors="replace")

    def end(self) -> int:
        self.until(None)
        os.close(self.file)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def screen(self) -> list[str]:
        """What is left to see: later texts on a line cover earlier ones."""
        lines = []
        for line in self.shown.replace("\r\n", "\n").split("\n"):
            seen = ""
            for part in line.split("\r"):
                seen = part + seen[len(part) :]
            lines.append(seen.rstrip())
        return lines


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="terminals as Linux has them")
def test_the_terminal_shows_how_far_it_is(many: Path, tmp_path: Path) -> None:
    command = ("train", "images", *folders(many, "labeled", "unlabeled", "test"), *TINY, "--num-workers", "2")
    terminal = Terminal(*command, "--out", str(tmp_path / "run"))
    code = terminal.end()
    assert code == 0, terminal.shown
    for words in (
        "\rlisting unlabeled files: 12,000",
        "\rlooking at unlabeled files: 12,000 of 60,000",
        "\rlooking at labeled files: 20 of 20",
        "\rcomparing files: ",
        "\rfit: ",
        "\rfinetune: ",
    ):
        assert words in terminal.shown
    # Lines are broken at the terminal's width.
    words = " ".join(terminal.screen())
    chosen, by, rest = words.partition(f"images by Meta Pseudo Labels, seed 0 -> {tmp_path / 'run'} ")
    assert chosen.startswith("chosen: small_cnn on 8x8 color pictures (shrunk from about 20), ")
    assert by
    listed = "20 labeled pictures of 2 classes (a, b), 60,000 unlabeled, none for validation, 20 to test on"
    assert rest.startswith(f"{listed} Test accuracy of the finetuned student: ")  # no line of progress is left


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="terminals as Linux has them")
def test_control_c_while_it_lists(many: Path, tmp_path: Path) -> None:
    command = ("train", "images", *folders(many, "labeled", "unlabeled", "test"), *TINY, "--num-workers", "2")
    terminal = Terminal(*command, "--out", str(tmp_path / "run"))
    terminal.until("listing unlabeled files: ")
    os.write(terminal.file, b"\x03")
    assert terminal.end() == 130, terminal.shown
    assert "Traceback" not in terminal.shown
    assert "go on with:" in terminal.shown
    assert not (tmp_path / "run/data.json").exists()


def test_what_is_no_terminal_is_shown_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    from metapl.apps.machine.progress import counting

    with counting("listing", shown=True) as count:
        time.sleep(0.2)
        count(5)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------- kinds of files


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG of 8 bits of grey that says what it likes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def odd_files() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Files that can be used, and files that cannot."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    colors = Image.fromarray(noise)
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = colors.quantize(16)
    sound = {
        "sixteen_bits.png": encoded(Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "PNG"),
        "cmyk.jpg": encoded(colors.convert("CMYK"), "JPEG"),
        "palette.png": encoded(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "turned.jpg": encoded(colors, "JPEG", exif=turned),
        # A hundred megabytes of zeros where a few would do, and a large picture in a small file.
        "more_zeros.png": png(100, 100, bytes(10**8)),
        "zeros.png": png(4000, 4000, bytes(4001 * 4000)),
    }
    broken = {
        "bomb.png": png(30_000, 30_000, bytes(100_000)),
        "comment.png": png(4, 4, bytes(20), chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**8)))),
        "words.png": b"these are words",
        "empty.jpg": b"",
        "cut.jpg": encoded(colors, "JPEG")[:-700],
    }
    return sound, broken


@pytest.mark.long
@pytest.mark.slow
def test_every_kind_of_file_through_the_command(tmp_path: Path) -> None:
    sound, broken = odd_files()
    pictures(tmp_path, labeled__a=4, labeled__b=4, unlabeled__deep=4)
    for place in ("labeled/a", "labeled/b", "unlabeled/deep"):
        for name, content in broken.items():
            (tmp_path / place / name).write_bytes(content)
    for name, content in sound.items():
        for place in ("labeled/a", "unlabeled/deep"):
            (tmp_path / place / name).write_bytes(content)
    (tmp_path / "unlabeled/notes.txt").write_text("passed over")
    run = tmp_path / "run"
    done = metapl("train", "images", *folders(tmp_path, "labeled", "unlabeled"), *TINY, "--out", run)
    assert unprompted(done.stderr) == ""
    assert "labeled: 10 of 24 files are left out" in done.stdout
    assert "unlabeled: 5 of 15 files are left out" in done.stdout
    assert "unlabeled: files without the name of a picture are passed over: 1 with .txt" in done.stdout
    joined = " ".join(done.stdout.split())
    for reason in (
        "2 skipped: the picture has more than the 89,478,485 pixels that are allowed (a/bomb.png, b/bomb.png)",
        "1 skipped: the file is empty (deep/empty.jpg)",
        "1 skipped: not a picture of a known format (deep/words.png)",
        "1 skipped: the picture is truncated (deep/cut.jpg)",
        "1 skipped: the picture cannot be decoded (deep/comment.png)",
    ):
        assert reason in joined
    assert f"files that could not be read: 15, listed in {run / 'skipped.jsonl'}" in joined
    found = replaced_files(run / "skipped.jsonl")
    assert set(found) == {
        str(tmp_path / place / name) for place in ("labeled/a", "labeled/b", "unlabeled/deep") for name in broken
    }
    data = json.loads((run / "data.json").read_text())
    assert data["unlabeled"] == 4 + len(sound)
    used = data["labeled"] + data["validation"]
    assert {f"a/{name}" for name in sound} <= set(used)
    assert len(used) == 8 + len(sound)


@pytest.mark.slow
def test_files_that_break_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in folders that are too large to decode first: replaced, recorded once, and counted at the end."""
    pictures(tmp_path, labeled__a=6, labeled__b=6, val__a=3, val__b=3, unlabeled=12)
    cut = [tmp_path / name for name in ("labeled/a/2.png", "val/b/1.png", "unlabeled/3.png", "unlabeled/4.png")]
    for path in cut:
        path.write_bytes(path.read_bytes()[:-60])
    monkeypatch.setattr(check, "DECODE_UP_TO", 1)
    results = []
    for workers in ("0", "2"):
        run = tmp_path / f"run{workers}"
        given = ["train", "images", *folders(tmp_path, "labeled", "unlabeled", "val"), *TINY, "--out", str(run)]
        assert main([*given, "--num-workers", workers]) == 0
        said = capsys.readouterr()
        assert unprompted(said.err) == ""
        assert "left out" not in said.out
        words = f"files that could not be read: 4, listed in {run / 'skipped.jsonl'}"
        assert words in " ".join(said.out.split())
        lines = (run / "skipped.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["file"] for line in lines) == sorted(map(str, cut))
        assert all("truncated" in reason for reason in replaced_files(run / "skipped.jsonl").values())
        results.append(json.loads((run / "result.json").read_text()))
    assert results[0] == results[1]
    assert "evaluation" not in results[0]
    assert round(5 * results[0]["validation_accuracy"], 6) in range(6)


def test_a_class_of_which_nothing_can_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path, labeled__a=2, unlabeled=1)
    (tmp_path / "labeled/b").mkdir()
    (tmp_path / "labeled/b/1.png").write_bytes(b"")
    given = ["train", "images", *folders(tmp_path, "labeled", "unlabeled"), *TINY, "--out", str(tmp_path / "run")]
    assert main(given) == 2
    assert re.search("class 'b' has no picture", capsys.readouterr().err)


def test_labels_go_by_the_names_of_the_classes(tmp_path: Path) -> None:
    """A folder that lacks the first class does not move the others."""
    pictures(tmp_path, labeled__a=2, labeled__b=2, labeled__c=2, val__b=2, val__c=2, test__c=2, unlabeled=1)
    config = Images(**{name: str(tmp_path / name) for name in ("labeled", "unlabeled", "val", "test")}, **SMALL)
    said: list[str] = []
    task = settled(config, METHODS["uda"], lambda text: None)[0].data(said.append, False, None)
    assert task.classes == ("a", "b", "c")
    assert torch.cat([y for _, y in task.validation]).tolist() == [1, 1, 2, 2]
    assert torch.cat([y for _, y in task.test]).tolist() == [2, 2]
    assert any("the validation folder" in one and "no picture of a: nothing is measured there" in one for one in said)
    val = scan_labeled(tmp_path / "val")
    assert val.targets().tolist() == [0, 0, 1, 1]
    assert val.targets(("c", "b")).tolist() == [1, 1, 0, 0]
    with pytest.raises(MetaplError, match=r"has pictures of c; expected a, b alone"):
        val.targets(("a", "b"))
