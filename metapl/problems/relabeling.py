"""Learned labels of training examples: a table of soft labels, a corrector, and a noise transition matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from metapl.execution.numerics import wide
from metapl.problems.base import Params, Signal
from metapl.problems.classification import Classification, Relabeled


@dataclass(frozen=True)
class ExampleLabels(Relabeled):
    r"""Each training example has a soft label of its own.

    .. math:: q_i = \mathrm{softmax}(t_{\mathrm{index}_i}), \qquad \ell_i = \mathrm{CE}(q_i, S(x_i;\theta))

    An inner batch is (x, index), the outer one (x, y) with trusted labels. The teacher maps indices (B,) to logits
    (B, C), such as ``Table(2 * one_hot(given_labels))``.

    Cost: a step of the student, and what the mode adds; the table's part is nothing. Bias: that of the mode.

    >>> import metapl, torch
    >>> from metapl.problems import Table
    >>> given = torch.arange(20) % 3
    >>> labels, student = Table(2.0 * torch.nn.functional.one_hot(given)), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(labels, student, "forward", problem=ExampleLabels())
    >>> x, y, index = torch.randn(6, 4), torch.arange(6) % 3, torch.tensor([3, 0, 19, 7, 8, 5])
    >>> trainer.step(labeled=(x, y), unlabeled=(x, index)).feedback.shape
    torch.Size([6, 3])

    Raises: :class:`metapl.MetaplError` for batches and teachers of other shapes.
    Source: Vyas, Saxena and Voice, "Learning soft labels via meta learning" (2020).
    """

    inner_batch: ClassVar[tuple[str, ...]] = ("inputs", "indices")
    teacher_reads_inputs: ClassVar[bool] = False
    maps: ClassVar[str] = "indices (B,) to logits (B, C), such as metapl.problems.Table(torch.zeros(n, C)) for n rows"


@dataclass(frozen=True)
class LabelCorrection(Relabeled):
    r"""A corrector maps an input and its noisy label to a distribution over labels.

    .. math:: q_i = \mathrm{softmax}(T(x_i, y_i)), \qquad \ell_i = \mathrm{CE}(q_i, S(x_i;\theta))

    An inner batch is (x, y) with noisy labels, the outer one (x, y) with trusted ones. The teacher maps (x, y) to
    logits (B, C), such as a :class:`metapl.models.corrector.Corrector`.

    Cost: a step of the student, a forward and a backward pass of the corrector, and what the mode adds. Bias: that of
    the mode.

    >>> import metapl, torch
    >>> from metapl.models.corrector import Corrector
    >>> teacher, student = Corrector(torch.nn.Linear(4, 3), classes=3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=LabelCorrection())
    >>> batch = torch.randn(6, 4), torch.arange(6) % 3
    >>> trainer.step(labeled=batch, unlabeled=batch).feedback.shape
    torch.Size([6, 3])

    Raises: :class:`metapl.MetaplError` for batches and teachers of other shapes.
    Source: Zheng, Awadallah and Dumais, "Meta label correction for noisy label learning" (AAAI 2021).
    """

    asks: ClassVar[tuple[str, ...]] = ("inputs", "labels")
    maps: ClassVar[str] = "inputs and given labels (B,) to logits (B, C), such as a metapl.models.corrector.Corrector"


@dataclass(frozen=True)
class NoiseTransition(Classification):
    r"""The student learns the true label behind the noisy one, through a matrix of label noise.

    .. math:: M_{jk} = \mathrm{softmax}(T)_{jk} = P(\text{given } k \mid \text{true } j), \qquad
              \ell_i = -\log \sum_j \mathrm{softmax}(S(x_i;\theta))_j\, M_{j y_i}

    An inner batch is (x, y) with noisy labels, the outer one (x, y) with trusted ones. The teacher takes no argument
    and returns logits (C, C), whose rows become the distributions of the given label; ``Table(4 * torch.eye(C))``
    begins near the identity, "no noise".

    Cost: a step of the student, and what the mode adds; the table's part is nothing. Bias: that of the mode.

    >>> import metapl, torch
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
    asks: ClassVar[tuple[str, ...]] = ()
    maps: ClassVar[str] = "nothing to logits (C, C), such as metapl.problems.Table(4 * torch.eye(C))"
    shape: ClassVar[str] = "CC"

    def made(self, answer: Tensor) -> Signal:
        """M, (C, C)."""
        return Signal(wide(answer).softmax(-1))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """−log of the probability of the given label, (B,)."""
        # Column y_i of the matrix, in logarithms: (B, C).
        log_M = signal.value.T[self.safe_labels(outputs, batch)].clamp_min(1e-30).log()
        return -(outputs.log_softmax(-1) + log_M).logsumexp(-1)
