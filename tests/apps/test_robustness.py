"""Damaged and attacked pictures: against the formulas, in closed form, and by the command."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import refused, result, said
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter, map_coordinates
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from metapl.apps.evaluation import corruptions as kinds
from metapl.apps.evaluation.attacks import attacked, measure
from metapl.apps.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from metapl.apps.held_out import HeldOut
from metapl.apps.pictures.card import NetworkCard
from metapl.apps.pictures.input import Input
from metapl.apps.run import EndedRun, save
from metapl.errors import MetaplError
from metapl.metrics import evaluate_logits, predict_logits


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    picture = Image.fromarray(load_sample_image("china.jpg")).resize((96, 64))
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255


# ---------------------------------------------------------------------------------------------------------- corruptions


def damaged(name: str, picture: kinds.Picture, level: int) -> kinds.Picture:
    """A picture (H, W, C), neither clipped nor rounded."""
    damage, constants = CORRUPTIONS[name]
    return damage(picture, np.random.default_rng(0), *constants[level])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_damage_is_a_function_of_the_seed_and_the_number_of_a_picture(photograph: Tensor, name: str) -> None:
    # At 64 pixels the least blur is of a disk of 0.86 pixels; below 45 it would be one pixel.
    two = photograph.repeat(2, 1, 1, 1)
    for severity in SEVERITIES:
        damaged = corrupted(two, name, severity, seed=3, first=5)
        assert damaged.shape == two.shape
        assert damaged.dtype == two.dtype
        assert 0 <= damaged.min() <= damaged.max() <= 1
        assert torch.allclose(damaged * 255, (damaged * 255).round(), atol=1e-4)  # as if it were saved
        assert not torch.equal(damaged, two)
    assert torch.equal(corrupted(two[1:], name, severity, seed=3, first=6), damaged[1:])
    grey = corrupted(two[:, :1], name, 2)
    assert grey.shape == (2, 1, 64, 96)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"elastic_transform", "glass_blur"}))
def test_a_greater_severity_damages_more(photograph: Tensor, name: str) -> None:
    """Of these two, the paper's severities change more than one number, in both directions."""
    distances = [float((corrupted(photograph, name, s) - photograph).abs().mean()) for s in SEVERITIES]
    if name == "fog":  # the same amount at 3 and 4, and the cloud is another
        distances = [distances[0], distances[2], distances[4]]
    slack = 0.04 if name in ("snow", "frost") else 1e-9
    assert all(b > a - slack for a, b in itertools.pairwise(distances)), distances


def test_noise_has_the_moments_of_its_formula() -> None:
    grey = torch.full((1, 3, 100, 100), 0.5)
    for severity, std in zip(SEVERITIES, (0.08, 0.12, 0.18, 0.26, 0.38), strict=True):
        clipped = torch.randn(10**6, generator=torch.Generator().manual_seed(0)).mul(std).add(0.5).clamp(0, 1).std()
        assert float(corrupted(grey, "gaussian_noise", severity).std()) == pytest.approx(float(clipped), rel=0.03)
    for severity, photons in zip(SEVERITIES[:3], (60, 25, 12), strict=True):
        assert float(corrupted(grey, "shot_noise", severity).var()) == pytest.approx(0.5 / photons, rel=0.1)
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
        assert torch.allclose(corrupted(photograph, "brightness", severity)[0].double(), expected, atol=0.503 / 255)
    mean = photograph.mean((2, 3), keepdim=True)
    for severity, kept in zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True):
        expected = ((photograph - mean) * kept + mean).clamp(0, 1)
        assert torch.allclose(corrupted(photograph, "contrast", severity), expected, atol=0.503 / 255)


def test_pixelate_and_jpeg_by_pillow(photograph: Tensor) -> None:
    image = Image.fromarray((photograph[0].permute(1, 2, 0) * 255).round().byte().numpy())
    for severity, share, quality in zip(SEVERITIES, (0.6, 0.5, 0.4, 0.3, 0.25), (25, 18, 15, 10, 7), strict=True):
        small = image.resize((int(96 * share), int(64 * share)), Image.Resampling.BOX)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        for name, expected in (
            ("pixelate", small.resize((96, 64), Image.Resampling.NEAREST)),
            ("jpeg_compression", Image.open(file)),
        ):
            found = (corrupted(photograph, name, severity)[0].permute(1, 2, 0) * 255).round().byte().numpy()
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


