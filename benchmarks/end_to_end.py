"""How much of a bare step's rate a whole training has: the papers' protocol, on a card.

``gpu.py`` runs this as its part "protocol, end to end". A row of ``examples/protocols.py`` trains
WRN-28-2 on Fashion-MNIST by the exact gradient, with its views, its reading of pictures, its
averages and its records; no picture is tested and nothing is saved between the steps that are
timed. Then the same trainer steps on the last batch again and again: the bare step. The rate of the
training is to be 0.9 of that of the bare step.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fashion_protocol
import harness
import protocol_rows
import torch
from harness import Row

sys.path.insert(0, str(harness.HERE.parent / "examples"))

ARM = "exact gradient"
FIRST = 30
"""Steps before the clock begins: kernels are chosen in them."""
TIMED = 120
BARE = 60


@dataclass
class Clock:
    """Stands in the place of a trainer's ``step``, and reads the clock at two of its calls.

    Attributes:
        first, last: the numbers of the calls at whose begin it reads the clock.
        times: what it read, in seconds.
        batches: what the last call was given.
    """

    step: Callable[..., Any]
    device: str
    first: int
    last: int
    calls: int = 0
    times: list[float] = field(default_factory=list)
    batches: tuple[Any, ...] = ()

    def __call__(self, *batches: Any, **named: Any) -> Any:
        if self.calls in (self.first, self.last):
            self.times.append(now(self.device))
        self.calls += 1
        self.batches = (*batches, *named.values())
        return self.step(*batches, **named)


def now(device: str) -> float:
    """Return the time after the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rows(done: Sequence[Row], *, device: str, source: str, is_small: bool) -> Iterator[list[Row]]:
    """Yield one row: milliseconds of a step in a training and by itself, and their ratio.

    Args:
        source: the folder of Fashion-MNIST's four files.
    """
    if done:
        return
    import protocols

    size = fashion_protocol.MINIATURE if is_small else fashion_protocol.ON_GPU
    first, timed, bare = (1, 3, 2) if is_small else (FIRST, TIMED, BARE)
    clocks: list[Clock] = []
    trainer_of = protocols.trainer_of

    def with_clock(*arguments: Any) -> Any:
        trainer = trainer_of(*arguments)
        clock = Clock(trainer.step, device, first=first, last=first + timed)
        trainer.step = clock
        clocks.append(clock)
        return trainer

    protocols.trainer_of = with_clock
    more: Sequence[str] = ()
    with tempfile.TemporaryDirectory() as folder:
        if is_small:
            protocol_rows.write_noise(Path(folder))
            source = folder
            more = fashion_protocol.OF_NOISE
        try:
            fashion_protocol.train(
                fashion_protocol.PROTOCOL_ON_CARD,
                ARM,
                seed=0,
                # The step behind the last timed one, and a few more.
                steps=first + timed + 5,
                size=size,
                source=source,
                folder=Path(folder) / "run",
                more=("--save-every", str(10 * (first + timed)), *more),
            )
        finally:
            protocols.trainer_of = trainer_of
    clock = clocks[0]
    begin, end = clock.times
    seconds_of_training = (end - begin) / timed
    began = now(device)
    for _ in range(bare):
        clock.step(*clock.batches)
    seconds_of_step = (now(device) - began) / bare
    yield [
        {
            "arm": ARM,
            "steps": timed,
            **size.columns,
            "ms_in_training": 1e3 * seconds_of_training,
            "ms_bare": 1e3 * seconds_of_step,
            "share_of_bare_rate": seconds_of_step / seconds_of_training,
            "measured_on": harness.environment(),
        }
    ]


def shown(row: Row) -> list[str]:
    """Return the cells of a row: what was measured, the result, the goal."""
    what = f"{row['network']}, {row['labeled_batch']} + {row['unlabeled_batch']} pictures"
    result = (
        f"{row['ms_in_training']:.3g} ms a step of a training, {row['ms_bare']:.3g} ms a bare "
        f"step: {row['share_of_bare_rate']:.2f} of its rate"
    )
    return [f"protocol, end to end: {what}", result, "0.90"]
