"""Damaged and attacked pictures, against the formulas and in closed form.

And examples/robustness.py on ImageNet-A, -C, -P and ReaL in the forms of their files, of weights
and of runs.
"""

import contextlib
import io
import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import noisy_student_imagenet
import numpy as np
import picture_sets
import pytest
import robustness
import torch
from command import result
from PIL import Image
from robustness import (
    ALEXNET,
    FLIPS_OF_ALEXNET,
    Subject,
    flip_probability,
    imagenet_a,
    imagenet_c,
    imagenet_p,
)
from safetensors.torch import load_file, save_file
from scipy.ndimage import convolve, gaussian_filter, map_coordinates
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from metapl import robustness as kinds
from metapl.apps import backbone
from metapl.errors import MetaplError
from metapl.metrics import evaluate_logits, predict_logits
from metapl.networks.architectures import Architecture
from metapl.networks.exports import WEIGHTS, export
from metapl.networks.tuned import Normalized
from metapl.pictures import FileImages
from metapl.robustness import CORRUPTIONS, SEVERITIES, attacked, corrupted, measure


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    picture = Image.fromarray(load_sample_image("china.jpg")).resize((96, 64))
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255


def damaged(name: str, picture: kinds.Picture, level: int) -> kinds.Picture:
    """Damage a picture (H, W, C), neither clipped nor rounded."""
    damage, constants = CORRUPTIONS[name]
    return damage(picture, np.random.default_rng(0), *constants[level])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_damage_is_a_function_of_seed_and_number_and_grows_with_severity(
    photograph: Tensor, name: str
) -> None:
    # At 64 pixels the least blur is of a disk of 0.86 pixels; below 45 it would be one pixel.
    two, distances = photograph.repeat(2, 1, 1, 1), []
    for severity in SEVERITIES:
        damaged = corrupted(two, name, severity, seed=3, first=5)
        assert (damaged.shape, damaged.dtype) == (two.shape, two.dtype)
        assert 0 <= damaged.min() <= damaged.max() <= 1
        # As if it were saved.
        assert torch.allclose(damaged * 255, (damaged * 255).round(), atol=1e-4)
        distances.append(float((damaged - two).abs().mean()))
    assert torch.equal(corrupted(two[1:], name, severity, seed=3, first=6), damaged[1:])
    assert corrupted(two[:, :1], name, 2).shape == (2, 1, 64, 96)
    if name in ("elastic_transform", "glass_blur"):
        return  # of which the paper's severities change more than one number, in both directions
    if name == "fog":  # the same amount at 3 and 4, and the cloud is another
        distances = [distances[0], distances[2], distances[4]]
    slack = 0.04 if name in ("snow", "frost") else 1e-9
    assert all(b > a - slack for a, b in itertools.pairwise([0, *distances])), distances


def test_noise_has_the_moments_of_its_formula() -> None:
    grey = torch.full((1, 3, 100, 100), 0.5)
    for severity, std in zip(SEVERITIES, (0.08, 0.12, 0.18, 0.26, 0.38), strict=True):
        clipped = (
            torch.randn(10**6, generator=torch.Generator().manual_seed(0))
            .mul(std)
            .add(0.5)
            .clamp(0, 1)
            .std()
        )
        assert float(corrupted(grey, "gaussian_noise", severity).std()) == pytest.approx(
            float(clipped), rel=0.03
        )
    for severity, photons in zip(SEVERITIES[:3], (60, 25, 12), strict=True):
        assert float(corrupted(grey, "shot_noise", severity).var()) == pytest.approx(
            0.5 / photons, rel=0.1
        )
    for severity, share in zip(SEVERITIES, (0.03, 0.06, 0.09, 0.17, 0.27), strict=True):
        damaged = corrupted(grey, "impulse_noise", severity)
        assert float((damaged == 0).float().mean()) == pytest.approx(share / 2, abs=0.006)
        assert float((damaged == 1).float().mean()) == pytest.approx(share / 2, abs=0.006)


