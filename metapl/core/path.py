"""The student's steps from θ to θ′, where the outer loss is taken, and their adjoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.core.keeping import ALL, Keeping
from metapl.core.lesson import Ask, Credited, Graph, Lesson, plain_leaves
from metapl.core.lookahead import InnerBatches
from metapl.core.order import Order
from metapl.core.replays import ReplayCheck
from metapl.core.step import InnerStep
from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import Batch, digest, leaves_of, length, micro_batches
from metapl.execution.numerics import Tree, mean_of_scalars
from metapl.execution.ranks import NOTHING
from metapl.execution.state import RandomState, replay, replayed
from metapl.problems.base import (
    BilevelProblem,
    Signal,
    sum_and_weight,
)
from metapl.updates import Options, Update

if TYPE_CHECKING:
    from metapl.core.draws import Draws
    from metapl.core.engine import Derivatives, Engine, MicroBatches, OuterLossOf
    from metapl.core.walk import Walk

Result = TypeVar("Result")

OTHER_BATCH = (
    "the batch for step {} was another one when it was read again; expected the same: examples "
    "without random augmentation, or a function of Lookahead that returns the same each time."
)
LOSS_NOT_FINITE = (
    "the inner loss is NaN or infinite in step {} of the look-ahead: its batch has such values, "
    "or the student has diverged; lower its learning rate, or look for extreme values."
)
NOT_FINITE = (
    "the derivative of the outer loss is NaN or infinite before step {} of the look-ahead; lower "
    "the student's learning rate, or differentiate fewer of the last steps, Forward(truncate=...)."
)


class Look(Protocol):
    """Looks at the graphs of both losses in a first step."""

    def at_inner_loss(
        self,
        value: Tensor,
        made_here: Sequence[Tensor],
        again: Callable[[], Tensor],
        *,
        at_own_weights: bool,
    ) -> None:
        """Look at an inner loss.

        Args:
            value: the loss.
            made_here: leaves that belong into its graph.
            again: computes the loss once more.
            at_own_weights: whether the pass ran at the student's own parameters.
        """

    def at_outer_loss(
        self, value: Tensor, made_here: Sequence[Tensor], again: Callable[[], Tensor]
    ) -> None:
        """Look at an outer loss."""

    def at_feedback(self, given: Any, steps: Sequence[InnerStep], kind: str) -> None:
        """Look at what an estimator of this kind has returned for the student's steps."""

    def at_batches(self) -> None:
        """Look at the batches after the step."""


class Mode(Protocol):
    """What a path asks of an estimator (:class:`metapl.feedback.Estimator`)."""

    @property
    def truncate(self) -> int | None:
        """How many of the last steps are differentiated; None: all."""

    @property
    def credits_of_steps(self) -> Credited:
        """For what feedback has one number each."""

    def keeping(self, steps: int, size: int, student: Engine) -> Keeping:
        """Return which steps keep their states, of so many steps and bytes of a state."""


class Drawing:
    """A path with the draws of its step, of an estimator that says that it ``draws``."""

    _draws: Draws | None = None

    @property
    def draws(self) -> Draws:
        """The random numbers of the step (:class:`metapl.core.draws.Draws`)."""
        if self._draws is None:
            raise MetaplError(
                "an estimator asks for path.draws; expected draws = True in its class."
            )
        return self._draws

    @draws.setter
    def draws(self, draws: Draws) -> None:
        self._draws = draws


