r"""Training on doubtful labels.

Some labels of the inner batch are wrong, and those of the outer one are trusted. The signal is a
weight a_i of each example or its corrected label q_i. For a weight,

.. math:: \ell_i = a_i\, \mathrm{CE}(y_i, S(x_i;\theta)), \qquad
          h_i = -\frac{\partial L(\theta')}{\partial a_i}
          = -\frac1B \Big\langle \nabla_\theta \mathrm{CE}(y_i, S(x_i;\theta)), w \Big\rangle

where w = (∂U/∂g)ᵀ ∇L(θ′) is the gradient of the outer loss, pulled back through the student's step
θ′ = U(θ, g) to its gradient g. So the feedback on an example is positive if a step on that example
lowers the loss on the trusted labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import (
    Batch,
    Inputs,
    holds_tensors,
    inputs_of,
    labeled_pair,
    length,
)
from metapl.execution.checks import unexpected
from metapl.execution.numerics import in_type_of, wide
from metapl.problems.base import (
    BilevelProblem,
    Kind,
    OuterLoss,
    Params,
    Random,
    Signal,
)
from metapl.runs.fields import AtLeastOne, check_arguments


def optimizer_of_network(teacher: nn.Module, rate: float = 1e-3) -> torch.optim.Optimizer:
    """Return Adam over a teacher that is a network.

    Its step does not depend on the size of the feedback.
    """
    return torch.optim.Adam(teacher.parameters(), lr=rate)


def optimizer_of_rows(teacher: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return Adam over a table of which each batch reads some rows.

    It has no momentum, since a row would go on by it in the batches that do not read it, and a
    short memory of squares (0.9): the feedback on a row grows and falls as the student learns.
    """
    if not isinstance(teacher, Table):
        return optimizer_of_network(teacher)
    return torch.optim.Adam(teacher.parameters(), lr=rate, betas=(0.0, 0.9))


class Classification(BilevelProblem):
    """A student that returns class logits, and an outer batch (x, y) with trusted labels."""

    classifies: ClassVar[bool] = True
    inner_batch: ClassVar[tuple[str, ...]] = ("inputs", "labels")
    """The parts of an inner batch, in their order."""

    def student_input(self, batch: Batch) -> Inputs:
        """Return the inputs, the first part of an inner batch, or refuse the batch."""
        has_parts = isinstance(batch, tuple | list) and len(batch) == len(self.inner_batch)
        if not has_parts or not holds_tensors(batch[0]):
            expected = f"({', '.join(self.inner_batch)}) as inner="
            if isinstance(batch, list):
                expected += ", or metapl.Lookahead(batches) for a step on each"
            raise checks.unexpected(f"the inner batch of {type(self).__name__} is", batch, expected)
        return batch[0]

    def check(self, outputs: Tensor, outer: Batch, inner: Batch) -> None:
        """Refuse labels, of either batch, that are not classes of the student's outputs."""
        checks.class_outputs(outputs, "student")
        classes = outputs.shape[1]
        checks.class_labels(outer[1], classes)
        # A problem with a student_input of its own may read inner batches of another form.
        has_labels = "labels" in self.inner_batch and isinstance(inner, tuple | list)
        if has_labels and len(inner) > 1:
            checks.class_labels(inner[1], classes)

    def outer_loss(self, outputs: Tensor, batch: Batch) -> OuterLoss:
        """Return the mean cross-entropy on the trusted labels."""
        checks.class_outputs(outputs, "student")
        return F.cross_entropy(outputs, checks.safe_labels(batch[1], outputs.shape[1]))


