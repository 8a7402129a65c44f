"""Which calls of ``metapl.hypergradient`` are verified: the first for what it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faults import flipped_sign
from kinds import KINDS, C, TwoLayers, plain
from torch import nn

import metapl
from metapl import Lookahead, MetaplError, PseudoLabels
from metapl.functional import recorded, stack
from metapl.guards.verification import VerificationWarning, check, first_calls, verdict

X, U = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)).unbind()
OUTER = X, torch.arange(8) % C


class Networks:
    """A teacher and a student, and calls on them."""

    def __init__(self, width: int = 5, forward: Callable[..., Any] = plain) -> None:
        torch.manual_seed(1)
        self.teacher = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.1), nn.Linear(width, C))
        self.student: nn.Module = TwoLayers(forward)
        self.optimizer: Any = self.sgd()

    def sgd(self, lr: float = 0.1, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=lr, **options)

    def call(self, **options: Any) -> Any:
        arguments: dict[str, Any] = {
            "outer": OUTER,
            "inner": U,
            "inner_optimizer": self.optimizer,
            **options,
        }
        return metapl.hypergradient(self.teacher, self.student, **arguments)


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the modes of the steps that have been verified."""
    modes: list[str] = []
    verify_step = verdict.verify_step

    def noting(step: Any, mode: Any) -> Any:
        modes.append(mode.name)
        return verify_step(step, mode)

    monkeypatch.setattr(verdict, "verify_step", noting)
    return modes


def test_the_first_call_is_verified(verified: list[str]) -> None:
    networks = Networks()
    networks.call(verify=False)
    networks.call(mode="none")
    assert verified == []
    networks.call()
    networks.call()
    assert verified == ["forward"]


def test_another_student_of_one_architecture_is_known(verified: list[str]) -> None:
    networks = Networks()
    networks.call()
    for rate in (0.1, 0.5):
        networks.student = copy.deepcopy(networks.student)
        with torch.no_grad():
            networks.student.a.weight.mul_(2)
        networks.optimizer = networks.sgd(rate)
        networks.call()
        Networks().call()
    assert len(verified) == 1


class ByPartOfTeacher(metapl.BilevelProblem):
    """Weights of examples, judged by an outer loss that reads a part of the teacher."""

    def __init__(self, teacher: nn.Sequential) -> None:
        self.part = teacher[0]

    def signal(
        self, teacher: Any, batch: Any, outputs: Any, *, generator: Any = None
    ) -> metapl.Signal:
        return metapl.Signal(teacher(batch[0]).softmax(1)[:, 0])

    def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Any:
        losses = nn.functional.cross_entropy(outputs, batch[1], reduction="none")
        return signal.value * losses

    def outer_loss(self, outputs: Any, batch: Any) -> Any:
        scale = self.part.weight.sum().exp()
        return nn.functional.cross_entropy(scale * outputs, batch[1])


def test_a_problem_that_holds_a_part_of_the_teacher_is_known(verified: list[str]) -> None:
    """It is told by its number among the parts, also with another teacher."""
    gradients = []
    for number in range(4):
        networks = Networks()
        with torch.no_grad():
            networks.teacher[2].weight.mul_(1 + number // 2)
        problem = ByPartOfTeacher(networks.teacher)
        gradients.append(networks.call(inner=OUTER, problem=problem))
    assert len(verified) == 1
    for one, two in ((0, 1), (2, 3)):
        assert torch.equal(gradients[one].grads["2.weight"], gradients[two].grads["2.weight"])
    assert not torch.equal(gradients[0].grads["2.weight"], gradients[2].grads["2.weight"])
    # The same with another part is another problem.
    networks = Networks()
    problem = ByPartOfTeacher(networks.teacher)
    problem.part = networks.teacher[2]
    networks.call(inner=OUTER, problem=problem)
    assert len(verified) == 2


def evaluate(networks: Networks) -> None:
    networks.student.eval()


def freeze(networks: Networks) -> None:
    networks.student.a.requires_grad_(requires_grad=False)


def give_momentum(networks: Networks) -> None:
    networks.optimizer = networks.sgd(momentum=0.9)


def give_adam(networks: Networks) -> None:
    networks.optimizer = torch.optim.Adam(networks.student.parameters())


def widen_teacher(networks: Networks) -> None:
    networks.teacher = Networks(width=6).teacher


def hook(networks: Networks) -> None:
    networks.student.a.register_forward_hook(lambda part, inputs, outputs: 2 * outputs)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (evaluate, {}),
        (freeze, {}),
        (give_momentum, {}),
        (give_adam, {}),
        (widen_teacher, {}),
        (hook, {}),
        (None, {"mode": "unrolled"}),
        (None, {"mode": metapl.feedback.Forward(by="tangent")}),
        (None, {"accumulate": 2}),
        (None, {"clip_norm": 1.0}),
        (None, {"inner": Lookahead([U, U])}),
        (None, {"wrt": ("teacher", "lr")}),
        (None, {"problem": PseudoLabels(temperature=2.0)}),
        (None, {"verify": "warn"}),
    ],
)
def test_what_computes_something_else_is_verified(
    verified: list[str], change: Callable[[Networks], None] | None, options: dict[str, Any]
) -> None:
    networks = Networks()
    networks.call()
    if change is not None:
        change(networks)
    networks.call(**options)
    networks.call(**options)
    assert len(verified) == 2


