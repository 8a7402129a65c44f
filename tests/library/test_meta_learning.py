"""Initial weights learned through inner steps.

MAML, its first order, ANIL and Meta-SGD are compared with loops by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import reference
import torch
from problems_zoo import toy
from reference import error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metapl
from metapl import Lookahead, MetaplError
from metapl.feedback import Forward, Unrolled
from metapl.functional import compiled
from metapl.problems import EqualWeights
from metapl.updates import update_of

Tree = dict[str, Tensor]
SGD = torch.optim.SGD
STEPS = 4


@pytest.fixture(autouse=True)
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave graphs as plain functions, where what they compute matters; one test captures them."""
    if "captured" in request.node.name:
        monkeypatch.setattr(compiled, "backend_of", lambda device: {"backend": "aot_eager"})
    else:
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)


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


MOTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    "dampened": {"momentum": 0.6, "dampening": 0.3, "maximize": True, "weight_decay": 0.02},
}


def with_entries(student: nn.Module, rates: Tree, **options: Any) -> Any:
    """Return SGD with a rate for each entry of each weight."""
    groups = [{"params": [p], "lr": rates[name]} for name, p in student.named_parameters()]
    return SGD(groups, lr=0.1, **options)


def rates_of(student: nn.Module) -> Tree:
    generator = torch.Generator().manual_seed(3)
    rates = {}
    for name, p in student.named_parameters():
        rates[name] = (0.05 + 0.4 * torch.rand(p.shape, generator=generator)).to(p.dtype)
    return rates


def loss_after_rates(
    student: nn.Module, rates_of_steps: Sequence[Tree], start: Tree, **options: Any
) -> Tensor:
    """Return L(θ_K) of textbook SGD, with a rate for each entry of each weight in each step."""
    rule = reference.sgd(1.0, **options)
    state = None
    params = start
    for rates, batch in zip(rates_of_steps, INNER, strict=True):
        gradients = inner_gradients(student, params, batch)
        # A rule of rate 1 gives the direction of the step, which the rates then scale.
        target, state = rule(params, gradients, state)
        params = {name: p + rates[name] * (target[name] - p) for name, p in params.items()}
    return loss_at(student, params, OUTER)


ROADS = [
    (mode, compile)
    for mode in (Forward(), Forward(keep_every=3), Unrolled())
    for compile in (False, True)
]


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize(("mode", "compile"), ROADS)
def test_a_rate_for_each_entry(mode: Any, compile: bool, motion: str) -> None:
    student = network()
    rates = rates_of(student)
    start = reference.weights(student)
    rates_of_steps = []
    rate_leaves: list[Tensor] = []
    for _ in INNER:
        leaves = {name: rate.clone().requires_grad_() for name, rate in rates.items()}
        rates_of_steps.append(leaves)
        rate_leaves.extend(leaves.values())
    L = loss_after_rates(student, rates_of_steps, start, **MOTIONS[motion])
    expected = torch.autograd.grad(L, [*start.values(), *rate_leaves])
    expected_start = expected[: len(start)]
    expected_rates = expected[len(start) :]

    rates_before = copy.deepcopy(rates)
    optimizer = with_entries(student, rates, **MOTIONS[motion])
    gradient = hypergradient(student, optimizer, mode=mode, compile=compile, wrt=["start", "lr"])
    assert float((gradient.outer_loss - L).detach().abs()) < 1e-12
    assert error(gradient.start, dict(zip(start, expected_start, strict=True))) < 1e-10
    for number, (name, rate) in enumerate(rates.items()):
        # The leaves stand step by step, and in each step weight by weight.
        expected_rate = torch.stack(expected_rates[number :: len(rates)])
        rate_gradient = gradient.settings["lr"][number]
        assert rate_gradient.shape == (STEPS, *rate.shape)
        assert rate_gradient.dtype == torch.float64
        assert error(rate_gradient, expected_rate) < 1e-10, name
    for name, rate in rates.items():
        assert torch.equal(rate, rates_before[name])
        assert not rate.requires_grad
        assert rate.grad is None


