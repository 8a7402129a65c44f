r"""Trainings without some of the examples, many of them at once, and how well they were predicted.

A training without the examples R is the training on all of them with w_i = 0 for i in R. A batch
that loses an example keeps its size B below the sum, as in a single training:

.. math:: \theta_{k+1} = U\Big(\theta_k,\ \nabla_\theta \frac1B
          \sum_{i \in I_k} w_i\, \ell_i(\theta_k)\Big)

All trainings begin with the same weights, and have the same batches, settings and dropout masks.
They differ in w alone, so that one step of many is :func:`torch.func.vmap` of one step over θ, the
optimizer's state, the buffers and w. :class:`StackedTrainings` takes such steps.

:func:`datamodeling_score` compares what was predicted with what the trainings say.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.attribution.weighted import WeightedTraining, WithWeights
from metapl.core.keeping import SHARE_OF_MEMORY, free_bytes
from metapl.errors import MetaplError, reason_of, warn
from metapl.execution.batch import Batch
from metapl.execution.numerics import HALF, Tree, as_real, deterministic, no_fast_path, wide
from metapl.execution.state import replayed, trainable, with_contents_of
from metapl.functional.adjoint import Carry, Settings, StepInputs, TrainingRules, TrainingStep
from metapl.functional.capture import Captured, Capturing
from metapl.functional.compared_step import at_other_digits, distance
from metapl.functional.comparison import NUDGES
from metapl.functional.state import clipped, constants_of, tensors_of
from metapl.functional.training import first_moving_step, first_state, tensor_settings
from metapl.problems.base import BilevelProblem, enters_input
from metapl.runs.terminal import step_bar
from metapl.updates import TorchUpdate, update_of

COMPILED_FROM = 50_000
"""From so many steps times trainings on a stack is compiled, where nobody says otherwise.

To compile took 8 and 12 s on perceptrons of 64 and 256 hidden units, and was paid for by 40,000 and
29,000 steps times trainings (``benchmarks/retraining.py``).
"""

BYTES_OF_MEMBER = 6
"""How many times its weights a training in a stack holds: the weights, their gradient, two moments
of the optimizer, and what a step makes before the old ones go."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""How far the first steps of a stack may be from a single training's, over how far they lead.

Another dropout mask or another division is far above, and rounding far below: Adam divides a
gradient that is all rounding by itself.
"""

END_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""How far the outer loss of a whole training in a stack may be from the same one alone.

It is relative to the loss, or to 1 if that is more. Perceptrons on digits are 1e-7 apart or less
after 300 steps, also where rates are too high for scores to say anything.
"""

SHARE_OF_CHANGE = 0.01
"""The same, over how far removals lead: where rounding grows, it may be as far as that."""

RESAMPLES = 500
"""How many times a bootstrap draws."""


# ---------------------------------------------------------------------------------------- the score


class DatamodelingScore(NamedTuple):
    r"""How predictions agree with trainings without the examples.

    With L_m(R) the m-th outer loss after a training without the examples R, ρ Spearman's
    correlation over the removed sets, s the scores, and T_m the examples with the highest ones,

    .. math:: \mathrm{LDS} = \frac1M \sum_m
              \rho_R\Big(\sum_{i \in R} s_{mi},\ L_m(R) - L_m(\varnothing)\Big), \qquad
              \mathrm{QLD} = \frac1M \sum_m \big(L_m(T_m) - L_m(\varnothing)\big)

    Attributes:
        spearman, pearson: the correlations; of M outer losses, the means of theirs. The first is
            the linear datamodeling score, LDS.
        predicted, retrained: the changes of the outer loss of R removals, (R,), or (R, M).
        interval: the ends of the 95 % interval of ``spearman``, by the percentiles of a bootstrap
            over the removals, and over the outer losses where there are several. Of a few removals
            it is too narrow: of three it is often one number.
        qld: the query loss difference, in units of the outer loss: the change of the outer loss
            without the share ``top`` of the examples with the highest scores. Of M outer losses,
            the mean of theirs, each without its own. None where no ``top`` was asked for.
        qld_interval: the ends of its 95 % interval, by a bootstrap over M outer losses; None of a
            single one.
        execution: how the trainings were taken, in words.

    Source: LDS: Park et al., "TRAK" (2023), after Ilyas et al., "Datamodels" (2022); QLD: the
    leaderboard of bergson (2026).
    """

    spearman: float
    pearson: float
    predicted: Tensor
    retrained: Tensor
    interval: tuple[float, float] = (math.nan, math.nan)
    qld: float | None = None
    qld_interval: tuple[float, float] | None = None
    execution: str = ""


