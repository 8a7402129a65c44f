"""One picture of a training: how well it went, what the feedback was, and what the test set says; and of rounds."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metapl.apps.reports import canvas
from metapl.apps.reports.canvas import DASHED, INK, MARGIN, NOTE_SIZE, PALETTE, QUIET, SUMMARY_SIZE, fitted, short_name
from metapl.apps.reports.gallery import Gallery, hung
from metapl.errors import MetaplError
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = Mapping[str, Sequence[Mapping[str, float]]]
Points = Sequence[tuple[float, float]]

# Inches of a panel with all that is written around it, and of a line of the legend; of the page of rounds, of a class
# named there, and of its panels at least.
PANEL_WIDTH, PANEL_HEIGHT, METHODS_LINE = 5.0, 3.6, 0.26
ROUNDS_WIDTH, BAR, LEAST = 12.5, 0.3, 3.9

DASHES: tuple[Any, ...] = ("-", DASHED, (0, (1.2, 1.4)))


class Panel(NamedTuple):
    """A plot of a few quantities over the steps; the first is drawn solid, the next dashed, the third dotted."""

    title: str
    series: tuple[tuple[str, str], ...]  # (key of the rows, its name in the legend)
    percent: bool = False
    log: bool = False
    now_and_then: bool = False  # measured so, and not in each step: its last values count

    def points(self, rows: Sequence[Mapping[str, float]], key: str) -> Points:
        """Steps and values that can be drawn: a logarithmic scale has no zero."""
        pairs = ((float(row["step"]), float(row[key])) for row in rows if "step" in row and row.get(key) is not None)
        return sorted(pair for pair in pairs if all(map(math.isfinite, pair)) and (pair[1] > 0 or not self.log))

    def zero(self, curves: Curves) -> list[str]:
        """The methods whose values are all zero, which are named where a logarithmic scale has no place for them."""
        keys = [key for key, _ in self.series]
        found = {
            method: [row[key] for row in rows for key in keys if row.get(key) is not None]
            for method, rows in curves.items()
        }
        return [method for method, values in found.items() if self.log and values and max(values) <= 0]

    def window(self, count: int) -> int:
        """Over how many of so many values the running mean goes that is drawn; below 2, they are drawn as they are."""
        return 0 if self.now_and_then else count // 40

    def means(self, values: NDArray[Any]) -> NDArray[Any]:
        """The mean about each value, over fewer towards the ends."""
        span = np.ones(2 * (self.window(len(values)) // 2) + 1)
        found: NDArray[Any] = np.convolve(values, span, "same") / np.convolve(np.ones(len(values)), span, "same")
        return found


# Of two with one title, the first that has figures is drawn.
PANELS = (
    Panel(
        "Validation accuracy",
        (("student_validation_accuracy", "student"), ("teacher_validation_accuracy", "teacher")),
        percent=True,
        now_and_then=True,
    ),
    Panel("Losses", (("inner_loss", "inner (student)"), ("outer_loss", "outer (labeled)"))),
    Panel(
        "Losses of the network",
        (
            ("loss_cross_entropy", "labeled"),
            ("loss_uda", "unlabeled (strong view, own label)"),
            ("loss_noisy_student", "with pseudo-labels"),
        ),
    ),
    Panel("Feedback to the teacher", (("feedback_std", "its standard deviation in a batch"),), log=True),
    Panel("Signal to noise of the feedback", (("feedback_snr", "of one step, by its examples"),)),
    Panel(
        "Pseudo-labels",
        (("pseudo_label_accuracy", "accuracy"), ("pseudo_label_confidence", "confidence"), ("agreement", "agreement")),
        percent=True,
    ),
    Panel("Class-frequency error", (("class_shares_vs_truth", "pseudo-labels against the truth"),), percent=True),
    Panel("Class-frequency error", (("class_shares_vs_labeled", "pseudo-labels against the labels"),), percent=True),
)


def panels_of(curves: Curves, network: str) -> list[Panel]:
    """Those that there are figures for; ``network``: what it is called where no method has a teacher beside it."""
    by_title: dict[str, Panel] = {}
    for panel in PANELS:
        there = [key for key, _ in panel.series if any(panel.points(rows, key) for rows in curves.values())]
        if panel.now_and_then and there == [panel.series[0][0]]:
            panel = panel._replace(series=((there[0], network), *panel.series[1:]))
        if there:
            by_title.setdefault(panel.title, panel)
    return list(by_title.values())


def draw_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    curves: Curves,
    confusion: Sequence[Sequence[int]] | None,
    classes: Sequence[str] | None,
    summary: str,
    galleries: Sequence[Gallery] = (),
    along: str = "step",
    network: str = "network",
) -> None:
    """Draws a training, or several to compare, as one PNG file.

    Args:
        path: the file; its folder exists. It takes this name only when it is whole.
        title, summary: a few words, and a sentence or two beneath them.
        curves: rows of figures by the name of the method. A row has "step" and any of the keys in `PANELS`; shares are
            fractions. Rows may lack keys; what is not finite is left out.
        confusion: (C, C) counts on the test set, [true][predicted], or None.
        classes: C names, or None for numbers.
        galleries: pictures below all that, each gallery in one row or two; those beyond are left out.
        along: what steps are counted in.
        network: what the network is called where no method has a teacher beside it.

    A panel without figures is left out, and so is a gallery without pictures. Figures that jump from step to step are
    drawn as a running mean over a fortieth of the steps, with the single steps pale behind them.
    """
    if len(curves) > len(PALETTE):
        raise MetaplError(f"{len(curves)} methods were given; at most {len(PALETTE)} can be told apart by their colors")
    matrix = [] if confusion is None else [[int(count) for count in row] for row in confusion]
    names = [shown(name) for name in (range(len(matrix)) if classes is None else classes)]
    lengths = {len(row) for row in matrix}
    if confusion is not None and not {len(matrix)} == lengths == {len(names)}:
        raise MetaplError(
            f"the confusion has {len(matrix)} rows of {sorted(lengths)} counts, for {len(names)} names of classes; "
            "expected C rows of C counts, and C names"
        )
    counts = np.array(matrix)
    panels = panels_of(curves, network)
    galleries = [gallery for gallery in galleries if len(gallery)]
    if not (len(counts) or panels or galleries):
        raise MetaplError(
            "there is nothing to draw: no row has a step and a figure of a known name, no confusion and no picture"
        )
    from matplotlib.lines import Line2D

    texts = [title, summary, *curves, *names, *(text for gallery in galleries for text in gallery.texts)]
    with canvas.drawing(texts) as explanation:
        columns = 1 if len(counts) and len(panels) == 2 else min(len(panels), 2)
        rows = math.ceil(len(panels) / max(columns, 1))
        widest = max((canvas.text_width(short_name(name), _points(len(counts))) for name in names), default=0.0)
        side = len(counts) * _cell(len(counts)) + widest
        matrix_width, matrix_height = (side + 1.2, side + 1.5) if len(counts) else (0, 0)
        # A page of nothing but pictures is as wide as two panels.
        room = PANEL_WIDTH * (columns if panels or len(counts) else 2) + matrix_width
        low, draw_pictures = hung(galleries, room)
        high = low + max(rows * PANEL_HEIGHT, matrix_height)
        methods = [fitted(name, room - 0.5, SUMMARY_SIZE) for name in curves] if len(curves) > 1 else []
        beside = max(1, int(room / max((canvas.text_width(name, SUMMARY_SIZE) + 0.5 for name in methods), default=1)))
        top = high + METHODS_LINE * math.ceil(len(methods) / beside) + 0.1 * bool(methods)
        figure = canvas.headed_page(title, f"{summary} {explanation}", room + 2 * MARGIN, top)
        if methods:  # the legend of colors, once for all panels
            corner = MARGIN / (room + 2 * MARGIN), (top - 0.05) / figure.get_figheight()
            place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": corner, "borderpad": 0, "borderaxespad": 0}
            look: dict[str, Any] = {"fontsize": SUMMARY_SIZE, "handlelength": 1.1, "handletextpad": 0.5}
            handles = [Line2D([], [], color=color, linewidth=4.5) for color in PALETTE[: len(methods)]]
            figure.legend(handles, methods, ncols=beside, columnspacing=1.8, **place, **look)
        draw_pictures(figure)
        if panels or len(counts):
            canvas.lay_out(figure, low, high)
            widths = [width for width in (PANEL_WIDTH * columns, matrix_width) if width]
            parts = list(figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0])
            if len(counts):
                _draw_matrix(parts.pop().subplots(), counts, names)
            if panels:
                # The last one of an odd number takes the whole row rather than leave a hole beside it.
                places = [*range(len(panels)), *[len(panels) - 1] * (len(panels) % columns)]
                mosaic = [places[start : start + columns] for start in range(0, len(places), columns)]
                for number, axes in parts.pop().subplot_mosaic(mosaic).items():
                    line = 0.2 / ((high - low) / rows - 1.3)
                    _draw_panel(axes, panels[number], curves, along, line)
        canvas.write_page(path, figure)


def _draw_panel(axes: Axes, panel: Panel, curves: Curves, along: str, line: float) -> None:
    """The curves of all methods with their scales and a note; ``line`` is a line of text as a share of the height."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    ends: list[tuple[float, str]] = []
    present: dict[int, str] = {}
    for index, rows in enumerate(curves.values()):
        for rank, (key, name) in enumerate(panel.series):
            if not (points := panel.points(rows, key)):
                continue
            present[rank] = name
            (steps, values), color = np.array(points).T, PALETTE[index if len(curves) > 1 else rank]
            if panel.window(len(values)) > 1 and len(curves) * len(panel.series) <= 4:
                axes.plot(steps, values, color=color, alpha=0.16, linewidth=0.8, zorder=1)
            look: dict[str, Any] = {"marker": "o" if len(values) == 1 else None, "markersize": 5, "zorder": 3}
            axes.plot(steps, panel.means(values), color=color, linestyle=DASHES[rank], **look)
            if panel.now_and_then and (rank == 0 or len(curves) == 1):
                ends.append((values[-1], color))
    axes.grid()
    axes.set_xlabel(along, loc="right", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02, y=0.08)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    low, high = axes.get_ylim()
    if panel.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # What hardly changes would leave a scale without a tick, or none at all.
        middle, half = math.sqrt(low * high), max(math.sqrt(high / low), 2.0)
        axes.set_ylim(middle / half, middle * half)
        # Within less than two decades, powers of ten alone would leave a scale of one tick or none.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if half > 10 else (1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    elif panel.percent:
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    else:
        axes.set_ylim(bottom=min(0.0, low))
    # Between title and panel, where no curve can run through it: what each dash means, or what is drawn.
    if len(panel.series) == 1:
        ((_, name),) = panel.series
        zero = panel.zero(curves)
        named = ", ".join(zero) if len(zero) < 3 else f"{len(zero)} methods"
        canvas.write_heading(axes, panel.title, f"{name}; {named}: 0" if zero else name)
    else:
        canvas.write_heading(axes, panel.title)
        colors = PALETTE if len(curves) == 1 else [QUIET] * len(PALETTE)
        handles = [
            Line2D([], [], color=colors[rank], linestyle=DASHES[rank], label=name)
            for rank, name in sorted(present.items())
        ]
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.008, 1.015), "borderpad": 0.2}
        look = {"fontsize": NOTE_SIZE, "labelcolor": QUIET, "handlelength": 1.9, "columnspacing": 1.2}
        legend = axes.legend(handles=handles, ncols=len(handles), handletextpad=0.5, borderaxespad=0, **place, **look)
        legend.set_in_layout(False)  # as notes
    # The last values beside their curves, moved up where they would touch, and all down from beyond the panel.
    low, high = axes.get_ylim()
    heights: list[float] = []
    for value, _ in sorted(ends):
        wanted = (value - low) / (high - low)
        heights.append(max(wanted, heights[-1] + line) if heights else wanted)
    beyond = max(0.0, heights[-1] - 1) if heights else 0.0
    look = {"fontsize": NOTE_SIZE, "fontweight": "bold", "va": "center", "transform": axes.transAxes}
    for height, (value, color) in zip(heights, sorted(ends), strict=True):
        axes.text(1.015, height - beyond, f"{100 * value:.1f} %", color=color, **look)


