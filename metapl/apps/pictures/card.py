"""What a run says of its networks, in ``network.json``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from metapl.apps.networks.architecture import Architecture
from metapl.apps.networks.weights import Normalized
from metapl.apps.pictures.input import Input
from metapl.errors import MetaplError
from metapl.models import mlp
from metapl.runs.fields import AtLeastOne


@dataclass(frozen=True, kw_only=True)
class NetworkCard:
    """What builds a network of a run, and what it takes.

    Args:
        title: what messages call it.
        input: how a file becomes its input.
        architecture: a network by its name; or
        widths: of a perceptron with ``dropout``, from the flattened input to the outputs. Where both are None, the
            network is one's own, and whoever reads the run gives the function that builds it, by ``--factory``.
        mean, std: of each channel, by which it normalizes its input; None: it does not.
        channels_last: whether its weights lie in the channels-last format, on which rounding depends.
    """

    title: str
    input: Input
    architecture: Architecture | None = None
    widths: tuple[AtLeastOne, ...] | None = None
    dropout: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels_last: bool = False

    def create(self, factory: Callable[[], nn.Module] | None = None, weights: str | None = None) -> nn.Module:
        """The network with fresh weights, or with those of a file, which its architecture takes."""
        if self.architecture is not None:
            network = self.architecture.create(weights)
        elif self.widths is not None:
            network = mlp(self.widths, dropout=self.dropout)
        elif factory is not None:
            network = factory()
        else:
            raise MetaplError(
                "the run's network is one of its own; expected --factory FILE.py:FUNCTION, which builds it."
            )
        if self.mean is not None and self.std is not None:
            network = Normalized(network, self.mean, self.std)
        return network.to(memory_format=torch.channels_last) if self.channels_last else network
