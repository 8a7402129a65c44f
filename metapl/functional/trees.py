"""Products and moves of trees of weights, by operations that every transform has rules for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metapl.execution.numerics import Tree, as_real, wide
from metapl.feedback.difference import RELATIVE_STEP


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
