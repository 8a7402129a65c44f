"""Inner losses that read more than outputs, signal, batch and weights.

They read what a forward has left, random numbers or the teacher; each by the problem, by a closure
or by a hook.

The reference is a loop of real steps, by ``backward()`` and ``torch.optim``, and central
differences of the loss after it, in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError, Signal
from metapl.execution.state import RandomState
from metapl.feedback import Difference, Forward
from metapl.feedback.forward import SMALL
from metapl.functional.compared_step import refuse_gaps

ROWS = 8
CLASSES = 3
SMALL_WIDTH = 6
LARGE_WIDTH = 200
# The mode, its number of student steps, and the student's width: ``forward`` in each of its orders,
# and the reference.
WAYS: dict[str, tuple[Any, int, int]] = {
    "graph": ("forward", 1, SMALL_WIDTH),
    "large": ("forward", 1, LARGE_WIDTH),
    "three steps": ("forward", 3, SMALL_WIDTH),
    "three steps, large": ("forward", 3, LARGE_WIDTH),
    "states computed again": (Forward(keep_every=2), 5, SMALL_WIDTH),
    "unrolled, three steps": ("unrolled", 3, SMALL_WIDTH),
}


class Student(nn.Module):
    """Two hidden layers.

    What a forward leaves behind, beside its outputs, is the mean square of its features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, CLASSES)
        self.auxiliary: Any = None

    def forward(self, x: Tensor) -> Tensor:
        features = self.hidden(self.first(x).tanh()).tanh()
        self.auxiliary = features.square().mean(1)
        return self.out(features)


class Weighed(metapl.BilevelProblem):
    """Weights of examples by a teacher of the inputs, and what a loss reads besides.

    A function of the loss.
    """

    def __init__(
        self, extra: Callable[[Any, Tensor, Signal, Any, Any], Tensor], **attributes: Any
    ) -> None:
        vars(self).update(extra=extra, **attributes)

    def signal(self, teacher: nn.Module, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        return Signal(2 * teacher(batch[0]).sigmoid()[:, 0])

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        assert isinstance(signal.value, Tensor)
        losses = signal.value * F.cross_entropy(outputs, batch[1], reduction="none")
        return vars(self)["extra"](self, losses, signal, batch, params)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


def of_the_problem(student: Student, teacher: nn.Module) -> Weighed:
    """Read an auxiliary loss that the forward keeps, through the problem.

    Mixtures of experts keep such losses.
    """
    return Weighed(
        lambda self, losses, signal, *_: losses + signal.value * self.net.auxiliary, net=student
    )


def of_a_closure(student: Student, teacher: nn.Module) -> Weighed:
    return Weighed(lambda self, losses, signal, *_: losses + signal.value * student.auxiliary)


def of_a_hook(student: Student, teacher: nn.Module) -> Weighed:
    """Return a problem whose loss empties a list, into which a hook puts features."""

    def extra(self: Any, losses: Tensor, signal: Signal, *_: Any) -> Tensor:
        features = self.features[-1]
        self.features.clear()
        return losses + signal.value * features.square().mean(1)

    problem = Weighed(extra, features=[])
    student.first.register_forward_hook(
        lambda module, inputs, output: problem.features.append(output.tanh())
    )
    return problem


def of_a_gradient(student: Student, teacher: nn.Module) -> Weighed:
    """Return a penalty on the norm of the loss's own gradient."""

    def extra(self: Any, losses: Tensor, signal: Signal, batch: Any, params: Any) -> Tensor:
        gradient = torch.autograd.grad(losses.mean(), list(params.values()), create_graph=True)
        return losses + 0.1 * torch.stack([g.square().sum() for g in gradient]).sum()

    return Weighed(extra)


def of_a_gradient_if_any(student: Student, teacher: nn.Module) -> Weighed:
    """Return the same penalty, which is 0 where the loss is called without a graph."""

    def extra(self: Any, losses: Tensor, signal: Signal, batch: Any, params: Any) -> Tensor:
        gradient = torch.autograd.grad(
            losses.mean(), list(params.values()), create_graph=True, allow_unused=True
        )
        return losses + 0.1 * sum(
            (g.square().sum() for g in gradient if g is not None), start=torch.zeros(())
        )

    return Weighed(extra)


def of_torch(student: Student, teacher: nn.Module) -> Weighed:
    """Return a problem whose loss draws masks, after those of the teacher."""
    return Weighed(lambda self, losses, *_: losses * (torch.rand(len(losses)) < 0.7))


def of_mixup(student: Student, teacher: nn.Module) -> Weighed:
    """Return a problem whose loss draws two shares."""

    def extra(self: Any, losses: Tensor, *_: Any) -> Tensor:
        share, share_of_next = torch.rand(2)
        return losses * (0.5 + share) + share_of_next * losses.roll(1).square()

    return Weighed(extra)


READERS = [of_the_problem, of_a_closure, of_a_hook, of_a_gradient, of_a_gradient_if_any]
DRAWERS = [of_torch, of_mixup]
Make = Callable[[Student, nn.Module], Weighed]


class Case:
    """Networks, a problem and batches, made anew from one seed by each call."""

    def __init__(self, make: Make, width: int, steps: int) -> None:
        torch.manual_seed(0)
        self.teacher = nn.Sequential(
            nn.Linear(4, 2), nn.Dropout(0.3), nn.Tanh(), nn.Linear(2, 1)
        ).double()
        self.student = Student(width).double()
        self.problem = make(self.student, self.teacher)
        draw = torch.Generator().manual_seed(1)
        x = [torch.randn(ROWS, 4, generator=draw, dtype=torch.float64) for _ in range(steps + 1)]
        labels = torch.arange(ROWS) % CLASSES
        self.outer, self.inner = (x[0], labels), [(of_step, labels) for of_step in x[1:]]
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.3, momentum=0.9)

    def data(self) -> dict[str, Any]:
        return {
            "outer": self.outer,
            "inner": self.inner[0] if len(self.inner) == 1 else metapl.Lookahead(self.inner),
        }

    def options(self, mode: Any) -> dict[str, Any]:
        return {
            **self.data(),
            "mode": mode,
            "problem": self.problem,
            "inner_optimizer": self.optimizer,
        }


