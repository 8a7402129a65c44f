"""Augmentations: every operation is Pillow's to the bit, every draw a function of (seed, step, example)."""

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

from metapl.apps.pictures import (
    CIFAR_OPERATIONS,
    SVHN_OPERATIONS,
    Chain,
    Identity,
    RandAugment,
    ResizedCrop,
    UnlabeledBatches,
    View,
    Weak,
)
from metapl.apps.pictures.views import base, randaugment
from metapl.data import draws
from metapl.data.sampler import StepSampler
from metapl.errors import MetaplError

GREY = (128, 128, 128)
MAGNITUDES = (0, 3, 9.5, 16, 27)
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
FLOWER = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)


def pictures(height: int = 33, width: int = 46, channels: int = 3) -> Tensor:
    """Pieces of a photograph, dark, bright, flat and noisy ones: (8, C, H, W) uint8."""
    generator = torch.Generator().manual_seed(0)
    pieces = [FLOWER[:, y : y + height, x : x + width] for y, x in ((180, 250), (100, 420), (250, 330))]
    noise = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    flat = torch.tensor([7, 130, 255], dtype=torch.uint8)[:, None, None].expand(3, height, width)
    whole = Image.fromarray(FLOWER.permute(1, 2, 0).numpy()).resize((width, height))
    batch = torch.stack([*pieces, noise, noise // 9 + 20, 255 - noise // 5, flat, from_pillow(whole)])
    return batch[:, :channels].contiguous()


def to_pillow(levels: Tensor) -> Image.Image:
    array = levels.permute(1, 2, 0).numpy()
    return Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])


def from_pillow(image: Image.Image) -> Tensor:
    array = torch.from_numpy(numpy.array(image))
    return array.permute(2, 0, 1) if array.ndim == 3 else array[None]


def each(function: Callable[[Image.Image], Image.Image], levels: Tensor) -> Tensor:
    return torch.stack([from_pillow(function(to_pillow(picture))) for picture in levels])


def moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    fill = GREY if image.mode == "RGB" else GREY[0]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill)


def turned(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=GREY if image.mode == "RGB" else GREY[0])


# By name: the picture that Pillow makes at a signed level.
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
    "Rotate": lambda image, level: turned(image, 30 * level),
    "ShearX": lambda image, level: moved(image, (1, 0.3 * level, 0, 0, 1, 0)),
    "ShearY": lambda image, level: moved(image, (1, 0, 0, 0.3 * level, 1, 0)),
    "TranslateX": lambda image, level: moved(image, (1, 0, level / 8 * image.width, 0, 1, 0)),
    "TranslateY": lambda image, level: moved(image, (1, 0, 0, 0, 1, level / 8 * image.height)),
}


def only(name: str, magnitude: float, **fields: Any) -> RandAugment:
    """The view that does one operation and nothing else."""
    return RandAugment(1, magnitude, operations=(name,), probability=(1, 1), cutout=0, **fields)


def call(view: View, images: Tensor, *, seed: int = 0, step: int = 0, examples: Tensor | None = None) -> Tensor:
    examples = torch.arange(len(images)) if examples is None else examples
    return view(images, seed=seed, step=step, examples=examples)


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [name for name in CIFAR_OPERATIONS if name != "Sample Pairing"])
def test_operation_is_pillows_to_the_bit(name: str, channels: int) -> None:
    images = pictures(channels=channels)
    for magnitude in MAGNITUDES:
        level = magnitude / 10
        up, down = (each(lambda image, level=sign * level: PILLOW[name](image, level), images) for sign in (1, -1))
        signs = set()
        for step in range(3):
            got = call(only(name, magnitude), images, step=step)
            for i in range(len(images)):
                matches = [torch.equal(got[i], up[i]), torch.equal(got[i], down[i])]
                assert any(matches) if name in SIGNED else matches[0], (name, magnitude, i)
                signs.add(tuple(matches))
        # Both signs are drawn, and only where there are two.
        if name in SIGNED and magnitude > 0:
            assert {(True, False), (False, True)} <= signs


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3), (32, 32), (7, 200)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    images = pictures(*size)
    for name, reference in PILLOW.items():
        got = call(only(name, 16), images)
        ways = [each(lambda image, level=level: reference(image, level), images) for level in (1.6, -1.6)]  # noqa: B023
        for i in range(len(images)):
            assert any(torch.equal(got[i], way[i]) for way in (ways if name in SIGNED else ways[:1])), (name, i)
    for view in (Weak(), RandAugment(), ResizedCrop(5)):
        assert call(view, images).shape[:2] == images.shape[:2]


