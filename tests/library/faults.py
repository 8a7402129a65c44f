"""Planted faults: each bends the library as a plausible mistake would, until the monkeypatch is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metapl.data import sampler
from metapl.execution import local, rng
from metapl.execution.layout import Capability, Layout
from metapl.execution.local import LocalStudent, Pass
from metapl.execution.state import Slots, State, replay
from metapl.feedback import base, loss_difference, reinforce
from metapl.feedback.inner_step import InnerStep
from metapl.feedback.path import Path
from metapl.feedback.teacher import Teaching
from metapl.problems import Problem, PseudoLabels
from metapl.problems import pseudo_labels as module
from metapl.problems.base import Signal
from metapl.runs.fields import Range
from metapl.updates import torchopt as transforms
from metapl.updates.base import Clipped
from metapl.updates.torch_optim import SGD

Plant = Callable[[pytest.MonkeyPatch], None]


# ------------------------------------------------------------------------------------------ the teacher's gradient


def flipped_sign(patch: pytest.MonkeyPatch) -> None:
    """The teacher climbs where it should descend."""
    real = base.Feedback.teacher_loss
    patch.setattr(base.Feedback, "teacher_loss", lambda self, signal: -real(self, signal))


def mean_for_sum(patch: pytest.MonkeyPatch) -> None:
    """The teacher's term averaged over the batch: 1/B of the gradient."""
    real = base.Feedback.teacher_loss
    patch.setattr(base.Feedback, "teacher_loss", lambda self, s: real(self, s) / len(s.value))


def further_fields_left_out(patch: pytest.MonkeyPatch) -> None:
    """Of a signal of several tensors, the teacher learns by the first alone."""
    real = base.Feedback.teacher_loss
    patch.setattr(base.Feedback, "teacher_loss", lambda self, signal: real(replace(self, others={}), signal))


def fields_taken_for_each_other(patch: pytest.MonkeyPatch) -> None:
    """Of a signal of several tensors, the feedback of the first is that of all."""
    real = base.Feedback.teacher_loss

    def teacher_loss(self: base.Feedback, signal: Signal) -> Tensor:
        others = {name: self.h.reshape(-1, *[1] * (h.ndim - 1)).expand_as(h) for name, h in self.others.items()}
        return real(replace(self, others=others), signal)

    patch.setattr(base.Feedback, "teacher_loss", teacher_loss)


def ratio_the_wrong_way_round(patch: pytest.MonkeyPatch) -> None:
    real = Teaching.backward

    def backward(self: Teaching, *given: Any) -> Any:
        *others, ratio = given
        return real(self, *others, None if ratio is None else 1 / ratio)

    patch.setattr(Teaching, "backward", backward)


def ratio_taken_for_a_weight(patch: pytest.MonkeyPatch) -> None:
    real = Teaching.backward

    def backward(self: Teaching, *given: Any) -> Any:
        *others, weight, ratio = given
        return real(self, *others, weight if ratio is None else ratio, None)

    patch.setattr(Teaching, "backward", backward)


def baseline_with_this_step(patch: pytest.MonkeyPatch) -> None:
    """The moving average already holds the h that it is subtracted from."""

    def subtract(h: Tensor, decay: float | None, state: Any) -> Any:
        if decay is None:
            return h, state
        b = decay * state["baseline"].to(h) + (1 - decay) * h
        return h - b, {"baseline": b}

    patch.setattr(reinforce, "subtract_baseline", subtract)
    patch.setattr(loss_difference, "subtract_baseline", subtract)


# ------------------------------------------------------------------------------------------ the problem


def sum_for_mean(patch: pytest.MonkeyPatch) -> None:
    """The student's loss summed over the batch."""
    real = PseudoLabels.inner_loss
    patch.setattr(PseudoLabels, "inner_loss", lambda self, z, *rest: real(self, z, *rest) * len(z))


def student_learns_weak(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PseudoLabels, "student_input", lambda self, batch: module.views(batch)[0])


