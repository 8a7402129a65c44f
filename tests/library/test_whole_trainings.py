"""Whole trainings on the pure road: one step and its adjoint, beside the eager road."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import reference
import test_long_paths
import torch
import torchopt
from captures import as_functions, without_inductor
from problems_zoo import Judged, product
from reference import error
from test_muon import muon_and_adamw
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import metapl
from metapl import Lookahead, MetaplError
from metapl.execution.state import trainable
from metapl.feedback import Forward, Unrolled
from metapl.functional import graphs
from metapl.functional.adjoint import TrainingStep
from metapl.problems import EqualWeights, MetaWeightNet, WeightNet
from metapl.updates import update_of

STEPS = 7
# torch.optim keeps the buffer as it is in a step whose momentum is 0.
RESTED = {"momentum": torch.tensor([[0.0], [0.9], [0.0], [0.8]])}
SGD = torch.optim.SGD
ADAMW = torch.optim.AdamW


def muon_beside_adamw(params: list[Any]) -> Any:
    """Return Muon for the matrices, and AdamW for the rest."""
    matrices = [p for p in params if p.ndim == 2]
    vectors = [p for p in params if p.ndim != 2]
    return torch.optim.Muon(matrices, lr=0.02), ADAMW(vectors, lr=0.01, eps=1e-3)


def sgd_in_groups(params: Any) -> torch.optim.Optimizer:
    """Return SGD with a param group for each parameter, and another rate for matrices."""
    groups: list[dict[str, Any]] = []
    for p in params:
        group: dict[str, Any] = {"params": [p]}
        if p.ndim > 1:
            group["lr"] = 0.02
        groups.append(group)
    return SGD(groups, lr=0.1, momentum=0.5)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "dampened": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3, weight_decay=1e-2),
    "adamw": lambda p: ADAMW(p, lr=0.01, eps=1e-3),
    "muon": lambda p: muon_beside_adamw([*p]),
    "groups": sgd_in_groups,
}


class Mixed(Judged):
    """The teacher mixes the student's inputs, so that the signal enters them."""

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Any
    ) -> metapl.Signal:
        return metapl.Signal(teacher(batch[0]).softmax(-1))

    def student_input(self, batch: Any, signal: Any = None) -> Tensor:
        x: Tensor = batch[0]
        if signal is None:
            return x
        mixed: Tensor = x * signal.value.sum(-1, keepdim=True)
        return mixed + 0.1 * signal.value.repeat(1, 2)

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1], reduction="none")

    def outer_input(self, batch: Any) -> Tensor:
        x: Tensor = batch[0]
        return x


def batch(number: int) -> tuple[Tensor, Tensor]:
    x, y = test_long_paths.batch(number)
    return x.double(), y


def network(*, drops: bool = True, frozen: bool = False) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(6, 16)
    first.weight.requires_grad_(not frozen)
    dropout = nn.Dropout(0.2 if drops else 0.0)
    layers = [first, nn.BatchNorm1d(16), nn.Tanh(), dropout, nn.Linear(16, 3)]
    return nn.Sequential(*layers).double()


def teacher_of(problem: Any) -> nn.Module | None:
    torch.manual_seed(1)
    if not problem.has_teacher:
        return None
    teacher = WeightNet() if isinstance(problem, MetaWeightNet) else nn.Linear(6, 3)
    return teacher.double()


PROBLEMS: dict[str, Callable[[], Any]] = {
    "weights": EqualWeights,
    "pseudo_labels": metapl.PseudoLabels,
    "reads_the_student": MetaWeightNet,
    "enters_the_input": Mixed,
}
KEEPS = {
    "all": Forward(keep_every=1),
    "every_third": Forward(keep_every=3),
    "host": Forward(keep_every=2, keep_on="cpu"),
    "truncated": Forward(truncate=3),
    "unrolled": Unrolled(),
}
# By pairs: optimizer, problem, way of keeping, clip, schedule, whether a layer is frozen.
ROWS = [
    ("sgd", "weights", "all", None, False, False),
    ("momentum", "pseudo_labels", "every_third", 0.5, True, True),
    ("nesterov", "reads_the_student", "host", None, True, False),
    ("dampened", "enters_the_input", "all", 0.5, False, True),
    ("adam", "weights", "every_third", 0.5, True, False),
    ("adamw", "pseudo_labels", "all", None, True, True),
    ("groups", "weights", "host", 0.5, True, True),
    ("adam", "enters_the_input", "truncated", None, False, False),
    ("adamw", "reads_the_student", "unrolled", 0.5, False, False),
    ("groups", "pseudo_labels", "truncated", None, False, False),
    ("muon", "weights", "all", None, False, False),
]


