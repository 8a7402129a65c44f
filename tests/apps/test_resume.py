"""A run that is stopped or killed at any moment, and gone on with, ends byte for bit as one that was left alone."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from command import metapl
from forked import Forked
from test_bits import one_thread
from test_goldens import pictures, words_of

KINDS = ("digits forward", "digits reduced", "images uda", "images pseudo labels", "noisy example weights")
KINDS = (*KINDS, "noisy student")
POINTS = (
    ("metapl.training.trainer:BilevelTrainer", "step"),
    ("metapl.training.trainer:BilevelTrainer", "teacher_step"),
    ("metapl.training.loss_trainer:LossTrainer", "step"),
    ("metapl.runs.checkpoint:CheckpointFolder", "write"),
    ("metapl.apps.labels:LabelWriter", "add"),
    ("metapl.apps.labels:LabelWriter", "_describe"),
    ("metapl.apps.noisy_student", "select"),  # between two phases
    ("metapl.apps.train", "evaluated"),
    ("metapl.apps.train", "measured"),
    ("metapl.apps.run:RunFolder", "write_weights"),
    ("metapl.apps.run:RunFolder", "write_json"),
)


class Killed(BaseException):
    """Nothing that happens here is heard by anybody: the process would be gone."""


class Calls:
    """The calls at the points, counted; one of them, of a number, does not come to its end."""

    def __init__(self, patch: pytest.MonkeyPatch, stop: tuple[int, int] | None = None, by: Any = None) -> None:
        self.count = Counter[int]()
        for point, (owner, name) in enumerate(POINTS):
            found = resolve_name(owner)
            patch.setattr(found, name, self._counting(point, getattr(found, name), stop, by))

    def _counting(self, point: int, real: Any, stop: tuple[int, int] | None, by: Any) -> Any:
        def counting(*given: Any, **named: Any) -> Any:
            self.count[point] += 1
            if (point, self.count[point]) == stop:
                raise by
            return real(*given, **named)

        return counting


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"))


def command(kind: str, root: Path, out: Path) -> list[str]:
    return [*words_of(kind, root), "--out", str(out)]


Whole = tuple[Path, Counter[int]]


@pytest.fixture(scope="module")
def wholes(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    """A run of each kind that nothing happened to, when it is asked for."""
    place = tmp_path_factory.mktemp("wholes")

    class Wholes(dict[str, Whole]):
        def __missing__(self, kind: str) -> Whole:
            out = place / kind.replace(" ", "-")
            with pytest.MonkeyPatch.context() as patch, one_thread():
                calls = Calls(patch)
                metapl(*command(kind, root, out))
            return self.setdefault(kind, (out, calls.count))

    return Wholes()


def contents(out: Path) -> dict[str, bytes]:
    """What two runs have in common to the byte."""
    kinds = (".safetensors", ".arrow", ".jsonl", ".csv")
    found = (path for path in sorted(out.rglob("*")) if path.suffix in kinds or path.name == "result.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def files(out: Path) -> dict[Path, tuple[int, bytes]]:
    found = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def assert_equal(out: Path, whole: Path) -> None:
    found, wanted = contents(out), contents(whole)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert not [*out.rglob("*.tmp")]


def interrupted(kind: str, root: Path, out: Path, moment: tuple[int, int], by: BaseException) -> None:
    """Begin a run, or go on with it, and stop at the moment; killed, it says nothing."""
    resume = ["--resume"] if (out / "recipe.json").exists() else []
    with pytest.MonkeyPatch.context() as patch:
        Calls(patch, moment, by)
        if isinstance(by, Killed):
            with pytest.raises(Killed):
                metapl(*command(kind, root, out), *resume)
        else:
            said = metapl(*command(kind, root, out), *resume, code=130)
            assert "go on with:" in said.stderr
    assert not (out / "result.json").exists() or POINTS[moment[0]][1] == "write_json"


def gone_on_with(kind: str, root: Path, out: Path) -> None:
    metapl(*command(kind, root, out), *(["--resume"] if (out / "recipe.json").exists() else []))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_and_then_killed_ends_as_one_that_was_not(
    kind: str, root: Path, tmp_path: Path, wholes: dict[str, Whole]
) -> None:
    """Ctrl-C in the midst of a step that is drawn, and kill -9 in the midst of one of those that were left."""
    (whole, count), draw, out = wholes[kind], random.Random(kind), tmp_path / "a run"
    steps = [point for point in (0, 2) if count[point]]
    moment = [(point, draw.randint(1, count[point])) for point in steps]
    interrupted(kind, root, out, moment[-1], KeyboardInterrupt())
    interrupted(kind, root, out, (9, draw.randint(1, count[9])), Killed())
    gone_on_with(kind, root, out)
    assert_equal(out, whole)


@pytest.mark.long
@pytest.mark.parametrize("by", [KeyboardInterrupt, Killed])
@pytest.mark.parametrize("kind", KINDS)
def test_at_any_moment(
    kind: str, by: type[BaseException], root: Path, tmp_path: Path, wholes: dict[str, Whole]
) -> None:
    whole, count = wholes[kind]
    draw = random.Random(f"{kind} {by}")
    for point, calls in count.items():
        out = tmp_path / str(point)
        interrupted(kind, root, out, (point, draw.randint(1, calls)), by())
        gone_on_with(kind, root, out)
        assert_equal(out, whole)
        shutil.rmtree(out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_has_ended_takes_no_step_more(kind: str, root: Path, wholes: dict[str, Whole]) -> None:
    whole, _ = wholes[kind]
    before = files(whole)
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        said = metapl(*command(kind, root, whole), "--resume")
    assert "is finished already" in " ".join(said.stdout.split())
    assert not calls.count
    assert files(whole) == before


def no_picture_any_more(root: Path) -> None:
    (root / "labeled/red/red-1.png").unlink()


def other_bytes(root: Path) -> None:
    """Of the same size, and of no pixel."""
    file = root / "unlabeled/red-3.png"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def another_label(root: Path) -> None:
    (root / "labeled/red/red-1.png").rename(root / "labeled/blue/red-1.png")


def another_test(root: Path) -> None:
    shutil.copy(root / "test/red/red-1.png", root / "test/red/more.png")


@pytest.fixture(scope="module")
def begun(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and a run on them that was stopped."""
    place = tmp_path_factory.mktemp("begun")
    own = Path(shutil.copytree(root, place / "own"))
    with one_thread():
        interrupted("images uda", own, place / "run", (2, 5), KeyboardInterrupt())
    return place


