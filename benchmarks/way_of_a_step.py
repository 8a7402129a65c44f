"""How far a step goes through metapl, and what a tiny one costs beside the same written by hand.

    python benchmarks/way_of_a_step.py                          # counts, and times of both modes
    python benchmarks/way_of_a_step.py --functions reinforce    # the functions themselves, by file
    python benchmarks/way_of_a_step.py --note "a shared machine"

Counted are the files and functions of metapl that a second step enters (what ``def`` or ``lambda`` makes, and not
comprehensions), those that a ``hypergradient`` enters, all and without those of the step, and the calls below ``step``
down to the first pass of a network and to the feedback. Times are of the processor, on one thread: metapl and the same
by hand take turns, a step each, and the ratio is that of the medians.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import arguments, described, parsed, write_json
from torch import Tensor, nn
from torch.nn import functional as F

import metapl

RESULT = Path(__file__).parent / "results" / "way_of_a_step.json"
ROOT = str(Path(metapl.__file__).parent)
BATCH, ETA = 16, 0.05

Step = Callable[[], Any]


def networks() -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor], Tensor]:
    """Teacher, student, a labeled batch and an unlabeled one."""
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)) for _ in range(2))
    return teacher, student, (torch.randn(BATCH, 16), torch.randint(0, 4, (BATCH,))), torch.randn(BATCH, 16)


def trained(mode: str) -> Step:
    """A step of the trainer with its defaults."""
    teacher, student, labeled, unlabeled = networks()
    trainer = metapl.BilevelTrainer(teacher, student, mode)
    return lambda: trainer.step(labeled=labeled, unlabeled=unlabeled)


def algorithm_1_by_hand() -> Step:
    """Algorithm 1 as one would write it for one pair of networks, checks and all else left out."""
    teacher, student, (x_l, y_l), x_u = networks()
    inner, outer = _optimizer(student), _optimizer(teacher)

    def step() -> None:
        logits = teacher(x_u)
        labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        inner.zero_grad()
        F.cross_entropy(student(x_u), labels).backward()
        g = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        inner.step()
        v = torch.autograd.grad(F.cross_entropy(student(x_l), y_l), list(student.parameters()))
        h = ETA * torch.stack([(a * b).sum() for a, b in zip(v, g, strict=True)]).sum()
        outer.zero_grad()
        own = F.cross_entropy(teacher(x_l), y_l, label_smoothing=0.1)
        (h * F.cross_entropy(logits, labels, reduction="sum") + own).backward()
        outer.step()

    return step


def double_backward_by_hand() -> Step:
    """The exact gradient by double backward through one step of the student's own optimizer."""
    teacher, student, (x_l, y_l), x_u = networks()
    inner, outer = _optimizer(student), _optimizer(teacher)

    def step() -> None:
        parameters = dict(student.named_parameters())
        q = teacher(x_u).softmax(-1)
        g = torch.autograd.grad(F.cross_entropy(student(x_u), q), list(parameters.values()), create_graph=True)
        moved = {}
        for (name, p), g_p in zip(parameters.items(), g, strict=True):
            d = g_p + 5e-4 * p
            before = inner.state[p].get("momentum_buffer") if p in inner.state else None
            b = d if before is None else 0.9 * before + d
            moved[name] = p - ETA * (d + 0.9 * b)
        outer.zero_grad()
        loss = F.cross_entropy(torch.func.functional_call(student, moved, (x_l,)), y_l)
        own = F.cross_entropy(teacher(x_l), y_l, label_smoothing=0.1)
        (loss + own).backward(inputs=list(teacher.parameters()))
        for p, g_p in zip(parameters.values(), g, strict=True):
            p.grad = g_p.detach()
        inner.step()
        outer.step()

    return step


def _optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=ETA, momentum=0.9, nesterov=True, weight_decay=5e-4)


BESIDE = {"reinforce": algorithm_1_by_hand, "forward": double_backward_by_hand}


