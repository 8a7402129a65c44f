"""Whether a graph's results are the function's, but for rounding; other arguments to compare at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, warn
from metapl.execution.compare import TRIES


def copy_with_strides(t: Tensor) -> Tensor:
    """Return a copy of a tensor with the same strides, for which a compiled graph was made.

    ``clone()`` closes the gaps of columns of a larger tensor, and a graph would read beyond it.
    """
    t = t.detach()
    if t.layout != torch.strided or not t.numel():
        return t.clone()
    steps = zip(t.shape, t.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps)
    return t.as_strided((span,), (1,)).clone().as_strided(t.shape, t.stride())


def rows_repeated(values: Any) -> Any:
    """Return nested tensors whose second rows are their first again: others, of the same kind."""

    def repeated(t: Tensor) -> Tensor:
        half = len(t) // 2 if t.ndim else 0
        # Rows of an expanded tensor are the same already.
        if not half or 0 in t.stride():
            return t
        other = copy_with_strides(t)
        other[half : 2 * half] = other[:half].clone()
        return other.requires_grad_(t.requires_grad)

    return pytree.tree_map_only(Tensor, repeated, values)


def halved(values: Any) -> Any:
    """Return nested tensors with half of each number that is none of integers."""

    def half(t: Tensor) -> Tensor:
        if not t.is_floating_point() and not t.is_complex():
            return t
        return (0.5 * copy_with_strides(t)).requires_grad_(t.requires_grad)

    return pytree.tree_map_only(Tensor, half, values)


# Two results that differ by less than this many roundings, relative to their size, are equal: a
# replay has the function's own bits, but for kernels that do not repeat theirs.
ROUNDINGS = 1e3

ROUNDINGS_OF_SCALE = 10

# A graph adds in another order, in many operations; another last digit of each number is one
# rounding. So many times as far a graph's results may be from the function's.
NUDGES = 10.0

DROWNED = "At numbers that differ in their last digit it comes out as far off without a graph."


class Comparisons:
    """Comparisons of one function with its graph, which end when rounding has drowned several."""

    def __init__(self) -> None:
        self.tries_left = TRIES

    @property
    def have_ended(self) -> bool:
        """Whether nothing is compared any more."""
        return self.tries_left < 0

    def count_drowned(self, claim: str, expected: str = "") -> None:
        """Count one that rounding has drowned, and warn where it was the last.

        Args:
            claim: that was to be compared, such as that a step is right.
            expected: what to do about it.
        """
        self.tries_left -= 1
        if self.have_ended:
            warn(f"cannot tell whether {claim}. {DROWNED}{expected}")


def refuse_other_results(
    refuse: Callable[[Any], None],
    wanted: Any,
    *,
    take_again: Callable[[], Any],
    take_at_other_digits: Callable[[], Any],
) -> bool:
    """Refuse what a graph has found where it is not what is wanted, but for rounding.

    A fresh Adam divides each gradient by its own size and ε. Where one is about as small as ε,
    which is rounding, it may decide what comes out, and a step at numbers that differ in their last
    digit comes out otherwise as well. From such a step nothing can be told. What does not repeat
    itself has a memory, which is no rounding.

    Args:
        refuse: raises where what was found is too far from what is wanted. It is given None, or
            what is wanted at other last digits, whose distance is then allowed too.
        take_again: finds what is wanted once more, with the same draws.
        take_at_other_digits: finds it at numbers that differ in their last digit.

    Returns: whether it can be told.
    """
    try:
        refuse(None)
    except MetaplError:
        again = take_again()
        if not all(map(is_equal, pytree.tree_leaves(again), pytree.tree_leaves(wanted))):
            raise
        refuse(take_at_other_digits())
        return False
    return True


def is_unchanged(before: Tensor | None, now: Tensor | None) -> bool:
    """Return whether a tensor, or none, has the numbers that it had before."""
    if before is None or now is None:
        return before is now
    before, now = (t.detach().resolve_conj().nan_to_num() for t in (before, now))
    return torch.equal(before, now)


def is_equal(found: Any, wanted: Any, *, factor: float = 1.0, scale: float = 0.0) -> bool:
    """Return whether two results are equal, to the rounding of a sum where they are tensors.

    Args:
        factor: how many times as much rounding is allowed.
        scale: of the numbers that a result may be a difference of, a few roundings are allowed.
    """
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return bool(found == wanted)
    wanted = wanted.detach()
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if torch.equal(found, wanted):
        return True
    if not wanted.is_floating_point():
        return False
    eps = torch.finfo(wanted.dtype).eps
    limit = ROUNDINGS * eps * factor
    # A mask of -1e9, say, is equal, and tells nothing about the size of what is not.
    floor = limit * size_of(wanted[found != wanted]) + ROUNDINGS_OF_SCALE * eps * scale
    return torch.allclose(found, wanted, rtol=limit, atol=floor, equal_nan=True)


def with_other_digits(t: Tensor) -> Tensor:
    """Return a tensor whose numbers differ in their last digit, up or down by a fixed draw."""
    if not t.is_floating_point():
        return t.clone()
    generator = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(0, 2, t.shape, generator=generator) - 1.0
    return t * (1.0 + torch.finfo(t.dtype).eps * signs.to(t))


def is_as_near(found: Any, wanted: Any, wanted_there: Any) -> bool:
    """Return whether rounding explains how far a graph's result is from the function's.

    Args:
        wanted_there: the function's result at numbers that differ in their last digit.
    """
    results = (found, wanted, wanted_there)
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in results):
        return False
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    gap, gap_there = ((t.detach() - wanted.detach()).norm() for t in (found, wanted_there))
    return bool(gap <= NUDGES * gap_there)


def size_of(t: Tensor) -> float:
    """Return the largest size among the finite entries of a tensor."""
    finite = t.detach()[t.detach().isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
