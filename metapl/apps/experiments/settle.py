"""A recipe for a user's own pictures, with a value for all that was left open."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metapl.apps.experiments import budget
from metapl.apps.experiments.looking import Look, look
from metapl.apps.networks.weights import fetch_imagenet_weights
from metapl.apps.pictures.folders import scan_labeled
from metapl.apps.recipes.base import SELECTED_ON
from metapl.apps.recipes.image_folders import Changes, ImageFolders
from metapl.apps.recipes.image_recipe import IMAGENET, whole
from metapl.apps.recipes.ranges import require
from metapl.apps.recipes.self_training import SelfTraining
from metapl.apps.recipes.settings import OPEN
from metapl.training import Say

SET_ASIDE = 0.2
"""Part of the labeled pictures that is set aside to select on, where that is enough of them to tell anything."""

SMALLEST_SIDE, GREATEST_SIDE, PRETRAINED_SIDE = 16, 48, 128
"""Pixels to which pictures are brought: within the first two when a network starts from nothing, on a CPU."""

AGAIN = 2
"""How often the number of steps is measured again where parts of it were asked for."""

REHEARSED = 1000
"""Steps of the recipe that is measured: of such a recipe, a few are taken."""

MINUTES = 5.0
"""How long training may take where neither minutes nor steps are given."""

MANY_COPIES = 10
"""How often a picture may be in one batch before that is told."""

FEW_STEPS = 300
"""Steps below which a network that starts from nothing has hardly learned."""

PRETRAINED_NETWORK = "resnet18"

PHOTOGRAPHS = 128
"""Side in pixels from which on color pictures are taken for photographs."""

IMAGENET_WEIGHTS = "imagenet"


def settled(
    recipe: ImageFolders,
    before: ImageFolders | None = None,
    say: Say | None = None,
    check: Callable[[ImageFolders], None] | None = None,
) -> ImageFolders:
    """The recipe as it can be stored: whole paths, the classes that are found, and a value for every field.

    Args:
        recipe: as it was given.
        before: the recipe of the run that is resumed: what was chosen then is not chosen anew.
        say: takes what was chosen, and what may be better.
        check: refuses the recipe before any step of it is measured; the number of steps may be open still.
    """
    given, say = recipe, say or (lambda text: None)
    places: dict[str, Any] = {name: whole(getattr(given, name)) for name in given.places}
    labeled, unlabeled = given.trained_on()
    own = {"weights": _weights(given), "class_names": labeled.classes, "method": given.method.whole()}
    recipe = dataclasses.replace(given, **{**places, **own})
    if before is not None:
        kept = {name: getattr(before, name) for name in (*given.chosen, "minutes") if getattr(given, name) is None}
        kept["method"] = recipe.method.settled(vars(before.method))
        recipe = dataclasses.replace(recipe, **kept, changes=given.changes.settled(bool(before.changes.recolor)))
        return recipe.for_network(recipe.network_name)
    given.check_first()
    _note_repeats(given, len(labeled), say)
    seen = look([*map(Path, labeled.paths())], labeled.targets(), [*map(Path, unlabeled.paths())])
    recipe = fitted(recipe, seen)
    if check is not None:
        check(recipe)
    if recipe.grey and (given.changes.hue is not None or given.changes.saturation != Changes.saturation):
        say("note: the pictures are grey, and changes of hue and saturation have no effect")
    recipe = _with_steps(recipe)
    say(chosen(recipe, seen))
    if given.steps is OPEN and recipe.steps < FEW_STEPS:
        say(f"note: {recipe.steps} steps are few, for this machine is slow or busy: give more --minutes, or --steps")
    if seen.colors.may_tell and given.changes.recolor is None and not (recipe.grey or recipe.randaugment):
        say(
            f"note: by their colors alone {seen.colors.right:.0%} of the labeled pictures are told apart, and by "
            f"chance {seen.colors.chance:.0%}, so colors may matter, and are exchanged: if they do, give "
            "--changes.recolor False"
        )
    if recipe.weights is None and not recipe.grey and seen.side >= PHOTOGRAPHS:
        say("for photographs a network that was trained on photographs is better: --weights imagenet")
    return recipe


def _note_repeats(recipe: ImageFolders, count: int, say: Say) -> None:
    """Tell of a batch that is far larger than the number of pictures it is drawn from: it is slow."""
    size = getattr(recipe, recipe.batch_of_few)
    if size > MANY_COPIES * count:
        flag = f"--{recipe.batch_of_few.replace('_', '-')}"
        say(
            f"note: {flag} {size:,} is {size // count:,} times the {count:,} pictures that it is drawn from: each "
            "is in every batch so often, and each copy costs the time of a picture"
        )


def _weights(recipe: ImageFolders) -> str | None:
    """The file of weights."""
    if recipe.weights == IMAGENET_WEIGHTS:
        return str(fetch_imagenet_weights(recipe.network_name or PRETRAINED_NETWORK))
    return whole(recipe.weights)


def _with_steps(recipe: ImageFolders) -> ImageFolders:
    """The recipe with the number of steps that fit into its minutes, where it is open."""
    if recipe.steps is not OPEN:
        # The minutes of a recipe whose steps were given decide nothing: they stay open.
        return dataclasses.replace(recipe.scheduled(recipe.steps), minutes=OPEN)
    # Phases that were given in steps do not grow with the number of steps: it is measured again with what fits.
    asked = max(getattr(recipe.method, name, 0) or 0 for name in ("wait", "uda_start"))
    minutes = recipe.minutes or MINUTES
    steps = budget.steps_within(recipe.scheduled(2 * asked or REHEARSED), minutes)
    for _ in range(AGAIN if asked else 0):
        steps = budget.steps_within(recipe.scheduled(max(steps, asked + 1)), minutes)
    return dataclasses.replace(recipe.scheduled(steps), minutes=minutes)


def fitted(recipe: ImageFolders, seen: Look) -> ImageFolders:
    """The recipe for such pictures, but for what depends on the number of steps."""
    grey = seen.grey and recipe.weights is None if recipe.grey is None else recipe.grey
    channels = 1 if grey else 3
    aside = round(SET_ASIDE * len(scan_labeled(recipe.labeled))) if not recipe.val else 0
    mean: tuple[float, ...]
    std: tuple[float, ...]
    if grey:
        mean, std = seen.level[:1], seen.level[1:]
    elif recipe.weights is None:
        mean, std = (part * 3 if seen.grey else part for part in (seen.mean, seen.std))
    else:
        mean, std = IMAGENET
    choices: dict[str, Any] = {
        "grey": grey,
        "image_size": PRETRAINED_SIDE
        if recipe.weights
        else 4 * round(min(max(seen.side, SMALLEST_SIDE), GREATEST_SIDE) / 4),
        "network_name": PRETRAINED_NETWORK if recipe.weights else "pooled_cnn",
        # Too few to select on train better.
        "val_fraction": SET_ASIDE if aside >= SELECTED_ON else 0.0,
        "mean": mean,
        "std": std,
    }
    missing = {name: value for name, value in choices.items() if getattr(recipe, name) is None}
    missing["method"] = recipe.method.settled({"uda_prior": seen.shares})
    recipe = dataclasses.replace(recipe, **missing, changes=recipe.changes.settled(seen.exchangeable))
    for name in ("mean", "std"):
        expected = f"{channels} for {'grey' if grey else 'color'} pictures"
        require(recipe, len(getattr(recipe, name)) == channels, name, expected)
    return recipe.for_network(recipe.network_name)


def chosen(recipe: ImageFolders, seen: Look | None = None) -> str:
    """What was chosen, in a line, and what pictures that were looked at lose by it; each has a flag."""
    optimizer = recipe.method.optimizers()[recipe.method.built_as]
    size, kind = f"{recipe.image_size}x{recipe.image_size}", "grey" if recipe.grey else "color"
    if recipe.randaugment:
        mirrored = "not mirrored" if recipe.strong.writing else "mirrored (not with --strong.writing)"
        changed = f"changed by RandAugment, {mirrored}"
    else:
        colors = f"{'light and dark' if recipe.grey else 'colors'} {'exchanged' if recipe.changes.recolor else 'kept'}"
        changed = f"{colors}, {'mirrored' if recipe.changes.mirror else 'not mirrored'}"
    rounds = recipe.method.selection
    networks = (", then ".join(rounds.networks) if isinstance(rounds, SelfTraining) else "") or recipe.network_name
    return (
        f"chosen: {networks} on {size} {kind} pictures{_lost(recipe, seen)}, {changed}; "
        f"{optimizer.algorithm} at {optimizer.lr:g}, {recipe.precision}, {recipe.steps:,} steps"
    )


def _lost(recipe: ImageFolders, seen: Look | None) -> str:
    """What pictures lose when they are brought to their size, in parentheses."""
    cut = ["cut to squares"] if seen is not None and not seen.square else []
    shrunk = [f"shrunk from about {seen.side}"] if seen is not None and seen.side > recipe.image_size else []
    return f" ({', '.join(cut + shrunk)})" if cut or shrunk else ""
