"""A trained network for others: weights that need no metapl, and a card that says what they are.

model.safetensors   the weights under the names that torchvision or timm give them
MODEL_CARD.md       recipe, data, metrics, versions, and code that loads the weights
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metapl.atomic import replacing
from metapl.errors import MetaplError
from metapl.models import Architecture, Normalized

WEIGHTS, CARD = "model.safetensors", "MODEL_CARD.md"

_REQUIRED = ("recipe", "data_hash", "metrics")
_OPTIONAL = ("title", "classes", "notes")


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Args:
        weights, card: the files.
        sha256: of the file of weights; the card states it too.
    """

    weights: Path
    card: Path
    sha256: str


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    card: Mapping[str, Any],
    architecture: Architecture | None = None,
) -> Exported:
    """Write a network's weights and their model card into a folder.

    The weights go under the network's own names: wrappers by :func:`metapl.models.normalized` and ``torch.compile`` are
    taken off, so ``torchvision.models.…().load_state_dict(…)`` takes the file as it is. Mean and std of a normalized
    network, the classes and the architecture stand in the file's metadata and on the card, whose code normalises.

    Args:
        model: the network, on any device; it is left as it is.
        path: the folder; made if need be. Files of an earlier export in it are replaced, each whole or not at all, the
            card last; it states the weights' SHA-256.
        card: what the card says: ``recipe`` (a mapping), ``data_hash`` (text, or a mapping of texts), ``metrics`` (a
            mapping from name to number); if wanted ``title``, ``classes`` (their names in the order of the outputs)
            and ``notes`` (text in Markdown).
        architecture: what builds the network; checked against the weights. None, for a network of your own: the card's
            code spells out a plain sequence of layers, such as :func:`metapl.models.mlp` makes, and leaves the building
            of any other to you.

    Returns:
        The files. The same network and card give the same bytes, with the same versions of the packages.

    Raises:
        MetaplError: a card with a part missing or unknown, weights that are not finite or not of ``architecture``, a
            number of classes that is not that of the network, a folder that cannot be written.

    >>> import tempfile
    >>> from metapl.models import create
    >>> small = Architecture(name="small_cnn", num_classes=2, in_channels=1)
    >>> written = export(small.create(), tempfile.mkdtemp(), architecture=small, card={
    ...     "recipe": {"steps": 100}, "data_hash": "sha256:1f…", "metrics": {"test accuracy": 0.97}})
    >>> written.weights.name, written.card.name
    ('model.safetensors', 'MODEL_CARD.md')
    """
    _check_card(card, architecture)
    module, normalization = _unwrapped(model)
    state = module.state_dict()
    _check_weights(state, architecture)
    content = _safetensors(state, _metadata(architecture, normalization, card.get("classes")))
    digest = hashlib.sha256(content).hexdigest()
    text = _render(card, architecture, normalization, module, digest)
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in ((WEIGHTS, content), (CARD, text.encode())):
            with replacing(folder / name) as file:
                file.write(data)
    except OSError as error:
        raise MetaplError(f"{folder} could not be written: {error.strerror or error}.") from error
    return Exported(folder / WEIGHTS, folder / CARD, digest)


def _unwrapped(model: nn.Module) -> tuple[nn.Module, dict[str, list[float]] | None]:
    """The network whose names others know, and the normalisation that stood before it."""
    normalization = None
    while True:
        if isinstance(model, Normalized):
            if normalization is not None:
                raise MetaplError("export got a network that is normalized twice; expected one normalisation.")
            normalization = {"mean": _numbers(model.mean), "std": _numbers(model.std)}
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model.get_submodule("_orig_mod")
        else:
            return model, normalization


def _numbers(tensor: Tensor) -> list[float]:
    """The shortest decimals that give the same float32 numbers."""
    return [float(str(x)) for x in tensor.detach().flatten().float().cpu().numpy()]


# ------------------------------------------------------------------------------------------------------------ checks


def _check_card(card: Mapping[str, Any], architecture: Architecture | None) -> None:
    missing = [part for part in _REQUIRED if part not in card]
    unknown = [part for part in card if part not in (*_REQUIRED, *_OPTIONAL)]
    if missing or unknown:
        raise MetaplError(
            f"the model card lacks {missing} and has the unknown {unknown}; expected {', '.join(_REQUIRED)}, and if "
            f"wanted {', '.join(_OPTIONAL)}."
        )
    classes = card.get("classes")
    if architecture is not None and classes is not None and len(classes) != architecture.num_classes:
        raise MetaplError(
            f"the model card names {len(classes)} classes, and the network has {architecture.num_classes} outputs."
        )


def _check_weights(state: Mapping[str, Tensor], architecture: Architecture | None) -> None:
    bad = [name for name, t in state.items() if not t.isfinite().all()]
    if bad:
        raise MetaplError(f"weights that are not finite are not exported: {', '.join(bad[:4])}; the training diverged.")
    if architecture is None:
        return
    with torch.device("meta"):
        expected = {name: t.shape for name, t in architecture.create().state_dict().items()}
    found = {name: t.shape for name, t in state.items()}
    differing = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
    if differing:
        raise MetaplError(
            f"the network is not what {architecture} builds: it differs in {', '.join(differing[:4])} "
            f"({len(differing)} in all); give the architecture that it was created from."
        )