def _cell(size: int) -> float:
    """Inches of a cell: of 0.26, but the matrix is neither below 5.2 nor above 10.5."""
    return min(max(5.2 / max(size, 1), 0.26), 10.5 / max(size, 1))


def _points(size: int) -> float:
    """Of names of classes, not below 5: of many classes, every second or third is named instead."""
    return min(max(0.72 * 72 * _cell(size), 5.0), 10.0)


def _draw_matrix(axes: Axes, counts: NDArray[np.int64], names: Sequence[str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    size, cell, points = len(counts), _cell(len(counts)), _points(len(counts))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    colors = LinearSegmentedColormap.from_list("share", ["#FFFFFF", "#CFE3F1", "#6BAED6", "#0072B2", "#003B5C"])
    # The square root lets a mistake in a hundred be seen beside a diagonal that is nearly all of its row.
    image = axes.imshow(shares, cmap=colors, norm=PowerNorm(0.5, 0.0, 1.0), interpolation="nearest")
    axes.set_anchor("NW")
    total = counts.sum()
    correct = f"{100 * np.trace(counts) / total:.1f} % of {total:,} correct; " if total else ""
    canvas.write_heading(axes, "Confusion on the test set", f"{correct}color: share of the true class")
    ticks = range(0, size, math.ceil(1.1 * points / (72 * cell)))
    labels = [short_name(names[index]) for index in ticks]
    turned = max(canvas.text_width(label, points) for label in labels) > 0.9 * cell * ticks.step
    axes.set_xticks(ticks, labels, fontsize=points, rotation=90 if turned else 0)
    axes.set_yticks(ticks, labels, fontsize=points)
    axes.set_xlabel("predicted class", labelpad=5)
    axes.set_ylabel("true class", labelpad=5)
    axes.spines[:].set_visible(False)
    if cell >= 0.04:  # lines between smaller ones would hide them
        edges = np.arange(size + 1) - 0.5
        axes.set_xticks(edges, minor=True)
        axes.set_yticks(edges, minor=True)
        axes.grid(which="minor", linewidth=0.8 if size <= 30 else 0.3)
    axes.tick_params(which="both", pad=3)
    # A digit is 0.64 of its size wide; what is too small to be read, a color bar stands for.
    of_count = min(11.0, 72 * cell * min(0.6, 1.35 / len(str(counts.max()))))
    if of_count >= 5:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.3 else INK
            axes.text(column, row, counts[row, column], color=color, ha="center", va="center", fontsize=of_count)
        return
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.02, 0, 0.015, 1)))
    ticks_of_bar = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
    bar.set_ticks(ticks_of_bar, labels=[f"{100 * share:g} %" if share else "0" for share in ticks_of_bar])
    bar.outline.set_visible(False)


