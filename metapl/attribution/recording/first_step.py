"""Whether the problem's loss and gradient are those of the loop, in the first step of a recording.

A recording is differentiated through the losses ℓ_i that the problem gives. In the first step their
mean is compared with the loss that the loop has backpropagated, which may be a multiple of it, and
the gradient of that multiple with ``p.grad``. What differs is refused there, and not after a night
of training. A loop may divide its loss by another number in each step, so that some later gradients
are compared too (:func:`gap_of_later_step`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metapl.attribution.recording.folder import KeptState
from metapl.attribution.recording.network import (
    IN_SEVERAL_PROCESSES,
    Call,
    RecordedNetwork,
    precision_of,
    precision_of_products,
)
from metapl.errors import MetaplError, few, reason_of
from metapl.execution.failed_calls import names_of_arguments
from metapl.execution.numerics import WHOLE, Tree
from metapl.problems.base import kind_of
from metapl.problems.doubtful import EqualWeights
from metapl.problems.sequences import IGNORED, NextToken
from metapl.updates import TorchUpdate, parameters_of, update_of

# A GradScaler begins at a scale of 2 to the 16; less than 2 to this number is not taken for one.
LEAST_EXPONENT = 8

# What they do has a rule that gives their own bits.
FOLLOWED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True)
class SeenStep:
    """What was seen of a step, with all that its gradient is computed from.

    Args:
        state: before the step.
        calls: of the network, one for each micro-batch.
        loss: the sum of the losses that were backpropagated; NaN where none was seen.
        loss_types: in which types they were.
        clip_norm: the greatest norm of the gradient; None: it was not clipped.
        gradients: those that the optimizer has used, by name.
        sizes: how many examples each call has, or tokens, as the problem counts.
    """

    state: KeptState
    calls: Sequence[Call]
    loss: float
    loss_types: set[torch.dtype]
    clip_norm: float | None
    gradients: Tree
    sizes: Sequence[float]


def tolerance_of(network: RecordedNetwork) -> float:
    """Return the relative difference of a loss or a gradient that rounding may cause.

    That is the root of the precision from the weights to the loss, or twice that of products under
    autocast if it is more: 3.5e-4 in float32, and 1.6e-2 with autocast to bfloat16. An entry is
    rounded by half of that precision at most, and most passes are repeated bit for bit. The root of
    bfloat16's own would be 9 %, which is what label smoothing of 0.1 changes of a gradient.
    """
    return max(math.sqrt(precision_of(network)), 2 * precision_of_products(network))


def tolerance_of_replay(network: RecordedNetwork) -> float:
    """Return the relative difference that rounding may cause over many steps.

    It is ten times that of one pass without autocast, or that of one pass under it if that is more:
    the weights that lead from step to step are not rounded to the autocast's type.
    """
    return max(10 * math.sqrt(precision_of(network)), tolerance_of(network))


class Weighting(NamedTuple):
    """How a loop weights the mean losses of a step's micro-batches.

    Attributes:
        factors: one for each.
        counts_examples: whether micro-batches weigh as they have examples, and not alike.
    """

    factors: list[float]
    counts_examples: bool


def weightings(sizes: Sequence[float], first_sizes: Sequence[float]) -> list[Weighting]:
    """Return the factors that loops give to the mean losses of a step's micro-batches.

    They are those of the mean over all examples; of the mean over the micro-batches; of the sum
    over the usual number of micro-batches, which the last step of an epoch may not have; and of the
    sum over the examples. Usually they are equal.

    Args:
        sizes: how many examples each micro-batch has, or tokens where each of them counts alike.
        first_sizes: the same of the first step.

    >>> [weighting.factors for weighting in weightings([4], first_sizes=[4, 4])]
    [[1.0], [0.5]]
    """
    candidates = [
        Weighting([size / sum(sizes) for size in sizes], counts_examples=True),
        Weighting([1 / len(sizes)] * len(sizes), counts_examples=False),
        Weighting([1 / len(first_sizes)] * len(sizes), counts_examples=False),
        Weighting([size / sum(first_sizes) for size in sizes], counts_examples=True),
    ]
    distinct: list[Weighting] = []
    for candidate in candidates:
        if candidate.factors not in [other.factors for other in distinct]:
            distinct.append(candidate)
    return distinct


def closest_weighting(
    candidates: Sequence[Sequence[float]], means: Tensor, loss: float, precision: float
) -> Sequence[float]:
    """Return the weighting of mean losses, (J,), that comes closest to a loss.

    It is the first one for an unknown loss, and the first of those that rounding does not tell
    apart.

    Args:
        precision: from the weights to the losses.
    """
    if math.isnan(loss):
        return candidates[0]
    gaps = [abs(weighted_sum(candidate, means) - loss) for candidate in candidates]
    allowed = min(gaps) + 100 * precision * abs(loss)
    return next(c for c, gap in zip(candidates, gaps, strict=True) if gap <= allowed)


def factor_of_loop(loss: float, mean: float, precision: float) -> float:
    """Return by which number a loop multiplies the mean loss before it is backpropagated.

    A sum over a batch has the batch's size, and transformers divides the loss of a GPT-2 by the
    number of its tokens and not of those that are predicted. A quotient of numbers up to 1,000 is
    taken for that quotient, without the rounding of the two losses.

    Args:
        precision: from the weights to the losses.
    """
    if math.isnan(loss) or mean == 0:
        return 1.0
    factor = loss / mean
    quotient = Fraction(factor).limit_denominator(1000)
    if abs(float(quotient) - factor) <= 100 * precision * abs(factor):
        return float(quotient)
    return factor


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
    if type(optimizer) not in FOLLOWED:
        # Muon's own steps round products to bfloat16, and its rule does not.
        raise MetaplError(
            f"record: the optimizer is {type(optimizer).__name__}, whose steps no rule takes bit "
            "for bit; expected torch.optim's SGD, Adam or AdamW over all weights that are trained."
        )
    refuse_other_parameters(optimizer, parameters)
    update = update_of(optimizer, parameters, name="record: the optimizer")
    assert isinstance(update, TorchUpdate), "the rules of these optimizers are"
    return update


def refuse_other_parameters(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Refuse an optimizer over other weights than those of the network that are trained."""
    optimized = {id(p) for p in parameters_of(optimizer) if p.requires_grad}
    missing = [name for name, p in parameters.items() if id(p) not in optimized]
    others = len(optimized) - (len(parameters) - len(missing))
    faults: list[str] = []
    if missing:
        faults.append(f"is not over {few(missing, 3)}")
    if others:
        faults.append(f"is over {others} tensors that the network does not have")
    if faults:
        raise MetaplError(
            f"record: the {type(optimizer).__name__} of the loop {' and '.join(faults)}; expected "
            "model= with all that it trains, and requires_grad=False for those that stay as they "
            "are."
        )


