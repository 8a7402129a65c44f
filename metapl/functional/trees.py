"""Products and moves of trees of weights, by operations that every transform has rules for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metapl.execution.numerics import Tree, as_real, wide
from metapl.feedback.difference import RELATIVE_STEP
from metapl.updates import Options, Update, as_taken


def dot(a: Tree, b: Tree) -> Tensor:
    """⟨a, b⟩ over trees of tensors."""
    return torch.stack([(wide(as_real(a[name])) * wide(as_real(b[name]))).sum() for name in a]).sum()


def norm(a: Tree) -> Tensor:
    return dot(a, a).sqrt()


def moves(mode: Any, theta: Tree, w: Tree) -> tuple[Tree, Tree, Tensor]:
    """θ + δŵ, θ − δŵ (or θ), and their distance in units of w; see :class:`metapl.feedback.Difference`."""
    at = {name: wide(t) for name, t in theta.items()}
    dtype, count = as_real(next(iter(at.values()))).dtype, sum(t.numel() for t in at.values())
    r = getattr(mode, "relative_step", None) or RELATIVE_STEP[dtype]
    factor = r * (norm(at) / math.sqrt(count)).clamp_min(1e-3) / norm(w).clamp_min(torch.finfo(dtype).tiny)
    ahead = {name: t + factor * w[name] for name, t in at.items()}
    if getattr(mode, "one_sided", False):
        return ahead, at, factor
    return ahead, {name: t - factor * w[name] for name, t in at.items()}, 2 * factor


def taken(update: Update, theta: Tree, end: Any, s: Any, options: Options) -> tuple[Tree, Any, Tensor]:
    """θ′ and s′ as the optimizer's own steps on the gradients of a walk leave them, and their distance from its θ′
    relative to its length; those of the walk where steps are not rounded."""
    if not update.rounded:
        return end.theta, end.s, 0 * end.losses[0]
    at = theta
    for g in end.g:
        at, s = update.update(at, g, s, as_taken(options))
    gap, length = (norm({n: t - end.theta[n] for n, t in tree.items()}) for tree in (at, theta))
    return at, s, gap / length.clamp_min(torch.finfo(length.dtype).tiny)
