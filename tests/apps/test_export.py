"""Exported networks: what others load without metapl, and the card beside it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
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

from metapl.apps import export as export_module
from metapl.apps.export import Exported, export
from metapl.apps.export.network import programs
from metapl.apps.networks import Architecture, create, normalized, parameter_groups
from metapl.errors import MetaplError
from metapl.models import mlp

CARD: dict[str, Any] = {
    "recipe": {"steps": 100, "student": {"lr": 0.1}},
    "data_hash": "sha256:0123abcd",
    "metrics": {"test accuracy": 0.9712345678, "n": 5},
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def code_of(written: Exported, file: str = export_module.WEIGHTS) -> str:
    """The card's code that loads one of the files."""
    blocks = re.findall(r"```python\n(.*?)```", written.card.read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if file in block)
    return code


def run(
    written: Exported,
    monkeypatch: pytest.MonkeyPatch,
    *,
    file: str = export_module.WEIGHTS,
    with_metapl: bool = False,
    **scope: Any,
) -> Any:
    """The card's code for a file, run beside it; what it defines."""
    monkeypatch.chdir(written.weights.parent)
    if not with_metapl:
        for name in [name for name in sys.modules if name.split(".")[0] == "metapl"]:
            monkeypatch.setitem(sys.modules, name, None)
    exec(code_of(written, file), scope)
    return scope


def test_torchvision_loads_it(tmp_path: Path) -> None:
    architecture = Architecture(name="efficientnet_b0", num_classes=7, dropout=0.2, stochastic_depth=0.2)
    model = architecture.create()
    written = export(normalized(model, MEAN, STD), tmp_path, card=CARD, architecture=architecture)
    theirs = torchvision.models.efficientnet_b0(num_classes=7)
    theirs.load_state_dict(load_file(written.weights), strict=True)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(theirs.eval()(images), model.eval()(images))


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        (Architecture(name="resnet18", num_classes=4, in_channels=1), 32),
        (Architecture(name="efficientnet_b0_svhn", num_classes=4, dropout=0.5, image_size=32), 32),
        (Architecture(name="small_cnn", num_classes=4, in_channels=1), 16),
    ],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.parametrize("with_normalization", [True, False])
def test_the_cards_code_predicts_the_same(
    architecture: Architecture, size: int, with_normalization: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = architecture.in_channels
    model = architecture.create()
    # The running statistics of a trained network are not those of a fresh one.
    model(torch.randn(4, channels, size, size))
    wrapped = normalized(model, MEAN[:channels], STD[:channels]) if with_normalization else model
    written = export(wrapped, tmp_path / "out", card=CARD, architecture=architecture)
    theirs = run(written, monkeypatch, with_metapl=architecture.library == "metapl")
    assert ("metapl" in code_of(written)) == (architecture.library == "metapl")
    # In this process it is imported already, so the code would run without saying so.
    assert ("\nimport metapl.apps.networks\n" in f"\n{code_of(written)}") == (architecture.library == "metapl")
    images = torch.rand(3, channels, size, size)
    torch.testing.assert_close(theirs["predict"](images), wrapped.eval()(images).softmax(1).detach())


class Own(nn.Sequential):
    """A network that metapl knows nothing of."""


def test_the_cards_code_for_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Own(*mlp([12, 5, 3]))
    written = export(normalized(model, [0.5] * 3, [0.25] * 3), tmp_path, card=CARD)
    assert "`build_network()` stands for" in written.card.read_text()
    theirs = run(written, monkeypatch, build_network=lambda: mlp([12, 5, 3]))
    images = torch.rand(2, 3, 2, 2)
    torch.testing.assert_close(theirs["predict"](images), model((images - 0.5) / 0.25).softmax(1).detach())


def test_the_card_spells_out_plain_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp([12, 5, 4, 3], dropout=0.5)
    written = export(model, tmp_path, card=CARD)
    theirs = run(written, monkeypatch)
    images = torch.rand(6, 3, 2, 2)
    torch.testing.assert_close(theirs["predict"](images), model.eval()(images).softmax(1).detach())
    assert "build_network" not in written.card.read_text()
    gelu = export(mlp([12, 5, 3], activation=nn.GELU), tmp_path, card=CARD)
    assert "build_network()" in code_of(gelu)


def test_timm_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    architecture = Architecture(name="timm:resnet10t", num_classes=4, in_channels=1, stochastic_depth=0.1)
    model = normalized(architecture.create(), [0.5], [0.2])
    written = export(model, tmp_path, card=CARD, architecture=architecture)
    images = torch.rand(3, 1, 32, 32)
    theirs = run(written, monkeypatch)["predict"](images)
    torch.testing.assert_close(theirs, model.eval()(images).softmax(1).detach())


# ------------------------------------------------------------------------------------------------------------ programs


def trained_like(architecture: Architecture, size: int) -> nn.Module:
    """Fresh weights, with the statistics of some pictures and a head that tells them apart."""
    torch.manual_seed(0)
    channels = architecture.in_channels
    model = normalized(architecture.create(), MEAN[:channels], STD[:channels])
    model(torch.rand(8, channels, size, size))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("head.weight", "fc.weight", "heads.head.weight", "classifier.1.weight")):
                parameter.normal_()
    return model