@pytest.mark.parametrize(("level", "decay"), [*enumerate((2, 2, 1.7, 1.5, 1.4))])
def test_the_wobble_of_fog_falls_by_the_square_of_its_decay(level: int, decay: float) -> None:
    """ImageNet-C draws a wobble within w times ±w, and w falls by the decay from scale to scale."""
    cloud = damaged("fog", np.full((512, 512, 1), 0.5), level)[..., 0]
    wobbles = []
    for reach in (1, 2):  # each middle of a square was the mean of its corners and a wobble
        corners = cloud[:: 2 * reach, :: 2 * reach]
        means = (corners[:-1, :-1] + corners[1:, :-1] + corners[:-1, 1:] + corners[1:, 1:]) / 4
        wobbles.append(np.std(cloud[reach :: 2 * reach, reach :: 2 * reach][:-1, :-1] - means))
    assert wobbles[1] / wobbles[0] == pytest.approx(decay**2, rel=0.03)


def test_a_fractal_is_brought_to_its_range_before_it_is_cut() -> None:
    whole, part = (kinds._fractal((side, side), 1.96, np.random.default_rng(0)) for side in (256, 130))
    assert (whole.min(), whole.max()) == (0, 1)
    assert np.array_equal(part, whole[:130, :130])


@pytest.mark.parametrize("level", [0, 2])
def test_the_elastic_transform_has_the_published_lengths(level: int) -> None:
    """Of 224 pixels: amounts, widths and moves of corners are 244 times those of the paper; 3 widths of a blur."""
    amount, sigma, affine = (244 * share for share in ((2, 0.7, 0.1), (), (0.05, 0.01, 0.02))[level])
    picture, drawn = np.random.default_rng(1).random((224, 224, 1)), np.random.default_rng(0)
    corners = np.array([[186, 186], [186, 38], [38, 38]]) + np.array([[2, 2], [2, -2], [-2, -2]]) / 3
    moved = corners + drawn.uniform(-affine, affine, size=(3, 2))
    field = [
        amount * gaussian_filter(drawn.uniform(-1, 1, (224, 224)), sigma, mode="reflect", truncate=3) for _ in range(2)
    ]
    rows, columns = np.mgrid[:224, :224] + np.array(field)
    matrix = np.linalg.solve(np.c_[moved, np.ones(3)], corners).T
    places = np.tensordot(matrix, np.stack([rows, columns, np.ones_like(rows)]), axes=1)
    expected = map_coordinates(picture[..., 0], places, order=1, mode="reflect")
    found = damaged("elastic_transform", picture, level)
    assert np.allclose(found[..., 0], expected)


# -------------------------------------------------------------------------------------------------------------- attacks


class Line(nn.Module):
    """Two classes, told apart by the sign of ⟨w, x⟩ + b."""

    def __init__(self, w: Tensor, b: float) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), b
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        score = self.dropout(x).flatten(1) @ self.w + self.b
        return torch.stack([score, -score], dim=1)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