@pytest.mark.long
def test_the_graphs_of_a_rate_for_each_entry_are_captured() -> None:
    student = network()
    optimizer = with_entries(student, rates_of(student), momentum=0.9)
    eager = hypergradient(student, optimizer, compile=False, wrt=["start", "lr"])
    pure = hypergradient(student, optimizer, compile=True, wrt=["start", "lr"])
    assert error(pure.start, eager.start) < 1e-10
    pure_rates = dict(enumerate(pure.settings["lr"]))
    eager_rates = dict(enumerate(eager.settings["lr"]))
    assert error(pure_rates, eager_rates) < 1e-10


def test_central_differences_of_real_steps_in_a_rate() -> None:
    """SGD's own step, whose rate requires a gradient, on a network without dimensions of size 1."""
    student = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    rates = rates_of(student)

    def loss_after_training(shift: float) -> float:
        """Return L(θ_K) with all rates of the first weight shifted."""
        trained = copy.deepcopy(student)
        shifted_rates = {name: rate.clone() for name, rate in rates.items()}
        shifted_rates["0.weight"] += shift
        for rate in shifted_rates.values():
            rate.requires_grad_()
        optimizer = with_entries(trained, shifted_rates, momentum=0.9, foreach=False)
        for x, y in INNER:
            optimizer.zero_grad()
            F.cross_entropy(trained(x), y).backward()
            optimizer.step()
        x, y = OUTER
        return F.cross_entropy(trained(x), y).item()

    optimizer = with_entries(student, rates, momentum=0.9)
    gradient = hypergradient(student, optimizer, wrt="lr")
    slope = (loss_after_training(1e-5) - loss_after_training(-1e-5)) / 2e-5
    assert abs(slope - float(gradient.settings["lr"][0].sum())) < 1e-8
    assert abs(loss_after_training(0.0) - float(gradient.outer_loss)) < 1e-12


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("mode", [Forward(), Unrolled()])
def test_numbers_stand_beside_rates_for_each_entry_and_settings_have_both(
    mode: Any, compile: bool
) -> None:
    """Of three groups the first has a rate for each entry, the others a number for two and three.

    The settings have the shape of the result.
    """
    student = network()
    weights = dict(student.named_parameters())
    names = list(weights)
    rates = rates_of(student)
    groups = [
        {"params": [weights[names[0]]], "lr": rates[names[0]]},
        {"params": [weights[name] for name in names[1:3]], "lr": 0.2},
        {"params": [weights[name] for name in names[3:]], "lr": torch.tensor(0.15)},
    ]
    decline = torch.linspace(1, 0.7, STEPS).double()
    rates_by_group = [decline.view(-1, 1, 1) * rates[names[0]], 0.2 * decline, 0.15 * decline]

    start = reference.weights(student)
    leaves = [rate.clone().requires_grad_() for rate in rates_by_group]
    group_of_weight = [0, 1, 1, 2, 2, 2]
    rates_of_steps = []
    for k in range(STEPS):
        rates_of_step = {}
        for name, group in zip(names, group_of_weight, strict=True):
            rates_of_step[name] = leaves[group][k]
        rates_of_steps.append(rates_of_step)
    L = loss_after_rates(student, rates_of_steps, start, momentum=0.5)
    expected = torch.autograd.grad(L, leaves)

    gradient = hypergradient(
        student,
        SGD(groups, lr=0.1, momentum=0.5),
        inner=Lookahead(INNER, settings={"lr": rates_by_group}),
        mode=mode,
        compile=compile,
        wrt="lr",
    )
    for rate_gradient, expected_gradient in zip(gradient.settings["lr"], expected, strict=True):
        assert rate_gradient.shape == expected_gradient.shape
        assert error(rate_gradient, expected_gradient) < 1e-10


def test_a_rate_for_each_entry_in_float32_and_for_some_of_several_optimizers() -> None:
    student = network().float()
    body = student[0]
    head = [*student[2].parameters(), *student[4].parameters()]
    groups = [{"params": [p], "lr": torch.full_like(p, 0.3)} for p in body.parameters()]
    with_rates = (SGD(groups, lr=0.1, momentum=0.9), torch.optim.Adam(head, lr=0.01))
    with_numbers = (SGD(body.parameters(), lr=0.3, momentum=0.9), torch.optim.Adam(head, lr=0.01))
    batches = [(x.float(), y) for x, y in INNER]
    options: dict[str, Any] = {
        "inner": Lookahead(batches),
        "outer": batches[0],
        "wrt": ["start", "lr"],
    }
    by_entry = hypergradient(student, with_rates, **options)
    by_group = hypergradient(student, with_numbers, **options)
    assert {p.dtype for p in by_entry.student_params.values()} == {torch.float32}
    assert error(by_entry.start, by_group.start) < 1e-5
    weight_rates, bias_rates, adam_rate = by_entry.settings["lr"]
    sum_over_entries = weight_rates.flatten(1).sum(1) + bias_rates.flatten(1).sum(1)
    assert error(sum_over_entries, by_group.settings["lr"][:, 0]) < 1e-4
    assert error(adam_rate, by_group.settings["lr"][:, 1]) < 1e-4


