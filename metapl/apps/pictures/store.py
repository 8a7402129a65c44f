"""Pictures by number, as bytes: in memory, or decoded from files when they are asked for."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from metapl.apps.machine import read_plain
from metapl.apps.pictures.reader import Crop, UnreadableImage, read_crops, read_image
from metapl.errors import MetaplError
from metapl.execution.batch import to_device

_IN_A_ROW = 32  # broken files, after which the disk is taken to be gone


class Images(Protocol):
    """What the batches draw from: pictures of one shape."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every picture."""
        ...

    def select(self, indices: Tensor) -> Images:
        """Some of the pictures, in the order of ``indices`` (n,) int64; nothing is copied."""
        ...

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures as uint8 (B, C, H, W), and which they are, (B,) int64: ``indices``, but where a file is broken."""
        ...


class MemoryImages:
    """Pictures that lie in memory.

    Args:
        data: uint8 (n, C, H, W). On an accelerator, batches are picked there, and loaders do without worker processes.
        indices: (m,) int64, which of them count, in this order; None: all.

    >>> images = MemoryImages(torch.arange(12, dtype=torch.uint8).view(3, 1, 2, 2))
    >>> images.select(torch.tensor([2, 0])).fetch(torch.tensor([0]))[0]
    tensor([[[[ 8,  9],
              [10, 11]]]], dtype=torch.uint8)
    """

    def __init__(self, data: Tensor, indices: Tensor | None = None) -> None:
        if data.dtype != torch.uint8 or data.ndim != 4:
            given = f"{data.dtype} of shape {tuple(data.shape)}"
            raise MetaplError(f"MemoryImages got {given}; expected torch.uint8 (n, C, H, W)")
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        return len(self.data if self.indices is None else self.indices)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.data.shape[1], self.data.shape[2], self.data.shape[3])

    def select(self, indices: Tensor) -> MemoryImages:
        return MemoryImages(self.data, self._where(indices))

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return pick(self.data, self._where(indices)), indices

    def _where(self, indices: Tensor) -> Tensor:
        return indices if self.indices is None else self.indices[indices]


class FileImages:
    """Pictures in files, read when they are fetched.

    A file that cannot be read is replaced by the next one that can, in the order of this set; so the batches stay a
    function of their position. It is recorded, whichever process meets it: as a line of JSON in ``log``, see
    :func:`replaced_files`, or as a warning. ``size``, ``mode`` and ``center`` are those of
    :func:`metapl.apps.pictures.reader.read_image`.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        *,
        size: tuple[int, int],
        mode: Literal["RGB", "L"] = "RGB",
        center: float = 1.0,
        log: Path | None = None,
    ) -> None:
        # Not a list: forked workers copy Python's own objects bit by bit, as their counts of references change.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        if not len(self._paths) or min(size) < 1:
            raise MetaplError(f"FileImages got {len(self._paths)} paths and size {size}; expected 1 or more of each.")
        self._indices = torch.arange(len(self._paths))
        self.size, self.mode, self.center, self.log = size, mode, center, log
        # Whether a picture is kept, and the pictures. Two that read the same one at once write the same bytes.
        self._kept: tuple[np.ndarray[Any, Any], Tensor] | None = None

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3 if self.mode == "RGB" else 1, *self.size)

    def select(self, indices: Tensor) -> FileImages:
        return self._with(_indices=self._indices[indices])

    def cached(self) -> FileImages:
        """The same pictures, each kept in memory once it was read whole, which forked worker processes share; C·H·W + 1
        bytes a picture, taken as the pictures are read."""
        # Not torch's shared tensors, which are bounded by the size of /dev/shm.
        count, bytes_each = len(self._paths), math.prod(self.shape)
        memory = np.frombuffer(mmap.mmap(-1, count * (1 + bytes_each)), dtype=np.uint8)
        return self._with(_kept=(memory[:count], torch.from_numpy(memory[count:].reshape(count, *self.shape))))

    def _with(self, **changes: Any) -> FileImages:
        copy = object.__new__(FileImages)
        vars(copy).update({**vars(self), **changes})
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": None}  # a process that is not forked reads for itself

    def path(self, index: int) -> Path:
        """Where a picture is."""
        return Path(os.fsdecode(self._paths[int(self._indices[index])]))

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        numbers = self._indices[indices]
        if self._kept is not None and self._kept[0][numbers.numpy()].all():  # four times as fast
            return self._kept[1].index_select(0, numbers), indices
        return self._stacked(map(self._next_sound, indices.tolist()))

    def fetch_sound(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`fetch`, but a broken file is left out instead of replaced: for measuring."""
        return self._stacked((views, index) for index in indices.tolist() if (views := self._views(index)) is not None)

    def _stacked(self, found: Iterable[tuple[list[Tensor], int]]) -> tuple[Tensor, Tensor]:
        whole, used = [], []
        for views, index in found:
            whole.append(views[0])
            used.append(index)
        images = torch.stack(whole) if whole else torch.empty(0, *self.shape, dtype=torch.uint8)
        return images, torch.tensor(used, dtype=torch.int64)

    def fetch_crops(self, indices: Tensor, crops: Sequence[Sequence[Crop]]) -> tuple[list[Tensor], Tensor]:
        """V boxes of each of the pictures ``indices``, (B,) int64: V tensors, uint8 (B, C, H, W), and which pictures
        they are, (B,) int64."""
        found = [self._next_sound(index, boxes) for index, boxes in zip(indices.tolist(), crops, strict=True)]
        views = zip(*(images for images, _ in found), strict=True)
        return [torch.stack(view) for view in views], torch.tensor([used for _, used in found], dtype=torch.int64)

    def _next_sound(self, index: int, crops: Sequence[Crop] = ()) -> tuple[list[Tensor], int]:
        tries = min(_IN_A_ROW, len(self))
        for candidate in range(index, index + tries):
            pictures = self._views(candidate % len(self), crops)
            if pictures is not None:
                return pictures, candidate % len(self)
        first = f"the first being {self.path(index)}"
        raise MetaplError(f"{tries} pictures in a row cannot be read, {first}: is the disk still there?")

    def _views(self, index: int, crops: Sequence[Crop] = ()) -> list[Tensor] | None:
        """Boxes of a picture, or the whole one; None where it cannot be read."""
        number = int(self._indices[index])
        there, kept = self._kept if self._kept is not None and not crops else (None, torch.empty(0))
        if there is not None and there[number]:
            return [kept[number]]
        path = str(self.path(index))
        try:
            if crops:
                return read_crops(path, crops, size=self.size, mode=self.mode)
            picture = read_image(path, size=self.size, mode=self.mode, center=self.center)
        except UnreadableImage as error:
            if self.log is None:
                warnings.warn(f"{path} is left out: {error.reason}", stacklevel=2)
            else:
                record_files(self.log, {path: error.reason})
            return None
        if there is not None:
            kept[number] = picture
            there[number] = 1
        return [picture]


def pick(values: Tensor, indices: Tensor) -> Tensor:
    """values[indices] on the device of the values, with indices from the CPU and without waiting for the device."""
    return values.index_select(0, to_device(indices, values.device))  # on the CPU ten times as fast as values[indices]


def record_files(log: Path, reasons: Mapping[str, str]) -> None:
    """Add files that cannot be read to a record, each with the reason; a file is recorded once."""
    known = replaced_files(log)
    new = [{"file": path, "reason": reason} for path, reason in reasons.items() if path not in known]
    if new:
        torn = log.exists() and read_plain(log)[-1:] not in (b"", b"\n")  # by a process that was killed
        with log.open("a", encoding="utf-8") as file:  # in one piece, for workers add to it too
            file.write("\n" * torn + "".join(json.dumps(entry) + "\n" for entry in new))


def replaced_files(log: Path) -> dict[str, str]:
    """The files that :class:`FileImages` recorded, each with the reason; empty where there is no such record."""
    reasons = {}
    for line in read_plain(log).decode("utf-8", "replace").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):  # torn or damaged
            entry = json.loads(line)
            reasons[str(entry["file"])] = str(entry["reason"])
    return reasons
