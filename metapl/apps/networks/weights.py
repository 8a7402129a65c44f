"""Pretrained weights from a local file, ImageNet's as torchvision fetches them among these."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, few, reason_of

MOST_WRAPPED = 8
"""How deep a state dict may lie in what a training program stored."""


@dataclass(frozen=True)
class LoadedWeights:
    """What :func:`load_weights` did.

    Args:
        file: where the weights came from.
        loaded: names of the tensors taken from it.
        fresh: names of the head's tensors that stayed as they were, for the file has none that fit.
        interpolated: names of those brought to another resolution.
    """

    file: Path
    loaded: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    interpolated: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded from {self.file}"
        text += f"; fresh, for the head is of another size: {', '.join(self.fresh)}" if self.fresh else ""
        return text + (f"; interpolated: {', '.join(self.interpolated)}" if self.interpolated else "")


def load_weights(
    module: nn.Module,
    file: str | os.PathLike[str],
    *,
    heads: Iterable[str] = (),
    adapt: Callable[[nn.Module, dict[str, Tensor]], tuple[str, ...]] | None = None,
) -> LoadedWeights:
    """Put the weights of a local file into a network.

    The file is a state dict by ``torch.save``, alone or under "state_dict" or "model" as training programs store it,
    or ``.safetensors``. It is read without running code from it. Prefixes that data parallelism and ``torch.compile``
    put before every name are taken off.

    Args:
        module: the network; it is changed in place, or not at all.
        file: a ``.safetensors`` file, or one that ``torch.save`` wrote.
        heads: names of the layers that give the classes. One whose number of classes differs from the file's, or that
            the file does not have, keeps the weights that it has.
        adapt: called with the network and the file's tensors, may change the latter and names those it changed.

    Returns:
        What was loaded and what was not; its text is one line.

    Raises:
        MetaplError: the file is missing, damaged, holds something else than finite tensors, or its names or shapes
            outside the heads differ from the network's.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1000)).state_dict(), folder / "weights.pt")
    >>> load_weights(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), folder / "weights.pt", heads=["1"]).fresh
    ('1.weight', '1.bias')
    """
    path = Path(file)
    state = _without_prefixes(_state_dict(path), module.state_dict().keys())
    interpolated = () if adapt is None else adapt(module, state)
    own = module.state_dict()
    fresh = _fresh(own, state, heads)
    # Files from before PyTorch 0.4.1 do not count batches; only momentum=None would ask for the count.
    optional = {name for name in own if name.endswith("num_batches_tracked")} - state.keys()
    fits = {name: t for name, t in state.items() if name not in fresh}
    _check_fit(path, fits, {name: t for name, t in own.items() if name not in optional and name not in fresh})
    module.load_state_dict({**own, **fits})
    return LoadedWeights(path, tuple(fits), tuple(fresh), interpolated)


def head_outputs(file: str | os.PathLike[str], heads: Iterable[str]) -> int | None:
    """The number of classes of the weights in a file.

    Args:
        file: as in :func:`load_weights`.
        heads: names of the layers that give the classes.

    Returns:
        The outputs of the first of these layers that the file has; None: it has none of them.

    Raises:
        MetaplError: the file is missing, damaged, or holds something else than tensors.
    """
    state = _without_prefixes(_state_dict(Path(file)), ())
    names = [f"{head}.{part}" for head in heads for part in ("bias", "weight")]
    return next((len(state[name]) for name in names if name in state and state[name].ndim), None)


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


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, by name."""
    if not path.is_file():
        raise MetaplError(f"there is no file of weights {path}; expected a .safetensors or .pt file on this machine.")
    try:
        stored = _read(path)
    except Exception as error:  # damage shows in many types: safetensors' own, pickle's, zip's, OSError, EOFError
        raise MetaplError(
            f"{path} cannot be read as weights: {reason_of(error)}. Expected a state dict: .safetensors, or tensors "
            "alone as torch.save(model.state_dict(), path) writes them."
        ) from error
    for _ in range(MOST_WRAPPED):
        inside = [stored.get(key) for key in ("state_dict", "model")] if isinstance(stored, Mapping) else []
        stored = next((part for part in inside if isinstance(part, Mapping)), stored)
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(t, Tensor) for t in stored.values()):
        kind = f"a {type(stored).__name__}" if not isinstance(stored, Mapping) else f"the entries {few(stored)}"
        raise MetaplError(f"{path} holds {kind}; expected tensors by name, as model.state_dict() gives them.")
    state = {str(name): t for name, t in stored.items()}
    without_values = [name for name, t in state.items() if t.layout != torch.strided or t.is_meta or t.is_quantized]
    if without_values:
        raise MetaplError(
            f"{path} holds tensors that are sparse, quantized or without values: {few(without_values)}; expected dense "
            "ones, as tensor.to_dense() and tensor.dequantize() give them."
        )
    if bad := [name for name, t in state.items() if not t.isfinite().all()]:
        raise MetaplError(f"{path} holds values that are not finite, in {few(bad)}; expected finite weights.")
    return state


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how others have written it
        return torch.load(path, map_location="cpu", weights_only=True)


def _without_prefixes(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    while prefix := next((p for p in ("module.", "_orig_mod.") if all(name.startswith(p) for name in state)), None):
        if all(name.startswith(prefix) for name in own):
            return state
        state = {name.removeprefix(prefix): t for name, t in state.items()}
    return state


def _fresh(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], heads: Iterable[str]) -> list[str]:
    """The tensors of heads that the file lacks or has for another number of classes."""
    fresh: list[str] = []
    for head in heads:
        names = [name for name in own if name.startswith(f"{head}.")]
        same = all(name in stored and stored[name].shape == own[name].shape for name in names)
        other_features = any(name in stored and stored[name].shape[1:] != own[name].shape[1:] for name in names)
        fresh += [] if same or other_features else names
    return fresh


def _check_fit(path: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    common = [name for name in expected if name in stored]
    kinds = {
        "it lacks": [name for name in expected if name not in stored],
        "the network has no": [name for name in stored if name not in expected],
        "other shapes:": [
            f"{n} {tuple(stored[n].shape)} instead of {tuple(expected[n].shape)}"
            for n in common
            if stored[n].shape != expected[n].shape
        ],
        "whole numbers for real ones or the reverse:": [
            n for n in common if stored[n].is_floating_point() != expected[n].is_floating_point()
        ],
    }
    faults = [f"{kind} {few(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise MetaplError(
            f"the weights in {path} are not of this network: {'; '.join(faults)}. Only the head may differ, by its "
            "number of classes; create the network that the weights are of."
        )
