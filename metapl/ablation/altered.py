"""Altered feedback: controls that show which part of the feedback causes a gain."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import Tensor

from metapl.core.feedback import Feedback
from metapl.core.path import Path
from metapl.core.step import InnerStep
from metapl.errors import MetaplError
from metapl.execution.layout import Capability
from metapl.feedback.base import Estimator, State
from metapl.feedback.forward import Forward
from metapl.problems.base import Kind

if TYPE_CHECKING:
    from metapl.core.terms import StudentPath

Alteration = Literal["permuted", "class_means", "random_sign"]

# What an altered estimator has from its base: it asks for the same passes of the same step.
OF_THE_BASE = (
    "labels",
    "credits",
    "draws",
    "reduction",
    "normalization",
    "truncate",
    "keep_graph",
    "keep_on",
    "looks_ahead",
    "is_through_step",
    "takes_differences",
    "takes_outer_losses",
    "has_direct_term",
    "keeping",
    "requires",
    "orders",
)

# Keeps the generators of two seeds apart, whatever the number of calls.
SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Altered(Estimator):
    r"""The feedback of another estimator, altered within the batch.

    .. math:: h'_i = h_{\pi(i)} \ \text{(permuted)}, \qquad
              h'_i = \tfrac1B \sum_j h_j \ \text{(class means)}, \qquad
              h'_i = \pm h_i \ \text{(random sign)}

    Args:
        base: the estimator whose h, with a row per example, is altered.
        alteration: ``"permuted"``: rows assigned to other examples; ``"class_means"``: every row
            replaced by the mean over the batch (of sampled classes: over the rows with the same
            class); ``"random_sign"``: each row times ±1 with equal probability. Rows of h that are
            none of the batch, as of a matrix, are taken for examples; one number stays as it is.
        seed: of the permutations and signs, which are drawn from a separate generator.

    Takes, cost: as ``base``; on an accelerator the host waits for the device once a step. Bias:
    intended.

    >>> Altered(alteration="permuted").name
    'forward_permuted'
    """

    base: Estimator = field(default_factory=Forward)
    alteration: Alteration = "permuted"
    seed: int = 0

    name: ClassVar[str] = "altered"
    labels: ClassVar[tuple[Kind, ...]] = ()
    requires: ClassVar[frozenset[Capability]] = frozenset()
    has_direct_term: ClassVar[bool] = False
    takes_differences: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base.credits not in ("signal", "example"):
            expected = "feedback on each example, such as Forward()"
            raise MetaplError(f"Altered(base={self.base!r}): expected {expected}.")
        for name in OF_THE_BASE:
            object.__setattr__(self, name, getattr(self.base, name))
        object.__setattr__(self, "name", f"{self.base.name}_{self.alteration}")

    def without_shape(self) -> Estimator:
        # What is verified is the feedback that it alters.
        return self.base.without_shape()

    def init(self) -> State:
        return {**self.base.init(), "altered": torch.zeros((), dtype=torch.int64)}

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        call = int(state["altered"])
        base_state = {name: t for name, t in state.items() if name != "altered"}
        feedback_by_step, next_base_state = self.base.feedback(path, base_state)
        # Without ``is_pure`` this runs on the eager road alone.
        steps = cast(Path, path).steps
        altered = []
        for feedback, step in zip(feedback_by_step, steps, strict=True):
            altered.append(feedback.mapped(partial(self._alter, step, call)))
        return altered, {**next_base_state, "altered": torch.tensor(call + 1)}

    def _alter(self, step: InnerStep, call: int, name: str, h: Tensor) -> Tensor:
        """Return the feedback on a field of the signal, altered over the batch of all ranks."""
        if h.ndim == 0:
            # One number for all examples.
            return h
        if not step.has_rows(name):
            # Every rank and micro-batch has a share of the feedback on all of a matrix.
            shares = h.chunk(step.descent.parts)
            return torch.cat([self._altered(share, None, call) for share in shares])
        ranks = step.student.ranks
        classes = ranks.all_rows(step.signal.value) if step.signal.sampled else None
        return ranks.own_rows(self._altered(ranks.all_rows(h), classes, call))

    def _altered(self, h: Tensor, classes: Tensor | None, call: int) -> Tensor:
        """Return altered rows of h; ``classes`` are those that were sampled, if any were."""
        if self.alteration == "class_means":
            # Sampled values of floating point are no classes.
            if h.ndim > 1 or classes is None or classes.is_floating_point():
                return h.mean(0, keepdim=True).expand_as(h)
            is_same_class = (classes[:, None] == classes[None, :]).to(h)
            return (is_same_class @ h) / is_same_class.sum(1)
        generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + call)
        if self.alteration == "permuted":
            return h[torch.randperm(len(h), generator=generator).to(h.device)]
        signs = torch.randint(0, 2, (len(h),), generator=generator).to(h) * 2 - 1
        # One sign for each row, whatever the dimensions of a row.
        other_dimensions = [1] * (h.ndim - 1)
        return h * signs.reshape(-1, *other_dimensions)
