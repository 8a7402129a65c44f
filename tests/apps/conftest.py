"""What holds in every test of the application."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from blank import DRAWN, leave_pictures_blank
from tiny_runs import digit, run, tiny

from metapl.apps import report, train
from metapl.apps.export import network
from metapl.apps.export.network import ONNX, PROGRAM

__all__ = ["digit", "run", "tiny"]  # fixtures


@pytest.fixture(scope="session", autouse=True)
def _blank_pictures() -> None:
    leave_pictures_blank()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """``report.png`` is drawn."""
    for module in (train, report):
        monkeypatch.setattr(module, "draw_report", DRAWN)


@pytest.fixture
def blank_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports have files in the place of programs, which take ten seconds and a process that tries them."""
    files = {PROGRAM: b"a program", ONNX: b"for others"}
    monkeypatch.setattr(
        network,
        "programs",
        lambda module, shape, onnx=False: {name: files[name] for name in files if onnx or name == PROGRAM},
    )


@pytest.fixture
def tried_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of exports are tried in this process."""

    def tried(command: list[str], *, cwd: Path, **_options: Any) -> subprocess.CompletedProcess[str]:
        with contextlib.chdir(cwd), pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "metapl", None)
            exec(command[-1], {})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(network.subprocess, "run", tried)
