r"""What a network's own losses are means over, where a batch comes in parts.

The parts are micro-batches, or the shares of processes. A loss that is a mean over the rows of its
batch is the mean of its micro-batches' losses, which have equal sizes. One that is a mean over
something else, such as the labels that are not ignored, says so by a method ``mean_over``:

.. math:: L = \frac{\sum_i n_i L_i}{\sum_i n_i} = \frac1M \sum_{i=1}^M s_i L_i,
          \qquad s_i = n_i / \bar n

A loss that says nothing and is no mean over rows is refused at the first step, by
:func:`refuse_other_than_means`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.batch import Batch, length
from metapl.execution.compare import coarsest_dtype
from metapl.execution.numerics import no_fast_path
from metapl.execution.ranks import Ranks
from metapl.execution.state import RandomState, Slots, in_modes, replay
from metapl.problems.base import Signal, joined_signals

# How far the mean of micro-batches may be from the loss of their rows together, relative to them.
# The rows of a batch are computed by other kernels in batches of another size, and a network in
# float64 may take its loss in float32.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

# For each loss, by its place, the factor of a micro-batch; a loss without one has the factor 1.
Shares = Mapping[int, Tensor]


def shares_of_losses(
    losses: Sequence[Any],
    outer: Sequence[Any],
    inner: Sequence[Any],
    ranks: Ranks,
    device: torch.device,
) -> list[Shares]:
    """Return s_i = n_i / n̄ of each micro-batch, for the losses that say what they are means over.

    Args:
        losses: the terms; n is asked of those that have a method ``mean_over``.
        outer, inner: the micro-batches of both batches.
        ranks: the processes that share the batches; n̄ is the mean over their micro-batches too.
        device: where the losses are.

    Cost: nothing with one micro-batch in one process; else one exchange of a number for each such
    loss.
    """
    shares: list[dict[int, Tensor]] = [{} for _ in outer]
    if len(outer) == 1 and ranks.alone:
        return list(shares)
    for place, loss in enumerate(losses):
        mean_over = getattr(loss, "mean_over", None)
        if mean_over is None:
            continue
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        counts = list[Tensor]()
        for outer_part, inner_part in zip(outer, inner, strict=True):
            count = mean_over(outer=outer_part, inner=inner_part)
            if count is not None:
                counts.append(torch.as_tensor(count, dtype=dtype))
        if not counts:
            continue
        n = torch.stack([count.to(device) for count in counts])
        shares_of_loss = n / ranks.mean(n.mean())
        for part, share in enumerate(shares_of_loss.unbind()):
            shares[part][place] = share
    return list(shares)


def times_share(loss: Tensor, share: Tensor) -> Tensor:
    """Return s·L.

    Of a micro-batch without rows that count, that is 0 with no gradient, where L, the mean of
    nothing, is NaN.
    """
    return torch.where(share > 0, share.to(loss.dtype) * loss, torch.zeros_like(loss))


def refuse_other_than_means(
    network: nn.Module,
    losses: Sequence[Any],
    outer: Sequence[Any],
    inner: Sequence[Any],
    signals: Sequence[Signal],
    *,
    step: Any,
    ranks: Ranks,
) -> None:
    """Refuse a loss that is no mean over rows and does not say what it is a mean over.

    The loss of the first two micro-batches together is compared with that of each, in evaluation
    mode, where no row depends on the others. Micro-batches that happen to agree show nothing.

    What cannot be told is not refused: where a pass or a loss draws random numbers, where a batch
    norm keeps no statistics, and losses that are meant to be of each micro-batch
    (``of_micro_batches``).

    Cost: for each loss two passes on two micro-batches, without a graph.
    """
    if has_norms_without_statistics(network):
        return
    # Loaded where it is used.
    from metapl.execution.joined_batches import joined_batches

    signal = joined_signals([signal.detached() for signal in signals[:2]])
    whole = joined_batches(outer[:2]), joined_batches(inner[:2]), signal
    pair = list(zip(outer[:2], inner[:2], signals[:2], strict=True))
    parameters = list(network.parameters())
    device = parameters[0].device
    tolerance = TOLERANCES[coarsest_dtype([p.dtype for p in parameters], device)]
    refusal = ""
    random = RandomState.now(device)
    with torch.no_grad(), no_fast_path(), in_modes(network, frozenset()):
        slots = Slots(network)
        for loss in losses:
            if refusal or getattr(loss, "of_micro_batches", False):
                continue
            with replay(random, slots):
                of_whole, _ = loss_and_count(loss, network, *whole, step=step)
                counted = [loss_and_count(loss, network, *part, step=step) for part in pair]
                draws = not RandomState.now(device).equals(random)
            # The mean of nothing is NaN, and counts for nothing.
            counted = [(value, n) for value, n in counted if n]
            if draws or not counted or not math.isfinite(of_whole):
                continue
            by_parts = sum(n * value for value, n in counted) / sum(n for _, n in counted)
            size = max(abs(value) for value in (of_whole, *dict(counted)))
            # Written so that a mean of NaN differs too.
            if not abs(of_whole - by_parts) <= tolerance * size:
                refusal = (
                    f"the loss {loss.name!r} is {of_whole:.6g} on {length(whole[0])} rows, and "
                    f"{by_parts:.6g} by two micro-batches: it is no mean over rows; expected one, "
                    "a method mean_over(*, outer, inner) that returns what it divides by, "
                    "accumulate=1, or of_micro_batches = True for a loss of each alone."
                )
    # All processes refuse it together, since the others would wait for this one.
    with ranks.agreed(waiting=True):
        if refusal:
            raise MetaplError(refusal)


def loss_and_count(
    loss: Any, network: nn.Module, outer: Batch, inner: Batch, signal: Signal, *, step: Any
) -> tuple[float, float]:
    """Return a loss of a batch, and how many it is a mean over.

    A loss that does not say how many is a mean over rows, of which all micro-batches have as many:
    1.
    """
    count = None
    if hasattr(loss, "mean_over"):
        count = loss.mean_over(outer=outer, inner=inner)
    value = loss(network, outer=outer, inner=inner, signal=signal, step=step)
    return float(value), 1.0 if count is None else float(count)


def has_norms_without_statistics(network: nn.Module) -> bool:
    """Return whether a batch norm takes the statistics of its batch in evaluation mode too."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return True
    return False
