"""Running a network again, or beside itself, so that nothing of it shows afterwards.

Feedback passes must see what the inner pass saw (dropout masks, batch statistics) and must leave buffers and random
number generators bit for bit as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase


@dataclass(frozen=True)
class RandomState:
    """The default generators that a forward pass on ``device`` may draw from, as they were at one moment."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @staticmethod
    def now(device: torch.device) -> RandomState:
        """Read the generators; on CUDA this asks the host for seed and offset and does not wait for the device."""
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return RandomState(device, torch.get_rng_state(), accelerator)

    def restore(self) -> None:
        """Set the generators back to this moment."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    def same(self, other: RandomState) -> bool:
        """Whether the generators were at the same point."""
        pairs = ((self.cpu, other.cpu), (self.accelerator, other.accelerator))
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


@contextmanager
def replayed(state: RandomState) -> Iterator[None]:
    """Draw again from ``state`` on; afterwards the generators are as they were before."""
    before = RandomState.now(state.device)
    state.restore()
    try:
        yield
    finally:
        before.restore()


def _own_statistics(module: nn.Module) -> list[_NormBase]:
    return [m for m in module.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise by batch statistics as before, but do not update the running ones (nor count the batch)."""
    norms = _own_statistics(module)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def loose_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that :func:`frozen_statistics` does not guard, for a pass that may write to them."""
    guarded = {id(b) for norm in _own_statistics(module) for b in norm.buffers(recurse=False)}
    return {name: b.clone() for name, b in module.named_buffers() if id(b) not in guarded}


def call_at(module: nn.Module, tensors: Mapping[str, Tensor], inputs: Any) -> Any:
    """The module at other weights and buffers, wherever it holds them; its own stay in place.

    ``functional_call`` left to tie weights itself swaps a submodule that is registered twice twice over, and puts the
    stand-in back as the original (pytorch/pytorch#164759); here each slot is named once.
    """
    own = chain(module.named_parameters(), module.named_buffers())
    stand_in = {id(t): tensors[name] for name, t in own if name in tensors}
    slots = {
        f"{path}.{leaf}".removeprefix("."): stand_in[id(t)]
        for path, part in module.named_modules()
        for leaf, t in chain(part._parameters.items(), part._buffers.items())
        if id(t) in stand_in
    }
    return functional_call(module, slots, (inputs,), tie_weights=False)


class Buffers:
    """A module's buffers as they were at one moment, to be put back in place."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.saved = {name: (b, b.clone()) for name, b in module.named_buffers()}

    def restore(self) -> None:
        """Put the buffers back, values and objects alike (a module may have assigned new ones)."""
        with torch.no_grad():
            for name, (buffer, value) in self.saved.items():
                buffer.copy_(value)
                owner, _, leaf = name.rpartition(".")
                self.module.get_submodule(owner)._buffers[leaf] = buffer


@contextmanager
def nothing_moved(
    *modules: nn.Module, random: RandomState | None = None, on_success: bool = False
) -> Iterator[list[Buffers]]:
    """Put buffers back if the block fails (and, with ``on_success``, also if it does not); on failure the random
    number generators too. The block is given the buffers as they were before it."""
    saved = [Buffers(module) for module in modules]
    failed = True
    try:
        yield saved
        failed = False
    finally:
        if failed or on_success:
            for buffers in saved:
                buffers.restore()
        if failed and random is not None:
            random.restore()