def scaled_by_a_closure(factor: Any) -> Callable[..., Any]:
    return lambda student, x: factor * plain(student, x)


def test_what_has_no_description_is_known_by_its_objects(
    verified: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "metapl")
    factor = torch.tensor(2.0)
    networks = [Networks(forward=scaled_by_a_closure(factor)) for _ in range(3)]
    for _ in range(2):
        networks[0].call()
    assert len(verified) == 1
    for other in networks[1:]:
        other.call()
    assert len(verified) == 3
    messages = {record.message for record in caplog.records}
    assert messages == {
        "verified, as each call with new objects: a value of type Tensor has no description"
    }


def test_a_closure_over_a_number_has_a_description(verified: list[str]) -> None:
    for factor in (2.0, 2.0, 3.0):
        Networks(forward=scaled_by_a_closure(factor)).call()
    assert len(verified) == 2


def test_what_has_died_is_not_known_by_its_address() -> None:
    calls = first_calls.VerifiedCalls()
    student = nn.Linear(2, 2)
    calls.remember("key", [student])
    assert calls.knows("key", [student])
    assert not calls.knows("key", [nn.Linear(2, 2)])
    del student
    assert not calls.knows("key", [nn.Linear(2, 2)])


def test_the_memory_is_bounded() -> None:
    calls = first_calls.VerifiedCalls()
    for key in range(2 * first_calls.MOST_REMEMBERED):
        calls.remember(key)
        calls.remember(0)
    known = [key for key in range(2 * first_calls.MOST_REMEMBERED) if calls.knows(key)]
    assert len(known) == first_calls.MOST_REMEMBERED
    assert known[0] == 0


def test_a_wrong_gradient_is_refused_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    flipped_sign(monkeypatch)
    networks = Networks()
    for _ in range(2):
        with pytest.raises(MetaplError, match="not that of its h"):
            networks.call()
    with pytest.warns(VerificationWarning, match="not that of its h") as warned:
        networks.call(verify="warn")
    assert warned[0].filename == __file__
    networks.call(verify="warn")
    networks.call(verify=False)


def test_generators_move_as_without_verification(verified: list[str]) -> None:
    """Masks are drawn by the default generator, and labels by one of the caller's."""
    results = []
    for verify in (False, True):
        networks = Networks()
        generator = torch.Generator().manual_seed(3)
        torch.manual_seed(2)
        result = networks.call(mode="reinforce", generator=generator, verify=verify)
        results.append((result.feedback, result.grads["0.weight"], torch.rand(3)))
        results.append((torch.rand(3, generator=generator),))
    assert verified == ["reinforce"]
    for before, after in zip(results[:2], results[2:], strict=True):
        for t, t_after in zip(before, after, strict=True):
            assert torch.equal(t, t_after)


def test_large_networks_are_left_out_with_one_line(
    verified: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(check, "MOST_WEIGHTS", 10)
    for _ in range(2):
        Networks().call()
    assert (verified, len(caplog.records)) == ([], 1)
    assert "are not verified: give metapl.check_gradient" in caplog.text


def test_a_student_that_was_silently_wrong_is_refused() -> None:
    """Its weights are clamped by the forward itself, and no graph shows it."""
    networks = Networks()
    networks.student = TwoLayers(*KINDS["clamped weights"][1:])
    networks.optimizer = networks.sgd()
    ahead = Lookahead([U, U, U])
    networks.call(inner=ahead, verify=False)
    with pytest.raises(MetaplError, match="writes to its weights"):
        networks.call(inner=ahead)


def functional_step(student: nn.Module, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.1), nn.Linear(5, C))
    return metapl.BilevelTrainer(teacher, student, "forward", lookahead=2, **options).functional()


def taken_alone(step: Any, state: Any) -> Any:
    return step(state, OUTER, (U, X))


