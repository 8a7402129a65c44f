"""``examples/released_sets.py``: one set in every form is the same arrays."""

import io
import json
import pickle
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import released_sets
import scipy.io
import set_folders
import torch
import tyro
from command import metapl, result
from picture_sets import split_labels
from PIL import Image
from torchvision import datasets

from metapl.errors import MetaplError
from metapl.pictures import scan_labeled, scan_unlabeled

pytestmark = pytest.mark.docs

CLASSES = [f"class{number}" for number in range(10)]
COUNTS = {"train": 30, "extra": 11, "test": 12}


def arrays(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return random pictures (n, 32, 32, 3) and shuffled labels (n,) of each part, every class."""
    rng = np.random.default_rng(0)
    parts = {}
    for part in released_sets.PARTS[name]:
        pictures = rng.integers(0, 256, (COUNTS[part], 32, 32, 3), dtype=np.uint8)
        parts[part] = (pictures, rng.permutation(COUNTS[part]) % 10)
    return parts


def planes(pictures: np.ndarray) -> np.ndarray:
    return pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def as_torchvision(name: str, root: Path) -> None:
    parts = arrays(name)
    if name == "svhn":
        for part, (pictures, labels) in parts.items():
            content = {"X": pictures.transpose(1, 2, 3, 0), "y": (labels + 9) % 10 + 1}
            scipy.io.savemat(root / f"{part}_32x32.mat", content)
        return
    reader = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = root / reader.base_folder
    folder.mkdir()
    key = "labels" if name == "cifar10" else "fine_labels"
    for part, files in (("train", reader.train_list), ("test", reader.test_list)):
        pictures, labels = parts[part]
        for file, rows in zip(
            files, np.array_split(np.arange(len(labels)), len(files)), strict=True
        ):
            content = {"data": planes(pictures)[rows], key: labels[rows].tolist()}
            (folder / file[0]).write_bytes(pickle.dumps(content))
    meta = {reader.meta["key"]: CLASSES}
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps(meta))


def as_binary(name: str, root: Path) -> None:
    archive, files, names = released_sets.BINARY[name]
    (root / archive).mkdir()
    (root / archive / names).write_text("\n".join(CLASSES) + "\n\n")
    *of_train, of_test = files
    for part, part_files in (("train", of_train), ("test", [of_test])):
        pictures, labels = arrays(name)[part]
        columns = [labels[:, None], planes(pictures)]
        if name == "cifar100":
            # A coarse label comes first.
            columns.insert(0, 19 - labels[:, None])
        records = np.concatenate(columns, axis=1).astype(np.uint8)
        for file, rows in zip(part_files, np.array_split(records, len(part_files)), strict=True):
            (root / archive / file).write_bytes(rows.tobytes())


def as_parquet(name: str, root: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    picture_column = "image" if name == "svhn" else "img"
    label_column = "fine_label" if name == "cifar100" else "label"
    (root / "deeper").mkdir()
    described = {"info": {"features": {label_column: {"names": names_of(name)}}}}
    for part, (pictures, labels) in arrays(name).items():
        encoded = [{"bytes": png(picture), "path": None} for picture in pictures]
        table = pa.table({picture_column: encoded, label_column: labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
        half = len(labels) // 2
        for number, rows in enumerate((table.slice(0, half), table.slice(half))):
            pq.write_table(rows, root / "deeper" / f"{part}-{number:05}-of-00002.parquet")


def as_folders(name: str, root: Path) -> None:
    for part, (pictures, labels) in arrays(name).items():
        for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            folder = root / part / names_of(name)[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(png(picture))


def names_of(name: str) -> list[str]:
    return list("0123456789") if name == "svhn" else CLASSES


FORMS: dict[str, Callable[[str, Path], None]] = {
    "torchvision": as_torchvision,
    "binary": as_binary,
    "parquet": as_parquet,
    "folders": as_folders,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", released_sets.PARTS)
def test_every_form_is_the_same_arrays(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (name, form) == ("svhn", "binary"):
        pytest.skip("SVHN has no binary version")
    for module in ("cifar", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
    FORMS[form](name, tmp_path)
    released = released_sets.read_released(name, str(tmp_path))
    assert released.classes == names_of(name)
    assert [*released.parts] == [*arrays(name)]
    for part, (pictures, labels) in arrays(name).items():
        expected = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
        assert torch.equal(released.parts[part].pictures, expected)
        assert released.parts[part].labels.dtype == torch.int64
        assert released.parts[part].labels.tolist() == labels.tolist()


def test_a_set_is_written_as_the_folders_of_the_command(tmp_path: Path) -> None:
    as_binary("cifar10", tmp_path)
    out = tmp_path / "out"
    set_folders.write_folders("cifar10", tmp_path, out, per_class=1, validation=10, seed=3)
    pictures, labels = arrays("cifar10")["train"]
    split = split_labels(torch.from_numpy(labels), 1, 10, 3, len(labels))
    for part, folder in (("labeled", "labeled"), ("validation", "val")):
        files = scan_labeled(out / folder)
        written = {
            int(Path(name).stem): label
            for name, label in zip(files.names, files.labels, strict=True)
        }
        assert written == {number: labels[number] for number in split[part].tolist()}
    files = scan_unlabeled(out / "unlabeled")
    assert [int(Path(name).stem) for name in files.names] == split["unlabeled"].tolist()
    number = int(split["unlabeled"][4])
    assert np.array_equal(np.asarray(Image.open(files.path(4))), pictures[number])
    assert len(scan_labeled(out / "test")) == COUNTS["test"]
    with pytest.raises(MetaplError, match="out exists; expected the name of a new folder"):
        set_folders.write_folders("cifar10", tmp_path, out)


@pytest.mark.parametrize("form", ["torchvision", "binary", "parquet"])
@pytest.mark.parametrize("name", released_sets.PARTS)
def test_the_command_names_the_program_that_writes_a_released_set_as_folders(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (name, form) == ("svhn", "binary"):
        pytest.skip("SVHN has no binary version")
    for module in ("cifar", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "with a space"
    root.mkdir()
    FORMS[form](name, root)
    deepest = next(file.parent for file in sorted(root.rglob("*")) if file.is_file())
    flags = []
    for folder in {root, deepest}:
        for scan in (scan_labeled, scan_unlabeled):
            with pytest.raises(MetaplError, match="CIFAR or SVHN as released") as error:
                scan(folder)
            assert "\n" not in str(error.value)
            python, file, *words = shlex.split(str(error.value).split("`")[1])
            assert (python, file) == ("python", "examples/set_folders.py")
            flags.append(words)
    assert flags == flags[:1] * len(flags)
    out = flags[0][-1]
    tyro.cli(set_folders.write_folders, args=flags[0])
    files = scan_labeled(Path(out, "labeled"))
    assert len(files) == COUNTS["train"]
    assert [*files.classes] == names_of(name)


@pytest.mark.long
def test_the_program_prints_the_command_that_trains_on_its_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_binary("cifar10", tmp_path)
    out = tmp_path / "out"
    set_folders.write_folders("cifar10", tmp_path, out, per_class=1, validation=10)
    program, *words = shlex.split(capsys.readouterr().out)
    assert program == "metapl"
    short = ("--network", "pooled_cnn", "--steps", "2", "--warmup", "1", "--finetune-steps", "0")
    metapl(*words, *short, "--out", tmp_path / "run")
    assert result(tmp_path / "run")["delivered"]


def test_folders_without_numbers_are_sorted_and_said_to_have_no_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_folders("cifar10", tmp_path)
    first = tmp_path / "train" / "class0"
    for file in first.iterdir():
        file.rename(first / f"x{file.name}")
    released = released_sets.read_released("cifar10", str(tmp_path))
    assert released.parts["train"].labels.tolist() == sorted(arrays("cifar10")["train"][1])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "train has no order of its own" in said


def cut(root: Path) -> None:
    as_binary("cifar10", root)
    file = root / "cifar-10-batches-bin" / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])


def larger(root: Path) -> None:
    as_folders("cifar10", root)
    Image.new("RGB", (40, 32)).save(root / "train" / "class0" / "30.png")


def broken(root: Path) -> None:
    as_folders("cifar10", root)
    (root / "train" / "class0" / "30.png").write_bytes(b"no picture")


def other_columns(root: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"x": [1]}), root / "train.parquet")


def without_batch(root: Path) -> None:
    as_binary("cifar10", root)
    (root / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()


REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": (lambda root: None, "there is no cifar10 in .*; expected cifar-10-batches-py/"),
    "other md5": (
        lambda root: as_torchvision("cifar10", root),
        "has another MD5 than the released one.* data_batch_1.bin, train",
    ),
    "a cut file": (cut, "data_batch_3.bin has .* bytes; expected records of 3,073"),
    "a missing file": (without_batch, "data_batch_4.bin cannot be read: No such file"),
    "another size": (larger, "has 40 x 32 pixels; expected 32 x 32"),
    "a broken picture": (broken, "30.png: "),
    "other columns": (other_columns, "has the columns x; expected img or image, and label"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_form_of_a_set_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    write, text = REFUSED[case]
    write(tmp_path)
    with pytest.raises(MetaplError, match=text) as error:
        released_sets.read_released("cifar10", str(tmp_path))
    assert "\n" not in str(error.value)
