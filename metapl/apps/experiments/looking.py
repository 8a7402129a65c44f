"""What a few pictures show of a data set, for a recipe that fits itself to it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metapl.apps.pictures.reader import LUMA, UnreadableImage, read_image
from metapl.errors import MetaplError

LOOKED_AT = 256
"""How many pictures are read at most: of the labeled ones, and again of the unlabeled ones."""

SIDE = 32
"""Pixels that a picture is brought to for a look at its colors."""

MIDDLE = slice(SIDE // 4, -(SIDE // 4))
"""Rows and columns where the object of most pictures is: its colors are compared, and not the background's."""

ALIKE = 8
"""Greatest difference between the channels of a pixel, in levels of 256, in a picture that counts as grey."""

SMALLEST_STD = 0.05
"""Standard deviation in [0, 1] that blank pictures are given."""

SHUFFLES = 199
"""Shuffles of the labels that colors are compared with."""

CHANCES, DOUBTS = 2, 20
"""Of ``SHUFFLES`` and the labels as they are, the most that find the classes as well where color tells them apart, and
where it may: by chance it does so in one set of a hundred, and may in one of ten. Colors that are exchanged for nothing
cost the only thing that tells such classes apart, and colors that are kept for nothing a kind of augmentation."""


AROUND = 9
"""Pixels, of ``SIDE``, of the square that a pixel is compared with."""

BOTH = 0.2
"""Share of pictures, at least, with marks of the rarer kind where both light and dark marks are usual."""


@dataclass(frozen=True)
class Colors:
    """Whether the mean color of the middle, or its mean level of grey, tells the labeled pictures' classes apart.

    Args:
        right: share of pictures whose class is that of the nearest mean color, each picture left out of the means,
            averaged over classes.
        chance: the same share expected of guessing evenly among the classes.
        tell: whether ``right`` is more than chance explains.
        may_tell: whether it is rather more than chance explains, and the pictures are too few to say.
    """

    right: float
    chance: float
    tell: bool
    may_tell: bool = False


@dataclass(frozen=True)
class Look:
    """A data set as a few of its pictures show it.

    Args:
        side: median of the shorter sides, in pixels.
        grey: none of the pictures has colors.
        mean, std: of each channel (one where ``grey``), in [0, 1].
        level: mean and standard deviation of the pictures without their colors.
        colors: whether color alone tells the classes apart.
        light: share of the pictures whose marks are lighter than what is around them, not darker.
        shares: of the classes among all labeled pictures, as if each had one more: no share is 0.
        square: all of the pictures are as high as wide.
    """

    side: int
    grey: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    level: tuple[float, float]
    colors: Colors
    light: float
    shares: tuple[float, ...]
    square: bool = True

    @property
    def exchangeable(self) -> bool:
        """Whether colors, or light and dark in grey pictures, may be exchanged without changing what is shown.

        Where all marks of grey pictures are light, as in an X-ray, a dark one may mean something else.
        """
        return not self.colors.tell and (not self.grey or BOTH <= self.light <= 1 - BOTH)


def look(labeled: Sequence[Path], labels: Tensor, unlabeled: Sequence[Path]) -> Look:
    """Look at a data set.

    Args:
        labeled: files.
        labels: int64 (len(labeled),), their classes.
        unlabeled: files.

    Returns: the same for the same files in the same order.

    Cost: decodes at most ``LOOKED_AT`` pictures of each kind, spread evenly over the files.

    Raises:
        MetaplError: not one of the labeled pictures can be read.
    """
    sides, pictures, classes, square = [], [], [], True
    chosen = _spread(len(labeled))
    examples = [(labeled[i], int(labels[i])) for i in chosen] + [(unlabeled[i], -1) for i in _spread(len(unlabeled))]
    for path, label in examples:
        try:
            picture = read_image(path)
        except UnreadableImage:
            continue  # is listed, with the reason, when the folders are checked
        sides.append(min(picture.shape[1:]))
        square &= picture.shape[1] == picture.shape[2]
        pictures.append(torch.nn.functional.interpolate(picture[None].float(), (SIDE, SIDE), mode="area")[0])
        classes.append(label)
    if not any(label >= 0 for label in classes):
        raise MetaplError(f"none of the {len(chosen)} labeled pictures that were looked at can be read.")
    levels_N3HW = torch.stack(pictures)
    grey = bool((levels_N3HW.amax(1) - levels_N3HW.amin(1)).max() <= ALIKE)
    shown = levels_N3HW[:, :1] if grey else levels_N3HW
    unit = shown / 255
    level_NHW = (levels_N3HW / 255 * torch.tensor(LUMA)[:, None, None]).sum(1)
    of_labeled = torch.tensor(classes) >= 0
    return Look(
        side=int(statistics.median(sides)),
        grey=grey,
        mean=tuple(round(value, 3) for value in unit.mean((0, 2, 3)).tolist()),
        std=tuple(_spread_of(value) for value in unit.std((0, 2, 3)).tolist()),
        level=(round(float(level_NHW.mean()), 3), _spread_of(float(level_NHW.std()))),
        colors=colors_tell(unit[of_labeled][..., MIDDLE, MIDDLE].mean((2, 3)), torch.tensor(classes)[of_labeled]),
        light=float(_lighter(level_NHW).double().mean()),
        shares=_shares(labels),
        square=square,
    )


