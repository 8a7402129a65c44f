r"""A look at the steps of a path that are computed again: whether they come out as they did.

Each time a replay reaches a state that was kept, a digest of it is compared with the one that was
taken when it was kept.

The digest of a tree of tensors x is a linear sketch in float64: its entries, in rows of 256, are
added with random signs,

.. math:: s_j = \sum_r \sigma_{rj}\, x_{rj}, \qquad \mathbb E \|s(x) - s(x')\|^2 = \|x - x'\|^2 ,

so equal states have equal digests, bit for bit, and the distance of two digests says how far apart
their states are, to some ten per cent. A state of up to 256 numbers is its own digest, but for
signs. Cost: one read of the state, and 2 KB for each tree.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Annotated

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.numerics import Tree, as_real
from metapl.execution.ranks import ALONE, Ranks
from metapl.execution.shards import local
from metapl.runs.fields import Range
from metapl.updates.base import OptimizerState

Tolerance = Annotated[float, Range(0)]
# Relative to a state's size. A replay that rounds otherwise in float32 is below it.
REPLAY_TOLERANCE = 1e-6

COLUMNS = 256
# How many entries are in float64 at a time: 8 MB.
PIECE = 2**20


class ReplayCheck:
    """Digests of the kept states of a path, with which replays are compared.

    Args:
        tolerance: the difference above which it refuses.
        ranks: the processes that share the path; all of them refuse, or none.

    Attributes:
        digests: by the number of the step before which the states are.
        error: the largest relative difference that a replay has shown.
    """

    def __init__(self, tolerance: float = REPLAY_TOLERANCE, ranks: Ranks = ALONE) -> None:
        self.tolerance = tolerance
        self.ranks = ranks
        self.error = 0.0
        self.digests: dict[int, Tensor] = {}

    def note(self, number: int, params: Tree, optimizer_state: OptimizerState) -> None:
        """Note the digest of a state that is kept."""
        self.digests[number] = state_digest(params, optimizer_state)

    def compare(self, number: int, params: Tree, optimizer_state: OptimizerState) -> None:
        """Compare a state that a replay has reached with the one that was noted, if one was.

        The host waits for it.
        """
        if number not in self.digests:
            return
        reached = state_digest(params, optimizer_state)
        differences = torch.linalg.vector_norm(reached - self.digests[number], dim=1)
        sizes = self.sizes(number)
        # Of a momentum that is 0, as before the first step, the difference itself.
        relative = torch.where(sizes > 0, differences / sizes, differences).max()
        if not self.ranks.alone:
            relative = self.ranks.greatest(relative)
        self.refuse(number, float(relative))

    def sizes(self, number: int) -> Tensor:
        """Return the sizes to which the differences of a state are relative, (2,)."""
        sizes: Tensor = torch.linalg.vector_norm(self.digests[number], dim=1)
        return sizes

    def refuse(self, number: int, error: float) -> None:
        """Note the difference of a state, and refuse it where it is above the tolerance."""
        self.error = max(self.error, error)
        if not error <= self.tolerance:
            raise MetaplError(self.refusal(number, error))

    def refusal(self, number: int, error: float) -> str:
        """Return the error about a state that has come out otherwise."""
        return (
            f"the steps before step {number} of the look-ahead were computed again, and their "
            f"state differs by {error:.1e} of its size; expected {self.tolerance:g} at most: a "
            "student without a generator of its own, a count of its calls or an operation that "
            "is not deterministic, or replay_tolerance= with what is allowed."
        )


def state_digest(params: Tree, optimizer_state: OptimizerState) -> Tensor:
    """Return the digests of the weights and of the optimizer's tensors, (2, 256) in float64.

    Counts are left out.
    """
    device = local(next(iter(params.values()))).device
    leaves = [
        t for t in pytree.tree_leaves(optimizer_state) if isinstance(t, Tensor) and t.ndim > 0
    ]
    return torch.stack([sketch(params.values(), device), sketch(leaves, device)])


@torch.no_grad()
def sketch(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the signed sums, (256,), of the entries of all tensors in rows of 256."""
    total = torch.zeros(COLUMNS, dtype=torch.float64, device=device)
    for number, piece in enumerate(_pieces(tensors)):
        values = torch.cat(piece).to(device, torch.float64)
        rows = torch.nn.functional.pad(values, (0, -len(values) % COLUMNS)).view(-1, COLUMNS)
        # Each piece has the signs of other columns, or differences that are alike in all pieces
        # would add up.
        signs = _signs(device)[: len(rows)].roll(number, dims=1)
        # Not by a product of matrices, whose rounding may depend on where the numbers lie.
        total += rows.mul_(signs).sum(0)
    return total


def _pieces(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Yield the entries of tensors in lists of ``PIECE`` entries at most.

    So small tensors go together into one call.
    """
    piece: list[Tensor] = []
    count = 0
    for tensor in tensors:
        for part in as_real(local(tensor).detach()).flatten().split(PIECE):
            if piece and count + len(part) > PIECE:
                yield piece
                piece = []
                count = 0
            piece.append(part)
            count += len(part)
    if piece:
        yield piece


@cache
def _signs(device: torch.device) -> Tensor:
    """Return the random signs of the entries of a piece, int8; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    coins = torch.randint(0, 2, (PIECE // COLUMNS, COLUMNS), generator=generator, dtype=torch.int8)
    return (2 * coins - 1).to(device)
