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
    """Run something whose trainer is killed before it takes a step for the nth time."""

    def run(step: int, what: Any) -> None:
        own, taken = metapl.BilevelTrainer.step, iter(range(1, step))

        def counted(self: Any, *args: Any, **options: Any) -> Any:
            if next(taken, None) is None:
                raise Killed
            return own(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(metapl.BilevelTrainer, "step", counted)
            with pytest.raises(Killed):
                what()
        torch.manual_seed(99)  # as in another process

    return run


def test_a_loop_goes_on_from_the_middle_of_an_epoch(tmp_path: Path, killed_at: Any) -> None:
    own = example("own_loop")
    whole = own.train(tmp_path / "whole", 9, 4, 0)
    killed_at(7, lambda: own.train(tmp_path / "cut", 9, 4, 0))
    assert same(weights(whole), weights(own.train(tmp_path / "cut", 9, 4, 0)))
    assert list(tmp_path.glob("cut/events*"))


class NoAccelerator:
    """A loop without accelerate: what it prepares is what it gets."""

    is_main_process = False

    def prepare(self, *given: Any) -> Any:
        return given

    def register_for_checkpointing(self, *given: Any) -> None:
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
    whole = weights(train(accelerator(), tmp_path / "whole", 9, 4))
    assert same(plain, whole)
    killed_at(7, lambda: train(accelerator(), tmp_path / "cut", 9, 4))
    assert same(whole, weights(train(accelerator(), tmp_path / "cut", 9, 4)))


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
    _, whole = train(tmp_path / "whole", 9, 4, **QUIET)
    killed_at(7, lambda: train(tmp_path / "cut", 9, 4, **QUIET))
    loop, again = train(tmp_path / "cut", 9, 4, **QUIET)
    assert loop.global_step == again.bilevel.steps_done == 9
    assert same(weights(whole.bilevel), weights(again.bilevel))
    for name in ("inner_optimizer", "outer_optimizer"):
        rates = [getattr(one.bilevel, name).param_groups[0]["lr"] for one in (whole, again)]
        assert rates[0] == rates[1]


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
@pytest.mark.parametrize("name", ["own-loop", "runs", "text"])
def test_the_code_of_a_page_stands_in_an_example(name: str) -> None:
    """But for its indentation; the examples run above."""

    def flush(text: str) -> str:
        return "\n".join(line.strip() for line in text.strip().splitlines() if line.strip())

    programs = [flush(path.read_text()) for path in (ROOT / "examples").glob("*.py")]
    blocks = pages.QUOTED.findall((ROOT / "docs" / f"{name}.md").read_text())
    assert blocks
    for block in blocks:
        assert any(flush(block) in program for program in programs), block
