"""Batches of examples that are seen through views; item t is the batch of step t.

A batch is made in two halves. What is fetched (bytes of images, where there are files or images in memory) can come
from worker processes; the views can be applied on the device, so that a quarter of the bytes crosses to it.
Normalization is not a view: it belongs to the network, which sees the same numbers whatever the data came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metapl.apps.pictures.reader import Box
from metapl.apps.pictures.store import FileImages, Images, pick
from metapl.apps.pictures.views.base import View
from metapl.apps.pictures.views.transforms import ResizedCrop
from metapl.data import draws
from metapl.data.steps import BatchT, StepBatches, StepSampler
from metapl.errors import MetaplError

Fetched = tuple[Tensor, ...]

# Fields that are views: one derived seed each, so that no two of one step share their draws even under one seed.
ROLES = ("view", "weak", "strong")


class ExampleBatches(StepBatches[BatchT]):
    """Batches of sampled examples: columns of a data set, of which the first is seen through one view or several."""

    images: Tensor | Images
    sampler: StepSampler
    seed: int
    crop: ResizedCrop | None

    def __post_init__(self) -> None:
        sizes = {"sampler": self.sampler.size, "images": len(self.images)}
        sizes |= {name: len(column) for name, column in self.columns.items()}
        if len({*sizes.values()}) > 1 or (self.steps or 0) < 0:
            raise MetaplError(f"the sizes are {sizes} and steps {self.steps}; expected one size, and steps >= 0.")
        if self.crop is not None and not isinstance(self.images, FileImages):
            raise MetaplError("images in memory are cropped by a view; expected files for crop=.")

    @property
    def views(self) -> dict[str, View]:
        """How the images are seen, by role, each with draws of its own."""
        return {role: view for role in ROLES if (view := getattr(self, role, None)) is not None}

    @property
    def columns(self) -> dict[str, Tensor]:
        """What else a batch holds of the same examples, by name."""
        return {name: held for name in ("labels", "stored") if (held := getattr(self, name, None)) is not None}

    @property
    def examples(self) -> int:
        return self.sampler.size

    @property
    def batch_size(self) -> int:
        return self.sampler.batch_size

    def batch(self, step: int) -> BatchT:
        return self.augment(step, self.fetch(step))

    def raw(self) -> StepBatches[Fetched]:
        return RawBatches(self, self.steps)

    def fetch(self, step: int) -> Fetched:
        """The images of a step, once for all views or once for each crop, and then the other columns."""
        indices = self.sampler.indices(step)
        if self.crop is not None:
            images, used = self._crops(step, indices)
        elif isinstance(self.images, Tensor):
            images, used = [pick(self.images, indices)], indices
        else:
            whole, used = self.images.fetch(indices)
            images = [whole]
        return (*images, *(pick(column, used) for column in self.columns.values()))

    def augment(self, step: int, fetched: Fetched) -> BatchT:
        count = len(fetched) - len(self.columns)
        images = fetched[:count] if isinstance(self.images, Tensor) else tuple(map(in_unit_range, fetched[:count]))
        if self.crop is None:
            images = images * len(self.views)
        how: Any = {"step": step, "examples": self._examples(step)}
        each = zip(self.views.values(), images, self._seeds(), strict=True)
        items: Any = (*(view(x, seed=seed, **how) for view, x, seed in each), *fetched[count:])
        return items if len(items) > 1 else items[0]  # type: ignore[no-any-return]  # what BatchT stands for

    def _crops(self, step: int, indices: Tensor) -> tuple[list[Tensor], Tensor]:
        """Boxes of the images in files, drawn once the size of an image is known."""
        assert isinstance(self.images, FileImages)
        assert self.crop is not None  # both checked when the batches were made
        crop, examples = self.crop, self._examples(step)
        mirrored = torch.zeros(len(self.views), len(indices), dtype=torch.bool)

        def box(view: int, row: int, height: int, width: int) -> Box:
            boxes, mirrors = crop.boxes(self._seeds()[view], step, examples[row : row + 1], height, width)
            mirrored[view, row] = mirrors[0]
            top, left, tall, wide = boxes[0].tolist()
            return left, top, left + wide, top + tall

        boxes = [[partial(box, view, row) for view in range(len(self.views))] for row in range(len(indices))]
        images, used = self.images.fetch_crops(indices, boxes)
        flips = mirrored[:, :, None, None, None]
        return [torch.where(flip, x.flip(-1), x) for x, flip in zip(images, flips, strict=True)], used

    def _seeds(self) -> list[int]:
        return [draws.fold_in(self.seed, ROLES.index(role)) for role in self.views]

    def _examples(self, step: int) -> Tensor:
        # With B > n a batch holds copies of an example; counting the epoch in keeps their augmentations apart. On the
        # CPU, wherever the images are: a view that plans there would otherwise wait for the device.
        return self.sampler.epochs(step) * self.sampler.size + self.sampler.indices(step)


@dataclass(frozen=True, eq=False)
class RawBatches(StepBatches[Fetched]):
    """Item t is ``batches.fetch(t)``: a tuple of tensors."""

    batches: ExampleBatches[Any]
    steps: int | None = None

    def batch(self, step: int) -> Fetched:
        return self.batches.fetch(step)


@dataclass(frozen=True, eq=False)
class LabeledBatches(ExampleBatches[tuple[Tensor, Tensor]]):
    """The labeled batches: item t is (x, y), x = view(images[i]), y = labels[i], i = sampler.indices(t).

    Args:
        images: n examples: a tensor (n, ...), or :class:`~metapl.apps.pictures.Images`, whose bytes become numbers in
            [0, 1].
        steps: number of steps, or None for an endless stream.
        crop: draws a box of the full image that is then brought to the size of ``images``; these are in files.
        stored: (n, C) stored class distributions, which items then hold too: (x, y, stored).

    Where a file is broken, x and y are of the one that replaces it, seen through the view of the broken one.

    >>> from metapl.apps.pictures import Identity
    >>> from metapl.data import StepSampler
    >>> images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    >>> x, y = LabeledBatches(images, labels, StepSampler(20, 32, seed=0), Identity(), seed=0)[1000]
    >>> x.shape, y.shape
    (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    images: Tensor | Images
    labels: Tensor
    sampler: StepSampler
    view: View
    seed: int
    steps: int | None = None
    crop: ResizedCrop | None = None
    stored: Tensor | None = None


@dataclass(frozen=True, eq=False)
class UnlabeledBatches(ExampleBatches[Tensor | tuple[Tensor, Tensor]]):
    """The unlabeled batches: item t is (weak, strong), two views of the same images with independent draws.

    weak = weak_view(images[i]), strong = strong_view(images[i]), i = sampler.indices(t).

    Without a strong view, items are the weak one alone. A ``crop`` draws a box for each view; files are decoded once.

    >>> from metapl.apps.pictures import Identity, ShiftNoiseCutout
    >>> from metapl.data import StepSampler
    >>> images = torch.rand(100, 1, 8, 8)
    >>> batches = UnlabeledBatches(images, StepSampler(100, 64, seed=0), Identity(), ShiftNoiseCutout(), seed=0)
    >>> weak, strong = batches[7]
    >>> weak.shape == strong.shape
    True
    """

    images: Tensor | Images
    sampler: StepSampler
    weak: View
    strong: View | None
    seed: int
    steps: int | None = None
    crop: ResizedCrop | None = None
    stored: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EvaluationBatches(StepBatches[tuple[Tensor, Tensor]]):
    """All labeled images once, in order and as they are: (x, y), float32 (B, C, H, W) in [0, 1] and int64 (B,). A file
    that cannot be read is left out.

    >>> from metapl.apps.pictures import MemoryImages
    >>> images = MemoryImages(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    >>> [len(y) for _, y in EvaluationBatches(images, torch.arange(5), batch_size=2)]
    [2, 2, 1]
    """

    images: Images
    labels: Tensor
    batch_size: int

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or self.batch_size < 1:
            given = f"{len(self.images)} images, {len(self.labels)} labels, batch_size {self.batch_size}"
            raise MetaplError(f"EvaluationBatches got {given}; expected as many labels as images, 1 or more a batch")

    @property
    def steps(self) -> int:  # type: ignore[override]  # follows from the rest
        """Number of batches."""
        return -(-len(self.images) // self.batch_size)

    @property
    def examples(self) -> int:
        return len(self.labels)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(step * self.batch_size, min((step + 1) * self.batch_size, len(self.images)))
        fetch = self.images.fetch_sound if isinstance(self.images, FileImages) else self.images.fetch
        images, used = fetch(indices)
        return in_unit_range(images), pick(self.labels, used)


def in_unit_range(images: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]."""
    return images.to(torch.float32) / 255
