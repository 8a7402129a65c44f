"""What an eager step costs beside an earlier commit's: passes, memory, first step and time.

    python benchmarks/before_and_after.py --before FOLDER    # a quarter of an hour of a core
    python benchmarks/before_and_after.py --write benchmarks/results/before_and_after.md

FOLDER is a checkout of the earlier commit. A row is one commit, network, mode and number of student
steps a lookahead, in a process of its own; the two commits take turns, in three rounds. A row has
the passes of a steady step, by its floating-point operations over those of the student's pass
forward on a batch; the bytes that it holds at its fullest beyond what was held before; the
processor seconds of the first step, verification and all; and the milliseconds of a steady one, the
median of 15. Both networks learn by SGD with Nesterov momentum, on one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import compile_cost
import harness
import torch
from compile_cost import NETWORKS
from harness import Row
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
BEFORE = "28 November"
NOW = "now"
# The modes by the student steps that they look ahead; the others take one alone.
MODES = {1: ("reinforce", "forward", "unrolled", "difference"), 10: ("forward", "unrolled")}
CASES = [(lookahead, mode) for lookahead, modes in MODES.items() for mode in modes]
ROUNDS = 3
STEPS = 15
# What stands in a cell: the row's name, how it is written, and by how much it is divided.
COLUMNS = {
    "passes": ("passes", "{:.1f}", 1.0),
    "peak_bytes": ("memory, MB", "{:.2f}", 1e6),
    "first_s": ("first step, s", "{:.2f}", 1.0),
    "ms": ("ms a step", "{:.2f}", 1.0),
}


def measured(network: str, mode: str, lookahead: int, steps: int) -> Row:
    """Return the figures of the commit that this process imports."""
    import metapl
    from metapl.ablation.cost import flops, peak_bytes

    torch.set_num_threads(1)

    def step_of(name: str, lookahead: int) -> tuple[nn.Module, Tensor, Callable[[], Any]]:
        """Return a student, its batch and the step of a trainer of it."""
        torch.manual_seed(0)
        teacher, student = NETWORKS[name].make(), NETWORKS[name].make()
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            mode=mode,
            inner_optimizer=compile_cost.optimizer(student),
            outer_optimizer=compile_cost.optimizer(teacher),
            lookahead=lookahead,
        )
        outer, inner = compile_cost.batches(name)
        batches: Any = inner if lookahead == 1 else metapl.Lookahead((inner,) * lookahead)
        return student, inner, lambda: trainer.step(outer, batches)

    # What the first step of all imports belongs to neither commit.
    step_of("mlp", 1)[-1]()
    student, inputs, step = step_of(network, lookahead)
    first = compile_cost.seconds(step)
    step()
    row: Row = {
        "first_s": first,
        "passes": flops(step) / flops(lambda: student(inputs)),
        "peak_bytes": peak_bytes(step, torch.device("cpu")),
    }
    times = list[float]()
    for _ in range(steps):
        begun = time.process_time()
        step()
        times.append(1e3 * (time.process_time() - begun))
    return row | {"ms": statistics.median(times)}


def table(rows: list[Row]) -> str:
    """Return a line for each network, mode and lookahead: medians before, now, and their ratio."""
    lines = []
    for network, (lookahead, mode) in product(NETWORKS, CASES):
        cells = list[str]()
        for column, (_, form, unit) in COLUMNS.items():
            before, now = (
                [
                    row[column] / unit
                    for row in rows
                    if (row["network"], row["lookahead"], row["mode"], row["commit"])
                    == (network, lookahead, mode, commit)
                ]
                for commit in (BEFORE, NOW)
            )
            if not before or not now:
                break
            medians = statistics.median(before), statistics.median(now)
            cells.append(", ".join(form.format(median) for median in medians))
            cells.append(f"{medians[1] / medians[0]:.2f}")
        else:
            lines.append([NETWORKS[network].title, str(lookahead), f"`{mode}`", *cells])
    head = ["network", "K", "mode"]
    for title, _, _ in COLUMNS.values():
        head += [f"{title}: before, now", "ratio"]
    return harness.grid(head, lines, names=3)


def main() -> None:
    parser = harness.arguments(__doc__, harness.RESULTS / "before_and_after.jsonl")
    parser.add_argument("--before", type=Path, help="checkout of the earlier commit")
    parser.add_argument("--worker", nargs=4, help="network, mode, lookahead and steps of one row")
    args = harness.parsed(parser)
    if args.worker:
        network, mode, lookahead, steps = args.worker
        print(json.dumps(measured(network, mode, int(lookahead), int(steps))))
        return

    def run(*, network: str, mode: str, lookahead: int, commit: str, round: int) -> Row:
        folder = args.before if commit == BEFORE else ROOT
        steps = 2 if args.miniature else STEPS
        words = [sys.executable, __file__, "--worker", network, mode, str(lookahead), str(steps)]
        done = subprocess.run(
            words,
            env=dict(os.environ) | {"PYTHONPATH": str(folder)},
            check=True,
            capture_output=True,
            text=True,
        )
        row: Row = json.loads(done.stdout.splitlines()[-1])
        return row

    if args.runs:
        if args.miniature:
            args.before = args.before or ROOT
        if args.before is None:
            parser.error("--before FOLDER is missing: a checkout of the commit to compare with")
        networks = ["mlp"] if args.miniature else [*NETWORKS]
        jobs = [
            {
                "network": network,
                "mode": mode,
                "lookahead": lookahead,
                "commit": commit,
                "round": round,
            }
            for round, network, (lookahead, mode), commit in product(
                range(1 if args.miniature else ROUNDS), networks, CASES, (BEFORE, NOW)
            )
        ]
        harness.go_on(args.out, jobs, run, environment=harness.environment())
    harness.show(args.write, "before_and_after", table(harness.read(args.out, "commit")))


if __name__ == "__main__":
    main()
