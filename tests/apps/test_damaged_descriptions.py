"""Weights, stored labels and runs whose descriptions are damaged or edited: each ends in words."""

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
from command import refused
from safetensors.torch import save_file
from tiny_runs import TINY

from metapl.apps.commands import main
from metapl.apps.experiments.folder import RunFolder
from metapl.apps.export import read_metadata
from metapl.apps.labels import LabelStore, LabelWriter
from metapl.apps.labels import files as layout
from metapl.apps.networks import Architecture, load_weights
from metapl.apps.recipes import Digits
from metapl.apps.recipes.methods.noisy_student import networks_of
from metapl.apps.recipes.settings import SelfTraining
from metapl.errors import MetaplError

TOLD: dict[str, Any] = {
    "architecture": {"name": "small_cnn", "num_classes": 2, "in_channels": 3, "image_size": 16},
    "normalization": {"mean": [0.5] * 3, "std": [0.2] * 3},
    "classes": ["blue", "red"],
}
"""What an exported file says of itself."""


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
def test_what_a_file_of_weights_says_of_itself(told: Any, words: str | None, tmp_path: Path) -> None:
    file, network = tmp_path / "model.safetensors", Architecture(**TOLD["architecture"]).create()
    save_file(network.state_dict(), file, {"metapl": told if isinstance(told, str) else json.dumps(told)})
    if words is None:
        assert read_metadata(file) == told
        return
    with pytest.raises(MetaplError, match="metapl export") as error:
        read_metadata(file)
    assert words in str(error.value)


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


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_flag_that_takes_values_and_has_none(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--eps: nothing was given" in refused(capsys, "evaluate", tiny, "--attack", "fgsm", "--eps", "--json")
    assert "RUN...: nothing was given" in refused(capsys, "compare")
    command = ("noisy-student", "digits", "--out", tmp_path / "run")
    assert "--networks: nothing was given" in refused(capsys, *command, "--networks")
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_none(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = ("train", "digits", "--out", tmp_path / "run")
    assert "--steps: expected a whole number, got 'nan'" in refused(capsys, *digits, "--steps", "nan")
    assert "--uda-weight: expected a number, got 'x'" in refused(capsys, *digits, "--uda-weight", "x")


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
