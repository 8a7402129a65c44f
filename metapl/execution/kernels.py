"""Which kernels a pass uses, so that all passes compute the same function and have the derivatives they need."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint

from metapl.errors import MetaplError


class NotByThisMode(MetaplError):
    """A student that one mode cannot take, and others may (:mod:`metapl.feedback.compatible` names them)."""


@contextmanager
def no_fast_path(*, math: bool = False) -> Iterator[None]:
    """Disable the fused path of PyTorch's attention layers, which it takes in eval mode without a graph, and which
    treats padded rows differently; ``math``: and the fused kernels, which have neither forward mode nor a second
    derivative."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH) if math else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _WithoutReentry:
    """Replaces the function behind ``checkpoint(..., use_reentrant=True)``, with the same gradients."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args)
        if any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
        with torch.no_grad():  # as the reentrant kind: no gradient, not even for its weights
            return function(*args)


@contextmanager
def checkpoints_without_reentry() -> Iterator[None]:
    """Run checkpoints with ``use_reentrant=True`` as non-reentrant ones, in forward and backward passes of this block,
    while a step holds its lock."""
    before = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _WithoutReentry  # type: ignore[assignment,misc]  # it has the same apply
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = before  # type: ignore[misc]  # put back


@contextmanager
def refuse_checkpoints() -> Iterator[None]:
    """Refuse activation checkpoints in this block, which would be recomputed at other weights."""
    text = (
        "the student has activation checkpoints (torch.utils.checkpoint) or other hooks on saved tensors, which "
        'a graph that is kept would recompute at the weights of another step; use mode="forward" with keep_graphs=0, '
        "which needs the memory of one step only, or look one step ahead."
    )
    try:
        with disable_saved_tensors_hooks(text):
            yield
    except RuntimeError as error:
        if text not in str(error):
            raise
        raise MetaplError(text) from None


@cache
def load_forward_mode() -> None:
    """Create the first dual number, for which PyTorch loads its rules with a deprecation warning, silenced here."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in forward mode, for blocks of queries at a time: less time and memory than by PyTorch's math kernel,
    the only one that has the derivative. By that kernel with a mask, dropout or fewer keys' heads, under
    autocast, and in half precision.

    o = A v, A = softmax(s q kᵀ), has o′ = (A∘S′) v − rowsum(A∘S′) o + A v′, S′ = s (q′ kᵀ + q k′ᵀ).
    """
    given = query, key, value
    known = all(type(t) is Tensor and t.dtype in (torch.float32, torch.float64) for t in given)
    plain = attn_mask is None and dropout_p == 0.0 and not enable_gqa and known
    plain &= torch._C._is_fwd_grad_enabled() and not torch.is_autocast_enabled(query.device.type)
    pairs = [forward_ad.unpack_dual(t) for t in given] if plain else []
    if all(slope is None for _, slope in pairs):
        whole: Tensor = _attention(*given, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return whole
    (q, dq), (k, dk), (v, dv) = ((t, torch.zeros_like(t) if dt is None else dt) for t, dt in pairs)
    factor, outs, slopes = q.shape[-1] ** -0.5 if scale is None else scale, [], []
    rows = max(64, -(-q.shape[-2] // 8))
    for start in range(0, q.shape[-2], rows):
        own, end = slice(start, start + rows), start + rows if is_causal else k.shape[-2]
        k_, dk_, v_, dv_ = (t[..., :end, :] for t in (k, dk, v, dv))
        scores = (q[..., own, :] @ k_.mT).mul_(factor)
        if is_causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(start + 1), -torch.inf)
        a = scores.softmax(-1)
        moved = (dq[..., own, :] @ k_.mT + q[..., own, :] @ dk_.mT).mul_(factor).mul_(a)
        outs.append(a @ v_)
        slopes.append(moved @ v_ - moved.sum(-1, keepdim=True) * outs[-1] + a @ dv_)
    out: Tensor = forward_ad.make_dual(torch.cat(outs, -2), torch.cat(slopes, -2))
    return out


_attention = functional.scaled_dot_product_attention


@contextmanager
def forward_mode() -> Iterator[None]:
    """A pass in forward mode, on kernels that have it."""
    # torch.no_grad() in a network's forward ends the derivatives of forward mode too, as it ends those of reverse mode:
    # state that a pass moves there, such as the average of a momentum encoder, is a constant in both.
    load_forward_mode()
    enter, leave = torch.no_grad.__enter__, torch.no_grad.__exit__
    ended, own = list[Any](), threading.get_ident()

    def entered(self: torch.no_grad) -> None:
        enter(self)
        if threading.get_ident() == own:
            ended.append(forward_ad._set_fwd_grad_enabled(False))

    def left(self: torch.no_grad, *error: Any) -> None:
        if threading.get_ident() == own:
            ended.pop().__exit__(*error)
        leave(self, *error)

    with torch.no_grad(), forward_ad.dual_level(), no_fast_path(math=True), explained():
        torch.no_grad.__enter__, torch.no_grad.__exit__ = entered, left  # type: ignore[method-assign]
        functional.scaled_dot_product_attention = attention
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = _attention
            torch.no_grad.__enter__, torch.no_grad.__exit__ = enter, leave  # type: ignore[method-assign]


def refuse_once_differentiable(gradients: Iterable[Tensor]) -> None:
    """Refuse a differentiable gradient that came through a backward pass marked with ``once_differentiable``: PyTorch's
    node raises where it is reached, but a derivative in the signal alone never reaches it, and comes out as zero."""
    seen: set[Any] = {None}
    nodes: list[Any] = [g.grad_fn for g in gradients]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name().endswith("autograd::Error"):
            raise NotByThisMode(
                "the student has an autograd.Function whose backward is marked with @once_differentiable, so the "
                "derivative would come out as zero."
            )
        nodes.extend(following for following, _ in node.next_functions)


_OVERWRITTEN = "has been modified by an inplace operation"
# What stands in the way of a derivative, by what autograd says of it.
_OBSTACLES = {
    r"(?s)_efficientzerotensor.*Sparse": "the batch holds a sparse tensor, for which PyTorch has no forward-mode "
    "derivative; expected a dense one, x.to_dense().",
    _OVERWRITTEN: "its graph has saved a tensor that a later pass wrote to in place, such as a buffer; assign a new "
    "one (self.mean = 0.9 * self.mean + ...).",
    "element 0 of tensors does not require grad": "its forward differentiates (torch.autograd.grad), and runs without "
    "a graph here; expected that within torch.enable_grad().",
}
_LACKING = r"(?i)forward[- ](mode )?AD|jvp function|differentiate twice|double backward|derivative for"
_OPERATION = r"(?:forward AD with|derivative for) '?([\w:.]+)'?"


@contextmanager
def explained() -> Iterator[None]:
    """Turn autograd's error about a missing derivative into one that names the operation."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        said = str(error)
        why = next((why for pattern, why in _OBSTACLES.items() if re.search(pattern, said)), None)
        if why is None and not re.search(_LACKING, said):
            raise
        if why is None:
            match = re.search(_OPERATION, said)
            operation = match.group(1) if match else "one of the student's operations"
            hint = ' Networks of Hugging Face do without: experts_implementation="eager".' * ("grouped_mm" in operation)
            why = f"{operation} lacks a derivative that it needs ({said.splitlines()[0].rstrip('.')}).{hint}"
        raise NotByThisMode(why) from error


@contextmanager
def overwritten_explained(role: str) -> Iterator[None]:
    """Turn autograd's error about a saved tensor that was written to into one that says how to mend it."""
    try:
        yield
    except RuntimeError as error:
        if _OVERWRITTEN not in str(error):
            raise
        raise MetaplError(
            f"the {role}'s graph has saved a tensor that this pass or a later one wrote to in place, such as a buffer "
            "or a frozen parameter; assign a new one (self.mean = 0.9 * self.mean + ...), or read a copy (h * "
            "self.mean.clone())."
        ) from error
