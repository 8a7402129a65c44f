"""timm's networks, where timm is installed."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from metapl.apps.networks.family import Family, Sizes
from metapl.errors import MetaplError, require_extra

_OWN_NAMES = {"drop_rate": "dropout", "drop_path_rate": "stochastic_depth", "in_chans": "in_channels"}
"""What timm's arguments are called here."""


def _build(a: Sizes) -> nn.Module:
    return _made(a)[0]


def _made(a: Sizes) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and the arguments that timm took for it."""
    require_extra("timm", f"{a.name} needs", "timm")
    import timm

    name = a.name.removeprefix("timm:")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.0)
        raise MetaplError(
            f"timm {timm.__version__} has no network {name!r}; the likest of those it has: {', '.join(near)}."
        )
    fields = _fields(a)
    while True:
        try:
            return timm.create_model(name, pretrained=False, **fields), fields
        except TypeError as error:
            refused = next((field for field in fields if f"'{field}'" in str(error)), None)
            if refused == "img_size":  # a network that takes any
                del fields["img_size"]
            elif refused in _OWN_NAMES:
                raise MetaplError(f"{a.name} has no {_OWN_NAMES[refused]}; leave it out.") from error
            else:
                raise


def _fields(a: Sizes) -> dict[str, Any]:
    """The arguments for timm: only what differs from its defaults, for not every network takes every argument."""
    fields: dict[str, Any] = {"num_classes": a.num_classes}
    fields |= {"in_chans": a.in_channels} if a.in_channels != 3 else {}
    fields |= {"drop_rate": a.dropout} if a.dropout > 0 else {}
    fields |= {"drop_path_rate": a.stochastic_depth} if a.stochastic_depth > 0 else {}
    fields |= {"img_size": a.image_size} if a.image_size is not None else {}
    return fields


def _code(a: Sizes) -> list[str]:
    """A line that needs timm alone; noise is left out, for it acts in training only and has no weights."""
    with torch.device("meta"):
        _, fields = _made(a)
    given = "".join(f", {k}={v}" for k, v in fields.items() if k not in ("drop_rate", "drop_path_rate"))
    return [f'model = timm.create_model("{a.name.removeprefix("timm:")}"{given})']


def _heads(module: nn.Module) -> tuple[str, ...]:
    """The classifier, or the several of a distilled network."""
    classifier = module.get_classifier()  # type: ignore[operator]  # every network of timm has it
    wanted = {id(m) for m in (classifier if isinstance(classifier, tuple) else (classifier,))}
    return tuple(name for name, part in module.named_modules() if id(part) in wanted)


FAMILY = Family(library="timm", build=_build, code=_code, heads=_heads, dropout=True, stochastic_depth=True)