@pytest.mark.parametrize(
    ("name", "size", "channels", "onnx"),
    [
        ("pooled_cnn", 24, 1, True),
        pytest.param("resnet18", 32, 3, False, marks=pytest.mark.long),
        pytest.param("timm:resnet10t", 32, 3, True, marks=pytest.mark.long),
        pytest.param("vit", 8, 3, False, marks=pytest.mark.long),
    ],
)
def test_the_cards_code_runs_the_programs(
    name: str, size: int, channels: int, onnx: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("timm",) * name.startswith("timm:") + ("onnx", "onnxscript", "onnxruntime") * onnx:
        pytest.importorskip(package)
    if name == "vit":
        model: nn.Module = torchvision.models.VisionTransformer(size, 4, 2, 2, 16, 32, num_classes=4)
        nn.init.normal_(model.heads.head.weight)
        architecture = None
    else:
        architecture = Architecture(name=name, num_classes=4, in_channels=channels, image_size=size)
        model = trained_like(architecture, size)
    shape = (channels, size, size)
    written = export(model, tmp_path / "out", card=CARD, architecture=architecture, shape=shape, onnx=onnx)
    images = torch.rand(5, *shape)
    expected = model.eval()(images).softmax(1).detach()
    assert len(set(expected.argmax(1).tolist())) > 1 or expected.std(0).max() > 1e-3  # the pictures are told apart
    assert written.program is not None
    predict = run(written, monkeypatch, file="model.pt2")["predict"]
    for count in (1, 5):
        torch.testing.assert_close(predict(images[:count]), expected[:count], rtol=1e-4, atol=1e-5)
    assert (written.onnx is not None) == onnx
    if onnx:
        predict = run(written, monkeypatch, file="model.onnx")["predict"]
        for count in (1, 5):
            found = torch.from_numpy(predict(images[:count].numpy()))
            torch.testing.assert_close(found, expected[:count], rtol=1e-4, atol=1e-5)
        assert f"| onnx | {pytest.importorskip('onnx').__version__} |" in written.card.read_text()
    for file in (written.program, written.onnx):
        if file is not None:
            content = file.read_bytes()
            assert f"`{file.name}`: SHA-256 `{hashlib.sha256(content).hexdigest()}`" in written.card.read_text()
            # Neither places of this machine nor metapl's names stand in it.
            assert str(Path(export_module.__file__).parents[2]).encode() not in content
            assert b"site-packages" not in content
            assert b"metapl" not in content


def little(outputs: int = 2) -> nn.Module:
    """What there is in a network of pictures, and of each as little as there can be."""
    first = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs))