@pytest.mark.parametrize("eps", [0.0, 2.0, 8.0, 40.0])
def test_an_attack_on_a_linear_classifier_in_closed_form(attack: str, eps: float) -> None:
    """The worst case within ε is x − ε y sign(w), as long as no value leaves [0, 1]; its margin falls by ε‖w‖₁."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(48, generator=generator)
    x = 0.4 + 0.2 * torch.rand(200, 3, 4, 4, generator=generator)
    network = Line(w, -float(w.sum()) / 2).eval()
    margins = x.flatten(1) @ w + network.b
    y = (margins < 0).long()
    found = attacked(network, x, y, attack, eps)  # type: ignore[arg-type]  # one of the two
    sign = torch.where(y == 0, 1.0, -1.0)[:, None]
    expected = (x.flatten(1) - eps / 255 * sign * w.sign()).clamp(0, 1)
    assert torch.allclose(found.flatten(1), expected, atol=1e-6)
    assert network.w.grad is None
    right = measure(network, [(x, y)], corruptions=(), attacks=(attack,), eps=(eps,))  # type: ignore[arg-type]
    still = (margins.abs() > eps / 255 * w.abs().sum()).float().mean()
    assert right["attacks"][attack][f"{eps:g}"] == pytest.approx(float(still), abs=0.006)


def test_an_attack_stays_within_reach_and_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 4
    loss = nn.CrossEntropyLoss(reduction="none")
    for attack in ("fgsm", "pgd"):
        found = attacked(network, x, y, attack, 16)  # type: ignore[arg-type]  # one of the two
        assert float((found - x).abs().max()) <= 16 / 255 + 1e-6
        assert 0 <= found.min() <= found.max() <= 1
        assert (loss(network(found), y) > loss(network(x), y)).all()
        assert torch.allclose(attacked(network, x[2:3], y[2:3], attack, 16), found[2:3])  # type: ignore[arg-type]
    by_pgd = loss(network(attacked(network, x, y, "pgd", 16)), y).mean()
    assert by_pgd >= loss(network(attacked(network, x, y, "fgsm", 16)), y).mean()


# --------------------------------------------------------------------------------------------------------------- errors


def test_measured_accuracies_are_those_of_the_pictures_one_by_one() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 8 * 8, 4))
    x, y = torch.rand(7, 3, 8, 8), torch.arange(7) % 4
    found = measure(network, [(x[:3], y[:3]), (x[3:], y[3:])], corruptions=("fog", "gaussian_noise"))
    assert network.training
    for name in ("fog", "gaussian_noise"):
        for severity in SEVERITIES:
            logits, _ = predict_logits(network, [(corrupted(x, name, severity), y)])
            accuracy = evaluate_logits(logits, y, tuple("abcd")).accuracy
            assert found["corruptions"][name]["accuracy_by_severity"][severity - 1] == pytest.approx(accuracy)
    with pytest.raises(MetaplError, match="inputs"):
        measure(network, [(x.flatten(1), y)])
    with pytest.raises(MetaplError, match="no pictures"):
        measure(network, [])


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, few = tmp_path / "robust", {name: CORRUPTIONS[name] for name in ("contrast", "shot_noise", "jpeg_compression")}
    monkeypatch.setattr("metapl.apps.evaluate.CORRUPTIONS", few)
    text = said(capsys, "evaluate", tiny, "--corruptions", "--attack", "fgsm", "--eps", "0", "8", "--out", out)
    content = json.loads((out / "evaluation.json").read_text())
    assert list(content["corruptions"]) == list(few)
    assert content["attacks"]["fgsm"]["0"] == content["accuracy"] == result(tiny)["test_accuracy"]
    contrast = content["corruptions"]["contrast"]
    assert contrast["error"] == pytest.approx(1 - sum(contrast["accuracy_by_severity"]) / 5)
    assert {"top5", "expected_calibration_error", "n", "chance", "measured_on"} <= content.keys()
    for words in ("jpeg_compression", "mean accuracy under corruption", "ε in 1/255"):
        assert words in text
    del few["jpeg_compression"]
    again = json.loads(said(capsys, "evaluate", tiny, "--corruptions", "--json"))
    assert again["corruptions"] == {name: content["corruptions"][name] for name in few}


def test_flags_that_say_nothing_are_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for flags, words in (
        (("--eps", "2"), "--eps was given without --attack"),
        (("--attack", "pgd", "--eps", "-2", "--json"), "expected several, each a number in [0, 255]"),
        (("--corruptions", "--out", tmp_path / "file"), "is a file; expected a folder"),
    ):
        assert words in refused(capsys, "evaluate", tiny, *flags)


def test_a_file_that_cannot_be_read_is_counted_once_however_often_its_folder_is_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name / "1.png")
    (tmp_path / "pictures" / "a" / "bad.png").write_bytes(b"no picture")

    card = NetworkCard(title="", input=Input(size=8), widths=(192, 2))
    save(tmp_path / "run", card.create(), card, classes=("a", "b"), name="", config={})
    folder = HeldOut(EndedRun.load(tmp_path / "run"), "student", tmp_path / "pictures")
    for _ in range(2):
        assert sum(len(y) for _, y in folder.batches()) == 2
        assert folder.skipped == 1


def test_wrong_kinds_severities_pictures_and_attacks_are_refused() -> None:
    picture = torch.rand(1, 3, 8, 8)
    for given in ((picture, "rain", 1), (picture, "snow", 0), (picture[0], "snow", 1), (picture.byte(), "snow", 1)):
        with pytest.raises(MetaplError, match="expected"):
            corrupted(*given)
    for attack, eps in (("PGD", 1.0), ("pgd", -1.0)):
        with pytest.raises(MetaplError, match="expected"):
            attacked(torch.nn.Flatten(), picture, torch.tensor([0]), attack, eps)  # type: ignore[arg-type]