@pytest.fixture(autouse=True)
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the graphs as plain functions, where what they compute matters.

    A test whose name says so has them captured, or compiled by Inductor.
    """
    monkeypatch.setattr(graphs, "_CACHE", {})
    if "captured" in request.node.name:
        without_inductor(monkeypatch)
    elif "inductor" not in request.node.name:
        as_functions(monkeypatch)


def on_both_roads(
    problem: Any,
    optimizer: str,
    mode: Any,
    student: nn.Module,
    *,
    clip_norm: float | None = None,
    is_scheduled: bool = False,
) -> list[metapl.Hypergradient]:
    """Return the gradient by the eager road and by the two graphs.

    Both have to leave the generators in the same state.
    """
    teacher = teacher_of(problem)
    inner_optimizer = OPTIMIZERS[optimizer](student.parameters())
    settings = None
    if is_scheduled:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(inner_optimizer, 0.8)
        settings = metapl.scheduled_settings(scheduler, steps=STEPS)

    def inner_batch(number: int) -> Any:
        x, y = batch(number)
        return x if isinstance(problem, metapl.PseudoLabels) else (x, y)

    results: list[metapl.Hypergradient] = []
    generator_states: list[Tensor] = []
    for compile in (False, True):
        torch.manual_seed(5)
        result = metapl.hypergradient(
            teacher,
            student,
            outer=batch(-1),
            inner=Lookahead(inner_batch, steps=STEPS, settings=settings),
            inner_optimizer=inner_optimizer,
            problem=problem,
            mode=mode,
            clip_norm=clip_norm,
            compile=compile,
        )
        results.append(result)
        generator_states.append(torch.get_rng_state())
    assert torch.equal(generator_states[0], generator_states[1])
    return results


def assert_alike(
    eager: metapl.Hypergradient, compiled: metapl.Hypergradient, tolerance: float
) -> None:
    """Compare two gradients, with their losses and weights."""
    losses_eager = {"outer": eager.outer_loss, "inner": eager.inner_loss}
    losses_compiled = {"outer": compiled.outer_loss, "inner": compiled.inner_loss}
    assert error(losses_compiled, losses_eager) < tolerance
    assert error(compiled.student_params, eager.student_params) < tolerance
    feedback_eager = dict(enumerate(eager.feedback))
    feedback_compiled = dict(enumerate(compiled.feedback))
    assert error(feedback_compiled, feedback_eager) < tolerance
    assert compiled.grads.keys() == eager.grads.keys()
    assert not eager.grads or error(compiled.grads, eager.grads) < tolerance
    assert compiled.kept == eager.kept


# Weights that are made of the student's losses take these for constants.
@pytest.mark.filterwarnings("ignore:allowed.*made of the student's outputs")
@pytest.mark.parametrize(("optimizer", "problem", "keep", "clip", "schedule", "frozen"), ROWS)
@pytest.mark.parametrize("backend", ["plain", pytest.param("captured", marks=pytest.mark.long)])
def test_two_graphs_give_the_eager_gradient(
    backend: str,
    optimizer: str,
    problem: str,
    keep: str,
    clip: float | None,
    schedule: bool,
    frozen: bool,
) -> None:
    student = network(drops=problem != "enters_the_input", frozen=frozen)
    state_before = copy.deepcopy(student.state_dict())
    eager, pure = on_both_roads(
        PROBLEMS[problem](),
        optimizer,
        KEEPS[keep],
        student,
        clip_norm=clip,
        is_scheduled=schedule,
    )
    if keep == "unrolled":
        # On the eager road, double backward keeps its graph.
        pure = replace(pure, kept=eager.kept)
    assert_alike(eager, pure, 1e-9)
    assert error(state_before, student.state_dict()) == 0
    assert all(torch.equal(state_before[name], t) for name, t in student.state_dict().items())


@pytest.mark.parametrize(
    "momentum", [RESTED["momentum"], torch.full((4, 1), 0.9)], ids=["rested", "constant"]
)
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_a_buffer_is_that_of_torch_optim(dampening: float, momentum: Tensor) -> None:
    """A momentum of 0 leaves it as it is, and the first step has no dampening."""
    settings = {"momentum": momentum, "dampening": torch.full((4, 1), dampening)}
    eager, pure = (
        metapl.hypergradient(
            None,
            STUDENT,
            outer=batch(-1),
            inner=Lookahead(batch, steps=4, settings=settings),
            inner_optimizer=SGD(STUDENT.parameters(), lr=0.1),
            problem=PROBLEM,
            wrt=("lr", "dampening"),
            compile=compile,
        )
        for compile in (False, True)
    )
    assert_alike(eager, pure, 1e-9)
    assert error(pure.settings, eager.settings) < 1e-9


def test_truncation_leaves_zeros_in_the_shape_of_each_batch() -> None:
    batches = [tuple(t[:rows] for t in batch(rows)) for rows in (4, 6, 5, 8)]
    eager, pure = (
        metapl.hypergradient(
            None,
            STUDENT,
            outer=batch(-1),
            inner=Lookahead(batches),
            inner_optimizer=PLAIN,
            problem=PROBLEM,
            mode=Forward(truncate=2),
            compile=compile,
        )
        for compile in (False, True)
    )
    assert_alike(eager, pure, 1e-9)


def test_the_step_that_is_compared_is_one_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up begins with a rate of 0, by which h is 0 on both roads."""
    adjoint = TrainingStep.adjoint

    def adjoint_with_twice_h(*arguments: Any) -> Any:
        bars, h, *results = adjoint(*arguments)
        return bars, {name: 2 * t for name, t in h.items()}, *results

    graphs._CACHE.clear()
    monkeypatch.setattr(TrainingStep, "adjoint", adjoint_with_twice_h)
    with pytest.raises(MetaplError, match="off"):
        metapl.hypergradient(
            None,
            STUDENT,
            outer=batch(-1),
            inner=Lookahead(batch, steps=3, settings={"lr": 0.1 * torch.arange(3.0)[:, None] / 3}),
            inner_optimizer=SGD(STUDENT.parameters(), lr=0.1),
            problem=EqualWeights(),
            compile=True,
        )


