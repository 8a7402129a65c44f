"""One picture of a training: how well it went, what the feedback was, and what the test set says."""

from __future__ import annotations

import io
import math
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
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

# Inches, from the outside in.
MARGIN = 0.45
PANEL_WIDTH, PANEL_HEIGHT = 4.9, 2.75
LEFT_OF_PANEL, RIGHT_OF_PANEL, BELOW_PANEL, ABOVE_PANEL = 0.62, 0.62, 0.58, 0.62
TITLE_HEIGHT, SUMMARY_LINE, LEGEND_HEIGHT = 0.42, 0.26, 0.34

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
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
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


PANELS = (
    _Panel(
        "Validation accuracy",
        (("student_validation_accuracy", "student"), ("teacher_validation_accuracy", "teacher")),
        percent=True,
        noisy=False,
        last_values=True,
    ),
    _Panel("Losses", (("inner_loss", "inner (student)"), ("outer_loss", "outer (labelled)"))),
    _Panel("Size of the feedback, ratio", (("feedback_ratio", "ratio"),), log=True),
    _Panel(
        "Pseudo-labels",
        (
            ("pseudo_label_accuracy", "accuracy"),
            ("pseudo_label_confidence", "confidence"),
            ("agreement", "agreement"),
        ),
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
            accuracies, confidence and agreement are fractions. Rows may lack keys, and what is not finite is left out.
        confusion: (C, C) counts on the test set, [true][predicted], or None.
        classes: C names, or None for numbers.
        summary: a sentence or two beneath the title.

    A panel without figures is left out. Figures that jump from step to step are drawn as a running mean over a
    fortieth of the steps, with the single steps pale behind them. No display is needed and matplotlib's global state
    stays as it was.

    Raises:
        MetaplError: there is nothing to draw, the counts and the names do not fit, or the file cannot be written.
    """
    path = Path(path)
    counts = _checked_counts(confusion, classes)
    panels = [panel for panel in PANELS if _has_figures(panel, curves)]
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
        page = _Page.of(len(panels), None if counts is None else _matrix_size(names), summary, several=len(curves) > 1)
        figure = Figure(figsize=(page.width, page.height), dpi=DOTS_PER_INCH, facecolor="white")
        FigureCanvasAgg(figure)
        _draw_head(figure, page, title, curves)
        for panel, place in zip(panels, page.panels, strict=True):
            _draw_panel(figure.add_axes(page.fractions(place)), panel, curves)
        if counts is not None and page.matrix is not None:
            _draw_matrix(figure.add_axes(page.fractions(page.matrix)), counts, names)
        for text in figure.findobj(Text):
            text.set_parse_math(False)  # type: ignore[attr-defined]  # a name such as "$5" is no formula
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


_Box = tuple[float, float, float, float]  # left, bottom, width, height in inches


@dataclass(frozen=True)
class _Page:
    """Where everything stands, in inches from the lower left."""

    width: float
    height: float
    head: float  # the upper edge of the head
    lines: tuple[str, ...]
    panels: tuple[_Box, ...]
    matrix: _Box | None

    @classmethod
    def of(cls, panels: int, matrix: tuple[float, float, float] | None, summary: str, several: bool) -> _Page:
        columns = min(panels, 2) if panels != 2 or matrix is None else 1
        rows = math.ceil(panels / columns) if columns else 0
        cell = LEFT_OF_PANEL + PANEL_WIDTH + RIGHT_OF_PANEL
        side, left, below = matrix or (0.0, 0.0, 0.0)
        width = 2 * MARGIN + columns * cell + (left + side + 0.15 if matrix else 0.0)
        width = max(width, 7.5)
        # 0.089 in: the mean width of a letter at 11.5 points.
        lines = tuple(textwrap.wrap(summary, max(30, int((width - 2 * MARGIN) / 0.089))))
        head = TITLE_HEIGHT + SUMMARY_LINE * len(lines) + (LEGEND_HEIGHT if several and panels else 0.0)
        body = max(rows * (ABOVE_PANEL + PANEL_HEIGHT + BELOW_PANEL), (ABOVE_PANEL + side + below) if matrix else 0.0)
        height = round(MARGIN + head + body + 0.25, 2)
        top = 0.25 + body
        places = []
        for index in range(panels):
            row, column = divmod(index, columns)
            span = body / rows
            places.append(
                (
                    MARGIN + column * cell + LEFT_OF_PANEL,
                    top - (row + 1) * span + BELOW_PANEL,
                    PANEL_WIDTH,
                    span - ABOVE_PANEL - BELOW_PANEL,
                )
            )
        box = (MARGIN + columns * cell + left, top - ABOVE_PANEL - side, side, side) if matrix else None
        return cls(round(width, 2), height, height - MARGIN, lines, tuple(places), box)

    def fractions(self, box: _Box) -> _Box:
        left, bottom, width, height = box
        return left / self.width, bottom / self.height, width / self.width, height / self.height


def _draw_head(figure: Figure, page: _Page, title: str, curves: Curves) -> None:
    left, y = MARGIN / page.width, page.head
    figure.text(left, (y - 0.1) / page.height, title, fontsize=18, fontweight="bold", va="center")
    y -= TITLE_HEIGHT
    for line in page.lines:
        figure.text(left, (y - 0.05) / page.height, line, fontsize=11.5, color=QUIET, va="center")
        y -= SUMMARY_LINE
    if len(curves) > 1 and page.panels:
        _draw_methods(figure, page, list(curves), y)


def _draw_methods(figure: Figure, page: _Page, methods: Sequence[str], y: float) -> None:
    """The legend of colours, once for all panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colour(index), linewidth=4) for index in range(len(methods))]
    figure.legend(
        handles,
        methods,
        loc="center left",
        bbox_to_anchor=(MARGIN / page.width, (y - 0.1) / page.height),
        bbox_transform=figure.transFigure,
        ncols=len(methods),
        frameon=False,
        fontsize=11.5,
        handlelength=1.1,
        handletextpad=0.5,
        columnspacing=1.8,
        borderpad=0,
        borderaxespad=0,
    )


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
    _draw_quantities(axes, panel, curves)
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
    axes.tick_params(length=0)
    axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold", pad=10)
    axes.set_xlabel("step", loc="right", labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_short_number(last_step)))
    axes.margins(x=0.02, y=0.08)
    if panel.log:
        axes.set_yscale("log")
    elif panel.percent:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.yaxis.set_major_locator(MaxNLocator(6))


