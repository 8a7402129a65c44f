"""The seen half: problems on which recipes and defaults may be tuned."""

from __future__ import annotations

import io
import math
from functools import cache

import numpy as np
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

from benchmarks.pictures.drawing import (
    Bytes,
    Color,
    Floats,
    Sprite,
    color,
    finish,
    grey,
    ground,
    hsv,
    photographs,
    smooth_noise,
    tones,
    view,
)
from benchmarks.pictures.icons import ICONS, draw_icon
from benchmarks.pictures.problem import Problem

Generator = np.random.Generator

# ---- letters in many fonts; a mirror makes another letter of some

LETTERS = tuple("abdeghkmpqrt")
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-BoldOblique", "-Oblique", "Mono", "Mono-Bold", "Mono-Oblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-BoldItalic", "-Italic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "BolIta", "Italic")),
    *("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)


def letter(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    levels, ink = tones(rng)
    sprite = Sprite(size)
    sprite.text(LETTERS[label], FONTS[rng.integers(len(FONTS))], color(rng, *ink), height=1.6)
    moved = view(rng, rotation=14, scale=(0.7, 1.15), shift=0.15, stretch=0.15, shear=0.15)
    return finish(rng, grey(sprite.over(ground(rng, size, levels, clutter=3), moved)), noise=14)


# ---- textures in any two colors, at any angle

TEXTURES = ("bricks", "checks", "clouds", "dots", "scales", "stripes", "voronoi", "woven")


def texture(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    fine = 2 * size
    y, x = np.mgrid[0:fine, 0:fine] / fine - 0.5
    angle, cells = rng.uniform(0, 2 * math.pi), rng.uniform(3.5, 7)
    bend = 0.5 * (smooth_noise(rng, fine, 2) - 0.5)  # the surface is not quite flat
    u = cells * (x * math.cos(angle) - y * math.sin(angle)) + bend + rng.uniform(0, 1)
    v = cells * (x * math.sin(angle) + y * math.cos(angle)) + bend.T + rng.uniform(0, 1)
    mix = _pattern(rng, TEXTURES[label], u, v, fine)
    mix = mix.reshape(size, 2, size, 2).mean(axis=(1, 3))[..., None]
    levels, ink = tones(rng, gap=60)
    base, top = (np.array(color(rng, *level), dtype=float) for level in (levels, ink))
    shade = 1 + 0.5 * (smooth_noise(rng, size, 2)[..., None] - 0.5)
    return finish(rng, (base + (top - base) * mix) * shade, noise=16, blur=0.8)


def _pattern(rng: Generator, name: str, u: Floats, v: Floats, fine: int) -> Floats:
    duty = rng.uniform(0.3, 0.6)
    cell_u, cell_v = u - np.floor(u), v - np.floor(v)
    if name == "stripes":
        mix = cell_u < duty
    elif name == "checks":
        mix = (np.floor(u) + np.floor(v)) % 2 == 0
    elif name == "dots":
        mix = np.hypot(cell_u - 0.5, cell_v - 0.5) < 0.25 + 0.3 * (duty - 0.3)
    elif name == "bricks":
        thin = rng.uniform(0.1, 0.2)
        along = (0.5 * u + 0.5 * np.floor(v)) % 1
        mix = (cell_v < thin) | (along < thin / 2)
    elif name == "woven":
        over = (np.floor(u) + np.floor(v)) % 2 == 0
        across, along = np.where(over, cell_u, cell_v), np.where(over, cell_v, cell_u)
        return (1 - (2 * across - 1) ** 2) * (1 - 0.4 * (2 * along - 1) ** 2)
    elif name == "scales":
        row = np.floor(v)
        arcs = [np.hypot((u + 0.5 * ((row + k) % 2)) % 1 - 0.5, cell_v + k) for k in (0, 1)]
        inner, outer = arcs
        mix = np.where(inner < 0.62, np.abs(inner - 0.54) < 0.08, np.abs(outer - 0.54) < 0.08)
    elif name == "voronoi":
        sites = rng.uniform(-0.1, 1.1, (int(rng.integers(25, 55)), 2)) * fine
        y, x = np.mgrid[0:fine, 0:fine]
        squares = (x[..., None] - sites[:, 0]) ** 2 + (y[..., None] - sites[:, 1]) ** 2
        nearest = np.sqrt(np.partition(squares, 1, axis=-1)[..., :2])
        mix = nearest[..., 1] - nearest[..., 0] < fine * rng.uniform(0.015, 0.035)
    else:  # clouds
        start = int(rng.integers(3, 6))
        octaves = np.stack([smooth_noise(rng, fine, start * 2**k) / 2**k for k in range(4)])
        return np.asarray(np.clip(0.5 + 1.5 * (octaves.sum(axis=0) / 1.875 - 0.5), 0, 1))
    return mix.astype(float)


# ---- handwritten digits on colored clutter; color says nothing


@cache
def _handwritten(test: bool) -> tuple[Floats, ...]:
    """Digits of 8x8 as coverage, by class; every third of scikit-learn's is kept for the test sets."""
    digits = load_digits()
    third = np.arange(len(digits.target)) % 3 == 0
    return tuple(digits.images[(digits.target == k) & (third == test)] / 16 for k in range(10))


def digit(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    levels, ink = tones(rng, gap=60)
    sources = _handwritten(test)[label]
    sprite = Sprite(size)
    sprite.stamp(sources[rng.integers(len(sources))], color(rng, *ink), extent=0.9)
    moved = view(rng, rotation=15, scale=(0.65, 1.05), shift=0.2, stretch=0.15, shear=0.15)
    return finish(rng, sprite.over(ground(rng, size, levels, clutter=8), moved), noise=14)


# ---- how many blobs

COUNTS = ("one", "two", "three", "four", "five")


def blobs(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    levels, ink = tones(rng, gap=60)
    sprite, placed = Sprite(size), list[tuple[float, float, float]]()
    shrink = 1.0
    while len(placed) <= label:
        radius = shrink * rng.uniform(0.13, 0.32)
        x, y = rng.uniform(-0.95 + radius, 0.95 - radius, 2)
        if all(math.hypot(x - a, y - b) > radius + r + 0.1 for a, b, r in placed):
            placed.append((x, y, radius))
        shrink = max(0.5, 0.995 * shrink)
    squares = rng.random() < 0.3
    for x, y, radius in placed:
        fill, turn = color(rng, *ink), rng.uniform(0, math.pi)
        corners = 4 if squares else 24
        angles = np.linspace(0, 2 * math.pi, corners, endpoint=False)
        oval = np.stack([np.cos(angles), rng.uniform(0.7, 1) * np.sin(angles)], axis=1)
        turned = oval @ np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        sprite.polygon(np.array([x, y]) + radius * turned, fill)
    return finish(rng, grey(sprite.over(ground(rng, size, levels))), noise=18, blur=0.8)


# ---- spirals by turns and by hand; a mirror makes another class

SPIRALS = tuple(f"{hand}_{turns}" for hand in ("left", "right") for turns in (1, 2, 3))


def spiral(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    hand, turns = (-1 if label < 3 else 1), 1 + label % 3
    levels, ink = tones(rng, gap=80)
    along = np.linspace(0, 1, 60)
    angles = hand * 2 * math.pi * (turns + rng.uniform(-0.15, 0.15)) * along + rng.uniform(0, 2 * math.pi)
    radii = 0.08 + 0.77 * along ** rng.uniform(0.8, 1.2)
    sprite = Sprite(size)
    points = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    sprite.line(points, color(rng, *ink), rng.uniform(0.08, 0.13))
    moved = view(rng, rotation=180, scale=(0.75, 1.05), shift=0.12, stretch=0.15)
    return finish(rng, grey(sprite.over(ground(rng, size, levels), moved)), noise=14)


# ---- what was done to a photograph

DEGRADATIONS = ("sharp", "defocus", "motion", "noise", "blocks", "few_levels")


def degraded(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    patch = _patch(rng, size, test)
    patch = Image.fromarray(finish(rng, np.asarray(patch, dtype=float), noise=0, blur=0, light=0.3))
    name = DEGRADATIONS[label]
    if name == "defocus":
        patch = patch.filter(ImageFilter.GaussianBlur(rng.uniform(1.6, 3)))
    elif name == "motion":
        length, angle = int(rng.integers(7, 13)), rng.uniform(0, math.pi)
        steps = np.arange(length) - (length - 1) / 2
        moves = [(1, 0, s * math.cos(angle), 0, 1, s * math.sin(angle)) for s in steps]
        stack = [np.asarray(patch.transform(patch.size, Image.Transform.AFFINE, m, 2), dtype=float) for m in moves]
        patch = Image.fromarray(np.mean(stack, axis=0).astype(np.uint8))
    elif name == "noise":
        levels = np.asarray(patch, dtype=float)
        patch = Image.fromarray(
            np.clip(levels + rng.normal(0, rng.uniform(18, 40), levels.shape), 0, 255).astype(np.uint8)
        )
    elif name == "blocks":
        file = io.BytesIO()
        patch.save(file, "JPEG", quality=int(rng.integers(3, 9)))
        patch = Image.open(file)
    elif name == "few_levels":
        shades = int(rng.integers(3, 5))
        patch = Image.fromarray((np.rint(np.asarray(patch) / 255 * (shades - 1)) * 255 / (shades - 1)).astype(np.uint8))
    margin = (patch.width - size) // 2
    levels = np.asarray(patch.crop((margin, margin, margin + size, margin + size)), dtype=float)
    return finish(rng, levels, noise=2, blur=0, light=0)


def _patch(rng: Generator, size: int, test: bool) -> Image.Image:
    """A patch with a margin and something to see; those of the test set are from other parts of the photographs."""
    side = size + 16
    while True:
        photo = photographs()[rng.integers(2)]
        height, width = photo.shape[:2]
        zoom = rng.uniform(0.8, 1.4)
        cut = int(side * zoom)
        top, left = int(rng.integers(0, height - cut)), int(rng.integers(0, width - cut))
        # The middle columns of the temple and of the flower are split at the middle of the one and of the other.
        middle = 205 if photo is photographs()[0] else 305
        patch = photo[top : top + cut, left : left + cut]
        if (left + cut / 2 > middle) != test and np.abs(np.diff(patch @ np.array([0.3, 0.6, 0.1]), axis=0)).mean() > 6:
            break
    image = Image.fromarray(patch).resize((side, side), Image.Resampling.BICUBIC)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


# ---- arrows by direction; a turn or a mirror makes another class

DIRECTIONS = ("east", "southeast", "south", "southwest", "west", "northwest", "north", "northeast")


def arrow(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    levels, ink = tones(rng)
    fill, sprite = color(rng, *ink), Sprite(size)
    wide, head, shaft = rng.uniform(0.35, 0.6), rng.uniform(-0.1, 0.3), rng.uniform(0.1, 0.22)
    match rng.integers(4):
        case 0:  # a block arrow
            back = [(head, wide), (head, shaft), (-0.8, shaft), (-0.8, -shaft), (head, -shaft), (head, -wide)]
            sprite.polygon([(0.8, 0), *back], fill)
        case 1:  # lines
            sprite.line([(-0.8, 0), (0.8, 0)], fill, shaft)
            sprite.line([(head, -wide), (0.8, 0), (head, wide)], fill, shaft)
        case 2:  # a chevron
            ends = rng.uniform(-0.5, -0.1)
            sprite.line([(ends, -0.7), (0.5, 0), (ends, 0.7)], fill, 1.5 * shaft)
        case _:  # a dart
            sprite.polygon([(0.8, 0), (-0.7, wide), (rng.uniform(-0.5, -0.2), 0), (-0.7, -wide)], fill)
    turn = math.radians(45 * label)
    towards = np.array([[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]])
    moved = view(rng, rotation=10, scale=(0.65, 1.05), shift=0.2) @ towards
    return finish(rng, grey(sprite.over(ground(rng, size, levels, clutter=2), moved)), noise=14)


# ---- icons in any colors


def icon(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    levels, ink = tones(rng, gap=60)
    sprite = Sprite(size)
    draw_icon(sprite, ICONS[tuple(ICONS)[label]], rng, [color(rng, *ink) for _ in range(3)])
    moved = view(rng, rotation=15, scale=(0.6, 0.95), shift=0.15, stretch=0.15, shear=0.1, perspective=0.1, mirror=True)
    return finish(rng, sprite.over(ground(rng, size, levels, clutter=6), moved), noise=14, blur=0.8)


# ---- ripe by color; shape and size say nothing

RIPENESS = ("green", "turning", "ripe")
HUES = ((0.24, 0.33), (0.115, 0.165), (0.97, 1.025))


def fruit(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    leaves = ground(rng, size, (20, 150)) * 0.5 + 0.5 * np.array(hsv(rng.uniform(0.05, 0.45), 0.7, 0.5))
    sprite = Sprite(size)
    for _ in range(rng.integers(1, 4)):  # leaves, green or brown, and so near the fruits' colors
        _leaf(rng, sprite, hsv(rng.uniform(0.02, 0.4), rng.uniform(0.4, 0.8), rng.uniform(0.2, 0.6)))
    hue, value = rng.uniform(*HUES[label]), rng.uniform(0.55, 0.95)
    x, y, radius = *rng.uniform(-0.3, 0.3, 2), rng.uniform(0.4, 0.65)
    flat, saturation = rng.uniform(0.75, 1), rng.uniform(0.65, 0.95)
    for step in range(4):  # from the shaded rim to the light
        inner = radius * (1 - 0.22 * step)
        shade = hsv(hue % 1, saturation - 0.05 * step, value * (0.7 + 0.1 * step))
        sprite.ellipse((x - 0.05 * step, y - 0.05 * step), (inner, flat * inner), shade)
    white = np.array([rng.uniform(0.85, 1.15), 1, rng.uniform(0.8, 1.2)])
    return finish(rng, sprite.over(leaves, view(rng, rotation=180)) * white, noise=16, light=0.2)


def _leaf(rng: Generator, sprite: Sprite, fill: Color) -> None:
    x, y = rng.uniform(-1, 1, 2)
    sprite.ellipse((x, y), (rng.uniform(0.2, 0.6), rng.uniform(0.15, 0.5)), fill)


PROBLEMS = (
    Problem(
        name="letters", half="seen", draw=letter, size=24, channels=1, classes=LETTERS,
        labels_per_class=5, unlabeled=1200, test=600,
    ),
    Problem(
        name="textures", half="seen", draw=texture, size=48, channels=3, classes=TEXTURES,
        labels_per_class=3, unlabeled=800, test=640, imbalance=10,
    ),
    Problem(
        name="digits", half="seen", draw=digit, size=32, channels=3, classes=tuple("0123456789"),
        labels_per_class=10, unlabeled=2000, test=1000, foreign=0.3,
    ),
    Problem(
        name="counting", half="seen", draw=blobs, size=40, channels=1, classes=COUNTS,
        labels_per_class=20, unlabeled=1000, test=500,
    ),
    Problem(
        name="spirals", half="seen", draw=spiral, size=32, channels=1, classes=SPIRALS,
        labels_per_class=8, unlabeled=900, test=600, foreign=0.25,
    ),
    Problem(
        name="degradations", half="seen", draw=degraded, size=64, channels=3, classes=DEGRADATIONS,
        labels_per_class=4, unlabeled=600, test=600, imbalance=10, labels_as_found=True,
    ),
    Problem(
        name="arrows", half="seen", draw=arrow, size=20, channels=1, classes=DIRECTIONS,
        labels_per_class=2, unlabeled=500, test=800,
    ),
    Problem(
        name="icons", half="seen", draw=icon, size=96, channels=3, classes=tuple(ICONS),
        labels_per_class=1, unlabeled=1000, test=1000, foreign=0.2,
    ),
    Problem(
        name="fruits", half="seen", draw=fruit, size=16, channels=3, classes=RIPENESS,
        labels_per_class=25, unlabeled=300, test=500, imbalance=10, labels_as_found=True,
    ),
)  # fmt: skip
