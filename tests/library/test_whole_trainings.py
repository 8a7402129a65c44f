"""Whole trainings on the pure road: one step and its adjoint, beside the eager road."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import test_long_paths
import torch
import torchopt
from problems_zoo import Judged, product
from reference import error
from test_muon import muon_and_adamw
from torch import Tensor, nn

import metapl
from metapl import Lookahead, MetaplError
from metapl.execution.state import trainable
from metapl.feedback import Forward, Unrolled
from metapl.functional import compiled, graphs
from metapl.problems import EqualWeights, MetaWeightNet, WeightNet
from metapl.updates import update_of

STEPS = 7
RESTED = {
    "momentum": torch.tensor([[0.0], [0.9], [0.0], [0.8]])
}  # torch.optim keeps the buffer where it is 0
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


def of_kinds(params: list[Any]) -> Any:
    """Muon for the matrices, AdamW for the rest."""
    matrices, others = ([p for p in params if (p.ndim == 2) == which] for which in (True, False))
    return torch.optim.Muon(matrices, lr=0.02), ADAMW(others, lr=0.01, eps=1e-3)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "dampened": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3, weight_decay=1e-2),
    "adamw": lambda p: ADAMW(p, lr=0.01, eps=1e-3),
    "muon": lambda p: of_kinds([*p]),
    "groups": lambda p: SGD(
        [{"params": [q]} | ({"lr": 0.02} if q.ndim > 1 else {}) for q in p], lr=0.1, momentum=0.5
    ),
}


class Mixed(Judged):
    """The teacher mixes the student's inputs, so that the signal enters them."""

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Any
    ) -> metapl.Signal:
        return metapl.Signal(teacher(batch[0]).softmax(-1))

    def student_input(self, batch: Any, signal: Any = None) -> Tensor:
        x: Tensor = batch[0]
        return (
            x
            if signal is None
            else x * signal.value.sum(-1, keepdim=True) + 0.1 * signal.value.repeat(1, 2)
        )

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
    made = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2 * drops), nn.Linear(16, 3)
    )
    made[0].weight.requires_grad_(not frozen)
    return made.double()


def teacher_of(problem: Any) -> nn.Module | None:
    torch.manual_seed(1)
    if problem is not None and not problem.has_teacher:
        return None
    return (WeightNet() if isinstance(problem, MetaWeightNet) else nn.Linear(6, 3)).double()


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
    """As plain functions, where what they compute matters.

    Captured, or by Inductor, where a test's name says so.
    """
    monkeypatch.setattr(graphs, "_CACHE", {})
    if "captured" in request.node.name:
        monkeypatch.setattr(compiled, "backend_of", lambda device: {"backend": "aot_eager"})
    elif "inductor" not in request.node.name:
        monkeypatch.setattr(torch, "compile", lambda function, **how: function)


def both(
    problem: Any, optimizer: str, mode: Any, student: nn.Module, **given: Any
) -> list[metapl.Hypergradient]:
    """The gradient by the eager road and by the two graphs, and the generators where each leaves them."""
    inner, teacher, found = OPTIMIZERS[optimizer](student.parameters()), teacher_of(problem), []
    inputs = (
        (lambda pair: pair[0]) if isinstance(problem, metapl.PseudoLabels) else (lambda pair: pair)
    )
    scheduled = (
        torch.optim.lr_scheduler.ExponentialLR(inner, 0.8) if given.pop("schedule", False) else None
    )
    for compile in (False, True):
        torch.manual_seed(5)
        ahead = Lookahead(
            lambda k: inputs(batch(k)), steps=given.get("steps", STEPS), schedule=scheduled
        )
        more: Any = {
            "clip_norm": given.get("clip_norm"),
            "mode": mode,
            "problem": problem,
            "compile": compile,
        }
        more |= {"outer": batch(-1), "inner": ahead, "inner_optimizer": inner}
        found.append((metapl.hypergradient(teacher, student, **more), torch.get_rng_state()))
    assert torch.equal(found[0][1], found[1][1])
    return [result for result, _ in found]


def compared(eager: metapl.Hypergradient, pure: metapl.Hypergradient, most: float) -> None:
    assert (
        error(
            {"L": pure.outer_loss, "l": pure.inner_loss},
            {"L": eager.outer_loss, "l": eager.inner_loss},
        )
        < most
    )
    assert error(pure.student_params, eager.student_params) < most
    assert error(dict(enumerate(pure.feedback)), dict(enumerate(eager.feedback))) < most
    assert pure.grads.keys() == eager.grads.keys()
    assert not eager.grads or error(pure.grads, eager.grads) < most
    assert pure.kept == eager.kept


