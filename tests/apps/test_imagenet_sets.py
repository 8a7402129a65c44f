"""ImageNet-A, -C and -P from their own files, and the figures that are relative to AlexNet's."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from imagenet_sets import SIDE, WNIDS, picture, save, write_a, write_c, write_p, write_video
from PIL import Image
from torch import Tensor, nn

from metapl.apps.evaluation.corruptions import CORRUPTIONS
from metapl.apps.evaluation.imagenet import (
    IMAGENET_A,
    Pictures,
    Subject,
    imagenet_a,
    imagenet_c,
    imagenet_p,
    is_imagenet,
)
from metapl.apps.evaluation.measure import ALEXNET, FLIPS_OF_ALEXNET, flip_probability, relative_to
from metapl.errors import MetaplError
from metapl.metrics import evaluate_logits


def values(seeds: list[int]) -> Tensor:
    """Pictures as the network gets them."""
    arrays = np.stack([np.asarray(picture(seed)) for seed in seeds])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


@pytest.fixture
def subject() -> Subject:
    """A network of a thousand outputs in training mode, in which it would give something else."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * SIDE * SIDE, 1000))
    return Subject(network, Pictures(SIDE), WNIDS, 1000, imagenet=True)


def logits(subject: Subject, seeds: list[int]) -> Tensor:
    with torch.no_grad():
        return subject.network.eval()(values(seeds))


# ---------------------------------------------------------------------------------------------------------- ImageNet-A


def test_imagenet_a_is_restricted_to_its_200_outputs(subject: Subject, tmp_path: Path) -> None:
    assert len(IMAGENET_A) == 200
    assert list(IMAGENET_A) == sorted(set(IMAGENET_A))
    root = write_a(tmp_path / "imagenet-a", IMAGENET_A)
    # Outputs outside of ImageNet-A must not count, however large they are.
    with torch.no_grad():
        subject.network[2].bias[[k for k in range(1000) if k not in IMAGENET_A]] += 100
    expected = evaluate_logits(logits(subject, list(range(200)))[:, list(IMAGENET_A)], torch.arange(200))
    for known in (subject, replace(subject, classes=None), replace(subject, classes=tuple(map(str, range(1000))))):
        found = imagenet_a(known, root)
        assert found.n == 200
        assert (found.accuracy, found.top5) == (expected.accuracy, expected.top5)
        assert found.expected_calibration_error == pytest.approx(expected.expected_calibration_error)
    assert expected.top5 is not None
    assert 0 < expected.top5 < 0.2  # chance is 0.025, and a fault in the mapping would give 0 as often as not
    # With names in another order, the same outputs are found by name.
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    shuffled = nn.Sequential(*subject.network[:2], nn.Linear(3 * SIDE * SIDE, 1000))
    shuffled[2].load_state_dict({k: v[order] for k, v in subject.network[2].state_dict().items()})
    names = tuple(WNIDS[k] for k in order.tolist())
    assert imagenet_a(replace(subject, network=shuffled, classes=names, imagenet=False), root).top5 == expected.top5


def test_imagenet_a_of_a_network_of_other_classes_is_refused(subject: Subject, tmp_path: Path) -> None:
    root = write_a(tmp_path / "a", IMAGENET_A[:3])
    unnamed = replace(subject, classes=None)
    with pytest.raises(MetaplError, match=r"by --classes FILE, or all 200 folders"):
        imagenet_a(unnamed, root)
    assert imagenet_a(subject, root).n == 3  # names say which they are
    others = replace(subject, classes=("cat", "dog"), outputs=2, imagenet=False)
    with pytest.raises(
        MetaplError, match=r"the network's 2 outputs n01000222.* called as the network's classes \(cat, dog\)"
    ):
        imagenet_a(others, root)


def test_names_that_are_imagenets() -> None:
    assert is_imagenet(WNIDS)
    assert not is_imagenet(WNIDS[::-1])
    assert not is_imagenet(WNIDS[:999])
    assert is_imagenet(["tench", *map(str, range(998)), "toilet tissue"])
    assert not is_imagenet(list(map(str, range(1000))))


# ---------------------------------------------------------------------------------------------------------- ImageNet-C


@pytest.mark.parametrize("grouped", [False, True])
def test_imagenet_c_by_corruption_and_severity(subject: Subject, tmp_path: Path, grouped: bool) -> None:
    outputs = [3, 5]
    root = write_c(tmp_path, outputs, grouped)
    # A network that is right at some severities of some corruptions, and wrong at the others.
    with torch.no_grad():
        subject.network[2].weight.mul_(3)
        subject.network[2].bias[outputs] += 3
    found = imagenet_c(subject, root)
    for kind, name in enumerate(CORRUPTIONS):
        for severity in range(1, 6):
            seeds = [100 * kind + 10 * severity + output for output in outputs]
            right = logits(subject, seeds).argmax(1) == torch.tensor(outputs)
            assert found.corruptions[name][severity - 1] == float(right.float().mean())
    assert found.n == 150
    by_hand = [np.mean([1 - a for a in found.corruptions[n]]) / ALEXNET[n] for n in CORRUPTIONS]
    assert found.mean_corruption_error == pytest.approx(100 * np.mean(by_hand))
    assert found.mean_corrupted_accuracy is not None
    assert 0.05 < found.mean_corrupted_accuracy < 0.95
    assert imagenet_c(replace(subject, imagenet=False), root).mean_corruption_error is None


