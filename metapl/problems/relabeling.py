"""Labels of training examples that are learned: a table of soft labels, a corrector, and a noise transition matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl import checks
from metapl.errors import MetaplError
from metapl.problems.base import Params, Signal
from metapl.problems.classification import Classification, one_each, parts_of


@dataclass(frozen=True)
class ExampleLabels(Classification):
    r"""Each training example has a soft label of its own.

    .. math:: q_i = \mathrm{softmax}(t_{\mathrm{index}_i}), \qquad \ell_i = \mathrm{CE}(q_i, S(x_i;\theta))

    An inner batch is (x, index), the outer one (x, y) with trusted labels. The teacher maps indices (B,) to logits
    (B, C), such as ``Table(2 * one_hot(given_labels))``.

    Raises: :class:`metapl.MetaplError` for batches and teachers of other shapes.
    Source: Vyas, Saxena and Voice, "Learning soft labels via meta learning" (2020).
    """

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        """q = softmax(t), (B, C)."""
        _, index = parts_of(batch, 2, self)
        classes = student_outputs.shape[1]
        logits = one_each(teacher(index), student_outputs, "logits of a label per index,", classes)
        return Signal(logits.softmax(-1), outputs=logits)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """CE against the soft label, (B,)."""
        return F.cross_entropy(outputs, signal.value, reduction="none")


@dataclass(frozen=True)
class LabelCorrection(Classification):
    r"""A corrector turns an input and its doubtful label into a distribution over labels.

    .. math:: q_i = \mathrm{softmax}(T(x_i, y_i)), \qquad \ell_i = \mathrm{CE}(q_i, S(x_i;\theta))

    An inner batch is (x, y) with doubtful labels, the outer one (x, y) with trusted ones. The teacher maps (x, y) to
    logits (B, C).

    Raises: :class:`metapl.MetaplError` for batches and teachers of other shapes.
    Source: Zheng, Awadallah and Dumais, "Meta label correction for noisy label learning" (AAAI 2021).
    """

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:
        """Refuse labels, of either batch, that are no classes of the student's outputs."""
        super().check(outputs, labeled, unlabeled)
        checks.class_labels(parts_of(unlabeled, 2, self)[1], outputs.shape[1])

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        """q = softmax(T(x, y)), (B, C)."""
        x, y = parts_of(batch, 2, self)
        classes = student_outputs.shape[1]
        logits = one_each(teacher(x, y), student_outputs, "logits of a label per example,", classes)
        return Signal(logits.softmax(-1), outputs=logits)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """CE against the corrected distribution, (B,)."""
        return F.cross_entropy(outputs, signal.value, reduction="none")


@dataclass(frozen=True)
class NoiseTransition(Classification):
    r"""The student learns the true label behind the doubtful one, by a matrix of how labels are mistaken.

    .. math:: M_{jk} = \mathrm{softmax}(T)_{jk} = P(\text{given } k \mid \text{true } j), \qquad
              \ell_i = -\log \sum_j \mathrm{softmax}(S(x_i;\theta))_j\, M_{j y_i}

    An inner batch is (x, y) with doubtful labels, the outer one (x, y) with trusted ones. The teacher takes no argument
    and returns logits (C, C), whose rows become the distributions of the given label; ``Table(4 * torch.eye(C))``
    begins near "no mistakes".

    Raises: :class:`metapl.MetaplError` for batches and teachers of other shapes.
    Source: the forward correction of Patrini et al. (CVPR 2017), with the matrix learned as in Wang, Hu and Hu,
    "Training noise-robust deep neural networks via meta-learning" (CVPR 2020).
    """

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:
        """Refuse labels, of either batch, that are no classes of the student's outputs."""
        super().check(outputs, labeled, unlabeled)
        checks.class_labels(parts_of(unlabeled, 2, self)[1], outputs.shape[1])

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        """M, (C, C)."""
        classes, logits = student_outputs.shape[1], teacher()
        if not isinstance(logits, Tensor) or logits.shape != (classes, classes):
            raise MetaplError(
                f"the teacher returned {checks.described(logits)}; expected logits of a transition matrix of shape "
                f"{(classes, classes)}, without being given an argument."
            )
        return Signal(logits.softmax(-1))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """−log of the probability of the given label, (B,)."""
        # Column y_i of the matrix, in logarithms: (B, C).
        log_mistaken = signal.value.T[checks.within(batch[1], outputs.shape[1])].clamp_min(1e-30).log()
        return -(outputs.log_softmax(-1) + log_mistaken).logsumexp(-1)
