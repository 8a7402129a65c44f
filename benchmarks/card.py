"""What share of a card's rate a step reaches, beside the plain training step of the same network.

``gpu.py`` runs this, in its parts "share of the card". The share is the operations of a step over
its time, over the rate that the maker gives for dense products of that type. Beside it stands the
share of what one product of two large matrices reached in the same process. Operations are those of
products and convolutions alone, counted on an eager step.

- *Ours* is ``BilevelTrainer.step`` in the mode ``forward``: both networks and both optimizers.
- *Plain* is forward, backward and optimizer of one such network, on as many examples as both
  batches of ours have.
- *Bare replay* is the CUDA graph of ours alone, without the host's work around it.
"""

from __future__ import annotations

import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import step
import torch
from harness import Row, environment
from torch import Tensor
from torch.nn import functional as F

import metapl
from metapl.ablation.cost import flops
from metapl.functional import cuda_graphs

OURS, OURS_BY_GRAPHS, OURS_COMPILED = "ours, eager", "ours, by graphs", "ours, compiled"
PLAIN, PLAIN_BY_GRAPHS = "plain, eager", "plain, by graphs"
PLAIN_COMPILED, REPLAY = "plain, compiled", "bare replay"
COMPILE: dict[str, Any] = {OURS: False, OURS_BY_GRAPHS: "cudagraphs", OURS_COMPILED: True}

# Dense products, operations a second, as the maker gives them, by a word of the card's name.
RATES = {"H100": {"bf16": 989e12, "float32": 67e12}, "H200": {"bf16": 989e12, "float32": 67e12}}
SIDE, SMALL_SIDE = 8192, 128
"""Of the matrices of the product, and of those of a miniature."""
ROUND = 0.02
"""Seconds that a round takes at least."""
MOST = 1.0
"""Seconds in which rounds are begun."""
LIMIT = 60
"""Seconds that a way may take."""


@dataclass(frozen=True)
class Card:
    """A device, the type of a network's passes, and what the device does in it at most.

    Args:
        rate: of the maker, operations a second; None where it is not known.
        product: operations a second of one product of two large matrices.
    """

    device: torch.device
    precision: str
    rate: float | None
    product: float

    def wait(self) -> None:
        """Wait until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def passes(self) -> AbstractContextManager[Any]:
        """Return the context of a plain step's passes."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def card_of(device: str, precision: str, *, is_small: bool) -> Card:
    """Return the card of this process, after one product on it."""
    place = torch.device(device)
    name = torch.cuda.get_device_name() if place.type == "cuda" else ""
    rates = [rates for word, rates in RATES.items() if word in name]
    rate = rates[0][precision] if rates else None
    card = Card(place, precision, rate, product=math.nan)
    side = SMALL_SIDE if is_small else SIDE
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(side, side, device=place).to(dtype)
    times = rounds(partial(torch.mm, a, a), card, first=seconds(partial(torch.mm, a, a), card))
    return Card(place, precision, rate, product=2 * side**3 / statistics.median(times))


def seconds(run: Callable[[], Any], card: Card) -> float:
    """Return what a call takes until the device is done."""
    card.wait()
    start = time.perf_counter()
    run()
    card.wait()
    return time.perf_counter() - start


def rounds(run: Callable[[], Any], card: Card, *, first: float, most: int = 21) -> list[float]:
    """Return seconds of a call by rounds of several, at most so many, within :data:`MOST`.

    Args:
        first: what a call takes about.
    """
    calls = max(1, math.ceil(ROUND / max(first, 1e-6)))
    calls = min(calls, 200)

    def turn() -> None:
        for _ in range(calls):
            run()

    end = time.perf_counter() + MOST
    times = [seconds(turn, card) / calls]
    while len(times) < most and time.perf_counter() < end:
        times.append(seconds(turn, card) / calls)
    return times


def made_on(device: torch.device, make: Callable[[], Any]) -> Any:
    """Return the pair of networks and the batches on the device, which draws their first values."""
    with device:
        return moved(make(), device)


def moved(value: Any, device: torch.device) -> Any:
    """Return the pair of networks, or nested batches, on the device."""
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    return value.to(device)


def ours(make: Callable[[], Any], way: str, card: Card) -> tuple[Callable[[], Any], Any]:
    """Return a step of a trainer, and the trainer."""
    pair, data = made_on(card.device, make)
    precision = "bfloat16" if card.precision == "bf16" else "float32"
    trainer = step.trainer("forward", pair, compile=COMPILE[way], precision=precision, verify=False)
    return lambda: trainer.step(*data), trainer


def plain(make: Callable[[], Any], way: str, card: Card) -> Callable[[], Any]:
    """Return a plain training step of the student on the examples of both batches."""
    (_, network), ((x, y), u) = made_on(card.device, make)
    inputs = torch.cat([x, u])
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    labels = y.repeat(math.ceil(len(inputs) / len(y)))[: len(inputs)]
    optimizer = step.optimizer(network)
    params = [*network.parameters()]
    forward: Callable[[Tensor], Tensor] = network
    if way == PLAIN_COMPILED:
        forward = torch.compile(network, dynamic=False)  # type: ignore[assignment]

    def train() -> Any:
        with card.passes():
            loss = F.cross_entropy(forward(inputs), labels)
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g
        optimizer.step()
        return loss.detach()

    if way != PLAIN_BY_GRAPHS:
        return train

    def recorded() -> Any:
        # A region of autocast in a graph keeps no casts of weights.
        with cuda_graphs.without_cache_of_casts():
            return train()

    if card.device.type not in cuda_graphs.RECORDERS:
        raise metapl.MetaplError(f"no graphs on {card.device}")
    return cuda_graphs.RECORDERS[card.device.type](recorded, card.device, None).replay


