"""Micro-batches give the numbers of the whole batch."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metapl
from metapl import UDA, CrossEntropy, MetaplError, Signal
from metapl.feedback import Difference, Reinforce
from metapl.problems import BilevelProblem
from metapl.problems.losses import TeacherLoss
from metapl.training.loss_trainer import LossTrainer


def _networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return tuple(
        nn.Sequential(nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        for _ in range(2)
    )


def _after(
    mode: object, accumulate: int, **options: object
) -> tuple[list[torch.Tensor], dict[str, float]]:
    teacher, student = _networks()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9, nesterov=True)
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        inner_optimizer=optimizer,
        accumulate=accumulate,
        feedback_weight=5.0,
        verify=False,
        generator=torch.Generator().manual_seed(3),
        **options,
    )
    draws = torch.Generator().manual_seed(1)
    for _ in range(3):
        x, weak, strong = (
            torch.randn(8, 5, generator=draws, dtype=torch.float64) for _ in range(3)
        )
        report = trainer.step((x, torch.randint(0, 3, (8,), generator=draws)), (weak, strong))
    weights = [p.detach() for module in (teacher, student) for p in module.parameters()]
    return weights, report.as_dict()


@pytest.mark.parametrize(
    "mode",
    [
        "forward",
        "unrolled",
        "difference",
        Difference(one_sided=True),
        "reinforce",
        Reinforce(similarity="cosine", baseline=0.9),
        "reinforce_per_example",
        "loss_difference",
        "none",
    ],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_nothing_but_memory(mode: object, accumulate: int) -> None:
    weights, report = _after(mode, 1, clip_norm=0.5)
    weights_by_parts, report_by_parts = _after(mode, accumulate, clip_norm=0.5)
    for a, b in zip(weights, weights_by_parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert report.keys() == report_by_parts.keys()
    for name, value in report.items():
        assert report_by_parts[name] == pytest.approx(value, rel=1e-5, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "mode", ["forward", "unrolled", "difference", "reinforce", "reinforce_per_example"]
)
def test_the_gradient_that_is_looked_at_is_the_one_that_a_step_applies(
    mode: str, recompute: bool
) -> None:
    """With batch norm in both networks, micro-batches do change the numbers."""
    torch.manual_seed(0)
    teacher, student = (
        nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
        for _ in range(2)
    )
    labeled = (torch.randn(8, 5).double(), torch.arange(8) % 3)
    unlabeled = torch.randn(12, 5).double()
    gradients = {}
    for parts in (1, 2, 4):
        teacher_of_parts = copy.deepcopy(teacher)
        student_of_parts = copy.deepcopy(student)
        trainer = metapl.BilevelTrainer(
            teacher_of_parts,
            student_of_parts,
            mode,
            inner_optimizer=torch.optim.SGD(student_of_parts.parameters(), lr=0.3, momentum=0.9),
            outer_optimizer=torch.optim.SGD(teacher_of_parts.parameters(), lr=1.0),
            teacher_losses=(),
            recompute_teacher=recompute,
            accumulate=parts,
            verify=False,
            generator=torch.Generator().manual_seed(3),
        )
        looked_at = trainer.hypergradient(
            labeled, unlabeled, generator=torch.Generator().manual_seed(3)
        )
        gradients[parts] = torch.cat([g.flatten() for g in looked_at.grads.values()])
        start = nn.utils.parameters_to_vector(teacher_of_parts.parameters()).detach()
        trainer.step(labeled, unlabeled)
        end = nn.utils.parameters_to_vector(teacher_of_parts.parameters()).detach()
        torch.testing.assert_close(gradients[parts], start - end, rtol=1e-6, atol=1e-9)
        if mode == "forward":
            # A trainer does not split the batch of another mode than its own.
            exact = trainer.hypergradient(labeled, unlabeled, "unrolled").grads
            for name, g in trainer.hypergradient(labeled, unlabeled).grads.items():
                torch.testing.assert_close(g, exact[name], rtol=1e-7, atol=1e-10)
    assert not torch.allclose(gradients[1], gradients[2], rtol=1e-2)


def _alone(
    accumulate: int, losses: tuple[TeacherLoss, ...]
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Return a network after three steps of a ``LossTrainer``, and their reports."""
    model, _ = _networks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    trainer = LossTrainer(model, losses, optimizer=optimizer, clip_norm=0.5, accumulate=accumulate)
    generator = torch.Generator().manual_seed(1)
    reports = []
    for _ in range(3):
        labels = torch.randint(0, 3, (8,), generator=generator)
        x, weak, strong = (
            torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (8, 12, 12)
        )
        unlabeled = (weak, strong) if len(losses) > 1 else None
        reports.append(trainer.step((x, labels), unlabeled).as_dict())
    return model, reports


