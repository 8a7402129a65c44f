"""Backbones: networks whose weights are on this machine already; and the control of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor, nn

from metapl.apps.data import Data
from metapl.errors import MetaplError, require_packages
from metapl.metrics.predictions import batches_of, evaluating
from metapl.networks.architectures import Architecture
from metapl.networks.tuned import IMAGENET, Tuned
from metapl.networks.weights import read_normalization
from metapl.pictures.batches import EvaluationBatches
from metapl.run_folder import WEIGHTS, EndedRun, refuse_changed
from metapl.runs.files import sha256_of

# The least side of pictures, in pixels, for which there is a backbone.
LEAST_SIDE = 32

# The control: the side in pixels to which pictures are shrunk where there is no backbone, the most
# labeled pictures that it is fitted on, and pictures in a batch.
CONTROL_SIDE = 16
CONTROL_PICTURES = 2000
CONTROL_BATCH = 64
CONTROL_ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A pretrained network, and the pictures that it takes.

    Args:
        network: its name.
        weights: the file of its weights.
        weights_sha256: the SHA-256 of that file.
        mean, std: of each channel, by which its pictures are normalized.
        grey: whether it takes pictures without colors.
        image_size: the side of its pictures in pixels; None: it takes any.
    """

    network: str
    weights: str
    weights_sha256: str
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    grey: bool = False
    image_size: int | None = None


def find(source: str, network: str | None) -> Backbone:
    """Return the backbone that a name, a file of weights or the folder of a run stands for.

    Nothing is downloaded.

    Args:
        source: ``timm:NAME`` or a name of torchvision, whose weights are in the cache of torch.hub
            or of huggingface_hub; the folder of a run of metapl; or a file of weights of the
            ``network``.
        network: what was asked for beside it.

    Raises: MetaplError where there is nothing, or something else.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        backbone = _of_run(source, path)
        _check_network(source, backbone.network, network)
        return backbone
    if path.is_file():
        if network is None:
            raise MetaplError(
                f"--backbone {source}: expected the network that the weights are of too: "
                "--network NAME."
            )
        name = network
        weights = path
    elif not source.startswith("timm:") and (path.suffix or len(path.parts) > 1):
        # No name of a network is like that.
        raise MetaplError(f"--backbone {source}: there is no such file or folder.")
    else:
        name = source
        files = _cached_files(source)
        weights = next((file for file in files if file.is_file()), files[0])
        if not weights.is_file():
            raise MetaplError(
                f"--backbone {source}: its weights are not on this machine; put them at {weights}, "
                f"or give a file: --backbone FILE --network {source}."
            )
    _check_network(source, name, network)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean, std = IMAGENET
    config = _timm_config(name) if name.startswith("timm:") else None
    if config is not None:
        mean = tuple(config.mean)
        std = tuple(config.std)
    # Weights that metapl trained are not behind the normalization of published ones.
    mean, std = read_normalization(weights) or (mean, std)
    return Backbone(
        network=name,
        weights=str(weights.resolve()),
        weights_sha256=sha256_of(weights),
        mean=mean,
        std=std,
        grey=len(mean) == 1,
    )


def _check_network(source: str, name: str, asked_network: str | None) -> None:
    """Refuse a backbone that is another network than the one that was asked for beside it."""
    if asked_network not in (None, name):
        raise MetaplError(
            f"--backbone {source} is {name}, and --network {asked_network} was given; leave it out."
        )


def _of_run(source: str, path: Path) -> Backbone:
    """Return the network that a run delivers."""
    run = EndedRun.load(path)
    name = run.result["delivered"]
    card = run.cards[name]
    weights = path / WEIGHTS[name]
    refuse_changed(weights, run.result)
    if card.architecture is None or card.mean is None or card.std is None:
        raise MetaplError(
            f"--backbone {source}: its network takes no pictures; expected a run on pictures."
        )
    return Backbone(
        network=card.architecture.name,
        weights=str(weights.resolve()),
        weights_sha256=sha256_of(weights),
        mean=card.mean,
        std=card.std,
        grey=card.input.channels == 1,
        image_size=card.input.size,
    )


def _cached_files(name: str) -> Sequence[Path]:
    """Return where the weights of a published network may be, the preferred place first."""
    hub_folder = Path(torch.hub.get_dir()) / "checkpoints"
    # This refuses an unknown name.
    library = Architecture(name=name, num_classes=2).library
    if library == "torchvision":
        from torchvision.models import get_model_weights

        try:
            published: Any = get_model_weights(name)
        except ValueError as error:
            raise MetaplError(
                f"--backbone {name}: torchvision has no weights of it; expected a file."
            ) from error
        return [
            hub_folder / Path(urlparse(weights.url).path).name
            for weights in (published.DEFAULT, *published)
        ]
    if library != "timm":
        raise MetaplError(
            f"--backbone {name}: nobody has published its weights; expected a file, or a run's "
            "folder."
        )
    config = _timm_config(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise MetaplError(f"--backbone {name}: timm knows no weights of it; expected a file.")
    require_packages(f"--backbone {name}", "huggingface_hub")
    from huggingface_hub import constants, try_to_load_from_cache

    files = []
    for file_name in (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
        if file_name:
            cached = try_to_load_from_cache(
                repo_id=config.hf_hub_id or "",
                filename=file_name,
                cache_dir=constants.HF_HUB_CACHE,
            )
            if isinstance(cached, str):
                files.append(Path(cached))
    url = config.url or f"{config.hf_hub_id}.safetensors"
    files.append(hub_folder / Path(urlparse(url).path).name)
    return files


def _timm_config(name: str) -> Any:
    """Return what timm says of a network's weights; None where it knows of none."""
    require_packages(f"--network {name}", "timm")
    import timm

    return timm.get_pretrained_cfg(name.removeprefix("timm:"))


