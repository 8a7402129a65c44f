"""The options of an optimizer's param groups in each of several steps, by a schedule."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metapl.errors import MetaplError, few
from metapl.updates.optimizers import entry_shape, options_of, parts_of

# Settings by name: a tensor (K, groups), or a tensor (K, ...) for each param group.
Settings = Mapping[str, Tensor | Sequence[Tensor]]

Schedule = (
    LRScheduler | Callable[[int], float] | Sequence[LRScheduler | Callable[[int], float]] | Settings
)
"""Of a learning rate, by a scheduler or by factors.

Of several optimizers, also one for each; or settings by name.
"""

# The options of every param group in one step.
StepOptions = list[dict[str, Any]]


def options_by_step(
    optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int
) -> list[StepOptions]:
    """Return the options of the param groups in each of so many steps of a schedule.

    The schedule itself stays where it stands.
    """
    parts = parts_of(optimizer)
    if isinstance(schedule, tuple | list) and len(schedule) == len(parts):
        by_part = [
            options_by_step(part, part_schedule, steps=steps)
            for part, part_schedule in zip(parts, schedule, strict=True)
        ]
        return [[*chain.from_iterable(step)] for step in zip(*by_part, strict=True)]
    groups = options_of(optimizer)
    if isinstance(schedule, Mapping):
        return options_by_settings(groups, schedule, steps=steps)
    reads_losses_or_is_class = isinstance(schedule, ReduceLROnPlateau | type)
    if reads_losses_or_is_class or not (isinstance(schedule, LRScheduler) or callable(schedule)):
        raise MetaplError(
            f"schedule is {schedule!r:.80}; expected a torch.optim.lr_scheduler of the step alone, "
            "a function from the step's number to a factor; of several optimizers a tuple; or a "
            "dict of settings, (K, param groups)."
        )
    if not isinstance(schedule, LRScheduler):
        by_step: list[StepOptions] = []
        for number in range(steps):
            by_step.append([{**group, "lr": group["lr"] * schedule(number)} for group in groups])
        return by_step
    if schedule.optimizer is not optimizer:
        raise MetaplError("schedule is of another optimizer than inner_optimizer.")
    return _by_scheduler(optimizer, schedule, steps=steps)


def _by_scheduler(
    optimizer: torch.optim.Optimizer, schedule: LRScheduler, steps: int
) -> list[StepOptions]:
    """Return the options in each step by a copy of the scheduler.

    The copy runs on an optimizer with the same options and nothing to move.
    """
    kind: Any = type(optimizer)
    stand_in = kind(
        [{**group, "params": [nn.Parameter(torch.zeros(1, 1))]} for group in options_of(optimizer)]
    )
    scheduler = copy.deepcopy(schedule, {id(optimizer): stand_in})
    by_step: list[StepOptions] = []
    with warnings.catch_warnings():
        # torch warns of a scheduler that runs ahead of its optimizer.
        warnings.simplefilter("ignore")
        for number in range(steps):
            if number > 0:
                scheduler.step()
            by_step.append(options_of(stand_in))
    return by_step


def options_by_settings(
    groups: Sequence[Mapping[str, Any]], settings: Settings, steps: int
) -> list[StepOptions]:
    """Return the options of the param groups in each step, with settings in place of their own."""
    by_step = [[dict(group) for group in groups] for _ in range(steps)]
    for name, values in settings.items():
        if isinstance(values, Tensor):
            rows = _rows_of_tensor(name, values, groups=groups, steps=steps)
        else:
            rows = _rows_of_groups(name, values, groups=groups, steps=steps)
        for number, options in enumerate(by_step):
            for group, row in zip(options, rows, strict=True):
                if name in group:
                    group[name] = row[number]
    return by_step


def _rows_of_tensor(
    name: str, values: Tensor, groups: Sequence[Mapping[str, Any]], steps: int
) -> list[list[Any]]:
    """Return a setting's value in each step, for each group; from a tensor (K, groups)."""
    shape: tuple[int, ...] = (steps, len(groups))
    if name == "betas":
        shape = (steps, len(groups), 2)
    is_known = any(name in group for group in groups)
    if values.shape[1:] != shape[1:] or len(values) < steps or not is_known:
        raise MetaplError(
            f"schedule has {name!r} of shape {tuple(values.shape)}; expected settings of "
            f"inner_optimizer, {shape}."
        )
    return [list(row) for row in zip(*values.tolist(), strict=True)]


def _rows_of_groups(
    name: str, values: Sequence[Tensor], groups: Sequence[Mapping[str, Any]], steps: int
) -> list[list[Any]]:
    """Return a setting's value in each step, for each group; from a tensor (K, ...) for each group.

    So comes a setting with a value for each entry of a group's weights, beside groups that have one
    number.
    """
    expected_shapes = [(steps, *entry_shape(group.get(name))) for group in groups]
    shapes = [(steps, *t.shape[1:]) for t in values]
    is_known = any(name in group for group in groups)
    if shapes != expected_shapes or min(map(len, values)) < steps or not is_known:
        given_shapes = few([str(tuple(t.shape)) for t in values], 3)
        raise MetaplError(
            f"schedule has {name!r} of shapes {given_shapes}; expected settings of "
            f"inner_optimizer, for each param group {few(map(str, expected_shapes), 3)}."
        )
    rows: list[list[Any]] = []
    for t in values:
        if t.ndim == 1:
            rows.append(t.tolist())
        else:
            rows.append(list(t.detach().unbind()))
    return rows