@pytest.mark.parametrize(("optimizer", "problem", "keep", "clip", "schedule", "frozen"), ROWS)
@pytest.mark.parametrize("how", ["plain", pytest.param("captured", marks=pytest.mark.long)])
def test_two_graphs_give_the_eager_gradient(
    how: str,
    optimizer: str,
    problem: str,
    keep: str,
    clip: float | None,
    schedule: bool,
    frozen: bool,
) -> None:
    student = network(drops=problem != "enters_the_input", frozen=frozen)
    before = copy.deepcopy(student.state_dict())
    eager, pure = both(
        PROBLEMS[problem](), optimizer, KEEPS[keep], student, clip_norm=clip, schedule=schedule
    )
    if keep == "unrolled":
        pure = metapl.Hypergradient(**{**vars(pure), "kept": eager.kept})
    compared(eager, pure, 1e-9)
    assert error(before, student.state_dict()) == 0
    assert all(torch.equal(before[name], t) for name, t in student.state_dict().items())


@pytest.mark.parametrize(
    "momentum", [RESTED["momentum"], torch.full((4, 1), 0.9)], ids=["rested", "constant"]
)
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_a_buffer_is_that_of_torch_optim(dampening: float, momentum: Tensor) -> None:
    """A momentum of 0 leaves it as it is, and the first step has no dampening."""
    schedule = {"momentum": momentum, "dampening": torch.full((4, 1), dampening)}
    ahead, inner = Lookahead(batch, steps=4, schedule=schedule), SGD(STUDENT.parameters(), lr=0.1)
    given: Any = {
        "outer": batch(-1),
        "inner": ahead,
        "inner_optimizer": inner,
        "wrt": ("lr", "dampening"),
    }
    both = [
        metapl.hypergradient(None, STUDENT, problem=PROBLEM, compile=on, **given)
        for on in (False, True)
    ]
    compared(*both, 1e-9)
    assert error(both[1].settings, both[0].settings) < 1e-9


def test_truncation_leaves_zeros_in_the_shape_of_each_batch() -> None:
    batches = [tuple(t[:rows] for t in batch(rows)) for rows in (4, 6, 5, 8)]
    given: Any = {
        "outer": batch(-1),
        "inner": Lookahead(batches),
        "inner_optimizer": PLAIN,
        "problem": PROBLEM,
    }
    given |= {"mode": Forward(truncate=2)}
    compared(
        *(metapl.hypergradient(None, STUDENT, compile=on, **given) for on in (False, True)), 1e-9
    )


def test_the_step_that_is_compared_is_one_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up begins with a rate of 0, by which h is 0 on both roads."""
    real = graphs.make_training

    def doubled(*given: Any, **how: Any) -> Any:
        step, adjoint = real(*given, **how)

        def twice(*given: Any) -> Any:
            bars, h, *rest = adjoint(*given)
            return bars, {name: 2 * t for name, t in h.items()}, *rest

        return step, twice

    monkeypatch.setattr(graphs, "make_training", doubled)
    ahead, inner = (
        Lookahead(batch, steps=3, schedule=lambda k: k / 3),
        SGD(STUDENT.parameters(), lr=0.1),
    )
    given: Any = {
        "outer": batch(-1),
        "inner": ahead,
        "inner_optimizer": inner,
        "problem": EqualWeights(),
    }
    with pytest.raises(MetaplError, match="off"):
        metapl.hypergradient(None, STUDENT, compile=True, **given)


class Tasks(nn.Module):
    """A head for the batches of each task."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(6, 3) for name in ("a", "b")}).double()

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return sum(self.heads[name](t) for name, t in x.items())  # type: ignore[return-value]


LATE_DECAY = {"weight_decay": torch.tensor([[0.0], [1e-6]])}


