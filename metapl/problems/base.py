"""The bilevel problem: two pure losses, and the teacher's signal about a batch."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, few
from metapl.execution.batch import first_input, joined, labeled_pair
from metapl.execution.buffers import own_code
from metapl.execution.checks import described, refuse_not_finite, scalar_loss
from metapl.execution.numerics import wide

Params = Mapping[str, Tensor]
Kind = Literal["soft", "hard"]  # of a signal: differentiable, or sampled
Random = torch.Generator | Tensor | None  # what labels are drawn by; a tensor is the noise itself, on the pure road
OuterLoss = Tensor | tuple[Tensor, Tensor | float]  # a mean over examples; or a sum, and the weight to divide it by


@dataclass(frozen=True)
class Signal:
    """The teacher's signal about the inner batch; the tensors carry the teacher's graph.

    Args:
        value: the input of the inner loss: class probabilities q (B, C), sampled classes (B,), weights of examples
            (B,), corrected labels (B, C), ...; or several of these, as a dict of tensors by name. Each floating-point
            tensor of a dict gets a feedback of its own, and the others are constants.
        log_prob: (B,), log p_i(value_i), where ``value`` was sampled; ``None`` where ``value`` is differentiable.
        probs: (B, C), the distribution that ``value`` was sampled from, where a mode may take the expectation over it;
            the inner loss must then accept a ``value`` of this shape as well, and be linear in it: the expected loss is
            the loss of the expected label (cross-entropy is; modes that rely on it check it).
        outputs: (B, C), the teacher's outputs that the signal was made from, for teacher losses that need them.
    """

    value: Tensor | Any  # a tensor, or a dict of tensors
    log_prob: Tensor | None = None
    probs: Tensor | None = None
    outputs: Tensor | None = None

    def __getitem__(self, key: str) -> Tensor:
        """A tensor of a dict of several."""
        tensors: dict[str, Tensor] = vars(self)["value"]
        return tensors[key]

    def differentiable(self) -> dict[str, Tensor]:
        """The fields that an inner loss may be differentiated with respect to; none if ``value`` was sampled."""
        return {} if self.sampled else {name: t for name, t in self.fields().items() if t.is_floating_point()}

    @property
    def sampled(self) -> bool:
        """Whether ``value`` was drawn, so that only its log-probability can be differentiated."""
        return self.log_prob is not None

    def fields(self) -> dict[str, Tensor]:
        """Its tensors by name; those of a dict are called ``value['weight']``, say, and come first."""
        named: dict[str, Any] = vars(self)
        if isinstance(self.value, dict):
            named = {field_of(key): t for key, t in self.value.items()} | named
        return {name: t for name, t in named.items() if isinstance(t, Tensor)}

    def having(self, fields: Mapping[str, Tensor]) -> Signal:
        """The same with other tensors in some of its :meth:`fields`."""
        own: dict[str, Any] = {name: t for name, t in fields.items() if name in vars(self)}
        if isinstance(self.value, dict):
            own["value"] = {key: fields.get(field_of(key), t) for key, t in self.value.items()}
        return replace(self, **own)

    def chunks(self, parts: int) -> list[Signal]:
        """The signal about each of ``parts`` micro-batches."""
        columns = {name: t.chunk(parts) for name, t in self.fields().items()} if parts > 1 else {}
        return [self.having({name: t[i] for name, t in columns.items()}) for i in range(parts)] if columns else [self]

    def detached(self) -> Signal:
        """The same signal without the teacher's graph, for the student and the estimators."""
        return self.having({name: t.detach() for name, t in self.fields().items()})


def field_of(key: object) -> str:
    """The name of a field of a signal whose value is a dict."""
    return f"value[{key!r}]"


