"""A trainer's step as one compiled graph: ``compile=True``.

It reads the tensors where modules and optimizers hold them (:mod:`metapl.functional.live_state`),
runs its graph, and copies what comes out back. The first step of each kind is compared with the
eager one, which a copy of the trainer takes (:mod:`metapl.functional.compared_step`); what cannot
be captured is refused there.

:class:`Compiled` is a graph and what it was made for. :class:`CompiledStep` has a cache of these,
and takes the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.core.lookahead import InnerBatches
from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import Batch, length
from metapl.execution.checks import Fault
from metapl.execution.state import RandomState, replayed, trainable
from metapl.feedback.report import StepReport
from metapl.functional.capture import Capture, Captured, Capturing
from metapl.functional.compared_step import (
    Outcome,
    compared_trees,
    eager_step,
    is_recorded_in_half_precision,
    refuse_other_than_eager,
)
from metapl.functional.comparison import Comparisons, copy_with_strides
from metapl.functional.cuda_graphs import StepByGraphs
from metapl.functional.graphs import rule_of, shared_captures
from metapl.functional.kinds import Constants, HeldAt, at_places
from metapl.functional.live_state import (
    LiveState,
    Moved,
    _is_training,
    constants_of_groups,
    groups_of,
    settings_of_step,
    weights_of_groups,
)
from metapl.functional.pure_step import (
    Updates,
    hooks_of_optimizers,
    networks_of,
    sources_of,
    step_of,
    updates_of,
)
from metapl.functional.state import (
    Network,
    Optimizer,
    Report,
    State,
    leaves_of,
    unclipped,
    with_fields,
)
from metapl.functional.step import Step
from metapl.problems.base import Signal, gumbel, modules_in
from metapl.protocols import TwoLevelTrainer
from metapl.updates import (
    TorchUpdate,
)
from metapl.updates.base import OptimizerState


class CapturedStep:
    """A step as compiled graphs, which write into the tensors that they are given.

    A step that is off writes nothing. Neither does the first one of a graph, whose results are to
    be compared.

    Args:
        sources: objects whose attributes the step reads: modules, the problem, losses and the mode.
        shared: as of :class:`metapl.functional.capture.Captured`.
    """

    def __init__(
        self,
        step: Step,
        device: torch.device,
        sources: Sequence[Any],
        shared: list[Capture] | None = None,
    ) -> None:
        self.step = step
        self.captured = Captured(self._on_parts, device, sources, shared=shared)
        # Of the last graph, where its results have the parts of what a step leaves.
        self._capture: Capture | None = None
        self._leaves: list[Any] = []
        self._writes = False
        self._report = HeldAt(None)

    # A compiled graph runs without a graph of autograd by itself.
    @torch.no_grad()
    def _on_parts(
        self,
        held: tuple[Network, Network, OptimizerState, OptimizerState, Constants],
        numbers: Tensor,
        mode: dict[str, Tensor],
        number: Tensor,
        *batches: Any,
    ) -> tuple[State, Report]:
        """Take the step from the parts of a state, and write what it leaves into them.

        Returns: the state after it, whose settings are left out where it was written, and the
        report.
        """
        teacher, student, inner_state, outer_state, structure = held
        inner, outer = pytree.tree_unflatten([*numbers.unbind()], structure.value)
        state = State(
            teacher,
            student,
            inner=Optimizer(inner_state, inner),
            outer=Optimizer(outer_state, outer),
            mode=mode,
            step=number,
        )
        moved, report = self.step(state, *batches)
        tensors, moved_tensors = leaves_of(state), leaves_of(moved)
        if len(tensors) == len(moved_tensors):
            is_right = report.flag == 0
            for t, moved_t in zip(tensors, moved_tensors, strict=True):
                t.copy_(torch.where(is_right, moved_t, t))
            moved = with_fields(
                state,
                inner=Optimizer(inner_state, []),
                outer=Optimizer(outer_state, []),
                mode=moved.mode,
                step=moved.step,
            )
        return moved, report

    def __call__(
        self, live: LiveState, outer: Batch, inner: Batch, noise: Any, *, on_copies: bool
    ) -> Moved:
        """Return what the step leaves.

        Args:
            on_copies: write into copies of the live tensors.
        """
        state = live.state
        captures = self.captured.captures
        capture, tensors = self.captured.find(
            live.held(), live.numbers(), state.mode, state.step, outer, inner, noise
        )
        is_first = self.captured.captures > captures
        # Recording moves no generator.
        start = RandomState.now(self.captured.device) if is_first else None
        on_copies = on_copies or is_first
        if on_copies:
            tensors = [*map(copy_with_strides, tensors)]
        results = self.captured.replay(capture, tensors)
        if capture is not self._capture:
            self._find_places(capture)
        moved, report = capture.results
        is_written = self._writes and not on_copies
        get = results.__getitem__
        return Moved(
            leaves=None if is_written else [*map(get, self._leaves)],
            mode={name: results[place] for name, place in moved.mode.items()},
            step=results[moved.step],
            flag=results[report.flag],
            # Of the report's tensors alone, so that a report holds no weights.
            report=partial(at_places, self._report.nest, [*map(get, self._report.places)]),
            state=lambda: at_places(capture.results, results)[0],
            start=start,
        )

    def _find_places(self, capture: Capture) -> None:
        """Note where a graph's results have the parts of what a step leaves."""
        moved, report = capture.results
        self._capture = capture
        self._leaves = leaves_of(moved)
        self._writes = all(capture.places[place] < capture.given for place in self._leaves)
        self._report = HeldAt(report)