def test_brightness_and_contrast_by_their_formulas(photograph: Tensor) -> None:
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    hsv = rgb_to_hsv(photograph[0].permute(1, 2, 0).double().numpy())
    for severity, amount in zip(SEVERITIES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True):
        raised = hsv.copy()
        raised[..., 2] = np.clip(raised[..., 2] + amount, 0, 1)
        expected = torch.from_numpy(hsv_to_rgb(raised)).permute(2, 0, 1)
        assert torch.allclose(
            corrupted(photograph, "brightness", severity)[0].double(), expected, atol=0.503 / 255
        )
    mean = photograph.mean((2, 3), keepdim=True)
    for severity, kept in zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True):
        expected = ((photograph - mean) * kept + mean).clamp(0, 1)
        assert torch.allclose(
            corrupted(photograph, "contrast", severity), expected, atol=0.503 / 255
        )


def test_pixelate_and_jpeg_by_pillow(photograph: Tensor) -> None:
    image = Image.fromarray((photograph[0].permute(1, 2, 0) * 255).round().byte().numpy())
    for severity, share, quality in zip(
        SEVERITIES, (0.6, 0.5, 0.4, 0.3, 0.25), (25, 18, 15, 10, 7), strict=True
    ):
        small = image.resize((int(96 * share), int(64 * share)), Image.Resampling.BOX)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        for name, expected in (
            ("pixelate", small.resize((96, 64), Image.Resampling.NEAREST)),
            ("jpeg_compression", Image.open(file)),
        ):
            found = (
                (corrupted(photograph, name, severity)[0].permute(1, 2, 0) * 255)
                .round()
                .byte()
                .numpy()
            )
            assert np.array_equal(found, np.asarray(expected))


def test_blur_of_a_point_is_its_kernel() -> None:
    point = np.zeros((225, 225, 1))
    point[112, 112] = 1
    disk = damaged("defocus_blur", point, 0)[..., 0]
    rows, columns = np.mgrid[:225, :225] - 112
    radius = np.hypot(rows, columns)
    scale = 225 / 224
    assert disk.sum() == pytest.approx(1)
    assert disk[radius <= 2 * scale].min() > 0.9 / (np.pi * 3**2)
    assert disk[radius > 4.5].max() < 1e-12
    line = kinds._along(point, 10, 3, 0.0)[..., 0]
    assert line.sum() == pytest.approx(1)
    assert set(np.nonzero(line)[0]) == {112}
    weights = np.exp(-(np.arange(21) ** 2) / 18)
    assert np.allclose(line[112, 112:133], weights / weights.sum())
    kernel = kinds._disk(3 * 30 / 224, 0.1)[..., 0]
    picture = np.random.default_rng(0).random((30, 30, 1))
    blurred = damaged("defocus_blur", picture, 0)[..., 0]
    assert np.allclose(blurred, convolve(picture[..., 0], kernel, mode="mirror"))


def test_the_wobble_of_fog_falls_by_the_square_of_its_decay() -> None:
    """ImageNet-C draws a wobble within w times ±w, and w falls by the decay from scale to scale."""
    for level, decay in enumerate((2, 2, 1.7, 1.5, 1.4)):
        cloud, wobbles = damaged("fog", np.full((512, 512, 1), 0.5), level)[..., 0], []
        for reach in (1, 2):  # each middle of a square was the mean of its corners and a wobble
            corners = cloud[:: 2 * reach, :: 2 * reach]
            means = (corners[:-1, :-1] + corners[1:, :-1] + corners[:-1, 1:] + corners[1:, 1:]) / 4
            wobbles.append(np.std(cloud[reach :: 2 * reach, reach :: 2 * reach][:-1, :-1] - means))
        assert wobbles[1] / wobbles[0] == pytest.approx(decay**2, rel=0.03)


