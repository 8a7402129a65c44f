"""The step of an optimizer that has no rule here, for a mode that differentiates nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.updates.base import Parameters
from metapl.updates.torch_optim import State, Tensors, TorchUpdate, parts_of

RULES = "torch.optim's SGD, Adam, AdamW, Muon or a tuple of them, or on one device a TorchOpt transform"


class OwnStep(TorchUpdate):
    """Take the steps of any optimizer of ``torch.optim``, such as RMSprop, by its own ``step()``.

    Raises: :class:`metapl.MetaplError` for an optimizer whose ``step`` needs a closure, such as LBFGS, and where a mode
    asks for the update as a function.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Parameters) -> None:
        for one in parts_of(optimizer):
            closure = inspect.signature(type(one).step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                given = f"inner_optimizer is {type(one).__name__}, whose step() evaluates the loss by a closure"
                raise MetaplError(f"{given}; expected an optimizer that steps on a gradient.")
        super().__init__(optimizer, parameters)

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        raise MetaplError(
            f"inner_optimizer has no derivative here, so that mode 'none' alone takes it; expected {RULES}."
        )

    @staticmethod
    def completed(p: Tensor, state: State, group: Mapping[str, Any]) -> State:
        return state
