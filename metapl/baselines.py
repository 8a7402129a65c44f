"""One network on its own losses: supervised learning, UDA, finetuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metapl import checks
from metapl.errors import MetaplError
from metapl.fit import Loop
from metapl.losses import CrossEntropy, TeacherLoss
from metapl.problem import Signal


@dataclass(frozen=True)
class LossReport:
    """What one step of :class:`LossTrainer` saw; numbers stay on the device until they are read."""

    step: int
    scalars: dict[str, Tensor]
    fault: checks.Fault = field(default_factory=checks.Fault, repr=False)

    def as_dict(self) -> dict[str, float]:
        """Every scalar, by one transfer: ``loss`` and a ``loss_<name>`` per term."""
        values = torch.stack([t.detach().double() for t in self.scalars.values()]).tolist()
        return dict(zip(self.scalars, values, strict=True))

    def counts(self) -> dict[str, list[int]]:
        """Nothing is counted."""
        return {}


class LossTrainer(Loop):
    """Train one network on a sum of losses, with the same loop, checkpoints and selection as the bilevel trainer.

    The same loss values serve as in the teacher's objective: ``(CrossEntropy(),)`` is supervised learning and, at a
    small learning rate, finetuning; ``(CrossEntropy(), UDA())`` is UDA.

    Args:
        model: the network.
        losses: the terms.
        optimizer: any ``torch.optim`` optimiser over the model's parameters.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast).
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Sequence[TeacherLoss] = (CrossEntropy(),),
        *,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None = None,
        precision: str = "float32",
    ) -> None:
        self.student = model
        self.losses, self.optimizer = tuple(losses), optimizer
        if not self.losses:
            raise MetaplError("LossTrainer was given no losses; expected at least one, such as CrossEntropy().")
        self.device = next(model.parameters()).device
        self.clip_norm, self.precision = clip_norm, precision
        self.steps_done = 0

    @property
    def schedulable(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    def step(self, labeled: Any, unlabeled: Any = None) -> LossReport:
        """One step on a labelled batch and, where a loss reads it, an unlabelled one."""
        checks.batches(labeled, labeled if unlabeled is None else unlabeled, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        # No signal was made: a loss that wants the weak view's outputs makes them.
        nothing = Signal(torch.empty(0, device=self.device))
        with self._autocast():
            terms = {
                f"loss_{term.name}": term(
                    self.student, labeled=labeled, unlabeled=unlabeled, signal=nothing, step=self.steps_done
                )
                for term in self.losses
            }
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_norm)
        self.optimizer.step()
        self.steps_done += 1
        return LossReport(self.steps_done - 1, {"loss": loss.detach(), **{k: t.detach() for k, t in terms.items()}})

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next step, but the data."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done = state["steps_done"]
