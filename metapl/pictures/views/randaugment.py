"""The strong view of the paper's image protocols: RandAugment and Cutout.

The settings are those of the authors' code where the paper does not say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metapl.data import draws
from metapl.errors import needed_for
from metapl.execution.batch import to_device
from metapl.pictures.views import base
from metapl.pictures.views.base import NotNegative, PictureView, Positive, Probability, below
from metapl.runs.fields import AtLeastOne, AtLeastZero

_COLORS = (
    "AutoContrast",
    "Brightness",
    "Color",
    "Contrast",
    "Equalize",
    "Invert",
    "Sharpness",
    "Posterize",
)
_PLACES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")

CIFAR_OPERATIONS = (*_COLORS, "Sample Pairing", "Solarize", *_PLACES)
"""The paper's fifteen operations for CIFAR-10 and ImageNet (Table 5)."""

SVHN_OPERATIONS = tuple(
    name for name in CIFAR_OPERATIONS if name not in ("Sample Pairing", "Rotate", "TranslateX")
)
"""The paper's twelve operations for SVHN (Table 5).

None of them moves a digit sideways, turns it or mixes it.
"""


@dataclass(frozen=True)
class RandAugment(PictureView):
    """Change each image by operations drawn from a list, then grey out a square.

    x ↦ cutout(o_n(… o_1(x))), where o_i is uniform on ``operations``, with replacement, and takes
    place with a probability p that is drawn once per image, uniformly on ``probability``.

    With the level ℓ = magnitude / scale, which may exceed 1:

    ======================================  =======================================================
    AutoContrast, Equalize, Invert          no parameter
    Brightness, Color, Contrast, Sharpness  factor 0.1 + 1.8ℓ; 1 changes nothing, 0 takes all away
    Posterize                               ⌊4ℓ⌋ bits are kept, 1 to 8: the smaller, the stronger
    Solarize                                values from (⌊256ℓ⌋ mod 256) / 255 upwards are inverted
    Sample Pairing                          0.4ℓ, ≤ 0.4, of another image of the batch is mixed in
    Rotate                                  ±30ℓ degrees about the center
    ShearX, ShearY                          ±0.3ℓ pixels per pixel, about the upper left corner
    TranslateX, TranslateY                  ±translate · ℓ of the width or height
    ======================================  =======================================================

    The signs are drawn at random. Images are rounded to 8-bit levels, on which each operation is
    Pillow's to the bit; geometry goes to the nearest pixel, and what no pixel comes to is 128 of
    255. The defaults are those of the authors' code for CIFAR-10: M = 16 on a scale of 10, hence ℓ
    = 1.6. Its ⌊256ℓ⌋ overflows 8 bits there, which is what the remainder stands for. Sample Pairing
    is the paper's but not in that code; its range is AutoAugment's.

    Args:
        n: number of operations, N of the paper, 1 or more.
        magnitude: M, 0 or more.
        scale: the M at which ℓ = 1: 10 in the authors' code, 30 in others.
        operations: names from ``CIFAR_OPERATIONS``.
        probability: smallest and largest p; (1, 1) has every drawn operation take place, as
            RandAugment's paper does.
        translate: share of the side that ℓ = 1 moves by: an eighth for CIFAR-10, 100/224 for
            ImageNet.
        cutout: side of the square in pixels, 0 for none; its center is uniform on the image.

    Images have 1 or 3 channels of values in [0, 1] or bytes; on CUDA, others are cut off instead of
    refused. For Sample Pairing, the other image depends on which examples the batch holds.

    Cost: each image is changed by its own operations alone; one transfer to the device and no
    synchronisation, with ``examples`` on the CPU. Source: the paper's section 3.2 and Table 5.

    >>> view = RandAugment(n=2, magnitude=16, operations=SVHN_OPERATIONS)
    >>> view(torch.rand(2, 3, 32, 32), seed=0, step=5, examples=torch.tensor([3, 4])).shape
    torch.Size([2, 3, 32, 32])
    """

    takes = base.FLOATING_OR_BYTES
    is_colored = True
    n: AtLeastOne = 2
    magnitude: NotNegative = 16
    scale: Positive = 10
    operations: tuple[str, ...] = CIFAR_OPERATIONS
    probability: tuple[Probability, Probability] = (0.2, 0.8)
    translate: NotNegative = 1 / 8
    cutout: AtLeastZero = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        known = bool(self.operations) and {*self.operations} <= {*CIFAR_OPERATIONS}
        self.require(known, "operations", f"one or more of {', '.join(CIFAR_OPERATIONS)}")

    def rows_needed(self, rows: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        """Return the rows, and behind them those that Sample Pairing mixes into one of them."""
        if _PAIRED not in self.operations:
            return rows
        examples = examples.cpu()
        pairing = self.operations.index(_PAIRED)
        u = self._draws(seed, step, examples[rows])
        p = self._probability(u)
        is_needed = torch.zeros(len(examples), dtype=torch.bool)
        for u_choice, u_place, _, u_other in u[:, 1:].T.split(4):
            is_paired = (below(u_choice, len(self.operations)) == pairing) & (u_place < p)
            others = _others(examples, examples[rows][is_paired], u_other[is_paired])
            is_needed[others] = True
        is_needed[rows] = False
        return torch.cat([rows, is_needed.nonzero()[:, 0]])

    def _draws(self, seed: int, step: int, examples: Tensor) -> Tensor:
        """Return the draws of each image: of its probability, and four of each operation."""
        return draws.uniform(
            seed, step, examples, 1 + 4 * self.n, stream=base.OPERATIONS, dtype=torch.float64
        )

    def _probability(self, u: Tensor) -> Tensor:
        low, high = self.probability
        return low + (high - low) * u[:, 0]

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        return self.see_in(None, images, seed, step, examples)

    def see_in(
        self, batch: Tensor | None, images: Tensor, seed: int, step: int, examples: Tensor
    ) -> Tensor:
        is_float, device, level = (
            images.is_floating_point(),
            images.device,
            self.magnitude / self.scale,
        )
        levels = (
            (255 * images.float()).round().clamp(0, 255).to(torch.uint8) if is_float else images
        )
        # The plan is made on the CPU, where the host reads how many images each operation gets. It
        # has rows (8n + 3, B): per drawn operation, with the images in the order of their groups,
        # where each stands in the order before, the image to pair it with, and six numbers of an
        # affine map; then where each stands in the last order, and its square's center. The images
        # of one group are changed at once: all moves are one.
        examples, (height, width) = examples.cpu(), images.shape[2:]
        groups = list(
            dict.fromkeys(
                [_AS_IT_IS, *(_MOVED if name in _MOVES else name for name in self.operations)]
            )
        )
        group_of = torch.tensor(
            [groups.index(_MOVED if name in _MOVES else name) for name in self.operations]
        )
        u = self._draws(seed, step, examples)
        p_B = self._probability(u)
        signed, size = (level, -level), (self.translate, height, width)
        stay: Affine = (1, 0, 0, 0, 1, 0)
        moves = (
            [_MOVES[op](way, *size) if op in _MOVES else stay for way in signed]
            for op in self.operations
        )
        maps = torch.tensor([list(map(fixed_point, both)) for both in moves])
        counts, plan, place_B = [], [], torch.arange(len(examples))
        for u_choice_B, u_place_B, u_sign_B, u_other_B in u[:, 1:].T.split(4):
            choice_B = below(u_choice_B, len(self.operations))
            # Group 0 is left as it is.
            group_B = group_of[choice_B] * (u_place_B < p_B)
            order_B = group_B.argsort(stable=True)
            matrices_B6 = maps[choice_B, (u_sign_B < 0.5).long()]
            if batch is None:
                others_B = _others(examples, examples, u_other_B)
            else:
                others_B = _among(examples, batch[_others(batch, examples, u_other_B)])
            plan += [place_B[order_B], others_B[order_B], *matrices_B6[order_B].T]
            counts.append(torch.bincount(group_B, minlength=len(groups)).tolist())
            place_B = order_B.argsort()
        u_B2 = draws.uniform(seed, step, examples, 2, stream=base.CUTOUT, dtype=torch.float64)
        rows = to_device(
            torch.stack([*plan, place_B, *below(u_B2, torch.tensor([height, width])).T]), device
        )

        changed = levels
        for count, part in zip(counts, rows[:-3].split(8), strict=True):
            parts = []
            for group, x, row in zip(
                groups, changed[part[0]].split(count), part.split(count, dim=1), strict=True
            ):
                if group == _AS_IT_IS or not len(x):
                    parts.append(x)
                elif group == _MOVED:
                    parts.append(affine(x, row[2:].T))
                elif group == _PAIRED:
                    parts.append(blend(x, levels[row[1]], min(0.4 * level, 0.4)))
                else:
                    parts.append(_RECOLORS[group](x, level))
            changed = torch.cat(parts)
        changed = changed[rows[-3]]
        if self.cutout > 0:
            changed = base.cutout(changed, rows[-2:].T - self.cutout // 2, self.cutout, base.GREY)
        if not is_float:
            return changed
        wide = torch.promote_types(images.dtype, torch.float32)
        # CUDA divides by a number of the host's as it multiplies by the rounded reciprocal; the CPU
        # does not.
        return (changed.to(wide) / torch.full((), 255.0, dtype=wide, device=device)).to(
            images.dtype
        )


def _others(batch: Tensor, examples: Tensor, u: Tensor) -> Tensor:
    """Return the rows of a batch to pair examples with.

    They are uniform on the rest of the batch, blind to its order. In a batch of one, the example is
    paired with itself.
    """
    in_order = batch.argsort(stable=True)
    if batch is examples:
        rank = in_order.argsort()
    else:
        rank = torch.searchsorted(batch[in_order], examples)
    size = max(len(batch), 1)
    return in_order[(rank + 1 + below(u, max(size - 1, 1))) % size]


def _among(examples: Tensor, wanted: Tensor) -> Tensor:
    """Return where examples stand, and 0 for one that is not there, which nothing is mixed with."""
    in_order = examples.argsort(stable=True)
    place = torch.searchsorted(examples[in_order], wanted).clamp(max=len(examples) - 1)
    found = in_order[place]
    return torch.where(examples[found] == wanted, found, 0)


_AS_IT_IS, _MOVED, _PAIRED = "as it is", "moved", "Sample Pairing"

_RECOLORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "AutoContrast": lambda levels, level: autocontrast(levels),
    "Brightness": lambda levels, level: blend(torch.zeros_like(levels), levels, 0.1 + 1.8 * level),
    "Color": lambda levels, level: color(levels, 0.1 + 1.8 * level),
    "Contrast": lambda levels, level: contrast(levels, 0.1 + 1.8 * level),
    "Equalize": lambda levels, level: equalize(levels),
    "Invert": lambda levels, level: 255 - levels,
    "Sharpness": lambda levels, level: sharpness(levels, 0.1 + 1.8 * level),
    "Posterize": lambda levels, level: levels & (256 - (1 << (8 - min(max(int(4 * level), 1), 8)))),
    "Solarize": lambda levels, level: torch.where(
        levels < int(256 * level) % 256, levels, 255 - levels
    ),
}

# Moves take the signed level, the share to translate by, height and width. Rows shear to the left,
# columns up.
_MOVES: dict[str, Callable[[float, float, int, int], Affine]] = {
    "Rotate": lambda level, share, height, width: rotation(30 * level, height, width),
    "ShearX": lambda level, share, height, width: (1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda level, share, height, width: (1, 0, 0, 0.3 * level, 1, 0),
    "TranslateX": lambda level, share, height, width: (1, 0, -share * level * width, 0, 1, 0),
    "TranslateY": lambda level, share, height, width: (1, 0, 0, 0, 1, -share * level * height),
}


# --------------------------------------------------------------------- the operations, as in Pillow

# They work on batches of 8-bit levels (B, C, H, W), C = 1 or 3. All arithmetic is on integers or is
# single float operations that IEEE 754 rounds in one way only, so that a picture's result is the
# same on every device and in every batch.


def autocontrast(levels: Tensor) -> Tensor:
    """Stretch each channel of each picture to 0 … 255.

    A channel of one level stays. ``ImageOps.autocontrast``.
    """
    low = levels.amin((2, 3), keepdim=True).double()
    high = levels.amax((2, 3), keepdim=True).double()
    flat = high <= low
    # A number over a tensor would be the number times a rounded reciprocal.
    scale = torch.full_like(low, 255.0) / torch.where(flat, 1.0, high - low)
    stretched = levels.double().mul_(scale).add_(-low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(flat, levels, stretched)


def equalize(levels: Tensor) -> Tensor:
    """Flatten the histogram of each channel of each picture. ``ImageOps.equalize``."""
    # Nothing else here needs this import, which takes two seconds.
    with needed_for("metapl.pictures"):
        from torchvision.transforms.v2 import functional

    return functional.equalize_image(levels)  # type: ignore[no-any-return]


def color(levels: Tensor, factor: float) -> Tensor:
    """Move each picture away from its grey one by ``factor``.

    A picture of one channel stays. ``ImageEnhance.Color``.
    """
    return (
        levels if levels.shape[1] == 1 else blend(_luma(levels).expand_as(levels), levels, factor)
    )


def contrast(levels: Tensor, factor: float) -> Tensor:
    """Move each picture away from its mean grey by ``factor``. ``ImageEnhance.Contrast``.

    The authors' code takes its pixel count / 256 for the mean: a slip, which is not followed.
    """
    luma = _luma(levels)
    pixels = luma[0].numel()
    mean = (2 * luma.sum((1, 2, 3), keepdim=True, dtype=torch.int64) + pixels) // (2 * pixels)
    return blend(mean.to(torch.uint8).expand_as(levels), levels, factor)


def sharpness(levels: Tensor, factor: float) -> Tensor:
    """Move each picture away from its smoothed one by ``factor``.

    The outermost pixels stay. ``ImageEnhance.Sharpness``.
    """
    if min(levels.shape[2:]) < 3:
        return levels
    x = levels.short()
    rows = (x[:, :, :-2] + x[:, :, 1:-1]).add_(x[:, :, 2:])
    # The kernel is 1 everywhere and 5 in the middle.
    total = (
        (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(x[:, :, 1:-1, 1:-1], alpha=4)
    )
    smooth = levels.clone()
    # 13 is odd, so that no value is so close to halfway between two levels that a rounding could
    # decide.
    smooth[:, :, 1:-1, 1:-1] = total.float().mul_(1 / 13).add_(0.5).to(torch.uint8)
    return blend(smooth, levels, factor)


def blend(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """Return start + weight · (end − start), cut to 0 … 255 and truncated.

    Weight > 1 goes beyond ``end``. ``Image.blend``.
    """
    # This goes in place and step by step, each rounded as Pillow does it.
    return end.float().sub_(start).mul_(weight).add_(start).clamp_(0, 255).to(torch.uint8)


def _luma(levels: Tensor) -> Tensor:
    """Return the luma (B, 1, H, W), rounded.

    It is 0.299 R + 0.587 G + 0.114 B to 16 bits after the point. ``Image.convert("L")``.
    """
    if levels.shape[1] == 1:
        return levels
    red, green, blue = levels.int().split(1, dim=1)
    total = red.mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(1 << 15)
    return total.bitwise_right_shift_(16).to(torch.uint8)  # type: ignore[no-any-return]


# (a, b, c, d, e, f): the pixel at (x, y) comes from (ax + by + c, dx + ey + f), in pixels from the
# upper left corner.
Affine = tuple[float, float, float, float, float, float]


def rotation(degrees: float, height: int, width: int) -> Affine:
    """Return the map that turns a picture counterclockwise about its center."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (
        cos,
        -sin,
        (width - cos * width + sin * height) / 2,
        sin,
        cos,
        (height - sin * width - cos * height) / 2,
    )


def fixed_point(matrix: Affine) -> list[int]:
    """Return an affine map of pixel indices in units of 2⁻¹⁶ pixels, for :func:`affine`.

    Pixels are taken at their centers.
    """
    a, b, c, d, e, f = matrix
    return [math.floor(v * 65536 + 0.5) for v in (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2)]


def affine(levels: Tensor, matrices_B6: Tensor) -> Tensor:
    """Move each picture by its own map to the nearest pixel, with grey where none is.

    A map is a row of int64 from :func:`fixed_point`. ``Image.transform(AFFINE, NEAREST)``.
    """
    a, b, c, d, e, f = matrices_B6[:, :, None, None].unbind(1)
    y = torch.arange(levels.shape[2], device=levels.device)[:, None]
    x = torch.arange(levels.shape[3], device=levels.device)
    return base.gather(levels, (d * x + (e * y + f)) >> 16, (a * x + (b * y + c)) >> 16, base.GREY)
