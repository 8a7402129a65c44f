"""A whole training, and its gradient, as two pure functions in a loop: a step and its adjoint.

:mod:`metapl.functional.adjoint` has the two functions and their mathematics. Each is compiled once
(:mod:`metapl.functional.graphs`); the loop is Python's, and the number of steps K is in no graph.
The adjoint of a step runs it again from the state before it, under the same dropout masks. That
state was kept, or is computed again (:mod:`metapl.core.walk`).

:func:`differentiate` makes a :class:`PathPlan`, which does not change, walks the steps forward and
back (:class:`CompiledPath`), and writes what it learns of them into a :class:`StepBook`.

Source: Metagradient descent (Engstrom et al., 2025), REPLAY; MAGIC (Ilyas and Engstrom, 2025).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.core.keeping import Keeping, keeping
from metapl.core.lookahead import Lookahead
from metapl.core.path import LOSS_NOT_FINITE, NOT_FINITE, OTHER_BATCH
from metapl.core.replays import REPLAY_TOLERANCE, ReplayCheck
from metapl.core.walk import States, Walk
from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import Batch, digest, returned_by
from metapl.execution.layout import Layout, layouts
from metapl.execution.numerics import (
    HALF,
    MissingDerivative,
    Tree,
    deterministic,
    float32_products,
    no_fast_path,
    wide,
)
from metapl.execution.outside import refusing_draws_outside
from metapl.execution.state import RandomState, branching_to, replayed, trainable
from metapl.feedback import Estimator, Forward
from metapl.feedback.hypergradient import (
    Differentiation,
    Hypergradient,
    Request,
    through_steps,
)
from metapl.feedback.setting_gradients import stacked_settings
from metapl.functional.adjoint import Carry, Cotangents, Settings, StepInputs, gradients
from metapl.functional.capture import Capturing
from metapl.functional.compared_step import refuse_other_than_eager
from metapl.functional.comparison import Comparisons
from metapl.functional.graphs import BatchKind, Graphs, graphs_of
from metapl.functional.kinds import Held
from metapl.functional.state import (
    Network,
    on_value,
    settings_of,
    tensors_of,
)
from metapl.functional.step import Places
from metapl.problems.base import (
    BilevelProblem,
    Signal,
    outer_variables,
    overrides,
    sum_and_weight,
)
from metapl.runs.terminal import step_bar
from metapl.updates import TorchUpdate, options_of, update_of

OptionsOfStep = Sequence[Mapping[str, Any]]

# In the place of how many graphs there were.
BEING_COMPARED = -1

# After how many steps it is looked whether their numbers are finite.
STEPS_OF_LOOK = 32


@dataclass(frozen=True, kw_only=True)
class PathRequest:
    """What :func:`differentiate` is asked for; for most see :func:`metapl.hypergradient`.

    Args:
        mode: whose h is the derivative itself (``is_derivative``), which the graphs find.
        judging: for the outer losses of M examples, in the place of the problem's; the results then
            have a first dimension M.
        weights: of the examples of each step, (K, B), by which the signal's value is multiplied, or
            those of every step, (1, B); None: 1 each.
    """

    teacher: nn.Module | None
    student: nn.Module
    problem: BilevelProblem
    optimizer: torch.optim.Optimizer
    mode: Estimator
    outer: Batch
    ahead: Lookahead
    clip_norm: float | None = None
    wrt: Sequence[str] = ()
    judging: Sequence[BilevelProblem] = ()
    weights: Tensor | None = None
    accumulate: int = 1
    shows_progress: bool = False
    replay_tolerance: float = REPLAY_TOLERANCE

    @property
    def settings(self) -> list[str]:
        """Return the names of the optimizer's settings in which the gradient is asked for."""
        return [name for name in self.wrt if name not in ("teacher", "start")]


def differentiate(request: PathRequest) -> Hypergradient:
    """Return :func:`metapl.hypergradient` through K compiled steps.

    Nothing moves but generators. The first call compares both graphs with the eager road, over one
    step.
    """
    return path_of(request).find()


