r"""What every estimator of the teacher's gradient has in common.

**Sign, everywhere:** the feedback is :math:`h = -\,dL(\theta')/d\,\mathrm{signal}`; positive means "say this more".

An estimator puts three choices together: where w comes from (:meth:`Path.pullbacks`), where ż comes from
(:meth:`InnerStep.tangent` or a difference of outputs), and what is credited with it (:mod:`metapl.feedback.credit`).
It touches no parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from metapl import checks
from metapl.errors import MetaplError
from metapl.feedback.lookahead import InnerStep, Path
from metapl.numerics import Tree
from metapl.problems.base import Kind, Signal

State = dict[str, Tensor]
Normalization = Literal["gradient", "learning_rate", "cosine"]


@dataclass(frozen=True)
class Feedback:
    """h, and which part of the signal it speaks of.

    Args:
        h: the feedback, without a graph: of the shape of that part, or a scalar for the whole batch.
        about: ``"value"`` for a differentiable signal; ``"log_prob"`` for sampled labels, by their score;
            ``"probs"`` for sampled labels whose expectation is taken; None: no feedback.
        beside: the same of other fields of a differentiable signal that the inner loss reads, by name.
    """

    h: Tensor
    about: Literal["value", "log_prob", "probs"] | None
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    def teacher_loss(self, signal: Signal) -> Tensor:
        """−Σ stopgrad(h)·signal, a scalar with the teacher's graph; its gradient is the hypergradient dL(θ′)/dθ_T.

        The sum, not the mean: h carries the 1/B of the inner loss already, and the mean would come to 1/B of the exact
        gradient.
        """
        if self.about is None:
            return self.h.new_zeros(())
        parts = {self.about: self.h, **self.beside}
        terms = [-(h * getattr(signal, name)).sum() for name, h in parts.items()]
        if torch.is_grad_enabled() and not any(term.requires_grad for term in terms):
            raise MetaplError(
                f"the teacher's signal ({self.about}) carries no gradient to the teacher's weights, so the feedback "
                "would be lost: it was detached, or made under torch.no_grad(). Leave its graph in place, or take "
                'mode="none", which gives no feedback.'
            )
        return torch.stack(terms).sum()

    def check_finite(self) -> None:
        """Refuse feedback that would make the teacher NaN."""
        for h in (self.h, *self.beside.values()):
            checks.finite_feedback(h)

    def over(self, divisor: Tensor | float) -> Feedback:
        """h divided by a positive number."""
        return Feedback(self.h / divisor, self.about, {name: h / divisor for name, h in self.beside.items()})

    def chunks(self, parts: int) -> list[Feedback]:
        """The feedback on each of so many micro-batches."""
        if self.h.ndim == 0 or parts == 1:
            return [self] * parts
        beside = {name: h.chunk(parts) for name, h in self.beside.items()}
        pieces = enumerate(self.h.chunk(parts))
        return [Feedback(h, self.about, {name: others[i] for name, others in beside.items()}) for i, h in pieces]


class Estimator(ABC):
    """How the feedback is found: a frozen value; what changes from step to step goes in and comes out as state."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The mode's name."""

    @property
    @abstractmethod
    def labels(self) -> tuple[Kind, ...]:
        """The kinds of signal it takes, ``"soft"`` (differentiable) and ``"hard"`` (sampled); its own choice first."""

    @property
    def keep_graph(self) -> bool:
        """Whether the inner gradient must stay differentiable in the signal."""
        return False

    @property
    def looks_ahead(self) -> bool:
        """Whether it takes more than one student step."""
        return False

    def init(self) -> State:
        """The state before the first step."""
        return {}

    @abstractmethod
    def feedback(self, path: Path, state: State) -> tuple[list[Feedback], State]:
        """One :class:`Feedback` per step of the path, and the next state."""


def check_choice(estimator: object, name: str, allowed: Sequence[str]) -> None:
    """Refuse a value of a field that is not among ``allowed``."""
    given = getattr(estimator, name)
    if given not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise MetaplError(f"{type(estimator).__name__}({name}={given!r}): expected one of {names}.")


def check_truncate(estimator: object) -> None:
    """Refuse a number of steps below 1."""
    given = getattr(estimator, "truncate", None)
    if given is not None and (not isinstance(given, int) or given < 1):
        raise MetaplError(
            f"{type(estimator).__name__}(truncate={given!r}): expected the number of last steps that are "
            "differentiated, 1 or more, or None for all."
        )


def padded(found: Sequence[Feedback], path: Path) -> list[Feedback]:
    """Feedback on the last steps of a path, with none on the steps before them."""
    skipped = path.steps[: len(path.steps) - len(found)]
    about, beside = found[0].about, found[0].beside

    def nothing(signal: Signal, name: str) -> Tensor:
        return torch.zeros_like(getattr(signal, name))

    return [
        Feedback(nothing(step.signal, about or "value"), about, {name: nothing(step.signal, name) for name in beside})
        for step in skipped
    ] + list(found)


def divisor(normalization: str, step: InnerStep, w: Tree | None = None) -> Tensor | float:
    """What h is divided by.

    ``"gradient"``: 1, the true gradient, whose size goes with η and so dies with its schedule. ``"learning_rate"``: η,
    so that the size follows the labeled gradient alone. ``"cosine"``: ‖w‖·‖g‖, so that the sum of h over the batch (by
    sampled labels) is the cosine between the student's step and the labeled gradient, in [−1, 1] whatever the scale
    of either; the teacher's gradient then keeps its direction within a step but not its size between steps.
    """
    if normalization == "gradient":
        return 1.0
    if normalization == "learning_rate":
        eta = step.learning_rate
        if eta is None:
            raise MetaplError(
                'normalization="learning_rate" was asked for, but a TorchOpt transform does not tell its learning '
                'rate; use a torch.optim inner optimizer, or normalization="gradient".'
            )
        return eta if eta > 0 else 1.0
    if w is None:
        raise MetaplError(f"normalization={normalization!r} needs a direction, which this mode has not.")
    return step.size(w).clamp_min(1e-30)
