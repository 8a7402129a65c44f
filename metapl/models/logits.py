"""Networks of several inputs, or whose logits are part of what they return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.batch import length
from metapl.execution.checks import described, logits_in


class Logits(nn.Module):
    """A network, such as those of Hugging Face, as a module from the inputs of a batch to logits.

    The inputs go in as the batch has them: a dict as keyword arguments, a tuple or list as positional ones, a tensor
    alone. What comes out is the tensor that the network returns, or its ``logits`` (an attribute, or the entry of a
    dict).

    Args:
        network: is held, not copied: what is trained are its own weights.

    Raises: :class:`metapl.MetaplError` where the network is not a module; on a call, where it returns neither, or not
        logits (B, C).

    >>> import torch
    >>> class Scorer(nn.Module):
    ...     def forward(self, input_ids, attention_mask):
    ...         return {"logits": torch.ones(len(input_ids), 3) * attention_mask[:, :1]}
    >>> batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 5)}
    >>> Logits(Scorer())(batch).shape
    torch.Size([2, 3])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise MetaplError(f"metapl.models.Logits was given {described(network)}; expected a torch.nn.Module.")
        self.network = network

    def forward(self, inputs: Any) -> Tensor:
        if isinstance(inputs, Mapping):
            outputs = self.network(**inputs)
        elif isinstance(inputs, tuple | list):
            outputs = self.network(*inputs)
        else:
            outputs = self.network(inputs)
        logits = outputs if isinstance(outputs, Tensor) else logits_in(outputs)
        who = f"the {type(self.network).__name__} in metapl.models.Logits returned"
        if not isinstance(logits, Tensor):
            raise MetaplError(
                f"{who} {described(outputs)} without a tensor of logits; expected a tensor, an object with .logits or "
                "a dict with 'logits'."
            )
        rows = length(inputs)
        if logits.ndim != 2 or not logits.is_floating_point() or (rows and logits.shape[0] != rows):
            raise MetaplError(
                f"{who} {described(logits)} for {rows} examples; expected floating-point logits (examples, classes). "
                "For other outputs, such as a language model's, write a module that returns network(**inputs).logits."
            )
        return logits
