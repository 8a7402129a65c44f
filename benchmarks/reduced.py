"""Reduced Meta Pseudo Labels: what a step costs beside full MPL and plain training.

    python benchmarks/reduced.py                       # goes on where it was stopped
    python benchmarks/reduced.py --write benchmarks/results/reduced.md

A step: WRN-28-2 on 16 pictures of 32 px and EfficientNet-B0 on 8 of 64 px, whose teacher is as
large; SGD with Nesterov momentum. Plain training learns the same stored labels, without a teacher;
in a second row it also learns the labeled examples, each batch with a backward pass of its own.
Each measurement is the median of three processes of its own, in a drawn order; memory is the
allocator's peak beyond what lies there between steps.

What it reaches on the digits stands in rows of the script at commit 28029287: 2 labels a class,
1,500 steps and 200 of finetuning, on the 20 seeds of the digits study. The size of Reduced MPL's
feedback was chosen by validation on three other seeds; the others have the command's settings. The
test set was opened by the final runs alone.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import harness
import torch
from harness import NONE, RESULTS, Row
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.ablation.cost import peak_bytes
from metapl.apps.digits import METHODS
from metapl.models import LabelAdjuster
from metapl.networks import create
from metapl.problems import ReducedLabels

RAW = RESULTS / "reduced.jsonl"
PLAIN = "plain training on stored labels"
BOTH = "plain training on stored and on given labels"
# Each has a method and a mode.
STEPS: dict[str, tuple[str, str]] = {
    PLAIN: ("plain", "none"),
    BOTH: ("plain", "labeled too"),
    "Reduced MPL, reinforce": ("reduced", "reinforce"),
    "Reduced MPL, difference": ("reduced", "difference"),
    "Reduced MPL, forward": ("reduced", "forward"),
    "MPL, reinforce": ("mpl", "reinforce"),
    "MPL, forward": ("mpl", "forward"),
}
CASES = {"WRN-28-2": ("wide_resnet28_2", 16, 32), "EfficientNet-B0": ("efficientnet_b0", 8, 64)}
# The case of a miniature.
SMALL = {"pooled_cnn": ("pooled_cnn", 4, 16)}
CLASSES = 10
READOUTS = ("student", "finetuned")


def measure(case: str, name: str, steps: int) -> Row:
    """Return a step's seconds and memory by a method, and its weights, all networks together."""
    (method, mode), (network, batch, side) = STEPS[name], (CASES | SMALL)[case]
    torch.manual_seed(0)
    student = create(network, CLASSES)
    x, u = (torch.randn(batch, 3, side, side) for _ in range(2))
    y = torch.randint(0, CLASSES, (batch,))
    stored = torch.rand(batch, CLASSES).softmax(-1)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    networks: list[nn.Module] = [student]

    def plain() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(student(u), stored)
        loss.backward()
        if mode == "labeled too":
            F.cross_entropy(student(x), y).backward()
        optimizer.step()
        return loss.detach()

    step: Callable[[], Any] = plain
    if method != "plain":
        reduced = method == "reduced"
        networks.append(LabelAdjuster(CLASSES) if reduced else create(network, CLASSES))
        options: Row = {
            "problem": ReducedLabels() if reduced else None,
            "inner_optimizer": optimizer,
        }
        trainer = metapl.BilevelTrainer(
            networks[1], student, mode, **options, recompute_teacher=not reduced
        )
        batches: Any = ((x, y, stored), (u, stored)) if reduced else ((x, y), u)

        def step() -> Any:
            return trainer.step(*batches)

    for _ in range(2):
        step()
    since = time.process_time()
    for _ in range(steps):
        step()
    seconds = (time.process_time() - since) / steps
    weights = sum(p.numel() for network in networks for p in network.parameters())
    return {"seconds": seconds, "bytes": peak_bytes(step, torch.device("cpu")), "weights": weights}


def step_of(case: str, name: str, turns: int) -> Row:
    """Return the medians of :func:`measure` in processes of its own."""
    rows = [harness.apart(f"reduced.measure{(case, name, turns)!r}") for _ in range(turns)]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def table(rows: Sequence[Row]) -> str:
    """Return tables of the costs of a step, and of the accuracies on the digits."""
    rows_by_name = {(row["case"], row["name"]): row for row in rows if "case" in row}
    cases = sorted({case for case, _ in rows_by_name})
    costs = list[Any]()
    lines = list[Any]()
    for case, name in (
        (case, name) for case in cases for name in STEPS if (case, name) in rows_by_name
    ):
        row = rows_by_name[case, name]
        plain = rows_by_name[case, PLAIN]
        over = [f"{row[key] / plain[key]:.2f}" for key in ("seconds", "bytes")]
        size = [
            f"{1e3 * row['seconds']:.0f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['weights'] / 1e6:.2f}",
        ]
        costs.append([case, name, *over, *size])
    final = [row for row in rows if row.get("final")]

    def column(method: str) -> list[list[float]]:
        return [
            [row[f"{name}_test"] for row in final if row["method"] == method] for name in READOUTS
        ]

    of_reduced_mpl = column("reduced_mpl")
    for method in dict.fromkeys(row["method"] for row in final):
        reached = column(method)
        beside = [NONE] * 6
        if method != "reduced_mpl":
            pairs = zip(of_reduced_mpl, reached, strict=True)
            beside = [
                cell
                for a, b in pairs
                for cell in (*harness.difference(a, b), harness.between(a, b))
            ]
        lines.append([METHODS[method].title, *map(harness.spread, reached), *beside])
    head = ["network", "step", "time / plain", "memory / plain", "ms", "MB", "million weights"]
    about = [
        "method",
        *READOUTS,
        *(f"{name}: {figure}" for name in READOUTS for figure in ("difference", "p", "95 %")),
    ]
    return "\n\n".join(
        [harness.grid(head, costs, names=2), *([harness.grid(about, lines)] if lines else [])]
    )


def main() -> None:
    args = harness.parsed(harness.arguments(__doc__, RAW))
    if args.runs:
        turns, cases = (1, SMALL) if args.miniature else (3, CASES)
        names = (PLAIN, "Reduced MPL, reinforce") if args.miniature else STEPS
        jobs = list(harness.every(case=tuple(cases), name=tuple(names)))
        random.Random(0).shuffle(jobs)
        harness.go_on(
            args.out, jobs, partial(step_of, turns=turns), measured_on=harness.environment()
        )
    harness.show(args.write, "reduced", table(harness.read(args.out)))


if __name__ == "__main__":
    main()