def check_signal(signal: Any, problem: Any, method: str = "signal") -> Signal:
    """What a problem's ``signal``, or another ``method``, returned, refused if it is not a signal of finite tensors."""
    value: Any = getattr(signal, "value", None)
    returned = ""
    parts: dict[str | None, Any] = value if isinstance(value, dict) else {None: value}
    if not isinstance(signal, Signal):
        returned = described(signal)
    elif isinstance(value, dict) and not (value and all(isinstance(key, str) for key in value)):
        returned = f"a Signal whose value is {described(value)}"
    elif isinstance(value, dict) and signal.sampled:
        returned = f"a Signal with a log_prob, whose value is {described(value)}"
    elif odd := [key for key, t in parts.items() if not isinstance(t, Tensor) or t.is_complex()]:
        returned = f"a Signal whose {'value' if odd[0] is None else field_of(odd[0])} is {described(parts[odd[0]])}"
    elif signal.log_prob is not None and signal.log_prob.shape != value.shape[:1]:
        returned = f"a Signal whose log_prob is {described(signal.log_prob)} beside a value, {described(value)}"
    if returned:
        raise MetaplError(
            f"what {kind_of(problem)}.{method} returned is {returned}; expected a metapl.Signal: metapl.Signal(value), "
            "of a tensor of real numbers with a row for each example, or a dict of such tensors by name; or "
            "metapl.Signal(value, log_prob=...), with one log-probability for each, where a tensor was sampled."
        )
    checked: Signal = signal
    for key, t in parts.items():
        if t.is_floating_point():
            refuse_not_finite(t, _NOT_FINITE if key is None else f"{field_of(key)} of {_NOT_FINITE}")
    return checked


_NOT_FINITE = (
    "the teacher's signal, by the problem's signal(), is NaN or infinite; the teacher's weights have probably "
    "diverged: lower its learning rate, or look for such values in what it was built from."
)


def joined_signals(signals: Sequence[Signal]) -> Signal:
    """The signal about the union of micro-batches."""
    first, *others = (signal.fields() for signal in signals)
    scalar = next((name for name, t in first.items() if t.ndim == 0), None) if others else None
    if scalar is not None:
        raise MetaplError(
            f"the problem's signal is a scalar ({scalar}), and a batch is taken in micro-batches (accumulate), each "
            "with a signal of its own; expected accumulate=1, or a value with a dimension, such as "
            f"signal.{scalar}[None]."
        )
    refuse_other_fields(signals, "another micro-batch")
    return signals[0].having({name: joined([t, *(fields[name] for fields in others)]) for name, t in first.items()})


def refuse_other_fields(signals: Sequence[Signal], where: str) -> None:
    """Refuse signals that have not all the same fields and shapes."""
    shapes = [[f"{name} {tuple(t.shape)}" for name, t in sorted(signal.fields().items())] for signal in signals]
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise MetaplError(
            f"the problem's signal has tensors of the shapes {few(shapes[0])}, and in {where} {few(other)}; expected "
            "the same."
        )


@runtime_checkable
class BilevelProblem(Protocol):
    r"""Teach a student with a signal, and judge the signal by the student's loss afterwards.

    .. math:: \min_{\theta_T} L(\theta'), \quad
              \theta' = U(\theta, \nabla_\theta \tfrac1B \sum_i \ell_i(S(x_u; \theta), \mathrm{signal}(\theta_T)))

    Any object with these three methods is a problem; :class:`metapl.problems.Problem` has the optional methods, with
    defaults.
    """

    @abstractmethod
    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Random) -> Signal:
        """The teacher's signal about ``batch``; ``student_outputs`` (B, ...) are detached, and None where the signal is
        asked for before the student runs (see :meth:`metapl.problems.Problem.student_input` and
        :meth:`metapl.problems.Problem.normalized_signal`)."""

    @abstractmethod
    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """ℓ_i, shape (B,), without the mean over the batch, which metapl takes."""

    @abstractmethod
    def outer_loss(self, outputs: Tensor, batch: Any) -> OuterLoss:
        """L of the student's outputs on the labeled ``batch``: a scalar, which is a mean over examples, or a pair
        (sum, weight) of scalars for any other mean, such as one over tokens. L is Σ sum / Σ weight over the
        micro-batches and processes that share the batch; the weight carries no gradient."""


