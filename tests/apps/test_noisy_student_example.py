"""``examples/noisy_student_imagenet.py`` on small files, as torchvision reads each data set."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import noisy_student_imagenet as script
import numpy as np
import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from test_protocol_examples import written
from tiny_runs import color_folders
from torch import nn

from metapl import MetaplError
from metapl.labels.selection import select
from metapl.labels.store import LabelStore, LabelWriter
from metapl.networks import architectures as networks
from metapl.pictures import scan_unlabeled
from metapl.run_folder import EndedRun
from metapl.training import FitOptions

pytestmark = pytest.mark.docs

TINY: dict[str, Any] = {
    "device": "cpu",
    "num_workers": 0,
    "log_every": 1,
    "validate_every": 2,
    "save_every": 2,
    "seed": 3,
}
TINY |= {"labeled_batch": 4, "finetune_batch": 4, "channels_last": False}
CNN: dict[str, Any] = {
    "networks": ("small_cnn",) * 3,
    "filter_network": "small_cnn",
    "stochastic_depth": 0.0,
}
CNN |= {"image_sizes": (16,), "ratios": (2,), "steps": 3, "lr": 0.01 * 2_048 / 4, "per_class": 20}


def tiny(name: str, tmp_path: Path, patch: pytest.MonkeyPatch, **own: Any) -> script.Settings:
    c = script.ROWS[name].settings()
    places: dict[str, Any] = {
        "root": written(c.data, tmp_path / "data", patch),
        "out": str(tmp_path / "run"),
    }
    if c.data == "imagenet":
        places["labels_per_class"] = 3
    return dataclasses.replace(c, **TINY, **places, **own)


def metrics(out: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


SHORT = ("b0", "svhn")


@pytest.mark.parametrize(
    "name",
    [row if row in SHORT else pytest.param(row, marks=pytest.mark.long) for row in script.ROWS],
)
def test_every_row_takes_twenty_steps_in_miniature_and_stays_finite(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the row's own rate, dropout, depth, magnitudes and ratios.

    Width, depth and side are cut.
    """
    for network in networks.EFFICIENTNETS:
        monkeypatch.setitem(networks._SCALES, network, (0.1, 0.1))
    row = script.ROWS[name].settings()
    small: dict[str, Any] = {
        "steps": 20,
        "lr": row.lr * row.labeled_batch / 4,
        "validate_every": 20,
        "save_every": 20,
    }
    if row.data == "imagenet":
        small |= {
            "image_sizes": (32,),
            "per_class": 50,
            "finetune_sizes": tuple(40 * (size > 0) for size in row.finetune_sizes),
        }
        monkeypatch.setattr(
            script, "AS_PUBLISHED", {key: (32, *v[1:]) for key, v in script.AS_PUBLISHED.items()}
        )
    else:
        small |= {"validation": 10, "per_class": 50, "threshold": 0.05}
    c = dataclasses.replace(tiny(name, tmp_path, monkeypatch), **small)
    result = script.train(c)
    assert [reached["network"] for reached in result["rounds"]] == list(c.networks)
    for number in range(len(c.networks)):
        weights = load_file(tmp_path / "run" / f"round-{number}.safetensors")
        assert all(bool(t.isfinite().all()) for t in weights.values())
    rows = metrics(c.out)
    assert {row["step"] for row in rows if row["phase"] == "round-1"} == set(range(1, 21))
    losses = [value for row in rows for key, value in row.items() if "loss" in key]
    assert np.isfinite(losses).all()
    # FixRes is of every L2 of Table 7, and of no other network.
    finetuned = [reached.get("finetuned") for reached in result["rounds"]]
    expected = [network.endswith("_l2") for network in c.networks]
    assert [entry is not None for entry in finetuned] == expected
    assert all(entry["image_size"] == 40 for entry in finetuned if entry)
    delivered = (finetuned[-1] or result["rounds"][-1])["test_accuracy"]
    assert EndedRun.load(tmp_path / "run" / "delivered").result["test_accuracy"] == delivered


