"""Signals of several tensors: each field's feedback, against double backward written out here."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from problems_zoo import CLASSES, OPTIMISERS, Toy, same, toy, unmoved, warm
from reference import Rule, Tree, error, own_stream, weights
from test_own_problems import Labeller
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from trainers import trainer_for, values

import metapl
from metapl import Signal
from metapl.feedback import Forward


class Teacher(Labeller):
    """Logits of labels, and as parameters of their own how far to trust each class and how strong to augment."""

    def __init__(self) -> None:
        super().__init__()
        self.trust = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))
        self.strength = nn.Parameter(torch.tensor([-0.4]))


class Weighted(metapl.problems.Problem):
    """A weight (B,) and a corrected label (B, C) for each example; the shares of the label's first guess are constant
    whole numbers."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        label = teacher(batch).softmax(-1)
        guess = label.argmax(-1)
        return Signal({"weight": teacher.trust[guess].sigmoid(), "label": label, "guess": guess})

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        weight, label, guess = (signal.value[key] for key in ("weight", "label", "guess"))
        return (1 + 0.1 * guess) * weight * F.cross_entropy(outputs, label, reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


class Augmented(Weighted):
    """Besides, how strong the input is changed: one number for all examples."""

    signal_has_rows: ClassVar = {"strength": False}

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        assert student_outputs is None
        found = super().signal(teacher, batch, student_outputs, generator=generator).value
        return Signal({"strength": teacher.strength.exp(), **found})

    def student_input(self, batch: Any, signal: Signal) -> Tensor:
        return batch + signal.value["strength"] * batch.roll(1, -1).square()


Fields = dict[str, Tensor]
TOLD = {Weighted: ["weight", "label"], Augmented: ["strength", "weight", "label"]}


def by_hand(
    case: Toy, problem: type, batches: list[Tensor], rule: Rule, state: Any, parts: int = 1
) -> tuple[Tree, list[Fields], Tree]:
    """dL/dφ, dL/d(field) in every step, and θ after the last one."""
    theta, phi, told = weights(case.student), weights(case.teacher), []
    teacher, student = copy.deepcopy(case.teacher), copy.deepcopy(case.student)
    for batch in batches:
        label = functional_call(teacher, phi, (batch,)).softmax(-1)
        guess = label.argmax(-1)
        fields = {"weight": torch.sigmoid(phi["trust"][guess]), "label": label}
        x = batch
        if problem is Augmented:
            fields = {"strength": phi["strength"].exp(), **fields}
            x = batch + fields["strength"] * batch.roll(1, -1) ** 2
        log_p = functional_call(student, theta, (x,)).log_softmax(-1)
        losses = (1 + 0.1 * guess) * fields["weight"] * -(fields["label"] * log_p).sum(-1)
        g = torch.autograd.grad(losses.mean(), list(theta.values()), create_graph=True)
        theta, state = rule(theta, dict(zip(theta, g, strict=True)), state)
        told.append(fields)
    torch.set_rng_state(own_stream(torch.get_rng_state()))
    loss = F.cross_entropy(functional_call(student, theta, (case.labeled[0],)), case.labeled[1])
    wanted = [*phi.values(), *(t for fields in told for t in fields.values())]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    grads = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(phi.items(), found, strict=False)}
    rest = iter(found[len(phi) :])
    return grads, [{name: next(rest) for name in fields} for fields in told], theta


def ahead_of(case: Toy, steps: int, rows: int = 4) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(rows, 1, 4, 4, generator=draw, dtype=case.unlabeled.dtype) for _ in range(steps)]


def even(case: Toy) -> Toy:
    """With as many labeled rows as two micro-batches share."""
    return Toy(case.teacher, case.student, (case.labeled[0][:4], case.labeled[1][:4]), case.unlabeled, case.seed)


