"""Do learned weights and labels help against wrong labels? Digits with noise, 100 trusted labels.

    python benchmarks/label_noise.py                  # tune, then run; goes on where it was stopped
    python benchmarks/label_noise.py --write benchmarks/results/label_noise.md  # figure: docs/

Of scikit-learn's digits, 10 of each class have trusted labels (the handful); the labels of about
1,100 others are made wrong, or the classes are made rare. The bilevel methods draw their inner
batches from the latter and their outer ones from the handful, after 60 of 300 steps in which the
student learns from the former alone; the plain methods learn from both, or from one of them.

Tuning: each method has 4 configurations, each run on 2 seeds of their own in each of the
conditions; in each condition the one with the best mean accuracy on 197 trusted validation images
is chosen. With altered feedback, a method keeps the configuration that it has with its own. Final
runs: 20 other seeds. No validation image is read, and the student after the last step is kept; only
early stopping selects a checkpoint, by its accuracy on the handful, which it does not train on.
Only the final runs look at the test set, once: the student, and the same student after finetuning
on the handful.

Metagradient descent (Engstrom et al., 2025; in docs/label-noise.md) was written down before it ran
on any of these seeds. In passes it costs 24 plain trainings, and a one-step method 3; so
ExampleWeights, which learns the same weights, runs once more with 8 times as many steps, tuned
again.

The seeds of the committed rows were trained side by side, as the blocks of one network (last in
commit 9e8e3c46), where each ends as it does alone; the processor time of each method is of those.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import harness
import torch
from harness import BLUE, GREEN, NONE, RESULTS, Bar, Row
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.ablation import Altered
from metapl.data.steps import StepSampler
from metapl.feedback import Forward
from metapl.metrics import paired_test
from metapl.models import mlp
from metapl.pictures import load_digits_split
from metapl.problems import (
    ExampleWeights,
    LabelCorrection,
    LearningToReweight,
    MetaWeightNet,
    NoiseTransition,
    Table,
    WeightNet,
)
from metapl.problems.losses import CrossEntropy

RAW = RESULTS / "label_noise.jsonl"
# Trusted labels of each class, examples in a batch, hidden units.
CLASSES = 10
HANDFUL = 10
BATCH = 64
HIDDEN = 32

MOMENTUM = 0.9
FINETUNE_LR = 0.02
CHECKED_EVERY = 25
STUDENT = "test_accuracy"
FINETUNED = "finetuned_test_accuracy"
DESCENTS = 5
LONGER = 8
"""Whole trainings that are differentiated, one after another, before the last one; and how many
times as many steps cost a one-step method the same passes."""

# logit of the given label at first, of a corrector and of a transition matrix: a probability of
# 0.86
TRUSTED = 4.0

RAREST = 20
MOST = 100
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


FULL = Size(
    steps=300,
    warm=60,
    finetune_steps=50,
    tuning_seeds=(100, 101),
    seeds=tuple(range(20)),
    configurations=4,
)
MINIATURE = Size(
    steps=3, warm=1, finetune_steps=2, tuning_seeds=(100,), seeds=(0, 1), configurations=1
)


@dataclass(frozen=True)
class Entry:
    """A method.

    Attributes:
        problem: what is learned beside the student, or what a student alone learns from.
        grid: its four configurations; without any, those of ``problem`` are taken.
        alteration: that of its feedback.
        times: how many times the steps of the others it takes.
    """

    title: str
    problem: str
    grid: tuple[Config, ...] = ()
    alteration: str | None = None
    times: int = 1


STUDENT_LR = (0.05, 0.2)
# The title, and what is tuned beside the student's rate.
LEARNED: dict[str, tuple[str, dict[str, tuple[float, ...]]]] = {
    "meta_weight_net": ("MetaWeightNet", {"teacher_lr": (0.0003, 0.003)}),
    "learning_to_reweight": ("LearningToReweight", {"momentum": (0.0, MOMENTUM)}),
    "example_weights": ("ExampleWeights", {"teacher_lr": (0.1, 0.4)}),
    "label_correction": ("LabelCorrection", {"teacher_lr": (0.001, 0.01)}),
    "noise_transition": ("NoiseTransition", {"teacher_lr": (0.02, 0.1)}),
    "metagradient_descent": ("metagradient descent", {"teacher_lr": (0.4, 1.0)}),
}
GRIDS = {
    name: harness.every(student_lr=STUDENT_LR, **tuned) for name, (_, tuned) in LEARNED.items()
}
ALTERATIONS = {"permuted": "feedback permuted", "random_sign": "feedback with random signs"}
SMOOTHED = harness.every(student_lr=STUDENT_LR, label_smoothing=(0.0, 0.2))

ENTRIES: dict[str, Entry] = {
    "plain": Entry(
        "plain, noisy + clean",
        "both",
        harness.every(student_lr=STUDENT_LR, clean_weight=(1.0, 10.0)),
    ),
    "clean": Entry("plain, clean alone", "clean", SMOOTHED),
    "early_stopping": Entry("plain, noisy, stopped early", "noisy", SMOOTHED),
    **{name: Entry(title, name, GRIDS[name]) for name, (title, _) in LEARNED.items()},
    **{
        f"{name}_{alteration}": Entry(f"{title}, {words}", name, alteration=alteration)
        for alteration, words in ALTERATIONS.items()
        for name, (title, _) in LEARNED.items()
    },
    "example_weights_long": Entry(
        f"ExampleWeights, {LONGER} times the steps",
        "example_weights",
        GRIDS["example_weights"],
        times=LONGER,
    ),
    "meta_weight_net_cold": Entry("MetaWeightNet, without warm-up", "meta_weight_net"),
}
BILEVEL = tuple(LEARNED)
BASELINES = ("plain", "clean", "early_stopping")


@dataclass(frozen=True, eq=False)
class Data:
    """A seed's digits.

    Images, their given labels, which of them are wrong, the handful, validation and test.
    """

    x: Tensor
    labels: Tensor
    wrong: Tensor
    clean: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@lru_cache(maxsize=128)
def drawn(condition: str, seed: int) -> Data:
    """Return the digits of a seed with the condition's noise."""
    split = load_digits_split(HANDFUL, seed)
    x = split.unlabeled
    y = split.unlabeled_truth
    generator = torch.Generator().manual_seed(seed)
    kind, percent = condition.split("_")
    # With imbalance, classes get rarer geometrically, in an order that is drawn.
    if kind == "imbalance":
        order = torch.randperm(CLASSES, generator=generator).tolist()
        sizes = {c: round(MOST * RAREST ** (-rank / (CLASSES - 1))) for rank, c in enumerate(order)}
        rows = torch.cat([(y == c).nonzero()[: sizes[c], 0] for c in range(CLASSES)])
        x = x[rows]
        y = y[rows]
        labels = y
    else:
        is_noisy = torch.rand(len(y), generator=generator) < int(percent) / 100
        # A symmetrically wrong label is any class but the true one, another is the next class.
        shifts = torch.randint(1, CLASSES, y.shape, generator=generator)
        if kind != "symmetric":
            shifts = torch.ones_like(shifts)
        labels = torch.where(is_noisy, (y + shifts) % CLASSES, y)
    return Data(x, labels, labels != y, split.labeled, split.validation, split.test)


