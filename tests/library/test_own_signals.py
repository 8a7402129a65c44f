"""Signals of a user's own problem: of which of their tensors, and of which weights, h speaks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from problems_zoo import Toy, unmoved
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metapl
from metapl import MetaplError, Signal
from metapl.guards.verification import VerificationWarning
from metapl.problems import Table

C = 3
OUTER = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)), torch.arange(9) % C
INNER = torch.randn(12, 4, generator=torch.Generator().manual_seed(2)), torch.arange(12) % C


class Weighed(metapl.BilevelProblem):
    """Weights of examples with labels of their own."""

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        return Signal(teacher(batch[0])[:, 0].sigmoid())

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value * F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.fixture(autouse=True)
def in_float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def cast(batch: Any) -> Any:
    return batch[0].double(), batch[1]


def checked(problem: Any, teacher: nn.Module, **options: Any) -> Any:
    student = nn.Linear(4, C)
    batches = {"outer": cast(OUTER), "inner": cast(INNER)}
    return metapl.check_gradient(
        teacher,
        student,
        problem=problem,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        **{**batches, **options},
    )


class PenaltyOfOutputs(Weighed):
    """A soft signal whose outputs the loss reads too."""

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        of_teacher = teacher(batch[0])
        return Signal(of_teacher[:, 0].sigmoid(), outputs=of_teacher)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        assert signal.outputs is not None
        penalties = signal.outputs[:, 1] ** 2 * outputs.square().mean(1)
        return super().inner_loss(outputs, signal, batch) + penalties


@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference"])
def test_a_soft_signals_outputs_count_where_the_loss_reads_them(mode: str) -> None:
    teacher = nn.Linear(4, 2)
    assert checked(PenaltyOfOutputs(), teacher, mode=mode).status == "right"
    student = nn.Linear(4, C)
    parameters = dict(student.named_parameters())
    problem = PenaltyOfOutputs()
    inner, outer = cast(INNER), cast(OUTER)
    signal = problem.signal(teacher, inner, None, generator=None)
    loss = problem.inner_loss(student(inner[0]), signal, inner).mean()
    g = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    moved = {name: p - 0.1 * t for (name, p), t in zip(parameters.items(), g, strict=True)}
    outer_loss = F.cross_entropy(functional_call(student, moved, (outer[0],)), outer[1])
    expected = torch.autograd.grad(outer_loss, teacher.weight)[0]
    found = metapl.hypergradient(
        teacher,
        student,
        outer=outer,
        inner=inner,
        mode=mode,
        problem=problem,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
    )
    tolerance = 1e-4 if mode == "difference" else 1e-12
    torch.testing.assert_close(found.grads["weight"], expected, rtol=tolerance, atol=1e-12)


class Drawn(metapl.BilevelProblem):
    """Drawn labels, and a trust in each that the teacher gives beside them."""

    def __init__(self, *, is_detached: bool = False) -> None:
        self.is_detached = is_detached

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        of_teacher = teacher(batch[0])
        log_p = of_teacher[:, :C].log_softmax(1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_prob = log_p.gather(1, drawn)[:, 0]
        return Signal(drawn[:, 0], log_prob=log_prob, probs=log_p.exp(), outputs=of_teacher)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        assert signal.outputs is not None
        trust = signal.outputs[:, C].sigmoid()
        if self.is_detached:
            trust = trust.detach()
        if signal.value.is_floating_point():
            losses = -(signal.value * outputs.log_softmax(1)).sum(1)
        else:
            losses = F.cross_entropy(outputs, signal.value, reduction="none")
        return trust * losses

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("mode", ["forward", "reinforce", "reinforce_per_example", "difference"])
def test_what_a_loss_reads_beside_drawn_labels_is_refused_and_the_advice_runs(mode: str) -> None:
    options = {"mode": mode, "outer": cast(OUTER), "inner": cast(INNER)}
    check = checked(Drawn(), nn.Linear(4, C + 1), **options)
    assert check.status == "refused"
    assert "reads outputs of a signal of drawn labels" in check.verdict
    assert checked(Drawn(is_detached=True), nn.Linear(4, C + 1), **options).status == "right"


class Held(Weighed):
    """Weights that a layer of the problem's own, which no optimizer has, makes too."""

    def __init__(self) -> None:
        self.scale = nn.Linear(4, 1)

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        return Signal((self.scale(batch[0]) * teacher(batch[0]))[:, 0].sigmoid())


def test_a_signal_of_weights_that_nothing_learns_is_refused_and_the_advice_runs() -> None:
    problem = Held()
    teacher, student = nn.Linear(4, 1), nn.Linear(4, C)
    trainer = metapl.BilevelTrainer(teacher, student, problem=problem)
    with (
        unmoved(Toy(teacher, student, cast(OUTER), cast(INNER), 0)),
        pytest.raises(MetaplError, match=re.escape("scale.weight, scale.bias of neither")),
    ):
        trainer.step(cast(OUTER), cast(INNER))
    assert problem.scale.weight.grad is None
    problem.scale.requires_grad_(requires_grad=False)
    trainer.step(cast(OUTER), cast(INNER))


class Root(Weighed):
    """Weights that have no derivative at 0, where the teacher begins."""

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        return Signal(1 + teacher(torch.arange(len(batch[0]))).abs().sqrt())


