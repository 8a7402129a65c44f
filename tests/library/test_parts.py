"""Checkpoints in parts: whole or not there, as they were when they were asked for, and never a way to run code."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from metapl.runs import checkpoint
from metapl.runs.checkpoint import CheckpointError, CheckpointFolder
from metapl.runs.checkpoint_parts import REST, PartsWriter, check, load


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[PartsWriter]:
    """Of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    writer = PartsWriter(tmp_path / "fit", keep=2)
    yield writer
    writer.close()
    dist.destroy_process_group()


def shared(value: float = 1.0) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (1, 1))
    sharded = distribute_tensor(torch.full((3, 2), value), mesh, [Shard(0), Replicate()])
    weights = {
        "sharded": sharded,
        "weight": torch.full((3, 2), value),
        "count": torch.tensor(4),
        "empty": torch.zeros(0),
    }
    optimizer = {"state": {0: {"momentum": torch.full((2,), value)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 1)}]}
    return {"trainer": {"student": weights, "optimizer": optimizer}, "average": None}


def written(writer: PartsWriter, step: int, value: float = 1.0) -> Path:
    writer.write(step, {**shared(value), "step": step, "rng": torch.arange(3)})
    path = writer.settle()
    assert path is not None
    return path


def names(writer: PartsWriter) -> list[str]:
    return sorted(path.name for path in writer.checkpoints.folder.iterdir())


def test_it_is_read_as_it_was_when_it_was_asked_for(writer: PartsWriter) -> None:
    state, rest = shared(2.0), {"step": 7, "seen": {"accuracy": [0.5]}}
    writer.write(7, state | rest)
    state["trainer"]["student"]["weight"].zero_()
    state["trainer"]["optimizer"]["param_groups"][0]["lr"] = 0.0
    rest["seen"]["accuracy"].append(0.6)
    path = writer.settle()
    assert path == writer.checkpoints.folder / "step-00000007.parts"
    found, expected = load(path), {**shared(2.0), "step": 7, "seen": {"accuracy": [0.5]}}
    expected["trainer"]["student"]["sharded"] = torch.full((3, 2), 2.0)
    assert repr(found) == repr(expected)
    like = distribute_tensor(torch.zeros(3, 2), init_device_mesh("cpu", (1,)), [Shard(1)])
    again = load(path, lambda name, shape: like)["trainer"]["student"]["sharded"]
    assert again.placements == (Shard(1),)
    assert again.full_tensor().unique().tolist() == [2.0]


def test_old_ones_go_when_a_new_one_is_whole_and_what_kills_left_goes_too(writer: PartsWriter) -> None:
    left = writer.checkpoints.folder / "step-00000009.parts.0123abcd.tmp"
    left.mkdir(parents=True)
    (writer.checkpoints.folder / "step-00000001.ckpt").write_bytes(b"of one process")
    for step in (2, 3, 4):
        written(writer, step)
    assert names(writer) == ["step-00000003.parts", "step-00000004.parts"]
    assert written(writer, 4, 5.0).name == "step-00000004-1.parts"  # left from before a restart
    newest = CheckpointFolder(writer.checkpoints.folder).newest(load)
    assert newest is not None
    assert newest.state["trainer"]["student"]["weight"].unique().tolist() == [5.0]


@pytest.mark.parametrize("name", ["part-00000.ckpt", REST])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_damaged_one_is_passed_over(writer: PartsWriter, name: str, how: str) -> None:
    written(writer, 1)
    damaged = written(writer, 2) / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content) if how == "changed" else damaged.unlink()
    newest = CheckpointFolder(writer.checkpoints.folder).newest(load)
    assert newest is not None
    assert newest.state["step"] == 1
    assert [path for path, _ in newest.skipped] == [damaged.parent]


def test_a_disk_that_refuses_leaves_what_was_there(writer: PartsWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written(writer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", refused)
        writer.write(2, {**shared(), "step": 2})
        with pytest.raises(CheckpointError, match=r"step-00000002.parts could not be written: No space left on device"):
            writer.settle()
    assert names(writer) == ["step-00000001.parts"]
    assert written(writer, 2).name == "step-00000002.parts"


def test_a_part_of_another_checkpoint_is_not_taken(writer: PartsWriter) -> None:
    first, second = written(writer, 1, 1.0), written(writer, 2, 2.0)
    (second / "part-00000.ckpt").write_bytes((first / "part-00000.ckpt").read_bytes())
    with pytest.raises(CheckpointError, match=r"its part-00000.ckpt is of another one"):
        check(second)


def test_pieces_that_lack_are_named(writer: PartsWriter) -> None:
    path = written(writer, 1)
    rest = checkpoint.load(path / REST)
    sha256 = checkpoint.save(path / "part-00000.ckpt", {"parts": {}})
    checkpoint.save(path / REST, rest | {"files": {"part-00000.ckpt": sha256}})
    with pytest.raises(CheckpointError, match=r"trainer/student/sharded is not all in the parts"):
        load(path)