@pytest.mark.parametrize("level", [0, 2])
def test_the_elastic_transform_has_the_published_lengths(level: int) -> None:
    """Of 224 pixels: amounts, widths and moves of corners are 244 times those of the paper.

    3 widths of a blur.
    """
    amount, sigma, affine = (
        244 * share for share in ((2, 0.7, 0.1), (), (0.05, 0.01, 0.02))[level]
    )
    picture, drawn = np.random.default_rng(1).random((224, 224, 1)), np.random.default_rng(0)
    corners = (
        np.array([[186, 186], [186, 38], [38, 38]]) + np.array([[2, 2], [2, -2], [-2, -2]]) / 3
    )
    moved = corners + drawn.uniform(-affine, affine, size=(3, 2))
    field = [
        amount
        * gaussian_filter(drawn.uniform(-1, 1, (224, 224)), sigma, mode="reflect", truncate=3)
        for _ in range(2)
    ]
    rows, columns = np.mgrid[:224, :224] + np.array(field)
    matrix = np.linalg.solve(np.c_[moved, np.ones(3)], corners).T
    places = np.tensordot(matrix, np.stack([rows, columns, np.ones_like(rows)]), axes=1)
    expected = map_coordinates(picture[..., 0], places, order=1, mode="reflect")
    found = damaged("elastic_transform", picture, level)
    assert np.allclose(found[..., 0], expected)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
@pytest.mark.parametrize("eps", [0.0, 8.0, 40.0])
def test_an_attack_on_a_linear_classifier_in_closed_form(attack: Any, eps: float) -> None:
    """The worst case within ε is x − ε y sign(w), as long as no value leaves [0, 1].

    Its margin falls by ε‖w‖₁.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(48, generator=generator)
    x = 0.4 + 0.2 * torch.rand(200, 3, 4, 4, generator=generator)
    network = nn.Sequential(nn.Dropout(0.9), nn.Flatten(), nn.Linear(48, 2)).eval()
    with torch.no_grad():  # two classes, told apart by the sign of ⟨w, x⟩ + b
        network[2].weight.copy_(torch.stack([w, -w]))
        network[2].bias.copy_(torch.tensor([-1.0, 1.0]) * w.sum() / 2)
    margins = x.flatten(1) @ w - w.sum() / 2
    y = (margins < 0).long()
    found = attacked(network, x, y, attack, eps)
    sign = torch.where(y == 0, 1.0, -1.0)[:, None]
    expected = (x.flatten(1) - eps / 255 * sign * w.sign()).clamp(0, 1)
    assert torch.allclose(found.flatten(1), expected, atol=1e-6)
    assert network[2].weight.grad is None
    assert torch.allclose(attacked(network, x[2:3], y[2:3], attack, eps), found[2:3])
    right = measure(network, [(x, y)], corruptions=(), attacks=(attack,), eps=(eps,))
    still = (margins.abs() > eps / 255 * w.abs().sum()).float().mean()
    assert right["attacks"][attack][f"{eps:g}"] == pytest.approx(float(still), abs=0.006)


def test_measured_accuracies_are_those_of_the_pictures_one_by_one() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 8 * 8, 4))
    x, y = torch.rand(7, 3, 8, 8), torch.arange(7) % 4
    found = measure(
        network, [(x[:3], y[:3]), (x[3:], y[3:])], corruptions=("fog", "gaussian_noise")
    )
    assert network.training
    for name in ("fog", "gaussian_noise"):
        for severity in SEVERITIES:
            logits, _ = predict_logits(network, [(corrupted(x, name, severity), y)])
            accuracy = evaluate_logits(logits, y, tuple("abcd")).accuracy
            assert found["corruptions"][name]["accuracy_by_severity"][
                severity - 1
            ] == pytest.approx(accuracy)


def test_wrong_kinds_severities_pictures_and_attacks_are_refused() -> None:
    x, y, network = (
        torch.rand(1, 3, 8, 8),
        torch.tensor([0]),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 2)),
    )
    for given in ((x, "rain", 1), (x, "snow", 0), (x[0], "snow", 1), (x.byte(), "snow", 1)):
        with pytest.raises(MetaplError, match="expected"):
            corrupted(*given)
    for attack, eps in (("PGD", 1.0), ("pgd", -1.0)):
        with pytest.raises(MetaplError, match="expected"):
            attacked(network, x, y, attack, eps)  # type: ignore[arg-type]
    for batches, word in (([(x.flatten(1), y)], "inputs"), ([], "no pictures")):
        with pytest.raises(MetaplError, match=word):
            measure(network, batches)


IMAGENET_A = [*map(int, robustness.IMAGENET_A.split())]

WNIDS = tuple(f"n{1000000 + 37 * number:08}" for number in range(1000))
"""Names of ImageNet's form, in the order of the outputs."""

SIDE = 16


