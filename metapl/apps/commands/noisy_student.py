"""``metapl noisy-student RECIPE``"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import tyro

from metapl.apps.commands.idle import Rule, by_choice, refuse_idle
from metapl.apps.commands.parse import Switch, on_recipe
from metapl.apps.commands.train import Train
from metapl.apps.experiments.noisy_student import networks_of
from metapl.apps.recipes import Digits, ImageFolders, Vision
from metapl.apps.recipes.base import Optimizer, Recipe, Unasked
from metapl.apps.recipes.methods import METHODS, SELF_TRAINING_METHODS, Method
from metapl.apps.recipes.noisy_student import NOISY_STUDENT_RECIPES
from metapl.apps.recipes.self_training import SelfTraining
from metapl.distributed.launch import Lead
from metapl.distributed.mesh import Mesh
from metapl.runs.folder import RunFolder

RIVALS = {"noisy_student": "noisy_student", "mpl": "mpl_filtered"}
"""What ``--method`` offers, and the methods that these are."""

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

METHODS_HELP = f"with --compare: these methods alone, of {', '.join({**SELF_TRAINING_METHODS, **METHODS})}."

OF_STUDENTS = (
    "networks allow-smaller labels threshold balance no-balance ratio loss training warm-start warm-steps "
    "unlabeled-noise noisy-teacher rounds finetune-size frozen"
)
"""Flags of Noisy Student alone; --per-class is of the selection for MPL too."""

OF_MPL = (
    "unlabeled-batch uda-* mode pseudo-labels feedback-weight feedback-ratio normalization baseline temperature "
    "pseudo-label-smoothing exact-every student.* wait finetune-steps finetune-batch finetune.*"
)
"""Flags of Meta Pseudo Labels and of UDA, which --method mpl and --compare have."""


@dataclass(frozen=True, kw_only=True)
class _Digits(Digits):
    """The digits, with the defaults of Noisy Student."""

    method: Unasked[str] = "noisy_student"
    steps: int = 1000
    hidden: tuple[int, ...] = (64, 64)
    teacher: Optimizer = field(default_factory=lambda: Optimizer(lr=0.2, momentum=0.9))
    schedule: Literal["cosine", "constant", "exponential"] = "exponential"


@dataclass(frozen=True, kw_only=True)
class NoisyStudent(Train):
    """Train by Noisy Student: a teacher labels, a student learns its labels with noise, and becomes the teacher.

    Round 0 trains the first teacher on the labeled examples. In each later round the last network labels the unlabeled
    examples without noise; those it is confident of are kept, as many of each class; and a new network of the same
    size, or larger, learns from both with augmentation, dropout and stochastic depth. --steps are those of each round.

    Args:
        recipe: what is trained, and how.
        self_training: what happens in the rounds.
        method: noisy_student; or mpl: Meta Pseudo Labels on unlabeled examples that are selected by the labels of the
            same first teacher.
        out: run folder; by default the next free one in runs/.
        resume: continue the run in the folder; it ends bit for bit as without the interruption.
        compare: train by Meta Pseudo Labels, by controls without noise, without balancing and with one round, and by
            baselines too, each for as many steps as cost the same number of operations, and compare them. Methods with
            a first teacher train the same one, and learn from the same labels.
        seeds: with --compare: seeds, such as 0-9 or 0,3,5; by default the recipe's own.
        jobs: with --compare: number of runs at a time; by default one for each core, and one on a GPU.
    """

    known: ClassVar[Mapping[str, Method]] = {**SELF_TRAINING_METHODS, **METHODS}
    equal_cost: ClassVar[bool] = True

    recipe: Annotated[_Digits, tyro.conf.arg(name="")] = field(default_factory=_Digits)
    self_training: Annotated[SelfTraining, tyro.conf.arg(name="")] = field(default_factory=SelfTraining)
    method: Literal["noisy_student", "mpl"] = "noisy_student"
    compare: Switch = False
    controls: Unasked[bool] = False
    methods: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(metavar="METHOD ...", help=METHODS_HELP, help_behavior_hint="")
    ] = None
    mesh: Unasked[Mesh] = field(default_factory=Mesh)

    def _check(self) -> None:
        super()._check()
        given = self._with_rounds()
        if given.complete and not self.compare and self.method == "noisy_student":
            networks_of(given, given.self_training)

    def check_flags(self, given: Sequence[str]) -> None:
        """Refuse flags that are given and change nothing."""
        refuse_idle(given, self._rules())

    def _rules(self) -> Iterator[Rule]:
        settings = self.self_training
        if not self.compare and self.method == "mpl":
            yield Rule(OF_STUDENTS, "with --method mpl", "it is for --method noisy_student")
        if not self.compare and self.method == "noisy_student":
            flags = OF_MPL
            if settings.training == "pretrain_finetune" or settings.finetune_size is not None:
                flags = flags.replace("finetune-steps finetune-batch finetune.*", "")
            yield Rule(flags, "with --method noisy_student", "it is for --method mpl; batches have --ratio")
        if not self.compare and settings.training != "joint":
            yield Rule("loss", f"with --training {settings.training}", "it is for --training joint")
        if settings.finetune_size is None:
            yield Rule("frozen", "without --finetune-size", "give both, or neither")
        if self.compare:
            yield Rule("method", "beside --compare", "name --methods instead")

    def _with_rounds(self) -> Any:
        """The recipe with what happens in the rounds."""
        recipe: Recipe = self.recipe
        changed: dict[str, Any] = {"self_training": self.self_training}
        return dataclasses.replace(recipe, **changed).by(RIVALS[self.method], recipe.seed)

    def _settled(self, folder: RunFolder, lead: Lead) -> Any:
        given = dataclasses.replace(self, recipe=self._with_rounds())
        return super(NoisyStudent, given)._settled(folder, lead)

    def _own_method(self) -> str:
        return RIVALS[self.method]

    def _methods(self) -> tuple[str, ...]:
        return self.methods or COMPARED


@dataclass(frozen=True, kw_only=True)
class _Images(ImageFolders):
    """A user's own pictures, with the defaults of Noisy Student."""

    method: Unasked[str] = "noisy_student"
    teacher_run: Unasked[str | None] = None
    label_store: Unasked[str | None] = None
    labeled_label_store: Unasked[str | None] = None
    warm_start: Unasked[bool] = True
    schedule: Literal["cosine", "constant", "exponential"] = "exponential"


