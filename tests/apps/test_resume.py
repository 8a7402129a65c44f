"""A run stopped or killed at any moment, and gone on with, ends byte for byte as one left alone.

Damaged, exchanged and missing files, two writers in a folder, a full disk: a line, and nothing is
lost.
"""

import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from command import edited, metapl, result
from test_bits import one_thread
from test_goldens import words_of
from tiny_runs import TINY, built_once

from metapl.errors import MetaplError
from metapl.run_folder import WEIGHTS, RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = (
    "digits forward",
    "digits reduced",
    "images uda",
    "images pseudo labels",
)
KINDS = (*KINDS, "noisy student")
FEW = ("digits reduced", "images uda", "noisy student")  # whose phases are of every sort
SOME = [pytest.param(kind, marks=[pytest.mark.long] * (kind not in FEW)) for kind in KINDS]
POINTS = (
    ("metapl.training.trainer:BilevelTrainer", "step"),
    ("metapl.training.trainer:BilevelTrainer", "teacher_step"),
    ("metapl.training.loss_trainer:LossTrainer", "step"),
    ("metapl.runs.checkpoint:CheckpointFolder", "write"),
    ("metapl.labels.store:LabelWriter", "add"),
    ("metapl.labels.store:LabelWriter", "_describe"),
    ("metapl.apps.methods.noisy_student", "select"),  # between two phases
    ("metapl.apps.train", "evaluated"),
    ("metapl.apps.train", "measured"),
    ("metapl.run_folder:RunFolder", "write_weights"),
    ("metapl.run_folder:RunFolder", "write_json"),
    ("metapl.apps.train", "write_report"),
)


class Killed(BaseException):
    """Nothing that happens here is heard by anybody: the process would be gone."""


class Calls:
    """The calls at the points, counted; one of them, of a number, does not come to its end."""

    def __init__(
        self, patch: pytest.MonkeyPatch, stop: tuple[int, int] | None = None, by: Any = None
    ) -> None:
        self.count = Counter[int]()
        for point, (owner, name) in enumerate(POINTS):
            found = resolve_name(owner)
            patch.setattr(found, name, self._counting(point, getattr(found, name), stop, by))

    def _counting(self, point: int, real: Any, stop: tuple[int, int] | None, by: Any) -> Any:
        def counting(*given: Any, **named: Any) -> Any:
            self.count[point] += 1
            if (point, self.count[point]) == stop:
                if isinstance(by, BaseException):
                    raise by
                signal.raise_signal(by)
            return real(*given, **named)

        return counting


@pytest.fixture(name="root", scope="module")
def _root(three_colors: Path) -> Path:
    return three_colors


def command(kind: str, root: Path, out: Path) -> list[str]:
    return [*words_of(kind, root), "--out", str(out)]


Whole = tuple[Path, Counter[int]]


