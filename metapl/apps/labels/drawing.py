"""A picture of what is in a store: examples of each class, confidence and entropy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from metapl.apps.labels.queries import BINS, Statistics
from metapl.apps.reports.canvas import (
    MARGIN,
    MOST_NAMED,
    PALETTE,
    draw_by_size,
    drawing,
    dress_counts,
    headed_page,
    lay_out,
    name_rows,
    write_heading,
    write_page,
)
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, BAR, LEAST = 12.0, 0.24, 3.7  # inches of the page, of a named class, and of the panels at least


def draw_statistics(path: str | os.PathLike[str], content: Statistics, title: str) -> None:
    """Draw what is in a store as one PNG file; a MetaplError where it cannot be written."""
    names = [shown(name) for name in content.classes] if len(content.classes) <= MOST_NAMED else []
    with_copies = content.copies != content.rows
    copies = f", {content.copies:,} with copies" if with_copies else ""
    summary = (
        f"{content.rows:,} examples{copies}, {len(content.classes):,} classes. Mean confidence "
        f"{100 * content.mean_confidence:.1f} %, mean entropy {content.mean_entropy:.2f} nats."
    )
    if empty := content.counts.count(0):
        summary = f"{summary} {empty:,} of the classes {'has' if empty == 1 else 'have'} no example."
    with drawing([title, *names]) as explanation:
        body = max(LEAST, BAR * len(names) + 1.3)
        figure = headed_page(title, f"{summary} {explanation}", WIDTH, MARGIN + body)
        lay_out(figure, MARGIN, MARGIN + body)
        classes, confidence, entropy = figure.subplots(1, 3)
        note = "dark: distinct; light: with copies" if with_copies else "by the most probable class"
        write_heading(classes, "Examples of each class", note)
        shown_counts = [(content.class_copies, PALETTE[5])] if with_copies else []
        shown_counts.append((content.counts, PALETTE[0]))
        if names:
            for counts, color in shown_counts:
                classes.barh(range(len(names)), counts, color=color, height=0.7)
            name_rows(classes, names)
        else:
            draw_by_size(classes, content.counts, shown_counts)
        most, note = content.greatest_entropy, "probability of the most probable class"
        _draw_histogram(confidence, "Confidence", note, content.confidence, 1.0)
        _draw_histogram(entropy, "Entropy", f"in nats; evenly spread is {most:.2f}", content.entropy, most)
        write_page(path, figure)


def _draw_histogram(axes: Axes, name: str, note: str, counts: Sequence[int], upper: float) -> None:
    write_heading(axes, name, note)
    width = upper / BINS
    axes.bar([width * i for i in range(BINS)], counts, width=width, align="edge", color=PALETTE[0], edgecolor="white")
    axes.set_xlim(0, upper)
    axes.set_ylabel("examples")
    axes.grid(axis="y")
    dress_counts(axes)