TOLERANCE: dict[Any, float] = {
    "unrolled": 1e-9,
    Forward(by="graph"): 1e-9,
    Forward(by="tangent"): 1e-9,
    Forward(keep_every=2): 1e-9,
    "forward": 1e-9,
    "difference": 1e-6,
}
CASES = [
    *((mode, 1, "torch_sgd_momentum") for mode in TOLERANCE),
    *((mode, 3, optimiser) for mode in ("unrolled", "forward") for optimiser in ("torch_sgd_momentum", "torch_adamw")),
    (Forward(keep_every=2), 3, "torch_sgd_momentum"),
]


@pytest.mark.parametrize("problem", [Weighted, Augmented])
@pytest.mark.parametrize(("mode", "steps", "optimiser"), CASES, ids=str)
def test_every_field_gets_its_own_feedback(mode: Any, steps: int, optimiser: str, problem: type) -> None:
    """In value, sign and scale; a tuple of dicts for a look-ahead."""
    case, rule, tolerance = toy("mlp", teacher=Teacher), OPTIMISERS[optimiser], TOLERANCE[mode]
    inner, _, state = warm(case, rule)
    batches = ahead_of(case, steps)
    grads, in_fields, theta = by_hand(case, problem, batches, rule.rule, state)
    with unmoved(case, inner):
        found = metapl.hypergradient(
            **case.networks(),
            outer=case.labeled,
            inner=metapl.Lookahead(batches) if steps > 1 else batches[0],
            mode=mode,
            problem=problem(),
            inner_optimizer=inner,
        )
    assert error(found.grads, grads) < tolerance
    assert error(found.student_params, theta) < 1e-5
    told = found.feedback if steps > 1 else (found.feedback,)
    assert len(told) == steps
    for h, expected in zip(told, in_fields, strict=True):
        assert list(h) == TOLD[problem]
        for name, g in expected.items():
            assert h[name].shape == g.shape
            assert error(h[name], -g) < 10 * tolerance


@pytest.mark.parametrize(
    ("mode", "recompute", "steps", "tolerance"),
    [("forward", False, 1, 1e-9), ("forward", True, 3, 1e-9), ("difference", False, 1, 1e-6)],
)
@pytest.mark.parametrize("problem", [Weighted, Augmented])
def test_a_step_in_micro_batches(problem: type, mode: str, recompute: bool, steps: int, tolerance: float) -> None:
    """The teacher moves by the weighted feedback on all fields; the field without rows is told of as one."""
    case, rule = even(toy("mlp", teacher=Teacher)), OPTIMISERS["torch_sgd_momentum"]
    batches = ahead_of(case, steps)
    grads, in_fields, theta = by_hand(case, problem, batches, rule.rule, None)
    before = values(case.teacher)
    trainer = trainer_for(
        case,
        mode,
        problem=problem(),
        accumulate=2,
        recompute_teacher=recompute,
        feedback_weight=3.0,
        teacher_losses=(),
        inner_optimizer=rule.build(case.student),
        outer_optimizer=torch.optim.SGD(case.teacher.parameters(), lr=1.0),
    )
    report = trainer.step(outer=case.labeled, inner=metapl.Lookahead(batches) if steps > 1 else batches[0])
    moved = {n: (before[n] - p) / 3 for n, p in values(case.teacher).items()}
    assert error(moved, grads) < tolerance
    assert error(values(case.student), theta) < 1e-9
    told = report.feedback if steps > 1 else (report.feedback,)
    for h, expected in zip(told, in_fields, strict=True):
        assert list(h) == TOLD[problem]
        assert all(h[name].shape == g.shape and error(h[name], -g) < 10 * tolerance for name, g in expected.items())
    entries = torch.cat([-g.flatten() for fields in in_fields for g in fields.values()])
    assert report.feedback_mean == pytest.approx(float(entries.mean()), rel=1e-5)
    assert report.feedback_std == pytest.approx(float(entries.std(correction=0)), rel=1e-5)


