"""Two moons: points on two half circles that reach into each other, of which a few have labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from metapl.data.draws import fold_in

Placement = Literal["random", "spread"]

_POINTS, _LABELS = 0x300E, 0x300F
"""Keep what is drawn of one seed apart."""


@dataclass(frozen=True, eq=False)
class Moons:
    """The points of one seed.

    Args:
        points: float32 (n, 2).
        classes: int64 (n,), 0 for the upper moon, 1 for the lower one.
        labeled: int64, the positions of the labeled points.
    """

    points: Tensor
    classes: Tensor
    labeled: Tensor

    @property
    def unlabeled(self) -> Tensor:
        """The positions of the other points."""
        hidden = torch.ones(len(self.points), dtype=torch.bool)
        hidden[self.labeled] = False
        return hidden.nonzero()[:, 0]


def two_moons(seed: int, *, points: int, noise: float, labels_per_class: int, placement: Placement) -> Moons:
    """Draw the points of a seed, half of them on each moon.

    Args:
        seed: any integer.
        points: number of points, even.
        noise: standard deviation of the Gaussian noise on each coordinate.
        labels_per_class: labeled points on each moon.
        placement: ``"random"``: any points; ``"spread"``: those that are nearest to the centers of as many equal arcs
            of their moon.

    >>> moons = two_moons(0, points=2000, noise=0.1, labels_per_class=3, placement="random")
    >>> moons.points.shape, moons.classes[moons.labeled].tolist(), len(moons.unlabeled)
    (torch.Size([2000, 2]), [0, 0, 0, 1, 1, 1], 1994)
    """
    from sklearn.datasets import make_moons

    random_state = np.random.RandomState(fold_in(seed, _POINTS) % 2**32)
    x, y = make_moons(points, noise=noise, random_state=random_state)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    generator = torch.Generator().manual_seed(fold_in(seed, _LABELS))
    labeled = [_labeled(x, (y == c).nonzero()[:, 0], c, labels_per_class, placement, generator) for c in (0, 1)]
    return Moons(x, y, torch.cat(labeled))


def _labeled(
    x: Tensor, members: Tensor, moon: int, count: int, placement: Placement, generator: torch.Generator
) -> Tensor:
    """The positions of the labeled points of one moon."""
    if placement == "random":
        return members[torch.randperm(len(members), generator=generator)[:count]]
    angles = torch.pi * (torch.arange(count) + 0.5) / count
    upper = torch.stack([angles.cos(), angles.sin()], -1)
    # As scikit-learn draws them: the lower moon is the upper one turned by half a circle, and moved.
    centers = upper if moon == 0 else torch.tensor([1.0, 0.5]) - upper
    return members[torch.cdist(centers, x[members]).argmin(1)]
