"""Pictures by number, in memory or in files, and batches of them that are seen through views.

Item t is the batch of step t. A batch is made in two halves. What is fetched (bytes of images,
where there are files or images in memory) can come from worker processes; the views can be applied
on the device, so that a quarter of the bytes crosses to it. Normalization is not a view: it belongs
to the network, which sees the same numbers whatever the data came from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from metapl.apps.machine import read_plain
from metapl.apps.pictures.reader import Box, Crop, UnreadableImage, read_crops, read_image
from metapl.apps.pictures.views.base import View, rows_needed
from metapl.apps.pictures.views.transforms import ResizedCrop
from metapl.data import draws
from metapl.data.steps import BatchT, StepBatches, StepSampler
from metapl.errors import MetaplError
from metapl.execution.batch import to_device

# After so many broken files in a row, the disk is taken to be gone.
_IN_A_ROW = 32


class Images(Protocol):
    """Hold pictures of one shape, which the batches draw from."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of every picture."""
        ...

    def select(self, indices: Tensor) -> Images:
        """Select pictures, in the order of ``indices`` (n,) int64; nothing is copied."""
        ...

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return pictures as uint8 (B, C, H, W), and which they are, (B,) int64.

        These are ``indices``, but where a file is broken.
        """
        ...


class MemoryImages:
    """Pictures that lie in memory.

    Args:
        data: uint8 (n, C, H, W). On an accelerator, batches are picked there, and loaders do
            without worker processes.
        indices: (m,) int64, which of them count, in this order; None: all.

    >>> images = MemoryImages(torch.arange(12, dtype=torch.uint8).view(3, 1, 2, 2))
    >>> images.select(torch.tensor([2, 0])).fetch(torch.tensor([0]))[0]
    tensor([[[[ 8,  9],
              [10, 11]]]], dtype=torch.uint8)
    """

    def __init__(self, data: Tensor, indices: Tensor | None = None) -> None:
        if data.dtype != torch.uint8 or data.ndim != 4:
            given = f"{data.dtype} of shape {tuple(data.shape)}"
            raise MetaplError(f"MemoryImages got {given}; expected torch.uint8 (n, C, H, W)")
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        return len(self.data if self.indices is None else self.indices)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.data.shape[1], self.data.shape[2], self.data.shape[3])

    def select(self, indices: Tensor) -> MemoryImages:
        return MemoryImages(self.data, self._where(indices))

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return pick(self.data, self._where(indices)), indices

    def _where(self, indices: Tensor) -> Tensor:
        return indices if self.indices is None else self.indices[indices]


class FileImages:
    """Pictures in files, read when they are fetched.

    A file that cannot be read is replaced by the next one that can, in the order of this set; so
    the batches stay a function of their position. It is recorded, whichever process meets it: as a
    line of JSON in ``log``, see :func:`replaced_files`, or as a warning. ``size``, ``colors`` and
    ``center`` are those of :func:`metapl.apps.pictures.reader.read_image`.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        *,
        size: tuple[int, int],
        colors: Literal["RGB", "L"] = "RGB",
        center: float = 1.0,
        log: Path | None = None,
    ) -> None:
        # Not a list: forked workers copy Python's own objects bit by bit, as their counts of
        # references change.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        if not len(self._paths) or min(size) < 1:
            raise MetaplError(
                f"FileImages got {len(self._paths)} paths and size {size}; expected 1 or more of "
                "each."
            )
        self._indices = torch.arange(len(self._paths))
        self.size = size
        self.colors = colors
        self.center = center
        self.log = log
        # The pair says which pictures are kept, and holds the pictures. Two processes that read the
        # same picture at once write the same bytes.
        self._kept: tuple[np.ndarray[Any, Any], Tensor] | None = None

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3 if self.colors == "RGB" else 1, *self.size)

    def select(self, indices: Tensor) -> FileImages:
        return self._with(_indices=self._indices[indices])

    def cached(self) -> FileImages:
        """Return the same pictures, each kept in memory once it was read whole.

        Forked worker processes share this memory. It is C·H·W + 1 bytes a picture, taken as the
        pictures are read.
        """
        # Torch's shared tensors would be bounded by the size of /dev/shm.
        count, bytes_each = len(self._paths), math.prod(self.shape)
        memory = np.frombuffer(mmap.mmap(-1, count * (1 + bytes_each)), dtype=np.uint8)
        return self._with(
            _kept=(memory[:count], torch.from_numpy(memory[count:].reshape(count, *self.shape)))
        )

    def _with(self, **changes: Any) -> FileImages:
        copy = object.__new__(FileImages)
        vars(copy).update({**vars(self), **changes})
        return copy

    def __getstate__(self) -> dict[str, Any]:
        # A process that is not forked reads for itself.
        return {**vars(self), "_kept": None}

    def path(self, index: int) -> Path:
        """Return where a picture is."""
        return Path(os.fsdecode(self._paths[int(self._indices[index])]))

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        numbers = self._indices[indices]
        # Picking from kept pictures at once is four times as fast as one by one.
        if self._kept is not None and self._kept[0][numbers.numpy()].all():
            return self._kept[1].index_select(0, numbers), indices
        images, used = self.fetch_crops(indices, [()] * len(indices))
        return images[0] if images else torch.empty(0, *self.shape, dtype=torch.uint8), used

    def fetch_sound(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Fetch as :meth:`fetch` does, but leave a broken file out, not replaced: for measuring."""
        found = [
            (views[0], index)
            for index in indices.tolist()
            if (views := self._views(index)) is not None
        ]
        none = torch.empty(0, *self.shape, dtype=torch.uint8)
        images = torch.stack([image for image, _ in found]) if found else none
        return images, torch.tensor([index for _, index in found], dtype=torch.int64)

    def fetch_crops(
        self, indices: Tensor, crops: Sequence[Sequence[Crop]]
    ) -> tuple[list[Tensor], Tensor]:
        """Return V boxes, or the whole, of each of the pictures ``indices``, (B,) int64.

        Returns: V tensors, uint8 (B, C, H, W), and which pictures they are, (B,) int64.
        """
        found, used, tries = list[list[Tensor]](), list[int](), min(_IN_A_ROW, len(self))
        for index, boxes in zip(indices.tolist(), crops, strict=True):
            for candidate in range(index, index + tries):
                if (pictures := self._views(candidate % len(self), boxes)) is not None:
                    found.append(pictures)
                    used.append(candidate % len(self))
                    break
            else:
                first = f"the first being {self.path(index)}"
                raise MetaplError(
                    f"{tries} pictures in a row cannot be read, {first}: is the disk still there?"
                )
        return [torch.stack(view) for view in zip(*found, strict=True)], torch.tensor(
            used, dtype=torch.int64
        )

    def _views(self, index: int, crops: Sequence[Crop] = ()) -> list[Tensor] | None:
        """Return boxes of a picture, or the whole one; None where it cannot be read."""
        number = int(self._indices[index])
        there, kept = self._kept if self._kept is not None and not crops else (None, torch.empty(0))
        if there is not None and there[number]:
            return [kept[number]]
        path = str(self.path(index))
        try:
            if crops:
                return read_crops(path, crops, size=self.size, colors=self.colors)
            picture = read_image(path, size=self.size, colors=self.colors, center=self.center)
        except UnreadableImage as error:
            if self.log is None:
                warnings.warn(f"{path} is left out: {error.reason}", stacklevel=2)
            else:
                record_files(self.log, {path: error.reason})
            return None
        if there is not None:
            kept[number] = picture
            there[number] = 1
        return [picture]


def pick(values: Tensor, indices: Tensor) -> Tensor:
    """Return values[indices] on the device of the values.

    The indices come from the CPU, and nothing waits for the device.
    """
    # On the CPU this is ten times as fast as values[indices].
    return values.index_select(0, to_device(indices, values.device))


def record_files(log: Path, reasons: Mapping[str, str]) -> None:
    """Add files that cannot be read to a record, each with the reason; a file is recorded once."""
    known = replaced_files(log)
    new = [
        {"file": path, "reason": reason} for path, reason in reasons.items() if path not in known
    ]
    if new:
        # A process that was killed may have torn the last line.
        torn = log.exists() and read_plain(log)[-1:] not in (b"", b"\n")
        # The lines are written in one piece, for workers add to the file too.
        with log.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + "".join(json.dumps(entry) + "\n" for entry in new))


def replaced_files(log: Path) -> dict[str, str]:
    """Return the files that :class:`FileImages` recorded, each with the reason.

    Empty where there is no such record.
    """
    reasons = {}
    for line in read_plain(log).decode("utf-8", "replace").splitlines() if log.exists() else ():
        # A line may be torn or damaged.
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            entry = json.loads(line)
            reasons[str(entry["file"])] = str(entry["reason"])
    return reasons


# ------------------------------------------------------------------------------------------ batches

Fetched = tuple[Tensor, ...]

# Fields that are views: one derived seed each, so that no two of one step share their draws even
# under one seed.
ROLES = ("view", "weak", "strong")


@dataclass(frozen=True)
class SomeOfSampler(StepSampler):
    """A sampler of some examples of each batch, whose rows a function of the step says.

    ``batch_size`` is that of the whole batch.

    >>> sampler = SomeOfSampler(8, 4, seed=0, rows=lambda step: torch.tensor([3, 1]))
    >>> bool((sampler.indices(5) == StepSampler(8, 4, seed=0).indices(5)[[3, 1]]).all())
    True
    """

    rows: Callable[[int], Tensor] = field(kw_only=True)

    @property
    def whole(self) -> StepSampler:
        return StepSampler(self.size, self.batch_size, self.seed, self.stream)

    def indices(self, step: int) -> Tensor:
        return self.whole.indices(step)[self.rows(step)]

    def epochs(self, step: int) -> Tensor:
        return self.whole.epochs(step)[self.rows(step)]


class ExampleBatches(StepBatches[BatchT]):
    """Batches of sampled examples.

    Columns of a data set, of which the first is seen through one view or several.
    """

    images: Tensor | Images
    sampler: StepSampler
    seed: int
    crop: ResizedCrop | None

    def __post_init__(self) -> None:
        sizes = {"sampler": self.sampler.size, "images": len(self.images)}
        sizes |= {name: len(column) for name, column in self.columns.items()}
        if len({*sizes.values()}) > 1 or (self.steps or 0) < 0:
            raise MetaplError(
                f"the sizes are {sizes} and steps {self.steps}; expected one size, and steps >= 0."
            )
        if self.crop is not None and not isinstance(self.images, FileImages):
            raise MetaplError("images in memory are cropped by a view; expected files for crop=.")

    @property
    def views(self) -> dict[str, View]:
        """Return the views of the images by role, each with draws of its own."""
        return {role: view for role in ROLES if (view := getattr(self, role, None)) is not None}

    @property
    def columns(self) -> dict[str, Tensor]:
        """Return the other columns that a batch holds of the same examples, by name."""
        return {
            name: held
            for name in ("labels", "stored")
            if (held := getattr(self, name, None)) is not None
        }

    @property
    def examples(self) -> int:
        return self.sampler.size

    @property
    def batch_size(self) -> int:
        return self.sampler.batch_size

    def share(self, number: int, shares: int) -> Self | None:
        """Return batches whose first rows are one of several equal parts of the rows of these.

        They have the bits that they have here. Behind them are those that a view mixes with
        them; nothing else is read or changed. None where a view does not say what it mixes.
        """
        rows = RowsOfShare(self, number, shares)
        if self.rows_needed(0, rows.own) is None:
            return None
        whole = self.sampler
        sampler = SomeOfSampler(whole.size, whole.batch_size, whole.seed, whole.stream, rows=rows)
        # Every class of such batches is a dataclass.
        part: Any = self
        shared: Self = dataclasses.replace(part, sampler=sampler)
        return shared

    def rows_needed(self, step: int, rows: Tensor) -> Tensor | None:
        """Return rows of a step's batch, and behind them the others that their views are made of.

        None where a view does not say which these are.
        """
        examples = _examples_of(self.sampler, step)
        is_needed = torch.zeros(self.batch_size, dtype=torch.bool)
        for view, seed in zip(self.views.values(), self._seeds(), strict=True):
            of_view = rows_needed(view, rows, seed=seed, step=step, examples=examples)
            if of_view is None:
                return None
            is_needed[of_view] = True
        is_needed[rows] = False
        return torch.cat([rows, is_needed.nonzero()[:, 0]])

    def batch(self, step: int) -> BatchT:
        return self.augment(step, self.fetch(step))

    def raw(self) -> StepBatches[Fetched]:
        return RawBatches(self, self.steps)

    def fetch(self, step: int) -> Fetched:
        """Return the images of a step, and behind them the other columns.

        The images are there once for all views, or once for each crop.
        """
        indices, crop = self.sampler.indices(step), self.crop
        if isinstance(self.images, Tensor):
            images, used = [pick(self.images, indices)], indices
        elif crop is None:
            whole, used = self.images.fetch(indices)
            images = [whole]
        else:
            # This was checked when the batches were made.
            assert isinstance(self.images, FileImages)
            examples, seeds = _examples_of(self.sampler, step), self._seeds()
            mirrored = torch.zeros(len(seeds), len(indices), dtype=torch.bool)

            def box(view: int, row: int, height: int, width: int) -> Box:
                """Return a box of an image, drawn once its size is known."""
                boxes, mirrors = crop.boxes(
                    seeds[view], step, examples[row : row + 1], height, width
                )
                mirrored[view, row] = mirrors[0]
                top, left, tall, wide = boxes[0].tolist()
                return left, top, left + wide, top + tall

            boxes = [
                [partial(box, view, row) for view in range(len(seeds))]
                for row in range(len(indices))
            ]
            seen, used = self.images.fetch_crops(indices, boxes)
            flips = mirrored[:, :, None, None, None]
            images = [torch.where(flip, x.flip(-1), x) for flip, x in zip(flips, seen, strict=True)]
        return (*images, *(pick(column, used) for column in self.columns.values()))

    def augment(self, step: int, fetched: Fetched) -> BatchT:
        count = len(fetched) - len(self.columns)
        images = (
            fetched[:count]
            if isinstance(self.images, Tensor)
            else tuple(map(in_unit_range, fetched[:count]))
        )
        if self.crop is None:
            images = images * len(self.views)
        how: Any = {"step": step, "examples": _examples_of(self.sampler, step)}
        if isinstance(self.sampler, SomeOfSampler):
            how["batch"] = _examples_of(self.sampler.whole, step)
        each = zip(self.views.values(), images, self._seeds(), strict=True)
        items: Any = (*(view(x, seed=seed, **how) for view, x, seed in each), *fetched[count:])
        # BatchT stands for either form.
        return items if len(items) > 1 else items[0]  # type: ignore[no-any-return]

    def _seeds(self) -> list[int]:
        return [draws.fold_in(self.seed, ROLES.index(role)) for role in self.views]


def _examples_of(sampler: StepSampler, step: int) -> Tensor:
    """Return the numbers by which the views of a step know its examples, none of them twice."""
    # With B > n a batch holds copies of an example; counting the epoch in keeps their augmentations
    # apart. On the CPU, wherever the images are: a view that plans there would otherwise wait for
    # the device.
    return sampler.epochs(step) * sampler.size + sampler.indices(step)


@dataclass(frozen=True, eq=False)
class RowsOfShare:
    """Say which rows a share of batches reads in a step: its own, and those mixed with them."""

    batches: ExampleBatches[Any]
    number: int
    shares: int

    @property
    def own(self) -> Tensor:
        return torch.arange(self.batches.batch_size).chunk(self.shares)[self.number]

    def __call__(self, step: int) -> Tensor:
        needed = self.batches.rows_needed(step, self.own)
        assert needed is not None, "share() has asked"
        return needed


@dataclass(frozen=True, eq=False)
class RawBatches(StepBatches[Fetched]):
    """Item t is ``batches.fetch(t)``: a tuple of tensors."""

    batches: ExampleBatches[Any]
    steps: int | None = None

    def batch(self, step: int) -> Fetched:
        return self.batches.fetch(step)


@dataclass(frozen=True, eq=False)
class LabeledBatches(ExampleBatches[tuple[Tensor, Tensor]]):
    """The labeled batches: item t is (x, y).

    x = view(images[i]), y = labels[i], i = sampler.indices(t).

    Args:
        images: n examples: a tensor (n, ...), or :class:`~metapl.apps.pictures.Images`, whose bytes
            become numbers in [0, 1].
        steps: number of steps, or None for an endless stream.
        crop: draws a box of the full image that is then brought to the size of ``images``; these
            are in files.
        stored: (n, C) stored class distributions, which items then hold too: (x, y, stored).

    Where a file is broken, x and y are of the one that replaces it, seen through the view of the
    broken one.

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
    """The unlabeled batches: item t is (weak, strong), two views of the same images.

    weak = weak_view(images[i]), strong = strong_view(images[i]), i = sampler.indices(t). The draws
    of the two are independent.

    Without a strong view, items are the weak one alone. A ``crop`` draws a box for each view; files
    are decoded once.

    >>> from metapl.apps.pictures import Identity, ShiftNoiseCutout
    >>> from metapl.data import StepSampler
    >>> images = torch.rand(100, 1, 8, 8)
    >>> sampler = StepSampler(100, 64, seed=0)
    >>> batches = UnlabeledBatches(images, sampler, Identity(), ShiftNoiseCutout(), seed=0)
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
    """All labeled images once, in order and as they are.

    Items are (x, y), float32 (B, C, H, W) in [0, 1] and int64 (B,). A file that cannot be read is
    left out.

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
            given = (
                f"{len(self.images)} images, {len(self.labels)} labels, batch_size "
                f"{self.batch_size}"
            )
            raise MetaplError(
                f"EvaluationBatches got {given}; expected as many labels as images, 1 or more a "
                "batch"
            )

    # The number of batches follows from the fields, so that it is a property here.
    @property
    def steps(self) -> int:  # type: ignore[override]
        """Return the number of batches."""
        return -(-len(self.images) // self.batch_size)

    @property
    def examples(self) -> int:
        return len(self.labels)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(
            step * self.batch_size, min((step + 1) * self.batch_size, len(self.images))
        )
        fetch = (
            self.images.fetch_sound if isinstance(self.images, FileImages) else self.images.fetch
        )
        images, used = fetch(indices)
        return in_unit_range(images), pick(self.labels, used)


def in_unit_range(images: Tensor) -> Tensor:
    """Return bytes as float32 in [0, 1]."""
    return images.to(torch.float32) / 255