class Corrector(nn.Module):
    """Logits of the label from an image and its given label.

    At first the given label alone counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp([64 + CLASSES, HIDDEN, CLASSES])
        nn.init.zeros_(self.network[-1].weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return logits (B, C) of inputs (B, ...) and labels (B,)."""
        one_hot = F.one_hot(labels, CLASSES).to(x)
        logits: Tensor = self.network(torch.cat([x.flatten(1), one_hot], 1)) + TRUSTED * one_hot
        return logits


class Run:
    """A method with a configuration, on the digits of a seed."""

    def __init__(self, method: str, config: Config, condition: str, seed: int, size: Size) -> None:
        self.method = method
        self.entry = ENTRIES[method]
        self.config = config
        self.seed = seed
        self.size = size
        self.data = drawn(condition, seed)
        self.noisy = (self.data.x, self.data.labels, torch.arange(len(self.data.x)))
        torch.manual_seed(seed)
        self.student = mlp([64, HIDDEN, CLASSES])
        self.teacher: nn.Module | None = None

    def batches(
        self, pool: tuple[Tensor, ...], stream: int, steps: int
    ) -> list[tuple[Tensor, ...]]:
        """Return, for each step, the examples that are drawn from a pool of columns."""
        sampler = StepSampler(len(pool[0]), BATCH, seed=self.seed, stream=stream)
        return [tuple(column[sampler.indices(step)] for column in pool) for step in range(steps)]

    def optimizer(self, momentum: float = MOMENTUM) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.student.parameters(), lr=self.config["student_lr"], momentum=momentum
        )

    def supervised(
        self, pool: tuple[Tensor, ...], stream: int, steps: int, lr: float, **options: Any
    ) -> None:
        """Train the student alone."""
        optimizer = torch.optim.SGD(self.student.parameters(), lr=lr, momentum=MOMENTUM)
        losses = (CrossEntropy(self.config.get("label_smoothing", 0.0) if stream == 0 else 0.0),)
        trainer = metapl.LossTrainer(self.student, losses, optimizer=optimizer)
        labeled = self.batches(pool[:2], stream, steps)
        trainer.fit(labeled, **{"steps": steps, "log_every": steps, "progress": False, **options})

    def train(self) -> None:
        """Train by the method."""
        if self.entry.problem not in LEARNED:
            self._plain()
            return
        torch.manual_seed(self.seed)
        problem: Any
        match self.entry.problem:
            case "meta_weight_net":
                problem = MetaWeightNet()
                self.teacher = WeightNet()
            case "learning_to_reweight":
                problem = LearningToReweight()
            case "label_correction":
                problem = LabelCorrection()
                self.teacher = Corrector()
            case "noise_transition":
                problem = NoiseTransition()
                self.teacher = Table(TRUSTED * torch.eye(CLASSES))
            case _:
                problem = ExampleWeights()
                self.teacher = Table(torch.zeros(len(self.data.x)))
        (self._descend if self.entry.problem == "metagradient_descent" else self._bilevel)(problem)

    def mode(self, seed: int) -> Any:
        if self.entry.alteration is None:
            return Forward()
        return Altered(Forward(), self.entry.alteration, seed)  # type: ignore[arg-type]

    def _bilevel(self, problem: Any) -> None:
        warm = 0 if self.method.endswith("_cold") else self.size.warm
        steps = self.entry.times * self.size.steps - warm
        if warm:
            self.supervised(self.noisy, 3, warm, self.config["student_lr"], schedule="constant")
        of_teacher: dict[str, Any] = {}
        if self.teacher is not None:
            optimizer = torch.optim.Adam(self.teacher.parameters(), lr=self.config["teacher_lr"])
            of_teacher = {"outer_optimizer": optimizer, "teacher_losses": ()}
        of_student = {"inner_optimizer": self.optimizer(self.config.get("momentum", MOMENTUM))}
        pair = self.teacher, self.student
        trainer = metapl.BilevelTrainer(
            *pair, self.mode(self.seed), problem=problem, **of_student, **of_teacher
        )
        parts = self.noisy if isinstance(problem, ExampleWeights) else self.noisy[:2]
        outer = self.batches(self.data.clean, 1, steps)
        inner = self.batches(parts, 0, steps)
        # The student has been warmed up, or is to begin without, as the setting says.
        trainer.fit(outer, inner, steps=steps, log_every=steps, first_steps=0, progress=False)

    def _descend(self, problem: Any) -> None:
        """Move all examples' weights by the sign of their gradient through the whole training.

        Each training begins at the same weights and with the same batches; the last one is without
        a gradient.
        """
        weights: Any = self.teacher
        steps = self.size.steps
        optimizer = self.optimizer()
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps))
        )
        training = metapl.Lookahead(
            self.batches(self.noisy, 0, steps),
            settings=metapl.scheduled_settings(cosine, steps),
        )
        for number in range(DESCENTS + 1):
            gradient = metapl.hypergradient(
                weights,
                self.student,
                outer=self.data.clean,
                inner=training,
                mode=self.mode(self.seed * DESCENTS + number) if number < DESCENTS else "none",
                problem=problem,
                inner_optimizer=optimizer,
            )
            with torch.no_grad():
                weights.values -= self.config["teacher_lr"] * gradient.grads["values"].sign()
        self.student.load_state_dict(gradient.student_params)

    def _plain(self) -> None:
        clean_x, clean_labels = self.data.clean
        noisy_x, noisy_labels, _ = self.noisy
        best = -1.0
        best_weights: dict[str, Tensor] = {}
        copies = int(self.config.get("clean_weight", 0))
        pools = {
            "both": (
                torch.cat([noisy_x, *[clean_x] * copies]),
                torch.cat([noisy_labels, *[clean_labels] * copies]),
            ),
            "clean": (clean_x, clean_labels),
            "noisy": (noisy_x, noisy_labels),
        }
        pool = pools[self.entry.problem]

        def earliest(step: int, row: dict[str, float], trainer: Any) -> None:
            """Keep the weights where the accuracy on the handful was best, the latest of equals."""
            nonlocal best, best_weights
            accuracy = self.accuracy("clean")
            if accuracy >= best:
                best = accuracy
                state = self.student.state_dict()
                best_weights = {name: t.detach().clone() for name, t in state.items()}

        stopping: dict[str, Any] = {}
        if self.method == "early_stopping":
            stopping = {"log_every": CHECKED_EVERY, "callbacks": [earliest]}
        self.supervised(pool, 0, self.size.steps, self.config["student_lr"], **stopping)
        if best_weights:
            self.student.load_state_dict(best_weights)

    @torch.no_grad()
    def accuracy(self, part: str) -> float:
        x, y = getattr(self.data, part)
        return float((self.student(x).argmax(1) == y).double().mean())

    @torch.no_grad()
    def doubts(self) -> dict[str, Tensor]:
        """Return the doubts of each noisy example.

        They are the student's loss on its given label, and what the teacher has learned: a low
        weight, or the probability that the label is wrong.
        """
        x, labels, index = self.noisy
        z = self.student(x)
        of_label = torch.arange(len(x)), labels
        doubts = {"auc_by_loss": F.cross_entropy(z, labels, reduction="none")}
        if isinstance(self.teacher, WeightNet):
            doubts["auc"] = -self.teacher(doubts["auc_by_loss"])
        elif isinstance(self.teacher, Corrector):
            doubts["auc"] = 1 - self.teacher(x, labels).softmax(-1)[of_label]
        elif isinstance(self.teacher, Table) and self.teacher.values.ndim == 1:
            doubts["auc"] = -self.teacher(index)
        elif isinstance(self.teacher, Table):
            # This is 1 - p_k M_kk / Σ_j p_j M_jk.
            joint = z.softmax(-1) * self.teacher().softmax(-1).T[labels]
            doubts["auc"] = 1 - joint[of_label] / joint.sum(1)
        return doubts


