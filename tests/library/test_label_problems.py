"""The published label methods against plain double backward, and in a fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from problems_zoo import CLASSES, OPTIMISERS, everything, same, toy, warm
from reference import error
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError, models
from metapl.execution import checks
from metapl.problems import (
    ExampleLabels,
    ExampleWeights,
    LabelCorrection,
    MetaWeightNet,
    NoiseTransition,
    Problem,
    Table,
    WeightNet,
)

TABLE = 20
X = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
Y = torch.tensor([0, 2, 1, 1, 0])
INDEX = torch.tensor([3, 19, 0, 7, 3])


class Corrector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_input, self.of_label = nn.Linear(16, CLASSES), nn.Embedding(CLASSES, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.of_input(x.flatten(1)) + self.of_label(y)


@dataclass(frozen=True)
class Method:
    """A method, and the same written out: the signal of the teacher's weights, and the losses (B,)."""

    problem: Problem
    teacher: Callable[[], nn.Module]
    batch: Any
    losses: Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor]


def call(teacher: nn.Module, weights: dict[str, Tensor], *args: Tensor) -> Tensor:
    return torch.func.functional_call(teacher, weights, args)


def plain(z: Tensor) -> Tensor:
    return -z.log_softmax(-1)[torch.arange(5), Y]


METHODS: dict[str, Method] = {
    "meta_weight_net": Method(
        MetaWeightNet(), lambda: WeightNet(8), (X, Y), lambda t, p, z: call(t, p, plain(z).detach()) * plain(z)
    ),
    "example_weights": Method(
        ExampleWeights(),
        lambda: Table(torch.linspace(-1, 1, TABLE)),
        (X, Y, INDEX),
        lambda t, p, z: torch.sigmoid(p["values"][INDEX]) * plain(z),
    ),
    "example_labels": Method(
        ExampleLabels(),
        lambda: Table(torch.randn(TABLE, CLASSES, generator=torch.Generator().manual_seed(2))),
        (X, INDEX),
        lambda t, p, z: -(p["values"][INDEX].softmax(-1) * z.log_softmax(-1)).sum(-1),
    ),
    "label_correction": Method(
        LabelCorrection(),
        Corrector,
        (X, Y),
        lambda t, p, z: -(call(t, p, X, Y).softmax(-1) * z.log_softmax(-1)).sum(-1),
    ),
    "noise_transition": Method(
        NoiseTransition(),
        lambda: Table(torch.eye(CLASSES) + torch.linspace(-0.3, 0.3, CLASSES**2).reshape(CLASSES, CLASSES)),
        (X, Y),
        lambda t, p, z: -(z.softmax(-1) @ p["values"].softmax(-1))[torch.arange(5), Y].log(),
    ),
}
UPDATES = ["torch_sgd_nesterov", "torch_adamw"]


def by_double_backward(
    method: Method, teacher: nn.Module, student: nn.Module, labeled: Any, rule: Any, state: Any
) -> dict[str, Tensor]:
    theta, phi = reference.weights(student), reference.weights(teacher)
    losses = method.losses(teacher, phi, reference.at(student, theta, X))
    g = torch.autograd.grad(losses.mean(), list(theta.values()), create_graph=True)
    moved, _ = rule(theta, dict(zip(theta, g, strict=True)), state)
    outer = F.cross_entropy(reference.at(student, moved, labeled[0]), labeled[1])
    return dict(zip(phi, torch.autograd.grad(outer, list(phi.values())), strict=True))


@pytest.mark.parametrize("optimiser", UPDATES)
@pytest.mark.parametrize("student", ["mlp", "batch_norm", "group_norm"])
@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_gradient_of_its_formula(name: str, mode: str, student: str, optimiser: str) -> None:
    method, case, rule = METHODS[name], toy(student), OPTIMISERS[optimiser]
    torch.manual_seed(4)
    teacher = method.teacher().double()
    inner, _, state = warm(case, rule, 2)
    expected = by_double_backward(method, teacher, case.student, case.labeled, rule.rule, state)
    found = metapl.hypergradient(
        teacher,
        case.student,
        labeled=case.labeled,
        unlabeled=method.batch,
        mode=mode,
        problem=method.problem,
        inner_optimizer=inner,
    )
    assert error(found.grads, expected) < (1e-4 if mode == "difference" else 1e-9)


@pytest.mark.parametrize("mode", ["unrolled", "forward"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "meta_weight_net"])
def test_and_over_several_steps(name: str, mode: str) -> None:
    method, case, rule = METHODS[name], toy("mlp"), OPTIMISERS["torch_sgd_nesterov"]
    torch.manual_seed(4)
    teacher = method.teacher().double()
    theta, phi, state = reference.weights(case.student), reference.weights(teacher), None
    for _ in range(3):
        losses = method.losses(teacher, phi, reference.at(case.student, theta, X))
        g = torch.autograd.grad(losses.mean(), list(theta.values()), create_graph=True)
        theta, state = rule.rule(theta, dict(zip(theta, g, strict=True)), state)
    outer = F.cross_entropy(reference.at(case.student, theta, case.labeled[0]), case.labeled[1])
    expected = dict(zip(phi, torch.autograd.grad(outer, list(phi.values())), strict=True))
    found = metapl.hypergradient(
        teacher,
        case.student,
        labeled=case.labeled,
        unlabeled=metapl.Lookahead([method.batch] * 3),
        mode=mode,
        problem=method.problem,
        inner_optimizer=rule.build(case.student),
    )
    assert error(found.grads, expected) < 1e-8


