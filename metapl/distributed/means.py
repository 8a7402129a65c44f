"""Whether a loss is a mean over examples, as it has to be where ranks share a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metapl.batch import rows
from metapl.distributed.ranks import Ranks


def warn_unless_mean(
    loss: Callable[[Tensor, Any], Tensor], outputs: Tensor, batch: Any, value: Tensor, ranks: Ranks
) -> None:
    """Let the first rank warn if the outer loss of a problem is not the mean of its values on two parts of the rows.

    Args:
        loss: of outputs and a batch.
        outputs, batch, value: this rank's outputs, its batch, and the loss of these.
        ranks: all of them call this.
    """
    with ranks.agreed(waiting=True):
        own = _found(loss, outputs, batch, float(value.detach()))
    found = next((text for text in ranks.gathered(own) if text is not None), None)
    if found is not None and ranks.first:
        warnings.warn(found, stacklevel=3)


def _found(loss: Callable[[Tensor, Any], Tensor], outputs: Tensor, batch: Any, value: float) -> str | None:
    count = len(outputs)
    half = count // 2
    if not half:
        return None
    with torch.no_grad():
        parts = [
            (stop - start) * float(loss(outputs[start:stop], rows(batch, start, stop)))
            for start, stop in ((0, half), (half, count))
        ]
    mean = sum(parts) / count
    if not abs(value - mean) > 1e-3 * (abs(value) + abs(mean)) + 1e-6:
        return None
    return (
        f"the problem's outer_loss is {value:.4g} on {count} examples, and the mean of its values on two parts of them "
        f"is {mean:.4g}: it is not a mean over examples. Here it is the mean of its values on the ranks' rows, so the "
        "feedback is that of another loss than in one process with all rows. Where it is to be the same, return a mean "
        'over the rows, such as (weights * F.cross_entropy(outputs, labels, reduction="none")).mean().'
    )
