"""What the loop requires of a trainer, and the report of a step: its numbers, on the device until they are read."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.ranks import ALONE, Ranks
from metapl.metrics.metric import Term
from metapl.problems.base import Signal
from metapl.words import summary

Say = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """The numbers of a step. They stay on the device until they are read: ``as_dict``, or an attribute, gives floats.

    Args:
        step: the step's number, from 0.
        scalars: by name; means over the processes that share the batch.
        fault: what was checked on the device; raised when the report is read.
    """

    step: int
    scalars: dict[str, Tensor]
    fault: checks.Fault = field(default_factory=checks.Fault)

    def __repr__(self) -> str:
        feedback = {"feedback": self.feedback} if "feedback" in vars(self) else {}
        return summary(type(self).__name__, step=self.step, **self.scalars, **feedback)

    @property
    def flag(self) -> Tensor:
        """Whether a check of the step has failed: a boolean scalar on the device. On a CPU such a step is refused."""
        return self.fault.flag

    def as_dict(self) -> dict[str, float]:
        """Every scalar, in one transfer from the device."""
        self.fault.raise_if_found()
        found = self._columns()
        values = torch.stack([t.detach().double().reshape(()) for t in found.values()]).tolist()
        return dict(zip(found, values, strict=True))

    def _columns(self) -> dict[str, Tensor]:
        return self.scalars

    def __getattr__(self, name: str) -> float:
        known = self._columns() if "scalars" in self.__dict__ and not name.startswith("_") else {}
        if name not in known:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {', '.join(known)}")
        return self.as_dict()[name]


@dataclass(frozen=True, kw_only=True, repr=False)
class StepReport(Report):
    """The numbers of one step of the bilevel trainer.

    Args:
        feedback: h, minus the gradient of the labeled loss in the signal, as the mode shapes it; a tensor, or a dict of
            them where the signal is one. A tuple of these for a :class:`metapl.Lookahead`.
        scalars: ``inner_loss`` (ℓ at θ), ``outer_loss`` (L(θ′), where the mode computes it), ``teacher_loss`` (the sum
            of its own losses) and a ``teacher_<name>`` for each of these; with ``feedback_ratio``, the
            ``feedback_weight`` that gave it. Read with these: ``feedback_mean`` and ``feedback_std``, of the entries of
            this rank's h.
        signal: the teacher's signal about the last inner batch, without its graph, of this rank's rows.
        student_outputs: S(x_u; θ) on that batch, of this rank's rows.
    """

    feedback: Any
    signal: Signal
    student_outputs: Tensor

    def _columns(self) -> dict[str, Tensor]:
        h = torch.cat([t.detach().double().flatten() for t in pytree.tree_leaves(self.feedback)])
        return {**self.scalars, "feedback_mean": h.mean(), "feedback_std": h.std(correction=0)}


class Stepwise(ABC):
    """A trainer that goes step by step, and whose state can be saved between any two.

    Attributes:
        student: the network that is trained, evaluated and kept.
        teacher: the network that makes the labels, where there is one.
        teacher_classifies: whether the teacher gives class logits, so that its accuracy can be measured.
        as_given: the student as it was handed over, perhaps in ``DistributedDataParallel``.
        device: where the networks are.
        ranks: the processes that share its batches.
        lookahead: unlabeled batches that the loop draws for a step; several are given as a :class:`metapl.Lookahead`.
    """

    student: nn.Module
    teacher: nn.Module | None = None
    as_given: nn.Module
    device: torch.device
    ranks: Ranks = ALONE
    lookahead: int = 1

    @property
    def teacher_classifies(self) -> bool:
        return self.teacher is not None

    @property
    def late_starts(self) -> Sequence[int]:
        """How many steps from now a loss begins that costs nothing before, such as UDA's."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the student's weights, which arrays of floating point are given."""
        return next((p.dtype for p in self.student.parameters() if p.is_floating_point()), torch.float32)

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher})

    @property
    @abstractmethod
    def schedulable(self) -> list[torch.optim.Optimizer]:
        """The optimizers whose learning rates the schedule moves: the student's, then the teacher's."""

    @abstractmethod
    def step(self, labeled: Any, unlabeled: Any = None) -> Report:
        """One step."""

    def teacher_step(self, labeled: Any, unlabeled: Any = None) -> Report:
        """One step of the teacher alone, while the student waits; called only where there is a :attr:`teacher`."""
        raise MetaplError(f"{type(self).__name__} has no teacher that could learn while the student waits; use wait=0.")

    @abstractmethod
    def read_outer(self, batch: Any, name: str) -> tuple[Any, Any]:
        """The student's inputs in a labeled batch, which errors call ``name``, and the batch as its loss reads it."""

    @abstractmethod
    def outer_terms(self) -> Sequence[Term]:
        """What the student is validated by, where its metric is the loss: the sum of these."""

    @property
    def classifies(self) -> bool:
        """Whether the losses are known to be of classes, without being asked
        (:func:`metapl.metrics.metric.of_classes`)."""
        return False

    @abstractmethod
    def live_state(self) -> dict[str, Any]:
        """:meth:`state_dict` without the copies: the next step changes its tensors."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next step, except the data and the default generators.

        A snapshot: later steps do not change it, unlike the ``state_dict`` of a PyTorch module or optimizer, which
        shares its tensors. Cost: a copy of the weights and of the optimizers' states on their device.
        """
        return copy.deepcopy(self.live_state())

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""

    def settings(self) -> dict[str, Any]:
        """What else decides a step, as plain values: losses and their weights, precision, clipping. A resumed fit has
        the same."""
        return {}

    def exact_cosine(self, labeled: Any, unlabeled: Any) -> float | None:
        """The cosine between this trainer's teacher gradient and the exact one; None where it has none."""
        return None
