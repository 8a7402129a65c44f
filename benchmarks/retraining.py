"""What a hundred trainings without examples cost: in stacks, compiled or not, and one by one.

    python benchmarks/retraining.py              # goes on where it was stopped
    python benchmarks/retraining.py --write benchmarks/results/retraining.md

``Attribution.validate`` trains without each of some random sets, 1 % of the examples each. Its
processor time on one thread is shown in plain trainings of the same steps, by torch.optim in a
loop, with which it takes turns. Of the slower ways some sets are trained, 25 in a stack without a
compiler and five one by one (``at_once=1``), and their time is counted for all. The first compiled
call begins with an empty cache of the compiler, and with one stack; what it takes beyond its share
of a later call is the time to compile, with the comparison with a single training's first steps. It
is paid for by the steps times trainings that stacks would have needed without it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import attribution
import torch
from gpt2_training import GPT2, Text, documentation
from harness import NONE, RESULTS, Row, arguments, environment, go_on, grid, parsed, read, show
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.problems import NextToken

RAW = RESULTS / "retraining.jsonl"
ROUNDS = 3
# How many trainings are taken in a stack without a compiler, and one by one, in the place of all.
# A hundred are four stacks of this size.
STACK = 25
ALONE = 5

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training, and how often it is repeated.

    Args:
        network: makes the student.
        optimizer: makes its optimizer from its weights.
        data: returns the training examples and the outer ones.
        removals: how many sets of 1 % are removed.
    """

    network: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    data: Callable[[], tuple[Data, Data]]
    steps: int
    batch_size: int
    removals: int
    problem: metapl.problems.EqualWeights | None = None


@cache
def digits() -> tuple[Data, Data]:
    return attribution.data(0)


@cache
def pictures() -> tuple[Data, Data]:
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(y)
    return (images[:1000], labels[:1000]), (images[1000:], labels[1000:])


@cache
def sequences() -> tuple[Data, Data]:
    text = Text.from_files(documentation(100), words=256, length=32, held_out=50)
    training = text.training[:1000]
    return (training, training), (text.held_out, text.held_out)


def perceptron(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 10))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def transformer() -> nn.Module:
    return GPT2(words=256, positions=32, width=32, depth=2, heads=2)


def sgd(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=0.03, momentum=0.9)


def adamw(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=1e-3, eps=1e-3)


WIDE = "digits, 64-256-10, SGD, batch 100"
NARROW = "digits, 64-64-10, SGD, batch 100"
CASES = {
    NARROW: Case(
        network=perceptron(64),
        optimizer=sgd,
        data=digits,
        steps=500,
        batch_size=100,
        removals=100,
    ),
    WIDE: Case(
        network=perceptron(256),
        optimizer=sgd,
        data=digits,
        steps=500,
        batch_size=100,
        removals=100,
    ),
    "two convolutions, SGD, batch 50": Case(
        network=convolutions,
        optimizer=sgd,
        data=pictures,
        steps=50,
        batch_size=50,
        removals=25,
    ),
    "GPT-2 of 36,000 weights, AdamW, batch 16": Case(
        network=transformer,
        optimizer=adamw,
        data=sequences,
        steps=50,
        batch_size=16,
        removals=25,
        problem=NextToken(),
    ),
}
MINIATURE = Case(
    network=perceptron(4),
    optimizer=sgd,
    data=digits,
    steps=3,
    batch_size=10,
    removals=4,
)
ONE_BY_ONE = "one by one"
STACKED = "stacks of 25"
COMPILED = "stacks of 25, compiled"
WAYS: dict[str, Row] = {
    COMPILED: {"compile": True},
    STACKED: {"compile": False},
    ONE_BY_ONE: {"at_once": 1},
}
MOST_TRAINED = {STACKED: STACK, ONE_BY_ONE: ALONE}


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def scored(
    case: Case, *, compile: bool = False, seed: int = 0, rate: float = 1.0
) -> metapl.Attribution:
    """Return the attribution whose removals are trained again.

    Args:
        seed: of the student and of the order of the examples.
        rate: what the optimizer's learning rate is multiplied by.
    """
    torch.manual_seed(seed)
    network = case.network()
    optimizer = case.optimizer(network.parameters())
    for group in optimizer.param_groups:
        group["lr"] *= rate
    train, outer = case.data()
    return metapl.attribute(
        network,
        train,
        outer,
        optimizer=optimizer,
        steps=case.steps,
        batch_size=case.batch_size,
        problem=case.problem,
        smoothing=0.0,
        compile=compile,
        progress=False,
    )


