"""Batches that are served on a device: where views are taken, what is pinned, what crosses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from feed_sources import SOURCES, made, same, take
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.data import StepBatches, to_device


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("make", [lambda x: x.pin_memory(), lambda x: x, lambda x: x[:, None].expand(-1, 3)])
def test_to_device_moves_pinned_tensors_and_others(make: Callable[[Tensor], Tensor]) -> None:
    x = make(torch.arange(1000))
    there = to_device((x,), "cuda")[0]
    assert torch.equal(there.cpu(), x)
    assert to_device(there, "cuda") is there
    assert torch.equal(to_device(there, "cpu"), x)
