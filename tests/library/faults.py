"""Planted faults: each bends the library as a plausible mistake would, until the monkeypatch is undone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
import torch
from metapl.execution.writes import Watch, Weights, memory_of
from torch import Tensor

from metapl.data import sampler
from metapl.data.feed import _ListFeed
from metapl.execution import buffers, local, rng
from metapl.execution.local import LocalStudent, Pass
from metapl.feedback import base, loss_difference, reinforce
from metapl.feedback.inner_step import InnerStep
from metapl.feedback.path import Path
from metapl.metrics import statistics
from metapl.problems import PseudoLabels
from metapl.problems import pseudo_labels as module
from metapl.problems.base import Signal
from metapl.runs import checkpoint
from metapl.runs.fields import Range
from metapl.runs.rows import Metrics
from metapl.training.loop import FitRun
from metapl.training.options import Rates
from metapl.training.selection import Average, Best, Selection
from metapl.updates import torchopt as transforms
from metapl.updates.base import Clipped
from metapl.updates.torch_optim import SGD, TorchUpdate

Plant = Callable[[pytest.MonkeyPatch], None]


def flipped_sign(patch: pytest.MonkeyPatch) -> None:
    """The teacher climbs where it should descend."""
    real = base.Feedback.teacher_loss
    patch.setattr(base.Feedback, "teacher_loss", lambda self, signal: -real(self, signal))


def new_minus_old(patch: pytest.MonkeyPatch) -> None:
    """The loss difference the wrong way round, as public implementations have it."""
    before, after = Path.outer_loss_before.func, Path.outer_loss.func
    patch.setattr(Path, "outer_loss_before", property(after))
    patch.setattr(Path, "outer_loss", property(before))


def mean_for_sum(patch: pytest.MonkeyPatch) -> None:
    """The teacher's term averaged over the batch: 1/B of the gradient."""
    real = base.Feedback.teacher_loss
    patch.setattr(base.Feedback, "teacher_loss", lambda self, s: real(self, s) / len(s.value))


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


def momentum_ignored(patch: pytest.MonkeyPatch) -> None:
    """The pullback takes the step for −ηg whatever the optimizer."""
    patch.setattr(SGD, "pullback", lambda self, params, grads, state, v: {n: -self.learning_rate * v[n] for n in grads})


def velocity_forgotten(patch: pytest.MonkeyPatch) -> None:
    """θ′ of the estimate starts from no velocity, the real optimizer from its own."""
    real = SGD.rule
    patch.setattr(SGD, "rule", staticmethod(lambda p, g, states, group: real(p, g, [{} for _ in p], group)))


def transforms_velocity_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A TorchOpt transform built anew takes its first call for the first step."""

    def init(self: Any, transform: Any, parameters: Any, state: Any) -> None:
        self.parameters = dict(parameters)
        self.transform = transform
        fresh = self.transform.init({name: p.detach() for name, p in parameters.items()})
        self.state = fresh if state is None else state

    patch.setattr(transforms.TransformUpdate, "__init__", init)


def clip_without_derivative(patch: pytest.MonkeyPatch) -> None:
    """The pullback of a clip takes its factor for a constant."""

    def through_clip(self: Any, w: Any, grads: Any) -> Any:
        scale, _ = self._scale(grads)
        return {name: scale * t for name, t in w.items()}

    patch.setattr(Clipped, "_through_clip", through_clip)


def statistics_updated_twice(patch: pytest.MonkeyPatch) -> None:
    """Feedback passes write to the running statistics."""
    patch.setattr(buffers.State, "again", lambda self, slots, **how: nullcontext())
    patch.setattr(buffers.State, "again", lambda self, slots, **options: nullcontext())


def teachers_statistics_updated_twice(patch: pytest.MonkeyPatch) -> None:
    """The recomputed pass writes to the teacher's running statistics once more."""
    patch.setattr(buffers.State, "again", lambda self, slots, **options: nullcontext())


def other_dropout_mask(patch: pytest.MonkeyPatch) -> None:
    """ż is taken with masks of its own."""
    real = Pass._again

    def again(self: Pass, held: Any, **options: Any) -> Any:
        self._before = rng.RandomState.now(self.student.device)
        return real(self, held, **options)

    patch.setattr(Pass, "_again", again)


def generator_not_put_back(patch: pytest.MonkeyPatch) -> None:
    """Feedback passes draw from the caller's generator."""

    def replayed(state: rng.RandomState) -> Any:
        state.restore()
        return nullcontext()

    patch.setattr("metapl.execution.local.replayed", replayed)


def stale_weights_after_a_difference(patch: pytest.MonkeyPatch) -> None:
    """The weights stay where the difference moved them."""
    real = Pass.shifted

    def shifted(self: Pass, step: Tensor, direction: Any) -> Tensor:
        outputs = real(self, step, direction)
        with torch.no_grad():
            for name, d in direction.items():
                self.student.parameters[name].add_(step * d * (step < 0))  # the second of the two passes
        return outputs

    patch.setattr(Pass, "shifted", shifted)


