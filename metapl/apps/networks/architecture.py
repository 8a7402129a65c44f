"""Networks by name."""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass

from torch import nn

from metapl.apps.networks.families import FAMILIES, TIMM, Family, Sizes
from metapl.apps.networks.weights import load_weights
from metapl.errors import MetaplError
from metapl.words import did_you_mean

NAMES: tuple[str, ...] = tuple(FAMILIES)
"""What :func:`create` builds, beside ``timm:NAME``."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Architecture(Sizes):
    """A network's name and sizes: a plain value, to stand in a recipe or beside exported weights.

    Args:
        name: one of :data:`NAMES`, or ``timm:NAME``, such as ``timm:convnext_tiny``.
        num_classes: number of outputs, 1 or more.
        dropout: probability in [0, 1) of zeroing a value, 0 whatever the library's own default is; where it acts
            depends on the network, see :func:`create`.
        stochastic_depth: probability in [0, 1) of dropping the last block (one minus its survival probability).
        in_channels: channels of a picture: 3 for color, 1 for grey.
        image_size: side of the square pictures in pixels. Vision transformers (None: their usual 224) and pooled_cnn
            are built for one, and position embeddings of another resolution are interpolated; the others take any.

    Raises:
        MetaplError: an unknown name, a number out of its range, or a field that the network does not have.

    >>> Architecture(name="small_cnn", num_classes=10, in_channels=1).create().head.out_features
    10
    """

    def __post_init__(self) -> None:
        family = self.family
        for field in ("num_classes", "in_channels"):
            self._require(getattr(self, field) >= 1, field, "1 or more")
        self._require(self.image_size is None or self.image_size >= 1, "image_size", "a side in pixels, or None")
        for field, has in (("dropout", family.dropout), ("stochastic_depth", family.stochastic_depth)):
            self._require(0.0 <= getattr(self, field) < 1.0, field, "a probability in [0, 1)")
            if getattr(self, field) > 0.0 and not has:
                having = ", ".join(name for name, known in FAMILIES.items() if getattr(known, field))
                raise MetaplError(
                    f"{self.name} has no {field}, and {field}={getattr(self, field)} was given; leave it out, or take "
                    f"a network that has it: {having}."
                )
        if family.patch is not None and self.image_size is not None:
            self._require(self.image_size % family.patch == 0, "image_size", f"a multiple of its patch, {family.patch}")

    def _require(self, condition: bool, field: str, expected: str) -> None:
        if not condition:
            raise MetaplError(f"{self.name} got {field}={getattr(self, field)!r}; expected {expected}.")

    @property
    def family(self) -> Family:
        """What builds it."""
        if self.name.startswith("timm:") and self.name != "timm:":
            return TIMM
        if self.name not in FAMILIES:
            # With a cutoff of 0 every name comes back, in the order of likeness.
            known = difflib.get_close_matches(self.name, NAMES, n=len(NAMES), cutoff=0.0)
            meant = did_you_mean(self.name, NAMES) or "."
            raise MetaplError(
                f"there is no network {self.name!r}{meant} Expected one of {', '.join(known)}, or timm:NAME."
            )
        return FAMILIES[self.name]

    def create(self, weights: str | os.PathLike[str] | None = None) -> nn.Module:
        """The network, with fresh weights from the default generator or with those of a file; see :func:`create`."""
        module = self.family.build(self)
        if weights is not None:
            heads = self.family.heads(module)
            _log.info("%s", load_weights(module, weights, heads=heads, adapt=self.family.adapt))
        return module

    @property
    def library(self) -> str:
        """The package that builds it without help: torchvision, timm or metapl."""
        return self.family.library

    def code(self) -> str:
        """Lines of Python that build it as ``model`` by :attr:`library` alone (``torch`` and it being imported).

        >>> print(Architecture(name="resnet50", num_classes=7).code())
        model = torchvision.models.resnet50(num_classes=7)
        """
        return "\n".join(self.family.code(self))


def create(
    name: str,
    num_classes: int,
    *,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    in_channels: int = 3,
    weights: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> nn.Module:
    r"""Build a network by name.

    .. math:: 1 - p_l = \frac{l}{L}\,(1 - p_L), \qquad l = 1 \dots L

    is the linear rule of stochastic depth, with survival probabilities p_l: block l of L is dropped with probability
    (l/L) · ``stochastic_depth``, the last with ``stochastic_depth`` itself, in training alone.

    ====================  ==================================  =====================  ================
    name                  network                             dropout                stochastic depth
    ====================  ==================================  =====================  ================
    pooled_cnn            convolutions with batch norm and    before the head        none
                          pooling, for 16x16 to 96x96
    small_cnn             four convolutions, for 16x16        before the head        none
    wide_resnet28_2/_10   WRN-28-2 and WRN-28-10, for 32x32   inside each block      none
    resnet18 … resnet152  torchvision's                       before the head        none
    efficientnet_b0 … b7  torchvision's                       before the head        linear rule
    efficientnet_b0_svhn  B0 whose stages 2 and 3 keep the    before the head        linear rule
                          resolution: 32x32 ends as 4x4
    efficientnet_l2,      torchvision's blocks, wider and     before the head        linear rule
    efficientnet_b6_wide  deeper than B7
    vit_b_16 … vit_h_14   torchvision's                       after the embedding    none
                                                              and in each block
    vit_1b_14             torchvision's, of 1.2 billion       as above               none
                          weights
    timm:NAME             timm's, with timm installed         timm's ``drop_rate``   timm's ``drop_path_rate``
    ====================  ==================================  =====================  ================

    Args:
        name, num_classes, dropout, stochastic_depth, in_channels, image_size: as in :class:`Architecture`.
        weights: a local file of a state dict to start from, ``.safetensors`` or what ``torch.save`` wrote; a head for
            another number of classes is left out, see :func:`metapl.apps.networks.load_weights`. None: fresh weights
            from the default generator.

    Returns:
        A module in training mode from images (B, ``in_channels``, H, W) to logits (B, ``num_classes``). It runs with
        every mode of feedback.

    Raises:
        MetaplError: an unknown name (the known ones are listed, the likest first), a number out of its range, a
            dropout or stochastic depth that the network does not have, timm not installed, a file of weights that is
            damaged or of another network.

    >>> import torch
    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in create("efficientnet_b0", 1000).parameters())
    5288548

    Huang et al., arXiv:1603.09382, eq. (4), for the linear rule; Noisy Student, section 3.2, for 0.2 and dropout 0.5.
    """
    architecture = Architecture(
        name=name,
        num_classes=num_classes,
        dropout=dropout,
        stochastic_depth=stochastic_depth,
        in_channels=in_channels,
        image_size=image_size,
    )
    return architecture.create(weights)
