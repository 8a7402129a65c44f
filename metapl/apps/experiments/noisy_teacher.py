"""A teacher that labels with noise: augmented examples, with dropout and stochastic depth."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metapl.apps.experiments.labeling import Read, SourcePictures
from metapl.apps.pictures.views.base import View
from metapl.data.draws import fold_in
from metapl.problems.self_training import with_model_noise


@dataclass(frozen=True, eq=False, kw_only=True)
class Augmented(SourcePictures):
    """The examples of a source, in order and augmented.

    Args:
        view: augments.
        seed: of its draws.
    """

    view: View
    seed: int

    def batch(self, step: int) -> Read:
        x, numbers, digests, skipped = super().batch(step)
        return self.view(x, seed=self.seed, step=self.first + step, examples=numbers), numbers, digests, skipped


class Noised(nn.Module):
    """A network with dropout and stochastic depth even in eval mode; each batch has masks of its own.

    The masks follow from the batch, so labels are the same when they are gone on with.
    """

    def __init__(self, network: nn.Module, seed: int) -> None:
        super().__init__()
        self.network, self.seed = network, seed

    def forward(self, x: Tensor) -> Tensor:
        content = hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes()).digest()
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), with_model_noise(self.network, on=True):
            torch.manual_seed(fold_in(self.seed, int.from_bytes(content[:8], "little")))
            logits: Tensor = self.network(x)
            return logits