@pytest.mark.parametrize("mode", ["forward", "difference", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_fits_with_validation_and_goes_on_bit_for_bit(name: str, mode: str, tmp_path: Any) -> None:
    method = METHODS[name]

    def fit(steps: int, **options: Any) -> list[Tensor]:
        case = toy("mlp", dtype=torch.float32)
        torch.manual_seed(4)
        teacher = method.teacher()
        batch = tuple(t.float() if t.is_floating_point() else t for t in method.batch)
        trainer = metapl.BilevelTrainer(teacher, case.student, mode, problem=method.problem)
        found = trainer.fit(
            [case.labeled] * 2,
            [batch] * 3,
            steps=6,
            validation=case.labeled,
            validate_every=2,
            save_every=1,
            progress=False,
            callbacks=[] if steps == 6 else [stop_after(steps)],
            **options,
        )
        assert found.weights
        assert trainer.evaluate(case.labeled).accuracy >= 0
        return [p.detach().clone() for net in (teacher, case.student) for p in net.parameters()]

    whole = fit(6)
    with pytest.raises(KeyboardInterrupt):
        fit(3, out=tmp_path / "run")
    resumed = fit(6, out=tmp_path / "run", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def stop_after(steps: int) -> Callable[..., None]:
    def stop(step: int, row: Any, trainer: Any) -> None:
        if step >= steps:
            raise KeyboardInterrupt

    return stop


def test_the_feedback_finds_wrong_labels() -> None:
    """Trusted examples of the same two clusters: those with a flipped label get less weight."""
    draw = torch.Generator().manual_seed(0)
    centers = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    y = torch.arange(60) % 2
    x = centers[y] + torch.randn(60, 2, generator=draw)
    given = torch.where(torch.arange(60) < 18, 1 - y, y)
    trusted = (centers.repeat(5, 1) + torch.randn(10, 2, generator=draw), torch.arange(10) % 2)
    torch.manual_seed(0)
    table, student = Table(torch.zeros(60)), nn.Linear(2, 2)
    trainer = metapl.BilevelTrainer(
        table,
        student,
        "forward",
        problem=ExampleWeights(),
        outer_optimizer=torch.optim.Adam(table.parameters(), lr=0.1),
    )
    for _ in range(60):
        trainer.step(labeled=trusted, unlabeled=(x, given, torch.arange(60)))
    weights = table.values.detach().sigmoid()
    assert weights[:18].mean() < 0.3 < 0.6 < weights[18:].mean()


WRONG: dict[str, tuple[str, Any, nn.Module, str]] = {
    "no labels": ("meta_weight_net", X, WeightNet(), r"inner batch of MetaWeightNet is .*expected \(inputs, labels\)"),
    "no indices": ("example_weights", (X, Y), Table(torch.zeros(9)), r"expected \(inputs, labels, indices\)"),
    "a label too large": ("meta_weight_net", (X, Y + 2), WeightNet(), "labels run from"),
    "a teacher of another shape": ("example_weights", (X, Y, INDEX), Table(torch.zeros(20, 2)), r"shape \(5,\)"),
    "a teacher of rows": (
        "meta_weight_net",
        (X, Y),
        torch.nn.Linear(1, 1),
        r"Linear cannot take .*such as .*WeightNet",
    ),
    "too few rows": (
        "example_weights",
        (X, Y, INDEX),
        torch.nn.Embedding(1, 1),
        r"Embedding cannot take .*such as .*Table",
    ),
    "a matrix of another shape": ("noise_transition", (X, Y), Table(torch.eye(4)), r"shape \(3, 3\)"),
    "an index below 0": (
        "example_weights",
        (X, Y, INDEX - INDEX.max() - 1),
        Table(torch.zeros(20)),
        "index runs from -",
    ),
    "an index too large": (
        "example_labels",
        (X, INDEX + 20),
        Table(torch.zeros(20, 3)),
        r"has 20 rows: expected 0\.\.19",
    ),
    "float indices": ("example_weights", (X, Y, INDEX.double()), Table(torch.zeros(20)), "expected integers"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_batches_and_teachers_are_refused_and_nothing_moves(kind: str) -> None:
    name, batch, teacher, text = WRONG[kind]
    case = toy("batch_norm")
    trainer = metapl.BilevelTrainer(teacher.double(), case.student, "forward", problem=METHODS[name].problem)
    before = everything(case)
    with pytest.raises(MetaplError, match=text):
        trainer.step(case.labeled, batch)
    assert same(before, everything(case))


@pytest.mark.parametrize("initial", [[1, 2], torch.tensor(1.0), torch.arange(3)])
def test_a_table_of_anything_but_rows_of_numbers_is_refused(initial: Any) -> None:
    with pytest.raises(MetaplError, match="Table was given"):
        Table(initial)


def test_a_row_that_is_not_there_is_told_later_where_reading_it_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "waits", lambda t: True)
    table, fault = Table(torch.arange(3.0)), checks.Fault()
    token = checks.deferred.set(fault)
    assert table(torch.tensor([-1, 7])).tolist() == [0.0, 2.0]
    checks.deferred.reset(token)
    with pytest.raises(MetaplError, match=r"outside 0\.\.2; Table has 3 rows"):
        fault.raise_if_found()
    monkeypatch.undo()
    assert table(torch.tensor([], dtype=torch.int64)).shape == (0,)


def test_a_corrector_refuses_a_label_that_is_not_a_class() -> None:
    network = models.Corrector(nn.Linear(4, 3), classes=3)
    for given, text in ((torch.tensor([0, -1]), "runs from -1 to 0"), (torch.zeros(2), "expected integers")):
        with pytest.raises(MetaplError, match=text):
            network(torch.zeros(2, 4), given)


def test_an_index_that_would_be_a_mask_is_refused() -> None:
    """PyTorch takes uint8 for a mask, and gives other rows than the ones asked for."""
    table = Table(torch.arange(9.0))
    assert table(torch.tensor([5, 1, 1], dtype=torch.int32)).tolist() == [5, 1, 1]
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.bool):
        with pytest.raises(MetaplError, match=r"expected integers, int64 or int32: index\.long\(\)"):
            table(torch.tensor([1, 1, 0]).to(dtype))


def gradient_of(method: Method, teacher: nn.Module, student: nn.Module, dtype: torch.dtype) -> metapl.Hypergradient:
    def cast(batch: Any) -> Any:
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)

    return metapl.hypergradient(
        teacher,
        student,
        labeled=cast((X, Y)),
        unlabeled=cast(method.batch),
        problem=method.problem,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=1e-5),
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_teacher_in_half_precision_has_its_feedback_in_float32(name: str) -> None:
    """In float16, whose least number is 6e-8, little would be left of this feedback."""
    method, case = METHODS[name], toy("mlp", dtype=torch.float32)
    torch.manual_seed(4)
    half, whole = method.teacher().half(), method.teacher().float()
    whole.load_state_dict(half.state_dict())
    if name == "label_correction":  # the one that reads x
        half.forward = lambda x, y, of=half.forward: of(x.half(), y)
    found, expected = (gradient_of(method, teacher, case.student, torch.float32) for teacher in (half, whole))
    assert found.feedback.dtype == torch.float32
    assert expected.feedback.abs().max() < 5e-6
    assert error(found.feedback, expected.feedback) < 5e-3


class DoubleHead(nn.Module):
    """Logits in float64 from a body in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 6), nn.Linear(6, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)).tanh().double())


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(torch.float64, torch.float32), (torch.float32, torch.float64), ("head", torch.float32), ("head", torch.float16)],
    ids=str,
)
def test_losses_are_given_to_a_weight_net_in_its_own_type(student: Any, teacher: torch.dtype) -> None:
    torch.manual_seed(4)
    method, narrow = METHODS["meta_weight_net"], WeightNet(8).to(teacher)
    network = DoubleHead() if student == "head" else toy("mlp", dtype=student).student
    found = gradient_of(method, narrow, network, torch.float32 if student == "head" else student)
    wide = WeightNet(8).double()
    wide.load_state_dict(narrow.state_dict())
    double = DoubleHead().double() if student == "head" else toy("mlp").student
    double.load_state_dict(network.state_dict())
    expected = gradient_of(method, wide, double, torch.float64)
    assert all(g.dtype == teacher for g in found.grads.values())
    assert error(found.feedback.double(), expected.feedback) < 1e-4
    if teacher != torch.float16:  # whose own gradient may vanish
        grads = {name: g.double() for name, g in found.grads.items()}
        assert error(grads, expected.grads) < 1e-4


class Narrow(nn.Module):
    """Fails on types within itself, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 4).double(), nn.Linear(4, 1)

    def forward(self, losses: Tensor) -> Tensor:
        return self.last(self.first(losses[:, None]))[:, 0]


def test_inputs_that_a_teacher_never_sees_are_not_blamed() -> None:
    case = toy("mlp", dtype=torch.float32)
    trainer = metapl.BilevelTrainer(Narrow(), case.student, "forward", problem=MetaWeightNet())
    batch = X.float(), Y
    for call in (lambda: trainer.step(batch, batch), lambda: trainer.hypergradient(batch, batch)):
        with pytest.raises(
            MetaplError, match=r"teacher Narrow cannot take .*dtype.*losses \(B,\) to weights"
        ) as caught:
            call()
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert "inputs" not in str(caught.value)