def gradient_before_the_step(patch: pytest.MonkeyPatch) -> None:
    """v = ∇L(θ) instead of ∇L(θ′)."""
    real = LocalStudent.loss_and_gradient
    patch.setattr(LocalStudent, "loss_and_gradient", lambda self, params, *rest: real(self, self.params, *rest))


def masks_of_the_teacher(patch: pytest.MonkeyPatch) -> None:
    """L(θ′) draws where the teacher draws."""
    patch.setattr(rng.RandomState, "branch", lambda self: self)


def replays_from_moved_buffers(patch: pytest.MonkeyPatch) -> None:
    """Replays begin with the buffers as they are by then."""
    again = buffers.State.again
    patch.setattr(
        buffers.State, "again", lambda self, slots, **options: again(buffers.State(self._parts), slots, **options)
    )


def backward_at_the_old_weights(patch: pytest.MonkeyPatch) -> None:
    """The gradient of L(θ′) is taken after θ′ has been put aside, so that checkpoints recompute at θ."""

    def loss_and_gradient(self: LocalStudent, params: Any, batches: Any, losses: Any, start: Any) -> Any:
        at = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad(), self._beside(at, start):
            value, _ = losses[0](self.forward(batches[0]))
        return value.detach(), dict(zip(at, torch.autograd.grad(value, list(at.values())), strict=True))

    patch.setattr(LocalStudent, "loss_and_gradient", loss_and_gradient)


def state_cotangent_dropped(patch: pytest.MonkeyPatch) -> None:
    """Over several steps, what the momentum carries on is forgotten."""
    real = InnerStep.vjp
    patch.setattr(InnerStep, "vjp", lambda self, v, state_cotangent=None: real(self, v))


def hessian_dropped(patch: pytest.MonkeyPatch) -> None:
    """Over several steps, the gradient is taken not to depend on the weights."""
    real = Pass.second_derivatives

    def second_derivatives(self: Pass, *given: Any, **named: Any) -> Any:
        curved, mixed = real(self, *given, **named)
        return {name: torch.zeros_like(t) for name, t in curved.items()}, mixed

    patch.setattr(Pass, "second_derivatives", second_derivatives)


def first_step_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The last of the steps alone is differentiated."""
    real = Path.adjoints
    patch.setattr(Path, "adjoints", lambda self, fields, truncate=None: real(self, fields, 1))


def outputs_unchecked(patch: pytest.MonkeyPatch) -> None:
    """Replays are believed to be the pass that they replay."""
    patch.setattr("metapl.execution.local.check_outputs", lambda *given, **named: None)


def slopes_unchecked(patch: pytest.MonkeyPatch) -> None:
    """The forward pass is believed to have the derivative that the backward pass has."""
    patch.setattr("metapl.feedback.credit.check_slopes", lambda *given: None)


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


def baseline_with_this_step(patch: pytest.MonkeyPatch) -> None:
    """The moving average already holds the h that it is subtracted from."""

    def subtract(h: Tensor, decay: float | None, state: Any) -> Any:
        if decay is None:
            return h, state
        b = decay * state["baseline"].to(h) + (1 - decay) * h
        return h - b, {"baseline": b}

    patch.setattr(reinforce, "subtract_baseline", subtract)
    patch.setattr(loss_difference, "subtract_baseline", subtract)


# ------------------------------------------------------------------------------------------------------- runs and edges


def checkpoint_believed(patch: pytest.MonkeyPatch) -> None:
    """The checksum of a checkpoint is not compared."""
    patch.setattr(checkpoint, "_digest", lambda *_: "")


def random_numbers_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("metapl.training.loop.set_rng_state", lambda state: None)


def students_optimizer_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TorchUpdate, "load_state_dict", lambda self, state: None)


def average_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Average, "load_state_dict", lambda self, state: None)


def position_not_restored(patch: pytest.MonkeyPatch) -> None:
    """The batches of a resumed fit begin with the first."""
    patch.setattr(_ListFeed, "restore", lambda self, state: None)


def step_left_out(patch: pytest.MonkeyPatch) -> None:
    """A resumed fit goes on with the step after the one that is next."""
    real = FitRun._restore
    patch.setattr(FitRun, "_restore", lambda self, compare: real(self, compare) + 1)


def schedule_begins_again(patch: pytest.MonkeyPatch) -> None:
    """The schedule counts the steps of this call of fit."""
    real, begins = Rates.move, dict[Rates, int]()
    patch.setattr(Rates, "move", lambda self, step: real(self, step - begins.setdefault(self, step)))


def rows_not_cut(patch: pytest.MonkeyPatch) -> None:
    """Rows of steps that were lost stay, and are written once more."""
    patch.setattr(Metrics, "cut", lambda self, phase, step: None)


def worst_kept(patch: pytest.MonkeyPatch) -> None:
    _kept_where(patch, lambda now, before: now <= before)


def first_of_equals_kept(patch: pytest.MonkeyPatch) -> None:
    _kept_where(patch, lambda now, before: now > before)


def _kept_where(patch: pytest.MonkeyPatch, better: Callable[[float, float], bool]) -> None:
    real = Selection.look

    def look(self: Selection, *given: Any) -> dict[str, float]:
        before, self.best = self.best, Best()
        found = real(self, *given)
        if None not in (before.value, self.best.value) and not better(self.best.value, before.value):
            self.best = before
        return found

    patch.setattr(Selection, "look", look)


def validated_as_in_training(patch: pytest.MonkeyPatch) -> None:
    """A look at the validation data drops units, and moves the statistics."""
    patch.setattr("metapl.metrics.predictions.eval_mode", lambda model: nullcontext())


def excluded_end_taken(patch: pytest.MonkeyPatch) -> None:
    real = Range.holds
    patch.setattr(Range, "holds", lambda self, value: value == self.below or real(self, value))


def arguments_unchecked(patch: pytest.MonkeyPatch) -> None:
    for user in ("trainer", "loss_trainer"):
        patch.setattr(f"metapl.training.{user}.check_arguments", lambda function, given: None)


def requirements_not_held(patch: pytest.MonkeyPatch) -> None:
    """Every mode runs wherever the student lies."""
    patch.setattr("metapl.feedback.compatible._required", lambda mode, steps, problem: {})


def weights_not_compared(patch: pytest.MonkeyPatch) -> None:
    """After the first step, nobody looks whether a pass has moved the weights."""
    patch.setattr(Weights, "check", lambda self, error=None: None)


def subclass_taken_for_the_librarys(patch: pytest.MonkeyPatch) -> None:
    """A method that a class of the user's overrides is taken for that of the class above."""

    def own_code(function: Any) -> bool:
        return buffers.own_code(function) or isinstance(getattr(function, "__self__", None), PseudoLabels)

    for user in ("inner_step", "path", "credit"):
        patch.setattr(f"metapl.feedback.{user}.own_code", own_code)


