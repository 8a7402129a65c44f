"""The strong view of the paper's image protocols: RandAugment and Cutout.

Where the settings of the paper are not known, they are those of the code that its authors published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metapl.apps.pictures.views import base, operations
from metapl.apps.pictures.views.base import PictureView, below, is_range
from metapl.data import draws
from metapl.execution.device import to_device

CIFAR_OPERATIONS = (
    "AutoContrast",
    "Brightness",
    "Color",
    "Contrast",
    "Equalize",
    "Invert",
    "Sharpness",
    "Posterize",
    "Sample Pairing",
    "Solarize",
    "Rotate",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
"""The paper's fifteen operations for CIFAR-10 and ImageNet (Table 5)."""

SVHN_OPERATIONS = tuple(name for name in CIFAR_OPERATIONS if name not in ("Sample Pairing", "Rotate", "TranslateX"))
"""The paper's twelve operations for SVHN (Table 5): none that moves a digit sideways, turns it or mixes it."""


@dataclass(frozen=True)
class RandAugment(PictureView):
    """Change each image by operations drawn from a list, then grey out a square.

    x ↦ cutout(o_n(… o_1(x))), where o_i is uniform on ``operations``, with replacement, and takes place with a
    probability p that is drawn once per image, uniformly on ``probability``.

    With the level ℓ = magnitude / scale, which may exceed 1:

    ==============================================  ==================================================================
    AutoContrast, Equalize, Invert                  no parameter
    Brightness, Color, Contrast, Sharpness          factor 0.1 + 1.8ℓ; 1 changes nothing, 0 takes all of it away
    Posterize                                       ⌊4ℓ⌋ bits are kept, 1 to 8: the smaller, the stronger
    Solarize                                        values from (⌊256ℓ⌋ mod 256) / 255 upwards are inverted
    Sample Pairing                                  0.4ℓ, at most 0.4, of another image of the batch is mixed in
    Rotate                                          ±30ℓ degrees about the center
    ShearX, ShearY                                  ±0.3ℓ pixels per pixel, about the upper left corner
    TranslateX, TranslateY                          ±translate · ℓ of the width or height
    ==============================================  ==================================================================

    The signs are drawn at random. Images are rounded to 8-bit levels, on which each operation is Pillow's to the bit;
    geometry goes to the nearest pixel, and what no pixel comes to is 128 of 255. The defaults are those of the authors'
    code for CIFAR-10: M = 16 on a scale of 10, hence ℓ = 1.6. Its ⌊256ℓ⌋ overflows 8 bits there, which is what the
    remainder stands for. Sample Pairing is the paper's but not in that code; its range is AutoAugment's.

    Args:
        n: number of operations, N of the paper, 1 or more.
        magnitude: M, 0 or more.
        scale: the M at which ℓ = 1: 10 in the authors' code, 30 in others.
        operations: names from ``CIFAR_OPERATIONS``.
        probability: smallest and largest p; (1, 1) has every drawn operation take place, as RandAugment's paper does.
        translate: share of the side that ℓ = 1 moves by: an eighth for CIFAR-10, 100/224 for ImageNet.
        cutout: side of the square in pixels, 0 for none; its center is uniform on the image, and what lies outside the
            image is lost.

    Call: ``view(images, seed=, step=, examples=)`` takes images (B, C, H, W), C = 1 or 3, floating point in [0, 1] or
    uint8, and ``examples`` (B,) int64, and returns the same shape, dtype and device. Neither the rest of the batch nor
    its order matters, but for Sample Pairing, where the other image depends on which examples the batch holds. On
    CUDA, values outside [0, 1] are cut off, since looking for them would hold the device up.

    Cost: each image is changed by its own operations alone; one transfer to the device and no synchronisation, with
    ``examples`` on the CPU. From CUDA they are fetched, which is one.

    Raises:
        MetaplError: a field outside its range; on the call, images of another kind, a number of examples other than B,
            or, on the CPU, values outside [0, 1].

    The paper's section 3.2 and Table 5.

    >>> view = RandAugment(n=2, magnitude=16, operations=SVHN_OPERATIONS)
    >>> view(torch.rand(2, 3, 32, 32), seed=0, step=5, examples=torch.tensor([3, 4])).shape
    torch.Size([2, 3, 32, 32])
    """

    takes = base.FLOATING_OR_BYTES
    is_colored = True
    n: int = 2
    magnitude: float = 16
    scale: float = 10
    operations: tuple[str, ...] = CIFAR_OPERATIONS
    probability: tuple[float, float] = (0.2, 0.8)
    translate: float = 1 / 8
    cutout: int = 16

    def __post_init__(self) -> None:
        self.require(self.n >= 1, "n", "1 or more")
        for name in ("magnitude", "translate", "cutout"):
            self.require(getattr(self, name) >= 0, name, "0 or more")
        self.require(self.scale > 0, "scale", "a number above 0")
        known = bool(self.operations) and {*self.operations} <= {*CIFAR_OPERATIONS}
        self.require(known, "operations", f"one or more of {list(CIFAR_OPERATIONS)}")
        chances = is_range(self.probability) and self.probability[1] <= 1
        self.require(chances, "probability", "0 <= smallest <= largest <= 1: (1, 1) for every operation to take place")

    @property
    def level(self) -> float:
        """ℓ."""
        return self.magnitude / self.scale

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        levels = images
        if images.is_floating_point():
            levels = (255 * images.float()).round().clamp(0, 255).to(torch.uint8)
        counts, rows = self._plan(seed, step, examples.cpu(), *images.shape[2:])
        rows = to_device(rows, images.device)
        changed = levels
        for i in range(self.n):
            changed = self._operation(changed, levels, counts[i], rows[8 * i : 8 * i + 8])
        changed = changed[rows[-3]]
        if self.cutout > 0:
            changed = operations.cutout(changed, rows[-2:].T - self.cutout // 2, self.cutout, operations.GREY)
        if not images.is_floating_point():
            return changed
        wide = torch.promote_types(images.dtype, torch.float32)
        # CUDA divides by a number of the host's as it multiplies by the rounded reciprocal; the CPU does not.
        return (changed.to(wide) / torch.full((), 255.0, dtype=wide, device=changed.device)).to(images.dtype)

    def _plan(self, seed: int, step: int, examples: Tensor, height: int, width: int) -> tuple[list[list[int]], Tensor]:
        """All draws, on the CPU, where the host can read how many images each operation gets.

        Returns:
            counts: per drawn operation, the number of images in each of ``_groups``.
            rows: (8n + 3, B). Per drawn operation, with the images in the order of their groups: where each stands in
            the order before, the image to pair it with, and six numbers of an affine map. Then, in the order of the
            batch: where each stands in the last order, and row and column of the center of its square.
        """
        u = draws.uniform(seed, step, examples, 1 + 4 * self.n, stream=base.OPERATIONS, dtype=torch.float64)
        low, high = self.probability
        p_B = low + (high - low) * u[:, 0]
        groups = self._groups
        group_of = torch.tensor([groups.index(_MOVED if name in _MOVES else name) for name in self.operations])
        maps = torch.tensor(
            [
                [
                    operations.fixed_point(_MOVES.get(name, _stay)(level, self.translate, height, width))
                    for level in (self.level, -self.level)
                ]
                for name in self.operations
            ]
        )
        counts, rows, place_B = [], [], torch.arange(len(examples))
        for u_choice_B, u_place_B, u_sign_B, u_other_B in u[:, 1:].T.split(4):
            choice_B = below(u_choice_B, len(self.operations))
            # Group 0 is left as it is.
            group_B = group_of[choice_B] * (u_place_B < p_B)
            order_B = group_B.argsort(stable=True)
            matrices_B6 = maps[choice_B, (u_sign_B < 0.5).long()]
            rows += [place_B[order_B], _others(examples, u_other_B)[order_B], *matrices_B6[order_B].T]
            counts.append(torch.bincount(group_B, minlength=len(groups)).tolist())
            place_B = order_B.argsort()
        u_B2 = draws.uniform(seed, step, examples, 2, stream=base.CUTOUT, dtype=torch.float64)
        return counts, torch.stack([*rows, place_B, *below(u_B2, torch.tensor([height, width])).T])

    @property
    def _groups(self) -> list[str]:
        """What happens to the images of one group at once: all moves are one."""
        return list(dict.fromkeys([_AS_IT_IS, *(_MOVED if name in _MOVES else name for name in self.operations)]))

    def _operation(self, images: Tensor, originals: Tensor, counts: list[int], rows: Tensor) -> Tensor:
        """The images in the order of their groups, each group changed."""
        images = images[rows[0]]
        parts = zip(self._groups, images.split(counts), rows.split(counts, dim=1), strict=True)
        changed = [self._change(name, part, originals, row) for name, part, row in parts if len(part)]
        return torch.cat(changed) if changed else images

    def _change(self, group: str, images: Tensor, originals: Tensor, rows: Tensor) -> Tensor:
        if group == _AS_IT_IS:
            return images
        if group == _MOVED:
            return operations.affine(images, rows[2:].T)
        if group == _PAIRED:
            return operations.blend(images, originals[rows[1]], min(0.4 * self.level, 0.4))
        return _RECOLORS[group](images, self.level)


_AS_IT_IS, _MOVED, _PAIRED = "as it is", "moved", "Sample Pairing"

_RECOLORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "AutoContrast": lambda levels, level: operations.autocontrast(levels),
    "Brightness": lambda levels, level: operations.blend(torch.zeros_like(levels), levels, 0.1 + 1.8 * level),
    "Color": lambda levels, level: operations.color(levels, 0.1 + 1.8 * level),
    "Contrast": lambda levels, level: operations.contrast(levels, 0.1 + 1.8 * level),
    "Equalize": lambda levels, level: operations.equalize(levels),
    "Invert": lambda levels, level: 255 - levels,
    "Sharpness": lambda levels, level: operations.sharpness(levels, 0.1 + 1.8 * level),
    "Posterize": lambda levels, level: levels & (256 - (1 << (8 - min(max(int(4 * level), 1), 8)))),
    "Solarize": lambda levels, level: torch.where(levels < int(256 * level) % 256, levels, 255 - levels),
}

# By signed level, share to translate by, height and width. Rows shear to the left, columns up.
_MOVES: dict[str, Callable[[float, float, int, int], operations.Affine]] = {
    "Rotate": lambda level, share, height, width: operations.rotation(30 * level, height, width),
    "ShearX": lambda level, share, height, width: (1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda level, share, height, width: (1, 0, 0, 0.3 * level, 1, 0),
    "TranslateX": lambda level, share, height, width: (1, 0, -share * level * width, 0, 1, 0),
    "TranslateY": lambda level, share, height, width: (1, 0, 0, 0, 1, -share * level * height),
}


def _stay(level: float, share: float, height: int, width: int) -> operations.Affine:
    return 1, 0, 0, 0, 1, 0


def _others(examples: Tensor, u_B: Tensor) -> Tensor:
    """For each image the place of another, uniform on the rest of the batch and blind to its order; alone, itself."""
    batch = max(len(examples), 1)
    order_B = examples.argsort(stable=True)
    rank_B = order_B.argsort()
    return order_B[(rank_B + 1 + below(u_B, max(batch - 1, 1))) % batch]