class Weighted(Classification):
    """Problems whose signal is a weight a_i for each example, (B,)."""

    def first_signal(
        self, teacher: nn.Module, batch: Batch, student_outputs: Tensor, *, generator: Random
    ) -> Signal:
        """Return a = 1, (B,), by which the given labels count as they are."""
        return Signal(wide(student_outputs).new_ones(len(student_outputs)))

    def inner_loss(
        self, outputs: Tensor, signal: Signal, batch: Batch, params: Params | None = None
    ) -> Tensor:
        """Return a_i CE_i, (B,)."""
        labels = checks.safe_labels(batch[1], outputs.shape[1])
        return signal.value * F.cross_entropy(outputs, labels, reduction="none")


class EqualWeights(Weighted):
    """Cross-entropy of examples whose weights are 1.

    :func:`metapl.attribute` differentiates in these weights. For other losses, a subclass gives
    ``inner_loss``, one loss for each example times ``signal.value``, and ``outer_loss``; for
    weights of parts of each example, such as its tokens, also ``weight_shape``.
    """

    has_teacher: ClassVar[bool] = False
    inputs_have_labels: ClassVar[bool] = False
    """Whether a batch of inputs alone has the labels in it, as sequences do."""

    def labeled_batch(self, batch: Batch, name: str) -> Batch:
        """Return a batch of a data set as the losses read it.

        That is (inputs, labels), or the batch itself for a ``student_input`` of a subclass.

        Args:
            name: of the data set, for errors.
        """
        if type(self).student_input is not EqualWeights.student_input:
            return batch
        mend = "For other batches, give the problem a method student_input(batch)."
        inputs = inputs_of(batch)
        tokens = inputs.get("input_ids") if isinstance(inputs, dict) else inputs
        if isinstance(tokens, Tensor) and not tokens.is_floating_point() and tokens.ndim == 2:
            mend = "Of token ids alone, give problem=metapl.problems.NextToken()."
        pair = labeled_pair(batch, name, f" {mend}")
        if len(pair) != len(self.inner_batch):
            expected = f"({', '.join(self.inner_batch)}). {mend}".rstrip(".")
            raise checks.unexpected(f"{name} is", pair, expected)
        return pair

    def weight_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the shape of the weights that the inner loss multiplies by.

        That is (B,), or (B, T) for weights of parts of each example.
        """
        return (len(outputs),)

    def batch_weight(self, batch: Batch) -> float:
        """Return by what the mean loss of a micro-batch is weighted in a mean over all of a step.

        That is the number of its examples. :func:`metapl.record` asks for it.
        """
        return float(length(batch))

    def signal(
        self, teacher: nn.Module, batch: Batch, student_outputs: Tensor, *, generator: Random
    ) -> Signal:
        """Return a = 1, in the shape of the weights."""
        return Signal(student_outputs.new_ones(self.weight_shape(student_outputs)))

    def first_signal(
        self, teacher: nn.Module, batch: Batch, student_outputs: Tensor, *, generator: Random
    ) -> Signal:
        """Return a = 1, in the shape of the weights."""
        return self.signal(teacher, batch, student_outputs, generator=generator)

    def check(self, outputs: Tensor, outer: Batch, inner: Batch) -> None:
        """Refuse wrong labels, of either batch, unless a subclass has a loss of its own on them.

        With an outer loss of its own, the outputs need not be class logits.
        """
        if type(self).outer_loss is not Classification.outer_loss:
            return
        reads_classes = type(self).inner_loss is Weighted.inner_loss
        super().check(outputs, outer, inner if reads_classes else None)


class Relabeled(Classification):
    """Problems whose signal is the teacher's distribution q_i over the classes, (B, C)."""

    teacher_reads_from: ClassVar[int] = -1
    """The index of the first part of an inner batch that the teacher reads.

    It reads all parts from there on: −1 stands for the last part alone, 0 for all.
    """

    def signal(
        self, teacher: nn.Module, batch: Batch, student_outputs: Tensor, *, generator: Random
    ) -> Signal:
        """Return q = softmax(t), (B, C), of the teacher's logits t."""
        logits = checks.logits(teacher(*batch[self.teacher_reads_from :]), "teacher")
        return Signal(wide(logits).softmax(-1), outputs=logits)

    def inner_loss(
        self, outputs: Tensor, signal: Signal, batch: Batch, params: Params | None = None
    ) -> Tensor:
        """Return CE against q, (B,)."""
        return F.cross_entropy(outputs, signal.value, reduction="none")


