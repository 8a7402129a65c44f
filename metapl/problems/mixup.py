"""Mixup: a network learns mixtures of two examples, and the same mixtures of their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import Batch
from metapl.execution.numerics import wide
from metapl.problems.base import Signal
from metapl.problems.losses import only_where_declared
from metapl.runs.fields import AboveZero, Range, check_fields


@dataclass(frozen=True)
class MixUp:
    r"""Cross-entropy on mixtures of two examples of a batch.

    One share is drawn a step, and each row has another row of the batch as its partner.

    .. math:: \frac1B \sum_i \mathrm{CE}\big(\lambda y_i + (1-\lambda) y_{\pi(i)},\;
              T(\lambda x_i + (1-\lambda) x_{\pi(i)})\big), \quad
              \lambda = \max(\lambda', 1 - \lambda'),\ \lambda' \sim \mathrm{Beta}(a, a)

    π is a random permutation. y are the distributions of the labels, smoothed. In evaluation mode
    nothing is mixed, so that a validation loss is the cross-entropy of the examples themselves.

    Where an inner batch is given, it is a pair (x, p) of examples (U, ...) and their class
    distributions (U, C), such as a teacher's. Its rows are joined to those of the outer batch
    (x (B, ...), classes (B,)), every row counts alike, and all of them are mixed together.

    Args:
        alpha: a, above 0. Small ones mix little: at 0.4 one row in two has a share of 0.9 or more
            of itself.
        label_smoothing: of the labels of the outer batch, in [0, 1).
        weight: a factor of the loss.

    Cost: one pass of the network on B + U examples. The share and the partners are drawn from
    torch's default generator. A micro-batch is mixed by itself.

    Source: mixup, arXiv:1710.09412, eq. (2), with one share a batch as in the authors' code; the
    larger share first, and unlabeled examples beside labeled ones, as in MixMatch,
    arXiv:1905.02249, eq. (8) to (11).

    Raises: :class:`metapl.MetaplError` where the inner batch has no distributions over the classes
    of the network.
    """

    alpha: AboveZero = 0.4
    label_smoothing: Annotated[float, Range(0, 1)] = 0.0
    weight: float = 1.0

    name: ClassVar[str] = "mixup"
    detaches_signal: ClassVar[bool] = True
    of_micro_batches: ClassVar[bool] = True
    of_classes: ClassVar[bool] = True
    """Whether the outputs of the network are class logits."""

    def __init_subclass__(cls) -> None:
        only_where_declared(cls)

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self, teacher: nn.Module, *, outer: Batch, inner: Batch, signal: Signal, step: int
    ) -> Tensor:
        examples, labels = outer
        soft_labels = None
        if inner is not None:
            more_examples, soft_labels = self._with_distributions(inner)
            examples = torch.cat([examples, more_examples])
        share, partners = self._mixture(examples, is_training=teacher.training)
        if partners is not None:
            examples = share * examples + (1 - share) * examples[partners]
        logits_BC = wide(checks.logits(teacher(examples), "network"))
        targets_BC = self._targets(labels, soft_labels, logits_BC)
        if partners is not None:
            targets_BC = share * targets_BC + (1 - share) * targets_BC[partners]
        return self.weight * F.cross_entropy(logits_BC, targets_BC)

    def _mixture(self, examples: Tensor, *, is_training: bool) -> tuple[float, Tensor | None]:
        """Return the share of each row itself, and its partner; None: nothing is mixed."""
        if not is_training:
            return 1.0, None
        drawn = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        return max(drawn, 1 - drawn), torch.randperm(len(examples)).to(examples.device)

    def _targets(self, labels: Tensor, soft_labels: Tensor | None, logits_BC: Tensor) -> Tensor:
        """Return the distributions of all rows: of the labels, smoothed, then the given ones."""
        classes = logits_BC.shape[1]
        if labels.is_floating_point():
            targets = labels.to(logits_BC.dtype)
        else:
            labels = checks.class_labels(labels, classes)
            targets = F.one_hot(labels, classes).to(logits_BC.dtype)
        targets = (1 - self.label_smoothing) * targets + self.label_smoothing / classes
        if soft_labels is None:
            return targets
        if soft_labels.shape[1:] != logits_BC.shape[1:]:
            raise MetaplError(
                f"MixUp was given distributions over {soft_labels.shape[1]} classes for a network "
                f"of {classes}; expected as many."
            )
        return torch.cat([targets, soft_labels.to(logits_BC.dtype)])

    def _with_distributions(self, inner: Batch) -> tuple[Tensor, Tensor]:
        """Return the examples of the inner batch and their class distributions."""
        is_pair = isinstance(inner, tuple | list) and len(inner) == 2
        is_labeled = is_pair and inner[1].ndim == 2 and inner[1].is_floating_point()
        if not is_labeled:
            raise MetaplError(
                "MixUp was given an inner batch without labels; expected inner=(x, p) with class "
                "distributions p of the shape (U, C), or none."
            )
        return inner[0], inner[1]
