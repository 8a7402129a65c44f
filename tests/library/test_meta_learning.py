"""Initial weights learned through inner steps.

MAML, its first order, ANIL and Meta-SGD are compared with loops by hand.
"""

from __future__ import annotations

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
    with pytest.raises(MetaplError, match=rf"inner_optimizer has '{name}' of shape .* a number"):
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
        with pytest.raises(MetaplError, match=r"wrt='start'"):
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
    with pytest.raises(MetaplError, match=r"without 0\.weight, 0\.bias .* in a group with lr=0"):
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
