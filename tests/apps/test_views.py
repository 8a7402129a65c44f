"""Views: a picture's view is a function of (seed, step, example) and of nothing else.

Each is beside a slow reference, and how often its outcomes are drawn; RandAugment: operations are
Pillow's to the bit, draws those of the papers.
"""

import itertools
import math
import pickle
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2

from metapl.data import draws
from metapl.errors import MetaplError
from metapl.pictures import (
    CIFAR_OPERATIONS,
    SVHN_OPERATIONS,
    Affine,
    Chain,
    Color,
    Flip,
    Hole,
    Identity,
    RandAugment,
    Recolor,
    ResizedCrop,
    Seeded,
    ShiftNoiseCutout,
    Sometimes,
    View,
    Weak,
)
from metapl.pictures.views import base

FLOWER = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
STRONG = Chain(
    (Flip(), Affine(25, 0.2, (0.7, 1.4), 15), Color(0.4, 0.5, 0.6, 0.3), Hole((0.2, 0.6)))
)


def from_all_generators(image: Tensor) -> Tensor:
    return image + torch.rand(()) + random.random() + float(np.random.rand())  # noqa: NPY002


VIEWS: dict[str, View] = {
    "weak": Weak(),
    "resized crop": ResizedCrop(20),
    "svhn": RandAugment(operations=SVHN_OPERATIONS),
    "moves": RandAugment(3, operations=CIFAR_OPERATIONS[-5:], probability=(1, 1)),
    "weak and svhn": Chain((Weak(), RandAugment(operations=SVHN_OPERATIONS), Weak())),
    "digits": ShiftNoiseCutout(cutout=1),
    "affine": Affine(25, 0.2, (0.7, 1.4), 15),
    "affine, far": Affine(180, 1.5, (0.2, 3), 60),
    "affine, of another size": Affine(25, 0.2, (0.7, 1.4), flip=True, side=24),
    "until": base.Until(1, Affine(25, 0.2), Flip()),
    "color": Color(0.4, 0.5, 0.6, 0.3),
    "contrast": Color(contrast=1),
    "hole": Hole((0, 1)),
    "flip": Flip(),
    "recolor": Recolor(),
    "strong": STRONG,
    "sometimes": Sometimes(STRONG, 0.8),
    "sometimes, or another": Sometimes(STRONG, 0.5, otherwise=Chain((Flip(), Affine(25, 0.2)))),
    "torchvision": Seeded(
        v2.Compose([v2.RandomAffine(25, (0.1, 0.1)), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)])
    ),
    "torchvision's crop": Seeded(v2.RandomResizedCrop(12, antialias=True)),
    "all generators": Seeded(from_all_generators),
}
FEW = {"flip": 2, "recolor": 7}  # how many views a picture has at least
USUAL = (torch.float32, torch.uint8)
SHAPES = [(3, 32, 32), (1, 28, 28), (3, 17, 30), (3, 1, 1)]
KINDS = [
    pytest.param(
        name, dtype, id=f"{name}-{str(dtype)[6:]}", marks=[pytest.mark.long] * (dtype not in USUAL)
    )
    for name, view in VIEWS.items()
    for dtype in (base.WIDE if isinstance(view, Chain | Seeded | base.Until) else view.takes)
]


