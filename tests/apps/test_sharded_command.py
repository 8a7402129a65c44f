"""Networks in several processes: the same numbers as one process with the whole batch, every mode, every layout."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import command_cases
import pytest
import sharded_cases
from ranks import Ranks


@cache
def alone(**case: Any) -> dict[str, Any]:
    """The same in this process, with the whole batch."""
    return sharded_cases.train(**case)


# ------------------------------------------------------------------------------------------------ fits and the command


def as_if_killed(run: Path, copy: Path) -> Path:
    """A finished run as it was after its second step."""
    shutil.copytree(run, copy)
    for path in [*copy.glob("*.safetensors"), *copy.glob("*.png"), copy / "result.json"]:
        path.unlink()
    shutil.rmtree(copy / "checkpoints" / "finetune")
    newest = max((copy / "checkpoints" / "fit").iterdir())
    if newest.name != "step-00000002.parts":
        shutil.rmtree(newest)
    assert [path.name for path in (copy / "checkpoints" / "fit").iterdir()] == ["step-00000002.parts"]
    return copy


def test_the_command_trains_in_several_processes(tmp_path: Path) -> None:
    run = ["train", "digits", "--steps", "3", "--finetune-steps", "2", "--hidden", "8", "--validate-every", "2"]
    run += [
        "--log-every",
        "1",
        "--labeled-batch",
        "8",
        "--unlabeled-batch",
        "8",
        "--student.lr",
        "0.1",
        "--save-every",
        "2",
    ]
    meshes = {"replicate": ["--mesh.replicate", "2"], "shard": ["--mesh.shard", "2"], "none": []}
    ranks = Ranks(2, "command_cases", joined=False)
    try:
        said = {
            name: ranks.run("command", arguments=[*run, *flags, "--out", f"{tmp_path}/{name}"])
            for name, flags in meshes.items()
        }
        again = as_if_killed(tmp_path / "shard", tmp_path / "again")
        for _ in range(2):  # the second time, the run is finished
            gone_on = ranks.run("command", arguments=[*run, *meshes["shard"], "--out", str(again), "--resume"])
            assert [code for code, _, _ in gone_on] == [0, 0]
    finally:
        ranks.close()
    assert command_cases.command([*run, "--out", f"{tmp_path}/one"])[0] == 0
    alone = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    for name in ("replicate", "shard"):
        assert (said[name][0][0], said[name][1]) == (0, (0, "", ""))  # the first process alone shows
        assert "Test accuracy" in said[name][0][1]
        together = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for row, other in zip(alone, together, strict=True):
            assert row["phase"] == other["phase"]
            if row["phase"] == "fit":
                numbers = ({k: v for k, v in r.items() if k != "phase"} for r in (row, other))
                assert next(numbers) == pytest.approx(next(numbers), rel=1e-3, abs=1e-6, nan_ok=True)
    for name in ("student.safetensors", "finetuned_student.safetensors", "teacher.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "shard" / name).read_bytes()
    assert said["none"][0][0] == said["none"][1][0] == 2
    assert "2 processes were started, and no mesh says what each of them does" in " ".join(said["none"][0][2].split())
    assert said["none"][1][2] == ""
