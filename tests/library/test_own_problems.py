"""Problems and losses of a user's own, and feedback whose size is a ratio: right, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems_zoo import Toy, mlp, toy, unmoved
from reference import error, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from trainers import Supervised, trainer_for, values

import metapl
from metapl import MetaplError, Signal

SOFT, SAMPLED = ("unrolled", "forward", "difference"), ("reinforce", "reinforce_per_example", "loss_difference")


# -------------------------------------------------------------------------------- the feedback's size (feedback_ratio)


class Labeller(nn.Module):
    """A teacher whose labels are from a method of its own, and whose forward may return a tuple or a dict."""

    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        self.network, self.returns = mlp().double(), returns

    def forward(self, x: Tensor) -> Any:
        logits = self.network(x)
        return {"tensor": logits, "tuple": (x, logits), "dict": {"logits": logits}}[self.returns]

    def label(self, x: Tensor) -> Tensor:
        return self.network(x)

    def logits(self, x: Tensor) -> Tensor:
        outputs = self(x)
        return {"tensor": lambda: outputs, "tuple": lambda: outputs[1], "dict": lambda: outputs["logits"]}[
            self.returns
        ]()


class ByForward(metapl.PseudoLabels):
    def signal(self, teacher: Any, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher.logits(batch).softmax(-1))


class ByMethod(metapl.PseudoLabels):
    def signal(self, teacher: Any, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher.label(batch).softmax(-1))


def step_by_ratio(returns: str, problem: Any) -> tuple[dict[str, Tensor], float]:
    case = toy("mlp", teacher=lambda: Labeller(returns))
    outer = torch.optim.SGD(case.teacher.parameters(), lr=1.0)
    trainer = trainer_for(
        case, problem=problem, teacher_losses=(Supervised(),), feedback_ratio=0.25, outer_optimizer=outer
    )
    before = values(case.teacher)
    report = trainer.step(**case.data())
    return {name: p - before[name] for name, p in values(case.teacher).items()}, report.feedback_ratio


@pytest.mark.parametrize("returns", ["tuple", "dict"])
def test_a_ratio_is_measured_in_tuples_and_dicts_as_in_tensors(returns: str) -> None:
    moved, ratio = step_by_ratio(returns, ByForward())
    plain, _ = step_by_ratio("tensor", ByForward())
    assert ratio == pytest.approx(0.25)
    assert error(moved, plain) < 1e-12


def test_a_ratio_refuses_a_signal_that_passes_by_what_it_is_measured_at() -> None:
    case = toy("mlp", teacher=Labeller)
    options: dict[str, Any] = {"problem": ByMethod(), "teacher_losses": (Supervised(),)}
    by_ratio = trainer_for(case, feedback_ratio=0.25, **options)
    with (
        unmoved(case),
        pytest.raises(MetaplError),
    ):
        by_ratio.step(**case.data())
    report = trainer_for(case, feedback_weight=2.0, **options).step(**case.data())
    assert report.feedback_ratio != report.feedback_ratio, "a ratio that cannot be told is NaN, not 0"


def test_the_gradient_by_a_method_is_that_by_forward() -> None:
    found = []
    for problem in (ByMethod(), ByForward()):
        case = toy("mlp", teacher=Labeller)
        inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
        found.append(metapl.hypergradient(**case.networks(), **case.data(), problem=problem, inner_optimizer=inner))
    assert error(found[0].grads, found[1].grads) < 1e-12


# ------------------------------------------------------------------------------------------------ problems of one's own


class Reweighting(metapl.BilevelProblem):
    """The teacher weighs each example by the student's own loss on it; a batch is (x, noisy label)."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        losses = F.cross_entropy(student_outputs, batch[1], reduction="none")
        return Signal(teacher(losses.unsqueeze(-1)).squeeze(-1).sigmoid())

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value * F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