def pictures(
    count: int, shape: tuple[int, int, int] = (3, 32, 32), dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return pieces of a photograph and noise, a white and a black picture."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 200, (count, 2), generator=generator).tolist()
    pieces = torch.stack(
        [FLOWER[: shape[0], y : y + shape[1], x : x + shape[2]] for y, x in corners]
    )
    pieces[1::2] = torch.randint(0, 256, pieces.shape, generator=generator, dtype=torch.uint8)[1::2]
    pieces[2:3], pieces[3:4] = 255, 0
    return (pieces.double() / 255).to(dtype) if dtype.is_floating_point else pieces


def call(
    view: View, images: Tensor, *, seed: int = 0, step: int = 0, examples: Tensor | None = None
) -> Tensor:
    return view(
        images,
        seed=seed,
        step=step,
        examples=torch.arange(len(images)) if examples is None else examples,
    )


# Pixels of the strong view, and the mean of each picture, as version 0.3.0 first had them.
FIRST_VIEWS = {
    1: (
        [0.6594914, 0.1259751, 0.3615691, 0.5028706, 0.3043721, 0.2142657],
        [0.5640311, 0.3846514],
    ),
    3: (
        [0.6042307, 1.0, 0.9971055, 0.2213605, 0.395758, 0.2881144],
        [0.5424427, 0.3478890],
    ),
}


@pytest.mark.parametrize("channels", FIRST_VIEWS)
def test_views_stay_as_they_were(channels: int) -> None:
    """A run that is resumed goes on with the views that it began with."""
    places = torch.arange(2 * channels * 20 * 20).view(2, channels, 20, 20)
    images = (places * 37 % 256) / 255
    seen = call(STRONG, images, seed=2**63 + 5, step=77, examples=torch.tensor([3, 7919]))
    pixels, means = FIRST_VIEWS[channels]
    assert seen[:, -1, 4, 5::5].flatten().tolist() == pytest.approx(pixels, abs=1e-5)
    assert seen.mean((1, 2, 3)).tolist() == pytest.approx(means, abs=1e-5)


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_a_view_depends_on_seed_step_and_example_alone(name: str, dtype: torch.dtype) -> None:
    view = VIEWS[name]
    for shape in SHAPES[
        : 1
        if isinstance(view, Seeded) or dtype.itemsize == 2
        else 4
        if dtype == torch.float32
        else 2
    ]:
        images = pictures(10, shape, dtype)
        examples = draws.bits(0, 0, torch.arange(10), 1)[:, 0].abs() >> 20
        before, where = images.clone(), {"seed": 3, "step": 9}
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
        states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
        whole = call(view, images, **where, examples=examples)
        # Neither the rest of the batch nor its order, layout or default generators matter, and all
        # are left alone.
        alone = [call(view, images[[i]], **where, examples=examples[[i]]) for i in range(10)]
        assert torch.equal(torch.cat(alone), whole)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), str(np.random.get_state())) == states[1:]  # noqa: NPY002
        torch.manual_seed(2), random.seed(2), np.random.seed(2)  # noqa: NPY002
        for chosen in (torch.randperm(10), torch.tensor([0, 7, 9]), torch.tensor([5, 5])):
            assert torch.equal(
                call(view, images[chosen], **where, examples=examples[chosen]), whole[chosen]
            )
        assert torch.equal(
            call(view, images.to(memory_format=torch.channels_last), **where, examples=examples),
            whole,
        )
        wider = torch.cat([images, images], dim=3)[..., : shape[2]]
        assert torch.equal(call(view, wider, **where, examples=examples), whole)
        assert len(call(view, images[:0], examples=examples[:0])) == 0
        assert torch.equal(images, before)
        assert whole.dtype == dtype


@pytest.mark.parametrize("name", VIEWS)
def test_seed_step_and_example_each_change_the_draws(name: str) -> None:
    view, images = VIEWS[name], pictures(1).expand(16, -1, -1, -1)
    first = call(view, images)
    assert len({picture.numpy().tobytes() for picture in first}) >= FEW.get(name, 10)
    for other in ({"seed": 1}, {"step": 1}, {"examples": torch.arange(16, 32)}):
        same = [torch.equal(a, b) for a, b in zip(first, call(view, images, **other), strict=True)]
        assert sum(same) <= (14 if name in FEW else 4)


@pytest.mark.parametrize(
    "name", [name for name, view in VIEWS.items() if not isinstance(view, Seeded)]
)
def test_threads_do_not_matter(name: str) -> None:
    """Of a picture alone, sums are split among threads as well."""
    images, threads, found = pictures(4, (3, 224, 160)), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            alone = [call(VIEWS[name], images[[i]], examples=torch.tensor([i])) for i in range(4)]
            found += [call(VIEWS[name], images), torch.cat(alone)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], one) for one in found[1:])


