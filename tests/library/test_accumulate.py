"""Micro-batches give the numbers of the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import error, weights
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import metapl
from metapl import UDA, CrossEntropy
from metapl.feedback import Difference, Forward, Implicit, Reinforce
from metapl.problems.losses import TeacherLoss
from metapl.training.loss_trainer import LossTrainer


def _networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return tuple(
        nn.Sequential(nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(2)
    )


def _after(mode: object, accumulate: int, **options: object) -> tuple[list[torch.Tensor], dict[str, float]]:
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
        x, weak, strong = (torch.randn(8, 5, generator=draws, dtype=torch.float64) for _ in range(3))
        report = trainer.step((x, torch.randint(0, 3, (8,), generator=draws)), (weak, strong))
    weights = [p.detach() for module in (teacher, student) for p in module.parameters()]
    return weights, report.as_dict()


@pytest.mark.parametrize(
    "mode",
    [
        "forward",
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
    whole, report = _after(mode, 1, clip_norm=0.5)
    parts, same = _after(mode, accumulate, clip_norm=0.5)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert report.keys() == same.keys()
    for name, value in report.items():
        assert same[name] == pytest.approx(value, rel=1e-5, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["forward", "difference", "reinforce", "reinforce_per_example"])
def test_the_gradient_that_is_looked_at_is_the_one_that_a_step_applies(mode: str, recompute: bool) -> None:
    """With batch norm in both networks, where micro-batches do change the numbers."""
    torch.manual_seed(0)
    teacher, student = (
        nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(2)
    )
    labeled, unlabeled = (torch.randn(8, 5).double(), torch.arange(8) % 3), torch.randn(12, 5).double()
    found = {}
    for parts in (1, 2, 4):
        networks = copy.deepcopy(teacher), copy.deepcopy(student)
        trainer = metapl.BilevelTrainer(
            *networks,
            mode,
            inner_optimizer=torch.optim.SGD(networks[1].parameters(), lr=0.3, momentum=0.9),
            outer_optimizer=torch.optim.SGD(networks[0].parameters(), lr=1.0),
            teacher_losses=(),
            recompute_teacher=recompute,
            accumulate=parts,
            verify=False,
            generator=torch.Generator().manual_seed(3),
        )
        seen = trainer.hypergradient(labeled, unlabeled, generator=torch.Generator().manual_seed(3)).grads
        before = {name: p.detach().clone() for name, p in networks[0].named_parameters()}
        trainer.step(labeled, unlabeled)
        found[parts] = torch.cat([g.flatten() for g in seen.values()])
        moved = torch.cat([(before[name] - p.detach()).flatten() for name, p in networks[0].named_parameters()])
        torch.testing.assert_close(found[parts], moved, rtol=1e-6, atol=1e-9)
        if mode == "forward":
            exact = trainer.hypergradient(labeled, unlabeled, "unrolled").grads  # which a trainer does not split
            again = trainer.hypergradient(labeled, unlabeled).grads
            for name, g in again.items():
                torch.testing.assert_close(g, exact[name], rtol=1e-7, atol=1e-10)
    assert not torch.allclose(found[1], found[2], rtol=1e-2)


class Halved(metapl.PseudoLabels):
    """An inner loss of the problem's own, linear in its target."""

    def inner_loss(self, outputs: torch.Tensor, signal: metapl.Signal, batch: object, params: object = None):
        return super().inner_loss(outputs, signal, batch) / 2


def test_sampled_labels_and_an_inner_loss_of_the_problem_itself() -> None:
    """Whether the loss is linear in its target is checked on each micro-batch."""
    whole, _ = _after("forward", 1, problem=Halved(kind="hard"))
    parts, _ = _after("forward", 2, problem=Halved(kind="hard"))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


# ----------------------------------------------------------------------------------- losses that are no means over rows

TOKENS, WORDS = 4, 5
IGNORED = [0, 3, 1, 2, 4, 4, 0, 2]
"""How many tokens of each row are left out: all of the third pair's, so that a micro-batch has nothing to judge."""


