"""Compare every problem with double backward of its formulas.

There is one table of problems and references, and a few steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import reference
import torch
from problems_zoo import CLASSES, OPTIMISERS, Judged, everything, product, same, toy, warm
from reference import error
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError, Signal
from metapl.feedback import Implicit
from metapl.models import LabelAdjuster
from metapl.problems import (
    BilevelProblem,
    ExampleLabels,
    ExampleWeights,
    LabelCorrection,
    LearningToReweight,
    MetaWeightNet,
    NoiseTransition,
    ReducedLabels,
    Table,
    WeightNet,
)
from metapl.problems.base import has_rows

TABLE = 20
X = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
Y = torch.tensor([0, 2, 1, 1, 0])
INDEX = torch.tensor([3, 19, 0, 7, 3])


def stored(rows: int, seed: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, CLASSES, generator=draw, dtype=torch.float64)).softmax(-1)


STORED = stored(5)


class Corrector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_input = nn.Linear(16, CLASSES)
        self.of_label = nn.Embedding(CLASSES, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.of_input(x.flatten(1)) + self.of_label(y)


class LearnedDecay(Judged):
    """A problem of a user: the teacher says how strongly weights are pulled to zero.

    These are the student's weights.
    """

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any
    ) -> Signal:
        return Signal(teacher(batch[0]).softmax(-1)[:, 0])

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        squares = sum(p.square().sum() for p in params.values())
        return F.cross_entropy(outputs, batch[1], reduction="none") + 0.3 * signal.value * squares


@dataclass(frozen=True)
class Method:
    """A problem, and the same written out.

    The losses (B,) are a function of the teacher, its weights, the student's weights and its
    outputs.
    """

    problem: BilevelProblem
    teacher: Callable[[], nn.Module]
    batch: Any
    losses: Callable[[nn.Module, dict[str, Tensor], dict[str, Tensor], Tensor], Tensor]


def call(teacher: nn.Module, weights: dict[str, Tensor], *args: Tensor) -> Tensor:
    return torch.func.functional_call(teacher, weights, args)


def plain(z: Tensor) -> Tensor:
    return -z.log_softmax(-1)[torch.arange(5), Y]


def against(q: Tensor, z: Tensor) -> Tensor:
    return -(q * z.log_softmax(-1)).sum(-1)


def adjuster() -> nn.Module:
    """Return a network that has learned something.

    At its start, its first layers get no gradient.
    """
    network = LabelAdjuster(CLASSES, hidden=7, layers=3).double()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return network


METHODS: dict[str, Method] = {
    "meta_weight_net": Method(
        MetaWeightNet(),
        lambda: WeightNet(8),
        (X, Y),
        lambda t, p, theta, z: call(t, p, plain(z).detach()) * plain(z),
    ),
    "example_weights": Method(
        ExampleWeights(),
        lambda: Table(torch.linspace(-1, 1, TABLE)),
        (X, Y, INDEX),
        lambda t, p, theta, z: torch.sigmoid(p["values"][INDEX]) * plain(z),
    ),
    "example_labels": Method(
        ExampleLabels(),
        lambda: Table(torch.randn(TABLE, CLASSES)),
        (X, INDEX),
        lambda t, p, theta, z: against(p["values"][INDEX].softmax(-1), z),
    ),
    "label_correction": Method(
        LabelCorrection(),
        Corrector,
        (X, Y),
        lambda t, p, theta, z: against(call(t, p, X, Y).softmax(-1), z),
    ),
    "noise_transition": Method(
        NoiseTransition(),
        lambda: Table(
            torch.eye(CLASSES) + torch.linspace(-0.3, 0.3, CLASSES**2).reshape(CLASSES, CLASSES)
        ),
        (X, Y),
        lambda t, p, theta, z: -(z.softmax(-1) @ p["values"].softmax(-1))[torch.arange(5), Y].log(),
    ),
    "reduced_labels": Method(
        ReducedLabels(temperature=0.7),
        adjuster,
        (X, STORED),
        lambda t, p, theta, z: against((call(t, p, STORED) / 0.7).softmax(-1), z),
    ),
    "learned_decay": Method(
        LearnedDecay(),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)),
        (X, Y),
        lambda t, p, theta, z: (
            plain(z)
            + 0.3 * call(t, p, X).softmax(-1)[:, 0] * sum((w**2).sum() for w in theta.values())
        ),
    ),
}


def teacher_of(name: str) -> nn.Module:
    torch.manual_seed(4)
    return METHODS[name].teacher().double()


def by_double_backward(
    name: str,
    teacher: nn.Module,
    student: nn.Module,
    outer: Any,
    rule: Any,
    state: Any,
    steps: int = 1,
) -> dict[str, Tensor]:
    theta = reference.weights(student)
    phi = reference.weights(teacher)
    for _ in range(steps):
        losses = METHODS[name].losses(teacher, phi, theta, reference.outputs_at(student, theta, X))
        after_inner = torch.get_rng_state()
        theta, state = reference.stepped(losses.mean(), theta, rule, state)
    torch.set_rng_state(reference.own_stream(after_inner))
    loss = F.cross_entropy(reference.outputs_at(student, theta, outer[0]), outer[1])
    return dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))


def cases() -> list[Any]:
    """Return every problem in modes, networks, optimizers and numbers of steps.

    Several steps are left out for ``difference``, and for ``meta_weight_net``, whose weights leave
    their dependence on θ out.
    """
    chosen = []
    for row in product(
        METHODS,
        ("unrolled", "forward", "difference"),
        ("mlp", "batch_norm"),
        ("torch_sgd_nesterov", "torch_adamw"),
        (1, 3),
        usual=[*METHODS, "forward", "mlp", "torch_sgd_nesterov", 1],
    ):
        name, mode, _, _, steps = row.values
        if steps == 1 or (mode != "difference" and name != "meta_weight_net"):
            chosen.append(row)
    return chosen


@pytest.mark.parametrize(("name", "mode", "student", "optimiser", "steps"), cases())
def test_a_problem_has_the_gradient_of_its_formula(
    name: str, mode: str, student: str, optimiser: str, steps: int
) -> None:
    case = toy(student)
    rule = OPTIMISERS[optimiser]
    teacher = teacher_of(name)
    inner, _, state = warm(case, rule, 2)
    case.draw_from_start()
    expected = by_double_backward(
        name, teacher, case.student, case.labeled, rule.rule, state, steps
    )
    case.draw_from_start()
    unlabeled = METHODS[name].batch
    if steps > 1:
        unlabeled = metapl.Lookahead([METHODS[name].batch] * steps)
    hypergradient = metapl.hypergradient(
        teacher,
        case.student,
        outer=case.labeled,
        inner=unlabeled,
        mode=mode,
        problem=METHODS[name].problem,
        inner_optimizer=inner,
    )
    assert error(hypergradient.grads, expected) < (1e-4 if mode == "difference" else 1e-8)


def weights_by_hand(
    student: nn.Module, outer: Any, look: reference.Rule, state: Any
) -> tuple[Tensor, Tensor]:
    """Return h = −dL(θ̂)/dε by double backward through the look-ahead, and w.

    Source: the paper's Algorithm 1, lines 4-10.
    """
    theta = reference.weights(student)
    epsilon = torch.zeros(5, dtype=X.dtype, requires_grad=True)
    inner_loss = (epsilon * plain(reference.outputs_at(student, theta, X))).mean()
    moved, _ = reference.stepped(inner_loss, theta, look, state)
    loss = F.cross_entropy(reference.outputs_at(student, moved, outer[0]), outer[1])
    h = -torch.autograd.grad(loss, epsilon)[0]
    helpful = h.clamp_min(0)
    return h, helpful / (helpful.sum() if helpful.sum() > 0 else 1)


PAPER = Implicit(solver="identity")
"""The paper's look-ahead, by plain SGD whatever the optimizer."""


