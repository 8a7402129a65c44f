"""The student's steps, from its weights θ to θ′, where the outer loss is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl import checks
from metapl.batch import micro_batches
from metapl.distributed.layout import Layout
from metapl.distributed.means import warn_unless_mean
from metapl.distributed.ranks import Ranks
from metapl.execution.agreement import check_copies
from metapl.execution.choice import student_of
from metapl.execution.hooks import refuse_hooks
from metapl.execution.kernels import refuse_checkpoints
from metapl.execution.local import LocalStudent, Loss, Pass, as_leaves, gradient_through, mean_of
from metapl.execution.rng import RandomState
from metapl.feedback.inner_step import InnerStep, mean_inner_loss
from metapl.numerics import Tree, mean_tree
from metapl.problems.base import Problem, Signal, joined_signals
from metapl.updates import Update

Teach = Callable[[Any, Tensor], Signal]
"""The teacher's signal about a batch, given the student's outputs on it."""


@dataclass
class Path:
    """The student's steps from θ to θ′, where the outer loss is taken; no weight moves before :meth:`commit`.

    Args:
        problem, student, update: the losses, the network, and U.
        labeled: the outer batch, in micro-batches.
        steps: at least one.
        keep_every: every so many steps, one is kept with its weights, gradient and optimizer state; the adjoint
            computes the others again.
        check_mean: warn if the outer loss is not a mean over examples.
    """

    problem: Problem
    student: LocalStudent
    update: Update
    labeled: Sequence[Any]
    steps: list[InnerStep] = field(default_factory=list)
    keep_every: int = 1
    check_mean: bool = False

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
        """The mean of the inner losses over the steps, a scalar."""
        return mean_of([step.inner_loss for step in self.steps])

    @cached_property
    def outer_loss(self) -> Tensor:
        """L(θ′), without a graph. Cost: one labeled forward pass, unless its gradient has been computed."""
        return self._outer[0] if "_outer" in self.__dict__ else self._outer_loss_at(self.params)

    @cached_property
    def outer_loss_before(self) -> Tensor:
        """L(θ), with the dropout masks of L(θ′); one forward pass."""
        return self._outer_loss_at(self.student.params)

    def known_outer_loss(self) -> dict[str, Tensor]:
        """``{"outer_loss": L(θ′)}`` if an estimator has computed it, else an empty dict."""
        known = "_outer" in self.__dict__ or "outer_loss" in self.__dict__
        return {"outer_loss": self.outer_loss} if known else {}

    def outer_gradient(self) -> Tree:
        """v = ∇L(θ′), one forward and backward pass on the labeled batch (with its own batch statistics)."""
        return self._outer[1]

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
        v, state_cotangent = self.outer_gradient(), None
        first = 0 if truncate is None else max(0, len(self.steps) - truncate)
        for number, step in self._backwards(first):
            if number > first:
                bar = step.adjoint(v, state_cotangent, fields(step.signal))
                v, state_cotangent = bar.params, bar.state
                yield step, bar.w, bar.in_signal
            elif state_cotangent is None:
                yield step, step.pullback(v), None
            else:
                bar_first = step.update.vjp(step.params, step.gradient, step.state, v, state_cotangent)
                yield step, bar_first.gradient, None

    def _backwards(self, first: int) -> Iterator[tuple[int, InnerStep]]:
        """The steps from the last to ``first``, with their numbers; forgotten ones are computed again."""
        end = len(self.steps)
        while end > first:
            start = (end - 1) // self.keep_every * self.keep_every
            block = [replace(self.steps[start])]  # a copy, so that θ′ and s′ are cached no longer than the block
            for step in self.steps[start + 1 : end]:
                block.append(step.again(*block[-1].moved))
            end = start
            while block and start + len(block) > first:
                number = start + len(block) - 1
                yield number, block.pop()
                if not self.steps[number].kept:
                    self.steps[number].forgotten()  # the passes had their weights back

    def forget(self) -> None:
        """Drop the weights, gradient and optimizer state of the last step but one, unless it is to be kept."""
        number = len(self.steps) - 2
        if number >= 0 and self.keep_every > 1:
            step = self.steps[number]
            # A copy of a step that is kept has nothing cached.
            self.steps[number] = replace(step) if number % self.keep_every == 0 else step.forgotten()

    def gradients_in_signals(self, truncate: int | None = None) -> list[tuple[InnerStep, dict[str, Tensor | None]]]:
        """dL(θ′)/d(field) for the fields of each signal, by double backward through the path.

        Args:
            truncate: the number of last steps; None: all.

        Returns: each step with its derivatives by field; None for a field that the inner loss does not depend on.
        """
        counted = self.steps[-(truncate or 0) :]
        leaves = [t for step in counted for t in step.signal.differentiable().values()]
        gradients = iter(gradient_through(self.student, self.steps[-1].moved[0], self.outer_gradient(), leaves))
        return [(step, {name: next(gradients) for name in step.signal.differentiable()}) for step in counted]

    def revised(self, h: Tensor) -> Path:
        """The path of the real step, on the signal that the problem makes of the feedback on its last one; this path
        where it makes none."""
        signal = self.problem.revised_signal(self.steps[-1].signal, h)
        if signal is None:
            return self
        refuse_hooks(self.student.parameters)
        (step,) = self.steps
        return replace(self, steps=[step.on(signal.detached())])

    def commit(self) -> None:
        """Move the student to θ′, with its optimizer."""
        if not all(step.kept for step in self.steps):
            self.update.write(self.student.parameters, self.params, self.state)
            return
        for step in self.steps:
            step.commit(self.student.parameters)

    @cached_property
    def _outer(self) -> tuple[Tensor, Tree]:
        return self.student.loss_and_gradient(self.params, *self._outer_pass())

    def _outer_loss_at(self, params: Tree) -> Tensor:
        return self.student.loss(params, *self._outer_pass())

    def _outer_pass(self) -> tuple[list[Any], list[Loss], RandomState]:
        """The student's inputs, their losses, and the start of a random stream.

        The stream is independent of the default one, from whose state after the inner pass the teacher draws.
        """
        start = self.steps[-1].passes[-1].after.branch()
        inputs = [self.problem.outer_input(part) for part in self.labeled]
        ranks = self.student.ranks if self.check_mean else None
        return inputs, [_outer_loss(self.problem, part, self.student.ranks, ranks) for part in self.labeled], start


def take_steps(
    student: nn.Module | Layout,
    update: Update,
    problem: Problem,
    *,
    labeled: Any,
    batches: Sequence[Any],
    teach: Teach,
    parts: int = 1,
    keep_graph: bool = False,
    keep_every: int = 1,
    first: bool = False,
) -> Path:
    """The student's steps on the inner batches: Algorithm 1, lines 2 and 3.

    Buffers and generators advance as in training; the weights do not move.

    Args:
        student, update, problem: the network as it is laid out, U and the losses.
        labeled: the outer batch.
        batches: the inner batches, one for each step.
        teach: called once for each micro-batch, after the student's pass on it.
        parts: the number of micro-batches in a batch.
        keep_graph: keep the path differentiable with respect to the signals, for :meth:`Path.gradients_in_signals`.
        keep_every: see :class:`Path`.
        first: look closer: warn if the outer loss is not a mean over examples, where ranks share the batch, and look at
            the student's operators on an accelerator too.
    """
    own = student_of(student, update.parameters, double_backward=keep_graph, looking=first)
    pieces = micro_batches(labeled, parts, "labeled")
    shared = first and own.ranks.size > 1
    path = Path(problem, own, update, pieces, keep_every=keep_every, check_mean=shared)
    several = keep_graph and len(batches) > 1
    # A graph of several steps begins at leaves, so that the student's own parameters are in none but by mistake.
    params, state = as_leaves(own.params) if several else own.params, update.read_state()
    for batch in batches:
        if path.steps:
            params, state = path.steps[-1].moved
        path.steps.append(_step(path, batch, params, state, teach, refuse_checkpoints if several else nullcontext))
        path.forget()
        for record in path.steps[-1].passes if several else ():
            record.refuse_later_graphs()
    return path


def _step(
    path: Path, batch: Any, params: Tree, state: Any, teach: Teach, around: Callable[[], AbstractContextManager[None]]
) -> InnerStep:
    """One step; ``around``: what the student's passes run in."""
    passes: list[Pass] = []
    signals: list[Signal] = []
    losses: list[Tensor] = []
    grads: list[Tree] = []
    batches = micro_batches(batch, len(path.labeled), "unlabeled")

    def learn(record: Pass, signal: Signal, x: Any) -> None:
        loss, gradient = record.gradient(mean_inner_loss(path.problem, signal, x))  # line 3: g
        checks.dense_gradients(gradient)
        losses.append(loss)
        grads.append(gradient)

    for x, labeled in zip(batches, path.labeled, strict=True):
        with around():
            record = path.student.run(params, path.problem.student_input(x))
        check_copies([record.outputs], "outputs of the student", path.student.ranks)
        with path.student.ranks.agreed():
            path.problem.check(record.outputs, labeled, x)
            checks.finite_student(record.outputs)
        with path.student.ranks.agreed():
            signal = teach(x, record.outputs).detached()  # line 2: ŷ ~ T(x), or the soft label
        check_copies([t for t in vars(signal).values() if t is not None], "signals of the teacher", path.student.ranks)
        passes.append(record)
        signals.append(signal)
        if not path.student.double_backward:
            learn(record, signal, x)
    signal = joined_signals(signals)
    if path.student.double_backward:
        # The whole signal is the leaf that the path is differentiated with respect to; no graph is freed before anyway.
        for t in signal.differentiable().values():
            t.requires_grad_()
        for record, part, x in zip(passes, signal.chunks(len(passes)), batches, strict=True):
            learn(record, part, x)
    return InnerStep(
        path.problem,
        path.update,
        passes,
        batch,
        signal,
        mean_of(losses),
        mean_tree(grads),
        state,
    )


def _outer_loss(problem: Problem, batch: Any, all_ranks: Ranks, ranks: Ranks | None) -> Loss:
    """The outer loss on a batch; with ``ranks``, it is checked to be a mean over examples."""

    def loss(outputs: Tensor, params: Tree) -> Tensor:
        value = problem.outer_loss(outputs, batch)
        checks.scalar_loss(value, "the problem's outer_loss")
        check_copies([outputs], "outputs of the student on the labeled batch", all_ranks)
        if ranks is not None and not checks.waits(value):
            warn_unless_mean(problem.outer_loss, outputs.detach(), batch, value, ranks)
        return value

    return loss