def begin() -> None:
    torch.manual_seed(5)


def loss_after(make: Make, width: int, steps: int, phi: Tensor) -> float:
    case = Case(make, width, steps)
    nn.utils.vector_to_parameters(phi, case.teacher.parameters())
    begin()
    for batch in case.inner:
        outputs = case.student(batch[0])
        after_the_pass = RandomState.now(torch.device("cpu"))
        signal = case.problem.signal(case.teacher, batch, None, generator=None).detached()
        params = dict(case.student.named_parameters())
        case.optimizer.zero_grad()
        case.problem.inner_loss(outputs, signal, batch, params).mean().backward()
        case.optimizer.step()
    after_the_pass.branch().restore()
    return float(case.problem.outer_loss(case.student(case.outer[0]), case.outer).detach())


@cache
def by_differences(make: Make, width: int, steps: int) -> Tensor:
    phi = nn.utils.parameters_to_vector(Case(make, width, steps).teacher.parameters()).detach()
    slopes = []
    for move in 1e-5 * torch.eye(len(phi), dtype=torch.float64):
        ends = [loss_after(make, width, steps, phi + side * move) for side in (1, -1)]
        slopes.append((ends[0] - ends[1]) / 2e-5)
    return torch.tensor(slopes, dtype=torch.float64)


def agrees(gradient: Any, expected: Tensor, tolerance: float = 1e-5) -> bool:
    flat = torch.cat([g.flatten() for g in gradient])
    return bool(torch.dist(flat, expected) <= tolerance * expected.norm())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [*READERS, *DRAWERS])
def test_the_gradient_is_right(make: Make, way: str) -> None:
    mode, steps, width = WAYS[way]
    expected = by_differences(make, width, steps)
    for verify in (True, False):
        case = Case(make, width, steps)
        begin()
        gradient = metapl.hypergradient(
            case.teacher, case.student, **case.options(mode), verify=verify
        )
        assert agrees(gradient.grads.values(), expected), (verify, gradient.order)
    assert sum(p.numel() for p in case.student.parameters()) > SMALL or width == SMALL_WIDTH


@pytest.mark.parametrize("make", DRAWERS)
def test_a_difference_takes_the_draws_of_the_loss(make: Make) -> None:
    case = Case(make, SMALL_WIDTH, 1)
    begin()
    gradient = metapl.hypergradient(
        case.teacher, case.student, **case.options("difference"), verify=True
    )
    assert agrees(gradient.grads.values(), by_differences(make, SMALL_WIDTH, 1), 1e-5)


