"""Checkpoints that survive full disks, kills and flipped bits, or say plainly that they did not.

A file is one line of ASCII, one line of JSON, and then the bytes of the tensors, one after another:

    metapl-checkpoint <format> <sha256 of everything else>
    {"tensors": [[dtype, shape], ...], "tree": ...}

so there is nothing in it that could run. One process writes such a file, and several write a folder of them
(:mod:`metapl.runs.checkpoint_parts`). It is not what ``torch.distributed.checkpoint`` writes: that keeps its metadata
in a pickle, and of one process makes a folder too, which no rename can replace whole. Later formats keep the line's
first two words, so that an older metapl can name what it cannot read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metapl.errors import MetaplError, reason_of
from metapl.runs.atomic import replacing
from metapl.runs.fingerprints import type_name
from metapl.runs.memory import out_of_memory
from metapl.runs.sealed import open_plain

_LOG = logging.getLogger(__name__)

FORMAT = 2
_LINE = re.compile(rb"(metapl-checkpoint \d{4} )([0-9a-f]{64})\n")
_LINE_BYTES = 17 + 1 + 4 + 1 + 64 + 1

_USE_AN_OLDER_ONE = "go back to an older checkpoint; CheckpointFolder(folder).newest() finds the newest whole one"


class CheckpointError(MetaplError):
    """A checkpoint could not be written or read; the text names the file, what is wrong and how to mend it."""


class ClosedCheckpointError(CheckpointError):
    """A checkpoint that may be whole, and that this process cannot read: of another format, or without the right to.

    To go on from an older one would write over what it holds.
    """


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> str:
    """Write ``state`` to ``path`` so that the file is whole, or is as it was before.

    Args:
        path: the file to write; its folder exists. A checkpoint of that name is replaced when the new one is on disk.
        state: a tree of dicts, lists and tuples whose leaves are tensors, numbers, strings, bytes and None.

    Returns: the SHA-256 that the file's first line has.

    Cost: one tensor at a time is copied to the host; for a moment room on disk for the old file and the new one.

    Raises:
        CheckpointError: the state holds something that :func:`load` could not bring back, or the disk refused. Then
            nothing is left behind, and the text says how much room was needed.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "first.ckpt"
    >>> _ = save(path, {"step": 3, "weights": torch.ones(2)})
    >>> load(path)
    {'step': 3, 'weights': tensor([1., 1.])}
    """
    tensors = _Tensors()
    if type(state) not in (dict, OrderedDict):
        raise CheckpointError(f"a checkpoint is a dict, and a {type(state).__name__} was given")
    try:
        tree = _encoded(state, "state", tensors)
    except RecursionError as error:
        raise CheckpointError("the state contains itself; a checkpoint is a tree") from error
    places = [[str(t.dtype).removeprefix("torch."), [*t.shape]] for t in tensors.kept]
    line = json.dumps({"tensors": places, "tree": tree}).encode() + b"\n"
    begin = b"metapl-checkpoint %04d " % FORMAT
    digest = hashlib.sha256(begin)
    try:
        with replacing(Path(path)) as file:
            file.write(b"\0" * _LINE_BYTES)
            for data in chain([line], map(_bytes_of, tensors.kept)):
                digest.update(data)
                file.write(data)
            file.seek(0)
            file.write(b"%s%s\n" % (begin, digest.hexdigest().encode()))
    except OSError as error:
        size = _LINE_BYTES + len(line) + sum(t.numel() * t.element_size() for t in tensors.kept)
        raise CheckpointError(could_not_write(Path(path), error, size)) from error
    return digest.hexdigest()


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`save` wrote, its tensors on the host, after checking that every byte is as it was written.

    Cost: the file is read twice, once for its checksum.

    Raises:
        CheckpointError: the file is missing, empty, truncated, damaged, not a checkpoint of metapl, of another format
            or unreadable; the text says which, and how to mend it.
    """
    with opened(Path(path)) as content:
        state = content.tree({number: content.tensor(number) for number in range(len(content.places))})
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__} instead of a dict; {_USE_AN_OLDER_ONE}")
    return state


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was passed over, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint; ``skipped`` names the newer ones that were not, newest first."""

    path: Path
    state: dict[str, Any]
    skipped: tuple[Skipped, ...] = ()


class CheckpointFolder:
    """A folder that keeps the last few checkpoints, ``step-00001234.ckpt`` and so on; one process writes to it.

    Args:
        folder: made at the first write.
        keep: how many checkpoints stay, at least 1. The disk needs room for one more.

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
        if keep < 1:
            raise MetaplError(f"keep={keep} would keep no checkpoint; give 1 or more")
        self.folder, self.keep = Path(folder), keep

    def write(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint, then delete the oldest earlier ones beyond ``keep``.

        Args:
            step: 0 or more, the number in the name.
            state: as in :func:`save`.

        Returns: the new file. Checkpoints of later steps, left from before a restart, stay until ``step`` passes them.

        Raises:
            CheckpointError: as :func:`save`.
        """
        if step < 0:
            raise MetaplError(f"step={step} is negative; a checkpoint is named by the number of steps done")
        path = self.folder / f"step-{step:08d}.ckpt"
        try:
            self.make()
        except OSError as error:
            raise CheckpointError(could_not_write(path, error)) from error
        save(path, state)
        self.remove_oldest(step)
        return path

    def make(self) -> None:
        """Make the folder, and remove what killed processes had begun to write to it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.iterdir():  # only names that are made here: it may hold a user's files
            if re.fullmatch(r"step-\d{8,}(\.ckpt|(-\d+)?\.parts)\.[0-9a-f]{8}\.tmp", left.name):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def newest(self, read: Callable[[Path], dict[str, Any]] = load) -> Found | None:
        """The checkpoint of the latest step that is whole.

        Args:
            read: gives the state of one, or raises.

        Returns: it, with what was passed over; None where the folder holds no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, and none can be used. To return None would start training anew
                and in time replace them.
            ClosedCheckpointError: one that is newer than the newest whole one may be whole too.
        """
        skipped: list[Skipped] = []
        for path in self.paths():
            try:
                return Found(path, read(path), tuple(skipped))
            except ClosedCheckpointError:
                raise
            except CheckpointError as error:
                skipped.append(Skipped(path, str(error)))
        if not skipped:
            return None
        reasons = "; ".join(unusable.reason for unusable in skipped)
        raise CheckpointError(
            f"{self.folder} holds {len(skipped)} checkpoint(s) and none can be used; to start anew, move them away: "
            + reasons
        )

    def paths(self) -> list[Path]:
        """The checkpoints by name, newest first, whole or not."""
        return [path for _, path in self._numbered()]

    def _numbered(self) -> list[tuple[int, Path]]:
        try:
            files = [*self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be listed: {error.strerror}; give a folder that you may read"
            ) from error
        matches = ((re.fullmatch(r"step-(\d{8,})(?:\.ckpt|(?:-(\d+))?\.parts)", path.name), path) for path in files)
        found = [((int(match[1]), int(match[2] or 0)), path) for match, path in matches if match]
        return [(step, path) for (step, _), path in sorted(found, reverse=True)]

    def remove_oldest(self, step: int) -> None:
        """Delete the oldest checkpoints before ``step`` beyond ``keep``, of which that one counts."""
        earlier = [path for number, path in self._numbered() if number < step]
        for path in earlier[self.keep - 1 :]:
            try:
                _remove(path)
            except OSError as error:
                # The new checkpoint is whole, so this must not end a training; it must not stay unseen either.
                _LOG.warning("the old checkpoint %s could not be deleted: %s", path, error.strerror)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a folder loses its name first, so that no half of it is taken for the whole."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    left = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    os.replace(path, left)
    shutil.rmtree(left)


# ------------------------------------------------------------------------------------------------------------- writing


class _Tensors:
    """The tensors of a tree, in their order; one that is there twice, as tied weights are, counts once."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self._known: dict[Any, int] = {}

    def number_of(self, t: Tensor) -> int:
        of_memory = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_conj(), t.is_neg())
        known = self._known.setdefault(of_memory if t.numel() else id(t), len(self.kept))
        if known == len(self.kept):
            self.kept.append(t)
        return known


def _bytes_of(t: Tensor) -> Any:
    """The numbers of a tensor, in the order of its entries; of one on the host in its own memory."""
    flat = t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if t.numel() else bytearray()  # of no numbers there is no view


_PLAIN = (int, float, bool, str, type(None))


def _encoded(value: Any, where: str, tensors: _Tensors) -> Any:
    """A tree as JSON has it: what is neither a list nor a plain value is an object whose first entry is named by its
    type."""
    kind = type(value)  # exact types throughout: numpy.float64 is a float too, and a named tuple a tuple
    if kind in _PLAIN:
        return value
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind in (list, tuple, torch.Size):
        entries = [_encoded(entry, f"{where}[{i}]", tensors) for i, entry in enumerate(value)]
        return entries if kind is list else {"tuple": entries}
    if kind in (dict, OrderedDict):
        pairs = [[_key(key, where), _encoded(entry, f"{where}[{key!r}]", tensors)] for key, entry in value.items()]
        # A module writes there of which version its state is.
        about = getattr(value, "_metadata", None)
        return {"dict": pairs} | ({} if about is None else {"_metadata": _encoded(about, where, tensors)})
    if kind in (Tensor, torch.nn.Parameter) and value.is_meta:
        raise CheckpointError(f"{where} is a tensor on the meta device, which has no values to save")
    if kind in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and not value.is_quantized:
        return {"tensor": tensors.number_of(value)}
    if kind is Tensor and value.layout == torch.sparse_coo:
        held = value.detach()
        parts = [_encoded(part, where, tensors) for part in (held._indices(), held._values())]
        return {"sparse": [*parts, [*value.shape], value.is_coalesced()]}
    raise CheckpointError(
        f"{where} is a {type_name(kind).removeprefix('builtins.')}; a checkpoint holds trees of plain tensors and "
        "plain Python values: give full_tensor() of a DTensor, torch.as_tensor(...) of an array, .item() of a number, "
        "tuple(...) of a named tuple"
    )


def _key(key: Any, where: str) -> Any:
    if any(type(part) not in (*_PLAIN, bytes) for part in (key if type(key) is tuple else (key,))):
        raise CheckpointError(f"{where} has the key {key!r}, a {type_name(type(key))}; give strings or numbers")
    return _encoded(key, where, _Tensors())


def could_not_write(path: Path, error: OSError, size: int = 0) -> str:
    """Why a checkpoint could not be written, and how much room it needs."""
    room = f" (it needs {size / 1e6:,.1f} MB)" if size else ""
    return (
        f"{path} could not be written: {error.strerror or error}{room}. Nothing was left behind, and the checkpoints "
        "before it are as they were. Free some room, raise the limit on the size of files (ulimit -f), or choose "
        "another folder"
    )


# ------------------------------------------------------------------------------------------------------------- reading


class Content:
    """What is in an open checkpoint, as it was written.

    Attributes:
        sha256: that its first line has.
        places: of each tensor its type, its shape and where it begins.
    """

    def __init__(self, file: io.BufferedReader, sha256: str) -> None:
        self.sha256, self._file = sha256, file
        content = json.loads(file.readline())
        self._tree, begin = content["tree"], file.tell()
        self.places: list[tuple[torch.dtype, list[int], int]] = []
        for name, shape in content["tensors"]:
            dtype = getattr(torch, name)
            if not isinstance(dtype, torch.dtype) or any(type(length) is not int or length < 0 for length in shape):
                raise ValueError(f"a tensor of the type {name} and the shape {shape}")
            self.places.append((dtype, shape, begin))
            begin += math.prod(shape) * dtype.itemsize
        if begin != os.fstat(file.fileno()).st_size:
            raise ValueError("its tensors have another size")

    def tree(self, tensors: Mapping[int, Any]) -> Any:
        """The tree with these in the place of its tensors."""
        return _decoded(self._tree, tensors)

    def tensor(self, number: int) -> Tensor:
        """A tensor, on the host."""
        dtype, shape, begin = self.places[number]
        t = torch.empty(shape, dtype=dtype)
        self._file.seek(begin)
        self._file.readinto(_bytes_of(t))
        return t


def _decoded(value: Any, tensors: Mapping[int, Any]) -> Any:
    if isinstance(value, list):
        return [_decoded(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "sparse":
        *parts, shape, is_coalesced = _decoded(content, tensors)
        indices, values = parts
        return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=is_coalesced, check_invariants=True)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "tuple":
        return tuple(_decoded(content, tensors))
    if kind != "dict":
        raise ValueError(f"a value of the kind {kind!r}")
    found = {_decoded(key, tensors): _decoded(entry, tensors) for key, entry in content}
    if "_metadata" in value:
        found = OrderedDict(found)
        found._metadata = _decoded(value["_metadata"], tensors)  # type: ignore[attr-defined]
    return found


@contextmanager
def opened(path: Path, *, checked: bool = False) -> Iterator[Content]:
    """Open a checkpoint, or say what is wrong with it.

    Args:
        path: the file.
        checked: whether its checksum was compared before.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_plain(path))
            sha256 = _read_line(path, file, checked)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"{path} does not exist; give the path that the checkpoint was written to") from error
        except PermissionError as error:
            raise ClosedCheckpointError(
                f"{path} may not be read by this user; change its permissions (chmod u+r)"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path} could not be read: {error.strerror}; {_USE_AN_OLDER_ONE}") from error
        try:
            yield Content(file, sha256)
        except MetaplError:
            raise
        except Exception as error:  # what was sealed may be anything, and shows in many types
            if out_of_memory(error):
                raise
            raise CheckpointError(
                f"{path} is whole, but holds what no metapl wrote ({type(error).__name__}: {reason_of(error)}); "
                + _USE_AN_OLDER_ONE
            ) from error


