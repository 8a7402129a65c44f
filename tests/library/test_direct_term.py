"""Outer losses that read the teacher.

The feedback's term, plus ∂L(θ′; φ)/∂φ at fixed θ′, against double backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from captures import as_functions, without_inductor
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import metapl
from metapl import Lookahead, MetaplError, Signal
from metapl.ablation.altered import Altered
from metapl.feedback import Difference, Estimator, Feedback, Forward, Implicit
from metapl.feedback.base import exact_feedback
from metapl.guards.verification import VerificationWarning

ROWS = 6
CLASSES = 3


class Teacher(nn.Module):
    """Weighs examples, and mixes two operations of the student by ``alpha``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.alpha = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.scale = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sigmoid().squeeze(1)


class ReadsModule(metapl.BilevelProblem):
    """The outer loss reads a module of the teacher, which the problem holds."""

    def __init__(self, teacher: Teacher, indirect: bool = True) -> None:
        self.scale = teacher.scale
        self.indirect = indirect

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        return Signal(teacher(batch[0]))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        weights = signal.value if self.indirect else 1 + 0 * signal.value
        return weights * F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        factor = self.scale(outputs.new_ones(1, 1)).squeeze()
        return F.cross_entropy(factor * outputs, batch[1])


class Architecture(metapl.BilevelProblem):
    """Both losses read ``alpha``: the inner one in the signal, the outer one in the teacher.

    The inputs of both passes are scaled by it, as the operations of DARTS are.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        return Signal({"weights": teacher(batch[0]), "alpha": teacher.alpha})

    signal_has_rows: ClassVar[Any] = {"weights": True, "alpha": False}

    def student_input(self, batch: Any, signal: Signal) -> Any:  # type: ignore[override]
        return self.mixed(batch[0], signal["alpha"])

    def outer_input(self, batch: Any) -> Any:
        return self.mixed(batch[0], self.teacher.alpha)

    def mixed(self, x: Tensor, alpha: Tensor) -> Tensor:
        w = alpha.softmax(0)
        return w[0] * x.tanh() + w[1] * x.square()

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal["weights"] * F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


def networks() -> tuple[Teacher, nn.Module, Any, list[Any]]:
    torch.manual_seed(0)
    teacher = Teacher().double()
    student = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    data = [(torch.randn(ROWS, 4).double(), torch.arange(ROWS) % CLASSES) for _ in range(4)]
    return teacher, student, data[0], data[1:]


LR = 0.4


def by_hand(
    teacher: Teacher, student: nn.Module, problem: Any, outer: Any, inner: list[Any]
) -> dict[str, Tensor]:
    """Return the gradient of L(θ_K(φ); φ), by double backward through plain SGD."""
    theta: dict[str, Tensor] = dict(student.named_parameters())
    for batch in inner:
        signal = problem.signal(teacher, batch, None, generator=None)
        takes_signal = isinstance(problem, Architecture)
        x = problem.student_input(batch, signal) if takes_signal else batch[0]
        loss = problem.inner_loss(functional_call(student, theta, (x,)), signal, batch).mean()
        g = torch.autograd.grad(loss, [*theta.values()], create_graph=True)
        theta = {name: t - LR * g_t for (name, t), g_t in zip(theta.items(), g, strict=True)}
    L = problem.outer_loss(functional_call(student, theta, (problem.outer_input(outer),)), outer)
    grads = torch.autograd.grad(
        L, [*teacher.parameters()], allow_unused=True, materialize_grads=True
    )
    return dict(zip(dict(teacher.named_parameters()), grads, strict=True))


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> bool:
    gap = torch.cat([(a[name] - b[name]).flatten() for name in b]).norm()
    return bool(gap <= tolerance * torch.cat([t.flatten() for t in b.values()]).norm())


PROBLEMS = {
    "a module": lambda teacher: ReadsModule(teacher),
    "a module, whose indirect term is zero": lambda teacher: ReadsModule(teacher, indirect=False),
    "a module, in the input": lambda teacher: Architecture(teacher),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference"])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_sum_is_that_of_double_backward(kind: str, mode: Any, steps: int) -> None:
    if mode == "difference" and (steps > 1 or kind == "a module, in the input"):
        pytest.skip("it takes one step, and no signal in the input")
    teacher, student, outer, inner = networks()
    problem = PROBLEMS[kind](teacher)
    expected = by_hand(teacher, student, problem, outer, inner[:steps])
    sgd = torch.optim.SGD(student.parameters(), lr=LR)
    inputs: dict[str, Any] = {
        "outer": outer,
        "inner": Lookahead(inner[:steps]),
        "problem": problem,
        "inner_optimizer": sgd,
        "mode": mode,
    }
    gradient = metapl.hypergradient(teacher, student, **inputs)
    assert close(gradient.grads, expected, 1e-6 if mode == "difference" else 1e-10)
    assert any(float(t.norm()) > 0 for t in gradient.direct.values())
    check = metapl.check_gradient(teacher, student, **inputs)
    assert check.status == "right", str(check)
    for verify in (True, False):
        metapl.hypergradient(teacher, student, **inputs, verify=verify)


@dataclass(frozen=True)
class Renamed(Difference):
    """The library's own formula."""

    name: ClassVar[str] = "renamed"


