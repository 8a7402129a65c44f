"""Pictures side by side, with a few words beneath each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metapl.apps.reports.canvas import write_lines
from metapl.apps.reports.style import (
    CAPTION_LINE,
    CAPTION_SIZE,
    FRAME,
    NOTE_LINE,
    NOTE_SIZE,
    PALETTE,
    PANEL_TITLE_LINE,
    PANEL_TITLE_SIZE,
    QUIET,
)
from metapl.apps.reports.text import fitted, wrap
from metapl.errors import MetaplError
from metapl.execution.checks import described
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 2
CAPTION_LINES = 3

# Inches.
SMALLEST_PICTURE, LARGEST_PICTURE = 1.1, 1.5
SMALLEST_GAP, LARGEST_GAP, ROW_GAP = 0.15, 0.6, 0.16
ABOVE_TITLE, ABOVE_NOTE, BELOW_NOTE = 0.36, 0.05, 0.1
CAPTION_ABOVE, BESIDE_CAPTION, SIGN_WIDTH = 0.06, 0.12, 0.15
CAPTION_BEYOND = 0.25  # how far a caption may go on to the right of its picture: less than the page's margin

TALLEST = 1.4
"""Height of a picture in units of the width that it has at most; a higher one is drawn narrower."""

# (color and dashes of the frame, its points, the sign before the caption), so that marks differ in more than color.
MARKS: dict[bool | None, tuple[str, Any, float, str]] = {
    True: (PALETTE[2], "-", 2.2, "✓"),
    False: (PALETTE[1], (0, (3.2, 1.6)), 2.2, "✗"),
    None: (FRAME, "-", 0.8, ""),
}


@dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures of one size under a title.

    Args:
        title: a few words.
        note: what is shown, in a line.
        pictures: (n, C, H, W), C = 1 is grey and C = 3 is red, green and blue; uint8, or floating point in [0, 1]. The
            first of them are drawn, as many as there is room for.
        captions: n texts of up to 3 lines. A line that is too long loses its middle.
        marks: n of True (right), False (wrong) or None (neither); None for no marks at all.

    Raises:
        MetaplError: the shapes, the values or the numbers do not fit.

    >>> Gallery("Mistakes", "on validation", torch.zeros(2, 1, 8, 8), ("is: cat",))
    Traceback (most recent call last):
    ...
    metapl.errors.MetaplError: 1 captions were given for the 2 pictures of 'Mistakes'; expected one each
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
        _check_pictures(self.title, self.pictures)
        _check_counts(self.title, len(self.pictures), self.captions, self.marks)

    def __len__(self) -> int:
        return len(self.pictures)

    def mark(self, index: int) -> bool | None:
        """What is said of one of the pictures."""
        return None if self.marks is None else self.marks[index]

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is written."""
        return (self.title, self.note, *self.captions)

    def lines(self, index: int) -> list[str]:
        """The lines beneath one of the pictures; what would be a fourth one goes on in the third."""
        return self.captions[index].split("\n", CAPTION_LINES - 1)


def _check_pictures(title: str, pictures: Any) -> None:
    expected = "expected (n, C, H, W) with C = 1 (grey) or 3 (colors), uint8 or floating point in [0, 1]"
    fits = (
        isinstance(pictures, Tensor) and pictures.ndim == 4 and pictures.shape[1] in (1, 3) and min(pictures.shape[2:])
    )
    if not fits or not (pictures.dtype == torch.uint8 or pictures.is_floating_point()):
        raise MetaplError(f"the pictures of {title!r} are {described(pictures)}; {expected}")
    if pictures.is_floating_point() and len(pictures):
        low, high = (float(value) for value in torch.aminmax(pictures.detach()))
        if not (low >= 0 and high <= 1):  # NaN is refused as well
            raise MetaplError(
                f"the pictures of {title!r} hold values from {low:g} to {high:g}; expected 0 (black) to 1 (full): undo "
                "the normalisation, then pictures.clamp(0, 1)"
            )


def _check_counts(title: str, pictures: int, captions: Sequence[str], marks: Sequence[bool | None] | None) -> None:
    for name, given in (("captions", captions), ("marks", marks)):
        if given is not None and len(given) != pictures:
            raise MetaplError(
                f"{len(given)} {name} were given for the {pictures} pictures of {title!r}; expected one each"
            )
    odd = [mark for mark in marks or () if not (mark is None or isinstance(mark, bool))]
    if odd:
        raise MetaplError(f"the marks of {title!r} hold {odd[0]!r}; expected True (right), False (wrong) or None")


@dataclass(frozen=True)
class Columns:
    """Where pictures stand from left to right, in inches; the same for all galleries of a page."""

    count: int
    width: float
    pitch: float  # from one picture's left edge to the next one's

    @classmethod
    def across(cls, room: float, most: int) -> Columns:
        """In a row where they are not too small for that, in two otherwise; from edge to edge if they can be."""
        fit = max(1, math.floor((room + SMALLEST_GAP) / (SMALLEST_PICTURE + SMALLEST_GAP)))
        count = most if most <= fit else min(math.ceil(most / ROWS), fit)
        width = min((room + SMALLEST_GAP) / count - SMALLEST_GAP, LARGEST_PICTURE)
        return cls(count, width, min((room - width) / max(count - 1, 1), width + LARGEST_GAP))


