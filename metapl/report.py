"""One picture of a training: how well it went, what the feedback was, and what the test set says."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapl.atomic import replacing
from metapl.errors import MetaplError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float]]
Curves = Mapping[str, Rows]

DOTS_PER_INCH = 150

# Okabe and Ito's palette without its yellow, which is too pale for a line on white; told apart by the colour-blind.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, QUIET, GRID = "#222222", "#6B6B6B", "#E4E4E4"
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.8)), (0, (1.2, 1.4)))

# Inches, from the outside in. Above a panel stand its title and a line that says what is drawn.
MARGIN = 0.4
PANEL_WIDTH, PANEL_HEIGHT = 3.8, 2.3
LEFT_OF_PANEL, RIGHT_OF_PANEL, BELOW_PANEL, ABOVE_PANEL = 0.55, 0.65, 0.5, 0.8
TITLE_LINE, SUMMARY_LINE, METHODS_LINE = 0.36, 0.26, 0.34
SMALLEST_MATRIX, LARGEST_MATRIX, MATRIX_CELL, COLOUR_BAR = 5.2, 10.5, 0.26, 0.75

# Points.
TITLE_SIZE, SUMMARY_SIZE, PANEL_TITLE_SIZE, NOTE_SIZE = 18.0, 11.5, 12.5, 10.0

STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": "#9A9A9A",
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": "#9A9A9A",
    "ytick.color": "#9A9A9A",
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "text.color": INK,
}


@dataclass(frozen=True)
class _Panel:
    """A plot of a few quantities over the steps; the first is drawn solid, the next dashed, the third dotted."""

    title: str
    series: tuple[tuple[str, str], ...]  # (key of the rows, its name in the legend)
    percent: bool = False
    log: bool = False
    noisy: bool = True
    last_values: bool = False
    otherwise: _Panel | None = None  # drawn in its place where there are no figures for it


PANELS = (
    _Panel(
        "Validation accuracy",
        (("student_validation_accuracy", "student"), ("teacher_validation_accuracy", "teacher")),
        percent=True,
        noisy=False,
        last_values=True,
    ),
    _Panel("Losses", (("inner_loss", "inner (student)"), ("outer_loss", "outer (labelled)"))),
    _Panel(
        "Feedback to the teacher",
        (("feedback_ratio", "its gradient ÷ that of the teacher's own losses"),),
        log=True,
        otherwise=_Panel("Feedback to the teacher", (("feedback_std", "standard deviation of h"),), log=True),
    ),
    _Panel(
        "Pseudo-labels",
        (("pseudo_label_accuracy", "accuracy"), ("pseudo_label_confidence", "confidence"), ("agreement", "agreement")),
        percent=True,
    ),
)


def draw_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    curves: Curves,
    confusion: Sequence[Sequence[int]] | None,
    classes: Sequence[str] | None,
    summary: str,
) -> None:
    """Draws a training, or several to compare, as one PNG file.

    Args:
        path: the file; its folder exists. It takes this name only when it is whole.
        title: a few words.
        curves: rows of figures by the name of the method. A row has "step" and any of the keys in `PANELS`;
            accuracies, confidence and agreement are fractions. Rows may lack keys; what is not finite is left out.
        confusion: (C, C) counts on the test set, [true][predicted], or None.
        classes: C names, or None for numbers.
        summary: a sentence or two beneath the title.

    A panel without figures is left out. Figures that jump from step to step are drawn as a running mean over a
    fortieth of the steps, with the single steps pale behind them. No display is needed and matplotlib's global state
    stays as it was.

    Raises:
        MetaplError: there is nothing to draw, there are more than 7 methods, the counts and the names do not fit, or
            the file cannot be written.
    """
    path = Path(path)
    if len(curves) > len(PALETTE):
        raise MetaplError(
            f"{len(curves)} methods were given; at most {len(PALETTE)} can be told apart by their colours"
        )
    counts = _checked_counts(confusion, classes)
    choices = (panel if _has_figures(panel, curves) else panel.otherwise for panel in PANELS)
    panels = [panel for panel in choices if panel and _has_figures(panel, curves)]
    if counts is None and not panels:
        raise MetaplError("there is nothing to draw: no row has a step and a figure of a known name, and no confusion")
    names = (
        [str(name) for name in classes] if classes is not None else [str(index) for index in range(len(counts or ()))]
    )
    image = _render(title, summary, curves, panels, counts, names)
    try:
        with replacing(path) as file:
            file.write(image)
    except OSError as error:
        raise MetaplError(f"{path} could not be written: {error.strerror}; any earlier one is as it was") from error


def _checked_counts(confusion: Sequence[Sequence[int]] | None, classes: Sequence[str] | None) -> list[list[int]] | None:
    if confusion is None:
        return None
    counts = [[int(count) for count in row] for row in confusion]
    if not counts or any(len(row) != len(counts) for row in counts):
        raise MetaplError(
            f"the confusion has rows of {sorted({len(row) for row in counts})}; expected C rows of C counts"
        )
    if classes is not None and len(classes) != len(counts):
        raise MetaplError(f"{len(classes)} names of classes were given for a confusion of {len(counts)} classes")
    return counts


def _points(rows: Rows, key: str) -> list[tuple[float, float]]:
    pairs = ((float(row["step"]), float(row[key])) for row in rows if "step" in row and row.get(key) is not None)
    return sorted(pair for pair in pairs if all(map(math.isfinite, pair)))


def _has_figures(panel: _Panel, curves: Curves) -> bool:
    points = (value for rows in curves.values() for key, _ in panel.series for _, value in _points(rows, key))
    return any(value > 0 or not panel.log for value in points)


# The page


def _render(
    title: str,
    summary: str,
    curves: Curves,
    panels: Sequence[_Panel],
    counts: list[list[int]] | None,
    names: list[str],
) -> bytes:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    # "default" first, so that a user's own matplotlibrc does not change the picture; both end with the block.
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        # Names of classes may be in any script; a box for a letter is better than no report.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matrix = None if counts is None else _Matrix.of(counts, names)
        page = _lay_out(len(panels), matrix, title, summary, several=len(curves) > 1)
        figure = Figure(figsize=(page.width, page.height), dpi=DOTS_PER_INCH, facecolor="white")
        FigureCanvasAgg(figure)
        _draw_head(figure, page, curves)
        for panel, box in zip(panels, page.panels, strict=True):
            _draw_panel(figure.add_axes(page.fractions(box)), panel, curves)
        if matrix is not None and page.matrix is not None:
            _draw_matrix(figure, page, page.matrix, matrix)
        for text in figure.findobj(Text):
            text.set_parse_math(False)  # a name such as "$5" is no formula
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


_Box = tuple[float, float, float, float]  # left, bottom, width, height in inches


@dataclass(frozen=True)
class _Page:
    """Where everything stands, in inches from the lower left."""

    width: float
    height: float
    title: tuple[str, ...]
    summary: tuple[str, ...]
    panels: tuple[_Box, ...]
    matrix: _Box | None

    def fractions(self, box: _Box) -> _Box:
        left, bottom, width, height = box
        return left / self.width, bottom / self.height, width / self.width, height / self.height


def _lay_out(panels: int, matrix: _Matrix | None, title: str, summary: str, several: bool) -> _Page:
    """Panels in two columns on the left, or in one where there are two beside a matrix; the matrix on the right."""
    columns = 1 if matrix and panels == 2 else min(panels, 2)
    rows = math.ceil(panels / columns) if columns else 0
    cell = LEFT_OF_PANEL + PANEL_WIDTH + RIGHT_OF_PANEL
    width = 2 * MARGIN + columns * cell + (matrix.left + matrix.side + matrix.right if matrix else 0.0)
    body = rows * (ABOVE_PANEL + PANEL_HEIGHT + BELOW_PANEL)
    if matrix:
        body = max(body, ABOVE_PANEL + matrix.side + matrix.below)
    title_lines = _wrap(title, width - 2 * MARGIN, TITLE_SIZE, "bold")
    summary_lines = _wrap(summary, width - 2 * MARGIN, SUMMARY_SIZE)
    head = TITLE_LINE * len(title_lines) + SUMMARY_LINE * len(summary_lines) + (METHODS_LINE if several else 0.0)
    boxes = []
    for index in range(panels):
        row, column = divmod(index, columns)
        # The last one of an odd number takes the whole row rather than leave a hole beside it.
        wide = PANEL_WIDTH + (cell if index == panels - 1 and column == 0 and columns == 2 else 0.0)
        bottom = MARGIN + body * (1 - (row + 1) / rows) + BELOW_PANEL
        boxes.append((MARGIN + column * cell + LEFT_OF_PANEL, bottom, wide, body / rows - ABOVE_PANEL - BELOW_PANEL))
    box = None
    if matrix:
        bottom = MARGIN + body - ABOVE_PANEL - matrix.side
        box = (MARGIN + columns * cell + matrix.left, bottom, matrix.side, matrix.side)
    return _Page(width, 2 * MARGIN + head + body, title_lines, summary_lines, tuple(boxes), box)


def _wrap(text: str, width: float, size: float, weight: str = "normal") -> tuple[str, ...]:
    """Breaks a text into lines that are at most `width` inches long."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _text_width(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return tuple(lines)


