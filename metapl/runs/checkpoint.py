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
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
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
_NAME = re.compile(r"step-(\d{8,})(?:\.ckpt|(?:-(\d+))?\.parts)")


class CheckpointError(MetaplError):
    """A checkpoint that could not be written or read."""


class DamagedError(CheckpointError):
    """A checkpoint that is not as it was written; an older one may be."""


def save(path: str | os.PathLike[str], state: Mapping[str, Any], parts: dict[str, Any] | None = None) -> str:
    """Write a tree of dicts, lists and tuples whose leaves are tensors, numbers, strings and None; its SHA-256. Sharded
    tensors go into ``parts`` by their places.

    Cost: one copy of the tensors on the host, where they are elsewhere; for a moment room for the old file and the new.

    Raises: :class:`CheckpointError` for other leaves, and where the disk refuses; what had the name before is then as
    it was.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "first.ckpt"
    >>> _ = save(path, {"step": 3, "weights": torch.ones(2)})
    >>> load(path)
    {'step': 3, 'weights': tensor([1., 1.])}
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(encoded(state, tensors, parts))
    sha256 = _digest(FORMAT, tree, tensors)
    about = {"metapl": FORMAT, "tree": tree, "sha256": sha256}
    try:
        with replacing(Path(path)) as file:
            safetensors.torch.save_file(tensors, file.name, about)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} could not be written: {error}. Nothing was left behind, and earlier checkpoints are as they were; "
            "free some room, or choose another folder"
        ) from error
    return sha256


def load(path: str | os.PathLike[str], part: Callable[[str], Tensor] | None = None) -> dict[str, Any]:
    """Read what :func:`save` wrote, its tensors on the host, after checking that every byte is as it was written;
    ``part`` gives a tensor that is kept elsewhere, by its name.

    Raises: :class:`DamagedError` where the file is another than was written, :class:`CheckpointError` where it may be
    whole: of another format, or without the right to read it.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read by this user") from error
    except OSError as error:
        raise DamagedError(f"{path} could not be read: {error.strerror}") from error
    if content.startswith(b"metapl-checkpoint "):
        raise CheckpointError(f"{path} was written by metapl 0.2, which reads it: end the run with that")
    try:
        size = int.from_bytes(content[:8], "little")
        about = json.loads(content[8 : 8 + size])["__metadata__"]
        tensors = safetensors.torch.load(content)
        whole = _digest(about["metapl"], about["tree"], tensors) == about["sha256"]
        tree = json.loads(about["tree"])
    except (ValueError, LookupError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise DamagedError(f"{path} is damaged or was cut, or is no checkpoint ({error})") from error
    if not whole:
        raise DamagedError(f"{path} is damaged: it has another checksum than when it was written")
    if about["metapl"] != FORMAT:
        raise CheckpointError(f"{path} is of format {about['metapl']}, which a later metapl reads")
    state: dict[str, Any] = decoded(tree, tensors.__getitem__, part or tensors.__getitem__)
    return state


def _digest(version: str, tree: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"metapl {version}\n{tree}".encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"\n{name} {t.dtype} {list(t.shape)}\n".encode())
        if t.numel():  # of no numbers there is no view
            numbers: Any = t.reshape(-1).view(torch.uint8).numpy()
            digest.update(numbers)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- trees as JSON


def encoded(
    value: Any, tensors: dict[str, Tensor], parts: dict[str, Any] | None = None, place: str = "", tied: Any = None
) -> Any:
    """A tree as JSON, in which a dict with one key that begins with $ says what stands there.

    Args:
        value: of :func:`save`, at a ``place`` in it.
        tensors: takes the tensors, contiguous on the host, by their places; those in one memory are ``tied``.
        parts: takes the sharded ones; None: there must be none.
    """
    tied = {} if tied is None else tied
    kind = type(value)  # exact types: numpy.float64 is a float too, and a named tuple a tuple
    if value is None or kind in (bool, int, float, str):
        return value
    is_part = hasattr(value, "device_mesh")
    if is_part and parts is not None:
        parts[place] = value
        return {"$part": place}
    if isinstance(value, Tensor) and value.layout == torch.strided and not is_part:
        t = value.detach().resolve_conj().resolve_neg()
        memory = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) if t.numel() else place
        if memory not in tied:
            while place in tensors:  # of a key 1 beside a key "1"
                place += "~"
            tied[memory] = place
            on_host = t.cpu().contiguous()
            # A file has no tensor in a part of another's memory, nor two in one.
            at = on_host.untyped_storage().data_ptr()
            own = on_host.untyped_storage().nbytes() == on_host.nbytes and at not in tied
            tensors[place], tied[at] = on_host if own else on_host.clone(), place
        return {"$tensor": tied[memory]}
    if kind in (list, tuple, torch.Size):
        entries = [encoded(entry, tensors, parts, f"{place}/{i}", tied) for i, entry in enumerate(value)]
        return entries if kind is list else {"$tuple": entries}
    if kind in (dict, OrderedDict):
        below = f"{place}/" if place else ""
        found = {key: encoded(entry, tensors, parts, f"{below}{key}", tied) for key, entry in value.items()}
        about = getattr(value, "_metadata", None)  # a module writes there of which version its state is
        if about is None and all(type(key) is str and key[:1] != "$" for key in found):
            return found
        pairs = [[encoded(key, tensors), entry] for key, entry in found.items()]
        return {"$dict": pairs, "about": encoded(about, tensors)}
    raise CheckpointError(
        f"{place or 'the state'} is a {kind.__qualname__}; expected tensors, numbers, strings and None in dicts, lists "
        "and tuples"
    )


