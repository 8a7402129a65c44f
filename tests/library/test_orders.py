"""The order of differentiation: chosen once, by trying, and right on both sides of every threshold.

The reference is a loop of plain SGD steps with weights of the examples, and central differences of
the loss after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.torch_version import TorchVersion
from torch_versions import require_torch

import metapl
from metapl.execution.graphs import refuse_once_differentiable
from metapl.feedback import Estimator, Forward, ReinforcePerExample
from metapl.feedback.forward import SMALL
from metapl.problems import Table

EXAMPLES = 4
LEARNING_RATE = 0.1


class Recurrent(nn.Module):
    """An LSTM, whose float32 kernel has no forward mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, width, batch_first=True)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x.view(len(x), 2, 4))[0][:, -1])


class Transformer(nn.Module):
    """A spatial transformer: grid_sample has no forward mode below torch 2.15."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, width)
        self.grid = nn.Linear(width, 6)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        theta = 0.3 * self.grid(self.hidden(x).tanh()).view(-1, 2, 3)
        grid = F.affine_grid(theta, [len(x), 1, 2, 4], align_corners=False)
        return self.out(F.grid_sample(x.view(-1, 1, 2, 4), grid, align_corners=False).flatten(1))


class Prototypes(nn.Module):
    """Distances to prototypes: cdist has no forward mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, width)
        self.prototypes = nn.Parameter(torch.randn(3, width))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.hidden(x).tanh(), self.prototypes)


class Derivative(nn.Module):
    """A forward that takes a gradient, as networks of physics do, without ``enable_grad``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return u + slope[:, :3]


class Spread(nn.Module):
    """The standard deviation of rows, of which some are constant.

    NaN in its second derivative in reverse.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, width)
        self.out = nn.Linear(width + 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x) * (x[:, :1] > 0)
        return self.out(torch.cat([h, h.std(1, keepdim=True)], 1))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh() ** 2)


