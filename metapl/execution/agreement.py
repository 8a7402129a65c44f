r"""Whether a replay agrees with the pass that it replays.

These relations hold for every student that is the same differentiable function in all passes, and cost almost nothing:

- A replay at θ has the same outputs as the inner pass.
- The derivative of the inner loss along w is the same in forward and in reverse mode:

.. math:: \Big\langle \frac{\partial\ell}{\partial z}, \dot z \Big\rangle
          + \Big\langle \frac{\partial\ell}{\partial\theta}, w \Big\rangle = \langle g, w \rangle

- Of several steps, where double backward takes the place of forward mode: the gradient of a replay reaches the same
  weights, and where a step is computed again with the same outputs to the bit, it has the same norms.

The first fails for different random numbers and for state that has changed; the second also if the outputs agree and
the derivatives do not (``torch.no_grad()`` or ``detach()`` in the forward pass, a custom backward pass, hooks that
change gradients). A student for which one of them fails is refused: its feedback would be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.kernels import NotByThisMode
from metapl.execution.numerics import Tree, reduced_float32
from metapl.execution.ranks import ALONE, Agreed, Ranks

# By the field of a signal; None: nothing depends on it.
Derivatives = Mapping[str, Tensor | None]
Figure = Tensor | float


class SlopesDisagree(NotByThisMode):
    """The derivative of the inner loss along w differs between forward and reverse mode."""


class Tolerance(NamedTuple):
    """How far apart two computations of the same quantity may be."""

    outputs: float  # the norm of their difference, relative to their norms
    slope: float  # relative to the size of the slopes and of the terms that they sum


# By the coarsest dtype of a pass; TF32 counts as float16, which has the same ten bits. Measured on the networks of
# benchmarks/difference_step.py, fresh and in training, the slopes differ by at most 3e-6 in float32 and 1e-2 under
# bfloat16; for students that are refused they differ by 0.1 and more.
BY_FORWARD_MODE = {
    torch.float64: Tolerance(1e-6, 1e-6),
    torch.float32: Tolerance(5e-3, 1e-3),
    torch.float16: Tolerance(2e-2, 5e-2),
    torch.bfloat16: Tolerance(5e-2, 0.1),
}
# A difference of outputs has an additional error, mostly from ReLUs that switch within the move (measured: up to 1e-2
# in float32), and its passes are not rounded like the inner pass (measured: up to 0.17 under bfloat16).
BY_DIFFERENCE = {
    torch.float64: Tolerance(1e-4, 1e-3),
    torch.float32: Tolerance(1e-2, 0.1),
    torch.float16: Tolerance(5e-2, 0.3),
    torch.bfloat16: Tolerance(0.1, 0.6),
}
# Of a loss, relative to the size of its terms, above the order in which a device sums.
SAME_LOSS = {torch.float32: 1e-5, torch.float64: 1e-10, torch.float16: 1e-2, torch.bfloat16: 1e-2}

_CAUSES = (
    "random numbers from Python's random, from numpy or from a generator of the module (use torch's default "
    "generator); state in an object that the module refers to (keep it in buffers, or in attributes that are numbers "
    "or tensors)"
)


def coarsest(dtypes: Iterable[torch.dtype], device: torch.device) -> torch.dtype:
    """The coarsest dtype that a pass is rounded to, by its dtypes and PyTorch's settings: a key of the tolerances."""
    formats = set(dtypes)
    if torch.is_autocast_enabled(device.type):
        formats.add(torch.get_autocast_dtype(device.type))
    if torch.float32 in formats and reduced_float32(device):
        formats.add(torch.bfloat16 if device.type == "cpu" else torch.float16)
    return next((t for t in (torch.bfloat16, torch.float16, torch.float32) if t in formats), torch.float64)


