"""What the model cards of exported networks say: figures, data, recipe and versions."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import Any

from metapl.apps.run_folder import EndedRun, counts_of, stored_data
from metapl.apps.run_summary import spoken
from metapl.words import shown

# The files of an export, and what one in the form of the Hugging Face hub has instead.
WEIGHTS = "model.safetensors"
PROGRAM = "model.pt2"
CARD = "MODEL_CARD.md"
HUB_CONFIG = "config.json"
HUB_CARD = "README.md"


def sections_of(run: EndedRun, name: str) -> dict[str, Any]:
    """Return what the card says of a network of a run: its figures, data, recipe and notes.

    The figures are those of this network, and of no others.
    """
    result = run.result
    sizes: dict[str, int | None] = {
        "test": (result.get("evaluation") or {}).get("n"),
        "validation": result.get("validation_size"),
    }
    metrics: dict[str, str] = {}
    for part, size in sizes.items():
        accuracy = result.get(f"{name}_{part}_accuracy")
        if accuracy is None:
            continue
        if size is None:
            metrics[f"{part} accuracy"] = f"{100 * accuracy:.1f} %"
        else:
            metrics[f"{part} accuracy"] = spoken(accuracy, size, None)
    data = stored_data(run.source)
    about_data: dict[str, Any] = dict(counts_of(data))
    for part, digest in data["hash"].items():
        about_data[f"SHA-256 of {part}"] = digest
    fields: dict[str, Any] = {}
    for field, value in run.source.recipe().get("fields", {}).items():
        if field == "classes":
            continue
        # Of the place of a file, the last name alone is left.
        is_place = isinstance(value, str) and "/" in value
        fields[field] = PurePath(value).name if is_place else value
    recipe = {"name": result["recipe"], "method": result["method"], "fields": fields}
    recipe_json = json.dumps(recipe, indent=2, sort_keys=True, default=str)
    card = run.cards[name]
    step = f"step {result['best_step']:,} of {result['steps']:,}"
    if name == "teacher":
        step = "the last step"
    return {
        "Metrics": metrics,
        "Data": about_data,
        "Recipe": f"```json\n{recipe_json}\n```",
        "Notes": f"- The weights are those of the {card.title}, of {step}.\n- {card.input.note}",
    }


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
