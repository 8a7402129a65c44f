"""The student's steps from θ to θ′, where the outer loss is taken, and their adjoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.execution import checks
from metapl.execution.batch import digest, joined, leaves_of, length, micro_batches
from metapl.execution.local import NOTHING, LocalStudent, Loss, Pass, as_leaves, mean_of
from metapl.execution.numerics import Tree, mean_tree
from metapl.execution.state import RandomState, State, replay, replayed
from metapl.feedback.door import FirstLook, current_look
from metapl.feedback.inner_step import Credited, InnerStep, SignalInput, credited, inner_loss
from metapl.feedback.keeping import ALL, Keeping, States
from metapl.feedback.lookahead import InnerBatches
from metapl.feedback.order import Order
from metapl.feedback.replays import ReplayCheck
from metapl.problems.base import (
    Problem,
    Signal,
    enters_input,
    is_mean_over_rows,
    joined_signals,
    outer_input,
    reads_signal_in_outer_input,
    sum_and_weight,
)
from metapl.updates import Options, Update

OTHER_BATCH = (
    "the function of Lookahead returned another batch for step {} when it was called again; "
    "expected the same."
)
LOSS_NOT_FINITE = (
    "the inner loss is NaN or infinite in step {} of the look-ahead: its batch has such values, "
    "or the student has diverged; lower its learning rate, or look for extreme values."
)
NOT_FINITE = (
    "the derivative of the outer loss is NaN or infinite before step {} of the look-ahead; lower "
    "the student's learning rate, or differentiate fewer of the last steps, Forward(truncate=...)."
)


@dataclass(frozen=True)
class OuterLosses:
    r"""One outer loss for each step k = 1, …, K, at the θ_k that it leads to; in the place of L(θ_K) alone.

    .. math:: L = \sum_k \mathrm{weight}_k L_k(\theta_k)
    """

    batches: Sequence[Any]
    weights: Sequence[float]

    def total(self, losses: Tensor) -> Tensor:
        """Return the weighted sum of L_k(θ_k), (K,)."""
        return (losses * torch.tensor(self.weights, dtype=torch.float64).to(losses)).sum()


@dataclass
class Path:
    """The student's steps from θ to θ′, where the outer loss is taken.

    No weight moves before :meth:`commit`.
    """

    problem: Problem
    student: LocalStudent
    update: Update  # U
    outer_micro_batches: Sequence[Any]
    inner_batches: InnerBatches
    steps: list[InnerStep] = field(default_factory=list)
    # The outer batch as one, where the outer loss may be no mean over micro-batches.
    whole_outer_batch: Any = None
    keeping: Keeping = ALL  # which steps keep their states; the adjoint computes the others again
    replays: ReplayCheck | None = None  # whether these come out as they did; None: nothing looks
    states: States = field(init=False)  # of several steps, where some are computed again
    progress: Callable[[], object] | None = None  # called after each step of the adjoint
    wrt: Sequence[
        str
    ] = ()  # settings of the optimizer, and "start": what the gradient is in besides the signals
    start: Tree = field(default_factory=dict, init=False)  # dL(θ′)/dθ, where it is asked for
    in_settings: list[Options] = field(default_factory=list, init=False)  # on the last steps so far
    # Of each step; ``outer_micro_batches`` are then those of the last.
    outer: OuterLosses | None = None
    losses_before: dict[int, Tensor] = field(
        default_factory=dict, init=False
    )  # L_k by k, of all steps but the last
    order: Order | None = None  # of differentiation
    is_tried: bool = False  # whether that is being chosen, by this path
    _outer_gradient: Tree | None = field(default=None, init=False)

    @property
    def settings(self) -> list[str]:
        return [name for name in self.wrt if name != "start"]

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
        steps = self.steps
        return (
            steps[0].inner_loss if len(steps) == 1 else mean_of([step.inner_loss for step in steps])
        )

    @cached_property
    def outer_loss(self) -> Tensor:
        """L(θ′), without a graph.

        Cost: one labeled forward pass, unless its gradient has been computed.
        """
        return self._outer(self.params)[0]

    @property
    def outer_losses(self) -> Tensor | None:
        """L_k(θ_k) after each step, (K,), where each has an outer loss.

        Known once the path has been differentiated.
        """
        if self.outer is None:
            return None
        before = [self.losses_before[number] for number in range(1, len(self.steps))]
        return torch.stack([*before, self.outer_loss])

    @property
    def whole_outer_loss(self) -> Tensor:
        """L(θ′), or the sum over the steps where each has an outer loss."""
        losses = self.outer_losses
        return self.outer_loss if losses is None or self.outer is None else self.outer.total(losses)

    @property
    def known_outer_losses(self) -> list[Tensor]:
        """The outer losses that have been taken so far.

        L(θ′), L(θ), and L_k after the steps before the last.
        """
        cached = [
            vars(self)[name] for name in ("outer_loss", "outer_loss_before") if name in vars(self)
        ]
        return [*cached, *self.losses_before.values()]

    @cached_property
    def outer_loss_before(self) -> Tensor:
        """L(θ), with the dropout masks of L(θ′); one forward pass."""
        return self._outer(self.student.params)[0]

    def outer_gradient(self) -> Tree:
        """v = ∇L(θ′), one forward and backward pass on the labeled batch (with its own batch statistics)."""
        if self._outer_gradient is None:
            # L(θ′) comes with its gradient: it is put where the property of that name keeps it.
            self.__dict__["outer_loss"], self._outer_gradient = self._outer(
                self.steps[-1].new_params, gradient=True
            )
        return self._outer_gradient

    def outer_gradient_before(self) -> Tree:
        """∇L(θ), one forward and backward pass on the labeled batch."""
        self.__dict__["outer_loss_before"], v = self._outer(self.student.params, gradient=True)
        return v

    def pullback(self) -> tuple[InnerStep, Tree]:
        """The step of a path with one step, and its w = (∂U/∂g)ᵀ v."""
        (step,) = self.steps
        return step, step.pullback(self.outer_gradient())

    def adjoints(
        self, fields: Callable[[Signal], Mapping[str, Tensor]], truncate: int | None = None
    ) -> Iterator[tuple[InnerStep, Tree, dict[str, Tensor | None] | None]]:
        """The steps from the last to the first, of the last ``truncate``, each with its w and the
        derivatives of ⟨g, w⟩ in ``fields(signal)``, which are computed together with the step's
        Hessian product; None of the first step, which needs none."""
        end, spacings = len(self.steps), self.keeping.spacings
        first = 0 if truncate is None else max(0, end - truncate)
        v, state_bar = {name: t.to_dense() for name, t in self.outer_gradient().items()}, None
        if self.outer is not None:
            v = {name: self.outer.weights[-1] * t for name, t in v.items()}
        self.start = v  # of no step that is differentiated
        for number, step in self._backwards(first if self.outer is None else 0, 0, end, *spacings):
            if (
                number < first
                # a step that is left out: its derivative counts as the identity, its outer loss
                # counts
            ):
                self.start = v = self._with_loss_before(number, v, gradient="start" in self.wrt)
                continue
            if self.inner_batches.are_read_again:
                self.inner_batch(number, step.inner_batch)  # refuses a batch that has changed since
            if self.settings:
                self.in_settings.append(step.setting_cotangents(self.settings, v, state_bar))
            if number == first and "start" not in self.wrt:
                yield (
                    step,
                    step.pullback(v) if state_bar is None else step.vjp(v, state_bar).gradient,
                    None,
                )
            else:
                w, theta_bar, state_bar = step.vjp(v, state_bar)
                hessian, in_signal = step.second_derivatives(w, fields(step.signal))
                v = {
                    name: t + hessian[name] for name, t in theta_bar.items()
                }  # λ_k = θ̄_k + (∂²ℓ_k/∂θ²) w_k
                checks.refuse_not_finite(NOT_FINITE.format(number), self.student.space.norm(v))
                yield step, w, in_signal
            self.start = v = self._with_loss_before(
                number, v, gradient=number > first or "start" in self.wrt
            )
            if self.progress is not None:
                self.progress()

    def _with_loss_before(self, number: int, v: Tree, *, gradient: bool) -> Tree:
        """Return v plus the ``gradient`` of the outer loss of the step before this one, where each step has one."""
        if self.outer is None or number == 0:
            return v
        weight = self.outer.weights[number - 1]
        of_loss = self._outer_after(number, gradient=gradient and weight != 0)
        return (
            {name: t + weight * of_loss[name].to_dense() for name, t in v.items()} if of_loss else v
        )

    def _outer_after(self, number: int, *, gradient: bool) -> Tree:
        """Return ∇L_k(θ_k) after the first k = ``number`` steps, or nothing without ``gradient``, and keep L_k."""
        assert self.outer is not None, "each step has an outer loss"
        batch = self.outer.batches[number - 1]
        judged, whole = micro_batches(batch, len(self.outer_micro_batches), "labeled"), None
        if self.whole_outer_batch is not None:
            whole = batch
        passes_before, passes = self.steps[number - 1].passes, self.steps[number].passes
        # As after a path of these steps alone: with its draws, and with the buffers that it leaves.
        start, state = passes_before[-1].random_state_after.branch(), passes[0].state_before
        params, signal = (
            {n: p.detach() for n, p in self.steps[number].params.items()},
            self.steps[number - 1].signal,
        )
        loss, of_loss = self._outer_at(
            params, judged, start, signal, gradient=gradient, state=state, whole=whole
        )
        self.losses_before[number] = loss
        return of_loss

    def _backwards(
        self, first: int, begin: int, end: int, *spacings: int
    ) -> Iterator[tuple[int, InnerStep]]:
        """The steps from ``end`` back to ``begin``, none before ``first``, each with its θ, g and
        s. Each block between two multiples of ``spacings[0]``, which were kept, is computed again
        and keeps its multiples of the next."""
        if not spacings:
            if self.keeping.spacings:
                self._compare_replay(begin, end)
            for number in reversed(range(begin, end)):
                if number >= first:
                    yield number, self.steps[number]
                if self.keeping.spacings:
                    self.forget(number)
            return
        spacing, *finer = spacings
        for start in reversed(range(begin, end, spacing)):
            stop = min(start + spacing, end)
            if stop <= first:
                return
            params, state = self.states.take(start)
            for number in range(start, stop):
                if number > start:
                    params, state = self.steps[number - 1].updated
                    if finer:
                        self.forget(number - 1)
                if finer and number % finer[0] == 0:
                    self.keep(number, params, state)
                if not (step := self.steps[number]).grads:  # the last of all has its own
                    batch = (
                        self.inner_batch(number)
                        if self.inner_batches.are_read_again
                        else step.inner_batch
                    )
                    self.steps[number] = step.recomputed(params, state, batch)
            if finer:
                self.forget(stop - 1)
            yield from self._backwards(first, start, stop, *finer)

    def keep(self, number: int, params: Tree, state: Any) -> None:
        """Keep the state before a step, and its digest."""
        self.states.keep(number, (params, state))
        if self.replays is not None:
            self.replays.note(number, params, state)

    def _compare_replay(self, begin: int, end: int) -> None:
        """Compare the end of a block that was computed again with what was kept there. The last
        step of all is not computed again: its own state is the end of the last block."""
        if self.replays is None:
            return
        last = len(self.steps) - 1
        if end <= last:
            step = self.steps[end - 1]
            self.replays.compare(end, *step.updated)
            vars(step).pop(
                "updated"
            )  # which nothing else needs, and which would be held as long as the block
        elif begin < last:
            self.replays.note(last, self.steps[last].params, self.steps[last].state)
            self.replays.compare(last, *self.steps[last - 1].updated)

    def forget(self, number: int) -> None:
        """Drop what can be computed again, of all steps but the last."""
        if number < len(self.inner_batches) - 1:
            self.steps[number] = self.steps[number].forgotten(self.inner_batches.are_read_again)

    def inner_batch(self, number: int, held: Any = None) -> Any:
        """An inner batch once more, read again where it is not ``held``; another one is refused."""
        with self.student.ranks.agreed():
            if held is None:
                with replayed(
                    RandomState.now(self.student.device)
                ):  # a function may seed the default generator
                    held = self.inner_batches[number]
            expected = self.steps[number].digest
            assert expected is not None, "only batches that are read again are known by a digest"
            checks.refuse(digest(held) != expected, OTHER_BATCH.format(number))
        return held

    def gradients_in_signals(
        self, truncate: int | None = None
    ) -> list[tuple[InnerStep, dict[str, Tensor | None]]]:
        """The last ``truncate`` steps, each with dL(θ′)/d(field) for the fields of its signal, by double backward."""
        end = len(self.steps)
        first = 0 if truncate is None else max(0, end - truncate)
        counted, (ends, cotangents, at_start) = self.steps[first:], self._outer_cotangents(first)
        signals = [step.signal.differentiable() for step in counted]
        leaves = [t for fields in signals for t in fields.values()]
        if self.wrt:
            # The derivative of the steps that are left out counts as the identity.
            begun = counted[0].params if counted else self.steps[-1].updated[0]
            self.start = begun if "start" in self.wrt else {}
            settings = [step.update.settings_in(self.settings) for step in counted]
            others, structure = pytree.tree_flatten((self.start, settings))
            leaves += others
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if ends and leaves:
            slots = self.student.slots
            with replay(
                slots.random_state(self.student.device), slots
            ):  # checkpoints run again here, at θ
                gradients = torch.autograd.grad(ends, leaves, cotangents, allow_unused=True)
        found = iter(gradients)
        in_signals = [{name: next(found) for name in fields} for fields in signals]
        if self.wrt:
            rest = [
                torch.zeros_like(t) if g is None else g for g, t in zip(found, others, strict=True)
            ]
            self.start, back = pytree.tree_unflatten(rest, structure)
            for of_loss in at_start:
                self.start = {name: t + of_loss[name] for name, t in self.start.items()}
            self.in_settings = back[::-1]
        return [*zip(counted, in_signals, strict=True)]

    def _outer_cotangents(self, first: int) -> tuple[list[Tensor], list[Tensor], list[Tree]]:
        """Return the weights θ_k where outer losses are taken, the gradients of these there, and
        the gradients of those that come before the ``first`` step that is differentiated."""
        ends, cotangents, before = list[Tensor](), list[Tensor](), list[Tree]()

        def add(params: Tree, gradient: Tree) -> None:
            reached = [name for name, p in params.items() if p.requires_grad and name in gradient]
            ends.extend(params[name] for name in reached)
            cotangents.extend(gradient[name] for name in reached)

        last = self.outer_gradient()
        if self.outer is not None:
            for number, weight in enumerate(self.outer.weights[:-1], start=1):
                is_needed = weight != 0 and (number > first or "start" in self.wrt)
                gradient = {
                    n: weight * t for n, t in self._outer_after(number, gradient=is_needed).items()
                }
                if number >= first:
                    add(self.steps[number].params, gradient)
                elif gradient:
                    before.append(gradient)
            last = {name: self.outer.weights[-1] * t for name, t in last.items()}
        add(self.steps[-1].updated[0], last)  # θ′
        return ends, cotangents, before

    def revised(self, h: Tensor | dict[str, Tensor]) -> Path:
        """The path of the real step, on the signal that the problem makes of the feedback, or this one."""
        step = self.steps[-1]
        signal = self.problem.revised_signal(step.signal, h)
        return (
            self if signal is None else replace(self, steps=[step.with_signal(signal.detached())])
        )

    def commit(self) -> dict[str, Tensor]:
        """Move the student to θ′, with its optimizer. Where its own steps are rounded otherwise
        than U, returns ``step_rounding``, the distance of the weights that they lead to from θ′,
        relative to that of θ from θ′."""
        theta, norm = (
            self.student.params,
            self.student.space.norm,
        )  # the student's own tensors, which will have moved
        exact = self.params if self.update.is_rounded else {}
        length = norm({name: t - theta[name] for name, t in exact.items()}) if exact else None
        if not self.keeping.spacings:
            for step in self.steps:
                self.update.commit(
                    self.student.parameters, step.gradient, partial(getattr, step, "updated")
                )
        else:  # gradients were dropped
            self.update.write(self.student.parameters, self.params, self.state)
        if length is None:
            return {}
        gap = norm({name: t - theta[name] for name, t in exact.items()})
        return {"step_rounding": gap / length.clamp_min(torch.finfo(length.dtype).tiny)}

    def direct_loss(self, signal: Signal) -> Tensor:
        """Return L(θ′; φ) at θ′ as a constant, with a graph in φ, what it reads of the teacher, if it reads anything.

        Args:
            signal: the last step's, with the teacher's graph, for a problem with
                ``outer_input(batch, signal)``.

        Cost: one forward pass on the outer batch, with the draws of the one that gave v, and its
        backward pass.
        """
        student, start = self.student, self.steps[-1].passes[-1].random_state_after.branch()
        weights = {
            name: t.requires_grad_(False) for name, t in student.as_leaves(self.params).items()
        }
        outputs = list[Tensor]()
        sums, counts = list[Tensor](), list[Tensor | float]()
        with student.at_weights(weights, start, student.slots):
            for part in self.outer_micro_batches:
                outputs.append(student.forward(outer_input(self.problem, part, signal)))
                total, weight = sum_and_weight(self.problem.outer_loss(outputs[-1], part))
                sums.append(total)
                counts.append(weight)
            if self.whole_outer_batch is not None and not isinstance(counts[0], Tensor):
                # A scalar may be any function of all rows.
                total, weight = sum_and_weight(
                    self.problem.outer_loss(joined(outputs), self.whole_outer_batch)
                )
                return total / weight
        loss: Tensor = torch.stack(sums).sum() / sum(counts)
        return loss

    def _outer(self, params: Tree, *, gradient: bool = False) -> tuple[Tensor, Tree]:
        """L, and its ``gradient``, at these weights, by a pass that draws from a stream apart from the teacher's."""
        start, signal = self.steps[-1].passes[-1].random_state_after.branch(), self.steps[-1].signal
        return self._outer_at(
            params,
            self.outer_micro_batches,
            start,
            signal,
            gradient=gradient,
            whole=self.whole_outer_batch,
        )

    def _outer_at(
        self,
        params: Tree,
        outer_micro_batches: Sequence[Any],
        start: RandomState,
        signal: Signal,  # of the step that leads to these weights
        *,
        gradient: bool,
        state: State | None = None,  # of the buffers; None: as they are now
        # the batch as one, where the outer loss may be no mean over micro-batches
        whole: Any = None,
    ) -> tuple[Tensor, Tree]:
        problem = self.problem
        if reads_signal_in_outer_input(problem):
            # In a path that keeps its graph the signal is a leaf of it; how L depends on it is the
            # direct term.
            signal = signal.detached()
        judged = [(outer_input(problem, part, signal), part) for part in outer_micro_batches]

        def judge(outputs: Tensor, part: Any) -> tuple[Tensor, Tensor | float]:
            return sum_and_weight(problem.outer_loss(outputs, part))

        look = current_look()
        return self.student.loss(
            params,
            judged,
            judge,
            start,
            gradient=gradient,
            state=state,
            look=None if look is None else look.at_outer_loss,
            whole_batch=whole,
        )


