"""Known data sets, and which of their examples are labeled, unlabeled, held out."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metapl.apps.machine.memory import out_of_memory
from metapl.apps.machine.sealed import read_json, write_whole
from metapl.apps.pictures.store import FileImages, Images, MemoryImages
from metapl.data import draws
from metapl.errors import MetaplError, few, reason_of

# -------------------------------------------------------------------------------------------------------------- splits

_PARTS = ("labeled", "unlabeled", "validation", "test")
_VALIDATION, _LABELED = 0x5B17, 0x5B18  # keep these draws apart from every other use of a seed


@dataclass(frozen=True, eq=False)
class Split:
    """The parts of a data set, as indices.

    Args:
        name, seed: of the protocol, such as "cifar10-4k", and that it was drawn from.
        labeled, unlabeled, validation: indices into the training data, disjoint, sorted, int64.
        test: indices into the test data.
        labels_hash: SHA-256 of the labels of the training and of the test data; the order counts.
    """

    name: str
    seed: int
    labeled: Tensor
    unlabeled: Tensor
    validation: Tensor
    test: Tensor
    labels_hash: str

    @property
    def hash(self) -> str:
        """SHA-256 of all fields, in hexadecimal."""
        return _hash(self._fields())

    def counts(self) -> dict[str, int]:
        """Number of examples in each part."""
        return {part: len(getattr(self, part)) for part in _PARTS}

    def save(self, path: str | Path) -> None:
        """Write the split as JSON; a MetaplError where the disk refuses."""
        text = json.dumps({"version": 1, **self._fields(), "hash": self.hash}, separators=(",", ":"))
        write_whole(Path(path), text.encode(), "expected a folder with room.")

    @classmethod
    def load(cls, path: str | Path, train_labels: Tensor, test_labels: Tensor) -> Split:
        """Read what :meth:`save` wrote, for the data set that it was made for, with these labels, int64 (n,).

        Raises:
            MetaplError: the file cannot be read, was changed, or is of a data set with other labels, or the same in
                another order.
        """
        parts = dict.fromkeys(_PARTS, list[int])
        hints = {"version": Literal[1], "hash": str, "name": str, "seed": int, "labels_hash": str, **parts}
        content = read_json(path, hints, hints, mend="Expected what Split.save wrote: draw the split anew.")
        if content.pop("hash") != _hash({name: value for name, value in content.items() if name != "version"}):
            raise MetaplError(f"{path} was changed after it was written: its hash does not match; draw the split anew.")
        indices = {part: torch.tensor(content[part], dtype=torch.int64) for part in _PARTS}
        split = cls(name=content["name"], seed=content["seed"], labels_hash=content["labels_hash"], **indices)
        if split.labels_hash != labels_hash(train_labels, test_labels):
            raise MetaplError(
                f"{path} is the split {split.name!r} of other data, or of the same in another order; expected the data "
                f"set that it was drawn for, with all its files: here are {len(train_labels)} and {len(test_labels)}."
            )
        return split

    def _fields(self) -> dict[str, Any]:
        parts = {part: getattr(self, part).tolist() for part in _PARTS}
        return {"name": self.name, "seed": self.seed, "labels_hash": self.labels_hash, **parts}


def _hash(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def labels_hash(train_labels: Tensor, test_labels: Tensor) -> str:
    """SHA-256 of two vectors of labels: the same for the same data set in the same order."""
    digest = hashlib.sha256()
    for labels in (train_labels, test_labels):
        digest.update(f"{len(labels)}:".encode())
        digest.update(labels.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def draw_split(
    train_labels: Tensor,
    test_labels: Tensor,
    *,
    name: str,
    seed: int,
    labels_per_class: int,
    validation: int,
    labeled_from: int | None = None,
) -> Split:
    """Draw which training examples are held out, and which of the rest keep their labels.

    Validation is drawn first, with the classes in proportion (largest remainders), then ``labels_per_class`` of each
    class; the rest is unlabeled. So with one seed, the labeled examples for fewer labels lie within those for more.

    Args:
        train_labels, test_labels: int64 (n,), classes 0, …, C − 1; every test example is in the test part.
        name: of the protocol.
        seed: any integer.
        labels_per_class: 1 or more.
        validation: number of training examples that are not trained on, 0 or more.
        labeled_from: labels are kept among the first so many examples only; None: among all.

    Raises:
        MetaplError: a number out of its range, or a class has too few examples.

    >>> labels = torch.arange(10).repeat(50)
    >>> draw_split(labels, labels[:100], name="tiny", seed=0, labels_per_class=4, validation=50).counts()
    {'labeled': 40, 'unlabeled': 410, 'validation': 50, 'test': 100}
    """
    count = len(train_labels)
    if labels_per_class < 1 or not 0 <= validation < count:
        raise MetaplError(
            f"split {name!r} got labels_per_class {labels_per_class} and validation {validation} for "
            f"{count} training examples; expected 1 or more labels, and fewer held out than there are"
        )
    classes, of, sizes = train_labels.unique(return_inverse=True, return_counts=True)
    # Whole numbers: a quotient in floating point could rank equal remainders differently elsewhere.
    share, remainder = sizes * validation // count, sizes * validation % count
    share[remainder.argsort(descending=True, stable=True)[: validation - int(share.sum())]] += 1
    held_out = _first_of_each(_shuffled(count, seed, _VALIDATION), of, share)
    free = torch.ones(count, dtype=torch.bool)
    free[held_out] = False
    order = _shuffled(count, seed, _LABELED)
    able = order[free[order] & (order < (count if labeled_from is None else labeled_from))]
    counts = of[able].bincount(minlength=len(classes))
    if int(counts.min()) < labels_per_class:
        fewest = int(counts.argmin())
        raise MetaplError(
            f"split {name!r} needs {labels_per_class} labels of class {int(classes[fewest])}, which has "
            f"{int(counts[fewest])} examples outside validation; ask for fewer labels or a smaller validation part"
        )
    labeled = _first_of_each(able, of, torch.full_like(classes, labels_per_class))
    free[labeled] = False
    unlabeled, test = free.nonzero()[:, 0], torch.arange(len(test_labels))
    return Split(name, seed, labeled, unlabeled, held_out, test, labels_hash(train_labels, test_labels))


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Set a part of each class aside for validation: of n examples round(fraction · n), but at least 1 and at most
    n − 1.

    Args:
        labels: int64 (n,).
        fraction: of each class, in (0, 1).
        seed: any integer.

    Returns:
        (train, validation): indices, int64, disjoint, sorted, and together all.

    Raises:
        MetaplError: a fraction out of its range; no class has two examples.

    >>> train, validation = stratified_split(torch.tensor([0] * 8 + [1] * 4 + [2]), 0.25, seed=0)
    >>> len(train), len(validation)
    (10, 3)
    """
    if not 0 < fraction < 1:
        raise MetaplError(f"stratified_split got fraction {fraction}; expected a number between 0 and 1, such as 0.1.")
    _, of, sizes = labels.unique(return_inverse=True, return_counts=True)
    share = (fraction * sizes.double()).round().long().clamp(min=1).minimum(sizes - 1)
    validation = _first_of_each(_shuffled(len(labels), seed, _VALIDATION), of, share)
    if not len(validation):
        raise MetaplError(f"no class of the {len(labels)} labeled pictures has two; expected more, or --val FOLDER.")
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[validation] = False
    return rest.nonzero()[:, 0], validation


