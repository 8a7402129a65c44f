"""The parts of a network, the parameters that it learns, and what it drops at random."""

from __future__ import annotations

from torch import Tensor, nn


def named_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The submodules and the module itself, once each, with the prefix of the names of their tensors.

    Every step looks at the networks anew, and for a small one ``named_modules`` takes as long as a pass.
    """
    found: list[tuple[str, nn.Module]] = []
    _collect(module, "", set(), found)
    return found


def _collect(module: nn.Module, prefix: str, known: set[nn.Module], found: list[tuple[str, nn.Module]]) -> None:
    if module in known:
        return
    known.add(module)
    found.append((prefix, module))
    for name, part in module._modules.items():
        if part is not None:
            _collect(part, f"{prefix}{name}.", known, found)


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers, by name; one that is held in several places comes several times."""
    found: list[tuple[str, Tensor]] = []
    for prefix, part in named_parts(module):
        for name, t in (*part._parameters.items(), *part._buffers.items()):
            if t is not None:
                found.append((prefix + name, t))
    return found


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module learns, by name; one that is held in several places has its first name."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, part in named_parts(module):
        for name, p in part._parameters.items():
            if p is not None and p.requires_grad:
                found.setdefault(id(p), (f"{prefix}{name}", p))
    return dict(found.values())


def drop_rate(layer: nn.Module) -> float:
    """How much a layer drops at random in training: dropout and stochastic depth of torch, torchvision and timm, by the
    names of their classes, and attention, which has a rate of its own; 0 for any other layer.

    >>> drop_rate(nn.Dropout(0.5)), drop_rate(nn.MultiheadAttention(4, 2, dropout=0.1)), drop_rate(nn.Linear(2, 2))
    (0.5, 0.1, 0.0)
    """
    if isinstance(layer, nn.MultiheadAttention):
        return float(layer.dropout)
    kind = type(layer).__name__.lower()
    if not isinstance(layer, nn.modules.dropout._DropoutNd) and "drop" not in kind and "stochasticdepth" not in kind:
        return 0.0
    return float(getattr(layer, "p", getattr(layer, "drop_prob", 0.0)) or 0.0)


def may_drop_by_function(part: nn.Module) -> bool:
    """Whether a module has a ``drop_rate``, as those of timm's networks have that call dropout as a function.

    Others of timm's keep the number beside a dropout layer, so it is no proof.
    """
    rate = getattr(part, "drop_rate", 0.0)
    return isinstance(rate, int | float) and rate > 0
