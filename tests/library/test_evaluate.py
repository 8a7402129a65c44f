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

import metapl
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, evaluate_logits, interval, paired_test, predict_logits
from metapl.metrics.metric import metric_of, of_classes


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
    assert json.loads(json.dumps(evaluation.to_json(), allow_nan=False)) == evaluation.to_json()


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
    confidence, correct = logits_NC.double().softmax(1).max(1).values, predicted_N == labels_N
    gaps = [
        (correct[inside].double() - confidence[inside]).sum().abs()
        for low in range(15)
        if (inside := (confidence > low / 15) & (confidence <= (low + 1) / 15)).any()
    ]
    assert evaluation.expected_calibration_error == pytest.approx(float(torch.stack(gaps).sum()) / 500)


@pytest.mark.parametrize(
    ("logits", "labels", "classes"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), None),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), None),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), None),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), None),
        (torch.zeros(2, 3), torch.zeros(2), None),
        (torch.zeros(2, 3), torch.tensor([0, 3]), None),
        (torch.zeros(2, 3), torch.tensor([0, -1]), None),
        (torch.zeros(2, 3), torch.tensor([0, 1]), ["a"]),
        (torch.tensor([[0.0, 1.0], [0.0, math.nan]]), torch.tensor([0, 1]), None),
    ],
)
def test_wrong_logits_and_labels(logits: torch.Tensor, labels: torch.Tensor, classes: list[str] | None) -> None:
    with pytest.raises(MetaplError):
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


@pytest.mark.parametrize("fail", [False, True])
def test_predicting_restores_every_flag_and_touches_nothing(fail: bool) -> None:
    model = Recorder()
    model.body[1].eval()  # a frozen layer within a training model
    before, state = [m.training for m in model.modules()], {n: t.clone() for n, t in model.state_dict().items()}
    x, y = torch.randn(10, 3), torch.arange(10)
    if fail:
        model.fail = True
        with pytest.raises(RuntimeError, match="out of memory"):
            predict_logits(model, [(x, y)])
    else:
        logits_NC, labels_N = predict_logits(model, zip(x.split(4), y.split(4), strict=True))
        assert torch.equal(labels_N, y)
        torch.testing.assert_close(logits_NC, model.eval().body(x).detach())
        model.train()
        model.body[1].eval()
    assert [m.training for m in model.modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(MetaplError, match="no batches"):
        predict_logits(nn.Linear(1, 1), [])


# ------------------------------------------------------------------------------------------------------------- metrics


X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2


def trainer(*losses: Any) -> metapl.LossTrainer:
    torch.manual_seed(0)
    student = nn.Linear(3, 2)
    return metapl.LossTrainer(
        student, losses or (metapl.CrossEntropy(),), optimizer=torch.optim.SGD(student.parameters(), 0.1)
    )


def squared(network: nn.Module, *, labeled: Any, **_: Any) -> torch.Tensor:
    return (network(labeled[0]) - labeled[1]).square().mean()


squared.name = "squared"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (Y, "accuracy"),
        (Y.int(), "accuracy"),
        (Y + 5, "loss"),  # counts
        (X[:, :2].softmax(1), "loss"),
        (X[:, :2], "loss"),
    ],
)
def test_integers_that_number_the_outputs_are_classes(labels: torch.Tensor, name: str) -> None:
    judge = trainer(squared) if name == "loss" else trainer()
    assert of_classes(judge, (X, labels), torch.zeros(12, 2)) == (name == "accuracy")
    if labels.shape == (12, 2):
        assert judge.evaluate((X, labels)).metric == name
    assert trainer().predict(X).sum(1).allclose(torch.ones(12))
    assert torch.equal(trainer(squared).predict(X), trainer().student(X).detach())


