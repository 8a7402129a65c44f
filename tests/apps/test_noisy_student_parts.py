"""What Noisy Student is made of: its loss, its noise, its settings, its schedule, and steps at equal cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused
from flat import made
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from metapl.apps.commands import main
from metapl.apps.experiments.accuracies import better_before
from metapl.apps.experiments.rounds import Noised, Rounds
from metapl.apps.labels import LabelStore, LabelWriter
from metapl.apps.labels.queries import select
from metapl.apps.networks import Architecture
from metapl.apps.recipes import Digits, ImageFolders
from metapl.apps.recipes.base import Run
from metapl.apps.recipes.methods.noisy_student import (
    NoisyStudent,
    StoredLabelLoss,
    _finetuned,
    end_matched,
    networks_of,
)
from metapl.apps.recipes.settings import OpenOptimizer, SelfTraining
from metapl.errors import MetaplError
from metapl.problems.base import Signal
from metapl.problems.stored import NoisyStudentLoss, model_noise
from metapl.training import FitOptions, FitResult

NOTHING = Signal(torch.zeros(0))


def batches(labeled: int = 2, ratio: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x_l, x_u = (torch.randn(n, 4, generator=generator) for n in (labeled, ratio * labeled))
    stored = torch.rand(ratio * labeled, 3, generator=generator).softmax(1)
    return {"labeled": (x_l, torch.arange(labeled) % 3), "unlabeled": (x_u, stored)}


@pytest.mark.parametrize("ratio", [1, 3, 14])
@pytest.mark.parametrize("hard", [False, True])
def test_the_loss_weighs_the_two_parts_as_the_paper_does(ratio: int, hard: bool) -> None:
    """1/(1+r) and r/(1+r) over the concatenated batch; 1 and 1 as Algorithm 1 is written."""
    network, data = nn.Linear(4, 3), batches(ratio=ratio)
    (x_l, y), (x_u, stored) = data["labeled"], data["unlabeled"]
    labels = stored.argmax(1) if hard else stored
    labeled, unlabeled = F.cross_entropy(network(x_l), y), F.cross_entropy(network(x_u), labels)
    found = {
        form: NoisyStudentLoss(form, hard)(network, **data, signal=NOTHING, step=0)  # type: ignore[arg-type]  # both forms
        for form in ("mean", "two_means")
    }
    torch.testing.assert_close(found["mean"], labeled / (1 + ratio) + unlabeled * ratio / (1 + ratio))
    torch.testing.assert_close(found["two_means"], labeled + unlabeled)
    alone = StoredLabelLoss(hard)(network, labeled=data["unlabeled"], unlabeled=None, signal=NOTHING, step=0)
    torch.testing.assert_close(alone, unlabeled)


def test_without_noise_on_unlabeled_examples_dropout_acts_on_labeled_ones_alone() -> None:
    seen: dict[int, bool] = {}

    class Watched(nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen[len(x)] = self.training
            return super().forward(x)

    network, data = nn.Sequential(Watched(0.5), nn.Linear(4, 3)), batches()
    NoisyStudentLoss(model_noise=False)(network, **data, signal=NOTHING, step=0)
    assert seen == {2: True, 6: False}
    assert network[0].training
    seen.clear()
    NoisyStudentLoss()(network, **data, signal=NOTHING, step=0)
    assert seen == {8: True}


class Functional(nn.Module):
    """Calls dropout as a function, as some of timm's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_rate, self.norm, self.linear = 0.5, nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.norm.training
        return self.linear(F.dropout(x, self.drop_rate, self.training))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["functional", "timm:resnet18"])
def test_dropout_that_is_called_as_a_function_is_noise_too(name: str) -> None:
    network: nn.Module = Functional()
    inputs = torch.randn(6, 4)
    if name != "functional":
        pytest.importorskip("timm")
        network, inputs = Architecture(name=name, num_classes=3, dropout=0.5).create().train(), torch.rand(6, 3, 32, 32)
    batch = {"labeled": (inputs, torch.full((6, 3), 1 / 3)), "unlabeled": None, "signal": NOTHING, "step": 0}
    with torch.no_grad():
        still = {float(StoredLabelLoss(model_noise=False)(network, **batch)) for _ in range(3)}
        moving = {float(StoredLabelLoss()(network, **batch)) for _ in range(3)}
    assert (len(still), len(moving)) == (1, 3)
    assert all(part.training for part in network.modules())


