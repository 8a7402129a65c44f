"""Kills, full disks, malicious pickles, damaged files and pictures, mutated command lines and simultaneous starts.

    make endurance                                                # 20 to 30 minutes on two cores
    python benchmarks/endurance.py --only kills pickles           # some parts
    python benchmarks/endurance.py --write benchmarks/results/endurance.md

Each part tries something many times and counts what went wrong: work that was lost, runs that were mixed up, code that
was executed, damage that was accepted, an exception that is not the library's own, a process that hung. Everything
happens in a temporary folder; what trains does so in forked processes of its own.

Writes a JSON file; ``--write`` puts its table into a page.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import safetensors.torch
import torch
from machine import arguments, described, parsed, write_between_marks, write_json
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from metapl import LossTrainer, MetaplError
from metapl.apps.machine import ownership
from metapl.apps.main import main as metapl_command
from metapl.apps.networks.weights import load_weights
from metapl.apps.pictures.reader import read_image
from metapl.apps.run import WEIGHTS
from metapl.runs import checkpoint
from metapl.runs.checkpoint import CheckpointFolder

RESULT = Path(__file__).parent / "results" / "endurance.json"
HUNG = 120.0
"""Seconds after which something that takes two counts as hanging."""

STEPS = "24"

RUN = (
    *("train", "digits", "--steps", STEPS, "--hidden", "8", "--finetune-steps", "6", "--labeled-batch", "8"),
    *("--unlabeled-batch", "8", "--log-every", "2", "--validate-every", "8", "--save-every", "1", "--dropout", "0.1"),
)
"""A run that writes a checkpoint after every step: about half of its time goes to saving."""

FEW_STEPS = tuple("3" if word is STEPS else word for word in RUN)
"""The same of three steps."""

REFUSED = (0, 1, 2)
"""Exit codes of commands that end as they should: done, done in part or refused by the system, wrong input."""


@dataclass
class Count:
    """How often something was tried, and what went wrong."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def note(self, fault: str | None) -> None:
        """One more try; ``fault`` says what was wrong with it."""
        self.tried += 1
        if fault is not None:
            self.failures.append(fault[:300])


# -------------------------------------------------------------------------------------------------- processes


def forked(work: Callable[[], int], out: Path, limit: int | None = None) -> int:
    """The number of a process that runs ``work``; what it says goes to a file, and no file of it is larger than
    ``limit`` bytes."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        said = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8")
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding="utf-8")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ended(child: int, seconds: float = HUNG) -> int | None:
    """The exit code of a process, minus the number of the signal that killed it; None where it hung."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def command(*given: str | Path) -> Callable[[], int]:
    """The command, for :func:`forked`."""

    def work() -> int:
        torch.set_num_threads(1)
        sys.argv = ["metapl", *map(str, given)]
        return metapl_command([*map(str, given)])

    return work