@pytest.mark.usefixtures("tried_here")
def test_a_program_of_a_network_in_training_is_that_of_its_evaluation(tmp_path: Path) -> None:
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


@pytest.mark.usefixtures("tried_here")
@pytest.mark.parametrize(
    ("other", "words"),
    [
        (little(), r"model\.pt2 gives \(1, 2\) where the network gives \(1, 2\), and differs by [0-9]"),
        (little(3), r"model\.pt2 gives \(1, 3\) where the network gives \(1, 2\)"),
        (Spoiled(), "differs by nan"),
    ],
    ids=["weights", "outputs", "nan"],
)
def test_a_program_that_gives_something_else_is_refused(
    other: nn.Module, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda network, *given, **named: exported(other, *given, **named))
    with pytest.raises(MetaplError, match=words):
        export(little(), tmp_path / "out", card=CARD, shape=(3, 4, 4))
    assert not (tmp_path / "out").exists()


class Undecided(nn.Module):
    """A network that torch.export cannot follow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) if images.sum() > 0 else images.amax(dim=(2, 3))


def test_programs_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(MetaplError, match=r"torch\.export cannot export the network: \w+: "):
        export(Undecided(), out, card=CARD, shape=(3, 8, 8))
    with pytest.raises(MetaplError, match=r"expected \(C, H, W\)"):
        export(create("small_cnn", 2), out, card=CARD, shape=(3, 8))
    with pytest.raises(MetaplError, match="without shape"):
        export(create("small_cnn", 2), out, card=CARD, onnx=True)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(MetaplError, match=r"ONNX needs onnx and onnxscript: not installed.*pip install 'metapl\[onnx"):
        export(create("small_cnn", 2), out, card=CARD, shape=(3, 8, 8), onnx=True)
    assert not out.exists()


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_no_program_stays_beside_weights_of_another_network(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"of another network")
    with pytest.raises(MetaplError, match=rf"{name} is of another export"):
        export(create("small_cnn", 2), tmp_path, card=CARD)
    assert [file.name for file in tmp_path.iterdir()] == [name]


# ----------------------------------------------------------------------------------------------------- weights and card


def test_same_network_same_bytes(tmp_path: Path) -> None:
    architecture = Architecture(name="small_cnn", num_classes=2)
    model = normalized(architecture.create(), MEAN, STD)
    last = model.module.to(memory_format=torch.channels_last) and model
    card = {**CARD, "classes": ["cat", "dog"]}
    first = export(model, tmp_path / "a", card=card, architecture=architecture)
    again = export(last, tmp_path / "b", card=dict(reversed(card.items())), architecture=architecture)
    assert first.weights.read_bytes() == again.weights.read_bytes()
    assert first.card.read_bytes() == again.card.read_bytes()
    assert first.sha256 == hashlib.sha256(first.weights.read_bytes()).hexdigest()


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    architecture = Architecture(name="small_cnn", num_classes=2)
    model = normalized(architecture.create(), MEAN, STD)
    written = export(model, tmp_path, card={**CARD, "classes": ["cat", "dog"]}, architecture=architecture)
    with safe_open(written.weights, "pt") as file:
        told = json.loads(file.metadata()["metapl"])
    assert Architecture(**told["architecture"]) == architecture
    assert told["normalization"] == {"mean": MEAN, "std": STD}
    assert told["classes"] == ["cat", "dog"]


def test_the_card_says_it_all(tmp_path: Path) -> None:
    architecture = Architecture(name="small_cnn", num_classes=2, image_size=16)
    card = {
        **CARD,
        "title": "Cats and dogs",
        "classes": ["cat", "dog"],
        "data_hash": {"labeled": "aa11", "unlabeled": "bb22"},
        "notes": "Trained on a **laptop**.",
    }
    written = export(normalized(architecture.create(), MEAN, STD), tmp_path, card=card, architecture=architecture)
    text = written.card.read_text()
    assert text.startswith("# Cats and dogs\n")
    for part in (
        "`small_cnn`, pictures of 16x16 pixels with 3 channels, 2 classes",
        "79,746 parameters",
        written.sha256,
        "mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]",
        "cat, dog",
        "| test accuracy | 0.971235 |",
        "| n | 5 |",
        "| labeled | aa11 |",
        '"lr": 0.1',
        f"| torch | {torch.__version__.split('+')[0]}",
        "Trained on a **laptop**.",
    ):
        assert part in text, part
    plain = export(architecture.create(), tmp_path, card=CARD, architecture=architecture).card.read_text()
    assert "Hash of the data: `sha256:0123abcd`" in plain
    assert "Normalization: none" in plain
    assert "## Notes" not in plain


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    class Compiled(nn.Module):
        """What ``torch.compile`` returns, as far as it concerns the weights."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    model = create("small_cnn", 2)
    written = export(Compiled(normalized(Compiled(model), MEAN, STD)), tmp_path, card=CARD)
    assert load_file(written.weights).keys() == model.state_dict().keys()
    with pytest.raises(MetaplError, match="normalized twice"):
        export(normalized(normalized(model, MEAN, STD), MEAN, STD), tmp_path, card=CARD)


