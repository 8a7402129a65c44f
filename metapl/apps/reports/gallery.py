"""Pictures side by side, with a few words beneath each: below a report, or a page of them in groups."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metapl.apps.reports import canvas
from metapl.apps.reports.canvas import CAPTION_LINE, CAPTION_SIZE, MARGIN, PALETTE, QUIET, fitted, wrap, write_lines
from metapl.errors import MetaplError
from metapl.execution.checks import described
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE_SIZE, TITLE_LINE = canvas.PANEL_TITLE_SIZE, canvas.PANEL_TITLE_LINE
NOTE_SIZE, NOTE_LINE = canvas.NOTE_SIZE, canvas.NOTE_LINE
ROWS, CAPTION_LINES = 2, 3

# Inches.
SMALLEST_PICTURE, LARGEST_PICTURE = 1.1, 1.5
SMALLEST_GAP, LARGEST_GAP, ROW_GAP = 0.15, 0.6, 0.16
ABOVE_TITLE, ABOVE_NOTE, BELOW_NOTE = 0.36, 0.05, 0.1
CAPTION_ABOVE, BESIDE_CAPTION, SIGN_WIDTH = 0.06, 0.12, 0.15
CAPTION_BEYOND = 0.25  # how far a caption may go on to the right of its picture: less than the page's margin
BETWEEN_GROUPS, BETWEEN_PICTURES, NARROWEST = 0.3, 0.22, 5.0

TALLEST = 1.4  # height of a picture in units of the width that it has at most; a higher one is drawn narrower
MOST_GROUPS = 1000  # groups on a page: matplotlib draws at most 65,535 pixels from top to bottom

# (color and dashes of the frame, its points, the sign before the caption), so that marks differ in more than color.
MARKS: dict[bool | None, tuple[str, Any, float, str]] = {
    True: (PALETTE[2], "-", 2.2, "✓"),
    False: (PALETTE[1], (0, (3.2, 1.6)), 2.2, "✗"),
    None: (canvas.FRAME, "-", 0.8, ""),
}

Block = tuple[float, Callable[["Figure", float, float], None]]
"""A part of a page: its height, and what draws it from its upper left corner, in inches from the page's lower left."""


@dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures of one size under a title.

    Args:
        title, note: a few words, and what is shown, in a line.
        pictures: (n, C, H, W), C = 1 is grey and C = 3 is red, green and blue; uint8, or floating point in [0, 1]. The
            first of them are drawn, as many as there is room for.
        captions: n texts of up to 3 lines. A line that is too long loses its middle.
        marks: n of True (right), False (wrong) or None (neither); None for no marks at all.
    """

    title: str
    note: str
    pictures: Tensor
    captions: tuple[str, ...]
    marks: tuple[bool | None, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("title", "note"):
            object.__setattr__(self, name, shown(getattr(self, name), keep="\n"))
        object.__setattr__(self, "captions", tuple(shown(caption, keep="\n") for caption in self.captions))
        given: Any = self.pictures
        fits = isinstance(given, Tensor) and given.ndim == 4 and given.shape[1] in (1, 3) and min(given.shape[2:])
        if fits and given.is_floating_point():
            fits = bool(((given >= 0) & (given <= 1)).all())  # NaN is refused as well
        elif fits:
            fits = given.dtype == torch.uint8
        marks = (None,) * len(self.captions) if self.marks is None else self.marks
        object.__setattr__(self, "marks", marks)
        known = all(mark is None or isinstance(mark, bool) for mark in marks)
        if not fits or not known or not len(marks) == len(self.captions) == len(given):
            raise MetaplError(
                f"the pictures of {self.title!r} are {described(given)}, with {len(self.captions)} captions and the "
                f"marks {marks}; expected (n, C, H, W) with C = 1 (grey) or 3 (colors), uint8 or floating point in "
                "[0, 1], and n captions and marks, these True, False or None."
            )

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.title, self.note, *self.captions)

    def block(
        self, title: Sequence[str], note: Sequence[str], drawn: int, columns: int, side: float, pitch: float
    ) -> Block:
        """How so many of its pictures are drawn, under the lines of its title and note: so many in a row, how wide at
        most, and from one's left edge to the next one's."""
        marks, captions = (self.marks or ())[:drawn], [x.split("\n", CAPTION_LINES - 1) for x in self.captions[:drawn]]
        frame = max(MARKS[mark][2] for mark in marks) / 72  # the widest, so that all pictures are of one size
        high, wide = self.pictures.shape[2:]
        width = (side - 2 * frame) * min(1, TALLEST * wide / high)
        height = width * high / wide
        above = ABOVE_TITLE + TITLE_LINE * len(title) + ABOVE_NOTE + NOTE_LINE * len(note) + BELOW_NOTE
        row = height + 2 * frame + CAPTION_ABOVE + CAPTION_LINE * max(map(len, captions)) + ROW_GAP
        room = min(pitch - BESIDE_CAPTION, side + CAPTION_BEYOND)

        def draw(figure: Figure, left: float, top: float) -> None:
            look: dict[str, Any] = {"fontsize": TITLE_SIZE, "fontweight": "bold"}
            y = write_lines(figure, left, top - ABOVE_TITLE, title, TITLE_LINE, **look)
            write_lines(figure, left, y - ABOVE_NOTE, note, canvas.NOTE_LINE, fontsize=NOTE_SIZE, color=QUIET)
            for index, (mark, (first, *others)) in enumerate(zip(marks, captions, strict=True)):
                down, across = divmod(index, columns)
                x, y = left + across * pitch, top - above - down * row
                box = x + frame, y - frame - height, width, height
                _draw_picture(figure, self.pictures[index], box, *MARKS[mark][:3])
                y, color, sign = y - 2 * frame - height - CAPTION_ABOVE, MARKS[mark][0], MARKS[mark][3]
                indent = SIGN_WIDTH if sign else 0.0
                look = {"pitch": CAPTION_LINE, "fontsize": CAPTION_SIZE}
                write_lines(figure, x, y, [sign] * bool(sign), fontweight="bold", color=color, **look)
                y = write_lines(figure, x + indent, y, [fitted(first, room - indent, CAPTION_SIZE)], **look)
                write_lines(figure, x, y, [fitted(line, room, CAPTION_SIZE) for line in others], color=QUIET, **look)

        return above + math.ceil(drawn / columns) * row - ROW_GAP, draw


def hung(galleries: Sequence[Gallery], room: float) -> tuple[float, Callable[[Figure], None]]:
    """Galleries at the foot of a page, in two rows at most below their titles and notes, all in the same columns, from
    edge to edge if they can be: the height up to their top, and what draws them."""
    most = max(map(len, galleries), default=1)
    fit = max(1, math.floor((room + SMALLEST_GAP) / (SMALLEST_PICTURE + SMALLEST_GAP)))
    columns = most if most <= fit else min(math.ceil(most / ROWS), fit)
    side = min((room + SMALLEST_GAP) / columns - SMALLEST_GAP, LARGEST_PICTURE)
    pitch = min((room - side) / max(columns - 1, 1), side + LARGEST_GAP)
    blocks = [
        gallery.block(
            wrap(gallery.title, room, TITLE_SIZE, "bold"),
            wrap(gallery.note, room, NOTE_SIZE),
            min(len(gallery), ROWS * columns),
            *(columns, side, pitch),
        )
        for gallery in galleries
    ]
    low = MARGIN + sum(height for height, _ in blocks)

    def draw_all(figure: Figure) -> None:
        top = low
        for height, draw in blocks:
            draw(figure, MARGIN, top)
            top -= height

    return low, draw_all


def pictures_a_group(groups: int) -> int:
    """How many pictures of each group make a page that can be looked through: an even number.

    >>> [pictures_a_group(groups) for groups in (1, 10, 20, 200)]
    [8, 8, 4, 2]
    """
    return 8 if groups <= 12 else 4 if groups <= 24 else 2


def draw_grid(path: str | os.PathLike[str], title: str, note: str, groups: Sequence[Gallery]) -> None:
    """Draws at most 1,000 groups of pictures, each below its title and its note, as one PNG file.

    Those of few pictures stand side by side, those of many take several rows; of a group's title and note as much is
    written as there is room for.
    """
    groups = [group for group in groups if len(group)]
    if not 0 < len(groups) <= MOST_GROUPS:
        raise MetaplError(f"{len(groups):,} groups of pictures are no grid; expected 1 to {MOST_GROUPS:,}")
    side, across = (1.4, 8) if len(groups) <= 100 else (0.95, 12)
    pitch = side + BETWEEN_PICTURES
    count = min(max(map(len, groups)), across)
    beside = min(across // count, len(groups))
    room = max(pitch * count - BETWEEN_PICTURES, pitch)
    group_pitch = count * pitch + BETWEEN_GROUPS * (beside > 1)
    width = max(2 * MARGIN + group_pitch * (beside - 1) + pitch * count - BETWEEN_PICTURES, NARROWEST)
    with canvas.drawing([title, note, *(text for group in groups for text in group.texts)]) as explanation:
        blocks = []
        for group in groups:  # with a title and a note of one line each, so that the pictures of a band stand in line
            one_line = [fitted(group.title, room, TITLE_SIZE, "bold")], [fitted(group.note, room, NOTE_SIZE)]
            blocks.append(group.block(*one_line, len(group), count, side, pitch))
        bands = [blocks[start : start + beside] for start in range(0, len(blocks), beside)]
        heights = [max(height for height, _ in band) for band in bands]
        top = MARGIN + sum(heights)
        figure = canvas.headed_page(title, f"{note}{explanation and '. '}{explanation}", width, top)
        for band, height in zip(bands, heights, strict=True):
            for number, (_, draw) in enumerate(band):
                draw(figure, MARGIN + number * group_pitch, top)
            top -= height
        canvas.write_page(path, figure)


def _draw_picture(
    figure: Figure, picture: Tensor, box: tuple[float, ...], color: str, dashes: Any, points: float
) -> None:
    """A picture in a box of left, bottom, width and height in inches, and a frame around it."""
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import IdentityTransform

    left, bottom, *size = (round(figure.dpi * length) for length in box)
    width, height = (max(1, length) for length in size)
    # Set down pixel by pixel: axes would resample it once more.
    figure.figimage(_resized(picture, width, height), left, bottom)
    out = points / 72 * figure.dpi / 2
    look: dict[str, Any] = {"edgecolor": color, "linewidth": points, "linestyle": dashes, "fill": False}
    place = (left - out, bottom - out), width + 2 * out, height + 2 * out
    figure.add_artist(Rectangle(*place, transform=IdentityTransform(), **look))


def _resized(picture: Tensor, width: int, height: int) -> Any:
    """A picture in so many pixels, (height, width, 3): one that grows keeps its pixels' edges, one that shrinks is
    averaged."""
    import numpy
    from PIL import Image

    levels = picture.detach().cpu().expand(3, -1, -1)
    levels = levels if levels.dtype == torch.uint8 else (255 * levels.float()).round().to(torch.uint8)
    # Enlarged by whole numbers and then brought down to size, so that all its pixels come out equally large.
    for dim, pixels in ((1, height), (2, width)):
        levels = levels.repeat_interleave(math.ceil(pixels / levels.shape[dim]), dim)
    image = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    return numpy.asarray(image.resize((width, height), Image.Resampling.HAMMING))
