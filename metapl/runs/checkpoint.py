"""Checkpoints that survive full disks, kills and flipped bits, or say plainly that they did not.

A file is one line of ASCII, then the payload, which is what ``torch.save`` writes:

    metapl-checkpoint <format> <bytes in the payload> <sha256 of the payload> <crc32 of the line up to here>

Later formats keep the line's first two words, so that an older metapl can name what it cannot read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import pickle
import re
import secrets
import shutil
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, reason_of
from metapl.runs.atomic import replacing
from metapl.runs.memory import out_of_memory
from metapl.runs.sealed import open_plain

_LOG = logging.getLogger(__name__)

FORMAT = 1
MAGIC = b"metapl-checkpoint"

_HEADER = re.compile(rb"(.{17}) (\d{4}) (\d{20}) ([0-9a-f]{64}) ([0-9a-f]{8})\n", re.DOTALL)
_HEADER_BYTES = 17 + 1 + 4 + 1 + 20 + 1 + 64 + 1 + 8 + 1
_LATER_HEADER = re.compile(re.escape(MAGIC) + rb" (\d+)\s")

_USE_AN_OLDER_ONE = "go back to an older checkpoint; CheckpointFolder(folder).newest() finds the newest whole one"
_RIGHTS = "Give yourself the right to write in that folder, or choose another"
_HOW_TO_MEND = {
    errno.ENOSPC: "Free some room or choose a folder on another disk",
    errno.EDQUOT: "Your quota is used up: free some room or choose a folder on another disk",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "The file system is read-only: choose another folder",
    errno.ENOENT: "Create the folder first",
    errno.ENOTDIR: "Create the folder first",
    errno.EISDIR: "A folder has that name: choose another",
}


class CheckpointError(MetaplError):
    """A checkpoint could not be written or read; the text names the file, what is wrong and how to mend it."""


class ClosedCheckpointError(CheckpointError):
    """A checkpoint that may be whole, and that this process cannot read: of a later format, or without the right to.

    To go on from an older one would write over what it holds.
    """


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` so that the file is whole, or is as it was before.

    Args:
        path: the file to write; its folder exists. A checkpoint of that name is replaced when the new one is on disk.
        state: a tree of dicts, lists and tuples whose leaves are tensors, numbers, strings, bytes and None.

    Cost: no copy of the state in memory; for a moment room on disk for the old file and the new one.

    Raises:
        CheckpointError: the state holds something that :func:`load` could not bring back, or the disk refused. Then
            nothing is left behind, and the text says how much room was needed and whether the earlier file is whole.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "first.ckpt"
    >>> save(path, {"step": 3, "weights": torch.ones(2)})
    >>> load(path)
    {'step': 3, 'weights': tensor([1., 1.])}
    """
    path = Path(path)
    _save(path, state, last_whole=lambda: path if _is_whole(path) else None)


