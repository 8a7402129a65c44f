"""The way over the steps of a training, forward and back, by kept states.

The steps are taken once, and some of the states between them are kept. On the way back each block
of steps is taken again from the state that was kept at its begin (:mod:`metapl.core.keeping`), and
is held until the adjoints of its steps have been taken, from the last to the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.core.replays import ReplayCheck


class Steps(Protocol):
    """The steps of a training, as a walk asks for them.

    A state is a tuple that begins with the weights and the optimizer's state.
    """

    def hold(self, number: int, state: Any) -> None:
        """Hold what the adjoint of a step reads, from the state before it."""

    def after(self, number: int, state: Any = None) -> Any:
        """Return the state after a step that is held.

        Args:
            state: before it, where it has just been held; None: it is read again.
        """

    def forget(self, number: int) -> None:
        """Drop what is held of a step."""


class Walk:
    """The way over the steps of a training.

    Args:
        steps: those of the training.
        states: where states are kept.
        spacings: as at the head of :mod:`metapl.core.keeping`; none: all steps are held.
        check: compares where steps lead that are taken again; None: nothing does.
    """

    def __init__(
        self, steps: Steps, states: States, spacings: Sequence[int], check: ReplayCheck | None
    ) -> None:
        self.steps = steps
        self.states = states
        self.spacings = spacings
        self.check = check

    def pass_by(self, number: int, state: Any, count: int) -> None:
        """Keep the state before one of ``count`` steps on the way forward, where it is one to keep.

        Of steps that are all held every √K-th state is noted.
        """
        spacing = self.spacings[0] if self.spacings else math.isqrt(count)
        if not self.spacings:
            self.steps.hold(number, state)
        elif number % spacing == 0:
            self.states.keep(number, state)
        if number % spacing == 0 and number > 0:
            self.note(number, state)

    def note(self, number: int, state: Any) -> None:
        """Note a state, with which the same one is compared when it is reached again."""
        if self.check is not None:
            self.check.note(number, *state[:2])

    def back(self, first: int, begin: int, end: int, *spacings: int) -> Iterator[int]:
        """Yield the steps from ``end`` back to ``begin``, none before ``first``, each held.

        Args:
            spacings: of the states that are kept in between; none: the steps are held.
        """
        if spacings:
            spacing, *finer = spacings
            for start in reversed(range(begin, end, spacing)):
                stop = min(start + spacing, end)
                if stop <= first:
                    return
                self._take_again(start, stop, *finer)
                yield from self.back(first, start, stop, *finer)
            return
        for number in reversed(range(begin, end)):
            if number >= first:
                if self.check is not None and number + 1 in self.check.digests:
                    self.check.compare(number + 1, *self.steps.after(number)[:2])
                yield number
            self.steps.forget(number)

    def _take_again(self, start: int, stop: int, *spacings: int) -> None:
        """Take a block of steps again from the state that was kept at its begin.

        All of its steps are held, or its multiples of ``spacings[0]`` are kept.
        """
        state = self.states.read(start)
        self.states.forget(start)
        for number in range(start, stop):
            if spacings and (number - start) % spacings[0] == 0:
                self.states.keep(number, state)
                if number > start:
                    self.note(number, state)
                if number + spacings[0] >= stop:
                    return
            self.steps.hold(number, state)
            if number < stop - 1:
                state = self.steps.after(number, state)
            if spacings:
                self.steps.forget(number)


class States:
    """Kept states in memory, by the number of their step.

    Args:
        on: as of :class:`metapl.core.keeping.Keeping`.
    """

    def __init__(self, on: Literal["cpu"] | None) -> None:
        self.on = on
        self._states = dict[int, Any]()

    def keep(self, number: int, state: Any) -> None:
        """Keep the state before a step."""
        self._states[number] = Moved(state) if self.on == "cpu" else state

    def read(self, number: int) -> Any:
        """Return the state before a step."""
        state = self._states[number]
        return state.back() if self.on == "cpu" else state

    def forget(self, number: int) -> None:
        """Keep the state before a step no longer."""
        del self._states[number]


class Moved:
    """A state whose tensors lie on the host."""

    def __init__(self, state: Any) -> None:
        leaves, self._structure = pytree.tree_flatten(state)
        self._devices = [t.device if isinstance(t, Tensor) else None for t in leaves]
        self._leaves = [t.cpu() if isinstance(t, Tensor) else t for t in leaves]

    def back(self) -> Any:
        """Return the state, with its tensors where they were."""
        pairs = zip(self._leaves, self._devices, strict=True)
        moved = [leaf if device is None else leaf.to(device) for leaf, device in pairs]
        return pytree.tree_unflatten(moved, self._structure)
