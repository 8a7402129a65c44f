"""A module as a function of its parameters, its state and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metapl.execution.checks import logits
from metapl.execution.numerics import Tree, wide


class Network(NamedTuple):
    """The tensors of a network by name: its trainable parameters, and its state, the buffers and frozen parameters."""

    params: Tree
    state: Tree


def tensors_of(module: nn.Module | None) -> Network:
    """The tensors that a module holds, without a graph; of none, none."""
    named = {} if module is None else dict(module.named_parameters())
    params = {name: p.detach() for name, p in named.items() if p.requires_grad}
    state = {} if module is None else {**named, **dict(module.named_buffers())}
    return Network(params, {name: t.detach() for name, t in state.items() if name not in params})


# Whether PyTorch draws a transposed tensor in the order of its memory; with MKL, it does not.
_drawn = [
    t.bernoulli_(0.5, generator=torch.Generator().manual_seed(0)) for t in (torch.empty(8, 8), torch.empty(8, 8).t())
]
IN_MEMORY_ORDER = torch.equal(_drawn[0], _drawn[1].t())


class EagerMasks(TorchFunctionMode):
    """Dropout with the masks that it has without a transform, within which PyTorch draws them by dimensions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_dropout if func is F.dropout else func)(*args, **(kwargs or {}))


def _dropout(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not IN_MEMORY_ORDER or input.device.type != "cpu":
        return F.dropout(input, *args, **kwargs)
    order = sorted(range(input.dim()), key=input.stride, reverse=True)
    masked = F.dropout(input.permute(order), *args, **kwargs)
    return masked.permute([order.index(i) for i in range(input.dim())])


class Function(nn.Module):
    """Holds a network, so that a function of the *module*, its parts and methods, has a value at other tensors."""

    def __init__(self, module: nn.Module | None) -> None:
        super().__init__()
        self.module: Any = module

    def at(self, params: Tree, state: Tree, ask: Callable[[Any], Any]) -> tuple[Any, Tree]:
        """What ``ask(module)`` returns with these tensors in the module, and the state that it leaves."""
        if self.module is None:
            return ask(None), state
        held = params | {name: t.clone() for name, t in state.items()}  # a pass moves its state in place
        result: tuple[Any, Tree] = functional_call(self, {f"module.{n}": t for n, t in held.items()}, (ask, [*state]))
        return result

    def outputs(self, params: Tree, state: Tree, x: Any) -> tuple[Tensor, Tree]:
        """A student's outputs, (B, ...), and the state that it leaves."""
        z, left = self.at(params, state, lambda network: network(x))
        return wide(logits(z, "student")), left

    def forward(self, ask: Callable[[Any], Any], names: list[str]) -> tuple[Any, Tree]:
        with EagerMasks():
            answer, after = ask(self.module), dict(self.module.named_parameters())
        after.update(self.module.named_buffers())
        return answer, {name: after[name].detach() for name in names}
