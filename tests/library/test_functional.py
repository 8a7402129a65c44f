"""A step as a function beside the eager one: h, both gradients, the next state; stacked too."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torchopt
from captures import without_inductor
from problems_zoo import Judged, product
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import metapl
from metapl import UDA, CrossEntropy, MetaplError, Signal
from metapl.core.lookahead import InnerBatches
from metapl.execution.numerics import as_real
from metapl.feedback import (
    Difference,
    Forward,
    LossDifference,
    Reinforce,
    ReinforcePerExample,
    Unrolled,
)
from metapl.functional import stack, unstack
from metapl.functional.compared_step import eager_step
from metapl.functional.state import State
from metapl.problems.base import gumbel

CLASSES = 3
WIDE = 5
ROWS = 6
MODES = [
    "forward",
    "unrolled",
    "difference",
    "reinforce",
    "reinforce_per_example",
    "loss_difference",
    "none",
]


def muon_and_adamw(params: list[Any]) -> Any:
    """Return Muon for the matrices, those of two groups at two rates, and AdamW for the others."""
    groups = [entry if isinstance(entry, dict) else {"params": [entry]} for entry in params]

    def part(*, of_matrices: bool) -> list[Any]:
        parts = []
        for group in groups:
            fitting = [p for p in group["params"] if (p.ndim == 2) == of_matrices]
            if fitting:
                parts.append({**group, "params": fitting})
        return parts

    muon = torch.optim.Muon(part(of_matrices=True), lr=0.1)
    return muon, torch.optim.AdamW(part(of_matrices=False), lr=0.02)


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "muon_and_adamw": muon_and_adamw,
}
FEATURES = [
    "plain",
    "batch_norm",
    "dropout",
    "groups",
    "frozen",
    "signal_in_input",
    "uda",
    "clip",
    "reads_weights",
]


class Entering(Judged):
    """A signal that enters the student's input, and its loss."""

    def student_input(self, batch: Any, signal: Any) -> Any:
        return batch + 0.3 * signal.value.repeat(1, 2)[:, :WIDE]

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Any
    ) -> Signal:
        return Signal(teacher(batch).tanh())

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return (outputs - signal.value).square().mean(1)


class Penalized(metapl.PseudoLabels):
    """An inner loss that reads the student's weights."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        penalty = sum(p.square().sum() for p in params.values())
        return super().inner_loss(outputs, signal, batch) + 0.1 * penalty * (1 + outputs.mean(1))


def network(*features: str) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(WIDE, 8, bias=False)]
    if "batch_norm" in features:
        layers.append(nn.BatchNorm1d(8))
    if "dropout" in features:
        layers.append(nn.Dropout(0.3))
    module = nn.Sequential(*layers, nn.Tanh(), nn.Linear(8, CLASSES)).double()
    if "frozen" in features:
        module[0].weight.requires_grad_(requires_grad=False)
    return module


def weights(module: nn.Module, *features: str) -> list[Any]:
    """Return what an optimizer takes: the trained weights, or two groups of them."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    if "groups" in features:
        return [{"params": trainable[:1], "lr": 0.05}, {"params": trainable[1:]}]
    return trainable


def build(
    mode: Any, optimizer: str = "nesterov", *features: str, **options: Any
) -> metapl.BilevelTrainer:
    torch.manual_seed(0)
    teacher = network(*features)
    student = network(*features)
    if "signal_in_input" in features:
        options["problem"] = Entering()
    if "reads_weights" in features:
        options["problem"] = Penalized()
    if "uda" in features:
        uda = UDA(temperature=0.5, threshold=0.2, ramp=7)
        options["teacher_losses"] = (CrossEntropy(label_smoothing=0.1), uda)
    if "clip" in features:
        options["clip_norm"] = 0.05
    build_optimizer = OPTIMIZERS[optimizer]
    defaults = {
        "verify": False,
        "inner_optimizer": build_optimizer(weights(student, *features)),
        "outer_optimizer": build_optimizer(weights(teacher, *features)),
    }
    return metapl.BilevelTrainer(teacher, student, mode, **{**defaults, **options})


def batches(*features: str, seed: int = 1) -> tuple[Any, Any]:
    """Return an outer and an inner batch; for UDA the inner one has two views."""
    generator = torch.Generator().manual_seed(seed)

    def inputs() -> Tensor:
        return torch.randn(ROWS, WIDE, dtype=torch.float64, generator=generator)

    outer = inputs(), torch.arange(ROWS) % CLASSES
    weak = inputs()
    if "uda" in features:
        return outer, (weak, inputs())
    return outer, weak


