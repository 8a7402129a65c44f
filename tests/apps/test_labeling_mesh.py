"""Methods that store labels first, over several processes: each labels its share, and the first one writes."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from test_killed_ranks import Attempt, train_through
from test_mesh_command import rows, same, trained
from tiny_runs import NOISY_STUDENT, REDUCED, built_once, color_folders
from tiny_runs import trained as train

from metapl.apps.commands import main
from metapl.apps.labels import LabelStore, LabelWriter

COMMANDS = {"noisy student": [*NOISY_STUDENT], "reduced": [*REDUCED, "--mode", "forward"]}

IMAGES = (
    "--steps 4 --image-size 8 --network small_cnn --precision float32 --labeled-batch 4 --log-every 1 --dropout 0 "
    "--rounds 1 --ratio 1 --threshold 0 --save-every 2 --device cpu"
)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, "command_cases", joined=False)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module", params=COMMANDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run of one process."""
    name: str = request.param
    run = built_once(tmp_path_factory, f"{name}, alone", lambda out: train(*COMMANDS[name], "--out", str(out)))
    return name, run


def stores(run: Path) -> list[Path]:
    return sorted(path.parent for path in run.rglob("store.json"))


def parts(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("*.parquet")}


def accuracies(run: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads((run / "result.json").read_text()).items() if "accuracy" in k}


def same_run(run: Path, other: Path) -> None:
    same(run, other, tuple({row["phase"] for row in rows(other)}))
    assert accuracies(run) == pytest.approx(accuracies(other), abs=0.01)
    assert [path.relative_to(run) for path in stores(run)] == [path.relative_to(other) for path in stores(other)]
    for store, expected in zip(stores(run), stores(other), strict=True):
        a, b = LabelStore(store), LabelStore(expected)
        assert list(a) == list(b)
        assert float((a[list(a)] - b[list(b)]).abs().max()) < 1e-3  # float16


@pytest.mark.parametrize(
    "layout",
    ["replicate", pytest.param("shard", marks=pytest.mark.long), pytest.param("tensor", marks=pytest.mark.long)],
)
def test_a_run_of_two_processes_is_that_of_one(
    two: Ranks, whole: tuple[str, Path], tmp_path: Path, layout: str
) -> None:
    name, alone = whole
    command = COMMANDS[name]
    if layout == "tensor":
        command = [word.replace("forward", "difference") for word in command]
        train(*command, "--out", str(tmp_path / "alone"))
        alone = tmp_path / "alone"
    trained(two, [*command, f"--mesh.{layout}", "2"], tmp_path / "two")
    same_run(tmp_path / "two", alone)


def test_labels_are_to_the_bit_those_of_one_process_that_was_stopped(
    two: Ranks, whole: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process stops within the labels of its first network, and two go on: the store is as if it had not."""
    name, alone = whole
    run, added = tmp_path / "run", list[Any]()

    def add(self: LabelWriter, *given: Any) -> None:
        added.append(given)
        if len(added) > 4:  # of 256 rows: a part is on disk
            raise KeyboardInterrupt
        real(self, *given)

    real = LabelWriter.add
    with monkeypatch.context() as patch:
        patch.setattr(LabelWriter, "add", add)
        assert main([*COMMANDS[name], "--out", str(run)]) == 130
    (first,) = stores(run)
    begun, expected = parts(first), parts(alone / first.relative_to(run))
    assert 1 == len(begun) < len(expected)
    trained(two, [*COMMANDS[name], "--mesh.replicate", "2", "--resume"], run)
    assert parts(first) == expected
    same_run(run, alone)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["replicate", "shard"])
def test_pictures_in_files(two: Ranks, tmp_path: Path, layout: str) -> None:
    """Of which one cannot be read."""
    root = color_folders(tmp_path / "pictures", many=8)
    (root / "unlabeled" / "red-3.png").write_bytes(b"no picture")
    folders = [f"--{part}={root / part}" for part in ("labeled", "unlabeled", "test")]
    command = ["noisy-student", "images", *folders, *IMAGES.split()]
    trained(None, command, tmp_path / "alone")
    trained(two, [*command, f"--mesh.{layout}", "2"], tmp_path / "two")
    same_run(tmp_path / "two", tmp_path / "alone")


@pytest.mark.long
def test_processes_that_are_killed_end_with_the_stores_of_those_that_were_not(
    whole: tuple[str, Path], tmp_path: Path
) -> None:
    name, _ = whole
    command = [*COMMANDS[name], "--mesh.replicate", "2", "--save-every", "1", "--resume"]
    since = time.monotonic()
    assert Attempt(tmp_path / "left", command).codes() == [0, 0]
    seconds = time.monotonic() - since
    for number in range(3):
        run = tmp_path / str(number)
        hits, _ = train_through(run, 4, seconds, random.Random(number), command)
        assert hits > 0
        for store in stores(run):
            assert parts(store) == parts(tmp_path / "left" / store.relative_to(run))
        assert (run / "student.safetensors").read_bytes() == (tmp_path / "left" / "student.safetensors").read_bytes()
        shutil.rmtree(run)
