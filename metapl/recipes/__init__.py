"""Named, frozen configurations, and what runs them."""

from metapl.recipes.base import SGD, Feedback, Recipe, Task, from_dict
from metapl.recipes.digits import Digits
from metapl.recipes.images import ImageFolders

RECIPES: dict[str, type] = {"digits": Digits, "images": ImageFolders}
"""Recipes by name."""

__all__ = ["RECIPES", "SGD", "Digits", "Feedback", "ImageFolders", "Recipe", "Task", "from_dict"]
