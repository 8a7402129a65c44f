"""The gradient through student steps on the eager road, and what it returns.

:func:`metapl.hypergradient` stands above it (:mod:`metapl.training.hypergradient`), since it may
verify and compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.core.lookahead import InnerBatches, Lookahead
from metapl.core.order import Order, Orders
from metapl.core.path import Look, Path
from metapl.core.replays import REPLAY_TOLERANCE, ReplayCheck
from metapl.core.teacher import CallsOfSignal, Teacher, Teaching
from metapl.engines.eager import EagerEngine
from metapl.errors import MetaplError, few
from metapl.execution.batch import Batch
from metapl.execution.checks import generator_of, unexpected
from metapl.execution.layout import layouts
from metapl.execution.numerics import (
    MissingDerivative,
    deterministic,
    float32_products,
    no_fast_path,
)
from metapl.execution.ranks import NOTHING
from metapl.execution.state import RandomState, Slots, one_at_a_time, restored
from metapl.feedback import (
    Mode,
    check_direct_term,
    check_mode,
    check_signal,
    check_teacher,
    estimator,
    in_place_of,
    prepare,
)
from metapl.problems.base import BilevelProblem, kind_of, outer_variables, overrides
from metapl.updates import (
    Clipped,
    InnerOptimizer,
    Update,
    as_one_optimizer,
    options_of,
    torch_parts_of,
    update_of,
)
from metapl.updates.base import OptimizerState
from metapl.words import summary


@dataclass(frozen=True)
class Hypergradient:
    """The result of :func:`metapl.hypergradient`.

    Args:
        grads: dL(θ′)/dθ_T by teacher parameter name; zeros where the signal does not reach a
            parameter; empty without a teacher.
        feedback: h, minus the gradient of the outer loss with respect to the signal, as the mode
            shapes it; of a dict of tensors, a dict of those of floating point. A tuple of K for a
            :class:`metapl.Lookahead`.
        inner_loss, outer_loss: the student's mean loss on the signal at θ, and L(θ′), scalars.
        student_params: θ′ by parameter name, after the last step; of the real one where the problem
            revises its signal; of several tasks with a first dimension, as the feedback.
        inner_state: the TorchOpt state after the step, for the next call; None with a
            ``torch.optim`` optimizer.
        kept: which steps of a look-ahead kept their states, in words; empty without one.
        start: dL(θ_K)/dθ_0 by student parameter name, where ``wrt`` names it.
        settings: by the names in ``wrt``: dL(θ_K)/d(setting) of each step and param group, (K,
            groups); of ``betas``, (K, groups, 2); float64. A group that has no such setting, as
            Muon has no ``betas``, gets zeros.
        direct: where the outer loss reads the teacher, through a module that the problem holds:
            ∂L(θ′; φ)/∂φ at fixed θ′ by teacher parameter name, a part of ``grads``; empty
            elsewhere, and in the modes that leave it out (``none`` and the sampled ones).
        order: in which order the second derivative was taken (:mod:`metapl.core.order`):
            ``"graph"``, ``"tangent"``, ``"double_backward"``, ``"outputs"`` or ``"losses"``; empty
            in modes that take none, and compiled. ``Forward(by=result.order)`` takes the same
            without trying.
        replay_error: the largest relative difference, in the weights or in the optimizer's state,
            between a state that was kept and the same state computed again; 0.0 where they are
            equal bit for bit, or no step was computed again.
        float32_products: in what precision matrix products and convolutions of float32 were taken
            on the device: ``"ieee"``, ``"tf32"`` or ``"bf16"`` by name; empty for a device that has
            no such switches.
        numbers: what the mode says besides its feedback, scalars by name; of ``implicit`` the
            residual of its solver and the norm of the inner gradient.
    """

    grads: dict[str, Tensor]
    feedback: Any
    inner_loss: Tensor
    outer_loss: Tensor
    student_params: dict[str, Tensor]
    inner_state: OptimizerState
    kept: str = ""
    start: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Tensor] = field(default_factory=dict)
    order: str = ""
    direct: dict[str, Tensor] = field(default_factory=dict)
    replay_error: float = 0.0
    float32_products: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        state = None if self.inner_state is None else type(self.inner_state).__name__
        return summary("Hypergradient", **{**vars(self), "inner_state": state})


def as_leaf(setting: Any) -> Tensor:
    """Return a setting as a leaf of a graph, in float64."""
    return torch.as_tensor(setting, dtype=torch.float64).detach().clone().requires_grad_()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a hypergradient is asked for; for the fields see :func:`metapl.hypergradient`.

    Args:
        look: at the graphs of both losses and at the batches; None without one.
        calls: watches the problem's ``signal``, where it is called twice; None elsewhere.
    """

    teacher: nn.Module | None
    student: nn.Module
    outer: Batch
    inner: Batch
    mode: Mode
    problem: BilevelProblem | None
    inner_optimizer: InnerOptimizer | Update
    inner_state: OptimizerState = None
    generator: torch.Generator | None = None
    recompute_teacher: bool = False
    accumulate: int = 1
    clip_norm: float | None = None
    shows_progress: bool = False
    wrt: str | Sequence[str] = ("teacher",)
    replay_tolerance: float = REPLAY_TOLERANCE
    look: Look | None = None
    calls: CallsOfSignal | None = None


