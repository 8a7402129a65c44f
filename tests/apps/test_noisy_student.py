"""Noisy Student: losses and noise, rounds of labeling and selecting, ways to train a student."""

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import metapl, result
from noisy_student_imagenet import AS_PUBLISHED
from test_methods import Phase, phases_of, weights
from tiny_runs import NOISY_STUDENT, built_once, colored_pictures
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from metapl import MetaplError
from metapl.apps import digits
from metapl.apps.digits import Digits
from metapl.apps.images import Images
from metapl.apps.look import choose_settings
from metapl.apps.methods import noisy_student
from metapl.apps.methods.noisy_student import (
    NoisyStudent,
    configs_of,
    optimizer,
    standard_view,
    threshold_of,
)
from metapl.apps.rounds import ImagesOfRounds, PicturesOfRounds
from metapl.apps.settings import Fitting, with_flags
from metapl.apps.train import describe
from metapl.data import StepSampler
from metapl.labels.selection import select
from metapl.labels.store import LabelStore, LabelWriter
from metapl.networks.architectures import Architecture
from metapl.noisy_student import Chosen, LossesApart, Noised, PseudoLabeledBatches, end_matched
from metapl.pictures import Identity, LabeledBatches, ShiftNoiseCutout
from metapl.problems.base import Signal
from metapl.problems.model_noise import NoisyStudentLoss, model_noise
from metapl.training import FitOptions

NOTHING = Signal(torch.zeros(0))
NOISES: tuple[Any, ...] = ("all", "standard", "model", "none")
MOVES = (-1, 0, 1)
DIGITS = Digits(
    hidden=(4,), fitting=digits.fitting(steps=4, schedule="exponential", lr=0.2, labeled_batch=8)
)


def batches(labeled: int = 2, ratio: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x_l, x_u = (torch.randn(n, 4, generator=generator) for n in (labeled, ratio * labeled))
    stored = torch.rand(ratio * labeled, 3, generator=generator).softmax(1)
    return {"outer": (x_l, torch.arange(labeled) % 3), "inner": (x_u, stored)}


@pytest.mark.parametrize("hard", [False, True])
def test_the_loss_weighs_the_two_parts_as_the_paper_does(hard: bool) -> None:
    """1/(1+r) and r/(1+r) over the concatenated batch; 1 and 1 as Algorithm 1 is written."""
    for ratio in (1, 3, 14):
        network, data = nn.Linear(4, 3), batches(ratio=ratio)
        (x_l, y), (x_u, stored) = data["outer"], data["inner"]
        labeled = F.cross_entropy(network(x_l), y)
        unlabeled = F.cross_entropy(network(x_u), stored.argmax(1) if hard else stored)
        own: dict[str, Any] = {"signal": NOTHING, "step": 0}
        mean, two = (
            NoisyStudentLoss(form, hard)(network, **data, **own) for form in ("mean", "two_means")
        )
        torch.testing.assert_close(mean, labeled / (1 + ratio) + unlabeled * ratio / (1 + ratio))
        torch.testing.assert_close(two, labeled + unlabeled)
        alone = NoisyStudentLoss(hard=hard)(network, outer=data["inner"], inner=None, **own)
        torch.testing.assert_close(alone, unlabeled)


def test_without_noise_on_unlabeled_examples_dropout_acts_on_labeled_ones_alone() -> None:
    seen: dict[int, bool] = {}
    network, data = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), batches()
    network[0].register_forward_hook(
        lambda part, given, out: seen.update({len(out): part.training})
    )
    NoisyStudentLoss(model_noise=False)(network, **data, signal=NOTHING, step=0)
    assert (seen, network[0].training) == ({2: True, 6: False}, True)
    seen.clear()
    NoisyStudentLoss()(network, **data, signal=NOTHING, step=0)
    assert seen == {8: True}


def test_dropout_that_is_called_as_a_function_is_noise_too() -> None:
    pytest.importorskip("timm")
    network = Architecture(name="timm:resnet18", num_classes=3, dropout=0.5).create().train()
    labeled = (torch.rand(6, 3, 32, 32), torch.full((6, 3), 1 / 3))
    batch: Any = {"outer": labeled, "inner": None, "signal": NOTHING, "step": 0}
    with torch.no_grad():
        still = {float(NoisyStudentLoss(model_noise=False)(network, **batch)) for _ in range(3)}
        moving = {float(NoisyStudentLoss()(network, **batch)) for _ in range(3)}
    assert (len(still), len(moving)) == (1, 3)


