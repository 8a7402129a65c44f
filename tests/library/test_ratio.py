"""feedback_ratio sets the size of the feedback beside the teacher's own losses, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metapl


def _trainer(**options: object) -> metapl.BilevelTrainer:
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(2))
    return metapl.BilevelTrainer(
        teacher,
        student,
        "forward",
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.3),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=1.0),
        **options,
    )


def _batch() -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    x, u = (torch.randn(6, 5, generator=draws, dtype=torch.float64) for _ in range(2))
    return (x, torch.arange(6) % 3), u


def _moved(**options: object) -> tuple[torch.Tensor, float]:
    trainer = _trainer(**options)
    before = nn.utils.parameters_to_vector(trainer.teacher.parameters()).detach()
    report = trainer.step(*_batch())
    return nn.utils.parameters_to_vector(trainer.teacher.parameters()).detach() - before, report.feedback_ratio


def test_the_report_shows_the_ratio_that_was_asked_for() -> None:
    assert _moved(feedback_ratio=0.25)[1] == pytest.approx(0.25)


def test_it_is_the_weight_that_gives_this_ratio() -> None:
    _, at_one = _moved()
    by_ratio, _ = _moved(feedback_ratio=0.25)
    by_weight, _ = _moved(feedback_weight=0.25 / at_one)
    torch.testing.assert_close(by_ratio, by_weight)


def test_zero_is_no_feedback() -> None:
    torch.testing.assert_close(_moved(feedback_ratio=0.0)[0], _moved(feedback_weight=0.0)[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"feedback_ratio": -1.0}, "0 or more"),
        ({"feedback_ratio": 0.1, "feedback_weight": 2.0}, "both"),
        ({"feedback_ratio": 0.1, "teacher_losses": ()}, "teacher_losses"),
        ({"feedback_ratio": 0.1, "accumulate": 2}, "accumulate=2"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(metapl.MetaplError, match=text):
        _trainer(**options)


class _OutputsTwice:
    """A teacher loss in the outputs that the feedback goes through as well."""

    name = "outputs_twice"

    def __call__(self, teacher: nn.Module, *, signal: metapl.problems.Signal, **batches: object) -> torch.Tensor:
        assert signal.outputs is not None
        return signal.outputs.square().mean()


@pytest.mark.parametrize(
    "losses", [(metapl.CrossEntropy(),), (_OutputsTwice(),), (metapl.CrossEntropy(), _OutputsTwice())]
)
def test_the_ratio_is_that_of_the_gradients_at_the_teachers_outputs(losses: tuple[object, ...]) -> None:
    """By a backward pass of each loss, from outputs that are shared between the losses, and not."""
    trainer = _trainer(teacher_losses=losses, feedback_weight=0.7)
    (x, y), u = _batch()
    h = trainer.hypergradient((x, y), u).feedback
    z, z_labeled = (trainer.teacher(batch).detach().requires_grad_() for batch in (u, x))
    (from_feedback,) = torch.autograd.grad(-0.7 * (h * z.softmax(-1)).sum(), z)
    own = sum(
        nn.functional.cross_entropy(z_labeled, y) if isinstance(loss, metapl.CrossEntropy) else z.square().mean()
        for loss in losses
    )
    from_own = torch.autograd.grad(own, [z, z_labeled], materialize_grads=True)
    expected = from_feedback.norm() / torch.cat([g.flatten() for g in from_own]).norm()
    assert trainer.step((x, y), u).feedback_ratio == pytest.approx(float(expected), rel=1e-9)


def test_hooks_on_a_table_that_is_the_teachers_output_do_not_stay() -> None:
    table = metapl.problems.Table(torch.zeros(6))
    student = nn.Linear(5, 3)
    trainer = metapl.BilevelTrainer(table, student, "forward", problem=metapl.problems.ExampleWeights())
    (x, y), u = _batch()
    batch = x.float(), y
    trainer.step(batch, (u.float(), y, torch.arange(6)))
    assert not any(p._backward_hooks for p in table.parameters())


class _Nested(nn.Module):
    """A teacher one of whose outputs is computed from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(x).tanh()
        return {"features": features, "logits": self.head(features)}


