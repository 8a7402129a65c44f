"""Processes meet, or say why they do not."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
from ranks import _free_port

from metapl.apps.commands import launch
from metapl.distributed import Mesh
from metapl.errors import MetaplError


@pytest.fixture
def one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two processes, of which the other never comes."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(_free_port()))
    monkeypatch.setattr(launch, "PATIENCE", timedelta(seconds=1))


def meet() -> None:
    with launch.joined(Mesh(shard=2), torch.device("cpu")):
        pytest.fail("it met nobody")


@pytest.mark.usefixtures("one_of_two")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_never_comes_is_waited_for_only_so_long(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(launch.ProcessLost, match=r"another process has not answered for .* minutes"):
        meet()


@pytest.mark.usefixtures("one_of_two")
def test_a_process_that_was_not_told_where_to_meet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(MetaplError, match=r"MASTER_ADDR.*Start all with: torchrun --nproc-per-node=2"):
        meet()


@pytest.mark.parametrize(
    ("started", "here", "program"),
    [
        ("1", None, "metapl"),
        ("2", "2", "torchrun --nproc-per-node=2 -m metapl.apps"),
        ("16", "8", "torchrun ... -m metapl.apps"),
    ],
)
def test_a_stopped_run_goes_on_in_as_many_processes(
    started: str, here: str | None, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", started)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert launch.program() == program


@pytest.mark.parametrize("ended", [True, False])
def test_a_process_leaves_the_word_to_the_first(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not leave before the first has ended, of which torchrun tells by a SIGTERM, or before some seconds."""
    monkeypatch.setattr(launch, "SAID_WITHIN", 5.0 if ended else 0.3)
    before = signal.getsignal(signal.SIGTERM)
    begun = time.monotonic()
    assert launch.left_to_first() == 2  # nobody is ended where torchrun is not
    assert time.monotonic() - begun < 0.1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    if ended:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        assert launch.left_to_first() == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert 0.3 <= time.monotonic() - begun < 3


def test_a_sigterm_that_follows_a_lost_process_does_not_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")

    def stopped(error: Exception | None) -> int:
        try:
            if error is not None:
                raise error
        finally:
            raise KeyboardInterrupt

    def run(error: Exception | None) -> int:
        return launch.run_together(Mesh(), torch.device("cpu"), lambda: stopped(error), lambda: 0)

    with pytest.raises(launch.ProcessLost, match=r"another process of this run has ended.*Go on with --resume"):
        run(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"))
    for other in (None, RuntimeError("another")):
        with pytest.raises(KeyboardInterrupt):
            run(other)
