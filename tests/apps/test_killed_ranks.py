"""Any process of a training is killed at any moment, and nothing that was saved is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_cases
import pytest
from forked import context
from ranks import _free_port
from tiny_runs import TINY

from metapl.runs.checkpoint_parts import check

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills as Linux has them")

COMMAND: Sequence[str] = [
    *TINY,
    "--mesh.shard",
    "2",
    "--save-every",
    "1",
    "--resume",
    "--ema-decay",
    "0.9",
    "--dropout",
    "0.1",
]
WEIGHTS = ("student.safetensors", "finetuned_student.safetensors", "teacher.safetensors")
SECONDS = 120.0


def _rank(rank: int, number: int, port: int, arguments: list[str], said: str, met: str) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    meet = distributed.init_process_group

    def met_others(*given: Any, **named: Any) -> None:
        meet(*given, **named)
        Path(met).touch()

    distributed.init_process_group = met_others
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    code, out, err = command_cases.command(arguments)
    Path(said).write_text(out + err)
    sys.exit(code)


class Attempt:
    """Two processes that train."""

    def __init__(self, run: Path, command: Sequence[str] = COMMAND) -> None:
        self.said = [run.parent / f"said-{rank}.txt" for rank in range(2)]
        self.met = [run.parent / f"met-{rank}" for rank in range(2)]
        for file in (*self.said, *self.met):
            file.unlink(missing_ok=True)
        port, arguments = _free_port(), [*command, "--out", str(run)]
        self.ranks: list[Any] = [
            context().Process(target=_rank, args=(rank, 2, port, arguments, str(self.said[rank]), str(self.met[rank])))
            for rank in range(2)
        ]
        for process in self.ranks:
            process.start()

    def wait_until_met(self) -> None:
        """Wait until both processes are connected: before, one waits for the other as long as for one that is slow."""
        until = time.monotonic() + SECONDS
        while not all(file.exists() for file in self.met) and time.monotonic() < until:
            time.sleep(0.01)

    def codes(self) -> list[int]:
        """Their exit codes; a process that does not end of itself is a failure."""
        for process in self.ranks:
            process.join(SECONDS)
            hangs = process.is_alive()
            if hangs:
                for each in self.ranks:
                    each.kill()
            assert not hangs, "a process waits for one that was killed"
        return [process.exitcode for process in self.ranks]


def train_through(
    run: Path, kills: int, seconds: float, draw: random.Random, command: Sequence[str] = COMMAND
) -> tuple[int, int]:
    """Kill a process of two at a random moment and go on, until the run is finished; kills that hit, and attempts.

    Args:
        seconds: what a run that is left alone takes from when its processes have met.
    """
    hits = attempts = 0
    while not (run / "result.json").exists():
        attempts += 1
        attempt = Attempt(run, command)
        victim = attempt.ranks[draw.randrange(2)]
        if hits < kills:
            attempt.wait_until_met()
            victim.join(draw.uniform(0.0, 0.9) * seconds)
            if victim.exitcode is None:
                hits += 1
                os.kill(victim.pid, signal.SIGKILL)
        codes = attempt.codes()
        if -signal.SIGKILL not in codes:
            assert codes == [0, 0], [file.read_text() for file in attempt.said]
        for path in run.glob("checkpoints/*/*.parts"):
            check(path)  # what has its name is whole
    return hits, attempts


def same_weights(run: Path, whole: Path) -> None:
    for name in WEIGHTS:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert Attempt(run).codes() == [0, 0]
    return run


def test_a_killed_process_ends_the_others_and_the_run_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    attempt = Attempt(run)
    until = time.monotonic() + SECONDS
    while not list(run.glob("checkpoints/fit/*.parts")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(attempt.ranks[1].pid, signal.SIGKILL)
    assert attempt.codes() == [2, -signal.SIGKILL]
    assert "another process of this run has ended" in " ".join(attempt.said[0].read_text().split())
    for path in run.glob("checkpoints/fit/*.parts"):
        check(path)
    again = Attempt(run)
    assert again.codes() == [0, 0]
    assert "resumed at step" in again.said[0].read_text()
    same_weights(run, whole)


@pytest.mark.long
def test_fifty_kills_lose_nothing(whole: Path, tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "timed")
    attempt.wait_until_met()
    since = time.monotonic()
    assert attempt.codes() == [0, 0]
    seconds = time.monotonic() - since
    draw, hits, number = random.Random(0), 0, 0
    while hits < 50:
        run = tmp_path / str(number)
        found, _ = train_through(run, min(8, 50 - hits), seconds, draw)
        same_weights(run, whole)
        shutil.rmtree(run)
        hits, number = hits + found, number + 1


@pytest.mark.long
def test_torchrun_starts_killed_processes_again(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    command += ["-m", "metapl.apps", *COMMAND, "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + SECONDS
    while not list(run.glob("checkpoints/fit/*.parts")) and time.monotonic() < until:
        time.sleep(0.01)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    workers = [pid for pid in children if b"metapl" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = launcher.communicate(timeout=4 * SECONDS)
    assert launcher.returncode == 0, err
    same_weights(run, whole)
