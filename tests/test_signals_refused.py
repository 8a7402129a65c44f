"""Signals and inner losses that would give a wrong gradient without a word are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError, Signal
from metapl.feedback import Altered, Implicit, ReinforcePerExample

ROWS, CLASSES = 12, 4


class Drawn(metapl.problems.Problem):
    """Labels drawn from the teacher's distribution."""

    def __init__(self, column: bool = False, own: torch.Generator | None = None) -> None:
        self.column, self.own = column, own

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        log_q = teacher(batch).log_softmax(-1)
        drawn = torch.multinomial(log_q.detach().exp(), 1, generator=self.own or generator)
        log_prob = log_q.gather(1, drawn)
        return Signal(drawn[:, 0], log_prob if self.column else log_prob[:, 0], outputs=log_q)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return F.cross_entropy(outputs, signal.value, reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


class Soft(Drawn):
    """The teacher's distribution, or what a function makes of it; the loss drops out."""

    def __init__(self, drop: float = 0.0, made: Any = None) -> None:
        super().__init__()
        self.drop, self.made = drop, made

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        q = teacher(batch).softmax(-1)
        return Signal(q if self.made is None else self.made(q))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        target = signal.value if signal.value.ndim else signal.value * torch.ones_like(outputs)
        return F.cross_entropy(F.dropout(outputs, self.drop), target, reduction="none")


class Continuous(Drawn):
    """A number for each example, drawn around the teacher's."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        mean = teacher(batch)[:, 0]
        drawn = (mean + torch.randn(len(batch), generator=generator)).detach()
        return Signal(drawn, -((drawn - mean) ** 2) / 2)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value.sigmoid() * outputs.logsumexp(-1)


def gradient(mode: Any, problem: Any, dtype: torch.dtype = torch.float32, **options: Any) -> metapl.Hypergradient:
    torch.manual_seed(0)
    teacher, student = nn.Linear(6, CLASSES).to(dtype), nn.Linear(6, CLASSES).to(dtype)
    optimizer = options.pop("optimizer", lambda p: torch.optim.SGD(p, lr=0.1))(student.parameters())
    return metapl.hypergradient(
        teacher,
        student,
        labeled=(torch.randn(8, 6).to(dtype), torch.arange(8) % CLASSES),
        unlabeled=torch.randn(ROWS, 6).to(dtype),
        mode=mode,
        problem=problem,
        inner_optimizer=optimizer,
        **options,
    )


def test_a_log_probability_has_the_rows_of_its_value() -> None:
    with pytest.raises(MetaplError, match=r"log_prob is a tensor of shape \(12, 1\).*expected .* of shape \(12,\)"):
        gradient("reinforce_per_example", Drawn(column=True))


@pytest.mark.parametrize("option", [{"recompute_teacher": True}, {"accumulate": 2}])
def test_labels_from_a_generator_of_the_problems_own(option: dict[str, Any]) -> None:
    with pytest.raises(MetaplError, match=r"has drawn other labels when the teacher's pass .* was repeated"):
        gradient("reinforce_per_example", Drawn(own=torch.Generator().manual_seed(3)), **option)
    given = {"generator": torch.Generator().manual_seed(3)}
    assert gradient("reinforce_per_example", Drawn(), **given, **option).feedback.shape == (ROWS,)


def test_adam_in_float16() -> None:
    with pytest.raises(MetaplError, match=r"student's weight is in float16.*expected weights in float32"):
        gradient("forward", Soft(), torch.float16, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4))
    assert gradient("reinforce", metapl.PseudoLabels(), torch.float16).feedback.ndim == 0


@pytest.mark.parametrize("mode", ["forward", "difference", "implicit"])
def test_an_inner_loss_that_draws(mode: str) -> None:
    with pytest.raises(MetaplError, match=r"inner_loss draws random numbers.*Draw them in signal"):
        gradient(mode, Soft(drop=0.01))
    assert gradient("unrolled", Soft(drop=0.01)).feedback.shape == (ROWS, CLASSES)


def test_a_signal_without_anything_to_differentiate() -> None:
    labels = Soft(made=lambda q: q.argmax(-1))
    for mode in ("forward", "difference", "unrolled", Altered()):
        with pytest.raises(MetaplError, match=r"int64.* without a log_prob, so mode .* has nothing to differentiate"):
            gradient(mode, labels)
    assert gradient("none", labels).outer_loss.isfinite()


def test_a_scalar_signal() -> None:
    scalar = Soft(made=lambda q: q.mean())
    assert gradient("forward", scalar).feedback.ndim == 0
    with pytest.raises(MetaplError, match=r"signal is a scalar.*expected accumulate=1"):
        gradient("forward", scalar, accumulate=2)
    with pytest.raises(MetaplError, match="feedback on a scalar signal; expected a signal with rows"):
        gradient(Altered(), scalar)


def test_class_means_of_numbers_are_means() -> None:
    own = gradient(ReinforcePerExample(), Continuous(), generator=torch.Generator().manual_seed(1)).feedback
    controls = gradient(
        Altered(ReinforcePerExample(), "class_means"), Continuous(), generator=torch.Generator().manual_seed(1)
    ).feedback
    assert own.std() > 0
    torch.testing.assert_close(controls, own.mean().expand_as(own))


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "2"])
def test_counts_are_whole_numbers(value: Any) -> None:
    networks = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(MetaplError, match=r"accumulate=.*: expected a number of micro-batches, 1 or more"):
        metapl.BilevelTrainer(*networks, accumulate=value)
    with pytest.raises(MetaplError, match=r"lookahead=.*: expected a number of student steps, 1 or more"):
        metapl.BilevelTrainer(*networks, mode="forward", lookahead=value)
    with pytest.raises(MetaplError, match=r"accumulate=.*: expected a number of micro-batches, 1 or more"):
        gradient("forward", Soft(), accumulate=value)


def test_an_altered_mode_runs_where_its_base_does() -> None:
    altered = Altered(Implicit(solver="identity"))
    assert (altered.one_process, altered.forward_mode) == (True, True)
    by_difference = Altered(ReinforcePerExample(tangent="difference"))
    assert (by_difference.one_process, by_difference.forward_mode) == (False, False)