class Problem(BilevelProblem):
    """A :class:`BilevelProblem` with defaults for the optional methods."""

    teacher_classifies: ClassVar[bool] = False
    """Whether the teacher maps the student's inputs to class logits, so that its accuracy can be measured."""
    teacher_reads_inputs: ClassVar[bool] = True
    """Whether the teacher is given the student's inputs, so that their type must be that of its weights."""
    signal_has_rows: ClassVar[bool | Mapping[str, bool] | None] = None
    """Whether a signal has a row for each example of the inner batch, or is one for all of them, such as a matrix; of a
    dict of tensors, by their names. None, or a name that is left out: where its length is that of the batch."""
    has_teacher: ClassVar[bool] = True
    """Whether a network makes the signal; without one, ``teacher=None`` is given and nothing learns from the feedback
    but :meth:`revised_signal`."""

    def student_input(self, batch: Any) -> Any:
        """The student's input in an inner batch: a tensor or a dict itself, the first element of a tuple.

        With a second parameter, ``student_input(self, batch, signal)``, it is made from the teacher's signal too. The
        signal is then asked for before the student runs, so that ``student_outputs`` is None in :meth:`signal`.
        """
        return first_input(batch)

    def normalized_signal(self, signal: Signal) -> Signal:
        """The signal that the student learns from, made from what :meth:`signal` said about all rows of the inner
        batch, those of other micro-batches and processes included, such as weights that sum to one over the batch.

        A function of the given rows alone that returns as many; the feedback goes through it to the teacher. Where a
        problem has one, :meth:`signal` is asked before the student runs, so that ``student_outputs`` is None there.
        """
        return signal

    def outer_batch(self, batch: Any) -> Any:
        """The outer batch as :meth:`outer_loss` reads it; here (inputs, labels), any other batch is refused. To read
        other batches, any nesting of tensors with a row for each example, return ``batch`` itself."""
        mend = " For other batches, give the problem a method outer_batch(batch) that returns what outer_loss reads."
        return labeled_pair(batch, mend=mend)

    def outer_input(self, batch: Any) -> Any:
        """The student's input in an outer batch: a tensor or a dict itself, the first element of a tuple."""
        return first_input(batch)

    def for_modes(self, labels: Sequence[Kind], mode: str = "") -> Problem:
        """The problem with a kind of signal that the mode takes; ``labels`` are the mode's kinds, by preference."""
        return self

    def exact(self) -> Problem | None:
        """The same problem with a differentiable signal, whose exact gradient other modes are compared with; None: no
        such comparison."""
        return None

    def revised_signal(self, signal: Signal, h: Any) -> Signal | None:
        """The signal of the student's real step, made from the feedback h on the signal that was looked ahead with (a
        tensor, or a dict of them), which has no graph; None: that step is the real one. Costs a forward and a backward
        pass more; one step only."""
        return None

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:
        """Refuse, with a :class:`metapl.MetaplError`, batches that do not fit the student's outputs; called before
        anything moves."""

    def default_teacher_losses(self, batch: Any) -> tuple[Any, ...]:
        """The teacher's own losses for an inner batch, used if the trainer was built without ``teacher_losses``."""
        return ()

    def columns(self, signal: Signal, outputs: Tensor) -> dict[str, Tensor]:
        """Scalars for the report of a step, from the signal and the student's outputs (B, ...).

        If the teacher's outputs are class logits of the student's shape: ``pseudo_label_confidence``,
        ``pseudo_label_entropy`` (nats) and ``agreement`` (of the student's first class with the teacher's).
        """
        logits = signal.outputs
        if logits is None or logits.shape != outputs.shape:
            return {}
        q = signal.probs if signal.sampled else signal.value
        q = q if isinstance(q, Tensor) else wide(logits).softmax(-1)
        return {
            "pseudo_label_confidence": q.amax(-1).mean(),
            "pseudo_label_entropy": torch.special.entr(q).sum(-1).mean(),
            "agreement": (logits.argmax(-1) == outputs.argmax(-1)).double().mean(),
        }

    def counts(self, signal: Signal, outputs: Tensor) -> dict[str, list[int]]:
        """Whole numbers for the report of a step; for class labels ``pseudo_label_classes``: the number of examples of
        each class by the teacher's labels, drawn or most probable."""
        logits = signal.outputs
        if logits is None or logits.shape != outputs.shape:
            return {}
        chosen = signal.value if signal.sampled else logits.argmax(-1)
        return {"pseudo_label_classes": torch.bincount(chosen.flatten(), minlength=logits.shape[-1]).tolist()}


