"""Do learned weights and labels help against wrong labels? Digits with planted noise, and 100 trusted labels.

    python benchmarks/label_noise.py                              # tune, then run; goes on where it was stopped
    python benchmarks/label_noise.py --costs                      # processor time of each method
    python benchmarks/label_noise.py --table                      # the tables of the raw file
    python benchmarks/label_noise.py --write benchmarks/results/label_noise.md  # put them there; the figure: docs/
    python benchmarks/label_noise.py --miniature --out FILE       # all of it in seconds, to see that it runs

Of scikit-learn's digits, 10 of each class have trusted labels (the handful); the labels of about 1,100 others are made
wrong, or the classes are made rare. The bilevel methods draw their inner batches from the latter and their outer ones
from the handful, after 60 of 300 steps in which the student learns from the former alone; the plain methods learn from
both, or from one of them.

Tuning: each method has 4 configurations, each run on 2 seeds of their own in each of the conditions; in each condition
the one with the best mean accuracy on 197 trusted validation images is chosen. With altered feedback, a method keeps
the configuration that it has with its own. Final runs: 20 other seeds. No validation image is read, and the student
after the last step is kept; only early stopping selects a checkpoint, by its accuracy on the handful, which it does not
train on. Only the final runs look at the test set, once: the student, and the same student after finetuning on the
handful.

Metagradient descent (Engstrom et al., 2025) came last, when the results of the others were known; what follows was
written before it ran on any of these seeds. The weight of a noisy example is σ(t), t = 0 at first, as in
ExampleWeights. The whole training of 300 steps begins again 5 times at the same weights, with the same batches; each
time t moves by ± a constant, with the sign of the derivative of the handful's loss at its end; a sixth training, with
the weights so found, is the one that is judged. 5 was taken from a trial of 5 seeds that nothing was tuned in. It has
4 configurations, as the others have. In passes it costs 5 · 4.6 + 1 = 24 plain trainings, and a one-step method 3; so
ExampleWeights, which learns the same weights, runs once more with 8 times as many steps after the same warm-up, tuned
again from the same 4 configurations. The other one-step methods were not run at this cost.
``--costs`` measures what each of them costs here, where a network is so small that most of a step is not its passes.

The seeds of a run are trained side by side, as the blocks of one network. No weight is shared, every optimizer works
element by element, and the mean over the batch is undone by the learning rate, so each seed ends as it would alone;
a test compares the two. Every run is a row of the raw file.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from harness import (
    BLUE,
    GREEN,
    NONE,
    RESULTS,
    Bar,
    Row,
    append,
    arguments,
    bars,
    environment,
    figure_of,
    grid,
    parsed,
    read,
    show,
)
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.ablation import Altered
from metapl.apps.pictures import load_digits_split
from metapl.data.sampler import StepSampler
from metapl.feedback import Estimator, Forward
from metapl.feedback.inner_step import InnerStep
from metapl.metrics import paired_test
from metapl.models import mlp
from metapl.problems import (
    ExampleWeights,
    LabelCorrection,
    LearningToReweight,
    MetaWeightNet,
    NoiseTransition,
    Signal,
    Table,
    WeightNet,
)
from metapl.problems.losses import CrossEntropy

RAW = RESULTS / "label_noise.jsonl"
CLASSES, HANDFUL, BATCH, HIDDEN = 10, 10, 64, 32
"""Classes, trusted labels of each, examples in a batch, width of the hidden layer."""

MOMENTUM, FINETUNE_LR, CHECKED_EVERY = 0.9, 0.02, 25
STUDENT, FINETUNED = "test_accuracy", "finetuned_test_accuracy"
DESCENTS, LONGER = 5, 8
"""Whole trainings that are differentiated, one after another, before the last one; and how many times as many steps
cost a one-step method the same passes."""

TRUSTED = 4.0
"""Logit of the given label at first, of a corrector and of a transition matrix: a probability of 0.86."""

RAREST, MOST = 20, 100
"""How many times rarer the rarest class is than the most frequent one, and the size of that one."""

CONDITIONS = {
    "symmetric_20": "symmetric, 20 %",
    "symmetric_40": "symmetric, 40 %",
    "symmetric_60": "symmetric, 60 %",
    "asymmetric_40": "asymmetric, 40 %",
    "imbalance_20": "imbalance, 1:20",
}
Config = dict[str, float]


@dataclass(frozen=True)
class Size:
    """How much is run: steps in all, those of the student alone before its teacher begins, ..."""

    steps: int
    warm: int
    finetune_steps: int
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    configurations: int


FULL = Size(steps=300, warm=60, finetune_steps=50, tuning_seeds=(100, 101), seeds=tuple(range(20)), configurations=4)
MINIATURE = Size(steps=3, warm=1, finetune_steps=2, tuning_seeds=(100,), seeds=(0, 1), configurations=1)


def every(**axes: tuple[float, ...]) -> tuple[Config, ...]:
    return tuple(dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values()))


@dataclass(frozen=True)
class Entry:
    """A method.

    Args:
        title: in tables.
        problem: what is learned beside the student, or what a student alone learns from.
        grid: its 4 configurations; of none, those of ``problem`` are taken.
        how: its feedback is altered.
        times: as many steps as the others.
    """

    title: str
    problem: str
    grid: tuple[Config, ...] = ()
    how: str | None = None
    times: int = 1


STUDENT_LR = (0.05, 0.2)
GRIDS = {
    "meta_weight_net": every(student_lr=STUDENT_LR, teacher_lr=(0.0003, 0.003)),
    "learning_to_reweight": every(student_lr=STUDENT_LR, momentum=(0.0, MOMENTUM)),
    "example_weights": every(student_lr=STUDENT_LR, teacher_lr=(0.1, 0.4)),
    "label_correction": every(student_lr=STUDENT_LR, teacher_lr=(0.001, 0.01)),
    "noise_transition": every(student_lr=STUDENT_LR, teacher_lr=(0.02, 0.1)),
    "metagradient_descent": every(student_lr=STUDENT_LR, teacher_lr=(0.4, 1.0)),
}
TITLES = {
    "meta_weight_net": "MetaWeightNet",
    "learning_to_reweight": "LearningToReweight",
    "example_weights": "ExampleWeights",
    "label_correction": "LabelCorrection",
    "noise_transition": "NoiseTransition",
    "metagradient_descent": "metagradient descent",
}
ALTERATIONS = {"permuted": "feedback permuted", "random_sign": "feedback with random signs"}

ENTRIES: dict[str, Entry] = {
    "plain": Entry("plain, noisy + clean", "both", every(student_lr=STUDENT_LR, clean_weight=(1.0, 10.0))),
    "clean": Entry("plain, clean alone", "clean", every(student_lr=STUDENT_LR, label_smoothing=(0.0, 0.2))),
    "early_stopping": Entry(
        "plain, noisy, stopped early", "noisy", every(student_lr=STUDENT_LR, label_smoothing=(0.0, 0.2))
    ),
    **{name: Entry(title, name, GRIDS[name]) for name, title in TITLES.items()},
    **{
        f"{name}_{how}": Entry(f"{title}, {words}", name, how=how)
        for how, words in ALTERATIONS.items()
        for name, title in TITLES.items()
    },
    "example_weights_long": Entry(
        f"ExampleWeights, {LONGER} times the steps", "example_weights", GRIDS["example_weights"], times=LONGER
    ),
    "meta_weight_net_cold": Entry("MetaWeightNet, without warm-up", "meta_weight_net"),
}
BILEVEL = tuple(TITLES)
BASELINES = ("plain", "clean", "early_stopping")

# ------------------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True, eq=False)
class Data:
    """A seed's digits: images, their given labels, which of them are wrong, the handful, validation and test."""

    x: Tensor
    given: Tensor
    wrong: Tensor
    clean: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@lru_cache(maxsize=128)
