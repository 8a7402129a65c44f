"""What both papers' scripts share: torchvision's sets, splits, views, networks, what they leave.

``protocols.py`` is Meta Pseudo Labels, ``noisy_student_imagenet.py`` is Noisy Student. Each of them
has its settings in a frozen dataclass; a function here says by the type of its argument ``c`` which
of these settings it reads.
"""

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from released_sets import Part, read_released
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import datasets

from metapl.data import draws
from metapl.errors import MetaplError, few
from metapl.labels import LabelStore
from metapl.metrics import Evaluation
from metapl.networks import Architecture, Input, NetworkCard, Normalized, create
from metapl.pictures import (
    CIFAR_OPERATIONS,
    SVHN_OPERATIONS,
    Chain,
    FileImages,
    Identity,
    LabeledBatches,
    MemoryImages,
    RandAugment,
    ResizedCrop,
    UnlabeledBatches,
    View,
    Weak,
    scan_unlabeled,
)
from metapl.pictures.batches import ExampleBatches, Images
from metapl.run_folder import save

# The streams of the two draws of a split. They keep these draws apart from every other use of a
# seed.
VALIDATION_STREAM = 0x5B17
LABELED_STREAM = 0x5B18

# Color mixes a picture with its grey copy: where it is drawn, a grey picture stays as it is.
GREY_OPERATIONS = tuple(name for name in CIFAR_OPERATIONS if name != "Color")

# Every network sees pictures whose values lie in [-2, 2].
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)


class SetSettings(Protocol):
    """Which set is read, from where, and how large the pictures of files become."""

    @property
    def data(self) -> str:
        """Return "cifar10", "cifar100", "svhn", "fashion" or "imagenet"."""
        ...

    @property
    def root(self) -> str:
        """Return the folder of its files."""
        ...

    @property
    def image_size(self) -> int: ...


class ViewSettings(Protocol):
    """How pictures are changed before a network sees them."""

    @property
    def data(self) -> str: ...

    @property
    def image_size(self) -> int: ...

    @property
    def magnitude(self) -> float:
        """Return the magnitude of RandAugment, at most 10."""
        ...

    @property
    def translate(self) -> float:
        """Return the greatest shift at magnitude 10, as a share of the side."""
        ...

    @property
    def cutout(self) -> int:
        """Return the side of the grey square, in pixels; 0 for none."""
        ...


class NetworkSettings(Protocol):
    """How a network is built, whatever its name."""

    @property
    def image_size(self) -> int: ...

    @property
    def stochastic_depth(self) -> float: ...

    @property
    def channels_last(self) -> bool: ...

    @property
    def device(self) -> str: ...


