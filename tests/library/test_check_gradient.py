"""check_gradient passes what is right, on every network and optimizer, catches planted faults, and moves nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from faults import FAULTS, FAULTS_AHEAD
from problems_zoo import OPTIMISERS, STUDENTS, Toy, noisy_teacher, product, toy, unmoved, warm
from test_problems import METHODS, Method
from test_signal_in_input import Augmenting
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError, Signal
from metapl.ablation import Altered
from metapl.feedback import Feedback, Forward, Reinforce
from metapl.problems import Problem
from metapl.training.check import GradientCheck

SOFT = ("forward", "unrolled", "difference")
NESTEROV, ADAMW = "torch_sgd_nesterov", "torch_adamw"


def checked(
    kind: str = "mlp",
    optimiser: str = NESTEROV,
    *,
    given: Toy | None = None,
    change: Callable[[Toy], Toy] = lambda case: case,
    **options: Any,
) -> GradientCheck:
    case = toy(kind, dtype=torch.float32) if given is None else given
    real, state, _ = warm(case, OPTIMISERS[optimiser])
    case = change(case)
    options = {"inner_optimizer": real, "inner_state": state, **case.networks(), **case.data(), **options}
    with unmoved(case, *([real] if isinstance(real, torch.optim.Optimizer) else [])):
        return metapl.check_gradient(options.pop("teacher"), options.pop("student"), **options)


def trainer(mode: Any = "forward", **options: Any) -> tuple[metapl.BilevelTrainer, dict[str, Any]]:
    case = toy(dtype=torch.float32)
    batches = {"labeled": (case.labeled[0][:4], case.labeled[1][:4]), "unlabeled": case.unlabeled}
    made = metapl.BilevelTrainer(case.teacher, case.student, mode, **options)
    made.step(**batches)
    return made, batches


# ------------------------------------------------------------------------------------------------------ what is right


@pytest.mark.parametrize(
    ("student", "optimiser", "mode"), product(STUDENTS, OPTIMISERS, SOFT, usual=["mlp", NESTEROV, "forward"])
)
def test_right_gradients_pass(student: str, optimiser: str, mode: str) -> None:
    found = checked(student, optimiser, given=toy(student, dtype=torch.float32, teacher=noisy_teacher), mode=mode)
    assert found.passed
    assert found.exact == (mode != "difference")
    assert found.overall.relative_error < (1e-9 if found.exact else 1e-5)
    assert found.feedback is not None
    assert found.feedback.relative_error < (1e-9 if found.exact else 1e-5)
    assert found.dtype == torch.float32
    assert found.rounded is not None
    assert 1e-9 < found.rounded.relative_error < 1e-2
    assert found.parameters.keys() == found.rounded_parameters.keys()
    assert found.by_difference is not None
    assert found.by_difference < 1e-5


@pytest.mark.parametrize("mode", ["forward", "unrolled", Forward(truncate=1), Forward(normalization="learning_rate")])
def test_several_steps_and_settings(mode: Any) -> None:
    case = toy(dtype=torch.float32)
    u = case.unlabeled
    found = checked(given=replace(case, unlabeled=metapl.Lookahead([u, u + 1, u - 1])), mode=mode)
    assert found.passed
    assert found.by_difference is None if getattr(mode, "truncate", None) else found.by_difference < 1e-5


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_librarys_own_problems_pass(method: Method) -> None:
    case = toy(dtype=torch.float64)
    teacher = method.teacher().double()
    options = {"teacher": teacher, "unlabeled": method.batch, "problem": method.problem}
    found = checked(given=case, **options)
    assert found.passed
    assert found.by_difference is not None
    assert found.by_difference < 1e-4


def test_a_signal_in_the_input_and_a_problem_without_a_teacher() -> None:
    assert checked(problem=Augmenting()).passed
    case = toy(dtype=torch.float32)
    rows = (case.unlabeled, torch.tensor([0, 1, 2, 1]))
    found = checked(teacher=None, unlabeled=rows, problem=metapl.problems.LearningToReweight())
    assert found.passed
    assert (found.parameters, found.by_difference) == ({}, None)


def test_dict_batches_and_the_other_spelling() -> None:
    class Reads(nn.Sequential):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch["x"])

    case = toy(dtype=torch.float32)
    networks = {"teacher": Reads(*case.teacher), "student": Reads(*case.student)}
    batches = {"outer": {"x": case.labeled[0], "labels": case.labeled[1]}, "inner": {"x": case.unlabeled}}
    sgd = torch.optim.SGD(networks["student"].parameters(), lr=0.1)
    assert checked(**networks, **batches, labeled=None, unlabeled=None, inner_optimizer=sgd, inner_state=None).passed


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.05}, {"precision": "bfloat16"}, {"accumulate": 2}])
def test_a_trainer_as_it_stands(options: dict[str, Any]) -> None:
    made, batches = trainer(**options)
    state, random = made.state_dict(), torch.get_rng_state()
    found = metapl.check_gradient(made, **batches)
    assert found.passed
    assert torch.equal(random, torch.get_rng_state())
    after = made.state_dict()
    assert all(torch.equal(t, after["student"][name]) for name, t in state["student"].items())
    assert after["steps_done"] == 1
    assert made.teacher is not None
    if options == {"precision": "bfloat16"}:
        assert found.dtype == torch.bfloat16
        assert "bfloat16 is the reason, not the mode" in found.verdict


def test_a_first_step_of_adam_passes() -> None:
    """Which changes by its whole length where a gradient changes its sign, on a move of the teacher's weights too."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    student = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    first, second = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    batches: dict[str, Any] = {
        "labeled": (torch.randn(7, 4, generator=first, dtype=torch.float64), torch.arange(7) % 3),
        "unlabeled": torch.randn(6, 4, generator=second, dtype=torch.float64),
    }
    adam = torch.optim.Adam(student.parameters(), lr=0.01)
    found = metapl.check_gradient(teacher, student, **batches, inner_optimizer=adam)
    assert found.passed, found
    assert found.by_difference is not None
    assert found.by_difference < 1e-3


