"""What a step of ``metapl train images`` takes, by its parts, beside its convolutions alone.

    python -m benchmarks.pictures.step                                   # this version
    python -m benchmarks.pictures.step --trees ../before . --ways        # two versions in turns
    python -m benchmarks.pictures.step --table

The steps are of recipes that the command tries, on grey pictures of 28 x 28: the digits of
scikit-learn, enlarged. *Mild, mixed up* is what the default takes where mild changes win: labels
alone, mixed up, with ``strided_cnn``. UDA with ``pooled_cnn`` is what it takes where strong ones
win, and has two phases: on labels alone, in the first 40 % of the steps, and with UDA. Times are of
the processor, in milliseconds; a row has the medians over rounds, in which the versions take turns,
each in a process of its own. The limit is what the same convolutions take alone, at the same
batches: those of all passes and their gradients, without pooling, norms, losses, views and whatever
else there is. ``ratio`` is a step over its limit.

``--capabilities avx2`` measures as on a processor that has no more than AVX2. ``--ways`` measures
the loss and its gradient by other ways of computing them, in the last of the trees.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.harness import (
    HERE,
    RESULTS,
    Row,
    append,
    arguments,
    grid,
    parsed,
    read,
    show,
)
from metapl.machine import processor

RAW = RESULTS / "picture_step.jsonl"
PARTS = ("views", "network", "optimizer", "averages", "bookkeeping", "whole", "limit")
SIDE = 28
LABELED = 400
UNLABELED = 1_000

# What makes torch and oneDNN take no wider instructions than these.
CAPABILITIES: dict[str, dict[str, str]] = {
    "default": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


def write_digits(folder: Path) -> None:
    """Write the digits, enlarged, into labeled/CLASS and unlabeled."""
    digits = load_digits()
    for number, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if number >= LABELED + UNLABELED:
            break
        place = folder / "labeled" / f"class{label}"
        if number >= LABELED:
            place = folder / "unlabeled"
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((values * (255 / 16)).astype(np.uint8))
        picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"{number:05}.png")


class Version:
    """A version of metapl, in a process that takes steps when it is asked to.

    Args:
        tree: a checkout of it.
        capability: one of ``CAPABILITIES``.
        threads: of the process.
        steps: that a round has.
        pictures: folder of them.
    """

    def __init__(
        self, tree: Path, capability: str, *, threads: int, steps: int, pictures: Path
    ) -> None:
        self.tree = tree.resolve()
        self.commit = commit_of(self.tree)
        self.rounds: list[Row] = []
        command = [sys.executable, str(HERE / "pictures" / "one_step.py")]
        command += ["--pictures", str(pictures), "--steps", str(steps), "--threads", str(threads)]
        settings = {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **settings, **CAPABILITIES[capability]},
            text=True,
        )

    def answer(self, order: str) -> Row:
        """Return what the process answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.tree} ended; its error is above")
        answer: Row = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def commit_of(tree: Path) -> str:
    """Return the commit of a checkout, with ``+`` where files differ from it."""
    git = ["git", "-C", str(tree)]
    asked: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
    number = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **asked).stdout.strip()
    changes = [*git, "status", "--porcelain", "--untracked-files=no"]
    return f"{number}+" if subprocess.run(changes, **asked).stdout.strip() else number


@contextmanager
def versions(
    trees: Sequence[Path], capability: str, *, threads: int, steps: int
) -> Iterator[list[Version]]:
    """Start a process for each tree, and end them with the block."""
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder))
        started = [
            Version(tree, capability, threads=threads, steps=steps, pictures=Path(folder))
            for tree in trees
        ]
        try:
            yield started
        finally:
            for version in started:
                version.close()


def rows_of(
    trees: Sequence[Path],
    capability: str,
    *,
    threads: int,
    steps: int,
    rounds: int,
    measures_ways: bool,
) -> list[Row]:
    """Measure the versions in turns; return a row for each phase of each, and for each way."""
    rows: list[Row] = []
    with versions(trees, capability, threads=threads, steps=steps) as measured:
        about: Row = {
            "command": f"python -m benchmarks.pictures.step {' '.join(sys.argv[1:])}".strip(),
            "processor": processor(),
            "rounds": rounds,
            "steps_in_a_round": steps,
        }
        facts = [version.answer("facts") for version in measured]
        for _ in range(rounds):
            for version in measured:
                version.rounds.append(version.answer("parts"))
        # Where other work keeps the machine busy, caches are colder.
        about["load"] = os.getloadavg()[0]
        for version, facts_of_version in zip(measured, facts, strict=True):
            for phase in version.rounds[0]:
                values = [answer[phase] for answer in version.rounds]
                described = {"commit": version.commit, **facts_of_version[phase], **about}
                rows.append({"phase": phase, **summary(values), **described})
        if measures_ways:
            last = measured[-1]
            answers = [last.answer("ways") for _ in range(rounds)]
            for way in answers[0]:
                times = [answer[way] for answer in answers]
                ratios = [answer[way] / answer["as it is"] for answer in answers]
                rows.append(
                    {
                        "way": way,
                        "milliseconds": statistics.median(times),
                        "over_as_it_is": statistics.median(ratios),
                        "quartiles": quartiles(ratios),
                        "commit": last.commit,
                        **facts[-1]["labels and UDA"],
                        **about,
                    }
                )
    return [rounded(row) for row in rows]