@dataclass
class Compiled:
    """A step as one graph, and what it was made for.

    Attributes:
        key: what the graph was made for, by which the cache finds it.
        alive: the objects whose addresses are in the key. They are held here, so that no other
            object can get one of these addresses.
        updates: the rules of the optimizers.
        run: the graph, as a function of the live state, the batches and the noise.
        takes_outer_loss: whether the eager step has taken L(θ′).
        probs: class probabilities of the eager step, (B, C), which tell the type and the number of
            classes of noise for drawn labels; None where the signal has none.
        is_compared: whether a step that moves the student was compared with the eager one.
        draws: whether a graph draws from the default generators.
        direct_term: that of the trainer, which looks through all parameters of the teacher.
    """

    key: tuple[object, ...]
    alive: tuple[object, ...]
    updates: Updates
    run: Callable[..., Moved]
    direct_term: Literal["", "included", "left out"]
    probs: Tensor | None = None
    takes_outer_loss: bool = False
    is_compared: bool = False
    comparisons: Comparisons = field(default_factory=Comparisons)
    draws: bool = False


class CompiledStep:
    """The compiled steps of one trainer, which every call is given; a copy of it compiles anew."""

    def __init__(self) -> None:
        self._cache: dict[tuple[object, ...], Compiled] = {}
        # Those of the last step. Without live, the next step looks for both anew.
        self._compiled: Compiled | None = None
        self._live: LiveState | None = None

    def __reduce__(self) -> tuple[type[CompiledStep], tuple[()]]:
        return CompiledStep, ()

    def __call__(
        self, trainer: TwoLevelTrainer, outer_batch: Batch, inner_batches: InnerBatches
    ) -> StepReport:
        """Take one step on these batches, and return its report.

        Raises: :class:`metapl.MetaplError` before anything has moved.
        """
        steps = len(inner_batches)
        if self._live is not None and not self._live.is_of(trainer, steps):
            self._live = None
        if self._live is None or self._compiled is None:
            self._compiled = self._find_or_compile(trainer, steps)
        compiled = self._compiled
        live = self._live
        if live is None:
            live = LiveState(trainer, compiled.updates)
        else:
            live.refresh(trainer)
        moved, step_report = self._run(compiled, live, trainer, outer_batch, inner_batches)

        if self._live is None:
            live.adopt(trainer, moved.state(), steps)
            self._cache[compiled.key] = compiled
        live.write(moved, next_number=trainer.steps_done + 1)
        self._live = live
        trainer.mode_state = moved.mode
        trainer.steps_done += 1
        return step_report

    def prepare(
        self, trainer: TwoLevelTrainer, outer_batch: Batch, inner_batches: InnerBatches
    ) -> None:
        """Compile the step and compare it with the eager one, once, and move nothing.

        Steps before the first compiled one call this, so that a step that cannot be compiled is
        refused before anything has moved.

        Raises: :class:`metapl.MetaplError`.
        """
        if self._cache:
            return
        compiled = self._find_or_compile(trainer, len(inner_batches))
        live = LiveState(trainer, compiled.updates)
        with replayed(RandomState.now(trainer.device, trainer.generator)):
            self._run(compiled, live, trainer, outer_batch, inner_batches)
        self._cache[compiled.key] = compiled

    def _run(
        self,
        compiled: Compiled,
        live: LiveState,
        trainer: TwoLevelTrainer,
        outer_batch: Batch,
        inner_batches: InnerBatches,
    ) -> tuple[Moved, StepReport]:
        """Run the graph, compare what comes out with the eager step, and return it.

        Only random numbers have moved then, and none where it raises. A copy of the trainer takes
        the eager step, until one was compared.
        """
        take_eager = partial(eager_step, trainer, outer_batch, inner_batches)
        eager = None
        if not compiled.is_compared:
            eager = take_eager()
            compiled.probs = eager.report.signal.probs
            compiled.takes_outer_loss = "outer_loss" in eager.report.scalars
        start = None
        if eager is not None or compiled.draws or trainer.generator is not None:
            start = RandomState.now(trainer.device, trainer.generator)
        try:
            inner, noise = inner_arguments(inner_batches, compiled.probs, trainer.generator)
            with Capturing():
                moved = compiled.run(live, outer_batch, inner, noise, on_copies=eager is not None)
                if moved.start is not None:
                    start = start or moved.start
                    end = RandomState.now(trainer.device, trainer.generator)
                    compiled.draws = compiled.draws or not end.equals(moved.start)
                    if eager is None:
                        # For another shape or number, whose graph is another one.
                        with replayed(start):
                            eager = take_eager()
                step_report = step_report_of(compiled, trainer, moved, inner_batches)
                is_decided = eager is None or self._compare(
                    compiled,
                    trainer,
                    states=(live.state, Outcome(moved.state(), step_report), eager),
                    take_eager=take_eager,
                    start=start,
                )
        except BaseException:
            if start is not None:
                start.restore()
            raise
        # A warm-up may begin with a rate of 0, by which h is 0 on both roads: then the next step is
        # compared again, as after one that rounding drowns.
        if eager is not None:
            groups = unclipped(trainer.update).options
            compiled.is_compared = is_decided and any(group["lr"] != 0 for group in groups)
        return moved, step_report

    def _compare(
        self,
        compiled: Compiled,
        trainer: TwoLevelTrainer,
        *,
        states: tuple[State, Outcome, Outcome],
        take_eager: Callable[[], Outcome],
        start: RandomState | None,
    ) -> bool:
        """Refuse a step that is not the eager one, and return whether it needs no other comparison.

        Of steps of which nothing can be told some are compared.

        Args:
            states: the one before the step, and those after it and after the eager one.
            take_eager: takes the eager step, by a copy; no generator moves.
            start: the random numbers that the step began with.
        """
        before, found, eager = states

        def take_again() -> dict[str, dict[Any, Tensor]]:
            assert start is not None, "it is kept where steps are compared"
            with replayed(start):
                return compared_trees(before, take_eager())

        if refuse_other_than_eager(
            compared_trees(before, found),
            compared_trees(before, eager),
            eager.report.scalars["inner_loss"],
            take_again=take_again,
            student=trainer.student,
            is_reduced=is_recorded_in_half_precision(trainer),
        ):
            return True
        compiled.comparisons.count_drowned("compiled steps are right")
        return compiled.comparisons.have_ended

    def _find_or_compile(self, trainer: TwoLevelTrainer, steps: int) -> Compiled:
        """Return the graph for the trainer's step as it is now.

        A new one comes into the cache when it has run without an error.
        """
        networks = networks_of(trainer)
        modules = [part for network in networks for part in network.modules()]
        parameters = [p for network in networks for p in network.parameters()]
        optimizers = trainer.schedulable
        alive = (
            *modules,
            *parameters,
            trainer.mode,
            trainer.problem,
            trainer.teacher_losses,
            *(trainer.teacher_losses or ()),
            *optimizers,
            *chain.from_iterable([group["params"] for group in groups_of(optimizers)]),
            *chain.from_iterable([slots.hooks for slots in trainer.slots]),
        )
        marks = [slots.mark for slots in trainer.slots]
        key = (
            *settings_of_step(trainer, steps),
            *map(_is_training, modules_in(trainer.problem)),
            *map(len, hooks_of_optimizers(trainer)),
            *marks,
            *map(id, alive),
            tuple(name for network in networks for name, _ in network.named_buffers()),
            weights_of_groups(optimizers),
            constants_of_groups(optimizers),
        )
        if key in self._cache:
            # Between then and now the param groups may have been different ones.
            trainer.update.follow(trainable(trainer.student))
            return self._cache[key]
        return compile_step(trainer, steps, key=key, alive=alive)


