"""What is said of a network that fails by how its inputs are given, or by their type."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few, reason_of
from metapl.execution.checks import described

# How PyTorch names the types of whole numbers, of which a layer reads no inputs.
_WHOLE = re.compile(r"\b(long|int|short|byte|char|bool)\b", re.IGNORECASE)
_CALLS = {"float32": "float()", "float64": "double()", "float16": "half()"}


def shape_of(leaf: object) -> str:
    """Return the shape of a tensor in words, without a type that may be that of a check alone."""
    if not isinstance(leaf, Tensor) or leaf.is_nested:
        return described(leaf)
    device = "" if leaf.is_cpu else f" on {leaf.device}"
    return f"tensor {tuple(leaf.shape)}{device}"


def explain_call(network: nn.Module, inputs: object, error: Exception, role: str) -> None:
    """Raise that a network's forward takes several arguments, or another type of numbers.

    Return with a note in the error where it may have failed for another reason.

    Args:
        network: that has failed.
        inputs: its one argument.
        error: what it has raised.
        role: of the network, and which batch it reads.

    Raises: :class:`metapl.MetaplError`.
    """
    kind = type(network).__name__
    if isinstance(error, MetaplError) or getattr(error, "__notes__", None):
        return
    if isinstance(error, TypeError | AttributeError | LookupError):
        explain_arguments(network, inputs, error)
    if isinstance(error, RuntimeError):
        explain_type(network, inputs, error, role.partition(",")[0])
    mend = ""
    if isinstance(inputs, Tensor) and inputs.ndim < 2:
        mend = "; expected a row for each example, such as x[None] of one, or np.array(x) of a list"
    shapes = [shape_of(leaf) for leaf in pytree.tree_leaves(inputs)]
    place = f" ({kind}),".join(role.split(",")) if "," in role else f"{role} ({kind})"
    error.add_note(f"in the {place}: {few(shapes, 4)}{mend}")


def explain_arguments(network: nn.Module, inputs: object, error: Exception) -> None:
    """Raise that a network's forward takes several arguments, if that is why it has failed."""
    kind = type(network).__name__
    if isinstance(inputs, Tensor):
        # Python's own words, of the network that Logits passes its parts to, too.
        called = type(getattr(network, "network", network)).__name__
        if f"{called}.forward() missing" in str(error):
            raise MetaplError(
                f"{kind} was called with one input, {described(inputs)}, and takes more "
                f"({reason_of(error)}); expected ((x, extra), labels), ((x, extra),) without "
                f"labels, and metapl.models.Logits({kind}(...)), which passes them on."
            ) from error
        return
    parts = "their parts" if takes_parts(network, inputs) else ""
    rest = ""
    names = names_of_arguments(network)
    if not parts and isinstance(inputs, Mapping) and any(name in inputs for name in names):
        parts = few(names)
        rest = ", and a batch of these alone"
    if parts:
        raise MetaplError(
            f"{kind} was called with its inputs, {described(inputs)}, as one argument; its forward "
            f"takes {parts} ({reason_of(error)}); expected metapl.models.Logits({kind}(...)){rest}."
        ) from error


def explain_type(network: nn.Module, inputs: object, error: RuntimeError, role: str) -> None:
    """Raise that inputs have another type than a network's weights, if that is why it failed."""
    if "type" not in str(error) or torch.is_autocast_enabled():
        return
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    of_inputs = types_of(t for t in tensors if t.is_floating_point())
    of_weights = types_of(p for p in network.parameters() if p.is_floating_point())
    if not of_weights or not of_inputs.isdisjoint(of_weights):
        return
    calls = [_CALLS.get(name, f"to(torch.{name})") for name in (*of_weights, *of_inputs)]
    mend = f"the same, such as x.{calls[0]}"
    if of_inputs == {str(torch.get_default_dtype()).removeprefix("torch.")}:
        # The weights are the odd ones.
        mend = f"the same, such as {role}.{calls[-1]}"
    elif not of_inputs:
        if not tensors or not _WHOLE.search(str(error)):
            return
        of_inputs = types_of(tensors)
        mend = f"numbers of floating point, x.{calls[0]}, or x.astype('float32') of NumPy arrays"
    raise MetaplError(
        f"the {role}'s inputs are {few(of_inputs)}, and the weights of {type(network).__name__} "
        f"{few(of_weights)}; expected {mend}."
    ) from error


def types_of(tensors: Iterable[Tensor]) -> set[str]:
    """Return the names of the types of some tensors."""
    return {str(t.dtype).removeprefix("torch.") for t in tensors}


def takes_parts(network: nn.Module, inputs: object) -> bool:
    """Return whether a network's forward takes the parts of its inputs as its arguments."""
    try:
        signature = inspect.signature(network.forward)
        if isinstance(inputs, Mapping):
            signature.bind(**inputs)
            return True
        if isinstance(inputs, tuple | list):
            signature.bind(*inputs)
            return True
    except (TypeError, ValueError):
        pass
    return False


def names_of_arguments(network: nn.Module) -> list[str]:
    """Return the names of the arguments of a forward; [] of one that is not Python's."""
    try:
        return [*inspect.signature(network.forward).parameters]
    except (TypeError, ValueError):
        return []
