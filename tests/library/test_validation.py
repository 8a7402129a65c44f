"""Validation by any metric: losses over tokens, regressions and classes, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fits import bilevel, single
from test_own_problems import Language, words
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl import MetaplError
from metapl.metrics import Measured


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_loss_of_a_sum_and_a_weight_is_over_all_tokens() -> None:
    """Not a mean over batches."""
    case, held = words(), [words().labeled[0], words().labeled[1]]
    trainer = metapl.BilevelTrainer(**case.networks(), mode="forward", problem=Language(), teacher_losses=())
    parts = [tuple(t[rows] for t in held) for rows in (slice(0, 1), slice(1, 5), slice(5, 8))]
    how = {"validation": parts, "validate_every": 2, "progress": False}
    found = trainer.fit(outer=[case.labeled], inner=[case.unlabeled], steps=6, **how)
    total, weight = Language().outer_loss(trainer.student(held[0]).detach(), held)
    assert (found.metric, found.validation_accuracy) == ("loss", None)
    assert found.value == pytest.approx(float(total / weight), rel=1e-6)
    values = {row["step"]: row["student_validation_loss"] for row in found.history if "student_validation_loss" in row}
    assert found.value == min(values.values()) == values[found.step]
    assert trainer.evaluate(parts) == Measured("loss", pytest.approx(found.value, rel=1e-6), 8)  # type: ignore[arg-type]


class SquaredError:
    name = "squared_error"

    def __call__(self, network: Any, *, labeled: Any, unlabeled: Any, signal: Any, step: int) -> Tensor:
        return F.mse_loss(network(labeled[0]), labeled[1])


X = torch.randn(30, 3, generator=drawn(0))
Y = X.sum(1, keepdim=True) + 0.1 * torch.randn(30, 1, generator=drawn(1))


def regression(loss: Any = None, outputs: int = 1) -> metapl.LossTrainer:
    torch.manual_seed(0)
    model = nn.Linear(3, outputs)
    return metapl.LossTrainer(model, [loss or SquaredError()], optimizer=torch.optim.SGD(model.parameters(), lr=0.05))


def absolute(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs - batch[1]).abs().mean()


def test_a_regression_is_validated_by_its_loss_and_by_a_mean_over_rows() -> None:
    trainer = regression()
    batches = DataLoader(TensorDataset(X, Y), batch_size=8)  # the last has 6 rows
    found = trainer.fit([(X, Y)], steps=5, validation=batches, progress=False)
    outputs = trainer.student(X).detach()
    assert found.metric == "loss"
    assert found.value == pytest.approx(float(F.mse_loss(outputs, Y)), rel=1e-5)
    assert trainer.evaluate(batches, metric=absolute).value == pytest.approx(
        float((outputs - Y).abs().mean()), rel=1e-5
    )
    assert torch.equal(trainer.predict(X), outputs)


def test_a_batch_counts_by_its_examples() -> None:
    """Not by another tensor of it that is longer."""
    weights, parts = torch.arange(50.0), [slice(0, 20), slice(20, 29), slice(29, 30)]
    trainer = regression()
    batches = [(X[rows], Y[rows], weights) for rows in parts]
    for metric in (None, absolute):
        found = trainer.evaluate(batches, metric=metric)
        assert found.n == 30
        assert found.value == pytest.approx(trainer.evaluate((X, Y), metric=metric).value, rel=1e-6)


class Recall:
    """Of the first class over all batches: no mean over rows."""

    name = "recall"

    def __init__(self) -> None:
        self.right = self.all = 0

    def reset(self) -> None:
        self.right = self.all = 0

    def update(self, outputs: Tensor, batch: Any) -> None:
        first = batch[1] == 0
        self.right, self.all = self.right + int((outputs.argmax(1) == 0)[first].sum()), self.all + int(first.sum())

    def compute(self) -> float:
        return self.right / self.all if self.all else math.nan


def test_an_object_is_computed_over_all_batches_of_both_networks() -> None:
    x, y = torch.randn(12, 5, generator=drawn(0)), torch.tensor([1, 2, 0] * 4)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]  # the first has no example of the class
    trainer = bilevel()
    found = trainer.fit([(x, y)], [x], steps=4, validation=batches, metric=Recall(), mode="max", validate_every=2)
    first = y == 0
    for role, network in trainer.networks.items():
        expected = float((network.eval()(x).argmax(1) == 0)[first].double().mean())
        assert role == "student" or found.history[-1]["teacher_validation_recall"] == expected
    assert trainer.evaluate(batches, metric=Recall()).value == found.value


# --------------------------------------------------------------------------------------------------------- refusals


REFUSED: dict[str, dict[str, Any]] = {
    "a text": {"metric": lambda outputs, batch: "high"},
    "no mode": {"metric": absolute, "mode": None},
    "a mode alone": {"mode": "min"},
    "once": {"validation": ((x, y) for x, y in [(X, Y)])},
    "other shapes": {"validation": (X, Y[:7])},
    "not a number": {"metric": lambda outputs, batch: math.nan},
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("what", REFUSED)
def test_a_metric_or_data_that_cannot_be_measured_is_refused(what: str) -> None:
    """All but what is no finite number before the first step."""
    trainer = regression()
    options = {"validation": (X, Y), "mode": "min" if "metric" in REFUSED[what] else None, **REFUSED[what]}
    with pytest.raises((MetaplError, TypeError, RuntimeError)):
        trainer.fit([(X, Y)], steps=2, progress=False, **options)
    assert (trainer.steps_done == 0) != (what == "not a number")


def test_arrays_are_served_in_shuffled_epochs() -> None:
    """Floats in the type of the weights, whole numbers as labels, and what the rest of a row is."""
    drawn_rows: list[Any] = []
    trainer = single(dropout=0.0)
    real = trainer.step

    def step(labeled: Any, unlabeled: Any = None) -> Any:
        drawn_rows.append((labeled, unlabeled))
        return real(labeled, unlabeled)

    trainer.step = step  # type: ignore[method-assign]
    x = torch.randn(10, 5, dtype=torch.float64, generator=drawn(0)).numpy()
    y = (torch.arange(10) % 3).int().numpy()
    found = trainer.fit((x, y), {"x": torch.arange(4)}, steps=5, batch_size=5, validation=(x, y), progress=False)
    assert found.value == trainer.evaluate((x, y)).accuracy
    assert all(labeled[0].dtype == torch.float32 and labeled[1].dtype == torch.int64 for labeled, _ in drawn_rows)
    for first in (0, 2):
        epoch = torch.cat([labeled[0] for labeled, _ in drawn_rows[first : first + 2]])
        assert sorted(epoch[:, 0].tolist()) == sorted(torch.tensor(x).float()[:, 0].tolist())
    lookup = dict(zip(torch.tensor(x).float()[:, 0].tolist(), y.tolist(), strict=True))
    assert all(
        lookup[float(a)] == int(b)
        for labeled, _ in drawn_rows
        for a, b in zip(labeled[0][:, 0], labeled[1], strict=True)
    )
    assert not torch.equal(drawn_rows[0][0][0], drawn_rows[2][0][0])
    assert all(sorted(unlabeled["x"].tolist()) == [0, 1, 2, 3] for _, unlabeled in drawn_rows), (
        "all, where there are fewer"
    )