@dataclass(frozen=True)
class MetaWeightNet(Weighted):
    r"""The weight of an example is a function of the student's loss on it.

    .. math:: a_i = V(\mathrm{CE}(y_i, S(x_i;\theta)))

    An inner batch is (x, y), the outer one (x, y) with trusted labels. The teacher V maps losses
    (B,) to weights (B,); :class:`WeightNet` is the paper's. Its input losses are detached: no
    gradient flows through them.

    :meth:`metapl.BilevelTrainer.fit` begins with steps on the given labels (:meth:`first_steps`, 30
    %). Before the student knows anything, a step on any label lowers the trusted loss, so that all
    weights rise, and those of great losses most; the network seldom comes back from there. Once the
    student has learned the labels that agree, wrong ones are those with great losses.
    :meth:`metapl.BilevelTrainer.step` and its pure form have no first steps: train the student on
    the given labels before. A student that has been gets ``fit(first_steps=0)``.

    It needs losses that tell wrong labels. Where all wrong labels of a class are the same one, a
    student learns them like right ones, and this problem ends near plain training on the given
    labels, or behind it, and behind the trusted labels alone; take :class:`ExampleWeights`,
    :class:`ExampleLabels` or :class:`LabelCorrection` then. On the mistakes of people it is behind
    plain training of equal work (docs/studies/people-labels.md has the numbers).

    Bias: the dependence of the weight on θ, through the loss, is left out, as in the paper. Of one
    student step it is constant; over several, verification warns of it.

    >>> import metapl
    >>> student = torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(WeightNet(), student, "forward", problem=MetaWeightNet())
    >>> batch = torch.randn(6, 4), torch.arange(6) % 3
    >>> trainer.step(outer=batch, inner=batch).feedback.shape
    torch.Size([6])

    Source: Shu et al., "Meta-Weight-Net" (NeurIPS 2019), its eqs. (1)-(4).
    """

    def default_outer_optimizer(self, teacher: nn.Module) -> torch.optim.Optimizer:
        """Return Adam at 0.003.

        A greater rate has followed the first feedback, by which all weights rise with the loss.
        """
        return optimizer_of_network(teacher, 0.003)

    def first_steps(self, steps: int) -> int:
        """Return 30 % of the steps."""
        return round(0.3 * steps)

    def signal(
        self, teacher: nn.Module, batch: Batch, student_outputs: Tensor, *, generator: Random
    ) -> Signal:
        """Return the weights V(CE_i), (B,), of losses that carry no gradient."""
        labels = checks.safe_labels(batch[1], student_outputs.shape[1])
        losses = F.cross_entropy(student_outputs, labels, reduction="none")
        return Signal(wide(teacher(in_type_of(teacher, losses))))


