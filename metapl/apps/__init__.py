"""The ``metapl`` command and all that it is made of; the library imports nothing of it.

commands     the command line, one file a command
recipes      named, frozen configurations
experiments  what runs them
pictures     folders of pictures, batches, views and known data sets
networks     networks by name, from here, torchvision and timm
labels       stored class distributions
evaluation   damaged and misleading pictures
reports      the page and the picture of a training
export       trained networks as files for others
machine      the machine it runs on, and its files
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    """Import a package when it is first used."""
    if name.startswith("_") or find_spec(f"metapl.apps.{name}") is None:
        raise AttributeError(f"module 'metapl.apps' has no attribute {name!r}")
    return import_module(f"metapl.apps.{name}")
