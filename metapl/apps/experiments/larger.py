"""Finetuning at a larger resolution: the last student of Noisy Student on pictures as they are, first layers frozen."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from metapl.apps.experiments.fits import Fit, finetune_by_cosine
from metapl.apps.pictures import LabeledBatches
from metapl.apps.pictures.views.base import Identity
from metapl.apps.recipes import ImageRecipe
from metapl.apps.recipes.base import Recipe, Task
from metapl.apps.recipes.self_training import SelfTraining
from metapl.data.draws import fold_in
from metapl.errors import MetaplError
from metapl.training import FitResult

PHASE = "resolution"


def at_larger_size(recipe: Recipe, settings: SelfTraining) -> Recipe:
    """The recipe with the pictures that the last student is finetuned on.

    Args:
        recipe: with the network of the last round.

    Raises:
        MetaplError: the size is not larger, the recipe has no pictures of other sizes or no finetuning steps, or the
            network is built for one size.
    """
    size = settings.finetune_size
    assert size is not None
    if not isinstance(recipe, ImageRecipe):
        raise MetaplError(f"--finetune-size {size}: the pictures of {recipe.name} have one size; leave it out.")
    if size <= (recipe.image_size or 0):
        raise MetaplError(
            f"--finetune-size {size}: expected more pixels than the {recipe.image_size} of --image-size, which the "
            "student is trained on."
        )
    if recipe.finetune_steps < 1:
        raise MetaplError(f"--finetune-size {size} was given with --finetune-steps 0; expected 1 step or more.")
    changed: dict[str, Any] = {"image_size": size}
    larger: Recipe = dataclasses.replace(recipe, **changed)
    _ = recipe.classes  # some recipes read their data for them, which must not be done on the meta device
    with torch.device("meta"):
        shapes = [
            {name: value.shape for name, value in sized.network("teacher").state_dict().items()}
            for sized in (recipe, larger)
        ]
    if shapes[0] != shapes[1]:
        raise MetaplError(
            f"--finetune-size {size}: {recipe.network_name} is built for pictures of one size; expected a network that "
            "takes any, such as small_cnn, a resnet or an efficientnet."
        )
    return larger


def freeze(network: nn.Module, share: float) -> int:
    """Freeze the first layers of a network, with the statistics of their norms; how many there are.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, 2))
    >>> freeze(network, 0.5), [p.requires_grad for p in network.parameters()][::2]
    (2, [False, False, True, True])
    """
    layers = [part for part in network.modules() if any(True for _ in part.parameters(recurse=False))]
    frozen = layers[: int(share * len(layers))]
    for layer in frozen:
        layer.eval()
        for p in layer.parameters(recurse=False):
            p.requires_grad_(False)
    return len(frozen)


def finetuned_larger(recipe: Recipe, settings: SelfTraining, student: nn.Module, task: Task, fit: Fit) -> FitResult:
    """Finetune the last student where it is, by a recipe of :func:`at_larger_size` and the data of that.

    Source: Noisy Student, "Fixing the train-test resolution discrepancy"; it does not tell which layers are frozen.
    """
    labeled, seed = task.finetuning, fold_in(recipe.seed, settings.rounds + 1)
    assert isinstance(labeled, LabeledBatches)
    torch.manual_seed(seed)
    freeze(student, settings.frozen)
    source = dataclasses.replace(labeled, view=Identity(), crop=None)
    return finetune_by_cosine(student, recipe, source, task, fit, PHASE)[1]
