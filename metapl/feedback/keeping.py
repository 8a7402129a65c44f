"""Which steps of a long path keep their state, and where it lies; the others are computed again from these.

Of K steps, those whose numbers are multiples of ``spacings[0]`` keep their state while the path is walked. On the way
back, a block between two of them is walked again, and keeps its multiples of ``spacings[1]``, and so on; the steps of
the finest blocks are all held. With spacings b^n, ..., b², b this is the tree of REPLAY, of branching b: some
b log_b K states, and each step is computed again once a level.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.ranks import ALONE, Ranks

ALL_KEPT = 50  # steps, up to which all keep their states unless told otherwise
BRANCHING = 10  # of the tree
SHARE = 0.5  # of the memory that is free, for states; activations need some too


@dataclass(frozen=True)
class Keeping:
    """Which steps keep their state, and where."""

    spacings: tuple[int, ...] = ()  # as at the head of this file; none: all steps are held
    on: str | None = None  # None: where the student is; "cpu": on the host; else a folder

    def states(self, steps: int) -> int:
        """The most states that are held at once."""
        lengths = (steps, *self.spacings, 1)
        return sum(math.ceil(longer / shorter) for longer, shorter in pairwise(lengths))

    def words(self, steps: int) -> str:
        """What is kept, for the reader of a result."""
        if not self.spacings:
            return f"all {steps:,} steps"
        return f"one step in {', then in '.join(f'{n:,}' for n in self.spacings)}, of {steps:,}"


ALL = Keeping()


def keeping(
    steps: int,
    state: int,
    device: torch.device,
    how: int | Literal["tree"] | None,
    on: str | None,
    ranks: Ranks = ALONE,
) -> Keeping:
    """Of a path of so many steps, whose states have so many bytes: every so many steps, a tree, or None, as
    :class:`metapl.feedback.Forward` says. A way that memory, or the folder's disk, does not hold is refused."""
    folder, place = folder_of(on), torch.device("cpu") if on == "cpu" else device
    levels = math.ceil(math.log(steps, BRANCHING) - 1e-9) - 1
    all_held, root = Keeping((), on), Keeping((math.isqrt(steps - 1) + 1,), on)
    tree = Keeping(tuple(BRANCHING**level for level in range(levels, 0, -1)), on) if levels > 0 else root
    known = free_bytes(place)
    free = math.inf if known is None else float(known)
    disk = float(shutil.disk_usage(folder).free) if folder else math.inf
    if not ranks.alone:  # of parts that differ in size; every process has to choose the same
        if place.type == "cpu":
            free /= int(os.environ.get("LOCAL_WORLD_SIZE", ranks.processes))
        most, least = ranks.greatest(torch.tensor([state, -free], dtype=torch.float64, device=ranks.device)).tolist()
        state, free = int(most), -least

    def fits(way: Keeping, share: float = 1.0) -> bool:
        in_files = way.states(steps) - min(steps, way.spacings[-1]) if folder and way.spacings else 0
        held = way.states(steps) - in_files - 1  # the student has the first
        return held * state <= share * free and in_files * state <= disk

    ways = {"keep_every=1": all_held, f"keep_every={root.spacings[0]}": root, 'keep="tree"': tree}
    if how is not None:
        asked = tree if how == "tree" else Keeping((how,) if how > 1 else (), on)
    elif folder or (free == math.inf and steps > ALL_KEPT):
        asked = root
    else:
        share = 1.0 if steps <= ALL_KEPT else SHARE
        asked = next((way for way in ways.values() if fits(way, share)), tree)
    if folder and not asked.spacings:
        raise MetaplError(f"keep_every=1 holds all steps, and none in the folder {on!r}; expected keep_every=None.")
    if not fits(asked):
        able = [f"{name} ({way.states(steps):,} states)" for name, way in ways.items() if fits(way)]
        able += [] if folder else ["keep_on= with a folder and compile=True"]
        there = [f"{said(n)} of {what}" for what, n in (("memory", free), ("disk", disk)) if n < math.inf]
        count = asked.states(steps)
        raise MetaplError(
            f"{asked.words(steps)} would keep {count:,} states of {said(state)}, {said(count * state)} together, and "
            f"{' and '.join(there)} are free; expected {', '.join([*able, 'fewer steps'])}."
        )
    return asked


def said(size: float) -> str:
    power = min(int(math.log10(max(size, 1)) / 3), 4)
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def folder_of(on: str | None) -> FilePath | None:
    if on is None or on == "cpu":
        return None
    if not FilePath(on).is_dir():
        raise MetaplError(f'keep_on={on!r} is no folder; expected "cpu", or a folder that exists.')
    return FilePath(on)


def free_bytes(device: torch.device) -> int | None:
    """The memory that is free on a device; None where the system does not say."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    try:
        lines = FilePath("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


class States:
    """Kept states, by the number of their step; those in a folder: :class:`metapl.feedback.resuming.Folder`."""

    done = 0  # steps that a process which was killed has taken
    adjoint: Any = None  # what it has of the way back

    def __init__(self, on: str | None) -> None:
        self.on, self._held = on, dict[int, Any]()

    def keep(self, number: int, state: Any) -> None:
        if self.on == "cpu":
            leaves, structure = pytree.tree_flatten(state)
            places = [t.device if isinstance(t, Tensor) else None for t in leaves]
            state = [t.cpu() if isinstance(t, Tensor) else t for t in leaves], structure, places
        self._held[number] = state

    def take(self, number: int) -> Any:
        """A state, which is no longer kept."""
        state = self._held.pop(number)
        if self.on != "cpu":
            return state
        leaves, structure, places = state
        moved = [t if at is None else t.to(at) for t, at in zip(leaves, places, strict=True)]
        return pytree.tree_unflatten(moved, structure)
