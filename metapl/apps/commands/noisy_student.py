"""``metapl noisy-student RECIPE``"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from metapl.apps.commands.train import Train
from metapl.apps.recipes import Digits, ImageFolders
from metapl.apps.recipes.base import Method, Unasked
from metapl.apps.recipes.protocols import NOISY_STUDENT_RECIPES
from metapl.apps.recipes.settings import Optimizer
from metapl.distributed.mesh import Mesh

COMPARED = (
    "noisy_student",
    "mpl_filtered",
    "none_filtered",
    "noisy_student_clean",
    "noisy_student_uneven",
    "noisy_student_once",
    "supervised",
    "uda",
)
"""What ``--compare`` trains by: both methods, their controls, and baselines."""


@dataclass(frozen=True, kw_only=True)
class NoisyStudent(Train):
    """Train by Noisy Student: a teacher labels, a student learns its labels with noise, and becomes the teacher.

    Round 0 trains the first teacher on the labeled examples. In each later round the last network labels the unlabeled
    examples without noise; those it is confident of are kept, as many of each class; and a new network of the same
    size, or larger, learns from both with augmentation, dropout and stochastic depth. --steps are those of each round,
    and --minutes, of your own pictures, those of all rounds together.

    With --method mpl it is Meta Pseudo Labels on unlabeled examples that are selected by the labels of the same first
    teacher. With --compare, the flags are those of --method, and the other methods take those that they have too.

    Args:
        out: run folder; by default the next free one in runs/.
        resume: continue the run in the folder; it ends bit for bit as without the interruption.
        compare: train by Meta Pseudo Labels, by controls without noise, without balancing and with one round, and by
            baselines too, each for as many steps as cost the same number of operations, and compare them. Methods with
            a first teacher train the same one, and learn from the same labels.
        seeds: with --compare: seeds, such as 0-9 or 0,3,5; by default the recipe's own.
        jobs: with --compare: number of runs at a time; by default one for each core, and one on a GPU.
    """

    own: ClassVar[str | None] = "noisy_student"
    equal_cost: ClassVar[bool] = True

    controls: Unasked[bool] = False
    mesh: Unasked[Mesh] = field(default_factory=Mesh)

    @classmethod
    def offered(cls) -> Mapping[str, str]:
        return {"noisy_student": "noisy_student", "mpl": "mpl_filtered"}

    @classmethod
    def compares(cls) -> Sequence[str]:
        return [*cls.kind.known]

    @classmethod
    def usual(cls, name: str) -> Method:
        teacher = {"teacher": Optimizer(lr=0.2, momentum=0.9)} if issubclass(cls.kind, Digits) else {}
        return dataclasses.replace(super().usual(name), **teacher)

    @classmethod
    def about(cls) -> str:
        return NoisyStudent.__doc__ or ""

    def compared(self) -> tuple[str, ...]:
        return self.methods or COMPARED


Schedule = Literal["cosine", "constant", "exponential"]


@dataclass(frozen=True, kw_only=True)
class _Digits(Digits):
    """The digits, with the defaults of Noisy Student."""

    steps: int = 1000
    hidden: tuple[int, ...] = (64, 64)
    schedule: Schedule = "exponential"


@dataclass(frozen=True, kw_only=True)
class _Images(ImageFolders):
    """A user's own pictures, with the defaults of Noisy Student."""

    schedule: Schedule = "exponential"


COMMANDS = NoisyStudent.on(_Digits, _Images, *NOISY_STUDENT_RECIPES)
"""The recipes that Noisy Student trains, by name."""
