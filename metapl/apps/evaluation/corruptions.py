"""Fifteen kinds of damage to pictures, each in five severities, with the constants of ImageNet-C.

The constants are those of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019), for pictures of 224 pixels. Lengths in pixels are scaled by the side of a picture over 224,
so that a damage looks alike at any size; at 224 they are the paper's. Two kinds differ from it by necessity: its frost
is six photographs, ours is drawn, and its motion blur is ImageMagick's, ours a line of the same radius and width.
So errors can be compared between networks here, and only roughly with those printed for ImageNet-C.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metapl.data.draws import fold_in
from metapl.errors import MetaplError, few

if TYPE_CHECKING:
    from numpy.random import Generator

Picture = NDArray[np.float64]
"""(H, W, C) in [0, 1]."""

SEVERITIES = (1, 2, 3, 4, 5)
SIDE = 224
"""Pixels of the pictures that the paper's lengths are for."""

ELASTIC = 244
"""What the published shares of the elastic transform are of, though the pictures have 224 pixels."""


def corrupted(images: Tensor, corruption: str, severity: int, *, seed: int = 0, first: int = 0) -> Tensor:
    """Damage pictures.

    Args:
        images: float (B, C, H, W) in [0, 1], C = 1 or 3, on any device.
        corruption: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed, first: the damage of a picture is a function of the seed, the kind, the severity and the picture's number,
            which is ``first`` plus its row.

    Returns: the same shape and device, of 256 levels, as a picture that was saved.

    Cost: 1 to 50 ms a picture of 224 pixels on one core.

    Raises:
        MetaplError: another kind or severity, or images of another shape.

    Source: Hendrycks and Dietterich (ICLR 2019), appendix.

    >>> picture = torch.full((1, 3, 8, 8), 0.5)
    >>> corrupted(picture, "brightness", 3)[0, 0, 0, 0]
    tensor(0.8000)
    """
    if corruption not in CORRUPTIONS:
        raise MetaplError(f"there is no corruption {corruption!r}; expected one of {few(CORRUPTIONS, 20)}.")
    if severity not in SEVERITIES:
        raise MetaplError(f"severity {severity!r}: expected 1, 2, 3, 4 or 5.")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise MetaplError(
            f"corrupted was given {images.dtype} of shape {tuple(images.shape)}; expected floating-point pictures "
            "(B, C, H, W) in [0, 1] with 1 or 3 channels."
        )
    damage = CORRUPTIONS[corruption]
    kind = fold_in(fold_in(seed, list(CORRUPTIONS).index(corruption)), severity)
    damaged = []
    for number, image in enumerate(images.detach().cpu().double().numpy(), first):
        drawn = np.random.default_rng(fold_in(kind, number))
        picture = damage(np.ascontiguousarray(image.transpose(1, 2, 0)), severity - 1, drawn)
        damaged.append(np.round(np.clip(picture, 0, 1) * 255) / 255)
    result = torch.from_numpy(np.stack(damaged).transpose(0, 3, 1, 2).copy())
    return result.to(images)


# ---------------------------------------------------------------------------------------------------------------- noise


def gaussian_noise(x: Picture, level: int, drawn: Generator) -> Picture:
    """x + σn."""
    return x + drawn.normal(scale=(0.08, 0.12, 0.18, 0.26, 0.38)[level], size=x.shape)


def shot_noise(x: Picture, level: int, drawn: Generator) -> Picture:
    """Poisson(cx) / c, as of few photons."""
    photons = (60, 25, 12, 5, 3)[level]
    return drawn.poisson(x * photons) / photons


def impulse_noise(x: Picture, level: int, drawn: Generator) -> Picture:
    """A share of the values is black or white, evenly."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    u = drawn.random(x.shape)
    return np.where(u < share / 2, 0.0, np.where(u < share, 1.0, x))


# ----------------------------------------------------------------------------------------------------------------- blur


def defocus_blur(x: Picture, level: int, drawn: Generator) -> Picture:
    """The mean over a disk with a soft edge."""
    radius, edge = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    return _filtered(x, _disk(_length(radius, x), edge))


def glass_blur(x: Picture, level: int, drawn: Generator) -> Picture:
    """Blurred, each pixel exchanged with one nearby some times, and blurred again."""
    sigma, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    sigma, reach = _length(sigma, x), max(1, round(_length(reach, x)))
    x = _blurred(x, sigma)
    height, width = x.shape[:2]
    for _ in range(times):
        moves = drawn.integers(-reach, reach, size=(height, width, 2))
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                dx, dy = moves[row - 1, column - 1]
                a, b = (row - 1, column - 1), (row - 1 + dy, column - 1 + dx)
                x[a], x[b] = x[b].copy(), x[a].copy()
    return _blurred(x, sigma)


def motion_blur(x: Picture, level: int, drawn: Generator) -> Picture:
    """The mean along a line behind each pixel, weighted by a half Gaussian, at an angle within 45 degrees."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return _along(x, _length(radius, x), _length(sigma, x), drawn.uniform(-45, 45))