def test_imagenet_c_that_is_not_whole(subject: Subject, tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path / "fog" / str(number + 1) / WNIDS[7] / "ILSVRC2012_val_00000001.JPEG", number)
    (tmp_path / "speckle_noise").mkdir()  # one of those that the figure leaves out
    found = imagenet_c(subject, tmp_path)
    assert list(found.corruptions) == ["fog"]
    assert found.mean_corruption_error is None
    skipped: list[str] = []
    broken = tmp_path / "fog" / "3" / WNIDS[7] / "ILSVRC2012_val_00000001.JPEG"
    save(broken.with_name("ILSVRC2012_val_00000002.JPEG"), 9)
    broken.write_bytes(broken.read_bytes()[:200])
    assert imagenet_c(replace(subject, skip=skipped.append), tmp_path).n == 5
    assert len(skipped) == 1
    assert "is truncated" in skipped[0]
    broken.with_name("ILSVRC2012_val_00000002.JPEG").unlink()
    with pytest.raises(MetaplError, match=r"none of the 1 pictures in .*fog/3 can be read"):
        imagenet_c(subject, tmp_path)
    (tmp_path / "fog" / "5").rename(tmp_path / "fog" / "six")
    with pytest.raises(MetaplError, match="fog/5 does not exist"):
        imagenet_c(subject, tmp_path)
    with pytest.raises(
        MetaplError, match=r"has none of the folders of ImageNet-C, gaussian_noise, .*; expected .*/1/n01440764/"
    ):
        imagenet_c(subject, tmp_path / "speckle_noise")


def test_released_crops_are_read_whole(tmp_path: Path) -> None:
    """A share of the sides that is looked at is for photographs: of ImageNet-C it would cut a crop once more."""
    rim = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    rim[2:-2, 2:-2] = 0
    for severity in "12345":
        (tmp_path / "c" / "snow" / severity / "n01").mkdir(parents=True)
        Image.fromarray(rim).save(tmp_path / "c" / "snow" / severity / "n01" / "1.JPEG", "PNG")
    seen: list[float] = []

    class Bright(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(float(x.mean()))
            return x.mean((1, 2, 3))[:, None] * torch.tensor([1.0, 0.0])

    subject = Subject(Bright(), Pictures(SIDE, center=0.5), ("n01", "n02"), 2, imagenet=False)
    imagenet_c(subject, tmp_path / "c")
    assert seen == pytest.approx([float(rim.mean()) / 255] * 5)
    assert subject.pictures.read(tmp_path / "c" / "snow" / "1" / "n01" / "1.JPEG").max() == 0


# ---------------------------------------------------------------------------------------------------------- ImageNet-P


def test_flips_by_hand() -> None:
    """Noise is compared with the clean first frame, all else with the frame before."""
    sequences = [[1, 1, 2, 2, 1], [4, 4, 4, 4, 4], [1, 2, 3, 4, 5]]
    assert flip_probability(sequences, "rotate") == pytest.approx((2 / 4 + 0 + 1) / 3)
    assert flip_probability(sequences, "gaussian_noise") == pytest.approx((2 / 4 + 0 + 1) / 3)
    assert flip_probability([[1, 2, 2, 2]], "rotate") == pytest.approx(1 / 3)
    assert flip_probability([[1, 2, 2, 2]], "shot_noise") == 1
    assert flip_probability([[1, 1], [1, 2, 1, 2, 1]], "tilt") == 0.5  # a sequence counts once, however long it is
    for wrong in ([], [[1]], [[1, 2], [1]]):
        with pytest.raises(MetaplError, match="expected at least one, and two frames in each"):
            flip_probability(wrong, "tilt")


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
        assert found.flips[name] == pytest.approx(flip_probability(predictions, name))
    assert (found.sequences, found.frames) == (20, 80)
    assert len(set(found.flips.values())) > 2
    assert found.mean_flip_rate == pytest.approx(relative_to(FLIPS_OF_ALEXNET, found.flips))
    assert 0 < found.accuracy < 1
    (tmp_path / "tilt").rename(tmp_path / "leaning")
    assert imagenet_p(subject, root).mean_flip_rate is None
    with pytest.raises(MetaplError, match="has none of the folders of ImageNet-P"):
        imagenet_p(subject, tmp_path / "leaning")
    (tmp_path / "snow" / "empty").mkdir()
    for folder in (tmp_path / "snow").iterdir():
        folder.rename(tmp_path / folder.name)
    with pytest.raises(MetaplError, match="snow has no sequence in it; expected a folder a class"):
        imagenet_p(subject, root)


def test_imagenet_p_in_videos(subject: Subject, tmp_path: Path) -> None:
    pytest.importorskip("av")
    seeds = list(range(70, 75))
    write_video(tmp_path / "rotate" / WNIDS[2] / "ILSVRC2012_val_00000003.mp4", seeds)
    with torch.no_grad():
        subject.network[2].bias[[2, 9]] += 2
    found = imagenet_p(subject, tmp_path)
    predictions = logits(subject, seeds).argmax(1)
    assert found.flips == {"rotate": flip_probability([predictions.tolist()], "rotate")}
    assert found.frames == 5
    assert found.accuracy == pytest.approx(float((predictions == 2).float().mean()))
    skipped: list[str] = []
    (tmp_path / "rotate" / WNIDS[2] / "ILSVRC2012_val_00000009.mp4").write_bytes(b"no video")
    assert imagenet_p(replace(subject, skip=skipped.append), tmp_path).sequences == 1
    assert "the video cannot be decoded" in skipped[0]


def test_a_video_without_pyav_is_refused(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "tilt" / WNIDS[0]).mkdir(parents=True)
    (tmp_path / "tilt" / WNIDS[0] / "a.mp4").write_bytes(io.BytesIO().getvalue())
    with pytest.raises(
        MetaplError, match=r"a folder of its frames, or get av: not installed.* pip install 'metapl\[video\]'"
    ):
        imagenet_p(subject, tmp_path)
