"""Make the scores of the methods that stand in the leaderboard.

    python benchmarks/leaderboard/methods.py                     # all but bergson
    python benchmarks/leaderboard/methods.py attribute bm25      # some
    python benchmarks/leaderboard/methods.py bergson --python rival/bin/python
    python benchmarks/leaderboard/methods.py influence trak --tune

``--tune`` prints how the settings of a method do on the tuning seed, by which they were chosen. A
cost is processor time on one thread, in plain trainings of the task, which take turns with it.
metapl is needed for its own two methods, and bergson 2.5.1 for its own, in an environment of its
own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import SCORES, TRUTH, rank_correlations
from tasks import (
    HERE,
    SEEDS,
    TASKS,
    TUNING_SEED,
    TUNING_TASK,
    Examples,
    Task,
    Weights,
    example_losses,
    pieces_of_text,
    weights_by_step,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn import functional as F

Options = dict[str, Any]


def trained_weights(task: Task, seed: int) -> Weights:
    """Return the weights after a training on all examples, without a dimension of a stack."""
    *_, theta = weights_by_step(task, seed, task.weights_without([]))
    return {name: t[0] for name, t in theta.items()}


def optimizer_of(task: Task, network: nn.Module) -> torch.optim.Optimizer:
    if task.rule == "sgd":
        return torch.optim.SGD(network.parameters(), lr=task.rate, momentum=0.9)
    return torch.optim.AdamW(network.parameters(), lr=task.rate, eps=1e-6, weight_decay=0.01)


def plain(task: Task, seed: int) -> None:
    """Train once, by torch.optim in a loop: the unit of costs."""
    network = task.initial(seed)
    optimizer = optimizer_of(task, network)
    train, _ = task.data()
    for numbers, rate in zip(task.order(seed), task.rates(), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        example_losses(network(train.inputs[numbers]), train.labels[numbers]).mean().backward()
        optimizer.step()


# ----------------------------------------------------------------------------------------- methods


def by_chance(task: Task, seed: int) -> Tensor:
    """Return random scores."""
    return torch.randn(len(task.data()[0]), generator=torch.Generator().manual_seed(seed))


def by_attribute(task: Task, seed: int, smoothing: float | None = 0.0) -> Tensor:
    """Return metapl's: the derivative of the loss through the whole training.

    Args:
        smoothing: of AdamW's steps in the derivative; 0 is exact, None the default.

    Source: MAGIC (Ilyas and Engstrom, 2025, arXiv 2504.16430).
    """
    import metapl
    from metapl.problems import EqualWeights, NextToken

    train, outer = task.data()
    network = task.initial(seed)
    is_text = train.labels.ndim == 2
    attribution = metapl.attribute(
        network,
        (train.inputs, train.labels),
        (outer.inputs, outer.labels),
        optimizer=optimizer_of(task, network),
        steps=task.steps,
        batch_size=task.batch_size,
        settings={"lr": torch.tensor(task.rates(), dtype=torch.float64)[:, None]},
        generator=torch.Generator().manual_seed(seed),
        problem=NextToken() if is_text else EqualWeights(),
        smoothing=smoothing,
        progress=False,
    )
    assert torch.equal(attribution.order, task.order(seed))
    return attribution.scores


def by_influence(
    task: Task, seed: int, damping: float | dict[str, float] = 1e-2, iterations: int = 30
) -> Tensor:
    r"""Return influence functions at the end of the training, ⟨∇ℓ_i, (G + λ)⁻¹ ∇L⟩, (N,).

    Args:
        damping: λ, or one for each task, by its name.

    G is the Gauss-Newton matrix of all weights over the training examples, Jᵀ H J with H the second
    derivative of the loss in the outputs, and the system is solved by conjugate gradients.

    Source: Koh and Liang, "Understanding black-box predictions via influence functions" (2017);
    Gauss-Newton as in Martens, "Deep learning via Hessian-free optimization" (2010).
    """
    damping_of_task = damping[task.name] if isinstance(damping, dict) else damping
    network = task.initial(seed)
    theta = trained_weights(task, seed)
    train, outer = task.data()

    def outputs(theta: Weights) -> Tensor:
        z = functional_call(network, theta, (train.inputs,))
        # Of sequences, what predicts a word, and each word is an example of 1/T.
        return z[:, :-1] if z.ndim == 3 else z

    def losses(theta: Weights, examples: Examples) -> Tensor:
        return example_losses(functional_call(network, theta, (examples.inputs,)), examples.labels)

    z, pull = vjp(outputs, theta)
    probabilities = z.softmax(-1)
    predictions = z[..., 0].numel()

    def damped_product(v: Weights) -> Weights:
        _, moved = jvp(outputs, (theta,), (v,))
        weighted = probabilities * moved
        curved = weighted - probabilities * weighted.sum(-1, keepdim=True)
        (product,) = pull(curved / predictions)
        return {name: t + damping_of_task * v[name] for name, t in product.items()}

    def dot(a: Weights, b: Weights) -> Tensor:
        return torch.stack([(t * b[name]).sum() for name, t in a.items()]).sum()

    def added(a: Weights, b: Weights, factor: Tensor) -> Weights:
        return {name: t + factor * b[name] for name, t in a.items()}

    residual = grad(lambda theta: losses(theta, outer).mean())(theta)
    direction = residual
    solution = {name: torch.zeros_like(t) for name, t in residual.items()}
    size = dot(residual, residual)
    rounding = torch.finfo(size.dtype).eps ** 2 * size
    for _ in range(iterations):
        if size <= rounding:
            break
        product = damped_product(direction)
        step = size / dot(direction, product)
        solution = added(solution, direction, step)
        residual = added(residual, product, -step)
        next_size = dot(residual, residual)
        direction = added(residual, direction, next_size / size)
        size = next_size
    _, along = jvp(lambda theta: losses(theta, train), (theta,), (solution,))
    return along


def by_tracin(task: Task, seed: int, at_end: bool = False) -> Tensor:
    r"""Return TracIn's scores, summed over the steps that read an example, (N,).

    .. math:: \sum_{k : i \in I_k} \frac{\eta_k}{B}\,
              \langle \nabla \ell_i(\theta_k), \nabla L(\theta) \rangle

    Args:
        at_end: whether θ are the trained weights; otherwise they are θ_k.

    Source: Pruthi et al., "Estimating training data influence by tracing gradient descent" (2020).
    """
    network = task.initial(seed)
    train, outer = task.data()

    def losses(theta: Weights, examples: Examples) -> Tensor:
        return example_losses(functional_call(network, theta, (examples.inputs,)), examples.labels)

    gradient_of_outer = grad(lambda theta: losses(theta, outer).mean())
    outer_gradient = gradient_of_outer(trained_weights(task, seed))
    scores = torch.zeros(len(train))
    # The stack's weights are changed in place by the next step.
    states = weights_by_step(task, seed, task.weights_without([]))
    for numbers, rate, stacked in zip(task.order(seed), task.rates(), states, strict=False):
        theta = {name: t[0] for name, t in stacked.items()}
        if not at_end:
            outer_gradient = gradient_of_outer(theta)
        batch = Examples(train.inputs[numbers], train.labels[numbers])
        _, along = jvp(partial(losses, examples=batch), (theta,), (outer_gradient,))
        scores[numbers] += rate / len(numbers) * along
    return scores


def by_trak(task: Task, seed: int, models: int = 5, dimensions: int = 256) -> Tensor:
    r"""Return TRAK's scores, an implementation of our own, (N,).

    With f = log(p / (1 − p)) of the right answer, of a sequence the mean over its words, and φ = Pᵀ
    ∇f at random projections, the scores of the loss of an example z are

    .. math:: \frac1J \sum_j (1 - p_z)\, \phi_z^\top (\Phi^\top\Phi)^{-1} \phi_i \cdot
              \frac1J \sum_j (1 - p_i)

    over J networks, each trained on a random half of the examples; averaged over z.

    Source: Park et al., "TRAK: Attributing model behavior at scale" (2023).
    """
    network = task.initial(seed)
    train, outer = task.data()
    random = torch.Generator().manual_seed(seed)
    halves = torch.zeros(models, len(train))
    for row in halves:
        row[torch.randperm(len(train), generator=random)[: len(train) // 2]] = 1
    *_, stacked = weights_by_step(task, seed, halves)

    def margin(theta: Weights, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return f of an example, and 1 − p beside it."""
        z = functional_call(network, theta, (inputs[None],))[0]
        if z.ndim == 2:
            z = z[:-1]
            labels = labels[1:]
        log_p = -F.cross_entropy(z, labels, reduction="none")
        doubt = (1 - log_p.exp()).clamp_min(1e-6)
        return (log_p - doubt.log()).mean(), doubt.detach().mean()

    weights = sum(p.numel() for p in network.parameters())
    projection = torch.randn(weights, dimensions, generator=random) / math.sqrt(dimensions)

    def features(theta: Weights, examples: Examples) -> tuple[Tensor, Tensor]:
        """Return φ, (N, dimensions), and 1 − p, (N,)."""
        gradient = vmap(grad(margin, has_aux=True), in_dims=(None, 0, 0))
        projected = []
        doubts = []
        for rows in torch.arange(len(examples)).split(100):
            g, doubt = gradient(theta, examples.inputs[rows], examples.labels[rows])
            projected.append(torch.cat([t.flatten(1) for t in g.values()], 1) @ projection)
            doubts.append(doubt)
        return torch.cat(projected), torch.cat(doubts)

    kernel = torch.zeros(len(train))
    doubts = torch.zeros(len(train))
    for number in range(models):
        theta = {name: t[number] for name, t in stacked.items()}
        phi, doubt = features(theta, train)
        phi_outer, doubt_outer = features(theta, outer)
        of_outer = (doubt_outer[:, None] * phi_outer).mean(0)
        gram = (phi.mT @ phi).double()
        # So that what has no size at all can be divided by.
        gram += 1e-6 * gram.diagonal().mean() * torch.eye(dimensions)
        kernel += phi @ torch.linalg.solve(gram, of_outer.double()).float()
        doubts += doubt
    return kernel / models * (doubts / models)


