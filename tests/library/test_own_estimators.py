"""Estimators of a user's own, in the terms of both roads: eager, pure, compiled, and by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from captures import without_inductor
from reference import cross_entropy, several_steps, sgd
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metapl
from metapl import MetaplError
from metapl.core.terms import StudentPath
from metapl.feedback import Estimator, Feedback, Forward, Unrolled
from metapl.feedback.base import State, exact_feedback, head_feedback
from metapl.guards.verification import VerificationWarning
from metapl.problems.base import Kind, gumbel

FEATURES = 4
CLASSES = 3
ROWS = 6
RATE = 0.3


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace graphs whole, and run them without Inductor."""
    without_inductor(monkeypatch)


@dataclass(frozen=True)
class LastLayer(Estimator):
    """The feedback through the student's last layer alone, with w zero elsewhere."""

    name: ClassVar[str] = "last_layer"
    labels: ClassVar[tuple[Kind, ...]] = ("soft",)
    is_pure: ClassVar[bool] = True

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        step, w = path.pullback()
        w = {name: direction for name, direction in w.items() if name.startswith("2.")}
        return [exact_feedback(step, w)], state


@dataclass(frozen=True)
class OneMove(Estimator):
    """h by a one-sided move of a fixed length, with a ż of its own."""

    name: ClassVar[str] = "one_move"
    labels: ClassVar[tuple[Kind, ...]] = ("soft",)
    is_pure: ClassVar[bool] = True

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        step, w = path.pullback()
        factor = 1e-6 / step.space.norm(w)
        z_dot = (step.shifted(factor, w) - step.shifted(0 * factor, w)) / factor
        return [head_feedback(step, w, z_dot, 1e-9 * torch.ones_like(factor))], state


@dataclass(frozen=True)
class UnitScore(Estimator):
    """h = −⟨w, g⟩ / ‖w‖ of sampled labels, less that of the step before."""

    name: ClassVar[str] = "unit_score"
    labels: ClassVar[tuple[Kind, ...]] = ("hard",)
    credits: ClassVar[Any] = "batch"
    is_pure: ClassVar[bool] = True

    def init(self) -> State:
        return {"before": torch.zeros(())}

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        step, w = path.pullback()
        h = -step.space.dot(w, step.gradient) / step.space.norm(w)
        return [Feedback(h - state["before"].to(h), "log_prob")], {"before": h}


@dataclass(frozen=True)
class Doubled(Forward):
    name: ClassVar[str] = "doubled"

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        feedback, state = super().feedback(path, state)
        return [of_step.divided_by(0.5) for of_step in feedback], state


@dataclass(frozen=True)
class Fading(Unrolled):
    """Each step counts half of the one after it."""

    name: ClassVar[str] = "fading"

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        feedback, state = super().feedback(path, state)
        later = [len(feedback) - 1 - number for number in range(len(feedback))]
        return [h.divided_by(2.0**n) for h, n in zip(feedback, later, strict=True)], state


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = nn.Linear(FEATURES, CLASSES).double()
    student = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    return teacher, student


def batches(count: int) -> tuple[Any, list[Tensor]]:
    draw = torch.Generator().manual_seed(1)
    x, *inner = torch.randn(1 + count, ROWS, FEATURES, dtype=torch.float64, generator=draw)
    return (x, torch.arange(ROWS) % CLASSES), inner


def trainer_of(mode: Estimator, **options: Any) -> metapl.BilevelTrainer:
    teacher, student = networks()
    return metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=RATE),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.1),
        teacher_losses=(),
        verify=False,
        **options,
    )


@dataclass(frozen=True)
class ByHand:
    """A step by double backward: the gradient g, w, and the leaf that the loss was taken of."""

    q: Tensor
    leaf: Tensor
    gradient: dict[str, Tensor]
    w: dict[str, Tensor]

    def along(self, w: dict[str, Tensor]) -> Tensor:
        """Return −∂⟨g, w⟩/∂(leaf)."""
        terms = [(self.gradient[name] * t).sum() for name, t in w.items()]
        (gradient,) = torch.autograd.grad(torch.stack(terms).sum(), self.leaf)
        return -gradient