class Completed(Problem):
    """An object with the three methods of a problem, whose other methods override the defaults of :class:`Problem`."""

    signal: Any = None  # these three are the given object's
    inner_loss: Any = None
    outer_loss: Any = None

    def __init__(self, given: BilevelProblem) -> None:
        self.given = given
        for name in {*vars(Problem), *vars(BilevelProblem)} - {"for_modes"}:
            if hasattr(given, name) and not name.startswith("_"):
                setattr(self, name, getattr(given, name))

    def for_modes(self, labels: Sequence[Kind], mode: str = "") -> Problem:
        choose = getattr(self.given, "for_modes", None)
        return self if choose is None else as_problem(choose(labels, mode))


def as_problem(problem: BilevelProblem) -> Problem:
    """The problem, with the optional methods of :class:`Problem`."""
    return problem if isinstance(problem, Problem) else Completed(problem)


def kind_of(problem: Any) -> str:
    """The name of a problem's class, as its author wrote it."""
    return type(problem.given if isinstance(problem, Completed) else problem).__name__


def has_own(problem: Problem, method: str) -> bool:
    """Whether a problem has this method from elsewhere than the defaults."""
    own = problem.given if isinstance(problem, Completed) else problem
    return getattr(type(own), method, None) not in (None, getattr(Problem, method))


def has_rows(problem: Problem, signal: Signal, rows: int) -> dict[str, bool]:
    """Whether each field of a signal's value has a row for each of so many examples."""
    told, others = problem.signal_has_rows, ("log_prob", "probs", "outputs")
    value = {name: t for name, t in signal.fields().items() if name not in others}
    by_name: dict[str, Any] = dict.fromkeys(value, told)
    if isinstance(told, Mapping):
        by_name = {field_of(key): has for key, has in told.items()}
    unknown = by_name.keys() - value.keys()
    if unknown:
        raise MetaplError(
            f"signal_has_rows of {kind_of(problem)} is {told!r}, and its signal has {few(value)}; expected True or "
            "False, or these by the keys of a dict of tensors."
        )
    known = {name: has for name, has in by_name.items() if has is not None}
    return {n: bool(known.get(n, len(t) == rows)) if t.ndim else False for n, t in value.items()}


def enters_input(problem: Problem) -> bool:
    """Whether the signal enters the student's input: whether ``student_input`` takes one."""
    if own_code(problem.student_input):  # which takes the batch
        return False
    signature = inspect.signature(problem.student_input)
    needed = [p for p in signature.parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    entering = "signal" in signature.parameters or len(needed) > 1
    try:
        signature.bind(*[None] * (1 + entering))
    except TypeError:
        raise MetaplError(
            f"{kind_of(problem)}.student_input has the parameters {signature}; expected (batch), or (batch, signal) "
            "for an input that is made from the teacher's signal."
        ) from None
    return entering


def asked_first(problem: Problem) -> bool:
    """Whether the signal is asked for before the student runs."""
    return enters_input(problem) or has_own(problem, "normalized_signal")


def sum_and_weight(given: Any) -> tuple[Tensor, Tensor | float]:
    """What a problem's ``outer_loss`` returned as (sum, weight); a scalar is a sum of weight 1.0, a number."""
    if not isinstance(given, tuple | list):
        scalar_loss(given, "the problem's outer_loss", "take the mean, or return (sum, weight)")
        return given, 1.0
    if len(given) != 2:
        raise MetaplError(f"the problem's outer_loss is {described(given)}; expected a scalar, or (sum, weight).")
    total, weight = given
    scalar_loss(total, "the sum that the problem's outer_loss returned", "take the sum")
    if isinstance(weight, int | float):
        weight = total.new_full((), weight)
    if not isinstance(weight, Tensor) or weight.ndim or weight.is_complex() or weight.requires_grad:
        raise MetaplError(
            f"the weight that the problem's outer_loss returned beside its sum is {described(weight)}; expected a "
            "number, or a tensor without dimensions and without a gradient, such as mask.sum()."
        )
    return wide(total), weight.to(wide(total))