def by_bm25(task: Task, seed: int, k: float = 1.5, b: float = 0.75) -> Tensor:
    r"""Return how alike a sequence's words are to those of the sequences that judge, (N,).

    .. math:: \sum_{w \in z} \log\Big(1 + \frac{N - n_w + 1/2}{n_w + 1/2}\Big)
              \frac{c_{iw} (k + 1)}{c_{iw} + k (1 - b + b\, T_i / \bar T)}

    averaged over z, with c_iw the count of w in sequence i and n_w the sequences that have it.
    Blanks and the unknown piece count as words too, and weigh little.

    Source: Robertson and Zaragoza, "The probabilistic relevance framework: BM25 and beyond" (2009).
    """
    training, outer = (ids.numpy() for ids in pieces_of_text())
    words = int(max(training.max(), outer.max())) + 1
    counts = np.stack([np.bincount(ids, minlength=words) for ids in training]).astype(np.float64)
    documents = (counts > 0).sum(0)
    rarity = np.log(1 + (len(training) - documents + 0.5) / (documents + 0.5))
    lengths = counts.sum(1, keepdims=True)
    saturated = counts * (k + 1) / (counts + k * (1 - b + b * lengths / lengths.mean()))
    queried = np.stack([np.bincount(ids, minlength=words) > 0 for ids in outer]).mean(0)
    return torch.tensor(saturated @ (rarity * queried))


