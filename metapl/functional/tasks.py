r"""The gradient through student steps on many tasks, by one graph of operations.

The tasks share the student's weights, with which each of them begins, the optimizer and the
teacher; each has batches of its own, which are stacked along a first dimension. The eager engine's
path and its adjoint (:mod:`metapl.core.path`) are recorded for one task, and ``torch.func.vmap``
maps the recording over the tasks. So a task has weights of its own after its first step, and the
gradient is that of the mean of the outer losses:

.. math:: \frac{1}{T} \sum_t \nabla_{\theta_0} L_t(\theta_{K,t}(\theta_0))

Source: model-agnostic meta-learning (Finn et al., 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.core.lookahead import Lookahead
from metapl.core.order import Orders
from metapl.engines.recorded import RecordedEngine, UpdateOfState
from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.batch import Batch, map_tensors, named_leaves_of, plain
from metapl.execution.checks import unexpected
from metapl.execution.numerics import float32_products
from metapl.execution.state import RandomState, replayed
from metapl.feedback.hypergradient import Differentiation, Hypergradient, Request, through_steps
from metapl.functional.adjoint import Settings
from metapl.functional.capture import Captured, Capturing
from metapl.functional.graphs import Subject, kept_graphs, rule_of
from metapl.functional.state import Network, constants_of, tensors_of, unclipped
from metapl.functional.step import Places, with_settings
from metapl.functional.training import first_state, tensor_settings, why_not_compiled
from metapl.updates import Options, options_of
from metapl.updates.base import OptimizerState


@dataclass(frozen=True)
class Tasks:
    """The batches of tasks, stacked along a first dimension.

    Args:
        outer: the outer batches.
        inner: the inner batches, or the look-ahead of such batches.
        count: T, the number of tasks.
    """

    outer: Any
    inner: Any
    count: int

    @staticmethod
    def of(outer: Batch, inner: Batch) -> Tasks:
        """Return the tasks of these batches; refuse tensors that do not agree in their number."""
        outer = plain(outer)
        if isinstance(inner, Lookahead):
            # A function's batches are read here, since the graph takes those of all steps.
            inner = replace(inner, batches=list(inner), steps=None)
            batches_by_name = {f"inner[{k}]": batch for k, batch in enumerate(inner)}
        else:
            inner = plain(inner)
            batches_by_name = {"inner": inner}
        counts: dict[str, int] = {}
        for name, batch in {"outer": outer, **batches_by_name}.items():
            for place, leaf in named_leaves_of(batch):
                if not isinstance(leaf, Tensor):
                    continue
                if leaf.ndim == 0:
                    expected = "a first dimension of tasks in every tensor"
                    raise unexpected(f"tasks=True was given with {name}{place},", leaf, expected)
                counts[f"{name}{place}"] = len(leaf)
        if len({*counts.values()}) != 1 or 0 in counts.values():
            numbers = few((f"{name} of {count}" for name, count in counts.items()), 20)
            raise MetaplError(f"tasks=True was given with {numbers} tasks; expected as many.")
        return Tasks(outer, inner, next(iter(counts.values())))

    def request_of(self, number: int, request: Request) -> Request:
        """Return a request on the batches of one task."""

        def of_task(batch: Batch) -> Any:
            return map_tensors(lambda t: t[number], batch)

        inner = self.inner
        if isinstance(inner, Lookahead):
            inner = replace(inner, batches=[*map(of_task, inner)])
        else:
            inner = of_task(inner)
        return replace(request, outer=of_task(self.outer), inner=inner)


class Start(NamedTuple):
    """What all tasks begin with.

    Attributes:
        optimizer: the state of the student's optimizer by parameter.
        settings: the optimizer's numbers in each step, or once for all of them.
    """

    teacher: Network
    student: Network
    optimizer: OptimizerState
    settings: list[Settings]


class OfTask(NamedTuple):
    """What is found on one task; for the other fields see :class:`Hypergradient`.

    Attributes:
        is_wrong: whether a check has failed, or a number is not finite.
    """

    is_wrong: Tensor
    grads: dict[str, Tensor]
    start: dict[str, Tensor]
    settings: dict[str, Tensor]
    direct: dict[str, Tensor]
    inner_loss: Tensor
    outer_loss: Tensor
    feedback: Any
    student_params: dict[str, Tensor]


# What is a mean over the tasks.
OF_MEAN = ("grads", "start", "settings", "direct", "inner_loss", "outer_loss")


class RecordedDifferentiation(Differentiation):
    """A gradient through student steps, at the tensors that the networks hold in the meantime.

    Args:
        options: of the param groups in each step.
    """

    def __init__(self, request: Request, options: Sequence[Options]) -> None:
        super().__init__(request)
        self.options = [*options]

    def _check_wrt(self) -> None:
        """Do nothing: settings have no values here, and the call has looked at them."""

    def find(self, orders: Orders | None = None) -> Hypergradient:
        """Return the gradient by the graphs that the passes keep, with all checks in the fault."""
        self.student = RecordedEngine(
            self.of_student, self.slots[1], double_backward=self.estimate.keep_graph
        )
        if self.settings and self.estimate.keep_graph:
            self._make_settings_leaves()
        return self._in_order("graph", is_tried=False)


class CapturedTasks(Captured[OfTask]):
    """All tasks as one graph."""

    def before_capture(self, *arguments: Any) -> None:
        """Record one task before all of them are."""
        with replayed(RandomState.now(self.device)):
            self.function(*arguments)


class TaskGraphs:
    """The recorded path of one task and its adjoint, mapped over tasks.

    Args:
        subject: the networks and the problem of which they are recorded.
        differentiation: on one of the tasks.
        is_compiled: whether Inductor compiles the graph of all tasks.
    """

    def __init__(
        self, subject: Subject, differentiation: Differentiation, *, is_compiled: bool
    ) -> None:
        update: Any = unclipped(differentiation.update)
        self.subject = subject
        self.rule = update.without_optimizer()
        self.constants = constants_of(update)
        self.steps = len(differentiation.inner_batches)
        self.is_lookahead = differentiation.inner_batches.is_lookahead
        self.mode = differentiation.estimate
        self.clip_norm = differentiation.request.clip_norm
        self.wrt = differentiation.wrt
        self.teacher = Places(subject.teacher, "teacher")
        self.student = Places(subject.student, "student")
        device = differentiation.device
        self.of_one = Captured(self._of_one, device, subject.sources, is_compiled=False)
        self.of_all = CapturedTasks(self._of_all, device, subject.sources)
        self.of_one.mapped_over = "tasks"
        self.of_all.mapped_over = "tasks"
        self.is_compiled = is_compiled

    def doubt(self) -> None:
        """Compare the recording once more, which serves other networks or another problem."""
        self.of_one.is_doubted = bool(self.subject.outside)

    def __call__(self, start: Start, outer: Any, inner: Any) -> OfTask:
        """Return what is found on all tasks, gradients and losses as means over them."""
        if not self.is_compiled:
            return self._of_all(start, outer, inner)
        with Capturing():
            return self.of_all.compared(start, outer, inner)

    def _of_all(self, start: Start, outer: Any, inner: Any) -> OfTask:
        """Map the recording over the tasks."""
        batches = (outer, inner)
        count = next(len(t) for t in pytree.tree_leaves(batches) if isinstance(t, Tensor))
        dims_of_batches = pytree.tree_map(lambda t: 0 if isinstance(t, Tensor) else None, batches)
        teacher, dims_of_teacher = for_each_task(self.teacher.module, start.teacher, count)
        student, dims_of_student = for_each_task(self.student.module, start.student, count)
        start = start._replace(teacher=teacher, student=student)
        shared: Any = None
        dims_of_start = Start(dims_of_teacher, dims_of_student, shared, shared)
        mapped = torch.func.vmap(
            self.of_one.compared, (dims_of_start, *dims_of_batches), randomness="different"
        )
        found: OfTask = mapped(start, outer, inner)
        means = {
            name: pytree.tree_map(lambda t: t.mean(0), getattr(found, name)) for name in OF_MEAN
        }
        # h is of the mean over tasks too.
        feedback = pytree.tree_map(lambda t: t / count, found.feedback)
        return found._replace(**means, feedback=feedback)

    def _of_one(self, start: Start, outer: Any, inner: Any) -> OfTask:
        """Return what is found on one task, from the tensors that it begins with."""
        options = [with_settings(self.constants, numbers) for numbers in start.settings]
        options *= self.steps // len(options)
        request = Request(
            teacher=self.subject.teacher,
            student=self.subject.student,
            problem=self.subject.problem,
            outer=outer,
            inner=Lookahead(list(inner)) if self.is_lookahead else inner,
            mode=self.mode,
            inner_optimizer=UpdateOfState(self.rule, options[0], start.optimizer),
            clip_norm=self.clip_norm,
            wrt=self.wrt,
        )
        with (
            checks.no_values(),
            torch.enable_grad(),
            self.teacher.holding(start.teacher),
            self.student.holding(start.student),
        ):
            differentiation = RecordedDifferentiation(request, options)
            found = differentiation.find()
            is_wrong = differentiation.fault.flag
        _, *names = OfTask._fields
        of_task = OfTask(is_wrong, **{name: getattr(found, name) for name in names})
        without_graph: OfTask = pytree.tree_map_only(Tensor, Tensor.detach, of_task)
        return without_graph


def for_each_task(
    module: nn.Module | None, network: Network, count: int
) -> tuple[Network, Network]:
    """Return the tensors of a network as views for each task, and what is mapped of them.

    Passes move buffers, and kernels of recurrent networks write to what they make of weights, so
    that each task has its own. Frozen weights are shared.
    """
    frozen = set[str]()
    if module is not None:
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}

    def viewed(t: Tensor) -> Tensor:
        return t.expand(count, *t.shape)

    params = {name: viewed(t) for name, t in network.params.items()}
    state = {name: t if name in frozen else viewed(t) for name, t in network.state.items()}
    dims: Any = {name: None if name in frozen else 0 for name in network.state}
    dims_of_params: Any = dict.fromkeys(network.params, 0)
    return Network(params, state), Network(dims_of_params, dims)


def over_tasks(differentiation: Differentiation, tasks: Tasks, *, compile: bool) -> Hypergradient:
    """Return :func:`metapl.hypergradient` of the mean of the tasks' outer losses.

    Args:
        differentiation: on the first of the tasks.
        compile: whether Inductor compiles the graph of all tasks.
    """
    if reason := why_not_mapped(differentiation):
        raise MetaplError(f"tasks=True was given with {reason}; or leave tasks out.")
    request = differentiation.request
    optimizer: Any = differentiation.inner_optimizer
    update: Any = unclipped(differentiation.update)
    ahead = differentiation.ahead
    options = ahead.options(optimizer) or [options_of(optimizer)] * len(ahead)
    device = differentiation.device

    def make(subject: Subject) -> TaskGraphs:
        return TaskGraphs(subject, differentiation, is_compiled=compile)

    kind = ("tasks", len(ahead), differentiation.inner_batches.is_lookahead, compile)
    asked = (repr(differentiation.estimate), request.clip_norm, [*differentiation.wrt])
    graphs = kept_graphs(
        request.teacher,
        request.student,
        differentiation.problem,
        (kind, asked, rule_of(update, device)),
        make,
    )
    start = Start(
        teacher=tensors_of(request.teacher),
        student=tensors_of(request.student),
        optimizer=first_state(options, update, differentiation.wrt),
        settings=tensor_settings(
            options,
            update,
            differentiation.wrt,
            is_scheduled=bool(ahead.settings),
            device=device,
        ),
    )
    inner = tasks.inner
    if isinstance(inner, Lookahead):
        inner = tuple(inner)
    begun = RandomState.now(device)
    found = graphs(start, tasks.outer, inner)._asdict()
    is_wrong = found.pop("is_wrong")
    if bool(is_wrong.any()):
        begun.restore()
        refuse_wrong_task(request, tasks, is_wrong)
    return Hypergradient(
        **found, inner_state=None, order="graph", float32_products=float32_products(device)
    )


def refuse_wrong_task(request: Request, tasks: Tasks, is_wrong: Tensor) -> None:
    """Raise the error of the first task on which a check has failed, where there is one."""
    number = int(is_wrong.nonzero()[0])
    text = "a loss or the feedback is NaN or infinite."
    try:
        through_steps(tasks.request_of(number, request))
    except MetaplError as error:
        text = str(error)
    raise MetaplError(f"task {number}: {text}")


def why_not_mapped(differentiation: Differentiation) -> str:
    """Return what no graph of many tasks takes, and what is expected instead; "" for nothing."""
    request = differentiation.request
    mode = differentiation.estimate
    if request.generator is not None:
        return "a generator, of which no graph draws; expected torch.manual_seed"
    if request.recompute_teacher or request.shows_progress:
        return "recompute_teacher or progress, of tasks one by one; expected them left out"
    if mode.keep_every or mode.keep or mode.keep_on:
        return f"{mode!r}, and a graph computes no step again; expected Forward()"
    return why_not_compiled(
        mode,
        differentiation.problem,
        student=differentiation.of_student,
        teacher=differentiation.of_teacher,
        optimizer=differentiation.inner_optimizer,
        accumulate=request.accumulate,
    )
