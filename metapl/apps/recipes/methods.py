"""The methods that a recipe can be trained by, each one value of :data:`METHODS`.

To add one, write an entry; :mod:`metapl.apps.experiments.methods` trains by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from metapl.apps.recipes.base import Recipe, Role, Task
from metapl.apps.recipes.self_training import SelfTraining
from metapl.models.corrector import Corrector
from metapl.problems import (
    ExampleWeights,
    LabelCorrection,
    MetaWeightNet,
    NoiseTransition,
    Problem,
    Table,
    WeightNet,
)
from metapl.problems.losses import UDA, CrossEntropy, TeacherLoss

Losses = tuple[TeacherLoss, ...]


Doubting = Literal[
    "example_weights",
    "meta_weight_net",
    "label_correction",
    "noise_transition",
    "given and clean labels",
    "clean labels",
]


@dataclass(frozen=True)
class Method:
    """One way to train a recipe, of six kinds.

    A teacher learns beside its student (``feedback``), a student learns from a teacher that was trained before it
    (``fixed_labels``), or from the stored labels of such a teacher as a small network adjusts them (``reduced``), one
    network is trained by itself (``losses``), it learns from labels that may be wrong (``doubting``), or students learn
    from stored labels one after another, and each labels the examples for the next one (``self_training``).

    Args:
        name: in commands and files.
        title: in words.
        feedback: what the teacher learns from beside its own losses: the recipe's feedback, none, or an altered one;
            see :class:`metapl.feedback.Altered`.
        fixed_labels: the kind of the fixed teacher's pseudo-labels.
        reduced: whether a small network adjusts the stored labels of a teacher that was trained before.
        losses: of the one network, from the recipe.
        doubting: how it learns from labels that may be wrong: what is learned about them, or, without anything, which
            labels are learned from.
        self_training: fields in which Noisy Student differs from the recipe's own; None: it is not Noisy Student.
        filtered: whether the unlabeled examples are first selected by the stored labels of a supervised network.
        place: in a comparison: "compared" by default, a "control" of the feedback, or the "headroom", which trains on
            the true labels of all examples. None: only if it is named.
        control: the method that it is tested against.
    """

    name: str
    title: str
    feedback: Literal["recipe", "none", "permuted", "class_means", "random_sign"] | None = None
    fixed_labels: Literal["soft", "hard"] | None = None
    reduced: bool = False
    losses: Callable[[Recipe], Losses] | None = None
    doubting: Doubting | None = None
    self_training: Mapping[str, Any] | None = None
    filtered: bool = False
    place: Literal["compared", "control", "headroom"] | None = None
    control: str | None = None

    @property
    def delivers(self) -> Literal["student", "finetuned"]:
        """The network that is delivered where validation cannot tell them apart."""
        alone = self.place in ("control", "headroom") or self.is_noisy_student
        return "student" if alone else "finetuned"

    @property
    def teaches(self) -> bool:
        """Whether a teacher learns beside the student, which waits for it; it is then one of the run's networks."""
        return self.feedback is not None and self.doubting is None and not self.reduced

    @property
    def one_network(self) -> bool:
        """Whether there is neither teacher nor student, but a network that is trained by itself."""
        return self.losses is not None or self.doubting in ("given and clean labels", "clean labels")

    @property
    def networks(self) -> dict[str, str]:
        """The networks of a run in words, by their names in files."""
        if self.one_network:
            return {"student": "network", "finetuned": "finetuned network", "teacher": "teacher"}
        return {"student": "student", "finetuned": "finetuned student", "teacher": "teacher"}

    @property
    def built_as(self) -> Role:
        """Which of the recipe's two networks the trained one is built as, and whose optimizer trains it."""
        return "teacher" if self.losses is not None or self.is_noisy_student else "student"

    @property
    def is_noisy_student(self) -> bool:
        """Whether students learn from stored labels one after another."""
        return self.self_training is not None

    @property
    def selects(self) -> bool:
        """Whether a network's stored labels decide which unlabeled examples are learned from."""
        return self.filtered or self.is_noisy_student

    def settings(self, recipe: Recipe) -> SelfTraining:
        """How Noisy Student is run by this method; with fewer rounds, by the networks of the first ones."""
        changed = dict(self.self_training or {})
        given = recipe.self_training
        changed["networks"] = given.networks[: changed.get("rounds", given.rounds) + 1]
        return dataclasses.replace(given, **changed)


FIXMATCH_THRESHOLD = 0.85
"""Published is 0.95 (arXiv:2001.07685), and with few steps 0.85 reached more (docs/pictures.md)."""

USUAL_SMOOTHING = 0.1
"""Of the baseline by label smoothing, where the recipe smooths nothing."""


def _supervised(recipe: Recipe) -> Losses:
    return (CrossEntropy(),)


def _own(recipe: Recipe) -> Losses:
    """The teacher's supervised losses."""
    return recipe.teacher_losses(uda=False)


def _with_uda(recipe: Recipe) -> Losses:
    return recipe.teacher_losses(uda=True)


def _smoothed(recipe: Recipe) -> Losses:
    own = next(term for term in _own(recipe) if isinstance(term, CrossEntropy))
    return (dataclasses.replace(own, label_smoothing=own.label_smoothing or USUAL_SMOOTHING),)


def _fixmatch(recipe: Recipe) -> Losses:
    """UDA with the most probable class as the label where the network is sure of it."""
    published = {"temperature": 0.0, "threshold": FIXMATCH_THRESHOLD, "align": 0.0, "prior": None}
    return tuple(
        dataclasses.replace(term, **published) if isinstance(term, UDA) else term  # type: ignore[arg-type]  # by name
        for term in _with_uda(recipe)
    )


