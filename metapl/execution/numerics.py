"""Products and norms over trees of parameters, never in half precision, and which kernels a pass
uses, so that all passes compute the same function and have the derivatives they need."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from operator import attrgetter
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.torch_version import TorchVersion

from metapl.errors import MetaplError

Tree = dict[str, Tensor]
HALF, DTYPE = {torch.float16, torch.bfloat16}, attrgetter("dtype")


def wide(t: Tensor) -> Tensor:
    """float32 or wider: losses and products are not taken in half precision."""
    return t.float() if t.dtype in HALF else t


def as_real(t: Tensor) -> Tensor:
    """Of complex numbers, their two parts: the weights over which autograd's gradients are."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def wide_list(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Numbers to take products of: real ones, in float32 or wider."""
    given = [*tensors]
    if any(map(Tensor.is_complex, given)):
        given = [as_real(t) for t in given]
    return given if HALF.isdisjoint(map(DTYPE, given)) else [wide(t) for t in given]


def in_type_of(network: nn.Module, t: Tensor) -> Tensor:
    """A tensor in the type of a network's weights, which is that of the first.

    As it is where there is none.
    """
    weight = next((p for p in network.parameters() if p.is_floating_point()), None)
    return t if weight is None else t.to(weight.dtype)


def scaled(tree: Tree, factor: float | Tensor) -> Tree:
    return {name: factor * t for name, t in tree.items()}


class Space:
    """Products of trees of weights, here of trees that this process holds whole."""

    def dot(self, a: Tree, b: Tree) -> Tensor:
        """⟨a, b⟩ over the parameters that both have, a scalar."""
        return self._flat(a, b).sum()

    def norm(self, a: Tree) -> Tensor:
        """‖a‖ over all parameters, a scalar."""
        values = wide_list(a.values())
        if any(t.is_sparse for t in values):
            # torch 2.11 has no norm of a list with sparse gradients of embeddings.
            values = [t.coalesce().values() if t.is_sparse else t for t in values]
        total: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values)))
        return total

    def slope(self, a: Tree, b: Tree) -> tuple[Tensor, Tensor]:
        """⟨a, b⟩, and the norm of its terms, to which its rounding is proportional."""
        flat = self._flat(a, b)
        return flat.sum(), torch.linalg.vector_norm(flat)

    def _flat(self, a: Tree, b: Tree) -> Tensor:
        if a.keys() != b.keys():
            a = {name: t for name, t in a.items() if name in b}
        terms = torch._foreach_mul(wide_list(a.values()), wide_list(map(b.__getitem__, a)))
        # Gradients of embeddings may be sparse.
        return torch.cat([t.to_dense().flatten() if t.is_sparse else t.flatten() for t in terms])

    def count(self, a: Tree) -> int:
        return sum(t.numel() for t in a.values())


WHOLE = Space()  # trees that this process holds whole


def sum_tree(trees: Sequence[Tree]) -> Tree:
    """The sum of trees, in which a parameter that is missing counts as zero."""
    names = dict.fromkeys(name for tree in trees for name in tree)
    return {
        name: torch.stack([tree[name] for tree in trees if name in tree]).sum(0) for name in names
    }


def mean_tree(trees: Sequence[Tree]) -> Tree:
    """The mean of trees, in which a parameter that is missing counts as zero."""
    if len(trees) == 1:
        return trees[0]
    return {name: total / len(trees) for name, total in sum_tree(trees).items()}


_BACKENDS: Any = torch.backends  # whose stubs lack some of these
_SWITCHES: dict[str, list[Any]] = {
    "cuda": [_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn],
    "cpu": [_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn],
}


def reduced_float32(device: torch.device) -> bool:
    """Whether PyTorch may round the factors of float32 products on ``device`` (TF32 on CUDA, bf16 on CPU)."""
    return any(
        switch.fp32_precision not in ("none", "ieee") for switch in _SWITCHES.get(device.type, ())
    )


def float32_products(device: torch.device) -> dict[str, str]:
    """Return in what precision products of float32 are taken on a device, for matrices and for convolutions.

    ``"ieee"`` is float32; ``"tf32"`` and ``"bf16"`` round the factors. Cost: two reads of a switch.
    """
    # The older switches are not read: that raises once a caller has set these.
    found: dict[str, str] = {}
    for kind, switch in zip(
        ("matrix products", "convolutions"), _SWITCHES.get(device.type, ()), strict=False
    ):
        asked = switch.fp32_precision
        found[kind] = "ieee" if asked == "none" else asked
    return found


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """float32 products in float32; the settings are put back as they were."""
    switches = _SWITCHES[device.type] if reduced_float32(device) else []
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


