r"""Products with a Hessian, through layers whose backward pass is differentiated in fewer operations than by PyTorch.

Such a product runs backward through the backward pass of every layer, of which it needs the graph, not the values. A
layer that is linear in its input x and in its weight W has :math:`\bar x = B(g, W)` and :math:`\bar W = C(g, x)`; from
cotangents a of :math:`\bar x` and A of :math:`\bar W`, with S the layer without its bias,

.. math:: \bar g = S(a, W) + S(x, A), \quad \bar x = B(g, A), \quad \bar W = C(g, a).

PyTorch makes the last two of a convolution by convolutions of transposed tensors, and computes :math:`C(g, x)` before,
which nothing reads: nine convolutions become eight. Batch norm, :math:`y = \gamma \hat x + \beta` with
:math:`\hat x = r (x - \mu)`, has :math:`\bar x = \gamma r P g`, where
:math:`P g = g - \mathrm{mean}(g) - \hat x\, \mathrm{mean}(\hat x g)` over the m values of a channel; from cotangents
a, b, c of :math:`\bar x, \bar\gamma, \bar\beta`,

.. math::
    \bar g &= \gamma r P a + b \hat x + c, \qquad \bar\gamma = r \langle a, P g \rangle, \\
    \bar x &= r (b - \gamma r\, \mathrm{mean}(\hat x a)) P g - \gamma r^2\, \mathrm{mean}(\hat x g) P a
              - \tfrac{\gamma r^2}{m} \langle a, P g \rangle \hat x,

in seven passes over memory, where PyTorch makes some 30. What it spares a path: docs/long-paths.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from metapl.execution.buffers import swapped

_convolution_backward = torch.ops.aten.convolution_backward.default
_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_norm = torch.ops.aten.native_batch_norm.default
_ALL = [True, True, True]


class HessianGraph:
    """What a gradient is computed for, in a block of :func:`hessian_graph`."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._task: int | None = None  # the backward pass of :meth:`gradient`

    @property
    def unread(self) -> bool:
        """Whether the backward pass that is running is for its graph alone. One within it, of a network that computes a
        gradient itself where a checkpoint or a Function of its own runs it again, is not: its values are read."""
        return self._task == torch._C._current_graph_task_id()

    def gradient(self, value: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The gradient of a scalar, to be differentiated once; its values are not to be read, and NaN for a weight.
        None in a leaf that it does not reach."""

        def begins(_: Tensor) -> None:
            self._task = torch._C._current_graph_task_id()

        hook = value.register_hook(begins)
        try:
            return torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        finally:
            self._task = None
            hook.remove()


@contextmanager
def hessian_graph() -> Iterator[HessianGraph]:
    """A block in which layers run so that a product with the Hessian of what they return is cheap; their outputs are
    those outside of it, to the last bit. Checkpoints run layers again, so the backward passes belong into it.

    Layers in half precision, under autocast, in forward mode, in a transform of ``torch.func``, on another device than
    a CPU, and of tensors of other types, are left to PyTorch; so is a gradient that a forward pass takes itself.
    """
    # A TorchFunctionMode is off within torch.autograd.grad, where checkpoints run.
    graph = HessianGraph()
    with swapped([(vars(F), name, partial(layer, graph)) for name, layer in _LAYERS.items()]):
        yield graph


class _Product(NamedTuple):
    """S and its backward pass: ``backward(g, x, W, wanted)``, the gradients in x, W and the bias."""

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, list[bool]], Sequence[Tensor | None]]


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: _Product, graph: HessianGraph
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.product, ctx.graph = product, graph
        return product.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return (None,) * 5
        given = g, *ctx.saved_tensors, list(ctx.needs_input_grad[:3])
        twice = ctx.graph.unread and torch.is_grad_enabled()
        found = _LinearBackward.apply(*given, ctx.product) if twice else ctx.product.backward(*given)
        return *found, None, None


class _LinearBackward(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], product: _Product) -> Any:
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)
        ctx.product = product
        of_x, of_weight, of_bias = wanted
        # The gradient in a weight that was computed is read, on the way to what that was computed from.
        unread = of_weight and weight.is_leaf and not torch.is_anomaly_enabled()  # which refuses NaN
        in_x, in_weight, in_bias = product.backward(g, x, weight, [of_x, of_weight and not unread, of_bias])
        return in_x, weight.new_full((), torch.nan).expand_as(weight) if unread else in_weight, in_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor | None, A: Tensor | None, c: Tensor | None) -> Any:
        if a is None and A is None and c is None:
            return (None,) * 5
        g, x, weight = ctx.saved_tensors
        _, of_x, of_weight, *_ = ctx.needs_input_grad
        terms = [(t, w) for t, w in ((a, weight), (x, A)) if t is not None and w is not None]
        first, *others = terms or [(x, torch.zeros_like(weight))]
        in_g = ctx.product.forward(*first, c)
        for term in others:
            in_g += ctx.product.forward(*term, None)
        at = x if a is None else a, weight if A is None else A
        wanted = [of_x and A is not None, of_weight and a is not None, False]
        in_x, in_weight, _ = ctx.product.backward(g, *at, wanted)
        return in_g, in_x, in_weight, None, None


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running: Any, momentum: float, eps: float, graph: Any
    ) -> Any:
        y, mean, r = _norm(x, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, r)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.graph = eps, graph
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return (None,) * 7
        x, weight, mean, r = ctx.saved_tensors
        if ctx.graph.unread and torch.is_grad_enabled():
            found = _BatchNormBackward.apply(g, x, weight, mean, r, ctx.eps)
        else:
            found = _norm_backward(g, x, weight, None, None, mean, r, True, ctx.eps, _ALL)
        return *found, None, None, None, None


class _BatchNormBackward(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, eps: float) -> Any:
        in_x, gx, g1 = _norm_backward(g, x, weight, None, None, mean, r, True, eps, _ALL)  # Σ x̂g, Σ g
        ctx.save_for_backward(g, x, weight, mean, r, gx, g1)
        ctx.eps = eps
        return in_x, gx, g1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> Any:
        g, x, weight, mean, r, gx, g1 = ctx.saved_tensors
        zero, one, m = torch.zeros_like(r), torch.ones_like(r), x.numel() // len(r)

        def by_channel(t: Tensor) -> Tensor:
            return t.view(-1, *(1,) * (x.dim() - 2))

        def affine(scale: Tensor, shift: Tensor) -> Any:
            """scale·(x - μ) + shift, in one pass."""
            return _norm(x, scale, shift, mean, one, False, 0.0, 0.0)[0]

        # With γ = 1, the backward pass from a is r P a with the sums; of an input g, μ = 0 and r = 1 it has Σ ag.
        rPa, ax, a1 = _norm_backward(a, x, None, None, None, mean, r, True, ctx.eps, _ALL)
        _, ag, _ = _norm_backward(a, g, None, None, None, zero, one, True, ctx.eps, [False, True, False])
        aPg, wr = ag - (a1 * g1 + ax * gx) / m, weight * r
        k = r * (b - wr * ax / m)
        in_x = affine(-r * (k * gx + wr * r * aPg) / m, -k * g1 / m)
        in_x.addcmul_(g, by_channel(k)).addcmul_(rPa, by_channel(-wr * gx / m))
        in_g = affine(b * r, c).addcmul_(rPa, by_channel(weight))
        return in_g, in_x, r * aPg, None, None, None


def _ours(graph: HessianGraph, *tensors: Tensor | None) -> bool:
    """Whether a layer of these tensors is not left to PyTorch."""
    given = [t for t in tensors if t is not None]
    dtype = given[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == dtype and t.numel() for t in given)
        and all(t.is_cpu and t.layout is torch.strided for t in given)
        and torch.is_grad_enabled()
        and graph.thread == threading.get_ident()
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def _convolution(pytorch: Any, dims: int) -> Callable[..., Any]:
    def layer(
        graph: HessianGraph,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if isinstance(padding, str) or input.dim() != dims + 2 or not _ours(graph, input, weight, bias):
            return pytorch(input, weight, bias, stride, padding, dilation, groups)
        windows = ([n] * dims if isinstance(n, int) else n for n in (stride, padding, dilation))
        how: Any = *windows, False, [0] * dims, groups

        def forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return torch.convolution(x, w, b, *how)

        def backward(g: Tensor, x: Tensor, w: Tensor, wanted: list[bool]) -> Any:
            return _convolution_backward(g, x, w, [len(w)], *how, wanted)

        return _Linear.apply(input, weight, bias, _Product(forward, backward), graph)

    return layer


def _linear(graph: HessianGraph, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    known = input.dim() >= 2 and weight.dim() == 2 and (bias is None or bias.dim() == 1)
    if not known or not _ours(graph, input, weight, bias):
        return _PYTORCH_LINEAR(input, weight, bias)
    return _Linear.apply(input, weight, bias, _Product(_PYTORCH_LINEAR, _linear_backward), graph)


def _linear_backward(g: Tensor, x: Tensor, w: Tensor, wanted: list[bool]) -> Sequence[Tensor | None]:
    of_x, of_weight, of_bias = wanted
    rows = g.flatten(0, -2)
    return (
        g @ w if of_x else None,
        rows.T @ x.flatten(0, -2) if of_weight else None,
        rows.sum(0) if of_bias else None,
    )


def _batch_norm(
    graph: HessianGraph,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    running = running_mean, running_var
    valid = training and eps > 0 and input.numel() > input.shape[1]
    if not valid or weight is None or bias is None or not _ours(graph, input, weight, bias, *running):
        return _PYTORCH_BATCH_NORM(input, *running, weight, bias, training, momentum, eps)
    return _BatchNorm.apply(input, weight, bias, running, momentum, eps, graph)


_PYTORCH_LINEAR, _PYTORCH_BATCH_NORM = F.linear, F.batch_norm
_LAYERS: dict[str, Callable[..., Any]] = {
    "conv1d": _convolution(F.conv1d, 1),
    "conv2d": _convolution(F.conv2d, 2),
    "conv3d": _convolution(F.conv3d, 3),
    "linear": _linear,
    "batch_norm": _batch_norm,
}
