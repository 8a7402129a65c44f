"""The classifiers for tables.

Scikit-learn's own checks, what a seed decides, and what is refused.
"""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_wine, make_blobs, make_moons
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import metapl
from metapl.models import mlp
from metapl.sklearn import MetaPseudoLabelsClassifier, MetaReweightedClassifier

CLASSES = MPL, REWEIGHTING = MetaPseudoLabelsClassifier, MetaReweightedClassifier
QUICK: dict[str, Any] = {"steps": 12, "hidden_layer_sizes": 8, "random_state": 0}

X, TRUTH = make_blobs(60, centers=3, random_state=0)
FEW = np.where(np.arange(60) < 15, TRUTH, -1)
NOISY = np.where(np.arange(60) < 40, TRUTH, (TRUTH + 1) % 3)
TRUSTED = np.arange(60) < 20


def fitted(kind: type, **given: Any) -> Any:
    return kind(**{**QUICK, **given}).fit(X, FEW if kind is MPL else NOISY)


def expected_failed(estimator: Any) -> dict[str, str]:
    return {
        "check_classifiers_classes": "it has two classes -1 and 1, and -1 is a row without a label"
    }


OF_FEW, REWEIGHTED = ([kind(steps=25, learning_rate=0.2, batch_size=32)] for kind in CLASSES)


@pytest.mark.filterwarnings("ignore:every row of y has a label:UserWarning")
@parametrize_with_checks(OF_FEW, expected_failed_checks=expected_failed)
def test_scikit_learn_s_own_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    if "check_classifiers" not in repr(check):  # which ask for right predictions
        estimator = clone(estimator).set_params(steps=3)
    check(estimator)


