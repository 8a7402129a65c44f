"""The commands by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

COMMANDS = (
    "train",
    "noisy-student",
    "ablate",
    "plan",
    "evaluate",
    "predict",
    "finetune",
    "compare",
    "export",
    "label",
    "labels",
    "shards",
)


def after_training(command: str) -> type[Callable[[], int]]:
    """The class of a command that works on a finished run; it is imported when it is asked for."""
    kind: type[Callable[[], int]] = getattr(import_module(f"metapl.cli.{command}"), command.capitalize())
    return kind