def compared_factor(step: SeenStep, network: RecordedNetwork) -> tuple[float, bool]:
    """Return the factor of the loop's loss, and whether its micro-batches weigh as their examples.

    Raises: :class:`metapl.MetaplError` for a problem whose gradient is not the loop's.
    Cost: a forward and a backward pass on the step's batch.
    """
    means, gradients = passes_of(step, network, notes_types=True)
    network.types |= step.loss_types
    tolerance = tolerance_of(network)
    # Each may be the loop's up to a factor, and the gradient decides.
    gaps: list[tuple[float, float, float, bool]] = []
    for factors, counts_examples in weightings(step.sizes, step.sizes):
        mean = weighted_sum(factors, means)
        factor = factor_of_loop(step.loss, mean, precision_of(network))
        gap = gap_of(step, [factor * f for f in factors], gradients, network)
        gaps.append((gap, factor, mean, counts_examples))
    gap, factor, mean, counts_examples = min(gaps)
    if gap <= tolerance:
        refuse_scale_of_scaler(step, factor)
        refuse_counted_labels(network.problem, step, factor)
        return factor, counts_examples
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # A wrapper around the network has averaged its gradients.
        if torch.distributed.get_world_size() > 1:
            raise MetaplError(IN_SEVERAL_PROCESSES)
    in_losses = ""
    if not math.isnan(step.loss):
        in_losses = f", and their mean is {mean:.6g} where {step.loss:.6g} was backpropagated"
    raise MetaplError(
        f"record: the gradient of the mean of {kind_of(network.problem)}'s losses in the first "
        f"step differs from p.grad by {gap:.2g} of its size, {tolerance:.1g} at most is rounding"
        f"{in_losses}, in {len(step.calls)} calls of the network; expected problem= with the "
        "loop's loss, no gradients from before, no GradScaler, and torch.nn.utils.clip_grad_norm_ "
        "or clip_norm=, which scales by clip_norm / (norm + 1e-6)."
    )


def gap_of_later_step(
    step: SeenStep, network: RecordedNetwork, *, factor: float, first_sizes: Sequence[float]
) -> float:
    """Return how far the gradient of a later step is from that of the problem's losses.

    Args:
        factor: of the loop's loss in the first step.
        first_sizes: how many examples, or tokens, each call of the first step had.

    Cost: a forward and a backward pass on the step's batch.
    """
    _, gradients = passes_of(step, network)
    return min(
        gap_of(step, [factor * f for f in factors], gradients, network)
        for factors, _ in weightings(step.sizes, first_sizes)
    )


