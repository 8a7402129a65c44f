"""The teacher's half of a step: the signal, and the loss that it learns from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.agreement import check_copies, check_recomputed
from metapl.execution.batch import length
from metapl.execution.buffers import Slots, State, unchanged
from metapl.execution.compiled import runs_compiled
from metapl.execution.kernels import checkpoints_without_reentry, no_fast_path, overwritten_explained
from metapl.execution.numerics import wide
from metapl.execution.ranks import ALONE, Ranks, rows_shared
from metapl.execution.rng import RandomState, replayed
from metapl.execution.writes import journal, tensors_in, weights_watched
from metapl.feedback.base import Feedback
from metapl.problems.base import Problem, Signal, check_signal, has_rows, kind_of
from metapl.problems.losses import TeacherLoss, sum_of_terms

NOTHING: AbstractContextManager[Any] = nullcontext()


class TeacherPass:
    """The teacher's signal about one inner batch, at θ_T from before the step.

    Args:
        teacher, problem: the network and the problem.
        batch: the inner batch.
        student_outputs: S(x_u; θ_S), detached; the signal may depend on them. None: the student has not run, because
            the signal enters its input.
        generator: for drawing labels.
        ranks: the processes that share the batch.
        slots: of the teacher; None: to be found.
        recompute: make the signal without a graph first, and once more with a graph in :meth:`with_graph`. Cost: one
            more forward pass, and no graph in memory between the two.
    """

    def __init__(
        self,
        teacher: nn.Module,
        problem: Problem,
        batch: Any,
        student_outputs: Tensor | None,
        generator: torch.Generator | None,
        recompute: bool,
        ranks: Ranks = ALONE,
        slots: Slots | None = None,
    ) -> None:
        self.ranks = ranks
        self.teacher, self.problem, self.batch = teacher, problem, batch
        self.student_outputs, self.generator, self.recompute = student_outputs, generator, recompute
        self.rows = length(batch) if student_outputs is None else len(student_outputs)
        given = tensors_in(batch)[0]
        self.device, self._on_host = given.device, not checks.waits(given)
        self._slots = Slots(teacher) if slots is None else slots
        if recompute:
            self._random = RandomState.now(self.device)
            self._state = State(self._slots.parts)
            self._generator_state = None if generator is None else generator.get_state()
            kept = journal()
            with torch.no_grad(), no_fast_path(), checkpoints_without_reentry(), kept as self._state.parameters:
                self.signal = self._run()
        else:
            self.signal = self._run()

    def with_graph(self) -> Signal:
        """The signal with the teacher's graph, computed again if it was made without."""
        if not self.recompute:
            return self.signal
        label_draws = _replayed_generator(self.generator, self._generator_state)
        with replayed(self._random), label_draws, self._state.again(self._slots):
            again = self._run()
        for name, t in vars(self.signal).items():
            if t is not None:
                check_recomputed(getattr(again, name).detach(), t.detach())
        return again

    def _run(self) -> Signal:
        outputs: Any = self.student_outputs
        who, given = "the problem's signal()", {"student_outputs": outputs}
        with rows_shared(self.ranks), self.watched(self.batch):
            try:
                signal = unchanged(
                    who, given, self.problem.signal, self.teacher, self.batch, outputs, generator=self.generator
                )
            except (AttributeError, TypeError) as error:
                if outputs is not None or "NoneType" not in str(error):
                    raise
                raise MetaplError(
                    f"{kind_of(self.problem)}.signal reads the student's outputs, and {kind_of(self.problem)}."
                    "student_input(batch, signal) makes the student's input from the signal, so the student has not "
                    "run yet and student_outputs is None; expected a signal of the teacher and the batch alone, or "
                    f"student_input(batch). ({error})"
                ) from error
        return check_signal(signal, self.problem)

    @property
    def has_frozen(self) -> bool:
        """Whether the teacher has parameters that it does not learn, which a pass may move."""
        return self._slots.has_frozen

    def watched(self, inputs: Any = None) -> AbstractContextManager[object]:
        """Refuse a pass that moves the teacher's weights, and keep what it moves of the frozen ones."""
        if self._slots.weights is not None:
            return NOTHING  # they are compared at the end of the step
        if self._slots.spread:
            return weights_watched([], "teacher", inputs, looking=False)
        eager = not ("forward" in vars(self.teacher) and runs_compiled(self.teacher))
        looking = eager and (self._on_host or self._slots.has_frozen)
        return weights_watched(self._slots.by_part, "teacher", inputs, looking=looking)


@contextmanager
def _replayed_generator(generator: torch.Generator | None, state: Tensor | None) -> Iterator[None]:
    """Draw from ``state`` in this block; afterwards the generator is as it was before."""
    if generator is None or state is None:
        yield
        return
    before = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(before)


