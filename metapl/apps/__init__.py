"""The ``metapl`` command and all that it is made of; the library imports nothing of it.

main                    the commands by name, errors to exit codes
commands                metapl train and metapl noisy-student, which go by
  train                 a training from its settings to its run folder
  images digits noisy_labels    what is trained on, with its settings
  methods noisy_student         by which method
  look                  what pictures show decides, and how many steps fit
run                     the folder of a run; report: its page
compare, comparison     methods side by side: do they differ?
predict evaluate label export attribute runs ablate   the other commands
pictures                folders of pictures, batches and views
networks                networks by name, from here, torchvision and timm
labels                  stored class distributions
evaluation              damaged and misleading pictures
machine                 the machine it runs on, and its files
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    """Import a package when it is first used."""
    if name.startswith("_") or find_spec(f"metapl.apps.{name}") is None:
        raise AttributeError(f"module 'metapl.apps' has no attribute {name!r}")
    return import_module(f"metapl.apps.{name}")
