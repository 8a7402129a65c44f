"""Reduced Meta Pseudo Labels: what a step costs beside full MPL and plain training, and what it reaches on the digits.

    python benchmarks/reduced.py                       # both, and writes results/reduced.json
    python benchmarks/reduced.py --write benchmarks/results/reduced.md

A step: WRN-28-2 on 16 pictures of 32 px and EfficientNet-B0 on 8 of 64 px, whose teacher is as large; SGD with Nesterov
momentum. Plain training learns the same stored labels, without a teacher; in a second row it also learns the labeled
examples, each batch with a backward pass of its own. Each measurement is a process of its own, in a drawn order; memory
is the allocator's peak beyond what lies there between steps.

The digits: the recipe's 2 labels a class, 1,500 steps and 200 of finetuning, on the 20 seeds of the digits study. The
size of Reduced MPL's feedback is chosen by validation on three other seeds; the others have the recipe's settings. The
test set is opened by the final runs alone.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from harness import NONE, RESULTS, Row
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.ablation.cost import peak_bytes
from metapl.apps.compare import Job
from metapl.apps.digits import METHODS as KNOWN
from metapl.apps.digits import Digits, fitting
from metapl.apps.networks import create
from metapl.apps.settings import replaced
from metapl.models import label_adjuster
from metapl.problems import ReducedLabels

RESULT = RESULTS / "reduced.json"
PLAIN = "plain training on stored labels"
BOTH = "plain training on stored and on given labels"
STEPS: dict[str, tuple[str, str]] = {  # method and mode
    PLAIN: ("plain", "none"),
    BOTH: ("plain", "labeled too"),
    "Reduced MPL, reinforce": ("reduced", "reinforce"),
    "Reduced MPL, difference": ("reduced", "difference"),
    "Reduced MPL, forward": ("reduced", "forward"),
    "MPL, reinforce": ("mpl", "reinforce"),
    "MPL, forward": ("mpl", "forward"),
}
CASES = {"WRN-28-2": ("wide_resnet28_2", 16, 32), "EfficientNet-B0": ("efficientnet_b0", 8, 64)}
SMALL = {"pooled_cnn": ("pooled_cnn", 4, 16)}
"""The network of a miniature."""
CLASSES = 10

METHODS = ("reduced_mpl", "reduced_none", "pseudo_labels", "mpl", "none")
TUNING = (100, 101, 102)
SEEDS = tuple(range(20))
WEIGHTS = (1.0, 3.0, 10.0, 30.0, 100.0)
READOUTS = ("student", "finetuned")


def measure(case: str, name: str, steps: int) -> Row:
    """Seconds and memory of a step of a method, and its weights, all networks together."""
    (method, mode), (network, batch, side) = STEPS[name], (CASES | SMALL)[case]
    torch.manual_seed(0)
    student = create(network, CLASSES)
    x, u = (torch.randn(batch, 3, side, side) for _ in range(2))
    y, stored = torch.randint(0, CLASSES, (batch,)), torch.rand(batch, CLASSES).softmax(-1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
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
        networks.append(label_adjuster(CLASSES) if reduced else create(network, CLASSES))
        given: Row = {"problem": ReducedLabels() if reduced else None, "inner_optimizer": optimizer}
        trainer = metapl.BilevelTrainer(networks[1], student, mode, **given, recompute_teacher=not reduced)
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


def steps_measured(miniature: bool) -> list[Row]:
    rounds, each = (1, 1) if miniature else (3, 3)
    names = (PLAIN, "Reduced MPL, reinforce") if miniature else tuple(STEPS)
    jobs = [(case, name) for case in (SMALL if miniature else CASES) for name in names] * rounds
    random.Random(0).shuffle(jobs)
    found: dict[tuple[str, str], list[Row]] = {}
    for number, job in enumerate(jobs, 1):
        found.setdefault(job, []).append(harness.apart(f"reduced.measure{(*job, each)!r}"))
        print(f"[{number}/{len(jobs)}] {job}: {found[job][-1]}", file=sys.stderr, flush=True)
    return [
        {"case": case, "name": name, **{key: statistics.median(row[key] for row in rows) for key in rows[0]}}
        for (case, name), rows in sorted(found.items())
    ]


def digits_run(method: str, seed: int, weight: float, steps: int) -> Row:
    """A run as ``metapl train digits`` does it: accuracies of the student and of the finetuned one."""
    config = Digits(fitting=fitting(seed=seed, steps=steps))
    named = replaced(KNOWN[method], feedback_weight=weight)  # of a method that has feedback
    with tempfile.TemporaryDirectory() as folder:
        content = Job(config, named.scheduled(steps), Path(folder) / "run", resume=False, threads=1).run()
    parts = ("validation", "test") if seed in SEEDS else ("validation",)
    return {f"{name}_{part}": content[f"{name}_{part}_accuracy"] for name in READOUTS for part in parts}


def digits_measured(miniature: bool) -> Row:
    """Tuning, and the final runs with the weight that it chose."""
    steps, weights = (3, WEIGHTS[:1]) if miniature else (1500, WEIGHTS)
    tuning_seeds, seeds = (TUNING[:1], SEEDS[:2]) if miniature else (TUNING, SEEDS)
    tuning, final = list[Row](), list[Row]()
    for weight in weights:
        for seed in tuning_seeds:
            tuning.append({"weight": weight, "seed": seed, **digits_run("reduced_mpl", seed, weight, steps)})
            print(f"tuning: {tuning[-1]}", file=sys.stderr, flush=True)
    best = max(weights, key=lambda weight: statistics.fmean(column_of(tuning, "student_validation", weight=weight)))
    for seed in seeds:
        for method in METHODS[: 2 if miniature else None]:
            weight = best if method == "reduced_mpl" else 1.0
            final.append({"method": method, "seed": seed, **digits_run(method, seed, weight, steps)})
            print(f"final: {final[-1]}", file=sys.stderr, flush=True)
    return {"steps": steps, "weight": best, "tuning": tuning, "final": final}


def column_of(rows: list[Row], column: str, **which: Any) -> list[float]:
    """A column of the rows that agree, in the order of the rows."""
    return [row[column] for row in rows if which.items() <= row.items()]


def table(result: Row) -> str:
    """The costs of a step, and the accuracies on the digits."""
    known = {(row["case"], row["name"]): row for row in result["steps"]}
    cases = dict.fromkeys(case for case, _ in known)
    costs, lines = list[Any](), list[Any]()
    for case, name in ((case, name) for case in cases for name in STEPS if (case, name) in known):
        row, plain = known[case, name], known[case, PLAIN]
        over = [f"{row[key] / plain[key]:.2f}" for key in ("seconds", "bytes")]
        size = [f"{1e3 * row['seconds']:.0f}", f"{row['bytes'] / 1e6:.0f}", f"{row['weights'] / 1e6:.2f}"]
        costs.append([case, name, *over, *size])
    final = result["digits"]["final"]
    own = [column_of(final, f"{name}_test", method="reduced_mpl") for name in READOUTS]
    for method in dict.fromkeys(row["method"] for row in final):
        reached = [column_of(final, f"{name}_test", method=method) for name in READOUTS]
        beside = [NONE] * 6
        if method != "reduced_mpl":
            pairs = zip(own, reached, strict=True)
            beside = [cell for a, b in pairs for cell in (*harness.difference(a, b), harness.between(a, b))]
        lines.append([KNOWN[method].title, *map(harness.spread, reached), *beside])
    head = ["network", "step", "time / plain", "memory / plain", "ms", "MB", "million weights"]
    found = ["method", *READOUTS, *(f"{name}: {what}" for name in READOUTS for what in ("difference", "p", "95 %"))]
    return f"{harness.grid(head, costs, names=2)}\n\n{harness.grid(found, lines)}"


def main() -> None:
    given = harness.parsed(harness.arguments(__doc__, RESULT))
    if given.runs:
        steps = {"measured_on": harness.described(), "steps": steps_measured(given.miniature)}
        harness.write_json(given.out, steps | {"digits": digits_measured(given.miniature)})
    harness.show(given.write, "reduced", table(harness.loaded(given.out)))


if __name__ == "__main__":
    main()
