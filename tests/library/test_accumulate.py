"""Micro-batches give the numbers of the whole batch."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from reference import error, weights
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from trainers import refused

import metapl
from metapl import UDA, CrossEntropy
from metapl.feedback import Difference, Reinforce
from metapl.problems.losses import TeacherLoss
from metapl.training import loss_trainer
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
            generator=torch.Generator().manual_seed(3),
        )
        seen = trainer.hypergradient(labeled, unlabeled, generator=torch.Generator().manual_seed(3)).grads
        before = {name: p.detach().clone() for name, p in networks[0].named_parameters()}
        trainer.step(labeled, unlabeled)
        found[parts] = torch.cat([g.flatten() for g in seen.values()])
        moved = torch.cat([(before[name] - p.detach()).flatten() for name, p in networks[0].named_parameters()])
        torch.testing.assert_close(found[parts], moved, rtol=1e-6, atol=1e-9)
        if mode == "forward":
            assert trainer.exact_cosine(labeled, unlabeled) == pytest.approx(1, abs=1e-9)
            exact = trainer.hypergradient(labeled, unlabeled, "unrolled").grads  # which a trainer does not split
            again = trainer.hypergradient(labeled, unlabeled).grads
            for name, g in again.items():
                torch.testing.assert_close(g, exact[name], rtol=1e-7, atol=1e-10)
    assert not torch.allclose(found[1], found[2], rtol=1e-2)


def test_a_number_of_micro_batches_is_checked() -> None:
    teacher, student = _networks()
    with pytest.raises(metapl.MetaplError, match="accumulate=0: expected a number of micro-batches"):
        metapl.hypergradient(
            teacher,
            student,
            labeled=(torch.randn(8, 5).double(), torch.arange(8) % 3),
            unlabeled=torch.randn(8, 5).double(),
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.3),
            accumulate=0,
        )


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


def test_a_batch_that_cannot_be_split_evenly_is_refused() -> None:
    teacher, student = _networks()
    trainer = metapl.BilevelTrainer(teacher, student, "forward", accumulate=3)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(metapl.MetaplError, match=r"8 examples.*accumulate=3"):
        trainer.step((torch.randn(8, 5).double(), torch.arange(8) % 3), torch.randn(9, 5).double())
    assert all(torch.equal(a, before[k]) for k, a in student.state_dict().items())


def test_unrolled_does_not_accumulate() -> None:
    with pytest.raises(metapl.MetaplError, match="unrolled"):
        metapl.BilevelTrainer(*_networks(), "unrolled", accumulate=2)


# ----------------------------------------------------------------------------------- losses that are no means over rows

MODES = ("unrolled", "forward", "difference", "reinforce", "reinforce_per_example", "loss_difference", "implicit")
AHEAD = ("unrolled", "forward")
TOKENS, WORDS = 4, 5
IGNORED = [0, 3, 1, 2, 4, 4, 0, 2]
"""How many tokens of each row are left out: all of the third pair's, so that a micro-batch has nothing to judge."""


class Language(metapl.problems.Problem):
    """A student of words, taught by weights of examples and judged by the mean over the tokens that have a label."""

    def __init__(self, *, sampled: bool = False, paired: bool = True) -> None:
        self.sampled, self.paired = sampled, paired

    def signal(self, teacher: Any, batch: Any, student_outputs: torch.Tensor, *, generator: Any) -> metapl.Signal:
        p = teacher(batch.double().to(student_outputs)).sigmoid()[:, 0]
        if not self.sampled:
            return metapl.Signal(p)
        keep = (batch.sum(1) % 2).bool()
        return metapl.Signal(keep.to(p), log_prob=torch.where(keep, p, 1 - p).log())

    def inner_loss(self, outputs: torch.Tensor, signal: metapl.Signal, batch: Any, params: Any = None) -> torch.Tensor:
        return (0.1 + signal.value) * F.cross_entropy(outputs.mT, batch, reduction="none").mean(1)

    def outer_loss(self, outputs: torch.Tensor, batch: Any) -> Any:
        total = F.cross_entropy(outputs.mT, batch[1], reduction="sum")  # leaves out the label -100
        count = (batch[1] != -100).sum()
        return (total, count) if self.paired else total / count


def _words(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Any, list[torch.Tensor]]:
    torch.manual_seed(3)
    teacher = nn.Linear(TOKENS, 1).to(dtype)
    student = nn.Sequential(nn.Embedding(WORDS, 6), nn.Tanh(), nn.Linear(6, WORDS)).to(dtype)
    x, *batches = (torch.randint(0, WORDS, (8, TOKENS)) for _ in range(4))
    labels = torch.randint(0, WORDS, (8, TOKENS))
    for row, left_out in zip(labels, IGNORED, strict=True):
        row[:left_out] = -100
    return teacher, student, (x, labels), batches