@pytest.mark.parametrize("make", [of_the_problem, of_a_closure])
def test_a_difference_of_outputs_is_refused_and_its_advice_runs(make: Make) -> None:
    case = Case(make, SMALL_WIDTH, 1)
    begin()
    with pytest.raises(MetaplError, match="mode 'forward' follows"):
        metapl.hypergradient(case.teacher, case.student, **case.options(Difference()), verify=True)
    begin()
    gradient = metapl.hypergradient(
        case.teacher, case.student, **case.options("forward"), verify=True
    )
    assert agrees(gradient.grads.values(), by_differences(make, SMALL_WIDTH, 1))


@pytest.mark.parametrize("make", [of_the_problem, of_a_closure, of_a_hook, of_mixup])
@pytest.mark.parametrize("width", [SMALL_WIDTH, LARGE_WIDTH])
def test_a_trainer_takes_these_losses_in_later_steps_too(make: Make, width: int) -> None:
    """The second step of a trainer has the gradient of a call of ``hypergradient`` there.

    It starts from where the first has led.
    """
    case = Case(make, width, 1)
    outer = torch.optim.SGD(case.teacher.parameters(), lr=1.0)
    begin()
    options: Any = {
        "problem": case.problem,
        "inner_optimizer": case.optimizer,
        "outer_optimizer": outer,
    }
    trainer = metapl.BilevelTrainer(case.teacher, case.student, "forward", **options)
    trainer.step(**case.data())
    weights_before = [p.detach().clone() for p in case.teacher.parameters()]
    begin()
    # What the hook has kept of the trainer's step cannot be copied.
    expected = metapl.hypergradient(
        case.teacher, case.student, **case.options("unrolled"), verify=False
    )
    begin()
    trainer.step(**case.data())
    gradient = [
        p_before - p.detach()
        for p_before, p in zip(weights_before, case.teacher.parameters(), strict=True)
    ]
    assert agrees(gradient, torch.cat([g.flatten() for g in expected.grads.values()]), 1e-9)


def test_a_student_meets_a_loss_that_draws_after_one_that_does_not() -> None:
    """What was found with the first problem does not hold for the second."""
    case = Case(of_mixup, SMALL_WIDTH, 3)
    silent = Weighed(lambda self, losses, *_: losses)
    metapl.hypergradient(
        case.teacher, case.student, **{**case.options("forward"), "problem": silent}
    )
    begin()
    gradient = metapl.hypergradient(case.teacher, case.student, **case.options("forward"))
    assert agrees(gradient.grads.values(), by_differences(of_mixup, SMALL_WIDTH, 3))


@pytest.mark.parametrize("make", [of_the_problem, of_a_closure])
@pytest.mark.parametrize("steps", [1, 3])
def test_in_micro_batches_they_are_those_of_the_rows(make: Make, steps: int) -> None:
    """A teacher without dropout, whose masks are others there."""
    gradients = []
    for parts in (1, 2):
        case = Case(make, SMALL_WIDTH, steps)
        case.teacher.eval()
        options = {**case.options("forward"), "accumulate": parts, "verify": True}
        gradients.append(metapl.hypergradient(case.teacher, case.student, **options).grads.values())
    assert agrees(gradients[1], torch.cat([g.flatten() for g in gradients[0]]), 1e-10)


def test_a_batchs_own_auxiliary_loss_or_draws_are_no_means() -> None:
    def of_the_batch(student: Student, teacher: nn.Module) -> Weighed:
        return Weighed(lambda self, losses, signal, *_: losses + student.auxiliary.mean().square())

    def of_draws(student: Student, teacher: nn.Module) -> Weighed:
        return Weighed(lambda self, losses, *_: losses * torch.rand(len(losses)))

    for make, text in (
        (of_the_batch, "no mean over examples"),
        (of_draws, r"accumulate=1, as for a loss that draws"),
    ):
        case = Case(make, SMALL_WIDTH, 1)
        with pytest.raises(MetaplError, match=text):
            metapl.hypergradient(
                case.teacher, case.student, **case.options("forward"), accumulate=2, verify=True
            )


class HalfOfTheRows(Weighed):
    """An outer loss of rows that it draws."""

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        rows = torch.randperm(len(outputs))[:4]
        return F.cross_entropy(outputs[rows], batch[1][rows])


