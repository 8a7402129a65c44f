"""The processes that share a batch.

Every process, a *rank*, holds an equal share of each batch and takes means over it; a loss is the
mean of the ranks' losses, and a gradient the mean of their gradients. With one rank nothing is
communicated, and nothing computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

NOTHING: AbstractContextManager[Any] = nullcontext()
"""A block in which nothing is other than around it."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks that share a batch.

    Attributes:
        groups: the process groups whose product the ranks are, as the dimensions of a mesh.
        rank: the number of this process's share of the rows.
        device: where tensors can be exchanged.
        copies: how many processes hold the same rows, and compute parts of the same products.
        first: whether this process shows and writes.
    """

    groups: Sequence[dist.ProcessGroup] = ()
    rank: int = 0
    device: torch.device = torch.device("cpu")
    copies: int = 1
    first: bool = True

    @cached_property
    def size(self) -> int:
        """How many shares of rows there are.

        Each of them counts once, however many processes hold it.
        """
        return self.processes // self.copies

    @cached_property
    def processes(self) -> int:
        """How many processes there are."""
        return math.prod(group.size() for group in self.groups)

    @cached_property
    def alone(self) -> bool:
        """Whether this process has the whole batch, so that nothing is exchanged."""
        return self.processes == 1

    def sum(self, t: Tensor) -> Tensor:
        """Return the sum over the shares of rows, without a graph."""
        if self.alone:
            return t
        total = self._reduced(t, operation=dist.ReduceOp.SUM)
        if self.copies == 1:
            return total
        return total / self.copies

    def mean(self, t: Tensor) -> Tensor:
        """Return the mean over the shares of rows, without a graph."""
        if self.alone:
            return t
        return self.sum(t) / self.size

    def greatest(self, t: Tensor) -> Tensor:
        """Return the greatest value over the processes, entry by entry."""
        return self._reduced(t, operation=dist.ReduceOp.MAX)

    def _reduced(self, t: Tensor, operation: Any) -> Tensor:
        total = t.detach().clone(memory_format=torch.contiguous_format)
        for group in self.groups:
            dist.all_reduce(total, operation, group=group)
        return total

    def mean_tree(self, tree: Tree, like: Tree) -> Tree:
        """Return the mean of gradients of the parameters ``like``, or of scalars.

        A parameter that some ranks lack counts as zero there, and one that all lack is missing.
        Cost: one exchange for each type of number.
        """
        if self.alone:
            return tree
        sums: Tree = {}
        for dtype in dict.fromkeys(t.dtype for t in like.values()):
            names = [name for name, t in like.items() if t.dtype == dtype]
            sums |= self._sums(tree, like, names=names)
        return {
            name: (sums[name] / self.size).view_as(t) for name, t in like.items() if name in sums
        }

    def _sums(self, tree: Tree, like: Tree, names: Sequence[str]) -> Tree:
        """Return the sums of tensors of one type, each as a vector, that any rank has.

        They are exchanged as one vector, with a 1 for each tensor that this rank has at its end.
        """
        pieces = [(tree[n] if n in tree else torch.zeros_like(like[n])).flatten() for n in names]
        is_present = torch.tensor(
            [float(name in tree) for name in names],
            dtype=like[names[0]].dtype,
            device=pieces[0].device,
        )
        total = self.sum(torch.cat([*pieces, is_present]))
        *sums, times_present = total.split([*map(len, pieces), len(names)])
        if all(name in tree for name in names):
            # Where this rank lacks none, the others' need not be read, for which the host would
            # wait.
            return dict(zip(names, sums, strict=True))
        present_somewhere = (times_present > 0).tolist()
        return {
            name: t
            for name, t, is_somewhere in zip(names, sums, present_somewhere, strict=True)
            if is_somewhere
        }

    def all_rows(self, t: Tensor) -> Tensor:
        """Return the rows of all ranks, without a graph."""
        if self.alone:
            return t
        rows = t.new_zeros(self.size * len(t), *t.shape[1:])
        self.own_rows(rows).copy_(t)
        return self.sum(rows).to(t.dtype)

    def own_rows(self, rows: Tensor) -> Tensor:
        """Return this rank's rows of those of all ranks."""
        if self.alone:
            return rows
        shares: tuple[Tensor, ...] = rows.chunk(self.size)
        return shares[self.rank]

    def norm(self, t: Tensor) -> Tensor:
        """Return the norm of a tensor of which each rank holds some rows, a scalar."""
        own_norm: Tensor = torch.linalg.vector_norm(t)
        if self.alone:
            return own_norm
        return self.sum(own_norm.square()).sqrt()

    def equal(self, count: int, subject: str) -> None:
        """Refuse, on every rank, numbers of rows that differ between ranks.

        Their exchanges would never end.

        Args:
            subject: whose rows they are, for the error.
        """
        most, least = self.greatest(torch.tensor([count, -count], device=self.device))
        text = f"the shares of {subject} are unequal; expected as many rows on every rank."
        checks.refuse(most != -least, text)

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of all processes, in their order."""
        values = [value]
        for group in reversed(self.groups):
            of_members: list[Any] = [None] * group.size()
            dist.all_gather_object(of_members, values, group=group)
            values = [value for of_member in of_members for value in of_member]
        return values

    def any(self, is_so: bool) -> bool:
        """Return whether something is so on any rank; the host waits for the answer."""
        if self.alone:
            return is_so
        count = self.sum(torch.tensor(float(is_so), device=self.device))
        return bool(count > 0)

    def agreed(self, *, waiting: bool = False) -> AbstractContextManager[None]:
        """If this block fails on one rank, fail on all of them.

        The message is that of the first rank that failed.

        Args:
            waiting: agree on an accelerator too, where the host has to wait for the answer.
        """
        if self.alone or not (waiting or self.device.type == "cpu"):
            return NOTHING
        return self._agreed()

    @contextmanager
    def _agreed(self) -> Iterator[None]:
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if not self.any(failure is not None):
            return
        text = None
        if failure is not None:
            text = str(failure) or type(failure).__name__
        texts = self.gathered(text)
        if failure is not None and not isinstance(failure, MetaplError):
            raise failure
        rank, first_text = next((i, text) for i, text in enumerate(texts) if text is not None)
        if len({*texts}) == 1:
            # All ranks say the same.
            raise MetaplError(first_text) from failure
        raise MetaplError(f"rank {rank}: {first_text}") from failure


# This process alone.
ALONE = Ranks()

# The ranks that share the batch about which a problem is asked.
sharing: ContextVar[Ranks] = ContextVar("sharing", default=ALONE)


def rows_shared(ranks: Ranks) -> AbstractContextManager[None]:
    """Let a problem draw for the rows of all ranks in this block.

    By :func:`metapl.problems.base.draw_classes`.
    """
    return checks.having(sharing, ranks)


class _AllRows(torch.autograd.Function):
    """The rows of all ranks.

    Backward, each rank gets the sum of what all ranks found for its rows.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.all_rows(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.own_rows(ctx.ranks.sum(grads[0])), None


def rows_of_all(t: Tensor) -> tuple[Tensor, slice]:
    """Return the rows of all ranks, differentiably, and where this rank's are.

    To be called in a problem's ``signal``.
    """
    ranks = sharing.get()
    if ranks.alone:
        return t, slice(None)
    rows: Tensor = _AllRows.apply(t, ranks)
    start = ranks.rank * len(t)
    return rows, slice(start, start + len(t))
