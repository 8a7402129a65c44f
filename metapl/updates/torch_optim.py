"""Updates of ``torch.optim`` optimizers: their rules as functions, their state as the optimizer holds it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.numerics import Tree, wide
from metapl.execution.shards import as_sharded, is_sharded, local
from metapl.updates.base import Parameters, Update

State = dict[str, Any]
"""The state of one parameter, as in ``torch.optim.Optimizer.state``."""
States = dict[str, State]
Tensors = list[Tensor] | tuple[Tensor, ...]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors in an optimizer's param groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def refuse_missing(name: str, optimizer: torch.optim.Optimizer, parameters: Parameters, network: str) -> None:
    """Refuse an optimizer that does not hold all trainable parameters of a network, ``"teacher"`` or ``"student"``;
    ``name`` is that of its argument."""
    held = [p for group in optimizer.param_groups if group.get("amsgrad") for p in group["params"]]
    if any(
        "exp_avg_sq" in state and "max_exp_avg_sq" not in state for state in map(optimizer.state.get, held) if state
    ):
        raise MetaplError(
            f"amsgrad of {name} was switched on after its first step, whose greatest second moments it has not kept; "
            f"build a new {type(optimizer).__name__}(..., amsgrad=True)."
        )
    known = {id(p) for p in parameters_of(optimizer)}
    missing = [path for path, p in parameters.items() if id(p) not in known]
    if missing:
        raise MetaplError(
            f"{name} holds {len(known)} tensors, the {network} has {len(parameters)} trainable parameters, of which "
            f"{few(missing, 3)} are not held, so they would not be trained; build it from {network}.parameters(), and "
            f"add new ones, such as a head put in later, by {name}.add_param_group."
        )
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) and group["lr"].ndim:
            raise MetaplError(
                f"{name} has lr={group['lr']}, a tensor of shape {tuple(group['lr'].shape)}; expected a number, or a "
                "tensor without dimensions, such as torch.tensor(0.1)."
            )


def described(optimizer: Any) -> str:
    """An optimizer in words, by its class."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    return f"{'the class ' if isinstance(optimizer, type) else ''}{kind.__module__}.{kind.__qualname__}"


def has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether something else runs before or after an optimizer's step."""
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return any((*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks))


def replaced_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's ``step`` is not its class's, nor that in the wrapper of PyTorch's schedulers."""
    step = vars(optimizer).get("step", type(optimizer).step)
    while getattr(step, "_wrapped_by_lr_sched", False):
        step = step.__wrapped__
    return getattr(step, "__func__", step) is not type(optimizer).step


