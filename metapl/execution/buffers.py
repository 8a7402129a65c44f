"""The parameters and buffers of a module: replaced for a block, copied, and restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.rng import RandomState
from metapl.parts import named_parts

Held = tuple[dict[str, Any], str, Tensor]
"""A slot of a module, as its dictionary and name, and a tensor for it."""


class Slots:
    """Every place where a module holds a parameter or a buffer; a tensor may be held in several.

    Batch norms that normalize by the statistics of the batch are kept apart: :meth:`frozen` stops their updates, so
    their buffers need no copies.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = [part for _, part in named_parts(module)]
        self.norms = [part for part in parts if isinstance(part, _BatchNorm) and _by_batch_statistics(part)]
        kept = {id(norm) for norm in self.norms}
        self.parameters = [held for part in parts for held in _held(part._parameters)]
        self.all_buffers = [held for part in parts for held in _held(part._buffers)]
        self.loose_buffers = [held for part in parts if id(part) not in kept for held in _held(part._buffers)]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Normalize by batch statistics as before, without updating the running statistics and the batch count."""
        for norm in self.norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in self.norms:
                norm.track_running_stats = True


def _held(tensors: dict[str, Any]) -> list[Held]:
    return [(tensors, name, t) for name, t in tensors.items() if t is not None]


def _by_batch_statistics(norm: _BatchNorm) -> bool:
    # Only PyTorch's own forward is known not to write to the buffers when track_running_stats is False.
    own_forward = getattr(norm.forward, "__func__", None) is _BatchNorm.forward
    return own_forward and norm.training and norm.track_running_stats


def copies(held: Sequence[Held]) -> list[Held]:
    """Copies of the tensors that the slots hold now; a tensor in several slots is copied once."""
    memo: dict[int, Tensor] = {}
    now = [(tensors, name, tensors[name]) for tensors, name, _ in held if tensors.get(name) is not None]
    for _, _, t in now:
        if id(t) not in memo:
            memo[id(t)] = t.detach().clone()
    return [(tensors, name, memo[id(t)]) for tensors, name, t in now]


def stand_ins(held: Sequence[Held], replacements: Mapping[int, Tensor]) -> list[Held]:
    """The slots whose tensor has a replacement, by its ``id``, with that replacement."""
    return [(tensors, name, replacements[id(t)]) for tensors, name, t in held if id(t) in replacements]


@contextmanager
def swapped(held: Sequence[Held]) -> Iterator[None]:
    """Put these tensors into their slots in this block; afterwards the slots hold the same tensors as before.

    ``torch.func.functional_call`` does so for a forward pass only, but a checkpoint runs the module in the backward
    pass too. (It also restores a submodule that is registered twice wrongly, pytorch/pytorch#164759.)
    """
    before = [(tensors, name, tensors[name]) for tensors, name, _ in held]
    for tensors, name, t in held:
        tensors[name] = t
    try:
        yield
    finally:
        for tensors, name, t in before:
            tensors[name] = t


@contextmanager
def buffers_aside(module: nn.Module, start: Sequence[Held] | None = None) -> Iterator[None]:
    """Run the module on copies of its buffers, by default of their values now, so that the buffers do not change."""
    with swapped(copies(Slots(module).all_buffers) if start is None else fresh(start)):
        yield


def fresh(held: Sequence[Held]) -> list[Held]:
    """Copies of saved tensors, for a pass that may write to its buffers."""
    memo: dict[int, Tensor] = {}
    return [(tensors, name, memo.setdefault(id(t), t.clone())) for tensors, name, t in held]


@contextmanager
def inputs_unchanged(inputs: Any, who: str) -> Iterator[None]:
    """Refuse a network that writes to its inputs in this block, by PyTorch's version counters."""
    before = _versions(inputs)
    yield
    if _versions(inputs) != before:
        raise MetaplError(
            f"the {who} changed its input in place (an operation such as x.mul_() or ReLU(inplace=True) on the input "
            "itself), so later passes would read another batch; expected an unchanged input: begin its forward with "
            "x = x.clone(). The given batch now holds the changed values."
        )


@contextmanager
def given_unchanged(who: str, **given: Any) -> Iterator[None]:
    """Refuse a function of the user's that writes to what it is given in this block.

    Args:
        who: the function, as the subject of a sentence.
        given: trees of what may be written to, by name.
    """
    before = {name: _versions(tree) for name, tree in given.items()}
    try:
        yield
        changed = [name for name, tree in given.items() if _versions(tree) != before[name]]
    except RuntimeError as error:  # autograd's own refusal, where a signal is the leaf that a gradient is taken in
        leaves = [name for name, tree in given.items() if any(t.requires_grad and t.is_leaf for t in _tensors(tree))]
        changed = leaves if "leaf Variable that requires grad" in str(error) else []
        if not changed:
            raise
    if changed:
        raise MetaplError(
            f"{who} changed {' and '.join(changed)} in place (an operation such as x.mul_(), x[0] = 0 or x += 1 on "
            "what it is given), and other passes read the same tensors, so the gradients would be wrong; expected them "
            "unchanged: write x = x * 2 for x.mul_(2), or begin with x = x.clone(). A batch, or weights, that were "
            "given keep the changed values."
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _versions(tree: Any) -> list[int]:
    return [t._version for t in _tensors(tree) if not t.is_inference()]


class Buffers:
    """A snapshot of a module's buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.held = [held for _, part in named_parts(module) for held in _held(part._buffers)]
        self.values = copies(self.held)

    def restore(self) -> None:
        """Restore the buffers, both values and tensor objects (a module may have assigned new ones)."""
        with torch.no_grad():
            for (tensors, name, buffer), (_, _, value) in zip(self.held, self.values, strict=True):
                buffer.copy_(value)
                tensors[name] = buffer


@contextmanager
def nothing_moved(*modules: nn.Module, random: RandomState | None = None, on_success: bool = False) -> Iterator[None]:
    """Restore buffers, and the random number generators, if the block fails; with ``on_success``, restore the buffers
    in any case."""
    saved = [Buffers(module) for module in modules]
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed or on_success:
            for buffers in saved:
                buffers.restore()
        if failed and random is not None:
            random.restore()
