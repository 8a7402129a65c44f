"""The size of the feedback beside the teacher's own losses.

Weight, ratio and bound, on both roads.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems_zoo import toy
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.checkpoint import checkpoint

import metapl
from metapl import UDA, CrossEntropy, MetaplError
from metapl.core.size import DEFAULT_BOUND, FeedbackSize, ratio_of
from metapl.feedback import Forward, LossDifference, Reinforce
from metapl.functional import stack, unstack
from metapl.problems import ExampleWeights, LearningToReweight, Table

LOSSES = CrossEntropy(label_smoothing=0.1), UDA()
# At this weight the feedback of the toy outweighs the teacher's own losses.
LARGE = 50.0


def trainer_for(
    mode: Any = "forward", **options: Any
) -> tuple[metapl.BilevelTrainer, dict[str, Any]]:
    """Return a trainer and a batch; the move of the teacher is its gradient.

    It takes plain SGD steps at rate 1.
    """
    case = toy("mlp", rows=8)
    options = {
        "generator": torch.Generator().manual_seed(3),
        "verify": False,
        "clip_norm": None,
        **options,
    }
    options.setdefault("outer_optimizer", torch.optim.SGD(case.teacher.parameters(), lr=1.0))
    trainer = metapl.BilevelTrainer(**case.networks(), mode=mode, **options)
    labeled = tuple(part[:4] for part in case.labeled)
    return trainer, {"outer": labeled, "inner": case.unlabeled}


def step_of(mode: Any = "forward", **options: Any) -> tuple[Tensor, Any]:
    """Return the teacher's gradient in a step, and the report."""
    trainer, batches = trainer_for(mode, **options)
    assert trainer.teacher is not None
    start = parameters_to_vector(trainer.teacher.parameters()).detach()
    report = trainer.step(**batches)
    end = parameters_to_vector(trainer.teacher.parameters()).detach()
    return start - end, report


def test_the_rules() -> None:
    feedback_norm = torch.tensor(2.0)
    own_norm = torch.tensor(1.0)
    assert FeedbackSize(weight=3.0).weight_for(feedback_norm, own_norm) == 3.0
    assert FeedbackSize(ratio=0.5).weight_for(feedback_norm, own_norm) == 0.25
    assert FeedbackSize(bound=0.5).weight_for(feedback_norm, own_norm) == 0.25
    assert FeedbackSize(bound=4.0).weight_for(feedback_norm, own_norm) == 1.0
    assert FeedbackSize(weight=1.5, bound=4.0).weight_for(feedback_norm, own_norm) == 1.5
    nothing = torch.tensor(0.0)
    assert FeedbackSize(ratio=0.5).weight_for(nothing, own_norm) == 0.0
    assert FeedbackSize(bound=0.5).weight_for(nothing, own_norm) == 1.0
    assert FeedbackSize(bound=0.5).weight_for(feedback_norm, nothing) == 0.0
    assert ratio_of(torch.tensor(0.25), feedback_norm, own_norm) == 0.5
    assert ratio_of(torch.tensor(0.25), feedback_norm, nothing) == math.inf
    assert ratio_of(torch.tensor(0.25), nothing, nothing) == 0.0
    assert FeedbackSize(weight=-3.0, bound=0.5).weight_for(feedback_norm, own_norm) == -0.25


