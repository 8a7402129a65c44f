"""The picture is a whole PNG of the right size, whatever is missing, and leaves matplotlib as it was."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from metapl.apps import reports as report
from metapl.apps.reports import draw_report, web
from metapl.apps.reports.canvas import STYLE, png
from metapl.errors import MetaplError

pytestmark = pytest.mark.usefixtures("small_pages")

DOTS = 30
"""An inch: a fifth of what users get, as sizes are looked at and not what is drawn."""

KEYS = [key for panel in report.PANELS for key, _ in panel.series]
ALONE = ["loss_cross_entropy", "loss_uda", "student_validation_accuracy"]
"""What there is of a network that is trained by itself."""
OF_TWO = [key for key in KEYS if key not in (*ALONE[:2], "loss_noisy_student")]
"""What there is of a teacher and its student."""


def rows(steps: int, keys: list[str] = OF_TWO) -> list[dict[str, float]]:
    return [{"step": step, **{key: 1 - 0.9 * math.exp(-step / 20) for key in keys}} for step in range(steps)]


def pixels(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def draw(path: Path, **changes: Any) -> tuple[int, int]:
    given: dict[str, Any] = {
        "title": "Two moons",
        "curves": {"mpl": rows(90)},
        "confusion": [[48, 2], [1, 49]],
        "classes": ["upper", "lower"],
        "summary": "The student reaches 97 %.",
    }
    draw_report(path, **{**given, **changes})
    return pixels(path)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn."""
    drawn: list[Figure] = []
    monkeypatch.setattr("metapl.apps.reports.canvas.png", lambda figure: drawn.append(figure) or png(figure))
    return drawn


def test_the_size_follows_from_what_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "report.png"
    panels = draw(path, confusion=None, classes=None)
    assert draw(path, confusion=None, classes=None, summary="")[1] < panels[1]
    several = {"mpl": rows(90), "none": rows(90), "forward": rows(9)}
    assert draw(path, confusion=None, classes=None, curves=several)[1] > panels[1]
    assert draw(path, confusion=None, classes=None, curves={"mpl": rows(9, ["inner_loss"])})[0] < 0.6 * panels[0]
    width, height = draw(path)
    assert panels[0] + 5.2 * DOTS < width < panels[0] + 6.9 * DOTS
    assert height == panels[1]
    assert [found.name for found in tmp_path.iterdir()] == ["report.png"]


def test_missing_keys_and_figures_are_tolerated(tmp_path: Path) -> None:
    odd = [{"inner_loss": 1.0}, {"step": 1}, {"step": 2, "inner_loss": math.nan}, {"step": 3, "inner_loss": None}]
    odd += [{"step": 5, "inner_loss": 0.5}, {"step": 4, "inner_loss": 0.6, "unheard_of": 1.0}, {}]
    one = {"mpl": odd, "empty": [], "single": rows(1, ["agreement"])}
    # Losses and pseudo-labels: two panels, above each other beside the matrix.
    width, _ = draw(tmp_path / "report.png", curves=one)
    assert DOTS * (0.8 + 5.0 + 5.2) < width < DOTS * (0.8 + 5.0 + 6.9)


@pytest.mark.parametrize("key", KEYS)
def test_each_figure_alone(tmp_path: Path, key: str) -> None:
    draw(tmp_path / "report.png", curves={"mpl": rows(3, [key])}, confusion=None, classes=None)


def test_a_feedback_of_zero_has_no_place_on_a_logarithmic_scale(tmp_path: Path) -> None:
    zero = [{"step": step, "feedback_std": 0.0} for step in range(9)]
    with pytest.raises(MetaplError, match="nothing to draw"):
        draw(tmp_path / "report.png", curves={"none": zero}, confusion=None, classes=None)
    draw(tmp_path / "report.png", curves={"none": zero, "mpl": rows(9)}, confusion=None, classes=None)


def test_a_feedback_that_stays_the_same_has_a_scale_around_it(tmp_path: Path, pages: list[Figure]) -> None:
    same = [{"step": step, "feedback_std": 0.1} for step in range(200)]
    draw(tmp_path / "report.png", curves={"mpl": same}, confusion=None, classes=None)
    low, high = pages[0].axes[0].get_ylim()
    ticks = [tick for tick in pages[0].axes[0].get_yticks() if low <= tick <= high]
    assert low < 0.06 < 0.1 < 0.16 < high < 1
    assert ticks == pytest.approx([0.05, 0.1, 0.2])


def legends(figure: Figure) -> list[list[str]]:
    """The words of the legend of each panel."""
    found = (axes.get_legend() for axes in figure.axes)
    return [[text.get_text() for text in legend.get_texts()] for legend in found if legend is not None]


