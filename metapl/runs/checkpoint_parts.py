"""Checkpoints of which every process writes its part, by ``torch.distributed.checkpoint``, while the training goes on.

A checkpoint is a new folder, ``step-00001234.parts``:

    __0_0.distcp, __1_0.distcp, ...   the parts
    .metadata                         where in them each tensor lies; written when all parts are on the disk
    rest.ckpt                         everything else, and the SHA-256 of the files above; written last

It has its name only when all of these are on the disk; until then the name ends with ``.tmp``. Tensors are read into
any layout, on any number of processes or in one.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import pickle
import re
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from metapl.errors import reason_of
from metapl.runs import checkpoint
from metapl.runs.atomic import sync_folder
from metapl.runs.checkpoint import CheckpointError

REST, METADATA, FORMAT = "rest.ckpt", ".metadata", 1

_HERE = "tensor in the parts"
"""The key of what stands for a tensor in the rest."""

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
        self.folder, self.keep = folder, keep
        self.first = dist.get_rank() == 0
        # Exchanges in another thread must not come between those of the training.
        self.group: Any = dist.new_group(backend="gloo")
        self._under_way: threading.Thread | None = None
        self._path: Path | None = None
        self._failed: BaseException | None = None

    def write(self, step: int, shared: dict[str, Any], rest: dict[str, Any]) -> None:
        """Begin to write a checkpoint; what is in it is as it is now.

        Args:
            step: the number in the name.
            shared: a tree whose tensors are DTensors, or the same in every process.
            rest: a tree of which the first process writes its own.

        Raises:
            CheckpointError: the checkpoint before this one could not be written; on every process.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.settle()
        path, place = (self.folder / name for name in self._names(step))
        tensors: dict[str, Tensor] = {}
        skeleton = _apart(shared, "", tensors)
        with _own_warnings():
            future: Any = async_save(tensors, storage_writer=FileSystemWriter(place), process_group=self.group)
        content = {"format": FORMAT, "shared": skeleton, **copy.deepcopy(rest)}  # the training goes on with it
        content["tensors"] = {name: [list(t.shape), t.dtype] for name, t in tensors.items()}
        job = threading.Thread(target=self._finish, args=(future, place, path, step, content), daemon=True)
        self._under_way = job
        job.start()

    def _names(self, step: int) -> list[str]:
        """The name of the checkpoint, and the one that it has until it is whole."""
        names: list[Any] = [None, None]
        fault = None
        if self.first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.iterdir():  # by processes that were killed
                    if re.fullmatch(r"step-\d{8,}(-\d+)?\.parts\.[0-9a-f]{8}\.tmp", left.name):
                        shutil.rmtree(left, ignore_errors=True)
                name = _free(self.folder, step)
                names = [name, f"{name}.{secrets.token_hex(4)}.tmp"]
            except Exception as error:  # as in _finished
                fault = _why(error)
        *names, fault = _from_first([*names, fault], self.group)
        if fault is not None:
            raise CheckpointError(f"a checkpoint could not be written in {self.folder}: {fault}.")
        return names

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

    def _finish(self, future: Any, place: Path, path: Path, step: int, content: dict[str, Any]) -> None:
        try:
            self._path = self._finished(future, place, path, step, content)
        except BaseException as error:  # for the training's own thread
            self._failed = error

    def _finished(self, future: Any, place: Path, path: Path, step: int, content: dict[str, Any]) -> Path:
        fault, sums = None, {}
        try:
            future.result()
            sums = {file.name: _sha256(file) for file in place.glob(f"__{dist.get_rank()}_*.distcp")}
        except BaseException as error:  # torch's own exception for this is none of Exception
            fault = _why(error)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (fault, sums), group=self.group)
        fault = next((fault for fault, _ in every if fault is not None), None)
        if self.first and fault is None:
            try:
                files = {name: digest for _, part in every for name, digest in part.items()}
                content["files"] = files | {METADATA: _sha256(place / METADATA)}
                checkpoint.save(place / REST, content)
                os.replace(place, path)
                sync_folder(self.folder)
                checkpoint.CheckpointFolder(self.folder, self.keep).remove_oldest(step)
            except Exception as error:  # whatever it is, the others wait to hear of it
                fault = _why(error)
        [fault] = _from_first([fault], self.group)
        if fault is not None:
            if self.first:
                shutil.rmtree(place, ignore_errors=True)
            raise CheckpointError(
                f"{path} could not be written: {fault}. Nothing was left behind, and the checkpoints before it are as "
                "they were. Is the disk full, or closed to a process? Mend that, then resume the run."
            )
        return path


