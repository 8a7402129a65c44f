"""What is said of a network that fails by how its inputs are given, or by their type."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few, reason_of
from metapl.execution.checks import described


def refuse_inputs(network: nn.Module, inputs: object, error: Exception) -> None:
    """Raise that a network's forward takes several arguments, or another type of numbers.

    Return without raising where it may have failed for another reason.

    Args:
        network: that has failed.
        inputs: its one argument.
        error: what it has raised.

    Raises: :class:`metapl.MetaplError`.
    """
    kind = type(network).__name__
    if isinstance(error, RuntimeError):
        refuse_type(network, inputs, error)
        return
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


def refuse_type(network: nn.Module, inputs: object, error: RuntimeError) -> None:
    """Raise that inputs have another floating-point type than a network's weights, if they have."""
    is_of_types = "dtype" in str(error) or "scalar type" in str(error)
    if not is_of_types or torch.is_autocast_enabled():
        return
    of_inputs = float_types(pytree.tree_leaves(inputs))
    of_weights = float_types(network.parameters())
    if of_inputs and of_weights and of_inputs.isdisjoint(of_weights):
        raise MetaplError(
            f"the inputs are {few(of_inputs)}, and the weights of {type(network).__name__} "
            f"{few(of_weights)}; expected the same, such as x.float(), or NumPy arrays."
        ) from error


def float_types(values: Iterable[object]) -> set[str]:
    """Return the names of the floating-point types of the tensors among some values."""
    tensors = [t for t in values if isinstance(t, Tensor) and t.is_floating_point()]
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
