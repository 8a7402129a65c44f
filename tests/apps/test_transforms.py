"""Views of whole batches beside slow references, and how often each of their outcomes is drawn; RandAugment: each
operation is Pillow's to the bit, and the draws are those of the papers."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from test_views import FLOWER, SHAPES, call, pictures
from torch import Tensor
from torch.nn.functional import pad

from metapl.apps.pictures import (
    CIFAR_OPERATIONS,
    SVHN_OPERATIONS,
    Affine,
    Color,
    Flip,
    Hole,
    RandAugment,
    Recolor,
    ResizedCrop,
    ShiftNoiseCutout,
    Sometimes,
    Weak,
)
from metapl.apps.pictures.views import base, randaugment
from metapl.apps.pictures.views.normal import cosine_and_sine, normal
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
    image, grey = pictures(1, (3, 9, 7), dtype), 128 if dtype == torch.uint8 else 128 / 255
    for flip in (False, True):
        got = call(Weak(pad=2, flip=flip), image.expand(2000, -1, -1, -1))
        padded = [pad(x, (2, 2, 2, 2), value=grey) for x in (image, image.flip(3))]
        places = itertools.product(padded[: 1 + flip], range(5), range(5))
        assert is_drawn_alike(got, [x[:, :, top : top + 9, left : left + 7] for x, top, left in places])
    image = image[..., :7, :]
    for view in (ResizedCrop(7, scale=(1, 1), ratio=(1, 1)), Flip())[: 1 + dtype.is_floating_point]:
        assert is_drawn_alike(call(view, image.expand(2000, -1, -1, -1)), [image, image.flip(3)])


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


@pytest.mark.parametrize("size", [(60, 60), (10, 200), (1, 1)])
def test_boxes_fit_and_have_the_shares_asked_for(size: tuple[int, int]) -> None:
    height, width = size
    boxes, flips = ResizedCrop(24).boxes(0, 0, torch.arange(4000), height, width)
    top, left, h, w = boxes.T
    assert min(top.min(), left.min(), h.min() - 1, w.min() - 1, height - (top + h).max(), width - (left + w).max()) >= 0
    assert abs(flips.double().mean() - 0.5) < 0.04
    area, ratio = h * w / (height * width), w / h
    if height == width == 60:  # near 1, most ratios do not fit; up to there the area is uniform
        assert 0.07 < area.min() < 0.1 < 0.85 < area.max()
        assert 0.7 < ratio.min() < 0.78 < 1.28 < ratio.max() < 1.42
        assert abs(area[area < 0.5].mean() - 0.29) < 0.01
        assert abs(ratio.log().mean()) < 0.02
        assert abs((top / (height - h).clamp(min=1)).mean() - 0.5) < 0.03


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_affine_is_scipys_resampling_of_the_moved_places(shape: tuple[int, int, int]) -> None:
    """By the matrix and the moves of torchvision's affine; outside of a picture its nearest edge is repeated."""
    images, (_, height, width) = pictures(32, shape), shape
    for view in (Affine(25, 0.2, (0.7, 1.4), 15), Affine(180, 1.2, (0.3, 2), 50)):
        numbers = drawn(32, 5, base.AFFINE).numpy()
        theta, phi, right, down = (2 * numbers[:, [0, 1, 3, 4]] - 1).T * np.array(
            [[np.radians(view.degrees)], [np.radians(view.shear)], [view.translate * width], [view.translate * height]]
        )
        scale = view.scale[0] + (view.scale[1] - view.scale[0]) * numbers[:, 2]
        for i, got in enumerate(call(view, images.double())):
            cos, sin, slope = math.cos(theta[i]), math.sin(theta[i]), math.tan(phi[i])
            inverse = np.linalg.inv(scale[i] * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, -slope], [0, 1]]))
            rows, cols = np.mgrid[:height, :width]
            places = np.stack([cols - (width - 1) / 2 - right[i], rows - (height - 1) / 2 - down[i]], -1) @ inverse.T
            places = (places + np.array([(width - 1) / 2, (height - 1) / 2]))[..., ::-1].transpose(2, 0, 1)
            for image, channel in zip(images[i].double().numpy(), got.numpy(), strict=True):
                assert np.abs(channel - map_coordinates(image, places, order=1, mode="nearest")).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_colors_are_those_of_one_step_after_the_other(channels: int, dtype: torch.dtype) -> None:
    def luma(image: np.ndarray) -> np.ndarray:
        return np.tensordot([0.299, 0.587, 0.114], image, axes=1) if channels == 3 else image[0]

    images, u = pictures(64, (channels, 20, 24), dtype), drawn(64, 4, base.COLOR).numpy()
    for view in (Color(0.4, 0.5, 0.6, 0.3), Color(2, 2, 2, 0.5)):
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


