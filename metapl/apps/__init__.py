"""The ``metapl`` command and all that it is made of; the library imports nothing of it.

main                    the commands by name, errors to exit codes
commands                metapl train and metapl noisy-student, which go by
  train                 a training from its settings to its run folder
  images digits noisy_labels    what is trained on, with its settings
  methods noisy_student         by which method
  look                  what pictures show decides, and how many steps fit
settings                what the settings of all trainings are made of
launch, fitting         the processes of a training; what is added to a fit
backbone                pretrained networks, and the linear baseline
run                     the folder of a run; report, web, curves, suspects: its page
compare, comparison     methods side by side: do they differ?
predict evaluate label export attribute runs ablate   the other commands
labeling, held_out, inputs    what several of them share
sklearn                 classifiers for tables
pictures                folders of pictures, batches and views
networks                networks by name, from here, torchvision and timm
labels                  stored class distributions
evaluation              damaged and misleading pictures
machine, process        the machine it runs on, its files and signals
errors, words           what messages are made of
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    """Import a package when it is first used."""
    if name.startswith("_") or find_spec(f"metapl.apps.{name}") is None:
        raise AttributeError(f"module 'metapl.apps' has no attribute {name!r}")
    return import_module(f"metapl.apps.{name}")