def drawn(condition: str, seed: int) -> Data:
    """The digits of a seed with the condition's noise."""
    split = load_digits_split(HANDFUL, seed)
    x, y = split.unlabeled, split.unlabeled_truth
    generator = torch.Generator().manual_seed(seed)
    kind, percent = condition.split("_")
    if kind == "imbalance":
        kept = _rarer(y, generator)
        x, y = x[kept], y[kept]
        given = y
    else:
        noisy = torch.rand(len(y), generator=generator) < int(percent) / 100
        others = torch.randint(1, CLASSES, y.shape, generator=generator)  # any class but the true one
        given = torch.where(noisy, (y + (others if kind == "symmetric" else 1)) % CLASSES, y)
    return Data(x, given, given != y, split.labeled, split.validation, split.test)


def _rarer(y: Tensor, generator: torch.Generator) -> Tensor:
    """Positions of examples of classes that get rarer geometrically, in an order of the classes that is drawn."""
    order = torch.randperm(CLASSES, generator=generator).tolist()
    sizes = {c: round(MOST * RAREST ** (-rank / (CLASSES - 1))) for rank, c in enumerate(order)}
    return torch.cat([(y == c).nonzero()[: sizes[c], 0] for c in range(CLASSES)])


# ------------------------------------------------------------------------------------------- networks of several blocks


