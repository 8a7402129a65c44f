"""Seeds that a text names, as ``--seeds`` of the command has them."""

from __future__ import annotations

import re

from metapl.errors import MetaplError

MOST_SEEDS = 10_000


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds that ``"0-9"``, ``"0,3,5"`` or a mixture of these names.

    >>> parse_seeds("0-2,7")
    (0, 1, 2, 7)
    """
    seeds: list[int] = []
    is_sound = True
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,10})(?:-([0-9]{1,10}))?\s*", part)
        numbers = range(0)
        if match is not None:
            numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
        is_sound = is_sound and bool(numbers) and numbers.stop <= 2**32
        if not is_sound or len(seeds) + len(numbers) > MOST_SEEDS:
            is_sound = False
            break
        seeds.extend(numbers)
    if not is_sound or len({*seeds}) < len(seeds):
        expected = f"{MOST_SEEDS:,} rising numbers below 2^32 at most, such as 0-9 or 0,3,5"
        raise MetaplError(f"--seeds {text:.60}: expected {expected}, each once.")
    return tuple(seeds)
