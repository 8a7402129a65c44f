r"""The step's two comparisons, of the passes of the feedback with the inner pass.

They ask whether all are passes of the function on which the step was taken. For every student that
is the same differentiable function in all passes:

- a replay at θ has the same outputs as the inner pass;
- the inner loss has the same derivative along w in forward and in reverse mode,

.. math:: \Big\langle \frac{\partial\ell}{\partial z}, \dot z \Big\rangle
          + \Big\langle \frac{\partial\ell}{\partial\theta}, w \Big\rangle = \langle g, w \rangle

Here z are the student's outputs, ℓ the inner loss, g its gradient in the weights θ, w the direction
that the feedback is taken along, and ż the derivative of z along w.

The first fails for other random numbers and for state that has moved, the second also for a hook on
gradients. Both go into the step's flag: on a CPU it is read before anything moves, on a device with
the report.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.numerics import reduced_float32
from metapl.execution.ranks import ALONE, Ranks

# In how many further steps a step is verified, or compared, again where rounding drowns what tells.
TRIES = 3


class Tolerance(NamedTuple):
    """How far apart two computations of the same quantity may be.

    Attributes:
        outputs: the norm of their difference, relative to their norms.
        slope: the difference of slopes, relative to the size of the slopes and of the terms that
            they sum.
    """

    outputs: float
    slope: float


# By the coarsest dtype of a pass; TF32 counts as float16, which has the same ten bits. Measured on
# the networks of benchmarks/difference_step.py at d3aeafaa, fresh and in training, the slopes
# differ by at most 3e-6 in float32 and 1e-2 under bfloat16; for students that are refused they
# differ by 0.1 and more.
EXACTLY = {
    torch.float64: Tolerance(1e-6, 1e-6),
    torch.float32: Tolerance(5e-3, 1e-3),
    torch.float16: Tolerance(2e-2, 5e-2),
    torch.bfloat16: Tolerance(5e-2, 0.1),
}
# A difference of outputs errs mostly by ReLUs that switch within the move, and of spectral norm by
# a bias: on 70,000 steps of small right students the slopes differ by at most 0.3, but for batch
# normalization over two rows. A gradient that is doubled differs by a third at most, one that is
# reversed by more than 0.5 in most steps.
BY_DIFFERENCE = {
    torch.float64: Tolerance(1e-4, 0.5),
    torch.float32: Tolerance(1e-2, 0.5),
    torch.float16: Tolerance(5e-2, 0.5),
    torch.bfloat16: Tolerance(0.1, 0.5),
}

ROUNDINGS = 10.0
"""A bound on the rounding error of ⟨g, w⟩ relative to ‖g‖‖w‖, in units of the machine epsilon.

Measured: up to 0.7.
"""

CAUSES = (
    "random numbers of a generator of its own, or of Python's or NumPy's, state outside of buffers "
    "(register_buffer makes it part of what is rewound) or of the problem (a batch may have it), "
    "torch.no_grad() or detach() on a part of the forward, a hook or an autograd.Function that "
    "changes gradients, a loss that has kept weights of the student by itself, in the place of "
    "`params` or student.parameters() (docs/contract.md; metapl.check_gradient says more)"
)


def coarsest_dtype(dtypes: Iterable[torch.dtype], device: torch.device) -> torch.dtype:
    """Return the coarsest dtype that a pass is rounded to, by its dtypes and PyTorch's settings.

    A key of the tolerances.
    """
    rounded_to = set(dtypes)
    if torch.is_autocast_enabled(device.type):
        rounded_to.add(torch.get_autocast_dtype(device.type))
    if torch.float32 in rounded_to and reduced_float32(device):
        rounded_to.add(torch.bfloat16 if device.type == "cpu" else torch.float16)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype in rounded_to:
            return dtype
    return torch.float64


def check_same_outputs(
    outputs: Tensor,
    first: Tensor,
    tolerance: float,
    role: str = "student",
    ranks: Ranks = ALONE,
    moved: Tensor | None = None,
) -> None:
    """Flag, on all ranks, a replay whose outputs are not those of the pass that it replays.

    Args:
        outputs: those of the replay, (B, ...), or the labels that it has drawn.
        first: the outputs of the pass.
        tolerance: the norm of their difference, relative to their norms.
        role: of the network, for errors.
        moved: where ``outputs`` are a mean over passes at other weights, those of one of these.
    """
    if ranks.alone and not checks.waits(first) and torch.equal(outputs, first):
        return
    if not first.is_floating_point():
        text = f"the {role} drew other labels when its pass was repeated: {CAUSES}"
        checks.refuse((outputs != first).any(), text)
        return
    gap = ranks.norm(outputs - first)
    size = ranks.norm(first)
    other_size = ranks.norm(outputs if moved is None else moved)
    text = f"the {role}'s outputs are NaN or infinite: its inputs are, or it has diverged."
    checks.refuse(gap.isnan(), text)
    # The negation of a comparison, so that NaN is flagged.
    checks.refuse(
        ~(gap <= tolerance * (size + other_size)),
        f"the {role} returns other outputs when its pass is repeated with the same batch, weights, "
        f"buffers and random numbers, so the feedback would be wrong. Likely causes: {CAUSES}.",
    )


SLOPES_DIFFER = (
    "the student's forward and backward passes are not of one function: the slopes of the inner "
    "loss by outputs and by its gradient differ, so the feedback would be wrong. Likely causes: "
    f"{CAUSES}."
)


class SlopesDiffer(MetaplError):
    """The inner loss has two derivatives along w.

    One is by the student's outputs and weights, the other by its gradient. The gradient then goes
    through something else that the forward has left, such as an auxiliary loss in an attribute, or
    is none of the function that the forward computes. Double backward follows the first.
    """

    def __init__(self) -> None:
        super().__init__(SLOPES_DIFFER)


def slopes_differ(
    forward: Tensor, backward: Tensor, spread: Tensor, tolerance: float, rounding: Tensor | float
) -> Tensor:
    """Return whether two derivatives along w are not the same, as a tensor.

    NaN is not the same as anything. For the arguments see :func:`check_same_slopes`.
    """
    gap = (forward - backward).abs()
    return ~(gap <= tolerance * (spread + backward.abs()) + rounding)


def check_same_slopes(
    forward: Tensor, backward: Tensor, spread: Tensor, tolerance: float, rounding: Tensor | float
) -> None:
    """Flag two derivatives along w that are not the same.

    Args:
        forward: ⟨∂ℓ/∂z, ż⟩ + ⟨∂ℓ/∂θ, w⟩, a scalar.
        backward: ⟨g, w⟩, a scalar.
        spread: the size of the terms of the two sums, to which their error is proportional.
        tolerance: the error in units of ``spread`` and of the slope.
        rounding: a bound on the error by rounding, which is added.
    """
    checks.refuse(
        slopes_differ(forward, backward, spread=spread, tolerance=tolerance, rounding=rounding),
        SLOPES_DIFFER,
    )


def same_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same but for the rounding of a pass."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    rounding = 100 * torch.finfo(a.dtype).eps
    return bool((a - b).norm() <= rounding * b.norm())


def same_values(t: Tensor, before: Tensor) -> bool:
    """Return whether a tensor is as it was; NaN counts as a value."""
    if t.shape != before.shape:
        return False
    values = t.detach().to_dense()
    values_before = before.to_dense()
    if values.equal(values_before):
        return True
    has_nan = values.is_floating_point() or values.is_complex()
    return has_nan and torch.allclose(values, values_before, rtol=0, atol=0, equal_nan=True)
