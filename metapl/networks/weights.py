"""Weights of networks: read from files, and split into groups for an optimizer."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from metapl.errors import MetaplError, few, needed_for, reason_of


def load_weights(
    module: nn.Module, file: str | os.PathLike[str], *, heads: Iterable[str] = ()
) -> list[str]:
    """Put the weights of a local file into a network, which is changed in place, or not at all.

    Args:
        module: the network. Position embeddings of a vision transformer of timm are brought to its
            resolution.
        file: a state dict, ``.safetensors`` or by ``torch.save``, alone or under "state_dict" or
            "model". It is read without running code from it. Prefixes of data parallelism and
            ``torch.compile`` are taken off its names. Mean and std of a
            :class:`metapl.networks.Normalized` are not weights of the network in it: whoever puts
            one around this network asks :func:`read_normalization` for them.
        heads: names of the layers that give the classes. One whose number of classes differs from
            the file's, or that the file does not have, keeps the weights that it has.

    Returns:
        Names of the heads' tensors that stayed as they were.

    Raises:
        MetaplError: the file is missing, damaged, holds something else than finite tensors, or its
            names or shapes outside the heads differ from the network's.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> published = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1000))
    >>> torch.save(published.state_dict(), folder / "weights.pt")
    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    >>> load_weights(network, folder / "weights.pt", heads=["1"])
    ['1.weight', '1.bias']
    """
    network_state = module.state_dict()
    # Mean and std are those of Normalized, which a plain network does not have.
    state = {
        name: tensor
        for name, tensor in read_weights(file).items()
        if name in network_state or name not in ("mean", "std")
    }
    _resize_embedding(module, network_state, state)
    fresh: list[str] = []
    for head in heads:
        fresh += _fresh_tensors(head, network_state, state)
    fitting = {name: tensor for name, tensor in state.items() if name not in fresh}
    expected = {}
    for name, tensor in network_state.items():
        # Files from before PyTorch 0.4.1 do not count batches; only momentum=None would ask for the
        # count.
        is_old = name.endswith("num_batches_tracked") and name not in state
        if name not in fresh and not is_old:
            expected[name] = tensor
    faults = []
    for name in {**expected, **fitting}:
        kind = _kind(fitting.get(name))
        expected_kind = _kind(expected.get(name))
        if kind != expected_kind:
            faults.append(f"{name} {kind} instead of {expected_kind}")
    if faults:
        raise MetaplError(
            f"the weights in {file} are not of this network: {few(faults)}; only the head may "
            "differ."
        )
    module.load_state_dict({**network_state, **fitting})
    return fresh


def _resize_embedding(
    module: nn.Module, network_state: Mapping[str, Tensor], state: dict[str, Tensor]
) -> None:
    """Bring the position embeddings of timm's vision transformers to the network's size."""
    vit: Any = module
    embedding = state.get("pos_embed")
    patches = getattr(vit, "patch_embed", None)
    if embedding is None or patches is None or embedding.ndim != 3:
        return
    if embedding.shape == network_state["pos_embed"].shape:
        return
    with needed_for("position embeddings of another size"):
        from timm.layers.pos_embed import resample_abs_pos_embed

    prefix_tokens = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
    state["pos_embed"] = resample_abs_pos_embed(
        embedding, [*patches.grid_size], num_prefix_tokens=prefix_tokens
    )


def _fresh_tensors(
    head: str, network_state: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> list[str]:
    """Return the names of a head's tensors that keep their weights: of another number of classes.

    A head of other features does not: it is refused.
    """
    names = [name for name in network_state if name.startswith(f"{head}.")]
    is_same = all(
        name in state and state[name].shape == network_state[name].shape for name in names
    )
    has_other_features = any(
        name in state and state[name].shape[1:] != network_state[name].shape[1:] for name in names
    )
    return [] if is_same or has_other_features else names


def _kind(tensor: Tensor | None) -> str:
    """Return the shape of a tensor, and whether it has whole numbers."""
    if tensor is None:
        return "missing"
    shape = f"{(*tensor.shape,)}"
    return shape if tensor.is_floating_point() else f"{shape} of whole numbers"


def read_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors in a file by their names.

    Prefixes of data parallelism and ``torch.compile`` are taken off the names.
    """
    path = existing(file)
    try:
        if path.suffix == ".safetensors":
            stored: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                # Warnings are about how others have written it.
                warnings.simplefilter("ignore")
                stored = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            if isinstance(stored.get(key), Mapping):
                stored = stored[key]
        if not stored or not all(bool(t.isfinite().all()) for t in stored.values()):
            raise ValueError("it holds no tensors, or some that are not finite")
    except Exception as error:
        # Damage shows in many types: safetensors' own, pickle's, zip's, OSError, EOFError.
        raise MetaplError(
            f"{path} cannot be read as weights ({type(error).__name__}: {reason_of(error):.80}); "
            "expected a state dict of finite tensors, as .safetensors or as "
            "torch.save(model.state_dict(), path) writes it."
        ) from error
    state = dict(stored)
    # The prefixes of DDP(compile(m)), and of compile(DDP(m)).
    for prefix in ("module.", "_orig_mod.", "module."):
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def existing(file: str | os.PathLike[str]) -> Path:
    """Return the path of a file of weights; refuse one that is not there."""
    path = Path(file)
    if not path.is_file():
        raise MetaplError(
            f"there is no file of weights {path}; expected a .safetensors or .pt file on this "
            "machine."
        )
    return path