@pytest.mark.parametrize(
    "losses",
    [
        (CrossEntropy(0.1),),
        (CrossEntropy(), UDA(temperature=0.5, threshold=0.4, weight=2.0)),
        (CrossEntropy(), CrossEntropy(0.3, weight=0.5), UDA(ramp=2)),
    ],
)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_no_number_of_a_loss_trainer(
    accumulate: int, losses: tuple[TeacherLoss, ...]
) -> None:
    network, reports = _alone(1, losses)
    network_by_parts, reports_by_parts = _alone(accumulate, losses)
    for a, b in zip(network.parameters(), network_by_parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for report, report_by_parts in zip(reports, reports_by_parts, strict=True):
        assert report_by_parts == pytest.approx(report, rel=1e-12)


# Of the first four rows, three are ignored.
LABELS = torch.tensor([-100, -100, -100, 1, 2, 0, 1, 2])
# Here all labels of the first half are ignored, so that its own mean is NaN.
LATE = torch.tensor([-100, -100, -100, -100, 2, 0, -100, 2])


def not_ignored(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, ignore_index=-100)


def dice(z: Tensor, y: Tensor) -> Tensor:
    p = z.softmax(1)[:, 1]
    return 1 - 2 * (p * (y == 1)).sum() / (p.sum() + (y == 1).sum() + 1)


def contrast(z: Tensor, y: Tensor) -> Tensor:
    alike = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T
    return F.cross_entropy(alike / 0.5, (torch.arange(len(z)) + 1) % len(z))


def summed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, ignore_index=-100, reduction="sum")


def as_pair(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return summed(z, y), (y != -100).sum()


class Judged(metapl.problems.ExampleWeights):
    """Example weights, judged by a loss of the outer outputs."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def check(self, outputs: Tensor, outer: Any, inner: Any) -> None:
        """Check nothing: labels may be ignored ones."""

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        return self.loss(outputs, batch[1])


def weighed(seed: int = 0, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)]
    return metapl.problems.Table(torch.linspace(-1, 1, 12)).double(), nn.Sequential(
        *layers
    ).double()


def outer_and_inner(labels: Tensor) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(5)
    x, u = (torch.randn(n, 5, generator=draw, dtype=torch.float64) for n in (8, 12))
    return {"outer": (x, labels), "inner": (u, torch.arange(12) % 3, torch.arange(12))}


def by_double_backward(
    teacher: nn.Module, student: nn.Module, loss: Any, data: dict[str, Any]
) -> Tensor:
    """Return dL/d(table) through one step of SGD at 0.5, all rows at once."""
    (x, y), (u, labels, _) = data["outer"], data["inner"]
    (table,), theta = teacher.parameters(), dict(student.named_parameters())
    losses = F.cross_entropy(functional_call(student, theta, (u,)), labels, reduction="none")
    g = torch.autograd.grad((table.sigmoid() * losses).mean(), [*theta.values()], create_graph=True)
    moved = {name: p - 0.5 * d for (name, p), d in zip(theta.items(), g, strict=True)}
    outer = loss(functional_call(student, moved, (x,)), y)
    return torch.autograd.grad(outer, table)[0]


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("labels", [LABELS, LATE], ids=["not ignored", "a part all ignored"])
def test_an_outer_loss_that_is_a_sum_and_a_weight(labels: Tensor, parts: int) -> None:
    """In micro-batches the gradient is that of all rows: double backward by hand, in each mode."""
    teacher, student = weighed()
    data = outer_and_inner(labels)
    expected = by_double_backward(teacher, student, not_ignored, data)
    assert expected.norm() > 1e-4
    sgd = torch.optim.SGD(student.parameters(), lr=0.5)
    inputs: dict[str, Any] = {**data, "problem": Judged(as_pair), "inner_optimizer": sgd}
    for mode, tolerance in (("forward", 1e-10), ("difference", 1e-5)):
        by_parts = metapl.hypergradient(teacher, student, **inputs, mode=mode, accumulate=parts)
        (gradient,) = by_parts.grads.values()
        torch.testing.assert_close(
            gradient, expected, rtol=tolerance, atol=tolerance * float(expected.norm())
        )
        by_batch = metapl.hypergradient(teacher, student, **inputs, mode=mode)
        torch.testing.assert_close(by_parts.outer_loss, by_batch.outer_loss)


@pytest.mark.parametrize(
    "mode", ["forward", "reinforce", "reinforce_per_example", "loss_difference", "difference"]
)
def test_a_training_on_labels_that_are_partly_ignored(mode: str) -> None:
    """Steps end on the weights of the whole batches', whatever the mode.

    In one mode the student takes two steps.
    """

    class Ignoring(metapl.PseudoLabels):
        def check(self, outputs: Tensor, outer: Any, inner: Any) -> None: ...

        def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
            return as_pair(outputs, batch[1])

    def ends(parts: int) -> list[Tensor]:
        teacher, student = _networks()
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            mode,
            problem=Ignoring(),
            teacher_losses=(),
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9),
            accumulate=parts,
            lookahead=2 if mode == "forward" else 1,
            verify=False,
            generator=torch.Generator().manual_seed(3),
        )
        draw = torch.Generator().manual_seed(1)
        for labels in (LABELS, LATE, LABELS.flip(0)):
            x, *u = (
                torch.randn(8, 5, generator=draw, dtype=torch.float64)
                for _ in range(1 + trainer.lookahead)
            )
            trainer.step((x, labels), metapl.Lookahead(u) if trainer.lookahead > 1 else u[0])
        return [p.detach() for module in (teacher, student) for p in module.parameters()]

    for by_batch, by_parts in zip(ends(1), ends(2), strict=True):
        torch.testing.assert_close(by_parts, by_batch, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "loss",
    [not_ignored, dice, contrast, summed, lambda z, y: (not_ignored(z, y), len(y))],
    ids=["ignoring", "dice", "contrast", "sum", "a wrong weight"],
)
def test_an_outer_loss_that_is_no_mean_is_refused_in_micro_batches(loss: Any) -> None:
    # Of each half of the first part, another number counts.
    labels = torch.tensor([1, 0, -100, 2, -100, -100, -100, 1])
    data = outer_and_inner(labels)
    teacher, student = weighed()

    def trainer(loss: Any, parts: int) -> metapl.BilevelTrainer:
        return metapl.BilevelTrainer(
            teacher,
            student,
            problem=Judged(loss),
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.5),
            accumulate=parts,
        )

    with pytest.raises(
        metapl.MetaplError,
        match=r"outer_loss is .* no mean over examples; expected one, \(sum, weight\)",
    ):
        trainer(loss, 2).step(**data)
    trainer(as_pair, 2).step(**data)
    trainer(loss, 1).step(**data)


class Decayed(metapl.BilevelProblem):
    """A decay of each weight, as many as a micro-batch has rows."""

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> metapl.Signal:
        return metapl.Signal(teacher(torch.arange(4)).exp())

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        decay = sum(
            s * p.square().sum() for s, p in zip(signal.value, params.values(), strict=False)
        )
        return F.cross_entropy(outputs, batch[1], reduction="none") + decay

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


class DecayedWithoutRows(Decayed):
    signal_has_rows = False


def test_a_signal_that_has_as_many_numbers_as_a_micro_batch_is_told_how_to_say_so() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    decays = metapl.problems.Table(torch.tensor([-3.0, -4.0, -5.0, -2.0]).double())
    inner = torch.randn(8, 3).double(), torch.arange(8) % 2
    options: dict[str, Any] = {
        "outer": (torch.randn(6, 3).double(), torch.arange(6) % 2),
        "inner": inner,
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
    }
    whole = metapl.hypergradient(decays, student, problem=Decayed(), **options)
    with pytest.raises(metapl.MetaplError, match="signal_has_rows = False of a signal without"):
        metapl.hypergradient(decays, student, problem=Decayed(), accumulate=2, **options)
    parts = metapl.hypergradient(
        decays, student, problem=DecayedWithoutRows(), accumulate=2, **options
    )
    torch.testing.assert_close(parts.grads, whole.grads)


def test_an_outer_loss_with_a_weight_that_reads_the_teacher() -> None:
    """The direct term, of a module that the problem holds, is that of all rows too."""

    class Scored(Judged):
        def __init__(self, teacher: nn.Module) -> None:
            super().__init__(as_pair)
            self.teacher = teacher

        def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Any:
            return metapl.Signal(teacher(batch[0]).sigmoid().squeeze(1))

        def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
            return self.loss(outputs + self.teacher(batch[0]) * outputs.cos(), batch[1])

    _, student = weighed()
    teacher = nn.Linear(5, 1).double()
    inputs: dict[str, Any] = {
        **outer_and_inner(LABELS),
        "problem": Scored(teacher),
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=0.5),
    }
    by_batch = metapl.hypergradient(teacher, student, **inputs, verify=True)
    for parts in (2, 4):
        by_parts = metapl.hypergradient(teacher, student, **inputs, accumulate=parts)
        for name, g in by_batch.grads.items():
            torch.testing.assert_close(by_parts.grads[name], g, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(
                by_parts.direct[name], by_batch.direct[name], rtol=1e-9, atol=1e-12
            )
    assert by_batch.direct["weight"].norm() > 1e-3


# ----------------------------------------------- own losses that are means over what is not ignored


# Of sequences of three tokens.
TAGS = torch.tensor([[-100, -100, 1], [-100, -100, -100], [0, 1, 2], [2, 2, -100]])


class Tagger(nn.Module):
    """Logits (B, C, T) of sequences (B, T, 5)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).transpose(1, 2)


