"""Which products of a network several processes can compute together: a plan for ``parallelize_module``."""

from __future__ import annotations

from typing import Any

from torch import nn

from metapl.errors import MetaplError

_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_BETWEEN = (  # layers that work on each number by itself
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.Dropout,
)  # fmt: skip


def products_of(module: nn.Module, parts: int) -> dict[str, Any]:
    """A plan for pairs of linear layers with activations between them, in ``Sequential`` modules and timm's ``Mlp``:
    the first is cut by its outputs and the second by its inputs. No layer is in two pairs; empty where there are none.

    Raises: :class:`metapl.MetaplError` for outputs that the parts do not divide, and for dropout between layers.

    >>> list(products_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 2))
    ['0', '2']
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    plan: dict[str, Any] = {}
    for path, part in module.named_modules():
        order: list[str] = []
        if isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward:
            order = [name for name, _ in part.named_children()]
        elif type(part).__name__ == "Mlp" and type(part).__module__.startswith("timm."):
            order = ["fc1", "act", "drop1", "norm", "fc2"]
        first, between = "", list[nn.Module]()  # the linear layer that a pair may begin with, and what came after it
        for name in order:
            layer = part.get_submodule(name)
            if type(layer) in _LINEAR and first:
                prefix, outputs = f"{path}." if path else "", part.get_submodule(first).out_features
                if outputs % parts:
                    raise MetaplError(f"mesh.tensor={parts} does not divide the {outputs} outputs of {prefix}{first}.")
                if any(isinstance(one, nn.Dropout) and one.p for one in between):
                    raise MetaplError(
                        f"mesh.tensor={parts}: dropout behind {prefix}{first} would drop alike in all of these "
                        "processes; expected a network without it."
                    )
                plan |= {prefix + first: ColwiseParallel(), prefix + name: RowwiseParallel()}
                first, between = "", []
            elif type(layer) in _LINEAR:
                first, between = name, []
            elif type(layer) in _BETWEEN:
                between.append(layer)
            else:
                first, between = "", []
    return plan
