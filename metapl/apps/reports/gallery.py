"""Pictures side by side, with a few words beneath each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metapl.apps.reports.canvas import Box, write_at
from metapl.apps.reports.style import (
    ABOVE_PANEL,
    CAPTION_SIZE,
    DOTS_PER_INCH,
    FRAME,
    INK,
    NOTE_ABOVE,
    NOTE_LINE,
    NOTE_SIZE,
    PANEL_TITLE_LINE,
    PANEL_TITLE_SIZE,
    QUIET,
    RIGHT,
    TITLE_ABOVE,
    WRONG,
)
from metapl.apps.reports.text import drawable, fitted, wrap
from metapl.errors import MetaplError
from metapl.execution.checks import described
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 2
CAPTION_LINES = 3

# Inches.
SMALLEST_PICTURE, LARGEST_PICTURE = 0.95, 1.5
SMALLEST_GAP, LARGEST_GAP, ROW_GAP = 0.15, 0.6, 0.16
ABOVE_TITLE, BELOW_NOTE = 0.05, 0.05
CAPTION_ABOVE, CAPTION_LINE, BESIDE_CAPTION, SIGN_WIDTH = 0.06, 0.165, 0.12, 0.15
CAPTION_BEYOND = 0.25  # how far a caption may go on to the right of its picture: less than the page's margin

TALLEST = 1.4
"""Height of a picture in units of the width that it has at most; a higher one is drawn narrower."""

# (color and dashes of the frame, its points, the sign before the caption), so that marks differ in more than color.
MARKS: dict[bool | None, tuple[str, Any, float, str]] = {
    True: (RIGHT, "-", 2.2, "✓"),
    False: (WRONG, (0, (3.2, 1.6)), 2.2, "✗"),
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
        return [drawable(line) for line in self.captions[index].split("\n", CAPTION_LINES - 1)]


def _check_pictures(title: str, pictures: Any) -> None:
    expected = "expected (n, C, H, W) with C = 1 (grey) or 3 (colors), uint8 or floating point in [0, 1]"
    if not isinstance(pictures, Tensor):
        raise MetaplError(f"the pictures of {title!r} are {described(pictures)}; {expected}")
    shape_fits = pictures.ndim == 4 and pictures.shape[1] in (1, 3) and min(pictures.shape[2:]) > 0
    if not shape_fits or not (pictures.dtype == torch.uint8 or pictures.is_floating_point()):
        raise MetaplError(f"the pictures of {title!r} are {described(pictures)}; {expected}")
    if pictures.is_floating_point() and len(pictures):
        low, high = (float(value) for value in torch.aminmax(pictures.detach()))
        if not (low >= 0 and high <= 1):  # NaN is refused as well
            raise MetaplError(
                f"the pictures of {title!r} hold values from {low:g} to {high:g}; expected 0 (black) to 1 (full): undo "
                "the normalisation, then pictures.clamp(0, 1)"
            )


def _check_counts(title: str, pictures: int, captions: Sequence[str], marks: Sequence[bool | None] | None) -> None:
    if len(captions) != pictures:
        raise MetaplError(
            f"{len(captions)} captions were given for the {pictures} pictures of {title!r}; expected one each"
        )
    if marks is not None and len(marks) != pictures:
        raise MetaplError(f"{len(marks)} marks were given for the {pictures} pictures of {title!r}; expected one each")
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
    """A gallery with all that decides its height."""

    gallery: Gallery
    columns: Columns
    shown: int
    title: tuple[str, ...]
    note: tuple[str, ...]

    @property
    def frame(self) -> float:
        """Inches around a picture: the widest frame of the gallery, so that its pictures are of one size."""
        return max(MARKS[self.gallery.mark(index)][2] for index in range(self.shown)) / 72

    @property
    def picture_size(self) -> tuple[float, float]:
        """Width and height in inches, without the frame."""
        high, wide = self.gallery.pictures.shape[2:]
        room = self.columns.width - 2 * self.frame
        width = min(room, TALLEST * room * wide / high)
        return width, width * high / wide

    @property
    def row_height(self) -> float:
        """Inches of a picture, its frame and caption and the gap below."""
        lines = max(len(self.gallery.lines(index)) for index in range(self.shown))
        return self.picture_size[1] + 2 * self.frame + CAPTION_ABOVE + CAPTION_LINE * lines + ROW_GAP

    @property
    def above(self) -> float:
        """Inches of the title and the note; a little more than above a panel, for a picture is darker."""
        if not self.title and not self.note:
            return 0.0
        lines = PANEL_TITLE_LINE * (len(self.title) - 1) + NOTE_LINE * (len(self.note) - 1)
        return ABOVE_TITLE + ABOVE_PANEL + lines + BELOW_NOTE

    @property
    def height(self) -> float:
        """Inches of the whole."""
        return self.above + math.ceil(self.shown / self.columns.count) * self.row_height - ROW_GAP

    def boxes(self, left: float, top: float) -> list[Box]:
        """The places of the pictures shown, where the whole begins at `left` and `top`."""
        width, height = self.picture_size
        left, bottom = left + self.frame, top - self.above - self.frame - height
        cells = (divmod(index, self.columns.count) for index in range(self.shown))
        return [
            (left + column * self.columns.pitch, bottom - row * self.row_height, width, height) for row, column in cells
        ]


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
        draw_gallery(figure, hanging, left, top)
        top -= hanging.height


def draw_gallery(figure: Figure, hanging: Hanging, left: float, top: float) -> None:
    """Draws a gallery whose title, frames and captions begin at `left`, in inches."""
    gallery, columns = hanging.gallery, hanging.columns
    room = min(columns.pitch - BESIDE_CAPTION, columns.width + CAPTION_BEYOND)
    _write_heading(figure, hanging, left, top - hanging.above + BELOW_NOTE)
    for index, box in enumerate(hanging.boxes(left, top)):
        _draw_picture(figure, gallery.pictures[index], box, gallery.mark(index))
        corner = box[0] - hanging.frame, box[1] - hanging.frame
        _write_caption(figure, gallery.lines(index), corner, room, gallery.mark(index))


def _write_heading(figure: Figure, hanging: Hanging, left: float, below: float) -> None:
    """The title and the note, upwards from the pictures and as far from them as from a panel."""
    for number, line in enumerate(reversed(hanging.note)):
        write_at(figure, left, below + NOTE_ABOVE + NOTE_LINE * number, line, fontsize=NOTE_SIZE, color=QUIET)
    below += TITLE_ABOVE + NOTE_LINE * (len(hanging.note) - 1)
    for number, line in enumerate(reversed(hanging.title)):
        y = below + PANEL_TITLE_LINE * number
        write_at(figure, left, y, line, fontsize=PANEL_TITLE_SIZE, fontweight="bold")


def _draw_picture(figure: Figure, picture: Tensor, box: Box, mark: bool | None) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import IdentityTransform

    left, bottom = (round(DOTS_PER_INCH * start) for start in box[:2])
    width, height = (max(1, round(DOTS_PER_INCH * length)) for length in box[2:])
    # Set down pixel by pixel: axes would resample it once more.
    figure.figimage(_resized(picture, width, height), left, bottom)
    color, dashes, points, _ = MARKS[mark]
    outside = points / 72 * DOTS_PER_INCH / 2
    frame = Rectangle(
        (left - outside, bottom - outside),
        width + 2 * outside,
        height + 2 * outside,
        transform=IdentityTransform(),
        fill=False,
        edgecolor=color,
        linewidth=points,
        linestyle=dashes,
    )
    figure.add_artist(frame)


def _resized(picture: Tensor, width: int, height: int) -> Any:
    """A picture in so many pixels, (height, width, 3): one that grows keeps its pixels' edges, one that shrinks is
    averaged.

    >>> _resized(torch.tensor([[[0.0, 1.0]]]), 4, 2)[..., 0].tolist()
    [[0, 0, 255, 255], [0, 0, 255, 255]]
    """
    import numpy
    from einops import repeat
    from PIL import Image

    picture = picture.detach().cpu()
    if picture.is_floating_point():
        picture = (255 * picture.float()).round().to(torch.uint8)
    down, across = math.ceil(height / picture.shape[1]), math.ceil(width / picture.shape[2])
    # Enlarged by whole numbers and then brought down to size, so that all its pixels come out equally large.
    large = repeat(picture.expand(3, -1, -1), "c h w -> (h down) (w across) c", down=down, across=across)
    image = Image.fromarray(large.numpy())
    return numpy.asarray(image.resize((width, height), Image.Resampling.HAMMING))


def _write_caption(
    figure: Figure, lines: Sequence[str], corner: tuple[float, float], room: float, mark: bool | None
) -> None:
    left, bottom = corner
    color, _, _, sign = MARKS[mark]
    for number, line in enumerate(lines):
        x, y = left, bottom - CAPTION_ABOVE - CAPTION_LINE * (number + 1) + 0.04
        if sign and number == 0:
            write_at(figure, x, y, sign, fontsize=CAPTION_SIZE, fontweight="bold", color=color)
            x += SIGN_WIDTH
        text = fitted(line, left + room - x, CAPTION_SIZE)
        write_at(figure, x, y, text, fontsize=CAPTION_SIZE, color=QUIET if number else INK)
