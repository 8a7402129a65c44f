"""``torchrun -m metapl``: two processes end on the numbers of one.

They go on when killed, are refused in a line; and how many cores and threads a process takes.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from command import edited, metapl
from ranks import Ranks
from safetensors.torch import load_file
from tiny_runs import TINY, color_folders, images_command

from metapl.labels.store import LabelStore, LabelWriter
from metapl.machine import default_threads
from metapl.pictures import scan_unlabeled
from metapl.processes import PATIENCE
from metapl.run_folder import WEIGHTS

SECONDS = 240.0


def command(arguments: list[str]) -> tuple[int, str, str]:
    """Return the exit code of the command on this rank, and what it showed."""
    done = metapl(*arguments, code=None)
    return done.returncode, done.stdout, done.stderr


def command_without_room_for_labels(arguments: list[str]) -> tuple[int, str, str]:
    """Return what :func:`command` does where the first process cannot write the labels."""
    full = OSError(errno.ENOSPC, "No space left on device", "labels/unlabeled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metapl.apps.train.write_all_labels", Mock(side_effect=full))
        return command(arguments)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, "test_ranks", joined=False)
    yield ranks
    ranks.close()


def trained(ranks: Ranks, words: list[str], out: Path) -> str:
    """Return what the first of the processes shows; the others show nothing."""
    said = ranks.run("command", arguments=[*words, "--out", str(out)])
    assert [code for code, _, _ in said] == [0, 0], said
    assert said[1][1:] == ("", "")
    return str(said[0][1])


def same_numbers(run: Path, other: Path, limit: float) -> None:
    """Check that the rows of every phase, and all weights, are the same but for rounding."""
    rows, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, other)
    )
    assert len(rows) == len(expected) > 0
    for row, wanted in zip(rows, expected, strict=True):
        assert (row.pop("phase"), row.pop("step")) == (wanted.pop("phase"), wanted.pop("step"))
        found = {name: value for name, value in row.items() if value is not None}
        assert found == pytest.approx(
            {k: v for k, v in wanted.items() if v is not None}, rel=10 * limit, abs=limit
        )
    assert {file.name for file in run.glob("*.safetensors")} == {
        file.name for file in other.glob("*.safetensors")
    }
    for file in run.glob("*.safetensors"):
        torch.testing.assert_close(
            load_file(file), load_file(other / file.name), rtol=0, atol=limit
        )


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["replicate", "shard"])
def test_digits_in_two_processes(mesh: str, two: Ranks, tiny: Path, tmp_path: Path) -> None:
    words = [*TINY, f"--mesh.{mesh}", "2"]
    assert "Test accuracy" in trained(two, words, tmp_path / "run")
    same_numbers(tmp_path / "run", tiny, 1e-5)
    left = Path(shutil.copytree(tmp_path / "run", tmp_path / "again"))  # as it was after 4 steps
    for path in [
        *left.glob("*.safetensors"),
        *left.glob("report.*"),
        left / "network.json",
        left / "result.json",
    ]:
        path.unlink()
    shutil.rmtree(left / "checkpoints" / "finetune")
    for path in (left / "checkpoints" / "fit").iterdir():
        if "00000004" not in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert [path.stem for path in (left / "checkpoints" / "fit").iterdir()] == ["step-00000004"]
    trained(two, [*words, "--resume"], left)
    for name in (*WEIGHTS.values(), "metrics.jsonl", "result.json"):
        assert (left / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    assert "is finished already" in trained(two, [*words, "--resume"], left)


@pytest.mark.long
def test_pictures_in_two_processes(two: Ranks, tmp_path: Path) -> None:
    """Batch norms see a share of the rows, as where one process takes each batch in two parts."""
    words = images_command(
        color_folders(tmp_path / "pictures"), "--method", "mpl", "--uda-align", "0"
    )
    metapl(*words, "--accumulate", "2", "--out", tmp_path / "one")
    trained(two, [*words, "--mesh.replicate", "2"], tmp_path / "two")
    same_numbers(tmp_path / "two", tmp_path / "one", 2e-3)


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["replicate", "shard"])
def test_stored_labels_in_two_processes(mesh: str, two: Ranks, tmp_path: Path) -> None:
    """Reduced MPL, whose small network has stored labels of both parts."""
    folders = color_folders(tmp_path / "pictures")
    words = images_command(folders, "--method", "reduced_mpl")
    for part, flag in (("labeled", "--labeled-labels"), ("unlabeled", "--labels")):
        files = scan_unlabeled(folders / part)
        p = torch.rand(len(files.names), 2, generator=torch.Generator().manual_seed(0)).softmax(1)
        with LabelWriter(
            tmp_path / part, ["blue", "red"], provenance={"pictures": str(files.root)}
        ) as writer:
            writer.add(sorted(files.names), p)
        words += [flag, str(tmp_path / part)]
    metapl(*words, "--accumulate", "2", "--out", tmp_path / "one")
    trained(two, [*words, f"--mesh.{mesh}", "2"], tmp_path / "two")
    same_numbers(tmp_path / "two", tmp_path / "one", 2e-3)


@pytest.mark.parametrize("mesh", ["replicate", pytest.param("shard", marks=pytest.mark.long)])
def test_reduced_mpl_whose_teacher_is_trained_first_in_two_processes(
    mesh: str, two: Ranks, tmp_path: Path
) -> None:
    """The first process stores the labels of the teacher that both trained, and both learn them."""
    words = [*TINY, "--method", "reduced_mpl"]
    metapl(*words, "--out", tmp_path / "one")
    trained(two, [*words, f"--mesh.{mesh}", "2"], tmp_path / "two")
    same_numbers(tmp_path / "two", tmp_path / "one", 1e-5)
    for part in ("labeled", "unlabeled"):
        one, both = (LabelStore(tmp_path / run / "labels" / part) for run in ("one", "two"))
        assert [*one] == [*both]
        every = torch.arange(len(one))
        torch.testing.assert_close(both.at(every), one.at(every), rtol=0, atol=1e-5)


@pytest.mark.long
def test_a_refusal_of_one_process_ends_both(two: Ranks, tiny: Path, tmp_path: Path) -> None:
    mesh = ["--mesh.shard", "2"]
    for words, word in (
        (["--out", str(tiny)], "holds a run already"),
        (
            ["--steps", "7", "--resume", "--out", str(tiny)],
            "takes 6 steps, and --steps 7 was given",
        ),
        (["--mode", "unrolled", "--out", str(tmp_path / "run")], "unrolled"),
    ):
        said = two.run("command", arguments=[*TINY, *mesh, *words])
        assert [code for code, _, _ in said] == [2, 2], said
        assert word in " ".join(said[0][2].split())


def test_an_error_in_the_first_process_while_it_labels_ends_the_others_at_once(
    two: Ranks, tmp_path: Path
) -> None:
    words = [*TINY, "--method", "reduced_mpl", "--mesh.replicate", "2"]
    arguments = [*words, "--out", str(tmp_path / "run")]
    started = time.monotonic()
    first, second = two.run("command_without_room_for_labels", arguments=arguments)
    assert time.monotonic() - started < PATIENCE.total_seconds()
    assert first[0] == 1, first
    assert first[2] == "metapl: labels/unlabeled: No space left on device.\n"
    assert second[0] == 2, second
    assert "the first process has failed: [Errno 28] No space left on device" in second[2]
    assert not (tmp_path / "run" / "result.json").exists()
    # The processes go on together.
    assert "Test accuracy" in trained(two, words, tmp_path / "again")


def test_changed_data_which_the_first_process_sees_end_the_others_at_once(
    two: Ranks, tmp_path: Path
) -> None:
    words = [*TINY, "--method", "supervised", "--mesh.replicate", "2"]
    run = tmp_path / "run"
    trained(two, words, run)
    (run / "result.json").unlink()
    edited(run / "data.json", "hash", labeled="another")
    started = time.monotonic()
    first, second = two.run("command", arguments=[*words, "--out", str(run), "--resume"])
    assert time.monotonic() - started < PATIENCE.total_seconds() / 4
    assert (first[0], second[0]) == (2, 2)
    assert "the data have changed since the run" in first[2]
    assert "the first process has failed: the data have changed" in second[2]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="kills as Linux has them")
def test_torchrun_starts_a_killed_process_again(two: Ranks, tmp_path: Path) -> None:
    words = [*TINY, "--mesh.shard", "2", "--save-every", "1", "--resume", "--dropout", "0.1"]
    trained(two, words, tmp_path / "whole")
    run = tmp_path / "run"
    started = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=3",
    ]
    started += ["-m", "metapl", *words, "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = subprocess.Popen(
        started, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + SECONDS
    while not list(run.glob("checkpoints/fit/*.parts")) and time.monotonic() < until:
        time.sleep(0.01)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    workers = [pid for pid in children if b"metapl" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = launcher.communicate(timeout=SECONDS)
    assert launcher.returncode == 0, err
    for name in WEIGHTS.values():
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_threads_are_as_many_as_the_cores_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    allowed = os.sched_getaffinity(0)
    assert default_threads() <= len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert default_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    monkeypatch.setattr("metapl.machine.cpu_count", lambda: 8)
    for given, expected in (("3", 3), ("4,2", 4), ("0", 8), ("many", 8), ("", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert default_threads() == expected