@dataclass(frozen=True)
class Own(Estimator):
    """A formula of a user's own, which happens to be right."""

    name: ClassVar[str] = "own"
    labels: ClassVar[Any] = ("soft",)

    def feedback(self, path: Any, state: Any) -> tuple[list[Feedback], Any]:
        step, w = path.pullback()
        return [exact_feedback(step, w)], state


@dataclass(frozen=True)
class RenamedForward(Forward):
    name: ClassVar[str] = "renamed_forward"


@dataclass(frozen=True)
class WithoutDirect(Own):
    """An estimator that says that it leaves the direct term out."""

    has_direct_term: ClassVar[bool] = False


@pytest.mark.parametrize("mode", [Renamed(), Own(), RenamedForward()], ids=lambda mode: mode.name)
def test_an_estimator_of_a_users_own_has_it_whatever_its_name(mode: Any) -> None:
    teacher, student, outer, inner = networks()
    problem = ReadsModule(teacher)
    expected = by_hand(teacher, student, problem, outer, inner[:1])
    optimizer = torch.optim.SGD(student.parameters(), lr=LR)
    inputs: dict[str, Any] = {
        "outer": outer,
        "inner": inner[0],
        "problem": problem,
        "inner_optimizer": optimizer,
        "mode": mode,
    }
    gradient = metapl.hypergradient(teacher, student, **inputs, verify=True)
    assert close(gradient.grads, expected, 1e-6)
    assert metapl.check_gradient(teacher, student, **inputs).status == "right"
    trainer = metapl.BilevelTrainer(
        teacher, student, mode, problem=problem, teacher_losses=(), inner_optimizer=optimizer
    )
    assert trainer.direct_term == "included"


def test_gradients_in_the_start_ask_for_a_walk_back_and_no_name() -> None:
    teacher, student, outer, inner = networks()
    inputs: dict[str, Any] = {
        "outer": outer,
        "inner": Lookahead(inner),
        "problem": ReadsModule(teacher),
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=LR),
        "wrt": ["start", "lr"],
    }
    own = metapl.hypergradient(teacher, student, mode=RenamedForward(), **inputs)
    expected = metapl.hypergradient(teacher, student, mode="unrolled", **inputs)
    assert close(own.start, expected.start, 1e-10)
    assert close(own.settings, expected.settings, 1e-10)
    inputs["inner"] = inner[0]
    with pytest.raises(MetaplError, match="mode 'own'; expected 'forward' or 'unrolled'"):
        metapl.hypergradient(teacher, student, mode=Own(), **inputs)


def test_a_control_alters_the_feedback_and_keeps_the_direct_term() -> None:
    teacher, student, outer, inner = networks()
    problem = ReadsModule(teacher)
    inputs: dict[str, Any] = {
        "outer": outer,
        "inner": inner[0],
        "problem": problem,
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=LR),
    }
    control = metapl.hypergradient(teacher, student, mode=Altered(Own(), "permuted"), **inputs)
    h = control.feedback
    unaltered = metapl.hypergradient(teacher, student, **inputs).feedback
    torch.testing.assert_close(h.sort()[0], unaltered.sort()[0], rtol=1e-12, atol=0)
    # θ′ by hand, at which the outer loss is differentiated in the teacher alone.
    theta: dict[str, Tensor] = dict(student.named_parameters())
    signal = problem.signal(teacher, inner[0], None, generator=None)
    loss = problem.inner_loss(functional_call(student, theta, (inner[0][0],)), signal, inner[0])
    g = torch.autograd.grad(loss.mean(), [*theta.values()], retain_graph=True)
    theta = {name: (t - LR * g_t).detach() for (name, t), g_t in zip(theta.items(), g, strict=True)}
    direct = problem.outer_loss(functional_call(student, theta, (outer[0],)), outer)
    total = direct - (h * signal.value).sum()
    names = dict(teacher.named_parameters())
    grads = torch.autograd.grad(total, [*names.values()], allow_unused=True, materialize_grads=True)
    assert close(control.grads, dict(zip(names, grads, strict=True)), 1e-10)


