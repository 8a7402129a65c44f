"""Which steps of a long path keep their state, and where it lies; the others are computed again from these.

Of K steps, those whose numbers are multiples of ``spacings[0]`` keep their state while the path is
walked. On the way back, a block between two of them is walked again, and keeps its multiples of
``spacings[1]``, and so on; the steps of the finest blocks are all held. With spacings b^n, ..., b²,
b this is the tree of REPLAY, of branching b: some b log_b K states, and each step is computed again
once a level.

A compiled path in a folder goes on after its process was killed:

    path.ckpt    whose path it is, the generators at its beginning, how far it came, and what is known of its steps
    kept-N.ckpt  the state before step N, for the way back; of the last N, after all steps

Each file is the old one or the whole new one, with its checksum (:mod:`metapl.runs.checkpoint`). A
path that has ended removes them all.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.batch import digest
from metapl.execution.ranks import ALONE, Ranks
from metapl.execution.state import RandomState
from metapl.problems.base import Problem, kind_of
from metapl.runs import checkpoint
from metapl.runs.folder import Folder as OwnedFolder
from metapl.updates import Update

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
    """Of a path of so many steps, whose states have so many bytes: every so many steps, a tree, or
    None, as :class:`metapl.feedback.Forward` says. A way that memory, or the folder's disk, does
    not hold is refused."""
    folder, place = folder_of(on), torch.device("cpu") if on == "cpu" else device
    levels = math.ceil(math.log(steps, BRANCHING) - 1e-9) - 1
    all_held, root = Keeping((), on), Keeping((math.isqrt(steps - 1) + 1,), on)
    tree = (
        Keeping(tuple(BRANCHING**level for level in range(levels, 0, -1)), on)
        if levels > 0
        else root
    )
    known = free_bytes(place)
    free = math.inf if known is None else float(known)
    disk = float(shutil.disk_usage(folder).free) if folder else math.inf
    if not ranks.alone:  # of parts that differ in size; every process has to choose the same
        if place.type == "cpu":
            free /= int(os.environ.get("LOCAL_WORLD_SIZE", ranks.processes))
        most, least = ranks.greatest(
            torch.tensor([state, -free], dtype=torch.float64, device=ranks.device)
        ).tolist()
        state, free = int(most), -least

    def fits(way: Keeping, share: float = 1.0) -> bool:
        in_files = (
            way.states(steps) - min(steps, way.spacings[-1]) if folder and way.spacings else 0
        )
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
        raise MetaplError(
            f"keep_every=1 holds all steps, and none in the folder {on!r}; expected "
            "keep_every=None."
        )
    if not fits(asked):
        able = [f"{name} ({way.states(steps):,} states)" for name, way in ways.items() if fits(way)]
        able += [] if folder else ["keep_on= with a folder and compile=True"]
        there = [
            f"{said(n)} of {what}" for what, n in (("memory", free), ("disk", disk)) if n < math.inf
        ]
        count = asked.states(steps)
        raise MetaplError(
            f"{asked.words(steps)} would keep {count:,} states of {said(state)}, "
            f"{said(count * state)} together, and {' and '.join(there)} are free; expected "
            f"{', '.join([*able, 'fewer steps'])}."
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
        return 1024 * next(
            int(line.split()[1]) for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return None


class States:
    """Kept states, by the number of their step."""

    def __init__(self, on: str | None) -> None:
        self.on, self._held = on, dict[int, Any]()

    def keep(self, number: int, state: Any, finest: bool = False) -> None:
        """Keep the state before a step; ``finest``: of a block all of whose states are held."""
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


class FolderStates(States):
    """Kept states in a folder, but for those of the finest blocks, by which a path that is known by ``of`` goes on."""

    def __init__(self, folder: FilePath, of: int, device: torch.device) -> None:
        super().__init__(None)
        self.folder, self.whose = folder, {"of": of, "random": RandomState.now(device).values()}

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """Own the folder until the block ends; a path that ends removes its files. Yields what
        :meth:`came_to` saved last, in a process that was killed; else nothing."""
        with OwnedFolder(self.folder).held():
            for left in self.folder.glob("*.tmp"):  # of processes that were killed
                left.unlink(missing_ok=True)
            found = self._read("path") if (self.folder / "path.ckpt").exists() else None
            if found is None:
                self._remove()
            elif found["whose"]["of"] != self.whose["of"]:
                given = (
                    f"keep_on={str(self.folder)!r} holds a path of other networks, batches or "
                    "options"
                )
                raise MetaplError(
                    f"{given}; expected the call that was killed, or {self.folder / 'path.ckpt'} "
                    "removed."
                )
            else:
                self.whose = found["whose"]
            yield found and found["known"]
            self._remove()

    def came_to(self, **known: Any) -> None:
        """Store all that is known of the path, by which it goes on from here."""
        self._write("path", whose=self.whose, known=known)

    def forget(self, first: int, end: int) -> None:
        """Remove the states before these steps, which the way back no longer needs."""
        for number in range(first, end):
            (self.folder / f"kept-{number:08d}.ckpt").unlink(missing_ok=True)

    def keep(self, number: int, state: Any, finest: bool = False) -> None:
        if finest:
            super().keep(number, state)
        elif not (self.folder / f"kept-{number:08d}.ckpt").exists():
            self._write(f"kept-{number:08d}", state=state)

    def take(self, number: int) -> Any:
        return (
            super().take(number)
            if number in self._held
            else self._read(f"kept-{number:08d}")["state"]
        )

    def _remove(self) -> None:
        """Remove the files of the path, its name first: what is left without it is nobody's."""
        for file in (self.folder / "path.ckpt", *self.folder.glob(f"kept-{'[0-9]' * 8}.ckpt")):
            file.unlink(missing_ok=True)

    def _write(self, name: str, **content: Any) -> None:
        places = [
            (str(t.device), t.stride()) if isinstance(t, Tensor) else None
            for t in pytree.tree_leaves(content)
        ]
        checkpoint.save(self.folder / f"{name}.ckpt", {"content": content, "places": places})

    def _read(self, name: str) -> Any:
        found = checkpoint.load(self.folder / f"{name}.ckpt")
        leaves, structure = pytree.tree_flatten(found["content"])
        for i, at in enumerate(found["places"]):
            if at is not None:  # kernels round by the order of the memory
                made = torch.empty_strided(
                    leaves[i].shape, at[1], dtype=leaves[i].dtype, device=at[0]
                )
                leaves[i] = made.copy_(leaves[i])
        return pytree.tree_unflatten(leaves, structure)


