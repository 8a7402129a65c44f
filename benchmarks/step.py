"""What a step costs beside another checkout and beside Algorithm 1 written by hand, taking turns in one run.

    python benchmarks/step.py                              # every mode on a tiny network and on WRN-28-2
    python benchmarks/step.py --against ../other-checkout  # and the same by the metapl of that checkout
    python benchmarks/step.py --only mlp --turns 9         # or wrn; the rows of the other network stay
    python benchmarks/step.py --table benchmarks/results/step.json
    python benchmarks/step.py --write docs/modes.md

Times are of the processor, on one thread, the median over turns of the mean over some steps. Figures of one run are
comparable, those of two runs are not. Peak memory is what a step of WRN-28-2 holds beyond what was held before it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import arguments, described, parsed, write_between_marks, write_json
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
RESULT = HERE / "results" / "step.json"
BY_HAND = "Algorithm 1 by hand"
CASES = ("mlp", "wrn")
AHEAD = (1, 5, 10)
BATCH = 32

Row = dict[str, Any]


def networks(name: str) -> tuple[nn.Module, nn.Module, Any, Tensor]:
    """Teacher, student, a labeled and an unlabeled batch."""
    import metapl

    torch.manual_seed(0)
    if name == "mlp":
        teacher, student = (nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)) for _ in range(2))
        return teacher, student, (torch.randn(32, 16), torch.randint(0, 4, (32,))), torch.randn(32, 16)
    student = metapl.models.wide_resnet28_2(num_classes=10)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    pictures, more = (torch.randn(BATCH, 3, 32, 32) for _ in range(2))
    return teacher, student, (pictures, torch.randint(0, 10, (BATCH,))), more


def optimizer(name: str, network: nn.Module) -> torch.optim.Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(network.parameters(), lr=1e-3)
    return torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def by_hand(teacher: nn.Module, student: nn.Module, kind: str) -> Any:
    """Algorithm 1 as one would write it for one pair of networks, by the loss difference's first-order form, checks
    and all else left out: two passes of the student, h from ⟨∇L(θ′), g⟩, one pass of the teacher."""
    inner, outer = optimizer(kind, student), optimizer(kind, teacher)

    def step(labeled: Any, unlabeled: Tensor) -> None:
        logits = teacher(unlabeled)
        labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        inner.zero_grad()
        F.cross_entropy(student(unlabeled), labels).backward()
        g = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        inner.step()
        v = torch.autograd.grad(F.cross_entropy(student(labeled[0]), labeled[1]), list(student.parameters()))
        h = 0.05 * torch.stack([(a * b).sum() for a, b in zip(v, g, strict=True)]).sum()
        outer.zero_grad()
        own = F.cross_entropy(teacher(labeled[0]), labeled[1], label_smoothing=0.1)
        (h * F.cross_entropy(logits, labels, reduction="sum") + own).backward()
        outer.step()

    return step


def measure(miniature: bool, cases: Sequence[str] = CASES) -> list[Row]:
    """One turn: every mode on some networks, in this process."""
    import metapl

    torch.set_num_threads(1)
    rows = []
    modes = ("none", "reinforce") if miniature else [mode for mode in metapl.MODES if mode != "implicit"]
    for kind in ("SGD", "AdamW") if "mlp" in cases else ():
        for mode in (BY_HAND, *modes):
            teacher, student, labeled, unlabeled = networks("mlp")
            if mode == BY_HAND:
                step = by_hand(teacher, student, kind)
            else:
                built = {"inner_optimizer": optimizer(kind, student), "outer_optimizer": optimizer(kind, teacher)}
                step = metapl.BilevelTrainer(teacher, student, mode, **built).step
            rows.append({"case": "mlp", "mode": mode, "optimizer": kind} | timed(step, labeled, unlabeled, 5, 40))
    if miniature or "wrn" not in cases:
        return rows
    for mode in modes:
        for ahead in AHEAD if mode in ("forward", "unrolled") and hasattr(metapl, "Lookahead") else (1,):
            teacher, student, labeled, unlabeled = networks("wrn")
            trainer = metapl.BilevelTrainer(teacher, student, mode, teacher_losses=())
            batches = unlabeled if ahead == 1 else metapl.Lookahead([unlabeled] * ahead)
            warm, steps = (1, 3) if ahead == 1 else (1, 1)
            row = {"case": "wrn", "mode": mode, "ahead": ahead} | timed(trainer.step, labeled, batches, warm, steps)
            rows.append(row | held(partial(trainer.step, labeled, batches)))
    return rows


def held(step: Callable[[], Any]) -> Row:
    """Peak memory; nothing by a checkout that has no measure of it."""
    try:
        from metapl.ablation.cost import peak_bytes
    except ImportError:
        return {}
    return {"peak_bytes": peak_bytes(step, torch.device("cpu"))}


def timed(step: Any, labeled: Any, unlabeled: Any, warm: int, steps: int) -> Row:
    for _ in range(warm):
        step(labeled, unlabeled)
    before = time.process_time()
    for _ in range(steps):
        step(labeled, unlabeled)
    return {"ms": 1e3 * (time.process_time() - before) / steps}


def turn(checkout: Path, miniature: bool, cases: Sequence[str]) -> list[Row]:
    """One turn by the metapl of a checkout, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    use = f"import step; print(json.dumps(step.measure({miniature}, {cases})))"
    code = f"import json, sys; sys.path.insert(0, {str(HERE)!r}); {use}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd=checkout
    )
    if done.returncode:
        raise SystemExit(f"the metapl of {checkout} failed:\n{done.stderr[-2000:]}")
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def medians(turns: list[list[Row]]) -> list[Row]:
    return [
        {**rows[0], "ms": statistics.median(row["ms"] for row in rows), "turns": [round(row["ms"], 3) for row in rows]}
        for rows in zip(*turns, strict=True)
    ]


