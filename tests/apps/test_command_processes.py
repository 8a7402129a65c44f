"""Signals, closed streams, pipes whose reader has gone, and too little memory: no traceback, and nothing lost."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused, said
from forked import Forked, context
from tiny_runs import TINY, color_folders, images_command

from metapl.apps.commands import main
from metapl.apps.commands.commands import LESS_MEMORY
from metapl.apps.commands.process import exit_code, stoppable
from metapl.apps.labels import LabelStore
from metapl.apps.machine.memory import out_of_memory
from metapl.runs.checkpoint import CheckpointFolder
from metapl.training.loss_trainer import LossTrainer
from metapl.training.stopping import stop_requests

# -------------------------------------------------------------------------------------------------------------- memory


def exhausted(kind: str) -> Exception:
    return {
        "python": MemoryError(),
        "host": RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        "host, otherwise": RuntimeError("not enough memory: you tried to allocate 10 bytes."),
        "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    }[kind]


KINDS = ("python", "host", "host, otherwise", "gpu", "system")


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_memory_elsewhere_is_one_line(
    kind: str, tiny: Path, digit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*given: Any) -> Any:
        raise exhausted(kind)

    monkeypatch.setattr("metapl.apps.commands.predict.predictions", failing)
    capsys.readouterr()
    assert main(["predict", str(tiny), str(digit)]) == 2
    told = capsys.readouterr().err
    assert "does not suffice; close other programs" in told
    assert told.count("\n") == 1


SHORT = """
import resource, sys
import matplotlib.pyplot, torch, torch._dynamo, torchopt
import scipy.stats, sklearn.datasets, sklearn.model_selection  # no import meets the limit
import metapl.apps.commands.evaluate, metapl.apps.commands.runs
from metapl.apps.commands import main
for line in open("/proc/self/status"):
    if line.startswith("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (int(line.split()[1]) * 1024 + 4 * 2**20,) * 2)
run, out = sys.argv[1:]
for words in ("train digits --labeled-batch 1000000", f"export {run}", f"evaluate {run} --attack pgd"):
    assert main([*words.split(), "--out", f"{out}/{words.split()[0]}"]) == 2
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_commands_that_have_four_mebibytes_say_so(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHORT, str(tiny), str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for told, mend in zip(
        ended.stderr.splitlines()[-3:], ("lower the batch", "close other", "close other"), strict=True
    ):
        assert f"the memory of this machine does not suffice; {mend}" in told
    # A folder may stay where there is no memory to remove it, and a run that has begun.
    assert not [*(tmp_path / "out").glob("e*/*")]


def test_a_program_that_is_not_exported_for_memory_is_told_by_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*given: Any, **options: Any) -> Any:
        raise exhausted("host")

    monkeypatch.setattr("torch.export.export", failing)
    assert "close other programs" in refused(capsys, "export", tiny, "--out", tmp_path / "out")


@pytest.mark.parametrize("words", LESS_MEMORY)
def test_what_takes_less_memory_are_flags_of_the_command(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = {"train": "images", "noisy-student": "images", "ablate": "images"}
    command = words.split() if words not in recipes else [words, recipes[words]]
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert [flag for flag in re.findall(r"--[a-z-]+", LESS_MEMORY[words]) if f"  {flag} " not in text] == []


@pytest.mark.parametrize("said", ["could not create a primitive", "Resource temporarily unavailable"])
def test_what_onednn_and_the_thread_of_autograd_say_is_taken_for_it(said: str) -> None:
    assert out_of_memory(RuntimeError(said)) == "of this machine"


# ------------------------------------------------------------------------------------------------------------- signals


def wait_for(condition: Callable[[], Any], process: Forked) -> None:
    patience = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < patience, "it did not come so far"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.long
def test_sigterms_to_the_whole_group_with_workers_save_the_step(tmp_path: Path) -> None:
    root, out = color_folders(tmp_path / "root"), tmp_path / "run"
    flags = ("--steps", "100000", "--num-workers", "2", "--save-every", "100000", "--resized-crop", "--out", str(out))
    process = Forked([*images_command(root), *flags], alone=True)
    wait_for(lambda: (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size > 500, process)
    for _ in range(4):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.01)
    said_there, words = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, words
    assert "Traceback" not in words + said_there
    assert "saved to" in words
    (saved,) = CheckpointFolder(out / "checkpoints/fit").paths()
    assert f"stopped after step {int(saved.stem[5:])};" in words


@pytest.mark.slow
def test_a_terminal_that_is_closed_saves_the_step_and_leaves_no_worker(tmp_path: Path) -> None:
    """SIGHUP reaches all processes of a terminal."""
    root, out = color_folders(tmp_path / "root"), tmp_path / "run"
    flags = ("--steps", "100000", "--num-workers", "2", "--save-every", "100000", "--resized-crop", "--out", str(out))
    process = Forked([*images_command(root), *flags], alone=True)
    wait_for(lambda: (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size > 500, process)
    os.killpg(process.pid, signal.SIGHUP)
    said_there, words = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGHUP, words
    assert "Traceback" not in words + said_there
    assert "saved to" in words
    assert len(CheckpointFolder(out / "checkpoints/fit").paths()) == 1
    assert not list(out.rglob("*.tmp"))
    with pytest.raises(ProcessLookupError):  # no worker of the group is left
        os.killpg(process.pid, 0)


def test_a_process_that_was_started_to_ignore_sighup_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by ``nohup``; and else it unwinds."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for handle in (stoppable(for_good=False), stop_requests()):
            with handle:
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt) as stopped, stoppable(for_good=False):
            os.kill(os.getpid(), signal.SIGHUP)
        assert exit_code(stopped.value) == 128 + signal.SIGHUP
        with stop_requests() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
        assert asked == [signal.SIGHUP]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_exporting_leaves_no_temporary_folder(
    number: signal.Signals, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    process = Forked(["export", tiny, "--out", tmp_path / "out"], env=environment)
    wait_for(lambda: list((tmp_path / "tmp").glob("*/*.pt")), process)
    process.send_signal(number)
    process.send_signal(number)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 128 + number, words
    assert "Traceback" not in words
    assert [path for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("torchinductor")] == []
    assert not (tmp_path / "out").exists()


INTERRUPTED_IMPORT = """
import builtins, signal, sys
real = builtins.__import__
def importing(name, *given, **named):
    if name == {name!r} and not seen:
        seen.append(name)
        signal.raise_signal(signal.SIGINT)
    return real(name, *given, **named)
seen = []
builtins.__import__ = importing
sys.argv = ["metapl", "--version"]
from metapl.apps.commands import main
from metapl.apps.commands.process import exit_code, stoppable
sys.exit(main(["predict", "nowhere", "x"]))
"""


def test_ctrl_c_during_imports_is_no_traceback() -> None:
    code = INTERRUPTED_IMPORT.format(name="metapl.apps.commands.parse")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" not in found.stderr
    assert found.returncode == 128 + signal.SIGINT


# ------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.slow
def test_closed_streams(tiny: Path, digit: Path, tmp_path: Path) -> None:
    """All of them, from where the interpreter starts."""
    out = tmp_path / "out.csv"
    line = f'exec "{sys.executable}" -m metapl.apps predict "{tiny}" "{digit}" --out "{out}" <&- >&- 2>&-'
    found = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (1, "")
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.slow
def test_nobody_who_reads_its_help_is_exit_code_1(tmp_path: Path) -> None:
    shell = f'{{ "{sys.executable}" -m metapl.apps --help; echo $? > "{tmp_path / "code"}"; }} | head -n 0'
    found = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert "Traceback" not in found.stderr
    assert (tmp_path / "code").read_text() == "1\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "stream", "closed", "code"),
    [
        ("predict RUN DIGIT --out OUT", "stderr", True, 0),
        ("evaluate RUN --out OUT", "stdout", True, 1),
        ("label RUN digits --out OUT", "stdout", False, 1),
        (" ".join((*TINY, "--out OUT")), "stderr", False, 0),  # which is progress alone
    ],
)
def test_a_stream_that_is_closed_or_that_nobody_reads(
    line: str, stream: str, closed: bool, code: int, tiny: Path, digit: Path, tmp_path: Path
) -> None:
    """Of standard output, the exit code says that its reader has gone."""
    out, said_there = tmp_path / "out", tmp_path / "said"
    words = [{"RUN": str(tiny), "DIGIT": str(digit), "OUT": str(out)}.get(word, word) for word in line.split()]
    process = context().Process(target=_without, args=(words, stream, closed, str(said_there)))
    process.start()
    process.join()
    assert process.exitcode == code
    assert "Traceback" not in said_there.read_text()
    if line.startswith("label "):
        assert len(LabelStore(out)) == 1797  # it is whole, and only what is said of it is lost
    elif code:
        assert not out.exists()
    else:
        assert (out / "result.json" if line.startswith("train ") else out).exists()


def _without(arguments: list[str], stream: str, closed: bool, said_there: str) -> None:
    """The command, one of whose streams is closed or has no reader; the other is a file."""
    other = os.open(said_there, os.O_WRONLY | os.O_CREAT)
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(other, number)
        if name == stream and not closed:
            read, write = os.pipe()
            os.close(read)
            os.dup2(write, number)
        # As an interpreter has it that starts so.
        if name == stream and closed:
            os.close(number)
            setattr(sys, name, None)
        elif name == "stdout":
            sys.stdout = open(number, "w", closefd=False)  # noqa: SIM115
    sys.exit(main(arguments))


# ------------------------------------------------------------------------------- options, before the first method runs


def test_every_methods_options_are_checked_before_the_first_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = color_folders(tmp_path / "root")
    ran: list[Any] = []
    monkeypatch.setattr("metapl.apps.experiments.side_by_side.run_jobs", lambda *given, **named: ran.append(given))
    flags = ("--methods", "uda", "supervised_everything")
    assert main([*images_command(root), "--compare", *flags, "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "supervised_everything: " in told
    assert "leave it out of --methods" in told
    assert not (tmp_path / "run").exists()
    assert ran == []


# ---------------------------------------------------------------------------------------------------------- validation


def test_validation_files_that_vanish_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = color_folders(tmp_path / "root")
    (root / "test").rename(root / "val")
    (root / "test").mkdir()
    flags = [flag for flag in images_command(root) if not flag.startswith("--test")]
    flags += ["--val", str(root / "val"), "--validate-every", "1", "--resized-crop"]
    step, left = LossTrainer.step, [*sorted((root / "val").rglob("*.png"))]

    def vanishing(many: int) -> Callable[..., Any]:
        def one(self: LossTrainer, *given: Any) -> Any:
            if self.steps_done == 1:
                for path in left[:many]:
                    path.unlink(missing_ok=True)
            return step(self, *given)

        return one

    monkeypatch.setattr(LossTrainer, "step", vanishing(3))
    assert "validation is on 9 examples, and was on 12" in said(capsys, *flags, "--out", tmp_path / "some")
    monkeypatch.setattr(LossTrainer, "step", vanishing(12))
    capsys.readouterr()
    (tmp_path / "again").mkdir()
    assert main([*flags, "--out", str(tmp_path / "all")]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_a_validation_set_that_is_empty_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = color_folders(tmp_path / "root")
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"")
    flags = [flag for flag in images_command(root) if not flag.startswith("--test")]
    capsys.readouterr()
    assert main([*flags, "--val", str(root / "test"), "--out", str(tmp_path / "run")]) == 2
    assert f"none of the 12 pictures in {root / 'test'} can be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
