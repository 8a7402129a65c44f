r"""The base class of all estimators of the teacher's gradient, and :class:`Feedback`, their result.

**Sign, everywhere:** the feedback is :math:`h = -\,dL(\theta')/d\,\mathrm{signal}`; positive means "say this more".

An estimator combines three choices: how w is computed (:meth:`Path.pullback`, :meth:`Path.adjoints`), how ż is
computed (:meth:`InnerStep.tangent` or a difference of outputs), and what gets the credit
(:mod:`metapl.feedback.credit`). It changes no parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.capabilities import ONE_PROCESS, Capability
from metapl.execution.local import NOTHING, LocalStudent
from metapl.execution.numerics import Tree
from metapl.feedback.inner_step import Credits, InnerStep
from metapl.feedback.keeping import ALL, Keeping
from metapl.problems.base import Kind, Signal, field_of, kind_of
from metapl.runs.fields import Range, check_fields

if TYPE_CHECKING:
    from metapl.feedback.path import Path

State = dict[str, Tensor]
Normalization = Literal["gradient", "learning_rate", "cosine"]
Steps = Annotated[int, Range(1, of="a number of steps")]
Decay = Annotated[float, Range(0, 1, of="a decay")]


@dataclass(frozen=True)
class Feedback:
    """The feedback h on a part of the signal.

    Args:
        h: without a graph: in the shape of that part, or a scalar for the whole batch.
        part: ``"value"`` for a differentiable signal, or the first of its :meth:`~metapl.Signal.fields` where it is a
            dict; ``"log_prob"`` for sampled labels, by their score; ``"probs"`` for sampled labels whose expectation is
            taken; None: no feedback.
        others: the feedback on the other fields of a differentiable signal, by name: of its dict, and those beside the
            value that the inner loss depends on.
        read: whether the inner loss depends on the signal at all.
    """

    h: Tensor
    part: str | None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    read: bool = True

    def teacher_loss(self, signal: Signal) -> Tensor:
        """−Σ stopgrad(h)·signal, a scalar with the teacher's graph; its gradient is the hypergradient dL(θ′)/dθ_T.

        It is a sum, not a mean, because h already contains the 1/B of the inner loss.
        """
        if self.part is None:
            return self.h.new_zeros(())
        parts, fields = {self.part: self.h, **self.others}, signal.fields()
        terms = [(-h * fields[name]).sum() for name, h in parts.items()]
        if torch.is_grad_enabled() and not any(term.requires_grad for term in terms):
            raise MetaplError(
                f"the teacher's signal ({self.part}) carries no gradient to the teacher's weights, so the feedback "
                "would be lost: it was detached, or made under torch.no_grad(). Keep its graph, or use "
                'mode="none", which gives no feedback.'
            )
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum()

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Feedback:
        """The same with h, and that on other fields, changed; ``change`` is also given the field's name."""
        others = {name: change(name, h) for name, h in self.others.items()}
        return replace(self, h=change(self.part or "", self.h), others=others)

    def divided_by(self, divisor: Tensor | float) -> Feedback:
        return self if isinstance(divisor, float) and divisor == 1.0 else self.mapped(lambda _, h: h / divisor)

    def chunks(self, parts: int) -> list[Feedback]:
        """The feedback on each of ``parts`` micro-batches."""
        if self.h.ndim == 0 or parts == 1:
            return [self] * parts
        return [self.mapped(lambda _, h, i=i: h.chunk(parts)[i]) for i in range(parts)]  # type: ignore[misc]

    def of_batch(self, step: InnerStep) -> Tensor | dict[str, Tensor]:
        """h on the whole batch, as the signal's value is: a tensor, or a dict of its floating-point tensors. Of a field
        without rows it is the sum over micro-batches, each of which has a signal of its own."""
        parts, value = len(step.passes), step.signal.value
        found = {
            name: h if parts == 1 or not h.ndim or step.has_rows(name) else h.reshape(parts, -1, *h.shape[1:]).sum(0)
            for name, h in {self.part or "": self.h.detach(), **self.others}.items()
        }
        if not isinstance(value, dict) or self.part is None:
            return found[self.part or ""]
        return {key: found[name].detach() for key in value if (name := field_of(key)) in found}


