"""The bilevel problem: two pure losses, and the teacher's signal about a batch."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.batch import first_input, joined, labeled_pair
from metapl.execution.checks import described, scalar_loss, transformed
from metapl.execution.numerics import wide
from metapl.execution.ranks import ALONE, sharing

Params = Mapping[str, Tensor]
Kind = Literal["soft", "hard"]  # of a signal: differentiable, or sampled
Random = (
    torch.Generator | Tensor | None
)  # what labels are drawn by; a tensor is the noise itself, on the pure road
OuterLoss = (
    Tensor | tuple[Tensor, Tensor | float]
)  # a loss of all rows; or a sum, and the weight to divide it by
Method = TypeVar("Method", bound=Callable[..., Any])


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

    value: Tensor | Any  # a tensor, or a dict of tensors
    log_prob: Tensor | None = None
    probs: Tensor | None = None
    outputs: Tensor | None = None

    def __getitem__(self, key: str) -> Tensor:
        """A tensor of a dict of several."""
        found: Tensor = self.value[key]  # type: ignore[index]
        return found

    def differentiable(self) -> dict[str, Tensor]:
        """The fields that an inner loss may be differentiated with respect to.

        None if ``value`` was sampled.
        """
        return (
            {}
            if self.sampled
            else {name: t for name, t in self.fields().items() if t.is_floating_point()}
        )

    @property
    def sampled(self) -> bool:
        """Whether ``value`` was drawn, so that only its log-probability can be differentiated."""
        return self.log_prob is not None

    def fields(self) -> dict[str, Tensor]:
        """Its tensors by name.

        Those of a dict are called ``value['weight']``, say, and come first.
        """
        found = {"value": self.value}
        if isinstance(self.value, dict):
            found = {field_name(key): t for key, t in self.value.items()}
        if self.log_prob is not None:
            found["log_prob"] = self.log_prob
        if self.probs is not None:
            found["probs"] = self.probs
        if self.outputs is not None:
            found["outputs"] = self.outputs
        return found

    def having(self, fields: Mapping[str, Tensor]) -> Signal:
        """The same with other tensors in some of its :meth:`fields`."""
        value = fields.get("value", self.value)
        if isinstance(self.value, dict):
            value = {key: fields.get(field_name(key), t) for key, t in self.value.items()}
        log_prob, probs = fields.get("log_prob", self.log_prob), fields.get("probs", self.probs)
        return type(self)(value, log_prob, probs, fields.get("outputs", self.outputs))

    def chunks(self, parts: int) -> list[Signal]:
        """The signal about each of ``parts`` micro-batches."""
        if parts == 1:
            return [self]
        columns = {name: t.chunk(parts) for name, t in self.fields().items()}
        return [self.having({name: t[i] for name, t in columns.items()}) for i in range(parts)]

    def detached(self) -> Signal:
        """A copy without the teacher's graph.

        A signal may be weights, such as a table of labels, which move.
        """
        value: Any = self.value
        several, others = isinstance(value, dict), (self.log_prob, self.probs, self.outputs)
        copied = (
            {key: t.detach().clone() for key, t in value.items()}
            if several
            else value.detach().clone()
        )
        return type(self)(copied, *[None if t is None else t.detach().clone() for t in others])


def uniform(
    rows: int, classes: int, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform noise, (rows, classes).

    Drawn in float32 whatever the type, so that a seed draws the same labels.
    """
    u = torch.rand(rows, classes, generator=generator, dtype=torch.float32, device=like.device)
    return u.double() if like.dtype == torch.float64 else u


