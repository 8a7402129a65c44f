r"""Whether scores will predict retraining, estimated before the whole attribution is computed.

A score is a derivative through a training of K steps, and a removal is not a small change. Where
the two part, it is known only after trainings without the examples. :func:`reliability` estimates
the rank correlation that they would show, from measurements that need no attribution of the whole
training. From top to bottom: the measurements, each a function; the regression on them, whose
coefficients are in :mod:`metapl.training.calibration`; and the call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from metapl.execution.batch import map_tensors
from metapl.execution.numerics import HALF, deterministic, wide
from metapl.execution.state import RandomState, Slots, replayed, trainable, with_contents_of
from metapl.feedback import Forward
from metapl.feedback.lookahead import Lookahead
from metapl.training.attribution import (
    WeightedTraining,
    agreement_of_signs,
    copied_without_graphs,
)
from metapl.training.hypergradient import hypergradient
from metapl.training.retraining import rank_correlations
from metapl.updates import Settings, Update

PROBES = 20
"""At how many steps the gradient is measured before and after the step."""

PERTURBATION = 0.1
"""How far the examples' weights move along a standard normal direction, as in metasmoothness.

The weights of N examples move by 0.1 √N, which is as far as a removal of 1 % moves them.
"""


FIRST_STEPS = 50
"""The most steps of the first tenth that are measured, as for the warning of attribute."""


def count_of_first_steps(steps: int) -> int:
    """Return how many of the first steps are measured: a tenth, 50 at most, one at least."""
    return max(1, min(steps // 10, FIRST_STEPS))


# ------------------------------------------------------------------------------ smooth first steps


def smoothness_of_first_steps(training: WeightedTraining, steps: int) -> tuple[float, float]:
    r"""Return the metasmoothness Ŝ of the first steps, and how much their weights bend.

    Of three trainings with the weights 1, 1 + h v and 1 + 2 h v of the examples, the bend is

    .. math:: \frac{\|\theta_{2h} - 2 \theta_h + \theta_0\|}{\|\theta_{2h} - \theta_0\|}

    which is 0 of a training that is linear in the weights, of the order of h where it is smooth,
    and near 1 where θ_h and θ_2h have nothing to do with one another.

    Cost: three plain trainings of these steps.
    """
    (theta_0, theta_h, theta_2h), _ = training.trained_along(
        PERTURBATION, None, steps, progress=False
    )
    agreement, _ = agreement_of_signs(theta_0, theta_h, theta_2h)
    return agreement, bend_of(theta_0, theta_h, theta_2h)


def bend_of(theta_0: Tensor, theta_h: Tensor, theta_2h: Tensor) -> float:
    """Return the size of the second difference over that of the whole difference."""
    first, second, third = theta_0.double(), theta_h.double(), theta_2h.double()
    moved = float((third - first).norm())
    bent = float((third - 2 * second + first).norm())
    return bent / moved if moved else math.nan


# ---------------------------------------------------------------------------- curvature of the path


class ProbedTraining(WeightedTraining):
    """A training that measures at some of its steps how much a step changes its own gradient.

    Attributes:
        changes: ‖∇ℓ_k(θ_{k+1}) − ∇ℓ_k(θ_k)‖ / ‖∇ℓ_k(θ_k)‖ of each probed step so far, where ℓ_k is
            the mean loss of the batch of step k, with the same dropout masks.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.changes = list[float]()
        self._step = 0
        self._probed = probed_steps(len(self.order))

    def _take_step(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        rule: Update,
        weights: Tensor,
        numbers: Tensor,
    ) -> None:
        is_probed = self._step in self._probed
        self._step += 1
        if not is_probed:
            super()._take_step(network, optimizer, rule, weights, numbers)
            return
        start = RandomState.now(self.start.device)
        gradient = self._gradient(network, weights, numbers, start)
        super()._take_step(network, optimizer, rule, weights, numbers)
        gradient_after = self._gradient(network, weights, numbers, start)
        size = float(gradient.norm())
        change = float((gradient_after - gradient).norm())
        self.changes.append(change / size if size else 0.0)

    def _gradient(
        self, network: nn.Module, weights: Tensor, numbers: Tensor, start: RandomState
    ) -> Tensor:
        """Return the gradient of the batch's mean loss as a vector, and leave no trace."""
        state = Slots(network).snapshot()
        # Of weights before the last step.
        torch.clear_autocast_cache()
        with replayed(start):
            loss = self.mean_loss(network, weights, numbers)
            parameters = [*trainable(network).values()]
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        state.restore()
        return torch.cat([wide(gradient).flatten().double() for gradient in gradients])


