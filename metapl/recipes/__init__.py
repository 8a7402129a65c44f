"""Named, frozen configurations, and what runs them."""

from metapl.recipes.base import SGD, Feedback, Recipe, Task, from_dict
from metapl.recipes.digits import Digits

RECIPES: dict[str, type] = {"digits": Digits}
"""Recipes by name."""

__all__ = ["RECIPES", "SGD", "Digits", "Feedback", "Recipe", "Task", "from_dict"]
