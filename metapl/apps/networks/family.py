"""What the networks of a library have in common, for :mod:`metapl.apps.networks.architecture`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The name and the sizes of a network; its fields are those of :class:`metapl.apps.networks.Architecture`."""

    name: str
    num_classes: int
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    in_channels: int = 3
    image_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """How networks of one kind are built, and what they have.

    Args:
        library: the package that builds them: torchvision, timm or metapl.
        build: makes one.
        code: the lines of Python that make one by ``library`` alone, as ``model``.
        heads: the names of the layers that turn features into classes.
        dropout, stochastic_depth: whether they have it.
        patch: the side in pixels that a picture's must be a multiple of, where the network is built for one size.
        adapt: fits the weights of a file in place to a network of another resolution, and names what it changed.
    """

    library: str
    build: Callable[[Sizes], nn.Module]
    code: Callable[[Sizes], list[str]]
    heads: Callable[[nn.Module], tuple[str, ...]]
    dropout: bool = False
    stochastic_depth: bool = False
    patch: int | None = None
    adapt: Callable[[nn.Module, dict[str, Tensor]], tuple[str, ...]] | None = None
