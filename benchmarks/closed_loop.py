"""Is a training set that scores have chosen for a target better than one that a simpler way chose?

    python benchmarks/closed_loop.py --cifar CIFAR --labels LABELS.npz --fashion FOLDER
    python benchmarks/closed_loop.py --write benchmarks/results/closed_loop.md

Three training sets that are partly beside the target, drawn anew for each of five seeds:

- text: 1,200 pieces of 32 bytes, half of them docstrings of Python's standard library, the target,
  and half its code; judged by the loss on 1,000 other docstrings, in nats a byte;
- people: 2,000 pictures of CIFAR-10 of 16 x 16 with the worse labels of CIFAR-10N, 40 % of them
  wrong; the target has 300 pictures with right labels; judged on 2,000 test pictures;
- two classes: 2,000 pictures of Fashion-MNIST of all ten classes; the target is 200 T-shirts and
  shirts, which are taken for each other; judged on the 2,000 test pictures of these two.

A first training, with a seed of its own, gives what each way needs. Then the best half by that way
is trained on anew, by another start and order, as many steps as on all. Judged is the last state.
Nothing was tuned: halves, steps and rates were written down before the first run.

Declared before the first run: the scores of `metapl.attribute(smoothing=0.3)` are compared with
each other arm, paired over the seeds, by their mean difference with a 95 % interval of Student's t.
They have helped on a set where they are ahead of *every* simpler way with an interval above 0.

The arms have equal steps of the last training. What choosing costs besides is a column. All data
are also trained on for as many steps as a choice by scores takes altogether.
"""

from __future__ import annotations

import ast
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion_feedback import DEBIAN, bytes_of, halved_pictures
from harness import (
    NONE,
    RESULTS,
    Row,
    arguments,
    environment,
    go_on,
    grid,
    interval,
    parsed,
    read,
    show,
)
from ordinary import Examples, Transformer, example_losses
from people_labels import CLASSES, KIND, numbered, random_photographs, read_pictures
from smoothing import dots, gradient, shuffled
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.problems import NextToken

RAW = RESULTS / "closed_loop.jsonl"
SEEDS = (0, 1, 2, 3, 4)
LENGTH = 32
PAIR = (0, 6)
# Added to the seed of the first training for that of the last one.
ANOTHER_SEED = 100
# A first training and its scores take as long as so many trainings more (docs/whole-trainings.md).
SCORES_IN_TRAININGS = 7


@dataclass(frozen=True)
class Draw:
    """The examples of a seed.

    Attributes:
        is_beside: which training examples are of another source, wrong or of another class.
    """

    train: Examples
    target: Examples
    test: Examples
    is_beside: Tensor
    is_text: bool = False


@dataclass(frozen=True)
class Places:
    """Where the pictures are, and how many steps a training has."""

    cifar: Path
    labels: Path
    fashion: Path
    is_miniature: bool


# -------------------------------------------------------------------------------------------- data


