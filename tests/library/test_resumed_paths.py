"""Long paths in a folder, whose process is killed: the same call goes on, and gives what it would have given."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metapl
from metapl import Lookahead, MetaplError
from metapl.feedback import Forward
from metapl.functional import training
from metapl.problems import EqualWeights, ExampleWeights, Table
from metapl.runs import atomic

STEPS = 30
Call = Callable[[str | None, Callable[[], None]], dict[str, Any]]


def batch(number: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(number)
    return torch.randn(8, 6, generator=draw), torch.randint(0, 3, (8,), generator=draw)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def gradient(folder: str | None, read: Callable[[], None], **given: Any) -> dict[str, Any]:
    """The whole result of a path, and what it leaves behind."""
    torch.manual_seed(given.pop("seed", 0))
    student, teacher = given.pop("network", network)(), given.pop("teacher", lambda: None)()
    steps, dtype = given.pop("steps", STEPS), given.pop("dtype", None)
    options = {"keep_every": 7, **given.pop("mode", {})}

    def made(number: int) -> Any:
        read()
        return given_batch(number)

    given_batch = given.pop("batch", batch)
    generator = given.pop("generator", None)
    draws = torch.Generator().manual_seed(generator) if generator is not None else None
    backend = given.pop("backend", None)
    with torch.autocast("cpu", dtype, enabled=dtype is not None), pytest.MonkeyPatch.context() as patch:
        if backend is not None:
            patch.setattr(training, "backend_of", lambda device: {"backend": backend})
        found = metapl.hypergradient(
            teacher,
            student,
            outer=given.pop("outer", batch(-1)),
            inner=Lookahead(made, steps=steps, schedule=given.pop("schedule", None)),
            mode=Forward(**options, keep_on=folder),
            inner_optimizer=given.pop("optimizer", adam)(student),
            generator=draws,
            **{"problem": EqualWeights(), **given},
        )
    left = [torch.random.get_rng_state(), *([] if draws is None else [draws.get_state()])]
    fields = ("grads", "feedback", "inner_loss", "outer_loss", "student_params", "inner_state")
    return {name: getattr(found, name) for name in fields} | {"left": left}


def adam(student: nn.Module, first: int = 3) -> torch.optim.Optimizer:
    weights = [*student.parameters()]
    groups = [{"params": weights[:first]}, {"params": weights[first:], "lr": 0.02}]
    return torch.optim.AdamW(groups, lr=0.01, amsgrad=True)


def transform(_: nn.Module) -> Any:
    return pytest.importorskip("torchopt").adam(0.01)


def unlabeled(number: int) -> Tensor:
    return batch(number)[0]


CALLS: dict[str, Call] = {
    "plain": lambda *a: gradient(*a, schedule=lambda k: 1 - k / STEPS),
    "tree": lambda *a: gradient(*a, mode={"keep_every": None, "keep": "tree"}),
    "truncated": lambda *a: gradient(*a, mode={"truncate": 20}),
    "transform": lambda *a: gradient(*a, optimizer=transform),
    "teacher": lambda *a: gradient(
        *a,
        teacher=lambda: Table(torch.linspace(-1, 1, 8)),
        problem=ExampleWeights(),
        batch=lambda k: (*batch(k), torch.arange(8)),
        accumulate=2,
    ),
    "labels are drawn": lambda *a: gradient(
        *a, teacher=network, problem=metapl.PseudoLabels("hard"), batch=unlabeled, generator=3
    ),
    "clipped": lambda *a: gradient(*a, clip_norm=0.1),
    "sparse": lambda *a: gradient(
        *a,
        network=lambda: nn.Sequential(nn.Embedding(3, 5, sparse=True), nn.Linear(5, 3)),
        optimizer=lambda student: torch.optim.SGD(student.parameters(), lr=0.1),
        batch=lambda k: (batch(k)[1],) * 2,
        outer=(batch(-1)[1],) * 2,
    ),
    "compiled": lambda *a: gradient(*a, clip_norm=0.1, compile=True, backend="aot_eager"),
    "by Inductor": lambda *a: gradient(*a, compile=True),
}
# The number of a batch that is read, or of a file that is about to get its name, at which the process is killed.
PLACES = {
    "before anything is kept": ("read", 5),
    "in the run forward": ("read", 20),
    "at the last step": ("read", STEPS + 2),
    "in the way back": ("read", STEPS + 19),
    "at a file of the run forward": ("file", 6),
    "at a file of the way back": ("file", 14),
    "in the teacher's gradient": ("read", 2 * STEPS + 11),
}


def killed(case: str, folder: str, kind: str, number: int) -> None:
    """The call, in a process that kills itself at some place."""
    count = itertools.count(1)

    def come() -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    replace = os.replace
    if kind == "file":
        atomic.os.replace = lambda *names: (come(), replace(*names))[1]  # type: ignore[attr-defined, func-returns-value]
    CALLS[case](folder, come if kind == "read" else lambda: None)


def run_killed(case: str, folder: Path, kind: str, number: int) -> None:
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(case, str(folder), kind, number))
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL, f"{kind} {number} was not reached"


def same(a: Any, b: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize(
    ("case", "place"),
    [("teacher", "in the teacher's gradient")]
    + [
        pytest.param(*case, marks=pytest.mark.long)
        for case in (
            *(("plain", place) for place in ("before anything is kept", "at the last step", "in the way back")),
            ("plain", "in the run forward"),
            *(("plain", f"at a file of the {part}") for part in ("run forward", "way back")),
            ("sparse", "in the way back"),
            *itertools.product(("tree", "truncated", "labels are drawn"), ("in the run forward", "in the way back")),
            *((case, "in the way back") for case in ("transform", "teacher", "clipped", "by Inductor")),
            *(("compiled", place) for place in ("in the run forward", "at a file of the way back")),
        )
    ],
)
def test_a_killed_path_goes_on_bit_for_bit(case: str, place: str, tmp_path: Path) -> None:
    whole, reads = itertools.count(), itertools.count()
    expected = CALLS[case](None, lambda: next(whole))  # type: ignore[arg-type, return-value]
    run_killed(case, tmp_path, *PLACES[place])
    found = CALLS[case](str(tmp_path), lambda: next(reads))  # type: ignore[arg-type, return-value]
    for name, value in expected.items():
        assert same(found[name], value), name
    assert {file.name for file in tmp_path.iterdir()} <= {".lock"}  # to remove a lock would race
    if place == "in the way back":
        assert next(reads) <= next(whole) - STEPS, "steps were taken again"


def test_a_compiled_path_that_is_stopped_twice_goes_on_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    for reads in (20, 14, 60):
        with pytest.raises(ZeroDivisionError):
            gradient(str(tmp_path), stopped_at(reads), compile=True)
    assert same(gradient(str(tmp_path), lambda: None, compile=True), gradient(None, lambda: None, compile=True))


OTHERS: dict[str, dict[str, Any]] = {
    "weights": {"seed": 1},
    "rate": {"optimizer": lambda s: torch.optim.SGD(s.parameters(), lr=0.2)},
    "param groups": {"optimizer": lambda s: adam(s, first=2)},
    "schedule": {"schedule": lambda k: 0.5},
    "clip": {"clip_norm": 0.5},
    "mode": {"mode": {"keep_every": 6}},
    "batches": {"batch": lambda k: batch(k + 1)},
    "autocast": {"dtype": torch.bfloat16},
    "generator": {"generator": 0},
}


def test_the_folder_of_another_path_is_refused_and_left(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        gradient(str(tmp_path), stopped_at(20))
    there = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for case, other in OTHERS.items():
        with pytest.raises(MetaplError):
            gradient(str(tmp_path), lambda: None, **other)
        assert there == {file.name: file.read_bytes() for file in tmp_path.iterdir()}, case
    assert same(gradient(str(tmp_path), lambda: None), gradient(None, lambda: None))


def stopped_at(number: int) -> Callable[[], None]:
    count = itertools.count(1)
    return lambda: 1 / (number - next(count)) and None  # type: ignore[func-returns-value]


def test_a_full_disk_leaves_what_was_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = itertools.count(1)
    sync = os.fsync

    def full(descriptor: int) -> None:
        if next(files) == 12:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(MetaplError):
        gradient(str(tmp_path), lambda: None)
    monkeypatch.undo()
    reads = itertools.count()
    found = gradient(str(tmp_path), lambda: next(reads))  # type: ignore[arg-type, return-value]
    assert same(found, gradient(None, lambda: None))
    assert next(reads) < 2 * STEPS
