"""What is written comes back; what is not whole is refused by name; the last whole one is never lost."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from metapl.errors import MetaplError
from metapl.runs import checkpoint, generators
from metapl.runs.checkpoint import CheckpointError, CheckpointFolder, load, save

HEADER = checkpoint._HEADER_BYTES


def some_state() -> dict[str, Any]:
    return {
        "model": torch.nn.Linear(3, 2).state_dict(),
        "step": 7,
        "numbers": [1, -2.5, True, 2**130, 1j, float("inf")],
        "words": ("é", b"\x00\xff", None, ()),
        3: {("a", 1): torch.arange(4, dtype=torch.bfloat16), "empty": torch.empty(0)},
        "flags": OrderedDict(shape=torch.Size([2, 3]), dtype=torch.float16),
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) and type(left) is type(right)


# Round trips


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    state = some_state()
    save(tmp_path / "one.ckpt", state)
    assert same(load(tmp_path / "one.ckpt"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["one.ckpt"]


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    tied = torch.ones(3)
    save(tmp_path / "one.ckpt", {"a": tied, "b": tied[:2]})
    loaded = load(tmp_path / "one.ckpt")
    loaded["a"][0] = 5.0
    assert loaded["b"][0] == 5.0


def test_optimizer_state_and_graph_tensors(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    (weight * 2).sum().backward()
    optimizer.step()
    save(tmp_path / "one.ckpt", {"optimizer": optimizer.state_dict(), "in_graph": weight * 2})
    optimizer.load_state_dict(load(tmp_path / "one.ckpt")["optimizer"])


def test_a_newer_file_replaces_by_rename_never_in_place(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    save(path, {"step": 1})
    with open(path, "rb") as still_open:
        save(path, {"step": 2})
        assert len(still_open.read()) > HEADER
    assert load(path) == {"step": 2}


def test_the_file_honours_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        save(tmp_path / "one.ckpt", {})
    finally:
        os.umask(old)
    assert (tmp_path / "one.ckpt").stat().st_mode & 0o777 == 0o644


# What cannot be saved


Pair = namedtuple("Pair", "left right")
LOOP: list[Any] = []
LOOP.append(LOOP)


class SubclassedTensor(torch.Tensor):
    """Stands for DTensor and its like."""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (numpy.float64(1.0), r"state\['a'\]\[0\] is a numpy.float64.*\.item\(\)"),
        (numpy.zeros(2), r"numpy.ndarray.*torch.as_tensor"),
        (Pair(1, 2), r"Pair.*named tuple"),
        ({1, 2}, r"is a set"),
        (torch.nn.Linear(1, 1), r"Linear"),
        (torch.zeros(2, device="meta"), r"meta device"),
        (torch.zeros(2).as_subclass(SubclassedTensor), r"plain tensor"),
        ({Pair(1, 2): 0}, r"has the key Pair"),
        (LOOP, r"contains itself"),
        (open, r"builtin_function"),
    ],
)
def test_what_load_could_not_bring_back_is_refused_before_writing(tmp_path: Path, value: Any, text: str) -> None:
    with pytest.raises(MetaplError, match=text):
        save(tmp_path / "one.ckpt", {"a": [value]})
    assert not list(tmp_path.iterdir())


def test_a_state_is_a_dict(tmp_path: Path) -> None:
    with pytest.raises(MetaplError, match="a list was given"):
        save(tmp_path / "one.ckpt", [])  # type: ignore[arg-type]  # the fault under test


# Corruption


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def flipped(position: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 0x02
        path.write_bytes(data)

    return flip


def cut(length: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:length]) and None


def filled(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def with_header(version: int, payload: bytes) -> Callable[[Path], None]:
    import hashlib

    return filled(checkpoint._header(len(payload), hashlib.sha256(payload).hexdigest(), version) + payload)


def into_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def sealed_torch_file(content: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(content, path)
        with_header(1, path.read_bytes())(path)

    return write


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (filled(b""), "is empty"),
    "cut within the magic": (cut(9), "is truncated: it ends within its first line"),
    "cut within the header": (cut(60), "is truncated: it ends within its first line"),
    "cut after the header": (cut(HEADER), r"is truncated: 0 of \d+ bytes"),
    "cut in the payload": (cut(HEADER + 700), r"is truncated: 700 of \d+ bytes"),
    "last byte lost": (cut(-1), r"is truncated: \d+ of \d+ bytes"),
    "bytes added": (lambda path: path.write_bytes(path.read_bytes() + b"xy"), "is damaged: 2 bytes follow its end"),
    "flipped in the magic": (flipped(3), "is damaged in its first line"),
    "flipped in the version": (flipped(21), "is damaged in its first line"),
    "flipped in the length": (flipped(40), "is damaged in its first line"),
    "flipped in the checksum": (flipped(60), "is damaged in its first line"),
    "flipped in the header's end": (flipped(HEADER - 1), "is damaged in its first line"),
    "flipped at the payload's start": (flipped(HEADER), "is damaged: its .* another checksum"),
    "flipped in the payload": (flipped(HEADER + 500), "is damaged: its .* another checksum"),
    "flipped at the end": (flipped(-1), "is damaged: its .* another checksum"),
    "zeros after a power cut": (filled(b"\0" * 4096), "begins with zeros, as after a power cut"),
    "foreign zip": (into_zip, "not a checkpoint of metapl but a zip file"),
    "plain torch file": (lambda path: torch.save({"a": 1}, path), r"a zip file, perhaps one of torch\.save"),
    "pickle with code": (filled(pickle.dumps(RunsCode())), "not a checkpoint of metapl but a pickle"),
    "sealed code": (sealed_torch_file({"a": RunsCode()}), "runs no code from a file"),
    "sealed list": (sealed_torch_file([1]), "holds a list instead of a dict"),
    "sealed garbage": (with_header(1, b"garbage" * 9), "holds objects other than|could not rebuild it"),
    "text": (filled("größer\n".encode() * 40), "not a checkpoint of metapl but text, beginning with 'größer"),
    "short text": (filled(b"hi"), "but text, beginning with 'hi'"),
    "other binary": (filled(b"\x89PNG\r\n\x1a\n" + b"\0" * 300), "but another file, beginning with"),
    "wrong magic": (lambda path: path.write_bytes(b"someone-elses-ckp 9\n" + bytes(200)), "not a checkpoint of metapl"),
    "a later format": (with_header(3, b"anything"), "written by format 3, this metapl reads up to 1; upgrade metapl"),
    "a later format of another shape": (
        filled(b"metapl-checkpoint 12 new things\n" + bytes(300)),
        "written by format 12, this metapl reads up to 1; upgrade metapl",
    ),
    "folder": (into_folder, r"is a folder; .*CheckpointFolder"),
    "pipe": (into_pipe, "could not be read: it is a pipe, expected a plain file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_the_newest_whole_one_is_used(tmp_path: Path, fault: str) -> None:
    spoil, text = FAULTS[fault]
    checkpoints = CheckpointFolder(tmp_path)
    whole = checkpoints.write(10, {"step": 10})
    spoiled = checkpoints.write(20, some_state())
    spoil(spoiled)
    with pytest.raises(CheckpointError, match=text) as refusal:
        load(spoiled)
    assert str(refusal.value).startswith(str(spoiled))
    if fault.startswith("a later format"):  # it may be whole: what it holds is not written over
        with pytest.raises(CheckpointError, match=text):
            checkpoints.newest()
        return
    found = checkpoints.newest()
    assert found is not None
    assert (found.path, found.state) == (whole, {"step": 10})
    assert [(one.path, one.reason) for one in found.skipped] == [(spoiled, str(refusal.value))]


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    save(path, {"step": 1})
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        with pytest.raises(CheckpointError):
            load(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"is truncated|is empty"):
            load(path)


def test_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "none.ckpt", tmp_path / "no" / "none.ckpt"):
        with pytest.raises(CheckpointError, match="does not exist"):
            load(path)


def test_unreadable(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.write(1, {"step": 1})
    path = folder.write(2, {"step": 2})
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # root reads everything, so the test steps down to nobody
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=r"may not be read by this user.*chmod"):
            load(path)
        # The folder itself may be closed to that user.
        with pytest.raises(CheckpointError, match=r"may not be read by this user.*chmod|cannot be listed"):
            folder.newest()
    finally:
        if root:
            os.seteuid(0)


def test_a_device_that_is_not_there_is_not_called_damage(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA is there")
    save(tmp_path / "one.ckpt", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"is whole, but .* on cuda: .*map_location='cpu'"):
        load(tmp_path / "one.ckpt", map_location="cuda")


# The folder


def test_the_oldest_go_after_the_newest_is_whole(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path / "new" / "folder", keep=2)
    assert checkpoints.newest() is None
    for step in (0, 5, 123_456_789):
        checkpoints.write(step, {"step": step})
    assert [path.name for path in checkpoints.paths()] == ["step-123456789.ckpt", "step-00000005.ckpt"]


def test_a_failed_write_deletes_nothing(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    checkpoints.write(1, {"step": 1})
    with pytest.raises(MetaplError):
        checkpoints.write(2, {"step": object()})
    assert checkpoints.newest() == checkpoint.Found(tmp_path / "step-00000001.ckpt", {"step": 1})


def test_a_damaged_later_one_does_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    checkpoints.write(30, {"step": 30}).write_bytes(b"")
    checkpoints.write(20, {"step": 20})
    found = checkpoints.newest()
    assert found is not None
    assert found.state == {"step": 20}
    checkpoints.write(30, {"step": "30 again"})
    found = checkpoints.newest()
    assert found is not None
    assert (found.state, found.skipped) == ({"step": "30 again"}, ())


def test_when_none_is_whole_it_says_so_rather_than_starting_anew(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    for step in (1, 2):
        checkpoints.write(step, {}).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 checkpoint\(s\) and none can be used; to start anew, move them away"):
        checkpoints.newest()


def test_strays_are_ignored_and_cleaned_and_other_files_left(tmp_path: Path) -> None:
    stray = tmp_path / "step-00000003.ckpt.0a1b2c3d.tmp"
    mine = tmp_path / "notes.tmp"
    for path in (stray, mine):
        path.write_bytes(b"half")
    checkpoints = CheckpointFolder(tmp_path)
    assert checkpoints.newest() is None
    checkpoints.write(4, {})
    assert not stray.exists()
    assert mine.exists()


@pytest.mark.parametrize(("keep", "step"), [(0, 1), (-1, 1), (1, -1)])
def test_bad_numbers(tmp_path: Path, keep: int, step: int) -> None:
    with pytest.raises(MetaplError):
        CheckpointFolder(tmp_path, keep=keep).write(step, {})


# When writing fails


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No such file or directory.*Create the folder first"):
        save(tmp_path / "no" / "one.ckpt", {})


def test_a_name_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "one.ckpt").mkdir()
    with pytest.raises(CheckpointError, match="A folder has that name"):
        save(tmp_path / "one.ckpt", {})
    assert [path.name for path in tmp_path.iterdir()] == ["one.ckpt"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="could not be written"):
        CheckpointFolder(tmp_path / "file").write(1, {})


def test_a_disk_that_fails_at_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "one.ckpt", {"step": 1})

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        CheckpointError, match=r"No space left.*it needs .*are free.*one.ckpt, is whole.*Free some room"
    ):
        save(tmp_path / "one.ckpt", {"step": 2})
    assert load(tmp_path / "one.ckpt") == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_within_the_writer_stays_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, data: bytes) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint._Sealed, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "one.ckpt", {"a": torch.ones(9)})
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, sys, torch
from metapl.runs.checkpoint import CheckpointFolder, CheckpointError
folder = CheckpointFolder(sys.argv[1])
folder.write(1, {"step": 1})
for limit in (10, 117, 118, 2000, 100_000, 8_000_100):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        folder.write(2, {"step": 2, "weights": torch.ones(2_000_000)})
    except CheckpointError as error:
        message = str(error)
        assert "File too large (it needs 8.0 MB, " in message, message
        assert message.count("step-00000001.ckpt, is whole. Raise the limit") == 1, message
    else:
        raise SystemExit(f"{limit} bytes held it all")
    assert [path.name for path in folder.folder.iterdir()] == ["step-00000001.ckpt"]
assert folder.newest().state == {"step": 1}
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
folder.write(2, {"step": 2})
"""


