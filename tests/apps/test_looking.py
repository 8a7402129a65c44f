"""What a recipe sees of a folder of pictures, and what it makes of that; and how it measures its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import result, said
from PIL import Image
from torchvision.models import resnet18

from metapl.apps.experiments import settle
from metapl.apps.experiments.settle import chosen, look, settled
from metapl.apps.pictures.store import FileImages
from metapl.apps.recipes import ImageFolders
from metapl.apps.recipes.image_folders import Changes
from metapl.errors import MetaplError

RED, BLUE = (200, 30, 30), (30, 30, 200)


def write(folder: Path, *pictures: Image.Image) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:03}.png" for number in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        picture.save(file)
    return files


def noisy(color: tuple[int, int, int], seed: int, width: int = 12, height: int = 12) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(-30, 30, (height, width, 3))
    return Image.fromarray((np.array(color) + drawn).clip(0, 255).astype(np.uint8))


def classes(*counts: int) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def test_grey_pictures_in_any_mode_are_grey_and_have_one_mean(tmp_path: Path) -> None:
    levels = [np.full((20, 30), level, np.uint8) for level in (0, 51, 102, 153)]
    grey = [Image.fromarray(one) for one in levels]
    files = write(tmp_path, grey[0], grey[1].convert("RGB"), grey[2].convert("RGBA"), grey[3])
    found = look(files, classes(2, 2), [])
    assert found.grey
    assert found.side == 20  # the shorter one
    assert not found.square
    assert found.mean == found.level[:1] == (0.3,)
    assert found.std == found.level[1:] == (pytest.approx(0.224, abs=0.001),)


def test_colors_that_differ_by_class_tell_and_others_do_not(tmp_path: Path) -> None:
    told = [noisy(RED if number < 8 else BLUE, number) for number in range(16)]
    found = look(write(tmp_path / "told", *told), classes(8, 8), [])
    assert not found.grey
    assert found.colors.tell
    assert (found.colors.right, found.colors.chance) == (1.0, 0.5)
    mixed = [noisy(RED if number % 2 else BLUE, number) for number in range(16)]
    found = look(write(tmp_path / "mixed", *mixed), classes(8, 8), [])
    assert not found.colors.tell
    assert len(found.mean) == len(found.std) == 3
    assert found.mean[0] == pytest.approx((200 + 30) / 2 / 255, abs=0.01)


@pytest.mark.parametrize(
    ("as_good", "tell", "may_tell"),
    [(0, True, False), (1, True, False), (2, False, True), (19, False, True), (20, False, False)],
)
def test_how_many_shuffles_may_do_as_well(
    as_good: int, tell: bool, may_tell: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.5, *[0.5] * as_good, *[0.4] * (settle.SHUFFLES - as_good)])
    monkeypatch.setattr(settle, "_found", lambda colors, labels: next(shares))
    found = settle.colors_tell(torch.rand(6, 3), classes(3, 3))
    assert (found.tell, found.may_tell) == (tell, may_tell)


def test_colors_that_may_matter_are_told_of_where_they_are_exchanged(
    colored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, few = recipe(colored), settle.Colors(0.44, 0.17, tell=False, may_tell=True)
    monkeypatch.setattr(settle, "colors_tell", lambda colors, labels: few)
    for given, expected in ((one, True), (dataclasses.replace(one, changes=Changes(recolor=True)), False)):
        told: list[str] = []
        settled(given, say=told.append)
        assert any("44% of the labeled pictures are told apart, and by chance 17%" in line for line in told) == expected


def test_one_unlabeled_color_picture_makes_a_folder_a_colored_one(tmp_path: Path) -> None:
    grey = write(tmp_path / "grey", *[Image.new("L", (8, 8), level) for level in (40, 200)])
    unlabeled = write(tmp_path / "unlabeled", noisy(RED, 0))
    assert look(grey, classes(1, 1), []).grey
    assert not look(grey, classes(1, 1), unlabeled).grey


@pytest.mark.parametrize("counts", [(1,), (1, 1), (4,)])
def test_of_a_tiny_folder_colors_tell_nothing(counts: tuple[int, ...], tmp_path: Path) -> None:
    pictures = [noisy(RED if number % 2 else BLUE, number) for number in range(sum(counts))]
    found = look(write(tmp_path, *pictures), classes(*counts), [])
    assert not found.colors.tell
    assert found.colors.right == found.colors.chance == 1 / len(counts)


def test_blank_pictures_can_be_normalised(tmp_path: Path) -> None:
    found = look(write(tmp_path, *[Image.new("RGB", (8, 8), RED)] * 2), classes(1, 1), [])
    assert found.std == (settle.SMALLEST_STD,) * 3
    assert found.level[1] == settle.SMALLEST_STD


def test_what_cannot_be_read_is_passed_over_and_nothing_readable_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path, noisy(RED, 0), noisy(BLUE, 1), noisy(RED, 2))
    files[0].write_bytes(b"no picture")
    found = look(files, classes(1, 1, 1), [])
    assert (found.side, found.square) == (12, True)
    for file in files:
        file.write_bytes(b"no picture")
    with pytest.raises(MetaplError, match="none of the 3 labeled pictures that were looked at can be read"):
        look(files, classes(1, 1, 1), [])


def test_of_a_large_folder_a_few_are_read_from_all_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = settle.read_image, list[str]()
    monkeypatch.setattr(settle, "LOOKED_AT", 4)
    monkeypatch.setattr(settle, "read_image", lambda path: seen.append(path.name) or read(path))
    files = write(tmp_path, *[noisy(RED, number) for number in range(10)])
    look(files, classes(5, 5), files)
    assert seen == ["000.png", "003.png", "006.png", "009.png"] * 2


# -------------------------------------------------------------------------------------------------- what follows of it


@pytest.fixture(scope="module")
def colored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten red and ten blue pictures, and more without labels."""
    root = tmp_path_factory.mktemp("colored")
    for name, color in (("red", RED), ("blue", BLUE)):
        write(root / "labeled" / name, *[noisy(color, number, 20, 28) for number in range(10)])
    write(root / "unlabeled", *[noisy(RED, 100 + number, 20, 28) for number in range(6)])
    return root


