"""Five arms of the papers' protocol on Fashion-MNIST, which has the size of CIFAR-10.

    python benchmarks/fashion_protocol.py --source /usr/share/datasets/fashion-mnist
    python benchmarks/fashion_protocol.py --write benchmarks/results/fashion_protocol.md
    make gpu BENCH_ARGS="--source DIR"    # one seed of WRN-28-2, all arms at once on one card

The rows ``fashion-4k`` and ``fashion-400`` of ``examples/protocols.py``: 4,000 or 400 of 60,000
pictures keep their labels, all others have none, and the test set is opened once, after the last
step. On a CPU the network is WRN-10-1, of the same blocks, in the place of WRN-28-2.

Of a million steps, the paper's warm-up has a five-hundredth and finetuning a thousandth. Of the few
that are taken here, they have a tenth and a hundredth.

The arms: the labels alone; UDA, one network with the teacher's losses; Meta Pseudo Labels with the
feedback at 0; with the exact gradient (``forward``); and by Algorithm 1, which has drawn labels in
the place of soft ones. All arms have the values of the row, none of which was tuned on this set,
and as many steps; a network that trains alone has the teacher's rate and dropout.

A row is appended when its arm has ended. An arm that was stopped goes on from its checkpoint in
``--work``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import protocol_rows
import torch
from harness import NONE, RESULTS, Row, append, grid, loaded, read, show, write_json

sys.path.insert(0, str(harness.HERE.parent / "examples"))

RAW = RESULTS / "fashion_protocol.jsonl"
DEBIAN = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist has the four files."""
PROTOCOLS = ("fashion-4k", "fashion-400")
STEPS = 1_000
SEEDS = 3
SECONDS = 105.0
"""How long all arms together may take on a card."""


@dataclass(frozen=True)
class Arm:
    """What is trained: the ending of the protocol's row, and its method."""

    ending: str
    method: str