@dataclass(frozen=True, kw_only=True)
class NoisyStudentImages(NoisyStudent):
    """Train a classifier on your own pictures by Noisy Student: each student learns the labels of the one before it.

    Round 0 trains the first teacher on the labeled pictures. In each later round the last network labels the unlabeled
    pictures without noise; those it is confident of are kept, as many of each class; and a new network of the same
    size, or larger, learns from both with changed pictures, dropout and stochastic depth. --minutes are those of all
    rounds together, --steps those of each.

    Args:
        recipe: what is trained, and how.
    """

    recipe: Annotated[_Images, tyro.conf.arg(name="")]  # type: ignore[assignment]  # another recipe, run alike

    def _rules(self) -> Iterator[Rule]:
        yield from by_choice(self.recipe, seeds=bool(self.seeds))
        yield from super()._rules()


def _trained_on(kind: type[Vision]) -> type[NoisyStudent]:
    """The command for a data set that torchvision loads."""
    given = next(each for each in dataclasses.fields(kind) if each.name == "self_training")
    settings = given.default if given.default_factory is dataclasses.MISSING else given.default_factory()
    rounds = ("self_training", Annotated[SelfTraining, tyro.conf.arg(name="")], settings)
    return on_recipe(NoisyStudent, kind, NoisyStudent.__doc__, rounds)


COMMANDS: dict[str, type[NoisyStudent]] = {
    Digits.name: NoisyStudent,
    ImageFolders.name: NoisyStudentImages,
    **{kind.name: _trained_on(kind) for kind in NOISY_STUDENT_RECIPES},
}
"""The recipes that Noisy Student trains, by name."""
