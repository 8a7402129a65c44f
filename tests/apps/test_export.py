"""Exported networks: what others load without metapl, and the card beside it."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from metapl.errors import MetaplError
from metapl.networks.architectures import Architecture, create
from metapl.networks.exports import CARD, ONNX, PROGRAM, WEIGHTS, export, programs
from metapl.networks.tuned import Normalized

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SMALL = Architecture(name="small_cnn", num_classes=2)
SHAPE = (3, 16, 16)


def run(
    out: Path, patch: pytest.MonkeyPatch, file: str = WEIGHTS, own: bool = False, **scope: Any
) -> dict[str, Any]:
    """Return what the card's code for a file defines, run where metapl cannot be imported."""
    patch.chdir(out)
    for name in [name for name in sys.modules if name.split(".")[0] == "metapl"]:
        if not own:
            patch.setitem(sys.modules, name, None)
    blocks = re.findall(r"```python\n(.*?)```", (out / CARD).read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if file in block)
    # In this process metapl is imported already, so the code would run without saying so.
    assert ("\nimport metapl.networks\n" in f"\n{code}") == ("metapl" in code) == own
    exec(code, scope)
    return scope


def trained_like(architecture: Architecture, size: int) -> nn.Module:
    """Return fresh weights, with the statistics of pictures and a head that tells them apart."""
    torch.manual_seed(0)
    channels = architecture.in_channels
    model = Normalized(architecture.create(), MEAN[:channels], STD[:channels])
    model(torch.rand(8, channels, size, size))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(
                ("head.weight", "fc.weight", "heads.head.weight", "classifier.1.weight")
            ):
                parameter.normal_()
    return model


