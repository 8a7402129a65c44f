"""The seen half: problems on which recipes and defaults may be tuned.

Those that the study of feedback took; the other six, which were among the foreign pictures of the
digits, are at commit 3ab2ada8.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from sklearn.datasets import load_digits

from benchmarks.pictures import drawing
from benchmarks.pictures.drawing import (
    Bytes,
    Floats,
    Problem,
    Sprite,
    color,
    finish,
    grey,
    ground,
    tones,
    view,
)

Generator = np.random.Generator

# ---- textures in any two colors, at any angle

TEXTURES = ("bricks", "checks", "clouds", "dots", "scales", "stripes", "voronoi", "woven")


def texture(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    fine = 2 * size
    y, x = np.mgrid[0:fine, 0:fine] / fine - 0.5
    angle, cells = rng.uniform(0, 2 * math.pi), rng.uniform(3.5, 7)
    bend = 0.5 * (drawing.smooth_noise(rng, fine, 2) - 0.5)  # the surface is not quite flat
    u = cells * (x * math.cos(angle) - y * math.sin(angle)) + bend + rng.uniform(0, 1)
    v = cells * (x * math.sin(angle) + y * math.cos(angle)) + bend.T + rng.uniform(0, 1)
    mix = _pattern(rng, TEXTURES[label], u, v, fine)
    mix = mix.reshape(size, 2, size, 2).mean(axis=(1, 3))[..., None]
    levels, ink = tones(rng, gap=60)
    base, top = (np.array(color(rng, *level), dtype=float) for level in (levels, ink))
    shade = 1 + 0.5 * (drawing.smooth_noise(rng, size, 2)[..., None] - 0.5)
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
        octaves = np.stack([drawing.smooth_noise(rng, fine, start * 2**k) / 2**k for k in range(4)])
        return np.asarray(np.clip(0.5 + 1.5 * (octaves.sum(axis=0) / 1.875 - 0.5), 0, 1))
    return mix.astype(float)


# ---- handwritten digits on colored clutter; color says nothing


@cache
def _handwritten(test: bool) -> tuple[Floats, ...]:
    """Return digits of 8x8 as coverage, by class.

    Every third of scikit-learn's is kept for the test sets.
    """
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


# ---- arrows by direction; a turn or a mirror makes another class

DIRECTIONS = ("east", "southeast", "south", "southwest", "west", "northwest", "north", "northeast")


def arrow(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    levels, ink = tones(rng)
    fill, sprite = color(rng, *ink), Sprite(size)
    wide, head, shaft = rng.uniform(0.35, 0.6), rng.uniform(-0.1, 0.3), rng.uniform(0.1, 0.22)
    match rng.integers(4):
        case 0:  # a block arrow
            back = [
                (head, wide),
                (head, shaft),
                (-0.8, shaft),
                (-0.8, -shaft),
                (head, -shaft),
                (head, -wide),
            ]
            sprite.polygon([(0.8, 0), *back], fill)
        case 1:  # lines
            sprite.line([(-0.8, 0), (0.8, 0)], fill, shaft)
            sprite.line([(head, -wide), (0.8, 0), (head, wide)], fill, shaft)
        case 2:  # a chevron
            ends = rng.uniform(-0.5, -0.1)
            sprite.line([(ends, -0.7), (0.5, 0), (ends, 0.7)], fill, 1.5 * shaft)
        case _:  # a dart
            sprite.polygon(
                [(0.8, 0), (-0.7, wide), (rng.uniform(-0.5, -0.2), 0), (-0.7, -wide)], fill
            )
    turn = math.radians(45 * label)
    towards = np.array(
        [[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]]
    )
    moved = view(rng, rotation=10, scale=(0.65, 1.05), shift=0.2) @ towards
    return finish(rng, grey(sprite.over(ground(rng, size, levels, clutter=2), moved)), noise=14)


PROBLEMS = (
    Problem(name="textures", half="seen", draw=texture, size=48, channels=3, classes=TEXTURES,
            labels_per_class=3, unlabeled=800, test=640, imbalance=10),
    Problem(name="digits", half="seen", draw=digit, size=32, channels=3,
            classes=tuple("0123456789"), labels_per_class=10, unlabeled=2000, test=1000,
            foreign=0.3),
    Problem(name="arrows", half="seen", draw=arrow, size=20, channels=1, classes=DIRECTIONS,
            labels_per_class=2, unlabeled=500, test=800),
)  # fmt: skip