def read_metadata(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what metapl wrote into a file of weights of what network it is.

    It is ``architecture``, ``normalization`` and ``classes``, where they are known, and, where it
    is not 1, ``center``; empty for a file that others wrote.
    """
    path = existing(file)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as stored:
            content: dict[str, Any] = json.loads((stored.metadata() or {}).get("metapl", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise MetaplError(f"{path} cannot be read as weights: {reason_of(error)}.") from error
    return {key: value for key, value in content.items() if value is not None}


def read_normalization(
    file: str | os.PathLike[str],
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and the std by which the network of a file of weights normalizes pictures.

    They stand in what metapl wrote into the file, or among its tensors, which are then those of a
    :class:`metapl.networks.Normalized`. None where the file says neither.
    """
    stored: Mapping[str, Any] = read_metadata(file).get("normalization", {})
    if not stored:
        tensors = read_weights(file)
        stored = {
            name: tensors[name].flatten().tolist() for name in ("mean", "std") if name in tensors
        }
    if len(stored) < 2:
        return None
    return tuple(stored["mean"]), tuple(stored["std"])


def fetch_imagenet_weights(name: str) -> Path:
    """Return the file of a torchvision network's newest ImageNet weights.

    It is downloaded once into torch's cache, and checked.
    """
    with needed_for(f"the ImageNet weights of {name}"):
        from torchvision.models import get_model_weights

    try:
        url = get_model_weights(name).DEFAULT.url
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
        if not file.exists():
            torch.hub.load_state_dict_from_url(
                url, str(file.parent), check_hash=True, weights_only=True
            )
    except ValueError as error:
        raise MetaplError(
            f"torchvision has no ImageNet weights of {name!r}; take resnet18, or --weights FILE."
        ) from error
    except (URLError, OSError, RuntimeError) as error:
        mend = (
            f"download {url} elsewhere and give it as --weights {file.name}, or leave --weights out"
        )
        raise MetaplError(
            f"the ImageNet weights of {name} could not be downloaded ({error}); {mend}."
        ) from error
    return file


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a network's parameters by whether weight decay acts on them, for ``torch.optim``.

    Decay leaves alone vectors and single numbers (biases, scales and shifts of norms, layer scales)
    and every parameter of a norm layer: to shrink these does not make the function simpler. Frozen
    parameters are in no group.

    Args:
        module: the network.
        weight_decay: λ of the decayed parameters, 0 or more.

    Returns:
        Groups ``{"params": [...], "weight_decay": λ}`` in the order of ``module.parameters()``,
        none of them empty: one without decay; with it two, the decayed one first.

    Raises:
        MetaplError: a weight decay below 0.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> [(len(g["params"]), g["weight_decay"]) for g in parameter_groups(net, 5e-4)]
    [(1, 0.0005), (3, 0.0)]
    """
    if not weight_decay >= 0:
        raise MetaplError(
            f"parameter_groups got weight_decay={weight_decay}; expected a number of 0 or more."
        )
    norms = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    ids_in_norms = set()
    for layer in module.modules():
        if isinstance(layer, norms):
            ids_in_norms |= {id(parameter) for parameter in layer.parameters(recurse=False)}
    decayed = []
    spared = []
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        is_spared = parameter.ndim <= 1 or id(parameter) in ids_in_norms
        if weight_decay > 0 and is_spared:
            spared.append(parameter)
        else:
            decayed.append(parameter)
    groups = []
    if decayed:
        groups.append({"params": decayed, "weight_decay": weight_decay})
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return groups