@pytest.mark.parametrize("degrees", [-170, -48, -3.3, 0, 1, 30, 90])
def test_directions_of_moves(degrees: float) -> None:
    images = pictures()
    height, width = images.shape[2:]

    def ours(matrix: randaugment.Affine) -> Tensor:
        return randaugment.affine(images, torch.tensor([randaugment.fixed_point(matrix)] * len(images)))

    got = ours(randaugment.rotation(degrees, height, width))
    assert torch.equal(got, each(lambda image: turned(image, degrees), images))
    slope, move = degrees / 100, randaugment._MOVES
    sheared = ours(move["ShearX"](slope / 0.3, 1, height, width)), ours(move["ShearY"](slope / 0.3, 1, height, width))
    assert torch.equal(sheared[0], each(lambda i: moved(i, (1, slope, 0, 0, 1, 0)), images))
    assert torch.equal(sheared[1], each(lambda i: moved(i, (1, 0, 0, slope, 1, 0)), images))
    right, down = move["TranslateX"](3 / width, 1, height, width), move["TranslateY"](-2 / height, 1, height, width)
    got = randaugment.affine(ours(right), torch.tensor([randaugment.fixed_point(down)] * len(images)))
    assert torch.equal(got[:, :, :-2, 3:], images[:, :, 2:, :-3])
    assert (got[:, :, -2:] == 128).all()
    assert (got[:, :, :, :3] == 128).all()


@pytest.mark.parametrize(("magnitude", "weight"), [(0, 0.0), (5, 0.2), (10, 0.4), (16, 0.4)])
def test_sample_pairing_blends_with_another_image_of_the_batch(magnitude: float, weight: float) -> None:
    images = pictures()
    got = call(only("Sample Pairing", magnitude), images)
    for i, picture in enumerate(images):
        ways = [
            from_pillow(Image.blend(to_pillow(picture), to_pillow(other), weight))
            for j, other in enumerate(images)
            if j != i
        ]
        assert any(torch.equal(got[i], way) for way in ways)


def test_sample_pairing_draws_every_other_image_alike_and_never_itself() -> None:
    examples = torch.tensor([12, 3, 77, 40, 5])
    counts = torch.zeros(5, 5)
    for step in range(1000):
        u = draws.uniform(0, step, examples, 1, dtype=torch.float64)[:, 0]
        counts[torch.arange(5), randaugment._others(examples, u)] += 1
    assert (counts.diagonal() == 0).all()
    assert (counts[~torch.eye(5, dtype=torch.bool)] - 250).abs().max() < 5 * math.sqrt(1000 * 3 / 16)


def test_sample_pairing_of_a_lone_image_and_of_the_second_operation() -> None:
    images = pictures()
    assert torch.equal(call(only("Sample Pairing", 10), images[:1]), images[:1])
    # The partner comes from the batch as it was given, not as the first operation left it.
    twice = RandAugment(2, 10, operations=("Sample Pairing",), probability=(1, 1), cutout=0)
    got = call(twice, images).int()
    rows = draws.uniform(0, 0, torch.arange(8), 9, stream=base.OPERATIONS, dtype=torch.float64)
    other = [randaugment._others(torch.arange(8), rows[:, column]) for column in (4, 8)]
    expected = 0.36 * images + 0.24 * images[other[0]] + 0.4 * images[other[1]]
    assert (got - expected).abs().max() <= 2


def test_operations_follow_each_other() -> None:
    images = pictures()
    view = RandAugment(2, 16, operations=("Invert", "Posterize"), probability=(1, 1), cutout=0)
    invert, posterize = (lambda x: 255 - x), (lambda x: x & 0b11111100)
    ways = [f(g(images)) for f in (invert, posterize) for g in (invert, posterize)]
    found = set()
    for step in range(4):
        for i, picture in enumerate(call(view, images, step=step)):
            matches = [k for k, way in enumerate(ways) if torch.equal(picture, way[i])]
            assert matches
            found.update(matches[:1])
    assert len(found) >= 3


