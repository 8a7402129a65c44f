"""Problems of a user against one reference: double backward through the problem's methods.

The signal is a tensor, several, one without rows or one of the batch as a whole, and may enter the
student's input.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from problems_zoo import (
    OPTIMISERS,
    Judged,
    Toy,
    gradient,
    mlp,
    product,
    toy,
    trainer_for,
    unmoved,
    values,
    warm,
)
from reference import Tree, error, own_stream, stepped
from test_replays import put
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import metapl
from metapl import MetaplError, Signal
from metapl.feedback import Forward, Implicit


@dataclass
class Expected:
    grads: Tree
    fields: list[Tree]
    theta: Tree
    outer_loss: Tensor


def chunks(batch: Any, parts: int) -> list[Any]:
    leaves, tree = pytree.tree_flatten(batch)
    chunks_of_leaves = [t.chunk(parts) for t in leaves]
    leaves_of_parts = zip(*chunks_of_leaves, strict=True)
    return [pytree.tree_unflatten(part, tree) for part in leaves_of_parts]


def through(
    case: Toy, problem: Any, batches: list[Any], rule: Any, state: Any, parts: int = 1
) -> Expected:
    """Take every step in one graph, the batch as ``parts`` of it one after another."""
    teacher = copy.deepcopy(case.teacher)
    student = copy.deepcopy(case.student)
    phi = dict(teacher.named_parameters())
    theta = dict(student.named_parameters())
    enters = len(inspect.signature(problem.student_input).parameters) == 2
    signal_values_of_steps = []

    def signal_about(x: Any) -> Signal:
        return problem.signal(teacher, x, None, generator=None)

    for batch in batches:
        put(student, theta)
        pieces = chunks(batch, parts)
        if isinstance(problem, OfAll):
            value = signal_about(batch).value
            signals = [Signal(part) for part in value.chunk(parts)]
        elif enters:
            signals = [signal_about(x) for x in pieces]
        losses = []
        signal_values = []
        for number, x in enumerate(pieces):
            if enters:
                signal = signals[number]
                z = student(problem.student_input(x, signal))
            else:
                z = student(problem.student_input(x))
                signal = signals[number] if isinstance(problem, OfAll) else signal_about(x)
            losses.append(problem.inner_loss(z, signal, x, theta).mean())
            value = signal.value
            signal_values.append(value if isinstance(value, dict) else {"value": value})
        theta, state = stepped(torch.stack(losses).mean(), theta, rule, state)
        signal_values_of_steps.append(signal_values)
    put(student, theta)
    torch.set_rng_state(own_stream(torch.get_rng_state()))
    total = 0
    total_weight = 0
    for x, y in chunks(case.labeled, parts):
        outer_loss = problem.outer_loss(student(x), (x, y))
        outer_sum, weight = outer_loss if isinstance(outer_loss, tuple) else (outer_loss, 1)
        total = total + outer_sum
        total_weight = total_weight + weight
    loss = total / total_weight
    without_rows = {name for name, has in (problem.signal_has_rows or {}).items() if not has}
    fields = []
    for signal_values in signal_values_of_steps:
        gradients: Tree = {}
        for name, t in signal_values[0].items():
            if not t.requires_grad:
                continue
            of_parts = torch.autograd.grad(
                loss,
                [values[name] for values in signal_values],
                retain_graph=True,
                materialize_grads=True,
            )
            gradients[name] = sum(of_parts) if name in without_rows else torch.cat(of_parts)
        fields.append(gradients)
    grads = torch.autograd.grad(loss, list(phi.values()), materialize_grads=True)
    return Expected(dict(zip(phi, grads, strict=True)), fields, theta, loss.detach())


class Teacher(nn.Module):
    """Logits of labels, with parameters for the trust in classes and the strength of augmentation.

    The trust is one number for each class.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp()
        self.trust = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))
        self.strength = nn.Parameter(torch.tensor([-0.4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Weighted(Judged):
    """A weight (B,) and a corrected label (B, C) for each example.

    The labels' first guesses are constant.
    """

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        label = teacher(batch).softmax(-1)
        guess = label.argmax(-1)
        return Signal({"weight": teacher.trust[guess].sigmoid(), "label": label, "guess": guess})

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        weight, label, guess = (signal.value[key] for key in ("weight", "label", "guess"))
        return (1 + 0.1 * guess) * weight * F.cross_entropy(outputs, label, reduction="none")


class Augmented(Weighted):
    """Besides, how strong the input is changed: one number for all examples."""

    signal_has_rows: ClassVar = {"strength": False}

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        assert student_outputs is None
        value = super().signal(teacher, batch, student_outputs, generator=generator).value
        return Signal({"strength": teacher.strength.exp(), **value})

    def student_input(self, batch: Any, signal: Signal) -> Tensor:
        return batch + signal.value["strength"] * batch.roll(1, -1).square()


class Augmenting(Judged):
    """The teacher says how bright an example is, how noisy, and what is expected of it."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        return Signal(teacher(batch).tanh())

    def student_input(self, batch: Any, signal: Signal) -> Tensor:
        bright = signal.value[:, 0, None, None, None]
        noise = signal.value[:, 1, None, None, None]
        return batch * (1 + bright) + noise * torch.randn_like(batch)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return outputs.logsumexp(1) + (signal.value * outputs).sum(1).square()


class InputAlone(Augmenting):
    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return outputs.logsumexp(1)


class Anchored(metapl.PseudoLabels):
    """The student's logits are drawn towards the teacher's.

    The loss reads these from ``signal.outputs``.
    """

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        distance = (signal.outputs - outputs).square().mean(1)
        return super().inner_loss(outputs, signal, batch, params) + 0.1 * distance


class OutputsAlone(Anchored):
    """Nothing but the teacher's logits teaches the student."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return (signal.outputs - outputs).square().mean(1)


class Shares(Judged):
    """The teacher weighs each example against the others of the batch or micro-batch."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        return Signal(teacher(batch).sigmoid()[:, 0])

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value / signal.value.mean() * outputs.square().sum(1)


TOKENS = 4
WORDS = 5


class Language(Judged):
    """A student of words, taught by weights of examples.

    It is judged by the mean over the tokens that have a label.
    """

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        return Signal(teacher(batch.double()).sigmoid()[:, 0])

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return (0.1 + signal.value) * F.cross_entropy(outputs.mT, batch, reduction="none").mean(1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        # This leaves out the label -100.
        total = F.cross_entropy(outputs.mT, batch[1], reduction="sum")
        return total, (batch[1] != -100).sum()


class OfAll(Language):
    """The weights of the examples sum to their number, over the batch as a whole."""

    signal_of_batch = True

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        return Signal(len(batch) * teacher(batch.double())[:, 0].softmax(0) - 0.1)


class Sampled(Language):
    """Examples are kept or not, by a rule in the place of a draw."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        p = super().signal(teacher, batch, student_outputs, generator=generator).value
        keep = (batch.sum(1) % 2).bool()
        return Signal(keep.to(p), log_prob=torch.where(keep, p, 1 - p).log())


def words() -> Toy:
    torch.manual_seed(3)
    teacher = nn.Linear(TOKENS, 1).double()
    student = nn.Sequential(nn.Embedding(WORDS, 6), nn.Tanh(), nn.Linear(6, WORDS)).double()
    x, labels = (torch.randint(0, WORDS, (8, TOKENS)) for _ in range(2))
    # A micro-batch of two, the third, has nothing to judge.
    for row, left_out in zip(labels, [0, 3, 1, 2, 4, 4, 0, 2], strict=True):
        row[:left_out] = -100
    return Toy(teacher, student, (x, labels), torch.randint(0, WORDS, (8, TOKENS)), 0)


def case_of(problem: Any, student: str = "mlp", dtype: torch.dtype = torch.float64) -> Toy:
    if isinstance(problem, Language):
        return words()
    case = toy(student, rows=8, teacher=Teacher, dtype=dtype)
    return replace(case, labeled=tuple(t[:8] for t in case.labeled))


def ahead_of(case: Toy, steps: int) -> list[Any]:
    draw = torch.Generator().manual_seed(5)
    x = case.unlabeled
    if x.is_floating_point():
        return [torch.randn(x.shape, generator=draw, dtype=x.dtype) for _ in range(steps)]
    return [torch.randint(0, WORDS, x.shape, generator=draw) for _ in range(steps)]


PROBLEMS = [
    Weighted,
    Augmented,
    Augmenting,
    InputAlone,
    Anchored,
    OutputsAlone,
    Shares,
    Language,
    OfAll,
]
CASES = [
    *(("unrolled", steps, parts) for steps, parts in ((1, 1), (3, 1))),
    *(("forward", steps, parts) for steps, parts in ((1, 2), (1, 4), (3, 2))),
    *((Forward(by="graph"), 1, 1), (Forward(by="tangent"), 1, 2), (Forward(keep_every=2), 3, 1)),
    ("difference", 1, 2),
]


# The problems whose signals enter the student's input.
ENTERING = (Augmented, Augmenting, InputAlone)


def check(
    way: tuple[Any, int, int],
    problem: type,
    student: str = "mlp",
    optimiser: str = "torch_sgd_momentum",
) -> None:
    """Compare feedback and gradients in value, sign and scale, over steps and micro-batches.

    The feedback is a tuple for a look-ahead, a dict for several fields.
    """
    mode, steps, parts = way
    judge = problem()
    tolerance = 1e-4 if mode == "difference" else 1e-9
    case = case_of(judge, student)
    rule = OPTIMISERS[optimiser]
    inner, _, state = warm(case, rule)
    batches = ahead_of(case, steps)
    case.draw_from_start()
    expected = through(case, judge, batches, rule.rule, state, parts)
    case.draw_from_start()
    with unmoved(case, inner, generator=False):
        data = {"lookahead": batches} if steps > 1 else {"inner": batches[0]}
        hypergradient = gradient(
            case, mode, **data, problem=judge, inner_optimizer=inner, accumulate=parts
        )
    assert error(hypergradient.grads, expected.grads) < tolerance
    assert error(hypergradient.student_params, expected.theta) < 1e-9
    assert error(hypergradient.outer_loss, expected.outer_loss) < 1e-9
    feedback_by_step = hypergradient.feedback if steps > 1 else (hypergradient.feedback,)
    for h, fields in zip(feedback_by_step, expected.fields, strict=True):
        h = h if isinstance(h, dict) else {"value": h}
        for name, g in fields.items():
            assert h[name].shape == g.shape
            assert float((h[name] + g).norm()) <= 10 * tolerance * float(g.norm())


@pytest.mark.parametrize(
    ("way", "problem"),
    [
        row
        for row in product(
            CASES,
            PROBLEMS,
            usual=[("forward", 1, 2), ("unrolled", 3, 1), Augmented, Anchored, OfAll],
        )
        if "difference" not in row.values[0] or row.values[1] not in ENTERING
    ],
    ids=str,
)
def test_every_field_gets_its_own_feedback(way: tuple[Any, int, int], problem: type) -> None:
    check(way, problem)


@pytest.mark.parametrize(
    ("student", "optimiser"), [("batch_norm", "torch_adam"), ("dropout", "torch_adamw")]
)
@pytest.mark.parametrize("mode", ["unrolled", "forward"])
def test_noise_in_the_input_and_masks_are_drawn_once(
    mode: str, student: str, optimiser: str
) -> None:
    """Noise that student_input draws, and the dropout masks that are drawn after it."""
    check((mode, 3, 1), Augmenting, student, optimiser)


@pytest.mark.parametrize(
    "mode",
    ["reinforce", "reinforce_per_example", "loss_difference", Implicit(damping=1.0)],
    ids=str,
)
def test_a_mean_over_tokens_is_one_in_every_mode(mode: Any) -> None:
    problem = Language() if isinstance(mode, Implicit) else Sampled()
    case = words()
    by_parts = gradient(case, mode, problem=problem, accumulate=4)
    by_batch = gradient(case, mode, problem=problem, accumulate=1)
    assert error(by_parts.grads, by_batch.grads) < 1e-6


class Unread(Weighted):
    """Beside a field that the loss reads, one that it does not, and one that is constant."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        fields = super().signal(teacher, batch, student_outputs, generator=generator).value
        unread_fields = {"weight": fields["weight"].detach(), "idle": teacher.strength}
        return Signal({**fields, **unread_fields}, outputs=teacher(batch))


@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference"])
def test_a_field_that_is_not_read_gets_zero(mode: str) -> None:
    hypergradient = gradient(case_of(Unread()), mode, problem=Unread())
    assert hypergradient.feedback["idle"].tolist() == [0.0]
    # The feedback on a constant is told, and reaches no weight.
    assert hypergradient.feedback["weight"].abs().min() > 0
    assert not hypergradient.grads["trust"].any()


def test_a_problem_of_ones_own_needs_no_teacher_losses() -> None:
    """By default it has none."""
    case = case_of(Weighted())
    values_before = values(case.teacher)
    sgd = torch.optim.SGD(case.teacher.parameters(), lr=1.0)
    trainer = trainer_for(case, problem=Weighted(), outer_optimizer=sgd)
    expected = trainer.hypergradient(**case.data()).grads
    trainer.step(**case.data())
    assert (
        error({n: values_before[n] - p for n, p in values(case.teacher).items()}, expected) < 1e-12
    )
    with pytest.raises(MetaplError):
        trainer_for(case, problem=Weighted(), feedback_ratio=0.1)
    with pytest.raises(MetaplError):
        trainer.teacher_step(**case.data())


class Steep(Anchored):
    """Its derivative in the teacher's outputs is infinite."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        steep = (signal.outputs - signal.outputs.detach()).abs().sqrt().sum(1)
        return super().inner_loss(outputs, signal, batch, params) + steep * outputs.sum(1)


class DrawnInput(InputAlone):
    """A sampled class, shown to the student in its input."""

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any
    ) -> Signal:
        log_q = teacher(batch).log_softmax(-1)
        drawn = torch.multinomial(log_q.detach().exp(), 1, generator=generator)
        return Signal(drawn[:, 0], log_q.gather(1, drawn)[:, 0], log_q.exp())

    def student_input(self, batch: Any, signal: Signal) -> Tensor:
        return batch * signal.value[:, None, None, None]


class Revising(Augmenting):
    def revised_signal(self, signal: Signal, h: Tensor) -> Signal:
        return signal


@pytest.mark.parametrize("mode", ["reinforce", "loss_difference"])
def test_a_sampled_signal_in_the_input_gets_the_batchs_feedback(mode: str) -> None:
    """h is −⟨w, g⟩, or L(θ) − L(θ′), of the step on these inputs."""
    case = toy("mlp")
    student = toy("mlp").student
    case.draw_from_start()
    drawn = torch.multinomial(case.teacher(case.unlabeled).detach().softmax(-1), 1)[:, 0]
    student(case.unlabeled * drawn[:, None, None, None]).logsumexp(1).mean().backward()
    g = [p.grad.clone() for p in student.parameters()]
    loss_before = F.cross_entropy(student(case.labeled[0]), case.labeled[1])
    torch.optim.SGD(student.parameters(), lr=0.3).step()
    loss_after = F.cross_entropy(student(case.labeled[0]), case.labeled[1])
    v = torch.autograd.grad(loss_after, list(student.parameters()))
    h = {
        "reinforce": 0.3 * sum((a * b).sum() for a, b in zip(v, g, strict=True)),
        "loss_difference": loss_before - loss_after,
    }
    case.draw_from_start()
    assert error(gradient(case, mode, problem=DrawnInput()).feedback, h[mode].detach()) < 1e-9


@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        *((mode, DrawnInput) for mode in ("forward", "difference", "reinforce_per_example")),
        ("forward", Revising),
        ("difference", Augmenting),
        *((mode, Steep) for mode in ("forward", "unrolled", "difference")),
    ],
)
def test_what_cannot_be_credited_is_refused(mode: str, problem: type) -> None:
    """Labels that each act on others too.

    A signal that is made of its own feedback; feedback that is not finite.
    """
    case = toy("mlp")
    with unmoved(case), pytest.raises(MetaplError):
        trainer_for(case, mode, problem=problem(), teacher_losses=()).step(**case.data())


