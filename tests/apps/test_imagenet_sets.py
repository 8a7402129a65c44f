"""examples/robustness.py on ImageNet-A, -C, -P and ReaL in the forms of their files, of weights and of runs."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imagenet_sets import SIDE, WNIDS, picture, save, write_a, write_c, write_p, write_video
from PIL import Image
from tiny_runs import color_run
from torch import Tensor, nn

from metapl.apps.evaluation.corruptions import CORRUPTIONS
from metapl.apps.export import WEIGHTS, export
from metapl.apps.main import main as metapl
from metapl.apps.networks import Architecture, Normalized
from metapl.errors import MetaplError
from metapl.metrics import evaluate_logits

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
try:
    import robustness
    from robustness import (
        ALEXNET,
        FLIPS_OF_ALEXNET,
        Subject,
        flip_probability,
        imagenet_a,
        imagenet_c,
        imagenet_p,
        relative_to,
    )
finally:
    del sys.path[0]

IMAGENET_A = [*map(int, robustness.IMAGENET_A.split())]


@pytest.fixture
def subject() -> Subject:
    """A network of a thousand outputs in training mode, in which it would give something else."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * SIDE * SIDE, 1000))
    return Subject(network, SIDE, WNIDS, 1000)


def logits(subject: Subject, seeds: list[int]) -> Tensor:
    arrays = np.stack([np.asarray(picture(seed)) for seed in seeds])
    with torch.no_grad():
        return subject.network.eval()(torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255)


def test_imagenet_a_is_restricted_to_its_200_outputs(subject: Subject, tmp_path: Path) -> None:
    assert len(IMAGENET_A) == 200
    assert sorted(set(IMAGENET_A)) == IMAGENET_A
    root = write_a(tmp_path / "imagenet-a", IMAGENET_A)
    # Outputs outside of ImageNet-A must not count, however large they are.
    with torch.no_grad():
        subject.network[2].bias[[k for k in range(1000) if k not in IMAGENET_A]] += 100
    expected = evaluate_logits(logits(subject, list(range(200)))[:, IMAGENET_A], torch.arange(200))
    for known in (subject, replace(subject, classes=None), replace(subject, classes=tuple(map(str, range(1000))))):
        found = imagenet_a(known, root)
        assert found["n"] == 200
        assert (found["accuracy"], found["top5"]) == (expected.accuracy, expected.top5)
        assert found["expected_calibration_error"] == pytest.approx(expected.expected_calibration_error)
    assert expected.top5 is not None
    assert 0 < expected.top5 < 0.2  # chance is 0.025, and a fault in the mapping would give 0 as often as not
    # With names in another order, the same outputs are found by name.
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    shuffled = nn.Sequential(*subject.network[:2], nn.Linear(3 * SIDE * SIDE, 1000))
    shuffled[2].load_state_dict({k: v[order] for k, v in subject.network[2].state_dict().items()})
    names = tuple(WNIDS[k] for k in order.tolist())
    assert imagenet_a(replace(subject, network=shuffled, classes=names), root)["top5"] == expected.top5
    # A folder without pictures would shift the outputs of all others, where folders go by their number.
    shutil.rmtree(root / WNIDS[IMAGENET_A[0]])
    (root / "zzz").mkdir()
    with pytest.raises(MetaplError, match="without a picture: zzz"):
        imagenet_a(subject, root)


def test_a_network_of_other_classes_is_refused(subject: Subject, tmp_path: Path) -> None:
    root = write_a(tmp_path / "a", IMAGENET_A[:3])
    assert imagenet_a(subject, root)["n"] == 3  # names say which they are
    for other in (replace(subject, classes=None), replace(subject, classes=("cat", "dog"), outputs=2)):
        with pytest.raises(MetaplError, match="expected folders called as its classes, or all 200"):
            imagenet_a(other, root)


@pytest.mark.parametrize("grouped", [False, True])
def test_imagenet_c_by_corruption_and_severity(subject: Subject, tmp_path: Path, grouped: bool) -> None:
    outputs = [3, 5]
    root = write_c(tmp_path, outputs, grouped)
    # A network that is right at some severities of some corruptions, and wrong at the others.
    with torch.no_grad():
        subject.network[2].weight.mul_(3)
        subject.network[2].bias[outputs] += 3
    found = imagenet_c(subject, root)
    shares = {name: kind["accuracy_by_severity"] for name, kind in found["corruptions"].items()}
    for kind, name in enumerate(CORRUPTIONS):
        for severity in range(1, 6):
            seeds = [100 * kind + 10 * severity + output for output in outputs]
            right = logits(subject, seeds).argmax(1) == torch.tensor(outputs)
            assert shares[name][severity - 1] == float(right.float().mean())
    assert found["n"] == 150
    by_hand = [np.mean([1 - a for a in shares[n]]) / ALEXNET[n] for n in CORRUPTIONS]
    assert found["mean_corruption_error"] == pytest.approx(100 * np.mean(by_hand))
    assert 0.05 < found["mean_corrupted_accuracy"] < 0.95
    if grouped:
        shutil.rmtree(root / "weather" / "fog")
        assert imagenet_c(subject, root)["mean_corruption_error"] is None
        with pytest.raises(MetaplError, match="none of the folders of the set"):
            imagenet_c(subject, root / "noise" / "shot_noise")
        broken = root / "blur" / "zoom_blur" / "3" / WNIDS[3] / "ILSVRC2012_val_00000004.JPEG"
        broken.write_bytes(broken.read_bytes()[:200])
        with pytest.raises(MetaplError, match="truncated"):
            imagenet_c(subject, root)


