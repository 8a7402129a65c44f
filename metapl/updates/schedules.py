"""The options of an optimizer's param groups in each of several steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metapl.errors import MetaplError
from metapl.execution.checks import unexpected
from metapl.updates.optimizers import options_of
from metapl.words import did_you_mean

Settings = Mapping[str, Tensor]
"""Settings of an optimizer in each of K steps and each of its param groups, by name.

A tensor (K, groups), of betas (K, groups, 2).
"""

# The options of every param group in one step.
StepOptions = list[dict[str, Any]]


def scheduled_settings(
    scheduler: LRScheduler | Sequence[LRScheduler], steps: int
) -> dict[str, Tensor]:
    """Return what a scheduler of torch makes of an optimizer's settings in each of K steps.

    :class:`metapl.Lookahead` and :func:`metapl.attribute` take it as ``settings``. The scheduler
    and its optimizer stay where they stand.

    Args:
        scheduler: a ``torch.optim.lr_scheduler`` of the step alone, which would take a step after
            each of the student's; ``LambdaLR`` makes one of a function. Of a tuple of optimizers,
            one for each.
        steps: K, from the step at which the scheduler stands.

    Returns: ``"lr"``, and what else the scheduler moves, such as ``"momentum"``: (K, groups) in
    float64, of betas (K, groups, 2).

    Raises: :class:`metapl.MetaplError` for what is no such scheduler.

    >>> weights = [torch.zeros(2, requires_grad=True)]
    >>> optimizer = torch.optim.SGD(weights, lr=0.1)
    >>> falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    >>> scheduled_settings(falling, steps=4)["lr"].flatten().tolist()
    [0.1, 0.07500000000000001, 0.05, 0.025]
    """
    if type(steps) is not int or steps < 1:
        raise MetaplError(f"steps={steps!r}: expected a whole number >= 1.")
    schedulers = scheduler if isinstance(scheduler, tuple | list) else [scheduler]
    groups_by_step: list[StepOptions] = [[] for _ in range(steps)]
    for part in schedulers:
        if not isinstance(part, LRScheduler) or isinstance(part, ReduceLROnPlateau):
            expected = "a torch.optim.lr_scheduler of the step alone"
            raise unexpected("scheduler is", part, expected)
        for groups, groups_of_part in zip(
            groups_by_step, _options_by_scheduler(part, steps=steps), strict=True
        ):
            groups.extend(groups_of_part)
    return {name: _table(name, groups_by_step) for name in _moved_settings(groups_by_step)}


def _options_by_scheduler(scheduler: LRScheduler, steps: int) -> list[StepOptions]:
    """Return the options in each step by a copy of the scheduler.

    The copy runs on an optimizer with the same options and nothing to move.
    """
    optimizer = scheduler.optimizer
    kind: Any = type(optimizer)
    stand_in = kind(
        [{**group, "params": [nn.Parameter(torch.zeros(1, 1))]} for group in options_of(optimizer)]
    )
    scheduler = copy.deepcopy(scheduler, {id(optimizer): stand_in})
    by_step: list[StepOptions] = []
    with warnings.catch_warnings():
        # torch warns of a scheduler that runs ahead of its optimizer.
        warnings.simplefilter("ignore")
        for number in range(steps):
            if number > 0:
                scheduler.step()
            by_step.append(options_of(stand_in))
    return by_step


def _moved_settings(groups_by_step: Sequence[StepOptions]) -> list[str]:
    """Return the names of the settings that change from step to step, and that of the rate."""
    names = ["lr"]
    for groups in groups_by_step[1:]:
        for group, first_group in zip(groups, groups_by_step[0], strict=True):
            for name, value in group.items():
                if name not in names and value != first_group[name]:
                    names.append(name)
    return names


def _table(name: str, groups_by_step: Sequence[StepOptions]) -> Tensor:
    """Return a setting of all steps and groups, (K, groups)."""
    # What stands where a group has no such setting is not read.
    missing: Any = (0.0, 0.0) if name == "betas" else 0.0
    rows = [[group.get(name, missing) for group in groups] for groups in groups_by_step]
    return torch.tensor(rows, dtype=torch.float64)


def options_by_step(
    optimizer: torch.optim.Optimizer, settings: Settings, steps: int
) -> list[StepOptions]:
    """Return the options of the param groups in each of so many steps, by these settings.

    Raises: :class:`metapl.MetaplError` for what are no settings.
    """
    if not isinstance(settings, Mapping):
        raise unexpected("settings is", settings, "a dict of tensors (metapl.scheduled_settings)")
    for name, values in settings.items():
        if not isinstance(values, Tensor):
            raise unexpected(f"settings has {name!r} that is", values, "a tensor (K, param groups)")
    return options_by_settings(options_of(optimizer), settings, steps=steps)


def _refuse_out_of_range(name: str, values: Tensor) -> None:
    """Refuse numbers that a setting cannot have."""
    is_wrong = ~values.isfinite()
    expected = "finite numbers"
    if name in ("lr", "betas"):
        expected = "0 or more, such as torch.nn.functional.softplus of what is learned"
        is_wrong = is_wrong | (values < 0)
    if name == "betas":
        # At 1 an average never forgets.
        expected = "0 or more and below 1"
        is_wrong = is_wrong | (values >= 1)
    if bool(is_wrong.any()):
        wrong = f"{float(values[is_wrong][0]):g}"
        raise MetaplError(f"settings has {name!r} with {wrong}; expected {expected}.")


def options_by_settings(
    groups: Sequence[Mapping[str, Any]], settings: Settings, steps: int
) -> list[StepOptions]:
    """Return the options of the param groups in each step, with settings in place of their own."""
    by_step = [[dict(group) for group in groups] for _ in range(steps)]
    _check_names(groups, settings)
    for name, values in settings.items():
        _refuse_out_of_range(name, values)
        rows = _rows_of_setting(name, values, groups=groups, steps=steps)
        for number, options in enumerate(by_step):
            for group, row in zip(options, rows, strict=True):
                if name in group:
                    group[name] = row[number]
    return by_step


def _check_names(groups: Sequence[Mapping[str, Any]], settings: Settings) -> None:
    """Refuse a name that no param group has as a setting."""
    names = {name: None for group in groups for name in group if name != "params"}
    for name in settings:
        if name not in names:
            raise MetaplError(
                f"settings has {name!r}, no setting of inner_optimizer; expected some of "
                f"{', '.join(names)}{did_you_mean(str(name), [*names])}"
            )


def _rows_of_setting(
    name: str, values: Tensor, groups: Sequence[Mapping[str, Any]], steps: int
) -> list[list[Any]]:
    """Return a setting's value in each step, for each group; from a tensor (K, groups)."""
    shape: tuple[int, ...] = (steps, len(groups))
    if name == "betas":
        shape = (steps, len(groups), 2)
    if values.shape[1:] != shape[1:] or len(values) < steps:
        raise MetaplError(
            f"settings has {name!r} of shape {tuple(values.shape)}; expected {shape}."
        )
    rows: list[list[Any]] = []
    for group, values_of_group in zip(groups, values.unbind(1), strict=True):
        setting = group.get(name)
        if isinstance(setting, Tensor):
            # torch.optim steps by other operations where a number is in a tensor.
            rows.append(list(values_of_group.detach().to(setting).unbind()))
        else:
            rows.append(values_of_group.tolist())
    return rows
