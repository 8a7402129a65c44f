"""Checkpoint files, whole ones and parts.

What comes back, what is refused, and that a disk or a kill cannot spoil them.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from metapl.runs import checkpoint
from metapl.runs.checkpoint import (
    CheckpointError,
    CheckpointFolder,
    DamagedError,
    PartsFolder,
    load,
    load_parts,
    save,
)

WEIGHT = torch.arange(6.0).reshape(2, 3)
TYPES = (torch.float64, torch.bfloat16, torch.int8, torch.bool)
TREES: dict[str, Any] = {
    "leaves": {"int": 3, "float": 0.1, "bool": True, "none": None, "text": "ä\ud800", "big": 2**80},
    "odd numbers": {"inf": math.inf, "tiny": 5e-324, "minus zero": -0.0},
    "keys": {"state": {0: {"step": 1}, None: 2, (1, "a"): 3, "$tensor": 4, 0.5: 5}},
    "nested": {"a": [1, (2, [3, ()]), {}], "empty": {}, "list": []},
    "tensors": {str(dtype): torch.arange(4).to(dtype) for dtype in TYPES},
    "shapes": {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "strided": WEIGHT.T},
    "complex": {"conj": (1j * WEIGHT).conj()},
    "an optimizer": torch.optim.AdamW([nn.Parameter(torch.ones(2))]).state_dict(),
}


def same(a: Any, b: Any) -> bool:
    """Return whether all are equal, also their kinds and the order of entries."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return [*a] == [*b] and all(map(same, a.values(), b.values()))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


@pytest.mark.parametrize("name", TREES)
def test_what_was_saved_comes_back(name: str, tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt", TREES[name])
    assert same(load(tmp_path / "a.ckpt"), TREES[name])


def test_it_is_a_file_of_safetensors_in_which_each_has_its_place(tmp_path: Path) -> None:
    flat = torch.arange(8.0)
    tied = {
        "a": {"w": WEIGHT},
        "b": {"w": WEIGHT},
        "views": [flat[:4], flat[2:], flat, flat.view(2, 4)],
    }
    save(tmp_path / "a.ckpt", tied)
    with safe_open(tmp_path / "a.ckpt", framework="pt") as file:
        assert sorted(file.keys()) == ["a/w", "b/w", "views/0", "views/1", "views/2", "views/3"]
    assert same(load(tmp_path / "a.ckpt"), tied)


@pytest.mark.parametrize(
    "leaf",
    [
        b"bytes",
        object(),
        np.float64(1.0),
        WEIGHT.to_sparse(),
        {1, 2},
        torch.Generator,
        [[object()]],
    ],
)
def test_what_could_not_come_back_is_refused_and_the_old_file_stays(
    leaf: Any, tmp_path: Path
) -> None:
    save(tmp_path / "a.ckpt", {"step": 1})
    with pytest.raises(CheckpointError, match="a/b"):
        save(tmp_path / "a.ckpt", {"a": {"b": leaf}})
    assert load(tmp_path / "a.ckpt") == {"step": 1}
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    """But for those that change nothing, such as blanks of the header."""
    path = tmp_path / "a.ckpt"
    state = {"step": 3, "weights": WEIGHT, "lr": 0.1}
    save(path, state)
    content = path.read_bytes()
    draw = random.Random(0)
    for place in range(len(content)):
        broken = bytearray(content)
        broken[place] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        try:
            tree = load(path)
        except CheckpointError:
            continue
        assert same(tree, state), place
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedError):
            load(path)


