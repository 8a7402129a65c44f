"""Which operations each exact mode runs on: attention by its math kernel, no LSTM, half precision by autocast."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import reference
import torch
from problems_zoo import ANYWHERE, CLASSES, OPTIMISERS, STUDENTS, Toy, toy, unmoved
from reference import error
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl
from metapl.execution.kernels import NotByThisMode, explained, forward_mode


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.flatten(1, 2))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.flatten(1, 2)).mean(1))


def with_student(student: nn.Module, training: bool = True) -> Toy:
    base = toy("mlp")
    return Toy(base.teacher, student.double().train(training), base.labeled, base.unlabeled, 0)


def recurrent(dtype: torch.dtype) -> Toy:
    base = toy("mlp", dtype=dtype)
    torch.manual_seed(0)
    return Toy(base.teacher, Recurrent().to(dtype), base.labeled, base.unlabeled, 0)


@pytest.mark.parametrize("call", ["hypergradient", "step"])
@pytest.mark.parametrize("mode", ["forward", "reinforce_per_example", "unrolled"])
def test_an_lstm_is_refused_by_name_with_the_mode_that_runs(
    mode: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the CPU runs it as one fused operation, without forward-mode AD."""
    case = recurrent(torch.float32)
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3, momentum=0.9)
    if mode == "unrolled":  # on the CPU the LSTM has a second derivative; elsewhere, and for other operations, not
        monkeypatch.setattr(torch.autograd, "grad", without_second_derivative(torch.autograd.grad))
    operation = "_cudnn_rnn_backward" if mode == "unrolled" else "mkldnn_rnn_layer"
    mend = (
        r'Use .*ReinforcePerExample\(tangent="difference"\)' if mode == "reinforce_per_example" else 'mode="difference"'
    )
    text = rf"^mode '{mode}' cannot run here: .*{operation}.*{mend}"
    with unmoved(case, inner), pytest.raises(metapl.MetaplError):
        take(call, case, mode, inner)


def without_second_derivative(real: Any) -> Any:
    def grad(outputs: Tensor | list[Tensor], *args: Any, **options: Any) -> Any:
        if isinstance(outputs, list):  # back through θ′: the second derivative
            raise RuntimeError("derivative for aten::_cudnn_rnn_backward is not implemented")
        return real(outputs, *args, **options)

    return grad


def take(call: str, case: Toy, mode: Any, inner: Any) -> None:
    if call == "step":
        metapl.BilevelTrainer(**case.networks(), mode=mode, inner_optimizer=inner).step(**case.data())
    else:
        metapl.hypergradient(**case.networks(), **case.data(), mode=mode, inner_optimizer=inner)


class WithoutForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0].tanh().square())


class DifferentiableOnce(WithoutForwardMode):
    backward = staticmethod(once_differentiable(WithoutForwardMode.backward))


class ForwardModeOnly(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0].square())

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * (1 - ctx.saved_tensors[0].square())


class Within(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.body, self.head, self.function = nn.Linear(16, 6), nn.Linear(6, CLASSES), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.body(x.flatten(1))))


def fake_quantized(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, 0.05, 128, 0, 255)


def weight_normed() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 6))
    return nn.Sequential(nn.Flatten(), normed, nn.Tanh(), nn.Linear(6, CLASSES))