def test_a_trainers_transform_goes_on_from_its_state() -> None:
    import torchopt

    made, batches = trainer(inner_optimizer=torchopt.sgd(0.1, momentum=0.9))
    assert metapl.check_gradient(made, **batches).passed


def test_tensors_that_a_problem_or_module_holds_are_taken_along() -> None:
    class Held(metapl.PseudoLabels):
        def __init__(self) -> None:
            super().__init__()
            object.__setattr__(self, "mix", {"in": [torch.eye(3)]})

        def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
            return super().inner_loss(outputs @ self.mix["in"][0], signal, batch)

    held = Held()
    assert checked(problem=held).passed
    assert held.mix["in"][0].dtype == torch.float32


# -------------------------------------------------------------------------------------------------------- what is wrong


@dataclass(frozen=True)
class Bent(Forward):
    """Forward, with its feedback times a factor."""

    factor: float = 1.0

    def feedback(self, path: Any, state: Any) -> Any:
        found, state = super().feedback(path, state)
        return [h.mapped(lambda _, t: t * self.factor) for h in found], state


@dataclass(frozen=True)
class NoMomentum(Forward):
    """Forward with w = −ηv, whatever the optimizer."""

    def feedback(self, path: Any, state: Any) -> Any:
        (step,) = path.steps
        w = {name: -0.3 * v for name, v in path.outer_gradient().items()}
        from metapl.feedback.credit import exact_feedback

        return [exact_feedback(step, w)], state


@dataclass(frozen=True)
class FirstRow(Forward):
    """Forward, with the feedback on the first example alone."""

    def feedback(self, path: Any, state: Any) -> Any:
        found, state = super().feedback(path, state)
        kept = torch.arange(len(found[0].h)) == 0
        return [Feedback(torch.where(kept[:, None], h.h, 0), h.part) for h in found], state


WRONG: dict[str, tuple[Any, str]] = {
    "sign": (Bent(factor=-1.0), r"its SIGN is wrong, and it is 1 times"),
    "scale": (Bent(factor=2.0), r"points the right way, and it is 2 times"),
    "a little": (Bent(factor=1.0001), r"points the right way, and it is 1 times"),
    "row": (FirstRow(), r"cosine to the exact gradient is 0\."),
}


@pytest.mark.parametrize("optimiser", [NESTEROV, ADAMW, "torchopt_adam"])
@pytest.mark.parametrize("student", ["mlp", "batch_norm", "dropout"])
@pytest.mark.parametrize("fault", WRONG)
def test_wrong_estimators_are_caught(fault: str, student: str, optimiser: str) -> None:
    mode, words = WRONG[fault]
    found = checked(student, optimiser, mode=mode)
    assert found.passed is False
    with pytest.raises(AssertionError, match=words):
        assert found.passed, found.verdict


