"""Data: draws that hash their position, samplers, views, batches by step, and the digits."""

from __future__ import annotations

import dataclasses
import math
import sys
from itertools import product

import pytest
import torch
from torch import Tensor

from metapl.apps.pictures import (
    DigitsSplit,
    Identity,
    LabeledBatches,
    ShiftNoiseCutout,
    UnlabeledBatches,
    load_digits_split,
)
from metapl.data import StepBatches, StepSampler, loader
from metapl.errors import MetaplError

# --- views ------------------------------------------------------------------------------------------------------------


def images(n: int, channels: int = 1, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return 0.1 + 0.9 * torch.rand(n, channels, height, width, generator=generator)


def test_view_ignores_the_rest_of_the_batch() -> None:
    view, x, examples = ShiftNoiseCutout(), images(9), torch.arange(100, 109)
    whole = view(x, seed=1, step=2, examples=examples)
    assert torch.equal(view(x, seed=1, step=2, examples=examples), whole)
    for i in range(9):
        assert torch.equal(view(x[i : i + 1], seed=1, step=2, examples=examples[i : i + 1])[0], whole[i])
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}):
        assert not torch.equal(view(x, **other, examples=examples), whole)


def test_view_leaves_its_input_and_the_default_generator_alone() -> None:
    x, state = images(5), torch.get_rng_state()
    before = x.clone()
    for view in (ShiftNoiseCutout(), ShiftNoiseCutout(0, 0.0, 2), ShiftNoiseCutout(0, 0.0, 0)):
        view(x, seed=0, step=0, examples=torch.arange(5))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_shift_moves_by_whole_pixels_and_fills_with_zeros() -> None:
    n, shift = 2000, 2
    x = images(1, channels=2, height=5, width=7).expand(n, -1, -1, -1)
    moved = ShiftNoiseCutout(shift=shift, noise=0.0, cutout=0)(x, seed=0, step=0, examples=torch.arange(n))
    padded = torch.nn.functional.pad(x[:1], (shift,) * 4)
    counts = {}
    for dy, dx in product(range(-shift, shift + 1), repeat=2):
        expected = padded[:, :, shift - dy : shift - dy + 5, shift - dx : shift - dx + 7]
        counts[dy, dx] = int((moved == expected).flatten(1).all(1).sum())
    # Every image is one of the 25 moves, and all moves are equally common (80 expected of each).
    assert sum(counts.values()) == n
    assert sum((c - 80) ** 2 / 80 for c in counts.values()) < 24 + 4 * math.sqrt(48)


def test_noise_has_its_scale() -> None:
    x = images(500, channels=3)
    noise = ShiftNoiseCutout(shift=0, noise=0.3, cutout=0)(x, seed=0, step=0, examples=torch.arange(500)) - x
    assert noise.mean().item() == pytest.approx(0.0, abs=4 * 0.3 / math.sqrt(noise.numel()))
    assert noise.std().item() == pytest.approx(0.3, rel=0.01)
    # Channels do not share their noise.
    assert torch.corrcoef(torch.stack([noise[:, 0].flatten(), noise[:, 1].flatten()]))[0, 1].abs() < 0.03


def test_cutout_is_one_square_anywhere_inside() -> None:
    n = 2000
    x = images(1, channels=2, height=4, width=5).expand(n, -1, -1, -1)
    cut = ShiftNoiseCutout(shift=0, noise=0.0, cutout=2)(x, seed=0, step=0, examples=torch.arange(n))
    zero = cut == 0
    assert torch.equal(zero[:, 0], zero[:, 1])
    assert torch.equal(cut[~zero], x[~zero])
    counts = {}
    for top, left in product(range(3), range(4)):
        square = torch.zeros(4, 5, dtype=torch.bool)
        square[top : top + 2, left : left + 2] = True
        counts[top, left] = int((zero[:, 0] == square).flatten(1).all(1).sum())
    assert sum(counts.values()) == n
    assert sum((c - n / 12) ** 2 / (n / 12) for c in counts.values()) < 11 + 4 * math.sqrt(22)


def test_cutout_comes_after_the_noise() -> None:
    cut = ShiftNoiseCutout(shift=0, noise=0.2, cutout=3)(images(50), seed=0, step=0, examples=torch.arange(50))
    assert ((cut == 0).sum(dim=(1, 2, 3)) == 9).all()


