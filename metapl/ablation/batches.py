"""Pairs of batches from what a user gave: a batch each, or sources of batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution.batch import is_whole
from metapl.feedback import Lookahead
from metapl.training.trainer import BilevelTrainer


def pairs(
    trainer: BilevelTrainer, labeled: Any, unlabeled: Any, count: int, *, first: int = 0, seed: int = 0
) -> Iterator[tuple[Any, Any]]:
    """``count`` pairs of a labeled batch and an unlabeled one, or a look-ahead where the trainer takes several steps.

    They begin with the ``first`` of sources whose batches are numbered; ``seed`` is of the order of other sources.
    """
    from metapl.data.feed import feed

    several = trainer.lookahead if not isinstance(unlabeled, Lookahead) else 1
    sources = {
        "labeled": ([labeled] if is_whole(labeled) else labeled, 1),
        "unlabeled": ([unlabeled] if _is_batch(unlabeled) else unlabeled, several),
    }
    feeds = {}
    try:
        for name, (source, each) in sources.items():
            stop = (first + count) * each
            feeds[name] = feed(source, name=name, stop=stop, device=trainer.device, seed=seed)
            if first and feeds[name].state().get("kind") in ("sequence", "steps"):
                feeds[name].restore({**feeds[name].state(), "position": first * each})
        for _ in range(count):
            inner = [feeds["unlabeled"].next() for _ in range(several)]
            yield feeds["labeled"].next(), inner[0] if several == 1 else Lookahead(inner)
    finally:
        for one in feeds.values():
            one.close()


def refuse_single_use(**sources: Any) -> None:
    """Refuse sources that can be read once, where they are read again for every training."""
    for name, source in sources.items():
        if isinstance(source, Iterator):
            raise MetaplError(
                f"{name} is an iterator ({type(source).__name__}), which can be read once, and short trainings by each "
                "mode read it again; expected a DataLoader, a list of batches, or metapl.data's step batches."
            )


def _is_batch(unlabeled: Any) -> bool:
    return isinstance(unlabeled, Tensor | dict | tuple | Lookahead)