def draw_rounds(
    path: str | os.PathLike[str],
    rounds: Sequence[Mapping[str, Any]],
    *,
    title: str,
    summary: str,
    galleries: Sequence[Gallery] = (),
) -> None:
    """Draw the rounds of Noisy Student, as ``result.json`` has them, or what a first teacher selected for another
    method, as one PNG file: accuracy by round if there is one, and classes before and after the selection."""
    names = [shown(name) for name in rounds[-1]["labeled_per_class"]]
    galleries = [gallery for gallery in galleries if len(gallery)]
    texts = [title, summary, *names, *(text for gallery in galleries for text in gallery.texts)]
    lines: dict[str, list[float]] = {}
    for name in ("test", "validation"):  # of the network of each round, beginning with the first teacher
        found = [each.get(f"{name}_accuracy") for each in (rounds[0]["teacher"], *rounds)]
        lines |= {} if None in found else {name: found}
    with canvas.drawing(texts) as explanation:
        low, draw_pictures = hung(galleries, ROUNDS_WIDTH - 2 * MARGIN)
        high = low + max(LEAST, BAR * len(names) + 1.3 if len(names) <= canvas.MOST_NAMED else 0.0)
        figure = canvas.headed_page(title, f"{summary} {explanation}", ROUNDS_WIDTH, high)
        draw_pictures(figure)
        canvas.lay_out(figure, low, high)
        *before, classes = figure.subplots(1, 1 + bool(lines), squeeze=False)[0]
        for axes in before:
            _draw_accuracies(axes, lines)
        _draw_classes(classes, rounds[-1], names)
        canvas.write_page(path, figure)


