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

import functools
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, reason_of
from metapl.runs.atomic import replacing
from metapl.runs.memory import out_of_memory
from metapl.runs.sealed import open_plain

_LOG = logging.getLogger(__name__)

FORMAT = 2
_LINE = re.compile(rb"(metapl-checkpoint (\d{4}) )([0-9a-f]{64})\n")
_LINE_BYTES = 17 + 1 + 4 + 1 + 64 + 1

_USE_AN_OLDER_ONE = "go back to an older checkpoint; CheckpointFolder(folder).newest() finds the newest whole one"


class CheckpointError(MetaplError):
    """A checkpoint could not be written or read; the text names the file, what is wrong and how to mend it."""


class ClosedCheckpointError(CheckpointError):
    """A checkpoint that may be whole, and that this process cannot read: of another format, or without the right to. To
    go on from an older one would write over what it holds."""


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> str:
    """Write a tree of dicts, lists and tuples whose leaves are tensors, numbers, strings, bytes and None; its SHA-256.

    Cost: one tensor at a time is copied to the host; for a moment room on disk for the old file and the new one.

    Raises: :class:`CheckpointError` for a state that :func:`load` could not bring back, and where the disk refuses;
    what had the name before is then as it was.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "first.ckpt"
    >>> _ = save(path, {"step": 3, "weights": torch.ones(2)})
    >>> load(path)
    {'step': 3, 'weights': tensor([1., 1.])}
    """
    return write(Path(path), Packed(state))


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`save` wrote, its tensors on the host, after checking that every byte is as it was written."""
    with opened(Path(path)) as content:
        state = unpacked(content.packed, functools.cache(content.tensor))
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__} instead of a dict; {_USE_AN_OLDER_ONE}")
    return state


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
        if keep < 1:
            raise MetaplError(f"keep={keep} would keep no checkpoint; give 1 or more")
        self.folder, self.keep = Path(folder), keep

    def write(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint, then delete the oldest earlier ones beyond ``keep``; raises as :func:`save`.

        Checkpoints of later steps, left from before a restart, stay until ``step`` passes them.
        """
        if step < 0:
            raise MetaplError(f"step={step} is negative; a checkpoint is named by the number of steps done")
        path = self.folder / f"step-{step:08d}.ckpt"
        with _to_disk(path):
            self.make()
        save(path, state)
        self.remove_oldest(step)
        return path

    def make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.iterdir():  # only names that are made here: it may hold a user's files
            if re.fullmatch(r"step-\d{8,}(\.ckpt|(-\d+)?\.parts)\.[0-9a-f]{8}\.tmp", left.name):
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
            except ClosedCheckpointError:
                raise
            except CheckpointError as error:
                skipped.append((path, str(error)))
        if not skipped:
            return None
        raise CheckpointError(
            f"{self.folder} holds {len(skipped)} checkpoint(s) and none can be used; to start anew, move them away: "
            + "; ".join(reason for _, reason in skipped)
        )

    def paths(self) -> list[Path]:
        return [path for _, path in self._numbered()]

    def _numbered(self) -> list[tuple[int, Path]]:
        try:
            files = [*self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be listed: {error.strerror}; may you read it?") from error
        matches = ((re.fullmatch(r"step-(\d{8,})(?:\.ckpt|(?:-(\d+))?\.parts)", path.name), path) for path in files)
        found = [((int(match[1]), int(match[2] or 0)), path) for match, path in matches if match]
        return [(step, path) for (step, _), path in sorted(found, reverse=True)]

    def remove_oldest(self, step: int) -> None:
        """Delete the oldest checkpoints before ``step`` beyond ``keep``, of which that one counts."""
        earlier = [path for number, path in self._numbered() if number < step]
        for path in earlier[self.keep - 1 :]:
            try:
                if path.is_dir():  # a folder loses its name first, so that no half of it is taken for the whole
                    left = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
                    os.replace(path, left)
                    shutil.rmtree(left)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                # The new checkpoint is whole, so this must not end a training; it must not stay unseen either.
                _LOG.warning("the old checkpoint %s could not be deleted: %s", path, error.strerror)


# ------------------------------------------------------------------------------------------------------- trees as JSON

_PLAIN = (int, float, bool, str, type(None))
ELSEWHERE = "tensor in the parts"  # the only key of what stands for a tensor that is kept elsewhere


class Packed:
    """A state as JSON, in which objects are named by their types, and its tensors, each once: weights may be tied.

    Args:
        state: of :func:`save`.
        instead: takes the name of a tensor, such as "trainer/student/0.weight", and it; gives the JSON of one that is
            kept elsewhere. What it gives None for is packed as a copy, so that the state may go on moving.
    """

    def __init__(self, state: Any, instead: Callable[[str, Tensor], Any] | None = None) -> None:
        self.tensors: list[Tensor] = []
        self._instead, self._known = instead, dict[Any, int]()
        if type(state) not in (dict, OrderedDict):
            raise CheckpointError(f"a checkpoint is a dict, and a {type(state).__name__} was given")
        try:
            self.json = self._packed(state)
        except RecursionError as error:
            raise CheckpointError("the state contains itself; a checkpoint is a tree") from error

    def _packed(self, value: Any, *place: Any) -> Any:
        kind = type(value)  # exact types throughout: numpy.float64 is a float too, and a named tuple a tuple
        if kind in _PLAIN:
            return value
        if kind is bytes:
            return {"bytes": value.hex()}
        if kind in (list, tuple, torch.Size):
            entries = [self._packed(entry, *place, i) for i, entry in enumerate(value)]
            return entries if kind is list else {"tuple": entries}
        if kind in (dict, OrderedDict):
            pairs = [[self._key(key, place), self._packed(entry, *place, key)] for key, entry in value.items()]
            # A module writes there of which version its state is.
            about = getattr(value, "_metadata", None)
            return {"dict": pairs} | ({} if about is None else {"_metadata": self._packed(about, *place)})
        name = "/".join(map(str, place))
        found = self._instead(name, value) if self._instead is not None and isinstance(value, Tensor) else None
        if found is not None:
            return found
        if kind in (Tensor, nn.Parameter) and value.is_meta:
            raise CheckpointError(f"{name} is a tensor on the meta device, which has no values to save")
        if kind in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_quantized:
            return {"tensor": self._number(value.detach())}
        if kind is Tensor and value.layout == torch.sparse_coo:
            held = value.detach()
            numbers = [{"tensor": self._number(part)} for part in (held._indices(), held._values())]
            return {"sparse": [*numbers, [*value.shape], value.is_coalesced()]}
        raise CheckpointError(
            f"{name} is a {_type_name(kind)}; a checkpoint holds plain tensors and plain Python values: give "
            "full_tensor() of a DTensor, torch.as_tensor(...) of an array, .item() of a number, tuple(...) of a named "
            "tuple"
        )

    def _key(self, key: Any, place: tuple[Any, ...]) -> Any:
        if any(type(part) not in (*_PLAIN, bytes) for part in (key if type(key) is tuple else (key,))):
            name = "/".join(map(str, place)) or "the state"
            raise CheckpointError(f"{name} has the key {key!r}, a {_type_name(type(key))}; give strings or numbers")
        return self._packed(key)

    def _number(self, t: Tensor) -> int:
        of_memory = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_conj(), t.is_neg())
        known = self._known.setdefault(of_memory if t.numel() else id(t), len(self.tensors))
        if known == len(self.tensors):
            self.tensors.append(t if self._instead is None else t.to("cpu", copy=True))
        return known


