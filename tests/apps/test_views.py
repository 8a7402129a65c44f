"""What holds for every view: a picture's view is a function of (seed, step, example) and of nothing else."""

import math
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import v2

from metapl.apps.pictures import (
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
from metapl.apps.pictures.views import base
from metapl.data import draws
from metapl.errors import MetaplError

FLOWER = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
STRONG = Chain((Flip(), Affine(25, 0.2, (0.7, 1.4), 15), Color(0.4, 0.5, 0.6, 0.3), Hole((0.2, 0.6))))


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
    "color": Color(0.4, 0.5, 0.6, 0.3),
    "contrast": Color(contrast=1),
    "hole": Hole((0, 1)),
    "flip": Flip(),
    "recolor": Recolor(),
    "strong": STRONG,
    "sometimes": Sometimes(STRONG, 0.8),
    "torchvision": Seeded(v2.Compose([v2.RandomAffine(25, (0.1, 0.1)), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)])),
    "torchvision's crop": Seeded(v2.RandomResizedCrop(12, antialias=True)),
    "all generators": Seeded(from_all_generators),
}
FEW = {"flip": 2, "recolor": 7}  # how many views a picture has at least
USUAL = (torch.float32, torch.uint8)
SHAPES = [(3, 32, 32), (1, 28, 28), (3, 17, 30), (3, 1, 1)]
KINDS = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}", marks=[pytest.mark.long] * (dtype not in USUAL))
    for name, view in VIEWS.items()
    for dtype in (base.WIDE if isinstance(view, Chain | Seeded) else view.takes)
]