def load(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read what :func:`save` wrote, after checking that every byte is as it was written.

    Args:
        path: the file.
        map_location: the device for the tensors, as in ``torch.load``.

    Returns: the state. No code from the file is ever run (``torch.load(weights_only=True)``).

    Cost: the file is read twice, once for its checksum.

    Raises:
        CheckpointError: the file is missing, empty, truncated, damaged, not a checkpoint of metapl, of a later format
            or unreadable; the text says which, and how to mend it.
    """
    path = Path(path)
    with _open_whole(path) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a file that metapl did not write; what is wrong with it is raised
                state = torch.load(file, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds objects other than tensors and plain values, and metapl runs no code from a file; "
                f"write it with metapl.runs.checkpoint.save. torch says: {reason_of(error)}"
            ) from error
        except Exception as error:  # damage that was sealed shows in many types
            if out_of_memory(error):
                raise
            raise CheckpointError(
                f"{path} is whole, but torch {torch.__version__} could not rebuild it on {map_location}: "
                f"{reason_of(error)}; try map_location='cpu'"
            ) from error
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
            CheckpointError: as :func:`save`; the text names the last whole checkpoint of the folder.
        """
        if step < 0:
            raise MetaplError(f"step={step} is negative; a checkpoint is named by the number of steps done")
        path = self.folder / f"step-{step:08d}.ckpt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What killed processes left; only names that `replacing` makes, the folder may hold a user's files.
            for left in self.folder.iterdir():
                if re.fullmatch(r"step-\d{8,}\.ckpt\.[0-9a-f]{8}\.tmp", left.name):
                    left.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(_could_not_write(path, error, None, self._last_whole())) from error
        _save(path, state, last_whole=self._last_whole)
        self.remove_oldest(step)
        return path

    def newest(
        self, map_location: str | torch.device = "cpu", read_folder: Callable[[Path], dict[str, Any]] | None = None
    ) -> Found | None:
        """Load the checkpoint of the latest step that is whole.

        Args:
            map_location: as in :func:`load`.
            read_folder: reads checkpoints that are folders (:mod:`metapl.runs.checkpoint_parts`).

        Returns: it, with what was passed over; None where the folder holds no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, and none can be used. To return None would start training anew
                and in time replace them.
            ClosedCheckpointError: one that is newer than the newest whole one may be whole too.
        """
        skipped: list[Skipped] = []
        for path in self.paths():
            try:
                in_parts = read_folder is not None and path.is_dir()
                state = read_folder(path) if read_folder and in_parts else load(path, map_location)
                return Found(path, state, tuple(skipped))
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

    def _last_whole(self) -> Path | None:
        try:
            return next((path for path in self.paths() if _is_whole(path)), None)
        except CheckpointError:  # the folder cannot be listed; what failed before this is the better message
            return None

    def remove_oldest(self, step: int) -> None:
        """Delete the oldest checkpoints before ``step`` beyond ``keep``, of which that one counts."""
        earlier = [path for number, path in self._numbered() if number < step]
        for path in earlier[self.keep - 1 :]:
            try:
                remove(path)
            except OSError as error:
                # The new checkpoint is whole, so this must not end a training; it must not stay unseen either.
                _LOG.warning("the old checkpoint %s could not be deleted: %s", path, error.strerror)


def remove(path: Path) -> None:
    """Remove a checkpoint; a folder loses its name first, so that no half of it is taken for the whole."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    left = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    os.replace(path, left)
    shutil.rmtree(left)


# ------------------------------------------------------------------------------------------------------------- writing


def _save(path: Path, state: dict[str, Any], last_whole: Callable[[], Path | None]) -> None:
    _check_tree(state)
    sealed: _Sealed | None = None
    try:
        with replacing(path) as file:
            sealed = _Sealed(file)
            try:
                # Of all that a file can do, torch calls write and flush alone.
                torch.save(state, cast(IO[bytes], sealed))
            except RuntimeError as error:
                # A Ctrl-C that falls into torch's C++ writer comes out as an error about the archive.
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise error.__context__ from None
                raise
            sealed.finish()
    except OSError as error:
        size = sealed.size + _HEADER_BYTES if sealed else None
        raise CheckpointError(_could_not_write(path, error, size, last_whole())) from error


class _Sealed:
    """The file that ``torch.save`` writes to: it counts and hashes the payload, and holds back the disk's errors.

    An OSError inside torch's C++ writer would come out as a RuntimeError about a zip archive. Held back, it comes out
    as itself; and as the rest is still counted, the message can say how much room is needed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self._file, self._sha256 = file, hashlib.sha256()
        self._failure: OSError | None = None
        self._try_to_write(b"\0" * _HEADER_BYTES)

    def write(self, data: bytes | memoryview) -> int:
        written = memoryview(data).nbytes
        self.size += written
        if self._failure is None:
            self._sha256.update(data)
            self._try_to_write(data)
        return written

    def flush(self) -> None:
        """torch calls it; ``replacing`` flushes for good."""

    def finish(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._file.seek(0)
        self._file.write(_header(self.size, self._sha256.hexdigest()))

    def _try_to_write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self._failure = error


def _header(size: int, sha256: str, version: int = FORMAT) -> bytes:
    line = b"%s %04d %020d %s " % (MAGIC, version, size, sha256.encode())
    return line + b"%08x\n" % zlib.crc32(line)


_CONTAINERS = (dict, OrderedDict, list, tuple, torch.Size)
_VALUES = (int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Tensor)
_KEYS = (str, int, float, bool, bytes, type(None))


def _check_tree(state: Any) -> None:
    """Refuse what ``load`` could not bring back, before anything is written."""
    if type(state) not in (dict, OrderedDict):
        raise CheckpointError(f"a checkpoint is a dict, and a {type(state).__name__} was given")
    try:
        # Exact types throughout: numpy.float64 is a float too, and a named tuple a tuple.
        leaves, _ = pytree.tree_flatten_with_path(
            state, is_leaf=lambda value: type(value) not in _CONTAINERS or not value
        )
    except RecursionError as error:
        raise CheckpointError("the state contains itself; a checkpoint is a tree") from error
    for path, leaf in leaves:
        where = f"state{pytree.keystr(path)}"
        for key in (entry.key for entry in path if isinstance(entry, pytree.MappingKey)):
            if any(type(part) not in _KEYS for part in (key if type(key) is tuple else (key,))):
                raise CheckpointError(f"{where} has the key {key!r}, a {_type_name(key)}; give strings or numbers")
        if type(leaf) not in (*_CONTAINERS, *_VALUES, torch.nn.Parameter):
            raise CheckpointError(
                f"{where} is a {_type_name(leaf)}; a checkpoint holds trees of tensors and plain Python values: "
                f"{_plain_instead(leaf)}"
            )
        if isinstance(leaf, torch.Tensor) and leaf.is_meta:
            raise CheckpointError(f"{where} is a tensor on the meta device, which has no values to save")


def _plain_instead(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "turn it into a plain tensor first (full_tensor() of a DTensor)"
    if isinstance(value, tuple):
        return "give tuple(...) or _asdict() of a named tuple"
    if type(value).__module__ == "numpy":
        return "give torch.as_tensor(...) of an array, .item() of a number"
    return "give its values"


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _could_not_write(path: Path, error: OSError, size: int | None, last_whole: Path | None) -> str:
    facts = [] if size is None else [f"it needs {_bytes(size)}"]
    with contextlib.suppress(OSError):  # the folder is missing or closed to us, which the error itself says
        facts.append(f"{_bytes(shutil.disk_usage(path.parent).free)} are free on that disk")
    room = f" ({', '.join(facts)})" if facts else ""
    kept = f"the last checkpoint, {last_whole}, is whole" if last_whole else "no earlier checkpoint was found"
    mend = _HOW_TO_MEND.get(error.errno or 0, "See to the disk, then write again")
    return f"{path} could not be written: {error.strerror or error}{room}. Nothing was left behind and {kept}. {mend}"


def _bytes(number: int) -> str:
    """
    >>> _bytes(999), _bytes(1_234_567)
    ('999 bytes', '1.2 MB')
    """
    if number < 1000:
        return f"{number} bytes"
    power = min((len(str(number)) - 1) // 3, 4)
    return f"{number / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


# ------------------------------------------------------------------------------------------------------------- reading


def _is_whole(path: Path) -> bool:
    try:
        _open_whole(path).close()
    except CheckpointError:
        return False
    return True


def _open_whole(path: Path) -> BinaryIO:
    """Open a checkpoint at its payload, or say what is wrong with it."""
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(open_plain(path))
            size, sha256 = _read_header(path, file)
            digest = hashlib.file_digest(file, "sha256")
            file.seek(_HEADER_BYTES)
        except IsADirectoryError as error:
            raise CheckpointError(
                f"{path} is a folder; give a file, or use CheckpointFolder(folder).newest()"
            ) from error
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"{path} does not exist; give the path that the checkpoint was written to") from error
        except PermissionError as error:
            raise ClosedCheckpointError(
                f"{path} may not be read by this user; change its permissions (chmod u+r)"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path} could not be read: {error.strerror}; {_USE_AN_OLDER_ONE}") from error
        if digest.hexdigest() != sha256:
            raise CheckpointError(
                f"{path} is damaged: its {size} bytes have another checksum than when they were written; "
                + _USE_AN_OLDER_ONE
            )
        opened.pop_all()  # it stays open
    return file


def _read_header(path: Path, file: BinaryIO) -> tuple[int, str]:
    """The payload's size and checksum; refused where line and length do not belong to a whole checkpoint."""
    payload = os.fstat(file.fileno()).st_size - _HEADER_BYTES
    line = file.read(_HEADER_BYTES)
    match = _HEADER.fullmatch(line)
    if match is None or match[1] != MAGIC or int(match[5], 16) != zlib.crc32(line[: match.start(5)]):
        later = _LATER_HEADER.match(line)
        # A line of this format's shape with a wrong checksum was this format: a flipped bit can look like a later
        # number.
        if match is None and later and int(later[1]) > FORMAT:
            raise ClosedCheckpointError(f"{path} {_later_format(int(later[1]))}")
        raise CheckpointError(f"{path} {_wrong_header(line, shaped=match is not None)}")
    version, size, sha256 = int(match[2]), int(match[3]), match[4].decode()
    if version > FORMAT:
        raise ClosedCheckpointError(f"{path} {_later_format(version)}")
    if payload < size:
        raise CheckpointError(f"{path} is truncated: {payload} of {size} bytes are there; {_USE_AN_OLDER_ONE}")
    if payload > size:
        raise CheckpointError(f"{path} is damaged: {payload - size} bytes follow its end; {_USE_AN_OLDER_ONE}")
    return size, sha256


def _later_format(version: int) -> str:
    return f"was written by format {version}, this metapl reads up to {FORMAT}; upgrade metapl"


def _wrong_header(line: bytes, shaped: bool) -> str:
    """What is wrong with a first line, in words that follow the file's name."""
    if not line:
        wrong = "is empty"
    elif len(line) < _HEADER_BYTES and (line.startswith(MAGIC) or MAGIC.startswith(line)):
        wrong = "is truncated: it ends within its first line"
    elif shaped or line.startswith(MAGIC):
        wrong = "is damaged in its first line"
    elif not line.strip(b"\0"):
        wrong = "is damaged: it begins with zeros, as after a power cut"
    else:
        return f"is not a checkpoint of metapl but {_looks_like(line)}"
    return f"{wrong}; {_USE_AN_OLDER_ONE}"


def _looks_like(line: bytes) -> str:
    ours = "that metapl.runs.checkpoint.save wrote"
    if line.startswith(b"PK\x03\x04"):
        return (
            "a zip file, perhaps one of torch.save; read such a file with torch.load(path, weights_only=True) "
            "and write it anew with metapl.runs.checkpoint.save"
        )
    if re.match(rb"\x80[\x02-\x05]", line):
        return f"a pickle, which may hold code, so it is not opened; give a file {ours}"
    if any(byte < 32 and byte not in b"\t\n\r" for byte in line):
        return f"another file, beginning with {line[:8]!r}; give one {ours}"
    return f"text, beginning with {line.decode(errors='replace')[:24]!r}; give a file {ours}"
