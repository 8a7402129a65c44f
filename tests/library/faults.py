"""Planted faults: each bends the library as a plausible mistake would.

A fault lasts until its monkeypatch is undone. test_faults.py has the tests that catch each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metapl.core.path import Path
from metapl.core.step import InnerStep
from metapl.core.teacher import Teaching
from metapl.data import steps as sampler
from metapl.engines import eager
from metapl.engines.eager import EagerDescent, EagerEngine
from metapl.execution.layout import Capability, Layout
from metapl.execution.numerics import Tree
from metapl.execution.state import RandomState, Slots, State, replay
from metapl.feedback import base
from metapl.problems import BilevelProblem, PseudoLabels, pseudo_labels
from metapl.problems.base import Signal, sum_and_weight
from metapl.runs.fields import Range
from metapl.updates.base import Clipped
from metapl.updates.sgd import SGD

Plant = Callable[[pytest.MonkeyPatch], None]


def flipped_sign(patch: pytest.MonkeyPatch) -> None:
    """Let the teacher climb where it should descend."""
    real = base.Feedback.teacher_loss

    def teacher_loss(self: base.Feedback, signal: Signal) -> Tensor:
        return -real(self, signal)

    patch.setattr(base.Feedback, "teacher_loss", teacher_loss)


def sum_for_reduction(patch: pytest.MonkeyPatch) -> None:
    """Sum Algorithm 1's mean cross-entropy over the batch: B times its gradient."""
    real = base.Feedback.teacher_loss

    def teacher_loss(self: base.Feedback, signal: Signal) -> Tensor:
        return real(replace(self, mean_over=1), signal)

    patch.setattr(base.Feedback, "teacher_loss", teacher_loss)


def mean_for_sum(patch: pytest.MonkeyPatch) -> None:
    """Average the teacher's term over the batch: 1/B of the gradient."""
    real = base.Feedback.teacher_loss

    def teacher_loss(self: base.Feedback, signal: Signal) -> Tensor:
        return real(self, signal) / len(signal.value)

    patch.setattr(base.Feedback, "teacher_loss", teacher_loss)


def fields_taken_for_each_other(patch: pytest.MonkeyPatch) -> None:
    """Take the feedback of the first of a signal's tensors for that of all."""
    real = base.Feedback.teacher_loss

    def teacher_loss(self: base.Feedback, signal: Signal) -> Tensor:
        fields: dict[str, Tensor] = {}
        for name, h in self.others.items():
            h_of_row = self.h.reshape(-1, *[1] * (h.ndim - 1))
            fields[name] = h_of_row.expand_as(h)
        return real(replace(self, others=fields), signal)

    patch.setattr(base.Feedback, "teacher_loss", teacher_loss)


def ratio_the_wrong_way_round(patch: pytest.MonkeyPatch) -> None:
    """Take the ratio of the two gradients' norms for its inverse."""
    real = Teaching.backward

    def backward(self: Teaching, *args: Any, **options: Any) -> Any:
        if self.size.ratio is not None:
            self.size = replace(self.size, ratio=1 / self.size.ratio)
        return real(self, *args, **options)

    patch.setattr(Teaching, "backward", backward)


def sum_for_mean(patch: pytest.MonkeyPatch) -> None:
    """Sum the student's loss over the batch."""
    real = PseudoLabels.inner_loss

    def inner_loss(self: PseudoLabels, outputs: Tensor, *args: Any) -> Tensor:
        return real(self, outputs, *args) * len(outputs)

    patch.setattr(PseudoLabels, "inner_loss", inner_loss)


def teacher_labels_strong(patch: pytest.MonkeyPatch) -> None:
    """Let the teacher label the strong view."""
    real = PseudoLabels.signal

    def signal(
        self: PseudoLabels, teacher: Any, batch: Any, outputs: Tensor, *, generator: Any
    ) -> Signal:
        strong = pseudo_labels.views(batch)[-1]
        return real(self, teacher, strong, outputs, generator=generator)

    patch.setattr(PseudoLabels, "signal", signal)


