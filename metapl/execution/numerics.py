"""Products and norms over trees of parameters, and the kernels that a pass uses.

Products and norms are never taken in half precision. The kernels are chosen such that all passes
compute the same function, and have the derivatives that they need.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from operator import attrgetter
from typing import Any

import torch
import torch.utils.checkpoint
import torch.utils.deterministic
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.torch_version import TorchVersion

from metapl.errors import MetaplError

# Weights, gradients or other tensors of the same shapes, by the parameters' names.
Tree = dict[str, Tensor]

# The types of half precision.
HALF = {torch.float16, torch.bfloat16}

# Reads the type of a tensor; map() calls it without a frame of Python for each.
DTYPE = attrgetter("dtype")


def wide(t: Tensor) -> Tensor:
    """Return a tensor in float32 or wider.

    Losses and products are not taken in half precision.
    """
    return t.float() if t.dtype in HALF else t


def as_real(t: Tensor) -> Tensor:
    """Return complex numbers as their two parts, (..., 2); real ones as they are.

    Autograd's gradients are over the two parts.
    """
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def wide_list(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return numbers to take products of: real ones, in float32 or wider."""
    numbers = [*tensors]
    if any(map(Tensor.is_complex, numbers)):
        numbers = [as_real(t) for t in numbers]
    if not HALF.isdisjoint(map(DTYPE, numbers)):
        numbers = [wide(t) for t in numbers]
    return numbers


def in_type_of(network: nn.Module, t: Tensor) -> Tensor:
    """Return a tensor in the type of a network's first weight.

    As it is for a network without weights.
    """
    for p in network.parameters():
        if p.is_floating_point():
            return t.to(p.dtype)
    return t


def scaled(tree: Tree, factor: float | Tensor) -> Tree:
    """Return the tree times a factor."""
    return {name: factor * t for name, t in tree.items()}


# From how many entries on products are summed tensor by tensor, so that one product is held at a
# time, and not all of them twice. Of a network of a billion weights that is 8 GB less; of a small
# one it would be several calls for each tensor in the place of one.
MANY_ENTRIES = 2**25


class Space:
    """Products of trees of weights, here of trees that this process holds whole."""

    def dot(self, a: Tree, b: Tree) -> Tensor:
        """Return ⟨a, b⟩ over the parameters that both have, a scalar."""
        if self.count(a) >= MANY_ENTRIES:
            product, _ = self._slope_by_tensor(a, b)
            return product
        return self._terms(a, b).sum()

    def norm(self, a: Tree) -> Tensor:
        """Return ‖a‖ over all parameters, a scalar."""
        values = wide_list(a.values())
        if any(t.is_sparse for t in values):
            # torch 2.11 has no norm of a list with sparse gradients of embeddings.
            values = [t.coalesce().values() if t.is_sparse else t for t in values]
        total: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values)))
        return total

    def slope(self, a: Tree, b: Tree) -> tuple[Tensor, Tensor]:
        """Return ⟨a, b⟩, and the norm of its terms, to which its rounding is proportional."""
        if self.count(a) >= MANY_ENTRIES:
            return self._slope_by_tensor(a, b)
        terms = self._terms(a, b)
        return terms.sum(), torch.linalg.vector_norm(terms)

    def _slope_by_tensor(self, a: Tree, b: Tree) -> tuple[Tensor, Tensor]:
        """Return what :meth:`slope` does, with the product of one parameter held at a time."""
        sums: list[Tensor] = []
        norms: list[Tensor] = []
        for name, t in a.items():
            if name not in b:
                continue
            first, second = wide_list([t, b[name]])
            product = first * second
            if product.is_sparse:
                product = product.to_dense()
            sums.append(product.sum())
            norms.append(torch.linalg.vector_norm(product))
        return torch.stack(sums).sum(), torch.linalg.vector_norm(torch.stack(norms))

    def _terms(self, a: Tree, b: Tree) -> Tensor:
        """Return the products of the entries of two trees, as one vector."""
        if a.keys() != b.keys():
            a = {name: t for name, t in a.items() if name in b}
        products = torch._foreach_mul(wide_list(a.values()), wide_list(b[name] for name in a))
        # Gradients of embeddings may be sparse.
        dense = [t.to_dense() if t.is_sparse else t for t in products]
        return torch.cat([t.flatten() for t in dense])

    def count(self, a: Tree) -> int:
        """Return the number of entries over all parameters."""
        return sum(t.numel() for t in a.values())


