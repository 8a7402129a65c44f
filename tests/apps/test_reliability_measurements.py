"""What benchmarks/reliability.py measures and fits, beside its definitions written out."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_runs import RESULTS
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.attribution.calibration import CALIBRATION
from metapl.attribution.weighted import WeightedTraining

pytestmark = pytest.mark.usefixtures("as_scripts")

N = 24
STEPS = 6


def data(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 6, generator=draw).double()
    return inputs, torch.randint(0, 3, (rows,), generator=draw)


TRAIN = data(N, 0)
OUTER = data(5, 1)
FALLING = {"lr": 0.2 * (1 - torch.arange(STEPS, dtype=torch.float64)[:, None] / STEPS)}


def student(*, has_dropout: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.Dropout(0.3) if has_dropout else nn.BatchNorm1d(8)
    return nn.Sequential(nn.Linear(6, 8), middle, nn.Tanh(), nn.Linear(8, 3)).double()


def training_of(make: Any, network: nn.Module, **more: Any) -> Any:
    """Return a training of six steps of a class."""
    torch.manual_seed(3)
    return make(
        network,
        TRAIN,
        OUTER,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9),
        steps=STEPS,
        batch_size=8,
        settings=FALLING,
        generator=None,
        problem=None,
        clip_norm=None,
        **more,
    )


def gradient_of(network: nn.Module, numbers: Tensor) -> Tensor:
    loss = F.cross_entropy(network(TRAIN[0][numbers]), TRAIN[1][numbers])
    gradients = torch.autograd.grad(loss, [*network.parameters()])
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_the_curvature_is_how_much_steps_change_their_own_gradients() -> None:
    script = importlib.import_module("reliability")
    training = training_of(script.ProbedTraining, student())
    training.repeated(torch.ones(N), [training.problem])

    network = student()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9)
    changes = list[float]()
    for numbers, rate in zip(training.order, FALLING["lr"].flatten().tolist(), strict=True):
        gradient = gradient_of(network, numbers)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(network(TRAIN[0][numbers]), TRAIN[1][numbers]).backward()
        optimizer.step()
        change = gradient_of(network, numbers) - gradient
        changes.append(float(change.norm() / gradient.norm()))
    assert training.changes == pytest.approx(changes, rel=1e-9)
    assert min(changes) > 0.001
    assert script.curvature_of(changes, STEPS) == pytest.approx(sum(changes))


def test_probes_leave_no_trace_in_masks_and_statistics() -> None:
    script = importlib.import_module("reliability")
    for network in (student(), student(has_dropout=True)):
        training = training_of(WeightedTraining, network)
        plain, _ = training.repeated(torch.ones(N), [training.problem])
        probing = training_of(script.ProbedTraining, network)
        probed, _ = probing.repeated(torch.ones(N), [training.problem])
        assert len(probing.changes) == STEPS
        assert all(torch.equal(t, probed[name]) for name, t in plain.items())


def test_probed_steps_are_spread_and_end_with_the_last() -> None:
    script = importlib.import_module("reliability")
    assert sorted(script.probed_steps(5)) == [0, 1, 2, 3, 4]
    assert sorted(script.probed_steps(40)) == [*range(1, 40, 2)]
    assert len(script.probed_steps(501)) == script.PROBES
    assert max(script.probed_steps(501)) == 500


def test_weights_are_kept_after_the_milestones_of_every_training() -> None:
    script = importlib.import_module("reliability")
    training = training_of(script.Milestones, student(), milestones=[2, STEPS])
    thetas, _ = training.trained_along(0.1, None, STEPS, progress=False)
    early, _ = training_of(WeightedTraining, student()).trained_along(0.1, None, 2, progress=False)
    assert all(map(torch.equal, training.weights_after[STEPS], thetas))
    assert all(map(torch.equal, training.weights_after[2], early))


@pytest.mark.parametrize("steps", [3, STEPS])
def test_first_scores_are_those_of_an_attribution_of_these_steps(steps: int) -> None:
    script = importlib.import_module("reliability")
    network = student(has_dropout=True)
    training = training_of(WeightedTraining, network)
    scores = script.scores_of_first_steps(training, training.order[:steps], FALLING)
    torch.manual_seed(3)
    attribution = metapl.attribute(
        network,
        TRAIN,
        OUTER,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9),
        steps=steps,
        batch_size=8,
        settings={"lr": FALLING["lr"][:steps]},
    )
    assert torch.equal(attribution.order, training.order[:steps])
    torch.testing.assert_close(scores, attribution.scores, rtol=1e-12, atol=0.0)

    rounded = script.scores_of_first_steps(
        training, training.order[:steps], FALLING, script.other_precision(training)
    )
    assert not torch.equal(rounded, scores)
    torch.testing.assert_close(rounded, scores, rtol=1e-3, atol=1e-6)
    assert next(network.parameters()).dtype == torch.float64


def test_the_other_precision_is_the_next_wider_one() -> None:
    script = importlib.import_module("reliability")

    def other(network: nn.Module) -> torch.dtype:
        return script.other_precision(training_of(WeightedTraining, network))

    assert other(student()) == torch.float32
    assert other(student().float()) == torch.float64
    assert other(student().bfloat16()) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert other(student().float()) == torch.float32


def test_an_agreement_is_the_rank_correlation_of_what_was_drawn() -> None:
    script = importlib.import_module("reliability")
    first = torch.randn(9, generator=torch.Generator().manual_seed(0))
    second = first + torch.randn(9, generator=torch.Generator().manual_seed(1))
    is_drawn = script.drawn_in(torch.tensor([[0, 1, 2], [5, 7, 2]]), 9)
    assert is_drawn.tolist() == [True, True, True, False, False, True, False, True, False]
    expected = spearmanr(first[is_drawn], second[is_drawn])[0]
    assert script.rank_agreement(first, second, is_drawn) == pytest.approx(expected)
    assert math.isnan(script.rank_agreement(first, second, script.drawn_in(torch.tensor([1]), 9)))


def row(name: str, bend: float, *correlations: float) -> dict[str, Any]:
    return {"name": name, "steps": 1, "half": {"bend": bend}, "correlations": correlations}


def test_a_training_is_predicted_by_the_others_and_the_interval_holds_four_of_five(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = importlib.import_module("reliability")
    monkeypatch.setattr(script, "correlations_of", lambda row: row["correlations"])
    rows = [row(str(n), 10.0**-n, math.tanh(0.3 * n), math.tanh(0.3 * n + 0.1)) for n in range(5)]
    rows[2]["correlations"] = (math.tanh(1.5),)
    names = [script.HALF_BEND]
    predictions = script.predicted_without_each(rows, names)

    x = np.array([-float(n) for n in range(5)])
    y = np.array([0.05, 0.35, 1.5, 0.95, 1.25])
    others = np.array([0, 1, 3, 4])
    centered = (x[others] - x[others].mean()) / x[others].std()
    slope = (centered * y[others]).sum() / ((centered**2).sum() + script.RIDGE)
    by_hand = y[others].mean() + slope * (x[2] - x[others].mean()) / x[others].std()
    assert predictions[2] == pytest.approx(by_hand)

    # 80 % of six trainings are 4.8, so that the farthest of the five is the half width.
    width = script.half_width(rows, predictions, 0.8)
    farthest = max(
        abs(script.fisher(correlation) - prediction)
        for one_row, prediction in zip(rows, predictions, strict=True)
        for correlation in one_row["correlations"]
    )
    assert width == pytest.approx(farthest)
    assert script.half_width(rows[:2], predictions[:2], 0.8) == math.inf
    assert script.fisher(1.0) == script.fisher(0.98) == -script.fisher(-1.0)


def test_the_coefficients_are_those_of_the_committed_rows(tmp_path: Path) -> None:
    script = importlib.import_module("reliability")
    programs = importlib.import_module("ordinary").PROGRAMS
    ordinary_rows = script.read_ordinary(RESULTS / "ordinary.jsonl")
    assert [one_row["name"] for one_row in ordinary_rows] == [*programs]
    fitted = script.rows_of_line(script.read(RESULTS / "reliability.jsonl"), ordinary_rows)
    assert script.calibrated(fitted) == CALIBRATION
    of_script = len(script.CALIBRATION) + len(script.UNSEEN) + len(script.SECOND)
    assert len(fitted) == CALIBRATION.trainings == of_script + len(programs)
    copied = tmp_path / "calibration.py"
    source = Path(importlib.import_module("metapl.attribution.calibration").__file__ or "")
    copied.write_text(source.read_text().replace(f"{CALIBRATION.slope}", "0.0"))
    script.write_calibration(copied, CALIBRATION)
    assert copied.read_text() == source.read_text()


def test_a_calibration_gives_what_its_regression_gives() -> None:
    script = importlib.import_module("reliability")
    rows = script.of_kind(script.read(RESULTS / "reliability.jsonl"), "calibration")
    features, targets = script.matrices(rows, script.OF_LINE)
    line = script.ridge(features, targets)
    x, y = (features - features.mean(0)) / features.std(0), targets - targets.mean()
    # The gradient of the ridge's loss is zero at its slopes.
    slopes = line.slopes * features.std(0)
    assert x.T @ (x @ slopes - y) + script.RIDGE * slopes == pytest.approx(np.zeros(2), abs=1e-9)
    calibration = script.calibrated(rows)
    for number, one_row in enumerate(rows):
        estimate = script.expected_of(one_row, calibration)
        expected = line.at(features[number : number + 1])[0]
        assert math.atanh(estimate.correlation) == pytest.approx(expected, abs=1e-3)
    bend_alone = script.calibrated(rows, script.OF_FIRST_LINES)
    assert bend_alone.slope_of_steps == 0.0
    assert script.calibrated(rows).slope_of_steps != 0.0


def test_the_page_says_the_line_and_its_errors() -> None:
    script = importlib.import_module("reliability")
    path = RESULTS.parents[1] / "docs" / "studies" / "reliability.md"
    page = " ".join(path.read_text().split())
    bend = f"{-CALIBRATION.slope:.2f} log10(bend)"
    steps = f"{-CALIBRATION.slope_of_steps:.2f} log10(K)"
    assert f"z = {CALIBRATION.intercept:.2f} − {bend} − {steps}" in page

    rows = script.read(RESULTS / "reliability.jsonl")
    fitted = script.rows_of_line(rows, script.read_ordinary(RESULTS / "ordinary.jsonl"))
    error = script.error_of(fitted, script.OF_LINE)
    misses = script.predicted_without_each(fitted, script.OF_LINE)
    misses -= np.array([script.target_of(one_row) for one_row in fitted])
    assert error == pytest.approx(math.sqrt((misses**2).mean()))
    of_study = math.sqrt((misses[:43] ** 2).mean())
    of_ordinary = math.sqrt((misses[43:] ** 2).mean())
    assert (
        f"the error of z is {error:.2f} ({of_study:.2f} on the 43 of the study's kind, "
        f"{of_ordinary:.2f} on the 24 ordinary ones)" in page
    )
    bend_alone = script.error_of(fitted, script.OF_FIRST_LINES)
    spread = script.spread_of(fitted)
    assert (
        f"With the bend alone it is {bend_alone:.2f}, and without any measurement {spread:.2f}."
        in page
    )
    docstring = " ".join((metapl.reliability.__doc__ or "").split())
    assert f"have an error of {error:.2f} in Fisher's z" in docstring
    # A constant is the strongest simple way on the trainings that were declared.
    declared = script.of_kind(script.read(RESULTS / "ordinary.jsonl"), "unseen")
    measured = [script.fisher(row["correlation"]) for row in declared]
    of_line = root_mean_square(measured, [script.fisher(row["expected"][0]) for row in declared])
    _, fitted_z = script.matrices(fitted, script.OF_LINE)
    errors = [
        root_mean_square(measured, [constant] * len(declared))
        for constant in (float(fitted_z.mean()), float(statistics.median(fitted_z)))
    ]
    assert f"The error of z is {of_line:.2f}." in page
    assert "the mean of the 67 has {:.2f} and their median {:.2f},".format(*errors) in page


def root_mean_square(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the root of the mean squared difference."""
    return math.sqrt(statistics.fmean((a - b) ** 2 for a, b in zip(values, others, strict=True)))


def test_the_trainings_that_test_the_line_are_other_ones_and_are_counted_as_they_fell() -> None:
    script = importlib.import_module("reliability")
    settings = [script.setting_of(name) for name, _, _ in script.CALIBRATION]
    tests = [*script.UNSEEN.values(), *script.SECOND.values()]
    assert len(tests) == 12
    assert all(setting not in settings for setting in tests)
    assert all(tests.count(setting) == 1 for setting in tests)

    rows = script.read(RESULTS / "reliability.jsonl")
    assert [one_row["name"] for one_row in script.of_kind(rows, "unseen")] == [*script.UNSEEN]
    second = script.of_kind(rows, "second")
    assert {one_row["name"] for one_row in second} == {*script.SECOND}
    # The coefficients of the second line, as the library had them when these were run.
    inside = 0
    for one_row in second:
        z = 0.3963 - 1.0245 * math.log10(one_row["half"]["bend"])
        high = math.tanh(z + 0.6084)
        is_below_end = one_row["correlation"] <= high or high >= script.HIGHEST
        inside += math.tanh(z - 0.6084) <= one_row["correlation"] and is_below_end
    assert f"Of the second 6, {inside} are inside." in script.table_of_tests(rows)
