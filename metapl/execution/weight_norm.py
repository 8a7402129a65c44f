r"""Weight norm by its formula, in passes that are differentiated twice or in forward mode.

.. math:: w = g\, \frac{v}{\|v\|}

PyTorch computes it by one kernel, ``_weight_norm_interface``, whose second derivative takes the
norm that the first one has saved for a constant (``torch.autograd.gradgradcheck`` finds it), and
which has no forward mode. Its value and its first derivative are right. So a module's parts that
have a weight norm of ``torch.nn.utils.parametrizations`` are exchanged for these by the tables that
hold them, as its weights are. The old one, of ``torch.nn.utils``, is refused
(:func:`metapl.execution.layout.layouts`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

# PyTorch's own, which its public function puts into a parametrization.
_Parametrization: Any = parametrizations._WeightNorm


def by_formula(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """Return g v/‖v‖, with a norm for each index of ``dim``; -1: one norm for all."""
    # Over all dimensions at once, for the forward mode of ``torch.norm_except_dim`` fails where it
    # takes one norm.
    others = [i for i in range(v.ndim) if i != dim]
    norm: Tensor = torch.linalg.vector_norm(v, 2, others, keepdim=True)
    return v * (g / norm)


class Composite(nn.Module):
    """The formula in the place of a parametrization."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return by_formula(weight_v, weight_g, self.dim)


class Formula(NamedTuple):
    """A weight norm, and what computes it by the formula in its place.

    Attributes:
        parent: the part that holds it.
        name: of the weight norm in its parent.
        stand_in: what computes the weight by the formula.
    """

    parent: nn.Module
    name: str
    stand_in: Composite

    def slot(self) -> tuple[dict[str, Any], str, Any]:
        """Return the place as a table and a name, with the formula."""
        return self.parent._modules, self.name, self.stand_in


def formulas_of(part: nn.Module) -> list[Formula]:
    """Return the weight norms among the children of a part of a network."""
    formulas: list[Formula] = []
    children: dict[str, Any] = part._modules
    for name, child in children.items():
        if type(child) is _Parametrization:
            formulas.append(Formula(part, name, stand_in=Composite(child.dim)))
    return formulas