def _lighter(level_NHW: Tensor) -> Tensor:
    """Whether the marks of each picture are lighter than what is around them: the sign of the skewness, bool (N,)."""
    margin = AROUND // 2
    padded = torch.nn.functional.pad(level_NHW[:, None], (margin,) * 4, mode="reflect")
    marks_NHW = level_NHW - torch.nn.functional.avg_pool2d(padded, AROUND, stride=1)[:, 0]
    return marks_NHW.pow(3).mean((1, 2)) > 0


def _shares(labels: Tensor) -> tuple[float, ...]:
    counts = (torch.bincount(labels) + 1).tolist()
    return tuple(count / sum(counts) for count in counts)


def colors_tell(colors_NC: Tensor, labels_N: Tensor) -> Colors:
    """Whether the nearest class mean, with each example left out of its own, finds the classes.

    The share found, averaged over classes, is compared with that of ``SHUFFLES`` shuffles of the labels: whatever the
    sizes of the classes, colors that have nothing to do with them tell them apart in one of a hundred sets.

    Args:
        colors_NC: (N, C), the mean color of each picture's middle.
        labels_N: int64 (N,).

    Returns: with ``tell`` False where no class has two examples, since then nothing can be left out.

    >>> reds = torch.tensor([[0.9], [0.8], [0.85], [0.1], [0.2], [0.15]]).repeat(3, 1)
    >>> colors_tell(reds, torch.tensor([0, 0, 0, 1, 1, 1]).repeat(3)).tell
    True
    >>> colors_tell(reds, torch.tensor([0, 1, 0, 1, 0, 1]).repeat(3)).tell
    False
    """
    classes, labels = labels_N.unique(return_inverse=True)
    chance = 1 / len(classes)
    if len(classes) < 2 or int(labels.bincount().max()) < 2:
        return Colors(chance, chance, False)
    scaled = (colors_NC - colors_NC.mean(0)) / colors_NC.std(0).clamp_min(1e-6)
    generator = torch.Generator().manual_seed(0)
    shuffled = (labels[torch.randperm(len(labels), generator=generator)] for _ in range(SHUFFLES))
    right = _found(scaled, labels)
    as_well = 1 + sum(_found(scaled, order) >= right for order in shuffled)
    return Colors(right, chance, tell=as_well <= CHANCES, may_tell=CHANCES < as_well <= DOUBTS)


def _found(colors_NC: Tensor, labels: Tensor) -> float:
    """The share of each class that is nearest to its own mean, of classes that have two examples, averaged."""
    counts_K = labels.bincount()
    member_NK = torch.nn.functional.one_hot(labels, len(counts_K)).to(colors_NC.dtype)
    sums_KC = member_NK.T @ colors_NC
    # Each picture is taken out of the mean of its own class.
    left_NKC = sums_KC[None] - member_NK[:, :, None] * colors_NC[:, None]
    means_NKC = left_NKC / (counts_K[None, :, None] - member_NK[:, :, None]).clamp_min(1)
    nearest_N = (colors_NC[:, None] - means_NKC).square().sum(-1).argmin(1)
    right_K = labels.bincount(weights=(nearest_N == labels).double(), minlength=len(counts_K)) / counts_K
    return float(right_K[counts_K >= 2].mean())


def _spread_of(std: float) -> float:
    """A standard deviation that can be divided by: blank pictures have 0."""
    return round(max(std, SMALLEST_STD), 3)


def _spread(count: int) -> list[int]:
    """At most ``LOOKED_AT`` of ``count`` positions, evenly."""
    step = max(1, -(-count // LOOKED_AT))
    return list(range(0, count, step))
