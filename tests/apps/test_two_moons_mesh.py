"""``torchrun -m metapl train two-moons``: processes share the runs of the seeds, and end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from moons_cases import command
from ranks import Ranks

from metapl.apps.experiments.two_moons import seeds_of

pytestmark = pytest.mark.usefixtures("full_pages")

SMALL = "--points 60 --steps 150 --init-scale 0.9 --student-lr 0.5 --teacher-lr 0.5 --labels-per-class 2"
RUN = ["train", "two-moons", *SMALL.split(), "--seeds", "0-4", "--controls"]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, "moons_cases", joined=False)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    code, _, err = command([*RUN, "--out", str(out)])
    assert code == 0, err
    return out


def told(run: Path) -> Any:
    return json.loads((run / "result.json").read_text())


@pytest.mark.parametrize("kind", ["replicate", pytest.param("shard", marks=pytest.mark.long)])
def test_processes_share_the_runs(two: Ranks, alone: Path, tmp_path: Path, kind: str) -> None:
    """Two and three of five; the first process shows and writes what one process does."""
    out = tmp_path / "run"
    (code, said, err), beside = two.run("command", arguments=[*RUN, f"--mesh.{kind}", "2", "--out", str(out)])
    assert code == 0, err
    assert beside == (0, "", "")
    assert told(out) == told(alone)
    assert len({tuple(one["accuracy"]) for one in told(out)["methods"].values()}) > 1
    assert (out / "two_moons.png").read_bytes() == (alone / "two_moons.png").read_bytes()
    assert (out / "recipe.json").read_bytes() == (alone / "recipe.json").read_bytes()
    assert "median run" in said


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_seed_has_one_process_and_every_process_a_seed(processes: int) -> None:
    seeds = (3, 1, 4, 5, 9)
    shares = [seeds_of(seeds, number, processes) for number in range(processes)]
    assert [seed for share in shares for seed in share] == [*seeds]
    sizes = [len(share) for share in shares]
    assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--mesh.tensor", "2"], "none of them is cut; give --mesh.replicate 2, by which 2 processes share the runs"),
        (["--mesh.spatial", "2"], "--mesh.spatial 2: two-moons trains networks of a few dozen weights on points"),
        (["--mesh.replicate", "2", "--seeds", "7"], "--seeds 7: 1 run for 2 processes; expected one or more for each"),
        ([], "2 processes were started, and no mesh says what each of them does; give --mesh.replicate 2"),
        (["--mesh.shard", "3"], "the mesh is of 3 processes"),
        (["--mesh.shard", "2", "--out", "{there}"], "holds a run already; give another --out"),
        (["--mesh.shard", "2", "--activation", "relu", "--teacher-lr", "1e30"], "lower learning rates"),
    ],
)
def test_what_does_not_run_is_said_once_and_nothing_is_left(
    two: Ranks, alone: Path, tmp_path: Path, arguments: list[str], text: str
) -> None:
    given = [*RUN, "--out", str(tmp_path / "run"), *(word.format(there=alone) for word in arguments)]
    (code, _, err), beside = two.run("command", arguments=given)
    assert code == 2
    assert text in " ".join(err.split())
    assert beside == (2, "", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--out", "{there}"], ["--activation", "relu", "--teacher-lr", "1e30"]])
def test_processes_leave_when_the_first_has_said_why(two: Ranks, alone: Path, tmp_path: Path, flags: list[str]) -> None:
    """Whether it alone has found what is wrong, or all of them."""
    given = [*RUN, "--mesh.replicate", "2", "--out", str(tmp_path), *(word.format(there=alone) for word in flags)]
    (first, said, _), (beside, _, left) = two.run("slowly_refused", arguments=given)
    assert first[0] == 2
    assert first[2].count("metapl: ") == 1
    assert "stopped" not in first[2]
    assert beside == (2, "", "")
    assert 0 < said < left


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_stopped_stops_all(two: Ranks, tmp_path: Path, rank: int) -> None:
    given = [*RUN, "--mesh.replicate", "2", "--out", str(tmp_path / "run")]
    first, beside = two.run("failing", arguments=given, rank=rank, how="stops")
    assert first[0] == beside[0] == 143
    assert first[2].count("stopped; nothing was kept, and such a run is not resumed: start it again.") == 1
    assert beside[1:] == ("", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all_with_its_message_once(two: Ranks, tmp_path: Path, rank: int) -> None:
    given = [*RUN, "--mesh.replicate", "2", "--out", str(tmp_path / "run")]
    found = two.run("failing", arguments=given, rank=rank, how="refuses")
    assert [code for code, _, _ in found] == [2, 2]
    assert sum("the third" in err for _, _, err in found) == 1
    assert "another process" not in found[0][2] + found[1][2]
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_torchrun(alone: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "metapl"]
    given = ["--mesh.replicate", "3", "--out", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*torchrun, *RUN, *given], capture_output=True, text=True, timeout=200, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert told(tmp_path / "run") == told(alone)
