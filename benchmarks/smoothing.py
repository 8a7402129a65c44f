"""Which smoothing of Adam's adjoint gives scores that predict removals, for this seed and others?

    python benchmarks/smoothing.py             # goes on where it was stopped
    python benchmarks/smoothing.py --write benchmarks/results/smoothing.md

Each of fifteen trainings, by usual optimizers at usual rates, is scored with the seeds 0 to 3 of
start and order, by `metapl.attribute(smoothing=c)` for each c and by simpler ways. A score is
judged by the rank correlation of its sums over 25 random sets of 5 % of the training examples with
the change of the loss where a loop of plain PyTorch trains without such a set: of the training that
was scored (two seeds), and the mean over six other seeds, which gave no scores. The ceiling is the
correlation of the true effects of one of these six with the mean of the five others.

Declared before the first run: the default becomes the c, or the rule, whose correlation with the
same training is behind that of the exact scores by at most 0.05 in every training, and ahead in the
mean over all of them; among several the one with the highest mean. Else it stays 0. The rule is
``auto``: the c at which the scores of the seeds 0 and 1 agree most, which needs no retraining. For
other seeds the same is asked of the mean of the four seeds' scores.

The simpler ways, on the states that the plain loop had: the dot products of the gradients of an
example and of the outer loss at the end; the sum of these over five states (TracIn); and the same
with the gradient of an example divided by Adam's √n̂ + ε of its state, and the outer gradient at the
end (an influence of first order through AdamW). The exact scores are MAGIC's. *By step* divides
what the exact scores have of each step by the median of its absolute values, so that no step rules
the sum, as bergson's users look at them.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import (
    BLUE,
    GREEN,
    ORANGE,
    RESULTS,
    Row,
    arguments,
    environment,
    figure_of,
    go_on,
    grid,
    parsed,
    read,
    show,
)
from ordinary import (
    DIGITS,
    OF_DIGITS,
    Data,
    Examples,
    Recurrent,
    Transformer,
    area,
    docstrings,
    example_losses,
    mean_loss,
    three_convolutions,
)
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl
from metapl.feedback import Forward
from metapl.problems import EqualWeights, NextToken

RAW = RESULTS / "smoothing.jsonl"
SMOOTHINGS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SCORING_SEEDS = (0, 1, 2, 3)
OWN_SEEDS = (0, 1)
OTHER_SEEDS = (10, 11, 12, 13, 14, 15)
SETS = 25
REMOVED_SHARE = 0.05
STATES = 5
# How far a default may be behind the exact scores in one training.
MARGIN = 0.05

Optimizers = tuple[torch.optim.Optimizer, ...]


# -------------------------------------------------------------------------------------- trainings


def convolutions_with_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def adamw(network: nn.Module, rate: float) -> Optimizers:
    return (torch.optim.AdamW(network.parameters(), lr=rate),)


def muon(network: nn.Module, rate: float) -> Optimizers:
    """Return Muon for matrices, at twenty times the rate, and AdamW for the rest."""
    matrices = [p for p in network.parameters() if p.ndim == 2]
    others = [p for p in network.parameters() if p.ndim != 2]
    return torch.optim.Muon(matrices, lr=20 * rate), torch.optim.AdamW(others, lr=rate)


@dataclass(frozen=True)
class Case:
    """A training: data, network, rate, batch size and steps.

    Attributes:
        is_pretrained: the network begins with 200 steps of AdamW on the test half, whose labels
            are right.
    """

    data: Callable[[], Data]
    network: Callable[[], nn.Module]
    rate: float
    batch_size: int
    steps: int
    optimizers: Callable[[nn.Module, float], Optimizers] = adamw
    is_pretrained: bool = False

    def start(self, seed: int) -> tuple[nn.Module, Optimizers]:
        """Return the network with the initial weights of a seed, and its optimizers."""
        torch.manual_seed(seed)
        network = self.network()
        if self.is_pretrained:
            examples = self.data().test
            generator = torch.Generator().manual_seed(seed)
            order = shuffled(len(examples[0]), self.batch_size, 200, generator)
            for _ in states(network, adamw(network, 1e-3), examples, order):
                pass
        return network, self.optimizers(network, self.rate)


CASES: dict[str, Case] = {
    "digits, perceptron, AdamW 0.001": Case(DIGITS, OF_DIGITS, 1e-3, 50, 132),
    "digits, perceptron, AdamW 0.005": Case(DIGITS, OF_DIGITS, 5e-3, 50, 132),
    "digits, perceptron, AdamW 0.001, 2,000 steps": Case(DIGITS, OF_DIGITS, 1e-3, 50, 2000),
    "digits, perceptron, Muon 0.02, AdamW 0.001": Case(
        DIGITS, OF_DIGITS, 1e-3, 50, 132, optimizers=muon
    ),
    "digits, convolutions, AdamW 0.0003": Case(DIGITS, three_convolutions, 3e-4, 50, 396),
    "digits, convolutions, AdamW 0.001": Case(DIGITS, three_convolutions, 1e-3, 50, 132),
    "digits, convolutions, AdamW 0.005": Case(DIGITS, three_convolutions, 5e-3, 50, 132),
    "digits, convolutions, pretrained, AdamW 0.0003": Case(
        DIGITS, three_convolutions, 3e-4, 50, 132, is_pretrained=True
    ),
    "digits, batch norm, AdamW 0.001": Case(DIGITS, convolutions_with_batch_norm, 1e-3, 50, 132),
    "digits, batch norm, AdamW 0.005": Case(DIGITS, convolutions_with_batch_norm, 5e-3, 50, 132),
    "docstrings, transformer, AdamW 0.0003": Case(docstrings, Transformer, 3e-4, 16, 152),
    "docstrings, transformer, AdamW 0.001": Case(docstrings, Transformer, 1e-3, 16, 152),
    "docstrings, transformer, AdamW 0.005": Case(docstrings, Transformer, 5e-3, 16, 152),
    "docstrings, transformer, pretrained, AdamW 0.0003": Case(
        docstrings, Transformer, 3e-4, 16, 152, is_pretrained=True
    ),
    "docstrings, recurrent, AdamW 0.003": Case(docstrings, Recurrent, 3e-3, 32, 76),
}


def shuffled(examples: int, batch_size: int, steps: int, generator: torch.Generator) -> Tensor:
    """Return the examples of each step, (K, B), in shuffled passes over all of them."""
    passes = math.ceil(steps * batch_size / examples)
    order = torch.cat([torch.randperm(examples, generator=generator) for _ in range(passes)])
    return order[: steps * batch_size].reshape(steps, batch_size)


def states(
    network: nn.Module,
    optimizers: Optimizers,
    examples: tuple[Tensor, Tensor],
    order: Tensor,
    without: Tensor | Sequence[int] = (),
) -> Iterator[int]:
    """Train by a loop of plain PyTorch without some examples; yield the number of steps taken.

    A batch that loses an example keeps its size below the sum.
    """
    inputs, labels = examples
    weights = torch.ones(len(inputs))
    weights[torch.as_tensor(without, dtype=torch.int64)] = 0
    for step, numbers in enumerate(order):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = example_losses(network, (inputs[numbers], labels[numbers]))
        (weights[numbers] * losses).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        yield step + 1


def loss_after(case: Case, seed: int, order: Tensor, without: Tensor | Sequence[int]) -> float:
    """Return the loss that is judged, after a training without some examples."""
    data = case.data()
    network, optimizers = case.start(seed)
    for _ in states(network, optimizers, data.train, order, without):
        pass
    return mean_loss(network, data.judging)


def effects(case: Case, seed: int, order: Tensor, sets: Sequence[Tensor]) -> Tensor:
    """Return the change of the loss without each of the sets, (25,)."""
    loss = loss_after(case, seed, order, without=())
    return torch.tensor([loss_after(case, seed, order, without) - loss for without in sets])


# ------------------------------------------------------------------------------------------ scores


class Scored(NamedTuple):
    """The scores of one seed by each way, (N,), and the order of its examples, (K, B)."""

    ways: dict[str, Tensor]
    order: Tensor


def scores_of(case: Case, seed: int) -> Scored:
    """Return the scores of a seed by each smoothing and by each simpler way."""
    data = case.data()
    ways: dict[str, Tensor] = {}
    for smoothing in SMOOTHINGS:
        network, optimizers = case.start(seed)
        optimizer: Any = optimizers[0] if len(optimizers) == 1 else optimizers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = metapl.attribute(
                network,
                data.train,
                data.judging,
                optimizer=optimizer,
                steps=case.steps,
                batch_size=case.batch_size,
                generator=torch.Generator().manual_seed(seed),
                problem=NextToken() if data.is_text else None,
                smoothing=smoothing,
                progress=False,
            )
        ways[f"{smoothing:g}"] = found.scores
    ways["by step"] = scores_by_step(case, seed, found.order)
    ways |= simpler_scores(case, seed, found.order)
    return Scored(ways, found.order)


def scores_by_step(case: Case, seed: int, order: Tensor) -> Tensor:
    """Return the exact scores with each step's part divided by its median size, (N,)."""
    scores = torch.zeros(len(case.data().is_wrong))
    for numbers, of_step in parts_of_steps(case, seed, order):
        size = of_step.abs().median().clamp_min(torch.finfo(of_step.dtype).tiny)
        scores.index_add_(0, numbers, of_step / size)
    return scores


