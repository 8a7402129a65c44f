"""What methods are made of beside their own fields: optimizers, and how the teacher learns from the student."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from torch import nn

from metapl import feedback
from metapl.apps.networks import parameter_groups
from metapl.apps.recipes.ranges import Rate, Share, Weight, require
from metapl.errors import MetaplError
from metapl.problems import PseudoLabels
from metapl.runs.fields import check_fields

if TYPE_CHECKING:
    Mode = str
else:
    Mode = Literal[feedback.MODES]  # what the command line offers


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer of ``torch.optim``.

    Args:
        algorithm: sgd is stochastic gradient descent; adamw is AdamW with decay rates 0.9 and 0.999.
        lr: base learning rate, which the schedule multiplies.
        momentum: momentum of sgd; 0 is none.
        nesterov: Nesterov's momentum instead of the usual one (sgd).
        weight_decay: weight of the L2 penalty; adamw shrinks the weights by it directly.
        decay_norms: apply weight decay to normalization layers and biases too.
    """

    algorithm: Literal["sgd", "adamw"] = "sgd"
    lr: Rate = 0.1
    momentum: Share = 0.0
    nesterov: bool = False
    weight_decay: Weight = 0.0
    decay_norms: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, self.momentum > 0 or not self.nesterov, "momentum", "a number above 0 beside nesterov")
        adaptive = self.algorithm == "adamw"
        require(self, not (adaptive and self.momentum), "momentum", "0 with adamw, which has its own")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over a module's parameters."""
        groups = parameter_groups(module, self.weight_decay, on_norms=self.decay_norms)
        if self.algorithm == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)

    def with_rate(self, rate: float) -> Optimizer:
        """With this learning rate where it was left open, which it is not here."""
        return self


SIZE = tyro.conf.create_mutex_group(required=False)
"""Flags that say how large the feedback is, of which one is given."""

OPEN: Any = None
"""What a recipe chooses for itself."""

SGD_RATE = 1e-2
"""Learning rate of SGD, whatever the network."""


@dataclass(frozen=True, kw_only=True)
class OpenOptimizer(Optimizer):
    """An optimizer whose learning rate is chosen for the network if it is not given.

    Args:
        lr: base learning rate, which the schedule multiplies. The default of adamw depends on the network, such as 0.01
            for pooled_cnn and 0.001 for resnet18; that of sgd is 0.01.
    """

    algorithm: Literal["sgd", "adamw"] = "adamw"
    lr: Rate | None = OPEN  # type: ignore[assignment]  # it has a value when it is built
    weight_decay: Weight = 0.05
    decay_norms: bool = False

    def with_rate(self, rate: float) -> Optimizer:
        if self.lr is not OPEN:
            return self
        return dataclasses.replace(self, lr=rate if self.algorithm == "adamw" else SGD_RATE)


@dataclass(frozen=True, kw_only=True)
class Softness:
    """How a teacher's outputs become labels.

    Args:
        temperature: temperature of the softmax that makes the pseudo-labels.
        pseudo_label_smoothing: label smoothing of the pseudo-labels in the student's loss.
    """

    temperature: float = 1.0
    pseudo_label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        self.problem()

    def problem(self) -> PseudoLabels:
        """The pseudo-labels."""
        return PseudoLabels(temperature=self.temperature, label_smoothing=self.pseudo_label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Labeling(Softness):
    """How a teacher labels.

    Args:
        mode: how the gradient of the feedback is computed; see ``metapl.MODES``.
        labels: soft or hard pseudo-labels, if not what the mode needs.
    """

    mode: Mode = "forward"
    labels: Annotated[Literal["soft", "hard"] | None, tyro.conf.arg(name="pseudo-labels")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.problem().for_modes(self.estimator().labels, self.mode)

    def estimator(self) -> feedback.Estimator:
        """The mode."""
        return feedback.estimator(self.mode)

    def problem(self) -> PseudoLabels:
        return dataclasses.replace(super().problem(), kind=self.labels)


@dataclass(frozen=True, kw_only=True)
class Feedback(Labeling):
    """How the teacher learns from the student.

    Args:
        feedback_weight: weight of the feedback beside the teacher's own losses.
        normalization: what the feedback h is divided by, if not as in the mode: nothing (gradient), the learning rate,
            or ‖w‖‖g‖ (cosine).
        baseline: decay of a moving average to subtract from h (reinforce, loss_difference).
    """

    feedback_weight: Annotated[float, SIZE] = 1.0
    normalization: Literal["gradient", "learning_rate", "cosine"] | None = None
    baseline: float | None = None

    def estimator(self) -> feedback.Estimator:
        """The mode with the fields that are set."""
        plain = super().estimator()
        fields: dict[str, Any] = {"baseline": self.baseline}
        cosine = self.normalization == "cosine" and isinstance(plain, feedback.Reinforce)
        fields |= {"similarity": "cosine"} if cosine else {"normalization": self.normalization}
        fields = {name: value for name, value in fields.items() if value is not None}
        known = {f.name for f in dataclasses.fields(plain)}  # type: ignore[arg-type]  # every registered mode is one
        for name in fields.keys() - known:
            raise MetaplError(f"mode '{self.mode}' has no {name}; leave {name} out, or take a mode that has it.")
        return dataclasses.replace(plain, **fields)  # type: ignore[type-var]  # as above