def taken_in_a_stack(step: Any, state: Any) -> Any:
    batches = stack([OUTER]), stack([(U, X)])
    return torch.func.vmap(step, randomness="same")(stack([state]), *batches)


def taken_recorded(step: Any, state: Any) -> Any:
    return recorded(step)(state, OUTER, (U, X))


def differentiated(step: Any, state: Any) -> Any:
    return step(state, (X.clone().requires_grad_(), OUTER[1]), (U, X))


WAYS_OF_A_STEP = [taken_alone, taken_in_a_stack, taken_recorded, differentiated]


@pytest.mark.parametrize("taken", WAYS_OF_A_STEP)
def test_the_first_call_of_a_function_is_verified(taken: Any, verified: list[str]) -> None:
    step, state = functional_step(TwoLayers(plain), verify=False)
    taken(step, state)
    assert verified == []
    step, state = functional_step(TwoLayers(plain))
    taken(step, state)
    assert set(verified) == {"forward"}
    verified.clear()
    taken_alone(step, state)
    taken(step, state)
    assert verified == []


@pytest.mark.parametrize("taken", WAYS_OF_A_STEP)
def test_a_wrong_second_derivative_is_refused_in_a_function(taken: Any) -> None:
    step, state = functional_step(TwoLayers(lambda s, x: s.b(OfFirstOrder.apply(s.a(x)))))
    for _ in range(2):
        with pytest.raises(MetaplError, match="off the loss after real steps"):
            taken(step, state)


class OfFirstOrder(torch.autograd.Function):
    """x³, whose backward counts x as a constant."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        derivative: torch.Tensor = 3 * ctx.x**2 * g
        return derivative


def test_a_function_draws_as_without_verification_and_from_its_own_state() -> None:
    def students_weights(**options: Any) -> torch.Tensor:
        torch.manual_seed(3)
        student = TwoLayers(plain)
        step, state = functional_step(student, **options)
        with torch.no_grad():
            # What the modules hold by then is not the state's.
            student.a.weight.fill_(torch.nan)
        torch.manual_seed(2)
        state, _ = taken_alone(step, state)
        state, _ = taken_alone(step, state)
        weights: torch.Tensor = state.student.params["a.weight"]
        return weights

    assert torch.equal(students_weights(), students_weights(verify=False))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_students_of_one_architecture_are_known(kind: Any, verified: list[str]) -> None:
    for _ in range(2):
        networks = Networks()
        networks.student = nn.Sequential(nn.Unflatten(1, (2, 2)), Last(kind), nn.Linear(5, C))
        networks.optimizer = networks.sgd()
        networks.call()
    assert len(verified) == 1


class Last(nn.Module):
    """The last output of a recurrent network."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.network = kind(2, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs, _ = self.network(x)
        last: torch.Tensor = outputs[:, -1]
        return last


class DrawsOuter(PseudoLabels):
    def outer_loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return super().outer_loss(outputs * torch.rand(len(outputs), 1), batch)


def test_a_function_that_is_not_the_eager_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    step, state = functional_step(TwoLayers(plain), problem=DrawsOuter())
    taken_alone(step, state)
    step, state = functional_step(TwoLayers(plain))
    taken = step.taken

    def with_another_feedback(*arguments: Any) -> Any:
        moved, report = taken(*arguments)
        return moved, report._replace(feedback=[1.1 * h for h in report.feedback])

    monkeypatch.setattr(step, "taken", with_another_feedback)
    for _ in range(2):
        with pytest.raises(MetaplError, match=r"as one function, h is 0\.1 off its eager value"):
            taken_alone(step, state)


class LeavesItsFeatures(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = super().forward(x)
        self.auxiliary = outputs.square().mean(1)
        return outputs


def test_a_loss_reads_what_a_pass_has_left_in_a_student_that_it_knows_by_a_name() -> None:
    student = LeavesItsFeatures(plain)

    class Auxiliary(PseudoLabels):
        def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Any:
            losses = super().inner_loss(outputs, signal, batch, params)
            return losses + student.auxiliary

    step, state = functional_step(student, problem=Auxiliary(), teacher_losses=())
    with torch.no_grad():
        expected = student(U).square().mean()
    _, report = taken_alone(step, state)
    step, state = functional_step(student, teacher_losses=())
    _, without = taken_alone(step, state)
    assert float(report.inner_loss - without.inner_loss) > 0.5 * float(expected)


def test_a_tensor_in_a_weights_memory_is_refused_in_a_function() -> None:
    step, state = functional_step(TwoLayers(*KINDS["a tensor in a weight's memory"][1:]))
    with pytest.raises(MetaplError, match="a shared memory"):
        taken_alone(step, state)
