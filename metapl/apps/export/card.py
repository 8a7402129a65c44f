"""What stands beside exported weights: what they are, how good, and code that loads them."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from metapl.apps.export.programs import INPUT, ONNX, OUTPUT, PROGRAM
from metapl.apps.networks import Architecture
from metapl.words import shown

WEIGHTS, CARD = "model.safetensors", "MODEL_CARD.md"


def render(
    card: Mapping[str, Any],
    module: nn.Module,
    normalization: Mapping[str, list[float]] | None,
    architecture: Architecture | None,
    digests: Mapping[str, str],
) -> str:
    """The text of the card, in Markdown.

    Args:
        card: that of :func:`metapl.apps.export.export`.
        module: the network without wrappers.
        normalization: mean and std before it; None for none.
        architecture: what builds it; None for a network of a user's own.
        digests: SHA-256 of each file by its name.
    """
    name = "A network" if architecture is None else architecture.name
    summary = [
        "A classifier trained with metapl.",
        "",
        *_network(architecture),
        f"- Weights: {sum(p.numel() for p in module.parameters()):,} parameters",
        *(f"- `{name}`: SHA-256 `{digest}`" for name, digest in digests.items()),
        f"- Normalization: {_normalization(normalization)}",
    ]
    if card.get("classes") is not None:
        summary.append(f"- Classes, in the order of the outputs: {', '.join(map(_text, card['classes']))}")
    sections = [
        f"# {_text(card.get('title') or name)}",
        "\n".join(summary),
        f"## Loading it\n\n{_loading(module, normalization, architecture, digests)}",
        f"## Metrics\n\n{_table('metric', card['metrics'])}",
        f"## Data\n\n{_data(card['data_hash'])}",
        f"## Recipe\n\n```json\n{json.dumps(card['recipe'], indent=2, sort_keys=True, default=str)}\n```",
        f"## Versions\n\n{_table('package', _versions(architecture, digests))}",
    ]
    if card.get("notes"):
        sections.append(f"## Notes\n\n{card['notes']}")
    return "\n\n".join(sections) + "\n"


def _network(architecture: Architecture | None) -> list[str]:
    if architecture is None:
        return []
    a, side = architecture, architecture.image_size
    size = "" if side is None else f" of {side}x{side} pixels"
    return [f"- Network: `{a.name}`, pictures{size} with {a.in_channels} channels, {a.num_classes} classes"]


def _normalization(normalization: Mapping[str, list[float]] | None) -> str:
    if normalization is None:
        return "none; the network takes pictures in the range that it was trained on"
    mean, std = normalization["mean"], normalization["std"]
    return f"(x - mean) / std per channel of pictures in [0, 1], mean {mean}, std {std}"


def _loading(
    module: nn.Module,
    normalization: Mapping[str, list[float]] | None,
    architecture: Architecture | None,
    digests: Mapping[str, str],
) -> str:
    """One block of code for each file; whichever is run, ``predict`` is the same."""
    takes = "in the range of the training" if normalization is None else "in [0, 1]"
    building, library = _building(module, architecture)
    parts = []
    if PROGRAM in digests:
        torch_version = torch.__version__.partition("+")[0]
        parts.append(
            ("As a program", f"This needs torch {torch_version} or newer and nothing else.", _program_code(takes))
        )
    parts.append(("The weights", _how(library), _weights_code(building, library, normalization, takes)))
    if ONNX in digests:
        parts.append(("As ONNX", "This needs onnxruntime and NumPy; the pictures are NumPy's.", _onnx_code(takes)))
    return "\n\n".join(f"### {title}\n\n{needs}\n\n```python\n{code}\n```" for title, needs, code in parts)


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


def _building(module: nn.Module, architecture: Architecture | None) -> tuple[str, str | None]:
    """The code that builds a network as ``model``, and the package that it needs; None for code that is not known."""
    if architecture is not None:
        return architecture.code(), architecture.library
    if type(module) is nn.Sequential and all(type(layer) in _SPELLED for layer in module):
        layers = "".join(f"    torch.nn.{layer},\n" for layer in module)
        return f"model = torch.nn.Sequential(\n{layers})", "torch"
    return "model = build_network()", None


_SPELLED = (nn.Flatten, nn.Linear, nn.ReLU, nn.Dropout)
"""Layers whose text is the code that makes them."""


def _how(library: str | None) -> str:
    if library is None:
        return "`build_network()` stands for the code that builds the network."
    without = "; metapl itself is not needed" * (library != "metapl")
    return f"This needs {library} and safetensors{without}."


def _weights_code(
    building: str, library: str | None, normalization: Mapping[str, list[float]] | None, takes: str
) -> str:
    imports = {"import torch", "from safetensors.torch import load_file"}
    imports |= {{"metapl": "import metapl.models"}.get(library, f"import {library}")} if library else set()
    lines = sorted(imports, key=lambda line: (line.startswith("from"), line))
    lines += ["", building, f'model.load_state_dict(load_file("{WEIGHTS}"))', "model.eval()"]
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


def _versions(architecture: Architecture | None, digests: Mapping[str, str]) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    library = [] if architecture is None else [architecture.library]
    onnx = ["onnx", "onnxscript"] if ONNX in digests else []
    for package in dict.fromkeys(("metapl", "torch", "safetensors", *library, *onnx)):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
