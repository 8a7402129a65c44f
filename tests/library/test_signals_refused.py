"""Signals and inner losses that would give a wrong gradient without a word are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from trainers import OnceDifferentiable, refused

import metapl
from metapl import MetaplError, Signal
from metapl.ablation import Altered
from metapl.execution.capabilities import FORWARD_AD, ONE_PROCESS
from metapl.feedback import Implicit, ReinforcePerExample
from metapl.feedback.inner_step import CopiedParams

ROWS, CLASSES = 12, 4


class Drawn(metapl.problems.Problem):
    """Labels drawn from the teacher's distribution."""

    def __init__(self, column: bool = False, own: torch.Generator | None = None) -> None:
        self.column, self.own = column, own

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        log_q = teacher(batch).log_softmax(-1)
        drawn = torch.multinomial(log_q.detach().exp(), 1, generator=self.own or generator)
        log_prob = log_q.gather(1, drawn)
        return Signal(drawn[:, 0], log_prob if self.column else log_prob[:, 0], outputs=log_q)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return F.cross_entropy(outputs, signal.value, reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


class Soft(Drawn):
    """The teacher's distribution, or what a function makes of it; the loss drops out."""

    def __init__(self, drop: float = 0.0, made: Any = None) -> None:
        super().__init__()
        self.drop, self.made = drop, made

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        q = teacher(batch).softmax(-1)
        return Signal(q if self.made is None else self.made(q))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        target = signal.value if signal.value.ndim else signal.value * torch.ones_like(outputs)
        return F.cross_entropy(F.dropout(outputs, self.drop), target, reduction="none")


class Continuous(Drawn):
    """A number for each example, drawn around the teacher's."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        mean = teacher(batch)[:, 0]
        drawn = (mean + torch.randn(len(batch), generator=generator)).detach()
        return Signal(drawn, -((drawn - mean) ** 2) / 2)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value.sigmoid() * outputs.logsumexp(-1)


def gradient(mode: Any, problem: Any, dtype: torch.dtype = torch.float32, **options: Any) -> metapl.Hypergradient:
    torch.manual_seed(0)
    teacher, student = nn.Linear(6, CLASSES).to(dtype), nn.Linear(6, CLASSES).to(dtype)
    optimizer = options.pop("optimizer", lambda p: torch.optim.SGD(p, lr=0.1))(student.parameters())
    return metapl.hypergradient(
        teacher,
        student,
        labeled=(torch.randn(8, 6).to(dtype), torch.arange(8) % CLASSES),
        unlabeled=torch.randn(ROWS, 6).to(dtype),
        mode=mode,
        problem=problem,
        inner_optimizer=optimizer,
        **options,
    )


def test_a_log_probability_has_the_rows_of_its_value() -> None:
    with pytest.raises(MetaplError, match=r"log_prob is a tensor of shape \(12, 1\).*one log-probability for each"):
        gradient("reinforce_per_example", Drawn(column=True))


@pytest.mark.parametrize("option", [{"recompute_teacher": True}, {"accumulate": 2}])
def test_labels_from_a_generator_of_the_problems_own(option: dict[str, Any]) -> None:
    with pytest.raises(MetaplError, match=r"has drawn other labels when the teacher's pass .* was repeated"):
        gradient("reinforce_per_example", Drawn(own=torch.Generator().manual_seed(3)), **option)
    given = {"generator": torch.Generator().manual_seed(3)}
    assert gradient("reinforce_per_example", Drawn(), **given, **option).feedback.shape == (ROWS,)


def test_adam_in_float16() -> None:
    with pytest.raises(MetaplError, match=r"student's weight is in float16.*expected weights in float32"):
        gradient("forward", Soft(), torch.float16, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4))
    assert gradient("reinforce", metapl.PseudoLabels(), torch.float16).feedback.ndim == 0


@pytest.mark.parametrize("mode", ["forward", "difference", "implicit"])
def test_an_inner_loss_that_draws(mode: str) -> None:
    with pytest.raises(MetaplError, match=r"inner_loss draws random numbers.*Draw them in signal"):
        gradient(mode, Soft(drop=0.01))
    assert gradient("unrolled", Soft(drop=0.01)).feedback.shape == (ROWS, CLASSES)


def test_a_signal_without_anything_to_differentiate() -> None:
    labels = Soft(made=lambda q: q.argmax(-1))
    for mode in ("forward", "difference", "unrolled", Altered()):
        with pytest.raises(MetaplError, match=r"int64.* without a log_prob, so mode .* has nothing to differentiate"):
            gradient(mode, labels)
    assert gradient("none", labels).outer_loss.isfinite()


def test_a_scalar_signal() -> None:
    scalar = Soft(made=lambda q: q.mean())
    assert gradient("forward", scalar).feedback.ndim == 0
    with pytest.raises(MetaplError, match=r"signal is a scalar.*expected accumulate=1"):
        gradient("forward", scalar, accumulate=2)
    with pytest.raises(MetaplError, match="feedback on a scalar signal; expected a signal with rows"):
        gradient(Altered(), scalar)


def test_class_means_of_numbers_are_means() -> None:
    own = gradient(ReinforcePerExample(), Continuous(), generator=torch.Generator().manual_seed(1)).feedback
    controls = gradient(
        Altered(ReinforcePerExample(), "class_means"), Continuous(), generator=torch.Generator().manual_seed(1)
    ).feedback
    assert own.std() > 0
    torch.testing.assert_close(controls, own.mean().expand_as(own))


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "2"])
def test_counts_are_whole_numbers(value: Any) -> None:
    networks = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(MetaplError, match=r"accumulate=.*: expected a number of micro-batches, 1 or more"):
        metapl.BilevelTrainer(*networks, accumulate=value)
    with pytest.raises(MetaplError, match=r"lookahead=.*: expected a number of student steps, 1 or more"):
        metapl.BilevelTrainer(*networks, mode="forward", lookahead=value)
    with pytest.raises(MetaplError, match=r"accumulate=.*: expected a number of micro-batches, 1 or more"):
        gradient("forward", Soft(), accumulate=value)


def test_an_altered_mode_runs_where_its_base_does() -> None:
    altered = Altered(Implicit(solver="identity"))
    assert altered.requires == {ONE_PROCESS, FORWARD_AD}
    by_difference = Altered(ReinforcePerExample(tangent="difference"))
    assert not by_difference.requires


# ------------------------------------------------------------------------- ways to the teacher other than the signal


class Bypassing(Soft):
    """A parameter is read in one place, by its name."""

    def __init__(self, where: str, parameter: Tensor, sampled: bool = False) -> None:
        super().__init__()
        self.where, self.parameter, self.sampled = where, parameter, sampled

    def read(self, where: str) -> Any:
        return self.parameter.sum() if where == self.where else 0.0

    def signal(self, *args: Any, **options: Any) -> Signal:
        return (Drawn.signal if self.sampled else Soft.signal)(self, *args, **options)

    def student_input(self, batch: Any) -> Any:
        return batch + self.read("student_input")

    def outer_input(self, batch: Any) -> Any:
        return batch[0] + self.read("outer_input")

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return F.cross_entropy(outputs, signal.value, reduction="none") + self.read("inner_loss")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1]) + self.read("outer_loss")


BYPASSES = {
    "student_input": r"student_input returned an input that depends on .*student_input\(batch, signal\)",
    "outer_input": r"outer_input returned an input that depends on .*x\.detach\(\)",
    "inner_loss": r"the problem's inner_loss reads a tensor of shape .*a field of the signal or.*teacher_losses",
    "outer_loss": r"the problem's outer_loss reads a tensor of shape .*a field of the signal or.*teacher_losses",
}
ANY_MODE = [mode for mode in metapl.MODES if mode != "none"]


def step(mode: Any, problem: Any, student: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    teacher = problem.teacher if hasattr(problem, "teacher") else nn.Linear(6, CLASSES)
    student = nn.Linear(6, CLASSES) if student is None else student
    before = [p.clone() for p in (*teacher.parameters(), *student.parameters())]
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        problem=problem,
        teacher_losses=options.pop("teacher_losses", ()),
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.1),
        **options,
    )
    unlabeled = torch.randn(ROWS, 6)
    try:
        for _ in range(2):
            trainer.step((torch.randn(8, 6), torch.arange(8) % CLASSES), unlabeled)
    except MetaplError:
        assert all(map(torch.equal, before, (*teacher.parameters(), *student.parameters())))
        raise
    return trainer


@pytest.mark.parametrize("where", BYPASSES)
@pytest.mark.parametrize("mode", ANY_MODE)
def test_a_parameter_that_goes_past_the_signal(mode: str, where: str) -> None:
    """Of the teacher or of the problem's own."""
    sampled = mode in ("reinforce", "reinforce_per_example", "loss_difference")
    for parameter in (nn.Parameter(torch.ones(3)), nn.Linear(6, CLASSES).weight):
        with pytest.raises(MetaplError, match=BYPASSES[where]):
            step(mode, Bypassing(where, parameter, sampled))
    step(mode, Bypassing(where, torch.ones(3), sampled))  # a constant


class Borrowing(nn.Module):
    """A student on features of another network, which it holds outside of its modules."""

    def __init__(self, features: nn.Module, cut: bool) -> None:
        super().__init__()
        self.features, self.cut, self.head = [features], cut, nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features[0](x)
        return self.head(features.detach() if self.cut else features)


@pytest.mark.parametrize("mode", ANY_MODE)
def test_a_student_that_reads_the_teachers_features(mode: str) -> None:
    sampled = mode in ("reinforce", "reinforce_per_example", "loss_difference")
    problem = Bypassing("nowhere", torch.ones(3), sampled)
    with pytest.raises(MetaplError, match=r"the student's forward reads a tensor of shape \(6, 6\)|\(6,\)"):
        step(mode, problem, Borrowing(nn.Linear(6, 6), cut=False))
    step(mode, problem, Borrowing(nn.Linear(6, 6), cut=True))


@pytest.mark.parametrize("which", [0, 1])
def test_a_batch_with_a_graph(which: int) -> None:
    batches = [torch.randn(8, 6), torch.randn(ROWS, 6)]
    batches[which].requires_grad_()
    networks = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)
    with pytest.raises(MetaplError, match=r"batch requires a gradient .*x\.detach\(\).*student_input\(batch, signal\)"):
        metapl.BilevelTrainer(*networks).step((batches[0], torch.arange(8) % CLASSES), batches[1])


