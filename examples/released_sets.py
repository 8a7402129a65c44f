"""CIFAR-10, CIFAR-100 and SVHN in the forms in which people have them, as the same arrays.

Below ``root`` may lie, looked for in this order:

- what torchvision reads: ``cifar-10-batches-py/``, ``cifar-100-python/``, ``train_32x32.mat``;
- the binary version of CIFAR: ``data_batch_1.bin`` or ``train.bin``, here or in the folder of its
  archive (``cifar-10-batches-bin/``, ``cifar-100-binary/``);
- Parquet files of encoded pictures, as the hub has them: ``train-00000-of-00001.parquet``, here or
  one folder deeper;
- folders: ``train/CLASS/*.png``, ``test/CLASS/*.png``, of SVHN ``extra/CLASS/*.png`` too.

The first two have the order of the release, and Parquet files are read in their own. Folders have
an order where their files are called by the numbers 0 to n - 1, and else none: pictures are then
sorted by class and name, and a split of such a set is not the split of the others.
"""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from metapl.errors import MetaplError, needed_for, reason_of
from metapl.pictures import LabeledFiles, UnreadableImage, scan_labeled

SIDE = 32

# Of each set, the classes that torchvision's reader has, and the parts that people publish.
PARTS = {
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "svhn": ("train", "extra", "test"),
}
BATCHES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
# Where a set's binary version lies, its files, and the one with the names of its classes.
BINARY = {
    "cifar10": ("cifar-10-batches-bin", BATCHES, "batches.meta.txt"),
    "cifar100": ("cifar-100-binary", ["train.bin", "test.bin"], "fine_label_names.txt"),
}
# The columns of a Parquet file, by their names on the hub.
PICTURE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")


class Part(NamedTuple):
    """Pictures uint8 (n, 3, 32, 32), and their labels int64 (n,)."""

    pictures: Tensor
    labels: Tensor


class Released(NamedTuple):
    """The parts of a set by their names, and the names of its classes."""

    parts: dict[str, Part]
    classes: list[str]


def read_released(name: str, root: str) -> Released:
    """Read "cifar10", "cifar100" or "svhn" from the form of it that lies below a folder.

    Raises:
        MetaplError: there is no form of it, or a file is not as that form has it.
    """
    folder = Path(root)
    for read in (by_torchvision, from_binary, from_parquet, from_folders):
        released = read(name, folder)
        if released is not None:
            return released
    first = "train_32x32.mat" if name == "svhn" else f"{folder_of_torchvision(name)}/"
    raise MetaplError(
        f"there is no {name} in {root}; expected {first} as torchvision reads it, "
        f"{other_forms(name)}, each with its test pictures beside it."
    )


def other_forms(name: str) -> str:
    """Return the forms of a set that torchvision does not read."""
    binary = "" if name == "svhn" else f"{BINARY[name][1][0]}, "
    return f"{binary}train*.parquet, or folders train/CLASS/*.png"


def folder_of_torchvision(name: str) -> str:
    reader = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    return reader.base_folder


def by_torchvision(name: str, root: Path) -> Released | None:
    """Read the files that torchvision reads; it compares them with their MD5."""
    parts = {}
    classes = list("0123456789")
    try:
        if name == "svhn":
            if not (root / "train_32x32.mat").exists():
                return None
            for part in PARTS[name]:
                svhn = datasets.SVHN(str(root), split=part)
                parts[part] = Part(torch.from_numpy(svhn.data), torch.as_tensor(svhn.labels))
            return Released(parts, classes)
        if not (root / folder_of_torchvision(name)).is_dir():
            return None
        reader = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        for part in PARTS[name]:
            cifar = reader(str(root), train=part == "train")
            pictures = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
            parts[part] = Part(pictures, torch.tensor(cifar.targets))
            classes = cifar.classes
    except RuntimeError as error:
        raise MetaplError(
            f"torchvision does not read the {name} in {root}: a file is missing, or has another "
            "MD5 than the released one, so that its pictures may be others; expected the released "
            f"files, or in a folder without them {other_forms(name)}."
        ) from error
    return Released(parts, classes)


def from_binary(name: str, root: Path) -> Released | None:
    """Read records of one label, of CIFAR-100 a coarse and a fine one, and 3,072 values."""
    if name not in BINARY:
        return None
    archive, files, names = BINARY[name]
    folder = next((place for place in (root, root / archive) if (place / files[0]).exists()), None)
    if folder is None:
        return None
    labels_of_record = 2 if name == "cifar100" else 1
    length = labels_of_record + 3 * SIDE * SIDE
    records = []
    for file in files:
        try:
            content = np.fromfile(folder / file, dtype=np.uint8)
        except OSError as error:
            raise MetaplError(
                f"{folder / file} cannot be read: {reason_of(error)}; expected {', '.join(files)}."
            ) from error
        if len(content) % length or not len(content):
            raise MetaplError(
                f"{folder / file} has {len(content):,} bytes; expected records of {length:,}, as "
                f"the binary version of {name} has them."
            )
        records.append(content.reshape(-1, length))
    classes = None
    if (folder / names).exists():
        classes = (folder / names).read_text().split()
    parts = {}
    for part, content in (("train", np.concatenate(records[:-1])), ("test", records[-1])):
        pictures = content[:, labels_of_record:].reshape(-1, 3, SIDE, SIDE).copy()
        labels = torch.from_numpy(content[:, labels_of_record - 1].astype(np.int64))
        parts[part] = Part(torch.from_numpy(pictures), labels)
    return Released(parts, classes or numbers_of(parts))