class Tasks(nn.Module):
    """A head for the batches of each task."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(6, 3) for name in ("a", "b")}).double()

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return sum(self.heads[name](t) for name, t in x.items())  # type: ignore[return-value]


LATE_DECAY = {"weight_decay": torch.tensor([[0.0], [1e-6]])}


@pytest.mark.parametrize(
    ("tasks", "decay", "settings"), [("ab", 0.0, None), ("aa", 1e-6, None), ("aa", 0, LATE_DECAY)]
)
def test_weights_that_some_batches_do_not_reach_stay(
    tasks: str, decay: float, settings: Any
) -> None:
    """Neither momentum nor decay moves them, as in torch.optim."""
    student = Tasks()
    x, y = batch(0)
    eager, compiled = (
        metapl.hypergradient(
            None,
            student,
            outer=({"a": x, "b": x}, y),
            inner=Lookahead([({task: x}, y) for task in tasks], settings=settings),
            inner_optimizer=SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=decay),
            problem=PROBLEM,
            wrt=("start",),
            compile=compile,
        )
        for compile in (False, True)
    )
    assert_alike(eager, compiled, 1e-9)
    if tasks == "aa":
        assert torch.equal(compiled.student_params["heads.b.weight"], student.heads["b"].weight)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_gives_the_eager_gradient_and_keeps_its_graphs() -> None:
    problem = EqualWeights()
    student = network()
    if torch.__version__ < TorchVersion("2.12"):
        # Inductor draws other masks there behind a batch norm.
        with pytest.raises(metapl.MetaplError, match="below torch 2.12"):
            on_both_roads(problem, "momentum", Forward(keep_every=2), student)
        student = network(drops=False)
        graphs._CACHE.clear()
    eager, compiled = on_both_roads(problem, "momentum", Forward(keep_every=2), student)
    assert_alike(eager, compiled, 1e-9)
    cached = [*graphs._CACHE.values()]
    assert len(cached) == 1
    # Paths of other lengths are taken by the same graphs.
    for steps in (3, 5):
        metapl.hypergradient(
            None,
            student,
            outer=batch(-1),
            inner=Lookahead(batch, steps=steps),
            inner_optimizer=OPTIMIZERS["momentum"](student.parameters()),
            problem=problem,
            compile=True,
        )
    assert [*graphs._CACHE.values()] == cached


@dataclass(frozen=True, slots=True)
class Slotted(EqualWeights):
    power: float = 0.0


def test_graphs_are_found_again_by_the_numbers_of_a_problem() -> None:
    student = network()
    update: Any = update_of(SGD(student.parameters(), lr=0.1), trainable(student))

    def graphs_for(problem: Any) -> Any:
        return graphs.graphs_of(
            None, student, problem, update, clip_norm=None, in_settings=False, several=False
        )

    assert graphs_for(EqualWeights()) is graphs_for(EqualWeights())
    warm = EqualWeights()
    warm.temperature = 2.0
    graphs_of_warm = graphs_for(warm)
    warm.temperature = 3.0
    assert graphs_for(warm) is not graphs_of_warm
    # vars() does not show what has slots.
    assert graphs_for(Slotted(2.0)) is not graphs_for(Slotted(3.0))


# One student and one problem, so that tests share a compilation.
STUDENT = network(drops=False)
PROBLEM = EqualWeights()
WEIGHTS = [*STUDENT.parameters()]
RATES = torch.full((STEPS, 1), 0.1)
PLAIN = SGD(WEIGHTS, lr=0.1, momentum=0.9)


def odd(bad: float = 0.0, steps: Sequence[int] = (2,)) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return a function of batches of which some are another one each time, or not finite."""
    calls = itertools.count(1)

    def odd_batch(number: int) -> tuple[Tensor, Tensor]:
        x, y = batch(number)
        if number in steps:
            x = x + (bad or next(calls))
        return x, y

    return odd_batch


