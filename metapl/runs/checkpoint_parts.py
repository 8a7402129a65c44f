"""Checkpoints of which every process writes its part, while the training goes on.

A checkpoint is a new folder, ``step-00001234.parts``: the sharded tensors as torch.distributed.checkpoint writes them,
everything else in ``rest.ckpt``, and the SHA-256 of these files in ``files.ckpt``, written last. It has its name only
when all of these are on the disk. Its metadata is a pickle, which can run code: load only what one's own job wrote.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from metapl.errors import reason_of
from metapl.runs import checkpoint
from metapl.runs.atomic import sync_folder
from metapl.runs.checkpoint import CheckpointError, CheckpointFolder, DamagedError

REST, FILES = "rest.ckpt", "files.ckpt"
LEAVES_WITHIN = 60.0  # seconds that a fit which ends waits for the parts under way

Like = Callable[[str, torch.Size], Any]
"""By the name of a tensor and its shape, a DTensor whose layout it is to have; None: whole."""


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
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.settle()

        def begin() -> tuple[str, str]:
            self.checkpoints.make()
            names = (f"step-{step:08d}{'' if n == 0 else f'-{n}'}.parts" for n in range(10**6))
            # One of the same step may be left from before a restart.
            name = next(name for name in names if not (self.checkpoints.folder / name).exists())
            place = self.checkpoints.folder / f"{name}.{secrets.token_hex(4)}.tmp"
            place.mkdir()
            try:
                checkpoint.save(place / REST, state, {})
            except BaseException:
                shutil.rmtree(place, ignore_errors=True)
                raise
            return name, place.name

        name, temporary = self._agreed(begin, first=True)
        path, place = self.checkpoints.folder / name, self.checkpoints.folder / temporary
        parts: dict[str, Any] = {}
        checkpoint.encoded(state, {}, parts)
        # The parts are copied before it returns.
        saved: Any = async_save(parts, checkpoint_id=place, process_group=self.group)
        self._under_way = done = Future[Path]()
        threading.Thread(target=self._finish, args=(done, saved, place, path, step), daemon=True).start()

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

    def _finish(self, done: Future[Path], saved: Any, place: Path, path: Path, step: int) -> None:
        def own() -> dict[str, str]:
            try:
                saved.result()
            except BaseException as error:  # torch's own is no Exception
                last = str(error).strip().rpartition("\n")[2]
                raise CheckpointError(f"{last} (is the disk full, or closed to a process?)") from error
            files = place.glob(f"__{self.rank}_*")
            return {file.name: _sha256(file) for file in (*files, *(place / n for n in (".metadata", REST)))}

        def whole(files: list[dict[str, str]]) -> None:
            checkpoint.save(place / FILES, {name: sha256 for part in files for name, sha256 in part.items()})
            os.replace(place, path)
            sync_folder(path.parent)
            self.checkpoints.remove_oldest(step)

        try:
            files = self._agreed(own)
            self._agreed(lambda: whole(files), first=True)
            done.set_result(path)
        except BaseException as error:  # for the training's own thread
            if self.first:
                shutil.rmtree(place, ignore_errors=True)
            done.set_exception(error)

    def _agreed(self, act: Callable[[], Any], *, first: bool = False) -> Any:
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
            raise CheckpointError(f"{self.checkpoints.folder}: a checkpoint could not be written: {faults[0]}")
        return every[0][0] if first else [found for found, _ in every]


def check(path: Path) -> dict[str, Any]:
    """Refuse a checkpoint, in parts or not, of which not every byte is as it was written."""
    if not path.is_dir():
        return checkpoint.load(path)
    if not (path / FILES).exists():
        if (path / REST).exists():
            checkpoint.load(path / REST, lambda name: torch.empty(0))  # one of an earlier version is refused by name
        raise DamagedError(f"{path} is damaged: it has no {FILES}")
    for name, sha256 in checkpoint.load(path / FILES).items():
        if not (path / name).is_file() or _sha256(path / name) != sha256:
            raise DamagedError(f"{path} is damaged: its {name} is another than was written")
    return {}


def load(path: Path, like: Like | None = None, *, checked: bool = False) -> dict[str, Any]:
    """The state in a checkpoint, a file or a folder of parts. Sharded tensors are read as ``like`` lays them out, or
    whole, on the host. Cost: the pieces that this process asks for; unless another has ``checked``, first all of them.
    """
    if not path.is_dir():
        return checkpoint.load(path)
    if not checked:
        check(path)
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    about: Any = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {}
    for name, said in about.items():
        layout, dtype = (None if like is None else like(name, said.size)), said.properties.dtype
        tensors[name] = torch.empty(said.size, dtype=dtype) if layout is None else torch.empty_like(layout, dtype=dtype)
    if tensors:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that each process reads for itself is meant
            load_parts(tensors, checkpoint_id=path, no_dist=True)
    return checkpoint.load(path / REST, tensors.__getitem__)


def layouts(state: dict[str, Any]) -> dict[str, Any]:
    """The sharded tensors of a state by the names that they have in the parts."""
    found: dict[str, Any] = {}
    checkpoint.encoded(state, {}, found)
    return found


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
