"""Which steps of a long path keep their state, and where it lies; the others are computed again.

Of K steps, those whose numbers are multiples of ``spacings[0]`` keep their state while the path is
walked. On the way back, a block between two of them is walked again, and keeps its multiples of
``spacings[1]``, and so on; the steps of the finest blocks are all held. With spacings b^n, ..., b²,
b this is the tree of REPLAY, of branching b: some b log_b K states, and each step is computed again
once a level.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Literal

import torch

from metapl.errors import MetaplError
from metapl.execution.ranks import ALONE, Ranks

# All of so many steps keep their states, unless told otherwise.
ALL_KEPT = 50
# How many blocks a block of the tree has.
BRANCHING = 10
# Of the memory that is free, for states; activations need some too.
SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True)
class Keeping:
    """Which steps keep their state, and where.

    Args:
        spacings: as at the head of this file; none: all steps are held.
        on: None: where the student is; "cpu": on the host.
    """

    spacings: tuple[int, ...] = ()
    on: Literal["cpu"] | None = None

    def states(self, steps: int) -> int:
        """Return the most states that are held at once."""
        lengths = (steps, *self.spacings, 1)
        return sum(math.ceil(longer / shorter) for longer, shorter in pairwise(lengths))

    def words(self, steps: int) -> str:
        """Return what is kept, for the reader of a result."""
        if not self.spacings:
            return f"all {steps:,} steps"
        spacings = ", then in ".join(f"{spacing:,}" for spacing in self.spacings)
        return f"one step in {spacings}, of {steps:,}"


ALL = Keeping()


@dataclass(frozen=True)
class Room:
    """What is free for the states of a path.

    Args:
        steps: K.
        state_bytes: the size of one state.
        memory: bytes; ``math.inf`` where the system does not say.
    """

    steps: int
    state_bytes: int
    memory: float

    def holds(self, way: Keeping, share: float = 1.0) -> bool:
        """Return whether the states of a way of keeping fit, into a ``share`` of the memory."""
        # The student has the first state itself.
        states = way.states(self.steps) - 1
        return states * self.state_bytes <= share * self.memory


def keeping(
    steps: int,
    state_bytes: int,
    device: torch.device,
    spacing: int | Literal["tree"] | None,
    on: Literal["cpu"] | None,
    ranks: Ranks = ALONE,
) -> Keeping:
    """Return which of so many steps keep their states; what memory does not hold is refused.

    Args:
        state_bytes: the size of one state.
        spacing: every so many steps, a tree, or None: as many as there is room for
            (:class:`metapl.feedback.Forward`).
        on: as of :class:`Keeping`.
    """
    # A megabyte is free without asking the system.
    if spacing is None and steps <= ALL_KEPT and steps * state_bytes <= 2**20:
        return Keeping((), on)
    room = room_for(steps, state_bytes, device, on=on, ranks=ranks)
    root = Keeping((math.isqrt(steps - 1) + 1,), on)
    levels = math.ceil(math.log(steps, BRANCHING) - 1e-9) - 1
    tree = root
    if levels > 0:
        tree = Keeping(tuple(BRANCHING**level for level in range(levels, 0, -1)), on)
    ways = {
        "keep_every=1": Keeping((), on),
        f"keep_every={root.spacings[0]}": root,
        'keep="tree"': tree,
    }

    if spacing == "tree":
        way = tree
    elif spacing is not None:
        way = Keeping((spacing,) if spacing > 1 else (), on)
    elif room.memory == math.inf and steps > ALL_KEPT:
        way = root
    else:
        share = 1.0 if steps <= ALL_KEPT else SHARE_OF_MEMORY
        way = next((way for way in ways.values() if room.holds(way, share)), tree)

    if not room.holds(way):
        raise MetaplError(too_large(way, ways, room))
    return way


def room_for(
    steps: int,
    state_bytes: int,
    device: torch.device,
    *,
    on: Literal["cpu"] | None,
    ranks: Ranks,
) -> Room:
    """Return what is free for the states of a path; of several processes, the least of theirs."""
    place = torch.device("cpu") if on == "cpu" else device
    bytes_free = free_bytes(place)
    memory = math.inf if bytes_free is None else float(bytes_free)
    if not ranks.alone:
        # Their parts of a state differ in size, and every process has to choose the same.
        if place.type == "cpu":
            memory /= int(os.environ.get("LOCAL_WORLD_SIZE", ranks.processes))
        of_rank = torch.tensor([state_bytes, -memory], dtype=torch.float64, device=ranks.device)
        most, least = ranks.greatest(of_rank).tolist()
        state_bytes = int(most)
        memory = -least
    return Room(steps, state_bytes, memory=memory)


def too_large(way: Keeping, ways: Mapping[str, Keeping], room: Room) -> str:
    """Return the error about a way of keeping that does not fit, with the ``ways`` that would."""
    expected = [
        f"{name} ({other.states(room.steps):,} states)"
        for name, other in ways.items()
        if room.holds(other)
    ]
    expected.append("fewer steps")
    count = way.states(room.steps)
    return (
        f"{way.words(room.steps)} would keep {count:,} states of {readable(room.state_bytes)}, "
        f"{readable(count * room.state_bytes)} together, and {readable(room.memory)} of memory "
        f"are free; expected {', '.join(expected)}."
    )


def readable(size: float) -> str:
    """Return a number of bytes with three digits and a unit."""
    power = min(int(math.log10(max(size, 1)) / 3), 4)
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device; None where the system does not say."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    try:
        lines = FilePath("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    return None
