"""The picture operations of RandAugment, on batches of 8-bit levels and bit for bit Pillow's.

Every operation takes ``levels`` (B, C, H, W) uint8 with C = 1 or 3 and returns the same. All arithmetic is on integers
or is single float operations that IEEE 754 rounds in one way only, so that a picture's result is the same on every
device and in every batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GREY = 128  # fills the places that no pixel comes from: the middle level, as in the authors' code


def autocontrast(levels: Tensor) -> Tensor:
    """Stretch each channel of each picture to 0 … 255; a channel of one level stays. ``ImageOps.autocontrast``."""
    low = levels.amin((2, 3), keepdim=True).double()
    high = levels.amax((2, 3), keepdim=True).double()
    flat = high <= low
    # A number over a tensor would be the number times a rounded reciprocal.
    scale = torch.full_like(low, 255.0) / torch.where(flat, 1.0, high - low)
    stretched = levels.double().mul_(scale).add_(-low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(flat, levels, stretched)


def equalize(levels: Tensor) -> Tensor:
    """Flatten the histogram of each channel of each picture. ``ImageOps.equalize``."""
    from torchvision.transforms.v2 import functional  # two seconds of import that nothing else here needs

    return functional.equalize_image(levels)  # type: ignore[no-any-return]


def color(levels: Tensor, factor: float) -> Tensor:
    """Away from the grey picture by ``factor``; a picture of one channel stays. ``ImageEnhance.Color``."""
    return levels if levels.shape[1] == 1 else blend(_luma(levels).expand_as(levels), levels, factor)


def contrast(levels: Tensor, factor: float) -> Tensor:
    """Away from the mean grey by ``factor``. ``ImageEnhance.Contrast``; the authors' code takes its pixel count / 256
    for the mean: a slip, which is not followed."""
    luma = _luma(levels)
    pixels = luma[0].numel()
    mean = (2 * luma.sum((1, 2, 3), keepdim=True, dtype=torch.int64) + pixels) // (2 * pixels)
    return blend(mean.to(torch.uint8).expand_as(levels), levels, factor)


def sharpness(levels: Tensor, factor: float) -> Tensor:
    """Away from the smoothed picture by ``factor``; the outermost pixels stay. ``ImageEnhance.Sharpness``."""
    if min(levels.shape[2:]) < 3:
        return levels
    x = levels.short()
    rows = (x[:, :, :-2] + x[:, :, 1:-1]).add_(x[:, :, 2:])
    # The kernel is 1 everywhere and 5 in the middle.
    total = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(x[:, :, 1:-1, 1:-1], alpha=4)
    smooth = levels.clone()
    # 13 is odd, so that no value is so close to halfway between two levels that a rounding could decide.
    smooth[:, :, 1:-1, 1:-1] = total.float().mul_(1 / 13).add_(0.5).to(torch.uint8)
    return blend(smooth, levels, factor)


def blend(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """start + weight · (end − start), cut to 0 … 255 and truncated; weight > 1 goes beyond ``end``. ``Image.blend``."""
    # In place and step by step, each rounded as Pillow does it.
    return end.float().sub_(start).mul_(weight).add_(start).clamp_(0, 255).to(torch.uint8)


def _luma(levels: Tensor) -> Tensor:
    """(B, 1, H, W): 0.299 R + 0.587 G + 0.114 B to 16 bits after the point, rounded. ``Image.convert("L")``."""
    if levels.shape[1] == 1:
        return levels
    red, green, blue = levels.int().split(1, dim=1)
    total = red.mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(1 << 15)
    return total.bitwise_right_shift_(16).to(torch.uint8)  # type: ignore[no-any-return]


# (a, b, c, d, e, f): the pixel at (x, y) comes from (ax + by + c, dx + ey + f), in pixels from the upper left corner.
Affine = tuple[float, float, float, float, float, float]


def rotation(degrees: float, height: int, width: int) -> Affine:
    """Counterclockwise about the center."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return cos, -sin, (width - cos * width + sin * height) / 2, sin, cos, (height - sin * width - cos * height) / 2


def fixed_point(matrix: Affine) -> list[int]:
    """An affine map of pixel indices in units of 2⁻¹⁶ pixels, for :func:`affine`. Pixels are taken at their centers."""
    a, b, c, d, e, f = matrix
    return [math.floor(v * 65536 + 0.5) for v in (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2)]


def affine(levels: Tensor, matrices_B6: Tensor) -> Tensor:
    """Move each picture by its own map, a row of int64 from :func:`fixed_point`, to the nearest pixel, with grey where
    none is. ``Image.transform(AFFINE, NEAREST)``."""
    a, b, c, d, e, f = matrices_B6[:, :, None, None].unbind(1)
    y = torch.arange(levels.shape[2], device=levels.device)[:, None]
    x = torch.arange(levels.shape[3], device=levels.device)
    return _gather(levels, (d * x + (e * y + f)) >> 16, (a * x + (b * y + c)) >> 16, GREY)


def crop_flip(images: Tensor, offsets_B2: Tensor, flip_B: Tensor | None, fill: float) -> Tensor:
    """Mirror the images of ``flip_B``, then cut each at its own offset (down, right), of either sign, with ``fill``
    outside it; for images (B, C, H, W) of any dtype."""
    height, width = images.shape[2:]
    rows_BH = torch.arange(height, device=images.device) + offsets_B2[:, :1]
    cols_BW = torch.arange(width, device=images.device) + offsets_B2[:, 1:]
    if flip_B is not None:
        cols_BW = torch.where(flip_B[:, None], width - 1 - cols_BW, cols_BW)
    return _gather(images, rows_BH[:, :, None], cols_BW[:, None, :], fill)


def _gather(images: Tensor, rows: Tensor, cols: Tensor, fill: float) -> Tensor:
    """The pixels at ``rows`` and ``cols``, which broadcast to (B, H, W), and ``fill`` where there are none."""
    _, channels, height, width = images.shape
    nearest_rows, nearest_cols = rows.clamp(0, height - 1), cols.clamp(0, width - 1)
    inside = (nearest_rows == rows) & (nearest_cols == cols)
    flat = (nearest_rows * width + nearest_cols).flatten(1)[:, None].expand(-1, channels, -1)
    return images.flatten(2).gather(2, flat).view_as(images).masked_fill(~inside[:, None], fill)


def cutout(images: Tensor, corners_B2: Tensor, side: int, fill: float) -> Tensor:
    """Fill a square with the given upper left corner (row, column); what lies outside the image is lost."""
    height, width = images.shape[2:]
    rows_BH = torch.arange(height, device=images.device) - corners_B2[:, :1]
    cols_BW = torch.arange(width, device=images.device) - corners_B2[:, 1:]
    square_BHW = ((rows_BH >= 0) & (rows_BH < side))[:, :, None] & ((cols_BW >= 0) & (cols_BW < side))[:, None, :]
    return images.masked_fill(square_BHW[:, None], fill)