@pytest.mark.parametrize(
    ("name", "dtype"), [k for k in KINDS if k.values[0] not in ("digits", "all generators")]
)
def test_values_stay_in_their_range_and_types_agree(name: str, dtype: torch.dtype) -> None:
    view, most = VIEWS[name], 1 if dtype.is_floating_point else 255
    for shape in SHAPES[: 1 if isinstance(view, Seeded) else None]:
        got, images = call(view, pictures(12, shape, dtype)), pictures(12, shape)
        # A resized picture may exceed 1 by a rounding.
        assert 0 <= got.min() <= got.max() <= most + 1e-6
        assert call(view, torch.full_like(pictures(12, shape, dtype), most)).max() <= most + 1e-6
        # At the edge of a reflection, or in noise, float32 shows.
        if dtype in (
            torch.float64,
            torch.uint8,
        ):
            off = (got.double() / most - call(view, images)).abs()
            assert off.quantile(0.999) < (1e-4 if most == 1 else 0.5001 / 255)


OFF = [
    Weak(pad=0, flip=False),
    ResizedCrop(32, scale=(1, 1), ratio=(1, 1), flip=False),
    ShiftNoiseCutout(0, 0.0, 0),
]
OFF += [RandAugment(probability=(0, 0), cutout=0), Affine(), Color(), Hole((0, 0)), Identity()]
OFF += [Chain(()), Sometimes(STRONG, 0)]


@pytest.mark.parametrize("view", OFF, ids=repr)
def test_a_view_that_changes_nothing_gives_the_pictures(view: View) -> None:
    assert torch.equal(call(view, pictures(16)), pictures(16))


def test_links_of_a_chain_and_numbers_of_one_picture_are_drawn_apart() -> None:
    images, move = pictures(1).expand(32, -1, -1, -1), Weak(flip=False)
    assert not torch.equal(call(Chain((move, move)), images), call(move, call(move, images)))
    streams = [(base.AFFINE, 5), (base.COLOR, 4), (base.HOLE, 4), (base.FLIP, 2), (base.RECOLOR, 4)]
    columns = [
        draws.uniform(0, 0, torch.arange(20_000), count, stream=stream) for stream, count in streams
    ]
    assert (torch.corrcoef(torch.cat(columns, dim=1).T) - torch.eye(19)).abs().max() < 0.04


