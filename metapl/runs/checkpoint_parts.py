"""Checkpoints of which every process writes its part, while the training goes on.

A checkpoint is a new folder, ``step-00001234.parts``, of files as one process writes them:

    part-00000.ckpt, part-00001.ckpt, ...   of each tensor that is sharded, what a process holds, and where that is
    rest.ckpt                               everything else, and the SHA-256 of the files above; written last

It has its name only when all of these are on the disk; until then the name ends with ``.tmp``. Tensors are read into
any layout, on any number of processes or in one, and no code is run.
"""

from __future__ import annotations

import copy
import itertools
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from metapl.errors import reason_of
from metapl.runs import checkpoint
from metapl.runs.atomic import sync_folder
from metapl.runs.checkpoint import CheckpointError, CheckpointFolder

REST = "rest.ckpt"

_HERE = "tensor in the parts"
"""The key of what stands for a sharded tensor in the rest: its name, shape and type."""

Like = Callable[[str, torch.Size], Any]
"""By the name of a tensor and its shape, a DTensor whose layout it is to have; None: whole."""

LEAVES_WITHIN = 60.0
"""Seconds that a fit which ends waits for the parts under way."""


class PartsWriter:
    """Writes checkpoints beside the training, one at a time; every process of the job has one.

    Args:
        folder: of the checkpoints, the same for all processes.
        keep: how many checkpoints stay, at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.checkpoints = CheckpointFolder(folder, keep)
        self.rank, self.first = dist.get_rank(), dist.get_rank() == 0
        # Exchanges in another thread must not come between those of the training.
        self.group: Any = dist.new_group(backend="gloo")
        self._under_way: threading.Thread | None = None
        self._path: Path | None = None
        self._failed: BaseException | None = None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write a checkpoint; what is in it is as it is now.

        Args:
            step: the number in the name.
            state: a tree; of what is not sharded, the first process writes its own.

        Raises:
            CheckpointError: the checkpoint before this one could not be written; on every process.
        """
        self.settle()
        path, place = self._names(step)
        parts: dict[str, Any] = {}
        tree = _apart(state, parts, self.first)
        job = threading.Thread(target=self._finish, args=(place, path, step, parts, tree), daemon=True)
        self._under_way = job
        job.start()

    def _names(self, step: int) -> list[Path]:
        """The name of the checkpoint, and the one that it has until it is whole."""
        said: list[Any] = [None, None]
        if self.first:
            try:
                self.checkpoints.make()
                name = _free(self.checkpoints.folder, step)
                place = self.checkpoints.folder / f"{name}.{secrets.token_hex(4)}.tmp"
                place.mkdir()
                said = [[name, place.name], None]
            except Exception as error:  # as in _finished
                said = [None, reason_of(error)]
        dist.broadcast_object_list(said, src=0, group=self.group)
        names, fault = said
        if fault is not None:
            raise CheckpointError(f"a checkpoint could not be written in {self.checkpoints.folder}: {fault}.")
        return [self.checkpoints.folder / name for name in names]

    def settle(self) -> Path | None:
        """Wait for the checkpoint under way; the path of the last one that was written.

        Raises:
            CheckpointError: it could not be written; on every process.
        """
        if self._under_way is not None:
            self._under_way.join()
            self._under_way = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        return self._path

    def close(self) -> None:
        """Let the checkpoint under way come to its end, whatever ended the fit."""
        job, self._under_way = self._under_way, None
        if job is not None:
            job.join(LEAVES_WITHIN)
        if job is None or not job.is_alive():
            dist.destroy_process_group(self.group)

    def _finish(self, *job: Any) -> None:
        try:
            self._path = self._finished(*job)
        except BaseException as error:  # for the training's own thread
            self._failed = error

    def _finished(self, place: Path, path: Path, step: int, parts: dict[str, Any], tree: dict[str, Any]) -> Path:
        fault, written = None, {}
        try:
            name = f"part-{self.rank:05d}.ckpt"
            written = {name: checkpoint.save(place / name, {"parts": parts})} if parts else {}
        except Exception as error:  # whatever it is, the others wait to hear of it
            fault = reason_of(error)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (fault, written), group=self.group)
        said = [next((fault for fault, _ in every if fault is not None), None)]
        if self.first and said == [None]:
            try:
                files = {name: sha256 for _, part in every for name, sha256 in part.items()}
                checkpoint.save(place / REST, {"files": files, "state": tree})
                os.replace(place, path)
                sync_folder(path.parent)
                self.checkpoints.remove_oldest(step)
            except Exception as error:
                said = [reason_of(error)]
        dist.broadcast_object_list(said, src=0, group=self.group)
        if said != [None]:
            if self.first:
                shutil.rmtree(place, ignore_errors=True)
            raise CheckpointError(
                f"{path} could not be written: {said[0]}. Nothing was left behind, and the checkpoints before it are "
                "as they were. Is the disk full, or closed to a process? Mend that, then resume the run."
            )
        return path


def _free(folder: Path, step: int) -> str:
    """A name that no checkpoint has; one of the same step may be left from before a restart."""
    attempts = (f"step-{step:08d}{'' if n == 0 else f'-{n}'}.parts" for n in itertools.count())
    return next(name for name in attempts if not (folder / name).exists())


# ------------------------------------------------------------------------------------------------------------- reading


