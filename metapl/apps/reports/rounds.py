"""The page of a run of Noisy Student: accuracy by round, classes before and after selection, labels that changed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metapl.apps.reports.canvas import drawing, headed_page, lay_out, write_heading, write_note, write_page
from metapl.apps.reports.counts import MOST_NAMED, draw_by_size, name_rows
from metapl.apps.reports.gallery import Gallery, draw_galleries, hang
from metapl.apps.reports.style import MARGIN, PALETTE
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, BAR, LEAST = 12.5, 0.3, 3.9
"""Inches of the page, of a named class, and of the panels at least."""

ACCURACIES = {"test_accuracy": ("test", "-"), "validation_accuracy": ("validation", (0, (4, 1.8)))}
"""What is drawn of each round, with its name and dashes."""


def draw_rounds(
    path: str | os.PathLike[str],
    rounds: Sequence[Mapping[str, Any]],
    *,
    title: str,
    summary: str,
    galleries: Sequence[Gallery] = (),
) -> None:
    """Draw the rounds of Noisy Student, or what was selected by a first teacher for another method, as one PNG file.

    Args:
        path: the file; its folder exists. It takes this name only when it is whole.
        rounds: as ``result.json`` has them, one or more; where none of them has an accuracy, no panel shows these.
        title, summary: stand above.
        galleries: pictures below.

    Raises:
        MetaplError: the file cannot be written.
    """
    names = [shown(name) for name in rounds[-1]["labeled_per_class"]]
    galleries = [gallery for gallery in galleries if len(gallery)]
    texts = [title, summary, *names, *(text for gallery in galleries for text in gallery.texts)]
    with drawing(texts) as explanation:
        write_page(path, _figure(rounds, title, f"{summary} {explanation}", names, galleries))


def _figure(
    rounds: Sequence[Mapping[str, Any]],
    title: str,
    summary: str,
    names: Sequence[str],
    galleries: Sequence[Gallery],
) -> Figure:
    hangings = hang(galleries, WIDTH - 2 * MARGIN)
    low = MARGIN + sum(hanging.height for hanging in hangings)
    body = max(LEAST, BAR * len(names) + 1.3 if len(names) <= MOST_NAMED else 0.0)
    figure = headed_page(title, summary, WIDTH, low + body)
    draw_galleries(figure, hangings, MARGIN, low)
    lay_out(figure, low, low + body)
    measured = any(accuracies(rounds, name) for name in ACCURACIES)
    *before, classes = figure.subplots(1, 1 + measured, squeeze=False)[0]
    for axes in before:
        _draw_accuracies(axes, rounds)
    _draw_classes(classes, rounds[-1], names)
    return figure


def accuracies(rounds: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The accuracy of the network of each round, beginning with the first teacher; empty where one was not measured.

    >>> accuracies([{"test_accuracy": 0.8, "teacher": {"test_accuracy": 0.7}}], "test_accuracy")
    [0.7, 0.8]
    """
    found = [rounds[0]["teacher"].get(name), *(each.get(name) for each in rounds)]
    return [] if None in found else found


def _draw_accuracies(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    write_heading(axes, "Accuracy by round")
    drawn = []
    for (name, (words, dashes)), color in zip(ACCURACIES.items(), PALETTE, strict=False):
        values = accuracies(rounds, name)
        if values:
            axes.plot(
                range(len(values)), values, color=color, linestyle=dashes, marker="o", markersize=5, linewidth=1.9
            )
            axes.annotate(
                f"{100 * values[-1]:.1f} %",
                (len(values) - 1, values[-1]),
                (6, -3),
                textcoords="offset points",
                color=color,
            )
            drawn.append(f"{words} ({'solid' if dashes == '-' else 'dashed'})")
    write_note(axes, f"{', '.join(drawn)}; round 0 is the first teacher")
    axes.set_xlabel("round", loc="right", labelpad=1)
    axes.set_xlim(-0.2, len(rounds) + 0.45)
    axes.xaxis.set_major_locator(MaxNLocator(min(len(rounds) + 2, 10), integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    axes.margins(y=0.15)
    axes.grid()


def _draw_classes(axes: Axes, last: Mapping[str, Any], names: Sequence[str]) -> None:
    before, kept, after = (
        list(last[key].values()) for key in ("labeled_per_class", "kept_per_class", "copies_per_class")
    )
    write_heading(axes, f"Unlabeled examples in round {last['round']}")
    copies = "; line: kept, with copies" if after != kept else ""
    write_note(axes, f"by class. Light: all; dark: those kept{copies}")
    if len(names) > MOST_NAMED:
        shown_counts = [(before, PALETTE[5]), (kept, PALETTE[0]), *([(after, PALETTE[1])] if copies else [])]
        draw_by_size(axes, before, shown_counts)
        return
    places = range(len(names))
    axes.barh(places, before, color=PALETTE[5], alpha=0.45, height=0.8)
    axes.barh(places, kept, color=PALETTE[0], height=0.5)
    for place, count in zip(places, after, strict=True) if copies else ():
        axes.plot([count, count], [place - 0.4, place + 0.4], color=PALETTE[1], linewidth=2.2)
    name_rows(axes, names)