def _shuffled(size: int, seed: int, stream: int) -> Tensor:
    """A random order of range(size)."""
    return torch.argsort(draws.bits(seed, 0, torch.arange(size), 1, stream)[:, 0], stable=True)


def _first_of_each(order: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """The first ``counts[c]`` examples of each class c in an order of examples, sorted by their number."""
    in_order = classes[order]
    return order[_rank_in_class(in_order) < counts[in_order]].sort().values


def _rank_in_class(classes: Tensor) -> Tensor:
    """For each entry of (n,) int64, how many entries before it are equal to it."""
    by_class = classes.argsort(stable=True)
    counts = classes.bincount()
    rank = torch.empty_like(classes)
    rank[by_class] = torch.arange(len(classes)) - (counts.cumsum(0) - counts)[classes[by_class]]
    return rank


# -------------------------------------------------------------------------------------------------------------- digits


@dataclass(frozen=True, eq=False)
class DigitsSplit:
    """The digits in four disjoint parts; images float32 (n, 1, 8, 8) in [0, 1], labels int64 (n,) in 0, …, 9.

    ``unlabeled_truth`` has the labels that were hidden, for diagnostics only: nothing may be trained, selected or
    stopped on them.
    """

    labeled: tuple[Tensor, Tensor]
    unlabeled: Tensor
    unlabeled_truth: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits_split(labels_per_class: int, seed: int, validation: int = 197, test: int = 400) -> DigitsSplit:
    """Split scikit-learn's 1,797 handwritten digits anew for a seed, and keep the labels of a few of each class.

    Args:
        labels_per_class: labeled images of each class, 1 or more.
        seed: from 0 to 2³² − 1. With one seed, the parts for fewer labels lie within those for more.
        validation, test: number of images to select on and to report on, 10 or more each, drawn with the classes in
            proportion.

    Raises:
        MetaplError: a number out of its range, or more labels than the rest has.

    >>> split = load_digits_split(labels_per_class=4, seed=0)
    >>> len(split.labeled[0]), len(split.unlabeled), len(split.validation[0]), len(split.test[0])
    (40, 1160, 197, 400)
    """
    from sklearn.datasets import load_digits  # it takes a second, and only the digits need it
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.as_tensor(data.target, dtype=torch.int64)
    how = {"random_state": seed}
    try:
        rest, test_rows = train_test_split(range(len(labels)), test_size=test, stratify=labels, **how)
        train_rows, validation_rows = train_test_split(rest, test_size=validation, stratify=labels[rest], **how)
    except ValueError as error:  # sklearn's own, for numbers that are out of its range
        raise MetaplError(
            f"the {len(labels)} digits cannot be split by seed {seed} into {validation} for validation and {test} for "
            f"test: {reason_of(error)}"
        ) from error
    train = torch.tensor(train_rows)
    fewest = int(labels[train].bincount(minlength=10).min())
    if not 1 <= labels_per_class <= fewest:
        raise MetaplError(
            f"labels_per_class is {labels_per_class}; expected 1 or more, and at most {fewest}, the size of the "
            "smallest class outside validation and test: ask for fewer labels or make those smaller"
        )
    # The split comes shuffled, so the first of each class are a random choice.
    chosen = _rank_in_class(labels[train]) < labels_per_class
    parts = (train[chosen], train[~chosen], validation_rows, test_rows)
    (x, y), (unlabeled, truth), held_out, last = ((images[rows], labels[rows]) for rows in parts)
    return DigitsSplit((x, y), unlabeled, truth, held_out, last)


# ------------------------------------------------------------------------------------------------ torchvision's loaders

IMAGENET_SIZE = (256, 256)  # what ImageNet's pictures are brought to; crops of 224 are cut out of it

# torchvision's class, and its argument that picks a part; all parts but the last are trained on.
_IN_MEMORY: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "cifar10": ("CIFAR10", "train", (True, False)),
    "cifar100": ("CIFAR100", "train", (True, False)),
    "svhn": ("SVHN", "split", ("train", "extra", "test")),
}


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set with labels: what is trained on, and what is tested on.

    Args:
        name: "cifar10", "cifar100", "svhn", "imagenet" or "imagefolder".
        classes: names, in the order of the labels.
        train: pictures to train on; for SVHN, the core and then the extra ones.
        train_labels: int64 (n,).
        test, test_labels: pictures to test on; for ImageNet, the validation pictures of ILSVRC 2012.
        core: number of training pictures at the beginning that labels are kept of; for SVHN, the core; None: all.
        test_names: the files that these are in, below their class folder; None where they are in none.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    train_labels: Tensor
    test: Images
    test_labels: Tensor
    core: int | None = None
    test_names: tuple[str, ...] | None = None

    def split(self, name: str, seed: int, labels_per_class: int, validation: int) -> Split:
        """Which pictures keep their labels, and which are held out; see :func:`metapl.apps.pictures.draw_split`."""
        given: dict[str, Any] = {"name": name, "seed": seed, "labels_per_class": labels_per_class}
        return draw_split(self.train_labels, self.test_labels, validation=validation, labeled_from=self.core, **given)


