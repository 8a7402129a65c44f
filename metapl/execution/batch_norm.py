"""Batch norm whose statistics are of the rows of several processes.

It has derivatives of every order and kind. ``torch.nn.SyncBatchNorm`` shares statistics too. Its
backward pass has no derivative and it has no forward mode, which the exact gradients need, and it
does not run on a CPU; so moments are gathered here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from metapl.execution.numerics import HALF


class SumOverRanks(torch.autograd.Function):
    """The sum over the ranks of a group, of a tensor that each of them has.

    Every rank's loss depends on every rank's part, so the gradient of a part is the sum of all
    ranks' gradients: the same sum again, and so are a second derivative and a tangent.
    """

    @staticmethod
    def forward(part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, dist.ProcessGroup], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total: Tensor = SumOverRanks.apply(grads[0], ctx.group)
        return total, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        total: Tensor = SumOverRanks.apply(tangent, ctx.group)
        return total


class SharedBatchNorm(_BatchNorm):
    r"""Batch norm over the rows of all ranks of a group, each of which has as many.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta, \qquad
              \mu = \tfrac1R \sum_r \mu_r, \quad
              \sigma^2 = \tfrac1R \sum_r \big(\sigma_r^2 + (\mu_r - \mu)^2\big)

    In evaluation it is the batch norm that it was made of, and exchanges nothing.

    Cost: an exchange of 2 C numbers a rank in each pass, forward and backward. What is kept for the
    backward pass is the input, as for torch's own.
    """

    group: dist.ProcessGroup

    @classmethod
    def like(cls, norm: _BatchNorm, group: dist.ProcessGroup) -> SharedBatchNorm:
        """Return a norm with the parameters, buffers and settings of another one."""
        shared = cls.__new__(cls)
        shared.__dict__.update(vars(norm))
        shared.group = group
        return shared

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedBatchNorm:
        """Return a norm of the same group, which cannot be copied."""
        memo[id(self.group)] = self.group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(vars(self), memo))
        return copied

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected 2 dimensions or more (got {input.ndim})")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)
        own_var_C, own_mean_C = _moments(input)
        ranks = self.group.size()
        # Each rank's moments are the only ones in their row, so that the sum gathers them.
        is_own_R = torch.zeros(ranks, 1, 1, dtype=own_mean_C.dtype, device=input.device)
        is_own_R[self.group.rank()] = 1
        own_moments_R2C = is_own_R * torch.stack([own_mean_C, own_var_C])
        moments_R2C: Tensor = SumOverRanks.apply(own_moments_R2C, self.group)
        means_RC, vars_RC = moments_R2C.unbind(1)
        mean_C = means_RC.mean(0)
        var_C = vars_RC.mean(0) + (means_RC - mean_C).square().mean(0)
        if self.training and self.running_mean is not None:
            count = ranks * input.numel() // input.shape[1]
            self._follow(mean_C.detach(), var_C.detach(), count=count)
        # As a scale and a shift of the input, so that nothing else of its size is kept.
        scale_C = (var_C + self.eps).rsqrt()
        if self.weight is not None:
            scale_C = scale_C * self.weight
        shift_C = -mean_C * scale_C
        if self.bias is not None:
            shift_C = shift_C + self.bias
        shape = (1, -1, *[1] * (input.ndim - 2))
        return torch.addcmul(shift_C.view(shape), input, scale_C.view(shape)).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean_C: Tensor, var_C: Tensor, count: int) -> None:
        """Move the running statistics, as torch does: the variance by its unbiased estimate.

        Args:
            count: the numbers of which they are the moments, in each channel.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.mul_(1 - share).add_(share * mean_C)
        self.running_var.mul_(1 - share).add_(share * var_C * (count / max(1, count - 1)))


def _moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variance and the mean of each channel, (C,) each, of this rank's rows.

    In float32 or wider.
    """
    dims = [dim for dim in range(input.ndim) if dim != 1]
    if input.dtype not in HALF:
        var_C, mean_C = torch.var_mean(input, dims, correction=0)
        return var_C, mean_C
    # A copy in float32 would be kept for the backward pass; sums of squares are taken from the
    # input as it is.
    count = input.numel() // input.shape[1]
    mean_C = input.mean(dims, dtype=torch.float32)
    square_C = torch.linalg.vector_norm(input, dim=dims, dtype=torch.float32).square() / count
    return (square_C - mean_C.square()).clamp(min=0), mean_C


def share_batch_norms(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Put a :class:`SharedBatchNorm` in the place of each batch norm of a network.

    It has the parameters and buffers of the one that it replaces.
    """
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, _BatchNorm):
                setattr(part, name, SharedBatchNorm.like(child, group))