def table(result: Row) -> str:
    """The medians, and what they are beside the other checkout and beside Algorithm 1 by hand."""
    before = {_key(row): row["ms"] for row in result.get("against", [])}
    lines = [
        "| network | optimizer | mode | steps ahead | ms | beside the other checkout | beside Algorithm 1 by hand "
        "| peak MB |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    hand = {row["optimizer"]: row["ms"] for row in result["rows"] if row["mode"] == BY_HAND}
    for row in result["rows"]:
        old, own = before.get(_key(row)), hand.get(row.get("optimizer"))
        cells = [
            {"mlp": "MLP 16-16-4, batch 32", "wrn": f"WRN-28-2, batch {BATCH}"}[row["case"]],
            row.get("optimizer", "SGD"),
            row["mode"],
            str(row.get("ahead", 1)),
            f"{row['ms']:.2f}",
            "–" if old is None or row["mode"] == BY_HAND else f"{row['ms'] / old:.2f}",
            "–" if own is None else f"{row['ms'] / own:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("case", "mode", "optimizer", "ahead"))


def main() -> None:
    parser = arguments(__doc__, RESULT, page=True)
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of metapl")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", choices=CASES, help="measure this network; the result's rows of the other one stay")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result, and measure nothing")
    given = parsed(parser)
    if given.write:
        write_between_marks(given.write, "step", table(json.loads(given.out.read_text())))
        return
    if given.table:
        print(table(json.loads(given.table.read_text())))
        return
    turns: dict[str, list[list[Row]]] = {"rows": [], "against": []}
    cases = (given.only,) if given.only else CASES
    for _ in range(1 if given.miniature else given.turns):
        turns["rows"].append(turn(HERE.parent, given.miniature, cases))
        if given.against:
            turns["against"].append(turn(given.against.resolve(), given.miniature, cases))
    result = {name: medians(rows) for name, rows in turns.items() if rows} | {"measured_on": described("cpu")}
    if given.only:
        before = json.loads(given.out.read_text())
        for name in ("rows", "against"):
            rows = result.get(name, []) + [row for row in before.get(name, []) if row["case"] != given.only]
            result[name] = sorted(rows, key=lambda row: CASES.index(row["case"]))
    write_json(given.out, result)
    print(table(json.loads(given.out.read_text())))


if __name__ == "__main__":
    main()
