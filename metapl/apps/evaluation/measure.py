"""A network's accuracy on damaged and on attacked pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from metapl.apps.evaluation.attacks import Attack, attacked
from metapl.apps.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from metapl.apps.evaluation.errors import mean_corruption_error
from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.metrics.predictions import eval_mode


@dataclass(frozen=True)
class Robustness:
    """Top-1 accuracies in [0, 1].

    Args:
        n: pictures.
        corruptions: by kind, one for each severity from 1 to 5; empty where no corruption was asked for.
        attacks: by attack, and then by ε in 1/255.
        mean_corruption_error: mCE in %, where the classes are ImageNet's.
    """

    n: int
    corruptions: dict[str, tuple[float, ...]]
    attacks: dict[str, dict[str, float]]
    mean_corruption_error: float | None = None

    @classmethod
    def of(
        cls, n: int, corruptions: dict[str, tuple[float, ...]], attacks: dict[str, dict[str, float]], imagenet: bool
    ) -> Robustness:
        """With mCE where all 15 kinds are there and the classes are ImageNet's."""
        complete = imagenet and corruptions.keys() == CORRUPTIONS.keys()
        errors = {name: [1 - accuracy for accuracy in accuracies] for name, accuracies in corruptions.items()}
        return cls(n, corruptions, attacks, mean_corruption_error(errors) if complete else None)

    @property
    def mean_corrupted_accuracy(self) -> float | None:
        """The plain mean over all kinds and severities."""
        return fmean(map(fmean, self.corruptions.values())) if self.corruptions else None

    def to_json(self) -> dict[str, Any]:
        """As ``evaluation.json`` has it."""
        content: dict[str, Any] = {"attacks": self.attacks} if self.attacks else {}
        if not self.corruptions:
            return content
        by_kind = {
            name: {"error": 1 - fmean(accuracies), "accuracy_by_severity": list(accuracies)}
            for name, accuracies in self.corruptions.items()
        }
        means = {name: getattr(self, name) for name in ("mean_corrupted_accuracy", "mean_corruption_error")}
        return {"corruptions": by_kind} | means | content


def measure(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    attacks: Sequence[Attack] = (),
    eps: Sequence[float] = (),
    imagenet: bool = False,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Robustness:
    """Accuracies on corrupted and on attacked pictures.

    Args:
        network: gives logits (B, C) of pictures in [0, 1]; it runs in evaluation mode.
        batches: of pictures (B, C, H, W) in [0, 1] and labels (B,), read once.
        corruptions: kinds, each in five severities.
        attacks, eps: each attack with each ε, in 1/255; attacks are on the pictures as they are. What is named twice,
            here and among the corruptions, is measured once.
        imagenet: the classes are ImageNet's, so that errors can be divided by AlexNet's.
        seed: of the corruptions.
        progress: called with the number of pictures done.

    Cost: 75 forward passes a picture and, mostly, the corruptions, on one core.

    Raises:
        MetaplError: there are no pictures, or what is given are not pictures.
    """
    device = next(network.parameters()).device
    damages = dict.fromkeys((name, severity) for name in corruptions for severity in SEVERITIES)
    reaches = dict.fromkeys((attack, float(reach)) for attack in attacks for reach in eps)
    right: Counter[tuple[str, float]] = Counter()
    n = 0

    def count(x: Tensor, y: Tensor) -> int:
        with torch.inference_mode():
            return int((checks.logits(network(x), "network").argmax(-1) == y).sum())

    with eval_mode(network):
        for x, y in batches:
            if x.ndim != 4 or x.shape[1] not in (1, 3):
                raise MetaplError(
                    "corruptions and attacks are for pictures (B, 1 or 3, H, W), and this network's inputs are "
                    f"{tuple(x.shape)}."
                )
            x, y = x.to(device), y.to(device)
            for name, severity in damages:
                right[name, severity] += count(corrupted(x, name, severity, seed=seed, first=n), y)
            for attack, reach in reaches:
                right[attack, reach] += count(attacked(network, x, y, attack, reach), y)
            n += len(y)
            progress(n)
    if not n:
        raise MetaplError("there are no pictures to measure on; expected at least one.")
    found = {name: tuple(right[name, severity] / n for severity in SEVERITIES) for name, _ in damages}
    by_eps: dict[str, dict[str, float]] = {attack: {} for attack, _ in reaches}
    for attack, reach in reaches:
        by_eps[attack][repr(reach).removesuffix(".0")] = right[attack, reach] / n
    return Robustness.of(n, found, by_eps, imagenet)