@pytest.mark.parametrize(
    ("tasks", "decay", "schedule"), [("ab", 0.0, None), ("aa", 1e-6, None), ("aa", 0, LATE_DECAY)]
)
def test_weights_that_some_batches_do_not_reach_are_refused_each_time(
    tasks: str, decay: float, schedule: Any
) -> None:
    """torch.optim leaves them.

    In a graph their gradient is 0, by which momentum and decay move them.
    """
    student, (x, y) = Tasks(), batch(0)
    ahead = Lookahead([({task: x}, y) for task in tasks], schedule=schedule)
    inner = SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
    given: Any = {
        "outer": ({"a": x, "b": x}, y),
        "inner": ahead,
        "inner_optimizer": inner,
        "problem": PROBLEM,
    }
    for _ in range(2):
        with pytest.raises(MetaplError, match="reach"):
            metapl.hypergradient(None, student, compile=True, **given)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_gives_the_eager_gradient_and_keeps_its_graphs() -> None:
    problem, student = EqualWeights(), network()
    compared(*both(problem, "momentum", Forward(keep_every=2), student), 1e-9)
    cached = [*graphs._CACHE.values()]
    assert len(cached) == 1
    optimizer = OPTIMIZERS["momentum"](student.parameters())
    for steps in (3, 5):  # of another length, by the same graphs
        ahead = Lookahead(batch, steps=steps)
        given: Any = {
            "outer": batch(-1),
            "inner": ahead,
            "inner_optimizer": optimizer,
            "problem": problem,
        }
        metapl.hypergradient(None, student, compile=True, **given)
    assert [*graphs._CACHE.values()] == cached


@dataclass(frozen=True, slots=True)
class Slotted(EqualWeights):
    power: float = 0.0


def test_graphs_are_known_again_by_the_numbers_of_a_problem() -> None:
    student, other = network(), EqualWeights()
    update = update_of(SGD(student.parameters(), lr=0.1), trainable(student))

    def of(problem: Any) -> Any:
        return graphs.graphs_of(
            None, student, problem, update, clip_norm=None, in_settings=False, several=False
        )

    assert of(EqualWeights()) is of(EqualWeights())
    other.temperature = 2.0
    found = of(other)
    other.temperature = 3.0
    assert of(other) is not found
    assert of(Slotted(2.0)) is not of(Slotted(3.0))  # which vars() does not show


STUDENT, PROBLEM = network(drops=False), EqualWeights()  # of one compilation
WEIGHTS, RATES = [*STUDENT.parameters()], torch.full((STEPS, 1), 0.1)
PLAIN = SGD(WEIGHTS, lr=0.1, momentum=0.9)


