"""The trainer's step does to both networks what the hypergradient says.

The teacher's own losses stand beside it. What a trainer hands out is a snapshot, and threads do not
meet.
"""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from problems_zoo import (
    ANYWHERE,
    OPTIMISERS,
    STUDENTS,
    Judged,
    Toy,
    everything,
    gradient,
    mlp,
    noisy_teacher,
    product,
    same,
    toy,
    values,
)
from reference import error, flat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import metapl
from metapl import UDA, CrossEntropy
from metapl.training.loss_trainer import LossTrainer

SAMPLED = ["reinforce", "reinforce_per_example", "loss_difference"]


def trainer_for(case: Toy, mode: Any, **options: Any) -> metapl.BilevelTrainer:
    """Return a trainer with plain SGD at rate 1 on the teacher, so that its step is its gradient.

    It has no losses of its own.
    """
    options = {"teacher_losses": (), "verify": False, **options}
    options.setdefault("outer_optimizer", torch.optim.SGD(case.teacher.parameters(), lr=1.0))
    return metapl.BilevelTrainer(**case.networks(), mode=mode, **options)


def movement(weights_before: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return by how much each weight has moved."""
    return {name: p.detach() - weights_before[name] for name, p in network.named_parameters()}


@pytest.mark.parametrize(
    ("mode", "student", "optimiser"),
    product(
        ANYWHERE,
        STUDENTS,
        ("torch_sgd_nesterov", "torch_adamw", "torchopt_sgd_nesterov", "torchopt_clip"),
        usual=(*ANYWHERE, "dropout", "torch_sgd_nesterov"),
    ),
)
def test_a_step_does_what_the_hypergradient_says(mode: str, student: str, optimiser: str) -> None:
    """Two steps in a row do what the hypergradient says, whatever gradients the caller has left.

    The teacher moves by −grads exactly, the student to θ′, and the state goes on.
    """
    case = toy(student, teacher=noisy_teacher)
    state = None
    for p in (*case.student.parameters(), *case.teacher.parameters()):
        p.grad = torch.ones_like(p)
    inner = OPTIMISERS[optimiser].build(case.student)
    trainer = trainer_for(case, mode, inner_optimizer=inner, feedback_weight=3.0)
    for step in range(2):
        torch.manual_seed(step)
        expected = gradient(case, mode, inner_optimizer=inner, inner_state=state)
        random_state = torch.get_rng_state()
        weights_before = values(case.teacher)
        torch.manual_seed(step)
        report = trainer.step(**case.data())
        state = expected.inner_state
        assert torch.equal(torch.get_rng_state(), random_state)
        if mode == "none":
            assert all(d.abs().max() == 0 for d in movement(weights_before, case.teacher).values())
        else:
            step_of_teacher = {n: -3.0 * g for n, g in expected.grads.items()}
            gap = flat(movement(weights_before, case.teacher)) - flat(step_of_teacher)
            # Weights of order 1 round at 1e-16.
            assert gap.norm() < 1e-12 * flat(step_of_teacher).norm() + 1e-15
        assert error(values(case.student), expected.student_params) < 1e-13
        assert torch.equal(report.feedback, expected.feedback)
        assert report.inner_loss == pytest.approx(float(expected.inner_loss), rel=1e-14)
        if mode != "none":
            assert report.outer_loss == pytest.approx(float(expected.outer_loss), rel=1e-12)
        assert report.step == step
    gradients = [p.grad for net in case.networks().values() for p in net.parameters()]
    assert all(g is None or (g == 1).all() for g in gradients), "no gradients but the caller's own"


def twice(
    case_of: Callable[[], Toy], mode: Any, own_generator: bool, **options: Any
) -> list[list[Tensor]]:
    """Take three steps with and without recomputation; return all that there is at the end."""
    runs = []
    for recompute in (False, True):
        case = case_of()
        generator = torch.Generator().manual_seed(3) if own_generator else None
        outer = torch.optim.SGD(case.teacher.parameters(), lr=0.5, momentum=0.9)
        trainer = trainer_for(
            case,
            mode,
            outer_optimizer=outer,
            generator=generator,
            recompute_teacher=recompute,
            **options,
        )
        torch.manual_seed(0)
        reports = [trainer.step(**case.data()) for _ in range(3)]
        runs.append(
            [
                *everything(case, outer),
                *(r.feedback for r in reports),
                *(r.signal.value for r in reports),
            ]
        )
        if generator is not None:
            runs[-1].append(generator.get_state())
    return runs


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("losses", [(), (CrossEntropy(0.1), UDA(temperature=0.5))])
@pytest.mark.parametrize("mode", ["forward", "unrolled", *SAMPLED])
def test_recomputing_the_teacher_changes_no_bit(
    mode: str, losses: tuple[Any, ...], own_generator: bool
) -> None:
    """With dropout, batch norm and sampled labels; statistics are updated once per pass."""
    runs = twice(
        lambda: toy("dropout", teacher=noisy_teacher, views=True),
        mode,
        own_generator,
        teacher_losses=losses,
    )
    assert same(*runs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ANYWHERE)
def test_statistics_and_generator_advance_as_by_one_pass_of_each_network(
    mode: str, recompute: bool
) -> None:
    """One pass of the student on the strong view, and one of the teacher on the weak view.

    There is one draw of labels.
    """
    case = toy("batch_norm", teacher=noisy_teacher, views=True)
    case.student.append(nn.Dropout(0.2))
    twin = toy("batch_norm", teacher=noisy_teacher, views=True)
    twin.student.append(nn.Dropout(0.2))
    torch.manual_seed(4)
    trainer_for(case, mode, recompute_teacher=recompute).step(**case.data())
    random_state = torch.get_rng_state()
    torch.manual_seed(4)
    twin.student(twin.unlabeled[1])
    q = twin.teacher(twin.unlabeled[0]).softmax(-1)
    if mode in SAMPLED:
        reference.drawn(q)
    assert torch.equal(random_state, torch.get_rng_state())
    for role in ("student", "teacher"):
        buffers = dict(case.networks()[role].named_buffers())
        buffers_of_twin = dict(twin.networks()[role].named_buffers())
        assert buffers
        assert same([*buffers.values()], [*buffers_of_twin.values()])


@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference", *SAMPLED])
def test_the_student_learns_strong_and_the_teacher_is_fed_back_through_weak(mode: str) -> None:
    kinds = {
        "reinforce": "batch_mean",
        "reinforce_per_example": "score",
        "loss_difference": "score",
    }
    kind = kinds.get(mode, "soft")
    case = toy("batch_norm", views=True)
    rule = OPTIMISERS["torch_sgd_nesterov"]
    inner = rule.build(case.student)
    weights_before = values(case.teacher)
    case.draw_from_start()
    expected = reference.pseudo_labels(**case.networks(), **case.data(), rule=rule.rule, kind=kind)
    case.draw_from_start()
    trainer = trainer_for(case, mode, inner_optimizer=inner)
    report = trainer.step(**case.data())
    assert error(values(case.student), expected.student_params) < 1e-12
    if mode != "loss_difference":
        step_of_teacher = {n: -g for n, g in expected.grads.items()}
        assert error(movement(weights_before, case.teacher), step_of_teacher) < 1e-4
    if mode in SAMPLED:
        assert torch.equal(report.signal.value, expected.labels)


def smoothed_cross_entropy(
    teacher: nn.Module, outer: tuple[Tensor, Tensor], alpha: float
) -> Tensor:
    target = (1 - alpha) * torch.eye(3, dtype=torch.float64)[outer[1]] + alpha / 3
    return reference.cross_entropy(target, teacher(outer[0])).mean()


def uda(
    teacher: nn.Module, views: tuple[Tensor, Tensor], temperature: float, threshold: float
) -> Tensor:
    weak, strong = views
    logits = teacher(weak).detach()
    target = (logits / temperature).softmax(-1)
    is_confident = (logits.softmax(-1).max(-1).values > threshold).double()
    return (is_confident * reference.cross_entropy(target, teacher(strong))).mean()


@pytest.mark.parametrize("threshold", [0.0, 0.42])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_teachers_own_losses_are_added_to_the_feedback(
    temperature: float, threshold: float, recompute: bool
) -> None:
    """Three steps through a ramp of two: λ_t = 0, λ/2, λ. The target of UDA carries no gradient."""
    case = toy("batch_norm", views=True)
    losses = (
        CrossEntropy(label_smoothing=0.2, weight=0.7),
        UDA(temperature, threshold, weight=1.5, ramp=2),
    )
    trainer = trainer_for(
        case, "forward", teacher_losses=losses, recompute_teacher=recompute, feedback_weight=2.0
    )
    for ramp in (0.0, 0.5, 1.0):
        weights_before = values(case.teacher)
        of_feedback = gradient(case, inner_optimizer=trainer.inner_optimizer).grads
        supervised = 0.7 * smoothed_cross_entropy(case.teacher, case.labeled, 0.2)
        consistency = 1.5 * ramp * uda(case.teacher, case.unlabeled, temperature, threshold)
        of_losses = torch.autograd.grad(supervised + consistency, list(case.teacher.parameters()))
        expected = {}
        for name, g in zip(weights_before, of_losses, strict=True):
            expected[name] = -(2.0 * of_feedback[name] + g)
        report = trainer.step(**case.data())
        assert error(movement(weights_before, case.teacher), expected) < 1e-12
        assert report.teacher_cross_entropy == pytest.approx(supervised.item(), rel=1e-12)
        assert report.teacher_uda == pytest.approx(consistency.item(), rel=1e-12)
        assert report.teacher_loss == pytest.approx((supervised + consistency).item(), rel=1e-12)


@pytest.mark.parametrize("optimiser", ["torch_sgd_nesterov", "torchopt_sgd_nesterov"])
@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference", "reinforce_per_example"])
def test_the_students_clip_is_part_of_its_update(mode: str, optimiser: str) -> None:
    """Two steps have an active clip of 0.05 on both networks.

    θ′ is compared, and the feedback through the clip's derivative.
    """
    case = toy("group_norm")
    rule = OPTIMISERS[optimiser]
    trainer = trainer_for(
        case, mode, inner_optimizer=rule.build(case.student), clip_norm=0.05, feedback_weight=100.0
    )
    clipped = reference.clipped(0.05, rule.rule)
    state = None
    kind = "score" if mode == "reinforce_per_example" else "soft"
    for _ in range(2):
        weights_before = values(case.teacher)
        case.draw_from_start()
        expected = reference.pseudo_labels(
            **case.networks(), **case.data(), rule=clipped, state=state, kind=kind
        )
        state = expected.state
        case.draw_from_start()
        report = trainer.step(**case.data())
        bound = 1e-4 if mode == "difference" else 1e-9
        assert error(report.feedback, -expected.signal_grad) < bound
        assert error(values(case.student), expected.student_params) < 1e-12
        length = 100.0 * flat(expected.grads).norm()
        scale = 100.0 * min(1.0, 0.05 / float(length + 1e-6))
        step_of_teacher = {n: -scale * g for n, g in expected.grads.items()}
        assert error(movement(weights_before, case.teacher), step_of_teacher) < bound


def test_cross_entropy_of_hard_labels_is_smoothed_for_the_student_alone() -> None:
    """The teacher's score term stays log p(ŷ): smoothing it too would bias the feedback."""
    case = replace(toy("mlp"), teacher=mlp().double())
    weights_before = values(case.teacher)
    trainer = trainer_for(case, "reinforce", problem=metapl.PseudoLabels(label_smoothing=0.3))
    twin_logits = case.teacher(case.unlabeled)
    torch.manual_seed(0)
    report = trainer.step(**case.data())
    score = F.cross_entropy(twin_logits, report.signal.value, reduction="mean")
    (g,) = torch.autograd.grad(report.feedback * score, twin_logits)
    # The last bias moves by minus the sum over the batch of the gradient at the outputs.
    assert error(movement(weights_before, case.teacher)["3.bias"], -g.sum(0)) < 1e-12


def test_a_step_of_one_network_is_torchs_own_on_the_sum_of_the_losses() -> None:
    torch.manual_seed(0)
    ours = nn.Linear(4, 3).double()
    theirs = nn.Linear(4, 3).double()
    theirs.load_state_dict(ours.state_dict())
    labeled = (torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1]))
    weak, strong = torch.randn(2, 6, 4).double()
    our_optimizer = torch.optim.SGD(ours.parameters(), lr=0.2, momentum=0.9)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.2, momentum=0.9)
    ours.frozen = nn.Parameter(torch.ones(2).double(), requires_grad=False)
    # The old gradient of a frozen weight is in no norm.
    ours.frozen.grad = torch.full((2,), 1e3).double()
    losses = CrossEntropy(label_smoothing=0.1), UDA(temperature=0.5, weight=2.0)
    trainer = LossTrainer(ours, losses, optimizer=our_optimizer, clip_norm=0.3)
    for _ in range(3):
        report = trainer.step(labeled, (weak, strong)).as_dict()
        supervised = F.cross_entropy(theirs(labeled[0]), labeled[1], label_smoothing=0.1)
        target = (theirs(weak) / 0.5).softmax(1).detach()
        consistency = 2.0 * F.cross_entropy(theirs(strong), target)
        optimizer.zero_grad()
        (supervised + consistency).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        optimizer.step()
        assert report["loss"] == pytest.approx((supervised + consistency).item(), rel=1e-6)
        assert report["loss_cross_entropy"] == pytest.approx(supervised.item(), rel=1e-6)
        assert report["loss_uda"] == pytest.approx(consistency.item(), rel=1e-6)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-9, atol=1e-12)