def test_a_trainer_steps_with_rates_for_each_entry() -> None:
    """The student's own step, verified, beside the rule by hand."""
    case = toy("mlp")
    student = case.student
    rates = {name: torch.rand_like(p) * 0.3 for name, p in student.named_parameters()}
    optimizer = with_entries(student, rates, momentum=0.9)
    trainer = metapl.BilevelTrainer(**case.networks(), mode="forward", inner_optimizer=optimizer)
    theta = {name: p.detach().clone() for name, p in student.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
    for _ in range(3):
        labels = case.teacher(case.unlabeled).softmax(-1).detach()
        leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
        loss = F.cross_entropy(functional_call(student, leaves, (case.unlabeled,)), labels)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        for name, gradient in zip(leaves, gradients, strict=True):
            velocity[name] = 0.9 * velocity[name] + gradient
            theta[name] = theta[name] - rates[name] * velocity[name]
        trainer.step(case.labeled, case.unlabeled)
    student_params = dict(student.named_parameters())
    buffers = {name: optimizer.state[p]["momentum_buffer"] for name, p in student_params.items()}
    assert error(student_params, theta) < 1e-10
    assert error(buffers, velocity) < 1e-10
    with pytest.raises(MetaplError, match="a rate for each entry of a weight; leave compile out"):
        metapl.BilevelTrainer(
            **case.networks(), mode="forward", inner_optimizer=optimizer, verify=False, compile=True
        ).step(case.labeled, case.unlabeled)


def with_one_rate_in_the_first_shape(weights: list[nn.Parameter]) -> Any:
    return SGD([{"params": weights, "lr": torch.full_like(weights[0], 0.1)}])


def with_a_row_of_rates(weights: list[nn.Parameter]) -> Any:
    groups = []
    for p in weights:
        rate = torch.full_like(p[..., :1], 0.1).expand(*p.shape[:-1], 2)
        groups.append({"params": [p], "lr": rate})
    return SGD(groups)


def with_rates_in_float16(weights: list[nn.Parameter]) -> Any:
    groups = [{"params": [p], "lr": torch.full(p.shape, 0.1, dtype=torch.float16)} for p in weights]
    return SGD(groups)


def adam_with_rates(weights: list[nn.Parameter]) -> Any:
    return torch.optim.Adam([{"params": [p], "lr": torch.full_like(p, 0.1)} for p in weights])


def with_decays(weights: list[nn.Parameter]) -> Any:
    groups = [{"params": [p], "weight_decay": torch.full_like(p, 0.1)} for p in weights]
    return SGD(groups, lr=0.1)


def with_momenta(weights: list[nn.Parameter]) -> Any:
    groups = [{"params": [p], "momentum": torch.full_like(p, 0.1)} for p in weights]
    return SGD(groups, lr=0.1)


WRONG_RATES: dict[str, tuple[str, Callable[[list[nn.Parameter]], Any]]] = {
    "another shape": ("a group for each weight", with_one_rate_in_the_first_shape),
    "a row of rates": ("a group for each weight", with_a_row_of_rates),
    "another type": ("torch.float32", with_rates_in_float16),
    "of Adam": ("takes no such step", adam_with_rates),
    "a decay for each entry": ("'weight_decay'", with_decays),
    "a momentum for each entry": ("'momentum'", with_momenta),
}


@pytest.mark.parametrize("name", WRONG_RATES)
def test_other_settings_with_several_values_are_refused(name: str) -> None:
    text, build = WRONG_RATES[name]
    student = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).float()
    optimizer = build(list(student.parameters()))
    weights = dict(student.named_parameters())
    with pytest.raises(MetaplError, match=text) as refusal:
        update_of(optimizer, weights)
    assert "\n" not in str(refusal.value)


