"""How Noisy Student goes from a teacher to its students: rounds of labels, selection and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from metapl.apps.recipes.ranges import Share, Steps, require
from metapl.runs.fields import Range, check_fields

MOST_ROUNDS = 1000

MOST_RATIO = 2**12


@dataclass(frozen=True, kw_only=True)
class FirstTeacher:
    """What the first teacher takes of a recipe, where the rest of the run takes other values.

    In a comparison at equal cost methods have numbers of steps, and networks, of their own. Their first teachers do
    not: with these values, the same seed gives the same weights and the same labels in all of them.

    Args:
        steps: number of training steps.
        warmup: steps over which the learning rate grows from 0.
        validate_every: steps between validations.
        lr: base learning rate.
        clip_norm: greatest norm of the gradient; None where the recipe has no clipping, or leaves it out.
        weights: file of the weights that it begins with; None for fresh ones.
    """

    steps: int
    warmup: int
    validate_every: int
    lr: float
    clip_norm: float | None = None
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which unlabeled examples are learned from, by the labels of a teacher that was trained on the labeled ones.

    Args:
        networks: the network of each round, beginning with the first teacher's; the last one named serves all later
            rounds, and with --compare the other methods. Names of networks, and for the digits widths of hidden layers
            such as 32x32. By default every round has the network of the recipe.
        per_class: the most examples of a class that are kept, the most confident ones; by default all.
        noisy_teacher: let the teacher label augmented examples, with dropout and stochastic depth.
        first: how the first teacher is trained, if not as the recipe says; comparisons set it.
    """

    networks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    per_class: Steps | None = None
    noisy_teacher: bool = False
    first: tyro.conf.Suppress[tyro.conf.Fixed[FirstTeacher | None]] = None

    def __post_init__(self) -> None:
        check_fields(self)

    def network(self, number: int) -> str | None:
        """The network of a round by its name; None is the recipe's own.

        >>> [Selection(networks=("a", "b")).network(number) for number in range(4)]
        ['a', 'b', 'b', 'b']
        """
        return self.networks[min(number, len(self.networks) - 1)] if self.networks else None

    @property
    def last(self) -> str | None:
        """The network of the last round, likewise."""
        return self.networks[-1] if self.networks else None


@dataclass(frozen=True, kw_only=True)
class SelfTraining(Selection):
    """What a run of Noisy Student does beyond training a network on labeled examples.

    In round 0 a teacher is trained on the labeled examples. In each later round the network of the round before labels
    the unlabeled examples, of which some are selected, and a new network learns from both.

    Args:
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
        super().__post_init__()
        require(self, self.warm_steps is None or self.warm_start, "warm_steps", "None without warm_start")
        joint = self.training == "joint"
        require(self, joint or self.loss == "mean", "loss", f"mean with training={self.training}, which has no sum")
        require(self, self.finetune_size is not None or self.frozen == 0.5, "frozen", "a finetune_size beside it")
        most = f"{self.rounds + 1} names at most: the first teacher's, then one a round"
        require(self, len(self.networks) <= self.rounds + 1, "networks", most)
