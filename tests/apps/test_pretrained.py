"""ImageNet's weights: taken from the cache, downloaded where they are not there, and what is said without a network."""

from __future__ import annotations

import io
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from tiny_runs import color_folders
from torchvision.models import ResNet18_Weights

from metapl.apps import look
from metapl.apps.images import METHODS, Images, Pictures
from metapl.apps.networks.weights import fetch_imagenet_weights
from metapl.errors import MetaplError

FILE = "resnet18-f37072fd.pth"
URL = ResNet18_Weights.DEFAULT.url


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's cache, empty; the network is refused."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", _refuse)
    return tmp_path / "checkpoints"


def _refuse(*given: Any, **options: Any) -> Any:
    raise AssertionError("the network was asked")


def test_without_a_network_the_error_says_what_to_download_and_how_to_give_it(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*given: Any, **options: Any) -> Any:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(MetaplError) as caught:
        fetch_imagenet_weights("resnet18")
    said = str(caught.value)
    assert said.startswith(
        "the ImageNet weights of resnet18 could not be downloaded (<urlopen error no route to host>)"
    )
    assert f"Download {URL} elsewhere and give it as --weights {FILE}, or leave --weights out." in said
    assert list(checkpoints.iterdir()) == []


def test_a_download_that_is_not_what_it_should_be_is_refused(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "urlopen", lambda *given, **options: _Answer(b"<html>not found</html>"))
    with pytest.raises(MetaplError, match=rf"invalid hash value.*Download {URL}"):
        fetch_imagenet_weights("resnet18")
    assert list(checkpoints.iterdir()) == []


class _Answer(io.BytesIO):
    """What a server says."""

    def info(self) -> Message:
        header = Message()
        header["Content-Length"] = str(len(self.getvalue()))
        return header


def test_a_file_that_is_there_is_taken(checkpoints: Path) -> None:
    checkpoints.mkdir()
    (checkpoints / FILE).write_bytes(b"weights")
    assert fetch_imagenet_weights("resnet18") == checkpoints / FILE
    assert (checkpoints / FILE).read_bytes() == b"weights"


def test_a_file_that_is_not_there_is_downloaded_once(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(url: str, folder: str, **options: Any) -> dict[str, Any]:
        asked.append((url, options))
        Path(folder).mkdir()
        (Path(folder) / FILE).write_bytes(b"weights")
        return {}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert [fetch_imagenet_weights("resnet18") for _ in range(2)] == [checkpoints / FILE] * 2
    assert asked == [(URL, {"check_hash": True, "weights_only": True})]


@pytest.mark.parametrize("name", ["pooled_cnn", "efficientnet_b0_svhn", "timm:resnet18", "resnet_18"])
def test_a_network_that_torchvision_has_no_weights_of_is_refused(name: str, checkpoints: Path) -> None:
    with pytest.raises(MetaplError, match=rf"no ImageNet weights of '{name}'.*--network resnet18.*--weights FILE"):
        fetch_imagenet_weights(name)
    assert not checkpoints.exists()


@pytest.mark.parametrize(("network", "stem"), [(None, "resnet18"), ("efficientnet_b0", "efficientnet_b0")])
def test_the_recipe_asks_for_those_of_its_network(
    network: str | None, stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(name: str) -> str:
        asked.append(name)
        raise MetaplError("asked")

    monkeypatch.setattr(look, "fetch_imagenet_weights", fetch)
    root = color_folders(tmp_path)
    pictures = Pictures(weights="imagenet", network=network)
    config = Images(labeled=str(root / "labeled"), unlabeled=str(root / "unlabeled"), pictures=pictures)
    with pytest.raises(MetaplError, match="asked"):
        look.settled(config, METHODS["uda"], lambda text: None)
    assert asked == [stem]
