"""Does the teacher's feedback help on real pictures? Fashion-MNIST, 4 labels a class.

    python benchmarks/fashion_feedback.py --source /usr/share/datasets/fashion-mnist
    python benchmarks/fashion_feedback.py --device cuda --parts tuning pilot --seconds 80
    python benchmarks/fashion_feedback.py --device cuda --parts final --seconds 150
    python benchmarks/fashion_feedback.py --write benchmarks/results/fashion_feedback.md

A row is the training of one seed of one arm. Each part goes on where it was stopped, and does not
run a row again that is in the file. ``--seconds`` ends the script; a stack of seeds that has not
ended leaves no row.

**The declared test**, written down before any row of the part ``final`` was run:

- *Data.* Of the 60,000 training pictures a seed draws 4 of each class, which keep their labels. All
  others are unlabeled. The set's own 10,000 test pictures are read by the part ``final`` alone.
  Pictures are averaged over 2 x 2 pixels to 14 x 14.
- *Network.* Two 4 x 4 convolutions of stride 2 (24 and 48 channels) and a linear layer, 26,578
  weights; a teacher and a student of this kind, or the one network of UDA.
- *Arms.* ``mpl``: Meta Pseudo Labels with the exact gradient (mode ``forward``), soft labels, and
  UDA besides the labels in the teacher. ``uda_aligned``: one network with UDA whose targets are
  aligned to the labels' class shares.
- *Cost.* ``mpl`` takes :data:`STEPS` steps. ``uda_aligned`` takes as many as have the same number
  of operations (:data:`COST`), which is 2.5 times as many.
- *Tuning.* :data:`GRIDS`: eight settings of each arm, and two read-outs of each, the average of the
  weights and that average after some steps on the labels alone. Chosen is the best mean accuracy on
  10,000 labeled validation pictures of four seeds. These pictures are taken from the training
  pictures, and are many more than a user of 40 labels has; both arms profit alike. The grids lie
  around what eight shorter trainings of the first tuning seed, four of each arm, did well with.
- *Pilot.* Four other seeds, at the chosen settings, read on validation pictures of theirs, give the
  standard deviation s of the paired difference.
- *Number of seeds.* The least n at which a mean difference of 1 point is seen with a power of 80 %
  by a two-sided test of level 5 %, n = ((1.96 + 0.84) s / 1 point)^2; s from four seeds is
  uncertain, so that n is at least 64 and at most 320, and it is rounded up to a multiple of 32. The
  seeds are 1000, 1001, ...; they are run in that order, both arms of a stack before the next stack.
  If the time of the machine ends earlier, the test is over the seeds that have ended in both arms:
  the least of the number that was computed and the most that fit. Both are reported. Nobody looks
  at a difference before the last stack has ended.
- *Test.* A two-sided paired sign-flip test of the mean difference ``mpl`` minus ``uda_aligned`` in
  test accuracy, at the read-outs that tuning chose, at the level of 5 %; with Student's 95 %
  interval. One test, at the end.
- *If nothing is shown*, the row says "no" and has the interval. It is not said that there is no
  difference. If ``uda_aligned`` is shown to be above, the row says "below".

All else is descriptive. The part ``measurements`` is about why. It trains 16 seeds of its own with
4, 40 and 400 labels a class, by the settings of ``mpl`` and by its schedule, and measures at the
steps :data:`MEASURED_STEPS`. A step takes 40 labeled pictures, however many the run has. With h
(B, C) the feedback of a step on the teacher's probabilities q (B, C) of its unlabeled pictures:

- *The sign* of an example is that of s_i = h_{i,c} - sum_k q_ik h_ik, with c the teacher's most
  probable class: whether the feedback raises or lowers the teacher's logit of c. It is right if it
  raises a c that is the true class, or lowers one that is not. The share of right signs is taken
  over examples whose c is right, over those whose c is wrong, and as the mean of these two, which
  is 50 % for signs that know nothing.
- *The agreement* is the share of examples where that sign is the one of the mean feedback of R = 16
  labeled sets of 40 a class, drawn from all training pictures: what 6,400 true labels would say
  about the same student and teacher.
- *The signal-to-noise ratio*: for these weights and this unlabeled batch each of the R sets gives
  an a_ik = q_ik (h_ik - sum_j q_ij h_ij), the gradient at the teacher's logits. With their mean and
  the deviations d_r from it, noise^2 = sum_r |d_r|^2 / (R - 1), and
  signal^2 = |mean|^2 - noise^2 / R, or 0 where that is negative. The feedback is a mean over the
  labeled pictures, so that m labels a class have 40 / m times this noise^2. The ratio is signal /
  noise of a set of all labels of the run.

*How the script runs them.* A stack is several runs, of other seeds or settings, which take the pure
step of :class:`metapl.BilevelTrainer` at once by ``vmap``. The batches of a seed do not depend on
the others of its stack, but they do depend on the kind of device. Convolutions are written as
products of matrices, which ``vmap`` turns into batched products. Those of torch would become one
convolution of many groups, whose second derivative is a loop over the groups. On a GPU the step is
repeated as a CUDA graph; the column ``execution`` says how it was run.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import harness
import numpy as np
import torch
from harness import (
    NONE,
    RESULTS,
    Row,
    append,
    arguments,
    between,
    grid,
    interval,
    parsed,
    points,
    show,
)
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import metapl
from metapl.errors import MetaplError
from metapl.functional import cuda_graphs, stack
from metapl.metrics import paired_test
from metapl.problems import EqualWeights

RAW = RESULTS / "fashion_feedback.jsonl"
DEBIAN = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist has the four files."""

Part = Literal["tuning", "pilot", "final", "measurements"]
PARTS: tuple[Part, ...] = ("tuning", "pilot", "final", "measurements")
Method = Literal["mpl", "uda_aligned"]
METHODS: tuple[Method, ...] = ("mpl", "uda_aligned")
READ_OUTS = ("average", "finetuned")

CLASSES = 10
LABELS_PER_CLASS = 4
LABELED_BATCH = CLASSES * LABELS_PER_CLASS
UNLABELED_BATCH = 64
VALIDATION = 10_000
SIDE = 14
PIXELS = SIDE * SIDE

STEPS = 2_000
"""Steps of ``mpl`` in a training."""
COST: dict[Method, float] = {"mpl": 1.0, "uda_aligned": 0.4002}
"""Operations of a step, relative to one of ``mpl``, as :func:`operations_of_step` counts them."""
FINETUNING_STEPS = 200
"""Steps on the labels alone, behind which the read-out ``finetuned`` is."""
FINETUNING_RATE = 0.02
AVERAGE_DECAY = 0.995
MOMENTUM = 0.9

SEEDS: dict[Part, range] = {
    "tuning": range(100, 104),
    "pilot": range(200, 204),
    "measurements": range(300, 316),
    "final": range(1000, 1320),
}
"""The seeds of each part; of the part ``final`` the first ones, as many as the pilot says."""
LEAST_SEEDS = 64
SEEDS_MULTIPLE = 32
"""The number of seeds of the test is a multiple of it, so that stacks are full."""
POINTS_TO_SEE = 1.0
"""The difference that the test shall see with a power of 80 %."""
# The quantiles of the normal distribution at 97.5 % and at 80 %.
Z_OF_LEVEL = 1.96
Z_OF_POWER = 0.84

