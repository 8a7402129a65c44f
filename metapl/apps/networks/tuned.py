"""A pretrained network of which a part is trained: its head, low-rank changes of its layers, or all of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.weak import WeakIdKeyDictionary

from metapl.apps.networks.weights import Normalized
from metapl.errors import MetaplError

Tuning = Literal["head", "lora", "all"]


class LowRank(nn.Module):
    r"""A trained change of a frozen weight, :math:`W + BA`, which is zero at the start (LoRA, arXiv:2106.09685).

    Args:
        weight: (out, ...) of a linear layer or a convolution; A is (rank, the rest of its sizes), B is (out, rank).
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(len(weight), rank))
        self.down = nn.Parameter(torch.empty(rank, weight[0].numel()))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return changed(weight, self.up, self.down)


def changed(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return weight + (up @ down).reshape(weight.shape)


class Tuned(Normalized):
    """A pretrained network behind the normalization of its input; see :class:`Normalized`, whose names it has.

    What is frozen runs as in evaluation: no running statistics move, and nothing is dropped.

    Args:
        heads: the names of its layers that turn features into classes.
        tuning: "head" trains the head alone; "lora" also changes of each linear layer and convolution of this rank;
            "all" everything.

    Cost: with "head", one pass of what is frozen for each batch, however many passes a step has: what the head sees is
    kept as long as the batch.

    Raises: MetaplError for several heads, unless all is trained.
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
            raise MetaplError(f"this backbone has the heads {', '.join(heads)}; expected a network with one.")
        self.head, self.tuning = heads[0], tuning
        self.seen = WeakIdKeyDictionary()  # what the head sees of batches that are alive
        if tuning != "all":
            module.requires_grad_(False)
            module.get_submodule(self.head).requires_grad_(True)
        if tuning == "lora":
            for name, layer in [*module.named_modules()]:
                inside = f"{name}.".startswith(f"{self.head}.")
                if isinstance(layer, nn.Linear | nn.Conv2d) and not inside:
                    sizes = len(layer.weight), layer.weight[0].numel()
                    if rank * sum(sizes) < math.prod(sizes):  # else the layer itself has fewer weights
                        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
        self.train()

    def train(self, mode: bool = True) -> Tuned:
        super().train(mode)
        if self.tuning != "all":
            self.module.eval()
            self.module.get_submodule(self.head).train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.tuning != "head" or images.requires_grad:
            return super().forward(images)
        features = self.seen.get(images)
        if features is None:
            features = self.seen[images] = self.features(images)
        logits: Tensor = self.module.get_submodule(self.head)(features)
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
    inside = ".parametrizations.weight."
    found = {name: t for name, t in state.items() if inside not in name}
    for name in state:
        stem, _, last = name.rpartition(inside)
        if last == "original":
            up, down = (state[f"{stem}{inside}0.{part}"] for part in ("up", "down"))
            found[f"{stem}.weight"] = changed(state[name], up, down)
    return found
