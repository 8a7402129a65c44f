"""Both sides of the README's difference over many seeds, and metapl in it without feedback.

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
from harness import NONE, RESULTS, Row, grid, interval, points, read, show

RAW = RESULTS / "readme_example.jsonl"
README = Path(__file__).parents[1] / "README.md"
SEEDS = tuple(range(60))
WITH = "with metapl"
PLAIN = "the plain loop"
# The labels that Algorithm 1 draws, and nothing else of it.
WITHOUT_FEEDBACK = "with metapl, labels drawn, no feedback"
# The mark of the lines that an arm leaves out.
ARMS = {WITH: "-", PLAIN: "+", WITHOUT_FEEDBACK: "-"}
MODE = 'mode="reinforce"'
NO_FEEDBACK = 'mode="none", problem=metapl.PseudoLabels(kind="hard")'


def run(arm: str, seed: int) -> Row:
    """Return the accuracy that an arm prints."""
    torch.set_num_threads(1)
    (block,) = re.findall(r"^```diff\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line[1:] for line in block.splitlines() if not line.startswith(ARMS[arm])]
    code = "\n".join(lines).replace("manual_seed(0)", f"manual_seed({seed})").replace(".2f", ".6f")
    if arm == WITHOUT_FEEDBACK:
        assert MODE in code, "the example names its mode"
        code = code.replace(MODE, NO_FEEDBACK)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"__name__": "readme"})
    return {"accuracy": float(printed.getvalue())}


def table(rows: list[Row]) -> str:
    """Return the mean of each arm, and paired differences to the first."""
    accuracies = {
        arm: [
            row["accuracy"]
            for row in sorted(rows, key=lambda row: row["seed"])
            if row["arm"] == arm
        ]
        for arm in ARMS
    }
    ours = accuracies[WITH]
    lines = []
    for arm, values in accuracies.items():
        gain = NONE
        if arm != WITH:
            percents = [[100 * value for value in of_arm] for of_arm in (ours, values)]
            gain = interval(*percents, form="+.2f")
        lines.append([arm, f"{points(values):.1f}", gain])
    return grid(["arm", f"test accuracy in %, {len(ours)} seeds", "with metapl minus it"], lines)


def main() -> None:
    args = harness.parsed(harness.arguments(__doc__, RAW))
    if args.runs:
        seeds = SEEDS[:2] if args.miniature else SEEDS
        jobs: list[Row] = [{"arm": arm, "seed": seed} for seed in seeds for arm in ARMS]
        harness.go_on(args.out, jobs, run, environment=harness.environment())
    show(args.write, "readme_example", table(read(args.out, having="arm")))


if __name__ == "__main__":
    main()