class DeliverySettings(Protocol):
    """Where a run leaves what it delivers, and what it says of itself there."""

    @property
    def out(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def steps(self) -> int | None: ...

    @property
    def channels_last(self) -> bool: ...


class PictureSet(NamedTuple):
    """Pictures to train on and to test on, with their labels, (n,) int64."""

    train: Images
    train_labels: Tensor
    test: Images
    test_labels: Tensor
    classes: list[str]
    # The first so many of the training pictures may keep their labels. SVHN's extra pictures come
    # after them.
    labelable: int


def load_pictures(c: SetSettings) -> PictureSet:
    """Read a set from its files below ``c.root``.

    ImageNet's are those that torchvision expects, ``released_sets`` has the forms of CIFAR and
    SVHN. Nothing is downloaded.
    """
    if c.data == "imagenet":
        return load_imagenet(c.root, c.image_size)
    if c.data == "fashion":
        return load_fashion(c.root)
    return load_released(c.data, c.root)


def load_released(name: str, root: str) -> PictureSet:
    """Read CIFAR or SVHN, whose extra pictures come after those that may keep their labels."""
    parts, classes = read_released(name, root)
    train, test = parts["train"], parts["test"]
    extra = parts.get("extra", Part(test.pictures[:0], test.labels[:0]))
    return PictureSet(
        MemoryImages(torch.cat([train.pictures, extra.pictures])),
        torch.cat([train.labels, extra.labels]),
        MemoryImages(test.pictures),
        test.labels,
        classes,
        labelable=len(train.labels),
    )


def load_fashion(root: str) -> PictureSet:
    """Read Fashion-MNIST from the four files of Debian's package dataset-fashion-mnist in ``root``.

    Its pictures are grey and of 28 x 28 pixels; each is repeated in three channels, which takes no
    memory, so that the networks of the other sets see it.
    """

    def content(name: str, offset: int) -> np.ndarray:
        file = Path(root) / f"{name}-ubyte.gz"
        if not file.exists():
            raise MetaplError(
                f"there is no {file}; expected the folder of Fashion-MNIST's four .gz files as "
                "--root."
            )
        return np.frombuffer(gzip.decompress(file.read_bytes()), dtype=np.uint8, offset=offset)

    pictures = []
    labels = []
    for part in ("train", "t10k"):
        # Before the bytes stand four big-endian numbers, and two of them where each byte is a
        # label.
        grey = torch.from_numpy(
            content(f"{part}-images-idx3", offset=16).reshape(-1, 1, 28, 28).copy()
        )
        pictures.append(MemoryImages(grey.expand(-1, 3, -1, -1)))
        labels.append(torch.from_numpy(content(f"{part}-labels-idx1", offset=8).copy()).long())
    classes = [
        "T-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ]
    return PictureSet(
        pictures[0], labels[0], pictures[1], labels[1], classes, labelable=len(labels[0])
    )


def load_imagenet(root: str, image_size: int) -> PictureSet:
    parts = [datasets.ImageNet(root, split=split) for split in ("train", "val")]
    read = partial(FileImages, size=(image_size, image_size), center=224 / 256)
    train, test = (read(path for path, _ in part.samples) for part in parts)
    train_labels, test_labels = (torch.tensor(part.targets) for part in parts)
    classes = [
        f"{names[0]} ({wnid})" for names, wnid in zip(parts[0].classes, parts[0].wnids, strict=True)
    ]
    return PictureSet(train, train_labels, test, test_labels, classes, labelable=len(train_labels))


def split_labels(
    labels: Tensor, per_class: int | None, validation: int, seed: int, labelable: int
) -> dict[str, Tensor]:
    """Return the sorted indices of the labeled, the unlabeled and the validation pictures.

    ``validation`` pictures are held out, with the classes in proportion. Of the first ``labelable``
    pictures that are left, ``per_class`` of each class keep their labels (None: all of them). The
    rest is unlabeled. A smaller number of labels lies within a larger one.
    """

    def order(stream: int) -> Tensor:
        return torch.argsort(
            draws.bits(seed, 0, torch.arange(len(labels)), 1, stream)[:, 0], stable=True
        )

    def first_of_each_class(indices: Tensor, counts: Tensor) -> Tensor:
        chosen = [indices[labels[indices] == c][:count] for c, count in enumerate(counts.tolist())]
        return torch.cat(chosen).sort().values

    class_sizes = labels.bincount()
    is_free = torch.ones(len(labels), dtype=torch.bool)
    # The classes with the largest remainders take what rounding down leaves.
    counts = class_sizes * validation // len(labels)
    remainders = class_sizes * validation % len(labels)
    counts[remainders.argsort(descending=True, stable=True)[: validation - int(counts.sum())]] += 1
    held_out = first_of_each_class(order(VALIDATION_STREAM), counts)
    is_free[held_out] = False
    candidates = order(LABELED_STREAM)
    candidates = candidates[is_free[candidates] & (candidates < labelable)]
    if per_class is None:
        labeled = candidates.sort().values
    else:
        labeled = first_of_each_class(candidates, torch.full_like(class_sizes, per_class))
    is_free[labeled] = False
    return {"labeled": labeled, "unlabeled": is_free.nonzero()[:, 0], "validation": held_out}


def views_of(
    c: ViewSettings, *, operations: Literal["cifar10", "svhn", "grey"] | None = None
) -> tuple[View, View, ResizedCrop | None]:
    """Return what teacher and student see, and the box that is cut out of a file before either.

    ``operations`` says whose list RandAugment draws from; None: that of the data, CIFAR-10's where
    it has none. With SVHN's, pictures are not mirrored. ``"grey"`` is CIFAR-10's without Color.
    """
    has_digits = (operations or c.data) == "svhn"
    drawn_from = CIFAR_OPERATIONS
    if has_digits:
        drawn_from = SVHN_OPERATIONS
    elif operations == "grey":
        drawn_from = GREY_OPERATIONS
    changed = RandAugment(
        2, c.magnitude, operations=drawn_from, translate=c.translate, cutout=c.cutout
    )
    if c.data == "imagenet":
        return Identity(), Chain((Identity(), changed)), ResizedCrop(c.image_size, flip=True)
    # The strong view is moved once more after RandAugment, as the authors' code does.
    weak = Weak(4, flip=not has_digits)
    return weak, Chain((weak, changed, weak)), None


@dataclass(frozen=True, eq=False, kw_only=True)
class WithStored(ExampleBatches[Any]):
    """Batches whose last tensor is the distributions of a store, read when needed.

    Args:
        rows: (n,) int64, where in the store each picture's distribution is.
    """

    rows: Tensor
    store: LabelStore

    @property
    def columns(self) -> dict[str, Tensor]:
        return {**super().columns, "rows": self.rows}

    def fetch(self, step: int) -> tuple[Tensor, ...]:
        *tensors, rows = super().fetch(step)
        return (*tensors, self.store.at(rows))


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredBatches(WithStored, UnlabeledBatches):
    """Batches (x, stored) of unlabeled pictures."""


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredLabeledBatches(WithStored, LabeledBatches):
    """Batches (x, y, stored) of labeled pictures."""


def stored_pictures(folder: str, store: LabelStore, image_size: int) -> tuple[FileImages, Tensor]:
    """Return a folder's pictures that a store has labels of, and their rows in it, (n,) int64.

    A picture counts as often as the store or, of a list, the list says; a selection's list and its
    store say the same.
    """
    listed = scan_unlabeled(folder)
    times = Counter(listed.names)
    files = listed.without_repeats()
    rows = torch.from_numpy(np.asarray(store.find(store.ids_of_files(files.root, files.names))))
    if not (rows >= 0).any():
        raise MetaplError(
            f"the store {store.folder} has labels of no picture below {folder}; expected `metapl "
            "label`'s."
        )
    pictures = FileImages(files.paths(), size=(image_size, image_size), center=224 / 256)
    numbers = (rows >= 0).nonzero()[:, 0]
    copies_listed = torch.tensor([times[name] for name in files.names])[numbers]
    copies_stored = torch.from_numpy(store.column("copies").astype(np.int64))[rows[numbers]]
    numbers = numbers.repeat_interleave(torch.maximum(copies_listed, copies_stored))
    return pictures.select(numbers), rows[numbers]


def stored_rows_of(images: FileImages, root: Path, store: LabelStore) -> Tensor:
    """Return the rows in a store of all pictures of a folder, (n,) int64; all have to be there."""
    names = [images.path(number).relative_to(root).as_posix() for number in range(len(images))]
    rows = torch.from_numpy(np.asarray(store.find(store.ids_of_files(root, names))))
    missing = [names[number] for number in (rows < 0).nonzero()[:, 0].tolist()]
    if missing:
        raise MetaplError(
            f"the store {store.folder} has no labels of {len(missing):,} of {len(rows):,} labeled "
            f"pictures ({few(missing)}); expected those of `metapl label RUN {root}`."
        )
    return rows


def build_network(c: NetworkSettings, classes: int, dropout: float, name: str) -> nn.Module:
    """Build a network by name, with fresh weights, that itself normalizes pictures in [0, 1]."""
    network = create(
        name, classes, image_size=c.image_size, dropout=dropout, stochastic_depth=c.stochastic_depth
    )
    normalized = Normalized(network, MEAN, STD).to(c.device)
    if c.channels_last:
        normalized.to(memory_format=torch.channels_last)
    return normalized


def save_weights(
    weights: Mapping[str, Tensor],
    file: Path,
    name: str,
    *,
    size: int,
    test: Images,
    classes: list[str],
) -> None:
    """Write the weights of a network, and what network it is, as a file of safetensors.

    What it is stands where ``metapl export`` has it, so that ``robustness.py`` evaluates the file
    by its own mean and std.

    Args:
        name: of the network, as :func:`metapl.networks.create` takes it.
        size: side of the pictures that it was tested on, which are ``test``.
    """
    about = {
        "architecture": asdict(Architecture(name=name, num_classes=len(classes), image_size=size)),
        "normalization": {"mean": MEAN, "std": STD},
        "classes": classes,
        "center": getattr(test, "center", 1.0),
    }
    tensors = {name: t.contiguous().cpu() for name, t in weights.items()}
    save_file(tensors, file, metadata={"metapl": json.dumps(about, sort_keys=True)})


def deliver(
    c: DeliverySettings,
    network: nn.Module,
    method: str,
    name: str,
    size: int,
    test: Images,
    classes: list[str],
    evaluation: Evaluation,
) -> None:
    """Leave a network as a run in OUT/delivered.

    ``metapl predict``, ``evaluate``, ``report`` and ``export`` read it.

    Args:
        method: the word that the run names its training by.
        name: of the network, as :func:`metapl.networks.create` takes it.
        size: side of the pictures that it was tested on, which are ``test``.
        evaluation: what it reached on them.
    """
    architecture = Architecture(name=name, num_classes=len(classes), image_size=size)
    seen = Input(size=size, center=getattr(test, "center", 1.0))
    card = NetworkCard(
        title="network",
        input=seen,
        architecture=architecture,
        mean=MEAN,
        std=STD,
        channels_last=c.channels_last,
    )
    folder = Path(c.out) / "delivered"
    shutil.rmtree(folder, ignore_errors=True)
    config: dict[str, Any] = {"seed": c.seed, "steps": c.steps or 0}
    save(
        folder,
        network,
        card,
        name=method,
        evaluation=evaluation,
        classes=list(classes),
        config=config,
    )
