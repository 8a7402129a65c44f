"""The tasks of the leaderboard: data, networks, trainings, and which examples are removed.

Nothing here is metapl's: PyTorch, NumPy and scikit-learn's digits. A task has N training examples,
M examples that judge, and a training for each seed, which says the initial weights and the order of
the examples. Data and removed sets are the same for all seeds.

A training on weighted examples, with w = 1 for those that stay and 0 for those that are removed, is

    θ ← U(θ, ∇_θ (1/B) Σ_{i in batch} w_i ℓ_i(θ)),    L = (1/M) Σ_j ℓ_j(θ_K)

so that a batch keeps its B. Many trainings run at once, each a row of a stack.

    python benchmarks/leaderboard/tasks.py    # write docstrings.npz from this Python's own sources
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
# The training on which the methods' own settings are chosen; no row of the table is of it.
TUNING_TASK = "digits-perceptron"
TUNING_SEED = 100
REMOVALS = 100
REMOVED_SHARE = 0.01

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """Inputs, (N, ...), and labels, (N,), or (N, T) of sequences of T words."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training whose examples are to be scored.

    Args:
        network: makes the network; its weights are drawn from torch's default generator.
        data: returns the training examples and those that judge.
        rule: "sgd", with a momentum of 0.9, or "adamw", with eps 1e-6 and a decay of 0.01.
        rate: the first one; it falls to 0 in a line.
        steps: K.
        batch_size: B.
    """

    name: str
    network: Callable[[], nn.Module]
    data: Callable[[], tuple[Examples, Examples]]
    rule: str
    rate: float
    steps: int
    batch_size: int

    def initial(self, seed: int) -> nn.Module:
        """Return the network with the initial weights of a seed."""
        torch.manual_seed(seed)
        return self.network()

    def order(self, seed: int) -> Tensor:
        """Return the examples of each step, (K, B), in shuffled passes over all of them."""
        examples = len(self.data()[0])
        random = torch.Generator().manual_seed(seed)
        passes = -(-self.steps * self.batch_size // examples)
        numbers = [torch.randperm(examples, generator=random) for _ in range(passes)]
        return torch.cat(numbers)[: self.steps * self.batch_size].view(self.steps, self.batch_size)

    def rates(self) -> list[float]:
        """Return the rate of each step."""
        return [self.rate * (1 - step / self.steps) for step in range(self.steps)]

    def removed_sets(self) -> list[Tensor]:
        """Return the sets of examples that are removed, the same for every seed."""
        examples = len(self.data()[0])
        random = torch.Generator().manual_seed(1000)
        size = round(REMOVED_SHARE * examples)
        return [torch.randperm(examples, generator=random)[:size] for _ in range(REMOVALS)]

    def weights_without(self, sets: Sequence[Tensor]) -> Tensor:
        """Return weights of the examples, (1 + S, N): all, and all without each of S sets."""
        weights = torch.ones(1 + len(sets), len(self.data()[0]))
        for row, removed in zip(weights[1:], sets, strict=True):
            row[removed] = 0
        return weights


# --------------------------------------------------------------------------------------- trainings


def example_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each example, (B,); of a sequence the mean of its words'.

    A word is predicted from those before it, so that the first one is not.
    """
    if outputs.ndim == 3:
        outputs = outputs[:, :-1].transpose(1, 2)
        labels = labels[:, 1:]
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return losses.view(len(losses), -1).mean(1)


