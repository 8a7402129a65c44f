"""Checkpoints of which every process writes its part, while the training goes on.

A checkpoint is a new folder, ``step-00001234.parts``: the sharded tensors as torch.distributed.checkpoint writes them,
and in ``rest.ckpt``, which is written last, everything else and the sizes of these files. It has its name only when
all of them are on the disk. Their metadata is a pickle, which can run code: load only what one's own job wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from metapl.runs import checkpoint
from metapl.runs.atomic import sync_folder
from metapl.runs.checkpoint import CheckpointError, CheckpointFolder, DamagedError

REST = "rest.ckpt"
LEAVES_WITHIN = 60.0  # seconds that a fit which ends waits for the parts under way


class PartsWriter:
    """Writes checkpoints beside the training, one at a time; every process of the job has one, of the same folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.checkpoints, self.first = CheckpointFolder(folder, keep), dist.get_rank() == 0
        # Exchanges in another thread must not come between those of the training.
        self.group: Any = dist.new_group(backend="gloo")
        self._under_way: tuple[Path, Any] | None = None
        self._last: Path | None = None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write a state as it is now; of what is not sharded, the first process writes its own. On every
        process :class:`CheckpointError` where the checkpoint before this one could not be written."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.finished()
        checkpoints, path = self.checkpoints, self.checkpoints.folder / f"step-{step:08d}.parts"
        begun, tensors = path.with_suffix(".parts.tmp"), dict[str, Any]()
        tree, sharded = json.dumps(checkpoint.encoded(state, tensors)), layouts(state)
        plain = {place: t for place, t in tensors.items() if place not in sharded}
        plain = {place: t.to("cpu", copy=True) for place, t in plain.items()} if self.first else {}

        class Writer(FileSystemWriter):
            def finish(self, metadata: Any, results: Any) -> None:
                """On the first process, when all have written theirs; what fails here fails in all."""
                super().finish(metadata, results)
                sizes = {file.name: file.stat().st_size for file in begun.iterdir()}
                checkpoint.save(begun / REST, {"tree": tree, "tensors": plain, "sizes": sizes})
                # One of the same step was damaged, and passed over when the run was resumed.
                shutil.rmtree(path, ignore_errors=True)
                os.replace(begun, path)
                sync_folder(path.parent)
                checkpoints.remove_oldest(step)

        if self.first:
            checkpoints.remove_begun()
        # The parts are copied before it returns.
        self._under_way = path, async_save(sharded, storage_writer=Writer(begun), process_group=self.group)

    def finished(self) -> Path | None:
        """Wait for the checkpoint under way; the path of the last one that was written. Raises as :meth:`write`."""
        if self._under_way is not None:
            (path, saved), self._under_way = self._under_way, None
            if error := saved.exception():
                if self.first:
                    shutil.rmtree(path.with_suffix(".parts.tmp"), ignore_errors=True)
                why = str(error).strip().rpartition("\n")[2] or type(error).__name__
                raise CheckpointError(f"{path} could not be written: {why}") from error
            self._last = path
        return self._last

    def close(self) -> None:
        """Let the checkpoint under way come to its end, whatever ended the fit."""
        if self._under_way is None or wait([self._under_way[1]], LEAVES_WITHIN).done:
            dist.destroy_process_group(self.group)


def check(path: Path) -> dict[str, Any]:
    """Refuse a checkpoint that is cut, or a file that is not as it was written; the state in it, where it is one file.
    Within the parts, flipped bits are not seen."""
    if not path.is_dir():
        return checkpoint.load(path)
    for name, size in checkpoint.load(path / REST)["sizes"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise DamagedError(f"{path} is damaged: its {name} is missing, or was cut")
    return {}


def load(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """The state in a checkpoint that :func:`check` has found whole. A sharded tensor is read as the DTensor ``like`` it
    is laid out, by its place or that of the dict it is in, and the shape; or whole, on the host."""
    if not path.is_dir():
        return checkpoint.load(path)
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    rest, tensors = checkpoint.load(path / REST), dict[str, Any]()
    about: Any = FileSystemReader(path).read_metadata().state_dict_metadata
    for name, said in about.items():
        layout, dtype = like.get(name, like.get(name.rpartition("/")[0])), said.properties.dtype
        known = layout is not None and layout.shape == said.size
        tensors[name] = torch.empty_like(layout, dtype=dtype) if known else torch.empty(said.size, dtype=dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that each process reads for itself is meant
        load_parts(tensors, checkpoint_id=path, no_dist=True)
    state: dict[str, Any] = checkpoint.decoded(rest["tree"], rest["tensors"] | tensors)
    return state


def layouts(state: dict[str, Any]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    checkpoint.encoded(state, tensors)
    return {place: t for place, t in tensors.items() if hasattr(t, "device_mesh")}