def by_hand(labels: Tensor | None = None) -> ByHand:
    """Take the first step of SGD, on soft labels or on these."""
    teacher, student = networks()
    (x, y), (u,) = batches(1)
    q = teacher(u).softmax(-1).detach()
    target = q if labels is None else F.one_hot(labels, CLASSES).to(q)
    leaf = target.clone().requires_grad_()
    theta = {name: p.detach().requires_grad_() for name, p in student.named_parameters()}
    loss = cross_entropy(leaf, functional_call(student, theta, (u,))).mean()
    tensors = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    gradient = dict(zip(theta, tensors, strict=True))
    moved = {name: (p - RATE * gradient[name]).detach() for name, p in theta.items()}
    moved = {name: p.requires_grad_() for name, p in moved.items()}
    outer = F.cross_entropy(functional_call(student, moved, (x,)), y)
    v = torch.autograd.grad(outer, list(moved.values()))
    return ByHand(q, leaf, gradient, {n: -RATE * t for n, t in zip(theta, v, strict=True)})


def last_layer_by_hand() -> list[Tensor]:
    step = by_hand()
    return [step.along({name: t for name, t in step.w.items() if name.startswith("2.")})]


def exact_by_hand() -> list[Tensor]:
    step = by_hand()
    return [step.along(step.w)]


def doubled_by_hand() -> list[Tensor]:
    return [2 * exact_by_hand()[0]]


def unit_score_by_hand() -> list[Tensor]:
    q = by_hand().q
    step = by_hand((q.log() + noise()).argmax(-1))
    flat = torch.cat([t.flatten() for t in step.w.values()])
    gradient = torch.cat([t.detach().flatten() for t in step.gradient.values()])
    return [-(flat @ gradient) / flat.norm()]


def fading_by_hand() -> list[Tensor]:
    teacher, student = networks()
    labeled, inner = batches(2)
    first, second = several_steps(teacher, student, labeled, inner, sgd(RATE)).signal_grads
    return [-first / 2, -second]


def noise() -> Tensor:
    like = torch.zeros((), dtype=torch.float64)
    return gumbel(ROWS, CLASSES, like, torch.Generator().manual_seed(5))


CASES: dict[str, tuple[Estimator, int, Callable[[], list[Tensor]]]] = {
    "a subclass of Estimator": (LastLayer(), 1, last_layer_by_hand),
    "a difference of its own": (OneMove(), 1, exact_by_hand),
    "a state of its own": (UnitScore(), 1, unit_score_by_hand),
    "a subclass of Forward": (Doubled(), 1, doubled_by_hand),
    "two steps ahead": (Fading(), 2, fading_by_hand),
}


