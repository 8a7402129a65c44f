"""The cost of a step of each mode in student forward passes, and the page that has it."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import metapl
from metapl.execution.numerics import full_float32, reduced_float32
from metapl.feedback import Difference, Estimator, Implicit

ROOT = Path(__file__).parents[2]
BEGIN = "<!-- modes:begin -->"
END = "<!-- modes:end -->"
BOUNDS: list[tuple[str | Estimator, float]] = [
    ("none", 6.1),
    ("loss_difference", 8.1),
    ("reinforce", 9.1),
    (Difference(one_sided=True), 10.1),
    ("difference", 11.1),
    ("forward", 12.1),
    ("reinforce_per_example", 12.1),
    ("unrolled", 13.2),
    (Implicit(solver="identity"), 12.1),
    (Implicit(iterations=2, damping=1e5), 27.2),
]


@cache
def passes(
    mode: str | Estimator,
    has_losses: bool = False,
    by_weight: bool = False,
    problem: Callable[[nn.Module], metapl.BilevelProblem] | None = None,
) -> float:
    """Return the FLOPs of a step over those of a forward pass of the student.

    The batches are equal, and the step is not the first.
    """
    torch.manual_seed(0)
    teacher, student = (metapl.models.wide_resnet(10, 1) for _ in range(2))
    unlabeled, labeled = torch.randn(2, 3, 8, 8), (torch.randn(2, 3, 8, 8), torch.tensor([3, 7]))
    losses = (metapl.CrossEntropy(),) if has_losses else ()
    weight = 1.0 if by_weight else None
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        problem=None if problem is None else problem(teacher),
        teacher_losses=losses,
        feedback_weight=weight,
        verify=False,
    )
    trainer.step(labeled, unlabeled)
    with FlopCounterMode(display=False) as step:
        trainer.step(labeled, unlabeled)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        student(unlabeled)
    return step.get_total_flops() / forward.get_total_flops()


@pytest.mark.parametrize(("mode", "bound"), BOUNDS, ids=str)
def test_a_step_costs_no_more_passes_than_stated(mode: str | Estimator, bound: float) -> None:
    assert passes(mode) <= bound


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_the_default_size_of_the_feedback_takes_no_pass_more_than_a_weight(mode: str) -> None:
    """Feedback and own losses go through passes of the teacher of their own.

    So two gradients cost as much as one.
    """
    by_bound = passes(mode, has_losses=True)
    assert by_bound > passes(mode)
    assert by_bound == pytest.approx(passes(mode, has_losses=True, by_weight=True), rel=1e-3)


def test_the_cost_of_implicit_is_what_the_table_of_the_documentation_says() -> None:
    page = (ROOT / "docs" / "studies" / "modes.md").read_text()
    (fixed, per_iteration) = re.findall(
        r"^\| `implicit` \|.*\| (\d+) \+ (\d+) n \|", page, re.MULTILINE
    )[0]
    (alone,) = re.findall(r'and (\d+) passes in all with `solver="identity"`', page)
    assert passes(Implicit(solver="identity")) == pytest.approx(int(alone), abs=0.2)
    assert passes(Implicit(iterations=2, damping=1e5)) == pytest.approx(
        int(fixed) + 2 * int(per_iteration), abs=0.2
    )


def test_the_table_of_the_documentation_has_every_mode() -> None:
    page = (ROOT / "docs" / "studies" / "modes.md").read_text().split(BEGIN)[1].split(END)[0]
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == set(metapl.MODES)


def test_every_mode_has_a_bound() -> None:
    names = {mode if isinstance(mode, str) else mode.name for mode, _ in BOUNDS}
    # The direct term is of problems whose outer loss reads the teacher.
    assert names == {*metapl.MODES} - {"direct"}


class Tempered(metapl.BilevelProblem):
    """Pseudo-labels whose outer loss has a temperature, which is the teacher's."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> metapl.Signal:
        return metapl.Signal(teacher(batch).softmax(-1))

    def inner_loss(
        self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None
    ) -> Tensor:
        return -(signal.value * outputs.log_softmax(-1)).sum(-1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        temperature = next(self.teacher.parameters()).exp().mean()
        return nn.functional.cross_entropy(outputs * temperature, batch[1])


def test_the_direct_term_costs_a_forward_pass() -> None:
    assert passes("direct", problem=Tempered) - passes("none") == pytest.approx(1, abs=0.1)


def _settings() -> list[object]:
    cuda = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    cpu = torch.backends.mkldnn
    return [
        *(
            switch.fp32_precision
            for switch in (cuda, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn)
        ),
        torch.get_float32_matmul_precision(),
        cuda.allow_tf32,
        cudnn.allow_tf32,
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_full_float32_puts_the_settings_back(device: str, precision: str) -> None:
    start = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        settings_before = _settings()
        with full_float32(torch.device(device)):
            assert not reduced_float32(torch.device(device))
        assert _settings() == settings_before
    finally:
        torch.set_float32_matmul_precision(start)