def check_outputs(
    replay: Tensor, inner: Tensor, tolerance: float, ranks: Ranks = ALONE, *, moved: Tensor | None = None
) -> None:
    """Refuse, on all ranks, a replay whose outputs differ from those of the inner pass; of a mean over passes at other
    weights, ``moved`` are the outputs of one of them, which alone have a size where those of the inner pass are zero.
    """
    if ranks.alone and not checks.waits(inner) and torch.equal(replay, inner):
        return
    norm = torch.linalg.vector_norm if ranks.alone else ranks.norm
    size = norm(inner)
    _refuse(
        norm(replay - inner),
        tolerance * (size + norm(replay if moved is None else moved)),
        "the student does not return the same outputs when the inner pass is repeated with the same batch, weights, "
        "buffers and default random generators (the difference has norm {gap:.2g}, the outputs {size:.2g}), so the "
        f"feedback would be wrong. Usual causes: {_CAUSES}; attention dropout drawn by another kernel (train under "
        'torch.nn.attention.sdpa_kernel(SDPBackend.MATH)). mode="unrolled" and "reinforce" repeat no pass and take the '
        "student as it is; its pass on the labeled batch, too, then moves such a source on.",
        size=size,
    )


def check_shares(given: Sequence[tuple[str, Any, str]], device: torch.device, ranks: Ranks) -> None:
    """Refuse batches, each with its name and with the step that it is of, that are wrong, on one rank or on all, ranks
    with unequal shares of a batch, and processes that should have the same rows and have others."""
    with ranks.agreed():
        for name, batch, of_step in given:
            checks.batches([(name, batch)], device, of_step)
    if ranks.alone:
        return
    leaves = [[t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)] for _, batch, _ in given]
    (name, _, of_step), *others = given
    then = f", then of the {others[0][0]}" if others else ""
    ranks.equal(
        [len(tensors[0]) for tensors in leaves],
        f"the ranks have unequal shares of a batch (rows of the {name} batch{of_step}{then}: {{counts}}); expected the "
        "same number of rows on every rank, since a loss is the mean of the ranks' means.",
    )
    if ranks.copies > 1:  # columns of images cannot be compared
        rows = [t for tensors in leaves for t in tensors if t.ndim < 3 or not ranks.columns]
        whole = "labels, or other whole numbers of a batch,"
        check_copies([t for t in rows if not t.is_floating_point()], whole, ranks)
        check_copies([t for t in rows if t.is_floating_point()], "rows of a batch", ranks)


def check_copies(tensors: Sequence[Tensor], what: str, ranks: Ranks) -> None:
    """Refuse, on all ranks, tensors (``what`` they are, in a sentence) that differ between processes that hold the same
    rows; cost: one exchange of a few numbers for each share of the rows, where rows are held in copies."""
    if ranks.copies == 1 or not tensors:
        return
    t = torch.cat([t.detach().double().flatten() for t in tensors])
    # Compared by waves, whose products with a difference are about as large as its norm.
    places = torch.arange(1, len(t) + 1, device=t.device, dtype=t.dtype)
    seen = torch.stack([(t * (places * math.sqrt(prime)).cos()).sum() for prime in (2, 3, 5, 7)])
    tolerance = BY_FORWARD_MODE[coarsest([t.dtype for t in tensors if t.is_floating_point()], t.device)].outputs
    size = ranks.norm(t)
    _refuse(
        ranks.norm(seen - ranks.mean_of_copies(seen)),
        tolerance * size,
        f"processes that hold the same rows have different {what} (the difference has norm {{gap:.2g}}, all of "
        "them {size:.2g}), so the gradients would be wrong. Usual causes: other rows or labels in these processes "
        "(mesh.share is the number of the rows that a process takes); random generators in other states (seed the "
        "default generators alike, or give all the same generator=); other weights; a teacher that is not cut, and is "
        "given the columns of images that a cut student takes: shard(teacher, mesh, example=...).",
        kind=Agreed,
        size=size,
    )


