"""A trainer's step as a function of tensors:

    state, report = step(state, outer, inner, noise=None)

Nothing is hidden: weights, buffers, optimizers, their settings and the step's number go in and come
out, labels are drawn by the noise that is given, and only dropout draws from torch's default
generator. It is the eager step (:func:`metapl.core.algorithm.learn`) on networks that hold these
tensors in the meantime. Recorded, it is one graph of operations, which Inductor compiles,
``torch.func.vmap`` maps, and ``torch.autograd`` differentiates to any order: in the weights, the
settings, the batches and all else that is given. That derivative is of the numbers which a step
computes. What the step takes for constant while it looks for its gradients, such as the feedback h
or what a loss detaches, is no constant there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from metapl.core.algorithm import Learned, learn
from metapl.core.lookahead import InnerBatches, Lookahead
from metapl.core.size import FeedbackSize
from metapl.core.teacher import Teacher, Teaching
from metapl.engines.recorded import RecordedEngine, UpdateOfState
from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.batch import Batch
from metapl.execution.layout import Layout
from metapl.execution.numerics import Tree, no_fast_path
from metapl.execution.state import Slots, named_parts, put_contents
from metapl.feedback.base import Estimator
from metapl.functional.capture import Captured
from metapl.functional.state import (
    Network,
    Report,
    State,
    as_dict,
    rounded_step,
    with_fields,
)
from metapl.functional.transforms import (
    first_of_mapped,
    is_differentiated,
    is_transformed,
    no_transform,
)
from metapl.problems.base import BilevelProblem
from metapl.problems.losses import TeacherLoss
from metapl.updates import Options, Update

Step = Callable[..., tuple[State, Report]]


@dataclass(frozen=True)
class StepRules:
    """What all steps of a trainer have in common: networks, losses and rules, but no tensor.

    Args:
        teacher: None: the problem has none.
        inner_update: U of the student, perhaps behind a clip.
        outer_update: that of the teacher; None without a teacher.
        inner_constants: what the param groups hold besides the settings, which are in the state.
        outer_constants: the same of the teacher's optimizer.
        losses_for: the teacher's own losses, by the inner batch.
        steps: K.
        feedback_size: the rule that gives λ.
        direct_term: as of :func:`metapl.core.algorithm.learn`.
        device: where the networks are.
        autocast: makes the context of the networks' passes.
    """

    teacher: Layout | None
    student: Layout
    problem: BilevelProblem
    mode: Estimator
    inner_update: Update
    outer_update: Update | None
    inner_constants: Options
    outer_constants: Options
    losses_for: Callable[[Batch], Sequence[TeacherLoss]]
    steps: int
    feedback_size: FeedbackSize
    direct_term: str
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext


class Places:
    """The places where a network holds its tensors, by their names.

    A tensor that several places hold has the name of the first of them.

    Args:
        module: the network; None has no place.
        role: what errors call it.
    """

    def __init__(self, module: nn.Module | None, role: str) -> None:
        self.module = module
        self.role = role
        self.first_names: dict[str, str] = {}
        name_of: dict[int, str] = {}
        for place, (table, name) in self._filled().items():
            self.first_names[place] = name_of.setdefault(id(table[name]), place)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Return the weights that the network holds now, with their names."""
        return iter(()) if self.module is None else self.module.named_parameters()

    def _tables(self) -> list[tuple[str, dict[str, Any]]]:
        """Return each part's tables of parameters and of buffers, with the prefix of its names."""
        tables: list[tuple[str, Any]] = []
        for prefix, part in [] if self.module is None else named_parts(self.module):
            tables += [(prefix, part._parameters), (prefix, part._buffers)]
        return tables

    def _filled(self) -> dict[str, tuple[dict[str, Any], str]]:
        """Return the places that hold a tensor, as a table and a name, by their whole names."""
        filled = {}
        for prefix, table in self._tables():
            for name, t in table.items():
                if t is not None:
                    filled[prefix + name] = (table, name)
        return filled

    @contextmanager
    def holding(self, network: Network) -> Iterator[Callable[[], Tree]]:
        """Hold the tensors of a state in this block: weights as leaves, and copies of the others.

        Yields: a function that returns the others as passes have left them.
        """
        filled = self._filled()
        if [*filled] != [*self.first_names]:
            raise MetaplError(
                "the network has other parameters or buffers than when its step was made; "
                "expected functional() again."
            )
        contents = [(table, dict(table)) for _, table in self._tables()]
        tensors = {name: t.detach().requires_grad_() for name, t in network.params.items()}
        versions = {name: t._version for name, t in tensors.items()}
        # Passes move them in place.
        tensors |= {name: t.detach().clone() for name, t in network.state.items()}
        for place, (table, name) in filled.items():
            table[name] = tensors[self.first_names[place]]
        try:
            yield lambda: self._left(network)
            written = [
                name for name, version in versions.items() if tensors[name]._version != version
            ]
            if written:
                raise MetaplError(
                    f"the {self.role} writes in a pass to its weights ({few(written, 3)}); "
                    "expected a registered buffer for what passes carry on, or the trainer's own "
                    "steps in the place of functional()."
                )
        finally:
            put_contents(contents)

    def _left(self, network: Network) -> Tree:
        filled = self._filled()
        new = [place for place in filled if place not in self.first_names]
        if new:
            raise MetaplError(
                f"the {self.role} makes a buffer in its pass ({few(new, 3)}), and the state of a "
                "step has none; expected one that is there before: run the network once on a "
                "batch, or the trainer's own steps in the place of functional()."
            )
        left: Tree = {}
        for name in network.state:
            table, key = filled[name]
            left[name] = table[key].detach()
        return left


