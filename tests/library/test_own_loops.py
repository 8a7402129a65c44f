"""Loops of others around a step.

Plain PyTorch, accelerate and Lightning, as the examples have them.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pages
import pytest
import torch
from problems_zoo import same

import metapl

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning"),  # those of other libraries
    pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="the examples are not installed"),
]


def example(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name=name))


def weights(trainer: Any) -> list[torch.Tensor]:
    return [
        p.detach().clone()
        for network in (trainer.teacher, trainer.student)
        for p in network.parameters()
    ]


class Killed(BaseException):
    pass


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a loop whose trainer is killed before it takes a step for the nth time."""

    def run(number: int, loop: Any) -> None:
        take_step = metapl.BilevelTrainer.step
        steps_left = number - 1

        def counted(self: Any, *args: Any, **options: Any) -> Any:
            nonlocal steps_left
            if steps_left == 0:
                raise Killed
            steps_left -= 1
            return take_step(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(metapl.BilevelTrainer, "step", counted)
            with pytest.raises(Killed):
                loop()
        # Another process has other random numbers.
        torch.manual_seed(99)

    return run


def test_a_loop_goes_on_from_the_middle_of_an_epoch(tmp_path: Path, killed_at: Any) -> None:
    train = example("own_loop").train
    uninterrupted = train(tmp_path / "whole", 9, 4, 0)
    killed_at(7, lambda: train(tmp_path / "cut", 9, 4, 0))
    resumed = train(tmp_path / "cut", 9, 4, 0)
    assert same(weights(uninterrupted), weights(resumed))
    assert list(tmp_path.glob("cut/events*"))


class NoAccelerator:
    """A loop without accelerate: it prepares nothing, but that optimizers are in wrappers."""

    is_main_process = False

    def prepare(self, *parts: Any) -> Any:
        prepared: list[Any] = []
        for part in parts:
            is_optimizer = isinstance(part, torch.optim.Optimizer)
            prepared.append(SimpleNamespace(optimizer=part) if is_optimizer else part)
        return prepared

    def register_for_checkpointing(self, *parts: Any) -> None:
        pass

    def save_state(self, path: str) -> None:
        pass

    def print(self, *text: Any, **options: Any) -> None:
        pass


def accelerator(**options: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    return accelerate.Accelerator(cpu=True, **options)


def test_a_loop_of_accelerate_takes_the_steps_of_a_plain_one_and_resumes(
    tmp_path: Path, killed_at: Any
) -> None:
    pytest.importorskip("accelerate")
    train = example("with_accelerate").train
    plain = weights(train(NoAccelerator(), tmp_path / "plain", 9, 4))
    uninterrupted = weights(train(accelerator(), tmp_path / "whole", 9, 4))
    assert same(plain, uninterrupted)
    killed_at(7, lambda: train(accelerator(), tmp_path / "cut", 9, 4))
    resumed = weights(train(accelerator(), tmp_path / "cut", 9, 4))
    assert same(uninterrupted, resumed)


QUIET: dict[str, Any] = {"enable_model_summary": False}


def test_a_lightning_module_takes_as_many_steps_as_it_is_told_and_resumes(
    tmp_path: Path, killed_at: Any
) -> None:
    pytest.importorskip("lightning")
    train = example("with_lightning").train
    loop, module = train(tmp_path / "five", 5, 5, **QUIET)
    assert loop.global_step == module.bilevel.steps_done == 5
    assert "accuracy" in loop.callback_metrics
    assert "inner_loss" in loop.callback_metrics
    _, uninterrupted = train(tmp_path / "whole", 9, 4, **QUIET)
    killed_at(7, lambda: train(tmp_path / "cut", 9, 4, **QUIET))
    loop, resumed = train(tmp_path / "cut", 9, 4, **QUIET)
    assert loop.global_step == resumed.bilevel.steps_done == 9
    assert same(weights(uninterrupted.bilevel), weights(resumed.bilevel))
    for name in ("inner_optimizer", "outer_optimizer"):
        optimizer = getattr(uninterrupted.bilevel, name)
        resumed_optimizer = getattr(resumed.bilevel, name)
        assert optimizer.param_groups[0]["lr"] == resumed_optimizer.param_groups[0]["lr"]


@pytest.mark.long
def test_the_example_on_text_prints_each_way_to_train(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["text.py", "--steps", "10"])
    runpy.run_path(str(ROOT / "examples" / "text.py"), run_name="__main__")
    printed = capsys.readouterr().out
    ratio = re.search(r"^seed 0: the feedback .* losses: ([\d.e+-]+)$", printed, re.MULTILINE)
    assert ratio is not None
    assert float(ratio[1]) > 0
    accuracies = dict(re.findall(r"^(\S.*?) {2,}([\d.]+) %$", printed, re.MULTILINE))
    assert list(accuracies) == [
        "labels alone",
        "no feedback",
        "feedback as it is",
        "feedback 0.1 of the teacher's losses",
    ]
    assert all(5 < float(accuracy) < 100 for accuracy in accuracies.values())


@pytest.mark.docs
@pytest.mark.parametrize("name", ["neighbors", "own-loop", "runs", "text", "whole-trainings"])
def test_the_code_of_a_page_stands_in_an_example(name: str) -> None:
    """But for its indentation; the examples run above."""

    def flush(text: str) -> str:
        return "\n".join(line.strip() for line in text.strip().splitlines() if line.strip())

    programs = [flush(path.read_text()) for path in (ROOT / "examples").glob("*.py")]
    blocks = pages.QUOTED.findall((ROOT / "docs" / f"{name}.md").read_text())
    assert blocks
    for block in blocks:
        assert any(flush(block) in program for program in programs), block
