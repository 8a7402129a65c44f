"""What a fit says where it goes wrong, and that it says nothing where it does not.

By real trainings on digits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import _one_thread  # noqa: F401  # used by every test
from sklearn.datasets import load_digits
from torch import Tensor, nn

import metapl
from metapl.data.columns import advice_on_columns
from metapl.feedback import NoFeedback, Reinforce
from metapl.guards.outcomes import Outcomes
from metapl.metrics import evaluate_logits
from metapl.models import mlp
from metapl.problems import ExampleWeights, Table
from metapl.training.loss_trainer import LossTrainer
from metapl.training.options import FitOptions
from metapl.training.selection import FAR_BEHIND

LABELED = slice(0, 100)
VALIDATION = slice(1400, 1797)


@cache
def digits() -> tuple[Tensor, Tensor]:
    data_set = load_digits()
    order = torch.randperm(len(data_set.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data_set.data / 16, dtype=torch.float32)
    y = torch.tensor(data_set.target)
    return x[order], y[order]


def sgd(network: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, nesterov=True)


def trained(
    mode: Any = "forward",
    *,
    teacher_lr: float = 0.05,
    student_lr: float = 0.05,
    fit: Any = None,
    **options: Any,
) -> tuple[list[str], Any, metapl.BilevelTrainer]:
    """Return what a fit on the digits says, what it ends with, and its trainer."""
    x, y = digits()
    texts: list[str] = []
    torch.manual_seed(0)
    teacher = mlp([64, 64, 10])
    student = mlp([64, 64, 10])
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        inner_optimizer=sgd(student, student_lr),
        outer_optimizer=sgd(teacher, teacher_lr),
        verify=False,
        **options,
    )
    fit_options = {
        "steps": 200,
        "batch_size": 64,
        "validation": (x[VALIDATION], y[VALIDATION]),
        "validate_every": 50,
        "log_every": 10,
        "progress": False,
        "say": texts.append,
        **(fit or {}),
    }
    result = trainer.fit((x[LABELED], y[LABELED]), x[100:1400], **fit_options)
    return texts, result, trainer


def weighed(rate: Callable[[nn.Module], torch.optim.Optimizer], **fit_options: Any) -> list[str]:
    """Return what a fit says that learns a weight for each of 1,300 examples.

    40 % of the labels are wrong.
    """
    x, y = digits()
    texts: list[str] = []
    torch.manual_seed(0)
    is_wrong = torch.rand(1300) < 0.4
    labels = torch.where(is_wrong, torch.randint(0, 10, (1300,)), y[100:1400])
    table = Table(torch.zeros(1300))
    student = mlp([64, 64, 10])
    trainer = metapl.BilevelTrainer(
        table,
        student,
        problem=ExampleWeights(),
        inner_optimizer=sgd(student, 0.05),
        outer_optimizer=rate(table),
        verify=False,
    )
    options = {
        "steps": 200,
        "batch_size": 64,
        "log_every": 10,
        "progress": False,
        "say": texts.append,
        **fit_options,
    }
    trainer.fit((x[LABELED], y[LABELED]), (x[100:1400], labels, torch.arange(1300)), **options)
    return texts


# A feedback that is thousands of times what the teacher learns from its own losses.
COLLAPSES: dict[str, Any] = {
    "mode": Reinforce(similarity="cosine", baseline=0.99, reduction="sum"),
    "feedback_weight": 100.0,
}


# ---------------------------------------------------------------------- what goes well says nothing


@pytest.mark.parametrize("mode", ["forward", "none", "reinforce_per_example", "difference"])
def test_a_training_that_comes_out_says_nothing(mode: str) -> None:
    texts, result, _ = trained(mode)
    assert result.value > 0.8
    assert texts == []


@pytest.mark.parametrize(
    "fit",
    [
        {"warmup": 80},
        {"wait": 100, "warm_start": True},
        {"wait": 100, "warmup": 50},
        {"ema_decay": 0.99},
        {"steps": 80, "log_every": 1, "validate_every": 1},
    ],
    ids=str,
)
def test_schedules_say_nothing(fit: Any) -> None:
    assert trained(fit=fit)[0] == []


def test_a_teacher_that_is_to_stay_says_nothing() -> None:
    """Without feedback and losses, frozen, or at a rate of 0."""
    assert trained("none", teacher_losses=(), fit={"validation": None})[0] == []
    frozen = {"feedback_weight": 0.0, "teacher_losses": ()}
    for options in ({"teacher_lr": 0.0}, frozen):
        assert trained(fit={"validation": None}, **options)[0] == []


def test_few_examples_in_a_batch_are_no_collapse() -> None:
    """The labels of four examples are often of one or two classes."""
    assert trained(fit={"batch_size": 4, "log_every": 1, "steps": 300})[0] == []


def test_classes_of_different_sizes_are_no_collapse() -> None:
    """Of 95 % in one class, all labels of a batch are often of that one.

    Naming it alone is a stage of the training.
    """
    x, y = digits()
    texts: list[str] = []
    rare = (y == 0) & (torch.arange(len(y)) % 2 == 0)
    torch.manual_seed(0)
    teacher = mlp([64, 64, 2])
    student = mlp([64, 64, 2])
    trainer = metapl.BilevelTrainer(teacher, student, verify=False)
    labels = rare.long()
    held_out = x[VALIDATION], labels[VALIDATION]
    trainer.fit(
        (x[:300], labels[:300]),
        x[300:1400],
        steps=300,
        batch_size=32,
        log_every=1,
        validation=held_out,
        validate_every=25,
        progress=False,
        say=texts.append,
    )
    assert not [text for text in texts if "collapsed" in text]


def test_adam_moves_a_table() -> None:
    assert weighed(lambda table: torch.optim.Adam(table.parameters(), lr=0.1)) == []
    assert weighed(lambda table: torch.optim.Adam(table.parameters(), lr=0.1), warmup=100) == []


# ----------------------------------------------------------------------------- what goes wrong does


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_a_feedback_that_does_nothing_is_said_once(mode: str) -> None:
    """The teacher of a feedback a million times smaller than its own losses learns as without."""
    texts, result, _ = trained(mode, feedback_weight=1e-5, fit={"steps": 100, "validate_every": 20})
    (warning,) = result.warnings
    assert texts == [f"warning: {warning}"]
    assert "the feedback does nothing" in warning
    assert "give feedback_weight=" in warning
    assert ("reinforce_per_example" in warning) == (mode == "reinforce")


def test_the_weight_that_is_proposed_gives_a_tenth() -> None:
    _, result, _ = trained(feedback_weight=1e-5, fit={"steps": 100})
    (warning,) = result.warnings
    (proposed,) = re.findall(r"feedback_weight=([0-9.e+-]+),", warning)
    _, again, _ = trained(feedback_weight=float(proposed), fit={"steps": 100})
    ratios = [row["feedback_ratio"] for row in again.history]
    assert 0.02 < sum(ratios) / len(ratios) < 0.5
    assert again.warnings == ()


def test_a_student_that_dies_is_said_with_its_remedy() -> None:
    texts, _, _ = trained(student_lr=300.0)
    (collapse,) = [text for text in texts if "the student's predictions have collapsed" in text]
    assert "lower its learning rate" in collapse
    (chance,) = [text for text in texts if "the student is at chance" in text]
    assert "lower its learning rate" in chance


def test_labels_that_collapse_are_said_with_their_remedy(
    collapsed: tuple[list[str], Any],
) -> None:
    texts, _ = collapsed
    (collapse,) = [text for text in texts if "the teacher's labels have collapsed" in text]
    assert "leave out feedback_weight" in collapse
    (chance,) = [text for text in texts if "the teacher is at chance" in text]
    assert "leave out feedback_weight" in chance


def test_a_network_on_its_own_is_looked_at_too() -> None:
    x, y = digits()
    texts: list[str] = []
    torch.manual_seed(0)
    network = mlp([64, 64, 10])
    trainer = LossTrainer(network, optimizer=sgd(network, 100.0))
    options: Any = {
        "steps": 60,
        "batch_size": 64,
        "progress": False,
        "say": texts.append,
        "validate_every": 20,
    }
    trainer.fit((x[LABELED], y[LABELED]), validation=(x[VALIDATION], y[VALIDATION]), **options)
    (line,) = texts
    assert line.startswith("warning: the network is at chance on the validation data after step ")


def test_a_table_that_stays_is_said_with_a_rule_that_moves_it() -> None:
    (line,) = weighed(lambda table: sgd(table, 0.05))
    # The student learns the labels as they are for the first 20 steps; the table begins then.
    assert "have hardly moved after 40 steps" in line
    assert "outer_optimizer=torch.optim.Adam(teacher.parameters(), lr=0.1)" in line


def test_a_network_that_stays_is_said() -> None:
    texts, _, _ = trained(teacher_lr=1e-7, fit={"validation": None})
    (line,) = [text for text in texts if "hardly moved" in text]
    assert "lr=1e-3" in line


def watched(texts: list[str], **options: Any) -> Outcomes:
    teacher = mlp([64, 10])
    student = mlp([64, 10])
    trainer = metapl.BilevelTrainer(teacher, student, feedback_weight=1.0, verify=False)
    return Outcomes(trainer, FitOptions(steps=100, **options), texts.append)


def test_a_feedback_that_decides_alone_is_said_in_the_third_row() -> None:
    texts: list[str] = []
    outcomes = watched(texts)
    for step, ratio in enumerate([11.0, 30.0, 9.0, 12.0, 500.0], 1):
        outcomes.recorded(
            step, {"feedback_ratio": ratio, "outer_lr": 0.0}, examples=64, outer_examples=64
        )
    assert texts == []
    outcomes.recorded(6, {"feedback_ratio": 57.3}, examples=64, outer_examples=64)
    outcomes.recorded(7, {"feedback_ratio": 60.0}, examples=64, outer_examples=64)
    (line,) = texts
    assert "the feedback's gradient is 57 times that of the teacher's own losses at step 6" in line
    assert line.endswith("leave out feedback_weight, or give feedback_bound=0.1")


def test_a_feedback_that_decides_alone_is_said_by_a_fit() -> None:
    # A teacher that hardly moves, so that no machine's rounding leads it elsewhere.
    texts, result, _ = trained(
        Reinforce(similarity="cosine", baseline=0.99, reduction="sum"),
        feedback_weight=1000.0,
        teacher_lr=1e-6,
    )
    assert all("feedback_ratio" in row for row in result.history if "inner_loss" in row)
    assert len([text for text in texts if "times that of the teacher's own losses" in text]) == 1


def test_guessing_is_said_at_the_second_time_or_at_the_end() -> None:
    labels = torch.arange(100) % 10
    guesses = torch.zeros(100, 10)
    knows = nn.functional.one_hot(labels, 10).float()
    at_chance = evaluate_logits(guesses, labels)
    good = evaluate_logits(knows, labels)
    for reached, steps in [
        # At chance so early in a training says nothing.
        ((at_chance,) * 5 + (good,) * 5, []),
        ((good,) * 10, []),
        ((good,) * 5 + (at_chance, good, at_chance, good, good), []),
        ((good,) * 6 + (at_chance, at_chance), [80]),
        ((good,) * 9 + (at_chance,), [100]),
    ]:
        texts: list[str] = []
        outcomes = watched(texts, warmup=10)
        for number, measured in enumerate(reached, 1):
            outcomes.validated(10 * number, "student", measured)
        assert len(texts) == len(steps)
        assert all(f"after step {step}," in text for step, text in zip(steps, texts, strict=True))


@pytest.mark.parametrize("unit", [1.0, 1e4])
def test_columns_of_other_units_are_named_where_a_network_guesses(unit: float) -> None:
    x, y = digits()
    table = x.clone()
    # A measurement in another unit, beside pixels of which those at the edge hardly move.
    table[:, 20] *= unit
    texts: list[str] = []
    at_chance = evaluate_logits(torch.zeros(len(y), 10), y)
    advice = partial(advice_on_columns, [table[:100], table[100:]])
    watched(texts).validated(100, "student", at_chance, advice)
    (text,) = texts
    assert ("scale the columns of the inputs" in text) == (unit > 1)
    (of_fit,) = warnings_of_guessing(table)
    assert ("scale the columns of the inputs" in of_fit) == (unit > 1)


class Guess(nn.Module):
    """Logits that are the same for all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), 10)


