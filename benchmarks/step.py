"""What a whole step of BilevelTrainer costs beside the same mode written by hand in plain torch.

    python benchmarks/step.py          # on five networks
    python benchmarks/step.py --write benchmarks/results/step.md

A step is a student's and a teacher's, both by SGD with Nesterov momentum, and the teacher has its
own loss. Times are of the processor, on one thread. Ways take turns: each takes some steps a round,
and a ratio is the median over rounds of one way's time over that of the same mode by hand in the
same round, beside the quartiles. Apart is how far the teacher is from the one trained by hand, over
how far it has gone, after three steps. Counted are the files and functions of metapl that the third
step enters. Compiled steps are measured beside compiled ones by hand, by ``something_simpler.py
--cases steps``. ``gpu.py`` measures both on a GPU, where times are those until it is done; a
compiled one has the seconds of compiling, with an empty cache, beside it.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import (
    NONE,
    RESULTS,
    Row,
    arguments,
    environment,
    grid,
    loaded,
    parsed,
    show,
    write_json,
)
from modes import Place
from peers import CAUSAL, case
from torch import Tensor, nn
from torch._inductor.utils import clear_caches
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl
from metapl.ablation.cost import peak_bytes

# Of the profiler, which would write into the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
RESULT = RESULTS / "step.json"
RATE = 0.01
MOMENTUM = 0.9
DECAY = 5e-4
HAND = "by hand"
EAGER = "as it is"
COMPILED = "compiled"
MODES = ("forward", "reinforce", "unrolled")
COMPILE: dict[str, Any] = {EAGER: False, COMPILED: True}

Step = Callable[[], Any]
Pair = tuple[nn.Module, nn.Module]
Data = tuple[tuple[Tensor, Tensor], Tensor]
CPU = Place("cpu", "float32")


class Network(NamedTuple):
    """Its name in a table, each way's steps in a round, and what makes the pair and its batches."""

    title: str
    steps: int
    make: Callable[[], tuple[Pair, Data]]


def tiny() -> tuple[Pair, Data]:
    torch.manual_seed(0)
    teacher, student = (
        nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)) for _ in range(2)
    )
    return (teacher, student), (
        (torch.randn(32, 16), torch.randint(0, 4, (32,))),
        torch.randn(32, 16),
    )


def of_peers(name: str, most: int | None = None) -> tuple[Pair, Data]:
    teacher, student, (x, y), u = case(name, "cpu")
    return (teacher, student), ((x[:most], y[:most]), u[:most])


NETWORKS = {
    "tiny": Network("MLP 16-16-4, batch 32", 40, tiny),
    "mlp": Network("MLP 64-64-10, batch 64", 30, partial(of_peers, "MLP")),
    "transformer": Network("transformer, 2 layers of 64", 4, partial(of_peers, "transformer")),
    "causal": Network(CAUSAL, 3, partial(of_peers, CAUSAL)),
    "wrn": Network("WRN-28-2, batch 8", 1, partial(of_peers, "WRN-28-2", 8)),
}


def optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        network.parameters(), lr=RATE, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY
    )