@dataclass(frozen=True)
class FeedbackScale:
    """How much the feedback counts beside the teacher's own losses.

    Args:
        value: the factor of the feedback; with ``relative``, the ratio of the norms of the gradients of the feedback
            and of the own losses, at the teacher's outputs.
        relative: see ``value``.
    """

    value: float
    relative: bool = False

    def factor(self, feedback: Tensor, own: Tensor) -> Tensor | float:
        """The factor of the feedback, from the two norms, which stay on the device."""
        if not self.relative:
            return self.value
        factor = self.value * own / feedback.clamp_min(torch.finfo(feedback.dtype).tiny)
        return torch.where(feedback > 0, factor, 0.0)


@dataclass(frozen=True)
class TeacherLosses:
    """The teacher's objective in its parts, without a graph.

    Args:
        scalars: ``teacher_loss``, the sum of the teacher's own losses, and ``teacher_<name>`` for each of them.
        sizes: the norms of the gradients at the teacher's outputs: ``feedback``, and ``own`` losses.
    """

    scalars: dict[str, Tensor]
    sizes: dict[str, Tensor]


def teacher_scalars(objectives: Sequence[TeacherLosses], parts: int, ranks: Ranks) -> dict[str, Tensor]:
    """The scalars of a step: means over its micro-batches, and ``feedback_ratio``, NaN without own losses.

    Args:
        objectives: of the micro-batches of all inner batches. The last ``parts`` of them hold the own losses. These are
            means over a micro-batch; the feedback is a sum.
        parts: the number of micro-batches in a batch.
        ranks: the processes over which these are means too.
    """
    last = objectives[-parts:]
    feedback = _norm([objective.sizes["feedback"] for objective in objectives])
    own = _norm([objective.sizes["own"] for objective in last])
    ratio = torch.where(own > 0, feedback / own, torch.nan)
    scalars = last[0].scalars if parts == 1 else mean_scalars([objective.scalars for objective in last])
    found = {**scalars, "feedback_ratio": ratio}
    return found if ranks.alone else ranks.mean_scalars(found)