def unpacked(value: Any, tensor: Callable[[int], Any], elsewhere: Callable[[Any], Any] | None = None) -> Any:
    """What was packed; ``tensor`` gives a tensor by its number, ``elsewhere`` one by what is said of it."""
    if isinstance(value, list):
        return [unpacked(entry, tensor, elsewhere) for entry in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensor(content)
    if kind == "sparse":
        indices, values, shape, is_coalesced = unpacked(content, tensor)
        return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=is_coalesced, check_invariants=True)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "tuple":
        return tuple(unpacked(content, tensor, elsewhere))
    if kind != "dict":
        raise ValueError(f"a value of the kind {kind!r}")
    found = {unpacked(key, tensor): unpacked(entry, tensor, elsewhere) for key, entry in content}
    if elsewhere is not None and found.keys() == {ELSEWHERE}:
        return elsewhere(found[ELSEWHERE])
    if "_metadata" in value:
        found = OrderedDict(found)
        found._metadata = unpacked(value["_metadata"], tensor)  # type: ignore[attr-defined]
    return found


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


# --------------------------------------------------------------------------------------------------------------- files


@contextmanager
def _to_disk(path: Path, size: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        room = f" (it needs {size / 1e6:,.1f} MB)" if size else ""
        raise CheckpointError(
            f"{path} could not be written: {error.strerror or error}{room}. Nothing was left behind, and the "
            "checkpoints before it are as they were. Free some room, raise the limit on the size of files (ulimit -f), "
            "or choose another folder"
        ) from error


def write(path: Path, packed: Packed) -> str:
    """Write a file; its SHA-256. Raises as :func:`save`."""
    places = [[str(t.dtype).removeprefix("torch."), [*t.shape]] for t in packed.tensors]
    line = json.dumps({"tensors": places, "tree": packed.json}).encode() + b"\n"
    begin = b"metapl-checkpoint %04d " % FORMAT
    digest = hashlib.sha256(begin)
    size = _LINE_BYTES + len(line) + sum(t.numel() * t.element_size() for t in packed.tensors)
    with _to_disk(path, size), replacing(path) as file:
        file.write(b"\0" * _LINE_BYTES)
        for data in chain([line], map(_bytes_of, packed.tensors)):
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(b"%s%s\n" % (begin, digest.hexdigest().encode()))
    return digest.hexdigest()


def _bytes_of(t: Tensor) -> Any:
    flat = t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if t.numel() else bytearray()  # of no numbers there is no view


class Content:
    """An open checkpoint: its SHA-256, its tree, and the type, the shape and the place in the file of each tensor."""

    def __init__(self, file: io.BufferedReader, sha256: str) -> None:
        self.sha256, self._file = sha256, file
        content = json.loads(file.readline())
        self.packed, begin = content["tree"], file.tell()
        self.places: list[tuple[torch.dtype, list[int], int]] = []
        for name, shape in content["tensors"]:
            dtype = getattr(torch, name)
            if not isinstance(dtype, torch.dtype) or any(type(length) is not int or length < 0 for length in shape):
                raise ValueError(f"a tensor of the type {name} and the shape {shape}")
            self.places.append((dtype, shape, begin))
            begin += math.prod(shape) * dtype.itemsize
        if begin != os.fstat(file.fileno()).st_size:
            raise ValueError("its tensors have another size")

    def tensor(self, number: int) -> Tensor:
        dtype, shape, begin = self.places[number]
        t = torch.empty(shape, dtype=dtype)
        self._file.seek(begin)
        self._file.readinto(_bytes_of(t))
        return t


@contextmanager
def opened(path: Path, *, checked: bool = False) -> Iterator[Content]:
    """Open a checkpoint, or say what is wrong with it; ``checked``: its checksum was compared before."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_plain(path))
            sha256 = _read_line(path, file, checked)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"{path} does not exist; give the path that the checkpoint was written to") from error
        except PermissionError as error:
            raise ClosedCheckpointError(f"{path} may not be read by this user; mend it by: chmod u+r") from error
        except OSError as error:
            raise CheckpointError(f"{path} could not be read: {error.strerror}; {_USE_AN_OLDER_ONE}") from error
        try:
            yield Content(file, sha256)
        except Exception as error:  # what was sealed may be anything, and shows in many types
            if isinstance(error, MetaplError) or out_of_memory(error):
                raise
            what = f"holds what no metapl wrote ({type(error).__name__}: {reason_of(error)})"
            raise CheckpointError(f"{path} is whole, but {what}; {_USE_AN_OLDER_ONE}") from error


def _read_line(path: Path, file: io.BufferedReader, checked: bool) -> str:
    """The SHA-256 that the first line has, which is that of the file."""
    line = file.read(_LINE_BYTES)
    version, match = re.match(rb"metapl-checkpoint (\d+)\s", line), _LINE.fullmatch(line)
    if version is None:
        wrong = f"is not a checkpoint of metapl, or no more: it begins with {line[:20]!r}" if line else "is empty"
        raise CheckpointError(f"{path} {wrong}; {_USE_AN_OLDER_ONE}")
    whole = match is not None and (checked or _digest(file, match[1]) == match[3].decode())
    # The number of the format is in the checksum: one that was flipped is no other format.
    if int(version[1]) != FORMAT and (whole or match is None):
        old = int(version[1]) == 1
        what = "metapl 0.1.0 reads: end the run with that, or move it away" if old else "a later metapl reads"
        raise ClosedCheckpointError(f"{path} was written by format {int(version[1])}, which {what}")
    if match is None or not whole:
        raise CheckpointError(
            f"{path} is damaged or was cut: it has another checksum than when it was written; {_USE_AN_OLDER_ONE}"
        )
    file.seek(_LINE_BYTES)
    return match[3].decode()


def _digest(file: io.BufferedReader, begin: bytes) -> str:
    return hashlib.file_digest(file, lambda: hashlib.sha256(begin)).hexdigest()