def _text_width(text: str, size: float, weight: str = "normal") -> float:
    """Inches that a line takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) / 72


def _draw_head(figure: Figure, page: _Page, curves: Curves) -> None:
    left, y = MARGIN / page.width, page.height - MARGIN
    for line in page.title:
        figure.text(left, (y - 0.1) / page.height, line, fontsize=TITLE_SIZE, fontweight="bold", va="center")
        y -= TITLE_LINE
    for line in page.summary:
        figure.text(left, (y - 0.1) / page.height, line, fontsize=SUMMARY_SIZE, color=QUIET, va="center")
        y -= SUMMARY_LINE
    if len(curves) > 1:
        _draw_methods(figure, left, (y - 0.15) / page.height, list(curves))


def _draw_methods(figure: Figure, left: float, y: float, methods: Sequence[str]) -> None:
    """The legend of colours, once for all panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colour(index), linewidth=4.5) for index in range(len(methods))]
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (left, y), "borderpad": 0, "borderaxespad": 0}
    look: dict[str, Any] = {"fontsize": SUMMARY_SIZE, "handlelength": 1.1, "handletextpad": 0.5, "columnspacing": 1.8}
    figure.legend(handles, methods, ncols=len(methods), frameon=False, **place, **look)


# Curves


def _draw_panel(axes: Axes, panel: _Panel, curves: Curves) -> None:
    ends: list[tuple[float, str]] = []
    last_step = 0.0
    for index, rows in enumerate(curves.values()):
        for rank, (key, _) in enumerate(panel.series):
            points = [(step, value) for step, value in _points(rows, key) if value > 0 or not panel.log]
            if not points:
                continue
            colour = _colour(index if len(curves) > 1 else rank)
            _draw_curve(axes, points, colour, rank, panel.noisy, pale=len(curves) * len(panel.series) <= 4)
            last_step = max(last_step, points[-1][0])
            if panel.last_values and (rank == 0 or len(curves) == 1):
                ends.append((points[-1][1], colour))
    _dress(axes, panel, last_step)
    _draw_note(axes, panel, curves)
    _label_ends(axes, ends)


