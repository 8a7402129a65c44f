"""Which kernels a pass uses, so that all passes compute the same function and have the derivatives they need."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.autograd import forward_ad

from metapl.errors import MetaplError

_CUDA: Any = torch.backends.cuda
_FUSED = (  # kernels of attention, on every device, which have neither forward mode nor a second derivative
    (_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp),
    (_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp),
    (_CUDA.cudnn_sdp_enabled, _CUDA.enable_cudnn_sdp),
)


@contextmanager
def no_fast_path(*, math: bool = False) -> Iterator[None]:
    """Disable the fused path of PyTorch's attention layers, which it takes in eval mode without a graph, and which
    treats padded rows differently; ``math``: and the fused kernels."""
    # Switch by switch: ``sdpa_kernel`` takes as long as a pass of a small network.
    path = torch.backends.mha
    fast, plain = path.get_fastpath_enabled(), _CUDA.math_sdp_enabled()
    fused = [enable for enabled, enable in _FUSED if enabled()] if math else []
    path.set_fastpath_enabled(False)
    try:
        for enable in fused:
            enable(False)
        if math:
            _CUDA.enable_math_sdp(True)
        yield
    finally:
        path.set_fastpath_enabled(fast)
        for enable in fused:
            enable(True)
        _CUDA.enable_math_sdp(plain)


@cache
def load_forward_mode() -> None:
    """Create the first dual number, for which PyTorch loads its rules with a deprecation warning, silenced here."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def forward_mode() -> Iterator[None]:
    """A pass in forward mode, on kernels that have it."""
    load_forward_mode()
    with torch.no_grad(), forward_ad.dual_level(), no_fast_path(math=True):
        yield


_LACKING = re.compile(r"(?i)forward[- ](mode )?AD|jvp function|differentiate twice|double backward|derivative for")
_OPERATION = re.compile(r"(?:forward AD with|derivative for) '?([\w:.]+)'?")


def explain(error: BaseException) -> None:
    """Raise autograd's error about a missing derivative as one that names the operation and the modes that run."""
    if isinstance(error, RuntimeError) and _LACKING.search(str(error)):
        message = str(error).splitlines()[0].rstrip(".")
        operation = _OPERATION.search(message)
        what = operation[1] if operation else "an operation of the student"
        why = f"{what} lacks a derivative that this mode needs ({message})"
        raise MetaplError(f'{why}; expected another Forward(by=), or mode "difference" or "reinforce".') from error
