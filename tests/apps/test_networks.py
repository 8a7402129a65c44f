"""Networks: shapes, weight counts, noise, and the derivatives that feedback takes through them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import StochasticDepth

from metapl.apps.networks import NAMES, Architecture, create, normalized, parameter_groups
from metapl.apps.networks.architecture import FAMILIES, pooled_cnn
from metapl.errors import MetaplError
from metapl.feedback.hypergradient import hypergradient
from metapl.models import mlp


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ networks by name


KNOWN_COUNTS = {
    "wide_resnet28_2": (10, 1_467_610),
    "wide_resnet28_10": (10, 36_479_194),
    "small_cnn": (10, 80_266),
    "pooled_cnn": (10, 94_762),
    "resnet18": (1000, 11_689_512),
    "resnet34": (1000, 21_797_672),
    "resnet50": (1000, 25_557_032),
    "resnet101": (1000, 44_549_160),
    "resnet152": (1000, 60_192_808),
    "efficientnet_b0": (1000, 5_288_548),
    "efficientnet_b0_svhn": (1000, 5_288_548),
    "efficientnet_b1": (1000, 7_794_184),
    "efficientnet_b2": (1000, 9_109_994),
    "efficientnet_b3": (1000, 12_233_232),
    "efficientnet_b4": (1000, 19_341_616),
    "efficientnet_b5": (1000, 30_389_784),
    "efficientnet_b6": (1000, 43_040_704),
    "efficientnet_b7": (1000, 66_347_960),
    "vit_b_16": (1000, 86_567_656),
    "vit_b_32": (1000, 88_224_232),
    "vit_l_16": (1000, 304_326_632),
    "vit_l_32": (1000, 306_535_400),
    "vit_h_14": (1000, 632_045_800),
    "vit_1b_14": (1000, 1_212_386_280),
    "efficientnet_b6_wide": (1000, 316_649_180),
    "efficientnet_l2": (1000, 480_309_308),
}


def on_meta(name: str, num_classes: int, **fields: Any) -> nn.Module:
    with torch.device("meta"):
        return create(name, num_classes, **fields)


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_the_networks_by_name(name: str) -> None:
    classes, weights = KNOWN_COUNTS[name]
    assert count(on_meta(name, classes)) == weights


ONE_OF_EACH = [
    *("pooled_cnn", "small_cnn", "wide_resnet28_2", "resnet18", "efficientnet_b1", "efficientnet_b0_svhn", "vit_h_14"),
]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_code_of_a_network_builds_it(name: str) -> None:
    import torchvision

    for fields in ({}, {"in_channels": 1, "image_size": 112}):
        architecture = Architecture(name=name, num_classes=5, **fields)
        scope: dict[str, Any] = {"torch": torch, "torchvision": torchvision}
        if architecture.library == "metapl":
            import metapl.models

            scope["metapl"] = metapl
        with torch.device("meta"):
            exec(architecture.code(), scope)
            made = architecture.create()
        assert architecture.library == "metapl" or "metapl" not in architecture.code()
        assert {k: t.shape for k, t in scope["model"].state_dict().items()} == {
            k: t.shape for k, t in made.state_dict().items()
        }
        strides = [[m.stride for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (scope["model"], made)]
        assert strides[0] == strides[1]


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("efficientnet_b0", 32, (320, 1, 1)),
        ("efficientnet_b0_svhn", 32, (320, 4, 4)),
        ("efficientnet_b0_svhn", 64, (320, 8, 8)),
    ],
)
def test_total_stride(name: str, size: int, expected: tuple[int, ...]) -> None:
    model = on_meta(name, 10)
    blocks = model.get_submodule("features")[:-1]  # type: ignore[index]
    assert blocks(torch.empty(2, 3, size, size, device="meta")).shape[1:] == expected


@pytest.mark.parametrize(
    ("name", "blocks"), [("efficientnet_b0", 16), ("efficientnet_b0_svhn", 16), ("efficientnet_b7", 55)]
)
def test_stochastic_depth_is_linear_up_to_the_last_block(name: str, blocks: int) -> None:
    model = on_meta(name, 10, stochastic_depth=0.2)
    found = [m.p for m in model.modules() if isinstance(m, StochasticDepth)]
    assert found == pytest.approx([0.2 * number / blocks for number in range(1, blocks + 1)])
    assert not any(m.p for m in on_meta(name, 10).modules() if isinstance(m, StochasticDepth))


@pytest.mark.parametrize("classes", [3, 1000, 4000])
def test_the_head_of_an_efficientnet_is_small_for_few_classes_too(classes: int) -> None:
    torch.manual_seed(0)
    weight = create("efficientnet_b0", classes).get_parameter("classifier.1.weight")
    assert weight.abs().max().item() == pytest.approx(max(1000, classes) ** -0.5, rel=0.01)


def test_dropout_stands_where_it_should() -> None:
    def rates(name: str, dropout: float) -> set[float]:
        return {m.p for m in on_meta(name, 10, dropout=dropout).modules() if isinstance(m, nn.Dropout)}

    for name in ONE_OF_EACH:
        if FAMILIES[name].dropout:
            assert rates(name, 0.3) == {0.3}, name
            assert rates(name, 0.0) <= {0.0}, name
    assert on_meta("efficientnet_b3", 10, dropout=0.5).get_submodule("classifier.0").p == 0.5
    assert sum(isinstance(m, nn.Dropout) for m in on_meta("efficientnet_b0", 10).modules()) == 1


def test_noise_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    model = create("efficientnet_b0_svhn", 10, stochastic_depth=0.5)
    images = torch.randn(4, 3, 16, 16)
    model.eval()
    assert torch.equal(model(images), model(images))
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.train()
    assert not torch.equal(model(images), model(images))


def test_grey_pictures() -> None:
    for name in ("pooled_cnn", "small_cnn", "wide_resnet28_2", "resnet18", "efficientnet_b0_svhn"):
        model = create(name, 3, in_channels=1).eval()
        assert model(torch.randn(2, 1, 16, 16)).shape == (2, 3), name
    torch.manual_seed(0)
    stem = create("resnet18", 3, in_channels=4).get_submodule("conv1")
    assert stem.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)


def test_small_cnn_keeps_the_examples_apart() -> None:
    model = create("small_cnn", 3, in_channels=1)
    images = torch.randn(5, 1, 16, 16)
    torch.testing.assert_close(model(images)[:2], model(images[:2]))


STAGES = {
    **dict.fromkeys((1, 8, 11), (128,)),
    **dict.fromkeys((12, 16, 20, 23), (64, 128)),
    **dict.fromkeys((24, 28, 32, 40, 41), (32, 64, 128)),
    **dict.fromkeys((48, 64, 92), (32, 64, 128, 192)),
    **dict.fromkeys((96, 128), (32, 64, 128, 192, 192)),
}
"""Channels of pooled_cnn by the side of the pictures."""


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", STAGES)
def test_pooled_cnn_fits_itself_to_the_size_of_the_pictures(side: int, channels: int) -> None:
    model = on_meta("pooled_cnn", 7, in_channels=channels, image_size=side)
    assert tuple(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)) == STAGES[side]
    images = torch.empty(2, channels, side, side, device="meta")
    last = model.get_submodule("features")(images).shape[2:]
    assert last[0] == last[1] == side if side < 6 else 6 <= last[0] == last[1] <= 11
    assert model(images).shape == (2, 7)
    larger, wide = torch.empty(2, channels, 2 * side, 2 * side + 3, device="meta"), (2, 7)
    assert model(larger).shape == wide


def test_pooled_cnn_is_a_chain_of_what_it_says() -> None:
    torch.manual_seed(0)
    model, images = pooled_cnn(5, dropout=0.4, image_size=48).eval(), torch.randn(2, 3, 48, 48)
    weights, x = model.state_dict(), images
    for number in range(4):
        # Half of the scales are negative, so that it shows whether batch norm comes before pooling or after it.
        scales = weights[f"features.{number}.2.weight"]
        scales[::2] *= -1  # of the model itself
        x = nn.functional.conv2d(x, weights[f"features.{number}.0.weight"], stride=1 + (number == 0), padding=1)
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)) if number in (1, 2) else x
        x = (scales[:, None, None] * x / (1 + 1e-5) ** 0.5).relu()  # fresh statistics
    expected = x.mean((2, 3)) @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    model.get_submodule("dropout").train()
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_classes": 0}, r"num_classes=0: expected a whole number of 1 or more"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"image_size": 0}, "image_size=0"),
        ({"dropout": 1.0}, r"dropout=1\.0: expected a number in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0\.1"),
    ],
)
def test_pooled_cnn_refuses_sizes(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(MetaplError, match=words):
        pooled_cnn(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "resnet50", "stochastic_depth": 0.5}, r"resnet50 has no stochastic_depth.*efficientnet_b0"),
        ({"name": "wide_resnet28_2", "stochastic_depth": 0.2}, r"no stochastic_depth.*efficientnet_b0"),
        ({"name": "vit_b_16", "stochastic_depth": 0.2}, "no stochastic_depth"),
        ({"name": "small_cnn", "dropout": 1.0}, r"dropout=1.0.*\[0, 1\)"),
        ({"name": "efficientnet_b0", "stochastic_depth": -0.1}, "stochastic_depth=-0.1"),
        ({"name": "small_cnn", "num_classes": 0}, "num_classes=0"),
        ({"name": "resnet18", "in_channels": 0}, "in_channels=0"),
        ({"name": "vit_b_16", "image_size": 100}, "image_size=100.*multiple of its patch, 16"),
        ({"name": "resnet18", "image_size": 0}, "image_size=0"),
        ({"name": "resnet_50"}, r"no network 'resnet_50'; did you mean resnet50 .*\? Expected one of resnet50, "),
        ({"name": "wrn28_2"}, "Expected one of wide_resnet28_2, "),
        ({"name": "timm:"}, "no network 'timm:'"),
    ],
)
def test_what_a_network_does_not_have_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(MetaplError, match=words):
        create(**{"num_classes": 10, **fields})


def shortened(name: str) -> nn.Module:
    """A network of the kind, short enough for double precision: every sort of block is still in it."""
    size = {"image_size": 32} if name == "vit_b_16" else {}
    noise = {"dropout": 0.3} if FAMILIES[name].dropout else {}
    noise |= {"stochastic_depth": 0.2} if FAMILIES[name].stochastic_depth else {}
    with torch.device("meta"):
        model = create(name, 4, **noise, **size)
    short = {"resnet50": ("layer1", "layer2", "layer3", "layer4"), "vit_b_16": ("encoder.layers",)}
    for part in short.get(name, ()):
        model.set_submodule(part, model.get_submodule(part)[:1])  # type: ignore[index]
    model = model.to_empty(device="cpu").double()
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            wide = tensor.ndim > 1
            fill = torch.randn_like(tensor) / (tensor[0].numel() ** 0.5) if wide else 1.0 * ("bias" not in key)
            tensor.copy_(fill)  # type: ignore[arg-type]  # a number fills
        else:
            tensor.zero_()
    return model


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("pooled_cnn", 16),
        ("small_cnn", 16),
        *(
            pytest.param(*large, marks=pytest.mark.long)
            for large in (("vit_b_16", 32), ("resnet50", 32), ("efficientnet_b0_svhn", 16))
        ),
    ],
)
def test_feedback_through_a_network_agrees_between_modes(name: str, size: int) -> None:
    torch.manual_seed(0)
    teacher, student = mlp([3 * size * size, 4]).double(), shortened(name)
    labeled = torch.randn(4, 3, size, size).double(), torch.arange(4)
    unlabeled = torch.randn(4, 3, size, size).double()
    found = {}
    for mode in ("unrolled", "forward", "difference"):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(parameter_groups(student, 5e-2), lr=0.01, momentum=0.9)
        given = {"labeled": labeled, "unlabeled": unlabeled, "mode": mode, "inner_optimizer": optimizer}
        found[mode] = hypergradient(teacher, student, **given).feedback
    assert found["unrolled"].norm() > 1e-6
    torch.testing.assert_close(found["forward"], found["unrolled"], rtol=1e-7, atol=1e-9)
    near = (found["difference"] - found["forward"]).norm() / found["forward"].norm()
    assert near < 1e-3  # a ReLU may pass its kink within the difference


# ------------------------------------------------------------------------------------------------------------ timm


def test_timm_absent_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MetaplError, match=r"pip install 'metapl\[timm\]'"):
        create("timm:resnet18", 10)


def test_timm_networks(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = create("timm:resnet10t", 10, dropout=0.3, stochastic_depth=0.1, in_channels=1, image_size=32)
    assert model.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert model.drop_rate == 0.3
    vit = Architecture(name="timm:vit_tiny_patch16_224", num_classes=3, image_size=32)
    assert vit.code() == 'model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)'
    assert Architecture(name="timm:resnet10t", num_classes=3, dropout=0.1, image_size=32).code() == (
        'model = timm.create_model("resnet10t", num_classes=3)'
    )
    with pytest.raises(MetaplError, match=r"no network 'resnet5'.*resnet50"):
        create("timm:resnet5", 10)
    with torch.device("meta"), pytest.raises(MetaplError, match="has no stochastic_depth"):
        create("timm:vgg11", 10, stochastic_depth=0.1)
    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "w.safetensors")
    loaded = create("timm:resnet10t", 10, weights=tmp_path / "w.safetensors")
    assert loaded.get_classifier().weight.shape[0] == 10


# --------------------------------------------------------------------------------------- normalisation, weight decay


def test_normalized_takes_pictures_as_they_are() -> None:
    inner = create("small_cnn", 3)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    model = normalized(inner, mean, std)
    images = torch.rand(2, 3, 8, 8)
    by_hand = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(model(images), inner(by_hand))
    assert {k for k in model.state_dict() if not k.startswith("module.")} == {"mean", "std"}
    assert len(list(model.parameters())) == len(list(inner.parameters()))
    with pytest.raises(MetaplError, match=r"torch.uint8 pictures.*images / 255"):
        model((images * 255).to(torch.uint8))


def test_a_normalized_network_of_bfloat16_weights_takes_bfloat16_pictures() -> None:
    """As a sharded network does that gathers its weights in bfloat16: the mean and std stay in float32."""
    network = normalized(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), [0.5] * 3, [0.25] * 3)
    network.module.bfloat16()
    images = torch.rand(2, 3, 2, 2).bfloat16()
    found = network(images)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), network.float()(images.float()), atol=0.05)


@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_feedback_through_a_normalized_network_is_that_on_normalised_pictures(mode: str) -> None:
    torch.manual_seed(0)
    inner, teacher = create("small_cnn", 3, in_channels=1).double(), mlp([64, 3]).double()
    model = normalized(inner, [0.5], [0.25]).double()
    labeled, unlabeled = torch.rand(3, 1, 8, 8).double(), torch.rand(4, 1, 8, 8).double()
    found = [
        hypergradient(
            teacher,
            student,
            labeled=(of(labeled), torch.arange(3)),
            unlabeled=(unlabeled, of(unlabeled)),  # the teacher's view and the student's
            mode=mode,
            inner_optimizer=torch.optim.SGD(inner.parameters(), lr=0.1),
        ).feedback
        for student, of in ((model, lambda x: x), (inner, lambda x: (x - 0.5) / 0.25))
    ]
    assert found[0].norm() > 0
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    ("mean", "std"), [([], []), ([0.5], [0.2, 0.2]), ([0.5], [0.0]), ([float("nan")], [1.0]), ([0.5], [float("inf")])]
)
def test_normalized_refuses(mean: list[float], std: list[float]) -> None:
    with pytest.raises(MetaplError, match="one finite number per channel"):
        normalized(nn.Identity(), mean, std)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "vit_b_16", "small_cnn"])
def test_decay_spares_norms_and_biases(name: str) -> None:
    model = on_meta(name, 10)
    groups = parameter_groups(model, 0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert set(decay) == {id(p) for p in model.parameters()}
    for path, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            spared = "Norm" in type(module).__name__ or "bias" in leaf
            assert decay[id(p)] == (0.0 if spared else 0.1), (path, leaf)


def test_decay_on_everything_and_on_odd_modules() -> None:
    model = nn.Sequential(nn.LayerNorm([3, 4]), nn.Linear(4, 2))
    assert [len(g["params"]) for g in parameter_groups(model, 0.1)] == [1, 3]
    (everything,) = parameter_groups(model, 0.1, on_norms=True)
    assert everything["weight_decay"] == 0.1
    assert len(everything["params"]) == 4
    (only,) = parameter_groups(nn.LayerNorm(4), 0.1)
    assert only["weight_decay"] == 0.0
    with pytest.raises(MetaplError, match="weight_decay=-1"):
        parameter_groups(model, -1.0)
