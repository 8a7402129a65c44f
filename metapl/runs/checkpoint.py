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
from functools import partial
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

FORMAT = "3"

# The file with all that is not sharded, in the folder of a checkpoint in parts.
REST = "rest.ckpt"

# Seconds that a fit which ends waits for the parts under way.
LEAVES_WITHIN = 60.0


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
    metadata = {"metapl": FORMAT, "tree": tree, "sha256": _digest(FORMAT, tree, tensors)}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as file:
            safetensors.torch.save_file(tensors, file.name, metadata=metadata)
    except (OSError, safetensors.SafetensorError) as error:
        text = f"{path} could not be written: {error}; what was there is as it was"
        raise CheckpointError(text) from error


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Refuse a name that does not say the format in which :func:`save` writes.

    >>> check_suffix("run/trainer.safetensors")

    Raises: :class:`metapl.MetaplError`.
    """
    if Path(path).suffix != ".safetensors":
        stem = Path(path).name.partition(".")[0] or "trainer"
        raise MetaplError(
            f"{path} would be written in the format of safetensors; expected a name that says so, "
            f"such as {stem}.safetensors."
        )


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`save` wrote, its tensors on the host.

    Every byte is checked to be as it was written.

    Raises: :class:`DamagedError` where the file is another than was written,
    :class:`CheckpointError` where it may be whole: of another format, or without the right to read
    it.
    """
    try:
        content = Path(path).read_bytes()
        header_size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + header_size])["__metadata__"]
        version = metadata["metapl"]
        tree = metadata["tree"]
        tensors = safetensors.torch.load(content)
        if _digest(version, tree, tensors) != metadata["sha256"]:
            raise ValueError("it has another checksum than when it was written")
        if version == FORMAT:
            state: dict[str, Any] = decoded(tree, tensors)
            return state
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except FileNotFoundError as error:
        text = f"{path} is not there; expected the path of a file that save wrote"
        raise DamagedError(text) from error
    except IsADirectoryError as error:
        raise DamagedError(f"{path} is a folder; expected a file that save wrote") from error
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RecursionError,
        safetensors.SafetensorError,
    ) as error:
        text = f"{path} is damaged or was cut, or is no checkpoint ({error})"
        raise DamagedError(text) from error
    raise CheckpointError(f"{path} is of format {version}; expected {FORMAT}")