def way(step: Step) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The functions that a second step enters, by file, and the calls down to its mathematics."""
    step()
    entered: dict[str, set[str]] = {}
    stack: list[str] = []
    chains: dict[str, list[str]] = {}

    def look(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name == "_call_impl":
            chains.setdefault("pass", list(stack))
        if event not in ("call", "return") or not code.co_filename.startswith(ROOT):
            return
        if event == "return":
            stack.pop()
            return
        file = code.co_filename[len(ROOT) + 1 :]
        stack.append(f"{file}:{code.co_name}")
        if not code.co_name.startswith("<") or code.co_name == "<lambda>":
            entered.setdefault(file, set()).add(f"{code.co_firstlineno}:{code.co_name}")
        if file.startswith("feedback/") and code.co_name == "feedback":
            chains.setdefault("feedback", list(stack))

    sys.setprofile(look)
    try:
        step()
    finally:
        sys.setprofile(None)
    return {file: sorted(names) for file, names in sorted(entered.items())}, chains


def counts(mode: str) -> dict[str, Any]:
    """Files and functions of a step and of a :func:`metapl.hypergradient`, and the calls to the mathematics."""
    entered, chains = way(trained(mode))
    teacher, student, labeled, unlabeled = networks()
    optimizer = _optimizer(student)
    given: dict[str, Any] = {"labeled": labeled, "unlabeled": unlabeled, "inner_optimizer": optimizer, "mode": mode}
    alone, _ = way(lambda: metapl.hypergradient(teacher, student, **given))
    return {
        "files": len(entered),
        "functions": sum(map(len, entered.values())),
        "calls_to_the_first_pass": chains["pass"],
        "calls_to_the_feedback": chains["feedback"],
        "hypergradient_files": len(alone),
        "hypergradient_functions": sum(map(len, alone.values())),
        "hypergradient_own": sum(len({*names}.difference(entered.get(file, ()))) for file, names in alone.items()),
    }


def times(mode: str, steps: int) -> dict[str, float]:
    """Milliseconds of a step by metapl and by hand, taking turns."""
    torch.set_num_threads(1)
    both = {"metapl": trained(mode), "by_hand": BESIDE[mode]()}
    found: dict[str, list[float]] = {name: [] for name in both}
    for number in range(steps + 20):
        for name, step in both.items():
            before = time.process_time_ns()
            step()
            if number >= 20:
                found[name].append((time.process_time_ns() - before) / 1e6)
    medians = {name: statistics.median(ms) for name, ms in found.items()}
    return {f"ms_{name}": ms for name, ms in medians.items()} | {"ratio": medians["metapl"] / medians["by_hand"]}


def table(result: dict[str, Any]) -> str:
    """A row for each mode."""
    lines = [
        "| mode | files | functions | in `hypergradient` | in it alone | calls to a pass | ms | times by hand |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for mode, row in result["modes"].items():
        calls = len(row["calls_to_the_first_pass"]) - 1
        names = "files", "functions", "hypergradient_functions", "hypergradient_own"
        cells = *(row[name] for name in names), calls
        lines.append(f"| `{mode}` | {' | '.join(map(str, cells))} | {row['ms_metapl']:.2f} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, RESULT)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--functions", choices=BESIDE, help="print the functions of a step in this mode, and stop")
    parser.add_argument("--note", default="", help="what else there is to say of the machine")
    given = parsed(parser)
    if given.functions:
        for file, names in way(trained(given.functions))[0].items():
            print(f"{file} ({len(names)}): {', '.join(names)}")
        return
    steps = 5 if given.miniature else given.steps
    result = {mode: {**counts(mode), **times(mode, steps)} for mode in BESIDE}
    write_json(given.out, {"modes": result, "steps": steps, "note": given.note, "measured_on": described("cpu")})
    print(table(json.loads(given.out.read_text())))


if __name__ == "__main__":
    main()
