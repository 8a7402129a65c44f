"""What stands beside exported weights: what they are, how good, and code that loads them."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from metapl.export.programs import INPUT, ONNX, OUTPUT, PROGRAM
from metapl.models import Architecture
from metapl.words import shown

WEIGHTS, CARD = "model.safetensors", "MODEL_CARD.md"


@dataclass(frozen=True)
class Contents:
    """What was exported.

    Args:
        module: the network without wrappers.
        normalization: mean and std before it; None for none.
        architecture: what builds it; None for a network of a user's own.
        digests: SHA-256 of each file by its name.
    """

    module: nn.Module
    normalization: Mapping[str, list[float]] | None
    architecture: Architecture | None
    digests: Mapping[str, str]


def render(card: Mapping[str, Any], contents: Contents) -> str:
    """The text of the card, in Markdown; ``card`` is that of :func:`metapl.export.export`."""
    name = "A network" if contents.architecture is None else contents.architecture.name
    sections = [
        f"# {_text(card.get('title') or name)}",
        _summary(card, contents),
        f"## Loading it\n\n{_loading(contents)}",
        f"## Metrics\n\n{_table('metric', card['metrics'])}",
        f"## Data\n\n{_data(card['data_hash'])}",
        f"## Recipe\n\n```json\n{json.dumps(card['recipe'], indent=2, sort_keys=True, default=str)}\n```",
        f"## Versions\n\n{_table('package', _versions(contents))}",
    ]
    if card.get("notes"):
        sections.append(f"## Notes\n\n{card['notes']}")
    return "\n\n".join(sections) + "\n"


def _summary(card: Mapping[str, Any], contents: Contents) -> str:
    lines = ["A classifier trained with metapl.", ""]
    a = contents.architecture
    if a is not None:
        size = "" if a.image_size is None else f" of {a.image_size}x{a.image_size} pixels"
        lines.append(f"- Network: `{a.name}`, pictures{size} with {a.in_channels} channels, {a.num_classes} classes")
    lines.append(f"- Weights: {_counts(contents.module)}")
    lines += [f"- `{name}`: SHA-256 `{digest}`" for name, digest in contents.digests.items()]
    normalization = contents.normalization
    if normalization is not None:
        lines.append(
            "- Normalization: (x - mean) / std per channel of pictures in [0, 1], "
            f"mean {normalization['mean']}, std {normalization['std']}"
        )
    else:
        lines.append("- Normalization: none; the network takes pictures in the range that it was trained on")
    if card.get("classes") is not None:
        lines.append(f"- Classes, in the order of the outputs: {', '.join(map(_text, card['classes']))}")
    return "\n".join(lines)


def _loading(contents: Contents) -> str:
    """One block of code for each file; whichever is run, ``predict`` is the same."""
    takes = "in the range of the training" if contents.normalization is None else "in [0, 1]"
    building = _building(contents.module, contents.architecture)
    parts = []
    if PROGRAM in contents.digests:
        parts.append(("As a program", f"This needs {_torch()} or newer and nothing else.", _program_code(takes)))
    parts.append(("The weights", _how(building), _weights_code(building, contents.normalization, takes)))
    if ONNX in contents.digests:
        parts.append(("As ONNX", "This needs onnxruntime and NumPy; the pictures are NumPy's.", _onnx_code(takes)))
    return "\n\n".join(f"### {title}\n\n{needs}\n\n```python\n{code}\n```" for title, needs, code in parts)


def _torch() -> str:
    return f"torch {torch.__version__.partition('+')[0]}"


def _program_code(takes: str) -> str:
    return f'''\
import torch

model = torch.export.load("{PROGRAM}").module()


def predict(images):
    """Class probabilities (B, K) of pictures (B, C, H, W) {takes}."""
    with torch.inference_mode():
        return model(images).softmax(dim=1)'''


def _onnx_code(takes: str) -> str:
    return f'''\
import numpy
import onnxruntime

session = onnxruntime.InferenceSession("{ONNX}", providers=["CPUExecutionProvider"])


def predict(images):
    """Class probabilities (B, K) of pictures (B, C, H, W), float32, {takes}."""
    (logits,) = session.run(["{OUTPUT}"], {{"{INPUT}": images}})
    exponentials = numpy.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)'''


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


def _weights_code(building: _Building, normalization: Mapping[str, list[float]] | None, takes: str) -> str:
    library = building.library
    imports = {"import torch", "from safetensors.torch import load_file"}
    imports |= {{"metapl": "import metapl.models"}.get(library, f"import {library}")} if library else set()
    lines = sorted(imports, key=lambda line: (line.startswith("from"), line))
    lines += ["", building.code, f'model.load_state_dict(load_file("{WEIGHTS}"))', "model.eval()"]
    lines += ["", "", "def predict(images):"]
    lines += [f'    """Class probabilities (B, K) of pictures (B, C, H, W) {takes}."""']
    if normalization is not None:
        lines += [
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
    # A hash stands between backquotes.
    return shown(text).replace("|", "\\|") if re.fullmatch("`[0-9a-z:]*`", text) else _text(text)


def _text(value: object) -> str:
    r"""A name or a value in the card's text, where nothing of it is taken for Markdown or HTML.

    >>> _text("<b>|a*b[c]"), _text("n02012849_x")
    ('\\<b\\>\\|a\\*b\\[c\\]', 'n02012849_x')
    """
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", shown(value).replace("\n", " "))


def _counts(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,} parameters"


def _versions(contents: Contents) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    wanted = ["metapl", "torch", "safetensors"]
    if contents.architecture is not None and contents.architecture.library not in wanted:
        wanted.append(contents.architecture.library)
    if ONNX in contents.digests:
        wanted += ["onnx", "onnxscript"]
    for package in wanted:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
