"""The teacher's half of a step: its passes on the inner batches, and the gradient that it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metapl.core.feedback import Feedback
from metapl.core.lookahead import InnerBatches
from metapl.core.path import Path
from metapl.core.size import FeedbackSize, ratio_of
from metapl.execution import checks
from metapl.execution.batch import Batch, micro_batches
from metapl.execution.compare import EXACTLY, check_same_outputs, coarsest_dtype
from metapl.execution.layout import Layout
from metapl.execution.numerics import Tree, add_to, by_backward, no_fast_path
from metapl.execution.ranks import NOTHING, Ranks, rows_shared
from metapl.execution.shards import local, mean_by_backward
from metapl.execution.state import RandomState, Slots, State, replay
from metapl.problems.base import BilevelProblem, Signal, kind_of
from metapl.problems.losses import TeacherLoss, sum_of_terms
from metapl.problems.means import Shares, refuse_other_than_means, shares_of_losses

NOT_FINITE = (
    "the network's own loss is NaN or infinite: it has diverged, or a batch has extreme values; "
    "lower its learning rate, or clean the batch."
)


# The feedback as it is.
OWN_SIZE = FeedbackSize()


class CallsOfSignal(Protocol):
    """Watches a problem's ``signal``, where each call is made twice."""

    def first_call(self, number: int) -> AbstractContextManager[None]:
        """Note what the call in this block leaves."""

    def second_call(self, number: int) -> AbstractContextManager[None]:
        """Refuse what the call in this block leaves otherwise than the first one of a number."""


@dataclass
class TeacherPass:
    """The teacher's pass on one inner batch, or micro-batch, at θ_T from before the step.

    Args:
        inner_batch: None, where it is read again.
        student_outputs: what the teacher was given; None: the student had not run.
        signal: what it said.
        random: the state of the generators before a pass that is computed again.
        state: of the network, before such a pass.
        number: of the pass, from 0.
    """

    inner_batch: Batch
    student_outputs: Tensor | None
    signal: Signal
    random: RandomState | None = None
    state: State | None = None
    number: int = 0