def plain(case: Case, order: Tensor) -> None:
    """Train on all examples, by torch.optim in a loop."""
    torch.manual_seed(0)
    network = case.network()
    optimizer = case.optimizer(network.parameters())
    (x, y), _ = case.data()
    for numbers in order:
        optimizer.zero_grad()
        outputs = network(x[numbers])
        labels = y[numbers]
        if case.problem is not None:
            outputs = outputs[:, :-1].flatten(0, 1)
            labels = labels[:, 1:].flatten()
        F.cross_entropy(outputs, labels).backward()
        optimizer.step()


def removals_of(case: Case) -> list[Tensor]:
    """Return random sets of 1 % of the examples."""
    examples = len(case.data()[0][0])
    draw = torch.Generator().manual_seed(1000)
    return [
        torch.randperm(examples, generator=draw)[: examples // 100] for _ in range(case.removals)
    ]


def measured(case: str, miniature: bool) -> Iterator[Row]:
    """Yield a row for each way of a case; they take turns with plain trainings, and each other."""
    setting = MINIATURE if miniature else CASES[case]
    sets = removals_of(setting)
    attribution_of_case = scored(setting)
    retrained: dict[str, Tensor] = {}

    def validate(way: str, most: int) -> None:
        score = attribution_of_case.validate(sets[:most], progress=False, **WAYS[way])
        retrained[way] = score.retrained

    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for way in WAYS:
            first = min(STACK, MOST_TRAINED.get(way, STACK))
            rows[way] = {
                "way": way,
                "first_seconds": seconds(partial(validate, way, first)),
                "first_trained": min(first, len(sets)),
                "trained": min(MOST_TRAINED.get(way, len(sets)), len(sets)),
                "seconds": [],
                "plain_seconds": [],
            }
        for _ in range(ROUNDS):
            for way, row in rows.items():
                row["plain_seconds"].append(
                    seconds(partial(plain, setting, attribution_of_case.order))
                )
                row["seconds"].append(seconds(partial(validate, way, row["trained"])))
    for way, row in rows.items():
        changes = retrained[way][:ALONE]
        gap = float((changes - retrained[ONE_BY_ONE]).abs().max() / changes.abs().max())
        yield {
            **row,
            "removals": setting.removals,
            "steps": setting.steps,
            "gap": gap,
            "weights": sum(p.numel() for p in setting.network().parameters()),
        }


# ------------------------------------------------------------------------------------------- tables


def trainings(row: Row) -> list[float]:
    """Return what all removals take in plain trainings, by round."""
    share = row["trained"] / row["removals"]
    pairs = zip(row["seconds"], row["plain_seconds"], strict=True)
    return [taken / share / of_plain for taken, of_plain in pairs]


def compiling(row: Row, stacked: Row) -> str:
    """Return the seconds to compile, and the steps times trainings that pay for them."""
    of_training = statistics.median(row["seconds"]) / row["trained"]
    of_training_stacked = statistics.median(stacked["seconds"]) / stacked["trained"]
    seconds_to_compile = row["first_seconds"] - row["first_trained"] * of_training
    gained = (of_training_stacked - of_training) / row["steps"]
    if gained <= 0:
        return f"{seconds_to_compile:.0f} s, never paid"
    steps = round(seconds_to_compile / gained, -3)
    return f"{seconds_to_compile:.0f} s, {steps:,.0f} steps"


def table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        ratios = trainings(row)
        spread = f"{statistics.median(ratios):.0f} ({min(ratios):.0f} to {max(ratios):.0f})"
        cell = ""
        if row["way"] == COMPILED:
            stacked = [
                other for other in rows if (other["case"], other["way"]) == (row["case"], STACKED)
            ]
            cell = compiling(row, stacked[0]) if stacked else NONE
        plain_seconds = statistics.median(row["plain_seconds"])
        cells = [f"{row['steps']:,}", row["removals"], row["way"], spread, f"{plain_seconds:.2f}"]
        lines.append([row["case"], *cells, cell, f"{row['gap']:.0e}"])
    head = [
        "network",
        "steps",
        "removals",
        "way",
        "plain trainings",
        "seconds of one",
        "compiling",
        "largest gap",
    ]
    return grid(head, lines, "lrrlrrrr")


def main() -> None:
    args = parsed(arguments(__doc__, RAW))
    torch.set_num_threads(1)
    cases = [NARROW] if args.miniature else [*CASES]

    def rows_of(case: str) -> list[Row]:
        return list(measured(case, args.miniature))

    if args.runs:
        go_on(args.out, [{"case": case} for case in cases], rows_of, machine=environment())
    show(args.write, "retraining", table(read(args.out, "case")))


if __name__ == "__main__":
    main()
