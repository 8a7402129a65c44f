"""Exported networks: what others load without metapl, and the card beside it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from metapl.apps.export import CARD as CARD_FILE
from metapl.apps.export import WEIGHTS, Exported, export, programs
from metapl.apps.networks import Architecture, Normalized, create
from metapl.errors import MetaplError
from metapl.models import mlp

CARD: dict[str, Any] = {
    "recipe": {"steps": 100, "student": {"lr": 0.1}},
    "data_hash": "sha256:0123abcd",
    "metrics": {"test accuracy": 0.9712345678, "n": 5},
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SMALL = Architecture(name="small_cnn", num_classes=2)


def run(written: Exported, patch: pytest.MonkeyPatch, file: str = WEIGHTS, own: bool = False, **scope: Any) -> Any:
    """The card's code for a file, run beside it, where metapl cannot be imported; its ``predict``."""
    patch.chdir(written.weights.parent)
    for name in [name for name in sys.modules if name.split(".")[0] == "metapl"]:
        if not own:
            patch.setitem(sys.modules, name, None)
    blocks = re.findall(r"```python\n(.*?)```", written.card.read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if file in block)
    # In this process metapl is imported already, so the code would run without saying so.
    assert ("\nimport metapl.apps.networks\n" in f"\n{code}") == ("metapl" in code) == own
    exec(code, scope)
    return scope["predict"]


def trained_like(architecture: Architecture, size: int) -> nn.Module:
    """Fresh weights, with the statistics of some pictures and a head that tells them apart."""
    torch.manual_seed(0)
    channels = architecture.in_channels
    model = Normalized(architecture.create(), MEAN[:channels], STD[:channels])
    model(torch.rand(8, channels, size, size))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("head.weight", "fc.weight", "heads.head.weight", "classifier.1.weight")):
                parameter.normal_()
    return model


@pytest.mark.parametrize(
    ("name", "normalizes"),
    [*((n, True) for n in ("resnet18", "efficientnet_b0_svhn", "timm:resnet10t", "small_cnn")), ("small_cnn", False)],
)
def test_the_cards_code_predicts_the_same(
    name: str, normalizes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    architecture = Architecture(name=name, num_classes=4, in_channels=1, dropout=0.5)
    model: Any = trained_like(architecture, 32)
    model = model if normalizes else model.module
    written = export(model, tmp_path / "out", card=CARD, architecture=architecture)
    predict = run(written, monkeypatch, own=True)
    images = torch.rand(3, 1, 32, 32)
    torch.testing.assert_close(predict(images), model.eval()(images).softmax(1).detach())


def test_torchvision_loads_it(tmp_path: Path) -> None:
    architecture = Architecture(name="resnet18", num_classes=7)
    model = architecture.create()
    written = export(Normalized(model, MEAN, STD), tmp_path, card=CARD, architecture=architecture)
    theirs = torchvision.models.resnet18(num_classes=7)
    theirs.load_state_dict(load_file(written.weights), strict=True)
    assert all(torch.equal(t, theirs.state_dict()[key]) for key, t in model.state_dict().items())


def test_the_cards_code_for_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, model = torch.rand(6, 3, 2, 2), mlp([12, 5, 3], activation=nn.GELU)
    written = export(Normalized(model, [0.5] * 3, [0.25] * 3), tmp_path, card=CARD)
    predict = run(written, monkeypatch, build_network=lambda: mlp([12, 5, 3], activation=nn.GELU))
    torch.testing.assert_close(predict(images), model.eval()((images - 0.5) / 0.25).softmax(1).detach())


# ------------------------------------------------------------------------------------------------------------ programs


@pytest.mark.parametrize(
    ("name", "size", "channels", "onnx"),
    [
        ("pooled_cnn", 24, 1, True),
        *(
            pytest.param(*long, marks=pytest.mark.long)
            for long in (("resnet18", 32, 3, False), ("timm:resnet10t", 32, 3, True), ("vit_b_32", 32, 3, False))
        ),
    ],
)
def test_the_cards_code_runs_the_programs(
    name: str, size: int, channels: int, onnx: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("timm",) * name.startswith("timm:") + ("onnx", "onnxscript", "onnxruntime") * onnx:
        pytest.importorskip(package)
    architecture, shape = (
        Architecture(name=name, num_classes=4, in_channels=channels, image_size=size),
        (channels, size, size),
    )
    model = trained_like(architecture, size)
    written = export(model, tmp_path / "out", card=CARD, architecture=architecture, shape=shape, onnx=onnx)
    images = torch.rand(5, *shape)
    expected = model.eval()(images).softmax(1).detach()
    assert expected.std(0).max() > 1e-3  # the pictures are told apart
    assert (written.onnx is not None) == onnx
    for file in filter(None, (written.program, written.onnx)):
        content, is_onnx = file.read_bytes(), file == written.onnx
        predict = run(written, monkeypatch, file=file.name)
        for count in (1, 5):
            found = predict(images[:count].numpy() if is_onnx else images[:count])
            torch.testing.assert_close(torch.as_tensor(found), expected[:count], rtol=1e-4, atol=1e-5)
        assert f"`{file.name}`: SHA-256 `{hashlib.sha256(content).hexdigest()}`" in written.card.read_text()
        # Neither places of this machine nor metapl's names stand in it.
        assert not [words for words in (os.fsencode(os.getcwd()), b"site-packages", b"metapl") if words in content]


def little(outputs: int = 2) -> nn.Module:
    """What there is in a network of pictures, and of each as little as there can be."""
    first = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs))