def recipe(root: Path, **fields: Any) -> ImageFolders:
    given = {"steps": 100} | fields
    return ImageFolders(labeled=str(root / "labeled"), unlabeled=str(root / "unlabeled"), **given)


def test_a_test_folder_of_other_classes_is_refused_before_anything_is_measured(
    colored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle, "seconds_per_step", lambda *_, **__: pytest.fail("a step was measured"))
    write(tmp_path / "green", noisy(RED, 1), noisy(RED, 2))
    given = recipe(colored, test=str(tmp_path), steps=None)
    with pytest.raises(MetaplError, match=r"the test folder .* has classes that .* does not: green"):
        settled(given)


def test_a_recipe_fits_itself_to_its_pictures(colored: Path) -> None:
    found = settled(recipe(colored))
    assert (found.image_size, found.grey, found.changes.recolor) == (20, False, False)
    assert found.val_fraction == 0  # a fifth of 20 pictures tells nothing
    assert found.classes == ("blue", "red")
    assert found.complete
    assert f"{found.image_size}x{found.image_size} color pictures, colors kept, not mirrored" in chosen(found)


def test_what_is_given_is_not_chosen(colored: Path) -> None:
    changes = dataclasses.replace(recipe(colored).changes, recolor=True)
    given: dict[str, Any] = {"image_size": 9, "grey": True, "network_name": "small_cnn", "val_fraction": 0.5}
    given |= {"warmup": 2, "validate_every": 7, "mean": (0.1,), "std": (0.2,)}
    of_method = {"wait": 3, "uda_ramp": 1}
    method: Any = dataclasses.replace(ImageFolders.by_name("mpl"), **of_method)
    found = settled(recipe(colored, **given, changes=changes, method=method))
    assert {name: getattr(found, name) for name in given} == given
    assert {name: getattr(found.method, name) for name in of_method} == of_method
    assert found.changes.recolor


@pytest.mark.parametrize("grey", [None, True, False])
@pytest.mark.parametrize("kind", ["color", "grey"])
def test_the_normalization_has_as_many_channels_as_the_pictures(
    kind: str, grey: bool | None, colored: Path, tmp_path: Path
) -> None:
    root = colored
    if kind == "grey":
        root = tmp_path
        for place, name in enumerate(("labeled/a", "labeled/b", "unlabeled")):
            write(root / name, *[noisy(RED, 3 * place + number).convert("L") for number in range(3)])
    found = settled(recipe(root, grey=grey, image_size=8))
    channels = 1 if found.grey else 3
    assert found.grey == (kind == "grey" if grey is None else grey)
    assert len(found.normalization()[0]) == len(found.normalization()[1]) == channels
    pictures = torch.stack([x for file in sorted(root.rglob("*.png")) for _, x in found.input.read(file)])
    network = found.network()
    shown = []
    network.module.register_forward_pre_hook(lambda module, given: shown.append(given[0]))
    network.eval()(pictures)
    assert shown[0].shape == (len(pictures), channels, 8, 8)
    assert shown[0].mean().abs() < 0.5
    assert 0.3 < shown[0].std() < 1.6  # smaller pictures have less noise


