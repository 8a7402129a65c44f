"""Masks of dropout inside of a transform of ``torch.func``."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes


@cache
def draws_in_memory_order() -> bool:
    """Return whether PyTorch draws a transposed tensor in the order of its memory.

    With MKL it does not.
    """
    # The first call may come from within a recording or a transform, which has no values.
    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        drawn = []
        for t in (torch.empty(8, 8), torch.empty(8, 8).t()):
            drawn.append(t.bernoulli_(0.5, generator=torch.Generator().manual_seed(0)))
        return torch.equal(drawn[0], drawn[1].t())


class EagerMasks(TorchFunctionMode):
    """Dropout with the masks that it has without a transform.

    Within a transform PyTorch draws the mask of a transposed tensor by its dimensions, and without
    one, on some builds, in the order of the tensor's memory.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is not F.dropout or args[0].device.type != "cpu" or not draws_in_memory_order():
            return func(*args, **options)
        x, *others = args
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        masked = func(x.permute(order), *others, **options)
        return masked.permute([order.index(i) for i in range(x.dim())])