def test_all_off_is_the_identity() -> None:
    x = images(4)
    assert torch.equal(ShiftNoiseCutout(0, 0.0, 0)(x, seed=0, step=0, examples=torch.arange(4)), x)
    assert Identity()(x, seed=0, step=0, examples=torch.arange(4)) is x


def test_view_keeps_the_dtype() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        assert ShiftNoiseCutout()(images(3).to(dtype), seed=0, step=0, examples=torch.arange(3)).dtype == dtype


def test_view_refuses_what_it_cannot_augment() -> None:
    examples = torch.arange(3)
    with pytest.raises(MetaplError, match=r"noise=-0\.1\): expected a number of 0 or more"):
        ShiftNoiseCutout(noise=-0.1)
    with pytest.raises(MetaplError, match="uint8"):
        ShiftNoiseCutout()(images(3).byte(), seed=0, step=0, examples=examples)
    with pytest.raises(MetaplError, match=r"\(3, 8, 8\)"):
        ShiftNoiseCutout()(images(3)[:, 0], seed=0, step=0, examples=examples)
    with pytest.raises(MetaplError, match="4 images"):
        ShiftNoiseCutout()(images(4), seed=0, step=0, examples=examples)
    with pytest.raises(MetaplError, match="cutout of 9"):
        ShiftNoiseCutout(cutout=9)(images(3), seed=0, step=0, examples=examples)


# --- batches ----------------------------------------------------------------------------------------------------------


def labeled_batches(steps: int | None = None, batch_size: int = 12) -> LabeledBatches:
    # Five examples for twelve places, so copies of one example meet in a batch.
    sampler = StepSampler(5, batch_size, seed=0)
    return LabeledBatches(images(5), torch.arange(5), sampler, ShiftNoiseCutout(), seed=0, steps=steps)


def unlabeled_batches(strong: bool = True) -> UnlabeledBatches:
    view = ShiftNoiseCutout() if strong else None
    return UnlabeledBatches(images(30), StepSampler(30, 8, seed=0, stream=1), ShiftNoiseCutout(), view, seed=0)


