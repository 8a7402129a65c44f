"""What benchmarks/ordinary.py measures, and what the page says of it."""

from __future__ import annotations

import importlib
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import metapl
from metapl.attribution.calibration import CALIBRATION
from metapl.attribution.reliability import predicted

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the benchmark as a module, as its command imports it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("ordinary")
    for name in ("ordinary", "harness"):
        sys.modules.pop(name, None)


def test_a_removed_example_has_no_weight_in_a_batch_of_the_same_size(script: Any) -> None:
    data = script.table("wine")
    program = script.Program(lambda: data, lambda: nn.Linear(13, 3), script.sgd(0.1), 32, 1)
    order = torch.arange(6).view(2, 3)
    training = script.Training(program, data, order)
    torch.manual_seed(0)
    network = nn.Linear(13, 3)
    inputs, labels = data.train
    for numbers in order.tolist():
        kept = [number for number in numbers if number != 4]
        network.zero_grad()
        loss = nn.functional.cross_entropy(network(inputs[kept]), labels[kept], reduction="sum")
        (loss / 3).backward()
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.1 * p.grad
    trained = training.trained([4])
    for p, q in zip(network.parameters(), trained.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore:scores may not say what removals do")
def test_a_rate_falls_as_half_a_cosine_in_the_loop_as_in_the_library(script: Any) -> None:
    data = script.table("wine")
    hidden = partial(script.two_hidden_layers, 13, 3, nn.GELU, 8)
    falling = script.Program(lambda: data, hidden, script.adamw(0.02), 32, 1, falls=True, seed=3)
    rates = falling.rates(6)
    assert rates.shape == (6, 1)
    assert rates[0] == pytest.approx(0.02)
    assert rates[3] == pytest.approx(0.01)
    assert rates[5] < 0.002
    constant = replace(falling, falls=False)
    assert constant.rates(6).flatten().tolist() == pytest.approx([0.02] * 6)
    student, optimizer = falling.start()
    found = metapl.attribute(
        student,
        data.train,
        data.judging,
        optimizer=optimizer,
        settings={"lr": rates},
        steps=6,
        batch_size=32,
    )
    trained = script.Training(falling, data, found.order).trained()
    at_a_constant_rate = script.Training(constant, data, found.order).trained()
    for name, p in trained.named_parameters():
        assert (p - found.student_params[name]).abs().max() < 1e-5
        assert (p - at_a_constant_rate.get_parameter(name)).abs().max() > 1e-3
    other_start, _ = replace(falling, seed=0).start()
    assert not torch.equal(other_start[0].weight, student[0].weight)


def test_the_area_is_the_share_of_pairs(script: Any) -> None:
    is_wrong = torch.tensor([True, False, True, False, False])
    suspicion = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])
    # Of six pairs five are right, and one is even.
    assert script.area(is_wrong, suspicion) == pytest.approx(5.5 / 6)


def test_the_programs_that_test_the_coefficients_are_other_ones(script: Any) -> None:
    assert len(script.UNSEEN_PROGRAMS) == 10
    assert not {*script.UNSEEN_PROGRAMS} & {*script.PROGRAMS}
    assert not {*script.UNSEEN_PROGRAMS.values()} & {*script.PROGRAMS.values()}

    rows = script.rows_of_kind(script.read(script.RAW, "correlation"), script.UNSEEN)
    assert [row["name"] for row in rows] == [*script.UNSEEN_PROGRAMS]
    assert sum(row["steps"] > 200 for row in rows) == 4
    of_then = CALIBRATION._replace(half_width=0.6183)
    for row in rows:
        # The agreement takes no part.
        estimate = predicted(row["bend"], 0.0, row["steps"], of_then)
        assert row["expected"] == pytest.approx(
            [estimate.correlation, estimate.low, estimate.high], abs=1e-9
        )
    results = (ROOT / "benchmarks" / "results" / "ordinary.md").read_text()
    assert script.table_of_tests(rows) in results
    inside = sum(map(script.is_inside, rows))
    page = " ".join((ROOT / "docs" / "studies" / "reliability.md").read_text().split())
    assert f"Of these ten, {inside} fell into the interval" in page

    second_line = CALIBRATION._replace(
        intercept=0.3963, slope=-1.0245, slope_of_steps=0.0, half_width=0.6084, most=1.733
    )
    inside_of_second = 0
    error = 0.0
    error_of_second = 0.0
    for row in rows:
        z = math.atanh(min(row["correlation"], CALIBRATION.highest))
        estimate = predicted(row["bend"], 0.0, row["steps"], second_line)
        inside_of_second += estimate.low <= row["correlation"] <= estimate.high
        error += (math.atanh(row["expected"][0]) - z) ** 2 / len(rows)
        error_of_second += (math.atanh(estimate.correlation) - z) ** 2 / len(rows)
    assert (
        f"The error of z is {math.sqrt(error):.2f}. The line before, of the bend alone, would have "
        f"held {inside_of_second} of them, with an error of {math.sqrt(error_of_second):.2f}."
        in page
    )
    ahead = sum(row["changes"]["harmful"] < row["changes"]["largest loss"] for row in rows)
    assert f"of the ten declared trainings in {ahead}, so that nothing is shown;" in page


