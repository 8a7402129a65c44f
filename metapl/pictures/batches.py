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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from metapl.data import draws
from metapl.data.steps import BatchT, StepBatches, StepSampler
from metapl.errors import MetaplError, warn
from metapl.execution.batch import to_device
from metapl.pictures.reader import Box, Crop, Levels, UnreadableImage, read_crops, read_image
from metapl.pictures.views.base import View, rows_needed
from metapl.pictures.views.transforms import ResizedCrop
from metapl.runs.files import read_plain

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
            raise MetaplError(
                f"MemoryImages got {data.dtype} of shape {tuple(data.shape)}; expected torch.uint8 "
                "(n, C, H, W)"
            )
        self.data = data
        self.indices = indices

    def __len__(self) -> int:
        return len(self.data if self.indices is None else self.indices)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of every picture."""
        return (self.data.shape[1], self.data.shape[2], self.data.shape[3])

    def select(self, indices: Tensor) -> MemoryImages:
        """Select pictures, in the order of ``indices`` (n,) int64; nothing is copied."""
        return MemoryImages(self.data, self._rows(indices))

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return pictures as uint8 (B, C, H, W), and ``indices``."""
        return pick(self.data, self._rows(indices)), indices

    def _rows(self, indices: Tensor) -> Tensor:
        """Return where in the data these pictures are."""
        return indices if self.indices is None else self.indices[indices]