@pytest.mark.parametrize(
    ("momentum", "mode", "parts"),
    [
        (0.0, "forward", 1),
        (0.0, "unrolled", 1),
        (0.9, "forward", 1),
        (0.9, "forward", 5),
        (0.9, PAPER, 1),
    ],
)
def test_ten_steps_of_learning_to_reweight_are_those_of_its_paper(
    momentum: float, mode: Any, parts: int
) -> None:
    """By SGD with and without momentum, which the look-ahead has too, but for the paper's."""
    case = toy("mlp")
    options = {"lr": 0.3, "momentum": momentum}
    trusted = X + 0.5 * X.flip(1, 2), torch.where(torch.arange(5) < 2, (Y + 1) % CLASSES, Y)
    mirror = copy.deepcopy(case.student)
    rule = reference.sgd(**options)
    state = None
    trainer = metapl.BilevelTrainer(
        None,
        case.student,
        mode,
        problem=LearningToReweight(),
        inner_optimizer=torch.optim.SGD(case.student.parameters(), **options),
        accumulate=parts,
    )
    used = []
    for _ in range(10):
        look = (reference.sgd(lr=1.0), None) if mode == PAPER else (rule, state)
        h, w = weights_by_hand(mirror, trusted, *look)
        theta = reference.weights(mirror)
        loss = (w * plain(reference.outputs_at(mirror, theta, X))).sum()
        moved, state = reference.stepped(loss, theta, rule, state)
        mirror.load_state_dict({name: t.detach() for name, t in moved.items()})
        report = trainer.step(trusted, (X, Y))
        assert error(report.feedback, h) < 1e-8
        assert torch.allclose(report.signal.value, 5 * w, 0, 1e-8)
        assert abs(report.inner_loss - loss.item()) < 1e-8
        assert error(dict(case.student.named_parameters()), moved) < 1e-8
        used.append(int((w > 0).sum()))
    assert sum(0 < n < 5 for n in used) >= 5


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_adjuster_begins_as_the_identity(classes: int) -> None:
    q = torch.rand(4, classes).pow(8)
    q[0] = 0
    q[0, 1] = 1
    q /= q.sum(1, keepdim=True)
    assert (LabelAdjuster(classes)(q).softmax(-1) - q).abs().max() < 1e-5


