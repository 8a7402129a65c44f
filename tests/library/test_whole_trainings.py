"""Whole trainings on the pure road: one step and its adjoint, beside the eager road."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torchopt
from problems_zoo import Judged
from reference import error
from torch import Tensor, nn

import metapl
from metapl import Lookahead, MetaplError
from metapl.feedback import Forward, Unrolled
from metapl.functional import compiled, training
from metapl.problems import EqualWeights, MetaWeightNet, WeightNet

STEPS = 7
RESTED = {"momentum": torch.tensor([[0.0], [0.9], [0.0], [0.8]])}  # torch.optim keeps the buffer where it is 0
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "dampened": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3, weight_decay=1e-2),
    "adamw": lambda p: ADAMW(p, lr=0.01, eps=1e-3),
    "groups": lambda p: SGD([{"params": [q]} | ({"lr": 0.02} if q.ndim > 1 else {}) for q in p], lr=0.1, momentum=0.5),
}


class Mixed(Judged):
    """The teacher mixes the student's inputs, so that the signal enters them."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Any) -> metapl.Signal:
        return metapl.Signal(teacher(batch[0]).softmax(-1))

    def student_input(self, batch: Any, signal: Any = None) -> Tensor:
        x: Tensor = batch[0]
        return x if signal is None else x * signal.value.sum(-1, keepdim=True) + 0.1 * signal.value.repeat(1, 2)

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1], reduction="none")

    def outer_input(self, batch: Any) -> Tensor:
        x: Tensor = batch[0]
        return x


def batch(number: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(number)
    return torch.randn(8, 6, generator=draw).double(), torch.randint(0, 3, (8,), generator=draw)


def network(*, drops: bool = True, frozen: bool = False) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2 * drops), nn.Linear(16, 3))
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
HOW = ["plain", pytest.param("captured", marks=pytest.mark.long)]
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
]


@pytest.fixture(autouse=True)
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As plain functions, where what they compute matters; captured, or by Inductor, where a test's name says so."""
    if "captured" in request.node.name:
        monkeypatch.setattr(compiled, "backend_of", lambda device: {"backend": "aot_eager"})
    elif "inductor" not in request.node.name:
        monkeypatch.setattr(torch, "compile", lambda function, **how: function)


def both(problem: Any, optimizer: str, mode: Any, student: nn.Module, **given: Any) -> list[metapl.Hypergradient]:
    """The gradient by the eager road and by the two graphs, and the generators where each leaves them."""
    inner, teacher, found = OPTIMIZERS[optimizer](student.parameters()), teacher_of(problem), []
    inputs = (lambda pair: pair[0]) if isinstance(problem, metapl.PseudoLabels) else (lambda pair: pair)
    scheduled = torch.optim.lr_scheduler.ExponentialLR(inner, 0.8) if given.pop("schedule", False) else None
    for compile in (False, True):
        torch.manual_seed(5)
        ahead = Lookahead(lambda k: inputs(batch(k)), steps=given.get("steps", STEPS), schedule=scheduled)
        more: Any = {"clip_norm": given.get("clip_norm"), "mode": mode, "problem": problem, "compile": compile}
        more |= {"outer": batch(-1), "inner": ahead, "inner_optimizer": inner}
        found.append((metapl.hypergradient(teacher, student, **more), torch.get_rng_state()))
    assert torch.equal(found[0][1], found[1][1])
    return [result for result, _ in found]


def compared(eager: metapl.Hypergradient, pure: metapl.Hypergradient, most: float) -> None:
    assert error({"L": pure.outer_loss, "l": pure.inner_loss}, {"L": eager.outer_loss, "l": eager.inner_loss}) < most
    assert error(pure.student_params, eager.student_params) < most
    assert error(dict(enumerate(pure.feedback)), dict(enumerate(eager.feedback))) < most
    assert pure.grads.keys() == eager.grads.keys()
    assert not eager.grads or error(pure.grads, eager.grads) < most
    assert pure.kept == eager.kept


