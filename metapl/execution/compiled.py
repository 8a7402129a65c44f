"""Forward passes by ``torch.compile``, with the draws of plain ones.

Feedback passes see the inner pass's dropout masks, and not all of them can be compiled (forward-mode AD cannot), so
compiled and plain passes must draw alike. Inductor's own generator draws other masks; with ``fallback_random`` its
graphs draw from PyTorch's. Whether this holds is looked at on the first pass of a network with and without a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.buffers import nothing_moved
from metapl.execution.rng import RandomState

OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": True}
"""Inductor's, for every pass."""

_uncompiled: ContextVar[bool] = ContextVar("uncompiled", default=False)


class CompiledPasses:
    """Networks whose forward passes are compiled for as long as a block runs.

    The networks stay the plain modules that they are: inside the block ``forward`` of these instances is a compiled
    one, outside it their own. So names of weights, copies, files and evaluation know nothing of it.

    Args:
        networks: plain modules; none: nothing is compiled.
    """

    def __init__(self, *networks: nn.Module) -> None:
        self.networks = networks
        self.forwards = [_CompiledForward(network) for network in networks]

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledPasses, self.networks

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Compile what runs in this block; what the compiler refuses becomes an error that says so."""
        if not self.forwards:
            yield
            return
        with _explained(), ExitStack() as stack:
            for forward in self.forwards:
                stack.enter_context(forward.in_place())
            yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Plain passes, for what has no compiled form."""
    token = _uncompiled.set(True)
    try:
        yield
    finally:
        _uncompiled.reset(token)


def refuse_compiled(**networks: nn.Module) -> None:
    """Refuse networks that were compiled already: their dropout masks would differ between passes, in silence."""
    for name, network in networks.items():
        for path, part in network.named_modules():
            if _is_compiled(part):
                where = f"its part {path!r} is" if path else "it is"
                raise MetaplError(
                    f"the {name} was compiled already ({where}); expected the plain module and compile=True. Compiled "
                    "beforehand, passes that must see the same dropout masks would see others."
                )


class _CompiledForward:
    """A network's compiled forward pass, to stand in for its own."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.plain: Callable[..., Any] = network.forward
        self.compiled: Callable[..., Any] | None = None
        self.looked_at: set[bool] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the network that is made meanwhile has its own plain pass.
        return getattr, (self.network, "forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _uncompiled.get():
            return self.plain(*args, **kwargs)
        if self.compiled is None:
            self.compiled = _compile(self.plain)
        with_graph = torch.is_grad_enabled()  # other graphs, which may be optimized otherwise
        if with_graph not in self.looked_at:
            outputs = self._compared(self.compiled, *args, **kwargs)
            self.looked_at.add(with_graph)
            return outputs
        return self.compiled(*args, **kwargs)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Be the network's forward pass."""
        own = vars(self.network)
        before = own.get("forward")
        own["forward"] = self
        try:
            yield
        finally:
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before

    def _compared(self, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A compiled pass, after a plain one on the same draws, of which nothing stays."""
        start = RandomState.now(next(self.network.parameters()).device)
        with nothing_moved(self.network, on_success=True):
            expected = self.plain(*args, **kwargs)
        end = RandomState.now(start.device)
        start.restore()
        found = compiled(*args, **kwargs)
        if not start.same(end) and not (RandomState.now(start.device).same(end) and _alike(found, expected)):
            raise MetaplError(
                f"the compiled {type(self.network).__name__} draws other random numbers (dropout masks, say) than the "
                "plain one, so the feedback would be wrong; leave compile out."
            )
        return found


def _compile(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    # Dynamo keeps its graphs, and counts them against its limit, by code object; all forwards of torch.nn have one in
    # common, and those of a teacher and a student of one class too. This one has its own.
    call.__code__ = call.__code__.replace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # older releases warn of themselves as Inductor is loaded
        # By the shapes alone, whatever came before: a run that is resumed has the same graphs again.
        return torch.compile(call, dynamic=False, options=OPTIONS)


def _alike(found: Any, expected: Any) -> bool:
    """Equal to rounding; other masks change more."""
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    return not any(_differ(a.detach(), b) for a, b in pairs if isinstance(b, Tensor) and b.is_floating_point())


def _differ(a: Tensor, b: Tensor) -> bool:
    half = a.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(a.device.type)
    return bool((a - b).norm() > (0.1 if half else 0.01) * b.norm())  # not where they are NaN


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what the compiler raises into an error that says how to do without it."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, TorchDynamoException) and "torch.compile" not in str(error):
            raise
        cause = getattr(error, "inner_exception", error)
        what = next(iter(str(cause).strip().splitlines()), "")
        raise MetaplError(
            f"torch.compile cannot run these networks ({type(cause).__name__}: {what}); leave compile out."
        ) from error


def _is_compiled(module: nn.Module) -> bool:
    forward = module.forward
    wrapped = hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)
    return wrapped or module._compiled_call_impl is not None
