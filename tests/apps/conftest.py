"""What holds in every test of the application."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_runs import as_scripts
from PIL import Image
from test_bits import one_thread
from tiny_runs import colors, digit, run, ten_digits, three_colors, tiny

from metapl.apps import report
from metapl.networks import exports
from metapl.networks.exports import ONNX, PROGRAM

__all__ = ["as_scripts", "colors", "digit", "run", "ten_digits", "three_colors", "tiny"]  # fixtures

DRAW = report.draw
sys.path.append(str(Path(__file__).parents[2] / "examples"))  # whose scripts some tests import


@pytest.fixture(scope="session", autouse=True)
def _blank_pictures() -> None:
    """Draw no ``report.png``.

    It takes most of a small run, and is seldom the point of a test.
    """
    Image.new("RGB", (8, 8), "white").save(file := io.BytesIO(), format="png")
    report.draw = lambda **given: file.getvalue()


@pytest.fixture(name="one_thread")
def _one_thread() -> Iterator[None]:
    """Run on one thread, for bits are those of one thread."""
    with one_thread():
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draw ``report.png``, and return the function that does."""
    monkeypatch.setattr(report, "draw", DRAW)
    return DRAW


@pytest.fixture
def blank_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put files in the place of an export's programs, which take some seconds."""
    files = {PROGRAM: b"a program", ONNX: b"for others"}
    monkeypatch.setattr(
        exports,
        "programs",
        lambda module, shape, onnx=False: {
            name: files[name] for name in files if onnx or name == PROGRAM
        },
    )
