"""Batches that are served on a device: where views are taken, what is pinned, what crosses."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from feed_sources import made, same, seeded, take
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.apps.pictures import (
    Chain,
    LabeledBatches,
    MemoryImages,
    RandAugment,
    ShiftNoiseCutout,
    UnlabeledBatches,
    Weak,
)
from metapl.data import StepBatches, StepSampler, feed, to_device

MODULE = sys.modules[feed.__module__]  # metapl.data.feed is the function


# --- on a device ------------------------------------------------------------------------------------------------------


def pictures() -> dict[str, StepBatches[Any]]:
    """Every kind of batches whose views can wait for the device, and those whose cannot."""
    images = MemoryImages(torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=seeded(0)))
    sampler, weak, strong = StepSampler(20, 7, seed=1), Weak(pad=1), Chain((Weak(pad=1), RandAugment(cutout=2)))
    return {
        "labeled": LabeledBatches(images, torch.arange(20), sampler, weak, seed=0),
        "two views": UnlabeledBatches(images, sampler, weak, strong, seed=0),
        "one view": UnlabeledBatches(images, sampler, strong, None, seed=0),
        "others": LabeledBatches(torch.rand(20, 1, 8, 8), torch.arange(20), sampler, ShiftNoiseCutout(), seed=0),
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", pictures())
def test_views_on_the_device_are_those_of_the_workers(kind: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in the same structure, and a run may go on with them where it was, in either direction."""
    source = pictures()[kind]

    def served(on_device: bool, at: int, stop: int) -> tuple[list[Any], dict[str, Any]]:
        monkeypatch.setattr(MODULE, "_finishes_batches", lambda device: on_device)
        stream = made(source, stop=stop, num_workers=workers, device="cpu")
        stream.restore({"kind": "steps", "position": at})
        batches = take(stream, stop - at)
        state = stream.state()
        stream.close()
        return batches, state

    direct, state = served(False, 0, 7)
    assert same(served(True, 0, 7), (direct, state))
    assert same(served(True, 4, 7), (direct[4:], state))
    assert same(made(source).next(), direct[0])
    assert state == {"kind": "steps", "position": 7}


def test_views_are_told_the_examples_on_the_cpu() -> None:
    """Where they plan; wherever the images are."""
    told = []

    def view(images: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        told.append((images.device.type, examples.device.type))
        return images

    images = torch.rand(10, 1, 8, 8, device="meta")
    x, _ = LabeledBatches(images, torch.arange(10), StepSampler(10, 4, seed=0), view, seed=0)[0]
    UnlabeledBatches(images, StepSampler(10, 4, seed=0), view, view, seed=0)[0]
    assert x.shape == (4, 1, 8, 8)
    assert told == [("meta", "cpu")] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", pictures())
def test_batches_on_cuda_are_those_on_the_cpu(kind: str, workers: int) -> None:
    streams = [made(pictures()[kind], stop=4, num_workers=workers, device=device) for device in ("cpu", "cuda")]
    for here, there in zip(*(take(stream, 4) for stream in streams), strict=True):
        assert {leaf.device.type for leaf in pytree.tree_leaves(there)} == {"cuda"}
        assert same(to_device(there, "cpu"), here)
    for stream in streams:
        stream.close()
