"""ImageNet's weights, fetched by torchvision."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch

from metapl.errors import MetaplError


def fetch_imagenet_weights(name: str) -> Path:
    """The file of a torchvision network's newest ImageNet weights, downloaded once into torch's cache.

    Args:
        name: of a network, ``resnet18`` say.

    Returns: a file for :func:`metapl.apps.networks.load_weights`, its hash checked by torch.

    Raises:
        MetaplError: torchvision has no weights of that network, or the file is not there and cannot be downloaded.
    """
    from torchvision.models import get_model_weights

    try:
        weights = get_model_weights(name).DEFAULT
    except ValueError as error:
        raise MetaplError(
            f"torchvision has no ImageNet weights of {name!r}; take one of its networks, --network resnet18 say, or a "
            "file: --weights FILE."
        ) from error
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(urlparse(weights.url).path).name
    if not file.exists():
        try:
            torch.hub.load_state_dict_from_url(weights.url, str(folder), check_hash=True, weights_only=True)
        except (URLError, OSError, RuntimeError) as error:
            raise MetaplError(
                f"the ImageNet weights of {name} could not be downloaded ({error}). Download {weights.url} elsewhere "
                f"and give it as --weights {file.name}, or leave --weights out."
            ) from error
    return file