def check_loss(losses: Tensor, first: Tensor, ranks: Ranks = ALONE) -> None:
    """Refuse, on all ranks, an inner loss that has another value than the ``first`` at the same outputs, signal, batch
    and weights; its rounding is proportional to the size of the ``losses`` that it is a mean of."""
    again = losses.mean()
    if ranks.alone and not checks.waits(again) and bool(again == first):
        return
    gap, bound = ranks.pooled(torch.stack([(again - first).abs(), losses.abs().mean() + first.abs()])).unbind()
    _refuse(
        gap,
        SAME_LOSS[again.dtype] * bound,
        "the problem's inner_loss has another value when it is evaluated again at the same outputs, signal, batch and "
        "weights (the difference is {gap:.2g}, of {bound:.2g}), so the feedback would be that of another loss. Keep "
        "state of its own, such as a running mean, a counter or a schedule, in signal(), which is called once a step, "
        'and give it to the loss in a field of the signal. mode="unrolled" and "reinforce" evaluate no inner loss '
        "twice and take it as it is.",
        bound=bound,
    )


def check_same_gradient(
    again: Mapping[str, Tensor], first: Tree, tolerance: Tensor | None = None, ranks: Ranks = ALONE
) -> None:
    """Refuse, on all ranks, a replay whose gradient reaches other weights than that of the pass. ``first`` are norms by
    weight; an empty one, of compiled and sharded students, compares nothing. With a ``tolerance``, a share of the norm
    over all weights, ``again`` are norms too, and none may differ by more."""
    if not first:
        return
    norms = torch.stack([*first.values()])
    gap, limit = norms.new_full((), math.inf if again.keys() != first.keys() else 0.0), torch.zeros_like(norms[0])
    if tolerance is not None and again.keys() == first.keys():
        gap = (torch.stack([again[name] for name in first]) - norms).abs().amax()
        limit = tolerance * torch.linalg.vector_norm(norms)
    _refuse(
        ranks.pooled(gap),
        ranks.pooled(limit),
        "the student does not have the same gradient when the inner pass is repeated with the same batch, weights, "
        "buffers and default random generators (it reaches other weights, or has another norm in one), so the feedback "
        f"would be wrong. Usual causes: what is detached, or a backward pass of its own, depends on {_CAUSES}. "
        'mode="unrolled" repeats no pass and takes the student as it is.',
    )


def check_outer_loss(again: Tensor, first: Tensor, tolerance: float) -> None:
    """Refuse an outer loss that has another value at the same weights; the values are those of all ranks."""
    size = first.abs() + again.abs()
    _refuse(
        (again - first).abs(),
        tolerance * size,
        "the outer loss has another value when it is evaluated again at the same weights, buffers and default random "
        "generators (the difference is {gap:.2g}, of {size:.2g}), so the decrease of the loss would be that of another "
        f"function. Usual causes: {_CAUSES}, which may be the problem's too; a forward that asks whether its weights "
        'require a gradient (ask self.training). mode="reinforce" evaluates the outer loss once and takes it as it is.',
        size=size,
    )


def check_recomputed(second: Tensor, first: Tensor) -> None:
    """Refuse a teacher whose second pass differs from its first."""
    if second.is_floating_point():
        tolerance = BY_FORWARD_MODE[coarsest([second.dtype], second.device)].outputs
        gap, size, again = (torch.linalg.vector_norm(t) for t in (second - first, first, second))
        limit = tolerance * (size + again)
        text = (
            "the teacher does not return the same outputs when its pass on the unlabeled batch is repeated with the "
            "same batch, weights, buffers and default random generators (the difference has norm {gap:.2g}, the "
            f"outputs {{size:.2g}}). Usual causes: {_CAUSES}."
        )
    else:
        gap, limit = (second != first).any().double(), first.new_zeros((), dtype=torch.float64)
        size = limit
        text = (
            "the problem's signal has drawn other labels when the teacher's pass on the unlabeled batch was repeated, "
            "so the feedback would be credited to labels that the student never saw. Draw from the generator that "
            "signal() is given, or from torch's default generators."
        )
    _refuse(gap, limit, f"{text} Or leave recompute_teacher and accumulate out, which repeat it.", size=size)