def test_released_crops_are_read_whole(tmp_path: Path) -> None:
    """A share of the sides that is looked at is for photographs: of ImageNet-C it would cut a crop once more."""
    rim = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    rim[2:-2, 2:-2] = 0
    for severity in "12345":
        (tmp_path / "snow" / severity / "n01").mkdir(parents=True)
        Image.fromarray(rim).save(tmp_path / "snow" / severity / "n01" / "1.JPEG", "PNG")
    seen: list[float] = []

    class Bright(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(float(x.mean()))
            return x.mean((1, 2, 3))[:, None] * torch.tensor([1.0, 0.0])

    subject = Subject(Bright(), SIDE, ("n01", "n02"), 2, center=0.5)
    assert imagenet_c(subject, tmp_path)["mean_corruption_error"] is None
    assert seen == pytest.approx([float(rim.mean()) / 255] * 5)
    assert subject.read(tmp_path / "snow" / "1" / "n01" / "1.JPEG").max() == 0


def test_flips_by_hand() -> None:
    """Noise is compared with the clean first frame, all else with the frame before."""
    sequences = [[1, 1, 2, 2, 1], [4, 4, 4, 4, 4], [1, 2, 3, 4, 5]]
    assert flip_probability(sequences, "rotate") == pytest.approx((2 / 4 + 0 + 1) / 3)
    assert flip_probability(sequences, "gaussian_noise") == pytest.approx((2 / 4 + 0 + 1) / 3)
    assert flip_probability([[1, 2, 2, 2]], "rotate") == pytest.approx(1 / 3)
    assert flip_probability([[1, 2, 2, 2]], "shot_noise") == 1
    assert flip_probability([[1, 1], [1, 2, 1, 2, 1]], "tilt") == 0.5  # a sequence counts once, however long it is
    for wrong in ([], [[1]], [[1, 2], [1]]):
        with pytest.raises(MetaplError, match="expected"):
            flip_probability(wrong, "tilt")


def test_mean_corruption_error_by_hand() -> None:
    assert sum(ALEXNET.values()) / 15 == pytest.approx(0.789, abs=5e-4)
    errors = dict.fromkeys(CORRUPTIONS, 0.3)
    assert relative_to(ALEXNET, errors) == pytest.approx(100 * np.mean([0.3 / of for of in ALEXNET.values()]))


def test_the_mean_flip_rate_of_a_published_network() -> None:
    """The flip probabilities that are published of ResNeXt-101 32x48d WSL make the 27.8 that is printed for it."""
    flips = (0.0585, 0.0699, 0.0284, 0.0232, 0.0367, 0.0154, 0.0242, 0.0347, 0.0215, 0.0462)
    rate = relative_to(FLIPS_OF_ALEXNET, dict(zip(FLIPS_OF_ALEXNET, flips, strict=True)))
    assert rate == pytest.approx(27.8, abs=0.05)
    assert relative_to(FLIPS_OF_ALEXNET, {"snow": 0.1}) is None


def test_imagenet_p_in_folders_of_frames(subject: Subject, tmp_path: Path) -> None:
    outputs = [0, 9]
    root = write_p(tmp_path, outputs)
    with torch.no_grad():  # two outputs that take turns, so that some frames flip
        subject.network[2].bias[outputs] += 2
    found = imagenet_p(subject, root)
    for kind, name in enumerate(FLIPS_OF_ALEXNET):
        predictions = [
            logits(subject, [1000 * kind + 10 * output + frame for frame in range(4)]).argmax(1).tolist()
            for output in outputs
        ]
        assert found["flip_probability"][name] == pytest.approx(flip_probability(predictions, name))
    assert (found["sequences"], found["frames"]) == (20, 80)
    assert len(set(found["flip_probability"].values())) > 2
    assert found["mean_flip_rate"] == pytest.approx(relative_to(FLIPS_OF_ALEXNET, found["flip_probability"]))
    assert 0 < found["accuracy"] < 1
    (tmp_path / "tilt").rename(tmp_path / "leaning")
    assert imagenet_p(subject, root)["mean_flip_rate"] is None
    for folder in (tmp_path / "snow").iterdir():
        folder.rename(tmp_path / folder.name)
    with pytest.raises(MetaplError, match="snow has no sequence"):
        imagenet_p(subject, root)


def test_imagenet_p_in_videos(subject: Subject, tmp_path: Path) -> None:
    pytest.importorskip("av")
    seeds = list(range(70, 75))
    video = tmp_path / "rotate" / WNIDS[2] / "ILSVRC2012_val_00000003.mp4"
    write_video(video, seeds)
    with torch.no_grad():
        subject.network[2].bias[[2, 9]] += 2
    found = imagenet_p(subject, tmp_path)
    predictions = logits(subject, seeds).argmax(1)
    assert found["flip_probability"] == {"rotate": flip_probability([predictions.tolist()], "rotate")}
    assert found["frames"] == 5
    assert found["accuracy"] == pytest.approx(float((predictions == 2).float().mean()))
    video.write_bytes(b"no video")
    with pytest.raises(MetaplError, match="decoded"):
        imagenet_p(subject, tmp_path)


def test_a_video_without_pyav_is_refused(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "tilt" / WNIDS[0]).mkdir(parents=True)
    (tmp_path / "tilt" / WNIDS[0] / "a.mp4").write_bytes(b"")
    with pytest.raises(MetaplError, match="pip install"):
        imagenet_p(subject, tmp_path)


# ----------------------------------------------------------------------------------------------------------- the script


def printed(patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    patch.setattr(sys, "argv", ["robustness.py", *map(str, arguments)])
    capsys.readouterr()
    robustness.main()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_run(tmp_path_factory)


def test_weights_by_what_the_export_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every set at once, of a network of ImageNet's thousand classes."""
    architecture = Architecture(name="small_cnn", num_classes=1000, image_size=SIDE)
    torch.manual_seed(0)
    network = Normalized(architecture.create(), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]).eval()
    told: Any = {"shape": (3, SIDE, SIDE), "classes": list(WNIDS), "center": 0.875, "architecture": architecture}
    export(network, tmp_path / "out", **told)
    file = tmp_path / "out" / WEIGHTS
    for number in range(4):
        save(tmp_path / "val" / WNIDS[number] / f"ILSVRC2012_val_{number + 1:08}.JPEG", number)
    sets = {"a": write_a(tmp_path / "a", IMAGENET_A), "c": write_c(tmp_path / "c", [3])}
    sets["p"] = write_p(tmp_path / "p", [3], frames=3)
    taken = robustness.of_weights(file, None)
    assert taken.center == 0.875
    files = [tmp_path / "val" / WNIDS[k] / f"ILSVRC2012_val_{k + 1:08}.JPEG" for k in range(4)]
    with torch.no_grad():
        guesses = network(torch.stack([*map(taken.read, files)])).argmax(1).tolist()
    (tmp_path / "real.json").write_text(json.dumps([[], [5, guesses[1]], [guesses[2]], [999 - guesses[3]]]))
    flags = [word for letter, root in sets.items() for word in (f"--imagenet-{letter}", root)]
    found = printed(monkeypatch, capsys, file, "--test", tmp_path / "val", "--real", tmp_path / "real.json", *flags)
    assert found["real"] == {"accuracy": pytest.approx(2 / 3), "n": 3, "without_label": 1}
    assert found["accuracy"] == pytest.approx(np.mean([guess == k for k, guess in enumerate(guesses)]))
    assert found["imagenet_a"]["n"] == 200
    assert found["imagenet_c"]["mean_corruption_error"] > 0
    assert found["imagenet_p"]["mean_flip_rate"] is not None
    with pytest.raises(MetaplError, match="no entry of"):
        robustness.real(tmp_path / "real.json", [tmp_path / "ILSVRC2012_val_00000005.JPEG"], [0])


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet10t"])
def test_weights_by_the_networks_name(name: str, tmp_path: Path) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    network = Architecture(name=name, num_classes=7).create().eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pt")
    taken = robustness.of_weights(tmp_path / "weights.pt", name)
    assert (taken.side, taken.outputs, taken.center) == (224 if name == "resnet18" else 176, 7, 0.875)
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(taken.network(x), network((x - mean) / std))


def test_a_run_and_what_is_refused(
    colors: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed(monkeypatch, capsys, colors / "run", "--test", colors / "test")
    assert metapl(["evaluate", str(colors / "run"), "--json"]) == 0
    assert found["accuracy"] == json.loads(capsys.readouterr().out)["accuracy"]
    (tmp_path / "weights.pt").write_bytes(b"nothing")
    for given in (
        (tiny,),
        (tmp_path / "none.pt",),
        (tmp_path / "weights.pt",),
        (tmp_path / "weights.pt", "--network", "small_cnn"),
        (tmp_path / "weights.pt", "--network", "resnet18"),
        (colors / "run", "--imagenet-a", tmp_path / "nowhere"),
    ):
        with pytest.raises(SystemExit):
            printed(monkeypatch, capsys, *given)
        assert "expected" in " ".join(capsys.readouterr().err.split()).lower()
