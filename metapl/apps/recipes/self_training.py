"""How Noisy Student goes from a teacher to its students: rounds of labels, selection and training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import tyro

from metapl.errors import FieldError

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
class SelfTraining:
    """What a run of Noisy Student does beyond training a network on labeled examples.

    In round 0 a teacher is trained on the labeled examples. In each later round the network of the round before labels
    the unlabeled examples, of which some are selected, and a new network learns from both.

    Args:
        rounds: how many students are trained, each on the labels of the network before it.
        networks: the network of each round, beginning with the first teacher's; the last one named serves all later
            rounds, and with --compare the other methods. Names of networks, and for the digits widths of hidden layers
            such as 32x32. By default every round has the network of the recipe.
        allow_smaller: let a student have fewer parameters than its teacher, which is distillation and not Noisy
            Student.
        labels: learn the teacher's class distributions (soft), or the most probable class of each (hard).
        threshold: keep unlabeled examples of which the teacher is more confident than this.
        per_class: the most examples of a class that are kept, the most confident ones; by default all.
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
        noisy_teacher: let the teacher label augmented examples, with dropout and stochastic depth.
        finetune_size: side in pixels, larger than in training, of the pictures that the last student is finetuned on
            for --finetune-steps: labeled ones, not augmented, with its first layers frozen. It is then measured and
            used at this size (FixRes). By default it is not.
        frozen: share of the layers that are frozen then, the first ones.
        first: how the first teacher is trained, if not as the recipe says; comparisons set it.
    """

    rounds: int = 3
    networks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    allow_smaller: bool = False
    labels: Literal["soft", "hard"] = "soft"
    threshold: float = 0.3
    per_class: int | None = None
    balance: bool = True
    ratio: int = 3
    loss: Literal["mean", "two_means"] = "mean"
    training: Literal["joint", "pretrain_finetune", "pretrain"] = "joint"
    warm_start: bool = False
    warm_steps: int | None = None
    unlabeled_noise: Literal["all", "model", "none"] = "all"
    noisy_teacher: bool = False
    finetune_size: int | None = None
    frozen: float = 0.5
    first: tyro.conf.Suppress[tyro.conf.Fixed[FirstTeacher | None]] = None

    def __post_init__(self) -> None:
        self._require(1 <= self.rounds <= MOST_ROUNDS, "rounds", f"1 to {MOST_ROUNDS:,}")
        self._require(0 <= self.threshold < 1, "threshold", "a confidence in [0, 1)")
        self._require(self.per_class is None or self.per_class >= 1, "per_class", "1 or more")
        self._require(1 <= self.ratio <= MOST_RATIO, "ratio", f"1 to {MOST_RATIO:,}")
        self._require(self.warm_steps is None or self.warm_steps >= 1, "warm_steps", "1 or more")
        self._require(self.warm_steps is None or self.warm_start, "warm_steps", "None without warm_start")
        self._require(self.finetune_size is None or self.finetune_size >= 1, "finetune_size", "1 or more")
        self._require(0 <= self.frozen < 1, "frozen", "a share in [0, 1)")
        most = self.rounds + 1
        self._require(
            len(self.networks) <= most, "networks", f"{most} names at most: the first teacher's, then one a round"
        )

    def _require(self, condition: bool, field: str, expected: str) -> None:
        if not condition:
            value = getattr(self, field)
            raise FieldError(f"SelfTraining({field}={value!r}): expected {expected}.", field, value, expected)

    def network(self, number: int) -> str | None:
        """The network of a round by its name; None is the recipe's own.

        >>> [SelfTraining(networks=("a", "b")).network(number) for number in range(4)]
        ['a', 'b', 'b', 'b']
        """
        return self.networks[min(number, len(self.networks) - 1)] if self.networks else None

    def smaller(self, parameters: Sequence[int]) -> int | None:
        """The first round whose network has fewer parameters than the one before it; None where there is none."""
        pairs = pairwise(parameters)
        return next((number for number, (teacher, student) in enumerate(pairs, 1) if student < teacher), None)