def test_steps_and_rate_follow_the_labeled_batch_and_the_number_of_labeled_pictures() -> None:
    c = script.ROWS["b7"].settings()
    network = script.networks_of(c)[1]
    for batch in (512, 1_024, 2_048):
        schedule = script.schedule_of(
            dataclasses.replace(c, labeled_batch=batch), network, 1_281_167
        )
        assert schedule.steps == round(350 * 1_281_167 / batch)
        assert schedule.lr == pytest.approx(0.128 * batch / 2_048)
        assert schedule.warmup == round(5 * 1_281_167 / batch)
    assert script.schedule_of(c, network, 128_000).steps == 21_875
    assert script.finetune_steps(c, network, 1_281_167, c.finetune_epochs, 512) == 3_753
    shortened = script.schedule_of(dataclasses.replace(c, steps=100), network, 1_281_167)
    assert (shortened.steps, shortened.warmup, shortened.lr) == (100, 1, 0.128)


def test_each_network_has_epochs_of_its_own() -> None:
    """A chain of study 1: 350 epochs of B7 and L2, 700 of the small student at its end."""
    names = ("efficientnet_b7", "efficientnet_l2", "efficientnet_b0")
    row = script.ROWS["b0"].settings()
    c = dataclasses.replace(row, networks=names, epochs=(350.0, 350.0, 700.0))
    steps = [script.schedule_of(c, one, 1_281_167).steps for one in script.networks_of(c)]
    assert steps == [218_949, 218_949, 437_899]
    served_on = dataclasses.replace(c, epochs=(350.0,))
    assert [one.epochs for one in script.networks_of(served_on)] == [350.0] * 3
    # A student of 700 epochs that is warm-started for 140 takes a fifth of its steps.
    warm = dataclasses.replace(row, warm_start=True, warm_epochs=140.0)
    schedule = script.student_schedule(warm, script.networks_of(warm)[1], 1_281_167)
    assert schedule.steps == round(437_899 / 5)
    # With --steps, finetuning is in the proportion of the epochs of the network that it is of.
    short = dataclasses.replace(c, steps=700)
    last = script.networks_of(short)[-1]
    assert script.finetune_steps(short, last, 1_281_167, 7.0, c.labeled_batch) == 7


def test_svhn_ends_at_the_rate_that_the_sources_say() -> None:
    c = script.ROWS["svhn"].settings()
    network = script.networks_of(c)[1]
    schedule = script.student_schedule(c, network, script.SVHN_PICTURES - c.validation)
    fit = FitOptions(steps=schedule.steps, schedule="exponential")
    at_the_end = schedule.lr * fit.rate(schedule.steps)
    assert f"{at_the_end:.6f}" == "0.000094"
    assert f"{at_the_end * 256 / c.labeled_batch:.6f}" == "0.000188"
    table = script.sources_table()
    assert "0.000188 for a batch of 256, and 0.000094 for this one of 128" in table
    assert "ends at 0.0002 for 256" in table


def test_the_chain_of_table_7_is_one_row() -> None:
    chain = script.networks_of(script.ROWS["l2"].settings())
    assert [(one.name[13:], one.image_size, one.ratio) for one in chain] == [
        *(("b7", 600, 0), ("l2", 475, 14), ("l2", 475, 14), ("l2", 475, 28))
    ]
    c = script.ROWS["l2"].settings()
    assert [one.finetune_size for one in chain] == [0, 800, 800, 800]
    assert c.finetune_epochs == 1.5
    selecting = script.filter_of(c)
    assert selecting is not None
    assert (selecting.name, selecting.image_size) == ("efficientnet_b0", 224)
    magnitudes = {
        name: script.networks_of(row.settings())[0].magnitude for name, row in script.ROWS.items()
    }
    # Of B0 and B1 the paper says that they have RandAugment, and nobody with what magnitude.
    by_the_code = {
        "b0": 6,
        "b1": 6,
        "b2": 6,
        "b3": 12,
        "b4": 15,
        "b5": 18,
        "b6": 24,
        "b7": 27,
        "svhn": 5,
        "resnet50": 9,
    }
    assert {name: magnitudes[name] for name in by_the_code} == by_the_code
    assert [script.ROWS[name].sources["magnitudes"] for name in ("b0", "b1", "b2", "b7")] == [
        *("ours", "ours", "code", "paper")
    ]


