"""What builds a network, and how a file becomes its input: ``network.json`` of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.models import mlp
from metapl.networks.architectures import Architecture
from metapl.networks.tuned import Normalized
from metapl.pictures.batches import in_unit_range
from metapl.pictures.reader import Levels, gray_image, read_image
from metapl.runs.fields import AtLeastOne, Range, check_fields

# The greatest side in pixels: a batch of larger pictures would not fit into any memory.
LARGEST_SIDE = 4096


@dataclass(frozen=True, kw_only=True)
class Input:
    """How a file becomes what a network takes.

    That is a tensor (``channels``, ``size``, ``size``) of numbers from 0 to 1.

    Args:
        kind: a ``picture``; or a ``digit``, bright ink on dark as in scikit-learn's digits.
        channels: 3 for colors, 1 for grey.
        size: side in pixels that a picture is brought to.
        center: share of the sides of a picture's largest centered square that is looked at.
        levels: the numbers that become 0 and 1 in pictures of more than 8 bits; None: 0 and the
            greatest number of the file's type.
    """

    kind: Literal["picture", "digit"] = "picture"
    channels: Literal[1, 3] = 3
    size: Annotated[int, Range(1, most=LARGEST_SIDE)] = 32
    center: Annotated[float, Range(above=0, most=1)] = 1.0
    levels: Levels | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    @property
    def note(self) -> str:
        """The same in a sentence."""
        if self.kind == "digit":
            return (
                f"Its input is (B, 1, {self.size}, {self.size}), ink from 0 to 1: scikit-learn's "
                "digits, divided by 16."
            )
        colors = "grey (0.299 R + 0.587 G + 0.114 B)" if self.channels == 1 else "in colors"
        middle = "" if self.center == 1 else f"the middle {self.center:.1%} of "
        scaled = ""
        if self.levels is not None:
            low, high = self.levels
            scaled = f" where the file has {low:,g} to {high:,g}"
        return (
            f"Pictures were {colors}, from 0 to 1{scaled}: {middle}the largest centered square of "
            f"each, brought to {self.size}x{self.size} by antialiased bilinear resampling."
        )

    def read(self, path: Path) -> Tensor:
        """Return the network's input for a picture in a file."""
        if self.kind == "picture":
            colors: Literal["L", "RGB"] = "L" if self.channels == 1 else "RGB"
            picture = read_image(
                path, colors=colors, size=self.shape[1:], center=self.center, levels=self.levels
            )
            return in_unit_range(picture)
        image = gray_image(path, self.size)
        # The digits are bright ink on dark, paper is the other way round.
        return (1 - image if image.mean() > 0.5 else image)[None]


@dataclass(frozen=True, kw_only=True)
class NetworkCard:
    """What builds a network of a run, and what it takes.

    Args:
        title: what messages call it.
        input: how a file becomes its input.
        architecture: a network by its name; or
        widths: of a perceptron with ``dropout``, from the flattened input to the outputs. Where
            both are None, the network is one's own, and whoever reads the run gives the function
            that builds it, by ``--factory``.
        mean, std: of each channel, by which it normalizes its input; None: it does not.
        mirrored: whether it predicts by a picture and its mirror image.
        channels_last: whether its weights lie in the channels-last format, on which rounding
            depends.
    """

    title: str
    input: Input
    architecture: Architecture | None = None
    widths: tuple[AtLeastOne, ...] | None = None
    dropout: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    mirrored: bool = False
    channels_last: bool = False

    def create(
        self, factory: Callable[[], nn.Module] | None = None, weights: str | None = None
    ) -> nn.Module:
        """Build the network with fresh weights, or with those of a file that fits."""
        if self.architecture is not None:
            network = self.architecture.create(weights)
        elif self.widths is not None:
            network = mlp(self.widths, dropout=self.dropout)
        elif factory is not None:
            network = factory()
        else:
            raise MetaplError(
                "the run's network is one of its own; expected factory=, the function that "
                "builds it (--factory FILE.py:FUNCTION)."
            )
        if self.mean is not None and self.std is not None:
            network = Normalized(network, self.mean, self.std, mirrored=self.mirrored)
        return network.to(memory_format=torch.channels_last) if self.channels_last else network


def card_of(card: Mapping[str, Any]) -> NetworkCard:
    """Return what a network is, as ``network.json`` says it.

    Raises: MetaplError, TypeError or KeyError where it has other fields.
    """
    fields: dict[str, Any] = {}
    for name, value in card.items():
        # JSON has no tuples.
        fields[name] = tuple(value) if isinstance(value, list) else value
    if card["architecture"] is not None:
        fields["architecture"] = Architecture(**card["architecture"])
    levels = card["input"].get("levels")
    fields["input"] = Input(**{**card["input"], "levels": levels and tuple(levels)})
    return NetworkCard(**fields)
