"""A new estimator is one file and one line of the registry, and so is a new method.

Each is added to a copy of the package, whose functions and command then know it.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import metapl
from metapl.apps import digits, images, rounds
from metapl.apps.methods.base import Method

ESTIMATOR = """
from dataclasses import dataclass
from typing import ClassVar

from metapl.feedback.forward import Forward


@dataclass(frozen=True)
class Doubled(Forward):
    name: ClassVar[str] = "doubled"

    def feedback(self, path, state):
        found, state = super().feedback(path, state)
        return [one.divided_by(0.5) for one in found], state
"""

METHOD = """
from dataclasses import dataclass
from typing import ClassVar

from metapl.apps.methods.supervised import Supervised
from metapl.problems.losses import CrossEntropy


@dataclass(frozen=True, kw_only=True)
class Heavier(Supervised):
    \'\'\'The labeled examples alone, each counting more.

    Args:
        factor: how much more.
    \'\'\'

    name: ClassVar[str] = "heavier"
    title: ClassVar[str] = "supervised, heavier"

    factor: float = 2.0

    def train(self, t):
        return t.alone(t.teacher, (CrossEntropy(weight=self.factor),))
"""

USE = """
import torch, metapl
from metapl.apps.main import main

assert "doubled" in metapl.MODES
x, y = torch.randn(6, 4), torch.arange(6) % 3


def gradient(mode):
    torch.manual_seed(1)
    teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    inner, data = torch.optim.SGD(student.parameters(), lr=0.1), {"outer": (x, y), "inner": x}
    # Verification would refuse what is twice the derivative.
    data["verify"] = mode != "doubled"
    return metapl.hypergradient(teacher, student, **data, mode=mode, inner_optimizer=inner)


twice, once = (gradient(mode).grads["weight"] for mode in ("doubled", "unrolled"))
assert torch.allclose(twice, 2 * once, rtol=1e-4)
train = ("train", "digits", "--steps", "2", "--finetune-steps", "2")
assert main([*train, "--mode", "doubled", "--out", "mode"]) == 0
assert main([*train, "--method", "heavier", "--factor", "3", "--out", "method"]) == 0
assert main([*train, "--factor", "3"]) == 2
"""


def add(file: Path, line: str, more: str, imports: str, imported: str) -> None:
    """Add a line behind one of a registry, and an import before another."""
    text = file.read_text()
    assert line in text
    assert imports in text
    file.write_text(text.replace(line, line + more).replace(imports, f"{imported}\n{imports}", 1))


@pytest.mark.long
def test_an_estimator_and_a_method_are_a_file_and_a_line_each(tmp_path: Path) -> None:
    shutil.copytree(Path(metapl.__file__).parent, tmp_path / "metapl")
    (tmp_path / "metapl/feedback/doubled.py").write_text(ESTIMATOR)
    add(
        *(
            tmp_path / "metapl/feedback/__init__.py",
            '    "none": NoFeedback(),\n',
            '    "doubled": Doubled(),\n',
        ),
        *("from metapl.feedback.none", "from metapl.feedback.doubled import Doubled"),
    )
    (tmp_path / "metapl/apps/methods/heavier.py").write_text(METHOD)
    add(
        *(
            tmp_path / "metapl/apps/digits.py",
            '"supervised": Supervised(),\n',
            '    "heavier": Heavier(),\n',
        ),
        *("from metapl.networks.weights import", "from metapl.apps.methods.heavier import Heavier"),
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, words in (("mode", '"doubled"'), ("method", '"factor": 3.0')):
        assert words in (tmp_path / name / "recipe.json").read_text()


def classes_below(kind: type) -> set[str]:
    """Return the names of a class's subclasses, and of theirs."""
    names = set()
    for subclass in kind.__subclasses__():
        names |= {subclass.__name__, *classes_below(subclass)}
    return names


def questions_about_methods(source: str) -> list[int]:
    """Return the lines of a file that ask for a method's class, or compare its name with one."""
    kinds = classes_below(Method)
    method_names = {*images.METHODS, *digits.METHODS, *rounds.METHODS}
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
            if asked & kinds:
                lines.append(node.lineno)
        if isinstance(node, ast.Compare) and ".name" in ast.unparse(node.left):
            values = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            if values & method_names:
                lines.append(node.lineno)
    return lines


def test_nobody_asks_which_method_it_is() -> None:
    """A method says itself what it needs, so that a new one is a file and a line."""
    assert questions_about_methods("isinstance(method, Uda) or method.name == 'mpl'") == [1, 1]
    apps = Path(metapl.__file__).parent / "apps"
    for path in apps.rglob("*.py"):
        if path.parent.name != "methods":
            assert questions_about_methods(path.read_text()) == [], path


def test_settings_of_the_command_are_typed() -> None:
    """The type checker knows which settings there are, wherever they are read."""
    apps = Path(metapl.__file__).parent / "apps"
    for path in apps.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg) and node.arg in ("config", "method") and node.annotation:
                assert ast.unparse(node.annotation) != "Any", f"{path}:{node.lineno}"
