"""Trainings on folders as they come: many files, broken ones, files that block, memory that stays flat, and names that
move no cursor, are no formula, and no Markdown."""

import csv
import fcntl
import hashlib
import io
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import metapl, result
from PIL import Image
from test_readers import SPECIAL, promptly
from tiny_runs import color_folders, images_command

from metapl.apps.images import METHODS, Images, Pictures
from metapl.apps.look import settled
from metapl.apps.pictures import check, folders, replaced_files
from metapl.apps.pictures.csv_files import CsvRows
from metapl.apps.settings import Fitting
from metapl.errors import few
from metapl.words import TURNS, shown

SMALL: dict[str, Any] = {"pictures": Pictures(image_size=8, network="small_cnn"), "fitting": Fitting(steps=6)}
PARTS = ("labeled", "unlabeled", "test")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 unlabeled pictures more, of a size of their own."""
    root = color_folders(tmp_path_factory.mktemp("many"))
    (root / "unlabeled" / "more").mkdir()
    one = root / "unlabeled" / "more" / "000.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(one)
    for number in range(1, 600):
        os.link(one, one.with_name(f"{number:03}.png"))
    return root


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


def test_training_on_many_files_starts_at_once(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is opened that no batch needs, but the few that are looked at as a whole."""
    for limit in (check, "DECODE_UP_TO"), (folders, "WHOLE_UP_TO"):
        monkeypatch.setattr(*limit, 100)
    given = Images(**{name: str(many / name) for name in PARTS}, **SMALL)
    config = settled(given, METHODS["uda"], lambda text: None)[0]
    with opened(many) as before:
        task = config.data(lambda line: None, False, None)
    assert task.record["unlabeled"] == 624
    assert task.record["hash"]["unlabeled"].startswith("names and sizes: ")
    assert not [path for path in before if Path(path).parent.name == "more"]
    assert 0 < len(before) <= 3 * 48
    with opened(many) as during:
        task.unlabeled[0]
    assert len(during) == len({*during}) == config.unlabeled_batch


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="terminals as Linux has them")
def test_a_terminal_shows_how_far_it_is(many: Path, tmp_path: Path) -> None:
    every_look = "import sys, metapl.apps.machine.progress as p; p.EVERY = 0; "
    command = [sys.executable, "-c", every_look + "from metapl.apps.main import main; sys.exit(main())"]
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [*command, *images_command(many, "--out", str(tmp_path / "run"))])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    shown = ""
    with suppress(OSError):  # the other end is closed
        while True:
            shown += os.read(terminal, 65536).decode(errors="replace")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
    for words in ("listing unlabeled files: ", "looking at labeled files: 12 of 12", "comparing files: ", "fit: "):
        assert f"\r{words}" in shown


def test_files_that_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it trains, as in folders that are too large to decode first: they are replaced, recorded once, and counted
    at the end. Where all are decoded first, they are left out. A class that has no other file is named."""
    root = color_folders(tmp_path / "root")
    cut = [root / name for name in ("labeled/red/red-2.png", "unlabeled/blue-3.png", "unlabeled/red-4.png")]
    for path in cut:
        path.write_bytes(path.read_bytes()[:-60])
    results, told = [], ""
    for first, workers in ((1, "0"), (1, "2"), (check.DECODE_UP_TO, "0")):
        monkeypatch.setattr(check, "DECODE_UP_TO", first)
        run = tmp_path / f"run{len(results)}"
        words = images_command(root, "--num-workers", workers, "--unlabeled-batch", "8", "--out", str(run))
        told = " ".join(metapl(*words).stdout.split())
        assert "files that could not be read: 3, " in told
        assert {*replaced_files(run / "skipped.jsonl")} == {*map(str, cut)}
        results.append(json.loads((run / "result.json").read_text()))
    assert results[0] == results[1]
    assert "labeled: 1 of 12 files are left out" in told
    assert "unlabeled: 2 of 24 files are left out" in told
    (root / "labeled" / "bee").mkdir()
    (root / "labeled" / "bee" / "1.png").write_bytes(b"")
    assert "bee" in metapl(*images_command(root), "--out", tmp_path / "none", code=2).stderr


def test_labels_go_by_the_names_of_the_classes(tmp_path: Path) -> None:
    """A folder that lacks the first class does not move the others."""
    root, told = color_folders(tmp_path / "root"), list[str]()
    shutil.rmtree(root / "test" / "blue")
    config = Images(**{name: str(root / name) for name in PARTS}, **SMALL)
    task = settled(config, METHODS["uda"], lambda text: None)[0].data(told.append, False, None)
    assert (task.classes, torch.cat([y for _, y in task.test]).tolist()) == (("blue", "red"), [1] * 6)
    assert any("no picture of blue" in one for one in told)


GROWTH = """
import sys
from multiprocessing import active_children
from pathlib import Path
import torch
from torch import nn
import metapl
from metapl.apps.pictures import FileImages, LabeledBatches, UnlabeledBatches, Weak
from metapl.data import StepSampler

