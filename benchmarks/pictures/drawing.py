"""Drawing for both halves.

Sprites in unit coordinates, their views, backgrounds, colors and the camera's noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_sample_images

Color = tuple[int, int, int]
Point = tuple[float, float]
Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]

OVERSAMPLING = 3  # sprites are drawn this many times larger, and averaged, for soft edges
LUMA = np.array([0.299, 0.587, 0.114])
FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def color(rng: np.random.Generator, low: float, high: float) -> Color:
    """Return a color of any hue whose lightness lies between two levels of 0..255."""
    rgb = rng.uniform(0, 255, 3)
    target, level = rng.uniform(low, high), float(rgb @ LUMA)
    rgb = (
        rgb + (255 - rgb) * (target - level) / (255 - level)
        if level < target
        else rgb * target / level
    )
    return to_color(rgb)


def to_color(rgb: Sequence[float] | Floats) -> Color:
    r, g, b = (int(min(max(value, 0), 255)) for value in rgb)
    return r, g, b


def hsv(hue: float, saturation: float, value: float) -> Color:
    """Return the color of a hue (a turn is 1), a saturation and a value of 0..1."""
    sector = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    ramp = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return to_color(255 * value * (1 - saturation * ramp))


def tones(
    rng: np.random.Generator, gap: float = 70
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return levels of ground and ink, at least ``gap`` of 255 apart, either one the lighter."""
    middle = rng.uniform(0.35, 0.65) * 255
    dark, light = (10.0, middle - gap / 2), (middle + gap / 2, 245.0)
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Floats:
    """Return noise of 0..1 that varies over about size / cells pixels, of shape (size, size)."""
    grid = rng.integers(0, 256, (cells + 1, cells + 1), dtype=np.uint8)
    return (
        np.asarray(
            Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC), dtype=float
        )
        / 255
    )


