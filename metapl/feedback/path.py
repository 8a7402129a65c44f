"""The student's steps from θ to θ′, where the outer loss is taken, and their adjoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.execution import checks
from metapl.execution.batch import digest, length, micro_batches
from metapl.execution.layout import Layout
from metapl.execution.local import NOTHING, LocalStudent, Pass, WeightedLoss, as_leaves, mean_of
from metapl.execution.numerics import Tree, mean_tree
from metapl.execution.rng import RandomState, replayed
from metapl.execution.sharded import student_of
from metapl.execution.state import replay
from metapl.feedback.credit import Credited, credited
from metapl.feedback.inner_step import InnerLoss, InnerStep, SignalInput
from metapl.feedback.keeping import ALL, Keeping, States
from metapl.feedback.lookahead import Lookahead
from metapl.problems.base import Problem, Signal, enters_input, joined_signals, sum_and_weight
from metapl.updates import Update

Keep = Callable[[int, InnerStep], Keeping]
"""Which of K steps keep their states, by K and the first step, whose size is known."""

Teach = Callable[[Any, Tensor | None], Signal]
"""The teacher's signal about a batch, given the student's outputs on it; None where the signal enters its input."""


@dataclass
class Path:
    """The student's steps from θ to θ′, where the outer loss is taken; no weight moves before :meth:`commit`.

    Args:
        problem, student, update: the losses, the network, and U.
        labeled: the outer batch, in micro-batches.
        batches: the inner ones; a look-ahead whose batches a function returns is asked again by the adjoint.
        keeping: which steps keep their weights and optimizer state; the adjoint computes the others again.
    """

    problem: Problem
    student: LocalStudent
    update: Update
    labeled: Sequence[Any]
    batches: Sequence[Any] = ()
    steps: list[InnerStep] = field(default_factory=list)
    keeping: Keeping = ALL
    states: States = field(init=False)  # of several steps, where some are computed again
    feedback: list[Any] = field(default_factory=list, init=False)  # on the last steps so far, as plain values
    progress: Callable[[Any], None] | None = None  # called with the batch of each step of the adjoint
    _outer_gradient: Tree | None = field(default=None, init=False)

    @property
    def rereads(self) -> bool:
        """Whether a batch that is needed again is read again, and not held."""
        return isinstance(self.batches, Lookahead)

    @property
    def params(self) -> Tree:
        """θ′ after the last step, without a graph."""
        return self.steps[-1].new_params

    @property
    def state(self) -> Any:
        """The optimizer's state after the last step, without a graph."""
        return pytree.tree_map_only(Tensor, Tensor.detach, self.steps[-1].updated[1])

    @property
    def inner_loss(self) -> Tensor:
        """The mean of the inner losses over the steps."""
        return self.steps[0].inner_loss if len(self.steps) == 1 else mean_of([step.inner_loss for step in self.steps])

    @cached_property
    def outer_loss(self) -> Tensor:
        """L(θ′), without a graph. Cost: one labeled forward pass, unless its gradient has been computed."""
        return self._outer_loss_at(self.params)

    @cached_property
    def outer_loss_before(self) -> Tensor:
        """L(θ), with the dropout masks of L(θ′); one forward pass."""
        return self._outer_loss_at(self.student.params)

    def outer_gradient(self) -> Tree:
        """v = ∇L(θ′), one forward and backward pass on the labeled batch (with its own batch statistics)."""
        if self._outer_gradient is None:
            # L(θ′) comes with its gradient: it is put where the property of that name keeps it.
            loss, v = self.student.loss_and_gradient(self.steps[-1].new_params, *self._outer_pass())
            self.__dict__["outer_loss"], self._outer_gradient = loss, v
        return self._outer_gradient

    def outer_gradient_before(self) -> Tree:
        """∇L(θ), one forward and backward pass on the labeled batch."""
        self.__dict__["outer_loss_before"], v = self.student.loss_and_gradient(self.student.params, *self._outer_pass())
        return v

    def pullback(self) -> tuple[InnerStep, Tree]:
        """The step of a path with one step, and its w = (∂U/∂g)ᵀ v."""
        (step,) = self.steps
        return step, step.pullback(self.outer_gradient())

    def adjoints(
        self, fields: Callable[[Signal], Mapping[str, Tensor]], truncate: int | None = None
    ) -> Iterator[tuple[InnerStep, Tree, dict[str, Tensor | None] | None]]:
        """The steps from the last to the first, each with its w and the derivatives of ⟨g, w⟩ in fields of the signal.

        The derivatives are computed together with the step's Hessian product. The first step needs no Hessian product;
        its derivatives are None. Steps whose states were not kept are computed again.

        Args:
            fields: returns the fields of a step's signal, with the values at which the derivatives are taken.
            truncate: the number of last steps; None: all.
        """
        if len(self.steps) == 1:
            yield self.steps[0], self.steps[0].pullback(self.outer_gradient()), None
            return
        first, end = 0 if truncate is None else max(0, len(self.steps) - truncate), len(self.steps)
        if self.states.adjoint is None:
            v, state_cotangent = self.outer_gradient(), None
        else:
            end, v, state_cotangent = (self.states.adjoint[name] for name in ("at", "v", "state_cotangent"))
        spacings = self.keeping.spacings
        held = ((n, self.steps[n]) for n in range(end - 1, first - 1, -1))
        for number, step in self._backwards(first, 0, end, *spacings) if spacings else held:
            self.refuse_other(number, step.batch)
            if number > first:
                bar, in_signal = step.adjoint(v, state_cotangent, fields(step.signal))
                v, state_cotangent = bar.params, bar.state
                checks.refuse_not_finite(
                    self.student.space.norm(v),
                    f"the derivative of the outer loss is NaN or infinite before step {number} of the look-ahead: the "
                    "steps from there on amplify it without bound. Lower the student's learning rate, or differentiate "
                    "fewer of the last steps, Forward(truncate=...).",
                )
                yield step, bar.gradient, in_signal
            elif state_cotangent is None:
                yield step, step.pullback(v), None
            else:
                yield step, step.vjp(v, state_cotangent).gradient, None
            if self.progress is not None:
                self.progress(step.batch)
            if number > first and number % min(spacings, default=end) == 0:
                self.states.passed(self, number, v, state_cotangent)

    def _backwards(
        self, first: int, begin: int, end: int, spacing: int, *finer: int
    ) -> Iterator[tuple[int, InnerStep]]:
        """The steps from ``end`` to ``begin`` with their numbers, but none before ``first``; of these the multiples of
        ``spacing`` have their states, and each block between two of them is computed again."""
        for start in reversed(range(begin, end, spacing)):
            stop = min(start + spacing, end)
            if stop <= first:
                return
            if finer:
                for number, step in enumerate(self._recomputed(start, stop), start):
                    self.forget(number, step, finer[0])
                yield from self._backwards(first, start, stop, *finer)
                continue
            block = list(enumerate(self._recomputed(start, stop), start))
            while block:
                number, step = block.pop()
                if number >= first:
                    yield number, step
                self.forget(number, step)

    def _recomputed(self, start: int, stop: int) -> Iterator[InnerStep]:
        """The steps from one on whose state was kept, computed again; the last step of the path still has its own."""
        held = len(self.steps) - 1 if self.steps[-1].grads else len(self.steps)
        params, state = self.states.take(start) if start < held else ({}, None)
        for number in range(start, stop):
            step = self.steps[number]
            if number < held:
                step = step.recomputed(params, state, self.batch(number) if self.rereads else None)
                params, state = step.updated
            yield step

    def forget(self, number: int, step: InnerStep, spacing: int = 0) -> InnerStep:
        """A step without what can be computed again, unless it is the last; of multiples of ``spacing`` the state is
        kept."""
        if number == len(self.batches) - 1:
            return step
        if spacing and number % spacing == 0:
            self.states.keep(number, (step.params, step.state))
        return step.forgotten(self.rereads)

    def batch(self, number: int) -> Any:
        """An inner batch once more; refuse one that is not the same."""
        # A function may seed the default generator.
        with self.student.ranks.agreed(), replayed(RandomState.now(self.student.device)):
            batch = self.batches[number]
        self.refuse_other(number, batch)
        return batch

    def refuse_other(self, number: int, batch: Any) -> None:
        """Refuse a batch that a function returns, where it is not the one that the student learned from."""
        expected = self.steps[number].digest
        if expected is not None:
            with self.student.ranks.agreed():
                checks.refuse(
                    digest(batch) != expected,
                    f"the function of Lookahead returned another batch for step {number} when it was called again; "
                    "expected the same batch for the same number: torch.Generator().manual_seed(number).",
                )

    def gradients_in_signals(self, truncate: int | None = None) -> list[tuple[InnerStep, dict[str, Tensor | None]]]:
        """The last ``truncate`` steps (None: all), each with dL(θ′)/d(field) for the fields of its signal, by double
        backward through the path; None for a field that the inner loss does not depend on."""
        counted, v = self.steps[-(truncate or 0) :], self.outer_gradient()
        leaves = [t for step in counted for t in step.signal.differentiable().values()]
        ends = {name: p for name, p in self.steps[-1].updated[0].items() if p.requires_grad}  # θ′
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if ends:
            with replay(RandomState.now(self.student.device), self.student.slots):  # checkpoints run again here, at θ
                cotangents = [v[name] for name in ends]
                gradients = torch.autograd.grad([*ends.values()], leaves, cotangents, allow_unused=True)
        of_field = iter(gradients)
        return [(step, {name: next(of_field) for name in step.signal.differentiable()}) for step in counted]

    def revised(self, h: Tensor | dict[str, Tensor]) -> Path:
        """The path of the real step, on the signal that the problem makes of the feedback on its last one; this path
        where it makes none."""
        step = self.steps[-1]
        signal = self.problem.revised_signal(step.signal, h)
        return self if signal is None else replace(self, steps=[step.with_signal(signal.detached())])

    def commit(self) -> None:
        """Move the student to θ′, with its optimizer."""
        if not all(step.grads for step in self.steps):  # some were forgotten
            self.update.write(self.student.parameters, self.params, self.state)
            return
        for step in self.steps:
            self.update.commit(self.student.parameters, step.gradient, partial(getattr, step, "updated"))

    def _outer_loss_at(self, params: Tree) -> Tensor:
        return self.student.loss(params, *self._outer_pass())

    def _outer_pass(self) -> tuple[list[Any], list[WeightedLoss], RandomState]:
        """The student's inputs, their losses, and the start of a random stream.

        The stream is independent of the default one, from whose state after the inner pass the teacher draws.
        """
        problem = self.problem

        def loss(part: Any, outputs: Tensor) -> tuple[Tensor, Tensor | float]:
            return sum_and_weight(problem.outer_loss(outputs, part))

        inputs = [*map(problem.outer_input, self.labeled)]
        return inputs, [partial(loss, part) for part in self.labeled], self.steps[-1].passes[-1].after.branch()


