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
