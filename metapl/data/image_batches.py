"""Batches of pictures by position: fetched as bytes, then seen through views as numbers in [0, 1].

The halves can run in different places. ``batches[t]`` does both. With ``batches.raw()`` as the source of a loader,
workers only fetch, a quarter of the bytes crosses to the device, and ``batches.augment(t, item)`` applies the views
there: so :func:`metapl.data.feed.feed` does where the device is not the CPU.
Normalisation is no view: it belongs to the network, which sees the same numbers whatever the data came from.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from metapl.data import draws
from metapl.data.batches import StepBatches
from metapl.data.images.reader import Box
from metapl.data.images.store import FileImages, Images, pick
from metapl.data.sampler import StepSampler
from metapl.data.views.base import View
from metapl.errors import MetaplError

BatchT = TypeVar("BatchT")
Fetched = tuple[Tensor, ...]

# As in batches.py: one derived seed per role.
_LABELED, _WEAK, _STRONG = range(3)


class RandomBoxes(Protocol):
    """Boxes of pictures whose every draw is a function of (seed, step, example)."""

    def boxes(self, seed: int, step: int, examples: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(B, 4) top, left, height and width in pixels, and (B,) whether to mirror."""
        ...


class ImageBatches(StepBatches[BatchT]):
    """What the batches of pictures share; ``batch`` is ``augment`` of what was fetched."""

    images: Images
    sampler: StepSampler

    @abstractmethod
    def fetch(self, step: int) -> Fetched:
        """The bytes of a step: one or several uint8 (B, C, H, W), then labels where there are any."""

    @abstractmethod
    def augment(self, step: int, fetched: Fetched) -> BatchT:
        """What ``fetched`` looks like through the views, on its device."""

    def batch(self, step: int) -> BatchT:
        return self.augment(step, self.fetch(step))

    def raw(self) -> RawBatches:
        """Batches of what is fetched, for workers that leave the views to the device."""
        return RawBatches(self, self.steps)

    def explain(self) -> str | None:
        """Which file workers died of, for the message about it; None where that is not what happened.

        To be asked once a loader has failed, before its workers are stopped.
        """
        return _died_of(self.images)

    def _examples(self, step: int) -> Tensor:
        # With B > n a batch holds copies of an example; counting the epoch in keeps their augmentations apart.
        return self.sampler.epochs(step) * self.sampler.size + self.sampler.indices(step)


@dataclass(frozen=True, eq=False)
class RawBatches(StepBatches[Fetched]):
    """Item t is ``batches.fetch(t)``: a tuple of tensors."""

    batches: ImageBatches[Any]
    steps: int | None = None

    def batch(self, step: int) -> Fetched:
        return self.batches.fetch(step)

    def explain(self) -> str | None:
        """As :meth:`ImageBatches.explain`."""
        return self.batches.explain()


