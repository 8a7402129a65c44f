"""Every mode beside the exact gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems_zoo import everything, same, toy
from torch import nn
from trainers import OnceDifferentiable

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
    modes = found(draws=16).modes
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


def test_two_equal_draws_are_not_taken_for_none() -> None:
    """A confident teacher's first draws agree, and later ones do not."""
    torch.manual_seed(27)
    teacher, student = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    with torch.no_grad():
        teacher.weight.mul_(12)
    labeled, unlabeled = (torch.randn(6, 4).double(), torch.arange(6) % 3), torch.randn(8, 4).double()
    trainer = metapl.BilevelTrainer(teacher, student, "reinforce", teacher_losses=())
    first, second = (
        trainer.hypergradient(
            labeled, unlabeled, "reinforce_per_example", generator=torch.Generator().manual_seed(seed)
        ).grads["weight"]
        for seed in (0, 1)
    )
    assert torch.equal(first, second)
    modes = ablate(
        trainer, labeled, unlabeled, ["reinforce_per_example", "unrolled"], draws=16, rounds=1, altered=False
    ).modes
    assert isinstance(modes["reinforce_per_example"], ModeCost)
    assert isinstance(modes["unrolled"], ModeCost)
    assert modes["reinforce_per_example"].noise_to_signal > 0.01
    assert modes["unrolled"].noise_to_signal == 0


@pytest.mark.parametrize("lr", [0.1, 1e-4])
def test_an_exact_mode_of_drawn_labels_is_not_called_exact(lr: float) -> None:
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 3).double(), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        "forward",
        problem=metapl.PseudoLabels(kind="hard"),
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=lr),
        teacher_losses=(),
    )
    labeled = torch.randn(6, 4).double(), torch.arange(6) % 3
    result = ablate(trainer, labeled, torch.randn(64, 4).double(), ["forward", "none"], rounds=1, altered=False)
    forward = result.modes["forward"]
    assert isinstance(forward, ModeCost)
    assert 0 < forward.of_one_draw < 0.1  # near enough to be taken for exact
    assert "without noise" not in result.recommendation
    assert "none of these modes is exact" in result.recommendation


def test_a_model_without_an_exact_gradient_is_refused_by_name() -> None:
    problem = toy("mlp")
    trainer = metapl.BilevelTrainer(problem.teacher, OnceDifferentiable(16, 3).double(), "reinforce")
    with pytest.raises(
        MetaplError, match=r"no exact gradient to compare with: by double backward, .*; by forward mode"
    ):
        ablate(trainer, problem.labeled, problem.unlabeled)


NUMBERS = ("steps", "draws", "rounds", "train_steps")
NO_SEEDS: tuple[Any, ...] = (None, 3, "01", [1.5], [math.nan], ["a"], [2**70], [])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": -1}, r"^steps=-1: expected a whole number of 0 or more"),
        ({"draws": 1}, r"draws=1: expected a whole number of 2 or more"),
        ({"rounds": 0}, r"rounds=0: expected a whole number of 1 or more"),
        ({"train_steps": -1}, r"train_steps=-1: expected a whole number of 0 or more"),
        ({"train_steps": 1, "train_seeds": (1, 1)}, "none twice"),
        ({"modes": ["forward", metapl.feedback.Forward()]}, "forward more than once"),
        ({"modes": []}, "no mode"),
        ({"modes": "forward"}, r"modes='forward'; expected a list of modes: \['forward'\]"),
        *(({name: 1.5}, rf"{name}=1\.5: expected a whole number of . or more") for name in NUMBERS),
        *(({name: "3"}, rf"{name}='3': expected a whole number of . or more") for name in NUMBERS),
        ({"train_steps": math.nan}, r"train_steps=nan: expected a whole number of 0"),
        ({"train_steps": None}, r"train_steps=None: expected a whole number of 0"),
        *(
            (
                {"train_steps": 1, "train_seeds": seeds},
                r"train_seeds.* is .*; expected (one or more|several|a whole number)",
            )
            for seeds in NO_SEEDS
        ),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, Any], text: str) -> None:
    problem = toy("mlp")
    trainer = metapl.BilevelTrainer(**problem.networks())
    with pytest.raises(MetaplError, match=text):
        ablate(trainer, problem.labeled, problem.unlabeled, **options)


X, Y = torch.randn(4, 16).double(), torch.arange(4) % 3


@pytest.mark.parametrize("train_steps", [0, 1])
@pytest.mark.parametrize(
    ("validation", "text"),
    [
        (3, "validation is of type int; expected"),
        ((X, Y[:2]), "expected one class index for each"),
        ((X, Y.double()), "expected integers"),
        ([(X, Y + 7)], "run from 7 to 9; of 3 classes"),
        ((X.float(), Y), "its weights are float64; expected inputs of that type"),
        ([], "validation has no batches"),
    ],
)
def test_wrong_validation_is_refused_before_anything_runs(
    validation: Any, text: str, train_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = toy("mlp")
    trainer = metapl.BilevelTrainer(**problem.networks())
    monkeypatch.setattr("metapl.ablation.study.pairs", lambda *given: pytest.fail("it began"))
    with pytest.raises(MetaplError, match=text):
        ablate(trainer, problem.labeled, problem.unlabeled, train_steps=train_steps, validation=validation)


def test_validation_that_can_be_read_once_is_refused_for_several_trainings() -> None:
    problem = toy("mlp")
    trainer = metapl.BilevelTrainer(**problem.networks())
    with pytest.raises(MetaplError, match=r"validation is an iterator .*, which can be read once"):
        ablate(trainer, problem.labeled, problem.unlabeled, train_steps=1, validation=iter([(X, Y)]))


@pytest.mark.parametrize("given", [None, metapl.BilevelTrainer, torch.nn.Linear(4, 3)])
def test_what_is_no_trainer_is_refused(given: Any) -> None:
    problem = toy("mlp")
    with pytest.raises(MetaplError, match=r"given a trainer that is of type .*expected a metapl.BilevelTrainer"):
        ablate(given, problem.labeled, problem.unlabeled)
