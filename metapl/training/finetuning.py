"""Finetuning: what Meta Pseudo Labels ends with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from metapl.problems.losses import CrossEntropy
from metapl.training.loop import FitResult
from metapl.training.loss_trainer import LossTrainer
from metapl.training.options import refuse_unknown


def finetune(
    student: nn.Module,
    labeled: Any,
    *,
    steps: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    precision: str = "float32",
    accumulate: int = 1,
    compile: bool = False,
    clip_norm: float | None = None,
    **options: Any,
) -> FitResult:
    """Train a student, as it is now, on labeled batches alone.

    Args:
        student: is trained where it is.
        labeled: as for :meth:`metapl.training.Trainer.fit`.
        steps: 1,000 or so in the paper, at a small learning rate.
        optimizer: over the student's parameters; default ``SGD(lr=1e-3)``.
        precision, accumulate, compile, clip_norm: as for :class:`metapl.LossTrainer`.
        options: as for :meth:`metapl.training.Trainer.fit` (``validation``, ``out``, ``resume``, ...); the phase is
            called ``finetune``.

    Source: Meta Pseudo Labels, section 2 (finetuning the student), with its learning rate in the recipes.
    """
    refuse_unknown(options, finetune, LossTrainer.fit)
    trainer = LossTrainer(
        student,
        (CrossEntropy(),),
        optimizer=torch.optim.SGD(student.parameters(), lr=1e-3) if optimizer is None else optimizer,
        precision=precision,
        accumulate=accumulate,
        compile=compile,
        clip_norm=clip_norm,
    )
    return trainer.fit(labeled, steps=steps, **{"phase": "finetune", **options})
