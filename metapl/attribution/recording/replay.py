r"""The steps of a recording once more, forward and back.

Step k of the loop had the micro-batches j, with the factors c_j, whose sum is usually 1:

.. math:: g_k = \nabla_\theta \sum_j c_j \frac1{B_j} \sum_i w_i\, \ell_i(\theta_k), \qquad
          (\theta_{k+1}, s_{k+1}) = U_k(\theta_k, g_k, s_k)

with the clipping in U_k. From λ_K = ∇L(θ_K) the adjoint runs backwards,

.. math:: (\omega_k, \bar\theta_k, \bar s_k) =
          \Big(\frac{\partial U_k}{\partial (g, \theta, s)}\Big)^{\!\top}
          (\lambda_{k+1}, \bar s_{k+1}), \qquad
          \lambda_k = \bar\theta_k + \frac{\partial \langle g_k, \omega_k\rangle}{\partial\theta},
          \qquad h_{k,i} = -\frac{\partial \langle g_k, \omega_k\rangle}{\partial w_i}

Every m-th state is the loop's own. From each the next m steps are taken again, and where they end
is compared with the state that the loop had there. So the rounding of a replay does not grow beyond
m steps, and what the loop did unseen, such as weights that it averaged, is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metapl.attribution.recording.contents import OpenedRecording
from metapl.attribution.recording.first_step import (
    closest_weighting,
    tolerance_of,
    tolerance_of_replay,
    weighted_sum,
    weightings,
)
from metapl.attribution.recording.folder import KeptState
from metapl.attribution.recording.network import Call, precision_of
from metapl.core.keeping import keeping
from metapl.core.replays import ReplayCheck
from metapl.core.walk import States, Walk
from metapl.errors import MetaplError, few, warn
from metapl.execution.batch import Batch
from metapl.execution.numerics import WHOLE, Tree
from metapl.execution.state import RandomState
from metapl.runs.terminal import step_bar
from metapl.updates import Clipped, Update
from metapl.updates.base import OptimizerState
from metapl.updates.smoothing import smoothed_groups

# By how many roundings two norms of the same tensor may differ.
ROUNDINGS_OF_NORM = 8


@dataclass
class Cotangents:
    """The derivatives of an outer loss in the state before a step.

    Attributes:
        params: λ, by name.
        optimizer: of the optimizer's state; None: there are none.
    """

    params: Tree
    optimizer: OptimizerState = None


@dataclass(frozen=True)
class ReplayedStep:
    """A step that was taken again.

    Attributes:
        state: before it.
        gradient: g, before the clipping.
        factors: c_j of its micro-batches.
        losses: the mean loss of each micro-batch, (J,).
        buffers: after it.
    """

    state: KeptState
    gradient: Tree
    factors: Sequence[float]
    losses: Tensor
    buffers: Tree


class RecordedStates(ReplayCheck):
    """Compares with recorded states, relative to the way from the one before them.

    Weights and the optimizer's state count apart. States that are kept in between are not compared.
    """

    def note(self, number: int, params: Tree, optimizer_state: OptimizerState) -> None:
        """Do nothing: the recording has the digests."""

    def sizes(self, number: int) -> Tensor:
        before = max(noted for noted in self.digests if noted < number)
        way = self.digests[number] - self.digests[before]
        lengths: Tensor = torch.linalg.vector_norm(way, dim=1)
        return lengths

    def refusal(self, number: int, error: float) -> str:
        return (
            f"the steps before step {number} were taken again, and lead to a state that differs "
            f"from the recorded one by {error:.1e} of the way there; expected "
            f"{self.tolerance:.1e} at most. The loop did something that was not seen, such as "
            "changing weights between steps, or the steps round otherwise: then replay_tolerance= "
            "with what is allowed, or a smaller states_every."
        )


class Replay:
    """The training of a recording, which can be taken again from its kept states.

    Args:
        recording: its contents.
        tolerance: the greatest difference of a replayed state from a kept one, in the length of the
            way between two kept states; None: that which rounding may cause.
        smoothing: of the adjoint of Adam's steps.

    Attributes:
        check: has the greatest such difference so far.
        state_numbers: of the steps whose states are kept.
    """

    def __init__(
        self, recording: OpenedRecording, tolerance: float | None, smoothing: float
    ) -> None:
        self.recording = recording
        self.rows = recording.rows
        self.network = recording.network
        self.check = RecordedStates(
            tolerance_of_replay(self.network) if tolerance is None else tolerance
        )
        self.smoothing = smoothing
        self._factors: dict[int, list[float]] = {}
        self._held: dict[int, ReplayedStep] = {}
        self._moved_unseen: Tree | None = None
        states = recording.folder.states()
        self.state_numbers = [number for number in states if number <= len(self.rows)]

    # ------------------------------------------------------------------------------------- one step

    def calls(self, number: int) -> list[Call]:
        """Return the calls of the network in a step."""
        row = self.rows[number]
        calls: list[Call] = []
        for numbers, values, names in zip(row.numbers, row.draws, row.training_parts, strict=True):
            draws = None
            if values is not None:
                draws = RandomState(self.network.device, **values)
            parts = self.recording.training_parts if names is None else names
            calls.append(Call(self.recording.data.batch(numbers), draws, frozenset(parts)))
        return calls

    def update_in(self, number: int) -> Update:
        """Return U of a step, with its settings and its clipping."""
        row = self.rows[number]
        update: Update = self.recording.update.with_options(
            smoothed_groups(row.options, self.smoothing)
        )
        if row.clip_norm is None:
            return update
        return Clipped(update, row.clip_norm, WHOLE)

    def factors(self, number: int, state: KeptState, calls: Sequence[Call]) -> list[float]:
        """Return c_j of a step, by the loss that was backpropagated where there is a choice.

        The choice is made at the recorded weights, and kept for trainings with other weights of the
        examples.
        """
        if number in self._factors:
            return self._factors[number]
        row = self.rows[number]
        sizes = [self.network.problem.batch_weight(call.batch) for call in calls]
        candidates: list[list[float]] = []
        recording = self.recording
        # Where losses are equal, as of a head that begins at zero, the gradient of the first step
        # has decided.
        for factors, _ in sorted(
            weightings(sizes, recording.first_sizes),
            key=lambda weighting: weighting.counts_examples != recording.counts_examples,
        ):
            candidates.append([recording.factor * f for f in factors])
        factors = candidates[0]
        if len(candidates) > 1 and not math.isnan(row.loss):
            # Only the sizes of the calls' batches leave a choice, so this pass is rare.
            means = self._losses(state, calls)
            precision = precision_of(self.network)
            factors = [*closest_weighting(candidates, means, row.loss, precision)]
        self._factors[number] = factors
        return factors

    def _losses(self, state: KeptState, calls: Sequence[Call], outer: Batch = None) -> Tensor:
        """Return the mean loss of each call at a state, with the buffers that the one before left.

        Args:
            outer: an outer batch, which the outputs have to fit.
        """
        buffers = state.buffers
        losses = []
        for call in calls:
            result = self.network.gradient(state.params, buffers, call, outer=outer)
            buffers = {**buffers, **result.buffers}
            losses.append(result.loss)
        return torch.stack(losses)

    def gradient(
        self, number: int, state: KeptState, weights: Tensor | None = None
    ) -> ReplayedStep:
        """Return a step without its end.

        Args:
            weights: of all examples, or rows, (N,), or as the problem's; None: 1 each.
        """
        calls = self.calls(number)
        factors = self.factors(number, state, calls)
        gradient: Tree = {}
        buffers = state.buffers
        losses: list[Tensor] = []
        for call, factor, numbers in zip(calls, factors, self.rows[number].numbers, strict=True):
            call_weights = None if weights is None else weights[numbers]
            result = self.network.gradient(state.params, buffers, call, call_weights, factor=factor)
            buffers = {**buffers, **result.buffers}
            losses.append(result.loss)
            for name, g in result.gradient.items():
                gradient[name] = gradient[name] + g if name in gradient else g
        for name in state.params.keys() - gradient.keys() - {*self.rows[number].without_gradient}:
            gradient[name] = torch.zeros_like(state.params[name])
        means = torch.stack(losses)
        if weights is None:
            self._refuse_other_loss(number, factors, means)
        return ReplayedStep(state, gradient, factors, losses=means, buffers=buffers)

    def _refuse_other_loss(self, number: int, factors: Sequence[float], means: Tensor) -> None:
        """Refuse a step whose loss is not the one that the loop has backpropagated in it."""
        recorded = self.rows[number].loss
        if math.isnan(recorded):
            return
        loss = weighted_sum(factors, means)
        size = max(abs(loss), abs(recorded))
        gap = abs(loss - recorded)
        if not gap <= self.check.tolerance * size:
            raise MetaplError(
                f"the loss in step {number} is {loss:.6g}, and {recorded:.6g} was recorded, "
                f"{gap / size:.1g} of it apart; expected the network of the recording with the "
                "hooks that it had (a Trainer removes those of NEFTune), its data, a loop whose "
                "loss is the same multiple of the examples' mean in each step, gradients that "
                "begin at zero in each step, and weights that nothing but its optimizer moves."
            )

    def step(self, number: int, state: KeptState, weights: Tensor | None = None) -> KeptState:
        """Return the state after a step."""
        return self._end_of(number, self.gradient(number, state, weights))

    def _end_of(self, number: int, step: ReplayedStep) -> KeptState:
        before = step.state
        after = self.update_in(number).stepped(before.params, step.gradient, before.optimizer)
        return KeptState(*after, step.buffers)

    def hold(self, number: int, state: KeptState) -> None:
        """Hold the gradient of a step."""
        self._held[number] = self.gradient(number, state)

    def after(self, number: int, state: KeptState | None = None) -> KeptState:
        """Return the state after a step that is held."""
        return self._end_of(number, self._held[number])

    def forget(self, number: int) -> None:
        """Hold a step no longer."""
        del self._held[number]

    def adjoint(self, number: int, end: Cotangents) -> tuple[Cotangents, list[Tensor]]:
        """Return the cotangents before a step that is held, and h of the examples in its calls."""
        replayed_step = self._held[number]
        state = replayed_step.state
        bars = self.update_in(number).vjp(
            state.params, replayed_step.gradient, state.optimizer, end.params, end.optimizer
        )
        params = dict(bars.params)
        feedback: list[Tensor] = []
        buffers = state.buffers
        for call, factor, loss in zip(
            self.calls(number), replayed_step.factors, replayed_step.losses, strict=True
        ):
            w = {name: factor * t for name, t in bars.gradient.items()}
            result = self.network.derivatives(state.params, buffers, call, w)
            buffers = {**buffers, **result.buffers}
            self._refuse_other_pass(number, result.loss, loss)
            for name, t in result.hessian_product.items():
                params[name] = params[name] + t
            feedback.append(-result.in_weights)
        return Cotangents(params, bars.state), feedback

    def _refuse_other_pass(self, number: int, loss: Tensor, first_loss: Tensor) -> None:
        """Refuse a pass for the second derivative whose loss is not that of the first pass."""
        gap = float((loss - first_loss).abs())
        if not gap <= tolerance_of(self.network) * max(1.0, float(first_loss.abs())):
            raise MetaplError(
                f"the loss in step {number} is {float(first_loss):.6g} in a plain pass and "
                f"{float(loss):.6g} in the pass that is differentiated twice, as where fused "
                "attention draws another dropout mask; expected attn_implementation='eager'."
            )

    # ---------------------------------------------------------------------------------------- walks

    def refuse_other_start(self, outer: Batch) -> None:
        """Refuse a network or data whose loss in the first step is not the recorded one.

        Args:
            outer: an outer batch, which is refused where it does not fit the network's outputs.
        """
        state = self.read_state(0)
        calls = self.calls(0)
        factors = self.factors(0, state, calls)
        self._refuse_other_loss(0, factors, self._losses(state, calls, outer))
        # Of networks of any size, of which verification leaves large ones out.
        derivatives, gap = self.network.derivatives_beside_difference(
            state.params, state.buffers, calls[0]
        )
        if not gap <= 1:
            raise MetaplError(
                "the gradient's derivative in the weights of the examples is another one by double "
                f"backward than by a difference, {gap:.1g} times what rounding allows, so the "
                "scores would be wrong. Likely causes: an embedding with scale_grad_by_freq, or a "
                "backward of one's own; expected operations with a second derivative."
            )
        self._warn_of_moved_buffers(state, derivatives.buffers, calls[0])

    def refuse_other_steps(self) -> None:
        """Refuse a network, steps or states by which a later loss is not the recorded one.

        It is looked at from each kept state, so that steps in the place of others are seen before
        the replay. Cost: a forward and a backward pass for each state.
        """
        for number in self.state_numbers[1:]:
            if number < len(self.rows):
                state = self.read_state(number)
                calls = self.calls(number)
                losses = self._losses(state, calls)
                self._refuse_other_loss(number, self.factors(number, state, calls), losses)

    def _warn_of_moved_buffers(self, state: KeptState, buffers_after: Tree, call: Call) -> None:
        """Warn of buffers through which a step acts on later ones, in any modes of the recording.

        Args:
            state: before a call.
            buffers_after: it.
        """
        modes = {call.training_parts}
        for row in self.rows:
            modes |= {frozenset(names) for names in row.training_parts if names is not None}
        buffer_names: dict[str, None] = {}
        for training_parts in modes:
            call_in_modes = Call(call.batch, call.draws, training_parts)
            names = self.network.moved_buffers_read(
                state.params, state.buffers, buffers_after, call_in_modes
            )
            buffer_names.update(dict.fromkeys(names))
        if buffer_names:
            warn(
                f"the losses read {few([*buffer_names], 3)}, which the passes before have moved. A "
                "derivative counts them as constants, as torch does in each pass, so that scores "
                "leave out what acts by them.",
            )

    def last_state(self, *, progress: bool) -> KeptState:
        """Return the state after all steps, which is computed where it was not kept."""
        number = self.state_numbers[-1]
        kept_state = self.read_state(number)
        state = kept_state
        steps = range(number, len(self.rows))
        with step_bar(progress and bool(steps), len(steps), "steps") as advance:
            for step in steps:
                state = self.step(step, state)
                advance()
        return self._compared_end(state, kept_state)

    def trained(self, weights: Tensor, steps: int | None = None) -> KeptState:
        """Return the state after some steps with other weights of the examples; None: after all."""
        state = self.read_state(0)
        for number in range(len(self.rows) if steps is None else steps):
            state = self.step(number, state, weights)
        return state

    def moved_unseen(self, end: KeptState) -> Tree:
        """Return by what passes that led to no step, and are not recorded, have moved buffers.

        Cost: a training, the first time, of a network with buffers.

        Args:
            end: the state after the loop.
        """
        if self._moved_unseen is None:
            self._moved_unseen = {}
            moving = [name for name, t in end.buffers.items() if t.is_floating_point()]
            if moving:
                ones = torch.ones(len(self.recording.example_numbers))
                seen = self.trained(ones).buffers
                self._moved_unseen = {name: end.buffers[name] - seen[name] for name in moving}
        return self._moved_unseen

    def backwards(self, *, progress: bool) -> Iterator[int]:
        """Yield the steps from the last to the first, each held.

        Each is taken again from a kept state. Where the steps from one kept state to the next lead
        is compared with that one. Memory does not always hold all states in between; then a few are
        kept, and the blocks between them are taken once more.
        """
        ends = [*self.state_numbers[1:], len(self.rows)]
        segments = [(a, b) for a, b in zip(self.state_numbers, ends, strict=True) if a < b]
        with step_bar(progress, len(self.rows), "steps back") as advance:
            for begin, end in reversed(segments):
                state = self.read_state(begin)
                states = States(None)
                states.keep(begin, state)
                length = end - begin
                walk = Walk(self, states, (length, *self._spacings(length, state)), self.check)
                for number in walk.back(0, begin, end, *walk.spacings):
                    yield number
                    advance()

    def _spacings(self, steps: int, state: KeptState) -> tuple[int, ...]:
        """Return which states of so many steps are kept in memory; none: all steps are held."""
        if steps == 1:
            return ()
        weights = sum(t.nbytes for t in state.params.values())
        # The gradient of a step is held with its state, whose size is that of the weights.
        size = 2 * weights + self.recording.update.state_bytes()
        return keeping(steps, size, self.network.device, spacing=None, on=None).spacings

    def read_state(self, number: int) -> KeptState:
        """Return a kept state; refuse one that does not have its digest."""
        state, digest = self.recording.folder.read_state(number, self.network.device)
        if not torch.equal(state.digest(), digest):
            raise MetaplError(
                f"the state before step {number} in {self.recording.folder.path} is not the one "
                "that was recorded; expected the folder as the recording left it."
            )
        self.check.digests[number] = digest
        return state

    def _compared_end(self, state: KeptState, state_before: KeptState) -> KeptState:
        """Compare the end of the training with what is known of it where it was not kept.

        Args:
            state_before: the last kept state.

        Returns: the state, with the buffers of the end: passes that led to no step move some too.
        """
        end = self.recording.folder.read_end(len(self.rows), self.network.device)
        if end is None:
            return state
        params = state.params
        differences: list[Tensor] = []
        for name, weight in end.weights.items():
            way = torch.linalg.vector_norm(weight - state_before.params[name])
            differences.append(share_of(torch.linalg.vector_norm(params[name] - weight), way))
        for name, norm in end.norms.items():
            way = torch.linalg.vector_norm(params[name] - state_before.params[name])
            # A norm is rounded in its own size, which may be far larger than the way.
            rounding = ROUNDINGS_OF_NORM * torch.finfo(norm.dtype).eps * norm
            gap = (torch.linalg.vector_norm(params[name]) - norm).abs() - rounding
            differences.append(share_of(gap.clamp(min=0), way))
        if differences:
            self.check.refuse(len(self.rows), float(torch.stack(differences).max()))
        return state._replace(buffers={**state.buffers, **end.buffers})


def share_of(difference: Tensor, way: Tensor) -> Tensor:
    """Return a difference as a share of the way, or as it is where there is none."""
    return torch.where(way > 0, difference / way, difference).double()


def feedback_of(
    replay: Replay, ends: Sequence[Cotangents], *, progress: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return the numbers of the examples in each call, (B,), and h on them, (M, B, ...).

    Args:
        ends: the cotangents after all steps, by outer loss.
    """
    bars = [*ends]
    feedback: list[tuple[Tensor, Tensor]] = []
    for number in replay.backwards(progress=progress):
        by_loss: list[list[Tensor]] = []
        for place, bar in enumerate(bars):
            bars[place], h = replay.adjoint(number, bar)
            by_loss.append(h)
        for call, numbers in enumerate(replay.rows[number].numbers):
            feedback.append((numbers, torch.stack([h[call] for h in by_loss]).cpu()))
    return feedback


def order_of(by_step: Sequence[Tensor]) -> Tensor:
    """Return the examples of each step, (K, B), with −1 behind those of a smaller step."""
    return torch.nn.utils.rnn.pad_sequence([*by_step], batch_first=True, padding_value=-1)