def test_the_interval_of_today_held_what_was_declared(script: Any) -> None:
    assert len(script.DECLARED_PROGRAMS) == 12
    before = {**script.UNSEEN_PROGRAMS, **script.PROGRAMS}
    assert not {*script.DECLARED_PROGRAMS} & {*before}
    rows = script.rows_of_kind(script.read(script.RAW, "correlation"), script.DECLARED)
    assert [row["name"] for row in rows] == [*script.DECLARED_PROGRAMS]
    measured = [math.atanh(min(row["correlation"], CALIBRATION.highest)) for row in rows]
    error = 0.0
    for row, z in zip(rows, measured, strict=True):
        estimate = predicted(row["bend"], 0.0, row["steps"], CALIBRATION)
        assert row["expected"] == pytest.approx(
            [estimate.correlation, estimate.low, estimate.high], abs=1e-9
        )
        error += (math.atanh(min(estimate.correlation, CALIBRATION.highest)) - z) ** 2 / len(rows)
    inside = sum(map(script.is_inside, rows))
    assert inside >= 10
    results = (ROOT / "benchmarks" / "results" / "ordinary.md").read_text()
    assert script.table_of_tests(rows) in results
    page = " ".join((ROOT / "docs" / "studies" / "reliability.md").read_text().split())
    assert f"10 had to be inside. {inside} are, and {len(rows) - inside} lies above it" in page
    assert f"The error of z is {math.sqrt(error):.2f}, that of the mean of the 67" in page
    ahead = sum(row["changes"]["harmful"] < row["changes"]["largest loss"] for row in rows)
    assert f"of the twelve later ones in {ahead}." in page
    docstring = " ".join((metapl.reliability.__doc__ or "").split())
    said = f"Of twelve trainings that were named before they were run it held {inside};"
    assert said in docstring


def test_the_page_says_what_the_rows_say(script: Any) -> None:
    rows = script.rows_of_kind(script.read(script.RAW, "correlation"))
    assert [row["name"] for row in rows] == [*script.PROGRAMS]
    results = (ROOT / "benchmarks" / "results" / "ordinary.md").read_text()
    assert script.table_of_programs(rows) in results
    page = " ".join((ROOT / "docs" / "studies" / "reliability.md").read_text().split())
    inside = sum(map(script.is_inside, rows))
    above = sum(row["correlation"] > row["expected"][2] for row in rows)
    median = statistics.median(row["correlation"] for row in rows)
    assert (
        f"{inside} of the measured correlations are inside the interval, {above} above it and "
        f"{len(rows) - inside - above} below it; their median is {median:.2f}." in page
    )
    changes = [row["changes"] for row in rows]
    lower = sum(change["harmful"] < 0 for change in changes)
    ahead = sum(change["harmful"] < change["largest loss"] for change in changes)
    assert f"In {lower} of the {len(rows)} the test loss was lower without it, and in" in page
    assert f"in {ahead} lower than without the tenth of the largest loss" in page
    by_loss = sum(row["area of losses"] > row["area of scores"] for row in rows)
    assert f"But in {by_loss} the loss found the wrong examples better" in page
    rough = [row["correlation"] for row in rows if "metasmoothness" in row["warned of"]]
    assert (
        f"Metasmoothness warned of {len(rough)} of these {len(rows)}, whose correlations have a "
        f"median of {statistics.median(rough):.2f}." in page
    )
    below = [row for row in rows if "below 0" in row["warned of"]]
    first, second = sorted(row["correlation"] for row in below)
    assert all("momentum 0.9" in row["name"] for row in below)
    assert f"that have a momentum of 0.9 ({first:.2f} and {second:.2f})." in page


def test_the_smoothed_trainings_are_those_of_the_rows(script: Any) -> None:
    rows = script.rows_of_kind(script.read(script.RAW, "correlation"), script.SMOOTHED)
    assert [row["name"] for row in rows] == [*script.SMOOTHED_PROGRAMS]
    results = (ROOT / "benchmarks" / "results" / "ordinary.md").read_text()
    assert script.table_of_smoothed(rows) in results
    for program in script.SMOOTHED_PROGRAMS.values():
        _, optimizer = program.start()
        assert optimizer.param_groups[0]["eps"] == 1e-8
    page = " ".join((ROOT / "docs" / "studies" / "smoothing.md").read_text().split())
    correlations = [row["correlations"] for row in rows]
    exact, smoothed = (statistics.mean(row[c] for row in correlations) for c in ("0", "0.3"))
    ahead = sum(row["0.3"] > row["0"] for row in correlations)
    assert f"is {exact:.2f} exact and {smoothed:.2f} smoothed, and {ahead} of them gain" in page
    by_name = {row["name"]: row["correlations"] for row in rows}

    def said(name: str) -> list[float]:
        rows_of_seeds = [by_name[f"{name}, seed {seed}"] for seed in (0, 1)]
        return [row[c] for c in ("0", "0.3") for row in rows_of_seeds]

    a, b, c, d = said("digits, perceptron, AdamW 0.001")
    assert f"A perceptron loses {a - c:.2f} and {b - d:.2f};" in page
    a, b, c, d = said("docstrings, small start, AdamW 0.001")
    assert f"{a:.2f} and {b:.2f} become {c:.2f} and {d:.2f}." in page
    assert f"In {len(rows)} trainings by AdamW" in page
