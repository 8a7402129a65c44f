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
from metapl.metrics import evaluate_logits, interval, paired_test, predict_logits


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
        with pytest.raises(RuntimeError, match="memory"):
            predict_logits(model, [(x, y)])
    else:
        logits_NC, labels_N = predict_logits(model, zip(x.split(4), y.split(4), strict=True))
        assert torch.equal(labels_N, y)
        torch.testing.assert_close(logits_NC, model.eval().body(x).detach())
        model.train()
        model.body[1].eval()
    assert [m.training for m in model.modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(MetaplError):
        predict_logits(nn.Linear(1, 1), [])


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
