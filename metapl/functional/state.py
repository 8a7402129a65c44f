"""What a pure step takes and returns besides the batches: tensors in NamedTuples and dicts, and
nothing else; and a module as a function of its tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.execution.checks import logits
from metapl.execution.numerics import Tree, as_real, asks_for_gradient, wide
from metapl.execution.state import named_parts
from metapl.execution.weight_norm import by_formulas, formulas_of, weights_made_by_hooks
from metapl.feedback.difference import RELATIVE_STEP
from metapl.problems.base import Signal, field_name
from metapl.protocols import TwoLevelTrainer
from metapl.updates import Clipped, Options, TorchUpdate, Update, options_of, rounded_options

SIGNAL_FIELDS = tuple(field.name for field in dataclasses.fields(Signal))
Fields = TypeVar("Fields", bound=NamedTuple)


class Network(NamedTuple):
    """The tensors of a network by name.

    Its trainable parameters, and its state, the buffers and frozen parameters.
    """

    params: Tree
    state: Tree


def tensors_of(module: nn.Module | None) -> Network:
    """The tensors that a module holds, without a graph; of none, none."""
    named = {} if module is None else dict(module.named_parameters())
    params = {name: p.detach() for name, p in named.items() if p.requires_grad}
    state = {} if module is None else {**named, **dict(module.named_buffers())}
    return Network(params, {name: t.detach() for name, t in state.items() if name not in params})


class Optimizer(NamedTuple):
    """The state of ``torch.optim`` by parameter, and the settings of its param groups as 0-D tensors, for schedules."""

    state: Any
    settings: list[dict[str, Any]]


class State(NamedTuple):
    """Everything that one step hands to the next."""

    teacher: Network
    student: Network
    inner: Optimizer
    outer: Optimizer
    mode: Tree  # of the estimator, such as a baseline
    step: Tensor  # int64, from 0


class Report(NamedTuple):
    """The numbers of a step; of K steps looked ahead, ``feedback`` and ``signal`` are lists of K.

    A step is right where ``flag`` is below 0.1, or 0.5 in ``difference``; NaN is not.
    """

    feedback: Any  # h = −dL(θ′)/d(signal), as the signal's value is: a tensor or a dict of them
    signal: Any  # the fields of the signal by name
    student_outputs: Tensor  # (B, ...), S(x_u; θ) on the last batch
    inner_loss: Tensor  # the mean of ℓ_i, and over the steps
    outer_loss: Tensor  # L(θ′); NaN in the mode "none", which does not compute it
    teacher_loss: Tensor  # the sum of the teacher's own losses
    # |⟨∂ℓ/∂z, ż⟩ − ⟨g, w⟩| relative to the sizes of its terms; NaN where anything is not finite
    flag: Tensor
    teacher_losses: Tree  # by name
    step_rounding: (
        Tensor  # ‖θ′ taken − θ′‖ / ‖θ′ − θ‖, where the step is rounded as that of Muon is; else 0
    )
    # feedback_weight and feedback_ratio, where the rule of the feedback's size compares gradients
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
    """The feedback as the signal's value is: a tensor, or a dict of those that are numbers."""
    if isinstance(value, dict):
        return {key: h[field_name(key)] for key in value if field_name(key) in h}
    return h["log_prob"] if "log_prob" in h else h["value"]


def unclipped(update: Update | None) -> Any:
    return update.inner if isinstance(update, Clipped) else update


def clipped(update: Update, clip_norm: float | None) -> Update:
    space: Any = SimpleNamespace(
        dot=dot, norm=norm
    )  # by operations that every transform has rules for
    return update if clip_norm is None else Clipped(update, clip_norm, space)


def constants_of(update: Update | None) -> list[dict[str, Any]]:
    """What param groups hold besides the settings, and 0 for a number that is no setting."""
    if not isinstance(update, TorchUpdate):
        return []
    return [group | dict.fromkeys(update.numbers, 0.0) for group in options_of(update.optimizer)]


