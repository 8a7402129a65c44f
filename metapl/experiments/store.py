"""Recipes on disk: as they ran, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from metapl.errors import MetaplError
from metapl.metrics import Evaluation
from metapl.recipes import RECIPES, ImageFolders, from_dict
from metapl.recipes.base import Recipe
from metapl.runs.folder import RunFolder

TOLD = ("delivered", "delivered_by", "validation_size", "seed", "method")
"""What every ``result.json`` says of the networks in its folder."""


def describe(recipe: Recipe, **run_by: Any) -> dict[str, Any]:
    """A recipe as plain values, with its name and how it is run."""
    return {"name": recipe.name, **run_by, "fields": dataclasses.asdict(recipe)}


def stored(folder: RunFolder) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a run folder, and its whole description."""
    file = folder.path / "recipe.json"
    try:
        description = folder.recipe()
        kind = RECIPES.get(description["name"])
        if kind is None:
            raise MetaplError(
                f"{folder.path} is a run of the recipe {description['name']!r}, which this metapl does not have; it "
                f"has {', '.join(RECIPES)}."
            )
        recipe: Recipe = from_dict(kind, description["fields"])
    except (AttributeError, KeyError, TypeError) as error:
        raise MetaplError(f"{file} is damaged: {type(error).__name__}, {error}.") from error
    if isinstance(recipe, ImageFolders) and not recipe.complete:
        missing = ", ".join(name for name in recipe.chosen if getattr(recipe, name) is None)
        raise MetaplError(f"{file} is damaged: it has no value for {missing}.")
    return recipe, description


def stored_result(folder: RunFolder) -> dict[str, Any]:
    """What the ``result.json`` of a run folder holds.

    Raises:
        MetaplError: it is missing, damaged, or of another version.
    """
    result, file = folder.read_json("result.json"), folder.path / "result.json"
    if not isinstance(result, dict) or not result.keys() >= set(TOLD):
        raise MetaplError(f"{file} is damaged: it does not say {', '.join(TOLD)}.")
    try:
        if "evaluation" in result:
            Evaluation(**result["evaluation"])
    except TypeError as error:
        why = str(error).removeprefix("Evaluation.__init__() ")
        raise MetaplError(f"{file} is damaged or of another version: its evaluation {why}.") from error
    return result
