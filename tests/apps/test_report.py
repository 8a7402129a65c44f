"""``report.png``: curves and confusion of any size and name, drawn without a warning, and replaced whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metapl.apps.reports.picture import draw_report
from metapl.metrics import Evaluation


def rows(count: int) -> list[dict[str, float]]:
    keys = ("inner_loss", "outer_loss", "feedback_std", "agreement", "student_validation_accuracy")
    return [{"step": step, **dict.fromkeys(keys, 1 / (step + 1))} for step in range(count)]


def evaluated(counts: Any, classes: Any = None) -> Evaluation:
    counts = np.asarray(counts)
    share = float(np.trace(counts) / max(counts.sum(), 1))
    confusion = tuple(map(tuple, counts.tolist()))
    return Evaluation(int(counts.sum()), share, None, 0.1, 0.1, (1.0,) * len(counts), confusion, classes=classes)


NAMES = ("$\\frac{$", "猫\n\udcff", "c" * 90)


@pytest.mark.parametrize(
    ("curves", "evaluation"),
    [
        ({}, None),
        ({"mpl": rows(1)}, None),
        ({"mpl": [{"step": 1, "feedback_std": 0.0}]}, evaluated([[0, 0], [0, 0]])),
        ({"mpl": rows(90), "none": rows(40)}, evaluated(np.eye(3, dtype=int) * 7, NAMES)),
        ({"uda": rows(9)}, evaluated(np.eye(120, dtype=int))),
    ],
    ids=("nothing", "a step", "zeros", "names", "many"),
)
def test_every_run_has_a_picture(curves: Any, evaluation: Evaluation | None, tmp_path: Path) -> None:
    path = tmp_path / "report.png"
    draw_report(path, title="costs $5 or $6_ 猫", curves=curves, evaluation=evaluation, network="student")
    with Image.open(path) as image:
        assert min(image.size) > 300
        assert len(image.convert("L").getcolors() or "white alone") > 1
    first = path.read_bytes()
    draw_report(path, title="costs $5 or $6_ 猫", curves=curves, evaluation=evaluation, network="student")
    assert path.read_bytes() == first
    assert [found.name for found in tmp_path.iterdir()] == ["report.png"]


def test_each_step_with_figures_is_seen(tmp_path: Path) -> None:
    """The curve of one method goes where its figures are, and not elsewhere."""
    pictures = []
    for value in (0.2, 0.9):
        path = tmp_path / f"{value}.png"
        curves = {"mpl": [{"step": 0, "agreement": 0.0}, {"step": 1, "agreement": value}]}
        draw_report(path, title="", curves=curves, evaluation=None, network="student")
        pictures.append(path.read_bytes())
    assert pictures[0] != pictures[1]