def test_seeded_gives_what_the_transform_gives_when_it_is_seeded_alone() -> None:
    images, jitter = pictures(3), v2.ColorJitter(0.5)
    with torch.random.fork_rng([]):
        torch.manual_seed(
            int(draws.bits(3, 5, torch.tensor([1]), 1, stream=base.SEEDED)[0, 0]) & 0xFFFFFFFF
        )
        expected = jitter(images[1])
    for view in (Seeded(jitter), pickle.loads(pickle.dumps(Seeded(jitter)))):
        assert torch.equal(call(view, images, seed=3, step=5)[1], expected)

    def fail(image: Tensor) -> Tensor:
        torch.rand(3), random.random()
        raise ValueError

    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(ValueError):  # noqa: PT011  # the transform's own
        call(Seeded(fail), pictures(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


REFUSED: list[tuple[Any, dict[str, Any], str, tuple[Any, ...]]] = [
    *(
        (Weak, {}, "pad", (-1,)),
        (ResizedCrop, {}, "size", (0,)),
        (ResizedCrop, {"size": 8}, "ratio", ((2, 1), (0, 1))),
    ),
    *(
        (ResizedCrop, {"size": 8}, "scale", ((0.5, 0.2), (0, 1))),
        (ShiftNoiseCutout, {}, "noise", (-0.1,)),
    ),
    *(
        (RandAugment, {}, name, (value,))
        for name, value in (("n", 0), ("magnitude", -1), ("scale", 0), ("cutout", -1))
    ),
    (RandAugment, {}, "operations", (("Solarise",), ())),
    (RandAugment, {}, "probability", ((0.5, 1.1), (0.8, 0.2))),
    *(
        (Affine, {}, "degrees", (-1, 181, math.nan)),
        (Affine, {}, "translate", (-0.1,)),
        (Affine, {}, "shear", (90,)),
    ),
    (Affine, {}, "scale", ((0, 1), (1.2, 1), 1.2, (1, math.inf))),
    *(
        (Color, {}, "brightness", (-0.1,)),
        (Color, {}, "contrast", (math.inf,)),
        (Color, {}, "hue", (0.6,)),
    ),
    (Hole, {}, "side", ((0.5, 0.2), (-0.5, 0.2), 0.5)),
    (Sometimes, {"view": Flip()}, "share", (1.1,)),
]


def test_a_field_out_of_range_is_refused() -> None:
    for kind, others, field, values in REFUSED:
        for value in values:
            with pytest.raises(MetaplError, match=field):
                kind(**others, **{field: value})


@pytest.mark.parametrize(
    "name", [name for name, view in VIEWS.items() if not isinstance(view, Chain | base.Until)]
)
def test_images_of_another_kind_are_refused(name: str) -> None:
    view, images = VIEWS[name], pictures(4)
    wrong = [images.long(), images[:, 0], torch.rand(4, 4, 8, 8) if view.is_colored else images[0]]
    wrong += [images - 2] * view.is_colored + [images.byte()] * (torch.uint8 not in view.takes)
    for image in wrong:
        with pytest.raises(MetaplError, match=type(view).__name__):
            call(view, image)
    with pytest.raises(MetaplError, match="examples"):
        call(view, images, examples=torch.arange(3))


def test_a_cutout_fits_into_the_digits_and_a_number_that_is_none_is_no_color() -> None:
    for view, images, word in (
        (ShiftNoiseCutout(cutout=9), torch.rand(3, 1, 8, 8), "cutout"),
        (RandAugment(), torch.full((2, 3, 8, 8), math.nan), "nan"),
    ):
        with pytest.raises(MetaplError, match=word):
            call(view, images)


def drawn(count: int, each: int, stream: int) -> Tensor:
    """Return what a view draws for examples 0, 1, … at seed 0 and step 0."""
    return draws.uniform(0, 0, torch.arange(count), each, stream=stream, dtype=torch.float64)


def is_drawn_alike(got: Tensor, ways: list[Tensor], shares: list[float] | None = None) -> bool:
    """Return whether each picture is one of the ways, each of which comes as often as its share.

    Chi², within 4 deviations.
    """
    counts = torch.stack([(got == way).flatten(1).all(1).sum() for way in ways])
    expected = len(got) * torch.tensor(shares or [1 / len(ways)] * len(ways))
    off = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return int(counts.sum()) == len(got) and bool(
        off <= len(ways) - 1 + 4 * math.sqrt(2 * len(ways))
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_weak_is_a_window_of_the_padded_image_or_of_its_mirror_image(dtype: torch.dtype) -> None:
    image, grey = pictures(1, (3, 9, 7), dtype), 128 if dtype == torch.uint8 else 128 / 255
    for flip in (False, True):
        got = call(Weak(pad=2, flip=flip), image.expand(2000, -1, -1, -1))
        padded = [pad(x, (2, 2, 2, 2), value=grey) for x in (image, image.flip(3))]
        places = itertools.product(padded[: 1 + flip], range(5), range(5))
        assert is_drawn_alike(
            got, [x[:, :, top : top + 9, left : left + 7] for x, top, left in places]
        )
    image = image[..., :7, :]
    for view in (ResizedCrop(7, scale=(1, 1), ratio=(1, 1)), Flip())[: 1 + dtype.is_floating_point]:
        assert is_drawn_alike(call(view, image.expand(2000, -1, -1, -1)), [image, image.flip(3)])


def test_the_digits_are_moved_by_whole_pixels_get_noise_and_then_lose_one_square() -> None:
    image, n = 0.1 + 0.9 * pictures(1, (2, 5, 7)), 2000
    shifted = call(ShiftNoiseCutout(2, noise=0.0, cutout=0), image.expand(n, -1, -1, -1))
    padded = pad(image, (2, 2, 2, 2))
    places = itertools.product(range(5), range(5))
    assert is_drawn_alike(
        shifted, [padded[:, :, top : top + 5, left : left + 7] for top, left in places]
    )
    squares = []
    for top, left in itertools.product(range(4), range(6)):
        squares.append(image.clone())
        squares[-1][:, :, top : top + 2, left : left + 2] = 0
    assert is_drawn_alike(call(ShiftNoiseCutout(0, 0.0, 2), image.expand(n, -1, -1, -1)), squares)
    # After the noise.
    assert ((call(ShiftNoiseCutout(0, 0.2, 3), pictures(50)) == 0).sum((1, 2, 3)) >= 27).all()
    noise = call(ShiftNoiseCutout(0, 0.3, 0), torch.zeros(500, 3, 8, 8))
    assert noise.mean().item() == pytest.approx(0.0, abs=4 * 0.3 / math.sqrt(noise.numel()))
    assert noise.std().item() == pytest.approx(0.3, rel=0.01)
    # Channels share none.
    assert torch.corrcoef(noise[:, :2].transpose(0, 1).flatten(1))[0, 1].abs() < 0.03


def test_resized_crop_is_pillows_resize_of_a_box() -> None:
    images, view = pictures(8, (3, 60, 90), torch.uint8), ResizedCrop(24, flip=False)
    got = call(view, images)
    for picture, box, result in zip(
        images, view.boxes(0, 0, torch.arange(8), 60, 90)[0].tolist(), got, strict=True
    ):
        top, left, height, width = box
        crop = to_pillow(picture[:, top : top + height, left : left + width])
        expected = from_pillow(crop.resize((24, 24), 2))  # bilinearly
        # Pillow rounds in between, and has weights of 8 bits.
        assert (result.int() - expected.int()).abs().max() <= 1
    assert (255 * call(view, images.float() / 255) - got.float()).abs().max() <= 0.5001


@pytest.mark.parametrize("size", [(60, 60), (10, 200), (1, 1)])
def test_boxes_fit_and_have_the_shares_asked_for(size: tuple[int, int]) -> None:
    height, width = size
    boxes, flips = ResizedCrop(24).boxes(0, 0, torch.arange(4000), height, width)
    top, left, h, w = boxes.T
    assert (
        min(
            top.min(),
            left.min(),
            h.min() - 1,
            w.min() - 1,
            height - (top + h).max(),
            width - (left + w).max(),
        )
        >= 0
    )
    assert abs(flips.double().mean() - 0.5) < 0.04
    area, ratio = h * w / (height * width), w / h
    if height == width == 60:  # near 1, most ratios do not fit; up to there the area is uniform
        assert 0.07 < area.min() < 0.1 < 0.85 < area.max()
        assert 0.7 < ratio.min() < 0.78 < 1.28 < ratio.max() < 1.42
        assert abs(area[area < 0.5].mean() - 0.29) < 0.01
        assert abs(ratio.log().mean()) < 0.02
        assert abs((top / (height - h).clamp(min=1)).mean() - 0.5) < 0.03


def test_affine_mirrors_and_resizes_in_one_sampling() -> None:
    images = pictures(32, (3, 32, 48))
    resized = torch.nn.functional.interpolate(images, (24, 24), mode="bilinear")
    torch.testing.assert_close(call(Affine(side=24), images), resized)
    both = call(Affine(flip=True, side=24), images)
    is_mirrored = (both - resized.flip(3)).flatten(1).abs().amax(1) < 1e-5
    torch.testing.assert_close(both[~is_mirrored], resized[~is_mirrored])
    assert 8 < int(is_mirrored.sum()) < 24


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_affine_is_scipys_resampling_of_the_moved_places(shape: tuple[int, int, int]) -> None:
    """By the matrix and the moves of torchvision's affine.

    Outside of a picture its nearest edge is repeated.
    """
    images, (_, height, width) = pictures(32, shape), shape
    for view in (Affine(25, 0.2, (0.7, 1.4), 15), Affine(180, 1.2, (0.3, 2), 50)):
        numbers = drawn(32, 5, base.AFFINE).numpy()
        theta, phi, right, down = (2 * numbers[:, [0, 1, 3, 4]] - 1).T * np.array(
            [
                [np.radians(view.degrees)],
                [np.radians(view.shear)],
                [view.translate * width],
                [view.translate * height],
            ]
        )
        scale = view.scale[0] + (view.scale[1] - view.scale[0]) * numbers[:, 2]
        for i, got in enumerate(call(view, images.double())):
            cos, sin, slope = math.cos(theta[i]), math.sin(theta[i]), math.tan(phi[i])
            inverse = np.linalg.inv(
                scale[i] * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, -slope], [0, 1]])
            )
            rows, cols = np.mgrid[:height, :width]
            places = (
                np.stack([cols - (width - 1) / 2 - right[i], rows - (height - 1) / 2 - down[i]], -1)
                @ inverse.T
            )
            places = (places + np.array([(width - 1) / 2, (height - 1) / 2]))[..., ::-1].transpose(
                2, 0, 1
            )
            for image, channel in zip(images[i].double().numpy(), got.numpy(), strict=True):
                assert (
                    np.abs(channel - map_coordinates(image, places, order=1, mode="nearest")).max()
                    < 1e-6
                )


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
            images.double().numpy(),
            call(view, images),
            low + (1 + ranges - low) * u[:, :3],
            u[:, 3],
            strict=True,
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
    for image, got, (size, row, column, _) in zip(
        images, call(Hole((0.3, 0.9)), images), numbers, strict=True
    ):
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
    assert all(
        torch.equal(a, b) or torch.equal(a, 1 - b) for a, b in zip(changed, grey, strict=True)
    )