def _sum(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    if not terms:
        return torch.zeros_like(like)
    return terms[0] if len(terms) == 1 else torch.stack(list(terms)).sum()


def _norm(sizes: Sequence[Tensor]) -> Tensor:
    return sizes[0] if len(sizes) == 1 else torch.linalg.vector_norm(torch.stack(list(sizes)))


class TeacherStep(TeacherPass):
    """The teacher's passes on one inner batch, all at θ_T from before the step; its arguments are those of the pass."""

    def __init__(self, teacher: nn.Module, *given: Any) -> None:
        self._outputs: list[Tensor] = []
        self._is_shared = self._nested = False
        super().__init__(teacher, *given)  # Algorithm 1, line 2: ŷ_u ~ T(x_u)
        self._weights = {id(p) for p in self._slots.learned.values()}

    def _run(self) -> Signal:
        with self._recording():
            return super()._run()

    def backward(
        self,
        feedback: Feedback,
        scale: FeedbackScale,
        losses: Sequence[TeacherLoss],
        labeled: Any,
        step: int,
        parts: int = 1,
    ) -> TeacherLosses:
        """Algorithm 1, lines 5-7: add the gradient of scale·(−Σ h·signal) + Σ own losses / parts to the weights'."""
        signal = self.with_graph()
        with self._recording(), rows_shared(self.ranks), self.watched() if self.has_frozen else nullcontext():
            terms = sum_of_terms(
                self.teacher,
                losses,
                labeled=labeled,
                unlabeled=self.batch,
                signal=signal,
                step=step,
                kind="teacher loss",
            )
        if self.ranks.copies > 1:
            check_copies([*terms.values()], "losses of the teacher", self.ranks)
        own = {f"teacher_{name}": term for name, term in terms.items()}
        from_feedback = feedback.teacher_loss(signal)
        if not self.ranks.alone:  # a sum over all rows, of a gradient that is averaged over the ranks
            from_feedback = self.ranks.size * from_feedback
        from_own = _sum(list(own.values()), from_feedback)
        checks.learns(from_own, "teacher")
        scalars = {name: value.detach() for name, value in own.items()} | {"teacher_loss": from_own.detach()}
        if (parts > 1 or self.ranks.size > 1) and not has_rows(self.problem, signal, self.rows):
            if scale.relative:
                raise MetaplError(
                    "feedback_ratio is measured row by row at the teacher's outputs, and this signal, which is one for "
                    "all examples, gets its feedback from several processes; use feedback_weight."
                )
            self._is_shared = True
        with overwritten_explained("teacher"):
            sizes = self._descend(from_feedback, from_own / parts if parts > 1 else from_own, scale)
        return TeacherLosses(scalars, sizes)

    def _descend(self, from_feedback: Tensor, from_own: Tensor, scale: FeedbackScale) -> dict[str, Tensor]:
        """Take the gradient of both losses.

        Returns: the norms of their gradients at the teacher's outputs; NaN for a loss that also depends on the
        teacher's weights other than through these outputs, and where the processes hold shares of one gradient, whose
        norm is not found from theirs.
        """
        of_feedback = self._reached(from_feedback, "the signal", scale)
        of_own = self._reached(from_own, "a teacher loss", scale)
        # An output of one loss alone has the gradient of that loss in the pass that is taken anyway.
        on_the_way = not (
            scale.relative or self._nested or any(t is u for t in of_feedback or () for u in of_own or ())
        )
        if on_the_way:
            loss = scale.value * from_feedback + from_own
            found = _backward_measured(loss, [of_feedback, of_own])
            factor: Tensor | float = 1.0
        else:
            found = [_measured(from_feedback, of_feedback), _measured(from_own, of_own)]
        # The norms over the rows of all ranks; both are in units of a mean over the ranks.
        found = [size * torch.nan if self._is_shared else self.ranks.pooled(size) for size in found]
        if not on_the_way:
            factor = scale.factor(*found)
            loss = factor * from_feedback + from_own
            if loss.requires_grad:
                loss.backward()
        return {"feedback": factor * found[0], "own": found[1]}

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Collect the outputs of the teacher in this block: the gradients of its losses are measured at these."""

        def collect(module: nn.Module, args: Any, output: Any) -> Any:
            # What else the pass computes from an output, and the hooks on it, are before the view: its gradient is that
            # of the losses alone.
            views: dict[int, Tensor] = {}
            self._nested |= any(t.requires_grad for t in tensors_in(args))

            def viewed(t: Any) -> Any:
                if not t.requires_grad:
                    return t
                return views.setdefault(id(t), t.view_as(t) if t.layout == torch.strided and not t.is_nested else t)

            output = viewed(output) if isinstance(output, Tensor) else pytree.tree_map_only(Tensor, viewed, output)
            self._outputs.extend(t for t in views.values() if t.requires_grad)  # a weight has none under no_grad
            return output

        handle = self.teacher.register_forward_hook(collect)
        try:
            yield
        finally:
            handle.remove()

    def _reached(self, loss: Tensor, name: str, scale: FeedbackScale) -> list[Tensor] | None:
        """The teacher's outputs that a loss depends on; None, or with a relative scale an error, if it depends on a
        weight in another way."""
        collected = {(t.grad_fn, t.output_nr): t for t in self._outputs}
        outputs: list[Tensor] = []
        seen: set[tuple[Node | None, int]] = set()
        edges: list[tuple[Node | None, int]] = [(loss.grad_fn, loss.output_nr)]
        while edges:
            edge = edges.pop()
            if edge in seen or edge[0] is None:
                continue
            seen.add(edge)
            if edge in collected:
                outputs.append(collected[edge])
            elif id(getattr(edge[0], "variable", None)) in self._weights:
                if scale.relative:
                    raise MetaplError(
                        f"feedback_ratio is measured at the outputs of the teacher's forward, and {name} also depends "
                        "on the teacher's weights in another way, such as through another method or an output that is "
                        "not a tensor, tuple or dict. Let forward return what it depends on, or use feedback_weight."
                    )
                return None
            else:
                edges.extend(edge[0].next_functions)
        return outputs


def _backward_measured(loss: Tensor, groups: Sequence[list[Tensor] | None]) -> list[Tensor]:
    """Take the gradient of a loss; the norms of it at groups of tensors, NaN for None."""
    sizes = [[loss.new_zeros(())] for _ in groups]
    handles = [
        t.register_hook(lambda g, found=found: found.append(_length(g, loss)))
        for found, outputs in zip(sizes, groups, strict=True)
        for t in outputs or ()
    ]
    try:
        if loss.requires_grad:
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return [
        loss.new_full((), torch.nan) if outputs is None else _norm(found)
        for found, outputs in zip(sizes, groups, strict=True)
    ]


def _measured(loss: Tensor, outputs: list[Tensor] | None) -> Tensor:
    """The norm of a loss's gradient at outputs, NaN for None. Cost: a backward pass through the head only."""
    if outputs is None:
        return loss.new_full((), torch.nan)
    sizes = [loss.new_zeros(())]

    def measure(g: Tensor) -> Tensor:
        sizes.append(_length(g, loss))
        return torch.zeros_like(g)  # of an output that is computed from another, nothing flows on to that one

    handles = [t.register_hook(measure) for t in outputs]
    try:
        if outputs:
            torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return _norm(sizes)


def _length(g: Tensor, loss: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(wide(g)).to(loss.dtype)
    return length


def mean_scalars(scalars: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The scalars of a step: the means over its micro-batches."""
    if len(scalars) == 1:
        return dict(scalars[0])
    return {name: torch.stack([part[name] for part in scalars]).mean() for name in scalars[0]}