def test_networks_of_the_rounds_have_the_rates_of_their_kinds() -> None:
    """Where the user left them open; what was given stays."""
    fields: dict[str, Any] = {"image_size": 32, "grey": False, "precision": "float32", "val_fraction": 0.0}
    fields |= {"mean": (0.5,) * 3, "std": (0.2,) * 3, "uda_prior": (0.5, 0.5), "class_names": ("a", "b")}
    fields |= {"labeled": "few", "unlabeled": "many", "network_name": "pooled_cnn"}
    settings = SelfTraining(rounds=1, networks=("pooled_cnn", "resnet18"))

    def found(**given: Any) -> list[tuple[float, float]]:
        recipe = made(ImageFolders, **fields, **given).for_network("pooled_cnn").scheduled(100)
        return [(each.method.teacher.lr, each.clip_norm) for each in networks_of(recipe, settings)]

    assert found() == [(0.01, 0.0), (0.001, 1.0)]
    assert found(teacher=OpenOptimizer(lr=0.02), clip_norm=0.5) == [(0.02, 0.5)] * 2
    assert found(teacher=OpenOptimizer(lr=0.02)) == [(0.02, 0.0), (0.02, 1.0)]


def test_a_threshold_and_a_selection_compare_confidences_alike(tmp_path: Path) -> None:
    """In float32, 0.1 is more than it is in float64, and not above itself."""
    with LabelWriter(tmp_path / "all", tuple("0123456789")) as writer:
        writer.add(list(range(4)), torch.full((4, 10), 0.1))
    store = LabelStore(tmp_path / "all")
    recipe, measured = Digits(), {"test_accuracy": 0.1}
    rounds = Rounds(recipe, tmp_path, recipe.task(), SelfTraining(threshold=0.1), False, lambda _: measured, print)
    assert rounds.threshold(store) == 0
    assert select(store, tmp_path / "some", threshold=rounds.threshold(store)).kept == 4


@pytest.mark.parametrize("warm", [False, True])
def test_a_student_begins_with_weights_of_its_own_or_with_its_teachers(warm: bool) -> None:
    settings = SelfTraining(rounds=2, warm_start=warm)
    recipe = Digits(steps=4, hidden=(4,), schedule="exponential", method=NoisyStudent(self_training=settings))
    phases = recipe.method.phases(Run(recipe, recipe.task(), nn.Identity(), nn.Identity()))
    teacher = next(phases).trainer.student
    for _ in range(settings.rounds):
        with torch.no_grad():
            for p in teacher.parameters():  # as if it had been trained
                p.add_(0.01)
        student = phases.send(FitResult(None, 4, {})).trainer.student
        begun = [torch.equal(p, q) for p, q in zip(student.parameters(), teacher.parameters(), strict=True)]
        assert begun == [warm] * len(begun)
        first, teacher = teacher, student
        assert all(p.data_ptr() != q.data_ptr() for p, q in zip(first.parameters(), student.parameters(), strict=True))