@cache
def pieces_of_python() -> tuple[Tensor, Tensor]:
    """Return pieces of docstrings and of code of Python's standard library, (N, 32) bytes each."""
    docstrings: list[str] = []
    code: list[str] = []
    folder = Path(ast.__file__).parent
    for file in sorted(folder.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    docstrings.append(docstring)
                    node.body = node.body[1:] or [ast.Pass()]
        code.append(ast.unparse(tree))
    return pieces("\n".join(docstrings)), pieces("\n".join(code))


def pieces(text: str) -> Tensor:
    numbers = torch.tensor(bytearray(text.encode()), dtype=torch.int64)
    return numbers[: len(numbers) // LENGTH * LENGTH].view(-1, LENGTH)


def text(seed: int, places: Places) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    docstrings, code = (
        part[torch.randperm(len(part), generator=generator)] for part in pieces_of_python()
    )
    train = torch.cat([docstrings[:600], code[:600]])
    target, test = docstrings[600:800], docstrings[800:1800]
    is_beside = torch.arange(1200) >= 600
    return Draw((train, train), (target, target), (test, test), is_beside, is_text=True)


def people(seed: int, places: Places) -> Draw:
    files = numbered(places.cifar / "train")
    of_people = np.load(places.labels)[KIND]
    names = sorted(path.name for path in (places.cifar / "train").iterdir())
    order = np.random.default_rng(seed).permutation(sorted(files)).tolist()
    tested = [*numbered(places.cifar / "test").values()]
    tested = np.random.default_rng(seed).permutation(np.array(tested, dtype=object)).tolist()
    count, trusted = (60, 20) if places.is_miniature else (2000, 300)

    def right(paths: Sequence[Path]) -> Tensor:
        return torch.tensor([names.index(path.parent.name) for path in paths])

    noisy = [files[number] for number in order[:count]]
    target = [files[number] for number in order[count : count + trusted]]
    test = tested[:2000]
    labels = torch.from_numpy(of_people[order[:count]].astype(np.int64))
    return Draw(
        (pictures(noisy), labels),
        (pictures(target), right(target)),
        (pictures(test), right(test)),
        labels != right(noisy),
    )


def pictures(paths: Sequence[Path]) -> Tensor:
    return (read_pictures([*paths], 16) - 0.5) / 0.25


def two_classes(seed: int, places: Places) -> Draw:
    x, y, x_test, y_test = clothes(places)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    is_of_pair = (y[2000:] == PAIR[0]) | (y[2000:] == PAIR[1])
    of_pair = 2000 + is_of_pair.nonzero()[:200, 0]
    is_tested = (y_test == PAIR[0]) | (y_test == PAIR[1])
    is_beside = (y[:2000] != PAIR[0]) & (y[:2000] != PAIR[1])
    target, test = (x[of_pair], y[of_pair]), (x_test[is_tested], y_test[is_tested])
    return Draw((x[:2000], y[:2000]), target, test, is_beside)


@cache
def clothes(places: Places) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Fashion-MNIST of 14 x 14 pixels, or random pictures for a miniature."""
    if places.is_miniature:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3000, 196, generator=generator)
        y = torch.randint(0, 10, (3000,), generator=generator)
        return x, y, x[:500], y[:500]
    x, x_test = (
        halved_pictures(places.fashion / f"{name}-images-idx3-ubyte.gz").flatten(1)
        for name in ("train", "t10k")
    )
    y, y_test = (
        bytes_of(places.fashion / f"{name}-labels-idx1-ubyte.gz", offset=8).long()
        for name in ("train", "t10k")
    )
    mean, deviation = x.mean(), x.std()
    return (x - mean) / deviation, y, (x_test - mean) / deviation, y_test


# --------------------------------------------------------------------------------------- trainings


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, CLASSES),
    )


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, CLASSES))


@dataclass(frozen=True)
class Set:
    """A training set with its network, batch size and steps, all by AdamW at 0.001."""

    title: str
    draw: Callable[[int, Places], Draw]
    network: Callable[[], nn.Module]
    batch_size: int
    steps: int


SETS = {
    "text": Set("text, loss", text, Transformer, 32, 300),
    "people": Set("people's labels, error in %", people, convolutions, 50, 400),
    "two classes": Set("two classes, error in %", two_classes, perceptron, 50, 400),
}
STEPS_OF_MINIATURE = 3


def start(of_set: Set, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    network = of_set.network()
    return network, torch.optim.AdamW(network.parameters(), lr=1e-3)


def trained(
    of_set: Set,
    seed: int,
    examples: Examples,
    steps: int,
    losses: Callable[[nn.Module, Examples, Tensor], Tensor] | None = None,
) -> nn.Module:
    """Return the network after a training of plain PyTorch.

    Args:
        losses: of the examples of a batch, by their numbers; None: cross-entropies.
    """
    network, optimizer = start(of_set, seed)
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = examples
    for numbers in shuffled(len(inputs), of_set.batch_size, steps, generator):
        batch = (inputs[numbers], labels[numbers])
        optimizer.zero_grad()
        if losses is None:
            loss = example_losses(network, batch).mean()
        else:
            loss = losses(network, batch, numbers).mean()
        loss.backward()
        optimizer.step()
    return network


@torch.no_grad()
def judged(network: nn.Module, draw: Draw) -> float:
    """Return the loss of text in nats, or the error of pictures in %."""
    inputs, labels = draw.test
    if draw.is_text:
        return float(example_losses(network, draw.test).mean())
    return 100 * float((network(inputs).argmax(1) != labels).float().mean())


# ------------------------------------------------------------------------------ ways to choose


def scores(of_set: Set, seed: int, draw: Draw, steps: int, smoothing: float) -> Tensor:
    """Return what each example does for the target through a whole training, (N,)."""
    network, optimizer = start(of_set, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = metapl.attribute(
            network,
            draw.train,
            draw.target,
            optimizer=optimizer,
            steps=steps,
            batch_size=of_set.batch_size,
            problem=NextToken() if draw.is_text else None,
            smoothing=smoothing,
            progress=False,
        )
    return found.scores


def small_loss(first: nn.Module, draw: Draw) -> Tensor:
    """Return minus the loss of each example in the network of the first training, (N,)."""
    with torch.no_grad():
        return -example_losses(first, draw.train)


def likeness(draw: Draw) -> Tensor:
    """Return how like each example is to the target, (N,).

    Of text it is the mean log-likelihood ratio of its pairs of bytes, of the target to all; of
    pictures minus the distance to the nearest one of the target with the same label.
    """
    inputs, labels = draw.train
    if draw.is_text:
        ratio = log_pairs(draw.target[0]) - log_pairs(inputs)
        return ratio[inputs[:, :-1], inputs[:, 1:]].mean(1)
    near, near_labels = draw.target
    distances = torch.cdist(inputs.flatten(1), near.flatten(1))
    is_other = labels[:, None] != near_labels
    return -distances.masked_fill(is_other, float(distances.max()) + 1).amin(1)


def log_pairs(ids: Tensor) -> Tensor:
    """Return log p(next byte | byte), (256, 256), with 0.1 added to each count."""
    counts = torch.full((256, 256), 0.1)
    pairs = torch.ones(ids[:, 1:].numel())
    counts.index_put_((ids[:, :-1].flatten(), ids[:, 1:].flatten()), pairs, accumulate=True)
    return (counts / counts.sum(1, keepdim=True)).log()


def gold_loss(
    first: nn.Module, draw: Draw
) -> tuple[Examples, Callable[[nn.Module, Examples, Tensor], Tensor]]:
    """Return all examples with those of the target, and gold loss correction of the former.

    Source: Hendrycks et al. (2018).
    """
    inputs, labels = draw.target
    with torch.no_grad():
        q = first(inputs).softmax(-1)
    # A class that the target lacks keeps its labels.
    rows = torch.eye(CLASSES)
    for c in labels.unique().tolist():
        rows[c] = q[labels == c].mean(0)
    given = len(draw.train[0])

    def losses(network: nn.Module, batch: Examples, numbers: Tensor) -> Tensor:
        x, y = batch
        z = network(x)
        through = (z.softmax(-1) @ rows).clamp_min(1e-8).log()
        corrected = F.nll_loss(through, y, reduction="none")
        return torch.where(numbers < given, corrected, F.cross_entropy(z, y, reduction="none"))

    return joined(draw), losses


def joined(draw: Draw) -> Examples:
    """Return all examples and those of the target."""
    (x, y), (x_target, y_target) = draw.train, draw.target
    return torch.cat([x, x_target]), torch.cat([y, y_target])


ARMS = {
    "scores": "best half by scores, smoothing 0.3",
    "exact": "best half by exact scores",
    "all": "all",
    "longer": f"all, {1 + SCORES_IN_TRAININGS} times the steps",
    "random": "a random half",
    "loss": "half with the smallest loss",
    "likeness": "half that is most like the target",
    "dot": "best half by gradient dot products",
    "labels": "all with a label that the target has",
    "target": "all, and the target",
    "gold": "all, and the target, gold loss correction",
}


def measured(*, name: str, seed: int, places: Places) -> Row:
    """Return what each arm reaches on a set with a seed."""
    torch.set_num_threads(1)
    of_set = SETS[name]
    steps = STEPS_OF_MINIATURE if places.is_miniature else of_set.steps
    draw = of_set.draw(seed, places)
    began = begin = time.process_time()
    first = trained(of_set, seed, draw.train, steps)
    plain_seconds = time.process_time() - begin
    ways: dict[str, Callable[[], Tensor]] = {
        "scores": lambda: scores(of_set, seed, draw, steps, smoothing=0.3),
        "exact": lambda: scores(of_set, seed, draw, steps, smoothing=0.0),
        "random": lambda: torch.rand(
            len(draw.is_beside), generator=torch.Generator().manual_seed(seed)
        ),
        "loss": lambda: small_loss(first, draw),
        "likeness": lambda: likeness(draw),
        "dot": lambda: dots(first, draw.train, gradient(first, draw.target)),
    }
    row: Row = {"reached": {}, "beside": {}, "choosing": {}}
    another = seed + ANOTHER_SEED
    for way, choose in ways.items():
        begin = time.process_time()
        chosen = choose().argsort(descending=True)[: len(draw.is_beside) // 2]
        # In trainings; a way that reads the network of the first one has that besides.
        row["choosing"][way] = (time.process_time() - begin) / plain_seconds
        row["beside"][way] = float(draw.is_beside[chosen].float().mean())
        half = (draw.train[0][chosen], draw.train[1][chosen])
        row["reached"][way] = judged(trained(of_set, another, half, steps), draw)
    whole = {"all": (draw.train, steps), "target": (joined(draw), steps)}
    whole["longer"] = (draw.train, (1 + SCORES_IN_TRAININGS) * steps)
    if name == "two classes":
        has_label = torch.isin(draw.train[1], draw.target[1])
        whole["labels"] = ((draw.train[0][has_label], draw.train[1][has_label]), steps)
    for arm, (examples, of_arm) in whole.items():
        row["reached"][arm] = judged(trained(of_set, another, examples, of_arm), draw)
    if not draw.is_text:
        examples, losses = gold_loss(first, draw)
        network = trained(of_set, another, examples, steps, losses)
        row["reached"]["gold"] = judged(network, draw)
    row["seconds"] = time.process_time() - began
    return row


# ------------------------------------------------------------------------------------------ tables


def table_of_arms(rows: Sequence[Row]) -> str:
    """Return what each arm reaches on each set, and scores minus it."""
    lines = []
    for arm, title in ARMS.items():
        line = [title]
        costs = [row["choosing"][arm] for row in rows if arm in row["choosing"]]
        line.append(f"{sum(costs) / len(costs):.1f}" if costs else NONE)
        for name in SETS:
            of_set = [row for row in rows if row["name"] == name and arm in row["reached"]]
            if not of_set:
                line += [NONE, NONE]
                continue
            reached = [row["reached"][arm] for row in of_set]
            ours = [row["reached"]["scores"] for row in of_set]
            digits = 2 if name == "text" else 1
            line.append(f"{sum(reached) / len(reached):.{digits}f}")
            line.append(NONE if arm == "scores" else gained(ours, reached))
        lines.append(line)
    head = ["trained on", "choosing, in trainings"]
    for of_set in SETS.values():
        head += [of_set.title, "less by scores"]
    return grid(head, lines)


def gained(ours: Sequence[float], others: Sequence[float]) -> str:
    """Return by how much the scores' arm is lower than another, with its interval."""
    return interval(others, ours, form="+.2f")


def table_of_choices(rows: Sequence[Row]) -> str:
    """Return how much of what a way chose is beside the target, in %."""
    lines = []
    for way in rows[0]["beside"]:
        line = [ARMS[way]]
        for name in SETS:
            shares = [row["beside"][way] for row in rows if row["name"] == name]
            line.append(f"{100 * sum(shares) / len(shares):.0f}" if shares else NONE)
        lines.append(line)
    return grid(["chosen", "text: code, %", "people: wrong, %", "two classes: others, %"], lines)


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument("--cifar", type=Path, help="folder of train/CLASS and test/CLASS")
    parser.add_argument("--labels", type=Path, metavar="FILE", help=".npz of people's labels")
    parser.add_argument("--fashion", type=Path, default=Path(DEBIAN), help="folder of four files")
    args = parsed(parser)
    if args.runs:
        with tempfile.TemporaryDirectory() as folder:
            cifar, labels = args.cifar, args.labels
            if args.miniature:
                cifar = random_photographs(Path(folder) / "noise")
                labels = Path(folder) / "labels.npz"
                count = len(numbered(cifar / "train"))
                np.savez(labels, **{KIND: np.random.default_rng(0).integers(0, CLASSES, count)})
            places = Places(cifar, labels, args.fashion, args.miniature)
            seeds = SEEDS[:1] if args.miniature else SEEDS
            jobs = [{"name": name, "seed": seed} for seed in seeds for name in SETS]

            def run(**job: Any) -> Row:
                return measured(**job, places=places)

            go_on(args.out, jobs, run, machine=environment())
    rows = read(args.out, "reached")
    show(args.write, "closed_loop", table_of_arms(rows))
    show(args.write, "closed_loop-chosen", table_of_choices(rows))


if __name__ == "__main__":
    sys.exit(main())
