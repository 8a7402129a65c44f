"""Transforms of TorchOpt have the derivative that they should, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from problems_zoo import toy
from reference import clipped, error, sgd
from torch import Tensor
from torchopt import pytree
from torchopt.transform import masked
from trainers import refused, trainer_for, values

import metapl
from metapl.execution.modules import trainable
from metapl.updates import update_of

# ------------------------------------------------------------------------------------------------ TorchOpt transforms


def matrices(tree: Any) -> Any:
    return pytree.tree_map(lambda t: t.ndim > 1, tree)


def clip_of_matrices(lr: float) -> Any:
    def rule(params: dict[str, Tensor], grads: dict[str, Tensor], state: Any) -> Any:
        big = {name: g for name, g in grads.items() if g.ndim > 1}
        new, _ = clipped(0.05, sgd(1.0))({name: torch.zeros_like(g) for name, g in big.items()}, big, None)
        scaled = {name: -new[name] if name in new else g for name, g in grads.items()}
        return {name: p - lr * scaled[name] for name, p in params.items()}, None

    return rule


WRAPPED: dict[str, tuple[Callable[[], Any], Any]] = {
    "masked": (
        lambda: torchopt.chain(masked(torchopt.clip_grad_norm(0.05), matrices), torchopt.sgd(0.3)),
        clip_of_matrices(0.3),
    ),
    "masked twice": (
        lambda: torchopt.chain(
            masked(torchopt.chain(torchopt.nan_to_num(0.0), masked(torchopt.clip_grad_norm(0.05), matrices)), matrices),
            torchopt.sgd(0.3),
        ),
        clip_of_matrices(0.3),
    ),
    "flat chain": (
        lambda: torchopt.chain.flat(torchopt.clip_grad_norm(0.05), torchopt.sgd(0.3)),
        clipped(0.05, sgd(0.3)),
    ),
    "chain of chains": (
        lambda: torchopt.chain(
            torchopt.chain(torchopt.clip_grad_norm(0.05), torchopt.nan_to_num(0.0)), torchopt.sgd(0.3)
        ),
        clipped(0.05, sgd(0.3)),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_clip_has_its_derivative_wherever_it_stands(name: str) -> None:
    """Against double backward through the rule written out: values and pullback."""
    build, rule = WRAPPED[name]
    student = toy("mlp").student
    functional = update_of(build(), trainable(student))
    draw = torch.Generator().manual_seed(1)
    theta = values(student)
    g, v = ({n: torch.randn(p.shape, generator=draw, dtype=p.dtype) for n, p in theta.items()} for _ in range(2))
    at = {n: t.clone().requires_grad_() for n, t in g.items()}
    expected, _ = rule(theta, at, None)
    moved, _ = functional.update(theta, g, functional.read_state())
    assert error(moved, expected) < 1e-12
    by_autograd = torch.autograd.grad(sum((expected[n] * v[n]).sum() for n in v), list(at.values()))
    w = functional.pullback(theta, g, functional.read_state(), v)
    assert error(w, dict(zip(at, by_autograd, strict=True))) < 1e-12


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