@dataclass(frozen=True, eq=False)
class Control:
    """A linear baseline: logistic regression on the labeled pictures alone.

    It sees the features of a backbone before that is trained, or, without one, the pictures shrunk
    to 16 pixels; each feature is standardized on the labeled pictures. Digits are taken as they
    are: on two of a class, standardized pixels have 69.5 % in the mean of 20 seeds, and these
    76.1 %.

    Args:
        network: whose features, or whose pictures, are looked at.
        regression: a pipeline of scikit-learn.
    """

    network: nn.Module
    regression: Any

    @classmethod
    def of(cls, network: nn.Module, data: Data) -> Control:
        """Fit it, on some :data:`CONTROL_PICTURES` of the labeled pictures at most."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        images = data.labeled.images
        labels = data.labeled.labels
        are_digits = isinstance(images, Tensor)
        scalers = [] if are_digits else [StandardScaler()]
        pipeline = make_pipeline(*scalers, LogisticRegression(max_iter=CONTROL_ITERATIONS))
        control = cls(network, pipeline)
        chosen = some_of_each_class(labels, CONTROL_PICTURES)
        examples: Any
        if are_digits:
            examples = (images[chosen], labels[chosen])
        else:
            examples = EvaluationBatches(images.select(chosen), labels[chosen], CONTROL_BATCH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            features, targets = zip(*control._features(examples), strict=True)
            pipeline.fit(np.concatenate(features), np.concatenate(targets))
        return control

    @property
    def sees(self) -> str:
        """Return what it sees of a picture, in words."""
        return "features of the backbone" if isinstance(self.network, Tuned) else "pixels"

    def accuracy(self, data: Any) -> float:
        """Return the share of labeled pictures that it is right about, in a batch or in several."""
        is_right = [self.regression.predict(x) == y for x, y in self._features(data)]
        return float(np.concatenate(is_right).mean())

    @torch.no_grad()
    def start(self, network: Tuned) -> None:
        """Let the head of a backbone begin as the regression, and be trained from there."""
        scaler, linear = (step for _, step in self.regression.steps)
        head = network.module.get_submodule(network.head)
        if not isinstance(head, nn.Linear) or len(linear.classes_) != head.out_features:
            return
        weight_KF = linear.coef_
        bias_K = linear.intercept_
        if len(linear.classes_) == 2:
            # scikit-learn has the difference of the two classes.
            weight_KF = np.concatenate([-weight_KF, weight_KF]) / 2
            bias_K = np.concatenate([-bias_K, bias_K]) / 2
        weight_KF = weight_KF / scaler.scale_
        bias_K = bias_K - weight_KF @ scaler.mean_
        head.weight.copy_(torch.from_numpy(weight_KF))
        if head.bias is not None:
            head.bias.copy_(torch.from_numpy(bias_K))

    def _features(self, data: Any) -> Iterator[tuple[Any, Any]]:
        """Yield the features and the labels of the pictures of each batch."""
        network = self.network
        device = next(network.parameters()).device
        with evaluating(network):
            for x, labels in batches_of(data, device):
                if isinstance(network, Tuned):
                    x = network.features(x)
                else:
                    x = nn.functional.adaptive_avg_pool2d(x, min(CONTROL_SIDE, x.shape[-1]))
                yield x.flatten(1).double().cpu().numpy(), labels.cpu().numpy()


def some_of_each_class(labels: Tensor, most: int) -> Tensor:
    """Return the positions of some pictures, (n,), of every class that there is.

    They are spread evenly over the classes, and the first picture of each class is among them,
    however rare that class is.

    Args:
        labels: int64 (N,).
        most: pictures, beside the first ones of the classes.
    """
    step = max(1, -(-len(labels) // most))
    evenly = labels.argsort(stable=True)[::step]
    first = [int((labels == label).nonzero()[0]) for label in labels.unique()]
    chosen: Tensor = torch.cat([evenly, torch.tensor(first)]).unique()
    return chosen
