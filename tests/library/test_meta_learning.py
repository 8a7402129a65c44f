"""Initial weights learned through inner steps.

MAML, its first order, ANIL and Meta-SGD are compared with loops by hand.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import reference
import torch
from captures import as_functions
from problems_zoo import toy
from reference import error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

import metapl
from metapl import Lookahead, MetaplError
from metapl.feedback import Forward, Unrolled
from metapl.functional import capture, graphs
from metapl.problems import EqualWeights
from metapl.updates import update_of

Tree = dict[str, Tensor]
SGD = torch.optim.SGD
STEPS = 4


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave graphs as plain functions, for what they compute matters here."""
    as_functions(monkeypatch)


def batch(number: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(rows, 4, generator=generator).double()
    y = torch.randint(0, 3, (rows,), generator=generator)
    return x, y


INNER = [batch(number) for number in range(STEPS)]
OUTER = batch(-STEPS, rows=5)


def network(*layers: nn.Module) -> nn.Module:
    """Return a network of these layers in float64.

    Without layers it has weights of shapes (1, n) and (n, 1), and a bias of one entry.
    """
    torch.manual_seed(0)
    if not layers:
        layers = (nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 3))
    return nn.Sequential(*layers).double()


def hypergradient(student: nn.Module, optimizer: Any, **options: Any) -> metapl.Hypergradient:
    """Return the gradient over ``INNER`` steps on equal weights, unless options say otherwise."""
    defaults = {
        "outer": OUTER,
        "inner": Lookahead(INNER),
        "problem": EqualWeights(),
        "inner_optimizer": optimizer,
    }
    return metapl.hypergradient(None, student, **{**defaults, **options})


