"""The teacher's half of a step: its passes on the inner batches, and the gradient that it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
from metapl.execution.numerics import Tree, no_fast_path
from metapl.execution.ranks import NOTHING, Ranks, rows_shared
from metapl.execution.shards import by_backward, local
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


class Teaching:
    """The teacher's passes on the inner batches of a path, in their order.

    There is one for each micro-batch, or one for the whole batch where the problem says so
    (``signal_of_batch``).

    Args:
        layout: of the teacher; None: the problem has none, and is given an empty module.
        problem: makes the signal.
        check: refuses what is no signal for the mode, in a first step; None in later ones.
        generator: of labels that are drawn; None: the default one.
        ranks: the processes that share the batches.
        device: where the networks are.
        inner_batches: those of the student's steps.
        accumulate: micro-batches that each of them is split into.
        recompute: make signals without a graph first, and once more with one at the end.
        slots: the network's tables, where they have been read in this step already.
        calls: watches the problem's ``signal``, in a first step; None in later ones.
        noises: of labels that are drawn, one for each pass, in the place of a generator.
        losses: L_k, the teacher's own; they read the last batch.
        size: the rule that gives λ.
        outer_batch: which the losses read too.
        step: the number of the step, for losses that depend on it.
    """

    # The teacher's own loss and its scalars, where they are taken before the feedback.
    _own: tuple[Tensor, dict[str, Tensor]] | None = None

    def __init__(
        self,
        layout: Layout | None,
        problem: BilevelProblem,
        *,
        check: Callable[[Any], None] | None,
        generator: torch.Generator | None,
        ranks: Ranks,
        device: torch.device,
        inner_batches: InnerBatches,
        accumulate: int,
        recompute: bool,
        slots: Slots | None = None,
        calls: CallsOfSignal | None = None,
        noises: Sequence[Any] = (),
        losses: Sequence[TeacherLoss] = (),
        size: FeedbackSize = OWN_SIZE,
        outer_batch: Batch = None,
        step: int | Tensor = 0,
    ) -> None:
        self.layout = layout
        self.problem = problem
        self.check = check
        self.generator = generator
        self._noises = iter(noises)
        self.losses = losses
        self.size = size
        self.outer_batch = outer_batch
        self.step = step
        self.ranks = ranks
        self.device = device
        self.passes_per_batch = 1 if problem.signal_of_batch else accumulate
        self.inner_batches = inner_batches
        self.recompute = layout is not None and (
            recompute or accumulate > 1 or self.inner_batches.are_read_again
        )
        self.network = nn.Module() if layout is None else layout.network
        self.slots = slots or Slots(self.network)
        self.parameters: dict[str, nn.Parameter] = self.slots.learned
        self.is_sharded = layout is not None and layout.is_sharded
        if layout is not None and layout.is_sharded:
            self.parameters = layout.parameters()
        self.passes: list[TeacherPass] = []
        self.calls = calls

    def __call__(self, batch: Batch, outputs: Tensor | None) -> Signal:
        """Return the signal about a micro-batch: Algorithm 1, line 2, ŷ_u ~ T(x_u).

        Args:
            outputs: the student's on it; None: it has not run.
        """
        if self.recompute:
            random = RandomState.now(self.device, self.generator)
            state = self.slots.snapshot()
            calls = self.calls
            watched = NOTHING if calls is None else calls.first_call(len(self.passes))
            with torch.no_grad(), no_fast_path(), watched:
                signal = self._ask(batch, outputs)
            kept_batch = None if self.inner_batches.are_read_again else batch
            teacher_pass = TeacherPass(
                kept_batch, outputs, signal, random=random, state=state, number=len(self.passes)
            )
        else:
            teacher_pass = TeacherPass(batch, outputs, self._ask(batch, outputs))
        if self.layout is not None:
            self.passes.append(teacher_pass)
        return teacher_pass.signal

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
            role = f"teacher, or the signal of {kind_of(self.problem)},"
            check_same_outputs(fields[name].detach(), first.detach(), tolerance, role)
        return signal

    def _ask(self, batch: Batch, outputs: Tensor | None) -> Signal:
        with NOTHING if self.ranks.alone else rows_shared(self.ranks):
            generator = next(self._noises, self.generator)
            signal = self.problem.signal(self.network, batch, outputs, generator=generator)
        if self.check is not None:
            self.check(signal)
        return signal

    def direct_gradient(self, path: Path) -> dict[str, Tensor]:
        """Return the direct term ∂L(θ′; φ)/∂φ at fixed θ′, by the teacher's parameters.

        It is zero in those that the outer loss does not read.
        """
        assert self.layout is not None, "a direct term is of a teacher"
        gradient = self._with_zeros(self._reached(path.direct_loss(), retain=True))
        if self.is_sharded:
            # Its backward pass averages over the ranks.
            return gradient
        return {name: self.ranks.mean(g) for name, g in gradient.items()}

    def gradient(self, path: Path, feedback: Sequence[Feedback]) -> dict[str, Tensor]:
        """Return the gradient of −Σ h·signal in the teacher's weights, over all passes.

        Empty without a teacher.
        """
        if self.layout is None:
            return {}
        gradient: dict[str, Tensor] = {}
        feedback_by_pass = self._by_pass(feedback)
        for number, (teacher_pass, h) in enumerate(zip(self.passes, feedback_by_pass, strict=True)):
            batch = teacher_pass.inner_batch
            if self.inner_batches.are_read_again:
                step, part = divmod(number, self.passes_per_batch)
                whole_batch = path.inner_batch(step)
                batch = micro_batches(whole_batch, self.passes_per_batch, "inner")[part]
            loss = h.teacher_loss(self.with_graph(teacher_pass, batch))
            if self.is_sharded:
                # The backward pass of a sharded network averages over the ranks.
                loss = self.ranks.size * loss
            gradient_of_pass = self._gradient_of(loss)
            if gradient:
                gradient = {name: gradient[name] + g for name, g in gradient_of_pass.items()}
            else:
                gradient = gradient_of_pass
        if self.is_sharded:
            return gradient
        # The backward pass of any other network stays with this rank.
        return {name: self.ranks.sum(g) for name, g in gradient.items()}

    def _by_pass(self, feedback: Sequence[Feedback]) -> list[Feedback]:
        """Return the feedback on the signal of each pass, from that of each student step."""
        if self.passes_per_batch == 1:
            return list(feedback)
        return [part for of_step in feedback for part in of_step.chunks(self.passes_per_batch)]

    def backward(
        self,
        feedback: Sequence[Feedback],
        *,
        has_feedback: bool = True,
        measure: bool = False,
        compares_parts: bool = False,
        direct_loss: Callable[[], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        r"""Leave the teacher's gradient in ``.grad``: Algorithm 1, lines 5-7.

        .. math:: G = \lambda\, G_h + G_{own}, \qquad
                  G_h = -\nabla \textstyle\sum h \cdot \mathrm{signal}, \qquad
                  G_{own} = \nabla \textstyle\sum_k L_k

        Args:
            feedback: h of each student step.
            has_feedback: whether any gradient of the outer loss is given.
            measure: find ‖λ G_h‖ / ‖G_own‖ also where the rule does not need it, by one more
                backward pass of the feedback. The gradient that is left stays the same, bit for
                bit.
            compares_parts: compare the losses of micro-batches with those of their rows together,
                before anything moves.
            direct_loss: L(θ′; φ) at fixed θ′, where the outer loss reads the teacher: G_h
                is then the sum of both gradients.

        Returns: the report's scalars: the losses, and ``feedback_weight`` and ``feedback_ratio``
        where both gradients were found.
        """
        if self.layout is None:
            return {}
        parts = self.passes_per_batch
        outer_parts = [self.outer_batch]
        if parts > 1:
            outer_parts = micro_batches(self.outer_batch, parts, "outer")
        first_of_last_batch = len(self.passes) - parts
        inner_parts = [of_part.inner_batch for of_part in self.passes[first_of_last_batch:]]
        if parts > 1 and compares_parts:
            with rows_shared(self.ranks):
                refuse_other_than_means(
                    self.network,
                    self.losses,
                    outer_parts,
                    inner_parts,
                    signals=[of_part.signal for of_part in self.passes[first_of_last_batch:]],
                    step=self.step,
                    ranks=self.ranks,
                    device=self.device,
                    parts=parts,
                )
        shares: Sequence[Shares] = [{}]
        if parts > 1 or not self.ranks.alone:
            shares = shares_of_losses(
                self.losses, outer_parts, inner_parts, self.ranks, self.device
            )
        compares = self.size.compares and has_feedback
        measures = measure and has_feedback and bool(self.losses)

        scalars: list[dict[str, Tensor]] = []
        feedback_gradient: dict[str, Tensor] = {}
        own_gradient: dict[str, Tensor] = {}
        feedback_by_pass = self._by_pass(feedback)
        for i, (teacher_pass, h) in enumerate(zip(self.passes, feedback_by_pass, strict=True)):
            signal = teacher_pass.signal
            if teacher_pass.random is not None:
                signal = self.with_graph(teacher_pass, teacher_pass.inner_batch)
            feedback_loss = h.teacher_loss(signal)
            if not self.ranks.alone:
                # It is a sum over all rows, and its gradient is averaged over the ranks.
                feedback_loss = self.ranks.size * feedback_loss
            if direct_loss is not None and i == len(self.passes) - 1:
                # Without a graph it adds nothing to a gradient.
                feedback_loss = feedback_loss + direct_loss()
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
                add_to(feedback_gradient, self._reached(feedback_loss, retain=retain))
                if own_loss is not None:
                    add_to(own_gradient, self._reached(own_loss))
                continue
            loss = feedback_loss
            if self.size.weight != 1.0:
                loss = self.size.weight * feedback_loss
            if measures and loss.requires_grad:
                add_to(feedback_gradient, self._reached(loss, retain=True))
            if own_loss is not None:
                loss = loss + own_loss
            if loss.requires_grad:
                loss.backward()
        if compares:
            scalars[-1] |= self._leave_sum(feedback_gradient, own_gradient, self.size)
        elif measures:
            scalars[-1] |= self._measured_size(feedback_gradient, self.size)
        means = scalars[0] if len(scalars) == 1 else mean_scalars(scalars)
        if not self.ranks.alone:
            means = self.ranks.mean_tree(means, means)
        # The mean over the ranks is finite where all of them are: they refuse it together.
        checks.refuse_not_finite(NOT_FINITE, means["teacher_loss"])
        return means

    def _leave_sum(
        self,
        feedback_gradient: dict[str, Tensor],
        own_gradient: dict[str, Tensor],
        size: FeedbackSize,
    ) -> dict[str, Tensor]:
        """Leave λ G_h + G_own in ``.grad``, with the λ of a rule that compares the two.

        Returns: λ and the size of the feedback, for the report.
        """
        if not self.ranks.alone:
            feedback_gradient = self._over_ranks(feedback_gradient)
            own_gradient = self._over_ranks(own_gradient)
        feedback_norm = self._norm(feedback_gradient)
        own_norm = self._norm(own_gradient)
        weight = size.weight_for(feedback_norm, own_norm)
        weighted = {name: weight.to(g.dtype) * g for name, g in feedback_gradient.items()}
        whole_gradient = own_gradient
        add_to(whole_gradient, weighted)
        for name, p in self.parameters.items():
            p.grad = whole_gradient.get(name)
            # A backward pass would have called these on the whole gradient.
            if p.grad is not None:
                for hook in (p._post_accumulate_grad_hooks or {}).values():
                    hook(p)
        return {
            "feedback_weight": weight,
            "feedback_ratio": ratio_of(weight, feedback_norm, own_norm),
        }

    def _measured_size(
        self, feedback_gradient: dict[str, Tensor], size: FeedbackSize
    ) -> dict[str, Tensor]:
        """Return λ and the size of the feedback, for the report.

        Args:
            feedback_gradient: λ G_h; G_own is what is in ``.grad`` besides it.
        """
        own_gradient: dict[str, Tensor] = {
            name: p.grad for name, p in self.parameters.items() if p.grad is not None
        }
        add_to(own_gradient, {name: -g for name, g in feedback_gradient.items()})
        feedback_norm = self._norm(self._over_ranks(feedback_gradient))
        own_norm = self._norm(self._over_ranks(own_gradient))
        return {
            "feedback_weight": torch.full_like(own_norm, size.weight),
            "feedback_ratio": ratio_of(torch.ones_like(own_norm), feedback_norm, own_norm),
        }

    def take_own_loss(self) -> None:
        """Take the sum of the teacher's own losses now, and not in :meth:`backward`.

        The batches are not split.
        """
        if self.layout is not None:
            last_pass = self.passes[-1]
            self._own = self._own_loss(
                self.outer_batch, last_pass.inner_batch, last_pass.signal, shares={}
            )

    def _own_loss(
        self, outer_batch: Batch, inner_batch: Batch, signal: Signal, shares: Shares
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the teacher's own losses on a micro-batch, and its report's scalars."""
        with NOTHING if self.ranks.alone else rows_shared(self.ranks):
            terms = sum_of_terms(
                self.network,
                self.losses,
                kind="teacher loss",
                shares=shares,
                step=self.step,
                outer=outer_batch,
                inner=inner_batch,
                signal=signal,
            )
        values = [*terms.values()] or [torch.zeros((), device=self.device)]
        loss = values[0] if len(values) == 1 else torch.stack(values).sum()
        if not loss.requires_grad:
            checks.learns(loss, "teacher")
        scalars = {"teacher_loss": loss.detach()}
        for name, term in terms.items():
            scalars[f"teacher_{name}"] = term.detach()
        return loss, scalars

    def _over_ranks(self, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a gradient as the mean over the ranks, which a sharded network's is already."""
        if self.layout is None or self.layout.kind != "replicated":
            return gradient
        like: dict[str, Tensor] = dict(self.parameters)
        return self.ranks.mean_tree(gradient, like)

    def _norm(self, gradient: Tree) -> Tensor:
        """Return the norm of a gradient over all processes that hold parts of it.

        Of no gradient 0.
        """
        if self.layout is None or not gradient:
            return torch.zeros((), device=self.device)
        if self.is_sharded:
            gradient = {name: local(g) for name, g in gradient.items()}
        return self.layout.space.norm(gradient)

    def _reached(self, loss: Tensor, *, retain: bool = False) -> dict[str, Tensor]:
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
        has_hooks = any(p._post_accumulate_grad_hooks for p in weights.values())
        if self.is_sharded or not has_hooks:
            return by_backward(loss, weights, retain=retain)
        grads = torch.autograd.grad(
            loss, list(weights.values()), retain_graph=retain, allow_unused=True
        )
        return {name: g for name, g in zip(weights, grads, strict=True) if g is not None}

    def _gradient_of(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the gradient of a loss in all weights, with zeros where it reaches none.

        No other leaf of the graph gets a gradient.
        """
        if not loss.requires_grad:
            return self._with_zeros({})
        if self.is_sharded:
            return self._with_zeros(by_backward(loss, self.parameters))
        grads = torch.autograd.grad(loss, list(self.parameters.values()), materialize_grads=True)
        return dict(zip(self.parameters, grads, strict=True))

    def _with_zeros(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a gradient in all weights, with zeros where it has no entry."""
        whole: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            whole[name] = gradient[name] if name in gradient else torch.zeros_like(p)
        return whole


def add_to(sums: dict[str, Tensor], gradient: Mapping[str, Tensor]) -> None:
    """Add a gradient to sums by parameter, in place."""
    for name, g in gradient.items():
        if name in sums:
            # Either may be sparse, as the gradient of an embedding is; torch adds it last.
            g = g + sums[name] if sums[name].is_sparse else sums[name] + g
        sums[name] = g


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
