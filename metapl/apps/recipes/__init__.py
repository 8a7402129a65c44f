"""Named, frozen configurations; :mod:`metapl.apps.experiments` runs them."""

from metapl.apps.recipes.base import Recipe, Task
from metapl.apps.recipes.digits import Digits
from metapl.apps.recipes.image_folders import ImageFolders
from metapl.apps.recipes.image_recipe import ImageRecipe, Strong
from metapl.apps.recipes.noisy_folders import NoisyFolders
from metapl.apps.recipes.settings import Feedback, Optimizer

_KINDS: tuple[type[Recipe], ...] = (Digits, ImageFolders, NoisyFolders)
RECIPES: dict[str, type] = {kind.name: kind for kind in _KINDS}

__all__ = [
    "RECIPES",
    "Digits",
    "Feedback",
    "ImageFolders",
    "ImageRecipe",
    "NoisyFolders",
    "Optimizer",
    "Recipe",
    "Strong",
    "Task",
]