def replay_of(trainer: metapl.BilevelTrainer) -> Callable[[], Any]:
    """Return the last graph of a trainer's steps alone."""
    compiled: Any = trainer.compiled_step
    replay: Callable[[], Any] = compiled._compiled.run.recorded[-1].recording.replay
    return replay


def row_of(run: Callable[[], Any], operations: float, card: Card) -> Row:
    """Return what a way's steps take and reach."""
    if card.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(card.device)
    first = seconds(run, card)
    second = seconds(run, card)
    times = rounds(run, card, first=seconds(run, card))
    median = statistics.median(times)
    low, high = (min(times), max(times))
    row: Row = {"first_seconds": first, "second_seconds": second, "rounds": len(times)}
    row |= {"ms": 1e3 * median, "ms_range": [1e3 * low, 1e3 * high], "operations": operations}
    rate = operations / median
    row |= {"rate": rate, "share_of_product": rate / card.product, "product": card.product}
    row["share"] = None if card.rate is None else rate / card.rate
    if card.device.type == "cuda":
        row["bytes"] = torch.cuda.max_memory_allocated(card.device)
        row["kernel_ms"] = kernel_milliseconds(run, card)
    return row


def kernel_milliseconds(run: Callable[[], Any], card: Card) -> float:
    """Return how long the kernels of one call take together, by PyTorch's profiler.

    Where a step takes longer than its kernels, the device waits for the host.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run()
        card.wait()
    microseconds = 0.0
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            microseconds += event.self_device_time_total
    return microseconds / 1e3


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise :class:`TimeoutError` in this block after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"{seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Share:
    """A network whose share is measured.

    Args:
        name: of the network.
        make: makes a pair of networks and their batches, as :class:`step.Network` has it.
        precision: ``"bf16"`` or ``"float32"``.
    """

    name: str
    make: Callable[[], Any]
    precision: str
    ways: tuple[str, ...]


def measure(
    share: Share, done: Sequence[Row], device: str, *, is_small: bool
) -> Iterator[list[Row]]:
    """Yield the row of each way that is not ``done``; what stops is a row with a reason.

    Raises: what stopped a way, behind its row, where the device can do no more in this process.
    """
    make = share.make
    precision = share.precision
    ways = [way for way in share.ways if (share.name, way) not in names_of(done)]
    if not ways:
        return
    full_float32_products(device)
    card = card_of(device, precision, is_small=is_small)
    counted: dict[bool, int] = {}
    for way in ways:
        start = time.perf_counter()
        row: Row = {"network": share.name, "way": way, "precision": precision}
        is_ours = way in COMPILE or way == REPLAY
        failure = ""
        try:
            with limited(LIMIT):
                if is_ours not in counted:
                    counted[is_ours] = operations_of(make, card, is_ours=is_ours)
                row |= row_of(step_by(way, make, card), counted[is_ours], card)
        # Whatever stops a way is what there is to say of it; the next way may run.
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            row["reason"] = f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"
            # The error itself would keep the tensors of its frames.
            failure = str(error)
        yield [row | {"seconds": time.perf_counter() - start, "measured_on": environment()}]
        if "CUDA error" in failure:
            raise RuntimeError(failure)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def step_by(way: str, make: Callable[[], Any], card: Card) -> Callable[[], Any]:
    """Return a step of a way, with networks of its own."""
    if way == REPLAY:
        run, trainer = ours(make, OURS_BY_GRAPHS, card)
        run()
        return replay_of(trainer)
    if way in COMPILE:
        return ours(make, way, card)[0]
    return plain(make, way, card)


def full_float32_products(device: str) -> None:
    """Let products of float32 be taken in float32 in this process.

    No region of autocast is open around the steps: it would keep their casts of weights.
    """
    if device == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"


def names_of(rows: Sequence[Row]) -> set[tuple[str, str]]:
    """Return the network and the way of each row."""
    return {(row["network"], row["way"]) for row in rows}


def operations_of(make: Callable[[], Any], card: Card, *, is_ours: bool) -> int:
    """Return the operations of one eager step, the second.

    It is counted in float32: the counter does not run with forward-mode derivatives in a region of
    autocast, and the operations are the same.
    """
    in_float32 = replace(card, precision="float32")
    if is_ours:
        run = ours(make, OURS, in_float32)[0]
    else:
        run = plain(make, PLAIN, in_float32)
    run()
    return flops(run)


def shown(row: Row) -> str:
    """Return the result of a row in words."""
    share = "" if row["share"] is None else f"{100 * row['share']:.1f} % of the card's rate, "
    memory = f", {row['bytes'] / 1e9:.2f} GB" if "bytes" in row else ""
    kernels = f" ({row['kernel_ms']:.4g} of kernels)" if "kernel_ms" in row else ""
    return (
        f"{row['ms']:.4g} ms{kernels}, {row['operations'] / 1e12:.3g} TFLOP, {share}"
        f"{100 * row['share_of_product']:.1f} % of a product's, first step "
        f"{row['first_seconds']:.1f} s{memory}"
    )
