"""What a problem is: its numbers and the function that draws one picture of a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.pictures.drawing import Bytes

# A picture of a class, from (generator, label, size, whether it is for the test set): uint8, (size, size) when grey
# and (size, size, 3) in color. The last argument matters only where pictures are made from given ones, such as
# handwritten digits: those of the test set are made from others.
Draw = Callable[[np.random.Generator, int, int, bool], Bytes]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem: pictures of ``size`` x ``size`` pixels, few of them labeled, and no others for validation.

    ``imbalance`` is how much rarer the last class is than the first among the unlabeled and the test pictures, in a
    geometric sequence. With ``labels_as_found`` the labeled pictures have these shares too, as when a user labels what
    comes; otherwise the user collected ``labels_per_class`` of each. ``foreign`` is the share of unlabeled pictures
    that belong to no class: pictures of other problems of the same half, and noise.
    """

    name: str
    half: Literal["seen", "unseen"]
    draw: Draw
    size: int
    channels: Literal[1, 3]
    classes: tuple[str, ...]
    labels_per_class: int
    unlabeled: int
    test: int
    imbalance: float = 1
    labels_as_found: bool = False
    foreign: float = 0