def test_a_term_that_is_left_out_is_called_by_its_name() -> None:
    teacher, student, outer, inner = networks()
    inputs: dict[str, Any] = {
        "outer": outer,
        "inner": inner[0],
        "problem": ReadsModule(teacher),
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=LR),
    }
    check = metapl.check_gradient(teacher, student, mode=WithoutDirect(), **inputs)
    assert check.status == "allowed"
    assert "leaves out that direct term" in str(check)


SIZES: dict[str, dict[str, Any]] = {
    "weight": {"feedback_weight": 0.7},
    "ratio": {"feedback_ratio": 0.3, "teacher_losses": "own"},
}

# How big the feedback is counts after the problem is captured, so that each of these two kinds
# is captured with one of the sizes. The other steps are the compiled road without a compiler.
CAPTURED = {("a module", "weight"), ("a module, in the input", "ratio")}


@pytest.mark.parametrize("size_name", SIZES)
@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_trainer_steps_on_the_sum_eager_compiled_and_pure(
    kind: str, size_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's step, by plain SGD at rate 1, is minus its gradient.

    The gradient is λ times the sum, and that of the teacher's own losses.
    """
    if (kind, size_name) in CAPTURED:
        without_inductor(monkeypatch)
    else:
        as_functions(monkeypatch)
    size = SIZES[size_name]
    gradients = []
    for road in ("eager", "pure", "compiled"):
        teacher, student, outer, inner = networks()
        problem = PROBLEMS[kind](teacher)
        options = dict(size)
        if "teacher_losses" in options:
            options["teacher_losses"] = [OwnLoss()]
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            "forward",
            problem=problem,
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=LR),
            outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=1.0),
            compile=road == "compiled",
            **options,
        )
        start = {name: p.detach().clone() for name, p in teacher.named_parameters()}
        expected = by_hand(teacher, student, problem, outer, inner[:1])
        if road == "pure":
            step, state = trainer.functional()
            with torch.no_grad():
                state, _ = step(state, outer, inner[0])
            end = state.teacher.params
        else:
            report = trainer.step(outer=outer, inner=inner[0])
            assert report.direct_term == "included"
            end = dict(teacher.named_parameters())
        gradient = {name: start[name] - end[name].detach() for name in start}
        gradients.append(gradient)
        if "feedback_weight" in size:
            assert close(gradient, {name: 0.7 * g for name, g in expected.items()}, 1e-8), road
    eager, pure, by_compiler = gradients
    assert close(pure, eager, 1e-8)
    assert close(by_compiler, eager, 1e-8)


class OwnLoss:
    """A penalty on the teacher's weights."""

    name = "own"

    def __call__(self, teacher: nn.Module, **batches: Any) -> Tensor:
        return torch.stack([p.square().sum() for p in teacher.parameters()]).sum()


def test_stacked_steps_have_the_direct_term_too() -> None:
    teacher, student, outer, inner = networks()
    trainer = metapl.BilevelTrainer(
        teacher, student, "forward", problem=ReadsModule(teacher), verify=False
    )
    step, state = trainer.functional()
    stacked = metapl.functional.stack([state, state])
    with torch.no_grad():
        single, _ = step(state, outer, inner[0])
        stacked_step = torch.func.vmap(step, in_dims=(0, None, None), randomness="same")
        next_states, _ = stacked_step(stacked, outer, inner[0])
    for name, t in single.teacher.params.items():
        assert torch.allclose(next_states.teacher.params[name][1], t, atol=1e-12)
    weight = state.teacher.params["scale.weight"]
    assert not torch.equal(single.teacher.params["scale.weight"], weight)


class OfLabeled(ReadsModule):
    """The outer loss is a mean over labels that are not left out."""

    def outer_loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        labels = batch[1]
        factor = self.scale(outputs.new_ones(1, 1)).squeeze()
        return F.cross_entropy(factor * outputs, labels, reduction="sum"), (labels >= 0).sum()


@pytest.mark.parametrize("problem_of", [ReadsModule, OfLabeled])
@pytest.mark.parametrize("mode", ["forward", "direct"])
def test_micro_batches_have_the_sum_of_whole_ones(mode: str, problem_of: Any) -> None:
    teacher, student, outer, inner = networks()
    problem = problem_of(teacher)
    if problem_of is OfLabeled:
        # The first micro-batch has no label, so that another one is verified.
        outer[1][: ROWS // 2] = -100
    sgd = torch.optim.SGD(student.parameters(), lr=LR)
    inputs: dict[str, Any] = {
        "outer": outer,
        "inner": inner[0],
        "problem": problem,
        "inner_optimizer": sgd,
        "mode": mode,
    }
    by_batch = metapl.hypergradient(teacher, student, **inputs, accumulate=1)
    by_parts = metapl.hypergradient(teacher, student, **inputs, accumulate=2)
    assert close(by_parts.grads, by_batch.grads, 1e-10)


@pytest.mark.parametrize("mode", ["reinforce", "none", "loss_difference"])
def test_sampled_modes_leave_it_out_and_say_so(mode: Any) -> None:
    teacher, student, outer, inner = networks()

    class Drawn(ReadsModule):
        def signal(
            self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any
        ) -> Signal:
            p = teacher(batch[0])
            drawn = torch.bernoulli(p.detach(), generator=generator)
            return Signal(drawn, log_prob=torch.where(drawn > 0, p, 1 - p).log())

    by_its_gradient = torch.optim.SGD(teacher.parameters(), lr=1.0)
    trainer = metapl.BilevelTrainer(
        teacher, student, mode, problem=Drawn(teacher), outer_optimizer=by_its_gradient
    )
    scale = teacher.scale.weight.detach().clone()
    report = trainer.step(outer=outer, inner=inner[0])
    assert report.direct_term == "left out"
    assert teacher.scale.weight.equal(scale)


def test_implicit_has_it() -> None:
    teacher, student, outer, inner = networks()
    problem = ReadsModule(teacher)
    sgd = torch.optim.SGD(student.parameters(), lr=LR)
    inputs: dict[str, Any] = {
        "outer": outer,
        "inner": inner[0],
        "problem": problem,
        "inner_optimizer": sgd,
    }
    with pytest.warns(VerificationWarning, match="the student is not at the optimum"):
        implicit = metapl.hypergradient(teacher, student, **inputs, mode=Implicit(damping=1.0))
    by_a_step = metapl.hypergradient(teacher, student, **inputs)
    assert float(implicit.direct["scale.weight"].norm()) > 0
    assert close(implicit.direct, by_a_step.direct, 1e-12)


@pytest.mark.parametrize(
    "kind", ["a module", pytest.param("a module, in the input", marks=pytest.mark.long)]
)
def test_compiled_steps_have_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    teacher, student, outer, inner = networks()
    problem = PROBLEMS[kind](teacher)
    options: dict[str, Any] = {
        "outer": outer,
        "inner": Lookahead(inner),
        "problem": problem,
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=LR),
    }
    gradient = metapl.hypergradient(teacher, student, **options, compile=True)
    assert close(gradient.grads, by_hand(teacher, student, problem, outer, inner), 1e-10)
    eager = metapl.hypergradient(teacher, student, **options)
    assert close(gradient.direct, eager.direct, 1e-10)


class BySignal(Architecture):
    def outer_input(self, batch: Any, signal: Signal) -> Any:  # type: ignore[override]
        return self.mixed(batch[0], signal["alpha"])


@pytest.mark.parametrize("take", [metapl.hypergradient, metapl.check_gradient])
def test_an_outer_input_of_the_signal_is_refused_and_the_module_named(take: Any) -> None:
    teacher, student, outer, inner = networks()
    problem: Any = BySignal(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=LR)
    inputs = {"outer": outer, "inner": inner[0], "inner_optimizer": optimizer}
    expected = r"expected outer_input\(self, batch\), which reads self\.teacher"
    with pytest.raises(MetaplError, match=expected):
        take(teacher, student, problem=problem, **inputs)
    with pytest.raises(MetaplError, match=expected):
        metapl.BilevelTrainer(teacher, student, problem=problem)


class LearnedLoss(metapl.BilevelProblem):
    """The teacher is the inner loss, and the problem holds a module of its kind to call it by."""

    signal_has_rows = False

    def __init__(self, template: nn.Module) -> None:
        self.template = template

    def signal(
        self, teacher: nn.Module, batch: Any, outputs: Tensor, *, generator: Any
    ) -> metapl.Signal:
        return metapl.Signal(dict(teacher.named_parameters()))

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return functional_call(self.template, signal.value, (outputs,)).squeeze(1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.long
def test_a_teacher_that_is_the_inner_loss_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Graphs are traced whole, and run without Inductor.
    without_inductor(monkeypatch)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    student = nn.Linear(4, 3).double()
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 3
    options: dict[str, Any] = {
        "outer": (x, y),
        "inner": (x, y),
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=LR),
    }
    problem = LearnedLoss(teacher)
    eager = metapl.hypergradient(teacher, student, problem=problem, **options)
    gradient = metapl.hypergradient(teacher, student, problem=problem, compile=True, **options)
    assert close(gradient.grads, eager.grads, 1e-12)


def test_an_architecture_search_comes_out() -> None:
    """The labels depend on the square of the inputs alone.

    So the weight of that operation grows.
    """
    torch.manual_seed(0)
    teacher = Teacher()
    student = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(400, 4)
    y = (x.square().sum(1) > 3.4).long()
    adam = torch.optim.Adam(teacher.parameters(), lr=0.03)
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        "forward",
        problem=Architecture(teacher),
        outer_optimizer=adam,
        teacher_losses=(),
    )
    draw = torch.Generator().manual_seed(1)
    for _ in range(300):
        inner_rows, outer_rows = torch.randperm(400, generator=draw).split(200)
        trainer.step(outer=(x[outer_rows], y[outer_rows]), inner=(x[inner_rows], y[inner_rows]))
    assert float(teacher.alpha.detach().softmax(0)[1]) > 0.6


