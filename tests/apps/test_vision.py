"""torchvision's data sets, from small files in the exact format of each, and the paper's splits of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import write_cifar, write_imagenet, write_svhn
from torchvision import datasets

from metapl.apps.pictures import (
    EvaluationBatches,
    FileImages,
    Identity,
    ImageData,
    LabeledBatches,
    MemoryImages,
    Split,
    UnlabeledBatches,
    load_image_data,
)
from metapl.apps.recipes.protocols import Cifar10, Imagenet10, Svhn, Vision
from metapl.data import StepSampler
from metapl.errors import MetaplError

# --- the data sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    write_cifar(tmp_path, monkeypatch, kind, each=30, test=20)
    data = load_image_data(name, tmp_path)
    count = 30 * len(kind.train_list)
    classes = 10 if name == "cifar10" else 100
    assert data.classes == tuple(f"class{i}" for i in range(classes))
    assert data.train_labels.tolist() == [i % classes for i in range(count)]
    assert data.test_labels.tolist() == [i % classes for i in range(count, count + 20)]
    assert (len(data.train), len(data.test), data.core) == (count, 20, None)
    images, _ = data.train.fetch(torch.tensor([7, 3]))
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert [one.unique().tolist() for one in images] == [[7], [3]]
    # The real loader is what read it.
    assert torch.equal(images[0], torch.from_numpy(np.array(kind(tmp_path)[7][0])).permute(2, 0, 1))


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "svhn"
    write_svhn(root, monkeypatch, train=30, extra=50, test=20)
    data = load_image_data("svhn", root)
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
    data = load_image_data("imagenet", root, size=(8, 8))
    assert data.classes == ("tench", "crane (n02012849)", "crane (n03126707)")
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert isinstance(data.train, FileImages)
    x, y = next(iter(EvaluationBatches(data.train, data.train_labels, batch_size=12)))
    assert x.shape == (12, 3, 8, 8)
    assert (x * 255).round().mean((1, 2, 3)).tolist() == (50 * y).tolist()
    x, y = next(iter(EvaluationBatches(data.test, data.test_labels, batch_size=6)))
    assert (x * 255).round().mean((1, 2, 3)).tolist() == (50 * y + 5).tolist()
    # Unpacked once, it loads without its archives.
    for archive in root.glob("*.tar*"):
        archive.unlink()
    assert torch.equal(load_image_data("imagenet", root).train_labels, data.train_labels)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_image_folder(tmp_path: Path, held_out: str) -> None:
    for part, count in (("train", 3), (held_out, 2)):
        for c, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 7), (100 * c, 0, 0)).save(tmp_path / part / name / f"{i}.png")
    data = load_image_data("imagefolder", tmp_path, size=(4, 4))
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.fetch(torch.tensor([3]))[0][0, 0].unique().tolist() == [100]
    assert len(data.test) == 4
    (tmp_path / held_out / "dog").rename(tmp_path / held_out / "wolf")
    with pytest.raises(MetaplError, match="differ by dog, wolf"):
        load_image_data("imagefolder", tmp_path)


# --- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar10", ["from torchvision.datasets import CIFAR10", "download=True"]),
        ("cifar100", ["from torchvision.datasets import CIFAR100", "download=True"]),
        ("svhn", ["SVHN", 'split="extra"', "download=True"]),
        ("imagenet", ["ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "https://image-net.org/"]),
        ("imagefolder", ["one folder a class"]),
    ],
)
def test_a_missing_data_set_says_how_to_get_it(tmp_path: Path, name: str, words: list[str]) -> None:
    root = tmp_path / "it's $HOME"
    with pytest.raises(MetaplError, match="is not there") as caught:
        load_image_data(name, root)
    for word in (*words, "it's" if name in ("imagenet", "imagefolder") else "it"):
        assert word in str(caught.value)


def test_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a shell's reading of it goes, and with a loader that downloads nothing."""
    import shlex

    asked = []
    for name in ("CIFAR10", "SVHN"):
        with pytest.raises(MetaplError) as caught:
            load_image_data(name.lower(), tmp_path / "it's $HOME")
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
    with pytest.raises(MetaplError, match=r"corrupted.*remove damaged files\. To get it: python -c"):
        load_image_data("cifar10", tmp_path / "cifar")
    batch.unlink()
    with pytest.raises(MetaplError, match=r"is not there.*not found or"):
        load_image_data("cifar10", tmp_path / "cifar")
    write_svhn(tmp_path / "svhn", monkeypatch, train=10, extra=10, test=10)
    (tmp_path / "svhn" / "extra_32x32.mat").write_bytes(b"not it")
    with pytest.raises(MetaplError, match="corrupted"):
        load_image_data("svhn", tmp_path / "svhn")
    write_imagenet(tmp_path / "imagenet", monkeypatch, each=2, val=3)
    (tmp_path / "imagenet" / "ILSVRC2012_img_val.tar").write_bytes(b"not it")
    with pytest.raises(MetaplError, match=r"img_val\.tar is not present .* or is corrupted"):
        load_image_data("imagenet", tmp_path / "imagenet")
    with pytest.raises(MetaplError, match="expected one of cifar10"):
        load_image_data("mnist", tmp_path)


