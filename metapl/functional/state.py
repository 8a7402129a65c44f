"""What a pure step takes and returns besides the batches, and a module as a function.

A step takes and returns tensors in NamedTuples and dicts, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.execution.numerics import Space, Tree, as_real, wide
from metapl.problems.base import Signal, field_name
from metapl.protocols import TwoLevelTrainer
from metapl.updates import Clipped, Options, TorchUpdate, Update, options_of, rounded_options
from metapl.updates.base import OptimizerState

SIGNAL_FIELDS = tuple(field.name for field in dataclasses.fields(Signal))
Fields = TypeVar("Fields", bound=NamedTuple)


class Network(NamedTuple):
    """The tensors of a network by name.

    Attributes:
        params: its trainable parameters.
        state: its buffers and frozen parameters.
    """

    params: Tree
    state: Tree


def tensors_of(module: nn.Module | None) -> Network:
    """Return the tensors that a module holds, without a graph; none without a module."""
    if module is None:
        return Network({}, {})
    parameters = dict(module.named_parameters())
    params = {name: p.detach() for name, p in parameters.items() if p.requires_grad}
    others = {**parameters, **dict(module.named_buffers())}
    state = {name: t.detach() for name, t in others.items() if name not in params}
    return Network(params, state)


class Optimizer(NamedTuple):
    """An optimizer's tensors.

    Attributes:
        state: that of ``torch.optim``, by parameter, or that of a transform.
        settings: the numbers of each param group by name, as 0-D tensors, for schedules.
    """

    state: OptimizerState
    settings: list[dict[str, Any]]


class State(NamedTuple):
    """Everything that one step hands to the next.

    Attributes:
        mode: the state of the estimator, such as a baseline.
        step: the number of the step, int64, from 0.
    """

    teacher: Network
    student: Network
    inner: Optimizer
    outer: Optimizer
    mode: Tree
    step: Tensor


class Report(NamedTuple):
    """The numbers of a step; of K steps looked ahead, ``feedback`` and ``signal`` are lists of K.

    Attributes:
        feedback: h = −dL(θ′)/d(signal), as the signal's value is: a tensor or a dict of them.
        signal: the fields of the signal by name.
        student_outputs: S(x_u; θ) on the last batch, (B, ...).
        inner_loss: the mean of ℓ_i, and over the steps.
        outer_loss: L(θ′); NaN in a mode that does not compute it, such as ``none``.
        teacher_loss: the sum of the teacher's own losses.
        flag: 0 where the step is right, else NaN: a check has failed, or a number is not finite.
        teacher_losses: these by name.
        step_rounding: ‖θ′ taken − θ′‖ / ‖θ′ − θ‖, where the step is rounded as that of Muon is;
            else 0.
        sizes: ``feedback_weight`` and ``feedback_ratio``, where the rule of the feedback's size
            compares gradients.
        findings: what checks have found, boolean, one for each of the texts of their errors, which
            are the key.
    """

    feedback: Any
    signal: Any
    student_outputs: Tensor
    inner_loss: Tensor
    outer_loss: Tensor
    teacher_loss: Tensor
    flag: Tensor
    teacher_losses: Tree
    step_rounding: Tensor
    sizes: Tree
    findings: dict[tuple[str, ...], Tensor]


def as_dict(signal: Signal) -> dict[str, Any]:
    """Return the fields of a signal that are not None, by name."""
    # Dynamo of torch 2.11 cannot trace ``vars()`` of a frozen dataclass.
    fields = {name: getattr(signal, name) for name in SIGNAL_FIELDS}
    return {name: value for name, value in fields.items() if value is not None}


def with_fields(value: Fields, **changed: Any) -> Fields:
    """Return a NamedTuple with some of its fields changed, like ``value._replace(**changed)``.

    Dynamo of torch 2.11 traces ``_replace`` to an empty tuple, without an error of its own.
    """
    fields = [changed[name] if name in changed else getattr(value, name) for name in value._fields]
    return type(value)(*fields)


def on_value(h: Tree, value: Any) -> Any:
    """Return the feedback as the signal's value is: a tensor, or a dict of its floating ones."""
    if isinstance(value, dict):
        return {key: h[field_name(key)] for key in value if field_name(key) in h}
    return h["log_prob"] if "log_prob" in h else h["value"]


def unclipped(update: Update | None) -> Any:
    """Return the rule of an optimizer without its clip."""
    return update.inner if isinstance(update, Clipped) else update


def clipped(update: Update, clip_norm: float | None) -> Update:
    """Return the rule of an optimizer behind a clip, where there is a norm to clip to."""
    return update if clip_norm is None else Clipped(update, clip_norm, SPACE)


def constants_of(update: Update | None) -> list[dict[str, Any]]:
    """Return what param groups hold besides the settings, and 0 for a number that is no setting."""
    if not isinstance(update, TorchUpdate):
        return []
    constants = []
    for group in options_of(update.optimizer):
        numbers = {name: 0.0 for name in update.numbers if name in group}
        constants.append(group | numbers)
    return constants


