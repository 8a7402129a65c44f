"""``--method ent_min``: a network that is sure of unlabeled examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from metapl.apps.methods.base import Method, Trained, Training
from metapl.execution import checks
from metapl.execution.batch import views
from metapl.execution.numerics import wide
from metapl.problems.losses import CrossEntropy

# The weight of the entropy.
WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class EntMin(Method):
    """Train one network on labels, and to be sure of unlabeled examples (entropy minimization).

    Source: Grandvalet and Bengio (2004), eq. (7).
    """

    name: ClassVar[str] = "ent_min"
    has_teacher: ClassVar[bool] = False
    title: ClassVar[str] = "entropy minimization"

    def train(self, t: Training) -> Trained:
        """Train one network on labeled and unlabeled examples."""
        return t.alone(t.teacher, (CrossEntropy(), Entropy(WEIGHT)))


@dataclass(frozen=True)
class Entropy:
    r"""weight · (1/B) Σ_i H(softmax T(x_i)), of the weak view of unlabeled examples."""

    weight: float

    name: ClassVar[str] = "entropy"
    detaches_signal: ClassVar[bool] = True

    def __call__(
        self, teacher: nn.Module, *, outer: Any, inner: Any, signal: Any, step: int
    ) -> Tensor:
        log_p = wide(checks.logits(teacher(views(inner)[0]), "network")).log_softmax(-1)
        return -self.weight * (log_p.exp() * log_p).sum(-1).mean()
