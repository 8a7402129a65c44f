"""Altered feedback: controls that show which part of the feedback causes a gain."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution.layout import Capability
from metapl.feedback.base import Estimator, Feedback, Normalization, State
from metapl.feedback.forward import Forward
from metapl.feedback.inner_step import InnerStep
from metapl.feedback.path import Path
from metapl.feedback.roads import StudentPath
from metapl.problems.base import Kind

Alteration = Literal["permuted", "class_means", "random_sign"]


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
            none of the batch, as of a matrix, are taken for examples.
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
    normalization: ClassVar[Normalization] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base.credits not in ("signal", "example"):
            raise MetaplError(
                f"Altered(base={self.base!r}): expected feedback on each example, such as "
                "Forward()."
            )
        own = (
            "labels",
            "credits",
            "keep_graph",
            "keep_on",
            "looks_ahead",
            "keeping",
            "requires",
            "orders",
        )
        for name in (*own, "normalization"):
            object.__setattr__(self, name, getattr(self.base, name, "gradient"))
        object.__setattr__(self, "name", f"{self.base.name}_{self.alteration}")

    def init(self) -> State:
        return {**self.base.init(), "altered": torch.zeros((), dtype=torch.int64)}

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        count = int(state["altered"])
        feedback, next_state = self.base.feedback(
            path, {k: v for k, v in state.items() if k != "altered"}
        )
        # Without ``is_pure`` it runs on the eager road alone.
        steps = cast(Path, path).steps
        pairs = zip(feedback, steps, strict=True)
        altered = [found.mapped(partial(self._alter, step, count)) for found, step in pairs]
        return altered, {**next_state, "altered": torch.tensor(count + 1)}

    def _alter(self, step: InnerStep, count: int, name: str, h: Tensor) -> Tensor:
        if not step.has_rows(
            name
        ):  # every rank and micro-batch has a share of the feedback on all of a matrix
            return torch.cat(
                [self._altered(share, None, count) for share in h.chunk(len(step.passes))]
            )
        ranks = step.student.ranks
        drawn = ranks.all_rows(step.signal.value) if step.signal.sampled else None
        return ranks.own_rows(self._altered(ranks.all_rows(h), drawn, count))

    def _altered(self, h: Tensor, drawn: Tensor | None, count: int) -> Tensor:
        if self.alteration == "class_means":
            if (
                h.ndim > 1 or drawn is None or drawn.is_floating_point()
            ):  # values that are not classes
                return h.mean(0, keepdim=True).expand_as(h)
            same = (drawn[:, None] == drawn[None, :]).to(h)
            return (same @ h) / same.sum(1)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + count)
        if self.alteration == "permuted":
            return h[torch.randperm(len(h), generator=generator).to(h.device)]
        coins = torch.randint(0, 2, (len(h),), generator=generator).to(h) * 2 - 1
        return h * coins.reshape(-1, *[1] * (h.ndim - 1))