def gumbel(
    rows: int, classes: int, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Standard Gumbel noise, (rows, classes): log p plus it is greatest at a class drawn from p."""
    return -(-uniform(rows, classes, like, generator).log()).log()


def draw_classes(probabilities: Tensor, generator: torch.Generator | Tensor | None) -> Tensor:
    """A class for each row of probabilities (B, C), as a column (B, 1).

    In the place of a generator, Gumbel noise.
    """
    if isinstance(generator, Tensor):
        return (probabilities.log() + generator).argmax(-1, keepdim=True)
    # Every rank draws for all rows: with equal generators the labels are those that one process
    # would draw.
    ranks = ALONE if transformed() else sharing.get()
    rows, classes = probabilities.shape
    every = uniform(ranks.size * rows, classes, probabilities, generator)
    # log u / p is greatest where log p and the Gumbel noise −log(−log u) are, in half of the
    # operations.
    own = every if ranks.alone else ranks.own_rows(every)
    return (own.log() / probabilities).argmax(-1, keepdim=True)


def field_name(key: object) -> str:
    return f"value[{key!r}]"


def joined_signals(signals: Sequence[Signal], leaves: bool = False) -> Signal:
    """The signal about the union of micro-batches, or the only one.

    As ``leaves``, a graph begins at its fields.
    """
    whole = signals[0]
    if len(signals) > 1:
        fields = [signal.fields() for signal in signals]
        whole = whole.having(
            {name: joined([found[name] for found in fields]) for name in fields[0]}
        )
    for t in whole.differentiable().values() if leaves else ():
        t.requires_grad_()
    return whole


class BilevelProblem(ABC):
    r"""Teach a student with a signal, and judge the signal by the student's loss afterwards.

    .. math:: \min_{\theta_T} L(\theta'), \quad
              \theta' = U(\theta, \nabla_\theta \tfrac1B \sum_i \ell_i(S(x_u; \theta), \mathrm{signal}(\theta_T)))

    A problem is a subclass with the three abstract methods; the others have defaults.
    docs/write-a-problem.md has one.
    """

    classifies: ClassVar[bool] = False
    """Whether the student's outputs are class logits (B, C), of which
    :meth:`metapl.BilevelTrainer.predict` gives the probabilities."""
    teacher_classifies: ClassVar[bool] = False
    """Whether the teacher maps the student's inputs to class logits, so that its accuracy can be measured."""
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
        self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Random
    ) -> Signal:
        """The teacher's signal about ``batch``; ``student_outputs`` (B, ...) are detached, and None
        where the signal is asked for before the student runs (see :meth:`student_input` and
        :attr:`signal_of_batch`)."""

    @abstractmethod
    def inner_loss(
        self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None
    ) -> Tensor:
        """ℓ_i, shape (B,), without the mean over the batch, which metapl takes. ``params`` are the
        student's weights by name, to be read and not to be written to."""

    @abstractmethod
    def outer_loss(self, outputs: Tensor, batch: Any) -> OuterLoss:
        """L of the student's outputs on the labeled ``batch``: a scalar, any function of its rows,
        or a pair (sum, weight) of scalars for a mean, such as one over tokens or over labels that
        are not ignored. L is Σ sum / Σ weight over the micro-batches and processes that share the
        batch; the weight carries no gradient.

        In micro-batches (``accumulate``) a scalar is taken once, of the outputs of all rows of this
        process: one more forward pass on the labeled batch where L is differentiated, and all of
        these outputs in memory. A pair costs neither. Over several processes, a scalar is the mean
        of theirs.
        """

    def student_input(self, batch: Any) -> Any:
        """The student's input in an inner batch: a tensor or a dict itself, the first element of a tuple.

        With a second parameter, ``student_input(self, batch, signal)``, it is made from the
        teacher's signal too. The signal is then asked for before the student runs, so that
        ``student_outputs`` is None in :meth:`signal`.
        """
        return first_input(batch)

    def outer_batch(self, batch: Any) -> Any:
        """The outer batch as :meth:`outer_loss` reads it; here (inputs, labels), any other batch is
        refused. To read other batches, any nesting of tensors with a row for each example, return
        ``batch`` itself."""
        return labeled_pair(
            batch, mend=" For other batches, give the problem a method outer_batch(batch)."
        )

    def outer_input(self, batch: Any) -> Any:
        """The student's input in an outer batch: a tensor or a dict itself, the first element of a tuple.

        With a second parameter, ``outer_input(self, batch, signal)``, it is made from the signal of
        the last student step too, such as architecture weights. The teacher then learns from both
        ways to the outer loss, as it does where :meth:`outer_loss` reads the teacher through a
        module that the problem holds: its gradient is that of the feedback plus ∂L(θ′; φ)/∂φ at
        fixed θ′ (the direct term; docs/contract.md), in the modes ``forward``, ``unrolled``,
        ``difference`` and ``implicit``.
        """
        return first_input(batch)

    def for_modes(self, labels: Sequence[Kind], mode: str = "") -> Problem:
        """The problem with a kind of signal that the mode takes.

        ``labels`` are the mode's kinds, by preference.
        """
        return self

    def exact(self) -> Problem | None:
        """The same problem with a differentiable signal, whose exact gradient other modes are
        compared with; None: no such comparison."""
        return None

    def revised_signal(self, signal: Signal, h: Any) -> Signal | None:
        """The signal of the student's real step, made from the feedback h on the signal that was
        looked ahead with (a tensor, or a dict of them), which has no graph; None: that step is the
        real one. Costs a forward and a backward pass more; one step only."""
        return None

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:  # noqa: B027  # nothing to refuse
        """Refuse, with a :class:`metapl.MetaplError`, batches that do not fit the student's
        outputs; called before anything moves."""

    def default_teacher_losses(self, batch: Any) -> tuple[Any, ...]:
        """The teacher's own losses for an inner batch, used if the trainer was built without ``teacher_losses``."""
        return ()

    def default_outer_optimizer(self, teacher: nn.Module) -> torch.optim.Optimizer | None:
        """Return the optimizer of the teacher for a trainer that was built without
        ``outer_optimizer``, or None for the trainer's own default, SGD at 0.05.

        Where the feedback is the teacher's only gradient, choose a rule whose step does not depend
        on the gradient's size, such as Adam: the feedback on one example of a batch is of the order
        of 1e-4, so that SGD at 0.05 does not move a table of weights in hundreds of steps.
        """
        return None

    def first_steps(self, steps: int) -> int:
        """Return how many of the ``steps`` of a :meth:`metapl.BilevelTrainer.fit` the student takes
        alone, by :meth:`first_signal`, before the teacher begins; by default none.

        For a signal that is made from what the student knows, such as its losses, which say nothing
        about a label before it has learned anything. :meth:`metapl.BilevelTrainer.step` and its
        pure form have no first steps.
        """
        return 0

    def first_signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Random
    ) -> Signal:
        """Return the signal of the :meth:`first_steps`; by default that of the teacher as it is."""
        return self.signal(teacher, batch, student_outputs, generator=generator)