def datamodeling_score(
    predicted: Tensor,
    retrained: Tensor,
    changes_without_top: Tensor | None = None,
    execution: str = "",
) -> DatamodelingScore:
    """Return how predicted changes of outer losses agree with those of trainings.

    Args:
        predicted, retrained: (R,), or (R, M) of M outer losses; R is three or more.
        changes_without_top: the changes without the highest scores, a scalar or (M,).
        execution: how the trainings were taken.

    Cost: 500 rankings of R numbers for each outer loss.

    >>> changes = torch.tensor([0.1, 0.3, 0.2, 0.5])
    >>> score = datamodeling_score(2 * changes, changes, torch.tensor(0.6))
    >>> round(score.spearman, 4), round(score.pearson, 4), round(score.qld, 4)
    (1.0, 1.0, 0.6)
    """
    predicted_MR = predicted.double().cpu().reshape(len(predicted), -1).T.numpy()
    retrained_MR = retrained.double().cpu().reshape(len(retrained), -1).T.numpy()
    qld = None
    qld_interval = None
    if changes_without_top is not None:
        qld = float(changes_without_top.double().mean())
        if changes_without_top.ndim:
            qld_interval = bootstrap_interval(changes_without_top.double().cpu().numpy())
    return DatamodelingScore(
        spearman=float(rank_correlations(predicted_MR, retrained_MR).mean()),
        pearson=float(correlations(predicted_MR, retrained_MR).mean()),
        predicted=predicted.double().cpu(),
        retrained=retrained.double().cpu(),
        interval=spearman_interval(predicted_MR, retrained_MR),
        qld=qld,
        qld_interval=qld_interval,
        execution=execution,
    )


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of each pair of rows, (M,); NaN of a row of equal numbers."""
    first = first - first.mean(1, keepdims=True)
    second = second - second.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        sizes = np.sqrt((first**2).sum(1) * (second**2).sum(1))
        coefficients: np.ndarray = (first * second).sum(1) / sizes
    return coefficients


def rank_correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each pair of rows, (M,), with mean ranks for equal ones."""
    from scipy.stats import rankdata

    return correlations(rankdata(first, axis=1), rankdata(second, axis=1))


