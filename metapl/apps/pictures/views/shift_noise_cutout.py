"""The view of the digits: a shift, noise and a square left out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metapl.apps.pictures.views import operations
from metapl.apps.pictures.views.base import FLOATING, below, check_images
from metapl.data import draws
from metapl.errors import MetaplError
from metapl.execution.device import to_device

_GEOMETRY, _NOISE = range(2)


@dataclass(frozen=True)
class ShiftNoiseCutout:
    """Shift each image, add noise, and set one square to 0.

    x ↦ (x moved by (dy, dx) + σz) · [outside the square], with dy, dx uniform on {−shift, …, shift}, z standard normal
    per value, and the square uniform over the places where it fits whole. What moves in is 0; values are not clipped.

    Args:
        shift: largest move along each axis in pixels, 0 or more.
        noise: σ, 0 or more, in units of the images' range.
        cutout: side of the square in pixels, 0 (none) or more.

    Call: ``view(images, seed=, step=, examples=)`` takes float images (B, C, H, W) and ``examples`` (B,) int64, and
    returns the same shape, dtype and device. Neither the rest of the batch nor the order of its examples matters.

    Raises:
        MetaplError: a negative field; on the call, images of another kind or smaller than the square, or a number of
            examples other than B.

    >>> view = ShiftNoiseCutout(shift=1, noise=0.2, cutout=2)
    >>> view(torch.rand(2, 1, 8, 8), seed=0, step=5, examples=torch.tensor([3, 4])).shape
    torch.Size([2, 1, 8, 8])
    """

    shift: int = 1
    noise: float = 0.2
    cutout: int = 2

    def __post_init__(self) -> None:
        if min(self.shift, self.noise, self.cutout) < 0:
            raise MetaplError(f"{self} has a negative field; expected each to be 0 or more, and 0 to switch it off")
        if not math.isfinite(self.noise):
            raise MetaplError(f"{self} has a noise of {self.noise}; expected a finite number, and 0 to switch it off")

    def __call__(self, images: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        check_images(self, images, examples, FLOATING)
        if self.cutout > min(images.shape[2:]):
            raise MetaplError(
                f"ShiftNoiseCutout got images of {images.shape[2]}x{images.shape[3]} pixels and a cutout of "
                f"{self.cutout}; expected the square to fit into the image: choose a smaller cutout"
            )
        examples = to_device(examples, images.device)
        u_B4 = draws.uniform(seed, step, examples, 4, stream=_GEOMETRY, dtype=torch.float64)
        offsets_B2 = self.shift - below(u_B4[:, :2], 2 * self.shift + 1)
        images = operations.crop_flip(images, offsets_B2, None, 0.0)
        if self.noise > 0:
            z = draws.normal(seed, step, examples, images[0].numel(), stream=_NOISE)
            images = images + self.noise * z.view_as(images).to(images.dtype)
        if self.cutout > 0:
            room = torch.tensor(images.shape[2:], device=images.device) - self.cutout + 1
            images = operations.cutout(images, below(u_B4[:, 2:], room), self.cutout, 0.0)
        return images
