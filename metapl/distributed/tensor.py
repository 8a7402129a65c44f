"""Products that several processes compute together, each with a part of the weights of a layer.

Of two linear layers with activations between them, the first is cut by its outputs and the second by its inputs: what
is between them is cut too, and one sum over the processes ends the pair. Everything else is whole in every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from metapl.distributed.dropout import KeyedDropout
from metapl.errors import MetaplError, few
from metapl.execution.modules import named_parts

Plan = Mapping[str, Any]
"""How the products of layers are shared, by their names: as ``parallelize_module`` takes it."""

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Identity,
)  # fmt: skip
"""Layers that work on each number by itself."""


class Pair(NamedTuple):
    """Two linear layers, and what is between them; each layer with its name."""

    first: tuple[str, nn.Linear]
    between: list[tuple[str, nn.Module]]
    second: tuple[str, nn.Linear]


def pairs_of(module: nn.Module) -> list[tuple[str, str]]:
    """The names of pairs of linear layers with activations and dropout between them.

    Found in ``Sequential`` modules, such as the blocks of torchvision's vision transformers, and in timm's ``Mlp``.

    >>> import metapl
    >>> pairs_of(metapl.models.mlp([4, 8, 8, 3])), pairs_of(metapl.models.small_cnn())
    ([('1', '3')], [])
    """
    return [(pair.first[0], pair.second[0]) for pair in _pairs(module)]


def parallel(module: nn.Module, mesh: Any, plan: Plan | None = None) -> nn.Module:
    """Let the processes of a mesh compute products together; the parameters become DTensors where they are.

    Args:
        module: a network, the same in every process.
        mesh: of one dimension.
        plan: by default, of every pair of :func:`pairs_of`.

    Raises:
        MetaplError: there is no such pair, the processes do not divide the width between two layers, or some of it is
            dropped; or the plan names a layer that there is not. Nothing is changed.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    pairs = list(_pairs(module))
    if plan is None:
        _check_pairs(module, pairs, mesh.size())
        plan = {pair.first[0]: ColwiseParallel() for pair in pairs}
        plan |= {pair.second[0]: RowwiseParallel() for pair in pairs}
    names = [name for name, _ in module.named_modules()]
    unknown = [key for key in plan if not any(fnmatchcase(name, key) for name in names)]
    if unknown:
        raise MetaplError(f"plan names {few(unknown)}, and the network has no such layer; expected names of its own.")
    for pair in pairs:
        if all(any(fnmatchcase(name, key) for key in plan) for name, _ in (pair.first, pair.second)):
            for part in [part for _, part in pair.between if isinstance(part, KeyedDropout)]:
                part.part, part.parts = mesh.get_local_rank(), mesh.size()
    return parallelize_module(module, mesh, dict(plan))


def _pairs(module: nn.Module) -> Iterator[Pair]:
    for prefix, part in named_parts(module):
        if isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward:
            yield from _in_a_row([(f"{prefix}{name}", layer) for name, layer in part.named_children()])
        elif type(part).__name__ == "Mlp" and type(part).__module__.startswith("timm."):
            order = ("fc1", "act", "drop1", "norm", "fc2")
            yield from _in_a_row([(f"{prefix}{name}", part.get_submodule(name)) for name in order])


def _in_a_row(layers: Sequence[tuple[str, nn.Module]]) -> Iterator[Pair]:
    """The pairs among layers that run one after another; none is in two."""
    first: tuple[str, nn.Linear] | None = None
    between: list[tuple[str, nn.Module]] = []
    for name, layer in layers:
        if type(layer) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
            linear: Any = layer
            if first is None:
                first, between = (name, linear), []
            else:
                yield Pair(first, between, (name, linear))
                first = None
        elif type(layer) in (nn.Dropout, KeyedDropout) or type(layer) in _ACTIVATIONS:
            between.append((name, layer))
        else:
            first = None


def _check_pairs(module: nn.Module, pairs: Sequence[Pair], processes: int) -> None:
    if not pairs:
        raise MetaplError(
            f"mesh.tensor={processes}: a {type(module).__name__} has no two linear layers with an activation between "
            "them, whose products several processes could compute together; expected such a network (mlp, vit_b_16, "
            "timm:vit_tiny_patch16_224), a plan= for parallelize_module, or more of mesh.shard in the place of "
            "mesh.tensor (mesh.spatial for convolutions). A teacher that has nothing to cut, beside a student that is "
            "cut: shard(teacher, Mesh(replicate=...)) over as many processes."
        )
    for pair in pairs:
        name, layer = pair.first
        if layer.out_features % processes:
            raise MetaplError(
                f"mesh.tensor={processes} does not divide the {layer.out_features} outputs of {name}; expected a "
                "divisor of them."
            )
        for inside, part in pair.between:
            if isinstance(part, nn.Dropout) and part.p:
                raise MetaplError(
                    f"{inside} drops some of what {processes} processes compute together, and all would drop alike; "
                    "call metapl.distributed.keyed_dropout(network, mesh.share) before the network is laid out, or "
                    "leave dropout out."
                )
