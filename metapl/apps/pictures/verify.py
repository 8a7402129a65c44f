"""Which files can be read: the others are skipped, with the reason."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metapl.apps.pictures.folders import Count, Files, Progress
from metapl.apps.pictures.reader import MAX_PIXELS, UnreadableImage, image_size, read_image
from metapl.apps.pictures.shards import status_of
from metapl.errors import few
from metapl.runs.atomic import write_whole
from metapl.runs.sealed import irregular

Depth = Literal["decode", "header", "size"]

DECODE_UP_TO, DECODE_BYTES = 5_000, 2**29
HEADER_UP_TO = 50_000


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
        reasons: defaultdict[str, list[str]] = defaultdict(list)
        for file in self.skipped:
            reasons[file.reason.split(" (")[0]].append(file.name)  # without what is the file's own
        ranked = sorted(reasons.items(), key=lambda item: -len(item[1]))
        return "\n".join(f"{len(names)} skipped: {reason} ({few(names)})" for reason, names in ranked)


def verify_files(
    files: Files,
    depth: Depth | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Find which files can be used.

    Args:
        files: from a scan.
        depth: "decode" reads each picture whole, which finds all that can be found; "header" finds what is empty, no
            picture, or too large; "size" finds empty files. None: by what takes seconds, decode up to 5,000 files and
            half a gigabyte, header up to 50,000 files, and size beyond. What is found later, while training, is
            replaced there (see :class:`metapl.apps.pictures.FileImages`).
        max_pixels: as :func:`metapl.apps.pictures.reader.read_image`.
        cache: file to keep the result in. It is used again as long as the names, sizes and times of change of all
            files, and what is asked, are the same.
        progress: called with the number of files examined.

    Returns:
        The sound files, and each other one with the reason.

    Cost: per file, about 0.01 ms for the size, 0.1 ms for the header, and one decoding.

    Raises:
        MetaplError: the cache cannot be written.
    """
    if depth is None and len(files) > HEADER_UP_TO:
        depth = "size"
    statuses = _statuses(files, progress if depth == "size" else None)
    if depth is None:
        size = sum(status[0] for status in statuses if not isinstance(status, str))
        depth = "decode" if len(statuses) <= DECODE_UP_TO and size <= DECODE_BYTES else "header"
    key = hashlib.sha256(json.dumps([1, depth, max_pixels, files.names, statuses]).encode()).hexdigest()
    skipped = None if cache is None else _read_cache(cache, key)
    if skipped is None:
        count = Count(None if depth == "size" else progress)
        skipped = []
        for name, path, status in zip(files.names, files.paths(), statuses, strict=True):
            reason = _fault(path, status, depth, max_pixels)
            if reason is not None:
                skipped.append(Skipped(name, reason))
            count.add()
        count.end()
        if cache is not None:
            result = {"key": key, "skipped": [dataclasses.asdict(file) for file in skipped]}
            write_whole(cache, json.dumps(result, indent=1).encode(), "expected a folder with room.")
    names = {file.name for file in skipped}
    return Verified(tuple(i for i, name in enumerate(files.names) if name not in names), tuple(skipped), depth)


def _statuses(files: Files, progress: Progress | None) -> list[tuple[int, int] | str]:
    """Size and time of change of each file, or why it has none."""
    count = Count(progress)
    statuses: list[tuple[int, int] | str] = []
    for path in files.paths():
        try:
            mode, size, changed = status_of(path)
            kind = irregular(mode)
            statuses.append((size, changed) if kind is None else f"it is {kind}")
        except OSError as error:
            statuses.append(error.strerror or type(error).__name__)
        count.add()
    count.end()
    return statuses


def _fault(path: str, status: tuple[int, int] | str, depth: Depth, max_pixels: int) -> str | None:
    if isinstance(status, str):
        return status
    if status[0] == 0:
        return "the file is empty"
    try:
        if depth == "header":
            image_size(path, max_pixels=max_pixels)
        elif depth == "decode":
            read_image(path, size=(1, 1), max_pixels=max_pixels)  # of a size, JPEGs are decoded several times as fast
    except UnreadableImage as error:
        return error.reason
    return None


def _read_cache(cache: Path, key: str) -> list[Skipped] | None:
    try:
        result = json.loads(cache.read_text(encoding="utf-8"))
        return [Skipped(**file) for file in result["skipped"]] if result["key"] == key else None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # it is made anew
