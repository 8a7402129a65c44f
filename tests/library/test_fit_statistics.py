"""A fit validates and keeps networks with batch-norm statistics of given inputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl import MetaplError

Batch = tuple[Tensor, Tensor]


def rows(seed: int, shift: float) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 6, generator=draw) + shift
    return x, (x[:, 0] > shift).long()


def trainer() -> metapl.LossTrainer:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return metapl.LossTrainer(network, optimizer=torch.optim.SGD(network.parameters(), lr=0.3))


# Training sees other inputs than those that are predicted.
TRAINED_ON = [rows(seed, shift=3.0) for seed in range(4)]
PLAIN = [rows(seed, shift=0.0)[0] for seed in (10, 11)]
VALIDATION = rows(12, shift=0.0)


def with_statistics_of(network: nn.Module, batches: list[Tensor]) -> Any:
    """Return a copy whose norm has the mean of the batches' statistics, by hand."""
    copied: Any = copy.deepcopy(network).eval()
    hidden = [copied[0](x).detach() for x in batches]
    copied[1].running_mean.copy_(torch.stack([h.mean(0) for h in hidden]).mean(0))
    copied[1].running_var.copy_(torch.stack([h.var(0) for h in hidden]).mean(0))
    return copied


def fit(one: metapl.LossTrainer, **options: Any) -> metapl.FitResult:
    return one.fit(
        TRAINED_ON, steps=12, validate_every=3, validation=VALIDATION, progress=False, **options
    )


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_networks_are_validated_and_kept_with_these_statistics(ema_decay: float | None) -> None:
    seen: list[float] = []
    expected: list[float] = []
    one = trainer()

    def note(step: int, row: Any, fitted: Any) -> None:
        if "student_validation_accuracy" in row:
            seen.append(row["student_validation_accuracy"])
            by_hand = with_statistics_of(fitted.student, PLAIN)
            right = by_hand(VALIDATION[0]).argmax(1) == VALIDATION[1]
            expected.append(float(right.float().mean()))

    result = fit(one, batch_norm=PLAIN, callbacks=[note], ema_decay=ema_decay)
    if ema_decay is None:
        assert seen == pytest.approx(expected)
    kept = with_statistics_of(one.student, PLAIN).state_dict()
    for name, t in one.student.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(t, kept[name])
    assert result.value == max(seen)
    assert one.evaluate(VALIDATION).value == pytest.approx(result.value)


def test_the_steps_are_those_of_a_fit_without_them() -> None:
    weights = []
    for batch_norm in (None, PLAIN):
        one = trainer()
        fit(one, batch_norm=batch_norm, select=False)
        weights.append([p.detach() for p in one.student.parameters()])
    assert all(map(torch.equal, *weights))


def test_a_resumed_fit_keeps_the_same_network(tmp_path: Path) -> None:
    def stop(step: int, row: Any, fitted: Any) -> None:
        if step == 8:
            raise KeyboardInterrupt

    whole, stopped, resumed = trainer(), trainer(), trainer()
    fit(whole, batch_norm=PLAIN, log_every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(
            stopped,
            batch_norm=PLAIN,
            log_every=1,
            save_every=2,
            out=tmp_path / "run",
            callbacks=[stop],
        )
    fit(resumed, batch_norm=PLAIN, log_every=1, save_every=2, out=tmp_path / "run", resume=True)
    for name, t in whole.student.state_dict().items():
        assert torch.equal(t, resumed.student.state_dict()[name]), name


def test_inputs_that_cannot_be_read_again_are_refused() -> None:
    one = trainer()
    before = copy.deepcopy(one.student.state_dict())
    x = PLAIN[0]
    with_nan = x.clone()
    with_nan[0, 0] = torch.nan
    wrong: list[tuple[Any, str]] = [
        (iter(PLAIN), "batch_norm is .*; expected batches of inputs"),
        (x, "batch_norm is .*; expected batches of inputs"),
        (True, "batch_norm is .*; expected batches of inputs"),
        ([], "batch_norm has no batches; expected"),
        ([x[:0]], r"batch_norm has the batch .*\(0, 6\)"),
        ([x.double()], "batch_norm has the batch .*float64.*in torch.float32"),
        (TRAINED_ON, "batch_norm has the batch"),
        ([with_nan], "batch_norm has a batch with NaN"),
    ]
    for batch_norm, words in wrong:
        with pytest.raises(MetaplError, match=words) as refused:
            fit(one, batch_norm=batch_norm)
        assert "\n" not in str(refused.value)
    assert all(torch.equal(t, before[name]) for name, t in one.student.state_dict().items())


def test_a_norm_in_evaluation_keeps_its_statistics() -> None:
    one = trainer()
    norm: Any = one.student[1]
    norm.eval()
    norm.running_mean.fill_(0.5)
    fit(one, batch_norm=PLAIN)
    assert torch.equal(norm.running_mean, torch.full((8,), 0.5))


def test_a_loader_of_these_inputs_draws_nothing_from_the_steps() -> None:
    weights = []
    loader = DataLoader(TensorDataset(*PLAIN), batch_size=8, shuffle=True, collate_fn=first_column)
    for batch_norm in (PLAIN, loader):
        one = trainer()
        one.student.insert(1, nn.Dropout(0.5))
        fit(one, batch_norm=batch_norm, select=False)
        weights.append([p.detach() for p in one.student.parameters()])
    assert all(map(torch.equal, *weights))


def first_column(rows: list[Any]) -> Tensor:
    return torch.stack([row[0] for row in rows])


class Tracking(nn.Module):
    """A network beside the mean of its last inputs, which no state_dict has."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.register_buffer("mean", torch.zeros(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = x.mean(0)
        logits: Tensor = self.layer(x - self.mean)
        return logits


def test_a_kept_network_has_the_buffers_that_no_state_dict_has() -> None:
    torch.manual_seed(0)
    network = Tracking()
    one = metapl.LossTrainer(network, optimizer=torch.optim.SGD(network.parameters(), lr=0.3))
    shifts = [0.0, 9.0, -9.0, 4.0]
    result = one.fit(
        [rows(number, shift) for number, shift in enumerate(shifts)],
        steps=12,
        validate_every=1,
        validation=VALIDATION,
        progress=False,
    )
    assert result.step < 12
    assert one.evaluate(VALIDATION).value == result.value
