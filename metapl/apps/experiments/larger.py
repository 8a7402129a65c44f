"""Finetuning at a larger resolution: the last student of Noisy Student on pictures as they are, first layers frozen."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from metapl.apps.pictures import LabeledBatches
from metapl.apps.pictures.views.base import Identity
from metapl.apps.recipes.base import Phase, Recipe, Task
from metapl.apps.recipes.methods.noisy_student import finetuning
from metapl.apps.recipes.self_training import SelfTraining
from metapl.data.draws import fold_in

PHASE = "resolution"


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


def finetuned_larger(recipe: Recipe, settings: SelfTraining, student: nn.Module, task: Task) -> Phase:
    """The phase that finetunes the last student where it is, by a recipe at a larger size and the data of that.

    Source: Noisy Student, "Fixing the train-test resolution discrepancy"; it does not tell which layers are frozen.
    """
    labeled, seed = task.finetuning, fold_in(recipe.seed, settings.rounds + 1)
    assert isinstance(labeled, LabeledBatches)
    torch.manual_seed(seed)
    freeze(student, settings.frozen)
    source = dataclasses.replace(labeled, view=Identity(), crop=None)
    return finetuning(recipe, student, source, task, PHASE)
