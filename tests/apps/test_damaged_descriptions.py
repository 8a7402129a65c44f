"""Weights, evaluations, label sets and runs whose descriptions are damaged or edited: each ends in words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from command import refused, said
from imagenet_sets import WNIDS, write_a
from safetensors.torch import save_file
from tiny_runs import TINY, color_folders

from metapl.apps.commands import main
from metapl.apps.evaluation import read_label_sets
from metapl.apps.evaluation.imagenet import IMAGENET_A, Pictures, Subject, _frames, imagenet_a
from metapl.apps.experiments.folder import RunFolder
from metapl.apps.labels import LabelStore, LabelWriter
from metapl.apps.labels import files as layout
from metapl.apps.networks import Architecture, load_weights
from metapl.apps.pictures.reader import UnreadableImage
from metapl.apps.recipes import Digits
from metapl.apps.recipes.methods.noisy_student import networks_of
from metapl.apps.recipes.settings import SelfTraining
from metapl.apps.reports.robustness import draw_evaluations
from metapl.errors import MetaplError

TOLD: dict[str, Any] = {
    "architecture": {"name": "small_cnn", "num_classes": 2, "in_channels": 3, "image_size": 16},
    "normalization": {"mean": [0.5] * 3, "std": [0.2] * 3},
    "classes": ["blue", "red"],
}
"""What an exported file says of itself."""


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folders(tmp_path_factory.mktemp("colors"), few=2, many=1)


def _of(**changed: Any) -> dict[str, Any]:
    return TOLD | {"architecture": TOLD["architecture"] | changed}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (TOLD, None),
        ("[" * 100_000, "recursion"),
        (_of(name=5), "architecture.name is 5; expected a text"),
        (_of(name=None), "architecture.name is None; expected a text"),
        (_of(num_classes=2.0), "architecture.num_classes is 2.0; expected a whole number"),
        (_of(image_size=True), "architecture.image_size is True"),
        (TOLD | {"normalization": [1]}, "normalization is [1]"),
        (TOLD | {"normalization": {"mean": 0.5, "std": 0.2}}, "normalization.mean is 0.5"),
        (TOLD | {"normalization": {"mean": "abc", "std": "def"}}, "normalization.mean is 'abc'"),
        (TOLD | {"normalization": {"mean": [0.5] * 3}}, "normalization has 3 means and 0 deviations; expected 3 of"),
        (TOLD | {"normalization": {"mean": [0.5] * 2, "std": [0.2] * 2}}, "normalization has 2 means"),
        (TOLD | {"normalization": {"mean": [0.5], "std": [0.2]}}, "normalization has 1 means"),
        (TOLD | {"classes": 2}, "classes is 2"),
        (TOLD | {"classes": {"blue": 1, "red": 2}}, "classes is {"),
        (TOLD | {"classes": ["red", "red"]}, "two classes have one name"),
        (TOLD | {"center": "x"}, "center is 'x'; expected a number"),
        (TOLD | {"center": None}, "center is None"),
        (TOLD | {"center": 5}, "center is 5; expected a number in (0, 1]"),
    ],
)
def test_what_a_file_of_weights_says_of_itself(
    told: Any, words: str | None, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, network = tmp_path / "model.safetensors", Architecture(**TOLD["architecture"]).create()
    save_file(network.state_dict(), file, {"metapl": told if isinstance(told, str) else json.dumps(told)})
    command = ("evaluate", "--weights", file, "--test", colors / "test", "--json")
    if words is None:
        assert json.loads(said(capsys, *command))["n"] == 4
    else:
        message = refused(capsys, *command)
        assert words in message
        assert "Expected .safetensors as metapl export writes it" in message


def _cyclic(state: dict[str, Any]) -> dict[str, Any]:
    state["model"] = state
    return state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_cyclic, "expected tensors by name"),
        (lambda state: state | {"weight": state["weight"].to_sparse()}, "sparse, quantized or without values: weight"),
        (lambda state: state | {"more": torch.empty(2, device="meta")}, "sparse, quantized or without values: more"),
    ],
)
def test_pickled_weights_that_are_not_dense_tensors(
    change: Callable[[dict[str, Any]], dict[str, Any]], words: str, tmp_path: Path
) -> None:
    network = torch.nn.Linear(2, 2)
    torch.save(change(dict(network.state_dict())), tmp_path / "weights.pt")
    with pytest.raises(MetaplError, match=words):
        load_weights(network, tmp_path / "weights.pt")


# ---------------------------------------------------------------------------------------------------------- evaluations

EVALUATION: dict[str, Any] = {
    "n": 10,
    "accuracy": 0.5,
    "classes": ["a", "b"],
    "corruptions": {"snow": {"error": 0.5, "accuracy_by_severity": [0.5] * 5}},
    "attacks": {"pgd": {"2": 0.25}},
    "imagenet_p": {"perturbations": {"tilt": {"flip_probability": 0.5}}},
    "mean_corruption_error": 120.0,
}


def test_an_evaluation_of_attacks_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("a", EVALUATION), ("b", {k: v for k, v in EVALUATION.items() if k != "accuracy"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps(content))
    message = refused(capsys, "compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert "it has attacks, and no accuracy without them" in message


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"n": "x"}, "n is 'x'; expected a whole number"),
        ({"n": -5}, "n is -5; expected a whole number of 1 or more"),
        ({"interval": [0.5]}, "interval has 1 entries; expected 2"),
        ({"interval": 0.5}, "interval is 0.5"),
        ({"run": 3}, "run is 3"),
        ({"classes": [[1]]}, "classes.0 is [1]"),
        ({"accuracy": float("nan")}, "accuracy is nan"),
        ({"accuracy": float("inf")}, "accuracy is inf"),
        ({"accuracy": 10**400}, "accuracy is 1000"),
        ({"accuracy": 17}, "accuracy is 17; expected a number in [0, 1]"),
        ({"accuracy": -1}, "accuracy is -1"),
        ({"accuracy": True}, "accuracy is True"),
        ({"accuracy": None}, "accuracy is None; expected a number"),
        ({"corruptions": []}, "corruptions is []"),
        ({"corruptions": {"snow": {}}}, "an entry lacks its 'error'"),
        ({"corruptions": {"sleet": {"error": 0.5}}}, "it is of sleet, which are not known"),
        ({"attacks": {"pgd": {"1e-05": 0.5}}}, None),  # as --eps 0.00001 is written
        ({"attacks": {"pgd": {"x": 0.5}}}, "attacks have ε = x; expected 0 to 255"),
        ({"attacks": {"pgd": {"nan": 0.5}}}, "attacks have ε = nan"),
        ({"attacks": {"p" * 5000: {"2": 0.5}}}, "which are not known"),
        ({"imagenet_p": {"perturbations": {"tilt": 0.5}}}, "imagenet_p.perturbations.tilt is 0.5"),
        ({"imagenet_a": []}, "imagenet_a is []; expected an object"),
    ],
)
def test_evaluations_that_were_edited(
    changed: dict[str, Any], words: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("a", EVALUATION), ("b", EVALUATION | changed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps(content))
    command, out = ("compare", tmp_path / "a", tmp_path / "b"), tmp_path / "out"
    if words is None:
        assert "PGD, ε = 2/255" in said(capsys, *command)
        return
    message = refused(capsys, *command, "--out", out)
    assert f"{tmp_path / 'b' / 'evaluation.json'} is damaged: " in message
    assert words in message
    assert not out.exists()


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    draw_evaluations(tmp_path / "page.png", {"caf\udce9": EVALUATION, "b\n": EVALUATION}, "a\udcff")
    assert (tmp_path / "page.png").is_file()


def test_an_evaluation_of_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text("[" * 100_000)
    assert "it is nested too deeply" in refused(capsys, "compare", tmp_path / "a", tmp_path / "b")


def test_a_place_that_nothing_can_be_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused at once, and not after all has been measured."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "odd" / "evaluation.json").mkdir(parents=True)
    for out, words in (("file/x", "Not a directory"), ("loop", "symbolic links"), ("odd", "it is a folder")):
        assert words in refused(capsys, "evaluate", tmp_path / "no run", "--out", tmp_path / out)

    def refusing(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refusing)
    assert "Permission denied" in refused(capsys, "evaluate", tmp_path / "no run", "--out", tmp_path / "new" / "x")


# ---------------------------------------------------------------------------------------------------------- label sets


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"[[{'9' * 5000}]]", "cannot be read: Exceeds the limit"),
        (json.dumps([["9" * 5000]]), "are not among the run's"),
        (f"file,labels\n{'a' * 200_000},0\n", "cannot be read: field larger than field limit"),
    ],
    ids=["number", "text", "cell"],
)
def test_label_sets_of_endless_numbers_and_cells(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "sets").write_text(content)
    with pytest.raises(MetaplError, match=words):
        read_label_sets(tmp_path / "sets", ("a", "b"), ["0.png"])


# ------------------------------------------------------------------------------------------------------ stored labels


def _resealed(store: Path, column: str, change: Callable[[list[Any]], list[Any]]) -> LabelStore:
    """The store with another column, and checksums that fit."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    description = json.loads((store / "store.json").read_text())
    (part,) = description["parts"]
    table = pq.read_table(store / part["file"])
    place = table.schema.get_field_index(column)
    values = pa.array(change(table.column(column).to_pylist()), table.schema.field(place).type)
    written = layout.encoded(table.set_column(place, table.schema.field(place), values)).to_pybytes()
    part["sha256"] = hashlib.sha256(written).hexdigest()
    part |= {"file": layout.part_name(0, part["sha256"]), "bytes": len(written)}
    (store / part["file"]).write_bytes(written)
    (store / "store.json").write_bytes(layout.sealed(description))
    return LabelStore(store)