def load_image_data(
    name: str,
    root: str | Path,
    size: tuple[int, int] = IMAGENET_SIZE,
    log: Path | None = None,
    center: float = 1.0,
    mode: Literal["RGB", "L"] = "RGB",
) -> ImageData:
    """Load a data set that lies on disk as torchvision keeps it; nothing is downloaded.

    Args:
        name: "cifar10", "cifar100" and "svhn" are read into memory; "imagenet" (its archives are unpacked where need
            be) and "imagefolder" (with ``train``, and ``test`` or ``val``, each with one folder a class) stay in files.
        root: the folder that torchvision calls so.
        size: (height, width) that pictures in files are brought to.
        log, center, mode: of pictures in files, see :class:`metapl.apps.pictures.FileImages`.

    Cost: SVHN takes 1.9 GB of memory, and twice that for a moment.

    Raises:
        MetaplError: an unknown name, or files are missing or not those that torchvision knows; the message has the
            command that gets them.
    """
    folder = Path(root).expanduser()
    if name in _IN_MEMORY:
        return _in_memory(name, folder)
    if name not in ("imagenet", "imagefolder"):
        known = ", ".join(_IN_MEMORY)
        raise MetaplError(f"there is no data set {name!r}; expected one of {known}, imagenet, imagefolder.")
    train, test = _in_files(name, folder)
    keys, others = (getattr(part, "wnids", part.classes) for part in (train, test))
    if keys != others:
        raise MetaplError(
            f"{folder} has {len(keys)} classes to train on and {len(others)} to test on, which differ by "
            f"{few(sorted({*keys} ^ {*others}))}; expected the same folders in both"
        )
    classes = tuple(train.classes)
    if name == "imagenet":
        # The first of each class's names, with its key where two classes share it: there are two cranes.
        shared = Counter(names[0] for names in classes)
        pairs = zip(classes, keys, strict=True)
        classes = tuple(names[0] if shared[names[0]] == 1 else f"{names[0]} ({key})" for names, key in pairs)
    read = partial(FileImages, size=size, log=log, center=center, mode=mode)
    return ImageData(
        name,
        classes,
        train=read(path for path, _ in train.samples),
        train_labels=torch.tensor(train.targets),
        test=read(path for path, _ in test.samples),
        test_labels=torch.tensor(test.targets),
        test_names=tuple("/".join(Path(path).parts[-2:]) for path, _ in test.samples),
    )


