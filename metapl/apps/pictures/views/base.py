"""Views: augmentations that are frozen values and pure functions of (seed, step, example)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

import torch
from torch import Tensor

from metapl.data import draws
from metapl.errors import MetaplError
from metapl.runs.fields import Range, check_fields

WIDE = (torch.float32, torch.float64)
FLOATING = (*WIDE, torch.float16, torch.bfloat16)
FLOATING_OR_BYTES = (*FLOATING, torch.uint8)

NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]
Probability = Annotated[float, Range(0, most=1)]

# The streams of draws, one for each use.
GEOMETRY, NOISE, CROP, RESIZED_CROP, OPERATIONS, CUTOUT, AFFINE, COLOR, HOLE, FLIP, RECOLOR, SOMETIMES = range(12)
SEEDED = 12


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
    """One view after another, first to last, each with draws of its own.

    x ↦ v_n(… v_1(x)), where v_i draws from fold_in(seed, i).

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


@dataclass(frozen=True)
class PictureView(ABC):
    """A view of pictures of some types, which refuses all others.

    Call: ``view(images, seed=, step=, examples=)`` takes images (B, C, H, W) and ``examples`` (B,) int64, and returns
    images of the same dtype on the same device. Neither the rest of the batch nor its order matters.

    Raises:
        MetaplError: a field outside its range, or a pair whose first is above its second; on the call, images of
            another kind, a number of examples other than B, or, of views that change colors, neither 1 nor 3 channels,
            or values outside [0, 1]; these are looked for on the CPU only, since elsewhere that holds the device up.
    """

    takes: ClassVar[tuple[torch.dtype, ...]] = WIDE
    is_colored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in vars(self).items():
            if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], float | int):
                self.require(value[0] <= value[1], name, "smallest <= largest")

    def __call__(self, images: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        name = type(self).__name__
        if images.ndim != 4 or images.dtype not in self.takes:
            scaled = "" if torch.uint8 in self.takes else "images.float() / 255, and "
            raise MetaplError(
                f"{name} got images of shape {tuple(images.shape)} and dtype {images.dtype}; expected "
                f"{' or '.join(map(str, self.takes))} (B, C, H, W): {scaled}images[:, None] where the channel is "
                "missing"
            )
        if examples.shape != images.shape[:1]:
            raise MetaplError(
                f"{name} got examples of shape {tuple(examples.shape)} for {len(images)} images; expected one index "
                f"per image, ({len(images)},): the indices that picked the images from the data set"
            )
        if self.is_colored and images.shape[1] not in (1, 3):
            raise MetaplError(f"{name} got images of {images.shape[1]} channels; expected 1 (grey) or 3 (RGB)")
        if self.is_colored and images.device.type == "cpu" and images.numel() and images.is_floating_point():
            low, high = (bound.item() for bound in images.aminmax())
            over = 0.5 / 255 if torch.uint8 in self.takes else 0.0  # a resized image may exceed 1 by a rounding
            if not -over <= low <= high <= 1 + over:
                given = f"{name} got images with values from {low:g} to {high:g}"
                raise MetaplError(f"{given}; expected 0 to 1: normalise after the views")
        return self.see(images, seed, step, examples)

    @abstractmethod
    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        """The view of images that passed."""

    def require(self, holds: bool, field: str, expected: str) -> None:
        """Refuse a field."""
        if not holds:
            raise MetaplError(f"{type(self).__name__}({field}={getattr(self, field)!r}): expected {expected}.")


def below(u: Tensor, bound: Tensor | int) -> Tensor:
    """Uniform [0, 1) in float64 to uniform {0, …, bound − 1}: 53 bits keep the product below any bound in use."""
    return (u * bound).long()
