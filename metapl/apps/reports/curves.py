"""What was measured over the steps: a panel for each few quantities that belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metapl.apps.reports.canvas import write_heading, write_note
from metapl.apps.reports.style import DOTS_PER_INCH, NOTE_SIZE, PALETTE, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, float]]
Curves = Mapping[str, Rows]

DASHES: tuple[Any, ...] = ("-", (0, (4, 1.8)), (0, (1.2, 1.4)))


@dataclass(frozen=True)
class Panel:
    """A plot of a few quantities over the steps; the first is drawn solid, the next dashed, the third dotted."""

    title: str
    series: tuple[tuple[str, str], ...]  # (key of the rows, its name in the legend)
    percent: bool = False
    log: bool = False
    noisy: bool = True
    last_values: bool = False
    otherwise: Panel | None = None  # drawn in its place where there are no figures for it
    alone: str = ""  # what the first quantity is called where there are no figures of the others


PANELS = (
    Panel(
        "Validation accuracy",
        (("student_validation_accuracy", "student"), ("teacher_validation_accuracy", "teacher")),
        percent=True,
        noisy=False,
        last_values=True,
        alone="network",
    ),
    Panel("Losses", (("inner_loss", "inner (student)"), ("outer_loss", "outer (labeled)"))),
    Panel(
        "Losses of the network",
        (
            ("loss_cross_entropy", "labeled"),
            ("loss_uda", "unlabeled (strong view, own label)"),
            ("loss_noisy_student", "labeled and pseudo-labeled"),
        ),
    ),
    Panel(
        "Feedback to the teacher",
        (("feedback_ratio", "its gradient ÷ that of the teacher's own losses"),),
        log=True,
        otherwise=Panel("Feedback to the teacher", (("feedback_std", "standard deviation of h"),), log=True),
    ),
    Panel(
        "Pseudo-labels",
        (("pseudo_label_accuracy", "accuracy"), ("pseudo_label_confidence", "confidence"), ("agreement", "agreement")),
        percent=True,
    ),
)


def _points(rows: Rows, key: str) -> list[tuple[float, float]]:
    pairs = ((float(row["step"]), float(row[key])) for row in rows if "step" in row and row.get(key) is not None)
    return sorted(pair for pair in pairs if all(map(math.isfinite, pair)))


def has_figures(panel: Panel, curves: Curves) -> bool:
    """Whether there is anything to draw in a panel."""
    points = (value for rows in curves.values() for key, _ in panel.series for _, value in _points(rows, key))
    return any(value > 0 or not panel.log for value in points)


def draw_panel(axes: Axes, panel: Panel, curves: Curves, along: str = "step") -> None:
    """Draws the curves of all methods, with their scales and a note; ``along`` says what steps are counted in."""
    ends: list[tuple[float, str]] = []
    for index, rows in enumerate(curves.values()):
        for rank, (key, _) in enumerate(panel.series):
            points = [(step, value) for step, value in _points(rows, key) if value > 0 or not panel.log]
            if not points:
                continue
            color = PALETTE[index if len(curves) > 1 else rank]
            _draw_curve(axes, points, color, rank, panel.noisy, pale=len(curves) * len(panel.series) <= 4)
            if panel.last_values and (rank == 0 or len(curves) == 1):
                ends.append((points[-1][1], color))
    _dress(axes, panel, along)
    _draw_note(axes, panel, curves)
    _label_ends(axes, ends)


def _draw_curve(
    axes: Axes, points: Sequence[tuple[float, float]], color: str, rank: int, noisy: bool, pale: bool
) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = "o" if len(points) == 1 else None
    window = len(points) // 40 if noisy else 0
    if window > 1:
        if pale:
            axes.plot(steps, values, color=color, alpha=0.16, linewidth=0.8, zorder=1)
        values = _running_mean(values, window)
    axes.plot(steps, values, color=color, linewidth=1.9, linestyle=DASHES[rank], marker=marker, markersize=5, zorder=3)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean over `window` values about each, over fewer towards the ends.

    >>> _running_mean([0.0, 3.0, 6.0, 9.0], 3)
    [1.5, 3.0, 6.0, 7.5]
    """
    import numpy

    span = numpy.ones(2 * (window // 2) + 1)
    sums, counts = (numpy.convolve(terms, span, mode="same") for terms in (values, numpy.ones(len(values))))
    means: list[float] = (sums / counts).tolist()
    return means


def _dress(axes: Axes, panel: Panel, along: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.grid()
    write_heading(axes, panel.title)
    axes.set_xlabel(along, loc="right", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02, y=0.08)
    if panel.log:
        _dress_log(axes)
    elif panel.percent:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.yaxis.set_major_locator(MaxNLocator(6))


def _dress_log(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # What hardly changes would leave a scale without a tick, or none at all.
    middle, half = math.sqrt(low * high), max(math.sqrt(high / low), 2.0)
    low, high = middle / half, middle * half
    axes.set_ylim(low, high)
    # Within less than two decades, powers of ten alone would leave a scale of one tick or none.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_note(axes: Axes, panel: Panel, curves: Curves) -> None:
    """The line between title and panel, where no curve can run through it: what each dash means, or what is drawn."""
    from matplotlib.lines import Line2D

    if len(panel.series) == 1:
        key, name = panel.series[0]
        write_note(axes, name + _never_positive(panel, key, curves))
        return
    present = [
        (rank, name)
        for rank, (key, name) in enumerate(panel.series)
        if any(_points(rows, key) for rows in curves.values())
    ]
    if panel.alone and present == [(0, panel.series[0][1])]:
        present = [(0, panel.alone)]
    handles = [
        Line2D([], [], color=PALETTE[rank] if len(curves) == 1 else QUIET, linestyle=DASHES[rank], linewidth=1.9)
        for rank, _ in present
    ]
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.008, 1.015), "borderpad": 0.2}
    look: dict[str, Any] = {"fontsize": NOTE_SIZE, "labelcolor": QUIET, "handlelength": 1.9, "columnspacing": 1.2}
    labels = [name for _, name in present]
    axes.legend(handles, labels, ncols=len(labels), frameon=False, handletextpad=0.5, borderaxespad=0, **place, **look)


def _never_positive(panel: Panel, key: str, curves: Curves) -> str:
    """A logarithmic scale has no zero, so the methods whose values are all zero are named instead."""
    values = {method: [value for _, value in _points(rows, key)] for method, rows in curves.items()}
    zero = [method for method, figures in values.items() if figures and max(figures) <= 0]
    named = ", ".join(zero) if len(zero) < 3 else f"{len(zero)} methods"
    return f"; {named}: 0" if panel.log and zero else ""


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str]]) -> None:
    """The last values beside their curves, moved apart where they would touch."""
    if not ends:
        return
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / DOTS_PER_INCH
    ordered = sorted(ends)
    places = _apart([(value - low) / (high - low) * height for value, _ in ordered], 0.2)
    above = max(0.0, places[-1] - height)
    for y, (value, color) in zip(places, ordered, strict=True):
        axes.text(
            1.015,
            (y - above) / height,
            f"{100 * value:.1f} %",
            transform=axes.transAxes,
            color=color,
            fontsize=NOTE_SIZE,
            fontweight="bold",
            va="center",
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Moves sorted positions as little as needed for neighbours to be `gap` apart.

    >>> _apart([0.0, 1.0, 1.0], 0.5)
    [0.0, 0.75, 1.25]
    """
    from scipy.optimize import isotonic_regression

    steps = [gap * index for index in range(len(wanted))]
    moved = isotonic_regression([place - step for place, step in zip(wanted, steps, strict=True)]).x
    return [float(place) + step for place, step in zip(moved, steps, strict=True)]