class OwnMean:
    """A user's cross-entropy, whose mean is over the labels that are not ignored.

    It does not say so.
    """

    name = "own"

    def __call__(
        self, teacher: nn.Module, *, outer: Any, inner: Any, signal: Any, step: int
    ) -> Tensor:
        x, y = outer
        total = F.cross_entropy(teacher(x), y, ignore_index=-100, reduction="sum")
        return total / (y != -100).sum().clamp(min=1)


class SaidMean(OwnMean):
    """The same, which says so."""

    def mean_over(self, *, outer: Any, inner: Any) -> Tensor:
        return (outer[1] != -100).sum()


class Contrast(OwnMean):
    """A loss that compares the rows of a batch with each other."""

    def __call__(self, teacher: nn.Module, *, outer: Any, **_: Any) -> Tensor:
        return contrast(teacher(outer[0]), outer[1])


class ContrastOfMicroBatches(Contrast):
    of_micro_batches = True


def tagged_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(
        4, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    ), TAGS


def trained_tagger(loss: Any, accumulate: int, dropout: float = 0.0) -> tuple[Tensor, float]:
    """Return the weights after two steps on the tagged batch, and the loss of the second.

    The loss is that of the report.
    """
    torch.manual_seed(0)
    model = Tagger(dropout).double()
    trainer = LossTrainer(
        model, (loss,), optimizer=torch.optim.SGD(model.parameters(), lr=0.3), accumulate=accumulate
    )
    for _ in range(2):
        report = trainer.step(tagged_batch())
    return nn.utils.parameters_to_vector(model.parameters()).detach(), report.as_dict()["loss"]


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize(
    "loss",
    [CrossEntropy(), CrossEntropy(0.2, weight=0.5), SaidMean()],
    ids=["usual", "smoothed", "said"],
)
def test_own_losses_are_means_over_all_labels_that_are_not_ignored(
    loss: Any, accumulate: int
) -> None:
    """Of four micro-batches one has no such label at all.

    The reference is a loop on the whole batch.
    """
    torch.manual_seed(0)
    by_hand = Tagger().double()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.3)
    x, y = tagged_batch()
    smoothing = getattr(loss, "label_smoothing", 0.0)
    weight = getattr(loss, "weight", 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        value = weight * F.cross_entropy(by_hand(x), y, label_smoothing=smoothing)
        value.backward()
        optimizer.step()
    weights, said = trained_tagger(loss, accumulate)
    expected = nn.utils.parameters_to_vector(by_hand.parameters()).detach()
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-14)
    assert said == pytest.approx(float(value.detach()), rel=1e-12)


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("loss", [OwnMean(), Contrast()], ids=["ignoring", "contrast"])
def test_own_losses_that_are_no_means_are_refused_before_anything_moves(
    loss: Any, accumulate: int
) -> None:
    model, _ = _networks()
    batch = torch.randn(8, 5, dtype=torch.float64), LABELS
    state_before = copy.deepcopy(model.state_dict())
    trainer = LossTrainer(
        model, (loss,), optimizer=torch.optim.SGD(model.parameters()), accumulate=accumulate
    )
    with pytest.raises(metapl.MetaplError, match="it is no mean over rows"):
        trainer.step(batch)
    assert all(torch.equal(state_before[name], t) for name, t in model.state_dict().items())
    assert model.training
    # With one micro-batch it is right.
    LossTrainer(model, (loss,), optimizer=torch.optim.SGD(model.parameters())).step(batch)


