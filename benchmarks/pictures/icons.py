"""Twenty icons as lists of primitives.

A primitive is (kind, fill, numbers): "poly" and "line" take x, y pairs ("line" has a width first), "oval" takes its
center and its radii. Coordinates are over -1..1 and y goes down; ``fill`` picks one of a picture's three colors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.pictures.drawing import Color, Sprite

Primitive = tuple[str, int, Sequence[float]]


def _star(points: int, inner: float, outer: float) -> list[float]:
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1).ravel().tolist()


def _heart() -> list[float]:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 18, y / 18], axis=1).ravel().tolist()


def _moon() -> list[float]:
    outer, inner = np.linspace(0.6, 5.68, 24), np.linspace(5.28, 1.0, 24)
    x = np.concatenate([0.8 * np.cos(outer), 0.3 + 0.62 * np.cos(inner)])
    y = np.concatenate([0.8 * np.sin(outer), 0.62 * np.sin(inner)])
    return np.stack([x, y], axis=1).ravel().tolist()


def _dome() -> list[float]:
    t = np.linspace(np.pi, 2 * np.pi, 24)
    return np.stack([0.85 * np.cos(t), 0.8 * np.sin(t)], axis=1).ravel().tolist()


ICONS: dict[str, tuple[Primitive, ...]] = {
    "boat": (
        ("poly", 0, (-0.85, 0.35, 0.85, 0.35, 0.5, 0.8, -0.5, 0.8)),
        ("line", 1, (0.08, 0, 0.35, 0, -0.85)),
        ("poly", 2, (0.08, -0.8, 0.65, 0.2, 0.08, 0.2)),
    ),
    "bottle": (
        (
            "poly",
            0,
            (-0.35, 0.9, -0.35, -0.1, -0.13, -0.4, -0.13, -0.75, 0.13, -0.75, 0.13, -0.4, 0.35, -0.1, 0.35, 0.9),
        ),
        ("poly", 1, (-0.17, -0.75, 0.17, -0.75, 0.17, -0.92, -0.17, -0.92)),
        ("poly", 2, (-0.35, 0.1, 0.35, 0.1, 0.35, 0.55, -0.35, 0.55)),
    ),
    "car": (
        ("poly", 0, (-0.9, 0.4, -0.9, 0.0, -0.5, -0.05, -0.3, -0.45, 0.3, -0.45, 0.5, -0.05, 0.9, 0.05, 0.9, 0.4)),
        ("oval", 1, (-0.5, 0.42, 0.21, 0.21)),
        ("oval", 1, (0.5, 0.42, 0.21, 0.21)),
        ("poly", 2, (-0.36, -0.05, -0.22, -0.33, 0.22, -0.33, 0.36, -0.05)),
    ),
    "cup": (
        ("oval_line", 1, (0.5, 0.0, 0.3, 0.28)),
        ("poly", 0, (-0.6, -0.5, 0.5, -0.5, 0.4, 0.55, -0.5, 0.55)),
        ("oval", 2, (-0.05, 0.65, 0.75, 0.1)),
    ),
    "envelope": (
        ("poly", 0, (-0.85, -0.55, 0.85, -0.55, 0.85, 0.55, -0.85, 0.55)),
        ("line_on", 1, (0.09, -0.82, -0.52, 0, 0.15, 0.82, -0.52)),
    ),
    "fir": (
        ("poly", 1, (-0.12, 0.5, 0.12, 0.5, 0.12, 0.9, -0.12, 0.9)),
        ("poly", 0, (0, -0.3, 0.65, 0.55, -0.65, 0.55)),
        ("poly", 0, (0, -0.6, 0.52, 0.15, -0.52, 0.15)),
        ("poly", 0, (0, -0.95, 0.38, -0.3, -0.38, -0.3)),
    ),
    "fish": (
        ("oval", 0, (-0.12, 0, 0.62, 0.36)),
        ("poly", 1, (0.35, 0, 0.9, -0.42, 0.9, 0.42)),
        ("oval_on", 2, (-0.45, -0.08, 0.09, 0.09)),
    ),
    "flag": (
        ("line", 1, (0.1, -0.6, -0.9, -0.6, 0.9)),
        ("poly", 0, (-0.58, -0.85, 0.8, -0.7, 0.45, -0.35, 0.8, 0.0, -0.58, 0.05)),
    ),
    "flower": (
        ("line", 2, (0.09, 0, 0.1, 0.05, 0.92)),
        *(("oval", 0, (0.34 * np.cos(a), -0.3 + 0.34 * np.sin(a), 0.23, 0.23)) for a in np.arange(5) * 1.2566 - 1.57),
        ("oval", 1, (0, -0.3, 0.2, 0.2)),
        ("oval", 2, (0.28, 0.5, 0.24, 0.1)),
    ),
    "heart": (("poly", 0, _heart()),),
    "house": (
        ("poly", 0, (-0.6, -0.1, 0.6, -0.1, 0.6, 0.8, -0.6, 0.8)),
        ("poly", 1, (-0.85, -0.1, 0, -0.85, 0.85, -0.1)),
        ("poly_on", 2, (-0.15, 0.25, 0.15, 0.25, 0.15, 0.8, -0.15, 0.8)),
    ),
    "key": (
        ("oval_line", 0, (-0.5, 0, 0.32, 0.32)),
        ("line", 0, (0.16, -0.18, 0, 0.9, 0)),
        ("line", 0, (0.14, 0.8, 0, 0.8, 0.3)),
        ("line", 0, (0.14, 0.5, 0, 0.5, 0.25)),
    ),
    "ladder": (
        ("line", 0, (0.12, -0.35, -0.9, -0.35, 0.9)),
        ("line", 0, (0.12, 0.35, -0.9, 0.35, 0.9)),
        *(("line", 1, (0.1, -0.35, y, 0.35, y)) for y in (-0.65, -0.22, 0.22, 0.65)),
    ),
    "lamp": (
        ("poly", 0, (-0.32, -0.85, 0.32, -0.85, 0.7, -0.1, -0.7, -0.1)),
        ("line", 1, (0.11, 0, -0.1, 0, 0.75)),
        ("oval", 1, (0, 0.8, 0.45, 0.12)),
    ),
    "moon": (("poly", 0, _moon()),),
    "mushroom": (
        ("poly", 1, (-0.2, 0, 0.2, 0, 0.28, 0.85, -0.28, 0.85)),
        ("poly", 0, _dome()),
        ("oval_on", 2, (-0.3, -0.3, 0.13, 0.13)),
        ("oval_on", 2, (0.25, -0.4, 0.15, 0.15)),
    ),
    "rocket": (
        ("poly", 1, (-0.25, 0.3, -0.65, 0.75, -0.25, 0.65)),
        ("poly", 1, (0.25, 0.3, 0.65, 0.75, 0.25, 0.65)),
        ("poly", 0, (0, -0.95, 0.2, -0.6, 0.28, -0.2, 0.25, 0.65, -0.25, 0.65, -0.28, -0.2, -0.2, -0.6)),
        ("oval_on", 2, (0, -0.2, 0.13, 0.13)),
    ),
    "star": (("poly", 0, _star(5, 0.36, 0.9)),),
    "sun": (
        ("oval", 0, (0, 0, 0.42, 0.42)),
        *(
            ("line", 1, (0.1, 0.58 * np.cos(a), 0.58 * np.sin(a), 0.9 * np.cos(a), 0.9 * np.sin(a)))
            for a in np.arange(8) * np.pi / 4
        ),
    ),
    "umbrella": (
        ("poly", 0, _dome()),
        ("line", 1, (0.09, 0, -0.9, 0, 0.7, 0.12, 0.85, 0.3, 0.85, 0.38, 0.7)),
    ),
}


def draw_icon(sprite: Sprite, icon: Sequence[Primitive], rng: np.random.Generator, fills: Sequence[Color]) -> None:
    """Draw an icon filled or in outline; its points wobble, as when drawn by hand.

    Kinds that end in ``_on`` lie on another primitive, so they are drawn in black or white when that is filled.
    """
    outline = rng.uniform(0.06, 0.1) if rng.random() < 0.35 else 0.0
    wobble = rng.uniform(0, 0.035)
    contrast: Color = (15, 15, 15) if sum(fills[0]) > 384 else (240, 240, 240)
    for kind, slot, numbers in icon:
        on_top = kind.endswith("_on")
        fill = contrast if on_top and not outline else fills[slot]
        if kind.startswith("oval"):
            x, y, width, height = numbers
            center = (x + wobble * rng.normal(), y + wobble * rng.normal())
            ring = 0.12 if kind == "oval_line" else outline
            sprite.ellipse(center, (width, height), fill, outline=ring)
        elif kind.startswith("line"):
            points = np.reshape(numbers[1:], (-1, 2))
            sprite.line(points + wobble * rng.normal(size=points.shape), fill, numbers[0])
        else:
            points = np.reshape(numbers, (-1, 2))
            drift = wobble * rng.normal(size=points.shape) if len(points) < 16 else 0.0
            sprite.polygon(points + drift, fill, outline)
