"""Textures in any two colors, at any angle: drawn pictures of 48 x 48 pixels, in eight classes.

Three are labeled of each class. Of the unlabeled and the test pictures the last class has a tenth
of what the first one has. A picture depends on the seed, its part, its number and its class alone.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

CLASSES = ("bricks", "checks", "clouds", "dots", "scales", "stripes", "voronoi", "woven")
PARTS = ("labeled", "unlabeled", "test")
LABELED_PER_CLASS = 3
UNLABELED = 800
TEST = 640
IMBALANCE = 10
SIDE = 48

LUMA = np.array([0.299, 0.587, 0.114])

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Generator = np.random.Generator


def parts_of(seed: int) -> dict[str, tuple[Bytes, Labels]]:
    """Return the pictures of each part, uint8 (n, side, side, 3), and their labels, int64 (n,)."""
    labels_by_part = {
        "labeled": np.repeat(np.arange(len(CLASSES)), LABELED_PER_CLASS),
        "unlabeled": _generator(seed, "labels").permutation(_as_found(UNLABELED)),
        "test": _as_found(TEST),
    }
    parts = {}
    for part, labels in labels_by_part.items():
        pictures = [
            draw(_generator(seed, part, number), int(label)) for number, label in enumerate(labels)
        ]
        parts[part] = (np.stack(pictures), labels)
    return parts


def _as_found(total: int) -> Labels:
    """Return labels of so many pictures, at least one of each class, of which the first has most.

    >>> np.bincount(_as_found(640)).tolist()
    [192, 138, 100, 72, 53, 37, 28, 20]
    """
    shares = IMBALANCE ** (-np.arange(len(CLASSES)) / (len(CLASSES) - 1))
    ends = np.rint(np.cumsum(shares) / shares.sum() * (total - len(CLASSES))).astype(int)
    counts = np.diff(ends, prepend=0) + 1
    return np.repeat(np.arange(len(CLASSES)), counts)


def _generator(seed: int, part: str, number: int = 0) -> Generator:
    """Return a picture's own generator, so it does not depend on how many others are drawn."""
    return np.random.default_rng([seed, zlib.crc32(f"textures {part}".encode()), number])


def draw(rng: Generator, label: int) -> Bytes:
    """Return a picture of a class, uint8 (side, side, 3)."""
    fine = 2 * SIDE
    y, x = np.mgrid[0:fine, 0:fine] / fine - 0.5
    angle, cells = rng.uniform(0, 2 * math.pi), rng.uniform(3.5, 7)
    # The surface is not quite flat.
    bend = 0.5 * (smooth_noise(rng, fine, 2) - 0.5)
    u = cells * (x * math.cos(angle) - y * math.sin(angle)) + bend + rng.uniform(0, 1)
    v = cells * (x * math.sin(angle) + y * math.cos(angle)) + bend.T + rng.uniform(0, 1)
    mix = _pattern(rng, CLASSES[label], u, v, fine)
    mix = mix.reshape(SIDE, 2, SIDE, 2).mean(axis=(1, 3))[..., None]
    levels, ink = tones(rng)
    base = np.array(color(rng, *levels), dtype=float)
    top = np.array(color(rng, *ink), dtype=float)
    shade = 1 + 0.5 * (smooth_noise(rng, SIDE, 2)[..., None] - 0.5)
    return finished(rng, (base + (top - base) * mix) * shade)


def _pattern(rng: Generator, name: str, u: Floats, v: Floats, fine: int) -> Floats:
    """Return how much of the second color each place has, from 0 to 1."""
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
    else:
        start = int(rng.integers(3, 6))
        octaves = np.stack([smooth_noise(rng, fine, start * 2**k) / 2**k for k in range(4)])
        return np.asarray(np.clip(0.5 + 1.5 * (octaves.sum(axis=0) / 1.875 - 0.5), 0, 1))
    return mix.astype(float)


def color(rng: Generator, low: float, high: float) -> tuple[int, ...]:
    """Return a color of any hue whose lightness lies between two levels of 0..255."""
    rgb = rng.uniform(0, 255, 3)
    target, level = rng.uniform(low, high), float(rgb @ LUMA)
    if level < target:
        rgb = rgb + (255 - rgb) * (target - level) / (255 - level)
    else:
        rgb = rgb * target / level
    return tuple(int(min(max(value, 0), 255)) for value in rgb)


def tones(rng: Generator) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return levels of ground and ink, at least 60 of 255 apart, either one the lighter."""
    middle = rng.uniform(0.35, 0.65) * 255
    dark, light = (10.0, middle - 30), (middle + 30, 245.0)
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def smooth_noise(rng: Generator, size: int, cells: int) -> Floats:
    """Return noise of 0..1 that varies over about size / cells pixels, of shape (size, size)."""
    grid = rng.integers(0, 256, (cells + 1, cells + 1), dtype=np.uint8)
    image = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=float) / 255


def finished(rng: Generator, picture: Floats) -> Bytes:
    """Return the picture as a camera would take it, with some light, some blur and some noise."""
    gain = 1 + rng.uniform(-0.15, 0.15)
    offset = 127.5 + 127.5 * rng.uniform(-0.15, 0.15) / 2
    image = np.clip((picture - 127.5) * gain + offset, 0, 255)
    radius = rng.uniform(0, 0.8)
    if radius > 0.2:
        blurred = Image.fromarray(image.astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
        image = np.asarray(blurred, dtype=float)
    image = image + rng.normal(0, rng.uniform(2, 18), image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
