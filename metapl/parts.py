"""The parts of a network, and the parameters that it learns."""

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