def loss_at(student: nn.Module, params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(functional_call(student, params, (x,)), y)


def inner_gradients(student: nn.Module, params: Tree, batch: tuple[Tensor, Tensor]) -> Tree:
    """Return the gradient of a batch's loss in these weights, with its graph."""
    loss = loss_at(student, params, batch)
    gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    return dict(zip(params, gradients, strict=True))


def outer_gradients(loss: Tensor, start: Tree) -> Tree:
    """Return the gradient of an outer loss in the weights that a path began with."""
    gradients = torch.autograd.grad(loss, list(start.values()))
    return dict(zip(start, gradients, strict=True))


ROADS = [
    (mode, compile)
    for mode in (Forward(), Forward(keep_every=3), Unrolled())
    for compile in (False, True)
]


class Scaled(nn.Module):
    """A weight of scale · moved: a step on what is moved has the rate scale² for each entry."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.scale = nn.Parameter(0.5 + torch.rand(weight.shape, generator=generator).to(weight))

    def forward(self, moved: Tensor) -> Tensor:
        return self.scale * moved

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.scale.detach()


@pytest.mark.parametrize(("mode", "compile"), ROADS)
def test_a_rate_for_each_entry_by_a_parametrization(mode: Any, compile: bool) -> None:
    """The scales rest in the inner steps, and are learned with the start."""
    student = network()
    for layer in (student[0], student[2], student[4]):
        register_parametrization(layer, "weight", Scaled(layer.weight))
    names = [name for name, _ in student.named_parameters()]
    scales = [p for name, p in student.named_parameters() if "scale" in name]
    others = [p for name, p in student.named_parameters() if "scale" not in name]

    start = reference.weights(student)
    params = start
    for batch in INNER:
        gradients = inner_gradients(student, params, batch)
        params = {
            name: p if "scale" in name else p - 0.3 * gradients[name] for name, p in params.items()
        }
    L = loss_at(student, params, OUTER)
    optimizer = SGD([{"params": others}, {"params": scales, "lr": 0.0}], lr=0.3)
    gradient = hypergradient(student, optimizer, mode=mode, compile=compile, wrt="start")
    assert list(gradient.start) == names
    assert error(gradient.start, outer_gradients(L, start)) < 1e-10


def with_rates(weights: list[nn.Parameter]) -> Any:
    return SGD([{"params": [p], "lr": torch.full_like(p, 0.1)} for p in weights])


def with_decays(weights: list[nn.Parameter]) -> Any:
    groups = [{"params": [p], "weight_decay": torch.full_like(p, 0.1)} for p in weights]
    return SGD(groups, lr=0.1)


@pytest.mark.parametrize(("name", "build"), [("lr", with_rates), ("weight_decay", with_decays)])
def test_settings_with_several_values_are_refused(name: str, build: Any) -> None:
    student = network()
    with pytest.raises(
        MetaplError, match=rf"inner_optimizer has '{name}' that is a tensor .* a number"
    ):
        update_of(build(list(student.parameters())), dict(student.named_parameters()))


# -------------------------------------------------------------------------------------- first order


def truncated_gradient(student: nn.Module, truncate: int, **options: Any) -> Tree:
    """Return ∇L(θ_K) through the last steps: the graph, and the momentum's, is cut before them."""
    rule = reference.sgd(0.3, **options)
    state = None
    params = reference.weights(student)
    start = params
    for number, batch in enumerate(INNER):
        if number == STEPS - truncate:
            params = {name: p.detach().requires_grad_() for name, p in params.items()}
            start = params
            if state is not None:
                state = {name: buffer.detach() for name, buffer in state.items()}
        params, state = rule(params, inner_gradients(student, params, batch), state)
    if truncate == 0:
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        start = params
    return outer_gradients(loss_at(student, params, OUTER), start)


@pytest.mark.parametrize(("mode", "compile"), ROADS)
@pytest.mark.parametrize("truncate", [0, 1, 3, STEPS, STEPS + 2])
def test_first_order_is_the_gradient_after_the_steps_that_are_left_out(
    truncate: int, mode: Any, compile: bool
) -> None:
    student = network()
    options = {"momentum": 0.9, "weight_decay": 0.05}
    optimizer = SGD(student.parameters(), lr=0.3, **options)
    mode = replace(mode, truncate=truncate)
    truncated = hypergradient(student, optimizer, mode=mode, compile=compile, wrt="start")
    expected = truncated_gradient(student, min(truncate, STEPS), **options)
    assert error(truncated.start, expected) < 1e-10
    complete = hypergradient(student, optimizer, wrt="start")
    is_complete = error(truncated.start, complete.start) < 1e-10
    assert is_complete == (truncate >= STEPS)


def test_first_order_with_a_teacher_cuts_both() -> None:
    case = toy("mlp")
    options: dict[str, Any] = {
        "outer": case.labeled,
        "inner": Lookahead([case.unlabeled] * 3),
        "inner_optimizer": SGD(case.student.parameters(), lr=0.3),
    }
    last_step = Forward(truncate=1)
    with_start = metapl.hypergradient(
        **case.networks(), **options, mode=last_step, wrt=["teacher", "start"]
    )
    teacher_alone = metapl.hypergradient(**case.networks(), **options, mode=last_step)
    assert error(with_start.grads, teacher_alone.grads) < 1e-12
    no_step = metapl.hypergradient(
        **case.networks(), **options, mode=Forward(truncate=0), wrt="start"
    )
    assert no_step.grads == {}
    assert all(not h.any() for h in no_step.feedback)
    assert 1e-6 < error(with_start.start, no_step.start) < 1


@pytest.mark.parametrize(
    ("mode", "compile"), [(Forward(), False), (Unrolled(), False), (Forward(), True)]
)
@pytest.mark.parametrize("truncate", [1, 3, STEPS, STEPS + 2])
def test_rates_of_steps_that_are_cut_off_get_zeros(truncate: int, mode: Any, compile: bool) -> None:
    """A rate acts through its own step and the later ones, so its gradient is the whole one."""
    student = network()
    optimizer = SGD(student.parameters(), lr=0.2, momentum=0.5)
    wrt = ["lr", "momentum"]
    cut = replace(mode, truncate=truncate)
    truncated = hypergradient(student, optimizer, mode=cut, compile=compile, wrt=wrt).settings
    whole = hypergradient(student, optimizer, mode=mode, compile=compile, wrt=wrt).settings
    last = min(truncate, STEPS)
    for name in wrt:
        assert truncated[name].shape == whole[name].shape == (STEPS, 1)
        assert not truncated[name][: STEPS - last].any()
        assert torch.allclose(truncated[name][STEPS - last :], whole[name][STEPS - last :])
        # The momentum of the first step meets no buffer.
        assert whole[name][1:].abs().min() > 0


@pytest.mark.parametrize("compile", [False, True])
def test_what_no_step_reaches_is_refused(compile: bool) -> None:
    student = network()
    optimizer = SGD(student.parameters(), lr=0.1)
    mode: Any = Forward(truncate=0)
    for wrt in ("teacher", "lr", ["start", "lr"], ["teacher", "start"]):
        with pytest.raises(MetaplError, match=r"expected wrt='start', or a truncate of 1"):
            hypergradient(student, optimizer, mode=mode, wrt=wrt, compile=compile)
    with pytest.raises(MetaplError, match="expected 1 or more"):
        metapl.attribute(
            student,
            INNER[0],
            INNER[0],
            optimizer=optimizer,
            steps=2,
            batch_size=3,
            mode=Forward(truncate=0),
            compile=compile,
        )
    case = toy("mlp")
    for mode in (Forward(truncate=0), Unrolled(truncate=0)):
        with pytest.raises(MetaplError, match="truncate=0 differentiates no step of a trainer"):
            metapl.BilevelTrainer(**case.networks(), mode=mode, compile=compile)


def test_an_outer_batch_that_is_a_lookahead_is_refused() -> None:
    case = toy("mlp")
    trainer = metapl.BilevelTrainer(**case.networks(), mode="forward", lookahead=2)
    outer: Any = Lookahead([case.labeled] * 2)
    inner = Lookahead([case.unlabeled] * 2)
    calls: list[Callable[..., Any]] = [
        trainer.step,
        trainer.first_step,
        trainer.hypergradient,
        partial(metapl.check_gradient, trainer),
        partial(hypergradient, case.student, SGD(case.student.parameters(), lr=0.1)),
    ]
    for call in calls:
        with pytest.raises(MetaplError, match="outer= was given a Lookahead"):
            call(outer=outer, inner=inner)


# -------------------------------------------------------------- a part of the weights, and closures


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("mode", [Forward(), Unrolled()])
def test_a_group_at_rest_leaves_a_part_of_the_weights_as_in_anil(mode: Any, compile: bool) -> None:
    student = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    inner_optimizer = SGD(student[2].parameters(), lr=0.3, momentum=0.9)
    with pytest.raises(MetaplError, match=r"lacks 0\.weight, 0\.bias .* with lr=0"):
        hypergradient(student, inner_optimizer, wrt="start")
    inner_optimizer.add_param_group({"params": student[0].parameters(), "lr": 0.0})
    gradient = hypergradient(student, inner_optimizer, mode=mode, compile=compile, wrt="start")

    start = reference.weights(student)
    rule = reference.sgd(0.3, momentum=0.9)
    state = None
    params = start
    for batch in INNER:
        head = {name: p for name, p in params.items() if name.startswith("2.")}
        loss = loss_at(student, params, batch)
        gradients = torch.autograd.grad(loss, list(head.values()), create_graph=True)
        moved_head, state = rule(head, dict(zip(head, gradients, strict=True)), state)
        params = params | moved_head
    expected = outer_gradients(loss_at(student, params, OUTER), start)
    assert error(gradient.start, expected) < 1e-10
    for name, p in start.items():
        if name.startswith("0."):
            assert torch.equal(gradient.student_params[name], p)


def test_one_of_several_optimizers_takes_the_weights_at_rest() -> None:
    student = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    muon = torch.optim.Muon([student[2].weight], lr=0.1)
    adam = torch.optim.Adam([student[2].bias], lr=0.1)
    with pytest.raises(MetaplError, match="lr=0"):
        hypergradient(student, (muon, adam), wrt="start")
    adam.add_param_group({"params": student[0].parameters(), "lr": 0.0})
    gradient = hypergradient(student, (muon, adam), wrt="start")
    assert gradient.start["0.weight"].any()
    assert torch.equal(gradient.student_params["0.weight"], student[0].weight)


def test_optimizers_with_a_closure_are_refused_when_they_are_given() -> None:
    case = toy("mlp")
    outer = torch.optim.LBFGS(case.teacher.parameters())
    with pytest.raises(
        MetaplError, match=r"outer_optimizer is LBFGS.*metapl.hypergradient \(docs/meta-learning.md"
    ):
        metapl.BilevelTrainer(**case.networks(), mode="forward", outer_optimizer=outer)
    with pytest.raises(MetaplError, match="by a closure"):
        metapl.LossTrainer(case.teacher, optimizer=outer)

    class Sharp(SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            return super().step(closure)

    sharp = Sharp(case.teacher.parameters(), lr=0.1)
    with pytest.raises(MetaplError, match="outer_optimizer is Sharp"):
        metapl.BilevelTrainer(**case.networks(), mode="forward", outer_optimizer=sharp)
    inner = torch.optim.LBFGS(case.student.parameters())
    for mode in ("forward", "none"):
        with pytest.raises(
            MetaplError, match=r"inner_optimizer is LBFGS; expected torch\.optim's SGD"
        ):
            metapl.BilevelTrainer(**case.networks(), mode=mode, inner_optimizer=inner)
    with pytest.raises(MetaplError, match=r"inner_optimizer is LBFGS; expected torch\.optim's SGD"):
        hypergradient(network(), torch.optim.LBFGS(network().parameters()))


def test_lbfgs_around_hypergradient_lowers_the_outer_loss() -> None:
    """Initial weights of a convex problem: it ends where the gradient is a thousandth."""
    student = network(nn.Linear(4, 3))
    inner = SGD(student.parameters(), lr=0.1)
    lbfgs = torch.optim.LBFGS(student.parameters(), max_iter=20, line_search_fn="strong_wolfe")
    losses: list[float] = []
    norms: list[float] = []

    def closure() -> Tensor:
        gradient = hypergradient(student, inner, wrt="start")
        for name, p in student.named_parameters():
            p.grad = gradient.start[name]
        losses.append(float(gradient.outer_loss))
        norms.append(float(reference.flat(gradient.start).norm()))
        return gradient.outer_loss

    for _ in range(2):
        lbfgs.step(closure)
    assert min(losses) < 0.3 * losses[0]
    assert min(norms) < 0.05 * norms[0]


@pytest.mark.parametrize("truncate", [None, 2])
def test_graphs_of_small_steps_are_kept_for_the_start(truncate: int | None) -> None:
    student = network()
    optimizer = SGD(student.parameters(), lr=0.3, momentum=0.9)
    by_kept_graphs, again, made_for_it = (
        hypergradient(student, optimizer, mode=mode, wrt=["start", "lr"])
        for mode in (
            Forward(truncate=truncate),
            Forward(truncate=truncate),
            Forward(truncate=truncate, by="double_backward"),
        )
    )
    assert (by_kept_graphs.order, again.order) == ("graph", "graph")
    assert made_for_it.order == "double_backward"
    for found in (by_kept_graphs, again):
        assert error(found.start, made_for_it.start) < 1e-14
        assert error(found.settings, made_for_it.settings) < 1e-14
        h, expected = (dict(enumerate(of.feedback)) for of in (found, made_for_it))
        assert error(h, expected) < 1e-14


# ---------------------------------------------------------------------------------- many tasks

TASKS = 3


def stacked(number: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    """Return the batches of all tasks, stacked along a first dimension."""
    x, y = zip(*(batch(10 * number + task, rows) for task in range(TASKS)), strict=True)
    return torch.stack(x), torch.stack(y)


INNER_OF_TASKS = [stacked(number) for number in range(2)]
OUTER_OF_TASKS = stacked(2, rows=4)


def one_of(batch: tuple[Tensor, Tensor], task: int) -> tuple[Tensor, Tensor]:
    x, y = batch
    return x[task], y[task]


class Weighed(EqualWeights):
    """Each example counts as far as the teacher says, from its input."""

    has_teacher = True

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any
    ) -> metapl.Signal:
        return metapl.Signal(teacher(batch[0]).sigmoid().squeeze(1))


def call_tasks(
    student: nn.Module, optimizer: Any, teacher: nn.Module | None = None, **options: Any
) -> metapl.Hypergradient:
    """Return the gradient over all tasks at once, on equal weights unless options say otherwise."""
    defaults: dict[str, Any] = {
        "outer": OUTER_OF_TASKS,
        "inner": Lookahead(INNER_OF_TASKS),
        "problem": EqualWeights() if teacher is None else Weighed(),
        "tasks": True,
    }
    return metapl.hypergradient(
        teacher, student, inner_optimizer=optimizer, **{**defaults, **options}
    )


def call_task(student: nn.Module, optimizer: Any, task: int, **options: Any) -> Any:
    """Return the gradient on one of the tasks."""
    inner = [one_of(batch, task) for batch in INNER_OF_TASKS]
    ahead = Lookahead(inner, settings=options.pop("settings", None))
    outer = one_of(OUTER_OF_TASKS, task)
    return call_tasks(student, optimizer, outer=outer, inner=ahead, tasks=False, **options)


def assert_is_mean_of_tasks(student: nn.Module, optimizer: Any, **options: Any) -> None:
    """Compare the gradient over tasks with a loop over them, on the eager road."""
    state = {name: t.clone() for name, t in student.state_dict().items()}
    settings = options.pop("settings", None)
    ahead = Lookahead(INNER_OF_TASKS, settings=settings)
    at_once = call_tasks(student, optimizer, inner=ahead, **options)
    assert all(torch.equal(t, state[name]) for name, t in student.state_dict().items())
    options.pop("compile", None)
    of_tasks = [
        call_task(student, optimizer, task, settings=settings, **options) for task in range(TASKS)
    ]
    for name in ("grads", "start", "settings", "direct"):
        found = getattr(at_once, name)
        trees = [getattr(of_task, name) for of_task in of_tasks]
        mean = {key: torch.stack([tree[key] for tree in trees]).mean(0) for key in trees[0]}
        assert found.keys() == mean.keys()
        assert not mean or error(found, mean) < 1e-12
    for name in ("inner_loss", "outer_loss"):
        mean_loss = torch.stack([getattr(of_task, name) for of_task in of_tasks]).mean()
        assert error(getattr(at_once, name), mean_loss) < 1e-12
    for step, h in enumerate(at_once.feedback):
        # It is of the mean of the outer losses.
        expected = torch.stack([of_task.feedback[step] for of_task in of_tasks]) / TASKS
        torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-14)
    for name, t in at_once.student_params.items():
        weights = torch.stack([of_task.student_params[name] for of_task in of_tasks])
        assert error(t, weights) < 1e-12


MOMENTUM = partial(SGD, lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.01)
OF_TASKS: dict[str, dict[str, Any]] = {
    "start": {},
    "unrolled": {"mode": "unrolled", "wrt": ["start", "lr"]},
    "first order": {"mode": Forward(truncate=0)},
    "last step": {"mode": Forward(truncate=1)},
    "settings": {"wrt": ["start", "lr", "momentum", "weight_decay"]},
    "clipped": {"clip_norm": 0.1},
    "compiled": {"compile": True, "wrt": ["start", "lr"]},
    "a rate for each step": {
        "settings": {"lr": torch.tensor([[0.1], [0.3]])},
        "wrt": ["start", "lr"],
    },
}
USUAL = ("start", "a rate for each step")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.long] * (case not in USUAL)) for case in OF_TASKS],
)
def test_tasks_at_once_are_the_mean_of_tasks_in_a_loop(case: str) -> None:
    student = network()
    optimizer = MOMENTUM(student.parameters())
    assert_is_mean_of_tasks(student, optimizer, **{"wrt": "start", **OF_TASKS[case]})


