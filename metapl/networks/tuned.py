"""Networks that normalize their pictures, and pretrained networks of which a part is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metapl.errors import MetaplError

Tuning = Literal["head", "all"]

# The mean and the standard deviation of each channel that pretrained weights expect.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Normalized(nn.Module):
    r"""A network behind the normalization of pictures: what goes in is in [0, 1].

    .. math:: \mathrm{logits} = f\big((x_c - \mathrm{mean}_c) / \mathrm{std}_c\big)

    It takes images (B, C, H, W) to logits (B, K). :func:`metapl.networks.export` writes the
    weights of ``module`` under its own names, and mean and std beside them.

    Args:
        module: a network f of normalized pictures.
        mean, std: one finite number per channel, in units of [0, 1], ``std`` above 0. They are
            buffers, saved with the weights (beside ``module.…``) and never trained.
        mirrored: in evaluation, return the mean of the logits of a picture and of its mirror image,
            which costs two passes.

    Raises:
        MetaplError: another mean or std; on a call, pictures of whole numbers.

    >>> Normalized(nn.Flatten(), mean=[0.5], std=[0.25])(torch.ones(2, 1, 1, 1))
    tensor([[2.],
            [2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        mirrored: bool = False,
    ) -> None:
        super().__init__()
        is_complete = len(mean) > 0 and len(mean) == len(std)
        is_finite = all(math.isfinite(value) for value in (*mean, *std))
        if not is_complete or not is_finite or min(std) <= 0:
            raise MetaplError(
                f"Normalized got mean={list(mean)}, std={list(std)}; expected one finite number "
                "per channel in each, those of std above 0."
            )
        self.module = module
        self.mirrored = mirrored
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            raise MetaplError(
                f"the network got {images.dtype} pictures; expected values in [0, 1]: images / 255."
            )
        # Mean and std are float32; in a network of bfloat16 weights, the pictures stay as they
        # came.
        normalized = ((images - self.mean) / self.std).to(images.dtype)
        logits: Tensor = self.module(normalized)
        if self.mirrored and not self.training:
            logits = (logits + self.module(normalized.flip(-1))) / 2
        return logits

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Tuned(Normalized):
    """A pretrained network of which a part is trained, behind the normalization of its input.

    Its tensors have the names of :class:`Normalized`. What is frozen runs as in evaluation: no
    running statistics move, and nothing is dropped.

    Args:
        module, mean, std: as of :class:`Normalized`.
        heads: the names of its layers that turn features into classes.
        tuning: "head" trains the head alone, "all" everything.

    Raises: MetaplError for several heads.
    """

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        heads: Sequence[str],
        tuning: Tuning,
    ) -> None:
        super().__init__(module, mean, std)
        if len(heads) != 1:
            raise MetaplError(
                f"this backbone has the heads {', '.join(heads)}; expected a network with one."
            )
        self.head = heads[0]
        self.tuning = tuning
        if tuning == "head":
            module.requires_grad_(requires_grad=False)
            module.get_submodule(self.head).requires_grad_(requires_grad=True)
        self.train()

    def train(self, mode: bool = True) -> Tuned:
        """Set the mode of the head; what is frozen stays in evaluation mode."""
        super().train(mode)
        if self.tuning == "head":
            self.module.eval()
            self.module.get_submodule(self.head).train(mode)
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return what the head sees of pictures (B, C, H, W) in [0, 1]: (B, F)."""
        inputs_of_head: list[Tensor] = []
        head = self.module.get_submodule(self.head)
        hook = head.register_forward_pre_hook(lambda _, inputs: inputs_of_head.append(inputs[0]))
        try:
            super().forward(images)
        finally:
            hook.remove()
        return inputs_of_head[0]


def begin_as(first: nn.Module, second: nn.Module) -> None:
    """Let the second network begin as the first one, and share its frozen weights.

    So these are in memory once.
    """
    first = first.module if isinstance(first, DistributedDataParallel) else first
    if not isinstance(first, Tuned) or not isinstance(second, Tuned):
        return
    second.load_state_dict(first.state_dict())
    frozen = {name: p for name, p in first.named_parameters() if not p.requires_grad}
    for prefix, part in second.named_modules():
        for name in part._parameters:
            if (shared := frozen.get(f"{prefix}.{name}")) is not None:
                part._parameters[name] = shared
