"""What an editor, a notebook and ``print`` show of the library: its public names, modes by name, short texts."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
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


def test_one_sentence_says_which_mode_to_take() -> None:
    root, sentence = (
        Path(metapl.__file__).parents[1],
        ("Take forward; reinforce is the paper's Algorithm 1 and stays the trainer's default."),
    )
    pages = [(root / name).read_text() for name in ("README.md", "docs/modes.md")]
    texts = [metapl.feedback.__doc__, metapl.hypergradient.__doc__, metapl.BilevelTrainer.__doc__, *pages]
    assert all(sentence in " ".join(str(text).replace("`", "").split()) for text in texts)