def reweighting(**options: Any) -> tuple[Toy, metapl.BilevelTrainer]:
    case = toy("mlp", teacher=lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    case = Toy(case.teacher, case.student, case.labeled, (case.unlabeled, torch.tensor([2, 0, 1, 1])), case.seed)
    return case, trainer_for(case, problem=Reweighting(), **options)


def test_a_problem_of_ones_own_needs_no_teacher_losses() -> None:
    """By default it has none; the teacher's step is the hypergradient's."""
    case, trainer = reweighting(outer_optimizer=None)
    trainer.outer_optimizer.param_groups[0].update(lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
    inner = trainer.inner_optimizer
    found = metapl.hypergradient(**case.networks(), **case.data(), problem=Reweighting(), inner_optimizer=inner)
    before = values(case.teacher)
    trainer.step(**case.data())
    assert error({n: before[n] - p for n, p in values(case.teacher).items()}, found.grads) < 1e-12
    with pytest.raises(MetaplError):
        reweighting(feedback_ratio=0.1)
    with pytest.raises(MetaplError):
        trainer.teacher_step(**case.data())


def test_it_can_be_fitted_with_validation_data() -> None:
    """Where the teacher is no classifier, the student alone has an accuracy."""
    case, trainer = reweighting()
    data = {"labeled": [case.labeled], "unlabeled": [case.unlabeled], "steps": 2, "progress": False}
    found = trainer.fit(**data, validation=case.labeled, validate_every=1)
    assert found.validation_accuracy is not None
    assert "teacher_validation_accuracy" not in found.history[-1]
    with pytest.raises(MetaplError):
        trainer.fit(**data, validation=case.labeled, truth=case.labeled)


def test_and_says_whether_its_teacher_is_a_classifier() -> None:
    class Correcting(ByForward):
        teacher_classifies = True

    case = toy("mlp", teacher=Labeller)
    trainer = trainer_for(case, problem=Correcting(), teacher_losses=())
    found = trainer.fit(
        [case.labeled], [case.unlabeled], steps=2, progress=False, validation=case.labeled, validate_every=1
    )
    assert "teacher_validation_accuracy" in found.history[-1]


class Anchored(metapl.PseudoLabels):
    """The student's logits are drawn towards the teacher's, which the loss reads from ``signal.outputs``."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        anchor = self.read(signal.outputs)
        return super().inner_loss(outputs, signal, batch, params) + 0.1 * (anchor - outputs).square().mean(1)

    def read(self, outputs: Any) -> Tensor:
        return outputs.detach()


class AnchoredWithGraph(Anchored):
    def read(self, outputs: Any) -> Tensor:
        return outputs


@pytest.mark.parametrize("problem", [Anchored, AnchoredWithGraph], ids=["constants", "with_graph"])
@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference"])
def test_an_inner_loss_may_read_the_teachers_outputs(mode: str, problem: type[Anchored]) -> None:
    """Against double backward with the graph through the label, and through the outputs where the loss keeps it."""
    case = toy("mlp")
    theta, phi = weights(case.student), weights(case.teacher)
    z = functional_call(case.student, theta, (case.unlabeled,))
    logits = functional_call(case.teacher, phi, (case.unlabeled,))
    anchor = problem.read(problem(), logits)
    losses = -(logits.softmax(-1) * z.log_softmax(-1)).sum(-1) + 0.1 * (anchor - z).square().mean(1)
    g = torch.autograd.grad(losses.mean(), list(theta.values()), create_graph=True)
    moved = {n: p - 0.3 * d for (n, p), d in zip(theta.items(), g, strict=True)}
    outer = F.cross_entropy(functional_call(case.student, moved, (case.labeled[0],)), case.labeled[1])
    expected = dict(zip(phi, torch.autograd.grad(outer, list(phi.values())), strict=True))
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    found = metapl.hypergradient(**case.networks(), **case.data(), mode=mode, problem=problem(), inner_optimizer=inner)
    assert error(found.grads, expected) < (1e-4 if mode == "difference" else 1e-9)
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    before = {n: p.detach().clone() for n, p in case.teacher.named_parameters()}
    outer_optimizer = torch.optim.SGD(case.teacher.parameters(), lr=1.0)
    trainer_for(
        case, mode, problem=problem(), inner_optimizer=inner, outer_optimizer=outer_optimizer, teacher_losses=()
    ).step(**case.data())
    moved = {n: before[n] - p.detach() for n, p in case.teacher.named_parameters()}
    assert error(moved, expected) < (1e-4 if mode == "difference" else 1e-9)


class OutputsAlone(AnchoredWithGraph):
    """Nothing but the teacher's logits teaches the student."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return (signal.outputs - outputs).square().mean(1)


@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_an_inner_loss_may_read_nothing_but_the_teachers_outputs(mode: str) -> None:
    case = toy("mlp")
    found = {
        one: metapl.hypergradient(
            **case.networks(),
            **case.data(),
            mode=one,
            problem=OutputsAlone(),
            inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=0.3),
        )
        for one in (mode, "unrolled")
    }
    assert error(found[mode].grads, found["unrolled"].grads) < (1e-4 if mode == "difference" else 1e-9)
    assert not found[mode].feedback.any()


@pytest.mark.parametrize("how", ["permuted", "class_means", "random_sign"])
def test_a_control_alters_the_feedback_on_every_field(how: Any) -> None:
    """Each part of it by the same permutation or coins."""
    case = toy("mlp")
    options = {"inner_optimizer": torch.optim.SGD(case.student.parameters(), lr=0.3)}
    altered, plain = (
        metapl.hypergradient(
            **case.networks(), **case.data(), **options, problem=problem, mode=metapl.ablation.Altered(alteration=how)
        )
        for problem in (OutputsAlone(), ByForwardOfOutputs())
    )
    exact = metapl.hypergradient(**case.networks(), **case.data(), **options, problem=OutputsAlone())
    assert error(altered.grads, plain.grads) < 1e-12
    assert error(altered.grads, exact.grads) > 1e-2


class ByForwardOfOutputs(metapl.PseudoLabels):
    """:class:`OutputsAlone` with the logits as the signal's value."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher(batch))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return (signal.value - outputs).square().mean(1)


class Steep(AnchoredWithGraph):
    """Its derivative in the teacher's outputs is infinite."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        steep = (signal.outputs - signal.outputs.detach()).abs().sqrt().sum(1)
        return super().inner_loss(outputs, signal, batch, params) + steep * outputs.sum(1)


@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference"])
def test_feedback_that_is_not_finite_is_refused_in_every_field(mode: str) -> None:
    case = toy("mlp")
    trainer = trainer_for(case, mode, problem=Steep())
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step(**case.data())
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    with pytest.raises(MetaplError):
        metapl.hypergradient(**case.networks(), **case.data(), mode=mode, problem=Steep(), inner_optimizer=inner)


class Shares(metapl.BilevelProblem):
    """The teacher weighs each example against the others of the batch that the loss is given."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher(batch).sigmoid()[:, 0])

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value / signal.value.mean() * outputs.square().sum(1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_micro_batches_and_a_loss_that_looks_at_the_whole_batch(mode: str, dtype: torch.dtype) -> None:
    """It is given a micro-batch, in the student's step as in the feedback on it."""
    case = toy("mlp", rows=8, dtype=dtype)
    case = Toy(case.teacher, case.student, (case.labeled[0][:8], case.labeled[1][:8]), case.unlabeled, 0)
    theta, phi = weights(case.student), weights(case.teacher)
    z = functional_call(case.student, theta, (case.unlabeled,)).square().sum(1)
    share = functional_call(case.teacher, phi, (case.unlabeled,)).sigmoid()[:, 0]
    halves = [(q / q.mean() * one).mean() for q, one in zip(share.chunk(2), z.chunk(2), strict=True)]
    g = torch.autograd.grad((halves[0] + halves[1]) / 2, list(theta.values()), create_graph=True)
    moved = {n: p - 0.3 * d for (n, p), d in zip(theta.items(), g, strict=True)}
    outer = F.cross_entropy(functional_call(case.student, moved, (case.labeled[0],)), case.labeled[1])
    grads = torch.autograd.grad(outer, list(phi.values()))
    before = values(case.teacher)
    trainer = trainer_for(
        case,
        mode,
        problem=Shares(),
        accumulate=2,
        inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=0.3),
        outer_optimizer=torch.optim.SGD(case.teacher.parameters(), lr=1.0),
    )
    with pytest.warns(UserWarning, match="inner_loss is .* not a mean over examples.*on micro-batches"):
        trainer.step(**case.data())
    found = {n: before[n] - p for n, p in values(case.teacher).items()}
    assert error(found, dict(zip(phi, grads, strict=True))) < 1e-3
    trainer.step(**case.data())  # it is said once


