"""The bilevel problem: two pure losses, and the teacher's signal about a batch."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.execution.batch import Batch, Inputs, first_input, joined, labeled_pair
from metapl.execution.checks import scalar_loss, transformed, unexpected
from metapl.execution.numerics import wide
from metapl.execution.ranks import ALONE, sharing
from metapl.execution.state import trainable

Params = Mapping[str, Tensor]

# The kind of a signal: differentiable, or sampled.
Kind = Literal["soft", "hard"]

# What labels are drawn with. A tensor is the noise itself, as a recorded step has it.
Random = torch.Generator | Tensor | None

# A loss of all rows; or a sum, and the weight to divide it by.
OuterLoss = Tensor | tuple[Tensor, Tensor | float]


# The fields of a signal beside those of its value.
FIELDS_BESIDE_VALUE = ("log_prob", "probs", "outputs")


@dataclass(frozen=True)
class Signal:
    """The teacher's signal about the inner batch; the tensors carry the teacher's graph.

    Args:
        value: the input of the inner loss: class probabilities q (B, C), sampled classes (B,),
            weights of examples (B,), corrected labels (B, C), ...; or a dict of such tensors, each
            of which gets a feedback of its own if it is of floating point.
        log_prob: (B,), log p_i(value_i), where ``value`` was sampled; ``None`` where ``value`` is
            differentiable.
        probs: (B, C), the distribution that ``value`` was sampled from, where a mode may take the
            expectation over it; the inner loss must then accept a ``value`` of this shape as well,
            and be linear in it.
        outputs: (B, C), the teacher's outputs that the signal was made from, for teacher losses
            that need them.
    """

    value: Tensor | Any
    log_prob: Tensor | None = None
    probs: Tensor | None = None
    outputs: Tensor | None = None

    def __getitem__(self, key: str) -> Tensor:
        """Return a tensor of a value that is a dict of several."""
        tensor: Tensor = self.value[key]  # type: ignore[index]
        return tensor

    def differentiable(self) -> dict[str, Tensor]:
        """Return the fields that an inner loss may be differentiated with respect to.

        There are none if ``value`` was sampled.
        """
        if self.log_prob is not None:
            return {}
        return {name: t for name, t in self.fields().items() if t.is_floating_point()}

    @property
    def sampled(self) -> bool:
        """Whether ``value`` was drawn, so that only its log-probability can be differentiated."""
        return self.log_prob is not None

    def fields(self) -> dict[str, Tensor]:
        """Return the tensors of the signal by name.

        Those of a dict are called ``value['weight']``, say, and come first.
        """
        tensors = {"value": self.value}
        if isinstance(self.value, dict):
            tensors = {field_name(key): t for key, t in self.value.items()}
        if self.log_prob is not None:
            tensors["log_prob"] = self.log_prob
        if self.probs is not None:
            tensors["probs"] = self.probs
        if self.outputs is not None:
            tensors["outputs"] = self.outputs
        return tensors

    def having(self, fields: Mapping[str, Tensor]) -> Signal:
        """Return a signal with other tensors in some of its :meth:`fields`."""
        value = fields.get("value", self.value)
        if isinstance(self.value, dict):
            value = {key: fields.get(field_name(key), t) for key, t in self.value.items()}
        return type(self)(
            value,
            log_prob=fields.get("log_prob", self.log_prob),
            probs=fields.get("probs", self.probs),
            outputs=fields.get("outputs", self.outputs),
        )

    def chunks(self, parts: int) -> list[Signal]:
        """Return the signal about each of ``parts`` micro-batches."""
        if parts == 1:
            return [self]
        chunks_by_field = {name: t.chunk(parts) for name, t in self.fields().items()}
        signals = []
        for part in range(parts):
            fields = {name: chunks[part] for name, chunks in chunks_by_field.items()}
            signals.append(self.having(fields))
        return signals

    def detached(self) -> Signal:
        """Return a copy without the teacher's graph.

        The tensors are copied, since a signal may be weights that move, such as a table of labels.
        """
        return self.having({name: t.detach().clone() for name, t in self.fields().items()})


def field_name(key: object) -> str:
    """Return the name, in :meth:`Signal.fields`, of an entry of a value that is a dict."""
    return f"value[{key!r}]"


def uniform(
    rows: int, classes: int, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw uniform noise, (rows, classes), in the type and on the device of ``like``.

    It is drawn in float32 whatever the type, so that a seed draws the same labels.
    """
    noise = torch.rand(rows, classes, generator=generator, dtype=torch.float32, device=like.device)
    return noise.double() if like.dtype == torch.float64 else noise


