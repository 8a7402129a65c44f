"""What an editor, a notebook and ``print`` show of the library: its public names, modes by name, short texts."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import torch
from problems_zoo import Toy, toy
from torch import nn

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


def trained(case: Toy, **options: Any) -> tuple[metapl.BilevelTrainer, metapl.StepReport]:
    trainer = metapl.BilevelTrainer(case.teacher, case.student, "forward", **options)
    return trainer, trainer.step(**case.data())


def test_a_trainer_says_what_it_trains_and_how_far_it_is() -> None:
    trainer, _ = trained(toy())
    assert repr(trainer) == (
        "BilevelTrainer(mode='forward', steps_done=1, device='cpu')\n"
        "  student: Sequential, 123 parameters\n"
        "  teacher: Sequential, 123 parameters"
    )
    net = nn.Linear(1000, 7)
    alone = metapl.LossTrainer(net, optimizer=torch.optim.SGD(net.parameters()))
    assert repr(alone) == "LossTrainer(steps_done=0, device='cpu')\n  student: Linear, 7,007 parameters"


def test_results_are_short() -> None:
    trainer, report = trained(toy())
    found = trainer.hypergradient(**toy().data())
    assert "feedback=tensor[4,3]" in repr(found)
    assert "grads={1.weight, 1.bias, 3.weight and 1 more}" in repr(found)
    assert "inner_state=dict" in repr(found)
    assert repr(report).startswith("StepReport(step=0, inner_loss=1.")
    assert "feedback=tensor[4,3]" in repr(report)
    evaluation = trainer.evaluate(toy().labeled)
    assert repr(evaluation).startswith("Evaluation(n=5, accuracy=")
    assert "classes=3)" in repr(evaluation)
    fitted = trainer.fit([toy().labeled], [toy().unlabeled], steps=2, progress=False)
    for value in (found, report, evaluation, fitted, trainer):
        assert str(value) == repr(value)
        assert len(repr(value).splitlines()) <= 6
        assert all(len(line) <= 80 for line in repr(value).splitlines())
        assert "tensor([" not in repr(value)


def test_a_report_of_several_steps_is_short() -> None:
    case = toy()
    trainer = metapl.BilevelTrainer(case.teacher, case.student, "forward")
    report = trainer.step(case.labeled, metapl.Lookahead([case.unlabeled] * 5))
    assert "feedback=(tensor[4,3], tensor[4,3], tensor[4,3] and 2 more)" in repr(report).replace("\n", " ")


def test_one_sentence_says_which_mode_to_take() -> None:
    root, sentence = (
        Path(metapl.__file__).parents[1],
        ("Take forward; reinforce is the paper's Algorithm 1 and stays the trainer's default."),
    )
    pages = [(root / name).read_text() for name in ("README.md", "docs/modes.md")]
    texts = [metapl.feedback.__doc__, metapl.hypergradient.__doc__, metapl.BilevelTrainer.__doc__, *pages]
    assert all(sentence in " ".join(str(text).replace("`", "").split()) for text in texts)
