"""The data sets of the paper's picture protocols, through torchvision's loaders, and their splits."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metapl.apps.pictures.splits import Split, draw_split
from metapl.apps.pictures.store import FileImages, Images, MemoryImages
from metapl.errors import MetaplError, few, reason_of
from metapl.runs.memory import out_of_memory

IMAGENET_SIZE = (256, 256)
"""What ImageNet's pictures are brought to; crops of 224 are cut out of it."""


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
    """Load a data set that lies on disk as torchvision keeps it.

    Args:
        name: "cifar10", "cifar100" and "svhn" are read into memory; "imagenet" and "imagefolder" (a folder with
            ``train``, and ``test`` or ``val``, each with one folder a class) stay in files.
        root: the folder that torchvision calls so.
        size: (height, width) that pictures in files are brought to.
        log, center, mode: of pictures in files, see :class:`metapl.apps.pictures.FileImages`.

    Returns:
        The data set. Nothing is downloaded; ImageNet's archives are unpacked where that was not done yet.

    Cost: SVHN takes 1.9 GB of memory, and twice that for a moment.

    Raises:
        MetaplError: an unknown name, or files are missing or not those that torchvision knows; the message has the
            command that gets them.
    """
    if name not in _LOADERS:
        raise MetaplError(f"there is no data set {name!r}; expected one of {', '.join(_LOADERS)}.")
    folder = Path(root).expanduser()
    if name in ("imagenet", "imagefolder"):
        classes, train, test = _imagenet(folder) if name == "imagenet" else _image_folder(folder)
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
    return _svhn(folder) if name == "svhn" else _cifar(name, folder)


_LOADERS = ("cifar10", "cifar100", "svhn", "imagenet", "imagefolder")


def _cifar(name: str, root: Path) -> ImageData:
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    files = [root / kind.base_folder / file for file, _ in (*kind.train_list, *kind.test_list)]
    files.append(root / kind.base_folder / kind.meta["filename"])
    code = f"from torchvision.datasets import {kind.__name__} as D; D({json.dumps(str(root))}, download=True)"
    command = f"python -c {shlex.quote(code)}"
    train, test = (_loaded(name, partial(kind, root, train=t), files, command) for t in (True, False))
    train_images, test_images = (
        MemoryImages(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()) for part in (train, test)
    )
    labels = torch.tensor(train.targets), torch.tensor(test.targets)
    return ImageData(name, tuple(train.classes), train_images, labels[0], test_images, labels[1])


def _svhn(root: Path) -> ImageData:
    from torchvision.datasets import SVHN

    code = (
        f"from torchvision.datasets import SVHN as D; "
        f'[D({json.dumps(str(root))}, split=s, download=True) for s in ("train", "extra", "test")]'
    )
    core, extra, test = (
        _loaded("svhn", partial(SVHN, root, split=s), [root / SVHN.split_list[s][1]], f"python -c {shlex.quote(code)}")
        for s in ("train", "extra", "test")
    )
    # torch.cat would hold the extra pictures, most of a gigabyte and a half, three times for a moment.
    pool = torch.empty(len(core) + len(extra), 3, 32, 32, dtype=torch.uint8)
    pool[: len(core)] = torch.from_numpy(core.data)
    pool[len(core) :] = torch.from_numpy(extra.data)
    return ImageData(
        name="svhn",
        classes=tuple("0123456789"),
        train=MemoryImages(pool),
        train_labels=torch.from_numpy(np.concatenate([core.labels, extra.labels])),
        test=MemoryImages(torch.from_numpy(test.data).contiguous()),
        test_labels=torch.from_numpy(test.labels),
        core=len(core),
    )


def _imagenet(root: Path) -> tuple[tuple[str, ...], Any, Any]:
    from torchvision.datasets import ImageNet
    from torchvision.datasets.imagenet import ARCHIVE_META, META_FILE

    archives = {split: root / name for split, (name, _) in ARCHIVE_META.items()}
    mend = (
        f"get {', '.join(path.name for path in archives.values())} from "
        "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php (it takes an account) and put them into "
        f"{root}; they are unpacked there when first used"
    )

    def load(split: str) -> Any:
        needed = [root / META_FILE if (root / META_FILE).exists() else archives["devkit"]]
        needed.append(root / split if (root / split).is_dir() else archives[split])
        return _loaded("imagenet", partial(ImageNet, root, split=split), needed, mend)

    train, test = load("train"), load("val")
    _same_classes(train.wnids, test.wnids, root)
    return _distinct(train.classes, train.wnids), train, test


def _image_folder(root: Path) -> tuple[tuple[str, ...], Any, Any]:
    from torchvision.datasets import ImageFolder

    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    mend = f"put one folder a class into {root / 'train'} and into {root / 'test'} (or {root / 'val'})"
    train, test = (
        _loaded("imagefolder", partial(ImageFolder, folder), [folder], mend) for folder in (root / "train", held_out)
    )
    _same_classes(train.classes, test.classes, root)
    return tuple(train.classes), train, test


def _loaded(name: str, load: Callable[[], Any], files: Iterable[Path], mend: str) -> Any:
    """What torchvision loads, or what is missing and how to get it."""
    missing = [path for path in files if not path.exists()]
    if missing:
        raise MetaplError(f"the data set {name!r} is not there: {missing[0]} does not exist. To get it: {mend}")
    try:
        return load()
    except Exception as error:  # damaged files fail in pickle, scipy, torchvision or the unpacking
        if out_of_memory(error):
            raise
        raise MetaplError(
            f"the data set {name!r} cannot be loaded ({reason_of(error)}); expected files as torchvision knows them, "
            f"by their MD5 where it has one: remove what is there, then {mend}"
        ) from error


def _same_classes(train: list[str], test: list[str], root: Path) -> None:
    if train != test:
        raise MetaplError(
            f"{root} has {len(train)} classes to train on and {len(test)} to test on, which differ by "
            f"{few(sorted(set(train) ^ set(test)))}; expected the same folders in both"
        )


def _distinct(names: Iterable[tuple[str, ...]], keys: Iterable[str]) -> tuple[str, ...]:
    """The first of each class's names, with its key where two classes share it: there are two cranes in ImageNet."""
    first = [name[0] for name in names]
    shared = Counter(first)
    return tuple(name if shared[name] == 1 else f"{name} ({key})" for name, key in zip(first, keys, strict=True))
