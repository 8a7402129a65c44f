"""``examples/protocols.py`` on small files, as torchvision reads each data set.

What torchvision itself does is not repeated: comparing files with their MD5, and unpacking
ImageNet's archives.
"""

import dataclasses
import gzip
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import picture_sets
import plan
import protocols
import pytest
import scipy.io
import torch
import training_accuracy
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import color_folders
from torchvision import datasets
from torchvision.datasets import imagenet

from metapl.distributed import Mesh
from metapl.errors import MetaplError
from metapl.feedback import Reinforce
from metapl.labels.selection import select
from metapl.labels.store import LabelStore, LabelWriter
from metapl.metrics import evaluate_logits
from metapl.metrics.predictions import predict_logits
from metapl.pictures import EvaluationBatches, scan_unlabeled
from metapl.run_folder import EndedRun

pytestmark = pytest.mark.docs

TINY: dict[str, Any] = {
    "network": "small_cnn",
    "labeled_batch": 4,
    "unlabeled_batch": 6,
    "steps": 4,
    "warmup": 1,
}
TINY |= {
    "wait": 1,
    "finetune_steps": 2,
    "finetune_batch": 4,
    "validate_every": 2,
    "log_every": 1,
    "save_every": 2,
}
SMALL: dict[str, Any] = {
    "device": "cpu",
    "labels_per_class": 3,
    "validation": 10,
    "num_workers": 0,
    "seed": 3,
}
AT_32 = {"image_size": 32, "channels_last": False}


def write_cifar(root: Path) -> None:
    """Write 20 training pictures a file, 15 to test on.

    Picture i of all has the level i, and the label i mod 10.
    """
    folder, start = root / datasets.CIFAR10.base_folder, 0
    folder.mkdir(parents=True)
    for files, count in ((datasets.CIFAR10.train_list, 20), (datasets.CIFAR10.test_list, 15)):
        for name, _ in files:
            numbers = np.arange(start, start + count)
            start += count
            levels = np.repeat(numbers.astype(np.uint8)[:, None], 3072, axis=1)
            (folder / name).write_bytes(
                pickle.dumps({"data": levels, "labels": (numbers % 10).tolist()})
            )
    meta = {datasets.CIFAR10.meta["key"]: [f"class{i}" for i in range(10)]}
    (folder / datasets.CIFAR10.meta["filename"]).write_bytes(pickle.dumps(meta))


def write_svhn(root: Path) -> None:
    """Write labels from 1 to 10, which stands for the digit 0."""
    root.mkdir(parents=True)
    for split, count in (("train", 60), ("test", 15), ("extra", 40)):
        pictures = np.full((32, 32, 3, count), 10, dtype=np.uint8)
        pictures[0, 1, 2] = np.arange(count)  # top row, second column, blue
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
        scipy.io.savemat(root / datasets.SVHN.split_list[split][1], {"X": pictures, "y": labels})


def write_fashion(root: Path, training: int = 40) -> None:
    """Write pictures to train on, 15 to test on; picture i has the level i, label i mod 10."""
    for part, count in (("train", training), ("t10k", 15)):
        numbers = np.arange(count, dtype=np.uint8)
        pictures = np.repeat(numbers, 28 * 28).tobytes()
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pictures))
        (root / f"{part}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(bytes(8) + (numbers % 10).tobytes())
        )


WNIDS = ("n01440764", "n02012849", "n03126707")  # tench, crane the bird, crane the machine
NAMES = (("tench", "Tinca tinca"), ("crane",), ("crane",))


def write_imagenet(root: Path) -> None:
    """Write 12 pictures a class to train on and 3 to test on.

    Those of class c have the level 50 c, and noise on it.
    """
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    torch.save((dict(zip(WNIDS, NAMES, strict=True)), []), root / imagenet.META_FILE)
    for split, each in (("train", 12), ("val", 3)):
        for c, wnid in enumerate(WNIDS):
            (root / split / wnid).mkdir(parents=True)
            for i in range(each):
                levels = 50 * c + rng.integers(0, 101, (30, 40, 3))
                Image.fromarray(levels.astype(np.uint8)).save(
                    root / split / wnid / f"{i}.JPEG", quality=95
                )


