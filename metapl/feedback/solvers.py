"""Solutions of (H + damping) x = v, from products with H alone, over trees of parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metapl import checks
from metapl.numerics import Tree, dot, norm

Product = Callable[[Tree], Tree]


def conjugate_gradient(product: Product, v: Tree, iterations: int, damping: float) -> Tree:
    """Conjugate gradients, for a positive definite H + damping: exact after as many iterations as H has distinct
    eigenvalues.

    Cost: one product per iteration. Raises: :class:`metapl.MetaplError` for negative curvature along a direction.
    """
    x = _scaled(v, 0.0)
    r, p = v, v
    rr = dot(r, r)
    for _ in range(iterations):
        q = _plus(product(p), p, damping)
        curvature = dot(p, q)
        checks.refuse(
            (curvature <= 0) & (rr > 0),
            "the inner loss has no positive curvature along a direction that conjugate gradients take, so the student "
            "is not near an optimum of it; train it longer, add a penalty on its weights to the inner loss, or give "
            'Implicit a larger damping, or solver="neumann" or "identity".',
        )
        alpha = torch.where(curvature > 0, rr / curvature.clamp_min(torch.finfo(rr.dtype).tiny), 0.0)
        x, r = _plus(x, p, alpha), _plus(r, q, -alpha)
        rr, before = dot(r, r), rr
        p = _plus(r, p, torch.where(before > 0, rr / before.clamp_min(torch.finfo(rr.dtype).tiny), 0.0))
    return x


def neumann(product: Product, v: Tree, iterations: int, step_size: float, damping: float) -> Tree:
    """The Neumann series step_size·Σ_i (1 − step_size·(H + damping))ⁱ v, for step_size below 2/λ_max.

    Cost: one product per iteration. Raises: :class:`metapl.MetaplError` where the series diverges.
    """
    x = term = _scaled(v, step_size)
    for _ in range(iterations):
        term = _plus(term, _plus(product(term), term, damping), -step_size)
        x = _plus(x, term, 1.0)
    checks.refuse(
        norm(term) > step_size * norm(v),
        f"the Neumann series diverges: its last term is longer than its first. Give Implicit a step_size below "
        f"{step_size:g}, a larger damping, or a student that is nearer to an optimum of the inner loss.",
    )
    return x


def _scaled(tree: Tree, factor: float) -> Tree:
    return {name: factor * t for name, t in tree.items()}


def _plus(a: Tree, b: Tree, factor: Tensor | float) -> Tree:
    if isinstance(factor, Tensor):
        return {name: t + factor.to(t.dtype) * b[name] for name, t in a.items()}
    return {name: t + factor * b[name] for name, t in a.items()}
