"""Validation by any metric: of language models, regressions and classes, through kills, and what is refused."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import _one_thread, bilevel, rows, same, single  # noqa: F401  # one thread, in every test
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl import MetaplError
from metapl.metrics import Measured

VOCABULARY, LENGTH = 7, 6


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ a language model


class SmallGPT(nn.Module):
    """A decoder of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, 8), nn.Embedding(LENGTH, 8)
        self.query, self.out = nn.Linear(8, 24), nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        q, k, v = self.query(h).chunk(3, -1)
        future = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
        weights = (q @ k.mT / 8**0.5).masked_fill(future, -torch.inf).softmax(-1)
        logits: Tensor = self.out(h + weights @ v)
        return logits


class NextToken(metapl.BilevelProblem):
    """A weight for each text; the loss is a mean over the tokens that are not padding."""

    def outer_batch(self, batch: Any) -> Any:
        return batch

    def outer_input(self, batch: Any) -> Tensor:
        ids: Tensor = batch["ids"]
        return ids[:, :-1]

    student_input = outer_input

    def losses(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        mask = batch["mask"][:, 1:]
        return F.cross_entropy(outputs.mT, batch["ids"][:, 1:], reduction="none") * mask, mask

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> metapl.Signal:
        return metapl.Signal(teacher(batch["index"])[:, 0].sigmoid())

    def inner_loss(self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None) -> Tensor:
        losses, mask = self.losses(outputs, batch)
        return signal.value * losses.sum(1) / mask.sum(1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        losses, mask = self.losses(outputs, batch)
        return losses.sum(), mask.sum()


def texts(count: int, seed: int) -> dict[str, Tensor]:
    """Tokens that count up, of different lengths."""
    draw = drawn(seed)
    ids = (torch.randint(VOCABULARY, (count, 1), generator=draw) + torch.arange(LENGTH)) % VOCABULARY
    mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (count, 1), generator=draw)).float()
    return {"ids": ids, "mask": mask, "index": torch.arange(count)}


def parts(batch: dict[str, Tensor], *sizes: int) -> list[dict[str, Tensor]]:
    columns = {name: t.split(sizes) for name, t in batch.items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(sizes))]


def language_model(seed: int = 0) -> metapl.BilevelTrainer:
    torch.manual_seed(seed)
    weights, student = nn.Embedding(16, 1), SmallGPT()
    return metapl.BilevelTrainer(
        weights,
        student,
        "forward",
        problem=NextToken(),
        teacher_losses=(),
        inner_optimizer=torch.optim.Adam(student.parameters(), lr=0.02),
        outer_optimizer=torch.optim.Adam(weights.parameters(), lr=0.1),
    )


HELD = texts(20, 1)


def test_a_language_model_is_validated_by_its_loss_over_all_tokens() -> None:
    trainer = language_model()
    found = trainer.fit(
        outer=[texts(8, 2)], inner=[texts(16, 3)], steps=12, validation=parts(HELD, 3, 16, 1), validate_every=4
    )
    with torch.no_grad():
        losses, mask = NextToken().losses(trainer.student(HELD["ids"][:, :-1]), HELD)
    assert (found.metric, found.validation_accuracy) == ("loss", None)
    assert found.value == pytest.approx(float(losses.sum() / mask.sum()), rel=1e-5)
    means = [float(losses[rows].sum() / mask[rows].sum()) for rows in (slice(3), slice(3, 19), slice(19, 20))]
    assert found.value != pytest.approx(sum(means) / 3, rel=1e-3), "which a mean over batches would be"
    values = {row["step"]: row["student_validation_loss"] for row in found.history if "student_validation_loss" in row}
    assert found.value == min(values.values()) == values[found.step]
    assert trainer.evaluate(HELD) == Measured("loss", pytest.approx(found.value, rel=1e-5), 20)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ a regression


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


def test_the_greatest_or_the_smallest_value_is_kept() -> None:
    for mode, best in (("min", min), ("max", max)):
        metric: Any = partial(absolute)
        found = regression().fit(
            [(X, Y)], steps=6, validation=(X, Y), metric=metric, mode=mode, validate_every=1, progress=False
        )
        values = [row["student_validation_absolute"] for row in found.history]
        assert found.value == best(values)
        assert found.step == len(values) - values[::-1].index(found.value)
        assert max(values) > min(values)


# ------------------------------------------------------------------------------------------------ objects, torchmetrics


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


