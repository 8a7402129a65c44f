"""Planted faults: each bends the library as a plausible mistake would, until the monkeypatch is undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metapl.data import steps as sampler
from metapl.execution import local
from metapl.execution.layout import Capability, Layout
from metapl.execution.local import LocalStudent, Pass
from metapl.execution.state import RandomState, Slots, State, replay
from metapl.feedback import base
from metapl.feedback.inner_step import InnerStep
from metapl.feedback.path import Path
from metapl.feedback.size import FeedbackSize
from metapl.feedback.teacher import Teaching
from metapl.problems import Problem, PseudoLabels
from metapl.problems import pseudo_labels as module
from metapl.problems.base import Signal
from metapl.runs.fields import Range
from metapl.updates.base import Clipped
from metapl.updates.torch_optim import SGD

Plant = Callable[[pytest.MonkeyPatch], None]


def flipped_sign(patch: pytest.MonkeyPatch) -> None:
    """The teacher climbs where it should descend."""
    real = base.Feedback.teacher_loss
    patch.setattr(base.Feedback, "teacher_loss", lambda self, signal: -real(self, signal))


def sum_for_reduction(patch: pytest.MonkeyPatch) -> None:
    """Algorithm 1's mean cross-entropy summed over the batch: B times its gradient."""
    real = base.Feedback.teacher_loss
    patch.setattr(
        base.Feedback, "teacher_loss", lambda self, signal: real(replace(self, mean_over=1), signal)
    )


def mean_for_sum(patch: pytest.MonkeyPatch) -> None:
    """The teacher's term averaged over the batch: 1/B of the gradient."""
    real = base.Feedback.teacher_loss
    patch.setattr(base.Feedback, "teacher_loss", lambda self, s: real(self, s) / len(s.value))


def fields_taken_for_each_other(patch: pytest.MonkeyPatch) -> None:
    """Of a signal of several tensors, the feedback of the first is that of all."""
    real = base.Feedback.teacher_loss

    def teacher_loss(self: base.Feedback, signal: Signal) -> Tensor:
        others = {
            name: self.h.reshape(-1, *[1] * (h.ndim - 1)).expand_as(h)
            for name, h in self.others.items()
        }
        return real(replace(self, others=others), signal)

    patch.setattr(base.Feedback, "teacher_loss", teacher_loss)


def ratio_the_wrong_way_round(patch: pytest.MonkeyPatch) -> None:
    real = Teaching.backward

    def backward(self: Teaching, *given: Any, size: FeedbackSize, **options: Any) -> Any:
        if size.ratio is not None:
            size = replace(size, ratio=1 / size.ratio)
        return real(self, *given, size=size, **options)

    patch.setattr(Teaching, "backward", backward)


def sum_for_mean(patch: pytest.MonkeyPatch) -> None:
    """The student's loss summed over the batch."""
    real = PseudoLabels.inner_loss
    patch.setattr(PseudoLabels, "inner_loss", lambda self, z, *rest: real(self, z, *rest) * len(z))


def teacher_labels_strong(patch: pytest.MonkeyPatch) -> None:
    real = PseudoLabels.signal

    def signal(
        self: PseudoLabels, teacher: Any, batch: Any, outputs: Tensor, *, generator: Any
    ) -> Signal:
        return real(self, teacher, module.views(batch)[-1], outputs, generator=generator)

    patch.setattr(PseudoLabels, "signal", signal)


def smoothed_score(patch: pytest.MonkeyPatch) -> None:
    """Label smoothing in the teacher's score term too."""
    real = PseudoLabels.signal

    def signal(self: PseudoLabels, *args: Any, **options: Any) -> Signal:
        found = real(self, *args, **options)
        if found.log_prob is None:
            return found
        alpha = self.label_smoothing
        return replace(
            found, log_prob=(1 - alpha) * found.log_prob + alpha * found.probs.log().mean(-1)
        )

    patch.setattr(PseudoLabels, "signal", signal)


def batch_taken_in_parts(patch: pytest.MonkeyPatch) -> None:
    """A signal of the batch as a whole is asked for micro-batch by micro-batch."""
    kinds = [Problem]
    for kind in kinds:
        patch.setattr(kind, "signal_of_batch", False)
        kinds += kind.__subclasses__()


def momentum_ignored(patch: pytest.MonkeyPatch) -> None:
    """The pullback takes the step for −ηg whatever the optimizer."""
    patch.setattr(
        SGD,
        "pullback",
        lambda self, p, grads, state, v, _=None: {n: -self.learning_rate * v[n] for n in grads},
    )


def clip_without_derivative(patch: pytest.MonkeyPatch) -> None:
    """The pullback of a clip takes its factor for a constant."""

    def through_clip(self: Any, w: Any, grads: Any) -> Any:
        scale, _ = self._scale(grads)
        return {name: scale * t for name, t in w.items()}

    patch.setattr(Clipped, "_through_clip", through_clip)


def new_minus_old(patch: pytest.MonkeyPatch) -> None:
    """The loss difference the wrong way round, as public implementations have it."""
    before, after = Path.outer_loss_before.func, Path.outer_loss.func
    patch.setattr(Path, "outer_loss_before", property(after))
    patch.setattr(Path, "outer_loss", property(before))


