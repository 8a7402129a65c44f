"""What an editor, a notebook and ``print`` show of the library: its public names, modes by name, short texts."""

from __future__ import annotations

from importlib import import_module
from typing import get_args

import metapl
from metapl.feedback import ModeName, estimator, modes_for

PUBLIC = ("ablation", "data", "distributed", "feedback", "metrics", "models", "problems", "training")


def test_dir_shows_the_public_names_alone() -> None:
    assert {*dir(metapl)} == {
        *metapl.__all__,
        "ablation",
        "apps",
        "data",
        "distributed",
        "metrics",
        "sklearn",
        "__version__",
    }
    for name in PUBLIC:
        module = import_module(f"metapl.{name}")
        assert dir(module) == sorted(module.__all__)
    assert all(getattr(metapl, name) is not None for name in dir(metapl))


def test_the_modes_of_a_type_checker_are_the_modes() -> None:
    assert metapl.MODES == get_args(ModeName) == modes_for()
    assert all(estimator(name).name == name for name in metapl.MODES)
