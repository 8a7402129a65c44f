"""What compiling a step costs, and after how many steps it pays: three networks, cold and again.

    python benchmarks/compile_cost.py --before FOLDER    # some ten minutes of a core; goes on
    python benchmarks/compile_cost.py --write benchmarks/results/compile_cost.md

FOLDER is a checkout of an earlier commit, which is measured beside this one. A row is a way in a
process of its own, with an empty cache of Inductor: seconds of processor time of the first step,
those of the C++ compiler with it; the seconds of the first step of a second trainer, whose networks
are others of the same architecture; and the milliseconds of a step, and of the eager trainer's, in
turns, medians of 31 rounds on one thread. Both networks learn by SGD with Nesterov momentum, and
the teacher has a loss of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

ROUNDS = 31
ROOT = Path(__file__).parents[1]
OURS = "`BilevelTrainer(compile=True)`"
BEFORE = "the same, of 28 November"
HAND = "`torch.compile` over `torch.func`, by hand"
WAYS = (OURS, BEFORE, HAND)
RATE = 0.01
MOMENTUM = 0.9

Weights = dict[str, Tensor]
Step = Callable[[], Any]


class Block(nn.Module):
    """A block of a decoder, whose attention is written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first = nn.LayerNorm(width)
        self.second = nn.LayerNorm(width)
        self.in_attention = nn.Linear(width, 3 * width)
        self.out_of_attention = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.in_attention(self.first(x)).chunk(3, -1)
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        x = x + self.out_of_attention((weights @ v).transpose(1, 2).reshape(x.shape))
        return x + self.perceptron(self.second(x))


