"""Backbones, networks whose weights are on this machine already.

And the control that a run stands beside.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor, nn

from metapl.apps.machine import read_json, sha256_of
from metapl.apps.methods import Data
from metapl.apps.networks import Architecture
from metapl.apps.pictures.batches import EvaluationBatches
from metapl.apps.printing import require_packages
from metapl.apps.run_folder import WEIGHTS, EndedRun, refuse_changed
from metapl.apps.tuned_networks import Tuned
from metapl.errors import MetaplError
from metapl.metrics.predictions import batches_of, eval_mode

IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean and deviation that pretrained weights expect

# What "auto" takes, the first whose weights are here; and the least side of pictures, in pixels:
# for it, and for any.
AUTO = (
    *(
        "timm:vit_small_patch16_dinov3",
        "timm:vit_small_patch14_dinov2",
        "timm:convnext_tiny",
        "timm:resnet50",
    ),
    *(
        "resnet50",
        "efficientnet_b0",
        "timm:efficientnet_lite0",
        "resnet18",
        "timm:mobilenetv3_small_100",
    ),
)
AUTO_SIDE, LEAST_SIDE = 48, 32

# The control: side in pixels to which pictures are shrunk where there is no backbone; the most
# labeled pictures.
CONTROL_SIDE, CONTROL_PICTURES, CONTROL_BATCH = 16, 2000, 64


def find(given: str, network: str | None) -> dict[str, Any]:
    """The settings of the backbone that a name, a file of weights or the folder of a run stands for.

    Nothing is downloaded. They are the network, its weights with their SHA-256, and the pictures
    that it takes.

    Args:
        given: ``timm:NAME`` or a name of torchvision, whose weights are in the cache of torch.hub
            or of huggingface_hub; the folder of a run of metapl; or a file of weights, of the
            ``network`` or of that which the config.json beside it names, as timm's are published.
        network: what was asked for beside it.

    Raises: MetaplError where there is nothing, or something else.
    """
    path = Path(given).expanduser()
    own: dict[str, Any] = {
        "mean": IMAGENET[0],
        "std": IMAGENET[1],
        "grey": False,
        "image_size": None,
    }  # the usual
    if path.is_dir():
        run = EndedRun.load(path)
        name = run.result["delivered"]
        card, weights = run.cards[name], path / WEIGHTS[name]
        refuse_changed(weights, run.result)
        if card.architecture is None or card.mean is None:
            raise MetaplError(
                f"--backbone {given}: its network takes no pictures; expected a run on pictures."
            )
        known = card.architecture.name
        own = {
            "mean": card.mean,
            "std": card.std,
            "grey": card.input.channels == 1,
            "image_size": card.input.size,
        }
    elif path.is_file():
        config_file, weights = path.parent / "config.json", path
        named = (
            read_json(config_file).get("architecture")
            if network is None and config_file.is_file()
            else None
        )
        if network is None and named is None:
            raise MetaplError(
                f"--backbone {given}: expected the network that the weights are of too: --network "
                "NAME."
            )
        known = network or f"timm:{named}"
    elif not given.startswith("timm:") and (
        path.suffix or len(path.parts) > 1
    ):  # no name of a network is like that
        raise MetaplError(f"--backbone {given}: there is no such file or folder.")
    else:
        library = Architecture(name=given, num_classes=2).library  # refuses an unknown name
        known, folder = given, Path(torch.hub.get_dir()) / "checkpoints"
        if library == "torchvision":
            from torchvision.models import get_model_weights

            try:
                published: Any = get_model_weights(given)
            except ValueError as error:
                raise MetaplError(
                    f"--backbone {given}: torchvision has no weights of it; expected a file."
                ) from error
            files = [
                folder / Path(urlparse(one.url).path).name
                for one in (published.DEFAULT, *published)
            ]
        elif library != "timm":
            raise MetaplError(
                f"--backbone {given}: nobody has published its weights; expected a file, or a "
                "run's folder."
            )
        else:
            config = _config(given)
            if config is None or not (config.hf_hub_id or config.url):
                raise MetaplError(
                    f"--backbone {given}: timm knows no weights of it; expected a file."
                )
            require_packages(f"--backbone {given}", "huggingface_hub")
            from huggingface_hub import constants, try_to_load_from_cache

            usual = filter(None, (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin"))
            where = {"repo_id": config.hf_hub_id or "", "cache_dir": constants.HF_HUB_CACHE}
            cached = [try_to_load_from_cache(filename=file, **where) for file in usual]
            by_url = (
                folder / Path(urlparse(config.url or f"{config.hf_hub_id}.safetensors").path).name
            )
            files = [*(Path(file) for file in cached if isinstance(file, str)), by_url]
        weights = next((file for file in files if file.is_file()), files[0])
        if not weights.is_file():
            raise MetaplError(
                f"--backbone {given}: its weights are not on this machine; put them at {weights}, "
                f"or give a file: --backbone FILE --network {given}."
            )
    if network not in (None, known):
        raise MetaplError(
            f"--backbone {given} is {known}, and --network {network} was given; leave it out."
        )
    if not path.is_dir() and known.startswith("timm:") and (config := _config(known)) is not None:
        own |= {"mean": tuple(config.mean), "std": tuple(config.std)}
    return {
        "network": known,
        "weights": str(weights.resolve()),
        "weights_sha256": sha256_of(weights),
        **own,
    }


def auto(network: str | None = None) -> dict[str, Any] | None:
    """The first of the usual backbones whose weights are on this machine.

    Or that of the ``network`` asked for.
    """
    for name in (network,) if network else AUTO:
        try:
            return find(name, None)
        except MetaplError:  # without its weights, or without timm
            continue
    return None


def _config(name: str) -> Any:
    """What timm says of a network's weights; None where it knows of none."""
    require_packages(f"--network {name}", "timm")
    import timm

    return timm.get_pretrained_cfg(name.removeprefix("timm:"))


