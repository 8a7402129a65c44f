"""Several optimizers of ``torch.optim`` over disjoint parameters.

Such are Muon for the matrices of a network, and AdamW for its other weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution.checks import unexpected
from metapl.updates.adam import Adam, refuse_half
from metapl.updates.base import Parameters
from metapl.updates.lists import Tensors
from metapl.updates.muon import Muon
from metapl.updates.optimizers import parameters_of
from metapl.updates.sgd import SGD
from metapl.updates.torch_optim import State, TorchUpdate
from metapl.updates.torchopt import Transform, is_transform

RULES: dict[str, type[TorchUpdate]] = {"ns_steps": Muon, "amsgrad": Adam, "dampening": SGD}
"""By an option that a param group of this kind has, and those of the other kinds have not."""


class Several(torch.optim.Optimizer):
    """Several optimizers as one.

    It has their param groups one after another, and asks each of them for everything else.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = tuple(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def __reduce__(self) -> tuple[Any, ...]:
        return Several, (self.optimizers,)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as one optimizer with all these groups has it.

        Parameters are numbered through.
        """
        states: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        offset = 0
        for optimizer in self.optimizers:
            part = optimizer.state_dict()
            for number, values in part["state"].items():
                states[offset + number] = values
            for group in part["param_groups"]:
                groups.append({**group, "params": [offset + number for number in group["params"]]})
            offset += len(parameters_of(optimizer))
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        all_groups = iter(state["param_groups"])
        for optimizer in self.optimizers:
            groups = [*islice(all_groups, len(optimizer.param_groups))]
            numbers = {number for group in groups for number in group["params"]}
            states = {
                number: values for number, values in state["state"].items() if number in numbers
            }
            optimizer.load_state_dict({"state": states, "param_groups": groups})


InnerOptimizer = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Transform
"""What a user may give as the student's optimizer.

One of ``torch.optim``, several of these over disjoint parameters, or a transform of TorchOpt.
"""


def as_one_optimizer(optimizer: Any, name: str = "inner_optimizer") -> Any:
    """Return a tuple or list of optimizers as one; anything else, a TorchOpt transform too, as is.

    Args:
        name: of the argument, for errors.

    Raises: :class:`metapl.MetaplError` for what is no optimizer, and for tensors that two hold.
    """
    if not isinstance(optimizer, tuple | list) or is_transform(optimizer):
        return optimizer
    if not optimizer or not all(isinstance(part, torch.optim.Optimizer) for part in optimizer):
        raise unexpected(f"{name} is", optimizer, "optimizers of torch.optim in it, one or more")
    tensors = [id(p) for part in optimizer for p in parameters_of(part)]
    twice = len(tensors) - len({*tensors})
    if twice:
        raise MetaplError(f"{name} holds {twice} tensors twice; expected disjoint parameters.")
    return Several(optimizer)


class SeveralRules(TorchUpdate):
    """The update of several optimizers, each by its own rule; its adjoint is autograd's."""

    def follow(self, parameters: Parameters) -> None:
        super().follow(parameters)
        rules = [rule_of(group) for group in self.optimizer.param_groups]
        self.is_rounded = any(rule.is_rounded for rule in rules)
        # Each name once, in the order in which the rules have them.
        self.numbers = tuple(dict.fromkeys(number for rule in rules for number in rule.numbers))
        of_adam = {
            name: p
            for name, p in parameters.items()
            if isinstance(self.owner[name], torch.optim.Adam)
        }
        refuse_half(of_adam)

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        return rule_of(group).rule(params, grads, states=states, group=group)

    @staticmethod
    def completed(p: Tensor, state: State, group: Mapping[str, Any]) -> State:
        return rule_of(group).completed(p, state, group=group)


def rule_of(group: Mapping[str, Any]) -> type[TorchUpdate]:
    """Return the rule of the kind of optimizer that a param group comes from."""
    return next(rule for key, rule in RULES.items() if key in group)
