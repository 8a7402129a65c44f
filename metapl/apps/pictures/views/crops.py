"""Views that move, cut out and mirror images: the weak view of the paper's protocols, ImageNet's and the digits'."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from metapl.apps.pictures.views import base
from metapl.apps.pictures.views.base import NotNegative, PictureView, Positive, below
from metapl.data import draws
from metapl.errors import MetaplError
from metapl.execution.device import to_device
from metapl.runs.fields import AtLeastOne, AtLeastZero, Range

Share = Annotated[float, Range(above=0, most=1)]


@dataclass(frozen=True)
class Weak(PictureView):
    """Mirror half of the images, pad them all, and cut each to its size at a random place.

    x ↦ the (H, W) window of pad(flip(x)) at a corner uniform on {0, …, 2·pad}².

    Args:
        pad: width of the frame in pixels, 0 or more; the authors' code takes an eighth of the side, 4 for CIFAR-10.
        flip: whether half of the images are mirrored left to right; not for digits and other writing.
        fill: value of the frame in units of the images' range (of 255 where they are uint8); by default the middle
            grey of images in [0, 1], as in the authors' code.

    Call: ``view(images, seed=, step=, examples=)`` takes images (B, C, H, W), floating point or uint8, and ``examples``
    (B,) int64, and returns the same shape, dtype and device. Neither the rest of the batch nor its order matters.

    Raises:
        MetaplError: a negative pad; on the call, images of another kind, or not one example index per image.

    >>> Weak()(torch.rand(2, 3, 32, 32), seed=0, step=5, examples=torch.tensor([3, 4])).shape
    torch.Size([2, 3, 32, 32])
    """

    takes = base.FLOATING_OR_BYTES
    pad: AtLeastZero = 4
    flip: bool = True
    fill: float = base.GREY / 255

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        u_B3 = to_device(draws.uniform(seed, step, examples, 3, stream=base.CROP, dtype=torch.float64), images.device)
        offsets_B2 = below(u_B3[:, :2], 2 * self.pad + 1) - self.pad
        flip_B = (u_B3[:, 2] < 0.5) & self.flip
        fill = self.fill if images.is_floating_point() else round(255 * self.fill)
        return base.crop_flip(images, offsets_B2, flip_B, fill)


@dataclass(frozen=True)
class ResizedCrop(PictureView):
    """Cut a random rectangle out of each image, bring it to one size, and mirror half of them.

    As torchvision's ``RandomResizedCrop``: an area uniform on scale · HW and a ratio width : height log-uniform on
    ``ratio``, at a uniform place; after ten draws that do not fit, the middle of the image at the nearest ratio.

    Args:
        size: side of the result in pixels.
        scale: smallest and largest share of the image's area, 0 < smallest ≤ largest ≤ 1.
        ratio: smallest and largest ratio width : height, 0 < smallest ≤ largest.
        flip: whether half of the images are mirrored left to right.

    Call, raises: as :class:`Weak`, but returns (B, C, size, size). Resized bilinearly with antialiasing, as Pillow
    does; the authors' code resizes bicubically without. Cost: one call of ``interpolate`` per image.

    >>> ResizedCrop(24)(torch.rand(2, 3, 32, 48), seed=0, step=5, examples=torch.tensor([3, 4])).shape
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
        for i, ((top, left, height, width), flip) in enumerate(zip(boxes.tolist(), flips.tolist(), strict=True)):
            crop = images[i : i + 1, :, top : top + height, left : left + width].float()
            crop = F.interpolate(crop, (self.size, self.size), mode="bilinear", antialias=True)
            crop = crop.flip(3) if flip else crop
            result[i] = crop[0] if images.is_floating_point() else crop[0].round()
        return result

    def boxes(self, seed: int, step: int, examples: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """What the view cuts out of images of one size: (B, 4) int64, top, left, height and width in pixels, and (B,)
        bool, whether to mirror. The examples are on the CPU, as logarithms differ between devices."""
        u = draws.uniform(seed, step, examples, 23, stream=base.RESIZED_CROP, dtype=torch.float64)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, 3:13])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = (low + (high - low) * u[:, 13:]).exp()
        # The last column is what to fall back on, and always fits.
        middle = min(max(width / height, self.ratio[0]), self.ratio[1])
        sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=2).round().long()
        whole = torch.tensor([min(height, round(width / middle)), min(width, round(height * middle))]).clamp(min=1)
        sides = torch.cat([sides, whole.expand(len(u), 1, 2)], dim=1)
        room = torch.tensor([height, width]) - sides
        first = ((room >= 0) & (sides > 0)).all(2).int().argmax(1)
        at = torch.arange(len(u))
        sides, room = sides[at, first], room[at, first]
        corners = torch.where((first == 10)[:, None], room // 2, below(u[:, :2], room + 1))
        return torch.cat([corners, sides], dim=1), (u[:, 2] < 0.5) & self.flip


@dataclass(frozen=True)
class ShiftNoiseCutout(PictureView):
    """Shift each image, add noise, and set one square to 0: the view of the digits.

    x ↦ (x moved by (dy, dx) + σz) · [outside the square], with dy, dx uniform on {−shift, …, shift}, z standard normal
    per value, and the square uniform over the places where it fits whole. What moves in is 0; values are not clipped.

    Args:
        shift: largest move along each axis in pixels, 0 or more.
        noise: σ, 0 or more, in units of the images' range.
        cutout: side of the square in pixels, 0 (none) or more.

    Call, raises: as :class:`Weak`, with float images, which are refused where they are smaller than the square.
    """

    takes = base.FLOATING
    shift: AtLeastZero = 1
    noise: NotNegative = 0.2
    cutout: AtLeastZero = 2

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        if self.cutout > min(images.shape[2:]):
            given = f"images of {images.shape[2]}x{images.shape[3]} pixels and a cutout of {self.cutout}"
            raise MetaplError(f"ShiftNoiseCutout got {given}; expected a square that fits into the image")
        examples = to_device(examples, images.device)
        u_B4 = draws.uniform(seed, step, examples, 4, stream=base.GEOMETRY, dtype=torch.float64)
        offsets_B2 = self.shift - below(u_B4[:, :2], 2 * self.shift + 1)
        images = base.crop_flip(images, offsets_B2, None, 0.0)
        if self.noise > 0:
            z = draws.normal(seed, step, examples, images[0].numel(), stream=base.NOISE)
            images = images + self.noise * z.view_as(images).to(images.dtype)
        if self.cutout > 0:
            room = torch.tensor(images.shape[2:], device=images.device) - self.cutout + 1
            images = base.cutout(images, below(u_B4[:, 2:], room), self.cutout, 0.0)
        return images
