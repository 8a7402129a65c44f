"""What is written comes back; what is not whole is refused by name; the last whole one is never lost."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from metapl.errors import MetaplError
from metapl.runs import checkpoint, generators
from metapl.runs.checkpoint import CheckpointError, CheckpointFolder, load, save

LINE = checkpoint._LINE_BYTES


def some_state() -> dict[str, Any]:
    return {
        "model": torch.nn.Linear(3, 2).state_dict(),
        "step": 7,
        "numbers": [1, -2.5, True, 2**130, -0.0, float("inf")],
        "words": ("é", b"\x00\xff", None, ()),
        3: {("a", 1): torch.arange(4, dtype=torch.bfloat16), "empty": torch.empty(0), "one": torch.tensor(True)},
        "complex": torch.tensor([1 + 2j, -1j], dtype=torch.complex128).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "strided": torch.arange(12.0).reshape(3, 4).t()[1:],
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        kinds = ((t.dtype, t.layout) for t in (left, right))
        return len({*kinds}) == 1 and torch.equal(left.to_dense(), right.to_dense())
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


def test_a_tensor_that_is_there_twice_is_kept_once(tmp_path: Path) -> None:
    tied = torch.ones(1000)
    save(tmp_path / "one.ckpt", {"a": tied, "b": tied, "c": tied[:2]})
    loaded = load(tmp_path / "one.ckpt")
    assert loaded["a"] is loaded["b"]
    assert torch.equal(loaded["c"], tied[:2])
    assert (tmp_path / "one.ckpt").stat().st_size < 5000


def test_the_versions_of_modules_come_back(tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).state_dict()
    save(tmp_path / "one.ckpt", {"model": state})
    loaded = load(tmp_path / "one.ckpt")["model"]
    assert same(loaded, state)
    assert loaded._metadata == state._metadata == {"": {"version": 1}, "0": {"version": 2}}


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
        assert len(still_open.read()) > LINE
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
        (numpy.float64(1.0), r"a/0 is a numpy.float64.*\.item\(\)"),
        (numpy.zeros(2), r"numpy.ndarray.*torch.as_tensor"),
        (Pair(1, 2), r"Pair.*named tuple"),
        ({1, 2}, r"is a set"),
        (torch.nn.Linear(1, 1), r"Linear"),
        (torch.zeros(2, device="meta"), r"meta device"),
        (torch.zeros(2).as_subclass(SubclassedTensor), r"full_tensor"),
        ({Pair(1, 2): 0}, r"has the key Pair"),
        (LOOP, r"contains itself"),
        (open, r"builtin_function"),
        (1j, r"is a complex"),
        (torch.eye(2).to_mkldnn(), r"plain tensors"),
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


def sealed(content: bytes, version: int = checkpoint.FORMAT) -> bytes:
    """Content with the first line of a checkpoint, as if metapl had written it."""
    begin = b"metapl-checkpoint %04d " % version
    return begin + hashlib.sha256(begin + content).hexdigest().encode() + b"\n" + content


def resealed(tree: str, tensors: str = "[]", data: bytes = b"") -> Callable[[Path], None]:
    return filled(sealed(f'{{"tensors": {tensors}, "tree": {tree}}}\n'.encode() + data))


def into_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


STRANGE = "is whole, but holds what no metapl wrote"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (filled(b""), "is empty"),
    "cut within the magic": (cut(9), "is not a checkpoint of metapl, or no more: it begins with b'metapl-ch'"),
    "cut within the first line": (cut(60), "is damaged or was cut"),
    "cut after the first line": (cut(LINE), "is damaged or was cut"),
    "cut in the tensors": (cut(-20), "is damaged or was cut"),
    "last byte lost": (cut(-1), "is damaged or was cut"),
    "bytes added": (lambda path: path.write_bytes(path.read_bytes() + b"xy"), "is damaged or was cut"),
    "flipped in the magic": (flipped(3), "is not a checkpoint of metapl, or no more"),
    "flipped in the format": (flipped(21), "is damaged or was cut"),
    "flipped in the checksum": (flipped(60), "is damaged or was cut"),
    "flipped in the tree": (flipped(LINE + 30), "is damaged or was cut"),
    "flipped at the end": (flipped(-1), "is damaged or was cut"),
    "zeros after a power cut": (filled(b"\0" * 4096), r"is not a checkpoint of metapl, or no more: .*\\x00"),
    "foreign zip": (into_zip, "is not a checkpoint of metapl"),
    "plain torch file": (lambda path: torch.save({"a": 1}, path), "is not a checkpoint of metapl"),
    "pickle with code": (filled(pickle.dumps(RunsCode())), "is not a checkpoint of metapl"),
    "text": (filled("größer\n".encode() * 40), "is not a checkpoint of metapl"),
    "wrong magic": (
        lambda path: path.write_bytes(b"someone-elses-ckp 9\n" + bytes(200)),
        "is not a checkpoint of metapl",
    ),
    "sealed pickle": (filled(sealed(pickle.dumps(RunsCode()))), STRANGE),
    "sealed garbage": (filled(sealed(b"garbage" * 9)), STRANGE),
    "sealed list": (resealed("[1]"), "holds a list instead of a dict"),
    "sealed without a tree": (filled(sealed(b'{"tensors": []}\n')), STRANGE),
    "a value of no known kind": (resealed('{"os.system": "exit 1"}'), STRANGE),
    "a tensor that is not there": (resealed('{"dict": [["a", {"tensor": 1}]]}'), STRANGE),
    "a tensor of no known type": (resealed('{"dict": []}', '[["load", [1]]]', b"1234"), STRANGE),
    "a tensor of a wrong size": (resealed('{"dict": []}', '[["float32", [2]]]', b"1234"), STRANGE),
    "a tensor of less than nothing": (resealed('{"dict": []}', '[["float32", [-1, -1]]]', b"1234"), STRANGE),
    "a tree without an end": (resealed("[" * 200_000), STRANGE),
    "format 1": (
        filled(b"metapl-checkpoint 0001 00000000000000000009 " + b"0" * 64 + b" 01234567\nanything"),
        "metapl 0.1.0",
    ),
    "a later format": (filled(sealed(b"anything", 3)), "written by format 3, which a later metapl reads"),
    "a later format of another shape": (
        filled(b"metapl-checkpoint 12 new things\n" + bytes(300)),
        "written by format 12, which a later metapl reads",
    ),
    "folder": (into_folder, r"could not be read: it is a folder"),
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
    if "format " in f"{fault} " and not fault.startswith(
        "flipped"
    ):  # it may be whole: what it holds is not written over
        with pytest.raises(CheckpointError, match=text):
            checkpoints.newest()
        return
    found = checkpoints.newest()
    assert found is not None
    assert (found.path, found.state) == (whole, {"step": 10})
    assert found.skipped == ((spoiled, str(refusal.value)),)


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
        with pytest.raises(CheckpointError, match=r"was cut|no more|is empty"):
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
    with pytest.raises(CheckpointError, match=r"No such file or directory.*choose another folder"):
        save(tmp_path / "no" / "one.ckpt", {})


def test_a_name_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "one.ckpt").mkdir()
    with pytest.raises(CheckpointError, match="could not be written: it is a folder"):
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
    with pytest.raises(CheckpointError, match=r"No space left.*it needs .*the checkpoints before it are as they were"):
        save(tmp_path / "one.ckpt", {"step": 2})
    assert load(tmp_path / "one.ckpt") == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_within_the_writer_stays_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(t: torch.Tensor) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_bytes_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "one.ckpt", {"a": torch.ones(9)})
    assert not list(tmp_path.iterdir())


def _on_a_full_disk(where: Path) -> None:
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    folder, unlimited = CheckpointFolder(where), (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    folder.write(1, {"step": 1})
    for limit in (10, 86, 87, 2000, 100_000, 8_000_100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match=r"File too large \(it needs 8\.0 MB\)") as caught:
            folder.write(2, {"step": 2, "weights": torch.ones(2_000_000)})
        assert "the checkpoints before it are as they were. Free some room, raise the limit" in str(caught.value)
        assert [path.name for path in folder.folder.iterdir()] == ["step-00000001.ckpt"]
    found = folder.newest()
    assert found is not None
    assert found.state == {"step": 1}
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    folder.write(2, {"step": 2})


def test_a_full_disk_leaves_the_old_one_whole_and_says_so(tmp_path: Path) -> None:
    """In a process of its own, whose files may not become long."""
    limited = multiprocessing.get_context("fork").Process(target=_on_a_full_disk, args=(tmp_path,))
    limited.start()
    limited.join(60)
    assert limited.exitcode == 0
    found = CheckpointFolder(tmp_path).newest()
    assert found is not None
    assert found.state == {"step": 2}


def _write_on(folder: CheckpointFolder, start: int) -> None:
    torch.set_num_threads(1)
    for step in itertools.count(start + 1):
        folder.write(step, {"step": step, "weights": torch.full((2_000_000,), float(step))})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_kill_at_any_moment_leaves_a_whole_newest(tmp_path: Path) -> None:
    folder, draw, strays = CheckpointFolder(tmp_path, keep=2), random.Random(0), 0
    folder.write(1, {"step": 1, "weights": torch.full((2_000_000,), 1.0)})
    start = 1
    for _ in range(12):
        child = multiprocessing.get_context("fork").Process(target=_write_on, args=(folder, start))
        child.start()
        deadline = time.monotonic() + 60
        while folder.paths()[0].name <= f"step-{start:08d}.ckpt":
            assert time.monotonic() < deadline, "the child writes nothing"
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.08))
        child.kill()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        strays += any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
        found = folder.newest()
        assert found is not None
        assert found.skipped == ()
        assert found.state["step"] >= start
        assert (found.state["weights"] == found.state["step"]).all()
        start = found.state["step"]
    assert 1 <= len(folder.paths()) <= 3
    assert strays > 0, "no kill fell into the writing, so nothing was tested"


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