def close(value: Any, expected: Any, tolerance: float = 1e-10) -> bool:
    return bool((value - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("case", CASES)
def test_both_roads_have_what_double_backward_has(case: str) -> None:
    mode, steps, reference = CASES[case]
    tolerance = 1e-5 if isinstance(mode, OneMove) else 1e-10
    labeled, inner = batches(steps)
    eager = trainer_of(
        mode,
        generator=torch.Generator().manual_seed(5),
        **{"lookahead": steps} if steps > 1 else {},
    )
    step, state = eager.functional()
    if steps == 1:
        unlabeled: Any = inner[0]
        pure, report = step(state, labeled, inner[0], noise())
        of_pure = [report.feedback]
    else:
        unlabeled = metapl.Lookahead(inner)
        pure, report = step(state, labeled, tuple(inner))
        of_pure = report.feedback
    of_eager = eager.step(labeled, unlabeled).feedback
    for h, expected in zip(of_pure, reference(), strict=True):
        assert close(h, expected, tolerance)
    for h, expected in zip(of_pure, of_eager if steps > 1 else [of_eager], strict=True):
        assert close(h, expected, tolerance)
    for name, p in eager.teacher.named_parameters():  # type: ignore[union-attr]
        assert close(pure.teacher.params[name], p.detach(), tolerance)
    for name, t in eager.mode_state.items():
        assert close(pure.mode[name], t)


@pytest.mark.parametrize(
    "case",
    [
        "a subclass of Estimator",
        "a state of its own",
        pytest.param("a difference of its own", marks=pytest.mark.long),
        pytest.param("a subclass of Forward", marks=pytest.mark.long),
        pytest.param("two steps ahead", marks=pytest.mark.long),
    ],
)
def test_a_compiled_step_is_the_eager_one(case: str) -> None:
    mode, steps, _ = CASES[case]
    labeled, inner = batches(steps)
    unlabeled: Any = inner[0] if steps == 1 else metapl.Lookahead(inner)
    ends = []
    for is_compiled in (False, True):
        options: dict[str, Any] = {"lookahead": steps} if steps > 1 else {}
        trainer = trainer_of(
            mode, compile=is_compiled, generator=torch.Generator().manual_seed(5), **options
        )
        for _ in range(3):
            trainer.step(labeled, unlabeled)
        ends.append([p.detach() for p in trainer.teacher.parameters()])  # type: ignore[union-attr]
    tolerance = 1e-5 if isinstance(mode, OneMove) else 1e-9
    assert all(close(a, b, tolerance) for a, b in zip(*ends, strict=True))


@dataclass(frozen=True)
class EagerOnly(LastLayer):
    is_pure: ClassVar[bool] = False


@dataclass(frozen=True)
class AsksForTheStudent(LastLayer):
    def feedback(self, path: Any, state: State) -> tuple[list[Feedback], State]:
        path.student.ranks.alone  # noqa: B018
        return super().feedback(path, state)


def test_one_that_is_not_written_for_both_roads_is_refused_at_the_door() -> None:
    labeled, (u,) = batches(1)
    with pytest.raises(MetaplError, match=r"EagerOnly.* expected .*is_pure = True"):
        trainer_of(EagerOnly()).functional()
    trainer = trainer_of(EagerOnly(), compile=True)
    with pytest.raises(MetaplError, match="EagerOnly, of the eager road alone"):
        trainer.step(labeled, u)


def test_one_that_asks_for_more_than_the_terms_is_recorded_too() -> None:
    """Its path is that of the eager engine."""
    labeled, (u,) = batches(1)
    weights = []
    for options in ({}, {"compile": True}):
        trainer = trainer_of(AsksForTheStudent(), **options)
        trainer.step(labeled, u)
        weights.append([*trainer.teacher.parameters()])
    torch.testing.assert_close(*weights)


@dataclass(frozen=True)
class HalfOfW(Estimator):
    """The whole gradient in the mean: half of the entries of w, drawn anew, count twice."""

    name: ClassVar[str] = "half_of_w"
    labels: ClassVar[tuple[Kind, ...]] = ("soft",)
    draws: ClassVar[bool] = True

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        step, w = path.pullback()
        sketch = {}
        for name, t in w.items():
            sketch[name] = 2 * t * (path.draws.uniform_like(t) < 0.5)
        return [exact_feedback(step, sketch)], state


def test_a_study_sees_the_draws_of_an_estimator() -> None:
    """Its noise is its spread over draws, and its error falls with them."""
    torch.manual_seed(0)
    teacher, student = (
        nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 3))
        for _ in range(2)
    )
    outer = (torch.randn(64, 6), torch.arange(64) % 3)
    inner = torch.randn(64, 6)
    trainer = metapl.BilevelTrainer(teacher, student, HalfOfW(), verify=False)
    random = torch.get_rng_state()
    modes: list[Any] = ["forward", HalfOfW()]
    study = metapl.ablate(trainer, outer, inner, modes, draws=60, rounds=1, altered=False)
    assert torch.equal(random, torch.get_rng_state())
    forward, half = study.modes["forward"], study.modes["half_of_w"]
    assert not isinstance(forward, str)
    assert not isinstance(half, str)
    # Dropout is that of the networks, and the same in each draw.
    assert forward.noise_to_signal == 0
    assert 0.2 < half.noise_to_signal < 1
    assert half.relative_error < half.noise_to_signal / 3


