"""Files that are read as they were written, or refused by name: plain files alone, of a known SHA-256 where there is
one, and values that fit the types and ranges that are expected of them."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import stat
import types
import typing
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Union, get_args, get_origin

from metapl.errors import MetaplError, reason_of

StrPath = str | os.PathLike[str]

# --------------------------------------------------------------------------------------------------------------- bytes


def read_sealed(path: StrPath, sha256: str | None = None, *, mend: str) -> bytes:
    """All bytes of a file that is as it was written.

    Args:
        path: of a plain file.
        sha256: of the file as it was written; None where that is not known, as of files of earlier versions.
        mend: what to do where it is another; it ends the message.

    Raises:
        MetaplError: it cannot be read, or is another.
    """
    try:
        content = read_plain(path)
    except OSError as error:
        raise MetaplError(f"{path} cannot be read: {reason_of(error)}. {mend}") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise MetaplError(f"{path} is damaged or of another run: its SHA-256 is not the one that was noted. {mend}")
    return content


def read_json(
    path: StrPath, hints: Mapping[str, Any] | None = None, needed: Iterable[str] = (), *, mend: str = ""
) -> dict[str, Any]:
    """The object that a file of JSON holds.

    Args:
        path: of a plain file.
        hints: the types of entries by their names, as for :func:`misfit`; other entries may hold anything.
        needed: names of entries that must be there.
        mend: what to do where it is another; it ends the message.

    Raises:
        MetaplError: it cannot be read, is no object, has an entry of another type, or lacks one.
    """
    end = f". {mend}" if mend else "."
    try:
        content = json.loads(read_plain(path))
    except RecursionError as error:
        raise MetaplError(f"{path} cannot be read: it is nested too deeply.") from error
    except (OSError, ValueError) as error:
        raise MetaplError(f"{path} cannot be read: {error}{end}") from error
    if not isinstance(content, dict):
        raise MetaplError(f"{path} is damaged: it holds {content!r:.60}; expected an object{end}")
    missing = [name for name in needed if name not in content]
    fault = f"it has no {missing[0]}" if missing else misfit_entries(content, hints or {})
    if fault is not None:
        raise MetaplError(f"{path} is damaged: {fault}{end}")
    return content


def sha256_of(file: IO[bytes] | StrPath) -> str:
    """The SHA-256 of a file, or of what is left of an open one, in hexadecimal."""
    if isinstance(file, str | os.PathLike):
        with open_plain(file) as opened:
            return sha256_of(opened)
    return hashlib.file_digest(typing.cast(io.BufferedReader, file), "sha256").hexdigest()


def open_plain(path: StrPath) -> io.BufferedReader:
    """Open a file for reading its bytes: to open a pipe may wait for ever, and a device may never end.

    Raises:
        OSError: it is missing, may not be read, or is a folder, a device, a pipe or a socket.
    """
    refuse_irregular(path)  # of a socket, the system's own words say nothing
    # Should it have become a pipe since, this does not wait for somebody who writes.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _refuse_mode(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_plain(path: StrPath) -> bytes:
    """All bytes of a file; raises as :func:`open_plain`."""
    with open_plain(path) as file:
        return file.read()


def refuse_irregular(path: StrPath) -> None:
    """Stop where something else than a plain file has a name: to rename a file to that of a device takes it away.

    Raises:
        OSError: it is a folder, a device, a pipe or a socket, or it cannot be told. A name that is free passes.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    _refuse_mode(mode, path)


def irregular(mode: int) -> str | None:
    """What it is that is neither a file nor a folder, by its ``st_mode``; None for these two.

    >>> irregular(os.stat(os.curdir).st_mode), irregular(os.stat(os.devnull).st_mode)
    (None, 'a device')
    """
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _refuse_mode(mode: int, path: StrPath) -> None:
    name = os.fspath(Path(path))
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", name)
    kind = irregular(mode)
    if kind is not None:
        raise OSError(errno.EINVAL, f"it is {kind}, expected a plain file", name)