class Table(nn.Module):
    """A teacher that is a table of labels."""

    def __init__(self, rows: int, classes: int) -> None:
        super().__init__()
        self.labels = nn.Parameter(torch.full((rows, classes), 1 / classes))


class OfTable(Judged):
    def signal(
        self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any
    ) -> metapl.Signal:
        return metapl.Signal(teacher.labels[: len(batch)])

    def inner_loss(
        self, outputs: Any, signal: metapl.Signal, batch: Any, params: Any = None
    ) -> Any:
        return F.cross_entropy(outputs, signal.value, reduction="none")


def test_the_report_is_of_the_step_where_the_signal_is_a_weight() -> None:
    table = Table(8, 4)
    student = nn.Linear(6, 4)
    trainer = metapl.BilevelTrainer(
        table,
        student,
        "forward",
        problem=OfTable(),
        outer_optimizer=torch.optim.SGD(table.parameters(), lr=100.0),
    )
    report = trainer.step((torch.randn(8, 6), torch.arange(8) % 4), torch.randn(8, 6))
    assert table.labels.amax() > 0.3
    assert report.signal.value.amax() == 0.25


class OfTheSignal:
    """A teacher loss in the outputs that the feedback goes through as well."""

    name = "of_the_signal"

    def __call__(self, teacher: nn.Module, *, signal: metapl.Signal, **batches: object) -> Tensor:
        assert signal.outputs is not None
        return signal.outputs.square().mean()