def zoom_blur(x: Picture, level: int, drawn: Generator) -> Picture:
    """The mean of the picture and of growing magnifications of it."""
    end, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[level]
    zooms = np.arange(1, end, step)
    return (x + sum(_zoomed(x, float(zoom)) for zoom in zooms)) / (len(zooms) + 1)


# -------------------------------------------------------------------------------------------------------------- weather


def snow(x: Picture, level: int, drawn: Generator) -> Picture:
    """Flakes that fall at an angle, over a whitened picture."""
    mean, std, zoom, least, radius, sigma, kept = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    flakes = _zoomed(drawn.normal(mean, std, size=(*x.shape[:2], 1)), zoom)
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    flakes = _along(flakes, _length(radius, x), _length(sigma, x), drawn.uniform(-135, -45))
    whitened = np.maximum(x, _brightness(x) * 1.5 + 0.5)
    return kept * x + (1 - kept) * whitened + flakes + flakes[::-1, ::-1]


def frost(x: Picture, level: int, drawn: Generator) -> Picture:
    """Crystals over the picture, drawn as the ridges of a fractal (the paper has photographs of frost)."""
    own, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    ridges = 1 - np.abs(2 * _fractal(x.shape[:2], 1.8, drawn) - 1)
    tint = np.array([0.82, 0.92, 1.0])[: x.shape[2]] if x.shape[2] == 3 else np.ones(1)
    return own * x + ice * (ridges**2)[..., None] * tint


def fog(x: Picture, level: int, drawn: Generator) -> Picture:
    """A bright fractal over the picture, which loses contrast."""
    amount, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[level]
    brightest = float(x.max())
    # ImageNet-C's wobble is a uniform draw within ±w times w, so that with w it falls by the square of the decay.
    cloud = _fractal(x.shape[:2], decay**2, drawn)[..., None]
    return (x + amount * cloud) * brightest / max(brightest + amount, 1e-12)


def brightness(x: Picture, level: int, drawn: Generator) -> Picture:
    """The value of each pixel's color, raised; hue and saturation stay."""
    value: Picture = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 1)
    return np.where(value > 0, x * (raised / np.maximum(value, 1e-12)), raised)


# -------------------------------------------------------------------------------------------------------------- digital


def contrast(x: Picture, level: int, drawn: Generator) -> Picture:
    """The distance from each channel's mean, shrunk."""
    mean: Picture = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


def elastic_transform(x: Picture, level: int, drawn: Generator) -> Picture:
    """A random affine map, and then each pixel moved along a smooth random field."""
    from scipy.ndimage import map_coordinates

    amount, sigma, affine = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))[
        level
    ]
    height, width = x.shape[:2]
    side = min(height, width)
    amount, sigma, affine = (share * ELASTIC / SIDE for share in (amount, sigma, affine))
    center, reach = np.array([height, width]) / 2, side / 3
    corners = np.array([center + reach, center + reach * np.array([1, -1]), center - reach])
    moved = corners + drawn.uniform(-affine * side, affine * side, size=corners.shape)
    matrix = np.linalg.solve(np.c_[moved, np.ones(3)], corners).T  # from where a pixel comes
    noise = [drawn.uniform(-1, 1, (height, width, 1)) for _ in range(2)]
    field = [amount * side * _blurred(each, sigma * side, mode="reflect", truncate=3)[..., 0] for each in noise]
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    there = np.stack([rows + field[0], columns + field[1], np.ones_like(rows, dtype=float)])
    places = np.tensordot(matrix, there, axes=1)
    return np.stack([map_coordinates(x[..., c], places, order=1, mode="reflect") for c in range(x.shape[2])], axis=2)


def pixelate(x: Picture, level: int, drawn: Generator) -> Picture:
    """Shrunk by averages over boxes, and enlarged by repetition."""
    from PIL import Image

    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    height, width = x.shape[:2]
    small = max(1, int(width * share)), max(1, int(height * share))
    return _by_pillow(
        x, lambda image: image.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.NEAREST)
    )


def jpeg_compression(x: Picture, level: int, drawn: Generator) -> Picture:
    """Saved as JPEG at a low quality."""
    from PIL import Image

    def saved(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=(25, 18, 15, 10, 7)[level])
        return Image.open(file)

    return _by_pillow(x, saved)


_NOISE, _BLUR = (gaussian_noise, shot_noise, impulse_noise), (defocus_blur, glass_blur, motion_blur, zoom_blur)
_WEATHER, _DIGITAL = (snow, frost, fog, brightness), (contrast, elastic_transform, pixelate, jpeg_compression)