EXACT_MODES = {"unrolled", "forward", "difference"}
# A student, the same by operations of torch, and the modes that are exact on it with soft labels.
HALF_WAY: dict[str, tuple[Any, Any, set[str]]] = {
    "lstm": (Recurrent, Recurrent, {"unrolled", "difference"}),
    "weight norm": (weight_normed, weight_normed, {"unrolled", "difference"}),
    "distances": (*[lambda: Within(lambda x: torch.cdist(x, torch.eye(6)))] * 2, {"unrolled", "difference"}),
    "fake quantization": (*[lambda: Within(fake_quantized)] * 2, {"unrolled"}),
    "a Function without jvp": (
        lambda: Within(WithoutForwardMode.apply),
        lambda: Within(torch.tanh),
        {"unrolled", "difference"},
    ),
    "a Function once differentiable": (
        lambda: Within(DifferentiableOnce.apply),
        lambda: Within(torch.tanh),
        {"difference"},
    ),
    "a Function with jvp, once differentiable": (
        lambda: Within(ForwardModeOnly.apply),
        lambda: Within(torch.tanh),
        {"forward", "difference"},
    ),
}
ESTIMATORS = {
    'mode="unrolled"': ("unrolled", "soft"),
    'mode="forward"': ("forward", "soft"),
    'mode="difference"': ("difference", "soft"),
    'mode="reinforce"': ("reinforce", "batch_score"),
    'metapl.feedback.ReinforcePerExample(tangent="difference")': (
        metapl.feedback.ReinforcePerExample(tangent="difference"),
        "score",
    ),
}


def half_way(student: str, which: int) -> Toy:
    base = toy("mlp", dtype=torch.float32, rows=16)  # in float64 the LSTM has a forward mode
    torch.manual_seed(0)
    case = Toy(base.teacher, HALF_WAY[student][which](), base.labeled, base.unlabeled, 0)
    case.draw_from_start()
    return case


def by_hand(student: str, kind: str) -> Any:
    case = half_way(student, which=1)
    return reference.pseudo_labels(**case.networks(), **case.data(), rule=OPTIMISERS["torch_sgd"].rule, kind=kind).grads


def named_in(words: str) -> list[str]:
    return re.findall(r'(?:mode=|metapl\.feedback\.\w+\(tangent=)"\w+"\)?', words.partition("Use ")[2])


@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference", "reinforce_per_example"])
@pytest.mark.parametrize("student", HALF_WAY)
def test_a_mode_that_cannot_run_names_those_that_are_right(student: str, mode: str) -> None:
    """Each that is named gives the gradient that double backward by hand gives, and none that does is left out."""
    case = half_way(student, which=0)
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    exact = HALF_WAY[student][2]
    sampled = mode == "reinforce_per_example"
    try:
        take("hypergradient", case, mode, inner)
    except metapl.MetaplError as refusal:
        words = str(refusal)
        assert words.startswith(f"mode '{mode}' cannot run here: ")
    else:
        assert mode in exact or (sampled and "forward" in exact) or mode == "difference"
        return
    assert mode not in exact
    named = named_in(words)
    expected = {'mode="reinforce"'} if sampled else {f'mode="{name}"' for name in exact}
    if sampled and "difference" in exact:
        expected.add('metapl.feedback.ReinforcePerExample(tangent="difference")')
    assert set(named) == expected, words
    for name in named:
        estimate, kind = ESTIMATORS[name]
        case = half_way(student, which=0)
        inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
        found = metapl.hypergradient(**case.networks(), **case.data(), mode=estimate, inner_optimizer=inner).grads
        assert error(found, by_hand(student, kind)) < (0.02 if "difference" in name else 1e-3), name


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
@pytest.mark.parametrize("student", HALF_WAY)
def test_over_several_steps_a_mode_that_cannot_run_names_the_one_that_does(student: str, mode: str) -> None:
    """A backward pass that is differentiable once would leave a term out of the Hessian product, without a word."""
    case, twin = half_way(student, 0), half_way(student, 1)
    batches = [case.unlabeled, case.unlabeled + 1, case.unlabeled - 1]
    given = {**case.networks(), "labeled": case.labeled, "unlabeled": metapl.Lookahead(batches)}
    given["inner_optimizer"] = torch.optim.SGD(case.student.parameters(), lr=0.3)
    words = f'Use mode="{mode}"'
    try:
        metapl.hypergradient(**given, mode=mode)
    except metapl.MetaplError as refusal:
        words = str(refusal)
    named = [name[6:-1] for name in named_in(words)]
    assert named or "Look one step ahead" in words
    assert bool(named) == ("unrolled" in HALF_WAY[student][2])
    expected = reference.several_steps(
        **twin.networks(), labeled=twin.labeled, batches=batches, rule=OPTIMISERS["torch_sgd"].rule
    )
    for name in named:
        assert error(metapl.hypergradient(**given, mode=name).grads, expected.grads) < 1e-3