class SmoothingByClass(metapl.BilevelProblem):
    """A smoothing for each class, which has no rows, and does not say so."""

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any = None) -> Any:
        return metapl.Signal(teacher().sigmoid())

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        smoothing = signal.value[batch[1]]
        uniform = outputs.log_softmax(-1).mean(-1)
        losses = F.cross_entropy(outputs, batch[1], reduction="none")
        return losses * (1 - smoothing) - smoothing * uniform

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


class DeclaredSmoothing(SmoothingByClass):
    signal_has_rows = False


def test_a_signal_that_cannot_be_cut_into_rows_is_named() -> None:
    """Its length is that of a micro-batch by chance."""
    classes = 6
    outer, inner = (
        (torch.randn(rows, 4), torch.arange(rows) % classes) for rows in (8, 2 * classes)
    )

    def take_step(problem: metapl.BilevelProblem) -> None:
        teacher = metapl.problems.Table(torch.zeros(classes))
        student = nn.Linear(4, classes)
        metapl.BilevelTrainer(teacher, student, problem=problem, accumulate=2).step(outer, inner)

    with pytest.raises(metapl.MetaplError, match="expected signal_has_rows = False"):
        take_step(SmoothingByClass())
    take_step(DeclaredSmoothing())


class OneNumber(metapl.BilevelProblem):
    """The teacher is the temperature of the inner loss, as a tensor of some shape."""

    signal_has_rows = False

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def signal(
        self, teacher: Any, batch: Any, student_outputs: Tensor | None, *, generator: Any
    ) -> Signal:
        return Signal(teacher(torch.zeros(1, dtype=torch.int64)).exp().reshape(self.shape))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return F.cross_entropy(outputs * signal.value, batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


def test_a_signal_of_one_number_is_that_of_each_micro_batch() -> None:
    torch.manual_seed(0)
    teacher, student = metapl.problems.Table(torch.zeros(1)), nn.Linear(4, 3)
    pair = torch.randn(8, 4), torch.arange(8) % 3
    sgd = torch.optim.SGD(student.parameters(), lr=0.1)

    def found(*shape: int, accumulate: int) -> metapl.Hypergradient:
        return metapl.hypergradient(
            teacher,
            student,
            outer=pair,
            inner=pair,
            problem=OneNumber(*shape),
            inner_optimizer=sgd,
            accumulate=accumulate,
        )

    expected = found(1, accumulate=1)
    in_parts = found(1, accumulate=2)
    assert error(in_parts.grads, expected.grads) < 1e-5
    torch.testing.assert_close(in_parts.feedback, expected.feedback)
    assert error(found(accumulate=1).grads, expected.grads) < 1e-5
    # Micro-batches are joined along a dimension.
    with pytest.raises(MetaplError, match=r"no dimension .* expected \.reshape\(1\) of it, or acc"):
        found(accumulate=2)


def test_controls_leave_one_number_as_it_is() -> None:
    torch.manual_seed(0)
    teacher, student = metapl.problems.Table(torch.zeros(1)), nn.Linear(4, 3)
    pair = torch.randn(8, 4), torch.arange(8) % 3
    trainer = metapl.BilevelTrainer(teacher, student, problem=OneNumber(), verify=False)
    study = metapl.ablate(trainer, pair, pair, ["forward"], draws=2, rounds=1)
    errors = [getattr(control, "relative_error", control) for control in study.altered.values()]
    assert errors == [0.0, 0.0, 0.0]
