r"""Weight norm by its formula, in passes that are differentiated twice or in forward mode.

.. math:: w = g\, \frac{v}{\|v\|}

PyTorch computes it by one kernel, ``_weight_norm_interface``, whose second derivative takes the
norm that the first one has saved for a constant (``torch.autograd.gradgradcheck`` finds it), and
which has no forward mode. Its value and its first derivative are right. So a module's parts that
have a weight norm, of ``torch.nn.utils.parametrizations`` or the old one of ``torch.nn.utils``, are
exchanged for these by the tables that hold them, as its weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm

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


def computed_by_formula(hook: WeightNorm) -> Callable[[nn.Module], Tensor]:
    """Return the formula in the place of ``compute_weight`` of the old weight norm's hook.

    The hook puts a weight into its module before each pass.
    """

    def compute_weight(module: nn.Module) -> Tensor:
        v = getattr(module, f"{hook.name}_v")
        g = getattr(module, f"{hook.name}_g")
        return by_formula(v, g, dim=hook.dim)

    return compute_weight


class Formula(NamedTuple):
    """A place that leads to a weight norm, and what computes it by the formula there.

    Attributes:
        owner: a module, or a hook.
        name: of a part of the module, or of a method of the hook.
        stand_in: what computes the weight by the formula.
    """

    owner: Any
    name: str
    stand_in: Any

    def slot(self) -> tuple[dict[str, Any], str, Any]:
        """Return the place as a table and a name, with the formula.

        A hook's table is its attributes, among which a method of its class is not found.
        """
        if isinstance(self.owner, nn.Module):
            return self.owner._modules, self.name, self.stand_in
        return vars(self.owner), self.name, self.stand_in


def formulas_of(part: nn.Module) -> list[Formula]:
    """Return the places in a part of a network, and in its hooks, that lead to a weight norm."""
    formulas: list[Formula] = []
    children: dict[str, Any] = part._modules
    for name, child in children.items():
        if type(child) is _Parametrization:
            formulas.append(Formula(part, name, stand_in=Composite(child.dim)))
    for hook in part._forward_pre_hooks.values():
        if type(hook) is WeightNorm:
            compute_weight = computed_by_formula(hook)
            formulas.append(Formula(hook, "compute_weight", stand_in=compute_weight))
    return formulas


@contextmanager
def by_formulas(formulas: Sequence[Formula]) -> Iterator[None]:
    """Take the formulas in this block, by attributes.

    ``torch.compile`` does not see what is put into a table.
    """
    kernels = [getattr(formula.owner, formula.name) for formula in formulas]
    for formula in formulas:
        setattr(formula.owner, formula.name, formula.stand_in)
    try:
        yield
    finally:
        for formula, kernel in zip(formulas, kernels, strict=True):
            if isinstance(formula.owner, nn.Module):
                setattr(formula.owner, formula.name, kernel)
            else:
                # Then the method of the hook's class is found again.
                delattr(formula.owner, formula.name)


def weights_made_by_hooks(part: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Return the attributes into which the old weight norm puts the weight of each pass.

    Each as the table of the part's attributes, and a name.
    """
    return [
        (vars(part), hook.name)
        for hook in part._forward_pre_hooks.values()
        if type(hook) is WeightNorm
    ]