class Estimator(ABC):
    """A way to compute the feedback: a frozen value. What changes between steps is passed in and out as state."""

    credits: ClassVar[Credits] = "signal"
    """What gets a number of its own: each entry of the ``"signal"``, each ``"example"``, the ``"batch"``, or
    ``"nothing"``."""
    keep_graph: ClassVar[bool] = False
    """Whether the inner gradient must stay differentiable with respect to the signal."""
    keep_on: str | None = None
    """Where states of a look-ahead are kept, as for :class:`Forward`."""
    looks_ahead: ClassVar[bool] = False
    """Whether it takes more than one student step."""

    def __post_init__(self) -> None:
        with suppress(NameError):  # annotations that cannot be read hold nothing
            check_fields(self)

    @property
    @abstractmethod
    def name(self) -> str:
        """The mode's name."""

    @property
    @abstractmethod
    def labels(self) -> tuple[Kind, ...]:
        """The kinds of signal that it takes, ``"soft"`` (differentiable) and ``"hard"`` (sampled), by preference."""

    @property
    def exact(self) -> bool:
        """Whether the feedback on a differentiable signal is the whole gradient, but for rounding."""
        return False

    def keeping(self, steps: int, first: InnerStep) -> Keeping:
        """Which of so many steps of a look-ahead keep their weights, given the first; others are computed again."""
        return ALL

    @property
    def requires(self) -> frozenset[Capability]:
        """What it requires of the student's layout."""
        return frozenset({ONE_PROCESS} if self.keep_graph else ())

    def init(self) -> State:
        """The state before the first step."""
        return {}

    @abstractmethod
    def feedback(self, path: Path, state: State) -> tuple[list[Feedback], State]:
        """One :class:`Feedback` per step of the path, and the next state."""

    def graph_of(self, steps: int, student: LocalStudent) -> Literal["signal", "example"] | None:
        """In what g keeps a graph, over a path of so many steps: what gets the feedback; None: in nothing."""
        return None

    def checked_feedback(self, path: Path, state: State) -> tuple[list[Feedback], State]:
        """:meth:`feedback`, refused on all ranks where it would make the teacher NaN."""
        feedback, state = self.feedback(path, state)  # line 4: h
        with NOTHING if path.student.ranks.alone else path.student.ranks.agreed():
            if not any(found.read for found in feedback):
                raise MetaplError(
                    f"the inner loss of {kind_of(path.problem)} does not depend on its signal, so there is no feedback "
                    "on it; expected an inner_loss in which the signal acts on the student's outputs, without "
                    '.detach() or argmax; to train without feedback, mode="none".'
                )
            total = path.inner_loss  # a sum of all is finite where all are
            for found in feedback:
                for h in (found.h, *found.others.values()):
                    total = total + h.sum()
            checks.refuse_not_finite(
                total,
                "the inner loss or the feedback is NaN or infinite: the student has diverged, or some example's loss "
                "has no finite value or derivative; lower the student's learning rate, or look for extreme values.",
            )
        return feedback, state


def padded(feedback: Sequence[Feedback], path: Path) -> list[Feedback]:
    """Feedback on the last steps of a path, and zero feedback on the steps before them."""
    first, zeros = feedback[0], []
    for step in path.steps[: len(path.steps) - len(feedback)]:
        fields = step.signal.fields()
        of = {name: torch.zeros_like(fields[name]) for name in (first.part or "value", *first.others)}
        zeros.append(replace(first, h=of.pop(first.part or "value"), others=of))
    return [*zeros, *feedback]


def divisor(normalization: str, step: InnerStep, w: Tree | None = None) -> Tensor | float:
    """The divisor of h, by the name of the normalization.

    ``"gradient"``: 1. This is the true gradient; it is proportional to η and so decays with the schedule.
    ``"learning_rate"``: η, so that the size depends on the labeled gradient only; for SGD, because over an η as small
    as Adam's h drowns the teacher's own losses (docs/no-help.md). ``"cosine"``: ‖w‖·‖g‖. The sum of h over the batch
    (of sampled labels) is then the cosine between the student's step and the labeled gradient, in [−1, 1]; within a
    step the teacher's gradient keeps its direction, but its sizes in different steps change.
    """
    if normalization == "learning_rate":
        eta = step.update.learning_rate
        if eta is None:
            raise MetaplError(
                'normalization="learning_rate" was given, but a TorchOpt transform does not expose its learning rate; '
                'use a torch.optim inner optimizer, or normalization="gradient".'
            )
        return eta if eta > 0 else 1.0
    if normalization == "gradient":
        return 1.0
    if w is None:
        raise MetaplError(f"normalization={normalization!r} needs a direction w, which this mode does not compute.")
    return (step.space.norm(w) * step.space.norm(step.gradient)).clamp_min(1e-30)