def test_the_newest_whole_one_wins_and_one_of_another_format_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    assert folder.newest() is None
    for step in (1, 2, 3):
        folder.write(step, {"step": step})
    newest_path = folder.paths()[0]
    newest_path.write_bytes(newest_path.read_bytes()[:-1])
    newest = folder.newest()
    assert newest is not None
    assert newest.state["step"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", "4")
        folder.write(3, {"step": 3})
    with pytest.raises(CheckpointError, match="format"):
        folder.newest()
    for path in folder.paths():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none"):
        folder.newest()


def test_as_many_stay_as_are_kept_and_what_others_have_there_too(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-00000001.ckpt.0123abcd.tmp").write_text("left by a kill")
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (10, 20, 30):
        folder.write(step, {"step": step})
    # After a restart, the later one stays until it is passed.
    folder.write(20, {"step": 20})
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step-00000020.ckpt", "step-00000030.ckpt"]


# ----------------------------------------------------------------------------------------- in parts


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[PartsFolder]:
    """Yield the writer of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    writer = PartsFolder(tmp_path / "fit", keep=2)
    yield writer
    writer.close()
    dist.destroy_process_group()


def state_of(step: int, value: float = 1.0, size: int = 3) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (1, 1))
    sharded = distribute_tensor(torch.full((size, 2), value), mesh, [Shard(0), Replicate()])
    optimizer = {
        "state": {0: {"momentum": torch.full((2,), value)}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 1)}],
    }
    student = {"sharded": sharded, "weight": torch.full((3, 2), value)}
    return {
        "trainer": {"student": student, "optimizer": optimizer},
        "step": step,
        "rng": torch.arange(3),
    }


def written(writer: PartsFolder, step: int, value: float = 1.0) -> Any:
    writer.write(step, state_of(step, value))
    writer.finish()
    return writer.last


def names(writer: PartsFolder) -> list[str]:
    return sorted(path.name for path in writer.folder.iterdir())


def test_it_is_read_as_it_was_when_it_was_asked_for(writer: PartsFolder) -> None:
    state = state_of(7, 2.0)
    writer.write(7, state)
    state["trainer"]["student"]["sharded"].to_local().zero_()
    state["trainer"]["student"]["weight"].zero_()
    state["trainer"]["optimizer"]["param_groups"][0]["lr"] = 0.0
    writer.finish()
    path = writer.last
    assert path == writer.folder / "step-00000007.parts"
    expected = state_of(7, 2.0)
    expected["trainer"]["student"]["sharded"] = torch.full((3, 2), 2.0)
    assert repr(load_parts(path, {})) == repr(expected)
    like = distribute_tensor(torch.zeros(3, 2), init_device_mesh("cpu", (1,)), [Shard(1)])
    sharded = load_parts(path, {"trainer/student/sharded": like})["trainer"]["student"]["sharded"]
    assert sharded.placements == (Shard(1),)
    assert sharded.full_tensor().unique().tolist() == [2.0]


def test_old_ones_go_when_a_new_one_is_whole_and_what_kills_left_goes_too(
    writer: PartsFolder,
) -> None:
    (writer.folder / "step-00000009.parts.tmp").mkdir(parents=True)
    for step in (2, 3, 4):
        written(writer, step)
    assert names(writer) == ["step-00000003.parts", "step-00000004.parts"]
    # It takes the place of one that was passed over.
    written(writer, 4, 5.0)
    newest = CheckpointFolder(writer.folder).newest()
    assert newest is not None
    assert load_parts(newest.path, {})["trainer"]["student"]["weight"].unique().tolist() == [5.0]


def test_one_with_a_damaged_file_is_passed_over(writer: PartsFolder) -> None:
    written(writer, 1)
    newest_path = written(writer, 2)
    files = {path: path.read_bytes() for path in newest_path.iterdir()}
    # These are the part, its metadata, and the rest.
    assert len(files) == 3
    for path, content in files.items():
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        for broken in (content[:middle], None, *([flipped] if path.name == "rest.ckpt" else [])):
            path.unlink() if broken is None else path.write_bytes(broken)
            newest = CheckpointFolder(writer.folder).newest()
            assert newest is not None
            assert load_parts(newest.path, {})["step"] == 1
            path.write_bytes(content)
    assert load_parts(newest_path, {})["step"] == 2
