"""Learned labels of training examples: a table of soft labels, a corrector, and a noise transition matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.execution import checks
from metapl.execution.numerics import wide
from metapl.problems.base import Params, Signal
from metapl.problems.classification import Classification, ask_teacher, check_numbers, check_rows


@dataclass(frozen=True)
class ExampleLabels(Classification):
    r"""Each training example has a soft label of its own.

    .. math:: q_i = \mathrm{softmax}(t_{\mathrm{index}_i}), \qquad \ell_i = \mathrm{CE}(q_i, S(x_i;\theta))

    An inner batch is (x, index), the outer one (x, y) with trusted labels. The teacher maps indices (B,) to logits
    (B, C), such as ``Table(2 * one_hot(given_labels))``.

    Cost: a step of the student, and what the mode adds; the table's part is nothing. Bias: that of the mode.

    >>> import metapl
    >>> from metapl.problems import Table
    >>> given = torch.arange(20) % 3
    >>> labels, student = Table(2.0 * F.one_hot(given)), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(labels, student, "forward", problem=ExampleLabels())
    >>> x, y, index = torch.randn(6, 4), torch.arange(6) % 3, torch.tensor([3, 0, 19, 7, 8, 5])
    >>> trainer.step(labeled=(x, y), unlabeled=(x, index)).feedback.shape
    torch.Size([6, 3])

    Raises: :class:`metapl.MetaplError` for batches and teachers of other shapes.
    Source: Vyas, Saxena and Voice, "Learning soft labels via meta learning" (2020).
    """

    inner_batch: ClassVar[tuple[str, ...]] = ("inputs", "indices")
    teacher_reads_inputs: ClassVar[bool] = False

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        """q = softmax(t), (B, C)."""
        classes, indices = student_outputs.shape[1], self.parts_of(batch)["indices"]
        takes = "indices (B,) to logits (B, C), such as metapl.problems.Table(torch.zeros(n, C)) for n examples"
        given = ask_teacher(teacher, takes, indices)
        logits = check_rows(given, student_outputs, "logits of a label per index,", classes)
        return Signal(wide(logits).softmax(-1), outputs=logits)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """CE against the soft label, (B,)."""
        return F.cross_entropy(outputs, signal.value, reduction="none")


@dataclass(frozen=True)
class LabelCorrection(Classification):
    r"""A corrector maps an input and its noisy label to a distribution over labels.

    .. math:: q_i = \mathrm{softmax}(T(x_i, y_i)), \qquad \ell_i = \mathrm{CE}(q_i, S(x_i;\theta))

    An inner batch is (x, y) with noisy labels, the outer one (x, y) with trusted ones. The teacher maps (x, y) to
    logits (B, C), such as a :class:`metapl.models.corrector.Corrector`.

    Cost: a step of the student, a forward and a backward pass of the corrector, and what the mode adds. Bias: that of
    the mode.

    >>> import metapl
    >>> from metapl.models.corrector import Corrector
    >>> teacher, student = Corrector(torch.nn.Linear(4, 3), classes=3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=LabelCorrection())
    >>> batch = torch.randn(6, 4), torch.arange(6) % 3
    >>> trainer.step(labeled=batch, unlabeled=batch).feedback.shape
    torch.Size([6, 3])

    Raises: :class:`metapl.MetaplError` for batches and teachers of other shapes.
    Source: Zheng, Awadallah and Dumais, "Meta label correction for noisy label learning" (AAAI 2021).
    """

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        """q = softmax(T(x, y)), (B, C)."""
        classes, parts = student_outputs.shape[1], self.parts_of(batch)
        takes = "inputs and given labels (B,) to logits (B, C), such as a metapl.models.corrector.Corrector"
        logits = ask_teacher(teacher, takes, parts["inputs"], parts["labels"])
        check_rows(logits, student_outputs, "logits of a label per example,", classes)
        return Signal(wide(logits).softmax(-1), outputs=logits)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """CE against the corrected distribution, (B,)."""
        return F.cross_entropy(outputs, signal.value, reduction="none")


@dataclass(frozen=True)
class NoiseTransition(Classification):
    r"""The student learns the true label behind the noisy one, through a matrix of label noise.

    .. math:: M_{jk} = \mathrm{softmax}(T)_{jk} = P(\text{given } k \mid \text{true } j), \qquad
              \ell_i = -\log \sum_j \mathrm{softmax}(S(x_i;\theta))_j\, M_{j y_i}

    An inner batch is (x, y) with noisy labels, the outer one (x, y) with trusted ones. The teacher takes no argument
    and returns logits (C, C), whose rows become the distributions of the given label; ``Table(4 * torch.eye(C))``
    begins near the identity, "no noise".

    Cost: a step of the student, and what the mode adds; the table's part is nothing. Bias: that of the mode.

    >>> import metapl
    >>> from metapl.problems import Table
    >>> matrix, student = Table(4 * torch.eye(3)), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(matrix, student, "forward", problem=NoiseTransition())
    >>> batch = torch.randn(6, 4), torch.arange(6) % 3
    >>> trainer.step(labeled=batch, unlabeled=batch).feedback.shape
    torch.Size([3, 3])

    Raises: :class:`metapl.MetaplError` for batches and teachers of other shapes.
    Source: the forward correction of Patrini et al. (CVPR 2017), with the matrix learned as in Wang, Hu and Hu,
    "Training noise-robust deep neural networks via meta-learning" (CVPR 2020).
    """

    teacher_reads_inputs: ClassVar[bool] = False
    signal_has_rows: ClassVar[bool | None] = False

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        """M, (C, C)."""
        classes = student_outputs.shape[1]
        logits = ask_teacher(teacher, "nothing to logits (C, C), such as metapl.problems.Table(4 * torch.eye(C))")
        what = "from a call without arguments logits of a transition matrix"
        check_numbers(logits, student_outputs, what, (classes, classes))
        return Signal(wide(logits).softmax(-1))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """−log of the probability of the given label, (B,)."""
        # Column y_i of the matrix, in logarithms: (B, C).
        log_M = signal.value.T[checks.safe_labels(batch[1], outputs.shape[1])].clamp_min(1e-30).log()
        return -(outputs.log_softmax(-1) + log_M).logsumexp(-1)
