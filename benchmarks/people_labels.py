"""Do learned weights or labels help against the mistakes of people? CIFAR-10 with CIFAR-10N.

    python benchmarks/people_labels.py --root CIFAR --labels LABELS.npz    # an hour of a core
    python benchmarks/people_labels.py --write benchmarks/results/people_labels.md

CIFAR has train/CLASS/NNNNN.png and test/CLASS/NNNNN.png, where NNNNN is the number of a training
picture in the set's own order. LABELS.npz has the labels that people gave to the training pictures
in that order, by CIFAR-10N's names: ``worse_label``, of which 40 % are wrong, and ``aggre_label``,
the majority of three people, of which 9 % are.

A seed draws 10,000 training pictures with the labels of people, and 1,000 others whose labels are
right and known to be, the trusted ones. All pictures are brought to 20 x 20, so that 30,000 of them
forward and back are some twenty seconds of a core. The test has the first 300 test pictures of each
class.

Work: it is counted in plain steps of 64 pictures, forward and back, by the operations of the
convolutions and products; an arm whose step costs more takes fewer steps. Each arm has 469 plain
steps, of which the last 60 are the same for all: finetuning on the trusted pictures. Predictions,
networks for matrices, folds and correctors count. Batch-norm statistics on plain pictures, and
what measures a run, do not. The last weights are tested; early stopping alone goes back, by the
trusted pictures. Network, optimizer, schedule and views are those of the recipe of
``airbench_small``; smoothing is where a setting says so.

Tuning: each arm has two settings, run on seed 90, of which the one is chosen that is better on
2,000 held-out training pictures with right labels. Where a method does not say how the trusted
pictures are learned, they are five times among the pictures that are learned from, as well as what
the method does with them. A method of the library begins to learn weights or labels after its own
share of first steps, or after 70 % of the steps, of which it then takes more. Test pictures are
opened once, by other seeds. Sizes and settings were named after ten runs on seed 91.

Declared before the first run, each as a paired difference by seed of the finetuned networks with
the interval of a t-test; p is not corrected:

- Main question: the library's method that is best on the tuning seed, less the simple way that is
  best there.
- Each method of the library less that simple way, and less plain training on the labels of people.
- ``ExampleWeights`` less plain training with as few steps, the trusted pictures among them: what
  the weights do, apart from what they cost; and such training less the same with all steps.
- The main question again at three times the work, with the same settings.
- All but that once more with the labels of the majority, with settings tuned on these. This was
  declared when the rows of the others had been seen, before the first of its own.

At three times the work, the trusted pictures alone and plain training with few steps were added
when the first of these rows had been seen.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import NONE, RESULTS, Row, grid, read, show
from PIL import Image
from something_simpler import random_photographs
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import networks
from metapl.ablation.cost import flops
from metapl.apps import images
from metapl.data.steps import StepBatches, StepSampler
from metapl.models import Corrector
from metapl.networks.weights import parameter_groups
from metapl.pictures import Affine, Chain, Color, Hole
from metapl.problems import (
    ExampleLabels,
    ExampleWeights,
    LabelCorrection,
    LearningToReweight,
    MetaWeightNet,
    NoiseTransition,
    Table,
    WeightNet,
)
from metapl.training.options import FitOptions
from metapl.training.statistics import estimate_statistics

RAW = RESULTS / "people_labels.jsonl"
CLASSES = 10
KIND = "worse_label"
MAJORITY = "aggre_label"
NETWORK = "airbench_small"
RECIPE = images.RECIPES["airbench"]
RATE = images.RATES["airbench"]
TUNING_SEED = 90
SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4)
LONGER = 3

# A forward pass, as a share of a pass forward and back.
FORWARD = 1 / 3
FINETUNING_RATE = 0.02
PREDICTED_AT_ONCE = 250

# Shares of an arm's work: the network from which a matrix is estimated, those of both folds that
# judge labels, and the corrector's.
MATRIX_SHARE = 0.3
FOLDS_SHARE = 0.3
CORRECTOR_SHARE = 0.2
CHECKS = 10

# How often the trusted examples are among those that are learned from, unless a setting says it.
COPIES = 5

# After which share of the steps co-teaching forgets all that it does, and early learning's memory.
FORGETS_FROM = 0.3
EARLY_MEMORY = 0.7

Batch = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[nn.Module, Batch, float], Tensor]
Config = dict[str, float]


@dataclass(frozen=True)
class Size:
    """How much is run: examples of each kind, a batch, and steps of plain training."""

    noisy: int = 10_000
    trusted_per_class: int = 100
    validation: int = 2_000
    tested_per_class: int = 300
    side: int = 20
    batch: int = 64
    steps: int = 469
    finetuning: int = 60


MINIATURE = Size(
    noisy=60,
    trusted_per_class=2,
    validation=20,
    tested_per_class=3,
    side=16,
    batch=16,
    steps=20,
    finetuning=2,
)


# ------------------------------------------------------------------------------------- the pictures


@dataclass(frozen=True)
class Files:
    """The files of the training and of the test pictures, their classes, and people's labels.

    Args:
        labels: of people, by the number of a training picture.
    """

    train: dict[int, Path]
    test: dict[int, Path]
    classes: tuple[str, ...]
    labels: np.ndarray

    @classmethod
    def of(cls, root: Path, labels: np.ndarray) -> Files:
        classes = tuple(sorted(path.name for path in (root / "train").iterdir()))
        return cls(numbered(root / "train"), numbered(root / "test"), classes, labels)

    def right(self, number: int) -> int:
        """Return the class of a training picture."""
        return self.classes.index(self.train[number].parent.name)


def numbered(folder: Path) -> dict[int, Path]:
    """Return the files of ``folder/CLASS/NNNNN.png`` by their numbers."""
    return {int(path.stem): path for path in sorted(folder.glob("*/*.png"))}


@dataclass(frozen=True)
class Examples:
    """Pictures in [0, 1], (N, 3, S, S), and labels, (N,)."""

    pictures: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> Examples:
        return Examples(self.pictures[rows], self.labels[rows])


@dataclass(frozen=True)
class Draw:
    """The examples of a seed; ``is_wrong`` says it of the labels of people, and no arm is told."""

    noisy: Examples
    is_wrong: Tensor
    trusted: Examples
    validation: Examples
    test: Examples


@lru_cache(maxsize=1)
def drawn(root: Path, labels: Path, kind: str, seed: int, size: Size) -> Draw:
    """Draw the examples of a seed."""
    files = Files.of(root, np.load(labels)[kind])
    order = np.random.default_rng(seed).permutation(sorted(files.train)).tolist()
    right = {number: files.right(number) for number in order}
    trusted: list[int] = []
    for label in range(CLASSES):
        trusted += [number for number in order if right[number] == label][: size.trusted_per_class]
    others = [number for number in order if number not in {*trusted}]
    noisy = others[: size.noisy]
    validation = others[size.noisy : size.noisy + size.validation]
    test: list[Path] = []
    for name in files.classes:
        test += [path for path in files.test.values() if path.parent.name == name][
            : size.tested_per_class
        ]

    def examples(numbers: list[int]) -> Examples:
        pictures = read_pictures([files.train[number] for number in numbers], size.side)
        return Examples(pictures, torch.tensor([right[number] for number in numbers]))

    rightly = examples(noisy)
    of_people = torch.from_numpy(files.labels[noisy].astype(np.int64))
    return Draw(
        noisy=Examples(rightly.pictures, of_people),
        is_wrong=of_people != rightly.labels,
        trusted=examples(trusted),
        validation=examples(validation),
        test=Examples(
            read_pictures(test, size.side),
            torch.tensor([files.classes.index(path.parent.name) for path in test]),
        ),
    )


def read_pictures(paths: list[Path], side: int) -> Tensor:
    """Return the pictures of files, brought to a side, (N, 3, side, side) in [0, 1]."""
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    resized = F.interpolate(pictures, (side, side), mode="bilinear", antialias=True)
    return resized.clamp(0, 1)


MEDIUM = Chain(
    (
        Affine(
            images.MEDIUM_ROTATION,
            images.SHIFT,
            (1 / images.MEDIUM_ZOOM, images.MEDIUM_ZOOM),
            flip=True,
        ),
        Color(images.MEDIUM_COLOR, images.MEDIUM_COLOR, images.MEDIUM_COLOR),
        Hole((images.MEDIUM_HOLE, images.MEDIUM_HOLE)),
    )
)


@dataclass(frozen=True, eq=False)
class Batches(StepBatches[Any]):
    """Augmented batches (pictures, labels, numbers) of examples, in shuffled epochs.

    Args:
        numbers: of the examples; copies of one have the same.
        parts: which of the three a batch has.
    """

    examples: Examples
    numbers: Tensor
    batch_size: int
    seed: int
    stream: int
    parts: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return the batch of a step."""
        sampler = StepSampler(len(self.numbers), self.batch_size, self.seed, self.stream)
        rows = sampler.indices(step)
        seen = MEDIUM(
            self.examples.pictures[rows],
            seed=self.seed + 1000 * self.stream,
            step=step,
            examples=rows,
        )
        whole = (seen, self.examples.labels[rows], self.numbers[rows])
        return tuple(whole[part] for part in self.parts)