class _OfLogits(metapl.problems.Problem):
    def signal(self, teacher: nn.Module, batch: torch.Tensor, *_: object, **__: object) -> metapl.Signal:
        outputs = teacher(batch)
        return metapl.Signal(outputs["logits"].softmax(-1), outputs=outputs["features"])

    def inner_loss(self, outputs: torch.Tensor, signal: metapl.Signal, *_: object) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, signal.value, reduction="none")

    def outer_loss(self, outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def test_the_ratio_of_outputs_that_are_computed_from_each_other() -> None:
    """The loss in the features does not get the feedback that flows through them."""
    torch.manual_seed(0)
    teacher, student = _Nested(), nn.Linear(5, 3).double()
    trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=_OfLogits(), teacher_losses=(_OutputsTwice(),))
    labeled, u = _batch()
    h = trainer.hypergradient(labeled, u).feedback
    outputs = {name: t.detach().requires_grad_() for name, t in teacher(u).items()}
    (from_feedback,) = torch.autograd.grad(-(h * outputs["logits"].softmax(-1)).sum(), outputs["logits"])
    (own,) = torch.autograd.grad(outputs["features"].square().mean(), outputs["features"])
    found = trainer.step(labeled, u).feedback_ratio
    assert found == pytest.approx(float(from_feedback.norm() / own.norm()), rel=1e-9)


class _Diagonal:
    """A loss of a teacher that is a table."""

    name = "diagonal"

    def __call__(self, teacher: nn.Module, **batches: object) -> torch.Tensor:
        return -teacher().log_softmax(-1).diagonal().mean()


@pytest.mark.parametrize("options", [{}, {"feedback_ratio": 0.5}], ids=str)
def test_the_ratio_where_the_output_is_the_weight_itself(options: dict[str, float]) -> None:
    torch.manual_seed(0)
    table, student = metapl.problems.Table(4 * torch.eye(3)), nn.Linear(5, 3)
    trainer = metapl.BilevelTrainer(
        table,
        student,
        "forward",
        problem=metapl.problems.NoiseTransition(),
        teacher_losses=(_Diagonal(),),
        outer_optimizer=torch.optim.SGD(table.parameters(), lr=1.0),
        **options,
    )
    (x, y), u = _batch()
    ratio = trainer.step((x.float(), y), (u.float(), y)).feedback_ratio
    assert ratio == pytest.approx(options["feedback_ratio"]) if options else 0 < ratio < 1


@pytest.mark.parametrize("rate", [1e-6, 1e-12, 1e-16])
def test_the_size_does_not_depend_on_how_small_the_students_rate_is(rate: float) -> None:
    trainer = _trainer(feedback_ratio=0.7)
    trainer.inner_optimizer.param_groups[0]["lr"] = rate
    assert trainer.step(*_batch()).feedback_ratio == pytest.approx(0.7, rel=1e-5)


class _Features:
    """A loss in both outputs, one of which is computed from the other."""

    name = "features"

    def __call__(self, teacher: nn.Module, *, unlabeled: torch.Tensor, **others: object) -> torch.Tensor:
        outputs = teacher(unlabeled)
        return outputs["features"].square().mean() + outputs["logits"].square().mean()