def same_order_every_epoch(patch: pytest.MonkeyPatch) -> None:
    real = sampler._permutation
    patch.setattr(sampler, "_permutation", lambda size, seed, stream, epoch: real(size, seed, stream, 0))


def pairs_by_rank(patch: pytest.MonkeyPatch) -> None:
    """The best score of one method is compared with the best of the other, whatever their seeds."""
    patch.setattr(statistics, "zip", lambda a, b, strict: zip(sorted(a), sorted(b), strict=strict), raising=False)


def interval_of_one_side(patch: pytest.MonkeyPatch) -> None:
    real = NormalDist.inv_cdf
    patch.setattr(NormalDist, "inv_cdf", lambda self, p: real(self, 2 * p - 1))


def frozen_alias_goes_unwatched(patch: pytest.MonkeyPatch) -> None:
    """Where a frozen parameter shares the memory of a learned one, writes to it are taken for a buffer's."""

    begin = Watch.__init__

    def frozen_last(self: Watch, weights: Weights) -> None:
        begin(self, weights)
        held = sorted(weights.held, key=lambda one: not one[-1])
        self.weights = {memory_of(t): name if learned else t for name, t, *_, learned in held}
        self.weights.pop(None, None)

    patch.setattr(Watch, "__init__", frozen_last)


def compared_without_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """Losses that are compared are taken at weights that require no gradient, which a forward may ask for."""
    real = LocalStudent.loss

    def loss(self: LocalStudent, *given: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(local, "stand_in", lambda t, own: t.detach())
            return real(self, *given)

    patch.setattr(LocalStudent, "loss", loss)


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


FAULTS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        flipped_sign,
        new_minus_old,
        mean_for_sum,
        sum_for_mean,
        student_learns_weak,
        teacher_labels_strong,
        momentum_ignored,
        velocity_forgotten,
        transforms_velocity_forgotten,
        clip_without_derivative,
        statistics_updated_twice,
        teachers_statistics_updated_twice,
        other_dropout_mask,
        generator_not_put_back,
        stale_weights_after_a_difference,
        gradient_before_the_step,
        masks_of_the_teacher,
        replays_from_moved_buffers,
        backward_at_the_old_weights,
        outputs_unchecked,
        slopes_unchecked,
        smoothed_score,
        baseline_with_this_step,
        checkpoint_believed,
        random_numbers_not_restored,
        students_optimizer_not_restored,
        average_not_restored,
        position_not_restored,
        step_left_out,
        schedule_begins_again,
        rows_not_cut,
        worst_kept,
        first_of_equals_kept,
        validated_as_in_training,
        excluded_end_taken,
        arguments_unchecked,
        requirements_not_held,
        weights_not_compared,
        subclass_taken_for_the_librarys,
        same_order_every_epoch,
        pairs_by_rank,
        interval_of_one_side,
        frozen_alias_goes_unwatched,
        compared_without_a_gradient,
        further_fields_left_out,
        fields_taken_for_each_other,
    )
}

FAULTS_AHEAD: dict[str, Plant] = {
    plant.__name__: plant for plant in (state_cotangent_dropped, hessian_dropped, first_step_forgotten)
}
"""Those that show over several student steps."""
