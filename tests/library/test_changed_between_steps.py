"""What changes between steps: the step is that of a trainer that is built anew there, or it is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from problems_zoo import Toy, noisy_teacher, toy
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import metapl
from metapl import MetaplError

BUILT_WITH = {
    "accumulate": 2,
    "clip_norm": 0.05,
    "compile": True,
    "inner_optimizer": None,
    "mode": "none",
    "outer_optimizer": None,
    "precision": "bfloat16",
    "student": None,
    "teacher": None,
    "teacher_losses": (),
}


def in_training(mode: Any = "forward", kind: type[torch.optim.Optimizer] = torch.optim.Adam) -> tuple[Toy, Any]:
    """Two steps into training."""
    case = toy("batch_norm", teacher=noisy_teacher)
    trainer = metapl.BilevelTrainer(
        **case.networks(),
        mode=mode,
        inner_optimizer=kind(case.student.parameters(), lr=0.01),
        outer_optimizer=torch.optim.SGD(case.teacher.parameters(), lr=0.1),
    )
    for _ in range(2):
        trainer.step(**case.data())
    return case, trainer


@pytest.mark.parametrize("name", BUILT_WITH)
def test_what_a_trainer_is_built_with_is_not_exchanged(name: str) -> None:
    """The step would go on with the old one in some of its parts, or in all."""
    _, trainer = in_training()
    before, value = getattr(trainer, name), BUILT_WITH[name]
    value = copy.deepcopy(before) if value is None else value
    with pytest.raises(MetaplError):
        setattr(trainer, name, value)
    assert getattr(trainer, name) is before
    setattr(trainer, name, before)


def test_a_ratio_that_is_assigned_beside_a_weight_is_refused() -> None:
    case, trainer = in_training()
    trainer.feedback_weight, trainer.feedback_ratio = 3.0, 0.5
    with pytest.raises(MetaplError):
        trainer.step(**case.data())


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("mode", ["forward", "unrolled", "reinforce"])
def test_networks_that_are_cast_take_the_step_of_a_new_trainer(mode: str, kind: type[torch.optim.Optimizer]) -> None:
    """Of weights in half precision, the adjoint of the update is computed in float64."""
    case, trainer = in_training(mode, kind)
    for network in case.networks().values():
        network.bfloat16()
    for state in (trainer.inner_optimizer.state, trainer.outer_optimizer.state):
        for held in state.values():
            held.update({k: t.bfloat16() for k, t in held.items() if isinstance(t, Tensor) and k != "step"})
    data = {k: pytree.tree_map(cast, value) for k, value in case.data().items()}
    twin, inner, outer = copy.deepcopy((case.networks(), trainer.inner_optimizer, trainer.outer_optimizer))
    again = metapl.BilevelTrainer(**twin, mode=mode, inner_optimizer=inner, outer_optimizer=outer)
    ends = []
    for one, networks in ((trainer, case.networks()), (again, twin)):
        torch.manual_seed(3)
        report = one.step(**data)
        ends.append([report.feedback, *(p.detach() for net in networks.values() for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def cast(t: Tensor) -> Tensor:
    return t.bfloat16() if t.is_floating_point() else t


def growing(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Another function at every pass, which no state of the module tells of."""
    calls.append(1)
    return output * (1 + 0.1 * len(calls))


calls: list[int] = []


def by_hook(student: nn.Module) -> None:
    student.register_forward_hook(growing)


def by_method(student: nn.Module) -> None:
    before = student.forward
    student.forward = lambda x: growing(student, x, before(x))  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [by_hook, by_method])
def test_a_student_with_another_forward_is_looked_at_as_on_the_first_step(change: Callable[[nn.Module], None]) -> None:
    case, trainer = in_training("loss_difference")
    change(case.student)
    with pytest.raises(MetaplError):
        trainer.step(**case.data())


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_an_option_that_is_refused_at_construction_is_refused_later(option: str) -> None:
    case, trainer = in_training()
    trainer.inner_optimizer.param_groups[0][option] = True
    with pytest.raises(MetaplError):
        trainer.step(**case.data())


