"""Which steps of a long path keep their state, and where it lies; the others are computed again.

Of K steps, those whose numbers are multiples of ``spacings[0]`` keep their state while the path is
walked. On the way back, a block between two of them is walked again, and keeps its multiples of
``spacings[1]``, and so on; the steps of the finest blocks are all held. With spacings b^n, ..., b²,
b this is the tree of REPLAY, of branching b: some b log_b K states, and each step is computed again
once a level.

A compiled path in a folder goes on after its process was killed:

    path.ckpt    whose path it is, the generators at its beginning, how far it came, and its book
    kept-N.ckpt  the state before step N, for the way back; of the last N, after all steps

Each file is the old one or the whole new one, with its checksum (:mod:`metapl.runs.checkpoint`). A
path that has ended removes them all.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
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
from metapl.problems.base import BilevelProblem, kind_of
from metapl.runs import checkpoint
from metapl.runs.folder import Folder as OwnedFolder
from metapl.updates import Update

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
        on: None: where the student is; "cpu": on the host; else a folder.
    """

    spacings: tuple[int, ...] = ()
    on: str | None = None

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
        disk: bytes of the folder's disk; ``math.inf`` without a folder.
        has_folder: whether states lie in a folder, but for those of the finest blocks.
    """

    steps: int
    state_bytes: int
    memory: float
    disk: float
    has_folder: bool

    def holds(self, way: Keeping, share: float = 1.0) -> bool:
        """Return whether the states of a way of keeping fit, into a ``share`` of the memory."""
        in_files = 0
        if self.has_folder and way.spacings:
            in_files = way.states(self.steps) - min(self.steps, way.spacings[-1])
        # The student has the first state itself.
        in_memory = way.states(self.steps) - in_files - 1
        fits_memory = in_memory * self.state_bytes <= share * self.memory
        return fits_memory and in_files * self.state_bytes <= self.disk


def keeping(
    steps: int,
    state_bytes: int,
    device: torch.device,
    spacing: int | Literal["tree"] | None,
    on: str | None,
    ranks: Ranks = ALONE,
) -> Keeping:
    """Return which of so many steps keep their states.

    What memory, or the disk of a folder, does not hold is refused.

    Args:
        state_bytes: the size of one state.
        spacing: every so many steps, a tree, or None: as many as there is room for
            (:class:`metapl.feedback.Forward`).
        on: as of :class:`Keeping`.
    """
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
    elif room.has_folder or (room.memory == math.inf and steps > ALL_KEPT):
        way = root
    else:
        share = 1.0 if steps <= ALL_KEPT else SHARE_OF_MEMORY
        way = next((way for way in ways.values() if room.holds(way, share)), tree)

    if room.has_folder and not way.spacings:
        raise MetaplError(
            f"keep_every=1 holds all steps, and none in the folder {on!r}; expected "
            "keep_every=None."
        )
    if not room.holds(way):
        raise MetaplError(too_large(way, ways, room))
    return way


def room_for(
    steps: int, state_bytes: int, device: torch.device, *, on: str | None, ranks: Ranks
) -> Room:
    """Return what is free for the states of a path; of several processes, the least of theirs."""
    folder = folder_of(on)
    place = torch.device("cpu") if on == "cpu" else device
    bytes_free = free_bytes(place)
    memory = math.inf if bytes_free is None else float(bytes_free)
    disk = float(shutil.disk_usage(folder).free) if folder else math.inf
    if not ranks.alone:
        # Their parts of a state differ in size, and every process has to choose the same.
        if place.type == "cpu":
            memory /= int(os.environ.get("LOCAL_WORLD_SIZE", ranks.processes))
        of_rank = torch.tensor([state_bytes, -memory], dtype=torch.float64, device=ranks.device)
        most, least = ranks.greatest(of_rank).tolist()
        state_bytes = int(most)
        memory = -least
    return Room(steps, state_bytes, memory=memory, disk=disk, has_folder=folder is not None)


def too_large(way: Keeping, ways: Mapping[str, Keeping], room: Room) -> str:
    """Return the error about a way of keeping that does not fit, with the ``ways`` that would."""
    expected = [
        f"{name} ({other.states(room.steps):,} states)"
        for name, other in ways.items()
        if room.holds(other)
    ]
    if not room.has_folder:
        expected.append("keep_on= with a folder and compile=True")
    expected.append("fewer steps")
    free = {"memory": room.memory, "disk": room.disk}
    there = [f"{readable(size)} of {name}" for name, size in free.items() if size < math.inf]
    count = way.states(room.steps)
    return (
        f"{way.words(room.steps)} would keep {count:,} states of {readable(room.state_bytes)}, "
        f"{readable(count * room.state_bytes)} together, and {' and '.join(there)} are free; "
        f"expected {', '.join(expected)}."
    )


def readable(size: float) -> str:
    """Return a number of bytes with three digits and a unit."""
    power = min(int(math.log10(max(size, 1)) / 3), 4)
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def folder_of(on: str | None) -> FilePath | None:
    """Return the folder that ``keep_on`` names, or None; one that does not exist is refused."""
    if on is None or on == "cpu":
        return None
    if not FilePath(on).is_dir():
        raise MetaplError(f'keep_on={on!r} is no folder; expected "cpu", or a folder that exists.')
    return FilePath(on)


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


class States:
    """Kept states in memory, by the number of their step.

    Attributes:
        is_stored: whether states are in a folder, and the path with them.
    """

    is_stored = False

    def __init__(self, on: str | None) -> None:
        self.on = on
        self._states = dict[int, Any]()

    @contextmanager
    def opened(self) -> Iterator[Mapping[str, Any] | None]:
        """Yield what :meth:`store` wrote last in a process that was killed; in memory nothing."""
        yield None

    def keep(self, number: int, state: Any, is_held: bool = False) -> None:
        """Keep the state before a step.

        Args:
            is_held: whether it is in a block all of whose states are held in memory.
        """
        if self.on == "cpu":
            state = on_host(state)
        self._states[number] = state

    def take(self, number: int) -> Any:
        """Return the state before a step, which is no longer kept."""
        state = self._states.pop(number)
        return back_on_device(state) if self.on == "cpu" else state

    def store(self, book: Mapping[str, Any]) -> None:
        """Store all that is known of the path, from which it goes on; in memory nothing."""

    def forget(self, first: int, end: int) -> None:
        """Remove the states before these steps, which the way back no longer needs."""


def on_host(state: Any) -> tuple[list[Any], Any, list[torch.device | None]]:
    """Return the leaves of a state, with tensors on the host, its structure, and their devices."""
    leaves, structure = pytree.tree_flatten(state)
    devices = [t.device if isinstance(t, Tensor) else None for t in leaves]
    moved = [t.cpu() if isinstance(t, Tensor) else t for t in leaves]
    return moved, structure, devices


def back_on_device(state: tuple[list[Any], Any, list[torch.device | None]]) -> Any:
    """Return the state of which :func:`on_host` was taken, with its tensors where they were."""
    leaves, structure, devices = state
    pairs = zip(leaves, devices, strict=True)
    moved = [leaf if device is None else leaf.to(device) for leaf, device in pairs]
    return pytree.tree_unflatten(moved, structure)


class FolderStates(States):
    """Kept states in a folder, but for those of the finest blocks; a killed path goes on by them.

    Args:
        number: by which the path is recognized, :func:`path_number`.
        device: whose generators, as they are now, are those at the beginning of the path.
    """

    is_stored = True

    def __init__(self, folder: FilePath, number: int, device: torch.device) -> None:
        super().__init__(None)
        self.folder = folder
        self._whose = {"of": number, "random": RandomState.now(device).values()}

    @contextmanager
    def opened(self) -> Iterator[Mapping[str, Any] | None]:
        """Own the folder until the block ends; a path that ends removes its files.

        Yields what :meth:`store` wrote last in a process that was killed; None where no path is
        here. The path of another call is refused.
        """
        with OwnedFolder(self.folder).locked():
            # Processes that were killed while they wrote have left these.
            for unfinished in self.folder.glob("*.tmp"):
                unfinished.unlink(missing_ok=True)
            path_file = self.folder / "path.ckpt"
            book: Mapping[str, Any] | None = None
            if path_file.exists():
                content = self._read("path")
                if content["whose"]["of"] != self._whose["of"]:
                    raise MetaplError(
                        f"keep_on={str(self.folder)!r} holds a path of other networks, batches or "
                        f"options; expected the call that was killed, or {path_file} removed."
                    )
                self._whose = content["whose"]
                book = content["known"]
            else:
                self._remove()
            yield book
            self._remove()

    def store(self, book: Mapping[str, Any]) -> None:
        self._write("path", {"whose": self._whose, "known": book})

    def forget(self, first: int, end: int) -> None:
        for number in range(first, end):
            self._file(number).unlink(missing_ok=True)

    def keep(self, number: int, state: Any, is_held: bool = False) -> None:
        if is_held:
            super().keep(number, state)
        elif not self._file(number).exists():
            self._write(self._file(number).stem, {"state": state})

    def take(self, number: int) -> Any:
        if number in self._states:
            return super().take(number)
        return self._read(self._file(number).stem)["state"]

    def _file(self, number: int) -> FilePath:
        return self.folder / f"kept-{number:08d}.ckpt"

    def _remove(self) -> None:
        """Remove the files of the path, its name first: what is left without it is nobody's."""
        for file in (self.folder / "path.ckpt", *self.folder.glob(f"kept-{'[0-9]' * 8}.ckpt")):
            file.unlink(missing_ok=True)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write plain values and tensors, with the device and the strides of each tensor."""
        places = [
            (str(t.device), t.stride()) if isinstance(t, Tensor) else None
            for t in pytree.tree_leaves(content)
        ]
        checkpoint.save(self.folder / f"{name}.ckpt", {"content": content, "places": places})

    def _read(self, name: str) -> Any:
        """Return what was written, with each tensor on its device and in its order of memory.

        Kernels round by the order of the memory.
        """
        file = checkpoint.load(self.folder / f"{name}.ckpt")
        leaves, structure = pytree.tree_flatten(file["content"])
        for number, place in enumerate(file["places"]):
            if place is None:
                continue
            device, strides = place
            leaf = leaves[number]
            tensor = torch.empty_strided(leaf.shape, strides, dtype=leaf.dtype, device=device)
            leaves[number] = tensor.copy_(leaf)
        return pytree.tree_unflatten(leaves, structure)


def generators_at_start(folder: str | None, device: torch.device) -> RandomState:
    """Return the generators at the beginning of the path that a killed process has left.

    Where a folder has no path, the generators as they are now.
    """
    place = folder_of(folder)
    if place is None or not (place / "path.ckpt").exists():
        return RandomState.now(device)
    whose = checkpoint.load(place / "path.ckpt")["content"]["whose"]
    return RandomState(device, **whose["random"])


def path_number(
    student: nn.Module,
    teacher: nn.Module,
    problem: BilevelProblem,
    mode: Any,
    update: Update,
    optimizer: torch.optim.Optimizer,
    others: Any,
) -> int:
    """Return a number by which a path is recognized in its folder.

    It depends on the networks, the losses, U, the mode, autocast, and ``others``, such as batches.
    Files of earlier versions have it too: what it is made of may not change its form.
    """
    device_type = next(student.parameters()).device.type
    groups = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    rule = (type(optimizer).__name__, str(groups), update.read_state())
    # The words of a tensor are rounded, so it counts itself.
    attributes = {
        name: value if isinstance(value, Tensor) else str(value)
        for name, value in vars(problem).items()
    }
    losses = (kind_of(problem), attributes)
    mode_in_words = (mode.name, str({**vars(mode), "keep_on": None}))
    autocast = (
        torch.is_autocast_enabled(device_type),
        str(torch.get_autocast_dtype(device_type)),
    )
    networks = (parts_of_number(student), parts_of_number(teacher))
    return int(digest((*networks, rule, losses, mode_in_words, autocast, others)))


def parts_of_number(network: nn.Module) -> tuple[Any, ...]:
    """Return what of a network counts in the number of a path."""
    is_training = [part.training for part in network.modules()]
    return (
        str(network),
        is_training,
        dict(network.named_parameters()),
        dict(network.named_buffers()),
    )
