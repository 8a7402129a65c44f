"""Reduced Meta Pseudo Labels: what a step costs beside full MPL and plain training, and what it reaches on the digits.

    python benchmarks/reduced.py                       # both, and writes results/reduced.json
    python benchmarks/reduced.py --only steps
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

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Row, arguments, described, difference, loaded, parsed, show, spread, write_json
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
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


# ---------------------------------------------------------------------------------------------------------------- steps


def step_of(case: str, name: str) -> tuple[Callable[[], Any], int]:
    """A step of a method, and its weights, all networks together."""
    import metapl
    from metapl.apps.networks import create
    from metapl.models import label_adjuster
    from metapl.problems import ReducedLabels

    method, mode = STEPS[name]
    network, batch, side = (CASES | SMALL)[case]
    torch.manual_seed(0)
    student = create(network, CLASSES)
    x, u = (torch.randn(batch, 3, side, side) for _ in range(2))
    y, stored = torch.randint(0, CLASSES, (batch,)), torch.rand(batch, CLASSES).softmax(-1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    if method == "plain":

        def plain() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(student(u), stored)
            loss.backward()
            if mode == "labeled too":
                F.cross_entropy(student(x), y).backward()
            optimizer.step()
            return loss.detach()

        return plain, _weights(student)
    teacher: nn.Module = label_adjuster(CLASSES) if method == "reduced" else create(network, CLASSES)
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        problem=ReducedLabels() if method == "reduced" else None,
        inner_optimizer=optimizer,
        recompute_teacher=method == "mpl",  # as small as full MPL gets
    )
    labeled = (x, y, stored) if method == "reduced" else (x, y)
    unlabeled: Any = (u, stored) if method == "reduced" else u
    return lambda: trainer.step(labeled, unlabeled), _weights(student) + _weights(teacher)


def _weights(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def measure(case: str, name: str, steps: int) -> Row:
    """One measurement, in the process that it is called in."""
    from metapl.ablation.cost import peak_bytes

    torch.set_num_threads(1)
    step, weights = step_of(case, name)
    for _ in range(2):
        step()
    since = time.process_time()
    for _ in range(steps):
        step()
    seconds = (time.process_time() - since) / steps
    return {"seconds": seconds, "bytes": peak_bytes(step, torch.device("cpu")), "weights": weights}


def steps_measured(miniature: bool) -> list[Row]:
    rounds, each = (1, 1) if miniature else (3, 3)
    names = (PLAIN, "Reduced MPL, reinforce") if miniature else tuple(STEPS)
    jobs = [(case, name) for case in (SMALL if miniature else CASES) for name in names] * rounds
    random.Random(0).shuffle(jobs)
    found: dict[tuple[str, str], list[Row]] = {}
    for number, (case, name) in enumerate(jobs, 1):
        code = f"import reduced; print(json.dumps(reduced.measure({case!r}, {name!r}, {each})))"
        code = f"import json, sys; sys.path.insert(0, {str(HERE)!r}); {code}"
        paths = {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | paths, capture_output=True, text=True, check=True
        )
        found.setdefault((case, name), []).append(json.loads(done.stdout.splitlines()[-1]))
        print(f"[{number}/{len(jobs)}] {case}, {name}: {found[case, name][-1]}", file=sys.stderr, flush=True)
    return [
        {"case": case, "name": name, **{key: statistics.median(row[key] for row in rows) for key in rows[0]}}
        for (case, name), rows in sorted(found.items())
    ]


# --------------------------------------------------------------------------------------------------------------- digits


def digits_run(method: str, seed: int, weight: float, steps: int) -> Row:
    """A run as ``metapl train digits`` does it: accuracies of the student and of the finetuned one."""
    from metapl.apps.compare import Job
    from metapl.apps.digits import METHODS as KNOWN
    from metapl.apps.digits import Digits, fitting
    from metapl.apps.settings import replaced

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
    tuning = []
    for weight in weights:
        for seed in tuning_seeds:
            found = digits_run("reduced_mpl", seed, weight, steps)
            tuning.append({"weight": weight, "seed": seed, **found})
            print(f"tuning: {tuning[-1]}", file=sys.stderr, flush=True)
    best = max(weights, key=lambda weight: _mean(tuning, "student_validation", weight=weight))
    final = []
    for seed in seeds:
        for method in METHODS[: 2 if miniature else None]:
            found = digits_run(method, seed, best if method == "reduced_mpl" else 1.0, steps)
            final.append({"method": method, "seed": seed, **found})
            print(f"final: {final[-1]}", file=sys.stderr, flush=True)
    return {"steps": steps, "weight": best, "tuning": tuning, "final": final}


def _mean(rows: list[Row], column: str, **which: Any) -> float:
    return statistics.fmean(column_of(rows, column, **which))


def column_of(rows: list[Row], column: str, **which: Any) -> list[float]:
    """A column of the rows that agree, in the order of the rows."""
    return [row[column] for row in rows if all(row[key] == value for key, value in which.items())]


# --------------------------------------------------------------------------------------------------------------- tables


def table(result: Row) -> str:
    """The costs of a step, and the accuracies on the digits; of what has been measured."""
    parts = [made(result[name]) for name, made in (("steps", _costs), ("digits", _accuracies)) if name in result]
    return "\n\n".join(parts)


def _costs(rows: list[Row]) -> str:
    plain = {row["case"]: row for row in rows if row["name"] == PLAIN}
    lines = [
        "| network | step | time / plain | memory / plain | ms | MB | million weights |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for case in plain:
        for name in STEPS:
            for row in (row for row in rows if (row["case"], row["name"]) == (case, name)):
                time_, memory = (row[key] / plain[case][key] for key in ("seconds", "bytes"))
                size = f"{1e3 * row['seconds']:.0f} | {row['bytes'] / 1e6:.0f} | {row['weights'] / 1e6:.2f}"
                lines.append(f"| {case} | {name} | {time_:.2f} | {memory:.2f} | {size} |")
    return "\n".join(lines)


def _accuracies(digits: Row) -> str:
    from metapl.apps.digits import METHODS as KNOWN

    final = digits["final"]
    methods = list(dict.fromkeys(row["method"] for row in final))
    seeds = len({row["seed"] for row in final})
    lines = [
        f"Test accuracy on the digits in %, {seeds} seeds, {digits['steps']:,} steps. The difference: Reduced MPL's "
        "student minus this one.",
        "",
        "| method | student | finetuned | difference | p |",
        "|---|---:|---:|---:|---:|",
    ]
    own = column_of(final, "student_test", method="reduced_mpl")
    for method in methods:
        cells = [spread(column_of(final, f"{name}_test", method=method)) for name in READOUTS]
        other = (
            ("–", "–") if method == "reduced_mpl" else difference(own, column_of(final, "student_test", method=method))
        )
        lines.append(f"| {KNOWN[method].title} | {' | '.join(cells)} | {' | '.join(other)} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, RESULT)
    parser.add_argument("--only", choices=("steps", "digits"), help="this part alone; the other stays as it was")
    given = parsed(parser)
    if given.runs:
        result: Row = loaded(given.out) if given.only and given.out.is_file() else {}
        if given.only != "digits":
            result |= {"measured_on": described(), "steps": steps_measured(given.miniature)}
        if given.only != "steps":
            result["digits"] = digits_measured(given.miniature)
        write_json(given.out, result)
    show(given.write, "reduced", table(loaded(given.out)))


if __name__ == "__main__":
    main()
