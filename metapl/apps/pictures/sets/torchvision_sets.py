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

import torch
from torch import Tensor

from metapl.apps.pictures.splits import Split, draw_split
from metapl.apps.pictures.store import FileImages, Images, MemoryImages
from metapl.errors import MetaplError, few, reason_of
from metapl.runs.memory import out_of_memory

IMAGENET_SIZE = (256, 256)
"""What ImageNet's pictures are brought to; crops of 224 are cut out of it."""

_IN_MEMORY: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "cifar10": ("CIFAR10", "train", (True, False)),
    "cifar100": ("CIFAR100", "train", (True, False)),
    "svhn": ("SVHN", "split", ("train", "extra", "test")),
}
"""torchvision's class, and its argument that picks a part; all parts but the last are trained on."""


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
    folder = Path(root).expanduser()
    if name in _IN_MEMORY:
        return _in_memory(name, folder)
    if name not in ("imagenet", "imagefolder"):
        raise MetaplError(
            f"there is no data set {name!r}; expected one of {', '.join(_IN_MEMORY)}, imagenet, imagefolder."
        )
    train, test = _in_files(name, folder)
    keys, others = (getattr(part, "wnids", part.classes) for part in (train, test))
    if keys != others:
        differing = few(sorted({*keys} ^ {*others}))
        raise MetaplError(
            f"{folder} has {len(keys)} classes to train on and {len(others)} to test on, which differ by {differing}; "
            "expected the same folders in both"
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
    if is_svhn:
        files = [root / kind.split_list[value][1] for value in values]
    else:
        listed = [file for file, _ in (*kind.train_list, *kind.test_list)]
        files = [root / kind.base_folder / file for file in (*listed, kind.meta["filename"])]
    *parts, test = (_loaded(name, partial(kind, root, **{argument: value}), files, command) for value in values)

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
    from torchvision.datasets.imagenet import ARCHIVE_META, META_FILE

    if name == "imagefolder":
        held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
        mend = f"put one folder a class into {root / 'train'} and into {root / 'test'} (or {root / 'val'})"
        places = (root / "train", held_out)
        train, test = (_loaded(name, partial(ImageFolder, place), [place], mend) for place in places)
        return train, test
    archives = {split: root / file for split, (file, _) in ARCHIVE_META.items()}
    mend = (
        f"get {', '.join(path.name for path in archives.values())} from "
        "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php (it takes an account) and put them into "
        f"{root}; they are unpacked there when first used"
    )

    def load(split: str) -> Any:
        needed = [root / META_FILE if (root / META_FILE).exists() else archives["devkit"]]
        needed.append(root / split if (root / split).is_dir() else archives[split])
        return _loaded(name, partial(ImageNet, root, split=split), needed, mend)

    return load("train"), load("val")


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
