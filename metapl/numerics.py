"""Products and norms over trees of parameters, never in half precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = dict[str, Tensor]


def wide(t: Tensor) -> Tensor:
    """float32 or wider: losses and products are not taken in half precision."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def wide_tree(tree: Any) -> Any:
    """:func:`wide` on every tensor of a pytree."""
    return pytree.tree_map_only(Tensor, wide, tree)


def dot(a: Tree, b: Tree) -> Tensor:
    """⟨a, b⟩ over the parameters that both have, a scalar."""
    return torch.stack([(wide(a[name]) * wide(b[name])).sum() for name in a if name in b]).sum()


def norm(a: Tree) -> Tensor:
    """‖a‖ over all parameters, a scalar."""
    norms: list[Tensor] = list(torch._foreach_norm([wide(t) for t in a.values()]))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