def teacher_labels_strong(patch: pytest.MonkeyPatch) -> None:
    real = PseudoLabels.signal

    def signal(self: PseudoLabels, teacher: Any, batch: Any, outputs: Tensor, *, generator: Any) -> Signal:
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
        return replace(found, log_prob=(1 - alpha) * found.log_prob + alpha * found.probs.log().mean(-1))

    patch.setattr(PseudoLabels, "signal", signal)


def batch_taken_in_parts(patch: pytest.MonkeyPatch) -> None:
    """A signal of the batch as a whole is asked for micro-batch by micro-batch."""
    kinds = [Problem]
    for kind in kinds:
        patch.setattr(kind, "signal_of_batch", False)
        kinds += kind.__subclasses__()


# ------------------------------------------------------------------------------------------ the update


def momentum_ignored(patch: pytest.MonkeyPatch) -> None:
    """The pullback takes the step for −ηg whatever the optimizer."""
    patch.setattr(
        SGD, "pullback", lambda self, p, grads, state, v, _=None: {n: -self.learning_rate * v[n] for n in grads}
    )


def velocity_forgotten(patch: pytest.MonkeyPatch) -> None:
    """θ′ of the estimate starts from no velocity, the real optimizer from its own."""
    real = SGD.rule
    patch.setattr(SGD, "rule", staticmethod(lambda p, g, states, group: real(p, g, [{} for _ in p], group)))


def transforms_velocity_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A TorchOpt transform built anew takes its first call for the first step."""

    def init(self: Any, transform: Any, parameters: Any, state: Any) -> None:
        self.parameters, self.transform = dict(parameters), transform
        fresh = self.transform.init({name: p.detach() for name, p in parameters.items()})
        self.state = fresh if state is None else state

    patch.setattr(transforms.TransformUpdate, "__init__", init)


def clip_without_derivative(patch: pytest.MonkeyPatch) -> None:
    """The pullback of a clip takes its factor for a constant."""

    def through_clip(self: Any, w: Any, grads: Any) -> Any:
        scale, _ = self._scale(grads)
        return {name: scale * t for name, t in w.items()}

    patch.setattr(Clipped, "_through_clip", through_clip)


# ------------------------------------------------------------------------------------------ passes and their replays


def new_minus_old(patch: pytest.MonkeyPatch) -> None:
    """The loss difference the wrong way round, as public implementations have it."""
    before, after = Path.outer_loss_before.func, Path.outer_loss.func
    patch.setattr(Path, "outer_loss_before", property(after))
    patch.setattr(Path, "outer_loss", property(before))


def gradient_before_the_step(patch: pytest.MonkeyPatch) -> None:
    """v = ∇L(θ) instead of ∇L(θ′)."""
    real = LocalStudent.loss_and_gradient
    patch.setattr(LocalStudent, "loss_and_gradient", lambda self, params, *rest: real(self, self.params, *rest))


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
    replays(patch, lambda random, state, *given, **options: replay(random, stateless, *given, **options))


def generator_not_put_back(patch: pytest.MonkeyPatch) -> None:
    """Feedback passes draw from the caller's generator."""

    @contextmanager
    def again(random: rng.RandomState, *given: Any, **options: Any) -> Iterator[None]:
        with replay(random, *given, **options):
            yield
            drawn = rng.RandomState.now(random.device)
        drawn.restore()

    replays(patch, again)


def weights_left_in_place(patch: pytest.MonkeyPatch) -> None:
    """After a replay the network holds the weights of the replay."""

    @contextmanager
    def again(random: rng.RandomState, state: Any, held: Any = (), **options: Any) -> Iterator[None]:
        with replay(random, state, held, **options):
            yield
        for table, name, t in held:
            table[name] = t

    replays(patch, again)


def values_not_restored(patch: pytest.MonkeyPatch) -> None:
    """Of a network's state, only the tensors are put back, and not what they held."""
    real = State.restore

    def restore(self: State) -> None:
        self._held = {}
        real(self)

    patch.setattr(State, "restore", restore)


def tables_not_restored(patch: pytest.MonkeyPatch) -> None:
    """A buffer that a pass has exchanged, or made, stays."""
    real = State.restore

    def restore(self: State) -> None:
        self._tables, self._empty = [], []
        real(self)

    patch.setattr(State, "restore", restore)


