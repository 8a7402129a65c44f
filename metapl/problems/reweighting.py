r"""Weights of training examples: Meta-Weight-Net, learning to reweight, and data hyper-cleaning.

Some labels of the inner batch are wrong; a few others are trusted. The student learns

.. math:: \ell_i = a_i\, \mathrm{CE}(y_i, S(x_i;\theta)), \qquad
          h_i = -\frac{\partial L(\theta')}{\partial a_i}
          = -\frac1B \Big\langle \nabla_\theta \mathrm{CE}(y_i, S(x_i;\theta)), w \Big\rangle

so the feedback on an example is positive if a step on that example lowers the loss on the trusted labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution.numerics import in_type_of, wide
from metapl.problems.base import Kind, Signal
from metapl.problems.classification import Weighted


@dataclass(frozen=True)
class MetaWeightNet(Weighted):
    r"""The weight of an example is a function of the student's loss on it.

    .. math:: a_i = V(\mathrm{CE}(y_i, S(x_i;\theta)))

    An inner batch is (x, y), the outer one (x, y) with trusted labels. The teacher V maps losses (B,) to weights (B,);
    :class:`WeightNet` is the paper's. Its input losses are detached: no gradient flows through them.

    Cost: a step of the student, and what the mode adds; V's part is nothing. Bias: that of the mode; the dependence of
    the weight on θ, through the loss, is left out, as in the paper.

    >>> import metapl
    >>> from metapl.problems import WeightNet
    >>> trainer = metapl.BilevelTrainer(WeightNet(), torch.nn.Linear(4, 3), "forward", problem=MetaWeightNet())
    >>> batch = torch.randn(6, 4), torch.arange(6) % 3
    >>> trainer.step(labeled=batch, unlabeled=batch).feedback.shape
    torch.Size([6])

    Raises: :class:`metapl.MetaplError` for batches and teachers of other shapes.
    Source: Shu et al., "Meta-Weight-Net" (NeurIPS 2019), its eqs. (1)-(4).
    """

    teacher_reads_inputs: ClassVar[bool] = False
    maps: ClassVar[str] = "losses (B,) to weights (B,), such as metapl.problems.WeightNet()"

    def asked(self, teacher: nn.Module, batch: Any, student_outputs: Tensor) -> tuple[Any, ...]:
        """The losses (B,), in the type of its weights."""
        losses = F.cross_entropy(student_outputs, self.safe_labels(student_outputs, batch), reduction="none")
        return (in_type_of(teacher, losses),)


@dataclass(frozen=True)
class LearningToReweight(Weighted):
    r"""The weights of a batch are what one gradient step on them makes of zero; there is no teacher.

    .. math:: \hat\theta = U(\theta, \nabla_\theta \tfrac1B \textstyle\sum_i \varepsilon_i \mathrm{CE}_i)
              \text{ at } \varepsilon = 0, \qquad
              h_i = -\frac{\partial L(\hat\theta)}{\partial \varepsilon_i}, \qquad
              w_i = \frac{\max(h_i, 0)}{\sum_j \max(h_j, 0)}, \qquad
              \theta' = U(\theta, \nabla_\theta \textstyle\sum_i w_i \mathrm{CE}_i)

    The student looks ahead with weights of zero; h_i is positive if a little of example i in that step lowers the loss
    on the trusted labels. Its real step then takes the weights w, which sum to 1. Where no example helps, all w_i are 0
    and the gradient of the real step is 0, while momentum and weight decay go on. An inner batch is (x, y), the outer
    one (x, y) with trusted labels.

    Scale: the signal of the real step, in reports too, is a = B·w, so that metapl's mean over the batch of a_i CE_i is
    the paper's sum of w_i CE_i: the step is as long as on a batch whose labels are all right. The scale of h, and with
    it the learning rate of the look-ahead, cancels in w.

    Give ``teacher=None``, and a mode with feedback on each example. U is the student's optimizer in its present state,
    in both steps. The paper looks ahead by plain SGD whatever the optimizer: θ̂ is then θ, and w compares the gradient
    of each example with that of the trusted ones. That is SGD without momentum here, or, for any optimizer,
    ``mode=metapl.feedback.Implicit(solver="identity")``. Prefer the latter for Adam, whose slope at a gradient of 0 is
    of the order of 1/eps for weights that have had no gradient yet: these few then decide all.

    The ``outer_loss`` of a step's report is L(θ̂); its ``inner_loss`` is of the real step.

    Cost: one forward and one backward pass of the student beyond those of the mode.

    >>> import metapl
    >>> student = torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(None, student, "forward", problem=LearningToReweight())
    >>> batch = torch.randn(6, 4), torch.arange(6) % 3
    >>> report = trainer.step(labeled=batch, unlabeled=batch)
    >>> report.feedback.shape, round(report.signal.value.mean().item(), 4)
    (torch.Size([6]), 1.0)

    Raises: :class:`metapl.MetaplError` for batches of other shapes, for a teacher and the options that are for one, for
    modes without feedback on each example, and for more than one student step.
    Source: Ren, Zeng, Yang and Urtasun, "Learning to reweight examples for robust deep learning" (ICML 2018), its
    Algorithm 1 and eqs. (12)-(14).
    """

    has_teacher: ClassVar[bool] = False

    def for_modes(self, labels: Sequence[Kind], mode: str = "") -> LearningToReweight:
        """This problem; refuse modes without feedback on each example."""
        if "soft" not in labels or mode == "none":
            raise MetaplError(
                f"mode '{mode}' was given, and LearningToReweight makes its weights from the feedback on each example, "
                "which this mode does not give; use 'forward', 'difference', 'unrolled' or "
                'metapl.feedback.Implicit(solver="identity").'
            )
        return self

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        """ε = 0, (B,)."""
        return Signal(student_outputs.new_zeros(len(student_outputs)))

    def revised_signal(self, signal: Signal, h: Tensor) -> Signal:
        """a = B·w, (B,)."""
        helpful = h.clamp_min(0)
        total = helpful.sum()
        return Signal(len(h) * helpful / torch.where(total > 0, total, torch.ones_like(total)))


@dataclass(frozen=True)
class ExampleWeights(Weighted):
    r"""Each training example has a weight of its own: data hyper-cleaning.

    .. math:: a_i = \sigma(t_{\mathrm{index}_i})

    An inner batch is (x, y, index), the outer one (x, y) with trusted labels. The teacher maps indices (B,) to numbers
    (B,), whose sigmoid is the weight; ``Table(torch.zeros(n))`` holds one for each of n examples, all at weight 1/2.

    Cost: a step of the student, and what the mode adds; the table's part is nothing. Bias: that of the mode.

    >>> import metapl
    >>> from metapl.problems import Table
    >>> weights, student = Table(torch.zeros(20)), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(weights, student, "forward", problem=ExampleWeights())
    >>> x, y, index = torch.randn(6, 4), torch.arange(6) % 3, torch.tensor([3, 0, 19, 7, 8, 5])
    >>> trainer.step(labeled=(x, y), unlabeled=(x, y, index)).feedback.shape
    torch.Size([6])

    Raises: :class:`metapl.MetaplError` for batches and teachers of other shapes.
    Source: Franceschi et al., "Bilevel programming for hyperparameter optimization" (ICML 2018), data hyper-cleaning.
    """

    inner_batch: ClassVar[tuple[str, ...]] = ("inputs", "labels", "indices")
    teacher_reads_inputs: ClassVar[bool] = False
    maps: ClassVar[str] = "indices (B,) to numbers (B,), such as metapl.problems.Table(torch.zeros(n)) for n examples"

    def made(self, answer: Tensor) -> Signal:
        """a = σ(t), (B,)."""
        return Signal(wide(answer).sigmoid())