def state_of(trainer: TwoLevelTrainer, updates: tuple[Update, Update | None]) -> State:
    """Return the tensors of a trainer's networks and optimizers.

    An optimizer that has not stepped has the tensors that its first step would make.
    """
    device = trainer.device
    inner, outer = updates
    student = tensors_of(trainer.student)
    weight = next(iter(student.params.values()))
    return State(
        teacher=tensors_of(trainer.teacher),
        student=student,
        inner=optimizer_of(inner, device),
        outer=optimizer_of(outer, device),
        mode={name: on_device(t, device, weight) for name, t in trainer.mode_state.items()},
        step=number_on(device, trainer.steps_done, torch.int64),
    )


def optimizer_of(update: Update | None, device: torch.device) -> Optimizer:
    """Return the tensors of the optimizer behind a rule; none without a rule."""
    rule = unclipped(update)
    if rule is None:
        return Optimizer({}, [])
    if isinstance(rule, TorchUpdate):
        return Optimizer(rule.complete_state(), settings_of(rule.settings(), device))
    return Optimizer(rule.read_state(), [])


def on_device(t: Tensor, device: torch.device, weight: Tensor) -> Tensor:
    """Return a tensor of an estimator's state on a device; an average as wide as weights are."""
    return t.to(device, wide(weight).dtype if t.is_floating_point() else t.dtype)


def number_on(device: torch.device, number: float, dtype: torch.dtype) -> Tensor:
    """Return a 0-D tensor; a device fills it by itself, where a copy would make the host wait."""
    return torch.full((), number, dtype=dtype, device=device)


def settings_of(numbers: Any, device: torch.device) -> Any:
    """Return the numbers of param groups as tensors, as precise as a number of Python is."""

    def as_tensor(number: Any) -> Tensor:
        if isinstance(number, Tensor):
            return number.detach().to(device, torch.float64, copy=True)
        return number_on(device, number, torch.float64)

    return pytree.tree_map(as_tensor, numbers)


def leaves_of(state: State) -> list[Tensor]:
    """Return the tensors of networks and optimizers that a step moves, the student's first."""
    tables: list[Mapping[Any, Tensor]] = []
    for network, optimizer in ((state.student, state.inner), (state.teacher, state.outer)):
        tables += [network.params, network.state, *optimizer.state.values()]
    return [*chain.from_iterable([table.values() for table in tables])]


def stack(states: Sequence[Any]) -> Any:
    """Stack states, or batches, along a new first dimension, for ``torch.func.vmap``."""
    return pytree.tree_map(lambda *tensors: torch.stack(tensors), *states)


def unstack(state: Any) -> list[Any]:
    """Return the states of a stack as a list: the inverse of :func:`stack`."""
    leaves, structure = pytree.tree_flatten(state)
    rows = zip(*(t.unbind() for t in leaves), strict=True)
    return [pytree.tree_unflatten(list(row), structure) for row in rows]


def dot(a: Tree, b: Tree) -> Tensor:
    """Return ⟨a, b⟩ over the parameters that both trees have, a scalar."""
    terms = []
    for name, t in a.items():
        if name in b:
            terms.append((wide(as_real(t)) * wide(as_real(b[name]))).sum())
    return torch.stack(terms).sum()


def norm(a: Tree) -> Tensor:
    """Return ‖a‖ over a tree of tensors, a scalar."""
    return dot(a, a).sqrt()


class PureSpace(Space):
    """Products and norms of trees, by operations that all transforms of torch.func have."""

    def dot(self, a: Tree, b: Tree) -> Tensor:
        """Return ⟨a, b⟩ over the parameters that both have, a scalar."""
        return dot(a, b)

    def norm(self, a: Tree) -> Tensor:
        """Return ‖a‖ over all parameters, a scalar."""
        return norm(a)


SPACE = PureSpace()


def rounded_step(
    update: Update,
    theta: Tree,
    optimizer_state: OptimizerState,
    options: Options,
    *,
    gradient: Tree,
    exact: Tree,
) -> tuple[Tree, Any, Tensor]:
    """Return θ′ and s′ by a step that is rounded as the optimizer's own is, and how far it leads.

    Args:
        theta: θ, before the step.
        gradient: g.
        exact: the θ′ that is differentiated.

    Returns: θ′, s′, and ‖θ′ taken − θ′‖ / ‖θ′ − θ‖, a scalar.
    """
    taken, optimizer_state = update.update(
        theta, gradient, optimizer_state, rounded_options(options)
    )
    gap = norm({name: t - exact[name] for name, t in taken.items()})
    length = norm({name: t - exact[name] for name, t in theta.items()})
    smallest = torch.finfo(length.dtype).tiny
    return taken, optimizer_state, gap / length.clamp_min(smallest)
