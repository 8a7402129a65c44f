"""A module as a function of its parameters, its state and its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from metapl.execution.numerics import Tree


class Network(NamedTuple):
    """The tensors of a network by name: its trainable parameters, and its state, the buffers and frozen parameters."""

    params: Tree
    state: Tree


def tensors_of(module: nn.Module | None) -> Network:
    """The tensors that a module holds, without a graph; of none, none."""
    named = {} if module is None else dict(module.named_parameters())
    state = {} if module is None else dict(module.named_buffers())
    params = {name: p.detach() for name, p in named.items() if p.requires_grad}
    return Network(params, {name: t.detach() for name, t in {**named, **state}.items() if name not in params})


class Function(nn.Module):
    """A network, held by a module, so that a function of the *module* can be evaluated at any tensors.

    ``functional_call`` runs the holder, whose ``forward`` runs that function: within it the module's parameters,
    submodules and attributes are what the function asks for, whatever methods of the module it calls.
    """

    def __init__(self, module: nn.Module | None) -> None:
        super().__init__()
        self.module = module

    def at(self, params: Tree, state: Tree, ask: Callable[[Any], Any]) -> tuple[Any, Tree]:
        """What ``ask(module)`` returns with these tensors in the module, and the state that it leaves."""
        if self.module is None:
            return ask(None), state
        # Copies of the state, since a pass moves it in place.
        held = {**params, **{name: t.clone() for name, t in state.items()}}
        result: tuple[Any, Tree] = functional_call(self, {f"module.{n}": t for n, t in held.items()}, (ask, [*state]))
        return result

    def forward(self, ask: Callable[[Any], Any], names: list[str]) -> tuple[Any, Tree]:
        answer = ask(self.module)
        after: dict[str, Tensor] = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}  # type: ignore[union-attr]
        return answer, {name: after[name].detach() for name in names}