def path_of(request: PathRequest) -> CompiledPath:
    """Return a path whose graphs were compared with the eager road."""
    of_teacher, of_student, device = layouts(request.teacher, request.student)
    if reason := why_not_compiled(
        request.mode,
        request.problem,
        student=of_student,
        teacher=of_teacher,
        optimizer=request.optimizer,
        accumulate=request.accumulate,
    ):
        raise MetaplError(f"compile=True was given with {reason}; leave compile out.")
    update: Any = update_of(request.optimizer, trainable(request.student))
    graphs = graphs_of(
        request.teacher,
        request.student,
        request.problem,
        update,
        clip_norm=request.clip_norm,
        in_settings=bool(request.settings),
        several=bool(request.judging),
    )
    plan = plan_of(request, update, device)
    refuse_other_gradient(request, plan, graphs, Held.of(request.ahead[plan.compared_step]))
    return CompiledPath(request, plan, graphs)


def compiled(differentiation: Differentiation) -> Hypergradient:
    """Return the gradient by compiled steps."""
    request = differentiation.request
    result = differentiate(
        PathRequest(
            teacher=request.teacher,
            student=request.student,
            problem=differentiation.problem,
            optimizer=differentiation.inner_optimizer,
            mode=differentiation.estimate,
            outer=request.outer,
            ahead=differentiation.ahead,
            clip_norm=request.clip_norm,
            wrt=differentiation.wrt,
            accumulate=request.accumulate,
            shows_progress=request.shows_progress,
            replay_tolerance=request.replay_tolerance,
        )
    )
    if differentiation.inner_batches.is_lookahead:
        return result
    return replace(result, feedback=result.feedback[0], kept="")


def why_not_compiled(
    mode: Estimator,
    problem: BilevelProblem,
    *,
    student: Layout,
    teacher: Layout | None,
    optimizer: Any,
    accumulate: int,
) -> str:
    """Return what the two graphs do not take, and what is expected instead; "" for nothing."""
    networks = [network for network in (student, teacher) if network is not None]
    is_alone = student.ranks.alone and all(network.kind == "plain" for network in networks)
    # The graphs have a formula of their own, and never ask the estimator.
    if not mode.is_derivative or mode.normalization != "gradient":
        return f"{mode!r}; expected Forward() or Unrolled(), in the gradient's own units"
    if accumulate > 1:
        return "accumulate"
    if not is_alone:
        return "several processes"
    if not isinstance(optimizer, torch.optim.Optimizer):
        return "a TorchOpt transform; expected torch.optim's"
    if overrides(problem, "revised_signal"):
        return "a problem that revises its signal"
    if any(p.dtype in HALF for p in student.parameters().values()):
        return "weights in half precision"
    return ""


# ---------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True, kw_only=True)
class PathPlan:
    """How the steps of a path are taken, and which states are kept; fixed before the first one.

    Attributes:
        steps: K.
        device: where the networks are.
        options: of the optimizer's param groups, in each step.
        rates: the settings that are tensors in the graphs, in each step, or once for all of them.
        start: the carry before the first step.
        phi: φ, the teacher's weights.
        first: the first step that is differentiated.
        keeping: which steps keep their states.
        compared_step: the first step that moves the student, for a warm-up may begin with a rate
            of 0. The graphs are compared with the eager road in it.
        compared_settings: the settings in that step, as those of one step; None where they are the
            same in all steps.
        comparisons: those that are made on each kind of batches.
    """

    steps: int
    device: torch.device
    options: Sequence[OptionsOfStep]
    rates: Sequence[Settings]
    start: Carry
    phi: Tree
    first: int
    keeping: Keeping
    compared_step: int
    compared_settings: dict[str, Any] | None
    comparisons: defaultdict[object, Comparisons] = field(
        default_factory=partial(defaultdict, Comparisons)
    )


def plan_of(request: PathRequest, update: TorchUpdate, device: torch.device) -> PathPlan:
    """Return the plan of a path, which is refused where memory does not hold its states."""
    ahead = request.ahead
    mode = request.mode
    steps = len(ahead)
    options = ahead.options(request.optimizer) or [options_of(request.optimizer)] * steps

    theta, state = tensors_of(request.student)
    phi, teacher_state = tensors_of(request.teacher)
    optimizer_state = first_state(options, update, request.wrt)
    networks = [network for network in (request.student, request.teacher) if network is not None]
    buffers = [b for network in networks for b in network.buffers()]
    state_bytes = update.state_bytes() + sum(t.nbytes for t in (*theta.values(), *buffers))
    spacing = mode.keep or mode.keep_every
    first = 0
    if mode.truncate is not None:
        first = max(0, steps - mode.truncate)
    compared_step = first_moving_step(options)
    return PathPlan(
        steps=steps,
        device=device,
        options=options,
        rates=tensor_settings(
            options, update, request.wrt, is_scheduled=bool(ahead.settings), device=device
        ),
        start=Carry(theta, optimizer_state, state, teacher_state),
        phi=phi,
        first=first,
        keeping=keeping(steps, state_bytes, device=device, spacing=spacing, on=mode.keep_on),
        compared_step=compared_step,
        compared_settings=(
            settings_of_step(options, compared_step, update) if ahead.settings else None
        ),
    )