@pytest.mark.usefixtures("blank_programs")
@pytest.mark.parametrize("name", ["efficientnet_b0_svhn", "timm:resnet10t", "resnet18"])
def test_the_cards_code_builds_the_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And torchvision loads the weights of its own."""
    pytest.importorskip("timm")
    architecture = Architecture(
        name=name, num_classes=4, in_channels=1 if name != "resnet18" else 3, dropout=0.5
    )
    shape = (architecture.in_channels, 32, 32)
    model: Any = trained_like(architecture, 32).eval()
    export(model, tmp_path / "out", shape=shape, architecture=architecture)
    images = torch.rand(3, *shape)
    if name == "resnet18":
        found: Any = torchvision.models.resnet18(num_classes=4)
        found.load_state_dict(load_file(tmp_path / "out" / WEIGHTS), strict=True)
    else:
        found = run(tmp_path / "out", monkeypatch, own=True)["model"]
    mean, std = (torch.tensor(of[: shape[0]]).view(-1, 1, 1) for of in (MEAN, STD))
    torch.testing.assert_close(found.eval()((images - mean) / std), model(images))


@pytest.mark.parametrize(
    ("name", "size", "channels", "onnx"),
    [
        ("pooled_cnn", 24, 1, False),
        pytest.param("timm:resnet10t", 32, 3, True, marks=pytest.mark.long),
    ],
)
def test_the_cards_code_runs_the_programs(
    name: str, size: int, channels: int, onnx: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("timm",) * name.startswith("timm:") + (
        "onnx",
        "onnxscript",
        "onnxruntime",
    ) * onnx:
        pytest.importorskip(package)
    architecture = Architecture(name=name, num_classes=4, in_channels=channels, image_size=size)
    shape = (channels, size, size)
    model = trained_like(architecture, size)
    digests = export(model, tmp_path / "out", shape=shape, architecture=architecture, onnx=onnx)
    images = torch.rand(5, *shape)
    expected = model.eval()(images).softmax(1).detach()
    assert expected.std(0).max() > 1e-3  # the pictures are told apart
    assert [*digests] == [WEIGHTS, PROGRAM, *([ONNX] if onnx else [])]
    for file in [*digests][1:]:
        content, is_onnx = (tmp_path / "out" / file).read_bytes(), file == ONNX
        predict = run(tmp_path / "out", monkeypatch, file=file)["predict"]
        for count in (1, 5):
            found = predict(images[:count].numpy() if is_onnx else images[:count])
            torch.testing.assert_close(
                torch.as_tensor(found), expected[:count], rtol=1e-4, atol=1e-5
            )
        assert digests[file] == hashlib.sha256(content).hexdigest()
        assert f"| SHA-256 of {file} | {digests[file]} |" in (tmp_path / "out" / CARD).read_text()
        # Neither places of this machine nor metapl's names stand in it.
        assert not [
            words
            for words in (os.fsencode(os.getcwd()), b"site-packages", b"metapl")
            if words in content
        ]


def little(outputs: int = 2) -> nn.Module:
    """Return a network of pictures with each part that one has, as little as there can be."""
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
    assert first == programs(
        model.eval().float().to(memory_format=torch.contiguous_format), (3, 4, 4)
    )


@pytest.mark.parametrize(("other", "word"), [(little(), "differs"), (little(3), r"\(1, 3\)")])
def test_a_program_that_gives_something_else_is_refused(
    other: nn.Module, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.export.export
    monkeypatch.setattr(
        torch.export, "export", lambda network, *given, **named: real(other, *given, **named)
    )
    with pytest.raises(MetaplError, match=word):
        export(little(), tmp_path / "out", shape=(3, 4, 4))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("blank_programs")
def test_same_network_same_bytes_and_file_and_card_say_what_it_is(tmp_path: Path) -> None:
    sections = {"Metrics": {"test accuracy": 0.9712345678, "n": 5}, "Notes": "On a **laptop**."}
    told = {
        "title": "Cats and dogs",
        "classes": ["cat", "dog"],
        "sections": sections,
        "architecture": SMALL,
    }
    model = Normalized(SMALL.create(), MEAN, STD)
    before = {key: (t.data_ptr(), t.clone()) for key, t in model.state_dict().items()}
    first = export(model, tmp_path / "a", shape=SHAPE, **told)
    assert model.training
    for key, t in model.state_dict().items():
        assert (t.data_ptr(), torch.equal(t, before[key][1])) == (before[key][0], True)
    last = model.module.to(memory_format=torch.channels_last) and model
    assert export(last, tmp_path / "b", shape=SHAPE, **told) == first
    for name in (WEIGHTS, CARD):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with safe_open(tmp_path / "a" / WEIGHTS, "pt") as file:
        said = json.loads(file.metadata()["metapl"])
    assert Architecture(**said["architecture"]) == SMALL
    assert (said["normalization"], said["classes"]) == ({"mean": MEAN, "std": STD}, ["cat", "dog"])
    text = (tmp_path / "a" / CARD).read_text()
    parts = [
        "# Cats and dogs\n",
        "name='small_cnn'",
        "| parameters | 79,746 |",
        "cat, dog",
        "0.485, 0.456, 0.406",
    ]
    parts += [
        "| test accuracy | 0.971235 |",
        "| n | 5 |",
        f"| torch | {torch.__version__.split('+')[0]}",
        "**laptop**",
    ]
    assert not [part for part in parts if part not in text]


@pytest.mark.usefixtures("blank_programs")
def test_wrappers_are_taken_off_and_tied_weights_written(tmp_path: Path) -> None:
    class Compiled(nn.Module):
        """What ``torch.compile`` returns, as far as it concerns the weights."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    export(Compiled(Normalized(Compiled(tied), MEAN, STD)), tmp_path, shape=SHAPE)
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == tied.state_dict().keys()
    assert torch.equal(found["0.weight"], found["1.weight"])


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Undecided(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(2, 3)) if images.sum() > 0 else images.amax(dim=(2, 3))

    diverged = create("small_cnn", 2)
    nn.init.constant_(diverged.get_parameter("head.bias"), float("inf"))
    # A module of None is one that cannot be imported.
    monkeypatch.setitem(sys.modules, "onnx", None)
    sound = create("small_cnn", 2)
    for model, onnx, word in (
        (diverged, False, "finite"),
        (Undecided(), False, "torch.export"),
        (sound, True, "pip"),
    ):
        with pytest.raises(MetaplError, match=word):
            export(model, tmp_path / "out", shape=SHAPE, onnx=onnx)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("blank_programs")
def test_an_earlier_export_stays_where_another_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(create("small_cnn", 2), tmp_path, shape=SHAPE)
    content = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(
            "metapl.runs.folder.os.replace",
            Mock(side_effect=OSError(28, "No space left on device")),
        )
        with pytest.raises(MetaplError, match="No space left"):
            export(create("small_cnn", 2), tmp_path, shape=SHAPE)
    # Which would stand beside weights that are not its own.
    (tmp_path / ONNX).write_bytes(b"of another network")
    for out, word in ((tmp_path, ONNX), (tmp_path / CARD, "written")):
        with pytest.raises(MetaplError, match=word):
            export(create("small_cnn", 2), out, shape=SHAPE)
    (tmp_path / ONNX).unlink()
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == content
