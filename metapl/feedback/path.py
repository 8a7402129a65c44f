"""The student's steps, from its weights θ to θ′, where the outer loss is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, called
from metapl.execution import checks
from metapl.execution.agreement import SAME_LOSS, check_copies, check_outer_loss, check_shares
from metapl.execution.batch import digest, micro_batches
from metapl.execution.buffers import own_code, unchanged
from metapl.execution.kernels import refuse_checkpoints, refuse_once_differentiable
from metapl.execution.layout import Layout
from metapl.execution.local import NOTHING, LocalStudent, Pass, WeightedLoss, as_leaves, gradient_through, mean_of
from metapl.execution.numerics import Tree, mean_tree
from metapl.execution.rng import RandomState, replayed
from metapl.execution.sharded import student_of
from metapl.execution.writes import refuse_hooks, refuse_stranger, stranger
from metapl.feedback.inner_step import (
    IN_THE_SIGNAL,
    Credits,
    Entry,
    InnerLoss,
    InnerStep,
    Normalized,
    read_batch,
    refuse_unread_labels,
)
from metapl.feedback.keeping import ALL, Keeping, States
from metapl.feedback.lookahead import Lookahead
from metapl.feedback.mean_check import MeanCheck, look_at_inner_losses, outer_check
from metapl.problems.base import Problem, Signal, enters_input, has_own, joined_signals, sum_and_weight
from metapl.updates import Update

REPEATS = 3
"""A branch that is drawn by a fair coin, and not by torch's, is the same in all of these once in eight times."""

Keep = Callable[[int, InnerStep], Keeping]
"""Which of so many steps keep their states, by the size of the first one."""

_NOT_FINITE = (
    "the derivative of the outer loss in the student's weights is NaN or infinite before step {} of the {}: "
    "the steps from there on amplify it without bound. Lower the student's learning rate, or take fewer of the last "
    "steps, Forward(truncate=...)."
)
_LOSS = "some example's loss is not finite, such as a mean over no tokens (0 / 0), or the student has diverged."

Teach = Callable[[Any, Tensor | None], Signal]
"""The teacher's signal about a batch, given the student's outputs on it; None where the signal enters its input."""


