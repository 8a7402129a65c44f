"""Long paths in a folder, whose process is killed: the same call goes on, and gives what it would have given."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import context
from torch import Tensor, nn

import metapl
from metapl import Lookahead, MetaplError
from metapl.feedback import Forward, resuming
from metapl.problems import EqualWeights, ExampleWeights, Table
from metapl.runs import atomic

STEPS = 30
Call = Callable[[str | None, Callable[[], None]], dict[str, Any]]


def batch(number: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(number)
    return torch.randn(8, 6, generator=draw), torch.randint(0, 3, (8,), generator=draw)


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def network(scale: float = 1.0) -> nn.Module:
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    return nn.Sequential(*layers, Scaled(scale))


def gradient(folder: str | None, read: Callable[[], None], **given: Any) -> dict[str, Any]:
    """The whole result of a path, and what it leaves behind."""
    torch.manual_seed(given.pop("seed", 0))
    student, teacher = given.pop("student", network)(given.pop("scale", 1.0)), given.pop("teacher", lambda: None)()
    if hook := given.pop("hook", None):
        student[2].register_forward_hook(hook)
    if hook := given.pop("pre_hook", None):
        student[2].register_forward_pre_hook(hook)
    steps, dtype = given.pop("steps", STEPS), given.pop("dtype", None)
    options = {"keep_every": 7, **given.pop("mode", {})}

    def made(number: int) -> Any:
        read()
        return given_batch(number)

    given_batch = given.pop("batch", batch)
    generator = given.pop("generator", None)
    draws = torch.Generator().manual_seed(generator) if generator is not None else None
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        found = metapl.hypergradient(
            teacher,
            student,
            outer=batch(-1),
            inner=Lookahead(made, steps=steps, schedule=given.pop("schedule", None)),
            mode=Forward(**options, keep_on=folder),
            inner_optimizer=given.pop("optimizer", adam)(student),
            generator=draws,
            **{"problem": EqualWeights(), **given},
        )
    left = [torch.random.get_rng_state(), *([] if draws is None else [draws.get_state()])]
    fields = ("grads", "feedback", "inner_loss", "outer_loss", "student_params", "inner_state")
    return {name: getattr(found, name) for name in fields} | {"left": left}


class Recurrent(nn.Module):
    """Whose GRU holds its weights in a list too."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x.unflatten(1, (3, 2)))[0][:, -1])


def attribution(folder: str | None, read: Callable[[], None]) -> dict[str, Any]:
    torch.manual_seed(0)
    student = network()

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 24

        def __getitem__(self, number: int) -> Any:
            if number == 0:
                read()
            return tuple(t[0] for t in batch(number))

    if folder is not None and [*Path(folder).iterdir()]:
        torch.rand(3)  # of a script that is not seeded
    mode = Forward(keep_on=folder)
    found = metapl.attribute(student, Rows(), batch(-1), optimizer=adam(student), steps=60, batch_size=8, mode=mode)
    validated = found.validate([[1], [2, 3], [4]]).retrained
    left = torch.random.get_rng_state()
    return {
        "scores": found.scores,
        "loss": found.outer_loss,
        "params": found.student_params,
        "retrained": validated,
    } | ({"left": left})


def adam(student: nn.Module, first: int = 3) -> torch.optim.Optimizer:
    weights = [*student.parameters()]
    groups = [{"params": weights[:first]}, {"params": weights[first:], "lr": 0.02}]
    return torch.optim.AdamW(groups, lr=0.01, amsgrad=True)


def recurrent(_: float) -> nn.Module:
    return Recurrent()


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
    "a list of weights": lambda *a: gradient(*a, student=recurrent, clip_norm=0.1),
    "attribution": attribution,
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
    process = context().Process(target=killed, args=(case, str(folder), kind, number))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, f"{kind} {number} was not reached"


