"""Exported networks: what others load without metapl, and the card beside it."""

from __future__ import annotations

import hashlib
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

from metapl import export as export_module
from metapl.errors import MetaplError
from metapl.export import Exported, export
from metapl.models import Architecture, create, mlp, normalized, parameter_groups

CARD: dict[str, Any] = {
    "recipe": {"steps": 100, "student": {"lr": 0.1}},
    "data_hash": "sha256:0123abcd",
    "metrics": {"test accuracy": 0.9712345678, "n": 5},
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def code_of(written: Exported) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", written.card.read_text(), flags=re.DOTALL)
    return code


def run(written: Exported, monkeypatch: pytest.MonkeyPatch, *, with_metapl: bool = False, **scope: Any) -> Any:
    """The card's code, run beside the weights; what it defines."""
    monkeypatch.chdir(written.weights.parent)
    if not with_metapl:
        for name in [name for name in sys.modules if name.split(".")[0] == "metapl"]:
            monkeypatch.setitem(sys.modules, name, None)
    exec(code_of(written), scope)
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
    assert "Normalisation: none" in plain
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
        ({"card": {**CARD, "colour": 1}}, r"unknown \['colour'\].*notes"),
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
        patch.setattr("metapl.atomic.os.replace", refuse)
        with pytest.raises(MetaplError, match="No space left"):
            export(create("small_cnn", 2), tmp_path, card=CARD)
    assert earlier.weights.read_bytes() == content
    assert sorted(f.name for f in tmp_path.iterdir()) == [export_module.CARD, export_module.WEIGHTS]
    (tmp_path / "file").write_text("")
    with pytest.raises(MetaplError, match="could not be written"):
        export(create("small_cnn", 2), tmp_path / "file", card=CARD)
