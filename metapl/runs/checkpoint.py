"""Checkpoints that survive full disks, kills and flipped bits, or say plainly that they did not.

A file is in the format of safetensors: the tensors of a tree by their places in it, such as
"trainer/student/0.weight", and in the header's metadata the tree itself as JSON and a SHA-256 of
both. Nothing in it can run. It is written under another name, synced, and renamed, so what has its
name is whole or damaged by others.

Of networks that are sharded over all processes, a checkpoint is a folder, of which every process
writes its part while the training goes on: the sharded tensors as torch.distributed.checkpoint
writes them, and in ``rest.ckpt``, which is written last, everything else and the sizes of these
files. The folder has its name only when all of them are on the disk. Their metadata is a pickle,
which can run code: load only what one's own job wrote.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.runs.folder import replacing, sync_folder

_LOG = logging.getLogger(__name__)

FORMAT, REST = "3", "rest.ckpt"
LEAVES_WITHIN = 60.0  # seconds that a fit which ends waits for the parts under way


class CheckpointError(MetaplError):
    """A checkpoint that could not be written or read."""


class DamagedError(CheckpointError):
    """A checkpoint that is not as it was written; an older one may be."""


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a tree of dicts, lists and tuples whose leaves are tensors, numbers, strings and None.

    Cost: one copy of the tensors on the host; for a moment room for the old file and the new.
    Raises: :class:`CheckpointError`; what had the name before is then as it was.
    """
    tensors = dict[str, Tensor]()
    tree = json.dumps(encoded(state, tensors))
    # Copies, since a file of safetensors has no two tensors in one memory, nor one in a part of
    # another's.
    tensors = {
        name: torch.empty(t.shape, dtype=t.dtype, device="cpu").copy_(t)
        for name, t in tensors.items()
    }
    about = {"metapl": FORMAT, "tree": tree, "sha256": _digest(FORMAT, tree, tensors)}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as file:
            safetensors.torch.save_file(tensors, file.name, about)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} could not be written: {error}; what was there is as it was"
        ) from error


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`save` wrote, its tensors on the host, after checking that every byte is as it was written.

    Raises: :class:`DamagedError` where the file is another than was written,
    :class:`CheckpointError` where it may be whole: of another format, or without the right to read
    it.
    """
    try:
        content = Path(path).read_bytes()
        version = "2, which metapl 0.2 reads"
        if not content.startswith(b"metapl-checkpoint "):
            size = int.from_bytes(content[:8], "little")
            about = json.loads(content[8 : 8 + size])["__metadata__"]
            version, tree, tensors = about["metapl"], about["tree"], safetensors.torch.load(content)
            if _digest(version, tree, tensors) != about["sha256"]:
                raise ValueError("it has another checksum than when it was written")
            if version == FORMAT:
                state: dict[str, Any] = decoded(tree, tensors)
                return state
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RecursionError,
        safetensors.SafetensorError,
    ) as error:
        raise DamagedError(
            f"{path} is damaged or was cut, or is no checkpoint ({error})"
        ) from error
    raise CheckpointError(f"{path} is of format {version}; expected {FORMAT}")


def _digest(version: str, tree: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"metapl {version}\n{tree}".encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"\n{name} {t.dtype} {list(t.shape)}\n".encode())
        numbers: Any = t.reshape(-1).view(torch.uint8).numpy()
        digest.update(numbers)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------ trees as JSON


def encoded(value: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """A tree as JSON, in which a dict says of which kind a value is.

    ``tensors`` takes the tensors by their places.
    """
    kind = type(value)  # exact types: numpy.float64 is a float too, and a named tuple a tuple
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, Tensor) and value.layout == torch.strided:
        while place in tensors:  # of a key 1 beside a key "1"
            place += "~"
        tensors[place] = value.detach()
        return {"tensor": place}
    if kind in (list, tuple, torch.Size):
        entries = [encoded(entry, tensors, f"{place}/{i}") for i, entry in enumerate(value)]
        return entries if kind is list else {"tuple": entries}
    if kind in (dict, OrderedDict):
        below = f"{place}/" if place else ""
        pairs = [
            [encoded(key, tensors), encoded(entry, tensors, f"{below}{key}")]
            for key, entry in value.items()
        ]
        # The versions of a module's parts, by which load_state_dict knows what an old state lacks.
        metadata = getattr(value, "_metadata", None)
        return (
            {"dict": pairs}
            if metadata is None
            else {"dict": pairs, "metadata": encoded(metadata, tensors)}
        )
    given = f"{place or 'the state'} is a {kind.__qualname__}"
    raise CheckpointError(
        f"{given}; expected tensors, numbers, strings and None in dicts, lists and tuples"
    )


def decoded(tree: str, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that :func:`encoded` encoded, of JSON."""

    def value(found: dict[str, Any]) -> Any:  # from the leaves up
        if "tensor" in found:
            return tensors[found["tensor"]]
        if "tuple" in found:
            return tuple(found["tuple"])
        if "metadata" not in found:
            return dict(found["dict"])
        module: Any = OrderedDict(found["dict"])
        module._metadata = found["metadata"]
        return module

    return json.loads(tree, object_hook=value)


