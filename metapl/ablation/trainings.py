"""Short trainings by each mode, from the same start, over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from metapl.ablation.batches import pairs
from metapl.ablation.figures import Outcome, Trainings
from metapl.ablation.gradients import CannotRun, reasons_told, sibling
from metapl.execution.rng import RandomState, replayed
from metapl.feedback import Altered, Estimator
from metapl.feedback.inner_step import outer_batch
from metapl.metrics import evaluate_logits, predict_logits
from metapl.metrics.predictions import batches_of, eval_mode
from metapl.problems.base import sum_and_weight
from metapl.training.trainer import BilevelTrainer


def short_trainings(
    trainer: BilevelTrainer,
    start: Mapping[str, Any],
    modes: Iterable[Estimator],
    labeled: Any,
    unlabeled: Any,
    *,
    steps: int,
    seeds: Sequence[int],
    validation: Any,
    done: Callable[[], None] = lambda: None,
) -> Trainings:
    """Train by each mode for a few steps at the optimizers' present rates, without selection or averaging.

    The seed is that of everything drawn: labels, dropout, and the order of batches. Sources with numbered batches
    (lists, step batches) are read from batch ``seed · steps`` on, so that seeds see different batches and all modes
    see the same. Every training begins in the state ``start``; the caller puts the trainer back.
    """
    found: dict[str, Outcome | str] = {}
    for mode in modes:
        ends = []
        try:
            for seed in seeds:
                with reasons_told():
                    ends.append(_train(trainer, start, mode, labeled, unlabeled, steps, seed, validation))
                done()
        except CannotRun as error:
            found[mode.name] = str(error)
            continue
        outer, *validated = zip(*ends, strict=True)
        found[mode.name] = Outcome(outer, *validated)
    return Trainings(steps, tuple(seeds), found)


def _train(
    trainer: BilevelTrainer,
    start: Mapping[str, Any],
    mode: Estimator,
    labeled: Any,
    unlabeled: Any,
    steps: int,
    seed: int,
    validation: Any,
) -> tuple[float, ...]:
    """One training; what it ended with: outer loss, and validation loss and accuracy if there is validation data."""
    trained = sibling(trainer, mode=replace(mode, seed=seed) if isinstance(mode, Altered) else mode)
    own = {"mode": trained.mode.name, "mode_state": trained.mode.init(), "generator": None}
    trained.load_state_dict({**start, **own})
    torch.manual_seed(seed)
    if trained.generator is not None:
        trained.generator.manual_seed(seed)
    # One pair more than is trained on: the outer loss is measured on the next labeled batch.
    for t, (x_l, x_u) in enumerate(pairs(trained, labeled, unlabeled, steps + 1, first=seed * steps, seed=seed)):
        if t < steps:
            trained.step(x_l, x_u)
        else:
            outer = _outer_loss(trained, x_l)
    if validation is None:
        return (outer,)
    with replayed(RandomState.now(trained.device)):
        found = evaluate_logits(*predict_logits(trained.student, batches_of(validation, trained.device)))
    return outer, found.negative_log_likelihood, found.accuracy


def _outer_loss(trainer: BilevelTrainer, labeled: Any) -> float:
    batch = outer_batch(trainer.problem, labeled)
    with eval_mode(trainer.student), torch.no_grad():
        outputs = trainer.student(trainer.problem.outer_input(batch))
        total, weight = sum_and_weight(trainer.problem.outer_loss(outputs, batch))
        return float(total / weight)
