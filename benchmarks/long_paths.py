"""What a whole training costs to differentiate in each example's weight, over plain training.

    python benchmarks/long_paths.py         # WRN-28-2, 330,000 weights, and a small conv. network
    python benchmarks/long_paths.py --write benchmarks/results/long_paths.md

Processor time on one thread over that of the same steps of plain training, which take turns; peak
memory beyond what was held before, over that of one plain step. Beside it: an adjoint by hand in
PyTorch's own operations, which keeps the weights of all steps and checks nothing; double backward
through all steps with torch.func; and TorchOpt's differentiable Adam, where these fit. Rows that
are there are not repeated. A compiled row leaves out the seconds of its first call beyond those of
a second one; they stand in a column of their own, with the number of steps of the eager way, with
all states kept too, that would have paid for them.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from harness import NONE, RESULTS, Row, arguments, environment, go_on, grid, parsed, read, show
from peers import CausalLM
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metapl
from metapl import Lookahead
from metapl.ablation.cost import peak_bytes
from metapl.core.keeping import keeping
from metapl.feedback import Forward
from metapl.problems import EqualWeights

RAW = RESULTS / "long_paths.jsonl"
CPU = torch.device("cpu")
COMPILED = "compiled, all kept"
WAYS = {
    COMPILED: Forward(keep_every=1),
    "all kept": Forward(keep_every=1),
    "every √K-th": Forward(),
    "tree": Forward(keep="tree"),
}
# Rows of 0.2.0, whose layers had double backward passes of their own, have PyTorch's by this name:
# "all kept" has now.
PYTORCHS = "all kept, PyTorch's double backward"
WITH_ADAM = ("all kept", "every √K-th", "tree", "double backward", "TorchOpt")
CASES = {("wrn", steps): ("all kept", "every √K-th", "adjoint by hand") for steps in (20, 100)}
CASES |= {("mlp", steps): WITH_ADAM for steps in (10, 100)}
CASES |= {("conv", steps): tuple(way for way in WITH_ADAM if way != "tree") for steps in (10, 100)}
CASES |= {("mlp", 1000): ("all kept", "every √K-th", "tree"), ("mlp", 2000): ("every √K-th",)}
CASES[("wrn", 20)] = (COMPILED, *CASES[("wrn", 20)])
CASES |= {("digits", steps): (COMPILED, "all kept") for steps in (500, 2000)}
CASES |= {("causal", 300): (COMPILED, "all kept")}
TITLES = {
    "digits": "digits, 64-256-10, SGD, batch 100",
    "causal": "causal transformer, AdamW, batch 16",
    "wrn": "WRN-28-2, SGD, batch 16",
    "mlp": "330,000 weights, Adam, batch 100",
    "conv": "two convolutions, Adam, batch 100",
}


def network(name: str) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[int], Any]]:
    """Return a student, its optimizer, and the batch of a step."""
    torch.manual_seed(0)
    student: nn.Module
    optimizer: torch.optim.Optimizer
    shape, rows = (64,), 100
    if name == "wrn":
        student, shape, rows = metapl.models.wide_resnet28_2(num_classes=10), (3, 32, 32), 16
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    elif name == "conv":
        first = (
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16, track_running_stats=False),
            nn.GELU(),
        )
        second = (
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32, track_running_stats=False),
            nn.GELU(),
        )
        student = nn.Sequential(
            *first, nn.AvgPool2d(2), *second, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 10)
        )
        shape, optimizer = (1, 8, 8), torch.optim.Adam(student.parameters(), lr=1e-3, eps=1e-3)
    elif name == "digits":
        student = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    elif name == "causal":
        student = CausalLM()
        rows = 16
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, eps=1e-4)
    else:
        student = nn.Sequential(
            nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 560), nn.GELU(), nn.Linear(560, 10)
        )
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, eps=1e-3)
    data = load_digits()
    pictures = torch.tensor(data.data).float() / 16
    labels = torch.tensor(data.target)

    def batch(number: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(number)
        if name == "digits":
            chosen = torch.randint(0, len(labels), (rows,), generator=draw)
            return pictures[chosen], labels[chosen]
        if name == "causal":
            tokens = torch.randint(0, 256, (rows, 33), generator=draw)
            return tokens[:, :-1], tokens[:, -1]
        return torch.randn(rows, *shape, generator=draw), torch.randint(
            0, 10, (rows,), generator=draw
        )

    return student, optimizer, batch


def plain(name: str, steps: int) -> None:
    student, optimizer, batch = network(name)
    for number in range(steps):
        x, y = batch(number)
        optimizer.zero_grad()
        F.cross_entropy(student(x), y).backward()
        optimizer.step()


def mode_of(way: str, steps: int) -> Forward:
    return Forward(keep_every=max(2, round(steps**0.5))) if way == "every √K-th" else WAYS[way]


def kept_bytes(name: str, steps: int, way: str) -> int:
    """Return the bytes of the states that a path holds at its fullest.

    They are θ and the optimizer's, and g in the finest block of a path that is not compiled.
    """
    if way not in WAYS:
        return 0
    student, optimizer, batch = network(name)
    F.cross_entropy(student(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    theta = sum(p.nbytes for p in student.parameters())
    state = sum(
        t.nbytes
        for state_of_weight in optimizer.state.values()
        for t in state_of_weight.values()
        if isinstance(t, Tensor)
    )
    mode = mode_of(way, steps)
    lengths = (steps, *keeping(steps, 0, CPU, mode.keep or mode.keep_every, None).spacings, 1)
    *counts, last = (
        math.ceil(min(longer, steps) / shorter) for longer, shorter in pairwise(lengths)
    )
    return sum(counts) * (theta + state) + last * ((1 if way == COMPILED else 2) * theta + state)


def path(name: str, steps: int, way: str) -> Callable[[], Any]:
    """Return a call of hypergradient, which may be made again.

    A compiled one runs the same graphs again.
    """
    student, optimizer, batch = network(name)
    inputs: Any = {
        "outer": batch(-1),
        "inner": Lookahead(batch, steps=steps),
        "problem": EqualWeights(),
    }
    inputs |= {
        "inner_optimizer": optimizer,
        "mode": mode_of(way, steps),
        "compile": way == COMPILED,
    }
    return partial(metapl.hypergradient, None, student, **inputs)


def adjoint_by_hand(name: str, steps: int) -> None:
    """Run SGD's adjoint with momentum, to the gradient in every example's weight.

    It takes a Hessian product a step.
    """
    student, optimizer, batch = network(name)
    params = list(student.parameters())
    states = list[list[Tensor]]()
    for number in range(steps):
        states.append([p.detach().clone() for p in params])
        x, y = batch(number)
        optimizer.zero_grad()
        F.cross_entropy(student(x), y).backward()
        optimizer.step()
    x, y = batch(-1)
    v = list(torch.autograd.grad(F.cross_entropy(student(x), y), params))
    momentum = [torch.zeros_like(p) for p in params]
    for number in reversed(range(steps)):
        with torch.no_grad():
            torch._foreach_copy_(params, states.pop())
        torch._foreach_mul_(momentum, 0.9)
        torch._foreach_add_(momentum, v, alpha=-0.01)
        x, y = batch(number)
        weights = torch.ones(len(x), requires_grad=True)
        loss = (weights * F.cross_entropy(student(x), y, reduction="none")).mean()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        torch._foreach_add_(v, torch.autograd.grad(grads, [*params, weights], momentum)[:-1])


def by_hand(name: str, steps: int) -> None:
    """Write Adam's rule out, and differentiate in every example's weight through all steps.

    The gradient is by double backward.
    """
    student, _, batch = network(name)
    params: dict[str, Tensor] = {
        n: p.detach().requires_grad_() for n, p in student.named_parameters()
    }
    first = {n: torch.zeros_like(p) for n, p in params.items()}
    second = dict(first)
    weights = []
    for number in range(steps):
        x, y = batch(number)
        weights.append(torch.ones(len(x), requires_grad=True))
        losses = F.cross_entropy(functional_call(student, params, (x,)), y, reduction="none")
        grads = torch.autograd.grad(
            (weights[-1] * losses).mean(), list(params.values()), create_graph=True
        )
        for (n, p), g in zip(list(params.items()), grads, strict=True):
            first[n] = 0.9 * first[n] + 0.1 * g
            second[n] = 0.999 * second[n] + 0.001 * g * g
            root = (second[n] / (1 - 0.999 ** (number + 1)) + 1e-30).sqrt() + 1e-3
            params[n] = p - 1e-3 / (1 - 0.9 ** (number + 1)) * first[n] / root
    x, y = batch(-1)
    torch.autograd.grad(F.cross_entropy(functional_call(student, params, (x,)), y), weights)


def by_torchopt(name: str, steps: int) -> None:
    """Do the same by TorchOpt's differentiable Adam, which moves the network within the graph."""
    import torchopt

    student, _, batch = network(name)
    optimizer = torchopt.MetaAdam(student, lr=1e-3, eps=1e-3, eps_root=1e-30)
    weights = []
    for number in range(steps):
        x, y = batch(number)
        weights.append(torch.ones(len(x), requires_grad=True))
        optimizer.step((weights[-1] * F.cross_entropy(student(x), y, reduction="none")).mean())
    x, y = batch(-1)
    torch.autograd.grad(F.cross_entropy(student(x), y), weights)


