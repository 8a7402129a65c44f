"""The default random number generators: saved states, replays from them, and independent streams."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class RandomState(NamedTuple):
    """A saved state of the default generators that a forward pass on ``device`` may draw from."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None = None

    @staticmethod
    def now(device: torch.device) -> RandomState:
        """The current state; it is kept on the host."""
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return RandomState(device, torch.default_generator.get_state(), accelerator)

    def values(self) -> dict[str, Tensor | None]:
        """The states by name, as they are stored; with the device they make the whole."""
        return {"cpu": self.cpu, "accelerator": self.accelerator}

    def restore(self) -> None:
        torch.default_generator.set_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    def branch(self) -> RandomState:
        """The start of a stream that is independent of the one that continues from here; a function of this state."""
        if (fixed := _branch.get()) is not None:
            return fixed
        # A feedback pass that drew from the caller's stream would share its numbers with the caller's next draw.
        states = [state.numpy().tobytes() for state in (self.cpu, self.accelerator) if state is not None]
        return _branch_of(b"".join(states), self.device, self.accelerator is not None)


@lru_cache(maxsize=4)  # where nothing draws, every step begins in the same state
def _branch_of(state: bytes, device: torch.device, on_device: bool) -> RandomState:
    digest = hashlib.blake2b(state, digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1  # 63 bits: every generator takes them
    start = torch.Generator().manual_seed(seed).get_state()
    return RandomState(device, start, torch.Generator(device).manual_seed(seed).get_state() if on_device else None)


_branch: ContextVar[RandomState | None] = ContextVar("branch", default=None)


@contextmanager
def branching_to(state: RandomState) -> Iterator[None]:
    """Let every :meth:`RandomState.branch` in this block start at a given state."""
    token = _branch.set(state)
    try:
        yield
    finally:
        _branch.reset(token)


@contextmanager
def replayed(state: RandomState) -> Iterator[None]:
    """Draw from ``state`` in this block; afterwards the generators are as they were before."""
    before = RandomState.now(state.device)
    state.restore()
    try:
        yield
    finally:
        before.restore()
