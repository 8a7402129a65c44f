"""The teacher's half of a step.

Its passes on the inner batches, and the gradient that it learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.batch import micro_batches
from metapl.execution.compare import EXACTLY, check_same_outputs, coarsest_dtype
from metapl.execution.layout import Layout
from metapl.execution.local import NOTHING
from metapl.execution.numerics import no_fast_path
from metapl.execution.ranks import Ranks, rows_shared
from metapl.execution.sharded import by_backward
from metapl.execution.shards import local
from metapl.execution.state import RandomState, Slots, State, replay
from metapl.feedback import Estimator, modes_for
from metapl.feedback.base import Feedback
from metapl.feedback.lookahead import InnerBatches
from metapl.feedback.path import Path
from metapl.feedback.size import FeedbackSize, ratio_of
from metapl.problems.base import (
    Kind,
    Problem,
    Signal,
    enters_input,
    kind_of,
    reads_signal_in_outer_input,
)
from metapl.problems.losses import TeacherLoss, sum_of_terms
from metapl.problems.means import Shares, refuse_other_than_means, shares_of_losses

NOT_FINITE = (
    "the network's own loss is NaN or infinite: it has diverged, or a batch has extreme values; "
    "lower its learning rate, or clean the batch."
)


@dataclass
class TeacherPass:
    """The teacher's pass on one inner batch, at θ_T from before the step."""

    inner_batch: Any
    student_outputs: Tensor | None
    signal: Signal
    random: RandomState | None = (
        None  # what a pass that is computed again began with: the generators,
    )
    state: State | None = None  # and the network's state


