"""What stands beside exported weights: what they are, how good, and code that loads them."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from string import Template
from typing import Any

import torch
from torch import nn

from metapl.apps.networks import Architecture
from metapl.words import shown

WEIGHTS, CARD, PROGRAM, ONNX = "model.safetensors", "MODEL_CARD.md", "model.pt2", "model.onnx"
INPUT, OUTPUT = "images", "logits"  # what the input and the output of an ONNX file are called

_CARD = """\
# $title

A classifier trained with metapl.

$summary

## Loading it

$loading

## Metrics

$metrics

## Data

$data

## Recipe

```json
$recipe
```

## Versions

$versions
$notes"""

# A section for each file, in their order; whichever code is run, ``predict`` is the same.
_LOADING = {
    PROGRAM: f'''\
### As a program

This needs torch $torch or newer and nothing else.

```python
import torch

model = torch.export.load("{PROGRAM}").module()


def predict(images):
    """Class probabilities (B, K) of pictures (B, C, H, W) $takes."""
    with torch.inference_mode():
        return model(images).softmax(dim=1)
```''',
    WEIGHTS: f'''\
### The weights

$needs

```python
$imports

$building
model.load_state_dict(load_file("{WEIGHTS}"))
model.eval()


def predict(images):
    """Class probabilities (B, K) of pictures (B, C, H, W) $takes."""
$normalize    with torch.inference_mode():
        return model(images).softmax(dim=1)
```''',
    ONNX: f'''\
### As ONNX

This needs onnxruntime and NumPy; the pictures are NumPy's.

```python
import numpy
import onnxruntime

session = onnxruntime.InferenceSession("{ONNX}", providers=["CPUExecutionProvider"])


def predict(images):
    """Class probabilities (B, K) of pictures (B, C, H, W), float32, $takes."""
    (logits,) = session.run(["{OUTPUT}"], {{"{INPUT}": images}})
    exponentials = numpy.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
```''',
}

_NORMALIZE = """\
    mean = torch.tensor({mean}).view(-1, 1, 1)
    std = torch.tensor({std}).view(-1, 1, 1)
    images = (images - mean) / std
"""


def render(
    card: Mapping[str, Any],
    module: nn.Module,
    normalization: Mapping[str, list[float]] | None,
    architecture: Architecture | None,
    digests: Mapping[str, str],
) -> str:
    """The text of the card, in Markdown; ``digests`` are the SHA-256 of each file by its name."""
    name, library, summary = "A network", "torch", []
    needs, building = "`build_network()` stands for the code that builds the network.", "model = build_network()"
    if architecture is not None:
        name, library, side = architecture.name, architecture.library, architecture.image_size
        size = "" if side is None else f" of {side}x{side} pixels"
        takes = f"pictures{size} with {architecture.in_channels} channels, {architecture.num_classes} classes"
        summary.append(f"- Network: `{name}`, {takes}")
        building = architecture.code()
    elif type(module) is nn.Sequential and all(
        type(layer) in (nn.Flatten, nn.Linear, nn.ReLU, nn.Dropout) for layer in module
    ):  # their text is the code that makes them
        building = "model = torch.nn.Sequential(\n" + "".join(f"    torch.nn.{layer},\n" for layer in module) + ")"
    if "build_network" not in building:
        needs = f"This needs {library} and safetensors; metapl itself is not needed."
    if library == "metapl":
        needs = "This needs metapl and safetensors."
    summary.append(f"- Weights: {sum(p.numel() for p in module.parameters()):,} parameters")
    summary += [f"- `{file}`: SHA-256 `{digest}`" for file, digest in digests.items()]
    if normalization is None:
        summary.append("- Normalization: none; the network takes pictures in the range that it was trained on")
    else:
        by = "mean {mean}, std {std}".format(**normalization)
        summary.append(f"- Normalization: (x - mean) / std per channel of pictures in [0, 1], {by}")
    if card.get("classes") is not None:
        summary.append(f"- Classes, in the order of the outputs: {', '.join(map(_text, card['classes']))}")
    imports = {"import metapl.apps.networks" if library == "metapl" else f"import {library}", "import torch"}
    code = {
        "torch": torch.__version__.partition("+")[0],
        "takes": "in the range of the training" if normalization is None else "in [0, 1]",
        "needs": needs,
        "imports": "\n".join([*sorted(imports), "from safetensors.torch import load_file"]),
        "building": building,
        "normalize": "" if normalization is None else _NORMALIZE.format(**normalization),
    }
    versions = {"python": platform.python_version()}
    for package in ("metapl", "torch", "safetensors", library, *(("onnx", "onnxscript") if ONNX in digests else ())):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    data = card["data_hash"]
    return Template(_CARD).substitute(
        title=_text(card.get("title") or name),
        summary="\n".join(summary),
        loading="\n\n".join(Template(text).substitute(code) for file, text in _LOADING.items() if file in digests),
        metrics=_table("metric", card["metrics"]),
        data=_table("part", data) if isinstance(data, Mapping) else f"Hash of the data: `{data}`",
        recipe=json.dumps(card["recipe"], indent=2, sort_keys=True, default=str),
        versions=_table("package", versions),
        notes=f"\n## Notes\n\n{card['notes']}\n" if card.get("notes") else "",
    )


def _table(head: str, values: Mapping[str, Any]) -> str:
    texts = [(name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in values.items()]
    return "\n".join([f"| {head} | value |", "|---|---|", *(f"| {_text(a)} | {_text(b)} |" for a, b in texts)])


def _text(value: object) -> str:
    r"""A name or a value in the card's text, where nothing of it is taken for Markdown or HTML; a hash may stand
    between backquotes.

    >>> _text("<b>|a*b[c]"), _text("n02012849_x"), _text("`sha256:01ab`")
    ('\\<b\\>\\|a\\*b\\[c\\]', 'n02012849_x', '`sha256:01ab`')
    """
    text = shown(value).replace("\n", " ")
    return text if re.fullmatch("`[0-9a-z:]*`", text) else re.sub(r"([\\`*\[\]<>|])", r"\\\1", text)
