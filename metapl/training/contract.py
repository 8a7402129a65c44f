"""What the loop requires of a trainer."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from metapl.errors import MetaplError
from metapl.execution.ranks import ALONE, Ranks
from metapl.training.report import Report

Say = Callable[[str], None]


class Stepwise(ABC):
    """A trainer that goes step by step, and whose state can be saved between any two.

    Attributes:
        student: the network that is trained, evaluated and kept.
        teacher: the network that makes the labels, where there is one.
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
        """Whether the teacher maps a student's inputs to class logits, so that its accuracy can be measured."""
        return self.teacher is not None

    @property
    def late_starts(self) -> Sequence[int]:
        """How many steps from now a loss begins that costs nothing before, such as UDA's."""
        return ()

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