METHODS: dict[str, Callable[..., Tensor]] = {
    "attribute": by_attribute,
    "attribute-smoothed": by_attribute,
    "influence": by_influence,
    "influence-damped": by_influence,
    "tracin": by_tracin,
    "trak": by_trak,
    "bm25": by_bm25,
    "random": by_chance,
}
TITLES = {
    "attribute": "metapl.attribute, exact through the training",
    "attribute-smoothed": "metapl.attribute, smoothed as by default",
    "influence": "influence functions, Gauss-Newton by CG, all weights",
    "influence-damped": "influence functions, for each task by the damping that this table chose",
    "tracin": "TracIn, every step",
    "trak": "TRAK, our implementation, 5 networks",
    "bm25": "BM25, words alone",
    "random": "random scores",
    "bergson": "bergson 2.5.1, MAGIC",
}
# BM25 needs words, and smoothing AdamW.
ONLY_TASKS = dict.fromkeys(("attribute-smoothed", "bm25"), ["docstrings-transformer"])
# What --tune compares, on the tuning seed.
CHOICES: dict[str, list[Options]] = {
    "influence": [{"damping": damping} for damping in (1e-1, 1e-2, 1e-3, 1e-4)],
    "tracin": [{"at_end": at_end} for at_end in (True, False)],
    "trak": [{"dimensions": dimensions} for dimensions in (64, 256, 512)],
}
# What it chose.
CHOSEN: dict[str, Options] = {
    "attribute-smoothed": {"smoothing": None},
    "influence": {"damping": 1e-2},
    # What does best on each task, as its own rows say; of 0.1 to 100 on convolutions.
    "influence-damped": {
        "damping": {
            "digits-perceptron": 1e-2,
            "digits-convolutional": 30.0,
            "docstrings-transformer": 1e-1,
        }
    },
    "tracin": {"at_end": False},
    "trak": {"dimensions": 256},
}


