"""Trainings on folders as they come: 60,000 files, broken ones, files that block, and memory that stays flat."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import metapl, rows, unprompted
from PIL import Image
from special_files import KINDS
from test_readers import BROKEN, SOUND, promptly
from tiny_runs import color_folders, images_command

from metapl.apps.images import METHODS, Images, Pictures
from metapl.apps.look import settled
from metapl.apps.main import main
from metapl.apps.pictures import check, replaced_files
from metapl.apps.settings import Fitting

SMALL: dict[str, Any] = {"pictures": Pictures(image_size=8, network="small_cnn"), "fitting": Fitting(steps=6)}
PARTS = ("labeled", "unlabeled", "test")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """60,000 unlabelled pictures, most of them under several names."""
    root = color_folders(tmp_path_factory.mktemp("many"))
    for part in range(60):
        folder = root / "unlabeled" / f"{part:02}"
        folder.mkdir()
        one = folder / "000.png"
        Image.fromarray(np.random.default_rng(part).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(one)
        for number in range(1, 1000):
            os.link(one, folder / f"{number:03}.png")
    yield root
    shutil.rmtree(root)  # pytest would keep them for three sessions


@contextmanager
def opened(root: Path) -> Iterator[list[str]]:
    """The pictures below a folder that are opened in the block, whoever opens them."""
    found: list[str] = []
    watching = True

    def note(event: str, given: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(given[0], str | bytes | os.PathLike):
            path = os.fsdecode(given[0])
            found.extend([path] if path.startswith(str(root)) and path.endswith((".bmp", ".png")) else [])

    sys.addaudithook(note)  # there is no way to take it off again
    try:
        yield found
    finally:
        watching = False


def test_training_on_many_files_starts_at_once(many: Path) -> None:
    """No file is opened that no batch needs, but the few that are looked at as a whole."""
    config = settled(Images(**{name: str(many / name) for name in PARTS}, **SMALL), METHODS["uda"], lambda text: None)[
        0
    ]
    with opened(many) as before:
        task = config.data(lambda line: None, False, None)
    assert task.record["unlabeled"] == 60_024
    assert task.record["hash"]["unlabeled"].startswith("names and sizes: ")
    assert not [path for path in before if Path(path).parent.parent.name == "unlabeled"]
    assert 0 < len(before) <= 3 * 48
    with opened(many) as during:
        task.unlabeled[0]
    assert len(during) == len({*during}) == config.unlabeled_batch


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="terminals as Linux has them")
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_terminal_shows_how_far_it_is_and_can_stop_it(interrupted: bool, many: Path, tmp_path: Path) -> None:
    every_look = "import sys, metapl.apps.machine.progress as p; p.EVERY = 0; "
    command = [sys.executable, "-c", every_look + "from metapl.apps.main import main; sys.exit(main())"]
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background was born ignoring it
        os.execv(sys.executable, [*command, *images_command(many, "--out", str(tmp_path / "run"))])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    shown, sent = "", False
    while True:
        if interrupted and not sent and "listing unlabeled files: " in shown:
            sent = os.write(terminal, b"\x03") > 0
        try:
            shown += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            break
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (130 if interrupted else 0), shown
    assert "Traceback" not in shown
    if interrupted:
        assert "go on with:" in shown
        assert not (tmp_path / "run/data.json").exists()
    else:
        for words in (
            "listing unlabeled files: 12,",
            "looking at labeled files: 12 of 12",
            "comparing files: ",
            "fit: ",
        ):
            assert f"\r{words}" in shown


@pytest.mark.long
def test_every_kind_of_file_through_the_command(tmp_path: Path) -> None:
    """Pictures of every kind are learned from; the others are left out by name, and the run says so."""
    root = color_folders(tmp_path / "root")
    broken = {name: content for name, (content, _) in BROKEN.items() if name != "folder.png"}
    for place in ("labeled/red", "unlabeled"):
        for name, content in {**{name: data for name, (data, *_) in SOUND.items()}, **broken}.items():
            path = root / place / name
            content(path) if callable(content) else path.write_bytes(content)
    with promptly(300):
        done = metapl(*images_command(root), "--out", tmp_path / "run")
    assert unprompted(done.stderr) == ""
    words = " ".join(done.stdout.split())
    assert f"labeled: {len(broken)} of {12 + len(SOUND) + len(broken)} files are left out" in words
    assert f"unlabeled: {len(broken)} of {24 + len(SOUND) + len(broken)} files are left out" in words
    assert f"files that could not be read: {2 * len(broken)}, " in words
    places = [str(root / place / name) for place in ("labeled/red", "unlabeled") for name in broken]
    assert {*replaced_files(tmp_path / "run" / "skipped.jsonl")} == {*places}
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["unlabeled"] == 24 + len(SOUND)
    assert {f"red/{name}" for name in SOUND} <= {*data["labeled"], *data["validation"]}


def test_files_that_break_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in folders that are too large to decode first: replaced, recorded once, and counted at the end."""
    root = color_folders(tmp_path / "root")
    cut = [root / name for name in ("labeled/red/red-2.png", "unlabeled/blue-3.png", "unlabeled/red-4.png")]
    for path in cut:
        path.write_bytes(path.read_bytes()[:-60])
    monkeypatch.setattr(check, "DECODE_UP_TO", 1)
    results = []
    for workers in ("0", "2"):
        run = tmp_path / f"run{workers}"
        more = ("--num-workers", workers, "--unlabeled-batch", "8", "--out", str(run))
        assert main(images_command(root, *more)) == 0
        assert "files that could not be read: 3, " in " ".join(capsys.readouterr().out.split())
        assert {*replaced_files(run / "skipped.jsonl")} == {*map(str, cut)}
        results.append(json.loads((run / "result.json").read_text()))
    assert results[0] == results[1]