def here(*given: str | Path) -> tuple[int, str, str]:
    """The command in this process: its exit code, and what it says; an exception that comes out counts as code 70."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), alarmed():
        try:
            code = metapl_command([*map(str, given)])
        except SystemExit as stop:  # after --help
            code = int(stop.code or 0)
        except Exception:
            code = 70
            traceback.print_exc()
    return code, out.getvalue(), error.getvalue()


class Hung(BaseException):
    """Something took far too long."""


@contextlib.contextmanager
def alarmed(seconds: float = HUNG) -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(run: Path) -> dict[str, bytes]:
    """What two runs that went alike have in common to the byte."""
    names = (*WEIGHTS.values(), "metrics.jsonl", "result.json")
    return {name: (run / name).read_bytes() for name in names if (run / name).is_file()}


class Parts:
    """The parts, each a method that gives a :class:`Count`.

    Args:
        folder: for everything that is written.
        share: of the numbers of tries; 1 is the long form.
    """

    def __init__(self, folder: Path, share: float) -> None:
        self.folder, self.share = folder, share
        self.reference = folder / "reference"
        since = time.monotonic()
        code = ended(forked(command(*RUN, "--out", self.reference), folder / "reference.txt"))
        if code != 0:
            raise SystemExit(f"the run that all is compared with ended with {code}: {self.said('reference')}")
        self.duration = time.monotonic() - since

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text(errors="replace")

    def times(self, number: int) -> int:
        return max(2, round(self.share * number))

    # ------------------------------------------------------------------------------------------------------- kills

    def kills(self) -> Count:
        """kill -9 at random moments of a run that saves after every step, and SIGTERM now and then; it is resumed until
        it ends, and then equals the run that was left alone."""
        count, draw, lives = Count(), random.Random(0), 0
        while count.tried < self.times(64):
            out, lives = self.folder / f"killed-{lives}", lives + 1
            last = False
            for life in itertools.count():
                if count.tried >= self.times(64) or life > 40:
                    last = True
                given = [*RUN, "--out", str(out), *(["--resume"] if (out / "recipe.json").exists() else [])]
                child = forked(command(*given), self.folder / "killed.txt")
                if not last:
                    time.sleep(draw.uniform(0.05, 0.9) * self.duration)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGTERM if draw.random() < 0.2 else signal.SIGKILL)
                code = ended(child)
                if code == 0:
                    break
                words = self.said("killed")
                fine = code in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM) and "Traceback" not in words
                count.note(None if fine else f"ended with {code}: {words[-200:]}")
                if not fine:
                    break
            if outcome(out) != outcome(self.reference):
                count.failures.append(f"life {lives}: it did not end as the run that was left alone")
            shutil.rmtree(out, ignore_errors=True)
        return count

    # -------------------------------------------------------------------------------------------------- full disks

    def full_disks(self) -> Count:
        """No file may be larger than so many bytes, or the disk is a small one in memory.

        The run says so in a line, and with room it goes on to the same end.
        """
        count, draw = Count(), random.Random(1)
        largest = max(path.stat().st_size for path in self.reference.rglob("*") if path.is_file())
        for number in range(self.times(14)):
            out = self.folder / f"full-{number}"
            limit = draw.randrange(1, largest)
            code = ended(forked(command(*RUN, "--out", out), self.folder / "full.txt", limit))
            count.note(self._after_full(out, code, f"limit of {limit} bytes"))
        small = self.folder / "small-disk"
        small.mkdir()
        for megabytes in (1, 2):
            if os.system(f"mount -t tmpfs -o size={megabytes}m tmpfs '{small}' 2>/dev/null"):
                break  # not allowed here
            try:
                (small / "ballast").write_bytes(b"\0" * ((megabytes << 20) - 150_000))
                code = ended(forked(command(*RUN, "--out", small / "run"), self.folder / "full.txt"))
                (small / "ballast").unlink()
                count.note(self._after_full(small / "run", code, f"disk of {megabytes} MB"))
            finally:
                os.system(f"umount '{small}'")
        return count

    def _after_full(self, out: Path, code: int | None, what: str) -> str | None:
        words = self.said("full")
        if code not in REFUSED or "Traceback" in words:
            return f"{what}: ended with {code}: {words[-200:]}"
        if code and not any(line.startswith("metapl: ") for line in words.splitlines()):
            return f"{what}: not said: {words[-200:]}"
        resumed = ["--resume"] if (out / "recipe.json").exists() else []
        code = ended(forked(command(*RUN, "--out", out, *resumed), self.folder / "full.txt"))
        if code != 0:
            return f"{what}: resumed, it ended with {code}: {self.said('full')[-200:]}"
        fault = None if outcome(out) == outcome(self.reference) else f"{what}: another end"
        shutil.rmtree(out, ignore_errors=True)
        return fault

    # ----------------------------------------------------------------------------------------------------- pickles

    def pickles(self) -> Count:
        """Pickles that would run code, in every dress and protocol, and checkpoints sealed with wrong or cut content.

        They are given as checkpoints, as weights, as a trainer's file, and in a run that is resumed. Nothing runs, and
        each is refused.
        """
        count, draw, marker = Count(), random.Random(2), self.folder / "executed"
        path = self.folder / "evil.ckpt"
        model = nn.Linear(2, 2)
        trainer = LossTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        readers: dict[str, Callable[[], object]] = {
            "checkpoint": lambda: checkpoint.load(path),
            "weights": lambda: load_weights(model, path.with_suffix(".pt"), heads=[]),
            "trainer": lambda: trainer.load(path),
        }
        for (name, content), reader in itertools.product(evil(marker, draw, self.times(34)), readers):
            for file in (path, path.with_suffix(".pt")):
                file.write_bytes(content)
            fault = None
            try:
                with alarmed():
                    readers[reader]()
                # What was damaged before it was sealed may still be a state, of other numbers.
                fault = None if name.startswith("damaged") else "was accepted"
            except MetaplError as error:
                fault = None if "\n" not in str(error) or "none can be used" in str(error) else "not in one line"
            except BaseException as error:
                fault = f"raised {type(error).__name__}: {error}"
            if marker.exists():
                fault = "CODE WAS EXECUTED"
                marker.unlink()
            count.note(None if fault is None else f"{name} as {reader}: {fault}")
        count.failures += self._evil_run(marker, count, draw)
        return count

    def _evil_run(self, marker: Path, count: Count, draw: random.Random) -> list[str]:
        faults = []
        for name, content in [*evil(marker, draw, 2)][:: max(1, 8 if self.share == 1 else 40)]:
            out = self.folder / "evil-run"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(self.reference, out)
            (out / "result.json").unlink()
            for kept in out.glob("checkpoints/*/*.ckpt"):
                kept.write_bytes(content)
            code = ended(forked(command(*RUN, "--out", out, "--resume"), self.folder / "evil.txt"))
            count.tried += 1
            words = self.said("evil")
            if code != 2 or "Traceback" in words or marker.exists():
                faults.append(f"{name} in a run: {code}: {words[-200:]}")
        return faults

    # ------------------------------------------------------------------------------------------------------- files

    def files(self) -> Count:
        """A byte flipped, cut off or added in every kind of file of a run: each command ends with an exit code and one
        line, and what predicts, predicts as before."""
        count, draw = Count(), random.Random(3)
        picture = self.folder / "digit.png"
        Image.fromarray((numpy.arange(64).reshape(8, 8) * 4).astype("uint8")).save(picture)
        before = here("predict", self.reference, picture, "--probabilities")
        kinds = sorted({path.relative_to(self.reference) for path in self.reference.rglob("*") if path.is_file()})
        kinds = [kind for kind in kinds if kind.name != ".lock"]
        run = self.folder / "damaged"
        each = -(-self.times(310) // len(kinds))
        for kind in kinds:
            content = (self.reference / kind).read_bytes()
            for number in range(each):
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(self.reference, run)
                (run / kind).write_bytes(mutated(content, draw))
                code, out, error = here("predict", run, picture, "--probabilities")
                fault = ending(code, error)
                if fault is None and code == 0 and out != before[1]:
                    fault = "was taken for another prediction"
                if number % 6 == 0 and fault is None:
                    code, _, error = here(*(("evaluate", run), ("compare", run, run))[number // 6 % 2])
                    fault = ending(code, error)
                if number % 12 == 0 and fault is None and kind.name != "result.json":
                    (run / "result.json").unlink()
                    code = ended(forked(command(*RUN, "--out", run, "--resume"), self.folder / "damaged.txt"))
                    fault = ending(-1 if code is None else code, self.said("damaged"))
                    if fault is None and code == 0 and outcome(run) != outcome(self.reference):
                        metrics = kind.name == "metrics.jsonl" and "damaged" in self.said("damaged")
                        fault = None if metrics else "was resumed to another end"
                count.note(None if fault is None else f"{kind}: {fault}")
        return count

    # ---------------------------------------------------------------------------------------------------- pictures

    def pictures(self) -> Count:
        """Pictures of every format with bytes flipped, cut and added: a tensor, or a reason."""
        count, draw, path = Count(), random.Random(4), self.folder / "picture.bin"
        rng = numpy.random.default_rng(0)
        whole = []
        for form, mode in itertools.product(
            ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"), ("L", "RGB", "RGBA", "P")
        ):
            image = Image.fromarray(rng.integers(0, 256, (24, 32, 4), dtype="uint8"), "RGBA").convert(mode)
            file = io.BytesIO()
            with contextlib.suppress(OSError):  # not every format has every mode
                image.save(file, form)
                whole.append((f"{form} {mode}", file.getvalue()))
        for number in range(self.times(1000)):
            name, content = whole[number % len(whole)]
            path.write_bytes(mutated(content, draw, most=4))
            fault = None
            try:
                with alarmed():
                    x = read_image(path, size=(8, 8))
                fault = None if x.shape == (3, 8, 8) and x.dtype == torch.uint8 else f"gave {tuple(x.shape)}"
            except MetaplError:
                pass
            except BaseException as error:
                fault = f"raised {type(error).__name__}: {error}"
            count.note(None if fault is None else f"{name}: {fault}")
        return count

    # ----------------------------------------------------------------------------------------------- command lines

    def command_lines(self) -> Count:
        """Command lines with words lost, doubled, cut and replaced: refused in one line, or ready to train or to
        predict."""
        count, draw = Count(), random.Random(5)
        picture = self.folder / "digit.png"
        Image.fromarray((numpy.arange(64).reshape(8, 8) * 4).astype("uint8")).save(picture)
        lines = [
            (*RUN, "--out", "{out}"),
            (*RUN, "--compare", "--seeds", "0-1", "--methods", "mpl", "none", "--jobs", "1", "--out", "{out}"),
            ("train", "images", "--labeled", "{none}", "--unlabeled", "{none}", "--steps", "3", "--out", "{out}"),
            ("predict", "{run}", "{picture}", "--top", "2", "--probabilities"),
            ("evaluate", "{run}", "--network", "student", "--json"),
            ("compare", "{run}", "{run}"),
            ("export", "{run}", "--out", "{picture}"),
        ]
        places = {"run": self.reference, "picture": picture, "none": self.folder / "none", "out": self.folder / "new"}
        before = outcome(self.reference)
        with training_stopped():
            for number in range(self.times(220)):
                words = [word.format(**places) for word in mutated_words(lines[number % len(lines)], draw)]
                words = [word.replace("\0", "") for word in words]
                with inside(self.folder / "elsewhere"):
                    code, _, error = here(*words)
                fault = ending(code, error)
                count.note(None if fault is None else f"{' '.join(words)!r}: {fault}")
                shutil.rmtree(places["out"], ignore_errors=True)
        if outcome(self.reference) != before:
            count.failures.append("a run was changed")
        return count

    # ----------------------------------------------------------------------------------------- simultaneous starts

    def starts(self) -> Count:
        """Several processes start at the same moment in one folder, with the default name, or fit into one folder: one
        gets it, the others are told so, or each gets its own."""
        count = Count()
        for number in range(self.times(20)):
            count.note(self._one_folder(self.folder / f"start-{number}", 4))
        for number in range(self.times(10)):
            count.note(self._default_names(self.folder / f"names-{number}", 4))
        for number in range(self.times(10)):
            count.note(self._fits(self.folder / f"fits-{number}", 3))
        return count

    def _at_once(self, works: Sequence[Callable[[], int]], folder: Path) -> list[int | None]:
        read, write = os.pipe()

        def waiting(work: Callable[[], int]) -> Callable[[], int]:
            def begin() -> int:
                os.close(write)
                os.read(read, 1)  # until all are there, and the pipe is closed
                ownership.PATIENCE = 0.5
                return work()

            return begin

        children = [forked(waiting(work), Path(f"{folder}-{index}.txt")) for index, work in enumerate(works)]
        time.sleep(0.05)
        os.close(write)
        codes = [ended(child) for child in children]
        os.close(read)
        return codes

    def _one_folder(self, folder: Path, several: int) -> str | None:
        works = [command(*FEW_STEPS, "--seed", str(seed), "--out", folder) for seed in range(several)]
        codes = self._at_once(works, folder)
        words = [Path(f"{folder}-{index}.txt").read_text() for index in range(several)]
        if sorted(codes, key=str) != [0, *[2] * (several - 1)] or any("Traceback" in text for text in words):
            return f"one folder: ended with {codes}: {words}"
        seeds = [
            json.loads((folder / "recipe.json").read_text())["recipe"]["fields"]["seed"],
            json.loads((folder / "result.json").read_text())["seed"],
        ]
        told = all(
            "another process is running" in text or "holds a run already" in text
            for text in words
            if "metapl: " in text
        )
        shutil.rmtree(folder)
        return None if set(seeds) == {codes.index(0)} and told else f"one folder: seeds {seeds}, codes {codes}"

    def _default_names(self, folder: Path, several: int) -> str | None:
        folder.mkdir()

        def work(seed: int) -> Callable[[], int]:
            begin = command(*FEW_STEPS, "--seed", str(seed))
            return lambda: os.chdir(folder) or begin()

        codes = self._at_once([work(seed) for seed in range(several)], folder)
        results = [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/result.json"))]
        shutil.rmtree(folder)
        sound = codes == [0] * several and sorted(result["seed"] for result in results) == [*range(several)]
        return None if sound else f"default names: ended with {codes}, {len(results)} results"

    def _fits(self, folder: Path, several: int) -> str | None:
        def fit() -> int:
            torch.set_num_threads(1)
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
            model = nn.Linear(4, 2)
            trainer = LossTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
            try:
                trainer.fit([(x, (x[:, 0] > 0).long())], steps=40, save_every=1, out=str(folder), progress=False)
            except MetaplError as error:
                return 2 if "another process is running" in str(error) or "holds checkpoints" in str(error) else 71
            return 0

        codes = self._at_once([fit] * several, folder)
        steps = [path.stem for path in CheckpointFolder(folder / "checkpoints/fit").paths()]
        shutil.rmtree(folder)
        sound = sorted(codes, key=str) == [0, *[2] * (several - 1)] and steps[:1] == ["step-00000040"]
        return None if sound else f"fits: ended with {codes}, {steps}"


PARTS = {
    "kills": "kills (one of five by SIGTERM) at random moments of a run that saves after every step",
    "full_disks": "full disks and limits on the size of files",
    "pickles": "malicious and damaged pickles and checkpoints",
    "files": "files of a run with bytes flipped, cut or added",
    "pictures": "mutated pictures",
    "command_lines": "mutated command lines",
    "starts": "simultaneous starts, of three or four processes each",
}


# ------------------------------------------------------------------------------------------------------- what is tried


class Call:
    """What a pickle calls when it is loaded."""

    def __init__(self, function: Callable[..., Any], *given: Any) -> None:
        self.function, self.given = function, given

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.given


def evil(marker: Path, draw: random.Random, damaged: int) -> Iterator[tuple[str, bytes]]:
    """Files that would make ``marker`` if their code ran, and sealed checkpoints that are damaged inside."""
    import subprocess

    touch = f"open({str(marker)!r}, 'w').close()"
    calls = {
        "system": Call(os.system, f"touch '{marker}'"),
        "eval": Call(eval, touch),
        "exec": Call(exec, touch),
        "open": Call(open, str(marker), "w"),
        "run": Call(subprocess.run, ["touch", str(marker)]),
        "mkdir": Call(os.mkdir, str(marker)),
        "load": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch '{marker}'"))),
        "unpickle": Call(torch.load, str(marker)),
        "import": Call(__import__, "nothing_of_the_kind"),
    }
    for (name, call), protocol in itertools.product(calls.items(), (0, 2, 4)):
        for where, content in (("bare", call), ("in a state", {"step": 1, "trainer": call})):
            plain = pickle.dumps(content, protocol=protocol)
            yield f"{name}, protocol {protocol}, {where}", plain
            if where == "in a state":
                yield f"{name}, protocol {protocol}, sealed", sealed(plain)
                yield f"{name}, protocol {protocol}, zipped and sealed", sealed(zipped(plain))
    content = json.dumps(checkpoint.encoded({"step": 1, "trainer": {"a": torch.ones(3)}}, {})).encode()
    for number in range(damaged):
        yield f"damaged {number}, sealed", sealed(mutated(content, draw))


def zipped(content: bytes) -> bytes:
    """A pickle in the dress of torch.save."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (
            ("archive/data.pkl", content),
            ("archive/version", b"3\n"),
            ("archive/byteorder", b"little"),
        ):
            archive.writestr(name, data)
    return file.getvalue()