def test_a_share_of_the_pictures_is_changed_and_the_others_stay() -> None:
    images, view = pictures(8, (3, 16, 16))[4:].repeat(128, 1, 1, 1), Affine(25, 0.2)
    changed = call(view, images, seed=draws.fold_in(0, 0))
    got = call(Sometimes(view, 0.25), images)
    is_changed, stays = ((got == one).flatten(1).all(1) for one in (changed, images))
    assert bool((is_changed | stays).all())
    assert is_changed.double().mean() == pytest.approx(0.25, abs=0.06)
    # The same pictures are changed where the others do not stay.
    second_view = Affine(40, 0.1)
    got = call(Sometimes(view, 0.25, otherwise=second_view), images)
    assert torch.equal(got[is_changed], changed[is_changed])
    changed_otherwise = call(second_view, images, seed=draws.fold_in(0, 1))
    assert torch.equal(got[~is_changed], changed_otherwise[~is_changed])


def test_one_share_within_another_is_drawn_anew() -> None:
    images = pictures(8, (3, 16, 16))[4:].repeat(128, 1, 1, 1)

    def inverted(images: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        return 1 - images

    for view, share in (
        (Sometimes(Sometimes(inverted, 0.5), 0.5), 0.25),
        (Sometimes(inverted, 0.5, otherwise=Sometimes(inverted, 0.5)), 0.75),
    ):
        is_inverted = (call(view, images) != images).flatten(1).any(1)
        assert is_inverted.double().mean() == pytest.approx(share, abs=0.06)


SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def samples(height: int = 33, width: int = 46, channels: int = 3) -> Tensor:
    """Return pieces of a photograph, dark, bright, flat and noisy ones: (8, C, H, W) uint8."""
    generator = torch.Generator().manual_seed(0)
    pieces = [
        FLOWER[:, y : y + height, x : x + width] for y, x in ((180, 250), (100, 420), (250, 330))
    ]
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
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, nearest, fillcolor=grey(image)
    )


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "AutoContrast": lambda image, level: ImageOps.autocontrast(image),
    "Brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * level),
    "Color": lambda image, level: ImageEnhance.Color(image).enhance(0.1 + 1.8 * level),
    "Contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(0.1 + 1.8 * level),
    "Equalize": lambda image, level: ImageOps.equalize(image),
    "Invert": lambda image, level: ImageOps.invert(image),
    "Sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * level),
    "Posterize": lambda image, level: ImageOps.posterize(
        image, min(8, max(1, math.floor(4 * level)))
    ),
    "Solarize": lambda image, level: ImageOps.solarize(image, math.floor(256 * level) % 256),
    "Rotate": lambda image, level: image.rotate(
        30 * level, Image.Resampling.NEAREST, fillcolor=grey(image)
    ),
    "ShearX": lambda image, level: moved(image, 1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda image, level: moved(image, 1, 0, 0, 0.3 * level, 1, 0),
    "TranslateX": lambda image, level: moved(image, 1, 0, -level / 8 * image.width, 0, 1, 0),
    "TranslateY": lambda image, level: moved(image, 1, 0, 0, 0, 1, -level / 8 * image.height),
}


