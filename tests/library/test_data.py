"""Data: draws that hash their position, samplers, views, batches by step, and the digits."""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import pytest
import torch

from metapl.data import StepSampler, draws
from metapl.errors import MetaplError


def test_hash_is_splitmix64() -> None:
    # Its published outputs, from the seeds 0 and 1234567.
    assert [draws.fold_in(0, i) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [draws.fold_in(1234567, i) for i in range(2)] == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63, 2**64 - 1])
def test_bits_are_the_nested_hash(seed: int) -> None:
    examples = [0, 1, 12345, 2**40, -3, 2**63 - 1, -(2**63)]
    got = draws.bits(seed, step=17, examples=torch.tensor(examples), n=3, stream=2)
    key = draws.fold_in(draws.fold_in(seed, 2), 17)
    for (row, example), draw in product(enumerate(examples), range(3)):
        assert int(got[row, draw]) % 2**64 == draws.fold_in(draws.fold_in(key, example), draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_ignore_the_rest_of_the_batch(dtype: torch.dtype) -> None:
    draw, examples = draws.uniform, torch.arange(1003)
    whole = draw(3, 5, examples, 7, dtype=dtype)
    assert whole.dtype == dtype
    order = torch.randperm(1003, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(3, 5, examples[order], 7, dtype=dtype), whole[order])
    for size in (1, 2, 3, 5, 17):
        assert torch.equal(draw(3, 5, examples[40 : 40 + size], 7, dtype=dtype), whole[40 : 40 + size])
    # More draws continue fewer.
    assert torch.equal(draw(3, 5, examples, 11, dtype=dtype)[:, :7], whole)


@pytest.mark.parametrize(("size", "batch_size"), [(10, 3), (7, 7), (5, 12), (1, 4), (64, 1)])
def test_each_epoch_is_a_permutation(size: int, batch_size: int) -> None:
    sampler = StepSampler(size, batch_size, seed=1)
    steps = math.ceil(6 * size / batch_size)
    stream = torch.cat([sampler.indices(t) for t in range(steps)])
    epochs = torch.cat([sampler.epochs(t) for t in range(steps)])
    assert all(sampler.indices(t).shape == (batch_size,) for t in range(steps))
    for epoch in range(6):
        members = stream[epoch * size : (epoch + 1) * size]
        assert members.sort().values.tolist() == list(range(size))
        assert epochs[epoch * size : (epoch + 1) * size].tolist() == [epoch] * size


def test_orders_differ_by_epoch_seed_and_stream() -> None:
    orders = [StepSampler(30, 30, seed, stream).indices(epoch) for seed, stream, epoch in product(range(3), repeat=3)]
    assert len({tuple(order.tolist()) for order in orders}) == 27


def test_orders_are_uniform() -> None:
    sampler = StepSampler(4, 4, seed=0)
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(2400):
        order = tuple(sampler.indices(epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi_square = sum((c - 100) ** 2 / 100 for c in counts.values())
    assert chi_square < 23 + 4 * math.sqrt(2 * 23)


def test_sampler_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(MetaplError):
        StepSampler(0, 4, seed=0)
    with pytest.raises(MetaplError):
        StepSampler(4, 0, seed=0)
    with pytest.raises(MetaplError):
        StepSampler(4, 4, seed=0).indices(-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        StepSampler(4, 4, seed=0).seed = 1  # type: ignore[misc]  # the very mistake under test
