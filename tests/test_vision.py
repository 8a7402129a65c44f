"""torchvision's data sets, from small files in the exact format of each, and the paper's splits of them.

Where torchvision checks files by their MD5, its own tables get those of the small files, so the check is made and can
fail; nothing else of its loaders is changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets import imagenet

from metapl.data import (
    PROTOCOLS,
    FileImages,
    Identity,
    ImageEvaluationBatches,
    ImageLabeledBatches,
    ImageUnlabeledBatches,
    MemoryImages,
    Split,
    StepSampler,
    VisionData,
    load_vision,
)
from metapl.errors import MetaplError


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# --- the formats ------------------------------------------------------------------------------------------------------


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


def write_imagenet(root: Path, monkeypatch: pytest.MonkeyPatch, each: int, val: int) -> None:
    """The three archives as they are downloaded; a training picture of class c has the level 50 c."""
    root.mkdir(parents=True)

    def picture(level: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (level, level, level)).save(file, "JPEG", quality=95)
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


# --- the data sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    write_cifar(tmp_path, monkeypatch, kind, each=30, test=20)
    data = load_vision(name, tmp_path)
    count = 30 * len(kind.train_list)
    classes = 10 if name == "cifar10" else 100
    assert data.classes == tuple(f"class{i}" for i in range(classes))
    assert data.train_labels.tolist() == [i % classes for i in range(count)]
    assert data.test_labels.tolist() == [i % classes for i in range(count, count + 20)]
    assert (len(data.train), len(data.test), data.core) == (count, 20, count)
    images, _ = data.train.fetch(torch.tensor([7, 3]))
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert [one.unique().tolist() for one in images] == [[7], [3]]
    # The real loader is what read it.
    assert torch.equal(images[0], torch.from_numpy(np.array(kind(tmp_path)[7][0])).permute(2, 0, 1))


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "svhn"
    write_svhn(root, monkeypatch, train=30, extra=50, test=20)
    data = load_vision("svhn", root)
    assert data.classes == tuple("0123456789")
    assert (len(data.train), len(data.test), data.core) == (80, 20, 30)
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.train_labels.tolist() == [(i + 1) % 10 for i in (*range(30), *range(50))]
    images, _ = data.train.fetch(torch.tensor([29, 30]))
    assert images[:, 0, 0, 0].tolist() == [10, 20]
    assert images[:, 2, 0, 1].tolist() == [29, 0]  # (channel, row, column)
    assert data.test.fetch(torch.tensor([4]))[0][0, :2].unique().tolist() == [30]
    assert torch.equal(images[0], torch.from_numpy(np.array(datasets.SVHN(root)[29][0])).permute(2, 0, 1))


def test_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "imagenet"
    write_imagenet(root, monkeypatch, each=4, val=6)
    data = load_vision("imagenet", root, size=(8, 8))
    assert data.classes == ("tench", "crane (n02012849)", "crane (n03126707)")
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert isinstance(data.train, FileImages)
    x, y = next(iter(ImageEvaluationBatches(data.train, data.train_labels, batch_size=12)))
    assert x.shape == (12, 3, 8, 8)
    assert (x * 255).round().mean((1, 2, 3)).tolist() == (50 * y).tolist()
    x, y = next(iter(ImageEvaluationBatches(data.test, data.test_labels, batch_size=6)))
    assert (x * 255).round().mean((1, 2, 3)).tolist() == (50 * y + 5).tolist()
    # Unpacked once, it loads without its archives.
    for archive in root.glob("*.tar*"):
        archive.unlink()
    assert torch.equal(load_vision("imagenet", root).train_labels, data.train_labels)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_image_folder(tmp_path: Path, held_out: str) -> None:
    for part, count in (("train", 3), (held_out, 2)):
        for c, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 7), (100 * c, 0, 0)).save(tmp_path / part / name / f"{i}.png")
    data = load_vision("imagefolder", tmp_path, size=(4, 4))
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.fetch(torch.tensor([3]))[0][0, 0].unique().tolist() == [100]
    assert len(data.test) == 4
    (tmp_path / held_out / "dog").rename(tmp_path / held_out / "wolf")
    with pytest.raises(MetaplError, match="differ by dog, wolf"):
        load_vision("imagefolder", tmp_path)


# --- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar10", ["from torchvision.datasets import CIFAR10", "download=True"]),
        ("cifar100", ["from torchvision.datasets import CIFAR100", "download=True"]),
        ("svhn", ["SVHN", '"train", "extra", "test"', "download=True"]),
        ("imagenet", ["ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "https://image-net.org/"]),
        ("imagefolder", ["one folder a class"]),
    ],
)
def test_a_missing_data_set_says_how_to_get_it(tmp_path: Path, name: str, words: list[str]) -> None:
    root = tmp_path / "it's $HOME"
    with pytest.raises(MetaplError, match="does not exist") as caught:
        load_vision(name, root)
    for word in (*words, "it's" if name in ("imagenet", "imagefolder") else "it"):
        assert word in str(caught.value)


def test_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a shell's reading of it goes, and with a loader that downloads nothing."""
    import shlex

    asked = []
    for name in ("CIFAR10", "SVHN"):
        with pytest.raises(MetaplError) as caught:
            load_vision(name.lower(), tmp_path / "it's $HOME")
        program, flag, code = shlex.split(str(caught.value).split("To get it: ")[1])
        assert (program, flag) == ("python", "-c")
        with monkeypatch.context() as patch:
            patch.setattr(datasets, name, lambda root, **how: asked.append((root, *how.values())))
            exec(code, {})
    root = str(tmp_path / "it's $HOME")
    assert asked == [(root, True), *((root, split, True) for split in ("train", "extra", "test"))]


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "cifar", monkeypatch, datasets.CIFAR10, each=10, test=10)
    batch = tmp_path / "cifar" / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(MetaplError, match=r"corrupted.*remove what is there, then python -c"):
        load_vision("cifar10", tmp_path / "cifar")
    batch.unlink()
    with pytest.raises(MetaplError, match="data_batch_3 does not exist"):
        load_vision("cifar10", tmp_path / "cifar")
    write_svhn(tmp_path / "svhn", monkeypatch, train=10, extra=10, test=10)
    (tmp_path / "svhn" / "extra_32x32.mat").write_bytes(b"not it")
    with pytest.raises(MetaplError, match="corrupted"):
        load_vision("svhn", tmp_path / "svhn")
    write_imagenet(tmp_path / "imagenet", monkeypatch, each=2, val=3)
    (tmp_path / "imagenet" / "ILSVRC2012_img_val.tar").write_bytes(b"not it")
    with pytest.raises(MetaplError, match=r"img_val\.tar is not present .* or is corrupted"):
        load_vision("imagenet", tmp_path / "imagenet")
    with pytest.raises(MetaplError, match="expected one of cifar10"):
        load_vision("mnist", tmp_path)


