"""The methods that a recipe can be trained by: a type each, in :data:`METHODS` and the registries beside it.

To add one, write a file with a type of its own, and enter it here.
"""

from __future__ import annotations

from collections.abc import Iterable

from metapl.apps.recipes.base import Method
from metapl.apps.recipes.methods.alone import ByUda, Everything, FixMatch, LabelSmoothing, Supervised
from metapl.apps.recipes.methods.beside import (
    ClassMeans,
    MetaPseudoLabels,
    Permuted,
    PseudoLabeled,
    PseudoLabeledHard,
    RandomSign,
    ReducedMetaPseudoLabels,
    ReducedWithoutFeedback,
    WithoutFeedback,
)
from metapl.apps.recipes.methods.label_noise import ALTERED, LEARNED, Clean, Plain
from metapl.apps.recipes.methods.noisy_student import NoisyStudent

Methods = dict[str, type[Method]]

# Meta Pseudo Labels, the same loop without feedback, the baselines, and altered feedback.
METHODS: Methods = {
    "mpl": MetaPseudoLabels,
    "none": WithoutFeedback,
    "supervised": Supervised,
    "label_smoothing": LabelSmoothing,
    "supervised_everything": Everything,
    "pseudo_labels": PseudoLabeled,
    "pseudo_labels_hard": PseudoLabeledHard,
    "reduced_mpl": ReducedMetaPseudoLabels,
    "reduced_none": ReducedWithoutFeedback,
    "uda": ByUda,
    "fixmatch": FixMatch,
    "permuted": Permuted,
    "class_means": ClassMeans,
    "random_sign": RandomSign,
}
COMPARED = tuple(name for name, method in METHODS.items() if method.place == "compared")
CONTROLS = tuple(name for name, method in METHODS.items() if method.place == "control")

# For labels that may be wrong.
_NOISY: tuple[type[Method], ...] = (*LEARNED, Plain, Clean, *ALTERED)
NOISY_METHODS: Methods = {kind.name: kind for kind in _NOISY}

OF_PICTURES: Methods = METHODS | {"noisy_student": NoisyStudent}  # of labeled and unlabeled examples
EVERY_METHOD: Methods = OF_PICTURES | NOISY_METHODS


def titled(method: str, network: str) -> str:
    """A network of a run by a method in words.

    >>> titled("mpl", "finetuned"), titled("uda", "finetuned"), titled("uda", "student")
    ('finetuned student', 'finetuned network', 'network')
    """
    return EVERY_METHOD[method].networks[network]


def called_network(methods: Iterable[str]) -> str:
    """What runs by these methods call the network that they train, if all call it alike."""
    found = {titled(method, "student") for method in methods}
    return found.pop() if len(found) == 1 else "network"


def title(method: str) -> str:
    return EVERY_METHOD[method].title if method in EVERY_METHOD else method
