"""Normal draws that hash their position."""

from __future__ import annotations

import math

import pytest
import torch

from metapl.apps.pictures.views.normal import _log, _sine_of_half_pi_times, normal
from metapl.data.draws import uniform


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_draws_ignore_the_rest_of_the_batch(dtype: torch.dtype) -> None:
    examples = torch.arange(1003)
    whole = normal(3, 5, examples, 7, dtype=dtype)
    order = torch.randperm(1003, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normal(3, 5, examples[order], 7, dtype=dtype), whole[order])
    for size in (1, 2, 3, 5, 17):
        assert torch.equal(normal(3, 5, examples[40 : 40 + size], 7, dtype=dtype), whole[40 : 40 + size])
    assert torch.equal(normal(3, 5, examples, 11, dtype=dtype)[:, :7], whole)  # more draws continue fewer


def test_normal_moments_and_tails() -> None:
    z = normal(11, 0, torch.arange(2000), 500, dtype=torch.float64)
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - moment) < 4 * math.sqrt(variance / n), power
    for bound in (0.5, 1.0, 2.0, 3.0, 4.0):
        expected = math.erfc(bound / math.sqrt(2))
        assert abs((z.abs() > bound).double().mean().item() - expected) < 4 * math.sqrt(expected / n), bound


def test_normal_is_box_muller() -> None:
    u = uniform(5, 1, torch.arange(3000), 20, stream=3, dtype=torch.float64)
    expected = torch.sqrt(-2 * torch.log1p(-u[:, ::2])) * torch.sin(torch.pi * (u[:, 1::2] - 0.5))
    got = normal(5, 1, torch.arange(3000), 10, stream=3, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


def test_logarithm_and_sine_over_their_whole_range() -> None:
    x = torch.cat([torch.logspace(-16, 0, 4001, dtype=torch.float64), 1 - torch.logspace(-16, -1, 999).double()])
    torch.testing.assert_close(_log(x), x.log(), rtol=4e-16, atol=0)
    t = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    torch.testing.assert_close(_sine_of_half_pi_times(t), (t * torch.pi / 2).sin(), rtol=0, atol=4e-16)