# ------------------------------------------------------------------------------------- the training


def network_of(pictures: Tensor) -> nn.Module:
    """Return the network with fresh weights, and with a first layer for these pictures."""
    mean, std = pictures.mean((0, 2, 3)), pictures.std((0, 2, 3))
    module = networks.create(NETWORK, CLASSES)
    network = networks.Normalized(module, mean.tolist(), std.tolist())
    networks.whiten(network, pictures[:500])
    return network.to(memory_format=torch.channels_last)


def sgd(network: nn.Module, rate: float = RATE) -> torch.optim.Optimizer:
    """Return the optimizer of the recipe."""
    groups = parameter_groups(network, RECIPE.weight_decay)
    return torch.optim.SGD(groups, lr=rate, momentum=images.MOMENTUM, nesterov=True)


def schedule(steps: int) -> dict[str, Any]:
    """Return the schedule of the recipe, as options of a fit."""
    return {"steps": steps, "schedule": "linear", "warmup": round(RECIPE.warmup * steps)}


def learn(
    network: nn.Module,
    batches: Batches,
    steps: int,
    loss: Loss,
    *,
    rate: float = RATE,
    after: Callable[[int], None] | None = None,
) -> None:
    """Train plainly for so many steps; ``after`` is called after each."""
    optimizer = sgd(network, rate)
    options = FitOptions(**schedule(steps))
    network.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * options.rate(step)
        optimizer.zero_grad()
        loss(network, batches[step], step / steps).backward()
        optimizer.step()
        if after is not None:
            after(step)


