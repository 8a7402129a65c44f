"""The progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class Bar:
    """The progress bar with what a user wants to see on it.

    Args:
        bar: tqdm's; None: nothing is drawn.
    """

    def __init__(self, bar: Any | None) -> None:
        self.bar, self.examples, self.since = bar, 0, time.monotonic()
        self.shown: dict[str, str] = {}

    def advance(self, batches: Iterable[Any], row: dict[str, float]) -> None:
        """One step further, on these batches and with these numbers, if it had any."""
        if self.bar is None:
            return
        self.bar.update()
        self.examples += sum(map(examples_in, batches))
        names = {"student_validation_accuracy": "accuracy", "feedback_mean": "h"}
        self.shown |= {short: f"{row[name]:.3g}" for name, short in names.items() if name in row}
        if row:
            seconds = time.monotonic() - self.since
            self.bar.set_postfix(
                {**self.shown, "examples/s": f"{self.examples / max(seconds, 1e-9):.0f}"}, refresh=False
            )


@contextmanager
def progress_bar(drawn: bool, *, name: str, start: int, steps: int) -> Iterator[Bar]:
    """A bar on standard error that stands at ``start`` of ``steps``."""
    # Not tqdm's disable=True: it makes locks between processes even so, which a killed worker would leave behind.
    if not drawn:
        yield Bar(None)
        return
    from tqdm import tqdm

    with tqdm(total=steps, initial=start, desc=name, unit="step", leave=False) as bar:
        yield Bar(bar)


def examples_in(batch: Any) -> int:
    """How many examples a batch holds: the rows of its first tensor that has any."""
    leaves = pytree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)
