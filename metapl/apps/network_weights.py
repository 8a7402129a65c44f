"""Weights of networks: read from files, and split into groups for an optimizer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from metapl.errors import MetaplError, few, reason_of


def load_weights(
    module: nn.Module, file: str | os.PathLike[str], *, heads: Iterable[str] = ()
) -> list[str]:
    """Put the weights of a local file into a network, which is changed in place, or not at all.

    Args:
        module: the network. Position embeddings of a vision transformer of timm are brought to its
            resolution.
        file: a state dict, ``.safetensors`` or by ``torch.save``, alone or under "state_dict" or
            "model". It is read without running code from it. Prefixes of data parallelism and
            ``torch.compile`` are taken off its names.
        heads: names of the layers that give the classes. One whose number of classes differs from
            the file's, or that the file does not have, keeps the weights that it has.

    Returns:
        Names of the heads' tensors that stayed as they were.

    Raises:
        MetaplError: the file is missing, damaged, holds something else than finite tensors, or its
            names or shapes outside the heads differ from the network's.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1000)).state_dict(), folder / "weights.pt")
    >>> load_weights(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), folder / "weights.pt", heads=["1"])
    ['1.weight', '1.bias']
    """
    own, state = module.state_dict(), read_weights(file)
    state = {
        name: t for name, t in state.items() if name in own or name not in ("mean", "std")
    }  # see Normalized
    vit: Any = module
    embedded, grid = state.get("pos_embed"), getattr(vit, "patch_embed", None)
    if (
        embedded is not None
        and grid is not None
        and embedded.ndim == 3
        and embedded.shape != own["pos_embed"].shape
    ):
        from timm.layers.pos_embed import resample_abs_pos_embed

        first = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
        state["pos_embed"] = resample_abs_pos_embed(
            embedded, [*grid.grid_size], num_prefix_tokens=first
        )
    fresh: list[str] = []
    for head in heads:
        names = [name for name in own if name.startswith(f"{head}.")]
        same = all(name in state and state[name].shape == own[name].shape for name in names)
        other_features = any(
            name in state and state[name].shape[1:] != own[name].shape[1:] for name in names
        )
        fresh += [] if same or other_features else names
    fits = {name: t for name, t in state.items() if name not in fresh}
    # Files from before PyTorch 0.4.1 do not count batches; only momentum=None would ask for the
    # count.
    optional = {
        *fresh,
        *(name for name in own if name.endswith("num_batches_tracked") and name not in state),
    }
    expected = {name: t for name, t in own.items() if name not in optional}
    kinds = {
        name: (_kind(fits.get(name)), _kind(expected.get(name))) for name in {**expected, **fits}
    }
    if faults := [f"{name} {a} instead of {b}" for name, (a, b) in kinds.items() if a != b]:
        raise MetaplError(
            f"the weights in {file} are not of this network: {few(faults)}; only the head may "
            "differ."
        )
    module.load_state_dict({**own, **fits})
    return fresh


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{(*tensor.shape,)}" + " of whole numbers" * (not tensor.is_floating_point())


def read_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors in a file, by their names without prefixes of data parallelism and ``torch.compile``."""
    path = Path(file)
    if not path.is_file():
        raise MetaplError(
            f"there is no file of weights {path}; expected a .safetensors or .pt file on this "
            "machine."
        )
    try:
        if path.suffix == ".safetensors":
            stored: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about how others have written it
                stored = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            stored = stored[key] if isinstance(stored.get(key), Mapping) else stored
        if not stored or not all(bool(t.isfinite().all()) for t in stored.values()):
            raise ValueError("it holds no tensors, or some that are not finite")
    except (
        Exception
    ) as error:  # damage shows in many types: safetensors' own, pickle's, zip's, OSError, EOFError
        raise MetaplError(
            f"{path} cannot be read as weights ({type(error).__name__}: {reason_of(error):.80}); "
            "expected a state dict of finite tensors, as .safetensors or as "
            "torch.save(model.state_dict(), path) writes it."
        ) from error
    state = dict(stored)
    for prefix in ("module.", "_orig_mod.", "module."):  # DDP(compile(m)), compile(DDP(m))
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def fetch_imagenet_weights(name: str) -> Path:
    """The file of a torchvision network's newest ImageNet weights, downloaded once into torch's cache and checked."""
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
    of_norms = {
        id(p) for m in module.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    is_spared = {p: weight_decay > 0 and (p.ndim <= 1 or id(p) in of_norms) for p in trained}
    decays = ((False, weight_decay), (True, 0.0))
    groups = [
        {"params": [p for p in is_spared if is_spared[p] == spared], "weight_decay": w}
        for spared, w in decays
    ]
    return [group for group in groups if group["params"]]