def check_linear(drawn: Tensor, expected: Tensor, ranks: Ranks = ALONE) -> None:
    """Refuse feedback that differs between the labels drawn and the probabilities that they were drawn from."""
    size = ranks.norm(drawn)
    _refuse(
        ranks.norm(drawn - expected),
        1e-3 * (size + ranks.norm(expected)),
        "the problem's inner_loss is not linear in its target: the feedback at the labels drawn and at their "
        "probabilities differ (by norm {gap:.2g}, of {size:.2g}), so for sampled labels the expectation would be "
        'wrong. Use mode="reinforce_per_example" with one student step, or a differentiable signal.',
        size=size,
    )


def check_slopes(
    forward: Tensor, backward: Tensor, spread: Tensor, tolerance: float, rounding: Tensor, what: str = "the inner loss"
) -> None:
    """Refuse a derivative along w, ``forward`` ⟨∂ℓ/∂z, ż⟩ + ⟨∂ℓ/∂θ, w⟩, that differs from ``backward``, ⟨g, w⟩.

    Their error is proportional to the ``spread``, the size of the terms of the two sums, and bounded by ``rounding``.
    """
    _refuse(
        (forward - backward).abs(),
        tolerance * (spread + backward.abs()) + rounding,
        "the student's forward and backward passes are not of one function: along the direction of the feedback, "
        f"{what} has the derivative {{forward:.4g}} by the outputs and {{backward:.4g}} by the gradient, so the "
        "feedback would be wrong. Usual causes: torch.no_grad() or detach() in the student's forward (such as "
        "straight-through rounding), an autograd.Function with a custom backward, a hook that changes gradients, "
        "numbers too small for half precision.",
        kind=SlopesDisagree,
        forward=forward,
        backward=backward,
    )


def check_bend(ahead: Tensor, here: Tensor, behind: Tensor, rounding: Tensor, ranks: Ranks = ALONE) -> None:
    """Refuse, on all ranks, outputs ``ahead`` and ``behind``, at θ ± δ, that differ by little more than their bend.

    All of a jump is bend, however short the way. The slopes may agree nevertheless: they weigh an output by the loss's
    derivative in it, which is small where the label is met.
    """
    bend, moved = ranks.norm(ahead - 2 * here + behind), ranks.norm(ahead - behind)
    _refuse(
        bend,
        0.5 * moved + ranks.pooled(rounding),
        "the student's outputs jump, or bend sharply, however little its weights are moved (a move changes them by "
        "{moved:.2g}, of which {bend:.2g} is bend), so a difference of them is no derivative and the feedback would be "
        "wrong. Usual causes: rounding and other steps in the student's forward.",
        kind=SlopesDisagree,
        bend=bend,
        moved=moved,
    )


def check_difference(moved: Derivatives, bend: Derivatives, here: Derivatives, eps: Tensor) -> None:
    """Refuse a difference over θ ± δ of derivatives in the signal whose two halves differ, by their ``bend``, or that
    is mostly rounding, by the relative ``eps`` of the derivatives ``here``."""
    if all(t is None for t in moved.values()):
        return
    size, gap, whole = (
        torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in fields.values() if t is not None]))
        for fields in (moved, bend, here)
    )
    _refuse(
        gap + eps * whole,
        0.05 * size,
        "the feedback on a signal in the student's input is a difference of derivatives here, whose two halves differ "
        "by {gap:.2g}, of {size:.2g}, so it would be wrong. Usual causes: units that switch as the weights move (ReLU) "
        'or rounding in float32. Use mode="forward" or "unrolled", which are exact.',
        kind=SlopesDisagree,
        size=size,
    )


def _refuse(gap: Figure, limit: Figure, text: str, *, kind: type[MetaplError] = MetaplError, **figures: Figure) -> None:
    """Raise ``text`` if the gap exceeds the limit (not for NaN), with the figures if the host can read them."""
    bad = gap > limit
    if isinstance(bad, Tensor) and checks.waits(bad):
        checks.refuse(bad, text.format(gap=_Unread(), **dict.fromkeys(figures, _Unread())))
    elif bad:
        raise kind(text.format(gap=float(gap), **{name: float(t) for name, t in figures.items()}))


class _Unread:
    """A placeholder for a figure that is still on the device."""

    def __format__(self, spec: str) -> str:
        return "?"