def test_a_share_of_the_pictures_is_changed_and_the_others_stay() -> None:
    images, view = pictures(8, (3, 16, 16))[4:].repeat(128, 1, 1, 1), Affine(25, 0.2)
    changed, got = call(view, images), call(Sometimes(view, 0.25), images)
    is_changed, stays = ((got == one).flatten(1).all(1) for one in (changed, images))
    assert bool((is_changed | stays).all())
    assert is_changed.double().mean() == pytest.approx(0.25, abs=0.06)


def test_normal_draws_are_box_mullers_and_cosine_and_sine_torchs() -> None:
    u = draws.uniform(5, 1, torch.arange(3000), 20, stream=3, dtype=torch.float64)
    expected = torch.sqrt(-2 * torch.log1p(-u[:, ::2])) * torch.sin(torch.pi * (u[:, 1::2] - 0.5))
    found = normal(5, 1, torch.arange(3000), 10, stream=3, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    half_turns = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    cos, sin = cosine_and_sine(half_turns)
    assert (cos - (math.pi * half_turns).cos()).abs().max() < 2e-15
    assert (sin - (math.pi * half_turns).sin()).abs().max() < 2e-8
    assert (sin - (math.pi * half_turns).sin())[half_turns.abs() < 0.99].abs().max() < 1e-13


SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def samples(height: int = 33, width: int = 46, channels: int = 3) -> Tensor:
    """Pieces of a photograph, dark, bright, flat and noisy ones: (8, C, H, W) uint8."""
    generator = torch.Generator().manual_seed(0)
    pieces = [FLOWER[:, y : y + height, x : x + width] for y, x in ((180, 250), (100, 420), (250, 330))]
    noise = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    flat = torch.tensor([7, 130, 255], dtype=torch.uint8)[:, None, None].expand(3, height, width)
    whole = from_pillow(to_pillow(FLOWER).resize((width, height)))
    batch = torch.stack([*pieces, noise, noise // 9 + 20, 255 - noise // 5, flat, whole])
    return batch[:, :channels].contiguous()


def to_pillow(levels: Tensor) -> Image.Image:
    array = levels.permute(1, 2, 0).numpy()
    return Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])


def from_pillow(image: Image.Image) -> Tensor:
    array = torch.from_numpy(np.array(image))
    return array.permute(2, 0, 1) if array.ndim == 3 else array[None]


def each(function: Callable[[Image.Image], Image.Image], levels: Tensor) -> Tensor:
    return torch.stack([from_pillow(function(to_pillow(picture))) for picture in levels])


def grey(image: Image.Image) -> Any:
    return (128, 128, 128) if image.mode == "RGB" else 128


def moved(image: Image.Image, *matrix: float) -> Image.Image:
    nearest = Image.Resampling.NEAREST
    return image.transform(image.size, Image.Transform.AFFINE, matrix, nearest, fillcolor=grey(image))


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "AutoContrast": lambda image, level: ImageOps.autocontrast(image),
    "Brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * level),
    "Color": lambda image, level: ImageEnhance.Color(image).enhance(0.1 + 1.8 * level),
    "Contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(0.1 + 1.8 * level),
    "Equalize": lambda image, level: ImageOps.equalize(image),
    "Invert": lambda image, level: ImageOps.invert(image),
    "Sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * level),
    "Posterize": lambda image, level: ImageOps.posterize(image, min(8, max(1, math.floor(4 * level)))),
    "Solarize": lambda image, level: ImageOps.solarize(image, math.floor(256 * level) % 256),
    "Rotate": lambda image, level: image.rotate(30 * level, Image.Resampling.NEAREST, fillcolor=grey(image)),
    "ShearX": lambda image, level: moved(image, 1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda image, level: moved(image, 1, 0, 0, 0.3 * level, 1, 0),
    "TranslateX": lambda image, level: moved(image, 1, 0, -level / 8 * image.width, 0, 1, 0),
    "TranslateY": lambda image, level: moved(image, 1, 0, 0, 0, 1, -level / 8 * image.height),
}


def only(*names: str, magnitude: float = 10, **fields: Any) -> RandAugment:
    """The view that does these operations, as many as are named, and nothing else."""
    given = {"probability": (1, 1), "cutout": 0, **fields}
    return RandAugment(len(names), magnitude, operations=tuple(dict.fromkeys(names)), **given)


@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_is_pillows_to_the_bit(name: str) -> None:
    cases = [((33, 46), channels, magnitude) for channels in (1, 3) for magnitude in (0, 3, 9.5, 16, 27)]
    cases += [(size, 3, 16) for size in ((1, 1), (2, 5), (3, 3), (7, 200))]
    for size, channels, magnitude in cases:
        images, signs = samples(*size, channels), set()
        levels = magnitude / 10, -magnitude / 10
        ways = [each(lambda image, level=level: PILLOW[name](image, level), images) for level in levels]
        for step in range(3):
            for i, picture in enumerate(call(only(name, magnitude=magnitude), images, step=step)):
                matches = [torch.equal(picture, way[i]) for way in ways]
                assert any(matches) if name in SIGNED else matches[0], (name, size, channels, magnitude, i)
                signs.add(tuple(matches))
        if name in SIGNED and magnitude > 0 and min(size) > 3:  # both signs are drawn
            assert {(True, False), (False, True)} <= signs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_images_give_the_levels_of_bytes(dtype: torch.dtype) -> None:
    levels = samples(32, 32)
    for view in (RandAugment(), RandAugment(3, 3)):
        expected = (call(view, levels).double() / 255).to(dtype)
        assert torch.equal(call(view, (levels.double() / 255).to(dtype)), expected)


@pytest.mark.parametrize(("magnitude", "weight"), [(0, 0.0), (5, 0.2), (16, 0.4)])
def test_sample_pairing_blends_with_another_image_of_the_batch(magnitude: float, weight: float) -> None:
    images = samples()
    for i, got in enumerate(call(only("Sample Pairing", magnitude=magnitude), images)):
        others = [to_pillow(other) for j, other in enumerate(images) if j != i]
        assert any(torch.equal(got, from_pillow(Image.blend(to_pillow(images[i]), one, weight))) for one in others)
    assert torch.equal(call(only("Sample Pairing", magnitude=magnitude), images[:1]), images[:1])


def test_the_image_to_pair_with_is_every_other_one_alike() -> None:
    examples, counts = torch.tensor([12, 3, 77, 40, 5]), torch.zeros(5, 5)
    for step in range(1000):
        u = draws.uniform(0, step, examples, 1, dtype=torch.float64)[:, 0]
        counts[torch.arange(5), randaugment._others(examples, u)] += 1
    assert (counts.diagonal() == 0).all()
    assert (counts[~torch.eye(5, dtype=torch.bool)] - 250).abs().max() < 5 * math.sqrt(1000 * 3 / 16)


def test_operations_follow_each_other() -> None:
    images, found = samples(), set()
    invert, posterize = (lambda x: 255 - x), (lambda x: x & 0b11111100)
    ways = [f(g(images)) for f in (invert, posterize) for g in (invert, posterize)]
    for i, picture in enumerate(call(only("Invert", "Posterize", magnitude=16), images)):
        found.add([torch.equal(picture, way[i]) for way in ways].index(True))
    assert len(found) >= 3


def test_operations_and_their_taking_place_are_drawn_uniformly() -> None:
    batch = 60_000
    counts, _ = RandAugment(2, operations=SVHN_OPERATIONS[:9])._plan(0, 0, torch.arange(batch), 8, 8)
    for idle, *each_operation in counts:
        assert abs(idle - batch / 2) < 5 * math.sqrt(batch / 4)
        assert max(abs(count - batch / 18) for count in each_operation) < 5 * math.sqrt(batch / 18)
    # p is one per image: with p uniform on (0.2, 0.8), both take place with probability E[p²] = 0.28, not 0.25.
    images, chance = torch.zeros(batch, 1, 1, 2, dtype=torch.uint8), (0.2, 0.8)
    once = (call(only("Invert", "Invert", probability=chance), images) == 255).double().mean()
    assert abs(once - 2 * (0.5 - 0.28)) < 5 * math.sqrt(0.25 / batch)


def test_cutout_is_a_grey_square_lost_outside_the_image() -> None:
    images = torch.zeros(2000, 1, 12, 20, dtype=torch.uint8)
    got = call(RandAugment(1, 0, operations=("Rotate",), cutout=5), images)[:, 0]
    assert set(got.unique().tolist()) == {0, 128}
    rows, cols = (got == 128).any(2), (got == 128).any(1)
    assert torch.equal(got == 128, rows[:, :, None] & cols[:, None, :])
    # Its center is on each pixel alike, with two pixels to either side.
    for hit, side in ((rows, 12), (cols, 20)):
        window = (torch.arange(side) - torch.arange(side)[:, None]).abs() <= 2
        counts = (hit[:, None] == window).all(2).sum(0)
        assert counts.sum() == 2000
        assert (counts - 2000 / side).abs().max() < 5 * math.sqrt(2000 / side)
    for side, most in ((4, 16), (100, 240)):
        covered = (call(RandAugment(1, 0, operations=("Rotate",), cutout=side), images) == 128).sum((1, 2, 3))
        assert covered.max() == most


def test_lists_are_the_papers() -> None:
    assert len(set(CIFAR_OPERATIONS)) == 15
    assert set(CIFAR_OPERATIONS) - set(SVHN_OPERATIONS) == {"Sample Pairing", "Rotate", "TranslateX"}
    assert (RandAugment().magnitude / RandAugment().scale) == 1.6