def _short_number(largest: float) -> Callable[[float, Any], str]:
    """
    >>> _short_number(20_000)(2_500, None), _short_number(900)(250, None)
    ('2.5k', '250')
    """
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if largest >= 5 * unit:
            return lambda value, _: f"{value / unit:g}{letter}" if value else "0"
    return lambda value, _: f"{value:g}"


def _draw_quantities(axes: Axes, panel: _Panel, curves: Curves) -> None:
    """The legend of dashes, above the panel, where no curve can run through it."""
    from matplotlib.lines import Line2D

    present = [
        (rank, name)
        for rank, (key, name) in enumerate(panel.series)
        if any(_points(rows, key) for rows in curves.values())
    ]
    if len(panel.series) == 1:
        return
    colours = [_colour(rank) if len(curves) == 1 else QUIET for rank, _ in present]
    handles = [
        Line2D([], [], color=colour, linestyle=DASHES[rank], linewidth=1.9)
        for colour, (rank, _) in zip(colours, present, strict=True)
    ]
    axes.legend(
        handles,
        [name for _, name in present],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.005),
        ncols=len(present),
        frameon=False,
        fontsize=9.5,
        labelcolor=QUIET,
        handlelength=2.0,
        handletextpad=0.5,
        columnspacing=1.2,
        borderpad=0.3,
        borderaxespad=0,
    )


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str]]) -> None:
    """The last values beside their curves, moved apart where they would touch."""
    if not ends:
        return
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / DOTS_PER_INCH
    ordered = sorted(ends)
    wanted = [(value - low) / (high - low) * height for value, _ in ordered]
    for y, (value, colour) in zip(_apart(wanted, 0.19), ordered, strict=True):
        axes.text(
            1.012,
            y / height,
            f"{100 * value:.1f} %",
            transform=axes.transAxes,
            color=colour,
            fontsize=9.5,
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
    return PALETTE[index % len(PALETTE)]


# The confusion matrix


def _matrix_size(names: Sequence[str]) -> tuple[float, float, float]:
    """Inches: the side of the matrix, the room to its left and the room below, for names of that length."""
    side = min(max(5.6, 0.1 * len(names)), 10.5)
    longest = max(len(_short_name(name)) for name in names)
    room = 0.55 + 0.0087 * _name_size(len(names), side) * longest
    return side, room, room if _turned(names) else 0.75


def _name_size(count: int, side: float) -> float:
    """Points: 70 % of a cell's height, within what can be read and what looks well."""
    return min(max(0.7 * 72 * side / count, 5.0), 10.0)


def _turned(names: Sequence[str]) -> bool:
    return len(names) > 12 or max(map(len, names)) * len(names) > 55


def _short_name(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def _draw_matrix(axes: Axes, counts: list[list[int]], names: Sequence[str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    colours = LinearSegmentedColormap.from_list("share", ["#FFFFFF", "#CFE3F1", "#6BAED6", "#0072B2", "#003B5C"])
    # The square root lets a mistake in a hundred be seen beside a diagonal that is nearly all of its row.
    axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0.0, 1.0), aspect="auto", interpolation="nearest")
    size = len(counts)
    side = _matrix_size(names)[0]
    _dress_matrix(axes, counts, names, side)
    longest = max(len(f"{count:,}") for row in counts for count in row)
    points = min(11.0, 0.55 * 72 * side / size, 1.25 * 72 * side / size / longest)
    if points < 4.5:
        return
    for row, column in ((row, column) for row in range(size) for column in range(size) if counts[row][column]):
        dark = shares[row][column] > 0.4
        axes.text(
            column,
            row,
            f"{counts[row][column]:,}",
            ha="center",
            va="center",
            fontsize=points,
            color="white" if dark else INK,
        )


def _dress_matrix(axes: Axes, counts: list[list[int]], names: Sequence[str], side: float) -> None:
    size, total = len(counts), sum(map(sum, counts))
    correct = sum(counts[index][index] for index in range(size))
    share = f", {100 * correct / total:.1f} % correct" if total else ""
    axes.set_title("Confusion on the test set", loc="left", fontsize=12, fontweight="bold", pad=10)
    axes.set_title(f"{total:,} examples{share}", loc="right", fontsize=9.5, color=QUIET, pad=10)
    every = math.ceil(size / 105)
    ticks = range(0, size, every)
    labels = [_short_name(names[index]) for index in ticks]
    points = _name_size(size, side)
    turned = _turned(names)
    axes.set_xticks(ticks, labels, fontsize=points, rotation=90 if turned else 0)
    axes.set_yticks(ticks, labels, fontsize=points)
    axes.set_xlabel("predicted class", labelpad=6)
    axes.set_ylabel("true class", labelpad=6)
    axes.tick_params(length=0, pad=3)
    _draw_cells(axes, size)


def _draw_cells(axes: Axes, size: int) -> None:
    axes.spines[:].set_visible(False)
    edges: Iterable[float] = [index - 0.5 for index in range(size + 1)]
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color=GRID, linewidth=0.8 if size <= 30 else 0.3)
    axes.tick_params(which="minor", length=0)