LABELS_MEASURED = (4, 40, 400)
MEASURED_STEPS = (300, 1_500)
FRESH_SETS = 16
LABELS_OF_FRESH_SET = 40
"""Labels of a class in each of the sets that stand for many true labels."""


@dataclass(frozen=True)
class Settings:
    """The settings of an arm that are tuned.

    Attributes:
        teacher_lr: the rate of the teacher, or of the one network of UDA: SGD with momentum.
        temperature: of UDA's targets.
        student_lr: the student's rate, of SGD without momentum.
        feedback_weight: what the feedback is multiplied by.
    """

    method: Method
    teacher_lr: float
    temperature: float
    student_lr: float = 0.0
    feedback_weight: float = 0.0


def grids() -> dict[Method, tuple[Settings, ...]]:
    """Return the eight settings of each arm."""
    mpl_settings = harness.every(
        method="mpl",
        temperature=(1.0, 0.5),
        teacher_lr=(0.02, 0.04),
        student_lr=0.3,
        feedback_weight=(1.0, 3.0),
    )
    uda_settings = harness.every(
        method="uda_aligned", temperature=(1.0, 0.5), teacher_lr=(0.01, 0.02, 0.04, 0.08)
    )
    return {
        "mpl": tuple(Settings(**settings) for settings in mpl_settings),
        "uda_aligned": tuple(Settings(**settings) for settings in uda_settings),
    }


GRIDS = grids()


@dataclass(frozen=True)
class Size:
    """How much is run: the declared test, or a miniature of it that takes seconds.

    Attributes:
        stack: the most seeds that train at once.
        deadline: the value of ``time.monotonic()`` at which nothing more is begun, or None.
    """

    miniature: bool
    stack: int
    device: torch.device
    deadline: float | None = None

    def steps(self, method: Method) -> int:
        """Return the steps of an arm: as many as have the operations of ``STEPS`` of ``mpl``."""
        return round((6 if self.miniature else STEPS) / COST[method])

    @property
    def finetuning_steps(self) -> int:
        return 2 if self.miniature else FINETUNING_STEPS

    @property
    def measured_steps(self) -> tuple[int, ...]:
        return (1, 3) if self.miniature else MEASURED_STEPS

    @property
    def labels_measured(self) -> tuple[int, ...]:
        return LABELS_MEASURED[:2] if self.miniature else LABELS_MEASURED

    def grid(self, method: Method) -> tuple[Settings, ...]:
        return GRIDS[method][:2] if self.miniature else GRIDS[method]

    def seeds(self, part: Part) -> range:
        return SEEDS[part][:2] if self.miniature and part != "final" else SEEDS[part]

    def seconds_left(self) -> float:
        return math.inf if self.deadline is None else self.deadline - time.monotonic()


class TimeIsOver(Exception):
    """The limit of ``--seconds`` came during a stack, whose rows are not written."""


# ----------------------------------------------------------------------------------------- the data


@dataclass(frozen=True, eq=False)
class Pictures:
    """All pictures, standardized (n, 196), and their classes (n,), on the device."""

    training: Tensor
    training_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def rows_of_class(self) -> Tensor:
        """Return the rows of the training pictures of each class, equally many: (C, n)."""
        rows = [(self.training_labels == c).nonzero()[:, 0] for c in range(CLASSES)]
        shortest = min(len(class_rows) for class_rows in rows)
        return torch.stack([class_rows[:shortest] for class_rows in rows])


def read_pictures(source: Path, *, miniature: bool, device: torch.device) -> Pictures:
    """Return Fashion-MNIST from its four files, or the digits for a miniature."""
    if miniature:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = F.pad(torch.tensor(digits.images, dtype=torch.float32) / 16, [3, 3, 3, 3])
        labels = torch.tensor(digits.target)
        training = pixels[:1400]
        training_labels = labels[:1400]
        test = pixels[1400:]
        test_labels = labels[1400:]
    else:
        training = halved_pictures(source / "train-images-idx3-ubyte.gz")
        training_labels = bytes_of(source / "train-labels-idx1-ubyte.gz", offset=8).long()
        test = halved_pictures(source / "t10k-images-idx3-ubyte.gz")
        test_labels = bytes_of(source / "t10k-labels-idx1-ubyte.gz", offset=8).long()
    mean = training.mean()
    deviation = training.std()
    return Pictures(
        ((training.flatten(1) - mean) / deviation).to(device),
        training_labels.to(device),
        ((test.flatten(1) - mean) / deviation).to(device),
        test_labels.to(device),
    )


def halved_pictures(file: Path) -> Tensor:
    """Return the pictures of a file, (n, 1, 14, 14) with pixels from 0 to 1."""
    pixels = bytes_of(file, offset=16)
    return F.avg_pool2d(pixels.view(-1, 1, 28, 28).float() / 255, 2)


def bytes_of(file: Path, *, offset: int) -> Tensor:
    """Return the bytes of a file behind its head."""
    if not file.exists():
        raise MetaplError(
            f"there is no {file}; expected Fashion-MNIST's four files in the folder of --source."
        )
    return torch.from_numpy(
        np.frombuffer(gzip.decompress(file.read_bytes()), dtype=np.uint8, offset=offset).copy()
    )


@dataclass(frozen=True, eq=False)
class Splits:
    """Rows of the training pictures for a stack of S seeds.

    Attributes:
        labeled: (S, rounds, 40), four of each class in each round; a step takes a round.
        unlabeled: (S, n).
        validation: (S, 10,000), or (S, 0) where nothing is chosen.
    """

    labeled: Tensor
    unlabeled: Tensor
    validation: Tensor


@dataclass(frozen=True)
class Run:
    """One element of a stack: settings, a seed, and how many labels a class has."""

    settings: Settings
    seed: int
    labels_per_class: int = LABELS_PER_CLASS


