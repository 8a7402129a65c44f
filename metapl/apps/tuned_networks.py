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


class Normalized(nn.Module):
    r"""A network behind the normalization of pictures: what goes in is in [0, 1].

    .. math:: \mathrm{logits} = f\big((x_c - \mathrm{mean}_c) / \mathrm{std}_c\big)

    It takes images (B, C, H, W) to logits (B, K). :func:`metapl.apps.export.export` writes the
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
        if (
            not mean
            or len(mean) != len(std)
            or not all(map(math.isfinite, [*mean, *std]))
            or min(std) <= 0
        ):
            expected = "one finite number per channel in each, those of std above 0"
            raise MetaplError(
                f"Normalized got mean={list(mean)}, std={list(std)}; expected {expected}."
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
    """A frozen layer with a trained change, :math:`W + BA`, which is zero at the start (LoRA, arXiv:2106.09685)."""

    down: Tensor  # A, (rank, the sizes of an output's weights)
    up: Tensor  # B, (out, rank)

    def forward(self, input: Tensor) -> Tensor:
        # BA is not multiplied: its gradient would cost as much as that of all of W.
        return super().forward(input) + F.linear(F.linear(input, self.down), self.up)


class LowRankConv2d(nn.Conv2d):
    """A convolution, likewise."""

    down: Tensor
    up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.conv2d(
            self._conv_forward(input, self.down, None), self.up[:, :, None, None]
        )


class Tuned(Normalized):
    """A pretrained network behind the normalization of its input; see :class:`Normalized`, whose names it has.

    What is frozen runs as in evaluation: no running statistics move, and nothing is dropped. The
    change of low rank of a layer whose weight its parent reads, as some attention does, is not
    used.

    Args:
        heads: the names of its layers that turn features into classes.
        tuning: "head" trains the head alone; "lora" also changes of each linear layer and
            convolution of this rank; "all" everything.

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
        self.head, self.tuning = heads[0], tuning
        self.seen = WeakIdKeyDictionary()  # what the head sees of batches that are alive
        if tuning != "all":
            module.requires_grad_(False)
            module.get_submodule(self.head).requires_grad_(True)
        for name, layer in module.named_modules() if tuning == "lora" else ():
            kind = {nn.Linear: LowRankLinear, nn.Conv2d: LowRankConv2d}.get(type(layer))
            if (
                kind is None
                or f"{name}.".startswith(f"{self.head}.")
                or getattr(layer, "groups", 1) > 1
            ):
                continue
            weight: Any = layer.weight
            if (
                rank * (len(weight) + weight[0].numel()) < weight.numel()
            ):  # fewer weights than it has
                layer.__class__ = kind  # whoever reads its sizes or its weight finds them
                layer.down = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
                layer.up = nn.Parameter(weight.new_zeros(len(weight), rank))
                nn.init.kaiming_uniform_(layer.down, a=math.sqrt(5))
        self.train()

    def train(self, mode: bool = True) -> Tuned:
        super().train(mode)
        if self.tuning != "all":
            self.module.eval()
            self.module.get_submodule(self.head).train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        # What a wrapper of vmap or an inference tensor has seen is of no use later.
        passing = (
            torch._C._functorch.peek_interpreter_stack() is not None
            or torch.is_inference_mode_enabled()
        )
        if self.tuning != "head" or passing or images.requires_grad or images.is_inference():
            return super().forward(images)
        head, kind = self.module.get_submodule(self.head), images.device.type
        frozen = [
            p for name, p in self.module.named_parameters() if not name.startswith(f"{self.head}.")
        ]
        if any(p.requires_grad for p in frozen):
            return super().forward(images)
        # What the features depend on: these pictures, autocast, and these weights, or copies of
        # them in a replay.
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        now = images.data_ptr(), images._version, cast
        then, weights, features = self.seen.get(images, (None, (), None))
        same = then == now and all(
            p._version == version and (p is q or torch.equal(p, q))
            for (p, version), q in zip(weights, frozen, strict=True)
        )
        if not same:
            features = self.features(images)
            self.seen[images] = now, [(p, p._version) for p in frozen], features
        logits: Tensor = head(features)
        return logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the head sees of pictures (B, C, H, W) in [0, 1]: (B, F)."""
        found: list[Tensor] = []
        head = self.module.get_submodule(self.head)
        hook = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            super().forward(images)
        finally:
            hook.remove()
        return found[0]


def begin_as(first: nn.Module, second: nn.Module) -> None:
    """Let the second network begin as the first one, and hold its frozen weights, so that they are stored once."""
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
    """Weights under the names of the network as it is built by its name, low-rank changes added to what they change."""
    found = dict(state)
    for name in state:
        stem, _, last = name.rpartition(".")
        if last == "up" and f"{stem}.down" in state:
            weight, up, down = (found.pop(f"{stem}.{part}") for part in ("weight", "up", "down"))
            found[f"{stem}.weight"] = weight + (up @ down.flatten(1)).reshape(weight.shape)
    return found