def ground(
    rng: np.random.Generator, size: int, levels: tuple[float, float], clutter: int = 0
) -> Floats:
    """Return a background of shape (size, size, 3).

    It has two colors in smooth noise or a ramp, and some patches on it.
    """
    first, second = (np.array(color(rng, *levels), dtype=float) for _ in range(2))
    kind = rng.integers(3)
    if kind == 0:
        mix = np.zeros((size, size))
    elif kind == 1:
        y, x = np.mgrid[0:size, 0:size] / size
        angle = rng.uniform(0, 2 * math.pi)
        mix = np.clip(0.5 + (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle), 0, 1)
    else:
        mix = smooth_noise(rng, size, int(rng.integers(2, 7)))
    picture: Floats = first + (second - first) * mix[..., None]
    if not clutter:
        return picture
    image = Image.fromarray(picture.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, clutter + 1)):
        x, y = rng.uniform(0, size, 2)
        w, h = rng.uniform(0.1, 0.4, 2) * size
        fill = color(rng, *levels)
        match rng.integers(3):
            case 0:
                pen.ellipse((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=fill)
            case 1:
                corners = [(x + rng.uniform(-w, w), y + rng.uniform(-h, h)) for _ in range(4)]
                pen.polygon(corners, fill=fill)
            case _:
                ends = [(x, y), (x + rng.uniform(-2, 2) * w, y + rng.uniform(-2, 2) * h)]
                pen.line(ends, fill=fill, width=max(1, size // 16))
    return np.asarray(image, dtype=float)


class Sprite:
    """A drawing on a transparent ground.

    X goes right and y down, both over -1..1, and widths are in their unit.
    """

    def __init__(self, size: int) -> None:
        self.side = OVERSAMPLING * size
        self.image = Image.new("RGBA", (self.side, self.side))
        self.pen = ImageDraw.Draw(self.image)

    def pixels(self, points: Sequence[Point] | Floats) -> list[Point]:
        return [((x + 1) * self.side / 2, (y + 1) * self.side / 2) for x, y in points]

    def width(self, width: float) -> int:
        return max(1, round(width * self.side / 2))

    def polygon(self, points: Sequence[Point] | Floats, fill: Color, outline: float = 0) -> None:
        """Fill a polygon, or draw its outline of a width alone."""
        if outline:
            self.line([*points, points[0], points[1]], fill, outline)
        else:
            self.pen.polygon(self.pixels(points), fill=fill)

    def ellipse(self, center: Point, radii: Point, fill: Color, outline: float = 0) -> None:
        angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        points = np.stack(
            [center[0] + radii[0] * np.cos(angles), center[1] + radii[1] * np.sin(angles)], axis=1
        )
        self.polygon(points, fill, outline)

    def line(
        self, points: Sequence[Point] | Floats, fill: Color, width: float, round_ends: bool = True
    ) -> None:
        wide, ends = self.width(width), self.pixels(points)
        self.pen.line(ends, fill=fill, width=wide, joint="curve")
        if round_ends:
            for x, y in (ends[0], ends[-1]):
                self.pen.ellipse(
                    (x - wide / 2, y - wide / 2, x + wide / 2, y + wide / 2), fill=fill
                )

    def text(self, text: str, fill: Color, height: float) -> None:
        """Write a text, its box's center in the middle; ``height`` is the font's size."""
        face = ImageFont.truetype(str(FONT_FOLDER / "DejaVuSans-Bold.ttf"), self.width(height))
        left, top, right, bottom = face.getbbox(text)
        ((x, y),) = self.pixels([(0, 0)])
        self.pen.text((x - (left + right) / 2, y - (top + bottom) / 2), text, font=face, fill=fill)

    def stamp(self, alpha: Floats, fill: Color, extent: float) -> None:
        """Paste a color, an array of 0..1 its coverage of the middle ``extent`` of the sprite."""
        side = self.width(2 * extent)
        cover = Image.fromarray((255 * alpha).astype(np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        at = (self.side - side) // 2
        self.image.paste(fill, (at, at), cover)

    def over(self, picture: Floats, view: Floats) -> Floats:
        """Lay the sprite, moved by a view, on a picture of shape (size, size, 3)."""
        half = self.side / 2
        to_pixels = np.array([[half, 0, half], [0, half, half], [0, 0, 1]])
        image = seen_from(
            self.image, self.side, to_pixels @ np.linalg.inv(view) @ np.linalg.inv(to_pixels)
        )
        sprite = np.asarray(image.reduce(OVERSAMPLING), dtype=float)
        alpha = sprite[..., 3:] / 255
        return picture * (1 - alpha) + sprite[..., :3] * alpha


def seen_from(image: Image.Image, side: int, back: Floats) -> Image.Image:
    """Return a square picture whose pixels come from where a 3x3 view puts them in another one."""
    coefficients = tuple((back / back[2, 2]).ravel()[:8])
    return image.transform(
        (side, side), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR
    )


def view(
    rng: np.random.Generator,
    *,
    rotation: float = 0,
    scale: tuple[float, float] = (1, 1),
    shift: float = 0,
    stretch: float = 0,
    shear: float = 0,
    perspective: float = 0,
    mirror: bool = False,
) -> Floats:
    """Return a random 3x3 view in unit coordinates.

    It turns up to ``rotation`` degrees to either side, and so on; maybe it is mirrored.
    """
    turn = math.radians(rng.uniform(-rotation, rotation))
    cos, sin = math.cos(turn), math.sin(turn)
    rotate = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    size, ratio = rng.uniform(*scale), math.exp(rng.uniform(-stretch, stretch))
    sign = -1 if mirror and rng.random() < 0.5 else 1
    resize = np.diag([sign * size * ratio, size / ratio, 1])
    slant = np.array([[1, rng.uniform(-shear, shear), 0], [0, 1, 0], [0, 0, 1]])
    tilt = np.eye(3)
    tilt[2, :2] = rng.uniform(-perspective, perspective, 2)
    move = np.eye(3)
    move[:2, 2] = rng.uniform(-shift, shift, 2)
    return np.asarray(move @ tilt @ rotate @ slant @ resize)


@cache
@cache
def photographs() -> tuple[Bytes, ...]:
    """Return scikit-learn's two photographs, a temple and a flower, of shape (427, 640, 3)."""
    return tuple(np.asarray(image) for image in load_sample_images().images)


def finish(
    rng: np.random.Generator,
    picture: Floats,
    *,
    noise: float = 10,
    blur: float = 0.5,
    light: float = 0.15,
) -> Bytes:
    """Return the picture as a camera would take it, uint8.

    The camera adds some light, some blur (in pixels) and some noise (of 255 levels).
    """
    gain = 1 + rng.uniform(-light, light)
    image = np.clip(
        (picture - 127.5) * gain + 127.5 + 127.5 * rng.uniform(-light, light) / 2, 0, 255
    )
    radius = rng.uniform(0, blur)
    if radius > 0.2:
        image = np.asarray(
            Image.fromarray(image.astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius)),
            dtype=float,
        )
    image = image + rng.normal(0, rng.uniform(2, 2 + noise), image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def grey(picture: Floats) -> Floats:
    """Return the lightness of shape (size, size) of a picture of shape (size, size, 3)."""
    return np.asarray(picture @ LUMA)


class Draw(Protocol):
    """A function that draws a picture of a class.

    The picture is uint8, (size, size) when grey and (size, size, 3) in color. ``test`` says whether
    it is for the test set, and matters only where pictures are made from given ones, such as
    handwritten digits: those of the test set are made from others.
    """

    def __call__(self, rng: np.random.Generator, label: int, size: int, test: bool) -> Bytes: ...


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem: pictures of ``size`` x ``size`` pixels, few labeled, no others for validation.

    ``imbalance`` is how much rarer the last class is than the first among the unlabeled and the
    test pictures, in a geometric sequence. With ``labels_as_found`` the labeled pictures have these
    shares too, as when a user labels what comes; otherwise the user collected ``labels_per_class``
    of each. ``foreign`` is the share of unlabeled pictures that belong to no class: pictures of
    other problems of the same half, and noise.
    """

    name: str
    half: Literal["seen", "unseen"]
    draw: Draw
    size: int
    channels: Literal[1, 3]
    classes: tuple[str, ...]
    labels_per_class: int
    unlabeled: int
    test: int
    imbalance: float = 1
    labels_as_found: bool = False
    foreign: float = 0
