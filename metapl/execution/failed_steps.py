"""What of its batches is said to have failed a step: numbers, rows and shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metapl.errors import MetaplError, few
from metapl.execution.batch import Batch, named_leaves_of
from metapl.execution.failed_calls import shape_of

# Words that all refusals of losses and feedback have in common.
NOT_FINITE = "NaN or infinite"


def explain_step(error: Exception, outer: Batch, inner: Batch) -> None:
    """Say of a step that has failed what of its batches may be the cause.

    Where a number is not finite, raise what of the batches is not, or that they have no rows. Any
    other error that is none of metapl's gets a note of their shapes.

    Args:
        error: what the step has raised.
        outer, inner: as the step was given them; None: it reads none.

    Raises: :class:`metapl.MetaplError`.
    """
    looks_ahead = isinstance(inner, Sequence) and not isinstance(inner, tuple | list)
    text = str(error)
    # The rows of stacked tasks are tasks, of which the error has named one.
    if isinstance(error, MetaplError) and NOT_FINITE in text and not text.startswith("task "):
        named = {"inner": inner}
        if looks_ahead:
            named = {f"inner[{number}]": batch for number, batch in enumerate(inner)}
        for name, batch in (*named.items(), ("outer", outer)):
            if unsound := what_is_unsound(batch, name, text):
                raise MetaplError(unsound) from error
    elif not isinstance(error, MetaplError) and not getattr(error, "__notes__", None):
        parts = named_parts(outer, "outer")
        if not looks_ahead:
            parts += named_parts(inner, "inner")
        # A call within a step may have been given no batches of its own.
        if parts:
            error.add_note(f"in a step on {few(f'{name} {shape_of(t)}' for name, t in parts)}")


def named_parts(batch: Batch, name: str) -> list[tuple[str, Tensor]]:
    """Return the tensors of a batch, each with its place, such as "outer labels"."""
    is_pair = name == "outer" and isinstance(batch, tuple | list) and len(batch) > 1
    words = {"[0]": " inputs", "[1]": " labels"} if is_pair else {"": " inputs"}
    parts = []
    for place, leaf in named_leaves_of(batch):
        if isinstance(leaf, Tensor):
            parts.append((f"{name}{words.get(place, place)}", leaf))
    return parts


def what_is_unsound(batch: Batch, name: str, reason: str) -> str:
    """Return what of a batch has no rows, or numbers that are not finite; "" for nothing.

    Args:
        name: of the batch.
        reason: why it is looked for.
    """
    for part, t in named_parts(batch, name):
        is_plain = t.layout == torch.strided and not t.is_nested and not t.is_meta
        # A sharded tensor could be read on all ranks alone.
        if not is_plain or hasattr(t, "device_mesh"):
            continue
        if t.ndim and not len(t):
            return f"{part}: no rows; expected one or more."
        if not t.is_floating_point() or t.element_size() == 1:
            continue
        rows = t.reshape(len(t) if t.ndim else 1, -1)
        with_nan = int(rows.isnan().any(1).sum())
        if with_nan:
            has = "has" if with_nan == 1 else "have"
            return f"{part}: {with_nan:,} of {len(rows):,} rows {has} NaN; expected finite numbers."
        # A mask may be infinite, so that this is no cause for sure.
        infinite = int(rows.isinf().any(1).sum())
        if infinite:
            return f"{part}: {infinite:,} of {len(rows):,} rows with infinite numbers; {reason}"
    return ""
