"""Checkpoints of which every process writes its part, while the training goes on.

A checkpoint is a new folder, ``step-00001234.parts``, of files as one process writes them:

    part-00000.ckpt, part-00001.ckpt, ...   of each tensor that is sharded, what a process holds, and where that is
    rest.ckpt                               everything else, and the SHA-256 of the files above; written last

It has its name only when all of these are on the disk; until then the name ends with ``.tmp``. Tensors are read into
any layout, on any number of processes or in one, and no code is run.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from metapl.errors import reason_of
from metapl.runs import checkpoint
from metapl.runs.atomic import sync_folder
from metapl.runs.checkpoint import ELSEWHERE, CheckpointError, CheckpointFolder, Packed, unpacked

REST = "rest.ckpt"

Like = Callable[[str, torch.Size], Any]
"""By the name of a tensor and its shape, a DTensor whose layout it is to have; None: whole."""

LEAVES_WITHIN = 60.0  # seconds that a fit which ends waits for the parts under way


class PartsWriter:
    """Writes checkpoints beside the training, one at a time; every process of the job has one, of the same folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.checkpoints = CheckpointFolder(folder, keep)
        self.rank, self.first = dist.get_rank(), dist.get_rank() == 0
        # Exchanges in another thread must not come between those of the training.
        self.group: Any = dist.new_group(backend="gloo")
        self._under_way: Future[Path] | None = None
        self._path: Path | None = None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write a state as it is now; of what is not sharded, the first process writes its own.

        Raises: :class:`CheckpointError` on every process where the checkpoint before this one could not be written.
        """
        self.settle()
        folder, parts, packed = self.checkpoints.folder, dict[str, Any](), list[Packed]()

        def instead(name: str, t: Any) -> Any:
            if not is_sharded(t):
                return None if self.first else {"tuple": []}
            part, where = t.detach().to_local(), t.device_mesh.get_coordinate() or ()
            # Of processes that hold the same, the first one writes it.
            if part.numel() and not any(
                at for at, kind in zip(where, t.placements, strict=True) if kind.is_replicate()
            ):
                parts[name] = [_box(t)[0], part.to("cpu", copy=True)]
            said = [name, [*t.shape], str(t.dtype).removeprefix("torch.")]
            return {"dict": [[ELSEWHERE, said]]}

        path = folder / f"step-{step:08d}.parts"
        self._agreed(path, lambda: packed.append(Packed(state, instead)))
        name, place = self._agreed(path, partial(self._make, step), first=True)
        job = folder / place, folder / name, step, parts, *packed
        self._under_way = done = Future[Path]()
        threading.Thread(target=self._finish, args=(done, *job), daemon=True).start()

    def settle(self) -> Path | None:
        """Wait for the checkpoint under way; the path of the last one that was written. Raises as :meth:`write`."""
        done, self._under_way = self._under_way, None
        if done is not None:
            self._path = done.result()
        return self._path

    def close(self) -> None:
        """Let the checkpoint under way come to its end, whatever ended the fit."""
        done, self._under_way = self._under_way, None
        if done is None or wait([done], LEAVES_WITHIN).done:
            dist.destroy_process_group(self.group)

    def _make(self, step: int) -> tuple[str, str]:
        """Make the folder of a checkpoint: its name, and the one that it has until it is whole."""
        self.checkpoints.make()
        # One of the same step may be left from before a restart.
        names = (f"step-{step:08d}{'' if n == 0 else f'-{n}'}.parts" for n in itertools.count())
        name = next(name for name in names if not (self.checkpoints.folder / name).exists())
        place = self.checkpoints.folder / f"{name}.{secrets.token_hex(4)}.tmp"
        place.mkdir()
        return name, place.name

    def _finish(self, done: Future[Path], place: Path, path: Path, step: int, parts: Any, rest: Packed) -> None:
        def part() -> list[Any]:
            name = f"part-{self.rank:05d}.ckpt"
            return [[name, checkpoint.write(place / name, Packed({"parts": parts}))]] if parts else []

        def whole() -> None:
            rest.json = {"dict": [["files", {"dict": [*itertools.chain(*files)]}], ["state", rest.json]]}
            checkpoint.write(place / REST, rest)
            os.replace(place, path)
            sync_folder(path.parent)
            self.checkpoints.remove_oldest(step)

        try:
            files = self._agreed(path, part)
            self._agreed(path, whole, first=True)
            done.set_result(path)
        except BaseException as error:  # for the training's own thread
            if self.first:
                shutil.rmtree(place, ignore_errors=True)
            done.set_exception(error)

    def _agreed(self, path: Path, act: Callable[[], Any], *, first: bool = False) -> Any:
        """What it gives in each process, or in the first one alone; what fails in one fails in all."""
        found = fault = None
        try:
            found = act() if self.first or not first else None
        except Exception as error:  # whatever it is, the others wait to hear of it
            fault = reason_of(error)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (found, fault), group=self.group)
        faults = [fault for _, fault in every if fault is not None]
        if faults:
            raise CheckpointError(
                f"{path} could not be written: {faults[0]}. Nothing was left behind, and the checkpoints before it are "
                "as they were. Is the disk full, or closed to a process? Mend that, then resume the run."
            )
        return every[0][0] if first else [found for found, _ in every]


def named(state: Mapping[str, Any]) -> dict[str, Any]:
    """The sharded tensors of a state by the names that they have in the parts."""
    found: dict[str, Any] = {}

    def note(name: str, t: Any) -> Any:
        if is_sharded(t):
            found[name] = t
        return ()

    Packed(state, note)
    return found


def is_sharded(t: Any) -> bool:
    return hasattr(t, "device_mesh")


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
    """The state in a checkpoint, a file or a folder of parts. Sharded tensors are read as ``like`` lays them out, or
    whole, on the host. Cost: the pieces that this process asks for; unless another has ``checked``, first all of them.
    """
    if not path.is_dir():
        return checkpoint.load(path)
    if not checked:
        check(path)
    with ExitStack() as stack:
        rest = stack.enter_context(checkpoint.opened(path / REST, checked=checked))
        pieces: dict[str, list[Any]] = {}
        for file in unpacked(dict(rest.packed["dict"])["files"], rest.tensor):
            part = stack.enter_context(checkpoint.opened(path / Path(file).name, checked=True))

            def later(number: int, part: checkpoint.Content = part) -> Any:
                return part.places[number][1], partial(part.tensor, number)

            for name, piece in unpacked(part.packed, later)["parts"].items():
                pieces.setdefault(name, []).append(piece)

        def read(said: list[Any]) -> Tensor:
            name, shape, dtype = said
            return _read(name, shape, dtype, pieces.get(name, []), like)

        state: dict[str, Any] = unpacked(rest.packed, cache(rest.tensor), read)["state"]
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
    [chunk] = t.__create_chunk_list__()
    return [*chunk.offsets], [*chunk.sizes]