class InFloat32(nn.Module):
    """A network in float64 whose logits are taken to float32, and perhaps back."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.Linear(5, 3).double()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).float().to(self.dtype)


class PlainMean(OwnMean):
    def __call__(self, teacher: nn.Module, *, outer: Any, **_: Any) -> Tensor:
        return F.cross_entropy(teacher(outer[0]), outer[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_may_be_taken_in_a_coarser_type_than_the_weights_have(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = torch.randn(24, 5, dtype=torch.float64), torch.arange(24) % 3
    model = InFloat32(dtype)
    by_hand = F.cross_entropy(model(batch[0]), batch[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = LossTrainer(model, (PlainMean(),), optimizer=optimizer, accumulate=2).step(batch)
    assert report.as_dict()["loss"] == pytest.approx(float(by_hand.detach()), rel=1e-6)


def test_a_loss_of_each_micro_batch_is_allowed_where_it_says_so() -> None:
    batch = torch.randn(8, 5, dtype=torch.float64), LABELS
    model, _ = _networks()
    half = [contrast(model(batch[0][rows]), batch[1][rows]) for rows in (slice(0, 4), slice(4, 8))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = LossTrainer(
        model, (ContrastOfMicroBatches(),), optimizer=optimizer, accumulate=2
    ).step(batch)
    assert report.as_dict()["loss"] == pytest.approx(float(sum(half).detach()) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("mode", "steps"),
    [("forward", 1), ("forward", 3), ("none", 1), ("none", 3), ("difference", 1), ("reinforce", 1)],
)
def test_a_teachers_own_losses_are_means_over_all_labels_that_are_not_ignored(
    mode: str, steps: int
) -> None:
    """The weights after a step are those of the whole batches.

    A loss that does not say so is refused.
    """

    class Weighing(BilevelProblem):
        def check(self, outputs: Tensor, outer: Any, inner: Any) -> None: ...

        def signal(
            self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Any
        ) -> metapl.Signal:
            return metapl.Signal(teacher(batch[0]).mean((1, 2)).sigmoid())

        def inner_loss(
            self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None
        ) -> Tensor:
            return signal.value * F.cross_entropy(outputs, batch[1], reduction="none").mean(1)

        def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
            return F.cross_entropy(outputs, batch[1], reduction="sum"), (batch[1] != -100).sum()

    class Pseudo(metapl.PseudoLabels):
        def check(self, outputs: Tensor, outer: Any, inner: Any) -> None: ...

        def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
            return as_pair(outputs, batch[1])

    def weights_after(accumulate: int, loss: Any) -> Tensor:
        torch.manual_seed(0)
        draws = torch.Generator().manual_seed(4)
        if mode == "reinforce":
            teacher, student = _networks()
            problem: Any = Pseudo()
            inner = [torch.randn(12, 5, generator=draws, dtype=torch.float64) for _ in range(steps)]
            outer = torch.randn(8, 5, generator=draws, dtype=torch.float64), LABELS
        else:
            teacher = Tagger().double()
            student = Tagger().double()
            problem = Weighing()
            x = [torch.randn(4, 3, 5, generator=draws, dtype=torch.float64) for _ in range(steps)]
            inner = [(inputs, torch.randint(0, 3, (4, 3), generator=draws)) for inputs in x]
            outer = tagged_batch()
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            mode,
            problem=problem,
            teacher_losses=(loss,),
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.3),
            outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.3),
            accumulate=accumulate,
            generator=torch.Generator().manual_seed(3),
            verify=accumulate == 2,
        )
        for _ in range(2):
            trainer.step(outer=outer, inner=inner[0] if steps == 1 else metapl.Lookahead(inner))
        return nn.utils.parameters_to_vector(
            [*teacher.parameters(), *student.parameters()]
        ).detach()

    loss = SaidMean()
    by_batch = weights_after(1, loss)
    torch.testing.assert_close(weights_after(2, loss), by_batch, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(weights_after(4, loss), by_batch, rtol=1e-9, atol=1e-11)
    with pytest.raises(metapl.MetaplError, match="it is no mean over rows"):
        weights_after(2, OwnMean())


def test_losses_are_compared_at_the_first_step_alone() -> None:
    """Both micro-batches together, and each."""
    model, _ = _networks()
    passes = 0

    def note_pass(*_: Any) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_hook(note_pass)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = LossTrainer(model, optimizer=optimizer, accumulate=2)
    batch = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3
    counts = []
    for _ in range(3):
        passes = 0
        trainer.step(batch)
        counts.append(passes)
    assert counts == [2 + 3, 2, 2]


def test_a_training_with_micro_batches_ends_where_that_on_whole_batches_does() -> None:
    """150 steps on the digits, of which every third label is ignored, at the usual rates."""
    from sklearn.datasets import load_digits

    pixels, digits = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    labels = digits.long()[:, None].clone()
    labels[::3] = -100

    class Digit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)[:, :, None]

    accuracy = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model = Digit()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = LossTrainer(model, optimizer=optimizer, accumulate=accumulate)
        for step in range(150):
            rows = (torch.arange(32) + 32 * step) % 1300
            trainer.step((pixels[rows], labels[rows]))
        predicted = model(pixels[-400:])[:, :, 0].argmax(1)
        accuracy.append(float((predicted == digits[-400:]).float().mean()))
    assert accuracy[0] > 0.8
    assert accuracy[1] == pytest.approx(accuracy[0], abs=0.005)


@pytest.mark.parametrize("holder", ["dict", "list", "array", "module", "number", "object"])
def test_state_anywhere_in_the_problem_is_refused(holder: str) -> None:
    class Counting(metapl.BilevelProblem):
        def __init__(self) -> None:
            self.held: Any = {
                "dict": {"level": torch.tensor(0.5)},
                "list": [0.5],
                "array": numpy.array([0.5]),
                "module": nn.BatchNorm1d(3),
                "number": 0.5,
                "object": SimpleNamespace(level=0.5),
            }[holder]

        def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
            q = teacher(batch).softmax(-1)
            surest = q.detach().amax(1).mean()
            if holder == "dict":
                self.held["level"] = 0.9 * self.held["level"] + 0.1 * surest
            elif holder == "module":
                self.held(q.detach())
            elif holder == "object":
                self.held.level = 0.9 * self.held.level + 0.1 * float(surest)
            elif holder == "number":
                self.held = 0.9 * self.held + 0.1 * float(surest)
            else:
                self.held[0] = 0.9 * self.held[0] + 0.1 * float(surest)
            return Signal(q)

        def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Tensor:
            return -(signal.value * outputs.log_softmax(-1)).sum(-1)

        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs, batch[1])

    torch.manual_seed(0)
    trainer = metapl.BilevelTrainer(
        nn.Linear(4, 3),
        nn.Linear(4, 3),
        "forward",
        problem=Counting(),
        teacher_losses=(),
        recompute_teacher=True,
    )
    with pytest.raises(MetaplError, match="Counting keeps state between calls of signal"):
        trainer.step((torch.randn(8, 4), torch.arange(8) % 3), torch.randn(12, 4))


def test_a_mean_teacher_that_begins_as_the_teacher_is_refused_where_it_first_moves() -> None:
    """It stays in the first step, in which it and the teacher are the same."""

    class Mean(metapl.BilevelProblem):
        ema: Any = None

        def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
            if self.ema is None:
                self.ema = copy.deepcopy(teacher).requires_grad_(requires_grad=False)
            for p, weight in zip(self.ema.parameters(), teacher.parameters(), strict=True):
                p.lerp_(weight.detach(), 0.3)
            return Signal(0.5 * teacher(batch).softmax(-1) + 0.5 * self.ema(batch).softmax(-1))

        def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Tensor:
            return -(signal.value * outputs.log_softmax(-1)).sum(-1)

        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs, batch[1])

    torch.manual_seed(0)
    trainer = metapl.BilevelTrainer(
        nn.Linear(4, 3),
        nn.Linear(4, 3),
        "forward",
        problem=Mean(),
        teacher_losses=(),
        recompute_teacher=True,
        verify=False,
    )
    batches = (torch.randn(8, 4), torch.arange(8) % 3), torch.randn(12, 4)
    trainer.step(*batches)
    with pytest.raises(MetaplError, match=r"Mean keeps state .* \(ema.weight, ema.bias\)"):
        trainer.step(*batches)


class Threshold(metapl.BilevelProblem):
    """Labels that are surer than their running mean count double."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.level = torch.tensor(0.5, dtype=torch.float64)
        self.last = torch.tensor(0.0)

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        q = teacher(batch).softmax(-1)
        holder = {"problem": self, "teacher": teacher, "note": None}[self.where]
        self.last = q.detach().mean()
        if holder is not None:
            holder.level = 0.9 * holder.level + 0.1 * q.detach().amax(1).mean()
        return Signal(q)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return -(signal.value * outputs.log_softmax(-1)).sum(-1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("options", [{}, {"recompute_teacher": True}, {"accumulate": 2}])
@pytest.mark.parametrize("where", ["problem", "teacher", "note"])
def test_state_that_signal_writes_moves_once_or_is_refused(
    where: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    teacher.register_buffer("level", torch.tensor(0.5, dtype=torch.float64))
    problem = Threshold(where)
    trainer = metapl.BilevelTrainer(
        teacher, student, "forward", problem=problem, teacher_losses=(), **options
    )
    outer = torch.ones(8, 4).double(), torch.arange(8) % 3
    inner = torch.randn(12, 4).double()
    if where == "problem" and options:
        weight = teacher.weight.clone()
        with pytest.raises(MetaplError, match="Threshold keeps state between calls of signal"):
            trainer.step(outer, inner)
        assert torch.equal(teacher.weight, weight)
        return
    level = 0.5
    for _ in range(3):
        # The running mean by hand, of each micro-batch.
        for part in inner.chunk(options.get("accumulate", 1)):
            surest = teacher(part).softmax(-1).detach().amax(1).mean()
            level = 0.9 * level + 0.1 * float(surest)
        trainer.step(outer, inner)
    if where != "note":
        holder: Any = problem if where == "problem" else teacher
        assert float(holder.level) == pytest.approx(level)


class WeighedByLevel(metapl.BilevelProblem):
    """Losses that are weighed by how sure the teacher has been so far, which a buffer has."""

    def __init__(self, teacher: nn.Module, *, in_signal: bool) -> None:
        self.teacher = teacher
        self.in_signal = in_signal

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        q = teacher(batch).softmax(-1)
        teacher.level.mul_(0.5).add_(0.5 * q.detach().amax(1).mean())
        return Signal({"q": q, "level": teacher.level.expand(len(q)).clone()})

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        level = signal.value["level"] if self.in_signal else self.teacher.level
        return -level * (signal.value["q"] * outputs.log_softmax(-1)).sum(-1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("in_signal", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_inner_loss_of_a_state_that_signal_moves(accumulate: int, *, in_signal: bool) -> None:
    """Of a micro-batch it is another number before and after the signals of the others."""
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    teacher.register_buffer("level", torch.tensor(0.5, dtype=torch.float64))
    problem = WeighedByLevel(teacher, in_signal=in_signal)
    outer = torch.randn(8, 4).double(), torch.arange(8) % 3
    inner = torch.randn(12, 4).double()
    refused = accumulate > 1 and not in_signal
    words = r"the inner loss reads what signal moves in the teacher \(level\)"

    def gradient(mode: str) -> Any:
        return metapl.hypergradient(
            teacher,
            student,
            outer=outer,
            inner=inner,
            mode=mode,
            problem=problem,
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            accumulate=accumulate,
            # The mean is detached from the teacher, of which verification would warn.
            verify=False,
        )

    trainer = metapl.BilevelTrainer(
        teacher, student, problem=problem, accumulate=accumulate, verify=False, teacher_losses=()
    )
    if refused:
        for mode in ("forward", "unrolled"):
            with pytest.raises(MetaplError, match=words):
                gradient(mode)
        with pytest.raises(MetaplError, match=words):
            trainer.step(outer, inner)
        assert float(teacher.level) == 0.5
        return
    forward, unrolled = gradient("forward"), gradient("unrolled")
    torch.testing.assert_close(forward.feedback["q"], unrolled.feedback["q"])
    # The loss by hand, on the signal of each micro-batch.
    level = 0.5
    losses = []
    for part in inner.chunk(accumulate):
        q = teacher(part).softmax(-1).detach()
        level = 0.5 * level + 0.5 * float(q.amax(1).mean())
        losses.append(-level * (q * student(part).log_softmax(-1)).sum(-1))
    assert float(forward.inner_loss) == pytest.approx(float(torch.cat(losses).detach().mean()))
    trainer.step(outer, inner)
    assert float(teacher.level) == pytest.approx(level)


def level_networks() -> tuple[nn.Module, nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    teacher.register_buffer("level", torch.tensor(0.5, dtype=torch.float64))
    outer = torch.randn(8, 4).double(), torch.arange(8) % 3
    return teacher, student, outer, torch.randn(12, 4).double()


def test_a_state_that_signal_moves_is_refused_without_feedback_too() -> None:
    """The student's step would be another one."""
    teacher, student, outer, inner = level_networks()
    problem = WeighedByLevel(teacher, in_signal=False)
    trainer = metapl.BilevelTrainer(
        teacher, student, "none", problem=problem, accumulate=2, teacher_losses=()
    )
    with pytest.raises(MetaplError, match=r"moves in the teacher \(level\)"):
        trainer.step(outer, inner)


ROADS = [
    {},
    {"recompute_teacher": True},
    {"accumulate": 2},
    pytest.param({"compile": True}, marks=pytest.mark.long),
]


@pytest.mark.parametrize("options", ROADS)
def test_five_steps_with_a_running_mean_are_those_by_hand(options: dict[str, Any]) -> None:
    teacher, student, outer, inner = level_networks()
    by_hand, student_by_hand, _, _ = level_networks()
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        problem=WeighedByLevel(teacher, in_signal=True),
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=5.0),
        teacher_losses=(),
        # The mean is detached from the teacher, of which verification would warn.
        verify=False,
        **options,
    )
    level = torch.tensor(0.5, dtype=torch.float64)
    theta = {name: p.detach() for name, p in student_by_hand.named_parameters()}
    for _ in range(5):
        trainer.step(outer, inner)
        theta = {name: t.detach().requires_grad_() for name, t in theta.items()}
        losses = []
        for part in inner.chunk(options.get("accumulate", 1)):
            q = by_hand(part).softmax(-1)
            level = 0.5 * level + 0.5 * q.detach().amax(1).mean()
            z = torch.func.functional_call(student_by_hand, theta, part)
            losses.append(-level * (q * z.log_softmax(-1)).sum(-1))
        inner_loss = torch.cat(losses).mean()
        g = torch.autograd.grad(inner_loss, list(theta.values()), create_graph=True)
        theta = {name: t - 0.1 * g_t for (name, t), g_t in zip(theta.items(), g, strict=True)}
        z = torch.func.functional_call(student_by_hand, theta, outer[0])
        gradient = torch.autograd.grad(F.cross_entropy(z, outer[1]), list(by_hand.parameters()))
        with torch.no_grad():
            for p, g_p in zip(by_hand.parameters(), gradient, strict=True):
                p -= 5.0 * g_p
    torch.testing.assert_close(teacher.level, level)
    torch.testing.assert_close(teacher.state_dict()["weight"], by_hand.state_dict()["weight"])
    torch.testing.assert_close(student.state_dict()["weight"], theta["weight"].detach())


class Drifting(metapl.BilevelProblem):
    """A signal that grows a little with each call, from the third step on."""

    def __init__(self, calls: list[int]) -> None:
        self.count = lambda: calls.append(0) or len(calls)

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        growth = 1 + 1e-3 * max(0, self.count() - 4)
        return Signal(growth * teacher(batch).sigmoid())

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return (signal.value - outputs).square().sum(-1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


def test_a_signal_that_differs_a_little_is_refused_in_later_steps_too() -> None:
    """In float32, where the two differ by a thousandth."""
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        problem=Drifting([]),
        recompute_teacher=True,
        verify=False,
        teacher_losses=(),
    )
    outer, inner = (torch.randn(8, 4), torch.arange(8) % 3), torch.randn(12, 4)
    for _ in range(2):
        trainer.step(outer, inner)
    weight = teacher.weight.clone()
    with pytest.raises(MetaplError, match="the signal of Drifting, returns other outputs"):
        trainer.step(outer, inner)
    assert torch.equal(teacher.weight, weight)


class OfBatch(WeighedByLevel):
    """The same where the teacher is asked once for the batch."""

    signal_of_batch = True


def test_a_state_that_moves_once_for_the_batch_is_that_of_the_whole_batch() -> None:
    feedback = []
    for accumulate in (1, 2):
        teacher, student, outer, inner = level_networks()
        result = metapl.hypergradient(
            teacher,
            student,
            outer=outer,
            inner=inner,
            problem=OfBatch(teacher, in_signal=False),
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            accumulate=accumulate,
            # The mean is detached from the teacher, of which verification would warn.
            verify=False,
        )
        feedback.append(result.feedback["q"])
    torch.testing.assert_close(*feedback)


class RowWeights(metapl.problems.EqualWeights):
    """Cross-entropy with the teacher's weight for each row, by a function of all weights."""

    has_teacher = True

    def __init__(self, of_weights: Any) -> None:
        self.of_weights = of_weights

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Any
    ) -> Any:
        return Signal(self.of_weights(teacher(batch[0])[:, 0].exp()))


class BatchWeights(RowWeights):
    signal_of_batch = True


class DrawnOfBatch(metapl.PseudoLabels):
    """Labels that are drawn from probabilities which are balanced over the batch."""

    def signal(self, teacher: Any, batch: Any, *others: Any, **options: Any) -> Signal:
        def balanced(x: Tensor) -> Tensor:
            logits = teacher(x)
            return logits - logits.mean(0)

        return super().signal(balanced, batch, *others, **options)  # type: ignore[arg-type]


def normalized(weights: Tensor) -> Tensor:
    return weights / weights.mean()


class AlwaysDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3)


def weighing_step(problem: Any, teacher: nn.Module | None = None, **options: Any) -> dict[str, Any]:
    """Return the arguments of a step on eight rows."""
    own_teacher, student = _networks()
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(8, 5, generator=draws, dtype=torch.float64)
    labels = torch.arange(8) % 3
    return {
        "teacher": own_teacher if teacher is None else teacher.double(),
        "student": student,
        "outer": (x.flip(0), labels),
        "inner": x if isinstance(problem, metapl.PseudoLabels) else (x, labels),
        "problem": problem,
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=0.3),
        **options,
    }


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_a_signal_that_is_normalized_over_the_batch_is_asked_for_once(accumulate: int) -> None:
    """Also in micro-batches of one row, where such a weight is 1 whatever the teacher says."""
    of_parts = RowWeights(normalized)
    found = metapl.check_gradient(**weighing_step(of_parts, accumulate=accumulate))
    assert "the signal of RowWeights about two micro-batches" in found.verdict
    by_parts = weighing_step(BatchWeights(normalized), accumulate=accumulate, verify=False)
    by_parts = metapl.hypergradient(**by_parts).grads
    whole = metapl.hypergradient(**weighing_step(of_parts, verify=False)).grads
    torch.testing.assert_close(by_parts, whole)


