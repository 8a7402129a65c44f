"""The step of an optimizer that has no rule here, for a mode that differentiates nothing."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution.numerics import Tree
from metapl.updates.base import Parameters
from metapl.updates.lists import Tensors
from metapl.updates.optimizers import parameters_of, parts_of
from metapl.updates.torch_optim import State, States, TorchUpdate

HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
RULES = (
    "torch.optim's SGD, Adam, AdamW, Muon or a tuple of them, or on one device a TorchOpt transform"
)


def refuse_closure(optimizer: torch.optim.Optimizer, name: str, expected: str) -> None:
    """Refuse an optimizer, or one of several, whose ``step`` needs a closure, such as LBFGS.

    Args:
        name: of the argument, for errors.
        expected: the way out.
    """
    for part in parts_of(optimizer):
        closure = inspect.signature(type(part).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise MetaplError(
                f"{name} is {type(part).__name__}, whose step() evaluates the loss by a closure; "
                f"expected {expected}."
            )


class OwnStep(TorchUpdate):
    """Take the steps of any optimizer of ``torch.optim``, such as RMSprop, by its own ``step()``.

    Raises: :class:`metapl.MetaplError` for an optimizer whose ``step`` needs a closure, such as
    LBFGS, and where a mode asks for the update as a function.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Parameters) -> None:
        refuse_closure(
            optimizer, "inner_optimizer", expected="an optimizer that steps on a gradient"
        )
        super().__init__(optimizer, parameters)

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        raise MetaplError(
            "inner_optimizer has no derivative here, so that mode 'none' alone takes it; "
            f"expected {RULES}."
        )

    def stepped(self, params: Tree, grads: Tree, state: States) -> tuple[Tree, States]:
        """Return θ′ and s′ of one of several steps.

        The step is that of a fresh optimizer of the same type with this state. It is refused for
        what such an optimizer would not have: attributes of a class that is not torch's, and hooks.
        """
        for part in parts_of(self.optimizer):
            is_of_torch = type(part).__module__.startswith("torch.optim")
            has_hooks = any(vars(part)[name] for name in HOOKS)
            if not is_of_torch or has_hooks:
                raise MetaplError(
                    f"several student steps with {type(part).__name__}, of a class that is not "
                    "torch's or with hooks; expected one step, or an optimizer of torch.optim "
                    "without hooks."
                )
        return super().stepped(params, grads, state=state)

    @staticmethod
    def completed(p: Tensor, state: State, group: Mapping[str, Any]) -> State:
        return state


@contextmanager
def undone(*optimizers: torch.optim.Optimizer | None) -> Iterator[None]:
    """Undo the steps that these optimizers take in this block, if it ends in an error.

    Weights and states are then bit for bit as before.
    Cost: a copy of weights and states.
    """
    present = [optimizer for optimizer in optimizers if optimizer is not None]
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in present]
    weights = [[p.detach().clone() for p in parameters_of(optimizer)] for optimizer in present]
    try:
        yield
    except BaseException:
        for optimizer, state, values in zip(present, states, weights, strict=True):
            with torch.no_grad():
                for p, value in zip(parameters_of(optimizer), values, strict=True):
                    p.copy_(value)
            optimizer.load_state_dict(state)
        raise