@pytest.mark.parametrize("mode", ["forward", "reinforce", "loss_difference"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"recompute_teacher": True}], ids=str)
def test_a_bound_is_not_exceeded(mode: str, options: dict[str, Any]) -> None:
    """A large feedback is cut to the bound along its own direction.

    One within the bound is multiplied by the weight alone.
    """
    of_losses, _ = step_of(mode, feedback_weight=0.0, **options)
    unbounded, _ = step_of(mode, feedback_weight=LARGE, **options)
    of_feedback = unbounded - of_losses
    size = float(of_feedback.norm() / of_losses.norm())
    cut, report = step_of(mode, feedback_weight=LARGE, feedback_bound=size / 4, **options)
    torch.testing.assert_close(cut - of_losses, of_feedback / 4)
    assert report.feedback_weight == pytest.approx(LARGE / 4)
    assert report.feedback_ratio == pytest.approx(size / 4)
    uncut, report = step_of(mode, feedback_weight=LARGE, feedback_bound=2 * size, **options)
    torch.testing.assert_close(uncut, unbounded)
    assert report.feedback_weight == LARGE
    assert report.feedback_ratio == pytest.approx(size)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, DEFAULT_BOUND),
        ({"teacher_losses": LOSSES[:1]}, DEFAULT_BOUND),
        ({"teacher_losses": ()}, None),
        ({"feedback_weight": 1.0}, None),
        ({"feedback_ratio": 0.5}, None),
        ({"feedback_bound": 0.7}, 0.7),
        ({"feedback_weight": 2.0, "feedback_bound": 0.7}, 0.7),
    ],
    ids=str,
)
def test_the_default_is_a_bound_where_the_teacher_learns_labels(
    options: dict[str, Any], bound: float | None
) -> None:
    trainer, _ = trainer_for(**options)
    assert trainer.feedback_bound == bound
    assert trainer.feedback_weight == options.get("feedback_weight", 1.0)


class SmallWeights:
    """A loss of the teacher that teaches it nothing about the task."""

    name = "small_weights"

    def __call__(self, teacher: nn.Module, **_: Any) -> Tensor:
        return 1e-4 * sum(p.square().sum() for p in teacher.parameters())


def test_a_penalty_of_the_teacher_bounds_nothing() -> None:
    """Beside it the feedback is all that the weights of examples learn from."""
    trainer = metapl.BilevelTrainer(
        Table(torch.zeros(8)),
        nn.Linear(4, 3),
        problem=ExampleWeights(),
        teacher_losses=(SmallWeights(),),
    )
    assert trainer.feedback_bound is None
    assert trainer.feedback_weight == 1.0


@pytest.mark.parametrize("mode", ["forward", "reinforce", "unrolled"])
@pytest.mark.parametrize(
    "rule", [{"feedback_bound": 0.01}, {"feedback_ratio": 0.3}, {"feedback_bound": 1e6}], ids=str
)
def test_the_pure_step_follows_the_same_rule(mode: str, rule: dict[str, Any]) -> None:
    eager, batches = trainer_for(mode, generator=None, **rule)
    step, state = eager.functional()
    torch.manual_seed(5)
    moved, report = step(state, batches["outer"], batches["inner"])
    torch.manual_seed(5)
    expected = eager.step(**batches)
    for name in ("feedback_weight", "feedback_ratio"):
        assert float(report.sizes[name]) == pytest.approx(float(expected.scalars[name]), rel=1e-9)
    assert eager.teacher is not None
    for name, p in eager.teacher.named_parameters():
        torch.testing.assert_close(moved.teacher.params[name], p.detach())


class Entropy:
    """A loss of the teacher whose gradient passes through the signal."""

    name = "entropy"

    def __call__(self, teacher: nn.Module, *, signal: metapl.Signal, **_: Any) -> Tensor:
        q = signal.probs if signal.probs is not None else signal.value
        return -(q * q.log()).sum(-1).mean()


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_a_loss_that_reads_the_graph_of_the_signal_has_its_whole_gradient(mode: str) -> None:
    losses = (CrossEntropy(), Entropy())
    eager, batches = trainer_for(mode, generator=None, teacher_losses=losses, feedback_bound=0.01)
    step, state = eager.functional()
    torch.manual_seed(5)
    moved, _ = step(state, batches["outer"], batches["inner"])
    torch.manual_seed(5)
    eager.step(**batches)
    assert eager.teacher is not None
    for name, p in eager.teacher.named_parameters():
        torch.testing.assert_close(moved.teacher.params[name], p.detach())


