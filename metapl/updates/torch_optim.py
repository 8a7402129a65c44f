"""The update of an optimizer of ``torch.optim``, whose state stays where the optimizer has it."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.numerics import Tree
from metapl.execution.shards import as_sharded, is_sharded, local
from metapl.updates.base import OptimizerState, Options, Parameters, Update
from metapl.updates.lists import Tensors, is_set
from metapl.updates.optimizers import (
    load_copy_of_state,
    parameters_of,
    parts_of,
    refuse_missing,
    refuse_tensors,
)

# The state of one parameter, as in ``torch.optim.Optimizer.state``, and of all by name.
State = dict[str, Any]
States = dict[str, State]

# An update, or its adjoint, is computed of so many weights together. More are no faster, and the
# intermediate values, ten times as much in the adjoint of Adam, would be of the whole network.
WEIGHTS_AT_ONCE = 2**25


class TorchUpdate(Update):
    """The update of a ``torch.optim`` optimizer, from its current state and param groups.

    A subclass gives the rule of one param group, by PyTorch's fused operations on lists: a few
    kernels for all parameters. Of sharded ones, the trees and states hold this process's parts; the
    optimizer holds DTensors.

    Attributes:
        owner: the optimizer of each parameter, by name: one of several, or the only one.
        group_of: the number of each parameter's param group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Parameters) -> None:
        self.optimizer = optimizer
        self.parameters: dict[str, nn.Parameter] = {}
        # Options that :meth:`with_options` put in the place of the param groups' own.
        self._other_options: Options = ()
        # What :meth:`follow` last looked at, by name and identity.
        self._followed: list[Any] = []
        self.follow(parameters)
        students = {id(p) for p in parameters.values()}
        foreign = sum(p.requires_grad and id(p) not in students for p in parameters_of(optimizer))
        if foreign:
            raise MetaplError(
                f"inner_optimizer holds {foreign} tensors beside student.parameters()."
            )

    @staticmethod
    @abstractmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        """Return θ′ and s′ of the parameters of one group, differentiable in θ, g and s."""

    @staticmethod
    @abstractmethod
    def completed(p: Tensor, state: State, group: Mapping[str, Any]) -> State:
        """Return an equal state with all tensors that later ones have.

        A first recorded step needs a state of the same structure as the other steps.
        """

    def follow(self, parameters: Parameters) -> None:
        groups = self.optimizer.param_groups
        followed = [*parameters, *map(id, parameters.values())]
        for group in groups:
            followed += [len(group["params"]), *map(id, group["params"])]
        if followed == self._followed:
            return
        for group in groups:
            if group.get("differentiable") or group.get("capturable"):
                raise MetaplError(
                    "inner_optimizer has differentiable=True or capturable=True; expected False."
                )
        refuse_tensors(self.optimizer, "inner_optimizer")
        refuse_missing("inner_optimizer", self.optimizer, parameters, network="student")
        owners = {id(p): part for part in parts_of(self.optimizer) for p in parameters_of(part)}
        group_numbers = {
            id(p): number for number, group in enumerate(groups) for p in group["params"]
        }
        self.owner = {name: owners[id(p)] for name, p in parameters.items()}
        self.group_of = {name: group_numbers[id(p)] for name, p in parameters.items()}
        self.parameters = dict(parameters)
        self._optimized = parameters_of(self.optimizer)
        self._is_sharded = any(is_sharded(p) for p in parameters.values())
        self._followed = followed

    @property
    def options(self) -> Options:
        return self._other_options or self.optimizer.param_groups

    @property
    def learning_rate(self) -> float | None:
        return float(self.options[0]["lr"])

    def settings(self) -> list[dict[str, Any]]:
        """Return the rates, and other numbers of the param groups that are not 0.

        A number that is 0 leaves a part of the rule out. What tensors hold is read.
        """
        settings: list[dict[str, Any]] = []
        for group in self.optimizer.param_groups:
            numbers: dict[str, Any] = {}
            for name in self.numbers:
                if name != "lr" and not is_set(group.get(name, 0)):
                    continue
                value = group[name]
                numbers[name] = float(value) if isinstance(value, Tensor) else value
            settings.append(numbers)
        return settings

    def read_state(self) -> States:
        states = {
            name: dict(self.owner[name].state.get(p, ())) for name, p in self.parameters.items()
        }
        if self._is_sharded:
            for state in states.values():
                for key, value in state.items():
                    state[key] = local(value)
        return states

    def complete_state(self) -> States:
        """Return the state with all tensors that later ones have, see :meth:`completed`."""
        states = self.read_state()
        options = self.options
        return {
            name: self.completed(p.detach(), states[name], group=options[self.group_of[name]])
            for name, p in self.parameters.items()
        }

    def state_bytes(self) -> int:
        states = self.read_state()
        groups = self.optimizer.param_groups
        completed: list[State] = []
        for name, p in self.parameters.items():
            # With dampening, SGD's buffer comes with the first step, and is to be counted.
            group = {**groups[self.group_of[name]], "dampening": 0}
            on_meta = local(p).detach().to("meta")
            completed.append(self.completed(on_meta, states[name], group=group))
        return sum(t.nbytes for t in pytree.tree_leaves(completed) if isinstance(t, Tensor))

    def update(
        self, params: Tree, grads: Tree, state: States, options: Options | None = None
    ) -> tuple[Tree, States]:
        new_params = dict(params)
        new_state = dict(state)
        for group, names in self.groups(grads, options):
            moved, states = self.rule(
                [params[name] for name in names],
                [grads[name] for name in names],
                states=[state[name] for name in names],
                group=group,
            )
            new_params.update(zip(names, moved, strict=True))
            new_state.update(zip(names, states, strict=True))
        return new_params, new_state

    def stepped(self, params: Tree, grads: Tree, state: States) -> tuple[Tree, States]:
        if self.is_rounded:
            return self.update(params, grads, state=state)
        new_params = dict(params)
        new_state = dict(state)
        for group, names in self.groups(grads):
            # torch's own step, by a fresh optimizer on copies of the weights and the state.
            copies = {name: params[name].detach().clone() for name in names}
            kind: Any = type(self.owner[names[0]])
            optimizer = kind([{**group, "params": [*copies.values()]}])
            for name, p in copies.items():
                # Some of torch's steps write to the gradient, as Nesterov's on lists.
                p.grad = grads[name].detach().clone()
                if state[name]:
                    optimizer.state[p] = {key: _copied(t) for key, t in state[name].items()}
            optimizer.step()
            for name, p in copies.items():
                p.grad = None
                new_params[name] = p
                new_state[name] = dict(optimizer.state[p])
        return new_params, new_state

    def without_optimizer(self) -> TorchUpdate:
        """Return the rule alone, which holds no tensors.

        :meth:`update` of it, with options, is the same function.
        """
        rule = copy.copy(self)
        del rule.optimizer
        rule.parameters = {}
        rule.owner = {}
        rule._followed = []
        rule._optimized = []
        return rule

    def with_options(self, options: Options) -> TorchUpdate:
        update = copy.copy(self)
        update._other_options = options
        return update

    def groups(
        self, grads: Tree, options: Options | None = None
    ) -> list[tuple[Mapping[str, Any], list[str]]]:
        """Return the param groups, each with the names of its parameters that have a gradient.

        A large group comes in shares of about ``WEIGHTS_AT_ONCE`` weights.
        """
        groups = options or self._other_options or self.optimizer.param_groups
        if len(groups) == 1 and sum(map(Tensor.numel, grads.values())) <= WEIGHTS_AT_ONCE:
            return [(groups[0], [*grads])]
        shares: list[tuple[Mapping[str, Any], list[str]]] = []
        for number, group in enumerate(groups):
            # A group begins a share of its own.
            weights_in_share = WEIGHTS_AT_ONCE
            for name, g in grads.items():
                if self.group_of[name] != number:
                    continue
                if weights_in_share >= WEIGHTS_AT_ONCE:
                    shares.append((group, []))
                    weights_in_share = 0
                _, names = shares[-1]
                names.append(name)
                weights_in_share += g.numel()
        return shares

    def write(self, parameters: Parameters, params: Tree, state: OptimizerState) -> None:
        with torch.no_grad():
            for name, weight in parameters.items():
                part = local(weight)
                part.copy_(params[name])
                optimizer_state = self.owner[name].state
                optimizer_state.pop(weight, None)
                if not state[name]:
                    continue
                new_state = dict(state[name])
                for key, t in new_state.items():
                    # What has an entry for each weight is laid out over processes as the weights.
                    if isinstance(t, Tensor) and t.shape == part.shape:
                        new_state[key] = as_sharded(t, weight)
                optimizer_state[weight] = new_state

    def commit(
        self,
        parameters: Parameters,
        grads: Tree,
        compute_step: Callable[[], tuple[Tree, Any]],
    ) -> None:
        # A leftover gradient of a frozen parameter must not move it.
        for p in self._optimized:
            p.grad = None
        try:
            for name, g in grads.items():
                if self._is_sharded:
                    parameters[name].grad = as_sharded(g, parameters[name])
                else:
                    parameters[name].grad = g
            self.optimizer.step()
        finally:
            for p in self._optimized:
                p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_copy_of_state(self.optimizer, state, "inner_optimizer")


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
