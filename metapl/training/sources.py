"""The batches of a fit, and the facts by which a fit that is resumed knows its data again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from metapl.core.lookahead import Lookahead
from metapl.data.feed import Feed, feed
from metapl.data.steps import StepBatches, in_memory
from metapl.execution.batch import Batch, digest, map_tensors, plain
from metapl.training.fittable import Fittable
from metapl.training.options import FitOptions


class Sources:
    """The outer and the inner source of a fit.

    They are drawn from between :meth:`open` and the end of its stack.

    Args:
        sources: by the names of the arguments of ``fit``; None where there is none.
        batch_size: rows of a batch of data in memory.
        dtype: the type that arrays of floating point are given.

    Attributes:
        facts: of each source that was drawn from: its examples, its batch size, and the digest of
            its first batch.
    """

    def __init__(
        self, sources: Mapping[str, Any], batch_size: int | None, dtype: torch.dtype
    ) -> None:
        self.sources: dict[str, Any] = {}
        for stream, (name, source) in enumerate(sources.items()):
            if source is not None:
                self.sources[name] = in_memory(source, name, batch_size, dtype, stream=stream)
        self.facts: dict[str, dict[str, Any]] = {}
        self._feeds: dict[str, Feed] = {}

    @property
    def are_shared(self) -> bool:
        """Whether each source is one of which every process takes its share."""
        return all(hasattr(source, "whole") for source in self.sources.values())

    def open(self, stack: ExitStack, trainer: Fittable, options: FitOptions) -> None:
        """Begin the feeds; the stack ends them."""
        for name, source in self.sources.items():
            self._feeds[name] = feed(
                source,
                name=name,
                stop=options.steps * (trainer.lookahead if name == "inner" else 1),
                num_workers=options.num_workers,
                device=trainer.device,
            )
            stack.callback(self._feeds[name].close)

    def draw(self, name: str) -> Any:
        """Return the next batch of a source."""
        batch = self._feeds[name].next()
        if name not in self.facts:
            self.facts[name] = facts_of(self.sources[name], batch)
        return batch

    def next_batches(self, lookahead: int, *, reads_inner: bool) -> tuple[Any, Any]:
        """Return the outer batch of a step and its inner one.

        Of several, the second is a :class:`Lookahead`; without an inner source it is None, and also
        where the step does not read it.
        """
        outer = self.draw("outer")
        if "inner" not in self._feeds:
            return outer, None
        # The first batch is made in any case, for the facts by which a resumed fit knows its data.
        if not reads_inner and "inner" in self.facts:
            self.skip("inner", lookahead)
            return outer, None
        earlier = []
        for _ in range(lookahead - 1):
            # A copy, for a source may fill the memory of one batch with the next.
            earlier.append(map_tensors(Tensor.clone, plain(self.draw("inner"))))
        last = self.draw("inner")
        return outer, Lookahead([*earlier, last]) if earlier else last

    def skip(self, name: str, batches: int) -> None:
        """Leave the next batches of a source out."""
        for _ in range(batches):
            self._feeds[name].skip()

    def draw_facts(self) -> dict[str, Any]:
        """Draw the first batch of each source, for its facts.

        Returns where the feeds were before.
        """
        positions = self.state_dict()
        for name in self._feeds:
            self.draw(name)
        return positions

    def state_dict(self) -> dict[str, Any]:
        """Return where each feed is."""
        return {name: opened.state() for name, opened in self._feeds.items()}

    def without_position(self) -> list[str]:
        """Return the sources that cannot be put where they were, in words."""
        words: list[str] = []
        for name, opened in self._feeds.items():
            if opened.without_position:
                words.append(f"{name}, {opened.without_position},")
        return words

    def load_state_dict(self, positions: Mapping[str, Any], *, leaves_others: bool = False) -> None:
        """Go on from the positions of :meth:`state_dict`.

        Args:
            leaves_others: leave sources without a position where they are, and do not refuse them.
        """
        for name, opened in self._feeds.items():
            if not (leaves_others and opened.without_position):
                opened.restore(positions[name])


def facts_of(source: Any, batch: Batch) -> dict[str, Any]:
    """Return how many examples a source has, and a batch, and the digest of its first batch.

    The numbers are None where they are not known.
    """
    if hasattr(source, "whole"):
        # A process draws its share; the facts are of the whole.
        source = source.whole
        batch = source[0]
    examples = getattr(source, "examples", None)
    dataset = getattr(source, "dataset", source)
    # The length of StepBatches counts steps.
    counts_examples = hasattr(dataset, "__len__") and not isinstance(dataset, StepBatches)
    if examples is None and counts_examples:
        examples = len(dataset)
    return {
        "examples": examples,
        "batch_size": getattr(source, "batch_size", None),
        "first_batch": digest(batch),
    }