def generators_at_start(folder: str | None, device: torch.device) -> RandomState:
    """The generators at the beginning of the path that a killed process has left in a folder.

    Without one, as now.
    """
    place = folder_of(folder)
    if place is None or not (place / "path.ckpt").exists():
        return RandomState.now(device)
    return RandomState(device, **checkpoint.load(place / "path.ckpt")["content"]["whose"]["random"])


def known_by(
    student: nn.Module,
    teacher: nn.Module,
    problem: Problem,
    mode: Any,
    update: Update,
    optimizer: torch.optim.Optimizer,
    *given: Any,
) -> int:
    """A number by which a path is known.

    By networks, losses, U, mode, autocast, and what else was ``given``.
    """

    def network(module: nn.Module) -> Any:
        modes = [part.training for part in module.modules()]
        return str(module), modes, dict(module.named_parameters()), dict(module.named_buffers())

    kind = next(student.parameters()).device.type
    groups = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    rule = type(optimizer).__name__, str(groups), update.read_state()
    own = vars(problem).items()  # the words of a tensor are rounded
    losses = (
        kind_of(problem),
        {name: value if isinstance(value, Tensor) else str(value) for name, value in own},
    )
    how = mode.name, str({**vars(mode), "keep_on": None})
    cast = torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind))
    return int(digest((network(student), network(teacher), rule, losses, how, cast, given)))