folder, leak, first, last = sys.argv[1], *map(int, sys.argv[2:])
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
Watched(*networks, "loss_difference").fit(*sources, steps=last + 1, num_workers=2, progress=False)
print(max((after - before) / (last - first) for before, after in zip(*seen, strict=True)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc as Linux has it")
@pytest.mark.long
def test_memory_is_flat(tmp_path: Path) -> None:
    """In MB per 1,000 steps, of the process that grew most; a leak of 20 kB a step shows, in those that read too."""
    color_folders(tmp_path)

    def growth(leak: int, first: int, last: int) -> float:
        command = [sys.executable, "-c", GROWTH, str(tmp_path), *map(str, (leak, first, last))]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert growth(0, 200, 600) < 3
    assert growth(20_000, 200, 600) > 3  # two workers share the steps


PERSIAN = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"

EVIL = (
    "a\x1b[2J\x1b[31mred",
    "a\nmetapl: all is well",
    "a\rb",
    "a\u202egnp.exe",
    "a\x07",
    "a\x9bc",
    os.fsdecode(b"caf\xe9"),  # not UTF-8
)


def test_what_is_shown_is_one_line_of_printable_letters() -> None:
    for name in EVIL:
        text = shown(name)
        assert not {*text} & {*TURNS, "\n", "\r", "\x1b", "\x07", "\x9b"}
        text.encode()
        assert text != name
        assert shown(text) == text == few([name])
    for name in ("größe", "猫", "naïve café", PERSIAN, "👩\u200d🚀", "a b", "$5_x"):  # in any script
        assert shown(name) == name


def test_predict_passes_over_what_is_no_plain_file_and_shows_names_harmlessly(
    tiny: Path, digit: Path, tmp_path: Path
) -> None:
    """And writes them as they are, in the place of what it wrote before."""
    folder, out = tmp_path / "pictures", tmp_path / "pictures" / "out.csv"
    folder.mkdir()
    out.write_text("file,class\n")
    for name in EVIL:
        (folder / f"{name}.png").write_bytes(b"no picture")
        (folder / f"fine {name}.png").write_bytes(digit.read_bytes())
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "loop.png").symlink_to("loop.png")
    for kind, make in SPECIAL.items():
        make(folder / f"{kind}.png")
    with promptly():
        told = metapl("predict", tiny, folder, "--out", out, code=1)
    for text in (told.stdout, told.stderr):
        assert not {*text} & {*TURNS, "\r", "\x1b", "\x07", "\x9b"}
    assert len(told.stderr.splitlines()) == told.stderr.count("left out") == len(EVIL) + 2 + len(SPECIAL) + 1
    with out.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert {row["file"] for row in csv.DictReader(file)} == {f"{folder}/fine {name}.png" for name in EVIL}


def test_a_spreadsheet_finds_no_formula_and_a_terminal_no_escape() -> None:
    sink = io.StringIO()
    names = ["=1+1.png", "+1.png", "-1.png", "@x.png", "\tx.png", "\rx.png", "a\rb.png", 'a",b.png', "a\nb", "fine.png"]
    writer = CsvRows(sink)
    for name in names:
        writer.writerow([name, "=cat", "0.5"])
    found = list(csv.reader(io.StringIO(sink.getvalue(), newline="")))
    assert [row[0] for row in found] == [f"'{name}" for name in names[:6]] + names[6:]
    assert {(row[1], row[2]) for row in found} == {("'=cat", "0.5")}
    sink = io.StringIO()
    sink.isatty = lambda: True  # type: ignore[method-assign]
    CsvRows(sink).writerow(["a\x1b[2J", "b"])
    assert sink.getvalue() == "a\\x1b[2J,b\n"


@pytest.mark.usefixtures("blank_programs")
def test_classes_of_any_name_go_through_everything(tmp_path: Path) -> None:
    """Training, evaluating, predicting and the model card."""
    root, evil, other = color_folders(tmp_path / "root"), "=a\x1b[2J\u202e|<b>*c*", os.fsdecode(b"caf\xe9\n[x](y)")
    for part in ("labeled", "test"):
        (root / part / "red").rename(root / part / evil)
        (root / part / "blue").rename(root / part / other)
    out = tmp_path / "run"
    texts = [metapl(*images_command(root), "--out", out).stdout, metapl("evaluate", out).stdout]
    metapl("predict", out, root / "unlabeled", "--out", tmp_path / "out.csv", "--probabilities")
    texts.append(metapl("export", out, "--out", tmp_path / "card").stdout)
    assert hashlib.sha256((tmp_path / "card" / "model.safetensors").read_bytes()).hexdigest() in texts[-1]
    card = (tmp_path / "card" / "MODEL_CARD.md").read_text()
    for text in (*texts, card):
        assert not {*text} & {*TURNS, "\x1b", "\r"}
    assert f"{100 * result(out)['test_accuracy']:.1f} % (n = 12, 95 % interval" in card
    assert str(out) not in card, "no place on this machine"
    (classes,) = (line for line in card.splitlines() if line.startswith("| classes |"))
    assert r"\|\<b\>\*c\*" in classes
    assert r"caf\\xe9\\n\[x\](y)" in classes
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert {row["class"] for row in csv.DictReader(file)} <= {f"'{evil}", other}