def auc(wrong: Tensor, doubt: Tensor) -> float | None:
    """Return the probability that a wrong label is doubted more than a right one.

    Return None where all are right.
    """
    from sklearn.metrics import roc_auc_score

    return None if not wrong.any() else round(float(roc_auc_score(wrong, doubt)), 4)


def one_run(method: str, config: Config, final: bool, condition: str, seed: int, size: Size) -> Row:
    """Run once; tuning runs read the validation images, final runs the test images."""
    since = time.perf_counter()
    run = Run(method, config, condition, seed, size)
    row = Row()
    run.train()
    if final:
        row |= {name: auc(run.data.wrong, doubt) for name, doubt in run.doubts().items()}
        row[STUDENT] = run.accuracy("test")
        # On the handful, after whatever method.
        run.supervised(run.data.clean, 2, size.finetune_steps, FINETUNE_LR)
        row[FINETUNED] = run.accuracy("test")
    else:
        row["validation_accuracy"] = run.accuracy("validation")
    return row | {"seconds": round(time.perf_counter() - since, 2)}


def chosen(rows: Sequence[Row], method: str, condition: str) -> Config:
    """Return the configuration with the best mean validation accuracy over the tuning seeds.

    Of equals, the first.
    """
    key = {
        "method": method if ENTRIES[method].grid else ENTRIES[method].problem,
        "condition": condition,
        "final": False,
    }
    tuning = (row for row in rows if key.items() <= row.items())
    config: Config = harness.best(tuning, "config", "validation_accuracy")
    return config