def pictures(count: int, shape: tuple[int, int, int] = (3, 32, 32), dtype: torch.dtype = torch.float32) -> Tensor:
    """Pieces of a photograph and noise, a white and a black picture."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 200, (count, 2), generator=generator).tolist()
    pieces = torch.stack([FLOWER[: shape[0], y : y + shape[1], x : x + shape[2]] for y, x in corners])
    pieces[1::2] = torch.randint(0, 256, pieces.shape, generator=generator, dtype=torch.uint8)[1::2]
    pieces[2:3], pieces[3:4] = 255, 0
    return (pieces.double() / 255).to(dtype) if dtype.is_floating_point else pieces


def call(view: View, images: Tensor, *, seed: int = 0, step: int = 0, examples: Tensor | None = None) -> Tensor:
    return view(images, seed=seed, step=step, examples=torch.arange(len(images)) if examples is None else examples)


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_a_view_depends_on_seed_step_and_example_alone(name: str, dtype: torch.dtype) -> None:
    view = VIEWS[name]
    for shape in SHAPES[: 1 if isinstance(view, Seeded) or dtype.itemsize == 2 else 4 if dtype == torch.float32 else 2]:
        images, examples = pictures(10, shape, dtype), draws.bits(0, 0, torch.arange(10), 1)[:, 0].abs() >> 20
        before, where = images.clone(), {"seed": 3, "step": 9}
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
        states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
        whole = call(view, images, **where, examples=examples)
        # Neither the rest of the batch nor its order, layout or default generators matter, and all are left alone.
        alone = [call(view, images[[i]], **where, examples=examples[[i]]) for i in range(10)]
        assert torch.equal(torch.cat(alone), whole)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), str(np.random.get_state())) == states[1:]  # noqa: NPY002
        torch.manual_seed(2), random.seed(2), np.random.seed(2)  # noqa: NPY002
        for chosen in (torch.randperm(10), torch.tensor([0, 7, 9]), torch.tensor([5, 5])):
            assert torch.equal(call(view, images[chosen], **where, examples=examples[chosen]), whole[chosen])
        assert torch.equal(call(view, images.to(memory_format=torch.channels_last), **where, examples=examples), whole)
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


@pytest.mark.parametrize("name", [name for name, view in VIEWS.items() if not isinstance(view, Seeded)])
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


@pytest.mark.parametrize(("name", "dtype"), [k for k in KINDS if k.values[0] not in ("digits", "all generators")])
def test_values_stay_in_their_range_and_types_agree(name: str, dtype: torch.dtype) -> None:
    view, most = VIEWS[name], 1 if dtype.is_floating_point else 255
    for shape in SHAPES[: 1 if isinstance(view, Seeded) else None]:
        got, images = call(view, pictures(12, shape, dtype)), pictures(12, shape)
        assert 0 <= got.min() <= got.max() <= most + 1e-6  # a resized picture may exceed 1 by a rounding
        assert call(view, torch.full_like(pictures(12, shape, dtype), most)).max() <= most + 1e-6
        if dtype in (torch.float64, torch.uint8):  # at the edge of a reflection, or in noise, float32 shows
            off = (got.double() / most - call(view, images)).abs()
            assert off.quantile(0.999) < (1e-4 if most == 1 else 0.5001 / 255)


OFF = [Weak(pad=0, flip=False), ResizedCrop(32, scale=(1, 1), ratio=(1, 1), flip=False), ShiftNoiseCutout(0, 0.0, 0)]
OFF += [RandAugment(probability=(0, 0), cutout=0), Affine(), Color(), Hole((0, 0)), Identity()]
OFF += [Chain(()), Sometimes(STRONG, 0)]


@pytest.mark.parametrize("view", OFF, ids=repr)
def test_a_view_that_changes_nothing_gives_the_pictures(view: View) -> None:
    assert torch.equal(call(view, pictures(16)), pictures(16))


def test_links_of_a_chain_and_numbers_of_one_picture_are_drawn_apart() -> None:
    images, move = pictures(1).expand(32, -1, -1, -1), Weak(flip=False)
    assert not torch.equal(call(Chain((move, move)), images), call(move, call(move, images)))
    streams = [(base.AFFINE, 5), (base.COLOR, 4), (base.HOLE, 4), (base.FLIP, 2), (base.RECOLOR, 4)]
    columns = [draws.uniform(0, 0, torch.arange(20_000), count, stream=stream) for stream, count in streams]
    assert (torch.corrcoef(torch.cat(columns, dim=1).T) - torch.eye(19)).abs().max() < 0.04


def test_seeded_gives_what_the_transform_gives_when_it_is_seeded_alone() -> None:
    images, jitter = pictures(3), v2.ColorJitter(0.5)
    with torch.random.fork_rng([]):
        torch.manual_seed(int(draws.bits(3, 5, torch.tensor([1]), 1, stream=base.SEEDED)[0, 0]) & 0xFFFFFFFF)
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
    *((Weak, {}, "pad", (-1,)), (ResizedCrop, {}, "size", (0,)), (ResizedCrop, {"size": 8}, "ratio", ((2, 1), (0, 1)))),
    *((ResizedCrop, {"size": 8}, "scale", ((0.5, 0.2), (0, 1))), (ShiftNoiseCutout, {}, "noise", (-0.1,))),
    *((RandAugment, {}, name, (value,)) for name, value in (("n", 0), ("magnitude", -1), ("scale", 0), ("cutout", -1))),
    (RandAugment, {}, "operations", (("Solarise",), ())),
    (RandAugment, {}, "probability", ((0.5, 1.1), (0.8, 0.2))),
    *((Affine, {}, "degrees", (-1, 181, math.nan)), (Affine, {}, "translate", (-0.1,)), (Affine, {}, "shear", (90,))),
    (Affine, {}, "scale", ((0, 1), (1.2, 1), 1.2, (1, math.inf))),
    *((Color, {}, "brightness", (-0.1,)), (Color, {}, "contrast", (math.inf,)), (Color, {}, "hue", (0.6,))),
    (Hole, {}, "side", ((0.5, 0.2), (-0.5, 0.2), 0.5)),
    (Sometimes, {"view": Flip()}, "share", (1.1,)),
]


def test_a_field_out_of_range_is_refused() -> None:
    for kind, others, field, values in REFUSED:
        for value in values:
            with pytest.raises(MetaplError, match=field):
                kind(**others, **{field: value})


@pytest.mark.parametrize("name", [name for name, view in VIEWS.items() if not isinstance(view, Chain)])
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", [name for name in VIEWS if name != "all generators"])
def test_cuda_gives_the_same_views_without_a_synchronisation(name: str) -> None:
    view, images = VIEWS[name], pictures(64)
    expected, on_device = call(view, images), images.cuda()
    first, state = call(view, on_device), torch.cuda.get_rng_state()
    if isinstance(view, Seeded):  # whose transforms draw on the device
        torch.cuda.manual_seed(5)
    else:
        torch.cuda.set_sync_debug_mode("error")
    try:
        got = call(view, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_rng_state(state)
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
