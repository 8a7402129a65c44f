"""What a long run says of how far it is.

Lines in a pipe, a bar on a terminal, nothing in a stream that is closed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from command import metapl
from tiny_runs import TINY, images_command
from torch import nn

from metapl import LossTrainer, attribute
from metapl.apps.main import main
from metapl.apps.progress import CountLines, count_bar
from metapl.runs import terminal
from metapl.runs.terminal import FitLines

# The command with a line at every row that is recorded, for a test has no half minute.
AT_EVERY_ROW = """
import sys
from metapl.runs import terminal
from metapl.__main__ import main
terminal.LINE_EVERY = 0.0
if __name__ == "__main__":
    raise SystemExit(main())
"""


class Clock:
    """Give the seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def program(tmp_path: Path) -> list[str]:
    """Return the words that start :data:`AT_EVERY_ROW`, as a file, which workers can import."""
    file = tmp_path / "at_every_row.py"
    file.write_text(AT_EVERY_ROW)
    return [sys.executable, str(file)]


def test_a_line_every_half_minute_says_step_loss_validation_and_time_left() -> None:
    clock = Clock()
    said: list[str] = []
    lines = FitLines(said.append, steps=1000, clock=clock)
    for step in range(20, 220, 20):
        clock.now += 10.0
        row = {"step": step, "inner_loss": 1 / step}
        if step == 40:
            row |= {"teacher_validation_accuracy": 0.25, "student_validation_accuracy": 0.5}
        lines(step, row, None)
    assert said == [
        "step 60 of 1,000, loss 0.0167, validation 50.0%, 8 min left",
        "step 120 of 1,000, loss 0.00833, validation 50.0%, 7 min left",
        "step 180 of 1,000, loss 0.00556, validation 50.0%, 7 min left",
    ]


def test_a_line_says_the_time_left_of_whoever_knows_it() -> None:
    clock = Clock()
    said: list[str] = []
    known = {60: None, 120: 200.0}
    lines = FitLines(said.append, steps=1000, clock=clock, seconds_left=known.get)
    for step in (20, 60, 120):
        clock.now += 30.0
        lines(step, {"loss": 2.0}, None)
    assert said == [
        "step 20 of 1,000, loss 2, 24 min left",
        "step 60 of 1,000, loss 2, 16 min left",
        "step 120 of 1,000, loss 2, 3 min left",
    ]


def test_a_bar_says_the_time_left_of_whoever_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "draws_bars", lambda: True)
    known = {50: 300.0, 60: None}
    options = {"name": "fit", "start": 0, "steps": 100, "seconds_left": known.get}
    with terminal.progress(shown=True, **options) as bar:
        bar.update(50)
        assert "50/100, 05:00 left" in str(bar)
        bar.update(10)
        assert "60/100, 00:00 left" in str(bar)


def test_a_fit_that_goes_on_is_timed_from_its_own_first_row() -> None:
    """The steps before the interruption took no time of this process."""
    clock = Clock()
    said: list[str] = []
    lines = FitLines(said.append, steps=1000, phase="finetune", done=None, clock=clock)
    for step in (900, 920):
        clock.now += 40.0
        lines(step, {"loss": 2.0}, None)
    assert said == [
        "finetune, step 900 of 1,000, loss 2",
        "finetune, step 920 of 1,000, loss 2, 3 min left",
    ]


