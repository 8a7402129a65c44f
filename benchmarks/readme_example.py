"""Both sides of the README's difference over many seeds: the plain loop, and metapl in it.

    python benchmarks/readme_example.py     # two minutes of a core; goes on
    python benchmarks/readme_example.py --write benchmarks/results/readme_example.md

The code is read from README.md and run as it stands, with another seed.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import harness
import torch
from harness import RESULTS, Row, grid, interval, points, read, show

RAW = RESULTS / "readme_example.jsonl"
README = Path(__file__).parents[1] / "README.md"
SEEDS = tuple(range(60))
# The mark of the lines that an arm leaves out.
ARMS = {"with metapl": "-", "the plain loop": "+"}


def run(arm: str, seed: int) -> Row:
    """Return the accuracy that an arm prints."""
    torch.set_num_threads(1)
    (block,) = re.findall(r"^```diff\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line[1:] for line in block.splitlines() if not line.startswith(ARMS[arm])]
    code = "\n".join(lines).replace("manual_seed(0)", f"manual_seed({seed})").replace(".2f", ".6f")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"__name__": "readme"})
    return {"accuracy": float(printed.getvalue())}


def table(rows: list[Row]) -> str:
    """Return the mean of each arm, and the paired difference."""
    accuracies = {
        arm: [
            row["accuracy"]
            for row in sorted(rows, key=lambda row: row["seed"])
            if row["arm"] == arm
        ]
        for arm in ARMS
    }
    ours, plain = accuracies.values()
    gain = interval([100 * value for value in ours], [100 * value for value in plain], form="+.1f")
    lines = [[arm, f"{points(values):.1f}"] for arm, values in accuracies.items()]
    lines.append(["*with metapl − the plain loop*", gain])
    return grid(["test accuracy in %", f"{len(plain)} seeds"], lines)


def main() -> None:
    args = harness.parsed(harness.arguments(__doc__, RAW))
    if args.runs:
        seeds = SEEDS[:2] if args.miniature else SEEDS
        jobs: list[Row] = [{"arm": arm, "seed": seed} for seed in seeds for arm in ARMS]
        harness.go_on(args.out, jobs, run, environment=harness.environment())
    show(args.write, "readme_example", table(read(args.out, having="arm")))


if __name__ == "__main__":
    main()