def odd(bad: float = 0.0, steps: Sequence[int] = (2,)) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of which some are another one each time, or not finite."""
    calls = itertools.count(1)

    def made(number: int) -> tuple[Tensor, Tensor]:
        x, y = batch(number)
        return (x + (bad or next(calls)) if number in steps else x), y

    return made


def ahead(batches: Any = batch, schedule: Any = None, steps: int | None = STEPS) -> dict[str, Any]:
    return {"inner": Lookahead(batches, steps=steps, schedule=schedule)}


WRONG: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "unknown name": ("expected", lambda: {"wrt": "lrr"}),
    "no such setting": ("betas", lambda: {"wrt": ["start", "betas"]}),
    "a setting of a transform": ("lr", lambda: {"wrt": "lr", "inner_optimizer": torchopt.sgd(0.1)}),
    "an unknown schedule": ("lrr", lambda: ahead(schedule={"lrr": RATES})),
    "a schedule that ends": ("shape", lambda: ahead(schedule={"lr": RATES[1:]})),
    "rates of two groups": ("schedule", lambda: ahead(schedule={"lr": RATES.expand(-1, 2)})),
    "betas of "
    "SGD": ("schedule", lambda: ahead(schedule={"betas": RATES[..., None].expand(-1, -1, 2)})),
    "another batch": ("for step 2", lambda: ahead(odd())),
    "always another batch": ("for step 0", lambda: ahead(odd(steps=range(STEPS)))),
    "NaN": ("step 2", lambda: ahead(odd(torch.nan))),
    "NaN in the first step": ("step 0", lambda: ahead([odd(torch.nan)(2)] * STEPS)),
    "a rate of NaN": ("step 1", lambda: ahead(schedule=lambda k: torch.nan)),
    "NaN in the outer "
    "batch": ("step 6|the outer loss is NaN or infinite", lambda: {"outer": odd(torch.nan)(2)}),
    "a start without a "
    "gradient": ("wrt", lambda: {"wrt": "start", "mode": "none", "compile": False}),
    "a rate in truncated "
    "steps": ("wrt", lambda: {"wrt": "lr", "mode": Forward(truncate=2), "compile": False}),
    "a momentum of 0": (
        "wrt", lambda: {"wrt": "momentum", "inner_optimizer": SGD(WEIGHTS, lr=0.1), "compile": False}),
    "a momentum that rests": (
        "wrt", lambda: {"wrt": "momentum", "mode": Unrolled(), "compile": False, **ahead(schedule=RESTED, steps=3)}),
    "two graphs of no gradient": ("compile", lambda: {"mode": "none", "compile": True}),
    "two graphs of h that is shaped": (
        "compile", lambda: {"mode": Forward(normalization="learning_rate"), "compile": True}),
    "two graphs of micro-batches": ("compile", lambda: {"accumulate": 2, "compile": True}),
    "two graphs of a "
    "transform": ("compile", lambda: {"inner_optimizer": torchopt.sgd(0.1), "compile": True}),
}  # fmt: skip


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line_and_nothing_moves(case: str, compile: bool) -> None:
    word, change = WRONG[case]
    right: Any = {"outer": batch(-1), "problem": PROBLEM, "inner_optimizer": PLAIN}
    if (
        compile
    ):  # so that the graphs have been compared, which would meet a NaN before the path does
        metapl.hypergradient(None, STUDENT, inner=Lookahead(batch, steps=1), compile=True, **right)
    before, state = copy.deepcopy(STUDENT.state_dict()), torch.get_rng_state()
    given: Any = right | {"inner": Lookahead(batch, steps=STEPS)}
    given |= {"mode": Forward(keep_every=3), "compile": compile} | change()
    with pytest.raises(MetaplError, match=word) as said:
        metapl.hypergradient(None, STUDENT, **given)
    assert "\n" not in str(said.value)
    assert error(before, STUDENT.state_dict()) == 0
    assert torch.equal(state, torch.get_rng_state())


SETTINGS: dict[
    str, dict[str, list[Any]]
] = {  # of each param group; a group does not read those that it has not
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


def rule_of(optimizer: str, of: list[dict[str, Tensor]]) -> reference.Rule:
    """The rule, with its settings as tensors."""
    if optimizer != "muon":
        return (reference.adam if optimizer == "adam" else reference.sgd)(**of[0])
    muon, adamw = of[0], {name: t for name, t in of[1].items() if name != "momentum"}
    return muon_and_adamw(
        muon["lr"], muon["momentum"], muon["weight_decay"], nesterov=True, adamw=adamw
    )


def by_hand(
    student: nn.Module, optimizer: str, settings: dict[str, Tensor], steps: int
) -> tuple[Tensor, Any]:
    """L(θ_K) of steps on cross-entropy, and θ_0, both in the graph."""
    start = theta = reference.weights(student)
    state = None

    def loss(number: int) -> Tensor:
        x, y = batch(number)
        return nn.functional.cross_entropy(reference.at(student, theta, x), y)

    for k in range(steps):
        of = [
            {n: t[k, group] for n, t in settings.items()} for group in range(len(settings["lr"][k]))
        ]
        theta, state = reference.stepped(loss(k), theta, rule_of(optimizer, of), state)
    return loss(-1), start


MODES = [Forward(keep_every=2), Forward(), Unrolled()]


@pytest.mark.parametrize(
    ("optimizer", "mode", "steps", "how"),
    product(SETTINGS, MODES, [1, 5], ["eager", "plain"], usual=[*SETTINGS, MODES[0], 5, "plain"])
    + product(SETTINGS, MODES, [1, 5], ["captured"], usual=[]),
)
def test_the_gradient_in_the_start_and_in_settings_is_that_by_double_backward(
    optimizer: str, mode: Any, steps: int, how: str
) -> None:
    student, settings = network(drops=False), dict[str, Tensor]()
    for name, values in SETTINGS[optimizer].items():
        t = torch.tensor(values, dtype=torch.float64)  # (groups,) or (groups, 2)
        falling = torch.linspace(1.0, 0.8, steps, dtype=torch.float64).view(-1, *[1] * t.ndim)
        settings[name] = (falling * t).requires_grad_()
    L, start = by_hand(student, optimizer, settings, steps)
    expected = torch.autograd.grad(
        L, [*start.values(), *settings.values()], allow_unused=True, materialize_grads=True
    )
    inner = OPTIMIZERS[optimizer](student.parameters())
    ahead = Lookahead(batch, steps=steps, schedule=settings)
    given: Any = {
        "outer": batch(-1),
        "inner": ahead,
        "inner_optimizer": inner,
        "problem": EqualWeights(),
    }
    found = metapl.hypergradient(
        None, student, mode=mode, compile=how != "eager", wrt=["start", *settings], **given
    )
    trees = dict(zip([*start, *settings], expected, strict=True))
    assert found.settings["lr"].shape == settings["lr"].shape
    assert error(found.start, {name: trees[name] for name in start}) < 1e-7
    for name in settings:
        assert (found.settings[name] - trees[name]).abs().max() <= 1e-7 * trees[
            name
        ].abs().max() + 1e-12, name
