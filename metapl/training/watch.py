"""Numbers gone wrong, found without waiting for the device at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from metapl.errors import MetaplError
from metapl.execution.checks import Fault
from metapl.execution.shards import local
from metapl.training.contract import Stepwise
from metapl.training.report import Report


class Watch:
    """Keeps on the device which step was the first to go wrong; it is read when something is read anyway.

    Args:
        trainer: whose weights are looked at too.
    """

    def __init__(self, trainer: Stepwise) -> None:
        self.trainer = trainer
        self.first_bad = torch.full((), torch.inf, device=trainer.device)
        self.faults: list[tuple[int, Fault]] = []

    def note(self, report: Report, t: int) -> None:
        """Remember whether a loss of step t was not finite, and what was wrong with its batch."""
        losses = [v.detach().float().reshape(()) for k, v in report.scalars.items() if k != "feedback_ratio"]
        bad = ~torch.isfinite(torch.stack(losses)).all()
        here = torch.where(bad, torch.full_like(self.first_bad, t + 1), torch.full_like(self.first_bad, torch.inf))
        self.first_bad = torch.minimum(self.first_bad, here)
        if report.fault.findings:
            self.faults.append((t, report.fault))

    def refuse(self, t: int, last_good: str) -> None:
        """Stop where a batch was wrong or a loss not finite up to step t, or the weights after it are not.

        Args:
            t: the step.
            last_good: what to say of the checkpoints.
        """
        for step, fault in self.faults:
            fault.raise_if_found(f"step {step + 1}: ")
        self.faults.clear()
        first = float(self.first_bad)
        if math.isfinite(first):
            what = f"a loss was NaN or infinite at step {int(first)}"
        elif self.trainer.ranks.any(not _all_finite([self.trainer.student, self.trainer.teacher])):
            what = f"weights were NaN or infinite after step {t + 1}, and the losses were not yet"
        else:
            return
        raise MetaplError(
            f"{what}; {last_good}. Lower the learning rates or feedback_weight, or look for examples with extreme "
            "values."
        )


def _all_finite(modules: Sequence[nn.Module | None]) -> bool:
    weights = [local(p.detach()) for module in modules if module is not None for p in module.parameters()]
    return bool(torch.stack([torch.isfinite(w).all() for w in weights]).all())
