"""Decoded images in memory that worker processes share."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Cache:
    """Images by number in memory that is shared with forked processes: whoever reads one, reads it for all.

    Two that read the same image at once write the same bytes, and an image counts as there when it is whole.
    """

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        memory = shared_bytes(count * (1 + math.prod(shape)))
        self._there = memory[:count]
        self._images = torch.from_numpy(memory[count:].reshape(count, *shape))

    def missing(self, numbers: Tensor) -> list[int]:
        """Rows in ``numbers`` of images that are not there: most in the first epoch, later broken ones."""
        rows: list[int] = np.flatnonzero(self._there[numbers.numpy()] == 0).tolist()
        return rows

    def gather(self, numbers: Tensor) -> Tensor:
        """Images that are there, in one copy."""
        return self._images.index_select(0, numbers)

    def get(self, number: int) -> Tensor | None:
        return self._images[number] if self._there[number] else None

    def put(self, number: int, image: Tensor) -> None:
        self._images[number] = image
        self._there[number] = 1


def shared_bytes(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Zeros that this process shares with those forked from it; memory is taken where something is written."""
    # Not torch's shared tensors, which are bounded by the size of /dev/shm.
    return np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