@dataclass(frozen=True, eq=False)
class ImageLabeledBatches(ImageBatches[tuple[Tensor, Tensor]]):
    """The labelled batches: item t is (x, y), with x the view of the sampled pictures in [0, 1].

    x = view(images[i] / 255), y = labels[i], i = sampler.indices(t).

    Args:
        images: n pictures.
        labels: int64 (n,) on any device.
        sampler: picks from n examples.
        view: augments; :class:`~metapl.data.Identity` does not.
        seed: of the view's draws, any integer.
        steps: number of steps, or None for an endless stream.
        crop: draws a box of the full picture that is then brought to the size of ``images``; these are in files.

    Items: x float32 (B, ...) and y int64 (B,). Where a file is broken, both are of the one that replaces it, seen
    through the view that was drawn for the broken one.

    Raises:
        MetaplError: images, labels and sampler disagree on n, steps is negative, or a crop of pictures in memory; on
            access, a negative step, or pictures that cannot be read.

    >>> from metapl.data import Identity, StepSampler
    >>> from metapl.data.images.store import MemoryImages
    >>> images = MemoryImages(torch.full((20, 3, 8, 8), 255, dtype=torch.uint8))
    >>> x, y = ImageLabeledBatches(images, torch.arange(20) % 10, StepSampler(20, 32, seed=0), Identity(), seed=0)[1000]
    >>> x.shape, x.max(), y.shape
    (torch.Size([32, 3, 8, 8]), tensor(1.), torch.Size([32]))
    """

    images: Images
    labels: Tensor
    sampler: StepSampler
    view: View
    seed: int
    steps: int | None = None
    crop: RandomBoxes | None = None

    def __post_init__(self) -> None:
        _check(self, self.images, self.sampler, self.steps, self.crop, self.labels)

    def fetch(self, step: int) -> Fetched:
        images, used = _fetch(self.images, self.sampler.indices(step), self.crop, self._draws(step))
        return (*images, pick(self.labels, used))

    def augment(self, step: int, fetched: Fetched) -> tuple[Tensor, Tensor]:
        images, labels = fetched
        seed, examples = self._draws(step)[0][0], self._examples(step)
        return self.view(in_unit_range(images), seed=seed, step=step, examples=examples), labels

    def _draws(self, step: int) -> list[tuple[int, int, Tensor]]:
        return [(draws.fold_in(self.seed, _LABELED), step, self._examples(step))]


@dataclass(frozen=True, eq=False)
class ImageUnlabeledBatches(ImageBatches[Tensor | tuple[Tensor, Tensor]]):
    """The unlabelled batches: item t is (weak, strong), two views of the same pictures in [0, 1], or one tensor.

    weak = weak_view(images[i] / 255), strong = strong_view(images[i] / 255), i = sampler.indices(t), with independent
    draws.

    Args:
        images: n pictures.
        sampler: picks from n examples.
        weak: the view that the teacher labels.
        strong: the view that the student learns, or None for items of the weak view alone.
        seed: of the views' draws, any integer.
        steps: number of steps, or None for an endless stream.
        crop: draws a box of the full picture for each view, see :class:`ImageLabeledBatches`; files are decoded once.

    Items: a pair of float32 (B, C, H, W), or one without a strong view.

    Raises:
        MetaplError: as :class:`ImageLabeledBatches`.
    """

    images: Images
    sampler: StepSampler
    weak: View
    strong: View | None
    seed: int
    steps: int | None = None
    crop: RandomBoxes | None = None

    def __post_init__(self) -> None:
        _check(self, self.images, self.sampler, self.steps, self.crop)

    def fetch(self, step: int) -> Fetched:
        images, _ = _fetch(self.images, self.sampler.indices(step), self.crop, self._draws(step))
        return tuple(images)

    def augment(self, step: int, fetched: Fetched) -> Tensor | tuple[Tensor, Tensor]:
        views = [self.weak] if self.strong is None else [self.weak, self.strong]
        # Without crops, both views are of one tensor.
        images = [in_unit_range(one) for one in fetched] * (len(views) if len(fetched) == 1 else 1)
        seen = [
            view(one, seed=seed, step=step, examples=examples)
            for view, one, (seed, _, examples) in zip(views, images, self._draws(step), strict=True)
        ]
        return seen[0] if self.strong is None else (seen[0], seen[1])

    def _draws(self, step: int) -> list[tuple[int, int, Tensor]]:
        roles = [_WEAK] if self.strong is None else [_WEAK, _STRONG]
        return [(draws.fold_in(self.seed, role), step, self._examples(step)) for role in roles]