@contextmanager
def without_values() -> Iterator[checks.Fault]:
    """Read no value of a tensor in this block, which has graphs, and yield what checks find."""
    fault = checks.Fault()
    token = checks.deferred.set(fault)
    try:
        with checks.no_values(), torch.enable_grad():
            yield fault
    finally:
        checks.deferred.reset(token)


class StateStep:
    """The step of these networks, losses and rules, as a function of tensors.

    The modules' own tensors are not read, those of the state are. ``torch.func.vmap`` maps a
    recording of it, which is compared with the step itself on the first of the states. Where what
    is given has a graph, another recording is differentiated.

    Attributes:
        first_look: is given the state and the batches of the first call, of several the first of
            them, and whether there is noise, and refuses a step that is not what it should be;
            None: nothing does.
    """

    def __init__(self, rules: StepRules, sources: Sequence[object]) -> None:
        self.rules = rules
        teacher = None if rules.teacher is None else rules.teacher.network
        self.teacher = Places(teacher, "teacher")
        self.student = Places(rules.student.network, "student")
        record = partial(
            Captured,
            self.taken,
            rules.device,
            sources,
            is_compiled=False,
            looks_at_modes=True,
            takes_differences=rules.mode.takes_differences,
        )
        self.recorded: Captured[tuple[State, Report]] = record()
        self.differentiated: Captured[tuple[State, Report]] = record(has_derivative=True)
        self.first_look: Callable[[StateStep, Any, bool], None] | None = None

    def __call__(
        self, state: State, outer: Batch, inner: Batch, noise: Any = None
    ) -> tuple[State, Report]:
        arguments = (state, outer, inner, noise)
        if self.first_look is not None and checks.has_values.get():
            # In no mode either, such as that of a user's own recording.
            with no_transform(), _disable_current_modes(), torch.enable_grad():
                first = pytree.tree_map_only(Tensor, first_of, (state, outer, inner))
                self.first_look(self, first, noise is not None)
            self.first_look = None
        if is_differentiated(arguments):
            return self.differentiated.compared(*arguments)
        if is_transformed():
            return self.recorded.compared(*arguments)
        return self.taken(*arguments)

    def taken(self, state: State, outer: Batch, inner: Batch, noise: Any) -> tuple[State, Report]:
        """Return the next state, and the report."""
        with (
            without_values() as fault,
            self.teacher.holding(state.teacher) as left_of_teacher,
            self.student.holding(state.student) as left_of_student,
        ):
            moved, report = taken_step(self.rules, state, outer, inner, noise)
            moved = with_fields(
                moved,
                teacher=Network(moved.teacher.params, left_of_teacher()),
                student=Network(moved.student.params, left_of_student()),
            )
        if fault.findings:
            texts = tuple(text for _, text in fault.findings)
            found = torch.stack([checks.result_of(bad) for bad, _ in fault.findings])
            flag = torch.where(found.any(), torch.nan, report.flag)
            report = with_fields(report, flag=flag, findings={texts: found})
        without_graph: tuple[State, Report] = pytree.tree_map_only(
            Tensor, Tensor.detach, (moved, report)
        )
        return without_graph


