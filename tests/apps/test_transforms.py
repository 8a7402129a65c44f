"""Views of whole batches beside slow references, and how often each of their outcomes is drawn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from test_randaugment import from_pillow, to_pillow
from test_views import SHAPES, call, pictures
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

from metapl.apps.pictures import Affine, Color, Flip, Hole, Recolor, ResizedCrop, ShiftNoiseCutout, Sometimes, Weak
from metapl.apps.pictures.views import base
from metapl.apps.pictures.views.normal import cosine_and_sine
from metapl.data import draws


def drawn(count: int, each: int, stream: int) -> Tensor:
    """What a view draws for examples 0, 1, … at seed 0 and step 0."""
    return draws.uniform(0, 0, torch.arange(count), each, stream=stream, dtype=torch.float64)


def is_drawn_alike(got: Tensor, ways: list[Tensor], shares: list[float] | None = None) -> bool:
    """Whether each picture is one of the ways, each of which comes as often as its share: chi², within 4 deviations."""
    counts = torch.stack([(got == way).flatten(1).all(1).sum() for way in ways])
    expected = len(got) * torch.tensor(shares or [1 / len(ways)] * len(ways))
    off = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return int(counts.sum()) == len(got) and bool(off <= len(ways) - 1 + 4 * math.sqrt(2 * len(ways)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_weak_is_a_window_of_the_padded_image_or_of_its_mirror_image(dtype: torch.dtype) -> None:
    image = pictures(1, (3, 9, 7), dtype)
    for flip in (False, True):
        got = call(Weak(pad=2, flip=flip), image.expand(2000, -1, -1, -1))
        padded = [
            pad(x, (2, 2, 2, 2), value=128 if dtype == torch.uint8 else 128 / 255) for x in (image, image.flip(3))
        ]
        places = itertools.product(padded[: 1 + flip], range(5), range(5))
        assert is_drawn_alike(got, [x[:, :, top : top + 9, left : left + 7] for x, top, left in places])


def test_half_of_the_pictures_are_mirrored() -> None:
    image = pictures(1, (3, 5, 7))
    assert is_drawn_alike(call(Flip(), image.expand(4000, -1, -1, -1)), [image, image.flip(3)])
    image = image[..., :5]
    got = call(ResizedCrop(5, scale=(1, 1), ratio=(1, 1)), image.expand(500, -1, -1, -1))
    assert is_drawn_alike(got, [image, image.flip(3)])


def test_the_digits_are_moved_by_whole_pixels_get_noise_and_then_lose_one_square() -> None:
    image, n = 0.1 + 0.9 * pictures(1, (2, 5, 7)), 2000
    shifted = call(ShiftNoiseCutout(2, noise=0.0, cutout=0), image.expand(n, -1, -1, -1))
    padded = pad(image, (2, 2, 2, 2))
    places = itertools.product(range(5), range(5))
    assert is_drawn_alike(shifted, [padded[:, :, top : top + 5, left : left + 7] for top, left in places])
    squares = []
    for top, left in itertools.product(range(4), range(6)):
        squares.append(image.clone())
        squares[-1][:, :, top : top + 2, left : left + 2] = 0
    assert is_drawn_alike(call(ShiftNoiseCutout(0, 0.0, 2), image.expand(n, -1, -1, -1)), squares)
    assert ((call(ShiftNoiseCutout(0, 0.2, 3), pictures(50)) == 0).sum((1, 2, 3)) >= 27).all()  # after the noise
    noise = call(ShiftNoiseCutout(0, 0.3, 0), torch.zeros(500, 3, 8, 8))
    assert noise.mean().item() == pytest.approx(0.0, abs=4 * 0.3 / math.sqrt(noise.numel()))
    assert noise.std().item() == pytest.approx(0.3, rel=0.01)
    assert torch.corrcoef(noise[:, :2].transpose(0, 1).flatten(1))[0, 1].abs() < 0.03  # channels share none


def test_resized_crop_is_pillows_resize_of_a_box() -> None:
    images, view = pictures(8, (3, 60, 90), torch.uint8), ResizedCrop(24, flip=False)
    got = call(view, images)
    for picture, box, result in zip(images, view.boxes(0, 0, torch.arange(8), 60, 90)[0].tolist(), got, strict=True):
        top, left, height, width = box
        crop = to_pillow(picture[:, top : top + height, left : left + width])
        expected = from_pillow(crop.resize((24, 24), 2))  # bilinearly
        assert (result.int() - expected.int()).abs().max() <= 1  # Pillow rounds in between, and has weights of 8 bits
    assert (255 * call(view, images.float() / 255) - got.float()).abs().max() <= 0.5001


@pytest.mark.parametrize("size", [(60, 90), (60, 60), (10, 200), (200, 10), (1, 1)])
def test_boxes_fit_and_have_the_shares_asked_for(size: tuple[int, int]) -> None:
    height, width = size
    boxes, flips = ResizedCrop(24).boxes(0, 0, torch.arange(4000), height, width)
    top, left, h, w = boxes.T
    assert min(top.min(), left.min(), h.min() - 1, w.min() - 1, height - (top + h).max(), width - (left + w).max()) >= 0
    assert abs(flips.double().mean() - 0.5) < 0.04
    area, ratio = h * w / (height * width), w / h
    if min(size) >= 60:
        assert 0.07 < area.min() < 0.1
        assert area.max() > 0.85
        assert 0.7 < ratio.min() < 0.78
        assert 1.28 < ratio.max() < 1.42
    if height == width == 60:  # near 1, most ratios do not fit; up to there the area is uniform
        assert abs(area[area < 0.5].mean() - 0.29) < 0.01
        assert abs(ratio.log().mean()) < 0.02
        assert abs((top / (height - h).clamp(min=1)).mean() - 0.5) < 0.03


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_affine_is_torchvisions_inside_and_scipys_outside(shape: tuple[int, int, int]) -> None:
    images, (_, height, width) = pictures(32, shape), shape
    for view in (Affine(25, 0.2, (0.7, 1.4), 15), Affine(180, 1.2, (0.3, 2), 50)):
        numbers = drawn(32, 5, base.AFFINE).numpy()
        theta, phi, right, down = (2 * numbers[:, [0, 1, 3, 4]] - 1).T * np.array(
            [[view.degrees], [view.shear], [view.translate * width], [view.translate * height]]
        )
        scale, expected = view.scale[0] + (view.scale[1] - view.scale[0]) * numbers[:, 2], []
        for i, image in enumerate(images):
            given = {"angle": theta[i], "translate": [right[i], down[i]], "scale": scale[i], "shear": [phi[i], 0.0]}
            both = torch.cat([image, torch.ones_like(image)])
            expected.append(torchvision.affine(both, **given, interpolation=InterpolationMode.BILINEAR))
        reference, inside = torch.stack(expected).split(shape[0], dim=1)
        off, covered = (call(view, images) - reference).abs(), inside > 1 - 1e-6
        # Beside noise, a place that is off by its rounding in float32 shows 30 times more than a level's own.
        assert off[covered].max() < 3e-5 if view.degrees == 25 else off[covered].max() < 3e-3
        assert view.degrees != 25 or 0.2 < covered.double().mean() < 0.95
        for i, got in enumerate(call(view, images.double())):
            cos, sin, slope = (
                math.cos(np.radians(theta[i])),
                math.sin(np.radians(theta[i])),
                math.tan(np.radians(phi[i])),
            )
            inverse = np.linalg.inv(scale[i] * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, -slope], [0, 1]]))
            rows, cols = np.mgrid[:height, :width]
            places = np.stack([cols - (width - 1) / 2 - right[i], rows - (height - 1) / 2 - down[i]], -1) @ inverse.T
            places = (places + np.array([(width - 1) / 2, (height - 1) / 2]))[..., ::-1].transpose(2, 0, 1)
            for image, channel in zip(images[i].double().numpy(), got.numpy(), strict=True):
                assert np.abs(channel - map_coordinates(image, places, order=1, mode="nearest")).max() < 1e-6


def luma(image: np.ndarray) -> np.ndarray:
    return np.tensordot([0.299, 0.587, 0.114], image, axes=1) if len(image) == 3 else image[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_colors_are_those_of_one_step_after_the_other(channels: int, dtype: torch.dtype) -> None:
    images, u = pictures(64, (channels, 20, 24), dtype), drawn(64, 4, base.COLOR).numpy()
    for view in (Color(0.4, 0.5, 0.6, 0.3), Color(hue=0.5), Color(2, 2, 2, 0.5), Color(0.3, 0, 0.7)):
        ranges = np.array([view.brightness, view.contrast, view.saturation])
        low = np.maximum(0, 1 - ranges)
        for image, got, (b, c, s), turn in zip(
            images.double().numpy(), call(view, images), low + (1 + ranges - low) * u[:, :3], u[:, 3], strict=True
        ):
            bright = b * image
            expected = c * bright + (1 - c) * luma(bright).mean()
            if channels == 3:
                expected = s * expected + (1 - s) * luma(expected)
                angle = (2 * turn - 1) * view.hue * 2 * np.pi
                rotation = Rotation.from_rotvec(angle * np.ones(3) / np.sqrt(3)).as_matrix()
                expected = np.tensordot(rotation, expected, axes=1)
            off = np.abs(got.double().numpy() - expected.clip(0, 1)).max()
            assert off < (3e-6 if dtype == torch.float32 else 3e-7)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_factor_is_torchvisions(name: str) -> None:
    images = pictures(64, (3, 20, 24))
    u = drawn(64, 4, base.COLOR)[:, ["brightness", "contrast", "saturation"].index(name)]
    adjust = getattr(torchvision, f"adjust_{name}")
    expected = torch.stack([adjust(image, 0.2 + 1.6 * one) for image, one in zip(images, u.tolist(), strict=True)])
    assert (call(Color(**{name: 0.8}), images) - expected).abs().max() < 1e-4  # its weights add up to 0.9999


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hole_covers_its_square_and_nothing_else(shape: tuple[int, int, int]) -> None:
    images, (_, height, width) = pictures(64, shape), shape
    y, x = (torch.arange(side).double() + 0.5 for side in (height, width))
    numbers, covered = drawn(64, 4, base.HOLE).tolist(), set()
    for image, got, (size, row, column, _) in zip(images, call(Hole((0.3, 0.9)), images), numbers, strict=True):
        half = (0.3 + 0.6 * size) * min(height, width) / 2
        inside = ((y - row * height).abs() <= half)[:, None] & ((x - column * width).abs() <= half)
        expected = image.double().mean((1, 2))
        assert torch.equal(got[:, ~inside], image[:, ~inside])
        assert torch.allclose(got[:, inside].double(), expected[:, None], rtol=0, atol=1e-6)
        covered.add(int(inside.sum()))
    assert len(covered) > 1


def test_channels_change_places_and_light_turns_dark() -> None:
    image = torch.tensor([0.1, 0.2, 0.4]).view(1, 3, 1, 1)
    orders = [image[:, list(order)] for order in itertools.permutations(range(3))]
    ways = [*orders, *(1 - x for x in orders)]
    assert is_drawn_alike(call(Recolor(), image.expand(6000, -1, -1, -1)), ways)
    grey = pictures(64, (1, 8, 8))
    changed = call(Recolor(), grey)
    assert all(torch.equal(a, b) or torch.equal(a, 1 - b) for a, b in zip(changed, grey, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_pictures_is_changed_and_the_others_stay(share: float) -> None:
    images, view = pictures(8, (3, 16, 16))[4:].repeat(128, 1, 1, 1), Affine(25, 0.2)
    changed, got = call(view, images), call(Sometimes(view, share), images)
    is_changed, stays = ((got == one).flatten(1).all(1) for one in (changed, images))
    assert bool((is_changed | stays).all())
    assert is_changed.double().mean() == pytest.approx(share, abs=0.06)


def test_cosine_and_sine_are_torchs() -> None:
    half_turns = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    cos, sin = cosine_and_sine(half_turns)
    assert (cos - (math.pi * half_turns).cos()).abs().max() < 2e-15
    assert (sin - (math.pi * half_turns).sin()).abs().max() < 2e-8
    assert (sin - (math.pi * half_turns).sin())[half_turns.abs() < 0.99].abs().max() < 1e-13