def _by_hand(
    teacher: nn.Module, student: nn.Module, labeled: Any, batches: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The teacher's gradient by double backward, with the mean over all tokens of the batch as a whole."""
    theta, phi = weights(student), weights(teacher)
    for x in batches:
        q = functional_call(teacher, phi, (x.to(phi["weight"].dtype),)).sigmoid()[:, 0]
        losses = -functional_call(student, theta, (x,)).log_softmax(-1).gather(-1, x[..., None])[..., 0].mean(1)
        g = torch.autograd.grad(((0.1 + q) * losses).mean(), list(theta.values()), create_graph=True)
        theta = {n: p - 0.5 * d for (n, p), d in zip(theta.items(), g, strict=True)}
    log_p = functional_call(student, theta, (labeled[0],)).log_softmax(-1)
    kept = labeled[1] >= 0
    outer = -log_p[kept].gather(-1, labeled[1][kept][:, None]).mean()
    found = torch.autograd.grad(outer, list(phi.values()))
    return {"outer_loss": outer.detach()[None], **dict(zip(phi, found, strict=True))}


def _found(mode: Any, accumulate: int, steps: int = 1, dtype: torch.dtype = torch.float64, **of_problem: bool) -> Any:
    teacher, student, labeled, batches = _words(dtype)
    sampled = mode in ("reinforce", "reinforce_per_example", "loss_difference")
    found = metapl.hypergradient(
        teacher,
        student,
        labeled=labeled,
        unlabeled=batches[0] if steps == 1 else metapl.Lookahead(batches[:steps]),
        mode=metapl.feedback.Implicit(damping=1.0) if mode == "implicit" else mode,
        problem=Language(sampled=sampled, **of_problem),
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.5),
        accumulate=accumulate,
    )
    return {"outer_loss": found.outer_loss[None], **found.grads}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("mode", "steps"), [("unrolled", 1), ("forward", 1), ("difference", 1), ("unrolled", 3), ("forward", 3)]
)
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_mean_over_tokens_in_micro_batches(accumulate: int, mode: str, steps: int, dtype: torch.dtype) -> None:
    teacher, student, labeled, batches = _words(dtype)
    expected = _by_hand(teacher, student, labeled, batches[:steps])
    exact = 1e-10 if dtype == torch.float64 else 1e-4
    tolerance = 1e-2 if mode == "difference" and dtype == torch.float32 else 1e-5 if mode == "difference" else exact
    assert error(_found(mode, accumulate, steps, dtype), expected) < tolerance


@pytest.mark.parametrize("mode", MODES)
def test_a_mean_over_tokens_is_one_in_every_mode(mode: str) -> None:
    whole = _found(mode, 1)
    assert error(_found(mode, 4), whole) < 1e-6
    with pytest.warns(UserWarning, match=r"outer_loss is .* not a mean over examples.*\(sum, weight\)"):
        apart = _found(mode, 2, paired=False)
    assert error(apart, whole) > 1e-2


class Matrix(Language):
    """One matrix for all examples."""

    signal_has_rows = False

    def signal(self, teacher: Any, batch: Any, student_outputs: torch.Tensor, *, generator: Any) -> metapl.Signal:
        return metapl.Signal(teacher.weight)

    def inner_loss(self, outputs: torch.Tensor, signal: metapl.Signal, batch: Any, params: Any = None) -> torch.Tensor:
        return super().inner_loss(outputs, metapl.Signal(signal.value.sum()), batch)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_feedback_on_a_signal_without_rows(accumulate: int) -> None:
    teacher, student, labeled, (x, *_) = _words(torch.float64)
    trainer = metapl.BilevelTrainer(teacher, student, "none", problem=Matrix(), accumulate=accumulate)
    report = trainer.step(labeled, x)
    assert report.feedback.tolist() == 0
    assert trainer.steps_done == 1


@pytest.mark.parametrize("mode", ["forward", "difference", "reinforce", "reinforce_per_example", "loss_difference"])
def test_the_first_micro_batch_may_have_nothing_to_judge(mode: str) -> None:
    teacher, student, (x, labels), (unlabeled, *_) = _words(torch.float64)
    labels[:4] = -100
    sampled = mode in ("reinforce", "reinforce_per_example", "loss_difference")
    for parts in (2, 4):
        trainer = metapl.BilevelTrainer(teacher, student, mode, problem=Language(sampled=sampled), accumulate=parts)
        assert trainer.step((x, labels), unlabeled).feedback.isfinite().all()