# The space of trees that this process holds whole.
WHOLE = Space()


def add_to(sums: Tree, tree: Mapping[str, Tensor]) -> None:
    """Add a tree to sums by parameter; one that the sums lack counts as zero there."""
    for name, t in tree.items():
        if name in sums:
            # Either may be sparse, as the gradient of an embedding is; torch adds it last.
            t = t + sums[name] if sums[name].is_sparse else sums[name] + t
        sums[name] = t


def by_backward(value: Tensor, parameters: Mapping[str, Tensor], *, retain: bool = False) -> Tree:
    """Return the gradient of a scalar by ``.backward()``, of the parameters that it reaches.

    ``.grad`` stays as it is.
    """
    grads_before = [p.grad for p in parameters.values()]
    gradient: Tree = {}
    try:
        for p in parameters.values():
            p.grad = None
        value.backward(retain_graph=retain)
        for name, p in parameters.items():
            if p.grad is not None:
                gradient[name] = p.grad
    finally:
        for p, grad in zip(parameters.values(), grads_before, strict=True):
            p.grad = grad
    return gradient


class TreeSum:
    """A sum of trees, of which no more than the sum is held.

    A parameter that is missing in a tree counts as zero there.

    Attributes:
        total: the sum.
        count: how many trees were added.
    """

    def __init__(self, trees: Iterable[Tree] = ()) -> None:
        self.total: Tree = {}
        self.count = 0
        for tree in trees:
            self.add(tree)

    def add(self, tree: Tree) -> None:
        self.count += 1
        add_to(self.total, tree)

    def mean(self) -> Tree:
        """Return the mean of the trees; of one tree the tree itself."""
        if self.count == 1:
            return self.total
        return {name: t / self.count for name, t in self.total.items()}


def mean_of_scalars(values: Sequence[Tensor]) -> Tensor:
    """Return the mean of scalars."""
    if len(values) == 1:
        return values[0]
    return torch.stack(list(values)).mean(0)


# torch.backends, whose stubs lack some of its attributes.
_BACKENDS: Any = torch.backends

# By type of device, what has a switch for the precision of float32 products.
_SWITCHES: dict[str, list[Any]] = {
    "cuda": [_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn],
    "cpu": [_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn],
}


def reduced_float32(device: torch.device) -> bool:
    """Return whether PyTorch may round the factors of float32 products on ``device``.

    To TF32 on CUDA, to bfloat16 on a CPU.
    """
    switches = _SWITCHES.get(device.type, ())
    return any(switch.fp32_precision not in ("none", "ieee") for switch in switches)


def float32_switches(device: torch.device) -> list[str]:
    """Return how a device's switches for float32 products stand, as PyTorch names it."""
    return [*map(_precision_of, _SWITCHES.get(device.type, ()))]


# Reads a switch where map() calls it without a frame of metapl.
_precision_of = attrgetter("fp32_precision")


def float32_products(device: torch.device) -> dict[str, str]:
    """Return in what precision products of float32 are taken on a device.

    By ``"matrix products"`` and ``"convolutions"``: ``"ieee"`` is float32; ``"tf32"`` and
    ``"bf16"`` round the factors. Empty on a device without switches.

    Cost: two reads of a switch.
    """
    # The older switches are not read: that raises once a caller has set these.
    if device.type not in _SWITCHES:
        return {}
    matmul, convolution, _ = _SWITCHES[device.type]
    return {
        "matrix products": _precision(matmul),
        "convolutions": _precision(convolution),
    }


