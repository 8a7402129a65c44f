"""The leaves of a batch in parts of equal size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.checks import unexpected


def pieces_of(
    leaves: Sequence[Any], are_by_row: Sequence[bool], parts: int, name: str
) -> list[Sequence[Any]]:
    """Return the pieces of each leaf of a batch.

    Args:
        are_by_row: which leaves are cut; the others are in each part.
        parts: how many.
        name: of the batch, for errors.
    """
    refuse_hidden_tensors(leaves, name)
    pieces_of_leaves: list[Sequence[Any]] = []
    for leaf, is_cut in zip(leaves, are_by_row, strict=True):
        if not is_cut:
            pieces_of_leaves.append([leaf] * parts)
            continue
        if len(leaf) % parts:
            numbers = {len(other) for other in compress(leaves, are_by_row)}
            if len(numbers) > 1:
                rows = " and ".join(map(str, sorted(numbers, reverse=True)))
                raise MetaplError(
                    f"the {name} batch has tensors of {rows} rows; expected as many in each."
                )
            examples = f"the {name} batch has {len(leaf)} examples"
            raise MetaplError(f"{examples}; expected a multiple of accumulate={parts}.")
        size = len(leaf) // parts
        pieces_of_leaves.append([leaf[k * size : (k + 1) * size] for k in range(parts)])
    return pieces_of_leaves


def refuse_hidden_tensors(leaves: Sequence[Any], name: str) -> None:
    """Refuse tensors in the attributes of an object that is no dataclass.

    The object would be in each micro-batch whole.

    Args:
        leaves: of a batch.
        name: of the batch, for the error.
    """
    for leaf in leaves:
        attributes = {} if isinstance(leaf, Tensor | nn.Module) else getattr(leaf, "__dict__", {})
        if any(isinstance(value, Tensor) for value in attributes.values()):
            expected = "a tuple, dict or dataclass of its tensors, or accumulate=1"
            raise unexpected(f"in the {name} batch is an object", leaf, expected)