def test_an_estimator_draws_by_the_generator_that_is_given() -> None:
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    outer = (torch.randn(8, 4), torch.arange(8) % 3)
    inner = torch.randn(6, 4)

    def feedback(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        result = metapl.hypergradient(
            teacher,
            student,
            outer=outer,
            inner=inner,
            mode=HalfOfW(),
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            generator=generator,
            # Its noise is refused.
            verify=False,
        )
        # It has drawn, so that the next call draws something else.
        assert not torch.equal(
            generator.get_state(), torch.Generator().manual_seed(seed).get_state()
        )
        return result.feedback

    first = feedback(1)
    torch.rand(3)
    assert torch.equal(feedback(1), first)
    assert not torch.equal(feedback(2), first)


@dataclass(frozen=True)
class OfOneLoss(Estimator):
    """h of the size of the loss after the step, without L(θ′) of the path itself."""

    name: ClassVar[str] = "of_one_loss"
    labels: ClassVar[tuple[Kind, ...]] = ("soft",)
    is_pure: ClassVar[bool] = True

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        (step,) = path.steps
        (loss,) = path.outer_losses([step.signal])
        return [Feedback(loss * torch.ones_like(step.signal.value), "value")], state


@dataclass(frozen=True)
class Broadcast(OfOneLoss):
    """h for each class, where one for each row and class is expected."""

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        (of_step,), state = super().feedback(path, state)
        return [Feedback(of_step.h[0], "value")], state


@pytest.mark.parametrize("compile", [False, True])
def test_a_report_has_an_outer_loss_where_one_was_taken(*, compile: bool) -> None:
    labeled, (u,) = batches(1)
    taken = trainer_of(LastLayer(), compile=compile).step(labeled, u)
    assert "outer_loss" in taken.as_dict()
    not_taken = trainer_of(OfOneLoss(), compile=compile).step(labeled, u)
    assert "outer_loss" not in not_taken.as_dict()


@pytest.mark.parametrize("compile", [False, True])
def test_feedback_of_another_shape_is_refused(*, compile: bool) -> None:
    labeled, (u,) = batches(1)
    trainer = trainer_of(Broadcast(), compile=compile)
    with pytest.raises(MetaplError, match="h of the signal's 'value' is"):
        trainer.step(labeled, u)


class WithoutName(LastLayer):
    name: ClassVar[Any] = None


class WithText(LastLayer):
    labels: ClassVar[Any] = "soft"


class WithOtherCredits(LastLayer):
    credits: ClassVar[Any] = "entry"


class ReturnsFeedback(LastLayer):
    def feedback(self, path: Any, state: State) -> Any:
        feedback, state = super().feedback(path, state)
        return feedback[0], state


class ReturnsOneThing(LastLayer):
    def feedback(self, path: Any, state: State) -> Any:
        feedback, state = super().feedback(path, state)
        return feedback


class DrawsAndReturnsOneThing(ReturnsOneThing):
    draws: ClassVar[bool] = True


class ReturnsTensors(LastLayer):
    def feedback(self, path: Any, state: State) -> Any:
        feedback, state = super().feedback(path, state)
        return [of_step.h for of_step in feedback], state


class TakesNames(LastLayer):
    def feedback(self, path: Any, state: State) -> Any:
        feedback, state = super().feedback(path, state)
        numbers = {"inner_loss": torch.tensor(99.0), "length": torch.tensor(1.0)}
        return [replace(of_step, numbers=numbers) for of_step in feedback], state


class ReturnsTwo(LastLayer):
    def feedback(self, path: Any, state: State) -> Any:
        feedback, state = super().feedback(path, state)
        return feedback * 2, state


def changing(**changes: Any) -> type[LastLayer]:
    """Return an estimator that gives other things in the fields of its feedback."""

    class Changing(LastLayer):
        def feedback(self, path: Any, state: State) -> Any:
            feedback, state = super().feedback(path, state)
            return [replace(of_step, **changes) for of_step in feedback], state

    return Changing


class Counting(LastLayer):
    """Counts its calls, by writing to its state."""

    def init(self) -> State:
        return {"calls": torch.zeros(())}

    def feedback(self, path: Any, state: State) -> Any:
        state["calls"] += 1
        return super().feedback(path, state)


def test_a_refused_step_leaves_the_state_of_an_estimator_that_writes_to_it() -> None:
    labeled, (u,) = batches(1)
    trainer = trainer_of(Counting())
    trainer.step(labeled, u)
    with pytest.raises(MetaplError):
        trainer.step(labeled, u * float("nan"))
    assert float(trainer.mode_state["calls"]) == 1
    trainer.step(labeled, u)
    assert float(trainer.mode_state["calls"]) == 2


@dataclass(frozen=True)
class NamedAsShape(LastLayer):
    """Options of its own with names that other estimators have for a shape of h."""

    baseline: float = 0.5
    similarity: str = "angle"


def test_options_named_as_those_of_other_estimators_are_kept() -> None:
    mode = NamedAsShape()
    assert mode.without_shape() == mode
    labeled, (u,) = batches(1)
    trainer_of(mode).step(labeled, u)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (WithoutName, "lacks a name"),
        (WithText, "lacks its kinds of labels"),
        (WithOtherCredits, "lacks known credits; expected some of signal, example, batch"),
        (ReturnsFeedback, "expected a list of a Feedback for each student step"),
        (ReturnsOneThing, "; expected a list of a Feedback"),
        (DrawsAndReturnsOneThing, "; expected a list of a Feedback"),
        (ReturnsTensors, "in its list; expected a Feedback"),
        (TakesNames, "numbers inner_loss, which a report has already"),
        (ReturnsTwo, "a list of 2; expected a Feedback for each of 1 steps"),
        (changing(h=None), "of type NoneType for h; expected a tensor"),
        (changing(h=0.5), "of type float for h; expected a tensor"),
        (changing(h=torch.zeros(ROWS, CLASSES, dtype=torch.complex64)), "complex64, on cpu for h"),
        (changing(part="values"), "h on values; expected fields of the signal: value"),
        (changing(others={"weight": torch.zeros(1)}), "h on weight; expected fields"),
        (changing(numbers={"length": 1.0}), "of type float for its number 'length'"),
        (changing(numbers={"length": torch.zeros(2)}), r"shape \(2,\), float32, on cpu for its"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_an_estimator_that_is_not_whole_is_refused(
    kind: type[LastLayer], text: str, verify: bool
) -> None:
    """Numbers with the name of one of the report's were in its place in silence."""

    def take_step() -> None:
        teacher = nn.Linear(FEATURES, CLASSES)
        student = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        trainer = metapl.BilevelTrainer(teacher, student, kind(), verify=verify)
        labeled = torch.randn(ROWS, FEATURES), torch.arange(ROWS) % CLASSES
        trainer.step(labeled, torch.randn(ROWS, FEATURES))

    with pytest.raises(MetaplError, match=text):
        take_step()


# --------------------------------------------------------------------------------- what is verified


@dataclass(frozen=True)
class WrongSign(Estimator):
    """One number for the batch, made of outer losses, of the wrong sign."""

    name: ClassVar[str] = "wrong_sign"
    labels: ClassVar[Any] = ("hard",)
    credits: ClassVar[Any] = "batch"
    takes_outer_losses: ClassVar[bool] = True

    def feedback(self, path: Any, state: State) -> tuple[list[Feedback], State]:
        return [Feedback(path.outer_loss - path.outer_loss_before, "log_prob")], state


@dataclass(frozen=True)
class WrongSignOfLosses(WrongSign):
    """It says what its number should be."""

    def h_of_losses(self, before: Tensor, after: Tensor) -> Tensor:
        return before - after


def test_a_number_that_is_compared_with_nothing_is_not_called_right() -> None:
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    sgd = torch.optim.SGD(student.parameters(), lr=0.1)
    batches: dict[str, Any] = {
        "outer": (torch.randn(8, 4), torch.arange(8) % 3),
        "inner": torch.randn(8, 4),
    }

    def checked(mode: Any) -> Any:
        return metapl.check_gradient(teacher, student, mode=mode, inner_optimizer=sgd, **batches)

    check = checked(WrongSign())
    assert (check.status, check.passed) == ("cannot tell", None)
    assert "expected h_of_losses(before, after) in its class" in check.verdict
    assert checked(WrongSignOfLosses()).status == "refused"
    trainer = metapl.BilevelTrainer(teacher, student, WrongSign(), inner_optimizer=sgd)
    with pytest.warns(VerificationWarning, match="made of outer losses, no derivative"):
        trainer.step(**batches)
    # Once.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step(**batches)