def test_a_noisy_teacher_draws_the_same_masks_for_the_same_batch_and_leaves_the_generator() -> None:
    network = nn.Sequential(StochasticDepth(0.5, "row"), nn.Dropout(0.5), nn.Linear(4, 3)).eval()
    assert len(model_noise(network)) == 2
    x, state = torch.randn(64, 4), torch.get_rng_state()
    first, again, other = Noised(network, 0)(x), Noised(network, 0)(x), Noised(network, 1)(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, network(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(part.training for part in network.modules())


def test_each_round_has_a_network_of_its_own_and_its_rate_or_the_one_that_is_given() -> None:
    whole: dict[str, Any] = {
        "network": "pooled_cnn",
        "image_size": 32,
        "grey": False,
        "mean": (0.5,) * 3,
    }
    config = with_flags(
        Images(labeled="few", unlabeled="many"), classes=("a", "b"), std=(0.2,) * 3, **whole
    )
    # Of several networks the rate that was not given stays open.
    found = configs_of(config, NoisyStudent(rounds=2, networks=("pooled_cnn", "resnet18")))
    assert [one.pictures.network for one in found] == ["pooled_cnn", "resnet18", "resnet18"]
    assert [one.trainer_options()["clip_norm"] for one in found] == [None, 1.0, 1.0]
    given = configs_of(
        with_flags(config, lr=0.02), NoisyStudent(rounds=1, networks=("pooled_cnn", "resnet18"))
    )
    rates = [optimizer(one, nn.Linear(2, 2), 0.5).param_groups[0]["lr"] for one in (*found, *given)]
    assert rates == [0.5 * 0.01, 0.5 * 0.001, 0.5 * 0.001, 0.01, 0.01]


@pytest.mark.parametrize(
    ("flags", "said", "rates"),
    [
        (("pooled_cnn",), "adamw at 0.01, float32", {"AdamW": 0.01}),
        (
            ("pooled_cnn", "--network", "airbench_small"),
            "note: the networks are those of --networks, and not --network airbench_small",
            {"AdamW": 0.01},
        ),
        # The usual rate of the network that there is without --networks.
        (("pooled_cnn", "--lr", "0.06"), "adamw at 0.06, float32", {"AdamW": 0.06}),
        (
            ("pooled_cnn", "airbench_small"),
            "adamw at 0.01, then sgd at 0.06, float32",
            {"AdamW": 0.01, "SGD": 0.06},
        ),
        (
            ("pooled_cnn", "airbench_small", "--lr", "0.02"),
            "adamw at 0.02, then sgd at 0.02, float32",
            {"AdamW": 0.02, "SGD": 0.02},
        ),
    ],
)
def test_named_networks_train_as_is_said_by_the_recipe_of_the_first(
    flags: tuple[str, ...],
    said: str,
    rates: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = colored_pictures(tmp_path / "pictures", side=32)
    used: dict[str, float] = {}
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        make = kind.__init__

        def noted(self: Any, groups: Any, *rest: Any, _make: Any = make, **options: Any) -> None:
            used[type(self).__name__] = options["lr"]
            _make(self, groups, *rest, **options)

        monkeypatch.setattr(kind, "__init__", noted)
    folders = ("--labeled", root / "labeled", "--unlabeled", root / "unlabeled")
    of_rounds = ("--steps", "2", "--rounds", "1", "--networks", *flags, "--out", tmp_path / "run")
    told = metapl("noisy-student", "images", *folders, *of_rounds).stdout
    assert said in " ".join(told.split())
    assert used == rates
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["fields"]
    assert (recipe["network"], recipe["labeled_batch"], recipe["schedule"]) == (
        "pooled_cnn",
        32,
        "cosine",
    )


UNFIT: list[tuple[dict[str, Any], str]] = [
    *(({"rounds": 0}, "rounds"), ({"threshold": 1.0}, "threshold"), ({"ratio": 0}, "ratio")),
    *(
        ({"per_class": 0}, "per_class"),
        ({"warm_steps": 5}, "warm-start"),
    ),
    *(({"networks": ("8", "16"), "warm_start": True}, "warm-start"),),
    ({"networks": ("8y8",)}, "8y8"),
    ({"rounds": 1, "networks": ("a", "b", "c")}, "2 names"),
    ({"training": "pretrain", "loss": "two_means"}, "mean"),
    ({"threshold": 0.5, "at_most": 0.4}, "the interval of confidence is empty"),
    ({"warm_start": True, "warm_steps": 7}, "warm-steps"),
]


def test_settings_that_cannot_be_are_refused() -> None:
    for fields, word in UNFIT:
        with pytest.raises(MetaplError, match=word):
            configs_of(DIGITS, NoisyStudent(**fields).scheduled(4))


def phases(settings: NoisyStudent) -> list[Phase]:
    return phases_of(DIGITS, settings, DIGITS.data(lambda text: None, progress=False, log=None))


@pytest.mark.parametrize("warm", [False, True])
def test_a_student_begins_with_weights_of_its_own_or_with_its_teachers(warm: bool) -> None:
    own: dict[str, Any] = (
        {"warm_start": True, "warm_steps": 2} if warm else {"networks": ("4", "8", "16")}
    )
    found = phases(NoisyStudent(rounds=2, **own))
    assert [phase.options["phase"] for phase in found] == ["round-0", "round-1", "round-2"]
    assert [phase.options["steps"] for phase in found] == [4, *([2, 2] if warm else [4, 4])]
    for before, after in itertools.pairwise(found):
        left = weights(before.trainer.student)
        assert {torch.equal(p, left[name]) for name, p in after.before[0].items()} == {warm}
    rates = [{group["lr"] for group in phase.trainer.optimizer.param_groups} for phase in found]
    assert rates[:2] == [{0.2}, {0.2 * end_matched(2, 4) if warm else 0.2}]
    assert {phase.options["decay_every"] for phase in found} == {4 * 2.4 / 350}


def test_a_student_learns_from_labeled_and_from_more_unlabeled_examples_with_noise() -> None:
    first, second = phases(NoisyStudent(rounds=1, ratio=5, labels="hard", unlabeled_noise="model"))
    assert first.unlabeled is None
    assert second.trainer.losses == (
        NoisyStudentLoss("mean", hard=True, model_noise=True, label_smoothing=0.0),
    )
    assert (len(second.labeled[0][0]), len(second.unlabeled[0][0])) == (8, 40)
    assert first.labeled.view == second.labeled.view != second.unlabeled.weak
    assert not torch.equal(first.labeled[0][0], second.labeled[0][0]), "each round draws its own"
    assert phases(NoisyStudent(rounds=1))[1].unlabeled.weak == first.labeled.view


def test_the_unlabeled_examples_get_the_noise_that_was_asked_for() -> None:
    """The digits' standard augmentation is their move by a pixel alone."""
    views = {noise: phases(NoisyStudent(rounds=1, unlabeled_noise=noise))[1] for noise in NOISES}
    assert views["all"].unlabeled.weak == ShiftNoiseCutout()
    assert views["standard"].unlabeled.weak == ShiftNoiseCutout(noise=0.0, cutout=0)
    assert views["model"].unlabeled.weak == views["none"].unlabeled.weak == Identity()
    has_model_noise = {noise: phase.trainer.losses[0].model_noise for noise, phase in views.items()}
    assert has_model_noise == {"all": True, "standard": True, "model": True, "none": False}
    x = torch.rand(6, 1, 8, 8)
    moved = standard_view(DIGITS.data(lambda text: None, progress=False, log=None))(
        x, seed=1, step=2, examples=torch.arange(6)
    )
    shifts = [
        torch.roll(F.pad(x, (1, 1, 1, 1)), (a, b), (2, 3))[..., 1:9, 1:9]
        for a in MOVES
        for b in MOVES
    ]
    assert all(
        any(torch.equal(row, shifted[i]) for shifted in shifts) for i, row in enumerate(moved)
    )
    assert not torch.equal(moved, x)


def test_losses_of_both_kinds_are_recorded_with_the_noise_and_without_it() -> None:
    """Each is the mean cross-entropy of the same examples, by hand.

    Nothing of the network is changed.
    """
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
    ).train()
    network(torch.randn(64, 4))
    images, labels, stored = (
        torch.rand(8, 1, 2, 2),
        torch.arange(8) % 3,
        torch.rand(8, 3).softmax(1),
    )
    view = ShiftNoiseCutout(cutout=0)
    labeled = LabeledBatches(images, labels, StepSampler(8, 128, seed=0), view, 0)
    every = torch.arange(8)
    sampler = StepSampler(8, 256, seed=0, stream=1)
    pairs = PseudoLabeledBatches(
        images, sampler, view, None, 0, chosen=Chosen(every, every, lambda rows: stored[rows])
    )
    before = copy.deepcopy(network.state_dict())
    losses = LossesApart(labeled, pairs, NoisyStudentLoss(model_noise=False), every=3, steps=4)
    trainer = SimpleNamespace(student=network)
    assert losses(1, {}, trainer) == losses(2, {}, trainer) == {}
    found = losses(3, {}, trainer)
    assert found.keys() == losses(4, {}, trainer).keys()
    network.eval()
    with torch.no_grad():
        of_labels = F.cross_entropy(network(images), labels)
        of_pairs = F.cross_entropy(network(images), stored)
        passes = dataclasses.replace(pairs, sampler=StepSampler(8, 64, seed=0, stream=1))
        noisy_pairs = (
            sum(F.cross_entropy(network(x), q) for x, q in (passes[step] for step in range(2))) / 2
        )
    assert found["labeled_loss_without_noise"] == pytest.approx(float(of_labels), rel=1e-5)
    assert found["unlabeled_loss_without_noise"] == pytest.approx(float(of_pairs), rel=1e-5)
    assert found["unlabeled_loss_with_noise"] == pytest.approx(float(noisy_pairs), rel=1e-5)
    assert found["labeled_loss_with_noise"] != found["labeled_loss_without_noise"]
    assert losses(3, {}, trainer)["labeled_loss_with_noise"] != found["labeled_loss_with_noise"], (
        "dropout draws anew"
    )
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())


def test_networks_have_the_noise_of_their_size_unless_it_is_given() -> None:
    """EfficientNets have that of the authors' code, the paper's for B7 and L2; others have 0.2."""

    def noise(**fields: Any) -> tuple[float, float]:
        pictures = PicturesOfRounds(**fields)
        architecture = pictures.architecture(classes=2)
        return architecture.dropout, architecture.stochastic_depth

    assert noise(network="efficientnet_b0") == (0.2, 0.2)
    assert noise(network="efficientnet_b7") == noise(network="efficientnet_l2") == (0.5, 0.2)
    for name, (_, dropout, _) in AS_PUBLISHED.items():
        if name.startswith("efficientnet"):
            assert noise(network=name)[0] == dropout, name
    assert noise(network="resnet18") == noise(network="pooled_cnn") == (0.2, 0.0)
    assert noise(network="efficientnet_b0", dropout=0.0, stochastic_depth=0.1) == (0.0, 0.1)
    assert noise(network="resnet18", backbone="resnet18", tuning="head") == (0.0, 0.0), (
        "what is frozen has no noise"
    )
    with pytest.raises(MetaplError, match="has no stochastic_depth"):
        noise(network="resnet18", stochastic_depth=0.2)
    config = ImagesOfRounds(
        labeled="few", unlabeled="many", pictures=PicturesOfRounds(network="efficientnet_b0")
    )
    other = config.with_network("resnet18").pictures.architecture(2)
    assert (other.dropout, other.stochastic_depth) == (0.2, 0.0)


def test_a_training_of_minutes_spends_half_of_it_at_a_high_rate() -> None:
    """By the paper's exponential a student loses five points.

    docs/studies/noisy-student.md has the rows.
    """
    config = ImagesOfRounds(labeled="few", unlabeled="many")
    # The network chooses how its rate falls.
    assert config.fitting.schedule is None
    schedules = []
    for network in ("pooled_cnn", "airbench_small", "resnet18"):
        pictures = dataclasses.replace(config.pictures, network=network)
        schedules.append(pictures.recipe.schedule)
    assert schedules == ["cosine", "linear", "cosine"]
    options = config.fitting.options()
    fits = [FitOptions(steps=1_000, **{**options, "schedule": name}) for name in schedules]
    fits.append(FitOptions(steps=1_000, schedule="exponential"))
    means = [sum(map(fit.rate, range(1_000))) / 1_000 for fit in fits]
    assert means == pytest.approx([0.5, 0.5, 0.5, 0.22], abs=0.01)
    assert NoisyStudent().unlabeled_noise == "all"


def test_pictures_have_as_many_unlabeled_as_labeled_ones_in_a_batch_and_digits_three_times(
    colors: Path,
) -> None:
    """Unless --ratio is given; the run records what it took."""
    assert NoisyStudent().scheduled(4).ratio == 3
    assert NoisyStudent(ratio=7).scheduled(4).ratio == 7
    _, second = phases(NoisyStudent(rounds=1))
    assert len(second.unlabeled[0][0]) == 3 * len(second.labeled[0][0])
    folders = {name: str(colors / name) for name in ("labeled", "unlabeled")}
    config = ImagesOfRounds(**folders, fitting=Fitting(steps=4, device="cpu"))
    for asked, expected in ((None, 1), (5, 5)):
        found, method = choose_settings(config, NoisyStudent(ratio=asked), lambda text: None)
        assert describe(found, method)["fields"]["ratio"] == method.ratio == expected


def test_a_warm_start_of_fewer_steps_asks_for_the_rate_that_it_is_matched_by() -> None:
    cosine = with_flags(DIGITS, schedule="cosine")
    whole = NoisyStudent(rounds=1, warm_start=True)
    assert len(configs_of(cosine, whole)) == 2
    fewer = NoisyStudent(rounds=1, warm_start=True, warm_steps=2)
    assert len(configs_of(DIGITS, fewer)) == 2
    with pytest.raises(MetaplError, match="--warm-steps 2: expected --schedule exponential"):
        configs_of(cosine, fewer)


def test_finetuning_without_steps_is_refused_before_a_network_is_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    none = with_flags(DIGITS, finetune_steps=0)
    NoisyStudent(training="pretrain").check_chosen(none)
    staged = NoisyStudent(training="pretrain_finetune")
    staged.check_chosen(DIGITS)
    NoisyStudent().check_chosen(with_flags(DIGITS, finetune_steps=7))
    said = " ".join(capsys.readouterr().out.split())
    assert "note: --finetune-steps 7 is not read: finetuning is of --training" in said
    NoisyStudent().check_chosen(DIGITS)
    assert capsys.readouterr().out == ""
    with pytest.raises(MetaplError, match="--finetune-steps 0: expected 1 or more"):
        staged.check_chosen(none)


def test_pseudo_labels_alone_come_first_and_labeled_examples_after_them() -> None:
    _, alone, tuned = phases(
        NoisyStudent(rounds=1, training="pretrain_finetune", unlabeled_noise="none")
    )
    assert (alone.trainer.losses, alone.unlabeled) == (
        (NoisyStudentLoss("mean", hard=False, model_noise=False),),
        None,
    )
    how = tuned.options
    assert (how["phase"], how["schedule"], how["steps"]) == ("round-1-finetune", "cosine", 200)
    assert tuned.trainer.student is alone.trainer.student
    assert len(phases(NoisyStudent(rounds=1, training="pretrain"))) == 2


def test_a_threshold_and_a_selection_compare_confidences_alike(tmp_path: Path) -> None:
    """In float32, 0.1 is more than it is in float64, and not above itself."""
    with LabelWriter(tmp_path / "all", tuple("0123456789")) as writer:
        writer.add(list(range(4)), torch.full((4, 10), 0.1))
    store = LabelStore(tmp_path / "all")
    assert select(store, tmp_path / "some", threshold=threshold_of(store, 0.1)).kept == 4


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_once(
        tmp_path_factory, "tiny-rounds", lambda out: metapl(*NOISY_STUDENT, "--out", str(out))
    )


def test_a_run_keeps_the_labels_of_each_round_and_what_was_selected_of_them(rounds: Path) -> None:
    told = result(rounds)
    assert [each["round"] for each in told["rounds"]] == [1, 2]
    for each in told["rounds"]:
        labels, chosen = (
            LabelStore(rounds / "rounds" / str(each["round"]) / n) for n in ("labels", "selected")
        )
        assert each["store"] == f"rounds/{each['round']}/labels"
        assert (
            (len(labels), len(chosen)) == (each["unlabeled"], each["kept"]) == (1180, each["kept"])
        )
        kept = labels.column("label")[labels.column("confidence") > each["threshold"]]
        assert np.bincount(kept, minlength=10).tolist() == [*each["kept_per_class"].values()]
        assert len(kept) == each["kept"]
        counts = {*each["copies_per_class"].values()} - {0}
        assert len(counts) == 1, "balanced"
        assert (
            sum(each["copies_per_class"].values())
            == each["copies"]
            == len(chosen.rows_with_copies())
        )
        assert each["store_sha256"] == labels.sha256
    first, second = told["rounds"]
    assert first["changed_labels"] is None
    before, after = (LabelStore(rounds / "rounds" / n / "labels").column("label") for n in "12")
    assert second["changed_labels"] == int((before != after).sum())
    assert first["weights_fingerprint"] == second["teacher"]["weights_fingerprint"]
    assert second["test_accuracy"] == told["student_test_accuracy"] == told["test_accuracy"]
    assert second["teacher"]["test_accuracy"] == told["teacher_test_accuracy"]
    assert sorted(told["networks"]) == ["student", "teacher"]
    assert "Rounds" in (rounds / "report.html").read_text()


def test_pictures_are_selected_once_and_labeled_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    metapl(*NOISY_STUDENT, "--select-by", "once", "--share", "0.5", "--out", run)
    first, second = result(run)["rounds"]
    assert first["selection"] == second["selection"] == "rounds/1/selected"
    assert not (run / "rounds" / "2" / "selected").exists()
    selected, relabeled = LabelStore(run / "rounds/1/selected"), LabelStore(run / "rounds/2/labels")
    assert [*selected] == [*relabeled]
    assert (
        sum(second["copies_per_class"].values())
        == second["copies"]
        == selected.column("copies").sum()
    )
    by_hand = np.bincount(relabeled.column("label"), selected.column("copies"), minlength=10)
    assert [*second["copies_per_class"].values()] == by_hand.tolist()
    changed = int((selected.column("label") != relabeled.column("label")).sum())
    assert second["changed_labels"] == changed > 0
    named = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    apart = [row for row in named if "unlabeled_loss_with_noise" in row]
    assert {(row["phase"], row["step"]) for row in apart} == {
        (f"round-{n}", s) for n in (1, 2) for s in (3, 6)
    }


def test_a_selection_that_is_made_once_outlives_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--select-by", "once", "--out")
    metapl(*NOISY_STUDENT, *asked, tmp_path / "whole")

    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(noisy_student.Rounds, "relabel", stopped)
        metapl(*NOISY_STUDENT, *asked, tmp_path / "stopped", code=130)
    assert (tmp_path / "stopped/rounds/1/selected/store.json").exists()
    metapl(*NOISY_STUDENT, *asked, tmp_path / "stopped", "--resume")
    whole, again = result(tmp_path / "whole"), result(tmp_path / "stopped")
    assert again["rounds"] == whole["rounds"]
    assert again["sha256"]["student.safetensors"] == whole["sha256"]["student.safetensors"]


WAYS = (
    "--noisy-teacher --dropout 0.2 --labels hard --balance False --warm-start --warm-steps 2",
    "--training pretrain_finetune --finetune-steps 3 --unlabeled-noise none",
    "--networks 4 8x8 --per-class 9 --loss two_means",
)


@pytest.mark.parametrize(
    "flags", [WAYS[0], *(pytest.param(way, marks=pytest.mark.long) for way in WAYS[1:])]
)
def test_each_way_of_training_leaves_a_run(flags: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny = "--steps 4 --hidden 4 --labeled-batch 8 --threshold 0.12 --log-every 1"
    metapl("noisy-student", "digits", *tiny.split(), "--rounds", "1", *flags.split(), "--out", run)
    (only,) = result(run)["rounds"]
    assert 0 < only["kept"] <= only["unlabeled"] == 1180
    named = {
        row["phase"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    }
    assert named == {"round-0", "round-1", *(["round-1-finetune"] * ("finetune" in flags))}
    store = LabelStore(run / "rounds" / "1" / "labels")
    assert ("augmented" in store.provenance["views"].replace("not augmented", "")) == (
        "noisy" in flags
    )
    assert "--per-class" not in flags or {*only["copies_per_class"].values()} <= {0, 9}
    assert (only["copies"] == only["kept"]) or "False" not in flags
    found = json.loads(metapl("evaluate", run, "--json").stdout)
    assert found["accuracy"] == found["recorded_accuracy"]
