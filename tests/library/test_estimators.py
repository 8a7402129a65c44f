"""What estimators say of themselves, and the names that ``dir`` and a type checker show."""

from __future__ import annotations

from importlib import import_module
from typing import Any, get_args

import pytest
from problems_zoo import gradient, toy
from reference import error
from torch import nn

import metapl
from metapl import MetaplError
from metapl.ablation import Altered
from metapl.execution import layout
from metapl.execution.layout import Layout
from metapl.feedback import (
    Difference,
    Forward,
    ModeName,
    Unrolled,
    check_mode,
    estimator,
    modes_for,
    prepare,
)


def test_exact_modes_are_those_that_say_so() -> None:
    exact = gradient(toy("mlp"), Unrolled()).grads
    modes = [Forward(), Forward(normalization="cosine"), Difference(), estimator("none")]
    for mode in modes:
        assert mode.exact == (error(gradient(toy("mlp"), mode).grads, exact) < 1e-10)
    assert [name for name in metapl.MODES if estimator(name).exact] == ["unrolled", "forward"]
    assert not Unrolled(truncate=1).exact
    assert not Forward(truncate=2).exact
    assert not Altered().exact


def test_modes_run_on_the_layouts_that_offer_what_they_require() -> None:
    """What a layout offers follows from its kind and from the version of torch.

    The processes are not needed.
    """

    def refused(steps: int = 1, **layout_options: Any) -> set[str]:
        student = Layout(nn.Linear(2, 2), **layout_options)
        modes = set()
        for mode in map(estimator, metapl.MODES):
            try:
                check_mode(mode, steps, prepare(None, mode), student)
            except MetaplError:
                modes.add(mode.name)
        return modes

    assert refused() == set()
    assert refused(kind="replicated") == refused(kind="sharded") == {"unrolled", "implicit"}
    of_products = {"unrolled", "implicit", "forward", "reinforce_per_example"}
    assert refused(kind="sharded", product_ranks=2) == of_products
    assert "forward" not in refused(steps=2)
    of_one_step = {*metapl.MODES} - {"forward", "direct", "none"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "DTENSOR_TWICE", "2.0")
        assert (
            refused(steps=2, kind="sharded") == refused(steps=2, kind="replicated") == of_one_step
        )
    assert refused(steps=2, kind="sharded", product_ranks=2) == {*metapl.MODES}


def test_several_steps_of_a_sharded_student_name_the_torch_that_they_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Below it the second derivative of a DTensor is wrong.

    One student step takes none in the weights.
    """
    monkeypatch.setattr(layout, "DTENSOR_TWICE", "99.1")
    student = Layout(nn.Linear(2, 2), kind="sharded")
    mode = estimator("forward")
    check_mode(mode, 1, prepare(None, mode), student)
    with pytest.raises(
        MetaplError,
        match=r"from torch 99\.1 on, and this is .* expected one process, or one student",
    ):
        check_mode(mode, 2, prepare(None, mode), student)


PUBLIC = (
    "ablation",
    "data",
    "distributed",
    "feedback",
    "metrics",
    "models",
    "problems",
    "training",
)


def test_dir_shows_the_public_names_alone() -> None:
    names_of_modules = {
        "ablation",
        "apps",
        "data",
        "distributed",
        "functional",
        "integrations",
        "labels",
        "metrics",
        "networks",
        "noisy_student",
        "pictures",
        "robustness",
        "run_folder",
        "__version__",
    }
    assert {*dir(metapl)} == {*metapl.__all__, *names_of_modules}
    for name in PUBLIC:
        module = import_module(f"metapl.{name}")
        assert dir(module) == sorted(module.__all__)
    assert all(getattr(metapl, name) is not None for name in dir(metapl))


def test_the_modes_of_a_type_checker_are_the_modes() -> None:
    assert metapl.MODES == get_args(ModeName) == modes_for()
    assert all(estimator(name).name == name for name in metapl.MODES)