def tensor_settings(
    options: Sequence[OptionsOfStep],
    update: TorchUpdate,
    wrt: Sequence[str],
    *,
    is_scheduled: bool,
    device: torch.device,
) -> list[Settings]:
    """Return the settings that are tensors in the graphs, in each step, or once where none changes.

    A number that is 0 in all steps leaves a part of the rule out, and a momentum of 0 leaves the
    buffer as it is; but for those in which the gradient is asked for.
    """
    names_by_group: list[list[str]] = []
    for groups in zip(*options, strict=True):
        names: list[str] = []
        for name in update.numbers:
            if name not in groups[0]:
                continue
            if name in wrt or any(group[name] != 0 for group in groups):
                names.append(name)
        names_by_group.append(names)

    numbers: list[list[dict[str, Any]]] = []
    for groups_of_step in options if is_scheduled else options[:1]:
        in_step: list[dict[str, Any]] = []
        for names, group in zip(names_by_group, groups_of_step, strict=True):
            in_step.append(
                {
                    name: group[name]
                    for name in names
                    if name in wrt or name != "momentum" or group[name]
                }
            )
        numbers.append(in_step)
    settings: list[Settings] = settings_of(numbers, device)
    return settings


def first_state(options: Sequence[OptionsOfStep], update: TorchUpdate, wrt: Sequence[str]) -> Any:
    """Return the optimizer's state before the first step, with all tensors that later ones have.

    A first step with dampening is not the one from a buffer of zeros, nor is its derivative in the
    dampening: so whether a buffer is there from the beginning depends on the dampening of all
    steps.
    """
    first_groups: list[dict[str, Any]] = []
    for first_group, groups in zip(options[0], zip(*options, strict=True), strict=True):
        has_dampening = "dampening" in wrt or any(group.get("dampening") for group in groups)
        first_groups.append({**first_group, "dampening": has_dampening})
    later: Any = update.with_options(first_groups)
    return later.complete_state()


def first_moving_step(options: Sequence[OptionsOfStep]) -> int:
    """Return the number of the first step with a rate that is not 0; 0 where there is none."""
    for number, groups in enumerate(options):
        if any(group["lr"] != 0 for group in groups):
            return number
    return 0


def settings_of_step(
    options: Sequence[OptionsOfStep], number: int, update: TorchUpdate
) -> dict[str, Tensor] | None:
    """Return the settings in one step as those of one step, for :class:`metapl.Lookahead`.

    The weight decay is the greatest of all steps, which moves what no loss reaches.
    """
    settings: dict[str, Tensor] = {}
    for name in update.numbers:
        missing = (0.0, 0.0) if name == "betas" else 0.0
        values = [group.get(name, missing) for group in options[number]]
        if name == "weight_decay":
            by_group = zip(*options, strict=True)
            values = [max(group[name] for group in groups) for groups in by_group]
        settings[name] = torch.tensor([values], dtype=torch.float64)
    return settings or None


# ---------------------------------------------------------------------------------------- the book


class SignalKind(NamedTuple):
    """What the signals about batches of the same shapes have in common.

    Attributes:
        zeros: by the names of a signal's differentiable fields.
        value: of one of them, which tells the form of the feedback.
    """

    zeros: Tree
    value: Any