class Blocks(nn.Module):
    """Networks of one shape side by side: the rows of a batch are those of the first block, then of the second, ..."""

    def __init__(self, networks: Sequence[nn.Sequential]) -> None:
        super().__init__()
        self.count = len(networks)
        layers = [[m for m in network if isinstance(m, nn.Linear)] for network in networks]
        self.weights = nn.ParameterList(
            torch.stack([layer.weight.detach().T for layer in same]) for same in zip(*layers, strict=True)
        )
        self.biases = nn.ParameterList(
            torch.stack([layer.bias.detach()[None] for layer in same]) for same in zip(*layers, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(count · B, ...) to (count · B, outputs)."""
        x = x.flatten(1).unflatten(0, (self.count, -1))
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.relu(x) if number else x, weight)
        return x.flatten(0, 1)


def seeded(seed: int, make: Callable[[], nn.Sequential]) -> nn.Sequential:
    """A network whose first weights are those of a seed."""
    torch.manual_seed(seed)
    return make()


class WeightBlocks(nn.Module):
    """A :class:`metapl.problems.WeightNet` for each block."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self.blocks = Blocks([seeded(seed, lambda: WeightNet().layers) for seed in seeds])

    def forward(self, losses: Tensor) -> Tensor:
        """(count · B,) to (count · B,)."""
        weights: Tensor = self.blocks(losses[:, None])[:, 0].sigmoid()
        return weights


class Corrector(nn.Module):
    """Logits of the label from an image and its given label, for each block; at first the given label alone counts."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self.blocks = Blocks([seeded(seed, lambda: mlp([64 + CLASSES, HIDDEN, CLASSES])) for seed in seeds])
        with torch.no_grad():
            self.blocks.weights[-1].zero_()

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """(count · B, ...), (count · B,) to (count · B, C)."""
        labels = F.one_hot(given, CLASSES).to(x)
        logits: Tensor = self.blocks(torch.cat([x.flatten(1), labels], 1)) + TRUSTED * labels
        return logits


class NoiseTransitions(NoiseTransition):
    """:class:`metapl.problems.NoiseTransition` with a matrix for each block."""

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        return Signal(teacher().softmax(-1))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        matrices = signal.value
        given = batch[1].unflatten(0, (len(matrices), -1))
        blocks = torch.arange(len(matrices))[:, None]
        log_M = matrices.transpose(1, 2)[blocks, given].flatten(0, 1).clamp_min(1e-30).log()
        return -(outputs.log_softmax(-1) + log_M).logsumexp(-1)


@dataclass(frozen=True)
class Reweighting(LearningToReweight):
    """:class:`metapl.problems.LearningToReweight` within each block: its weights sum to 1."""

    blocks: int = 1

    def revised_signal(self, signal: Signal, h: Tensor) -> Signal:
        parts = (super(Reweighting, self).revised_signal(signal, part).value for part in h.chunk(self.blocks))
        return Signal(torch.cat(list(parts)))


@dataclass(frozen=True)
class AlteredBlocks(Altered):
    """:class:`metapl.ablation.Altered` within each block: rows are examples, or classes of a transition matrix."""

    seeds: tuple[int, ...] = ()

    def _alter(self, step: InnerStep, count: int, name: str, h: Tensor) -> Tensor:
        blocks = len(self.seeds)
        by_block = h if len(h) == blocks else h.unflatten(0, (blocks, -1))
        altered = [
            Altered(self.base, self.alteration, seed)._alter(step, count, name, part)
            for seed, part in zip(self.seeds, by_block, strict=True)
        ]
        return torch.stack(altered).reshape(h.shape)


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Job:
    """A method with a configuration, in several conditions with several seeds, trained side by side."""

    method: str
    config: Config
    conditions: tuple[str, ...]
    seeds: tuple[int, ...]
    final: bool

    @property
    def told(self) -> list[Row]:
        """What the row of each block says of it."""
        own = {"method": self.method, "config": self.config, "final": self.final}
        return [{**own, "condition": condition, "seed": seed} for condition in self.conditions for seed in self.seeds]


Pool = tuple[Tensor, Tensor, Tensor]
"""Images, given labels, and positions in the table of all blocks."""


def batches(pools: Sequence[Pool], seeds: Sequence[int], stream: int, steps: int) -> list[Pool]:
    """For each step, the examples that each block draws from its own pool, one block after another."""
    samplers = [
        StepSampler(len(pool[0]), BATCH, seed=seed, stream=stream) for pool, seed in zip(pools, seeds, strict=True)
    ]
    drawn_at = []
    for step in range(steps):
        parts = [
            [column[indices] for column in pool]
            for pool, indices in zip(pools, (sampler.indices(step) for sampler in samplers), strict=True)
        ]
        x, y, index = (torch.cat(column) for column in zip(*parts, strict=True))
        drawn_at.append((x, y, index))
    return drawn_at


class Run:
    """A job's blocks: their data, and the networks that are trained on them."""

    def __init__(self, job: Job, size: Size) -> None:
        self.job, self.size, self.entry = job, size, ENTRIES[job.method]
        self.data = [drawn(row["condition"], row["seed"]) for row in job.told]
        self.seeds = [row["seed"] for row in job.told]
        starts = itertools.accumulate((len(data.x) for data in self.data), initial=0)
        self.noisy = [
            (data.x, data.given, start + torch.arange(len(data.x)))
            for data, start in zip(self.data, starts, strict=False)
        ]
        self.handful = [(x, y, torch.zeros_like(y)) for x, y in (data.clean for data in self.data)]
        self.student = Blocks([seeded(seed, lambda: mlp([64, HIDDEN, CLASSES])) for seed in self.seeds])
        self.teacher: nn.Module | None = None

    def optimizer(self, lr: float, momentum: float = MOMENTUM) -> torch.optim.Optimizer:
        """Of the student. The loss is a mean over the blocks too, so the rate is as many times larger."""
        return torch.optim.SGD(self.student.parameters(), lr=lr * len(self.data), momentum=momentum)

    def outer(self, steps: int, stream: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of the handful."""
        return [(x, y) for x, y, _ in batches(self.handful, self.seeds, stream, steps)]

    def train(self) -> None:
        """By the method."""
        if self.entry.problem == "metagradient_descent":
            self._descend()
        elif self.entry.problem in TITLES:
            self._bilevel()
        else:
            self._plain()

    def _bilevel(self) -> None:
        config, warm = self.job.config, 0 if self.job.method.endswith("_cold") else self.size.warm
        steps = self.entry.times * self.size.steps - warm
        if warm:
            labeled = [(x, y) for x, y, _ in batches(self.noisy, self.seeds, 3, warm)]
            self._supervised(config["student_lr"]).fit(
                labeled, steps=warm, log_every=warm, schedule="constant", progress=False
            )
        problem, self.teacher = self._problem()
        mode: Estimator = Forward()
        if self.entry.how is not None:
            mode = AlteredBlocks(mode, self.entry.how, seeds=tuple(self.seeds))  # type: ignore[arg-type]  # a name
        of_teacher: dict[str, Any] = {}
        if self.teacher is not None:
            optimizer = torch.optim.Adam(self.teacher.parameters(), lr=config["teacher_lr"])
            of_teacher = {"outer_optimizer": optimizer, "teacher_losses": (), "feedback_weight": len(self.data)}
        trainer = metapl.BilevelTrainer(
            self.teacher,
            self.student,
            mode,
            problem=problem,
            inner_optimizer=self.optimizer(config["student_lr"], config.get("momentum", MOMENTUM)),
            **of_teacher,
        )
        parts = slice(0, 3 if isinstance(problem, ExampleWeights) else 2)
        inner = [batch[parts] for batch in batches(self.noisy, self.seeds, 0, steps)]
        trainer.fit(self.outer(steps, 1), inner, steps=steps, log_every=steps, progress=False)

    def _descend(self) -> None:
        """Move the weights of all examples by the sign of their gradient through the whole training, which begins
        again at the same weights and with the same batches; the last one is without a gradient."""
        config, steps = self.job.config, self.size.steps
        problem, weights = self._problem()
        assert isinstance(weights, Table)
        (handful,) = [tuple(torch.cat(column) for column in zip(*(data.clean for data in self.data), strict=True))]
        training = metapl.Lookahead(
            batches(self.noisy, self.seeds, 0, steps), schedule=lambda k: 0.5 * (1 + math.cos(math.pi * k / steps))
        )
        for number in range(DESCENTS + 1):
            mode: Any = Forward() if number < DESCENTS else "none"
            if self.entry.how is not None and number < DESCENTS:
                drawn_by = tuple(seed * DESCENTS + number for seed in self.seeds)
                mode = AlteredBlocks(mode, self.entry.how, seeds=drawn_by)  # type: ignore[arg-type]  # a name
            found = metapl.hypergradient(
                weights,
                self.student,
                outer=handful,
                inner=training,
                mode=mode,
                problem=problem,
                inner_optimizer=self.optimizer(config["student_lr"]),
            )
            with torch.no_grad():
                weights.values -= config["teacher_lr"] * found.grads["values"].sign()
        self.teacher = weights
        self.student.load_state_dict(found.student_params)

    def _problem(self) -> tuple[metapl.BilevelProblem, nn.Module | None]:
        """What is learned beside the student, as it is at first."""
        blocks = len(self.data)
        if self.entry.problem == "meta_weight_net":
            return MetaWeightNet(), WeightBlocks(self.seeds)
        if self.entry.problem == "learning_to_reweight":
            return Reweighting(blocks), None
        if self.entry.problem in ("example_weights", "metagradient_descent"):
            return ExampleWeights(), Table(torch.zeros(sum(len(data.x) for data in self.data)))
        if self.entry.problem == "label_correction":
            return LabelCorrection(), Corrector(self.seeds)
        return NoiseTransitions(), Table(TRUSTED * torch.eye(CLASSES).repeat(blocks, 1, 1))

    def _plain(self) -> None:
        config, pools = self.job.config, {"noisy": self.noisy, "clean": self.handful}
        if self.entry.problem == "both":
            copies = int(config["clean_weight"])
            pools["both"] = [
                (torch.cat([noisy[0], *[clean[0]] * copies]), torch.cat([noisy[1], *[clean[1]] * copies]), noisy[2])
                for noisy, clean in zip(self.noisy, self.handful, strict=True)
            ]
        pool = [(x, y, torch.zeros_like(y)) for x, y, _ in pools[self.entry.problem]]
        trainer = self._supervised(config["student_lr"], config.get("label_smoothing", 0.0))
        labeled, steps = [(x, y) for x, y, _ in batches(pool, self.seeds, 0, self.size.steps)], self.size.steps
        stopped = [Earliest(self)] if self.job.method == "early_stopping" else []
        every = CHECKED_EVERY if stopped else steps
        trainer.fit(labeled, steps=steps, log_every=every, progress=False, callbacks=stopped)
        for kept in stopped:
            kept.restore()

    def _supervised(self, lr: float, label_smoothing: float = 0.0) -> metapl.LossTrainer:
        return metapl.LossTrainer(self.student, (CrossEntropy(label_smoothing),), optimizer=self.optimizer(lr))

    def finetune(self) -> None:
        """On the handful, after whatever method."""
        trainer, steps = self._supervised(FINETUNE_LR), self.size.finetune_steps
        trainer.fit(self.outer(steps, 2), steps=steps, log_every=steps, progress=False)

    @torch.no_grad()
    def logits(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The student's on the inputs of each block, of which there may be more in one than in another."""
        most = max(map(len, inputs))
        padded = [torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in inputs]
        together: Tensor = self.student(torch.cat(padded)).unflatten(0, (len(inputs), most))
        return [z[: len(x)] for z, x in zip(together, inputs, strict=True)]

    def accuracies(self, part: str) -> list[float]:
        """The student's accuracy on a part of each block's data."""
        sets = [getattr(data, part) for data in self.data]
        logits = self.logits([x for x, _ in sets])
        return [float((z.argmax(1) == y).double().mean()) for z, (_, y) in zip(logits, sets, strict=True)]

    # ----------------------------------------------------------------------------------------- finding the wrong labels

    def losses(self) -> list[Tensor]:
        """The student's loss on the given label of each noisy example: where it is high, the label may be wrong."""
        return [F.cross_entropy(z, y, reduction="none") for z, y in self._looks()]

    def _looks(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.logits([x for x, _, _ in self.noisy]), (y for _, y, _ in self.noisy), strict=True))

    @torch.no_grad()
    def doubts(self) -> list[Tensor]:
        """What the teacher thinks of each noisy example: low weights, or the probability that the label is wrong."""
        if isinstance(self.teacher, WeightBlocks):
            losses = self.losses()
            most = max(map(len, losses))
            padded = torch.cat([torch.cat([part, part.new_zeros(most - len(part))]) for part in losses])
            weights = self.teacher(padded).unflatten(0, (len(losses), most))
            return [-w[: len(part)] for w, part in zip(weights, losses, strict=True)]
        if isinstance(self.teacher, Corrector):
            return [1 - p for p in self._corrected()]
        assert isinstance(self.teacher, Table)
        if self.teacher.values.ndim == 1:
            return [-self.teacher(index) for _, _, index in self.noisy]
        return [
            1 - _posterior(z.softmax(-1), matrix.softmax(-1), y)
            for (z, y), matrix in zip(self._looks(), self.teacher(), strict=True)
        ]

    def _corrected(self) -> list[Tensor]:
        """The corrector's probability of the given label."""
        assert isinstance(self.teacher, Corrector)
        most = max(len(x) for x, _, _ in self.noisy)
        x = torch.cat([torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x, _, _ in self.noisy])
        y = torch.cat([torch.cat([y, y.new_zeros(most - len(y))]) for _, y, _ in self.noisy])
        q = self.teacher(x, y).softmax(-1).gather(1, y[:, None])[:, 0].unflatten(0, (len(self.noisy), most))
        return [part[: len(pool[1])] for part, pool in zip(q, self.noisy, strict=True)]


def _posterior(p: Tensor, matrix: Tensor, given: Tensor) -> Tensor:
    """The probability that the given label is the true one, (n,): p_k M_kk / Σ_j p_j M_jk."""
    joint = p * matrix.T[given]
    return joint.gather(1, given[:, None])[:, 0] / joint.sum(1)


class Earliest:
    """The weights of each block where its accuracy on the handful was best, the latest of equals."""

    def __init__(self, run: Run) -> None:
        self.run, self.best = run, [-1.0] * len(run.data)
        self.weights = [p.detach().clone() for p in run.student.parameters()]

    def __call__(self, step: int, row: dict[str, float], trainer: Any) -> None:
        for block, accuracy in enumerate(self.run.accuracies("clean")):
            if accuracy >= self.best[block]:
                self.best[block] = accuracy
                for kept, now in zip(self.weights, self.run.student.parameters(), strict=True):
                    kept[block] = now.detach()[block]

    def restore(self) -> None:
        """Put them in place."""
        with torch.no_grad():
            for kept, now in zip(self.weights, self.run.student.parameters(), strict=True):
                now.copy_(kept)


def auc(wrong: Tensor, doubt: Tensor) -> float | None:
    """The probability that a wrong label is doubted more than a right one; None where all are right."""
    from sklearn.metrics import roc_auc_score

    return None if not wrong.any() else round(float(roc_auc_score(wrong, doubt)), 4)


def one_run(job: Job, size: Size) -> list[Row]:
    """A row for each condition and seed: tuning runs read the validation images, final runs the test images."""
    since, run = time.perf_counter(), Run(job, size)
    run.train()
    columns: dict[str, list[Any]] = {}
    if job.final:
        columns["auc_by_loss"] = [auc(data.wrong, loss) for data, loss in zip(run.data, run.losses(), strict=True)]
        if run.teacher is not None:
            columns["auc"] = [auc(data.wrong, doubt) for data, doubt in zip(run.data, run.doubts(), strict=True)]
        columns[STUDENT] = run.accuracies("test")
        run.finetune()
        columns[FINETUNED] = run.accuracies("test")
    else:
        columns["validation_accuracy"] = run.accuracies("validation")
    seconds = round((time.perf_counter() - since) / len(run.data), 2)
    found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{**told, **own, "seconds": seconds} for told, own in zip(job.told, found, strict=True)]


# ------------------------------------------------------------------------------------------------------ running it all


def run_missing(jobs: Iterable[Job], size: Size, raw: Path) -> None:
    """Run what the raw file does not hold yet."""
    rows, begun = read(raw, "method"), False
    for job in jobs:
        if all(any(told.items() <= row.items() for row in rows) for told in job.told):
            continue
        append(raw, *[{"made_with": environment(), **dataclasses.asdict(size)}] * (not begun), *one_run(job, size))
        begun = True
        print(f"{job.method}, {', '.join(job.conditions)}", file=sys.stderr, flush=True)


def chosen(rows: Sequence[Row], method: str, condition: str) -> Config:
    """The configuration with the best mean validation accuracy over the tuning seeds; of equals, the first."""
    method = method if ENTRIES[method].grid else ENTRIES[method].problem
    found: dict[str, list[float]] = {}
    for row in rows:
        if (row["method"], row["condition"], row["final"]) == (method, condition, False):
            found.setdefault(json.dumps(row["config"]), []).append(row["validation_accuracy"])
    best: Config = json.loads(max(found, key=lambda config: statistics.fmean(found[config])))
    return best


def study(size: Size, raw: Path) -> None:
    """Tune every method, then run each on the seeds that nobody has looked at."""
    tuning = (
        Job(name, config, (*CONDITIONS,), size.tuning_seeds, final=False)
        for name, entry in ENTRIES.items()
        for config in entry.grid[: size.configurations]
    )
    run_missing(tuning, size, raw)
    rows = read(raw, "method")
    places = itertools.product(ENTRIES, CONDITIONS)
    run_missing((Job(name, chosen(rows, name, at), (at,), size.seeds, final=True) for name, at in places), size, raw)


def costs(raw: Path, seeds: tuple[int, ...]) -> None:
    """Write the processor seconds of each method's training of so many seeds side by side, after one in miniature."""
    seconds: dict[str, float] = {}
    for size, (name, entry) in itertools.product((MINIATURE, FULL), ENTRIES.items()):
        if entry.grid:
            run = Run(Job(name, entry.grid[0], ("asymmetric_40",), seeds, final=False), size)
            since = time.process_time()
            run.train()
            seconds[name] = round(time.process_time() - since, 2)
    append(raw, {"costs": seconds, "made_with": environment()})


# --------------------------------------------------------------------------------------------------------------- tables

Columns = dict[tuple[str, str, str], list[float]]


def columns(rows: Sequence[Row]) -> Columns:
    """The figures of final runs by method, condition and read-out, in the order of the seeds; where all have one."""
    final = sorted((row for row in rows if row["final"]), key=lambda row: int(row["seed"]))
    found: Columns = {}
    for row, name in itertools.product(final, (STUDENT, FINETUNED, "auc", "auc_by_loss")):
        if row.get(name) is not None:
            found.setdefault((row["method"], row["condition"], name), []).append(float(row[name]))
    return {key: values for key, values in found.items() if len(values) == len({row["seed"] for row in final})}


def mean(values: Sequence[float] | None, scale: float = 100.0) -> str:
    """Mean ± standard error."""
    if values is None:
        return NONE
    digits, error = 1 if scale == 100 else 3, statistics.stdev(values) / math.sqrt(len(values)) if values[1:] else 0.0
    return f"{scale * statistics.fmean(values):.{digits}f} ± {scale * error:.{digits}f}"


def gain(a: Sequence[float] | None, b: Sequence[float] | None) -> str:
    """Of the means in points ± its standard error, and p of the paired t-test."""
    if a is None or b is None:
        return NONE
    test = paired_test(a, b)
    if test.std is None or test.p is None:
        return f"{100 * test.mean:+.1f}"
    p = f"{test.p:.1g}" if test.p < 0.1 else f"{test.p:.2f}"
    return f"{100 * test.mean:+.1f} ± {100 * test.std / math.sqrt(test.n):.1f} ({p})"


def by_condition(first: str, lines: Iterable[tuple[str, Callable[[str], str]]], noisy: bool = False) -> str:
    """A table of a title and a function of the condition in each line."""
    named = {name: title for name, title in CONDITIONS.items() if not (noisy and name.startswith("imbalance"))}
    return grid([first, *named.values()], ([title, *(cell(name) for name in named)] for title, cell in lines))


def block(raw: Path) -> str:
    """What stands in the documentation."""
    rows = read(raw, "method")
    found = columns(rows)
    there = [name for name in ENTRIES if all((name, at, STUDENT) in found for at in CONDITIONS)]
    titles = {name: ENTRIES[name].title for name in there}

    def best_plain(at: str) -> list[float]:
        """Of the plain students, finetuned or not, the highest mean on the test set, which favors them."""
        of_plain = [found.get((name, at, read_out)) for name in BASELINES for read_out in (STUDENT, FINETUNED)]
        return max((values for values in of_plain if values is not None), key=statistics.fmean)

    def against(first: str, second: str) -> Callable[[str], str]:
        return lambda at: gain(found.get((first, at, STUDENT)), found.get((second, at, STUDENT)))

    pairs = [
        (f"{titles[name]} − {words}", against(name, f"{name}_{how}"))
        for name in BILEVEL
        for how, words in ALTERATIONS.items()
        if f"{name}_{how}" in there
    ]
    others = [(name, "plain") for name in BILEVEL]
    others += [("metagradient_descent", name) for name in ("example_weights", "example_weights_long")]
    pairs += [(f"{titles[a]} − {titles[b]}", against(a, b)) for a, b in others]
    detected = [
        (f"{titles[name]}, {what}", lambda at, key=(name, kind): mean(found.get((key[0], at, key[1])), 1.0))
        for name in there
        for kind, what in (("auc", "by what it learned about labels"), ("auc_by_loss", "by its student's loss"))
        if all((name, at, kind) in found for at in CONDITIONS if not at.startswith("imbalance"))
    ]
    parts = [
        *(
            by_condition(head, [(titles[n], lambda at, n=n, by=by: mean(found.get((n, at, by)))) for n in there])
            for by, head in ((STUDENT, "student"), (FINETUNED, "student, finetuned on the handful"))
        ),
        by_condition("student against student", pairs),
        by_condition(
            "finetuned student against the best plain read-out",
            [(titles[n], lambda at, n=n: gain(found.get((n, at, FINETUNED)), best_plain(at))) for n in BILEVEL],
        ),
        by_condition("AUC", detected, noisy=True),
        by_condition(
            "chosen",
            [
                (e.title, lambda at, n=n: ", ".join(f"{key} {value:g}" for key, value in chosen(rows, n, at).items()))
                for n, e in ENTRIES.items()
                if e.grid
            ],
        ),
    ]
    for row in read(raw, "costs")[-1:]:
        cells = [[ENTRIES[n].title, f"{s:.1f}", f"{s / row['costs']['plain']:.1f}"] for n, s in row["costs"].items()]
        parts += [grid(["cost", "processor time, s", "over plain training"], cells)]
        parts += ["20 seeds side by side, one thread, by `--costs`."]
    tuning = [row for row in rows if not row["final"]]
    parts.append(
        f"Test accuracy in %, mean ± standard error over {len({row['seed'] for row in rows if row['final']})} seeds "
        "(400 test images each, drawn anew per seed from "
        "the same 1,797); differences are paired by seed, in points ± standard error, with p of the paired t-test "
        "over draws of these images, not "
        f"corrected for the number of cells. {len(tuning)} runs on {len({row['seed'] for row in tuning})} other seeds "
        "chose one of 4 configurations of each method in each condition. `python benchmarks/label_noise.py`; raw rows: "
        "`benchmarks/results/label_noise.jsonl`."
    )
    return "\n\n".join(parts)


def draw(path: Path, found: Columns) -> None:
    """What a method's own feedback is above altered feedback, a panel a condition."""
    panels = {
        title: [
            Bar(f"{ENTRIES[name].title} − {how.replace('_', ' ')}", own, altered, color)
            for name in BILEVEL
            for how, color in zip(ALTERATIONS, (BLUE, GREEN), strict=True)
            if (own := found.get((name, at, STUDENT))) and (altered := found.get((f"{name}_{how}", at, STUDENT)))
        ]
        for at, title in CONDITIONS.items()
    }
    gains = [
        100 * paired_test(*(found[f"example_weights{how}", at, STUDENT] for how in ("", "_permuted"))).mean
        for at in CONDITIONS
    ]
    heading = "Learned weights (ExampleWeights): their own feedback is "
    heading += f"{min(gains):+.1f} to {max(gains):+.1f} points above feedback given to the wrong examples"
    bars(path, panels, heading, "points of the student's test accuracy, 95 %", columns=2)


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument("--costs", action="store_true", help="measure what each method costs and stop")
    given = parsed(parser)
    torch.set_num_threads(1)
    if given.runs:
        costs(given.out, FULL.seeds) if given.costs else study(MINIATURE if given.miniature else FULL, given.out)
        return
    show(given.write, "label_noise", block(given.out))
    if given.write:
        draw(figure_of(given.write, f"{given.out.stem}.png"), columns(read(given.out, "method")))


if __name__ == "__main__":
    main()
