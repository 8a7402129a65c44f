"""The first step of a recording: whether the problem's loss and gradient are those of the loop.

A recording is differentiated through the losses ℓ_i that the problem gives. In the first step their
mean is compared with the loss that the loop has backpropagated, and its gradient with ``p.grad``.
What differs is refused there, and not after a night of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, few
from metapl.execution.numerics import WHOLE, Tree
from metapl.problems.base import kind_of
from metapl.training.recording.folder import KeptState
from metapl.training.recording.network import Call, RecordedNetwork
from metapl.updates import TorchUpdate, update_of
from metapl.updates.several import Several


@dataclass(frozen=True)
class SeenStep:
    """What was seen of a step, with all that its gradient is computed from.

    Args:
        state: before the step.
        calls: of the network, one for each micro-batch.
        loss: the sum of the losses that were backpropagated; NaN where none was seen.
        clip_norm: the greatest norm of the gradient; None: it was not clipped.
        gradients: those that the optimizer has used, by name.
        sizes: how many examples each call has.
    """

    state: KeptState
    calls: Sequence[Call]
    loss: float
    clip_norm: float | None
    gradients: Tree
    sizes: Sequence[int]


def tolerance_of(network: RecordedNetwork) -> float:
    """Return the relative difference that rounding may cause: the root of the type's precision."""
    dtypes = [p.dtype for p in network.parameters.values()]
    if network.autocast is not None:
        dtypes.append(network.autocast)
    return math.sqrt(max(torch.finfo(dtype).eps for dtype in dtypes))


def weightings(sizes: Sequence[int], accumulation: int) -> list[list[float]]:
    """Return the factors that loops give to the mean losses of a step's micro-batches.

    The mean over all examples, the mean over the micro-batches, and the sum over the accumulated
    number of micro-batches, which the last step of an epoch may not have. Usually they are equal.

    Args:
        sizes: how many examples each micro-batch has.
        accumulation: how many micro-batches the first step had.

    >>> weightings([4, 4], 2), weightings([4, 2], 2)
    ([[0.5, 0.5]], [[0.6666666666666666, 0.3333333333333333], [0.5, 0.5]])
    """
    count = len(sizes)
    candidates = [
        [size / sum(sizes) for size in sizes],
        [1 / count] * count,
        [1 / accumulation] * count,
    ]
    distinct: list[list[float]] = []
    for candidate in candidates:
        if candidate not in distinct:
            distinct.append(candidate)
    return distinct


def closest_weighting(candidates: Sequence[Sequence[float]], means: Tensor, loss: float) -> int:
    """Return which weighting of mean losses, (J,), comes closest to a loss; 0 of an unknown one."""
    if math.isnan(loss):
        return 0
    gaps = [abs(weighted_sum(candidate, means) - loss) for candidate in candidates]
    return gaps.index(min(gaps))


def weighted_sum(factors: Sequence[float], means: Tensor) -> float:
    """Return Σ factor_j mean_j."""
    return math.fsum(f * mean for f, mean in zip(factors, means.tolist(), strict=True))


def followed_update(model: nn.Module, optimizer: torch.optim.Optimizer) -> TorchUpdate:
    """Return the rule of an optimizer over a network's weights, or refuse one without a rule."""
    if getattr(optimizer, "grad_scale", None) is not None:
        raise MetaplError(
            "record: the optimizer is stepped by a GradScaler, whose skipped steps have no "
            "derivative; expected bfloat16, which needs none."
        )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    update = update_of(optimizer, parameters, name="record: the optimizer")
    if not isinstance(update, TorchUpdate) or isinstance(optimizer, Several):
        raise MetaplError(
            f"record: the optimizer is {type(optimizer).__name__}; expected one of torch.optim."
        )
    return update


def refuse_other_loss(step: SeenStep, network: RecordedNetwork) -> None:
    """Refuse a problem whose mean loss, or its gradient, is not that of the loop.

    Cost: a forward and a backward pass on the step's batch.
    """
    tolerance = tolerance_of(network)
    means: list[Tensor] = []
    gradients: list[Tree] = []
    buffers = step.state.buffers
    for call in step.calls:
        result = network.gradient(step.state.params, buffers, call, None)
        buffers = {**buffers, **result.buffers}
        means.append(result.loss)
        gradients.append(result.gradient)
    candidates = weightings(step.sizes, len(step.sizes))
    mean_losses = torch.stack(means)
    weighting = candidates[closest_weighting(candidates, mean_losses, step.loss)]
    mean = weighted_sum(weighting, mean_losses)
    kind = kind_of(network.problem)
    if abs(step.loss - mean) > tolerance * max(abs(mean), abs(step.loss)):
        raise MetaplError(
            f"record: the mean of {kind}'s losses in the first step is {mean:.6g}, and "
            f"{step.loss:.6g} was backpropagated, {step.loss / mean:.5g} times as much, in "
            f"{len(step.calls)} calls of the network; expected problem= with the loop's loss, as a "
            "mean over the examples."
        )
    gradient: Tree = {}
    for factor, of_call in zip(weighting, gradients, strict=True):
        for name, g in of_call.items():
            gradient[name] = gradient[name] + factor * g if name in gradient else factor * g
    if step.clip_norm is not None:
        scale = (step.clip_norm / (WHOLE.norm(gradient) + 1e-6)).clamp(max=1.0)
        gradient = {name: g * scale.to(g.dtype) for name, g in gradient.items()}
    refuse_other_gradient(gradient, step.gradients, kind, tolerance)


def refuse_other_gradient(
    gradient: Tree, gradient_of_loop: Tree, kind: str, tolerance: float
) -> None:
    """Refuse a gradient that is not the loop's, and weights that only one of the two reaches."""
    names = sorted(gradient.keys() ^ gradient_of_loop.keys())
    if names:
        has_zeros = all(
            name in gradient_of_loop and not bool(gradient_of_loop[name].any()) for name in names
        )
        mend = "problem= with the loop's loss"
        if has_zeros:
            mend = "zero_grad(set_to_none=True), or requires_grad=False for these weights"
        raise MetaplError(
            f"record: {few(names, 3)} has a gradient by one of the loop's loss and {kind}, and "
            f"none by the other; expected {mend}."
        )
    difference = {name: gradient_of_loop[name] - g for name, g in gradient.items()}
    size = float(WHOLE.norm(gradient_of_loop))
    gap = float(WHOLE.norm(difference))
    if not gap <= tolerance * size:
        raise MetaplError(
            f"record: the gradient of {kind}'s mean loss in the first step differs from p.grad by "
            f"{gap / max(size, 1e-300):.2g} of its size; expected a difference of {tolerance:.1g} "
            "at most: a loss with another term, gradients that were there before, or a clipping "
            "that torch.nn.utils.clip_grad_norm_ does not do (clip_norm=)."
        )
