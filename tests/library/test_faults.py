"""The suite can fail: each planted fault is caught by the tests named beside it, which pass without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import test_bad_input
import test_checkpoint
import test_data
import test_estimators
import test_evaluate
import test_exact
import test_fit
import test_fit_resumed
import test_intervals
import test_own_problems
import test_relations
import test_replays
import test_right_or_refused
import test_sampled
import test_signals_of_several
import test_step
import test_updates
import test_weight_writes
import test_writes
import torch
from faults import FAULTS
from fits import _one_thread  # noqa: F401  # fits are compared bit for bit

from metapl import MetaplError
from metapl.feedback import LossDifference, Reinforce

Check = Callable[[pytest.MonkeyPatch], None]


def exact(estimator: str, student: str = "mlp", optimiser: str = "torch_sgd") -> Check:
    return lambda patch: test_exact.test_fresh_optimiser(estimator, student, optimiser)


def warmed(estimator: str, optimiser: str) -> Check:
    return lambda patch: test_exact.test_warmed_optimiser(estimator, "mlp", optimiser)


def chained(estimator: str, optimiser: str) -> Check:
    return lambda patch: test_exact.test_three_steps_chained_by_inner_state(estimator, "mlp", optimiser)


def bit_for_bit(mode: str, student: str) -> Check:
    return lambda patch: test_relations.test_weights_buffers_gradients_and_states_stay_bit_for_bit(mode, student)


def lowers(mode: str) -> Check:
    return lambda patch: test_relations.test_a_step_against_the_hypergradient_lowers_the_labelled_loss(
        mode, "mlp", "torch_sgd"
    )


def views(mode: str) -> Check:
    return lambda patch: test_step.test_the_student_learns_strong_and_the_teacher_is_fed_back_through_weak(mode)


def smoothed(estimator: str) -> Check:
    return lambda patch: test_exact.test_two_views_temperature_and_smoothing(estimator, 0.15)


def mean_is_soft(mode: str) -> Check:
    return lambda patch: test_sampled.test_mean_over_labels_tends_to_the_soft_gradient(mode, test_sampled.sgd, patch)


def several(mode: str) -> Check:
    return lambda patch: test_signals_of_several.test_every_field_gets_its_own_feedback(
        mode, 1, torch.float64, 1e-9, "torch_sgd", test_signals_of_several.Weighted
    )


def in_folder(check: Callable[[Path], None]) -> Check:
    def run(patch: pytest.MonkeyPatch) -> None:
        with TemporaryDirectory() as folder:
            check(Path(folder))

    return run


RESUMED = in_folder(
    lambda folder: test_fit_resumed.test_a_fit_that_failed_ends_as_one_that_did_not("waits, averages", folder)
)


CAUGHT: dict[str, dict[str, Check]] = {
    "flipped_sign": {
        "forward_lowers_the_loss": lowers("forward"),
        "unrolled_is_exact": exact("unrolled"),
        "reinforce_is_exact": exact("reinforce"),
        "reinforce_tends_to_the_soft_gradient": mean_is_soft("reinforce"),
    },
    "new_minus_old": {
        "old_minus_new": lambda patch: test_relations.test_the_loss_difference_is_old_minus_new(),
        "expected_labelled_loss": lambda patch: (
            test_sampled.test_loss_difference_is_the_gradient_of_the_expected_labelled_loss("torch_sgd", False, patch)
        ),
    },
    "mean_for_sum": {
        "forward_lowers_the_loss": lowers("forward"),
        "reinforce_is_exact": exact("reinforce"),
        "per_example_tends_to_the_soft_gradient": mean_is_soft("reinforce_per_example"),
    },
    "sum_for_mean": {"forward_is_exact": exact("forward"), "reinforce_is_exact": exact("reinforce")},
    "student_learns_weak": {"forward": views("forward"), "reinforce": views("reinforce")},
    "teacher_labels_strong": {"forward": views("forward"), "reinforce": views("reinforce")},
    "momentum_ignored": {
        "forward_is_exact_with_nesterov": exact("forward", optimiser="torch_sgd_nesterov"),
        "reinforce_is_exact_with_nesterov": warmed("reinforce", "torch_sgd_nesterov"),
        "difference_is_exact_with_dampening": warmed("difference", "torch_sgd_dampening"),
        "the_pullback_is_the_vjp": lambda patch: test_updates.test_the_pullback_is_the_updates_vjp(
            "torch_sgd_nesterov", 3
        ),
    },
    "velocity_forgotten": {
        "forward_is_exact_when_warmed": warmed("forward", "torch_sgd_momentum"),
        "unrolled_is_exact_when_warmed": warmed("unrolled", "torch_sgd_momentum"),
        "the_update_is_the_optimisers_step": lambda patch: (
            test_updates.test_the_functional_update_is_the_optimisers_own_step("torch_sgd_momentum", 3)
        ),
    },
    "transforms_velocity_forgotten": {
        "three_chained_steps": chained("forward", "torchopt_sgd_nesterov"),
        "a_fresh_transform_goes_on": lambda patch: (
            test_updates.test_a_fresh_transform_with_a_saved_state_goes_on_like_the_old_one("torchopt_sgd_nesterov")
        ),
    },
    "clip_without_derivative": {
        "the_update_behind_a_clip": lambda patch: (
            test_updates.test_an_update_behind_a_clip_is_that_of_clipped_gradients(0.5, "torch_sgd_nesterov")
        ),
        "adjoints_over_three_steps": lambda patch: (
            test_updates.test_adjoints_over_three_steps_are_those_of_the_rule_unrolled("torch_adamw", 3, 0.5)
        ),
        "the_students_clip_is_part_of_its_update": lambda patch: (
            test_fit.test_the_students_clip_is_part_of_its_update_and_the_teachers_is_torchs()
        ),
    },
    "statistics_updated_twice": {
        "one_pass_of_each_network": lambda patch: (
            test_step.test_statistics_and_generator_advance_as_by_one_pass_of_each_network("forward", False)
        ),
    },
    "teachers_statistics_updated_twice": {
        "one_pass_of_each_network": lambda patch: (
            test_step.test_statistics_and_generator_advance_as_by_one_pass_of_each_network("forward", True)
        ),
        "recomputing_changes_no_bit": lambda patch: test_step.test_recomputing_the_teacher_changes_no_bit(
            "reinforce", (), False
        ),
    },
    "other_dropout_mask": {
        "forward_is_exact_with_dropout": exact("forward", "dropout"),
        "difference_is_exact_with_dropout": exact("difference", "dropout"),
        "credits_sum_to_the_scalar": lambda patch: (
            test_relations.test_credits_per_example_sum_to_the_scalar_of_algorithm_1("dropout", "torch_sgd_nesterov")
        ),
    },
    "generator_not_put_back": {
        "forward_is_exact_with_a_noisy_teacher": lambda patch: test_exact.test_a_teacher_with_dropout_and_batch_norm(
            "forward", "dropout"
        ),
        "one_pass_of_each_network": lambda patch: (
            test_step.test_statistics_and_generator_advance_as_by_one_pass_of_each_network("difference", False)
        ),
    },
    "stale_weights_after_a_difference": {
        "weights_stay_bit_for_bit": bit_for_bit("difference", "mlp"),
        "difference_leaves_all_in_place": exact("difference"),
    },
    "gradient_before_the_step": {
        "forward_is_exact": exact("forward"),
        "reinforce_is_exact": exact("reinforce"),
        "algorithm_1_line_4": lambda patch: (
            test_relations.test_for_plain_sgd_the_scalar_is_eta_times_the_product_of_gradients()
        ),
    },
    "masks_of_the_teacher": {
        "masks_are_independent": lambda patch: test_replays.test_masks_of_different_passes_are_independent("forward"),
    },
    "replays_from_moved_buffers": {
        "a_counter": lambda patch: test_replays.test_buffers_of_the_student("forward", "counter"),
    },
    "backward_at_the_old_weights": {
        "checkpoints": lambda patch: test_replays.test_checkpoints_in_the_student("forward", False, {}),
    },
    "outputs_unchecked": {
        "random": lambda patch: test_replays.test_random_numbers_of_a_students_own_are_refused("forward", "random"),
    },
    "slopes_unchecked": {
        "no_grad": lambda patch: test_replays.test_a_backward_pass_of_its_own("difference", "no_grad"),
        "detach": lambda patch: test_replays.test_a_backward_pass_of_its_own("difference", "detach"),
    },
    "smoothed_score": {
        "reinforce": smoothed("reinforce"),
        "per_example": smoothed("reinforce_per_example"),
        "the_teachers_step": lambda patch: (
            test_step.test_cross_entropy_of_hard_labels_is_smoothed_for_the_student_alone()
        ),
    },
    "baseline_with_this_step": {
        "reinforce": lambda patch: test_relations.test_the_baseline_is_its_value_from_before_the_step(Reinforce),
        "loss_difference": lambda patch: test_relations.test_the_baseline_is_its_value_from_before_the_step(
            LossDifference
        ),
    },
    "checkpoint_believed": {
        "every_flipped_byte": in_folder(test_checkpoint.test_every_flipped_byte_and_every_cut_is_noticed),
    },
    "random_numbers_not_restored": {"a_fit_that_failed": RESUMED},
    "students_optimizer_not_restored": {
        "a_fit_that_failed": RESUMED,
        "a_saved_trainer": in_folder(test_fit_resumed.test_a_trainer_that_is_saved_goes_on_in_another),
    },
    "average_not_restored": {"a_fit_that_failed": RESUMED},
    "position_not_restored": {"a_fit_that_failed": RESUMED},
    "step_left_out": {"a_fit_that_failed": RESUMED},
    "schedule_begins_again": {"a_fit_that_failed": RESUMED},
    "rows_not_cut": {"a_fit_that_failed": RESUMED},
    "worst_kept": {"the_latest_best": test_fit.test_the_latest_best_by_validation_is_kept},
    "first_of_equals_kept": {"the_latest_best": test_fit.test_the_latest_best_by_validation_is_kept},
    "validated_as_in_training": {
        "nothing_else_changes": lambda patch: test_fit.test_validating_changes_nothing_else(),
        "nothing_is_touched": lambda patch: test_evaluate.test_predicting_restores_every_flag_and_touches_nothing(),
    },
    "excluded_end_taken": {
        "a_decay_of_one": lambda patch: test_bad_input.test_a_wrong_value_is_refused_where_it_is_made(
            lambda: Reinforce(baseline=1.0), r"baseline=1\.0.*\[0, 1\)"
        ),
    },
    "arguments_unchecked": {
        "clip_norm": lambda patch: test_bad_input.test_an_option_out_of_its_range_is_refused_by_name("clip_norm"),
    },
    "requirements_not_held": {
        "every_layout": lambda patch: test_estimators.test_modes_run_on_the_layouts_that_offer_what_they_require(),
    },
    "weights_not_compared": {
        "of_the_student": lambda patch: test_weight_writes.test_writes_that_begin_after_the_first_step(
            "trainer", "student", "reinforce", "clamp"
        ),
        "of_the_teacher": lambda patch: test_weight_writes.test_writes_that_begin_after_the_first_step(
            "trainer", "teacher", "reinforce", "data"
        ),
    },
    "subclass_taken_for_the_librarys": {
        "a_derivative_left_out": lambda patch: (
            test_own_problems.test_a_derivative_that_the_feedback_leaves_out_is_refused("reinforce")
        ),
    },
    "same_order_every_epoch": {
        "orders_differ": lambda patch: test_data.test_orders_differ_by_epoch_seed_and_stream(),
    },
    "pairs_by_rank": {"against_scipy": lambda patch: test_evaluate.test_against_scipy(17)},
    "interval_of_one_side": {"wilsons": lambda patch: test_intervals.test_it_is_wilsons(7, 20)},
    "frozen_alias_goes_unwatched": {
        "beside_a_frozen_parameter": lambda patch: (
            test_writes.test_a_write_to_a_weight_beside_a_frozen_parameter_is_refused("forward")
        ),
    },
    "compared_without_a_gradient": {
        "a_forward_that_asks": lambda patch: (
            test_right_or_refused.test_losses_that_are_compared_are_of_weights_that_require_a_gradient()
        ),
    },
    "further_fields_left_out": {
        "every_field": several("forward"),
        "by_double_backward": several("unrolled"),
        "in_micro_batches": lambda patch: test_signals_of_several.test_a_step_in_micro_batches(
            test_signals_of_several.Augmented, "forward", False, 1, 1e-9
        ),
    },
    "fields_taken_for_each_other": {"every_field": several("forward"), "by_double_backward": several("unrolled")},
}

REFUSED = {
    "other_dropout_mask": [MetaplError],
    "replays_from_moved_buffers": [MetaplError],
    "velocity_forgotten": [MetaplError],
}
"""Faults that the library finds itself, as it would find them in a student."""

PAIRS = [(fault, check) for fault, checks in CAUGHT.items() for check in checks]


def test_every_fault_has_a_test_that_catches_it() -> None:
    assert set(CAUGHT) == set(FAULTS)


@cache
def passes(check: Check) -> None:
    """On the library as it is; a check of several faults is run once."""
    with pytest.MonkeyPatch.context() as patch:
        check(patch)


@pytest.mark.parametrize(("fault", "check"), PAIRS)
def test_a_planted_fault_is_caught(fault: str, check: str) -> None:
    run = CAUGHT[fault][check]
    passes(run)
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        with pytest.raises((AssertionError, pytest.fail.Exception, *REFUSED.get(fault, ()))):
            run(patch)
