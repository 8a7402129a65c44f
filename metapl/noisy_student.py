"""What Noisy Student is made of, for a loop of one's own.

A teacher labels examples, some are chosen, and a noisy student learns from both; ``metapl
noisy-student`` runs these rounds, and examples/noisy_student_imagenet.py writes them out.

Xie, Luong, Hovy and Le, "Self-training with Noisy Student improves ImageNet classification" (CVPR
2020).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.data.draws import fold_in
from metapl.metrics.predictions import evaluating
from metapl.pictures.batches import Fetched, UnlabeledBatches
from metapl.pictures.views.base import Identity
from metapl.problems.model_noise import NoisyStudentLoss, with_model_noise
from metapl.training.options import DECAY, decay_interval

# How many examples of each kind the losses with and without noise are measured on, and how many in
# a pass.
MEASURED_ON = 128
MEASURED_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Chosen:
    """Unlabeled examples that were selected, with their labels.

    Args:
        positions: int64 (n,), their numbers among all unlabeled examples, each as often as it
            counts.
        rows: int64 (n,), the row of each in the store.
        labels: gives the distributions of rows of the store, float32 (B, C).
    """

    positions: Tensor
    rows: Tensor
    labels: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class PseudoLabeledBatches(UnlabeledBatches):
    """Batches (x, stored) of chosen examples.

    The stored distributions are read from the store as they are needed.
    """

    chosen: Chosen

    @property
    def columns(self) -> dict[str, Tensor]:
        """Return what stands beside the images: the rows of their labels in the store."""
        return {"rows": self.chosen.rows}

    def fetch(self, step: int) -> Fetched:
        """Return the images of a step, and their labels in the place of the rows."""
        *images, rows = super().fetch(step)
        return (*images, self.chosen.labels(rows))


class LossesApart:
    """Record the losses of labeled and of unlabeled examples, each with the noise and without it.

    The paper reads its ablation of noise by these: without noise the loss on labeled pictures falls
    much, and that on unlabeled ones less. All are cross-entropies of the weights that are trained,
    by the running statistics of norms, over the same examples at each look; noise is what the views
    and the network add. Cost: four passes over 128 examples of each kind, at every ``every``-th
    step and at the last.
    """

    def __init__(
        self, labeled: Any, pairs: Any, loss: NoisyStudentLoss, *, every: int, steps: int
    ) -> None:
        self.every = every
        self.steps = steps
        self.hard = loss.hard
        self.model_noise = loss.model_noise
        # The batches of a training may be too large for one pass of one process.
        labeled = in_batches_of(labeled, MEASURED_AT_ONCE)
        pairs = in_batches_of(pairs, MEASURED_AT_ONCE)
        self.sources = {"labeled": labeled, "unlabeled": pairs}
        self.clean = {
            "labeled": dataclasses.replace(labeled, view=Identity(), crop=None),
            "unlabeled": dataclasses.replace(pairs, weak=Identity(), crop=None),
        }

    def __call__(self, step: int, row: Mapping[str, float], trainer: Any) -> dict[str, float]:
        """Return the losses of a step at which they are measured."""
        if step % self.every and step != self.steps:
            return {}
        network: nn.Module = trainer.student
        losses: dict[str, float] = {}
        with evaluating(network):
            for name, source in self.sources.items():
                has_model_noise = name == "labeled" or self.model_noise
                with with_model_noise(network, on=has_model_noise):
                    losses[f"{name}_loss_with_noise"] = self.loss(network, source)
                losses[f"{name}_loss_without_noise"] = self.loss(network, self.clean[name])
        return losses

    @torch.no_grad()
    def loss(self, network: nn.Module, source: Any) -> float:
        """Return the mean cross-entropy over the first examples of a source."""
        device = next(network.parameters()).device
        total = 0.0
        count = 0
        for step in range(MEASURED_ON // MEASURED_AT_ONCE):
            x, target = source[step]
            target = target.to(device)
            if self.hard and target.is_floating_point():
                target = target.argmax(dim=1)
            logits = network(x.to(device)).float()
            total += float(F.cross_entropy(logits, target, reduction="sum"))
            count += len(x)
        return total / count


def in_batches_of(source: Any, size: int) -> Any:
    """Return a source of batches with batches of another size."""
    sampler = dataclasses.replace(source.sampler, batch_size=size)
    return dataclasses.replace(source, sampler=sampler)


class Noised(nn.Module):
    """A network with dropout and stochastic depth in eval mode; each batch has its own masks.

    The masks follow from the batch, so labels are the same when they are gone on with.
    """

    def __init__(self, network: nn.Module, seed: int) -> None:
        super().__init__()
        self.network = network
        self.seed = seed

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch, with its own masks."""
        content = hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes()).digest()
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), with_model_noise(self.network, on=True):
            torch.manual_seed(fold_in(self.seed, int.from_bytes(content[:8], "little")))
            logits: Tensor = self.network(x)
            return logits


def end_matched(steps: int, usual: int) -> float:
    """Return the factor of the first rate with which fewer steps end at the usual rate.

    Both ``steps`` and ``usual`` ones follow the exponential schedule of the usual number.

    >>> [f"{0.128 * end_matched(epochs, 350):.3g}" for epochs in (35, 70, 140, 280, 350)]  # study 8
    ['0.00235', '0.00366', '0.00891', '0.0526', '0.128']
    """
    return float(DECAY ** ((usual - steps) / decay_interval(usual)))


def freeze_first_layers(network: nn.Module, share: float) -> None:
    """Freeze the first share of the layers with weights, and the statistics of their norms."""
    layers: list[nn.Module] = []
    for module in network.modules():
        weights = list(module.parameters(recurse=False))
        if weights:
            layers.append(module)
    for layer in layers[: int(share * len(layers))]:
        layer.eval()
        for weight in layer.parameters(recurse=False):
            weight.requires_grad = False
