"""The strong view of the paper's image protocols: RandAugment and Cutout.

The settings are those of the authors' code where the paper does not say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metapl.data import draws
from metapl.errors import needed_for
from metapl.execution.batch import to_device
from metapl.pictures.views import base
from metapl.pictures.views.base import NotNegative, PictureView, Positive, Probability, below
from metapl.runs.fields import AtLeastOne, AtLeastZero

SAMPLE_PAIRING = "Sample Pairing"
SOLARIZE = "Solarize"

COLORS = (
    "AutoContrast",
    "Brightness",
    "Color",
    "Contrast",
    "Equalize",
    "Invert",
    "Sharpness",
    "Posterize",
)
MOVES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")

CIFAR_OPERATIONS = (*COLORS, SAMPLE_PAIRING, SOLARIZE, *MOVES)
"""The paper's fifteen operations for CIFAR-10 and ImageNet (Table 5)."""

SVHN_OPERATIONS = tuple(
    name for name in CIFAR_OPERATIONS if name not in (SAMPLE_PAIRING, "Rotate", "TranslateX")
)
"""The paper's twelve operations for SVHN (Table 5).

None of them moves a digit sideways, turns it or mixes it.
"""

# The kinds of what can happen to an image in a turn, beside the names of the operations: nothing,
# or any of the moves, which one call makes of all images that move.
UNCHANGED = "unchanged"
MOVED = "moved"

# An affine map (a, b, c, d, e, f): the pixel at (x, y) comes from (ax + by + c, dx + ey + f), in
# pixels from the upper left corner.
AffineMap = tuple[float, float, float, float, float, float]
STAY: AffineMap = (1, 0, 0, 0, 1, 0)


@dataclass(frozen=True)
class Turn:
    """What happens to each image of a batch in one of the n turns of the view.

    The images stand in the order of their kinds, so that those of one kind are changed by one call.

    Args:
        counts: how many images there are of each kind, on the host.
        places_B: int64, where each image stood in the turn before.
        partners_B: int64, the row of the batch that Sample Pairing mixes into each.
        maps_B6: int64, the affine map by which each is moved, in the form of :func:`fixed_point`.
    """

    counts: list[int]
    places_B: Tensor
    partners_B: Tensor
    maps_B6: Tensor


