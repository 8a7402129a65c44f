"""Several optimizers of ``torch.optim`` over disjoint parameters, such as Muon for matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.updates.adam import Adam, refuse_half
from metapl.updates.base import Parameters
from metapl.updates.muon import Muon
from metapl.updates.torch_optim import SGD, State, Tensors, TorchUpdate, parameters_of
from metapl.updates.torchopt import is_transform

RULES: dict[str, type[TorchUpdate]] = {"ns_steps": Muon, "amsgrad": Adam, "dampening": SGD}
"""By what a param group of theirs has, and those of the others have not."""


class Several(torch.optim.Optimizer):
    """Optimizers as one, which has their param groups one after another and asks each of them for everything else."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = tuple(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for one in self.optimizers for group in one.param_groups]

    def __reduce__(self) -> tuple[Any, ...]:
        return Several, (self.optimizers,)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in self.optimizers:
            one.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.optimizers:
            one.step()

    def state_dict(self) -> dict[str, Any]:
        """As one of an optimizer with all these groups: parameters are numbered through."""
        found: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0
        for one in self.optimizers:
            own = one.state_dict()
            found["state"] |= {first + number: held for number, held in own["state"].items()}
            for group in own["param_groups"]:
                found["param_groups"].append(
                    {**group, "params": [first + number for number in group["params"]]}
                )
            first += len(parameters_of(one))
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        groups = iter(state["param_groups"])
        for one in self.optimizers:
            own = [*islice(groups, len(one.param_groups))]
            numbers = {number for group in own for number in group["params"]}
            held = {
                number: values for number, values in state["state"].items() if number in numbers
            }
            one.load_state_dict({"state": held, "param_groups": own})


def as_one_optimizer(optimizer: Any, name: str = "inner_optimizer") -> Any:
    if not isinstance(optimizer, tuple | list) or is_transform(optimizer):
        return optimizer
    if not optimizer or not all(isinstance(one, torch.optim.Optimizer) for one in optimizer):
        raise MetaplError(
            f"{name} is a {type(optimizer).__name__}; expected one of optimizers of torch.optim."
        )
    held = [id(p) for one in optimizer for p in parameters_of(one)]
    if len({*held}) < len(held):
        raise MetaplError(
            f"{name} holds {len(held) - len({*held})} tensors twice; expected disjoint parameters."
        )
    return Several(optimizer)


class SeveralRules(TorchUpdate):
    """The update of several optimizers, each by its own rule; its adjoint is autograd's."""

    def follow(self, parameters: Parameters) -> None:
        super().follow(parameters)
        rules = [rule_of(group) for group in self.optimizer.param_groups]
        self.is_rounded = any(rule.is_rounded for rule in rules)
        self.numbers = tuple(dict.fromkeys(number for rule in rules for number in rule.numbers))
        refuse_half(
            {
                name: p
                for name, p in parameters.items()
                if isinstance(self.owner[name], torch.optim.Adam)
            }
        )

    def takes_entries(self, group: Mapping[str, Any]) -> bool:
        return rule_of(group) is SGD

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        return rule_of(group).rule(params, grads, states, group)

    @staticmethod
    def completed(p: Tensor, state: State, group: Mapping[str, Any]) -> State:
        return rule_of(group).completed(p, state, group)


def rule_of(group: Mapping[str, Any]) -> type[TorchUpdate]:
    return next(rule for key, rule in RULES.items() if key in group)
