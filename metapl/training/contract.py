"""What the loop asks of a trainer, and of what its steps return."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metapl.checks import Fault

Say = Callable[[str], None]


class Report(Protocol):
    """What a step returns: numbers that stay on the device until they are read."""

    @property
    def fault(self) -> Fault: ...

    @property
    def scalars(self) -> dict[str, Tensor]: ...

    def as_dict(self) -> dict[str, float]: ...

    def counts(self) -> dict[str, list[int]]: ...


class Stepwise(ABC):
    """A trainer that goes step by step, and whose state can be saved between any two."""

    student: nn.Module
    device: torch.device
    lookahead: int = 1
    """Unlabelled batches that the loop draws for a step; more than one are given as a :class:`metapl.Lookahead`."""

    @property
    def labeller(self) -> nn.Module | None:
        """The teacher, where there is one."""
        return None

    @property
    def labeller_classifies(self) -> bool:
        """Whether the labeller maps a student's inputs to class logits, so that its accuracy can be measured."""
        return self.labeller is not None

    @property
    @abstractmethod
    def schedulable(self) -> list[torch.optim.Optimizer]:
        """The optimizers whose learning rates the schedule moves: the student's, then the teacher's."""

    @abstractmethod
    def step(self, labeled: Any, unlabeled: Any = None) -> Report:
        """One step."""

    def teacher_step(self, labeled: Any, unlabeled: Any = None) -> Report:
        """One step of the teacher alone, while the student waits; called only where there is a :attr:`labeller`."""
        raise NotImplementedError

    @abstractmethod
    def live_state(self) -> dict[str, Any]:
        """Everything that decides the next step, but the data and the default generators; the tensors are those that
        the next step moves."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next step, but the data and the default generators.

        A snapshot: later steps leave it as it is, where the ``state_dict`` of a module or an optimizer of PyTorch goes
        along with them. Cost: a copy of the weights and of the optimizers' states, where they are.
        """
        return copy.deepcopy(self.live_state())

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""

    def exact_cosine(self, labeled: Any, unlabeled: Any) -> float | None:
        """The cosine between this trainer's teacher gradient and the exact one; None where it has none."""
        return None
