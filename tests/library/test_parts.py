"""Checkpoints in parts: whole or not there, as they were when they were asked for, in whatever layout they are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from metapl.runs.checkpoint import CheckpointFolder
from metapl.runs.checkpoint_parts import PartsWriter, check, load


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[PartsWriter]:
    """Of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    writer = PartsWriter(tmp_path / "fit", keep=2)
    yield writer
    writer.close()
    dist.destroy_process_group()


def state_of(step: int, value: float = 1.0, size: int = 3) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (1, 1))
    sharded = distribute_tensor(torch.full((size, 2), value), mesh, [Shard(0), Replicate()])
    optimizer = {"state": {0: {"momentum": torch.full((2,), value)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 1)}]}
    student = {"sharded": sharded, "weight": torch.full((3, 2), value)}
    return {"trainer": {"student": student, "optimizer": optimizer}, "step": step, "rng": torch.arange(3)}


def written(writer: PartsWriter, step: int, value: float = 1.0) -> Path:
    writer.write(step, state_of(step, value))
    path = writer.finished()
    assert path is not None
    return path


def names(writer: PartsWriter) -> list[str]:
    return sorted(path.name for path in writer.checkpoints.folder.iterdir())


def test_it_is_read_as_it_was_when_it_was_asked_for(writer: PartsWriter) -> None:
    state = state_of(7, 2.0)
    writer.write(7, state)
    state["trainer"]["student"]["sharded"].to_local().zero_()
    state["trainer"]["student"]["weight"].zero_()
    state["trainer"]["optimizer"]["param_groups"][0]["lr"] = 0.0
    path = writer.finished()
    assert path == writer.checkpoints.folder / "step-00000007.parts"
    expected = state_of(7, 2.0)
    expected["trainer"]["student"]["sharded"] = torch.full((3, 2), 2.0)
    assert repr(load(path)) == repr(expected)
    like = distribute_tensor(torch.zeros(3, 2), init_device_mesh("cpu", (1,)), [Shard(1)])
    again = load(path, lambda name, shape: like)["trainer"]["student"]["sharded"]
    assert again.placements == (Shard(1),)
    assert again.full_tensor().unique().tolist() == [2.0]


def test_old_ones_go_when_a_new_one_is_whole_and_what_kills_left_goes_too(writer: PartsWriter) -> None:
    (writer.checkpoints.folder / "step-00000009.parts.tmp").mkdir(parents=True)
    for step in (2, 3, 4):
        written(writer, step)
    assert names(writer) == ["step-00000003.parts", "step-00000004.parts"]
    written(writer, 4, 5.0)  # in the place of one that was passed over
    newest = CheckpointFolder(writer.checkpoints.folder).newest(check)
    assert newest is not None
    assert load(newest.path)["trainer"]["student"]["weight"].unique().tolist() == [5.0]


def test_one_with_a_damaged_file_is_passed_over(writer: PartsWriter) -> None:
    written(writer, 1)
    whole = written(writer, 2)
    files = {path: path.read_bytes() for path in whole.iterdir()}
    assert len(files) == 3  # the part, its metadata, and the rest
    for path, content in files.items():
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        for broken in (content[:middle], None, *([flipped] if path.name == "rest.ckpt" else [])):
            path.unlink() if broken is None else path.write_bytes(broken)
            newest = CheckpointFolder(writer.checkpoints.folder).newest(check)
            assert newest is not None
            assert load(newest.path)["step"] == 1
            path.write_bytes(content)
    assert load(whole)["step"] == 2