@pytest.mark.long
@parametrize_with_checks(REWEIGHTED)
def test_its_checks_of_the_classifier_that_reweights(
    estimator: Any, check: Callable[[Any], None]
) -> None:
    """Which has most of its code from the same class."""
    test_scikit_learn_s_own_checks(estimator, check)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_seed_decides_the_weights_and_nothing_else_is_drawn(kind: type) -> None:
    np.random.seed(1)  # noqa: NPY002 - the global one is meant
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first, second, other = fitted(kind), fitted(kind), fitted(kind, random_state=1)
    weights = [
        torch.cat([p.flatten() for p in one.network_.parameters()])
        for one in (first, second, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]
    fitted(kind, random_state=None)  # as scikit-learn has it, from NumPy's
    assert not (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("kind", CLASSES)
def test_fits_in_several_threads_are_those_of_one(kind: type) -> None:
    """Though threads share the default generators, of which dropout draws."""

    def rows(seed: int) -> Any:
        found = fitted(
            kind, steps=5, random_state=seed, network=lambda n, c: mlp([n, 8, c], dropout=0.5)
        )
        return found.predict_proba(X)

    alone = rows(0), rows(1)
    with ThreadPoolExecutor(4) as threads:
        found = [*threads.map(rows, [0, 1] * 2)]
    assert all((one == alone[i % 2]).all() for i, one in enumerate(found))


def test_weights_have_the_type_of_the_rows_whatever_the_default_type_is() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        found = [fitted(MPL), fitted(REWEIGHTING, network=lambda n, c: mlp([n, c]))]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for one in found for p in one.network_.parameters()} == {torch.float32}


NAMES = np.array(["ant", "bee", "cat"])[TRUTH]


SPELLINGS = {
    "text -1": np.where(FEW == -1, "-1", NAMES),
    "None": np.where(FEW == -1, None, NAMES),
    "NaN among texts": np.where(FEW == -1, np.nan, NAMES.astype(object)),
    "NaN": np.where(FEW == -1, np.nan, FEW),
    "list of texts with -1": np.where(FEW == -1, -1, NAMES.astype(object)).tolist(),
    "NaT among dates": np.where(
        FEW == -1,
        np.datetime64("NaT", "D"),
        np.datetime64("2020-01-01") + TRUTH.astype("timedelta64[D]"),
    ),
}


def test_a_missing_label_in_every_spelling() -> None:
    one = fitted(MPL)
    for labels in SPELLINGS.values():
        found = MPL(**QUICK).fit(X, labels)
        assert len(found.classes_) == 3
        assert (found.predict_proba(X) == one.predict_proba(X)).all()
        right = found.predict(X)[:15] == found.classes_[TRUTH][:15]
        assert found.score(X, labels) == np.mean(right)
        assert found.score(X, labels, np.arange(60)) == np.average(right, weights=np.arange(15))
    assert one.score(X, FEW[:, None]) == one.score(X, FEW)
    with pytest.raises(ValueError, match="samples"):
        one.score(X, FEW[:-1])


def test_a_search_over_a_pipeline_whose_labels_are_few_or_some_of_whose_rows_are_trusted() -> None:
    pipeline = make_pipeline(StandardScaler(), MetaPseudoLabelsClassifier(**QUICK))
    search = GridSearchCV(pipeline, {"metapseudolabelsclassifier__noise": [0, 0.3]}, cv=2).fit(
        X, FEW
    )
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    # Of rows without labels nobody can say whether they are predicted right.
    assert set(np.round(search.cv_results_["split0_test_score"] * 8 * 7, 6) % 1) == {0}
    assert np.isfinite(cross_val_score(pipeline, X, np.where(FEW == -1, "-1", NAMES), cv=2)).all()
    mask = np.arange(60) % 3 == 0
    mask.setflags(write=False)  # as a column of pandas is
    pipeline = make_pipeline(StandardScaler(), REWEIGHTING(**QUICK))
    grid = {"metareweightedclassifier__steps": [12]}
    found = GridSearchCV(pipeline, grid, cv=2).fit(X, NOISY, metareweightedclassifier__trusted=mask)
    weights = found.best_estimator_[-1].weights_
    assert (weights[mask] == 1).all()
    assert (weights[~mask] < 1).all()


def test_weights_fall_where_labels_are_wrong() -> None:
    found = MetaReweightedClassifier(steps=100, random_state=0).fit(X, NOISY, trusted=TRUSTED)
    assert found.weights_[40:].mean() < 0.4 < 0.5 < found.weights_[20:40].mean()
    assert found.score(X, TRUTH) > 0.8


def test_the_seed_decides_which_rows_are_drawn_by_their_weights() -> None:
    """In batches that are all full: of one row, batch normalization would fail."""
    table, y = make_moons(21, noise=0.1, random_state=0)
    drawn, real = [], metapl.LossTrainer.step
    for seed in (0, 1):
        one = REWEIGHTING(
            network=lambda n, c: mlp([n, c]), steps=4, batch_size=20, random_state=seed
        )
        with patch.object(metapl.LossTrainer, "step", autospec=True, side_effect=real) as step:
            one.fit(table, y)
        inputs = [call.args[1][0] for call in step.call_args_list]
        # Before them come the steps of the networks that check the labels of other folds, of 16 or
        # 17 rows.
        assert all(len(x) in (16, 17) for x in inputs[:-4])
        drawn.append(inputs[-4:])
        assert [len(x) for x in drawn[-1]] == [20] * 4
    assert not torch.equal(*map(torch.cat, drawn))


def test_columns_of_any_scale_are_learned_alike_and_the_feedback_is_heard() -> None:
    scaled = X * [1e-6, 1e6] + [0, 1e8]
    same = fitted(MPL).predict_proba(X)
    np.testing.assert_allclose(MPL(**QUICK).fit(scaled, FEW).predict_proba(scaled), same, 1e-3)
    assert not np.allclose(fitted(MPL, mode="none").predict_proba(X), same, atol=1e-6)
    with pytest.warns(UserWarning, match="every row of y has a label"):
        MPL(**QUICK).fit(X, TRUTH)


def test_a_network_and_a_mode_of_one_s_own() -> None:
    found = fitted(
        MPL, network=lambda columns, classes: mlp([columns, 5, classes]), mode="reinforce"
    )
    assert found.network_[1].out_features == 5
    assert fitted(REWEIGHTING, hidden_layer_sizes=(7, 6)).network_[3].out_features == 6
    assert fitted(
        REWEIGHTING, hidden_layer_sizes=np.int64(7), steps=np.int64(3)
    ).weights_.shape == (60,)
    with pytest.raises(TypeError, match="positional"):
        MPL(8, 0.5)


def spoiled(value: float) -> Any:
    table = X.copy()
    table[3, 1] = value
    return table


ONE = mlp([2, 3])
# A word, what is set, and what is fitted.
REFUSED: list[tuple[type, str, dict[str, Any], dict[str, Any]]] = [
    *((kind, "variance", {}, {"X": spoiled(1e200)}) for kind in CLASSES),
    *((kind, "classes", {}, {"y": TRUTH * 0}) for kind in CLASSES),
    *((kind, "hidden_layer_sizes", {"hidden_layer_sizes": (8, 0)}, {}) for kind in CLASSES),
    *((kind, "outputs", {"network": lambda n, c: mlp([n, c + 1])}, {}) for kind in CLASSES),
    (MPL, "label", {}, {"y": TRUTH * 0 - 1}),
    (MPL, "missing label", {}, {"y": np.where(TRUTH, 1, -1)}),
    (MPL, "noise", {"noise": float("nan")}, {}),
    (MPL, "share", {"network": lambda n, c: ONE}, {}),
    (REWEIGHTING, "NaN", {}, {"y": np.where(TRUTH, TRUTH, np.nan)}),
    (REWEIGHTING, "reinforce", {"mode": "reinforce"}, {}),
    (REWEIGHTING, "truth values", {}, {"trusted": TRUSTED[:-1]}),
    (REWEIGHTING, "truth values", {}, {"trusted": TRUTH}),
    (REWEIGHTING, "weighed", {}, {"trusted": TRUSTED | True}),
    (REWEIGHTING, "folds", {"folds": 1}, {}),
    (REWEIGHTING, "trusted row", {}, {"trusted": TRUSTED & (NOISY != 2)}),
]


@pytest.mark.parametrize(("kind", "word", "settings", "data"), REFUSED)
def test_a_refused_fit(
    kind: type, word: str, settings: dict[str, Any], data: dict[str, Any]
) -> None:
    before = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError), match=word):
        kind(**{**QUICK, **settings}).fit(**{"X": X, "y": FEW if kind is MPL else NOISY, **data})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "load", [load_wine, pytest.param(load_breast_cancer, marks=pytest.mark.long)]
)
def test_without_trusted_rows_folds_that_check_each_other_find_wrong_labels(load: Any) -> None:
    """And the classifier is not behind its own control, plain training.

    Weights learned from random rows were.
    """
    data, truth = load(return_X_y=True)
    classes, of_folds, of_control = truth.max() + 1, [], []
    for seed in range(3):
        rows, held_out, right, held_out_right = train_test_split(
            data, truth, test_size=0.4, random_state=seed
        )
        is_wrong = np.random.default_rng(seed).random(len(right)) < 0.3
        given = np.where(is_wrong, (right + 1) % classes, right)
        settings: dict[str, Any] = {"steps": 150, "random_state": seed}
        found = REWEIGHTING(**settings).fit(rows, given)
        assert found.weights_[is_wrong].mean() < 0.3 < 0.8 < found.weights_[~is_wrong].mean()
        of_folds.append(found.score(held_out, held_out_right))
        of_control.append(
            REWEIGHTING(mode="none", **settings).fit(rows, given).score(held_out, held_out_right)
        )
    assert np.mean(of_folds) > np.mean(of_control)


def test_the_rows_of_a_class_that_no_fold_recognizes_keep_their_weight() -> None:
    rows, labels = np.vstack([X, [[9.0, 9.0]]]), np.append(TRUTH, 3)
    found = REWEIGHTING(**QUICK).fit(rows, labels)
    assert found.weights_[-1] == 1
    assert (REWEIGHTING(mode="none", **QUICK).fit(rows, labels).weights_ == 1).all()