# --------------------------------------------------------------------------------- an inner loss without its signal


class Unread(Drawn):
    """The teacher's distribution, or labels drawn from it, read by the loss through a function."""

    def __init__(self, read: Any, sampled: bool) -> None:
        super().__init__()
        self.read, self.sampled = read, sampled

    def signal(self, *args: Any, **options: Any) -> Signal:
        return (Drawn() if self.sampled else Soft()).signal(*args, **options)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return self.read(outputs, signal.value)


SOFT_UNREAD = {
    "not at all": lambda z, q: z.logsumexp(-1),
    "detached": lambda z, q: F.cross_entropy(z, q.detach(), reduction="none"),
    "argmax": lambda z, q: F.cross_entropy(z, q.argmax(-1), reduction="none"),
    "beside the outputs": lambda z, q: z.logsumexp(-1) + q.square().sum(-1),
}


@pytest.mark.parametrize("how", SOFT_UNREAD)
@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference", "implicit"])
def test_a_soft_signal_that_is_not_read(mode: str, how: str) -> None:
    with pytest.raises(MetaplError, match="does not depend on its signal"):
        step(mode, Unread(SOFT_UNREAD[how], sampled=False))
    step("none", Unread(SOFT_UNREAD[how], sampled=False))


@pytest.mark.parametrize("mode", ["reinforce", "reinforce_per_example", "loss_difference"])
def test_sampled_labels_that_are_not_read(mode: str) -> None:
    with pytest.raises(MetaplError, match="does not depend on its signal"):
        step(mode, Unread(lambda z, drawn: z.logsumexp(-1), sampled=True))
    step("none", Unread(lambda z, drawn: z.logsumexp(-1), sampled=True))
    step(mode, Unread(lambda z, drawn: F.cross_entropy(z, drawn, reduction="none"), sampled=True))


