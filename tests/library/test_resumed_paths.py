"""Long compiled paths in a folder, whose process is killed.

The same call goes on, and gives what it would have.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_long_paths
import torch
from feed_sources import same
from test_long_paths import batch, network
from torch import nn
from torch_versions import require_torch

import metapl
from metapl import Lookahead, MetaplError
from metapl.feedback import Forward
from metapl.feedback.keeping import path_number
from metapl.problems import EqualWeights, ExampleWeights, Table
from metapl.runs import folder as folders
from metapl.updates import update_of

STEPS = 30
# Of a folder, and of what is called before a batch is read.
Call = Callable[[str | None, Callable[[], object]], dict[str, Any]]


def gradient(
    folder: str | None,
    on_read: Callable[[], object],
    *,
    seed: int = 0,
    teacher: nn.Module | None = None,
    problem: Any = None,
    batch: Callable[[int], Any] = batch,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    settings: Any = None,
    clip_norm: float | None = None,
    mode: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = True,
    is_captured: bool = False,
) -> dict[str, Any]:
    """Return the whole result of a path, and the state of the generator that it leaves.

    Args:
        folder: where it keeps states; None: in memory.
        on_read: called before a batch is read.
        seed: of the student's weights.
        mode: options of ``Forward``.
        dtype: of autocast; None: without.
        is_captured: whether the graphs are compiled; else they run as plain functions.
    """
    student = network(seed)
    torch.manual_seed(0)

    def read(number: int) -> Any:
        on_read()
        return batch(number)

    with (
        torch.autocast("cpu", dtype, enabled=dtype is not None),
        pytest.MonkeyPatch.context() as patch,
    ):
        if not is_captured:
            patch.setattr(torch, "compile", lambda function, **options: function)
        result = metapl.hypergradient(
            teacher,
            student,
            outer=test_long_paths.batch(-1),
            inner=Lookahead(read, steps=STEPS, settings=settings),
            mode=Forward(**{"keep_every": 7, **(mode or {})}, keep_on=folder),
            inner_optimizer=(optimizer or adam)(student),
            problem=problem or EqualWeights(),
            clip_norm=clip_norm,
            compile=compile,
        )
    return {
        "grads": result.grads,
        "feedback": result.feedback,
        "inner_loss": result.inner_loss,
        "outer_loss": result.outer_loss,
        "student_params": result.student_params,
        "generator": torch.random.get_rng_state(),
    }


@cache
def plain() -> tuple[dict[str, Any], int]:
    """Return the path in one go, without a folder, and how many batches it reads."""
    reads = itertools.count()
    result = gradient(None, lambda: next(reads))
    return result, next(reads)


def adam(student: nn.Module, first: int = 3) -> torch.optim.Optimizer:
    weights = [*student.parameters()]
    groups = [{"params": weights[:first]}, {"params": weights[first:], "lr": 0.02}]
    return torch.optim.AdamW(groups, lr=0.01, amsgrad=True)


# The rates of both param groups of `adam`, halved, and such as fall to 0 in a line.
RATES = torch.tensor([0.01, 0.02], dtype=torch.float64)
HALVED = 0.5 * RATES.expand(STEPS, 2)
FALLING = {"lr": RATES * (1 - torch.arange(STEPS, dtype=torch.float64)[:, None] / STEPS)}

CALLS: dict[str, Call] = {
    "plain": lambda *a: gradient(*a, settings=FALLING),
    "tree": lambda *a: gradient(*a, mode={"keep_every": None, "keep": "tree"}),
    "truncated": lambda *a: gradient(*a, mode={"truncate": 20}),
    "teacher": lambda *a: gradient(
        *a,
        teacher=Table(torch.linspace(-1, 1, 8)),
        problem=ExampleWeights(),
        batch=lambda k: (*batch(k), torch.arange(8)),
    ),
    "clipped": lambda *a: gradient(*a, clip_norm=0.1),
    "by Inductor": lambda *a: gradient(*a, is_captured=True),
}
# The number of a batch that is read, or of a file that is about to get its name, at which the
# process is killed.
PLACES = {
    "before anything is kept": ("read", 5),
    "in the run forward": ("read", 20),
    "at the last step": ("read", STEPS + 2),
    "in the way back": ("read", STEPS + 19),
    "at a file of the run forward": ("file", 6),
    "at a file of the way back": ("file", 14),
}


def killed(case: str, folder: str, kind: str, number: int) -> None:
    """Call in a process that kills itself at some place."""
    count = itertools.count(1)
    replace = os.replace

    def pass_place() -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_or_die(source: str, target: str) -> None:
        pass_place()
        replace(source, target)

    if kind == "file":
        folders.os.replace = replace_or_die  # type: ignore[attr-defined, assignment]
    CALLS[case](folder, pass_place if kind == "read" else nothing)


def nothing() -> None:
    """Do nothing before a batch is read."""


@pytest.mark.parametrize(
    ("case", "place"),
    [("teacher", "in the run forward")]
    + [
        pytest.param(*case, marks=pytest.mark.long)
        for case in (
            *(("plain", place) for place in PLACES),
            *itertools.product(("tree", "truncated"), ("in the run forward", "in the way back")),
            *((case, "in the way back") for case in ("teacher", "clipped", "by Inductor")),
        )
    ],
)
def test_a_killed_path_goes_on_bit_for_bit(case: str, place: str, tmp_path: Path) -> None:
    if case == "by Inductor":
        require_torch("2.12", "Inductor has the masks of dropout behind a batch norm")
    reads_in_one_go = itertools.count()
    reads = itertools.count()
    expected = CALLS[case](None, lambda: next(reads_in_one_go))
    # Inductor has workers of its own.
    processes = multiprocessing.get_context("spawn" if case == "by Inductor" else "fork")
    process = processes.Process(target=killed, args=(case, str(tmp_path), *PLACES[place]))
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL, f"{place} was not reached"
    result = CALLS[case](str(tmp_path), lambda: next(reads))
    for name, value in expected.items():
        assert same(result[name], value), name
    # To remove a lock would race.
    assert {file.name for file in tmp_path.iterdir()} <= {".lock"}
    if place == "in the way back":
        assert next(reads) < next(reads_in_one_go) - STEPS // 2, "steps were taken again"


def test_a_path_that_is_stopped_twice_goes_on_bit_for_bit(tmp_path: Path) -> None:
    for reads in (20, 14, 60):
        with pytest.raises(ZeroDivisionError):
            gradient(str(tmp_path), stopped_at(reads))
    assert same(gradient(str(tmp_path), nothing), plain()[0])


# What the call was given that was killed, where that is not the plain one.
OTHERS: dict[str, dict[str, Any]] = {
    "weights": {"seed": 1},
    "rate": {"optimizer": lambda s: torch.optim.SGD(s.parameters(), lr=0.2)},
    "param groups": {"optimizer": lambda s: adam(s, first=2)},
    "settings": {"settings": {"lr": HALVED}},
    "clip": {"clip_norm": 0.5},
    "mode": {"mode": {"keep_every": 6}},
    "batches": {"batch": lambda k: batch(k + 1)},
    "autocast": {"dtype": torch.bfloat16},
    "without compile": {"compile": False},
}


def test_the_folder_of_another_path_is_refused_and_left(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        gradient(str(tmp_path), stopped_at(20))
    files_before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for case, options in OTHERS.items():
        with pytest.raises(MetaplError):
            gradient(str(tmp_path), nothing, **options)
        assert files_before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}, case
    assert same(gradient(str(tmp_path), nothing), plain()[0])


def stopped_at(number: int) -> Callable[[], object]:
    """Return what fails before the batch of this number is read, counted from 1."""
    count = itertools.count(1)
    return lambda: 1 / (number - next(count))


def test_a_full_disk_leaves_what_was_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = itertools.count(1)
    sync = os.fsync

    def sync_on_full_disk(descriptor: int) -> None:
        if next(files) == 12:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(folders.os, "fsync", sync_on_full_disk)
    with pytest.raises(MetaplError):
        gradient(str(tmp_path), nothing)
    monkeypatch.undo()
    reads = itertools.count()
    assert same(gradient(str(tmp_path), lambda: next(reads)), plain()[0])
    assert next(reads) < plain()[1]


def test_a_path_is_path_number_the_whole_tensors_of_its_problem() -> None:
    """Two that read alike in four digits have two numbers."""
    student = network()
    numbers = set()
    rule = torch.optim.SGD(student.parameters(), lr=0.1)
    update = update_of(rule, dict(student.named_parameters()))
    for weight in (1.00001, 1.00003):
        problem = EqualWeights()
        object.__setattr__(problem, "weights", torch.tensor([weight]))
        numbers.add(path_number(student, nn.Module(), problem, Forward(), update, rule, []))
    assert len(numbers) == 2