def error(tree: Any, expected: Any) -> float:
    """Return the norm of the difference of two trees over that of the second."""
    a = entries(tree)
    b = entries(expected)
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def entries(tree: Any) -> Tensor:
    """Return all numbers of a tree in one vector; a zero first, since a tree may have none."""
    zero = torch.zeros(1, dtype=torch.float64)
    leaves = [as_real(t).double().flatten() for t in pytree.tree_leaves(tree)]
    return torch.cat([zero, *leaves])


def but_for_bfloat16(a: Any, b: Any) -> tuple[Any, Any]:
    """Return what Muon does not round, of two steps; what it rounds is compared here.

    Its momentum has here two directions of three, and noise in the third.
    """
    assert error(a[0], b[0]) < 0.1
    exact = []
    for state, report in (a, b):
        exact.append((state.inner.state, state.outer.state, report.feedback))
    return exact[0], exact[1]


def trees(state: State) -> dict[str, Any]:
    return {
        "teacher's network": state.teacher,
        "teacher's state": state.outer.state,
        "student's network": state.student,
        "student's state": state.inner.state,
    }


def agree(
    trainer: metapl.BilevelTrainer,
    data: tuple[Any, Any],
    tolerance: float,
    is_lookahead: bool = False,
) -> None:
    """Compare one step by both roads, from the same generator."""
    outer, inner = data
    if is_lookahead:
        inner_batches = InnerBatches(list(inner), is_lookahead=True)
    else:
        inner_batches = InnerBatches.of_one_step(inner)
    torch.manual_seed(3)
    eager_state, eager_report = eager_step(trainer, outer, inner_batches)
    step, state = trainer.functional()
    state, report = step(state, outer, tuple(inner_batches) if is_lookahead else inner)
    assert error(report.feedback, eager_report.feedback) < tolerance
    assert error(report.student_outputs, eager_report.student_outputs) < 1e-12
    for name, tree in trees(eager_state).items():
        assert error(trees(state)[name], tree) < tolerance, name
    eager_numbers = eager_report.as_dict()
    for name in ("inner_loss", "outer_loss", "teacher_loss", "step_rounding"):
        if name in eager_numbers:
            assert float(getattr(report, name)) == pytest.approx(eager_numbers[name], rel=1e-9)
    assert float(report.flag) < tolerance
    assert int(state.step) == int(eager_state.step)


class Noisy(nn.Module):
    """Noise in a forward, without a part that says so."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def fits(mode: str, feature: str) -> bool:
    """Return whether a mode is compared on this feature.

    Shifted passes of a difference would draw masks of their own, and are refused; signals in the
    input are for few modes.
    """
    if feature == "signal_in_input":
        return mode in ("forward", "unrolled", "none")
    return (mode, feature) != ("difference", "dropout")


USUAL = ("forward", "reinforce_per_example", "nesterov", "plain")


def is_meaningful(mode: str, optimizer: str, feature: str) -> bool:
    if optimizer != "muon_and_adamw":
        return fits(mode, feature)
    # From its first step on, Algorithm 1's scalar ⟨w, g⟩ of Muon, which knows no length of g, is
    # rounding alone.
    return mode != "reinforce" and feature in ("plain", "groups", "frozen", "clip")


def table() -> list[Any]:
    """Return the rows; one that is unusual in more than one thing is a long one."""
    rows = []
    for row in itertools.product(MODES, OPTIMIZERS, FEATURES):
        if is_meaningful(*row):
            unusual = [value for value in row if value not in USUAL]
            marks = [pytest.mark.long] if len(unusual) > 1 else []
            rows.append(pytest.param(*row, marks=marks))
    return rows


@pytest.mark.parametrize(("mode", "optimizer", "feature"), table())
def test_a_pure_step_is_the_eager_step(mode: str, optimizer: str, feature: str) -> None:
    """From fresh optimizers, and from warm ones."""
    trainer = build(mode, optimizer, feature, verify=False)
    data = batches(feature)
    tolerance = 1e-6 if mode == "difference" else 1e-9
    agree(trainer, data, tolerance)
    trainer.step(*data)
    agree(trainer, batches(feature, seed=2), tolerance)


OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    (Forward(normalization="learning_rate"), {}),
    (Forward(normalization="cosine"), {"feedback_weight": 3.0}),
    ("forward", {"problem": metapl.PseudoLabels("hard", label_smoothing=0.1)}),
    (Difference(one_sided=True), {}),
    (Reinforce(baseline=0.9), {}),
    (Reinforce(similarity="cosine"), {}),
    (LossDifference(baseline=0.5, normalization="learning_rate"), {}),
    (ReinforcePerExample(tangent="difference", normalization="cosine"), {}),
    ("none", {"teacher_losses": ()}),
    ("forward", {"teacher_losses": ()}),
]


@pytest.mark.parametrize(("mode", "options"), OPTIONS)
def test_options_of_modes_and_trainers(mode: Any, options: dict[str, Any]) -> None:
    trainer = build(mode, **options)
    data = batches()
    tolerance = 1e-5 if "ifference" in repr(mode) else 1e-9
    for seed in (2, 3):
        trainer.step(*data)
        data = batches(seed=seed)
        agree(trainer, data, tolerance)


@pytest.mark.parametrize(
    ("mode", "optimizer"),
    product(
        ["forward", "unrolled", "none", Unrolled(truncate=1)],
        ["nesterov", "adamw", "muon_and_adamw"],
        usual=["unrolled", "adamw"],
    ),
)
def test_several_steps_ahead(mode: Any, optimizer: str) -> None:
    trainer = build(mode, optimizer, "batch_norm", lookahead=3)
    outer, _ = batches()
    inner = tuple(batches(seed=seed)[1] for seed in range(3))
    agree(trainer, (outer, inner), 1e-9, is_lookahead=True)
    trainer.step(outer, metapl.Lookahead(list(inner)))
    agree(trainer, (outer, inner), 1e-9, is_lookahead=True)


@pytest.mark.parametrize("lookahead", [1, 2])
def test_inner_batches_are_as_many_as_the_student_steps(lookahead: int) -> None:
    trainer = build("unrolled", "nesterov", "batch_norm", lookahead=lookahead)
    step, state = trainer.functional()
    outer, inner = batches()
    words = f"of {lookahead} student steps was given 3 inner batches; .* lookahead=3"
    with pytest.raises(MetaplError, match=words):
        step(state, outer, metapl.Lookahead([inner] * 3))
    _, report = step(state, outer, metapl.Lookahead([inner] * lookahead))
    assert torch.isfinite(report.inner_loss)


def test_a_problem_without_a_teacher_revises_its_signal() -> None:
    student = network("batch_norm")
    inner = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    problem = metapl.problems.LearningToReweight()
    trainer = metapl.BilevelTrainer(
        None, student, "forward", problem=problem, inner_optimizer=inner
    )
    (x, y), u = batches()
    agree(trainer, ((x, y), (u, y)), 1e-9)


class Sharpened(metapl.problems.PseudoLabels):
    """The student's real step is on the soft labels after a step along the feedback."""

    def revised_signal(self, signal: Signal, h: Tensor) -> Signal:
        return Signal((signal.value + 0.5 * h).softmax(-1))