def check_parts(path: Path) -> dict[str, Any]:
    """The rest of a checkpoint in parts, of which every byte is as it was written.

    Raises:
        CheckpointError: something is missing, or other than it was written.
    """
    rest = checkpoint.load(path / REST)
    if rest.get("format") != FORMAT or not {"files", "tensors", "shared"} <= rest.keys():
        raise CheckpointError(f"{path} is of another format; expected one that this version of metapl wrote.")
    for name, digest in rest["files"].items():
        file = path / Path(name).name
        if not file.is_file() or _sha256(file) != digest:
            raise CheckpointError(f"{path} is damaged: its {name} is not as it was written; go back to an older one.")
    return rest


def load_parts(path: Path, like: Like | None = None, group: Any = None, *, checked: bool = False) -> dict[str, Any]:
    """Read a checkpoint in parts.

    Args:
        path: its folder.
        like: the layouts that tensors are read into; None: whole tensors on the host.
        group: the processes that read together; None: this one alone.
        checked: whether another process has called :func:`check_parts`.

    Returns: the state. No code from the files is ever run.

    Cost: each process reads its parts; without ``checked`` it also reads everything for the checksums.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    rest = checkpoint.load(path / REST) if checked else check_parts(path)
    tensors = {}
    for name, (shape, dtype) in rest["tensors"].items():
        layout = None if like is None else like(name, torch.Size(shape))
        tensors[name] = torch.empty(shape, dtype=dtype) if layout is None else torch.empty_like(layout, dtype=dtype)
    alone = group is None
    if tensors:
        try:
            with _own_warnings():
                load(tensors, storage_reader=_reader(path, rest["files"]), process_group=group, no_dist=alone)
        except CheckpointException as error:  # none of Exception
            raise CheckpointError(f"{path} is whole, but could not be read: {_why(error)}.") from error
    own = ("format", "files", "tensors", "shared")
    found: dict[str, Any] = _together(rest["shared"], tensors)
    return found | {key: value for key, value in rest.items() if key not in own}


# --------------------------------------------------------------------------------------------------- trees and tensors


def named(tree: Any) -> dict[str, Tensor]:
    """The tensors of a tree by the names that they have in the parts."""
    tensors: dict[str, Tensor] = {}
    _apart(tree, "", tensors)
    return tensors


def _apart(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The tree without its tensors, which are collected by name."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach()
        return {_HERE: name}
    if isinstance(tree, Mapping):
        return {key: _apart(value, f"{name}/{key}" if name else str(key), tensors) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_apart(value, f"{name}/{i}", tensors) for i, value in enumerate(tree))
    return tree


def _together(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(skeleton, dict):
        if skeleton.keys() == {_HERE}:
            return tensors[skeleton[_HERE]]
        return {key: _together(value, tensors) for key, value in skeleton.items()}
    if type(skeleton) in (list, tuple):
        return type(skeleton)(_together(value, tensors) for value in skeleton)
    return skeleton


# --------------------------------------------------------------------------------------------------------------- files


def _free(folder: Path, step: int) -> str:
    """A name that no checkpoint has; one of the same step may be left from before a restart."""
    attempts = (f"step-{step:08d}{'' if n == 0 else f'-{n}'}.parts" for n in itertools.count())
    return next(name for name in attempts if not (folder / name).exists())


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _from_first(values: list[Any], group: Any) -> list[Any]:
    dist.broadcast_object_list(values, src=0, group=group)
    return values


def _why(error: BaseException) -> str:
    """What went wrong, in a line: torch's exception holds those of the processes with their tracebacks."""
    failures = getattr(error, "failures", None)
    return reason_of(next(iter(failures.values()))[0] if failures else error)


def _reader(path: Path, files: Mapping[str, str]) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        """Reads the metadata without running code from it."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (path / METADATA).open("rb") as file:
                metadata = _Plain(file).load()
            if any(entry.relative_path not in files for entry in metadata.storage_data.values()):
                raise CheckpointError(f"{path} names files that are not its own; go back to an older checkpoint.")
            metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(path)


_PLAIN = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "WindowsPath"),
}  # fmt: skip
"""What metadata are made of, by module."""


class _Plain(pickle.Unpickler):
    """Builds what metadata are made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"metadata name {module}.{name}, which no checkpoint of metapl has")


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Without torch's warnings of its own ways: one process alone, or names that will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