def by_bergson(task: Task, seed: int, python: Path) -> Tensor:
    """Return bergson's scores, by its own trainer in a process of its own environment."""
    train, outer = task.data()
    inputs = {
        "task": task.name,
        "weights": task.initial(seed).state_dict(),
        "train": (train.inputs, train.labels),
        "outer": (outer.inputs, outer.labels),
        "order": task.order(seed),
    }
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "training.pt"
        target = Path(folder) / "scores.npy"
        torch.save(inputs, source)
        command = [str(python), str(HERE / "by_bergson.py"), str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: bergson stops: {done.stderr.strip().splitlines()[-1]}")
        return torch.tensor(np.load(target))


# ------------------------------------------------------------------------------------- the command


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def make(method: str, python: Path | None) -> None:
    """Write the scores of a method for every task and seed, and what it costs."""
    folder = SCORES / method
    folder.mkdir(parents=True, exist_ok=True)
    options = CHOSEN.get(method, {})
    about: Options = {"title": TITLES[method], "cost": {}, "settings": options}
    for name in ONLY_TASKS.get(method, TASKS):
        task = TASKS[name]
        ratios = []
        for seed in SEEDS:
            # What a first call loads is not measured.
            plain(task, seed)
            seconds_of_plain = seconds(partial(plain, task, seed))
            begin = time.process_time()
            if python is not None:
                scores = by_bergson(task, seed, python)
            else:
                scores = METHODS[method](task, seed, **options)
            ratios.append((time.process_time() - begin) / seconds_of_plain)
            np.save(folder / f"{name}-{seed}.npy", scores.numpy().astype(np.float32))
        # A process of its own begins with seconds of loading, which are no cost of a method.
        if python is None:
            about["cost"][name] = f"{statistics.median(ratios):.1f}"
        print(method, name, about["cost"].get(name, ""), file=sys.stderr, flush=True)
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def tune(method: str) -> None:
    """Print the rank correlation with the trainings of the tuning seed, by setting."""
    task = TASKS[TUNING_TASK]
    stored = json.loads((TRUTH / f"{task.name}.json").read_text())["seeds"][str(TUNING_SEED)]
    changes = np.array(stored["without"]) - stored["loss"]
    for options in CHOICES[method]:
        scores = METHODS[method](task, TUNING_SEED, **options).numpy()
        predicted = np.array([scores[removed.numpy()].sum() for removed in task.removed_sets()])
        correlation = float(rank_correlations(predicted, changes))
        print(f"{method}, {options}: {correlation:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(TITLES))
    parser.add_argument("--tune", action="store_true", help="compare settings on the tuning seed")
    parser.add_argument("--python", type=Path, help="an interpreter that has bergson")
    args = parser.parse_args()
    torch.set_num_threads(1)
    unknown = [method for method in args.methods if method not in TITLES]
    if unknown:
        parser.error(f"{unknown[0]} is no method; expected some of {', '.join(TITLES)}")
    if "bergson" in args.methods and args.python is None:
        parser.error("bergson needs --python FILE, an interpreter that has it")
    for method in args.methods or METHODS:
        if args.tune:
            tune(method)
        else:
            make(method, args.python if method == "bergson" else None)


if __name__ == "__main__":
    main()