def test_an_untouched_loader_refuses_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        write_cifar(tmp_path, patch, datasets.CIFAR10, each=10, test=10)
    with pytest.raises(MetaplError, match="corrupted"):
        load_image_data("cifar10", tmp_path)


# --- the paper's splits -----------------------------------------------------------------------------------------------


def of_sizes(name: str, train: torch.Tensor, test: int, core: int | None = None) -> ImageData:
    """A data set of the real number of pictures, of one pixel each, all the same one."""
    pixel = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    classes = int(train.max()) + 1
    return ImageData(
        name=name,
        classes=tuple(map(str, range(classes))),
        train=MemoryImages(pixel.expand(len(train), 3, 1, 1)),
        train_labels=train,
        core=len(train) if core is None else core,
        test=MemoryImages(pixel.expand(test, 3, 1, 1)),
        test_labels=torch.arange(test) % classes,
    )


def drawn(kind: type[Vision], data: ImageData, **fields: Any) -> Split:
    """The split of a recipe that is named after a protocol."""
    split = kind(data_root="anywhere", **fields).divided(data, None)[2]
    assert split is not None
    return split


def test_cifar_4k() -> None:
    data = of_sizes("cifar10", torch.arange(50_000) % 10, 10_000)
    split = drawn(Cifar10, data)
    assert split.counts() == {"labeled": 4_000, "unlabeled": 41_000, "validation": 5_000, "test": 10_000}
    assert data.train_labels[split.labeled].bincount().tolist() == [400] * 10
    assert data.train_labels[split.validation].bincount().tolist() == [500] * 10


def test_svhn_1k() -> None:
    core, extra = 73_257, 531_131
    data = of_sizes("svhn", torch.arange(core + extra) % 17 % 10, 26_032, core)
    split = drawn(Svhn, data)
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
    split = drawn(Imagenet10, of_sizes("imagenet", labels, 50_000))
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
    data = load_image_data("cifar10", tmp_path / "data")
    drawn(Cifar10, data, seed=3, labels_per_class=2, validation=20).save(tmp_path / "split.json")
    split = Split.load(tmp_path / "split.json", data.train_labels, data.test_labels)
    assert split.counts() == {"labeled": 20, "unlabeled": 160, "validation": 20, "test": 30}
    labels = data.train_labels[split.labeled]
    few, many = data.train.select(split.labeled), data.train.select(split.unlabeled)
    x, y = LabeledBatches(few, labels, StepSampler(20, 20, seed=0), Identity(), seed=0)[0]
    # Here, a picture's level is its number, which its class follows from.
    assert ((x[:, 0, 0, 0] * 255).round().long() % 10).tolist() == y.tolist()
    u = UnlabeledBatches(many, StepSampler(160, 160, seed=0), Identity(), None, seed=0)[0]
    assert isinstance(u, torch.Tensor)
    numbers = (u[:, 0, 0, 0] * 255).round().long()
    assert sorted(numbers.tolist()) == split.unlabeled.tolist()
    with pytest.raises(MetaplError, match="needs 400 labels of class 0"):
        drawn(Cifar10, data, validation=20)
