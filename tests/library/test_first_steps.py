"""What a problem brings: its optimizer of the teacher, and first steps of the student alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from feed_sources import same
from fits import Counting, copied
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError
from metapl.problems import (
    DataRater,
    ExampleLabels,
    ExampleWeights,
    LabelCorrection,
    LearningToReweight,
    MetaWeightNet,
    NoiseTransition,
    Table,
    WeightNet,
)

ROWS = 24
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, 5, generator=DRAW)
Y = torch.randint(0, 3, (ROWS,), generator=DRAW)
TRUSTED = [(X[:6], Y[:6])]


def given_batches(number: int = 12) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(ROWS, (8,), generator=draw) for _ in range(number)]
    return [(X[row], Y[row]) for row in rows]


def student_network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


def weight_trainer(**options: Any) -> metapl.BilevelTrainer:
    student = student_network()
    inner = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    options = {"problem": MetaWeightNet(), "inner_optimizer": inner, "verify": False} | options
    return metapl.BilevelTrainer(WeightNet(hidden=8), student, "forward", **options)


def fit(
    trainer: metapl.BilevelTrainer, inner: Any = None, steps: int = 10, **options: Any
) -> metapl.FitResult:
    options = {"schedule": "constant", "progress": False} | options
    return trainer.fit(TRUSTED, given_batches() if inner is None else inner, steps=steps, **options)


# --------------------------------------------------------------------- the optimizer of the teacher


class Named(ExampleWeights):
    def default_outer_optimizer(self, teacher: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(teacher.parameters(), lr=0.25)


def test_a_problem_names_the_optimizer_of_its_teacher() -> None:
    table = Table(torch.zeros(ROWS))
    trainer = metapl.BilevelTrainer(table, student_network(), problem=Named())
    assert isinstance(trainer.outer_optimizer, torch.optim.Adam)
    assert trainer.outer_optimizer.param_groups[0]["lr"] == 0.25
    assert [*trainer.outer_optimizer.param_groups[0]["params"]] == [table.values]


def test_an_optimizer_that_is_given_comes_before_that_of_the_problem() -> None:
    table = Table(torch.zeros(ROWS))
    outer = torch.optim.SGD(table.parameters(), lr=0.5)
    assert (
        metapl.BilevelTrainer(
            table, student_network(), problem=Named(), outer_optimizer=outer
        ).outer_optimizer
        is outer
    )


def test_pseudo_labels_keep_sgd() -> None:
    trainer = metapl.BilevelTrainer(student_network(), student_network())
    assert isinstance(trainer.outer_optimizer, torch.optim.SGD)
    assert trainer.outer_optimizer.param_groups[0]["lr"] == 0.05


def test_an_optimizer_of_a_problem_that_leaves_out_a_parameter_is_refused() -> None:
    class Partly(ExampleWeights):
        def default_outer_optimizer(self, teacher: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.Adam([nn.Parameter(torch.zeros(1))])

    with pytest.raises(MetaplError, match="outer_optimizer"):
        metapl.BilevelTrainer(Table(torch.zeros(ROWS)), student_network(), problem=Partly())


INDEX = torch.arange(8)
TEACHERS: dict[str, tuple[metapl.BilevelProblem, Any, Any]] = {
    "weights": (ExampleWeights(), lambda: Table(torch.zeros(8)), (X[:8], Y[:8], INDEX)),
    "labels": (ExampleLabels(), lambda: Table(2 * F.one_hot(Y[:8], 3).float()), (X[:8], INDEX)),
    "matrix": (NoiseTransition(), lambda: Table(4 * torch.eye(3)), (X[:8], Y[:8])),
    "corrector": (
        LabelCorrection(),
        lambda: metapl.models.Corrector(nn.Linear(5, 3), classes=3),
        (X[:8], Y[:8]),
    ),
    "losses": (MetaWeightNet(), lambda: WeightNet(hidden=8), (X[:8], Y[:8])),
}


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_of_a_problem_moves_whatever_the_size_of_its_feedback(
    name: str, scale: float
) -> None:
    """By the default of the trainer, SGD at 0.05, weights of a table would move by 1e-6 a step."""
    problem, teacher_of, inner = TEACHERS[name]
    torch.manual_seed(0)
    teacher = teacher_of()
    trainer = metapl.BilevelTrainer(
        teacher, student_network(), problem=problem, feedback_weight=scale
    )
    first_state = copied(teacher)
    for _ in range(3):
        trainer.step(outer=TRUSTED[0], inner=inner)
    moved = max((t - first_state[key]).abs().max().item() for key, t in copied(teacher).items())
    rate = trainer.outer_optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
    assert moved > rate


@pytest.mark.parametrize("name", ["weights", "labels", "matrix"])
def test_a_network_in_the_place_of_a_table_gets_the_rate_of_a_network(name: str) -> None:
    problem, _, _ = TEACHERS[name]
    optimizer = problem.default_outer_optimizer(nn.Linear(2, 2))
    assert optimizer is not None
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_the_rater_of_data_learns_by_adam() -> None:
    assert isinstance(DataRater().default_outer_optimizer(nn.Linear(2, 2)), torch.optim.Adam)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_pure_step_takes_the_optimizers_of_the_problems(name: str) -> None:
    problem, teacher_of, inner = TEACHERS[name]
    torch.manual_seed(0)
    student = nn.Linear(5, 3)
    trainer = metapl.BilevelTrainer(teacher_of(), student, problem=problem)
    step, state = trainer.functional()
    for _ in range(2):
        state, _ = step(state, TRUSTED[0], inner)
        trainer.step(outer=TRUSTED[0], inner=inner)
    assert trainer.teacher is not None
    for key, t in trainer.teacher.named_parameters():
        torch.testing.assert_close(state.teacher.params[key], t.detach(), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------- first steps


def test_the_student_first_learns_the_given_labels_as_it_would_alone() -> None:
    """The student learns bit for bit as alone, dropout and batch statistics included.

    The teacher and its optimizer stand still.
    """
    trainer = weight_trainer()
    lonely = student_network()
    assert trainer.teacher is not None
    teacher_before = copied(trainer.teacher)
    alone = metapl.LossTrainer(
        lonely, optimizer=torch.optim.SGD(lonely.parameters(), lr=0.1, momentum=0.9)
    )
    torch.manual_seed(5)
    for batch in given_batches():
        report = trainer.first_step(outer=TRUSTED[0], inner=batch)
    torch.manual_seed(5)
    for batch in given_batches():
        expected = alone.step(batch)
    for name, t in copied(lonely).items():
        torch.testing.assert_close(copied(trainer.student)[name], t, rtol=1e-5, atol=1e-6)
    assert report.inner_loss == pytest.approx(expected.loss, rel=1e-5)
    assert same(copied(trainer.teacher), teacher_before)
    assert not trainer.outer_optimizer.state  # type: ignore[union-attr]
    assert trainer.steps_done == len(given_batches())


def test_after_the_first_steps_a_fit_takes_those_of_a_trainer_whose_student_begins_there() -> None:
    fitted = weight_trainer()
    by_hand = weight_trainer()
    torch.manual_seed(5)
    fit(fitted)
    torch.manual_seed(5)
    for number, batch in enumerate(given_batches()[:10]):
        step = by_hand.first_step if number < 3 else by_hand.step
        step(outer=TRUSTED[0], inner=batch)
    assert same(fitted.state_dict(), by_hand.state_dict())


def test_the_option_decides_how_many_first_steps_there_are() -> None:
    fitted = weight_trainer()
    by_hand = weight_trainer()
    torch.manual_seed(5)
    fit(fitted, first_steps=0)
    torch.manual_seed(5)
    for batch in given_batches()[:10]:
        by_hand.step(outer=TRUSTED[0], inner=batch)
    assert same(fitted.state_dict(), by_hand.state_dict())


def test_a_fit_that_is_stopped_in_its_first_steps_ends_as_one_that_was_not(tmp_path: Path) -> None:
    uninterrupted = weight_trainer()
    parts = weight_trainer()
    torch.manual_seed(5)
    fit(uninterrupted, first_steps=6)

    def stop() -> None:
        raise RuntimeError("killed")

    options: dict[str, Any] = {"first_steps": 6, "out": tmp_path, "save_every": 2}
    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="killed"):
        fit(parts, Counting(given_batches(), 6, stop), **options)
    resumed = weight_trainer()
    torch.manual_seed(99)
    fit(resumed, resume=True, **options)
    assert same(resumed.state_dict(), uninterrupted.state_dict())


def test_a_fit_is_not_resumed_with_other_first_steps(tmp_path: Path) -> None:
    fit(weight_trainer(), out=tmp_path)
    with pytest.raises(MetaplError, match="first_steps was 3, now 6"):
        fit(weight_trainer(), steps=20, out=tmp_path, resume=True)


def test_patience_is_counted_from_where_the_teacher_begins() -> None:
    trainer = weight_trainer()

    def steps_to_go(outputs: Tensor, batch: Any) -> float:
        return -float(trainer.steps_done)

    options: dict[str, Any] = {"first_steps": 6, "validation": TRUSTED[0], "validate_every": 1}
    result = fit(trainer, steps=20, metric=steps_to_go, metric_mode="max", patience=2, **options)
    # The student is at its best after step 1; of those with a teacher the one after step 7 is best.
    assert result.step == 1
    assert trainer.steps_done == 9


@pytest.mark.filterwarnings("ignore:the student is in eval")
def test_first_steps_are_with_micro_batches_and_a_clip_what_they_are_without() -> None:
    plain = weight_trainer(clip_norm=0.5)
    parts = weight_trainer(clip_norm=0.5, accumulate=2)
    for trainer in (plain, parts):
        trainer.student.eval()
        for batch in given_batches(4):
            trainer.first_step(outer=TRUSTED[0], inner=batch)
    for name, t in copied(plain.student).items():
        torch.testing.assert_close(copied(parts.student)[name], t, rtol=1e-5, atol=1e-6)


def test_a_look_ahead_draws_one_batch_in_a_first_step() -> None:
    trainer = weight_trainer(lookahead=2)
    batches = Counting(given_batches(20), 99, lambda: None)
    fit(trainer, batches, steps=6, first_steps=3)
    assert trainer.steps_done == 6
    assert batches.taken <= 3 + 2 * 3 + 1


@dataclass(frozen=True)
class TooMany(MetaWeightNet):
    def first_steps(self, steps: int) -> int:
        return steps


@pytest.mark.parametrize(
    ("trainer", "options", "message"),
    [
        (lambda: weight_trainer(problem=TooMany()), {}, r"TooMany.first_steps\(10\) returned 10"),
        (
            weight_trainer,
            {"first_steps": 10},
            "first_steps=10: expected fewer than steps - wait, 10",
        ),
    ],
)
def test_first_steps_that_leave_none_for_the_teacher_are_refused(
    trainer: Any, options: Any, message: str
) -> None:
    refused = trainer()
    first_state = copy.deepcopy(refused.state_dict())
    with pytest.raises(MetaplError, match=message):
        fit(refused, **options)
    assert same(refused.state_dict(), first_state)


def test_a_trainer_without_a_teacher_refuses_the_option_and_reweighting_takes_it() -> None:
    student = student_network()
    alone = metapl.LossTrainer(student, optimizer=torch.optim.SGD(student.parameters(), lr=0.1))
    with pytest.raises(MetaplError, match="first_steps=2 was given to a LossTrainer"):
        alone.fit(given_batches(), steps=4, first_steps=2, progress=False)
    trainer = metapl.BilevelTrainer(None, student_network(), problem=LearningToReweight())
    fit(trainer, first_steps=3)
    assert trainer.steps_done == 10


def test_a_first_step_that_fails_moves_nothing() -> None:
    trainer = weight_trainer()
    first_state = copy.deepcopy(trainer.state_dict())
    with pytest.raises(MetaplError):
        trainer.first_step(outer=TRUSTED[0], inner=(torch.full((8, 5), torch.nan), Y[:8]))
    with pytest.raises(MetaplError):
        trainer.first_step(outer=TRUSTED[0], inner=X[:8])
    assert same(trainer.state_dict(), first_state)


class Doubled(torch.autograd.Function):
    """The identity, with twice its derivative."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