# ------------------------------------------------------------------------------------------ folders


class Found(NamedTuple):
    """The newest whole checkpoint, and the state in it where it is one file."""

    path: Path
    state: dict[str, Any] | None


class CheckpointFolder:
    """The last few checkpoints, ``step-00001234.ckpt`` and so on.

    The disk needs room for one more than are kept.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        self.folder, self.keep = Path(folder), keep
        self.last: Path | None = None  # that was written, or gone on from

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, then delete the oldest earlier ones beyond ``keep``.

        Raises as :func:`save`.
        """
        path = self.folder / f"step-{step:08d}.ckpt"
        _remove(self.folder.glob("step-[0-9]*.tmp"))  # what killed processes had begun to write
        save(path, state)
        self.remove_oldest(step)
        self.last = path

    def finish(self) -> None:
        """Wait for what is under way, of :class:`PartsFolder`."""

    def newest(self) -> Found | None:
        """The checkpoint of the latest step that is whole; None where there is none at all. Where
        none can be used, or one that cannot be read may be whole, :class:`CheckpointError`. Within
        parts, flipped bits are not seen."""
        reasons = []
        for path in self.paths():
            try:
                if not path.is_dir():
                    return Found(path, load(path))
                for name, size in load(path / REST)["sizes"].items():
                    if not (path / name).is_file() or (path / name).stat().st_size != size:
                        raise DamagedError(f"{path} is damaged: its {name} is missing, or was cut")
                return Found(path, None)
            except DamagedError as error:
                _LOG.warning("passed over %s: %s", path.name, error)
                reasons.append(str(error))
        if not reasons:
            return None
        text = (
            f"none of the {len(reasons)} checkpoints in {self.folder} can be used; to start anew, "
            "move them away"
        )
        raise CheckpointError(f"{text}: {'; '.join(reasons)}")

    def paths(self) -> list[Path]:
        """Of all checkpoints, newest first."""
        found = [path for path in self.folder.glob("step-*") if path.suffix in (".ckpt", ".parts")]
        return sorted(
            (path for path in found if path.stem[5:].isdecimal()), key=_step, reverse=True
        )

    def remove_oldest(self, step: int) -> None:
        """Delete the oldest checkpoints before ``step`` beyond ``keep``, of which that one counts."""
        _remove([path for path in self.paths() if _step(path) < step][self.keep - 1 :])


def _step(path: Path) -> int:
    return int(path.stem[5:])


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            # The new checkpoint is whole, so this must not end a training; it must not stay unseen
            # either.
            _LOG.warning("%s could not be deleted: %s", path, error.strerror)


