"""What holds in every test of the application."""

from __future__ import annotations

import pytest
from blank import DRAWN, leave_pictures_blank
from tiny_runs import digit, run, tiny

from metapl.apps import export, report
from metapl.apps.export import ONNX, PROGRAM

__all__ = ["digit", "run", "tiny"]  # fixtures


@pytest.fixture(scope="session", autouse=True)
def _blank_pictures() -> None:
    leave_pictures_blank()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """``report.png`` is drawn."""
    monkeypatch.setattr(report, "draw", DRAWN)


@pytest.fixture
def blank_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports have files in the place of programs, which take some seconds."""
    files = {PROGRAM: b"a program", ONNX: b"for others"}
    monkeypatch.setattr(
        export,
        "programs",
        lambda module, shape, onnx=False: {name: files[name] for name in files if onnx or name == PROGRAM},
    )