_DETERMINISTIC: Any = torch.utils.deterministic  # whose setting is no attribute to a type checker


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Ask for deterministic algorithms, with a warning of torch's where an operation has none; the
    settings are put back. A caller who asks for them already keeps his own settings, errors
    included."""
    if torch.are_deterministic_algorithms_enabled():
        yield
        return
    filled = _DETERMINISTIC.fill_uninitialized_memory
    with warnings.catch_warnings() if device.type == "cuda" else nullcontext():
        if device.type == "cuda":
            # cuBLAS repeats its bits on one stream, which is what a path runs on; torch warns for
            # the case of several.
            warnings.filterwarnings("ignore", message="(?s).*CuBLAS")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Else every new tensor is filled, which costs a write and changes no result.
        _DETERMINISTIC.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            _DETERMINISTIC.fill_uninitialized_memory = filled


_CUDA: Any = torch.backends.cuda
# kernels of attention, on every device, which have neither forward mode nor a second derivative
_FUSED = (
    (_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp),
    (_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp),
    (_CUDA.cudnn_sdp_enabled, _CUDA.enable_cudnn_sdp),
)


_takes_formulas: ContextVar[bool] = ContextVar("takes_formulas", default=False)


def takes_formulas() -> bool:
    """Whether kernels without a second derivative or a forward mode are out of use, as in
    ``no_fast_path(math=True)``; those of modules are exchanged where the modules run
    (:mod:`metapl.execution.weight_norm`)."""
    return _takes_formulas.get()


@contextmanager
def no_fast_path(*, math: bool = False) -> Iterator[None]:
    """Disable the fused path of PyTorch's attention layers, which it takes in eval mode without a
    graph, and which treats padded rows differently; ``math``: and the fused kernels, see also
    :func:`takes_formulas`."""
    # Switch by switch: ``sdpa_kernel`` takes as long as a pass of a small network.
    path = torch.backends.mha
    fast, plain = path.get_fastpath_enabled(), _CUDA.math_sdp_enabled()
    fused = [enable for enabled, enable in _FUSED if enabled()] if math else []
    path.set_fastpath_enabled(False)
    token = _takes_formulas.set(math or _takes_formulas.get())
    try:
        for enable in fused:
            enable(False)
        if math:
            _CUDA.enable_math_sdp(True)
        yield
    finally:
        _takes_formulas.reset(token)
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


_LACKING = re.compile(
    r"(?i)forward[- ](mode )?AD|jvp function|differentiate twice|double backward|derivative for|donated buffers"
)
_OPERATION = re.compile(r"(?:forward AD with|derivative for) '?([\w:.]+)'?")


_CUDNN_RNN = re.compile(r"(?i)cudnn[ _]rnn")
_CUDNN_EVAL = "RNN backward can only be called in training mode"


# Derivatives of a backward pass that older releases of PyTorch lack, with the first release that
# has them.
SINCE_RELEASE = {"grid_sampler_2d_backward": "2.12", "_cdist_backward": "2.14"}


class MissingDerivative(MetaplError):
    """An operation lacks a derivative that a pass needs.

    Args:
        what: which operation and which derivative, without a period.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; expected an operation that has it.")
        self.what = what


def asks_for_gradient(error: BaseException) -> bool:
    """Whether a forward failed because it takes a gradient itself, in a pass that has no graph."""
    return isinstance(
        error, RuntimeError
    ) and "does not require grad and does not have a grad_fn" in str(error)


def is_layout_refused(error: BaseException) -> bool:
    """Whether a view failed because of where the numbers of a tensor lie in memory."""
    return isinstance(error, RuntimeError) and "view size is not compatible" in str(error)


def explain(error: BaseException) -> None:
    """Raise autograd's error about a missing derivative as one that names the operation."""
    text = str(error)
    is_lacking = bool(_LACKING.search(text)) or _CUDNN_EVAL in text
    if isinstance(error, RuntimeError) and is_lacking and _CUDNN_RNN.search(text):
        raise MetaplError(
            "cuDNN's recurrent networks have no second derivative, no forward mode, and in eval "
            "mode no derivative at all; expected the call in a block of "
            "torch.backends.cudnn.flags(enabled=False), which takes PyTorch's own."
        ) from error
    if isinstance(error, RuntimeError) and _LACKING.search(str(error)):
        message = str(error).splitlines()[0].rstrip(".")
        operation = _OPERATION.search(message)
        what = operation[1] if operation else "an operation of the student"
        for backward, release in SINCE_RELEASE.items():
            if backward in message and torch.__version__ < TorchVersion(release):
                message += f"; torch {release} has it, and this is {torch.__version__}"
        raise MissingDerivative(
            f"{what} lacks a derivative that this mode needs ({message})"
        ) from error