@dataclass(frozen=True)
class Hanging:
    """A gallery with all that decides its height, in inches.

    Args:
        gallery: its first pictures are drawn.
        columns: where they stand.
        shown: how many.
        title, note: lines above.
    """

    gallery: Gallery
    columns: Columns
    shown: int
    title: tuple[str, ...]
    note: tuple[str, ...]

    @property
    def above(self) -> float:
        """Of the title and the note."""
        lines = PANEL_TITLE_LINE * len(self.title) + NOTE_LINE * len(self.note)
        return ABOVE_TITLE + lines + ABOVE_NOTE + BELOW_NOTE

    @property
    def frame(self) -> float:
        """Around a picture: the widest one, so that all are of one size."""
        return max(MARKS[self.gallery.mark(index)][2] for index in range(self.shown)) / 72

    @property
    def picture_size(self) -> tuple[float, float]:
        """Width and height, without the frame."""
        high, wide = self.gallery.pictures.shape[2:]
        room = self.columns.width - 2 * self.frame
        width = min(room, TALLEST * room * wide / high)
        return width, width * high / wide

    @property
    def row_height(self) -> float:
        """Of a picture, its frame and caption and the gap below."""
        lines = max(len(self.gallery.lines(index)) for index in range(self.shown))
        return self.picture_size[1] + 2 * self.frame + CAPTION_ABOVE + CAPTION_LINE * lines + ROW_GAP

    @property
    def height(self) -> float:
        """Of the whole."""
        return self.above + math.ceil(self.shown / self.columns.count) * self.row_height - ROW_GAP

    def draw(self, figure: Figure, left: float, top: float) -> None:
        """Draws it from `left` and `top` on, in inches from the lower left of the page."""
        y = top - ABOVE_TITLE
        y = write_lines(figure, left, y, self.title, PANEL_TITLE_LINE, fontsize=PANEL_TITLE_SIZE, fontweight="bold")
        write_lines(figure, left, y - ABOVE_NOTE, self.note, NOTE_LINE, fontsize=NOTE_SIZE, color=QUIET)
        width, height = self.picture_size
        for index in range(self.shown):
            row, column = divmod(index, self.columns.count)
            x, y = left + column * self.columns.pitch, top - self.above - row * self.row_height
            box = x + self.frame, y - self.frame - height, width, height
            _draw_picture(figure, self.gallery.pictures[index], box, self.gallery.mark(index))
            self._write_caption(figure, index, x, y - 2 * self.frame - height - CAPTION_ABOVE)

    def _write_caption(self, figure: Figure, index: int, x: float, y: float) -> None:
        room = min(self.columns.pitch - BESIDE_CAPTION, self.columns.width + CAPTION_BEYOND)
        color, _, _, sign = MARKS[self.gallery.mark(index)]
        first, *others = self.gallery.lines(index)
        indent = SIGN_WIDTH if sign else 0.0
        write_lines(
            figure, x, y, [sign] * bool(sign), CAPTION_LINE, fontsize=CAPTION_SIZE, fontweight="bold", color=color
        )
        first = fitted(first, room - indent, CAPTION_SIZE)
        y = write_lines(figure, x + indent, y, [first], CAPTION_LINE, fontsize=CAPTION_SIZE)
        others = [fitted(line, room, CAPTION_SIZE) for line in others]
        write_lines(figure, x, y, others, CAPTION_LINE, fontsize=CAPTION_SIZE, color=QUIET)


def hang(galleries: Sequence[Gallery], room: float) -> list[Hanging]:
    """Galleries in two rows at most below their titles and notes, all in the same columns."""
    if not galleries:
        return []
    columns = Columns.across(room, max(map(len, galleries)))
    return [
        Hanging(
            gallery,
            columns,
            min(len(gallery), ROWS * columns.count),
            wrap(gallery.title, room, PANEL_TITLE_SIZE, "bold"),
            wrap(gallery.note, room, NOTE_SIZE),
        )
        for gallery in galleries
    ]


def draw_galleries(figure: Figure, hangings: Sequence[Hanging], left: float, top: float) -> None:
    """Draws galleries below each other, from `top` downwards."""
    for hanging in hangings:
        hanging.draw(figure, left, top)
        top -= hanging.height


def _draw_picture(figure: Figure, picture: Tensor, box: tuple[float, float, float, float], mark: bool | None) -> None:
    """A picture in a box of left, bottom, width and height in inches, and a frame around it."""
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import IdentityTransform

    left, bottom, width, height = (round(figure.dpi * length) for length in box)
    # Set down pixel by pixel: axes would resample it once more.
    figure.figimage(_resized(picture, max(1, width), max(1, height)), left, bottom)
    color, dashes, points, _ = MARKS[mark]
    out = points / 72 * figure.dpi / 2
    look: dict[str, Any] = {"edgecolor": color, "linewidth": points, "linestyle": dashes, "fill": False}
    place = (left - out, bottom - out), max(1, width) + 2 * out, max(1, height) + 2 * out
    figure.add_artist(Rectangle(*place, transform=IdentityTransform(), **look))


def _resized(picture: Tensor, width: int, height: int) -> Any:
    """A picture in so many pixels, (height, width, 3): one that grows keeps its pixels' edges, one that shrinks is
    averaged.

    >>> _resized(torch.tensor([[[0.0, 1.0]]]), 4, 2)[..., 0].tolist()
    [[0, 0, 255, 255], [0, 0, 255, 255]]
    """
    import numpy
    from PIL import Image

    levels = picture.detach().cpu().expand(3, -1, -1)
    levels = levels if levels.dtype == torch.uint8 else (255 * levels.float()).round().to(torch.uint8)
    # Enlarged by whole numbers and then brought down to size, so that all its pixels come out equally large.
    for dim, pixels in ((1, height), (2, width)):
        levels = levels.repeat_interleave(math.ceil(pixels / levels.shape[dim]), dim)
    image = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    return numpy.asarray(image.resize((width, height), Image.Resampling.HAMMING))