class Decoder(nn.Module):
    """A language model of two blocks that says something of its last token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, 64)
        self.blocks = nn.Sequential(Block(64, 4), Block(64, 4))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x))[:, -1])


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def convolutions() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.GELU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


class Network(NamedTuple):
    """A network, inputs for it, and the steps of a round."""

    title: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    calls: int


NETWORKS = {
    "mlp": Network("MLP 64-64-10, batch 64", perceptron, lambda: torch.randn(64, 64), 30),
    "cnn": Network(
        "three convolutions with batch norm, 32 of 16 x 16",
        convolutions,
        lambda: torch.randn(32, 3, 16, 16),
        3,
    ),
    "decoder": Network(
        "decoder of two blocks, 16 of 32 tokens", Decoder, lambda: torch.randint(64, (16, 32)), 3
    ),
}


# ---------------------------------------------------------------------------------------- one row


def optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM, nesterov=True)


def step_of_trainer(network: str, seed: int, *, compile: bool) -> Step:
    """Return the step of a trainer of fresh networks."""
    import metapl

    torch.manual_seed(seed)
    teacher, student = NETWORKS[network].make(), NETWORKS[network].make()
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode="forward",
        inner_optimizer=optimizer(student),
        outer_optimizer=optimizer(teacher),
        teacher_losses=(metapl.CrossEntropy(),),
        compile=compile,
    )
    outer, inner = batches(network)
    return lambda: trainer.step(outer, inner)


def batches(network: str) -> tuple[tuple[Tensor, Tensor], Tensor]:
    x = NETWORKS[network].inputs()
    return (x, torch.randint(10, (len(x),))), NETWORKS[network].inputs()


def step_by_hand(network: str, seed: int) -> Step:
    """Return the same step in plain torch.func, compiled."""
    torch.manual_seed(seed)
    teacher, student = NETWORKS[network].make(), NETWORKS[network].make()
    (x, y), u = batches(network)

    def passed(module: nn.Module, params: Weights, buffers: Weights, inputs: Tensor) -> Any:
        copies = {name: b.clone() for name, b in buffers.items()}
        return functional_call(module, (params, copies), (inputs,)), copies

    def moved(params: Weights, momenta: Weights, grads: Weights) -> tuple[Weights, Weights]:
        after = {name: MOMENTUM * momenta[name] + g for name, g in grads.items()}
        new = {
            name: p - RATE * (grads[name] + MOMENTUM * after[name]) for name, p in params.items()
        }
        return new, after

    def step(of_teacher: Any, of_student: Any) -> Any:
        params_of_student, momenta_of_student, buffers_of_student = of_student
        params_of_teacher, momenta_of_teacher, buffers_of_teacher = of_teacher

        def outer_loss(phi: Weights) -> Any:
            labels, buffers = passed(teacher, phi, buffers_of_teacher, u)

            def inner_loss(theta: Weights) -> Any:
                z, left = passed(student, theta, buffers_of_student, u)
                return F.cross_entropy(z, labels.softmax(-1)), left

            g, left = grad(inner_loss, has_aux=True)(params_of_student)
            theta, momenta = moved(params_of_student, momenta_of_student, g)
            z, _ = passed(student, theta, left, x)
            own, buffers = passed(teacher, phi, buffers, x)
            loss = F.cross_entropy(z, y) + F.cross_entropy(own, y)
            return loss, ((theta, momenta, left), buffers)

        gradient, (student_after, buffers) = grad(outer_loss, has_aux=True)(params_of_teacher)
        phi, momenta = moved(params_of_teacher, momenta_of_teacher, gradient)
        return (phi, momenta, buffers), student_after

    whole = torch.compile(step, fullgraph=True)

    def state_of(module: nn.Module) -> Any:
        params = {name: p.detach().clone() for name, p in module.named_parameters()}
        momenta = {name: torch.zeros_like(p) for name, p in params.items()}
        return params, momenta, {name: b.clone() for name, b in module.named_buffers()}

    states = [state_of(teacher), state_of(student)]

    def take() -> None:
        states[:] = whole(*states)

    return take


def seconds(call: Callable[[], Any]) -> float:
    """Return the processor time of a call, with that of the processes that it starts."""
    begun = os.times()
    call()
    ended = os.times()
    return sum(
        getattr(ended, name) - getattr(begun, name)
        for name in ("user", "system", "children_user", "children_system")
    )


def measured(network: str, way: str, rounds: int) -> dict[str, float]:
    """Return the figures of one way, in this process."""
    torch.set_num_threads(1)

    def make(seed: int) -> Step:
        if way == HAND:
            return step_by_hand(network, seed)
        return step_of_trainer(network, seed, compile=True)

    eager = step_of_trainer(network, 0, compile=False)
    # What the first step of all imports belongs to no way.
    eager()
    step = make(0)
    first = seconds(step)
    again = seconds(make(1))
    ready = {"ms": step, "eager_ms": eager}
    times: dict[str, list[float]] = {name: [] for name in ready}
    calls = NETWORKS[network].calls if rounds > 1 else 1
    for _ in range(rounds):
        for name, take in ready.items():
            begun = time.process_time()
            for _ in range(calls):
                take()
            times[name].append(1e3 * (time.process_time() - begun) / calls)
    medians = {name: statistics.median(of_name) for name, of_name in times.items()}
    return {"first_s": first, "again_s": again, **medians}


# ------------------------------------------------------------------------------------------ tables


def pays_after(row: dict[str, Any]) -> str:
    """Return after how many steps the first one is paid for."""
    gained = row["eager_ms"] - row["ms"]
    return f"{1e3 * row['first_s'] / gained:,.0f}" if gained > 0 else "never"


def main() -> None:
    import harness

    parser = harness.arguments(__doc__, harness.RESULTS / "compile_cost.jsonl")
    parser.add_argument("--before", type=Path, help="checkout of an earlier commit")
    parser.add_argument("--worker", nargs=3, help="network, way and rounds of one row")
    args = harness.parsed(parser)
    if args.worker:
        network, way, rounds = args.worker
        print(json.dumps(measured(network, way, int(rounds))))
        return

    def run(*, network: str, way: str) -> dict[str, Any]:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = str(args.before if way == BEFORE else ROOT)
        rounds = 2 if args.miniature else ROUNDS
        with tempfile.TemporaryDirectory() as place:
            environment["TORCHINDUCTOR_CACHE_DIR"] = place
            words = [sys.executable, __file__, "--worker", network, way, str(rounds)]
            done = subprocess.run(
                words, env=environment, check=True, capture_output=True, text=True
            )
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row

    if args.runs:
        networks = ["mlp"] if args.miniature else [*NETWORKS]
        ways = [way for way in WAYS if args.before or way != BEFORE]
        jobs = [{"network": network, "way": way} for network in networks for way in ways]
        harness.go_on(args.out, jobs, run, environment=harness.environment())
    lines = []
    for row in harness.read(args.out):
        if "way" not in row:
            continue
        line = [NETWORKS[row["network"]].title, row["way"], f"{row['first_s']:.0f}"]
        line += [f"{row['again_s']:.1f}", f"{row['ms']:.2f}", f"{row['ms'] / row['eager_ms']:.2f}"]
        lines.append([*line, pays_after(row)])
    head = ["network", "way", "first step, s", "a second trainer's, s", "ms a step", "over eager"]
    table = harness.grid([*head, "pays after, steps"], lines, names=2)
    harness.show(args.write, "compile_cost", table)


if __name__ == "__main__":
    main()
