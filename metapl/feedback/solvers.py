"""Solutions of (H + damping) x = v, from products with H alone, over trees of parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metapl.execution import checks
from metapl.execution.numerics import WHOLE, Tree, scaled

Product = Callable[[Tree], Tree]

dot, norm = WHOLE.dot, WHOLE.norm


def conjugate_gradient(product: Product, v: Tree, iterations: int, damping: float) -> Tree:
    """Conjugate gradients, for a positive H + damping: exact to rounding after as many iterations as H has distinct
    eigenvalues.

    They end where the residual is within rounding of zero, ten times the precision of v relative to its length, or
    where a direction has no curvature beyond rounding: what is left is then rounding, or outside the range of H, and
    further iterations would only enlarge it. Too few iterations leave the directions of the least eigenvalues out.

    Cost: one product per iteration; on an accelerator those after the end too, so that the host need not wait. Raises:
    :class:`metapl.MetaplError` for negative curvature along a direction.
    """
    rounding = 10 * max(torch.finfo(t.dtype).eps for t in v.values())
    x = scaled(v, 0.0)
    r, p = v, v
    rr = first = dot(r, r)
    tiny = torch.finfo(rr.dtype).tiny
    largest = torch.zeros_like(rr)
    ended = rr <= 0
    for number in range(iterations):
        if not checks.waits(ended) and bool(ended):
            break
        q = _plus(product(p), p, damping)
        curvature, p_norm, q_norm = dot(p, q), norm(p), norm(q)
        checks.refuse(
            ~q_norm.isfinite() & ~ended,
            f"a product of Implicit's conjugate gradients is not finite in {_types(v)}: damping={damping:g} is too "
            "large for it, or the student has diverged; expected a damping of about the size of the eigenvalues of the "
            "inner loss's second derivative, such as 0.01.",
        )
        largest = torch.maximum(largest, q_norm / p_norm.clamp_min(tiny))  # at most the greatest eigenvalue
        flat = curvature <= rounding * p_norm * q_norm
        negative = flat if number == 0 else curvature < -rounding * largest * p_norm**2  # v itself must be curved
        checks.refuse(
            negative & ~ended,
            "the inner loss has no positive curvature along a direction that conjugate gradients take, so the student "
            "is not near an optimum of it; train it longer, add a penalty on its weights to the inner loss, or give "
            'Implicit a larger damping, or solver="neumann" or "identity".',
        )
        ended = ended | flat
        alpha = torch.where(ended, 0.0, rr / curvature.clamp_min(tiny))
        x, r = _plus(x, p, alpha), _plus(r, q, -alpha)
        rr, before = dot(r, r), rr
        ended = ended | (rr <= rounding**2 * first)
        p = _plus(r, p, torch.where(ended, 0.0, rr / before.clamp_min(tiny)))
    return x


def neumann(product: Product, v: Tree, iterations: int, step_size: float, damping: float) -> Tree:
    """The Neumann series step_size·Σ_i (1 − step_size·(H + damping))ⁱ v, i = 0, …, iterations, for step_size below
    2/λ_max.

    Cost: one product per iteration. Raises: :class:`metapl.MetaplError` where the series diverges.
    """
    x = term = scaled(v, step_size)
    for _ in range(iterations):
        term = _plus(term, _plus(product(term), term, damping), -step_size)
        x = _plus(x, term, 1.0)
    checks.refuse(
        ~(norm(term) <= step_size * norm(v)),  # a series that overflows is NaN in the end
        f"the Neumann series diverges with step_size={step_size:g} and damping={damping:g}: its last term is longer "
        "than its first. Give Implicit a step_size below 2 over the greatest eigenvalue of the inner loss's second "
        "derivative plus damping; where that loss curves downwards, a larger damping, or a student that is nearer to "
        "an optimum of it.",
    )
    return x


def _plus(a: Tree, b: Tree, factor: Tensor | float) -> Tree:
    if isinstance(factor, Tensor):
        return {name: t + factor.to(t.dtype) * b[name] for name, t in a.items()}
    return {name: t + factor * b[name] for name, t in a.items()}


def _types(tree: Tree) -> str:
    return " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tree.values()}))
