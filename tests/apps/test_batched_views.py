"""Views of whole batches: as exact as slow references, and functions of (seed, step, example) to the last bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

from metapl.apps.pictures import (
    Affine,
    Chain,
    Color,
    Flip,
    Hole,
    MemoryImages,
    Recolor,
    Sometimes,
    UnlabeledBatches,
    View,
)
from metapl.apps.pictures.views import base
from metapl.apps.pictures.views.normal import cosine_and_sine
from metapl.data import StepSampler, draws, feed
from metapl.errors import MetaplError

AFFINE = Affine(degrees=25, translate=0.2, scale=(0.7, 1.4), shear=15)
COLOR = Color(brightness=0.4, contrast=0.5, saturation=0.6, hue=0.3)
STRONG = Chain((Flip(vertical=True), AFFINE, COLOR, Hole((0.2, 0.6))))
VIEWS: dict[str, View] = {
    "affine": AFFINE,
    "affine, reflected": Affine(degrees=180, translate=1.5, scale=(0.2, 3), shear=60, fill="reflect"),
    "affine on grey": Affine(degrees=20, translate=0.3, fill=0.3),
    "color": COLOR,
    "contrast": Color(contrast=1),
    "hole": Hole((0, 1)),
    "grey hole": Hole((0.2, 0.5), fill="grey"),
    "flip": Flip(),
    "flip twice": Flip(vertical=True),
    "recolor": Recolor(),
    "order": Recolor(invert=0),
    "negative": Recolor(permute=False, invert=0.5),
    "strong": STRONG,
    "sometimes": Sometimes(STRONG, 0.8),
}
FEW = {"flip": 2, "flip twice": 4, "recolor": 7, "order": 4, "negative": 2}
"""Of 16 draws, how many are different at least, where there are not as many as pictures."""
SHAPES = [(3, 32, 32), (1, 28, 28), (3, 17, 30), (1, 33, 9), (3, 1, 1)]
FLOWER = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)


def pictures(count: int = 64, channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    """Pieces of a photograph and noise, in [0, 1] with both ends."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 200, (count, 2), generator=generator).tolist()
    pieces = torch.stack([FLOWER[:channels, y : y + height, x : x + width] for y, x in corners])
    noise = torch.randint(0, 256, pieces.shape, generator=generator, dtype=torch.uint8)
    pieces[1::2] = noise[1::2]
    pieces[2:3], pieces[3:4] = 255, 0
    return pieces.float() / 255


def call(view: View, images: Tensor, *, seed: int = 0, step: int = 0, examples: Tensor | None = None) -> Tensor:
    examples = torch.arange(len(images)) if examples is None else examples
    return view(images, seed=seed, step=step, examples=examples)


