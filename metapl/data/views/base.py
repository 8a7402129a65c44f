"""Views: augmentations that are frozen values and pure functions of (seed, step, example)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from metapl.data import draws
from metapl.device import to_device
from metapl.errors import MetaplError

_GEOMETRY, _NOISE = range(2)


class View(Protocol):
    """What the batches call: images in, images out, with every draw fixed by seed, step and example."""

    def __call__(self, images: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        """Images (B, ...), a seed, a step and ``examples`` (B,) int64 to the view (B, ...)."""
        ...


@dataclass(frozen=True)
class Identity:
    """The images as they are.

    >>> images = torch.rand(2, 1, 8, 8)
    >>> Identity()(images, seed=0, step=0, examples=torch.arange(2)) is images
    True
    """

    def __call__(self, images: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        return images


@dataclass(frozen=True)
class Chain:
    """One view after another, each with draws of its own.

    x ↦ v_n(… v_1(x)), where v_i draws from fold_in(seed, i).

    Args:
        views: the views, first to last.

    Call: as each of the views.

    >>> view = Chain((ShiftNoiseCutout(), ShiftNoiseCutout(noise=0)))
    >>> view(torch.rand(2, 3, 32, 32), seed=0, step=5, examples=torch.tensor([3, 4])).shape
    torch.Size([2, 3, 32, 32])
    """

    views: tuple[View, ...]

    def __call__(self, images: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        for position, view in enumerate(self.views):
            images = view(images, seed=draws.fold_in(seed, position), step=step, examples=examples)
        return images


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

    def __call__(self, images: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        self._check(images, examples)
        examples = to_device(examples, images.device)
        u_B4 = draws.uniform(seed, step, examples, 4, stream=_GEOMETRY, dtype=torch.float64)
        images = _shift(images, _below(u_B4[:, :2], 2 * self.shift + 1) - self.shift)
        if self.noise > 0:
            z = draws.normal(seed, step, examples, images[0].numel(), stream=_NOISE)
            images = images + self.noise * z.view_as(images).to(images.dtype)
        if self.cutout > 0:
            places = torch.tensor(images.shape[2:], device=images.device) - self.cutout + 1
            images = _cut_out(images, _below(u_B4[:, 2:], places), self.cutout)
        return images

    def _check(self, images: Tensor, examples: Tensor) -> None:
        if images.ndim != 4 or not images.is_floating_point():
            raise MetaplError(
                f"ShiftNoiseCutout got images of shape {tuple(images.shape)} and dtype {images.dtype}; expected "
                "floating point (B, C, H, W): images.float() / 255, and images[:, None] where the channel is missing"
            )
        if examples.shape != images.shape[:1]:
            raise MetaplError(
                f"ShiftNoiseCutout got examples of shape {tuple(examples.shape)} for {len(images)} images; expected "
                f"one index per image, ({len(images)},): the indices that picked the images from the data set"
            )
        if self.cutout > min(images.shape[2:]):
            raise MetaplError(
                f"ShiftNoiseCutout got images of {images.shape[2]}x{images.shape[3]} pixels and a cutout of "
                f"{self.cutout}; expected the square to fit into the image: choose a smaller cutout"
            )


def _below(u: Tensor, bound: Tensor | int) -> Tensor:
    """Uniform [0, 1) in float64 to uniform {0, …, bound − 1}: 53 bits keep the product below any bound in use."""
    return (u * bound).long()


def _shift(images_BCHW: Tensor, offsets_B2: Tensor) -> Tensor:
    """Move each image down and right by its offsets, with zeros moving in."""
    batch, _, height, width = images_BCHW.shape
    device = images_BCHW.device
    rows_BH = torch.arange(height, device=device) - offsets_B2[:, :1]
    cols_BW = torch.arange(width, device=device) - offsets_B2[:, 1:]
    inside_BHW = ((rows_BH >= 0) & (rows_BH < height))[:, :, None] & ((cols_BW >= 0) & (cols_BW < width))[:, None, :]
    moved_BHWC = images_BCHW[
        torch.arange(batch, device=device)[:, None, None],
        :,
        rows_BH.clamp(0, height - 1)[:, :, None],
        cols_BW.clamp(0, width - 1)[:, None, :],
    ]
    return rearrange(moved_BHWC, "b h w c -> b c h w").masked_fill(~inside_BHW[:, None], 0.0)


def _cut_out(images_BCHW: Tensor, corners_B2: Tensor, side: int) -> Tensor:
    """Set the square of each image with the given upper left corner to 0."""
    _, _, height, width = images_BCHW.shape
    rows_BH = torch.arange(height, device=images_BCHW.device) - corners_B2[:, :1]
    cols_BW = torch.arange(width, device=images_BCHW.device) - corners_B2[:, 1:]
    square_BHW = ((rows_BH >= 0) & (rows_BH < side))[:, :, None] & ((cols_BW >= 0) & (cols_BW < side))[:, None, :]
    return images_BCHW.masked_fill(square_BHW[:, None], 0.0)
