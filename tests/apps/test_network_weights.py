"""Weights of networks from files: whole, of other classes, damaged, of another network, downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import color_folders
from torch import nn
from torchvision.models import ResNet18_Weights

from metapl.apps import look
from metapl.apps.images import METHODS, Images, Pictures
from metapl.apps.networks import create, load_weights
from metapl.apps.networks.weights import fetch_imagenet_weights, head_outputs
from metapl.errors import MetaplError
from metapl.models import wide_resnet


@pytest.fixture(scope="module")
def source() -> Any:
    torch.manual_seed(1)
    return create("small_cnn", 5)


def store(state: Any, path: Path) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def whole(source: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + key: t.clone() for key, t in source.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_weights_come_from_a_file_of_a_training_program(source: nn.Module, prefix: str, tmp_path: Path) -> None:
    state = whole(source, prefix)
    files = [store(state, tmp_path / f"w{suffix}") for suffix in (".pt", ".pth", ".safetensors")]
    files += [store({key: state, "epoch": 3}, tmp_path / f"{key}.pt") for key in ("state_dict", "model")]
    for file in files:
        loaded = create("small_cnn", 5, weights=file).state_dict()
        assert all(torch.equal(t, loaded[key]) for key, t in source.state_dict().items())
        assert head_outputs(file, ["head"]) == 5


def test_a_head_of_other_classes_or_that_is_not_there_stays_fresh(source: Any, tmp_path: Path) -> None:
    file = store(whole(source), tmp_path / "w.safetensors")
    made = []
    for weights in (None, file):
        torch.manual_seed(7)
        made.append(create("small_cnn", 3, weights=weights))
    fresh, network = made
    assert torch.equal(network.head.weight, fresh.head.weight)
    assert torch.equal(network.features[3].conv.weight, source.features[3].conv.weight)
    headless = {key: t for key, t in whole(source).items() if not key.startswith("head.")}
    fresh = load_weights(create("small_cnn", 5), store(headless, tmp_path / "w.pt"), heads=["head"])
    assert fresh == ["head.weight", "head.bias"]


def test_weights_in_half_precision_and_without_counters(tmp_path: Path) -> None:
    source, network = wide_resnet(10, 1), wide_resnet(10, 1)
    state = {key: t.half() for key, t in whole(source).items() if not key.endswith("num_batches_tracked")}
    load_weights(network, store(state, tmp_path / "w.pt"))
    torch.testing.assert_close(network.stem.weight, source.stem.weight, atol=1e-3, rtol=1e-3)
    assert network.stem.weight.dtype == torch.float32


class RunsCode:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def test_damaged_and_foreign_weights_are_refused_and_run_no_code(source: nn.Module, tmp_path: Path) -> None:
    good, network = whole(source), create("small_cnn", 5)
    objects: dict[str, tuple[Any, str]] = {
        "module": (nn.Linear(2, 2), "read"),
        "code": (RunsCode(tmp_path / "ran"), "read"),
        "list": ([torch.zeros(2)], "list"),
        "numbers": ({"lr": 0.1}, "lr"),
        "nothing": ({}, "tensors"),
        "nan": ({**good, "head.bias": torch.full((5,), float("nan"))}, "finite"),
        "whole": ({**good, "head.bias": torch.zeros(5, dtype=torch.long)}, "whole"),
        "features": ({**good, "head.weight": torch.zeros(7, 63)}, "63"),
        "less": ({key: t for key, t in good.items() if key != "features.2.conv.weight"}, "missing"),
        "more": ({**good, "features.9.weight": torch.zeros(1)}, "features.9"),
        "wider": ({**good, "features.1.conv.weight": torch.zeros(48, 31, 3, 3)}, "31"),
        "another": (wide_resnet(10, 1).state_dict(), "more"),
        "meta": ({**good, "head.bias": torch.zeros(5, device="meta")}, "read"),
    }
    cases = [(store(held, tmp_path / f"{name}.pt"), word) for name, (held, word) in objects.items()]
    cases += [(tmp_path / "none.pt", "there is no file"), (tmp_path, "there is no file")]
    for suffix in (".pt", ".safetensors"):
        content = store(good, tmp_path / f"w{suffix}").read_bytes()
        for number, part in enumerate((b"", content[: len(content) // 2], b"\x89PNG\r\n\x1a\n" + bytes(200), b"text")):
            (tmp_path / f"{number}{suffix}").write_bytes(part)
            cases.append((tmp_path / f"{number}{suffix}", "read"))
    before = whole(network)
    for file, word in cases:
        with pytest.raises(MetaplError, match=word):
            load_weights(network, file, heads=["head"])
        assert all(torch.equal(t, before[key]) for key, t in network.state_dict().items())
    assert not (tmp_path / "ran").exists()


def test_position_embeddings_are_interpolated(tmp_path: Path) -> None:
    pytest.importorskip("timm")

    def vit(size: int, weights: Path | None = None) -> Any:
        return create("timm:vit_tiny_patch16_224", 3, image_size=size, weights=weights)

    source = vit(64)
    before, after = source.pos_embed, vit(96, store(source.state_dict(), tmp_path / "w.pt")).pos_embed
    assert torch.equal(before[:, 0], after[:, 0])
    assert after.shape[1] == 1 + 36


# ---------------------------------------------------------------------------------------------- ImageNet's, downloaded

FILE, URL = "resnet18-f37072fd.pth", ResNet18_Weights.DEFAULT.url


def test_imagenet_weights_are_downloaded_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for fault in (URLError("no route to host"), RuntimeError("invalid hash value")):

        def fails(*given: Any, fault: Exception = fault, **options: Any) -> Any:
            raise fault

        monkeypatch.setattr(torch.hub, "urlopen" if isinstance(fault, URLError) else "load_state_dict_from_url", fails)
        with pytest.raises(MetaplError, match=FILE) as caught:  # what to download and how to give it
            fetch_imagenet_weights("resnet18")
        assert URL in str(caught.value)
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(url: str, folder: str, **options: Any) -> None:
        asked.append((url, options))
        (Path(folder) / FILE).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert [fetch_imagenet_weights("resnet18") for _ in range(2)] == [tmp_path / "checkpoints" / FILE] * 2
    assert asked == [(URL, {"check_hash": True, "weights_only": True})]
    for name in ("pooled_cnn", "timm:resnet18", "resnet_18"):
        with pytest.raises(MetaplError, match="resnet18"):
            fetch_imagenet_weights(name)


@pytest.mark.parametrize("network", [None, "efficientnet_b0"])
def test_the_recipe_asks_for_those_of_its_network(
    network: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(name: str) -> str:
        raise MetaplError(f"asked for {name}")

    monkeypatch.setattr(look, "fetch_imagenet_weights", fetch)
    labeled, unlabeled = (str(color_folders(tmp_path) / part) for part in ("labeled", "unlabeled"))
    pictures = Pictures(weights="imagenet", network=network)
    config = Images(labeled=labeled, unlabeled=unlabeled, pictures=pictures)
    with pytest.raises(MetaplError, match=f"asked for {network or 'resnet18'}"):
        look.settled(config, METHODS["uda"], lambda text: None)
