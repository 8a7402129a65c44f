"""Validation by any metric, and the figures against values by hand, scikit-learn and scipy."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from typing import Any

import numpy
import pytest
import torch
from fits import bilevel, single
from test_own_problems import Language, words
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl import MetaplError
from metapl.metrics import Measured, evaluate_logits, paired_test, predict_logits


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_loss_of_a_sum_and_a_weight_is_over_all_tokens() -> None:
    """Not a mean over batches."""
    case = words()
    parts_of_batch = [words().labeled[0], words().labeled[1]]
    trainer = metapl.BilevelTrainer(
        **case.networks(), mode="forward", problem=Language(), teacher_losses=()
    )
    x, y = parts_of_batch
    parts = [(x[:1], y[:1]), (x[1:5], y[1:5]), (x[5:8], y[5:8])]
    options = {"validation": parts, "validate_every": 2, "progress": False}
    result = trainer.fit(outer=[case.labeled], inner=[case.unlabeled], steps=6, **options)
    total, weight = Language().outer_loss(
        trainer.student(parts_of_batch[0]).detach(), parts_of_batch
    )
    assert (result.metric, result.validation_accuracy) == ("loss", None)
    assert result.value == pytest.approx(float(total / weight), rel=1e-6)
    values = {
        row["step"]: row["student_validation_loss"]
        for row in result.history
        if "student_validation_loss" in row
    }
    assert result.value == min(values.values()) == values[result.step]
    assert trainer.evaluate(parts) == Measured("loss", pytest.approx(result.value, rel=1e-6), 8)  # type: ignore[arg-type]


class SquaredError:
    name = "squared_error"

    def __call__(self, network: Any, *, outer: Any, inner: Any, signal: Any, step: int) -> Tensor:
        return F.mse_loss(network(outer[0]), outer[1])


X = torch.randn(30, 3, generator=drawn(0))
Y = X.sum(1, keepdim=True) + 0.1 * torch.randn(30, 1, generator=drawn(1))


def regression(loss: Any = None, outputs: int = 1) -> metapl.LossTrainer:
    torch.manual_seed(0)
    model = nn.Linear(3, outputs)
    return metapl.LossTrainer(
        model, [loss or SquaredError()], optimizer=torch.optim.SGD(model.parameters(), lr=0.05)
    )


def absolute(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs - batch[1]).abs().mean()


def test_a_regression_is_validated_by_its_loss_and_by_a_mean_over_rows() -> None:
    trainer = regression()
    # The last batch has 6 rows.
    batches = DataLoader(TensorDataset(X, Y), batch_size=8)
    result = trainer.fit([(X, Y)], steps=5, validation=batches, progress=False)
    outputs = trainer.student(X).detach()
    assert result.metric == "loss"
    assert result.value == pytest.approx(float(F.mse_loss(outputs, Y)), rel=1e-5)
    assert trainer.evaluate(batches, metric=absolute).value == pytest.approx(
        float((outputs - Y).abs().mean()), rel=1e-5
    )
    assert torch.equal(trainer.predict(X), outputs)


def test_a_batch_counts_by_its_examples() -> None:
    """Not by another tensor of it that is longer."""
    weights = torch.arange(50.0)
    parts = [slice(0, 20), slice(20, 29), slice(29, 30)]
    trainer = regression()
    batches = [(X[rows], Y[rows], weights) for rows in parts]
    for metric in (None, absolute):
        measured = trainer.evaluate(batches, metric=metric)
        assert measured.n == 30
        assert measured.value == pytest.approx(
            trainer.evaluate((X, Y), metric=metric).value, rel=1e-6
        )


class Recall:
    """Of the first class over all batches: no mean over rows."""

    name = "recall"

    def __init__(self) -> None:
        self.right = self.all = 0

    def reset(self) -> None:
        self.right = self.all = 0

    def update(self, outputs: Tensor, batch: Any) -> None:
        first = batch[1] == 0
        self.right = self.right + int((outputs.argmax(1) == 0)[first].sum())
        self.all = self.all + int(first.sum())

    def compute(self) -> float:
        return self.right / self.all if self.all else math.nan


def test_an_object_is_computed_over_all_batches_of_both_networks() -> None:
    x = torch.randn(12, 5, generator=drawn(0))
    y = torch.tensor([1, 2, 0] * 4)
    # The first batch has no example of the class.
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    trainer = bilevel()
    result = trainer.fit(
        [(x, y)],
        [x],
        steps=4,
        validation=batches,
        metric=Recall(),
        metric_mode="max",
        validate_every=2,
    )
    is_first_class = y == 0
    for role, network in trainer.networks.items():
        expected = float((network.eval()(x).argmax(1) == 0)[is_first_class].double().mean())
        assert role == "student" or result.history[-1]["teacher_validation_recall"] == expected
    assert trainer.evaluate(batches, metric=Recall()).value == result.value


# ----------------------------------------------------------------------------------------- refusals


REFUSED: dict[str, dict[str, Any]] = {
    "a text": {"metric": lambda outputs, batch: "high"},
    "no mode": {"metric": absolute, "metric_mode": None},
    "a mode alone": {"metric_mode": "min"},
    "patience alone": {"validation": None, "patience": 2},
    "once": {"validation": ((x, y) for x, y in [(X, Y)])},
    "other shapes": {"validation": (X, Y[:7])},
    "not a number": {"metric": lambda outputs, batch: math.nan},
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("reason", REFUSED)
def test_a_metric_or_data_that_cannot_be_measured_is_refused(reason: str) -> None:
    """All but what is no finite number before the first step."""
    trainer = regression()
    options = {
        "validation": (X, Y),
        "metric_mode": "min" if "metric" in REFUSED[reason] else None,
        **REFUSED[reason],
    }
    with pytest.raises((MetaplError, TypeError, RuntimeError)):
        trainer.fit([(X, Y)], steps=2, progress=False, **options)
    assert (trainer.steps_done == 0) != (reason == "not a number")


def test_one_hot_labels_of_a_problem_of_classes_are_refused() -> None:
    """They would be measured by a loss, in the place of the accuracy, in silence."""
    x, y = torch.randn(12, 4, generator=drawn(0)), torch.arange(12) % 3
    network = metapl.models.mlp([4, 3])
    trainer = metapl.LossTrainer(network, optimizer=torch.optim.SGD(network.parameters()))
    one_hot = F.one_hot(y, 3).float()
    words = r"validation has one-hot labels,.*expected classes, as by labels.argmax\(1\), or"
    with pytest.raises(MetaplError, match=words):
        trainer.fit([(x, y)], steps=1, validation=(x, one_hot), progress=False)
    assert trainer.steps_done == 0
    result = trainer.fit([(x, y)], steps=1, validation=(x, one_hot), metric="loss", progress=False)
    assert result.metric == "loss"


def test_arrays_are_served_in_shuffled_epochs() -> None:
    """Floats in the type of the weights, whole numbers as labels, and what the rest of a row is."""

    class MayReadInner(metapl.CrossEntropy):
        """A loss that does not say when it reads the inner batch, so that there always is one."""

    served: list[Any] = []
    trainer = single(dropout=0.0)
    trainer.losses = (MayReadInner(),)
    real = trainer.step

    def step(outer: Any, inner: Any = None) -> Any:
        served.append((*outer, inner["x"]))
        return real(outer, inner)

    trainer.step = step  # type: ignore[method-assign]
    x = torch.randn(10, 5, dtype=torch.float64, generator=drawn(0))
    y = torch.arange(10).int() % 3
    x[:, 0] = torch.arange(10)
    rows = {"outer": (x.numpy(), y.numpy()), "validation": (x.numpy(), y.numpy())}
    result = trainer.fit(
        **rows, inner={"x": torch.arange(4)}, steps=5, batch_size=5, progress=False
    )
    assert result.value == trainer.evaluate(rows["validation"]).accuracy
    numbers = [inputs[:, 0].tolist() for inputs, *_ in served]
    for first_batch in (0, 2):
        assert sorted(numbers[first_batch] + numbers[first_batch + 1]) == list(range(10))
    assert numbers[0] != numbers[2]
    for inputs, labels, unlabeled in served:
        assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert torch.equal(inputs[:, 0] % 3, labels.float())
        assert sorted(unlabeled.tolist()) == [0, 1, 2, 3], "all, where there are fewer"


# -------------------------------------------------------------------------------------- the figures


def test_against_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    logits_NC = torch.randn(500, 12, generator=generator)
    labels_N = torch.randint(0, 12, (500,), generator=generator)
    evaluation = evaluate_logits(logits_NC, labels_N)
    p_NC = logits_NC.double().softmax(1).numpy()
    predicted_N = logits_NC.argmax(1)
    assert evaluation.accuracy == metrics.accuracy_score(labels_N, predicted_N)
    assert evaluation.top5 == metrics.top_k_accuracy_score(labels_N, p_NC, k=5, labels=range(12))
    assert evaluation.per_class == pytest.approx(
        metrics.recall_score(labels_N, predicted_N, average=None)
    )
    assert evaluation.confusion == tuple(
        map(tuple, metrics.confusion_matrix(labels_N, predicted_N).tolist())
    )
    assert evaluation.negative_log_likelihood == pytest.approx(
        metrics.log_loss(labels_N, p_NC, labels=range(12))
    )
    confidence = logits_NC.double().softmax(1).max(1).values
    correct = predicted_N == labels_N
    gaps = [
        (correct[inside].double() - confidence[inside]).sum().abs()
        for low in range(15)
        if (inside := (confidence > low / 15) & (confidence <= (low + 1) / 15)).any()
    ]
    assert evaluation.expected_calibration_error == pytest.approx(
        float(torch.stack(gaps).sum()) / 500
    )


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
    # This is a frozen layer within a model that trains.
    model.body[1].eval()
    flags = [m.training for m in model.modules()]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    x = torch.randn(10, 3)
    y = torch.arange(10)
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
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(MetaplError):
        predict_logits(nn.Linear(1, 1), [])


# ------------------------------------------------------------------------------------- paired tests


def scores(n: int, seed: int) -> tuple[Any, Any]:
    generator = numpy.random.default_rng(seed)
    b = generator.normal(0.9, 0.02, n)
    return b + generator.normal(0.01, 0.01, n), b


@pytest.mark.parametrize("n", [2, 5, 10, 17])
def test_paired_scores_by_enumeration(n: int) -> None:
    a, b = scores(n, seed=n)
    test = paired_test(a, b)
    d = a - b
    assert test.mean == pytest.approx(d.mean())
    assert test.std == pytest.approx(d.std(ddof=1))
    assert test.interval is not None
    assert sum(test.interval) / 2 == pytest.approx(d.mean())
    if n > 16:
        assert test.p_permutation is None
    else:
        sums = [abs(numpy.dot(signs, d)) for signs in itertools.product((1, -1), repeat=n)]
        assert test.p_permutation == pytest.approx(
            numpy.mean([total >= abs(d.sum()) - 1e-12 for total in sums])
        )
    reversed_test = paired_test(b, a)
    assert reversed_test.mean == -test.mean
    assert reversed_test.p == pytest.approx(test.p)


def test_scores_without_spread_and_ties() -> None:
    single = paired_test([0.9], [0.8])
    assert (single.n, single.std, single.interval, single.p, single.p_permutation) == (
        1,
        None,
        None,
        None,
        None,
    )
    test = paired_test([0.9, 0.8, 0.7], [0.9, 0.8, 0.7])
    assert (test.mean, test.std, test.interval, test.p, test.p_permutation) == (
        0.0,
        0.0,
        None,
        None,
        1.0,
    )
    test = paired_test([0.2, 0.3, 0.4], [0.1, 0.2, 0.3])
    assert (test.p, test.interval, test.p_permutation) == (None, None, 0.25)
    assert paired_test([0.1, 0.2, -0.3, 0.1, 0.2], [0.0] * 5).p_permutation == 22 / 32
    json.dumps(asdict(test), allow_nan=False)