class FileImages:
    """Pictures in files, read when they are fetched.

    A file that cannot be read is replaced by the next one that can, in the order of this set; so
    the batches stay a function of their position. It is recorded, whichever process meets it.

    Args:
        paths: of the files.
        size, colors, center, levels: as for :func:`metapl.pictures.reader.read_image`.
        log: the file in which broken files are recorded, a line of JSON each, see
            :func:`replaced_files`. None: a warning tells of each.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        *,
        size: tuple[int, int],
        colors: Literal["RGB", "L"] = "RGB",
        center: float = 1.0,
        levels: Levels | None = None,
        log: Path | None = None,
    ) -> None:
        if isinstance(size, int):
            raise MetaplError(f"FileImages got size={size}; expected (height, width) in pixels.")
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
        self.levels = levels
        self.log = log
        self._kept: KeptPictures | None = None

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of every picture."""
        return (3 if self.colors == "RGB" else 1, *self.size)

    def select(self, indices: Tensor) -> FileImages:
        """Select pictures, in the order of ``indices`` (n,) int64; nothing is read."""
        return self._with(_indices=self._indices[indices])

    def cached(self) -> FileImages:
        """Return the same pictures, each kept in memory once it was read whole.

        Forked worker processes share this memory. It is C·H·W + 1 bytes a picture, taken as the
        pictures are read.
        """
        return self._with(_kept=KeptPictures.empty(len(self._paths), self.shape))

    def _with(self, **changes: Any) -> FileImages:
        """Return the same pictures with other attributes; nothing is copied."""
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
        """Return pictures as uint8 (B, C, H, W), and which they are, (B,) int64."""
        numbers = self._indices[indices]
        # Picking from kept pictures at once is four times as fast as one by one.
        if self._kept is not None and self._kept.is_kept[numbers.numpy()].all():
            return self._kept.pictures.index_select(0, numbers), indices
        images, used = self.fetch_crops(indices, [()] * len(indices))
        if not images:
            return torch.empty(0, *self.shape, dtype=torch.uint8), used
        return images[0], used

    def fetch_sound(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Fetch as :meth:`fetch` does, but leave a broken file out, not replaced: for measuring."""
        images: list[Tensor] = []
        used: list[int] = []
        for index in indices.tolist():
            views = self._views(index)
            if views is not None:
                images.append(views[0])
                used.append(index)
        if not images:
            return torch.empty(0, *self.shape, dtype=torch.uint8), indices[:0]
        return torch.stack(images), torch.tensor(used, dtype=torch.int64)

    def fetch_crops(
        self, indices: Tensor, crops: Sequence[Sequence[Crop]]
    ) -> tuple[list[Tensor], Tensor]:
        """Return V boxes, or the whole, of each of the pictures ``indices``, (B,) int64.

        Returns: V tensors, uint8 (B, C, H, W), and which pictures they are, (B,) int64.
        """
        views_of_pictures: list[list[Tensor]] = []
        used: list[int] = []
        for index, boxes in zip(indices.tolist(), crops, strict=True):
            views, number = self._readable_views(index, boxes)
            views_of_pictures.append(views)
            used.append(number)
        stacked = [torch.stack(view) for view in zip(*views_of_pictures, strict=True)]
        return stacked, torch.tensor(used, dtype=torch.int64)

    def _readable_views(self, index: int, crops: Sequence[Crop]) -> tuple[list[Tensor], int]:
        """Return boxes of a picture, or of the next one that can be read, and its number."""
        tries = min(_IN_A_ROW, len(self))
        for candidate in range(index, index + tries):
            number = candidate % len(self)
            views = self._views(number, crops)
            if views is not None:
                return views, number
        raise MetaplError(
            f"{tries} pictures in a row cannot be read, the first being {self.path(index)}: is the "
            "disk still there?"
        )

    def _views(self, index: int, crops: Sequence[Crop] = ()) -> list[Tensor] | None:
        """Return boxes of a picture, or the whole one; None where it cannot be read."""
        number = int(self._indices[index])
        # Boxes are drawn anew each time, so that whole pictures alone are kept.
        memory = None if crops else self._kept
        if memory is not None and memory.is_kept[number]:
            return [memory.pictures[number]]
        path = str(self.path(index))
        try:
            if crops:
                return read_crops(
                    path, crops, size=self.size, colors=self.colors, levels=self.levels
                )
            picture = read_image(
                path, size=self.size, colors=self.colors, center=self.center, levels=self.levels
            )
        except UnreadableImage as error:
            if self.log is None:
                warn(f"{path} is left out: {error.reason}")
            else:
                record_files(self.log, {path: error.reason})
            return None
        if memory is not None:
            memory.pictures[number] = picture
            memory.is_kept[number] = 1
        return [picture]


@dataclass(frozen=True, eq=False)
class KeptPictures:
    """Pictures in memory that forked processes share.

    Two processes that read the same picture at once write the same bytes.

    Args:
        is_kept: uint8 (n,), 1 for each picture that was read.
        pictures: uint8 (n, C, H, W).
    """

    is_kept: np.ndarray[Any, Any]
    pictures: Tensor

    @classmethod
    def empty(cls, count: int, shape: tuple[int, int, int]) -> KeptPictures:
        """Return room for pictures of a shape, none of which was read."""
        # Torch's shared tensors would be bounded by the size of /dev/shm.
        size = count * (1 + math.prod(shape))
        memory = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
        return cls(memory[:count], torch.from_numpy(memory[count:].reshape(count, *shape)))


def pick(values: Tensor, indices: Tensor) -> Tensor:
    """Return values[indices] on the device of the values.

    The indices come from the CPU, and nothing waits for the device.
    """
    # On the CPU this is ten times as fast as values[indices].
    return values.index_select(0, to_device(indices, values.device))


def record_files(log: Path, reasons: Mapping[str, str]) -> None:
    """Add files that cannot be read to a record, each with the reason; a file is recorded once."""
    recorded = replaced_files(log)
    lines = []
    for path, reason in reasons.items():
        if path not in recorded:
            lines.append(json.dumps({"file": path, "reason": reason}) + "\n")
    if not lines:
        return
    # A process that was killed may have torn the last line.
    is_torn = log.exists() and read_plain(log)[-1:] not in (b"", b"\n")
    if is_torn:
        lines.insert(0, "\n")
    # The lines are written in one piece, for workers add to the file too.
    with log.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def replaced_files(log: Path) -> dict[str, str]:
    """Return the files that :class:`FileImages` recorded, each with the reason.

    Empty where there is no such record.
    """
    reasons: dict[str, str] = {}
    if not log.exists():
        return reasons
    for line in read_plain(log).decode("utf-8", "replace").splitlines():
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
    """A sampler of some examples of each batch. ``batch_size`` is that of the whole batch.

    Args:
        rows: says of a step which rows of its batch these are.

    >>> sampler = SomeOfSampler(8, 4, seed=0, rows=lambda step: torch.tensor([3, 1]))
    >>> bool((sampler.indices(5) == StepSampler(8, 4, seed=0).indices(5)[[3, 1]]).all())
    True
    """

    rows: Callable[[int], Tensor] = field(kw_only=True)

    @property
    def whole(self) -> StepSampler:
        """Return the sampler of the whole batches."""
        return StepSampler(self.size, self.batch_size, self.seed, self.stream)

    def indices(self, step: int) -> Tensor:
        """Return the numbers of the examples of a step."""
        return self.whole.indices(step)[self.rows(step)]

    def epochs(self, step: int) -> Tensor:
        """Return the pass over the examples that each of them is drawn in."""
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
        views: dict[str, View] = {}
        for role in ROLES:
            view = getattr(self, role, None)
            if view is not None:
                views[role] = view
        return views

    @property
    def columns(self) -> dict[str, Tensor]:
        """Return the other columns that a batch holds of the same examples, by name."""
        columns: dict[str, Tensor] = {}
        for name in ("labels", "stored"):
            column = getattr(self, name, None)
            if column is not None:
                columns[name] = column
        return columns

    @property
    def examples(self) -> int:
        """Return the number of examples."""
        return self.sampler.size

    @property
    def batch_size(self) -> int:
        """Return the number of examples in a batch."""
        return self.sampler.batch_size

    def share(self, number: int, shares: int) -> Self | None:
        """Return batches whose first rows are one of several equal parts of the rows of these.

        They have the bits that they have here. Behind them are those that a view mixes with
        them; nothing else is read or changed. None where a view does not say what it mixes.
        """
        rows = RowsOfShare(self, number, shares)
        if self.rows_needed(0, rows.first_rows) is None:
            return None
        sampler = SomeOfSampler(
            self.sampler.size,
            self.sampler.batch_size,
            self.sampler.seed,
            self.sampler.stream,
            rows=rows,
        )
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
            needed_by_view = rows_needed(view, rows, seed=seed, step=step, examples=examples)
            if needed_by_view is None:
                return None
            is_needed[needed_by_view] = True
        is_needed[rows] = False
        return torch.cat([rows, is_needed.nonzero()[:, 0]])

    def batch(self, step: int) -> BatchT:
        """Return the batch of a step."""
        return self.augment(step, self.fetch(step))

    def raw(self) -> StepBatches[Fetched]:
        """Return what is fetched of each batch, before it is seen through views."""
        return RawBatches(self, self.steps)

    def fetch(self, step: int) -> Fetched:
        """Return the images of a step, and behind them the other columns.

        The images are there once for all views, or once for each crop.
        """
        indices = self.sampler.indices(step)
        if isinstance(self.images, Tensor):
            images = [pick(self.images, indices)]
            used = indices
        elif self.crop is None:
            uncropped, used = self.images.fetch(indices)
            images = [uncropped]
        else:
            images, used = self._fetch_crops(self.crop, step, indices)
        columns = [pick(column, used) for column in self.columns.values()]
        return (*images, *columns)

    def _fetch_crops(
        self, crop: ResizedCrop, step: int, indices: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Return a box of each image for each view, mirrored where that was drawn, and its number.

        A box is drawn once the size of the image is known.
        """
        assert isinstance(self.images, FileImages), "this was checked when the batches were made"
        examples = _examples_of(self.sampler, step)
        # Of each image, a box for each view.
        boxes: list[list[DrawnBox]] = []
        for row in range(len(indices)):
            example = examples[row : row + 1]
            boxes.append([DrawnBox(crop, seed, step, example) for seed in self._seeds()])
        cropped, used = self.images.fetch_crops(indices, boxes)
        images = []
        for view, x in enumerate(cropped):
            is_mirrored = torch.tensor([of_image[view].is_mirrored for of_image in boxes])
            images.append(torch.where(is_mirrored[:, None, None, None], x.flip(-1), x))
        return images, used

    def augment(self, step: int, fetched: Fetched) -> BatchT:
        """Return the batch of a step, of which the images and other columns were fetched."""
        count = len(fetched) - len(self.columns)
        images = fetched[:count]
        if not isinstance(self.images, Tensor):
            images = tuple(map(in_unit_range, images))
        if self.crop is None:
            images = images * len(self.views)
        options: dict[str, Any] = {"step": step, "examples": _examples_of(self.sampler, step)}
        if isinstance(self.sampler, SomeOfSampler):
            options["batch"] = _examples_of(self.sampler.whole, step)
        items: list[Any] = []
        for view, x, seed in zip(self.views.values(), images, self._seeds(), strict=True):
            items.append(view(x, seed=seed, **options))
        items += fetched[count:]
        # BatchT stands for either form.
        batch: Any = tuple(items) if len(items) > 1 else items[0]
        return batch  # type: ignore[no-any-return]

    def _seeds(self) -> list[int]:
        """Return a seed for each view."""
        return [draws.fold_in(self.seed, ROLES.index(role)) for role in self.views]


class DrawnBox:
    """A box of an image, which is drawn when its height and width are given.

    Args:
        crop: draws it.
        seed: of the view.
        step: of the batch.
        example: the number by which the views of the step know the image, (1,) int64.

    Attributes:
        is_mirrored: whether the box is to be mirrored, once it was drawn.
    """

    def __init__(self, crop: ResizedCrop, seed: int, step: int, example: Tensor) -> None:
        self.crop = crop
        self.seed = seed
        self.step = step
        self.example = example
        self.is_mirrored = False

    def __call__(self, height: int, width: int) -> Box:
        """Draw the box in an image of this size."""
        boxes, mirrors = self.crop.boxes(self.seed, self.step, self.example, height, width)
        self.is_mirrored = bool(mirrors[0])
        top, left, box_height, box_width = boxes[0].tolist()
        return left, top, left + box_width, top + box_height


def _examples_of(sampler: StepSampler, step: int) -> Tensor:
    """Return the numbers by which the views of a step know its examples, none of them twice."""
    # With B > n a batch holds copies of an example; counting the epoch in keeps their augmentations
    # apart. On the CPU, wherever the images are: a view that plans there would otherwise wait for
    # the device.
    return sampler.epochs(step) * sampler.size + sampler.indices(step)


@dataclass(frozen=True, eq=False)
class RowsOfShare:
    """Say which rows a share of batches reads in a step: its own, and those mixed with them.

    Args:
        batches: of which it is a share.
        number: of the share, from 0.
        shares: how many there are.
    """

    batches: ExampleBatches[Any]
    number: int
    shares: int

    @property
    def first_rows(self) -> Tensor:
        """Return the rows of the share, without those that are mixed with them."""
        return torch.arange(self.batches.batch_size).chunk(self.shares)[self.number]

    def __call__(self, step: int) -> Tensor:
        """Return the rows of a step."""
        needed = self.batches.rows_needed(step, self.first_rows)
        assert needed is not None, "share() has asked"
        return needed


@dataclass(frozen=True, eq=False)
class RawBatches(StepBatches[Fetched]):
    """Item t is ``batches.fetch(t)``: a tuple of tensors."""

    batches: ExampleBatches[Any]
    steps: int | None = None

    def batch(self, step: int) -> Fetched:
        """Return what is fetched of a step."""
        return self.batches.fetch(step)


@dataclass(frozen=True, eq=False)
class LabeledBatches(ExampleBatches[tuple[Tensor, Tensor]]):
    """The labeled batches: item t is (x, y).

    x = view(images[i]), y = labels[i], i = sampler.indices(t).

    Args:
        images: n examples: a tensor (n, ...), or :class:`~metapl.pictures.Images`, whose bytes
            become numbers in [0, 1].
        steps: number of steps, or None for an endless stream.
        crop: draws a box of the full image that is then brought to the size of ``images``; these
            are in files.
        stored: (n, C) stored class distributions, which items then hold too: (x, y, stored).

    Where a file is broken, x and y are of the one that replaces it, seen through the view of the
    broken one.

    >>> from metapl.pictures import Identity
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

    Without a strong view, items are the weak one alone. With ``stored``, (n, C) stored class
    distributions, they are (weak, stored). A ``crop`` draws a box for each view; files are decoded
    once.

    >>> from metapl.pictures import Identity, ShiftNoiseCutout
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

    >>> from metapl.pictures import MemoryImages
    >>> images = MemoryImages(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    >>> [len(y) for _, y in EvaluationBatches(images, torch.arange(5), batch_size=2)]
    [2, 2, 1]
    """

    images: Images
    labels: Tensor
    batch_size: int

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or self.batch_size < 1:
            raise MetaplError(
                f"EvaluationBatches got {len(self.images)} images, {len(self.labels)} labels, "
                f"batch_size {self.batch_size}; expected as many labels as images, 1 or more a "
                "batch"
            )

    # The number of batches follows from the fields, so that it is a property here.
    @property
    def steps(self) -> int:  # type: ignore[override]
        """Return the number of batches."""
        return -(-len(self.images) // self.batch_size)

    @property
    def examples(self) -> int:
        """Return the number of examples."""
        return len(self.labels)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step; a file that cannot be read is left out, not replaced."""
        start = step * self.batch_size
        indices = torch.arange(start, min(start + self.batch_size, len(self.images)))
        if isinstance(self.images, FileImages):
            images, used = self.images.fetch_sound(indices)
        else:
            images, used = self.images.fetch(indices)
        return in_unit_range(images), pick(self.labels, used)


def in_unit_range(images: Tensor) -> Tensor:
    """Return bytes as float32 in [0, 1]."""
    return images.to(torch.float32) / 255