# -------------------------------------------------------------------------------------------------- edited in place


class Editing(Soft):
    """One function writes to one thing that it is given."""

    def __init__(self, where: str, what: str, sampled: bool = False) -> None:
        super().__init__()
        self.where, self.what, self.sampled = where, what, sampled

    def edit(self, where: str, **given: Any) -> None:
        if where == self.where:
            with torch.no_grad():
                given[self.what].mul_(1.5)

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        self.edit("signal", student_outputs=student_outputs, batch=batch)
        make = Drawn.signal if self.sampled else Soft.signal
        return make(self, teacher, batch, student_outputs, generator=generator)

    def student_input(self, batch: Any) -> Any:
        self.edit("student_input", batch=batch)
        return batch

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        value = signal.probs if self.sampled and signal.probs is not None else signal.value
        self.edit("inner_loss", outputs=outputs, signal=value, batch=batch, params=params["weight"])
        return F.cross_entropy(outputs, signal.value, reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        self.edit("outer_loss", outputs=outputs, batch=batch[0])
        return F.cross_entropy(outputs, batch[1])

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:
        self.edit("check", outputs=outputs, labeled=labeled[0], unlabeled=unlabeled)


EDITS = [
    ("signal", "student_outputs", r"the problem's signal\(\) changed student_outputs in place"),
    ("signal", "batch", "the teacher changed its input in place"),
    ("student_input", "batch", "student_input changed batch in place"),
    ("inner_loss", "outputs", "inner_loss changed outputs in place"),
    ("inner_loss", "batch", "inner_loss changed batch in place"),
    ("outer_loss", "outputs", "outer_loss changed outputs in place"),
    ("outer_loss", "batch", "outer_loss changed batch in place"),
    ("check", "outputs", "check changed outputs in place"),
]


@pytest.mark.parametrize(("where", "what", "text"), EDITS)
@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference", "reinforce", "loss_difference"])
def test_what_a_problem_is_given_stays_as_it_is(mode: str, where: str, what: str, text: str) -> None:
    with pytest.raises(MetaplError, match=text):
        step(mode, Editing(where, what, sampled=mode in ("reinforce", "loss_difference")))


@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference", "reinforce", "loss_difference", "none"])
def test_a_loss_that_writes_to_the_weights(mode: str) -> None:
    """And that are refused before one of them has moved."""
    student = nn.Linear(6, CLASSES)
    before = {name: p.clone() for name, p in student.named_parameters()}
    with pytest.raises(MetaplError, match="inner_loss changed params in place"):
        step(mode, Editing("inner_loss", "params", sampled=mode in ("reinforce", "loss_difference")), student)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


def test_of_weights_that_a_loss_asks_for_one_by_one_no_others_are_copied() -> None:
    params = CopiedParams({"weight": torch.ones(2), "bias": torch.ones(1)})
    assert params.get("none") is None
    assert torch.equal(params.get("bias"), torch.ones(1))
    assert [*params.copies] == ["bias"]


@pytest.mark.parametrize("read", ["items", "values", "get", "dict", "merged", "copy", "called"])
def test_a_loss_may_read_the_weights_in_any_way(read: str) -> None:
    """The feedback by forward mode is that by double backward."""

    class Penalised(Soft):
        def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
            losses = super().inner_loss(outputs, signal, batch)
            if read == "called":
                return losses + functional_call(self.student, params, (batch,)).square().mean(1) * signal.value[:, 0]
            tensors = {
                "items": lambda: [p for _, p in params.items()],
                "values": lambda: params.values(),
                "get": lambda: [params.get("weight"), params.get("none", torch.zeros(()))],
                "dict": lambda: dict(params).values(),
                "merged": lambda: {**params}.values(),
                "copy": lambda: params.copy().values(),
            }[read]()
            return losses + signal.value[:, 0] * torch.stack([p.square().sum() for p in tensors]).sum()

        student = nn.Linear(6, CLASSES, dtype=torch.float64)

    exact, found = (gradient(mode, Penalised(), torch.float64).grads for mode in ("unrolled", "forward"))
    assert error(found, exact) < 1e-10
    assert error(found, gradient("forward", Soft(), torch.float64).grads) > 1e-3


@pytest.mark.parametrize("by", ["step", "hypergradient"])
def test_an_outer_batch_that_is_written_to(by: str) -> None:
    class Scaled(Soft):
        def outer_batch(self, batch: Any) -> Any:
            batch[0].mul_(2)
            return batch

    with pytest.raises(MetaplError, match=r"Scaled\.outer_batch changed batch in place"):
        (step if by == "step" else gradient)("forward", Scaled())


@pytest.mark.parametrize("mode", ["unrolled", "forward", "reinforce", "none"])
def test_a_loss_that_assigns_to_its_signal(mode: str) -> None:
    class Assigning(Drawn if mode == "reinforce" else Soft):  # type: ignore[misc]
        def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
            signal.value = signal.value * 2  # type: ignore[misc]
            return super().inner_loss(outputs, signal, batch)

    with pytest.raises(MetaplError, match=r"inner_loss assigns to a field.*'value'.*dataclasses\.replace\(signal"):
        step(mode, Assigning())


# ------------------------------------------------------------------------------------------- what changes in training


class Kept(Soft):
    """The outer loss reads the outputs that the inner loss kept, from a step on."""

    def __init__(self, sampled: bool) -> None:
        super().__init__()
        self.sampled, self.late = sampled, False

    def signal(self, *given: Any, **named: Any) -> Signal:
        return (Drawn if self.sampled else Soft).signal(self, *given, **named)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        self.outputs = outputs
        return F.cross_entropy(outputs, signal.value, reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        loss = super().outer_loss(outputs, batch)
        return loss + self.outputs.square().mean() if self.late else loss


class Ramped(Drawn):
    """A consistency term that begins late, in probabilities that the feedback does not cover."""

    late = False

    def signal(self, *given: Any, **named: Any) -> Signal:
        signal = super().signal(*given, **named)
        return Signal(signal.value, signal.log_prob, probs=signal.outputs.exp())

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        losses = super().inner_loss(outputs, signal, batch)
        return losses + (outputs.softmax(-1) - signal.probs).square().sum(-1) if self.late else losses


class Dropped(Soft):
    """The signal is read until a step."""

    late = False

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        target = signal.value.argmax(-1) if self.late else signal.value
        return F.cross_entropy(outputs, target, reduction="none")


class Late(nn.Linear):
    """A student that begins to read another network, or to have no second derivative."""

    late = False

    def __init__(self, begins: Any) -> None:
        super().__init__(6, CLASSES)
        self.begins = [begins]

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs + self.begins[0](x, outputs) if self.late else outputs


LATE = [
    *(("reads", mode, "the student's forward reads") for mode in ("unrolled", "forward", "difference", "reinforce")),
    ("once", "unrolled", "@once_differentiable"),
    *(("ramped", mode, r"derivative in signal\.probs") for mode in ("reinforce", "loss_difference")),
    ("dropped", "forward", "does not depend on its signal"),
    *(("kept", mode, "outer_loss reads") for mode in ("unrolled", "forward", "difference", "reinforce")),
]


@pytest.mark.parametrize(("what", "mode", "text"), LATE)
def test_what_begins_after_the_first_step_is_refused_too(what: str, mode: str, text: str) -> None:
    sampled = mode in ("reinforce", "loss_difference")
    teacher = nn.Linear(6, CLASSES)
    once = OnceDifferentiable(CLASSES, CLASSES).requires_grad_(requires_grad=False)
    student = Late((lambda x, z: once(z)) if what == "once" else (lambda x, z: teacher(x)))
    problem = {"ramped": Ramped, "dropped": Dropped, "kept": lambda: Kept(sampled)}.get(
        what, Drawn if sampled else Soft
    )()
    trainer = metapl.BilevelTrainer(teacher, student, mode, problem=problem, teacher_losses=())
    batches = (torch.randn(8, 6), torch.arange(8) % CLASSES), torch.randn(ROWS, 6)
    trainer.step(*batches)
    changing: Any = student if what in ("reads", "once") else problem
    changing.late = True
    refused(lambda: trainer.step(*batches), text, teacher, student)


@pytest.mark.parametrize("mode", ["unrolled", "forward"])
def test_outputs_that_an_inner_loss_keeps_for_the_outer_one(mode: str) -> None:
    problem = Kept(sampled=False)
    problem.late = True
    batches = metapl.Lookahead([torch.randn(ROWS, 6) for _ in range(3)])
    student = nn.Linear(6, CLASSES)
    with pytest.raises(MetaplError, match="outer_loss reads"):
        metapl.hypergradient(
            nn.Linear(6, CLASSES),
            student,
            labeled=(torch.randn(8, 6), torch.arange(8) % CLASSES),
            unlabeled=batches,
            mode=mode,
            problem=problem,
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        )


@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference"])
@pytest.mark.parametrize("graph", [False, True])
def test_a_loss_that_edits_its_signal(mode: str, graph: bool) -> None:
    """Under autograd too, which has words of its own for a leaf."""

    class Edited(Soft):
        def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
            with torch.set_grad_enabled(graph):
                signal.value.mul_(1.5)
            return super().inner_loss(outputs, signal, batch, params)

    with pytest.raises(MetaplError, match=r"inner_loss changed .*signal.* in place"):
        step(mode, Edited())


class EditingLoss:
    name = "edits"

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, teacher: nn.Module, *, labeled: Any, unlabeled: Any, signal: Signal, step: int) -> Tensor:
        with torch.no_grad():
            {"labeled": labeled[0], "unlabeled": unlabeled, "signal": signal.value}[self.what].mul_(1.5)
        return teacher(labeled[0]).square().mean()


@pytest.mark.parametrize("what", ["labeled", "unlabeled", "signal"])
def test_what_a_teacher_loss_is_given_stays_as_it_is(what: str) -> None:
    with pytest.raises(MetaplError, match=f"the teacher loss 'edits' changed {what} in place"):
        step("forward", Soft(), teacher_losses=(EditingLoss(what),))