def jobs(rows: Sequence[Row], size: Size) -> Iterator[Row]:
    """Yield the tuning of every method where no rows are given, else each on the final seeds.

    Nobody has looked at the final seeds.
    """
    for (name, entry), condition in itertools.product(ENTRIES.items(), CONDITIONS):
        configs = [chosen(rows, name, condition)] if rows else entry.grid[: size.configurations]
        for config, seed in itertools.product(configs, size.seeds if rows else size.tuning_seeds):
            yield {
                "method": name,
                "config": config,
                "final": bool(rows),
                "condition": condition,
                "seed": seed,
            }


Columns = dict[tuple[str, str, str], list[float]]


def columns(rows: Sequence[Row]) -> Columns:
    """Return the figures of final runs by method, condition and read-out, in the seeds' order.

    A key is there where all seeds have a figure.
    """
    final = sorted((row for row in rows if row["final"]), key=lambda row: int(row["seed"]))
    figures: Columns = {}
    for row, name in itertools.product(final, (STUDENT, FINETUNED, "auc", "auc_by_loss")):
        if row.get(name) is not None:
            figures.setdefault((row["method"], row["condition"], name), []).append(float(row[name]))
    seeds = {row["seed"] for row in final}
    return {key: values for key, values in figures.items() if len(values) == len(seeds)}


