"""Which files can be read: the others are skipped, with the reason."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from metapl.apps.pictures.folders import Files, Progress, silent
from metapl.apps.pictures.reader import UnreadableImage, image_size, read_image
from metapl.apps.pictures.shards import status_of
from metapl.errors import few
from metapl.runs.sealed import irregular

Depth = Literal["decode", "header", "size"]

DECODE_UP_TO, DECODE_BYTES, HEADER_UP_TO = 5_000, 2**29, 50_000


@dataclass(frozen=True)
class Skipped:
    """A file that is not used: its name in its folder, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Verified:
    """What :func:`verify_files` found.

    Args:
        sound: indices of the files that passed.
        skipped: the others.
        depth: how far the files were examined.
    """

    sound: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    depth: Depth

    def summary(self) -> str:
        """One line a reason, the most frequent first, with the number of files and the first few.

        >>> empty = (Skipped("a.png", "the file is empty"), Skipped("b.png", "the file is empty"))
        >>> Verified((0,), empty, "size").summary()
        '2 skipped: the file is empty (a.png, b.png)'
        """
        reasons = defaultdict(list)
        for file in self.skipped:
            reasons[file.reason.split(" (")[0]].append(file.name)  # without what is the file's own
        ranked = sorted(reasons.items(), key=lambda item: -len(item[1]))
        return "\n".join(f"{len(names)} skipped: {reason} ({few(names)})" for reason, names in ranked)


def verify_files(files: Files, depth: Depth | None = None, *, progress: Progress = silent) -> Verified:
    """Find which files can be used, and why the others cannot.

    Args:
        files: from a scan.
        depth: "decode" reads each picture whole, which finds all that can be found; "header" finds what is empty, no
            picture, or too large; "size" finds empty files. None: by what takes seconds, decode up to 5,000 files and
            half a gigabyte, header up to 50,000 files, and size beyond. What is found later, while training, is
            replaced there (see :class:`metapl.apps.pictures.FileImages`).
        progress: called with the number of files examined.

    Cost: per file, about 0.01 ms for the size, 0.1 ms for the header, and one decoding.
    """
    sizes = [_size(path) for path in files.paths()]
    if depth is None:
        total = sum(size for size in sizes if isinstance(size, int))
        few_enough = len(sizes) <= DECODE_UP_TO and total <= DECODE_BYTES
        depth = "size" if len(sizes) > HEADER_UP_TO else "decode" if few_enough else "header"
    sound, skipped = [], []
    for index, (path, size) in enumerate(zip(files.paths(), sizes, strict=True)):
        fault = size if isinstance(size, str) else None
        try:
            if fault is None and depth == "header":
                image_size(path)
            elif fault is None and depth == "decode":
                read_image(path, size=(1, 1))  # of a size, JPEGs are decoded several times as fast
        except UnreadableImage as error:
            fault = error.reason
        if fault is None:
            sound.append(index)
        else:
            skipped.append(Skipped(files.names[index], fault))
        progress(index + 1)
    return Verified(tuple(sound), tuple(skipped), depth)


def _size(path: str) -> int | str:
    """Size of a file, or why it is not one to read."""
    try:
        mode, size = status_of(path)
    except OSError as error:
        return error.strerror or type(error).__name__
    kind = irregular(mode)
    return f"it is {kind}" if kind is not None else size or "the file is empty"