@pytest.mark.parametrize("adam_is_first", [True, False])
def test_tasks_take_settings_that_one_of_several_optimizers_has(*, adam_is_first: bool) -> None:
    student = network()
    weights = [*student.parameters()]
    adam = torch.optim.Adam(weights[:2], lr=0.1, eps=1e-2)
    optimizers = (adam, SGD(weights[2:], lr=0.3))
    if not adam_is_first:
        optimizers = optimizers[::-1]
    assert_is_mean_of_tasks(student, optimizers, wrt=["start", "lr", "betas"])


@pytest.mark.parametrize(
    ("mode", "rule"),
    [
        ("forward", partial(SGD, lr=0.3)),
        pytest.param("unrolled", partial(SGD, lr=0.3), marks=pytest.mark.long),
        pytest.param("forward", partial(torch.optim.Adam, lr=0.01), marks=pytest.mark.long),
        pytest.param("unrolled", partial(torch.optim.Adam, lr=0.01), marks=pytest.mark.long),
    ],
)
def test_a_teacher_learns_from_tasks_at_once(mode: str, rule: Any) -> None:
    student = network()
    torch.manual_seed(1)
    teacher = nn.Linear(4, 1).double()
    options = {"teacher": teacher, "mode": mode, "wrt": ["teacher", "start"]}
    assert_is_mean_of_tasks(student, rule(student.parameters()), **options)