Problem = BilevelProblem


def kind_of(problem: Any) -> str:
    return type(problem).__name__


def overrides(problem: Problem, method: str) -> bool:
    return getattr(type(problem), method) is not getattr(BilevelProblem, method)


def has_rows(problem: Problem, signal: Signal, rows: int) -> dict[str, bool]:
    """Whether each field of a signal's value has a row for each of so many examples."""
    said: Any = problem.signal_has_rows
    values = {
        name: t
        for name, t in signal.fields().items()
        if name not in ("log_prob", "probs", "outputs")
    }
    several = isinstance(said, Mapping)
    own = (
        {field_name(key): has for key, has in said.items()}
        if several
        else dict.fromkeys(values, said)
    )
    return {
        n: t.ndim > 0 and (len(t) == rows if own.get(n) is None else own[n])
        for n, t in values.items()
    }


@cache  # asked in every step
def _parameters(method: Any) -> int:
    return len(inspect.signature(method).parameters)


def enters_input(problem: Problem) -> bool:
    """Whether the signal enters the student's input: ``student_input(self, batch, signal)``."""
    return _parameters(type(problem).student_input) > 2


def mean_over_rows(outer_loss: Method) -> Method:
    """Mark an ``outer_loss`` whose scalar is the mean over the rows of a batch, whatever the batch:
    in micro-batches it is then the mean of theirs. A method that takes its place is not marked."""
    vars(outer_loss)["is_mean_over_rows"] = True
    return outer_loss


def is_mean_over_rows(problem: Problem) -> bool:
    """Whether a problem's ``outer_loss`` is one that :func:`mean_over_rows` has marked."""
    return getattr(problem.outer_loss, "is_mean_over_rows", False)


def reads_signal_in_outer_input(problem: Problem) -> bool:
    """Whether the signal enters the student's input in the outer batch.

    ``outer_input(self, batch, signal)``.
    """
    return _parameters(type(problem).outer_input) > 2


def outer_input(problem: Problem, batch: Any, signal: Signal) -> Any:
    """The student's input in an outer batch, made with the signal where the problem's ``outer_input`` takes it."""
    if reads_signal_in_outer_input(problem):
        return problem.outer_input(batch, signal)  # type: ignore[call-arg]
    return problem.outer_input(batch)


def sum_and_weight(given: Any) -> tuple[Tensor, Tensor | float]:
    """What a problem's ``outer_loss`` returned as (sum, weight).

    A scalar is a sum of weight 1.0, a number.
    """
    if not isinstance(given, tuple | list):
        scalar_loss(given, "the problem's outer_loss", "take the mean, or return (sum, weight)")
        return given, 1.0
    total: Any = given[0] if len(given) == 2 else given
    scalar_loss(total, "the sum that the problem's outer_loss returned", "return (sum, weight)")
    weight = given[1] if isinstance(given[1], Tensor) else total.new_full((), given[1])
    if weight.ndim or weight.requires_grad:
        raise MetaplError(
            f"the weight of the problem's outer_loss is {described(weight)}; expected mask.sum(), "
            "say."
        )
    return wide(total), weight.to(wide(total))