@pytest.mark.parametrize(
    ("optimizer", "problem", "keep", "clip", "schedule", "frozen"),
    ROWS,
)
@pytest.mark.parametrize("how", HOW)
def test_two_graphs_give_the_eager_gradient(
    how: str, optimizer: str, problem: str, keep: str, clip: float | None, schedule: bool, frozen: bool
) -> None:
    student = network(drops=problem != "enters_the_input", frozen=frozen)
    before = copy.deepcopy(student.state_dict())
    eager, pure = both(PROBLEMS[problem](), optimizer, KEEPS[keep], student, clip_norm=clip, schedule=schedule)
    if keep == "unrolled":
        pure = metapl.Hypergradient(**{**vars(pure), "kept": eager.kept})
    compared(eager, pure, 1e-9)
    assert error(before, student.state_dict()) == 0
    assert all(torch.equal(before[name], t) for name, t in student.state_dict().items())


@pytest.mark.parametrize("momentum", [RESTED["momentum"], torch.full((4, 1), 0.9)], ids=["rested", "constant"])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_a_buffer_is_that_of_torch_optim(dampening: float, momentum: Tensor) -> None:
    """A momentum of 0 leaves it as it is, and the first step has no dampening."""
    schedule = {"momentum": momentum, "dampening": torch.full((4, 1), dampening)}
    ahead, inner = Lookahead(batch, steps=4, schedule=schedule), SGD(STUDENT.parameters(), lr=0.1)
    given: Any = {"outer": batch(-1), "inner": ahead, "inner_optimizer": inner, "wrt": ("lr", "dampening")}
    both = [metapl.hypergradient(None, STUDENT, problem=PROBLEM, compile=on, **given) for on in (False, True)]
    compared(*both, 1e-9)
    assert error(both[1].settings, both[0].settings) < 1e-9


def test_truncation_leaves_zeros_in_the_shape_of_each_batch() -> None:
    batches = [tuple(t[:rows] for t in batch(rows)) for rows in (4, 6, 5, 8)]
    given: Any = {"outer": batch(-1), "inner": Lookahead(batches), "inner_optimizer": PLAIN, "problem": PROBLEM}
    given |= {"mode": Forward(truncate=2)}
    compared(*(metapl.hypergradient(None, STUDENT, compile=on, **given) for on in (False, True)), 1e-9)