def write_fashion_folder(root: Path) -> None:
    """Write so many pictures that some are left when others have labels or are held out."""
    root.mkdir(parents=True)
    write_fashion(root, training=60)


def written(data: str, root: Path, patch: pytest.MonkeyPatch) -> str:
    for of in ("cifar", "svhn"):
        patch.setattr(f"torchvision.datasets.{of}.check_integrity", lambda *given: True)
    write_by_name = {
        "cifar10": write_cifar,
        "svhn": write_svhn,
        "fashion": write_fashion_folder,
        "imagenet": write_imagenet,
    }
    write_by_name[data](root)
    return str(root)


def tiny(name: str, tmp_path: Path, patch: pytest.MonkeyPatch, **own: Any) -> Any:
    config = protocols.PROTOCOLS[name][1]
    places = {"root": written(config.data, tmp_path / "data", patch), "out": str(tmp_path / "run")}
    if config.unlabeled is not None:
        places["unlabeled"] = str(color_folders(tmp_path / "colors") / "unlabeled")
    if config.labels is not None:
        places["labels"] = stored(places["unlabeled"], tmp_path / "labels")
    if config.labeled_labels is not None:
        training = f"{places['root']}/train"
        places["labeled_labels"] = stored(training, tmp_path / "labeled", left_out=0)
    sides = AT_32 if config.data == "imagenet" else {}
    # A row that holds nothing out, or keeps all labels, stays so.
    kept = {
        name: getattr(config, name)
        for name in ("validation", "labels_per_class")
        if not getattr(config, name)
    }
    alone = {
        "stochastic_depth": 0.0,
        "mesh": Mesh(),
        "batch_norm_ranks": None,
        "precision": "float32",
    }
    changes = {
        **TINY,
        **SMALL,
        **kept,
        **places,
        **sides,
        **alone,
        "student_lr": 0.01,
        "teacher_lr": 0.01,
        **own,
    }
    return dataclasses.replace(config, **changes)


def stored(folder: str, place: Path, left_out: int = 1) -> str:
    """Store labels of all pictures of a folder but the last, as ``metapl label`` writes them."""
    files = scan_unlabeled(folder)
    names = sorted(files.names)[: len(files) - left_out]
    p = torch.rand(len(names), len(WNIDS), generator=torch.Generator().manual_seed(0)).softmax(1)
    with LabelWriter(place, list(WNIDS), provenance={"pictures": str(files.root)}) as writer:
        writer.add(names, p)
    return str(place)