def test_rmsprop_is_tensorflows() -> None:
    """By a loop of its own, in float64, with a rate that changes and weight decay."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = script.TensorFlowRMSProp([{"params": [p], "weight_decay": 0.01}], lr=0.1)
    value, mean_square, momentum = p.detach().numpy().copy(), np.ones(5), np.zeros(5)
    for step in range(6):
        rate = 0.1 * 0.97**step
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.randn(5, dtype=torch.float64)
        gradient = p.grad.numpy() + 0.01 * value
        mean_square = 0.9 * mean_square + 0.1 * gradient**2
        momentum = 0.9 * momentum + rate * gradient / np.sqrt(mean_square + 1e-3)
        value = value - momentum
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-12)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    c = script.ROWS["b0"].settings()
    groups = script.optimizer_of(c, network, 0.1).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [
        (2, 1e-5),
        (2, 0.0),
    ]


def test_pictures_are_selected_once_and_labeled_anew_and_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = tiny("b0", tmp_path, monkeypatch, **CNN)
    result = script.train(c)
    out = tmp_path / "run"
    first, second = (LabelStore(out / "rounds" / number / "labels") for number in "12")
    selected = LabelStore(out / "rounds" / "1" / "selected")
    assert [*second] == [*selected]
    assert set(second) <= set(first)
    assert not (out / "rounds" / "2" / "selected").exists()
    assert first.provenance["weights_fingerprint"] != second.provenance["weights_fingerprint"]
    assert [reached["kept"] for reached in result["rounds"][1:]] == [len(selected)] * 2
    apart = [row for row in metrics(out) if "unlabeled_loss_with_noise" in row]
    assert {row["phase"] for row in apart} == {"round-1", "round-2"}
    delivered = EndedRun.load(out / "delivered")
    assert delivered.result["test_accuracy"] == result["rounds"][-1]["test_accuracy"]
    last = load_file(out / "round-2.safetensors")
    (out / "rounds" / "2" / "labels" / "store.json").unlink()
    for file in (out / "rounds" / "2" / "labels").glob("part-*"):
        file.unlink()
    assert script.train(dataclasses.replace(c, resume=True)) == result
    assert all(
        torch.equal(t, last[name]) for name, t in load_file(out / "round-2.safetensors").items()
    )


def test_a_network_of_its_own_selects_and_another_run_takes_what_it_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colors = color_folders(tmp_path / "colors", many=8)
    own = CNN | {
        "networks": ("pooled_cnn",) * 2,
        "filter_epochs": 1.0,
        "unlabeled": str(colors / "unlabeled"),
    }
    c = dataclasses.replace(tiny("b0", tmp_path, monkeypatch, **own), labels_per_class=None)
    monkeypatch.setattr(script, "AS_PUBLISHED", script.AS_PUBLISHED | {"small_cnn": (24, 0.0, 0.0)})
    # A copy of a picture of the validation set is not learned from.
    shutil.copy(
        tmp_path / "data" / "val" / "n01440764" / "0.JPEG", colors / "unlabeled" / "blue-0.png"
    )
    script.train(c)
    store = LabelStore(tmp_path / "run" / "selection" / "selected")
    first = scan_unlabeled(colors / "unlabeled").names.index("blue-0.png")
    assert first in [*LabelStore(tmp_path / "run" / "selection" / "labels")]
    assert first not in [*store]
    assert [*LabelStore(tmp_path / "run" / "rounds" / "1" / "labels")] == [*store]
    assert {row["phase"] for row in metrics(c.out)} == {"filter", "round-0", "round-1"}
    other = dataclasses.replace(c, select_by=str(store.folder), out=str(tmp_path / "other"))
    script.check(other)
    script.train(other)
    assert [*LabelStore(tmp_path / "other" / "rounds" / "1" / "labels")] == [*store]
    assert not (tmp_path / "other" / "selection").exists()
    elsewhere = dataclasses.replace(
        other, unlabeled=str(colors / "labeled"), out=str(tmp_path / "third")
    )
    with pytest.raises(MetaplError, match="was selected of"):
        script.check(elsewhere)


WAYS: dict[str, dict[str, Any]] = {
    "hard, each, unbalanced": {
        "labels": "hard",
        "select_by": "each",
        "balance": False,
        "loss": "two_means",
    },
    "interval, share, standard": {
        "threshold": 0.0,
        "at_most": 1.0,
        "share": 0.5,
        "unlabeled_noise": ("standard",),
    },
    "stages": {
        "training": "pretrain_finetune",
        "unlabeled_noise": ("model",),
        "stage_epochs": (2.0,),
    },
    "count": {"balance": False, "count": 3},
    "warm": {"warm_start": True, "warm_epochs": 350.0, "unlabeled_noise": ("none",)},
    "noisy teacher": {"noisy_teacher": True, "dropouts": (0.3,), "accumulate": 2},
}


@pytest.mark.parametrize(
    "way", [way if way == "stages" else pytest.param(way, marks=pytest.mark.long) for way in WAYS]
)
def test_each_way_of_training_has_its_effect(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tiny("b2", tmp_path, monkeypatch, **CNN | {"networks": ("small_cnn",) * 2, "steps": 4})
    c = dataclasses.replace(usual, **WAYS[way])
    script.check(c)
    result = script.train(c)
    script.train(dataclasses.replace(usual, out=str(tmp_path / "usual")))
    own, other = (load_file(tmp_path / run / "round-1.safetensors") for run in ("run", "usual"))
    assert any(not torch.equal(t, other[name]) for name, t in own.items())
    phases = [row["phase"] for row in metrics(c.out)]
    assert ("round-1-finetune-2" in phases) is (way == "stages")
    assert phases.count("round-1") == (2 if way == "warm" else 4)
    reached = json.loads((tmp_path / "usual" / "result.json").read_text())["rounds"][1]
    copies = reached["copies"]
    if "share" in way:
        copies = round(0.5 * copies)
    if way == "count":
        copies = 3
    if "unbalanced" in way:
        copies = result["rounds"][1]["kept"]
    assert result["rounds"][1]["copies"] == copies > 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an empty interval": (
        {"threshold": 0.5, "at_most": 0.5},
        "the interval of confidence is empty",
    ),
    "no depth": ({"networks": ("resnet50",) * 2}, "resnet50 has no stochastic_depth"),
    "a teacher alone": (
        {"networks": ("small_cnn",), "stochastic_depth": 0.0, "teacher": "runs/l2"},
        "nothing is left to train",
    ),
    "a teacher that is none": ({"teacher": "nowhere"}, "nowhere: there is no such folder"),
    "a count and a share": ({"count": 3, "share": 0.5}, "--count 3: expected 1 or more, and no"),
    "lengths that nothing chooses": (
        {"training": "pretrain_finetune", "stage_epochs": (1.0, 2.0)},
        "--stage-epochs 1 2: expected one length, or --validation N",
    ),
    "two networks, warm": (
        {**CNN, "networks": ("small_cnn", "pooled_cnn"), "warm_start": True},
        "expected one network",
    ),
    "a batch": ({"accumulate": 3}, "--labeled-batch 4: expected a multiple of 3"),
    "processes": ({"mesh": script.Mesh(replicate=2)}, "1 process was started for a mesh of 2"),
    "norms": ({"batch_norm_ranks": 2}, "--batch-norm-ranks 2: expected a divisor of 1 processes"),
    "a sum": ({"training": "pretrain", "loss": "two_means"}, "expected mean"),
    "no unlabeled": (
        {"labels_per_class": None},
        "expected --unlabeled DIR, or --labels-per-class N",
    ),
    "a store that is none": ({"select_by": "nowhere"}, "expected once, each, or a folder"),
    "a network of one size": (
        {"networks": ("pooled_cnn",) * 2, "finetune_sizes": (400,), "stochastic_depth": 0.0},
        "--finetune-sizes 400: pooled_cnn has other weights there than for 224 pixels",
    ),
    "a smaller size": ({"finetune_sizes": (0, 100)}, "more pixels"),
    "a share": ({"share": 0.0}, "--share 0.0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_together_is_refused_in_a_line(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, word = REFUSED[what]
    c = tiny("b0", tmp_path, monkeypatch)
    with pytest.raises(MetaplError, match=re.escape(word)) as refused:
        script.check(dataclasses.replace(c, **own))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_run_or_a_store_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = tiny("b0", tmp_path, monkeypatch, **CNN)
    with LabelWriter(tmp_path / "all", ["a", "b"], provenance={"pictures": "others"}) as writer:
        writer.add([0, 1], torch.eye(2))
    select(LabelStore(tmp_path / "all"), tmp_path / "some", threshold=0.1)
    for store, word in (("all", "nothing was selected"), ("some", "was selected of others")):
        with pytest.raises(MetaplError, match=word):
            script.check(dataclasses.replace(c, select_by=str(tmp_path / store)))
    Path(c.out).mkdir()
    Path(c.out, "config.json").write_text(json.dumps(dataclasses.asdict(c)))
    with pytest.raises(MetaplError, match="holds a run already"):
        script.check(c)
    with pytest.raises(MetaplError, match="was begun otherwise"):
        script.check(dataclasses.replace(c, resume=True, networks=("small_cnn",) * 2))
    script.check(dataclasses.replace(c, resume=True, num_workers=2))


def plan(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert script.main([*words, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_plan_and_the_sources_are_printed_and_a_refusal_ends_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chain = plan("l2", capsys=capsys)
    assert (
        "round 3: efficientnet_l2, 475 pixels, 218,949 steps of 2,048 labeled and 57,344 "
        "unlabeled at 0.128" in chain
    )
    assert chain.count("FixRes: efficientnet_l2, 800 pixels, 3,753 steps of 512") == 3
    small = plan("b0", capsys=capsys)
    assert small.count("magnitude 6") == 2
    assert "magnitude 0" not in small
    assert script.main(["--sources"]) == 0
    table = capsys.readouterr().out
    assert all(f"| `{name}` |" in table for name in ("ratios", "magnitudes", "ema_decay"))
    for row in script.ROWS.values():
        assert row.sources.keys() == row.values.keys()
    assert script.main(["b0", "--at-most", "0.2"]) == 2
    assert "the interval of confidence is empty" in capsys.readouterr().err


def test_a_plan_says_how_students_are_trained(capsys: pytest.CaptureFixture[str]) -> None:
    warm = plan(
        *("b0", "--epochs", "350", "--warm-start", "--warm-epochs", "140", "--noisy-teacher"),
        capsys=capsys,
    )
    # By hand: 140 / 350 of 218,949 steps, at the rate with which study 8 begins.
    assert "87,580 steps of 2,048 labeled and 2,048 unlabeled at 0.008907" in warm
    assert "140 epochs; warmup 3,128 steps; begins with the weights of its teacher" in warm
    assert "soft labels by round 0, of augmented pictures, with dropout and depth" in warm
    stages = plan("b0", "--training", "pretrain_finetune", "--ratios", "3", capsys=capsys)
    assert "steps of 6,144 unlabeled at 0.128" in stages
    assert "then finetuned: 6,256 steps of 2,048 labeled at 0.01, 10 epochs" in stages
    alone = plan("b0", "--training", "pretrain", capsys=capsys)
    assert "pretrained on unlabeled pictures alone" in alone
    assert "then finetuned" not in alone
    plans = {noise: plan("b5", "--unlabeled-noise", noise, capsys=capsys) for noise in NOISES}
    assert len(set(plans.values())) == len(NOISES)
    assert "noise on unlabeled pictures: none" in plans["none"]


def test_a_ready_teacher_and_the_noise_of_each_student_are_in_the_plan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Study 1: the standard augmentation on the students' unlabeled pictures alone."""
    words = ("--teacher", "runs/l2", "--unlabeled-noise", "standard")
    student = plan("b2", *words, capsys=capsys)
    rounds = [line for line in student.splitlines() if line.startswith("round")]
    (line,) = rounds
    assert line.startswith("round 1: efficientnet_b2")
    assert "magnitude 6" in line
    assert "teacher: the network that runs/l2 delivers, not trained again" in student
    assert "by runs/l2, without noise; noise on unlabeled pictures: the standard" in student
    # The first teacher does not stand for the B0 that selects.
    assert "selection: once, by the filter efficientnet_b0" in plan("b0", *words, capsys=capsys)
    chain = plan("l2", "--unlabeled-noise", "all", "all", "standard", capsys=capsys)
    noises = [line for line in chain.splitlines() if "noise on unlabeled" in line]
    assert ["standard" in line for line in noises] == [False, False, True]
    alone = plan("b5", "--networks", "efficientnet_b5", capsys=capsys)
    assert "round 0" in alone
    assert not any(word in alone for word in ("round 1", "selection", "filter"))


