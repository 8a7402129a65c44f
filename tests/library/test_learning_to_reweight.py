"""Learning to reweight: the feedback against plain double backward, and the steps against the paper's algorithm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from problems_zoo import CLASSES, OPTIMISERS, everything, same, toy, warm
from reference import error
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError
from metapl.execution.local import Pass
from metapl.feedback import Altered, Implicit
from metapl.feedback.path import Path as StudentPath
from metapl.problems import LearningToReweight, Table

X = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
Y = torch.tensor([0, 2, 1, 1, 0, 2])
PAPER = Implicit(solver="identity")
"""The paper's look-ahead, by plain SGD whatever the optimizer."""

UPDATES = ["torch_sgd", "torch_sgd_nesterov", "torch_adam", "torchopt_clip_momentum"]
Rule = reference.Rule


def plain(z: Tensor) -> Tensor:
    return -z.log_softmax(-1)[torch.arange(len(z)), Y[: len(z)]]


def by_hand(student: nn.Module, labeled: Any, look: Rule, look_state: Any) -> tuple[Tensor, Tensor]:
    """h = −dL(θ̂)/dε by double backward through the look-ahead, and w: the paper's Algorithm 1, lines 4-10."""
    theta = reference.weights(student)
    epsilon = torch.zeros(len(X), dtype=X.dtype, requires_grad=True)
    inner = (epsilon * plain(reference.at(student, theta, X))).mean()
    after_inner = torch.get_rng_state()
    g = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
    moved, _ = look(theta, dict(zip(theta, g, strict=True)), look_state)
    torch.set_rng_state(reference.own_stream(after_inner))
    outer = F.cross_entropy(reference.at(student, moved, labeled[0]), labeled[1])
    torch.set_rng_state(after_inner)
    h = -torch.autograd.grad(outer, epsilon)[0]
    weights = h.clamp_min(0)
    return h, weights / (weights.sum() if weights.sum() > 0 else 1)


def real_step(student: nn.Module, w: Tensor, rule: Rule, state: Any) -> tuple[Any, Any, Tensor]:
    """θ′, s′ and Σ w_i CE_i: lines 11 and 12."""
    theta = reference.weights(student)
    loss = (w * plain(reference.at(student, theta, X))).sum()
    g = torch.autograd.grad(loss, list(theta.values()))
    moved, state = rule(theta, dict(zip(theta, g, strict=True)), state)
    return {name: t.detach() for name, t in moved.items()}, state, loss.detach()


@pytest.mark.parametrize("optimiser", UPDATES)
@pytest.mark.parametrize("student", ["mlp", "batch_norm", "dropout"])
@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference", "paper"])
def test_feedback_and_real_step_are_those_of_the_formulas(mode: str, student: str, optimiser: str) -> None:
    case, own = toy(student), OPTIMISERS[optimiser]
    inner, inner_state, state = warm(case, own)
    case.draw_from_start()
    start = torch.get_rng_state()
    # A clip does nothing at a gradient of 0, where the reference's norm has no derivative.
    rule = reference.sgd(lr=0.3, momentum=0.9) if "clip" in optimiser else own.rule
    look = (reference.sgd(lr=1.0), None) if mode == "paper" else (rule, state)
    h, w = by_hand(case.student, case.labeled, *look)
    assert 0 < (w > 0).sum() < len(w)
    torch.set_rng_state(start)
    moved, _, loss = real_step(case.student, w, own.rule, state)
    torch.set_rng_state(start)
    found = metapl.hypergradient(
        None,
        case.student,
        labeled=case.labeled,
        unlabeled=(X, Y),
        mode=PAPER if mode == "paper" else mode,
        problem=LearningToReweight(),
        inner_optimizer=inner,
        inner_state=inner_state,
    )
    near = 1e-4 if mode == "difference" else 1e-8
    assert found.grads == {}
    assert error(found.feedback, h) < near
    assert error(found.student_params, moved) < near
    assert abs(found.inner_loss - loss) < near


def test_the_outer_loss_is_that_of_the_real_step() -> None:
    case = toy("mlp")
    found = metapl.hypergradient(
        None,
        case.student,
        labeled=case.labeled,
        unlabeled=(X, Y),
        problem=LearningToReweight(),
        inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=0.3),
    )
    x, y = case.labeled
    after = F.cross_entropy(reference.at(case.student, found.student_params, x), y)
    before = F.cross_entropy(reference.at(case.student, reference.weights(case.student), x), y)
    assert abs(found.outer_loss - after) < 1e-12
    assert after < before


