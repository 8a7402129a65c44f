"""Old names: where the modules and names of earlier versions are now.

``metapl.data`` and ``metapl.labels`` are names to stay, wherever what they give lives. Any other old name warns, and
goes with the release after this one.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

STAYING = ("metapl.data", "metapl.labels")

MODULES = {
    "metapl.cli": "metapl.apps.commands",
    "metapl.experiments": "metapl.apps.experiments",
    "metapl.export": "metapl.apps.export",
    "metapl.labels": "metapl.apps.labels",
    "metapl.models.corrector": "metapl.models",
    "metapl.planning": "metapl.apps.planning",
    "metapl.problems.self_training": "metapl.problems.stored",
    "metapl.recipes": "metapl.apps.recipes",
    "metapl.report": "metapl.apps.reports",
    "metapl.robustness": "metapl.apps.evaluation",
}  # with all that is in them

NAMES = {  # packages of the library whose other names are those of a package of the application
    "metapl.data": "metapl.apps.pictures",
    "metapl.metrics": "metapl.apps.evaluation",
    "metapl.models": "metapl.apps.networks",
}


def named_now(name: Any) -> Any:
    """The dotted name of today for one that a file of an earlier version has; anything else as it is.

    >>> named_now("metapl.recipes.digits.Digits"), named_now("torch.nn.ReLU")
    ('metapl.apps.recipes.digits.Digits', 'torch.nn.ReLU')
    """
    old = next((old for old in MODULES if isinstance(name, str) and f"{name}.".startswith(f"{old}.")), None)
    return name if old is None else MODULES[old] + name[len(old) :]


def attribute(package: str, name: str) -> Any:
    """What a package's ``__getattr__`` returns."""
    old = f"{package}.{name}"
    if old in MODULES:
        _warn(old, MODULES[old], 3)
        return import_module(MODULES[old])
    # What is a module here is imported by whoever asked, without a look at the application.
    if package in NAMES and not name.startswith("_") and find_spec(old) is None:
        try:
            module = import_module(NAMES[package])
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("metapl.apps"):  # it is there, and what it needs is not
                raise
        else:
            if name in module.__all__:
                _warn(old, f"{NAMES[package]}.{name}", 3)
                return getattr(module, name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def _warn(old: str, new: str, above: int) -> None:
    if not old.startswith(STAYING):
        text = f"{old} is now {new}; the old name goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=above + 1)


class _Old(MetaPathFinder, Loader):
    """Gives a module under its old name too."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if named_now(name) == name else ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = named_now(spec.name)
        _warn(spec.name, new, 2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just put the old name's in the place of the module's own.
        module.__spec__ = None if module.__spec__ is None else module.__spec__.loader_state


def install() -> None:
    """Let old names be imported; before the other finders, which would load a module of an old package once more."""
    sys.meta_path.insert(0, _Old())