LOSSES = [(metapl.CrossEntropy(0.1),), (metapl.CrossEntropy(0.1), OfTheSignal()), (OfTheSignal(),)]


def distance(**options: Any) -> tuple[Tensor, Any]:
    """Return how far a step has moved the teacher, and its report."""
    case = toy("mlp")
    start = parameters_to_vector(case.teacher.parameters()).detach()
    defaults = {"teacher_losses": None, "generator": torch.Generator().manual_seed(3)}
    trainer = trainer_for(case, **{**defaults, **options})
    x, y = case.labeled
    report = trainer.step((x[:4], y[:4]), case.unlabeled)
    end = parameters_to_vector(case.teacher.parameters()).detach()
    return end - start, report


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"recompute_teacher": True}], ids=str)
@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_the_norms_of_the_two_gradients_have_this_ratio(
    mode: str, options: dict[str, Any], losses: tuple[Any, ...]
) -> None:
    """The step is also that of the weight which the report says."""

    def distance_by(**size: float) -> tuple[Tensor, Any]:
        return distance(mode=mode, teacher_losses=losses, **size, **options)

    by_ratio, report = distance_by(feedback_ratio=0.25)
    by_losses, _ = distance_by(feedback_weight=0.0)
    by_feedback = by_ratio - by_losses
    assert float(by_feedback.norm() / by_losses.norm()) == pytest.approx(0.25)
    by_weight, _ = distance_by(feedback_weight=report.feedback_weight)
    torch.testing.assert_close(by_ratio, by_weight)


