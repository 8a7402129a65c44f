"""What someone who writes a first problem gets wrong: each is refused by name, and nothing has moved."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3
MODES = [mode for mode in metapl.MODES if mode != "none"]
SAMPLED = ("reinforce", "reinforce_per_example", "loss_difference")
BY_GRADIENT = [mode for mode in MODES if mode != "loss_difference"]
"""Modes that take the gradient of the outer loss."""


class Own(metapl.problems.Problem):
    """Labels by the teacher, sampled or soft; its parts are replaced by wrong ones."""

    def __init__(self, sampled: bool) -> None:
        self.sampled = sampled

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Any:
        log_q = teacher(batch).log_softmax(-1)
        if not self.sampled:
            return metapl.Signal(log_q.exp())
        value = log_q.detach().argmax(-1)
        return metapl.Signal(value, log_prob=log_q.gather(1, value[:, None])[:, 0])

    def inner_loss(self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None) -> Tensor:
        return F.cross_entropy(outputs, signal.value, reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


class TensorSignal(Own):
    def signal(self, *args: Any, **named: Any) -> Any:
        return super().signal(*args, **named).value


class NoSignal(Own):
    def signal(self, *args: Any, **named: Any) -> Any:
        return None


class ListSignal(Own):
    def signal(self, *args: Any, **named: Any) -> Any:
        return metapl.Signal([0, 1])  # type: ignore[arg-type]


class ConstantOuter(Own):
    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return torch.tensor(1.0)


class DetachedOuter(Own):
    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().outer_loss(outputs.detach(), batch)


ELSEWHERE = nn.Parameter(torch.ones(3))


class OuterOfOthers(Own):
    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return ELSEWHERE.sum()


class InnerOfOthers(Own):
    def inner_loss(self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None) -> Tensor:
        return (
            (ELSEWHERE.sum() * signal.value.double()).flatten(1).sum(1)
            if signal.value.ndim > 1
            else (ELSEWHERE.sum() * signal.value.double())
        )


class NoInnerLoss(Own):
    def inner_loss(self, *args: Any, **named: Any) -> Any:
        return None


class SampledWithoutProbs(Own):
    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Any:
        signal = super().signal(teacher, batch, student_outputs, generator=generator)
        return metapl.Signal(signal.value, log_prob=signal.log_prob)


class InnerOfTheSignal(Own):
    def inner_loss(self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value.double().flatten(1).sum(1) if signal.value.ndim > 1 else signal.value.double()


class WithoutBase:
    """Three methods are a problem: its class is named, not what completes it."""

    def __init__(self) -> None:
        right = Own(sampled=False)
        self.inner_loss, self.outer_loss = right.inner_loss, right.outer_loss

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Any:
        return teacher(batch).softmax(-1)


def networks(dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(4, 3).to(dtype) for _ in range(2)]


def refuse(text: str, mode: str, problem: Any, accumulate: int = 1) -> None:
    """A step, and a hypergradient, are refused with this text, and nothing moves."""
    teacher, student = networks()
    before = [p.clone() for p in (*teacher.parameters(), *student.parameters())]
    trainer = metapl.BilevelTrainer(teacher, student, mode, problem=problem, teacher_losses=(), accumulate=accumulate)
    with pytest.raises(MetaplError, match=text):
        trainer.step((X, Y), X)
    with pytest.raises(MetaplError, match=text):
        trainer.hypergradient((X, Y), X)
    assert trainer.steps_done == 0
    assert all(map(torch.equal, before, (*teacher.parameters(), *student.parameters())))


@pytest.mark.parametrize("mode", metapl.MODES)
def test_a_signal_that_is_none(mode: str) -> None:
    sampled = mode in SAMPLED
    refuse(
        r"TensorSignal\.signal returned is a tensor of shape .*metapl\.Signal\(value\)",
        mode,
        TensorSignal(sampled),
    )
    refuse(r"^what NoSignal\.signal returned is of type NoneType; expected a metapl\.Signal", mode, NoSignal(sampled))
    refuse(r"^what ListSignal\.signal returned is a Signal whose value is a list", mode, ListSignal(sampled))


@pytest.mark.parametrize("mode", metapl.MODES)
def test_an_inner_loss_that_is_none(mode: str) -> None:
    refuse(
        r"inner_loss returned is of type NoneType, for a batch of 8; expected one loss per",
        mode,
        NoInnerLoss(mode in SAMPLED),
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_the_modes_named_for_a_sampled_signal_take_as_many_steps(steps: int) -> None:
    teacher, student = networks()
    given = {"labeled": (X, Y), "unlabeled": metapl.Lookahead([X] * steps)}
    given["inner_optimizer"] = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(MetaplError, match="expected one of the modes ") as told:
        metapl.hypergradient(teacher, student, mode="unrolled", problem=Own(sampled=True), **given)
    for mode in str(told.value).partition("one of the modes ")[2].rstrip(".").split(", "):
        if mode != "implicit":  # these weights are no optimum
            metapl.hypergradient(teacher, student, mode=mode, problem=metapl.PseudoLabels("hard"), **given)
    with pytest.raises(MetaplError, match='"reinforce_per_example" with one student step'):
        metapl.hypergradient(teacher, student, mode="forward", problem=SampledWithoutProbs(sampled=True), **given)


def test_a_problem_without_the_base_class_is_named() -> None:
    refuse(r"^what WithoutBase\.signal returned is a tensor of shape \(8, 3\)", "forward", WithoutBase())


@pytest.mark.parametrize("kind", [ConstantOuter, DetachedOuter])
@pytest.mark.parametrize("mode", BY_GRADIENT)
def test_an_outer_loss_that_depends_on_no_weight(mode: str, kind: type[Own]) -> None:
    refuse("the outer loss has no gradient in any weight of the student", mode, kind(mode in SAMPLED))


@pytest.mark.parametrize("mode", metapl.MODES)
def test_losses_that_read_another_parameter(mode: str) -> None:
    text = r"the problem's {}_loss reads a tensor of shape \(3,\).*no weight of the student.*teacher_losses.*detach\(\)"
    if mode != "none":  # without feedback, the outer loss is read in a report alone
        refuse(text.format("outer"), mode, OuterOfOthers(mode in SAMPLED))
    refuse(text.format("inner"), mode, InnerOfOthers(mode in SAMPLED))


def test_an_outer_loss_that_depends_on_no_weight_in_any_part() -> None:
    refuse("the outer loss has no gradient in any weight", "forward", ConstantOuter(sampled=False), accumulate=2)


def test_a_part_of_a_batch_may_have_no_outer_gradient() -> None:
    class FirstPartOnly(Own):
        def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
            kept = (batch[0][:, None] == X[:4]).all(-1).any(1)
            if not kept.any():
                return torch.tensor(0.0), 0
            return F.cross_entropy(outputs[kept], batch[1][kept], reduction="sum"), kept.sum()

    teacher, student = networks()
    trainer = metapl.BilevelTrainer(
        teacher, student, "forward", problem=FirstPartOnly(sampled=False), teacher_losses=(), accumulate=2
    )
    assert trainer.step((X, Y), X).feedback.abs().max() > 0


@pytest.mark.parametrize("mode", metapl.MODES)
def test_an_inner_loss_that_depends_on_no_weight(mode: str) -> None:
    refuse("the student's loss has no gradient", mode, InnerOfTheSignal(mode in SAMPLED))


@pytest.mark.parametrize("mode", metapl.MODES)
@pytest.mark.parametrize(("own", "given"), [("float32", "float64"), ("float64", "float32")])
def test_batches_of_another_type_than_the_weights(mode: str, own: str, given: str) -> None:
    teacher, student = networks(getattr(torch, own))
    right, wrong = X.to(getattr(torch, own)), X.to(getattr(torch, given))
    trainer = metapl.BilevelTrainer(teacher, student, mode)
    with pytest.raises(MetaplError, match=rf"cannot take unlabeled inputs of {given}.* {own}.*x\.to\(torch\.{own}\)"):
        trainer.step((right, Y), wrong)
    with pytest.raises(MetaplError, match=rf"cannot take labeled inputs of {given}"):
        trainer.step((wrong, Y), right)
    with pytest.raises(MetaplError, match=rf"the student cannot take unlabeled inputs of {given}"):
        trainer.hypergradient((right, Y), wrong)
    assert trainer.steps_done == 0
    trainer.step((right, Y), right)


class AnyOuter(Own):
    """It reads the labels elsewhere."""

    def outer_batch(self, batch: Any) -> Any:
        return batch

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, Y)


PICKED = r"a Linear, was given .* a {} of {} .*student_input\(batch\), and outer_input\(batch\) for the labeled batch"
BATCHES: dict[str, tuple[type[Own], Any, Any, str]] = {
    "no pair": (Own, X, X, r"^labeled is a tensor.* method outer_batch\(batch\) that returns what outer_loss reads"),
    "a dict without labels": (Own, {"x": X, "y": Y}, X, r"the keys 'x', 'y'; .* method outer_batch\(batch\)"),
    "an object": (Own, SimpleNamespace(x=X, y=Y), X, r"^labeled is of type SimpleNamespace; .* outer_batch\(batch\)"),
    "an object, taken": (AnyOuter, SimpleNamespace(x=X), X, "^labeled is of type .*expected tensors, in any nesting"),
    "a dict, taken": (AnyOuter, {"x": X, "y": Y}, X, PICKED.format("dict", 2)),
    "labels of NumPy": (Own, (X, Y.numpy()), X, r"labeled batch holds an array of NumPy; .*torch\.as_tensor\(x\)"),
    "inputs of NumPy": (Own, (X, Y), X.numpy(), r"unlabeled batch holds an array of NumPy"),
    "a dict of inputs": (Own, (X, Y), {"one": X, "two": X}, PICKED.format("dict", 2)),
    "inputs in a tuple": (Own, (X, Y), ((X, X), Y), PICKED.format("tuple", 2)),
    "an inner object": (
        Own,
        (X, Y),
        SimpleNamespace(x=X),
        "^unlabeled is of type SimpleNamespace; expected tensors, in",
    ),
}


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_a_batch_that_the_problem_does_not_read_names_the_method_that_reads_it(mode: str, case: str) -> None:
    kind, labeled, unlabeled, text = BATCHES[case]
    teacher, student = networks()
    problem = kind(mode in SAMPLED)
    problem.signal = lambda _, batch, *given, **named: Own.signal(problem, teacher, X, *given, **named)
    trainer = metapl.BilevelTrainer(teacher, student, mode, problem=problem, teacher_losses=())
    for call in (trainer.step, trainer.hypergradient):
        with pytest.raises(MetaplError, match=text):
            call(labeled, unlabeled)
    assert trainer.steps_done == 0


def test_one_network_and_batches_of_another_type() -> None:
    model = nn.Linear(4, 3)
    trainer = metapl.LossTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(MetaplError, match="the network cannot take labeled inputs of float64: its weights are float32"):
        trainer.step((X.double(), Y))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tokens_of_a_type_that_an_embedding_does_not_take(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(8, 3))
    trainer = metapl.LossTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(MetaplError, match=r"inputs of (uint8|float32): its embedding takes int64; .*x.to\(torch.int64"):
        trainer.step((torch.zeros(len(Y), 4, dtype=dtype), Y))


def test_another_error_of_the_network_stays_as_it_is() -> None:
    teacher, student = networks()
    other = nn.Sequential(nn.Unflatten(1, (3, -1)), student)
    with pytest.raises(RuntimeError, match="unflatten"):
        metapl.BilevelTrainer(teacher, other).step((X, Y), torch.randn(8, 4))


def test_inputs_of_another_width_are_named() -> None:
    teacher, student = networks()
    with pytest.raises(MetaplError, match=r"the student cannot take inputs that are a tensor of shape \(8, 5\)"):
        metapl.BilevelTrainer(teacher, student).step((X, Y), torch.randn(8, 5))


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("stps", "; did you mean steps?"),
        ("log_evry", "; did you mean log_every?"),
        ("resumed", "; did you mean resume?"),
        ("unlabelled", "; did you mean unlabeled or labeled?"),
        ("xyz", "; expected some of labeled, unlabeled, inner, outer, steps, batch_size, validation, "),
    ],
)
def test_an_option_that_fit_does_not_have(option: str, meant: str) -> None:
    model = nn.Linear(4, 3)
    one = metapl.LossTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    two = metapl.BilevelTrainer(*networks())
    for call in (one.fit, two.fit):
        with pytest.raises(MetaplError, match=re.escape(f"fit() has no option {option!r}{meant}")):
            call([(X, Y)], **{option: 3})
    with pytest.raises(MetaplError, match=r"finetune\(\) has no option 'optimiser'; did you mean optimizer\?"):
        two.finetune([(X, Y)], steps=2, optimiser=None)
    with pytest.raises(MetaplError, match=r"finetune\(\) has no option 'stps'; did you mean steps\?"):
        two.finetune([(X, Y)], stps=2)
    with pytest.raises(MetaplError, match="steps= was not given, the number of steps to take"):
        one.fit([(X, Y)])
    assert one.steps_done == two.steps_done == 0


def test_probabilities_in_the_place_of_logits_are_warned_of() -> None:
    teacher, student = networks()
    trainer = metapl.BilevelTrainer(teacher, nn.Sequential(student, nn.Softmax(1)), "forward")
    with pytest.warns(UserWarning, match="the student's outputs are probabilities.*Leave the softmax out"):
        trainer.step((X, Y), X)


class OfProbabilities(metapl.PseudoLabels):
    """A loss of one's own, of outputs that are probabilities."""

    def inner_loss(self, outputs: torch.Tensor, signal: Any, batch: Any, params: Any = None) -> torch.Tensor:
        return -(signal.value * outputs.clamp_min(1e-9).log()).sum(1)