@dataclass
class Path(Drawing):
    """The student's steps from θ to θ′, where the outer loss is taken.

    :meth:`take_steps` takes them, and no weight moves before :meth:`commit`.

    Args:
        student: as its engine runs it. One with ``double_backward`` keeps the path differentiable
            in the signals, for :meth:`gradients_in_signals`.
        update: U.
        problem: the two losses and the signal.
        outer_batch: as the outer loss reads it.
        inner_batches: one for each step; those of a function are read as they are taken.
        teach: returns the signal about a batch.
        order: of differentiation; ``"graph"``: g keeps a graph in what gets the feedback; None:
            there is nothing to choose.
        mode: whose steps these are.
        updates: U of each step, where they differ by step, or have settings that are leaves.
        wrt: what the gradient is in besides the signals: settings of the optimizer, and
            ``"start"``.
        replays: compares steps that are computed again with the first time; None: nothing does.
        look: at the graphs of both losses, in the first step; None in later ones.
        progress: is called after each step, and after each step of the adjoint.
        is_tried: whether the order of differentiation is being chosen, by this path.
        steps: the steps so far.

    Attributes:
        keeping: which steps keep their states; the adjoint computes the others again.
        walk: over several steps of which some are computed again; None: all are held.
        known_outer_losses: those that have been taken so far, by the properties' names.
        start: dL/dθ by name, where it is asked for, once the path is differentiated.
        setting_gradients: dL in the settings of each step, the last step first.
    """

    student: Engine
    update: Update
    problem: BilevelProblem
    outer_batch: Batch
    inner_batches: InnerBatches
    teach: Ask
    mode: Mode
    order: Order | None = None
    updates: Sequence[Update] = ()
    wrt: Sequence[str] = ()
    replays: ReplayCheck | None = None
    look: Look | None = None
    progress: Callable[[], object] | None = None
    is_tried: bool = False

    steps: list[InnerStep] = field(default_factory=list)
    keeping: Keeping = ALL
    walk: Walk | None = field(default=None, init=False)
    known_outer_losses: dict[str, Tensor] = field(default_factory=dict, init=False)
    start: Tree = field(default_factory=dict, init=False)
    setting_gradients: list[Options] = field(default_factory=list, init=False)
    _outer_gradient: Tree | None = field(default=None, init=False)

    @property
    def settings(self) -> list[str]:
        """The settings of the optimizer that the gradient is in."""
        return [name for name in self.wrt if name != "start"]

    @property
    def params(self) -> Tree:
        """θ′ after the last step, without a graph."""
        return self.steps[-1].new_params

    @property
    def state(self) -> Any:
        """The optimizer's state after the last step, without a graph."""
        _, state = self.steps[-1].updated
        return pytree.tree_map_only(Tensor, Tensor.detach, state)

    @property
    def inner_loss(self) -> Tensor:
        """The mean of the inner losses over the steps."""
        if len(self.steps) == 1:
            return self.steps[0].inner_loss
        return mean_of_scalars([step.inner_loss for step in self.steps])

    # ------------------------------------------------------------------------------ the steps

    def take_steps(self) -> None:
        """Take the student's steps on the inner batches: Algorithm 1, lines 2 and 3.

        Buffers and generators advance as in training; the weights do not move.
        """
        student = self.student
        if not student.ranks.alone:
            student.ranks.equal(length(self.outer_batch), "the outer batch")
        count = len(self.inner_batches)
        params = student.params
        if student.double_backward and (count > 1 or "start" in self.wrt):
            # A graph of several steps begins at leaves, so that the student's own parameters are in
            # none but by mistake.
            params = plain_leaves(params)
        state = self.update.read_state()
        for number in range(count):
            if number > 0:
                params, state = self.steps[-1].updated
                if self.walk is not None:
                    self.forget(number - 1)
                    self.walk.pass_by(number, (params, state), count)
                    if number == count - 1:
                        # It is held to the end, and the steps before it are computed again.
                        self.walk.note(number, (params, state))
            self.steps.append(self._step(number, params, state))
            if count > 1:
                with student.ranks.agreed():
                    loss = self.steps[-1].inner_loss
                    checks.refuse_not_finite(LOSS_NOT_FINITE.format(number), loss)
                if number == 0 and self.inner_batches.are_read_again:
                    # A function that always returns another batch is refused here, not after the
                    # path.
                    self.inner_batch(0)
            if self.progress is not None:
                self.progress()

    def _step(self, number: int, params: Tree, state: Any) -> InnerStep:
        """Return the step of this number.

        Args:
            params: the weights θ before it.
            state: the optimizer's before it.
        """
        student = self.student
        ranks = student.ranks
        is_read_again = self.inner_batches.are_read_again
        is_at_own_weights = params is student.params
        has_several = len(self.inner_batches) > 1
        with ranks.agreed() if is_read_again else NOTHING:
            batch = self.inner_batches[number]
        if has_several and number == 0:
            # What does not fit is refused before anything is computed.
            self._choose_keeping(batch, params, state)
        if not ranks.alone:
            ranks.equal(length(batch), "the inner batch")
        graph: Graph
        if student.double_backward or student.returns_state:
            graph = "path"
        elif self.order == "graph" and number >= self._first_differentiated(self.mode.truncate):
            graph = "credited"
        else:
            graph = "none"
        look = None
        # Without a graph of the path, the second step is the first one at other weights than the
        # student's own. With one, the first step is at leaves already, and the second one's graph
        # ends in those of the first.
        if self.look is not None and number <= (0 if student.double_backward else 1):
            look = partial(self.look.at_inner_loss, at_own_weights=is_at_own_weights)
        lesson = Lesson(
            problem=self.problem,
            batch=batch,
            outer_batch=self.outer_batch,
            credits=self.mode.credits_of_steps,
            graph=graph,
            is_readable=student.has_whole_weights,
            look=look,
        )
        return InnerStep(
            update=self.updates[number] if self.updates else self.update,
            descent=student.descend(params, lesson, partial(self._ask_teacher, params)),
            state=state,
            by_optimizer=has_several or student.returns_state,
            digest=digest(batch) if is_read_again else None,
            order=self.order,
        )

    def _first_differentiated(self, truncate: int | None) -> int:
        """Return the number of the first step that is differentiated.

        The steps after it take a Hessian product, by a graph that they have kept or make then.
        """
        return 0 if truncate is None else max(0, len(self.inner_batches) - truncate)

    def _choose_keeping(self, inner_batch: Batch, params: Tree, state: Any) -> None:
        """Choose which steps keep their states, by the bytes that a step holds."""
        # θ and g have the same size; a batch that is read again is held by the step alone.
        weights_size = sum(t.nbytes for t in params.values())
        size = 2 * weights_size + self.update.state_bytes()
        if self.inner_batches.are_read_again:
            size += sum(t.nbytes for t in leaves_of(inner_batch) if isinstance(t, Tensor))
        # Of a step that is recorded no pass is run again.
        if not self.student.returns_state:
            self.keeping = self.mode.keeping(len(self.inner_batches), size, self.student)
        if self.keeping.spacings:
            # It is loaded where it is used.
            from metapl.core.walk import States, Walk

            self.walk = Walk(self, States(self.keeping.on), self.keeping.spacings, self.replays)
            self.walk.pass_by(0, (params, state), len(self.inner_batches))

    def _ask_teacher(self, theta: Tree, batch: Batch, outputs: Tensor | None) -> Signal:
        """Return the signal about a batch, without its graph.

        A problem may read the student as it is in this step.
        """
        student = self.student
        weights = NOTHING if theta is student.params else student.with_weights(theta)
        with weights, NOTHING if student.ranks.alone else student.ranks.agreed():
            return self.teach(batch, outputs).detached()

    # ----------------------------------------------------------------------------- the outer loss

    @property
    def outer_loss(self) -> Tensor:
        """L(θ′), without a graph.

        Cost: one outer forward pass, unless its gradient has been computed.
        """
        known = self.known_outer_losses
        if "outer_loss" not in known:
            (known["outer_loss"],) = self._outer_losses_at([self.params])
        return known["outer_loss"]

    @property
    def outer_loss_before(self) -> Tensor:
        """L(θ), with the dropout masks of L(θ′); one forward pass, and one of L(θ′)."""
        known = self.known_outer_losses
        if "outer_loss_before" not in known:
            names = ["outer_loss_before"]
            points = [self.student.params]
            if "outer_loss" not in known:
                names.append("outer_loss")
                points.append(self.params)
            known.update(zip(names, self._outer_losses_at(points), strict=True))
        return known["outer_loss_before"]

    def outer_losses(self, signals: Sequence[Signal]) -> Tensor:
        """Return L after the step on each of several signals, (n,), with the same draws.

        Cost of each: a forward and a backward pass on the inner batch, a forward pass on the outer.
        """
        (step,) = self.steps
        points = [step.with_signal(signal.detached()).new_params for signal in signals]
        return torch.stack(self._outer_losses_at(points))

    def outer_gradient(self) -> Tree:
        """Return v = ∇L(θ′).

        Cost: one forward and backward pass on the outer batch, with its own batch statistics.
        """
        if self._outer_gradient is None:
            look = self.look
            loss, gradient = self.student.loss(
                self.steps[-1].new_params,
                *self._outer_pass(),
                gradient=True,
                look=None if look is None else look.at_outer_loss,
            )
            self.known_outer_losses["outer_loss"] = loss
            self._outer_gradient = gradient
        return self._outer_gradient

    def outer_gradient_before(self) -> Tree:
        """Return ∇L(θ), by one forward and backward pass on the outer batch."""
        loss, gradient = self.student.loss(self.student.params, *self._outer_pass(), gradient=True)
        self.known_outer_losses["outer_loss_before"] = loss
        return gradient

    def by_direct_loss(self, take: Callable[[Tensor], Result]) -> Result:
        """Return what a function takes of L(θ′; φ), where θ′ is a constant and φ the teacher's.

        The loss has a graph in what it reads of the teacher, and none where it reads nothing. It is
        the mean over processes. The student holds θ′ until it is taken, so that a checkpoint runs
        again there.

        Args:
            take: such as a backward pass.

        Cost: one forward pass on the outer batch, with the draws of the one that gave v, and what
        is taken.
        """
        student = self.student
        start = self.steps[-1].descent.random_state_after.branch()
        weights = student.as_leaves(self.params)
        for t in weights.values():
            t.requires_grad = False
        sums: list[Tensor] = []
        counts: list[Tensor | float] = []
        with student.at_weights(weights, start, student.slots):
            for batch in micro_batches(self.outer_batch, student.parts, "outer"):
                outputs = student.forward(self.problem.outer_input(batch))
                total, weight = sum_and_weight(self.problem.outer_loss(outputs, batch))
                sums.append(total)
                counts.append(weight)
            total = torch.stack(sums).sum()
            count: Tensor | float = sum(counts)
            ranks = student.ranks
            if not ranks.alone:
                # The gradient is averaged over the ranks, each of which has its own rows.
                count = ranks.mean(torch.as_tensor(count, dtype=total.dtype, device=total.device))
            loss: Tensor = total / count
            if "outer_loss" not in self.known_outer_losses:
                self.known_outer_losses["outer_loss"] = ranks.mean(loss.detach())
            return take(loss)

    def _outer_losses_at(self, points: Sequence[Tree]) -> list[Tensor]:
        """Return the outer loss of the path at several weights, with the same draws.

        They are from a stream apart from the teacher's.
        """
        return self.student.losses(points, *self._outer_pass())

    def _outer_pass(self) -> tuple[MicroBatches, OuterLossOf, RandomState]:
        """Return the inputs and batches of the outer loss, the loss, and where its draws begin."""
        problem = self.problem
        micro = micro_batches(self.outer_batch, self.student.parts, "outer")
        batches = [(problem.outer_input(batch), batch) for batch in micro]
        return batches, problem.outer_loss, self.steps[-1].descent.random_state_after.branch()

    # ------------------------------------------------------------------------------- the adjoint

    def pullback(self) -> tuple[InnerStep, Tree]:
        """Return the step of a path with one step, and its w = (∂U/∂g)ᵀ v."""
        (step,) = self.steps
        return step, step.pullback(self.outer_gradient())

    def adjoints(
        self, fields: Callable[[Signal], Mapping[str, Tensor]], truncate: int | None = None
    ) -> Iterator[tuple[InnerStep, Tree, Derivatives | None]]:
        r"""Yield the steps that are differentiated, from the last to the first.

        .. math:: \lambda_k = \bar\theta_k + \frac{\partial^2 \ell_k}{\partial\theta^2} w_k

        Args:
            fields: of a signal, what ⟨g, w⟩ is differentiated in.
            truncate: how many of the last steps are differentiated; None: all.

        Yields: the step, its w, and the derivatives of ⟨g, w⟩ in ``fields(signal)``, which are
        computed together with the step's Hessian product. They are None for the first step, whose λ
        only a gradient in the start needs.
        """
        end = len(self.steps)
        first = self._first_differentiated(truncate)
        takes_start = "start" in self.wrt
        settings = self.settings if self.wrt else []
        v = {name: t.to_dense() for name, t in self.outer_gradient().items()}
        state_cotangent = None
        # This is dL/dθ where no step is differentiated.
        self.start = v
        backwards: Iterable[int] = reversed(range(first, end))
        if self.walk is not None:
            backwards = self.walk.back(first, 0, end, *self.walk.spacings)
        for number in backwards:
            step = self.steps[number]
            if self.inner_batches.are_read_again:
                # A batch that has changed since is refused.
                self.inner_batch(number, step.inner_batch)
            if settings:
                self.setting_gradients.append(step.setting_cotangents(settings, v, state_cotangent))
            if number == first and not takes_start:
                if state_cotangent is None:
                    w = step.pullback(v)
                else:
                    w = step.vjp(v, state_cotangent).gradient
                yield step, w, None
            else:
                w, theta_bar, state_cotangent = step.vjp(v, state_cotangent)
                hessian, in_signal = step.second_derivatives(w, fields(step.signal))
                v = {name: t + hessian[name] for name, t in theta_bar.items()}
                checks.refuse_not_finite(NOT_FINITE.format(number), self.student.space.norm(v))
                yield step, w, in_signal
            self.start = v
            if self.progress is not None:
                self.progress()

    def hold(self, number: int, state: tuple[Tree, Any]) -> None:
        """Compute the gradient of a step again, from the state before it."""
        step = self.steps[number]
        # The last step of all has not been forgotten.
        if not step.descent.gradient:
            batch = self.inner_batch(number) if self.inner_batches.are_read_again else None
            step.recompute(*state, batch)

    def after(self, number: int, state: Any = None) -> tuple[Tree, Any]:
        """Return the state after a step."""
        return self.steps[number].updated

    def forget(self, number: int) -> None:
        """Drop what can be computed again, of all steps but the last."""
        if number < len(self.inner_batches) - 1:
            self.steps[number].forget(batch_too=self.inner_batches.are_read_again)

    def inner_batch(self, number: int, batch: Batch = None) -> Any:
        """Return an inner batch once more, and refuse another than the first time.

        Args:
            batch: of that number; None: it is read again.
        """
        with self.student.ranks.agreed():
            if batch is None:
                # A function may seed the default generator.
                with replayed(RandomState.now(self.student.device)):
                    batch = self.inner_batches[number]
            expected = self.steps[number].digest
            assert expected is not None, "only batches that are read again are known by a digest"
            checks.refuse(digest(batch) != expected, OTHER_BATCH.format(number))
        return batch

    def gradients_in_signals(
        self, truncate: int | None = None
    ) -> list[tuple[InnerStep, Derivatives]]:
        """Return the differentiated steps, each with dL(θ′)/d(field) of its signal.

        By double backward: the path keeps its graph.

        Args:
            truncate: how many of the last steps are differentiated; None: all.
        """
        steps = self.steps[self._first_differentiated(truncate) :]
        ends: list[Tensor] = []
        cotangents: list[Tensor] = []
        theta_prime, _ = self.steps[-1].updated
        outer_gradient = self.outer_gradient()
        for name, p in theta_prime.items():
            if p.requires_grad and name in outer_gradient:
                ends.append(p)
                cotangents.append(outer_gradient[name])
        fields_by_step = [step.signal.differentiable() for step in steps]
        leaves = [t for fields in fields_by_step for t in fields.values()]
        others: list[Tensor] = []
        structure = None
        if self.wrt:
            start: Tree = {}
            if "start" in self.wrt:
                # The derivative of the steps that are left out counts as the identity.
                start = steps[0].params if steps else self.steps[-1].updated[0]
            settings = [step.update.settings_in(self.settings) for step in steps]
            others, structure = pytree.tree_flatten((start, settings))
        gradients: Sequence[Tensor | None] = [None] * (len(leaves) + len(others))
        if ends and gradients:
            # Checkpoints run again here, at θ.
            with replay(RandomState.now(self.student.device), self.student.slots):
                gradients = torch.autograd.grad(
                    ends, [*leaves, *others], cotangents, allow_unused=True
                )
        gradients_of_fields = iter(gradients[: len(leaves)])
        in_signals: list[Derivatives] = []
        for fields in fields_by_step:
            in_signals.append({name: next(gradients_of_fields) for name in fields})
        if structure is not None:
            gradients_of_others = []
            for t, gradient in zip(others, gradients[len(leaves) :], strict=True):
                gradients_of_others.append(torch.zeros_like(t) if gradient is None else gradient)
            self.start, of_settings = pytree.tree_unflatten(gradients_of_others, structure)
            self.setting_gradients = of_settings[::-1]
        return list(zip(steps, in_signals, strict=True))

    # ------------------------------------------------------------------------- the student moves

    def revised(self, h: Tensor | dict[str, Tensor]) -> Path:
        """Return the path of the real step, on the signal that the problem makes of the feedback.

        It is this path, where the problem makes none.
        """
        step = self.steps[-1]
        signal = self.problem.revised_signal(step.signal, h)
        if signal is None:
            return self
        return replace(self, steps=[step.with_signal(signal.detached())])

    def commit(self) -> dict[str, Tensor]:
        """Move the student to θ′, with its optimizer.

        Returns: where the optimizer's own step is rounded otherwise than U, ``step_rounding``: the
        distance of the weights that it leads to from θ′, relative to that of θ from θ′. Several
        steps are those of U, so that it is 0.
        """
        norm = self.student.space.norm
        exact: Tree = {}
        # These are the student's own tensors, which move.
        weights = self.student.params
        if self.update.is_rounded:
            exact = self.params
            length = norm({name: t - weights[name] for name, t in exact.items()})
        parameters = self.student.parameters
        if self.keeping.spacings or (self.update.is_rounded and len(self.steps) > 1):
            # Gradients were dropped; or they are those of steps without the rounding.
            self.update.write(parameters, self.params, self.state)
        else:
            for step in self.steps:
                # The rule may step by itself, and does then not ask for θ′.
                self.update.commit(parameters, step.gradient, partial(getattr, step, "updated"))
        if not exact:
            return {}
        gap = norm({name: t - weights[name] for name, t in exact.items()})
        return {"step_rounding": gap / length.clamp_min(torch.finfo(length.dtype).tiny)}