def picture(seed: int) -> Image.Image:
    """Return a picture that no other seed gives."""
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    )


def save(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(file, "PNG")


def write_a(root: Path, outputs: Sequence[int]) -> Path:
    """Write ImageNet-A: 200 class folders with a picture each, and the README released with it."""
    for number, output in enumerate(outputs):
        save(root / WNIDS[output] / f"0.{number:06}_bee _ bee_0.9.jpg", number)
    (root / "README.txt").write_text("ImageNet-A\n")
    return root


@pytest.fixture
def subject() -> Subject:
    """Return a network of a thousand outputs in training mode, in which it answers otherwise."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * SIDE * SIDE, 1000))
    return Subject(network, SIDE, WNIDS, 1000)


def logits(subject: Subject, seeds: list[int]) -> Tensor:
    arrays = np.stack([np.asarray(picture(seed)) for seed in seeds])
    with torch.no_grad():
        return subject.network.eval()(torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255)


@pytest.mark.docs
def test_imagenet_a_is_restricted_to_its_200_outputs(subject: Subject, tmp_path: Path) -> None:
    assert (len(IMAGENET_A), sorted(set(IMAGENET_A))) == (200, IMAGENET_A)
    root = write_a(tmp_path / "imagenet-a", IMAGENET_A)
    # Outputs outside of ImageNet-A must not count, however large they are.
    with torch.no_grad():
        subject.network[2].bias[[k for k in range(1000) if k not in IMAGENET_A]] += 100
    expected = evaluate_logits(logits(subject, list(range(200)))[:, IMAGENET_A], torch.arange(200))
    # With names in another order, the same outputs are found by name; without names, by the order
    # of the folders.
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    shuffled = nn.Sequential(*subject.network[:2], nn.Linear(3 * SIDE * SIDE, 1000))
    shuffled[2].load_state_dict({k: v[order] for k, v in subject.network[2].state_dict().items()})
    named = replace(subject, network=shuffled, classes=tuple(WNIDS[k] for k in order.tolist()))
    for known in (subject, replace(subject, classes=None), named):
        found = imagenet_a(known, root)
        assert (found["n"], found["accuracy"], found["top5"]) == (
            200,
            expected.accuracy,
            expected.top5,
        )
    assert expected.top5 is not None
    # Chance is 0.025, and a fault in the mapping would give 0 as often as not.
    assert 0 < expected.top5 < 0.2
    # Which would shift the outputs of others, where folders go by their number.
    (root / "zzz").mkdir()
    with pytest.raises(MetaplError, match="without a picture: zzz"):
        imagenet_a(subject, root)
    few = write_a(tmp_path / "few", IMAGENET_A[:3])
    assert imagenet_a(subject, few)["n"] == 3  # names say which they are
    for other in (
        replace(subject, classes=None),
        replace(subject, classes=("cat", "dog"), outputs=2),
    ):
        with pytest.raises(MetaplError, match="expected folders called as its classes, or all 200"):
            imagenet_a(other, few)


@pytest.mark.docs
def test_imagenet_c_by_corruption_and_severity(subject: Subject, tmp_path: Path) -> None:
    """In the folders of its archives."""
    outputs = [3, 5]
    archives = ["noise"] * 3 + ["blur"] * 4 + ["weather"] * 4 + ["digital"] * 4
    for (kind, name), severity, output in itertools.product(
        enumerate(CORRUPTIONS), range(1, 6), outputs
    ):
        place = tmp_path / archives[kind] / name / str(severity) / WNIDS[output]
        save(place / f"ILSVRC2012_val_{output + 1:08}.JPEG", 100 * kind + 10 * severity + output)
    # A network that is right at some severities of some corruptions, and wrong at the others.
    with torch.no_grad():
        subject.network[2].weight.mul_(3)
        subject.network[2].bias[outputs] += 3
    found = imagenet_c(subject.on_crops(None), tmp_path)
    shares = {name: kind["accuracy_by_severity"] for name, kind in found["corruptions"].items()}
    for kind, name in enumerate(CORRUPTIONS):
        for severity in range(1, 6):
            seeds = [100 * kind + 10 * severity + output for output in outputs]
            right = logits(subject, seeds).argmax(1) == torch.tensor(outputs)
            assert shares[name][severity - 1] == float(right.float().mean())
    by_hand = [np.mean([1 - a for a in shares[n]]) / ALEXNET[n] for n in CORRUPTIONS]
    assert found["mean_corruption_error"] == pytest.approx(100 * np.mean(by_hand))
    assert 0.05 < found["mean_corrupted_accuracy"] < 0.95
    assert sum(ALEXNET.values()) / 15 == pytest.approx(0.789, abs=5e-4)
    shutil.rmtree(tmp_path / "noise")
    found = imagenet_c(subject.on_crops(None), tmp_path)
    assert found["mean_corruption_error"] is None
    # A share of the sides is for photographs: these were released as crops.
    assert imagenet_c(replace(subject, center=0.5).on_crops(None), tmp_path) == found


@pytest.mark.docs
def test_flips_by_hand_and_the_mean_rate_of_a_published_network() -> None:
    """Noise is compared with the clean first frame, all else with the frame before.

    ResNeXt-101 32x48d WSL has 27.8.
    """
    sequences = [[1, 1, 2, 2, 1], [4, 4, 4, 4, 4], [1, 2, 3, 4, 5]]
    assert flip_probability(sequences, "rotate") == pytest.approx((2 / 4 + 0 + 1) / 3)
    assert flip_probability([[1, 2, 2, 2]], "rotate") == pytest.approx(1 / 3)
    assert flip_probability([[1, 2, 2, 2]], "shot_noise") == 1
    # A sequence counts once, however long it is.
    assert flip_probability([[1, 1], [1, 2, 1, 2, 1]], "tilt") == 0.5
    with pytest.raises(MetaplError, match="expected"):
        flip_probability([[1]], "tilt")
    flips = (0.0585, 0.0699, 0.0284, 0.0232, 0.0367, 0.0154, 0.0242, 0.0347, 0.0215, 0.0462)
    rate = robustness.relative_to(FLIPS_OF_ALEXNET, dict(zip(FLIPS_OF_ALEXNET, flips, strict=True)))
    assert rate == pytest.approx(27.8, abs=0.05)
    assert robustness.relative_to(FLIPS_OF_ALEXNET, {"snow": 0.1}) is None


@pytest.mark.docs
def test_imagenet_p_in_videos_and_in_folders_of_frames(subject: Subject, tmp_path: Path) -> None:
    """Frames are called as those its videos were made from.

    A video is H.264 without loss, a picture a second.
    """
    av, outputs, frames = pytest.importorskip("av"), (0, 9), range(4)
    with torch.no_grad():  # two outputs that take turns, so that some frames flip
        subject.network[2].bias[list(outputs)] += 2
    expected, right = {}, 0
    for kind, name in enumerate(FLIPS_OF_ALEXNET):
        predictions = []
        for output in outputs:
            seeds = [1000 * kind + 10 * output + frame for frame in frames]
            place = tmp_path / name / WNIDS[output] / f"ILSVRC2012_val_{output + 1:08}"
            for seed, frame in zip(seeds, frames, strict=True):
                save(place / f"img{frame + 8}.png", seed)
            predictions.append(logits(subject, seeds).argmax(1).tolist())
            right += predictions[-1].count(output)
        expected[name] = flip_probability(predictions, name)
    file = place.with_suffix(".mp4")  # the last of them
    shutil.rmtree(place)
    with av.open(str(file), "w") as video:
        stream = video.add_stream("libx264rgb", rate=Fraction(1))
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "rgb24"
        stream.options = {"crf": "0"}
        for seed in seeds:
            video.mux(stream.encode(av.VideoFrame.from_image(picture(seed))))
        video.mux(stream.encode())
    found = imagenet_p(subject.on_crops(None), tmp_path)
    assert found["flip_probability"] == pytest.approx(expected)
    assert (found["sequences"], found["frames"], found["accuracy"]) == (
        20,
        80,
        pytest.approx(right / 80),
    )
    assert len(set(expected.values())) > 2
    assert found["mean_flip_rate"] == pytest.approx(
        robustness.relative_to(FLIPS_OF_ALEXNET, expected)
    )
    file.write_bytes(b"no video")
    with pytest.raises(MetaplError, match="decoded"):
        imagenet_p(subject, tmp_path)
    for folder in (tmp_path / "snow").iterdir():
        folder.rename(tmp_path / folder.name)
    with pytest.raises(MetaplError, match="snow has no sequence"):
        imagenet_p(subject, tmp_path)


def printed(patch: pytest.MonkeyPatch, *arguments: object) -> dict[str, Any]:
    patch.setattr(sys, "argv", ["robustness.py", *map(str, arguments)])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        robustness.main()
    return dict(json.loads(out.getvalue()))


@pytest.mark.docs
@pytest.mark.usefixtures("blank_programs")
def test_a_run_and_weights_by_what_the_export_says(
    colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network of ImageNet's thousand classes, on ReaL too."""
    architecture = Architecture(name="small_cnn", num_classes=1000, image_size=SIDE)
    torch.manual_seed(0)
    network = Normalized(architecture.create(), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]).eval()
    told: Any = {
        "shape": (3, SIDE, SIDE),
        "classes": list(WNIDS),
        "center": 0.875,
        "architecture": architecture,
    }
    export(network, tmp_path / "out", **told)
    file = tmp_path / "out" / WEIGHTS
    files = [tmp_path / "val" / WNIDS[k] / f"ILSVRC2012_val_{k + 1:08}.JPEG" for k in range(4)]
    for number, path in enumerate(files):
        save(path, number)
    taken = robustness.of_weights(file, None)
    assert taken.center == 0.875
    with torch.no_grad():
        guesses = network(torch.stack([*map(taken.read, files)])).argmax(1).tolist()
    (tmp_path / "real.json").write_text(
        json.dumps([[], [5, guesses[1]], [guesses[2]], [999 - guesses[3]]])
    )
    a = write_a(tmp_path / "a", IMAGENET_A)
    flags = ("--test", tmp_path / "val", "--real", tmp_path / "real.json", "--imagenet-a", a)
    found = printed(monkeypatch, file, *flags)
    assert found["real"] == {"accuracy": pytest.approx(2 / 3), "n": 3, "without_label": 1}
    assert found["accuracy"] == pytest.approx(
        np.mean([guess == k for k, guess in enumerate(guesses)])
    )
    assert found["imagenet_a"]["n"] == 200
    found = printed(monkeypatch, colors / "run", "--test", colors / "test")
    assert found["accuracy"] == result(colors / "run")["test_accuracy"]