# -------------------------------------------------------------------------------------------------- steps and minutes


@pytest.mark.parametrize(("method", "fits"), [("uda", 1), ("mpl", 1), ("pseudo_labels", 2)])
def test_steps_are_measured_by_the_clock_and_leave_the_generator_alone(
    method: str, fits: int, colored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which each reading is an eighth of a second after the one before."""
    monkeypatch.setattr(settle, "TIMED", 3)
    small: dict[str, Any] = {"image_size": 8, "network_name": "small_cnn", "labeled_batch": 4, "unlabeled_batch": 4}
    one, before = settled(recipe(colored, method=method, **small)), torch.get_rng_state()
    ticks: Iterator[float] = (number / 8 for number in count())
    assert settle.seconds_per_step(one, ticks.__next__) == pytest.approx(fits / 8)
    # 85 % of a minute at an eighth of a second a step are 408 steps, which are rounded to two digits.
    assert settle.steps_within(one, 1.0, ticks.__next__) == {1: 410, 2: 200}[fits]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("grey", [False, True])
def test_steps_are_measured_with_crops_of_files_too(grey: bool, colored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops are cut out of files, so reading these belongs to the step."""
    monkeypatch.setattr(settle, "TIMED", 2)
    read: list[tuple[int, int, int]] = []
    fetch = FileImages.fetch_crops

    def watched(self: FileImages, *given: Any) -> Any:
        read.append(self.shape)
        return fetch(self, *given)

    monkeypatch.setattr(FileImages, "fetch_crops", watched)
    small: dict[str, Any] = {"image_size": 8, "network_name": "small_cnn", "labeled_batch": 4, "unlabeled_batch": 4}
    found = settled(recipe(colored, steps=None, minutes=0.01, resized_crop=True, grey=grey, **small))
    assert found.complete
    assert found.steps >= 1
    assert set(read) == {(1 if grey else 3, 8, 8)}


@pytest.mark.long
def test_the_photograph_command_of_the_readme(
    colored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but the sizes is smaller; the steps are measured."""
    monkeypatch.setattr(settle, "TIMED", 2)
    weights = tmp_path / "resnet18.pth"
    torch.save(resnet18().state_dict(), weights)
    pictures = ("--labeled", colored / "labeled", "--unlabeled", colored / "unlabeled")
    photographs = ("--network", "resnet18", "--weights", weights, "--image-size", "32", "--resized-crop")
    small = ("--minutes", "0.005", "--labeled-batch", "2", "--unlabeled-batch", "2", "--finetune-steps", "1")
    out = tmp_path / "run"
    told = said(capsys, "train", "images", *pictures, *photographs, "--num-workers", "1", *small, "--out", out)
    assert "chosen: resnet18 on 32x32 color pictures" in told
    assert result(out)["steps"] >= 1
    guess = said(capsys, "predict", out, colored / "labeled" / "red" / "000.png")
    assert "red" in guess or "blue" in guess


def test_where_steps_are_given_nothing_is_measured(colored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the same command is the same recipe, on a busy machine too."""
    monkeypatch.setattr(settle, "seconds_per_step", lambda *_, **__: pytest.fail("a step was measured"))
    assert settled(recipe(colored)).precision == "float32"
    assert settled(recipe(colored, precision="bfloat16")).precision == "bfloat16"


def test_light_and_dark_marks_are_told_apart(tmp_path: Path) -> None:
    def marked(level: int, mark: int, number: int) -> Image.Image:
        pixels = np.full((40, 40), level, np.uint8)
        pixels[5 + number : 11 + number, 20:26] = mark
        return Image.fromarray(pixels)

    light = [marked(60, 200, number) for number in range(6)]
    dark = [marked(200, 60, number) for number in range(6)]
    for pictures, expected in ((light, 1.0), (dark, 0.0), (light[:3] + dark[:1], 0.75)):
        files = write(tmp_path / str(expected), *pictures)
        found = look(files, torch.zeros(len(files), dtype=torch.int64), [])
        assert found.grey
        assert found.light == expected
        assert found.exchangeable == (expected == 0.75)


@pytest.mark.parametrize(("steps", "few"), [(31, True), (300, False)])
def test_too_few_steps_are_said(steps: int, few: bool, colored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "steps_within", lambda *given: steps)
    told: list[str] = []
    assert settled(recipe(colored, steps=None), say=told.append).steps == steps
    assert any(f"{steps} steps are few" in line for line in told) == few
