"""The settings of a network that are no tensors, and that a checkpoint holds beside its weights.

Finetuning in stages freezes and thaws layers, and puts batch norms into evaluation, while a fit
runs. A resumed run builds its networks anew, as they were when the first one began.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from metapl.errors import MetaplError, few

NetworkSettings = Mapping[str, Any]

# The names of frozen parameters, and of each module its class and its numbers, by name.
FROZEN = "frozen"
CLASSES = "classes"
NUMBERS = "numbers"


def network_settings(network: nn.Module) -> dict[str, Any]:
    """Return what is frozen, the class of each module, and its attributes that are numbers.

    ``training`` is one of these numbers, as are the rate of a dropout and a counter of a user's
    own. A private attribute is none: PyTorch has its own there.
    """
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    classes: dict[str, str] = {}
    numbers: dict[str, dict[str, bool | int | float]] = {}
    for name, module in network.named_modules():
        classes[name] = class_name(module)
        numbers[name] = numbers_of(module)
    return {FROZEN: frozen, CLASSES: classes, NUMBERS: numbers}


def set_network_settings(network: nn.Module, settings: NetworkSettings, role: str) -> None:
    """Give a network the settings that :func:`network_settings` has returned.

    Args:
        network: of the same modules.
        settings: of the network that was saved.
        role: of the network, for an error.

    Raises: MetaplError for a module of another class, or one without a number that was saved.
    """
    modules = dict(network.named_modules())
    for name, saved_class in settings[CLASSES].items():
        place = f"{role}.{name}" if name else role
        if name not in modules:
            raise MetaplError(f"it has a {saved_class} at {place}, where the trainer has nothing")
        module = modules[name]
        if class_name(module) != saved_class:
            raise MetaplError(
                f"its {place} is a {saved_class}, and the trainer's {class_name(module)}"
            )
        missing = settings[NUMBERS][name].keys() - vars(module).keys()
        if missing:
            raise MetaplError(
                f"its {place} has a number {min(missing)}, and the trainer's has none"
            )
    for name, p in network.named_parameters():
        is_trained = name not in settings[FROZEN]
        if p.requires_grad != is_trained:
            p.requires_grad_(is_trained)
    for name, saved_numbers in settings[NUMBERS].items():
        current_numbers = numbers_of(modules[name])
        for attribute, number in saved_numbers.items():
            if current_numbers.get(attribute) != number:
                setattr(modules[name], attribute, number)


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class; sharding puts a prefix before it."""
    return type(module).__name__.removeprefix("FSDP")


def numbers_of(module: nn.Module) -> dict[str, bool | int | float]:
    """Return the public attributes of a module that are numbers."""
    numbers: dict[str, bool | int | float] = {}
    for attribute, value in vars(module).items():
        if isinstance(value, bool | int | float) and not attribute.startswith("_"):
            numbers[attribute] = value
    return numbers


def changed_by_evaluation(network: nn.Module) -> list[str]:
    """Return what a network does otherwise that is in evaluation mode as a whole, in words.

    Networks come so from ``from_pretrained`` and most hubs; a wrapper around such a network may be
    in training itself. Of a network whose batch norms alone were put into evaluation it is nothing:
    other layers of it train.
    """
    layers = [module for module in network.modules() if not any(True for _ in module.children())]
    if any(layer.training for layer in layers):
        return []
    changes = []
    if any(isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0 for layer in layers):
        changes.append("its dropout is off")
    norms = [layer for layer in layers if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if any(norm.track_running_stats for norm in norms):
        changes.append("the statistics of its batch norms stay")
    return changes


def restored_in_words(before: NetworkSettings, after: NetworkSettings) -> list[str]:
    """Return what a checkpoint has changed in a network's settings, in words."""
    changes = []
    for words, names in (
        ("frozen again", {*after[FROZEN]} - {*before[FROZEN]}),
        ("trained again", {*before[FROZEN]} - {*after[FROZEN]}),
    ):
        if names:
            changes.append(f"{words}: {few(sorted(names), 3)}")
    numbers = []
    for name, numbers_after in after[NUMBERS].items():
        for attribute, number in numbers_after.items():
            if before[NUMBERS].get(name, {}).get(attribute) != number:
                numbers.append(f"{name}.{attribute} = {number}".lstrip("."))
    if numbers:
        changes.append(f"set again: {few(numbers, 3)}")
    return changes