def first_of(t: Tensor) -> Tensor:
    """Return the first of what a mapped tensor stands for, without its graph."""
    return first_of_mapped(t).detach()


def taken_step(
    rules: StepRules, state: State, outer: Batch, inner: Batch, noise: Any
) -> tuple[State, Report]:
    """Return the next state and the report, from networks that hold the tensors of a state."""
    inner_options = with_settings(rules.inner_constants, state.inner.settings)
    student = RecordedEngine(
        rules.student, Slots(rules.student.network), double_backward=rules.mode.keep_graph
    )
    update = UpdateOfState(rules.inner_update, inner_options, state.inner.state)
    inner_batches = InnerBatches.of_one_step(inner)
    noises = [noise] if rules.steps == 1 else list(noise or [None] * rules.steps)
    if rules.steps > 1 or isinstance(inner, Lookahead):
        inner_batches = InnerBatches(list(inner), is_lookahead=True)
        if len(inner_batches) != rules.steps:
            raise MetaplError(
                f"a step of {rules.steps} student steps was given {len(inner_batches)} inner "
                f"batches; expected as many, or functional() of a trainer with "
                f"lookahead={len(inner_batches)}."
            )
    network = nn.Module() if rules.teacher is None else rules.teacher.network
    teacher = Teacher(rules.teacher, rules.problem, student.ranks, rules.device, Slots(network))
    teaching = Teaching(
        teacher,
        rules.problem.outer_batch(outer),
        inner_batches,
        losses=() if rules.teacher is None else rules.losses_for(inner_batches[-1]),
        size=rules.feedback_size,
        step=state.step,
        noises=noises,
    )
    # Fused kernels of attention have no second derivative.
    with rules.autocast(), no_fast_path(math=True):
        learned = learn(
            student,
            update,
            teaching,
            rules.mode,
            state.mode,
            order="graph",
            direct_term=rules.direct_term,
        )

    # Line 8. What no loss reaches does not move, not even by weight decay.
    gradient = {name: p.grad for name, p in teacher.parameters.items() if p.grad is not None}
    theta_T = state.teacher.params
    s_T = state.outer.state
    if rules.outer_update is not None and gradient:
        outer_options = with_settings(rules.outer_constants, state.outer.settings)
        theta_T, s_T = rules.outer_update.update(theta_T, gradient, s_T, outer_options)

    # Line 3, as the optimizer itself takes it.
    steps = learned.path.steps
    theta, s = steps[-1].updated
    rounding = torch.zeros_like(learned.path.inner_loss)
    if update.is_rounded and len(steps) == 1:
        theta, s, rounding = rounded_step(
            rules.inner_update,
            state.student.params,
            state.inner.state,
            inner_options,
            gradient=steps[0].gradient,
            exact=theta,
        )
    moved = State(
        teacher=Network(theta_T, {}),
        student=Network(theta, {}),
        inner=with_fields(state.inner, state=s),
        outer=with_fields(state.outer, state=s_T),
        mode=learned.mode_state,
        step=state.step + 1,
    )
    return moved, report_of(learned, rules.steps, rounding)


def report_of(learned: Learned, count: int, rounding: Tensor) -> Report:
    """Return the report of a step."""
    steps = learned.path.steps
    scalars = dict(learned.scalars)
    loss = scalars.pop("inner_loss")
    not_taken = torch.full_like(loss, torch.nan)
    outer_loss = scalars.pop("outer_loss", not_taken)
    teacher_loss = scalars.pop("teacher_loss", torch.zeros_like(loss))
    teacher_losses = {
        name.removeprefix("teacher_"): scalars.pop(name)
        for name in [*scalars]
        if name.startswith("teacher_")
    }
    signals = [as_dict(of_step.signal.detached()) for of_step in steps]
    return Report(
        feedback=learned.h[0] if count == 1 else learned.h,
        signal=signals[0] if count == 1 else signals,
        student_outputs=steps[-1].outputs.detach(),
        inner_loss=loss,
        outer_loss=outer_loss,
        teacher_loss=teacher_loss,
        flag=torch.zeros_like(loss),
        teacher_losses=teacher_losses,
        step_rounding=rounding,
        sizes=scalars,
        findings={},
    )


def with_settings(constants: Options, settings: Options) -> list[dict[str, Any]]:
    """Return the options of param groups: what is constant, and the settings of the state."""
    return [{**group, **now} for group, now in zip(constants, settings, strict=True)]