def why_no_graph(trainer: TwoLevelTrainer) -> str:
    """Return what of a trainer no graph captures, though there is a pure step; "" for nothing."""
    if not isinstance(unclipped(trainer.update), TorchUpdate):
        return "a TorchOpt transform, in the place of torch.optim's"
    return ""


def compile_step(
    trainer: TwoLevelTrainer, steps: int, *, key: tuple[object, ...], alive: tuple[object, ...]
) -> Compiled:
    """Return the trainer's step as one graph, for a key and the objects that are alive in it.

    Raises: :class:`metapl.MetaplError` where no graph can be.
    """
    if reason := why_no_graph(trainer):
        raise MetaplError(f"compile= was given with {reason}; leave compile out.")
    trainer.update.follow(trainable(trainer.student))
    updates = updates_of(trainer)
    step = step_of(trainer, steps, updates)
    run: Callable[..., Moved]
    if trainer.compile == "cudagraphs":
        run = StepByGraphs(step, trainer.device, sources_of(trainer))
    else:
        shared = shared_by_description(trainer, steps, updates)
        run = CapturedStep(step, trainer.device, sources_of(trainer), shared)
    return Compiled(
        key=key,
        alive=alive,
        updates=updates,
        run=run,
        direct_term=trainer.direct_term,
    )


