"""Batch norm has the statistics of plain pictures before a network labels, and where it is kept."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import metapl
from safetensors.torch import load_file
from tiny_runs import colored_pictures
from torch import Tensor, nn

from metapl import LossTrainer
from metapl.apps.train import Phases
from metapl.networks.architectures import create
from metapl.networks.card import card_of
from metapl.networks.tuned import Tuned
from metapl.pictures import FileImages, scan_unlabeled
from metapl.training.statistics import estimate_statistics

RUN = (
    *("--steps", "6", "--image-size", "16", "--network", "pooled_cnn", "--device", "cpu"),
    *("--labeled-batch", "8", "--log-every", "2", "--finetune-steps", "2", "--seed", "1"),
)


def statistics_by_hooks(network: nn.Module, pictures: Tensor) -> dict[str, Tensor]:
    """Return the mean and variance of what each batch norm sees, which normalizes by them."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].movedim(1, 0).flatten(1)
            seen[f"{name}.running_mean"] = values.mean(1)
            seen[f"{name}.running_var"] = values.var(1)

        return note

    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in norms.items()]
    network.eval()
    for module in norms.values():
        module.train()
    with torch.no_grad():
        network(pictures)
    for one in hooks:
        one.remove()
    return seen


def plain_pictures(folder: Path) -> Tensor:
    images = FileImages(scan_unlabeled(folder).paths(), size=(16, 16))
    pictures: Tensor = images.fetch(torch.arange(len(images)))[0] / 255
    return pictures


@pytest.mark.parametrize("method", ["supervised", "uda", "pseudo_labels", "mpl"])
def test_a_run_keeps_networks_with_the_statistics_of_plain_unlabeled_pictures(
    method: str, tmp_path: Path
) -> None:
    root = colored_pictures(tmp_path / "pictures")
    folders = [f"--{part}={root / part}" for part in ("labeled", "unlabeled")]
    words = ["train", "images", *RUN, *folders, "--method", method, "--out", tmp_path / "run"]
    metapl(*words, "--unlabeled-batch", "8")
    # There are few, so that the labeled ones are counted too.
    pictures = torch.cat([plain_pictures(root / part) for part in ("unlabeled", "labeled")])
    cards = json.loads((tmp_path / "run" / "network.json").read_text())["networks"]
    assert {"student", "finetuned"} <= {*cards}
    for name, card in cards.items():
        file = next((tmp_path / "run").glob(f"*{name}*.safetensors"))
        weights = load_file(file)
        network = card_of(card).create()
        network.load_state_dict(weights)
        expected = statistics_by_hooks(network, pictures)
        assert len(expected) == 4
        for entry, value in expected.items():
            torch.testing.assert_close(weights[entry], value, rtol=1e-3, atol=1e-4)


def test_classes_of_unlabeled_pictures_are_counted_and_a_skew_is_said_once() -> None:
    """By a network that names the first class for four of five pictures."""
    images = torch.eye(2)[torch.tensor([0, 0, 0, 0, 1]).repeat(40)]
    labels = torch.tensor([0, 1]).repeat(10)
    said: list[str] = []
    data: Any = SimpleNamespace(
        unlabeled=SimpleNamespace(images=images),
        labeled=SimpleNamespace(labels=labels),
        classes=("cat", "dog"),
    )
    unused: Any = None
    phases = Phases(
        config=unused,
        data=data,
        student=unused,
        place=unused,
        processes=unused,
        folder=unused,
        options={},
        say=said.append,
        say_progress=None,
    )
    network = nn.Linear(2, 2)
    network.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
    trainer = LossTrainer(network, optimizer=torch.optim.SGD(network.parameters()))
    phases.note_class_counts(trainer, "teacher")
    phases.note_class_counts(trainer, "fit")
    counts = {"cat": 160, "dog": 40}
    assert phases.class_counts == {"teacher": counts, "fit": counts}
    assert len(said) == 1
    assert "160 of 200 examples cat, of which 100 would" in said[0]
    assert "a student of such labels prefers that class too" in said[0]
    # No student comes after the only phase.
    phases.skewed_phases.clear()
    phases.note_class_counts(trainer, "fit")
    assert "it is often wrong of these" in said[1]
    # As among the labeled ones.
    data.labeled.labels = torch.tensor([0, 0, 0, 0, 1]).repeat(4)
    phases.skewed_phases.clear()
    phases.note_class_counts(trainer, "fit")
    assert len(said) == 2


def test_what_is_frozen_keeps_its_statistics_and_noise_is_left_out() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(8, 3, 16, 16) + 1
    network = create("pooled_cnn", 3, dropout=0.5)
    momentum = network.features[0][2].momentum
    network.eval()
    state = torch.get_rng_state()
    assert estimate_statistics(network, [pictures])
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module.training for module in network.modules())
    assert network.features[0][2].momentum == momentum
    for entry, value in statistics_by_hooks(network, pictures).items():
        torch.testing.assert_close(network.state_dict()[entry], value)
    frozen = Tuned(network, [0.0] * 3, [1.0] * 3, heads=["head"], tuning="head")
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    assert not estimate_statistics(frozen, [pictures + 1])
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert not estimate_statistics(create("small_cnn", 3), [pictures])