def test_the_direct_term_alone_is_the_first_order_of_darts() -> None:
    """That is the outer gradient at fixed θ′: by double backward through none of the steps."""
    teacher, student, outer, inner = networks()
    problem = ReadsModule(teacher)
    options: dict[str, Any] = {
        "outer": outer,
        "inner": inner[0],
        "problem": problem,
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=LR),
    }
    result = metapl.hypergradient(teacher, student, **options, mode="direct")
    theta = result.student_params
    loss = problem.outer_loss(functional_call(student, theta, (outer[0],)), outer)
    grads = torch.autograd.grad(
        loss, [*teacher.parameters()], allow_unused=True, materialize_grads=True
    )
    expected = dict(zip(dict(teacher.named_parameters()), grads, strict=True))
    assert close(result.grads, expected, 1e-14)
    assert torch.equal(result.outer_loss, loss.detach())
    assert not result.feedback.any()
    whole = metapl.hypergradient(teacher, student, **options, mode="forward")
    assert close(result.grads, whole.direct, 1e-14)
    assert not close(result.grads, whole.grads, 1e-3)


def test_a_trainer_of_the_direct_term_alone_steps_as_the_pure_step_does() -> None:
    teacher, student, outer, inner = networks()
    trainer = metapl.BilevelTrainer(
        teacher, student, "direct", problem=ReadsModule(teacher), teacher_losses=()
    )
    step, state = trainer.functional()
    report = trainer.step(outer, inner[0])
    state, pure_report = step(state, outer, inner[0])
    assert report.direct_term == "included"
    assert abs(report.outer_loss - float(pure_report.outer_loss)) < 1e-14
    for name, p in teacher.named_parameters():
        if name.startswith("scale"):
            assert torch.allclose(p, state.teacher.params[name], rtol=0, atol=1e-14)
    for name, p in student.named_parameters():
        assert torch.allclose(p, state.student.params[name], rtol=0, atol=1e-14)