def from_parquet(name: str, root: Path) -> Released | None:
    """Read the encoded pictures and labels of the hub's tables, file after file."""
    files = {
        part: sorted({*root.glob(f"{part}*.parquet"), *root.glob(f"*/{part}*.parquet")})
        for part in PARTS[name]
    }
    if not files["train"]:
        return None
    with needed_for("a Parquet file"):
        import pyarrow.parquet as pq
    parts = {}
    classes = None
    for part, paths in files.items():
        labels: list[int] = []
        pictures: list[np.ndarray] = []
        for path in paths:
            table = pq.read_table(path)
            columns = table.column_names
            picture_column = next((each for each in PICTURE_COLUMNS if each in columns), None)
            label_column = next((each for each in LABEL_COLUMNS if each in columns), None)
            if picture_column is None or label_column is None:
                raise MetaplError(
                    f"{path} has the columns {', '.join(columns)}; expected "
                    f"{' or '.join(PICTURE_COLUMNS)}, and {' or '.join(LABEL_COLUMNS)}."
                )
            classes = classes or names_in(table.schema.metadata or {}, label_column)
            labels += table[label_column].to_pylist()
            for number, value in enumerate(table[picture_column].to_pylist()):
                encoded = value["bytes"] if isinstance(value, dict) else value
                pictures.append(decoded(encoded, f"row {number} of {path}"))
        parts[part] = part_of(pictures, labels, f"{part}*.parquet below {root}")
    return Released(parts, classes or numbers_of(parts))


def names_in(metadata: dict[bytes, bytes], column: str) -> list[str] | None:
    """Return the names of the classes by the hub's description of a column, or None."""
    description = json.loads(metadata.get(b"huggingface", b"{}"))
    feature: Any = description.get("info", {}).get("features", {}).get(column, {})
    return feature.get("names")


def from_folders(name: str, root: Path) -> Released | None:
    """Read one folder a class of each part, and say where their order is not known."""
    if not (root / "train").is_dir():
        return None
    parts = {}
    classes: tuple[str, ...] = ()
    for part in PARTS[name]:
        files = scan_labeled(root / part)
        classes = classes or files.classes
        order = order_of(files)
        if order is None:
            print(
                f"note: {root / part} has no order of its own: its files are not called by the "
                f"numbers 0 to {len(files) - 1:,}. They are sorted by class and name, and a split "
                "is another one than that of the released files.",
                file=sys.stderr,
            )
            order = list(range(len(files)))
        labels = files.targets(classes)[order]
        pictures = [decoded(path.read_bytes(), path) for path in map(files.path, order)]
        parts[part] = part_of(pictures, labels.tolist(), root / part)
    return Released(parts, list(classes))


def order_of(files: LabeledFiles) -> list[int] | None:
    """Return the files in the order of their numbers, or None where these are not 0 to n - 1."""
    stems = [Path(name).stem for name in files.names]
    if not all(stem.isdecimal() for stem in stems):
        return None
    numbers = [int(stem) for stem in stems]
    if sorted(numbers) != list(range(len(numbers))):
        return None
    return sorted(range(len(numbers)), key=numbers.__getitem__)


def decoded(encoded: bytes, place: object) -> np.ndarray:
    """Return an encoded picture, uint8 (3, 32, 32)."""
    try:
        picture = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    except (OSError, ValueError) as error:
        raise UnreadableImage(str(place), reason_of(error)) from error
    if picture.shape[:2] != (SIDE, SIDE):
        height, width = picture.shape[:2]
        raise MetaplError(f"{place} has {width} x {height} pixels; expected {SIDE} x {SIDE}.")
    return picture.transpose(2, 0, 1)


def part_of(pictures: Sequence[np.ndarray], labels: Sequence[int], place: object) -> Part:
    """Return pictures and labels as tensors; refuse a part without any."""
    if not pictures:
        raise MetaplError(f"there is no picture in {place}; expected some, with their labels.")
    return Part(torch.from_numpy(np.stack(pictures)), torch.tensor(labels, dtype=torch.int64))


def numbers_of(parts: dict[str, Part]) -> list[str]:
    """Return the numbers of the classes as their names, where a form does not name them."""
    return [str(number) for number in range(int(parts["train"].labels.max()) + 1)]