# ----------------------------------------------------------------------------------------------------------- weights


def _metadata(
    architecture: Architecture | None, normalization: Mapping[str, Any] | None, classes: Sequence[str] | None
) -> dict[str, Any]:
    return {
        "architecture": None if architecture is None else asdict(architecture),
        "normalization": normalization,
        "classes": None if classes is None else list(classes),
    }


def _safetensors(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save

    # Tensors that share memory, as tied weights do, are written one by one: safetensors refuses them otherwise.
    plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in sorted(state.items())}
    # One entry, for safetensors writes several in an order that changes from call to call.
    data: bytes = save(plain, {"metapl": json.dumps(metadata, sort_keys=True)})
    return data


# -------------------------------------------------------------------------------------------------------------- card


def _render(
    card: Mapping[str, Any],
    architecture: Architecture | None,
    normalization: Mapping[str, list[float]] | None,
    module: nn.Module,
    digest: str,
) -> str:
    building = _building(module, architecture)
    name = "A network" if architecture is None else architecture.name
    sections = [
        f"# {card.get('title') or name}",
        _summary(card, architecture, normalization, _counts(module), digest),
        f"## Loading it\n\n{_how(building)}\n\n```python\n{_loading(building, normalization)}\n```",
        f"## Metrics\n\n{_table('metric', card['metrics'])}",
        f"## Data\n\n{_data(card['data_hash'])}",
        f"## Recipe\n\n```json\n{json.dumps(card['recipe'], indent=2, sort_keys=True, default=str)}\n```",
        f"## Versions\n\n{_table('package', _versions(architecture))}",
    ]
    if card.get("notes"):
        sections.append(f"## Notes\n\n{card['notes']}")
    return "\n\n".join(sections) + "\n"


def _summary(
    card: Mapping[str, Any],
    architecture: Architecture | None,
    normalization: Mapping[str, list[float]] | None,
    counts: str,
    digest: str,
) -> str:
    lines = ["A classifier trained with metapl.", ""]
    if architecture is not None:
        a = architecture
        size = "" if a.image_size is None else f" of {a.image_size}x{a.image_size} pixels"
        lines.append(f"- Network: `{a.name}`, pictures{size} with {a.in_channels} channels, {a.num_classes} classes")
    lines.append(f"- Weights: {counts}; `{WEIGHTS}`, SHA-256 `{digest}`")
    if normalization is not None:
        lines.append(
            "- Normalisation: (x - mean) / std per channel of pictures in [0, 1], "
            f"mean {normalization['mean']}, std {normalization['std']}"
        )
    else:
        lines.append("- Normalisation: none; the network takes pictures in the range that it was trained on")
    if card.get("classes") is not None:
        lines.append(f"- Classes, in the order of the outputs: {', '.join(map(str, card['classes']))}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Building:
    """The code that builds a network as ``model``, and the package that it needs; None for code that is not known."""

    code: str
    library: str | None


def _building(module: nn.Module, architecture: Architecture | None) -> _Building:
    if architecture is not None:
        return _Building(architecture.code(), architecture.library)
    if type(module) is nn.Sequential and all(type(layer) in _SPELLED for layer in module):
        layers = "".join(f"    torch.nn.{layer},\n" for layer in module)
        return _Building(f"model = torch.nn.Sequential(\n{layers})", "torch")
    return _Building("model = build_network()", None)


_SPELLED = (nn.Flatten, nn.Linear, nn.ReLU, nn.Dropout)
"""Layers whose text is the code that makes them."""


def _how(building: _Building) -> str:
    library = building.library
    if library is None:
        return "`build_network()` stands for the code that builds the network."
    without = "; metapl itself is not needed" * (library != "metapl")
    return f"This needs {library} and safetensors{without}."


def _loading(building: _Building, normalization: Mapping[str, list[float]] | None) -> str:
    library = building.library
    imports = {"import torch", "from safetensors.torch import load_file"}
    imports |= {{"metapl": "import metapl.models"}.get(library, f"import {library}")} if library else set()
    lines = sorted(imports, key=lambda line: (line.startswith("from"), line))
    lines += ["", building.code, f'model.load_state_dict(load_file("{WEIGHTS}"))', "model.eval()"]
    lines += ["", "", "def predict(images):"]
    if normalization is None:
        lines += ['    """Class probabilities (B, K) of pictures (B, C, H, W) in the range of the training."""']
    else:
        lines += [
            '    """Class probabilities (B, K) of pictures (B, C, H, W) in [0, 1]."""',
            f"    mean = torch.tensor({normalization['mean']}).view(-1, 1, 1)",
            f"    std = torch.tensor({normalization['std']}).view(-1, 1, 1)",
            "    images = (images - mean) / std",
        ]
    lines += ["    with torch.inference_mode():", "        return model(images).softmax(dim=1)"]
    return "\n".join(lines)


def _data(data_hash: Any) -> str:
    return _table("part", data_hash) if isinstance(data_hash, Mapping) else f"Hash of the data: `{data_hash}`"


def _table(head: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join([f"| {head} | value |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _counts(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,} parameters"


def _versions(architecture: Architecture | None) -> dict[str, str]:
    found = {"python": platform.python_version()}
    wanted = ["metapl", "torch", "safetensors"]
    if architecture is not None and architecture.library not in wanted:
        wanted.append(architecture.library)
    for package in wanted:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
