"""Weights of networks from files: whole, of other classes, damaged, of another network."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VisionTransformer

from metapl.apps.networks import create, load_weights
from metapl.apps.networks.architecture import FAMILIES
from metapl.errors import MetaplError
from metapl.models import wide_resnet

# ------------------------------------------------------------------------------------------------ weights from files


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(1)
    return create("small_cnn", 5)


def store(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_weights_come_from_a_file(source: nn.Module, suffix: str, prefix: str, tmp_path: Path) -> None:
    state = {prefix + k: t for k, t in source.state_dict().items()}
    model = create("small_cnn", 5, weights=store(state, tmp_path / f"w{suffix}"))
    assert all(torch.equal(t, source.state_dict()[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_come_from_a_training_programs_file(source: nn.Module, key: str, tmp_path: Path) -> None:
    file = store({key: source.state_dict(), "epoch": 3, "arch": "small"}, tmp_path / "w.pt")
    assert torch.equal(create("small_cnn", 5, weights=file).head.bias, source.head.bias)


def test_a_head_of_other_classes_stays_fresh(
    source: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = store(source.state_dict(), tmp_path / "w.safetensors")
    torch.manual_seed(7)
    fresh = create("small_cnn", 3)
    torch.manual_seed(7)
    with caplog.at_level(logging.INFO, "metapl.apps.networks"):
        model = create("small_cnn", 3, weights=file)
    assert torch.equal(model.head.weight, fresh.head.weight)
    assert torch.equal(model.features[3].conv.weight, source.features[3].conv.weight)
    assert "12 tensors loaded from" in caplog.text
    assert "head.weight, head.bias" in caplog.text


def test_weights_without_a_head(source: nn.Module, tmp_path: Path) -> None:
    state = {k: t for k, t in source.state_dict().items() if not k.startswith("head.")}
    report = load_weights(create("small_cnn", 5), store(state, tmp_path / "w.pt"), heads=["head"])
    assert report.fresh == ("head.weight", "head.bias")


def test_weights_in_half_precision_and_without_counters(tmp_path: Path) -> None:
    source = wide_resnet(10, 1)
    state = {k: t.half() for k, t in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    model = wide_resnet(10, 1)
    load_weights(model, store(state, tmp_path / "w.pt"))
    torch.testing.assert_close(model.stem.weight, source.stem.weight, atol=1e-3, rtol=1e-3)
    assert model.stem.weight.dtype == torch.float32


class RunsCode:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def damaged(state: dict[str, torch.Tensor], kind: str, path: Path) -> Path:
    weights = {k: t.clone() for k, t in state.items()}
    if kind == "not there":
        return path / "none.pt"
    if kind == "folder":
        return path
    if kind in ("short.pt", "short.safetensors"):
        file = store(weights, path / kind)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return file
    if kind in ("empty.pt", "empty.safetensors", "picture.pt", "picture.safetensors", "text.pth"):
        start = {"empty": b"", "picture": b"\x89PNG\r\n\x1a\n" + bytes(200), "text": b"weights, please"}
        (path / kind).write_bytes(start[kind.split(".")[0]])
        return path / kind
    objects: dict[str, Any] = {
        "module": nn.Linear(2, 2),
        "list": [torch.zeros(2)],
        "numbers": {"lr": 0.1},
        "nothing": {},
        "code": RunsCode(path / "ran"),
        "nan": {**weights, "head.bias": torch.full((5,), float("nan"))},
        "whole numbers": {**weights, "head.bias": torch.zeros(5, dtype=torch.long)},
        "other features": {**weights, "head.weight": torch.zeros(7, 63)},
        "less": {k: t for k, t in weights.items() if k != "features.2.conv.weight"},
        "more": {**weights, "features.9.weight": torch.zeros(1)},
        "wider": {**weights, "features.1.conv.weight": torch.zeros(48, 31, 3, 3)},
    }
    return store(objects[kind], path / f"{kind}.pt")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("not there", "there is no file of weights .*none.pt"),
        ("folder", "there is no file of weights"),
        ("short.pt", "cannot be read as weights"),
        ("short.safetensors", "cannot be read as weights"),
        ("empty.pt", "cannot be read as weights"),
        ("empty.safetensors", "cannot be read as weights"),
        ("picture.pt", "cannot be read as weights"),
        ("picture.safetensors", "cannot be read as weights"),
        ("text.pth", "cannot be read as weights"),
        ("module", "cannot be read as weights"),
        ("code", "cannot be read as weights"),
        ("list", "holds a list"),
        ("numbers", "the entries lr"),
        ("nothing", "expected tensors by name"),
        ("nan", "not finite, in head.bias"),
        ("whole numbers", r"head.bias \(5,\) of whole numbers instead of \(5,\)"),
        ("other features", r"head.weight \(7, 63\) instead of \(5, 64\)"),
        ("less", "features.2.conv.weight missing instead of"),
        ("more", "features.9.weight .* instead of missing"),
        ("wider", r"features.1.conv.weight \(48, 31, 3, 3\) instead of \(48, 32, 3, 3\)"),
    ],
)
def test_damaged_and_foreign_weights_are_refused(source: nn.Module, kind: str, words: str, tmp_path: Path) -> None:
    file = damaged(source.state_dict(), kind, tmp_path)
    model = create("small_cnn", 5)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(MetaplError, match=words):
        load_weights(model, file, heads=["head"])
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network_are_refused_with_a_few_names(tmp_path: Path) -> None:
    file = store(wide_resnet(10, 1).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(MetaplError, match=r"missing instead of .* and \d+ more"):
        create("small_cnn", 10, weights=file)


def test_position_embeddings_are_interpolated(tmp_path: Path) -> None:
    def vit(size: int) -> nn.Module:
        return VisionTransformer(size, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=3)

    family = FAMILIES["vit_b_16"]
    source, model = vit(32), vit(48)
    file = store(source.state_dict(), tmp_path / "w.pt")
    report = load_weights(model, file, heads=family.heads(model), adapt=family.adapt)
    assert report.interpolated == ("encoder.pos_embedding",)
    before, after = source.encoder.pos_embedding, model.encoder.pos_embedding
    assert after.shape == (1, 37, 16)
    assert torch.equal(before[:, 0], after[:, 0])
    # Corners stay corners: the first and the last of 16 patches are the first and the last of 36.
    torch.testing.assert_close(before[:, [1, 16]], after[:, [1, 36]])
    assert load_weights(vit(32), file, adapt=family.adapt).interpolated == ()
    state = {**source.state_dict(), "encoder.pos_embedding": torch.zeros(1, 12, 16)}
    with pytest.raises(MetaplError, match="cannot be interpolated to pictures of 48"):
        load_weights(vit(48), store(state, tmp_path / "v.pt"), adapt=family.adapt)
