"""The text of an exported network's model card, and the files that it speaks of."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from metapl.words import shown

# The files of an export.
WEIGHTS = "model.safetensors"
PROGRAM = "model.pt2"
CARD = "MODEL_CARD.md"


def package_versions(*, onnx: bool = False) -> dict[str, str]:
    """Return the versions of Python and of the packages that an export depends on."""
    packages = ["metapl", "torch", "torchvision", "timm"]
    if onnx:
        packages += ["onnx", "onnxscript"]
    versions = {"python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def section_text(section: str | Mapping[str, Any]) -> str:
    """Return a part of the card: Markdown as it is, or a table of figures by their names."""
    if isinstance(section, str):
        return section
    lines = ["| what | value |", "|---|---|"]
    for key, value in section.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        lines.append(f"| {escaped(key)} | {escaped(text)} |")
    return "\n".join(lines)


def escaped(value: object) -> str:
    r"""Return a name or a value for the card, with nothing that Markdown or HTML would take up.

    >>> escaped("<b>|a*b[c]"), escaped("n02012849_x")
    ('\\<b\\>\\|a\\*b\\[c\\]', 'n02012849_x')
    """
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", shown(value).replace("\n", " "))