def test_both_values_of_an_outer_loss_that_draws_are_of_one_draw() -> None:
    """L(θ) and L(θ′) of ``loss_difference``.

    Of a student that hardly moves they are the same, in each step.
    """
    case = Case(
        lambda student, teacher: HalfOfTheRows(lambda self, losses, *_: losses), SMALL_WIDTH, 1
    )

    class Drawn(HalfOfTheRows):
        def signal(self, teacher: nn.Module, batch: Any, outputs: Any, *, generator: Any) -> Signal:
            log_q = teacher(batch[0]).expand(-1, CLASSES).log_softmax(-1)
            return Signal(batch[1], log_q.gather(-1, batch[1][:, None])[:, 0], log_q.exp())

        def inner_loss(
            self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None
        ) -> Tensor:
            return F.cross_entropy(outputs, signal.value, reduction="none")

    sgd = torch.optim.SGD(case.student.parameters(), lr=1e-9)
    problem = Drawn(lambda self, losses, *_: losses)
    options: Any = {
        "problem": problem,
        "inner_optimizer": sgd,
        "verify": False,
        "teacher_losses": (),
    }
    trainer = metapl.BilevelTrainer(case.teacher, case.student, "loss_difference", **options)
    for _ in range(3):
        assert abs(float(trainer.step(**case.data()).feedback)) < 1e-6


# ------------------------------------------------------------------ the teacher, without a gradient


def a_number(student: Student, teacher: Any) -> Weighed:
    return Weighed(lambda self, losses, *_: losses * (1 + teacher[0].bias[0].item()) ** 2)


def a_detached_target(student: Student, teacher: Any) -> Weighed:
    def extra(self: Any, losses: Tensor, signal: Signal, batch: Any, params: Any) -> Tensor:
        return losses * (1 + teacher(batch[0]).detach()[:, 0]) ** 2

    return Weighed(extra)


def a_detached_target_of_the_problem(student: Student, teacher: Any) -> Weighed:
    def extra(self: Any, losses: Tensor, signal: Signal, batch: Any, params: Any) -> Tensor:
        return losses * (1 + self.teacher(batch[0]).detach()[:, 0]) ** 2

    return Weighed(extra, teacher=teacher)


@pytest.mark.parametrize("make", [a_number, a_detached_target, a_detached_target_of_the_problem])
@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference"])
def test_a_teacher_that_is_read_without_a_gradient_is_said_once(make: Make, mode: str) -> None:
    case = Case(make, SMALL_WIDTH, 1)
    begin()
    check = metapl.check_gradient(case.teacher, case.student, **case.options(mode))
    assert check.status == "allowed", str(check)
    assert "reads the teacher" in check.verdict
    assert "in the signal it would count" in check.verdict


class InTheSignal(Weighed):
    """The same number, in the signal."""

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        weights = 2 * teacher(batch[0]).sigmoid()[:, 0]
        return Signal({"weight": weights, "factor": (1 + teacher[0].bias[0]) ** 2})

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        losses = F.cross_entropy(outputs, batch[1], reduction="none")
        return signal["factor"] * signal["weight"] * losses


def in_the_signal(student: Student, teacher: Any) -> Weighed:
    return InTheSignal(lambda self, losses, *_: losses)


@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference"])
def test_in_the_signal_it_counts(mode: str) -> None:
    case = Case(in_the_signal, SMALL_WIDTH, 1)
    begin()
    assert metapl.check_gradient(case.teacher, case.student, **case.options(mode)).status == "right"
    begin()
    gradient = metapl.hypergradient(case.teacher, case.student, **case.options(mode))
    expected = by_differences(a_number, SMALL_WIDTH, 1)
    assert agrees(gradient.grads.values(), expected)


# --------------------------------------------------------------------------- what is left as it was


@pytest.mark.parametrize("make", [of_a_closure, of_a_hook, a_number])
def test_verification_leaves_what_the_networks_hold(make: Make) -> None:
    case = Case(make, SMALL_WIDTH, 1)
    case.student(case.outer[0])
    parts = [*case.student.modules(), *case.teacher.modules(), case.problem]
    attributes_before = [(vars(part), dict(vars(part))) for part in parts]
    features = list(vars(case.problem).get("features", []))
    metapl.check_gradient(case.teacher, case.student, **case.options("forward"))
    for part, (attributes, contents) in zip(parts, attributes_before, strict=True):
        assert vars(part) is attributes
        assert all(attributes[name] is value for name, value in contents.items())
        assert attributes.keys() == contents.keys()
    assert len(features) == len(vars(case.problem).get("features", []))


def test_a_hook_on_a_parameter_that_comes_later_is_refused() -> None:
    case = Case(in_the_signal, SMALL_WIDTH, 1)
    trainer = metapl.BilevelTrainer(
        case.teacher, case.student, "forward", problem=case.problem, inner_optimizer=case.optimizer
    )
    trainer.step(**case.data())
    handle = case.student.hidden.weight.register_hook(lambda g: 2 * g)
    with pytest.raises(MetaplError, match=r"hidden\.weight have hooks"):
        trainer.step(**case.data())
    handle.remove()
    trainer.step(**case.data())