def take_steps(
    student: nn.Module | Layout | LocalStudent,
    update: Update,
    problem: Problem,
    labeled: Any,
    batches: Sequence[Any],
    teach: Teach,
    *,
    parts: int = 1,
    keep_graph: bool = False,
    graph_of: Credited | None = None,
    keep: Keep | None = None,
    states: States | None = None,
    updates: Sequence[Update] = (),
    progress: Callable[[Any], None] | None = None,
) -> Path:
    """The student's steps on the inner batches: Algorithm 1, lines 2 and 3.

    Buffers and generators advance as in training; the weights do not move.

    Args:
        student: a module, its layout, or a student of this step (:func:`metapl.execution.sharded.student_of`).
        labeled, batches: the outer batch, and the inner ones, one for each step; those of a look-ahead are read as they
            are taken.
        teach: called for each of the ``parts`` micro-batches of a batch, after the student's pass on it; before all of
            them where the signal enters its input, and once for all where it is of the whole batch.
        keep_graph: keep the path differentiable with respect to the signals, for :meth:`Path.gradients_in_signals`.
        graph_of: of one step, what g keeps a graph in, for :meth:`Pass.in_leaves`.
        keep: chooses, by the number of steps and the first one, which of them keep their states.
        states: where these lie, with the steps that a process which was killed has taken; None: as ``keep`` says.
        updates: of each step, where they differ by a schedule.
        progress: called with the batch of each step that has been taken.
    """
    if not isinstance(student, LocalStudent):
        student = student_of(student, double_backward=keep_graph)
    several = len(batches) > 1
    path = Path(problem, student, update, micro_batches(labeled, parts, "labeled"), batches)
    if not student.ranks.alone:
        student.ranks.equal(length(labeled), "the outer batch")
    # A graph of several steps begins at leaves, so that the student's own parameters are in none but by mistake.
    params = as_leaves(student.params) if several and keep_graph else student.params
    state, done = update.read_state(), 0 if states is None else states.done
    if states is not None and done:
        path.states = states
        params, state = states.resume(path, updates)
        path.batch(done - 1)  # of a path that is truncated, no other is read again
    for number in range(done, len(batches)):
        if number > done:
            params, state = path.steps[-1].updated
            if path.keeping.spacings:
                spacing = path.keeping.spacings[0]
                path.steps[-1] = path.forget(number - 1, path.steps[-1], spacing)
                if number % spacing == 0:  # what lies in a folder goes on from here
                    path.states.note(path, number, params, state)
        with student.ranks.agreed() if isinstance(batches, Lookahead) else NOTHING:
            batch = batches[number]
        rule = updates[number] if updates else update
        path.steps.append(_step(path, batch, params, state, rule, teach, parts, keep_graph, graph_of))
        if number == 0 and several:
            if isinstance(batches, Lookahead):
                path.batch(0)  # a function that always returns another batch is refused here, not after the path
            path.keeping = ALL if keep is None else keep(len(batches), path.steps[0])
            path.states = states or States(path.keeping.on)
        if progress is not None:
            progress(batch)
    if states is not None and len(batches) > max(done, 1):  # a path of one step has no way back
        states.note(path, len(batches), *path.steps[-1].updated)
    return path