@dataclass(eq=False)
class Teacher:
    """The teacher, as it is while its network keeps its tables, and how its passes are taken.

    Args:
        layout: None: the problem has no teacher, and is given an empty module.
        problem: makes the signal.
        ranks: the processes that share the batches.
        device: where the networks are.
        slots: the network's tables.
        accumulate: micro-batches that each batch is split into.
        recompute: make signals without a graph first, and once more with one at the end.

    Attributes:
        parameters: the weights that are learned, by name.
        passes_per_batch: one for each micro-batch, or one where the problem says so
            (``signal_of_batch``).
    """

    layout: Layout | None
    problem: BilevelProblem
    ranks: Ranks
    device: torch.device
    slots: Slots
    accumulate: int = 1
    recompute: bool = False

    def __post_init__(self) -> None:
        self.network = self.slots.module
        self.parameters: dict[str, nn.Parameter] = self.slots.learned
        self.is_sharded = self.layout is not None and self.layout.is_sharded
        if self.layout is not None and self.is_sharded:
            self.parameters = self.layout.parameters()
        self.passes_per_batch = 1 if self.problem.signal_of_batch else self.accumulate
        self.calls_twice = self.layout is not None and (self.recompute or self.accumulate > 1)

    def over_ranks(self, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a gradient as the mean over the ranks, which a sharded network's is already."""
        if self.layout is None or self.layout.kind != "replicated":
            return gradient
        like: dict[str, Tensor] = dict(self.parameters)
        return self.ranks.mean_tree(gradient, like)

    def norm(self, gradient: Tree) -> Tensor:
        """Return the norm of a gradient over all processes that hold parts of it.

        Of no gradient 0.
        """
        if self.layout is None or not gradient:
            return torch.zeros((), device=self.device)
        if self.is_sharded:
            gradient = {name: local(g) for name, g in gradient.items()}
        return self.layout.space.norm(gradient)

    def reached(self, loss: Tensor, *, retain: bool = False) -> dict[str, Tensor]:
        """Return the gradient of a loss in the weights that it reaches.

        It is that of this rank's rows, or the mean over the ranks of a sharded network, whose own
        backward pass averages.

        By a backward pass, since a part under ``torch.utils.checkpoint`` may run in no other way;
        ``.grad`` stays as it is. Where the weights have hooks that a backward pass would call with
        a part of the step's gradient, by ``torch.autograd.grad``. ``retain`` keeps the graph for
        another pass.
        """
        if not loss.requires_grad:
            return {}
        weights = self.parameters
        if self.is_sharded:
            return mean_by_backward(loss, weights, retain=retain)
        if not any(map(_hooks_after_gradient, weights.values())):
            return by_backward(loss, weights, retain=retain)
        grads = torch.autograd.grad(
            loss, list(weights.values()), retain_graph=retain, allow_unused=True
        )
        return {name: g for name, g in zip(weights, grads, strict=True) if g is not None}

    def gradient_of(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the gradient of a loss in all weights, with zeros where it reaches none.

        No other leaf of the graph gets a gradient.
        """
        if not loss.requires_grad:
            return self.with_zeros({})
        if self.is_sharded:
            return self.with_zeros(mean_by_backward(loss, self.parameters))
        grads = torch.autograd.grad(loss, list(self.parameters.values()), materialize_grads=True)
        return dict(zip(self.parameters, grads, strict=True))

    def with_zeros(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a gradient in all weights, with zeros where it has no entry."""
        whole: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            whole[name] = gradient[name] if name in gradient else torch.zeros_like(p)
        return whole


# Reads the hooks that a backward pass calls; map() calls it without a frame of Python for each.
_hooks_after_gradient = attrgetter("_post_accumulate_grad_hooks")


@dataclass(eq=False)
class Teaching:
    """The teacher's passes on the inner batches of a path, in their order.

    Args:
        teacher: whose passes they are.
        outer_batch: as the outer loss reads it, which the teacher's own losses read too.
        inner_batches: those of the student's steps.
        generator: of labels that are drawn; None: the default one.
        losses: L_k, the teacher's own; they read the last batch.
        size: the rule that gives λ.
        step: the number of the step, for losses that depend on it.
        check: refuses what is no signal for the mode, in a first step; None in later ones.
        calls: watches the problem's ``signal``, in a first step; None in later ones.
        noises: of labels that are drawn, one for each pass, in the place of a generator.
        measures: find ‖λ G_h‖ / ‖G_own‖ also where the rule does not need it, by one more
            backward pass of the feedback. The gradient that is left stays the same, bit for bit.
        compares_parts: compare the losses of micro-batches with those of their rows together,
            before anything moves.
    """

    teacher: Teacher
    outer_batch: Batch
    inner_batches: InnerBatches
    generator: torch.Generator | None = None
    losses: Sequence[TeacherLoss] = ()
    size: FeedbackSize = OWN_SIZE
    step: int | Tensor = 0
    check: Callable[[Any], None] | None = None
    calls: CallsOfSignal | None = None
    noises: list[Any] = field(default_factory=list)
    measures: bool = False
    compares_parts: bool = False

    passes: list[TeacherPass] = field(default_factory=list, init=False)
    # The teacher's own loss and its scalars, where they are taken before the feedback.
    _own: tuple[Tensor, dict[str, Tensor]] | None = field(default=None, init=False)

    def __call__(self, batch: Batch, outputs: Tensor | None) -> Signal:
        """Return the signal about a micro-batch: Algorithm 1, line 2, ŷ_u ~ T(x_u).

        Args:
            outputs: the student's on it; None: it has not run.
        """
        teacher = self.teacher
        if teacher.layout is None:
            return self._ask(batch, outputs)
        if not (teacher.calls_twice or self.inner_batches.are_read_again):
            signal = self._ask(batch, outputs)
            self.passes.append(TeacherPass(batch, outputs, signal))
            return signal
        random = RandomState.now(teacher.device, self.generator)
        state = teacher.slots.snapshot()
        number = len(self.passes)
        watched = NOTHING if self.calls is None else self.calls.first_call(number)
        with torch.no_grad(), no_fast_path(), watched:
            signal = self._ask(batch, outputs)
        kept_batch = None if self.inner_batches.are_read_again else batch
        self.passes.append(TeacherPass(kept_batch, outputs, signal, random, state, number))
        return signal

    def with_graph(self, teacher_pass: TeacherPass, batch: Batch) -> Signal:
        """Return the signal of a pass with the teacher's graph.

        It is computed again if it was computed without one, and refused where it comes out
        otherwise.
        """
        if teacher_pass.random is None or teacher_pass.state is None:
            return teacher_pass.signal
        calls = self.calls
        watched = NOTHING if calls is None else calls.second_call(teacher_pass.number)
        with replay(teacher_pass.random, teacher_pass.state), watched:
            signal = self._ask(batch, teacher_pass.student_outputs)
        fields = signal.fields()
        for name, first in teacher_pass.signal.fields().items():
            dtype = coarsest_dtype([first.dtype], first.device)
            # The rounding of a deep network. What moves little in one step, as a running mean does,
            # moves in every step.
            tolerance = min(EXACTLY[dtype].outputs, 1e3 * torch.finfo(dtype).eps)
            role = f"teacher, or the signal of {kind_of(self.teacher.problem)},"
            check_same_outputs(fields[name].detach(), first.detach(), tolerance, role)
        return signal

    def _ask(self, batch: Batch, outputs: Tensor | None) -> Signal:
        teacher = self.teacher
        generator = self.noises.pop(0) if self.noises else self.generator
        with NOTHING if teacher.ranks.alone else rows_shared(teacher.ranks):
            signal = teacher.problem.signal(teacher.network, batch, outputs, generator=generator)
        if self.check is not None:
            self.check(signal)
        return signal

    def direct_gradient(self, path: Path) -> dict[str, Tensor]:
        """Return the direct term ∂L(θ′; φ)/∂φ at fixed θ′, by the teacher's parameters.

        It is zero in those that the outer loss does not read.
        """
        teacher = self.teacher
        assert teacher.layout is not None, "a direct term is of a teacher"
        gradient = teacher.with_zeros(path.by_direct_loss(teacher.reached))
        if teacher.is_sharded:
            # Its backward pass averages over the ranks.
            return gradient
        return {name: teacher.ranks.mean(g) for name, g in gradient.items()}

    def gradient(self, path: Path, feedback: Sequence[Feedback]) -> dict[str, Tensor]:
        """Return the gradient of −Σ h·signal in the teacher's weights, over all passes.

        Empty without a teacher.
        """
        teacher = self.teacher
        if teacher.layout is None:
            return {}
        gradient: dict[str, Tensor] = {}
        for teacher_pass, h in zip(self.passes, self._by_pass(feedback), strict=True):
            batch = teacher_pass.inner_batch
            if self.inner_batches.are_read_again:
                step, part = divmod(teacher_pass.number, teacher.passes_per_batch)
                whole_batch = path.inner_batch(step)
                batch = micro_batches(whole_batch, teacher.passes_per_batch, "inner")[part]
            loss = h.teacher_loss(self.with_graph(teacher_pass, batch))
            if teacher.is_sharded:
                # The backward pass of a sharded network averages over the ranks.
                loss = teacher.ranks.size * loss
            gradient_of_pass = teacher.gradient_of(loss)
            if gradient:
                gradient = {name: gradient[name] + g for name, g in gradient_of_pass.items()}
            else:
                gradient = gradient_of_pass
        if teacher.is_sharded:
            return gradient
        # The backward pass of any other network stays with this rank.
        return {name: teacher.ranks.sum(g) for name, g in gradient.items()}

    def _by_pass(self, feedback: Sequence[Feedback]) -> Sequence[Feedback]:
        """Return the feedback on the signal of each pass, from that of each student step."""
        parts = self.teacher.passes_per_batch
        if parts == 1:
            return feedback
        return [part for of_step in feedback for part in of_step.chunks(parts)]

    def backward(
        self,
        feedback: Sequence[Feedback],
        *,
        has_feedback: bool = True,
        by_direct_loss: Callable[[Callable[[Tensor], None]], None] | None = None,
    ) -> dict[str, Tensor]:
        r"""Leave the teacher's gradient in ``.grad``: Algorithm 1, lines 5-7.

        .. math:: G = \lambda\, G_h + G_{own}, \qquad
                  G_h = -\nabla \textstyle\sum h \cdot \mathrm{signal}, \qquad
                  G_{own} = \nabla \textstyle\sum_k L_k

        Args:
            feedback: h of each student step.
            has_feedback: whether any gradient of the outer loss is given.
            by_direct_loss: gives a function L(θ′; φ) at fixed θ′, where the outer loss reads the
                teacher (:meth:`metapl.core.path.Path.by_direct_loss`): G_h is then the sum of both
                gradients.

        Returns: the report's scalars: the losses, and ``feedback_weight`` and ``feedback_ratio``
        where both gradients were found.
        """
        teacher = self.teacher
        if teacher.layout is None:
            return {}
        parts = teacher.passes_per_batch
        first_of_last_batch = len(self.passes) - parts
        outer_parts = [self.outer_batch]
        shares: Sequence[Shares] = [{}]
        if parts > 1 or not teacher.ranks.alone:
            outer_parts = micro_batches(self.outer_batch, parts, "outer")
            last_passes = self.passes[first_of_last_batch:]
            shares = self._shares(outer_parts, last_passes)
        size = self.size
        compares = has_feedback and (size.ratio is not None or size.bound is not None)
        measures = has_feedback and self.measures and bool(self.losses)

        scalars: list[dict[str, Tensor]] = []
        feedback_gradient: dict[str, Tensor] = {}
        own_gradient: dict[str, Tensor] = {}

        def take_direct(loss: Tensor) -> None:
            if compares:
                add_to(feedback_gradient, teacher.reached(loss))
                return
            loss = size.weight * loss
            if measures:
                add_to(feedback_gradient, teacher.reached(loss, retain=True))
            # Without a graph it adds nothing.
            if loss.requires_grad:
                loss.backward()

        if by_direct_loss is not None:
            by_direct_loss(take_direct)
        for i, (teacher_pass, h) in enumerate(
            zip(self.passes, self._by_pass(feedback), strict=True)
        ):
            signal = teacher_pass.signal
            if teacher_pass.random is not None:
                signal = self.with_graph(teacher_pass, teacher_pass.inner_batch)
            feedback_loss = h.teacher_loss(signal)
            if not teacher.ranks.alone:
                # It is a sum over all rows, and its gradient is averaged over the ranks.
                feedback_loss = teacher.ranks.size * feedback_loss
            own_loss = None
            if i >= first_of_last_batch:
                part = i - first_of_last_batch
                own_loss, scalars_of_part = self._own or self._own_loss(
                    outer_parts[part], teacher_pass.inner_batch, signal, shares[part]
                )
                scalars.append(scalars_of_part)
                if parts > 1:
                    own_loss = own_loss / parts
                if not own_loss.requires_grad:
                    own_loss = None
            if compares:
                # The teacher's pass belongs to both graphs.
                retain = own_loss is not None
                add_to(feedback_gradient, teacher.reached(feedback_loss, retain=retain))
                if own_loss is not None:
                    add_to(own_gradient, teacher.reached(own_loss))
                continue
            loss = feedback_loss
            if size.weight != 1.0:
                loss = size.weight * feedback_loss
            if measures:
                add_to(feedback_gradient, teacher.reached(loss, retain=True))
            if own_loss is not None:
                loss = loss + own_loss
            if loss.requires_grad:
                loss.backward()
        if compares:
            scalars[-1] |= self._leave_sum(feedback_gradient, own_gradient)
        elif measures:
            scalars[-1] |= self._measured_size(feedback_gradient)
        means = scalars[0] if len(scalars) == 1 else mean_scalars(scalars)
        if not teacher.ranks.alone:
            means = teacher.ranks.mean_tree(means, means)
        # The mean over the ranks is finite where all of them are: they refuse it together.
        checks.refuse_not_finite(NOT_FINITE, means["teacher_loss"])
        return means

    def _shares(self, outer_parts: list[Batch], passes: Sequence[TeacherPass]) -> Sequence[Shares]:
        """Return the factors of the own losses on the micro-batches, by their places.

        Args:
            passes: the teacher's on the inner micro-batches.
        """
        teacher = self.teacher
        inner_parts = [of_part.inner_batch for of_part in passes]
        if len(outer_parts) > 1 and self.compares_parts:
            with rows_shared(teacher.ranks):
                refuse_other_than_means(
                    teacher.network,
                    self.losses,
                    outer_parts,
                    inner_parts,
                    signals=[of_part.signal for of_part in passes],
                    step=self.step,
                    ranks=teacher.ranks,
                )
        return shares_of_losses(
            self.losses, outer_parts, inner_parts, teacher.ranks, teacher.device
        )

    def _leave_sum(
        self, feedback_gradient: dict[str, Tensor], own_gradient: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Leave λ G_h + G_own in ``.grad``, with the λ of a rule that compares the two.

        Returns: λ and the size of the feedback, for the report.
        """
        teacher = self.teacher
        if not teacher.ranks.alone:
            feedback_gradient = teacher.over_ranks(feedback_gradient)
            own_gradient = teacher.over_ranks(own_gradient)
        feedback_norm = teacher.norm(feedback_gradient)
        own_norm = teacher.norm(own_gradient)
        weight = self.size.weight_for(feedback_norm, own_norm)
        whole_gradient = own_gradient
        add_to(
            whole_gradient,
            {name: weight.to(g.dtype) * g for name, g in feedback_gradient.items()},
        )
        for name, p in teacher.parameters.items():
            p.grad = whole_gradient.get(name)
            # A backward pass would have called these on the whole gradient.
            if p.grad is not None:
                for hook in (p._post_accumulate_grad_hooks or {}).values():
                    hook(p)
        return {
            "feedback_weight": weight,
            "feedback_ratio": ratio_of(weight, feedback_norm, own_norm),
        }

    def _measured_size(self, feedback_gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return λ and the size of the feedback, for the report.

        Args:
            feedback_gradient: λ G_h; G_own is what is in ``.grad`` besides it.
        """
        teacher = self.teacher
        own_gradient: dict[str, Tensor] = {
            name: p.grad for name, p in teacher.parameters.items() if p.grad is not None
        }
        add_to(own_gradient, {name: -g for name, g in feedback_gradient.items()})
        feedback_norm = teacher.norm(teacher.over_ranks(feedback_gradient))
        own_norm = teacher.norm(teacher.over_ranks(own_gradient))
        return {
            "feedback_weight": torch.full_like(own_norm, self.size.weight),
            "feedback_ratio": ratio_of(torch.ones_like(own_norm), feedback_norm, own_norm),
        }

    def take_own_loss(self) -> None:
        """Take the sum of the teacher's own losses now, and not in :meth:`backward`.

        The batches are not split.
        """
        if self.passes:
            last_pass = self.passes[-1]
            self._own = self._own_loss(
                self.outer_batch, last_pass.inner_batch, last_pass.signal, shares={}
            )

    def _own_loss(
        self, outer_batch: Batch, inner_batch: Batch, signal: Signal, shares: Shares
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the teacher's own losses on a micro-batch, and its report's scalars."""
        teacher = self.teacher
        with NOTHING if teacher.ranks.alone else rows_shared(teacher.ranks):
            terms = sum_of_terms(
                teacher.network,
                self.losses,
                kind="teacher loss",
                shares=shares,
                step=self.step,
                outer=outer_batch,
                inner=inner_batch,
                signal=signal,
            )
        values = [*terms.values()] or [torch.zeros((), device=teacher.device)]
        loss = values[0] if len(values) == 1 else torch.stack(values).sum()
        if not loss.requires_grad:
            checks.learns(loss, "teacher")
        scalars = {"teacher_loss": loss.detach()}
        for name, term in terms.items():
            scalars[f"teacher_{name}"] = term.detach()
        return loss, scalars


def mean_scalars(scalars: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the means over micro-batches.

    What only some report, such as a weight, is as they report it.
    """
    if len(scalars) == 1:
        return dict(scalars[0])
    means: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in scalars for name in part):
        means[name] = torch.stack([part[name] for part in scalars if name in part]).mean()
    return means