def lookahead(
    batches: Any = batch, settings: Any = None, steps: int | None = STEPS
) -> dict[str, Any]:
    return {"inner": Lookahead(batches, steps=steps, settings=settings)}


def betas_of_adam(*betas: float) -> dict[str, Any]:
    settings = {"betas": torch.tensor(betas).expand(STEPS, 1, 2)}
    return {"inner_optimizer": torch.optim.Adam(WEIGHTS), **lookahead(settings=settings)}


EAGER: dict[str, Any] = {"compile": False}
COMPILED: dict[str, Any] = {"compile": True}
SHAPED = Forward(normalization="learning_rate")
RATES_OF_TWO_GROUPS = {"lr": RATES.expand(-1, 2)}
BETAS = {"betas": RATES[..., None].expand(-1, -1, 2)}
NAN = torch.nan
# By what is wrong: a word of the error, and the arguments.
WRONG: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "unknown name": ("expected", lambda: {"wrt": "lrr"}),
    "no such setting": ("betas", lambda: {"wrt": ["start", "betas"]}),
    "a setting of a transform": ("lr", lambda: {"wrt": "lr", "inner_optimizer": torchopt.sgd(0.1)}),
    "an unknown setting": ("lrr", lambda: lookahead(settings={"lrr": RATES})),
    "settings that end": ("shape", lambda: lookahead(settings={"lr": RATES[1:]})),
    "rates of two groups": ("settings", lambda: lookahead(settings=RATES_OF_TWO_GROUPS)),
    "betas of SGD": ("settings", lambda: lookahead(settings=BETAS)),
    "another batch": ("for step 2", lambda: lookahead(odd())),
    "always another batch": ("for step 0", lambda: lookahead(odd(steps=range(STEPS)))),
    "NaN": (r"inner\[2\].*NaN", lambda: lookahead(odd(NAN))),
    "NaN in the first step": (r"inner\[0\].*NaN", lambda: lookahead([odd(NAN)(2)] * STEPS)),
    "a negative rate": (
        "'lr' with -0.1; expected 0 or more",
        lambda: lookahead(settings={"lr": torch.full((STEPS, 1), -0.1)}),
    ),
    "a beta of 1": (
        "'betas' with 1; expected 0 or more and below 1",
        lambda: betas_of_adam(0.9, 1.0),
    ),
    "a first beta of 1": ("'betas' with 1; expected 0 or more", lambda: betas_of_adam(1.0, 0.9)),
    "a negative beta": ("'betas' with -0.1; expected 0 or more", lambda: betas_of_adam(0.9, -0.1)),
    "a rate of NaN": (
        "'lr' with nan; expected 0 or more",
        lambda: lookahead(settings={"lr": torch.full((STEPS, 1), NAN)}),
    ),
    "NaN in the outer batch": (
        "outer inputs: .* rows have NaN",
        lambda: {"outer": odd(NAN)(2)},
    ),
    "a start without a gradient": ("wrt", lambda: {"wrt": "start", "mode": "none", **EAGER}),
    "a momentum of 0": (
        "wrt",
        lambda: {"wrt": "momentum", "inner_optimizer": SGD(WEIGHTS, lr=0.1), **EAGER},
    ),
    "a momentum that rests": (
        "wrt",
        lambda: {
            "wrt": "momentum",
            "mode": Unrolled(),
            **lookahead(settings=RESTED, steps=3),
            **EAGER,
        },
    ),
    "two graphs of no gradient": ("compile", lambda: {"mode": "none", **COMPILED}),
    "two graphs of h that is shaped": ("compile", lambda: {"mode": SHAPED, **COMPILED}),
    "two graphs of micro-batches": ("compile", lambda: {"accumulate": 2, **COMPILED}),
    "two graphs of a transform": (
        "compile",
        lambda: {"inner_optimizer": torchopt.sgd(0.1), **COMPILED},
    ),
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line_and_nothing_moves(case: str, compile: bool) -> None:
    word, change = WRONG[case]
    right: Any = {"outer": batch(-1), "problem": PROBLEM, "inner_optimizer": PLAIN}
    if compile:
        # The graphs are compared before: the comparison would meet a NaN before the path does.
        metapl.hypergradient(None, STUDENT, inner=Lookahead(batch, steps=1), compile=True, **right)
    weights_before = copy.deepcopy(STUDENT.state_dict())
    generator_before = torch.get_rng_state()
    arguments: Any = {
        **right,
        "inner": Lookahead(batch, steps=STEPS),
        "mode": Forward(keep_every=3),
        "compile": compile,
        **change(),
    }
    with pytest.raises(MetaplError, match=word) as raised:
        metapl.hypergradient(None, STUDENT, **arguments)
    assert "\n" not in str(raised.value)
    assert error(weights_before, STUDENT.state_dict()) == 0
    assert torch.equal(generator_before, torch.get_rng_state())