def test_without_feedback_there_is_no_size_of_it() -> None:
    by_ratio, report = distance(mode="none", feedback_ratio=0.25)
    by_default, _ = distance(mode="none")
    torch.testing.assert_close(by_ratio, by_default)
    assert not {"feedback_weight", "feedback_ratio"} & set(report.scalars)


@pytest.mark.parametrize("inner", ["torch_sgd_momentum", "torch_adam", "torchopt_sgd_nesterov"])
def test_a_state_dict_is_a_snapshot(inner: str) -> None:
    """Also once it was loaded: what it brings back is the run from there, twice."""
    case = toy("batch_norm")
    optimizer = OPTIMISERS[inner].build(case.student)
    trainer = trainer_for(case, metapl.feedback.Reinforce(baseline=0.9), inner_optimizer=optimizer)
    trainer.step(**case.data())
    state = trainer.state_dict()
    runs = []
    for _ in range(2):
        trainer.load_state_dict(state)
        torch.manual_seed(0)
        for _ in range(3):
            trainer.step(**case.data())
        runs.append(everything(case, generator=False))
    assert same(*runs)


class Caches(nn.Module):
    """A table that the first pass makes, and later ones read."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0.5, 1.5, x.shape[-1])
        return x * self.table


def test_what_a_first_evaluation_makes_is_trained_with_afterwards() -> None:
    """So evaluation is no inference mode, whose tensors autograd refuses."""
    student = nn.Sequential(Caches(), nn.Linear(5, 3))
    trainer = metapl.BilevelTrainer(nn.Linear(5, 3), student, "forward")
    trainer.predict(torch.randn(4, 5))
    weight_before = student[1].weight.detach().clone()
    trainer.step((torch.randn(4, 5), torch.arange(4) % 3), torch.randn(6, 5))
    assert not torch.equal(student[1].weight, weight_before)


def in_threads(*runs: Callable[[], Any]) -> None:
    failures: list[BaseException] = []

    def guarded(run: Callable[[], Any]) -> None:
        try:
            run()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_two_threads_take_turns() -> None:
    """Two trainers do as well.

    Dropout masks are replayed by generators that the whole process shares.
    """
    under_way: list[int] = []

    class Watching(metapl.PseudoLabels):
        def signal(self, *args: Any, **options: Any) -> metapl.Signal:
            assert under_way == []
            under_way.append(threading.get_ident())
            time.sleep(0.002)
            return super().signal(*args, **options)

        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            assert under_way == [threading.get_ident()]
            under_way.clear()
            return super().outer_loss(outputs, batch)

    cases = [toy("dropout", seed=seed) for seed in range(2)]
    trainers = [trainer_for(case, "forward", problem=Watching()) for case in cases]
    in_threads(
        lambda: [trainers[0].step(**cases[0].data()) for _ in range(10)],
        lambda: [gradient(cases[1], problem=Watching()) for _ in range(10)],
    )


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ next(self.parameters())


def test_a_weight_with_another_name_is_trained_as_before() -> None:
    student = Weight()
    trainer = metapl.BilevelTrainer(nn.Linear(4, 3), student, "forward")
    # Both are the same object, in the same place.
    for name in ("second", "third"):
        trainer.step((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])), torch.randn(6, 4))
        student._parameters[name] = student._parameters.pop(next(iter(student._parameters)))


def regroup(trainer: metapl.BilevelTrainer) -> None:
    first, second = trainer.inner_optimizer.param_groups
    second["params"].append(first["params"].pop())


def exchange(trainer: metapl.BilevelTrainer) -> None:
    """Make a weight of each network another tensor, which the optimizer holds in its place."""
    for net, optimizer in (
        (trainer.student, trainer.inner_optimizer),
        (trainer.teacher, trainer.outer_optimizer),
    ):
        old = net[0].weight
        net[0].weight = nn.Parameter(0.5 * net[0].weight.detach())
        for group in optimizer.param_groups:
            group["params"] = [net[0].weight if p is old else p for p in group["params"]]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a group's parameters": regroup,
    "a group's rate": lambda trainer: trainer.inner_optimizer.param_groups[0].update(
        lr=0.5, momentum=0.0
    ),
    "the optimizer's state": lambda trainer: trainer.inner_optimizer.state.clear(),
    "weights": exchange,
    "their memory": lambda trainer: [
        setattr(p, "data", 0.5 * p.data) for p in trainer.student.parameters()
    ],
    "what is trained": lambda trainer: trainer.student[0].requires_grad_(requires_grad=False),
    "the mode": lambda trainer: trainer.student.eval(),
    "a hook": lambda trainer: trainer.student[0].register_forward_hook(lambda part, x, z: 2 * z),
    "a part": lambda trainer: trainer.student.insert(1, nn.BatchNorm1d(6, affine=False)),
}


@pytest.mark.filterwarnings("ignore:the student is in eval")
@pytest.mark.parametrize("mode", ["forward", "reinforce", "unrolled"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_seen(change: str, mode: Any) -> None:
    """The next step is that of a trainer which has been built after the change."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, 3))
    student = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, 3))
    groups = [
        {"params": [*student[0].parameters()], "lr": 0.1},
        {"params": [*student[3].parameters()], "lr": 0.3},
    ]
    inner = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    outer = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9)
    labeled = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    trainer = metapl.BilevelTrainer(
        teacher, student, mode, inner_optimizer=inner, outer_optimizer=outer, verify=False
    )
    for _ in range(2):
        trainer.step(labeled, torch.randn(6, 4))
    CHANGES[change](trainer)
    teacher, student, inner, outer = copy.deepcopy((teacher, student, inner, outer))
    new_trainer = metapl.BilevelTrainer(
        teacher, student, mode, inner_optimizer=inner, outer_optimizer=outer, verify=False
    )

    def tensors_after_step(stepping: metapl.BilevelTrainer) -> list[Tensor]:
        torch.manual_seed(1)
        report = stepping.step(labeled, torch.randn(6, 4))
        weights_of_teacher = stepping.teacher.state_dict().values()  # type: ignore[union-attr]
        return [report.feedback, *stepping.student.state_dict().values(), *weights_of_teacher]

    assert same(tensors_after_step(trainer), tensors_after_step(new_trainer))


@pytest.mark.parametrize("mode", ["forward", "unrolled", "none", *SAMPLED])
def test_a_step_is_freed_when_it_ends(mode: str) -> None:
    """No cycle holds its tensors and graphs until the garbage collector comes."""
    case = toy()
    trainer = trainer_for(case, mode)
    for _ in range(3):
        trainer.step(case.labeled, case.unlabeled)
    gc.collect()
    gc.disable()
    try:
        trainer.step(case.labeled, case.unlabeled)
        assert gc.collect() == 0
    finally:
        gc.enable()