@pytest.mark.parametrize("which", ["inner_optimizer", "outer_optimizer"])
def test_amsgrad_that_is_switched_on_is_refused_before_anything_moves(which: str) -> None:
    case = toy("batch_norm")
    owners = {"inner_optimizer": case.student, "outer_optimizer": case.teacher}
    optimizers: dict[str, Any] = {name: torch.optim.Adam(net.parameters()) for name, net in owners.items()}
    trainer = metapl.BilevelTrainer(**case.networks(), **optimizers)
    trainer.step(**case.data())
    optimizers[which].param_groups[0]["amsgrad"] = True
    before = [p.detach().clone() for net in case.networks().values() for p in net.parameters()]
    with pytest.raises(MetaplError):
        trainer.step(**case.data())
    after = [p for net in case.networks().values() for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_adam_is_refused_for_weights_that_are_cast_to_float16() -> None:
    case, trainer = in_training()
    case.student.half()
    with pytest.raises(MetaplError):
        trainer.step(**case.data())


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_network_that_is_frozen_whole_is_named(which: str) -> None:
    case, trainer = in_training()
    getattr(case, which).requires_grad_(False)
    with pytest.raises(MetaplError):
        trainer.step(**case.data())


class Entering(metapl.PseudoLabels):
    """The label enters the student's input."""

    def student_input(self, batch: Any, signal: Any) -> Tensor:  # type: ignore[override]
        return torch.cat([super().student_input(batch)[:, :1] * 0 + signal.value[:, None], batch[:, 1:]], 1)


def test_a_problem_that_is_assigned_is_asked_what_the_first_one_was() -> None:
    """Labels that enter the input are not credited apart; the default losses are those of the new problem."""
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    data = {"labeled": (torch.randn(5, 4), torch.arange(5) % 3), "unlabeled": torch.randn(6, 4)}
    trainer = metapl.BilevelTrainer(teacher, student, mode="reinforce_per_example")
    trainer.step(**data)
    trainer.problem = Entering(kind="hard")
    with pytest.raises(MetaplError):
        trainer.step(**data)


class Silent(metapl.PseudoLabels):
    """Without losses of the teacher's own."""

    def default_teacher_losses(self, batch: Any) -> tuple[Any, ...]:
        return ()


def test_the_teachers_losses_are_those_of_the_problem_that_is_assigned() -> None:
    case, trainer = in_training()
    trainer.problem = Silent(kind="soft")
    assert trainer.step(**case.data()).teacher_loss == 0


class Switched(nn.Module):
    """Another function of its input when an attribute says so."""

    def __init__(self, of: Callable[[Switched, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.middle, self.head = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.of, self.on = of, False

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        return self.head(self.middle(self.of(self, h) if self.on else h).tanh())


def rounded(_: Switched, h: Tensor) -> Tensor:
    return h + ((4 * h).round() / 4 - h).detach()


def beside_no_grad(net: Switched, h: Tensor) -> Tensor:
    with torch.no_grad():
        other = net.middle(h)
    return h + 0.5 * other


def detached_beside(net: Switched, h: Tensor) -> Tensor:
    return h + 0.5 * h.relu().detach()


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / 2


def own_backward(_: Switched, h: Tensor) -> Tensor:
    return Halved.apply(h)  # type: ignore[no-untyped-call, no-any-return]


def switched(of: Callable[[Switched, Tensor], Tensor], mode: str) -> tuple[Switched, Any, Callable[[], Any]]:
    """Two steps into training in float32, with many rows, whose slopes along w nearly cancel."""
    torch.manual_seed(0)
    teacher, student = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)), Switched(of)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    trainer = metapl.BilevelTrainer(teacher, student, mode=mode, inner_optimizer=optimizer)

    def step() -> Any:
        labeled, unlabeled = (torch.randn(64, 16), torch.randint(0, 3, (64,))), torch.randn(64, 16)
        return trainer.step(labeled=labeled, unlabeled=unlabeled)

    for _ in range(2):
        step()
    return student, trainer, step


@pytest.mark.parametrize("of", [rounded, beside_no_grad, detached_beside, own_backward])
def test_a_forward_of_other_operations_is_looked_at_as_on_the_first_step(of: Any) -> None:
    """Such as fake quantization from some step on: the slopes alone let a difference pass that is 12 % off."""
    student, _, step = switched(of, "difference")
    student.on = True
    for _ in range(2):  # what was refused is looked at again
        with pytest.raises(MetaplError):
            step()
    student.on = False
    step()


def test_another_call_of_the_hypergradient_looks_at_other_operations_as_the_first_one() -> None:
    student, _, _ = switched(rounded, "difference")
    teacher, inner = nn.Linear(16, 3), torch.optim.SGD(student.parameters(), lr=0.1)
    labeled, unlabeled = (torch.randn(64, 16), torch.randint(0, 3, (64,))), torch.randn(64, 16)
    given = {"labeled": labeled, "unlabeled": unlabeled, "inner_optimizer": inner}
    for mode in ("difference", "forward"):
        for student.on in (False, True, True, False):  # what was refused is looked at again
            refused = pytest.raises(MetaplError) if student.on else nullcontext()
            with refused if mode == "difference" else nullcontext():
                metapl.hypergradient(teacher, student, mode=mode, **given)


def test_a_network_that_alternates_between_known_graphs_is_not_looked_at_again() -> None:
    student, trainer, step = switched(lambda _, h: h + h.sin(), "forward")
    looked = []
    for on in (True, False, True, False):
        student.on = on
        step()
        looked.append(trainer.guard.student.first)
    assert looked == [True, False, False, False]


def test_a_network_whose_graphs_never_repeat_is_not_looked_at_forever() -> None:
    terms = [0]
    student, trainer, step = switched(lambda _, h: torch.stack([h.sin() for _ in terms]).sum(0), "forward")
    student.on, looked = True, 0
    for _ in range(40):
        terms.append(0)
        step()
        looked += trainer.guard.student.first
    assert looked == len(trainer.guard.student.graphs) - 1 < 40


def hook_of_a_tensor(_: Switched, h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda g: g / 2)
    return h


def hook_of_a_weight(net: Switched, h: Tensor) -> Tensor:
    if net.body.weight.requires_grad:
        net.body.weight.register_hook(lambda g: g / 2)
    return h


@pytest.mark.parametrize("mode", ["forward", "difference", "reinforce_per_example"])
@pytest.mark.parametrize("of", [hook_of_a_tensor, hook_of_a_weight])
def test_a_hook_that_forward_begins_to_register_is_named(of: Any, mode: str) -> None:
    """The graph has the same operations, and the slopes may agree nearly enough."""
    student, _, step = switched(of, mode)
    student.on = True
    with pytest.raises(MetaplError):
        step()


def test_a_problem_that_is_assigned_is_the_one_of_the_hypergradient() -> None:
    """Beside a step it would be of the problem that the trainer was built with."""
    case, trainer = in_training()
    trainer.problem = Tripled()
    assert trainer.problem.kind == "soft"
    before = trainer.hypergradient(**case.data())
    torch.testing.assert_close(trainer.step(**case.data()).feedback, before.feedback)


class Tripled(metapl.PseudoLabels):
    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return 3 * super().outer_loss(outputs, batch)


class HalvedSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.grad = None if p.grad is None else p.grad / 2
        return super().step(closure)


@pytest.mark.parametrize("where", ["class", "its step"])
def test_an_optimizer_whose_class_gets_another_step_is_compared_again(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, trainer = in_training(kind=torch.optim.SGD)
    if where == "class":
        trainer.inner_optimizer.__class__ = HalvedSGD
    else:
        step = torch.optim.SGD.step

        def halved(self: Any, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p.grad = None if p.grad is None else p.grad / 2
            return step(self, closure)

        monkeypatch.setattr(torch.optim.SGD, "step", halved)
    with pytest.raises(MetaplError):
        trainer.step(**case.data())
