"""RandAugment: each operation is Pillow's to the bit, and the draws are those of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image
from torch import Tensor

from metapl.apps.pictures import CIFAR_OPERATIONS, SVHN_OPERATIONS, RandAugment
from metapl.apps.pictures.views import base, randaugment
from metapl.data import draws

FLOWER = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def pictures(height: int = 33, width: int = 46, channels: int = 3) -> Tensor:
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
    array = torch.from_numpy(numpy.array(image))
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


def call(view: RandAugment, images: Tensor, step: int = 0) -> Tensor:
    return view(images, seed=0, step=step, examples=torch.arange(len(images)))


@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_is_pillows_to_the_bit(name: str) -> None:
    cases = [((33, 46), channels, magnitude) for channels in (1, 3) for magnitude in (0, 3, 9.5, 16, 27)]
    cases += [(size, 3, 16) for size in ((1, 1), (2, 5), (3, 3), (7, 200))]
    for size, channels, magnitude in cases:
        images, signs = pictures(*size, channels), set()
        levels = magnitude / 10, -magnitude / 10
        ways = [each(lambda image, level=level: PILLOW[name](image, level), images) for level in levels]
        for step in range(3):
            for i, picture in enumerate(call(only(name, magnitude=magnitude), images, step)):
                matches = [torch.equal(picture, way[i]) for way in ways]
                assert any(matches) if name in SIGNED else matches[0], (name, size, channels, magnitude, i)
                signs.add(tuple(matches))
        if name in SIGNED and magnitude > 0 and min(size) > 3:  # both signs are drawn
            assert {(True, False), (False, True)} <= signs


@pytest.mark.parametrize("name", SIGNED)
def test_a_move_of_positive_sign_goes_where_pillows_does(name: str) -> None:
    images = pictures()
    for level in (-5.6, -1.6, -0.11, 0, 0.03, 1, 3):
        matrix = randaugment.fixed_point(randaugment._MOVES[name](level, 1 / 8, 33, 46))
        got = randaugment.affine(images, torch.tensor([matrix] * len(images)))
        assert torch.equal(got, each(lambda image, level=level: PILLOW[name](image, level), images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_images_give_the_levels_of_bytes(dtype: torch.dtype) -> None:
    levels = pictures(32, 32)
    for view in (RandAugment(), RandAugment(3, 3)):
        expected = (call(view, levels).double() / 255).to(dtype)
        assert torch.equal(call(view, (levels.double() / 255).to(dtype)), expected)


@pytest.mark.parametrize(("magnitude", "weight"), [(0, 0.0), (5, 0.2), (10, 0.4), (16, 0.4)])
def test_sample_pairing_blends_with_another_image_of_the_batch(magnitude: float, weight: float) -> None:
    images = pictures()
    for i, got in enumerate(call(only("Sample Pairing", magnitude=magnitude), images)):
        others = [to_pillow(other) for j, other in enumerate(images) if j != i]
        ways = [from_pillow(Image.blend(to_pillow(images[i]), other, weight)) for other in others]
        assert any(torch.equal(got, way) for way in ways)
    assert torch.equal(call(only("Sample Pairing", magnitude=magnitude), images[:1]), images[:1])


def test_the_image_to_pair_with_is_every_other_one_alike_whatever_the_order() -> None:
    examples, counts = torch.tensor([12, 3, 77, 40, 5]), torch.zeros(5, 5)
    for step in range(1000):
        u = draws.uniform(0, step, examples, 1, dtype=torch.float64)[:, 0]
        counts[torch.arange(5), randaugment._others(examples, u)] += 1
    assert (counts.diagonal() == 0).all()
    assert (counts[~torch.eye(5, dtype=torch.bool)] - 250).abs().max() < 5 * math.sqrt(1000 * 3 / 16)
    images, examples, order = pictures(32, 32).repeat(5, 1, 1, 1), torch.randperm(40) * 10**8, torch.randperm(40)
    whole = RandAugment()(images, seed=0, step=0, examples=examples)
    assert torch.equal(RandAugment()(images[order], seed=0, step=0, examples=examples[order]), whole[order])


def test_the_second_partner_is_as_it_was_given() -> None:
    images = pictures()
    rows = draws.uniform(0, 0, torch.arange(8), 9, stream=base.OPERATIONS, dtype=torch.float64)
    one, two = (images[randaugment._others(torch.arange(8), rows[:, column])] for column in (4, 8))
    got = call(only("Sample Pairing", "Sample Pairing"), images)
    assert (got.int() - (0.36 * images + 0.24 * one + 0.4 * two)).abs().max() <= 2


def test_operations_follow_each_other() -> None:
    images, found = pictures(), set()
    invert, posterize = (lambda x: 255 - x), (lambda x: x & 0b11111100)
    ways = [f(g(images)) for f in (invert, posterize) for g in (invert, posterize)]
    for step in range(4):
        for i, picture in enumerate(call(only("Invert", "Posterize", magnitude=16), images, step)):
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