def drawn(count: int, draws_each: int, stream: int) -> Tensor:
    """What a view draws for examples 0, 1, … at seed 0 and step 0."""
    return draws.uniform(0, 0, torch.arange(count), draws_each, stream=stream, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------- exactness


def torchvision_affine(view: Affine, images: Tensor) -> Tensor:
    """Picture by picture, 0 where the picture ends."""
    height, width = images.shape[2:]
    moved = []
    for image, (turn, shear, scale, right, down) in zip(
        images, drawn(len(images), 5, base.AFFINE).tolist(), strict=True
    ):
        shift = [(2 * right - 1) * view.translate * width, (2 * down - 1) * view.translate * height]
        low, high = view.scale
        moved.append(
            torchvision.affine(
                image,
                angle=(2 * turn - 1) * view.degrees,
                translate=shift,
                scale=low + (high - low) * scale,
                shear=[(2 * shear - 1) * view.shear, 0.0],
                interpolation=InterpolationMode.BILINEAR,
            )
        )
    return torch.stack(moved)


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("fill", ["border", "reflect", 0.0, 0.7])
def test_affine_is_torchvisions_inside_the_picture(shape: tuple[int, int, int], fill: Any) -> None:
    images = pictures(64, *shape)
    view = Affine(degrees=25, translate=0.2, scale=(0.7, 1.4), shear=15, fill=fill)
    inside = torchvision_affine(view, torch.ones_like(images)) > 1 - 1e-6
    assert 0.2 < inside.double().mean() < 0.95
    off = (call(view, images) - torchvision_affine(view, images)).abs()
    # Beside noise, a place that is off by its rounding in float32 shows 30 times more than a level's own.
    assert off[inside].max() < 3e-5
    if fill == 0.0:
        assert off.max() < 3e-5


@pytest.mark.parametrize(("fill", "mode"), [("border", "nearest"), ("reflect", "reflect")])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_outside_stands_what_scipy_continues_the_picture_by(shape: tuple[int, int, int], fill: Any, mode: str) -> None:
    """In float64, also far outside."""
    images = pictures(32, *shape).double()
    _, height, width = shape
    for view in (Affine(degrees=180, translate=1.2, scale=(0.3, 2), shear=50, fill=fill), Affine(shear=40, fill=fill)):
        rows, cols = np.mgrid[:height, :width]
        for image, got, numbers in zip(images, call(view, images), drawn(32, 5, base.AFFINE).numpy(), strict=True):
            theta, phi, right, down = (2 * numbers[[0, 1, 3, 4]] - 1) * np.array(
                [np.radians(view.degrees), np.radians(view.shear), view.translate * width, view.translate * height]
            )
            scale = view.scale[0] + (view.scale[1] - view.scale[0]) * numbers[2]
            turn = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
            inverse = np.linalg.inv(scale * turn @ np.array([[1, -math.tan(phi)], [0, 1]]))
            places = np.stack([cols - (width - 1) / 2 - right, rows - (height - 1) / 2 - down], axis=-1) @ inverse.T
            places += [(width - 1) / 2, (height - 1) / 2]
            for channel in range(len(image)):
                expected = map_coordinates(
                    image[channel].numpy(), places[..., ::-1].transpose(2, 0, 1), order=1, mode=mode
                )
                assert np.abs(got[channel].numpy() - expected).max() < 1e-6


def factors(count: int, view: Color) -> np.ndarray:
    """Brightness, contrast, saturation (each (B,)) and the angle in radians."""
    u = drawn(count, 4, base.COLOR).numpy()
    ranges = np.array([view.brightness, view.contrast, view.saturation])
    low = np.maximum(0, 1 - ranges)
    return np.concatenate([low + (1 + ranges - low) * u[:, :3], (2 * u[:, 3:] - 1) * view.hue * 2 * np.pi], axis=1).T


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_factor_is_torchvisions(name: str, channels: int) -> None:
    images = pictures(64, channels, 20, 24)
    view = Color(**{name: 0.8})
    adjust = getattr(torchvision, f"adjust_{name}")
    chosen = factors(64, view)[["brightness", "contrast", "saturation"].index(name)]
    expected = torch.stack([adjust(image, factor) for image, factor in zip(images, chosen.tolist(), strict=True)])
    # Its weights of red, green and blue add up to 0.9999.
    tolerance = 1e-4 if channels == 3 and name != "brightness" else 1e-6
    assert (call(view, images) - expected).abs().max() < tolerance
    assert channels == 1 or (expected - images).abs().mean() > 0.01


def luma(image: np.ndarray) -> np.ndarray:
    return np.tensordot([0.299, 0.587, 0.114], image, axes=1) if len(image) == 3 else image[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("view", [COLOR, Color(hue=0.5), Color(2, 2, 2, 0.5), Color(0.3, 0, 0.7)])
def test_colors_are_those_of_one_step_after_the_other(view: Color, dtype: torch.dtype, channels: int) -> None:
    images = pictures(64, channels, 20, 24).to(dtype)
    for image, got, b, c, s, angle in zip(images.double().numpy(), call(view, images), *factors(64, view), strict=True):
        bright = b * image
        expected = c * bright + (1 - c) * luma(bright).mean()
        if channels == 3:
            expected = s * expected + (1 - s) * luma(expected)
            turn = Rotation.from_rotvec(angle * np.ones(3) / np.sqrt(3)).as_matrix()
            expected = np.tensordot(turn, expected, axes=1)
        assert np.abs(got.double().numpy() - expected.clip(0, 1)).max() < (3e-6 if dtype == torch.float32 else 3e-7)


def test_grey_stays_grey_whatever_the_colors() -> None:
    grey = pictures(16, 1, 20, 24)
    changed = call(Color(saturation=0.9, hue=0.5), grey.expand(-1, 3, -1, -1))
    assert (changed - grey).abs().max() < 1e-6
    assert torch.equal(call(Color(saturation=0.9, hue=0.5), grey), grey)


@pytest.mark.parametrize("fill", ["mean", "grey"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_hole_covers_its_square_and_nothing_else(shape: tuple[int, int, int], fill: Any) -> None:
    images = pictures(64, *shape)
    _, height, width = shape
    view = Hole((0.3, 0.9), fill=fill)
    covered = []
    for image, got, (size, row, column, level) in zip(
        images, call(view, images), drawn(64, 4, base.HOLE).tolist(), strict=True
    ):
        half = (0.3 + 0.6 * size) * min(height, width) / 2
        inside = torch.tensor(
            [
                [abs(y + 0.5 - row * height) <= half and abs(x + 0.5 - column * width) <= half for x in range(width)]
                for y in range(height)
            ]
        )
        expected = image.double().mean((1, 2)) if fill == "mean" else torch.full((len(image),), level).double()
        assert torch.equal(got[:, ~inside], image[:, ~inside])
        assert torch.allclose(got[:, inside].double(), expected[:, None], rtol=0, atol=1e-6)
        covered.append(inside.double().mean().item())
    assert max(covered) > min(covered)  # of one pixel, all or nothing


def test_half_of_the_pictures_are_mirrored() -> None:
    images = pictures(1, 3, 5, 7).expand(4000, -1, -1, -1)
    kinds = {
        "as it is": images[0],
        "left to right": images[0].flip(2),
        "top to bottom": images[0].flip(1),
        "both": images[0].flip(1, 2),
    }
    for view, wanted in (
        (Flip(), ("as it is", "left to right")),
        (Flip(False, True), ("as it is", "top to bottom")),
        (Flip(True, True), tuple(kinds)),
        (Flip(False, False), ("as it is",)),
    ):
        got = call(view, images)
        counts = [int((got == kinds[name]).all(3).all(2).all(1).sum()) for name in wanted]
        assert sum(counts) == 4000
        assert all(abs(count - 4000 / len(wanted)) < 200 for count in counts)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("invert", [0.0, 0.3, 1.0])
def test_channels_change_places_and_light_turns_dark(
    invert: float, permute: bool, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """To the last bit, each picture by itself."""
    images, inverted = pictures(64, *shape).to(dtype), 0
    found = call(Recolor(permute, invert), images)
    for image, got, (*places, chance) in zip(images, found, drawn(64, 4, base.RECOLOR).tolist(), strict=True):
        order = sorted(range(3), key=places.__getitem__) if permute and len(image) == 3 else range(len(image))
        expected = torch.stack([image[channel] for channel in order])
        inverted += chance < invert
        assert torch.equal(got, 1 - expected if chance < invert else expected)
    assert inverted == 64 * invert if invert in (0, 1) else 8 < inverted < 32


def test_each_order_of_the_channels_is_as_frequent_and_apart_from_the_inversion() -> None:
    image = torch.tensor([0.1, 0.2, 0.4])
    found = call(Recolor(invert=0.25), image.view(1, 3, 1, 1).expand(6000, -1, -1, -1)).flatten(1)
    counts = {}
    for order in itertools.permutations(range(3)):
        for share, shown in ((0.75, image[list(order)]), (0.25, 1 - image[list(order)])):
            counts[order, share] = int((found == shown).all(1).sum())
    assert sum(counts.values()) == 6000
    assert all(abs(count - 1000 * share) < 100 for (_, share), count in counts.items())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_the_pictures_is_changed_and_the_others_stay(share: float) -> None:
    images = pictures(8, 3, 16, 16).repeat(64, 1, 1, 1)
    view = Sometimes(AFFINE, share)
    changed, got = call(AFFINE, images), call(view, images)
    is_changed, stays = (((got == one).flatten(1).all(1)) for one in (changed, images))
    assert bool((is_changed | stays).all())
    moved = ~(changed == images).flatten(1).all(1)  # a white picture is the same, moved or not
    assert is_changed[moved].double().mean() == pytest.approx(share, abs=0.06)


def test_cosine_and_sine_are_torchs() -> None:
    half_turns = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    cos, sin = cosine_and_sine(half_turns)
    assert (cos - (math.pi * half_turns).cos()).abs().max() < 2e-15
    assert (sin - (math.pi * half_turns).sin()).abs().max() < 2e-8
    middle = half_turns.abs() < 0.99
    assert (sin - (math.pi * half_turns).sin())[middle].abs().max() < 1e-13


# ------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VIEWS)
def test_the_rest_of_the_batch_and_its_order_do_not_matter(name: str, shape: tuple[int, int, int]) -> None:
    view, images = VIEWS[name], pictures(64, *shape)
    examples = torch.randint(0, 10**12, (64,), generator=torch.Generator().manual_seed(1))
    whole = call(view, images, seed=3, step=9, examples=examples)
    alone = [call(view, images[[i]], seed=3, step=9, examples=examples[[i]]) for i in range(64)]
    assert torch.equal(torch.cat(alone), whole)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(call(view, images[order], seed=3, step=9, examples=examples[order]), whole[order])
    for chosen in ([0, 7, 9], list(range(33)), [5, 5]):
        assert torch.equal(call(view, images[chosen], seed=3, step=9, examples=examples[chosen]), whole[chosen])
    assert call(view, images[:0], examples=examples[:0]).shape == (0, *shape)


@pytest.mark.parametrize("name", VIEWS)
def test_threads_do_not_matter(name: str) -> None:
    """Of a picture alone, sums are split among threads as well."""
    images, threads = pictures(5, 3, 224, 160), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found += [
                call(VIEWS[name], images),
                torch.cat([call(VIEWS[name], images[[i]], examples=torch.tensor([i])) for i in range(5)]),
            ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], one) for one in found[1:])


@pytest.mark.parametrize("name", VIEWS)
def test_seed_step_and_example_each_change_the_draws(name: str) -> None:
    view, images = VIEWS[name], pictures(1).expand(16, -1, -1, -1)
    state = torch.get_rng_state()
    first = call(view, images)
    assert torch.equal(call(view, images), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({picture.numpy().tobytes() for picture in first}) >= FEW.get(name, 14)
    for other in (
        call(view, images, seed=1),
        call(view, images, step=1),
        call(view, images, examples=torch.arange(16, 32)),
    ):
        assert sum(torch.equal(a, b) for a, b in zip(first, other, strict=True)) <= (14 if name in FEW else 2)


def test_the_numbers_of_one_picture_are_drawn_apart() -> None:
    """None of the views, and none of the numbers of one, follows from another."""
    streams = [(base.AFFINE, 5), (base.COLOR, 4), (base.HOLE, 4), (base.FLIP, 2)]
    streams.append((base.RECOLOR, 4))
    columns = torch.cat([drawn(20_000, count, stream) for stream, count in streams], dim=1)
    correlation = torch.corrcoef(columns.T) - torch.eye(19, dtype=torch.float64)
    assert correlation.abs().max() < 0.04


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_feed_goes_on_with_the_same_batches(workers: int) -> None:
    images = MemoryImages((255 * pictures(40)).round().to(torch.uint8))

    def served() -> Any:
        source = UnlabeledBatches(images, StepSampler(40, 24, seed=1), Flip(), STRONG, seed=5)
        return feed(source, name="unlabeled", stop=8, num_workers=workers)

    first = served()
    whole = [first.next() for _ in range(8)]
    second = served()
    for _ in range(3):
        second.next()
    third = served()
    third.restore(second.state())
    for step in range(3, 8):
        weak, strong = third.next()
        assert torch.equal(weak, whole[step][0])
        assert torch.equal(strong, whole[step][1])
    for one in (first, second, third):
        one.close()


# --------------------------------------------------------------------------------------------------- kinds of images


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "view",
    [
        *(Affine(), Affine(fill=0.5), Color(), Hole((0, 0)), Hole((0, 0), "grey"), Flip(False, False)),
        *(Recolor(permute=False, invert=0), Chain(()), Sometimes(STRONG, 0)),
    ],
)
def test_a_view_that_changes_nothing_gives_the_pictures(view: View, shape: tuple[int, int, int]) -> None:
    images = pictures(16, *shape)
    assert torch.equal(call(view, images), images)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_stay_in_their_range(name: str, shape: tuple[int, int, int]) -> None:
    images = pictures(64, *shape)
    for step in range(3):
        got = call(VIEWS[name], images, step=step)
        assert got.shape == images.shape
        assert got.min() >= 0
        assert got.max() <= 1
        white = call(VIEWS[name], torch.ones_like(images), step=step)
        assert white.max() <= 1


@pytest.mark.parametrize("name", VIEWS)
def test_the_input_stays_and_its_layout_does_not_matter(name: str) -> None:
    images = pictures(16)
    before = images.clone()
    got = call(VIEWS[name], images)
    assert torch.equal(images, before)
    assert torch.equal(call(VIEWS[name], images.to(memory_format=torch.channels_last)), got)
    assert torch.equal(
        call(VIEWS[name], pictures(16, 3, 32, 40)[..., 4:36]),
        call(VIEWS[name], pictures(16, 3, 32, 40)[..., 4:36].clone()),
    )


@pytest.mark.parametrize("name", VIEWS)
def test_float64_agrees_with_float32(name: str) -> None:
    images = pictures(16)
    got = call(VIEWS[name], images.double())
    assert got.dtype == torch.float64
    # Where a pixel is at the edge of a reflection, or noise is sampled far outside, float32 shows.
    assert (got - call(VIEWS[name], images)).abs().quantile(0.999) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", VIEWS)
def test_cuda_gives_the_same_views_without_a_synchronisation(name: str) -> None:
    view, images = VIEWS[name], pictures(64)
    expected, on_device = call(view, images), images.cuda()
    call(view, on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call(view, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (got.cpu() - expected).abs().quantile(0.999) < 1e-4
    alone = [call(view, on_device[[i]], examples=torch.tensor([i])) for i in range(64)]
    assert torch.equal(torch.cat(alone), got)
    assert torch.equal(call(view, on_device, examples=torch.arange(64, device="cuda")), got)


# ------------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Affine(degrees=-1), r"degrees=-1\): expected a number in \[0, 180\]"),
        (lambda: Affine(degrees=181), "degrees=181"),
        (lambda: Affine(degrees=math.nan), "degrees=nan"),
        (lambda: Affine(translate=-0.1), r"translate=-0\.1\): expected a number of 0 or more"),
        (lambda: Affine(scale=(0, 1)), r"scale=\(0, 1\)\): expected .*above 0"),
        (lambda: Affine(scale=(1.2, 1)), r"scale=\(1\.2, 1\)\): expected smallest <= largest"),
        (lambda: Affine(scale=1.2), r"scale=1\.2"),
        (lambda: Affine(scale=(1, math.inf)), "scale"),
        (lambda: Affine(shear=90), r"shear=90\): expected a number in \[0, 90\)"),
        (lambda: Affine(fill="zeros"), r"fill='zeros'\): expected a number in \[0, 1\], 'border' or 'reflect'"),
        (lambda: Affine(fill=128), "fill=128"),
        (lambda: Color(brightness=-0.1), r"brightness=-0\.1\): expected a number of 0 or more"),
        (lambda: Color(contrast=math.inf), "contrast=inf"),
        (lambda: Color(saturation=-1), "saturation=-1"),
        (lambda: Color(hue=0.6), r"hue=0\.6\): expected a number in \[0, 0\.5\]"),
        (lambda: Hole((0.5, 0.2)), r"side=\(0\.5, 0\.2\)\): expected smallest <= largest"),
        (lambda: Hole((-0.5, 0.2)), "side"),
        (lambda: Hole(0.5), r"side=0\.5"),
        (lambda: Recolor(invert=-0.1), r"Recolor\(invert=-0\.1\): expected a number in \[0, 1\]"),
        (lambda: Recolor(invert=1.1), r"invert=1\.1"),
        (lambda: Recolor(invert=math.nan), "invert=nan"),
        (lambda: Sometimes(AFFINE, 1.1), r"Sometimes\(share=1\.1\): expected a number in \[0, 1\]"),
        (lambda: Hole((0, 1), fill="black"), r"fill='black'\): expected 'mean' or 'grey'"),
    ],
)
def test_a_field_out_of_range_is_refused(make: Callable[[], View], message: str) -> None:
    with pytest.raises(MetaplError, match=message):
        make()


@pytest.mark.parametrize("view", [AFFINE, COLOR, Hole((0.2, 0.5)), Flip(), Recolor(), Sometimes(AFFINE, 0.5)])
def test_images_of_another_kind_are_refused(view: View) -> None:
    images, name = pictures(4), type(view).__name__
    with pytest.raises(
        MetaplError, match=rf"{name} got images of shape \(4, 3, 32, 32\) and dtype torch\.uint8.*/ 255"
    ):
        call(view, (255 * images).to(torch.uint8))
    with pytest.raises(MetaplError, match=r"expected torch\.float32 or torch\.float64"):
        call(view, images.half())
    with pytest.raises(MetaplError, match="where the channel is missing"):
        call(view, images[:, 0])
    with pytest.raises(MetaplError, match=rf"{name} got examples of shape \(3,\) for 4 images"):
        call(view, images, examples=torch.arange(3))


@pytest.mark.parametrize("view", [COLOR, Recolor()])
def test_colors_are_of_pictures_with_one_or_three_channels_in_their_range(view: View) -> None:
    with pytest.raises(MetaplError, match="4 channels; expected 1 \\(grey\\) or 3"):
        call(view, torch.rand(2, 4, 8, 8))
    with pytest.raises(MetaplError, match="values from -1 to 2; expected 0 to 1: normalise after the views"):
        call(view, torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1))