def state_of(trainer: TwoLevelTrainer, updates: tuple[Update, Update | None]) -> State:
    """The tensors of a trainer's networks and optimizers, those of optimizers made where they are missing."""
    device = trainer.device

    def optimizer(update: Update | None) -> Optimizer:
        of = unclipped(update)
        if isinstance(of, TorchUpdate):
            return Optimizer(of.complete_state(), settings_of(of.settings(), device))
        return Optimizer({} if of is None else of.read_state(), [])

    student = tensors_of(trainer.student)
    kind = wide(next(iter(student.params.values()))).dtype
    mode = {name: t.to(device, kind) for name, t in trainer.mode_state.items()}
    inner, outer = map(optimizer, updates)
    step = torch.tensor(trainer.steps_done, device=device)
    return State(tensors_of(trainer.teacher), student, inner, outer, mode, step)


def settings_of(numbers: Any, device: torch.device) -> Any:
    """The numbers of param groups as tensors, as precise as a number of Python is."""

    def as_tensor(number: Any) -> Tensor:
        if isinstance(number, Tensor):
            return number.detach().to(device, torch.float64, copy=True)
        return torch.tensor(number, dtype=torch.float64, device=device)

    return pytree.tree_map(as_tensor, numbers)


def leaves_of(state: State) -> list[Tensor]:
    found: list[Tensor] = []
    for network, optimizer in ((state.student, state.inner), (state.teacher, state.outer)):
        found += [*network.params.values(), *network.state.values()]
        for held in optimizer.state.values():
            found += held.values()
    return found


def stack(states: Sequence[Any]) -> Any:
    """Stack states, or batches, along a new first dimension, for ``torch.func.vmap``."""
    return pytree.tree_map(lambda *tensors: torch.stack(tensors), *states)


def unstack(state: Any) -> list[Any]:
    """The states of a stack as a list: the inverse of :func:`stack`."""
    leaves, structure = pytree.tree_flatten(state)
    return [
        pytree.tree_unflatten(list(row), structure)
        for row in zip(*(t.unbind() for t in leaves), strict=True)
    ]


def dot(a: Tree, b: Tree) -> Tensor:
    """⟨a, b⟩ over trees of tensors."""
    return torch.stack(
        [(wide(as_real(a[name])) * wide(as_real(b[name]))).sum() for name in a]
    ).sum()


def norm(a: Tree) -> Tensor:
    return dot(a, a).sqrt()


def moves(mode: Any, theta: Tree, w: Tree) -> tuple[Tree, Tree, Tensor]:
    """θ + δŵ, θ − δŵ (or θ), and their distance in units of w.

    See :class:`metapl.feedback.Difference`.
    """
    at = {name: wide(t) for name, t in theta.items()}
    dtype, count = as_real(next(iter(at.values()))).dtype, sum(t.numel() for t in at.values())
    r = getattr(mode, "relative_step", None) or RELATIVE_STEP[dtype]
    factor = (
        r
        * (norm(at) / math.sqrt(count)).clamp_min(1e-3)
        / norm(w).clamp_min(torch.finfo(dtype).tiny)
    )
    ahead = {name: t + factor * w[name] for name, t in at.items()}
    if getattr(mode, "one_sided", False):
        return ahead, at, factor
    return ahead, {name: t - factor * w[name] for name, t in at.items()}, 2 * factor


def rounded_steps(
    update: Update, theta: Tree, end: Any, s: Any, options: Options
) -> tuple[Tree, Any, Tensor]:
    """θ′ and s′ by the optimizer's own steps on these gradients, and their distance from the
    differentiated θ′, over its length; where nothing is rounded, the differentiated ones."""
    if not update.is_rounded:
        return end.theta, end.s, 0 * end.losses[0]
    at = theta
    for g in end.g:
        at, s = update.update(at, g, s, rounded_options(options))
    gap, length = (norm({n: t - end.theta[n] for n, t in tree.items()}) for tree in (at, theta))
    return at, s, gap / length.clamp_min(torch.finfo(length.dtype).tiny)


# Whether PyTorch draws a transposed tensor in the order of its memory; with MKL, it does not.
_drawn = [
    t.bernoulli_(0.5, generator=torch.Generator().manual_seed(0))
    for t in (torch.empty(8, 8), torch.empty(8, 8).t())
]
IN_MEMORY_ORDER = torch.equal(_drawn[0], _drawn[1].t())


