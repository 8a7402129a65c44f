"""Groups of parameters for optimisers."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from metapl.errors import MetaplError

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(module: nn.Module, weight_decay: float, *, on_norms: bool = False) -> list[dict[str, Any]]:
    """Split a network's parameters by whether weight decay acts on them, for ``torch.optim``.

    Without ``on_norms``, decay leaves alone what is a vector or a single number (biases, scales and shifts of norms,
    layer scales) and every parameter of a norm layer whatever its shape: shrinking these does not make the function
    simpler, and they are few.

    Args:
        module: the network.
        weight_decay: λ of the decayed parameters, 0 or more.
        on_norms: decay every parameter alike.

    Returns:
        One or two groups ``{"params": [...], "weight_decay": λ}`` in the order of ``module.parameters()``; the decayed
        one first, none of them empty.

    Raises:
        MetaplError: a weight decay below 0.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> [(len(g["params"]), g["weight_decay"]) for g in parameter_groups(net, 5e-4)]
    [(1, 0.0005), (3, 0.0)]
    """
    if not weight_decay >= 0:
        raise MetaplError(f"parameter_groups got weight_decay={weight_decay}; expected a number of 0 or more.")
    if on_norms:
        return [{"params": list(module.parameters()), "weight_decay": weight_decay}]
    of_norms = {id(p) for m in module.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    is_spared = {p: p.ndim <= 1 or id(p) in of_norms for p in module.parameters()}
    decays = ((False, weight_decay), (True, 0.0))
    groups = [{"params": [p for p in is_spared if is_spared[p] == spared], "weight_decay": w} for spared, w in decays]
    return [group for group in groups if group["params"]]