def test_cutout_is_a_grey_square_lost_outside_the_image() -> None:
    images = torch.zeros(2000, 1, 12, 20, dtype=torch.uint8)
    got = call(RandAugment(1, 0, operations=("Rotate",), cutout=5), images)[:, 0]
    assert set(got.unique().tolist()) == {0, 128}
    rows, cols = (got == 128).any(2), (got == 128).any(1)
    assert torch.equal(got == 128, rows[:, :, None] & cols[:, None, :])
    # A centre on each pixel alike, with two pixels to either side.
    for hit, side in ((rows, 12), (cols, 20)):
        window = torch.arange(side)
        squares = {tuple(((window - c).abs() <= 2).tolist()): c for c in range(side)}
        counts = torch.zeros(side)
        for row in hit.tolist():
            counts[squares[tuple(row)]] += 1
        assert (counts - 2000 / side).abs().max() < 5 * math.sqrt(2000 / side)
    even = call(RandAugment(1, 0, operations=("Rotate",), cutout=4), images)[:, 0]
    assert (even == 128).sum((1, 2)).max() == 16
    assert (call(RandAugment(1, 0, operations=("Rotate",), cutout=100), images) == 128).all()


# --- weak views -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_weak_is_a_window_of_the_padded_image(flip: bool, dtype: torch.dtype) -> None:
    image = pictures(9, 7)[0].to(dtype)
    batch = 2000
    got = call(Weak(pad=2, flip=flip, fill=0.5), image.expand(batch, -1, -1, -1))
    fill = 128 if dtype == torch.uint8 else 0.5
    ways: dict[bytes, int] = {}
    for mirrored in (image, image.flip(2)) if flip else (image,):
        padded = torch.nn.functional.pad(mirrored, (2, 2, 2, 2), value=fill)
        for y in range(5):
            for x in range(5):
                ways[padded[:, y : y + 9, x : x + 7].numpy().tobytes()] = 0
    for picture in got:
        ways[picture.numpy().tobytes()] += 1
    counts = torch.tensor(list(ways.values()))
    assert len(counts) == (50 if flip else 25)
    assert (counts - batch / len(counts)).abs().max() < 5 * math.sqrt(batch / len(counts))


def test_weak_off_changes_nothing() -> None:
    images = pictures()
    assert torch.equal(call(Weak(pad=0, flip=False), images), images)


def test_resized_crop_is_pillows_resize_of_a_box() -> None:
    images = pictures(60, 90)
    view = ResizedCrop(24, flip=False)
    boxes, _ = view.boxes(0, 0, torch.arange(8), 60, 90)
    got = call(view, images)
    for picture, box, result in zip(images, boxes.tolist(), got, strict=True):
        top, left, height, width = box
        crop = to_pillow(picture[:, top : top + height, left : left + width])
        expected = from_pillow(crop.resize((24, 24), Image.Resampling.BILINEAR))
        # Pillow rounds between its two passes and has weights of eight bits.
        assert (result.int() - expected.int()).abs().max() <= 1
    half = call(view, images.float() / 255)
    assert (255 * half - got.float()).abs().max() <= 0.5001
    assert half.min() >= 0
    assert half.max() <= 1 + 1e-6
    assert call(Chain((view, RandAugment())), torch.ones(2, 3, 60, 90)).max() <= 1


