"""What verification names as the cause of a gradient that is off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import Lookahead, MetaplError, Signal
from metapl.feedback import Difference, Forward

OUTER = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
U = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
OUTSIDE = {"calls": 0}


class Growing(metapl.BilevelProblem):
    """Losses or signals that grow with each call, by a count in the problem or outside of it."""

    def __init__(self, growing: str, *, holds_count: bool) -> None:
        self.growing = growing
        self.held = {"calls": 0} if holds_count else None

    def factor(self, function: str) -> float:
        if self.growing != function:
            return 1.0
        count = OUTSIDE if self.held is None else self.held
        count["calls"] += 1
        return 1 + 0.1 * count["calls"]

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        return Signal(self.factor("signal") * teacher(batch).softmax(-1))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return -self.factor("inner_loss") * (signal.value * outputs.log_softmax(-1)).sum(-1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.factor("outer_loss") * F.cross_entropy(outputs, batch[1])


def verdict_of(problem: metapl.BilevelProblem, mode: Any = "forward", **options: Any) -> str:
    torch.manual_seed(2)
    teacher = getattr(problem, "teacher", nn.Linear(4, 3))
    student = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    arguments: dict[str, Any] = {
        "outer": OUTER,
        "inner": U,
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        **options,
    }
    return str(metapl.check_gradient(teacher, student, problem=problem, mode=mode, **arguments))


@pytest.mark.parametrize(
    ("loss", "mode", "options"),
    [
        ("inner_loss", "difference", {}),
        ("inner_loss", "forward", {"accumulate": 2}),
        ("inner_loss", "forward", {"inner": Lookahead([U, U])}),
        ("outer_loss", "forward", {"accumulate": 2}),
    ],
)
@pytest.mark.parametrize("holds_count", [True, False])
def test_a_loss_that_changes_is_the_problems(
    loss: str, mode: str, options: dict[str, Any], *, holds_count: bool
) -> None:
    verdict = verdict_of(Growing(loss, holds_count=holds_count), mode, **options)
    assert verdict.startswith("refused")
    if not holds_count and "two equal steps differ" in verdict:
        assert f"first in the {loss.replace('_', ' ')} of Growing" in verdict
        return
    state = "state of the problem (held.calls)" if holds_count else "state outside of buffers"
    assert f"{loss} of Growing returns another value when it is called again" in verdict
    assert state in verdict
    assert "moves in the teacher" not in verdict


def test_state_that_moves_once_in_a_step_is_right() -> None:
    for growing in ("signal", "inner_loss", "outer_loss"):
        assert verdict_of(Growing(growing, holds_count=True)).startswith("right")


@pytest.mark.parametrize(
    ("growing", "words"),
    [
        ("signal", "the signal of Growing, or the teacher"),
        ("inner_loss", "the inner loss of Growing"),
        ("outer_loss", "the outer loss of Growing"),
    ],
)
def test_what_differs_in_two_equal_steps_is_named(growing: str, words: str) -> None:
    verdict = verdict_of(Growing(growing, holds_count=False))
    assert f"two equal steps differ, first in {words}" in verdict


def test_numpy_in_a_signal_is_refused_where_the_step_is_mapped() -> None:
    trainer = metapl.BilevelTrainer(
        nn.Linear(4, 3), nn.Linear(4, 3), problem=Remembering(), teacher_losses=(), verify=False
    )
    step, state = trainer.functional()
    states = metapl.functional.stack([state, state])
    mapped = torch.func.vmap(step, in_dims=(0, None, None))
    with pytest.raises(MetaplError, match="as one function, the inner loss is .* off"):
        mapped(states, OUTER, U)


class Tempered(Growing):
    """An outer loss with a temperature of the teacher."""

    def __init__(self, detaches: bool = False) -> None:
        super().__init__("nothing", holds_count=True)
        torch.manual_seed(3)
        self.teacher = nn.Linear(4, 3)
        self.detaches = detaches

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        q = teacher(batch).softmax(-1)
        return Signal(q * q.detach() if self.detaches else q)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs * self.teacher.bias.exp(), batch[1])


@dataclass(frozen=True)
class WithoutTerm(Forward):
    name: ClassVar[str] = "without_term"
    has_direct_term: ClassVar[bool] = False  # type: ignore[misc]


@dataclass(frozen=True)
class DifferenceWithoutTerm(Difference):
    name: ClassVar[str] = "difference_without_term"
    has_direct_term: ClassVar[bool] = False  # type: ignore[misc]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("mode", [WithoutTerm(), DifferenceWithoutTerm()])
def test_a_direct_term_that_is_left_out_is_named(mode: Any, steps: int) -> None:
    if steps > 1 and mode.takes_differences:
        pytest.skip("it takes one step")
    inner: Any = U if steps == 1 else Lookahead([U] * steps)
    verdict = verdict_of(Tempered(), mode, inner=inner)
    assert verdict.startswith("allowed")
    assert f"mode {mode.name!r} leaves out that direct term" in verdict
    # Where the signal is off too, the term is not the cause alone.
    assert "the signal is detached in part" in verdict_of(Tempered(detaches=True), mode)


def test_implicit_is_right_with_a_direct_term() -> None:
    verdict = verdict_of(Tempered(), metapl.feedback.Implicit(damping=1.0))
    assert "gives the derivative that it approximates" in verdict
    assert "the direct term, along the gradient" in verdict


MEAN = np.ones(3)


class Remembering(Growing):
    """Keeps a running mean of NumPy's in a global, which no copy of the problem has."""

    def __init__(self) -> None:
        super().__init__("nothing", holds_count=True)

    def signal(self, *arguments: Any, **options: Any) -> Signal:
        signal = super().signal(*arguments, **options)
        logits = signal.value
        np.copyto(MEAN, MEAN / 2 + logits.detach().mean(0).double().numpy() + 1)
        return Signal(logits * torch.from_numpy(MEAN).to(logits))


def test_a_running_mean_outside_of_buffers_is_named() -> None:
    verdict = verdict_of(Remembering())
    assert "first in the signal of Remembering, or the teacher" in verdict
    assert "state outside of buffers that a call writes" in verdict
    assert "expected draws by torch, and what moves in a buffer of the teacher" in verdict