def test_the_step_that_is_compared_is_one_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up begins with a rate of 0, by which h is 0 on both roads."""
    real = training.make_training

    def doubled(*given: Any, **how: Any) -> Any:
        step, adjoint = real(*given, **how)

        def twice(*given: Any) -> Any:
            bars, h, *rest = adjoint(*given)
            return bars, {name: 2 * t for name, t in h.items()}, *rest

        return step, twice

    monkeypatch.setattr(training, "make_training", doubled)
    ahead, inner = Lookahead(batch, steps=3, schedule=lambda k: k / 3), SGD(STUDENT.parameters(), lr=0.1)
    given: Any = {"outer": batch(-1), "inner": ahead, "inner_optimizer": inner, "problem": EqualWeights()}
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


@pytest.mark.parametrize(("tasks", "decay", "schedule"), [("ab", 0.0, None), ("aa", 1e-6, None), ("aa", 0, LATE_DECAY)])
def test_weights_that_some_batches_do_not_reach_are_refused_each_time(tasks: str, decay: float, schedule: Any) -> None:
    """torch.optim leaves them; in a graph their gradient is 0, by which momentum and decay move them."""
    student, (x, y) = Tasks(), batch(0)
    ahead = Lookahead([({task: x}, y) for task in tasks], schedule=schedule)
    inner = SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
    given: Any = {"outer": ({"a": x, "b": x}, y), "inner": ahead, "inner_optimizer": inner, "problem": PROBLEM}
    for _ in range(2):
        with pytest.raises(MetaplError, match="reach"):
            metapl.hypergradient(None, student, compile=True, **given)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_gives_the_eager_gradient_and_keeps_its_graphs() -> None:
    problem, student = EqualWeights(), network()
    compared(*both(problem, "momentum", Forward(keep_every=2), student), 1e-9)
    (graphs,) = training._KNOWN.values()
    optimizer = graphs.update.optimizer
    for steps in (3, 5):  # of another length, by the same graphs
        ahead = Lookahead(batch, steps=steps)
        given: Any = {"outer": batch(-1), "inner": ahead, "inner_optimizer": optimizer, "problem": problem}
        metapl.hypergradient(None, student, compile=True, **given)
    assert [*training._KNOWN.values()] == [graphs]


def test_what_two_graphs_do_not_take_is_refused_in_one_line() -> None:
    student = network()
    given: Any = {"outer": batch(-1), "inner": Lookahead(batch, steps=3), "problem": EqualWeights()}
    given |= {"inner_optimizer": SGD(student.parameters(), lr=0.1), "compile": True}
    wrong: list[dict[str, Any]] = [{"mode": "none"}, {"mode": Forward(normalization="learning_rate")}]
    for change in [*wrong, {"accumulate": 2}, {"inner_optimizer": torchopt.sgd(0.1)}]:
        with pytest.raises(MetaplError, match="compile"):
            metapl.hypergradient(None, student, **given | change)


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


WRONG: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "unknown name": ("expected", lambda: {"wrt": "lrr"}),
    "no such setting": ("betas", lambda: {"wrt": ["start", "betas"]}),
    "a setting of a transform": ("lr", lambda: {"wrt": "lr", "inner_optimizer": torchopt.sgd(0.1)}),
    "an unknown schedule": ("lrr", lambda: {"inner": Lookahead(batch, steps=STEPS, schedule={"lrr": RATES})}),
    "a schedule that ends": ("shape", lambda: {"inner": Lookahead(batch, steps=STEPS, schedule={"lr": RATES[1:]})}),
    "another batch": ("for step 2", lambda: {"inner": Lookahead(odd(), steps=STEPS)}),
    "always another batch": ("for step 0", lambda: {"inner": Lookahead(odd(steps=range(STEPS)), steps=STEPS)}),
    "NaN": ("step 2", lambda: {"inner": Lookahead(odd(torch.nan), steps=STEPS)}),
    "NaN in the first step": ("step 0", lambda: {"inner": Lookahead([odd(torch.nan)(2)] * STEPS)}),
    "a rate of NaN": ("step 1", lambda: {"inner": Lookahead(batch, steps=STEPS, schedule=lambda k: torch.nan)}),
    "NaN in the outer batch": ("step 6", lambda: {"outer": odd(torch.nan)(2)}),
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line_and_nothing_moves(case: str, compile: bool) -> None:
    word, change = WRONG[case]
    before, state = copy.deepcopy(STUDENT.state_dict()), torch.get_rng_state()
    given: Any = {"outer": batch(-1), "inner": Lookahead(batch, steps=STEPS), "problem": PROBLEM}
    given |= {"inner_optimizer": PLAIN, "mode": Forward(keep_every=3), "compile": compile} | change()
    with pytest.raises(MetaplError, match=word) as said:
        metapl.hypergradient(None, STUDENT, **given)
    assert "\n" not in str(said.value)
    assert error(before, STUDENT.state_dict()) == 0
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_scores_of_examples_are_those_of_the_eager_road(each: bool) -> None:
    student, train = network(), batch(1)
    found = []
    for compile in (False, True):
        torch.manual_seed(5)
        given: Any = {"optimizer": SGD(student.parameters(), lr=0.1, momentum=0.9), "steps": 5, "batch_size": 4}
        given |= {"each": each, "compile": compile, "progress": False}
        found.append(metapl.attribute(student, train, batch(2), **given))
    eager, pure = ({"scores": a.scores, "L": a.outer_loss, **a.student_params} for a in found)
    assert error(pure, eager) < 1e-9
    assert found[1].scores.shape == ((8, 8) if each else (8,))


def by_hand(student: nn.Module, settings: dict[str, Tensor], steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """L(θ_K) of steps of SGD with momentum, or of Adam, on cross-entropy, and θ_0, both in the graph."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in student.named_parameters()}
    start, first = dict(theta), {name: torch.zeros_like(p) for name, p in theta.items()}
    second, state = dict(first), dict(student.named_buffers())

    def loss(theta: dict[str, Tensor], number: int) -> Tensor:
        x, y = batch(number)
        copied = {name: t.clone() for name, t in state.items()}
        return nn.functional.cross_entropy(torch.func.functional_call(student, {**theta, **copied}, (x,)), y)

    for k in range(steps):
        now = {name: t[k, 0] for name, t in settings.items()}
        grads = torch.autograd.grad(loss(theta, k), list(theta.values()), create_graph=True)
        for (name, p), g in zip([*theta.items()], grads, strict=True):
            d = g + now["weight_decay"] * p
            if "betas" in now:
                b1, b2 = now["betas"]
                first[name], second[name] = b1 * first[name] + (1 - b1) * d, b2 * second[name] + (1 - b2) * d * d
                root = (second[name] / (1 - b2 ** (k + 1)) + 1e-300).sqrt()
                theta[name] = p - now["lr"] * first[name] / (1 - b1 ** (k + 1)) / (root + now["eps"])
            else:
                first[name] = now["momentum"] * first[name] + d
                theta[name] = p - now["lr"] * first[name]
    return loss(theta, -1), start