def by_hand(mode: str, pair: Pair, data: Data) -> Step:
    """Return the step as one would write it for one pair of networks, without any checks."""
    (teacher, student), ((x, y), u) = pair, data
    inner = optimizer(student)
    outer = optimizer(teacher)
    params: dict[str, Tensor] = dict(student.named_parameters())
    weights = [*params.values()]
    learned = [*teacher.parameters()]
    teacher_loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    # Of θ' in g; in the first step, whose momentum begins with g, too.
    slope = -RATE * (1 + MOMENTUM)

    def move(
        optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.detach()
        optimizer.step()

    def teach(loss: Tensor) -> None:
        move(outer, learned, torch.autograd.grad(loss + teacher_loss(teacher(x), y), learned))

    def reinforce() -> None:
        logits = teacher(u)
        labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        g = torch.autograd.grad(F.cross_entropy(student(u), labels), weights)
        move(inner, weights, g)
        v = torch.autograd.grad(F.cross_entropy(student(x), y), weights)
        h = -slope * torch.stack([(a * b).sum() for a, b in zip(v, g, strict=True)]).sum()
        teach(h * F.cross_entropy(logits, labels, reduction="sum"))

    def forward() -> None:
        q = teacher(u).softmax(-1)
        signal = q.detach().requires_grad_()
        z = student(u)
        g = torch.autograd.grad(F.cross_entropy(z, signal), weights)
        weights_before = [p.detach().clone() for p in weights]
        move(inner, weights, g)
        v = torch.autograd.grad(F.cross_entropy(student(x), y), weights)
        with forward_ad.dual_level():
            duals = {
                n: forward_ad.make_dual(p, slope * d)
                for n, p, d in zip(params, weights_before, v, strict=True)
            }
            tangent = forward_ad.unpack_dual(functional_call(student, duals, (u,))).tangent
        leaf = z.detach().requires_grad_()
        (of_z,) = torch.autograd.grad(F.cross_entropy(leaf, signal), leaf, create_graph=True)
        (h,) = torch.autograd.grad(of_z, signal, tangent)
        teach((h * q).sum())

    def unrolled() -> None:
        g = torch.autograd.grad(
            F.cross_entropy(student(u), teacher(u).softmax(-1)), weights, create_graph=True
        )
        moved = {}
        for (name, p), g_p in zip(params.items(), g, strict=True):
            d = g_p + DECAY * p
            buffer = inner.state[p].get("momentum_buffer") if p in inner.state else None
            moved[name] = p - RATE * (
                d + MOMENTUM * (d if buffer is None else MOMENTUM * buffer + d)
            )
        teach(F.cross_entropy(functional_call(student, moved, (x,)), y))
        move(inner, weights, g)

    step = {"forward": forward, "reinforce": reinforce, "unrolled": unrolled}[mode]
    # CPU kernels of attention have no second derivative and no forward mode.
    needs = mode != "reinforce" and not isinstance(student, nn.Sequential)
    return sdpa_kernel(SDPBackend.MATH)(step) if needs else step


def trainer(mode: str, pair: Pair, **options: Any) -> metapl.BilevelTrainer:
    optimizers = {"inner_optimizer": optimizer(pair[1]), "outer_optimizer": optimizer(pair[0])}
    losses = (metapl.CrossEntropy(label_smoothing=0.1),)
    # The steps by hand add the feedback at the weight 1, and the sum of the labels'
    # cross-entropies.
    estimator = metapl.feedback.Reinforce(reduction="sum") if mode == "reinforce" else mode
    return metapl.BilevelTrainer(
        *pair, estimator, teacher_losses=losses, feedback_weight=1.0, **optimizers, **options
    )


def way_of(name: str, mode: str, network: str, place: Place) -> tuple[Step, nn.Module]:
    """Return a way with networks and optimizers of its own, and its teacher."""
    pair, ((x, y), u) = NETWORKS[network].make()
    for module in pair:
        module.to(place.device)
    data = (x.to(place.device), y.to(place.device)), u.to(place.device)
    if name == HAND:
        return by_hand(mode, pair, data), pair[0]
    stepping = trainer(mode, pair, compile=COMPILE[name])
    return lambda: stepping.step(*data), pair[0]


def entered(step: Step) -> Row:
    """Return how many files and functions of metapl a step enters.

    Functions are what ``def`` or ``lambda`` makes, not comprehensions.
    """
    functions = set[tuple[str, int]]()
    root = str(Path(metapl.__file__).parent)

    def look(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        named = not code.co_name.startswith("<") or code.co_name == "<lambda>"
        if event == "call" and named and code.co_filename.startswith(root):
            functions.add((code.co_filename, code.co_firstlineno))

    sys.setprofile(look)
    try:
        step()
    finally:
        sys.setprofile(None)
    return {"files": len({file for file, _ in functions}), "functions": len(functions)}


def warmed(name: str, mode: str, network: str, place: Place) -> tuple[Step, Tensor, Row]:
    """Return a way after three steps, where its teacher has gone to, and facts beside times."""
    facts: Row = {}
    # With nothing compiled before, in this process and on the disk.
    if compiles := name == COMPILED:
        clear_caches()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    step, teacher = way_of(name, mode, network, place)
    start = nn.utils.parameters_to_vector(teacher.parameters()).detach().clone()
    cold = place.seconds(step)
    facts |= {"cold_seconds": cold} if compiles else {}
    with place.active():
        step()
        if name == EAGER:
            facts |= entered(step)
        else:
            step()
    return step, nn.utils.parameters_to_vector(teacher.parameters()).detach() - start, facts


def measure(
    network: str, mode: str, ways: Sequence[str], rounds: int, place: Place = CPU
) -> list[Row]:
    """Return a row for each way, all in turns with the same by hand."""
    # Dynamo counts how often a function has been compiled anew.
    torch._dynamo.reset()
    ready = {name: warmed(name, mode, network, place) for name in (HAND, *ways)}
    calls = NETWORKS[network].steps if rounds > 1 else 1
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (step, _, _) in ready.items():
            clock = time.process_time if place.device == "cpu" else time.perf_counter
            seconds = place.seconds(lambda step=step: [step() for _ in range(calls)], clock)
            times[name].append(1e3 * seconds / calls)
    rows = []
    for name in ways:
        ratios = [a / b for a, b in zip(times[name], times[HAND], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else 3 * ratios
        row = {
            "label": metapl.__version__,
            "network": network,
            "mode": mode,
            "way": name,
            "ratio": middle,
        }
        row |= {"quartiles": [low, high], "rounds": rounds, "steps": calls, **ready[name][2]}
        for way, end in ((name, ""), (HAND, "_by_hand")):
            bytes_of_way = peak_bytes(
                partial(place.seconds, ready[way][0]), torch.device(place.device)
            )
            row |= {f"ms{end}": statistics.median(times[way]), f"bytes{end}": bytes_of_way}
        # By hand labels are drawn otherwise.
        if mode != "reinforce":
            gone = ready[HAND][1]
            row["apart"] = float((ready[name][1] - gone).norm() / gone.norm())
        rows.append(row | {"measured_on": environment()})
    return rows


def table(result: Row) -> str:
    """Return a row for each way and mode."""
    lines = []
    for row in result["rows"]:
        low, high = row["quartiles"]
        cells = [
            row["label"],
            NETWORKS[row["network"]].title,
            f"`{row['mode']}`",
            f"{row['ms']:.3g}",
        ]
        cells += [f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
        cells.append(f"{row['files']}, {row['functions']}" if "files" in row else NONE)
        lines.append([*cells, f"{row['apart']:.0e}" if "apart" in row else NONE])
    head = [
        "metapl",
        "network",
        "mode",
        "ms",
        "times by hand",
        "quartiles",
        "files, functions",
    ]
    return grid([*head, "apart"], lines, names=3)


def main() -> None:
    parser = arguments(__doc__, RESULT)
    args = parsed(parser)
    torch.set_num_threads(1)
    if args.runs:
        names, rounds = (["tiny"], 1) if args.miniature else ([*NETWORKS], 15)
        rows = [
            row for name in names for mode in MODES for row in measure(name, mode, (EAGER,), rounds)
        ]
        old = loaded(args.out)["rows"] if args.out.exists() else []
        rows_by_name = {
            tuple(row[key] for key in ("label", "network", "mode")): row for row in [*old, *rows]
        }
        order = sorted(rows_by_name, key=lambda k: (k[0], [*NETWORKS].index(k[1]), k[2]))
        write_json(args.out, {"rows": [rows_by_name[key] for key in order]})
    show(args.write, "step", table(loaded(args.out)))


if __name__ == "__main__":
    main()
