"""How a mode's distance from the exact gradient changes with its step size, the temperature and the batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.ablation.figures import Distance, Sweep
from metapl.ablation.gradients import CannotRun, distance, exact_gradient, sibling
from metapl.execution.batch import length, rows
from metapl.feedback import Estimator, Lookahead
from metapl.feedback.difference import RELATIVE_STEP
from metapl.feedback.lookahead import inner_batches
from metapl.problems import PseudoLabels
from metapl.training.trainer import BilevelTrainer

STEPS = (0.01, 0.1, 1.0, 10.0)
"""Times the step size that a mode has."""

TEMPERATURES = (0.25, 0.5, 1.0, 2.0)
"""Times the problem's temperature."""

PARTS = (8, 4, 2, 1)
"""Of the unlabeled batch; no part has fewer than two examples, which batch statistics need."""


def sweeps(
    trainer: BilevelTrainer,
    modes: Iterable[Estimator],
    labeled: Any,
    unlabeled: Any,
    draws: int,
    done: Callable[[], None] = lambda: None,
) -> dict[str, Sweep | str]:
    """The modes over step sizes, temperatures and batch sizes, each against the exact gradient with the same setting.

    Args:
        trainer, labeled, unlabeled: where it is measured.
        modes: which have run there before.
        draws: of labels and of alterations.
        done: called after each setting.
    """
    modes = [mode for mode in modes if mode.name != "none"]  # zero is as far from any gradient
    found: dict[str, Sweep | str] = {}
    for name, sweep in (("epsilon", _over_steps), ("temperature", _over_temperatures), ("batch_size", _over_sizes)):
        found[name] = sweep(trainer, modes, labeled, unlabeled, draws)
        done()
    return found


def _over_steps(
    trainer: BilevelTrainer, modes: Sequence[Estimator], labeled: Any, unlabeled: Any, draws: int
) -> Sweep | str:
    """Modes with a ``relative_step``, as :class:`metapl.feedback.Difference` has."""
    with_step: list[Any] = [mode for mode in modes if hasattr(mode, "relative_step") and dataclasses.is_dataclass(mode)]
    if not with_step:
        return "none of the modes takes a finite difference, so there is no step size."
    dtype = torch.promote_types(next(trainer.student.parameters()).dtype, torch.float32)
    own = with_step[0].relative_step or RELATIVE_STEP[dtype]
    values = tuple(own * factor for factor in STEPS if own * factor < 1)
    exact = exact_gradient(trainer, labeled, unlabeled)
    found = {
        mode.name: tuple(
            _tried(trainer, dataclasses.replace(mode, relative_step=step), labeled, unlabeled, exact, draws)
            for step in values
        )
        for mode in with_step
    }
    return Sweep(values, found)


def _over_temperatures(
    trainer: BilevelTrainer, modes: Sequence[Estimator], labeled: Any, unlabeled: Any, draws: int
) -> Sweep | str:
    problem: Any = PseudoLabels() if trainer.given_problem is None else trainer.given_problem
    if not dataclasses.is_dataclass(problem) or not hasattr(problem, "temperature"):
        return f"the problem {type(problem).__name__} has no temperature."
    values = tuple(problem.temperature * factor for factor in TEMPERATURES)
    columns = []
    for value in values:
        changed: Any = dataclasses.replace(problem, temperature=value)  # type: ignore[type-var]  # an instance
        columns.append(_column(sibling(trainer, problem=changed), modes, labeled, unlabeled, draws))
    return _sweep(values, modes, columns)


def _over_sizes(
    trainer: BilevelTrainer, modes: Sequence[Estimator], labeled: Any, unlabeled: Any, draws: int
) -> Sweep | str:
    batches = inner_batches(unlabeled)
    whole = length(batches[0])
    leaves = [leaf for leaf in pytree.tree_leaves(batches) if isinstance(leaf, Tensor)]
    parts = trainer.accumulate
    if whole < 4 * parts or any(leaf.ndim == 0 or len(leaf) != whole for leaf in leaves):
        of = "" if parts == 1 else f" in each of its {parts} micro-batches"
        return f"the unlabeled batch has fewer than four examples{of}, or tensors without a row for each example."
    values = sorted({n for n in (whole // part for part in PARTS) if n % parts == 0 and n // parts >= 2})
    columns = []
    for size in values:
        first = [rows(batch, 0, size) for batch in batches]
        part = Lookahead(first) if isinstance(unlabeled, Lookahead) else first[0]
        columns.append(_column(trainer, modes, labeled, part, draws))
    return _sweep(tuple(map(float, values)), modes, columns)


def _column(
    trainer: BilevelTrainer, modes: Sequence[Estimator], labeled: Any, unlabeled: Any, draws: int
) -> list[Distance | str]:
    """All modes with one value of a setting."""
    exact = exact_gradient(trainer, labeled, unlabeled)
    return [_tried(trainer, mode, labeled, unlabeled, exact, draws) for mode in modes]


def _tried(
    trainer: BilevelTrainer, mode: Estimator, labeled: Any, unlabeled: Any, exact: Tensor, draws: int
) -> Distance | str:
    try:
        return distance(trainer, mode, labeled, unlabeled, exact, draws)[0]
    except CannotRun as error:
        return str(error)


def _sweep(values: tuple[float, ...], modes: Sequence[Estimator], columns: Sequence[Sequence[Distance | str]]) -> Sweep:
    by_mode = zip(modes, zip(*columns, strict=True), strict=True)
    return Sweep(values, {mode.name: tuple(row) for mode, row in by_mode})
