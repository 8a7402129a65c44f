"""How a mode's distance from the exact gradient changes with its step size, the temperature and the batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.ablation.figures import Distance, Sweep
from metapl.ablation.gradients import CannotRun, Point, sibling
from metapl.execution.batch import length, rows
from metapl.feedback import Estimator, Lookahead
from metapl.feedback.difference import RELATIVE_STEP
from metapl.feedback.lookahead import inner_batches
from metapl.problems import PseudoLabels

STEPS = (0.01, 0.1, 1.0, 10.0)
"""Times the step size that a mode has."""

TEMPERATURES = (0.25, 0.5, 1.0, 2.0)
"""Times the problem's temperature."""

PARTS = (8, 4, 2, 1)
"""Of the unlabeled batch; no part has fewer than two examples, which batch statistics need."""


Setting = tuple[float, Point, Sequence[Estimator]]
"""A value of what is varied, and where and by which modes it is measured."""


def sweeps(
    point: Point, modes: Iterable[Estimator], draws: int, done: Callable[[], None] = lambda: None
) -> dict[str, Sweep | str]:
    """The modes over step sizes, temperatures and batch sizes, each against the exact gradient with the same setting.

    The modes have run there before; ``done`` is called after each setting.
    """
    modes = [mode for mode in modes if mode.name != "none"]  # zero is as far from any gradient
    found: dict[str, Sweep | str] = {}
    for name, varied in (("epsilon", _over_steps), ("temperature", _over_temperatures), ("batch_size", _over_sizes)):
        settings = varied(point, modes)
        if isinstance(settings, str):
            found[name] = settings
        else:
            columns = [_column(at, by, draws) for _, at, by in settings]
            values, by_mode = tuple(value for value, *_ in settings), zip(*columns, strict=True)
            found[name] = Sweep(values, {mode.name: row for mode, row in zip(settings[0][2], by_mode, strict=True)})
        done()
    return found


def _column(point: Point, modes: Sequence[Estimator], draws: int) -> list[Distance | str]:
    """The distance of each mode, or why it cannot run."""
    exact = point.exact()
    found: list[Distance | str] = []
    for mode in modes:
        try:
            found.append(point.distance(mode, exact, draws)[0])
        except CannotRun as error:
            found.append(str(error))
    return found


def _over_steps(point: Point, modes: Sequence[Estimator]) -> list[Setting] | str:
    """Modes with a ``relative_step``, as :class:`metapl.feedback.Difference` has."""
    with_step: list[Any] = [mode for mode in modes if hasattr(mode, "relative_step") and dataclasses.is_dataclass(mode)]
    if not with_step:
        return "none of the modes takes a finite difference, so there is no step size."
    dtype = torch.promote_types(next(point.trainer.student.parameters()).dtype, torch.float32)
    own = with_step[0].relative_step or RELATIVE_STEP[dtype]
    return [
        (step, point, [dataclasses.replace(mode, relative_step=step) for mode in with_step])
        for step in (own * factor for factor in STEPS)
        if step < 1
    ]


def _over_temperatures(point: Point, modes: Sequence[Estimator]) -> list[Setting] | str:
    trainer = point.trainer
    problem: Any = PseudoLabels() if trainer.given_problem is None else trainer.given_problem
    if not dataclasses.is_dataclass(problem) or not hasattr(problem, "temperature"):
        return f"the problem {type(problem).__name__} has no temperature."
    settings: list[Setting] = []
    for value in (problem.temperature * factor for factor in TEMPERATURES):
        changed: Any = dataclasses.replace(problem, temperature=value)  # type: ignore[type-var]  # an instance
        settings.append((value, dataclasses.replace(point, trainer=sibling(trainer, problem=changed)), modes))
    return settings


def _over_sizes(point: Point, modes: Sequence[Estimator]) -> list[Setting] | str:
    batches, parts = inner_batches(point.unlabeled), point.trainer.accumulate
    whole = length(batches[0])
    leaves = [leaf for leaf in pytree.tree_leaves(batches) if isinstance(leaf, Tensor)]
    if whole < 4 * parts or any(leaf.ndim == 0 or len(leaf) != whole for leaf in leaves):
        of = "" if parts == 1 else f" in each of its {parts} micro-batches"
        return f"the unlabeled batch has fewer than four examples{of}, or tensors without a row for each example."
    settings: list[Setting] = []
    for size in sorted({n for n in (whole // part for part in PARTS) if n % parts == 0 and n // parts >= 2}):
        first = [rows(batch, 0, size) for batch in batches]
        part = Lookahead(first) if isinstance(point.unlabeled, Lookahead) else first[0]
        settings.append((float(size), dataclasses.replace(point, unlabeled=part), modes))
    return settings