@dataclass(frozen=True)
class Plan:
    """What happens to each image of a batch.

    Args:
        turns: one operation of each image after the other.
        places_B: int64, where each image stands in the last turn.
        centers_B2: int64, row and column of the center of the square that is greyed out.
    """

    turns: list[Turn]
    places_B: Tensor
    centers_B2: Tensor

    def on(self, device: torch.device) -> Plan:
        """Return the plan with its tensors on a device, to which they go in one transfer."""
        rows: list[Tensor] = []
        for turn in self.turns:
            rows.extend([turn.places_B, turn.partners_B, *turn.maps_B6.T])
        rows.extend([self.places_B, *self.centers_B2.T])
        *rows_of_turns, last_rows = to_device(torch.stack(rows), device).split(
            [8] * len(self.turns) + [3]
        )
        turns: list[Turn] = []
        for turn, part in zip(self.turns, rows_of_turns, strict=True):
            moved = Turn(
                counts=turn.counts, places_B=part[0], partners_B=part[1], maps_B6=part[2:].T
            )
            turns.append(moved)
        return Plan(turns=turns, places_B=last_rows[0], centers_B2=last_rows[1:].T)


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
        are_operations = bool(self.operations) and {*self.operations} <= {*CIFAR_OPERATIONS}
        self.require(
            "operations", f"one or more of {', '.join(CIFAR_OPERATIONS)}", holds=are_operations
        )

    def rows_needed(self, rows: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        """Return the rows, and behind them those that Sample Pairing mixes into one of them."""
        if SAMPLE_PAIRING not in self.operations:
            return rows
        examples = examples.cpu()
        viewed = examples[rows]
        pairing = self.operations.index(SAMPLE_PAIRING)
        u = self._draws(seed, step, viewed)
        probability = self._probability(u)
        is_needed = torch.zeros(len(examples), dtype=torch.bool)
        for u_choice, u_place, _, u_partner in u[:, 1:].T.split(4):
            choice = below(u_choice, len(self.operations))
            is_paired = (choice == pairing) & (u_place < probability)
            partners = _partners(examples, viewed[is_paired], u_partner[is_paired])
            is_needed[partners] = True
        is_needed[rows] = False
        return torch.cat([rows, is_needed.nonzero()[:, 0]])

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        return self.see_in(None, images, seed, step, examples)

    def see_in(
        self, batch: Tensor | None, images: Tensor, seed: int, step: int, examples: Tensor
    ) -> Tensor:
        height, width = images.shape[2:]
        # The plan is made on the CPU, where the host reads how many images each kind gets.
        on_host = self.plan(batch, seed, step, examples.cpu(), height=height, width=width)
        plan = on_host.on(images.device)
        levels = to_levels(images)
        changed = levels
        for turn in plan.turns:
            changed = self._take(turn, changed, levels)
        changed = changed[plan.places_B]
        if self.cutout > 0:
            corners_B2 = plan.centers_B2 - self.cutout // 2
            changed = base.cutout(changed, corners_B2, self.cutout, base.GREY)
        return from_levels(changed, images.dtype)

    def plan(
        self,
        batch: Tensor | None,
        seed: int,
        step: int,
        examples: Tensor,
        *,
        height: int,
        width: int,
    ) -> Plan:
        """Draw what happens to images of one size.

        Args:
            batch: int64, the examples of the whole batch; None: these are all.
            seed: of the draws.
            step: of the training.
            examples: int64 (B,), on the CPU.
            height, width: of the images, in pixels.
        """
        kinds = self._kinds()
        kind_of_operation = torch.tensor([kinds.index(_kind_of(name)) for name in self.operations])
        maps = self._maps(height, width)
        u = self._draws(seed, step, examples)
        probability_B = self._probability(u)
        turns: list[Turn] = []
        places_B = torch.arange(len(examples))
        for u_choice_B, u_place_B, u_sign_B, u_partner_B in u[:, 1:].T.split(4):
            choice_B = below(u_choice_B, len(self.operations))
            takes_place_B = u_place_B < probability_B
            # Kind 0 leaves an image unchanged.
            kind_B = kind_of_operation[choice_B] * takes_place_B
            order_B = kind_B.argsort(stable=True)
            is_negative_B = u_sign_B < 0.5
            maps_B6 = maps[choice_B, is_negative_B.long()]
            if batch is None:
                partners_B = _partners(examples, examples, u_partner_B)
            else:
                partners_in_batch = _partners(batch, examples, u_partner_B)
                partners_B = _places_of(batch[partners_in_batch], examples)
            turn = Turn(
                counts=torch.bincount(kind_B, minlength=len(kinds)).tolist(),
                places_B=places_B[order_B],
                partners_B=partners_B[order_B],
                maps_B6=maps_B6[order_B],
            )
            turns.append(turn)
            places_B = order_B.argsort()
        u_B2 = draws.uniform(seed, step, examples, 2, stream=base.CUTOUT, dtype=torch.float64)
        centers_B2 = below(u_B2, torch.tensor([height, width]))
        return Plan(turns=turns, places_B=places_B, centers_B2=centers_B2)

    def _take(self, turn: Turn, changed: Tensor, levels: Tensor) -> Tensor:
        """Return the images after a turn, in its order.

        Args:
            turn: which operation each image gets.
            changed: uint8, the images after the turn before, in its order.
            levels: uint8, the images of the batch as they came, which Sample Pairing mixes in.
        """
        level = self._level()
        parts: list[Tensor] = []
        for kind, images, partners, maps in zip(
            self._kinds(),
            changed[turn.places_B].split(turn.counts),
            turn.partners_B.split(turn.counts),
            turn.maps_B6.split(turn.counts),
            strict=True,
        ):
            if kind == UNCHANGED or not len(images):
                parts.append(images)
            elif kind == MOVED:
                parts.append(affine(images, maps))
            elif kind == SAMPLE_PAIRING:
                parts.append(blend(images, levels[partners], min(0.4 * level, 0.4)))
            else:
                parts.append(recolored(images, kind, level))
        return torch.cat(parts)

    def _level(self) -> float:
        """Return the level ℓ."""
        return self.magnitude / self.scale

    def _kinds(self) -> list[str]:
        """Return the kinds of what can happen to an image in a turn; the first is nothing."""
        kinds = [UNCHANGED]
        for name in self.operations:
            kind = _kind_of(name)
            if kind not in kinds:
                kinds.append(kind)
        return kinds

    def _maps(self, height: int, width: int) -> Tensor:
        """Return the map of each operation by its level and by minus its level.

        It is int64 (operations, 2, 6), in the form of :func:`fixed_point`. An operation that does
        not move has the map that stays.
        """
        level = self._level()
        maps: list[list[int]] = []
        for name in self.operations:
            for signed_level in (level, -level):
                affine_map = STAY
                if name in MOVES:
                    affine_map = move(name, signed_level, self.translate, height, width)
                maps.append(fixed_point(affine_map))
        return torch.tensor(maps).view(len(self.operations), 2, 6)

    def _draws(self, seed: int, step: int, examples: Tensor) -> Tensor:
        """Return the draws of each image: of its probability, and four of each turn.

        Those of a turn are of the operation, of whether it takes place, of its sign, and of the
        partner of Sample Pairing.
        """
        return draws.uniform(
            seed, step, examples, 1 + 4 * self.n, stream=base.OPERATIONS, dtype=torch.float64
        )

    def _probability(self, u: Tensor) -> Tensor:
        """Return p of each image, from its draws."""
        low, high = self.probability
        return low + (high - low) * u[:, 0]


def _kind_of(name: str) -> str:
    """Return the kind of an operation: its name, or that it moves."""
    return MOVED if name in MOVES else name


def _partners(batch: Tensor, examples: Tensor, u: Tensor) -> Tensor:
    """Return the rows of a batch to pair examples with.

    They are uniform on the rest of the batch, blind to its order. In a batch of one, the example is
    paired with itself.

    Args:
        batch: int64 (B,), the examples of the batch.
        examples: int64 (n,), those that are paired, all of them in the batch.
        u: (n,), uniform draws.
    """
    in_order = batch.argsort(stable=True)
    if batch is examples:
        rank = in_order.argsort()
    else:
        rank = torch.searchsorted(batch[in_order], examples)
    size = max(len(batch), 1)
    return in_order[(rank + 1 + below(u, max(size - 1, 1))) % size]


def _places_of(wanted: Tensor, examples: Tensor) -> Tensor:
    """Return where examples stand, and 0 for one that is not there, which nothing is mixed with."""
    in_order = examples.argsort(stable=True)
    places = torch.searchsorted(examples[in_order], wanted).clamp(max=len(examples) - 1)
    rows = in_order[places]
    return torch.where(examples[rows] == wanted, rows, 0)


# --------------------------------------------------------------------- the operations, as in Pillow

# They work on batches of 8-bit levels (B, C, H, W), C = 1 or 3. All arithmetic is on integers or is
# single float operations that IEEE 754 rounds in one way only, so that a picture's result is the
# same on every device and in every batch.


def to_levels(images: Tensor) -> Tensor:
    """Return the nearest levels of images in [0, 1]; bytes are levels already."""
    if not images.is_floating_point():
        return images
    return (255 * images.float()).round().clamp(0, 255).to(torch.uint8)


def from_levels(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return levels as images in [0, 1] of a floating type, and as they are for bytes."""
    if not dtype.is_floating_point:
        return levels
    wide = torch.promote_types(dtype, torch.float32)
    # CUDA divides by a number of the host's as it multiplies by the rounded reciprocal; the CPU
    # does not. Both divide by a tensor.
    greatest = torch.full((), 255.0, dtype=wide, device=levels.device)
    return (levels.to(wide) / greatest).to(dtype)


def recolored(levels: Tensor, name: str, level: float) -> Tensor:
    """Return pictures after one of the operations that move no pixel, by its name.

    Args:
        levels: the pictures.
        name: one of :data:`COLORS`, or Solarize.
        level: ℓ.
    """
    factor = 0.1 + 1.8 * level
    match name:
        case "AutoContrast":
            return autocontrast(levels)
        case "Brightness":
            return blend(torch.zeros_like(levels), levels, factor)
        case "Color":
            return color(levels, factor)
        case "Contrast":
            return contrast(levels, factor)
        case "Equalize":
            return equalize(levels)
        case "Invert":
            return 255 - levels
        case "Sharpness":
            return sharpness(levels, factor)
        case "Posterize":
            return posterize(levels, bits=min(max(int(4 * level), 1), 8))
        case "Solarize":
            return solarize(levels, threshold=int(256 * level) % 256)
    raise AssertionError(f"RandAugment has refused the operation {name!r}")


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
    if levels.shape[1] == 1:
        return levels
    return blend(_luma(levels).expand_as(levels), levels, factor)


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


def posterize(levels: Tensor, *, bits: int) -> Tensor:
    """Keep the highest bits of each value. ``ImageOps.posterize``."""
    lowest = 1 << (8 - bits)
    return levels & (256 - lowest)


def solarize(levels: Tensor, *, threshold: int) -> Tensor:
    """Invert the values from a threshold upwards. ``ImageOps.solarize``."""
    return torch.where(levels < threshold, levels, 255 - levels)


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


def move(name: str, level: float, translate: float, height: int, width: int) -> AffineMap:
    """Return the map of one of :data:`MOVES`.

    Rows shear to the left, columns up.

    Args:
        name: of the operation.
        level: ℓ, of either sign.
        translate: share of the side that ℓ = 1 moves by.
        height, width: of the pictures, in pixels.
    """
    match name:
        case "Rotate":
            return rotation(30 * level, height, width)
        case "ShearX":
            return (1, 0.3 * level, 0, 0, 1, 0)
        case "ShearY":
            return (1, 0, 0, 0.3 * level, 1, 0)
        case "TranslateX":
            return (1, 0, -translate * level * width, 0, 1, 0)
        case "TranslateY":
            return (1, 0, 0, 0, 1, -translate * level * height)
    raise AssertionError(f"{name!r} moves no pixel")


def rotation(degrees: float, height: int, width: int) -> AffineMap:
    """Return the map that turns a picture counterclockwise about its center."""
    cos = math.cos(math.radians(degrees))
    sin = math.sin(math.radians(degrees))
    return (
        cos,
        -sin,
        (width - cos * width + sin * height) / 2,
        sin,
        cos,
        (height - sin * width - cos * height) / 2,
    )


def fixed_point(affine_map: AffineMap) -> list[int]:
    """Return an affine map of pixel indices in units of 2⁻¹⁶ pixels, for :func:`affine`.

    Pixels are taken at their centers.
    """
    a, b, c, d, e, f = affine_map
    from_centers = (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2)
    return [math.floor(number * 65536 + 0.5) for number in from_centers]


def affine(levels: Tensor, matrices_B6: Tensor) -> Tensor:
    """Move each picture by its own map to the nearest pixel, with grey where none is.

    A map is a row of int64 from :func:`fixed_point`. ``Image.transform(AFFINE, NEAREST)``.
    """
    a, b, c, d, e, f = matrices_B6[:, :, None, None].unbind(1)
    y = torch.arange(levels.shape[2], device=levels.device)[:, None]
    x = torch.arange(levels.shape[3], device=levels.device)
    rows = (d * x + (e * y + f)) >> 16
    columns = (a * x + (b * y + c)) >> 16
    return base.gather(levels, rows, columns, base.GREY)