@pytest.mark.parametrize("size", [(60, 90), (60, 60), (10, 200), (200, 10), (1, 1)])
def test_boxes_fit_and_have_the_shares_asked_for(size: tuple[int, int]) -> None:
    height, width = size
    examples = torch.arange(4000)
    boxes, flips = ResizedCrop(24).boxes(0, 0, examples, height, width)
    top, left, h, w = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (h > 0).all()
    assert (w > 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    assert abs(flips.double().mean() - 0.5) < 0.04
    if min(size) >= 60:
        area, ratio = h * w / (height * width), w / h
        assert 0.07 < area.min() < 0.1
        assert area.max() > 0.85
        assert 0.7 < ratio.min() < 0.78
        assert 1.28 < ratio.max() < 1.42
    if height == width == 60:
        # Near 1, most ratios do not fit; up to there the area is uniform.
        small = area[area < 0.5]
        assert abs(small.mean() - 0.29) < 0.01
        assert abs(ratio.log().mean()) < 0.02
        assert abs((top / (height - h).clamp(min=1)).mean() - 0.5) < 0.03


def test_resized_crop_of_the_whole_is_the_image() -> None:
    images = pictures(32, 32)
    got = call(ResizedCrop(32, scale=(1, 1), ratio=(1, 1), flip=False), images)
    assert torch.equal(got, images)
    mirrored = call(ResizedCrop(32, scale=(1, 1), ratio=(1, 1)), images.repeat(4, 1, 1, 1))
    kinds = {torch.equal(a, b) for a, b in zip(mirrored, images.repeat(4, 1, 1, 1), strict=True)}
    assert kinds == {False, True}


# --- draws ------------------------------------------------------------------------------------------------------------

SOLO: dict[str, View] = {
    "weak": Weak(),
    "resized_crop": ResizedCrop(20),
    "svhn": RandAugment(operations=SVHN_OPERATIONS),
    "moves": RandAugment(3, operations=SIGNED, probability=(1, 1)),
    "chain": Chain((Weak(), RandAugment(operations=SVHN_OPERATIONS), Weak())),
}


@pytest.mark.parametrize("name", SOLO)
def test_the_rest_of_the_batch_and_its_order_do_not_matter(name: str) -> None:
    view, images = SOLO[name], pictures(32, 32).repeat(5, 1, 1, 1).float() / 255
    examples = torch.randint(0, 10**9, (40,), generator=torch.Generator().manual_seed(1))
    whole = call(view, images, examples=examples)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(call(view, images[order], examples=examples[order]), whole[order])
    for chosen in ([3], [0, 7, 9], [39, 38]):
        assert torch.equal(call(view, images[chosen], examples=examples[chosen]), whole[chosen])
    assert call(view, images[:0], examples=examples[:0]).shape[0] == 0


def test_with_sample_pairing_the_order_does_not_matter() -> None:
    images = pictures(32, 32).repeat(5, 1, 1, 1)
    examples = torch.randint(0, 10**9, (40,), generator=torch.Generator().manual_seed(1))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    whole = call(RandAugment(), images, examples=examples)
    assert torch.equal(call(RandAugment(), images[order], examples=examples[order]), whole[order])


@pytest.mark.parametrize("name", SOLO)
def test_seed_step_and_example_each_change_the_draws(name: str) -> None:
    view, images = SOLO[name], pictures(32, 32)[:1].repeat(8, 1, 1, 1)
    state = torch.get_rng_state()
    first = call(view, images)
    assert torch.equal(call(view, images), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({picture.numpy().tobytes() for picture in first}) > 5
    others = [call(view, images, seed=1), call(view, images, step=1), call(view, images, examples=torch.arange(8, 16))]
    for other in others:
        assert sum(torch.equal(a, b) for a, b in zip(first, other, strict=True)) <= 2


def test_operations_and_their_taking_place_are_drawn_uniformly() -> None:
    batch = 60_000
    view = RandAugment(2, probability=(0.2, 0.8), operations=SVHN_OPERATIONS[:9])
    counts, _ = view._plan(0, 0, torch.arange(batch), 8, 8)
    for idle, *each_operation in counts:
        assert abs(idle - batch / 2) < 5 * math.sqrt(batch / 4)
        assert len(each_operation) == 9
        assert max(abs(count - batch / 18) for count in each_operation) < 5 * math.sqrt(batch / 18)
    # p is one per image: with p uniform on (0.2, 0.8), both take place with probability E[p²] = 0.28, not 0.25.
    images = torch.zeros(batch, 1, 1, 2, dtype=torch.uint8)
    twice = call(RandAugment(2, operations=("Invert",), cutout=0), images)
    once = (twice == 255).double().mean()
    assert abs(once - 2 * (0.5 - 0.28)) < 5 * math.sqrt(0.25 / batch)


def test_all_or_nothing_takes_place() -> None:
    images = pictures()
    assert torch.equal(call(RandAugment(probability=(0, 0), cutout=0), images), images)
    assert torch.equal(call(RandAugment(1, operations=("Invert",), probability=(1, 1), cutout=0), images), 255 - images)


def test_links_of_a_chain_draw_apart() -> None:
    images = pictures(32, 32)[:1].repeat(32, 1, 1, 1)
    twice = call(Chain((Weak(flip=False, fill=0), Weak(flip=False, fill=0))), images)
    same = call(Weak(flip=False, fill=0), call(Weak(flip=False, fill=0), images))
    assert not torch.equal(twice, same)
    assert call(Chain(()), images) is images
    assert torch.equal(call(Chain((Identity(),)), images), images)


def test_lists_are_the_papers() -> None:
    assert len(set(CIFAR_OPERATIONS)) == 15
    assert len(SVHN_OPERATIONS) == 12
    assert set(CIFAR_OPERATIONS) - set(SVHN_OPERATIONS) == {"Sample Pairing", "Rotate", "TranslateX"}
    assert RandAugment().level == 1.6


# --- kinds of images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_images_give_the_levels_of_uint8(dtype: torch.dtype) -> None:
    levels = pictures(32, 32)
    images = (levels.double() / 255).to(dtype)
    for view in (RandAugment(), RandAugment(3, 3)):
        got = call(view, images)
        assert got.dtype == dtype
        assert got.min() >= 0
        assert got.max() <= 1
        assert torch.equal(got, (call(view, levels).double() / 255).to(dtype))
    assert call(Weak(), images).dtype == dtype
    assert call(ResizedCrop(8), images).dtype == dtype


def test_memory_format_does_not_matter_and_the_input_stays() -> None:
    levels = pictures(32, 32)
    for view in (Weak(), RandAugment(), ResizedCrop(16)):
        before = levels.clone()
        got = call(view, levels)
        assert torch.equal(levels, before)
        assert torch.equal(call(view, levels.to(memory_format=torch.channels_last)), got)


def test_views_serve_the_batches() -> None:
    images = pictures(32, 32).float() / 255
    strong = Chain((Weak(), RandAugment(), Weak()))
    batches = UnlabeledBatches(images, StepSampler(8, 20, seed=0), Weak(), strong, seed=0)
    weak, changed = batches[3]
    assert weak.shape == changed.shape == (20, 3, 32, 32)
    assert torch.equal(batches[3][1], changed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same_bits_without_a_synchronisation() -> None:
    images = pictures(32, 32).repeat(8, 1, 1, 1)
    view = Chain((Weak(), RandAugment(), Weak()))
    expected = call(view, images)
    on_device = images.cuda()
    call(view, on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call(view, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Weak(pad=-1), "0 or more"),
        (lambda: ResizedCrop(0), r"size=0\): expected .*1 or more"),
        (lambda: ResizedCrop(8, scale=(0.5, 0.2)), "smallest <= largest"),
        (lambda: ResizedCrop(8, scale=(0, 1)), r"number in \(0, 1\]"),
        (lambda: ResizedCrop(8, ratio=(2, 1)), "smallest <= largest"),
        (lambda: RandAugment(0), "1 or more"),
        (lambda: RandAugment(magnitude=-1), "0 or more"),
        (lambda: RandAugment(scale=0), "above 0"),
        (lambda: RandAugment(cutout=-1), "0 or more"),
        (lambda: RandAugment(operations=("Solarise",)), "Solarise.*expected one or more of"),
        (lambda: RandAugment(operations=()), "one or more"),
        (lambda: RandAugment(probability=(0.5, 1.1)), r"number in \[0, 1\]"),
        (lambda: call(RandAugment(), torch.rand(2, 4, 8, 8)), "4 channels"),
        (lambda: call(RandAugment(), torch.randn(2, 3, 8, 8)), "normalise after"),
        (lambda: call(RandAugment(), torch.full((2, 3, 8, 8), math.nan)), "nan"),
        (lambda: call(Weak(), torch.rand(2, 8, 8)), "channel is missing"),
        (lambda: call(Weak(), torch.zeros(2, 3, 8, 8, dtype=torch.int64)), "uint8"),
        (lambda: call(ResizedCrop(8), torch.rand(2, 3, 8, 8), examples=torch.arange(3)), "for 2 images"),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(MetaplError, match=message):
        make()


# --- planted faults ---------------------------------------------------------------------------------------------------

Fault = Callable[[pytest.MonkeyPatch], None]


def _wrapped(name: str, change: Callable[..., Any]) -> Fault:
    room = base if hasattr(base, name) else randaugment
    real = getattr(room, name)
    return lambda patch: patch.setattr(room, name, lambda *arguments: change(real, *arguments))


def _instead(table: dict[str, Any], name: str, change: Callable[..., Any]) -> Fault:
    real = table[name]
    return lambda patch: patch.setitem(table, name, lambda *arguments: change(real, *arguments))


def _plan_by_place(patch: pytest.MonkeyPatch) -> None:
    real = RandAugment._plan
    patch.setattr(
        RandAugment, "_plan", lambda self, seed, step, e, h, w: real(self, seed, step, torch.arange(len(e)), h, w)
    )


def _by_name(name: str) -> Callable[[], None]:
    return lambda: test_operation_is_pillows_to_the_bit(name, 3)


FAULTS: dict[str, tuple[Fault, Callable[[], None]]] = {
    "blend_reversed": (_wrapped("blend", lambda real, a, b, w: real(b, a, w)), _by_name("Brightness")),
    "blend_rounded": (
        _wrapped("blend", lambda real, a, b, w: (a + w * (b.float() - a)).clamp(0, 255).round().to(torch.uint8)),
        _by_name("Color"),
    ),
    "luma_is_the_mean": (
        _wrapped("_luma", lambda real, x: x.float().mean(1, keepdim=True).round().to(torch.uint8)),
        _by_name("Contrast"),
    ),
    "threshold_included": (
        _instead(randaugment._RECOLORS, "Solarize", lambda real, x, level: real(x, level + 1 / 256)),
        _by_name("Solarize"),
    ),
    "one_bit_less": (
        _instead(randaugment._RECOLORS, "Posterize", lambda real, x, level: real(x, level - 1 / 4)),
        _by_name("Posterize"),
    ),
    "rotated_the_other_way": (
        _wrapped("rotation", lambda real, degrees, h, w: real(-degrees, h, w)),
        lambda: test_directions_of_moves(30),
    ),
    "rotated_about_a_pixel": (
        _wrapped("rotation", lambda real, degrees, h, w: real(degrees, h - 1, w - 1)),
        _by_name("Rotate"),
    ),
    "sheared_the_other_way": (
        _instead(randaugment._MOVES, "ShearX", lambda real, level, *rest: real(-level, *rest)),
        lambda: test_directions_of_moves(30),
    ),
    "pixels_at_their_corners": (
        _wrapped("fixed_point", lambda real, m: [math.floor(v * 65536 + 0.5) for v in m]),
        _by_name("ShearX"),
    ),
    "axes_swapped": (
        _instead(randaugment._MOVES, "TranslateX", lambda real, *given: randaugment._MOVES["TranslateY"](*given)),
        _by_name("TranslateX"),
    ),
    "sign_never_drawn": (
        _instead(randaugment._MOVES, "ShearY", lambda real, level, *rest: real(abs(level), *rest)),
        _by_name("ShearY"),
    ),
    "square_off_by_one": (
        _wrapped("cutout", lambda real, x, c, side, fill: real(x, c + 1, side, fill)),
        test_cutout_is_a_grey_square_lost_outside_the_image,
    ),
    "square_black": (
        lambda patch: patch.setattr(base, "GREY", 0),
        test_cutout_is_a_grey_square_lost_outside_the_image,
    ),
    "paired_with_itself": (
        lambda patch: patch.setattr(randaugment, "_others", lambda examples, u: torch.arange(len(examples))),
        lambda: test_sample_pairing_blends_with_another_image_of_the_batch(10, 0.4),
    ),
    "paired_by_place": (
        lambda patch: patch.setattr(randaugment, "_others", lambda examples, u: torch.arange(len(examples)).roll(1)),
        test_with_sample_pairing_the_order_does_not_matter,
    ),
    "draws_by_place": (
        _plan_by_place,
        lambda: test_the_rest_of_the_batch_and_its_order_do_not_matter("svhn"),
    ),
    "never_mirrored": (
        _wrapped("crop_flip", lambda real, x, offsets, flip, fill: real(x, offsets, flip & False, fill)),
        lambda: test_weak_is_a_window_of_the_padded_image(True, torch.uint8),
    ),
    "mirrored_after_the_cut": (
        _wrapped(
            "crop_flip",
            lambda real, x, offsets, flip, fill: real(x, offsets.clamp(min=0), flip, fill),
        ),
        lambda: test_weak_is_a_window_of_the_padded_image(True, torch.uint8),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = FAULTS[fault]
    check()
    plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        check()
