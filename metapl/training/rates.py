"""The learning rates of a trainer, moved by the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metapl.training.contract import Stepwise
from metapl.training.options import FitOptions


class Rates:
    """The base rates as the optimizers came with them, and what the schedule makes of them.

    Args:
        trainer: whose rates; of a TorchOpt transform, which brings its own schedule, none is known.
        options: the schedule.
    """

    def __init__(self, trainer: Stepwise, options: FitOptions) -> None:
        optimizers = trainer.schedulable
        names = ["student_lr"] if trainer.teacher is None else ["student_lr", "teacher_lr"]
        names = names[len(names) - len(optimizers) :]
        self.options = options
        self.optimizers = dict(zip(names, optimizers, strict=True))
        self.settings = {name: [_settings(group) for group in o.param_groups] for name, o in self.optimizers.items()}
        self.base = {name: [group["lr"] for group in o.param_groups] for name, o in self.optimizers.items()}

    def move(self, step: int) -> None:
        """To where the schedule has them at ``step``."""
        for name in self.optimizers:
            self._scale(name, self.options.student_rate(step) if name == "student_lr" else self.options.rate(step))

    def put_back(self) -> None:
        """To the base rates."""
        for name in self.optimizers:
            self._scale(name, 1.0)

    def keep_settings(self, allowed: Sequence[str]) -> None:
        """Of the optimizers that may differ from those of a checkpoint, take the settings that they came with."""
        for name, optimizer in self.optimizers.items():
            if f"{name.removesuffix('_lr')}_optimizer" in allowed:
                for group, settings in zip(optimizer.param_groups, self.settings[name], strict=False):
                    group.update(settings)

    def now(self) -> dict[str, float]:
        """``student_lr`` and ``teacher_lr``, where they are known; of several groups, the first one's."""
        return {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}

    def _scale(self, name: str, factor: float) -> None:
        groups, base = self.optimizers[name].param_groups, self.base[name]
        base.extend(group["lr"] for group in groups[len(base) :])  # added since, such as layers that were unfrozen
        for group, rate in zip(groups, base, strict=True):
            group["lr"] = rate * factor


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "lr")}
