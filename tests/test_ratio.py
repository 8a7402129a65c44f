"""feedback_ratio sets the size of the feedback beside the teacher's own losses, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