@torch.no_grad()
def predicted(network: nn.Module, pictures: Tensor) -> Tensor:
    """Return the probabilities of the classes, (N, C)."""
    is_training = network.training
    network.eval()
    parts = [network(part).softmax(1) for part in pictures.split(PREDICTED_AT_ONCE)]
    network.train(is_training)
    return torch.cat(parts)


# ------------------------------------------------------------------------------ the rivals' losses


def cross_entropy(smoothing: float = 0.0) -> Loss:
    """Return cross-entropy with label smoothing."""

    def loss(network: nn.Module, batch: Batch, progress: float) -> Tensor:
        return F.cross_entropy(network(batch[0]), batch[1], label_smoothing=smoothing)

    return loss


def generalized_cross_entropy(q: float) -> Loss:
    """Return the mean of (1 - p_y^q) / q (Zhang and Sabuncu, 2018)."""

    def loss(network: nn.Module, batch: Batch, progress: float) -> Tensor:
        probabilities = network(batch[0]).softmax(1).gather(1, batch[1][:, None])
        return ((1 - probabilities.clamp_min(1e-7) ** q) / q).mean()

    return loss


def co_teaching(forgotten: float) -> Loss:
    """Return the loss of two networks, each on what the other one finds easy (Han et al., 2018).

    Args:
        forgotten: the share of a batch that is left out, to which it grows.
    """

    def loss(pair: nn.Module, batch: Batch, progress: float) -> Tensor:
        losses = torch.stack(
            [F.cross_entropy(network(batch[0]), batch[1], reduction="none") for network in pair]
        )
        share = 1 - forgotten * min(1.0, progress / FORGETS_FROM)
        easiest = losses.detach().argsort(1)[:, : round(share * len(batch[1]))]
        return losses.gather(1, easiest.flip(0)).mean(1).sum()

    return loss


class EarlyLearning:
    """Early-learning regularization: CE + λ log(1 - <p, t>) (Liu et al., 2020).

    The target t of an example is the running mean of the predictions p.
    """

    def __init__(self, examples: int, weight: float) -> None:
        self.weight = weight
        self.targets = torch.zeros(examples, CLASSES)

    def __call__(self, network: nn.Module, batch: Batch, progress: float) -> Tensor:
        pictures, labels, numbers = batch
        outputs = network(pictures)
        p = outputs.softmax(1).clamp(1e-4, 1 - 1e-4)
        fresh = p.detach() / p.detach().sum(1, keepdim=True)
        targets = EARLY_MEMORY * self.targets[numbers] + (1 - EARLY_MEMORY) * fresh
        self.targets[numbers] = targets
        regularization = (1 - (targets * p).sum(1)).log().mean()
        return F.cross_entropy(outputs, labels) + self.weight * regularization


@dataclass(frozen=True)
class GoldCorrection:
    """Cross-entropy of people's labels through a matrix, and of trusted ones as they are.

    Args:
        matrix: P(label of people | class), (C, C).
        trusted_from: the first number of a trusted example.
    """

    matrix: Tensor
    trusted_from: int

    def __call__(self, network: nn.Module, batch: Batch, progress: float) -> Tensor:
        pictures, labels, numbers = batch
        p = network(pictures).softmax(1)
        of_people = (numbers < self.trusted_from)[:, None]
        through = torch.where(of_people, p @ self.matrix, p)
        return F.nll_loss(through.clamp_min(1e-8).log(), labels)


