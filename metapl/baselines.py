"""One network on its own losses: supervised learning, UDA, finetuning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metapl import checks
from metapl.accumulate import micro_batches
from metapl.batch import labeled_pair, plain
from metapl.compiled import CompiledPasses, refuse_compiled
from metapl.deferred import Movable, undone_where
from metapl.errors import MetaplError
from metapl.execution.buffers import nothing_moved
from metapl.execution.rng import RandomState
from metapl.guards import one_at_a_time
from metapl.losses import CrossEntropy, TeacherLoss, refuse_split_batches, teacher_losses
from metapl.problem import Signal
from metapl.training import Trainer


@dataclass(frozen=True)
class LossReport:
    """What one step of :class:`LossTrainer` saw; numbers stay on the device until they are read."""

    step: int
    scalars: dict[str, Tensor]
    fault: checks.Fault = field(default_factory=checks.Fault, repr=False)

    def as_dict(self) -> dict[str, float]:
        """Every scalar, by one transfer: ``loss`` and a ``loss_<name>`` per term."""
        self.fault.raise_if_found()
        values = torch.stack([t.detach().double() for t in self.scalars.values()]).tolist()
        return dict(zip(self.scalars, values, strict=True))

    def counts(self) -> dict[str, list[int]]:
        """Nothing is counted."""
        return {}


class LossTrainer(Trainer):
    """Train one network on a sum of losses, with the same loop, checkpoints and selection as the bilevel trainer.

    The same loss values serve as in the teacher's objective: ``(CrossEntropy(),)`` is supervised learning and, at a
    small learning rate, finetuning; ``(CrossEntropy(), UDA())`` is UDA.

    Args:
        model: the network.
        losses: the terms, each a mean over its batch.
        optimizer: any ``torch.optim`` optimiser over the model's parameters.
        clip_norm: the greatest global norm of the gradient; None: no clipping.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast).
        accumulate: micro-batches that each batch is taken in, one after another: the same numbers (but for batch
            statistics and dropout masks, which are a micro-batch's own) in about 1/accumulate of the memory.
        compile: run the network through ``torch.compile``, as in :class:`~metapl.BilevelTrainer`.

    Raises: :class:`metapl.MetaplError` before anything moves.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Sequence[TeacherLoss] = (CrossEntropy(),),
        *,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None = None,
        precision: str = "float32",
        accumulate: int = 1,
        compile: bool = False,
    ) -> None:
        refuse_compiled(model=model)
        self.student = model
        self.losses, self.optimizer = teacher_losses(losses, "losses"), optimizer
        if not self.losses:
            raise MetaplError("LossTrainer was given no losses; expected at least one, such as CrossEntropy().")
        if accumulate < 1:
            raise MetaplError(f"accumulate={accumulate}: expected 1 or more.")
        refuse_split_batches(self.losses, accumulate)
        self.device = next(model.parameters()).device
        self.clip_norm, self.precision, self.accumulate = clip_norm, precision, accumulate
        self.compiled = CompiledPasses(*([model] if compile else []))
        self.steps_done = 0
        self._moves = False  # whether it is known that the optimizer moves the network

    @property
    def schedulable(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    def step(self, labeled: Any, unlabeled: Any = None) -> LossReport:
        """One step on a labelled batch and, where a loss reads it, an unlabelled one; as in the bilevel trainer."""
        checks.no_inference_mode()
        labeled, unlabeled = labeled_pair(labeled), plain(unlabeled)
        if not self._moves:
            checks.moves(self.optimizer, self.student)
            self._moves = True
        fault = checks.Fault()
        with (
            one_at_a_time,
            checks.deferred_to(fault),
            nothing_moved(self.student, random=RandomState.now(self.device)) as buffers,
        ):
            checks.batches(labeled, labeled if unlabeled is None else unlabeled, self.device)
            batches = zip(
                micro_batches(labeled, self.accumulate, "labeled"),
                micro_batches(unlabeled, self.accumulate, "unlabeled"),
                strict=True,
            )
            self.optimizer.zero_grad(set_to_none=True)
            with self.compiled():
                parts = [self._backward(x_l, x_u) for x_l, x_u in batches]
            with undone_where(fault.flag, Movable((self.student,), buffers, [self.optimizer])):
                if self.clip_norm is not None:
                    nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_norm)
                self.optimizer.step()
            self.steps_done += 1
            means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
            return LossReport(self.steps_done - 1, means, fault)

    def _backward(self, labeled: Any, unlabeled: Any) -> dict[str, Tensor]:
        """The terms on a micro-batch, whose share of the gradient is added to what is there."""
        # No signal was made: a loss that wants the weak view's outputs makes them.
        nothing = Signal(torch.empty(0, device=self.device))
        terms: dict[str, Tensor] = {}
        with self._autocast():
            for term in self.losses:
                value = term(self.student, labeled=labeled, unlabeled=unlabeled, signal=nothing, step=self.steps_done)
                checks.scalar_loss(value, f"the loss {term.name!r}")
                terms[f"loss_{term.name}"] = terms.get(f"loss_{term.name}", 0) + value
        loss = torch.stack(list(terms.values())).sum()
        checks.learns(loss, "network")
        if loss.requires_grad:  # UDA alone is a plain 0 before its start
            (loss / self.accumulate).backward()
        return {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}

    def live_state(self) -> dict[str, Any]:
        """:meth:`state_dict` without the copies."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.steps_done = state["steps_done"]
