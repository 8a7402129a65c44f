"""Clipping of the gradient's global norm, before another update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.numerics import WHOLE, Space, Tree
from metapl.updates.base import Cotangents, Parameters, Update


class Clipped(Update):
    r"""θ′ = U(θ, c(g)·g), c = min(1, m/(‖g‖ + 1e-6)), the rule of ``torch.nn.utils.clip_grad_norm_``.

    .. math:: w = c\,\tilde w - [c < 1]\, \frac{c}{\|g\| + 10^{-6}} \Big\langle \tilde w, \tfrac{g}{\|g\|} \Big\rangle g
              , \qquad \tilde w = (\partial U/\partial g)^\top v \text{ at } c\,g
    """

    def __init__(self, inner: Update, max_norm: float, space: Space = WHOLE) -> None:
        if not max_norm > 0:
            raise MetaplError(f"clip_norm={max_norm}: expected a number above 0, or None.")
        self.inner, self.max_norm, self.space = inner, max_norm, space

    @property
    def learning_rate(self) -> float | None:
        return self.inner.learning_rate

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self.inner.parameters

    def follow(self, parameters: Parameters) -> None:
        self.inner.follow(parameters)

    def read_state(self) -> Any:
        return self.inner.read_state()

    def update(self, params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        return self.inner.update(params, self._clip(grads), state)

    def pullback(self, params: Tree, grads: Tree, state: Any, v: Tree) -> Tree:
        return self._through_clip(self.inner.pullback(params, self._clip(grads), state, v), grads)

    def vjp(self, params: Tree, grads: Tree, state: Any, v: Tree, state_cotangent: Any = None) -> Cotangents:
        bar = self.inner.vjp(params, self._clip(grads), state, v, state_cotangent)
        return Cotangents(self._through_clip(bar.gradient, grads), bar.params, bar.state)

    def commit(self, parameters: Parameters, grads: Tree, moved: Callable[[], tuple[Tree, Any]]) -> None:
        self.inner.commit(parameters, self._clip(grads), moved)

    def write(self, parameters: Parameters, params: Tree, state: Any) -> None:
        self.inner.write(parameters, params, state)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def _scale(self, grads: Tree) -> tuple[Tensor, Tensor]:
        length = self.space.norm(grads)
        return (self.max_norm / (length + 1e-6)).clamp(max=1.0), length

    def _clip(self, grads: Tree) -> Tree:
        scale, _ = self._scale(grads)
        return {name: g * scale.to(g.dtype) for name, g in grads.items()}

    def _through_clip(self, w: Tree, grads: Tree) -> Tree:
        scale, length = self._scale(grads)
        along = torch.where(
            scale < 1, scale / (length + 1e-6) * self.space.dot(w, grads) / length, torch.zeros_like(scale)
        )
        clipped = {name: scale.to(t.dtype) * t for name, t in w.items()}
        return {n: t - along.to(t.dtype) * grads[n] if n in grads else t for n, t in clipped.items()}