# Rows of which another one has all that is theirs.
LONG = {"cifar10-4k-paper", "svhn-1k", "imagenet-10pct-paper", "imagenet-l2", "imagenet-b6-wide"}
LONG |= {"fashion-4k-paper", "fashion-400", "fashion-400-paper"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long) if name in LONG else name
        for name in protocols.PROTOCOLS
    ],
)
def test_a_protocol_runs_from_end_to_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = tiny(name, tmp_path, monkeypatch)
    protocols.check(c)
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
    assert all(
        torch.equal(kept[name], t) for name, t in delivered.network("student").state_dict().items()
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    fitted = [row for row in rows if row["phase"] == "fit"]
    reduced = c.method == "reduced_mpl"
    assert ("inner_loss" in fitted[0]) == reduced, (
        "the student waits for a step, but for stored labels"
    )
    assert "inner_loss" in fitted[1]
    assert "teacher_cross_entropy" in fitted[1]
    if c.feedback_weight is None and c.method == "mpl":
        assert fitted[1]["feedback_ratio"] <= 0.1 + 1e-6, "a row of ours is bounded"
    else:
        assert reduced or fitted[1]["feedback_weight"] == 1.0, "the papers know no bound"
    assert ("student_validation_accuracy" in fitted[-1]) == bool(c.validation)
    assert fitted[-1]["student_training_accuracy"] == result["student_training_accuracy"]
    assert ("teacher_training_accuracy" in fitted[-1]) != reduced, "it has no opinion on pictures"
    if c.select == "last":
        assert result["best_step"] == c.steps
        assert result["delivered"] == "finetuned"
    # After its end it takes no step.
    assert protocols.train(dataclasses.replace(c, resume=True)) == result


@pytest.mark.parametrize("name", ["imagenet-jft", "imagenet-b7-reduced"])
def test_a_selection_counts_its_copies(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of the pictures 0, 0, 0, 1, 2 counts five, with stored labels and without."""
    c = tiny(name, tmp_path, monkeypatch, steps=2, wait=0, finetune_steps=0)
    paths = [*scan_unlabeled(c.unlabeled).paths()][:3]
    place = Path(c.unlabeled).parent / "list.txt"
    place.write_text("".join(f"{path}\n" for path in (paths[0], paths[0], *paths)))
    assert protocols.train(dataclasses.replace(c, unlabeled=str(place)))["unlabeled"] == 5


def test_stored_labels_are_read_as_often_as_the_store_says(tmp_path: Path) -> None:
    folder = str(color_folders(tmp_path / "colors") / "unlabeled")
    store = LabelStore(stored(folder, tmp_path / "labels"))
    select(store, tmp_path / "balanced", balance=True)
    balanced = LabelStore(tmp_path / "balanced")
    pictures, rows = picture_sets.stored_pictures(folder, balanced, 8)
    assert sorted(rows.tolist()) == balanced.rows_with_copies().tolist()
    assert len(pictures) == len(rows) > len(balanced)


def test_labeled_pictures_without_stored_labels_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = tiny("imagenet-b7-reduced", tmp_path, monkeypatch)
    few = stored(f"{c.root}/train", tmp_path / "few", left_out=2)
    text = "has no labels of 2 of 36 labeled pictures"
    with pytest.raises(MetaplError, match=text):
        protocols.train(dataclasses.replace(c, labeled_labels=few, out=str(tmp_path / "other")))


@pytest.mark.parametrize("method", ["none", "uda", "supervised", "headroom"])
def test_the_controlled_baselines_run(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = protocols.train(
        tiny("svhn-1k", tmp_path, monkeypatch, method=method, finetune_steps=0, wait=0)
    )
    assert 0 <= result["student_test_accuracy"] <= result["student_test_top5"] <= 1
    assert ("teacher_test_accuracy" in result) == (method == "none")


def test_svhn_keeps_no_picture_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 of its 604,388 pictures have labels, and 603,388 have none; here 30 of 100."""
    result = protocols.train(tiny("svhn-1k-paper", tmp_path, monkeypatch, steps=2, wait=0))
    assert (result["labeled"], result["unlabeled"]) == (30, 70)
    assert "validation_accuracy" not in result


def test_every_value_of_a_row_has_a_source() -> None:
    without_default = {
        each.name
        for each in dataclasses.fields(protocols.Protocol)
        if each.default is each.default_factory is dataclasses.MISSING
    }
    for name, row in protocols.ROWS.items():
        assert without_default - {"root", "out"} <= row.sources.keys() == row.values.keys(), name
        assert {*row.sources.values()} <= {"paper", "table", "code", "ours"}
    # No row of another data set says that the code or the table had its values.
    others = [name for name in protocols.ROWS if name.startswith("fashion")]
    others += ["imagenet-jft", "imagenet-l2", "imagenet-b6-wide", "imagenet-b7-reduced"]
    for name in others:
        assert {*protocols.ROWS[name].sources.values()} == {"paper", "ours"}
    # Of a set that no paper has, the paper says Algorithm 1 alone.
    _, algorithm = protocols.ALGORITHM_1
    for name in others[:4]:
        sources = protocols.ROWS[name].sources
        assert {key for key, source in sources.items() if source == "paper"} <= {*algorithm}


def test_the_rows_of_the_paper_are_algorithm_1() -> None:
    rows = {name: c for name, (_, c) in protocols.PROTOCOLS.items() if name.endswith("-paper")}
    assert len(rows) == 5
    for c in rows.values():
        assert (c.select, c.feedback, c.feedback_baseline, c.feedback_weight) == (
            "last",
            "dot",
            None,
            1.0,
        )
        assert (c.label_smoothing, c.uda_threshold, c.uda_ramp, c.wait) == (0.0, 0.0, 0, 0)
        assert c.student_view == "weak"
        assert protocols.estimator_of(c) == Reinforce()
    for name in ("cifar10-4k", "imagenet-10pct"):
        c = protocols.PROTOCOLS[name][1]
        assert (c.feedback, c.uda_threshold_on) == ("exact", "sharpened")
        assert c.student_view == "strong"


@pytest.mark.parametrize("method", ["uda", "supervised", "headroom"])
def test_a_network_that_trains_alone_has_the_teacher_s_rate_and_dropout(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As --help, --sources and the page say."""
    own = {"method": method, "teacher_lr": 0.31, "student_lr": 0.17}
    noise = {"teacher_dropout": 0.41, "dropout": 0.23}
    c = tiny("cifar10-4k", tmp_path, monkeypatch, **own, **noise)
    trainer_of = protocols.trainer_of
    found: list[float] = []

    def seen(*arguments: Any) -> Any:
        trainer = trainer_of(*arguments)
        # As it is made: the schedule of the fit changes the rates.
        found.extend(group["lr"] for group in trainer.optimizer.param_groups)
        drops = [part for part in trainer.student.modules() if isinstance(part, torch.nn.Dropout)]
        found.extend(part.p for part in drops)
        return trainer

    monkeypatch.setattr(protocols, "trainer_of", seen)
    protocols.train(c)
    assert set(found) == {0.31, 0.41}
    assert any("has the teacher's rate" in text for text in protocols.ALWAYS)


@pytest.mark.parametrize("feedback", ["dot-sum", "cosine", "loss-difference", "per-example"])
def test_the_other_forms_of_feedback_run(
    feedback: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline = 0.99 if feedback in protocols.WITH_BASELINE else None
    c = tiny(
        "svhn-1k-paper",
        tmp_path,
        monkeypatch,
        feedback=feedback,
        feedback_baseline=baseline,
        wait=0,
        steps=2,
    )
    protocols.check(c)
    protocols.train(c)
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[1]["feedback_ratio"] > 0


def test_a_short_run_shortens_what_is_counted_in_steps() -> None:
    c = protocols.scaled(dataclasses.replace(protocols.PROTOCOLS["cifar10-4k"][1], scale_to=300))
    assert (c.steps, c.wait, c.warmup, c.uda_ramp, c.finetune_steps, c.scale_to) == (
        300,
        3,
        5,
        5,
        1,
        None,
    )
    assert c.validate_every == c.log_every == c.save_every == 60
    c = protocols.scaled(
        dataclasses.replace(protocols.PROTOCOLS["cifar10-4k-paper"][1], scale_to=300)
    )
    assert (c.wait, c.warmup, c.uda_ramp, c.finetune_steps) == (0, 1, 0, 1)


def settings(words: str, tmp_path: Path) -> protocols.Protocol:
    return protocols.settings_of([*words.split(), "--root", str(tmp_path), "--out", "none"])


def test_steps_into_which_a_row_s_warm_up_does_not_fit_shorten_it_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the docstring proposes, --steps 1000."""
    for name in protocols.ROWS:
        if name.startswith(("fashion", "cifar10", "svhn")):
            c = settings(f"{name} --steps 1000", tmp_path)
            assert c.steps == 1_000
            assert c.wait + c.warmup < 100
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 8
    assert said[0] == (
        "protocols.py: --steps 1,000 of a row of 300,000 steps: --wait 10, --warmup 17, --uda-ramp "
        "17, --finetune-steps 3, shortened as by --scale-to but for what was named"
    )
    by_scale = settings("cifar10-4k --scale-to 1000", tmp_path)
    assert settings("cifar10-4k --steps 1000", tmp_path) == by_scale


def test_steps_leave_alone_what_fits_and_what_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c = settings("cifar10-4k --steps 10000", tmp_path)
    assert (c.wait, c.warmup, c.finetune_steps) == (3_000, 5_000, 1_000)
    # A network that trains alone does not wait.
    c = settings("cifar10-4k --steps 5000 --method uda", tmp_path)
    assert c.warmup == 5_000
    assert capsys.readouterr().err == ""
    c = settings("cifar10-4k --steps=1000 --finetune-steps=50 --save_every 7", tmp_path)
    assert (c.warmup, c.finetune_steps, c.save_every, c.log_every) == (17, 50, 7, 100)
    with pytest.raises(MetaplError, match="--steps 1,000: expected more than --wait 3,000"):
        settings("cifar10-4k --steps 1000 --warmup 5000", tmp_path)


def test_the_rows_of_fashion_differ_in_the_feedback_and_in_the_labels(tmp_path: Path) -> None:
    rows = {name: row.values for name, row in protocols.ROWS.items() if name.startswith("fashion")}
    changed = {
        name for name, value in rows["fashion-4k"].items() if rows["fashion-400"][name] != value
    }
    assert changed == {"labels_per_class"}
    changed = {
        name
        for name, value in rows["fashion-4k"].items()
        if rows["fashion-4k-paper"][name] != value
    }
    assert changed == {"feedback", "feedback_weight"}
    # The paper's values for CIFAR-10, but for what the pictures ask for.
    of_cifar = protocols.ROWS["cifar10-4k-paper"].values
    changed = {name for name, value in of_cifar.items() if rows["fashion-4k-paper"][name] != value}
    assert changed == {"data", "image_size", "operations", "cutout"}
    _, strong, _ = picture_sets.views_of(
        settings("fashion-4k", tmp_path), operations=rows["fashion-4k"]["operations"]
    )
    (_, changes, _) = strong.views
    assert {*picture_sets.CIFAR_OPERATIONS} - {*changes.operations} == {"Color"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "seeds": ({"seeds": "3-1"}, "--seeds 3-1"),
    "a mesh": ({"mesh": Mesh(replicate=2)}, "1 process was started for a mesh of 2"),
    "products": ({"mesh": Mesh(tensor=2)}, "for a mesh of 2"),
    "parts": ({"accumulate": 3}, "--labeled-batch 4: expected a multiple of 3"),
    "batch norms": ({"batch_norm_ranks": 2}, "--batch-norm-ranks 2: expected a divisor of 1"),
    "selection": (
        {"validation": 0, "select": "validation"},
        "--select validation: expected pictures",
    ),
    "a baseline": ({"feedback": "exact", "feedback_baseline": 0.99}, "exact has none"),
    "stored labels": ({"method": "reduced_mpl"}, "expected --unlabeled DIR, and --labels STORE"),
    "labels": ({"labels": "store"}, "expected --method reduced_mpl"),
    "labeled labels": ({"labeled_labels": "store"}, "expected --labels beside it"),
    "steps": ({"steps": 5, "wait": 4, "warmup": 2}, "--steps 5: expected more than --wait 4"),
    "a side": ({"image_size": 28}, "the pictures of svhn have 32 pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_before_anything(name: str, tmp_path: Path) -> None:
    changes, text = REFUSED[name]
    row = protocols.PROTOCOLS["svhn-1k-paper"][1]
    usual = {
        "root": str(tmp_path / "none"),
        "out": str(tmp_path / "run"),
        "labeled_batch": 4,
        "unlabeled_batch": 6,
    }
    c = dataclasses.replace(row, **usual, **changes)
    with pytest.raises(MetaplError, match=re.escape(text)) as error:
        protocols.check(c)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_torchrun_without_a_mesh_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["svhn-1k", "--root", str(tmp_path), "--out", str(tmp_path / "run")]
    assert protocols.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "protocols.py: 2 processes were started for a mesh of 1; expected as many: torchrun"
    )
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_several_seeds_give_a_mean_and_a_deviation_and_go_on_run_by_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = tiny("svhn-1k-paper", tmp_path, monkeypatch, steps=2, wait=0, seeds="3,5")
    protocols.check(c)
    summary = protocols.train_seeds(c, protocols.Processes())
    out = tmp_path / "run"
    assert json.loads((out / "seeds.json").read_text()) == summary
    results = [json.loads((out / f"seed-{seed}" / "result.json").read_text()) for seed in (3, 5)]
    for name in ("finetuned_test_accuracy", "finetuned_test_top5", "student_training_accuracy"):
        values = [result[name] for result in results]
        assert summary[name]["values"] == values
        assert summary[name]["mean"] == pytest.approx(sum(values) / 2)
        assert summary[name]["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    with pytest.raises(MetaplError, match="holds runs already"):
        protocols.check(c)
    # The second run is lost; the first one is read, and not repeated.
    expected = (out / "seed-5" / "finetuned.safetensors").read_bytes()
    shutil.rmtree(out / "seed-5")
    started: list[str] = []
    real = protocols.load_pictures
    monkeypatch.setattr(protocols, "load_pictures", lambda c: started.append(c.out) or real(c))
    again = dataclasses.replace(c, resume=True)
    protocols.check(again)
    assert protocols.train_seeds(again, protocols.Processes()) == summary
    assert started == [str(out / "seed-5")]
    assert (out / "seed-5" / "finetuned.safetensors").read_bytes() == expected
    with pytest.raises(MetaplError, match=r"result of other settings \(steps was 2, now 3"):
        protocols.train_seeds(dataclasses.replace(again, steps=3), protocols.Processes())


def test_fashion_is_read_from_its_four_files(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    sets = picture_sets.load_fashion(str(tmp_path))
    pictures, _ = sets.train.fetch(torch.tensor([3]))
    assert pictures.shape == (1, 3, 28, 28)
    assert pictures.unique().tolist() == [3]
    assert (len(sets.train), len(sets.test), sets.labelable) == (40, 15, 40)
    assert (sets.train_labels[3], sets.test_labels[4]) == (3, 4)
    with pytest.raises(
        MetaplError, match=r"expected the folder of Fashion-MNIST's four \.gz files"
    ):
        picture_sets.load_fashion(str(tmp_path / "elsewhere"))


def test_the_split_is_a_function_of_the_seed_and_can_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    kept = tmp_path / "run" / "split.json"
    protocols.train(dataclasses.replace(c, seed=8, split=str(kept), out=str(tmp_path / "other")))
    assert (tmp_path / "other" / "split.json").read_text() == kept.read_text()


def test_pictures_are_what_torchvision_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = tiny("cifar10-4k", tmp_path / "a", monkeypatch)
    pictures, labels, *_ = picture_sets.load_pictures(c)
    image, label = datasets.CIFAR10(c.root)[7]
    assert torch.equal(
        pictures.fetch(torch.tensor([7]))[0][0], torch.from_numpy(np.array(image)).permute(2, 0, 1)
    )
    assert labels[7] == label
    c = tiny("imagenet-10pct", tmp_path / "b", monkeypatch)
    pictures, labels, test, test_labels, classes, _ = picture_sets.load_pictures(c)
    assert classes == ["tench (n01440764)", "crane (n02012849)", "crane (n03126707)"]
    levels = pictures.fetch(torch.arange(36))[0].float().mean((1, 2, 3))
    assert levels.sub(50 + 50 * labels).abs().max() < 5
    assert (
        test.fetch(torch.arange(9))[0]
        .float()
        .mean((1, 2, 3))
        .sub(50 + 50 * test_labels)
        .abs()
        .max()
        < 5
    )


def test_the_accuracies_on_labeled_pictures_are_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    c = tiny("svhn-1k-paper", tmp_path, monkeypatch, wait=0)
    runs = []
    for method in ("mpl", "supervised"):
        runs.append(tmp_path / method)
        protocols.train(dataclasses.replace(c, method=method, out=str(runs[-1])))
    curves = {**training_accuracy.curves_of(runs[0]), **training_accuracy.curves_of(runs[1])}
    assert list(curves) == ["MPL, teacher", "MPL, student", "supervised"]
    for steps, accuracies in curves.values():
        assert steps == [2, 4]
        assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    # 30 pictures, three of each digit, as they are: what the networks are after the last step.
    result = json.loads((runs[0] / "result.json").read_text())
    assert curves["MPL, student"][1][-1] == result["student_training_accuracy"]
    assert curves["MPL, teacher"][1][-1] == result["teacher_training_accuracy"]
    assert (30 * result["student_training_accuracy"]) == pytest.approx(
        round(30 * result["student_training_accuracy"])
    )
    figure = tmp_path / "figure.png"
    assert training_accuracy.main([*map(str, runs), "--out", str(figure)]) == 0
    with Image.open(figure) as drawn:
        assert drawn.size == (900, 600)
    assert training_accuracy.main([str(tmp_path)]) == 2
    assert "expected the folder of a run of protocols.py" in capsys.readouterr().err


# Width and depth of the networks of the largest rows, where those of L2 are 4.3 and 5.3: their
# kinds of blocks, narrow and few, for these take seconds.
NARROW = {
    "efficientnet_l2": (0.1, 0.5),
    "efficientnet_b6_wide": (0.12, 0.4),
    "efficientnet_b7": (0.1, 0.4),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name for name, (_, c) in protocols.PROTOCOLS.items() if c.data == "imagenet"]
)
def test_the_rows_of_imagenet_stay_finite_in_miniature(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps with the row's own rates, losses and noise.

    The network's width and depth and the side are cut.
    """
    monkeypatch.setattr("metapl.networks.architectures._SCALES", NARROW)
    row = protocols.PROTOCOLS[name][1]
    kept = (
        "wait",
        "warmup",
        "finetune_steps",
        "steps",
        "student_lr",
        "teacher_lr",
        "stochastic_depth",
    )
    own: dict[str, Any] = {setting: getattr(row, setting) for setting in kept}
    own |= {"network": "pooled_cnn" if row.network == "resnet50" else row.network, "scale_to": 20}
    c = protocols.scaled(tiny(name, tmp_path, monkeypatch, **own))
    protocols.check(c)
    assert (c.steps, c.network.startswith("efficientnet")) == (
        20,
        row.network.startswith("efficientnet"),
    )
    protocols.train(c)
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-2]["step"] == 20
    numbers = [value for one in rows for value in one.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()
    for file in (tmp_path / "run").glob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(file).values()), file.name


@pytest.mark.long
def test_a_plan_takes_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reduced MPL, narrow, on eight ranks of which four share the statistics of batch norms."""
    monkeypatch.setattr("metapl.networks.architectures._SCALES", NARROW)
    words = ["plan.py", "imagenet-b7-reduced", "--size", "32", "--replicate", "2", "--shard", "4"]
    monkeypatch.setattr(
        "sys.argv", [*words, "--batch-norm-ranks", "4", "--labeled", "8", "--unlabeled", "16"]
    )
    plan.main()
    said = capsys.readouterr().out
    assert "efficientnet_b7 on stored labels" in said
    assert "1 labeled and 2 unlabeled pictures of 32 pixels for a rank" in said
    assert "sees 4 labeled and 8 unlabeled pictures, of 4 ranks" in said
    monkeypatch.setattr("sys.argv", ["plan.py", "--shard", "100", "--replicate", "3"])
    with pytest.raises(SystemExit):
        plan.main()
    assert "2,048 labeled pictures do not fall into 300 equal shares" in capsys.readouterr().err
