"""The suite can fail.

Each planted fault is caught by the tests named beside it, which pass without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
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


def of(test: Callable[..., None], *given: Any) -> Check:
    return lambda patch: test(*given)


def exact(estimator: str, student: str = "mlp", optimiser: str = "torch_sgd") -> Check:
    return of(test_exact.test_fresh_optimiser, estimator, student, optimiser)


def warmed(estimator: str, optimiser: str) -> Check:
    return of(test_exact.test_warmed_optimiser, estimator, "mlp", optimiser)


def replayed(way: str, student: str) -> Check:
    return of(test_replays.test_the_gradient_is_right_and_the_state_moves_once, way, student)


def mean_is_soft(mode: str) -> Check:
    return lambda patch: test_sampled.test_mean_over_labels_tends_to_the_soft_gradient(
        mode, test_sampled.sgd, patch
    )


views = partial(
    of, test_step.test_the_student_learns_strong_and_the_teacher_is_fed_back_through_weak
)
lowers = lambda mode: of(  # noqa: E731
    test_relations.test_a_step_against_the_hypergradient_lowers_the_labelled_loss,
    mode,
    "mlp",
    "torch_sgd",
)
smoothed = lambda estimator: of(  # noqa: E731
    test_exact.test_two_views_temperature_and_smoothing, estimator, 0.15
)
one_pass = partial(
    of, test_step.test_statistics_and_generator_advance_as_by_one_pass_of_each_network
)
later = partial(of, test_verify.test_what_begins_after_the_first_step_is_seen_by_the_flag)
ratio = of(
    test_step.test_the_norms_of_the_two_gradients_have_this_ratio,
    "forward",
    {},
    test_step.LOSSES[0],
)
own = lambda problem, mode="forward", parts=1: of(  # noqa: E731
    test_own_problems.test_every_field_gets_its_own_feedback,
    (mode, 1, parts),
    getattr(test_own_problems, problem),
)

CAUGHT: dict[str, list[Check]] = {
    "flipped_sign": [
        lowers("forward"),
        exact("unrolled"),
        exact("reinforce"),
        mean_is_soft("reinforce"),
    ],
    "sum_for_reduction": [
        exact("reinforce"),
        of(test_sampled.test_algorithm_1_is_a_scalar_times_the_mean_cross_entropy),
    ],
    "mean_for_sum": [lowers("forward"), exact("reinforce"), mean_is_soft("reinforce_per_example")],
    "fields_taken_for_each_other": [own("Weighted"), own("Weighted", "unrolled")],
    "ratio_the_wrong_way_round": [ratio],
    "sum_for_mean": [exact("forward"), exact("reinforce")],
    "teacher_labels_strong": [views("forward"), views("reinforce")],
    "smoothed_score": [
        smoothed("reinforce"),
        smoothed("reinforce_per_example"),
        of(test_step.test_cross_entropy_of_hard_labels_is_smoothed_for_the_student_alone),
    ],
    "batch_taken_in_parts": [own("OfAll", parts=2)],
    "momentum_ignored": [
        exact("forward", optimiser="torch_sgd_nesterov"),
        warmed("reinforce", "torch_sgd_nesterov"),
        warmed("difference", "torch_sgd_dampening"),
        of(test_updates.test_the_pullback_is_the_updates_vjp, "torch_sgd_nesterov", 3),
    ],
    "clip_without_derivative": [
        of(
            test_updates.test_an_update_behind_a_clip_is_that_of_clipped_gradients,
            0.5,
            "torch_sgd_nesterov",
        ),
        of(
            test_updates.test_adjoints_over_three_steps_are_those_of_the_rule_unrolled,
            "torch_adamw",
            3,
            0.5,
        ),
        of(test_step.test_the_students_clip_is_part_of_its_update, "forward", "torch_sgd_nesterov"),
    ],
    "new_minus_old": [of(test_relations.test_the_loss_difference_is_old_minus_new)],
    "gradient_before_the_step": [
        exact("forward"),
        exact("reinforce"),
        of(test_relations.test_for_plain_sgd_the_scalar_is_eta_times_the_product_of_gradients),
    ],
    "weight_of_the_outer_loss_forgotten": [own("Language", parts=2)],
    "state_moved_by_replays": [
        one_pass("forward", False),
        one_pass("forward", True),
        one_pass("difference", False),
    ],
    "tables_not_restored": [
        replayed("graph", "buffer exchanged"),
        replayed("graph", "buffer made late"),
    ],
    "other_dropout_mask": [replayed("tangent", "dropout"), exact("difference", "dropout")],
    "backward_at_the_old_weights": [
        replayed(way, "checkpoint with norm and dropout") for way in ("tangent", "graph")
    ],
    "plain_tensors_stand_in": [replayed("graph", "asks"), replayed("tangent", "asks")],
    "outputs_unchecked": [
        of(test_replays.test_a_teacher_that_draws_otherwise_when_it_is_recomputed_is_refused)
    ],
    "slopes_unchecked": [
        of(
            test_verify.test_what_begins_after_the_first_step_is_seen_by_the_flag,
            "a hook on an activation",
        )
    ],
    "excluded_end_taken": [
        of(test_fields.test_what_does_not_fit_is_refused_by_its_field, "decay", 1.0)
    ],
    "requirements_not_held": [
        of(test_estimators.test_modes_run_on_the_layouts_that_offer_what_they_require)
    ],
    "same_order_every_epoch": [of(test_feed.test_orders_differ_by_epoch_seed_and_stream)],
}


@cache
def passes(check: Check) -> None:
    """On the library as it is; a check of several faults is run once."""
    with pytest.MonkeyPatch.context() as patch:
        check(patch)


def test_every_fault_has_a_test_that_catches_it() -> None:
    plants = {
        name
        for name, t in vars(faults).items()
        if callable(t) and t.__module__ == "faults" and t.__doc__
    }
    assert CAUGHT.keys() | faults.FAULTS_AHEAD.keys() >= plants


@pytest.mark.parametrize(
    ("fault", "number"),
    [(fault, n) for fault, checks in CAUGHT.items() for n in range(len(checks))],
)
def test_a_planted_fault_is_caught(fault: str, number: int) -> None:
    """By an assertion, or by the library itself, as it would find it in a student."""
    passes(CAUGHT[fault][number])
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        getattr(faults, fault)(patch)
        with pytest.raises((AssertionError, pytest.fail.Exception, MetaplError)):
            CAUGHT[fault][number](patch)
