"""A new estimator is one file and one line of the registry, a new problem one file: each is added to a copy of the
package, whose command and functions then know it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import metapl

ESTIMATOR = """
from dataclasses import dataclass
from typing import ClassVar

from metapl.feedback.base import Estimator, Feedback, State
from metapl.feedback.credit import Tangent, head_feedback
from metapl.feedback.path import Path
from metapl.problems.base import Kind


@dataclass(frozen=True)
class Doubled(Estimator):
    name: ClassVar[str] = "doubled"
    labels: ClassVar[tuple[Kind, ...]] = ("soft",)

    def feedback(self, path: Path, state: State) -> tuple[list[Feedback], State]:
        step, w = path.pullback()
        return [head_feedback(step, w, Tangent(step.tangent(w))).divided_by(0.5)], state
"""

PROBLEM = """
import torch
from torch.nn import functional as F

from metapl.problems.base import Problem, Signal


class Weighted(Problem):
    def signal(self, teacher, batch, student_outputs, *, generator):
        return Signal(teacher(batch[0]).sigmoid()[:, 0])

    def inner_loss(self, outputs, signal, batch, params=None):
        return signal.value * F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])
"""

USE = """
import torch, metapl
from metapl.problems.weighted import Weighted

assert "doubled" in metapl.MODES
torch.manual_seed(0)
x, y = torch.randn(6, 4), torch.arange(6) % 3


def gradient(mode, out, problem):
    torch.manual_seed(1)
    teacher, student = torch.nn.Linear(4, out), torch.nn.Linear(4, 3)
    inner = torch.optim.SGD(student.parameters(), lr=0.1)
    data = {"labeled": (x, y), "unlabeled": x if problem is None else (x, y)}
    found = metapl.hypergradient(teacher, student, **data, mode=mode, problem=problem, inner_optimizer=inner)
    return found.grads["weight"]


assert torch.allclose(gradient("doubled", 3, None), 2 * gradient("unrolled", 3, None), rtol=1e-4)
for mode in ("forward", "difference", "unrolled", "doubled"):
    times = 2 if mode == "doubled" else 1
    exact = gradient("unrolled", 1, Weighted())
    assert torch.allclose(gradient(mode, 1, Weighted()), times * exact, rtol=1e-2, atol=1e-7), mode
try:
    gradient("doubled", 3, metapl.PseudoLabels("hard"))
except metapl.MetaplError as error:
    assert "mode 'doubled' takes soft labels" in str(error), error
"""


METHOD = """
from dataclasses import dataclass
from typing import ClassVar

from metapl.problems.losses import CrossEntropy


@dataclass(frozen=True, kw_only=True)
class Heavier:
    \'\'\'The labeled examples alone, each counting more.

    Args:
        factor: how much more.
    \'\'\'

    name: ClassVar[str] = "heavier"
    title: ClassVar[str] = "supervised, heavier"

    factor: float = 2.0

    def scheduled(self, steps):
        return self

    def train(self, t):
        return t.alone(t.teacher, (CrossEntropy(weight=self.factor),))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    shutil.copytree(Path(metapl.__file__).parent, tmp_path / "metapl")
    (tmp_path / "metapl/feedback/doubled.py").write_text(ESTIMATOR)
    (tmp_path / "metapl/problems/weighted.py").write_text(PROBLEM)
    registry = tmp_path / "metapl/feedback/__init__.py"
    text = registry.read_text()
    line = '    "none": NoFeedback(),\n'
    assert line in text
    text = text.replace(line, line + '    "doubled": Doubled(),\n')
    registry.write_text(
        text.replace(
            "from metapl.feedback.none", "from metapl.feedback.doubled import Doubled\nfrom metapl.feedback.none"
        )
    )
    return tmp_path


def run(package: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run(
        [sys.executable, *command], cwd=package, env=environment, capture_output=True, text=True, check=False
    )


def test_an_estimator_and_a_problem_are_a_file_each(package: Path) -> None:
    done = run(package, "-c", USE)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_command_line_offers_the_new_mode(package: Path) -> None:
    settings = ("--steps", "2", "--mode", "doubled", "--out", "run")
    done = run(package, "-m", "metapl.apps", "train", "digits", *settings)
    assert done.returncode == 0, done.stderr
    assert '"doubled"' in (package / "run/recipe.json").read_text()


@pytest.mark.long
def test_a_method_is_a_type_and_a_line_of_the_registry(package: Path) -> None:
    (package / "metapl/apps/heavier.py").write_text(METHOD)
    registry = package / "metapl/apps/digits.py"
    line = '    "supervised": Supervised(),\n'
    text = registry.read_text()
    assert line in text
    text = text.replace(line, line + '    "heavier": Heavier(),\n')
    imported = "from metapl.apps.methods import"
    registry.write_text(text.replace(imported, f"from metapl.apps.heavier import Heavier\n{imported}", 1))
    settings = ("train", "digits", "--steps", "2", "--out", "run", "--method", "heavier", "--factor", "3")
    done = run(package, "-m", "metapl.apps", *settings)
    assert done.returncode == 0, done.stderr
    assert '"factor": 3.0' in (package / "run/recipe.json").read_text()
    refused = run(package, "-m", "metapl.apps", "train", "digits", "--factor", "3")
    assert (refused.returncode, "--factor" in refused.stderr) == (2, True)
