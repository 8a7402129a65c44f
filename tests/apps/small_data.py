"""Small data sets in the exact format in which torchvision finds the real ones on disk.

Where torchvision checks files by their MD5, its own tables get those of the small files, so the check is made and can
fail; nothing else of its loaders is changed.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets
from torchvision.datasets import imagenet


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: type[datasets.CIFAR10], each: int, test: int
) -> None:
    """``each`` training pictures a file; picture i of all has the level i mod 256, and the label i mod 10 (or 100)."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    classes = 10 if kind is datasets.CIFAR10 else 100
    key = "labels" if classes == 10 else "fine_labels"
    table: dict[str, list[list[str]]] = {}
    start = 0
    for which, count in (("train_list", each), ("test_list", test)):
        table[which] = []
        for name, _ in getattr(kind, which):
            numbers = np.arange(start, start + count)
            start += count
            batch = {
                "batch_label": name,
                "data": np.repeat((numbers % 256).astype(np.uint8)[:, None], 3072, axis=1),
                key: (numbers % classes).tolist(),
                "filenames": [f"{i}.png" for i in numbers],
            }
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
            table[which].append([name, md5(folder / name)])
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: [f"class{i}" for i in range(classes)]}, protocol=2))
    for which, entries in table.items():
        monkeypatch.setattr(kind, which, entries)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch, **counts: int) -> None:
    """Pictures of one level in each split: 10, 20 and 30; labels from 1 to 10, which stands for the digit 0."""
    root.mkdir(parents=True)
    table = dict(datasets.SVHN.split_list)
    for level, (split, count) in enumerate(counts.items(), start=1):
        url, name, _ = table[split]
        pictures = np.full((32, 32, 3, count), 10 * level, dtype=np.uint8)
        pictures[0, 1, 2] = np.arange(count) % 256  # top row, second column, blue
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
        scipy.io.savemat(root / name, {"X": pictures, "y": labels})
        table[split] = [url, name, md5(root / name)]
    monkeypatch.setattr(datasets.SVHN, "split_list", table)


WNIDS = ("n01440764", "n02012849", "n03126707")  # tench, crane the bird, crane the machine
NAMES = ("tench, Tinca tinca", "crane", "crane")


def write_imagenet(root: Path, monkeypatch: pytest.MonkeyPatch, each: int, val: int, noise: int = 0) -> None:
    """The three archives as they are downloaded; a training picture of class c has the level 50 c, and noise on it."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def picture(level: int) -> bytes:
        file = io.BytesIO()
        levels = level + rng.integers(0, noise + 1, (30, 40, 3))
        Image.fromarray(levels.astype(np.uint8)).save(file, "JPEG", quality=95)
        return file.getvalue()

    def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))

    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    kinds += [("children", "O"), ("wordnet_height", "O"), ("num_train_images", "O")]
    synsets = np.empty((4, 1), dtype=kinds)
    # The order of the devkit is not that of the folders, and it has inner nodes of the tree of words.
    for row, c in enumerate((2, 0, 1)):
        synsets[row, 0] = (row + 1, WNIDS[c], NAMES[c], "", 0, [], 0, each)
    synsets[3, 0] = (4, "n00001740", "entity", "", 3, [1, 2, 3], 1, 0)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    numbers = {c: row + 1 for row, c in enumerate((2, 0, 1))}
    truth = "".join(f"{numbers[i % 3]}\n" for i in range(val))

    archives = {split: root / name for split, (name, _) in imagenet.ARCHIVE_META.items()}
    with tarfile.open(archives["devkit"], "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    with tarfile.open(archives["train"], "w") as archive:
        for c, wnid in enumerate(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as pictures:
                for i in range(each):
                    add(pictures, f"{wnid}_{i}.JPEG", picture(50 * c))
            add(archive, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(archives["val"], "w") as archive:
        for i in range(val):
            add(archive, f"ILSVRC2012_val_{i + 1:08}.JPEG", picture(50 * (i % 3) + 5))
    known = {split: (path.name, md5(path)) for split, path in archives.items()}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", known)