@pytest.mark.parametrize("size", [(24, 80), (0, 0)])
def test_a_fit_speaks_where_no_bar_can_be_drawn(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal without a size is that of a container, or of a CI."""
    pty = pytest.importorskip("pty", reason="the system has no pseudo-terminals")
    termios = pytest.importorskip("termios")
    reader, screen = pty.openpty()
    termios.tcsetwinsize(screen, size)
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    student = nn.Linear(3, 2)
    trainer = LossTrainer(student, optimizer=torch.optim.SGD(student.parameters(), lr=0.1))
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    data = (x, (x.sum(1) > 0).long())
    with open(screen, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        trainer.fit(
            data,
            steps=2,
            batch_size=4,
            validation=data,
            metric="loss",
            validate_every=1,
            log_every=1,
        )
        stream.flush()
        shown = os.read(reader, 4096).decode()
    os.close(reader)
    said = re.findall(r"step 1 of 2, loss [\d.]+, validation loss [\d.]+, 1 s left", shown)
    assert bool(said) is (size == (0, 0)), shown
    assert ("|" in shown) is (size == (24, 80)), shown


def test_a_count_is_said_every_half_minute() -> None:
    clock = Clock()
    said: list[str] = []
    lines = CountLines(said.append, "looking at files", total=300, done=100, clock=clock)
    open_end = CountLines(said.append, "pictures", clock=clock)
    for done in (110, 150, 200):
        clock.now += 20.0
        lines.update(done)
        open_end.update(done)
    assert said == ["looking at files: 150 of 300, 2 min left", "pictures: 150"]


def test_a_count_is_not_shown_unless_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    for is_shown in (False, True):
        with count_bar("files", is_shown, total=2) as count:
            count(1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "files: 1 of 2, 1 s left\n"


def test_a_run_and_each_run_of_a_comparison_speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    alone = metapl(*TINY, "--out", tmp_path / "run").stdout
    line = r"step 2 of 6, loss [\d.]+, validation [\d.]+%(, \d+ s left)?\n"
    assert re.search(f"^{line}", alone, re.MULTILINE), alone
    assert re.search(r"^finetune, step 4 of 4, loss [\d.]+", alone, re.MULTILINE), alone
    compared = [*TINY, "--compare", "--methods", "supervised", "uda", "--jobs", "1"]
    text = metapl(*compared, "--out", tmp_path / "compared").stdout
    for method in ("supervised", "uda"):
        assert re.search(f"^{method}, seed 0: {line}", text, re.MULTILINE), text


def test_labels_are_counted(tmp_path: Path, colors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    words = ["label", colors / "run", colors / "unlabeled", "--out", tmp_path / "labels"]
    told = metapl(*words, "--batch", "8")
    assert "batches labeled: 1 of 3" in told.stderr
    assert "batches" not in told.stdout


# A small ablation.
ABLATE = ("ablate", "digits", "--hidden", "4", "--steps", "2", "--rounds", "1", "--draws", "2")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("predict {run} {test}", [r"pictures: \d+ of \d+"]),
        ("evaluate {run}", [r"pictures: \d+ of \d+"]),
        ("evaluate {run} --attack fgsm --eps 1 --out {out}", [r"damaged pictures: \d+ of \d+"]),
        (
            " ".join(ABLATE),
            [
                r"metapl: steps: 1 of 3",
                r"metapl: modes: 1 of 9, \d+ s left",
                r"metapl: timings: 1 of 1",
            ],
        ),
    ],
)
def test_commands_that_read_a_run_speak_on_standard_error(
    words: str, expected: list[str], tmp_path: Path, colors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    places = {"run": colors / "run", "test": colors / "test", "out": tmp_path / "out"}
    said = metapl(*words.format(**places).split())
    for line in expected:
        assert re.search(f"^{line}", said.stderr, re.MULTILINE), said.stderr
        assert not re.search(f"^{line}", said.stdout, re.MULTILINE)


def test_a_step_is_logged_only_where_it_is_to_be_shown_and_no_terminal_shows_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    caplog.set_level("INFO", logger="metapl")
    for is_shown in (False, True):
        with terminal.step_bar(is_shown, 3, "steps") as advance:
            advance()
    assert [record.getMessage() for record in caplog.records] == ["steps: 1 of 3, 1 s left"]
    caplog.clear()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with terminal.step_bar(is_shown, 3, "steps") as advance:
        advance()
    assert not caplog.records


def test_an_attribution_and_its_check_say_how_far_they_are(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    caplog.set_level("INFO", logger="metapl")
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    train = (x, (x.sum(1) > 0).long())
    torch.manual_seed(0)
    student = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    attribution = attribute(student, train, train, optimizer=optimizer, steps=12, batch_size=8)
    attribution.validate([[number] for number in range(8)])
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "steps: 7 of 12" in said
    assert "steps back: 1 of 12" in said
    # Eight without examples, and the one on all of them.
    assert "steps of 9 trainings at once: 12 of 12" in said


def test_closed_streams_are_nothing() -> None:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as opened:
        for name in ("stdin", "stdout", "stderr"):
            patch.setattr(sys, name, None)
        assert main(["--version"]) == 0
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            opened.enter_context(stream)
        assert main(["predict"]) == 2
        assert main(["trian"]) == 2


@pytest.mark.long
def test_a_pipe_gets_lines(tmp_path: Path) -> None:
    command = [*program(tmp_path), *TINY, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^step 4 of 6, loss [\d.]+, validation [\d.]+%", done.stdout, re.MULTILINE)
    assert done.stderr == ""


@pytest.mark.long
def test_workers_of_a_comparison_speak_into_the_pipe(tmp_path: Path) -> None:
    words = [*TINY, "--compare", "--methods", "supervised", "uda", "--jobs", "2"]
    command = [*program(tmp_path), *words, "--out", str(tmp_path / "compared")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for method in ("supervised", "uda"):
        assert re.search(f"^{method}, seed 0: step 4 of 6, loss", done.stdout, re.MULTILINE)


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "bar", "line"),
    [
        (TINY, r"\rfit: .*\|.*\| \d/6", "step 4 of 6"),
        (ABLATE, r"\rsteps: .*\|.*\| \d/3", "steps: 1 of 3"),
    ],
)
def test_a_terminal_shows_a_bar_and_no_lines(
    words: Sequence[str], bar: str, line: str, tmp_path: Path, colors: Path
) -> None:
    pty = pytest.importorskip("pty", reason="the system has no pseudo-terminals")
    termios = pytest.importorskip("termios")
    named = [word.format(run=colors / "run", test=colors / "test") for word in words]
    command = [*program(tmp_path), *named, "--out", str(tmp_path / "run")]
    reader, screen = pty.openpty()
    termios.tcsetwinsize(screen, (24, 80))
    with subprocess.Popen(command, stdout=screen, stderr=screen) as process:
        os.close(screen)
        shown = b""
        while True:
            try:
                part = os.read(reader, 4096)
            except OSError:
                # Linux ends a terminal that nobody writes to any more by an error.
                break
            if not part:
                break
            shown += part
    os.close(reader)
    text = shown.decode()
    assert process.returncode == 0, text
    assert re.search(bar, text), text
    assert line not in text


@pytest.mark.long
@pytest.mark.parametrize(
    ("closed", "words", "code"),
    [
        (">&-", "--version", 0),
        (">&-", "train digits --help", 0),
        (">&-", "train digits --steps 0", 2),
        (">&-", "predict {run} {pictures}", 0),
        (">&-", "{train}", 0),
        ("<&- >&- 2>&-", "{train} --num-workers 1", 0),
    ],
)
def test_closed_streams_leave_the_exit_code_to_the_work(
    closed: str, words: str, code: int, tmp_path: Path, colors: Path
) -> None:
    train = shlex.join(images_command(colors, "--out", str(tmp_path / "run")))
    words = words.format(run=colors / "run", pictures=colors / "test", train=train)
    shell = f"exec {sys.executable} -m metapl {words} {closed}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if "train images" in words:
        assert json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"] >= 0