def probed_steps(steps: int) -> set[int]:
    """Return the numbers of at most :data:`PROBES` steps, evenly spread, the last one among them.

    >>> sorted(probed_steps(5)), len(probed_steps(500)), max(probed_steps(500))
    ([0, 1, 2, 3, 4], 20, 499)
    """
    count = min(steps, PROBES)
    return {(number + 1) * steps // count - 1 for number in range(count)}


def path_curvature(training: ProbedTraining) -> float:
    r"""Return how much the steps of a whole training change their own gradients, in all.

    .. math:: C = \frac{K}{|P|} \sum_{k \in P}
              \frac{\|\nabla\ell_k(\theta_{k+1}) - \nabla\ell_k(\theta_k)\|}
                   {\|\nabla\ell_k(\theta_k)\|}

    Of plain gradient descent at the rate η on a loss with the Hessian H it is near the sum over the
    steps of η ‖H g‖ / ‖g‖: rate times curvature, times the length of the training. It has no unit,
    and holds for every optimizer.

    Cost: a plain training, and two gradients for each of 20 steps, P.

    Source: that an error of first order grows with rate and length, and can be estimated along the
    path without retraining, is the finding of Deng et al. (2026), arXiv 2605.18814. The estimate
    is another one.
    """
    training.repeated(torch.ones(len(training.data)), [training.problem])
    return curvature_of(training.changes, len(training.order))


def curvature_of(changes: Sequence[float], steps: int) -> float:
    """Return C from the relative changes of the gradient in some of the steps."""
    return steps * sum(changes) / len(changes)


# ------------------------------------------------------------------------ agreement of first scores


def scores_of_first_steps(
    training: WeightedTraining,
    order: Tensor,
    settings: Settings | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return what each example does to the outer loss after the first steps alone, (N,).

    Args:
        order: the examples of these steps, (k, B).
        settings: of the optimizer in each step of the whole training.
        dtype: the type of weights and data, without autocast; None: as they are.

    Cost: the attribution of these steps.
    """
    network, optimizer = copied_without_graphs(*training.begun)
    if dtype is not None:
        network.to(dtype)
        # This casts what the optimizer holds.
        optimizer.load_state_dict(optimizer.state_dict())

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if dtype is not None and t.is_floating_point() else t

    first_settings = None
    if settings is not None:
        first_settings = {name: first_rows(values, len(order)) for name, values in settings.items()}
    device_type = training.start.device.type
    autocast: AbstractContextManager[object] = nullcontext()
    if dtype is not None:
        autocast = torch.autocast(device_type, enabled=False)
    with (
        with_contents_of(network, training.layout.network),
        replayed(training.start),
        autocast,
        deterministic(training.start.device),
    ):
        result = hypergradient(
            None,
            network,
            outer=map_tensors(cast, training.outer_batch),
            inner=Lookahead(
                lambda number: map_tensors(cast, training.batch(order[number])),
                steps=len(order),
                settings=first_settings,
            ),
            mode=Forward(),
            problem=training.problem,
            inner_optimizer=optimizer,
            clip_norm=training.clip_norm,
        )
    scores = torch.zeros(len(training.data), dtype=torch.float64)
    for numbers, feedback in zip(order, result.feedback, strict=True):
        by_example = feedback.detach().double().cpu().reshape(len(numbers), -1).sum(1)
        scores.index_add_(0, numbers.cpu(), by_example)
    return scores


def first_rows(values: Tensor | Sequence[Tensor], steps: int) -> Tensor | list[Tensor]:
    """Return the settings of the first steps, of one tensor or of a tensor for each group."""
    if isinstance(values, Tensor):
        return values[:steps]
    return [value[:steps] for value in values]


def other_precision(training: WeightedTraining) -> torch.dtype:
    """Return the precision that scores are compared in.

    It is the next wider one: float32 of a student in half precision or under autocast, and float64
    of one in float32. Of one in float64 it is float32.
    """
    dtype = next(iter(trainable(training.layout.network).values())).dtype
    if dtype in HALF or training.is_in_autocast or dtype == torch.float64:
        return torch.float32
    return torch.float64


def rank_agreement(first: Tensor, second: Tensor, drawn: Tensor) -> float:
    """Return Spearman's correlation between two lists of scores, over the examples ``drawn``.

    NaN where fewer than three were drawn, or where all scores of a list are equal.
    """
    if int(drawn.sum()) < 3:
        return math.nan
    rows = (first[drawn][None].numpy(), second[drawn][None].numpy())
    return float(rank_correlations(*rows)[0])


def drawn_in(order: Tensor, examples: int) -> Tensor:
    """Return which examples some step has drawn, as booleans."""
    is_drawn = torch.zeros(examples, dtype=torch.bool)
    is_drawn[order.cpu().flatten()] = True
    return is_drawn