def test_with_micro_batches_it_is_said_that_unrolled_takes_one() -> None:
    case = half_way("lstm", which=0)
    text = r'Use mode="unrolled" \(with accumulate=1\) or mode="difference", which run'
    with unmoved(case), pytest.raises(metapl.MetaplError):
        metapl.BilevelTrainer(**case.networks(), mode="forward", accumulate=2).step(
            (case.labeled[0][:16], case.labeled[1][:16]), case.unlabeled
        )


def test_the_experts_of_hugging_face_can_be_run_by_operations_with_all_derivatives() -> None:
    with (
        pytest.raises(NotByThisMode),
        explained(),
    ):
        raise NotImplementedError("Trying to use forward AD with _grouped_mm that does not support it")


@pytest.mark.parametrize("mode", ["difference", "reinforce", "loss_difference"])
def test_an_lstm_runs_in_the_modes_of_plain_passes(mode: str) -> None:
    case = recurrent(torch.float64)
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    case.draw_from_start()
    found = metapl.hypergradient(**case.networks(), **case.data(), mode=mode, inner_optimizer=inner)
    kind = {"difference": "soft", "reinforce": "batch_score"}.get(mode)
    case.draw_from_start()
    if kind is not None:
        rule = OPTIMISERS["torch_sgd"].rule
        expected = reference.pseudo_labels(**case.networks(), **case.data(), rule=rule, kind=kind)
        assert error(found.grads, expected.grads) < 1e-4
    assert found.feedback.abs().max() > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference", "reinforce_per_example"])
def test_a_transformer_layer_is_exact(mode: str, dropout: float, training: bool) -> None:
    """In eval mode too, where PyTorch would take a fused path without derivatives."""
    torch.manual_seed(0)
    case = with_student(Encoder(dropout), training)
    rule = OPTIMISERS["torch_sgd_nesterov"]
    case.draw_from_start()
    kind = "score" if mode == "reinforce_per_example" else "soft"
    expected = reference.pseudo_labels(**case.networks(), **case.data(), rule=rule.rule, kind=kind)
    case.draw_from_start()
    inner = rule.build(case.student)
    found = metapl.hypergradient(**case.networks(), **case.data(), mode=mode, inner_optimizer=inner)
    assert error(found.grads, expected.grads) < (1e-4 if mode == "difference" else 1e-9)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_a_callers_flash_attention_is_set_aside(mode: str) -> None:
    """The exact modes ask for the math kernel themselves, whatever the caller prefers."""
    case = toy("attention")
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    plain = metapl.hypergradient(**case.networks(), **case.data(), mode=mode, inner_optimizer=inner)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = metapl.hypergradient(**case.networks(), **case.data(), mode=mode, inner_optimizer=inner)
    assert error(fused.grads, plain.grads) < 1e-12


# Measured over the cases below: 4.5e-3, 5.5e-3, 5.9e-3, 1.0e-2; bf16 itself has eight bits, 3.9e-3.
HALF = {"difference": 0.02, "forward": 0.02, "unrolled": 0.02, "reinforce_per_example": 0.03}


@pytest.mark.parametrize("student", [s for s in STUDENTS if s != "dropout"])
@pytest.mark.parametrize("mode", HALF)
def test_under_bfloat16_autocast_the_gradient_is_that_of_float32(mode: str, student: str) -> None:
    """Not zero, as a difference of bf16 outputs is, and near the float32 gradient."""
    found = []
    for enabled in (True, False):
        case = toy(student, dtype=torch.float32, rows=8)
        inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
        labels = FixedToFirst("hard") if mode == "reinforce_per_example" else None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(
                metapl.hypergradient(
                    **case.networks(), **case.data(), mode=mode, problem=labels, inner_optimizer=inner
                ).grads
            )
    assert error(*found) < HALF[mode]


