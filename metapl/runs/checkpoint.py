"""Checkpoints that survive full disks, kills and flipped bits, or say plainly that they did not.

A file is in the format of safetensors: the tensors of a tree by their places in it, such as
"trainer/student/0.weight", and in the header's metadata the tree itself as JSON and a SHA-256 of both. Nothing in it
can run. It is written under another name, synced, and renamed, so what has its name is whole or damaged by others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.runs.atomic import replacing

_LOG = logging.getLogger(__name__)

FORMAT = "3"


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
    # Copies, since a file of safetensors has no two tensors in one memory, nor one in a part of another's.
    tensors = {name: torch.empty(t.shape, dtype=t.dtype, device="cpu").copy_(t) for name, t in tensors.items()}
    about = {"metapl": FORMAT, "tree": tree, "sha256": _digest(FORMAT, tree, tensors)}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as file:
            safetensors.torch.save_file(tensors, file.name, about)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written: {error}; what was there is as it was") from error


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`save` wrote, its tensors on the host, after checking that every byte is as it was written.

    Raises: :class:`DamagedError` where the file is another than was written, :class:`CheckpointError` where it may be
    whole: of another format, or without the right to read it.
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
    except (OSError, ValueError, LookupError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise DamagedError(f"{path} is damaged or was cut, or is no checkpoint ({error})") from error
    raise CheckpointError(f"{path} is of format {version}; expected {FORMAT}")


def _digest(version: str, tree: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"metapl {version}\n{tree}".encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"\n{name} {t.dtype} {list(t.shape)}\n".encode())
        numbers: Any = t.reshape(-1).view(torch.uint8).numpy()
        digest.update(numbers)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- trees as JSON


def encoded(value: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """A tree as JSON, in which a dict says of which kind a value is; ``tensors`` takes the tensors by their places."""
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
        pairs = [[encoded(key, tensors), encoded(entry, tensors, f"{below}{key}")] for key, entry in value.items()]
        # The versions of a module's parts, by which load_state_dict knows what an old state lacks.
        metadata = getattr(value, "_metadata", None)
        return {"dict": pairs} if metadata is None else {"dict": pairs, "metadata": encoded(metadata, tensors)}
    given = f"{place or 'the state'} is a {kind.__qualname__}"
    raise CheckpointError(f"{given}; expected tensors, numbers, strings and None in dicts, lists and tuples")


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


# ------------------------------------------------------------------------------------------------------------- folders


class Found(NamedTuple):
    """The newest whole checkpoint."""

    path: Path
    state: dict[str, Any]


class CheckpointFolder:
    """The last few checkpoints, ``step-00001234.ckpt`` and so on; the disk needs room for one more than are kept."""

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        self.folder, self.keep = Path(folder), keep

    def write(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint, then delete the oldest earlier ones beyond ``keep``; raises as :func:`save`."""
        path = self.folder / f"step-{step:08d}.ckpt"
        self.remove_begun()
        save(path, state)
        self.remove_oldest(step)
        return path

    def newest(self, read: Callable[[Path], dict[str, Any]] = load) -> Found | None:
        """The checkpoint of the latest step that is whole, as ``read`` gives it; None where there is none at all. Where
        none can be used, or one that cannot be read may be whole, :class:`CheckpointError`."""
        reasons = []
        for path in self.paths():
            try:
                return Found(path, read(path))
            except DamagedError as error:
                _LOG.warning("passed over %s: %s", path.name, error)
                reasons.append(str(error))
        if not reasons:
            return None
        text = f"none of the {len(reasons)} checkpoints in {self.folder} can be used; to start anew, move them away"
        raise CheckpointError(f"{text}: {'; '.join(reasons)}")

    def paths(self) -> list[Path]:
        """Of all checkpoints, newest first."""
        found = [path for path in self.folder.glob("step-*") if path.suffix in (".ckpt", ".parts")]
        return sorted((path for path in found if path.stem[5:].isdecimal()), key=_step, reverse=True)

    def remove_begun(self) -> None:
        """Remove what killed processes had begun to write."""
        _remove(self.folder.glob("step-[0-9]*.tmp"))

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
            # The new checkpoint is whole, so this must not end a training; it must not stay unseen either.
            _LOG.warning("%s could not be deleted: %s", path, error.strerror)
