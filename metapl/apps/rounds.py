"""``metapl noisy-student``: its data, with the schedules and the noise of its rounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import tyro

from metapl.apps.digits import Digits
from metapl.apps.digits import fitting as fitting_of_digits
from metapl.apps.images import Images, Pictures
from metapl.apps.methods.base import Method
from metapl.apps.methods.noisy_student import NoisyStudent
from metapl.apps.settings import Batch, Fitting, Share
from metapl.networks.architectures import Architecture

# Model noise, for networks that have it. The rate of dropout before the head is that of the
# authors' published code for EfficientNets; the paper names that of B7 and L2 alone. All other
# networks have that of the smallest one: with 0.5 a small network that trains for minutes learns
# less (docs/studies/noisy-student.md has the measurement).
DROPOUTS = {
    "efficientnet_b2": 0.3,
    "efficientnet_b3": 0.3,
    "efficientnet_b4": 0.4,
    "efficientnet_b5": 0.4,
    "efficientnet_b6": 0.5,
    "efficientnet_b6_wide": 0.5,
    "efficientnet_b7": 0.5,
    "efficientnet_l2": 0.5,
}
USUAL_DROPOUT = 0.2

# The paper's probability of dropping the last block.
STOCHASTIC_DEPTH = 0.2

# Unlabeled pictures in a batch for each labeled one: the paper's number for the smallest networks,
# which a training on pictures begins with. Small networks lose by more: in study 7 on the digits,
# and on pictures (docs/studies/noisy-student.md).
RATIO_OF_PICTURES = 1

METHODS: dict[str, Method] = {NoisyStudent.name: NoisyStudent()}


@dataclass(frozen=True, kw_only=True)
class DigitsOfRounds(Digits):
    """The digits, with the schedule of the paper.

    A batch has --ratio unlabeled ones for each labeled one.
    """

    unlabeled_batch: tyro.conf.Suppress[Batch] = 64
    hidden: tuple[int, ...] = (64, 64)
    fitting: Fitting = field(
        default_factory=lambda: fitting_of_digits(steps=1000, schedule="exponential", lr=0.2)
    )


@dataclass(frozen=True, kw_only=True)
class PicturesOfRounds(Pictures):
    """What a picture becomes, how it is changed, and the network.

    What is None is chosen by looking at some pictures.

    Args:
        dropout: dropout rate of the networks. By default it is 0.2, and 0.3 to 0.5 for the larger
            EfficientNets.
        stochastic_depth: probability that the last block of a network is skipped in a step. By
            default it is 0.2 for networks that have it.
    """

    # Without a number, what its size asks for, of each network that has such noise and is trained
    # whole.
    dropout: Share | None = None  # type: ignore[assignment]
    stochastic_depth: Share | None = None  # type: ignore[assignment]

    def noise(self, architecture: Architecture) -> tuple[float, float]:
        """Return the rates of dropout and of stochastic depth of a network.

        Where they were not given they are the usual ones of a network that is trained whole, and
        zero for others: what is frozen has no noise.
        """
        is_whole = self.backbone == "none" or self.tuning == "all"
        dropout = self.dropout
        if dropout is None:
            dropout = 0.0
            if is_whole:
                dropout = DROPOUTS.get(architecture.name, USUAL_DROPOUT)
        stochastic_depth = self.stochastic_depth
        if stochastic_depth is None:
            stochastic_depth = 0.0
            if is_whole and architecture.has_stochastic_depth:
                stochastic_depth = STOCHASTIC_DEPTH
        return dropout, stochastic_depth


@dataclass(frozen=True, kw_only=True)
class ImagesOfRounds(Images):
    """Pictures, with the schedule of a training of minutes.

    A batch has --ratio unlabeled ones for each labeled one.
    """

    usual_ratio: ClassVar[int | None] = RATIO_OF_PICTURES

    unlabeled_batch: tyro.conf.Suppress[Batch] = 32
    pictures: PicturesOfRounds = field(default_factory=PicturesOfRounds)
    # The rate falls as a cosine or in a line, by the network. The paper's exponential spends half
    # as many steps at a high rate, which costs a training of minutes more than it costs one of 350
    # epochs.
    fitting: Fitting = field(default_factory=lambda: Fitting(ema_decay=0.99))
