"""Reduced Meta Pseudo Labels: a teacher's labels are stored, and a small network adjusts them for the student."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import tyro

from metapl.apps.pictures import LabeledBatches, UnlabeledBatches
from metapl.apps.recipes.base import Phase, Phases, Recipe, Run
from metapl.apps.recipes.methods.alone import alone
from metapl.apps.recipes.methods.beside import Fed, Pair, Unfed, bilevel
from metapl.errors import MetaplError
from metapl.models import label_adjuster
from metapl.problems import ReducedLabels, StoredCrossEntropy


@dataclass(frozen=True, kw_only=True)
class Reduced(Pair):
    """A student on stored labels, adjusted by a small network, which has the teacher's optimizer and losses.

    Args:
        teacher_run: the run whose network labels the pictures, instead of a teacher that is trained first.
        label_store: a store of the labels of --unlabeled, written by metapl label. Without --labeled-labels, the
            network that adjusts them learns from the student's feedback alone.
        labeled_label_store: with --labels: a store of the labels of --labeled, likewise.
    """

    reduced = True

    teacher_run: Annotated[str | None, tyro.conf.arg(name="teacher", metavar="RUN")] = None
    label_store: Annotated[str | None, tyro.conf.arg(name="labels", metavar="STORE")] = None
    labeled_label_store: Annotated[str | None, tyro.conf.arg(name="labeled-labels", metavar="STORE")] = None

    @property
    def labels_from(self) -> Mapping[str, str | None]:
        return {
            "teacher": self.teacher_run,
            "labels": self.label_store,
            "labeled_labels": self.labeled_label_store,
        }

    def whole(self) -> Self:
        names = ("teacher_run", "label_store", "labeled_label_store")
        places = {name: Path(place).expanduser().resolve() for name in names if (place := getattr(self, name))}
        changed: dict[str, Any] = {name: str(place) for name, place in places.items()}
        return dataclasses.replace(self, **changed)

    def check(self, recipe: Recipe) -> None:
        given = [name for name, place in self.labels_from.items() if place is not None]
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        if given and not hasattr(recipe, "labeled"):
            raise MetaplError(f"{flags}: labels are given of folders of pictures, which {recipe.name} has not.")
        if given not in ([], ["teacher"], ["labels"], ["labels", "labeled_labels"]):
            raise MetaplError(f"{flags}: expected --teacher, or --labels and perhaps --labeled-labels beside it.")

    def phases(self, run: Run) -> Phases:
        stored = run.labels_given()
        if stored is None:
            yield alone(run.recipe, run.task, run.teacher, self.teacher, self.teacher_losses(), name="teacher")
            stored = run.label(run.teacher)
        recipe, task, student = run.recipe, run.task, run.student
        labeled, unlabeled = task.labeled, task.unlabeled
        assert isinstance(labeled, LabeledBatches)
        assert isinstance(unlabeled, UnlabeledBatches)
        torch.manual_seed(recipe.seed)  # wherever the labels came from, and whatever was drawn for them
        adjuster = label_adjuster(len(task.classes)).to(next(student.parameters()).device)
        labels = self.feedback.problem()
        own = () if stored.labeled is None else (StoredCrossEntropy(self.label_smoothing),)
        problem = ReducedLabels(self.kind(), labels.temperature, labels.label_smoothing)
        options = {"teacher_losses": own, **self.feedback_options(losses=bool(own))}
        trainer = bilevel(recipe, adjuster, student, self, self.estimator(recipe), problem, **options)
        seen = unlabeled.weak if unlabeled.strong is None else unlabeled.strong
        pairs = dataclasses.replace(unlabeled, weak=seen, strong=None, stored=stored.unlabeled)
        known = labeled if stored.labeled is None else dataclasses.replace(labeled, stored=stored.labeled)
        # The small network has no opinion on examples, of which some could be right.
        yield Phase(trainer, known, pairs, dataclasses.replace(task, truth=None), options=self.options(recipe))


@dataclass(frozen=True, kw_only=True)
class ReducedMetaPseudoLabels(Fed, Reduced):
    """A student on stored labels, adjusted by a small network that learns from the student."""

    name = "reduced_mpl"
    title = "Reduced MPL (stored labels, adjusted)"
    control = "reduced_none"


@dataclass(frozen=True, kw_only=True)
class ReducedWithoutFeedback(Unfed, Reduced):
    """A student on stored labels, adjusted by a small network that does not learn from the student."""

    name = "reduced_none"
    title = "stored labels, adjusted without feedback"