def test_stacked_steps_have_a_weight_each() -> None:
    """A small and a large feedback side by side: the bound cuts the one that exceeds it."""
    trainer, batches = trainer_for("forward", feedback_bound=0.02)
    step, state = trainer.functional()
    settings = [{**group, "lr": 100 * group["lr"]} for group in state.inner.settings]
    with_larger_rates = state._replace(inner=state.inner._replace(settings=settings))
    states = [state, with_larger_rates]
    data = batches["outer"], batches["inner"]
    _, report = torch.func.vmap(step)(stack(states), *stack([data, data]))
    singles = []
    for single_state in states:
        _, single_report = step(single_state, *data)
        singles.append(single_report)
    for sizes, single_report in zip(unstack(report.sizes), singles, strict=True):
        for name, value in single_report.sizes.items():
            torch.testing.assert_close(sizes[name], value)
    assert singles[0].sizes["feedback_weight"] > singles[1].sizes["feedback_weight"]


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_measuring_the_size_leaves_the_step_as_it_is(mode: str, options: dict[str, Any]) -> None:
    ends = []
    reports = []
    for measures in (False, True):
        trainer, batches = trainer_for(mode, feedback_weight=2.0, **options)
        trainer.measures_feedback = measures
        reports.append(trainer.step(**batches))
        assert trainer.teacher is not None
        ends.append(
            parameters_to_vector([*trainer.teacher.parameters(), *trainer.student.parameters()])
        )
    assert torch.equal(*ends)
    assert "feedback_ratio" not in reports[0].scalars
    of_losses, _ = step_of(mode, feedback_weight=0.0, **options)
    gradient, _ = step_of(mode, feedback_weight=2.0, **options)
    ratio = float((gradient - of_losses).norm() / of_losses.norm())
    assert reports[1].feedback_ratio == pytest.approx(ratio)
    assert reports[1].feedback_weight == 2.0


def test_a_fit_records_the_size_in_every_row() -> None:
    for mode in (Reinforce(), LossDifference(), Forward()):
        trainer, batches = trainer_for(mode, feedback_weight=1.0)
        result = trainer.fit(
            [batches["outer"]], [batches["inner"]], steps=6, log_every=2, progress=False
        )
        assert all(row["feedback_ratio"] > 0 for row in result.history)


