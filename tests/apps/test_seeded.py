"""Any transform of one image as a view: its draws are functions of (seed, step, example) and of nothing else."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from metapl.apps.pictures import Chain, Flip, MemoryImages, Seeded, UnlabeledBatches, View
from metapl.data import StepSampler, draws, feed
from metapl.errors import MetaplError


def noisy(image: Tensor) -> Tensor:
    """Draws from all three default generators."""
    return image + torch.rand(()) + random.random() + float(np.random.rand())  # noqa: NPY002


TRANSFORMS: dict[str, Any] = {
    "geometry and color": v2.Compose(
        [v2.RandomAffine(25, (0.1, 0.1)), v2.RandomPerspective(p=0.5), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)]
    ),
    "resized crop": v2.RandomResizedCrop(12, antialias=True),
    "noise": v2.GaussianNoise(),
    "auto": v2.Compose([v2.ToDtype(torch.uint8, scale=True), v2.TrivialAugmentWide(), v2.ToDtype(torch.float32, True)]),
    "three generators": noisy,
}


def images(count: int, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def call(view: View, x: Tensor, seed: int = 3, step: int = 5, examples: Tensor | None = None) -> Tensor:
    return view(x, seed=seed, step=step, examples=torch.arange(len(x)) if examples is None else examples)


@pytest.fixture(params=TRANSFORMS, name="view")
def a_view(request: pytest.FixtureRequest) -> Seeded:
    return Seeded(TRANSFORMS[request.param])


def test_an_example_is_seen_alike_in_every_batch(view: Seeded) -> None:
    x = images(9)
    whole, order = call(view, x), torch.tensor([4, 0, 8, 7])
    assert torch.equal(call(view, x[order], examples=order), whole[order])
    assert torch.equal(torch.cat([call(view, x[[i]], examples=torch.tensor([i])) for i in range(9)]), whole)


def test_seed_step_and_example_each_draw_anew(view: Seeded) -> None:
    x = images(1).expand(24, -1, -1, -1)
    first = call(view, x)
    assert not torch.equal(first, call(view, x, seed=4))
    assert not torch.equal(first, call(view, x, step=6))
    assert len({tuple(image.flatten().tolist()) for image in first}) > 12
    assert torch.equal(first, call(view, x))


def test_the_default_generators_stay_as_they_are_and_do_not_count(view: Seeded) -> None:
    x = images(4)
    first = call(view, x)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    before, python = torch.get_rng_state(), random.getstate()
    numpy = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]  # noqa: NPY002
    assert torch.equal(call(view, x), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    assert (numpy == np.random.get_state()[1]).all()  # type: ignore[index]  # noqa: NPY002


def test_they_stay_as_they_are_when_it_fails() -> None:
    def fail(image: Tensor) -> Tensor:
        torch.rand(3)
        raise ValueError("no")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="no"):
        call(Seeded(fail), images(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_transform_without_draws_is_itself() -> None:
    x = images(5)
    assert torch.equal(call(Seeded(v2.Resize(8)), x), torch.stack([v2.functional.resize(one, 8) for one in x]))


def test_the_draws_are_those_of_the_transform_seeded_alone() -> None:
    x, jitter = images(3), v2.ColorJitter(0.5)
    key = int(draws.bits(3, 5, torch.tensor([1]), 1, stream=12)[0, 0]) & 0xFFFFFFFF
    with torch.random.fork_rng([]):
        torch.manual_seed(key)
        expected = jitter(x[1])
    assert torch.equal(call(Seeded(jitter), x)[1], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_bit_for_bit_with_it(workers: int) -> None:
    data = MemoryImages((255 * images(20)).to(torch.uint8))
    strong = Chain((Flip(), Seeded(TRANSFORMS["auto"])))
    batches = UnlabeledBatches(data, StepSampler(20, 7, seed=1), Seeded(v2.RandomCrop(16, 2)), strong, seed=0)

    def taken(start: int, count: int, num_workers: int) -> list[Tensor]:
        stream = feed(batches, name="unlabeled", stop=9, num_workers=num_workers)
        stream.restore({"kind": "steps", "position": start})
        found = [view for _ in range(count) for view in stream.next()]
        stream.close()
        return found

    whole = taken(0, 6, 0)
    assert all(torch.equal(a, b) for a, b in zip(taken(4, 2, workers), whole[8:], strict=True))
    assert not torch.equal(whole[0], whole[1])


def test_it_can_be_sent_to_workers() -> None:
    view = Seeded(v2.RandomRotation(30))
    assert torch.equal(call(pickle.loads(pickle.dumps(view)), images(3)), call(view, images(3)))


@pytest.mark.parametrize("wrong", [3, None, v2.RandomCrop, "flip"])
def test_what_is_not_a_transform_is_refused(wrong: Any) -> None:
    with pytest.raises(MetaplError, match=r"Seeded got .*; expected a transform of one image"):
        Seeded(wrong)


def test_results_of_another_kind_are_refused() -> None:
    def uneven(image: Tensor) -> Tensor:
        return image[:, : int(torch.randint(4, 9, ()))]

    with pytest.raises(MetaplError, match=r"gave \(3, .*expected tensors of one shape"):
        call(Seeded(uneven), images(20))
    with pytest.raises(MetaplError, match=r"of type Image.*expected tensors"):
        call(Seeded(v2.ToPILImage()), images(2))
    with pytest.raises(MetaplError, match=r"Seeded got images of shape \(16, 16\)"):
        call(Seeded(nn.Identity()), images(1)[0, 0])
    with pytest.raises(MetaplError, match="Seeded got examples"):
        call(Seeded(nn.Identity()), images(2), examples=torch.arange(3))
    assert call(Seeded(nn.Identity()), images(0)).shape == (0, 3, 16, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_noise_on_cuda_is_seeded_too() -> None:
    x, view = images(4).cuda(), Seeded(v2.GaussianNoise())
    first, before = call(view, x), torch.cuda.get_rng_state()
    torch.cuda.manual_seed(5)
    assert torch.equal(call(view, x), first)
    assert torch.equal(call(view, x[2:3], examples=torch.tensor([2])), first[2:3])
    torch.cuda.set_rng_state(before)
    call(view, x)
    assert torch.equal(torch.cuda.get_rng_state(), before)