RIVALS = {"adjoint by hand": adjoint_by_hand, "double backward": by_hand, "TorchOpt": by_torchopt}


def seconds(run: Callable[[], None]) -> float:
    # What was measured earlier is garbage by now.
    gc.collect()
    start = time.process_time()
    run()
    return time.process_time() - start


def measured(network: str, steps: int, way: str) -> Row:
    """Return times and memory of a method, between two plain trainings."""
    plain(network, 2)
    # What is loaded at the first call is not timed.
    path(network, 2, "all kept")()
    bytes_of_one_step = peak_bytes(partial(plain, network, 1), CPU)
    run: Callable[[], Any] = lambda: path(network, steps, way)()  # noqa: E731
    if way in RIVALS:
        run = partial(RIVALS[way], network, steps)
    RIVALS.get(way, plain)(network, 2)
    if way == COMPILED:
        run = path(network, steps, way)
        # A compiler's processes have times of their own, so this is wall time.
        begun = time.perf_counter()
        run()
        cold = time.perf_counter() - begun
    seconds_before = seconds(partial(plain, network, steps))
    took = seconds(run)
    base = (seconds_before + seconds(partial(plain, network, steps))) / 2
    row = {"cpu": environment()["processor"], "time": took / base, "plain_seconds": base}
    if way == COMPILED:
        row["compile_seconds"] = cold - took
    row |= {"peak_bytes": peak_bytes(run, CPU), "one_step_bytes": bytes_of_one_step}
    return row | {"kept_bytes": kept_bytes(network, steps, way)}


