"""A picture of what is in a store: examples of each class, confidence and entropy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from metapl.labels.queries import BINS, Statistics
from metapl.report.canvas import (
    blank_page,
    draw_head,
    drawing,
    fractions,
    head_height,
    png,
    wrap_head,
    write_heading,
    write_note,
    write_whole,
)
from metapl.report.counts import MOST_NAMED, draw_by_size, dress_counts, name_rows
from metapl.report.style import ABOVE_PANEL, GRID, MARGIN, PALETTE
from metapl.report.text import drawable
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches.
WIDTH, LEFT, BETWEEN, BELOW, BAR, LEAST, HISTOGRAM = 12.0, 1.75, 0.9, 0.5, 0.24, 2.4, 2.9


def draw_statistics(path: str | os.PathLike[str], content: Statistics, title: str) -> None:
    """Draw what is in a store as one PNG file.

    Args:
        path: the file; its folder exists. It takes this name only when it is whole.
        content: by :func:`metapl.labels.queries.statistics`.
        title: of the picture.

    Raises:
        MetaplError: the file cannot be written.
    """
    names = [shown(name) for name in content.classes] if len(content.classes) <= MOST_NAMED else []
    copies = f", {content.copies:,} with copies" if content.copies != content.rows else ""
    summary = (
        f"{content.rows:,} examples{copies}, {len(content.classes):,} classes. Mean confidence "
        f"{100 * content.mean_confidence:.1f} %, mean entropy {content.mean_entropy:.2f} nats."
    )
    empty = sum(not count for count in content.counts)
    if empty:
        summary = f"{summary} {empty:,} of the classes {'has' if empty == 1 else 'have'} no example."
    with drawing([title, *names]) as explanation:
        image = png(_figure(drawable(shown(title)), f"{summary} {explanation}", content, names))
    write_whole(path, image)


def _figure(title: str, summary: str, content: Statistics, names: Sequence[str]) -> Figure:
    title_lines, summary_lines = wrap_head(title, summary, WIDTH)
    panel = max(LEAST, BAR * len(names))
    top = MARGIN + BELOW + panel
    figure = blank_page(WIDTH, top + ABOVE_PANEL + head_height(title_lines, summary_lines) + MARGIN)
    draw_head(figure, title_lines, summary_lines)
    wide = WIDTH - LEFT - 2 * (HISTOGRAM + BETWEEN) - MARGIN
    classes = figure.add_axes(fractions(figure, (LEFT, MARGIN + BELOW, wide, panel)))
    if names:
        _draw_named(classes, content, names)
    else:
        _draw_by_size(classes, content)
    most = content.greatest_entropy
    for number, (name, note, counts, upper) in enumerate(
        (
            ("Confidence", "probability of the most probable class", content.confidence, 1.0),
            ("Entropy", f"in nats; evenly spread is {most:.2f}", content.entropy, most),
        )
    ):
        left = LEFT + wide + BETWEEN + number * (HISTOGRAM + BETWEEN)
        box = (left, top - LEAST, HISTOGRAM, LEAST)
        _draw_histogram(figure.add_axes(fractions(figure, box)), name, note, counts, upper)
    return figure


def _draw_named(axes: Axes, content: Statistics, names: Sequence[str]) -> None:
    write_heading(axes, "Examples of each class")
    _draw_counts_note(axes, content)
    places = range(len(names))
    if content.copies != content.rows:
        axes.barh(places, content.class_copies, color=PALETTE[5], height=0.7)
    axes.barh(places, content.counts, color=PALETTE[0], height=0.7)
    name_rows(axes, names)


def _draw_by_size(axes: Axes, content: Statistics) -> None:
    write_heading(axes, "Examples of each class")
    _draw_counts_note(axes, content)
    copies = [(content.class_copies, PALETTE[5])] if content.copies != content.rows else []
    draw_by_size(axes, content.counts, [*copies, (content.counts, PALETTE[0])])


def _draw_counts_note(axes: Axes, content: Statistics) -> None:
    with_copies = content.copies != content.rows
    write_note(axes, "dark: distinct; light: with copies" if with_copies else "by the most probable class")


def _draw_histogram(axes: Axes, name: str, note: str, counts: Sequence[int], upper: float) -> None:
    write_heading(axes, name)
    write_note(axes, note)
    width = upper / BINS
    axes.bar([width * i for i in range(BINS)], counts, width=width, align="edge", color=PALETTE[0], edgecolor="white")
    axes.set_xlim(0, upper)
    axes.set_ylabel("examples")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    dress_counts(axes)
