"""Forward passes through ``torch.compile``, with the same random numbers as eager passes.

Feedback passes use the inner pass's dropout masks, and not all of them can be compiled (forward-mode AD cannot).
Inductor's own generator draws other masks; with ``fallback_random`` its graphs draw from PyTorch's. The first pass of a
network, with and without a graph, is compared with an eager one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.buffers import Slots, State
from metapl.execution.rng import RandomState
from metapl.execution.writes import journal, weights_watched

# Inductor's options for every pass.
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": True}

_uncompiled: ContextVar[bool] = ContextVar("uncompiled", default=False)


class CompiledPasses:
    """Networks whose forward passes are compiled inside a block: there alone, ``forward`` of these instances is a
    compiled function, so parameter names, copies, checkpoints and evaluation are not affected."""

    def __init__(self, *networks: nn.Module) -> None:
        self.networks = networks
        self.forwards = [_CompiledForward(network) for network in networks]

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledPasses, self.networks

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Compile the networks' passes in this block; turn the compiler's errors into a :class:`metapl.MetaplError`."""
        if not self.forwards:
            yield
            return
        from torch._dynamo.exc import TorchDynamoException

        held = [vars(network) for network in self.networks]
        before = [slots.get("forward") for slots in held]
        for slots, forward in zip(held, self.forwards, strict=True):
            slots["forward"] = forward
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, TorchDynamoException) and "torch.compile" not in str(error):
                raise
            cause = getattr(error, "inner_exception", error)
            said = str(cause).strip().partition("\n")[0]
            raise MetaplError(
                f"torch.compile cannot run these networks ({type(cause).__name__}: {said}); leave compile out."
            ) from error
        finally:
            for slots, own in zip(held, before, strict=True):
                slots["forward"] = own
                if own is None:
                    del slots["forward"]


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run the passes in this block eagerly, such as those in forward mode."""
    token = _uncompiled.set(True)
    try:
        yield
    finally:
        _uncompiled.reset(token)


def runs_compiled(network: nn.Module) -> bool:
    """Whether a pass of a network would be compiled here."""
    return isinstance(vars(network).get("forward"), _CompiledForward) and not _uncompiled.get()


def refuse_compiled(**networks: nn.Module) -> None:
    """Refuse networks that are compiled already: their dropout masks would silently differ between passes."""
    for name, network in networks.items():
        for path, part in network.named_modules():
            own = part.forward
            wrapped = hasattr(own, "_torchdynamo_orig_callable") and not getattr(own, "_torchdynamo_disable", False)
            if wrapped or part._compiled_call_impl is not None:
                where = f"its submodule {path!r}" if path else "the module itself"
                raise MetaplError(
                    f"the {name} is compiled already ({where}), so passes that need the same dropout masks would see "
                    "different ones; expected the plain module and compile=True."
                )


class _CompiledForward:
    """A network's compiled forward pass, which replaces its ``forward`` in a block."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.eager: Callable[..., Any] = network.forward
        self.compiled: Callable[..., Any] | None = None
        self.checked: set[bool] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the network that is made in the block keeps its own forward.
        return getattr, (self.network, "forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _uncompiled.get():
            return self.eager(*args, **kwargs)
        if self.compiled is None:
            self.compiled = _compile(self.eager)
        with_graph = torch.is_grad_enabled()  # each has a compiled graph of its own
        if with_graph in self.checked:
            return self.compiled(*args, **kwargs)
        outputs = self._compared(self.compiled, *args, **kwargs)
        self.checked.add(with_graph)
        return outputs

    def _compared(self, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A compiled pass, compared with an eager one on the same draws, which changes nothing."""
        slots = Slots(self.network)
        start, state = RandomState.now(slots.parameters[0][2].device), State(slots.parts)
        parts = [(prefix, table, frozenset(table)) for prefix, table, _ in slots.by_part]
        # An activation checkpoint around this pass counts what it saves, and will run the compiled one alone again.
        unsaved = torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda t: t)
        watched = weights_watched(parts, f"compiled {type(self.network).__name__}", looking=True)
        try:
            with journal(state.parameters), unsaved, watched:
                expected = self.eager(*args, **kwargs)
        finally:
            state.parameters.put_back()
            state.restore()
        end = RandomState.now(start.device)
        start.restore()
        outputs = compiled(*args, **kwargs)
        if start.same(end):
            return outputs  # nothing is drawn
        alike = RandomState.now(start.device).same(end)
        for a, b in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(expected), strict=True):
            if isinstance(b, Tensor) and b.is_floating_point():
                a, b = a.detach(), b.detach()
                half = a.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(a.device.type)
                # Other masks change them more than rounding; NaN is left to other checks.
                alike = alike and not bool((a - b).norm() > (0.1 if half else 0.01) * b.norm())
        if not alike:
            raise MetaplError(
                f"the compiled {type(self.network).__name__} draws other random numbers, such as dropout masks, "
                "than the eager one, so the feedback would be wrong; leave compile out."
            )
        return outputs


def _compile(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    # Dynamo stores its graphs, and counts them against its limit, by code object, which networks of one class share.
    # This copy gives each network a code object of its own.
    call.__code__ = call.__code__.replace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # older releases warn while Inductor is imported
        # Static shapes do not depend on earlier batches, so a resumed run has the same graphs.
        return torch.compile(call, dynamic=False, options=OPTIONS)