def test_a_class_of_which_nothing_can_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = color_folders(tmp_path / "root")
    (root / "labeled" / "bee").mkdir()
    (root / "labeled" / "bee" / "1.png").write_bytes(b"")
    assert main(images_command(root, "--out", str(tmp_path / "run"))) == 2
    assert "bee" in capsys.readouterr().err


def test_labels_go_by_the_names_of_the_classes(tmp_path: Path) -> None:
    """A folder that lacks the first class does not move the others."""
    root, told = color_folders(tmp_path / "root"), list[str]()
    shutil.rmtree(root / "test" / "blue")
    config = Images(**{name: str(root / name) for name in PARTS}, **SMALL)
    task = settled(config, METHODS["uda"], lambda text: None)[0].data(told.append, False, None)
    assert task.classes == ("blue", "red")
    assert torch.cat([y for _, y in task.test]).tolist() == [1] * 6
    assert any("no picture of blue" in one for one in told)


def links(folder: Path) -> list[Path]:
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "loop.png").symlink_to("loop.png")
    return [folder / "nowhere.png", folder / "loop.png"]


def test_predict_passes_over_what_is_not_a_plain_file(
    tiny: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(digit, tmp_path / "b.png")
    links(tmp_path)
    for kind, make in KINDS.items():
        make(tmp_path / f"{kind}.png")
    with promptly():
        assert main(["predict", str(tiny), str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert [Path(row["file"]).name for row in rows(told.out)] == ["b.png"]
    assert told.err.count("left out") == 2 + len(KINDS) + 1


# ------------------------------------------------------------------------------------------------------------- memory

GROWTH = """
import sys
from multiprocessing import active_children
from pathlib import Path
import torch
from torch import nn
import metapl
from metapl.apps.pictures import EvaluationBatches, FileImages, LabeledBatches, UnlabeledBatches, Weak
from metapl.data import StepSampler

folder, workers, leak, first, last = sys.argv[1], *map(int, sys.argv[2:])
held, seen = [], []

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

networks = [nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
paths = sorted(Path(folder).rglob("*.png"))
labels = torch.arange(len(paths)) % 2
images, sampler, view = FileImages(paths, size=(8, 8)).cached(), StepSampler(len(paths), 4, seed=0), Leaking(1)
sources = LabeledBatches(images, labels, sampler, view, 0), UnlabeledBatches(images, sampler, Weak(1), view, 0)
given = {"steps": last + 1, "num_workers": workers, "progress": False, "save_every": 200}
validation = EvaluationBatches(images, labels, 8)
Watched(*networks, "loss_difference").fit(*sources, validation=validation, out=f"{folder}/run{workers}{leak}", **given)
print(max((after - before) / (last - first) for before, after in zip(*seen, strict=True)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc as Linux has it")
@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_flat(workers: int, tmp_path: Path) -> None:
    """In MB per 1,000 steps, of the process that grew most; a leak of 10 kB a step shows, in those that read too."""
    color_folders(tmp_path)

    def growth(leak: int, first: int, last: int) -> float:
        command = [sys.executable, "-c", GROWTH, str(tmp_path), *map(str, (workers, leak, first, last))]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert growth(0, 200, 1200 if workers == 0 else 600) < 3
    assert growth(10_000, 100, 400) > (6 if workers == 0 else 3)  # two workers share the steps