def decoded(value: Any, tensor: Callable[[str], Tensor], part: Callable[[str], Tensor]) -> Any:
    """What :func:`encoded` encoded, with its tensors by their names."""
    if isinstance(value, list):
        return [decoded(entry, tensor, part) for entry in value]
    if not isinstance(value, dict):
        return value
    kind: str = next(iter(value), "")
    content: Any = value.get(kind)
    if kind in ("$tensor", "$part"):
        return (tensor if kind == "$tensor" else part)(content)
    if kind == "$tuple":
        return tuple(decoded(content, tensor, part))
    if kind != "$dict":
        return {key: decoded(entry, tensor, part) for key, entry in value.items()}
    found: Any = {decoded(key, tensor, part): decoded(entry, tensor, part) for key, entry in content}
    if value["about"] is not None:
        found = OrderedDict(found)
        found._metadata = decoded(value["about"], tensor, part)
    return found


# ------------------------------------------------------------------------------------------------------------- folders


class Found(NamedTuple):
    """The newest whole checkpoint; ``skipped`` has the newer ones that were not, newest first, and why."""

    path: Path
    state: dict[str, Any]
    skipped: tuple[tuple[Path, str], ...] = ()


class CheckpointFolder:
    """A folder that keeps the last few checkpoints, ``step-00001234.ckpt`` and so on; one process writes to it. The
    disk needs room for one more than are kept.

    >>> import tempfile
    >>> checkpoints = CheckpointFolder(tempfile.mkdtemp(), keep=2)
    >>> for step in (10, 20, 30):
    ...     _ = checkpoints.write(step, {"step": step})
    >>> [path.name for path in checkpoints.paths()]
    ['step-00000030.ckpt', 'step-00000020.ckpt']
    >>> checkpoints.newest().state
    {'step': 30}
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        self.folder, self.keep = Path(folder), keep

    def write(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint, then delete the oldest earlier ones beyond ``keep``; raises as :func:`save`.

        Checkpoints of later steps, left from before a restart, stay until ``step`` passes them.
        """
        path = self.folder / f"step-{step:08d}.ckpt"
        self.make()
        save(path, state)
        self.remove_oldest(step)
        return path

    def make(self) -> None:
        """Make the folder, and remove what killed processes had begun in it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder} could not be made: {error.strerror}") from error
        for left in self.folder.glob("step-*.tmp"):
            if not re.fullmatch(r"step-\d{8,}[^ ]*\.[0-9a-f]{8}\.tmp", left.name):
                continue  # a user's
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def newest(self, read: Callable[[Path], dict[str, Any]] = load) -> Found | None:
        """The checkpoint of the latest step that is whole, as ``read`` gives it; None where there is none at all.

        Raises: :class:`CheckpointError` where none can be used, or one that cannot be read may be whole: to go on from
        an older one, or anew, would in time replace them.
        """
        skipped: list[tuple[Path, str]] = []
        for path in self.paths():
            try:
                return Found(path, read(path), tuple(skipped))
            except DamagedError as error:
                skipped.append((path, str(error)))
        if not skipped:
            return None
        raise CheckpointError(
            f"none of the {len(skipped)} checkpoints in {self.folder} can be used; to start anew, move them away: "
            + "; ".join(reason for _, reason in skipped)
        )

    def paths(self) -> list[Path]:
        """Of all checkpoints, newest first."""
        return [path for _, path in self._numbered()]

    def _numbered(self) -> list[tuple[int, Path]]:
        files = [*self.folder.iterdir()] if self.folder.exists() else []
        matches = ((_NAME.fullmatch(path.name), path) for path in files)
        found = [((int(match[1]), int(match[2] or 0)), path) for match, path in matches if match]
        return [(step, path) for (step, _), path in sorted(found, reverse=True)]

    def remove_oldest(self, step: int) -> None:
        """Delete the oldest checkpoints before ``step`` beyond ``keep``, of which that one counts."""
        earlier = [path for number, path in self._numbered() if number < step]
        for path in earlier[self.keep - 1 :]:
            try:
                # It loses its name first, so that no half of a folder is taken for the whole.
                left = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
                os.replace(path, left)
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            except OSError as error:
                # The new checkpoint is whole, so this must not end a training; it must not stay unseen either.
                _LOG.warning("the old checkpoint %s could not be deleted: %s", path, error.strerror)