class OnceWithJvp(Once):
    """The same with a forward mode of its own, by which it is right."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * (1 - x.tanh() ** 2)


class Opaque(nn.Module):
    function: type[torch.autograd.Function] = Once

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, width)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function.apply(self.hidden(x)))


class Translucent(Opaque):
    function = OnceWithJvp


class Weighed(metapl.BilevelProblem):
    """A weight for each example, exp of a table."""

    def signal(
        self, teacher: nn.Module, batch: Any, outputs: Any, *, generator: Any
    ) -> metapl.Signal:
        return metapl.Signal(teacher(batch[2]).exp())

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target, reduction="none")

    def inner_loss(
        self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None
    ) -> Tensor:
        assert isinstance(signal.value, Tensor)
        return signal.value * self.loss(outputs, batch[1])

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.loss(outputs, batch[1]).mean()


class Ctc(Weighed):
    """Its backward has no derivative."""

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        sizes = (
            torch.full((len(outputs),), outputs.shape[1]),
            torch.full((len(outputs),), target.shape[1]),
        )
        return F.ctc_loss(outputs.log_softmax(-1).transpose(0, 1), target, *sizes, reduction="none")


@dataclass
class Task:
    student: nn.Module
    teacher: nn.Module
    outer: Any
    inner: Any
    problem: Weighed

    def gradient(
        self, steps: int, mode: Any = "forward", **options: Any
    ) -> metapl.feedback.hypergradient.Hypergradient:
        inner = metapl.Lookahead([self.inner] * steps) if steps > 1 else self.inner
        return metapl.hypergradient(
            self.teacher,
            self.student,
            outer=self.outer,
            inner=inner,
            problem=self.problem,
            mode=mode,
            inner_optimizer=torch.optim.SGD(self.student.parameters(), lr=LEARNING_RATE),
            **options,
        )

    def reference(self, steps: int) -> Tensor:
        """Return central differences of the loss after real steps, in float64."""
        (table,) = [p.detach().double() for p in self.teacher.parameters()]
        move = 1e-5
        slopes = []
        for i in range(EXAMPLES):
            ends = []
            for side in (1, -1):
                moved = table.clone()
                moved.view(-1)[i] += side * move
                ends.append(self.loss_after(steps, moved.view(-1).exp()))
            slopes.append((ends[0] - ends[1]) / (2 * move))
        return torch.tensor(slopes, dtype=torch.float64)

    def loss_after(self, steps: int, weights: Tensor) -> float:
        student = copy.deepcopy(self.student).double()
        optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
        for _ in range(steps):
            optimizer.zero_grad()
            (
                weights * self.problem.loss(student(self.inner[0].double()), self.inner[1])
            ).mean().backward()
            optimizer.step()
        return float(
            self.problem.loss(student(self.outer[0].double()), self.outer[1]).mean().detach()
        )


def task(kind: Callable[[int], nn.Module], width: int, dtype: torch.dtype = torch.float64) -> Task:
    torch.manual_seed(3)
    student = kind(width).to(dtype)
    x = torch.randn(EXAMPLES, 8, dtype=dtype)
    y = torch.arange(EXAMPLES) % 3
    # This row is constant in Spread.
    x[0, 0] = -1.0
    outer = torch.randn(5, 8, dtype=dtype), torch.arange(5) % 3
    table = Table(torch.randn(EXAMPLES, dtype=dtype) / 3)
    return Task(student, table, outer, (x, y, torch.arange(EXAMPLES)), Weighed())


def ctc_task(width: int) -> Task:
    torch.manual_seed(3)
    student = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 5)).double()
    x = torch.randn(EXAMPLES, 9, 4).double()
    text = torch.randint(1, 5, (EXAMPLES, 3))
    outer = torch.randn(4, 9, 4).double(), torch.randint(1, 5, (4, 3))
    table = Table(torch.randn(EXAMPLES).double() / 3)
    return Task(student, table, outer, (x, text, torch.arange(EXAMPLES)), Ctc())


def close(result: Any, expected: Tensor, tolerance: float = 1e-6) -> None:
    (gradient,) = result.grads.values()
    assert torch.dist(gradient.double().view(-1), expected) <= tolerance * expected.norm()


SIZES = {"small": 6, "large": 3000}
# The releases whose backward passes of these have a derivative; what an older one says is tested
# below.
SECOND_DERIVATIVE_SINCE = {Transformer: "2.12", Prototypes: "2.14"}


@pytest.mark.parametrize("kind", SECOND_DERIVATIVE_SINCE)
def test_a_derivative_that_an_older_torch_lacks_is_refused_with_the_release_that_has_it(
    kind: Any,
) -> None:
    case = task(kind, SIZES["small"])
    release = SECOND_DERIVATIVE_SINCE[kind]
    if torch.__version__ < TorchVersion(release):
        with pytest.raises(metapl.MetaplError, match=f"torch {release} has it, and this is"):
            case.gradient(1)
    else:
        close(case.gradient(1), case.reference(1))
    # The mode that the error proposes needs no second derivative.
    close(case.gradient(1, "difference"), case.reference(1), 1e-5)


# By kind: the orders of one step of a small and of a large student, and of three steps of either.
ORDERS = {
    Transformer: ("graph", "double_backward", "double_backward")
    if torch.__version__ < TorchVersion("2.15")
    else ("graph", "tangent", "tangent"),
    Prototypes: ("graph", "double_backward", "double_backward"),
    Derivative: ("graph", "double_backward", "double_backward"),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ORDERS)
def test_a_student_without_forward_mode_is_right_at_every_size(
    kind: Any, size: str, steps: int
) -> None:
    if kind in SECOND_DERIVATIVE_SINCE:
        require_torch(
            SECOND_DERIVATIVE_SINCE[kind], f"the second derivative of {kind.__name__} is there"
        )
    case = task(kind, SIZES[size])
    assert (sum(p.numel() for p in case.student.parameters()) > SMALL) == (size == "large")
    result = case.gradient(steps)
    expected = case.reference(steps)
    of_small, of_large, of_several = ORDERS[kind]
    assert result.order == (of_several if steps > 1 else of_large if size == "large" else of_small)
    close(result, expected)
    if steps == 1:
        close(case.gradient(steps, "difference"), expected, 1e-5)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("width", "order"), [(60, "graph"), (128, "double_backward")])
def test_an_lstm_is_right_at_every_size(width: int, order: str, steps: int) -> None:
    """18,000 weights and 69,000, in float32."""
    case = task(Recurrent, width, torch.float32)
    result = case.gradient(steps)
    assert result.order == (order if steps == 1 else "double_backward")
    close(result, case.reference(steps), 1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_the_order_that_is_finite_is_taken(size: str) -> None:
    """A graph of the standard deviation of a constant row is NaN twice, and a tangent is not."""
    case = task(Spread, SIZES[size])
    result = case.gradient(1)
    expected = case.reference(1)
    assert result.order == "tangent"
    close(result, expected)
    for mode in ("unrolled", Forward(by="graph"), Forward(by="double_backward")):
        with pytest.raises(metapl.MetaplError, match="the feedback is NaN or infinite"):
            case.gradient(1, mode)


@pytest.mark.parametrize("size", SIZES)
def test_where_no_order_of_several_steps_is_finite_a_truncated_one_runs(size: str) -> None:
    case = task(Spread, SIZES[size])
    with pytest.raises(metapl.MetaplError, match=r"Forward\(truncate="):
        case.gradient(3)
    result = case.gradient(3, Forward(truncate=1))
    assert all(t.isfinite().all() for t in result.feedback)


@pytest.mark.parametrize("by", ["graph", "tangent", "double_backward"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_an_order_is_forced_and_all_agree(by: Any, steps: int, size: str) -> None:
    case = task(
        lambda width: nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3)),
        SIZES[size],
    )
    result = case.gradient(steps, Forward(by=by))
    assert result.order == by
    close(result, case.reference(steps))
    if steps > 1:
        close(case.gradient(steps, Forward(by=by, keep_every=2)), case.reference(steps))
        truncated = case.gradient(steps, Forward(by=by, truncate=2))
        by_tangent = case.gradient(steps, Forward(by="tangent", truncate=2))
        torch.testing.assert_close(truncated.feedback, by_tangent.feedback)


@pytest.mark.parametrize("by", ["graph", "tangent", "double_backward"])
def test_micro_batches_take_every_order(by: Any) -> None:
    case = task(lambda width: nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3)), 6)
    case.outer = case.outer[0][:4], case.outer[1][:4]
    for steps in (1, 3):
        close(case.gradient(steps, Forward(by=by), accumulate=2), case.reference(steps))


def test_what_is_forced_and_does_not_run_is_refused_and_other_orders_run() -> None:
    require_torch("2.12", "the second derivative of grid_sample is there")
    if torch.__version__ >= TorchVersion(SECOND_DERIVATIVE_SINCE[Prototypes]):
        kind = Prototypes
        operation = "_cdist_forward"
    else:
        kind = Transformer
        operation = "grid_sampler_2d"
    case = task(kind, 6)
    with pytest.raises(metapl.MetaplError, match=f"{operation}.*expected another operation"):
        case.gradient(1, Forward(by="tangent"))
    for by in ("graph", "double_backward"):
        close(case.gradient(1, Forward(by=by)), case.reference(1))
    with pytest.raises(metapl.MetaplError, match="expected another operation"):
        case.gradient(3, Forward(by="tangent"))
    close(case.gradient(3, Forward(by="double_backward")), case.reference(3))


@pytest.mark.parametrize("width", [60, 128])
@pytest.mark.parametrize("mode", [ReinforcePerExample(), "implicit"])
def test_other_modes_with_a_tangent_run_where_forward_does(mode: Any, width: int) -> None:
    """Sampled labels of an LSTM are compared with finite differences of the outputs.

    The implicit mode has the solver ``identity``.
    """
    torch.manual_seed(2)
    teacher = nn.Linear(8, 3)
    student = Recurrent(width)
    batches: dict[str, Any] = {
        "outer": (torch.randn(5, 8), torch.arange(5) % 3),
        "inner": torch.randn(6, 8),
    }
    batches["inner_optimizer"] = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
    if mode == "implicit":
        mode = metapl.feedback.Implicit(solver="identity", step_size=0.1)
        implicit = metapl.hypergradient(teacher, student, **batches, mode=mode)
        assert implicit.order == "double_backward"
        return
    torch.manual_seed(5)
    gradient = metapl.hypergradient(teacher, student, **batches, mode=mode)
    torch.manual_seed(5)
    reference = metapl.hypergradient(
        teacher, student, **batches, mode=ReinforcePerExample(tangent="difference")
    )
    assert gradient.order == ("graph" if width == 60 else "double_backward")
    assert reference.order == "outputs"
    assert torch.dist(gradient.feedback, reference.feedback) <= 2e-2 * reference.feedback.norm()


# -------------------------------------------------------------------------------------- the trainer


def trainer_of(case: Task, mode: Any = "forward", **options: Any) -> metapl.BilevelTrainer:
    defaults: dict[str, Any] = {
        "inner_optimizer": torch.optim.SGD(case.student.parameters(), lr=LEARNING_RATE),
        "outer_optimizer": torch.optim.SGD(case.teacher.parameters(), lr=1.0),
        "verify": False,
    }
    return metapl.BilevelTrainer(
        case.teacher, case.student, mode, problem=case.problem, **defaults | options
    )


def test_a_trainer_tries_once_and_its_checkpoints_keep_the_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = task(Derivative, 3000)
    trainer = trainer_of(case)
    tries: list[bool] = []
    in_order = metapl.BilevelTrainer._step_in_order

    def noting_tries(self: Any, order: Any, is_tried: bool, **options: Any) -> Any:
        tries.append(is_tried)
        return in_order(self, order, is_tried, **options)

    monkeypatch.setattr(metapl.BilevelTrainer, "_step_in_order", noting_tries)
    expected = case.reference(1)
    weight = next(case.teacher.parameters())
    weight_before = weight.detach().clone()
    report = trainer.step(outer=case.outer, inner=case.inner)
    movement = weight.detach() - weight_before
    assert torch.dist(-movement.view(-1), expected) <= 1e-6 * expected.norm()
    assert report.order == "double_backward"
    for _ in range(2):
        assert trainer.step(outer=case.outer, inner=case.inner).order == "double_backward"
    # The first step tries the tangent and double backward, later steps take the latter alone.
    assert tries == [True, True, False, False]

    resumed_case = task(Derivative, 3000)
    resumed = trainer_of(resumed_case)
    resumed.load_state_dict(trainer.state_dict())
    tries.clear()
    trainer.step(outer=case.outer, inner=case.inner)
    resumed.step(outer=resumed_case.outer, inner=resumed_case.inner)
    assert tries == [False, False]
    for p, q in zip(case.student.parameters(), resumed_case.student.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_resumed_fit_keeps_the_order_bit_for_bit(tmp_path: Path) -> None:
    def fitted(**options: Any) -> list[Tensor]:
        case = task(Derivative, 3000)
        trainer = trainer_of(case)
        trainer.fit([case.outer], [case.inner], steps=4, progress=False, **options)
        assert trainer.orders.state_dict() == {"tangent, double_backward": "double_backward"}
        return [*case.student.parameters(), *case.teacher.parameters()]

    out = tmp_path / "run"
    uninterrupted = fitted(out=out, save_every=2)
    (out / "checkpoints/fit/step-00000004.ckpt").unlink()
    resumed = fitted(out=out, save_every=2, resume=True)
    for p, q in zip(uninterrupted, resumed, strict=True):
        assert torch.equal(p, q)


def test_an_attempt_that_fails_leaves_generators_and_buffers_as_they_were() -> None:
    """A step that tried twice is the step in the second order alone.

    The networks have dropout and batch norm.
    """

    def kind(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), Derivative(width))

    ends = []
    for mode in (Forward(), Forward(by="double_backward")):
        case = task(kind, 3000)
        torch.manual_seed(7)
        report = trainer_of(case, mode).step(outer=case.outer, inner=case.inner)
        assert report.order == "double_backward"
        ends.append(
            [*case.student.state_dict().values(), *case.teacher.parameters(), torch.get_rng_state()]
        )
    for tensor, other in zip(*ends, strict=True):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("kind", [Prototypes, Derivative, Spread])
def test_a_training_verifies_and_comes_out(kind: Any) -> None:
    """Verified, and below the training whose weights stay as they are."""
    if kind in SECOND_DERIVATIVE_SINCE:
        require_torch(
            SECOND_DERIVATIVE_SINCE[kind], f"the second derivative of {kind.__name__} is there"
        )
    losses = {}
    for mode in ("forward", "none"):
        case = task(kind, 3000)
        optimizer = torch.optim.SGD(case.student.parameters(), lr=0.003)
        outer_optimizer = torch.optim.SGD(case.teacher.parameters(), lr=30.0)
        trainer = trainer_of(
            case, mode, verify=True, inner_optimizer=optimizer, outer_optimizer=outer_optimizer
        )
        for _ in range(8):
            trainer.step(outer=case.outer, inner=case.inner)
        losses[mode] = float(
            case.problem.outer_loss(case.student(case.outer[0]), case.outer).detach()
        )
        assert trainer.verification.verdict.startswith("right" if mode == "forward" else "nothing")
    assert losses["forward"] < losses["none"]


def test_numbers_that_become_nan_later_are_refused() -> None:
    """The choice is made once."""
    case = task(Spread, 6)
    x = case.inner[0].abs() + 0.1
    trainer = trainer_of(case)
    assert trainer.step(outer=case.outer, inner=(x, *case.inner[1:])).order == "graph"
    with pytest.raises(metapl.MetaplError, match="the feedback is NaN or infinite"):
        trainer.step(outer=case.outer, inner=case.inner)


# ---------------------------------------------------------------- a backward that has no derivative


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_a_once_differentiable_backward_is_named(mode: str, size: str, steps: int) -> None:
    case = task(Opaque, SIZES[size])
    ending = "" if steps == 1 else " with one student step"
    with pytest.raises(
        metapl.MetaplError,
        match=rf"Once lacks a derivative.*another operation, or mode 'difference'{ending}\.",
    ):
        case.gradient(steps, mode)
    with pytest.raises(metapl.MetaplError, match="Once lacks a derivative"):
        trainer_of(case, mode).step(
            outer=case.outer,
            inner=metapl.Lookahead([case.inner] * steps) if steps > 1 else case.inner,
        )
    close(case.gradient(1, "difference"), case.reference(1), 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_once_differentiable_backward_with_a_jvp_is_right_by_tangent(size: str) -> None:
    case = task(Translucent, SIZES[size])
    result = case.gradient(1)
    assert result.order == "tangent"
    close(result, case.reference(1))
    with pytest.raises(
        metapl.MetaplError, match="OnceWithJvp.*or mode 'difference' with one student step"
    ):
        case.gradient(3)


# --------------------------------------------------------------- losses without a second derivative


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_weight_of_a_ctc_loss_is_right_by_difference(one_sided: bool, accumulate: int) -> None:
    case = ctc_task(7)
    mode = metapl.feedback.Difference(one_sided=one_sided)
    result = case.gradient(1, mode, accumulate=accumulate)
    assert result.order == "losses"
    close(result, case.reference(1), 1e-4 if one_sided else 1e-6)
    close(case.gradient(1, mode, verify=True), case.reference(1), 1e-4 if one_sided else 1e-6)


class Targets(Weighed):
    """Signals of other kinds in the same loss.

    A bias of the outputs, and weights of a penalty on the weights.
    """

    def signal(
        self, teacher: nn.Module, batch: Any, outputs: Any, *, generator: Any
    ) -> metapl.Signal:
        table = teacher(batch[2])
        return metapl.Signal({"factor": table.exp(), "decay": table.sigmoid()})

    def inner_loss(
        self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None
    ) -> Tensor:
        assert isinstance(signal.value, dict)
        size = sum(p.square().sum() for p in params.values())
        ctc = Ctc().loss(outputs, batch[1])
        return signal.value["factor"] ** 2 * ctc + signal.value["decay"] * size / 10

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return Ctc().loss(outputs, batch[1]).mean()


def test_other_signals_and_losses_of_the_weights_are_right_by_difference() -> None:
    case = ctc_task(7)
    case.problem = Targets()
    (table,) = case.teacher.parameters()

    def loss_after(values: Tensor) -> float:
        student = copy.deepcopy(case.student)
        size = sum(p.square().sum() for p in student.parameters())
        losses = (
            values.exp() ** 2 * Ctc().loss(student(case.inner[0]), case.inner[1])
            + values.sigmoid() * size / 10
        )
        grads = torch.autograd.grad(losses.mean(), [*student.parameters()])
        with torch.no_grad():
            for p, g in zip(student.parameters(), grads, strict=True):
                p -= LEARNING_RATE * g
        return float(Ctc().loss(student(case.outer[0]), case.outer[1]).mean().detach())

    values = table.detach().view(-1)
    slopes = []
    for i in range(EXAMPLES):
        move = 1e-5 * F.one_hot(torch.tensor(i), EXAMPLES)
        slopes.append((loss_after(values + move) - loss_after(values - move)) / 2e-5)
    result = case.gradient(1, "difference")
    assert result.order == "losses"
    close(result, torch.tensor(slopes, dtype=torch.float64))


def test_a_training_of_ctc_verifies_and_comes_out() -> None:
    case = ctc_task(7)
    trainer = trainer_of(case, "difference", verify=True)
    reports = [trainer.step(outer=case.outer, inner=case.inner) for _ in range(6)]
    assert {report.order for report in reports} == {"losses"}
    assert reports[-1].outer_loss < reports[0].outer_loss
    assert trainer.verification.verdict.startswith("right")


# ----------------------------------------------------------------------------- what errors propose


def proposed(error: str, steps: int) -> tuple[Estimator | str, int]:
    """Return the mode that an error proposes, with its number of steps."""
    _, _, text = error.rstrip(".").rpartition("another operation, or ")
    number = 1 if "with one student step" in text else steps
    text = text.removesuffix(" with one student step")
    if text.startswith("mode"):
        return text.removeprefix("mode ").strip("'"), number
    return eval(text, {"ReinforcePerExample": ReinforcePerExample}), number


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "make", [ctc_task, lambda width: task(Opaque, width), lambda width: task(Translucent, width)]
)
@pytest.mark.parametrize(
    "mode", ["forward", "unrolled", "implicit", Forward(by="tangent"), Forward(by="graph")]
)
def test_a_proposal_runs(make: Any, mode: Any, steps: int) -> None:
    if mode == "implicit" and steps > 1:
        pytest.skip("it takes one step")
    case = make(6)
    try:
        case.gradient(steps, mode)
    except metapl.MetaplError as error:
        other, number = proposed(str(error), steps)
        assert all(g.isfinite().all() for g in case.gradient(number, other).grads.values())
    else:
        assert make is not ctc_task
        assert isinstance(mode, Forward) or mode == "forward"


@pytest.mark.parametrize("mode", ["forward", "unrolled", ReinforcePerExample()])
def test_a_proposal_for_sampled_labels_runs(mode: Any) -> None:
    torch.manual_seed(0)
    outer = torch.randn(5, 8), torch.arange(5) % 3
    inner = torch.randn(6, 8)
    teacher = nn.Linear(8, 3)
    student = Opaque(6)
    sgd = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)

    def gradient(mode: Any) -> None:
        metapl.hypergradient(
            teacher, student, outer=outer, inner=inner, inner_optimizer=sgd, mode=mode
        )

    with pytest.raises(metapl.MetaplError, match="Once lacks a derivative") as refusal:
        gradient(mode)
    other, _ = proposed(str(refusal.value), 1)
    gradient(other)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.long)])
def test_no_mode_is_proposed_where_there_is_none_to_choose(compile: bool) -> None:
    ids = torch.arange(40).view(8, 5) % 9
    y = torch.arange(8) % 3
    student = nn.Sequential(nn.EmbeddingBag(9, 4, mode="max"), nn.Linear(4, 3))
    sgd = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
    with pytest.raises(metapl.MetaplError, match="since attribute needs the second derivative"):
        metapl.attribute(
            student,
            (ids, y),
            (ids, y),
            optimizer=sgd,
            steps=2,
            batch_size=4,
            progress=False,
            compile=compile,
        )
    inner = metapl.Lookahead([(ids, y)] * 2)
    with pytest.raises(metapl.MetaplError, match=r"expected another operation\."):
        metapl.hypergradient(
            None,
            student,
            outer=(ids, y),
            inner=inner,
            problem=metapl.problems.EqualWeights(),
            inner_optimizer=sgd,
            wrt="lr",
        )


class NamedSquare(torch.autograd.Function):
    """A square whose context has an attribute that torch's node has too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.name = "square"
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


def test_a_function_may_keep_a_name_in_its_context() -> None:
    x = torch.ones(2, requires_grad=True)
    value = (NamedSquare.apply(x) ** 2).sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    refuse_once_differentiable([gradient], value)
