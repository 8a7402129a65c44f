"""Checkpoints of which every process writes its part, while the training goes on.

A checkpoint is a new folder, ``step-00001234.parts``: the sharded tensors as torch.distributed.checkpoint writes them,
and in ``rest.ckpt``, which is written last, everything else and the SHA-256 of these files. It has its name only when
all of them are on the disk. Their metadata is a pickle, which can run code: load only what one's own job wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from metapl.runs import checkpoint
from metapl.runs.atomic import sync_folder
from metapl.runs.checkpoint import CheckpointError, CheckpointFolder, DamagedError

REST = "rest.ckpt"
LEAVES_WITHIN = 60.0  # seconds that a fit which ends waits for the parts under way

Like = Callable[[str, torch.Size], Any]
"""By the place of a tensor in the state and its shape, a DTensor whose layout it is to have; None: whole."""


class PartsWriter:
    """Writes checkpoints beside the training, one at a time; every process of the job has one, of the same folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.checkpoints, self.first = CheckpointFolder(folder, keep), dist.get_rank() == 0
        # Exchanges in another thread must not come between those of the training.
        self.group: Any = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1)
        self._under_way: Future[Path] | None = None
        self._path: Path | None = None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write a state as it is now; of what is not sharded, the first process writes its own.

        Raises: :class:`CheckpointError` on every process where the checkpoint before this one could not be written.
        """
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.finished()
        tensors: dict[str, Any] = {}
        tree = json.dumps(checkpoint.encoded(state, tensors))
        sharded = {place: t for place, t in tensors.items() if is_sharded(t)}
        rest: dict[str, Any] = {}
        if self.first:
            plain = {place: t.to("cpu", copy=True) for place, t in tensors.items() if place not in sharded}
            rest = {"tree": tree, "tensors": plain}
            self.checkpoints.remove_begun()
        path = self.checkpoints.folder / f"step-{step:08d}.parts"
        # The parts are copied before it returns.
        saved: Any = async_save(sharded, checkpoint_id=_begun(path), process_group=self.group)
        self._under_way = self._thread.submit(self._finish, saved, rest, path, step)

    def finished(self) -> Path | None:
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

    def _finish(self, saved: Any, rest: dict[str, Any], path: Path, step: int) -> Path:
        begun = _begun(path)

        def own() -> dict[str, str]:
            saved.result()
            return {file.name: _sha256(file) for file in begun.glob(f"__{dist.get_rank()}_*")}

        def whole() -> None:
            files = {".metadata": _sha256(begun / ".metadata")}
            for part in sums:
                files |= part
            checkpoint.save(begun / REST, rest | {"files": files})
            # One of the same step was damaged, and passed over when the run was resumed.
            shutil.rmtree(path, ignore_errors=True)
            os.replace(begun, path)
            sync_folder(path.parent)
            self.checkpoints.remove_oldest(step)

        try:
            sums = self._agreed(own)
            self._agreed(whole if self.first else bool)
        except CheckpointError:
            if self.first:
                shutil.rmtree(begun, ignore_errors=True)
            raise
        return path

    def _agreed(self, act: Callable[[], Any]) -> list[Any]:
        """What it gives in each process; what fails in one fails in all."""
        found = fault = None
        try:
            found = act()
        except BaseException as error:  # whatever it is, the others wait to hear of it; torch's own is no Exception
            fault = str(error).strip().rpartition("\n")[2] or type(error).__name__
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (found, fault), group=self.group)
        if faults := [fault for _, fault in every if fault]:
            raise CheckpointError(f"{self.checkpoints.folder}: a checkpoint could not be written: {faults[0]}")
        return [found for found, _ in every]


def check(path: Path) -> dict[str, Any]:
    """Refuse a checkpoint of which not every byte is as it was written; the state in it, where it is one file."""
    if not path.is_dir():
        return checkpoint.load(path)
    for name, sha256 in checkpoint.load(path / REST)["files"].items():
        if not (path / name).is_file() or _sha256(path / name) != sha256:
            raise DamagedError(f"{path} is damaged: its {name} is another than was written")
    return {}


def load(path: Path, like: Like | None = None) -> dict[str, Any]:
    """The state in a checkpoint, a file or a folder of parts, which :func:`check` has found whole. Sharded tensors are
    read as ``like`` lays them out, or whole, on the host. Cost: the pieces that this process asks for."""
    if not path.is_dir():
        return checkpoint.load(path)
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    rest = checkpoint.load(path / REST)
    tensors: dict[str, Any] = {}
    about: Any = FileSystemReader(path).read_metadata().state_dict_metadata
    for name, said in about.items():
        layout, dtype = (None if like is None else like(name, said.size)), said.properties.dtype
        tensors[name] = torch.empty(said.size, dtype=dtype) if layout is None else torch.empty_like(layout, dtype=dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that each process reads for itself is meant
        load_parts(tensors, checkpoint_id=path, no_dist=True)
    state: dict[str, Any] = checkpoint.decoded(rest["tree"], rest["tensors"] | tensors)
    return state


def layouts(state: dict[str, Any]) -> dict[str, Any]:
    """The sharded tensors of a state by their places in it."""
    tensors: dict[str, Any] = {}
    checkpoint.encoded(state, tensors)
    return {place: t for place, t in tensors.items() if is_sharded(t)}


def is_sharded(t: Any) -> bool:
    return hasattr(t, "device_mesh")


def _begun(path: Path) -> Path:
    return path.with_suffix(".parts.tmp")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