def test_a_first_step_on_a_signal_of_the_batch_is_refused() -> None:
    arguments = weighing_step(RowWeights(normalized), accumulate=2)
    words = r"it depends on other rows; .*signal_of_batch"
    with pytest.raises(MetaplError, match=words):
        metapl.hypergradient(**arguments)
    batches = {name: arguments.pop(name) for name in ("outer", "inner")}
    with pytest.raises(MetaplError, match=words):
        metapl.BilevelTrainer(**arguments).step(**batches)


def test_a_fresh_teacher_does_not_hide_that_its_weights_are_normalized() -> None:
    """All of them are 1, and the gradient is another one."""
    teacher = nn.Linear(5, 1)
    nn.init.zeros_(teacher.weight)
    found = metapl.check_gradient(
        **weighing_step(RowWeights(normalized), teacher=teacher, accumulate=2)
    )
    assert "it depends on other rows" in str(found)


@pytest.mark.parametrize("mode", ["reinforce", "forward"])
def test_drawn_labels_of_probabilities_of_the_batch_are_refused(mode: str) -> None:
    found = metapl.check_gradient(**weighing_step(DrawnOfBatch(), mode=mode, accumulate=2))
    assert "the signal of DrawnOfBatch about two" in str(found)


def normalized_in_pairs(weights: Tensor) -> Tensor:
    """Normalize over each two rows, which no micro-batch divides."""
    pairs = weights.unflatten(0, (-1, 2))
    return (pairs / pairs.mean(1, keepdim=True)).flatten()