def take_steps(
    student: LocalStudent,
    update: Update,
    problem: Problem,
    outer_batch: Any,
    inner_batches: InnerBatches,
    teach: Callable[
        [Any, Tensor | None], Signal
    ],  # of a batch and the student's outputs; before these, if it has to
    *,
    parts: int = 1,  # micro-batches
    # keep the path differentiable in the signals, for ``gradients_in_signals``
    keep_graph: bool = False,
    order: Order
    | None = None,  # of differentiation; "graph": g keeps one, in what gets the feedback
    credits: Credited = "signal",  # what that is
    truncate: int | None = None,  # the last steps that are differentiated; None: all
    keep: Callable[[int, int, LocalStudent], Keeping]
    | None = None,  # by the number of steps and the size of one
    updates: Sequence[
        Update
    ] = (),  # of each step, where they differ by a schedule, or have settings that are leaves
    wrt: Sequence[str] = (),  # what the gradient is in besides the signals
    # Of each step; ``outer_batch`` is then the batch of the last.
    outer: OuterLosses | None = None,
    replays: ReplayCheck
    | None = None,  # whether steps that are computed again come out as they did; None: no look
    progress: Callable[[], object] | None = None,  # called after each step
) -> Path:
    """The student's steps on the inner batches: Algorithm 1, lines 2 and 3. Buffers and generators
    advance as in training; the weights do not move."""
    judged = [outer_batch] if parts == 1 else micro_batches(outer_batch, parts, "labeled")
    path = Path(
        problem,
        student,
        update,
        judged,
        inner_batches,
        wrt=wrt,
        order=order,
        outer=outer,
        replays=replays,
    )
    if parts > 1 and not is_mean_over_rows(problem):
        path.whole_outer_batch = outer_batch
    ranks, several = student.ranks, len(inner_batches) > 1
    enters, rereads = enters_input(problem), inner_batches.are_read_again
    if not ranks.alone:
        for judged_batch in [outer_batch] if outer is None else outer.batches:
            ranks.equal(length(judged_batch), "the outer batch")
    # The steps after the first one that is differentiated take a Hessian product, by a graph that
    # they make then.
    first_differentiated = max(0, len(inner_batches) - truncate) if truncate else 0
    # A graph of several steps begins at leaves, so that the student's own parameters are in none
    # but by mistake.
    params = (
        as_leaves(student.params) if (several or "start" in wrt) and keep_graph else student.params
    )
    state = update.read_state()
    look = current_look()

    def asked(x: Any, outputs: Tensor | None) -> Signal:
        """Line 2: ŷ ~ T(x), or the soft label.

        A problem may read the student as it is in this step.
        """
        if ranks.alone and params is student.params:
            return teach(x, outputs).detached()
        with NOTHING if params is student.params else student.with_weights(params), ranks.agreed():
            return teach(x, outputs).detached()

    def learned(
        inner_pass: Pass, x: Any, signal: Signal, keeps_graph: bool = False
    ) -> tuple[Tensor, Tree]:
        """Line 3: g = ∇ (1/B) Σ ℓ_i(z, signal), of a micro-batch, and the value of the loss."""
        leaves: Tree = {}
        if keeps_graph:
            leaves = as_leaves(credited(signal, credits))
            signal = signal.having(leaves)
        loss: Loss = partial(
            inner_loss, problem, signal, x, student.has_whole_weights, leaves.get("factors")
        )
        # Without a graph of the path, the second step is the first one at other weights than the
        # student's own. With one, the first step is at leaves already, and the second one's graph
        # ends in those of the first.
        looks_at = (0,) if keep_graph else (0, 1)
        if look is not None and number in looks_at:
            made_here = [*params.values(), *signal.fields().values(), *leaves.values()]
            loss = looked_at(
                loss, inner_pass, made_here, look, at_own_weights=params is student.params
            )
        return inner_pass.gradient(loss, [*leaves.values()])

    for number in range(len(inner_batches)):
        if number > 0:
            params, state = path.steps[-1].updated
            if path.keeping.spacings:
                path.forget(number - 1)
                if number % path.keeping.spacings[0] == 0:
                    path.keep(number, params, state)
        with ranks.agreed() if rereads else NOTHING:
            inner_batch = inner_batches[number]
        if number == 0 and several:  # what does not fit is refused before anything is computed
            # θ, g and s after the step, and a batch that the step alone holds.
            held = [*params.values()] * 2 + (leaves_of(inner_batch) if rereads else [])
            size = update.state_bytes() + sum(t.nbytes for t in held if isinstance(t, Tensor))
            path.keeping = ALL if keep is None else keep(len(inner_batches), size, student)
            path.states = States(path.keeping.on)
            if path.keeping.spacings:
                path.states.keep(0, (params, state))
        pieces = [inner_batch] if parts == 1 else micro_batches(inner_batch, parts, "unlabeled")
        if not ranks.alone:
            ranks.equal(length(inner_batch), "the inner batch")
        keeps_graph = order == "graph" and number == first_differentiated
        passes, signals, signal_inputs = list[Pass](), list[Signal](), list[SignalInput]()
        results = list[tuple[Tensor, Tree]]()
        if before := enters or problem.signal_of_batch:
            about = [inner_batch] if problem.signal_of_batch else pieces
            whole = joined_signals([asked(x, None) for x in about], leaves=keep_graph)
            signals = whole.chunks(parts)
        for i, x in enumerate(pieces):
            if enters:
                signal_inputs.append(SignalInput(problem, x, signals[i], keep_graph))
            inputs = signal_inputs[i].inputs if enters else problem.student_input(x)
            passes.append(inner_pass := student.pass_type(student, params, inputs))  # z = S(x; θ)
            judged_now = (
                judged if outer is None else micro_batches(outer.batches[number], parts, "labeled")
            )
            with NOTHING if ranks.alone else ranks.agreed():
                problem.check(inner_pass.outputs, judged_now[i], x)
            if not before:
                signals.append(asked(x, inner_pass.outputs))
            if not keep_graph:  # one graph at a time
                results.append(learned(inner_pass, x, signals[i], keeps_graph))
        if not before:
            whole = (
                joined_signals(signals, leaves=keep_graph)
                if keep_graph or parts > 1
                else signals[0]
            )
        if keep_graph:  # by parts of the leaf that the path is differentiated in
            results = [*map(learned, passes, pieces, whole.chunks(parts))]
        loss, g = results[0]
        if parts > 1:
            losses, gradients = zip(*results, strict=True)
            loss, g = mean_of(losses), mean_tree(gradients)
        rule, known_by = (
            updates[number] if updates else update,
            digest(inner_batch) if rereads else None,
        )
        given = problem, rule, passes, inner_batch, whole, loss, g, state, signal_inputs
        path.steps.append(InnerStep(*given, by_optimizer=several, digest=known_by, order=order))
        if several:
            with NOTHING if ranks.alone else ranks.agreed():
                checks.refuse_not_finite(LOSS_NOT_FINITE.format(number), path.steps[-1].inner_loss)
        if number == 0 and several and rereads:
            path.inner_batch(
                0
            )  # a function that always returns another batch is refused here, not after the path
        if progress is not None:
            progress()
    return path


def looked_at(
    loss: Loss,
    inner_pass: Pass,
    made_here: Sequence[Tensor],
    look: FirstLook,
    *,
    at_own_weights: bool,
) -> Loss:
    """Return an inner loss whose graph is looked at when it is taken.

    ``made_here`` are leaves besides its weights.
    """

    def taken(outputs: Tensor, params: Tree) -> Tensor:
        def again() -> Tensor:
            with inner_pass.once_more(inner_pass.inputs) as (at, outputs_again):
                return loss(outputs_again, at)

        value = loss(outputs, params)
        look.at_inner_loss(
            value, [*params.values(), *made_here], again, at_own_weights=at_own_weights
        )
        return value

    return taken