def test_a_delivered_network_is_a_ready_teacher_and_one_network_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = CNN | {"networks": ("small_cnn",), "filter_network": None, "finetune_sizes": (24,)}
    alone = tiny("b0", tmp_path, monkeypatch, **own)
    alone = dataclasses.replace(alone, labels_per_class=None)
    script.check(alone)
    plain = script.train(alone)
    (only,) = plain["rounds"]
    assert (only["image_size"], only["finetuned"]["image_size"]) == (16, 24)
    assert {row["phase"] for row in metrics(alone.out)} == {"round-0", "round-0-resolution"}
    c = dataclasses.replace(
        alone,
        teacher=alone.out,
        networks=("small_cnn", "pooled_cnn"),
        filter_network="pooled_cnn",
        finetune_sizes=(0,),
        labels_per_class=3,
        out=str(tmp_path / "student"),
    )
    script.check(c)
    result = script.train(c)
    # It labels as it was delivered, on pictures of 24 pixels.
    ready, student = result["rounds"]
    assert (ready["network"], ready["image_size"]) == ("small_cnn", 24)
    assert ready["test_accuracy"] == only["finetuned"]["test_accuracy"]
    assert (student["network"], student["image_size"]) == ("pooled_cnn", 16)
    assert {row["phase"] for row in metrics(c.out)} == {"filter", "round-1"}
    delivered = EndedRun.load(tmp_path / "run" / "delivered").network("student")
    pictures = script.pictures_at(c, 24)
    labels = LabelStore(tmp_path / "student" / "rounds" / "1" / "labels")
    positions = torch.from_numpy(labels.column("id"))
    with torch.no_grad():
        expected = delivered(pictures.unlabeled.fetch(positions)[0].float() / 255).softmax(1)
    torch.testing.assert_close(labels.at(range(len(labels))), expected, rtol=0, atol=1e-3)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"warm_start": True}, "delivers small_cnn; expected a pooled_cnn"),
        ({"teacher": str(tmp_path / "run" / "checkpoints")}, "expected the folder of a run"),
    ]
    for changed, word in refused:
        with pytest.raises(MetaplError, match=word):
            script.check(dataclasses.replace(c, **changed, out=str(tmp_path / "third")))