def fresh(optimizer: str, student: nn.Module) -> tuple[torch.optim.Optimizer, Rule]:
    if optimizer == "adam":
        options: dict[str, Any] = {"lr": 0.05, "eps": 1e-2}
        return torch.optim.Adam(student.parameters(), **options), reference.adam(**options)
    options = {"lr": 0.3}
    if optimizer == "nesterov":
        options |= {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    return torch.optim.SGD(student.parameters(), **options), reference.sgd(**options)


@pytest.mark.parametrize(
    ("optimizer", "mode", "parts"),
    [
        ("sgd", "forward", 1),
        ("sgd", "forward", 2),
        ("sgd", "unrolled", 1),
        ("nesterov", PAPER, 1),
        ("nesterov", PAPER, 2),
        ("adam", PAPER, 1),
        ("nesterov", "forward", 1),
    ],
)
def test_ten_steps_are_those_of_the_papers_algorithm(optimizer: str, mode: Any, parts: int) -> None:
    """By SGD, and by others with the paper's look-ahead; the last row looks ahead by its own optimizer instead."""
    case = toy("mlp")
    trusted = X + 0.5 * X.flip(1, 2), torch.where(torch.arange(6) < 2, (Y + 1) % CLASSES, Y)
    mirror = copy.deepcopy(case.student)
    inner, rule = fresh(optimizer, case.student)
    trainer = metapl.BilevelTrainer(
        None, case.student, mode, problem=LearningToReweight(), inner_optimizer=inner, accumulate=parts
    )
    state, used = None, []
    for _ in range(10):
        look = (reference.sgd(lr=1.0), None) if mode == PAPER else (rule, state)
        h, w = by_hand(mirror, trusted, *look)
        moved, state, loss = real_step(mirror, w, rule, state)
        mirror.load_state_dict(moved)
        report = trainer.step(trusted, (X, Y))
        assert error(report.feedback, h) < 1e-8
        assert torch.allclose(report.signal.value, len(X) * w, 0, 1e-8)
        assert abs(report.inner_loss - loss) < 1e-8
        assert error(dict(case.student.named_parameters()), moved) < 1e-8
        used.append(int((w > 0).sum()))
    assert sum(0 < n < len(X) for n in used) >= 5


def test_statistics_move_once_a_step() -> None:
    case = toy("batch_norm")
    expected = copy.deepcopy(case.student)
    expected(X)
    trainer = metapl.BilevelTrainer(None, case.student, "forward", problem=LearningToReweight())
    trainer.step(case.labeled, (X, Y))
    assert all(torch.equal(a, b) for a, b in zip(expected.buffers(), case.student.buffers(), strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_where_no_example_helps_the_gradient_is_zero(momentum: float) -> None:
    """Trusted: the same example with the other label. What the momentum has of earlier steps goes on."""
    student = nn.Linear(3, 2)
    sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=momentum)
    F.cross_entropy(student(torch.ones(1, 3)), torch.tensor([1])).backward()
    sgd.step()
    sgd.zero_grad()
    mirror = copy.deepcopy(student)
    other = torch.optim.SGD(mirror.parameters(), lr=0.1, momentum=momentum)
    other.load_state_dict(copy.deepcopy(sgd.state_dict()))
    for p in mirror.parameters():
        p.grad = torch.zeros_like(p)
    trainer = metapl.BilevelTrainer(None, student, "forward", problem=LearningToReweight(), inner_optimizer=sgd)
    x = torch.ones(1, 3)
    before = [p.detach().clone() for p in student.parameters()]
    report = trainer.step((x, torch.tensor([1])), (x, torch.tensor([0])))
    other.step()
    assert report.feedback < 0
    assert report.signal.value == 0
    moved = [p.detach() for p in student.parameters()]
    assert all(torch.allclose(a, b, 0, 1e-7) for a, b in zip(moved, mirror.parameters(), strict=True))
    assert momentum or same(moved, before)


def two_clusters() -> tuple[Any, Any, Tensor]:
    """A trusted batch, one of which 18 of 60 labels are wrong, and which these are."""
    draw, y = torch.Generator().manual_seed(0), torch.arange(60) % 2
    centers = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    x = centers[y] + torch.randn(60, 2, generator=draw)
    wrong = torch.arange(60) < 18
    trusted = centers.repeat(5, 1) + torch.randn(10, 2, generator=draw), torch.arange(10) % 2
    return trusted, (x, torch.where(wrong, 1 - y, y)), wrong


def test_wrong_labels_get_less_weight_and_with_random_signs_they_do_not() -> None:
    shares = {}
    for name, mode in {"own": "forward", "random": Altered(alteration="random_sign")}.items():
        trusted, batch, wrong = two_clusters()
        torch.manual_seed(0)
        trainer = metapl.BilevelTrainer(None, nn.Linear(2, 2), mode, problem=LearningToReweight())
        reports = [trainer.step(trusted, batch) for _ in range(20)]
        shares[name] = torch.stack([report.signal.value for report in reports]).mean(0)[wrong].sum() / len(wrong) / 3.3
    assert shares["own"] < 0.05 < shares["random"]


@pytest.mark.parametrize("options", [{}, {"precision": "bfloat16"}, {"clip_norm": 0.05}], ids=str)
def test_it_fits_with_validation_and_goes_on_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    def fit(steps: int, **how: Any) -> list[Tensor]:
        case = toy("batch_norm", dtype=torch.float32)
        trainer = metapl.BilevelTrainer(None, case.student, "forward", problem=LearningToReweight(), **options)
        found = trainer.fit(
            [case.labeled] * 2,
            [(X.float(), Y)] * 3,
            steps=6,
            validation=case.labeled,
            validate_every=2,
            save_every=1,
            ema_decay=0.9,
            select=False,
            progress=False,
            callbacks=[] if steps == 6 else [stop_after(steps)],
            **how,
        )
        assert found.teacher_weights is None
        assert {"inner_loss", "feedback_mean", "student_validation_accuracy", "student_lr"} <= found.history[-1].keys()
        return list(found.weights.values())

    whole = fit(6)
    with pytest.raises(KeyboardInterrupt):
        fit(3, out=tmp_path / "run")
    assert same(whole, fit(6, out=tmp_path / "run", resume=True))


def stop_after(steps: int) -> Callable[..., None]:
    def stop(step: int, row: Any, trainer: Any) -> None:
        if step >= steps:
            raise KeyboardInterrupt

    return stop


def test_a_saved_trainer_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def built(teacher: nn.Module | None = None) -> metapl.BilevelTrainer:
        problem = LearningToReweight() if teacher is None else metapl.problems.ExampleWeights()
        return metapl.BilevelTrainer(teacher, toy("mlp", seed=3).student, "forward", problem=problem)

    case, one, other = toy("mlp"), built(), built()
    one.step(case.labeled, (X, Y))
    one.save(tmp_path / "trainer.pt")
    other.load(tmp_path / "trainer.pt")
    for trainer in (one, other):
        trainer.step(case.labeled, (X, Y))
    assert same(list(one.student.parameters()), list(other.student.parameters()))
    with pytest.raises(MetaplError, match="its teacher is of type NoneType, and the trainer's is a dict"):
        built(Table(torch.zeros(6)).double()).load(tmp_path / "trainer.pt")


def test_ablate_compares_the_gradient_in_the_weights() -> None:
    case = toy("mlp")
    trainer = metapl.BilevelTrainer(None, case.student, "forward", problem=LearningToReweight())
    found = metapl.ablate(trainer, case.labeled, (X, Y), ["forward", "difference", "none", "reinforce"], rounds=1)
    assert found.modes["forward"].relative_error < 1e-8
    assert found.modes["difference"].cosine > 0.999
    assert all("feedback on each example" in found.modes[name] for name in ("none", "reinforce"))


def test_a_transform_and_a_fit_without_rates() -> None:
    case = toy("mlp")
    own = OPTIMISERS["torchopt_sgd_nesterov"].build(case.student)
    trainer = metapl.BilevelTrainer(None, case.student, "forward", problem=LearningToReweight(), inner_optimizer=own)
    assert "student_lr" not in trainer.fit([case.labeled], [(X, Y)], steps=2, progress=False).history[-1]


class Own:
    """A problem of a user, without the base class: the student's real step takes the examples that help, unweighted."""

    has_teacher = False

    def signal(self, teacher: Any, batch: Any, student_outputs: Tensor, *, generator: Any) -> metapl.Signal:
        return metapl.Signal(torch.ones_like(student_outputs[:, 0]))

    def revised_signal(self, signal: metapl.Signal, h: Tensor) -> metapl.Signal | None:
        return None if (h > 0).all() else metapl.Signal((h > 0).to(h))

    def inner_loss(self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value * F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


def test_a_problem_of_ones_own_may_revise_its_signal() -> None:
    trusted, batch, wrong = two_clusters()
    torch.manual_seed(0)
    trainer = metapl.BilevelTrainer(None, nn.Linear(2, 2), "forward", problem=Own())
    chosen = [trainer.step(trusted, batch).signal.value for _ in range(10)][-1]
    assert set(chosen.tolist()) == {0.0, 1.0}
    assert chosen[wrong].mean() < 0.2 < 0.8 < chosen[~wrong].mean()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a teacher": ({"teacher": Table(torch.zeros(6))}, r"LearningToReweight has none; expected teacher=None"),
    "no teacher": ({"problem": metapl.PseudoLabels()}, "PseudoLabels takes its signal from a teacher"),
    "a teacher's optimizer": ({"outer_optimizer": torch.optim.SGD([torch.zeros(1)], lr=1.0)}, "^outer_optimizer was"),
    "a teacher's losses": ({"teacher_losses": (metapl.CrossEntropy(),)}, "^teacher_losses was"),
    "a weight": ({"feedback_weight": 2.0}, "^feedback_weight was"),
    "a ratio": ({"feedback_ratio": 2.0}, "^feedback_ratio was"),
    "recomputation": ({"recompute_teacher": True}, "^recompute_teacher was"),
    "several steps": ({"lookahead": 2}, "one step, but 2 were given"),
    "no feedback": ({"mode": "none"}, "use 'forward', 'difference', 'unrolled' or"),
    "one scalar": ({"mode": "reinforce"}, "use 'forward', 'difference', 'unrolled' or"),
    "nothing to compile": ({"mode": "unrolled", "compile": True}, "nothing would be compiled"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_use_is_refused_by_name(kind: str) -> None:
    given, text = REFUSED[kind]
    options = {"teacher": None, "mode": "forward", "problem": LearningToReweight(), **given}
    with pytest.raises(MetaplError, match=text):
        metapl.BilevelTrainer(options.pop("teacher"), nn.Linear(2, 2), options.pop("mode"), **options)


def hooked(student: nn.Module) -> None:
    next(student.parameters()).register_hook(lambda g: g)


MOVES_NOTHING: dict[str, tuple[Any, Callable[[nn.Module], None] | None, Any, str]] = {
    "a look-ahead": ("forward", None, metapl.Lookahead([(X, Y)] * 2), "one step, but 2 were given"),
    "no labels": ("forward", None, X, r"expected \(inputs, labels\)"),
    "a label too large": ("forward", None, (X, Y + CLASSES), "labels run from"),
    "a hook": ("forward", hooked, (X, Y), "register_hook, which is not called where other tensors stand in"),
    "an optimum": (Implicit(solver="cg"), None, (X, Y), "no positive curvature"),
}


@pytest.mark.parametrize("kind", MOVES_NOTHING)
def test_what_is_refused_in_a_step_moves_nothing(kind: str) -> None:
    mode, prepare, unlabeled, text = MOVES_NOTHING[kind]
    case = toy("batch_norm")
    if prepare is not None:
        prepare(case.student)
    trainer = metapl.BilevelTrainer(None, case.student, mode, problem=LearningToReweight())
    before = everything(case)
    with pytest.raises(MetaplError, match=text):
        trainer.step(case.labeled, unlabeled)
    assert same(before, everything(case))


def test_a_wait_for_a_teacher_is_refused() -> None:
    trainer = metapl.BilevelTrainer(None, nn.Linear(2, 2), "forward", problem=LearningToReweight())
    trusted, batch, _ = two_clusters()
    with pytest.raises(MetaplError, match="has no teacher that could train"):
        trainer.fit([trusted], [batch], steps=4, wait=2, progress=False)
    with pytest.raises(MetaplError, match="has no teacher that could learn"):
        trainer.teacher_step(trusted, batch)


# ------------------------------------------------------------------------------------------------------- planted faults


def not_taken_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StudentPath, "revised", lambda self, h: self)


def harmful_examples_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LearningToReweight, "revised_signal", lambda self, signal, h: metapl.Signal(len(h) * h / h.sum()))


def of_the_mean(patch: pytest.MonkeyPatch) -> None:
    """Weights that sum to 1 under metapl's mean: a step shorter by B."""
    real = LearningToReweight.revised_signal
    patch.setattr(
        LearningToReweight, "revised_signal", lambda self, s, h: metapl.Signal(real(self, s, h).value / len(h))
    )


def statistics_moved_again(patch: pytest.MonkeyPatch) -> None:
    real = Pass.gradient_again

    def again(self: Pass, *args: Any) -> Any:
        self.student.module(self.inputs)
        return real(self, *args)

    patch.setattr(Pass, "gradient_again", again)


def formulas() -> None:
    test_feedback_and_real_step_are_those_of_the_formulas("forward", "mlp", "torch_sgd")


Plant = Callable[[pytest.MonkeyPatch], None]
CAUGHT: dict[Plant, Callable[[], None]] = {
    not_taken_again: formulas,
    harmful_examples_counted: formulas,
    of_the_mean: formulas,
    statistics_moved_again: test_statistics_move_once_a_step,
}


@pytest.mark.parametrize("fault", CAUGHT, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    CAUGHT[fault]()
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        CAUGHT[fault]()


def test_a_cosine_of_no_gradient_is_refused() -> None:
    """At weights of zero the student's gradient is zero."""
    mode = metapl.feedback.Forward(normalization="cosine")
    with pytest.raises(MetaplError, match="divides by the student's gradient, which is zero"):
        metapl.BilevelTrainer(None, torch.nn.Linear(4, 3), mode, problem=LearningToReweight())
