"""The settings of a network that are no weights, and that a checkpoint holds beside these.

Finetuning in stages freezes and thaws layers, and puts batch norms into evaluation, while a fit
runs. A resumed run builds its networks anew, as they were when the first one began.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from metapl.data.held_values import (
    BEYOND,
    LOST,
    Walk,
    held_values,
    put_values,
    same,
    unsaved,
)
from metapl.errors import MetaplError, few

NetworkSettings = Mapping[str, Any]

# The names of frozen parameters, and of each module its class and its attributes, by name.
FROZEN = "frozen"
CLASSES = "classes"
VALUES = "values"

CPU = torch.device("cpu")

# The functions of torch.nn.functional that drop in training.
DROPOUTS = {name for name in vars(nn.functional) if "dropout" in name}


def network_settings(
    network: nn.Module, registered: Container[int] | None = None
) -> dict[str, Any]:
    """Return what is frozen, the class of each module, and its attributes that are values.

    ``training`` is one of these values, as are the rate of a dropout, a counter, a queue of
    features in a list, and buffers that are in no ``state_dict``. Their tensors share their memory
    with those of the network.

    Args:
        registered: the ids of tensors and modules that are saved elsewhere; default the network's.
    """
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    walk = Walk(registered_in(network) if registered is None else registered)
    classes: dict[str, str] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, module in network.named_modules():
        classes[name] = class_name(module)
        values[name] = held_values(module, walk)
    return {FROZEN: frozen, CLASSES: classes, VALUES: values}


def registered_in(network: nn.Module) -> set[int]:
    """Return the ids of what a network's ``state_dict`` holds, and of its modules.

    A buffer that was registered with ``persistent=False`` is in none; passes may move it too.
    """
    registered = {id(t) for t in chain(network.modules(), network.parameters(), network.buffers())}
    for module in network.modules():
        registered -= {id(module._buffers[name]) for name in module._non_persistent_buffers_set}
    return registered


def buffers_beside(network: nn.Module) -> dict[str, Tensor]:
    """Return copies of the buffers that are in no ``state_dict``, by their names."""
    found: dict[str, Tensor] = {}
    for place, module in network.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            t = module._buffers[name]
            if t is not None:
                found[f"{place}.{name}".lstrip(".")] = t.detach().clone()
    return found


def put_buffers_beside(network: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Give a network the buffers that :func:`buffers_beside` has returned."""
    for name, t in buffers.items():
        place, _, own_name = name.rpartition(".")
        put_values(network.get_submodule(place), {own_name: t}, device=t.device)


def set_network_settings(network: nn.Module, settings: NetworkSettings, role: str) -> None:
    """Give a network the settings that :func:`network_settings` has returned.

    Args:
        network: of the same modules.
        settings: of the network that was saved.
        role: of the network, for an error.

    Raises: MetaplError for a module of another class.
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
    for name, p in network.named_parameters():
        is_trained = name not in settings[FROZEN]
        if p.requires_grad != is_trained:
            p.requires_grad_(is_trained)
    device = next((t.device for t in chain(network.parameters(), network.buffers())), CPU)
    for name, saved_values in settings[VALUES].items():
        put_values(modules[name], saved_values, device=device)


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class; sharding puts a prefix before it."""
    return type(module).__name__.removeprefix("FSDP")


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
    modules = list(network.modules())
    if any(drops_in_training(module) for module in modules):
        changes.append("its dropout is off")
    if any(getattr(module, "running_mean", None) is not None for module in modules):
        changes.append("the statistics of its norms stay")
    return changes


def drops_in_training(module: nn.Module) -> bool:
    """Return whether a module drops by a rate in its attributes, or in code of its own.

    Rates are those of dropout, recurrent layers, attention, and paths that are dropped. Code is
    that of methods which call a function such as ``F.dropout`` and read ``training``.
    """
    rates = []
    for name, value in vars(module).items():
        if (name == "p" or "drop" in name) and type(value) in (float, int):
            rates.append(value)
    if rates:
        return any(0 < rate < 1 for rate in rates)
    for kind in type(module).__mro__:
        # Those of torch have their rates in attributes.
        if kind.__module__.partition(".")[0] == "torch":
            continue
        for method in vars(kind).values():
            code = getattr(method, "__code__", None)
            names = () if code is None else code.co_names
            # Of a name that the module has too, that one is called.
            functions = [name for name in names if name in DROPOUTS and not hasattr(module, name)]
            if functions and "training" in names:
                return True
    return False


def unsaved_in_words(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return what may be state of networks, problem or losses and is not restored, in words.

    Args:
        saved: the trainer's state in the checkpoint.
        current: its state now.
    """
    words = []
    for role, settings in current["settings"].items():
        for name, values in settings[VALUES].items():
            saved_values = saved["settings"][role][VALUES].get(name, {})
            for place, reason in unsaved(saved_values, values, name):
                words.append(f"the {role}'s {place} ({reason})")
    for role, values in current["held"].items():
        for place, reason in unsaved(saved["held"].get(role, {}), values):
            words.append(f"the {role}'s {place} ({reason})")
    return words


def restored_in_words(before: NetworkSettings, after: NetworkSettings) -> list[str]:
    """Return what a checkpoint has changed in a network's settings, in words."""
    changes = []
    for words, names in (
        ("frozen again", {*after[FROZEN]} - {*before[FROZEN]}),
        ("trained again", {*before[FROZEN]} - {*after[FROZEN]}),
    ):
        if names:
            changes.append(f"{words}: {few(sorted(names), 3)}")
    values = []
    for name, values_after in after[VALUES].items():
        values_before = before[VALUES].get(name, {})
        for attribute, value in values_after.items():
            if attribute in (BEYOND, LOST):
                continue
            if attribute not in values_before or not same(values_before[attribute], value):
                number = f" = {value}" if isinstance(value, bool | int | float | str) else ""
                values.append(f"{name}.{attribute}{number}".lstrip("."))
    if values:
        changes.append(f"set again: {few(values, 3)}")
    return changes
