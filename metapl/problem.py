"""The bilevel problem: two pure losses and what the teacher says about a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Signal:
    """What the teacher says about the inner batch; the tensors carry the teacher's graph.

    Args:
        value: what the inner loss reads: class probabilities q (B, C), sampled classes (B,), weights of examples (B,),
            corrected labels (B, C), ...
        log_prob: (B,), log p_i(value_i), where ``value`` was sampled; ``None`` where ``value`` is differentiable.
        probs: (B, C), the law that ``value`` was sampled from, where a mode may take the expectation over it; the inner
            loss must then accept a ``value`` of this shape as well, and be linear in it: the expected loss is the loss
            of the expected label (cross-entropy is; modes that rely on it check it).
        outputs: (B, C), the teacher's outputs that the signal rests on, where teacher losses may use them again.
    """

    value: Tensor
    log_prob: Tensor | None = None
    probs: Tensor | None = None
    outputs: Tensor | None = None

    @property
    def sampled(self) -> bool:
        """Whether ``value`` was drawn, so that only its log-probability can be differentiated."""
        return self.log_prob is not None

    def detached(self) -> Signal:
        """The same signal without the teacher's graph: what the student and the estimators see."""
        fields = {name: t.detach() for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **fields)


@runtime_checkable
class BilevelProblem(Protocol):
    r"""Teach a student with a signal, and judge the signal by the student's loss afterwards.

    .. math:: \min_{\theta_T} L(\theta'), \quad
              \theta' = U(\theta, \nabla_\theta \tfrac1B \sum_i \ell_i(S(x_u; \theta), \mathrm{signal}(\theta_T)))

    A problem may also have

    - ``student_input(batch)``: what the student reads of an inner batch. Without it: the batch itself where it is a
      tensor or a dict, its first element where it is a tuple or a list.
    - ``for_modes(labels)``: the problem with the kind of labels that a mode needs (see :class:`metapl.PseudoLabels`).
    - ``check(outputs, labeled, unlabeled)``: refuses, with a :class:`metapl.MetaplError`, a batch that does not fit the
      student's outputs; called before anything moves.
    - ``default_teacher_losses(batch)``: the teacher's own losses on an inner batch, where the trainer was given none.
      Without it: none.
    - ``teacher_classifies``: True where the teacher maps the student's inputs to class logits, so that its accuracy can
      be measured on validation data.
    """

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        """What the teacher says about ``batch``; ``student_outputs`` (B, ...) carry no graph."""
        ...

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """ℓ_i, shape (B,): the mean over the batch is taken in one place, by the inner step."""
        ...

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """L, a scalar, of the student's outputs on the labelled ``batch``."""
        ...


def first_input(batch: Any) -> Any:
    """What a network reads of a batch that is a tensor or a dict, or a tuple whose first element is the input.

    >>> first_input((torch.ones(2), "labels"))
    tensor([1., 1.])
    """
    if isinstance(batch, Tensor | Mapping):
        return batch
    if isinstance(batch, tuple | list) and batch:
        return batch[0]
    raise MetaplError(
        f"a batch of type {type(batch).__name__} was given; a tensor, a dict or a tuple (input, ...) was expected. "
        "Give the problem a method student_input(batch) that says what the student reads."
    )


def student_input(problem: BilevelProblem, batch: Any) -> Any:
    """What the student reads of an inner batch: the problem's word, or :func:`first_input`."""
    own = getattr(problem, "student_input", None)
    return first_input(batch) if own is None else own(batch)