def only(*names: str, magnitude: float = 10, **fields: Any) -> RandAugment:
    """Return the view that does these operations, as many as are named, and nothing else."""
    given = {"probability": (1, 1), "cutout": 0, **fields}
    return RandAugment(len(names), magnitude, operations=tuple(dict.fromkeys(names)), **given)


@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_is_pillows_to_the_bit(name: str) -> None:
    cases = [
        ((33, 46), channels, magnitude) for channels in (1, 3) for magnitude in (0, 3, 9.5, 16, 27)
    ]
    cases += [(size, 3, 16) for size in ((1, 1), (2, 5), (3, 3), (7, 200))]
    for size, channels, magnitude in cases:
        images, signs = samples(*size, channels), set()
        levels = magnitude / 10, -magnitude / 10
        ways = [
            each(lambda image, level=level: PILLOW[name](image, level), images) for level in levels
        ]
        for step in range(3):
            for i, picture in enumerate(call(only(name, magnitude=magnitude), images, step=step)):
                matches = [torch.equal(picture, way[i]) for way in ways]
                assert any(matches) if name in SIGNED else matches[0], (
                    name,
                    size,
                    channels,
                    magnitude,
                    i,
                )
                signs.add(tuple(matches))
        if name in SIGNED and magnitude > 0 and min(size) > 3:  # both signs are drawn
            assert {(True, False), (False, True)} <= signs


