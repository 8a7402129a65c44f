"""The teacher's pass on an inner batch: its signal now, and with a graph when the feedback is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.agreement import check_recomputed
from metapl.execution.batch import length
from metapl.execution.buffers import Slots, State, unchanged
from metapl.execution.compiled import runs_compiled
from metapl.execution.kernels import checkpoints_without_reentry, no_fast_path
from metapl.execution.ranks import ALONE, Ranks, rows_shared
from metapl.execution.rng import RandomState, replayed
from metapl.execution.writes import journal, tensors_in, weights_watched
from metapl.problems.base import Problem, Signal, check_signal, kind_of


class TeacherPass:
    """The teacher's signal about one inner batch, at θ_T from before the step.

    Args:
        teacher, problem: the network and the problem.
        batch: the inner batch.
        student_outputs: S(x_u; θ_S), detached; the signal may depend on them. None: the student has not run, because
            the signal enters its input.
        generator: for drawing labels.
        ranks: the processes that share the batch.
        slots: of the teacher; None: to be found.
        recompute: make the signal without a graph first, and once more with a graph in :meth:`with_graph`. Cost: one
            more forward pass, and no graph in memory between the two.
    """

    def __init__(
        self,
        teacher: nn.Module,
        problem: Problem,
        batch: Any,
        student_outputs: Tensor | None,
        generator: torch.Generator | None,
        recompute: bool,
        ranks: Ranks = ALONE,
        slots: Slots | None = None,
    ) -> None:
        self.ranks = ranks
        self.teacher, self.problem, self.batch = teacher, problem, batch
        self.student_outputs, self.generator, self.recompute = student_outputs, generator, recompute
        self.rows = length(batch) if student_outputs is None else len(student_outputs)
        given = tensors_in(batch)[0]
        self.device, self._on_host = given.device, not checks.waits(given)
        self._slots = Slots(teacher) if slots is None else slots
        if recompute:
            self._random = RandomState.now(self.device)
            self._state = State(self._slots.parts)
            self._generator_state = None if generator is None else generator.get_state()
            kept = journal()
            with torch.no_grad(), no_fast_path(), checkpoints_without_reentry(), kept as self._state.parameters:
                self.signal = self._run()
        else:
            self.signal = self._run()

    def with_graph(self) -> Signal:
        """The signal with the teacher's graph, computed again if it was made without."""
        if not self.recompute:
            return self.signal
        label_draws = _replayed_generator(self.generator, self._generator_state)
        with replayed(self._random), label_draws, self._state.again(self._slots):
            again = self._run()
        for name, t in vars(self.signal).items():
            if t is not None:
                check_recomputed(getattr(again, name).detach(), t.detach())
        return again

    def _run(self) -> Signal:
        outputs: Any = self.student_outputs
        who, given = "the problem's signal()", {"student_outputs": outputs}
        with rows_shared(self.ranks), self.watched(self.batch):
            try:
                signal = unchanged(
                    who, given, self.problem.signal, self.teacher, self.batch, outputs, generator=self.generator
                )
            except (AttributeError, TypeError) as error:
                if outputs is not None or "NoneType" not in str(error):
                    raise
                raise MetaplError(
                    f"{kind_of(self.problem)}.signal reads the student's outputs, and {kind_of(self.problem)}."
                    "student_input(batch, signal) makes the student's input from the signal, so the student has not "
                    "run yet and student_outputs is None; expected a signal of the teacher and the batch alone, or "
                    f"student_input(batch). ({error})"
                ) from error
        return check_signal(signal, self.problem)

    @property
    def has_frozen(self) -> bool:
        """Whether the teacher has parameters that it does not learn, which a pass may move."""
        return self._slots.has_frozen

    def watched(self, inputs: Any = None) -> AbstractContextManager[object]:
        """Refuse a pass that moves the teacher's weights, and keep what it moves of the frozen ones."""
        if self._slots.spread:
            return weights_watched([], "teacher", inputs, looking=False)
        frozen = self._slots.has_frozen
        eager = not ("forward" in vars(self.teacher) and runs_compiled(self.teacher))
        values = eager and self._on_host and self._slots.small and self._slots.looked_at and not frozen
        looking = eager and not values and (self._on_host or frozen)
        return weights_watched(self._slots.by_part, "teacher", inputs, looking=looking, values=values)


@contextmanager
def _replayed_generator(generator: torch.Generator | None, state: Tensor | None) -> Iterator[None]:
    """Draw from ``state`` in this block; afterwards the generator is as it was before."""
    if generator is None or state is None:
        yield
        return
    before = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(before)
