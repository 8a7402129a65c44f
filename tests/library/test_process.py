"""Signals, closed streams, pipes whose reader has gone, and too little memory: no traceback, and nothing lost."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import batches, single

from metapl import MetaplError
from metapl.data.steps import _begin_worker
from metapl.runs.checkpoint import CheckpointFolder
from metapl.runs.memory import out_of_memory
from metapl.training.loss_trainer import LossTrainer

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
        "not even for an error": SystemError("error return without exception set"),
    }[kind]


KINDS = ("python", "host", "host, otherwise", "gpu", "system", "not even for an error")


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_memory_in_a_step_names_the_step_what_to_lower_and_the_last_checkpoint(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = LossTrainer.step, []

    def failing(self: LossTrainer, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise exhausted(kind)
        return step(self, *given)

    monkeypatch.setattr(LossTrainer, "step", failing)
    with pytest.raises(MetaplError) as told:
        single().fit(batches(4)[0], steps=8, save_every=4, out=str(tmp_path), progress=False)
    words = str(told.value)
    assert words.startswith(f"step 6: the memory of {'the GPU' if kind == 'gpu' else 'this machine'} does not suffice")
    assert "--labeled-batch" in words
    assert f"the last good checkpoint is {CheckpointFolder(tmp_path / 'checkpoints/fit').paths()[0]}" in words
    assert len(calls) == 6  # it is not tried again unasked


def test_other_errors_are_not_taken_for_it() -> None:
    assert out_of_memory(BlockingIOError(11, "Resource temporarily unavailable")) is None
    assert out_of_memory(RuntimeError("shape '[2]' is invalid")) is None
    wrapped = MetaplError("x")
    wrapped.__cause__ = MemoryError()
    assert out_of_memory(wrapped) == "of this machine"
    told = MetaplError("step 3: the memory of the GPU does not suffice; lower it")
    told.__cause__ = MemoryError()
    assert out_of_memory(told) is None


# ------------------------------------------------------------------------------------------------------------- signals


def test_a_worker_outlives_any_number_of_sigterms_for_a_while() -> None:
    worker = os.fork()
    if not worker:
        try:
            _begin_worker(0)
            for _ in range(5):
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7 if signal.alarm(0) > 0 else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7