def mean(values: Sequence[float] | None, scale: float = 100.0) -> str:
    """Return the mean ± standard error."""
    if values is None:
        return NONE
    digits = 1 if scale == 100 else 3
    error = statistics.stdev(values) / math.sqrt(len(values)) if values[1:] else 0.0
    return f"{scale * statistics.fmean(values):.{digits}f} ± {scale * error:.{digits}f}"


def gain(a: Sequence[float] | None, b: Sequence[float] | None) -> str:
    """Return the means' difference in points ± its standard error, and p of the paired t-test."""
    if a is None or b is None:
        return NONE
    test = paired_test(a, b)
    if test.std is None or test.p is None:
        return f"{100 * test.mean:+.1f}"
    p = f"{test.p:.1g}" if test.p < 0.1 else f"{test.p:.2f}"
    return f"{100 * test.mean:+.1f} ± {100 * test.std / math.sqrt(test.n):.1f} ({p})"


def by_condition(
    first: str, lines: Iterable[tuple[str, Callable[[str], str]]], noisy: bool = False
) -> str:
    """Return a table with a title and a function of the condition in each line."""
    named = {
        name: title
        for name, title in CONDITIONS.items()
        if not (noisy and name.startswith("imbalance"))
    }
    return harness.grid(
        [first, *named.values()],
        ([title, *(cell(name) for name in named)] for title, cell in lines),
    )


