"""Planted faults of the application: each bends it as a plausible mistake would, until the monkeypatch is undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metapl.apps.evaluation.corruptions import CORRUPTIONS
from metapl.apps.experiments import experiment, folder
from metapl.apps.experiments.experiment import Experiment
from metapl.apps.experiments.rounds import Rounds
from metapl.apps.export import network as exports
from metapl.apps.labels import LabelStore
from metapl.apps.pictures import check
from metapl.apps.pictures.splits import DigitsSplit
from metapl.apps.pictures.views.base import PictureView
from metapl.apps.recipes.methods import noisy_student
from metapl.apps.recipes.methods.beside import MetaPseudoLabels

Plant = Callable[[pytest.MonkeyPatch], None]


def seal_not_compared(patch: pytest.MonkeyPatch) -> None:
    """Weights and pictures are read whatever their SHA-256 is."""
    real = folder.read_sealed
    patch.setattr(folder, "read_sealed", lambda path, sha256=None, *, mend: real(path, mend=mend))


def threshold_kept_itself(patch: pytest.MonkeyPatch) -> None:
    """Selected is what reaches the threshold, and not only what is above it."""
    patch.setattr(np, "greater", np.greater_equal)


def balanced_over_all(patch: pytest.MonkeyPatch) -> None:
    """Every example gets as many copies, whatever its class."""
    real = np.divmod
    patch.setattr(np, "divmod", lambda goal, counts: real(goal, np.full_like(counts, counts.sum() // len(counts))))


def part_read_twice(patch: pytest.MonkeyPatch) -> None:
    """The first part of a store is read in the place of the second."""
    real = LabelStore.table
    patch.setattr(LabelStore, "table", lambda self, number, names=None: real(self, number * (number != 1), names))


def severity_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """The constants of the next severity; the last has its own."""
    for name, (damage, constants) in CORRUPTIONS.items():
        patch.setitem(CORRUPTIONS, name, (damage, (*constants[1:], constants[-1])))


def one_seed_for_a_batch(patch: pytest.MonkeyPatch) -> None:
    """All pictures of a batch are changed alike."""
    real = PictureView.__call__

    def call(self: PictureView, images: Tensor, *, examples: Tensor, **drawn: int) -> Tensor:
        return real(self, images, examples=torch.zeros_like(examples), **drawn)

    patch.setattr(PictureView, "__call__", call)


def labeled_picture_in_validation(patch: pytest.MonkeyPatch) -> None:
    """The first labeled picture is one of those that the student is selected on."""
    of_digits = DigitsSplit.__init__

    def digits(self: DigitsSplit, labeled: Any, unlabeled: Tensor, truth: Tensor, validation: Any, test: Any) -> None:
        shared = tuple(torch.cat([own[:1], others[1:]]) for own, others in zip(labeled, validation, strict=True))
        of_digits(self, labeled, unlabeled, truth, shared, test)

    patch.setattr(DigitsSplit, "__init__", digits)


def without_feedback(patch: pytest.MonkeyPatch) -> None:
    """Meta Pseudo Labels is trained as its control is."""
    patch.setattr(MetaPseudoLabels, "estimator", lambda self, recipe: "none")


def finetuning_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Experiment, "finetune", lambda self, task, student, before: before)


def delivered_by_the_test_set(patch: pytest.MonkeyPatch) -> None:
    """Of a run's networks that one is delivered which is the best on the test set."""
    real = experiment.delivered

    def delivered(method: str, networks: Any, select: bool) -> str:
        tested = {name: one.accuracies().get("test_accuracy") for name, one in networks.items()}
        measured = {name: replace(networks[name], validation_accuracy=found) for name, found in tested.items()}
        return real(method, measured, select)

    patch.setattr(experiment, "delivered", delivered)


def noisy_students_teacher_labels_strong(patch: pytest.MonkeyPatch) -> None:
    """The teacher of a round labels the pictures as its student meets them."""
    real = Rounds._labeled

    def labeled(self: Rounds, number: int, teacher: nn.Module) -> Any:
        return real(replace(self, settings=replace(self.settings, noisy_teacher=True)), number, teacher)

    patch.setattr(Rounds, "_labeled", labeled)


def student_begins_as_its_teacher(patch: pytest.MonkeyPatch) -> None:
    """The student of a round begins with the weights of the round before."""
    real, first, last = noisy_student._network, noisy_student._first_teacher, dict[Any, nn.Module]()

    def network(recipe: Any) -> nn.Module:
        made = real(recipe)
        sizes = tuple(p.shape for p in made.parameters())
        made.load_state_dict(last.get(sizes, made).state_dict())
        last[sizes] = made
        return made

    def of_a_run(run: Any, recipe: Any) -> Any:
        last.clear()
        return first(run, recipe)

    patch.setattr(noisy_student, "_network", network)
    patch.setattr(noisy_student, "_first_teacher", of_a_run)


def exported_without_normalization(patch: pytest.MonkeyPatch) -> None:
    """A file of weights says nothing of the mean and the deviation that its pictures are normalized by."""
    real = exports._unwrapped
    patch.setattr(exports, "_unwrapped", lambda model: (real(model)[0], None))


def numbered_parts_taken_for_classes(patch: pytest.MonkeyPatch) -> None:
    """A folder called train2017 holds a class of that name."""

    def part(folder: str) -> str | None:
        found = check._PARTS.fullmatch(folder)
        return found and found.lastgroup

    patch.setattr(check, "_part", part)


FAULTS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        seal_not_compared,
        threshold_kept_itself,
        balanced_over_all,
        part_read_twice,
        severity_off_by_one,
        one_seed_for_a_batch,
        labeled_picture_in_validation,
        without_feedback,
        finetuning_left_out,
        delivered_by_the_test_set,
        noisy_students_teacher_labels_strong,
        student_begins_as_its_teacher,
        exported_without_normalization,
        numbered_parts_taken_for_classes,
    )
}
