"""Named, frozen configurations; :mod:`metapl.apps.experiments` runs them."""

from metapl.apps.recipes.base import Recipe, Task, from_dict
from metapl.apps.recipes.digits import Digits
from metapl.apps.recipes.image_folders import ImageFolders
from metapl.apps.recipes.image_recipe import ImageRecipe, Strong
from metapl.apps.recipes.noisy_folders import NoisyFolders
from metapl.apps.recipes.protocols import (
    PROTOCOL_RECIPES,
    Cifar10,
    Cifar10Paper,
    Imagenet10,
    Imagenet10Paper,
    Svhn,
    Vision,
)
from metapl.apps.recipes.settings import Feedback, Optimizer

_KINDS: tuple[type[Recipe], ...] = (Digits, ImageFolders, NoisyFolders, *PROTOCOL_RECIPES)
RECIPES: dict[str, type] = {kind.name: kind for kind in _KINDS}

__all__ = [
    "PROTOCOL_RECIPES",
    "RECIPES",
    "Cifar10",
    "Cifar10Paper",
    "Digits",
    "Feedback",
    "ImageFolders",
    "ImageRecipe",
    "Imagenet10",
    "Imagenet10Paper",
    "NoisyFolders",
    "Optimizer",
    "Recipe",
    "Strong",
    "Svhn",
    "Task",
    "Vision",
    "from_dict",
]
