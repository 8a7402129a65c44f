"""Several student steps looked ahead, against double backward through all, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from faults import FAULTS_AHEAD
from problems_zoo import (
    CLASSES,
    OPTIMISERS,
    STUDENTS,
    Toy,
    gradient,
    product,
    toy,
    trainer_for,
    unmoved,
    values,
    warm,
)
from reference import error
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import metapl
from metapl import Lookahead, MetaplError
from metapl.ablation.cost import peak_bytes
from metapl.feedback import Forward, Unrolled

ESTIMATORS: dict[str, tuple[Any, str, str]] = {
    # mode, kind of labels, what the reference differentiates
    "unrolled": ("unrolled", "soft", "soft"),
    "forward": ("forward", "soft", "soft"),
    "forward_hard": ("forward", "hard", "expected"),
    "every second kept": (Forward(keep_every=2), "soft", "soft"),
    "every third kept": (Forward(keep_every=3), "soft", "soft"),
}
UPDATES = ["torch_sgd_nesterov", "torch_adam_amsgrad", "torch_adamw", "torchopt_clip_momentum"]


def batches(steps: int, problem: Toy, views: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    like, _ = problem.labeled

    def inputs() -> Tensor:
        return torch.randn(4, *like.shape[1:], generator=generator, dtype=like.dtype)

    if views:
        return [(inputs(), inputs()) for _ in range(steps)]
    return [inputs() for _ in range(steps)]


def check(
    estimator: str,
    problem: Toy,
    optimiser: str,
    inner_batches: list[Any],
    warmed: int = 2,
    tolerance: float = 1e-8,
) -> None:
    mode, kind, kind_of_reference = ESTIMATORS[estimator]
    rule = OPTIMISERS[optimiser]
    inner, inner_state, rule_state = warm(problem, rule, warmed)
    problem.draw_from_start()
    expected = reference.several_steps(
        **problem.networks(),
        outer=problem.labeled,
        batches=inner_batches,
        rule=rule.rule,
        state=rule_state,
        kind=kind_of_reference,
    )
    random_state = torch.get_rng_state()
    problem.draw_from_start()
    optimizers_of_torch = [inner] if rule.torch_class else []
    with unmoved(problem, *optimizers_of_torch, generator=False):
        result = gradient(
            problem,
            mode,
            inner_batches,
            problem=metapl.PseudoLabels(kind=kind),
            inner_optimizer=inner,
            inner_state=inner_state,
        )
    tolerance = max(tolerance, rule.tolerance)
    assert isinstance(result.feedback, tuple)
    for h, g in zip(result.feedback, expected.signal_grads, strict=True):
        assert error(h, -g) < tolerance
    assert error(result.grads, expected.grads) < tolerance
    assert error(result.student_params, expected.student_params) < tolerance
    assert error(result.outer_loss, expected.outer_loss) < tolerance
    assert torch.equal(torch.get_rng_state(), random_state)
    next_state = [t for t in pytree.tree_leaves(result.inner_state) if isinstance(t, Tensor)]
    assert not any(t.requires_grad for t in next_state), "it keeps the graphs of all calls before"


@pytest.mark.parametrize(
    ("estimator", "steps", "student", "optimiser"),
    product(ESTIMATORS, (1, 2, 5), STUDENTS, UPDATES, usual=[*ESTIMATORS, 2, "mlp", "torch_adamw"]),
)
def test_the_feedback_on_every_step_is_exact(
    estimator: str, steps: int, student: str, optimiser: str
) -> None:
    problem = toy(student)
    check(estimator, problem, optimiser, batches(steps, problem))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_update_from_its_first_step_on(optimiser: str) -> None:
    problem = toy("mlp")
    check("forward", problem, optimiser, batches(3, problem), warmed=0)


@pytest.mark.parametrize("kind", [Forward, Unrolled])
def test_truncation_differentiates_the_last_steps_alone(kind: Any) -> None:
    problem = toy("mlp")
    inner_batches = batches(4, problem)
    inner = OPTIMISERS["torch_adamw"].build(problem.student)
    complete = gradient(problem, kind(), inner_batches, inner_optimizer=inner)
    last_two = gradient(problem, kind(truncate=2), inner_batches, inner_optimizer=inner)
    more_than_all = gradient(problem, kind(truncate=9), inner_batches, inner_optimizer=inner)
    assert all(not h.any() for h in last_two.feedback[:2])
    for h, expected in zip(last_two.feedback[2:], complete.feedback[2:], strict=True):
        assert error(h, expected) < 1e-12
    assert error(more_than_all.grads, complete.grads) < 1e-12
    for truncate in (-1, 1.5):
        with pytest.raises(MetaplError):
            kind(truncate=truncate)


@pytest.mark.parametrize(
    ("mode", "optimiser"),
    product(
        ("forward", "unrolled", "none"),
        ("torch_sgd_nesterov", "torch_adamw", "torchopt_sgd_nesterov"),
        usual=["forward", "torch_adamw"],
    ),
)
def test_the_student_takes_all_the_steps_and_the_teacher_one(mode: str, optimiser: str) -> None:
    problem = toy("batch_norm")
    inner_batches = batches(3, problem)
    rule = OPTIMISERS[optimiser]
    weights_before = values(problem.teacher)
    expected = reference.several_steps(
        **problem.networks(), outer=problem.labeled, batches=inner_batches, rule=rule.rule
    )
    trainer = trainer_for(
        problem,
        mode,
        inner_optimizer=rule.build(problem.student),
        outer_optimizer=torch.optim.SGD(problem.teacher.parameters(), lr=0.5),
        teacher_losses=(),
    )
    report = trainer.step(problem.labeled, Lookahead(inner_batches))
    assert error(dict(problem.student.named_parameters()), expected.student_params) < 1e-9
    # The running statistics move once a student step.
    assert int(problem.student[1].num_batches_tracked) == 3
    gradients = {}
    for name, p in problem.teacher.named_parameters():
        gradients[name] = (weights_before[name] - p.detach()) / 0.5
    if mode == "none":
        assert not any(t.any() for t in gradients.values())
    else:
        assert error(gradients, expected.grads) < 1e-9
    assert isinstance(report.feedback, tuple)
    assert len(report.feedback) == 3
    assert report.as_dict()["inner_loss"] > 0
    second_report = trainer.step(problem.labeled, Lookahead(inner_batches))
    assert second_report.step == 1


def test_a_verified_step_calls_the_function_of_a_look_ahead_once_for_each_batch() -> None:
    calls: list[int] = []
    inner = batches(3, toy())

    def batch_of(number: int) -> Tensor:
        calls.append(number)
        return inner[number]

    problem = toy()
    trainer = metapl.BilevelTrainer(
        problem.teacher, problem.student, "forward", problem=metapl.PseudoLabels(kind="soft")
    )
    report = trainer.step(problem.labeled, Lookahead(batch_of, steps=3))
    assert trainer.verification.verdict.startswith("right")
    assert calls == [0, 1, 2]
    assert len(report.feedback) == 3


def test_keeping_few_steps_takes_less_memory_where_the_weights_are_most_of_it() -> None:
    """32 steps of a network with many weights for few examples."""
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Linear(8, 500), nn.Tanh(), nn.Linear(500, 4)) for _ in range(2)
    )
    data = {
        "outer": (torch.randn(2, 8), torch.tensor([0, 3])),
        "inner": Lookahead([torch.randn(2, 8) for _ in range(32)]),
        "inner_optimizer": torch.optim.Adam(student.parameters(), lr=1e-3, eps=1e-3),
    }

    def peak_bytes_of(mode: Forward) -> int:
        return peak_bytes(
            # The first call for a network would verify, which takes memory of its own.
            lambda: metapl.hypergradient(teacher, student, **data, mode=mode, verify=False),
            torch.device("cpu"),
        )

    # The first call in a process keeps the numbers by which it knows states again.
    peak_bytes_of(Forward(keep_every=6))
    assert peak_bytes_of(Forward(keep_every=6)) < 0.6 * peak_bytes_of(Forward())


def test_fit_draws_as_many_batches_as_are_looked_ahead() -> None:
    problem = toy("mlp")
    inner_batches = batches(6, problem)
    trainer = trainer_for(problem, lookahead=3)
    result = trainer.fit(
        [problem.labeled] * 2,
        inner_batches,
        steps=5,
        progress=False,
        log_every=1,
        schedule="constant",
    )
    assert len(result.history) == 5

    twin = toy("mlp")
    trainer_by_hand = trainer_for(twin, lookahead=3)
    for t in range(5):
        batches_of_step = [inner_batches[(3 * t + k) % 6] for k in range(3)]
        trainer_by_hand.step(twin.labeled, Lookahead(batches_of_step))
    torch.testing.assert_close(
        [*problem.teacher.parameters()], [*twin.teacher.parameters()], rtol=1e-12, atol=1e-14
    )


class Branches(nn.Module):
    """Two heads, of which the first entry of the first input tells which one is read.

    A third layer is never read.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(5, CLASSES) for _ in range(2)])
        self.idle = nn.Linear(2, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[int(x.flatten()[0] > 0)](self.body(x))


@pytest.mark.parametrize("order", ["11", "10", "010"])
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_parameters_that_some_of_the_steps_do_not_reach(mode: str, order: str) -> None:
    """Such a step leaves weight and momentum alone, as torch.optim does, weight decay and all."""
    base = toy("mlp")
    problem = Toy(base.teacher, Branches(), base.labeled, None, 0)
    inner_batches = batches(len(order), problem)
    # The sign of its first number says which branch a batch takes.
    for x, branch in zip([*inner_batches, problem.labeled[0]], [*order, "1"], strict=True):
        x.view(-1)[0] = 1.0 if branch == "1" else -1.0

    def rule(params: Any, grads: Any, state: Any) -> Any:
        moved = dict(params)
        velocity = dict(state or {})
        for name, g in grads.items():
            if g is None:
                continue
            direction = g + 0.1 * params[name]
            if name in velocity:
                velocity[name] = 0.9 * velocity[name] + 0.8 * direction
            else:
                velocity[name] = direction
            moved[name] = params[name] - 0.3 * velocity[name]
        return moved, velocity

    expected = reference.several_steps(
        **problem.networks(), outer=problem.labeled, batches=inner_batches, rule=rule
    )
    sgd = torch.optim.SGD(
        problem.student.parameters(), lr=0.3, momentum=0.9, dampening=0.2, weight_decay=0.1
    )
    result = gradient(problem, mode, inner_batches, inner_optimizer=sgd)
    assert error(result.grads, expected.grads) < 1e-9
    assert error(result.student_params, expected.student_params) < 1e-9


class Confident(metapl.PseudoLabels):
    """Labels that count as far as the student, which the problem holds, is sure of its own."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def signal(self, teacher: nn.Module, batch: Any, *args: Any, **options: Any) -> Any:
        signal = super().signal(teacher, batch, *args, **options)
        confidence = self.student(batch).detach().softmax(1).amax(1, keepdim=True)
        return metapl.Signal(signal.value * confidence)


@pytest.mark.parametrize("mode", ["forward", "unrolled", "none"])
def test_a_signal_that_reads_the_student_reads_it_as_it_is_in_the_step(mode: str) -> None:
    problem = toy("mlp")
    inner_batches = batches(3, problem)
    sgd = torch.optim.SGD(problem.student.parameters(), lr=0.5)
    confident = Confident(problem.student)
    result = gradient(problem, mode, inner_batches, problem=confident, inner_optimizer=sgd)
    # Three plain steps by hand.
    for x in inner_batches:
        z = problem.student(x)
        confidence = z.detach().softmax(1).amax(1, keepdim=True)
        labels = problem.teacher(x).softmax(1).detach() * confidence
        sgd.zero_grad()
        (-labels * z.log_softmax(1)).sum(1).mean().backward()
        sgd.step()
    for name, p in problem.student.named_parameters():
        torch.testing.assert_close(result.student_params[name], p.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fault", FAULTS_AHEAD)
def test_planted_faults_are_seen(fault: str) -> None:
    problem = toy("mlp")
    with pytest.MonkeyPatch.context() as patch:
        FAULTS_AHEAD[fault](patch)
        with pytest.raises(AssertionError):
            check("forward", problem, "torch_sgd_nesterov", batches(3, problem))