def spearman_interval(predicted_MR: np.ndarray, retrained_MR: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of M rank correlations over R removals.

    A bootstrap draws removals, and of several outer losses these too. A draw of one removal alone
    has no correlation, and is left out.
    """
    losses, removals = predicted_MR.shape
    random = np.random.default_rng(0)
    removals_drawn = random.integers(removals, size=(RESAMPLES, removals))
    losses_drawn = random.integers(losses, size=(RESAMPLES, losses))
    # (M, draws)
    by_loss = np.stack(
        [
            rank_correlations(predicted_R[removals_drawn], retrained_R[removals_drawn])
            for predicted_R, retrained_R in zip(predicted_MR, retrained_MR, strict=True)
        ]
    )
    return percentiles(np.take_along_axis(by_loss, losses_drawn.T, axis=0).mean(0))


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of some values, by a bootstrap over them."""
    random = np.random.default_rng(0)
    drawn = random.integers(len(values), size=(RESAMPLES, len(values)))
    return percentiles(values[drawn].mean(1))


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """Return the 2.5th and the 97.5th percentile of values, without those that are NaN."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


# --------------------------------------------------------------------------------------- the stacks


@dataclass(frozen=True, kw_only=True)
class StackPlan:
    """How the steps of all stacks of a training are taken; fixed before the first one.

    Attributes:
        network: in which the tensors of the members are put, one after another; its own are not
            read.
        rule: of the optimizer, without a clip.
        start: the carry of one training at the beginning, of whose state the buffers alone. The
            members of a stack, S of them, are such carries with a first dimension S.
        frozen: the parameters that are not learned, by name.
        rates: the settings that are tensors, in each step, or once for all of them.
    """

    network: nn.Module
    rule: TorchUpdate
    start: Carry
    frozen: Tree
    rates: Sequence[Settings]

    @classmethod
    def of(cls, training: WeightedTraining) -> StackPlan:
        """Return the plan of a training that is repeated."""
        network, optimizer = copy.deepcopy(training.begun)
        rule: Any = update_of(optimizer, trainable(network))
        options = training.options_of_steps
        # The tensors of the network itself are written to.
        begun, _ = training.begun
        tensors = tensors_of(begun)
        names_of_buffers = {name for name, _ in begun.named_buffers()}
        buffers = {name: t for name, t in tensors.state.items() if name in names_of_buffers}
        return cls(
            network=network,
            rule=rule,
            start=Carry(tensors.params, first_state(options, rule, ()), buffers, teacher_state={}),
            frozen={name: t for name, t in tensors.state.items() if name not in names_of_buffers},
            rates=tensor_settings(
                options,
                rule,
                (),
                is_scheduled=training.settings is not None,
                device=training.start.device,
            ),
        )


class StackedTrainings:
    """Trainings of one student with several weights of its examples, taken in steps together.

    Cost: that of the trainings, without what PyTorch does between operations: of perceptrons whose
    steps take a millisecond, 0.25 to 0.4 of the time alone, and 0.1 to 0.2 once compiled
    (docs/whole-trainings.md). Memory: that of S trainings at once, for S of them in a stack, with
    what S passes hold.

    Args:
        training: what is taken again.
        judges: the problems whose outer losses are taken, M of them.
    """

    def __init__(self, training: WeightedTraining, judges: Sequence[BilevelProblem]) -> None:
        self.training = training
        self.judges = judges
        # The step of a stack, on the eager road and compiled, from when it is first asked for.
        self._steps: dict[bool, Callable[..., Carry]] = {}
        # Which of them were compared with single trainings.
        self._compared: set[bool] = set()

    @cached_property
    def _plan(self) -> StackPlan:
        return StackPlan.of(self.training)

    def why_not(self) -> str:
        """Return what of the training cannot be stacked, for a sentence; "" where all of it can."""
        training = self.training
        if training.layout.kind != "plain" or not training.layout.ranks.alone:
            return "the student is in several processes"
        if any(p.dtype in HALF for p in training.layout.network.parameters()):
            return "the student has weights in half precision"
        if training.is_in_autocast:
            return "the training is under autocast"
        if enters_input(training.problem):
            return "the weights enter the student's input"
        _, optimizer = training.begun
        if not isinstance(update_of(optimizer, trainable(training.begun[0])), TorchUpdate):
            return f"{type(optimizer).__name__} has no rule that can be stacked"
        return ""

    def compare(self, weights: Tensor, *, compile: bool) -> None:
        """Take the first steps of two trainings in a stack, and refuse those that lead elsewhere.

        There are two such steps at least, so that what a step leaves behind is seen in the next:
        buffers, the optimizer's state, and how many random numbers were drawn.

        Args:
            weights: of the examples, of the stack that is to come, (S, N, ...).

        Raises: :class:`metapl.MetaplError`, or whatever the student raises in a stack.
        """
        if compile in self._compared:
            return
        training = self.training
        steps = min(first_moving_step(training.options_of_steps) + 2, len(training.order))
        losses_in_stack, members = self._take(weights, steps, compile=compile)
        alone, losses = training.repeated(weights[0], self.judges, steps)
        network, _ = training.begun
        start = {name: p.detach() for name, p in trainable(network).items()}
        way = max(float(distance(start, alone)), torch.finfo(torch.float64).tiny)
        gaps = {name: float((members.params[name][0] - t).norm()) for name, t in alone.items()}
        gap = math.hypot(*gaps.values()) / way
        allowed = TOLERANCE[wide(losses).dtype]
        if gap > allowed:
            # A gradient that is 0 but for rounding, as of a bias before batch norm, moves a weight
            # by as much as others through Adam. It does so alone, too; the others are compared.
            with at_other_digits(network):
                by_rounding, _ = training.repeated(weights[0], self.judges, steps)
            for name, t in alone.items():
                if gaps[name] <= NUDGES * float((by_rounding[name] - t).norm()):
                    del gaps[name]
            gap = math.hypot(*gaps.values()) / way
        loss_gap = float(((losses_in_stack[0] - losses) / losses.abs().clamp_min(1)).abs().max())
        if not (gap <= allowed and loss_gap <= allowed):
            raise MetaplError(
                f"{steps} steps in a stack lead elsewhere than alone: the weights are {gap:.1g} of "
                f"their way off, and the outer loss {loss_gap:.1g}"
            )
        self._compared.add(compile)

    def losses(
        self, weights: Tensor, *, compile: bool, advance: Callable[[], object] = lambda: None
    ) -> Tensor:
        """Return the outer losses of trainings in one stack, (S, M).

        Args:
            weights: of the examples, (S, N, ...).
            compile: take steps by one compiled graph; it serves stacks of one size.
            advance: is called after each step.
        """
        losses, _ = self._take(weights, len(self.training.order), compile=compile, advance=advance)
        return losses

    def _take(
        self,
        weights: Tensor,
        steps: int,
        *,
        compile: bool,
        advance: Callable[[], object] = lambda: None,
    ) -> tuple[Tensor, Carry]:
        """Return the outer losses after so many steps of a stack, (S, M), and its members."""
        training = self.training
        plan = self._plan
        if compile not in self._steps:
            self._steps[compile] = self._new_step(compile=compile)
        step = self._steps[compile]
        members: Carry = pytree.tree_map(
            lambda t: t.expand(len(weights), *t.shape).clone(), plan.start
        )
        first_parameter = next(iter(plan.start.params.values()))
        weights_of_dtype = weights.to(as_real(wide(first_parameter)).dtype)
        with (
            # A loss may read ``student.parameters()`` by a closure.
            with_contents_of(plan.network, training.layout.network),
            replayed(training.start),
            torch.no_grad(),
            no_fast_path(math=True),
            deterministic(training.start.device),
            Capturing() if compile else nullcontext(),
        ):
            for number, numbers in enumerate(training.order[:steps]):
                members = step(
                    weights_of_dtype[:, numbers],
                    members,
                    plan.frozen,
                    training.batch(numbers),
                    plan.rates[number % len(plan.rates)],
                )
                advance()
            losses = [self._judged(members, place) for place in range(len(weights))]
        return torch.stack(losses), members

    def _judged(self, members: Carry, place: int) -> Tensor:
        """Return the outer losses of one training of a stack, (M,), as of a single training."""
        network = self._plan.network
        for name, p in trainable(network).items():
            p.copy_(members.params[name][place])
        for name, buffer in network.named_buffers():
            buffer.copy_(members.state[name][place])
        return self.training.outer_losses(network, self.judges)

    def _new_step(self, *, compile: bool) -> Callable[..., Carry]:
        """Return one step of a stack as a function of its members, compiled or not."""
        training = self.training
        plan = self._plan
        sources = [*plan.network.modules(), training.problem]
        training_step = TrainingStep(
            TrainingRules(
                teacher=None,
                student=plan.network,
                problem=WithWeights(training.problem),
                update=clipped(plan.rule.without_optimizer(), training.clip_norm),
                constants=constants_of(plan.rule),
                device=training.start.device,
            ),
            sources,
        )

        def step_of_member(
            weights: Tensor, member: Carry, frozen: Tree, batch: Batch, settings: Settings
        ) -> Carry:
            carry = member._replace(state={**frozen, **member.state})
            inputs = StepInputs((weights, batch), None, settings)
            after: Carry = training_step({}, carry, inputs).carry
            return after._replace(state={name: after.state[name] for name in member.state})

        step_of_stack: Callable[..., Carry] = torch.func.vmap(
            step_of_member, in_dims=(0, 0, None, None, None), randomness="same"
        )
        if compile:
            return Captured(step_of_stack, training.start.device, sources)
        return step_of_stack


@dataclass
class Removals:
    """Trainings without sets of examples: in stacks, or one by one where they cannot be stacked.

    Args:
        alone: the outer losses of a single training with weights of the examples.
        stacks: of the same training; None of a recorded one, which its recording takes again.
        at_once: how many trainings a stack has at most.
        compile: whether a stack's steps are compiled; None: from :data:`COMPILED_FROM` on.
        execution: how the last trainings were taken, in words.
    """

    alone: Callable[[Tensor], Tensor]
    stacks: StackedTrainings | None
    at_once: int
    compile: bool | None
    execution: str = "one by one"

    def losses(self, weights: Tensor, outer_loss: Tensor, *, progress: bool) -> Tensor:
        """Return the outer losses of R trainings, (R, ...).

        Stacks take one more training, on all examples, whose outer losses are known.

        Args:
            weights: of the examples, a row for each training, (R, N, ...).
            outer_loss: after the training on all examples, a scalar or (M,).

        Warns: ``UserWarning`` where stacks were asked for and the training cannot be stacked.
        """
        stacks = self.stacks
        at_once = self.at_once
        if stacks is None or not stacks.training.can_be_repeated or at_once == 1:
            if self.compile:
                raise refused_compile("at_once is 1, or the training is a recorded one")
            return self._one_by_one(weights, progress=progress)
        if reason := stacks.why_not():
            return self._one_by_one(weights, progress=progress, reason=reason)
        student = stacks.training.layout.network
        at_once = most_at_once(student, at_once, copies=BYTES_OF_MEMBER)
        if at_once == 1:
            reason = "half of the free memory holds no two of them"
            return self._one_by_one(weights, progress=progress, reason=reason)

        steps = len(stacks.training.order)
        compiles = self.compile
        if compiles is None:
            compiles = steps * len(weights) >= COMPILED_FROM
        # The second row, so that it is in the first stack, and the first training is a removal.
        all_examples = torch.ones_like(weights[:1])
        rows_of_stacks = torch.cat([weights[:1], all_examples, weights[1:]])
        # Stacks of equal sizes, for a graph serves one size.
        size = math.ceil(len(rows_of_stacks) / math.ceil(len(rows_of_stacks) / at_once))
        reason = why_refused(stacks, weights[:size], compile=compiles)
        if not reason:
            self.execution = f"in stacks of {size}{', compiled' if compiles else ''}"
        elif compiles and self.compile is None:
            compiles = False
            why_not_compiled = reason
            reason = why_refused(stacks, weights[:size], compile=False)
            self.execution = f"in stacks of {size}, not compiled: {why_not_compiled}"
        if reason:
            return self._one_by_one(weights, progress=progress, reason=reason)

        losses = list[Tensor]()
        name = f"steps of {size} trainings at once"
        count = math.ceil(len(rows_of_stacks) / size)
        with step_bar(progress, count * steps, name) as advance:
            for rows in rows_of_stacks.split(size):
                stack = rows
                missing = size - len(rows)
                if missing and compiles:
                    stack = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
                of_stack = stacks.losses(stack, compile=compiles, advance=advance)
                if not losses:
                    reason = why_other_end(of_stack, outer_loss)
                if reason:
                    break
                losses.append(of_stack[: len(rows)])
        if reason:
            return self._one_by_one(weights, progress=progress, reason=reason)
        all_losses = torch.cat(losses)
        of_removals = torch.cat([all_losses[:1], all_losses[2:]])
        return of_removals.reshape(len(weights), *outer_loss.shape)

    def _one_by_one(self, weights: Tensor, *, progress: bool, reason: str = "") -> Tensor:
        if reason and self.compile:
            raise refused_compile(reason)
        self.execution = "one by one"
        if reason:
            self.execution = f"one by one: {reason}"
            warn(
                f"the trainings without examples cannot be stacked, and are taken one by one: "
                f"{reason}. at_once=1 asks for that.",
            )
        losses = list[Tensor]()
        with step_bar(progress, len(weights), "trainings without examples") as advance:
            for row in weights:
                losses.append(self.alone(row))
                advance()
        return torch.stack(losses)


def most_at_once(student: nn.Module, most: int, *, copies: int) -> int:
    """Return how many sets of weights half of the free memory holds at once, ``most`` at most.

    What passes hold is not counted.

    Args:
        copies: how many times the student's weights a set has.
    """
    weights = [p for p in student.parameters() if p.requires_grad]
    bytes_of_set = copies * sum(p.nbytes for p in weights)
    free = free_bytes(weights[0].device) or math.inf
    return max(1, int(min(most, SHARE_OF_MEMORY * free / bytes_of_set)))


def why_refused(stacks: StackedTrainings, weights: Tensor, *, compile: bool) -> str:
    """Return why a stack is not taken, by its first steps; "" where they are those alone."""
    try:
        stacks.compare(weights, compile=compile)
    except Exception as error:
        # A student may raise anything where vmap runs it, and each training alone may be right. An
        # error that it raises alone too is raised there.
        return reason_of(error)
    return ""


def why_other_end(losses: Tensor, outer_loss: Tensor) -> str:
    """Return why the first stack is not taken, by where the training on all examples has led.

    The first steps of a stack may be those alone, and later ones not: a layer that is left out in a
    step at random has no gradient there, and a gradient of zeros in a stack, by which momentum and
    weight decay move it.

    Args:
        losses: of the first stack, (S, M), whose second row is the training on all examples.
        outer_loss: of that training alone, a scalar or (M,).

    Returns: "" where it has led to the same outer losses.
    """
    alone = outer_loss.reshape(-1).to(losses)
    gap = (losses[1] - alone).norm()
    changes = torch.cat([losses[:1], losses[2:]]) - alone
    size_of_change = changes.square().sum(1).mean().sqrt()
    rounding = END_TOLERANCE[losses.dtype] * alone.abs().clamp_min(1).norm()
    allowed = torch.maximum(rounding, SHARE_OF_CHANGE * size_of_change)
    # A training that has led to no number says nothing about stacks.
    if not bool(alone.isfinite().all()) or bool(gap <= allowed):
        return ""
    return (
        f"the training on all examples ends at an outer loss of {float(losses[1].mean()):.6g} in a "
        f"stack and of {float(alone.mean()):.6g} alone, where removals change it by "
        f"{float(size_of_change):.2g}"
    )


def refused_compile(reason: str) -> MetaplError:
    """Return the error about trainings that were to be compiled and cannot be stacked."""
    return MetaplError(
        f"validate was given compile=True, and the trainings cannot be compiled in stacks: "
        f"{reason}; leave compile out."
    )