def summary(values: Sequence[Row]) -> Row:
    """Return the medians of the parts over rounds, and of a step over its limit."""
    ratios = [value["whole"] / value["limit"] for value in values]
    medians: Row = {
        part: statistics.median(value.get(part, 0.0) for value in values) for part in PARTS
    }
    return {**medians, "ratio": statistics.median(ratios), "quartiles": quartiles(ratios)}


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the first and the third quartile; of one value, the value."""
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4)
    return [first, third]


def rounded(row: Row) -> Row:
    """Return a row whose numbers have three digits behind the point."""
    short: Row = {}
    for name, value in row.items():
        short[name] = value
        if isinstance(value, float):
            short[name] = round(value, 3)
        elif name == "quartiles":
            short[name] = [round(number, 3) for number in value]
    return short


def table(rows: Sequence[Row]) -> str:
    """Return tables of the parts of steps and of the ways, in milliseconds."""
    heads = ["commit", "capability", "threads", "phase", *PARTS, "ratio"]
    lines = []
    for row in rows:
        if "phase" in row:
            numbers = [f"{row[part]:.1f}" for part in PARTS]
            about = [row["commit"][:8], row["capability"], f"{row['threads']}", row["phase"]]
            lines.append([*about, *numbers, f"{row['ratio']:.2f}"])
    tables = grid(heads, lines, "llrl")
    ways = [
        [
            row["commit"][:8],
            row["capability"],
            row["way"],
            f"{row['milliseconds']:.1f}",
            f"{row['over_as_it_is']:.2f}",
        ]
        for row in rows
        if "way" in row
    ]
    if ways:
        head = ["commit", "capability", "loss and gradient", "milliseconds", "over as it is"]
        tables += "\n\n" + grid(head, ways, "lll")
    return tables


# ----------------------------------------------------------------------------- the finding in words

MILD = "mild, mixed up"

# The share of a training's steps before UDA begins, as the command has it by default.
ALONE = 0.4


def sentences(rows: Sequence[Row]) -> list[str]:
    """Return what docs/pictures.md says of the rows.

    Of UDA before and after, for each capability; of the mild recipe; and of the ways.
    """
    said: list[str] = []
    mild_rows = [row for row in rows if row.get("phase") == MILD]
    if mild_rows:
        capabilities = " and ".join(row["capability"] for row in mild_rows)
        times = " and ".join(f"{row['whole']:.0f}" for row in mild_rows)
        ratios = " and ".join(f"{row['ratio']:.2f}" for row in mild_rows)
        said.append(
            f"On one thread a step of the mild recipe takes {times} ms ({capabilities}), {ratios} "
            "times what its convolutions take alone."
        )
    # Versions are compared where they took turns.
    rows = [row for row in rows if "way" in row or "--trees" in row["command"]]
    for capability in dict.fromkeys(row["capability"] for row in rows if "phase" in row):
        commits = dict.fromkeys(
            row["commit"] for row in rows if "phase" in row and row["capability"] == capability
        )
        of_version: list[dict[str, Row]] = []
        for commit in commits:
            of_version.append(
                {
                    row["phase"]: row
                    for row in rows
                    if "phase" in row and (row["capability"], row["commit"]) == (capability, commit)
                }
            )
        before = of_version[0]
        after = of_version[-1]
        gain = mean_step(before) / mean_step(after)
        with_uda = after["labels and UDA"]
        alone = after["labels alone"]
        # Pooling, norms, activations and losses.
        in_network = with_uda["network"] - with_uda["limit"]
        said.append(
            f"On one thread with {capability} a step with UDA takes {with_uda['whole']:.0f} ms of "
            f"the processor, {with_uda['ratio']:.2f} times what its convolutions take alone "
            f"({before['labels and UDA']['ratio']:.2f} before), and one on labels alone "
            f"{alone['whole']:.0f} ms, {alone['ratio']:.2f} times "
            f"({before['labels alone']['ratio']:.2f} before): {gain:.2f} times as many steps. "
            f"Beyond the convolutions, {in_network:.0f} ms of a step with UDA are pooling, norms, "
            f"ReLU and losses, and {with_uda['views']:.0f} ms views."
        )
    ways = {row["way"]: f"{row['over_as_it_is']:.2f}" for row in rows if "way" in row}
    if ways:
        said.append(
            "Loss and gradient take "
            f"{ways['contiguous']} times as long with tensors that are not channels-last, "
            f"{ways['compiled']} times with a compiled network, "
            f"{ways['labeled and strong in one pass']} times with labeled and strong pictures in "
            f"one pass, {ways['all in one pass']} times with the weak ones in it too, "
            f"{ways['one backward pass for each loss']} times with a backward pass for each loss, "
            f"and {ways['ReLU in place']} times with ReLU in place."
        )
    return said


def mean_step(phases: dict[str, Row]) -> float:
    """Return the mean time of a step over a training."""
    alone = phases["labels alone"]["whole"]
    with_uda = phases["labels and UDA"]["whole"]
    return float(ALONE * alone + (1 - ALONE) * with_uda)


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument(
        "--trees", nargs="+", type=Path, default=[HERE.parent], metavar="DIR", help="checkouts"
    )
    parser.add_argument("--capabilities", nargs="+", choices=CAPABILITIES, default=["default"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--steps", type=int, default=4, help="of each version in a round")
    parser.add_argument("--ways", action="store_true", help="of computing loss and gradient, too")
    options = parsed(parser)
    if options.runs:
        if options.miniature:
            options.steps = 1
            options.rounds = 2
        for threads in options.threads:
            for capability in options.capabilities:
                rows = rows_of(
                    options.trees,
                    capability,
                    threads=threads,
                    steps=options.steps,
                    rounds=options.rounds,
                    measures_ways=options.ways,
                )
                append(options.out, *rows)
    show(options.write, "picture_step", table(read(options.out)))


if __name__ == "__main__":
    main()
