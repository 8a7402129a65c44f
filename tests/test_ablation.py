"""Every mode beside the exact gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems_zoo import everything, same, toy
from test_right_or_refused import OnceDifferentiable

import metapl
from metapl import MetaplError
from metapl.ablation import Ablation, ModeCost, ablate
from metapl.feedback import Difference

EXACT = ("unrolled", "forward", "difference")


def found(**options: Any) -> Ablation:
    problem = toy("dropout", dtype=torch.float32, rows=8)
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="reinforce")
    return ablate(trainer, problem.labeled, problem.unlabeled, rounds=1, **options)


def test_the_figures_are_what_is_known_of_the_modes() -> None:
    modes = found(draws=40).modes
    assert tuple(modes) == metapl.MODES
    assert isinstance(modes["implicit"], str)
    assert "curvature" in modes["implicit"]
    costs = {name: mode for name, mode in modes.items() if isinstance(mode, ModeCost)}
    for name in EXACT:
        assert costs[name].cosine > 0.9999
        assert costs[name].relative_error < 1e-2
        assert costs[name].noise_to_signal == 0
    noise = {name: costs[name].noise_to_signal for name in ("reinforce", "reinforce_per_example", "loss_difference")}
    assert noise["reinforce_per_example"] < noise["reinforce"]
    assert costs["reinforce_per_example"].cosine > 0.8
    assert costs["none"].relative_error == 1
    assert costs["none"].passes < costs["reinforce"].passes < costs["forward"].passes
    assert all(cost.seconds > 0 and cost.peak_bytes > 0 for cost in costs.values())


def test_nothing_moves_though_it_trains_in_between() -> None:
    problem = toy("batch_norm")
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward")
    for _ in range(2):
        trainer.step(problem.labeled, problem.unlabeled)
    before, state = everything(problem), trainer.state_dict()
    result = ablate(trainer, [problem.labeled] * 2, [problem.unlabeled] * 3, ["forward", "none"], steps=4, rounds=1)
    assert result.points == (0, 2, 4)
    assert same(before, everything(problem))
    now = trainer.state_dict()
    assert now["steps_done"] == state["steps_done"] == 2
    for name, moments in state["inner"]["state"].items():
        assert torch.equal(now["inner"]["state"][name]["momentum_buffer"], moments["momentum_buffer"])


def test_estimators_with_settings_and_a_clip() -> None:
    """The student's clip is part of the update, in the exact gradient too."""
    problem = toy("mlp")
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward", clip_norm=0.05)
    modes = ablate(trainer, problem.labeled, problem.unlabeled, [Difference(one_sided=True)], rounds=1).modes
    assert isinstance(modes["difference"], ModeCost)
    assert modes["difference"].relative_error < 1e-3


def test_a_model_without_an_exact_gradient_is_refused_by_name() -> None:
    problem = toy("mlp")
    trainer = metapl.BilevelTrainer(problem.teacher, OnceDifferentiable(16, 3).double(), "reinforce")
    with pytest.raises(
        MetaplError, match=r"no exact gradient to compare with: by double backward, .*; by forward mode"
    ):
        ablate(trainer, problem.labeled, problem.unlabeled)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": -1}, r"steps=-1\): expected 0 or more"),
        ({"draws": 1}, r"draws=1\): expected 2 or more"),
        ({"rounds": 0}, r"rounds=0\): expected 1 or more"),
        ({"train_steps": -1}, r"train_steps=-1\): expected 0 or more"),
        ({"train_steps": 1, "train_seeds": (1, 1)}, "none twice"),
        ({"modes": ["forward", metapl.feedback.Forward()]}, "forward more than once"),
        ({"modes": []}, "no mode"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, Any], text: str) -> None:
    problem = toy("mlp")
    trainer = metapl.BilevelTrainer(**problem.networks())
    with pytest.raises(MetaplError, match=text):
        ablate(trainer, problem.labeled, problem.unlabeled, **options)
