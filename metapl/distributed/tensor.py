"""Products that several processes compute together, each with a part of the weights of a layer.

Of two linear layers with activations between them, the first is cut by its outputs and the second by its inputs: what
is between them is cut too, and one sum over the processes ends the pair. Everything else is whole in every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from metapl.distributed.dropout import KeyedDropout
from metapl.errors import MetaplError, few
from metapl.execution.modules import named_parts

# How the products of layers are shared, by their names: as ``parallelize_module`` takes it.
Plan = Mapping[str, Any]

_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_BETWEEN = (  # layers that work on each number by itself
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.Dropout, KeyedDropout,
)  # fmt: skip


def pairs_of(module: nn.Module) -> list[tuple[str, str]]:
    """The names of pairs of linear layers with activations and dropout between them, in ``Sequential`` modules and in
    timm's ``Mlp``."""
    return [(first, second) for first, *_, second in _pairs(module)]


def parallel(module: nn.Module, mesh: Any, plan: Plan | None = None) -> nn.Module:
    """Let the processes of a mesh compute products together; the parameters become DTensors where they are."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    pairs, layers = list(_pairs(module)), dict(module.named_modules(remove_duplicate=False))
    if plan is None:
        if not pairs:
            raise MetaplError(
                f"mesh.tensor={mesh.size()}: a {type(module).__name__} has no two linear layers with an activation "
                "between them, whose products several processes could compute together; expected such a network (mlp, "
                "vit_b_16, timm:vit_tiny_patch16_224), a plan= for parallelize_module, or more of mesh.shard in the "
                "place of mesh.tensor (mesh.spatial for convolutions). A teacher that has nothing to cut, beside a "
                "student that is cut: shard(teacher, Mesh(replicate=...)) over as many processes."
            )
        for first, *between, _ in pairs:
            outputs = layers[first].out_features
            if outputs % mesh.size():
                raise MetaplError(
                    f"mesh.tensor={mesh.size()} does not divide the {outputs} outputs of {first}; expected a divisor."
                )
            if dropped := [name for name in between if isinstance(layers[name], nn.Dropout) and layers[name].p]:
                raise MetaplError(
                    f"{dropped[0]} drops some of what {mesh.size()} processes compute together, and all would drop "
                    "alike; call metapl.distributed.keyed_dropout(network, mesh.share) before the network is laid out, "
                    "or leave dropout out."
                )
        plan = {first: ColwiseParallel() for first, *_ in pairs} | {pair[-1]: RowwiseParallel() for pair in pairs}
    unknown = [key for key in plan if not any(fnmatchcase(name, key) for name in layers)]
    if unknown:
        raise MetaplError(f"plan names {few(unknown)}, and the network has no such layer; expected names of its own.")
    for pair in pairs:
        if all(any(fnmatchcase(name, key) for key in plan) for name in (pair[0], pair[-1])):
            for part in [layers[name] for name in pair]:
                if isinstance(part, KeyedDropout):
                    part.part, part.parts = mesh.get_local_rank(), mesh.size()
    return parallelize_module(module, mesh, dict(plan))


def _pairs(module: nn.Module) -> Iterator[list[str]]:
    """The names of two linear layers that run one after another, and between these, of what runs between them; no layer
    is in two pairs."""
    for prefix, part in named_parts(module):
        if isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward:
            order = [name for name, _ in part.named_children()]
        elif type(part).__name__ == "Mlp" and type(part).__module__.startswith("timm."):
            order = ["fc1", "act", "drop1", "norm", "fc2"]
        else:
            continue
        found: list[str] = []
        for name in order:
            kind = type(part.get_submodule(name))
            if kind in _LINEAR and found:
                yield [*found, prefix + name]
                found = []
            elif kind in _LINEAR or (found and kind in _BETWEEN):
                found.append(prefix + name)
            else:
                found = []