def smoothed_score(patch: pytest.MonkeyPatch) -> None:
    """Smooth the labels in the teacher's score term too."""
    real = PseudoLabels.signal

    def signal(self: PseudoLabels, *args: Any, **options: Any) -> Signal:
        drawn = real(self, *args, **options)
        if drawn.log_prob is None:
            return drawn
        alpha = self.label_smoothing
        smoothed = (1 - alpha) * drawn.log_prob + alpha * drawn.probs.log().mean(-1)
        return replace(drawn, log_prob=smoothed)

    patch.setattr(PseudoLabels, "signal", signal)


def batch_taken_in_parts(patch: pytest.MonkeyPatch) -> None:
    """Ask for a signal of the batch as a whole micro-batch by micro-batch."""
    to_patch = [BilevelProblem]
    while to_patch:
        kind = to_patch.pop()
        patch.setattr(kind, "signal_of_batch", False)
        to_patch += kind.__subclasses__()


def momentum_ignored(patch: pytest.MonkeyPatch) -> None:
    """Take the step for −ηg in the pullback, whatever the optimizer."""

    def pullback(
        self: SGD, params: Tree, grads: Tree, state: Any, v: Tree, options: Any = None
    ) -> Tree:
        assert self.learning_rate is not None
        return {name: -self.learning_rate * v[name] for name in grads}

    patch.setattr(SGD, "pullback", pullback)


def clip_without_derivative(patch: pytest.MonkeyPatch) -> None:
    """Take the factor of a clip for a constant in its pullback."""

    def through_clip(self: Clipped, w: Tree, grads: Tree) -> Tree:
        scale, _ = self._scale(grads)
        return {name: scale * t for name, t in w.items()}

    patch.setattr(Clipped, "_through_clip", through_clip)


def new_minus_old(patch: pytest.MonkeyPatch) -> None:
    """Take the loss difference the wrong way round, as public implementations have it."""
    loss_before = Path.outer_loss_before.fget
    loss_after = Path.outer_loss.fget
    patch.setattr(Path, "outer_loss_before", property(loss_after))
    patch.setattr(Path, "outer_loss", property(loss_before))


def gradient_before_the_step(patch: pytest.MonkeyPatch) -> None:
    """Take v = ∇L(θ) instead of ∇L(θ′)."""
    real = EagerEngine.loss

    def loss(
        self: EagerEngine, params: Tree, *args: Any, gradient: bool = False, **options: Any
    ) -> Any:
        if gradient:
            params = self.params
        return real(self, params, *args, gradient=gradient, **options)

    patch.setattr(EagerEngine, "loss", loss)