def weights_by_step(task: Task, seed: int, weights: Tensor) -> Iterator[Weights]:
    """Yield the weights of a stack of networks before each step, and at the end.

    Args:
        weights: of the examples, a row for each network, (S, N).
    """
    network = task.initial(seed)
    train, _ = task.data()
    theta = {
        name: p.detach().expand(len(weights), *p.shape).clone()
        for name, p in network.named_parameters()
    }
    first = {name: torch.zeros_like(p) for name, p in theta.items()}
    second = {name: torch.zeros_like(p) for name, p in theta.items()}

    def loss(theta: Weights, w: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        outputs = functional_call(network, theta, (inputs,))
        return (w * example_losses(outputs, labels)).mean()

    gradients = vmap(grad(loss), in_dims=(0, 0, None, None))
    steps = zip(task.order(seed), task.rates(), strict=True)
    for step, (numbers, rate) in enumerate(steps, start=1):
        yield theta
        batch = (train.inputs[numbers], train.labels[numbers])
        for name, g in gradients(theta, weights[:, numbers], *batch).items():
            if task.rule == "sgd":
                first[name].mul_(0.9).add_(g)
                theta[name].sub_(first[name], alpha=rate)
                continue
            first[name].lerp_(g, 0.1)
            second[name].mul_(0.999).addcmul_(g, g, value=0.001)
            root = (second[name] / (1 - 0.999**step)).sqrt_().add_(1e-6)
            theta[name].mul_(1 - rate * 0.01)
            theta[name].sub_(first[name] / root, alpha=rate / (1 - 0.9**step))
    yield theta


def judging_losses(task: Task, seed: int, theta: Weights) -> Tensor:
    """Return the losses of the examples that judge, (S, M), of a stack of networks."""
    network = task.initial(seed)
    _, outer = task.data()

    def losses(theta: Weights) -> Tensor:
        return example_losses(functional_call(network, theta, (outer.inputs,)), outer.labels)

    return vmap(losses)(theta)


def outer_losses(task: Task, seed: int, weights: Tensor, stack: int = 25) -> Tensor:
    """Return the losses of the examples that judge after trainings on weighted examples, (S, M).

    Args:
        weights: (S, N).
        stack: how many trainings run at once.
    """
    losses = []
    for rows in weights.split(stack):
        *_, theta = weights_by_step(task, seed, rows)
        losses.append(judging_losses(task, seed, theta))
    return torch.cat(losses)


# ---------------------------------------------------------------------------------------- networks


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


class Convolutional(nn.Module):
    """Two convolutions as products with patches, which a stack of networks shares."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(9, channels)
        self.second = nn.Linear(9 * channels, 2 * channels)
        self.last = nn.Linear(2 * channels * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        images = x.view(len(x), 1, 8, 8)
        for layer in (self.first, self.second):
            side = images.shape[-1]
            patches = F.unfold(images, 3, padding=1).mT
            images = F.gelu(layer(patches)).mT.reshape(len(x), -1, side, side)
            images = F.avg_pool2d(images, 2)
        outputs: Tensor = self.last(images.flatten(1))
        return outputs


WORDS = 256
LENGTH = 32


class LanguageModel(nn.Module):
    """A causal transformer in the way of GPT-2: ids (B, T) to logits (B, T, words)."""

    def __init__(self, words: int = WORDS, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.words = nn.Embedding(words, width)
        self.places = nn.Embedding(LENGTH, width)
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 4 * width)
        self.perceptron_out = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.words(ids) + self.places.weight[:length]
        parts = self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        # (B, heads, T, width / heads)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        similarities = query @ key.mT / query.shape[-1] ** 0.5
        is_later = torch.ones(length, length, dtype=torch.bool).triu(1)
        attention = similarities.masked_fill(is_later, -torch.inf).softmax(-1)
        x = x + self.attention_out((attention @ value).transpose(1, 2).flatten(2))
        x = x + self.perceptron_out(F.gelu(self.hidden(self.perceptron_norm(x))))
        return F.linear(self.norm(x), self.words.weight)


# -------------------------------------------------------------------------------------------- data


@cache
def digits() -> tuple[Examples, Examples]:
    """Return 1,000 of scikit-learn's digits, and the other 797."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(x / 16, dtype=torch.float32)[order]
    labels = torch.tensor(y)[order]
    return Examples(inputs[:1000], labels[:1000]), Examples(inputs[1000:], labels[1000:])


TEXT = HERE / "docstrings.npz"


@cache
def pieces_of_text() -> tuple[Tensor, Tensor]:
    """Return ids of all pieces of the text: 1,000 sequences, (N, 32), and 100 to judge, (M, 32).

    The ids are ordered by frequency. 0 stands for pieces without an id.
    """
    stored = np.load(TEXT)
    training = torch.tensor(stored["training"].astype(np.int64))
    return training, torch.tensor(stored["outer"].astype(np.int64))


@cache
def docstrings() -> tuple[Examples, Examples]:
    """Return the sequences with the ids of the 256 most frequent pieces, and 0 for the others."""
    parts = []
    for ids in pieces_of_text():
        words = ids.where(ids < WORDS, 0)
        parts.append(Examples(words, words))
    return parts[0], parts[1]


def write_text(file: Path = TEXT) -> None:
    """Write the ids of the docstrings of this Python's standard library.

    Every tenth file judges. The sequences are drawn at random from all of them.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo"}
    files = []
    for path in sorted(folder.rglob("*.py")):
        if left_out & {*path.relative_to(folder).parts}:
            continue
        with warnings.catch_warnings():
            # Of old escapes in their strings.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
        strings = [string for node in nodes if (string := ast.get_docstring(node))]
        if strings:
            files.append(re.findall(r" ?\w+| ?[^\w\s]|\s+(?=\s)|\s", "\n\n".join(strings)))
    counts = Counter(piece for pieces in files for piece in pieces)
    frequent = [piece for piece, _ in counts.most_common(2**16 - 1)]
    numbers = {piece: number for number, piece in enumerate(frequent, start=1)}
    random = np.random.default_rng(0)

    def drawn(chosen: Sequence[list[str]], count: int) -> np.ndarray:
        ids = [numbers.get(piece, 0) for pieces in chosen for piece in pieces]
        sequences = np.array(ids[: len(ids) // LENGTH * LENGTH], np.uint16).reshape(-1, LENGTH)
        rows: np.ndarray = sequences[random.permutation(len(sequences))[:count]]
        return rows

    others = [pieces for number, pieces in enumerate(files) if number % 10 != 9]
    np.savez_compressed(file, training=drawn(others, 1000), outer=drawn(files[9::10], 100))


TASKS = {
    task.name: task
    for task in (
        Task(
            name="digits-perceptron",
            network=perceptron,
            data=digits,
            rule="sgd",
            rate=0.03,
            steps=300,
            batch_size=100,
        ),
        Task(
            name="digits-convolutional",
            network=Convolutional,
            data=digits,
            rule="sgd",
            rate=0.1,
            steps=200,
            batch_size=50,
        ),
        Task(
            name="docstrings-transformer",
            network=LanguageModel,
            data=docstrings,
            rule="adamw",
            rate=3e-3,
            steps=80,
            batch_size=16,
        ),
    )
}

if __name__ == "__main__":
    write_text()
