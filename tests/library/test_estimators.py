"""What estimators say of themselves, and the names that ``dir`` and a type checker show."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path
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


@pytest.mark.parametrize(
    ("name", "problem", "expected"),
    [
        ("unrolled", None, "one process, or 'forward', or 'difference'"),
        ("forward", metapl.problems.LearningToReweight(), "one process"),
        ("difference", metapl.problems.LearningToReweight(), "one process"),
        ("none", metapl.problems.LearningToReweight(), "one process"),
        # Modes of drawn labels alone do not take the weights of a rater.
        ("implicit", metapl.problems.DataRater(), "one process, or 'forward', or 'difference'"),
    ],
)
def test_what_is_proposed_in_several_processes_runs_there(
    name: str, problem: Any, expected: str
) -> None:
    mode = estimator(name)
    student = Layout(nn.Linear(2, 2), kind="replicated")
    with pytest.raises(MetaplError, match=rf"whose step takes .*; expected {expected}\.$"):
        check_mode(mode, 1, prepare(problem, mode), student)
    for other in re.findall("'(.*?)'", expected):
        check_mode(estimator(other), 1, prepare(problem, mode), student)


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


def test_a_mode_of_the_direct_term_alone_is_not_proposed() -> None:
    """It takes a problem that holds the teacher, and would be refused next."""
    networks = [nn.Linear(4, 3), nn.Linear(4, 3)]
    with pytest.raises(metapl.MetaplError, match="expected one, or unrolled, forward, none"):
        metapl.BilevelTrainer(*networks, "difference", lookahead=2)


def questions_about_estimators(source: str) -> list[int]:
    """Return the lines of a file that ask which estimator it is, by its class or by its name.

    Whether something is an estimator at all may be asked.
    """
    classes = {kind.__name__ for kind in map(type, map(estimator, metapl.MODES))}
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            if names_in(node.args[1]) & classes:
                lines.append(node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            # An option that some estimators have is an attribute of all of them.
            if is_estimator(node.args[0]):
                lines.append(node.lineno)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asks_for_class = any(ast.unparse(side).startswith("type(") for side in sides)
            asks_for_name = any(is_estimator_or_name(side) for side in sides)
            names = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            is_of_class = asks_for_class and names_in(node) & classes
            is_of_name = asks_for_name and (names & {*metapl.MODES} or "MODES" in names_in(node))
            if is_of_class or is_of_name:
                lines.append(node.lineno)
    return lines


def names_in(node: ast.AST) -> set[str]:
    """Return the variables, and the last names of attributes, in a piece of code."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            names.add(part.id)
        elif isinstance(part, ast.Attribute):
            names.add(part.attr)
    return names


def is_estimator(node: ast.AST) -> bool:
    """Return whether a variable or an attribute is called as estimators are."""
    return ast.unparse(node).rpartition(".")[2] in ("mode", "estimate", "estimator")


def is_estimator_or_name(node: ast.AST) -> bool:
    return is_estimator(node) or (
        isinstance(node, ast.Attribute) and node.attr == "name" and is_estimator(node.value)
    )


@pytest.mark.parametrize(
    "question",
    [
        "isinstance(case.mode, LossDifference)",
        "isinstance(mode, feedback.Implicit | Forward)",
        "type(mode) in (Forward, Unrolled)",
        "self.mode.name == 'implicit'",
        "mode.name in MODES",
        "[mode for mode in feedback.MODES if mode != 'implicit']",
        "getattr(trainer.mode, 'normalization', '')",
    ],
)
def test_such_questions_are_seen(question: str) -> None:
    assert questions_about_estimators(question) == [1]


def test_nobody_asks_which_estimator_it_is() -> None:
    """An estimator says itself what it can, so that one of a user's own can it too."""
    for path in Path(metapl.__file__).parent.rglob("*.py"):
        assert questions_about_estimators(path.read_text()) == [], path


def test_another_formula_is_another_gradient_unless_it_says_otherwise() -> None:
    class Renamed(Forward):
        name = "renamed"

    class Doubled(Forward):
        def feedback(self, path: Any, state: Any) -> Any:
            feedback, state = super().feedback(path, state)
            return [h.divided_by(0.5) for h in feedback], state

    class Again(Doubled):
        is_derivative = True

        def feedback(self, path: Any, state: Any) -> Any:
            feedback, state = super().feedback(path, state)
            return [h.divided_by(2.0) for h in feedback], state

    assert [mode.exact for mode in (Renamed(), Doubled(), Again())] == [True, False, True]
