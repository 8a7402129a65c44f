"""Views: augmentations that are frozen values and pure functions of (seed, step, example)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from metapl.data import draws
from metapl.errors import MetaplError

WIDE = (torch.float32, torch.float64)
FLOATING = (*WIDE, torch.float16, torch.bfloat16)
FLOATING_OR_BYTES = (*FLOATING, torch.uint8)


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

    >>> from metapl.apps.pictures import Flip, ShiftNoiseCutout
    >>> view = Chain((Flip(), ShiftNoiseCutout()))
    >>> view(torch.rand(2, 3, 32, 32), seed=0, step=5, examples=torch.tensor([3, 4])).shape
    torch.Size([2, 3, 32, 32])
    """

    views: tuple[View, ...]

    def __call__(self, images: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        for position, view in enumerate(self.views):
            images = view(images, seed=draws.fold_in(seed, position), step=step, examples=examples)
        return images


def check_images(view: object, images: Tensor, examples: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Refuse what is not a batch of images of one of the types, with an index for each."""
    name = type(view).__name__
    if images.ndim != 4 or images.dtype not in dtypes:
        scaled = "" if torch.uint8 in dtypes else "images.float() / 255, and "
        raise MetaplError(
            f"{name} got images of shape {tuple(images.shape)} and dtype {images.dtype}; expected "
            f"{' or '.join(map(str, dtypes))} (B, C, H, W): {scaled}images[:, None] where the channel is missing"
        )
    if examples.shape != images.shape[:1]:
        raise MetaplError(
            f"{name} got examples of shape {tuple(examples.shape)} for {len(images)} images; expected one index per "
            f"image, ({len(images)},): the indices that picked the images from the data set"
        )


def check_channels(view: object, images: Tensor) -> None:
    """Refuse images that are neither grey nor in color."""
    if images.shape[1] not in (1, 3):
        raise MetaplError(
            f"{type(view).__name__} got images of {images.shape[1]} channels; expected 1 (grey) or 3 (red, green, "
            "blue): take transparency off first"
        )


def check_range(view: object, images: Tensor, scale: float = 1.0) -> None:
    """Refuse values outside [0, scale]; on the CPU only: elsewhere the check would hold the device up."""
    if images.device.type != "cpu" or images.numel() == 0:
        return
    low, high = (bound.item() / scale for bound in images.aminmax())
    if not 0 <= low <= high <= 1:
        raise MetaplError(
            f"{type(view).__name__} got images with values from {low:g} to {high:g}; expected 0 to 1: normalise after "
            "the views"
        )


def below(u: Tensor, bound: Tensor | int) -> Tensor:
    """Uniform [0, 1) in float64 to uniform {0, …, bound − 1}: 53 bits keep the product below any bound in use."""
    return (u * bound).long()