class EagerMasks(TorchFunctionMode):
    """Dropout with the masks that it has without a transform, within which PyTorch draws them by dimensions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.dropout or not IN_MEMORY_ORDER or args[0].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        order = sorted(range(args[0].dim()), key=args[0].stride, reverse=True)
        masked = func(args[0].permute(order), *args[1:], **(kwargs or {}))
        return masked.permute([order.index(i) for i in range(args[0].dim())])


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
    """Return what to say of torch.func's error about a forward that it cannot transform; None of any other error.

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
    if "ADInterpreters" in text or "escaped" in text:
        return ImpureError(
            f"{who} keeps a tensor of a pass, in an attribute, a list or a dict, and reads it in "
            "another",
            "a registered buffer for what passes carry on",
        )
    return None


class Function:
    """A network as a function of the tensors that it holds, so that its parts and methods have values at other tensors.

    Each place of a tensor is exchanged once, and put back, however many names lead to it: a part
    that is held under two names is one part. ``torch.func.functional_call`` goes by names, takes
    such a place twice, and puts back what it put there itself.
    """

    def __init__(self, module: nn.Module | None, role: str = "student") -> None:
        self.module: Any = module
        self.role = role
        # The first name of the tensor in each place, which has the place's name as its key. Tensors
        # are compared here, for within a graph or a transform none has an identity.
        self.first_names: dict[str, str] = {}
        first_of: dict[int, str] = {}
        for prefix, part in [] if module is None else named_parts(module):
            for table in (part._parameters, part._buffers):
                for name, t in table.items():
                    if t is not None:
                        self.first_names[prefix + name] = first_of.setdefault(id(t), prefix + name)
        parts = [] if module is None else [*module.modules()]
        # The places of parts whose kernel has no second derivative, with one that has it for each;
        # and the attributes into which hooks put a weight, which would be that of a transform
        # afterwards.
        self.formulas = [place for part in parts for place in formulas_of(part)]
        self.made = [(part, name) for part in parts for _, name in weights_made_by_hooks(part)]

    def at(self, params: Tree, state: Tree, ask: Callable[[Any], Any]) -> tuple[Any, Tree]:
        """Return what ``ask(module)`` returns with these tensors in the module, and the state that it leaves."""
        if self.module is None:
            return ask(None), state
        tensors = params | {
            name: t.clone() for name, t in state.items()
        }  # a pass moves its state in place
        parts = named_parts(self.module)
        tables: list[tuple[str, Any]] = [
            (prefix, table) for prefix, part in parts for table in (part._parameters, part._buffers)
        ]
        before = [dict(table) for _, table in tables]
        made = [getattr(part, name) for part, name in self.made]
        self.refuse_other_places(tables)
        try:
            for prefix, table in tables:
                for name in [*table]:
                    if table[name] is not None:
                        table[name] = tensors[self.first_names[prefix + name]]
            with EagerMasks(), by_formulas(self.formulas):
                answer = ask(self.module)
            left = {prefix + name: t for prefix, table in tables for name, t in table.items()}
            self.refuse_made(left)
        except RuntimeError as error:
            if not torch.compiler.is_compiling() and (
                impure := impurity(error, f"the {self.role}")
            ):
                raise impure from error
            raise
        finally:
            for (part, name), weight in zip(self.made, made, strict=True):
                setattr(part, name, weight)
            for (_, table), own in zip(tables, before, strict=True):
                for name in [
                    name for name in table if name not in own
                ]:  # a buffer that the pass has made
                    del table[name]
                for name, t in own.items():
                    table[name] = t
        return answer, {name: left[name].detach() for name in state}

    def outputs(self, params: Tree, state: Tree, x: Any) -> tuple[Tensor, Tree]:
        """A student's outputs, (B, ...), and the state that it leaves."""
        z, left = self.at(params, state, lambda network: network(x))
        return wide(logits(z, "student")), left

    def refuse_made(self, left: Mapping[str, Tensor | None]) -> None:
        """Refuse a pass that has made a buffer, which the state would not carry on."""
        made = [name for name, t in left.items() if t is not None and name not in self.first_names]
        if made and not torch.compiler.is_compiling():
            raise ImpureError(
                f"the {self.role} makes a buffer in its pass ({few(made, 3)}), and the state of a "
                "step has none",
                "one that is there before: run the network once on a batch",
            )

    def refuse_other_places(self, tables: Sequence[tuple[str, Any]]) -> None:
        """Refuse a network that has other tensors than it had when this function was made."""
        found = [
            prefix + name for prefix, table in tables for name, t in table.items() if t is not None
        ]
        if found != [*self.first_names]:
            raise MetaplError(
                "the network has other parameters or buffers than when its step was made; "
                "expected functional() again."
            )