def sealed(content: bytes) -> bytes:
    """Content as the tree of a checkpoint, with its checksum, as if metapl had written it."""
    tree = content.decode("latin1")
    sha256 = checkpoint._digest(checkpoint.FORMAT, tree, {})
    return safetensors.torch.save({}, {"metapl": checkpoint.FORMAT, "tree": tree, "sha256": sha256})


def mutated(content: bytes, draw: random.Random, most: int = 1) -> bytes:
    """Bytes of which some are flipped, cut off, lost or added, and never the same."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, most)):
        if not changed:
            break
        at = draw.randrange(len(changed))
        kind = draw.choice(("flip", "flip", "cut", "lose", "add"))
        if kind == "flip":
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del changed[at:]
        elif kind == "lose":
            del changed[at : at + draw.randint(1, 16)]
        else:
            changed[at:at] = draw.randbytes(draw.randint(1, 16))
    return bytes(changed) if bytes(changed) != content else content[:-1]


ODD = (
    "",
    "-1",
    "0",
    "1e400",
    "nan",
    "inf",
    "x",
    "é",
    "\x1b[2J",
    "--",
    "-",
    "None",
    "True",
    "0-9",
    "999999999999999999999",
    "[]",
    "=",
    "../..",
)


def mutated_words(words: Sequence[str], draw: random.Random) -> list[str]:
    """A command line of which some words are lost, doubled, cut, replaced or exchanged."""
    changed = list(words)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(1, len(changed)) if len(changed) > 1 else 0
        kind = draw.choice(("lose", "double", "cut", "replace", "replace", "exchange", "letter"))
        if kind == "lose":
            del changed[at]
        elif kind == "double":
            changed.insert(at, changed[at])
        elif kind == "cut":
            changed[at] = changed[at][: draw.randrange(len(changed[at]) + 1)]
        elif kind == "replace":
            changed[at] = draw.choice(ODD)
        elif kind == "exchange":
            other = draw.randrange(1, len(changed)) if len(changed) > 1 else 0
            changed[at], changed[other] = changed[other], changed[at]
        else:
            changed[at] += draw.choice("=.-{}0")
        if not changed:
            return ["train"]
    # A mutated place in braces is no place any more.
    return [word if word in PLACES else word.replace("{", "(").replace("}", ")") for word in changed]


PLACES = ("{run}", "{picture}", "{none}", "{out}")


@contextlib.contextmanager
def training_stopped() -> Iterator[None]:
    """Commands that get so far as to train do not."""
    from metapl.apps import commands

    class Reached(MetaplError):
        """It would train now."""

    def stop(*given: Any, **named: Any) -> Any:
        raise Reached("it would train now")

    before = commands.train, commands.compare
    commands.train, commands.compare = stop, stop
    try:
        yield
    finally:
        commands.train, commands.compare = before


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """In a folder of its own, which is empty again afterwards."""
    folder.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def ending(code: int, words: str) -> str | None:
    """What is wrong with how a command ended."""
    if code not in REFUSED or "Traceback" in words:
        return f"ended with {code}: {words[-250:]}"
    if code == 2 and not words.strip():
        return f"refused without a word: {words[-250:]}"
    return None


# ----------------------------------------------------------------------------------------------------------- the result


def table(result: dict[str, Any]) -> str:
    """Markdown: what was tried how often, and how often it failed."""
    setup, rows = result["setup"], result["parts"]
    lines = ["| what | tried | failed | seconds |", "|---|---:|---:|---:|"]
    lines += [
        f"| {PARTS[name]} | {part['tried']:,} | {part['failed']:,} | {part['seconds']:,.0f} |"
        for name, part in rows.items()
    ]
    return "\n".join(
        [
            f"`{setup['command']}` on {setup['cores']} cores of {setup['cpu']}, torch {setup['torch']}, Python "
            f"{setup['python']}, {setup['system']}.",
            "",
            *lines,
        ]
    )


LATE = (
    "matplotlib.figure",
    "metapl.apps.commands",
    "metapl.apps.report",
    "tensorboard",
    "torch._dynamo",
    "torch.utils.tensorboard.summary",
)


def preload() -> None:
    """Import here what forked processes would each import otherwise, which takes longer than their runs."""
    for name in LATE:
        import_module(name)
    from metapl.execution import kernels

    kernels.load_forward_mode()
    load_digits()


def run(given: Namespace) -> None:
    """Try everything, and write the counts."""
    torch.set_num_threads(1)
    preload()
    names = given.only or [*PARTS]
    share = 0.02 if given.miniature else 1.0
    found: dict[str, Any] = {}
    if given.only and given.out.is_file():  # the other parts stay as they were counted
        found = json.loads(given.out.read_text())["parts"]
    with tempfile.TemporaryDirectory(prefix="metapl-endurance-") as folder:
        parts = Parts(Path(folder), share)
        for name in names:
            since = time.monotonic()
            count: Count = getattr(parts, name)()
            seconds, failures = time.monotonic() - since, count.failures
            found[name] = {
                "tried": count.tried,
                "failed": len(failures),
                "seconds": seconds,
                "failures": failures[:20],
            }
            print(f"{name}: {count.tried} tried, {len(failures)} failed, {seconds:.0f} s", file=sys.stderr, flush=True)
            for failure in failures[:20]:
                print(f"  {failure}", file=sys.stderr, flush=True)
            setup = {**described("cpu"), "command": "make endurance"}
            write_json(given.out, {"setup": setup, "parts": {part: found[part] for part in PARTS if part in found}})
    print(table(json.loads(given.out.read_text())))


def main() -> None:
    parser = arguments(__doc__, RESULT, page=True)
    parser.add_argument("--only", nargs="+", choices=[*PARTS], help="these parts alone")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the Markdown table of a result and stop")
    given = parsed(parser)
    if given.table:
        print(table(json.loads(given.table.read_text())))
    elif given.write:
        write_between_marks(given.write, "endurance", table(json.loads(given.out.read_text())))
    else:
        run(given)


if __name__ == "__main__":
    main()