class _Twice(nn.Module):
    """A teacher that is applied to its own output: of five classes, on five inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).tanh()


class _OfItself(metapl.PseudoLabels):
    def signal(self, teacher: nn.Module, batch: torch.Tensor, *_: object, **__: object) -> metapl.Signal:
        once = teacher(batch)
        return metapl.Signal((once + teacher(once)).softmax(-1), outputs=once)


@pytest.mark.parametrize("options", [{}, {"feedback_ratio": 0.5}], ids=str)
def test_the_ratio_of_a_loss_in_outputs_that_are_computed_from_each_other(options: dict[str, float]) -> None:
    """What flows to the features through the logits is no part of the gradient at the features."""
    torch.manual_seed(0)
    teacher, student = _Nested(), nn.Linear(5, 3).double()
    trainer = metapl.BilevelTrainer(
        teacher, student, "forward", problem=_OfLogits(), teacher_losses=(_Features(),), **options
    )
    labeled, u = _batch()
    h = trainer.hypergradient(labeled, u).feedback
    features, logits = (t.detach().requires_grad_() for t in teacher(u).values())
    (from_feedback,) = torch.autograd.grad(-(h * logits.softmax(-1)).sum(), logits)
    own = torch.autograd.grad(features.square().mean() + logits.square().mean(), (features, logits))
    expected = options.get("feedback_ratio", float(from_feedback.norm() / torch.cat([*own], 1).norm()))
    assert trainer.step(labeled, u).feedback_ratio == pytest.approx(expected, rel=1e-9)


def test_the_ratio_of_a_teacher_that_is_applied_to_its_own_output() -> None:
    """What flows through the second pass is a part of the gradient at the output of the first."""
    torch.manual_seed(0)
    teacher, student = _Twice(), nn.Linear(5, 5).double()
    trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=_OfItself(), teacher_losses=(_OutputsTwice(),))
    labeled, u = _batch()
    h = trainer.hypergradient(labeled, u).feedback
    once = teacher(u).detach().requires_grad_()
    twice = teacher(once)
    from_feedback = torch.autograd.grad(-(h * (once + twice).softmax(-1)).sum(), (once, twice))
    (own,) = torch.autograd.grad(once.square().mean(), once)
    expected = float(torch.cat(from_feedback, 1).norm() / own.norm())
    assert trainer.step(labeled, u).feedback_ratio == pytest.approx(expected, rel=1e-9)


class _InPlace(metapl.PseudoLabels):
    def signal(self, teacher: nn.Module, batch: torch.Tensor, *_: object, **__: object) -> metapl.Signal:
        logits = teacher(batch)
        logits /= 0.5
        return metapl.Signal(logits.softmax(-1))


def test_outputs_that_a_problem_changes_in_place() -> None:
    """The step is right, and the ratio, which would be that at the changed outputs, is not told."""
    trainer, plain = _trainer(problem=_InPlace()), _trainer(problem=metapl.PseudoLabels(temperature=0.5))
    plain.step(*_batch())
    assert math.isnan(trainer.step(*_batch()).feedback_ratio)
    for p, other in zip(trainer.teacher.parameters(), plain.teacher.parameters(), strict=True):
        torch.testing.assert_close(p, other)
    with pytest.raises(metapl.MetaplError, match="changed in place"):
        _trainer(problem=_InPlace(), feedback_ratio=0.5).step(*_batch())


class _Fused(torch.autograd.Function):
    """A cross entropy that keeps its gradient and scales it in place in its backward, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            again = z.detach().requires_grad_()
            loss = nn.functional.cross_entropy(again, y)
            (ctx.g,) = torch.autograd.grad(loss, again)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return ctx.g.mul_(g), None


class _Plain:
    name = "halved"

    def __call__(self, teacher: nn.Module, *, labeled: Any, unlabeled: Any, signal: Any, step: int) -> Tensor:
        return 0.5 * self.of(2 * teacher(labeled[0]), labeled[1])

    def of(self, z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z, y)


class _OfFused(_Plain):
    def of(self, z: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = _Fused.apply(z, y)
        return loss


@pytest.mark.parametrize("options", [{}, {"feedback_weight": 0.3}, {"feedback_ratio": 0.5}], ids=str)
def test_no_operation_of_a_loss_runs_backward_twice(options: dict[str, float]) -> None:
    """Such as one that scales what it keeps in place, which would be scaled again."""
    fused, plain = (
        _moved(teacher_losses=(loss,), **options)
        for loss in (_OfFused(), _Plain())  # type: ignore[arg-type]
    )
    torch.testing.assert_close(fused[0], plain[0])
    assert fused[1] == pytest.approx(plain[1])