@pytest.mark.parametrize(
    ("of_weights", "layer"),
    [
        (torch.sigmoid, nn.BatchNorm1d(5)),
        (torch.sigmoid, nn.BatchNorm1d(5, track_running_stats=False)),
        (torch.sigmoid, nn.Dropout(0.3)),
        (torch.sigmoid, AlwaysDropout()),
        (normalized_in_pairs, None),
        (lambda w: w * torch.bernoulli(torch.full_like(w, 0.5)), None),
    ],
    ids=["batch norm", "batch norm of the batch", "dropout", "dropout in eval", "pairs", "drawn"],
)
def test_a_signal_of_each_row_is_not_refused(of_weights: Any, layer: nn.Module | None) -> None:
    """What batch norm and dropout do of the batch is documented to differ."""
    layers = [] if layer is None else [layer]
    teacher = nn.Sequential(*layers, nn.Linear(5, 1))
    arguments = weighing_step(RowWeights(of_weights), teacher=teacher, accumulate=4)
    assert metapl.check_gradient(**arguments).passed


@pytest.mark.parametrize("mode", ["reinforce", "reinforce_per_example", "forward"])
def test_drawn_labels_of_each_row_are_not_refused(mode: str) -> None:
    for accumulate in (2, 4, 8):
        arguments = weighing_step(metapl.PseudoLabels(), mode=mode, accumulate=accumulate)
        assert metapl.check_gradient(**arguments).passed