def _draw_curve(
    axes: Axes, points: Sequence[tuple[float, float]], colour: str, rank: int, noisy: bool, pale: bool
) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = "o" if len(points) == 1 else None
    window = len(points) // 40 if noisy else 0
    if window > 1:
        if pale:
            axes.plot(steps, values, color=colour, alpha=0.16, linewidth=0.8, zorder=1)
        values = _running_mean(values, window)
    axes.plot(steps, values, color=colour, linewidth=1.9, linestyle=DASHES[rank], marker=marker, markersize=5, zorder=3)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean over `window` values about each, over fewer towards the ends.

    >>> _running_mean([0.0, 3.0, 6.0, 9.0], 3)
    [1.5, 3.0, 6.0, 7.5]
    """
    half = window // 2
    spans = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [math.fsum(span) / len(span) for span in spans]


def _dress(axes: Axes, panel: _Panel, last_step: float) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.set_title(panel.title, loc="left", fontsize=PANEL_TITLE_SIZE, fontweight="bold", pad=29)
    axes.set_xlabel("step", loc="right", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_short_number(last_step)))
    axes.margins(x=0.02, y=0.08)
    if panel.log:
        _dress_log(axes)
    elif panel.percent:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.yaxis.set_major_locator(MaxNLocator(6))


def _dress_log(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Within less than two decades, powers of ten alone would leave a scale of one tick or none.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _short_number(largest: float) -> Callable[[float, Any], str]:
    """
    >>> _short_number(20_000)(2_500, None), _short_number(900)(250, None)
    ('2.5k', '250')
    """
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if largest >= 5 * unit:
            return lambda value, _: f"{value / unit:g}{letter}" if value else "0"
    return lambda value, _: f"{value:g}"


def _draw_note(axes: Axes, panel: _Panel, curves: Curves) -> None:
    """The line between title and panel, where no curve can run through it: what each dash means, or what is drawn."""
    from matplotlib.lines import Line2D

    if len(panel.series) == 1:
        key, name = panel.series[0]
        _write_note(axes, name + _never_positive(panel, key, curves))
        return
    present = [
        (rank, name)
        for rank, (key, name) in enumerate(panel.series)
        if any(_points(rows, key) for rows in curves.values())
    ]
    handles = [
        Line2D([], [], color=_colour(rank) if len(curves) == 1 else QUIET, linestyle=DASHES[rank], linewidth=1.9)
        for rank, _ in present
    ]
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.008, 1.015), "borderpad": 0.2}
    look: dict[str, Any] = {"fontsize": NOTE_SIZE, "labelcolor": QUIET, "handlelength": 1.9, "columnspacing": 1.2}
    labels = [name for _, name in present]
    axes.legend(handles, labels, ncols=len(labels), frameon=False, handletextpad=0.5, borderaxespad=0, **place, **look)


def _never_positive(panel: _Panel, key: str, curves: Curves) -> str:
    """A logarithmic scale has no zero, so the methods whose values are all zero are named instead."""
    values = {method: [value for _, value in _points(rows, key)] for method, rows in curves.items()}
    zero = [method for method, ones in values.items() if ones and max(ones) <= 0]
    named = ", ".join(zero) if len(zero) < 3 else f"{len(zero)} methods"
    return f"; {named}: 0" if panel.log and zero else ""


def _write_note(axes: Axes, text: str) -> None:
    axes.annotate(
        text, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", fontsize=NOTE_SIZE, color=QUIET
    )


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str]]) -> None:
    """The last values beside their curves, moved apart where they would touch."""
    if not ends:
        return
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / DOTS_PER_INCH
    ordered = sorted(ends)
    places = _apart([(value - low) / (high - low) * height for value, _ in ordered], 0.2)
    above = max(0.0, places[-1] - height)
    for y, (value, colour) in zip(places, ordered, strict=True):
        axes.text(
            1.015,
            (y - above) / height,
            f"{100 * value:.1f} %",
            transform=axes.transAxes,
            color=colour,
            fontsize=NOTE_SIZE,
            fontweight="bold",
            va="center",
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Moves sorted positions as little as needed for neighbours to be `gap` apart.

    >>> _apart([0.0, 1.0, 1.0], 0.5)
    [0.0, 0.75, 1.25]
    """
    groups: list[tuple[float, int]] = []  # (centre, members)
    for one in wanted:
        groups.append((one, 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (centre, count), (last, last_count) = groups[-2:]
            groups[-2:] = [((centre * count + last * last_count) / (count + last_count), count + last_count)]
    return [centre + gap * (index - (count - 1) / 2) for centre, count in groups for index in range(count)]


def _colour(index: int) -> str:
    return PALETTE[index]


# The confusion matrix


@dataclass(frozen=True)
class _Matrix:
    """The counts with what their size decides: inches around the cells, points of the names and of the counts."""

    counts: list[list[int]]
    names: tuple[str, ...]
    side: float
    left: float
    below: float
    right: float
    turned: bool  # the names below stand upright
    name_points: float
    count_points: float | None  # None: too small to be read, so a colour bar stands for the counts

    @classmethod
    def of(cls, counts: list[list[int]], names: Sequence[str]) -> _Matrix:
        size = len(counts)
        side = min(max(SMALLEST_MATRIX, MATRIX_CELL * size), LARGEST_MATRIX)
        cell = 72 * side / size
        short = tuple(_short_name(name) for name in names)
        # Not below 5 points: for many classes, every second or third is named instead.
        name_points = min(max(0.72 * cell, 5.0), 10.0)
        widest = max(_text_width(name, name_points) for name in short)
        turned = 72 * widest > 0.9 * cell
        # A digit is 0.64 of its size wide.
        count_points = min(11.0, 0.6 * cell, 1.35 * cell / max(len(str(count)) for row in counts for count in row))
        return cls(
            counts=counts,
            names=short,
            side=side,
            left=widest + 0.5,
            below=(widest if turned else 0.2) + 0.4,
            right=0.1 if count_points >= 5 else COLOUR_BAR,
            turned=turned,
            name_points=name_points,
            count_points=count_points if count_points >= 5 else None,
        )


def _short_name(name: str) -> str:
    """Shortens the middle of a long name, for names differ at either end.

    >>> _short_name("a species of the genus 12")
    'a species…genus 12'
    """
    return name if len(name) <= 18 else f"{name[:9]}…{name[-8:]}"


def _draw_matrix(figure: Figure, page: _Page, box: _Box, matrix: _Matrix) -> None:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    axes = figure.add_axes(page.fractions(box))
    shares = [[count / max(sum(row), 1) for count in row] for row in matrix.counts]
    colours = LinearSegmentedColormap.from_list("share", ["#FFFFFF", "#CFE3F1", "#6BAED6", "#0072B2", "#003B5C"])
    # The square root lets a mistake in a hundred be seen beside a diagonal that is nearly all of its row.
    image = axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0.0, 1.0), aspect="auto", interpolation="nearest")
    _dress_matrix(axes, matrix)
    if matrix.count_points is not None:
        _write_counts(axes, matrix, shares)
        return
    left, bottom, width, height = box
    bar = figure.colorbar(image, cax=figure.add_axes(page.fractions((left + width + 0.15, bottom, 0.12, height))))
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], labels=["0", "1 %", "5 %", "10 %", "25 %", "50 %", "100 %"])
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)