def gradient_before_the_step(patch: pytest.MonkeyPatch) -> None:
    """v = ∇L(θ) instead of ∇L(θ′)."""
    real = LocalStudent.loss

    def loss(self: Any, params: Any, *rest: Any, gradient: bool = False, **others: Any) -> Any:
        return real(self, self.params if gradient else params, *rest, gradient=gradient, **others)

    patch.setattr(LocalStudent, "loss", loss)


def weight_of_the_outer_loss_forgotten(patch: pytest.MonkeyPatch) -> None:
    """v of an outer loss that is (sum, weight) is the gradient of the sum."""
    real = LocalStudent.mean_of_all
    patch.setattr(LocalStudent, "mean_of_all", lambda self, values: (real(self, values)[0], 1.0))


def replays(patch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    for user in ("execution.local", "feedback.path", "feedback.teacher"):
        patch.setattr(f"metapl.{user}.replay", change)


def state_moved_by_replays(patch: pytest.MonkeyPatch) -> None:
    """Feedback passes write to the running statistics."""
    stateless = Slots(nn.Module())
    replays(
        patch, lambda random, state, *given, **options: replay(random, stateless, *given, **options)
    )


def tables_not_restored(patch: pytest.MonkeyPatch) -> None:
    """A buffer that a pass has exchanged, or made, stays."""
    real = State.restore

    def restore(self: State) -> None:
        self._tables, self._all = [], []
        real(self)

    patch.setattr(State, "restore", restore)


def other_dropout_mask(patch: pytest.MonkeyPatch) -> None:
    """ż is taken with masks of its own."""
    real = LocalStudent.at_weights

    def at(self: LocalStudent, params: Any, random: Any, state: Any, **options: Any) -> Any:
        random = RandomState.now(self.device) if isinstance(state, State) else random
        return real(self, params, random, state, **options)

    patch.setattr(LocalStudent, "at_weights", at)


def backward_at_the_old_weights(patch: pytest.MonkeyPatch) -> None:
    """The gradient of L(θ′) is taken after θ′ has been put aside, so that checkpoints recompute at θ."""

    def loss(
        self: LocalStudent, params: Any, batches: Any, judge: Any, start: Any, **others: Any
    ) -> Any:
        at = self.as_leaves(params)
        with torch.enable_grad(), self.at_weights(at, start, self.slots):
            value, _ = judge(self.forward(batches[0][0]), batches[0][1])
        return value.detach(), dict(
            zip(at, torch.autograd.grad(value, list(at.values())), strict=True)
        )

    patch.setattr(LocalStudent, "loss", loss)


def plain_tensors_stand_in(patch: pytest.MonkeyPatch) -> None:
    """Other weights are no parameters, which a forward may ask for."""
    patch.setattr(local, "stand_in", lambda t, own: t.requires_grad_() if t.is_leaf else t)
    patch.setattr(
        LocalStudent,
        "as_leaves",
        lambda self, params: {n: t.detach().requires_grad_() for n, t in params.items()},
    )


def outputs_unchecked(patch: pytest.MonkeyPatch) -> None:
    """Replays are believed to be the pass that they replay."""
    for user in ("execution.local", "feedback.teacher"):
        patch.setattr(f"metapl.{user}.check_same_outputs", lambda *given, **named: None)


def slopes_unchecked(patch: pytest.MonkeyPatch) -> None:
    """The forward pass is believed to have the derivative that the backward pass has."""
    patch.setattr("metapl.feedback.base.check_same_slopes", lambda *given: None)


def excluded_end_taken(patch: pytest.MonkeyPatch) -> None:
    real = Range.holds
    patch.setattr(Range, "holds", lambda self, value: value == self.below or real(self, value))


def requirements_not_held(patch: pytest.MonkeyPatch) -> None:
    """Every mode runs wherever the student lies."""
    real = Layout.__init__

    def init(self: Layout, *given: Any, **options: Any) -> None:
        real(self, *given, **options)
        self.capabilities = frozenset(Capability)

    patch.setattr(Layout, "__init__", init)


def same_order_every_epoch(patch: pytest.MonkeyPatch) -> None:
    real = sampler._permutation
    patch.setattr(
        sampler, "_permutation", lambda size, seed, stream, epoch: real(size, seed, stream, 0)
    )


def state_cotangent_dropped(patch: pytest.MonkeyPatch) -> None:
    """What the momentum carries on is forgotten."""
    real = InnerStep.vjp
    patch.setattr(InnerStep, "vjp", lambda self, v, state_cotangent=None: real(self, v))


def hessian_dropped(patch: pytest.MonkeyPatch) -> None:
    """The gradient is taken not to depend on the weights."""
    real = Pass.second_derivatives

    def second_derivatives(self: Pass, *given: Any, **named: Any) -> Any:
        curved, mixed = real(self, *given, **named)
        return {name: torch.zeros_like(t) for name, t in curved.items()}, mixed

    patch.setattr(Pass, "second_derivatives", second_derivatives)


def first_step_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The last of the steps alone is differentiated."""
    real = Path.adjoints
    patch.setattr(Path, "adjoints", lambda self, fields, truncate=None: real(self, fields, 1))


FAULTS_AHEAD: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (state_cotangent_dropped, hessian_dropped, first_step_forgotten)
}
"""Those that show over several student steps."""
