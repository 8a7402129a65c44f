"""A fit that was saved, stopped, or failed goes on as if it had not been."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fits import (
    _one_thread,  # noqa: F401  # used by every test
    copied,
    same,
    single,
)
from torch import nn

from metapl.apps.pictures import LabeledBatches, MemoryImages, Weak
from metapl.data import StepSampler, feed

# ---------------------------------------------------------------------------------------------------- save and resume


def test_a_run_may_go_on_where_views_are_taken_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the views taken by the loader, on the trainer's device, and in turns."""
    draw = torch.Generator().manual_seed(0)
    images = MemoryImages(torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8, generator=draw))
    labels, sampler, weak = torch.arange(20) % 3, StepSampler(20, 6, seed=0), Weak(pad=1)
    ends = []
    for ways in ("loader", "device", "in turns"):
        trainer, folder = single(), tmp_path / ways
        trainer.student[0] = nn.Sequential(nn.Flatten(), nn.Linear(16, 8))
        trainer.optimizer = torch.optim.SGD(trainer.student.parameters(), lr=0.1)
        torch.manual_seed(7)
        for steps in (5, 9):
            on_device = ways == "device" or (ways, steps) == ("in turns", 9)
            monkeypatch.setattr(sys.modules[feed.__module__], "_finishes_batches", lambda _, here=on_device: here)
            labeled = LabeledBatches(images, labels, sampler, weak, seed=0)
            trainer.fit(
                labeled,
                steps=steps,
                schedule="constant",
                out=folder,
                resume=steps == 9,
                say=lambda _: None,
            )
        ends.append((copied(trainer.student), (folder / "metrics.jsonl").read_bytes()))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])