def test_a_signal_whose_gradient_is_nan_is_refused_before_the_teacher_moves() -> None:
    teacher, student = Table(torch.zeros(12)), nn.Linear(4, C)
    trainer = metapl.BilevelTrainer(teacher, student, problem=Root())
    toy = Toy(teacher, student, cast(OUTER), cast(INNER), 0)
    with unmoved(toy), pytest.raises(MetaplError, match="no derivative here"):
        trainer.step(cast(OUTER), cast(INNER))


class Sharpened(metapl.BilevelProblem):
    """The student's own labels, sharpened by a number of the teacher."""

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        return Signal((teacher.weight[0, 0].exp() * outputs).softmax(1))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return F.cross_entropy(outputs, signal.value, reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_what_later_signals_take_from_the_student_is_said_to_be_left_out(mode: str) -> None:
    inner = cast(INNER)[0]
    teacher = nn.Linear(4, 1)
    one = checked(Sharpened(), teacher, mode=mode, inner=inner)
    assert one.status == "right", str(one)
    two = checked(Sharpened(), teacher, mode=mode, inner=metapl.Lookahead([inner] * 2))
    assert two.status == "allowed", str(two)
    assert "the signals are made of the student's outputs" in two.verdict


class ByConfidence(Weighed):
    """Weights by how sure the student is, without a teacher."""

    has_teacher = False

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        return Signal(outputs.softmax(1).amax(1))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("problem", [ByConfidence(), metapl.problems.EqualWeights()])
def test_what_a_signal_takes_from_the_start_is_said_to_be_left_out(
    problem: metapl.BilevelProblem, steps: int
) -> None:
    student = nn.Linear(4, C)
    inner = cast(INNER)

    def in_start() -> None:
        metapl.hypergradient(
            None,
            student,
            outer=cast(OUTER),
            inner=inner if steps == 1 else metapl.Lookahead([inner] * steps),
            problem=problem,
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            wrt="start",
        )

    if isinstance(problem, ByConfidence):
        with pytest.warns(VerificationWarning, match="or the start, do to a signal is left out"):
            in_start()
    else:
        in_start()


class OfOuterLoss(Weighed):
    """A problem with another outer loss, by a function of outputs and labels."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        return self.loss(outputs, batch[1])


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (
            lambda z, y: F.cross_entropy(z, y).detach(),
            "the outer loss has no gradient in the student",
        ),
        (
            lambda z, y: (z.argmax(1) == y).double().mean(),
            "the outer loss has no gradient in the student",
        ),
        (
            lambda z, y: (F.cross_entropy(z, y, reduction="sum"), z.square().sum()),
            "the weight of the problem's outer_loss is .* expected a scalar without a gradient",
        ),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_an_outer_loss_that_gives_no_gradient_is_named(
    loss: Any, text: str, *, verify: bool
) -> None:
    teacher, student = nn.Linear(4, 1), nn.Linear(4, C)
    trainer = metapl.BilevelTrainer(teacher, student, problem=OfOuterLoss(loss), verify=verify)
    with pytest.raises(MetaplError, match=text):
        trainer.step(cast(OUTER), cast(INNER))


class WithoutOptimizer(Weighed):
    def default_outer_optimizer(self, teacher: nn.Module) -> Any:
        return 0.1


def test_what_a_problem_returns_for_an_optimizer_is_named() -> None:
    with pytest.raises(MetaplError, match="outer_optimizer is of type float"):
        metapl.BilevelTrainer(nn.Linear(4, 1), nn.Linear(4, C), problem=WithoutOptimizer())


class OfStudentsWeights(Weighed):
    """Weights by a weight of the student itself, without a teacher."""

    has_teacher = False

    def __init__(self, student: nn.Linear) -> None:
        self.student = student

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        return Signal(self.student.bias[batch[1]].exp())


def call_without_teacher(problem: Any, student: nn.Module, wrt: Any) -> Any:
    return metapl.hypergradient(
        None,
        student,
        outer=cast(OUTER),
        inner=cast(INNER),
        problem=problem,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        wrt=wrt,
    )


def test_without_a_teacher_a_signal_of_the_students_weights_is_verified() -> None:
    student = nn.Linear(4, C)
    found = call_without_teacher(OfStudentsWeights(student), student, "lr")
    assert found.settings["lr"].isfinite().all()


@pytest.mark.parametrize("wrt", ["start", "lr", ["teacher", "start"]])
def test_a_start_before_a_step_that_is_revised_is_refused(wrt: Any) -> None:
    """The loss that is returned is that of the revised step."""
    with pytest.raises(MetaplError, match="which revises its signal"):
        call_without_teacher(metapl.problems.LearningToReweight(), nn.Linear(4, C), wrt)


@pytest.mark.parametrize("wrt", [None, 3])
def test_a_wrt_that_is_no_name_is_refused(wrt: Any) -> None:
    with pytest.raises(MetaplError, match="expected a name, or a list of names"):
        call_without_teacher(metapl.problems.EqualWeights(), nn.Linear(4, C), wrt)


def test_what_is_no_look_ahead_is_named_with_the_way_out() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*cast(INNER)))
    with pytest.raises(MetaplError, match=r"a Lookahead are of type DataLoader.*\[\*loader\]"):
        metapl.Lookahead(loader)  # type: ignore[arg-type]
    with pytest.raises(MetaplError, match="a Lookahead of 3 steps are a list of 1"):
        metapl.Lookahead([1], steps=3)
