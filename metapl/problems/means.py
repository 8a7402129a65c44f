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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.batch import Batch, length, map_tensors
from metapl.execution.compare import coarsest_dtype
from metapl.execution.numerics import no_fast_path
from metapl.execution.ranks import Ranks
from metapl.execution.shards import is_sharded
from metapl.execution.state import RandomState, Slot, Slots, replay, stand_in
from metapl.problems.base import BilevelProblem, Signal, has_rows, joined_signals

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
    problem: BilevelProblem | None,
    *,
    step: int,
    ranks: Ranks,
    device: torch.device,
    parts: int,
) -> None:
    """Refuse a loss that is no mean over rows and does not say what it is a mean over.

    It is compared on the rows of the first two micro-batches, and on two halves of them, with the
    network in evaluation mode, where no row depends on the others: at its weights, and at others.
    At the first weights the loss is often almost the same in every row, and all weightings of the
    rows have almost the same mean.

    What cannot be told is not refused: where a pass or a loss draws random numbers, where a batch
    norm keeps no statistics, and losses that are meant to be of each micro-batch
    (``of_micro_batches``). Nor are metapl's own losses compared, which are such means
    (``is_mean_over_rows``). Sharded networks are compared at their own weights alone.

    Cost: 21 passes on two micro-batches without a graph, and a copy of the weights, in the first
    step; of a loss that is refused two passes and a copy more.
    """
    compared = []
    for loss in losses:
        is_mean = getattr(loss, "is_mean_over_rows", False)
        if not is_mean and not getattr(loss, "of_micro_batches", False):
            compared.append(loss)
    if not compared or has_norms_without_statistics(network):
        return
    rows = RowsOfTwo(
        outer=joined_batches(outer[:2]),
        inner=joined_batches(inner[:2]),
        signal=joined_signals([signal.detached() for signal in signals[:2]]),
        problem=problem,
    )
    tolerance = TOLERANCES[coarsest_dtype([p.dtype for p in network.parameters()], device)]
    refusal = ""
    random = RandomState.now(device)
    with torch.no_grad(), no_fast_path(), evaluating(network):
        slots = Slots(network)
        for loss in compared:
            comparison = Comparison(
                network=network, loss=loss, rows=rows, step=step, tolerance=tolerance, random=random
            )
            with replay(random, slots):
                difference = comparison.difference()
            for size in NOISE:
                if difference is None:
                    difference = comparison.difference_at(weights_moved(slots, size))
            if difference is not None and not refusal:
                loss_of_all, loss_by_halves = difference
                refusal = (
                    f"the loss {loss.name!r} is {loss_of_all:.6g} on {length(rows.outer)} rows, "
                    f"and {loss_by_halves:.6g} by two halves of them, with accumulate={parts}: it "
                    "is no mean over rows. Give it a method mean_over(*, outer, inner) that "
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
    """The rows of two micro-batches, of which a loss is taken of all and by halves."""

    outer: Batch
    inner: Batch
    signal: Signal
    problem: BilevelProblem | None


@dataclass(frozen=True)
class Comparison:
    """A loss of a network on all rows, compared with the mean of its values on two halves.

    Args:
        network: the network, in evaluation mode.
        loss: a term of its objective.
        rows: the rows.
        step: the step that the loss is told.
        tolerance: how far the two may differ, relative to them.
        random: the state of the generators before a pass, which no pass may move.
    """

    network: nn.Module
    loss: Any
    rows: RowsOfTwo
    step: int
    tolerance: float
    random: RandomState

    def difference(self) -> tuple[float, float] | None:
        """Return the loss of all rows, and the mean of two halves, where these differ.

        None where they do not, or where it cannot be told because something draws.
        """
        loss_of_all, _ = self.loss_and_count(stride=1, half=None)
        for stride in STRIDES:
            first, n_first = self.loss_and_count(stride=stride, half=0)
            second, n_second = self.loss_and_count(stride=stride, half=1)
            if not RandomState.now(self.random.device).equals(self.random):
                return None
            total = 0.0
            # The mean of nothing is NaN, and counts for nothing.
            if n_first:
                total += n_first * first
            if n_second:
                total += n_second * second
            loss_by_halves = math.nan
            if n_first + n_second:
                loss_by_halves = total / (n_first + n_second)
            size = max(abs(loss_of_all), abs(first), abs(second))
            # Written so that a mean of NaN differs too.
            is_close = abs(loss_of_all - loss_by_halves) <= self.tolerance * size
            if math.isfinite(loss_of_all) and not is_close:
                return loss_of_all, loss_by_halves
        return None

    def difference_at(self, weights: Sequence[Slot]) -> tuple[float, float] | None:
        """Return the :meth:`difference` at other weights than the network's own.

        None where there are no other weights. A loss that runs at the network's own weights may
        fail at others, as a Cholesky factor does. That is no fault of the user's program, and tells
        nothing. Nor does a network that is chaotic there, such as a long recurrence: two halves are
        rounded otherwise than all rows together. So the difference has to be far above what
        rounding makes of it.
        """
        if not weights:
            return None
        slots = Slots(self.network)
        try:
            with replay(self.random, slots, weights):
                difference = self.difference()
                if difference is None:
                    return None
                loss_of_all, loss_by_halves = difference
                change_by_rounding = 0.0
                for seed in range(2):
                    with replay(self.random, slots, rounded(weights, seed)):
                        loss_at_rounded, _ = self.loss_and_count(stride=1, half=None)
                    change = abs(loss_at_rounded - loss_of_all)
                    change_by_rounding = max(change_by_rounding, change)
        except Exception:
            return None
        if abs(loss_of_all - loss_by_halves) > FAR_ABOVE * change_by_rounding:
            return difference
        return None

    def loss_and_count(self, *, stride: int, half: int | None) -> tuple[float, float]:
        """Return the loss of one half of the rows, or of all, and how many it is a mean over.

        A loss that does not say how many is a mean over rows, of which both halves have as many: 1.
        """
        outer = in_order(self.rows.outer, stride, half)
        inner = in_order(self.rows.inner, stride, half)
        signal = signal_in_order(
            self.rows.signal,
            self.rows.problem,
            rows=length(self.rows.inner),
            stride=stride,
            half=half,
        )
        count = None
        if hasattr(self.loss, "mean_over"):
            count = self.loss.mean_over(outer=outer, inner=inner)
        value = self.loss(self.network, outer=outer, inner=inner, signal=signal, step=self.step)
        return float(value), 1.0 if count is None else float(count)


def weights_moved(slots: Slots, size: float) -> list[Slot]:
    """Return other weights of a network, by their places: its own plus noise.

    At such weights the outputs differ between rows. The noise has a ``size`` in units of
    1/sqrt(inputs), with which layers are usually begun, also where weights are 0. It draws from a
    generator of its own. Of a sharded network there are none.
    """
    moved: dict[str, Tensor] = {}
    for name, p in slots.learned.items():
        if is_sharded(p):
            return []
        generator = torch.Generator(p.device).manual_seed(len(moved))
        inputs = max(1, p[0].numel()) if p.ndim > 1 and len(p) else 1
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        moved[name] = stand_in(p.detach() + size / math.sqrt(inputs) * noise, p)
    # A weight may have several places, and is learned by the name of its first one.
    return [(table, name, moved[first_name]) for table, name, first_name in slots.places]


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
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return True
    return False


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation in this block.

    Afterwards each of its modules trains or evaluates as it did before.
    """
    training_flags = [(module, module.training) for module in network.modules()]
    try:
        for module, _ in training_flags:
            module.training = False
        yield
    finally:
        for module, training in training_flags:
            module.training = training


def joined_batches(parts: Sequence[Any]) -> Any:
    """Return the rows of micro-batches as one batch; what has no rows is that of the first."""
    tensors_of_parts: list[list[Tensor]] = []
    for part in parts:
        tensors = list[Tensor]()
        map_tensors(tensors.append, part)
        tensors_of_parts.append(tensors)
    joined = []
    for same_tensor_of_parts in zip(*tensors_of_parts, strict=True):
        first = same_tensor_of_parts[0]
        if first.ndim > 0:
            joined.append(torch.cat(list(same_tensor_of_parts)))
        else:
            joined.append(first)
    # The tensors are visited in the same order as above.
    remaining = iter(joined)
    return map_tensors(lambda _: next(remaining), parts[0])


def index_of_rows(count: int, stride: int, half: int | None) -> list[int]:
    """Return which of ``count`` rows are in a half, or all rows, sorted by their remainder.

    The remainder is that of their number divided by ``stride``.

    >>> index_of_rows(6, stride=2, half=0), index_of_rows(6, stride=2, half=1)
    ([0, 2, 4], [1, 3, 5])
    """
    order = sorted(range(count), key=lambda row: row % stride)
    if half is None:
        return order
    if half == 0:
        return order[: count // 2]
    return order[count // 2 :]


def in_order(batch: Batch, stride: int, half: int | None) -> Any:
    """Return a half of the rows of a batch, or all, in the order of :func:`index_of_rows`."""

    def taken(t: Tensor) -> Tensor:
        if t.ndim == 0:
            return t
        return t[index_of_rows(len(t), stride, half)]

    return map_tensors(taken, batch)


def signal_in_order(
    signal: Signal, problem: BilevelProblem | None, rows: int, stride: int, half: int | None
) -> Signal:
    """Return the signal about a half of the rows, or about all.

    A field without rows, such as a matrix, stays as it is.
    """
    has_rows_by_field = {} if problem is None else has_rows(problem, signal, rows)
    index = index_of_rows(rows, stride, half)
    fields = {}
    for name, t in signal.fields().items():
        field_has_rows = has_rows_by_field.get(name, t.ndim > 0 and len(t) == rows)
        fields[name] = t[index] if field_has_rows else t
    return signal.having(fields)