def check(path: Path) -> dict[str, Any]:
    """Refuse a checkpoint, in parts or not, of which not every byte is as it was written; what its file says, or the
    file beside the parts."""
    if not path.is_dir():
        return checkpoint.load(path)
    rest = checkpoint.load(path / REST)
    for name, sha256 in rest["files"].items():
        with checkpoint.opened(path / Path(name).name) as part:
            if part.sha256 != sha256:
                raise CheckpointError(f"{path} is damaged: its {name} is of another one; go back to an older one.")
    return rest


def load(path: Path, like: Like | None = None, *, checked: bool = False) -> dict[str, Any]:
    """Read a checkpoint, in parts or not.

    Args:
        path: a file, or a folder of parts.
        like: the layouts that sharded tensors are read into; None: they are whole, on the host.
        checked: whether another process has called :func:`check`.

    Returns: the state.

    Cost: of the parts, the pieces that this process asks for; without ``checked``, first all of them.
    """
    if not path.is_dir():
        return checkpoint.load(path)
    rest = checkpoint.load(path / REST) if checked else check(path)
    with ExitStack() as opened:
        pieces: dict[str, list[Any]] = {}
        for file in rest["files"]:
            part = opened.enter_context(checkpoint.opened(path / Path(file).name, checked=True))
            later = {i: (shape, partial(part.tensor, i)) for i, (_, shape, _) in enumerate(part.places)}
            for name, piece in part.tree(later)["parts"].items():
                pieces.setdefault(name, []).append(piece)

        def read(name: str, shape: list[int], dtype: str) -> Tensor:
            return _read(name, shape, dtype, pieces.get(name, []), like)

        state: dict[str, Any] = _together(rest["state"], read)
    return state


def _read(name: str, shape: list[int], dtype: str, pieces: list[Any], like: Like | None) -> Tensor:
    """A tensor, or what of it this process is to have, from pieces: where each begins, its shape and how to read it."""
    layout = None if like is None else like(name, torch.Size(shape))
    begin, sizes = _box(layout) if layout is not None else ([0] * len(shape), shape)
    t = torch.empty(sizes, dtype=getattr(torch, dtype))
    missing = t.numel()
    for at, (size, read) in pieces:
        ends = [(max(a, b), min(a + n, b + m)) for a, n, b, m in zip(at, size, begin, sizes, strict=True)]
        if all(low < high for low, high in ends):
            part = read()[tuple(slice(low - a, high - a) for (low, high), a in zip(ends, at, strict=True))]
            t[tuple(slice(low - b, high - b) for (low, high), b in zip(ends, begin, strict=True))] = part
            missing -= part.numel()
    if missing:
        raise CheckpointError(f"{name} is not all in the parts of a checkpoint; go back to an older one.")
    if layout is None:
        return t
    from torch.distributed.tensor import DTensor

    t = t.to(layout.device)
    where = layout.device_mesh, layout.placements
    return DTensor.from_local(t, *where, run_check=False, shape=torch.Size(shape), stride=layout.stride())


def _box(t: Any) -> tuple[list[int], list[int]]:
    """Where this process's part of a DTensor begins, and its shape."""
    [chunk] = t.__create_chunk_list__()
    return [*chunk.offsets], [*chunk.sizes]


# --------------------------------------------------------------------------------------------------- trees and tensors


def named(tree: Any) -> dict[str, Any]:
    """The sharded tensors of a tree by the names that they have in the parts."""
    found: dict[str, Any] = {}
    _mapped(tree, lambda name, t: found.setdefault(name, t))
    return {name: t for name, t in found.items() if _is_sharded(t)}


def _apart(tree: Any, parts: dict[str, Any], first: bool) -> Any:
    """A copy of a tree on the host without its sharded tensors, of which this process's parts are collected by name."""

    def copied(name: str, t: Any) -> Any:
        if not _is_sharded(t):
            return t.detach().to("cpu", copy=True) if first else None
        part = t.detach().to_local()
        where = t.device_mesh.get_coordinate() or ()
        # Of processes that hold the same, the first one writes it.
        if part.numel() and not any(at for at, kind in zip(where, t.placements, strict=True) if kind.is_replicate()):
            parts[name] = [_box(t)[0], part.to("cpu", copy=True)]
        return {_HERE: [name, [*t.shape], str(t.dtype).removeprefix("torch.")]}

    return _mapped(tree, copied)


def _together(tree: Any, read: Callable[..., Tensor]) -> Any:
    """The tree with its sharded tensors."""
    if isinstance(tree, dict) and tree.keys() == {_HERE}:
        return read(*tree[_HERE])
    if isinstance(tree, dict):
        return _refilled(tree, {key: _together(value, read) for key, value in tree.items()})
    return type(tree)(_together(value, read) for value in tree) if type(tree) in (list, tuple) else tree


def _mapped(tree: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """A tree whose tensors are changed, by name."""
    if isinstance(tree, Tensor):
        return change(name, tree)
    if isinstance(tree, dict):
        above = f"{name}/" if name else ""
        return _refilled(tree, {key: _mapped(value, change, f"{above}{key}") for key, value in tree.items()})
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(value, change, f"{name}/{i}") for i, value in enumerate(tree))
    return tree


def _refilled(tree: dict[Any, Any], values: dict[Any, Any]) -> dict[Any, Any]:
    """A dict of the same kind and with the same attributes: a module's state has the versions of its parts in one."""
    found = copy.copy(tree)
    found.update(values)
    return found


def _is_sharded(t: Any) -> bool:
    return hasattr(t, "device_mesh")