def _read_line(path: Path, file: io.BufferedReader, checked: bool) -> str:
    """The SHA-256 that the first line has, which is that of the file."""
    line = file.read(_LINE_BYTES)
    version, match = re.match(rb"metapl-checkpoint (\d+)\s", line), _LINE.fullmatch(line)
    if version is None:
        wrong = f"is not a checkpoint of metapl, or no more: it begins with {line[:20]!r}" if line else "is empty"
        raise CheckpointError(f"{path} {wrong}; {_USE_AN_OLDER_ONE}")
    number = int(version[1])
    if match is None and number != FORMAT:
        raise _closed(path, number)
    if match is not None and not checked:
        begin = match[1]
        found = hashlib.file_digest(file, lambda: hashlib.sha256(begin)).hexdigest()
        # The number of the format counts too: one that was flipped is no other format.
        match = match if found == match[2].decode() else None
    if match is None:
        raise CheckpointError(
            f"{path} is damaged or was cut: it has another checksum than when it was written; {_USE_AN_OLDER_ONE}"
        )
    if number != FORMAT:
        raise _closed(path, number)
    file.seek(_LINE_BYTES)
    return match[2].decode()


def _closed(path: Path, version: int) -> ClosedCheckpointError:
    what = "metapl 0.1.0 reads: end the run with that, or move it away" if version == 1 else "a later metapl reads"
    return ClosedCheckpointError(f"{path} was written by format {version}, which {what}")
