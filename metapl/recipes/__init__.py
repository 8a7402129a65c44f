"""Named, frozen configurations; :mod:`metapl.experiments` runs them."""

from metapl.recipes.base import Feedback, Optimizer, Recipe, Task, from_dict
from metapl.recipes.digits import Digits
from metapl.recipes.image_folders import ImageFolders
from metapl.recipes.image_recipe import ImageRecipe, Strong
from metapl.recipes.noisy_folders import NoisyFolders
from metapl.recipes.protocols import (
    PROTOCOL_RECIPES,
    Cifar10,
    Cifar10Paper,
    Imagenet10,
    Imagenet10Paper,
    Svhn,
    Vision,
)
from metapl.recipes.two_moons import TwoMoons

RECIPES: dict[str, type] = {
    Digits.name: Digits,
    ImageFolders.name: ImageFolders,
    NoisyFolders.name: NoisyFolders,
    **{kind.name: kind for kind in PROTOCOL_RECIPES},
}
"""Recipes by name."""

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
    "TwoMoons",
    "Vision",
    "from_dict",
]