def test_the_best_length_of_finetuning_is_chosen_by_held_out_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each begins with the pretrained weights: those of one length are those of a run of it."""
    own = CNN | {"networks": ("small_cnn",) * 2, "steps": 2, "validation": 12}
    own |= {"training": "pretrain_finetune", "stage_epochs": (700.0, 2_100.0), "stage_lr": 0.3}
    both = tiny("b0", tmp_path, monkeypatch, **own)
    result = script.train(both)["rounds"][1]
    stages = result["stages"]
    assert [(stage["epochs"], stage["steps"]) for stage in stages] == [(700.0, 2), (2_100.0, 6)]
    values = [stage["validation_accuracy"] for stage in stages]
    best = values.index(max(values))
    assert result["chosen_epochs"] == both.stage_epochs[best]
    assert result["test_accuracy"] == stages[best]["test_accuracy"]
    alone = dataclasses.replace(both, stage_epochs=(2_100.0,), out=str(tmp_path / "alone"))
    assert script.train(alone)["rounds"][1]["stages"] == stages[1:]


def test_digits_are_changed_by_the_operations_of_svhn() -> None:
    """Twelve: nothing moves a digit sideways, turns it, or mixes it (Table 5)."""
    for name, operations in (("svhn", 12), ("b7", 15)):
        c = script.ROWS[name].settings()
        view = script.noisy_view(c, script.networks_of(c)[0])
        assert len(view.views[0].operations) == operations


NOISES = ("all", "standard", "model", "none")

# Another value of every setting that decides something of a result.
OTHERS: dict[str, Any] = {
    "seed": 1,
    "data": "svhn",
    "unlabeled": "others/",
    "labels_per_class": 7,
    "validation": 11,
    "networks": ("efficientnet_b7", "efficientnet_b6"),
    "image_sizes": (96,),
    "dropouts": (0.11,),
    "magnitudes": (2.5,),
    "epochs": (350.0, 351.0),
    "ratios": (5,),
    "stochastic_depth": 0.3,
    "translate": 7.0,
    "cutout": 3,
    "steps": 1_234,
    "labeled_batch": 1_024,
    "lr": 0.2,
    "warmup_epochs": 6.0,
    "weight_decay": 0.5,
    "label_smoothing": 0.2,
    "ema_decay": 0.9,
    "select_by": "each",
    "filter_network": None,
    "filter_epochs": 33.0,
    "threshold": 0.2,
    "at_most": 0.4,
    "per_class": 12,
    "balance": False,
    "share": 0.5,
    "count": 1_234_567,
    "teacher": "runs/l2",
    "noisy_teacher": True,
    "labels": "hard",
    "loss": "two_means",
    "unlabeled_noise": ("model",),
    "training": "pretrain",
    "stage_epochs": (12.0,),
    "stage_lr": 0.3,
    "warm_start": True,
    "warm_epochs": 100.0,
    "finetune_sizes": (900,),
    "finetune_epochs": 2.0,
    "finetune_batch": 256,
    "finetune_lr": 0.5,
    "frozen": 0.25,
    "mesh": script.Mesh(replicate=4),
    "batch_norm_ranks": 2,
    "accumulate": 2,
    "precision": "bfloat16",
    "channels_last": False,
    "validate_every": 77,
}


@pytest.mark.parametrize("name", [one.name for one in dataclasses.fields(script.Settings)])
def test_a_plan_shows_every_setting_that_decides_something(name: str) -> None:
    """All but those of FREE, which change nothing of a result."""
    if name in script.FREE and name != "mesh":
        assert name not in OTHERS
        return
    c = dataclasses.replace(script.ROWS["b7"].settings(), finetune_sizes=(800,))
    if name.startswith("stage_"):
        c = dataclasses.replace(c, training="pretrain_finetune")
    if name == "warm_epochs":
        c = dataclasses.replace(c, warm_start=True)
    if name == "batch_norm_ranks":
        c = dataclasses.replace(c, mesh=script.Mesh(replicate=4))
    changed = dataclasses.replace(c, **{name: OTHERS[name]})
    assert script.plan_of(changed, 1_281_167) != script.plan_of(c, 1_281_167)


# -------------------------------------------------------------------------------- several processes


def rank_main(words: list[str]) -> int:
    """Run the script on this rank, which reads SVHN from small files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.svhn.check_integrity", lambda *given: True)
        return script.main(words)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, "test_noisy_student_example", joined=False)
    yield ranks
    ranks.close()


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["replicate", "shard"])
def test_two_processes_leave_the_run_of_one(
    mesh: str, two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are written by both, and batch norms see the rows of both."""
    root = written("svhn", tmp_path / "data", monkeypatch)
    words = [
        "svhn",
        "--root",
        root,
        "--networks",
        "pooled_cnn",
        "pooled_cnn",
        "--stochastic-depth",
        "0",
        "--steps",
        "3",
    ]
    words += [
        "--labeled-batch",
        "4",
        "--finetune-batch",
        "4",
        "--validation",
        "10",
        "--per-class",
        "9",
        "--lr",
        "5",
    ]
    words += [
        "--dropouts",
        "0",
        "--device",
        "cpu",
        "--num-workers",
        "0",
        "--log-every",
        "1",
        "--ratios",
        "2",
    ]
    words += ["--threshold", "0.1", "--unlabeled-noise", "standard", "--magnitudes", "0"]
    monkeypatch.setattr(script, "LABELED_AT_ONCE", 16)
    assert script.main([*words, "--out", str(tmp_path / "one")]) == 0
    asked = [*words, f"--mesh.{mesh}", "2", "--out", str(tmp_path / "two")]
    assert two.run("rank_main", words=asked) == [0, 0]
    for name in ("round-0", "round-1"):
        one, other = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("one", "two"))
        for key, t in one.items():
            torch.testing.assert_close(other[key], t, rtol=0, atol=1e-4)
    stores = [LabelStore(tmp_path / run / "rounds" / "1" / "labels") for run in ("one", "two")]
    assert [*stores[0]] == [*stores[1]] == list(range(40))
    torch.testing.assert_close(stores[0].at(range(40)), stores[1].at(range(40)), rtol=0, atol=2e-3)


def test_the_ranges_of_several_processes_make_the_store_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, also where one was stopped in the middle."""
    monkeypatch.setattr(script, "LABELED_AT_ONCE", 16)
    c = tiny("svhn", tmp_path, monkeypatch, validation=10)
    pictures = script.pictures_at(c, 32)
    (spec, *_) = script.networks_of(
        dataclasses.replace(c, networks=("small_cnn",) * 2, stochastic_depth=0.0)
    )
    torch.manual_seed(0)
    network = script.build_network(spec, 10, 0.0, "small_cnn")
    everything = torch.arange(len(pictures.unlabeled))

    def labeled(folder: str, share: int, shares: int) -> LabelStore:
        processes: Any = FakeProcesses(share, shares)
        return script.write_labels(
            c, network, spec, pictures, everything, tmp_path / folder, processes, 0
        )

    one = labeled("one", 0, 1)
    # The first waits for the others, which is no wait here.
    with pytest.raises(MetaplError, match=r"store\.json"):
        labeled("three", 0, 3)
    for share in (1, 2):
        with pytest.raises(MetaplError):
            labeled("three", share, 3)
    assert labeled("three", 0, 3).sha256 == one.sha256
    assert [*one] == everything.tolist()


@dataclasses.dataclass(frozen=True)
class FakeMesh:
    share: int
    shares: int


class FakeProcesses:
    """One of several processes that run one after the other."""

    def __init__(self, share: int, shares: int) -> None:
        self.mesh = FakeMesh(share, shares)
        self.first = share == 0