def test_a_program_of_a_network_in_training_is_that_of_its_evaluation() -> None:
    model = little().double().to(memory_format=torch.channels_last).train()
    model(torch.rand(8, 3, 4, 4, dtype=torch.double))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = programs(model, (3, 4, 4))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert first == programs(model.eval().float().to(memory_format=torch.contiguous_format), (3, 4, 4))


class Spoiled(nn.Module):
    """NaN in the place of logits."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))[:, :2] * torch.nan


class Undecided(nn.Module):
    """A network that torch.export cannot follow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) if images.sum() > 0 else images.amax(dim=(2, 3))


@pytest.mark.parametrize(("other", "word"), [(little(), "differs"), (little(3), r"\(1, 3\)"), (Spoiled(), "nan")])
def test_a_program_that_gives_something_else_is_refused(
    other: nn.Module, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda network, *given, **named: real(other, *given, **named))
    with pytest.raises(MetaplError, match=word):
        export(little(), tmp_path / "out", card=CARD, shape=(3, 4, 4))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- weights and card


def test_same_network_same_bytes_and_the_file_says_what_it_is(tmp_path: Path) -> None:
    model, card = Normalized(SMALL.create(), MEAN, STD), {**CARD, "classes": ["cat", "dog"]}
    before = {key: (t.data_ptr(), t.clone()) for key, t in model.state_dict().items()}
    first = export(model, tmp_path / "a", card=card, architecture=SMALL)
    assert model.training
    assert all(
        (t.data_ptr(), True) == (before[k][0], torch.equal(t, before[k][1])) for k, t in model.state_dict().items()
    )
    last = model.module.to(memory_format=torch.channels_last) and model
    again = export(last, tmp_path / "b", card=dict(reversed(card.items())), architecture=SMALL)
    assert first.weights.read_bytes() == again.weights.read_bytes()
    assert first.card.read_bytes() == again.card.read_bytes()
    assert first.sha256 == hashlib.sha256(first.weights.read_bytes()).hexdigest()
    with safe_open(first.weights, "pt") as file:
        told = json.loads(file.metadata()["metapl"])
    assert Architecture(**told["architecture"]) == SMALL
    assert (told["normalization"], told["classes"]) == ({"mean": MEAN, "std": STD}, ["cat", "dog"])


def test_the_card_says_it_all(tmp_path: Path) -> None:
    hashes = {"labeled": "aa11", "unlabeled": "bb22"}
    more = {"title": "Cats and dogs", "classes": ["cat", "dog"], "data_hash": hashes, "notes": "On a **laptop**."}
    written = export(Normalized(SMALL.create(), MEAN, STD), tmp_path, card={**CARD, **more}, architecture=SMALL)
    text = written.card.read_text()
    parts = ["# Cats and dogs\n", "name='small_cnn'", "79,746 parameters", written.sha256, f"mean {MEAN}, std {STD}"]
    parts += ["cat, dog", "| test accuracy | 0.971235 |", "| n | 5 |", "| labeled | aa11 |", '"lr": 0.1']
    parts += [f"| torch | {torch.__version__.split('+')[0]}", "On a **laptop**."]
    assert not [part for part in parts if part not in text]
    plain = export(SMALL.create(), tmp_path, card=CARD, architecture=SMALL).card.read_text()
    assert "sha256:0123abcd" in plain
    assert "Normalization: none" in plain
    assert "## Notes" not in plain


def test_wrappers_are_taken_off_and_tied_weights_written(tmp_path: Path) -> None:
    class Compiled(nn.Module):
        """What ``torch.compile`` returns, as far as it concerns the weights."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    model = create("small_cnn", 2)
    written = export(Compiled(Normalized(Compiled(model), MEAN, STD)), tmp_path, card=CARD)
    assert load_file(written.weights).keys() == model.state_dict().keys()
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    found = load_file(export(tied, tmp_path, card=CARD).weights)
    assert torch.equal(found["0.weight"], found["1.weight"])


def diverged() -> nn.Module:
    model = create("small_cnn", 2)
    nn.init.constant_(model.get_parameter("head.bias"), float("inf"))
    return model


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "classes": ({"card": {**CARD, "classes": ["a", "b", "c"]}, "architecture": SMALL}, "3 classes"),
    "head": ({"architecture": Architecture(name="small_cnn", num_classes=3)}, r"head\.bias"),
    "network": ({"architecture": Architecture(name="resnet18", num_classes=2)}, "resnet18"),
    "diverged": ({"model": diverged()}, "finite"),
    "undecided": ({"model": Undecided(), "shape": (3, 8, 8)}, "torch.export"),
    "no onnx": ({"shape": (3, 8, 8), "onnx": True}, "pip install"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, word = REFUSED[name]
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith("onnx") else real(name))
    with pytest.raises(MetaplError, match=word):
        export(**{"model": create("small_cnn", 2), "path": tmp_path / "out", "card": CARD, **changes})
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_stays_where_another_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = export(create("small_cnn", 2), tmp_path, card=CARD)
    content = earlier.weights.read_bytes()

    def refuse(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("metapl.runs.atomic.os.replace", refuse)
        with pytest.raises(MetaplError, match="No space left"):
            export(create("small_cnn", 2), tmp_path, card=CARD)
    for name in ("model.pt2", "model.onnx"):  # which would stand beside weights of another network
        (tmp_path / name).write_bytes(b"of another network")
        with pytest.raises(MetaplError, match=name):
            export(create("small_cnn", 2), tmp_path, card=CARD)
        (tmp_path / name).unlink()
    assert earlier.weights.read_bytes() == content
    assert sorted(file.name for file in tmp_path.iterdir()) == [CARD_FILE, WEIGHTS]
    with pytest.raises(MetaplError, match="written"):
        export(create("small_cnn", 2), earlier.card, card=CARD)
