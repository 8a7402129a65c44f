"""The teacher's own losses, which are added to the feedback.

Frozen values, each a scalar of the teacher's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import Batch, returned_by, views
from metapl.execution.numerics import wide
from metapl.execution.ranks import rows_of_all
from metapl.problems.base import Signal
from metapl.problems.means import Shares, times_share
from metapl.runs.fields import Range, check_fields


@runtime_checkable
class TeacherLoss(Protocol):
    """One term of the teacher's objective.

    Each view of a batch goes through the teacher in a pass of its own.

    A loss whose gradient does not pass through the signal may say so by an attribute
    ``detaches_signal = True``, which saves the compiled step a backward pass of the teacher.

    A loss that does not read the inner batch in every step may say so by a method
    ``reads_inner(step: int) -> bool``. A fit of a :class:`metapl.LossTrainer` makes no inner batch
    in a step in which none of its losses reads one, and ``inner`` is None there. It makes that of
    step 0 in any case.
    """

    @property
    def name(self) -> str:
        """In the report, teacher_<name>."""

    def __call__(
        self, teacher: nn.Module, *, outer: Batch, inner: Batch, signal: Signal, step: int
    ) -> Tensor:
        """Return a scalar with the teacher's graph, a mean over the rows.

        ``step`` counts from 0; recorded it is an int64 tensor without dimensions.

        A mean over something else, such as the tokens that have a label, is right in micro-batches
        and processes with a method ``mean_over(*, outer, inner)`` beside it, which returns
        what it divides by: a number, a tensor without dimensions, or None for the rows. Where that
        is 0, the loss of the micro-batch is left out; its derivative must be finite there, as that
        of a division by ``n.clamp(min=1)`` is. A loss with the attribute ``of_micro_batches =
        True``, such as a contrastive one, is meant to be of each micro-batch by itself. Without
        either, one that is no mean over rows is refused at the first step with ``accumulate``.
        """
        ...


def only_where_declared(subclass: type) -> None:
    """Let a subclass of a loss say for itself whether it detaches the signal.

    It does not inherit this: what it adds may have a gradient through the signal. Nor does it
    inherit when it reads the inner batch.
    """
    subclass.detaches_signal = vars(subclass).get("detaches_signal", False)  # type: ignore[attr-defined]
    subclass.reads_inner = vars(subclass).get("reads_inner")  # type: ignore[attr-defined]


def reads_inner_at(loss: TeacherLoss, step: int) -> bool:
    """Return whether a loss reads the inner batch of a step; one that does not say so may."""
    declared = getattr(loss, "reads_inner", None)
    return True if declared is None else bool(declared(step))


@dataclass(frozen=True)
class CrossEntropy:
    r"""Cross-entropy on the outer batch: weight · (1/B_l) Σ_j CE((1−α) y_j + α/C, T(x_l)_j).

    Labels are classes (B_l,), or distributions; for outputs of more dimensions, (B_l, C, ...),
    classes (B_l, ...), of which -100 is left out of the mean, which is one over all micro-batches
    and processes that share the batch.

    Args:
        label_smoothing: α, in [0, 1).
        weight: the factor.

    Source: Algorithm 1, line 6.
    """

    label_smoothing: Annotated[float, Range(0, 1)] = 0.0
    weight: float = 1.0

    name: ClassVar[str] = "cross_entropy"
    detaches_signal: ClassVar[bool] = True
    of_classes: ClassVar[bool] = True
    """Whether the outputs of the network are class logits."""

    def __init_subclass__(cls) -> None:
        only_where_declared(cls)

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self, teacher: nn.Module, *, outer: Batch, inner: Batch, signal: Signal, step: int
    ) -> Tensor:
        logits = wide(checks.logits(self.outputs(teacher, outer), "network"))
        labels = outer[1]
        if logits.ndim == 2:
            labels = checks.class_labels(
                labels, logits.shape[1], rows=len(logits), or_distributions=True
            )
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss if self.weight == 1.0 else self.weight * loss

    def mean_over(self, *, outer: Batch, inner: Batch) -> Tensor | None:
        """Return the number of labels that are not -100.

        None for one label a row, of which none may be left out.
        """
        labels: Tensor = outer[1]
        if labels.ndim < 2 or labels.is_floating_point():
            return None
        return (labels != -100).sum()

    def outputs(self, teacher: nn.Module, outer: Batch) -> Any:
        """Return what the teacher makes of the outer batch."""
        return returned_by(teacher, outer[0], "network, on the outer batch")

    def reads_inner(self, step: int) -> bool:
        """Return whether the loss reads the inner batch of a step: it never does."""
        return False


@dataclass(frozen=True)
class UDA:
    r"""Consistency: the teacher should predict on the strong view what it does on the weak one.

    The prediction on the weak view is a target without a gradient. It may be sharpened, and
    examples of which it is not confident are left out.

    .. math:: \frac{\lambda_t}{B}\sum_i \mathbb 1[\max_k p_{ik} > \beta]\;
              \mathrm{CE}\big(\mathrm{sg}\ p_i^{1/\tau} / \textstyle\sum_k p_{ik}^{1/\tau},
              \ T(x_i^{strong})\big), \quad
              p = \mathrm{softmax}\,T(x)

    With ``align``, p_ik is first multiplied by (``prior``_k / its mean over the batch) to the power
    of ``align``, and normalized again, which moves the mean prediction of the batch (with
    ``accumulate``, of the micro-batch) towards the prior.

    Args:
        temperature: τ, 0 or more; below 1 sharpens the target; 0 is the one-hot target of the most
            probable class.
        threshold: β in [0, 1): examples whose greatest probability does not exceed it are left out.
        weight: λ.
        ramp, start: the number of steps over which λ_t grows linearly from 0 to λ, and the first of
            them; before it the loss is 0 and needs no pass of the teacher.
        align: the power, in [0, 1]: 0 does not change p, 1 divides by the whole mean.
        prior: the class shares that ``align`` moves towards, C numbers above 0 that sum to 1; None:
            equal ones.
        threshold_on: the probabilities that are held against β: of the ``"prediction"``, p itself
            as above; or ``"sharpened"``, the tempered ones of the target, of which the authors'
            code keeps those that reach β (≥ instead of >). A temperature below 1 lets more examples
            through by it, and one above 1 fewer.

    Needs: inner batches that are pairs (weak, strong). The teacher's outputs on the weak view
    come with the signal; without them, they are computed here, without a graph. Source: Algorithm
    1, line 7 (τ = 1, β = 0, λ = 1); temperature, threshold and ramp are settings of the authors'
    code, which has ``threshold_on="sharpened"``. FixMatch is τ = 0 and β = 0.95 (arXiv:2001.07685,
    eq. 4); the alignment is ReMixMatch's (arXiv:1911.09785, section 3.1) with the mean of the
    batch.

    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    >>> UDA(align=1.0).target(logits)  # both look like the first class, so neither does
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """

    temperature: Annotated[float, Range(0)] = 1.0
    threshold: Annotated[float, Range(0, 1)] = 0.0
    weight: float = 1.0
    ramp: Annotated[int, Range(0, of="a number of steps")] = 0
    align: Annotated[float, Range(0, most=1)] = 0.0
    start: Annotated[int, Range(0, of="a number of steps")] = 0
    prior: tuple[float, ...] | None = None
    threshold_on: Literal["prediction", "sharpened"] = "prediction"

    name: ClassVar[str] = "uda"
    detaches_signal: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        only_where_declared(cls)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.prior is not None:
            are_shares = all(p > 0 for p in self.prior) and math.isclose(sum(self.prior), 1)
            if not are_shares:
                raise MetaplError(f"UDA(prior={self.prior}): expected shares above 0, of sum 1.")
        if self.threshold_on == "sharpened" and self.temperature == 0:
            raise MetaplError(
                "UDA(threshold_on='sharpened') was given with temperature=0, of one-hot targets; "
                "expected threshold_on='prediction', or a temperature above 0."
            )

    def reads_inner(self, step: int) -> bool:
        """Return whether the loss reads the inner batch of a step: from its start on."""
        return step >= self.start

    @property
    def of_micro_batches(self) -> bool:
        """Whether a micro-batch is aligned by its own mean.

        Its loss is then no share of the loss of the batch.
        """
        return self.align > 0

    def target(self, logits: Tensor) -> Tensor:
        """Return the target of the strong view, from the logits (B, C) of the weak one.

        These are class probabilities (B, C), with zeros for examples that are left out.
        """
        log_p_BC = F.log_softmax(logits, -1)
        if self.align:
            log_p_BC = self._aligned(log_p_BC)
        p_BC = log_p_BC.exp()
        if self.threshold_on == "sharpened":
            sharpened_BC = F.softmax(log_p_BC / self.temperature, -1)
            return sharpened_BC * (sharpened_BC.amax(-1, keepdim=True) >= self.threshold)
        is_confident_B1 = p_BC.amax(-1, keepdim=True) > self.threshold
        if self.temperature:
            return F.softmax(log_p_BC / self.temperature, -1) * is_confident_B1
        # Not F.one_hot, which no vmap takes within a derivative.
        one_hot_BC = torch.zeros_like(p_BC).scatter(-1, p_BC.argmax(-1, keepdim=True), 1.0)
        return one_hot_BC * is_confident_B1

    @contextmanager
    def _moving_buffers_from_start(self, teacher: nn.Module, step: int | Tensor) -> Iterator[None]:
        """Leave the teacher's buffers as they are in this block where the loss has not begun.

        Recorded, the passes of the block are taken in each step.
        """
        if not isinstance(step, Tensor) or not self.start:
            yield
            return
        buffers_before = {name: b.clone() for name, b in teacher.named_buffers()}
        yield
        for name, b in teacher.named_buffers():
            if name in buffers_before:
                # The graph of a batch norm holds its statistics, which its backward does not read.
                b.data.copy_(torch.where(step >= self.start, b, buffers_before[name]))

    def _aligned(self, log_p_BC: Tensor) -> Tensor:
        """Return log-probabilities whose mean over the rows of all ranks is nearer to the prior."""
        classes = log_p_BC.shape[-1]
        if self.prior is not None and len(self.prior) != classes:
            raise MetaplError(f"UDA's prior has {len(self.prior)} shares; expected {classes}.")
        # In logarithms, because the mean of an improbable class would be rounded to 0. The mean
        # of an impossible class is 0; such a class is not aligned.
        log_p_of_all_ranks, _ = rows_of_all(log_p_BC)
        rows = max(1, len(log_p_of_all_ranks))
        log_mean_C = log_p_of_all_ranks.logsumexp(0) - math.log(rows)
        log_prior_C: Tensor | int = 0
        if self.prior is not None:
            log_prior_C = log_of_shares(self.prior, log_p_BC.dtype, log_p_BC.device)
        log_ratio_C = log_prior_C - log_mean_C.masked_fill(log_mean_C == -math.inf, 0)
        return F.log_softmax(log_p_BC + self.align * log_ratio_C, -1)

    def __call__(
        self,
        teacher: nn.Module,
        *,
        outer: Batch,
        inner: Batch,
        signal: Signal,
        step: int | Tensor,
    ) -> Tensor:
        # A fit makes no batch that is not read. It makes that of step 0, which is looked at here.
        if inner is None and not isinstance(step, Tensor) and 0 < step < self.start:
            return _zero_like(signal)
        pair = views(inner)
        if len(pair) != 2:
            raise MetaplError("UDA was given one view; expected inner=(weak, strong).")
        weak, strong = pair
        if not isinstance(step, Tensor) and step < self.start:
            return _zero_like(signal)
        weak_logits = signal.outputs
        with self._moving_buffers_from_start(teacher, step):
            if weak_logits is None:
                with torch.no_grad():
                    weak_logits = checks.logits(teacher(weak), "network")
            strong_logits = teacher(strong)
        target_BC = self.target(wide(weak_logits.detach()))
        log_strong_BC = F.log_softmax(wide(strong_logits), -1)
        # 0 log 0, of a class of probability 0 in target and prediction, would be NaN.
        is_zero_in_both = (target_BC == 0) & (log_strong_BC == -math.inf)
        losses_B = -(target_BC * log_strong_BC.masked_fill(is_zero_in_both, 0)).sum(-1)
        if isinstance(step, Tensor):
            # Recorded, one function serves every step, so that it has no branch on the step.
            steps_since_start = step.to(losses_B.dtype) - self.start
            if self.ramp:
                share_of_weight = (steps_since_start / self.ramp).clamp(0, 1)
            else:
                share_of_weight = (steps_since_start >= 0).to(steps_since_start.dtype)
            return self.weight * share_of_weight * losses_B.mean()
        weight = self.weight
        if self.ramp:
            weight = self.weight * min(1.0, (step - self.start) / self.ramp)
        return weight * losses_B.mean()


def _zero_like(signal: Signal) -> Tensor:
    """Return 0 on the device of a signal."""
    some_tensor = next(iter(signal.fields().values()))
    return torch.zeros((), device=some_tensor.device)


def sum_of_terms(
    network: nn.Module,
    losses: Sequence[TeacherLoss],
    *,
    outer: Batch,
    inner: Batch,
    signal: Signal,
    step: Any,
    kind: str = "loss",
    shares: Shares | None = None,
) -> dict[str, Tensor]:
    """Return the losses by name, each a scalar with the network's graph.

    Losses with the same name are added.

    Args:
        network: the network of the losses.
        losses: the terms.
        outer, inner, signal, step: what a loss reads, see :class:`TeacherLoss`.
        kind: what an error calls them.
        shares: the factors of this micro-batch, by :func:`metapl.problems.means.shares_of_losses`.
    """
    terms: dict[str, Tensor] = {}
    for place, loss in enumerate(losses):
        value = loss(network, outer=outer, inner=inner, signal=signal, step=step)
        checks.scalar_loss(value, f"the {kind} {loss.name!r}")
        if shares is not None and place in shares:
            value = times_share(value, shares[place])
        if loss.name in terms:
            value = terms[loss.name] + value
        terms[loss.name] = value
    return terms


def check_losses(losses: Any, name: str = "teacher_losses") -> tuple[TeacherLoss, ...]:
    """Return the losses as a tuple, and refuse anything other than a sequence of losses.

    ``name`` is that of the argument.
    """
    are_losses = isinstance(losses, Sequence) and not isinstance(losses, str)
    are_losses = are_losses and all(
        isinstance(loss, TeacherLoss) and not isinstance(loss, type) for loss in losses
    )
    if not are_losses:
        expected = (
            "losses, such as (metapl.CrossEntropy(),), or objects with a name that are called as "
            "metapl.problems.losses.TeacherLoss is"
        )
        raise MetaplError(f"{name} is {losses!r:.80}; expected {expected}.")
    return tuple(losses)


def log_of_shares(shares: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the logarithms of shares as a tensor, which is kept for the next call.

    It is kept because a copy to a device makes the host wait. Within a transform of ``torch.func``
    a new tensor belongs to the transform, and may not outlive it, so it is made outside of all.
    """
    # While a step is captured, a tensor has no value that could be kept.
    is_captured = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    if torch.compiler.is_compiling() or is_captured:
        return torch.tensor(shares, dtype=dtype, device=device).log()
    return _kept_log_of_shares(shares, dtype, device)


@lru_cache(maxsize=16)
def _kept_log_of_shares(
    shares: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch._C._DisableFuncTorch():
        return torch.tensor(shares, dtype=dtype, device=device).log()