@pytest.mark.parametrize("how", ["eager", *HOW])
@pytest.mark.parametrize("mode", [Forward(keep_every=2), Forward(), Unrolled()])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_gradient_in_the_start_and_in_settings_is_that_by_double_backward(
    optimizer: str, mode: Any, steps: int, how: str
) -> None:
    student = network(drops=False)
    if optimizer == "sgd":
        numbers: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
        inner: Any = SGD(student.parameters(), **numbers)
    else:
        numbers = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.0}
        inner = torch.optim.Adam(student.parameters(), **numbers)
    falling = torch.linspace(1.0, 0.8, steps).double()[:, None]
    settings = {name: torch.tensor(value).double() * falling for name, value in numbers.items()}
    settings |= {name: t[:, None] for name, t in settings.items() if name == "betas"}  # (K, groups, 2)
    for t in settings.values():
        t.requires_grad_()
    L, start = by_hand(student, settings, steps)
    expected = torch.autograd.grad(L, [*start.values(), *settings.values()], allow_unused=True, materialize_grads=True)
    ahead = Lookahead(batch, steps=steps, schedule=settings)
    given: Any = {"outer": batch(-1), "inner": ahead, "inner_optimizer": inner, "problem": EqualWeights()}
    found = metapl.hypergradient(None, student, mode=mode, compile=how != "eager", wrt=["start", *numbers], **given)
    trees = dict(zip([*start, *settings], expected, strict=True))
    assert found.settings["lr"].shape == (steps, 1)
    assert error(found.start, {name: trees[name] for name in start}) < 1e-7
    for name in numbers:
        assert (found.settings[name] - trees[name]).abs().max() <= 1e-7 * trees[name].abs().max() + 1e-12, name


def test_wrt_and_settings_are_refused_where_they_do_not_fit() -> None:
    student = network()
    given: Any = {"outer": batch(-1), "inner": Lookahead(batch, steps=3), "problem": EqualWeights()}
    plain, none = SGD(student.parameters(), lr=0.1, momentum=0.9), SGD(student.parameters(), lr=0.1)
    wrong: list[tuple[Any, dict[str, Any]]] = [
        (plain, {"wrt": "start", "mode": "none"}),
        (plain, {"wrt": "lr", "mode": Forward(truncate=2)}),
        (none, {"wrt": "momentum"}),
        (plain, {"wrt": "momentum", "mode": Unrolled(), "inner": Lookahead(batch, steps=3, schedule=RESTED)}),
        (plain, {"inner": Lookahead(batch, steps=3, schedule={"lr": torch.full((3, 2), 0.1)})}),
        (plain, {"inner": Lookahead(batch, steps=3, schedule={"betas": torch.full((3, 1, 2), 0.1)})}),
    ]
    for inner, change in wrong:
        with pytest.raises(MetaplError, match="wrt" if "wrt" in change else "schedule"):
            metapl.hypergradient(None, student, **given | change, inner_optimizer=inner)
    found = metapl.hypergradient(None, student, **given, inner_optimizer=torchopt.sgd(0.1), wrt="start")
    assert found.start.keys() == dict(student.named_parameters()).keys()
