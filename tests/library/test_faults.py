"""The suite can fail.

Each planted fault is caught by the tests named beside it, which pass without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import faults
import pytest
import test_estimators
import test_exact
import test_feed
import test_fields
import test_own_problems
import test_relations
import test_replays
import test_sampled
import test_step
import test_updates
import test_verify

from metapl import MetaplError

Check = Callable[[pytest.MonkeyPatch], None]


def run(test: Callable[..., None], *args: Any) -> Check:
    """Return a check that runs a test on these arguments."""
    return lambda patch: test(*args)


# Several faults are caught by the same check, which runs once on the library as it is.
@cache
def exact(estimator: str, student: str = "mlp", optimiser: str = "torch_sgd") -> Check:
    return run(test_exact.test_fresh_optimiser, estimator, student, optimiser)


def warmed(estimator: str, optimiser: str) -> Check:
    return run(test_exact.test_warmed_optimiser, estimator, "mlp", optimiser)


def smoothed(estimator: str) -> Check:
    return run(test_exact.test_two_views_temperature_and_smoothing, estimator, 0.15)


def replayed(way: str, student: str) -> Check:
    test = test_replays.test_the_gradient_is_right_and_the_state_moves_once
    return run(test, way, student)


def mean_is_soft(mode: str) -> Check:
    test = test_sampled.test_mean_over_labels_tends_to_the_soft_gradient
    return lambda patch: test(mode, test_sampled.sgd, patch)


def lowers_the_loss(mode: str) -> Check:
    test = test_relations.test_a_step_against_the_hypergradient_lowers_the_labelled_loss
    return run(test, mode, "mlp", "torch_sgd")


def two_views(mode: str) -> Check:
    test = test_step.test_the_student_learns_strong_and_the_teacher_is_fed_back_through_weak
    return run(test, mode)


def advances_as_one_pass(mode: str, recompute: bool) -> Check:
    test = test_step.test_statistics_and_generator_advance_as_by_one_pass_of_each_network
    return run(test, mode, recompute)


def has_this_ratio(mode: str) -> Check:
    test = test_step.test_the_norms_of_the_two_gradients_have_this_ratio
    return run(test, mode, {}, test_step.LOSSES[0])


def seen_by_the_flag(change: str) -> Check:
    return run(test_verify.test_what_begins_after_the_first_step_is_seen_by_the_flag, change)


def fields(problem: str, mode: str = "forward", parts: int = 1) -> Check:
    test = test_own_problems.test_every_field_gets_its_own_feedback
    return run(test, (mode, 1, parts), getattr(test_own_problems, problem))


CAUGHT: dict[str, list[Check]] = {
    "flipped_sign": [
        lowers_the_loss("forward"),
        exact("unrolled"),
        exact("reinforce"),
        mean_is_soft("reinforce"),
    ],
    "sum_for_reduction": [
        exact("reinforce"),
        run(test_sampled.test_algorithm_1_is_a_scalar_times_the_mean_cross_entropy),
    ],
    "mean_for_sum": [
        lowers_the_loss("forward"),
        exact("reinforce"),
        mean_is_soft("reinforce_per_example"),
    ],
    "fields_taken_for_each_other": [fields("Weighted"), fields("Weighted", "unrolled")],
    "ratio_the_wrong_way_round": [has_this_ratio("forward")],
    "sum_for_mean": [exact("forward"), exact("reinforce")],
    "teacher_labels_strong": [two_views("forward"), two_views("reinforce")],
    "smoothed_score": [
        smoothed("reinforce"),
        smoothed("reinforce_per_example"),
        run(test_step.test_cross_entropy_of_hard_labels_is_smoothed_for_the_student_alone),
    ],
    "batch_taken_in_parts": [fields("OfAll", parts=2)],
    "momentum_ignored": [
        exact("forward", optimiser="torch_sgd_nesterov"),
        warmed("reinforce", "torch_sgd_nesterov"),
        warmed("difference", "torch_sgd_dampening"),
        run(test_updates.test_the_pullback_is_the_updates_vjp, "torch_sgd_nesterov", 3),
    ],
    "clip_without_derivative": [
        run(
            test_updates.test_an_update_behind_a_clip_is_that_of_clipped_gradients,
            0.5,
            "torch_sgd_nesterov",
        ),
        run(
            test_updates.test_adjoints_over_three_steps_are_those_of_the_rule_unrolled,
            "torch_adamw",
            3,
            0.5,
        ),
        run(
            test_step.test_the_students_clip_is_part_of_its_update, "forward", "torch_sgd_nesterov"
        ),
    ],
    "new_minus_old": [run(test_relations.test_the_loss_difference_is_old_minus_new)],
    "gradient_before_the_step": [
        exact("forward"),
        exact("reinforce"),
        run(test_relations.test_for_plain_sgd_the_scalar_is_eta_times_the_product_of_gradients),
    ],
    "weight_of_the_outer_loss_forgotten": [fields("Language", parts=2)],
    "state_moved_by_replays": [
        advances_as_one_pass("forward", recompute=False),
        advances_as_one_pass("forward", recompute=True),
        advances_as_one_pass("difference", recompute=False),
    ],
    "tables_not_restored": [
        replayed("graph", "buffer exchanged"),
        replayed("graph", "buffer made late"),
    ],
    "other_dropout_mask": [replayed("tangent", "dropout"), exact("difference", "dropout")],
    "backward_at_the_old_weights": [
        replayed("tangent", "checkpoint with norm and dropout"),
        replayed("graph", "checkpoint with norm and dropout"),
    ],
    "plain_tensors_stand_in": [replayed("graph", "asks"), replayed("tangent", "asks")],
    "outputs_unchecked": [
        run(test_replays.test_a_teacher_that_draws_otherwise_when_it_is_recomputed_is_refused)
    ],
    "slopes_unchecked": [seen_by_the_flag("a hook on an activation")],
    "excluded_end_taken": [
        run(test_fields.test_what_does_not_fit_is_refused_by_its_field, "decay", 1.0)
    ],
    "requirements_not_held": [
        run(test_estimators.test_modes_run_on_the_layouts_that_offer_what_they_require)
    ],
    "same_order_every_epoch": [run(test_feed.test_orders_differ_by_epoch_seed_and_stream)],
}


@cache
def passes(check: Check) -> None:
    """Run a check on the library as it is; a check of several faults is run once."""
    with pytest.MonkeyPatch.context() as patch:
        check(patch)


def test_every_fault_has_a_test_that_catches_it() -> None:
    plants = set()
    for name, plant in vars(faults).items():
        if callable(plant) and plant.__module__ == "faults" and plant.__doc__:
            plants.add(name)
    assert CAUGHT.keys() | faults.FAULTS_AHEAD.keys() >= plants


@pytest.mark.parametrize(
    ("fault", "number"),
    [(fault, n) for fault, checks in CAUGHT.items() for n in range(len(checks))],
)
def test_a_planted_fault_is_caught(fault: str, number: int) -> None:
    """It is caught by an assertion, or by the library itself, as it would find it in a student."""
    check = CAUGHT[fault][number]
    passes(check)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        getattr(faults, fault)(patch)
        with pytest.raises((AssertionError, pytest.fail.Exception, MetaplError)):
            check(patch)
