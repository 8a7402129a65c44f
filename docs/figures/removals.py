"""Draw what one whole training says about its examples, beside trainings without them.

    python docs/figures/removals.py           # train, write removals.json, draw docs/removals.svg
    python docs/figures/removals.py --draw    # draw what removals.json has

A perceptron learns 1,000 digits by 500 steps of SGD at a rate that falls to zero. One backward pass
through all of the steps predicts how much the loss on 797 other digits changes without 10 or 50 of
the examples. Then the network is trained again without each of these sets.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROWS = FOLDER / "removals.json"
FIGURE = FOLDER.parent / "removals.svg"

STEPS = 500
EXAMPLES = 1000
SIZES = (10, 50)
REMOVALS = 20

WIDTH = 640
HEIGHT = 420
LEFT = 92
RIGHT = 24
TOP = 44
BOTTOM = 62
COLORS = {10: "#3f51b5", 50: "#e07b39"}


def measure() -> dict[str, Any]:
    """Train, attribute, and train again without each set of examples."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    import metapl

    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32)
    y = torch.tensor(y)
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.03, momentum=0.9)
    rates = 0.03 * (1 - torch.arange(float(STEPS))[:, None] / STEPS)
    found = metapl.attribute(
        student,
        (x[:EXAMPLES], y[:EXAMPLES]),
        (x[EXAMPLES:], y[EXAMPLES:]),
        optimizer=optimizer,
        steps=STEPS,
        batch_size=100,
        settings={"lr": rates},
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    sets = []
    for size in SIZES:
        generator = torch.Generator().manual_seed(size)
        scores = []
        for _ in range(REMOVALS):
            removed = torch.randperm(EXAMPLES, generator=generator)[:size]
            scores.append(removed)
        agreement = found.validate(scores, progress=False)
        sets.append(
            {
                "removed": size,
                "spearman": round(agreement.spearman, 4),
                "predicted": [round(value, 6) for value in agreement.predicted.tolist()],
                "retrained": [round(value, 6) for value in agreement.retrained.tolist()],
            }
        )
    return {
        "metapl": metapl.__version__,
        "torch": torch.__version__,
        "processor": platform.machine(),
        "steps": STEPS,
        "loss": round(float(found.outer_loss), 6),
        "sets": sets,
    }


def ticks(lowest: float, highest: float, step: float) -> list[float]:
    """Return the multiples of a step between two numbers."""
    first = int(lowest / step) - 1
    last = int(highest / step) + 1
    values = [number * step for number in range(first, last + 1)]
    return [value for value in values if lowest <= value <= highest]


def drawing(rows: dict[str, Any]) -> str:
    """Return an SVG with a mark for each set: the predicted change across, the real one up."""
    values = [0.0]
    for row in rows["sets"]:
        values += row["predicted"] + row["retrained"]
    spread = max(values) - min(values)
    lowest = min(values) - 0.06 * spread
    highest = max(values) + 0.06 * spread

    def across(value: float) -> float:
        return LEFT + (value - lowest) / (highest - lowest) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (value - lowest) / (highest - lowest) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, Helvetica, Arial, DejaVu Sans, sans-serif" '
        'font-size="13" fill="#333">',
        "<title>Predicted and real changes of the loss without sets of examples</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>',
    ]
    step = 10.0 ** (len(str(int(1 / spread))) * -1)
    if spread / step > 12:
        step *= 2
    elif spread / step < 4:
        step /= 2
    for value in ticks(lowest, highest, step):
        x = f"{across(value):.1f}"
        y = f"{up(value):.1f}"
        label = f"{value:+.3f}" if abs(value) > step / 2 else "0"
        parts += [
            f'<path d="M{x} {TOP}V{HEIGHT - BOTTOM}M{LEFT} {y}H{WIDTH - RIGHT}" '
            'stroke="#e3e5ea" fill="none"/>',
            f'<text x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{label}</text>',
            f'<text x="{LEFT - 8}" y="{up(value) + 4:.1f}" text-anchor="end">{label}</text>',
        ]
    parts.append(
        f'<path d="M{across(lowest):.1f} {up(lowest):.1f}L{across(highest):.1f} {up(highest):.1f}" '
        'stroke="#8a8f99" stroke-dasharray="5 4"/>'
    )
    for number, row in enumerate(rows["sets"]):
        color = COLORS[row["removed"]]
        for predicted, retrained in zip(row["predicted"], row["retrained"], strict=True):
            parts.append(
                f'<circle cx="{across(predicted):.1f}" cy="{up(retrained):.1f}" r="4.5" '
                f'fill="{color}" fill-opacity="0.75"/>'
            )
        legend = 48 + 296 * number
        parts += [
            f'<circle cx="{legend}" cy="24" r="5" fill="{color}"/>',
            f'<text x="{legend + 12}" y="28">without {row["removed"]} digits: '
            f"rank correlation {row['spearman']:.2f}</text>",
        ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts += [
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 16}" text-anchor="middle">'
        "change of the loss as one pass through the training predicts it</text>",
        f'<text transform="translate(18 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        "change in a training without them</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draw", action="store_true", help="draw what removals.json has")
    arguments = parser.parse_args()
    if not arguments.draw:
        ROWS.write_text(json.dumps(measure(), indent=1) + "\n")
    FIGURE.write_text(drawing(json.loads(ROWS.read_text())))


if __name__ == "__main__":
    main()