@dataclass
class Path:
    """The student's steps from θ to θ′, where the outer loss is taken; no weight moves before :meth:`commit`.

    Args:
        problem, student, update: the losses, the network, and U.
        labeled: the outer batch, in micro-batches.
        batches: the inner ones; a look-ahead that makes them as they are read is asked again on the way back.
        keeping: which steps keep their weights and optimizer state; the adjoint computes the others again.
        check_mean: warn if a loss is not a mean over examples, where ranks or micro-batches share the batch.
    """

    problem: Problem
    student: LocalStudent
    update: Update
    labeled: Sequence[Any]
    batches: Sequence[Any] = ()
    steps: list[InnerStep] = field(default_factory=list)
    keeping: Keeping = ALL
    check_mean: bool = False
    states: States = field(init=False)  # of several steps, where some are computed again
    found: list[Any] = field(default_factory=list, init=False)  # the feedback on the last steps, as plain values
    tell: Callable[[Any], None] | None = None  # of each step that has been taken
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
        return pytree.tree_map_only(Tensor, Tensor.detach, self.steps[-1].moved[1])

    @property
    def inner_loss(self) -> Tensor:
        """The mean of the inner losses over the steps."""
        return mean_of([step.inner_loss for step in self.steps])

    @cached_property
    def outer_loss(self) -> Tensor:
        """L(θ′), without a graph. Cost: one labeled forward pass, unless its gradient has been computed."""
        return self._outer_loss_at(self.params)

    @cached_property
    def outer_loss_before(self) -> Tensor:
        """L(θ), with the dropout masks of L(θ′); one forward pass, and :data:`REPEATS` more on the first step, whose
        values are compared: L(θ) and L(θ′) are to be of one function."""
        loss = self._outer_loss_at(self.student.params)
        for _ in range(REPEATS if self.student.first else 0):
            again = self.student.loss(self.student.params, *self._outer_pass())
            check_outer_loss(again, loss, SAME_LOSS[self.steps[0].passes[0].rounded_to])
        return loss

    def outer_gradient(self) -> Tree:
        """v = ∇L(θ′), one forward and backward pass on the labeled batch (with its own batch statistics)."""
        if self._outer_gradient is None:
            found = self.student.loss_and_gradient(self.steps[-1].new_params, *self._outer_pass())
            self.__dict__["outer_loss"], self._outer_gradient = found
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
        its derivatives are None.

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
        spacing = min(self.keeping.spacings, default=end)
        for number, step in self._backwards(first, end):
            self.refuse_other(number, step.batch)
            if number > first:
                bar, in_signal = step.adjoint(v, state_cotangent, fields(step.signal))
                v, state_cotangent = bar.params, bar.state
                checks.refuse_not_finite(self.student.space.norm(v), _NOT_FINITE.format(number, called("look-ahead")))
                yield step, bar.gradient, in_signal
            elif state_cotangent is None:
                yield step, step.pullback(v), None
            else:
                yield step, step.vjp(v, state_cotangent).gradient, None
            if self.tell is not None:
                self.tell(step.batch)
            if number > first and number % spacing == 0:
                self.states.passed(self, number, v, state_cotangent)

    def _backwards(self, first: int, end: int) -> Iterator[tuple[int, InnerStep]]:
        """The steps from ``end`` to ``first``, with their numbers; forgotten ones are computed again."""
        if self.keeping.spacings:
            yield from self._block(first, 0, end, *self.keeping.spacings)
        else:
            yield from ((n, self.steps[n]) for n in range(end - 1, first - 1, -1))

    def _block(self, first: int, begin: int, end: int, spacing: int, *finer: int) -> Iterator[tuple[int, InnerStep]]:
        """The steps from ``end`` to ``begin``, of which the multiples of ``spacing`` are kept."""
        for start in reversed(range(begin, end, spacing)):
            stop = min(start + spacing, end)
            if stop <= first:
                return
            if finer:
                for number, step in enumerate(self._walked(start, stop), start):
                    self.leave(number, step, finer[0])
                yield from self._block(first, start, stop, *finer)
                continue
            block = list(enumerate(self._walked(start, stop), start))
            while block:
                number, step = block.pop()
                if number >= first:
                    yield number, step
                self.leave(number, step)

    def _walked(self, start: int, stop: int) -> Iterator[InnerStep]:
        """The steps from a kept one on, computed again, but for the last of all, which is held."""
        held = len(self.steps) - 1 if self.steps[-1].grads else len(self.steps)
        params, state = self.states.take(start) if start < held else ({}, None)
        for number in range(start, stop):
            step = self.steps[number]
            if number < held:
                step = step.again(params, state, self.batch(number) if self.rereads else None)
                params, state = step.moved
            yield step

    def keep_before(self, number: int, params: Tree, state: Any) -> None:
        """Leave the step before ``number``; of multiples of the spacing, the state that it has led to goes to disk."""
        if self.keeping.spacings:
            spacing = self.keeping.spacings[0]
            self.steps[-1] = self.leave(number - 1, self.steps[-1], spacing)
            if number % spacing == 0:
                self.states.note(self, number, params, state)

    def leave(self, number: int, step: InnerStep, spacing: int = 0) -> InnerStep:
        """A step without what is computed again, unless it is the last; of multiples of ``spacing`` the state is
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
        """Refuse a batch that is made as it is read, where it is not the one that the student learned from."""
        known = self.steps[number].digest
        if known is None:
            return
        with self.student.ranks.agreed():
            checks.refuse(
                digest(batch) != known,
                f"{called('the function of Lookahead')} returned another batch for step {number} when it was called "
                "again, or wrote to the tensors of an earlier one, so the gradient would be that of another training; "
                "expected new tensors in every call, and the same batch for the same number: draw its examples and "
                "views from a generator that is seeded by the number, torch.Generator().manual_seed(number), or give a "
                "list of batches.",
            )

    def gradients_in_signals(self, truncate: int | None = None) -> list[tuple[InnerStep, dict[str, Tensor | None]]]:
        """The last ``truncate`` steps (None: all), each with dL(θ′)/d(field) for the fields of its signal, by double
        backward through the path; None for a field that the inner loss does not depend on."""
        counted = self.steps[-(truncate or 0) :]
        leaves = [t for step in counted for t in step.signal.differentiable().values()]
        refuse_once_differentiable(self.steps[-1].grads.values())  # whose graph has those of the steps before
        gradients = iter(gradient_through(self.student, self.steps[-1].moved[0], self.outer_gradient(), leaves))
        return [(step, {name: next(gradients) for name in step.signal.differentiable()}) for step in counted]

    def revised(self, h: Tensor | dict[str, Tensor]) -> Path:
        """The path of the real step, on the signal that the problem makes of the feedback on its last one; this path
        where it makes none."""
        if not has_own(self.problem, "revised_signal"):
            return self
        given = self.steps[-1].signal
        name, changeable = "the problem's revised_signal", {"signal": vars(given), "h": h}
        signal = unchanged(name, changeable, self.problem.revised_signal, given, h)
        if signal is None:
            return self
        refuse_hooks(self.student.parameters)
        (step,) = self.steps
        return replace(self, steps=[step.on(signal.detached())])

    def commit(self) -> None:
        """Move the student to θ′, with its optimizer."""
        if not all(step.grads for step in self.steps):
            self.update.write(self.student.parameters, self.params, self.state)
            return
        for step in self.steps:
            self.update.commit(self.student.parameters, step.gradient, partial(getattr, step, "moved"))

    def _outer_loss_at(self, params: Tree) -> Tensor:
        return self.student.loss(params, *self._outer_pass())

    def _outer_pass(self) -> tuple[list[Any], list[WeightedLoss], RandomState]:
        """The student's inputs, their losses, and the start of a random stream.

        The stream is independent of the default one, from whose state after the inner pass the teacher draws.
        """
        start = self.steps[-1].passes[-1].after.branch()
        inputs = [read_batch(self.problem, "outer_input", part) for part in self.labeled]
        check = outer_check(self.problem, self.student.ranks, len(self.labeled)) if self.check_mean else None
        self.check_mean = False
        kinds: set[bool] = set()
        return inputs, [partial(self._outer_loss, part, check, kinds) for part in self.labeled], start

    def _outer_loss(
        self, batch: Any, check: MeanCheck | None, kinds: set[bool], outputs: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """The outer loss on a micro-batch; ``kinds``: whether it was a pair on one of them, and a scalar."""
        if own_code(self.problem.outer_loss):
            value, weight = sum_and_weight(self.problem.outer_loss(outputs, batch))
        else:
            name, given = "the problem's outer_loss", {"outputs": outputs, "batch": batch}
            # With a graph from the outputs on also where the student runs without one, so that another way is seen.
            with torch.enable_grad():
                value, weight = sum_and_weight(unchanged(name, given, self.problem.outer_loss, outputs, batch))
            found = stranger([value], [outputs])
            if id(found) in self.student.own:
                raise MetaplError(
                    f"{name} reads a weight of the student from elsewhere, or what another pass has made of it, such "
                    "as outputs that inner_loss kept, so the feedback would be wrong; expected a loss of the outputs "
                    "and the batch that it is given."
                )
            refuse_stranger(name, found, IN_THE_SIGNAL)
            kinds.add(isinstance(weight, Tensor))
            if len(kinds) > 1:
                raise MetaplError(
                    f"{name} returned a scalar on one micro-batch and (sum, weight) on another; expected the same of "
                    "all: where nothing is left to judge, a sum and a weight of 0."
                )
        if self.student.ranks.copies > 1:
            check_copies([outputs], "outputs of the student on the labeled batch", self.student.ranks)
        if check is not None:
            with replayed(RandomState.now(outputs.device)):
                check.look(outputs, batch)
        return value, weight


def take_steps(
    student: nn.Module | Layout | LocalStudent,
    update: Update,
    problem: Problem,
    *,
    labeled: Any,
    batches: Sequence[Any],
    teach: Teach,
    parts: int = 1,
    keep_graph: bool = False,
    keep_graphs: int = 0,
    keep: Keep | None = None,
    states: States | None = None,
    updates: Sequence[Update] = (),
    credits: Credits = "nothing",
    first: bool = False,
    tell: Callable[[Any], None] | None = None,
) -> Path:
    """The student's steps on the inner batches: Algorithm 1, lines 2 and 3.

    Buffers and generators advance as in training; the weights do not move.

    Args:
        student: the network as it is laid out, or one that has begun a step.
        labeled, batches: the outer batch, and the inner ones, one for each step; those of a look-ahead are read as they
            are taken.
        teach: called for each of the ``parts`` micro-batches of a batch, after the student's pass on it; before all of
            them, where the signal enters its input or is normalized over the batch.
        keep_graph: keep the path differentiable with respect to the signals, for :meth:`Path.gradients_in_signals`.
        keep_graphs: of so many last steps, keep the graphs of the gradients for :meth:`InnerStep.second_derivatives`.
        keep: chooses, by the number of steps and the first one, which of them keep their states.
        states: where these lie, with the steps that a process which was killed has taken; None: as ``keep`` says.
        updates: of each step, where they differ by a schedule.
        credits: what gets the feedback; refuse an inner loss for which it would be wrong.
        first: look closer: warn if a loss is not a mean over examples, and look at the student's operators on an
            accelerator too.
        tell: called with the batch of each step that has been taken.
    """
    if not isinstance(student, LocalStudent):
        student = student_of(student, update.parameters, double_backward=keep_graph, first=first)
    shared, several = first and max(student.ranks.size, parts) > 1, keep_graph and len(batches) > 1
    path = Path(problem, student, update, micro_batches(labeled, parts, "labeled"), batches, check_mean=shared)
    walk = _Walk(path, teach, parts, keep_graph, len(batches) - keep_graphs, credits)
    # A graph of several steps begins at leaves, so that the student's own parameters are in none but by mistake.
    params, state = as_leaves(student.params) if several else student.params, update.read_state()
    done = 0 if states is None else states.done
    if states is not None and done:
        path.states = states
        params, state = states.resume(path, updates)
        path.batch(done - 1)  # of a path that is truncated, no other is read again
    for number in range(done, len(batches)):
        if number > done:
            params, state = path.steps[-1].moved
            path.keep_before(number, params, state)
        with student.ranks.agreed() if isinstance(batches, Lookahead) else NOTHING:
            batch = batches[number]
        if number and path.rereads:
            check_shares([("unlabeled", batch, f" of step {number}")], student.device, student.ranks)
        path.steps.append(walk.step(number, batch, params, state, updates[number] if updates else update))
        if number == 0:
            if isinstance(batches, Lookahead):
                path.batch(0)  # a function that always returns another batch is refused here, not after the path
            if credits != "nothing":
                refuse_unread_labels(path.steps[0])
            if len(batches) > 1:
                path.keeping = ALL if keep is None else keep(len(batches), path.steps[0])
                path.states = states or States(path.keeping.on)
            if shared:
                look_at_inner_losses(path.steps[0])
        for record in path.steps[-1].passes if several or number >= walk.graphs_from else ():
            record.refuse_later_graphs()
        if tell is not None:
            tell(batch)
    if states is not None and len(batches) > max(done, 1):  # a path of one step has no way back
        states.note(path, len(batches), *path.steps[-1].moved)
    return path


@dataclass(frozen=True)
class _Walk:
    """The steps of a path, one after the other; the arguments are those of :func:`take_steps`."""

    path: Path
    teach: Teach
    parts: int
    keep_graph: bool
    graphs_from: int  # the first step that keeps the graph of its gradient
    credits: Credits

    def step(self, number: int, batch: Any, params: Tree, state: Any, update: Update) -> InnerStep:
        """The step on a batch, from these weights and this state of the optimizer."""
        path, problem, student = self.path, self.path.problem, self.path.student
        several, entering, keeps = len(path.batches) > 1, enters_input(problem), number >= self.graphs_from
        normalizing = has_own(problem, "normalized_signal")
        before = entering or normalizing  # whether the teacher is asked before the student runs
        at = f" (step {number} of the {called('look-ahead')})" if several else ""
        pieces = micro_batches(batch, self.parts, "unlabeled")
        passes, entries, found = list[Pass](), list[Entry](), list[tuple[Tensor, Tree]]()
        signals = [self._asked(x, None, params) for x in pieces] if before else []
        norm = Normalized(problem, joined_signals(signals), student.ranks) if normalizing else None
        whole = self._united(signals if norm is None else [norm.signal]) if before else None
        of_piece = signals if whole is None else whole.chunks(self.parts)
        for i, x in enumerate(pieces):
            if entering:
                entries.append(Entry(problem, x, of_piece[i], self.keep_graph))
            inputs = entries[i].given if entering else read_batch(problem, "student_input", x)
            with refuse_checkpoints() if keeps or (self.keep_graph and several) else NOTHING:
                passes.append(student.pass_type(student, params, inputs, keeps).run())  # z = S(x; θ)
            outputs = passes[i].outputs
            if student.ranks.copies > 1:
                check_copies([outputs], "outputs of the student", student.ranks)
            with student.ranks.agreed():
                given = {"outputs": outputs, "labeled": path.labeled[i], "unlabeled": x}
                unchanged("the problem's check", given, problem.check, *given.values())
                checks.refuse_not_finite(outputs, checks.DIVERGED.format("student") + at)
            if not before:
                signals.append(self._asked(x, outputs, params))
            if before or not self.keep_graph:
                leaves = as_leaves(of_piece[i].differentiable()) if keeps else {}
                loss = InnerLoss(problem, of_piece[i].having(leaves), x, student, self.credits)
                # Line 3: g = ∇ (1/B) Σ ℓ_i(z, signal)
                found.append(passes[i].gradient(loss, list(leaves.values())))
        if whole is None:
            whole = signals[0] if self.parts == 1 and not self.keep_graph else self._united(signals)
        if not found:  # no graph is freed before the path is differentiated in the signal as a whole
            for record, part, x in zip(passes, whole.chunks(self.parts), pieces, strict=True):
                found.append(record.gradient(InnerLoss(problem, part, x, student, self.credits)))
        inner_loss, grads = mean_of([loss for loss, _ in found]), mean_tree([g for _, g in found])
        if several:
            checks.refuse_not_finite(inner_loss, f"the inner loss is NaN or infinite{at}: {_LOSS}")
        known = digest(batch) if isinstance(path.batches, Lookahead) else None
        taken = problem, update, passes, batch, whole, inner_loss, grads, state
        return InnerStep(*taken, entries, as_taken=several, digest=known, normalized=norm)

    def _asked(self, x: Any, outputs: Tensor | None, params: Tree) -> Signal:
        """Line 2: ŷ ~ T(x), or the soft label; of a problem that reads the student itself, as it is in this step."""
        student, ranks = self.path.student, self.path.student.ranks
        at_own = params is student.params or own_code(self.path.problem.signal)
        with ranks.agreed(), NOTHING if at_own else student.holding(params):
            signal = self.teach(x, outputs).detached()
        if ranks.copies > 1:
            check_copies(list(signal.fields().values()), "signals of the teacher", ranks)
        return signal

    def _united(self, signals: Sequence[Signal]) -> Signal:
        """The whole signal; with ``keep_graph``, the leaf that the path is differentiated with respect to."""
        whole = joined_signals(signals)
        for t in whole.differentiable().values() if self.keep_graph else ():
            t.requires_grad_()
        return whole