class WrongWeights(MetaWeightNet):
    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Any
    ) -> metapl.Signal:
        signal = super().signal(teacher, batch, student_outputs, generator=generator)
        return metapl.Signal(Doubled.apply(signal.value))


def test_a_wrong_gradient_is_refused_before_the_first_steps() -> None:
    trainer = weight_trainer(problem=WrongWeights(), verify=True)
    first_state = copied(trainer.student)
    with pytest.raises(MetaplError):
        fit(trainer)
    assert same(copied(trainer.student), first_state)


class ReadsItsInput(nn.Module):
    """A layer that asks for the value of its input, which no graph captures."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() < 1e9 else 2 * x


def test_what_cannot_be_compiled_is_refused_before_the_first_steps() -> None:
    student = nn.Sequential(nn.Linear(5, 8), ReadsItsInput(), nn.Tanh(), nn.Linear(8, 3))
    trainer = weight_trainer_of(student, compiled=True)
    first_state = copied(student)
    generator = torch.get_rng_state()
    with pytest.raises(MetaplError, match="leave compile out"):
        fit(trainer)
    assert same(copied(student), first_state)
    assert trainer.steps_done == 0
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.long
def test_a_compiled_fit_has_the_first_steps_of_an_eager_one() -> None:
    ends = []
    for compiled in (False, True):
        torch.manual_seed(3)
        student = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        trainer = weight_trainer_of(student, compiled)
        fit(trainer)
        ends.append(
            copied(trainer.student)
            | {f"teacher.{name}": t for name, t in copied(trainer.teacher).items()}
        )  # type: ignore[arg-type]
    for name, t in ends[0].items():
        torch.testing.assert_close(ends[1][name], t, rtol=1e-4, atol=1e-5)


def weight_trainer_of(student: nn.Module, compiled: bool) -> metapl.BilevelTrainer:
    torch.manual_seed(4)
    return metapl.BilevelTrainer(
        WeightNet(hidden=8), student, "forward", problem=MetaWeightNet(), compile=compiled
    )
