r"""The step's two comparisons: are the passes of the feedback passes of the function that the step was taken on?

For every student that is the same differentiable function in all passes:

- a replay at θ has the same outputs as the inner pass;
- the inner loss has the same derivative along w in forward and in reverse mode,

.. math:: \Big\langle \frac{\partial\ell}{\partial z}, \dot z \Big\rangle
          + \Big\langle \frac{\partial\ell}{\partial\theta}, w \Big\rangle = \langle g, w \rangle

The first fails for other random numbers and for state that has moved, the second also for a hook on
gradients. Both go into the step's flag: on a CPU it is read before anything moves, on a device with
the report.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.numerics import reduced_float32
from metapl.execution.ranks import ALONE, Ranks


class Tolerance(NamedTuple):
    """How far apart two computations of the same quantity may be."""

    outputs: float  # the norm of their difference, relative to their norms
    slope: float  # relative to the size of the slopes and of the terms that they sum


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
    t: Tolerance(most, 0.5) for t, most in zip(EXACTLY, (1e-4, 1e-2, 5e-2, 0.1), strict=True)
}

ROUNDINGS = 10.0
"""A bound on the rounding error of ⟨g, w⟩ relative to ‖g‖‖w‖, in units of the machine epsilon.

Measured: up to 0.7.
"""

CAUSES = (
    "random numbers of a generator of its own (or of Python's or NumPy's, where no pass of the "
    "first step drew from these), state outside of buffers (register_buffer makes it part of what "
    "is rewound), torch.no_grad() or detach() on a part of the forward, a hook or an "
    "autograd.Function that changes gradients, a loss that has kept weights of the student by "
    "itself, in the place of `params` or student.parameters() (docs/contract.md; "
    "metapl.check_gradient says more)"
)


def coarsest_dtype(dtypes: Iterable[torch.dtype], device: torch.device) -> torch.dtype:
    """The coarsest dtype that a pass is rounded to, by its dtypes and PyTorch's settings.

    A key of the tolerances.
    """
    formats = set(dtypes)
    if torch.is_autocast_enabled(device.type):
        formats.add(torch.get_autocast_dtype(device.type))
    if torch.float32 in formats and reduced_float32(device):
        formats.add(torch.bfloat16 if device.type == "cpu" else torch.float16)
    return next(
        (t for t in (torch.bfloat16, torch.float16, torch.float32) if t in formats), torch.float64
    )


def check_same_outputs(
    again: Tensor,
    first: Tensor,
    tolerance: float,
    who: str = "student",
    ranks: Ranks = ALONE,
    moved: Any = None,
) -> None:
    """Flag, on all ranks, a replay whose outputs (or labels) are not those of the pass that it
    replays; of a mean over passes at other weights, ``moved`` are the outputs of one of them."""
    if ranks.alone and not checks.waits(first) and torch.equal(again, first):
        return
    if not first.is_floating_point():
        checks.refuse(
            (again != first).any(),
            f"the {who} drew other labels when its pass was repeated: {CAUSES}",
        )
        return
    gap, size, other = (
        ranks.norm(t) for t in (again - first, first, again if moved is None else moved)
    )
    checks.refuse(
        gap.isnan(), f"the {who}'s outputs are NaN or infinite: its inputs are, or it has diverged."
    )
    checks.refuse(
        ~(gap <= tolerance * (size + other)),  # so that NaN is flagged
        f"the {who} returns other outputs when its pass is repeated with the same batch, weights, "
        f"buffers and random numbers, so the feedback would be wrong. Likely causes: {CAUSES}.",
    )


SLOPES_DIFFER = (
    "the student's forward and backward passes are not of one function: the slopes of the inner "
    "loss by outputs and by its gradient differ, so the feedback would be wrong. Likely causes: "
    f"{CAUSES}."
)


class SlopesDiffer(MetaplError):
    """The inner loss has another derivative along w by the student's outputs and weights than by its gradient.

    Its gradient then goes through something else that the forward has left, such as an auxiliary
    loss in an attribute, or is none of the function that the forward computes. Double backward
    follows the first.
    """

    def __init__(self) -> None:
        super().__init__(SLOPES_DIFFER)


def slopes_differ(
    forward: Tensor, backward: Tensor, spread: Tensor, tolerance: float, rounding: Tensor | float
) -> Tensor:
    """Return whether two derivatives along w are not the same, as a tensor.

    NaN is not. See :func:`check_same_slopes`.
    """
    return ~((forward - backward).abs() <= tolerance * (spread + backward.abs()) + rounding)


def check_same_slopes(
    forward: Tensor, backward: Tensor, spread: Tensor, tolerance: float, rounding: Tensor | float
) -> None:
    """Flag a derivative along w, ``forward`` ⟨∂ℓ/∂z, ż⟩ + ⟨∂ℓ/∂θ, w⟩, that is not ``backward``, ⟨g, w⟩.

    Their error is proportional to the ``spread``, the size of the terms of the two sums, and
    bounded by ``rounding``.
    """
    checks.refuse(slopes_differ(forward, backward, spread, tolerance, rounding), SLOPES_DIFFER)
