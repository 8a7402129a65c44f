"""The teacher's own losses, beside the feedback: values, each a scalar of the teacher's outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl import checks
from metapl.batch import views
from metapl.errors import MetaplError
from metapl.numerics import wide
from metapl.problems.base import Signal


@runtime_checkable
class TeacherLoss(Protocol):
    """One term of the teacher's objective. Each view of a batch goes through the teacher in a pass of its own."""

    name: ClassVar[str]

    def __call__(self, teacher: nn.Module, *, labeled: Any, unlabeled: Any, signal: Signal, step: int) -> Tensor:
        """A scalar with the teacher's graph; ``step`` counts from 0."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    r"""Supervised: (1/B_l) Σ_j CE((1−α) y_j + α/C, T(x_l)_j).

    Args:
        label_smoothing: α in [0, 1).
        weight: the factor of this term.

    Source: Algorithm 1, line 6.
    """

    label_smoothing: float = 0.0
    weight: float = 1.0

    name: ClassVar[str] = "cross_entropy"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise MetaplError(f"CrossEntropy(label_smoothing={self.label_smoothing}): expected a number in [0, 1).")

    def __call__(self, teacher: nn.Module, *, labeled: Any, unlabeled: Any, signal: Signal, step: int) -> Tensor:
        logits, labels = wide(checks.logits(teacher(labeled[0]), "network")), labeled[1]
        probabilities = isinstance(labels, Tensor) and labels.shape == logits.shape
        if logits.ndim == 2 and not probabilities:
            checks.class_labels(labels, logits.shape[1])
        labels = checks.within(labels, logits.shape[1])
        return self.weight * F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class UDA:
    r"""Consistency: the strong view should get the weak view's (sharpened, confident) prediction.

    .. math:: \frac{\lambda_t}{B}\sum_i \mathbb 1[\max_k p_{ik} > \beta]\;
              \mathrm{CE}\big(\mathrm{sg}\ p_i^{1/\tau} / \textstyle\sum_k p_{ik}^{1/\tau},\ T(x_i^{strong})\big), \quad
              p = \mathrm{softmax}\,T(x)

    With ``align``, p_ik is first multiplied by (``prior``_k / its mean over the batch) to the power of ``align``, and
    normalised again: the labels of a batch are then spread over the classes more like the prior than the network would
    spread them.

    Args:
        temperature: τ, 0 or more; below 1 sharpens the target, 0 is the most probable class alone.
        threshold: β in [0, 1): examples whose greatest probability (at τ = 1) does not exceed it are left out.
        weight: λ.
        ramp: steps over which λ_t grows linearly from 0 to λ; 0 is from the start.
        start: steps before that; until then there is no pass, which makes these steps cheap.
        align: the power, in [0, 1]: 0 leaves p as it is, 1 divides by the whole mean.
        prior: shares of the C classes, each above 0, that ``align`` aims at; None: even ones.

    Needs: unlabelled batches that are pairs (weak, strong). The weak pass of the signal is used again; where there is
    none, it is made here, without a graph.
    Source: Algorithm 1, line 7 (τ = 1, β = 0, λ = 1); the other settings as the authors' code has them. FixMatch is
    τ = 0 and β = 0.95 (arXiv:2001.07685, eq. 4); the alignment is ReMixMatch's (arXiv:1911.09785, section 3.1) with
    the batch's own mean.

    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    >>> UDA(align=1.0).target(logits)  # both look like the first class, so neither does
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """

    temperature: float = 1.0
    threshold: float = 0.0
    weight: float = 1.0
    ramp: int = 0
    align: float = 0.0
    start: int = 0
    prior: tuple[float, ...] | None = None

    name: ClassVar[str] = "uda"

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or not 0 <= self.threshold < 1 or not 0 <= self.align <= 1:
            raise MetaplError(f"{self}: expected temperature >= 0, threshold in [0, 1) and align in [0, 1].")
        if not self.ramp >= 0 or not self.start >= 0:
            raise MetaplError(f"{self}: expected ramp and start of 0 or more steps.")
        if self.prior is not None and not (all(p > 0 for p in self.prior) and math.isclose(sum(self.prior), 1)):
            raise MetaplError(f"{self}: expected a prior of shares above 0 that sum to 1.")

    def target(self, logits: Tensor) -> Tensor:
        """(B, C) class probabilities that the strong view should get, 0 for examples that are left out.

        Args:
            logits: (B, C), of the weak view.
        """
        log_p = F.log_softmax(logits, -1)
        if self.align:
            # In logarithms: the mean of a class that is improbable in the whole batch would be rounded to 0. That of
            # one that is impossible is 0, and stays out.
            log_mean_C = log_p.logsumexp(0) - math.log(max(1, len(log_p)))
            log_ratio_C = self._log_prior(log_p) - log_mean_C.masked_fill(log_mean_C == -math.inf, 0)
            log_p = F.log_softmax(log_p + self.align * log_ratio_C, -1)
        p = log_p.exp()
        confident = p.amax(-1, keepdim=True) > self.threshold
        sharp = F.softmax(log_p / self.temperature, -1) if self.temperature else F.one_hot(p.argmax(-1), p.shape[-1])
        return sharp.to(p.dtype) * confident

    def _log_prior(self, log_p: Tensor) -> Tensor:
        classes = log_p.shape[-1]
        if self.prior is None:
            return log_p.new_zeros(classes)
        if len(self.prior) != classes:
            raise MetaplError(
                f"UDA has a prior of {len(self.prior)} shares and the network {classes} classes; expected as many."
            )
        return _log(self.prior, log_p.dtype, log_p.device)

    def __call__(self, teacher: nn.Module, *, labeled: Any, unlabeled: Any, signal: Signal, step: int) -> Tensor:
        pair = views(unlabeled)
        if len(pair) != 2:
            raise MetaplError(
                "UDA was given one view of the unlabelled batch; expected unlabeled=(weak, strong), or teacher_losses "
                "without UDA."
            )
        if step < self.start:
            return torch.zeros((), device=signal.value.device)
        weak = signal.outputs
        if weak is None:
            with torch.no_grad():
                weak = checks.logits(teacher(pair[0]), "network")
        target = self.target(wide(weak.detach()))
        log_strong = F.log_softmax(wide(teacher(pair[1])), -1)
        # A class that target and prediction both leave out has no loss, and 0 log 0 would be NaN.
        losses = -(target * log_strong.masked_fill((target == 0) & (log_strong == -math.inf), 0)).sum(-1)
        ramped = self.weight * min(1.0, (step - self.start) / self.ramp) if self.ramp else self.weight
        return ramped * losses.mean()


def sum_of_terms(
    network: nn.Module,
    losses: Sequence[TeacherLoss],
    *,
    labeled: Any,
    unlabeled: Any,
    signal: Signal,
    step: int,
    kind: str = "loss",
) -> dict[str, Tensor]:
    """The losses by name, each a scalar with the network's graph; those of one name are added.

    Args:
        network, losses: what is called.
        labeled, unlabeled, signal, step: see :class:`TeacherLoss`.
        kind: what a loss is called in errors.
    """
    terms: dict[str, Tensor] = {}
    for loss in losses:
        value = loss(network, labeled=labeled, unlabeled=unlabeled, signal=signal, step=step)
        checks.scalar_loss(value, f"the {kind} {loss.name!r}")
        terms[loss.name] = terms[loss.name] + value if loss.name in terms else value
    return terms


def teacher_losses(given: Any, name: str = "teacher_losses") -> tuple[TeacherLoss, ...]:
    """The losses of a sequence of them; anything else is refused.

    Args:
        given: what the user gave.
        name: of the argument that it came in.
    """
    expected = "expected a tuple of losses, such as (metapl.CrossEntropy(), metapl.UDA())"
    if not isinstance(given, Sequence) or isinstance(given, str):
        kind = checks.described(given) if not isinstance(given, TeacherLoss) else f"{given!r} alone"
        raise MetaplError(f"{name} is {kind}; {expected}; with one loss, ({type(given).__name__}(),).")
    for one in given:
        if isinstance(one, type):
            raise MetaplError(f"{name} holds the class {one.__name__}; {expected}: write {one.__name__}().")
        if not isinstance(one, TeacherLoss):
            raise MetaplError(
                f"{name} holds something {checks.described(one)}; {expected}, or callables with a name "
                "(metapl.problems.losses.TeacherLoss)."
            )
    return tuple(given)


@lru_cache(maxsize=16)
def _log(shares: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept, because a copy to a device makes the host wait.
    return torch.tensor(shares, dtype=dtype, device=device).log()


def refuse_split_batches(losses: Sequence[TeacherLoss], accumulate: int) -> None:
    """Refuse losses that look at a batch as a whole beside micro-batches, which would change them."""
    if accumulate > 1 and any(isinstance(loss, UDA) and loss.align for loss in losses):
        raise MetaplError(
            f"accumulate={accumulate} takes a batch in parts, and UDA(align=...) aligns the labels of a whole one; "
            "expected align=0 or accumulate=1."
        )
