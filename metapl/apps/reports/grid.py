"""One page of many pictures in groups: what a classifier took them for, class by class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from metapl.apps.reports.canvas import drawing, headed_page, write_page
from metapl.apps.reports.gallery import Columns, Gallery, Hanging
from metapl.apps.reports.style import MARGIN, NOTE_SIZE, PANEL_TITLE_SIZE
from metapl.apps.reports.text import fitted
from metapl.errors import MetaplError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_GROUPS = 1000
"""Groups on a page: matplotlib draws at most 65,535 pixels from top to bottom."""

# Inches.
BETWEEN_GROUPS, BETWEEN_PICTURES = 0.3, 0.22
NARROWEST = 5.0


LARGE, SMALL = (1.4, 8), (0.95, 12)
"""How large pictures are, in inches, and how many stand side by side."""

MOST_LARGE = 100
"""Groups with large pictures."""


def pictures_a_group(groups: int) -> int:
    """How many pictures of each group make a page that can be looked through: an even number.

    >>> [pictures_a_group(groups) for groups in (1, 10, 20, 200)]
    [8, 8, 4, 2]
    """
    return 8 if groups <= 12 else 4 if groups <= 24 else 2


def draw_grid(path: str | os.PathLike[str], title: str, note: str, groups: Sequence[Gallery]) -> None:
    """Draws groups of pictures, each below its title and its note, as one PNG file.

    Args:
        path: the file; its folder exists. It takes this name only when it is whole.
        title: of the page.
        note: what is shown, in a line or a few.
        groups: at most 1,000. Those of few pictures stand side by side; those of many take several rows. Of a group's
            title and note as much is written as there is room for.

    No display is needed and matplotlib's global state stays as it was.

    Raises:
        MetaplError: there is no picture, there are too many groups, or the file cannot be written.
    """
    groups = [group for group in groups if len(group)]
    if not groups:
        raise MetaplError("there is nothing to draw: the grid has no picture")
    if len(groups) > MOST_GROUPS:
        raise MetaplError(f"{len(groups):,} groups of pictures were given; expected {MOST_GROUPS:,} at most")
    with drawing([title, note, *(text for group in groups for text in group.texts)]) as explanation:
        write_page(path, _figure(title, f"{note}{explanation and '. '}{explanation}", groups))


def _figure(title: str, note: str, groups: Sequence[Gallery]) -> Figure:
    side, across = LARGE if len(groups) <= MOST_LARGE else SMALL
    pitch = side + BETWEEN_PICTURES
    count = min(max(map(len, groups)), across)
    beside = min(across // count, len(groups))
    group_width = max(pitch * count - BETWEEN_PICTURES, pitch)
    group_pitch = count * pitch + (BETWEEN_GROUPS if beside > 1 else 0.0)
    width = max(2 * MARGIN + group_pitch * (beside - 1) + pitch * count - BETWEEN_PICTURES, NARROWEST)
    hangings = []
    for group in groups:  # with a title and a note of one line each, so that the pictures of a band stand in line
        words = fitted(group.title, group_width, PANEL_TITLE_SIZE, "bold"), fitted(group.note, group_width, NOTE_SIZE)
        hangings.append(Hanging(group, Columns(count, side, pitch), len(group), words[:1], words[1:]))
    bands = [hangings[start : start + beside] for start in range(0, len(hangings), beside)]
    heights = [max(hanging.height for hanging in band) for band in bands]
    top = MARGIN + sum(heights)
    figure = headed_page(title, note, width, top)
    for band, height in zip(bands, heights, strict=True):
        for number, hanging in enumerate(band):
            hanging.draw(figure, MARGIN + number * group_pitch, top)
        top -= height
    return figure
