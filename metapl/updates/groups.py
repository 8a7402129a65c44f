"""An optimizer with other param groups, over the same weights and the same state."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from metapl.updates.optimizers import parts_of
from metapl.updates.several import Several


def with_options_of_groups(optimizer: Any, options: Sequence[Mapping[str, Any]]) -> Any:
    """Return an optimizer whose param groups have these options; that which is given stays.

    Args:
        options: of the groups, of several optimizers one after another.
    """
    options_of_next = iter(options)
    parts: list[Any] = []
    for part in parts_of(optimizer):
        part_with_options: Any = copy.copy(part)
        part_with_options.param_groups = [
            {**group, **next(options_of_next)} for group in part.param_groups
        ]
        parts.append(part_with_options)
    return Several(parts) if isinstance(optimizer, Several) else parts[0]