# Of each param group; a group does not read those that it has not.
SETTINGS: dict[str, dict[str, list[Any]]] = {
    "momentum": {"lr": [0.1], "momentum": [0.9], "weight_decay": [0.0]},
    "adam": {"lr": [0.01], "betas": [(0.9, 0.99)], "eps": [1e-3], "weight_decay": [0.0]},
    "muon": {
        "lr": [0.02, 0.01],
        "momentum": [0.95, 0.0],
        "weight_decay": [0.1, 0.1],
        "betas": [(0.0, 0.0), (0.9, 0.99)],
        "eps": [0.0, 1e-3],
    },
}


def rule_of(optimizer: str, settings: list[dict[str, Tensor]]) -> reference.Rule:
    """Return the rule with the settings of its param groups as tensors."""
    if optimizer == "adam":
        return reference.adam(**settings[0])
    if optimizer != "muon":
        return reference.sgd(**settings[0])
    muon = settings[0]
    adamw = {name: t for name, t in settings[1].items() if name != "momentum"}
    return muon_and_adamw(
        muon["lr"], muon["momentum"], muon["weight_decay"], nesterov=True, adamw=adamw
    )


def by_hand(
    student: nn.Module, optimizer: str, settings: dict[str, Tensor], steps: int
) -> tuple[Tensor, Any]:
    """Return L(θ_K) of steps on cross-entropy, and θ_0, both in the graph."""
    start = reference.weights(student)
    theta = start
    state = None

    def loss(number: int) -> Tensor:
        x, y = batch(number)
        return nn.functional.cross_entropy(reference.outputs_at(student, theta, x), y)

    groups = range(settings["lr"].shape[1])
    for k in range(steps):
        in_step = [{name: t[k, group] for name, t in settings.items()} for group in groups]
        theta, state = reference.stepped(loss(k), theta, rule_of(optimizer, in_step), state)
    return loss(-1), start