class PartsFolder(CheckpointFolder):
    """Checkpoints in parts, written beside the training, one at a time.

    Every process of the job has this folder.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        super().__init__(folder, keep)
        # Exchanges in another thread must not come between those of the training.
        self.group: Any = dist.new_group(backend="gloo")
        self._under_way: tuple[Path, Any] | None = None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write a state as it is now; of what is not sharded, the first process writes its
        own. On every process :class:`CheckpointError` where the checkpoint before this one could
        not be written."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.finish()
        path, first, tensors = (
            self.folder / f"step-{step:08d}.parts",
            dist.get_rank() == 0,
            dict[str, Any](),
        )
        begun, remove_oldest = path.with_suffix(".parts.tmp"), self.remove_oldest
        tree = json.dumps(encoded(state, tensors))
        sharded = {place: t for place, t in tensors.items() if hasattr(t, "device_mesh")}
        plain = {
            place: t.to("cpu", copy=True)
            for place, t in tensors.items()
            if first and place not in sharded
        }

        class Writer(FileSystemWriter):
            def finish(self, metadata: Any, results: Any) -> None:
                """On the first process, when all have written theirs.

                What fails here fails in all.
                """
                super().finish(metadata, results)
                sizes = {file.name: file.stat().st_size for file in begun.iterdir()}
                save(begun / REST, {"tree": tree, "tensors": plain, "sizes": sizes})
                # One of the same step was damaged, and passed over when the run was resumed.
                shutil.rmtree(path, ignore_errors=True)
                os.replace(begun, path)
                sync_folder(path.parent)
                remove_oldest(step)

        if first:
            _remove(self.folder.glob("step-[0-9]*.tmp"))
        # The parts are copied before it returns.
        self._under_way = (
            path,
            async_save(sharded, storage_writer=Writer(begun), process_group=self.group),
        )

    def finish(self) -> None:
        """Wait for the checkpoint under way; raises as :meth:`write`."""
        if self._under_way is None:
            return
        (path, saved), self._under_way = self._under_way, None
        if error := saved.exception():
            if dist.get_rank() == 0:
                shutil.rmtree(path.with_suffix(".parts.tmp"), ignore_errors=True)
            why = str(error).strip().rpartition("\n")[2] or type(error).__name__
            raise CheckpointError(f"{path} could not be written: {why}") from error
        self.last = path

    def close(self) -> None:
        """Let the checkpoint under way come to its end, whatever ended the fit."""
        if self._under_way is None or wait([self._under_way[1]], LEAVES_WITHIN).done:
            dist.destroy_process_group(self.group)


def load_parts(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """The state in a folder that :meth:`CheckpointFolder.newest` has found whole. A sharded tensor
    is read as the DTensor ``like`` it is laid out, by its place or that of the dict it is in, and
    the shape; or whole, on the host."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

    rest, tensors = load(path / REST), dict[str, Any]()
    about: Any = FileSystemReader(path).read_metadata().state_dict_metadata
    for name, said in about.items():
        layout, dtype = like.get(name, like.get(name.rpartition("/")[0])), said.properties.dtype
        known = layout is not None and layout.shape == said.size
        tensors[name] = (
            torch.empty_like(layout, dtype=dtype) if known else torch.empty(said.size, dtype=dtype)
        )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that each process reads for itself is meant
        load_tensors(tensors, checkpoint_id=path, no_dist=True)
    state: dict[str, Any] = decoded(rest["tree"], rest["tensors"] | tensors)
    return state


# --------------------------------------------------------------------------------------- generators


def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's default random number generators, as a checkpoint takes it."""
    return {
        "python": random.getstate(),
        "numpy": plain_states(numpy.random.get_state(legacy=False)),  # noqa: NPY002 - the global one is meant
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`rng_state` returned.

    A warning says where the number of CUDA devices has changed.
    """
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])  # noqa: NPY002 - the global one is meant
    torch.set_rng_state(state["torch"])
    saved, present = state["cuda"], torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(saved) != present:
        text = (
            "the generators of %d CUDA devices were saved and %d are present: what runs on CUDA "
            "draws other numbers"
        )
        _LOG.warning(text, len(saved), present)
    for device, generator in enumerate(saved[:present]):
        torch.cuda.set_rng_state(generator, device)


def plain_states(value: Any) -> Any:
    """The same with lists and numbers in the place of NumPy's arrays, which a checkpoint does not take."""
    return pytree.tree_map_only((numpy.ndarray, numpy.generic), lambda array: array.tolist(), value)
