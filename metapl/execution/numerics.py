"""Products and norms over trees of parameters, never in half precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Tree = dict[str, Tensor]
HALF, DTYPE = {torch.float16, torch.bfloat16}, attrgetter("dtype")


def wide(t: Tensor) -> Tensor:
    """float32 or wider: losses and products are not taken in half precision."""
    return t.float() if t.dtype in HALF else t


def as_real(t: Tensor) -> Tensor:
    """Of complex numbers, their two parts: the weights over which autograd's gradients are."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def wide_list(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Numbers to take products of: real ones, in float32 or wider."""
    given = [*tensors]
    if any(map(Tensor.is_complex, given)):
        given = [as_real(t) for t in given]
    return given if HALF.isdisjoint(map(DTYPE, given)) else [wide(t) for t in given]


def in_type_of(network: nn.Module, t: Tensor) -> Tensor:
    """A tensor in the type of a network's weights, which is that of the first; as it is where there is none."""
    weight = next((p for p in network.parameters() if p.is_floating_point()), None)
    return t if weight is None else t.to(weight.dtype)


def wide_tree(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, wide, tree)


def scaled(tree: Tree, factor: float | Tensor) -> Tree:
    return {name: factor * t for name, t in tree.items()}


class Space:
    """Products of trees of weights, here of trees that this process holds whole."""

    def dot(self, a: Tree, b: Tree) -> Tensor:
        """⟨a, b⟩ over the parameters that both have, a scalar."""
        return self._flat(a, b).sum()

    def norm(self, a: Tree) -> Tensor:
        """‖a‖ over all parameters, a scalar."""
        total: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(wide_list(a.values()))))
        return total

    def slope(self, a: Tree, b: Tree) -> tuple[Tensor, Tensor]:
        """⟨a, b⟩, and the norm of its terms, to which its rounding is proportional."""
        flat = self._flat(a, b)
        return flat.sum(), torch.linalg.vector_norm(flat)

    def _flat(self, a: Tree, b: Tree) -> Tensor:
        if a.keys() != b.keys():
            a = {name: t for name, t in a.items() if name in b}
        terms = torch._foreach_mul(wide_list(a.values()), wide_list(map(b.__getitem__, a)))
        # Gradients of embeddings may be sparse.
        return torch.cat([t.to_dense().flatten() if t.is_sparse else t.flatten() for t in terms])

    def count(self, a: Tree) -> int:
        return sum(t.numel() for t in a.values())


WHOLE = Space()  # trees that this process holds whole


def mean_tree(trees: Sequence[Tree]) -> Tree:
    """The mean of trees, in which a parameter that is missing counts as zero."""
    if len(trees) == 1:
        return trees[0]
    names = dict.fromkeys(name for tree in trees for name in tree)
    return {name: torch.stack([tree[name] for tree in trees if name in tree]).sum(0) / len(trees) for name in names}


_BACKENDS: Any = torch.backends  # whose stubs lack some of these
_SWITCHES: dict[str, list[Any]] = {
    "cuda": [_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn],
    "cpu": [_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn],
}


def reduced_float32(device: torch.device) -> bool:
    """Whether PyTorch may round the factors of float32 products on ``device`` (TF32 on CUDA, bf16 on CPU)."""
    return any(switch.fp32_precision not in ("none", "ieee") for switch in _SWITCHES.get(device.type, ()))


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """float32 products in float32; the settings are put back as they were."""
    switches = _SWITCHES[device.type] if reduced_float32(device) else []
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
