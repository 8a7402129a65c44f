"""``examples/protocols.py`` on small files, as torchvision reads each data set.

What torchvision itself does is not repeated: comparing files with their MD5, and unpacking ImageNet's archives.
"""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import picture_sets
import protocols
import pytest
import scipy.io
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import color_folders
from torchvision import datasets
from torchvision.datasets import imagenet

from metapl.apps.pictures import EvaluationBatches
from metapl.apps.run import EndedRun
from metapl.metrics import evaluate_logits
from metapl.metrics.predictions import predict_logits

pytestmark = pytest.mark.docs

TINY: dict[str, Any] = {"network": "small_cnn", "labeled_batch": 4, "unlabeled_batch": 6, "steps": 4, "warmup": 1}
TINY |= {"wait": 1, "finetune_steps": 2, "finetune_batch": 4, "validate_every": 2, "log_every": 1, "save_every": 2}
SMALL: dict[str, Any] = {"device": "cpu", "labels_per_class": 3, "validation": 10, "num_workers": 0, "seed": 3}
AT_32 = {"image_size": 32, "channels_last": False}


def write_cifar(root: Path) -> None:
    """20 training pictures a file, 15 to test on; picture i of all has the level i, and the label i mod 10."""
    folder, start = root / datasets.CIFAR10.base_folder, 0
    folder.mkdir(parents=True)
    for files, count in ((datasets.CIFAR10.train_list, 20), (datasets.CIFAR10.test_list, 15)):
        for name, _ in files:
            numbers = np.arange(start, start + count)
            start += count
            levels = np.repeat(numbers.astype(np.uint8)[:, None], 3072, axis=1)
            (folder / name).write_bytes(pickle.dumps({"data": levels, "labels": (numbers % 10).tolist()}))
    meta = {datasets.CIFAR10.meta["key"]: [f"class{i}" for i in range(10)]}
    (folder / datasets.CIFAR10.meta["filename"]).write_bytes(pickle.dumps(meta))


def write_svhn(root: Path) -> None:
    """Labels from 1 to 10, which stands for the digit 0."""
    root.mkdir(parents=True)
    for split, count in (("train", 60), ("test", 15), ("extra", 40)):
        pictures = np.full((32, 32, 3, count), 10, dtype=np.uint8)
        pictures[0, 1, 2] = np.arange(count)  # top row, second column, blue
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
        scipy.io.savemat(root / datasets.SVHN.split_list[split][1], {"X": pictures, "y": labels})


WNIDS = ("n01440764", "n02012849", "n03126707")  # tench, crane the bird, crane the machine
NAMES = (("tench", "Tinca tinca"), ("crane",), ("crane",))