def _dress_matrix(axes: Axes, matrix: _Matrix) -> None:
    size, total = len(matrix.counts), sum(map(sum, matrix.counts))
    correct = sum(matrix.counts[index][index] for index in range(size))
    axes.set_title("Confusion on the test set", loc="left", fontsize=PANEL_TITLE_SIZE, fontweight="bold", pad=29)
    share = f"{100 * correct / total:.1f} % of {total:,} correct; " if total else ""
    _write_note(axes, f"{share}colour: share of the true class")
    ticks = range(0, size, math.ceil(1.1 * matrix.name_points / (72 * matrix.side / size)))
    labels = [matrix.names[index] for index in ticks]
    axes.set_xticks(ticks, labels, fontsize=matrix.name_points, rotation=90 if matrix.turned else 0)
    axes.set_yticks(ticks, labels, fontsize=matrix.name_points)
    axes.set_xlabel("predicted class", labelpad=5)
    axes.set_ylabel("true class", labelpad=5)
    axes.spines[:].set_visible(False)
    edges = [index - 0.5 for index in range(size + 1)]
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color=GRID, linewidth=0.8 if size <= 30 else 0.3)
    axes.tick_params(which="both", length=0, pad=3)


def _write_counts(axes: Axes, matrix: _Matrix, shares: Sequence[Sequence[float]]) -> None:
    for row, counts in enumerate(matrix.counts):
        for column, count in enumerate(counts):
            if count:
                colour = "white" if shares[row][column] > 0.3 else INK
                look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": matrix.count_points}
                axes.text(column, row, str(count), color=colour, **look)