@pytest.mark.parametrize("values", [[0.0] * 2, [-1.0, 2.0], [float("inf")] * 2])
def test_stored_numbers_that_are_not_distributions(values: list[float], tmp_path: Path) -> None:
    with LabelWriter(tmp_path / "store", ["a", "b"]) as writer:
        writer.add([1, 2], torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    odd = [numpy.float16(value) for value in values]
    store = _resealed(tmp_path / "store", "probabilities", lambda column: [column[0], odd])
    with pytest.raises(MetaplError, match="expected distributions"):
        store.at([0, 1])
    assert store.at([0]).tolist() == [[0.5, 0.5]]


def test_examples_that_do_not_count(tmp_path: Path) -> None:
    with LabelWriter(tmp_path / "store", ["a", "b"]) as writer:
        writer.add([1, 2], torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    with pytest.raises(MetaplError, match="is not a part as store"):
        _resealed(tmp_path / "store", "copies", lambda column: [1, -1]).rows_with_copies()


# ------------------------------------------------------------------------------------------------- ImageNet's test sets


def test_a_set_that_is_half_unpacked(tmp_path: Path) -> None:
    """A folder without pictures would shift the outputs of all others, where folders go by their number."""
    root = write_a(tmp_path / "a", IMAGENET_A)
    shutil.rmtree(root / WNIDS[IMAGENET_A[0]])
    (root / "zzz").mkdir()
    subject = Subject(torch.nn.Identity(), Pictures(16), None, 1000, imagenet=True)
    with pytest.raises(MetaplError, match="1 class folder without a picture: zzz"):
        imagenet_a(subject, root)


def test_a_pipe_among_the_videos(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "v.mp4")
    with pytest.raises(UnreadableImage, match="it is a pipe"):
        next(_frames(tmp_path / "v.mp4", Pictures(16)))


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_flag_that_takes_values_and_has_none(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--eps: nothing was given" in refused(capsys, "evaluate", tiny, "--attack", "fgsm", "--eps", "--json")
    assert "RUN...: nothing was given" in refused(capsys, "compare")
    command = ("noisy-student", "digits", "--out", tmp_path / "run")
    assert "--networks: nothing was given" in refused(capsys, *command, "--networks")
    assert "--methods: nothing was given" in refused(capsys, *command, "--compare", "--methods")
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_none(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = ("train", "digits", "--out", tmp_path / "run")
    assert "--steps: expected a whole number, got 'nan'" in refused(capsys, *digits, "--steps", "nan")
    assert "--uda-weight: expected a number, got 'x'" in refused(capsys, *digits, "--uda-weight", "x")
    command = ("label", tiny, tmp_path, "--out", tmp_path / "store", "--data-root", tmp_path)
    assert "has no effect on" in refused(capsys, *command)


def test_more_warm_steps_than_steps() -> None:
    """The rate that ends where others end would begin at ten to the power of fifty."""
    settings = SelfTraining(warm_start=True, warm_steps=1000)
    with pytest.raises(MetaplError, match=r"--warm-steps 1,000: .* expected 1 to 30, or more --steps"):
        networks_of(Digits(steps=30, schedule="exponential"), settings)


def test_a_noisy_student_whose_result_was_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited, other = tmp_path / "run", tmp_path / "other"
    flags = ("--rounds", "1", "--steps", "2", "--hidden", "4", "--labeled-batch", "4")
    assert main(["noisy-student", "digits", *flags, "--out", str(edited)]) == 0
    shutil.copytree(edited, other)
    file = edited / "result.json"
    content = json.loads(file.read_text())
    del content["sha256"]  # as of an earlier version
    rounds: list[Any] | None
    for rounds in ([], None):
        changed = content | {"rounds": rounds}
        if rounds is None:
            del changed["rounds"]
        file.write_text(json.dumps(changed))
        assert "is damaged: it tells of 0 rounds, and recipe.json of 1" in refused(capsys, "evaluate", edited)
    del content["student_test_accuracy"]
    file.write_text(json.dumps(content))
    assert "is damaged: it does not say student_test_accuracy" in refused(capsys, "compare", edited, other)


def test_what_a_killed_process_began_to_write_goes_with_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.claimed({"name": "x"}, resume=False):
        pass
    for name in ("report.png.0123abcd.tmp", "notes.tmp"):
        (tmp_path / name).write_bytes(b"half")
    with folder.claimed({"name": "x"}, resume=True):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "recipe.json", "notes.tmp"}


def test_a_log_that_is_missing_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("result.json", "metrics.jsonl"):
        (run / name).unlink()
    assert main([*TINY, "--out", str(run), "--resume"]) == 0
    shown = capsys.readouterr()
    assert "metrics.jsonl is missing: it begins again after step 6" in " ".join((shown.out + shown.err).split())