def _digest(version: str, tree: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a tree and its tensors, in hexadecimal."""
    digest = hashlib.sha256(f"metapl {version}\n{tree}".encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"\n{name} {t.dtype} {list(t.shape)}\n".encode())
        numbers: Any = t.reshape(-1).view(torch.uint8).numpy()
        digest.update(numbers)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------ trees as JSON


def encoded(value: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """Return a tree as JSON, in which a dict says of which kind a value is.

    ``tensors`` takes the tensors by their places. ``place`` is that of the value in the tree.
    """
    # Exact types, since numpy.float64 is a float too, and a named tuple is a tuple.
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, Tensor) and value.layout == torch.strided:
        # A key 1 beside a key "1" would have the same place.
        while place in tensors:
            place += "~"
        tensors[place] = value.detach()
        return {"tensor": place}
    if kind in (list, tuple, torch.Size):
        entries = []
        for number, entry in enumerate(value):
            entries.append(encoded(entry, tensors, place=f"{place}/{number}"))
        return entries if kind is list else {"tuple": entries}
    if kind in (dict, OrderedDict):
        prefix = f"{place}/" if place else ""
        pairs = []
        for key, entry in value.items():
            pairs.append([encoded(key, tensors), encoded(entry, tensors, place=f"{prefix}{key}")])
        # The versions of a module's parts, by which load_state_dict knows what an old state lacks.
        metadata = getattr(value, "_metadata", None)
        if metadata is None:
            return {"dict": pairs}
        return {"dict": pairs, "metadata": encoded(metadata, tensors)}
    raise CheckpointError(
        f"{place or 'the state'} is a {kind.__qualname__}; expected tensors, numbers, strings and "
        "None in dicts, lists and tuples"
    )


def decoded(tree: str, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree that :func:`encoded` has encoded."""

    def value_of(description: dict[str, Any]) -> Any:
        """Return what a dict of the JSON describes; json calls this from the leaves up."""
        if "tensor" in description:
            return tensors[description["tensor"]]
        if "tuple" in description:
            return tuple(description["tuple"])
        if "metadata" not in description:
            return dict(description["dict"])
        module_state: Any = OrderedDict(description["dict"])
        module_state._metadata = description["metadata"]
        return module_state

    return json.loads(tree, object_hook=value_of)


# ------------------------------------------------------------------------------------------ folders


class WholeCheckpoint(NamedTuple):
    """The newest whole checkpoint, and the state in it where it is one file."""

    path: Path
    state: dict[str, Any] | None


class CheckpointFolder:
    """The last few checkpoints, ``step-00001234.ckpt`` and so on.

    The disk needs room for one more than are kept.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        self.folder = Path(folder)
        self.keep = keep
        # The last checkpoint that was written, or that the fit went on from.
        self.last: Path | None = None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, then delete the oldest earlier ones beyond ``keep``.

        Raises as :func:`save`.
        """
        path = self.folder / f"step-{step:08d}.ckpt"
        self.remove_unfinished()
        save(path, state)
        self.remove_oldest(step)
        self.last = path

    def finish(self) -> None:
        """Wait for a checkpoint that is being written beside the training.

        Only a :class:`PartsFolder` writes so.
        """

    def newest(self) -> WholeCheckpoint | None:
        """Return the checkpoint of the latest step that is whole, or None where there is none.

        Within parts, flipped bits are not seen. Raises: :class:`CheckpointError` where there are
        checkpoints and none can be used, or where one that cannot be read may be whole.
        """
        reasons = []
        for path in self.paths():
            try:
                if not path.is_dir():
                    return WholeCheckpoint(path, load(path))
                for name, size in load(path / REST)["sizes"].items():
                    if not (path / name).is_file() or (path / name).stat().st_size != size:
                        raise DamagedError(f"{path} is damaged: its {name} is missing, or was cut")
                return WholeCheckpoint(path, None)
            except DamagedError as error:
                _LOG.warning("passed over %s: %s", path.name, error)
                reasons.append(str(error))
        if not reasons:
            return None
        raise CheckpointError(
            f"none of the {len(reasons)} checkpoints in {self.folder} can be used; to start anew, "
            f"move them away: {'; '.join(reasons)}"
        )

    def paths(self) -> list[Path]:
        """Return the paths of all checkpoints, newest first."""
        checkpoints = []
        for path in self.folder.glob("step-*"):
            if path.suffix in (".ckpt", ".parts") and _step_text(path).isdecimal():
                checkpoints.append(path)
        return sorted(checkpoints, key=_step, reverse=True)

    def remove_oldest(self, step: int) -> None:
        """Delete the oldest checkpoints, so that that of ``step`` and the last before it stay.

        These are ``keep`` together.
        """
        earlier = [path for path in self.paths() if _step(path) < step]
        _remove(earlier[self.keep - 1 :])

    def remove_unfinished(self) -> None:
        """Delete what processes that were killed had begun to write."""
        _remove(self.folder.glob("step-[0-9]*.tmp"))


def _step_text(path: Path) -> str:
    """Return what follows "step-" in the name of a checkpoint."""
    return path.stem.removeprefix("step-")


def _step(path: Path) -> int:
    return int(_step_text(path))


def _remove(paths: Iterable[Path]) -> None:
    """Delete files and folders; one that cannot be deleted is said in the log."""
    for path in paths:
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
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
        """Begin to write a state as it is now; every process writes its part.

        Of what is not sharded, the first process writes its own. Raises on every process
        :class:`CheckpointError` where the checkpoint before this one could not be written.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.finish()
        path = self.folder / f"step-{step:08d}.parts"
        unfinished = _unfinished(path)
        is_first_process = dist.get_rank() == 0
        tensors = dict[str, Any]()
        tree = json.dumps(encoded(state, tensors))
        sharded_tensors = {place: t for place, t in tensors.items() if hasattr(t, "device_mesh")}
        plain_tensors = {}
        if is_first_process:
            for place, t in tensors.items():
                if place not in sharded_tensors:
                    plain_tensors[place] = t.to("cpu", copy=True)
        rest = {"tree": tree, "tensors": plain_tensors}
        complete = partial(self._complete, path, step=step, rest=rest)

        class Writer(FileSystemWriter):
            def finish(self, metadata: Any, results: Any) -> None:
                """Complete the checkpoint, on the first process, when all have written their parts.

                What fails here fails in all processes.
                """
                super().finish(metadata, results)
                complete()

        if is_first_process:
            self.remove_unfinished()
        # The parts are copied before async_save returns.
        saving = async_save(
            sharded_tensors, storage_writer=Writer(unfinished), process_group=self.group
        )
        self._under_way = (path, saving)

    def _complete(self, path: Path, step: int, rest: dict[str, Any]) -> None:
        """Write the rest beside the parts, give the folder its name, and delete the oldest."""
        unfinished = _unfinished(path)
        sizes = {file.name: file.stat().st_size for file in unfinished.iterdir()}
        save(unfinished / REST, {**rest, "sizes": sizes})
        # One of the same step was damaged, and passed over when the run was resumed.
        shutil.rmtree(path, ignore_errors=True)
        os.replace(unfinished, path)
        sync_folder(path.parent)
        self.remove_oldest(step)

    def finish(self) -> None:
        """Wait for the checkpoint under way; raises as :meth:`write`."""
        if self._under_way is None:
            return
        path, saving = self._under_way
        self._under_way = None
        error = saving.exception()
        if error is not None:
            if dist.get_rank() == 0:
                shutil.rmtree(_unfinished(path), ignore_errors=True)
            last_line = str(error).strip().rpartition("\n")[2]
            reason = last_line or type(error).__name__
            raise CheckpointError(f"{path} could not be written: {reason}") from error
        self.last = path

    def close(self) -> None:
        """Let the checkpoint under way come to its end, whatever ended the fit."""
        if self._under_way is not None:
            _, saving = self._under_way
            if not wait([saving], LEAVES_WITHIN).done:
                return
        dist.destroy_process_group(self.group)


def _unfinished(path: Path) -> Path:
    """Return the name that the folder of a checkpoint has until it is complete."""
    return path.with_suffix(".parts.tmp")


def load_parts(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state in a folder that :meth:`CheckpointFolder.newest` has found whole.

    Args:
        path: the folder.
        like: DTensors by their places, or by the places of the dicts they are in. A sharded tensor
            is laid out as the one of the same shape here; without one it is read as one tensor, on
            the host.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

    rest = load(path / REST)
    stored: Any = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = dict[str, Any]()
    for place, description in stored.items():
        place_of_dict, _, _ = place.rpartition("/")
        layout = like.get(place, like.get(place_of_dict))
        dtype = description.properties.dtype
        if layout is not None and layout.shape == description.size:
            tensors[place] = torch.empty_like(layout, dtype=dtype)
        else:
            tensors[place] = torch.empty(description.size, dtype=dtype)
    with torch.no_grad(), warnings.catch_warnings():
        # It warns that each process reads for itself, which is meant.
        warnings.simplefilter("ignore")
        load_tensors(tensors, checkpoint_id=path, no_dist=True)
    state: dict[str, Any] = decoded(rest["tree"], rest["tensors"] | tensors)
    return state


# --------------------------------------------------------------------------------------- generators


def rng_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's default random number generators.

    It is a tree that a checkpoint takes.
    """
    return {
        "python": random.getstate(),
        # The global generator of NumPy is meant.
        "numpy": plain_states(numpy.random.get_state(legacy=False)),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`rng_state` returned.

    A warning says where the number of CUDA devices has changed.
    """
    random.setstate(state["python"])
    # The global generator of NumPy is meant.
    numpy.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    cuda_states = state["cuda"]
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(cuda_states) != devices:
        _LOG.warning(
            "the generators of %d CUDA devices were saved and %d are present: what runs on CUDA "
            "draws other numbers",
            len(cuda_states),
            devices,
        )
    for device, cuda_state in enumerate(cuda_states[:devices]):
        torch.cuda.set_rng_state(cuda_state, device)


def plain_states(value: Any) -> Any:
    """Return a tree with lists and numbers in the place of NumPy's arrays.

    A checkpoint does not take arrays.
    """
    return pytree.tree_map_only((numpy.ndarray, numpy.generic), lambda array: array.tolist(), value)