def test_the_direct_term_alone_of_an_outer_loss_without_one_is_refused() -> None:
    teacher, student, outer, inner = networks()
    with pytest.raises(MetaplError, match="with PseudoLabels, which does not hold the teacher"):
        metapl.BilevelTrainer(nn.Linear(4, 3), nn.Linear(4, 3), "direct")
    with pytest.raises(MetaplError, match="or mode='none'"):
        metapl.hypergradient(
            teacher,
            student,
            outer=outer,
            inner=inner[0],
            problem=metapl.problems.ExampleWeights(),
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=LR),
            mode="direct",
        )


class WrongSquare(torch.autograd.Function):
    """A square whose backward is not its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 5 * grads[0]


class Penalized(ReadsModule):
    """The outer loss also has a penalty on what it reads of the teacher."""

    penalty: Any = staticmethod(torch.square)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().outer_loss(outputs, batch) + self.penalty(self.scale.bias).sum()


@pytest.mark.parametrize("mode", ["direct", "forward"])
def test_a_direct_term_is_verified_by_differences_of_the_outer_loss(mode: Any) -> None:
    teacher, student, outer, inner = networks()
    problem = Penalized(teacher)
    options: dict[str, Any] = {
        "outer": outer,
        "inner": inner[0],
        "problem": problem,
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=LR),
        "mode": mode,
    }
    assert metapl.check_gradient(teacher, student, **options).status == "right"
    for penalty in (WrongSquare.apply, lambda t: t.detach().square()):
        problem.penalty = penalty
        check = metapl.check_gradient(teacher, student, **options)
        assert check.status == "refused"
        assert "the outer loss reads the teacher by .detach()" in check.verdict


def test_the_direct_term_of_an_input_that_reads_the_teacher_is_verified() -> None:
    teacher, student, outer, inner = networks()
    check = metapl.check_gradient(
        teacher,
        student,
        outer=outer,
        inner=inner[0],
        problem=Architecture(teacher),
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=LR),
        mode="direct",
    )
    assert check.status == "right"


class Checkpointed(nn.Module):
    """Runs a part of a network again in each backward pass."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.part, x, use_reentrant=False)


