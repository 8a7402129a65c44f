r"""A training on weighted examples, as a record and a replay.

The record is where it begins, the examples of each step and the optimizer's settings there. A
replay takes the steps with other weights of the examples, which are the problem's signal:

.. math:: (\theta_{k+1}, s_{k+1}) = U\Big(\theta_k,\ \nabla_\theta \frac1B
          \sum_{i \in I_k} w_i\, \ell_i(\theta_k),\ s_k\Big)

:mod:`metapl.attribution.attribute` differentiates the training in these weights, and
:mod:`metapl.attribution.removals` takes many replays at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metapl.attribution.examples import examples_of
from metapl.core.lesson import Lesson
from metapl.engines.eager import EagerEngine
from metapl.errors import MetaplError
from metapl.execution.batch import Batch, map_tensors
from metapl.execution.checks import generator_of, unexpected
from metapl.execution.layout import layouts
from metapl.execution.numerics import Tree, deterministic, wide
from metapl.execution.ranks import Ranks
from metapl.execution.shards import local
from metapl.execution.state import RandomState, copies_of_results, replayed, with_contents_of
from metapl.problems.base import BilevelProblem, Params, Random, Signal, sum_and_weight
from metapl.problems.doubtful import EqualWeights
from metapl.problems.sequences import NextToken
from metapl.runs.terminal import step_bar
from metapl.updates import (
    Clipped,
    Settings,
    Update,
    as_one_optimizer,
    options_by_step,
    options_of,
    update_of,
)
from metapl.updates.schedules import StepOptions

# The problem where none is given: always the same object.
EQUAL_WEIGHTS = EqualWeights()


@dataclass(frozen=True)
class WithWeights(BilevelProblem):
    """A problem whose batches come as (weights, batch), and whose signal these weights are.

    Args:
        problem: whose losses are weighted.
        factor: that multiplies the loss.
    """

    problem: EqualWeights
    factor: float = 1.0

    def student_input(self, batch: Batch) -> Any:
        return self.problem.student_input(batch[1])

    def signal(
        self, teacher: nn.Module, batch: Batch, student_outputs: Tensor, *, generator: Random
    ) -> Signal:
        return self.ask(batch, student_outputs)

    def check(self, outputs: Tensor, outer: Batch, inner: Batch) -> None:
        """Refuse wrong labels, where there is an outer batch to compare with."""
        if outer is not None:
            self.problem.check(outputs, outer, inner[1])

    def ask(self, batch: Batch, outputs: Tensor | None) -> Signal:
        """Return the weights of a batch as a pass asks for them.

        They are (B,), or in the problem's shape, with more parts where examples of another batch
        have them; None: 1 each. Weights of examples are those of all their parts.

        Args:
            outputs: of the student, (B, ...).
        """
        assert outputs is not None, "it is asked about outputs"
        weights, _ = batch
        shape = self.problem.weight_shape(outputs)
        if weights is None:
            return Signal(outputs.new_ones(shape))
        if weights.ndim > 1:
            weights = weights[:, : shape[1]]
        further_dimensions = [1] * (len(shape) - weights.ndim)
        weights = weights.to(outputs).reshape(*weights.shape, *further_dimensions)
        return Signal(weights.expand(shape))

    def inner_loss(
        self, outputs: Tensor, signal: Signal, batch: Batch, params: Params | None = None
    ) -> Tensor:
        losses = self.problem.inner_loss(outputs, signal, batch[1], params)
        return losses if self.factor == 1.0 else self.factor * losses

    def outer_loss(self, outputs: Tensor, batch: Batch) -> Any:
        return self.problem.outer_loss(outputs, batch)


@dataclass(frozen=True, eq=False)
class BatchesOfSteps(Sequence[Any]):
    """The batches of a training's steps as a sequence, which reads each when it is asked for."""

    training: WeightedTraining

    def __len__(self) -> int:
        return len(self.training.order)

    def __getitem__(self, number: Any) -> Batch:
        return self.training.batch_of_step(number)


