"""Networks that fill a card: their miniatures on the CPU, and the committed plan."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_runs import RESULTS

from metapl.guards.verification import check

pytestmark = [pytest.mark.docs, pytest.mark.usefixtures("as_scripts")]


def measured(name: str, *modes: str, done: Any = ()) -> list[Any]:
    """Return the rows of a miniature in these modes."""
    gpu_large = importlib.import_module("gpu_large")
    part = SimpleNamespace(network=name, modes=modes)
    found = []
    for rows in gpu_large.rows(part, list(done), "cpu", is_small=True):
        found += rows
    return found


@pytest.mark.parametrize(
    ("name", "mode", "order"),
    [
        ("EfficientNet-L2 twice", "reinforce", ""),
        ("EfficientNet-L2 twice", "forward", "tangent"),
        ("a billion weights, table", "difference", "outputs"),
        ("a billion weights, pair", "forward", "tangent"),
    ],
)
def test_a_miniature_is_verified_and_holds_what_was_planned(
    name: str, mode: str, order: str
) -> None:
    gpu_large = importlib.import_module("gpu_large")
    (row,) = measured(name, mode)
    assert row["verification"].startswith("right"), row
    assert row["order"] == order
    assert row["is_finite"]
    assert row["bytes"] == pytest.approx(row["planned_bytes"], rel=0.2)
    assert sum(row["planned_by_use"].values()) == row["planned_bytes"]
    assert row["seconds_per_example"] == pytest.approx(row["seconds"] / row["examples"])
    assert {"commit", "switches"} <= row["measured_on"].keys()
    cells = gpu_large.shown(row)
    assert cells[0] == f"{name}: `{mode}`"
    assert "planned)" in cells[1]


def test_a_row_says_that_a_large_network_was_not_verified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "MOST_WEIGHTS", 10)
    monkeypatch.setattr(check, "check_step", None)  # nothing is copied
    (row,) = measured("a billion weights, table", "forward")
    weights = row["teacher_weights"] + row["student_weights"]
    assert row["verification"] == f"not verified: networks of {weights:,} weights"


def test_what_does_not_fit_is_a_row_and_the_next_mode_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu_large = importlib.import_module("gpu_large")
    name = "a billion weights, table"
    measure = gpu_large.measured

    def too_large(setting: Any, mode: str, device: torch.device) -> Any:
        if mode == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB.\nmore")
        return measure(setting, mode, device)

    monkeypatch.setattr(gpu_large, "measured", too_large)
    first, second = measured(name, "forward", "none")
    assert first["reason"] == "stops: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GB."
    assert "out of memory" in gpu_large.shown(first)[1]
    assert "reason" not in second
    # Rows that are there are not measured again.
    assert measured(name, "forward", "none", done=[first, second]) == []


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_a_row_says_by_which_kernels_attention_ran(mode: str) -> None:
    """Of 320 tokens the math kernel takes a block of 256 and one of 64."""
    gpu_large = importlib.import_module("gpu_large")
    (whole,) = measured("attention at length 2048, default", mode)
    (blocks,) = measured("attention at length 2048, in blocks", mode)
    for row in (whole, blocks):
        assert row["verification"].startswith("right"), row
        assert row["bytes"] == pytest.approx(row["planned_bytes"], rel=0.2)
    assert blocks["attention"]["attention_math"] == 2 * whole["attention"]["attention_math"]
    assert "attention_math" in gpu_large.shown(blocks)[1]
    # All of unrolled is differentiated twice.
    has_fused = any("flash" in name for name in whole["attention"])
    assert has_fused == (mode == "forward")


def test_a_kernel_that_is_not_installed_is_a_row_with_its_reason() -> None:
    (row,) = measured("attention at length 2048, jvp-flash", "forward")
    assert row["reason"].startswith("stops: ")


def test_everything_that_is_measured_was_planned_and_fits_a_card_of_80_gigabytes() -> None:
    gpu_large = importlib.import_module("gpu_large")
    plan = json.loads(Path(RESULTS / "large_plan.json").read_text())
    for name in gpu_large.SETTINGS:
        for mode in gpu_large.MODES[name]:
            if gpu_large.ATTENTION.get(name) is gpu_large.by_jvp_flash:
                continue
            row = plan[f"{name}, {mode}"]
            assert 2e9 < row["planned_bytes"] < 75e9, (name, mode)
            assert row["tflop"] > 1


def test_the_table_is_that_of_the_plan_and_of_the_committed_rows() -> None:
    gpu_large = importlib.import_module("gpu_large")
    plan = json.loads(gpu_large.PLAN.read_text())
    text = gpu_large.table(plan, gpu_large.committed_rows())
    assert gpu_large.TABLE_OF_PLAN.read_text() == text, "python benchmarks/gpu.py --plan"
    assert "| a billion weights, table | `none` |" in text