def other_dropout_mask(patch: pytest.MonkeyPatch) -> None:
    """ż is taken with masks of its own."""
    real = LocalStudent.at

    def at(self: LocalStudent, params: Any, random: Any, state: Any, **options: Any) -> Any:
        random = rng.RandomState.now(self.device) if isinstance(state, State) else random
        return real(self, params, random, state, **options)

    patch.setattr(LocalStudent, "at", at)


def replays_from_moved_buffers(patch: pytest.MonkeyPatch) -> None:
    """Replays begin with the state as it is by then."""
    real = LocalStudent.at
    patch.setattr(LocalStudent, "at", lambda self, *given, **options: real(self, *given[:2], self.slots, **options))


def masks_of_the_teacher(patch: pytest.MonkeyPatch) -> None:
    """L(θ′) draws where the teacher draws."""
    patch.setattr(rng.RandomState, "branch", lambda self: self)


def backward_at_the_old_weights(patch: pytest.MonkeyPatch) -> None:
    """The gradient of L(θ′) is taken after θ′ has been put aside, so that checkpoints recompute at θ."""

    def loss_and_gradient(self: LocalStudent, params: Any, batches: Any, losses: Any, start: Any) -> Any:
        at = self.as_leaves(params)
        with torch.enable_grad(), self.at(at, start, self.slots):
            value, _ = losses[0](self.forward(batches[0]))
        return value.detach(), dict(zip(at, torch.autograd.grad(value, list(at.values())), strict=True))

    patch.setattr(LocalStudent, "loss_and_gradient", loss_and_gradient)


def plain_tensors_stand_in(patch: pytest.MonkeyPatch) -> None:
    """Other weights are no parameters, which a forward may ask for."""
    patch.setattr(local, "stand_in", lambda t, own: t.requires_grad_() if t.is_leaf else t)
    patch.setattr(
        LocalStudent, "as_leaves", lambda self, params: {n: t.detach().requires_grad_() for n, t in params.items()}
    )


def graph_of_another_label(patch: pytest.MonkeyPatch) -> None:
    """The graph of g that is kept is in the distribution, where the student has learned a drawn label."""
    patch.setattr(
        "metapl.feedback.path.credited",
        lambda signal, of: {"value": signal.probs} if signal.sampled else signal.differentiable(),
    )


def graph_of_every_part_counts_whole(patch: pytest.MonkeyPatch) -> None:
    """The derivatives of micro-batches are not divided by their number."""
    real = InnerStep.in_signal

    def in_signal(self: InnerStep, *given: Any) -> Any:
        return {n: None if t is None else len(self.passes) * t for n, t in real(self, *given).items()}

    patch.setattr(InnerStep, "in_signal", in_signal)


def outputs_unchecked(patch: pytest.MonkeyPatch) -> None:
    """Replays are believed to be the pass that they replay."""
    for user in ("execution.local", "feedback.teacher"):
        patch.setattr(f"metapl.{user}.same_outputs", lambda *given, **named: None)


def slopes_unchecked(patch: pytest.MonkeyPatch) -> None:
    """The forward pass is believed to have the derivative that the backward pass has."""
    patch.setattr("metapl.feedback.credit.same_slopes", lambda *given: None)


# ------------------------------------------------------------------------------------------ settings, and data


def excluded_end_taken(patch: pytest.MonkeyPatch) -> None:
    real = Range.holds
    patch.setattr(Range, "holds", lambda self, value: value == self.below or real(self, value))


def requirements_not_held(patch: pytest.MonkeyPatch) -> None:
    """Every mode runs wherever the student lies."""
    real = Layout.__init__

    def init(self: Layout, *given: Any, **options: Any) -> None:
        real(self, *given, **options)
        self.offers = frozenset(Capability)

    patch.setattr(Layout, "__init__", init)


def same_order_every_epoch(patch: pytest.MonkeyPatch) -> None:
    real = sampler._permutation
    patch.setattr(sampler, "_permutation", lambda size, seed, stream, epoch: real(size, seed, stream, 0))


# ------------------------------------------------------------------------------------------ over several steps


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
    plant.__name__: plant for plant in (state_cotangent_dropped, hessian_dropped, first_step_forgotten)
}
"""Those that show over several student steps."""
