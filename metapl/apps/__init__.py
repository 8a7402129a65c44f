"""The ``metapl`` command and all that it is made of; the library imports nothing of it."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    """Import a package when it is first used."""
    if name.startswith("_") or find_spec(f"metapl.apps.{name}") is None:
        raise AttributeError(f"module 'metapl.apps' has no attribute {name!r}")
    return import_module(f"metapl.apps.{name}")