class Labels(metapl.problems.Problem):
    """The teacher's distribution, as a tensor, or as a dict of one."""

    def __init__(self, key: str | None = None) -> None:
        self.key = key

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        q = teacher(batch).softmax(-1)
        return Signal(q if self.key is None else {self.key: q})

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return F.cross_entropy(outputs, signal.value if self.key is None else signal.value[self.key], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize(
    ("mode", "key", "options"),
    [
        ("forward", "it's [so]", {}),
        ("unrolled", "probs", {}),
        ("difference", "value", {}),
        ("none", "label", {}),
        ("forward", "label", {"accumulate": 2}),
        ("forward", "label", {"recompute_teacher": True}),
        ("forward", "label", {"feedback_ratio": 0.5}),
        ("forward", "label", {"precision": "bfloat16"}),
    ],
)
def test_a_dict_of_one_tensor_is_the_tensor_bit_for_bit(mode: Any, key: str, options: dict[str, Any]) -> None:
    """Through three steps, with the teacher's own losses and the figures of the report."""
    ends = []
    for problem in (Labels(), Labels(key)):
        case = even(toy("dropout", dtype=torch.float32, teacher=Labeller))
        case.draw_from_start()
        trainer = trainer_for(case, mode, problem=problem, teacher_losses=(metapl.CrossEntropy(),), **options)
        reports = [trainer.step(**case.data()) for _ in range(3)]
        told = [report.feedback for report in reports]
        told = [h[key] if isinstance(h, dict) else h for h in told]
        ends.append([*values(case.teacher).values(), *values(case.student).values(), *told])
        ends[-1] += [torch.tensor([*report.as_dict().values()]) for report in reports]
    assert same(*ends)


class Unread(Weighted):
    """Beside a field that the loss reads, one that it does not, and one that is constant."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        found = super().signal(teacher, batch, student_outputs, generator=generator).value
        return Signal({**found, "weight": found["weight"].detach(), "idle": teacher.strength}, outputs=teacher(batch))


@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference"])
def test_a_field_that_is_not_read_gets_zero(mode: str) -> None:
    case = toy("mlp", teacher=Teacher)
    found = metapl.hypergradient(
        **case.networks(),
        **case.data(),
        mode=mode,
        problem=Unread(),
        inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=0.3),
    )
    assert found.feedback["idle"].tolist() == [0.0]
    assert found.feedback["weight"].abs().min() > 0  # a constant's feedback is told, and reaches no weight
    assert not found.grads["trust"].any()
    _, in_fields, _ = by_hand(case, Weighted, [case.unlabeled], OPTIMISERS["torch_sgd"].rule, None)
    assert error(found.feedback["label"], -in_fields[0]["label"]) < 1e-6


class Steered(metapl.problems.LearningToReweight):
    """Learning to reweight, with a shift of the labels beside the weights."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        rows = len(student_outputs)
        return Signal({"weight": student_outputs.new_zeros(rows), "shift": student_outputs.new_zeros(rows, CLASSES)})

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        target = F.one_hot(batch[1], CLASSES) + signal.value["shift"]
        return (signal.value["weight"] + signal.value["shift"].sum(1)) * F.cross_entropy(
            outputs, target.to(outputs), reduction="none"
        )

    def revised_signal(self, signal: Signal, h: Any) -> Signal:
        self.h = h
        return Signal({"weight": h["weight"].clamp_min(0) * 40, "shift": 0 * h["shift"]})


def test_a_signal_may_be_revised_by_a_dict_of_feedback() -> None:
    case, problem = even(toy("mlp")), Steered()
    labels = torch.arange(4) % CLASSES
    optimizer = torch.optim.SGD(case.student.parameters(), lr=0.3)
    trainer = metapl.BilevelTrainer(
        None, case.student, "forward", problem=problem, inner_optimizer=optimizer, verify=False
    )
    theta, start = weights(case.student), values(case.student)
    moved = trainer.step(case.labeled, (case.unlabeled, labels)).feedback
    assert problem.h["weight"].equal(moved["weight"])
    z = functional_call(case.student, theta, (case.unlabeled,))
    loss = (40 * moved["weight"].clamp_min(0) * F.cross_entropy(z, labels, reduction="none")).mean()
    g = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
    assert error({n: start[n] - p for n, p in values(case.student).items()}, {n: 0.3 * t for n, t in g.items()}) < 1e-9
