"""Networks that normalize their pictures, and pretrained networks of which a part is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from metapl.errors import MetaplError

Tuning = Literal["head", "lora", "all"]

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

    Raises:
        MetaplError: another mean or std; on a call, pictures of whole numbers.

    >>> Normalized(nn.Flatten(), mean=[0.5], std=[0.25])(torch.ones(2, 1, 1, 1))
    tensor([[2.],
            [2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        is_complete = len(mean) > 0 and len(mean) == len(std)
        is_finite = all(math.isfinite(value) for value in (*mean, *std))
        if not is_complete or not is_finite or min(std) <= 0:
            raise MetaplError(
                f"Normalized got mean={list(mean)}, std={list(std)}; expected one finite number "
                "per channel in each, those of std above 0."
            )
        self.module = module
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            raise MetaplError(
                f"the network got {images.dtype} pictures; expected values in [0, 1]: images / 255."
            )
        # Mean and std are float32; in a network of bfloat16 weights, the pictures stay as they
        # came.
        logits: Tensor = self.module(((images - self.mean) / self.std).to(images.dtype))
        return logits

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class LowRankLinear(nn.Linear):
    """A frozen layer with a trained update, :math:`W + BA`, which is zero at the start (LoRA).

    ``down`` is A, (rank, the sizes of an output's weights), and ``up`` is B, (out, rank). Source:
    arXiv:2106.09685.
    """

    down: Tensor
    up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        # BA is not multiplied: its gradient would cost as much as that of all of W.
        return super().forward(input) + F.linear(F.linear(input, self.down), self.up)


class LowRankConv2d(nn.Conv2d):
    """A frozen convolution with a trained update, as :class:`LowRankLinear`."""

    down: Tensor
    up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.conv2d(
            self._conv_forward(input, self.down, None), self.up[:, :, None, None]
        )


class Tuned(Normalized):
    """A pretrained network of which a part is trained, behind the normalization of its input.

    Its tensors have the names of :class:`Normalized`. What is frozen runs as in evaluation: no
    running statistics move, and nothing is dropped. The LoRA update of a layer whose weight its
    parent reads, as some attention does, is not used.

    Args:
        module, mean, std: as of :class:`Normalized`.
        heads: the names of its layers that turn features into classes.
        tuning: "head" trains the head alone; "lora" also a LoRA update of each linear layer and
            convolution; "all" everything.
        rank: of the LoRA updates.

    Cost: with "head", one pass of what is frozen for each batch, however many passes a step has:
    what the head sees is kept as long as the batch.

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
        rank: int,
    ) -> None:
        super().__init__(module, mean, std)
        if len(heads) != 1:
            raise MetaplError(
                f"this backbone has the heads {', '.join(heads)}; expected a network with one."
            )
        self.head = heads[0]
        self.tuning = tuning

        # What the head sees of batches that are alive.
        self.seen = WeakIdKeyDictionary()

        if tuning != "all":
            module.requires_grad_(requires_grad=False)
            module.get_submodule(self.head).requires_grad_(requires_grad=True)
        if tuning == "lora":
            for name, layer in module.named_modules():
                if not f"{name}.".startswith(f"{self.head}."):
                    _add_low_rank_update(layer, rank)
        self.train()

    def train(self, mode: bool = True) -> Tuned:
        """Set the mode of the head; what is frozen stays in evaluation mode."""
        super().train(mode)
        if self.tuning != "all":
            self.module.eval()
            self.module.get_submodule(self.head).train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.tuning != "head" or images.requires_grad or not _can_be_kept(images):
            return super().forward(images)
        frozen = [
            parameter
            for name, parameter in self.module.named_parameters()
            if not name.startswith(f"{self.head}.")
        ]
        if any(parameter.requires_grad for parameter in frozen):
            return super().forward(images)
        # The features depend on these pictures, on autocast, and on these weights, or copies of
        # them in a replay.
        kind = images.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (images.data_ptr(), images._version, autocast)
        kept_key, kept_weights, features = self.seen.get(images, (None, (), None))
        if kept_key != key or not _are_same(kept_weights, frozen):
            features = self.features(images)
            weights = [(parameter, parameter._version) for parameter in frozen]
            self.seen[images] = (key, weights, features)
        logits: Tensor = self.module.get_submodule(self.head)(features)
        return logits

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


def _add_low_rank_update(layer: nn.Module, rank: int) -> None:
    """Turn a layer into one with a LoRA update, where that has fewer weights than the layer."""
    kind = {nn.Linear: LowRankLinear, nn.Conv2d: LowRankConv2d}.get(type(layer))
    if kind is None or getattr(layer, "groups", 1) > 1:
        return
    weight: Any = layer.weight
    if rank * (len(weight) + weight[0].numel()) >= weight.numel():
        return
    # The layer stays the same object, so whoever reads its sizes or its weight finds them.
    layer.__class__ = kind
    layer.down = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
    layer.up = nn.Parameter(weight.new_zeros(len(weight), rank))
    nn.init.kaiming_uniform_(layer.down, a=math.sqrt(5))


def _can_be_kept(images: Tensor) -> bool:
    """Return whether features of these pictures are of use later.

    Those of a wrapper of ``vmap``, and of an inference tensor, are not.
    """
    is_wrapped = torch._C._functorch.peek_interpreter_stack() is not None
    return not (is_wrapped or torch.is_inference_mode_enabled() or images.is_inference())


def _are_same(
    kept_weights: Sequence[tuple[nn.Parameter, int]], weights: Sequence[nn.Parameter]
) -> bool:
    """Return whether weights are those that were kept, with their versions, or copies of them."""
    for (kept_weight, version), weight in zip(kept_weights, weights, strict=True):
        if kept_weight._version != version:
            return False
        if kept_weight is not weight and not torch.equal(kept_weight, weight):
            return False
    return True


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
    second.seen = first.seen


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with each LoRA update added to the weight of its layer.

    Their names are those of the network as it is built by its name.
    """
    weights = dict(state)
    for name in state:
        layer, _, last = name.rpartition(".")
        if last == "up" and f"{layer}.down" in state:
            weight = weights.pop(f"{layer}.weight")
            up = weights.pop(f"{layer}.up")
            down = weights.pop(f"{layer}.down")
            update = (up @ down.flatten(1)).reshape(weight.shape)
            weights[f"{layer}.weight"] = weight + update
    return weights
