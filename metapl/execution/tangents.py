r"""Norms in a pass in forward mode, by the kernels of their backward passes.

A pass in forward mode carries with each value x its derivative ẋ along a direction of the weights.
PyTorch finds the derivative of a norm's outputs by its formula, a dozen kernels that each read and
write all of the values. But the Jacobian of a norm in its input is symmetric, but for γ:

.. math:: y = \gamma \hat x + \beta, \qquad \hat x = \frac{x - \mu}{\sigma}, \qquad
          \frac{\partial \hat x}{\partial x}
          = \frac{1}{\sigma} \Big(I - \frac{1}{N} 1 1^T - \frac{1}{N} \hat x \hat x^T\Big)

over the N values that share μ and σ. So its product with ẋ is what the backward pass of the norm
returns for a gradient ẋ, which PyTorch has one kernel for. What γ̇ and β̇ add is the norm of x with
these in the place of γ and β:

.. math:: \dot y = \gamma \frac{\partial \hat x}{\partial x} \dot x + \dot\gamma \hat x + \dot\beta

Exact. Where γ differs among the values that share μ and σ, as in layer norm and group norm, it is
multiplied afterwards. Batch norm by its running statistics and other norms are left to PyTorch's
own formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

# Tensors whose kernels these are. Others, such as those that lie on several ranks, are left to
# their own rules.
PLAIN_TENSORS = (Tensor, nn.Parameter)

# Parts of a network that call the functions below.
NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)

# Arguments of PyTorch's kernels: statistics are those of the batch, and of a backward pass the
# gradient in the input alone is asked for.
BY_BATCH = True
OF_INPUT = [True, False, False]
NORM_OF_BATCH: Any = torch._batch_norm_impl_index


def norms_by_backward_kernels(network: nn.Module) -> AbstractContextManager[Any]:
    """Take the derivatives of norms by their backward kernels in a block.

    A network without such norms is left alone, for the mode has a cost for each operation.
    """
    if any(isinstance(part, NORMS) for part in network.modules()):
        return NormsByBackwardKernels()
    return nullcontext()


class NormsByBackwardKernels(TorchFunctionMode):
    """Take the derivatives of norms in forward mode by their backward kernels, in a block."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        keywords = kwargs or {}
        replacement = REPLACEMENTS.get(func)
        if replacement is not None:
            outputs = replacement(*args, **keywords)
            if outputs is not None:
                return outputs
        return func(*args, **keywords)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Return what ``F.batch_norm`` returns, as a dual number; None: it is left to PyTorch.

    Args: those of ``torch.nn.functional.batch_norm``.
    """
    # A channel of one number is refused by PyTorch's own function.
    if not training or input.dim() < 2 or input.numel() <= input.shape[1]:
        return None
    duals = Duals.of(input, weight, bias)
    if duals is None:
        return None
    x = duals.x
    # Which kernels these are, cuDNN's or PyTorch's own, is a part of what they return.
    y, mean, inverse_sigma, reserve, kind = NORM_OF_BATCH(
        x,
        duals.weight,
        duals.bias,
        running_mean,
        running_var,
        BY_BATCH,
        momentum,
        eps,
        torch.backends.cudnn.enabled,
    )
    in_input: Tensor | None = None
    if duals.x_dot is not None:
        in_input, _, _ = torch.ops.aten._batch_norm_impl_index_backward(
            kind,
            x,
            duals.x_dot,
            duals.weight,
            running_mean,
            running_var,
            mean,
            inverse_sigma,
            BY_BATCH,
            eps,
            OF_INPUT,
            reserve,
        )
    if duals.weight is None:
        return duals.dual(y, in_input)
    # By the moments that are known, so that they are not taken from the batch once more.
    variance = inverse_sigma.pow(-2) - eps
    by_affine = F.batch_norm(x, mean, variance, *duals.affine_dot, training=False, eps=eps)
    return duals.dual(y, in_input, by_affine)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Return what ``F.layer_norm`` returns, as a dual number; None: it is left to PyTorch.

    Args: those of ``torch.nn.functional.layer_norm``.
    """
    duals = Duals.of(input, weight, bias)
    if duals is None:
        return None
    shape = [*normalized_shape]
    y = F.layer_norm(duals.x, shape, duals.weight, duals.bias, eps)
    x, x_dot = duals.in_type_of_weights(y)
    by_affine, mean, inverse_sigma = torch.native_layer_norm(x, shape, *duals.affine_dot, eps)
    if x_dot is None:
        return duals.dual(y, by_affine)
    in_input, _, _ = torch.ops.aten.native_layer_norm_backward(
        x_dot, x, shape, mean, inverse_sigma, None, None, OF_INPUT
    )
    if duals.weight is None:
        return duals.dual(y, in_input)
    return duals.dual(y, in_input * duals.weight, by_affine)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Return what ``F.group_norm`` returns, as a dual number; None: it is left to PyTorch.

    Args: those of ``torch.nn.functional.group_norm``.
    """
    duals = Duals.of(input, weight, bias)
    if duals is None:
        return None
    y = F.group_norm(duals.x, num_groups, duals.weight, duals.bias, eps)
    x, x_dot = duals.in_type_of_weights(y)
    rows, channels = x.shape[:2]
    places = x[0, 0].numel()
    by_affine, mean, inverse_sigma = torch.native_group_norm(
        x.contiguous(), *duals.affine_dot, rows, channels, places, num_groups, eps
    )
    if x_dot is None:
        return duals.dual(y, by_affine)
    in_input, _, _ = torch.ops.aten.native_group_norm_backward(
        x_dot.contiguous(),
        x.contiguous(),
        mean,
        inverse_sigma,
        None,
        rows,
        channels,
        places,
        num_groups,
        OF_INPUT,
    )
    if duals.weight is None:
        return duals.dual(y, in_input)
    weight_in_channels = duals.weight.view(-1, *[1] * (x.dim() - 2))
    return duals.dual(y, in_input * weight_in_channels, by_affine)


@dataclass(frozen=True)
class Duals:
    """The arguments of a norm: values, and their derivatives along the direction.

    Attributes:
        x: the input.
        x_dot: ẋ; None where the input does not depend on the direction.
        weight, bias: γ and β; None where the norm has none.
        affine_dot: γ̇ and β̇, None where there is none. A weight has a derivative, perhaps zeros.
    """

    x: Tensor
    x_dot: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    affine_dot: tuple[Tensor | None, Tensor | None]

    @classmethod
    def of(cls, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Duals | None:
        """Return the parts of three arguments; None where this module has no rule for them."""
        tensors = [t for t in (x, weight, bias) if t is not None]
        if any(type(t) not in PLAIN_TENSORS for t in tensors):
            return None
        # Under vmap a dual number cannot be taken apart.
        if any(map(is_batchedtensor, tensors)):
            return None
        if weight is None and bias is not None:
            # Modules have both, or a weight alone.
            return None
        x_value, x_dot = forward_ad.unpack_dual(x)
        weight_value, weight_dot = unpacked(weight)
        bias_value, bias_dot = unpacked(bias)
        if x_dot is None and weight_dot is None and bias_dot is None:
            return None
        if weight_value is not None and weight_dot is None:
            weight_dot = torch.zeros_like(weight_value)
        return cls(x_value, x_dot, weight_value, bias_value, (weight_dot, bias_dot))

    def in_type_of_weights(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x and ẋ in the type of the outputs or that of γ, whichever is wider.

        A region of autocast may take the norm in float32, or of inputs in half precision with
        weights in float32, for which not every kernel is made.
        """
        dtype = y.dtype
        if self.weight is not None:
            dtype = torch.promote_types(dtype, self.weight.dtype)
        return self.x.to(dtype), None if self.x_dot is None else self.x_dot.to(dtype)

    def dual(self, y: Tensor, *parts: Tensor | None) -> Tensor:
        """Return y with its derivative.

        Args:
            parts: of the derivative: the product with ẋ, and the norm of x with γ̇ and β̇ for γ
                and β. What is None is left out. Without γ the latter would be x̂, and is no part.
        """
        terms = [part for part in parts if part is not None]
        y_dot = terms[0]
        for term in terms[1:]:
            y_dot = y_dot + term
        dual: Tensor = forward_ad.make_dual(y, y_dot.to(y.dtype))
        return dual


REPLACEMENTS: dict[Any, Callable[..., Tensor | None]] = {
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
}


def unpacked(t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return a tensor and its derivative, None where it has none."""
    if t is None:
        return None, None
    primal, tangent = forward_ad.unpack_dual(t)
    return primal, tangent
