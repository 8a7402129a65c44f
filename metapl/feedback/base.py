r"""The base class of all estimators of the teacher's gradient; what they return is a
:class:`metapl.feedback.credit.Feedback`.

**Sign, everywhere:** the feedback is :math:`h = -\,dL(\theta')/d\,\mathrm{signal}`; positive means "say this more".

An estimator combines three choices: how w is computed (:meth:`Path.pullback`, :meth:`Path.adjoints`), how ż is
computed (:meth:`InnerStep.tangent` or a difference of outputs), and what gets the credit
(:mod:`metapl.feedback.credit`). It changes no parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.layout import ONE_PROCESS, Capability
from metapl.execution.local import NOTHING, LocalStudent
from metapl.execution.numerics import Tree
from metapl.feedback.credit import Feedback
from metapl.feedback.inner_step import Credits, InnerStep
from metapl.feedback.keeping import ALL, Keeping
from metapl.feedback.path import Path
from metapl.problems.base import Kind, kind_of
from metapl.runs.fields import Range, check_fields

State = dict[str, Tensor]
Normalization = Literal["gradient", "learning_rate", "cosine"]
Steps = Annotated[int, Range(1, of="a number of steps")]
Decay = Annotated[float, Range(0, 1, of="a decay")]


class Estimator(ABC):
    """A way to compute the feedback: a frozen value. What changes between steps is passed in and out as state."""

    name: ClassVar[str]
    """The mode's name."""
    labels: ClassVar[tuple[Kind, ...]]
    """The kinds of signal that it takes, ``"soft"`` (differentiable) and ``"hard"`` (sampled), by preference."""
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
        with suppress(NameError):  # annotations under TYPE_CHECKING cannot be read, and are not checked
            check_fields(self)

    @property
    def exact(self) -> bool:
        """Whether the feedback on a differentiable signal is the whole gradient, but for rounding."""
        return False

    def keeping(self, steps: int, size: int, student: LocalStudent) -> Keeping:
        """Which of so many steps of a look-ahead, of so many bytes each, keep their states."""
        return ALL

    @property
    def requires(self) -> frozenset[Capability]:
        return frozenset({ONE_PROCESS} if self.keep_graph else ())

    def init(self) -> State:
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
            if not any(of_step.used for of_step in feedback):
                given = f"the inner loss of {kind_of(path.problem)} does not depend on its signal"
                raise MetaplError(f"{given}; expected one that does, without detach() or argmax, or mode='none'.")
            total = path.inner_loss  # a sum of all is finite where all are
            for of_step in feedback:
                for h in (of_step.h, *of_step.others.values()):
                    total = total + (h.sum() if h.ndim else h)
            checks.refuse_not_finite(
                total,
                "the inner loss or the feedback is NaN or infinite; lower the student's learning rate, or look for "
                "extreme examples.",
            )
        return feedback, state


def padded(feedback: Sequence[Feedback], path: Path) -> list[Feedback]:
    """Feedback on the last steps of a path, and zero feedback on the steps before them."""
    first, zeros = feedback[0], []
    part = first.part or "value"
    for step in path.steps[: len(path.steps) - len(feedback)]:
        fields = step.signal.fields()
        others = {name: torch.zeros_like(fields[name]) for name in first.others}
        zeros.append(replace(first, h=torch.zeros_like(fields[part]), others=others))
    return [*zeros, *feedback]


def divisor(normalization: str, step: InnerStep, w: Tree | None = None) -> Tensor | float:
    """The divisor of h, by the name of the normalization.

    ``"gradient"``: 1, the true gradient, which decays with η. ``"learning_rate"``: η, so that the size depends on the
    labeled gradient only; for SGD, because over an η as small as Adam's h drowns the teacher's own losses
    (docs/no-help.md). ``"cosine"``: ‖w‖·‖g‖; the sum of h over the batch is then the cosine between the student's step
    and the labeled gradient.
    """
    if normalization == "learning_rate":
        eta = step.update.learning_rate
        if eta is None:
            raise MetaplError('a TorchOpt transform shows no learning rate; expected normalization="gradient".')
        return eta if eta > 0 else 1.0
    if normalization == "gradient":
        return 1.0
    assert w is not None, "a cosine is with a direction"
    return (step.space.norm(w) * step.space.norm(step.gradient)).clamp_min(1e-30)