@dataclass(frozen=True, eq=False)
class ImageEvaluationBatches(StepBatches[tuple[Tensor, Tensor]]):
    """All labelled pictures once, in order and as they are: for validation and test.

    Args:
        images: n pictures.
        labels: int64 (n,).
        batch_size: B, 1 or more; the last batch may be smaller.

    Items: (x, y), float32 (B, C, H, W) in [0, 1] and int64 (B,). A file that cannot be read is left out, so a batch may
    be smaller still.

    Raises:
        MetaplError: images and labels disagree on n, or a batch size below 1.

    >>> from metapl.data.images.store import MemoryImages
    >>> images = MemoryImages(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    >>> [len(y) for _, y in ImageEvaluationBatches(images, torch.arange(5), batch_size=2)]
    [2, 2, 1]
    """

    images: Images
    labels: Tensor
    batch_size: int

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or self.batch_size < 1:
            raise MetaplError(
                f"ImageEvaluationBatches got {len(self.images)} images, {len(self.labels)} labels and batch_size "
                f"{self.batch_size}; expected as many labels as images, and 1 or more a batch"
            )

    @property
    def steps(self) -> int:  # type: ignore[override]  # follows from the rest
        """Number of batches."""
        return -(-len(self.images) // self.batch_size)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(step * self.batch_size, min((step + 1) * self.batch_size, len(self.images)))
        whole = self.images.fetch_sound if isinstance(self.images, FileImages) else self.images.fetch
        images, used = whole(indices)
        return in_unit_range(images), pick(self.labels, used)

    def explain(self) -> str | None:
        """As :meth:`ImageBatches.explain`."""
        return _died_of(self.images)


def _died_of(images: Images) -> str | None:
    files = images.dead_readers() if isinstance(images, FileImages) else []
    return f"a worker died while reading {' or '.join(map(str, files))}; remove or replace it" if files else None


def in_unit_range(images: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def _fetch(
    images: Images, indices: Tensor, crop: RandomBoxes | None, roles: list[tuple[int, int, Tensor]]
) -> tuple[list[Tensor], Tensor]:
    """Bytes for each role, or for all of them where nothing is cropped."""
    if crop is None:
        pictures, used = images.fetch(indices)
        return [pictures], used
    assert isinstance(images, FileImages)  # checked when the batches were made
    chosen = [[_Boxed(crop, *one, at) for one in roles] for at in range(len(indices))]
    views, used = images.fetch_crops(indices, [[one.box for one in boxes] for boxes in chosen])
    return [
        torch.stack([x.flip(-1) if boxes[role].mirror else x for x, boxes in zip(view, chosen, strict=True)])
        for role, view in enumerate(views)
    ], used


class _Boxed:
    """The box of one example, once the size of its picture is known."""

    def __init__(self, crop: RandomBoxes, seed: int, step: int, examples: Tensor, at: int) -> None:
        self._drawn = (crop, seed, step, examples[at : at + 1])
        self.mirror = False

    def box(self, height: int, width: int) -> Box:
        crop, seed, step, example = self._drawn
        boxes, mirrors = crop.boxes(seed, step, example, height, width)
        top, left, tall, wide = boxes[0].tolist()
        self.mirror = bool(mirrors[0])
        return left, top, left + wide, top + tall


def _check(
    batches: object,
    images: Images,
    sampler: StepSampler,
    steps: int | None,
    crop: RandomBoxes | None,
    labels: Tensor | None = None,
) -> None:
    name = type(batches).__name__
    if len(images) != sampler.size or (labels is not None and len(labels) != sampler.size):
        given = f"{len(images)} images" + ("" if labels is None else f", {len(labels)} labels")
        raise MetaplError(
            f"{name} got {given} and a sampler of size {sampler.size}; expected the same number everywhere: "
            "StepSampler(len(images), batch_size, seed)"
        )
    if steps is not None and steps < 0:
        raise MetaplError(f"{name} got steps {steps}; expected a number of steps, or None for an endless stream")
    if crop is not None and not isinstance(images, FileImages):
        raise MetaplError(
            f"{name} got a crop for {type(images).__name__}; expected FileImages, whose files are cropped as they are "
            "read: pictures in memory are cropped by a view"
        )
