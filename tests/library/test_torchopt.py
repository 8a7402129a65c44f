"""Transforms of TorchOpt have the derivative that they should, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from problems_zoo import toy
from torchopt import pytree
from torchopt.transform import masked
from trainers import refused, trainer_for

import metapl
from metapl.execution.modules import trainable
from metapl.updates import update_of

# ------------------------------------------------------------------------------------------------ TorchOpt transforms


def matrices(tree: Any) -> Any:
    return pytree.tree_map(lambda t: t.ndim > 1, tree)


WRAPPED: dict[str, Callable[[], Any]] = {
    "alone": lambda: torchopt.clip_grad_norm(0.05),
    "of a large norm": lambda: torchopt.clip_grad_norm(1e6),
    "of another norm": lambda: torchopt.clip_grad_norm(0.05, float("inf")),
    "masked": lambda: torchopt.chain(masked(torchopt.clip_grad_norm(0.05), matrices), torchopt.sgd(0.3)),
    "before momentum": lambda: torchopt.chain(torchopt.clip_grad_norm(0.05), torchopt.sgd(0.3, momentum=0.9)),
    "before adam": lambda: torchopt.chain(torchopt.clip_grad_norm(0.05), torchopt.adam(0.3)),
    "after adam": lambda: torchopt.chain(torchopt.adam(0.3), torchopt.clip_grad_norm(0.05)),
    "at a low rate": lambda: torchopt.chain(torchopt.clip_grad_norm(0.05), torchopt.sgd(1e-4)),
    "chain of chains": lambda: torchopt.chain(
        torchopt.chain(torchopt.clip_grad_norm(0.05), torchopt.nan_to_num(0.0)), torchopt.sgd(0.3)
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_clip_whose_norm_autograd_does_not_see_is_refused_wherever_it_stands(name: str) -> None:
    with pytest.raises(metapl.MetaplError, match=r"is wrong.*clip_grad_norm is such \(use clip_norm"):
        update_of(WRAPPED[name](), trainable(toy("mlp").student))


@pytest.mark.parametrize("build", [torchopt.adam, torchopt.adamw])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_a_transform_with_a_wrong_derivative_is_refused(build: Any, eps: float) -> None:
    case = toy("mlp")
    wrong = build(0.05, eps=eps, use_accelerated_op=True)
    text = r"derivative in the gradient, or in its state, is wrong.*use_accelerated_op=True"
    refused(lambda: trainer_for(case, inner_optimizer=wrong), text, case.student)
    refused(lambda: metapl.hypergradient(**case.networks(), **case.data(), inner_optimizer=wrong), text, case.student)


def test_a_wrong_derivative_of_ones_own_is_found_too() -> None:
    """A transform that detaches half of what it does."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        return {n: -0.1 * g * (1 + g.detach().abs()) for n, g in updates.items()}, state

    wrong = torchopt.base.GradientTransformation(lambda params: (), update)
    case = toy("mlp")
    refused(lambda: trainer_for(case, inner_optimizer=wrong), "or in its state, is wrong", case.student)


def test_a_wrong_derivative_in_the_state_is_found_too() -> None:
    """Momentum that is detached: right for one step, wrong for several."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        moments = {n: g + 0.9 * state[n].detach() for n, g in updates.items()}
        return {n: -0.1 * m for n, m in moments.items()}, moments

    def init(params: Any) -> Any:
        return {n: torch.zeros_like(p) for n, p in params.items()}

    case = toy("mlp")
    wrong = torchopt.base.GradientTransformation(init, update)
    refused(lambda: trainer_for(case, inner_optimizer=wrong), "or in its state, is wrong", case.student)


@pytest.mark.parametrize("name", ["adadelta", "adagrad", "adam", "adamax", "adamw", "radam", "rmsprop", "sgd"])
def test_torchopts_own_are_not_refused(name: str) -> None:
    update_of(getattr(torchopt, name)(0.1), trainable(toy("mlp").student))