def _precision(switch: Any) -> str:
    precision: str = switch.fp32_precision
    return "ieee" if precision == "none" else precision


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Take float32 products in float32 in this block; the settings are put back as they were."""
    switches: list[Any] = []
    if reduced_float32(device):
        switches = _SWITCHES[device.type]
    precisions = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision


# A module whose setting is no attribute to a type checker.
_DETERMINISTIC: Any = torch.utils.deterministic


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Ask for deterministic algorithms in this block; the settings are put back.

    torch warns where an operation has none. A caller who asks for them already keeps his own
    settings, errors included.
    """
    if torch.are_deterministic_algorithms_enabled():
        yield
        return
    fills_memory = _DETERMINISTIC.fill_uninitialized_memory
    is_cuda = device.type == "cuda"
    with warnings.catch_warnings() if is_cuda else nullcontext():
        if is_cuda:
            # cuBLAS repeats its bits on one stream, which is what a path runs on; torch warns for
            # the case of several.
            warnings.filterwarnings("ignore", message="(?s).*CuBLAS")
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        # Otherwise every new tensor is filled, which costs a write and changes no result.
        _DETERMINISTIC.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(mode=False)
            _DETERMINISTIC.fill_uninitialized_memory = fills_memory


_CUDA: Any = torch.backends.cuda

# The kernels of attention: for each the function that asks whether it is enabled, and the one that
# switches it. The fused ones have neither forward mode nor a second derivative; the last one is the
# formula. torch keeps these switches under its CUDA backend, and reads them on every device.
_KERNELS = (
    (_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp),
    (_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp),
    (_CUDA.cudnn_sdp_enabled, _CUDA.enable_cudnn_sdp),
    (_CUDA.math_sdp_enabled, _CUDA.enable_math_sdp),
)


_takes_formulas: ContextVar[bool] = ContextVar("takes_formulas", default=False)


def takes_formulas() -> bool:
    """Return whether kernels without a second derivative or a forward mode are out of use.

    As in ``no_fast_path(math=True)``. Those of modules are exchanged where the modules run
    (:mod:`metapl.execution.weight_norm`).
    """
    return _takes_formulas.get()


@contextmanager
def no_fast_path(*, math: bool = False) -> Iterator[None]:
    """Disable the fused path of PyTorch's attention layers in this block.

    PyTorch takes it in eval mode without a graph, and it treats padded rows differently. All
    settings are put back as they were.

    Args:
        math: take attention by its formula: disable its fused kernels too, and enable the math
            kernel, also where the caller has disabled it. See also :func:`takes_formulas`.
    """
    # Switch by switch: ``sdpa_kernel`` takes as long as a pass of a small network.
    layers = torch.backends.mha
    had_fast_path = layers.get_fastpath_enabled()
    were_enabled = [is_enabled() for is_enabled, _ in _KERNELS]
    token = _takes_formulas.set(math or _takes_formulas.get())
    try:
        layers.set_fastpath_enabled(value=False)
        if math:
            for _, switch in _KERNELS:
                switch(switch is _CUDA.enable_math_sdp)
        yield
    finally:
        _takes_formulas.reset(token)
        layers.set_fastpath_enabled(had_fast_path)
        for (_, switch), was_enabled in zip(_KERNELS, were_enabled, strict=True):
            switch(was_enabled)


@cache
def load_dual_numbers() -> None:
    """Create the first dual number, for which PyTorch loads its rules.

    It warns of a deprecation then, which is silenced here.
    """
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def dual_numbers() -> Iterator[None]:
    """Run a pass in forward mode in this block, on kernels that have it."""
    load_dual_numbers()
    with torch.no_grad(), forward_ad.dual_level(), no_fast_path(math=True):
        yield


# What autograd says where a derivative is missing.
_LACKING = re.compile(
    r"(?i)forward[- ](mode )?AD|jvp function|differentiate twice|double backward|derivative for"
    r"|donated buffers"
)

# Finds what autograd says of a tensor that it cannot keep, and one in inference mode.
_CHANGED_IN_PLACE = re.compile(r"modified by an inplace operation: \[([^]]+\])")
_OF_INFERENCE = re.compile(r"[Ii]nference tensor")
_SPARSE = re.compile(r"Could not run '([\w:.]+)' with arguments from the 'Sparse")