def test_the_batch_that_does_not_divide_is_named() -> None:
    arguments = weighing_step(RowWeights(torch.sigmoid), accumulate=3)
    with pytest.raises(MetaplError, match="the inner batch has 8 .* multiple of accumulate=3"):
        metapl.check_gradient(**arguments)
    x, *others = arguments["inner"]
    longer = {**arguments, "inner": (x.repeat_interleave(3, 0), *others)}
    with pytest.raises(MetaplError, match="the inner batch has tensors of 24 and 8 rows; expected"):
        metapl.check_gradient(**longer)
    arguments["inner"] = tuple(t.repeat_interleave(3, 0) for t in arguments["inner"])
    with pytest.raises(MetaplError, match="the outer batch has 8 .* multiple of accumulate=3"):
        metapl.check_gradient(**arguments)


COSTS = {"cheap": 0.1, "dear": 3.0}
KINDS = ["cheap"] * 4 + ["dear"] * 4


class CostOfKind(BilevelProblem):
    """The inner loss counts by a cost of each row, which is no tensor in the batch."""

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
        return Signal(teacher(batch[0]).sigmoid().squeeze(-1))

    def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Tensor:
        costs = [COSTS.get(kind, kind) for kind in batch[2]]
        losses = F.cross_entropy(outputs, batch[1], reduction="none")
        return signal.value * losses * torch.tensor(costs, dtype=losses.dtype)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize(
    "column",
    [
        KINDS,
        tuple(KINDS),
        [COSTS[kind] for kind in KINDS],
        tuple(COSTS[kind] for kind in KINDS),
        numpy.array([COSTS[kind] for kind in KINDS]),
        numpy.array(KINDS),
    ],
    ids=["texts", "tuple of texts", "numbers", "tuple of numbers", "array", "array of texts"],
)
def test_a_column_that_is_no_tensor_is_cut_with_the_rows(column: Any) -> None:
    feedback, weights = [], []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        x, y = torch.randn(8, 4), torch.arange(8) % 3
        teacher, student = nn.Linear(4, 1), nn.Linear(4, 3)
        trainer = metapl.BilevelTrainer(
            teacher, student, problem=CostOfKind(), accumulate=accumulate, teacher_losses=()
        )
        feedback.append(trainer.step((x, y), (x, y, column)).feedback)
        weights.append(teacher.weight.detach())
    torch.testing.assert_close(feedback[1], feedback[0])
    torch.testing.assert_close(weights[1], weights[0])


@pytest.mark.parametrize(
    "column", [[1.0] * 4 + [0.0] * 4, numpy.arange(8.0)], ids=["list", "array"]
)
def test_own_losses_read_columns_of_their_micro_batch(column: Any) -> None:
    class ByColumn(TeacherLoss):
        name = "by_column"

        def __call__(
            self, teacher: Any, *, outer: Any, inner: Any, signal: Any, step: Any
        ) -> Tensor:
            weights = torch.as_tensor(outer[2], dtype=torch.float32)
            losses = F.cross_entropy(teacher(outer[0]), outer[1], reduction="none")
            return (weights * losses).mean()

    losses = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        network = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        trainer = LossTrainer(network, (ByColumn(),), optimizer=optimizer, accumulate=accumulate)
        outer = (torch.randn(8, 4), torch.arange(8) % 3, column)
        losses.append(trainer.step(outer).loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