def passes_of(
    step: SeenStep, network: RecordedNetwork, *, notes_types: bool = False
) -> tuple[Tensor, list[Tree]]:
    """Return the mean loss of each call of a step, (J,), and their gradients.

    Args:
        notes_types: as of :meth:`RecordedNetwork.gradient`.

    Raises: :class:`metapl.MetaplError` for losses that the problem cannot take.
    """
    means: list[Tensor] = []
    gradients: list[Tree] = []
    buffers = step.state.buffers
    for call in step.calls:
        try:
            result = network.gradient(step.state.params, buffers, call, notes_types=notes_types)
        except MetaplError:
            raise
        except Exception as error:
            # The network itself has just run on these examples, in the loop.
            inputs = network.problem.student_input(call.batch)
            names = names_of_arguments(network.model)
            if isinstance(inputs, dict) and not inputs.keys() <= {*names}:
                raise MetaplError(
                    f"record: the inputs of train are a dict of {few(inputs)}, and the network's "
                    f"forward takes {few(names)}; expected a dict with these names, or (inputs, "
                    "labels)."
                ) from error
            kind = kind_of(network.problem)
            raise MetaplError(
                f"record: {kind} cannot take the losses of the loop's examples "
                f"({reason_of(error)}); expected problem= with the loop's loss: NextToken for "
                "causal language models, or a subclass of EqualWeights with an inner_loss."
            ) from error
        buffers = {**buffers, **result.buffers}
        means.append(result.loss)
        gradients.append(result.gradient)
    return torch.stack(means), gradients


def gap_of(
    step: SeenStep, factors: Sequence[float], gradients: Sequence[Tree], network: RecordedNetwork
) -> float:
    """Return how far the sum of factors times gradients, clipped, is from the loop's gradient."""
    gradient = weighted_trees(factors, gradients)
    if step.clip_norm is not None:
        scale = (step.clip_norm / (WHOLE.norm(gradient) + 1e-6)).clamp(max=1.0)
        gradient = {name: g * scale.to(g.dtype) for name, g in gradient.items()}
    refuse_other_weights(gradient, step.gradients, kind_of(network.problem))
    return relative_gap(gradient, step.gradients)


def refuse_scale_of_scaler(step: SeenStep, factor: float) -> None:
    """Refuse a loss that a GradScaler scales, by a power of two that it may change in any step.

    A clip of the gradient that acts hides the scale.
    """
    exponent = math.log2(factor) if factor > 0 else 0.0
    is_power = exponent >= LEAST_EXPONENT and abs(exponent - round(exponent)) <= 1e-4
    if step.clip_norm is None or not is_power:
        return
    raise MetaplError(
        f"record: the loop's loss is {factor:.0f} times the mean of its examples', as by a "
        "GradScaler, whose scale and skipped steps have no derivative; expected bfloat16, which "
        "needs none, or a loss without that factor."
    )


def refuse_counted_labels(problem: EqualWeights, step: SeenStep, factor: float) -> None:
    """Refuse a loop that divides by the number of labels where sequences have different lengths.

    transformers counts the first label of a sequence too where it does not know that the model
    shifts its labels, as of a GPT-2. The loss is then (n − B) / n of the mean over n − B
    predictions, another share in each step.
    """
    if not isinstance(problem, NextToken) or problem.mean != "token":
        return
    is_label = [labels != IGNORED for _, labels in (call.batch for call in step.calls)]
    lengths = torch.cat([is_one.sum(1) for is_one in is_label])
    share = sum(step.sizes) / float(lengths.sum().clamp_min(1))
    counts_labels = share < 1 and abs(factor - share) <= 0.1 * (1 - share)
    if not counts_labels or len(lengths.unique()) == 1:
        return
    raise MetaplError(
        f"record: the loop divides the loss of {sum(step.sizes):.0f} predicted tokens by "
        f"{int(lengths.sum())}, the number of labels, so that it is another multiple of their mean "
        "in each step; expected -100 as the first label of each sequence, which nothing predicts."
    )


def weighted_trees(factors: Sequence[float], trees: Sequence[Tree]) -> Tree:
    """Return Σ factor_j tree_j; a weight that is missing in a tree counts as zero there."""
    total: Tree = {}
    for factor, tree in zip(factors, trees, strict=True):
        for name, t in tree.items():
            total[name] = total[name] + factor * t if name in total else factor * t
    return total


def relative_gap(gradient: Tree, gradient_of_loop: Tree) -> float:
    """Return how far two gradients are apart, in the size of the loop's; infinite where NaN."""
    difference = {name: gradient_of_loop[name] - g for name, g in gradient.items()}
    size = float(WHOLE.norm(gradient_of_loop))
    gap = float(WHOLE.norm(difference)) / max(size, 1e-300)
    return math.inf if math.isnan(gap) else gap


def refuse_other_weights(gradient: Tree, gradient_of_loop: Tree, kind: str) -> None:
    """Refuse a gradient that reaches other weights than the loop's.

    A gradient of the loop may be zero where there is none, as by zero_grad(set_to_none=False).
    """
    reached = {name for name, g in gradient_of_loop.items() if name in gradient or bool(g.any())}
    names = sorted(gradient.keys() ^ reached)
    if names:
        raise MetaplError(
            f"record: {few(names, 3)} has a gradient by one of the loop's loss and {kind}, and "
            "none by the other; expected problem= with the loop's loss."
        )