# Finds the operation in such a text.
_OPERATION = re.compile(r"(?:forward AD with|derivative for) '?([\w:.]+)'?")

# Finds cuDNN's recurrent networks in such a text, and what they say in eval mode.
_CUDNN_RNN = re.compile(r"(?i)cudnn[ _]rnn")
_CUDNN_EVAL = "RNN backward can only be called in training mode"

# Derivatives of a backward pass that older releases of PyTorch lack, with the first release that
# has them.
SINCE_RELEASE = {"grid_sampler_2d_backward": "2.12", "_cdist_backward": "2.14"}


class MissingDerivative(MetaplError):
    """An operation lacks a derivative that a pass needs.

    Args:
        what: which operation and which derivative, without a period.
        expected: what the caller may do.
    """

    def __init__(self, what: str, expected: str = "another operation") -> None:
        super().__init__(f"{what}; expected {expected}.")
        self.what = what


@contextmanager
def without_checkpoints(block: AbstractContextManager[None]) -> Iterator[None]:
    """Refuse checkpoints in a block, whose graph is differentiated at other weights.

    Raises: :class:`metapl.MetaplError`, for other hooks on saved tensors too.
    """
    text = "a checkpoint runs again where a graph of several steps is differentiated"
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(text), block:
            yield
    except RuntimeError as error:
        if text not in str(error):
            raise
        raise MetaplError(
            "the student has a checkpoint, or another hook on saved tensors, which a graph of "
            "several steps runs again at the weights of another one; expected mode 'forward', "
            "which differentiates each step by itself."
        ) from error


def asks_for_gradient(error: BaseException) -> bool:
    """Return whether a forward failed because it takes a gradient, in a pass that has no graph."""
    is_of_torch = isinstance(error, RuntimeError)
    return is_of_torch and "does not require grad and does not have a grad_fn" in str(error)


def is_layout_refused(error: BaseException) -> bool:
    """Return whether a view failed because of where the numbers of a tensor lie in memory."""
    return isinstance(error, RuntimeError) and "view size is not compatible" in str(error)


def explain(error: BaseException) -> None:
    """Raise autograd's error about a missing derivative as one that names the operation.

    Raise those about tensors that were changed in place or made in inference mode, and about sparse
    gradients, as ones that say what to write instead. Return without raising for any other error.
    """
    if not isinstance(error, RuntimeError):
        return
    text = str(error)
    if change := _CHANGED_IN_PLACE.search(text):
        read = f"a tensor that a pass has read ({change[1]}) is changed in place after it"
        text = f"{read}; expected a copy to be read, such as self.level.clone()."
        raise MetaplError(text) from error
    if _OF_INFERENCE.search(text):
        text = "a tensor that was made under torch.inference_mode() enters a pass or a loss"
        mend = "expected its .clone(), or torch.no_grad() where it is made"
        raise MetaplError(f"{text}; {mend}.") from error
    if operation := _SPARSE.search(text):
        what = f"{operation[1]} takes no sparse gradient, such as nn.Embedding(sparse=True) has"
        # PyTorch's text has a line for each of a hundred backends.
        raise MetaplError(f"{what}; expected sparse=False, or torch.optim.SGD.") from None
    lacks_derivative = bool(_LACKING.search(text))
    if _CUDNN_RNN.search(text) and (lacks_derivative or _CUDNN_EVAL in text):
        text = "cuDNN's recurrent networks lack the derivative that this mode needs"
        mend = "expected the call in a block of torch.backends.cudnn.flags(enabled=False)"
        raise MetaplError(f"{text}; {mend}.") from error
    if lacks_derivative:
        message = text.splitlines()[0].rstrip(".")
        operation = _OPERATION.search(message)
        what = operation[1] if operation else "an operation of the student"
        for backward, release in SINCE_RELEASE.items():
            if backward in message and torch.__version__ < TorchVersion(release):
                message += f"; torch {release} has it, and this is {torch.__version__}"
        text = f"{what} lacks a derivative that this mode needs ({message})"
        raise MissingDerivative(text) from error