def _in_memory(name: str, root: Path) -> ImageData:
    from torchvision import datasets

    called, argument, values = _IN_MEMORY[name]
    kind, is_svhn = getattr(datasets, called), name == "svhn"
    given = [f", split={json.dumps(value)}" for value in values] if is_svhn else [""]
    calls = "; ".join(f"D({json.dumps(str(root))}{which}, download=True)" for which in given)
    command = f"python -c {shlex.quote(f'from torchvision.datasets import {called} as D; {calls}')}"
    *parts, test = (_loaded(name, partial(kind, root, **{argument: value}), command) for value in values)

    def pixels(part: Any) -> Tensor:
        data = torch.from_numpy(part.data)
        return data if is_svhn else data.permute(0, 3, 1, 2)

    # torch.cat would hold SVHN's extra pictures, most of a gigabyte and a half, three times for a moment.
    pool, start = torch.empty(sum(map(len, parts)), 3, 32, 32, dtype=torch.uint8), 0
    for part in parts:
        pool[start : start + len(part)] = pixels(part)
        start += len(part)
    labels = [torch.as_tensor(part.labels if is_svhn else part.targets) for part in (*parts, test)]
    return ImageData(
        name,
        tuple("0123456789") if is_svhn else tuple(test.classes),
        train=MemoryImages(pool),
        train_labels=torch.cat(labels[:-1]),
        test=MemoryImages(pixels(test).contiguous()),
        test_labels=labels[-1],
        core=len(parts[0]) if is_svhn else None,
    )


def _in_files(name: str, root: Path) -> tuple[Any, Any]:
    """What torchvision has of the pictures to train and to test on."""
    from torchvision.datasets import ImageFolder, ImageNet

    if name == "imagefolder":
        held_out = "val" if (root / "val").is_dir() and not (root / "test").is_dir() else "test"
        mend = f"put one folder a class into {root / 'train'} and into {root / 'test'} (or {root / 'val'})"
        loads = [partial(ImageFolder, root / part) for part in ("train", held_out)]
    else:
        mend = (
            "get ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar from "
            "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php (it takes an account) and put them into "
            f"{root}; they are unpacked there when first used"
        )
        loads = [partial(ImageNet, root, split=split) for split in ("train", "val")]
    train, test = (_loaded(name, load, mend) for load in loads)
    return train, test


def _loaded(name: str, load: Callable[[], Any], mend: str) -> Any:
    """What torchvision loads, or why it cannot and how to get it."""
    try:
        return load()
    except Exception as error:  # missing and damaged files fail in pickle, scipy, torchvision or the unpacking
        if out_of_memory(error):
            raise
        raise MetaplError(
            f"the data set {name!r} is not there, or not as torchvision knows it ({reason_of(error)}); remove damaged "
            f"files. To get it: {mend}"
        ) from error
