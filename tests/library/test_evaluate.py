"""The figures against values worked out by hand, scikit-learn and scipy."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from metapl.errors import MetaplError
from metapl.metrics import Evaluation, evaluate_logits, paired_test, predict_logits


def test_by_hand() -> None:
    p_NC = torch.tensor([[0.80, 0.10, 0.10], [0.50, 0.40, 0.10], [0.20, 0.30, 0.50], [0.05, 0.90, 0.05]])
    evaluation = evaluate_logits(p_NC.log(), torch.tensor([0, 1, 1, 1]), classes=["a", "b", "c"])
    # Confidences 0.8 (bin 12), 0.5 (bin 8, twice), 0.9 (bin 14), correct: yes, no, no, yes.
    assert evaluation.expected_calibration_error == pytest.approx((0.2 + 1.0 + 0.1) / 4, abs=1e-6)
    assert evaluation.negative_log_likelihood == pytest.approx(-math.log(0.8 * 0.4 * 0.3 * 0.9) / 4, abs=1e-6)
    assert evaluation == Evaluation(
        n=4,
        accuracy=0.5,
        top5=None,
        negative_log_likelihood=evaluation.negative_log_likelihood,
        expected_calibration_error=evaluation.expected_calibration_error,
        per_class=(1.0, 1 / 3, None),
        confusion=((1, 0, 0), (1, 1, 1), (0, 0, 0)),
        classes=("a", "b", "c"),
    )


def test_gaps_of_one_bin_cancel_and_of_two_do_not() -> None:
    together = torch.tensor([[0.8, 0.2]] * 5).log()
    assert evaluate_logits(together, torch.tensor([0, 0, 0, 0, 1])).expected_calibration_error == pytest.approx(
        0, abs=1e-6
    )
    apart = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    assert evaluate_logits(apart, torch.tensor([0, 1])).expected_calibration_error == pytest.approx(0.4, abs=1e-6)


def test_against_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    logits_NC = torch.randn(500, 12, generator=generator)
    labels_N = torch.randint(0, 12, (500,), generator=generator)
    evaluation = evaluate_logits(logits_NC, labels_N)
    p_NC, predicted_N = logits_NC.double().softmax(1).numpy(), logits_NC.argmax(1)
    assert evaluation.accuracy == metrics.accuracy_score(labels_N, predicted_N)
    assert evaluation.top5 == metrics.top_k_accuracy_score(labels_N, p_NC, k=5, labels=range(12))
    assert evaluation.per_class == pytest.approx(metrics.recall_score(labels_N, predicted_N, average=None))
    assert evaluation.confusion == tuple(map(tuple, metrics.confusion_matrix(labels_N, predicted_N).tolist()))
    assert evaluation.negative_log_likelihood == pytest.approx(metrics.log_loss(labels_N, p_NC, labels=range(12)))


def test_calibration_error_bin_by_bin() -> None:
    generator = torch.Generator().manual_seed(1)
    p_NC = (3 * torch.randn(400, 4, generator=generator, dtype=torch.float64)).softmax(1)
    labels_N = torch.randint(0, 4, (400,), generator=generator)
    confidence, correct = p_NC.max(1).values, p_NC.argmax(1) == labels_N
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            gap = correct[inside].double().mean() - confidence[inside].mean()
            expected += float(inside.double().mean() * gap.abs())
    assert evaluate_logits(p_NC.log(), labels_N).expected_calibration_error == pytest.approx(expected)


@pytest.mark.parametrize("width", [5, 6])
def test_top5_only_where_it_says_something(width: int) -> None:
    evaluation = evaluate_logits(torch.arange(float(width))[None], torch.tensor([0]))
    assert evaluation.top5 == (None if width == 5 else 0.0)


def test_one_class_half_precision_and_large_logits() -> None:
    assert evaluate_logits(torch.zeros(3, 1), torch.zeros(3, dtype=torch.uint8)).expected_calibration_error == 0.0
    evaluation = evaluate_logits(torch.tensor([[3e4, -3e4]], dtype=torch.bfloat16), torch.tensor([1]))
    assert evaluation.negative_log_likelihood == pytest.approx(6e4, rel=0.01)


def test_json() -> None:
    evaluation = evaluate_logits(torch.eye(3)[:2], torch.tensor([0, 1]), classes=("a", "b", "c"))
    plain = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert plain == evaluation.to_json()
    assert plain["per_class"] == [1.0, 1.0, None]


@pytest.mark.parametrize(
    ("logits", "labels", "classes", "text"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), None, r"\(2,\) and labels \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), None, r"\(2, 3\) and labels \(3,\)"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), None, "at least 1"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), None, "floating-point"),
        (torch.zeros(2, 3), torch.zeros(2), None, "expected integers"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), None, "0 to 3; of 3 classes, expected 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), None, "from -1 to 0"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), ["a"], "1 names of classes were given for 3 logits"),
        (torch.tensor([[0.0, 1.0], [0.0, math.nan]]), torch.tensor([0, 1]), None, r"1 of 2 .*example 1\).*diverged"),
    ],
)
def test_wrong_input(logits: torch.Tensor, labels: torch.Tensor, classes: list[str] | None, text: str) -> None:
    with pytest.raises(MetaplError, match=text):
        evaluate_logits(logits, labels, classes)


class Recorder(nn.Module):
    """Says what it saw, and fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
        self.fail = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not any(module.training for module in self.modules())
        assert not torch.is_grad_enabled()
        if self.fail:
            raise RuntimeError("out of memory")
        out: torch.Tensor = self.body(x)
        return out


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_predicting_restores_every_flag_and_touches_nothing() -> None:
    model = Recorder()
    model.body[1].eval()  # a frozen layer within a training model
    before, state = flags(model), {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(10, 3), torch.arange(10)
    logits_NC, labels_N = predict_logits(model, zip(x.split(4), y.split(4), strict=True))
    assert flags(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(labels_N, y)
    model.eval()
    torch.testing.assert_close(logits_NC, model.body(x).detach())
    logits_NC.requires_grad_()  # an ordinary tensor, not one of inference mode


def test_flags_are_restored_after_a_failure() -> None:
    model = Recorder()
    model.fail = True
    before = flags(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_logits(model, [(torch.zeros(1, 3), torch.zeros(1))])
    assert flags(model) == before


def test_no_batches() -> None:
    with pytest.raises(MetaplError, match="no batches"):
        predict_logits(nn.Linear(1, 1), [])


# Paired tests


def scores(n: int, seed: int) -> tuple[Any, Any]:
    generator = numpy.random.default_rng(seed)
    b = generator.normal(0.9, 0.02, n)
    return b + generator.normal(0.01, 0.01, n), b


@pytest.mark.parametrize("n", [2, 3, 5, 10, 16, 17, 40])
def test_against_scipy(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = scores(n, seed=n)
    test, expected = paired_test(a, b), stats.ttest_rel(a, b)
    assert test.p == pytest.approx(expected.pvalue)
    assert test.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert test.mean == pytest.approx((a - b).mean())
    assert test.std == pytest.approx((a - b).std(ddof=1))
    if n > 16:
        assert test.p_permutation is None
    elif n <= 10:
        exact = stats.permutation_test(((a - b),), numpy.mean, permutation_type="samples", n_resamples=math.inf)
        assert test.p_permutation == pytest.approx(exact.pvalue)
        assert test.p_permutation is not None
        assert test.p_permutation >= 2 / 2**n


def test_permutations_with_ties() -> None:
    differences = [0.1, 0.2, -0.3, 0.1, 0.2]
    sums = [
        sum(s * round(10 * d) for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=5)
    ]
    expected = sum(abs(one) >= 3 for one in sums) / 32
    assert paired_test(differences, [0.0] * 5).p_permutation == expected
    assert paired_test([0.7 + one for one in differences], [0.7] * 5).p_permutation == expected


def test_one_pair_has_no_p() -> None:
    test = paired_test([0.9], [0.8])
    assert (test.n, test.std, test.interval, test.p, test.p_permutation) == (1, None, None, None, None)
    assert test.mean == pytest.approx(0.1)


def test_identical_scores() -> None:
    test = paired_test([0.9, 0.8, 0.7], [0.9, 0.8, 0.7])
    assert (test.mean, test.std, test.interval, test.p, test.p_permutation) == (0.0, 0.0, None, None, 1.0)


def test_equal_differences_have_no_t_test_even_when_they_are_rounded() -> None:
    test = paired_test([0.2, 0.3, 0.4], [0.1, 0.2, 0.3])
    assert test.mean == pytest.approx(0.1)
    assert (test.p, test.interval, test.p_permutation) == (None, None, 0.25)


def test_the_order_turns_the_sign() -> None:
    a, b = scores(6, seed=0)
    left, right = paired_test(a, b), paired_test(b, a)
    assert left.mean == -right.mean
    assert left.p == pytest.approx(right.p)
    assert left.p_permutation == right.p_permutation
    json.dumps(left.to_json(), allow_nan=False)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([math.inf, 1], [1, 1])])
def test_wrong_scores(a: list[float], b: list[float]) -> None:
    with pytest.raises(MetaplError):
        paired_test(a, b)