def gold_matrix(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the mean prediction over the trusted examples of each class (Hendrycks, 2018)."""
    return torch.stack([probabilities[labels == c].mean(0) for c in range(CLASSES)])


def confident_issues(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return whether a label is off the diagonal of the confident joint (Northcutt et al., 2021).

    A class is confident of an example where its probability is at least the mean one over the
    examples with that label. The label is an issue if another one is the most probable of the
    confident classes. It is cleanlab's ``filter_by="confident_learning"``.

    Args:
        probabilities: of networks that have not learned the examples, (N, C).
        labels: (N,).
    """
    own = probabilities.gather(1, labels[:, None])[:, 0]
    thresholds = torch.full((CLASSES,), torch.inf, dtype=probabilities.dtype)
    for c in labels.unique().tolist():
        thresholds[c] = own[labels == c].mean()
    confident = probabilities >= thresholds
    most_probable = probabilities.where(confident, -torch.inf).argmax(1)
    return confident.any(1) & (most_probable != labels)


# -------------------------------------------------------------------------------------------- a run


@dataclass
class Run:
    """An arm with a setting, on the examples of a seed.

    Attributes:
        work: of the run in plain steps, without finetuning.
        student: what is delivered.
        steps: that the student took, without finetuning.
        found: what else is told of the run.
    """

    draw: Draw
    config: Config
    seed: int
    size: Size
    work: int
    student: nn.Module = field(init=False)
    steps: int = 0
    found: Row = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.student = self.network()

    def network(self) -> nn.Module:
        return network_of(self.draw.noisy.pictures)

    @property
    def trusted_from(self) -> int:
        """Return the number of the first trusted example."""
        return len(self.draw.noisy)

    def batches(self, examples: Examples, numbers: Tensor, stream: int) -> Batches:
        return Batches(examples, numbers, self.size.batch, self.seed, stream)

    def trusted(self, stream: int) -> Batches:
        numbers = self.trusted_from + torch.arange(len(self.draw.trusted))
        return self.batches(self.draw.trusted, numbers, stream)

    def both(
        self, stream: int = 0, rows: Tensor | None = None, copies: int | None = None
    ) -> Batches:
        """Return batches of noisy examples, and of the trusted ones so many times.

        Args:
            rows: of the noisy examples; None: all.
            copies: of the trusted ones; None: as the setting says.
        """
        if rows is None:
            rows = torch.arange(len(self.draw.noisy))
        if copies is None:
            copies = int(self.config.get("copies", COPIES))
        noisy = self.draw.noisy.select(rows)
        pictures = torch.cat([noisy.pictures, *[self.draw.trusted.pictures] * copies])
        labels = torch.cat([noisy.labels, *[self.draw.trusted.labels] * copies])
        of_trusted = self.trusted_from + torch.arange(len(self.draw.trusted))
        numbers = torch.cat([rows, *[of_trusted] * copies])
        return self.batches(Examples(pictures, labels), numbers, stream)

    def train(self, batches: Batches, loss: Loss, steps: int | None = None, **options: Any) -> None:
        """Train the student plainly, by all of the work unless steps are given."""
        self.steps = self.work if steps is None else steps
        learn(self.student, batches, self.steps, loss, **options)

    def passes(self, examples: int) -> int:
        """Return how many plain steps the predictions of so many examples cost."""
        return round(FORWARD * examples / self.size.batch)

    def finetune(self) -> None:
        """Train the student on the trusted examples alone, as every arm ends."""
        loss = cross_entropy()
        learn(self.student, self.trusted(9), self.size.finetuning, loss, rate=FINETUNING_RATE)

    def predicted(self, network: nn.Module, pictures: Tensor) -> Tensor:
        """Return the probabilities of the classes, with batch-norm statistics of plain pictures."""
        plain = self.draw.noisy.pictures[:1000].split(PREDICTED_AT_ONCE)
        estimate_statistics(network, plain)
        return predicted(network, pictures)

    def measured(self, examples: Examples) -> float:
        """Return the student's accuracy."""
        right = self.predicted(self.student, examples.pictures).argmax(1) == examples.labels
        return float(right.double().mean())


def by_plain(run: Run) -> None:
    """Learn the labels of people, and the trusted ones among them."""
    run.train(run.both(), cross_entropy(RECIPE.label_smoothing))


def by_people(run: Run) -> None:
    """Learn the labels of people alone."""
    run.train(run.both(copies=0), cross_entropy(run.config["smoothing"]))


def by_few_steps(run: Run) -> None:
    """Learn plainly, with as many steps as ``ExampleWeights`` takes."""
    steps = affordable("example_weights", run.work, run.size, run.config.get("first"))
    run.train(run.both(), cross_entropy(RECIPE.label_smoothing), steps)


def by_early_stopping(run: Run) -> None:
    """Learn the labels of people, and go back to where the trusted ones were predicted best."""
    steps = run.work - CHECKS * run.passes(len(run.draw.trusted))
    best = -1.0
    weights: dict[str, Tensor] = {}

    def check(step: int) -> None:
        nonlocal best, weights
        if (step + 1) % max(1, steps // CHECKS):
            return
        reached = run.measured(run.draw.trusted)
        if reached >= best:
            best = reached
            weights = {name: t.clone() for name, t in run.student.state_dict().items()}
            run.found["stopped_at"] = (step + 1) / steps

    run.train(run.both(copies=0), cross_entropy(run.config["smoothing"]), steps, after=check)
    run.student.load_state_dict(weights)


def by_trusted(run: Run) -> None:
    """Learn the trusted examples alone."""
    run.train(run.trusted(0), cross_entropy(run.config["smoothing"]))


def by_generalized_cross_entropy(run: Run) -> None:
    run.train(run.both(), generalized_cross_entropy(run.config["q"]))


def by_early_learning(run: Run) -> None:
    examples = run.trusted_from + len(run.draw.trusted)
    run.train(run.both(), EarlyLearning(examples, run.config["weight"]))


def by_co_teaching(run: Run) -> None:
    """Train two networks, at half of the steps, and deliver the first one."""
    pair = nn.ModuleList([run.student, run.network()])
    run.steps = run.work // 2
    learn(pair, run.both(), run.steps, co_teaching(run.config["forgotten"]))


def by_gold_correction(run: Run) -> None:
    first = run.network()
    steps = round(MATRIX_SHARE * run.work)
    learn(first, run.both(1, copies=0), steps, cross_entropy())
    trusted = run.draw.trusted
    matrix = gold_matrix(run.predicted(first, trusted.pictures), trusted.labels)
    loss = GoldCorrection(matrix, run.trusted_from)
    run.train(run.both(), loss, run.work - steps - run.passes(len(trusted)))


def by_confident_learning(run: Run) -> None:
    """Leave out what networks of the other half and of the trusted examples find wrong."""
    noisy = run.draw.noisy
    steps = round(FOLDS_SHARE * run.work / 2)
    fold = torch.arange(len(noisy)) % 2
    probabilities = torch.zeros(len(noisy), CLASSES)
    for half in (0, 1):
        network = run.network()
        others = (fold != half).nonzero()[:, 0]
        learn(network, run.both(1 + half, others), steps, cross_entropy())
        held_out = fold == half
        probabilities[held_out] = run.predicted(network, noisy.pictures[held_out])
    issues = confident_issues(probabilities, noisy.labels)
    run.found["left_out"] = float(issues.double().mean())
    run.found["left_out_wrong"] = float(run.draw.is_wrong[issues].double().mean())
    left = run.work - 2 * steps - run.passes(len(noisy))
    loss = cross_entropy(RECIPE.label_smoothing)
    run.train(run.both(0, (~issues).nonzero()[:, 0]), loss, left)


# --------------------------------------------------------------------------- methods of the library

PROBLEMS: dict[str, Any] = {
    "example_weights": ExampleWeights(),
    "example_labels": ExampleLabels(),
    "label_correction": LabelCorrection(),
    "learning_to_reweight": LearningToReweight(),
    "meta_weight_net": MetaWeightNet(),
    "noise_transition": NoiseTransition(),
}

# The parts of an inner batch: pictures, labels, numbers.
PARTS = {"example_weights": (0, 1, 2), "example_labels": (0, 2)}
PICTURES_AND_LABELS = (0, 1)


def teacher_of(name: str, labels: Tensor, corrector: nn.Module) -> nn.Module | None:
    """Return the teacher that the documentation of a problem begins with.

    Args:
        labels: of all examples by number.
        corrector: a network that has learned the trusted examples.
    """
    match name:
        case "example_weights":
            return Table(torch.zeros(len(labels)))
        case "example_labels":
            return Table(2.0 * F.one_hot(labels, CLASSES))
        case "label_correction":
            return Corrector(corrector, CLASSES)
        case "meta_weight_net":
            return WeightNet()
        case "noise_transition":
            return Table(4 * torch.eye(CLASSES))
        case _:
            return None


def trainer_of(name: str, teacher: nn.Module | None, student: nn.Module) -> metapl.BilevelTrainer:
    """Return the trainer at its defaults, with the optimizer of the recipe for the student.

    The gradient is not verified in a run, where that would cost sixty steps.
    """
    return metapl.BilevelTrainer(
        teacher,
        student,
        "forward",
        problem=PROBLEMS[name],
        inner_optimizer=sgd(student),
        verify=False,
    )


@lru_cache
def costs(name: str, size: Size) -> tuple[float, float]:
    """Return what a step costs in plain steps: one of the student alone, and one with feedback."""
    pictures = torch.rand(size.batch, 3, size.side, size.side)
    labels = torch.arange(size.batch) % CLASSES
    batch = (pictures, labels, torch.arange(size.batch))
    student = network_of(pictures)
    teacher = teacher_of(name, labels, network_of(pictures))
    trainer = trainer_of(name, teacher, student)
    inner = tuple(batch[part] for part in PARTS.get(name, PICTURES_AND_LABELS))
    outer = batch[:2]
    trainer.step(outer, inner)
    plain = flops(lambda: cross_entropy()(student, batch, 0.0).backward())
    alone = flops(lambda: trainer.first_step(outer, inner)) / plain
    return alone, flops(lambda: trainer.step(outer, inner)) / plain


def first_steps(name: str, steps: int, share: float | None) -> int:
    """Return in how many of the steps the student learns alone; None: as the problem says."""
    if share is None:
        return int(PROBLEMS[name].first_steps(steps))
    return round(share * steps)


def affordable(name: str, work: int, size: Size, share: float | None = None) -> int:
    """Return how many steps of a method so many plain steps pay for."""
    alone, with_feedback = costs(name, size)

    def is_affordable(steps: int) -> bool:
        first = first_steps(name, steps, share)
        return first * alone + (steps - first) * with_feedback <= work

    return max(filter(is_affordable, range(2, work)), default=2)


def by_library(run: Run, name: str) -> None:
    """Learn weights or labels beside the student, at the defaults of the library."""
    work = run.work
    corrector = run.network()
    if name == "label_correction":
        steps = round(CORRECTOR_SHARE * work)
        learn(corrector, run.trusted(2), steps, cross_entropy())
        work -= steps
    share = run.config.get("first")
    run.steps = affordable(name, work, run.size, share)
    labels = torch.cat([run.draw.noisy.labels, run.draw.trusted.labels])
    teacher = teacher_of(name, labels, corrector)
    trainer = trainer_of(name, teacher, run.student.train())
    inner = run.both()
    parts = PARTS.get(name, PICTURES_AND_LABELS)
    outer = run.trusted(1)
    trainer.fit(
        outer=with_parts(outer, PICTURES_AND_LABELS),
        inner=with_parts(inner, parts),
        first_steps=first_steps(name, run.steps, share),
        log_every=run.steps,
        progress=False,
        **schedule(run.steps),
    )


def with_parts(batches: Batches, parts: tuple[int, ...]) -> Batches:
    """Return the same batches with these parts alone."""
    return Batches(
        batches.examples, batches.numbers, batches.batch_size, batches.seed, batches.stream, parts
    )


# -------------------------------------------------------------------------------------------- arms

SMOOTHED: tuple[Config, ...] = ({"smoothing": 0.2}, {"smoothing": 0.0})
WITH_TRUSTED: tuple[Config, ...] = ({"copies": COPIES}, {"copies": 2})
Q: tuple[Config, ...] = ({"q": 0.7}, {"q": 0.3})
WEIGHTS: tuple[Config, ...] = ({"weight": 3.0}, {"weight": 1.0})
FORGOTTEN: tuple[Config, ...] = ({"forgotten": 0.4}, {"forgotten": 0.2})
FIRST: tuple[Config, ...] = ({}, {"first": 0.7})


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        title: what it is called in a table.
        train: takes a run, and leaves its student trained.
        settings: those that are tried.
    """

    title: str
    train: Callable[[Run], None]
    settings: tuple[Config, ...]


SIMPLE = {
    "plain": Arm("plain, labels of people", by_people, SMOOTHED),
    "both": Arm("plain, trusted pictures too", by_plain, WITH_TRUSTED),
    "gold": Arm("gold loss correction", by_gold_correction, WITH_TRUSTED),
    "confident": Arm("confident learning prunes", by_confident_learning, WITH_TRUSTED),
    "early_stopping": Arm("stopped early by the trusted", by_early_stopping, SMOOTHED),
    "trusted": Arm("trusted pictures alone", by_trusted, SMOOTHED),
    "gce": Arm("generalized cross entropy", by_generalized_cross_entropy, Q),
    "early_learning": Arm("early-learning regularization", by_early_learning, WEIGHTS),
    "co_teaching": Arm("co-teaching", by_co_teaching, FORGOTTEN),
}
LIBRARY = {
    name: Arm(f"`{type(problem).__name__}`", partial(by_library, name=name), FIRST)
    for name, problem in PROBLEMS.items()
}
FEW_STEPS = "few_steps"
# It has the setting of the method whose steps it takes.
SETTING_OF = {FEW_STEPS: "example_weights"}
CONTROLS = {FEW_STEPS: Arm("plain, trusted pictures too, few steps", by_few_steps, ())}
ARMS = {**SIMPLE, **LIBRARY, **CONTROLS}


def ran(arm: str, config: Config, seed: int, budget: int, draw: Draw, size: Size, part: str) -> Row:
    """Run an arm, and return its accuracy on a part of the draw before and after finetuning."""
    run = Run(draw, config, seed, size, work=budget * size.steps - size.finetuning)
    # The costs of a step are counted once, and not in the time of a run.
    for name in PROBLEMS:
        costs(name, size)
    begun = time.process_time()
    ARMS[arm].train(run)
    seconds = time.process_time() - begun
    examples: Examples = getattr(draw, part)
    before = run.measured(examples)
    begun = time.process_time()
    run.finetune()
    seconds += time.process_time() - begun
    row = {f"{part}_before": before, f"{part}_accuracy": run.measured(examples)}
    wrong = float(draw.is_wrong.double().mean())
    row |= {"steps": run.steps, "core_seconds": round(seconds, 1), "wrong": round(wrong, 4)}
    return row | run.found


# -------------------------------------------------------------------------------------------- jobs


def of_kind(rows: list[Row], kind: str) -> list[Row]:
    """Return the rows of runs on a kind of people's labels; those of the first kind do not say."""
    return [row for row in rows if row.get("kind", KIND) == kind]


def chosen_config(rows: list[Row], arm: str) -> Config:
    """Return the setting of an arm that is best on the tuning seed."""
    tuning = [row for row in rows if row.get("tuned") == SETTING_OF.get(arm, arm)]
    config: Config = harness.best(tuning, "config", "validation_accuracy")
    return config


def best_of(rows: list[Row], arms: dict[str, Arm]) -> str:
    """Return the arm that is best on the tuning seed, of its settings."""
    reached = {
        arm: max(row["validation_accuracy"] for row in rows if row.get("tuned") == arm)
        for arm in arms
        if any(row.get("tuned") == arm for row in rows)
    }
    return max(reached, key=lambda arm: reached[arm])


def jobs(out: Path, *, miniature: bool) -> Iterator[Row]:
    """Yield the jobs, seed by seed over all arms, so that what is there is a fair table."""
    for arm, tuned in ARMS.items():
        for config in tuned.settings[:1] if miniature else tuned.settings:
            yield {"tuned": arm, "config": config, "seed": TUNING_SEED, "budget": 1}
    for seed in SEEDS[:2] if miniature else SEEDS:
        for arm in ARMS:
            yield {"arm": arm, "seed": seed, "budget": 1}
    rows = of_kind(read(out), KIND)
    for seed in SEEDS[:2] if miniature else SEEDS:
        for arm in (best_of(rows, SIMPLE), best_of(rows, LIBRARY)):
            yield {"arm": arm, "seed": seed, "budget": LONGER}
    for seed in () if miniature else SEEDS:
        for arm in ("trusted", FEW_STEPS):
            yield {"arm": arm, "seed": seed, "budget": LONGER}
    for seed in () if miniature else MORE_SEEDS:
        for arm in ARMS:
            yield {"arm": arm, "seed": seed, "budget": 1}
    for arm, tuned in ARMS.items():
        for config in tuned.settings[:1] if miniature else tuned.settings:
            job = {"tuned": arm, "config": config, "seed": TUNING_SEED, "budget": 1}
            yield job | {"kind": MAJORITY}
    for seed in SEEDS[:2] if miniature else (*SEEDS, *MORE_SEEDS):
        for arm in ARMS:
            yield {"arm": arm, "seed": seed, "budget": 1, "kind": MAJORITY}


# ------------------------------------------------------------------------------------------ tables


def selected(rows: list[Row], arm: str, budget: int = 1) -> dict[int, Row]:
    """Return the tested rows of an arm by seed."""
    return {row["seed"]: row for row in rows if row.get("arm") == arm and row["budget"] == budget}


def compared(first: dict[int, Row], second: dict[int, Row]) -> list[str]:
    """Return the number of seeds that both have, the difference, its interval and its p."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return ["0", NONE, NONE, NONE]
    values = [[rows[seed]["test_accuracy"] for seed in seeds] for rows in (first, second)]
    change, p = harness.difference(*values)
    return [str(len(seeds)), change, harness.between(*values), p]


def words_of(config: Config) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in config.items()) or "defaults"


def table_of_arms(rows: list[Row]) -> str:
    """Return what each arm reaches, best first."""
    plain = selected(rows, "plain")
    lines = []
    for arm, about in ARMS.items():
        of_arm = selected(rows, arm)
        if not of_arm:
            continue
        accuracies = [row["test_accuracy"] for row in of_arm.values()]
        before = [row["test_before"] for row in of_arm.values()]
        seconds = statistics.median(row["core_seconds"] for row in of_arm.values())
        steps = next(iter(of_arm.values()))["steps"]
        change = [NONE] * 2 if arm == "plain" else compared(of_arm, plain)[1:3]
        line = [about.title, words_of(chosen_config(rows, arm)), str(steps), f"{seconds:.0f}"]
        line += [str(len(of_arm)), harness.spread(before), harness.spread(accuracies), *change]
        lines.append((statistics.fmean(accuracies), line))
    lines.sort(key=lambda scored: -scored[0])
    head = ["arm", "setting", "steps", "core-seconds", "seeds", "before finetuning, %", "test, %"]
    return grid([*head, "less plain", "95 %"], [line for _, line in lines], 2)


def table_of_tests(rows: list[Row]) -> str:
    """Return the tests that were declared before the first run."""
    simple = best_of(rows, SIMPLE)
    learned = best_of(rows, LIBRARY)

    def test(name: str, first: str, second: str, budget: int = 1) -> list[str]:
        pair = selected(rows, first, budget), selected(rows, second, budget)
        words = f"{ARMS[first].title} less {ARMS[second].title}"
        return [name, words, *compared(*pair)]

    lines = [test("main", learned, simple)]
    lines += [test("less the simple way", arm, simple) for arm in LIBRARY]
    lines += [test("less plain", arm, "plain") for arm in LIBRARY]
    lines.append(test("at as many steps", "example_weights", FEW_STEPS))
    lines.append(test("what fewer steps cost", FEW_STEPS, "both"))
    if selected(rows, simple, LONGER):
        lines.append(test(f"main, {LONGER} times the work", learned, simple, LONGER))
    return grid(["declared test", "of", "seeds", "difference", "95 %", "p"], lines, 2)


def table_of_longer(rows: list[Row]) -> str:
    """Return what the longer runs reach, and the difference to the simple way of the tests."""
    simple = best_of(rows, SIMPLE)
    baseline = selected(rows, simple, LONGER)
    lines = []
    for arm, about in ARMS.items():
        of_arm = selected(rows, arm, LONGER)
        if of_arm:
            accuracies = [row["test_accuracy"] for row in of_arm.values()]
            before = [row["test_before"] for row in of_arm.values()]
            seconds = statistics.median(row["core_seconds"] for row in of_arm.values())
            line = [about.title, str(next(iter(of_arm.values()))["steps"]), f"{seconds:.0f}"]
            change = [NONE] * 2 if arm == simple else compared(of_arm, baseline)[1:3]
            line += [str(len(of_arm)), harness.spread(before), harness.spread(accuracies), *change]
            lines.append(line)
    head = ["arm", "steps", "core-seconds", "seeds", "before finetuning, %", "test, %"]
    return grid([*head, f"less {ARMS[simple].title}", "95 %"], lines)


def run_all(args: argparse.Namespace, place: Path) -> None:
    """Run the jobs that are not in the file yet."""
    torch.set_num_threads(1)
    root, labels, size = args.root, args.labels, Size()
    if args.miniature:
        size = MINIATURE
        root = random_photographs(place / "noise")
        labels = place / "labels.npz"
        count = len(numbered(root / "train"))
        of_people = np.random.default_rng(0).integers(0, CLASSES, count)
        np.savez(labels, **dict.fromkeys((KIND, MAJORITY), of_people))

    def measure(*, seed: int, budget: int, kind: str = KIND, **job: Any) -> Row:
        draw = drawn(root, labels, kind, seed, size)
        if "tuned" in job:
            return ran(job["tuned"], job["config"], seed, budget, draw, size, "validation")
        config = chosen_config(of_kind(read(args.out), kind), job["arm"])
        return {"config": config} | ran(job["arm"], config, seed, budget, draw, size, "test")

    todo = jobs(args.out, miniature=args.miniature)
    harness.go_on(args.out, todo, measure, environment=harness.environment())


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument("--root", type=Path, help="folder of train/CLASS and test/CLASS")
    parser.add_argument("--labels", type=Path, metavar="FILE", help=".npz of people's labels")
    args = harness.parsed(parser)
    if args.runs:
        with tempfile.TemporaryDirectory() as place:
            run_all(args, Path(place))
    rows = of_kind(read(args.out), KIND)
    show(args.write, "people_labels", table_of_arms(rows))
    show(args.write, "people_labels-tests", table_of_tests(rows))
    show(args.write, "people_labels-longer", table_of_longer(rows))
    of_majority = of_kind(read(args.out), MAJORITY)
    if any("arm" in row for row in of_majority):
        show(args.write, "people_labels-majority", table_of_arms(of_majority))
        show(args.write, "people_labels-majority-tests", table_of_tests(of_majority))


if __name__ == "__main__":
    main()