@dataclass(frozen=True)
class LearningToReweight(Weighted):
    r"""The weights of a batch are what one gradient step makes of weights of zero.

    There is no teacher.

    .. math:: \hat\theta = U\big(\theta, \nabla_\theta \tfrac1B
              \textstyle\sum_i \varepsilon_i \mathrm{CE}_i\big)
              \text{ at } \varepsilon = 0, \qquad
              h_i = -\frac{\partial L(\hat\theta)}{\partial \varepsilon_i}, \qquad
              w_i = \frac{\max(h_i, 0)}{\sum_j \max(h_j, 0)}, \qquad
              \theta' = U(\theta, \nabla_\theta \textstyle\sum_i w_i \mathrm{CE}_i)

    The student looks ahead with weights of zero; h_i is positive if a little of example i in that
    step lowers the loss on the trusted labels. Its real step then takes the weights w_i (the
    paper's letter; the direction w of the module's formula is something else); where no example
    helps, all are 0, while momentum and weight decay go on. An inner batch is (x, y), the outer one
    (x, y) with trusted labels. The signal of the real step, in reports too, is a = B·w, so that
    metapl's mean of a_i CE_i is the paper's sum of w_i CE_i. The report's ``outer_loss`` is L(θ̂),
    and its ``inner_loss`` is that of the real step.

    Give ``teacher=None``, and a mode with feedback on each example. U is the student's optimizer in
    its present state, in both steps. The paper looks ahead by plain SGD whatever the optimizer:
    that is SGD without momentum here, or, for any optimizer,
    ``mode=metapl.feedback.Implicit(solver="identity")``. Prefer the latter for Adam, whose slope at
    a gradient of 0 is of the order of 1/eps for weights without a gradient so far: they decide all.

    It is slow: a batch moves the student as far as its helpful examples go. On the digits with 40 %
    asymmetric noise it is 6 points behind the trusted labels alone after 300 steps, and with Adam
    at 1e-3 10 behind after 400 and level after 1,000: give it some 1,000 steps, or Adam at 1e-2. On
    people's mistakes it is behind plain training of equal work (docs/studies/people-labels.md).

    Cost: one forward and one backward pass of the student beyond those of the mode.

    >>> import metapl
    >>> student = torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(None, student, "forward", problem=LearningToReweight())
    >>> batch = torch.randn(6, 4), torch.arange(6) % 3
    >>> report = trainer.step(outer=batch, inner=batch)
    >>> report.feedback.shape, round(report.signal.value.mean().item(), 4)
    (torch.Size([6]), 1.0)

    Raises: :class:`metapl.MetaplError` for a teacher and the options that are for one, for modes
    without feedback on each example, and for more than one student step. Source: Ren, Zeng, Yang
    and Urtasun, "Learning to reweight examples for robust deep learning" (ICML 2018), its Algorithm
    1 and eqs. (12)-(14).
    """

    has_teacher: ClassVar[bool] = False

    def for_modes(self, labels: Sequence[Kind], mode: str = "") -> LearningToReweight:
        """Return this problem, or refuse a mode without feedback on each example.

        Args:
            labels: the kinds of signal that the mode takes; not labels of examples.
            mode: its name.
        """
        if "soft" not in labels:
            raise MetaplError(f"mode {mode!r} was given; expected 'forward', or Implicit().")
        return self

    def signal(
        self, teacher: nn.Module, batch: Batch, student_outputs: Tensor, *, generator: Random
    ) -> Signal:
        """Return ε = 0, (B,), with which the student looks ahead."""
        return Signal(student_outputs.new_zeros(len(student_outputs)))

    def revised_signal(self, signal: Signal, h: Tensor) -> Signal:
        """Return a = B·w, (B,), for the student's real step; all 0 where no example helps."""
        helpful_B = h.clamp_min(0)
        total = helpful_B.sum()
        divisor = torch.where(total > 0, total, torch.ones_like(total))
        return Signal(len(h) * helpful_B / divisor)


