r"""Learned weights of training examples: Meta-Weight-Net, and data hyper-cleaning.

Some labels of the inner batch are wrong; a few others are trusted. The student learns

.. math:: \ell_i = a_i\, \mathrm{CE}(y_i, S(x_i;\theta)), \qquad
          h_i = -\frac{\partial L(\theta')}{\partial a_i}
          = -\frac1B \Big\langle \nabla_\theta \mathrm{CE}(y_i, S(x_i;\theta)), w \Big\rangle

so the feedback on an example is positive if a step on that example lowers the loss on the trusted labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metapl.problems.base import Params, Signal
from metapl.problems.classification import Classification, check_rows, example_losses


@dataclass(frozen=True)
class MetaWeightNet(Classification):
    r"""The weight of an example is a function of the student's loss on it.

    .. math:: a_i = V(\mathrm{CE}(y_i, S(x_i;\theta)))

    An inner batch is (x, y), the outer one (x, y) with trusted labels. The teacher V maps losses (B,) to weights (B,);
    :class:`WeightNet` is the paper's. Its input losses are detached: no gradient flows through them.

    >>> import metapl
    >>> from metapl.problems import WeightNet
    >>> trainer = metapl.BilevelTrainer(WeightNet(), torch.nn.Linear(4, 3), "forward", problem=MetaWeightNet())
    >>> batch = torch.randn(6, 4), torch.arange(6) % 3
    >>> trainer.step(labeled=batch, unlabeled=batch).feedback.shape
    torch.Size([6])

    Raises: :class:`metapl.MetaplError` for batches and teachers of other shapes.
    Source: Shu et al., "Meta-Weight-Net" (NeurIPS 2019), its eqs. (1)-(4).
    """

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        """a = V(losses), (B,)."""
        losses = example_losses(student_outputs, self.parts_of(batch)["labels"])
        return Signal(check_rows(teacher(losses), student_outputs, "a weight per loss,"))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """a_i CE_i, (B,)."""
        return signal.value * example_losses(outputs, batch[1])


@dataclass(frozen=True)
class ExampleWeights(Classification):
    r"""Each training example has a weight of its own: data hyper-cleaning.

    .. math:: a_i = \sigma(t_{\mathrm{index}_i})

    An inner batch is (x, y, index), the outer one (x, y) with trusted labels. The teacher maps indices (B,) to numbers
    (B,), whose sigmoid is the weight; ``Table(torch.zeros(n))`` holds one for each of n examples, all at weight 1/2.

    Raises: :class:`metapl.MetaplError` for batches and teachers of other shapes.
    Source: Franceschi et al., "Bilevel programming for hyperparameter optimization" (ICML 2018), data hyper-cleaning.
    """

    inner_batch: ClassVar[tuple[str, ...]] = ("inputs", "labels", "indices")

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        """a = σ(t), (B,)."""
        indices = self.parts_of(batch)["indices"]
        return Signal(check_rows(teacher(indices), student_outputs, "a number per index,").sigmoid())

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """a_i CE_i, (B,)."""
        return signal.value * example_losses(outputs, batch[1])