class WeightedTraining:
    """A training on weighted examples, which can be repeated with other weights.

    Args:
        student, ..., clip_norm: as for :func:`attribute`.

    Attributes:
        order: the examples of each step, (K, B), in shuffled passes.
        outer_batch: all outer examples, as one batch.
        outer_examples: M.
        can_be_repeated: whether the student can be copied, which a sharded one cannot.
        begun: the student and its optimizer at the beginning, copied; of one that can be repeated.
        start: the generators there.
        settings: of the optimizer in each step, as they were given.
        options_of_steps: those of its param groups in each step.
        is_in_autocast: whether the passes run under autocast.

    Raises: :class:`metapl.MetaplError` for other data, problems and numbers.
    """

    def __init__(
        self,
        student: nn.Module,
        train: Any,
        outer: Any,
        *,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        steps: int,
        batch_size: int,
        settings: Settings | None,
        generator: torch.Generator | None,
        problem: BilevelProblem | None,
        clip_norm: float | None,
    ) -> None:
        first = next(student.parameters())
        _, self.layout, _ = layouts(None, student)
        self.data = examples_of(train, "train", first)
        judged = examples_of(outer, "outer", first)
        self.optimizer: Any = as_one_optimizer(optimizer, "optimizer")
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            expected = "SGD, Adam, AdamW or Muon of torch.optim, or a tuple of them"
            raise unexpected("optimizer is", optimizer, expected)
        self.problem = with_weights_of_one(problem or EQUAL_WEIGHTS)
        self.clip_norm = clip_norm
        generator_of(generator, torch.device("cpu"), "the order of the examples is drawn on")
        self.order = shuffled_batches(
            len(self.data), steps, batch_size, generator or torch.Generator().manual_seed(0)
        )
        # Indexed once for all steps, each of which is read twice.
        self._numbers_of_steps = self.order.unbind()
        self.outer_examples = len(judged)
        self.outer_batch = judged[torch.arange(len(judged))]
        self._refuse_unequal_shares("batch_size", batch_size)
        self._refuse_unequal_shares("the number of outer examples", self.outer_examples)
        self.begun: tuple[nn.Module, torch.optim.Optimizer]
        self.can_be_repeated = not self.layout.is_sharded
        if self.can_be_repeated:
            self.begun = copied_without_graphs(self.layout.network, self.optimizer)
        self.start = RandomState.now(first.device)
        self.settings = settings
        self.options_of_steps: Sequence[StepOptions] = [options_of(self.optimizer)] * steps
        if settings is not None:
            self.options_of_steps = options_by_step(self.optimizer, settings, steps)
        # Repeated in the precision of the scores, wherever it is called.
        device_type = first.device.type
        self.is_in_autocast = torch.is_autocast_enabled(device_type)
        self._autocast = partial(
            torch.autocast,
            device_type,
            dtype=torch.get_autocast_dtype(device_type),
            enabled=self.is_in_autocast,
        )

    def _refuse_unequal_shares(self, name: str, count: int) -> None:
        ranks = self.layout.ranks.size
        if count % ranks:
            raise MetaplError(
                f"{name} is {count}; expected a multiple of {ranks}, the ranks that share a batch."
            )

    def batch(self, numbers: Tensor) -> Batch:
        """Return a batch of training examples as the problem reads it.

        (inputs, labels), unless it says otherwise.
        """
        return self.problem.labeled_batch(self.data[numbers], "train")

    def batch_of_step(self, number: int) -> Batch:
        """Return this rank's rows of the batch of a step."""
        return self.batch(self.layout.ranks.own_rows(self._numbers_of_steps[number]))

    @property
    def has_constant_batches(self) -> bool:
        """Whether the batch of a step is the same whenever it is read.

        It is where the examples are, and where the problem adds no draws of its own, as a
        ``labeled_batch`` of a user's may.
        """
        without_draws = (EqualWeights.labeled_batch, NextToken.labeled_batch)
        return self.data.are_constant and type(self.problem).labeled_batch in without_draws

    def summed(self, feedback: Sequence[Tensor]) -> Tensor:
        """Return the sum of each example's feedback over the steps, (M, N, ...).

        Args:
            feedback: h of each step, on the weights of this rank's rows, (M, B, ...).
        """
        ranks = self.layout.ranks
        numbers_by_step = map(ranks.own_rows, self.order.to(self.start.device))
        like = wide(local(next(self.layout.network.parameters())).new_zeros(0))
        by_step = [*zip(numbers_by_step, feedback, strict=True)]
        return ranks.sum(summed_scores(by_step, len(self.data), like))

    def trained_along(
        self, h: float, v: Tensor | None, steps: int, *, progress: bool
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return the weights of three trainings as vectors, and their outer losses, (3,).

        The weights of the examples are 1, 1 + h v and 1 + 2 h v.

        Args:
            v: as ``direction`` of :func:`metasmoothness`.
        """
        losses = list[Tensor]()

        def train_with(weights: Tensor) -> Mapping[str, Tensor]:
            params, (loss,) = self.repeated(weights, [self.problem], steps)
            losses.append(loss)
            return params

        thetas = thetas_along(train_with, len(self.data), h=h, v=v, progress=progress)
        return thetas, torch.stack(losses)

    def repeated(
        self, weights: Tensor, judges: Sequence[BilevelProblem], steps: int | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Train again with weights of the examples, in the student's own steps.

        Args:
            weights: (N,), or as the problem's.
            judges: the problems whose outer losses are taken.
            steps: how many of the steps; None: all.

        Returns: the trained weights by name, and the outer losses, (M,).
        """
        if not self.can_be_repeated:
            raise MetaplError(
                "the student is sharded, and is trained again on a copy; expected one that is not."
            )
        network, optimizer = copy.deepcopy(self.begun)
        student = EagerEngine(replace(self.layout, network=network))
        rule: Update = update_of(optimizer, student.parameters)
        if self.clip_norm is not None:
            rule = Clipped(rule, self.clip_norm)
        with (
            # A loss may read ``student.parameters()`` by a closure, which has to find those of this
            # training.
            with_contents_of(network, self.layout.network),
            replayed(self.start),
            torch.enable_grad(),
            self._autocast(),
            deterministic(self.start.device),
        ):
            for numbers, options in zip(
                self.order[:steps], self.options_of_steps[:steps], strict=True
            ):
                for group, own in zip(optimizer.param_groups, options, strict=False):
                    group.update(own)
                self._take_step(student, rule, weights, numbers)
            # Of weights before the last step.
            torch.clear_autocast_cache()
            losses = self.outer_losses(network, judges)
        return {name: p.detach() for name, p in student.parameters.items()}, losses

    def _take_step(
        self, student: EagerEngine, rule: Update, weights: Tensor, numbers: Tensor
    ) -> None:
        """Take one step of a repeated training, on the examples with these numbers."""
        rule.take_differentiated_step(student.parameters, self.gradient(student, weights, numbers))

    def gradient(self, student: EagerEngine, weights: Tensor, numbers: Tensor) -> Tree:
        """Return the gradient of the examples with these numbers, where the student is now."""
        problem = WithWeights(self.problem)
        own_numbers = self.layout.ranks.own_rows(numbers)
        lesson = Lesson(problem, (weights[own_numbers], self.batch(own_numbers)), outer_batch=None)
        # Of weights before the step.
        torch.clear_autocast_cache()
        student.begin()
        # No pass runs again, so that frozen weights and buffers are not copied.
        student.slots.state = student.slots.snapshot(copies=False)
        return student.descend(student.params, lesson, problem.ask).gradient

    def outer_losses(self, network: nn.Module, judges: Sequence[BilevelProblem]) -> Tensor:
        """Return the outer losses of a trained network by these problems, (M,)."""
        ranks = self.layout.ranks
        batch = self.problem.outer_batch(map_tensors(ranks.own_rows, self.outer_batch))
        # With the dropout masks of the outer loss that was differentiated.
        with torch.no_grad(), replayed(RandomState.now(self.start.device).branch()):
            outputs = wide(network(self.problem.outer_input(batch)))
            sums_and_weights = list[Tensor]()
            for judge in judges:
                total, weight = sum_and_weight(judge.outer_loss(outputs, batch))
                sums_and_weights.append(torch.stack([total, torch.as_tensor(weight).to(total)]))
            totals, counts = ranks.mean(torch.stack(sums_and_weights)).unbind(1)
        return totals / counts


def thetas_along(
    train_with: Callable[[Tensor], Mapping[str, Tensor]],
    examples: int,
    *,
    h: float,
    v: Tensor | None,
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of three trainings as vectors, of examples that weigh 1 + k h v.

    Args:
        train_with: returns the trained weights by name, from the weights of the examples.
        examples: N.
        v: as ``direction`` of :func:`metasmoothness`.
    """
    if v is None:
        v = torch.randn(examples, generator=torch.Generator().manual_seed(0))
    thetas = list[Tensor]()
    with step_bar(progress, 3, "trainings") as advance:
        for number in range(3):
            params = train_with(1 + number * h * v)
            thetas.append(torch.cat([t.flatten() for t in params.values()]))
            advance()
    theta_0, theta_h, theta_2h = thetas
    return theta_0, theta_h, theta_2h


def summed_scores(by_step: Sequence[tuple[Tensor, Tensor]], examples: int, like: Tensor) -> Tensor:
    """Return the sum of each example's feedback over the steps, (M, N, ...).

    Scores of parts, such as tokens, are as many as the longest example of a batch has.

    Args:
        by_step: the numbers of the examples, (B,), and h on them, (M, B, ...).
        examples: N.
        like: of the type and on the device of the scores.
    """
    _, first = by_step[0]
    parts: tuple[int, ...] = first.shape[2:]
    if parts:
        parts = (max(h.shape[2] for _, h in by_step), *parts[1:])
    scores = like.new_zeros(len(first), examples, *parts)
    for numbers, h in by_step:
        target = scores[:, :, : h.shape[2]] if parts else scores
        target.index_add_(1, numbers, h.to(scores))
    return scores


def with_weights_of_one(problem: BilevelProblem) -> EqualWeights:
    """Return a problem whose signal is weights of 1, and refuse any other.

    A score is a derivative in weights that are 1.
    """
    if not isinstance(problem, EqualWeights) or type(problem).signal is not EqualWeights.signal:
        raise MetaplError(
            f"problem is {type(problem).__name__}; expected an EqualWeights with its signal."
        )
    return problem


def shuffled_batches(
    examples: int, steps: int, batch_size: int, generator: torch.Generator
) -> Tensor:
    """Return the numbers of the examples of each step, (K, B), in shuffled passes over all."""
    count = steps * batch_size
    passes = math.ceil(count / examples)
    numbers = [torch.randperm(examples, generator=generator) for _ in range(passes)]
    return torch.cat(numbers)[:count].view(steps, batch_size)


def copied_without_graphs(
    network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a network and its optimizer, copied together.

    What a hook or a forward has left in a module, such as an auxiliary loss, may have a graph,
    which the copy has not.
    """
    return copy.deepcopy((network, optimizer), dict(copies_of_results(network)))


def judged_by_example(problem: BilevelProblem, number: int, ranks: Ranks) -> BilevelProblem:
    """Return a problem as it is judged by one outer example.

    The network sees them all, as for the whole outer loss.
    """
    judge = copy.copy(problem)

    def outer_loss(outputs: Tensor, batch: Batch) -> Any:
        place = number - ranks.rank * len(outputs)
        if not 0 <= place < len(outputs):
            # Another rank has it.
            return 0 * outputs.sum(), 0.0
        row = slice(place, place + 1)
        return problem.outer_loss(
            outputs[row], map_tensors(lambda t: t[row] if t.ndim else t, batch)
        )

    # Problems are frozen values.
    object.__setattr__(judge, "outer_loss", outer_loss)
    return judge


def judges_of(problem: BilevelProblem, examples: int, ranks: Ranks) -> list[BilevelProblem]:
    """Return a problem as it is judged by each of so many outer examples."""
    return [judged_by_example(problem, number, ranks) for number in range(examples)]