def write_imagenet(root: Path) -> None:
    """12 pictures a class to train on and 3 to test on; those of class c have the level 50 c, and noise on it."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    torch.save((dict(zip(WNIDS, NAMES, strict=True)), []), root / imagenet.META_FILE)
    for split, each in (("train", 12), ("val", 3)):
        for c, wnid in enumerate(WNIDS):
            (root / split / wnid).mkdir(parents=True)
            for i in range(each):
                levels = 50 * c + rng.integers(0, 101, (30, 40, 3))
                Image.fromarray(levels.astype(np.uint8)).save(root / split / wnid / f"{i}.JPEG", quality=95)


def written(data: str, root: Path, patch: pytest.MonkeyPatch) -> str:
    for of in ("cifar", "svhn"):
        patch.setattr(f"torchvision.datasets.{of}.check_integrity", lambda *given: True)
    {"cifar10": write_cifar, "svhn": write_svhn, "imagenet": write_imagenet}[data](root)
    return str(root)


def tiny(name: str, tmp_path: Path, patch: pytest.MonkeyPatch, **own: Any) -> Any:
    config = protocols.PROTOCOLS[name][1]
    places = {"root": written(config.data, tmp_path / "data", patch), "out": str(tmp_path / "run")}
    if name == "imagenet-jft":
        places["unlabeled"] = str(color_folders(tmp_path / "colors") / "unlabeled")
    sides = AT_32 if config.data == "imagenet" else {}
    return dataclasses.replace(config, **{**TINY, **SMALL, **places, **sides, "student_lr": 0.01, **own})


LONG = {"cifar10-4k-paper", "imagenet-10pct-paper"}  # of which another one has all that is theirs


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in protocols.PROTOCOLS]
)
def test_a_protocol_runs_from_end_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = tiny(name, tmp_path, monkeypatch)
    result = protocols.train(c)
    out = tmp_path / "run"
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    _, _, test, labels, classes, _ = picture_sets.load_pictures(c)
    network = picture_sets.build_network(c, len(classes), c.dropout, c.network)
    network.load_state_dict(load_file(out / "finetuned.safetensors"))
    found = evaluate_logits(*predict_logits(network, EvaluationBatches(test, labels, 8)))
    assert (found.accuracy, found.n) == (result["finetuned_test_accuracy"], result["tested_on"])
    delivered = EndedRun.load(out / "delivered")
    assert delivered.result["test_accuracy"] == result[f"{result['delivered']}_test_accuracy"]
    assert delivered.classes == tuple(classes)
    kept = load_file(out / f"{result['delivered']}.safetensors")
    assert all(torch.equal(kept[name], t) for name, t in delivered.network("student").state_dict().items())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    fitted = [row for row in rows if row["phase"] == "fit"]
    assert "inner_loss" not in fitted[0], "the student waits for a step"
    assert "inner_loss" in fitted[1]
    assert fitted[1]["feedback_weight"] == 1.0, "the papers know no bound"
    assert protocols.train(dataclasses.replace(c, resume=True)) == result  # after its end it takes no step


@pytest.mark.parametrize("method", ["none", "uda", "supervised", "headroom"])
def test_the_controlled_baselines_run(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = protocols.train(tiny("svhn-1k", tmp_path, monkeypatch, method=method, finetune_steps=0, wait=0))
    assert 0 <= result["student_test_accuracy"] <= 1


def test_the_split_is_a_function_of_the_seed_and_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = tiny("svhn-1k", tmp_path, monkeypatch, labels_per_class=2)
    _, labels, *_, core = picture_sets.load_pictures(c)
    parts = [picture_sets.split_labels(labels, each, 10, 7, core) for each in (2, 3)]
    for drawn, each in zip(parts, (2, 3), strict=True):
        assert torch.cat([*drawn.values()]).sort().values.tolist() == list(range(100))
        assert labels[drawn["labeled"]].bincount().tolist() == [each] * 10
        assert int(drawn["labeled"].max()) < core == 60  # the extra pictures never keep labels
        assert labels[drawn["validation"]].bincount().tolist() == [1] * 10
    assert {*parts[0]["labeled"].tolist()} < {*parts[1]["labeled"].tolist()}
    protocols.train(c)
    stored = tmp_path / "run" / "split.json"
    protocols.train(dataclasses.replace(c, seed=8, split=str(stored), out=str(tmp_path / "other")))
    assert (tmp_path / "other" / "split.json").read_text() == stored.read_text()


def test_pictures_are_what_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = tiny("cifar10-4k", tmp_path / "a", monkeypatch)
    pictures, labels, *_ = picture_sets.load_pictures(c)
    image, label = datasets.CIFAR10(c.root)[7]
    assert torch.equal(pictures.fetch(torch.tensor([7]))[0][0], torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert labels[7] == label
    c = tiny("imagenet-10pct", tmp_path / "b", monkeypatch)
    pictures, labels, test, test_labels, classes, _ = picture_sets.load_pictures(c)
    assert classes == ["tench (n01440764)", "crane (n02012849)", "crane (n03126707)"]
    levels = pictures.fetch(torch.arange(36))[0].float().mean((1, 2, 3))
    assert levels.sub(50 + 50 * labels).abs().max() < 5
    assert test.fetch(torch.arange(9))[0].float().mean((1, 2, 3)).sub(50 + 50 * test_labels).abs().max() < 5