def parts_of_steps(case: Case, seed: int, order: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the examples of each step, (B,), and what the exact scores have of it, (B,)."""
    data = case.data()
    inputs, labels = data.train
    network, optimizers = case.start(seed)
    found = metapl.hypergradient(
        None,
        network,
        outer=data.judging,
        inner=metapl.Lookahead([(inputs[numbers], labels[numbers]) for numbers in order]),
        problem=NextToken() if data.is_text else EqualWeights(),
        inner_optimizer=optimizers[0] if len(optimizers) == 1 else optimizers,
        mode=Forward(),
        progress=False,
    )
    return list(zip(order, found.feedback, strict=True))


def simpler_scores(case: Case, seed: int, order: Tensor) -> dict[str, Tensor]:
    """Return the scores of the simpler ways, on states of the plain loop."""
    data = case.data()
    network, optimizers = case.start(seed)
    kept: list[tuple[nn.Module, list[Tensor]]] = []
    at = {round(case.steps * (n + 1) / STATES) for n in range(STATES)}
    for step in states(network, optimizers, data.train, order):
        if step in at:
            kept.append((copy.deepcopy(network), divisors(network, optimizers)))
    at_end = gradient(kept[-1][0], data.judging)
    products = [dots(trained, data.train, gradient(trained, data.judging)) for trained, _ in kept]
    scores = {"dot at the end": products[-1], "TracIn": torch.stack(products).sum(0)}
    through_adam = [
        dots(trained, data.train, [v / root for v, root in zip(at_end, roots, strict=True)])
        for trained, roots in kept
    ]
    scores["first order through Adam"] = torch.stack(through_adam).sum(0)
    with torch.no_grad():
        scores["minus the loss"] = -example_losses(kept[-1][0], data.train)
    return scores


def divisors(network: nn.Module, optimizers: Optimizers) -> list[Tensor]:
    """Return √n̂ + ε of each weight of Adam, and 1 for a weight of another optimizer."""
    roots: list[Tensor] = []
    for p in network.parameters():
        root = torch.ones_like(p)
        for optimizer in optimizers:
            state = optimizer.state.get(p, {})
            if "exp_avg_sq" in state:
                beta = optimizer.param_groups[0]["betas"][1]
                corrected = state["exp_avg_sq"] / (1 - beta ** float(state["step"]))
                root = corrected.sqrt() + optimizer.param_groups[0]["eps"]
        roots.append(root)
    return roots


def gradient(network: nn.Module, examples: Examples) -> list[Tensor]:
    loss = example_losses(network, examples).mean()
    return [*torch.autograd.grad(loss, [*network.parameters()])]


def dots(network: nn.Module, examples: Examples, direction: Sequence[Tensor]) -> Tensor:
    """Return ⟨∇ℓ_i, direction⟩ of each example, (N,), by double backward."""
    with sdpa_kernel(SDPBackend.MATH):
        losses = example_losses(network, examples)
        factors = torch.ones_like(losses, requires_grad=True)
        gradients = torch.autograd.grad(losses, [*network.parameters()], factors, create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        (of_examples,) = torch.autograd.grad(slope, factors)
    return of_examples


# ----------------------------------------------------------------------------------------- a study


def correlation(first: Tensor, second: Tensor) -> float:
    return float(spearmanr(first, second)[0])


def predicted(scores: Tensor, sets: Sequence[Tensor]) -> Tensor:
    """Return the sums of the scores of each set, (25,)."""
    return torch.stack([scores[numbers].sum() for numbers in sets])


def measured(name: str, *, is_miniature: bool = False) -> Row:
    """Return what the scores of each way predict of removals, of the same seed and of others."""
    case = CASES[name]
    if is_miniature:
        case = copy.copy(case)
        object.__setattr__(case, "steps", 5)
    data = case.data()
    examples = len(data.is_wrong)
    begin = time.process_time()
    generator = torch.Generator().manual_seed(1)
    sets = [
        torch.randperm(examples, generator=generator)[: round(REMOVED_SHARE * examples)]
        for _ in range(3 if is_miniature else SETS)
    ]
    scored = {seed: scores_of(case, seed) for seed in SCORING_SEEDS}
    own = {seed: effects(case, seed, scored[seed].order, sets) for seed in OWN_SEEDS}
    others: list[Tensor] = []
    for seed in OTHER_SEEDS[: 2 if is_miniature else None]:
        order_generator = torch.Generator().manual_seed(seed)
        order = shuffled(examples, case.batch_size, case.steps, order_generator)
        others.append(effects(case, seed, order, sets))
    truth = torch.stack(others).mean(0)
    row: Row = {"examples": examples, "steps": case.steps, "ways": {}}
    for way in scored[0].ways:
        of_seeds = [scored[seed].ways[way] for seed in SCORING_SEEDS]
        sums = [predicted(scores, sets) for scores in of_seeds]
        pairs = itertools.combinations(of_seeds, 2)
        row["ways"][way] = {
            "own": [correlation(sums[seed], own[seed]) for seed in OWN_SEEDS],
            "others": [correlation(one, truth) for one in sums],
            "mean of seeds": correlation(torch.stack(sums).mean(0), truth),
            "agreement": [correlation(one, two) for one, two in pairs],
            "area": [area(data.is_wrong, -scores) for scores in of_seeds],
        }
    row["ceilings"] = [
        correlation(one, torch.stack([*others[:place], *others[place + 1 :]]).mean(0))
        for place, one in enumerate(others)
    ]
    row["seconds"] = time.process_time() - begin
    return row


# ------------------------------------------------------------------------------------------ tables


def auto(row: Row) -> str:
    """Return the smoothing at which the scores of the seeds 0 and 1 agree most."""
    names = [f"{smoothing:g}" for smoothing in SMOOTHINGS]
    return max(names, key=lambda name: float(row["ways"][name]["agreement"][0]))


def values_of(rows: Sequence[Row], way: str, measure: str) -> list[float]:
    """Return a measure of a way in each training; "auto" is a way too."""
    values = []
    for row in rows:
        found = row["ways"][auto(row) if way == "auto" else way][measure]
        values.append(found if isinstance(found, float) else statistics.mean(found))
    return values


WAYS = [*(f"{smoothing:g}" for smoothing in SMOOTHINGS), "auto"]
SIMPLER = ["by step", "dot at the end", "TracIn", "first order through Adam"]


def table_of(rows: Sequence[Row], measure: str) -> str:
    """Return a measure of each training by the way that scored it, and means below."""
    ways = [*WAYS, *SIMPLER, *(["minus the loss"] if measure == "area" else [])]
    columns = [values_of(rows, way, measure) for way in ways]
    lines = []
    for place, row in enumerate(rows):
        line = [row["name"], f"{row['steps']:,}"]
        line += [f"{column[place]:.2f}" for column in columns]
        if measure in ("others", "mean of seeds"):
            line.append(f"{statistics.mean(row['ceilings']):.2f}")
        lines.append(line)
    means = ["**mean**", ""] + [f"{statistics.mean(column):.2f}" for column in columns]
    if measure in ("others", "mean of seeds"):
        means.append(f"{statistics.mean(statistics.mean(row['ceilings']) for row in rows):.2f}")
    smoothed = [f"c = {way}" for way in WAYS[1:-1]]
    head = ["training", "steps", "exact", *smoothed, *ways[len(smoothed) + 1 :]]
    if measure in ("others", "mean of seeds"):
        head.append("one seed's truth")
    return grid(head, [*lines, means], 2)


def table_of_rules(rows: Sequence[Row]) -> str:
    """Return how far each way is from the exact scores: the declared test of a default."""
    lines = []
    for measure in ("own", "mean of seeds"):
        exact = values_of(rows, "0", measure)
        for way in (*WAYS[1:], *SIMPLER):
            values = values_of(rows, way, measure)
            gains = [value - base for value, base in zip(values, exact, strict=True)]
            passes = min(gains) >= -MARGIN and statistics.mean(gains) > 0
            lines.append(
                [
                    {"own": "the same training", "mean of seeds": "other seeds"}[measure],
                    way if way in (*SIMPLER, "auto") else f"c = {way}",
                    f"{statistics.mean(gains):+.2f}",
                    f"{min(gains):+.2f}",
                    f"{max(gains):+.2f}",
                    f"{sum(gain > 0 for gain in gains)} of {len(gains)}",
                    "yes" if passes else "no",
                ]
            )
    head = ["judged by", "scores", "mean gain", "lowest", "highest", "ahead of exact", "passes"]
    return grid(head, lines, 2)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw the correlations over c, a thin line a training, their means, rivals and ceiling."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    # Exact scores, c = 0, stand left of the others.
    places = range(len(SMOOTHINGS))
    panels = {"own": "Removals from the training that was scored", "mean of seeds": "Other seeds"}
    for axes, (measure, title) in zip(
        figure.subplots(1, 2, sharey=True), panels.items(), strict=True
    ):
        curves = [values_of(rows, f"{smoothing:g}", measure) for smoothing in SMOOTHINGS]
        for curve in zip(*curves, strict=True):
            axes.plot(places, curve, color="0.8", linewidth=0.8)
        means = [statistics.mean(values) for values in curves]
        axes.plot(places, means, "o-", color=BLUE, linewidth=2, label="mean")
        rival = statistics.mean(values_of(rows, "by step", measure))
        axes.axhline(rival, color=ORANGE, linewidth=1.2, label="exact, by step over its median")
        if measure == "mean of seeds":
            ceiling = statistics.mean(statistics.mean(row["ceilings"]) for row in rows)
            label = "what one seed's removals say"
            axes.axhline(ceiling, color=GREEN, linewidth=1.2, linestyle="--", label=label)
        axes.set_xticks(places, ["exact", *(f"{smoothing:g}" for smoothing in SMOOTHINGS[1:])])
        axes.set_xlabel("c")
        axes.set_title(title, fontsize=10, loc="left")
        axes.legend(fontsize=8, loc="lower left", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("rank correlation with removals")
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parsed(arguments(__doc__, RAW))
    torch.set_num_threads(1)
    names = [*CASES]
    if args.miniature:
        names = [names[3], names[-1]]
    if args.runs:
        run = partial(measured, is_miniature=args.miniature)
        go_on(args.out, [{"name": name} for name in names], run, machine=environment())
    rows = read(args.out, "ways")
    show(args.write, "smoothing-rules", table_of_rules(rows))
    show(args.write, "smoothing-own", table_of(rows, "own"))
    show(args.write, "smoothing-others", table_of(rows, "others"))
    show(args.write, "smoothing-mean", table_of(rows, "mean of seeds"))
    show(args.write, "smoothing-agreement", table_of(rows, "agreement"))
    show(args.write, "smoothing-area", table_of(rows, "area"))
    if args.write:
        draw(figure_of(args.write, "smoothing.png"), rows)


if __name__ == "__main__":
    sys.exit(main())
