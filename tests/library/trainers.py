"""Trainers of toy problems, and calls that are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_zoo import Toy
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError, Signal


def trainer_for(case: Toy, mode: Any = "forward", **options: Any) -> metapl.BilevelTrainer:
    networks = {name: options.pop(name, network) for name, network in case.networks().items()}
    return metapl.BilevelTrainer(**networks, mode=mode, **{"verify": False, **options})


def refused(call: Callable[[], Any], text: str, *watched: nn.Module) -> None:
    """The call is refused with these words, and leaves modules and the default generator as they were."""
    before = [copy.deepcopy(network.state_dict()) for network in watched], torch.get_rng_state()
    with pytest.raises(MetaplError, match=text):
        call()
    for network, old in zip(watched, before[0], strict=True):
        assert all(torch.equal(t, old[name]) for name, t in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1])


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Supervised:
    name = "supervised"

    def __call__(self, teacher: Any, *, labeled: Any, unlabeled: Any, signal: Signal, step: int) -> Tensor:
        return F.cross_entropy(teacher.logits(labeled[0]), labeled[1])


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class OnceDifferentiable(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(super().forward(x.flatten(1)))