@pytest.mark.docs
@pytest.mark.parametrize(("name", "side"), [("resnet18", 224), ("timm:resnet10t", 176)])
def test_weights_by_the_networks_name(name: str, side: int, tmp_path: Path) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    network = Architecture(name=name, num_classes=7).create().eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pt")
    taken = robustness.of_weights(tmp_path / "weights.pt", name)
    assert (taken.side, taken.outputs, taken.center) == (side, 7, 0.875)
    x = torch.rand(2, 3, 32, 32)
    mean, std = (
        torch.tensor(of).view(3, 1, 1) for of in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        torch.testing.assert_close(taken.network(x), network((x - mean) / std))


@pytest.mark.docs
def test_a_side_that_the_network_does_not_take_is_refused(subject: Subject) -> None:
    assert subject.on_crops(None).side == SIDE
    with pytest.raises(MetaplError, match="--size 24: the network does not take such pictures"):
        subject.on_crops(24)


@pytest.mark.docs
def test_a_round_of_noisy_student_is_evaluated_by_its_own_mean_and_std(tmp_path: Path) -> None:
    """What picture_sets saves, and the bare tensors of it under a name."""
    c = noisy_student_imagenet.ROWS["b0"].settings()
    spec = noisy_student_imagenet.networks_of(c)[0]
    spec = replace(spec, image_size=64, stochastic_depth=0.0, channels_last=False, device="cpu")
    torch.manual_seed(0)
    network = picture_sets.build_network(spec, 3, 0.0, "resnet18").eval()
    test: Any = FileImages(["a.png"], size=(64, 64), center=0.875)
    carded, bare = tmp_path / "round-0.safetensors", tmp_path / "bare.safetensors"
    picture_sets.save_weights(
        network.state_dict(), carded, "resnet18", size=64, test=test, classes=["a", "b", "c"]
    )
    save_file(load_file(carded), bare)
    x = torch.rand(2, 3, 64, 64)
    for file, name in ((carded, "resnet18"), (carded, None), (bare, "resnet18")):
        taken = robustness.of_weights(file, name)
        assert isinstance(taken.network, Normalized)
        assert taken.network.mean.flatten().tolist() == [0.5] * 3
        with torch.no_grad():
            torch.testing.assert_close(taken.network(x), network(x), rtol=0, atol=1e-6)
    assert (taken.classes, taken.side) == (None, 224)
    taken = robustness.of_weights(carded, None)
    assert (taken.classes, taken.side, taken.center) == (["a", "b", "c"], 64, 0.875)
    with pytest.raises(MetaplError, match="is of resnet18; leave out --network resnet34"):
        robustness.of_weights(carded, "resnet34")
    assert backbone.find(str(bare), "resnet18").mean == (0.5, 0.5, 0.5)
    assert backbone.find(str(carded), "resnet18").std == (0.25, 0.25, 0.25)


@pytest.mark.docs
def test_one_command_measures_two_networks_on_every_set_and_attacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a side of their own for ImageNet-C and -P; the figures are those of each alone."""
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = Architecture(name="small_cnn", num_classes=1000).create()
        files.append(tmp_path / f"{seed}.safetensors")
        test: Any = FileImages(["a.png"], size=(SIDE, SIDE))
        state = Normalized(network, picture_sets.MEAN, picture_sets.STD).state_dict()
        picture_sets.save_weights(
            state, files[-1], "small_cnn", size=SIDE, test=test, classes=list(WNIDS)
        )
    a = write_a(tmp_path / "a", IMAGENET_A)
    for k in range(2):
        save(tmp_path / "val" / WNIDS[k] / f"{k}.JPEG", k)
        for severity in SEVERITIES:
            save(tmp_path / "c" / "fog" / f"{severity}" / WNIDS[k] / "0.JPEG", 10 * severity + k)
        for frame in range(3):
            save(tmp_path / "p" / "snow" / WNIDS[k] / "0" / f"{frame}.JPEG", 100 + frame + k)
    sets: tuple[object, ...] = ("--imagenet-c", tmp_path / "c", "--imagenet-p", tmp_path / "p")
    sets += ("--size", 24, "--test", tmp_path / "val", "--imagenet-a", a)
    sets += ("--attack", "fgsm", "pgd", "--eps", 2, 16)
    both = printed(monkeypatch, *files, *sets)
    alone = [printed(monkeypatch, file, *sets) for file in files]
    assert both["networks"] == alone
    assert both["figures"]["ImageNet-A top-1"] == [one["imagenet_a"]["accuracy"] for one in alone]
    assert [*both["figures"]] == [
        *("top-1", "top-5", "ImageNet-A top-1", "ImageNet-A top-5", "ImageNet-C top-1"),
        *("ImageNet-C mCE", "ImageNet-P top-1", "ImageNet-P mFR"),
        *("FGSM 2/255", "FGSM 16/255", "PGD 2/255", "PGD 16/255"),
    ]
    for one, file in zip(alone, files, strict=True):
        assert [one[name]["side"] for name in ("imagenet_c", "imagenet_p")] == [24, 24]
        assert one["side"] == SIDE
        subject = robustness.of_weights(file, None)
        assert one["imagenet_c"] == imagenet_c(replace(subject, side=24), tmp_path / "c")
        paths = [tmp_path / "val" / WNIDS[k] / f"{k}.JPEG" for k in range(2)]
        pictures = torch.stack([*map(subject.read, paths)])
        moved = attacked(subject.network, pictures, torch.tensor([0, 1]), "pgd", 16.0)
        with torch.no_grad():
            right = subject.network(moved).argmax(1) == torch.tensor([0, 1])
        assert one["attacks"]["pgd"]["16"] == float(right.float().mean())
    for words, said in (
        (("--size", 24), "--size 24: expected pixels, beside --imagenet-c"),
        (("--attack", "pgd", "--test", a), "--attack was given without --eps"),
        (("--real", a), "--real was given without --test"),
    ):
        with pytest.raises(SystemExit):
            printed(monkeypatch, files[0], *words)
        assert said in capsys.readouterr().err