def shared_by_description(trainer: TwoLevelTrainer, steps: int, updates: Updates) -> list[Capture]:
    """Return the graphs of trainers with networks, losses and rules of the same description."""
    rules = [rule_of(unclipped(update), trainer.device) for update in updates if update is not None]
    step = (settings_of_step(trainer, steps), trainer.direct_term, trainer.generator is None)
    rule = ("step", step, trainer.mode, trainer.teacher_losses, rules)
    return shared_captures(trainer.teacher, trainer.student, trainer.problem, rule)


def inner_arguments(
    inner_batches: InnerBatches, probs: Tensor | None, generator: torch.Generator | None
) -> tuple[Any, Any]:
    """Return the inner batch and its Gumbel noise as a pure step takes them, K of each for K steps.

    The noise is None where no labels are drawn, or where they are drawn from torch's default
    generator.
    """
    noise = None
    if generator is not None and probs is not None:
        classes = probs.shape[1]
        noise = tuple(
            gumbel(length(batch), classes, like=probs, generator=generator)
            for batch in inner_batches
        )
    if len(inner_batches) > 1:
        return tuple(inner_batches), noise
    return inner_batches[0], None if noise is None else noise[0]


def findings_of(report: Report) -> Fault:
    """Return what the checks of a step have found, as a fault that is read later."""
    fault = Fault()
    for texts, found in report.findings.items():
        fault.findings += [(partial(found.select, 0, place), t) for place, t in enumerate(texts)]
    return fault


def step_report_of(
    compiled: Compiled, trainer: TwoLevelTrainer, moved: Moved, inner_batches: InnerBatches
) -> StepReport:
    """Return the report of a pure step as the one that a trainer returns."""
    if not checks.waits(moved.flag) and math.isnan(moved.flag):
        raise MetaplError(findings_of(moved.report()).found())
    fields = partial(
        fields_of_report,
        moved.report,
        has_teacher=trainer.teacher is not None,
        takes_outer_loss=compiled.takes_outer_loss,
        is_rounded=trainer.update.is_rounded,
        steps=len(inner_batches),
        is_lookahead=inner_batches.is_lookahead,
    )
    return StepReport.later(fields, step=trainer.steps_done, direct_term=compiled.direct_term)


def fields_of_report(
    make_report: Callable[[], Report],
    *,
    has_teacher: bool,
    takes_outer_loss: bool,
    is_rounded: bool,
    steps: int,
    is_lookahead: bool,
) -> dict[str, Any]:
    """Return the fields of a trainer's report that are made when one of them is read."""
    report = make_report()
    scalars = {"inner_loss": report.inner_loss}
    for name, loss in report.teacher_losses.items():
        scalars[f"teacher_{name}"] = loss
    if takes_outer_loss:
        scalars["outer_loss"] = report.outer_loss
    if has_teacher:
        scalars["teacher_loss"] = report.teacher_loss
    scalars |= report.sizes
    if is_rounded:
        scalars["step_rounding"] = report.step_rounding
    feedback = report.feedback
    signal = report.signal
    if steps > 1:
        feedback = tuple(report.feedback)
        signal = report.signal[-1]
    elif is_lookahead:
        feedback = (report.feedback,)
    return {
        "scalars": scalars,
        "fault": findings_of(report),
        "feedback": feedback,
        "signal": Signal(**signal),
        "student_outputs": report.student_outputs,
    }
