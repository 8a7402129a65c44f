"""What a network's own losses are means over, where a batch comes in micro-batches or in shares of processes.

A loss that is a mean over the rows of its batch is the mean of its micro-batches' losses, which
have equal sizes. One that is a mean over something else, such as the labels that are not ignored,
says so by a method ``mean_over``:

.. math:: L = \\frac{\\sum_i n_i L_i}{\\sum_i n_i} = \\frac1M \\sum_{i=1}^M s_i L_i, \\qquad s_i = n_i / \\bar n

A loss that says nothing and is no mean over rows is refused at the first step, by
:func:`refuse_other_than_means`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.batch import length, map_tensors
from metapl.execution.compare import coarsest_dtype
from metapl.execution.numerics import no_fast_path
from metapl.execution.ranks import Ranks
from metapl.execution.shards import is_sharded
from metapl.execution.state import RandomState, Slot, Slots, replay, stand_in
from metapl.problems.base import Problem, Signal, has_rows, joined_signals

# How far the mean of two halves may be from the loss of both, relative to them. The rows of a batch
# are computed by other kernels in batches of another size.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

# In which order the rows are taken before they are halved: as they are, the even ones first, every
# third one first. A loss whose halves happen to be means over equally many rows in one order is
# told by another.
STRIDES = (1, 2, 3)

# The sizes of the noise by which weights are moved, see :func:`weights_moved`. The small one is for
# deep networks without norms, whose outputs are infinite with the large one.
NOISE = (4.0, 1.0)

# How many times what a rounding of the weights changes a difference has to be.
FAR_ABOVE = 30.0

# For each loss, by its place, the factor of a micro-batch; a loss without one has the factor 1.
Shares = Mapping[int, Tensor]


def shares_of_losses(
    losses: Sequence[Any],
    labeled: Sequence[Any],
    unlabeled: Sequence[Any],
    ranks: Ranks,
    device: torch.device,
) -> list[Shares]:
    """Return s_i = n_i / n̄ of each micro-batch, for the losses that say what they are means over.

    Args:
        losses: the terms; n is asked of those that have a method ``mean_over``.
        labeled, unlabeled: the micro-batches of both batches.
        ranks: the processes that share the batches; n̄ is the mean over their micro-batches too.
        device: where the losses are.

    Cost: nothing with one micro-batch in one process; else one exchange of a number for each such
    loss.
    """
    shares: list[dict[int, Tensor]] = [{} for _ in labeled]
    if len(labeled) == 1 and ranks.alone:
        return list(shares)
    for place, loss in enumerate(losses):
        mean_over = getattr(loss, "mean_over", None)
        if mean_over is None:
            continue
        counts = list[Tensor]()
        for labeled_part, unlabeled_part in zip(labeled, unlabeled, strict=True):
            count = mean_over(labeled=labeled_part, unlabeled=unlabeled_part)
            if count is not None:
                counts.append(
                    torch.as_tensor(
                        count, dtype=torch.float64 if device.type == "cpu" else torch.float32
                    )
                )
        if not counts:
            continue
        n = torch.stack([count.to(device) for count in counts])
        of_parts = n / ranks.mean(n.mean())
        for part, share in enumerate(of_parts.unbind()):
            shares[part][place] = share
    return list(shares)


def scaled(loss: Tensor, share: Tensor) -> Tensor:
    """Return s·L; of a micro-batch without rows that count, 0 and no gradient, where the mean of nothing is NaN."""
    return torch.where(share > 0, share.to(loss.dtype) * loss, torch.zeros_like(loss))


def refuse_other_than_means(
    network: nn.Module,
    losses: Sequence[Any],
    labeled: Sequence[Any],
    unlabeled: Sequence[Any],
    signals: Sequence[Signal],
    problem: Problem | None,
    *,
    step: int,
    ranks: Ranks,
    device: torch.device,
    parts: int,
) -> None:
    """Refuse a loss of micro-batches that is no mean over rows and does not say what it is a mean over.

    It is compared on the rows of the first two micro-batches, and on two halves of them, with the
    network in evaluation mode, where no row depends on the others: at its weights, and at others.
    At the first weights the loss is often almost the same in every row, and all weightings of the
    rows have almost the same mean.

    What cannot be told is not refused: where a pass or a loss draws random numbers, where a batch
    norm keeps no statistics, and losses that are meant to be of each micro-batch
    (``of_micro_batches``). Sharded networks are compared at their own weights alone.

    Cost: 21 passes on two micro-batches without a graph, and a copy of the weights, in the first
    step; of a loss that is refused two passes and a copy more.
    """
    compared = [loss for loss in losses if not getattr(loss, "of_micro_batches", False)]
    if not compared or has_norms_without_statistics(network):
        return
    rows = RowsOfTwo(
        labeled=joined_batches(labeled[:2]),
        unlabeled=joined_batches(unlabeled[:2]),
        signal=joined_signals([signal.detached() for signal in signals[:2]]),
        problem=problem,
    )
    tolerance = TOLERANCES[coarsest_dtype([p.dtype for p in network.parameters()], device)]
    refusal = ""
    random = RandomState.now(device)
    with torch.no_grad(), no_fast_path(), evaluation_mode(network):
        slots = Slots(network)
        for loss in compared:
            with replay(random, slots):
                difference = rows.difference(network, loss, step, tolerance, random)
            for size in NOISE:
                if difference is None:
                    difference = rows.difference_at(
                        weights_moved(slots, size), network, loss, step, tolerance, random
                    )
            if difference is not None and not refusal:
                whole, by_halves = difference
                refusal = (
                    f"the loss {loss.name!r} is {whole:.6g} on {length(rows.labeled)} rows, and "
                    f"{by_halves:.6g} by two halves of them, with accumulate={parts}: it is no "
                    "mean over rows. Give it a method mean_over(*, labeled, unlabeled) that "
                    "returns what it divides by, such as the number of labels that are not "
                    "ignored; or take accumulate=1; or say of_micro_batches = True, if each "
                    "micro-batch is meant to have a loss of its own."
                )
    # All processes refuse it together, since the others would wait for this one.
    with ranks.agreed(waiting=True):
        if refusal:
            raise MetaplError(refusal)


@dataclass(frozen=True)
class RowsOfTwo:
    """The rows of two micro-batches, of which a loss is taken as a whole and by halves."""

    labeled: Any
    unlabeled: Any
    signal: Signal
    problem: Problem | None

    def difference(
        self, network: nn.Module, loss: Any, step: int, tolerance: float, random: RandomState
    ) -> tuple[float, float] | None:
        """Return the loss of all rows, and the mean of two halves, where these differ; None where
        they do not, or where it cannot be told because something draws."""
        whole, _ = self.of_rows(network, loss, step, stride=1, half=None)
        for stride in STRIDES:
            first, n_first = self.of_rows(network, loss, step, stride=stride, half=0)
            second, n_second = self.of_rows(network, loss, step, stride=stride, half=1)
            if not RandomState.now(random.device).is_as(random):
                return None
            total = 0.0
            # The mean of nothing is NaN, and counts for nothing.
            if n_first:
                total += n_first * first
            if n_second:
                total += n_second * second
            by_halves = total / (n_first + n_second) if n_first + n_second else math.nan
            size = max(abs(whole), abs(first), abs(second))
            if math.isfinite(whole) and not abs(whole - by_halves) <= tolerance * size:
                return whole, by_halves
        return None

    def difference_at(
        self,
        weights: Sequence[Slot],
        network: nn.Module,
        loss: Any,
        step: int,
        tolerance: float,
        random: RandomState,
    ) -> tuple[float, float] | None:
        """Return the :meth:`difference` at other weights than the network's own; None where there are none.

        A loss that runs at the network's own weights may fail at others, as a Cholesky factor does.
        That is no fault of the user's program, and tells nothing. Nor does a network that is
        chaotic there, such as a long recurrence: two halves are rounded otherwise than the whole.
        So the difference has to be far above what rounding makes of it.
        """
        if not weights:
            return None
        slots = Slots(network)
        try:
            with replay(random, slots, weights):
                difference = self.difference(network, loss, step, tolerance, random)
                if difference is None:
                    return None
                whole, by_halves = difference
                by_rounding = 0.0
                for seed in range(2):
                    with replay(random, slots, rounded(weights, seed)):
                        whole_again, _ = self.of_rows(network, loss, step, stride=1, half=None)
                    by_rounding = max(by_rounding, abs(whole_again - whole))
        except Exception:
            return None
        return difference if abs(whole - by_halves) > FAR_ABOVE * by_rounding else None

    def of_rows(
        self, network: nn.Module, loss: Any, step: int, *, stride: int, half: int | None
    ) -> tuple[float, float]:
        """Return a loss of one half of the rows, or of all, and what it is a mean over."""
        batches = {
            "labeled": in_order(self.labeled, stride, half),
            "unlabeled": in_order(self.unlabeled, stride, half),
        }
        signal = signal_in_order(self.signal, self.problem, length(self.unlabeled), stride, half)
        count = None
        if hasattr(loss, "mean_over"):
            count = loss.mean_over(**batches)
        value = loss(network, **batches, signal=signal, step=step)
        return float(value), 1.0 if count is None else float(count)


def weights_moved(slots: Slots, size: float) -> list[Slot]:
    """Return other weights of a network, by their places: its own plus noise by which outputs differ between rows.

    The noise has a ``size`` in units of 1/sqrt(inputs), with which layers are usually begun, also
    where weights are 0. It draws from a generator of its own. Sharded networks have no other
    weights.
    """
    moved: dict[str, Tensor] = {}
    for name, p in slots.learned.items():
        if is_sharded(p):
            return []
        generator = torch.Generator(p.device).manual_seed(len(moved))
        inputs = max(1, p[0].numel()) if p.ndim > 1 and len(p) else 1
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        moved[name] = stand_in(p.detach() + size / math.sqrt(inputs) * noise, p)
    return [(table, name, moved[first]) for table, name, first in slots.places]


def rounded(weights: Sequence[Slot], seed: int) -> list[Slot]:
    """Return weights, by their places, that differ from others by some units of rounding."""
    moved: dict[int, Tensor] = {}
    for _, _, t in weights:
        if id(t) not in moved:
            generator = torch.Generator(t.device).manual_seed(seed + len(moved))
            noise = torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device)
            moved[id(t)] = stand_in(t.detach() * (1 + 10 * torch.finfo(t.dtype).eps * noise), t)
    return [(table, name, moved[id(t)]) for table, name, t in weights]


def has_norms_without_statistics(network: nn.Module) -> bool:
    """Return whether a batch norm takes the statistics of its batch in evaluation mode too."""
    norms = (
        part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)
    )
    return any(norm.running_mean is None for norm in norms)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode in this block.

    Afterwards each part is in the mode that it was in.
    """
    modes = [(part, part.training) for part in network.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def joined_batches(parts: Sequence[Any]) -> Any:
    """Return the rows of micro-batches as one batch; what has no rows is that of the first."""
    columns: list[list[Tensor]] = []
    for part in parts:
        tensors = list[Tensor]()
        map_tensors(tensors.append, part)
        columns.append(tensors)
    joined = iter(
        [
            torch.cat(list(column)) if column[0].ndim else column[0]
            for column in zip(*columns, strict=True)
        ]
    )
    return map_tensors(lambda _: next(joined), parts[0])


def index_of_rows(count: int, stride: int, half: int | None) -> list[int]:
    """Return which of ``count`` rows are in a half, or all rows, where those with the same remainder come first.

    >>> index_of_rows(6, stride=2, half=0), index_of_rows(6, stride=2, half=1)
    ([0, 2, 4], [1, 3, 5])
    """
    order = sorted(range(count), key=lambda row: row % stride)
    if half is None:
        return order
    return order[: count // 2] if half == 0 else order[count // 2 :]


def in_order(batch: Any, stride: int, half: int | None) -> Any:
    """Return a half of the rows of a batch, or all of them, in the order of :func:`index_of_rows`."""
    return map_tensors(lambda t: t[index_of_rows(len(t), stride, half)] if t.ndim else t, batch)


def signal_in_order(
    signal: Signal, problem: Problem | None, rows: int, stride: int, half: int | None
) -> Signal:
    """Return the signal about a half of the rows, or about all.

    A field without rows, such as a matrix, stays whole.
    """
    has_rows_by_field = {} if problem is None else has_rows(problem, signal, rows)
    index = index_of_rows(rows, stride, half)
    fields = {}
    for name, t in signal.fields().items():
        is_by_row = has_rows_by_field.get(name, t.ndim > 0 and len(t) == rows)
        fields[name] = t[index] if is_by_row else t
    return signal.having(fields)
