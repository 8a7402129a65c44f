"""What a page prints as an example is a row of the suite.

Estimators with their settings, modes of the trainer.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from outcome_table import all_rows
from pages import code
from trainings import Row, trained

from metapl import MetaplError, feedback
from metapl.feedback import Estimator, Forward, Implicit, Reinforce, estimator

ROOT = Path(__file__).parents[2]

PAGES = (
    "README.md",
    "docs/index.md",
    "docs/tutorial.md",
    "docs/modes.md",
    "docs/no-help.md",
    "docs/own-loop.md",
)

ESTIMATORS = {
    name: kind
    for name, kind in vars(feedback).items()
    if inspect.isclass(kind) and issubclass(kind, Estimator)
}
CALL = re.compile(rf"\b({'|'.join(ESTIMATORS)})\([^()]*\)")


def printed_estimators(text: str) -> Iterator[Estimator]:
    """Yield the estimators that a text writes as calls.

    ``Forward(truncate=m)`` is a form, and no example.
    """
    for match in CALL.finditer(text):
        call = ast.parse(match[0], mode="eval").body
        assert isinstance(call, ast.Call)
        constants = {word.arg: word.value for word in call.keywords}
        arguments = {
            name: node.value for name, node in constants.items() if isinstance(node, ast.Constant)
        }
        if len(arguments) == len(call.keywords) and ... not in arguments.values():
            yield ESTIMATORS[match[1]](**arguments)


def printed_modes(source: str) -> Iterator[Estimator]:
    """Yield the modes that code gives to ``BilevelTrainer`` by name, the default included."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("BilevelTrainer"):
            continue
        given = [word.value for word in node.keywords if word.arg == "mode"] + node.args[2:3]
        if not given and not any(isinstance(argument, ast.Starred) for argument in node.args):
            yield Forward()
        for mode in given:
            if isinstance(mode, ast.Constant):
                yield estimator(mode.value)


def test_calls_are_found_and_forms_are_not() -> None:
    text = (
        '`metapl.feedback.Reinforce(similarity="cosine", baseline=0.99)`, `Forward(truncate=m)`, '
        "`Implicit(solver=...)`"
    )
    assert [*printed_estimators(text)] == [Reinforce(similarity="cosine", baseline=0.99)]
    source = (
        'BilevelTrainer(t, s)\nmetapl.BilevelTrainer(t, s, "reinforce")\n'
        "metapl.BilevelTrainer(*two(), mode=mode)"
    )
    assert [*printed_modes(source)] == [Forward(), Reinforce()]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_prints_is_a_row(page: str) -> None:
    path = ROOT / page
    printed = {*printed_estimators(path.read_text()), *printed_modes(code(path))}
    assert printed
    assert printed <= {row.estimator for row in all_rows()}


def test_the_modes_page_prints_settings() -> None:
    """The test above has something to look at beside the names of modes."""
    assert Reinforce(similarity="cosine", baseline=0.99) in printed_estimators(
        (ROOT / "docs/modes.md").read_text()
    )


def test_what_the_error_of_implicit_names_is_a_row() -> None:
    """The mode refuses a network in training, and names a mode and a setting that take one."""
    with pytest.raises(MetaplError, match=r"mode='forward', .* or a larger damping"):
        trained(Row("implicit"), seed=0)
    estimators = [row.estimator for row in all_rows()]
    assert estimator("forward") in estimators
    assert Implicit(damping=1.0, iterations=3) in estimators