def test_the_supervised_term_reads_the_stored_labels_of_labeled_examples() -> None:
    case = toy("mlp")
    network = teacher_of("reduced_labels")
    trainer = metapl.BilevelTrainer(network, case.student, "none", problem=ReducedLabels())
    expected = F.cross_entropy(network(stored(5, 6)), Y)
    report = trainer.step((X, Y, stored(5, 6)), (X, STORED))
    assert report.teacher_cross_entropy == pytest.approx(expected.item(), rel=1e-6)


REWEIGHT = LearningToReweight()
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "no labels": ("example_weights", {"inner": X}),
    "an index too large": ("example_weights", {"inner": (X, Y, INDEX + 9)}),
    "weights of another shape": ("meta_weight_net", {"teacher": nn.Linear(5, 3).double()}),
    "logits for distributions": ("reduced_labels", {"inner": (X, STORED.log())}),
    "a teacher where there is none": ("noise_transition", {"problem": REWEIGHT}),
    "no feedback on examples": (
        "label_correction",
        {"teacher": None, "problem": REWEIGHT, "mode": "reinforce"},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_moves(name: str) -> None:
    method, change = WRONG[name]
    case = toy("batch_norm")
    correct = METHODS[method]
    options = {
        "teacher": teacher_of(method),
        "problem": correct.problem,
        "mode": "forward",
        **change,
    }
    unlabeled = options.pop("inner", correct.batch)
    everything_before = everything(case)
    with pytest.raises((MetaplError, IndexError, RuntimeError)):
        metapl.BilevelTrainer(student=case.student, **options).step((X, Y), unlabeled)
    assert same(everything_before, everything(case))


def in_single(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.is_floating_point() else t for t in batch)


@pytest.mark.parametrize("name", ["noise_transition", "example_labels"])
def test_a_teacher_in_half_precision_has_its_feedback_in_float32(name: str) -> None:
    """In float16, whose least number is 6e-8, little would be left of this feedback."""
    feedback = []
    case = toy("mlp", dtype=torch.float32)
    for dtype in (torch.float16, torch.float32):
        hypergradient = metapl.hypergradient(
            teacher_of(name).half().to(dtype),
            case.student,
            outer=in_single((X, Y)),
            inner=in_single(METHODS[name].batch),
            problem=METHODS[name].problem,
            inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=1e-5),
        )
        feedback.append(hypergradient.feedback)
    half, single = feedback
    assert half.dtype == torch.float32
    assert error(half, single) < 5e-3


def test_a_declaration_of_rows_names_fields_of_the_signal() -> None:
    class Misspelled(metapl.PseudoLabels):
        signal_has_rows: ClassVar[Any] = {"scales": False}

    signal = Signal({"scale": torch.rand(3), "weight": torch.rand(8)})
    with pytest.raises(MetaplError, match="signal_has_rows names scales"):
        has_rows(Misspelled(), signal, 8)