@pytest.mark.parametrize(
    ("change", "flags", "word"),
    [
        (None, ("--lr", "0.5"), "lr was"),
        (None, ("--uda-weight", "2"), "uda_weight was"),
        (None, ("--seed", "2"), "seed was"),
        (None, ("--finetune-steps", "3"), "finetune_steps was"),
        (no_picture_any_more, (), "data have changed"),
        (other_bytes, (), "data have changed"),
        (another_label, (), "data have changed"),
        (another_test, (), "data have changed"),
    ],
)
def test_with_other_settings_or_data_it_is_refused_and_left_as_it_was(
    change: Any, flags: tuple[str, ...], word: str, begun: Path, tmp_path: Path
) -> None:
    own, out = (Path(shutil.copytree(begun / name, tmp_path / name)) for name in ("own", "run"))
    before = files(out)
    if change is not None:
        change(own)
    said = metapl(*command("images uda", own, out), *flags, "--resume", code=2)
    assert word in " ".join(said.stderr.split())
    assert files(out) == before


def test_folders_that_were_moved_are_gone_on_with(begun: Path, tmp_path: Path, wholes: dict[str, Whole]) -> None:
    """The pictures and the run."""
    elsewhere, moved = (Path(shutil.copytree(begun / name, tmp_path / name)) for name in ("own", "run"))
    gone_on_with("images uda", elsewhere, moved)
    assert_equal(moved, wholes["images uda"][0])


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "number", "signum"), [("digits forward", 0, signal.SIGKILL), ("noisy student", 2, signal.SIGTERM)]
)
def test_a_real_process_that_a_signal_ends(kind: str, number: int, signum: int, root: Path, tmp_path: Path) -> None:
    for name in ("whole", "hit"):
        words, owner = command(kind, root, tmp_path / name), POINTS[number]
        born = Forked(words, point=(*owner, 9, int(signum)) if name == "hit" else None)
        out, err = born.communicate()
        if name == "hit":
            assert born.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), err
            assert "Traceback" not in err
            out, err = (again := Forked([*words, "--resume"])).communicate()
            assert again.returncode == 0, err
            assert "resumed at step" in out + err
    assert_equal(tmp_path / "hit", tmp_path / "whole")