def test_each_task_has_batch_statistics_of_its_own() -> None:
    student = network(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    student[0].bias.requires_grad_(requires_grad=False)
    learned = [p for p in student.parameters() if p.requires_grad]
    assert_is_mean_of_tasks(student, MOMENTUM(learned), wrt="start")


@pytest.mark.filterwarnings("ignore:allowed")
def test_each_task_has_an_iteration_of_spectral_norm_of_its_own() -> None:
    """It writes by ``out=``, for which vmap has no rules."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
    student = network(layer, nn.Tanh(), nn.Linear(5, 3))
    assert_is_mean_of_tasks(student, SGD(student.parameters(), lr=0.3), wrt="start")


@pytest.mark.parametrize("truncate", [None, 0])
def test_maml_over_tasks_is_double_backward_by_hand(truncate: int | None) -> None:
    student = network()
    start = {name: p.detach().clone().requires_grad_() for name, p in student.named_parameters()}
    losses = []
    for task in range(TASKS):
        theta: Tree = dict(start)
        for inner in INNER_OF_TASKS:
            slopes = inner_gradients(student, theta, one_of(inner, task))
            if truncate == 0:
                slopes = {name: t.detach() for name, t in slopes.items()}
            theta = {name: p - 0.3 * slopes[name] for name, p in theta.items()}
        losses.append(loss_at(student, theta, one_of(OUTER_OF_TASKS, task)))
    expected = outer_gradients(torch.stack(losses).mean(), start)
    optimizer = SGD(student.parameters(), lr=0.3)
    mode = Forward(truncate=truncate)
    found = call_tasks(student, optimizer, mode=mode, wrt="start")
    assert error(found.start, expected) < 1e-12


def test_each_task_has_draws_of_its_own() -> None:
    """Of equal tasks with dropout, no two take the same steps."""
    student = network(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    x, y = batch(0)
    same = x.expand(TASKS, *x.shape), y.expand(TASKS, *y.shape)
    optimizer = SGD(student.parameters(), lr=0.3)
    with torch.random.fork_rng():
        found = call_tasks(student, optimizer, outer=same, inner=same, wrt="start")
    first, second, third = found.student_params["0.weight"]
    assert not any(torch.equal(*pair) for pair in ((first, second), (second, third)))


def with_one_task_more() -> dict[str, Any]:
    x, y = OUTER_OF_TASKS
    return {"outer": (torch.cat([x, x[:1]]), torch.cat([y, y[:1]]))}


def with_a_number() -> dict[str, Any]:
    return {"outer": (*OUTER_OF_TASKS, torch.tensor(1.0))}


WRONG_TASKS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "another number": (with_one_task_more, r"outer\[0\] of 4, .*inner\[0\]\[0\] of 3"),
    "no dimension": (with_a_number, r"outer\[2\], .* shape \(\), .*first dimension of tasks"),
    "a generator": (lambda: {"generator": torch.Generator()}, "torch.manual_seed"),
    "micro-batches": (lambda: {"accumulate": 2}, "with accumulate; or leave tasks out"),
    "a mode": (lambda: {"mode": "none", "wrt": "teacher"}, r"expected Forward\(\)"),
    "kept states": (lambda: {"mode": Forward(keep_every=2)}, "computes no step again"),
    "progress": (lambda: {"progress": True}, "expected them left out"),
}


@pytest.mark.parametrize("case", WRONG_TASKS)
def test_wrong_tasks_are_refused_in_one_line(case: str) -> None:
    options, words = WRONG_TASKS[case]
    student = network()
    with pytest.raises(MetaplError, match=words) as refused:
        call_tasks(student, SGD(student.parameters(), lr=0.3), **{"wrt": "start", **options()})
    assert "\n" not in str(refused.value)


def test_a_task_that_diverges_is_named() -> None:
    student = network()
    x, y = OUTER_OF_TASKS
    with_nan = x.clone()
    with_nan[1, 0] = torch.nan
    random_state = torch.get_rng_state()
    with pytest.raises(MetaplError, match="task 1: .*outer loss is NaN"):
        call_tasks(student, SGD(student.parameters(), lr=0.3), outer=(with_nan, y), wrt="start")
    assert torch.equal(torch.get_rng_state(), random_state)


class ReadsValue(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x.detach().abs().max())


def test_a_student_that_reads_values_goes_into_a_loop_over_tasks() -> None:
    student = network(ReadsValue(4, 3))
    with pytest.raises(MetaplError, match="reads the value .* a loop over the tasks"):
        call_tasks(student, SGD(student.parameters(), lr=0.3), wrt="start")


class Counts(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_a_student_that_counts_its_passes_is_not_recorded() -> None:
    student = network(Counts(4, 3))
    with pytest.raises(MetaplError, match="a loop over the tasks"):
        call_tasks(student, SGD(student.parameters(), lr=0.3), wrt="start", verify=False)


def test_another_student_of_one_architecture_records_nothing() -> None:
    recorded: list[Any] = []
    weights: list[weakref.ref[Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_CACHE", {})
        graph_of = capture.graph_of

        def counted(*arguments: Any, **options: Any) -> Any:
            recorded.append(arguments)
            return graph_of(*arguments, **options)

        patch.setattr(capture, "graph_of", counted)
        for seed in (0, 1, 2):
            student = network()
            weights.append(weakref.ref(student[0].weight))
            with torch.no_grad():
                for p in student.parameters():
                    p += seed
            found = call_tasks(student, SGD(student.parameters(), lr=0.1), wrt="start")
            loop = [
                call_task(student, SGD(student.parameters(), lr=0.1), task, wrt="start")
                for task in range(TASKS)
            ]
            for name, t in found.start.items():
                mean = torch.stack([of_task.start[name] for of_task in loop]).mean(0)
                assert error(t, mean) < 1e-12
        # What is kept holds no network of the user's, nor its weights.
        del student, found, loop, p
        gc.collect()
        assert [weight() for weight in weights] == [None] * 3
    assert len(recorded) == 1