def test_a_loss_of_probabilities_is_not_warned_of() -> None:
    teacher, student = networks()
    trainer = metapl.BilevelTrainer(
        teacher, nn.Sequential(student, nn.Softmax(1)), "forward", problem=OfProbabilities()
    )
    trainer.step((X, Y), X)  # a warning fails this test


@pytest.mark.parametrize(
    ("labeled", "text"),
    [
        (
            (X, Y + 1),
            r"labels run from 1 to 3; the networks have 3 classes: expected 0\.\.2, such as the labels - 1",
        ),
        ((X.numpy(), Y.numpy()), r"a tuple of 2 \(ndarray, ndarray\).*, torch\.as_tensor\(x\)\."),
    ],
)
def test_labels_from_one_and_arrays_have_a_remedy(labeled: Any, text: str) -> None:
    trainer = metapl.BilevelTrainer(*networks(), "forward")
    with pytest.raises(MetaplError, match=text):
        trainer.step(labeled, X)
    with pytest.raises(MetaplError, match=r"unlabeled is a list of 8 \(all str\)"):
        trainer.step((X, Y), ["a b c"] * 8)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("BilevelTrianer", "; did you mean BilevelTrainer?"), ("abblation", "; did you mean ablation?"), ("xyz", "")],
)
def test_a_name_that_metapl_does_not_have(name: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=re.escape(f"module 'metapl' has no attribute {name!r}{meant}") + "$"):
        getattr(metapl, name)
    assert not hasattr(metapl, name)