@pytest.mark.parametrize("mode", SAMPLED)
def test_a_derivative_that_the_feedback_leaves_out_is_refused(mode: str) -> None:
    case = toy("mlp")
    trainer = trainer_for(case, mode, problem=AnchoredWithGraph())
    text = r"inner_loss has a derivative in signal\.outputs.*signal\.outputs\.detach\(\)"
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step(**case.data())
    trainer_for(case, mode, problem=Anchored()).step(**case.data())
    trainer_for(case, "none", problem=AnchoredWithGraph()).step(**case.data())


class Stateful(metapl.problems.Problem):
    """Pseudo-labels with an inner loss that has state of its own, which its evaluation moves."""

    def __init__(self, how: str, base: Any = None) -> None:
        self.how, self.base = how, metapl.PseudoLabels() if base is None else base
        self.calls, self.mean, self.norm = 0, torch.ones(()), nn.BatchNorm1d(3, affine=False)

    def for_modes(self, labels: Any, mode: str = "") -> Stateful:
        return Stateful(self.how, self.base.for_modes(labels, mode))

    def signal(self, teacher: Any, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return self.base.signal(teacher, batch, student_outputs, generator=generator)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.base.outer_loss(outputs, batch)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        if self.how == "counter":
            self.calls += 1
            return self.base.inner_loss(outputs / (1 + 0.1 / self.calls), signal, batch, params)
        if self.how == "running_mean":
            losses = self.base.inner_loss(outputs, signal, batch, params)
            self.mean = 0.9 * self.mean + 0.1 * losses.detach().mean()
            return losses / self.mean
        z = self.norm.to(outputs).eval()(outputs)
        self.norm.train()(outputs.detach())
        return self.base.inner_loss(z, signal, batch, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["counter", "running_mean", "batch_norm"])
@pytest.mark.parametrize(
    ("mode", "ahead"),
    [
        ("forward", 1),
        ("forward", 3),
        (metapl.feedback.Forward(truncate=1, keep_every=2), 3),
        ("difference", 1),
        ("reinforce_per_example", 1),
        (metapl.feedback.Implicit(damping=1.0), 1),
    ],
    ids=str,
)
def test_an_inner_loss_with_state_of_its_own_is_refused(mode: Any, ahead: int, how: str, dtype: torch.dtype) -> None:
    """Where it is evaluated twice."""
    case = toy("mlp", dtype=dtype)
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    trainer = trainer_for(case, mode, problem=Stateful(how), inner_optimizer=inner, lookahead=ahead, teacher_losses=())
    data = case.data() if ahead == 1 else {**case.data(), "unlabeled": metapl.Lookahead([case.unlabeled] * ahead)}
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step(**data)


@pytest.mark.parametrize("how", ["counter", "running_mean", "batch_norm"])
@pytest.mark.parametrize("mode", ["unrolled", "reinforce", "loss_difference", "none"])
def test_and_taken_as_it_is_where_it_is_evaluated_once(mode: str, how: str) -> None:
    case = toy("mlp")
    trainer = trainer_for(case, mode, problem=Stateful(how), teacher_losses=())
    assert trainer.step(**case.data()).inner_loss > 0


class Scaled(metapl.PseudoLabels):
    """With a setting of its own, which is no field."""

    def __init__(self, scale: float = 1.0, **fields: Any) -> None:
        super().__init__(**fields)
        self.scale = scale

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return self.scale * super().inner_loss(outputs, signal, batch)


def patched(scale: float) -> metapl.PseudoLabels:
    problem = metapl.PseudoLabels()
    own = problem.inner_loss
    object.__setattr__(problem, "inner_loss", lambda *given: scale * own(*given[:3]))
    return problem


@pytest.mark.parametrize("mode", ["forward", "reinforce", "none"])
@pytest.mark.parametrize("make", [Scaled, patched])
def test_what_is_put_on_pseudo_labels_stays_when_the_mode_chooses_their_kind(make: Any, mode: str) -> None:
    losses = []
    for problem in (metapl.PseudoLabels(), make(2.0)):
        torch.manual_seed(0)
        teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        trainer = metapl.BilevelTrainer(teacher, student, mode, problem=problem)
        data = {"labeled": (torch.randn(5, 4), torch.arange(5) % 3), "unlabeled": torch.randn(6, 4)}
        losses.append(trainer.step(**data).inner_loss)
        assert problem.kind is None
    assert losses[1] == pytest.approx(2 * losses[0])
    exact = make(2.0).exact()
    assert exact.kind == "soft"
    assert vars(exact).keys() == vars(make(2.0)).keys()


class Alone(metapl.BilevelProblem):
    """The three methods alone, with a setting."""

    def __init__(self) -> None:
        self.scale = 1.0

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher(batch).softmax(-1))

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return self.scale * F.cross_entropy(outputs, signal.value, reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("make", [Scaled, Alone])
@pytest.mark.parametrize("change", ["attribute", "method"])
def test_what_is_put_on_the_given_problem_between_steps_counts(make: Any, change: str) -> None:
    """The trainer may have a copy of it."""
    torch.manual_seed(0)
    problem, x = make(), torch.randn(6, 4)
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    rate = torch.optim.SGD(student.parameters(), lr=0.0), torch.optim.SGD(teacher.parameters(), lr=0.0)
    options = {"inner_optimizer": rate[0], "outer_optimizer": rate[1], "teacher_losses": ()}
    trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=problem, **options)
    data = {"labeled": (torch.randn(5, 4), torch.arange(5) % 3), "unlabeled": x}
    before = trainer.step(**data).inner_loss
    if change == "attribute":
        problem.scale = 2.0
    else:
        own = problem.inner_loss
        problem.inner_loss = lambda *given: 2 * own(*given)
    assert trainer.step(**data).inner_loss == pytest.approx(2 * before)


class BesideACopy:
    """Is compared with what a copy of the teacher says, which is no pass of the teacher's."""

    name = "beside_a_copy"

    def __init__(self, copied: bool) -> None:
        self.copied = copied

    def __call__(self, teacher: nn.Module, *, labeled: Any, **_: Any) -> Tensor:
        twin = copy.deepcopy(teacher) if self.copied else teacher
        with torch.no_grad():
            target = twin(labeled[0]).softmax(-1)
        return F.cross_entropy(1.1 * teacher(labeled[0]), target)


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_a_teacher_may_be_copied_in_a_loss_of_its_own(ratio: float | None) -> None:
    ends = []
    for copied in (False, True):
        case = toy()
        losses = (BesideACopy(copied),)
        trainer = metapl.BilevelTrainer(**case.networks(), mode="forward", teacher_losses=losses, feedback_ratio=ratio)
        reports = [trainer.step(**case.data()) for _ in range(2)]
        ends.append([*case.teacher.parameters(), torch.tensor([r.feedback_ratio for r in reports])])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