def same(a: Tensor | tuple[Tensor, ...], b: Tensor | tuple[Tensor, ...]) -> bool:
    pairs = [(a, b)] if isinstance(a, Tensor) else zip(a, b, strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_labels_belong_to_their_images() -> None:
    batches = labeled_batches()
    plain = dataclasses.replace(batches, view=Identity())
    for step in range(4):
        x, y = plain[step]
        assert torch.equal(x, batches.images[y])
        assert torch.equal(y, plain.sampler.indices(step))
        assert torch.equal(batches[step][1], y)


def test_copies_of_an_example_are_augmented_apart() -> None:
    x, y = labeled_batches()[0]
    assert len(y.unique()) < len(y)
    assert len(x.flatten(1).unique(dim=0)) == len(x)


def test_views_of_one_step_share_no_draws() -> None:
    # One seed throughout, and blank images, so that only the noise is left.
    view, blank, sampler = (
        ShiftNoiseCutout(shift=0, noise=1.0, cutout=0),
        torch.zeros(40, 1, 8, 8),
        StepSampler(40, 40, 0),
    )
    x, _ = LabeledBatches(blank, torch.zeros(40), sampler, view, seed=0)[3]
    weak, strong = UnlabeledBatches(blank, sampler, view, view, seed=0)[3]
    correlations = torch.corrcoef(torch.stack([x.flatten(), weak.flatten(), strong.flatten()]))
    assert (correlations - torch.eye(3)).abs().max() < 4 / math.sqrt(x.numel())


def test_both_views_show_the_same_images() -> None:
    batches = dataclasses.replace(unlabeled_batches(), weak=Identity(), strong=Identity())
    weak, strong = batches[5]
    assert torch.equal(weak, strong)
    assert torch.equal(weak, batches.images[batches.sampler.indices(5)])


def test_one_view_makes_one_tensor() -> None:
    x = unlabeled_batches(strong=False)[5]
    assert isinstance(x, Tensor)
    assert torch.equal(x, unlabeled_batches()[5][0])


@pytest.mark.parametrize("batches", [labeled_batches(), unlabeled_batches(), unlabeled_batches(strong=False)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_changes_nothing(batches: StepBatches[Tensor], num_workers: int) -> None:
    expected = [batches[t] for t in range(9)]
    state = torch.get_rng_state()
    # A run of nine steps, stopped after four and resumed.
    items = [*loader(batches, 0, 4, num_workers), *loader(batches, 4, 9, num_workers)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(items) == 9
    assert all(same(a, b) for a, b in zip(items, expected, strict=True))


def test_length_and_end() -> None:
    assert len(labeled_batches()) == sys.maxsize
    batches = labeled_batches(steps=3)
    assert len(batches) == 3
    assert len(list(batches)) == 3
    for step in (3, -1):
        with pytest.raises(IndexError, match=f"step is {step}; expected 0 to 2"):
            batches[step]
    assert labeled_batches()[10**12][0].shape == (12, 1, 8, 8)


def test_batches_refuse_what_does_not_fit() -> None:
    with pytest.raises(MetaplError, match="4 labels and a sampler of size 5"):
        LabeledBatches(images(5), torch.arange(4), StepSampler(5, 2, seed=0), Identity(), seed=0)
    with pytest.raises(MetaplError, match="sampler of size 6"):
        UnlabeledBatches(images(5), StepSampler(6, 2, seed=0), Identity(), None, seed=0)
    with pytest.raises(MetaplError, match="steps -1"):
        labeled_batches(steps=-1)
    for start, stop in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(MetaplError, match=f"steps {start} to {stop} of 3"):
            loader(labeled_batches(steps=3), start, stop)
    with pytest.raises(ValueError, match="num_workers option should be non-negative"):
        loader(labeled_batches(), 0, 1, num_workers=-1)


# --- digits -----------------------------------------------------------------------------------------------------------


def parts(split: DigitsSplit) -> list[tuple[Tensor, Tensor]]:
    return [split.labeled, (split.unlabeled, split.unlabeled_truth), split.validation, split.test]


def rows(x: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.flatten(1).tolist()}


@pytest.fixture(scope="module")
def digits() -> DigitsSplit:
    return load_digits_split(labels_per_class=2, seed=0)


def test_digits_have_their_sizes_and_types(digits: DigitsSplit) -> None:
    assert [len(x) for x, _ in parts(digits)] == [20, 1180, 197, 400]
    for x, y in parts(digits):
        assert x.shape[1:] == (1, 8, 8)
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert len(x) == len(y)
        assert x.min() == 0
        assert x.max() == 1


def test_digits_are_disjoint_cover_all_and_keep_their_labels(digits: DigitsSplit) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    pairs = zip(data.images, data.target, strict=True)
    truth = {tuple((image / 16).flatten().tolist()): int(label) for image, label in pairs}
    assert len(truth) == 1797  # no image comes twice, so an image is its own name
    sets = [rows(x) for x, _ in parts(digits)]
    assert sum(map(len, sets)) == 1797
    assert set.union(*sets) == set(truth)
    for x, y in parts(digits):
        assert [truth[tuple(row)] for row in x.flatten(1).tolist()] == y.tolist()


def test_digits_are_stratified(digits: DigitsSplit) -> None:
    assert digits.labeled[1].bincount().tolist() == [2] * 10
    share = torch.cat([y for _, y in parts(digits)]).bincount() / 1797
    for y in (digits.validation[1], digits.test[1]):
        assert (y.bincount() - share * len(y)).abs().max() <= 1


def test_digits_are_drawn_anew_per_seed(digits: DigitsSplit) -> None:
    again, other = load_digits_split(2, seed=0), load_digits_split(2, seed=1)
    for (a, _), (b, _), (c, _) in zip(parts(digits), parts(again), parts(other), strict=True):
        assert torch.equal(a, b)
        assert rows(a) != rows(c)
    # Every part moves: a fixed test set would share all 400 images, independent ones share about 89.
    assert len(rows(digits.test[0]) & rows(other.test[0])) < 130


def test_fewer_labels_lie_within_more(digits: DigitsSplit) -> None:
    more = load_digits_split(4, seed=0)
    assert rows(digits.labeled[0]) < rows(more.labeled[0])
    assert torch.equal(digits.test[0], more.test[0])


def test_digits_refuse_what_they_do_not_have() -> None:
    with pytest.raises(MetaplError, match="labels_per_class is 0"):
        load_digits_split(0, seed=0)
    with pytest.raises(MetaplError, match=r"and at most 1\d+, the size of the smallest class"):
        load_digits_split(150, seed=0)
    with pytest.raises(MetaplError, match=r"by seed -1 into .*'random_state' .*-1"):
        load_digits_split(2, seed=-1)
    with pytest.raises(MetaplError, match="1790 for test: "):
        load_digits_split(2, seed=0, test=1790)
