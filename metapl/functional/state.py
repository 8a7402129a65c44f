"""What a pure step takes and returns besides the batches, and a module as a function.

A step takes and returns tensors in NamedTuples and dicts, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.execution.checks import logits
from metapl.execution.masks import EagerMasks
from metapl.execution.numerics import Space, Tree, as_real, asks_for_gradient, wide
from metapl.execution.state import named_parts
from metapl.execution.weight_norm import by_formulas, formulas_of
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
    return [group | dict.fromkeys(update.numbers, 0.0) for group in options_of(update.optimizer)]


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


def rounded_steps(
    update: Update,
    theta: Tree,
    optimizer_state: OptimizerState,
    options: Options,
    *,
    gradients: Sequence[Tree],
    exact: Tree,
) -> tuple[Tree, Any, Tensor]:
    """Return θ′ and s′ by steps that are rounded as the optimizer's own are, and how far they lead.

    Args:
        theta: θ, before the first step.
        gradients: g of each step.
        exact: the θ′ that is differentiated.

    Returns: θ′, s′, and ‖θ′ taken − θ′‖ / ‖θ′ − θ‖, a scalar.
    """
    taken = theta
    for g in gradients:
        taken, optimizer_state = update.update(taken, g, optimizer_state, rounded_options(options))
    gap = norm({name: t - exact[name] for name, t in taken.items()})
    length = norm({name: t - exact[name] for name, t in theta.items()})
    smallest = torch.finfo(length.dtype).tiny
    return taken, optimizer_state, gap / length.clamp_min(smallest)


class ImpureError(MetaplError):
    """A pass of a network has no pure form.

    Args:
        what: whose pass it is, and what it does, without a period.
        instead: what to write in its place.
    """

    def __init__(self, what: str, instead: str) -> None:
        super().__init__(
            f"{what}; expected {instead}, or the trainer's own steps in the place of functional()."
        )
        self.what = what


def impurity(error: BaseException, who: str) -> ImpureError | None:
    """Return what to say of torch.func's error about a forward that it cannot transform.

    None of any other error.

    Args:
        who: whose forward it is, such as ``"the student"``.
    """
    text = str(error)
    if "setup_context" in text:
        return ImpureError(
            f"{who} has a torch.autograd.Function without setup_context, which torch.func cannot "
            "transform",
            "one whose forward has no ctx, and a setup_context(ctx, inputs, output)",
        )
    if "Tensor.requires_grad_()" in text or asks_for_gradient(error):
        return ImpureError(
            f"{who} asks for a gradient in its forward (Tensor.requires_grad_(), which "
            "torch.autograd.grad and torch.func.stack_module_state need), and torch.func cannot "
            "transform that",
            "torch.func.grad, or torch.stack of the parameters",
        )
    if "mutate a captured Tensor" in text:
        return ImpureError(
            f"{who} writes in a pass to its weights, or to a tensor that is no buffer of it",
            "a registered buffer for what passes carry on",
        )
    if "data pointer" in text:
        return ImpureError(
            f"{who} reads the numbers of a tensor in a pass, as by .numpy(), which torch.func "
            "cannot transform",
            "operations of torch, and a registered buffer for what passes carry on",
        )
    if "ADInterpreters" in text or "escaped" in text:
        return ImpureError(
            f"{who} keeps a tensor of a pass, in an attribute, a list or a dict, and reads it in "
            "another",
            "a registered buffer for what passes carry on",
        )
    return None


class Function:
    """A network as a function of the tensors that it holds.

    So its parts and methods have values at other tensors. Each place of a tensor is exchanged once,
    and put back, however many names lead to it: a part that stands under two names is one part.
    ``torch.func.functional_call`` goes by names, takes such a place twice, and puts back what it
    put there itself.

    Args:
        module: the network; None is a function without tensors.
        role: what errors call it.
    """

    def __init__(self, module: nn.Module | None, role: str = "student") -> None:
        self.module: Any = module
        self.role = role
        # The first name of the tensor in each place, which has the place's name as its key. Tensors
        # are compared here, for within a graph or a transform none has an identity.
        self.first_names: dict[str, str] = {}
        # The places of parts whose kernel has no second derivative, with one that has it for each.
        self.formulas: list[Any] = []
        if module is None:
            return
        name_of: dict[int, str] = {}
        for prefix, table in self.tables():
            for name, t in table.items():
                if t is not None:
                    place = prefix + name
                    self.first_names[place] = name_of.setdefault(id(t), place)
        for part in module.modules():
            self.formulas += formulas_of(part)

    def tables(self) -> list[tuple[str, dict[str, Tensor | None]]]:
        """Return each part's tables of parameters and of buffers, with the prefix of its names."""
        tables: list[tuple[str, Any]] = []
        for prefix, part in named_parts(self.module):
            tables += [(prefix, part._parameters), (prefix, part._buffers)]
        return tables

    def at(self, params: Tree, state: Tree, ask: Callable[[Any], Any]) -> tuple[Any, Tree]:
        """Return what ``ask(module)`` returns with these tensors, and the state that it leaves."""
        if self.module is None:
            return ask(None), state
        # A pass moves its state in place.
        tensors = params | {name: t.clone() for name, t in state.items()}
        tables = self.tables()
        self.refuse_other_places(tables)
        own_tables = [dict(table) for _, table in tables]
        try:
            for prefix, table in tables:
                for name in [*table]:
                    if table[name] is not None:
                        table[name] = tensors[self.first_names[prefix + name]]
            with EagerMasks(), by_formulas(self.formulas):
                answer = ask(self.module)
            left: dict[str, Any] = {}
            for prefix, table in tables:
                left |= {prefix + name: t for name, t in table.items()}
            self.refuse_new_buffers(left)
        except RuntimeError as error:
            if torch.compiler.is_compiling():
                raise
            impure = impurity(error, f"the {self.role}")
            if impure is None:
                raise
            raise impure from error
        finally:
            for (_, table), own_table in zip(tables, own_tables, strict=True):
                # A buffer that the pass has made goes.
                for name in [name for name in table if name not in own_table]:
                    del table[name]
                for name, t in own_table.items():
                    table[name] = t
        return answer, {name: left[name].detach() for name in state}

    def outputs(self, params: Tree, state: Tree, x: Any) -> tuple[Tensor, Tree]:
        """Return a student's outputs, (B, ...), and the state that it leaves."""
        z, left = self.at(params, state, lambda network: network(x))
        return wide(logits(z, "student")), left

    def refuse_new_buffers(self, left: Mapping[str, Tensor | None]) -> None:
        """Refuse a pass that has made a buffer, which the state would not carry on."""
        new = [name for name, t in left.items() if t is not None and name not in self.first_names]
        if new and not torch.compiler.is_compiling():
            raise ImpureError(
                f"the {self.role} makes a buffer in its pass ({few(new, 3)}), and the state of a "
                "step has none",
                "one that is there before: run the network once on a batch",
            )

    def refuse_other_places(self, tables: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Refuse a network that has other tensors than it had when this function was made."""
        places = []
        for prefix, table in tables:
            places += [prefix + name for name, t in table.items() if t is not None]
        if places != [*self.first_names]:
            raise MetaplError(
                "the network has other parameters or buffers than when its step was made; "
                "expected functional() again."
            )