def warnings_of_guessing(x: Tensor) -> Sequence[str]:
    """Return the warnings of a fit whose network guesses."""
    _, y = digits()
    network = Guess()
    trainer = LossTrainer(network, optimizer=sgd(network, 1e-3))
    data = [(x[:100], y[:100])]
    return trainer.fit(data, steps=20, validation=(x, y), progress=False).warnings


# ---------------------------------------------------------------------------------------- a resumed


class Stops:
    """A callback that ends a fit after so many steps, without a checkpoint of them."""

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step

    def __call__(self, step: int, row: Any, trainer: Any) -> None:
        if step == self.last_step:
            raise KeyboardInterrupt


def fit_in(out: Path, *callbacks: Any, resume: bool = False) -> tuple[list[str], Any]:
    """Return what a fit that collapses says, and its result, or None where a callback stops it."""
    texts: list[str] = []
    options = {
        "save_every": 10,
        "out": str(out),
        "resume": resume,
        "callbacks": callbacks,
        "say": texts.append,
    }
    try:
        _, result, _ = trained(**COLLAPSES, fit=options)
    except KeyboardInterrupt:
        return texts, None
    return texts, result


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Any]:
    """Return what a fit that collapses says that nobody stops, and its result."""
    return fit_in(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("last_step", [30, 110, 160])
def test_a_resumed_fit_says_the_same_and_nothing_twice(
    collapsed: tuple[list[str], Any], tmp_path: Path, last_step: int
) -> None:
    uninterrupted, expected = collapsed
    assert len(uninterrupted) >= 3
    until_stop, stopped = fit_in(tmp_path / "stopped", Stops(last_step))
    assert stopped is None
    texts, result = fit_in(tmp_path / "stopped", resume=True)
    since_checkpoint = [text for text in texts if not text.startswith("resumed")]
    # What was said in a step that was not saved is said when the step is taken again.
    until_checkpoint = until_stop[: len(uninterrupted) - len(since_checkpoint)]
    assert until_checkpoint + since_checkpoint == uninterrupted
    for name, weights in (expected.teacher_weights or {}).items():
        assert torch.equal(weights, result.teacher_weights[name])
    for name, weights in expected.weights.items():
        assert torch.equal(weights, result.weights[name])


# ------------------------------------------------------------------------ a teacher that was better


# The teacher learns, and forgets when the feedback comes.
LATE: dict[str, Any] = {"wait": 100, "validate_every": 10}


def test_a_teacher_that_ends_far_behind_itself_is_kept_as_it_was() -> None:
    texts, result, trainer = trained(**COLLAPSES, fit=LATE)
    accuracies = {row["step"]: row.get("teacher_validation_accuracy") for row in result.history}
    best = max(value for value in accuracies.values() if value is not None)
    assert best - accuracies[200] >= FAR_BEHIND
    (line,) = [text for text in texts if "the teacher is kept as it was after step" in text]
    assert f"with {best:.1%} on the validation data" in line
    x, y = digits()
    assert trainer.teacher is not None
    reached = evaluate_logits(trainer.teacher(x[VALIDATION]), y[VALIDATION]).accuracy
    assert reached == pytest.approx(best)
    assert all(
        torch.equal(t, result.teacher_weights[name])
        for name, t in trainer.teacher.state_dict().items()
    )


@pytest.mark.parametrize("options", [{"select": False}, {"metric": "loss"}], ids=str)
def test_without_selection_by_accuracy_the_last_teacher_is_kept(options: dict[str, Any]) -> None:
    texts, _, _ = trained(**COLLAPSES, fit={**LATE, **options})
    assert not [text for text in texts if "is kept as it was" in text]


def test_a_teacher_that_ends_a_little_behind_itself_is_the_last_one() -> None:
    """Bit for bit as without validation.

    Looking chooses among teachers only where one has collapsed.
    """
    _, result, _ = trained(NoFeedback())
    _, blind, _ = trained(NoFeedback(), fit={"validation": None})
    assert all(
        torch.equal(t, blind.teacher_weights[name]) for name, t in result.teacher_weights.items()
    )


def test_a_network_that_tells_classes_of_other_sizes_apart_does_not_guess() -> None:
    """A student that learned from as many labels of each class.

    It is right less often than one that always names the largest class.
    """
    labels = torch.tensor([0] * 80 + [1] * 10 + [2] * 10)
    predicted = labels.clone()
    predicted[:30] = 1
    predicted[85:90] = 0
    largest = torch.zeros_like(labels)
    for answers, says in ((predicted, False), (largest, True)):
        texts: list[str] = []
        measured = evaluate_logits(5.0 * nn.functional.one_hot(answers, 3), labels)
        assert measured.accuracy <= measured.chance
        watched(texts).validated(100, "student", measured)
        assert bool(texts) == says


@pytest.mark.parametrize("threshold", [0.99, 0.0])
def test_consistency_without_a_sure_example_is_said(threshold: float) -> None:
    x, y = digits()
    losses = (metapl.CrossEntropy(), metapl.UDA(threshold=threshold))
    network = mlp([64, 64, 10])
    rate = sgd(network, 1e-3)
    student = mlp([64, 64, 10])
    trainers = [
        LossTrainer(network, optimizer=rate, losses=losses),
        metapl.BilevelTrainer(
            network, student, "none", outer_optimizer=rate, teacher_losses=losses
        ),
    ]
    for trainer in trainers:
        result = trainer.fit(
            (x[LABELED], y[LABELED]),
            (x[100:], x[100:]),
            steps=20,
            batch_size=64,
            log_every=10,
            progress=False,
        )
        is_said = any("unlabeled examples have taught nothing" in text for text in result.warnings)
        assert is_said == (threshold > 0)
