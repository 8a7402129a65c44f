"""Gradients in the settings of an inner optimizer, by step and param group, as tensors by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def stacked_settings(
    gradients: Sequence[Any], names: Sequence[str], steps: int
) -> dict[str, Tensor]:
    """Return gradients in settings by name, (K, groups), of betas (K, groups, 2).

    They are 0 where a group has no such setting, and in steps that are not differentiated.

    Args:
        gradients: by step and param group, a dict by name, of the last steps.
        names: of the settings.
        steps: K.
    """
    stacked: dict[str, Tensor] = {}
    for name in names:
        by_step = [torch.stack(gradients_of_groups(groups, name)) for groups in gradients]
        zeros = [torch.zeros_like(by_step[0])] * (steps - len(by_step))
        stacked[name] = torch.stack([*zeros, *by_step])
    return stacked


def gradients_of_groups(groups: Sequence[Mapping[str, Any]], name: str) -> list[Tensor]:
    """Return the gradient in a setting of each param group in one step, 0 where it has none."""
    gradients: list[Tensor | None] = []
    for group in groups:
        gradient = group.get(name)
        if isinstance(gradient, tuple | list):
            # Betas are two.
            gradient = torch.stack([*gradient])
        gradients.append(gradient)
    # The setting is one of update.numbers, so at least one group has it. Its gradient is a number,
    # or (2,) for betas.
    one_gradient = next(t for t in gradients if t is not None)
    return [torch.zeros_like(one_gradient) if t is None else t for t in gradients]
