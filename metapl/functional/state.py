"""What a pure step takes and returns, besides the batches: tensors in NamedTuples and dicts, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.execution.numerics import Tree
from metapl.functional.network import Network
from metapl.updates import Clipped, TorchUpdate, Update


class Optimizer(NamedTuple):
    """An optimizer's tensors: its state by parameter, as ``torch.optim`` has it, and the settings of its param groups,
    0-D tensors, so that a schedule changes values and not the function."""

    state: Any
    settings: list[dict[str, Any]]


class State(NamedTuple):
    """Everything that one step hands to the next."""

    teacher: Network
    student: Network
    inner: Optimizer
    outer: Optimizer
    mode: dict[str, Tensor]  # of the estimator, such as a baseline
    step: Tensor  # int64, counted from 0


class Report(NamedTuple):
    """The numbers of a step; of K steps looked ahead, ``feedback`` and ``signal`` are lists of K."""

    feedback: Any  # h = −dL(θ′)/d(signal): a tensor, or a dict of them where the signal's value is one
    signal: Any  # the fields of the signal by name
    student_outputs: Tensor  # (B, ...), S(x_u; θ) on the last batch
    inner_loss: Tensor  # the mean of ℓ_i, and over the steps
    outer_loss: Tensor  # L(θ′); NaN in the mode "none", which does not compute it
    teacher_loss: Tensor  # the sum of the teacher's own losses
    flag: Tensor  # |⟨∂ℓ/∂z, ż⟩ − ⟨g, w⟩| relative to the sizes of its terms; NaN where anything is not finite
    teacher_losses: Tree  # by name


def optimizer_of(update: Update, device: torch.device) -> Optimizer:
    """What an update reads, with buffers and counters made where the optimizer has not made them yet."""
    inner = update.inner if isinstance(update, Clipped) else update
    state = inner.read_state()
    if not isinstance(inner, TorchUpdate):
        return Optimizer(state, [])

    def number(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(number, value))
        return torch.as_tensor(value, dtype=torch.float64, device=device)  # as precise as a number of Python

    groups = inner.optimizer.param_groups
    begun = {n: inner.begun(p.detach(), state[n], groups[inner.group_of[n]]) for n, p in inner.parameters.items()}
    chosen = [{name: number(group[name]) for name in inner.settings if _is_tensor(group[name])} for group in groups]
    return Optimizer({n: {k: torch.as_tensor(t) for k, t in held.items()} for n, held in begun.items()}, chosen)


def _is_tensor(setting: Any) -> bool:
    """Whether a setting is one of the state's: 0 switches a part of the rule off, so that it stays what it is."""
    return isinstance(setting, tuple) or setting != 0


def stack(states: Sequence[Any]) -> Any:
    """Several states as one, whose tensors have a first dimension more, for ``torch.func.vmap``."""
    return pytree.tree_map(lambda *tensors: torch.stack(tensors), *states)


def unstack(state: Any) -> list[Any]:
    """The states, reports or batches that were stacked, one by one."""
    leaves, structure = pytree.tree_flatten(state)
    return [pytree.tree_unflatten(list(row), structure) for row in zip(*(t.unbind() for t in leaves), strict=True)]