def test_a_rate_that_requires_a_gradient_is_refused_with_what_to_give() -> None:
    student = network()
    rates = {name: rate.requires_grad_() for name, rate in rates_of(student).items()}
    with pytest.raises(MetaplError, match=r"values alone \(lr\.detach\(\)\)"):
        hypergradient(student, with_entries(student, rates), wrt="lr")


def test_settings_that_do_not_fit_the_rates_are_refused() -> None:
    student = network()
    rates = rates_of(student)
    optimizer = with_entries(student, rates)
    tables = [rate.expand(STEPS, *rate.shape) for rate in rates.values()]
    without_a_group = tables[:-1]
    without_a_step = [table[1:] for table in tables]
    with_another_shape = [tables[1], *tables[1:]]
    for rates_by_group in (without_a_group, without_a_step, with_another_shape):
        with pytest.raises(MetaplError, match="for each param group"):
            hypergradient(
                student, optimizer, inner=Lookahead(INNER, settings={"lr": rates_by_group})
            )


def test_a_feedback_in_units_of_a_rate_for_each_entry_is_refused() -> None:
    case = toy("mlp")
    rates = {name: torch.rand_like(p) for name, p in case.student.named_parameters()}
    optimizer = with_entries(case.student, rates)
    mode = Forward(normalization="learning_rate")
    trainer = metapl.BilevelTrainer(
        **case.networks(), mode=mode, inner_optimizer=optimizer, verify=False
    )
    with pytest.raises(MetaplError, match="no single learning rate"):
        trainer.step(case.labeled, case.unlabeled)
    with pytest.raises(MetaplError, match="without a single learning rate"):
        trainer.functional()


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


@pytest.mark.parametrize("compile", [False, True])
def test_what_no_step_reaches_is_refused(compile: bool) -> None:
    student = network()
    optimizer = SGD(student.parameters(), lr=0.1)
    mode: Any = Forward(truncate=0)
    for wrt in ("teacher", "lr", ["start", "lr"], ["teacher", "start"]):
        with pytest.raises(MetaplError, match=r"expected wrt='start', or a truncate of 1"):
            hypergradient(student, optimizer, mode=mode, wrt=wrt, compile=compile)
    mode = Forward(truncate=2)
    with pytest.raises(MetaplError, match="all steps, or wrt='start'"):
        hypergradient(student, optimizer, mode=mode, wrt=["start", "lr"], compile=compile)
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


def proposal_of(refusal: MetaplError) -> str:
    """Return the statement that an error on missing weights ends with."""
    _, _, proposal = str(refusal).partition("a group with lr=0: ")
    return proposal.removesuffix(".")


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("mode", [Forward(), Unrolled()])
def test_the_proposal_for_a_part_of_the_weights_runs_and_is_anil(mode: Any, compile: bool) -> None:
    student = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    inner_optimizer = SGD(student[2].parameters(), lr=0.3, momentum=0.9)
    with pytest.raises(MetaplError, match=r"without 0\.weight, 0\.bias") as refusal:
        hypergradient(student, inner_optimizer, wrt="start")
    assert "\n" not in str(refusal.value)
    exec(proposal_of(refusal.value), {"student": student, "inner_optimizer": inner_optimizer})
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


def test_the_proposal_runs_for_a_tuple_of_optimizers() -> None:
    student = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    inner_optimizer = (
        torch.optim.Muon([student[2].weight], lr=0.1),
        torch.optim.Adam([student[2].bias], lr=0.1),
    )
    with pytest.raises(MetaplError, match="lr=0") as refusal:
        hypergradient(student, inner_optimizer, wrt="start")
    exec(proposal_of(refusal.value), {"student": student, "inner_optimizer": inner_optimizer})
    gradient = hypergradient(student, inner_optimizer, wrt="start")
    assert gradient.start["0.weight"].any()
    assert torch.equal(gradient.student_params["0.weight"], student[0].weight)
    muon = torch.optim.Muon([student[2].weight], lr=0.1)
    with pytest.raises(MetaplError, match=r"new ones by add_param_group\.$"):
        hypergradient(student, muon, wrt="start")


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
