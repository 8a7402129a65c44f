"""Networks in the form of the Hugging Face hub, which ``metapl export RUN --hub`` writes.

config.json         what the network is, and the names of its classes
model.safetensors   its weights, those of the normalization too
README.md           the model card, with the hub's metadata and the figures

:class:`Classifier` reads such a folder, or a repository of the hub that has its files. Nothing is
uploaded here.
"""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from metapl.errors import MetaplError, needed_for
from metapl.networks.card import card_of
from metapl.networks.model_card import HUB_CONFIG

with needed_for("metapl.integrations.hub"):
    from huggingface_hub import PyTorchModelHubMixin

# The hub's name of what such a network does.
TASK = "image-classification"


class Classifier(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="metapl",
    pipeline_tag=TASK,
):
    """A network of a run, with its normalization and the names of its classes.

    ``Classifier.from_pretrained(folder_or_repository)`` builds and loads it, in eval mode. Weights
    that are missing, or too many, are an error.

    Args:
        card: what the network is, as network.json of a run has it.
        classes: names in the order of the outputs.
    """

    def __init__(self, card: dict[str, Any], classes: list[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.network = card_of(card).create()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) of pictures (B, C, H, W) in [0, 1]."""
        logits: Tensor = self.network(images)
        return logits

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **options: Any) -> Self:
        """Load the weights; the hub's own way leaves what is missing at random.

        Raises: MetaplError for a folder or repository whose config.json is not of this form, such
            as a run's.
        """
        if "card" not in options or "classes" not in options:
            raise MetaplError(
                f"{options['model_id']} has no {HUB_CONFIG} with a card and classes; expected what "
                "metapl export RUN --hub --out DIR writes, or a repository of these files."
            )
        model: Self = super()._from_pretrained(strict=strict, **options)
        return model
