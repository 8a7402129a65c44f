"""Trainings of seconds on real data, beside the loop without feedback and plain training.

A *row* is a mode in a loop. Three seeds draw data, batches, first weights and sampled labels anew.
A row is red if, in the mean of its seeds, a network is at chance, or if the student is five points
behind one of its two controls, or the teacher behind the teacher without feedback. Both controls
take the same batches and the same optimizers from the same first weights; the loop without feedback
gives its student the same kind of labels, soft or sampled, as the mode does. That loop is a row
too, beside plain training; where it is red, the modes in it are held against it alone. ``python
tests/outcomes/outcome_table.py`` prints how far each row is from red.
"""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn

import metapl
from metapl.feedback import estimator
from metapl.guards.verification import VerificationWarning
from metapl.models import mlp
from metapl.training.trainer import default_optimizer

SEEDS = (0, 1, 2)
MOST_BEHIND = 0.05
"""How far below a control the mean of the seeds may be, and how far above chance it has to be."""

# --------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Split:
    """The examples of one seed. Nothing that trains reads the labels of the unlabeled ones."""

    labeled_inputs: Tensor
    labels: Tensor
    unlabeled_inputs: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.test_labels.max()) + 1

    @property
    def chance(self) -> float:
        """Return the share of the most frequent class among the test examples."""
        return float(self.test_labels.bincount().max()) / len(self.test_labels)


def pixels(inputs: Tensor) -> Tensor:
    """Scale the levels of scikit-learn's digits, 0 to 16, to [0, 1]."""
    return inputs / 16


def standardized(inputs: Tensor) -> Tensor:
    """Give each column the mean 0 and the deviation 1."""
    return (inputs - inputs.mean(0)) / inputs.std(0)


@dataclass(frozen=True)
class DataSet:
    """A data set of scikit-learn, its columns' scale, and its unlabeled and test rows' numbers."""

    load: Callable[[], Any]
    scaled: Callable[[Tensor], Tensor]
    unlabeled: int
    test: int


DATA_SETS = {
    "digits": DataSet(load_digits, pixels, unlabeled=1200, test=400),
    "wine": DataSet(load_wine, standardized, unlabeled=80, test=68),
    "breast_cancer": DataSet(load_breast_cancer, standardized, unlabeled=300, test=200),
}


@cache
def split_of(data: str, labeled: int, seed: int) -> Split:
    """Draw the examples of a seed, the same number of labeled ones from each class."""
    data_set = DATA_SETS[data]
    bunch = data_set.load()
    labels = torch.tensor(bunch.target)
    inputs = data_set.scaled(torch.tensor(bunch.data, dtype=torch.float32))
    classes = int(labels.max()) + 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    labeled_rows = torch.cat(
        [order[labels[order] == label][: labeled // classes] for label in range(classes)]
    )
    other_rows = order[~torch.isin(order, labeled_rows)]
    unlabeled_rows = other_rows[: data_set.unlabeled]
    test_rows = other_rows[data_set.unlabeled :][: data_set.test]
    return Split(
        labeled_inputs=inputs[labeled_rows],
        labels=labels[labeled_rows],
        unlabeled_inputs=inputs[unlabeled_rows],
        test_inputs=inputs[test_rows],
        test_labels=labels[test_rows],
    )


def batches_of_rows(count: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """Return the rows of each step's batch, from an endless stream of shuffled epochs.

    A batch may span several.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-batch * steps // count)
    stream = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return list(stream[: batch * steps].split(batch))


# ---------------------------------------------------------------------------------------- the loops

Optimizers = torch.optim.Optimizer | tuple[torch.optim.Optimizer, ...]


def muon(network: nn.Module) -> Optimizers:
    """Return Muon for the matrices and AdamW for the rest, at the rates of Muon's authors."""
    matrices = [p for p in network.parameters() if p.ndim == 2]
    others = [p for p in network.parameters() if p.ndim != 2]
    return torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=1e-3)


def sgd(rate: float) -> Callable[[nn.Module], Optimizers]:
    """Return the trainer's default optimizer at another rate."""

    def optimizer(network: nn.Module) -> Optimizers:
        return torch.optim.SGD(
            network.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )

    return optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizers]] = {
    "default": default_optimizer,
    "SGD 0.3": sgd(0.3),
    "Adam 1e-3": lambda network: torch.optim.Adam(network.parameters(), lr=1e-3),
    "AdamW 1e-3": lambda network: torch.optim.AdamW(network.parameters(), lr=1e-3),
    "AdamW 1e-2": lambda network: torch.optim.AdamW(network.parameters(), lr=1e-2),
    "Muon": muon,
}