def test_each_round_draws_its_own_batches_of_finetuning() -> None:
    recipe = Digits(hidden=(4,))
    task, drawn = recipe.task(), []

    for number in (1, 2, 1):
        labeled = _finetuned(recipe, recipe.network(), task, number).labeled
        drawn.append(torch.cat([labeled[step][0].flatten() for step in range(3)]))
    first, second, again = drawn
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_a_noisy_teacher_draws_the_same_masks_for_the_same_batch_and_leaves_the_generator() -> None:
    network = nn.Sequential(StochasticDepth(0.5, "row"), nn.Dropout(0.5), nn.Linear(4, 3)).eval()
    assert len(model_noise(network)) == 2
    x = torch.randn(64, 4)
    state = torch.get_rng_state()
    first, again, other = Noised(network, 0)(x), Noised(network, 0)(x), Noised(network, 1)(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, network(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(part.training for part in network.modules())


def test_the_exponential_schedule_ends_where_the_papers_does() -> None:
    """0.128, times 0.97 every 2.4 of 350 epochs or every 4.8 of 700; a warm start of fewer epochs ends there too."""
    for epochs in (350, 700):
        options = FitOptions(steps=epochs, schedule="exponential")
        assert 0.128 * options.rate(epochs) == pytest.approx(0.001507, rel=1e-3)
    for epochs, start in ((35, 0.00235), (70, 0.00366), (140, 0.00891), (280, 0.0526)):
        assert 0.128 * end_matched(epochs, 350) == pytest.approx(start, rel=2e-3)
        options = FitOptions(steps=epochs, schedule="exponential", decay_every=2.4)
        assert start * options.rate(epochs) == pytest.approx(0.001507, rel=3e-3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"threshold": 1.0}, "threshold=1.0"),
        ({"ratio": 0}, "ratio=0"),
        ({"per_class": 0}, "per_class=0"),
        ({"warm_steps": 5}, "None without warm_start"),
        ({"rounds": 1, "networks": ("a", "b", "c")}, "2 names at most"),
    ],
)
def test_settings_out_of_their_range_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(MetaplError, match=words):
        SelfTraining(**fields)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "1", "--networks", "8", "16", "32"], "--networks 8 16 32: expected 2 names at most"),
        (
            ["--threshold", "0.5", "0.6"],
            "Unrecognized options: 0.6",
        ),
        (["more"], "Unrecognized options: more"),
    ],
)
def test_a_wrong_flag_is_told_as_it_was_written(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "noisy-student", "digits", *arguments)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"networks": ("16x16", "8")}, "the student of round 1 is 8 with .* parameters, and its teacher 16x16"),
        ({"networks": ("8", "16"), "warm_start": True}, "are not the same"),
        ({"warm_start": True}, "expected --schedule exponential"),
        ({"networks": ("8y8",)}, "expected widths of hidden layers"),
    ],
)
def test_networks_that_do_not_follow_each_other_are_refused(fields: dict[str, Any], words: str) -> None:
    settings = SelfTraining(**fields)
    with pytest.raises(MetaplError, match=words):
        networks_of(Digits(), settings)


TINY = ("noisy-student", "digits", "--steps", "4", "--hidden", "4", "--labeled-batch", "8")


@pytest.mark.parametrize(
    "flags",
    [
        ("--training", "pretrain"),
        ("--training", "pretrain_finetune", "--finetune-steps", "3", "--unlabeled-noise", "none"),
        ("--warm-start", "--warm-steps", "2", "--loss", "two_means"),
        ("--noisy-teacher", "--dropout", "0.2", "--labels", "hard", "--no-balance", "--unlabeled-noise", "model"),
        ("--networks", "4", "8x8", "--per-class", "9"),
    ],
    ids=lambda flags: flags[0] + flags[1],
)
def test_each_way_of_training_leaves_a_run(flags: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*TINY, "--rounds", "1", *flags, "--out", str(run)]) == 0
    result = json.loads((run / "result.json").read_text())
    (only,) = result["rounds"]
    assert 0 < only["kept"] <= only["unlabeled"] == 1180
    phases = {row["phase"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    if "pretrain_finetune" in flags:
        assert phases == {"round-0", "round-1", "round-1-finetune"}
    if "--no-balance" in flags:
        assert only["copies"] == only["kept"]
    if "--per-class" in flags:
        assert {*only["copies_per_class"].values()} <= {0, 9}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--uda-weight", "2"), "Unrecognized options: --uda-weight"),
        (("--training", "pretrain", "--loss", "two_means"), "--loss two_means: expected mean with training=pretrain"),
        (("--networks", "16x16", "8"), "Noisy Student's students are equal or larger"),
        (("--rounds", "0"), "--rounds 0: expected a whole number from 1 to"),
        (("--compare",), "Unrecognized options: --compare"),
        (("--finetune-steps", "2"), "Unrecognized options: --finetune-steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_flags_that_do_nothing_are_refused_before_anything_is_written(
    flags: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY[:2], *flags, "--out", str(tmp_path / "run")]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("first", "second", "expected"), [(0.9, 0.8, "Round 0 reached 90.0 %"), (0.6, 0.8, None)])
def test_a_run_says_where_an_earlier_round_did_better_on_test(
    first: float, second: float, expected: str | None
) -> None:
    rounds = [{"test_accuracy": 0.8, "teacher": {"test_accuracy": first}}, {"test_accuracy": second, "teacher": {}}]
    assert better_before([*rounds, {"test_accuracy": 0.8, "teacher": {}}], 0.8) == better_before(rounds, 0.8)
    said = " ".join(better_before(rounds, second))
    assert expected in said if expected else said == ""
    assert better_before([{"teacher": {}}, {"teacher": {}}], 0.5) == []