class Language(metapl.BilevelProblem):
    """A student of words, taught by weights of examples and judged by the mean over the tokens that have a label."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> metapl.Signal:
        return metapl.Signal(teacher(batch.double()).sigmoid()[:, 0])

    def inner_loss(self, outputs: torch.Tensor, signal: metapl.Signal, batch: Any, params: Any = None) -> torch.Tensor:
        return (0.1 + signal.value) * F.cross_entropy(outputs.mT, batch, reduction="none").mean(1)

    def outer_loss(self, outputs: torch.Tensor, batch: Any) -> Any:
        total = F.cross_entropy(outputs.mT, batch[1], reduction="sum")  # leaves out the label -100
        return total, (batch[1] != -100).sum()


class Sampled(Language):
    """Examples are kept or not, by a rule in the place of a draw."""

    def signal(self, *given: Any, **options: Any) -> metapl.Signal:
        p, keep = super().signal(*given, **options).value, (given[1].sum(1) % 2).bool()
        return metapl.Signal(keep.to(p), log_prob=torch.where(keep, p, 1 - p).log())


class OfAll(Language):
    """The weights of the examples of a batch sum to the number of them, over the batch as a whole."""

    signal_of_batch = True

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> metapl.Signal:
        assert student_outputs is None
        return metapl.Signal(len(batch) * teacher(batch.double())[:, 0].softmax(0) - 0.1)


def _words() -> tuple[nn.Module, nn.Module, Any, list[torch.Tensor]]:
    torch.manual_seed(3)
    teacher = nn.Linear(TOKENS, 1).double()
    student = nn.Sequential(nn.Embedding(WORDS, 6), nn.Tanh(), nn.Linear(6, WORDS)).double()
    x, *batches = (torch.randint(0, WORDS, (8, TOKENS)) for _ in range(4))
    labels = torch.randint(0, WORDS, (8, TOKENS))
    for row, left_out in zip(labels, IGNORED, strict=True):
        row[:left_out] = -100
    return teacher, student, (x, labels), batches


def _by_hand(
    teacher: nn.Module, student: nn.Module, labeled: Any, batches: list[torch.Tensor], of_all: bool
) -> dict[str, torch.Tensor]:
    """The teacher's gradient by double backward, with the mean over all tokens of the batch as a whole."""
    theta, phi = weights(student), weights(teacher)
    for x in batches:
        z = functional_call(teacher, phi, (x.double(),))[:, 0]
        weight = len(x) * z.softmax(0) if of_all else 0.1 + z.sigmoid()
        losses = -functional_call(student, theta, (x,)).log_softmax(-1).gather(-1, x[..., None])[..., 0].mean(1)
        g = torch.autograd.grad((weight * losses).mean(), list(theta.values()), create_graph=True)
        theta = {n: p - 0.5 * d for (n, p), d in zip(theta.items(), g, strict=True)}
    log_p = functional_call(student, theta, (labeled[0],)).log_softmax(-1)
    kept = labeled[1] >= 0
    outer = -log_p[kept].gather(-1, labeled[1][kept][:, None]).mean()
    found = torch.autograd.grad(outer, list(phi.values()))
    return {"outer_loss": outer.detach()[None], **dict(zip(phi, found, strict=True))}


def _found(problem: Any, mode: Any, accumulate: int, steps: int = 1) -> dict[str, torch.Tensor]:
    teacher, student, labeled, batches = _words()
    found = metapl.hypergradient(
        teacher,
        student,
        labeled=labeled,
        unlabeled=batches[0] if steps == 1 else metapl.Lookahead(batches[:steps]),
        mode=mode,
        problem=problem,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.5),
        accumulate=accumulate,
    )
    return {"outer_loss": found.outer_loss[None], **found.grads}


CASES = [(mode, 1) for mode in ("unrolled", Forward(by="graph"), Forward(by="tangent"), "forward", "difference")]
CASES += [("unrolled", 3), ("forward", 3)]


@pytest.mark.parametrize(("mode", "steps"), CASES, ids=str)
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_an_outer_loss_as_sum_and_weight(mode: Any, accumulate: int, steps: int) -> None:
    """The mean over the tokens of all micro-batches, of which one has nothing to judge."""
    teacher, student, labeled, batches = _words()
    expected = _by_hand(teacher, student, labeled, batches[:steps], of_all=False)
    assert error(_found(Language(), mode, accumulate, steps), expected) < (1e-5 if mode == "difference" else 1e-10)


@pytest.mark.parametrize(("mode", "steps"), CASES, ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_signal_of_the_batch_as_a_whole(mode: Any, accumulate: int, steps: int) -> None:
    """It is asked for once; the student learns from it micro-batch by micro-batch."""
    teacher, student, labeled, batches = _words()
    expected = _by_hand(teacher, student, labeled, batches[:steps], of_all=True)
    assert error(_found(OfAll(), mode, accumulate, steps), expected) < (1e-5 if mode == "difference" else 1e-10)
    if steps > 1:
        return
    outer = torch.optim.SGD(teacher.parameters(), lr=1.0)
    inner = torch.optim.SGD(student.parameters(), lr=0.5)
    options = {"inner_optimizer": inner, "outer_optimizer": outer, "teacher_losses": (), "verify": False}
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    trainer = metapl.BilevelTrainer(
        teacher, student, mode, problem=OfAll(), accumulate=1 if mode == "unrolled" else accumulate, **options
    )
    trainer.step(labeled, batches[0])
    moved = {name: before[name] - p.detach() for name, p in teacher.named_parameters()}
    assert error(moved, {name: expected[name] for name in moved}) < 1e-5


@pytest.mark.parametrize(
    "mode", ["reinforce", "reinforce_per_example", "loss_difference", Implicit(damping=1.0)], ids=str
)
def test_a_mean_over_tokens_is_one_in_every_mode(mode: Any) -> None:
    problem = Language() if isinstance(mode, Implicit) else Sampled()
    assert error(_found(problem, mode, 4), _found(problem, mode, 1)) < 1e-6


# --------------------------------------------------------------------------------------------------------- LossTrainer


def _alone(accumulate: int, losses: tuple[TeacherLoss, ...]) -> tuple[nn.Module, list[dict]]:
    model, _ = _networks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    trainer = LossTrainer(model, losses, optimizer=optimizer, clip_norm=0.5, accumulate=accumulate)
    draws = torch.Generator().manual_seed(1)
    reports = []
    for _ in range(3):
        labels = torch.randint(0, 3, (8,), generator=draws)
        x, weak, strong = (torch.randn(n, 5, generator=draws, dtype=torch.float64) for n in (8, 12, 12))
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
def test_micro_batches_change_no_number_of_a_loss_trainer(accumulate: int, losses: tuple[TeacherLoss, ...]) -> None:
    whole, reports = _alone(1, losses)
    parts, same = _alone(accumulate, losses)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for one, other in zip(reports, same, strict=True):
        assert other == pytest.approx(one, rel=1e-12)