@dataclass
class StepBook:
    """What is known of the steps that a path has taken.

    Attributes:
        losses: the inner loss of each step, scalars.
        digests: of the batch of each step, where it is read again: whole numbers.
        kinds: of the signals, by the kind of a batch.
        kinds_of_steps: that of each step.
    """

    losses: list[Tensor] = field(default_factory=list)
    digests: list[Tensor] = field(default_factory=list)
    kinds: dict[BatchKind, SignalKind] = field(default_factory=dict)
    kinds_of_steps: list[SignalKind] = field(default_factory=list)

    def note_batch(self, number: int, batch: Batch) -> None:
        """Note a batch that was read; refuse one that is another than when it was read before."""
        batch_digest = digest(batch)
        if number == len(self.digests):
            self.digests.append(batch_digest)
        if bool(self.digests[number] != batch_digest):
            raise MetaplError(OTHER_BATCH.format(number))

    def note_signal(self, number: int, kind: BatchKind, signal: Mapping[str, Any]) -> None:
        """Note what the signal about a batch of a kind is like; refuse one that is drawn."""
        if kind not in self.kinds:
            if "log_prob" in signal:
                raise MetaplError(
                    "compile=True was given with a signal that is drawn; leave compile out."
                )
            fields = Signal(**signal).differentiable()
            zeros = {name: torch.zeros_like(t) for name, t in fields.items()}
            self.kinds[kind] = SignalKind(zeros, signal["value"])
        if number == len(self.kinds_of_steps):
            self.kinds_of_steps.append(self.kinds[kind])