@dataclass(frozen=True)
class ExampleWeights(Weighted):
    r"""Each training example has a weight of its own: data hyper-cleaning.

    .. math:: a_i = \sigma(t_{\mathrm{index}_i})

    An inner batch is (x, y, index), the outer one (x, y) with trusted labels. The teacher maps
    indices (B,) to numbers (B,), whose sigmoid is the weight; ``Table(torch.zeros(n))`` holds one
    for each of n examples, all at weight 1/2. On the mistakes of people it is behind plain training
    of equal work (docs/studies/people-labels.md).

    Source: Franceschi et al., "Bilevel programming for hyperparameter optimization" (ICML 2018),
    data hyper-cleaning.
    """

    inner_batch: ClassVar[tuple[str, ...]] = ("inputs", "labels", "indices")

    def default_outer_optimizer(self, teacher: nn.Module) -> torch.optim.Optimizer:
        """Return Adam at 0.5 without momentum for a :class:`Table`, else Adam at 1e-3."""
        return optimizer_of_rows(teacher, 0.5)

    def first_steps(self, steps: int) -> int:
        """Return a tenth of the steps."""
        return round(0.1 * steps)

    def signal(
        self, teacher: nn.Module, batch: Batch, student_outputs: Tensor, *, generator: Random
    ) -> Signal:
        """Return the weights σ(t), (B,), of the examples with these indices."""
        indices = batch[2]
        numbers = wide(teacher(indices))
        if numbers.shape != indices.shape:
            expected = f"{tuple(indices.shape)}, one for each example, as of Table(torch.zeros(n))"
            raise unexpected("the teacher of ExampleWeights returned", numbers, expected)
        return Signal(numbers.sigmoid())


@dataclass(frozen=True)
class ExampleLabels(Relabeled):
    r"""Each training example has a soft label of its own.

    .. math:: q_i = \mathrm{softmax}(t_{\mathrm{index}_i}), \qquad
              \ell_i = \mathrm{CE}(q_i, S(x_i;\theta))

    An inner batch is (x, index), the outer one (x, y) with trusted labels. The teacher maps indices
    (B,) to logits (B, C), such as ``Table(2 * one_hot(given_labels))``.

    A label moves only when its example is drawn, and then by its rate at most (0.1 by default), so
    count its epochs: on 1,200 digits with 40 % asymmetric noise 300 steps of 64 reached 81.0 % and
    1,000 steps 90.5 %, where the trusted labels alone have 87.3 and 88.4 %. On the mistakes of
    people it is behind plain training of equal work (docs/studies/people-labels.md).

    Source: Vyas, Saxena and Voice, "Learning soft labels via meta learning" (2020).
    """

    inner_batch: ClassVar[tuple[str, ...]] = ("inputs", "indices")

    def default_outer_optimizer(self, teacher: nn.Module) -> torch.optim.Optimizer:
        """Return Adam at 0.1 without momentum for a :class:`Table`, else Adam at 1e-3."""
        return optimizer_of_rows(teacher, 0.1)

    def first_steps(self, steps: int) -> int:
        """Return a tenth of the steps, which go by the labels as they are."""
        return round(0.1 * steps)


@dataclass(frozen=True)
class LabelCorrection(Relabeled):
    r"""A corrector maps an input and its noisy label to a distribution over labels.

    .. math:: q_i = \mathrm{softmax}(T(x_i, y_i)), \qquad \ell_i = \mathrm{CE}(q_i, S(x_i;\theta))

    An inner batch is (x, y) with noisy labels, the outer one (x, y) with trusted ones. The teacher
    maps (x, y) to logits (B, C), such as a :class:`metapl.models.Corrector`.

    Begin with a corrector whose network has learned the trusted labels, by ``LossTrainer(network,
    optimizer=...).fit(trusted, steps=..., batch_size=...)``. One that begins at random has to find
    the right labels through the student's steps: on the digits with 40 % asymmetric noise its
    student had 73 to 75 %, and with a network of the trusted labels 91, where these alone have 88.
    On people's mistakes it is behind plain training of equal work (docs/studies/people-labels.md).

    Source: Zheng, Awadallah and Dumais, "Meta label correction for noisy label learning" (AAAI
    2021).
    """

    # The corrector reads the inputs and the labels.
    teacher_reads_from: ClassVar[int] = 0

    def default_outer_optimizer(self, teacher: nn.Module) -> torch.optim.Optimizer:
        """Return Adam at 0.003."""
        return optimizer_of_network(teacher, 0.003)

    def first_steps(self, steps: int) -> int:
        """Return a tenth of the steps, which go by the corrector as it is."""
        return round(0.1 * steps)