@dataclass(frozen=True)
class Loop:
    """All that a training has in common with its controls.

    Args:
        data: a name of :data:`DATA_SETS`.
        labeled: how many examples have a label.
        unlabeled_batch: unlabeled examples in a batch; a labeled one has 64.
        optimizer: a name of :data:`OPTIMIZERS`, for both networks.
        way: by ``fit``, whose schedule lowers the rates to 0, or by ``step`` in a plain loop at
            constant rates.
        noise: standard deviation of the noise in a second view of the unlabeled examples; None: one
            view.
        steps: of either network.
    """

    data: str = "digits"
    labeled: int = 100
    unlabeled_batch: int = 128
    optimizer: str = "default"
    way: Literal["fit", "step"] = "fit"
    noise: float | None = None
    steps: int = 300

    @property
    def title(self) -> str:
        views = "" if self.noise is None else ", two views"
        batches = f"batches of {self.unlabeled_batch}{views}"
        return (
            f"{self.data} {self.labeled}, {batches}, {self.optimizer}, {self.steps} steps by "
            f"{self.way}"
        )

    def split(self, seed: int) -> Split:
        return split_of(self.data, self.labeled, seed)

    def labeled_batches(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        split = self.split(seed)
        rows = batches_of_rows(len(split.labels), 64, self.steps, seed=1000 * seed + 1)
        return [(split.labeled_inputs[batch], split.labels[batch]) for batch in rows]

    def unlabeled_batches(self, seed: int) -> list[Any]:
        """Return the inputs of each step; with a noise, pairs of them as they are and with it."""
        split = self.split(seed)
        rows = batches_of_rows(
            len(split.unlabeled_inputs), self.unlabeled_batch, self.steps, seed=1000 * seed + 2
        )
        batches = [split.unlabeled_inputs[batch] for batch in rows]
        if self.noise is None:
            return batches
        generator = torch.Generator().manual_seed(1000 * seed + 3)
        return [(x, x + self.noise * torch.randn(x.shape, generator=generator)) for x in batches]

    def network(self, seed: int) -> nn.Module:
        split = self.split(seed)
        return mlp([split.labeled_inputs.shape[1], 64, split.classes])


@dataclass(frozen=True)
class Row:
    """A mode, by its name or as an estimator, in a loop.

    Args:
        mode: as :class:`metapl.BilevelTrainer` takes it.
        loop: what it shares with its controls.
        hard: whether a mode that takes both kinds of labels gets sampled ones.
        feedback_weight: as the trainer takes it; None: its default.
    """

    mode: str | metapl.feedback.Estimator
    loop: Loop = Loop()
    hard: bool = False
    feedback_weight: float | None = None

    @property
    def estimator(self) -> metapl.feedback.Estimator:
        return estimator(self.mode)

    @property
    def labels(self) -> Literal["soft", "hard"]:
        """Return the kind of labels that the student learns from."""
        return "hard" if self.hard or "soft" not in self.estimator.labels else "soft"

    @property
    def title(self) -> str:
        words = [self.mode if isinstance(self.mode, str) else call_of(self.mode)]
        if self.hard:
            words.append("hard labels")
        if self.feedback_weight is not None:
            words.append(f"weight {self.feedback_weight:g}")
        return f"{', '.join(words)}: {self.loop.title}"


def call_of(value: metapl.feedback.Estimator) -> str:
    """Return the call that makes an estimator, with the arguments that are not the defaults.

    >>> call_of(metapl.feedback.Reinforce(similarity="cosine", baseline=0.99))
    "Reinforce(similarity='cosine', baseline=0.99)"
    """
    arguments: list[str] = []
    for field in dataclasses.fields(value):
        argument = getattr(value, field.name)
        if argument != field.default:
            arguments.append(f"{field.name}={argument!r}")
    return f"{type(value).__name__}({', '.join(arguments)})"


# ------------------------------------------------------------------------------------- the outcomes


@dataclass(frozen=True)
class Outcome:
    """The test accuracies of both networks, one a seed."""

    students: tuple[float, ...]
    teachers: tuple[float, ...]

    @property
    def student(self) -> float:
        return statistics.fmean(self.students)

    @property
    def teacher(self) -> float:
        return statistics.fmean(self.teachers)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, for rounding depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def accuracy(network: nn.Module, split: Split) -> float:
    """Return the share of test examples that the network, in eval mode, has right."""
    network.eval()
    return float((network(split.test_inputs).argmax(1) == split.test_labels).double().mean())


def keep_silent(text: str) -> None:
    """Show no message of a fit: what went wrong is seen in the accuracies."""


def trained(row: Row, seed: int) -> tuple[nn.Module, nn.Module]:
    """Return the teacher and the student after the loop.

    What a first call leaves open is left open here.
    """
    loop = row.loop
    torch.manual_seed(seed)
    teacher = loop.network(seed)
    student = loop.network(seed)
    options: dict[str, Any] = {}
    if loop.optimizer != "default":
        options["inner_optimizer"] = OPTIMIZERS[loop.optimizer](student)
        options["outer_optimizer"] = OPTIMIZERS[loop.optimizer](teacher)
    if row.labels not in row.estimator.labels[:1]:
        options["problem"] = metapl.PseudoLabels(kind=row.labels)
    if row.feedback_weight is not None:
        options["feedback_weight"] = row.feedback_weight
    trainer = metapl.BilevelTrainer(teacher, student, mode=row.mode, **options)
    labeled = loop.labeled_batches(seed)
    unlabeled = loop.unlabeled_batches(seed)
    with warnings.catch_warnings():
        # Three iterations leave a residual of about 1 %: the accuracies show whether they do.
        warnings.filterwarnings("ignore", "allowed", VerificationWarning)
        if loop.way == "fit":
            trainer.fit(labeled, unlabeled, steps=loop.steps, progress=False, say=keep_silent)
        else:
            for labeled_batch, unlabeled_batch in zip(labeled, unlabeled, strict=True):
                trainer.step(labeled_batch, unlabeled_batch)
    return teacher, student


def outcome_of(row: Row) -> Outcome:
    """Train once for each seed, and test."""
    students: list[float] = []
    teachers: list[float] = []
    with one_thread():
        for seed in SEEDS:
            teacher, student = trained(row, seed)
            students.append(accuracy(student, row.loop.split(seed)))
            teachers.append(accuracy(teacher, row.loop.split(seed)))
    return Outcome(tuple(students), tuple(teachers))


@cache
def without_feedback(loop: Loop, labels: Literal["soft", "hard"]) -> Outcome:
    """Return the outcome of the same loop with ``mode="none"``, once for all its rows."""
    return outcome_of(Row("none", loop, hard=labels == "hard"))


@cache
def on_trusted(loop: Loop) -> tuple[float, ...]:
    """Return the accuracies of a network that learns from the labeled batches alone."""
    accuracies: list[float] = []
    with one_thread():
        for seed in SEEDS:
            torch.manual_seed(seed)
            network = loop.network(seed)
            trainer = metapl.LossTrainer(network, optimizer=OPTIMIZERS[loop.optimizer](network))
            labeled = loop.labeled_batches(seed)
            if loop.way == "fit":
                trainer.fit(labeled, steps=loop.steps, progress=False, say=keep_silent)
            else:
                for batch in labeled:
                    trainer.step(batch)
            accuracies.append(accuracy(network, loop.split(seed)))
    return tuple(accuracies)


# -------------------------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Comparison:
    """A mean accuracy, and the least that it may be."""

    what: str
    accuracy: float
    control: float
    least: float

    @property
    def margin(self) -> float:
        """Return how far the accuracy is above the least one; a red row has a negative margin."""
        return self.accuracy - self.least

    def __str__(self) -> str:
        return f"{self.what}: {100 * self.accuracy:.1f} beside {100 * self.control:.1f}"


def above_chance(what: str, accuracy: float, chance: float) -> Comparison:
    return Comparison(f"{what} and chance", accuracy, control=chance, least=chance + MOST_BEHIND)


def near(what: str, accuracy: float, control: float) -> Comparison:
    return Comparison(what, accuracy, control=control, least=control - MOST_BEHIND)


def comparisons(row: Row) -> Iterator[Comparison]:
    """Train, and yield what the row is held against.

    The controls are trained where they are asked for.
    """
    outcome = without_feedback(row.loop, row.labels) if row.mode == "none" else outcome_of(row)
    chance = statistics.fmean(row.loop.split(seed).chance for seed in SEEDS)
    yield above_chance("student", outcome.student, chance)
    yield above_chance("teacher", outcome.teacher, chance)
    control = without_feedback(row.loop, row.labels)
    yield near("student and the student without feedback", outcome.student, control.student)
    yield near("teacher and the teacher without feedback", outcome.teacher, control.teacher)
    plain = statistics.fmean(on_trusted(row.loop))
    # Where the loop without feedback is behind already, that is for its own row to say: the
    # feedback has no part in it.
    if row.mode == "none" or control.student >= plain - MOST_BEHIND:
        yield near("student and plain training on the labeled examples", outcome.student, plain)


def check_all(compared: Iterable[Comparison]) -> None:
    """Assert that nothing is at chance or behind.

    What passes is printed too: ``pytest -rP`` shows it.
    """
    for comparison in compared:
        print(comparison)
        assert comparison.margin >= 0, str(comparison)


def check(row: Row) -> None:
    """Assert that a training comes out."""
    check_all(comparisons(row))


def controls(loops: Iterable[Loop]) -> list[Row]:
    """Return the rows without feedback of these loops, by soft and by sampled labels."""
    return [Row("none", loop, hard=hard) for loop in loops for hard in (False, True)]


def marked(
    quick: list[Row], long: list[Row], red: Mapping[Row, str] = MappingProxyType({})
) -> list[Any]:
    """Return the rows as parameters of a test, those of the second list marked ``long``.

    Those that are red, which is known and has a reason, are expected failures.
    """
    parameters = [pytest.param(row, id=row.title) for row in quick]
    for row in long:
        marks = [pytest.mark.long]
        if row in red:
            marks.append(pytest.mark.xfail(reason=red[row], raises=AssertionError, strict=True))
        parameters.append(pytest.param(row, id=row.title, marks=marks))
    return parameters