def _step(
    path: Path,
    batch: Any,
    params: Tree,  # θ
    state: Any,  # s, of the inner optimizer
    update: Update,
    teach: Teach,
    parts: int,
    keep_graph: bool,
    graph_of: Credited | None,
) -> InnerStep:
    """One step of the student on a batch, in micro-batches; no weight moves."""
    problem, student, ranks = path.problem, path.student, path.student.ranks
    enters = enters_input(problem)
    pieces = [batch] if parts == 1 else micro_batches(batch, parts, "unlabeled")
    if not ranks.alone:
        ranks.equal(length(batch), "the inner batch")
    graph_of = None if enters else graph_of  # the derivative through the input is another one

    def ask_teacher(x: Any, outputs: Tensor | None) -> Signal:
        """Line 2: ŷ ~ T(x), or the soft label; of a problem that reads the student itself, as it is in this step."""
        if ranks.alone and params is student.params:
            return teach(x, outputs).detached()
        with NOTHING if params is student.params else student.holding(params), ranks.agreed():
            return teach(x, outputs).detached()

    def loss_and_gradient(i: int) -> tuple[Tensor, Tree]:
        """Line 3: g = ∇ (1/B) Σ ℓ_i(z, signal), of a micro-batch, and the value of the loss."""
        signal, leaves = signals[i], dict[str, Tensor]()
        if graph_of is not None:
            leaves = as_leaves(credited(signal, graph_of))
            signal = signal.having(leaves)
        loss = InnerLoss(problem, signal, pieces[i], student.readable, leaves.get("factors"))
        return passes[i].gradient(loss, [*leaves.values()])

    signals, passes = list[Signal](), list[Pass]()
    signal_inputs, results = list[SignalInput](), list[tuple[Tensor, Tree]]()
    if signal_first := enters or problem.signal_of_batch:
        asked_about = [batch] if problem.signal_of_batch else pieces
        whole = _joined([ask_teacher(x, None) for x in asked_about], keep_graph)
        signals = whole.chunks(parts)
    for i, x in enumerate(pieces):
        if enters:
            signal_inputs.append(SignalInput(problem, x, signals[i], keep_graph))
        inputs = signal_inputs[i].inputs if enters else problem.student_input(x)
        passes.append(inner_pass := student.pass_type(student, params, inputs))  # z = S(x; θ)
        with NOTHING if ranks.alone else ranks.agreed():
            problem.check(inner_pass.outputs, path.labeled[i], x)
        if not signal_first:
            signals.append(ask_teacher(x, inner_pass.outputs))
        if not keep_graph:  # one graph at a time
            results.append(loss_and_gradient(i))
    if not signal_first:
        whole = signals[0] if parts == 1 and not keep_graph else _joined(signals, keep_graph)
    if keep_graph:  # by parts of the leaf that the path is differentiated in
        signals = whole.chunks(parts)
        results = [loss_and_gradient(i) for i in range(parts)]
    if parts == 1:
        ((inner_loss, grads),) = results
    else:
        inner_loss, grads = mean_of([loss for loss, _ in results]), mean_tree([g for _, g in results])
    return InnerStep(
        problem,
        update,
        passes,
        batch,
        whole,
        inner_loss,
        grads,
        state,
        signal_inputs,
        by_optimizer=len(path.batches) > 1,
        digest=digest(batch) if path.rereads else None,
    )


def _joined(signals: Sequence[Signal], keep_graph: bool) -> Signal:
    """The signal about the whole batch; with ``keep_graph``, the leaf that the path is differentiated in."""
    whole = signals[0] if len(signals) == 1 else joined_signals(signals)
    for t in whole.differentiable().values() if keep_graph else ():
        t.requires_grad_()
    return whole