def split(pictures: Pictures, runs: Sequence[Run], *, validation: int) -> Splits:
    """Return the splits of the runs' seeds.

    A run with fewer labels than others of its stack has its rounds repeated.

    Args:
        validation: how many unlabeled pictures are set aside for validation.
    """
    labels = pictures.training_labels.cpu()
    most_rounds = max(run.labels_per_class for run in runs) // LABELS_PER_CLASS
    # As many pictures as the run with the most labels has.
    most_labeled = most_rounds * LABELED_BATCH
    labeled = []
    unlabeled = []
    validated = []
    for run in runs:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(run.seed))
        labels_in_order = labels[order]
        is_labeled = torch.zeros(len(labels), dtype=torch.bool)
        rows_by_class = []
        for c in range(CLASSES):
            rows = order[labels_in_order == c][: run.labels_per_class]
            is_labeled[rows] = True
            rows_by_class.append(rows.unflatten(0, (-1, LABELS_PER_CLASS)))
        # (rounds, C, 4), flattened to rounds of 40.
        rounds = torch.stack(rows_by_class, 1).flatten(1)
        labeled.append(rounds.repeat(most_rounds // len(rounds), 1))
        others = order[~is_labeled[order]]
        validated.append(others[:validation])
        # Equally many for every run of the stack.
        unlabeled.append(others[validation : len(labels) - most_labeled])
    device = pictures.training.device
    return Splits(
        torch.stack(labeled).to(device),
        torch.stack(unlabeled).to(device),
        torch.stack(validated).to(device),
    )


CHUNK = 25
"""Steps whose batches are drawn at once. Another number gives other draws."""
SHIFT = 1
HOLE = 4
NOISE = 0.3
"""The changes of a view: shifts by up to a pixel, mirroring, a square that is left out, and noise
in units of the pixels' standard deviation."""


class Views:
    """Changed pictures by looking up: which pixel goes where, and which are left out."""

    def __init__(self, device: torch.device) -> None:
        coordinates = torch.arange(SIDE)
        moves = []
        for down, right in itertools.product(range(-SHIFT, SHIFT + 1), repeat=2):
            rows = (coordinates + down).clamp(0, SIDE - 1)[:, None] * SIDE
            columns = (coordinates + right).clamp(0, SIDE - 1)
            moves.append((rows + columns).flatten())
            moves.append((rows + columns.flip(0)).flatten())
        holes = []
        for top, left in itertools.product(range(SIDE - HOLE + 1), repeat=2):
            mask = torch.ones(SIDE, SIDE)
            mask[top : top + HOLE, left : left + HOLE] = 0
            holes.append(mask.flatten())
        self.moves = torch.stack(moves).to(device)
        self.holes = torch.stack(holes).to(device)

    def __call__(self, pictures: Tensor, choice: Tensor, noise: Tensor) -> Tensor:
        """Return views (S, B, 196) of pictures (S, B, 196).

        Args:
            choice: (S, B) whole numbers, whose remainders choose a move and a hole.
            noise: (S, B, 196), of variance 1.
        """
        moves = self.moves[choice % len(self.moves)]
        holes = self.holes[choice // len(self.moves) % len(self.holes)]
        return (pictures.gather(-1, moves) + NOISE * noise) * holes


@dataclass(frozen=True, eq=False)
class Batch:
    """The batch of a step, for all runs of a stack.

    Attributes:
        labeled: views of the labeled pictures, (S, 40, 196).
        labels: their classes, (S, 40).
        weak: unlabeled pictures as they are, (S, 64, 196).
        strong: views of them, (S, 64, 196).
        truth: their classes, (S, 64), which only measurements read.
    """

    labeled: Tensor
    labels: Tensor
    weak: Tensor
    strong: Tensor
    truth: Tensor


def batches(
    pictures: Pictures, splits: Splits, seeds: Sequence[int], steps: int
) -> Iterator[Batch]:
    """Yield the batches of a stack, which are drawn on the device.

    Each seed has its own generator. So its batches do not depend on the stack, and both arms of a
    seed have the same batches until the shorter arm ends.
    """
    device = pictures.training.device
    views = Views(device)
    generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
    shape = (len(seeds), CHUNK)
    draws_of_step = 2 * UNLABELED_BATCH + LABELED_BATCH
    choices = torch.empty((*shape, draws_of_step), dtype=torch.int64, device=device)
    noise = torch.empty((*shape, UNLABELED_BATCH + LABELED_BATCH, PIXELS), device=device)
    rounds = splits.labeled.shape[1]
    unlabeled_count = splits.unlabeled.shape[1]
    for step in range(steps):
        step_of_chunk = step % CHUNK
        if step_of_chunk == 0:
            for choices_of_seed, noise_of_seed, generator in zip(
                choices, noise, generators, strict=True
            ):
                choices_of_seed.random_(0, 2**31 - 1, generator=generator)
                noise_of_seed.normal_(generator=generator)
        unlabeled_choice, strong_choice, labeled_choice = choices[:, step_of_chunk].split(
            [UNLABELED_BATCH, UNLABELED_BATCH, LABELED_BATCH], 1
        )
        strong_noise, labeled_noise = noise[:, step_of_chunk].split(
            [UNLABELED_BATCH, LABELED_BATCH], 1
        )
        labeled_rows = splits.labeled[:, step % rounds]
        unlabeled_rows = splits.unlabeled.gather(1, unlabeled_choice % unlabeled_count)
        weak = pictures.training[unlabeled_rows]
        yield Batch(
            labeled=views(pictures.training[labeled_rows], labeled_choice, labeled_noise),
            labels=pictures.training_labels[labeled_rows],
            weak=weak,
            strong=views(weak, strong_choice, strong_noise),
            truth=pictures.training_labels[unlabeled_rows],
        )


# -------------------------------------------------------------------------- the networks and losses


class Convolution(nn.Module):
    """A 4 x 4 convolution of stride 2 as one product of matrices.

    Args:
        padding: pixels of zeros before and behind both sides, whose length becomes even.
    """

    def __init__(self, channels: int, new_channels: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.linear = nn.Linear(16 * channels, new_channels)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, h, h, new_channels) of (B, H, H, channels)."""
        x = F.pad(x, (0, 0, *self.padding, *self.padding))
        B, H, W, C = x.shape
        # Squares of 2 x 2 pixels, (B, H / 2, W / 2, 4 C). A kernel covers four of them.
        squares = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 2, 4, 5)
        squares = squares.reshape(B, H // 2, W // 2, 4 * C)
        upper = [squares[:, :-1, :-1], squares[:, :-1, 1:]]
        lower = [squares[:, 1:, :-1], squares[:, 1:, 1:]]
        patches = torch.cat([*upper, *lower], -1)
        # As a matrix, so that a stack of weights gives one batched product.
        outputs: Tensor = self.linear(patches.flatten(0, 2)).unflatten(0, patches.shape[:3])
        return outputs


class Classifier(nn.Module):
    """Two convolutions, 14 x 14 to 7 x 7 to 4 x 4, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Convolution(1, 24, padding=(1, 1))
        self.second = Convolution(24, 48, padding=(1, 2))
        self.head = nn.Linear(4 * 4 * 48, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, 10) of (B, 196)."""
        x = self.first(pixels.view(-1, SIDE, SIDE, 1)).relu()
        x = self.second(x).relu()
        logits: Tensor = self.head(x.flatten(1))
        return logits


def weights_of_network() -> int:
    return sum(p.numel() for p in Classifier().parameters())


@dataclass(frozen=True)
class WeightedFeedback(metapl.PseudoLabels):
    """Meta Pseudo Labels whose outer batch is (x, y, weight of the feedback).

    The feedback is linear in the outer loss, so that a factor of this loss is a weight of the
    feedback. Because the factor is a tensor of the batch, each run of a stack can have its own.
    """

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        weighted_loss: Tensor = batch[2] * super().outer_loss(outputs, batch)
        return weighted_loss


@dataclass(frozen=True, eq=False)
class NetworkAlone(EqualWeights):
    """A network without a teacher: cross-entropy of (x, y), and UDA of (x, y, weak, strong).

    The targets are predictions on the weak view, by a pass without a gradient. A batch of two is
    (x, y) alone.

    Args:
        network: the module whose weights :meth:`inner_loss` has as ``params``.
        uda: makes the targets of the predictions.
    """

    network: nn.Module
    uda: metapl.UDA

    def student_input(self, batch: Any) -> Tensor:
        if len(batch) == 2:
            inputs: Tensor = batch[0]
            return inputs
        return torch.cat([batch[0], batch[3]])

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        """Return losses (B,), of which the mean is the sum of the two losses."""
        labels = batch[1]
        labeled_outputs = outputs[: len(labels)]
        losses = F.cross_entropy(labeled_outputs, labels, reduction="none") / len(labels)
        if len(batch) == 4:
            strong_outputs = outputs[len(labels) :]
            weights = {name: t.detach() for name, t in params.items()}
            weak_outputs = functional_call(self.network, weights, (batch[2],))
            target = self.uda.target(weak_outputs.detach())
            consistency = F.cross_entropy(strong_outputs, target, reduction="none")
            losses = torch.cat([losses, consistency / len(strong_outputs)])
        return len(outputs) * losses


def trainer_of(settings: Settings, teacher: nn.Module, student: nn.Module) -> metapl.BilevelTrainer:
    """Return the library's trainer of one run; UDA trains the first network alone."""
    teacher_optimizer = torch.optim.SGD(
        teacher.parameters(), lr=settings.teacher_lr, momentum=MOMENTUM
    )
    if settings.method == "uda_aligned":
        uda = metapl.UDA(temperature=settings.temperature, align=1.0)
        return metapl.BilevelTrainer(
            None,
            teacher,
            "none",
            problem=NetworkAlone(teacher, uda),
            inner_optimizer=teacher_optimizer,
        )
    return metapl.BilevelTrainer(
        teacher,
        student,
        "forward",
        problem=WeightedFeedback(kind="soft"),
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=settings.student_lr),
        outer_optimizer=teacher_optimizer,
        # The weight is in the outer loss. Without this 1 the default, a bound, would hold.
        feedback_weight=1.0,
        teacher_losses=[metapl.CrossEntropy(), metapl.UDA(temperature=settings.temperature)],
    )


# ----------------------------------------------------------------------------------------- a stack


def stacked_trainers(
    runs: Sequence[Run], device: torch.device
) -> tuple[nn.Module, Callable[..., Any], Any]:
    """Return the network that is trained, the pure step of one run, and the state of all."""
    states = []
    for run in runs:
        torch.manual_seed(run.seed)
        teacher = Classifier().to(device)
        student = Classifier().to(device)
        trainer = trainer_of(run.settings, teacher, student)
        step, state = trainer.functional()
        states.append(state)
    # The steps of all runs are one function, which differs in its state alone.
    return trainer.student, step, stack(states)


class Stack:
    """Runs of one method and one temperature that train at once.

    Args:
        steps: the length of the cosine schedule, at whose end the rates are 0.
        constant_rates: whether the rates have no schedule.

    Attributes:
        state: the stacked state of the trainers.
        average: the moving average of the trained network's weights.
        execution: how steps are run, known after the first one.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        steps: int,
        device: torch.device,
        *,
        constant_rates: bool = False,
    ) -> None:
        self.runs = runs
        self.steps = steps
        self.device = device
        self.constant_rates = constant_rates
        self.method = runs[0].settings.method
        self.network, self.single_step, self.state = stacked_trainers(runs, device)
        self.average = {name: t.clone() for name, t in self.state.student.params.items()}
        weights = [run.settings.feedback_weight for run in runs]
        self.feedback_weights = torch.tensor(weights, dtype=torch.float32).to(device)
        self.execution = ""
        self.repeated_step: RepeatedStep | None = None

    def kind(self, *, labels_alone: bool) -> tuple[Any, ...]:
        """Return a key that is equal for stacks whose steps are the same operations."""
        temperature = self.runs[0].settings.temperature
        schedule = (self.steps, self.constant_rates)
        return (self.method, temperature, schedule, len(self.runs), labels_alone, self.device)

    def outer_and_inner(self, batch: Batch, *, labels_alone: bool = False) -> tuple[Any, Any]:
        """Return the batches of the pure step."""
        labeled = (batch.labeled, batch.labels)
        if labels_alone:
            return labeled, labeled
        if self.method == "uda_aligned":
            return labeled, (*labeled, batch.weak, batch.strong)
        return (*labeled, self.feedback_weights), (batch.weak, batch.strong)

    def next_values(self, state: Any, average: Any, outer: Any, inner: Any) -> tuple[Any, Any]:
        """Return state and average after a step of all runs."""
        step = state.step.double()
        factors = torch.ones_like(step)
        if not self.constant_rates:
            factors = 0.5 * (1 + torch.cos(math.pi * step / self.steps))
        scheduled = state._replace(
            inner=with_rates(state.inner, factors), outer=with_rates(state.outer, factors)
        )
        new_state, _ = vmap(self.single_step)(scheduled, outer, inner)
        new_state = new_state._replace(
            inner=new_state.inner._replace(settings=state.inner.settings),
            outer=new_state.outer._replace(settings=state.outer.settings),
        )
        decay = ((1 + step) / (10 + step)).clamp(max=AVERAGE_DECAY).float()[0]
        new_average = {}
        for name, t in average.items():
            new_average[name] = t + (1 - decay) * (new_state.student.params[name] - t)
        return new_state, new_average

    def step(self, batch: Batch, *, labels_alone: bool = False) -> None:
        """Take a step of all runs."""
        arguments = self.outer_and_inner(batch, labels_alone=labels_alone)
        values = (self.state, self.average)
        if self.repeated_step is None:
            kind = self.kind(labels_alone=labels_alone)
            if kind not in REPEATED_STEPS:
                REPEATED_STEPS[kind] = RepeatedStep(self.next_values, values, arguments)
            self.repeated_step = REPEATED_STEPS[kind]
            self.repeated_step.begin(values)
            self.execution = self.repeated_step.execution
        self.state, self.average = self.repeated_step(arguments)

    def feedback(self, outer: Any, inner: Any) -> tuple[Tensor, Tensor]:
        """Return h and q, (S, B, C) each, of a step that is not taken."""
        _, report = vmap(self.single_step)(self.state, outer, inner)
        return report.feedback, report.signal["value"]


def with_rates(optimizer: Any, factors: Tensor) -> Any:
    """Return an optimizer's tensors with learning rates times these factors, (S,)."""
    settings = []
    for group in optimizer.settings:
        settings.append({**group, "lr": group["lr"] * factors})
    return optimizer._replace(settings=settings)


REPEATED_STEPS: dict[tuple[Any, ...], RepeatedStep] = {}
"""The steps that have been traced, by their kind; later stacks of the kind use them again."""


class RepeatedStep:
    """A function of (values, batch) that returns new values, run many times.

    The function is traced once into operations on the tensors of all runs: with networks this small
    most of a step's time would be the dispatch of ``vmap``. On a GPU these operations are recorded
    as a CUDA graph, which reads and writes the same memory at each step.

    Attributes:
        execution: ``"CUDA graph"`` or ``"operations"``. Where recording has failed, the reason
            follows in parentheses.
    """

    def __init__(self, function: Callable[..., Any], values: Any, batch: Any) -> None:
        self.operations = make_fx(lambda values, batch: function(*values, *batch))(values, batch)
        self.operations.graph.eliminate_dead_code()
        self.operations.recompile()
        self.values = values
        self.replay: Callable[[], Any] | None = None
        self.execution = "operations"
        device = pytree.tree_leaves(batch)[0].device
        # Any, because a recorder is typed for a step that returns a state and a report. It reads no
        # result of a step.
        recorder: Any = cuda_graphs.RECORDERS.get(device.type)
        if recorder is None:
            return
        self.values = pytree.tree_map(torch.clone, values)
        self.batch = pytree.tree_map(torch.clone, batch)
        self.memory = pytree.tree_leaves(self.values)
        # Recording takes steps; begin() sets the values of the first one.
        try:
            pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
            self.replay = recorder(self.step_in_place, device, pool).replay
            self.execution = "CUDA graph"
        except Exception as error:
            # A step that cannot be recorded is run as operations, and its rows say so.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.execution = f"operations (no CUDA graph: {reason})"
            print(self.execution, file=sys.stderr, flush=True)

    def begin(self, values: Any) -> None:
        """Set the values of the first step."""
        if self.replay is None:
            self.values = values
        else:
            torch._foreach_copy_(self.memory, pytree.tree_leaves(values))

    def step_in_place(self) -> None:
        """Take a step from memory to memory."""
        new_values = pytree.tree_leaves(self.operations(self.values, self.batch))
        torch._foreach_copy_(self.memory, new_values)

    def __call__(self, batch: Any) -> Any:
        """Return the values after one more step; a graph writes them into the same tensors."""
        if self.replay is None:
            self.values = self.operations(self.values, batch)
            return self.values
        torch._foreach_copy_(pytree.tree_leaves(self.batch), pytree.tree_leaves(batch))
        self.replay()
        return self.values


def train(pictures: Pictures, splits: Splits, stacked: Stack, steps: int, size: Size) -> None:
    """Take the first steps of a stack's schedule."""
    seeds = [run.seed for run in stacked.runs]
    for step, batch in enumerate(batches(pictures, splits, seeds, steps)):
        if step % 250 == 0:
            wait_for(size.device)
            if size.seconds_left() < 0:
                raise TimeIsOver
        stacked.step(batch)
    wait_for(size.device)


def finetune(pictures: Pictures, splits: Splits, stacked: Stack, size: Size) -> Any:
    """Return the averaged weights after some steps on the labels alone."""
    settings = Settings("uda_aligned", teacher_lr=FINETUNING_RATE, temperature=1.0)
    runs = [Run(settings, run.seed) for run in stacked.runs]
    steps = size.finetuning_steps
    finetuning = Stack(runs, steps, size.device, constant_rates=True)
    student = finetuning.state.student._replace(params=stacked.average)
    finetuning.state = finetuning.state._replace(student=student)
    # Other seeds, so that the views are not those of the training again.
    seeds = [run.seed + 1_000_000 for run in runs]
    for batch in batches(pictures, splits, seeds, steps):
        finetuning.step(batch, labels_alone=True)
    return finetuning.state.student.params


def wait_for(device: torch.device) -> None:
    """Wait until the device has ended all work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------- what it costs


def operations_of_step(method: Method) -> int:
    """Return how many operations the products of matrices in a step of one run have."""
    device = torch.device("cpu")
    stacked = Stack([Run(GRIDS[method][0], 0)], STEPS, device)
    shape = (1, UNLABELED_BATCH, PIXELS)
    labels = torch.zeros((1, LABELED_BATCH), dtype=torch.int64)
    labeled = torch.zeros((1, LABELED_BATCH, PIXELS))
    batch = Batch(labeled, labels, torch.zeros(shape), torch.zeros(shape), labels)
    stacked.step(batch)
    with FlopCounterMode(display=False) as counter:
        stacked.step(batch)
    return int(counter.get_total_flops())


# ----------------------------------------------------------------------------------------- the rows


@torch.no_grad()
def logits_of(network: nn.Module, weights: Any, inputs: Tensor) -> Tensor:
    """Return all runs' outputs (S, n, C) for inputs of theirs, (S, n, 196), or for all, (n, 196).

    Inputs are taken in pieces of 500, which bounds the memory.
    """
    is_shared = inputs.dim() == 2
    dims = (None, 0, None if is_shared else 0)
    pieces = []
    for piece in inputs.split(500, dim=0 if is_shared else 1):
        pieces.append(vmap(functional_call, dims)(network, weights, piece))
    return torch.cat(pieces, 1)


def trained_rows(part: Part, runs: Sequence[Run], pictures: Pictures, size: Size) -> list[Row]:
    """Return the rows of a stack: the part ``final`` reads the test pictures, others do not."""
    began = time.monotonic()
    processor_began = time.process_time()
    is_final = part == "final"
    validation = 0
    if not is_final:
        validation = 400 if size.miniature else VALIDATION
    splits = split(pictures, runs, validation=validation)
    method = runs[0].settings.method
    steps = size.steps(method)
    stacked = Stack(runs, steps, size.device)
    train(pictures, splits, stacked, steps, size)
    weights_by_read_out = {
        "average": stacked.average,
        "finetuned": finetune(pictures, splits, stacked, size),
    }
    if is_final:
        inputs = pictures.test
        truth = pictures.test_labels.expand(len(runs), -1)
    else:
        inputs = pictures.training[splits.validation]
        truth = pictures.training_labels[splits.validation]
    columns: dict[str, list[float]] = {}
    for name, weights in weights_by_read_out.items():
        classes = logits_of(stacked.network, weights, inputs).argmax(-1)
        columns[name] = (classes == truth).double().mean(1).tolist()
        shares_off = class_counts(classes) - class_counts(truth)
        # The total variation distance between the class shares of answers and truth.
        errors = shares_off.abs().sum(1).double() / (2 * truth.shape[1])
        columns[f"{name}_class_share_error"] = errors.tolist()
    # How many of the unlabeled pictures are labeled rightly, by the network that labels them.
    labeler = stacked.state.teacher.params if method == "mpl" else stacked.state.student.params
    rows_to_label = splits.unlabeled[:, : 100 if size.miniature else VALIDATION]
    classes = logits_of(stacked.network, labeler, pictures.training[rows_to_label]).argmax(-1)
    is_right = classes == pictures.training_labels[rows_to_label]
    columns["pseudo_labels_right"] = is_right.double().mean(1).tolist()
    seconds = round((time.monotonic() - began) / len(runs), 3)
    processor_seconds = round((time.process_time() - processor_began) / len(runs), 3)
    rows = []
    for index, run in enumerate(runs):
        row: Row = {**identity(part, run, steps), "read_on": "test" if is_final else "validation"}
        for name, values in columns.items():
            row[name] = round(values[index], 5)
        row["stack"] = len(runs)
        row["device"] = size.device.type
        row["execution"] = stacked.execution
        row["seconds"] = seconds
        row["processor_seconds"] = processor_seconds
        rows.append(row)
    return rows


def class_counts(classes: Tensor) -> Tensor:
    """Return the counts of the classes, (S, C), in classes (S, n)."""
    return F.one_hot(classes, CLASSES).sum(1)


def identity(part: Part, run: Run, steps: int) -> Row:
    """Return the columns that tell a row from all others."""
    return {
        "part": part,
        "method": run.settings.method,
        "seed": run.seed,
        "labels": run.labels_per_class,
        "steps": steps,
        "settings": asdict(run.settings),
    }


class Study:
    """The file of rows, and the runs that it still lacks."""

    def __init__(self, file: Path, pictures: Pictures, size: Size) -> None:
        self.file = file
        self.pictures = pictures
        self.size = size
        self.rows = harness.read(file, "part")
        self.environment_is_written = False

    def missing_runs(self, part: Part, runs: Sequence[Run]) -> list[Run]:
        """Return those of the runs that have no row."""
        without_row = []
        for run in runs:
            columns = identity(part, run, self.size.steps(run.settings.method))
            if not any(columns.items() <= row.items() for row in self.rows):
                without_row.append(run)
        return without_row

    def add(self, rows: Sequence[Row], label: str) -> None:
        """Append rows to the file."""
        if not self.environment_is_written:
            environment = {"made_with": harness.environment(), "weights": weights_of_network()}
            append(self.file, environment)
            self.environment_is_written = True
        append(self.file, *rows)
        self.rows.extend(rows)
        print(f"{label}: {len(rows)} rows, {rows[0]['execution']}", file=sys.stderr, flush=True)

    def run_stack(self, part: Part, runs: Sequence[Run]) -> float:
        """Run a stack, append its rows, and return its seconds."""
        began = time.monotonic()
        rows = trained_rows(part, runs, self.pictures, self.size)
        seconds = time.monotonic() - began
        method = runs[0].settings.method
        average = 100 * statistics.fmean(row["average"] for row in rows)
        self.add(rows, f"{part}, {method}, {seconds:.1f} s, mean {average:.1f} %")
        return seconds

    def tune(self) -> None:
        """Run all settings on the tuning seeds; the runs of a stack have one temperature."""
        for method in METHODS:
            runs = []
            for settings in self.size.grid(method):
                for seed in self.size.seeds("tuning"):
                    runs.append(Run(settings, seed))
            by_temperature: dict[float, list[Run]] = {}
            for run in self.missing_runs("tuning", runs):
                by_temperature.setdefault(run.settings.temperature, []).append(run)
            for alike_runs in by_temperature.values():
                for first in range(0, len(alike_runs), self.size.stack):
                    self.run_stack("tuning", alike_runs[first : first + self.size.stack])

    def pilot(self) -> None:
        """Run both arms on the seeds of the pilot, and say how many seeds the test has."""
        for method in METHODS:
            settings, _ = best_settings(self.rows, method, size=self.size)
            runs = [Run(settings, seed) for seed in self.size.seeds("pilot")]
            missing = self.missing_runs("pilot", runs)
            if missing:
                self.run_stack("pilot", missing)
        print(plan_of(self.rows, size=self.size).sentence, file=sys.stderr, flush=True)

    def final(self) -> None:
        """Run both arms of a stack of seeds before the next stack, as far as time reaches."""
        plan = plan_of(self.rows, size=self.size)
        seeds = SEEDS["final"][: 4 if self.size.miniature else plan.seeds]
        longest_seconds = 0.0
        for first in range(0, len(seeds), self.size.stack):
            seeds_of_stack = seeds[first : first + self.size.stack]
            # Where the second arm of a stack does not end, the rows of the first have no pair.
            if longest_seconds > self.size.seconds_left():
                raise TimeIsOver
            seconds = 0.0
            for method in METHODS:
                settings, _ = best_settings(self.rows, method, size=self.size)
                runs = [Run(settings, seed) for seed in seeds_of_stack]
                missing = self.missing_runs("final", runs)
                if missing:
                    seconds += self.run_stack("final", missing)
            longest_seconds = max(longest_seconds, seconds)

    def measure(self) -> None:
        """Measure the feedback of runs with few and many labels."""
        settings, _ = best_settings(self.rows, "mpl", size=self.size)
        runs = []
        for seed in self.size.seeds("measurements"):
            for labels in self.size.labels_measured:
                runs.append(Run(settings, seed, labels))
        missing = self.missing_runs("measurements", runs)
        # A stack has some seeds, and all numbers of labels of each.
        seeds_per_stack = max(1, self.size.stack // len(LABELS_MEASURED))
        runs_per_stack = seeds_per_stack * len(self.size.labels_measured)
        for first in range(0, len(missing), runs_per_stack):
            rows = measured_rows(missing[first : first + runs_per_stack], self.pictures, self.size)
            self.add(rows, "measurements")


def best_settings(
    rows: Sequence[Row], method: Method, *, size: Size | None
) -> tuple[Settings, str]:
    """Return the settings and the read-out with the best mean over the tuning seeds.

    Args:
        size: how many rows tuning has at its end; without a size one row is enough.

    Raises: :class:`metapl.MetaplError` where tuning has not ended.
    """
    tuning = [row for row in rows if row["part"] == "tuning" and row["method"] == method]
    expected = 1 if size is None else len(size.grid(method)) * len(size.seeds("tuning"))
    if len(tuning) < expected:
        raise MetaplError(
            f"{method} has {len(tuning)} rows of tuning; expected at least {expected}: run --parts "
            "tuning to its end first."
        )
    means: dict[tuple[Settings, str], float] = {}
    for settings in GRIDS[method]:
        settings_rows = [row for row in tuning if row["settings"] == asdict(settings)]
        for read_out in READ_OUTS:
            if settings_rows:
                mean = statistics.fmean(row[read_out] for row in settings_rows)
                means[settings, read_out] = mean
    return max(means, key=lambda choice: means[choice])


def paired_accuracies(
    rows: Sequence[Row], part: Part, *, read_out: str | None = None
) -> tuple[list[float], list[float]]:
    """Return the accuracies of ``mpl`` and of ``uda_aligned`` on the seeds that both have.

    Args:
        read_out: of both arms; without it each arm has the one that tuning chose.
    """
    accuracies = []
    for method in METHODS:
        settings, tuned_read_out = best_settings(rows, method, size=None)
        column = read_out or tuned_read_out
        accuracy_by_seed = {}
        for row in rows_with(rows, part, settings):
            accuracy_by_seed[row["seed"]] = row[column]
        accuracies.append(accuracy_by_seed)
    mpl_by_seed, uda_by_seed = accuracies
    seeds = sorted(mpl_by_seed.keys() & uda_by_seed.keys())
    return [mpl_by_seed[seed] for seed in seeds], [uda_by_seed[seed] for seed in seeds]


def rows_with(rows: Sequence[Row], part: Part, settings: Settings) -> list[Row]:
    """Return the rows of a part that have these settings."""
    values = asdict(settings)
    return [row for row in rows if row["part"] == part and row["settings"] == values]


@dataclass(frozen=True)
class Plan:
    """The number of seeds of the test, as it follows from the pilot.

    Attributes:
        deviation: the standard deviation of the paired difference, in points.
        computed: the number of seeds that the power asks for.
        seeds: that number within the bounds, rounded up to full stacks.
    """

    deviation: float
    computed: int
    seeds: int

    @property
    def sentence(self) -> str:
        return (
            f"pilot: standard deviation of the paired difference {self.deviation:.2f} points; "
            f"{POINTS_TO_SEE:g} point is seen with a power of 80 % by {self.computed} seeds; the "
            f"test has {self.seeds} (at least {LEAST_SEEDS}, at most {len(SEEDS['final'])})"
        )


def plan_of(rows: Sequence[Row], *, size: Size | None) -> Plan:
    """Return the number of seeds, by the standard deviation of the pilot's differences.

    Args:
        size: how many seeds the pilot has at its end; without a size two are enough.

    Raises: :class:`metapl.MetaplError` where the pilot has not ended.
    """
    mpl_accuracies, uda_accuracies = paired_accuracies(rows, "pilot")
    expected = 2 if size is None else len(size.seeds("pilot"))
    if len(mpl_accuracies) < expected:
        raise MetaplError(
            f"the pilot has {len(mpl_accuracies)} seeds of both arms; expected {expected}: run "
            "--parts pilot first."
        )
    differences = [a - b for a, b in zip(mpl_accuracies, uda_accuracies, strict=True)]
    deviation = 100 * statistics.stdev(differences)
    computed = math.ceil(((Z_OF_LEVEL + Z_OF_POWER) * deviation / POINTS_TO_SEE) ** 2)
    full_stacks = SEEDS_MULTIPLE * math.ceil(max(computed, LEAST_SEEDS) / SEEDS_MULTIPLE)
    return Plan(deviation, computed, min(full_stacks, len(SEEDS["final"])))


# ----------------------------------------------------------------------- why: signs and their noise


def measured_rows(runs: Sequence[Run], pictures: Pictures, size: Size) -> list[Row]:
    """Return a row for each run: the feedback's signs and noise at some steps of its training."""
    began = time.monotonic()
    splits = split(pictures, runs, validation=0)
    stacked = Stack(runs, size.steps("mpl"), size.device)
    points_by_run: list[list[Row]] = [[] for _ in runs]
    seeds = [run.seed for run in runs]
    generator = torch.Generator().manual_seed(seeds[0])
    last_step = size.measured_steps[-1]
    for step, batch in enumerate(batches(pictures, splits, seeds, last_step + 1)):
        if step % 250 == 0:
            wait_for(size.device)
            if size.seconds_left() < 0:
                raise TimeIsOver
        # Before the networks have learned from the batch.
        if step in size.measured_steps:
            measured = measured_point(stacked, batch, pictures, generator)
            for points_of_run, values in zip(points_by_run, measured, strict=True):
                points_of_run.append({"step": step, **values})
        stacked.step(batch)
    seconds = round((time.monotonic() - began) / len(runs), 3)
    rows = []
    for run, points_of_run in zip(runs, points_by_run, strict=True):
        row = identity("measurements", run, size.steps("mpl"))
        row["measured"] = points_of_run
        row["stack"] = len(runs)
        row["device"] = size.device.type
        row["execution"] = stacked.execution
        row["seconds"] = seconds
        rows.append(row)
    return rows


def fresh_set(pictures: Pictures, runs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return labeled pictures (S, n, 196) and classes (S, n), the same for every run."""
    rows_of_class = pictures.rows_of_class
    keys = torch.rand(rows_of_class.shape, generator=generator)
    columns = keys.argsort(1)[:, :LABELS_OF_FRESH_SET].to(rows_of_class.device)
    rows = rows_of_class.gather(1, columns).flatten()
    return (
        pictures.training[rows].expand(runs, -1, -1),
        pictures.training_labels[rows].expand(runs, -1),
    )


def measured_point(
    stacked: Stack, batch: Batch, pictures: Pictures, generator: torch.Generator
) -> list[Row]:
    """Return for each run the shares and the ratio that the head of this file defines."""
    outer, inner = stacked.outer_and_inner(batch)
    feedback, q = stacked.feedback(outer, inner)
    top_class = q.argmax(-1, keepdim=True)
    is_right = top_class[..., 0] == batch.truth
    raises = is_raised(feedback, q, top_class)
    gradients = []
    mean_feedback = torch.zeros_like(feedback)
    for _ in range(FRESH_SETS):
        fresh = fresh_set(pictures, len(stacked.runs), generator)
        h, _ = stacked.feedback((*fresh, stacked.feedback_weights), inner)
        mean_feedback += h / FRESH_SETS
        # In float64, because entries may be very small.
        gradients.append((q * (h - (q * h).sum(-1, keepdim=True))).double())
    many_raise = is_raised(mean_feedback, q, top_class)
    # (R, S, B, C).
    a = torch.stack(gradients)
    mean = a.mean(0)
    noise_square = (a - mean).square().sum((0, 2, 3)) / (FRESH_SETS - 1)
    signal_square = mean.square().sum((1, 2)) - noise_square / FRESH_SETS
    ratio_of_fresh_set = (signal_square.clamp_min(0) / noise_square).sqrt()
    every_example = torch.ones_like(is_right)
    shares = {
        "pseudo_labels_right": share(is_right, every_example),
        "sign_right_of_right": share(raises, is_right),
        "sign_right_of_wrong": share(~raises, ~is_right),
        "many_sign_right_of_right": share(many_raise, is_right),
        "many_sign_right_of_wrong": share(~many_raise, ~is_right),
        "agreement": share(raises == many_raise, every_example),
    }
    rows: list[Row] = []
    for index, run in enumerate(stacked.runs):
        row: Row = {name: rounded(values[index]) for name, values in shares.items()}
        labels_ratio = run.labels_per_class / LABELS_OF_FRESH_SET
        row["signal_to_noise"] = rounded(ratio_of_fresh_set[index] * math.sqrt(labels_ratio))
        rows.append(row)
    return rows


def is_raised(h: Tensor, q: Tensor, top_class: Tensor) -> Tensor:
    """Return whether feedback (S, B, C) raises the teacher's logit of its class: (S, B)."""
    relative = h - (q * h).sum(-1, keepdim=True)
    return relative.gather(-1, top_class)[..., 0] > 0


def share(condition: Tensor, examples: Tensor) -> Tensor:
    """Return the share of the examples that meet a condition, (S,); NaN where there are none.

    Args:
        condition: (S, B), of bools.
        examples: (S, B), of bools: those that count.
    """
    return (condition & examples).sum(1).double() / examples.sum(1)


def rounded(value: Tensor) -> float | None:
    """Return a number with four figures, or None for NaN."""
    number = float(value)
    return None if math.isnan(number) else float(f"{number:.4g}")


# --------------------------------------------------------------------------------------- the tables


NAMES: dict[str, str] = {"mpl": "Meta Pseudo Labels", "uda_aligned": "aligned UDA"}


def verdict(rows: Sequence[Row]) -> str:
    """Return the row of the table of verdicts, or that it has not been run."""
    # Here, so that a machine that trains needs none of the packages of when.py.
    from when_tables import sign_flip

    head = ["labels a class, steps", "the other", "MPL / other", "difference", "shown?"]
    setting = f"Fashion-MNIST, 4 labels, {STEPS:,} steps"
    mpl: list[float] = []
    uda: list[float] = []
    if has_tuning(rows):
        mpl, uda = paired_accuracies(rows, "final")
    if len(mpl) < 2:
        cells = [setting, "aligned UDA (*declared*)", NONE, NONE, "declared, not run yet"]
        return grid(head, [cells], "llrrl")
    gap = points(mpl) - points(uda)
    p = sign_flip(mpl, uda)
    shown = "no"
    if p < 0.05:
        shown = "yes" if statistics.fmean(mpl) > statistics.fmean(uda) else "below"
    cells = [
        setting,
        "aligned UDA (*declared*)",
        f"{points(mpl):.1f} / {points(uda):.1f}",
        f"{gap:+.1f} ({between(mpl, uda)})",
        shown,
    ]
    test = paired_test(mpl, uda)
    deviation = 100 * (test.std or 0.0)
    least = (Z_OF_LEVEL + Z_OF_POWER) * deviation / math.sqrt(test.n)
    plan = plan_of(rows, size=None)
    return (
        f"{grid(head, [cells], 'llrrl')}\n\n{test.n} seeds, p = {p:.2g} by the sign-flip test. The "
        f"pilot's standard deviation was {plan.deviation:.1f} points, which asked for "
        f"{plan.computed} seeds, and the rule for {plan.seeds}. That of the test is "
        f"{deviation:.1f}, so that a difference of {least:.1f} points would have been seen with a "
        "power of 80 %."
    )


def has_tuning(rows: Sequence[Row]) -> bool:
    """Return whether both arms have rows that settings can be chosen from."""
    tuned = {row["method"] for row in rows if row["part"] == "tuning"}
    return tuned == set(METHODS)


def arms_table(rows: Sequence[Row]) -> str:
    """Return the settings that tuning chose, and means of the final part for both read-outs."""
    head = [
        "arm",
        "steps",
        "chosen",
        "read-out",
        "average, %",
        "finetuned, %",
        "class shares off, %",
        "labels right, %",
        "seconds a seed",
    ]
    lines = []
    for method in METHODS:
        if not has_tuning(rows):
            lines.append([NAMES[method], *[NONE] * 8])
            continue
        settings, read_out = best_settings(rows, method, size=None)
        final = rows_with(rows, "final", settings)
        values = [f"rate {settings.teacher_lr:g}", f"temperature {settings.temperature:g}"]
        if method == "mpl":
            values.append(f"student's rate {settings.student_lr:g}")
            values.append(f"weight {settings.feedback_weight:g}")
        cells = [NAMES[method], NONE, ", ".join(values), read_out, *[NONE] * 5]
        if final:
            cells[1] = f"{final[0]['steps']:,}"
            cells[4] = harness.spread([row["average"] for row in final])
            cells[5] = harness.spread([row["finetuned"] for row in final])
            cells[6] = f"{points([row[f'{read_out}_class_share_error'] for row in final]):.1f}"
            cells[7] = f"{points([row['pseudo_labels_right'] for row in final]):.1f}"
            cells[8] = f"{statistics.fmean(row['seconds'] for row in final):.2f}"
        lines.append(cells)
    table = grid(head, lines, "lrllrrrrr")
    sentence = same_read_outs(rows) if has_tuning(rows) else ""
    return f"{table}\n\n{sentence}" if sentence else table


def same_read_outs(rows: Sequence[Row]) -> str:
    """Return a sentence with the differences at one read-out for both arms, or an empty text."""
    differences = []
    for read_out in READ_OUTS:
        mpl, uda = paired_accuracies(rows, "final", read_out=read_out)
        if len(mpl) < 2:
            return ""
        gap = points(mpl) - points(uda)
        differences.append(f"{gap:+.1f} ({between(mpl, uda)}) between the {read_out} networks")
    return (
        "At one read-out for both arms, which was not declared, the difference is "
        f"{' and '.join(differences)}."
    )


def measurements_table(rows: Sequence[Row]) -> str:
    """Return signs and signal-to-noise ratios by labels and steps, means over seeds."""
    head = [
        "labels a class",
        "step",
        "labels right, %",
        "sign right, of right labels, %",
        "of wrong labels, %",
        "mean of both, %",
        "mean of both with 6,400 labels, %",
        "agreement, %",
        "signal / noise",
    ]
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if row["part"] == "measurements":
            for point in row["measured"]:
                groups.setdefault((row["labels"], point["step"]), []).append(point)
    lines: list[list[Any]] = []
    for (labels, step), measured in sorted(groups.items()):
        ratios = [point["signal_to_noise"] for point in measured]
        cells: list[Any] = [labels, f"{step:,}"]
        cells.append(f"{mean_percent(measured, 'pseudo_labels_right'):.1f}")
        cells.append(f"{mean_percent(measured, 'sign_right_of_right'):.1f}")
        cells.append(f"{mean_percent(measured, 'sign_right_of_wrong'):.1f}")
        cells.append(mean_of_both(measured, "sign_right"))
        cells.append(mean_of_both(measured, "many_sign_right"))
        cells.append(f"{mean_percent(measured, 'agreement'):.1f}")
        cells.append(f"{statistics.fmean(ratios):.2f}")
        lines.append(cells)
    if not lines:
        lines.append([LABELS_PER_CLASS, *[NONE] * (len(head) - 1)])
    return grid(head, lines, 1)


def mean_percent(measured: Sequence[Row], name: str) -> float:
    """Return the mean of a share in %, over the seeds that have it."""
    values = [point[name] for point in measured if point[name] is not None]
    return 100 * statistics.fmean(values) if values else math.nan


def mean_of_both(measured: Sequence[Row], name: str) -> str:
    """Return the mean of a share among right and among wrong labels in %, with its interval.

    The interval is of 95 %, over the seeds that have labels of both kinds.
    """
    percents = []
    for point in measured:
        of_right = point[f"{name}_of_right"]
        of_wrong = point[f"{name}_of_wrong"]
        if of_right is not None and of_wrong is not None:
            percents.append(50 * (of_right + of_wrong))
    return interval(percents, form=".1f") if percents else NONE


# ------------------------------------------------------------------------------------- the command


def parsed_arguments() -> argparse.Namespace:
    parser = arguments(__doc__, RAW)
    parser.add_argument(
        "--source", type=Path, default=Path(DEBIAN), help="the folder of the four files"
    )
    parser.add_argument(
        "--parts", nargs="+", default=PARTS, choices=PARTS, help="what is run, in this order"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, help="stop after so many; what has ended is kept")
    parser.add_argument("--stack", type=int, help="seeds at once: 64 on a GPU, 4 on a CPU")
    parser.add_argument(
        "--costs", action="store_true", help="print the operations of a step of each arm, and end"
    )
    return parsed(parser)


def main() -> None:
    began = time.monotonic()
    args = parsed_arguments()
    if not args.runs:
        rows = harness.read(args.out, "part")
        show(args.write, "fashion_feedback", verdict(rows))
        show(args.write, "fashion_feedback-arms", arms_table(rows))
        show(args.write, "fashion_feedback-signs", measurements_table(rows))
        return
    if args.costs:
        operations = {method: operations_of_step(method) for method in METHODS}
        for method, count in operations.items():
            print(f"{method}: {count:,} operations, {count / operations['mpl']:.4f} of mpl's")
        return
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    size = Size(
        miniature=args.miniature,
        stack=args.stack or (64 if device.type == "cuda" else 4),
        device=device,
        deadline=None if args.seconds is None else began + args.seconds,
    )
    try:
        pictures = read_pictures(args.source, miniature=args.miniature, device=device)
        study = Study(args.out, pictures, size)
        work: dict[Part, Callable[[], None]] = {
            "tuning": study.tune,
            "pilot": study.pilot,
            "final": study.final,
            "measurements": study.measure,
        }
        with torch.no_grad():
            for part in args.parts:
                work[part]()
    except TimeIsOver:
        print(f"stopped after --seconds {args.seconds:g}; the same command goes on", flush=True)
    except MetaplError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
