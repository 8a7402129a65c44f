"""Checkpoints in parts: whole or not there, as they were when they were asked for, and never a way to run code."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from metapl.runs import checkpoint
from metapl.runs import checkpoint_parts as parts
from metapl.runs.checkpoint import CheckpointError, CheckpointFolder
from metapl.runs.checkpoint_parts import METADATA, REST, PartsWriter, check_parts, load_parts


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[PartsWriter]:
    """Of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    writer = PartsWriter(tmp_path / "fit", keep=2)
    yield writer
    writer.close()
    dist.destroy_process_group()


def shared(value: float = 1.0) -> dict[str, Any]:
    weights = {"weight": torch.full((3, 2), value), "count": torch.tensor(4), "empty": torch.zeros(0)}
    optimizer = {"state": {0: {"momentum": torch.full((2,), value)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 1)}]}
    return {"trainer": {"student": weights, "optimizer": optimizer}, "average": None}


def written(writer: PartsWriter, step: int, value: float = 1.0) -> Path:
    writer.write(step, shared(value), {"step": step, "rng": torch.arange(3)})
    path = writer.settle()
    assert path is not None
    return path


def names(writer: PartsWriter) -> list[str]:
    return sorted(path.name for path in writer.folder.iterdir())


def test_it_is_read_as_it_was_when_it_was_asked_for(writer: PartsWriter) -> None:
    state, rest = shared(2.0), {"step": 7, "seen": {"accuracy": [0.5]}}
    writer.write(7, state, rest)
    state["trainer"]["student"]["weight"].zero_()
    state["trainer"]["optimizer"]["param_groups"][0]["lr"] = 0.0
    rest["seen"]["accuracy"].append(0.6)
    path = writer.settle()
    assert path == writer.folder / "step-00000007.parts"
    found, expected = load_parts(path), {**shared(2.0), "step": 7, "seen": {"accuracy": [0.5]}}
    assert repr(found) == repr(expected)


def test_old_ones_go_when_a_new_one_is_whole_and_what_kills_left_goes_too(writer: PartsWriter) -> None:
    left = writer.folder / "step-00000009.parts.0123abcd.tmp"
    left.mkdir(parents=True)
    (writer.folder / "step-00000001.ckpt").write_bytes(b"of one process")
    for step in (2, 3, 4):
        written(writer, step)
    assert names(writer) == ["step-00000003.parts", "step-00000004.parts"]
    assert written(writer, 4, 5.0).name == "step-00000004-1.parts"  # left from before a restart
    newest = CheckpointFolder(writer.folder).newest(read_folder=load_parts)
    assert newest is not None
    assert newest.state["trainer"]["student"]["weight"].unique().tolist() == [5.0]


@pytest.mark.parametrize("name", ["__0_0.distcp", METADATA, REST])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_damaged_one_is_passed_over(writer: PartsWriter, name: str, how: str) -> None:
    written(writer, 1)
    damaged = written(writer, 2) / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content) if how == "changed" else damaged.unlink()
    newest = CheckpointFolder(writer.folder).newest(read_folder=load_parts)
    assert newest is not None
    assert newest.state["step"] == 1
    assert [skipped.path for skipped in newest.skipped] == [damaged.parent]


def test_a_disk_that_refuses_leaves_what_was_there(writer: PartsWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written(writer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", refused)
        writer.write(2, shared(), {"step": 2})
        with pytest.raises(CheckpointError, match=r"step-00000002.parts could not be written: No space left on device"):
            writer.settle()
    assert names(writer) == ["step-00000001.parts"]
    assert written(writer, 2).name == "step-00000002.parts"


def test_metadata_run_no_code(writer: PartsWriter, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'harm'}",)

    path = written(writer, 1)
    (path / METADATA).write_bytes(pickle.dumps(Hostile()))
    rest = checkpoint.load(path / REST)
    rest["files"][METADATA] = parts._sha256(path / METADATA)
    checkpoint.save(path / REST, rest)
    assert check_parts(path)["step"] == 1
    with pytest.raises(CheckpointError, match=r"metadata name posix.system, which no checkpoint of metapl has"):
        load_parts(path)
    assert not (tmp_path / "harm").exists()