@pytest.mark.parametrize(("steps", "parts"), [(1, 1), (3, 1), (1, 2)])
def test_a_checkpointed_student_has_the_same_direct_term(steps: int, parts: int) -> None:
    teacher, student, outer, batches = networks()
    problem = Architecture(teacher)
    results = []
    for network in (student, Checkpointed(student)):
        optimizer = torch.optim.SGD(student.parameters(), lr=LR)
        found = metapl.hypergradient(
            teacher,
            network,
            outer=outer,
            inner=Lookahead(batches[:steps]),
            problem=problem,
            inner_optimizer=optimizer,
            accumulate=parts,
        )
        results.append([*found.direct.values(), *found.grads.values()])
    for expected, g in zip(*results, strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-12)


def test_a_trainer_moves_its_teacher_by_the_direct_term_of_a_checkpointed_student() -> None:
    moved = []
    for wrap in (lambda student: student, Checkpointed):
        teacher, student, outer, batches = networks()
        network = wrap(student)
        trainer = metapl.BilevelTrainer(
            teacher,
            network,
            "forward",
            problem=Architecture(teacher),
            teacher_losses=(),
            inner_optimizer=torch.optim.SGD(network.parameters(), lr=LR),
            outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=1.0),
        )
        trainer.step(outer, batches[0])
        moved.append(teacher.alpha.detach())
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-10, atol=1e-12)


class Detached(Architecture):
    def outer_input(self, batch: Any) -> Any:
        return super().outer_input(batch).detach()


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("mode", ["forward", "unrolled", "direct"])
def test_a_direct_term_that_is_detached_is_refused(mode: str, steps: int) -> None:
    teacher, student, outer, batches = networks()
    optimizer = torch.optim.SGD(student.parameters(), lr=LR)
    with pytest.raises(MetaplError, match=r"the outer loss reads the teacher by \.detach\(\)"):
        metapl.hypergradient(
            teacher,
            student,
            outer=outer,
            inner=Lookahead(batches[:steps]),
            problem=Detached(teacher),
            inner_optimizer=optimizer,
            mode=mode,
        )


@pytest.mark.parametrize("verify", [True, False])
def test_a_checkpoint_in_a_graph_of_several_steps_is_refused(verify: bool) -> None:
    """It would run again at the weights of another step: 5e-4 off at this rate."""
    teacher, student, outer, batches = networks()
    network = Checkpointed(student)
    gradient = partial(
        metapl.hypergradient,
        teacher,
        network,
        outer=outer,
        problem=Architecture(teacher),
        inner_optimizer=torch.optim.SGD(network.parameters(), lr=LR),
        verify=verify,
    )
    unrolled = gradient(inner=batches[0], mode="unrolled")
    forward = gradient(inner=batches[0], mode="forward")
    torch.testing.assert_close(unrolled.grads, forward.grads, rtol=1e-10, atol=1e-12)
    with pytest.raises(MetaplError, match="has a checkpoint.*expected mode 'forward'"):
        gradient(inner=Lookahead(batches[:2]), mode="unrolled")
