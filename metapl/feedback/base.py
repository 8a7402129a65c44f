r"""What every estimator of the teacher's gradient has in common.

**Sign, everywhere:** the feedback is :math:`h = -\,dL(\theta')/d\,\mathrm{signal}`; positive means "say this more".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.inner import InnerStep
from metapl.numerics import Tree, dot, norm
from metapl.problem import Signal

State = dict[str, Tensor]
Kind = Literal["soft", "hard"]
Normalization = Literal["gradient", "learning_rate", "cosine"]


@dataclass(frozen=True)
class Feedback:
    """h, and which part of the signal it speaks of.

    Args:
        h: the feedback, without a graph: of the shape of that part, or a scalar for the whole batch.
        about: ``"value"`` for a differentiable signal; ``"log_prob"`` for sampled labels, by their score;
            ``"probs"`` for sampled labels whose expectation is taken.
    """

    h: Tensor
    about: Literal["value", "log_prob", "probs"] | None

    def teacher_loss(self, signal: Signal) -> Tensor:
        """−Σ stopgrad(h)·signal, a scalar with the teacher's graph; its gradient is the hypergradient dL(θ′)/dθ_T.

        The sum, not the mean: h carries the 1/B of the inner loss already, and the mean would come to 1/B of the exact
        gradient.
        """
        if self.about is None:
            return self.h.new_zeros(())
        part: Tensor = getattr(signal, self.about)
        if torch.is_grad_enabled() and not part.requires_grad:
            raise MetaplError(
                f"the teacher's signal ({self.about}) carries no gradient to the teacher's weights, so the feedback "
                "would be lost: it was detached, or made under torch.no_grad(). Leave its graph in place, or take "
                'mode="none", which gives no feedback.'
            )
        return -(self.h * part).sum()


@runtime_checkable
class Estimator(Protocol):
    """How the feedback is found: a frozen value; what changes from step to step goes in and comes out as state."""

    @property
    def name(self) -> str:
        """The mode's name."""
        ...

    @property
    def labels(self) -> tuple[Kind, ...]:
        """The kinds of signal it takes, ``"soft"`` (differentiable) and ``"hard"`` (sampled); its own choice first."""
        ...

    @property
    def keep_graph(self) -> bool:
        """Whether the inner gradient must stay differentiable in the signal."""
        ...

    def init(self) -> State:
        """The state before the first step."""
        ...

    def feedback(self, steps: Sequence[InnerStep], state: State) -> tuple[list[Feedback], State]:
        """One :class:`Feedback` per inner step, and the next state."""
        ...


def only(steps: Sequence[InnerStep], name: str) -> InnerStep:
    """The one step that a mode of one lookahead step works on."""
    if len(steps) != 1:
        raise MetaplError(f"mode '{name}' looks one student step ahead; {len(steps)} were given. Give one batch.")
    return steps[0]


def check_choice(estimator: object, field: str, allowed: Sequence[str]) -> None:
    """Refuse a value of ``field`` that is not among ``allowed``."""
    given = getattr(estimator, field)
    if given not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise MetaplError(f"{type(estimator).__name__}({field}={given!r}): expected one of {names}.")


def divisor(how: str, step: InnerStep, w: Tree | None = None) -> Tensor | float:
    """What h is divided by.

    ``"gradient"``: 1, the true gradient, whose size goes with η and so dies with its schedule. ``"learning_rate"``: η,
    so that the size follows the labelled gradient alone. ``"cosine"``: ‖w‖·‖g‖, so that the sum of h over the batch (by
    sampled labels) is the cosine between the student's step and the labelled gradient, in [−1, 1] whatever the scale
    of either; the teacher's gradient then keeps its direction within a step but not its size between steps.
    """
    if how == "gradient":
        return 1.0
    if how == "learning_rate":
        eta = step.learning_rate
        if eta is None:
            raise MetaplError(
                'normalization="learning_rate" was asked for, but a TorchOpt transform does not tell its learning '
                'rate; use a torch.optim inner optimiser, or normalization="gradient".'
            )
        return eta if eta > 0 else 1.0
    if w is None:
        raise MetaplError(f"normalization={how!r} needs a direction, which this mode has not.")
    size = norm(w) * norm(step.gradient)
    return size.clamp_min(1e-30)


def scalar_product(step: InnerStep, w: Tree) -> Tensor:
    """Algorithm 1's scalar, −⟨w, g⟩."""
    return -dot(w, step.gradient)
