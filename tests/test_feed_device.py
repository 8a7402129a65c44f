"""Batches that are served on a device: where views are taken, what is pinned, what crosses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from feed_sources import SOURCES, Rows, made, same, seeded, take
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.data import (
    Chain,
    LabeledBatches,
    MemoryImages,
    RandAugment,
    ShiftNoiseCutout,
    StepBatches,
    StepSampler,
    UnlabeledBatches,
    Weak,
    feed,
    loader,
    to_device,
)
from metapl.errors import MetaplError

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


class Halves(StepBatches[Tensor]):
    """What is fetched is bytes on the CPU, and finished wherever it is."""

    steps = None

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad
        self.seen: list[tuple[int, str]] = []

    def batch(self, step: int) -> Tensor:
        raise AssertionError("made whole")

    def raw(self) -> StepBatches[Any]:
        return Bytes()

    def augment(self, step: int, fetched: Any) -> Tensor:
        self.seen.append((step, fetched.device.type))
        if step == self.bad:
            raise RuntimeError("out of memory")
        return fetched.float()


class Bytes(StepBatches[Tensor]):
    steps = None

    def batch(self, step: int) -> Tensor:
        return torch.full((3,), step, dtype=torch.uint8)


@pytest.mark.parametrize("workers", [0, 1])
def test_bytes_cross_to_the_device_and_are_finished_there_by_their_step(workers: int) -> None:
    source = Halves()
    stream = made(source, num_workers=workers, device="meta")
    stream.restore({"kind": "steps", "position": 5})
    batch = take(stream, 2)[-1]
    stream.close()
    assert source.seen == [(5, "meta"), (6, "meta")]
    assert (batch.device.type, batch.dtype) == ("meta", torch.float32)


def test_says_which_batch_could_not_be_finished_and_gives_it_again() -> None:
    source = Halves(bad=1)
    stream = made(source, device="meta")
    stream.next()
    with pytest.raises(MetaplError, match=r"labeled failed at batch 1 .*RuntimeError: out of memory"):
        stream.next()
    source.bad = None
    take(stream, 2)
    assert [step for step, _ in source.seen] == [0, 1, 1, 2]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_every_source_is_served_on_the_device(source: Callable[[], Any]) -> None:
    plain, there, here = made(source()), made(source(), device="meta"), made(source(), device="cpu")
    for _ in range(3):
        batch = plain.next()
        assert same(here.next(), batch)
        moved = pytree.tree_leaves(there.next())
        assert [(x.device.type, x.shape) for x in moved] == [("meta", x.shape) for x in pytree.tree_leaves(batch)]
    assert same(there.state(), plain.state())
    there.restore(plain.state())
    for stream in (plain, there, here):
        stream.close()


@pytest.mark.parametrize(("workers", "device", "pinned"), [(2, "cuda", True), (0, "cuda", False), (2, "cpu", False)])
def test_workers_pin_what_goes_to_cuda(
    workers: int, device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without workers it is pinned on its way, where it is not on the device already."""
    asked: list[bool] = []

    def noted(batches: Any, start: int, stop: int, num_workers: int, *, pin_memory: bool) -> Any:
        asked.append(pin_memory)
        return loader(batches, start, stop)

    monkeypatch.setattr(MODULE, "loader", noted)
    monkeypatch.setattr(MODULE, "to_device", lambda batch, device: batch)
    made(Rows(), num_workers=workers, device=device).next()
    assert asked == [pinned]


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


# --- to_device --------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def test_to_device_moves_tensors_alone() -> None:
    here = torch.ones(2)
    batch = {"pair": Pair(here, torch.zeros(3)), "list": [here, "name", None, 3]}
    moved = to_device(batch, "meta")
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].y.shape == (3,)
    assert {moved["pair"].x.device.type, moved["list"][0].device.type} == {"meta"}
    assert moved["list"][1:] == ["name", None, 3]
    stayed = to_device(batch, torch.device("cpu"))
    assert stayed["pair"].x is here
    assert stayed["list"][0] is here


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("make", [lambda x: x.pin_memory(), lambda x: x, lambda x: x[:, None].expand(-1, 3)])
def test_to_device_moves_pinned_tensors_and_others(make: Callable[[Tensor], Tensor]) -> None:
    x = make(torch.arange(1000))
    there = to_device((x,), "cuda")[0]
    assert torch.equal(there.cpu(), x)
    assert to_device(there, "cuda") is there
    assert torch.equal(to_device(there, "cpu"), x)


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
