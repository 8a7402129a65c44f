"""The page of a run of Noisy Student: accuracy by round, classes before and after selection, labels that changed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metapl.apps.reports.canvas import drawing, headed_page, lay_out, write_heading, write_note, write_page
from metapl.apps.reports.counts import MOST_NAMED, draw_by_size, name_rows
from metapl.apps.reports.gallery import Gallery, draw_blocks, hung
from metapl.apps.reports.style import DASHED, MARGIN, PALETTE
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, BAR, LEAST = 12.5, 0.3, 3.9
"""Inches of the page, of a named class, and of the panels at least."""


def draw_rounds(
    path: str | os.PathLike[str],
    rounds: Sequence[Mapping[str, Any]],
    *,
    title: str,
    summary: str,
    galleries: Sequence[Gallery] = (),
) -> None:
    """Draw the rounds of Noisy Student, or what was selected by a first teacher for another method, as one PNG file.

    ``rounds`` is one or more of them as ``result.json`` has them; where none has an accuracy, no panel shows these.
    The file takes its name, in a folder that exists, only when it is whole.

    Raises:
        MetaplError: the file cannot be written.
    """
    names = [shown(name) for name in rounds[-1]["labeled_per_class"]]
    galleries = [gallery for gallery in galleries if len(gallery)]
    texts = [title, summary, *names, *(text for gallery in galleries for text in gallery.texts)]
    lines = {name: accuracies(rounds, f"{name}_accuracy") for name in ("test", "validation")}
    with drawing(texts) as explanation:
        blocks = hung(galleries, WIDTH - 2 * MARGIN)
        low = MARGIN + sum(height for height, _ in blocks)
        high = low + max(LEAST, BAR * len(names) + 1.3 if len(names) <= MOST_NAMED else 0.0)
        figure = headed_page(title, f"{summary} {explanation}", WIDTH, high)
        draw_blocks(figure, blocks)
        lay_out(figure, low, high)
        *before, classes = figure.subplots(1, 1 + any(lines.values()), squeeze=False)[0]
        for axes in before:
            _draw_accuracies(axes, lines)
        _draw_classes(classes, rounds[-1], names)
        write_page(path, figure)


def accuracies(rounds: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The accuracy of the network of each round, beginning with the first teacher; empty where one was not measured.

    >>> accuracies([{"test_accuracy": 0.8, "teacher": {"test_accuracy": 0.7}}], "test_accuracy")
    [0.7, 0.8]
    """
    found = [rounds[0]["teacher"].get(name), *(each.get(name) for each in rounds)]
    return [] if None in found else found


def _draw_accuracies(axes: Axes, lines: Mapping[str, list[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    write_heading(axes, "Accuracy by round")
    looks = {"test": (PALETTE[0], "-", "solid"), "validation": (PALETTE[1], DASHED, "dashed")}
    drawn = {name: values for name, values in lines.items() if values}
    last = max(map(len, drawn.values())) - 1
    for name, values in drawn.items():
        color, dashes, _ = looks[name]
        axes.plot(values, color=color, linestyle=dashes, marker="o", markersize=5)
        place = (last, values[-1]), (6, -3)
        axes.annotate(f"{100 * values[-1]:.1f} %", *place, textcoords="offset points", color=color)
    write_note(axes, f"{', '.join(f'{name} ({looks[name][2]})' for name in drawn)}; round 0 is the first teacher")
    axes.set_xlabel("round", loc="right", labelpad=1)
    axes.set_xlim(-0.2, last + 0.45)
    axes.xaxis.set_major_locator(MaxNLocator(min(last + 2, 10), integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    axes.margins(y=0.15)
    axes.grid()


def _draw_classes(axes: Axes, last: Mapping[str, Any], names: Sequence[str]) -> None:
    counts = {name: list(last[f"{name}_per_class"].values()) for name in ("labeled", "kept", "copies")}
    before, kept, after = counts.values()
    write_heading(axes, f"Unlabeled examples in round {last['round']}")
    copies = "; line: kept, with copies" if after != kept else ""
    write_note(axes, f"by class. Light: all; dark: those kept{copies}")
    if len(names) > MOST_NAMED:
        lines = [(before, PALETTE[5]), (kept, PALETTE[0]), (after, PALETTE[1])]
        draw_by_size(axes, before, lines if copies else lines[:2])
        return
    places = range(len(names))
    axes.barh(places, before, color=PALETTE[5], alpha=0.45, height=0.8)
    axes.barh(places, kept, color=PALETTE[0], height=0.5)
    if copies:
        axes.vlines(after, [y - 0.4 for y in places], [y + 0.4 for y in places], color=PALETTE[1], linewidth=2.2)
    name_rows(axes, names)