class InAList(nn.Module):
    """Layers in a plain list, whose weights are registered apart from them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = layers
        self.weights = nn.ParameterList(p for layer in layers for p in layer.parameters())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_in_a_plain_list_are_named_and_the_advice_runs() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)]
    x = torch.randn(ROWS, 4)
    y = torch.arange(ROWS) % CLASSES
    for student, steps in (
        (InAList(layers), 1),
        (InAList(layers), 3),
        (nn.Sequential(*nn.ModuleList(layers)), 3),
    ):
        inner = x if steps == 1 else metapl.Lookahead([x] * steps)
        sgd = torch.optim.SGD(student.parameters(), lr=0.1)
        inputs: Any = {"outer": (x, y), "inner": inner, "inner_optimizer": sgd, "verify": True}
        teacher = nn.Linear(4, CLASSES)
        if isinstance(student, InAList):
            with pytest.raises(MetaplError, match=r"from a plain list or dict.*nn\.ModuleList"):
                metapl.hypergradient(teacher, student, **inputs)
        else:
            metapl.hypergradient(teacher, student, **inputs)


def test_wrappers_around_the_whole_network_are_named_with_a_way_out() -> None:
    plain = nn.Linear(4, CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, CLASSES))
    texts = {
        nn.DataParallel(plain): r"a DataParallel, in which.*\.module",
        scripted: "a ScriptModule, in which.*the module that it was made from",
        nn.Sequential(nn.DataParallel(plain)): "a DataParallel at '0'",
        nn.Sequential(nn.LazyLinear(CLASSES)): r"has no shape.*run it on a batch, student\(x\)",
    }
    for student, text in texts.items():
        with pytest.raises(MetaplError, match=text):
            metapl.BilevelTrainer(nn.Linear(4, CLASSES), student)


def test_a_buffer_of_truth_values_is_compared_with_its_eager_value() -> None:
    """Such as a causal mask."""
    mask = torch.tensor([True, False])
    loss = torch.tensor(1.0)
    name = "the student's buffers"
    refuse_gaps({name: {"mask": mask}}, {name: {"mask": mask.clone()}}, loss)
    with pytest.raises(MetaplError, match=r"buffers is 0\.71 off"):
        refuse_gaps({name: {"mask": ~mask}}, {name: {"mask": torch.tensor([True, True])}}, loss)


class Experts(nn.Module):
    """A mixture of two experts, which keeps the penalty on an unequal load."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)) for _ in range(2)
        )
        self.auxiliary: Any = None

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        self.auxiliary = shares.mean(0).square().sum()
        return torch.stack(
            [shares[:, i, None] * expert(x) for i, expert in enumerate(self.experts)]
        ).sum(0)


def test_a_training_with_an_auxiliary_loss_and_mixed_pictures_comes_out() -> None:
    """Train 100 steps on the digits, of which a fifth of the labels are wrong.

    The trainer has its defaults.
    """
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    pixels, digits = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x = pixels.float() / 16
    y = digits.long()
    labels = y[100:1300].clone()
    labels[::5] = torch.randint(10, labels[::5].shape)
    student = Experts()

    class Mixed(metapl.problems.ExampleWeights):
        def inner_loss(
            self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None
        ) -> Tensor:
            share = torch.distributions.Beta(5.0, 1.0).sample()
            mixed = share * F.cross_entropy(outputs, batch[1], reduction="none")
            mixed = mixed + (1 - share) * F.cross_entropy(
                outputs, batch[1].roll(1), reduction="none"
            )
            assert isinstance(signal.value, Tensor)
            return signal.value * mixed + 0.1 * student.auxiliary

    table = metapl.problems.Table(torch.zeros(len(labels)))
    trainer = metapl.BilevelTrainer(table, student, "forward", problem=Mixed(), lookahead=2)
    inner = x[100:1300], labels, torch.arange(len(labels))
    trainer.fit((x[:100], y[:100]), inner, steps=100, batch_size=64)
    accuracy = trainer.evaluate((x[1300:], y[1300:])).value
    assert accuracy > 0.65, accuracy
    weights = table.values.detach()
    is_wrong = labels != y[100:1300]
    assert weights[is_wrong].mean() < weights[~is_wrong].mean()
