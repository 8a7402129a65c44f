"""How much feedback: a raw weight or a ratio to the teacher's own losses, and what carries over between settings.

    python benchmarks/feedback_size.py                # runs, and writes results/feedback_size.json
    python benchmarks/feedback_size.py --table
    python benchmarks/feedback_size.py --write docs/results.md

The best validation accuracy of the student, mode ``forward``, on the digits: at 2 and 8 labels a class, batches of 64
and 16, and networks of two sizes, for weights and ratios over decades. Seeds are the study's tuning seeds; the test set
is not looked at.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from machine import arguments, parsed, results, show

from metapl.apps.machine.environment import environment
from metapl.apps.recipes import Digits
from metapl.training.trainer import BilevelTrainer

RAW = Path(__file__).parent / "results" / "feedback_size.json"
STEPS, SEEDS = 1000, (100, 101, 102)
MINIATURE_STEPS, MINIATURE_SEEDS = 2, (100,)
SETTINGS: dict[str, dict[str, Any]] = {
    "2 labels, batch 64, 32-32": {},
    "8 labels": {"labels_per_class": 8},
    "batch 16": {"labeled_batch": 16, "unlabeled_batch": 16},
    "128-128": {"hidden": (128, 128)},
}
SIZES: dict[str, tuple[float, ...]] = {
    "weight": (0.0, 0.3, 1.0, 3.0, 10.0, 50.0),
    "ratio": (0.01, 0.03, 0.1, 0.3, 1.0),
}


def one_run(setting: str, kind: str, size: float, seed: int, steps: int) -> dict[str, Any]:
    """The student's best validation accuracy."""
    torch.set_num_threads(1)
    recipe = Digits(seed=seed, steps=steps, log_every=steps, **SETTINGS[setting])
    method: Any = recipe.method
    torch.manual_seed(seed)
    task, teacher, student = recipe.task(), recipe.network(), recipe.network()
    trainer = BilevelTrainer(
        teacher,
        student,
        "forward",
        inner_optimizer=method.student.build(student),
        outer_optimizer=method.teacher.build(teacher),
        teacher_losses=method.teacher_losses(),
        **{f"feedback_{kind}": size},
    )
    result = trainer.fit(
        task.labeled, task.unlabeled, steps=steps, validation=task.validation, progress=False, log_every=steps
    )
    return {"setting": setting, "kind": kind, "size": size, "seed": seed, "validation": result.validation_accuracy}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean best validation accuracy in %, a row per setting."""
    columns = [(kind, size) for kind, sizes in SIZES.items() for size in sizes]
    head = [f"{kind} {size:g}" for kind, size in columns]
    lines = ["| setting | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    for setting in SETTINGS:
        cells = []
        for kind, size in columns:
            found = [r["validation"] for r in rows if (r["setting"], r["kind"], r["size"]) == (setting, kind, size)]
            cells.append(f"{100 * statistics.fmean(found):.1f}")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(out: Path, steps: int, seeds: tuple[int, ...], workers: int) -> None:
    """Every setting at every size on every seed."""
    jobs = [
        (setting, kind, size, seed, steps)
        for setting in SETTINGS
        for kind, sizes in SIZES.items()
        for size in sizes
        for seed in seeds
    ]
    rows = list(results(one_run, jobs, workers))
    content = {"made_with": environment(), "steps": steps, "seeds": seeds, "rows": rows}
    out.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = arguments(__doc__, RAW, page=True)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print the table of the file's rows and stop")
    given = parsed(parser)
    if not (given.table or given.write):
        steps, seeds = (MINIATURE_STEPS, MINIATURE_SEEDS) if given.miniature else (STEPS, SEEDS)
        run(given.out, steps, seeds, given.workers)
    show(given.write, "size", table(json.loads(given.out.read_text())["rows"]))


if __name__ == "__main__":
    main()