ARMS = {
    "supervised": Arm("", "supervised"),
    "UDA": Arm("", "uda"),
    "no feedback": Arm("", "none"),
    "exact gradient": Arm("", "mpl"),
    "Algorithm 1": Arm("-paper", "mpl"),
}
NETWORKS_OF_ARM = ("teacher", "student", "finetuned")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large an arm is, beside its steps.

    Args:
        flags: further flags of the protocol that change no accuracy but by rounding, such as the
            device.
    """

    network: str
    labeled_batch: int
    unlabeled_batch: int
    precision: str = "float32"
    flags: tuple[str, ...] = ("--device", "cpu", "--num-workers", "0")

    @property
    def columns(self) -> Row:
        """Return the columns of a row that say the size."""
        return {
            "network": self.network,
            "labeled_batch": self.labeled_batch,
            "unlabeled_batch": self.unlabeled_batch,
            "precision": self.precision,
        }


ON_CPU = Size(network="wide_resnet10_1", labeled_batch=32, unlabeled_batch=96)
ON_GPU = Size(
    network="wide_resnet28_2",
    labeled_batch=64,
    unlabeled_batch=192,
    precision="bfloat16",
    flags=("--device", "cuda", "--num-workers", "0", "--channels-last"),
)
MINIATURE = Size(network="wide_resnet10_1", labeled_batch=4, unlabeled_batch=6)
# Of the pictures of noise, a hundred and few.
OF_NOISE = ("--labels-per-class", "2")


# ------------------------------------------------------------------------------------------ one arm


def train(
    protocol: str,
    arm: str,
    seed: int,
    steps: int,
    *,
    size: Size,
    source: str,
    folder: Path,
    more: Sequence[str] = (),
) -> Row:
    """Train an arm, or go on with it, and return what it reached on the test set.

    Args:
        source: the folder of the four files.
        folder: of the run. One that ended there is read, and one that was stopped goes on.
        more: further flags of the protocol.
    """
    import protocols

    words = [protocol + ARMS[arm].ending, "--method", ARMS[arm].method, "--steps", str(steps)]
    words += ["--warmup", str(max(1, steps // 10)), "--finetune-steps", str(max(1, steps // 100))]
    words += ["--save-every", str(max(1, steps // 5)), "--seed", str(seed)]
    words += ["--root", source, "--out", str(folder), "--resume"]
    words += ["--network", size.network, "--precision", size.precision]
    words += ["--labeled-batch", str(size.labeled_batch)]
    words += ["--unlabeled-batch", str(size.unlabeled_batch)]
    # Nothing is selected, so that no picture is held out.
    words += ["--validation", "0", "--validate-every", str(steps), "--training-accuracy-on", "1000"]
    goes_on = (folder / "config.json").exists()
    began = time.process_time()
    result = protocols.train(protocols.settings_of([*words, *size.flags, *more]))
    row: Row = {name: value for name, value in result.items() if name.endswith("_accuracy")}
    row |= {name: result[name] for name in ("labeled", "unlabeled", "tested_on")}
    if not goes_on:
        row["processor_seconds"] = round(time.process_time() - began)
    return row


# ----------------------------------------------------------------------------- all arms on one card


# The two lengths of the probe, in steps.
FEW = 3
PROBED = 23
# Seconds for reading the pictures, testing and writing, with five processes on the card.
RESERVE = 15.0
LEAST_STEPS = 50
PROTOCOL_ON_CARD = "fashion-4k"
# What the process of an arm runs.
TAKE_PART = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from fashion_protocol import take_part; take_part(*sys.argv[2:])"
)


@dataclass(frozen=True, kw_only=True)
class Together:
    """Arms that share a card, each in a process of its own.

    They measure accuracy and not time, so that they may slow each other. How many steps fit into
    the time is found by a probe of all arms at once, on pictures of noise, and written down: a
    later call takes as many.

    Args:
        folder: of the runs and of what the processes tell each other.
        source: the folder of the four files.
        seconds: until the processes are ended. What has not ended by then goes on in a later call.
        is_small: a miniature on the CPU, whose figures mean nothing.
    """

    folder: Path
    source: str
    seconds: float
    is_small: bool = False

    @property
    def size(self) -> Size:
        return MINIATURE if self.is_small else ON_GPU

    @property
    def plan(self) -> Path:
        """Return the file that says how many steps the arms take."""
        return self.folder / "plan.json"

    def rows(self, done: Sequence[Row]) -> Iterator[list[Row]]:
        """Yield the row of each arm when it has ended, without those that are done."""
        end = time.monotonic() + self.seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [arm for arm in ARMS if all(row.get("arm") != arm for row in done)]
        running: dict[str, subprocess.Popen[bytes]] = {}
        self.file("all", "go").unlink(missing_ok=True)
        try:
            for arm in missing:
                for stage in ("ready", "probe", "row"):
                    self.file(arm, stage).unlink(missing_ok=True)
                running[arm] = self.started(arm)
            if not self.plan.exists():
                self.wait_for(running, "ready", end)
                self.file("all", "go").touch()
                self.wait_for(running, "probe", end)
                write_in_one_piece(self.plan, {"steps": self.steps_until(end, missing)})
            for arm in self.ended(running, end):
                yield [loaded(self.file(arm, "row"))]
                missing.remove(arm)
            if missing:
                names = ", ".join(missing)
                raise RuntimeError(f"{names} had not ended; the next call goes on with them")
        finally:
            for process in running.values():
                process.kill()
                process.wait()

    def file(self, arm: str, stage: str) -> Path:
        """Return the file by which an arm says that it has come to a stage."""
        return self.folder / f"{arm.replace(' ', '_')}.{stage}.json"

    def started(self, arm: str) -> subprocess.Popen[bytes]:
        """Start the process of an arm. It ends when its standard input is closed."""
        options = [str(harness.HERE), arm, str(self.folder), self.source]
        options.append("small" if self.is_small else "full")
        command = [sys.executable, "-c", TAKE_PART, *options]
        threads = {"OMP_NUM_THREADS": "1" if self.is_small else "2"}
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | threads)

    def wait_for(self, running: dict[str, subprocess.Popen[bytes]], stage: str, end: float) -> None:
        """Wait until all arms have come to a stage; one that has failed is an error."""
        while not all(self.file(arm, stage).exists() for arm in running):
            for arm, process in running.items():
                if process.poll() is not None:
                    raise RuntimeError(f"the arm {arm} ended with {process.returncode}")
            if time.monotonic() > end:
                raise RuntimeError(f"not all arms were at {stage!r} in {self.seconds:.0f} seconds")
            time.sleep(0.05)

    def steps_until(self, end: float, arms: Sequence[str]) -> int:
        """Return how many steps the slowest arm takes in the time that is left, with a reserve.

        In the probe as in the training, quick arms end early and leave the card to the others.
        """
        slowest = max(loaded(self.file(arm, "probe"))["seconds_a_step"] for arm in arms)
        if self.is_small:
            return 2
        seconds_left = end - time.monotonic() - RESERVE
        return max(LEAST_STEPS, int(0.9 * seconds_left / slowest) // 10 * 10)

    def ended(self, running: dict[str, subprocess.Popen[bytes]], end: float) -> Iterator[str]:
        """Yield the arms as they end, until the time is over."""
        unfinished = list(running)
        while unfinished and time.monotonic() < end:
            for arm in list(unfinished):
                if running[arm].poll() is None:
                    continue
                unfinished.remove(arm)
                if self.file(arm, "row").exists():
                    yield arm
            time.sleep(0.05)

    # ------------------------------------------------------------------------- in an arm's process

    def take_part(self, arm: str) -> None:
        """Train an arm in this process, after the probe where there is no plan yet."""
        more = OF_NOISE if self.is_small else ()
        if not self.plan.exists():
            self.probe(arm)
        while not self.plan.exists():
            time.sleep(0.05)
        steps = loaded(self.plan)["steps"]
        job: Row = {"protocol": PROTOCOL_ON_CARD, "arm": arm, "seed": 0, "steps": steps}
        reached = train(
            **job,
            size=self.size,
            source=self.source,
            folder=self.folder / "runs" / arm.replace(" ", "_"),
            more=more,
        )
        row = {**job, **self.size.columns, **reached, "measured_on": harness.environment()}
        write_in_one_piece(self.file(arm, "row"), row)

    def probe(self, arm: str) -> None:
        """Measure a step of this arm while the others measure theirs, on pictures of noise."""
        noise = self.folder / f"{arm.replace(' ', '_')}.noise"
        noise.mkdir(exist_ok=True)
        protocol_rows.write_noise(noise, training=200)

        def seconds(steps: int) -> float:
            out = noise / "run"
            shutil.rmtree(out, ignore_errors=True)
            began = time.monotonic()
            train(
                PROTOCOL_ON_CARD,
                arm,
                0,
                steps,
                size=self.size,
                source=str(noise),
                folder=out,
                more=OF_NOISE,
            )
            return time.monotonic() - began

        # The first steps choose kernels.
        seconds(2)
        self.file(arm, "ready").touch()
        while not self.file("all", "go").exists():
            time.sleep(0.01)
        of_few = seconds(FEW)
        of_probed = seconds(PROBED)
        seconds_a_step = (of_probed - of_few) / (PROBED - FEW)
        rate = {"seconds_a_step": max(seconds_a_step, 1e-4)}
        write_in_one_piece(self.file(arm, "probe"), rate)


def write_in_one_piece(file: Path, value: Row) -> None:
    """Write a file that another process reads as soon as it is there."""
    unfinished = file.with_suffix(".unfinished")
    write_json(unfinished, value)
    unfinished.replace(file)


def take_part(arm: str, folder: str, source: str, size: str) -> None:
    """Train an arm in this process, among others that do the same."""
    end_with_parent()
    together = Together(folder=Path(folder), source=source, seconds=0.0, is_small=size == "small")
    together.take_part(arm)


def end_with_parent() -> None:
    """End this process when the one that started it has closed its standard input, or is killed."""

    def watch() -> None:
        # Not by sys.stdin, whose lock this thread would hold when the interpreter ends.
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ------------------------------------------------------------------------------------------- tables


def cells(rows: Sequence[Row]) -> list[str]:
    """Return what an arm reached on the test set, in percent, as the mean over its seeds."""
    columns = []
    for network in NETWORKS_OF_ARM:
        values = [row.get(f"{network}_test_accuracy") for row in rows]
        accuracies = [value for value in values if value is not None]
        columns.append(harness.spread(accuracies) if accuracies else NONE)
    return columns


def table(rows: list[Row]) -> str:
    """Return a line for each arm of each protocol and size, with the seeds that it has."""
    groups: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for row in rows:
        batches = f"{row['labeled_batch']} + {row['unlabeled_batch']}"
        group = (row["protocol"], row["network"], row["steps"], batches)
        groups.setdefault(group, {}).setdefault(row["arm"], []).append(row)
    lines = []
    for group, arms in groups.items():
        for arm in ARMS:
            if arm in arms:
                protocol, network, steps, batches = group
                head = [f"`{protocol}`", network, f"{steps:,}", batches, arm, len(arms[arm])]
                lines.append([*head, *cells(arms[arm])])
    head = ["row", "network", "steps", "batches", "arm", "seeds", *NETWORKS_OF_ARM]
    return grid(head, lines, "llrll")


# --------------------------------------------------------------------------------------------- main


def jobs(steps: int, seeds: int, protocols: Sequence[str] = PROTOCOLS) -> Iterator[Row]:
    """Yield the arms, all of a seed before the next one."""
    for seed in range(seeds):
        for protocol in protocols:
            for arm in ARMS:
                yield {"protocol": protocol, "arm": arm, "seed": seed, "steps": steps}


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument("--source", default=DEBIAN, metavar="DIR", help="the four files' folder")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each arm")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many of each arm")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/fashion_protocol"),
        metavar="DIR",
        help="where the runs are; one that was stopped goes on there",
    )
    parser.add_argument(
        "--add", type=Path, metavar="FILE", help="append the rows that make gpu left; runs nothing"
    )
    options = harness.parsed(parser)
    if options.add is not None:
        append(options.out, *loaded(options.add))
    elif options.runs:
        torch.set_num_threads(1 if options.miniature else torch.get_num_threads())
        with tempfile.TemporaryDirectory() as folder:
            if options.miniature:
                protocol_rows.write_noise(Path(folder))
                options.work = Path(folder) / "runs"
                options.source = folder
            run_missing(options)
    show(options.write, "fashion_protocol", table(read(options.out, having="arm")))


def run_missing(options: argparse.Namespace) -> None:
    """Train the arms that no row has, one after the other."""
    size = MINIATURE if options.miniature else ON_CPU
    arms = jobs(options.steps, options.seeds)
    if options.miniature:
        arms = jobs(2, 1, PROTOCOLS[:1])

    def run(**job: Any) -> Row:
        names = [str(job[name]).replace(" ", "_") for name in ("protocol", "arm", "seed", "steps")]
        reached = train(
            job["protocol"],
            job["arm"],
            job["seed"],
            job["steps"],
            size=size,
            source=options.source,
            folder=options.work / "-".join([*names, size.network]),
            more=OF_NOISE if options.miniature else (),
        )
        return reached

    sized_jobs = [{**job, **size.columns} for job in arms]
    harness.go_on(options.out, sized_jobs, run, environment=harness.environment())


if __name__ == "__main__":
    main()