@one_at_a_time
def through_steps(request: Request) -> Hypergradient:
    """Return the gradient that is asked for on the eager road; no weight or state moves."""
    return Differentiation(request).find()


class Differentiation:
    """A gradient through student steps, of arguments that fit together.

    Args:
        request: what is asked for.
        compiles: whether the pure road is to find it (:mod:`metapl.functional.training`).

    Attributes:
        estimate: the mode, as an estimator.
        problem: the problem with a kind of signal that the mode takes.
        inner_optimizer: one optimizer, also where several were given.
        inner_batches: one for each step of the student.
        ahead: the same as a look-ahead, with its settings, also where one batch was given.
        wrt: the names of what the gradient is in.
        fault: of the checks in the last path; those that have no values yet.
        feedback: on the signal of each step of the last path.

    Raises: :class:`metapl.MetaplError` before anything moves.
    """

    def __init__(self, request: Request, *, compiles: bool = False) -> None:
        self.request = request
        self.estimate = estimator(request.mode)
        self.compiles = compiles
        has_feedback = self.estimate.credits != "nothing"
        self.inner_batches = InnerBatches.of_hypergradient(request.inner)
        self.problem = prepare(request.problem, self.estimate)
        self.inner_optimizer = as_one_optimizer(request.inner_optimizer)
        check_teacher(request.teacher, self.problem, recompute_teacher=request.recompute_teacher)
        self.of_teacher, self.of_student, self.device = layouts(
            request.teacher, request.student, differentiated=has_feedback or compiles
        )
        generator_of(request.generator, self.device, "the networks are on")
        update = update_of(self.inner_optimizer, self.of_student.parameters(), request.inner_state)
        if request.clip_norm is not None:
            update = Clipped(update, request.clip_norm, self.of_student.space)
        self.update = update
        self._read_batches()
        if not isinstance(request.wrt, str | Sequence):
            raise unexpected("wrt is", request.wrt, "a name, or a list of names")
        self.wrt = [request.wrt] if isinstance(request.wrt, str) else [*request.wrt]
        self.settings = [name for name in self.wrt if name in self.update.numbers]
        self._check_wrt()
        self.takes_direct_term = (
            "teacher" in self.wrt
            and self.estimate.has_direct_term
            and bool(outer_variables(self.problem, request.teacher))
        )
        if self.takes_direct_term or (not has_feedback and self.estimate.has_direct_term):
            networks = [self.of_teacher, self.of_student]
            check_direct_term(self.estimate, self.problem, [n for n in networks if n is not None])

    @cached_property
    def slots(self) -> list[Slots]:
        """The networks' tables as they are in this call, the teacher's first."""
        teacher = nn.Module() if self.of_teacher is None else self.of_teacher.network
        optimizers = torch_parts_of(self.inner_optimizer)
        return [Slots(teacher), Slots(self.of_student.network, optimizers)]

    def _read_batches(self) -> None:
        """Read the look-ahead, and refuse what does not go together."""
        inner = self.request.inner
        self.ahead: Lookahead = inner if isinstance(inner, Lookahead) else Lookahead([inner])
        # The options of the param groups in each step; an empty list says that they are those of
        # the inner optimizer in all of them.
        self.options: list[Any] = self.ahead.options(self.inner_optimizer)
        check_mode(self.estimate, len(self.inner_batches), self.problem, self.of_student)

    def _check_wrt(self) -> None:
        """Refuse names of what cannot be differentiated in, by this optimizer, mode and layout."""
        if self.estimate.truncate == 0 and self.wrt != ["start"]:
            raise MetaplError("truncate=0 was given; expected wrt='start', or a truncate of 1.")
        names = ("teacher", "start", *self.update.numbers)
        if unknown := [name for name in self.wrt if name not in names]:
            raise MetaplError(f"wrt={few(unknown)} was given; expected some of {', '.join(names)}.")
        if {*self.wrt} <= {"teacher"}:
            return
        if reason := self._why_not_in_others():
            raise MetaplError(f"wrt={self.wrt!r} was given with {reason}.")

    def _why_not_in_others(self) -> str:
        """Return what forbids a gradient in the start or in settings, and what to give instead.

        "" for nothing.
        """
        if overrides(self.problem, "revised_signal"):
            return f"{kind_of(self.problem)}, which revises its signal; expected another problem"
        walks_back = self.estimate.looks_ahead and self.estimate.credits == "signal"
        if not walks_back:
            return f"mode {self.estimate.name!r}; expected 'forward' or 'unrolled'"
        if self.of_student.is_sharded and self.settings:
            return "a sharded student; expected one process, or DistributedDataParallel"
        if "momentum" not in self.wrt:
            return ""
        # `unrolled` and compiled steps are taken with the momentum as a leaf.
        options_of_steps = self.options or [self.update.options]
        steps_with_leaves = self.compiles or self.estimate.keep_graph
        for group_in_steps in zip(*options_of_steps, strict=True):
            is_of_sgd = "dampening" in group_in_steps[0]
            if not is_of_sgd:
                continue
            momenta = [group["momentum"] for group in group_in_steps]
            if 0 not in momenta:
                continue
            # A step with a leaf keeps a buffer at momentum 0 too, which changes no weight while the
            # momentum is 0 in all steps. Where it is 0 in some steps alone, torch does not touch in
            # these the buffer that the other steps keep, and a step with a leaf would update it.
            if any(momentum != 0 for momentum in momenta):
                return "momentum=0 in some steps, which keep no buffer; expected more"
            # SGD without a leaf keeps no buffer at momentum 0. Later steps depend on the momentum
            # of earlier ones through that buffer, and `forward`, which goes back over the states of
            # such steps, would leave this dependence out.
            if not steps_with_leaves:
                return "momentum=0, which keeps no buffer; expected more, or compile=True"
        return ""

    def find(self, orders: Orders | None = None) -> Hypergradient:
        """Return the gradient on the eager road, in the first order of differentiation that runs.

        No weight or state moves.

        Args:
            orders: that were chosen in earlier calls like this one; None: there were none.
        """
        engine_type = EagerEngine
        if self.of_student.is_sharded:
            # It is loaded where it is used.
            from metapl.engines.sharded import ShardedEngine

            engine_type = ShardedEngine
        self.student = engine_type(
            self.of_student,
            self.slots[1],
            double_backward=self.estimate.keep_graph,
            parts=self.request.accumulate,
        )
        if self.settings and self.estimate.keep_graph:
            self._make_settings_leaves()
        self._begin()
        others = [name for name in self.wrt if name != "teacher"]
        steps = len(self.inner_batches)
        candidates = self.estimate.orders(steps, self.problem, self.student, others)
        try:
            return (orders or Orders()).take(candidates, self._in_order, begin_again=self._begin)
        except MissingDerivative as error:
            raise self.with_proposal(error) from error

    def with_proposal(self, error: MissingDerivative) -> MissingDerivative:
        """Return an error that says what to give in the place of this mode."""
        others = [name for name in self.wrt if name != "teacher"]
        steps = len(self.inner_batches)
        expected = in_place_of(self.estimate, steps, self.problem, others)
        return MissingDerivative(error.what, expected)

    def _make_settings_leaves(self) -> None:
        """Let the graph of double backward end in leaves in the places of the settings."""
        options_of_steps = self.options
        if not options_of_steps:
            options_of_steps = [options_of(self.inner_optimizer)] * len(self.inner_batches)
        self.options = []
        for groups in options_of_steps:
            with_leaves = []
            for group in groups:
                # Betas are two.
                numbers = {name: group[name] for name in self.settings if name in group}
                with_leaves.append({**group, **pytree.tree_map(as_leaf, numbers)})
            self.options.append(with_leaves)

    def _begin(self) -> None:
        """Prepare the networks of several processes for a path."""
        for layout in (self.of_teacher, self.of_student):
            if layout is not None:
                layout.begin_step()

    def _in_order(self, order: Order | None, is_tried: bool) -> Hypergradient:
        """Return the result with the feedback's second derivative in one order."""
        request = self.request
        estimate = self.estimate
        student = self.student
        ranks = self.of_student.ranks
        steps = len(self.inner_batches)
        teacher = Teacher(
            self.of_teacher,
            self.problem,
            ranks,
            self.device,
            self.slots[0],
            accumulate=request.accumulate,
            recompute=request.recompute_teacher,
        )
        check = partial(check_signal, mode=estimate, problem=self.problem, student_steps=steps)
        # Both in the step that tries the order: the student switches the first off itself, after
        # the first graph that it has looked at, and the second stays for the whole step.
        student.inspects_graph = is_tried
        student.chooses_order = is_tried
        # One step is not computed again.
        replays = ReplayCheck(request.replay_tolerance, ranks) if steps > 1 else None
        is_shown = request.shows_progress and ranks.first
        with ExitStack() as stack:
            self.fault = stack.enter_context(
                restored(
                    *self.slots,
                    device=self.device,
                    generator=request.generator,
                    always=True,
                )
            )
            if estimate.keep_graph or order == "graph":
                stack.enter_context(no_fast_path(math=True))
            if steps > 1:
                stack.enter_context(deterministic(self.device))
            teaching = Teaching(
                teacher,
                self.problem.outer_batch(request.outer),
                self.inner_batches,
                generator=request.generator,
                check=check,
                calls=request.calls,
            )
            # θ′ = U(θ, g), g = ∇ (1/B) Σ ℓ_i(S(x_u; θ), signal)
            with bar_of(is_shown, steps, "steps") as show_step:
                path = Path(
                    student,
                    self.update,
                    problem=self.problem,
                    outer_batch=teaching.outer_batch,
                    inner_batches=self.inner_batches,
                    teach=teaching,
                    order=order,
                    mode=estimate,
                    updates=[self.update.with_options(options) for options in self.options],
                    wrt=[name for name in self.wrt if name != "teacher"],
                    replays=replays,
                    look=request.look,
                    progress=show_step,
                    is_tried=is_tried,
                )
                path.take_steps()
            mode_state = estimate.first_state(request.generator, self.device)
            before = RandomState.now(self.device)
            # h = −dL(θ′)/d(signal)
            with bar_of(is_shown, steps, "steps back") as show_step_back:
                path.progress = show_step_back
                feedback, _ = estimate.checked_feedback(path, mode_state)
            self.feedback = feedback
            if not RandomState.now(self.device).equals(before):
                raise MetaplError(
                    f"mode {estimate.name!r} draws from torch's default generator; expected draws "
                    "= True in the class, and path.draws."
                )
            lacks_start = "start" in self.wrt and not path.start
            lacks_settings = bool(self.settings) and not path.setting_gradients
            if lacks_start or lacks_settings:
                raise MetaplError(
                    f"wrt={self.wrt!r} was given with mode {estimate.name!r}, which does not ask "
                    "for path.adjoints or path.gradients_in_signals; expected 'forward', say."
                )
            direct = teaching.direct_gradient(path) if self.takes_direct_term else {}
            grads: dict[str, Tensor] = {}
            if "teacher" in self.wrt:
                # The gradient of −Σ h·signal(θ_T), and of an outer loss that reads the teacher.
                grads = teaching.gradient(path, feedback)
            if direct:
                grads = {name: g + direct[name] for name, g in grads.items()}
            settings: dict[str, Tensor] = {}
            if self.settings:
                # Loaded where it is used.
                from metapl.feedback.setting_gradients import stacked_settings

                # The path has gone backwards, and has the last step's first.
                settings = stacked_settings(path.setting_gradients[::-1], self.settings, steps)
            h = tuple(
                feedback_of_step.of_batch(step)
                for step, feedback_of_step in zip(path.steps, feedback, strict=True)
            )
            # The path of the real step: the same, unless the problem makes another signal of the
            # feedback.
            real_path = path.revised(h[-1])
            if request.look is not None:
                request.look.at_batches()
            is_torch_optimizer = isinstance(self.inner_optimizer, torch.optim.Optimizer)
            is_lookahead = self.inner_batches.is_lookahead
            return Hypergradient(
                grads=grads,
                feedback=h if is_lookahead else h[0],
                inner_loss=real_path.inner_loss,
                outer_loss=real_path.outer_loss,
                student_params=self.of_student.as_parameters(real_path.params),
                inner_state=None if is_torch_optimizer else real_path.state,
                kept=real_path.keeping.words(steps) if is_lookahead else "",
                start=self.of_student.as_parameters(path.start if "start" in self.wrt else {}),
                settings=settings,
                order=order or "",
                direct=direct,
                replay_error=0.0 if replays is None else replays.error,
                float32_products=float32_products(self.device),
                numbers=dict(feedback[-1].numbers),
            )


def bar_of(is_shown: bool, steps: int, name: str) -> AbstractContextManager[Any]:
    """Return a progress bar over steps, which gives what advances it, or nothing."""
    if not is_shown:
        return NOTHING
    # Loaded where it is used.
    from metapl.runs.terminal import step_bar

    return step_bar(is_shown, steps, name)