@pytest.mark.parametrize(("magnitude", "weight"), [(0, 0.0), (5, 0.2), (16, 0.4)])
def test_sample_pairing_blends_with_another_image_of_the_batch(
    magnitude: float, weight: float
) -> None:
    images = samples()
    for i, got in enumerate(call(only("Sample Pairing", magnitude=magnitude), images)):
        others = [to_pillow(other) for j, other in enumerate(images) if j != i]
        assert any(
            torch.equal(got, from_pillow(Image.blend(to_pillow(images[i]), one, weight)))
            for one in others
        )
    assert torch.equal(call(only("Sample Pairing", magnitude=magnitude), images[:1]), images[:1])


def test_operations_follow_each_other() -> None:
    images, found = samples(), set()
    invert, posterize = (lambda x: 255 - x), (lambda x: x & 0b11111100)
    ways = [f(g(images)) for f in (invert, posterize) for g in (invert, posterize)]
    for i, picture in enumerate(call(only("Invert", "Posterize", magnitude=16), images)):
        found.add([torch.equal(picture, way[i]) for way in ways].index(True))
    assert len(found) >= 3


def test_operations_and_their_taking_place_are_drawn_uniformly_from_the_papers_lists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(set(CIFAR_OPERATIONS)) == 15
    assert set(CIFAR_OPERATIONS) - set(SVHN_OPERATIONS) == {
        "Sample Pairing",
        "Rotate",
        "TranslateX",
    }
    assert (RandAugment().magnitude / RandAugment().scale) == 1.6
    batch, counts, count = 60_000, list[list[int]](), torch.bincount
    with monkeypatch.context() as patch:  # how many images each group of operations is given
        patch.setattr(
            torch,
            "bincount",
            lambda *a, **k: (counts.append(count(*a, **k).tolist()), count(*a, **k))[1],
        )
        call(
            RandAugment(2, operations=SVHN_OPERATIONS[:9]),
            torch.zeros(batch, 1, 8, 8, dtype=torch.uint8),
        )
    assert len(counts) == 2
    for idle, *each_operation in counts:
        assert abs(idle - batch / 2) < 5 * math.sqrt(batch / 4)
        assert max(abs(count - batch / 18) for count in each_operation) < 5 * math.sqrt(batch / 18)
    # p is one per image: with p uniform on (0.2, 0.8), both take place with probability E[p²] =
    # 0.28, not 0.25.
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
        covered = (call(RandAugment(1, 0, operations=("Rotate",), cutout=side), images) == 128).sum(
            (1, 2, 3)
        )
        assert covered.max() == most