class Finite:
    """Numbers of steps, of which one that is NaN or infinite is refused.

    They are looked at together, some steps later, for each look waits for its number.

    Args:
        text: of the error, with a place for the number of the step.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._steps = list[int]()
        self._numbers = list[Tensor]()

    def note(self, step: int, number: Tensor) -> None:
        """Note the number of a step."""
        self._steps.append(step)
        self._numbers.append(number)
        if len(self._steps) == STEPS_OF_LOOK:
            self.look()

    def look(self) -> None:
        """Refuse the first of the numbers that is not finite."""
        if self._numbers and not bool(torch.stack(self._numbers).isfinite().all()):
            for step, number in zip(self._steps, self._numbers, strict=True):
                checks.refuse_not_finite(self._text.format(step), number)
        self._steps.clear()
        self._numbers.clear()


@dataclass
class WayBack:
    """What the walk back has found so far.

    Attributes:
        outer_loss: L(θ_K), a scalar, or (M,) of M outer losses.
        direct: ∂L(θ_K; φ)/∂φ at fixed θ_K; empty where L does not read the teacher.
        bars: the :class:`Cotangents` of the carry before the step to which it has come.
        sizes: of the gradients in the weights.
        feedback: h of the steps from there on, from the last one to the first.
        in_settings: the gradients in the settings of these steps, in the same order.
    """

    outer_loss: Tensor
    direct: Tree
    bars: Held
    sizes: Finite = field(default_factory=lambda: Finite(NOT_FINITE))
    feedback: list[Any] = field(default_factory=list)
    in_settings: list[Any] = field(default_factory=list)


# ---------------------------------------------------------------------------------------- the walk


@contextmanager
def running_graphs(device: torch.device) -> Iterator[None]:
    """Take steps by graphs in this block."""
    with torch.no_grad(), no_fast_path(math=True), deterministic(device), Capturing():
        yield


class CompiledPath:
    """A path of compiled steps, which is walked forward and back.

    What the graphs are given is held, taken apart once: each carry serves a step and its adjoint.

    Attributes:
        judged: the outer batch as the problem reads it.
        row_of_outer: its first row.
        teacher, student: the places of the networks' tensors.
        book: what is known of the steps.
        replays: digests of states, by which it is seen whether steps that are computed again come
            out as they did. They are those of the states at the ends of blocks, and of every √K-th
            state where all are kept.
    """

    def __init__(self, request: PathRequest, plan: PathPlan, graphs: Graphs) -> None:
        self.request = request
        self.plan = plan
        self.graphs = graphs
        self.judged = request.problem.outer_batch(request.outer)
        # Checks of outputs are given a row, for graphs serve outer batches of all sizes.
        self.row_of_outer = Held.of(
            pytree.tree_map_only(Tensor, lambda t: t[:1] if t.ndim else t, self.judged)
        )
        self.teacher = Places(request.teacher, "teacher")
        self.student = Places(request.student, "student")
        self.phi = Held.of(plan.phi)
        self.rates: list[Any] = [*map(Held.of, plan.rates)]
        self.weights: Sequence[Tensor | None] = [None]
        if request.weights is not None:
            self.weights = request.weights.unbind()
        self.book = StepBook()
        self.replays = ReplayCheck(request.replay_tolerance)
        self.held = Carries(plan, request.mode.keep_on)
        states = Carries(plan, request.mode.keep_on)
        self.walk = Walk(self, states, plan.keeping.spacings, self.replays)

    def find(self) -> Hypergradient:
        """Walk forward and back, and return the gradient; after an error no generator has moved."""
        begun = RandomState.now(self.plan.device)
        captures = self.graphs.captures
        try:
            with running_graphs(self.plan.device):
                # A function that always returns another batch is refused here, not after the path.
                self._read_batch(0)
                carry = self._walk_forward()
                ended = RandomState.now(self.plan.device)
                back = self._turn_back(carry.value, ended)
                self._walk_back(back)
            if self.graphs.captures != captures:
                self._compare_again()
        except BaseException:
            begun.restore()
            raise
        ended.restore()
        return self._result(carry.value, back)

    def _compare_again(self) -> None:
        """Compare graphs that were made on the way, such as those of another number of a loss."""
        batch = self._read_batch(self.plan.compared_step)
        refuse_other_gradient(self.request, self.plan, self.graphs, batch)

    def weights_after(self, weights: Tensor, steps: int) -> Tree:
        """Return the student's weights after the first steps, with other weights of the examples.

        No state is kept, and nothing is differentiated.

        Args:
            weights: as of :class:`PathRequest`.
        """
        path = CompiledPath(replace(self.request, weights=weights), self.plan, self.graphs)
        carry = Held.of(self.plan.start)
        with running_graphs(self.plan.device):
            for number in range(steps):
                carry, _ = path._take_step(number, carry)
        last: Carry = carry.value
        return last.params

    def _walk_forward(self) -> Held:
        """Take the steps, and return the carry after the last one."""
        plan = self.plan
        carry = Held.of(plan.start)
        losses = Finite(LOSS_NOT_FINITE)
        with step_bar(self.request.shows_progress, plan.steps, "steps") as advance:
            for number in range(plan.steps):
                self.walk.pass_by(number, carry, plan.steps)
                look = refusing_draws_outside() if number == 0 else nullcontext()
                with look:
                    carry, loss = self._take_step(number, carry)
                self.book.losses.append(loss)
                losses.note(number, loss)
                advance()
        losses.look()
        if plan.steps > 1:
            self.walk.note(plan.steps, carry)
        return carry

    def _turn_back(self, carry: Carry, ended: RandomState) -> WayBack:
        """Return the outer loss at the end of the path, and the cotangents that it has there."""
        request = self.request
        # As on the eager road, the outer loss draws from a stream apart from the path's.
        with (
            replayed(ended.branch()),
            torch.enable_grad(),
            self.teacher.holding(Network(self.plan.phi, carry.teacher_state)),
            self.student.holding(Network(carry.params, carry.state)),
        ):
            losses = self._outer_losses()
            L = losses if request.judging else losses[0]
            phi = self.plan.phi
            if self.reads_teacher:
                phi = {name: p for name, p in self.teacher.parameters() if name in phi}
            theta = {name: p for name, p in self.student.parameters() if name in carry.params}
            pull = partial(gradients, L, (theta, phi))
            if request.judging:
                v, in_teacher = torch.func.vmap(pull)(torch.eye(len(L)).to(L))
            else:
                v, in_teacher = pull(torch.ones_like(L))
            L = L.detach()
        in_optimizer = pytree.tree_map(lambda t: t.new_zeros((*L.shape, *t.shape)), carry.optimizer)
        direct = in_teacher if "teacher" in request.wrt and self.reads_teacher else {}
        bars = Held.of(Cotangents(v, in_optimizer, in_teacher))
        return WayBack(outer_loss=L, direct=direct, bars=bars)

    def _walk_back(self, back: WayBack) -> None:
        """Take the adjoints of the steps from the last to the first one that is differentiated."""
        plan = self.plan
        to_go = plan.steps - plan.first
        with step_bar(self.request.shows_progress, to_go, "steps back") as advance:
            for number in self.walk.back(plan.first, 0, plan.steps, *self.walk.spacings):
                self._take_adjoint(number, back)
                advance()
        back.sizes.look()

    def _take_adjoint(self, number: int, back: WayBack) -> None:
        """Go back through one step that is held, under the draws that it had."""
        kind = self.book.kinds_of_steps[number]
        carry = self.held.read(number)
        batch = self._read_batch(number)
        back.bars, h, in_settings, size = self.graphs.adjoint(
            self.phi, carry, self._inputs_of_step(number, batch), back.bars
        )
        back.sizes.note(number, size)
        back.feedback.append(on_value(h, kind.value))
        back.in_settings.append(in_settings)

    def _result(self, carry: Carry, back: WayBack) -> Hypergradient:
        request = self.request
        plan = self.plan
        L = back.outer_loss
        bars: Cotangents = back.bars.value
        feedback = [*back.feedback]
        # The steps that are not differentiated have a feedback of 0.
        for number in reversed(range(plan.first)):
            kind = self.book.kinds_of_steps[number]
            zeros = {name: t.new_zeros((*L.shape, *t.shape)) for name, t in kind.zeros.items()}
            feedback.append(on_value(zeros, kind.value))
        return Hypergradient(
            grads=bars.teacher if "teacher" in request.wrt else {},
            feedback=tuple(feedback[::-1]),
            inner_loss=torch.stack(self.book.losses).mean(),
            outer_loss=L,
            student_params=carry.params,
            inner_state=None,
            kept=plan.keeping.words(plan.steps),
            start=bars.params if "start" in request.wrt else {},
            settings=stacked_settings(back.in_settings[::-1], request.settings, steps=plan.steps),
            replay_error=self.replays.error,
            direct=back.direct,
            float32_products=float32_products(plan.device),
        )

    # ----------------------------------------------------------------------------------- one step

    def _read_batch(self, number: int) -> Held:
        """Return a batch; one that a function returns is refused if it is another than before."""
        ahead = self.request.ahead
        if not callable(ahead.batches):
            return Held.of(ahead[number])
        # A function may seed the default generator.
        with replayed(RandomState.now(self.plan.device)):
            batch = ahead[number]
        self.book.note_batch(number, batch)
        return Held.of(batch)

    def _take_step(self, number: int, carry: Held) -> tuple[Held, Tensor]:
        """Return the carry after a step, and its inner loss."""
        batch = self._read_batch(number)
        refuse_other_gradient(self.request, self.plan, self.graphs, batch)
        taken = self.graphs.step(self.phi, carry, self._inputs_of_step(number, batch))
        for text, is_found in taken.findings.items():
            checks.refuse(is_found, f"in step {number}, {text}")
        self.book.note_signal(number, batch.kind, taken.signal)
        return taken.carry, taken.loss

    def hold(self, number: int, carry: Held) -> None:
        """Hold the carry before a step."""
        self.held.keep(number, carry)

    def after(self, number: int, carry: Held | None = None) -> Held:
        """Take a step that is held.

        It is taken by the graph that took it first, for the adjoint may round otherwise.
        """
        if carry is None:
            carry = self.held.read(number)
        carry, _ = self._take_step(number, carry)
        return carry

    def forget(self, number: int) -> None:
        """Hold a step no longer."""
        self.held.forget(number)

    def _inputs_of_step(self, number: int, batch: Held) -> StepInputs:
        """Return what the step of a number is given besides the carry."""
        rates = self.rates[number % len(self.rates)]
        weights = self.weights[number % len(self.weights)]
        return StepInputs(batch, self.row_of_outer, rates, weights)

    # ------------------------------------------------------------------------------ the outer loss

    @property
    def reads_teacher(self) -> bool:
        """Whether the outer loss reads the teacher, and the mode has that direct term."""
        request = self.request
        return request.mode.has_direct_term and bool(
            outer_variables(request.problem, request.teacher)
        )

    def _outer_losses(self) -> Tensor:
        """Return L at the weights that the networks hold, (1,), or (M,) by problems that judge."""
        problem = self.request.problem
        outputs = returned_by(
            self.request.student, problem.outer_input(self.judged), "student, on the outer batch"
        )
        z = wide(checks.logits(outputs, "student"))
        losses = []
        for judge in self.request.judging or [problem]:
            total, weight = sum_and_weight(judge.outer_loss(z, self.judged))
            losses.append(total / weight)
        return torch.stack(losses)


# ----------------------------------------------------------------------------------- kept states


class Carries(States):
    """Carries that are kept with the generators, and without what is as it was at the start."""

    def __init__(self, plan: PathPlan, on: Literal["cpu"] | None) -> None:
        super().__init__(on)
        self.plan = plan

    def keep(self, number: int, state: Held) -> None:
        """Keep the carry before a step, and the generators."""
        start = self.plan.start
        kept: Any = state
        if start.state or start.teacher_state:
            carry: Carry = state.value
            kept = carry._replace(
                state=moved_since(start.state, carry.state),
                teacher_state=moved_since(start.teacher_state, carry.teacher_state),
            )
        super().keep(number, (kept, RandomState.now(self.plan.device)))

    def read(self, number: int) -> Held:
        """Return the carry before a step, and set the generators back."""
        kept, random = super().read(number)
        random.restore()
        if isinstance(kept, Held):
            return kept
        start = self.plan.start
        of_student = {**start.state, **kept.state}
        of_teacher = {**start.teacher_state, **kept.teacher_state}
        return Held.of(kept._replace(state=of_student, teacher_state=of_teacher))


def moved_since(start: Tree, now: Tree) -> Tree:
    """Return the tensors that are no longer what they were at the start.

    Those that do not move, such as frozen weights, are held once.
    """
    return {name: t for name, t in now.items() if not torch.equal(t, start[name])}


# ---------------------------------------------------------------------------------- the comparison


def refuse_other_gradient(
    request: PathRequest, plan: PathPlan, graphs: Graphs, batch: Held
) -> None:
    """Refuse graphs whose gradient through one step on such a batch is not the eager one.

    Batches of a kind that was compared before are let through.
    """
    # Graphs without weights of examples are others.
    kind = (request.weights is None, batch.kind)
    # Where one was made since, such as for another number that a loss reads, it is compared too.
    if graphs.compared.get(kind) in (BEING_COMPARED, graphs.captures):
        return
    if plan.comparisons[kind].have_ended:
        return
    one_step = Lookahead([batch.value], settings=plan.compared_settings)
    weights = None
    if request.weights is not None:
        # The eager road has none.
        weights = torch.ones_like(request.weights[:1])
    begun = RandomState.now(plan.device)
    # The step by which they are compared is a step by these graphs too, and not compared.
    graphs.compared[kind] = BEING_COMPARED
    try:
        with replayed(begun):
            by_graphs = differentiate(
                replace(
                    request,
                    mode=Forward(),
                    ahead=one_step,
                    wrt=("teacher", *request.settings),
                    weights=weights,
                    shows_progress=False,
                )
            )
            after = RandomState.now(plan.device)

        def take_eager() -> Hypergradient:
            with replayed(begun), branching_to(after.branch()):
                return eager_gradient(request, one_step)

        eager = take_eager()
        is_decided = refuse_other_than_eager(
            compared_leaves(by_graphs),
            compared_leaves(eager),
            eager.inner_loss,
            take_again=lambda: compared_leaves(take_eager()),
            student=request.student,
        )
        if not is_decided:
            plan.comparisons[kind].count_drowned("compiled steps are right")
    finally:
        del graphs.compared[kind]
    if is_decided:
        graphs.compared[kind] = graphs.captures


def eager_gradient(request: PathRequest, one_step: Lookahead) -> Hypergradient:
    """Return the gradient of one step on the eager road."""
    problem: Any = request.judging[0] if request.judging else request.problem
    eager_request = Request(
        teacher=request.teacher,
        student=request.student,
        outer=request.outer,
        inner=one_step,
        mode="forward",
        problem=problem,
        inner_optimizer=request.optimizer,
        clip_norm=request.clip_norm,
    )
    try:
        return through_steps(eager_request)
    except MissingDerivative as error:
        # What an eager step proposes may not be compiled.
        raise MissingDerivative(error.what) from error


def compared_leaves(found: Hypergradient) -> dict[str, dict[int, Tensor]]:
    """Return the tensors that are compared, by their names; of several outer losses the first."""
    h = found.feedback[0]
    L = found.outer_loss
    if L.ndim:
        h, L = pytree.tree_map(lambda t: t[0], (h, L))
    values = {"h": h, "the outer loss": L, "the teacher's gradient": found.grads}
    return {name: dict(enumerate(pytree.tree_leaves(value))) for name, value in values.items()}
