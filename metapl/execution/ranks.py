"""The processes that share a batch.

Every process, a *rank*, holds an equal share of each batch and takes means over it; a loss is the
mean of the ranks' losses, and a gradient the mean of their gradients. With one rank nothing is
communicated, and nothing computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.numerics import Tree


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks that share a batch."""

    groups: Sequence[dist.ProcessGroup] = ()  # whose product they are, as the dimensions of a mesh
    rank: int = 0  # the number of this process's share of the rows
    device: torch.device = torch.device("cpu")  # where tensors can be exchanged
    copies: int = 1  # how many processes hold the same rows, and compute parts of the same products
    first: bool = True  # whether this process shows and writes

    @cached_property
    def size(self) -> int:
        """How many shares of rows there are.

        Each of them counts once, however many processes hold it.
        """
        return self.processes // self.copies

    @cached_property
    def processes(self) -> int:
        return math.prod(group.size() for group in self.groups)

    @cached_property
    def alone(self) -> bool:
        return self.processes == 1

    def sum(self, t: Tensor) -> Tensor:
        if self.alone:
            return t
        total = self._reduced(t)
        return total if self.copies == 1 else total / self.copies

    def mean(self, t: Tensor) -> Tensor:
        return t if self.alone else self.sum(t) / self.size

    def greatest(self, t: Tensor) -> Tensor:
        return self._reduced(t, dist.ReduceOp.MAX)

    def _reduced(self, t: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
        total = t.detach().clone(memory_format=torch.contiguous_format)
        for group in self.groups:
            dist.all_reduce(total, how, group=group)
        return total

    def mean_tree(self, tree: Tree, like: Tree) -> Tree:
        """The mean of gradients of the parameters ``like``, or of scalars, in one exchange for each
        type of number; one that some ranks lack counts as zero there, and one that all lack is
        missing."""
        if self.alone:
            return tree
        means: Tree = {}
        for dtype in dict.fromkeys(t.dtype for t in like.values()):
            names = [name for name, t in like.items() if t.dtype == dtype]
            pieces = [
                tree[n].flatten() if n in tree else torch.zeros_like(like[n]).flatten()
                for n in names
            ]
            present = torch.tensor(
                [float(n in tree) for n in names], dtype=dtype, device=pieces[0].device
            )
            *found, held = self.sum(torch.cat([*pieces, present])).split(
                [*map(len, pieces), len(names)]
            )
            # Where this rank lacks none, the others' need not be read, for which the host would
            # wait.
            somewhere = (
                [True] * len(names) if all(n in tree for n in names) else (held > 0).tolist()
            )
            means |= {n: t for n, t, known in zip(names, found, somewhere, strict=True) if known}
        return {
            name: (means[name] / self.size).view_as(t) for name, t in like.items() if name in means
        }

    def all_rows(self, t: Tensor) -> Tensor:
        if self.alone:
            return t
        every = t.new_zeros(self.size * len(t), *t.shape[1:])
        self.own_rows(every).copy_(t)
        return self.sum(every).to(t.dtype)

    def own_rows(self, every: Tensor) -> Tensor:
        return every if self.alone else every.chunk(self.size)[self.rank]

    def norm(self, t: Tensor) -> Tensor:
        """The norm of a tensor of which each rank holds some rows, a scalar."""
        own = torch.linalg.vector_norm(t)
        return own if self.alone else self.sum(own.square()).sqrt()

    def equal(self, count: int, what: str) -> None:
        """Refuse, on every rank, numbers of rows that differ between ranks.

        Their exchanges would never end.
        """
        most, least = self.greatest(torch.tensor([count, -count], device=self.device))
        checks.refuse(
            most != -least,
            f"the shares of {what} are unequal; expected as many rows on every rank.",
        )

    def gathered(self, value: Any) -> list[Any]:
        values = [value]
        for group in reversed(self.groups):
            found: list[Any] = [None] * group.size()
            dist.all_gather_object(found, values, group=group)
            values = [v for part in found for v in part]
        return values

    def any(self, here: bool) -> bool:
        """Whether something is so on any rank; the host waits for the answer."""
        return (
            here
            if self.alone
            else bool(self.sum(torch.tensor(float(here), device=self.device)) > 0)
        )

    @contextmanager
    def agreed(self, *, waiting: bool = False) -> Iterator[None]:
        """If this block fails on one rank, fail on all of them, with the message of the first that
        failed; on an accelerator, where the host would wait for the answer, only if ``waiting``."""
        if self.alone or not (waiting or self.device.type == "cpu"):
            yield
            return
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        if not self.any(failed is not None):
            return
        texts = self.gathered(None if failed is None else str(failed) or type(failed).__name__)
        if failed is not None and not isinstance(failed, MetaplError):
            raise failed
        rank, text = next((i, text) for i, text in enumerate(texts) if text is not None)
        raise MetaplError(text if len({*texts}) == 1 else f"rank {rank}: {text}") from failed


ALONE = Ranks()  # this process alone
sharing: ContextVar[Ranks] = ContextVar("sharing", default=ALONE)


@contextmanager
def rows_shared(ranks: Ranks) -> Iterator[None]:
    """Let :func:`metapl.problems.base.draw_classes` in this block draw for the rows of all ranks."""
    token = sharing.set(ranks)
    try:
        yield
    finally:
        sharing.reset(token)


class _AllRows(torch.autograd.Function):
    """The rows of all ranks; backward, each rank gets what all ranks found for its rows."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.all_rows(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.own_rows(ctx.ranks.sum(grads[0])), None


def rows_of_all(t: Tensor) -> tuple[Tensor, slice]:
    """In a problem's ``signal``.

    The rows of all ranks, differentiably, and where this rank's are.
    """
    ranks = sharing.get()
    if ranks.alone:
        return t, slice(None)
    every: Tensor = _AllRows.apply(t, ranks)
    return every, slice(ranks.rank * len(t), (ranks.rank + 1) * len(t))