def test_an_untouched_loader_refuses_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        write_cifar(tmp_path, patch, datasets.CIFAR10, each=10, test=10)
    with pytest.raises(MetaplError, match="corrupted"):
        load_vision("cifar10", tmp_path)


# --- the paper's splits -----------------------------------------------------------------------------------------------


def of_sizes(name: str, train: torch.Tensor, test: int, core: int | None = None) -> VisionData:
    """A data set of the real number of pictures, of one pixel each, all the same one."""
    pixel = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    classes = int(train.max()) + 1
    return VisionData(
        name=name,
        classes=tuple(map(str, range(classes))),
        train=MemoryImages(pixel.expand(len(train), 3, 1, 1)),
        train_labels=train,
        core=len(train) if core is None else core,
        test=MemoryImages(pixel.expand(test, 3, 1, 1)),
        test_labels=torch.arange(test) % classes,
    )


def test_cifar_4k() -> None:
    data = of_sizes("cifar10", torch.arange(50_000) % 10, 10_000)
    split = PROTOCOLS["cifar10-4k"].draw(data, seed=0)
    assert split.counts() == {"labeled": 4_000, "unlabeled": 41_000, "validation": 5_000, "test": 10_000}
    assert data.train_labels[split.labeled].bincount().tolist() == [400] * 10
    assert data.train_labels[split.validation].bincount().tolist() == [500] * 10


def test_svhn_1k() -> None:
    core, extra = 73_257, 531_131
    data = of_sizes("svhn", torch.arange(core + extra) % 17 % 10, 26_032, core)
    split = PROTOCOLS["svhn-1k"].draw(data, seed=0)
    assert split.counts() == {
        "labeled": 1_000,
        "unlabeled": core + extra - 6_000,
        "validation": 5_000,
        "test": 26_032,
    }
    assert data.train_labels[split.labeled].bincount().tolist() == [100] * 10
    assert int(split.labeled.max()) < core
    trained = set(split.labeled.tolist()) | set(split.unlabeled.tolist())
    assert not trained & set(split.validation.tolist())


def test_imagenet_10_percent() -> None:
    # The real numbers of pictures a class go from 732 to 1,300, and sum to 1,281,167.
    sizes = torch.full((1000,), 1300)
    sizes[:100] = torch.linspace(732, 1300, 100).long()
    labels = torch.arange(1000).repeat_interleave(sizes)
    split = PROTOCOLS["imagenet-10pct"].draw(of_sizes("imagenet", labels, 50_000), seed=0)
    assert split.counts() == {
        "labeled": 128_000,
        "unlabeled": len(labels) - 153_000,
        "validation": 25_000,
        "test": 50_000,
    }
    assert labels[split.labeled].bincount().tolist() == [128] * 1000
    share = labels[split.validation].bincount() / sizes
    assert float(share.min()) > 0.018
    assert float(share.max()) < 0.022


def test_protocols_scale_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the files of a miniature to batches, with the split stored between."""
    write_cifar(tmp_path / "data", monkeypatch, datasets.CIFAR10, each=40, test=30)
    data = load_vision("cifar10", tmp_path / "data")
    protocol = dataclasses.replace(PROTOCOLS["cifar10-4k"], labels_per_class=2, validation=20)
    protocol.draw(data, seed=3).save(tmp_path / "split.json")
    split = Split.load(tmp_path / "split.json", data.train_labels, data.test_labels)
    assert split.counts() == {"labeled": 20, "unlabeled": 160, "validation": 20, "test": 30}
    labels = data.train_labels[split.labeled]
    few, many = data.train.select(split.labeled), data.train.select(split.unlabeled)
    x, y = ImageLabeledBatches(few, labels, StepSampler(20, 20, seed=0), Identity(), seed=0)[0]
    # Here, a picture's level is its number, which its class follows from.
    assert ((x[:, 0, 0, 0] * 255).round().long() % 10).tolist() == y.tolist()
    u = ImageUnlabeledBatches(many, StepSampler(160, 160, seed=0), Identity(), None, seed=0)[0]
    assert isinstance(u, torch.Tensor)
    numbers = (u[:, 0, 0, 0] * 255).round().long()
    assert sorted(numbers.tolist()) == split.unlabeled.tolist()
    with pytest.raises(MetaplError, match="is for 'svhn'"):
        PROTOCOLS["svhn-1k"].draw(data, seed=0)
    with pytest.raises(MetaplError, match="needs 400 labels of class 0"):
        dataclasses.replace(PROTOCOLS["cifar10-4k"], validation=20).draw(data, seed=0)
