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

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

# PyTorch's own, which its public function puts into a parametrization.
_Parametrization: Any = parametrizations._WeightNorm


class Composite(nn.Module):
    """The formula in the place of a parametrization.

    Args:
        dim: the dimension that has a norm for each of its indices; -1: one norm for all.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        # Over all dimensions at once, for the forward mode of ``torch.norm_except_dim`` fails where
        # it takes one norm.
        others = [i for i in range(weight_v.ndim) if i != self.dim]
        norm: Tensor = torch.linalg.vector_norm(weight_v, 2, others, keepdim=True)
        return weight_v * (weight_g / norm)


def formulas_of(part: nn.Module) -> list[tuple[dict[str, Any], str, Composite]]:
    """Return the places of the weight norms among the children of a part of a network.

    They are slots of :mod:`metapl.execution.state`: a table and a name, with the formula.
    """
    formulas: list[tuple[dict[str, Any], str, Composite]] = []
    children: dict[str, Any] = part._modules
    for name, child in children.items():
        if type(child) is _Parametrization:
            formulas.append((children, name, Composite(child.dim)))
    return formulas
