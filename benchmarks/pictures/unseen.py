"""The unseen half.

Opened once, at the end, and never tuned on. README.md in this folder states the rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from operator import methodcaller

import numpy as np
from PIL import Image

from benchmarks.pictures import drawing
from benchmarks.pictures.drawing import (
    Bytes,
    Color,
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


def _arc(
    center: tuple[float, float], radii: tuple[float, float], start: float, end: float
) -> Floats:
    """Return points of an ellipse between two angles in degrees; 0 points right and 90 down."""
    angles = np.radians(np.linspace(start, end, 20))
    return np.stack(
        [center[0] + radii[0] * np.cos(angles), center[1] + radii[1] * np.sin(angles)], axis=1
    )


# ---- digits of a seven-segment display; turned or mirrored, some are others

#  the segments: top, upper left, upper right, middle, lower left, lower right, bottom
SEGMENTS = (
    ((-1, -1), (1, -1)), ((-1, -1), (-1, 0)), ((1, -1), (1, 0)), ((-1, 0), (1, 0)),
    ((-1, 0), (-1, 1)), ((1, 0), (1, 1)), ((-1, 1), (1, 1)),
)  # fmt: skip
LIT = (
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
)


def segments(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    levels, ink = tones(rng, gap=80)
    lit, sprite = color(rng, *ink), Sprite(size)
    wide, high, gap = rng.uniform(0.28, 0.45), rng.uniform(0.6, 0.75), rng.uniform(0.1, 0.22)
    thick = rng.uniform(0.13, 0.22)
    for start, end in (ends for ends, on in zip(SEGMENTS, LIT[label], strict=True) if on == "1"):
        a, b = (np.array(point) * (wide, high) for point in (start, end))
        inset = gap * (b - a) / np.linalg.norm(b - a) / 2
        sprite.line([tuple(a + inset), tuple(b - inset)], lit, thick, round_ends=False)
    moved = view(rng, rotation=8, scale=(0.8, 1.15), shift=0.15, stretch=0.1, perspective=0.1)
    slant = np.array([[1, -rng.uniform(0, 0.25), 0], [0, 1, 0], [0, 0, 1]])
    return finish(rng, grey(sprite.over(ground(rng, size, levels), moved @ slant)), noise=12)


# ---- what a clock shows, to the nearest hour; a turn or a mirror shows another hour

HOURS = (
    "twelve",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
)


def clock(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    levels, ink = tones(rng, gap=80)
    face, hands, sprite = color(rng, *levels), color(rng, *ink), Sprite(size)
    minutes = rng.uniform(-22, 22)
    edge = rng.uniform(0.8, 0.9)
    sprite.ellipse((0, 0), (edge, edge), face)
    if rng.random() < 0.7:
        sprite.ellipse((0, 0), (edge, edge), hands, outline=rng.uniform(0.04, 0.08))
    marks = rng.choice([0, 4, 12])
    for k in range(marks):
        turn = 2 * math.pi * k / marks
        way = np.array([math.cos(turn), math.sin(turn)])
        sprite.line([tuple(0.72 * way), tuple(0.8 * way)], hands, 0.05)
    for turn, length, width in (
        (
            2 * math.pi * (label + minutes / 60) / 12,
            rng.uniform(0.36, 0.45),
            rng.uniform(0.11, 0.16),
        ),
        (2 * math.pi * minutes / 60, rng.uniform(0.65, 0.72), rng.uniform(0.05, 0.07)),
    ):
        tip = (length * math.sin(turn), -length * math.cos(turn))
        sprite.line([(0, 0), tip], hands, width)
    moved = view(
        rng, rotation=5, scale=(0.75, 1.05), shift=0.1, stretch=0.08, shear=0.05, perspective=0.05
    )
    return finish(rng, grey(sprite.over(ground(rng, size, levels, clutter=4), moved)), noise=12)


# ---- faces by mood; skin, hair and hats say nothing

MOODS = ("happy", "sad", "calm", "surprised", "angry", "winking")


def face(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    mood, sprite = MOODS[label], Sprite(size)
    skin = drawing.hsv(rng.uniform(0, 1), rng.uniform(0.15, 0.6), rng.uniform(0.7, 1))
    dark, hair = color(rng, 5, 50), color(rng, 20, 180)
    width, height = rng.uniform(0.65, 0.85), rng.uniform(0.75, 0.9)
    style = rng.integers(4)
    if style < 2:
        sprite.ellipse((0, -0.15), (width + 0.1, height), hair)
    sprite.ellipse((0, 0.05), (width, height), skin)
    if style == 0:
        sprite.polygon(_arc((0, 0.0), (width, height), 200, 340), hair)
    elif style == 2:
        sprite.polygon([(-0.75, -0.55), (0.75, -0.55), (0.45, -1), (-0.45, -1)], hair)
    apart, eye, y = rng.uniform(0.27, 0.36), rng.uniform(0.08, 0.13), rng.uniform(-0.2, -0.1)
    for side in (-1, 1):
        if mood == "winking" and side == 1:
            sprite.line(_arc((apart, y + 0.06), (0.17, 0.1), 200, 340), dark, 0.08)
        else:
            tall = eye * (1.6 if mood == "surprised" else 1.1)
            sprite.ellipse((side * apart, y), (eye, tall), dark)
        if mood == "angry":
            sprite.line([(side * 0.12, y - 0.13), (side * (apart + 0.2), y - 0.32)], dark, 0.08)
    wide, y = rng.uniform(0.3, 0.42), rng.uniform(0.42, 0.5)
    deep = rng.uniform(0.15, 0.24)
    if mood in ("happy", "winking"):
        smile = _arc((0, y - 0.1), (wide, deep + 0.05), 10, 170)
        if rng.random() < 0.4:
            sprite.polygon(smile, dark)
        else:
            sprite.line(smile, dark, 0.09)
    elif mood in ("sad", "angry"):
        sprite.line(_arc((0, y + 0.15), (wide, deep + 0.05), 200, 340), dark, 0.09)
    elif mood == "surprised":
        sprite.ellipse((0, y), (rng.uniform(0.12, 0.18), rng.uniform(0.16, 0.22)), dark)
    else:
        sprite.line([(-wide, y), (wide, y + rng.uniform(-0.05, 0.05))], dark, 0.09)
    moved = view(
        rng, rotation=18, scale=(0.75, 1.05), shift=0.12, stretch=0.1, perspective=0.08, mirror=True
    )
    return finish(rng, sprite.over(ground(rng, size, (20, 235), clutter=5), moved), noise=12)


# ---- road signs; color and hand belong to some classes

RED, BLUE, YELLOW, WHITE, BLACK = (
    (205, 30, 40),
    (30, 80, 185),
    (240, 195, 40),
    (245, 245, 245),
    (20, 20, 20),
)
TRIANGLE = np.array([(0, -0.85), (0.92, 0.72), (-0.92, 0.72)])
DIAMOND = np.array([(0, -1), (1, 0), (0, 1), (-1, 0)])
BOARD = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
TURNS = math.pi / 8 + math.pi / 4 * np.arange(8)
OCTAGON = 0.95 * np.stack([np.cos(TURNS), np.sin(TURNS)], axis=1)
Parts = tuple[Callable[[Sprite], None], ...]


def _disc(radius: float, fill: Color, y: float = 0, x: float = 0) -> Callable[[Sprite], None]:
    return lambda sprite: sprite.ellipse((x, y), (radius, radius), fill)


_shape, _stroke, _words = (partial(methodcaller, name) for name in ("polygon", "line", "text"))


def _pointer(x: float, y: float) -> Parts:
    tip = [
        (0.65 * x, 0.65 * y),
        (0.15 * x + 0.35 * y, 0.15 * y + 0.35 * x),
        (0.15 * x - 0.35 * y, 0.15 * y - 0.35 * x),
    ]
    return (
        ORDER,
        _stroke([(-0.5 * x, -0.5 * y), (0.3 * x, 0.3 * y)], WHITE, 0.2, round_ends=False),
        _shape(tip, WHITE),
    )


def _bend(side: int) -> Parts:
    shaft = [(-0.12 * side, 0.5), (-0.12 * side, 0.2), (0.16 * side, -0.08)]
    tip = [(0.3 * side, -0.26), (0.28 * side, 0.08), (-0.02 * side, -0.2)]
    return *WARNING, _stroke(shaft, BLACK, 0.13), _shape(tip, BLACK)


WARNING = _shape(TRIANGLE, RED), _shape(0.66 * TRIANGLE + [0, 0.08], WHITE)
FORBIDDEN = _disc(0.9, RED), _disc(0.66, WHITE)
ORDER, PANEL = _disc(0.9, BLUE), _shape(0.8 * BOARD, BLUE)
SIGNS: dict[str, Parts] = {
    "ahead": _pointer(0, -1),
    "bend_left": _bend(-1),
    "bend_right": _bend(1),
    "bump": (*WARNING, _shape(_arc((0, 0.48), (0.36, 0.34), 180, 360), BLACK)),
    "closed": FORBIDDEN,
    "crossroads": (
        *WARNING,
        *(_stroke([(-x, 0.02), (x, 0.48)], BLACK, 0.12) for x in (0.26, -0.26)),
    ),
    "danger": (*WARNING, _stroke([(0, -0.2), (0, 0.2)], BLACK, 0.14), _disc(0.09, BLACK, 0.44)),
    "end": (
        *(_disc(0.9, BLACK), _disc(0.82, WHITE)),
        *(_stroke([(-0.5 + k, 0.5 + k), (0.5 + k, -0.5 + k)], BLACK, 0.07) for k in (-0.08, 0.08)),
    ),
    "hospital": (PANEL, _words("H", WHITE, 1.3)),
    "left": _pointer(-1, 0),
    "limit_30": (*FORBIDDEN, _words("30", BLACK, 0.8)),
    "limit_80": (*FORBIDDEN, _words("80", BLACK, 0.8)),
    "no_entry": (_disc(0.9, RED), _stroke([(-0.6, 0), (0.6, 0)], WHITE, 0.28, round_ends=False)),
    "no_stopping": (
        *(_disc(0.9, RED), _disc(0.7, BLUE)),
        *(_stroke([(-0.5, -y), (0.5, y)], RED, 0.18) for y in (0.5, -0.5)),
    ),
    "parking": (PANEL, _words("P", WHITE, 1.3)),
    "priority": (_shape(0.92 * DIAMOND, WHITE), _shape(0.68 * DIAMOND, YELLOW)),
    "right": _pointer(1, 0),
    "stop": (_shape(OCTAGON, RED), _words("STOP", WHITE, 0.5)),
    "works": (
        *(_shape(0.9 * DIAMOND, YELLOW), _stroke([(-0.3, 0.3), (0.25, -0.3)], BLACK, 0.1)),
        *(_disc(0.17, BLACK, -0.32, 0.25), _shape([(-0.5, 0.35), (0.5, 0.35), (0.3, 0.05)], BLACK)),
    ),
    "yield": (_shape(TRIANGLE * [1, -1], RED), _shape(0.6 * TRIANGLE * [1, -1] - [0, 0.1], WHITE)),
}


def sign(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    sprite = Sprite(size)
    if rng.random() < 0.5:  # a pole
        sprite.line([(0, 0), (0, 1.5)], color(rng, 90, 160), 0.1)
    for part in tuple(SIGNS.values())[label]:
        part(sprite)
    picture = ground(rng, size, (30, 225), clutter=8)
    moved = view(
        rng, rotation=10, scale=(0.5, 0.95), shift=0.2, stretch=0.2, shear=0.1, perspective=0.2
    )
    dim = rng.uniform(0.55, 1.1) * np.array([rng.uniform(0.9, 1.1), 1, rng.uniform(0.9, 1.1)])
    return finish(rng, sprite.over(picture, moved) * dim, noise=12, blur=1)


# ---- leaves by outline; filled or drawn, at any angle

LEAVES = ("clover", "fan", "heart", "lance", "maple", "oval", "serrated")


def leaf(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    levels, ink = tones(rng)
    sprite, fill = Sprite(size), color(rng, *ink)
    points, foot = _outline(rng, LEAVES[label])
    points = points + rng.normal(0, 0.01, points.shape)
    filled = rng.random() < 0.65
    sprite.polygon(points, fill, outline=0 if filled else rng.uniform(0.08, 0.12))
    sprite.line([(0, foot), (rng.uniform(-0.15, 0.15), 0.98)], fill, 0.09)
    if filled and rng.random() < 0.5:
        sprite.line([(0, foot), (0, -0.35)], color(rng, *levels), 0.06)
    moved = view(
        rng, rotation=180, scale=(0.75, 1.05), shift=0.1, stretch=0.12, shear=0.1, mirror=True
    )
    return finish(rng, grey(sprite.over(ground(rng, size, levels, clutter=2), moved)), noise=12)


def _outline(rng: Generator, name: str) -> tuple[Floats, float]:
    """Return the outline of a leaf that points up, and where its stalk starts."""
    t = np.linspace(0, 2 * math.pi, 90, endpoint=False)
    x, y = np.sin(t), -np.cos(t)  # t is 0 at the tip
    if name == "oval":
        return np.stack([rng.uniform(0.45, 0.55) * x, 0.68 * y - 0.1], axis=1), 0.5
    if name == "lance":
        return np.stack([rng.uniform(0.14, 0.2) * x, 0.78 * y - 0.1], axis=1), 0.6
    if name == "serrated":
        teeth = 1 + rng.uniform(0.1, 0.14) * (
            2 * np.abs((t * 14 / (2 * math.pi)) % 1 - 0.5) * 2 - 1
        )
        return np.stack([rng.uniform(0.45, 0.55) * teeth * x, 0.68 * teeth * y - 0.1], axis=1), 0.55
    if name == "heart":
        high = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 19
        return np.stack([0.72 * x**3, -0.75 * high - 0.1], axis=1), 0.3
    if name == "clover":
        radius = 0.2 + 0.62 * np.abs(np.cos(1.5 * t)) ** 0.8
        return np.stack([radius * x, radius * y], axis=1), 0.1
    if name == "maple":
        lobes = np.abs((5 * t / (2 * math.pi)) % 1 - 0.5) * 2
        radius = 0.3 + rng.uniform(0.48, 0.56) * lobes**1.3
        return np.stack([radius * x, radius * y - 0.05], axis=1), 0.2
    spread = rng.uniform(55, 68)
    fan = _arc((0, 0.5), (1.2, 1.2), -90 - spread, -90 + spread)
    ripple = 1 + 0.04 * np.cos(np.arange(len(fan)) * 1.6)[:, None]
    fan = (fan - [0, 0.5]) * ripple * 0.85 + [0, 0.5]
    return np.concatenate([[[0.0, 0.5]], fan]), 0.5


# ---- molecules by the kind of graph; at any angle, of any length

GRAPHS = ("chain", "ring", "ring_with_tail", "star", "two_rings")


def molecule(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    points, bonds = _graph(rng, GRAPHS[label])
    points = points + rng.normal(0, 0.06, points.shape)
    points -= (points.max(axis=0) + points.min(axis=0)) / 2
    points *= 0.8 / np.abs(points).max()
    levels, ink = tones(rng, gap=80)
    lines, atoms, sprite = color(rng, *ink), color(rng, *ink), Sprite(size)
    thick = rng.uniform(0.06, 0.1)
    for a, b in bonds:
        sprite.line([tuple(points[a]), tuple(points[b])], lines, thick)
    ball = rng.uniform(0.05, 0.13)
    for x, y in points:
        radius = ball * rng.uniform(0.8, 1.2)
        sprite.ellipse((x, y), (radius, radius), atoms)
    moved = view(rng, rotation=180, scale=(0.75, 1.1), shift=0.1, stretch=0.1, mirror=True)
    return finish(rng, grey(sprite.over(ground(rng, size, levels), moved)), noise=14)


def _graph(rng: Generator, name: str) -> tuple[Floats, list[tuple[int, int]]]:
    """Return points with bonds of length about 1, and the pairs that are bonded."""
    if name == "chain":
        return _walk(rng, np.zeros(2), rng.uniform(0, 360), int(rng.integers(4, 8)))
    if name == "star":
        arms, twice = int(rng.integers(3, 6)), rng.random() < 0.5
        angles = np.radians(rng.uniform(0, 360) + 360 / arms * np.arange(arms))
        ways = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points, bonds = np.concatenate([[[0, 0]], ways]), [(0, 1 + k) for k in range(arms)]
        if twice:
            points = np.concatenate([points, 1.9 * ways])
            bonds = bonds + [(1 + k, 1 + arms + k) for k in range(arms)]
        return points, bonds
    atoms = int(rng.integers(4, 8))
    radius = 0.5 / math.sin(math.pi / atoms)
    # A bond crosses the x axis at a right angle.
    angles = 2 * math.pi * (np.arange(atoms) + 0.5) / atoms
    ring = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    bonds = [(k, (k + 1) % atoms) for k in range(atoms)]
    if name == "ring":
        return ring, bonds
    if name == "two_rings":  # they share a bond, the one at the right
        middle = radius * math.cos(math.pi / atoms)
        mirrored = np.array([2 * middle, 0]) + ring * [-1, 1]
        return np.concatenate([ring, mirrored]), bonds + [(a + atoms, b + atoms) for a, b in bonds]
    way = math.degrees(angles[0])
    tail, more = _walk(rng, ring[0], way, int(rng.integers(3, 5)))
    return np.concatenate([ring, tail[1:]]), bonds + [
        (0 if a == 0 else a + atoms - 1, b + atoms - 1) for a, b in more
    ]


def _walk(
    rng: Generator, start: Floats, degrees: float, atoms: int
) -> tuple[Floats, list[tuple[int, int]]]:
    """Return a zigzag from a point, and its edges."""
    points, sign = [start], rng.choice([-1, 1])
    for k in range(atoms - 1):
        turn = math.radians(degrees + sign * (-1) ** k * rng.uniform(15, 38))
        points.append(points[-1] + [math.cos(turn), math.sin(turn)])
    return np.array(points), [(k, k + 1) for k in range(atoms - 1)]


# ---- charts by kind, in any colors


def chart(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    name, sprite = tuple(CHARTS)[label], Sprite(size)
    paper, ink = tones(rng, gap=90)
    sprite.polygon([(-1, -1), (1, -1), (1, 1), (-1, 1)], color(rng, *paper))
    axis, fills = color(rng, *ink), [color(rng, *ink) for _ in range(6)]
    if rng.random() < 0.5:
        fills = fills[:1] * 6
    if name not in ("pie", "heat"):
        faint = color(rng, *paper)
        if rng.random() < 0.4:
            for y in np.linspace(-0.6, 0.5, 5):
                sprite.line([(-0.8, y), (0.85, y)], faint, 0.02)
        sprite.line([(-0.8, 0.8), (0.85, 0.8)], axis, 0.04)
        sprite.line([(-0.8, -0.8), (-0.8, 0.8)], axis, 0.04)
    CHARTS[name](rng, sprite, fills)
    if rng.random() < 0.4:  # a title
        sprite.line([(-0.4, -0.9), (rng.uniform(0, 0.5), -0.9)], axis, 0.08, round_ends=False)
    moved = view(rng, rotation=4, scale=(0.75, 1.1), shift=0.1, stretch=0.15, perspective=0.08)
    return finish(rng, sprite.over(ground(rng, size, (20, 235)), moved), noise=14, blur=1)


def _bars(rng: Generator, sprite: Sprite, fills: list[Color], flat: bool = False) -> None:
    count = int(rng.integers(3, 9))
    step, filled = 1.55 / count, rng.uniform(0.5, 0.85)
    for k in range(count):
        start, end = -0.72 + k * step, -0.72 + (k + filled) * step
        height = rng.uniform(0.25, 1.45)
        corners = [(start, 0.78), (end, 0.78), (end, 0.78 - height), (start, 0.78 - height)]
        sprite.polygon([(-y, x) for x, y in corners] if flat else corners, fills[k % 6])


def _curve(rng: Generator, count: int) -> Floats:
    """Return a random walk from left to right within the axes."""
    steps = np.cumsum(rng.normal(rng.uniform(-0.5, 0.5), 1, count))
    heights = (steps - steps.min()) / (np.ptp(steps) + 0.5)
    return np.stack([np.linspace(-0.74, 0.8, count), 0.6 - 1.2 * heights], axis=1)


def _paper(sprite: Sprite) -> Color:
    return drawing.to_color(np.asarray(sprite.image.crop((2, 2, 3, 3)), dtype=float)[0, 0, :3])


def _line(rng: Generator, sprite: Sprite, fills: list[Color]) -> None:
    for k in range(rng.integers(1, 4)):
        sprite.line(_curve(rng, int(rng.integers(5, 14))), fills[k], rng.uniform(0.04, 0.07))


def _area(rng: Generator, sprite: Sprite, fills: list[Color]) -> None:
    curve = _curve(rng, int(rng.integers(5, 14)))
    sprite.polygon([(-0.76, 0.78), *curve.tolist(), (0.82, 0.78)], fills[0])


def _pie(rng: Generator, sprite: Sprite, fills: list[Color]) -> None:
    shares = rng.dirichlet(np.full(int(rng.integers(3, 7)), 3.0))
    edges = rng.uniform(0, 360) + 360 * np.concatenate([[0], np.cumsum(shares)])
    hole = rng.random() < 0.3
    for k, (start, end) in enumerate(pairwise(edges)):
        sprite.polygon([(0, 0), *_arc((0, 0), (0.78, 0.78), start, end).tolist()], fills[k % 6])
    gap = _paper(sprite)
    for edge in edges:
        way = math.radians(edge)
        sprite.line([(0, 0), (0.8 * math.cos(way), 0.8 * math.sin(way))], gap, 0.04)
    if hole:
        sprite.ellipse((0, 0), (0.35, 0.35), gap)


def _scatter(rng: Generator, sprite: Sprite, fills: list[Color]) -> None:
    radius, slope = rng.uniform(0.035, 0.06), rng.uniform(-0.8, 0.8)
    for _ in range(rng.integers(15, 40)):
        x = rng.uniform(-0.7, 0.8)
        y = float(np.clip(-slope * x + rng.normal(0, 0.25), -0.75, 0.72))
        sprite.ellipse((x, y), (radius, radius), fills[rng.integers(2)])


def _boxes(rng: Generator, sprite: Sprite, fills: list[Color]) -> None:
    count = int(rng.integers(2, 6))
    step = 1.5 / count
    for k in range(count):
        x, half = -0.7 + (k + 0.5) * step, step * rng.uniform(0.22, 0.36)
        top, upper, middle, lower, bottom = np.sort(rng.uniform(-0.7, 0.7, 5)) + np.linspace(
            -0.1, 0.05, 5
        )
        corners = [(x - half, upper), (x + half, upper), (x + half, lower), (x - half, lower)]
        sprite.polygon(corners, fills[k % 6], outline=0.05)
        sprite.line([(x - half, middle), (x + half, middle)], fills[k % 6], 0.05)
        for box, end in ((upper, top), (lower, bottom)):
            sprite.line([(x, box), (x, end)], fills[k % 6], 0.04)
            sprite.line([(x - half / 2, end), (x + half / 2, end)], fills[k % 6], 0.04)


def _heat(rng: Generator, sprite: Sprite, fills: list[Color]) -> None:
    rows, columns = (int(n) for n in rng.integers(4, 9, 2))
    low, high = np.array(fills[0]), np.array(_paper(sprite))
    for i in range(rows):
        for j in range(columns):
            mix = rng.uniform(0, 1)
            r, g, b = (int(v) for v in low + (high - low) * mix)
            left, top = -0.75 + 1.5 * j / columns, -0.7 + 1.5 * i / rows
            right, bottom = left + 1.5 / columns, top + 1.5 / rows
            sprite.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], (r, g, b))


CHARTS: dict[str, Callable[[Generator, Sprite, list[Color]], None]] = {
    "area": _area,
    "bars": _bars,
    "boxes": _boxes,
    "heat": _heat,
    "horizontal_bars": lambda rng, sprite, fills: _bars(rng, sprite, fills, flat=True),
    "line": _line,
    "pie": _pie,
    "scatter": _scatter,
}


# ---- places of the two photographs, seen again from elsewhere in another light

# Which photograph, and the place's middle in its pixels.
PLACES: dict[str, tuple[int, int, int]] = {
    "balcony": (0, 205, 215),
    "bush": (0, 465, 340),
    "eaves": (0, 270, 265),
    "island": (0, 450, 240),
    "spire": (0, 205, 75),
    "tree": (0, 600, 225),
    "bud": (1, 370, 395),
    "core": (1, 305, 215),
    "leaf": (1, 80, 170),
    "rim": (1, 215, 150),
}


MARGIN = 80


@cache
def _extended(which: int) -> Image.Image:
    """Return a photograph reflected at its edges, which would give some places away."""
    edges = (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)
    return Image.fromarray(np.pad(drawing.photographs()[which], edges, "reflect"))


def place(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    which, x, y = tuple(PLACES.values())[label]
    reach = rng.uniform(34, 52)
    middle = np.array([x, y]) + MARGIN + rng.uniform(-14, 14, 2)
    warp = view(rng, rotation=25, stretch=0.2, shear=0.2, perspective=0.15)
    # From the patch's pixels through the view to the photograph's.
    half = size / 2
    to_unit = np.array([[1 / half, 0, -1], [0, 1 / half, -1], [0, 0, 1]])
    to_photo = np.array([[reach, 0, middle[0]], [0, reach, middle[1]], [0, 0, 1]])
    levels = np.asarray(
        drawing.seen_from(_extended(which), size, to_photo @ warp @ to_unit), dtype=float
    )
    if rng.random() < 0.3:
        levels = np.repeat(grey(levels)[..., None], 3, axis=-1)
    levels = levels * rng.uniform(0.6, 1.3) * rng.uniform(0.8, 1.2, 3)
    for _ in range(rng.integers(0, 3)):  # something stands in the way
        top, left = rng.integers(0, size - size // 4, 2)
        high, wide = rng.integers(size // 8, size // 3, 2)
        levels[top : top + high, left : left + wide] = color(rng, 20, 235)
    return finish(rng, levels, noise=14, light=0.2)


# ---- stained blood cells by nucleus and by the color of their grains

CELLS = ("lobed", "round", "red_grains")


def cell(rng: Generator, label: int, size: int, test: bool) -> Bytes:
    plasma = drawing.hsv(rng.uniform(0.85, 1.1) % 1, rng.uniform(0.03, 0.15), rng.uniform(0.85, 1))
    sprite = Sprite(size)
    pale = drawing.hsv(
        rng.uniform(0.94, 1.06) % 1, rng.uniform(0.25, 0.45), rng.uniform(0.75, 0.95)
    )
    for _ in range(rng.integers(2, 6)):  # red cells around it
        angle, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.25, 0.38)
        at = (1.05 * math.cos(angle), 1.05 * math.sin(angle))
        sprite.ellipse(at, (radius, radius), pale)
    body = rng.uniform(0.58, 0.75)
    stain = drawing.hsv(rng.uniform(0.66, 0.8), rng.uniform(0.5, 0.8), rng.uniform(0.35, 0.6))
    sprite.ellipse(
        (0, 0),
        (body, body * rng.uniform(0.85, 1)),
        drawing.hsv(rng.uniform(0.65, 0.95), 0.2, rng.uniform(0.75, 0.95)),
    )
    name = CELLS[label]
    if name == "red_grains":
        for _ in range(rng.integers(30, 50)):
            angle, away = rng.uniform(0, 2 * math.pi), body * 0.88 * math.sqrt(rng.uniform(0, 1))
            grain = drawing.hsv(
                rng.uniform(0.97, 1.05) % 1, rng.uniform(0.6, 0.9), rng.uniform(0.7, 0.95)
            )
            sprite.ellipse((away * math.cos(angle), away * math.sin(angle)), (0.06, 0.06), grain)
    if name == "round":
        large = body * rng.uniform(0.6, 0.85)
        sprite.ellipse(
            tuple(rng.uniform(-0.08, 0.08, 2)), (large, large * rng.uniform(0.85, 1)), stain
        )
    else:
        lobes = int(rng.integers(2, 4)) if name == "red_grains" else int(rng.integers(3, 6))
        angles = np.linspace(0, rng.uniform(3.5, 4.7), lobes)
        centers = 0.5 * body * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        sprite.line(centers, stain, 0.09)
        for x, y in centers:
            lobe = body * rng.uniform(0.2, 0.28)
            sprite.ellipse((x, y), (lobe, lobe * rng.uniform(0.8, 1)), stain)
    moved = view(rng, rotation=180, scale=(0.7, 1.1), shift=0.2, stretch=0.12, mirror=True)
    picture = np.broadcast_to(np.array(plasma, dtype=float), (size, size, 3))
    return finish(
        rng, sprite.over(picture, moved) * rng.uniform(0.85, 1.1, 3), noise=14, blur=0.7, light=0.2
    )


PROBLEMS = (
    Problem(name="segments", half="unseen", draw=segments, size=16, channels=1,
            classes=tuple("0123456789"), labels_per_class=2, unlabeled=500, test=800),
    Problem(name="clocks", half="unseen", draw=clock, size=48, channels=1, classes=HOURS,
            labels_per_class=5, unlabeled=1200, test=600),
    Problem(name="faces", half="unseen", draw=face, size=32, channels=3, classes=MOODS,
            labels_per_class=4, unlabeled=600, test=600, imbalance=10, labels_as_found=True),
    Problem(name="signs", half="unseen", draw=sign, size=64, channels=3, classes=tuple(SIGNS),
            labels_per_class=1, unlabeled=1000, test=1000, foreign=0.2),
    Problem(name="leaves", half="unseen", draw=leaf, size=32, channels=1, classes=LEAVES,
            labels_per_class=8, unlabeled=900, test=700, foreign=0.25),
    Problem(name="molecules", half="unseen", draw=molecule, size=40, channels=1, classes=GRAPHS,
            labels_per_class=20, unlabeled=1000, test=500),
    Problem(name="charts", half="unseen", draw=chart, size=96, channels=3, classes=tuple(CHARTS),
            labels_per_class=3, unlabeled=800, test=640, imbalance=10),
    Problem(name="places", half="unseen", draw=place, size=32, channels=3, classes=tuple(PLACES),
            labels_per_class=10, unlabeled=2000, test=1000, foreign=0.3),
    Problem(name="cells", half="unseen", draw=cell, size=24, channels=3, classes=CELLS,
            labels_per_class=25, unlabeled=300, test=500, imbalance=10, labels_as_found=True),
)  # fmt: skip