class FixedToFirst(metapl.PseudoLabels):
    """Every label is class 0, so that rounding cannot change a draw."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Tensor, *, generator: Any) -> metapl.Signal:
        log_q = teacher(batch).float().log_softmax(-1)
        return metapl.Signal(torch.zeros(len(log_q), dtype=torch.int64), log_q[:, 0], log_q.exp())


@pytest.mark.parametrize("mode", ANYWHERE)
def test_every_mode_steps_under_autocast(mode: str) -> None:
    case = toy("batch_norm", dtype=torch.float32)
    trainer = metapl.BilevelTrainer(**case.networks(), mode=mode)
    before = [p.clone() for p in case.student.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            report = trainer.step(**case.data())
    assert all(torch.isfinite(torch.tensor(v)) for v in report.as_dict().values())
    assert all(not torch.equal(a, b) for a, b in zip(before, case.student.parameters(), strict=True))


class Twice(nn.Module):
    """A layer used twice and registered under two names, and a weight held by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.parts = nn.Sequential(nn.Flatten(), self.layer, nn.Tanh(), self.layer, nn.Tanh())
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tied(self.parts(x)))


@pytest.mark.parametrize("optimiser", ["torch_sgd_nesterov", "torchopt_sgd_nesterov"])
@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference"])
def test_shared_layers_are_exact_and_stay_the_students_own(mode: str, optimiser: str) -> None:
    """torch's functional_call, left to itself, replaces the parameters of a layer that has two names."""
    torch.manual_seed(0)
    case, rule = with_student(Twice()), OPTIMISERS[optimiser]
    inner = rule.build(case.student)
    expected = reference.pseudo_labels(**case.networks(), **case.data(), rule=rule.rule)
    with unmoved(case):
        found = metapl.hypergradient(**case.networks(), **case.data(), mode=mode, inner_optimizer=inner)
    assert error(found.grads, expected.grads) < (1e-4 if mode == "difference" else 1e-9)
    trainer = metapl.BilevelTrainer(**case.networks(), mode=mode, inner_optimizer=inner)
    trainer.step(**case.data())
    assert error(dict(case.student.named_parameters()), expected.student_params) < 1e-12


@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference"])
def test_a_frozen_layer_stays_and_the_rest_is_exact(mode: str) -> None:
    case, rule = toy("mlp"), OPTIMISERS["torch_sgd_nesterov"]
    head = Toy(case.teacher, case.student[3], case.labeled, case.unlabeled, 0)
    body = case.student[:3].requires_grad_(False)
    on_features = {
        "labeled": (body(case.labeled[0]), case.labeled[1]),
        "unlabeled": (case.unlabeled, body(case.unlabeled)),
    }
    expected = reference.pseudo_labels(**head.networks(), **on_features, rule=rule.rule)
    learned = [p for p in case.student.parameters() if p.requires_grad]
    inner = torch.optim.SGD(learned, lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.01)
    found = metapl.hypergradient(**case.networks(), **case.data(), mode=mode, inner_optimizer=inner)
    assert error(found.grads, expected.grads) < (1e-4 if mode == "difference" else 1e-9)
    assert list(found.student_params) == ["3.weight", "3.bias"]


def test_no_grad_of_another_thread_is_its_own() -> None:
    """In forward mode ``torch.no_grad`` ends the derivatives too, in the thread of the pass alone."""
    entered, go_on, enabled = threading.Event(), threading.Event(), list[bool]()

    def other() -> None:
        with torch.no_grad(), torch.no_grad():
            entered.set()
            go_on.wait(10)
        enabled.append(torch._C._is_fwd_grad_enabled())

    thread = threading.Thread(target=other)
    with forward_mode():
        with torch.no_grad():
            thread.start()
            assert entered.wait(10)
            assert not torch._C._is_fwd_grad_enabled()
        assert torch._C._is_fwd_grad_enabled()
        go_on.set()
        thread.join()
    assert enabled == [True]
