"""What is expected of scores before they are computed, beside its definition written out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError
from metapl.attribution.calibration import CALIBRATION, Calibration
from metapl.attribution.reliability import Reliability, bend_of, predicted

N = 24
STEPS = 10
LINE = Calibration(
    intercept=0.0,
    slope=-1.0,
    slope_of_steps=-0.25,
    least=0.01,
    most=1.0,
    least_steps=1,
    most_steps=1000,
    half_width=0.5,
    highest=0.98,
    trainings=3,
)


def data(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 6, generator=draw).double()
    return inputs, torch.randint(0, 3, (rows,), generator=draw)


TRAIN = data(0, N)
OUTER = data(1, 5)


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).double()


def estimated(rate: float = 0.1, **changed: Any) -> Reliability:
    """Return the estimate of a training of ten steps, but for what is changed."""
    network = changed.pop("student", None) or student()
    options: dict[str, Any] = {
        "train": TRAIN,
        "outer": OUTER,
        "optimizer": torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9),
        "steps": STEPS,
        "batch_size": 8,
        **changed,
    }
    return metapl.reliability(network, **options)


def trained(order: Tensor, weights: Tensor, rates: list[float]) -> Tensor:
    """Return the weights after a plain loop over weighted examples, as a vector."""
    network = student()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for numbers, rate in zip(order, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        losses = F.cross_entropy(network(TRAIN[0][numbers]), TRAIN[1][numbers], reduction="none")
        (weights[numbers] * losses).mean().backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(network.parameters()).detach()


def test_the_bend_is_its_definition_over_the_first_half_of_a_schedule() -> None:
    rates = [0.3 * (1 - step / STEPS) for step in range(STEPS)]
    settings = {"lr": torch.tensor(rates, dtype=torch.float64)[:, None]}
    estimate = estimated(settings=settings)

    draw = torch.Generator().manual_seed(0)
    passes = [torch.randperm(N, generator=draw) for _ in range(4)]
    order = torch.cat(passes)[: STEPS * 8].view(STEPS, 8)[: STEPS // 2]
    # In float32, as the library draws it.
    v = torch.randn(N, generator=torch.Generator().manual_seed(0))
    thetas = [trained(order, 1 + h * v, rates[: STEPS // 2]) for h in (0.0, 0.1, 0.2)]
    bent = sum((a - 2 * b + c) ** 2 for a, b, c in zip(*thetas, strict=True))
    moved = sum((c - a) ** 2 for a, _, c in zip(*thetas, strict=True))
    assert estimate.bend == pytest.approx(math.sqrt(bent / moved), rel=1e-9)
    assert 0.001 < estimate.bend < 0.5
    assert -1 <= estimate.agreement <= 1


def test_a_bend_is_zero_on_a_line_and_the_root_of_three_of_chance() -> None:
    start = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(5000, generator=torch.Generator().manual_seed(1)).double()
    assert bend_of(start, start + direction, start + 2 * direction) < 1e-6
    chance = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(2))
    assert bend_of(*chance) == pytest.approx(math.sqrt(3), rel=0.02)
    assert math.isnan(bend_of(start, start, start))


def test_the_line_says_the_correlation_and_its_interval() -> None:
    estimate = predicted(0.1, 0.9, 1, LINE)
    assert (estimate.correlation, estimate.low, estimate.high) == pytest.approx(
        (math.tanh(1.0), math.tanh(0.5), math.tanh(1.5))
    )
    assert str(estimate) == "expect a rank correlation of about 0.76 (0.46 to 0.91) with retraining"
    longer = predicted(0.1, 0.9, 100, LINE)
    assert (longer.correlation, longer.low, longer.high) == pytest.approx(
        (math.tanh(0.5), math.tanh(0.0), math.tanh(1.0)), abs=1e-12
    )
    near_zero = str(predicted(1.0, 0.0, 1, LINE))
    assert near_zero == "expect a rank correlation of about 0.00 (-0.46 to 0.46) with retraining"


def test_an_interval_ends_at_one_where_the_line_cannot_tell_correlations_apart() -> None:
    assert predicted(0.01, 0.9, 1, LINE).high == 1.0
    assert str(predicted(0.01, 0.9, 1, LINE)).endswith("0.96 (0.91 to 1.00) with retraining")
    just_below = LINE._replace(half_width=math.atanh(0.979) - 1)
    assert predicted(0.1, 0.9, 1, just_below).high == pytest.approx(0.979)


@pytest.mark.parametrize(("bend", "nearest"), [(0.0, 0.01), (0.001, 0.01), (1.7, 1.0)])
def test_a_bend_that_was_not_calibrated_is_said(bend: float, nearest: float) -> None:
    estimate = predicted(bend, 1.0, 10, LINE)
    inside = predicted(nearest, 1.0, 10, LINE)
    assert estimate.is_bend_outside
    assert not estimate.are_steps_outside
    assert not inside.is_bend_outside
    assert (estimate.correlation, estimate.low) == (inside.correlation, inside.low)
    assert str(estimate) == f"{inside}; the bend, {bend:.2g}, is outside of what was calibrated"


def test_a_number_of_steps_that_was_not_calibrated_is_said() -> None:
    line = LINE._replace(least_steps=5)
    for steps, nearest in ((2, 5), (40_000, 1000)):
        estimate = predicted(0.1, 1.0, steps, line)
        inside = predicted(0.1, 1.0, nearest, line)
        assert estimate.are_steps_outside
        assert not estimate.is_bend_outside
        assert not inside.are_steps_outside
        assert (estimate.correlation, estimate.low) == (inside.correlation, inside.low)
        said = f"; the number of steps, {steps:,}, is outside of what was calibrated"
        assert str(estimate) == f"{inside}{said}"
    neither = str(predicted(2.0, 1.0, 40_000, line))
    assert neither.endswith(
        "retraining; the bend, 2, and the number of steps, 40,000, are outside of what was "
        "calibrated"
    )


def test_the_estimate_is_of_all_steps() -> None:
    estimate = estimated(steps=40)
    assert estimate.steps == 40
    assert estimate == predicted(estimate.bend, estimate.agreement, 40, CALIBRATION)


def test_more_is_expected_of_a_smoother_and_of_a_shorter_training() -> None:
    assert CALIBRATION.slope < 0
    assert CALIBRATION.slope_of_steps < 0
    smooth = estimated(rate=0.05, steps=40)
    rough = estimated(rate=3.0, steps=40)
    assert rough.bend > 5 * smooth.bend
    assert rough.correlation < smooth.correlation
    assert smooth.low < smooth.correlation < smooth.high


def test_nothing_moves_and_attribute_has_the_order_of_the_estimate() -> None:
    network = student()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    weights = copy.deepcopy(network.state_dict())
    generator = torch.Generator().manual_seed(7)
    drawn = torch.get_rng_state()
    options: dict[str, Any] = {"student": network, "optimizer": optimizer, "generator": generator}
    first = estimated(**options)
    assert estimated(**options) == first
    assert estimated(**{**options, "generator": torch.Generator().manual_seed(8)}) != first
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(7).get_state())
    assert all(torch.equal(t, weights[name]) for name, t in network.state_dict().items())
    assert not optimizer.state
    assert all(p.grad is None for p in network.parameters())


def refusal(**changed: Any) -> str:
    """Return the message of an estimate that is refused, which is one line."""
    with pytest.raises(MetaplError) as refused:
        estimated(**changed)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_what_cannot_be_estimated_is_refused_in_a_line() -> None:
    assert "0.weight is in bfloat16" in refusal(student=student().bfloat16())
    assert "copy.deepcopy(student).float()" in refusal(student=student().half())
    assert "bend by nan" in refusal(rate=1e300, steps=40)
    assert "bend by nan" in refusal(rate=0.0)
    assert "steps" in refusal(steps=0)
    assert "train" in refusal(train=3)
    assert "generator" in refusal(generator=3)
