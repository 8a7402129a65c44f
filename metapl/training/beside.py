"""What a network holds beside its ``state_dict()``, which checkpoints and the best student keep too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metapl.execution.modules import named_parts

_PLAIN = (int, float, bool, str, type(None))
_OF_MODULES = vars(nn.Module()).keys()  # what every module has: hooks, parameters, buffers, parts


class Beside:
    """What a network holds beside its ``state_dict()`` and changes in training, by name: the buffers that are not
    persistent, and the attributes of its modules that are numbers, texts, None or tensors, alone and in lists, tuples
    and dicts. Objects of other kinds, and tensors of a graph, are left alone.

    >>> network = nn.BatchNorm1d(1)
    >>> network.calls, beside = 0, Beside(network)
    >>> network.calls = 3
    >>> beside.changed()
    {'calls': 3}
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self._first = network, dict[str, Any]()
        self._first = self.changed()

    def changed(self) -> dict[str, Any]:
        """Copies, on the host, of what is other than it was at first."""
        first = self._first
        return {n: _copy(v) for n, v in self._held() if _kept(v) and not (n in first and _is_as(first[n], v))}

    def load(self, changed: Mapping[str, Any]) -> None:
        """Put back what was :meth:`changed`, in place where there is such a tensor or container, which others may hold
        too; what had not changed is as it was at first."""
        parts, held = dict(self.network.named_modules()), dict(self._held())
        device = next((p.device for p in self.network.parameters()), None)
        for name, value in {**self._first, **changed}.items():
            path, _, last = name.rpartition(".")
            own = held.get(name)
            if path in parts and _kept(own) and not (name in held and _is_as(own, value)):
                setattr(parts[path], last, _put(own, value, device))

    def _held(self) -> Iterator[tuple[str, Any]]:
        for prefix, part in named_parts(self.network):
            for name in part._non_persistent_buffers_set:
                yield prefix + name, part._buffers.get(name)
            yield from ((prefix + name, value) for name, value in vars(part).items() if name not in _OF_MODULES)


def _kept(value: Any) -> bool:
    """Whether a value is of the kinds that a checkpoint holds."""
    if isinstance(value, Tensor):
        plain = type(value) is Tensor and value.layout is torch.strided and not value.is_nested
        return plain and not (value.is_meta or value.is_quantized or value.grad_fn is not None)
    if type(value) in (list, tuple):
        return all(map(_kept, value))
    return type(value) in _PLAIN or (type(value) is dict and all(map(_kept, [*value, *value.values()])))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) is dict:
        return {key: _copy(element) for key, element in value.items()}
    return type(value)(map(_copy, value)) if type(value) in (list, tuple) else value


def _is_as(value: Any, other: Any) -> bool:
    if type(value) is not type(other):
        return False
    if isinstance(value, Tensor):
        alike = value.shape == other.shape and value.dtype == other.dtype
        return alike and torch.equal(value.to(other.device), other)
    if type(value) is dict:
        return value.keys() == other.keys() and all(_is_as(value[key], other[key]) for key in value)
    if type(value) in (list, tuple):
        return len(value) == len(other) and all(map(_is_as, value, other))
    return bool(value == other)


def _put(own: Any, value: Any, device: torch.device | None) -> Any:
    """A value that was copied, in what is there where that is of its kind."""
    if isinstance(value, Tensor):
        if isinstance(own, Tensor) and own.shape == value.shape and own.dtype == value.dtype and _is_writable(own):
            own.detach().copy_(value)
            return own
        return value.to(own.device if isinstance(own, Tensor) else device, copy=True)
    if type(value) is dict:
        found = {key: _put(None, element, device) for key, element in value.items()}
        if type(own) is dict:
            own.clear()
            own.update(found)
            return own
        return found
    if type(value) in (list, tuple):
        elements = [_put(None, element, device) for element in value]
        if type(value) is type(own) is list:
            own[:] = elements
            return own
        return type(value)(elements)
    return value


def _is_writable(t: Tensor) -> bool:
    return not t.is_inference() and all(n < 2 or by for n, by in zip(t.shape, t.stride(), strict=True))