def test_one_network_has_its_losses_and_no_student(tmp_path: Path, pages: list[Figure]) -> None:
    draw(tmp_path / "report.png", curves={"uda": rows(90, ALONE)}, confusion=None, classes=None)
    draw(tmp_path / "report.png", curves={"uda": rows(90, ALONE[:2])}, confusion=None, classes=None)
    draw(tmp_path / "report.png", curves={"supervised": rows(90, ALONE[:1])}, confusion=None, classes=None)
    draw(tmp_path / "report.png", confusion=None, classes=None)
    own = ["labeled", "unlabeled (strong view, own label)"]
    assert [legends(figure) for figure in pages[:3]] == [[["network"], own], [own], [own[:1]]]
    assert legends(pages[3])[:2] == [["student", "teacher"], ["inner (student)", "outer (labeled)"]]
    assert all(line.get_xydata().shape == (90, 2) for axes in pages[0].axes for line in axes.get_lines())
    draw(tmp_path / "report.png", curves={"reduced": rows(90, ALONE)}, network="student")
    assert legends(pages[4])[0] == ["student"]
    assert re.findall(r"</svg>(\w+) [\d.]+ %", web.plots({"uda": rows(90, ALONE)}, "network")) == ["network"]


def test_lines_between_a_thousand_classes_do_not_hide_the_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, size = tmp_path / "report.png", 400
    monkeypatch.setitem(STYLE, "figure.dpi", 150)  # as users get it
    draw(path, curves={}, confusion=torch.eye(size, dtype=torch.int64), classes=None)
    with Image.open(path) as image:
        cells = numpy.asarray(image.convert("L"))[300:-300, 300:-300]
    assert (cells == 255).mean() > 0.98
    assert cells.min() < 100


@pytest.mark.parametrize(
    ("size", "named"),
    [*((1, True), (1, False), (40, True), (150, False)), pytest.param(150, True, marks=pytest.mark.long)],
)
def test_matrices_of_many_classes(tmp_path: Path, size: int, named: bool) -> None:
    confusion = 900 * torch.eye(size, dtype=torch.int64) + 1
    classes = [f"a class with a long name, number {index}" for index in range(size)] if named else None
    side = min(max(5.2, 0.26 * size), 10.5)
    width, height = draw(tmp_path / "report.png", curves={}, confusion=confusion, classes=classes)
    assert 0 < width / DOTS - 0.8 - side < 3.5
    assert 0 < height / DOTS - 0.8 - side < 4.8


def test_no_examples_at_all(tmp_path: Path) -> None:
    draw(tmp_path / "report.png", confusion=[[0, 0], [0, 0]])


def test_names_are_not_read_as_formulas_and_any_script_will_do(tmp_path: Path) -> None:
    draw(tmp_path / "report.png", classes=["$\\frac{$", "猫\n\udcff"], title="costs $5 or $6_", summary="50 % of _x^")


def test_long_texts_break_into_lines(tmp_path: Path) -> None:
    width, height = draw(tmp_path / "one.png")
    wide, high = draw(tmp_path / "two.png", summary="Wide words, " * 60, title="A title without an end " * 10)
    assert wide == width
    assert high > height + DOTS


def test_global_state_stays(tmp_path: Path) -> None:
    from matplotlib import pyplot

    with matplotlib.rc_context({"font.size": 33, "axes.facecolor": "black", "lines.linewidth": 9}):
        mine = pyplot.figure()
        before = dict(matplotlib.rcParams), pyplot.get_fignums(), matplotlib.get_backend(auto_select=False)
        draw(tmp_path / "one.png")
        after = dict(matplotlib.rcParams), pyplot.get_fignums(), matplotlib.get_backend(auto_select=False)
        pyplot.close(mine)
    assert before == after
    draw(tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"classes": ["one"]}, r"2 rows of \[2\] counts, for 1 names of classes; expected C rows"),
        ({"confusion": [[1, 2], [3]]}, r"2 rows of \[1, 2\] counts, .*expected C rows"),
        ({"confusion": []}, "expected C rows"),
        ({"curves": {}, "confusion": None}, "nothing to draw"),
        ({"curves": {str(index): rows(2) for index in range(8)}}, "8 methods were given; at most 7"),
    ],
)
def test_what_does_not_fit_is_refused_and_an_earlier_report_stays(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    path = tmp_path / "report.png"
    path.write_bytes(b"earlier")
    with pytest.raises(MetaplError, match=text):
        draw(path, **changes)
    assert path.read_bytes() == b"earlier"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MetaplError, match="could not be written: No such file or directory"):
        draw(tmp_path / "no" / "report.png")
