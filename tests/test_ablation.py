"""Every mode beside the exact gradient, in code and by the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from problems_zoo import everything, same, toy
from test_right_or_refused import OnceDifferentiable

import metapl
from metapl import MetaplError
from metapl.ablation import Ablation, ModeCost, ablate, recommendation
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


def test_the_recommendation_is_the_cheapest_exact_mode_or_the_nearest() -> None:
    def cost(error: float, noise: float, passes: float) -> ModeCost:
        return ModeCost(1.0, error, noise, passes, 0.1, 100)

    modes: dict[str, ModeCost | str] = {
        "unrolled": "it cannot",
        "forward": cost(1e-8, 0, 12),
        "difference": cost(1e-4, 0, 11),
        "reinforce": cost(2.0, 19.0, 9),
        "none": cost(1.0, 0, 4),
    }
    assert recommendation(modes).startswith("Take difference: its gradient is within 0.0001 of the exact one")
    assert "reinforce) costs 9.0 and has 19 times as much noise as signal" in recommendation(modes)
    sampled: dict[str, ModeCost | str] = {"reinforce": cost(2.0, 19.0, 9), "reinforce_per_example": cost(0.1, 1.5, 12)}
    assert recommendation(sampled).startswith("Take reinforce_per_example: no mode that is exact can run here")
    assert recommendation({"forward": "it cannot"}).startswith("No mode that gives feedback can run")


def test_a_model_without_an_exact_gradient_is_refused_by_name() -> None:
    problem = toy("mlp")
    trainer = metapl.BilevelTrainer(problem.teacher, OnceDifferentiable(16, 3).double(), "reinforce")
    with pytest.raises(
        MetaplError, match=r"no exact gradient to compare with: by double backward, .*; by forward mode"
    ):
        ablate(trainer, problem.labeled, problem.unlabeled)


@pytest.mark.parametrize("options", [{"steps": -1}, {"draws": 0}, {"rounds": 0}])
def test_wrong_numbers_are_refused(options: dict[str, int]) -> None:
    problem = toy("mlp")
    trainer = metapl.BilevelTrainer(**problem.networks())
    with pytest.raises(MetaplError, match=r"expected 0, 1 and 1 or more"):
        ablate(trainer, problem.labeled, problem.unlabeled, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- the command


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "metapl", "ablate", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_writes_figures_and_a_picture_and_recommends(tmp_path: Path) -> None:
    done = run("digits", "--steps", "4", "--draws", "2", "--rounds", "1", "--out", "there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "there/ablation.json").read_text())
    assert content["recommendation"] in " ".join(done.stdout.split())
    assert set(content["modes"]) == set(metapl.MODES)
    figures = {"cosine", "relative_error", "noise_to_signal", "passes", "seconds", "peak_bytes"}
    assert set(content["modes"]["forward"]) == figures
    assert set(content["modes"]["implicit"]) == {"reason"}
    assert content["points"] == [0, 2, 4]
    assert (tmp_path / "there/ablation.png").read_bytes().startswith(b"\x89PNG")


OWN = """
import torch, metapl

def build():
    teacher, student = (torch.nn.Linear(6, 3) for _ in range(2))
    x = torch.randn(12, 6)
    return metapl.BilevelTrainer(teacher, student, "forward"), (x, torch.arange(12) % 3), torch.randn(9, 6)

def wrong():
    return 3
"""


def test_networks_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "my_networks.py").write_text(OWN)
    done = run("--factory", "my_networks:build", "--modes", "forward", "reinforce", "--rounds", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Take forward" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["my_networks.py"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--factory", "my_networks:wrong"), "returned int; expected (trainer, labeled, unlabeled)"),
        (("--factory", "my_networks:missing"), "has no function missing"),
        (("--factory", "elsewhere:build"), "No module named 'elsewhere'"),
        (("--factory", "my_networks"), "expected module:function"),
        (("digitz",), "there is no recipe 'digitz'; did you mean digits?"),
        (("digits", "--modes", "forwards"), "mode='forwards' was given; expected one of"),
        (("digits", "--steps", "2", "--out", "my_networks.py"), "is a file; expected a folder"),
        ((), "no recipe was named"),
    ],
)
def test_wrong_input_ends_in_a_sentence(arguments: tuple[str, ...], text: str, tmp_path: Path) -> None:
    (tmp_path / "my_networks.py").write_text(OWN)
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert text in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
