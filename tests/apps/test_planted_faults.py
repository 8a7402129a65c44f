"""The suite of the application can fail: each planted fault is caught by the tests named beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_delivery
import test_export
import test_folders
import test_label_queries
import test_methods
import test_noisy_student
import test_noisy_student_parts
import test_picture_batches
import test_recipes
import test_robustness
import test_sealed_runs
import test_transforms
import test_views
from app_faults import FAULTS
from command import metapl
from tiny_runs import NOISY_STUDENT

from metapl.apps.pictures.splits import load_digits_split


@dataclass(frozen=True)
class Here:
    """What a check may need."""

    folder: Path
    patch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    run: Callable[[], Path]
    """Copies a run into the folder, to spoil."""


Check = Callable[[Here], None]


def labels_of_the_round_before(here: Here) -> None:
    run = here.folder / "run"
    metapl(*NOISY_STUDENT, "--steps", "2", "--out", run)
    test_noisy_student.test_a_round_learns_from_the_labels_of_the_network_before_it(run)


CAUGHT: dict[str, dict[str, Check]] = {
    "seal_not_compared": {
        "weights_of_another_run": lambda here: (
            test_sealed_runs.test_the_weights_of_another_run_are_not_taken_for_its_own(
                here.run(), here.folder, here.capsys
            )
        ),
    },
    "threshold_kept_itself": {
        "the_threshold": lambda here: test_label_queries.test_the_threshold_is_not_kept_itself(here.folder),
    },
    "balanced_over_all": {
        "numpy": lambda here: test_label_queries.test_what_is_selected_is_what_numpy_selects(
            True, None, 0.4, 30, True, here.folder
        ),
    },
    "part_read_twice": {
        "statistics": lambda here: test_label_queries.test_statistics_are_those_of_numpy(True, here.folder),
        "selection": lambda here: test_label_queries.test_of_any_class_the_most_probable_are_kept(
            None, None, [], here.folder
        ),
    },
    "severity_off_by_one": {
        "the_formulas": lambda here: test_robustness.test_noise_has_the_moments_of_its_formula(),
    },
    "one_seed_for_a_batch": {
        "affine": lambda here: test_views.test_seed_step_and_example_each_change_the_draws("affine"),
        "half_are_mirrored": lambda here: test_transforms.test_half_of_the_pictures_are_mirrored(),
    },
    "labeled_picture_in_validation": {
        "digits": lambda here: test_picture_batches.test_digits_are_disjoint_cover_all_and_keep_their_labels(
            load_digits_split(labels_per_class=2, seed=0)
        ),
    },
    "without_feedback": {
        "beside_its_control": lambda here: (
            test_methods.test_without_feedback_the_loop_sees_the_same_batches_and_first_weights(
                "soft", here.folder, here.patch
            )
        ),
    },
    "finetuning_left_out": {
        "what_helps_is_kept": lambda here: test_recipes.test_finetuning_that_does_not_help_is_not_kept(),
    },
    "delivered_by_the_test_set": {
        "test_pictures_choose_nothing": lambda here: test_delivery.test_the_test_set_chooses_nothing(
            here.folder, here.patch
        ),
    },
    "noisy_students_teacher_labels_strong": {"labels_of_the_round_before": labels_of_the_round_before},
    "student_begins_as_its_teacher": {
        "first_weights": lambda here: (
            test_noisy_student_parts.test_a_student_begins_with_weights_of_its_own_or_with_its_teachers(False)
        ),
    },
    "exported_without_normalization": {
        "the_file": lambda here: test_export.test_the_file_says_what_it_is(here.folder),
    },
    "numbered_parts_taken_for_classes": {
        "parts": lambda here: test_folders.test_the_parts_of_a_data_set_are_not_its_classes(here.folder),
    },
}

PAIRS = [(fault, check) for fault, checks in CAUGHT.items() for check in checks]


def test_every_fault_has_a_test_that_catches_it() -> None:
    assert set(CAUGHT) == set(FAULTS)


@pytest.mark.parametrize(("fault", "check"), PAIRS)
def test_a_planted_fault_is_caught(
    fault: str,
    check: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    def run(name: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            if name == "bent":
                FAULTS[fault](patch)
            copied = lambda: Path(shutil.copytree(request.getfixturevalue("tiny"), folder / "run"))  # noqa: E731
            CAUGHT[fault][check](Here(folder, patch, capsys, copied))

    run("as it is")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run("bent")
