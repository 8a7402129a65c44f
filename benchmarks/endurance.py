"""Kills, damaged files and damaged pictures, by the hundred.

    make endurance                                          # 10 to 15 minutes on two cores
    python benchmarks/endurance.py --write benchmarks/results/endurance.md

Each part tries something many times and counts what went wrong: work that was lost, damage that was
accepted, an exception that is not the library's own, a process that hung. Everything happens in a
temporary folder; what trains does so in forked processes of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import torch
from harness import RESULTS, Row, arguments, environment, grid, loaded, parsed, show, write_json
from PIL import Image

from metapl import MetaplError
from metapl.apps.main import main as metapl_command
from metapl.pictures.reader import read_image

RESULT = RESULTS / "endurance.json"
# After so many seconds something that takes two counts as hanging.
HUNG = 120.0

RUN = (
    *(
        "train",
        "digits",
        "--steps",
        "24",
        "--hidden",
        "8",
        "--finetune-steps",
        "6",
        "--labeled-batch",
        "8",
    ),
    *(
        "--unlabeled-batch",
        "8",
        "--log-every",
        "2",
        "--validate-every",
        "8",
        "--save-every",
        "1",
        "--dropout",
        "0.1",
    ),
)
"""A run that writes a checkpoint after every step: about half of its time goes to saving."""

PARTS = {
    "kills": "kills (one of five by SIGTERM) at random moments of a run that saves after every "
    "step",
    "files": "files of a run with bytes flipped, cut or added",
    "pictures": "mutated pictures",
}
# One for each try: what was wrong with it, or None.
Faults = Iterator[str | None]


def forked(words: tuple[str | Path, ...], said: Path) -> int:
    """Start a process that runs the command, and return its number.

    What it says goes to a file, its errors to another beside it.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        for number, file in ((1, said), (2, said.with_suffix(".errors"))):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(n, "w"), encoding="utf-8") for n in (1, 2)
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )
        torch.set_num_threads(1)
        sys.argv = ["metapl", *map(str, words)]
        code = metapl_command(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int | None:
    """Return the exit code of a process, minus the number of the signal that killed it.

    Return None where it hung, and kill it.
    """
    give_up = time.monotonic() + HUNG
    while time.monotonic() < give_up:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def ending(code: int | None, words: str) -> str | None:
    """Return what is wrong with a command's end, or None if it is done, in part, or refused."""
    if code not in (0, 1, 2) or "Traceback" in words:
        return f"ended with {code}: {words[-250:]}"
    if code == 2 and not words.strip():
        return f"refused without a word: {words[-250:]}"
    return None


def outcome(run: Path) -> dict[str, bytes]:
    """Return what two runs that went alike have in common to the byte."""
    names = [*run.glob("*.safetensors"), run / "metrics.jsonl", run / "result.json"]
    return {path.name: path.read_bytes() for path in names if path.is_file()}


class Parts:
    """The parts, each a method that gives what was wrong with each try.

    ``share`` of the tries, 1 is the long form.
    """

    def __init__(self, folder: Path, share: float) -> None:
        self.folder = folder
        self.share = share
        self.said = folder / "said.txt"
        self.reference = folder / "reference"
        since = time.monotonic()
        code, _, errors = self.ran(*RUN, "--out", self.reference)
        if code != 0:
            raise SystemExit(f"the run that all is compared with ended with {code}: {errors}")
        self.duration = time.monotonic() - since

    def times(self, number: int) -> int:
        return max(2, round(self.share * number))

    def ran(self, *words: str | Path) -> tuple[int | None, str, str]:
        """Run the command; return its exit code, what it says, and its errors."""
        code = ended(forked(words, self.said))
        return code, *(
            file.read_text(errors="replace")
            for file in (self.said, self.said.with_suffix(".errors"))
        )

    def kills(self) -> Faults:
        """Send kill -9 at random moments, and SIGTERM now and then.

        The run is resumed until it ends, and then equals the run that was left alone.
        """
        draw = random.Random(0)
        tried = 0
        life = 0
        while tried < self.times(64):
            out = self.folder / f"killed-{life}"
            life = life + 1
            for number in itertools.count():
                resumed = ["--resume"] if any(out.glob("*.json")) else []
                child = forked((*RUN, "--out", out, *resumed), self.said)
                if tried < self.times(64) and number <= 40:
                    time.sleep(draw.uniform(0.05, 0.9) * self.duration)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGTERM if draw.random() < 0.2 else signal.SIGKILL)
                code = ended(child)
                if code == 0:
                    break
                words = self.said.with_suffix(".errors").read_text(errors="replace")
                tried = tried + 1
                if (
                    code not in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM)
                    or "Traceback" in words
                ):
                    yield f"ended with {code}: {words[-200:]}"
                    break
                yield None
            if outcome(out) != outcome(self.reference):
                yield f"life {life}: it did not end as the run that was left alone"
            shutil.rmtree(out, ignore_errors=True)

    def files(self) -> Faults:
        """Flip a byte, cut one off or add one in every kind of file of a run.

        Each command ends with an exit code and one line, and what predicts, predicts as before;
        what is resumed ends as before.
        """
        draw = random.Random(3)
        picture = self.folder / "digit.png"
        run = self.folder / "damaged"
        Image.fromarray((numpy.arange(64).reshape(8, 8) * 4).astype("uint8")).save(picture)
        _, text_before, _ = self.ran("predict", self.reference, picture, "--probabilities")
        places = sorted(
            path.relative_to(self.reference) for path in self.reference.rglob("*") if path.is_file()
        )
        kinds = [kind for kind in places if kind.name != ".lock"]
        for kind, number in itertools.product(kinds, range(-(-self.times(310) // len(kinds)))):
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(self.reference, run)
            (run / kind).write_bytes(mutated((self.reference / kind).read_bytes(), draw))
            code, out, error = self.ran("predict", run, picture, "--probabilities")
            fault = ending(code, error)
            if fault is None and code == 0 and out != text_before:
                fault = "was taken for another prediction"
            if number % 6 == 0 and fault is None:
                code, _, error = self.ran(
                    *(("evaluate", run), ("compare", run, run))[number // 6 % 2]
                )
                fault = ending(code, error)
            if number % 12 == 0 and fault is None and kind.name != "result.json":
                (run / "result.json").unlink()
                code, out, error = self.ran(*RUN, "--out", run, "--resume")
                fault = ending(code, error)
                if fault is None and code == 0 and outcome(run) != outcome(self.reference):
                    lost = kind.name == "metrics.jsonl" and "damaged" in out + error
                    fault = None if lost else "was resumed to another end"
            yield None if fault is None else f"{kind}: {fault}"

    def pictures(self) -> Faults:
        """Flip, cut and add bytes in pictures of every format: each gives a tensor, or a reason."""
        draw = random.Random(4)
        path = self.folder / "picture.bin"
        rng = numpy.random.default_rng(0)
        intact, forms = [], ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
        for form, mode in itertools.product(forms, ("L", "RGB", "RGBA", "P")):
            image = Image.fromarray(
                rng.integers(0, 256, (24, 32, 4), dtype="uint8"), "RGBA"
            ).convert(mode)
            file = io.BytesIO()
            # Not every format has every mode.
            with contextlib.suppress(OSError):
                image.save(file, form)
                intact.append((f"{form} {mode}", file.getvalue()))
        for number in range(self.times(1000)):
            name, content = intact[number % len(intact)]
            path.write_bytes(mutated(content, draw, most=4))
            fault = None
            faulthandler.dump_traceback_later(HUNG, exit=True)
            try:
                x = read_image(path, size=(8, 8))
                fault = (
                    None
                    if x.shape == (3, 8, 8) and x.dtype == torch.uint8
                    else f"gave {tuple(x.shape)}"
                )
            except MetaplError:
                pass
            except BaseException as error:
                fault = f"raised {type(error).__name__}: {error}"
            faulthandler.cancel_dump_traceback_later()
            yield None if fault is None else f"{name}: {fault}"


def mutated(content: bytes, draw: random.Random, most: int = 1) -> bytes:
    """Return bytes of which some are flipped, cut off, lost or added, and never the same."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, most)):
        if not changed:
            break
        position = draw.randrange(len(changed))
        kind = draw.choice(("flip", "flip", "cut", "lose", "add"))
        if kind == "flip":
            changed[position] ^= 1 << draw.randrange(8)
        else:
            end = {"cut": len(changed), "lose": position + draw.randint(1, 16), "add": position}[
                kind
            ]
            changed[position:end] = draw.randbytes(draw.randint(1, 16)) if kind == "add" else b""
    return bytes(changed) if bytes(changed) != content else content[:-1]


def table(result: Row) -> str:
    """Return a table of what was tried how often, and how often it failed."""
    setup = result["setup"]
    rows = result["parts"]
    lines = [
        [PARTS[name], *(f"{rows[name][key]:,.0f}" for key in ("tried", "failed", "seconds"))]
        for name in rows
    ]
    return (
        f"`{setup['command']}` on {setup['cpus']} cores of {setup['processor']}, torch "
        f"{setup['torch']}, Python "
        f"{setup['python']}.\n\n{grid(['what', 'tried', 'failed', 'seconds'], lines)}"
    )


def main() -> None:
    args = parsed(arguments(__doc__, RESULT))
    torch.set_num_threads(1)
    for name in (
        "matplotlib.figure",
        "tensorboard",
        "torch._dynamo",
        "torch.utils.tensorboard.summary",
    ):
        # The import is here, and not in each forked process.
        import_module(name)
    if args.runs:
        result: Row = {"setup": {**environment(), "command": "make endurance"}, "parts": {}}
        with tempfile.TemporaryDirectory(prefix="metapl-endurance-") as folder:
            parts = Parts(Path(folder), 0.02 if args.miniature else 1.0)
            for name in PARTS:
                since = time.monotonic()
                faults = list(getattr(parts, name)())
                failures = [fault[:300] for fault in faults if fault is not None]
                counts = {
                    "tried": len(faults),
                    "failed": len(failures),
                    "seconds": time.monotonic() - since,
                }
                result["parts"][name] = {**counts, "failures": failures[:20]}
                print(name, counts, *failures[:20], sep="\n  ", file=sys.stderr, flush=True)
                write_json(args.out, result)
    show(args.write, "endurance", table(loaded(args.out)))


if __name__ == "__main__":
    main()