def _draw_accuracies(axes: Axes, lines: Mapping[str, list[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    looks = {"test": (PALETTE[0], "-", "solid"), "validation": (PALETTE[1], DASHED, "dashed")}
    last = max(map(len, lines.values())) - 1
    for name, values in lines.items():
        color, dashes, _ = looks[name]
        axes.plot(values, color=color, linestyle=dashes, marker="o", markersize=5)
        place = (last, values[-1]), (6, -3)
        axes.annotate(f"{100 * values[-1]:.1f} %", *place, textcoords="offset points", color=color)
    drawn = ", ".join(f"{name} ({looks[name][2]})" for name in lines)
    canvas.write_heading(axes, "Accuracy by round", f"{drawn}; round 0 is the first teacher")
    axes.set_xlabel("round", loc="right", labelpad=1)
    axes.set_xlim(-0.2, last + 0.45)
    axes.xaxis.set_major_locator(MaxNLocator(min(last + 2, 10), integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    axes.margins(y=0.15)
    axes.grid()


def _draw_classes(axes: Axes, last: Mapping[str, Any], names: Sequence[str]) -> None:
    counts = {name: list(last[f"{name}_per_class"].values()) for name in ("labeled", "kept", "copies")}
    before, kept, after = counts.values()
    copies = "; line: kept, with copies" if after != kept else ""
    note = f"by class. Light: all; dark: those kept{copies}"
    canvas.write_heading(axes, f"Unlabeled examples in round {last['round']}", note)
    if len(names) > canvas.MOST_NAMED:
        lines = [(before, PALETTE[5]), (kept, PALETTE[0]), (after, PALETTE[1])]
        canvas.draw_by_size(axes, before, lines if copies else lines[:2])
        return
    places = range(len(names))
    axes.barh(places, before, color=PALETTE[5], alpha=0.45, height=0.8)
    axes.barh(places, kept, color=PALETTE[0], height=0.5)
    if copies:
        axes.vlines(after, [y - 0.4 for y in places], [y + 0.4 for y in places], color=PALETTE[1], linewidth=2.2)
    canvas.name_rows(axes, names)