def weight_of_the_outer_loss_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Take the gradient of the sum for v, for an outer loss that is (sum, weight)."""
    real = EagerEngine.mean_of_all

    def mean_of_all(self: EagerEngine, values: Any) -> tuple[Tensor, float]:
        mean, _ = real(self, values)
        return mean, 1.0

    patch.setattr(EagerEngine, "mean_of_all", mean_of_all)


def state_moved_by_replays(patch: pytest.MonkeyPatch) -> None:
    """Let feedback passes write to the running statistics."""
    stateless = Slots(nn.Module())

    def replay_without_state(random: RandomState, state: Any, *args: Any, **options: Any) -> Any:
        return replay(random, stateless, *args, **options)

    for user in ("engines.eager", "core.path", "core.teacher"):
        patch.setattr(f"metapl.{user}.replay", replay_without_state)


def tables_not_restored(patch: pytest.MonkeyPatch) -> None:
    """Leave a buffer that a pass has exchanged, or made."""
    real = State.restore

    def restore(self: State) -> None:
        self._contents = []
        self._buffer_tables = []
        real(self)

    patch.setattr(State, "restore", restore)


def other_dropout_mask(patch: pytest.MonkeyPatch) -> None:
    """Take ż with masks of its own."""
    real = EagerEngine.at_weights

    def at_weights(self: EagerEngine, params: Tree, random: Any, state: Any, **options: Any) -> Any:
        is_replay = isinstance(state, State)
        if is_replay:
            random = RandomState.now(self.device)
        return real(self, params, random, state, **options)

    patch.setattr(EagerEngine, "at_weights", at_weights)


def backward_at_the_old_weights(patch: pytest.MonkeyPatch) -> None:
    """Take the gradient of L(θ′) with θ′ put aside, so that checkpoints recompute at θ."""

    def loss(
        self: EagerEngine, params: Tree, batches: Any, judge: Any, start: Any, **options: Any
    ) -> tuple[Tensor, Tree]:
        leaves = self.as_leaves(params)
        inputs, batch = batches[0]
        with torch.enable_grad(), self.at_weights(leaves, start, self.slots):
            value, _ = sum_and_weight(judge(self.forward(inputs), batch))
        gradient = torch.autograd.grad(value, list(leaves.values()))
        return value.detach(), dict(zip(leaves, gradient, strict=True))

    patch.setattr(EagerEngine, "loss", loss)


def plain_tensors_stand_in(patch: pytest.MonkeyPatch) -> None:
    """Put other weights in that are no parameters, which a forward may ask for."""

    def stand_in(t: Tensor, original: Tensor) -> Tensor:
        return t.requires_grad_() if t.is_leaf else t

    def as_leaves(self: EagerEngine, params: Tree) -> Tree:
        return {name: t.detach().requires_grad_() for name, t in params.items()}

    patch.setattr(eager, "stand_in", stand_in)
    patch.setattr(EagerEngine, "as_leaves", as_leaves)


def ignored(*args: Any, **options: Any) -> None:
    return None


def outputs_unchecked(patch: pytest.MonkeyPatch) -> None:
    """Believe replays to be the pass that they replay."""
    for user in ("engines.eager", "core.teacher"):
        patch.setattr(f"metapl.{user}.check_same_outputs", ignored)


def slopes_unchecked(patch: pytest.MonkeyPatch) -> None:
    """Believe the forward pass to have the derivative that the backward pass has."""
    patch.setattr("metapl.core.step.check_same_slopes", ignored)


def excluded_end_taken(patch: pytest.MonkeyPatch) -> None:
    """Let a field take the end of its range that is excluded."""
    real = Range.holds

    def holds(self: Range, value: Any) -> bool:
        return value == self.below or real(self, value)

    patch.setattr(Range, "holds", holds)


def requirements_not_held(patch: pytest.MonkeyPatch) -> None:
    """Let every mode run wherever the student lies."""
    real = Layout.__init__

    def init(self: Layout, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        self.capabilities = frozenset(Capability)

    patch.setattr(Layout, "__init__", init)


def same_order_every_epoch(patch: pytest.MonkeyPatch) -> None:
    """Take the examples in the order of the first epoch in each."""
    real = sampler._permutation

    def permutation(size: int, seed: int, stream: Any, epoch: int) -> Any:
        return real(size, seed, stream, 0)

    patch.setattr(sampler, "_permutation", permutation)


def state_cotangent_dropped(patch: pytest.MonkeyPatch) -> None:
    """Forget what the momentum carries on."""
    real = InnerStep.vjp

    def vjp(self: InnerStep, v: Tree, state_cotangent: Any = None) -> Any:
        return real(self, v)

    patch.setattr(InnerStep, "vjp", vjp)


def hessian_dropped(patch: pytest.MonkeyPatch) -> None:
    """Take the gradient not to depend on the weights."""
    real = EagerDescent.second_derivatives

    def second_derivatives(self: EagerDescent, *args: Any, **options: Any) -> Any:
        in_weights, in_fields, slope = real(self, *args, **options)
        return {name: torch.zeros_like(t) for name, t in in_weights.items()}, in_fields, slope

    patch.setattr(EagerDescent, "second_derivatives", second_derivatives)


def first_step_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Differentiate the last of the steps alone."""
    real = Path.adjoints

    def adjoints(self: Path, fields: Any, truncate: Any = None) -> Any:
        return real(self, fields, 1)

    patch.setattr(Path, "adjoints", adjoints)


FAULTS_AHEAD: dict[str, Plant] = {
    "state_cotangent_dropped": state_cotangent_dropped,
    "hessian_dropped": hessian_dropped,
    "first_step_forgotten": first_step_forgotten,
}
"""Those that show over several student steps."""