class Mean:
    """As torchmetrics has them."""

    higher_is_better = False

    def reset(self) -> None:
        self.values: list[torch.Tensor] = []

    def update(self, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.values.append(outputs[:, 0] - labels)

    def compute(self) -> torch.Tensor:
        return torch.cat(self.values).mean()


def test_a_function_an_object_and_the_loss_are_over_all_examples() -> None:
    judge = trainer()
    z = judge.student(X).detach()
    batches = [(X[:5], Y[:5]), (X[5:], Y[5:])]
    assert judge.evaluate(batches, metric=Mean()).value == pytest.approx(float((z[:, 0] - Y).mean()), rel=1e-5)
    by_rows = judge.evaluate(batches, metric=lambda outputs, batch: outputs[:, 1].mean())
    assert (by_rows.metric, by_rows.n, by_rows.value) == ("metric", 12, pytest.approx(float(z[:, 1].mean()), rel=1e-5))
    expected = float(nn.functional.cross_entropy(z, Y))
    assert judge.evaluate(batches, metric="loss").value == pytest.approx(expected, rel=1e-5)
    assert metric_of(Mean()).better == "min"  # type: ignore[union-attr]
    for given, mode in (("acuracy", None), (Mean, None), (3, None), (Mean(), "max"), (None, "min"), ("loss", "most")):
        with pytest.raises(MetaplError):
            metric_of(given, mode)  # type: ignore[arg-type]
    for wrong in (lambda outputs, batch: outputs, lambda outputs, batch: math.nan):
        with pytest.raises(MetaplError, match="metric"):
            judge.evaluate(batches, metric=wrong)


# -------------------------------------------------------------------------------------------------------- paired tests


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (870, 1000)])
def test_the_interval_is_wilsons(correct: int, n: int) -> None:
    z, p = 1.959963984540054, correct / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = [(p + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert interval(correct, n) == pytest.approx(ends, abs=1e-12)


def scores(n: int, seed: int) -> tuple[Any, Any]:
    generator = numpy.random.default_rng(seed)
    b = generator.normal(0.9, 0.02, n)
    return b + generator.normal(0.01, 0.01, n), b


@pytest.mark.parametrize("n", [2, 5, 10, 17])
def test_paired_scores_by_enumeration(n: int) -> None:
    a, b = scores(n, seed=n)
    test, d = paired_test(a, b), a - b
    assert test.mean == pytest.approx(d.mean())
    assert test.std == pytest.approx(d.std(ddof=1))
    assert test.interval is not None
    assert sum(test.interval) / 2 == pytest.approx(d.mean())
    if n > 16:
        assert test.p_permutation is None
    else:
        sums = [abs(numpy.dot(signs, d)) for signs in itertools.product((1, -1), repeat=n)]
        assert test.p_permutation == pytest.approx(numpy.mean([one >= abs(d.sum()) - 1e-12 for one in sums]))
    other = paired_test(b, a)
    assert other.mean == -test.mean
    assert other.p == pytest.approx(test.p)


def test_scores_without_spread_and_ties() -> None:
    one = paired_test([0.9], [0.8])
    assert (one.n, one.std, one.interval, one.p, one.p_permutation) == (1, None, None, None, None)
    test = paired_test([0.9, 0.8, 0.7], [0.9, 0.8, 0.7])
    assert (test.mean, test.std, test.interval, test.p, test.p_permutation) == (0.0, 0.0, None, None, 1.0)
    test = paired_test([0.2, 0.3, 0.4], [0.1, 0.2, 0.3])
    assert (test.p, test.interval, test.p_permutation) == (None, None, 0.25)
    assert paired_test([0.1, 0.2, -0.3, 0.1, 0.2], [0.0] * 5).p_permutation == 22 / 32
    json.dumps(test.to_json(), allow_nan=False)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([math.inf, 1], [1, 1])])
def test_wrong_scores(a: list[float], b: list[float]) -> None:
    with pytest.raises(MetaplError):
        paired_test(a, b)
    with pytest.raises(MetaplError):
        interval(3, 2)
