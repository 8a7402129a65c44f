"""Accuracy on labeled pictures in training: MPL's two networks, supervised learning (Figure 4).

    python examples/protocols.py cifar10-4k --root data/ --out runs/mpl
    python examples/protocols.py cifar10-4k --root data/ --out runs/supervised --method supervised
    python examples/training_accuracy.py runs/mpl runs/supervised --out training_accuracy.png

Each run of protocols.py records these accuracies in its metrics.jsonl. The paper's figure shows
teacher and student of MPL below supervised learning, which it reads as less overfitting.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metapl.errors import MetaplError

TITLES = {
    "mpl": "MPL",
    "none": "no feedback",
    "reduced_mpl": "Reduced MPL",
    "reduced_none": "stored labels",
}


def curves_of(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return the curves of a run by their names.

    Steps, and accuracies on the labeled pictures as fractions.
    """
    for name in ("config.json", "metrics.jsonl"):
        if not (run / name).exists():
            raise MetaplError(
                f"there is no {run / name}; expected the folder of a run of protocols.py."
            )
    method = json.loads((run / "config.json").read_text())["method"]
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    curves = {}
    for role in ("teacher", "student"):
        measured = [
            row for row in rows if row["phase"] == "fit" and f"{role}_training_accuracy" in row
        ]
        if not measured:
            continue
        # A network that trains alone is no student of a teacher.
        title = f"{TITLES[method]}, {role}" if method in TITLES else method
        curves[title] = (
            [row["step"] for row in measured],
            [row[f"{role}_training_accuracy"] for row in measured],
        )
    if not curves:
        raise MetaplError(
            f"{run} has no accuracy on labeled pictures; expected a run of protocols.py that has "
            "begun."
        )
    return curves


def draw(runs: list[Path], out: Path) -> None:
    """Draw the curves of several runs into one figure."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for run in runs:
        for title, (steps, accuracies) in curves_of(run).items():
            axes.plot(steps, [100 * accuracy for accuracy in accuracies], label=title)
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy on labeled training pictures, %")
    axes.legend()
    figure.savefig(out, dpi=150)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("training_accuracy.png"), metavar="FILE")
    args = parser.parse_args(words)
    try:
        draw(args.runs, args.out)
    except MetaplError as error:
        print(f"training_accuracy.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