@pytest.mark.parametrize("mode", ["forward", "loss_difference"])
def test_what_is_no_mean_is_told_of_on_the_first_step_alone(mode: str) -> None:
    """Also by a network that has learned nothing, all of whose losses are alike, and a row at a time."""
    for parts in (2, 8):
        teacher, student, labeled, (x, *_) = _words(torch.float64)
        nn.init.zeros_(student[2].weight)
        nn.init.zeros_(student[2].bias)
        labels = labeled[1].masked_fill(torch.arange(8)[:, None] % 2 == 0, 0).clamp_min(0)
        labels[1, 1:] = labels[4, 1:] = -100
        problem = Language(paired=False, sampled=mode == "loss_difference")
        trainer = metapl.BilevelTrainer(teacher, student, mode, problem=problem, teacher_losses=(), accumulate=parts)
        with pytest.warns(UserWarning, match="not a mean over examples") as told:
            trainer.step((labeled[0], labels), x)
        assert len(told) == 1
        trainer.step((labeled[0], labels), x)


class Returns(Language):
    """An outer loss that returns this."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.returned = returned

    def outer_loss(self, outputs: torch.Tensor, batch: Any) -> Any:
        return self.returned(outputs.square().sum())


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda s: (s, s), "expected a number, or a tensor without dimensions and without a gradient"),
        (lambda s: (s, torch.ones(8)), r"the weight .* is a tensor of shape \(8,\).*mask\.sum\(\)"),
        (lambda s: (s, "8"), "the weight .* is of type str"),
        (lambda s: (s, 0), "sum to zero or less.*are all of its labels left out"),
        (lambda s: (s, -2.0), "sum to zero or less"),
        (lambda s: (s, float("nan")), "sum to zero or less, or to no number"),
        (lambda s: (s, float("inf")), "sum to zero or less, or to no number"),
        (lambda s: (s, 1, 1), r"a tuple of 3 .*; expected a scalar, or \(sum, weight\)"),
        (lambda s: (s.expand(8), 8), "the sum that the problem's outer_loss returned is a tensor of shape"),
        (lambda s: s.expand(8), r"outer_loss is a tensor of shape \(8,\).*take the mean, or return \(sum, weight\)"),
        (lambda s: 1j * s, "outer_loss is a tensor of shape .*complex.*expected a real tensor"),
    ],
    ids=range(11),
)
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_an_outer_loss_that_returns_something_else_is_refused(mode: str, returned: Any, text: str) -> None:
    teacher, student, labeled, (x, *_) = _words(torch.float32)
    trainer = metapl.BilevelTrainer(teacher, student, mode, problem=Returns(returned), teacher_losses=())
    refused(lambda: trainer.step(labeled, x), text, teacher, student)


def test_a_scalar_beside_a_pair_is_refused() -> None:
    teacher, student, labeled, (x, *_) = _words(torch.float32)
    seen: list[int] = []
    problem = Returns(lambda s: s if seen.append(1) or len(seen) > 3 else (s, 1.0))
    trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=problem, teacher_losses=(), accumulate=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(lambda: trainer.step(labeled, x), r"a scalar on one micro-batch and \(sum, weight\)", teacher, student)


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


def test_a_micro_batch_taken_twice_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault, so that the test above can fail."""
    whole, _ = _alone(1, (CrossEntropy(),))
    real = loss_trainer.micro_batches
    monkeypatch.setattr(loss_trainer, "micro_batches", lambda batch, parts, name: real(batch, parts, name)[:1] * parts)
    wrong, _ = _alone(2, (CrossEntropy(),))
    assert not torch.allclose(whole[0].weight, wrong[0].weight, rtol=1e-3)


def test_a_loss_trainer_takes_multiples_alone_and_nothing_moves() -> None:
    model, _ = _networks()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    trainer = LossTrainer(model, optimizer=optimizer, accumulate=3)
    labeled = (torch.randn(8, 5).double(), torch.arange(8) % 3)
    with pytest.raises(metapl.MetaplError, match=r"labeled batch has 8 examples.*accumulate=3"):
        trainer.step(labeled)
    with pytest.raises(metapl.MetaplError, match=r"unlabeled batch has 8 examples.*accumulate=3"):
        trainer.step((labeled[0][:6], labeled[1][:6]), labeled[0])
    assert all(torch.equal(a, before[k]) for k, a in model.state_dict().items())
    with pytest.raises(metapl.MetaplError, match="accumulate=0"):
        LossTrainer(model, optimizer=optimizer, accumulate=0)
