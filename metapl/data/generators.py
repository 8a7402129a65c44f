"""Random number generators that a source of batches draws from, with states of their own for it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from metapl.data import draws

# Attributes of a source with parts that may hold generators or have ``set_epoch``.
_PARTS = ("loader", "base_dataloader", "batch_sampler", "sampler", "dataset", "datasets", "transform", "transforms")
_KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


class Generators:
    """The default generators on the CPU (torch's, Python's, numpy's), seeded by a seed and a name, and those that the
    parts of a source hold as attributes, which begin where they are."""

    def __init__(self, seed: int, name: str, parts: Sequence[Any]) -> None:
        attributes = (value for part in parts for value in getattr(part, "__dict__", {}).values())
        own = {id(v): v for v in attributes if isinstance(v, _KINDS) and v is not torch.default_generator}
        self._generators: tuple[Any, ...] = (torch.default_generator, random, np.random, *own.values())
        key = draws.fold_in(seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
        first = (torch.Generator().manual_seed(key), random.Random(key), np.random.RandomState(np.random.MT19937(key)))
        self.states: list[Any] = [_state(generator) for generator in (*first, *own.values())]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Draw with the states kept here; afterwards the generators are as they were."""
        outside = self.read()
        try:
            self.write(self.states)
            yield
        finally:
            self.states = self.read()
            self.write(outside)

    def read(self) -> list[Any]:
        return [_state(generator) for generator in self._generators]

    def write(self, states: Sequence[Any]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            if isinstance(generator, np.random.Generator):
                generator.bit_generator.state = state
            elif hasattr(generator, "setstate"):  # of Python
                generator.setstate(state)
            else:  # a checkpoint that was loaded onto a device has moved a state of torch there too
                generator.set_state(state.cpu() if isinstance(state, torch.Tensor) else state)


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if hasattr(generator, "getstate"):  # of Python
        return generator.getstate()
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.get_state(legacy=False)


def parts_of(source: Any) -> list[Any]:
    parts: dict[int, Any] = {}
    waiting = [source]
    while waiting:
        part = waiting.pop()
        if part is not None and id(part) not in parts:
            parts[id(part)] = part
            held = getattr(part, "__dict__", {})
            for key in _PARTS:
                several = key in ("datasets", "transforms") and isinstance(held.get(key), list | tuple)
                waiting.extend(held[key] if several else [held.get(key)])
    return list(parts.values())
