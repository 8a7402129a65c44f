"""Networks by name: weights, strides and noise; what feedback takes through them.

Their normalization and decay; and weights from files: whole, of other classes, damaged, of another
network, downloaded.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import ResNet18_Weights
from torchvision.ops import StochasticDepth

from metapl.errors import MetaplError
from metapl.models import mlp, wide_resnet
from metapl.networks import architectures as networks
from metapl.networks.airbench import whiten
from metapl.networks.architectures import Architecture, create
from metapl.networks.tuned import Normalized
from metapl.networks.weights import (
    fetch_imagenet_weights,
    load_weights,
    parameter_groups,
    read_weights,
)
from metapl.training.hypergradient import hypergradient

COUNTS = [
    *(
        ("wide_resnet10_1", 77_850),
        ("wide_resnet28_2", 1_467_610),
        ("wide_resnet28_10", 36_479_194),
        ("small_cnn", 80_266),
        ("pooled_cnn", 94_762),
        ("airbench_small", 498_080),
    ),
    *(
        ("efficientnet_b0_svhn", 5_288_548),
        ("efficientnet_b6_wide", 316_649_180),
        ("efficientnet_l2", 480_309_308),
    ),
    *(("vit_1b_14", 1_212_386_280), ("resnet50", 25_557_032), ("efficientnet_b7", 66_347_960)),
]


def on_meta(name: str, num_classes: int = 1000, **fields: Any) -> Any:
    with torch.device("meta"):
        return create(name, num_classes, **fields)


@pytest.mark.long
def test_each_network_has_its_weights() -> None:
    """This package's networks are made for ten classes, the others for a thousand.

    Of torchvision's, its own tests count the rest.
    """
    for name, weights in COUNTS:
        own = Architecture(name=name, num_classes=5).library == "metapl"
        assert sum(p.numel() for p in on_meta(name, 10 if own else 1000).parameters()) == weights, (
            name
        )


def test_total_stride() -> None:
    for name, size, side in (("b0", 32, 1), ("b0_svhn", 32, 4), ("b0_svhn", 64, 8)):
        blocks = on_meta(f"efficientnet_{name}").features[:-1]
        assert blocks(torch.empty(2, 3, size, size, device="meta")).shape[1:] == (320, side, side)


def test_an_efficientnets_stochastic_depth_is_linear_and_its_head_small_for_few_classes_too() -> (
    None
):
    network = on_meta("efficientnet_b0_svhn", stochastic_depth=0.2)
    found = [m.p for m in network.modules() if isinstance(m, StochasticDepth)]
    assert found == pytest.approx([0.2 * number / 16 for number in range(1, 17)])
    assert not any(
        m.p for m in on_meta("efficientnet_b0_svhn").modules() if isinstance(m, StochasticDepth)
    )
    for classes in (3, 4000):
        weight = create("efficientnet_b0", classes).get_parameter("classifier.1.weight")
        assert weight.abs().max().item() == pytest.approx(max(1000, classes) ** -0.5, rel=0.01)


@pytest.mark.parametrize(
    "name",
    [
        "airbench_small",
        "pooled_cnn",
        "small_cnn",
        "wide_resnet28_2",
        "resnet18",
        "efficientnet_b0_svhn",
    ],
)
def test_grey_pictures_and_noise_in_training_alone(name: str) -> None:
    torch.manual_seed(0)
    noise = {"stochastic_depth": 0.5} if name in networks.EFFICIENTNETS else {"dropout": 0.5}
    network, images = create(name, 3, in_channels=1, **noise).eval(), torch.randn(4, 1, 32, 32)
    assert torch.equal(network(images), network(images))
    assert network(images).shape == (4, 3)
    torch.testing.assert_close(network(images)[:2], network(images[:2]), rtol=1e-3, atol=1e-4)
    for module in network.modules():
        if isinstance(module, nn.Dropout | StochasticDepth):
            module.train()
    assert not torch.equal(network(images), network(images))
    for kind in (name, "vit_b_32"):
        assert {m.p for m in on_meta(kind, dropout=0.3).modules() if isinstance(m, nn.Dropout)} == {
            0.3
        }


STAGES = {1: (128,), 11: (128,), 12: (64, 128), 23: (64, 128), 24: (32, 64, 128), 41: (32, 64, 128)}
STAGES |= {48: (32, 64, 128, 192), 92: (32, 64, 128, 192), 96: (32, 64, 128, 192, 192)}
"""Channels of pooled_cnn by the side of the pictures."""


def test_pooled_cnn_fits_itself_to_the_size_of_the_pictures() -> None:
    for side, widths in STAGES.items():
        network = on_meta("pooled_cnn", 7, image_size=side)
        assert (
            tuple(m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)) == widths
        )
        last = network.features(torch.empty(2, 3, side, side, device="meta")).shape[2:]
        assert last[0] == last[1] == side if side < 6 else 6 <= last[0] == last[1] <= 11
        assert network(torch.empty(2, 3, 2 * side, 2 * side + 3, device="meta")).shape == (2, 7)


def test_pooled_cnn_is_a_chain_of_what_it_says() -> None:
    torch.manual_seed(0)
    network, images = create("pooled_cnn", 5, image_size=48).eval(), torch.randn(2, 3, 48, 48)
    weights, x = network.state_dict(), images
    for number in range(4):
        # Half of the scales are negative, so that it shows whether batch norm comes before pooling
        # or after it.
        scales = weights[f"features.{number}.2.weight"]
        scales[::2] *= -1  # of the network itself
        x = nn.functional.conv2d(
            x, weights[f"features.{number}.0.weight"], stride=1 + (number == 0), padding=1
        )
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)) if number in (1, 2) else x
        x = (scales[:, None, None] * x / (1 + 1e-5) ** 0.5).relu()  # fresh statistics
    expected = x.mean((2, 3)) @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def test_whiten_sets_the_first_layer_by_pictures_and_leaves_other_networks_as_they_are() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(64, 3, 32, 32)
    network = Normalized(create("airbench_small", 5), [0.4, 0.5, 0.6], [0.2, 0.3, 0.1])
    whiten(network, pictures)
    with torch.no_grad():
        whitened = network.module.whitening((pictures - network.mean) / network.std)
    covariance = torch.cov(whitened.double().movedim(1, 0).flatten(1)[:12])
    torch.testing.assert_close(covariance, torch.eye(12).double(), rtol=0, atol=0.05)
    assert not network.module.whitening.weight.requires_grad
    other = Normalized(create("small_cnn", 5), [0.5] * 3, [0.2] * 3)
    before = copy.deepcopy(other.state_dict())
    whiten(other, pictures)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(MetaplError, match="covariance"):
        network.module.whiten(torch.eye(4))


def test_what_a_network_does_not_have_is_refused() -> None:
    for name, fields, word in (
        ("resnet50", {"stochastic_depth": 0.5}, "efficientnet_b0"),
        ("vit_b_16", {"stochastic_depth": 0.2}, "stochastic_depth"),
        ("small_cnn", {"dropout": 1.0}, "dropout"),
        ("efficientnet_b0", {"stochastic_depth": -0.1}, "stochastic_depth"),
        ("small_cnn", {"num_classes": 0}, "num_classes"),
        ("resnet18", {"in_channels": 0}, "in_channels"),
        ("vit_b_16", {"image_size": 100}, "patch"),
        ("pooled_cnn", {"image_size": 0}, "image_size"),
        ("resnet_50", {}, "resnet50"),
        ("timm:", {}, "timm:"),
    ):
        with pytest.raises(MetaplError, match=word):
            create(name, **{"num_classes": 10, **fields})


DEEP = [("timm:vit_tiny_patch16_224", 32), ("resnet18", 32), ("efficientnet_b0_svhn", 16)]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("airbench_small", 16),
        ("pooled_cnn", 16),
        ("small_cnn", 16),
        *(pytest.param(*deep, marks=pytest.mark.long) for deep in DEEP),
    ],
)
def test_feedback_through_a_network_agrees_between_modes(name: str, size: int) -> None:
    torch.manual_seed(0)
    sized = {"image_size": size} if "vit" in name else {}
    teacher = mlp([3 * size * size, 4]).double()
    student = create(name, 4, dropout=0.3, **sized).double()
    labeled, unlabeled = (torch.randn(4, 3, size, size).double() for _ in range(2))
    found = {}
    for mode in ("unrolled", "forward", "difference"):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(parameter_groups(student, 5e-2), lr=0.01, momentum=0.9)
        given = {
            "outer": (labeled, torch.arange(4)),
            "inner": unlabeled,
            "inner_optimizer": optimizer,
        }
        found[mode] = hypergradient(teacher, student, mode=mode, **given).feedback
    assert found["unrolled"].norm() > 1e-6
    torch.testing.assert_close(found["forward"], found["unrolled"], rtol=1e-7, atol=1e-9)
    near = (found["difference"] - found["forward"]).norm() / found["forward"].norm()
    assert near < 1e-3  # a ReLU may pass its kink within the difference


def test_timm_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    network = create(
        "timm:resnet10t", 10, dropout=0.3, stochastic_depth=0.1, in_channels=1, image_size=32
    )
    assert network.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert network.drop_rate == 0.3
    for name, word in (("resnet5", "resnet50"), ("vgg11", "stochastic_depth")):
        with torch.device("meta"), pytest.raises(MetaplError, match=word):
            create(f"timm:{name}", 10, stochastic_depth=0.1)
    save_file(
        timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "w.safetensors"
    )
    loaded = create("timm:resnet10t", 10, weights=tmp_path / "w.safetensors")
    assert loaded.get_classifier().weight.shape[0] == 10
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MetaplError, match="pip install"):
        create("timm:resnet18", 10)


def test_normalized_takes_pictures_as_they_are() -> None:
    inner, mean, std = create("small_cnn", 3).double(), [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    network, images = Normalized(inner, mean, std).double(), torch.rand(4, 3, 8, 8).double()
    torch.testing.assert_close(network(images), inner((images - network.mean) / network.std))
    assert network.mean.flatten().tolist() == pytest.approx(mean)
    # As a sharded network does that gathers its weights in bfloat16: the mean and std stay in
    # float32.
    expected = network(images).float()
    short = Normalized(copy.deepcopy(inner).bfloat16(), mean, std)
    found = short(images.bfloat16())
    assert (found.dtype, short.mean.dtype) == (torch.bfloat16, torch.float32)
    assert torch.allclose(found.float(), expected, atol=0.1)
    both = Normalized(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), mean, std, mirrored=True)
    with torch.no_grad():
        x = images.float()
        one_view = both(x)
        other_view = both(x.flip(3))
        torch.testing.assert_close(both.eval()(x), (one_view + other_view) / 2)
    with pytest.raises(MetaplError, match="uint8"):
        network((images * 255).to(torch.uint8))
    for wrong in (
        ([], []),
        ([0.5], [0.2, 0.2]),
        ([0.5], [0.0]),
        ([float("nan")], [1.0]),
        ([0.5], [float("inf")]),
    ):
        with pytest.raises(MetaplError, match="channel"):
            Normalized(nn.Identity(), *wrong)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "small_cnn"])
def test_decay_spares_norms_and_biases_but_where_it_is_on_everything(name: str) -> None:
    network = nn.Sequential(on_meta(name), nn.LayerNorm([3, 4]))  # a norm of several dimensions
    groups = parameter_groups(network, 0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert set(decay) == {id(p) for p in network.parameters()}
    for path, module in network.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            spared = "Norm" in type(module).__name__ or "bias" in leaf
            assert decay[id(p)] == (0.0 if spared else 0.1), (path, leaf)
    (everything,) = parameter_groups(network, 0.0)
    assert (everything["weight_decay"], len(everything["params"])) == (0.0, len(decay))
    with pytest.raises(MetaplError, match="weight_decay"):
        parameter_groups(network, -1.0)


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
def test_weights_come_from_a_file_of_a_training_program(
    source: nn.Module, prefix: str, tmp_path: Path
) -> None:
    state = whole(source, prefix)
    files = [store(state, tmp_path / f"w{suffix}") for suffix in (".pt", ".pth", ".safetensors")]
    files += [
        store({key: state, "epoch": 3}, tmp_path / f"{key}.pt") for key in ("state_dict", "model")
    ]
    for file in files:
        loaded = create("small_cnn", 5, weights=file).state_dict()
        assert all(torch.equal(t, loaded[key]) for key, t in source.state_dict().items())
        assert len(read_weights(file)["head.bias"]) == 5


def test_a_head_that_is_not_there_stays_fresh_and_half_precision_is_widened(
    source: Any, tmp_path: Path
) -> None:
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
    half = {
        key: t.half() for key, t in whole(source).items() if not key.endswith("num_batches_tracked")
    }
    network = create("small_cnn", 5, weights=store(half, tmp_path / "half.pt"))
    assert network.head.weight.dtype == torch.float32
    torch.testing.assert_close(network.head.weight, source.head.weight, atol=1e-3, rtol=1e-3)


class RunsCode:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def test_damaged_and_foreign_weights_are_refused_and_run_no_code(
    source: nn.Module, tmp_path: Path
) -> None:
    good, network = whole(source), create("small_cnn", 5)
    objects: dict[str, tuple[Any, str]] = {
        "module": (nn.Linear(2, 2), "read"),
        "code": (RunsCode(tmp_path / "ran"), "read"),
        "list": ([torch.zeros(2)], "list"),
        "numbers": ({"lr": 0.1}, "read"),
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
        for number, part in enumerate(
            (b"", content[: len(content) // 2], b"\x89PNG\r\n\x1a\n" + bytes(200), b"text")
        ):
            (tmp_path / f"{number}{suffix}").write_bytes(part)
            cases.append((tmp_path / f"{number}{suffix}", "read"))
    before = whole(network)
    for file, word in cases:
        with pytest.raises(MetaplError, match=word):
            load_weights(network, file, heads=["head"])
        assert all(torch.equal(t, before[key]) for key, t in network.state_dict().items())
    assert not (tmp_path / "ran").exists()


FILE, URL = "resnet18-f37072fd.pth", ResNet18_Weights.DEFAULT.url


def test_imagenet_weights_are_downloaded_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for fault in (URLError("no route to host"), RuntimeError("invalid hash value")):
        where = "urlopen" if isinstance(fault, URLError) else "load_state_dict_from_url"
        monkeypatch.setattr(torch.hub, where, Mock(side_effect=fault))
        # What to download and how to give it.
        with pytest.raises(MetaplError, match=FILE) as caught:
            fetch_imagenet_weights("resnet18")
        assert URL in str(caught.value)
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(url: str, folder: str, **options: Any) -> None:
        asked.append((url, options))
        (Path(folder) / FILE).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert [fetch_imagenet_weights("resnet18") for _ in range(2)] == [
        tmp_path / "checkpoints" / FILE
    ] * 2
    assert asked == [(URL, {"check_hash": True, "weights_only": True})]
    for name in ("pooled_cnn", "timm:resnet18", "resnet_18"):
        with pytest.raises(MetaplError, match="resnet18"):
            fetch_imagenet_weights(name)
