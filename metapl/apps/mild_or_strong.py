"""How pictures with wrong labels are augmented: mildly or strongly, whichever a trial finds.

One network learns the labels as they are with mild augmentation, and another one with strong
augmentation, both shortly. Neither has learned the clean pictures, on which they are measured.
``metapl train images`` has no picture to spare, and tries recipes on folds of its labels
(:mod:`metapl.apps.tournament`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from metapl.apps.noisy_labels import PLAIN, Noisy
from metapl.apps.tournament import (
    MEASURED_AT_ONCE,
    MILD,
    STRONG,
    Recipe,
    Standing,
    measure_linear_advantage,
    most_promising_first,
)
from metapl.machine import device
from metapl.metrics import predict_logits
from metapl.metrics.predictions import batches_of
from metapl.pictures.batches import EvaluationBatches
from metapl.training.loss_trainer import LossTrainer

# The recipes that are tried. Both are then trained by the same method, so that strong changes,
# which learn slowly, have a smaller head start than where UDA follows them. As in the race, a
# linear layer on the pixels takes it away.
TRIED = (MILD, dataclasses.replace(STRONG, head_start=3.0))

# The share of the time, or of the steps, that both trials take together.
TRIAL_SHARE = 0.125


def trials(configs: Sequence[Noisy]) -> list[Standing]:
    """Return what each recipe of :data:`TRIED` reaches on the clean pictures, the best one first.

    Args:
        configs: the settings of each recipe, with the steps of its trial. They name the same
            pictures.
    """
    # The pictures are read by the first settings. Each trial has views of them by its own.
    few, many = (configs[0].scan(name) for name in configs[0].few_and_many)
    sources = configs[0].sources(few, many, None)
    standings = [
        standing_of(recipe, config, sources) for recipe, config in zip(TRIED, configs, strict=True)
    ]
    clean = sources["labeled"]
    advantage = measure_linear_advantage(clean.images, clean.labels, seed=configs[0].fitting.seed)
    return most_promising_first(standings, advantage)


def standing_of(recipe: Recipe, config: Noisy, sources: Mapping[str, Any]) -> Standing:
    """Train a network on the labels as they are, and measure it on the clean pictures.

    Args:
        recipe: the recipe.
        config: its settings, with the steps of the trial.
        sources: the pictures that may have wrong labels, as ``unlabeled``, and the clean ones, as
            ``labeled``. Their files are read once for all recipes.
    """
    fitting = config.fitting
    views = config.pictures.views()
    noisy = dataclasses.replace(sources["unlabeled"], view=views.labeled, crop=views.crop)
    clean = sources["labeled"]
    place = device(fitting.device)
    torch.manual_seed(fitting.seed)
    network = config.network().to(place)
    trainer = LossTrainer(
        network, PLAIN, optimizer=config.optimizer("teacher", network), **config.trainer_options()
    )
    result = trainer.fit(noisy, None, steps=fitting.chosen_steps, **fitting.options())
    network.load_state_dict(dict(result.weights))
    examples = EvaluationBatches(clean.images, clean.labels, MEASURED_AT_ONCE)
    logits_NC, labels_N = predict_logits(network, batches_of(examples, place))
    return Standing(recipe=recipe, probabilities=logits_NC.float().softmax(1), labels=labels_N)