@pytest.mark.parametrize("optimiser", ["torch_sgd_nesterov", "torch_sgd_dampening", ADAMW])
def test_a_momentum_factor_that_is_missing_is_caught(optimiser: str) -> None:
    found = checked("mlp", optimiser, mode=NoMomentum())
    assert found.passed is False
    if optimiser == NESTEROV:
        assert abs(found.overall.scale - 1 / 1.9) < 1e-9
    assert checked("mlp", "torch_sgd", mode=NoMomentum()).passed


@pytest.mark.parametrize(
    "plant", ["flipped_sign", "mean_for_sum", "momentum_ignored", "velocity_forgotten", "gradient_before_the_step"]
)
def test_faults_of_the_library_itself_are_caught(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[plant](monkeypatch)
    assert checked().passed is False


@pytest.mark.parametrize("plant", FAULTS_AHEAD)
def test_faults_of_several_steps_are_caught(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    u = toy(dtype=torch.float32).unlabeled
    FAULTS_AHEAD[plant](monkeypatch)
    assert checked(unlabeled=metapl.Lookahead([u, u + 1])).passed is False


class Partly(metapl.PseudoLabels):
    """The signal does not let the gradient through to the teacher's first layer."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        hidden = teacher[:-1](batch).detach()
        return Signal(teacher[-1](hidden).softmax(-1))


class HalfOfIt(metapl.PseudoLabels):
    """Every weight has a gradient, of a half of the signal."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        q = teacher(batch).softmax(-1)
        return Signal((q + q.detach()) / 2)


class _Upwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class OwnBackward(metapl.PseudoLabels):
    """An operation of the signal has a backward of its own, of the wrong sign."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        return Signal(_Upwards.apply(teacher(batch)).softmax(-1))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("optimiser", [NESTEROV, ADAMW, "torchopt_adam"])
@pytest.mark.parametrize("student", ["mlp", "batch_norm"])
@pytest.mark.parametrize("problem", [Partly(), HalfOfIt(), OwnBackward()], ids=lambda p: type(p).__name__)
def test_wrong_problems_are_caught_by_real_steps(problem: Any, student: str, optimiser: str) -> None:
    found = checked(student, optimiser, problem=problem)
    assert found.overall.relative_error < 1e-9, "double backward by hand goes through the problem's own code"
    assert found.passed is False
    assert "after real steps moves otherwise than autograd says" in found.verdict
    assert found.unreached == (("1.weight", "1.bias") if isinstance(problem, Partly) else ())


class OwnBackwardInside(metapl.PseudoLabels):
    """An operation of the inner loss has a backward of the wrong sign, by which the student really steps."""

    def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Tensor:
        losses: Tensor = _Upwards.apply(super().inner_loss(outputs, signal, batch))  # type: ignore[no-untyped-call]
        return losses


def test_an_inner_loss_that_moves_otherwise_than_its_gradient_is_told() -> None:
    found = checked(problem=OwnBackwardInside(), mode="unrolled")
    assert found.passed, "it is the gradient through the steps that the student takes"
    assert found.inner_by_difference is not None
    assert found.inner_by_difference > 0.1
    assert "inner_loss moves otherwise" in found.verdict
    right = checked()
    assert right.inner_by_difference is not None
    assert right.inner_by_difference < 1e-4
    assert "inner_loss" not in right.verdict


# ---------------------------------------------------------------------------------------------------- labels are drawn


@pytest.mark.parametrize("mode", ["reinforce", "reinforce_per_example", Reinforce(similarity="cosine")])
def test_the_mean_over_draws(mode: Any) -> None:
    case = toy(dtype=torch.float64)
    found = checked(given=case, mode=mode, draws=200)
    assert found.passed
    assert found.draws == 200
    assert found.standard_error is not None
    assert found.overall.cosine + 3 * found.standard_error > 0.9
    assert found.feedback is None
    assert found.rounded is None


@pytest.mark.parametrize("plant", ["flipped_sign", "mean_for_sum"])
def test_a_wrong_mean_is_caught(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[plant](monkeypatch)
    assert checked(given=toy(dtype=torch.float64), mode="reinforce_per_example").passed is False


def test_too_few_draws_say_so() -> None:
    found = checked(given=toy(dtype=torch.float64), mode=Reinforce(baseline=0.9), draws=3)
    assert found.passed is None
    assert "Too noisy to tell: give draws=" in found.verdict


# ------------------------------------------------------------------------------------------------------------ in words


def test_float32_is_named_where_it_is_the_reason() -> None:
    case = toy(dtype=torch.float32)
    adam = torch.optim.AdamW(case.student.parameters())
    for x in (case.labeled[0], case.unlabeled):
        x.mul_(0.03)
    found = checked(given=case, inner_optimizer=adam, inner_state=None)
    assert found.passed
    assert found.rounded is not None
    assert found.rounded.relative_error > 1e-3
    assert "float32 is the reason, not the mode. An Adam of few steps" in found.verdict


def test_it_prints_in_a_few_lines() -> None:
    found = checked()
    assert repr(found).startswith("GradientCheck(mode='forward', passed=True, relative_error=")
    lines = str(found).splitlines()
    assert lines[0] == "forward: passed. It gives the whole gradient, but for rounding."
    assert len(lines) == 7
    assert all(len(line) <= 80 for line in lines)


# ------------------------------------------------------------------------------------------------------------- refusals


class Uncopyable(metapl.PseudoLabels):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle 'generator' object")


class Short(metapl.PseudoLabels):
    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return outputs @ torch.ones(3) * signal.value[:, 0]


class Cast(metapl.PseudoLabels):
    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        return Signal(teacher(batch).float().softmax(-1))


class Drawn(Problem):
    """Sampled labels, and no differentiable form."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        log_q = teacher(batch).log_softmax(-1)
        drawn = torch.multinomial(log_q.detach().exp(), 1, generator=generator)
        return Signal(drawn[:, 0], log_q.gather(1, drawn)[:, 0])

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return F.cross_entropy(outputs, signal.value, reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another mode": ({"mode": "foward"}, r"mode='foward' was given; expected one of unrolled, forward"),
    "no feedback": ({"mode": "none"}, r"mode 'none' is not meant to give.*expected another mode"),
    "an optimum": ({"mode": "implicit"}, r"mode 'implicit' is not meant to give.*that of an optimum"),
    "altered": ({"mode": Altered()}, r"mode 'forward_permuted' is not meant to give"),
    "one draw": ({"draws": 1}, r"draws=1: expected a number of draws, 2 or more"),
    "NaN draws": ({"draws": float("nan")}, r"draws=nan: expected a"),
    "no batch": ({"unlabeled": None}, r"takes a trainer, or teacher, student and.*the batches of one step"),
    "both spellings": ({"outer": 3}, r"labeled= and outer= were both given"),
    "no optimizer": ({"inner_optimizer": None}, r"takes a trainer, or teacher, student and inner_optimizer"),
    "no derivative": ({"inner_optimizer": 3}, r"its update cannot be differentiated"),
    "no network": ({"student": 3}, r"student.*expected a torch\.nn\.Module"),
    "no teacher": ({"teacher": None}, r"teacher is None"),
    "no problem": ({"problem": 3}, r"problem is.*expected an object with signal"),
    "NaN": ({"unlabeled": torch.full((4, 1, 4, 4), torch.nan)}, r"unlabeled batch holds NaN"),
    "no rows": ({"unlabeled": torch.zeros(0, 1, 4, 4)}, r"unlabeled batch is empty"),
    "labels": ({"labeled": (torch.zeros(2, 1, 4, 4), torch.tensor([0, 7]))}, r"labels run from 0 to 7"),
    "a graph": (
        {"unlabeled": torch.zeros(4, 1, 4, 4, requires_grad=True) * 2},
        r"the unlabeled batch cannot be copied: Only Tensors created explicitly.*without tensors that have a graph",
    ),
    "no copy": ({"problem": Uncopyable()}, r"the problem cannot be copied: cannot pickle 'generator' object"),
    "one type": ({"problem": Short()}, r"in float64 too.*inner_loss fails there.*x\.new_zeros"),
    "a cast": ({"problem": Cast()}, r"teacher's signal is in torch\.float32 there: a cast"),
    "no exact form": ({"problem": Drawn(), "mode": "reinforce"}, r"'reinforce' on Drawn draws.*exact\(\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_moved(case: str) -> None:
    options, text = REFUSED[case]
    with pytest.raises(MetaplError, match=text):
        checked(**options)


def test_refused_where_nothing_can_be_compared() -> None:
    case = toy(dtype=torch.float32)
    still = torch.optim.SGD(case.student.parameters(), lr=0.0)
    with pytest.raises(MetaplError, match=r"the exact gradient is zero.*an inner learning rate above 0"):
        checked(given=case, inner_optimizer=still)
    made, batches = trainer()
    with pytest.raises(MetaplError, match=r"given a trainer, and a student.*expected the trainer alone"):
        metapl.check_gradient(made, made.student, **batches)