def block(raw: Path) -> str:
    """Return what stands in the documentation."""
    rows = harness.read(raw, "method")
    figures = columns(rows)
    shown = []
    for name in ENTRIES:
        if all((name, condition, STUDENT) in figures for condition in CONDITIONS):
            shown.append(name)
    titles = {name: ENTRIES[name].title for name in shown}

    def best_plain(condition: str) -> list[float]:
        """Return the plain students' highest mean on the test set, which favors them.

        They may be finetuned or not.
        """
        of_plain = []
        for name, read_out in itertools.product(BASELINES, (STUDENT, FINETUNED)):
            if (values := figures.get((name, condition, read_out))) is not None:
                of_plain.append(values)
        return max(of_plain, key=statistics.fmean)

    # Each row of a table has a function that gives the cell of a condition.
    def mean_of(name: str, read_out: str, scale: float = 100.0) -> Callable[[str], str]:
        return lambda condition: mean(figures.get((name, condition, read_out)), scale)

    def against(first: str, second: str) -> Callable[[str], str]:
        return lambda condition: gain(
            figures.get((first, condition, STUDENT)), figures.get((second, condition, STUDENT))
        )

    def against_best_plain(name: str) -> Callable[[str], str]:
        return lambda condition: gain(
            figures.get((name, condition, FINETUNED)), best_plain(condition)
        )

    def settings_of(name: str) -> Callable[[str], str]:
        return lambda condition: ", ".join(
            f"{key} {value:g}" for key, value in chosen(rows, name, condition).items()
        )

    pairs = []
    for name in BILEVEL:
        for alteration, words in ALTERATIONS.items():
            pairs.append((name, f"{name}_{alteration}", words))
    for name in BILEVEL:
        pairs.append((name, "plain", titles["plain"]))
    for name in ("example_weights", "example_weights_long"):
        pairs.append(("metagradient_descent", name, titles[name]))

    with_noise = [name for name in CONDITIONS if not name.startswith("imbalance")]
    readings = {"auc": "by what it learned about labels", "auc_by_loss": "by its student's loss"}
    detected = []
    for name in shown:
        for reading, words in readings.items():
            if all((name, condition, reading) in figures for condition in with_noise):
                detected.append((f"{titles[name]}, {words}", mean_of(name, reading, 1.0)))
    tuned = [(entry.title, settings_of(name)) for name, entry in ENTRIES.items() if entry.grid]

    heads = {STUDENT: "student", FINETUNED: "student, finetuned on the handful"}
    tables = []
    for read_out, head in heads.items():
        lines = [(titles[name], mean_of(name, read_out)) for name in shown]
        tables.append(by_condition(head, lines))
    lines = [(f"{titles[a]} − {words}", against(a, b)) for a, b, words in pairs]
    tables.append(by_condition("student against student", lines))
    lines = [(titles[name], against_best_plain(name)) for name in BILEVEL]
    tables.append(by_condition("finetuned student against the best plain read-out", lines))
    tables.append(by_condition("AUC", detected, noisy=True))
    tables.append(by_condition("chosen", tuned))

    (row,) = harness.read(raw, "costs")[-1:] or [{"costs": {}}]
    costs = []
    for name, seconds in row["costs"].items():
        over_plain = seconds / row["costs"]["plain"]
        costs.append([ENTRIES[name].title, f"{seconds:.1f}", f"{over_plain:.1f}"])
    if costs:
        head_of_costs = ["cost", "processor time, s", "over plain training"]
        tables.append(harness.grid(head_of_costs, costs))
    return "\n\n".join(tables)


def draw(path: Path, figures: Columns) -> None:
    """Draw how far a method's own feedback is above altered feedback, a panel a condition."""
    panels = {}
    for condition, title in CONDITIONS.items():
        bars = []
        for name in BILEVEL:
            for alteration, color in zip(ALTERATIONS, (BLUE, GREEN), strict=True):
                unaltered = figures.get((name, condition, STUDENT))
                altered = figures.get((f"{name}_{alteration}", condition, STUDENT))
                if unaltered and altered:
                    label = f"{ENTRIES[name].title} − {alteration.replace('_', ' ')}"
                    bars.append(Bar(label, unaltered, altered, color))
        panels[title] = bars
    gains = []
    for condition in CONDITIONS:
        unaltered = figures["example_weights", condition, STUDENT]
        permuted = figures["example_weights_permuted", condition, STUDENT]
        gains.append(100 * paired_test(unaltered, permuted).mean)
    heading = (
        f"Learned weights (ExampleWeights): their own feedback is {min(gains):+.1f} to "
        f"{max(gains):+.1f} points above feedback given to the wrong examples"
    )
    harness.bars(path, panels, heading, "points of the student's test accuracy, 95 %", columns=2)


def main() -> None:
    args = harness.parsed(harness.arguments(__doc__, RAW))
    torch.set_num_threads(1)
    if args.runs:
        size = MINIATURE if args.miniature else FULL
        run = partial(one_run, size=size)
        about = {"made_with": harness.environment(), **dataclasses.asdict(size)}
        harness.go_on(args.out, jobs([], size), run, **about)
        harness.go_on(args.out, jobs(harness.read(args.out, "method"), size), run, **about)
    harness.show(args.write, "label_noise", block(args.out))
    if args.write:
        draw(
            harness.figure_of(args.write, f"{args.out.stem}.png"),
            columns(harness.read(args.out, "method")),
        )


if __name__ == "__main__":
    main()
