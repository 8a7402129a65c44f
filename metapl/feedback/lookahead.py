"""The inner batches of a look-ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import plain


@dataclass(frozen=True)
class Lookahead:
    """K inner batches, one for each student step of a look-ahead; given in place of ``unlabeled``.

    A signal that reads the student's outputs, such as that of :class:`metapl.problems.MetaWeightNet`, reads them as
    constants: the derivative through them, from one step to the signals of later ones, is left out.

    Args:
        batches: each of them as for ``unlabeled``.

    >>> import torch
    >>> len(Lookahead([torch.zeros(4, 3), torch.zeros(4, 3)]))
    2
    """

    batches: Sequence[Any]

    def __post_init__(self) -> None:
        if not isinstance(self.batches, Sequence) or isinstance(self.batches, str | bytes) or not self.batches:
            raise MetaplError(
                f"Lookahead was given batches that are {checks.described(self.batches)}; expected a list of batches, "
                "one for each student step, such as metapl.Lookahead([u1, u2])."
            )

    def __len__(self) -> int:
        return len(self.batches)


def inner_batches(unlabeled: Any) -> Sequence[Any]:
    """The batches of a look-ahead; any other batch is a look-ahead of one step."""
    return unlabeled.batches if isinstance(unlabeled, Lookahead) else (unlabeled,)


def plain_inner(unlabeled: Any) -> Any:
    """An inner batch, or a look-ahead, with its dict-like parts as dicts."""
    return Lookahead([plain(u) for u in unlabeled.batches]) if isinstance(unlabeled, Lookahead) else plain(unlabeled)