class FromNumbers(TorchFunctionMode):
    """Refuses tensors made on the pictures' device from Python's numbers: the host would wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (
            func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
            and made.device.type == "meta"
        ):
            raise AssertionError(f"{func.__name__} copies numbers to the device")
        return made


@pytest.mark.parametrize(
    "name", [name for name, view in VIEWS.items() if not isinstance(view, Seeded)]
)
def test_no_view_waits_for_the_device_of_the_pictures(name: str) -> None:
    """On the meta device, where torch itself refuses every look at a value."""
    images = pictures(4).to("meta")
    with FromNumbers():
        got = call(VIEWS[name], images)
    assert got.device.type == "meta"
    with pytest.raises(AssertionError, match="copies numbers"), FromNumbers():
        torch.tensor([1, 2], device="meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", [name for name in VIEWS if name != "all generators"])
def test_cuda_gives_the_same_views_without_a_synchronisation(
    name: str, cuda_may_not_wait: Callable[[], AbstractContextManager[None]]
) -> None:
    view, images = VIEWS[name], pictures(64)
    expected, on_device = call(view, images), images.cuda()
    first = call(view, on_device)
    if isinstance(view, Seeded):  # whose transforms draw on the device
        with torch.random.fork_rng():
            torch.cuda.manual_seed(5)
            got = call(view, on_device)
    else:
        with cuda_may_not_wait():
            got = call(view, on_device)
    assert torch.equal(got, first)
    alone = [call(view, on_device[[i]], examples=torch.tensor([i])) for i in range(64)]
    assert torch.equal(torch.cat(alone), got)
    assert torch.equal(call(view, on_device, examples=torch.arange(64, device="cuda")), got)
    if name in ("weak", "svhn", "moves", "weak and svhn"):
        assert torch.equal(got.cpu(), expected)
    elif not isinstance(view, Seeded):
        assert (got.cpu() - expected).abs().quantile(0.999) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_noise_on_cuda_is_seeded_too() -> None:
    images, view = pictures(4).cuda(), Seeded(v2.GaussianNoise())
    first, before = call(view, images), torch.cuda.get_rng_state()
    assert torch.equal(call(view, images[2:3], examples=torch.tensor([2])), first[2:3])
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert not torch.equal(first, images)