def runs_others_code(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step is more than that of a class of PyTorch's."""
    return has_hooks(optimizer) or replaced_step(optimizer) or not type(optimizer).__module__.startswith("torch.optim")


class TorchUpdate(Update):
    """The update of a ``torch.optim`` optimizer, from its current state and param groups.

    A subclass gives the rule of one param group. Lists go through PyTorch's fused operations on lists: a few kernels
    for all parameters, where their number would keep a GPU waiting for the host.

    Of sharded parameters, the trees and states hold this process's parts; the optimizer holds DTensors.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Parameters) -> None:
        self.optimizer = optimizer
        self._compared: Any = None  # the step that was found to be as predicted
        self.parameters: dict[str, nn.Parameter] = {}
        self._held: list[list[int]] = []
        self.follow(parameters)
        own, held = {id(p) for p in parameters.values()}, parameters_of(optimizer)
        foreign = sum(p.requires_grad and id(p) not in own for p in held)
        if foreign:
            raise MetaplError(
                f"inner_optimizer holds {len(held)} tensors, the student has {len(parameters)} trainable parameters; "
                f"{foreign} of the tensors are not the student's. Build it from student.parameters()."
            )

    @staticmethod
    @abstractmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: dict[str, Any]
    ) -> tuple[Tensors, list[State]]:
        """θ′ and s′ of the parameters of one group, differentiable in θ, g and s."""

    def follow(self, parameters: Parameters) -> None:
        groups, what = self.optimizer.param_groups, ""
        for option in ("differentiable", "capturable"):
            if any(group.get(option) for group in groups):
                what = f"{option}=True: leave it out"
        if has_hooks(self.optimizer):
            what = (
                "a hook of register_step_pre_hook or register_step_post_hook, or of register_optimizer_step_pre_hook "
                "or _post_hook for all optimizers: remove it (to clip gradients, use clip_norm)"
            )
        if replaced_step(self.optimizer):
            what = (
                "a step of its own (its method was replaced: optimizer.step = ...): del optimizer.step (to clip "
                "gradients, use clip_norm)"
            )
        if what:
            raise MetaplError(f"inner_optimizer has {what}; metapl does not differentiate through that.")
        held = [[id(p) for p in group["params"]] for group in groups]
        own = self.parameters
        known = own.keys() == parameters.keys() and all(own[name] is p for name, p in parameters.items())
        asked = any(isinstance(group["lr"], Tensor) or group.get("amsgrad") for group in groups)
        if known and held == self._held and not asked:
            return
        refuse_missing("inner_optimizer", self.optimizer, parameters, "student")
        group_of = {i: number for number, ids in enumerate(held) for i in ids}
        self.group_of = {name: group_of[id(p)] for name, p in parameters.items()}
        self.parameters, self._held = dict(parameters), held
        self._sharded = any(is_sharded(p) for p in parameters.values())

    @property
    def learning_rate(self) -> float | None:
        return float(self.optimizer.param_groups[0]["lr"])

    def read_state(self) -> States:
        states = {name: dict(self.optimizer.state.get(p, {})) for name, p in self.parameters.items()}
        if self._sharded:
            return {name: {key: local(value) for key, value in state.items()} for name, state in states.items()}
        return states

    def update(self, params: Tree, grads: Tree, state: States) -> tuple[Tree, States]:
        new_params, new_state = dict(params), dict(state)
        for group, names in self.groups(grads):
            given = [params[n] for n in names], [grads[n] for n in names], [state[n] for n in names]
            moved, states = self.rule(*given, group)
            new_params.update(zip(names, moved, strict=True))
            new_state.update(zip(names, states, strict=True))
        return new_params, new_state

    def groups(self, grads: Tree) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """The param groups, each with the names of its parameters that have a gradient."""
        for number, group in enumerate(self.optimizer.param_groups):
            names = [name for name in grads if self.group_of[name] == number]
            if names:
                yield group, names

    def write(self, parameters: Parameters, params: Tree, state: Any) -> None:
        with torch.no_grad():
            for name, weight in parameters.items():
                weight.copy_(params[name])
                if state[name]:
                    self.optimizer.state[weight] = dict(state[name])
                else:
                    self.optimizer.state.pop(weight, None)

    def commit(self, parameters: Parameters, grads: Tree, moved: Callable[[], tuple[Tree, Any]]) -> None:
        # A leftover gradient of a frozen parameter must not move it.
        own = parameters_of(self.optimizer)
        for p in own:
            p.grad = None
        try:
            for name, p in parameters.items():
                g = grads.get(name)
                p.grad = as_sharded(g, p) if self._sharded and g is not None else g
            step = type(self.optimizer).step  # another, where its class was patched
            with nullcontext() if self._compared is step else self._as_predicted(parameters, grads):
                self.optimizer.step()
            self._compared = step
        finally:
            for p in own:
                p.grad = None

    @contextmanager
    def _as_predicted(self, parameters: Parameters, grads: Tree) -> Iterator[None]:
        """Refuse a step in this block that moves the first values of a parameter elsewhere than the rule does."""
        state = {name: {key: _some(t) for key, t in held.items()} for name, held in self.read_state().items()}
        before = {name: _some(local(p)) for name, p in parameters.items()}
        predicted, _ = self.update(before, {name: _some(g) for name, g in grads.items()}, state)
        yield
        for name, was in before.items():
            there, now = predicted[name], _some(local(parameters[name]))
            gap, moved, size = (torch.linalg.vector_norm(wide(t)) for t in (now - there, there - was, was))
            checks.refuse(
                gap > 1e-3 * moved + 4 * torch.finfo(was.dtype).eps * size,
                f"inner_optimizer moved the student's {name} elsewhere than the step of {described(self.optimizer)} "
                "does, by whose rule the feedback is found. Usual causes: a step that was replaced or wrapped, or does "
                "more, such as clipping (use clip_norm) or projecting weights. The weights have moved by it.",
            )

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def _some(value: Any) -> Any:
    """A copy of the first values of a tensor, by which an elementwise rule is compared without its memory."""
    return value.detach().flatten()[:64].clone() if isinstance(value, Tensor) and value.ndim else value