def gumbel(
    rows: int, classes: int, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw standard Gumbel noise, (rows, classes).

    The sum of log p and this noise is greatest at a class that is drawn from p.
    """
    return -(-uniform(rows, classes, like=like, generator=generator).log()).log()


def draw_classes(probabilities: Tensor, generator: Random) -> Tensor:
    """Draw a class for each row of probabilities (B, C), as a column (B, 1).

    A tensor in the place of the generator is the Gumbel noise itself, (B, C).
    """
    if isinstance(generator, Tensor):
        return (probabilities.log() + generator).argmax(-1, keepdim=True)
    # Every rank draws for all rows: with equal generators the labels are those that one process
    # would draw.
    ranks = ALONE if transformed() else sharing.get()
    rows, classes = probabilities.shape
    noise = uniform(ranks.size * rows, classes, like=probabilities, generator=generator)
    if not ranks.alone:
        noise = ranks.own_rows(noise)
    # log u / p is greatest where log p and the Gumbel noise −log(−log u) are, in half of the
    # operations.
    return (noise.log() / probabilities).argmax(-1, keepdim=True)


def joined_signals(signals: Sequence[Signal]) -> Signal:
    """Return the signal about the union of micro-batches, or the only one."""
    first = signals[0]
    if len(signals) == 1:
        return first
    fields_by_part = [signal.fields() for signal in signals]
    if numbers := [name for name, t in first.fields().items() if t.ndim == 0]:
        raise MetaplError(
            f"the signal's {few(numbers)} has no dimension along which micro-batches are joined; "
            "expected .reshape(1) of it, or accumulate=1."
        )
    return first.having(
        {name: joined([fields[name] for fields in fields_by_part]) for name in first.fields()}
    )


class BilevelProblem(ABC):
    r"""Teach a student with a signal, and judge the signal by the student's loss afterwards.

    .. math:: \min_{\theta_T} L(\theta'), \quad
              \theta' = U\big(\theta, \nabla_\theta \tfrac1B
              \sum_i \ell_i(S(x_u; \theta), \mathrm{signal}(\theta_T))\big)

    A problem is a subclass with the three abstract methods; the others have defaults.
    docs/write-a-problem.md has one.
    """

    classifies: ClassVar[bool] = False
    """Whether the student's outputs are class logits (B, C), of which
    :meth:`metapl.BilevelTrainer.predict` gives the probabilities."""

    teacher_classifies: ClassVar[bool] = False
    """Whether the teacher maps the student's inputs to class logits, so that its accuracy can be
    measured."""

    signal_has_rows: ClassVar[bool | Mapping[str, bool] | None] = None
    """Whether a signal has a row for each example of the inner batch, or is one for all of them,
    such as a matrix; of a dict of tensors, by their names. None, or a name that is left out: where
    its length is that of the batch."""

    signal_of_batch: ClassVar[bool] = False
    """Whether :meth:`signal` speaks of the inner batch as a whole, such as by weights that sum to
    one over it: it is then asked once, before the student runs, also where the batch is taken in
    micro-batches (``accumulate``)."""

    has_teacher: ClassVar[bool] = True
    """Whether a network makes the signal; without one, ``teacher=None`` is given and nothing learns
    from the feedback but :meth:`revised_signal`."""

    @abstractmethod
    def signal(
        self, teacher: nn.Module, batch: Batch, student_outputs: Any, *, generator: Random
    ) -> Signal:
        """Return the teacher's signal about ``batch``.

        ``student_outputs`` (B, ...) are detached, so that a gradient through several student steps
        leaves out what earlier signals do to them. They are None where the signal is asked for
        before the student runs (see :meth:`student_input` and :attr:`signal_of_batch`).
        """

    @abstractmethod
    def inner_loss(
        self, outputs: Tensor, signal: Signal, batch: Batch, params: Params | None = None
    ) -> Tensor:
        """Return ℓ_i, shape (B,), without the mean over the batch, which metapl takes.

        ``params`` are the student's weights by name, to be read and not to be written to.
        """

    @abstractmethod
    def outer_loss(self, outputs: Tensor, batch: Batch) -> OuterLoss:
        """Return L of the student's outputs on the outer ``batch``.

        L is a scalar, or a pair (sum, weight) of scalars for a mean, such as one over tokens or
        over labels that are not ignored. Of pairs, L is Σ sum / Σ weight over the micro-batches and
        processes that share the batch; the weight carries no gradient. Of scalars it is the mean of
        theirs: one that is no mean over rows is refused in micro-batches (``accumulate``), where
        verification sees it.
        """

    def student_input(self, batch: Batch) -> Inputs:
        """Return the student's input in an inner batch.

        That is a tensor or a dict itself, or the first element of a tuple.

        With a second parameter, ``student_input(self, batch, signal)``, it is made from the
        teacher's signal too. The signal is then asked for before the student runs, so that
        ``student_outputs`` is None in :meth:`signal`.
        """
        return first_input(batch)

    def outer_batch(self, batch: Batch) -> Batch:
        """Return the outer batch as :meth:`outer_loss` reads it.

        By default that is (inputs, labels), and any other batch is refused. To read other batches,
        any nesting of tensors with a row for each example, return ``batch`` itself.
        """
        return labeled_pair(
            batch, mend=" For other batches, give the problem a method outer_batch(batch)."
        )

    def outer_input(self, batch: Batch) -> Inputs:
        """Return the student's input in an outer batch.

        That is a tensor or a dict itself, or the first element of a tuple.

        It may read the teacher, such as architecture weights, as :meth:`outer_loss` may: through a
        module that the problem holds. The teacher then learns from both ways to the outer loss: its
        gradient is that of the feedback plus ∂L(θ′; φ)/∂φ at fixed θ′ (the direct term;
        docs/contract.md), in the modes that have it
        (:attr:`metapl.feedback.Estimator.has_direct_term`).
        """
        return first_input(batch)

    def for_modes(self, labels: Sequence[Kind], mode: str = "") -> BilevelProblem:
        """Return the problem with a kind of signal that the mode takes.

        ``labels`` are the mode's kinds, by preference.
        """
        return self

    def exact(self) -> BilevelProblem | None:
        """Return the same problem with a differentiable signal, or None where there is none.

        Its exact gradient is what other modes are compared with.
        """
        return None

    def revised_signal(self, signal: Signal, h: Any) -> Signal | None:
        """Return the signal of the student's real step, or None where no step was looked ahead.

        It is made from the feedback h (a tensor, or a dict of them) on the signal of the step that
        was looked ahead, and has no graph. With None, that step is the real one. Costs a forward
        and a backward pass more; possible with one step only.
        """
        return None

    # By default there is nothing to refuse.
    def check(self, outputs: Tensor, outer: Batch, inner: Batch) -> None:  # noqa: B027
        """Refuse batches that do not fit the student's outputs, before anything moves.

        Raises: :class:`metapl.MetaplError`.
        """

    def default_teacher_losses(self, batch: Batch) -> tuple[Any, ...]:
        """Return the teacher's own losses for an inner batch.

        They are used if the trainer was built without ``teacher_losses``.
        """
        return ()

    def default_outer_optimizer(self, teacher: nn.Module) -> torch.optim.Optimizer | None:
        """Return the teacher's optimizer, or None for the trainer's own default, SGD at 0.05.

        It is used if the trainer was built without ``outer_optimizer``.

        Where the feedback is the teacher's only gradient, choose a rule whose step does not depend
        on the gradient's size, such as Adam: the feedback on one example of a batch is of the order
        of 1e-4, so that SGD at 0.05 does not move a table of weights in hundreds of steps.
        """
        return None

    def first_steps(self, steps: int) -> int:
        """Return how many steps of a fit the student takes alone, before the teacher begins.

        ``steps`` is the number of all steps of the :meth:`metapl.BilevelTrainer.fit`. The first
        ones are by :meth:`first_signal`; by default there are none.

        For a signal that is made from what the student knows, such as its losses, which say nothing
        about a label before it has learned anything. :meth:`metapl.BilevelTrainer.step` and its
        pure form have no first steps.
        """
        return 0

    def first_signal(
        self, teacher: nn.Module, batch: Batch, student_outputs: Any, *, generator: Random
    ) -> Signal:
        """Return the signal of the :meth:`first_steps`; by default that of the teacher as it is."""
        return self.signal(teacher, batch, student_outputs, generator=generator)


def kind_of(problem: Any) -> str:
    """Return the name of a problem's class."""
    return type(problem).__name__


def modules_in(problem: Any) -> list[nn.Module]:
    """Return the modules that a problem holds, with their parts."""
    return [part for module in _held_modules(problem) for part in module.modules()]


def _held_modules(problem: Any) -> list[nn.Module]:
    """Return the modules in the attributes of a problem, without their parts."""
    leaves = pytree.tree_leaves(getattr(problem, "__dict__", {}))
    return [leaf for leaf in leaves if isinstance(leaf, nn.Module)]


def overrides(problem: BilevelProblem, method: str) -> bool:
    """Return whether a problem has a method of its own in the place of the default one."""
    return getattr(type(problem), method) is not getattr(BilevelProblem, method)


def has_rows(problem: BilevelProblem, signal: Signal, rows: int) -> dict[str, bool]:
    """Return whether each field of a signal's value has a row for each of so many examples.

    Where the problem does not say so, a field has rows if its length is that of the batch.
    """
    fields = signal.fields()
    declaration = problem.signal_has_rows
    declared: dict[str, bool | None]
    if isinstance(declaration, Mapping):
        declared = {field_name(key): has for key, has in declaration.items()}
        if unknown := [key for key in declaration if field_name(key) not in fields]:
            named = f"{kind_of(problem)}.signal_has_rows names {few(unknown)}"
            raise MetaplError(f"{named}; expected keys of the signal's value: {few(fields)}.")
    else:
        declared = dict.fromkeys(fields, declaration)
    has_rows_by_field = {}
    for name, t in fields.items():
        if name in FIELDS_BESIDE_VALUE:
            continue
        has_rows_here = declared.get(name)
        if has_rows_here is None:
            has_rows_here = t.ndim > 0 and len(t) == rows
        has_rows_by_field[name] = t.ndim > 0 and has_rows_here
    return has_rows_by_field


# The signature of a method is asked for in every step, and does not change.
@cache
def _parameter_count(method: Callable[..., Any]) -> int:
    return len(inspect.signature(method).parameters)


def enters_input(problem: BilevelProblem) -> bool:
    """Return whether the signal enters the student's input in the inner batch.

    It does if the method is ``student_input(self, batch, signal)``.
    """
    return _parameter_count(type(problem).student_input) > 2


def refuse_signal_in_outer_input(problem: BilevelProblem) -> None:
    """Refuse ``outer_input(self, batch, signal)``.

    Outside of a step, as where the student is evaluated, there is no signal. A module that the
    problem holds is there at any time.
    """
    if _parameter_count(type(problem).outer_input) > 2:
        given = f"{kind_of(problem)} has outer_input(batch, signal)"
        raise MetaplError(f"{given}; expected outer_input(self, batch), which reads self.teacher.")


def outer_variables(problem: BilevelProblem, teacher: nn.Module | None) -> dict[str, nn.Parameter]:
    """Return the teacher's parameters that the outer loss may read, by their names in the teacher.

    An outer loss reads outer variables through a module that the problem holds, which is the
    teacher or a part of it, or a module that shares parameters with it. Without such a module there
    are none, whatever the loss does.
    """
    if teacher is None:
        return {}
    held = {id(p) for module in _held_modules(problem) for p in module.parameters()}
    return {name: p for name, p in trainable(teacher).items() if id(p) in held}


def sum_and_weight(outer_loss: Any) -> tuple[Tensor, Tensor | float]:
    """Return as (sum, weight) what a problem's ``outer_loss`` returned.

    A scalar is a sum with the weight 1.0, a number. Anything else is refused.
    """
    if not isinstance(outer_loss, tuple | list):
        scalar_loss(
            outer_loss, "the problem's outer_loss", "take the mean, or return (sum, weight)"
        )
        return outer_loss, 1.0
    total: Any = outer_loss[0] if len(outer_loss) == 2 else outer_loss
    scalar_loss(total, "the sum that the problem's outer_loss returned", "return (sum, weight)")
    weight = outer_loss[1]
    if not isinstance(weight, Tensor):
        weight = total.new_full((), weight)
    if weight.ndim or weight.requires_grad:
        expected = "a scalar without a gradient: mask.sum(), say, or .detach() of it"
        raise unexpected("the weight of the problem's outer_loss is", weight, expected)
    return wide(total), weight.to(wide(total))