def test_a_teacher_gets_the_feedback_on_its_own_signal_and_not_on_the_revised_one() -> None:
    teacher = network()
    trainer = metapl.BilevelTrainer(teacher, network("tanh"), "forward", problem=Sharpened())
    weights_before = [p.detach().clone() for p in teacher.parameters()]
    outer, inner = batches()
    agree(trainer, (outer, inner), 1e-9)
    step, state = trainer.functional()
    state, _ = step(state, outer, inner)
    assert not all(map(torch.equal, weights_before, state.teacher.params.values()))


@pytest.mark.parametrize("draws", [nn.Dropout(0.4), Noisy()])
@pytest.mark.parametrize("mode", ["difference", ReinforcePerExample(tangent="difference")])
def test_differences_of_a_student_that_draws_are_refused(
    mode: Any, draws: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes at other weights would draw other masks, by which h was a million times too large."""
    without_inductor(monkeypatch)
    x, y, u = torch.randn(8, 4), torch.arange(8) % 3, torch.randn(12, 4)
    teacher = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.4))
    for compiles in (False, True):
        student = nn.Sequential(nn.Linear(4, 6), draws, nn.Linear(6, 3))
        trainer = metapl.BilevelTrainer(teacher, student, mode, compile=compiles)
        take_step: Any = trainer.step
        if not compiles:
            step, state = trainer.functional()
            take_step = partial(step, state)
        with pytest.raises(MetaplError, match="student that draws, as dropout does .* 'forward'"):
            take_step((x, y), u)


def test_a_loss_that_begins_later_moves_no_statistics_before() -> None:
    """Recorded, its pass is taken in each step, at a weight of 0 at first."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    student = nn.Linear(4, 3).double()
    trainer = metapl.BilevelTrainer(
        teacher, student, teacher_losses=(CrossEntropy(), UDA(start=2)), verify=False
    )
    step, state = trainer.functional()
    labeled = torch.randn(8, 4).double(), torch.arange(8) % 3
    for _ in range(4):
        views = torch.randn(6, 4).double(), torch.randn(6, 4).double()
        state, report = step(state, labeled, views)
        trainer.step(labeled, views)
        assert report.flag == 0
        for name, b in teacher.named_buffers():
            torch.testing.assert_close(state.teacher.state[name], b)


def test_two_losses_in_half_precision_are_refused_by_name() -> None:
    trainer = metapl.BilevelTrainer(
        network(), network("tanh"), "loss_difference", precision="bfloat16"
    )
    with pytest.raises(MetaplError, match='loss_difference with precision="bfloat16"; expected'):
        trainer.functional()


@pytest.mark.parametrize("mode", ["forward", "unrolled", "loss_difference"])
def test_attention_runs_pure_by_kernels_that_have_second_derivatives_with_the_eager_masks(
    mode: str,
) -> None:
    """An encoder layer gives one of its dropouts a transposed tensor."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
    student = nn.Sequential(
        nn.Linear(WIDE, 12), nn.Unflatten(1, (3, 4)), layer, nn.Flatten(), nn.Linear(12, CLASSES)
    )
    agree(metapl.BilevelTrainer(network(), student.double(), mode), batches(), 1e-9)


class Modulus(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0j).abs()


@pytest.mark.parametrize("mode", ["forward", "difference", "reinforce"])
def test_complex_weights_run_pure(mode: str) -> None:
    student = Modulus(WIDE, CLASSES, dtype=torch.complex128)
    trainer = metapl.BilevelTrainer(network(), student, mode)
    agree(trainer, batches(), 1e-6 if mode == "difference" else 1e-9)


@pytest.mark.parametrize(
    "build_transform", [lambda: torchopt.sgd(0.2, momentum=0.9), lambda: torchopt.adamw(0.02)]
)
def test_a_transform_of_torchopt_runs_pure(build_transform: Any) -> None:
    student = network()
    teacher = network()
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        "forward",
        inner_optimizer=build_transform(),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.1),
    )
    agree(trainer, batches(), 1e-9)
    trainer.step(*batches())
    agree(trainer, batches(seed=2), 1e-9)


def test_a_transform_that_hides_state_is_refused() -> None:
    earlier_gradients: list[Any] = []

    def update(grads: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        earlier_gradients.append(grads)
        rate = 0.1 / len(earlier_gradients)
        return {name: -rate * g for name, g in grads.items()}, state

    transform = torchopt.base.GradientTransformation(lambda params: (), update)
    trainer = metapl.BilevelTrainer(network(), network(), "forward", inner_optimizer=transform)
    with pytest.raises(MetaplError, match="hidden"):
        trainer.functional()


def test_a_ratio_is_that_of_the_gradients_of_feedback_and_own_losses() -> None:
    def gradient(**options: Any) -> Tensor:
        """Return what one step of SGD takes from the teacher's weights."""
        trainer = build("forward", "sgd", **options)
        step, start = trainer.functional()
        end, _ = step(start, *batches())
        differences = []
        for name, p in start.teacher.params.items():
            differences.append((p - end.teacher.params[name]).flatten())
        return torch.cat(differences)

    of_losses = gradient(feedback_weight=0.0)
    of_feedback = gradient() - of_losses
    expected = of_losses + 0.5 * of_losses.norm() / of_feedback.norm() * of_feedback
    assert error(gradient(feedback_ratio=0.5), expected) < 1e-9


def noise_of(seed: int) -> Tensor:
    like = torch.zeros((), dtype=torch.float64)
    return gumbel(ROWS, CLASSES, like, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("mode", "optimizer"),
    product(
        MODES,
        ("nesterov", "adamw", "muon_and_adamw"),
        usual=["forward", "reinforce_per_example", "adamw"],
    ),
)
def test_stacked_steps_are_single_ones(mode: str, optimizer: str) -> None:
    """The states differ in everything, and each has data and noise of its own."""
    data = [batches(seed=seed) for seed in range(3)]
    noises = [noise_of(seed) for seed in range(3)]
    step, state = build(mode, optimizer, "batch_norm", "clip").functional()
    # These are the states after 0, 1 and 2 steps.
    states = []
    for number in range(3):
        states.append(state)
        state, _ = step(state, *data[number], noises[number])
    singles = []
    for number in range(3):
        singles.append(step(states[number], *data[number], noises[number]))
    stacked = torch.func.vmap(step)(stack(states), *stack(data), torch.stack(noises))
    tolerance = 1e-6 if mode == "difference" else 1e-12
    for a, b in zip(unstack(stacked), singles, strict=True):
        if mode == "none":
            a = without_outer_loss(*a)
            b = without_outer_loss(*b)
        if optimizer == "muon_and_adamw":
            a, b = but_for_bfloat16(a, b)
            # Algorithm 1's scalar of Muon is rounding alone, as is_meaningful says.
            if mode == "reinforce":
                continue
        assert error(a, b) < tolerance


def without_outer_loss(state: Any, report: Any) -> tuple[Any, Any]:
    """Return a step of the mode ``none``, which computes no outer loss, with the flag for it."""
    return state, report._replace(outer_loss=report.flag)
