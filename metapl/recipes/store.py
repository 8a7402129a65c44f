"""Recipes on disk: as they ran, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from metapl.errors import MetaplError
from metapl.recipes import RECIPES, from_dict
from metapl.recipes.base import Recipe
from metapl.run_folder import RunFolder


def describe(recipe: Recipe, **how: Any) -> dict[str, Any]:
    """A recipe as plain values, with its name and how it is run."""
    return {"name": recipe.name, **how, "fields": dataclasses.asdict(recipe)}  # type: ignore[call-overload]


def stored(folder: RunFolder) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a run folder, and its whole description."""
    description = folder.recipe()
    kind = RECIPES.get(description["name"])
    if kind is None:
        raise MetaplError(
            f"{folder.path} is a run of the recipe {description['name']!r}, which this metapl does not have; it has "
            f"{', '.join(RECIPES)}."
        )
    recipe: Recipe = from_dict(kind, description["fields"])
    return recipe, description