CORRUPTIONS: dict[str, Callable[[Picture, int, Generator], Picture]] = {
    damage.__name__: damage for damage in (*_NOISE, *_BLUR, *_WEATHER, *_DIGITAL)
}
"""By name, in the order of ImageNet-C: noise, blur, weather, digital. The place of a kind enters the seed of its draws:
moving one changes the damage of all kinds that move with it."""


# ---------------------------------------------------------------------------------------------------------------- tools


def _length(pixels: float, x: Picture) -> float:
    """A length of the paper's pictures in pixels of this one."""
    return pixels * float(min(x.shape[:2])) / SIDE


def _brightness(x: Picture) -> Picture:
    return (x @ np.array([0.299, 0.587, 0.114]))[..., None] if x.shape[2] == 3 else x


def _blurred(x: Picture, sigma: float, mode: str = "nearest", truncate: float = 4) -> Picture:
    from scipy.ndimage import gaussian_filter

    blurred: Picture = gaussian_filter(x, (sigma, sigma, 0), mode=mode, truncate=truncate)
    return blurred


def _filtered(x: Picture, kernel: Picture) -> Picture:
    from scipy.ndimage import convolve

    filtered: Picture = convolve(x, kernel[..., None], mode="mirror")
    return filtered


def _disk(radius: float, edge: float) -> Picture:
    """A disk with an edge blurred by a Gaussian of width ``edge``, of sum 1; its rim counts in part."""
    reach = math.ceil(radius) + 2
    fine = 4  # samples of a pixel's side
    offsets = (np.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5
    inside = (offsets[:, None] ** 2 + offsets[None] ** 2 <= max(radius, 0.5) ** 2).astype(float)
    kernel = inside.reshape(2 * reach + 1, fine, 2 * reach + 1, fine).mean(axis=(1, 3))
    kernel = _blurred(kernel[..., None], edge, mode="constant")[..., 0]
    result: Picture = kernel / kernel.sum()
    return result


def _along(x: Picture, radius: float, sigma: float, angle: float) -> Picture:
    """The mean of the picture at places along a line, in degrees, weighted by exp(−t²/2σ²) for t from 0 to 2·radius."""
    from scipy.ndimage import shift

    steps = np.arange(2 * max(1, math.ceil(radius)) + 1) * (max(radius, 0.5) / max(1, math.ceil(radius)))
    weights = np.exp(-(steps**2) / (2 * max(sigma, 1e-6) ** 2))
    weights /= weights.sum()
    dy, dx = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    moved = [w * shift(x, (t * dy, t * dx, 0), order=1, mode="nearest") for t, w in zip(steps, weights, strict=True)]
    mean: Picture = np.sum(moved, axis=0)
    return mean


def _zoomed(x: Picture, factor: float) -> Picture:
    """The middle of the picture, magnified to its size."""
    from scipy.ndimage import affine_transform

    center = (np.array(x.shape[:2]) - 1) / 2
    matrix, offset = (1 / factor, 1 / factor, 1), (*(center - center / factor), 0)
    zoomed: Picture = affine_transform(x, matrix, offset, order=1, mode="nearest")
    return zoomed


def _fractal(shape: tuple[int, ...], decay: float, drawn: Generator) -> Picture:
    """Plasma by midpoint displacement, whose wobble falls by ``decay`` from scale to scale.

    Returns: (H, W), of a square field whose least value is 0 and whose greatest is 1.
    """
    size = 1 << max(1, math.ceil(math.log2(max(shape))))
    field, wobble, step = np.zeros((size, size)), 100.0, size
    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        around = corners + np.roll(corners, -1, 0)
        middles = (around + np.roll(around, -1, 1)) / 4
        field[half::step, half::step] = middles + drawn.uniform(-wobble, wobble, corners.shape)
        middles = field[half::step, half::step]
        left = corners + np.roll(corners, -1, 1) + middles + np.roll(middles, 1, 0)
        field[::step, half::step] = left / 4 + drawn.uniform(-wobble, wobble, corners.shape)
        above = corners + np.roll(corners, -1, 0) + middles + np.roll(middles, 1, 1)
        field[half::step, ::step] = above / 4 + drawn.uniform(-wobble, wobble, corners.shape)
        step, wobble = half, wobble / decay
    field -= field.min()
    result: Picture = (field / max(field.max(), 1e-12))[: shape[0], : shape[1]]
    return result


def _by_pillow(x: Picture, change: Callable[..., object]) -> Picture:
    from PIL import Image

    levels = np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(levels if x.shape[2] == 3 else levels[..., 0])
    changed = np.asarray(change(image), dtype=np.float64) / 255
    return changed if changed.ndim == 3 else changed[..., None]