class Teaching:
    """The teacher's passes on the inner batches of a path, in their order: one for each
    micro-batch, or one for the whole batch where the problem says so (``signal_of_batch``)."""

    def __init__(
        self,
        layout: Layout
        | None,  # of the teacher; None: the problem has none, and is given an empty module
        problem: Problem,
        mode: Estimator,
        generator: torch.Generator | None,  # of labels that are drawn
        ranks: Ranks,
        device: torch.device,
        inner_batches: InnerBatches,
        parts: int,  # micro-batches of each of them
        recompute: bool,  # signals without a graph first, and once more with one in ``with_graph``
        slots: Slots
        | None = None,  # the network's tables where they have been read in this step already
    ) -> None:
        self.layout, self.problem, self.mode, self.generator = layout, problem, mode, generator
        self.ranks, self.device, self.steps = ranks, device, len(inner_batches)
        self.parts = 1 if problem.signal_of_batch else parts
        self.rereads = inner_batches.are_read_again
        self.recompute = layout is not None and (recompute or parts > 1 or self.rereads)
        self.network = nn.Module() if layout is None else layout.network
        self.slots, self.passes = slots or Slots(self.network), list[TeacherPass]()

    def __call__(self, batch: Any, outputs: Tensor | None) -> Signal:
        """Algorithm 1, line 2, ŷ_u ~ T(x_u).

        The signal about a micro-batch, given the student's outputs on it.
        """
        is_watched = self.slots.draws_outside is None
        before = (
            self.slots.random_state(self.device, self.generator)
            if self.recompute or is_watched
            else None
        )
        if self.recompute:
            state = self.slots.snapshot()
            with torch.no_grad(), no_fast_path():
                signal = self._ask(batch, outputs)
            taken = TeacherPass(None if self.rereads else batch, outputs, signal, before, state)
        else:
            taken = TeacherPass(batch, outputs, self._ask(batch, outputs))
        if is_watched and before is not None:
            self.slots.watch(before, self.slots.random_state(self.device))
        if self.layout is not None:
            self.passes.append(taken)
        return taken.signal

    def with_graph(self, taken: TeacherPass, batch: Any) -> Signal:
        """The signal of a pass with the teacher's graph, computed again if it was computed without."""
        if taken.random is None or taken.state is None:
            return taken.signal
        with replay(taken.random, taken.state):
            again = self._ask(batch, taken.student_outputs)
        fields = again.fields()
        for name, first in taken.signal.fields().items():
            tolerance = EXACTLY[coarsest_dtype([first.dtype], first.device)].outputs
            check_same_outputs(fields[name].detach(), first.detach(), tolerance, "teacher")
        return again

    def _ask(self, batch: Any, outputs: Tensor | None) -> Signal:
        with NOTHING if self.ranks.alone else rows_shared(self.ranks):
            signal = self.problem.signal(self.network, batch, outputs, generator=self.generator)
        check_signal(signal, self.mode, self.problem, self.steps)
        return signal

    def direct_gradient(self, path: Path) -> dict[str, Tensor]:
        """The direct term ∂L(θ′; φ)/∂φ at fixed θ′, by the teacher's parameters, with zeros where it reads none."""
        assert self.layout is not None, "a direct term is of a teacher"
        taken = self.passes[-1]
        signal = taken.signal
        if reads_signal_in_outer_input(self.problem):
            batch = path.inner_batch(len(path.steps) - 1) if self.rereads else taken.inner_batch
            signal = self.with_graph(taken, batch)
        loss = path.direct_loss(signal)
        reached = reached_gradient(self.layout, loss, retain=True)
        parameters = self.layout.parameters()
        return {
            name: reached[name] if name in reached else torch.zeros_like(p)
            for name, p in parameters.items()
        }

    def gradient(self, path: Path, feedback: Sequence[Feedback]) -> dict[str, Tensor]:
        """The gradient of −Σ h·signal in the teacher's weights, over all passes.

        Empty without a teacher.
        """
        grads: dict[str, Tensor] = {}
        if self.layout is None:
            return grads
        pieces = [piece for of_step in feedback for piece in of_step.chunks(self.parts)]
        for number, (taken, h) in enumerate(zip(self.passes, pieces, strict=True)):
            batch = taken.inner_batch
            if self.rereads:
                whole = path.inner_batch(number // self.parts)
                batch = micro_batches(whole, self.parts, "unlabeled")[number % self.parts]
            loss = h.teacher_loss(self.with_graph(taken, batch))
            # The backward pass of a sharded network averages over the ranks; that of others stays
            # with this rank.
            new = gradient_of(
                self.layout, self.ranks.size * loss if self.layout.is_sharded else loss
            )
            grads = {name: grads[name] + g for name, g in new.items()} if grads else new
        return (
            grads
            if self.layout.is_sharded
            else {name: self.ranks.sum(g) for name, g in grads.items()}
        )

    def backward(
        self,
        feedback: Sequence[Feedback],
        losses: Sequence[TeacherLoss],
        outer_batch: Any,
        step: int,
        size: FeedbackSize,
        *,
        measure: bool = False,
        is_first: bool = False,
        direct_loss: Callable[[Signal], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        r"""Leave the teacher's gradient in ``.grad``: Algorithm 1, lines 5-7.

        .. math:: G = \lambda\, G_h + G_{own}, \qquad G_h = -\nabla \textstyle\sum h \cdot \mathrm{signal}, \qquad
                  G_{own} = \nabla \textstyle\sum_k L_k

        Args:
            feedback: h of each student step.
            losses: L_k, the teacher's own; they read the last batch.
            outer_batch: which they read too.
            step: the number of the step, for losses that depend on it.
            size: the rule that gives λ.
            measure: find ‖λ G_h‖ / ‖G_own‖ also where the rule does not need it, by one more
                backward pass of the feedback. The gradient that is left stays the same, bit for
                bit.
            is_first: compare the losses of micro-batches with those of their halves, before
                anything moves.
            direct_loss: L(θ′; φ) at fixed θ′, given the last signal, where the outer loss reads the
                teacher: G_h is then the sum of both gradients.

        Returns: the report's scalars: the losses, and ``feedback_weight`` and ``feedback_ratio``
        where both gradients were found.
        """
        layout, parts, alone = self.layout, self.parts, self.ranks.alone
        if layout is None:
            return {}
        pieces = (
            feedback
            if parts == 1
            else [piece for of_step in feedback for piece in of_step.chunks(parts)]
        )
        outer_parts = [outer_batch]
        if parts > 1:
            outer_parts = micro_batches(outer_batch, parts, "labeled")
        first_of_last_batch = len(self.passes) - parts
        inner_parts = [taken.inner_batch for taken in self.passes[first_of_last_batch:]]
        if parts > 1 and is_first:
            with rows_shared(self.ranks):
                refuse_other_than_means(
                    self.network,
                    losses,
                    outer_parts,
                    inner_parts,
                    signals=[taken.signal for taken in self.passes[first_of_last_batch:]],
                    problem=self.problem,
                    step=step,
                    ranks=self.ranks,
                    device=self.device,
                    parts=parts,
                )
        shares = shares_of_losses(losses, outer_parts, inner_parts, self.ranks, self.device)
        gives_feedback = self.mode.credits != "nothing"
        compares = size.compares and gives_feedback
        hooked = [name for name, p in layout.parameters().items() if p._backward_hooks]
        # A hook that changes gradients would be called with each of them, and twice where the size
        # is measured.
        measures = measure and gives_feedback and bool(losses) and not hooked
        if compares and hooked:
            raise MetaplError(
                f"the teacher's parameters {few(hooked, 3)} have hooks, which would change the "
                "gradients of the feedback and of the own losses one by one; expected "
                "feedback_weight=1.0, or clip_norm without hooks."
            )
        scalars = list[dict[str, Tensor]]()
        of_feedback = dict[str, Tensor]()
        of_losses = dict[str, Tensor]()
        for i, (taken, h) in enumerate(zip(self.passes, pieces, strict=True)):
            signal = (
                taken.signal if taken.random is None else self.with_graph(taken, taken.inner_batch)
            )
            from_feedback = h.teacher_loss(signal)
            if not alone:  # a sum over all rows, of a gradient that is averaged over the ranks
                from_feedback = self.ranks.size * from_feedback
            if direct_loss is not None and i == len(self.passes) - 1:
                # Without a graph it adds nothing to a gradient.
                from_feedback = from_feedback + direct_loss(signal)
            own = None
            if i >= first_of_last_batch:
                part = i - first_of_last_batch
                own, named = self._own_loss(
                    losses,
                    outer_parts[part],
                    taken.inner_batch,
                    signal=signal,
                    step=step,
                    shares=shares[part],
                )
                scalars.append(named)
                own = own / parts if parts > 1 else own
            learns = own is not None and own.requires_grad
            if compares:
                # The teacher's pass belongs to both graphs.
                add_to(of_feedback, reached_gradient(layout, from_feedback, retain=learns))
                if own is not None and learns:
                    add_to(of_losses, reached_gradient(layout, own))
                continue
            total = from_feedback if size.weight == 1.0 else size.weight * from_feedback
            if measures and total.requires_grad:
                add_to(of_feedback, reached_gradient(layout, total, retain=True))
            if own is not None and learns:
                total = total + own
            if total.requires_grad:
                total.backward()
        parameters = layout.parameters()
        if compares:
            of_feedback, of_losses = self._over_ranks(of_feedback), self._over_ranks(of_losses)
            feedback_norm, own_norm = self._norm(of_feedback), self._norm(of_losses)
            weight = size.weight_for(feedback_norm, own_norm)
            scalars[-1] |= {
                "feedback_weight": weight,
                "feedback_ratio": ratio_of(weight, feedback_norm, own_norm),
            }
            add_to(of_losses, {name: weight.to(g.dtype) * g for name, g in of_feedback.items()})
            for name, p in parameters.items():
                p.grad = of_losses.get(name)
                # A backward pass would have called these on the whole gradient.
                if p.grad is not None:
                    for hook in (p._post_accumulate_grad_hooks or {}).values():
                        hook(p)
        elif measures:
            whole = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            of_losses = {
                name: plus(g, -of_feedback[name]) if name in of_feedback else g
                for name, g in whole.items()
            }
            feedback_norm, own_norm = (
                self._norm(self._over_ranks(tree)) for tree in (of_feedback, of_losses)
            )
            scalars[-1] |= {
                "feedback_weight": torch.full_like(own_norm, size.weight),
                "feedback_ratio": ratio_of(torch.ones_like(own_norm), feedback_norm, own_norm),
            }
        means = scalars[0] if len(scalars) == 1 else mean_scalars(scalars)
        means = means if alone else self.ranks.mean_tree(means, means)
        # The mean over the ranks is finite where all of them are: they refuse it together.
        checks.refuse_not_finite(NOT_FINITE, means["teacher_loss"])
        return means

    def _own_loss(
        self,
        losses: Sequence[TeacherLoss],
        outer_batch: Any,
        inner_batch: Any,
        *,
        signal: Signal,
        step: int,
        shares: Shares,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the teacher's own losses on a micro-batch, and the report's scalars of it."""
        with NOTHING if self.ranks.alone else rows_shared(self.ranks):
            batches = {"labeled": outer_batch, "unlabeled": inner_batch, "signal": signal}
            terms = sum_of_terms(
                self.network, losses, kind="teacher loss", shares=shares, step=step, **batches
            )
        values = [*terms.values()] or [torch.zeros((), device=self.device)]
        own = values[0] if len(values) == 1 else torch.stack(values).sum()
        if not own.requires_grad:
            checks.learns(own, "teacher")
        named = {f"teacher_{name}": term.detach() for name, term in terms.items()}
        return own, {"teacher_loss": own.detach(), **named}

    def _over_ranks(self, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a gradient as the mean over the ranks, which that of a sharded network is already."""
        if self.layout is None or self.layout.kind != "replicated":
            return gradient
        like: dict[str, Tensor] = dict(self.layout.parameters())
        return self.ranks.mean_tree(gradient, like)

    def _norm(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """Return the norm of a gradient over all processes that hold parts of it.

        Of no gradient 0.
        """
        if self.layout is None or not gradient:
            return torch.zeros((), device=self.device)
        return self.layout.space.norm({name: local(g) for name, g in gradient.items()})


def add_to(sums: dict[str, Tensor], gradient: Mapping[str, Tensor]) -> None:
    """Add a gradient to sums by parameter, in place."""
    for name, g in gradient.items():
        sums[name] = plus(sums[name], g) if name in sums else g


def plus(a: Tensor, b: Tensor) -> Tensor:
    """Return a + b, of which either may be sparse, as the gradient of an embedding is.

    Torch adds a sparse one last.
    """
    return b + a if a.is_sparse else a + b


def check_signal(signal: Any, mode: Estimator, problem: Problem, steps: int) -> None:
    """Refuse what is no signal of tensors, or of a kind that the mode cannot differentiate in so many student steps."""
    value, drawn = (signal.value, signal.log_prob) if isinstance(signal, Signal) else (None, None)
    fits = isinstance(value, Tensor) and (drawn is None or drawn.shape == value.shape[:1])
    if isinstance(value, dict):
        fits = drawn is None and bool(value) and all(isinstance(t, Tensor) for t in value.values())
    if not fits:
        given = (
            f"a Signal of {checks.described(value)}"
            if isinstance(signal, Signal)
            else checks.described(signal)
        )
        raise MetaplError(
            f"{kind_of(problem)}.signal returned {given}; expected metapl.Signal(value) of a "
            "tensor or a dict of them, or metapl.Signal(value, log_prob=...) of a sampled tensor."
        )
    kind: Kind = "soft" if drawn is None else "hard"
    if kind == "hard" and mode.credits in ("signal", "example") and enters_input(problem):
        given = (
            f"mode {mode.name!r} credits each label, and those of {kind_of(problem)} enter the "
            "student's input"
        )
        raise MetaplError(
            f"{given}; expected a differentiable signal, or 'reinforce', 'loss_difference' or "
            "'none'."
        )
    constant = kind == "soft" and mode.credits != "nothing" and not signal.differentiable()
    if constant or kind not in mode.labels:
        own = f"{checks.described(value)} with{'out' if drawn is None else ''} a log_prob"
        fitting = ", ".join(modes_for(kind, looks_ahead=steps > 1))
        given = f"the problem's signal is {own}, which mode '{mode.name}' does not differentiate"
        raise MetaplError(
            f"{given}; expected {fitting}, or a signal of floating point, or with log_prob."
        )


def reached_gradient(layout: Layout, loss: Tensor, *, retain: bool = False) -> dict[str, Tensor]:
    """Return the gradient of a loss in the weights that it reaches: of this rank's rows, or the
    mean over the ranks of a sharded network, whose own backward pass averages.

    By a backward pass, since a part under ``torch.utils.checkpoint`` may run in no other way;
    ``.grad`` stays as it is. Where the weights have hooks that a backward pass would call with a
    part of the step's gradient, by ``torch.autograd.grad``. ``retain`` keeps the graph for another
    pass.
    """
    parameters = layout.parameters()
    if not loss.requires_grad:
        return {}
    has_hooks = any(p._post_accumulate_grad_hooks for p in parameters.values())
    if layout.is_sharded or not has_hooks:
        return by_backward(loss, parameters, retain=retain)
    grads = torch.autograd.grad(
        loss, list(parameters.values()), retain_graph=retain, allow_unused=True
    )
    return {name: g for name, g in zip(parameters, grads, strict=True) if g is not None}


def gradient_of(layout: Layout, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a loss in a network's weights, with zeros for those that it does not
    reach; no other leaf of the graph gets a gradient."""
    parameters = layout.parameters()
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    if layout.is_sharded:
        reached = by_backward(loss, parameters)
        return {
            name: reached[name] if name in reached else torch.zeros_like(p)
            for name, p in parameters.items()
        }
    grads = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, grads, strict=True))


def mean_scalars(scalars: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The means over micro-batches; what only some report, such as a weight, as it is."""
    if len(scalars) == 1:
        return dict(scalars[0])
    names = dict.fromkeys(name for part in scalars for name in part)
    return {
        name: torch.stack([part[name] for part in scalars if name in part]).mean() for name in names
    }