@pytest.fixture(scope="module")
def wholes(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    """Return a run of each kind that nothing happened to, made when it is asked for."""
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
    """Return what two runs have in common to the byte."""
    kinds = (".safetensors", ".arrow", ".jsonl", ".csv")
    found = (
        path
        for path in sorted(out.rglob("*"))
        if path.suffix in kinds or path.name == "result.json"
    )
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def files(out: Path) -> dict[Path, tuple[int, bytes]]:
    found = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def assert_equal(out: Path, whole: Path) -> None:
    found, wanted = contents(out), contents(whole)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert (out / "report.html").exists()
    assert not [*out.rglob("*.tmp")]


def interrupted(kind: str, root: Path, out: Path, moment: tuple[int, int], by: Any) -> None:
    """Begin a run, or go on with it, and stop at the moment; killed, it says nothing."""
    resume = ["--resume"] if (out / "recipe.json").exists() else []
    with pytest.MonkeyPatch.context() as patch:
        Calls(patch, moment, by)
        if isinstance(by, Killed):
            with pytest.raises(Killed):
                metapl(*command(kind, root, out), *resume)
        else:
            said = metapl(
                *command(kind, root, out), *resume, code=143 if by == signal.SIGTERM else 130
            )
            assert "go on with:" in said.stderr
    assert not (out / "result.json").exists() or POINTS[moment[0]][1] == "write_json"


def gone_on_with(kind: str, root: Path, out: Path) -> None:
    metapl(*command(kind, root, out), *(["--resume"] if (out / "recipe.json").exists() else []))


@pytest.mark.parametrize("kind", SOME)
def test_a_run_that_is_stopped_and_then_killed_ends_as_one_that_was_not(
    kind: str, root: Path, tmp_path: Path, wholes: dict[str, Whole]
) -> None:
    """Interrupt a step that is drawn by Ctrl-C, and one of those that were left by kill -9.

    The run ended, it takes no step more.
    """
    (whole, count), draw, out = wholes[kind], random.Random(kind), tmp_path / "a run"
    steps = [point for point in (0, 2) if count[point]]
    moment = [(point, draw.randint(1, count[point])) for point in steps]
    interrupted(kind, root, out, moment[-1], KeyboardInterrupt())
    interrupted(kind, root, out, (9, draw.randint(1, count[9])), Killed())
    interrupted(kind, root, out, (11, 1), Killed())
    gone_on_with(kind, root, out)
    assert_equal(out, whole)
    before = files(out)
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        said = metapl(*command(kind, root, out), "--resume")
    assert "is finished already" in " ".join(said.stdout.split())
    assert not calls.count
    assert files(out) == before


@pytest.mark.long
@pytest.mark.parametrize("by", [signal.SIGTERM, Killed()])
@pytest.mark.parametrize("kind", KINDS)
def test_at_any_moment(
    kind: str, by: Any, root: Path, tmp_path: Path, wholes: dict[str, Whole]
) -> None:
    whole, count = wholes[kind]
    draw = random.Random(f"{kind} {by!r}")
    for point, calls in count.items():
        out = tmp_path / str(point)
        interrupted(kind, root, out, (point, draw.randint(1, calls)), by)
        gone_on_with(kind, root, out)
        assert_equal(out, whole)
        shutil.rmtree(out)


@pytest.fixture(scope="module")
def begun(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return pictures, and a run on them that was stopped."""
    place = tmp_path_factory.mktemp("begun")
    own = Path(shutil.copytree(root, place / "own"))
    with one_thread():
        interrupted("images uda", own, place / "run", (2, 5), KeyboardInterrupt())
    return place


def other_bytes(file: Path) -> None:
    """Give a file other bytes, of the same size, and of no pixel."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


CHANGED: dict[str, Callable[[Path], object]] = {
    "no picture any more": lambda root: (root / "labeled/red/red-1.png").unlink(),
    "other bytes": lambda root: other_bytes(root / "unlabeled/red-3.png"),
    "another label": lambda root: (root / "labeled/red/red-1.png").rename(
        root / "labeled/blue/red-1.png"
    ),
    "another test": lambda root: shutil.copy(
        root / "test/red/red-1.png", root / "test/red/more.png"
    ),
}


# What the refusal names.
NAMED = {
    "no picture any more": "labeled: 1 gone (red/red-1.png)",
    "other bytes": "unlabeled: as many, of which some are others",
    "another label": "labeled: 1 gone (red/red-1.png), 1 new (blue/red-1.png)",
    "another test": "test: 1 new (red/more.png)",
    "--lr 0.5": "lr was",
    "--finetune-steps 3": "finetune_steps was",
}


@pytest.mark.parametrize("change", [*CHANGED, "--lr 0.5", "--finetune-steps 3"])
def test_with_other_settings_or_data_it_is_refused_and_left_as_it_was(
    change: str, begun: Path, tmp_path: Path, wholes: dict[str, Whole]
) -> None:
    """Moved, both the pictures and the run; as they were, it goes on."""
    own, out = (Path(shutil.copytree(begun / name, tmp_path / name)) for name in ("own", "run"))
    before, flags = files(out), change.split() if change not in CHANGED else []
    if change in CHANGED:
        CHANGED[change](own)
    said = metapl(*command("images uda", own, out), *flags, "--resume", code=2)
    assert NAMED[change] in " ".join(said.stderr.split())
    assert ("data have changed" in said.stderr) == (change in CHANGED)
    assert files(out) == before
    if change == "--lr 0.5":
        gone_on_with("images uda", own, out)
        assert_equal(out, wholes["images uda"][0])


def test_pictures_that_have_moved_are_asked_for_by_their_flag(begun: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(begun / "run", tmp_path / "run"))
    moved = Path(shutil.copytree(begun / "own" / "unlabeled", tmp_path / "elsewhere"))
    stored = RunFolder(out).recipe()["fields"]
    gone = tmp_path / "gone"
    edited(out / "recipe.json", "recipe", "fields", unlabeled=str(gone))
    there = {name: str(begun / "own" / Path(stored[name]).name) for name in ("labeled", "test")}
    flags = [word for name, place in there.items() for word in (f"--{name}", place)]
    said = metapl("train", "images", "--resume", "--out", out, *flags, code=2).stderr
    assert f"{gone}, the unlabeled pictures of the run, is not there" in said
    assert "--unlabeled DIR --resume" in said
    metapl("train", "images", "--resume", "--out", out, *flags, "--unlabeled", moved)
    assert result(out)["method"] == "uda"


# What a command reads of a run; other files it does not look at.
COMMON = {"recipe.json", "result.json", "network.json"}
READ = {
    "predict": COMMON,
    "report": COMMON | {"data.json", "metrics.jsonl"},
    "runs": {"recipe.json", "result.json", "data.json", "metrics.jsonl"},
}
PARTS = (
    "recipe.json",
    "result.json",
    "network.json",
    "data.json",
    "metrics.jsonl",
    *WEIGHTS.values(),
)
UNREAD = ("report.html", "report.png", "checkpoints", "tensorboard")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that differs in its seed."""
    return built_once(
        tmp_path_factory, "other", lambda out: metapl(*TINY, "--seed", "1", "--out", str(out))
    )


def commands(run: Path, digit: Path, weights: str = "") -> dict[str, list[str]]:
    networks = {file: name for name, file in WEIGHTS.items()}
    predicted = [
        "predict",
        str(run),
        str(digit),
        "--probabilities",
        "--network",
        networks.get(weights, "student"),
    ]
    return {"predict": predicted, "report": ["report", str(run)], "runs": ["runs", str(run.parent)]}


def flipped(content: bytes, own: random.Random) -> bytes:
    changed = bytearray(content)
    changed[own.randrange(len(changed))] ^= 1 << own.randrange(7)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": flipped,
    "cut": lambda content, own: content[: own.randrange(len(content))],
    "emptied": lambda content, own: b"",
}


def told(run: Path, digit: Path, name: str) -> dict[str, tuple[int, str, str]]:
    found = {}
    for command, words in commands(run, digit, name).items():
        done = metapl(*words, code=None)
        assert "Traceback" not in done.stderr
        found[command] = done.returncode, done.stdout, " ".join(done.stderr.split())
    return found


def refused(
    run: Path, name: str, found: dict[str, tuple[int, str, str]], whole: dict[str, Any]
) -> None:
    """Check that every command that reads the file says that it is not as it was.

    The others are as before.
    """
    for command, (code, out, err) in found.items():
        if command == "runs":  # lists what it can, and says of the others what is wrong
            assert code == 0 or not (run / "recipe.json").exists()
            assert (out == whole[command][1]) == (name not in READ["runs"]), out
        elif command == "report" and not (run / "result.json").exists():
            assert code == 0  # of a run that is not finished
        elif name in READ[command] or (command == "predict" and name in WEIGHTS.values()):
            assert code == 2, (command, out)
            assert name in err or run.name in err
            assert err.startswith("metapl: ")
        elif command == "predict":
            assert (code, out) == whole[command][:2]


WAYS = (*DAMAGES, "exchanged", "removed")


# One of the ways by default.
@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=[pytest.mark.long] * ((i + 2 * j) % 5 > 0))
        for i, name in enumerate(PARTS)
        for j, how in enumerate(WAYS)
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_refused(
    name: str, how: str, run: Path, digit: Path, other: Path
) -> None:
    whole, content, own = (
        told(run, digit, name),
        (run / name).read_bytes(),
        random.Random(f"{name} {how}"),
    )
    for _ in range(3 if how == "flipped" else 1):
        if how == "removed":
            (run / name).unlink()
        else:
            bent = (other / name).read_bytes() if how == "exchanged" else DAMAGES[how](content, own)
            (run / name).write_bytes(bent)
        refused(run, name, told(run, digit, name), whole)
        (run / name).write_bytes(content)
    for unread in UNREAD:
        place = run / unread
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    moved = run.rename(run.with_name("elsewhere"))
    assert told(moved, digit, name)["predict"] == whole["predict"]


def test_two_writers_in_a_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metapl.runs.folder.PATIENCE", 0.1)
    (run / "result.json").unlink()
    with RunFolder(run).locked():
        before = files(run)
        for more in ((), ("--resume",)):
            assert "metapl: " in metapl(*TINY, "--out", run, *more, code=2).stderr
        assert files(run) == before
        with pytest.raises(MetaplError, match="another process"), RunFolder(run).locked():
            pass
    metapl(*TINY, "--out", run, "--resume")


@pytest.mark.parametrize("room", [1, 12_000])
def test_a_full_disk_loses_nothing(room: int, tiny: Path, tmp_path: Path) -> None:
    """No file may have more bytes, as if there were no room for more.

    With room the run goes on to the same end.
    """
    out, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        done = metapl(*TINY, "--out", out, code=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode in (1, 2), room
    assert "Traceback" not in done.stderr
    assert "too large" in " ".join(done.stderr.split())
    metapl(*TINY, "--out", out, *(["--resume"] if (out / "recipe.json").exists() else []))
    for name in (*WEIGHTS.values(), "metrics.jsonl", "result.json", "network.json"):
        assert (out / name).read_bytes() == (tiny / name).read_bytes(), name
    assert not [*out.rglob("*.tmp")]
    # It notes all that is read beside it.
    assert result(tiny)["sha256"].keys() == {*PARTS} - {"recipe.json"}
