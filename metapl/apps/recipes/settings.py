"""What recipes and methods are made of: ranges, optimizers, feedback, and the rounds of Noisy Student."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from torch import nn

from metapl import feedback
from metapl.apps.networks import parameter_groups
from metapl.errors import FieldError, MetaplError
from metapl.problems import PseudoLabels
from metapl.runs.fields import AboveZero, Range, check_fields

MOST_STEPS, MOST_IN_A_BATCH = 10**9, 2**20  # beyond these a machine would be asked for more than any has
MOST_ROUNDS, MOST_RATIO = 1000, 2**12
SGD_RATE = 1e-2  # the learning rate of sgd where it is left open, whatever the network

Steps = Annotated[int, Range(1, most=MOST_STEPS)]
SomeSteps = Annotated[int, Range(0, most=MOST_STEPS)]
Batch = Annotated[int, Range(1, most=MOST_IN_A_BATCH)]
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]

OPEN: Any = None  # what a recipe chooses for itself
SIZE = tyro.conf.create_mutex_group(required=False)  # flags that say how large the feedback is, of which one is given

if TYPE_CHECKING:
    Mode = str
else:
    Mode = Literal[feedback.MODES]  # what the command line offers


def require(value: object, condition: bool, field: str, expected: str) -> None:
    """Refuse a dataclass whose ``field``, which may be one of a field, is not as ``expected``."""
    if not condition:
        given = operator.attrgetter(field)(value)
        raise FieldError(f"{type(value).__name__}({field}={given!r}): expected {expected}.", field, given, expected)


# ------------------------------------------------------------------------------------------------------- optimizers


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
    lr: AboveZero = 0.1
    momentum: Share = 0.0
    nesterov: bool = False
    weight_decay: Weight = 0.0
    decay_norms: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, self.momentum > 0 or not self.nesterov, "momentum", "a number above 0 beside nesterov")
        require(self, self.algorithm == "sgd" or not self.momentum, "momentum", "0 with adamw, which has its own")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(module, self.weight_decay, on_norms=self.decay_norms)
        if self.algorithm == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)

    def with_rate(self, rate: float) -> Optimizer:
        """With this learning rate of adamw, where it was left open, which it is not here."""
        return self


@dataclass(frozen=True, kw_only=True)
class OpenOptimizer(Optimizer):
    """An optimizer whose learning rate is chosen for the network if it is not given.

    Args:
        lr: base learning rate, which the schedule multiplies. The default of adamw depends on the network, such as 0.01
            for pooled_cnn and 0.001 for resnet18; that of sgd is 0.01.
    """

    algorithm: Literal["sgd", "adamw"] = "adamw"
    lr: AboveZero | None = OPEN  # type: ignore[assignment]  # it has a value when it is built
    weight_decay: Weight = 0.05
    decay_norms: bool = False

    def with_rate(self, rate: float) -> Optimizer:
        if self.lr is not OPEN:
            return self
        return dataclasses.replace(self, lr=rate if self.algorithm == "adamw" else SGD_RATE)


# --------------------------------------------------------------------------------------------- labels of a teacher


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
        """The pseudo-labels, which check their values."""
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
        plain: Any = super().estimator()
        cosine = self.normalization == "cosine" and isinstance(plain, feedback.Reinforce)
        fields = {"baseline": self.baseline, "similarity" if cosine else "normalization": self.normalization}
        given = {name: value for name, value in fields.items() if value is not None}
        for name in given.keys() - {each.name for each in dataclasses.fields(plain)}:
            raise MetaplError(f"mode '{self.mode}' has no {name}; leave {name} out, or take a mode that has it.")
        made: feedback.Estimator = dataclasses.replace(plain, **given)
        return made


# --------------------------------------------------------------------------------------------------- Noisy Student


@dataclass(frozen=True, kw_only=True)
class SelfTraining:
    """What a run of Noisy Student does beyond training a network on labeled examples.

    In round 0 a teacher is trained on the labeled examples. In each later round the network of the round before labels
    the unlabeled examples, of which some are selected, and a new network learns from both.

    Args:
        networks: the network of each round, beginning with the first teacher's; the last one named serves all later
            rounds. Names of networks, and for the digits widths of hidden layers such as 32x32. By default every round
            has the network of the recipe.
        per_class: the most examples of a class that are kept, the most confident ones; by default all.
        noisy_teacher: let the teacher label augmented examples, with dropout and stochastic depth.
        rounds: how many students are trained, each on the labels of the network before it.
        allow_smaller: let a student have fewer parameters than its teacher, which is distillation and not Noisy
            Student.
        labels: learn the teacher's class distributions (soft), or the most probable class of each (hard).
        threshold: keep unlabeled examples of which the teacher is more confident than this.
        balance: repeat examples of smaller classes until all classes count the same.
        ratio: unlabeled examples in a batch for each labeled one.
        loss: the mean over the whole batch of labeled and unlabeled examples (mean), or the sum of the two means, as
            Algorithm 1 has it (two_means).
        training: learn from labeled and unlabeled examples together (joint), from the unlabeled ones first and then,
            by --finetune-steps, from the labeled ones (pretrain_finetune), or from the unlabeled ones alone (pretrain).
        warm_start: begin each student with the weights of its teacher, and end at the learning rate at which a student
            from scratch would end; needs the same network, and --schedule exponential.
        warm_steps: steps of a student that begins so; by default as many as others.
        unlabeled_noise: what the student meets on unlabeled examples: augmentation, dropout and stochastic depth
            (all), dropout and stochastic depth (model), or nothing (none). On labeled ones it always meets all.
        finetune_size: side in pixels, larger than in training, of the pictures that the last student is finetuned on
            for --finetune-steps: labeled ones, not augmented, with its first layers frozen. It is then measured and
            used at this size (FixRes). By default it is not.
        frozen: share of the layers that are frozen then, the first ones.
    """

    networks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    per_class: Steps | None = None
    noisy_teacher: bool = False
    rounds: Annotated[int, Range(1, most=MOST_ROUNDS)] = 3
    allow_smaller: bool = False
    labels: Literal["soft", "hard"] = "soft"
    threshold: Share = 0.3
    balance: bool = True
    ratio: Annotated[int, Range(1, most=MOST_RATIO)] = 3
    loss: Literal["mean", "two_means"] = "mean"
    training: Literal["joint", "pretrain_finetune", "pretrain"] = "joint"
    warm_start: bool = False
    warm_steps: Steps | None = None
    unlabeled_noise: Literal["all", "model", "none"] = "all"
    finetune_size: Steps | None = None
    frozen: Share = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, self.warm_steps is None or self.warm_start, "warm_steps", "None without warm_start")
        means = self.training == "joint" or self.loss == "mean"
        require(self, means, "loss", f"mean with training={self.training}, which has no sum")
        require(self, self.finetune_size is not None or self.frozen == 0.5, "frozen", "a finetune_size beside it")
        most = f"{self.rounds + 1} names at most: the first teacher's, then one a round"
        require(self, len(self.networks) <= self.rounds + 1, "networks", most)

    def network(self, number: int) -> str | None:
        """The network of a round by its name, of -1 that of the last; None is the recipe's own.

        >>> [SelfTraining(networks=("a", "b")).network(number) for number in range(-1, 3)]
        ['b', 'a', 'b', 'b']
        """
        return self.networks[min(number, len(self.networks) - 1)] if self.networks else None
