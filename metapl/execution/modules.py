"""The parts of a network, the parameters that it learns, and what it drops at random."""

from __future__ import annotations

from torch import nn


def named_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """``named_modules`` with prefixes of the names of tensors, in a fraction of its time."""
    found: dict[nn.Module, str] = {}
    waiting = [("", module)]
    while waiting:
        prefix, part = waiting.pop()
        if part not in found:
            found[part] = prefix
            if part._modules:
                children = [(f"{prefix}{name}.", child) for name, child in part._modules.items() if child is not None]
                waiting += children[::-1]
    return [(prefix, part) for part, prefix in found.items()]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module learns, by name; one that is held in several places has its first name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def drop_rate(layer: nn.Module) -> float:
    """How much a layer drops at random in training, by the name of its class: dropout, stochastic depth, attention."""
    if isinstance(layer, nn.MultiheadAttention):
        return float(layer.dropout)
    kinds = " ".join(kind.__name__.lower() for kind in type(layer).__mro__)  # of subclasses too
    if "drop" not in kinds and "stochasticdepth" not in kinds:
        return 0.0
    return float(getattr(layer, "p", getattr(layer, "drop_prob", 0.0)) or 0.0)