_FIXED = "pseudo labels of a fixed teacher"

_ALL = (
    Method("mpl", "Meta Pseudo Labels", feedback="recipe", place="compared", control="none"),
    Method("none", "same loop, no feedback", feedback="none", place="compared"),
    Method("supervised", "supervised, labeled data only", losses=_supervised, place="compared"),
    Method("label_smoothing", "supervised with label smoothing", losses=_smoothed),
    Method("supervised_everything", "supervised with all true labels (headroom)", losses=_own, place="headroom"),
    Method("pseudo_labels", f"{_FIXED}, soft", fixed_labels="soft", place="compared"),
    Method("pseudo_labels_hard", f"{_FIXED}, hard", fixed_labels="hard"),
    Method("reduced_mpl", "Reduced MPL (stored labels, adjusted)", "recipe", reduced=True, control="reduced_none"),
    Method("reduced_none", "stored labels, adjusted without feedback", "none", reduced=True),
    Method("uda", "UDA alone", losses=_with_uda, place="compared"),
    Method("fixmatch", "FixMatch alone", losses=_fixmatch),
    Method("permuted", "MPL, feedback permuted over the batch", feedback="permuted", place="control"),
    Method("class_means", "MPL, class means of the feedback only", feedback="class_means", place="control"),
    Method("random_sign", "MPL, feedback with random signs", feedback="random_sign", place="control"),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""The methods by name: Meta Pseudo Labels, the same loop without feedback, the baselines, and altered feedback."""

COMPARED = tuple(method.name for method in _ALL if method.place == "compared")
CONTROLS = tuple(method.name for method in _ALL if method.place == "control")

TRUSTED = 4.0
"""Logit of "no noise" in a matrix of label noise, and of the given label in a corrector, at first."""


@dataclass(frozen=True)
class Learned:
    """What is learned about labels that may be wrong.

    Args:
        words: that name it.
        rate: its learning rate, where the recipe leaves that open.
        problem: the losses.
        teacher: what is learned, as it is at first, of a recipe and its data.
    """

    words: str
    rate: float
    problem: Callable[[], Problem]
    teacher: Callable[[Recipe, Task], nn.Module]


def _weight_each(recipe: Recipe, task: Task) -> nn.Module:
    assert task.doubtful is not None
    return Table(torch.zeros(len(task.doubtful.given)))


def _corrector(recipe: Recipe, task: Task) -> nn.Module:
    return Corrector(recipe.network("teacher"), len(task.classes), TRUSTED)


def _matrix(recipe: Recipe, task: Task) -> nn.Module:
    return Table(TRUSTED * torch.eye(len(task.classes)))


LEARNED: dict[Doubting, Learned] = {
    "example_weights": Learned("learned weights of examples", 0.1, ExampleWeights, _weight_each),
    "meta_weight_net": Learned("weights learned from losses", 1e-3, MetaWeightNet, lambda recipe, task: WeightNet()),
    "label_correction": Learned("learned corrections of labels", 1e-3, LabelCorrection, _corrector),
    "noise_transition": Learned("a learned matrix of label noise", 0.05, NoiseTransition, _matrix),
}
"""What is learned about labels that may be wrong, by the name of the method."""

_ALTERED: dict[Literal["permuted", "random_sign"], str] = {"permuted": "permuted", "random_sign": "with random signs"}

_DOUBTING = (
    *(
        Method(name, learned.words, feedback="recipe", doubting=name, place="compared", control="plain")
        for name, learned in LEARNED.items()
    ),
    Method("plain", "plain, given and clean labels", doubting="given and clean labels", place="compared"),
    Method("clean", "plain, clean labels alone", doubting="clean labels", place="compared"),
    *(
        Method(f"{name}_{how}", f"{learned.words}, feedback {altered}", feedback=how, doubting=name, place="control")
        for name, learned in LEARNED.items()
        for how, altered in _ALTERED.items()
    ),
)

NOISY_METHODS: dict[str, Method] = {method.name: method for method in _DOUBTING}
"""Methods for labels that may be wrong, by name."""

_RIVAL, _FILTERED = "mpl_filtered", ", unlabeled examples selected"

_SELF_TRAINING = (
    Method("noisy_student", "Noisy Student", self_training={}, control=_RIVAL),
    Method("noisy_student_clean", "Noisy Student, no noise on unlabeled", self_training={"unlabeled_noise": "none"}),
    Method("noisy_student_uneven", "Noisy Student, not balanced", self_training={"balance": False, "per_class": None}),
    Method("noisy_student_once", "Noisy Student, one round", self_training={"rounds": 1}),
    Method(_RIVAL, f"Meta Pseudo Labels{_FILTERED}", feedback="recipe", filtered=True, control="none_filtered"),
    Method("none_filtered", f"same loop, no feedback{_FILTERED}", feedback="none", filtered=True),
)

SELF_TRAINING_METHODS: dict[str, Method] = {method.name: method for method in _SELF_TRAINING}
"""Noisy Student, its controls, and Meta Pseudo Labels on examples that are selected in its way, by name."""

EVERY_METHOD: dict[str, Method] = METHODS | NOISY_METHODS | SELF_TRAINING_METHODS


def titled(method: str, network: str) -> str:
    """A network of a run by a method in words.

    >>> titled("mpl", "finetuned"), titled("uda", "finetuned"), titled("uda", "student")
    ('finetuned student', 'finetuned network', 'network')
    """
    return EVERY_METHOD[method].networks[network]


def title(method: str) -> str:
    """A method in words."""
    return EVERY_METHOD[method].title if method in EVERY_METHOD else method