def test_metrics_of_torchmetrics_get_outputs_and_labels() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    trainer = regression()
    metric = torchmetrics.MeanSquaredError()
    found = trainer.fit([(X, Y)], steps=4, validation=[(X[:7], Y[:7]), (X[7:], Y[7:])], metric=metric, validate_every=1)
    assert found.metric == "MeanSquaredError"
    assert found.value == pytest.approx(trainer.evaluate((X, Y), metric="loss").value, rel=1e-5)
    assert found.step == 4, "its own direction, down"
    with pytest.raises(MetaplError, match="of the metric 'MeanSquaredError' the min is best"):
        trainer.fit([(X, Y)], steps=5, validation=(X, Y), metric=metric, mode="max")
    y = torch.arange(30) % 3
    classes = regression(metapl.CrossEntropy(), outputs=3)
    f1 = torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro")
    result = classes.fit([(X, y)], steps=4, validation=(X, y), metric=f1)
    assert result.value == float(f1(classes.predict(X), y))


# ------------------------------------------------------------------------------------------------ killed and resumed


class Killed(Exception):
    pass


def killing(at: int) -> Any:
    def callback(step: int, row: Any, trainer: Any) -> None:
        if step == at:
            raise Killed

    return callback


def fit_language_model(out: Path, callbacks: Any = (), **options: Any) -> Any:
    trainer = language_model()
    how = {"validation": parts(HELD, 3, 17), "metric": None, "resume": True, **options}
    found = trainer.fit(
        texts(24, 2), texts(16, 3), steps=12, batch_size=5, out=str(out), validate_every=2, save_every=2, log_every=1,
        ema_decay=0.9, progress=False, say=lambda text: None, callbacks=callbacks, **how,
    )  # fmt: skip
    return found, trainer


class TokensRight(Recall):
    def update(self, outputs: Tensor, batch: Any) -> None:
        self.all += outputs[..., 0].numel()
        self.right += int((outputs.argmax(-1) == batch["ids"][:, 1:]).sum())


METRICS = {"loss": None, "object": TokensRight(), "function": lambda outputs, batch: outputs.std()}


@pytest.mark.parametrize("name", METRICS)
def test_a_killed_fit_ends_bit_for_bit_as_one_that_was_not(name: str, tmp_path: Path) -> None:
    """Examples in memory, averages and the best so far by its metric."""
    options = {} if name == "loss" else {"metric": METRICS[name], "mode": "max"}
    whole, trained = fit_language_model(tmp_path / "whole", **options)
    for at in (3, 8, 11):
        with pytest.raises(Killed):
            fit_language_model(tmp_path / "killed", [killing(at)], **options)
    resumed, again = fit_language_model(tmp_path / "killed", **options)
    assert (resumed.value, resumed.step, resumed.metric) == (whole.value, whole.step, whole.metric)
    assert same(resumed.weights, whole.weights)
    assert same(again.state_dict(), trained.state_dict())
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert repr(whole.history) == repr(resumed.history)  # some of it is NaN


def test_a_resume_by_another_metric_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit_language_model(tmp_path, [killing(5)])
    with pytest.raises(MetaplError, match="metric"):
        fit_language_model(tmp_path, metric=TokensRight(), mode="max")


# --------------------------------------------------------------------------------------------------------- refusals


REFUSED: dict[str, dict[str, Any]] = {
    "a text": {"metric": lambda outputs, batch: "high"},
    "a name": {"metric": "acuracy"},
    "no mode": {"metric": absolute, "mode": None},
    "a mode alone": {"mode": "min"},
    "no validation": {"metric": absolute, "validation": None},
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


# ------------------------------------------------------------------------------------------------ examples in memory


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


A, B = torch.randn(8, 5), torch.arange(8) % 3
AMBIGUOUS: list[dict[str, Any]] = [
    {"labeled": (A, B)},
    {"labeled": (A.numpy(), B.numpy())},
    {"unlabeled": A},
    {"labeled": {"x": A, "labels": B}},
    {"labeled": (A, B), "batch_size": 0},
    {"labeled": (A, B[:3]), "batch_size": 2},
    {"labeled": (A[:0], B[:0]), "batch_size": 2},
    {"labeled": [(A, B)], "outer": [(A, B)]},
    {"labeled": None},
]


@pytest.mark.parametrize("options", AMBIGUOUS, ids=range(len(AMBIGUOUS)))
def test_sources_that_may_be_two_things_are_refused(options: dict[str, Any]) -> None:
    trainer = single()
    with pytest.raises(MetaplError, match="labeled"):
        trainer.fit(**{"labeled": [(A, B)], "steps": 2, "progress": False, **options})
    assert trainer.steps_done == 0