# -------------------------------------------------------------------------------------------------------------- values


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; a round bracket in ``ends`` leaves that end out.

    >>> str(Range(1)), str(Range(0, 256)), str(Range(0, ends="()")), str(Range(0, 1, "[)")), 1 in Range(0, 1, "[)")
    ('1 or more', '0 to 256', 'above 0', 'in [0, 1)', False)
    """

    low: float
    high: float = math.inf
    ends: str = "[]"

    def __contains__(self, value: float) -> bool:
        outside = [end for end, out in zip((self.low, self.high), self.ends, strict=True) if out in "()"]
        return self.low <= value <= self.high and value not in outside

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low}" if self.ends[0] == "(" else f"{self.low} or more"
        return (
            f"{self.low} to {self.high}"
            if self.ends == "[]"
            else f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"
        )


AtLeastOne = Annotated[int, Range(1)]
AtLeastZero = Annotated[int, Range(0)]


def misfit(value: Any, hint: Any, where: str = "it") -> str | None:
    """What is wrong with a value that a user or a file gave, in words; None where it fits.

    Args:
        value: of dicts, lists, numbers, texts, switches and None.
        hint: a type as in an annotation, ``Annotated`` with a :class:`Range` where not all numbers will do. A list fits
            a tuple, a dict fits a dataclass whose fields its entries fit, a whole number fits a float; NaN and infinite
            numbers fit nothing.
        where: what messages call the value.

    >>> misfit(3, int), misfit("3", int | None, "steps"), misfit(0, AtLeastOne, "steps")
    (None, "steps is '3'; expected int | None", 'steps is 0; expected 1 or more')
    >>> misfit({"a": [1, "x"]}, dict[str, tuple[int, ...]], "counts")
    "counts.a.1 is 'x'; expected int"
    """
    kind, ranges = _kind_and_ranges(hint)
    if ranges and _fits_plainly(value, kind):
        return None if all(value in one for one in ranges) else _unexpected(value, hint, where)
    hint = hint if ranges else kind
    if _fits_plainly(value, hint):
        return None
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        faults = [misfit(value, part, where) for part in parts]
        # Of a text that may be left out, say, the fault of the text itself says nothing of None.
        deeper = [fault for fault in faults if fault is not None and not fault.startswith(f"{where} is ")]
        return None if None in faults else deeper[0] if deeper else _unexpected(value, hint, where)
    if origin in (tuple, list) and isinstance(value, list | tuple):
        ellipsis = origin is list or (len(parts) == 2 and parts[1] is Ellipsis)
        hints = [parts[0]] * len(value) if ellipsis else list(parts)
        if len(hints) != len(value):
            return f"{where} has {len(value)} entries; expected {len(hints)}"
        return _first(misfit(entry, hints[i], f"{where}.{i}") for i, entry in enumerate(value))
    if isinstance(value, Mapping):
        if origin is not None and issubclass(origin, Mapping):
            return _first(misfit(entry, parts[1], f"{where}.{name}") for name, entry in value.items())
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return misfit_entries(value, typing.get_type_hints(hint, include_extras=True), where)
    return _unexpected(value, hint, where)


def misfit_entries(values: Mapping[str, Any], hints: Mapping[str, Any], where: str = "it") -> str | None:
    """The same of the entries of a dict that have a hint, by name; ``where=""`` leaves them their bare names."""
    above = f"{where}." if where else ""
    return _first(misfit(value, hints[name], f"{above}{name}") for name, value in values.items() if name in hints)


def check_fields(value: Any) -> None:
    """Refuse a dataclass of which a field does not fit its annotation, as ``name=value: expected ...``.

    Raises:
        MetaplError: there is one.
    """
    for name, hint in typing.get_type_hints(type(value), include_extras=True).items():
        held = getattr(value, name)
        fault = misfit(held, hint)
        if fault is not None:
            raise MetaplError(f"{name}={held!r}: expected {fault.partition('; expected ')[2]}.")


def _kind_and_ranges(hint: Any) -> tuple[Any, list[Range]]:
    """A type and its ranges, without what else an annotation says of it, such as to the command line."""
    if get_origin(hint) is not Annotated:
        return hint, []
    kind, *said = get_args(hint)
    return kind, [one for one in said if isinstance(one, Range)]


def _fits_plainly(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is int:
        return not isinstance(value, bool) and isinstance(value, Integral)
    if hint is float:
        return not isinstance(value, bool) and isinstance(value, Real) and _is_finite(value)
    if hint in (str, bool):
        return type(value) is hint
    return get_origin(hint) is Literal and any(type(value) is type(one) and value == one for one in get_args(hint))


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float reaches
        return False


def _first(faults: Iterable[str | None]) -> str | None:
    return next((fault for fault in faults if fault is not None), None)


def _unexpected(value: Any, hint: Any, where: str) -> str:
    shown = repr(value)
    return f"{where} is {shown if len(shown) <= 60 else f'{shown[:57]}...'}; expected {_said(hint, value)}"


def _said(hint: Any, value: Any) -> str:
    """A type in words, for a value that does not fit it."""
    if dataclasses.is_dataclass(hint):
        return "an object"
    kind, ranges = _kind_and_ranges(hint)
    if ranges:
        what = [] if _fits_plainly(value, kind) else [{int: "a whole number", float: "a number"}[kind]]
        return ", ".join([*what, *map(str, ranges)])
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, parts))
    if any(get_origin(part) is Annotated for part in parts):
        return " or ".join("None" if part is type(None) else _said(part, value) for part in parts)
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind).replace("typing.", "")