def same(a: Any, b: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize(
    ("case", "place"),
    [("plain", place) for place in PLACES if place != "in the teacher's gradient"]
    + [("a list of weights", "in the way back"), ("teacher", "in the teacher's gradient")]
    + [("attribution", "at a file of the way back")]
    + [
        pytest.param(*case, marks=pytest.mark.long)
        for case in (
            *itertools.product(("tree", "truncated", "labels are drawn"), ("in the run forward", "in the way back")),
            *(("transform", "in the way back"), ("teacher", "in the way back")),
            ("attribution", "at a file of the run forward"),
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
    assert [file.name for file in tmp_path.iterdir()] == []
    if place == "in the way back":
        assert next(reads) <= next(whole) - STEPS, "steps were taken again"


def test_a_path_that_is_killed_again_and_again_ends(tmp_path: Path) -> None:
    expected = gradient(None, lambda: None)
    for _ in range(3):
        run_killed("plain", tmp_path, "read", 17)
    assert (tmp_path / "adjoint.ckpt").exists() or len([*tmp_path.glob("steps-*")]) > 2
    assert same(CALLS["plain"](str(tmp_path), lambda: None)["left"], expected["left"])


def twice(module: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
    return 2 * outputs


def halved(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0] / 2


def table() -> nn.Module:
    return Table(torch.linspace(-1, 1, 8))


def hooked() -> nn.Module:
    teacher = table()
    teacher.register_forward_hook(twice)
    return teacher


# What the call was given that was killed, where that is not the plain one.
TAUGHT: dict[str, Any] = {"problem": ExampleWeights(), "batch": lambda k: (*batch(k), torch.arange(8))}
KILLED: dict[str, dict[str, Any]] = {
    "another seed of the generator": {"generator": 0},
    "a hook of the teacher": {"teacher": table, **TAUGHT},
    "param groups behind a clip": {"clip_norm": 0.5},
}

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"seed": 1}, "a student"),
    "rate": ({"optimizer": lambda s: torch.optim.SGD(s.parameters(), lr=0.2)}, "an inner optimizer"),
    "schedule": ({"schedule": lambda k: 0.5}, "an inner optimizer"),
    "mode": ({"mode": {"keep_every": 6}}, "a mode"),
    "batches": ({"batch": lambda k: batch(k + 1)}, "inner batches"),
    "autocast": ({"dtype": torch.bfloat16}, "autocast"),
    "generator": ({"generator": 0}, "a generator="),
    "another seed of the generator": ({"generator": 1}, "a generator="),
    "a hook": ({"hook": twice}, "forward hooks of the student"),
    "a hook before the pass": ({"pre_hook": halved}, "forward hooks of the student"),
    "a hook of the teacher": ({"teacher": hooked}, "forward hooks of the teacher"),
    "an attribute": ({"scale": 2.0}, "a student"),
    "param groups": ({"optimizer": lambda s: adam(s, first=2)}, "an inner optimizer"),
    "param groups behind a clip": ({"optimizer": lambda s: adam(s, first=2)}, "an inner optimizer"),
    "clip": ({"clip_norm": 0.5}, "a clip_norm"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_folder_of_another_path_is_refused_and_left(case: str, tmp_path: Path) -> None:
    given, said = OTHERS[case]
    own = KILLED.get(case, {})
    with pytest.raises(ZeroDivisionError):
        gradient(str(tmp_path), stopped_at(20), **own)
    there = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(MetaplError):
        gradient(str(tmp_path), lambda: None, **{**own, **given})
    assert there == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert same(gradient(str(tmp_path), lambda: None, **own), gradient(None, lambda: None, **own))


def test_a_folder_with_records_of_other_fields_is_refused(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as before:
        before.setattr(resuming, "RECORDED", ("cut", "loss"))
        with pytest.raises(ZeroDivisionError):
            gradient(str(tmp_path), stopped_at(20))
    with pytest.raises(MetaplError):
        gradient(str(tmp_path), lambda: None)


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


def test_batches_that_no_step_back_reads_are_those_of_before(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        gradient(str(tmp_path), stopped_at(20), mode={"truncate": 3})
    with pytest.raises(MetaplError):
        gradient(str(tmp_path), lambda: None, mode={"truncate": 3}, batch=lambda k: batch(k and k + 50))


def test_a_path_of_one_step_begins_anew(tmp_path: Path) -> None:
    expected = gradient(None, lambda: None, steps=1)
    with pytest.raises(ZeroDivisionError):
        gradient(str(tmp_path), lambda: None, steps=1, problem=Stopped())
    assert same(gradient(str(tmp_path), lambda: None, steps=1), expected)


class Stopped(EqualWeights):
    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        raise ZeroDivisionError


def flip(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"?")


FAULTS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "damaged": (flip, r"steps-00000007\.ckpt is damaged"),
    "removed": (lambda file, other: file.unlink(), r"steps-00000014\.ckpt is there, and a file of steps before it"),
    "another step's": (lambda file, _: shutil.copy(file.parent / "steps-00000014.ckpt", file), "was not written by"),
    "another path's": (lambda file, other: shutil.copy(other, file), r"steps-00000007\.ckpt was not written by this"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_damaged_or_exchanged_file_is_named(case: str, tmp_path: Path) -> None:
    for seed, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        with pytest.raises(ZeroDivisionError):
            gradient(str(tmp_path / folder), stopped_at(20), seed=seed)
    harm, said = FAULTS[case]
    harm(*(tmp_path / folder / "steps-00000007.ckpt" for folder in "ab"))
    with pytest.raises(MetaplError):
        gradient(str(tmp_path / "a"), lambda: None)
    (tmp_path / "a" / "path.ckpt").unlink()
    assert same(gradient(str(tmp_path / "a"), lambda: None), gradient(None, lambda: None))


def test_attribution_in_the_folder_of_another_path_leaves_the_generators(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        gradient(str(tmp_path), stopped_at(20))
    student, mode = network(), Forward(keep_on=str(tmp_path))
    torch.manual_seed(5)
    left = torch.random.get_rng_state()
    with pytest.raises(MetaplError):
        metapl.attribute(student, batch(0), batch(-1), optimizer=adam(student), steps=STEPS, batch_size=4, mode=mode)
    assert torch.equal(torch.random.get_rng_state(), left)


class Counting(nn.Module):
    """It keeps what no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x


def test_what_no_folder_holds_is_refused(tmp_path: Path) -> None:
    student = nn.Sequential(Counting(), nn.Linear(6, 3))
    ahead, mode = Lookahead(lambda k: batch(k), steps=9), Forward(keep_on=str(tmp_path))
    given: dict[str, Any] = {"outer": batch(-1), "inner": ahead, "problem": EqualWeights()}
    inner = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(MetaplError):
        metapl.hypergradient(None, student, mode=mode, inner_optimizer=inner, **given)
    assert student[0].seen == []
    with pytest.raises(MetaplError):
        metapl.hypergradient(
            None, student[1], mode=Forward(keep_every=1, keep_on=str(tmp_path / "")), inner_optimizer=inner, **given
        )
