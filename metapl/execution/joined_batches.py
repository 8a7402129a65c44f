"""Micro-batches as one batch again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.execution.batch import flatten_to_rows, is_by_row


def joined_batches(parts: Sequence[Any]) -> Any:
    """Return the rows of micro-batches as one batch; what has no rows is that of the first."""
    leaves_of_parts = []
    for part in parts:
        leaves, structure = flatten_to_rows(part)
        leaves_of_parts.append(leaves)
    joined_leaves: list[Any] = []
    for same_leaf in zip(*leaves_of_parts, strict=True):
        first = same_leaf[0]
        if not is_by_row(first):
            joined_leaves.append(first)
        elif isinstance(first, Tensor):
            joined_leaves.append(torch.cat(same_leaf))
        elif isinstance(first, list | tuple):
            joined_leaves.append(type(first)(chain(*same_leaf)))
        else:
            joined_leaves.append(np.concatenate(same_leaf))
    return pytree.tree_unflatten(joined_leaves, structure)