def test_tied_weights_are_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    found = load_file(export(model, tmp_path, card=CARD).weights)
    assert torch.equal(found["0.weight"], found["1.weight"])


def test_the_network_is_left_as_it_is(tmp_path: Path) -> None:
    model = create("small_cnn", 2)
    optimizer = torch.optim.SGD(parameter_groups(model, 5e-4), lr=0.1)
    before = {k: (t.data_ptr(), t.clone()) for k, t in model.state_dict().items()}
    export(model, tmp_path, card=CARD)
    assert model.training
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())
    for key, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[key][0]
        assert torch.equal(tensor, before[key][1])


SMALL = Architecture(name="small_cnn", num_classes=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"card": {"recipe": {}}}, r"lacks \['data_hash', 'metrics'\]"),
        ({"card": {**CARD, "color": 1}}, r"unknown \['color'\].*notes"),
        ({"card": {**CARD, "classes": ["a", "b", "c"]}}, "names 3 classes, and the network has 2 outputs"),
        ({"architecture": Architecture(name="small_cnn", num_classes=3)}, r"not what .*head.bias, head.weight \(2 in"),
        ({"architecture": Architecture(name="resnet18", num_classes=2)}, "not what .*resnet18.*in all"),
    ],
)
def test_refusals_write_nothing(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(MetaplError, match=words):
        export(create("small_cnn", 2), tmp_path / "out", **{"card": CARD, "architecture": SMALL, **changes})
    assert not (tmp_path / "out").exists()


def test_a_diverged_network_is_refused(tmp_path: Path) -> None:
    model = create("small_cnn", 2)
    with torch.no_grad():
        model.get_parameter("head.bias")[0] = float("inf")
    with pytest.raises(MetaplError, match=r"not finite.*head\.bias"):
        export(model, tmp_path / "out", card=CARD)


def test_an_earlier_export_survives_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = export(create("small_cnn", 2), tmp_path, card=CARD)
    content = earlier.weights.read_bytes()

    def refuse(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("metapl.runs.atomic.os.replace", refuse)
        with pytest.raises(MetaplError, match="No space left"):
            export(create("small_cnn", 2), tmp_path, card=CARD)
    assert earlier.weights.read_bytes() == content
    assert sorted(f.name for f in tmp_path.iterdir()) == [export_module.CARD, export_module.WEIGHTS]
    (tmp_path / "file").write_text("")
    with pytest.raises(MetaplError, match="could not be written"):
        export(create("small_cnn", 2), tmp_path / "file", card=CARD)