def test_a_full_disk_leaves_the_old_one_whole_and_says_so(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    found = CheckpointFolder(tmp_path).newest()
    assert found is not None
    assert found.state == {"step": 2}


WRITER = """
import itertools, os, random, signal, sys, time, torch
from metapl.runs.checkpoint import CheckpointFolder
torch.set_num_threads(1)  # a pool of threads does not outlive a fork
folder = CheckpointFolder(sys.argv[1], keep=2)
folder.write(1, {"step": 1, "weights": torch.full((2_000_000,), 1.0)})
draw, strays = random.Random(0), 0
for _ in range(12):
    start = folder.newest().state["step"]
    child = os.fork()
    if child == 0:
        for step in itertools.count(start + 1):
            folder.write(step, {"step": step, "weights": torch.full((2_000_000,), float(step))})
    deadline = time.monotonic() + 60
    while folder.paths()[0].name <= f"step-{start:08d}.ckpt":
        assert time.monotonic() < deadline, "the child writes nothing"
        time.sleep(0.002)
    time.sleep(draw.uniform(0.0, 0.08))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    strays += any(name.endswith(".tmp") for name in os.listdir(sys.argv[1]))
    found = folder.newest()
    assert found.skipped == () and found.state["step"] >= start
    assert (found.state["weights"] == found.state["step"]).all()
assert 1 <= len(folder.paths()) <= 3
print(strays)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_kill_at_any_moment_leaves_a_whole_newest(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert int(run.stdout) > 0, "no kill fell into the writing, so nothing was tested"


# Random number generators


def draws() -> tuple[Any, ...]:
    numpy_draw = numpy.random.standard_normal()  # noqa: NPY002 - the global generator is under test
    cuda = tuple(torch.rand(1, device=f"cuda:{index}").item() for index in range(torch.cuda.device_count()))
    return random.random(), random.gauss(), numpy_draw, torch.rand(1).item(), cuda


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    draws()  # leaves half a pair of Gaussian numbers waiting, in Python and in numpy
    save(tmp_path / "one.ckpt", {"rng": generators.rng_state()})
    expected = draws()
    draws()
    generators.set_rng_state(load(tmp_path / "one.ckpt")["rng"])
    assert draws() == expected


def test_a_wrong_rng_state_changes_nothing() -> None:
    good = generators.rng_state()
    for bad in ({}, {**good, "torch": torch.zeros(3, dtype=torch.uint8)}, {**good, "numpy": {}}, {**good, "python": 3}):
        with pytest.raises(MetaplError, match="rng_state"):
            generators.set_rng_state(bad)
    assert same(generators.rng_state(), good)


def test_another_number_of_cuda_devices_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    state = generators.rng_state()
    state["cuda"] = [*state["cuda"], torch.zeros(16, dtype=torch.uint8)]
    generators.set_rng_state(state)
    (message,) = caplog.messages
    present = len(state["cuda"]) - 1
    assert f"of {present + 1} CUDA device(s) were saved and {present} are present" in message