MODES = [Forward(keep_every=2), Forward(), Unrolled()]


@pytest.mark.parametrize(
    ("optimizer", "mode", "steps", "backend"),
    product(SETTINGS, MODES, [1, 5], ["eager", "plain"], usual=[*SETTINGS, MODES[0], 5, "plain"])
    + product(SETTINGS, MODES, [1, 5], ["captured"], usual=[]),
)
def test_the_gradient_in_the_start_and_in_settings_is_that_by_double_backward(
    optimizer: str, mode: Any, steps: int, backend: str
) -> None:
    student = network(drops=False)
    settings: dict[str, Tensor] = {}
    for name, values in SETTINGS[optimizer].items():
        # (groups,) or (groups, 2)
        t = torch.tensor(values, dtype=torch.float64)
        falling = torch.linspace(1.0, 0.8, steps, dtype=torch.float64).view(-1, *[1] * t.ndim)
        settings[name] = (falling * t).requires_grad_()
    L, start = by_hand(student, optimizer, settings, steps)
    expected = torch.autograd.grad(
        L, [*start.values(), *settings.values()], allow_unused=True, materialize_grads=True
    )
    result = metapl.hypergradient(
        None,
        student,
        outer=batch(-1),
        inner=Lookahead(batch, steps=steps, settings=settings),
        inner_optimizer=OPTIMIZERS[optimizer](student.parameters()),
        problem=EqualWeights(),
        mode=mode,
        compile=backend != "eager",
        wrt=["start", *settings],
    )
    by_name = dict(zip([*start, *settings], expected, strict=True))
    assert result.settings["lr"].shape == settings["lr"].shape
    assert error(result.start, {name: by_name[name] for name in start}) < 1e-7
    for name in settings:
        gap = (result.settings[name] - by_name[name]).abs().max()
        assert gap <= 1e-7 * by_name[name].abs().max() + 1e-12, name


def test_the_momentum_at_zero_is_a_setting_of_compiled_steps_alone() -> None:
    """Eager steps keep no buffer there; and verification, which is eager, asks for no setting."""
    student = network(drops=False)
    options: dict[str, Any] = {
        "outer": batch(0),
        "inner": Lookahead([batch(number) for number in range(1, 4)]),
        "problem": EqualWeights(),
        "wrt": "momentum",
    }

    def gradient(momentum: float, **others: Any) -> metapl.Hypergradient:
        optimizer = SGD(student.parameters(), lr=0.1, momentum=momentum)
        return metapl.hypergradient(None, student, inner_optimizer=optimizer, **options, **others)

    found = gradient(0.0, compile=True).settings["momentum"].sum()
    h = 1e-6
    ends = [gradient(momentum, compile=True).outer_loss for momentum in (h, 0.0)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / h, rtol=1e-4, atol=1e-8)
    with pytest.raises(MetaplError, match="momentum=0, which keeps no buffer"):
        gradient(0.0)