def table(rows: list[Row]) -> str:
    lines = []
    networks = [*TITLES]
    ways = [COMPILED, "all kept", PYTORCHS, "every √K-th", "tree", *RIVALS]

    def ratio(network: str, steps: int, way: str) -> float:
        same = (
            row
            for row in rows
            if (row["network"], row["steps"], row["way"]) == (network, steps, way)
        )
        return statistics.median(row["time"] for row in same)

    def place(row: Row) -> tuple[int, int, int]:
        return networks.index(row["network"]), row["steps"], ways.index(row["way"])

    for _, same in groupby(sorted(rows, key=place), place):
        row, *repeats = same
        times = sorted(repeat["time"] for repeat in (row, *repeats))
        spread = f" ({times[0]:.1f} to {times[-1]:.1f})" if repeats else ""
        cells = [
            TITLES[row["network"]],
            f"{row['steps']:,}",
            row["way"],
            f"{statistics.median(times):.1f}{spread}",
        ]
        peak, one_step, kept_bytes_of_row = (
            row[f"{name}_bytes"] for name in ("peak", "one_step", "kept")
        )
        cells += [
            f"{peak / one_step:.1f}",
            f"{peak / 1e6:,.0f}",
            f"{(peak - kept_bytes_of_row) / one_step:.1f}" if kept_bytes_of_row else NONE,
        ]
        compiling = ""
        if "compile_seconds" in row:
            # By the ratios, since the plain trainings beside two methods ran at different hours of
            # a shared machine.
            saved = ratio(row["network"], row["steps"], "all kept") - statistics.median(times)
            saved *= row["plain_seconds"] / row["steps"]
            paid = (
                f"{math.ceil(row['compile_seconds'] / saved / 100) * 100:,} steps"
                if saved > 0
                else "never paid"
            )
            compiling = f"{row['compile_seconds']:.0f} s, {paid}"
        lines.append([*cells, compiling])
    return grid(
        ["network", "K", "method", "time", "memory", "MB", "without states", "compiling"],
        lines,
        "lrl",
    )


def main() -> None:
    args = parsed(arguments(__doc__, RAW))
    torch.set_num_threads(1)
    # A first call compiles, whatever ran before.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    cases = {(name, 4): WITH_ADAM for name in ("mlp", "conv")} if args.miniature else CASES
    if args.runs:
        jobs = (
            {"network": name, "steps": steps, "way": way}
            for (name, steps), ways in cases.items()
            for way in ways
        )
        go_on(args.out, jobs, measured, machine=environment())
    show(args.write, "long_paths", table(read(args.out, "way")))


if __name__ == "__main__":
    main()