@dataclass(frozen=True, eq=False)
class Control:
    """Logistic regression on the labeled pictures alone: on the features of a backbone before it is
    trained, or, without one, on the pictures shrunk to 16 pixels; each feature is standardized on
    the labeled pictures. Digits are taken as they are: on two of a class, standardized pixels have
    69.5 % in the mean of 20 seeds, and these 76.1 %."""

    network: nn.Module
    regression: Any  # scikit-learn's

    @classmethod
    def of(cls, network: nn.Module, data: Data) -> Control:
        """Fit it, on :data:`CONTROL_PICTURES` of the labeled pictures at most."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        images, labels = data.labeled.images, data.labeled.labels
        are_digits = isinstance(images, Tensor)
        steps = [] if are_digits else [StandardScaler()]
        made = cls(network, make_pipeline(*steps, LogisticRegression(max_iter=1000)))
        even = labels.argsort(stable=True)[:: max(1, -(-len(images) // CONTROL_PICTURES))]
        first = [
            int((labels == label).nonzero()[0]) for label in labels.unique()
        ]  # of each class, however rare
        some = torch.cat([even, torch.tensor(first)]).unique()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            if are_digits:
                seen = made._seen((images[some], labels[some]))
            else:
                seen = made._seen(
                    EvaluationBatches(images.select(some), labels[some], CONTROL_BATCH)
                )
            made.regression.fit(*map(np.concatenate, zip(*seen, strict=True)))
        return made

    @property
    def sees(self) -> str:
        return "features of the backbone" if isinstance(self.network, Tuned) else "pixels"

    def accuracy(self, data: Any) -> float:
        """The share that is right of labeled pictures: of a batch of them, or of several."""
        right = np.concatenate([self.regression.predict(x) == y for x, y in self._seen(data)])
        return float(right.mean())

    @torch.no_grad()
    def start(self, network: Tuned) -> None:
        """Let the head of a network begin as the regression.

        What is trained next goes on from there.
        """
        scaler, linear = (step for _, step in self.regression.steps)
        head = network.module.get_submodule(network.head)
        if not isinstance(head, nn.Linear) or len(linear.classes_) != head.out_features:
            return
        weight_KF, bias_K = linear.coef_, linear.intercept_
        if len(linear.classes_) == 2:  # scikit-learn has the difference of two classes
            weight_KF, bias_K = (np.concatenate([-each, each]) / 2 for each in (weight_KF, bias_K))
        weight_KF = weight_KF / scaler.scale_
        head.weight.copy_(torch.from_numpy(weight_KF))
        if head.bias is not None:
            head.bias.copy_(torch.from_numpy(bias_K - weight_KF @ scaler.mean_))

    def _seen(self, data: Any) -> Iterator[tuple[Any, Any]]:
        """The features and the labels of the pictures of each batch."""
        network, device = self.network, next(self.network.parameters()).device
        with eval_mode(network):
            for x, labels in batches_of(data, device):
                if isinstance(network, Tuned):
                    x = network.features(x)
                else:
                    x = nn.functional.adaptive_avg_pool2d(x, min(CONTROL_SIDE, x.shape[-1]))
                yield x.flatten(1).double().cpu().numpy(), labels.cpu().numpy()
