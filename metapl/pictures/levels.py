"""The range of the numbers in a folder's pictures, where they have more than 8 bits.

Cameras of depth, microscopes and X-rays fill the lowest 10 to 14 of 16 bits: by the type of such a
file alone, a few of 256 levels would be left of its picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from metapl.errors import MetaplError, few
from metapl.pictures import reader
from metapl.pictures.folders import DECODE_UP_TO, Files
from metapl.words import shown

# Integers of 16 bits with a wider range keep their levels: 128 or more of 256 are left.
WIDE = 2**15

# From this share of numbers on that lie outside of a network's range, pictures are of another kind.
MOST_OUTSIDE = 0.5

# Where different numbers become so few levels, some of them may be outliers.
FEW_LEVELS = 32

# The share of the numbers whose levels count; the others may be outliers of any level.
NEARLY_ALL = 0.95


def find_levels(
    learned: Sequence[Files],
    measured: Sequence[Files] = (),
    say: Callable[[str], object] = lambda text: None,
) -> reader.Levels | None:
    """Return the numbers that become 0 and 255 in pictures of more than 8 bits.

    They are the lowest and the highest number of the pictures that are learned from. Where these
    use more than half of 16 bits, which stay as they are, they are 0 and 65,535; or None where
    others have 8 bits. None: no picture has more than 8 bits.

    Args:
        learned: the folders that are learned from.
        measured: other folders, whose pictures have to be of the same kind.
        say: is told what becomes of the pictures.

    Cost: the headers of up to 5,000 files a folder, and decoding those of more than 8 bits.

    Raises:
        MetaplError: pictures would lose their levels, or cannot be compared; or a folder that is
            measured has half of its numbers or more outside of the range.
    """
    depths = _depths_of(learned)
    all_depths = depths + _depths_of(measured)
    with_frames = [depth.path for depth in all_depths if depth.has_frames]
    if with_frames:
        say(f"note: of {few(with_frames)} the first frame or page is taken, and no other")

    # 1. Files of more than 8 bits.
    first = {depth.kind: shown(depth.path) for depth in reversed(all_depths)}
    colors = [depth.sample.max() for depth in all_depths if depth.kind == reader.COLORS]
    if colors and max(colors) < WIDE:
        raise MetaplError(
            f"{first[reader.COLORS]} has {reader.COLORS}, of which the upper 8 alone are read, and "
            f"{max(colors):,.0f} is the highest of all such pictures; save them with 8 bits."
        )
    kinds = (reader.INTEGERS, reader.FLOATS)
    samples = [depth.sample for depth in depths if depth.kind in kinds]
    if not samples:
        # Perhaps those that are measured on are of another kind.
        samples = [depth.sample for depth in all_depths if depth.kind in kinds]
    if not samples:
        return None

    # 2. The range of their numbers.
    numbers = np.concatenate(samples)
    low = float(numbers.min())
    high = float(numbers.max())
    if low == high:
        return None
    has_16_bits = reader.FLOATS not in first and low >= 0 and high <= reader.MOST_OF_16_BITS
    is_wide = has_16_bits and high - low >= WIDE
    if len(first) > 1 and not is_wide:
        examples = ", ".join(f"{path} has {kind}" for kind, path in first.items())
        raise MetaplError(
            f"{examples}: numbers from {low:,g} to {high:,g} cannot be compared with others; save "
            "all with 8 bits."
        )
    # The levels of nearly all numbers: outliers that are spread fill many levels, each a little.
    levels = np.round((numbers - low) * (255 / (high - low)))
    _, places, counts = np.unique(levels, return_inverse=True, return_counts=True)
    descending = np.argsort(-counts)
    used = int(np.searchsorted(counts[descending].cumsum(), NEARLY_ALL * len(numbers))) + 1
    is_used = np.isin(places, descending[:used])
    if used < min(FEW_LEVELS, len(np.unique(numbers[is_used])) / 2):
        say(
            f"note: nearly all numbers from {low:,g} to {high:,g} use {used} of 256 levels, for "
            "some are far from the others; if these are faults, replace them"
        )
    if is_wide and len(first) > 1:
        return None
    if is_wide:
        low = 0.0
        high = float(reader.MOST_OF_16_BITS)
    say(f"pictures of more than 8 bits: {low:,g} to {high:,g} become 0 to 255")
    for files in measured:
        refuse_other_levels(files, (low, high))
    return low, high


def refuse_other_levels(
    files: Files, levels: reader.Levels | None, name: str | Path | None = None
) -> None:
    """Refuse pictures for a network whose numbers are not those that it was trained on.

    Args:
        files: of the pictures.
        levels: of the network, see :func:`find_levels`.
        name: what messages call them; by default, their folder.

    Raises:
        MetaplError: they use a part of 16 bits, and the network was trained on 8 bits; or half of
            their numbers or more lie outside of its range.
    """
    place = shown(files.root if name is None else name)
    if levels is None:
        found = find_levels([files])
        # All of 16 bits become levels by their type.
        if found is not None and found != (0, reader.MOST_OF_16_BITS):
            low, high = found
            raise MetaplError(
                f"the numbers of {place} go from {low:,g} to {high:,g}, and the network was "
                "trained on pictures of 8 bits; expected such."
            )
        return
    samples = [depth.sample for depth in _depths_of([files]) if len(depth.sample)]
    if not samples:
        return
    numbers = np.concatenate(samples)
    outside = float(((numbers < levels[0]) | (numbers > levels[1])).mean())
    if outside >= MOST_OUTSIDE:
        raise MetaplError(
            f"{outside:.0%} of the numbers of {place} lie outside of {levels[0]:,g} to "
            f"{levels[1]:,g}, the range of the pictures that are learned from; expected pictures "
            "of the same kind."
        )


def _depths_of(folders: Sequence[Files]) -> list[reader.Depth]:
    """Return what the files of folders have, evenly spread where there are many."""
    depths = []
    for files in folders:
        step = -(-len(files) // DECODE_UP_TO)
        for path in list(files.paths())[::step]:
            # A file that cannot be read is listed when the files are verified.
            with suppress(reader.UnreadableImage):
                depths.append(reader.depth_of(path))
    return depths
