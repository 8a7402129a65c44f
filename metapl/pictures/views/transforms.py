"""Views that move, cut, mirror and recolor images.

They are the paper's beside RandAugment, ImageNet's, the digits', and those of folders of pictures.

What a picture becomes depends on (seed, step, example) alone, to the last bit on one device: angles
come from :func:`~metapl.pictures.views.base.cosine_and_sine`, sums over a picture are exact,
and everything else is elementwise or works on one picture at a time. Products of batched matrices
would depend on the batch. What is drawn for a picture is planned on the host, by NumPy: there are
few numbers, and a call of torch takes longer than they do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metapl.data import draws
from metapl.errors import MetaplError
from metapl.execution.batch import to_device
from metapl.pictures.reader import LUMA
from metapl.pictures.views import base
from metapl.pictures.views.base import (
    NotNegative,
    PictureView,
    Positive,
    Probability,
    View,
    below,
)
from metapl.runs.fields import AtLeastOne, AtLeastZero, Range

Share = Annotated[float, Range(above=0, most=1)]


@dataclass(frozen=True)
class Weak(PictureView):
    """Mirror half of the images, pad them all, and cut each to its size at a random place.

    x ↦ the (H, W) window of pad(flip(x)) at a corner uniform on {0, …, 2·pad}².

    Args:
        pad: width of the frame in pixels, 0 or more; the authors' code takes an eighth of the side,
            4 for CIFAR-10.
        flip: whether half of the images are mirrored left to right; not for digits and other
            writing.

    The frame is middle grey, as in the authors' code.

    >>> Weak()(torch.rand(2, 3, 32, 32), seed=0, step=5, examples=torch.tensor([3, 4])).shape
    torch.Size([2, 3, 32, 32])
    """

    takes = base.FLOATING_OR_BYTES
    pad: AtLeastZero = 4
    flip: bool = True

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        u_B3 = to_device(
            draws.uniform(seed, step, examples, 3, stream=base.CROP, dtype=torch.float64),
            images.device,
        )
        offsets_B2 = below(u_B3[:, :2], 2 * self.pad + 1) - self.pad
        flip_B = (u_B3[:, 2] < 0.5) & self.flip
        return base.crop_flip(
            images, offsets_B2, flip_B, base.GREY / (255 if images.is_floating_point() else 1)
        )


@dataclass(frozen=True)
class ResizedCrop(PictureView):
    """Cut a random rectangle out of each image, bring it to one size, and mirror half of them.

    As torchvision's ``RandomResizedCrop``: an area uniform on scale · HW and a ratio width : height
    log-uniform on ``ratio``, at a uniform place; after ten draws that do not fit, the middle of the
    image at the nearest ratio.

    Args:
        size: side of the result in pixels.
        scale: smallest and largest share of the image's area, 0 < smallest ≤ largest ≤ 1.
        ratio: smallest and largest ratio width : height, 0 < smallest ≤ largest.
        flip: whether half of the images are mirrored left to right.

    Resized bilinearly with antialiasing, as Pillow does; the authors' code resizes bicubically
    without.

    >>> images, examples = torch.rand(2, 3, 32, 48), torch.tensor([3, 4])
    >>> ResizedCrop(24)(images, seed=0, step=5, examples=examples).shape
    torch.Size([2, 3, 24, 24])
    """

    takes = base.FLOATING_OR_BYTES
    size: AtLeastOne
    scale: tuple[Share, Share] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: bool = True

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        boxes, flips = self.boxes(seed, step, examples.cpu(), *images.shape[2:])
        result = images.new_empty((*images.shape[:2], self.size, self.size))
        for i, ((top, left, height, width), flip) in enumerate(
            zip(boxes.tolist(), flips.tolist(), strict=True)
        ):
            crop = images[i : i + 1, :, top : top + height, left : left + width].float()
            crop = F.interpolate(crop, (self.size, self.size), mode="bilinear", antialias=True)
            crop = crop.flip(3) if flip else crop
            result[i] = crop[0] if images.is_floating_point() else crop[0].round()
        return result

    def boxes(
        self, seed: int, step: int, examples: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Return the boxes that the view cuts out of images of one size, and which it mirrors.

        The examples are on the CPU, as logarithms differ between devices.

        Returns: (B, 4) int64, top, left, height and width in pixels, and (B,) bool, whether to
        mirror.
        """
        u = draws.uniform(seed, step, examples, 23, stream=base.RESIZED_CROP, dtype=torch.float64)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, 3:13])
        low = math.log(self.ratio[0])
        high = math.log(self.ratio[1])
        ratio = (low + (high - low) * u[:, 13:]).exp()
        # The last column is what to fall back on, and always fits.
        middle = min(max(width / height, self.ratio[0]), self.ratio[1])
        sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=2).round().long()
        largest_height = min(height, round(width / middle))
        largest_width = min(width, round(height * middle))
        largest = torch.tensor([largest_height, largest_width]).clamp(min=1)
        sides = torch.cat([sides, largest.expand(len(u), 1, 2)], dim=1)
        room = torch.tensor([height, width]) - sides
        first = ((room >= 0) & (sides > 0)).all(2).int().argmax(1)
        rows = torch.arange(len(u))
        sides = sides[rows, first]
        room = room[rows, first]
        corners = torch.where((first == 10)[:, None], room // 2, below(u[:, :2], room + 1))
        return torch.cat([corners, sides], dim=1), (u[:, 2] < 0.5) & self.flip


@dataclass(frozen=True)
class ShiftNoiseCutout(PictureView):
    """Shift each image, add noise, and set one square to 0: the view of the digits.

    x ↦ (x moved by (dy, dx) + σz) · [outside the square], with dy, dx uniform on {−shift, …,
    shift}, z standard normal per value, and the square uniform over the places where it fits whole.
    What moves in is 0; values are not clipped.

    Args:
        shift: largest move along each axis in pixels, 0 or more.
        noise: σ, 0 or more, in units of the images' range.
        cutout: side of the square in pixels, 0 (none) or more.
    """

    takes = base.FLOATING
    shift: AtLeastZero = 1
    noise: NotNegative = 0.2
    cutout: AtLeastZero = 2

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        if self.cutout > min(images.shape[2:]):
            raise MetaplError(
                f"ShiftNoiseCutout got images of {images.shape[2]}x{images.shape[3]} pixels and a "
                f"cutout of {self.cutout}; expected a square that fits into the image"
            )
        examples = to_device(examples, images.device)
        u_B4 = draws.uniform(seed, step, examples, 4, stream=base.GEOMETRY, dtype=torch.float64)
        offsets_B2 = self.shift - below(u_B4[:, :2], 2 * self.shift + 1)
        images = base.crop_flip(images, offsets_B2, None, 0.0)
        if self.noise > 0:
            z = base.normal(seed, step, examples, math.prod(images.shape[1:]), stream=base.NOISE)
            images = images + self.noise * z.view_as(images).to(images.dtype)
        if self.cutout > 0:
            # The numbers of places stay numbers of Python: the host would wait for a copy of them
            # to the device.
            rows, columns = (size - self.cutout + 1 for size in images.shape[2:])
            corners_B2 = torch.stack([below(u_B4[:, 2], rows), below(u_B4[:, 3], columns)], dim=1)
            images = base.cutout(images, corners_B2, self.cutout, 0.0)
        return images


@dataclass(frozen=True)
class Affine(PictureView):
    """Turn, scale, shear and move each picture about its center, in one bilinear sampling.

    The pixel at p, from the center, is taken from M⁻¹(p − t), with M = s · R(θ) · [[1, −tan φ], [0,
    1]]: torchvision's ``affine``. Each number is uniform on its range.

    Args:
        degrees: greatest |θ|, 0 to 180; positive turns clockwise.
        translate: greatest move along each axis, as a share of the side, 0 or more.
        scale: smallest and largest s, 0 < smallest ≤ largest.
        shear: greatest |φ| in degrees, 0 or more and below 90.
        flip: whether half of the pictures are mirrored left to right, before all else.
        side: of the result in pixels; None: that of the picture. One that is smaller is sampled
            without antialiasing.

    The picture's outermost pixels continue around it.

    >>> view = Affine(degrees=15, translate=0.1, scale=(0.9, 1.1))
    >>> view(torch.rand(2, 3, 32, 48), seed=0, step=5, examples=torch.tensor([3, 4])).shape
    torch.Size([2, 3, 32, 48])
    """

    degrees: Annotated[float, Range(0, most=180)] = 0.0
    translate: NotNegative = 0.0
    scale: tuple[Positive, Positive] = (1.0, 1.0)
    shear: Annotated[float, Range(0, 90)] = 0.0
    flip: bool = False
    side: AtLeastOne | None = None

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        if self == _UNMOVED:
            return images
        height, width = images.shape[2:]
        u_B5 = draws.uniform_on_host(seed, step, examples, 5, stream=base.AFFINE)
        v_B5 = 2.0 * u_B5 - 1.0
        cos_B2, sin_B2 = base.cosine_and_sine(
            v_B5[:, :2] * np.array([self.degrees / 180, self.shear / 180])
        )
        cos, cos_shear = cos_B2.T
        sin, sin_shear = sin_B2.T
        slope = sin_shear / cos_shear
        low, high = self.scale
        scale = low + (high - low) * u_B5[:, 2]
        right = v_B5[:, 3] * (self.translate * width)
        down = v_B5[:, 4] * (self.translate * height)
        a = (cos - sin * slope) / scale
        b = (sin + cos * slope) / scale
        c = -sin / scale
        d = cos / scale
        rows = [a, b, -(a * right + b * down), c, d, -(c * right + d * down)]
        # The maps lead from pixels about the center to where they come from, in units of half the
        # sides.
        half_sides = np.array([width, height])[:, None] / 2.0
        planned_B23 = np.stack(rows, axis=1).reshape(-1, 2, 3) / half_sides
        if self.flip:
            u_B1 = draws.uniform_on_host(seed, step, examples, 1, stream=base.FLIP)
            planned_B23[u_B1[:, 0] < 0.5, 0] *= -1.0
        if self.side is not None:
            # A pixel of the result stands for so many of the picture.
            planned_B23[:, :, :2] *= np.array([width, height]) / self.side
            height = width = self.side
        maps_B23 = to_device(torch.from_numpy(planned_B23).to(images.dtype), images.device)
        along_x, along_y, offset = maps_B23[:, :, None, None].unbind(4)
        x = _centered(width, images)
        y = _centered(height, images)[:, None]
        # This is not one fused operation, which may round differently at the end of a tensor than
        # in its middle.
        grid_BHW2 = (along_x * x + (along_y * y + offset)).permute(0, 2, 3, 1)
        moved = F.grid_sample(images, grid_BHW2, padding_mode="border", align_corners=False)
        # Weights may add up to a rounding more than 1.
        return moved.clamp_(0, 1)


@dataclass(frozen=True)
class Color(PictureView):
    """Change each picture's brightness, contrast, saturation and hue.

    x ↦ s(c(bx) + (1 − c)m) + (1 − s)y, with m the mean luma of bx and y the luma of the picture so
    far; then the colors are turned about the grey axis by an angle θ, and cut to [0, 1]. b, c and s
    are uniform on [max(0, 1 − r), 1 + r] for their r, and θ on ±hue turns. Brightness, contrast and
    saturation are torchvision's, but that nothing is cut off in between; the hue is linear, as in
    StyleGAN2-ADA, and not that of HSV.

    Args:
        brightness, contrast, saturation: r of b, c and s, 0 or more.
        hue: greatest |θ| as a share of a turn, 0 to 0.5; pictures of one channel have neither hue
            nor saturation.
    """

    is_colored = True
    brightness: NotNegative = 0.0
    contrast: NotNegative = 0.0
    saturation: NotNegative = 0.0
    hue: Annotated[float, Range(0, most=0.5)] = 0.0

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        if self == _UNCHANGED:
            return images
        u_B4 = draws.uniform_on_host(seed, step, examples, 4, stream=base.COLOR)
        ranges = [self.brightness, self.contrast, self.saturation]
        low = np.array([max(0.0, 1.0 - r) for r in ranges])
        high = np.array([1.0 + r for r in ranges])
        b, c, s = (low + (high - low) * u_B4[:, :3]).T
        cos, sin = base.cosine_and_sine((2.0 * u_B4[:, 3] - 1.0) * (2.0 * self.hue))
        # Rodrigues' rotation about (1, 1, 1): a channel becomes a mean of itself, the next and the
        # last one.
        turn = (1.0 - cos) / 3.0
        tilt = sin / math.sqrt(3.0)
        # Weights of the turned picture, of its luma and of the mean luma, and two of the turn.
        plan_B5 = np.stack(
            [s * c * b, (1.0 - s) * c * b, (1.0 - c) * b, turn - tilt, turn + tilt], axis=1
        )
        weights = to_device(torch.from_numpy(plan_B5), images.device)[:, :, None, None, None]
        turned, luma, mean, following, last = weights.unbind(1)
        grey = _luma(images)
        level = (mean * _mean(grey)).to(images.dtype)
        if images.shape[1] == 1:
            # Such a picture is its own luma, and has no hue.
            lit: Tensor = images * (turned + luma).to(images.dtype)
            lit += level
            return lit.clamp_(0, 1)
        turned = turned.to(images.dtype)
        luma = luma.to(images.dtype)
        if self.hue == 0:
            changed: Tensor = images * turned
        else:
            following = following.to(images.dtype)
            last = last.to(images.dtype)
            # Green, blue, red stand beside red, green, blue.
            around = torch.cat([images, images[:, :2]], dim=1)
            changed = images * (turned * (1.0 - following - last))
            changed += around[:, 1:4] * (turned * following)
            changed += around[:, 2:5] * (turned * last)
        changed += grey * luma + level
        return changed.clamp_(0, 1)


@dataclass(frozen=True)
class Hole(PictureView):
    """Cover a square of each picture by the mean color of the picture.

    The center of the square is uniform on the picture.

    Args:
        side: smallest and largest side of the square, as shares of the picture's shorter side, 0 ≤
            smallest ≤ largest.
    """

    side: tuple[NotNegative, NotNegative]

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        if self.side[1] == 0:
            return images
        height, width = images.shape[2:]
        u_B4 = draws.uniform_on_host(seed, step, examples, 4, stream=base.HOLE)
        low, high = self.side
        half = (low + (high - low) * u_B4[:, :1]) * (min(height, width) / 2.0)
        centers = (u_B4[:, 1:3] - 0.5) * np.array([height, width])
        planned_B4 = np.concatenate([centers - half, centers + half], axis=1)
        plan_B4 = to_device(torch.from_numpy(planned_B4).to(images.dtype), images.device)
        top, left, bottom, right = plan_B4[:, :, None, None, None].unbind(1)
        y = _centered(height, images)[:, None]
        x = _centered(width, images)
        hole = ((y >= top) & (y < bottom)) & ((x >= left) & (x < right))
        return torch.where(hole, _mean(images).to(images.dtype), images)


@dataclass(frozen=True)
class Flip(PictureView):
    """Mirror half of the pictures left to right; not for digits and other writing."""

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        u_B2 = draws.uniform(seed, step, examples, 2, stream=base.FLIP)
        mirrored = to_device(u_B2[:, :1] < 0.5, images.device)[:, :, None, None]
        return torch.where(mirrored, images.flip(3), images)


@dataclass(frozen=True)
class Recolor(PictureView):
    """Exchange the colors of each picture: its channels in another order, and light for dark.

    x_c ↦ x_π(c), then 1 − x for half of the pictures; π is one of the six orders of red, green and
    blue, all alike. Not for classes that differ in color or brightness.
    """

    is_colored = True

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        u_B4 = draws.uniform(seed, step, examples, 4, stream=base.RECOLOR, dtype=torch.float64)
        if images.shape[1] == 3:
            order_B3 = to_device(u_B4[:, :3].argsort(dim=1), images.device)
            images = images.gather(1, order_B3[:, :, None, None].expand_as(images))
        inverted_B = to_device(u_B4[:, 3] < 0.5, images.device)[:, None, None, None]
        return torch.where(inverted_B, 1.0 - images, images)


@dataclass(frozen=True)
class Sometimes(PictureView):
    """Change a part of the pictures: x ↦ view(x) with probability ``share``, else otherwise(x).

    The two views draw from fold_in(seed, 0) and fold_in(seed, 1).

    A network that predicts pictures as they are should have seen such pictures: interpolation takes
    away noise and fine lines, and batch norm's statistics are of what was seen.

    Args:
        view: changes pictures and keeps their shape.
        share: probability in [0, 1] of changing a picture.
        otherwise: changes the other pictures; by default they stay as they are.
    """

    view: View
    share: Probability
    otherwise: View = base.Identity()

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        return self.see_in(None, images, seed, step, examples)

    def see_in(
        self, batch: Tensor | None, images: Tensor, seed: int, step: int, examples: Tensor
    ) -> Tensor:
        u_B = draws.uniform(seed, step, examples, 1, stream=base.SOMETIMES)[:, 0]
        is_changed_B = to_device(u_B < self.share, images.device)[:, None, None, None]
        options: dict[str, Tensor] = {} if batch is None else {"batch": batch}
        changed, changed_otherwise = (
            view(images, seed=view_seed, step=step, examples=examples, **options)
            for view, view_seed in self._seeded(seed)
        )
        return torch.where(is_changed_B, changed, changed_otherwise)

    def _seeded(self, seed: int) -> tuple[tuple[View, int], tuple[View, int]]:
        """Return both views with a seed for each, so that one of this class draws anew."""
        return (self.view, draws.fold_in(seed, 0)), (self.otherwise, draws.fold_in(seed, 1))

    def rows_needed(self, rows: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor | None:
        first, second = (
            base.rows_needed(view, rows, seed=view_seed, step=step, examples=examples)
            for view, view_seed in self._seeded(seed)
        )
        if first is None or second is None:
            return None
        return torch.cat([first, second[~torch.isin(second, first)]])


# The views that change nothing, made once: to make one looks at its fields.
_UNMOVED = Affine()
_UNCHANGED = Color()


def _centered(side: int, like: Tensor) -> Tensor:
    """Return the places of pixels along a side, from its middle."""
    return torch.arange(side, dtype=like.dtype, device=like.device) - (side - 1) / 2.0


def _luma(images: Tensor) -> Tensor:
    """Return the luma (B, 1, H, W) of pictures (B, C, H, W), C = 1 or 3."""
    if images.shape[1] == 1:
        return images
    return (images[:, :1] * LUMA[0]).add_(images[:, 1:2] * LUMA[1]).add_(images[:, 2:] * LUMA[2])


def _mean(images: Tensor) -> Tensor:
    """Return the mean of each channel, (B, C, 1, 1) float64.

    It is the same whatever the order in which it is summed.
    """
    # Plus 1, numbers in [0, 1] are multiples of 2^-23, of which float64 holds sums over 2^29 pixels
    # without rounding.
    total = (images.float() + 1.0).sum((2, 3), keepdim=True, dtype=torch.float64)
    return total / math.prod(images.shape[2:]) - 1.0