class WithUnused(nn.Module):
    """A teacher with an embedding whose gradients are sparse, and a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(20, 8, mode="sum", sparse=True)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words))


def test_what_no_loss_reaches_gets_no_gradient_and_sparse_ones_stay_sparse() -> None:
    torch.manual_seed(0)
    teacher = WithUnused()
    student = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(32, 3))
    outer = torch.optim.SGD(teacher.parameters(), lr=0.1)
    gradients: dict[str, Any] = {}

    def note_gradients(*_: Any) -> None:
        gradients.update({name: p.grad for name, p in teacher.named_parameters()})

    outer.register_step_pre_hook(note_gradients)
    trainer = metapl.BilevelTrainer(
        teacher, student, "forward", outer_optimizer=outer, verify=False
    )
    words = torch.randint(20, (6, 4))
    trainer.step((words, torch.arange(6) % 3), torch.randint(20, (8, 4)))
    assert gradients["unused.weight"] is None
    assert gradients["embedding.weight"].is_sparse


class Checkpointed(nn.Module):
    """A teacher whose layers run again in its backward pass.

    They do so in the way that ``torch.autograd.grad`` refuses.
    """

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = checkpoint(self.inside, x.detach().requires_grad_(), use_reentrant=True)
        return outputs


@pytest.mark.parametrize("rule", [{}, {"feedback_ratio": 0.3}, {"feedback_weight": 2.0}], ids=str)
def test_a_teacher_under_reentrant_checkpoints_takes_the_same_step(rule: dict[str, float]) -> None:
    ends = []
    for is_checkpointed in (False, True):
        case = toy("mlp", rows=8)
        teacher = Checkpointed(case.teacher) if is_checkpointed else case.teacher
        outer = torch.optim.SGD(case.teacher.parameters(), lr=1.0)
        trainer = metapl.BilevelTrainer(
            teacher,
            case.student,
            "forward",
            outer_optimizer=outer,
            teacher_losses=LOSSES[:1],
            verify=False,
            **rule,
        )
        trainer.measures_feedback = True
        trainer.step(case.labeled, case.unlabeled)
        ends.append(parameters_to_vector(case.teacher.parameters()).detach())
    torch.testing.assert_close(*ends)


def test_hooks_of_the_teachers_parameters_are_called() -> None:
    """An optimizer in the backward pass, say."""
    trainer, batches = trainer_for("forward")
    assert trainer.teacher is not None
    called: list[float] = []
    for p in trainer.teacher.parameters():
        p.register_post_accumulate_grad_hook(lambda p: called.append(float(p.grad.norm())))  # type: ignore[union-attr]
    trainer.step(**batches)
    assert len(called) == len([*trainer.teacher.parameters()])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"feedback_ratio": 0.1, "feedback_weight": 1.0}, "feedback_ratio=0.1 and feedback_weight"),
        ({"feedback_ratio": 0.1, "feedback_bound": 1.0}, "feedback_ratio=0.1 and feedback_bound"),
        (
            {"feedback_bound": 0.1, "teacher_losses": ()},
            "feedback_bound=0.1 was given, and the teacher has no losses",
        ),
        ({"feedback_bound": -0.1}, "feedback_bound=-0.1"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(MetaplError, match=text):
        trainer_for(**options)


def test_without_a_teacher_there_is_no_size() -> None:
    for name in ("feedback_weight", "feedback_ratio", "feedback_bound"):
        with pytest.raises(MetaplError, match=name):
            metapl.BilevelTrainer(
                None, nn.Linear(4, 3), problem=LearningToReweight(), **{name: 1.0}
            )


class WithEntropy(CrossEntropy):
    """A loss that inherits from one that reads no graph of the signal.

    It adds a term that does.
    """

    def __call__(self, teacher: nn.Module, *, signal: metapl.Signal, **batches: Any) -> Tensor:
        q = signal.probs if signal.probs is not None else signal.value
        entropy = -(q * q.log()).sum(-1).mean()
        return super().__call__(teacher, signal=signal, **batches) + entropy


def test_a_loss_that_inherits_says_anew_what_it_reads() -> None:
    assert CrossEntropy.detaches_signal
    assert not WithEntropy.detaches_signal
    eager, batches = trainer_for(
        "forward", generator=None, teacher_losses=(WithEntropy(),), feedback_bound=0.01
    )
    step, state = eager.functional()
    moved, _ = step(state, batches["outer"], batches["inner"])
    eager.step(**batches)
    assert eager.teacher is not None
    for name, p in eager.teacher.named_parameters():
        torch.testing.assert_close(moved.teacher.params[name], p.detach())


@pytest.mark.parametrize("rule", [{}, {"feedback_weight": 1.0}], ids=["bound", "weight"])
def test_hooks_that_change_the_teachers_gradients_are_refused(rule: dict[str, Any]) -> None:
    trainer, batches = trainer_for("forward", **rule)
    assert trainer.teacher is not None
    handle = next(trainer.teacher.parameters()).register_hook(lambda g: g.clamp(-0.1, 0.1))
    with pytest.raises(MetaplError, match=r"teacher\..* have hooks; expected none"):
        trainer.step(**batches)
    handle.remove()
    trainer.step(**batches)


class SparseHere(nn.Module):
    """A teacher whose embedding has a sparse gradient by one pass and a dense one by another."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(20, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        is_labeled = len(words) == 6
        return self.head(nn.functional.embedding(words, self.words, sparse=is_labeled).mean(1))


def test_sparse_and_dense_gradients_of_one_weight_are_added() -> None:
    moves = []
    for rule in ({"feedback_weight": 1.0}, {"feedback_bound": 1e6}):
        torch.manual_seed(0)
        teacher = SparseHere()
        student = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(32, 3))
        outer = torch.optim.SGD(teacher.parameters(), lr=0.1)
        trainer = metapl.BilevelTrainer(
            teacher, student, "forward", outer_optimizer=outer, verify=False, **rule
        )
        trainer.measures_feedback = True
        trainer.step((torch.randint(20, (6, 4)), torch.arange(6) % 3), torch.randint(20, (8, 4)))
        moves.append(teacher.words.detach())
    torch.testing.assert_close(*moves)
