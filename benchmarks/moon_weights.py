"""On how many weights of the feedback does the result on two moons rest? Six labels, 32 seeds.

    python benchmarks/moon_weights.py --workers 2    # goes on; some ten minutes of one core
    python benchmarks/moon_weights.py --write benchmarks/results/two_moons.md

What the paper states: two hidden layers of 8 sigmoid units, initial weights uniform in ±0.1, 2,000
points, 3 of each moon labeled, SGD at the constant rate 0.1. What it does not: moons of
scikit-learn with noise 0.1, 12,000 steps, 32 unlabeled points and all six labels in a batch. The
teacher learns the labels by cross-entropy and, at each weight, by the feedback of the exact
gradient, of Algorithm 1 (the dot product times the mean), of its cosine, and of the cosine less a
moving average; or by the feedback alone. All seeds take one stacked pure step; arms see the same
points from the same weights. A run succeeds if its student classifies more than 95 % of the points
as they were drawn.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import harness
import numpy as np
import torch
from harness import RESULTS, Row, grid, read, show
from torch import Tensor, nn
from when import Stacked

import metapl
from metapl.feedback import Estimator, Forward, NoFeedback, Reinforce
from metapl.metrics import interval

RAW = RESULTS / "two_moons_weights.jsonl"
SEEDS = tuple(range(100, 132))
STEPS = 12_000
BATCH = 32
RATE = 0.1
SCALE = 0.1
CHUNK = 200
"""Steps whose points and labels are drawn at once."""
SUCCESS = 0.95

ESTIMATORS: dict[str, Estimator] = {
    "forward": Forward(),
    "dot": Reinforce(),
    "cosine": Reinforce(similarity="cosine"),
    "cosine, baseline": Reinforce(similarity="cosine", baseline=0.99),
    "none, soft labels": NoFeedback(),
    "none, hard labels": NoFeedback(),
}
TITLES = {
    "forward": "the exact gradient",
    "dot": "Algorithm 1: dot, mean",
    "cosine": "cosine, mean",
    "cosine, baseline": "the authors' form: cosine, mean, baseline 0.99",
    "none, soft labels": "no feedback, soft labels",
    "none, hard labels": "no feedback, hard labels",
}
SOFT = ("forward", "none, soft labels")

ARMS: tuple[Row, ...] = (
    *(
        {"form": name, "weight": 0.0, "own_loss": True}
        for name in ("none, soft labels", "none, hard labels")
    ),
    *(
        {"form": "forward", "weight": weight, "own_loss": True}
        for weight in (1.0, 10.0, 100.0, 1000.0)
    ),
    *({"form": "dot", "weight": weight, "own_loss": True} for weight in (1.0, 32.0, 1000.0)),
    *({"form": "cosine", "weight": weight, "own_loss": True} for weight in (1.0, 10.0, 32.0)),
    *({"form": "cosine, baseline", "weight": weight, "own_loss": True} for weight in (1.0, 10.0)),
    *({"form": "forward", "weight": weight, "own_loss": False} for weight in (1.0, 100.0)),
    {"form": "dot", "weight": 32.0, "own_loss": False},
    {"form": "cosine", "weight": 1.0, "own_loss": False},
)


def network(seed: int) -> nn.Module:
    """Return a network as it begins, all its weights uniform in ±0.1."""
    module = nn.Sequential(
        nn.Linear(2, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(SCALE * (2 * torch.rand(p.shape, generator=generator) - 1))
    return module


def points(seed: int) -> tuple[Tensor, Tensor]:
    """Return 2,000 points in random order, but three of each moon first, and their moons."""
    from sklearn.datasets import make_moons

    x, y = make_moons(2000, noise=0.1, random_state=seed)
    few = np.concatenate([np.flatnonzero(y == moon)[:3] for moon in (0, 1)])
    order = np.concatenate([few, np.setdiff1d(np.arange(len(y)), few)])
    return torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order])


def draws(seeds: tuple[int, ...], x: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each step's unlabeled points (S, B, 2), and the Gumbel noise (S, B, 2) of labels."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = torch.arange(len(seeds))[:, None]
    for first in range(0, steps, CHUNK):
        count = min(CHUNK, steps - first)
        places = [
            torch.randint(6, x.shape[1], (count, BATCH), generator=generator)
            for generator in generators
        ]
        uniform = [torch.rand(count, BATCH, 2, generator=generator) for generator in generators]
        gumbel = torch.stack(uniform, 1).clamp_min(1e-20).log().neg().log().neg()
        for place, noise in zip(torch.stack(places, 1), gumbel, strict=True):
            yield x[rows, place], noise


def trainer(form: str, weight: float, own_loss: bool, seed: int) -> metapl.BilevelTrainer:
    teacher = network(2 * seed)
    student = network(2 * seed + 1)
    size: dict[str, Any] = {} if form.startswith("none") else {"feedback_weight": weight}
    return metapl.BilevelTrainer(
        teacher,
        student,
        ESTIMATORS[form],
        problem=metapl.PseudoLabels(kind="soft" if form in SOFT else "hard"),
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=RATE),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=RATE),
        teacher_losses=(metapl.CrossEntropy(),) if own_loss else (),
        verify=False,
        **size,
    )


@torch.no_grad()
def run(form: str, weight: float, own_loss: bool, miniature: bool) -> Row:
    """Train all seeds of an arm; read the student's and the teacher's accuracy on all points."""
    torch.set_num_threads(1)
    seeds = SEEDS[:2] if miniature else SEEDS
    steps = 3 if miniature else STEPS
    x, y = map(torch.stack, zip(*map(points, seeds), strict=True))
    stack = Stacked(
        [trainer(form, weight, own_loss, seed) for seed in seeds], compiled=not miniature
    )
    labeled = x[:, :6], y[:, :6]
    for unlabeled, noise in draws(seeds, x, steps):
        stack.step(labeled, unlabeled, 1.0, noise=None if form in SOFT else noise)
    row: Row = {"seeds": list(seeds), "steps": steps}
    for role, state in (("student", stack.state.student), ("teacher", stack.state.teacher)):
        right = stack.outputs(x, state.params).argmax(-1) == y
        row[role] = [round(float(share), 4) for share in right.double().mean(1)]
    return row


def table(rows: list[Row]) -> str:
    """Return a row for each arm."""
    lines = []
    for arm in ARMS:
        row = next((row for row in rows if arm.items() <= row.items()), None)
        if row is None:
            continue
        successes = sum(share > SUCCESS for share in row["student"])
        low, high = (100 * end for end in interval(successes, len(row["student"])))
        learns = "labels and feedback" if arm["own_loss"] else "feedback alone"
        weight = "–" if arm["form"].startswith("none") else f"{arm['weight']:g}"
        median = f"{100 * statistics.median(row['student']):.1f}"
        rate = f"{successes} of {len(row['student'])} ({low:.0f}–{high:.0f})"
        lines.append([TITLES[arm["form"]], learns, weight, rate, median])
    head = [
        "feedback",
        "the teacher learns from",
        "weight",
        "runs that succeed",
        "median accuracy, %",
    ]
    return grid(head, lines, names=2)


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument("--workers", type=int, default=1, help="arms at a time")
    args = harness.parsed(parser)
    if args.runs:
        print(f"{len(ARMS)} arms: some {len(ARMS) / 2:.0f} minutes of one core", flush=True)
        about = {"made_with": harness.environment()}
        harness.go_on(args.out, ARMS, partial(run, miniature=args.miniature), args.workers, **about)
        return
    show(args.write, "moon-weights", table(read(args.out, "form")))


if __name__ == "__main__":
    main()
