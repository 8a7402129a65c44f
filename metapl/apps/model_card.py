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

from metapl.apps.report import spoken
from metapl.apps.run_folder import EndedRun, counts_of, stored_data
from metapl.words import shown

# The files of an export, and what one in the form of the Hugging Face hub has instead.
WEIGHTS = "model.safetensors"
PROGRAM = "model.pt2"
CARD = "MODEL_CARD.md"
HUB_CONFIG = "config.json"
HUB_CARD = "README.md"


def sections_of(run: EndedRun, name: str) -> dict[str, Any]:
    """Return what a model card says of one of a run's networks, by the heads of its sections.

    Figures are of this network, and of no others; of the places of files, the last names are left.
    """
    result = run.result
    card = run.cards[name]
    data = stored_data(run.source)
    tested = result.get("evaluation") or {}
    sizes: dict[str, Any] = {
        "test": tested.get("n"),
        "validation": result.get("validation_size"),
    }
    figures = {}
    for part, size in sizes.items():
        share = result.get(f"{name}_{part}_accuracy")
        if share is None:
            continue
        # Without a number of examples there is no interval.
        is_counted = size is not None
        figures[f"{part} accuracy"] = (
            spoken(share, size, None) if is_counted else f"{100 * share:.1f} %"
        )
    settings = {}
    for field, value in run.source.recipe().get("fields", {}).items():
        if field == "classes":
            continue
        is_path = isinstance(value, str) and "/" in value
        settings[field] = PurePath(value).name if is_path else value
    recipe = {"name": result["recipe"], "method": result["method"], "fields": settings}
    recipe_text = json.dumps(recipe, indent=2, sort_keys=True, default=str)
    when = f"step {result['best_step']:,} of {result['steps']:,}"
    if name == "teacher":
        when = "the last step"
    hashes = {f"SHA-256 of {part}": digest for part, digest in data["hash"].items()}
    notes = f"- The weights are those of the {card.title}, of {when}.\n- {card.input.note}"
    return {
        "Metrics": figures,
        "Data": {**counts_of(data), **hashes},
        "Recipe": f"```json\n{recipe_text}\n```",
        "Notes": notes,
    }


def versions_of(*more: str) -> dict[str, str]:
    """Return the versions of Python, of what builds and runs networks, and of more packages."""
    versions = {"python": platform.python_version()}
    for package in ("metapl", "torch", "torchvision", "timm", *more):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def markdown_of(sections: Mapping[str, str | Mapping[str, Any]]) -> str:
    """Return the sections of a model card in Markdown, figures and texts by their names as tables.

    >>> print(markdown_of({"Notes": "- one"}).strip())
    ## Notes
    <BLANKLINE>
    - one
    """
    text = ""
    for name, section in sections.items():
        if isinstance(section, str):
            text += f"\n## {name}\n\n{section}\n"
            continue
        rows = ""
        for key, value in section.items():
            value_text = f"{value:.6g}" if isinstance(value, float) else str(value)
            rows += f"\n| {escaped(key)} | {escaped(value_text)} |"
        text += f"\n## {name}\n\n| what | value |\n|---|---|{rows}\n"
    return text


def escaped(value: object) -> str:
    r"""Return a name or a value for the card, with nothing that Markdown or HTML would take up.

    >>> escaped("<b>|a*b[c]"), escaped("n02012849_x")
    ('\\<b\\>\\|a\\*b\\[c\\]', 'n02012849_x')
    """
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", shown(value).replace("\n", " "))