@dataclass(frozen=True)
class NoiseTransition(Classification):
    r"""The student learns the true label behind the noisy one, through a matrix of label noise.

    .. math:: M_{jk} = \mathrm{softmax}(T)_{jk} = P(\text{given } k \mid \text{true } j), \qquad
              \ell_i = -\log \sum_j \mathrm{softmax}(S(x_i;\theta))_j\, M_{j y_i}

    An inner batch is (x, y) with noisy labels, the outer one (x, y) with trusted ones. The teacher
    takes no argument and returns logits (C, C), whose rows become the distributions of the given
    label; ``Table(4 * torch.eye(C))`` begins near the identity, "no noise".

    Where the student can learn the given labels by heart, as in hundreds of epochs of a hundred
    rows, the matrix is found too late: on wine with 40 % symmetric noise it ends 3 points behind
    plain training on the given labels, and 30 behind the trusted alone. Train on the trusted labels
    alone then, or take :class:`LabelCorrection`. On the mistakes of people it is behind plain
    training of equal work (docs/studies/people-labels.md).

    Source: the forward correction of Patrini et al. (CVPR 2017), with the matrix learned as in
    Wang, Hu and Hu, "Training noise-robust deep neural networks via meta-learning" (CVPR 2020).
    """

    signal_has_rows: ClassVar[bool | None] = False

    def default_outer_optimizer(self, teacher: nn.Module) -> torch.optim.Optimizer:
        """Return Adam at 0.03 for a :class:`Table`, at 1e-3 for a network in its place."""
        rate = 0.03 if isinstance(teacher, Table) else 1e-3
        return optimizer_of_network(teacher, rate)

    def signal(
        self, teacher: nn.Module, batch: Batch, student_outputs: Tensor, *, generator: Random
    ) -> Signal:
        """Return M, (C, C), one matrix for the whole batch."""
        return Signal(wide(teacher()).softmax(-1))

    def inner_loss(
        self, outputs: Tensor, signal: Signal, batch: Batch, params: Params | None = None
    ) -> Tensor:
        """Return −log of the probability of the given label, (B,)."""
        labels_B = checks.safe_labels(batch[1], outputs.shape[1])
        # Row i is column y_i of the matrix, which has P(given y_i | true j) for each true label j.
        columns_BC = signal.value.T[labels_B]
        log_columns_BC = columns_BC.clamp_min(1e-30).log()
        return -(outputs.log_softmax(-1) + log_columns_BC).logsumexp(-1)


class Table(nn.Module):
    """Learned numbers, at first ``initial`` (n, ...).

    It returns the rows of indices of any shape, or all rows without an argument.

    Raises: :class:`metapl.MetaplError` for indices outside 0..n − 1.

    >>> Table(torch.zeros(5, 3))(torch.tensor([[4, 0]])).shape, Table(torch.zeros(5))().shape
    (torch.Size([1, 2, 3]), torch.Size([5]))
    """

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(initial.detach().clone())

    def forward(self, index: Tensor | None = None) -> Tensor:
        if index is None:
            return self.values
        rows = len(self.values)
        checked_index = checks.class_labels(
            index.flatten(), rows, subject="the indices of Table", reason=f"it has {rows:,} rows"
        )
        return self.values[checked_index.view(index.shape)]


class WeightNet(nn.Module):
    """The network of Meta-Weight-Net, from losses (B,) to weights (B,) in (0, 1).

    It has one hidden layer.

    >>> WeightNet()(torch.tensor([0.1, 2.0])).shape
    torch.Size([2])
    """

    def __init__(self, hidden: AtLeastOne = 100) -> None:
        check_arguments(WeightNet.__init__, {"hidden": hidden})
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid()
        )

    def forward(self, losses: Tensor) -> Tensor:
        weights: Tensor = self.layers(losses[:, None])[:, 0]
        return weights
