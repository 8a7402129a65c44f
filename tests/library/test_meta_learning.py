"""Initial weights learned through inner steps.

MAML, first order, ANIL, Meta-SGD, MAML++, beside loops by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
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
WEIGHTS = [0.4, 0.0, -0.3, 1.2]


@pytest.fixture(autouse=True)
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave graphs as plain functions, where what they compute matters; one test captures them."""
    if "captured" in request.node.name:
        monkeypatch.setattr(compiled, "backend_of", lambda device: {"backend": "aot_eager"})
    else:
        monkeypatch.setattr(torch, "compile", lambda function, **how: function)


def batch(number: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + number)
    return torch.randn(rows, 4, generator=draw).double(), torch.randint(
        0, 3, (rows,), generator=draw
    )


INNER = [batch(number) for number in range(STEPS)]
OUTER = [batch(-number - 1, rows=5) for number in range(STEPS)]


def network(*layers: nn.Module) -> nn.Module:
    """Return a network with weights of shapes (1, n) and (n, 1), and a bias of one entry."""
    torch.manual_seed(0)
    made = layers or (nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 3))
    return nn.Sequential(*made).double()


def given(student: nn.Module, optimizer: Any, **more: Any) -> dict[str, Any]:
    usual = {
        "outer": OUTER[-1],
        "inner": Lookahead(INNER),
        "problem": EqualWeights(),
        "inner_optimizer": optimizer,
    }
    return {"teacher": None, "student": student, **usual, **more}


def loss_at(student: nn.Module, params: Tree, pair: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(functional_call(student, params, (pair[0],)), pair[1])


def walked(student: nn.Module, params: Tree, rule: Callable[[int, Tree, Tree], Tree]) -> list[Tree]:
    """Return θ_0, ..., θ_K, in one graph, by a rule (k, θ, g) -> θ′."""
    path = [params]
    for number, pair in enumerate(INNER):
        grads = torch.autograd.grad(
            loss_at(student, path[-1], pair), [*path[-1].values()], create_graph=True
        )
        path.append(rule(number, path[-1], dict(zip(params, grads, strict=True))))
    return path


MOTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    "dampened": {"momentum": 0.6, "dampening": 0.3, "maximize": True, "weight_decay": 0.02},
}


def with_entries(student: nn.Module, rates: Tree, **options: Any) -> Any:
    return SGD(
        [{"params": [p], "lr": rates[name]} for name, p in student.named_parameters()],
        lr=0.1,
        **options,
    )


def rates_of(student: nn.Module) -> Tree:
    draw = torch.Generator().manual_seed(3)
    return {
        name: (0.05 + 0.4 * torch.rand(p.shape, generator=draw)).to(p.dtype)
        for name, p in student.named_parameters()
    }


def by_rates(student: nn.Module, rates: Sequence[Tree], start: Tree, **options: Any) -> Tensor:
    """Return L(θ_K) of textbook SGD, with a rate for each entry of each weight in each step."""
    rule, state = reference.sgd(1.0, **options), None

    def moved(number: int, params: Tree, grads: Tree) -> Tree:
        nonlocal state
        new, state = rule(params, grads, state)
        return {name: p + rates[number][name] * (new[name] - p) for name, p in params.items()}

    return loss_at(student, walked(student, start, moved)[-1], OUTER[-1])


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
    by_step = [{name: t.clone().requires_grad_() for name, t in rates.items()} for _ in INNER]
    L = by_rates(student, by_step, start, **MOTIONS[motion])
    expected = torch.autograd.grad(
        L, [*start.values(), *(t for step in by_step for t in step.values())]
    )
    before = copy.deepcopy(rates)
    optimizer = with_entries(student, rates, **MOTIONS[motion])
    found = metapl.hypergradient(
        **given(student, optimizer, mode=mode, compile=compile, wrt=["start", "lr"])
    )
    assert float((found.outer_loss - L).detach().abs()) < 1e-12
    assert error(found.start, dict(zip(start, expected, strict=False))) < 1e-10
    in_rates = expected[len(start) :]
    for number, (name, rate) in enumerate(rates.items()):
        own = torch.stack(in_rates[number :: len(rates)])
        assert found.settings["lr"][number].shape == (STEPS, *rate.shape)
        assert found.settings["lr"][number].dtype == torch.float64
        assert error(found.settings["lr"][number], own) < 1e-10, name
    assert all(torch.equal(rate, before[name]) for name, rate in rates.items())
    assert all(not rate.requires_grad and rate.grad is None for rate in rates.values())


@pytest.mark.long
def test_the_graphs_of_a_rate_for_each_entry_are_captured() -> None:
    student = network()
    optimizer = with_entries(student, rates_of(student), momentum=0.9)
    both = [
        metapl.hypergradient(**given(student, optimizer, compile=c, wrt=["start", "lr"]))
        for c in (False, True)
    ]
    eager, pure = both
    assert error(pure.start, eager.start) < 1e-10
    assert (
        error(dict(enumerate(pure.settings["lr"])), dict(enumerate(eager.settings["lr"]))) < 1e-10
    )


def test_central_differences_of_real_steps_in_a_rate() -> None:
    """SGD's own step, whose rate requires a gradient, on a network without dimensions of size 1."""
    student = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    rates = rates_of(student)

    def trained(shift: float) -> float:
        own = copy.deepcopy(student)
        moved = {
            name: (t + shift * (name == "0.weight")).requires_grad_() for name, t in rates.items()
        }
        optimizer = with_entries(own, moved, momentum=0.9, foreach=False)
        for x, y in INNER:
            optimizer.zero_grad()
            F.cross_entropy(own(x), y).backward()
            optimizer.step()
        return F.cross_entropy(own(OUTER[-1][0]), OUTER[-1][1]).item()

    found = metapl.hypergradient(
        **given(student, with_entries(student, rates, momentum=0.9), wrt="lr")
    )
    assert (
        abs((trained(1e-5) - trained(-1e-5)) / 2e-5 - float(found.settings["lr"][0].sum())) < 1e-8
    )
    assert abs(trained(0.0) - float(found.outer_loss)) < 1e-12


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("mode", [Forward(), Unrolled()])
def test_numbers_stand_beside_rates_for_each_entry_and_a_schedule_has_both(
    mode: Any, compile: bool
) -> None:
    """Two groups with a number, one of them of two weights.

    The schedule in the shape of the result.
    """
    student = network()
    weights = dict(student.named_parameters())
    names, rates = [*weights], rates_of(student)
    groups = [
        {"params": [weights[names[0]]], "lr": rates[names[0]]},
        {"params": [weights[name] for name in names[1:3]], "lr": 0.2},
        {"params": [weights[name] for name in names[3:]], "lr": torch.tensor(0.15)},
    ]
    falling = torch.linspace(1, 0.7, STEPS).double()
    schedule = [falling.view(-1, 1, 1) * rates[names[0]], 0.2 * falling, 0.15 * falling]
    start = reference.weights(student)
    leaves = [t.clone().requires_grad_() for t in schedule]
    by_step = [
        dict(zip(names, [leaves[0][k], *[leaves[1][k]] * 2, *[leaves[2][k]] * 3], strict=True))
        for k in range(STEPS)
    ]
    L = by_rates(student, by_step, start, momentum=0.5)
    expected = torch.autograd.grad(L, leaves)
    more = {
        "inner": Lookahead(INNER, schedule={"lr": schedule}),
        "mode": mode,
        "compile": compile,
        "wrt": "lr",
    }
    found = metapl.hypergradient(**given(student, SGD(groups, lr=0.1, momentum=0.5), **more))
    for own, t in zip(found.settings["lr"], expected, strict=True):
        assert own.shape == t.shape
        assert error(own, t) < 1e-10


def test_a_rate_for_each_entry_in_float32_and_for_some_of_several_optimizers() -> None:
    student = network().float()
    body, head = student[0], [*student[2].parameters(), *student[4].parameters()]
    rates = [torch.full_like(p, 0.3) for p in body.parameters()]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(body.parameters(), rates, strict=True)]
    pairs = (SGD(groups, lr=0.1, momentum=0.9), torch.optim.Adam(head, lr=0.01))
    numbers = (SGD(body.parameters(), lr=0.3, momentum=0.9), torch.optim.Adam(head, lr=0.01))
    x = [(x.float(), y) for x, y in INNER]
    more: dict[str, Any] = {"inner": Lookahead(x), "outer": x[0], "wrt": ["start", "lr"]}
    each, one = (metapl.hypergradient(**given(student, own, **more)) for own in (pairs, numbers))
    assert {p.dtype for p in each.student_params.values()} == {torch.float32}
    assert error(each.start, one.start) < 1e-5
    summed = sum(each.settings["lr"][i].flatten(1).sum(1) for i in range(2))
    assert error(summed, one.settings["lr"][:, 0]) < 1e-4
    assert error(each.settings["lr"][2], one.settings["lr"][:, 1]) < 1e-4


def test_a_trainer_steps_with_rates_for_each_entry() -> None:
    """The student's own step, verified, beside the rule by hand."""
    case = toy("mlp")
    student = case.student
    rates = {name: torch.rand_like(p) * 0.3 for name, p in student.named_parameters()}
    optimizer = with_entries(student, rates, momentum=0.9)
    trainer = metapl.BilevelTrainer(**case.networks(), mode="forward", inner_optimizer=optimizer)
    theta = {name: p.detach().clone() for name, p in student.named_parameters()}
    buffers = {name: torch.zeros_like(p) for name, p in theta.items()}
    for _ in range(3):
        labels = case.teacher(case.unlabeled).softmax(-1).detach()
        at = {name: p.clone().requires_grad_() for name, p in theta.items()}
        loss = F.cross_entropy(functional_call(student, at, (case.unlabeled,)), labels)
        for (name, p), g in zip(at.items(), torch.autograd.grad(loss, [*at.values()]), strict=True):
            buffers[name] = 0.9 * buffers[name] + g
            theta[name] = p.detach() - rates[name] * buffers[name]
        trainer.step(case.labeled, case.unlabeled)
    assert error({n: p.detach() for n, p in student.named_parameters()}, theta) < 1e-10
    assert (
        error(
            {n: optimizer.state[p]["momentum_buffer"] for n, p in student.named_parameters()},
            buffers,
        )
        < 1e-10
    )
    with pytest.raises(MetaplError, match="a rate for each entry of a weight; leave compile out"):
        metapl.BilevelTrainer(
            **case.networks(), mode="forward", inner_optimizer=optimizer, verify=False, compile=True
        ).step(case.labeled, case.unlabeled)


WRONG_RATES: dict[str, tuple[str, Callable[[list[Any]], Any]]] = {
    "another shape": (
        "a group for each weight",
        lambda p: SGD([{"params": p, "lr": torch.full_like(p[0], 0.1)}]),
    ),
    "a row of rates": (
        "a group for each weight",
        lambda p: SGD(
            [
                {"params": [q], "lr": torch.full_like(q[..., :1], 0.1).expand(*q.shape[:-1], 2)}
                for q in p
            ]
        ),
    ),
    "another type": (
        "torch.float32",
        lambda p: SGD(
            [{"params": [q], "lr": torch.full(q.shape, 0.1, dtype=torch.float16)} for q in p]
        ),
    ),
    "of Adam": (
        "takes no such step",
        lambda p: torch.optim.Adam([{"params": [q], "lr": torch.full_like(q, 0.1)} for q in p]),
    ),
    "a decay for each entry": (
        "'weight_decay'",
        lambda p: SGD(
            [{"params": [q], "weight_decay": torch.full_like(q, 0.1)} for q in p], lr=0.1
        ),
    ),
    "a momentum for each entry": (
        "'momentum'",
        lambda p: SGD([{"params": [q], "momentum": torch.full_like(q, 0.1)} for q in p], lr=0.1),
    ),
}


@pytest.mark.parametrize("mode", ["forward", "none"])
@pytest.mark.parametrize("name", WRONG_RATES)
def test_other_settings_with_several_values_are_refused(name: str, mode: str) -> None:
    word, made = WRONG_RATES[name]
    student = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).float()
    with pytest.raises(MetaplError, match=word) as said:
        update_of(
            made([*student.parameters()]),
            dict(student.named_parameters()),
            is_differentiated=mode != "none",
        )
    assert "\n" not in str(said.value)


def test_a_rate_that_requires_a_gradient_is_refused_with_what_to_give() -> None:
    student = network()
    rates = {name: rate.requires_grad_() for name, rate in rates_of(student).items()}
    with pytest.raises(MetaplError, match=r"values alone \(lr\.detach\(\)\)"):
        metapl.hypergradient(**given(student, with_entries(student, rates), wrt="lr"))


def test_a_schedule_that_does_not_fit_the_rates_is_refused() -> None:
    student = network()
    rates = rates_of(student)
    optimizer = with_entries(student, rates)
    rows = [t.expand(STEPS, *t.shape) for t in rates.values()]
    for schedule in (rows[:-1], [row[1:] for row in rows], [rows[1], *rows[1:]]):
        with pytest.raises(MetaplError, match="for each param group"):
            metapl.hypergradient(
                **given(student, optimizer, inner=Lookahead(INNER, schedule={"lr": schedule}))
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


def gradient_of_last(student: nn.Module, truncate: int, **options: Any) -> Tree:
    """Return ∇L(θ_K) through the last steps: the graph, and the momentum's, is cut before them."""
    rule, state = reference.sgd(0.3, **options), None
    params, begun = reference.weights(student), reference.weights(student)
    for number, pair in enumerate(INNER):
        if number == STEPS - truncate:
            params = begun = {name: p.detach().requires_grad_() for name, p in params.items()}
            state = None if state is None else {name: b.detach() for name, b in state.items()}
        grads = torch.autograd.grad(
            loss_at(student, params, pair), [*params.values()], create_graph=True
        )
        params, state = rule(params, dict(zip(params, grads, strict=True)), state)
    if truncate == 0:
        params = begun = {name: p.detach().requires_grad_() for name, p in params.items()}
    found = torch.autograd.grad(loss_at(student, params, OUTER[-1]), [*begun.values()])
    return dict(zip(begun, found, strict=True))


@pytest.mark.parametrize(("mode", "compile"), ROADS)
@pytest.mark.parametrize("truncate", [0, 1, 3, STEPS, STEPS + 2])
def test_first_order_is_the_gradient_after_the_steps_that_are_left_out(
    truncate: int, mode: Any, compile: bool
) -> None:
    student = network()
    options = {"momentum": 0.9, "weight_decay": 0.05}
    optimizer = SGD(student.parameters(), lr=0.3, **options)
    mode = replace(mode, truncate=truncate)
    found = metapl.hypergradient(
        **given(student, optimizer, mode=mode, compile=compile, wrt="start")
    )
    assert error(found.start, gradient_of_last(student, min(truncate, STEPS), **options)) < 1e-10
    whole = metapl.hypergradient(**given(student, optimizer, wrt="start"))
    assert (error(found.start, whole.start) < 1e-10) == (truncate >= STEPS)


def test_first_order_with_a_teacher_cuts_both() -> None:
    case = toy("mlp")
    optimizer = SGD(case.student.parameters(), lr=0.3)
    more: dict[str, Any] = {"labeled": case.labeled, "unlabeled": Lookahead([case.unlabeled] * 3)}
    more |= {"inner_optimizer": optimizer, "mode": Forward(truncate=1)}
    both = metapl.hypergradient(case.teacher, case.student, **more, wrt=["teacher", "start"])
    alone = metapl.hypergradient(case.teacher, case.student, **more)
    assert error(both.grads, alone.grads) < 1e-12
    first = metapl.hypergradient(
        case.teacher, case.student, **more | {"mode": Forward(truncate=0)}, wrt="start"
    )
    assert first.grads == {}
    assert all(not h.any() for h in first.feedback)
    assert 1e-6 < error(both.start, first.start) < 1


@pytest.mark.parametrize("compile", [False, True])
def test_what_no_step_reaches_is_refused(compile: bool) -> None:
    student = network()
    optimizer = SGD(student.parameters(), lr=0.1)
    for wrt in ("teacher", "lr", ["start", "lr"], ["teacher", "start"]):
        with pytest.raises(MetaplError, match=r"expected wrt='start', or a truncate of 1"):
            metapl.hypergradient(
                **given(student, optimizer, mode=Forward(truncate=0), wrt=wrt, compile=compile)
            )
    with pytest.raises(MetaplError, match="all steps, or wrt='start'"):
        metapl.hypergradient(
            **given(
                student, optimizer, mode=Forward(truncate=2), wrt=["start", "lr"], compile=compile
            )
        )
    x, y = INNER[0]
    how: dict[str, Any] = {
        "steps": 2,
        "batch_size": 3,
        "mode": Forward(truncate=0),
        "compile": compile,
    }
    with pytest.raises(MetaplError, match="expected 1 or more"):
        metapl.attribute(student, (x, y), (x, y), optimizer=optimizer, **how)
    case = toy("mlp")
    for mode in (Forward(truncate=0), Unrolled(truncate=0)):
        with pytest.raises(MetaplError, match=r"wrt='start'"):
            metapl.BilevelTrainer(**case.networks(), mode=mode, compile=compile)


# --------------------------------------------------------------------------- a loss after each step


class Counting(nn.Module):
    """A part whose outputs depend on how many passes in training mode there were.

    A buffer counts them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * (1 + 0.1 * self.count)


def noisy() -> nn.Module:
    return network(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), Counting(), nn.Dropout(0.2), nn.Linear(5, 3)
    )


@pytest.mark.parametrize(("mode", "compile"), ROADS)
def test_a_loss_after_each_step_is_the_sum_of_calls(mode: Any, compile: bool) -> None:
    """Outer losses read dropout, batch norm and a buffer as the path leaves them.

    Each is as the path of so many steps leaves it.
    """
    student = noisy()
    optimizer = SGD(student.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    wrt = ["start", "lr", "momentum"]

    def call(outer: Any, steps: int) -> metapl.Hypergradient:
        torch.manual_seed(5)
        more = {
            "outer": outer,
            "inner": Lookahead(INNER[:steps]),
            "mode": mode,
            "compile": compile,
            "wrt": wrt,
        }
        return metapl.hypergradient(**given(student, optimizer, **more))

    before = copy.deepcopy(student.state_dict())
    whole = call(Lookahead(OUTER, weights=WEIGHTS), STEPS)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())
    parts = [call(OUTER[k], k + 1) for k in range(STEPS)]
    assert whole.outer_losses is not None
    assert error(whole.outer_losses, torch.stack([part.outer_loss for part in parts])) < 1e-12
    total = sum(w * part.outer_loss for w, part in zip(WEIGHTS, parts, strict=True))
    assert abs(float(whole.outer_loss - total)) < 1e-12
    expected = {
        n: sum(w * p.start[n] for w, p in zip(WEIGHTS, parts, strict=True)) for n in whole.start
    }
    assert error(whole.start, expected) < 1e-10
    for name in ("lr", "momentum"):
        padded = [
            F.pad(part.settings[name], (0, 0, 0, STEPS - len(part.settings[name])))
            for part in parts
        ]
        assert (
            error(whole.settings[name], sum(w * t for w, t in zip(WEIGHTS, padded, strict=True)))
            < 1e-10
        )
    for k, h in enumerate(whole.feedback):
        assert error(h, sum(WEIGHTS[j] * parts[j].feedback[k] for j in range(k, STEPS))) < 1e-10
    assert all(torch.equal(p, parts[-1].student_params[n]) for n, p in whole.student_params.items())


@pytest.mark.parametrize(("mode", "compile"), ROADS)
def test_a_loss_after_each_step_beside_a_loop(mode: Any, compile: bool) -> None:
    """By double backward.

    Also truncated, where the derivative of a step that is left out counts as the identity.
    """
    student = network()
    optimizer = SGD(student.parameters(), lr=0.3, weight_decay=0.05)
    more = {"outer": Lookahead(OUTER), "compile": compile, "wrt": "start"}
    for truncate in (None, 0, 2):
        first = 0 if truncate is None else STEPS - truncate
        start = begun = reference.weights(student)
        path, losses = start, list[Tensor]()
        for number, pair in enumerate(INNER):
            if number < first:  # θ moves by a constant
                at = {name: p.detach().requires_grad_() for name, p in path.items()}
                grads = torch.autograd.grad(loss_at(student, at, pair), [*at.values()])
                steps = {
                    n: -0.3 * (g + 0.05 * at[n].detach())
                    for (n, _), g in zip(at.items(), grads, strict=True)
                }
                path = {name: p + steps[name] for name, p in path.items()}
            else:
                grads = torch.autograd.grad(
                    loss_at(student, path, pair), [*path.values()], create_graph=True
                )
                path = {
                    n: p - 0.3 * (g + 0.05 * p)
                    for (n, p), g in zip(path.items(), grads, strict=True)
                }
            losses.append(loss_at(student, path, OUTER[number]))
        expected = torch.autograd.grad(torch.stack(losses).sum(), [*begun.values()])
        found = metapl.hypergradient(
            **given(student, optimizer, mode=replace(mode, truncate=truncate), **more)
        )
        assert error(found.start, dict(zip(begun, expected, strict=True))) < 1e-10
        assert error(found.outer_loss, torch.stack(losses).sum().detach()) < 1e-12


class OfAllRows(EqualWeights):
    """An outer loss that is no mean over rows."""

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1], reduction="none").logsumexp(0)


@pytest.mark.parametrize("mode", [Forward(), Forward(keep_every=3)])
def test_micro_batches_of_a_loss_of_all_rows_after_each_step(mode: Any) -> None:
    """Each step has its own labels, and its own buffers, which the outer passes read."""
    student = network(nn.Linear(4, 5), nn.Tanh(), Counting(), nn.Linear(5, 3))
    outer = [batch(-number - 1) for number in range(STEPS)]
    more = {"problem": OfAllRows(), "mode": mode, "accumulate": 2, "wrt": "start"}
    given_to = given(student, SGD(student.parameters(), lr=0.3), **more)
    whole = metapl.hypergradient(**given_to | {"outer": Lookahead(outer, weights=WEIGHTS)})
    parts = [
        metapl.hypergradient(**given_to | {"outer": outer[k], "inner": Lookahead(INNER[: k + 1])})
        for k in range(STEPS)
    ]
    assert whole.outer_losses is not None
    assert error(whole.outer_losses, torch.stack([part.outer_loss for part in parts])) < 1e-12
    expected = {
        n: sum(w * p.start[n] for w, p in zip(WEIGHTS, parts, strict=True)) for n in whole.start
    }
    assert error(whole.start, expected) < 1e-10


@pytest.mark.parametrize(("compile", "accumulate"), [(False, 1), (False, 2), (True, 1)])
def test_a_teacher_learns_from_a_loss_after_each_step(compile: bool, accumulate: int) -> None:
    case = toy("mlp")
    x, y = (t[:4] for t in case.labeled)
    outer = [(x + 0.1 * k, y) for k in range(3)]
    inner = [case.unlabeled[:4] - 0.1 * k for k in range(3)]
    how: dict[str, Any] = {
        "inner_optimizer": SGD(case.student.parameters(), lr=0.5),
        "compile": compile,
    }
    how |= {"accumulate": accumulate}
    whole = metapl.hypergradient(
        case.teacher, case.student, outer=Lookahead(outer), inner=Lookahead(inner), **how
    )
    parts = [
        metapl.hypergradient(
            case.teacher, case.student, outer=outer[k], inner=Lookahead(inner[: k + 1]), **how
        )
        for k in range(3)
    ]
    assert (
        error(whole.grads, {name: sum(part.grads[name] for part in parts) for name in whole.grads})
        < 1e-10
    )


def test_one_path_is_walked_for_all_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """K student steps, and K outer passes, not K(K+1)/2."""
    student = network()
    passes = 0

    def counted(module: nn.Module, inputs: Any) -> None:
        nonlocal passes
        passes += 1

    student[0].register_forward_pre_hook(counted)
    found = dict[bool, int]()
    for several in (False, True):
        passes = 0
        outer = Lookahead(OUTER) if several else OUTER[-1]
        metapl.hypergradient(
            **given(student, SGD(student.parameters(), lr=0.1), outer=outer, wrt="start")
        )
        found[several] = passes
    assert found[True] - found[False] == STEPS - 1


def test_a_function_gives_outer_batches() -> None:
    student = network()
    calls = list[int]()

    def made(number: int) -> tuple[Tensor, Tensor]:
        calls.append(number)
        return OUTER[number]

    optimizer = SGD(student.parameters(), lr=0.3)
    outers = (
        Lookahead(made, steps=STEPS, weights=torch.tensor(WEIGHTS)),
        Lookahead(OUTER, weights=WEIGHTS),
    )
    one, other = (
        metapl.hypergradient(**given(student, optimizer, outer=outer, wrt="start"))
        for outer in outers
    )
    assert error(one.start, other.start) < 1e-6
    assert calls == [*range(STEPS)]


WRONG_OUTER: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "fewer": ("an outer batch for each step", lambda: {"outer": Lookahead(OUTER[:-1])}),
    "one step": ("takes 1 step;", lambda: {"outer": Lookahead(OUTER), "inner": INNER[0]}),
    "a schedule": (
        "expected weights=",
        lambda: {"outer": Lookahead(OUTER, schedule=lambda k: 1.0)},
    ),
    "weights of inner batches": (
        "of outer batches",
        lambda: {"inner": Lookahead(INNER, weights=WEIGHTS)},
    ),
    "a mode of one step": (
        "expected 'forward' or 'unrolled'",
        lambda: {"outer": Lookahead(OUTER[:1]), "inner": INNER[0], "mode": "difference"},
    ),
    "verification": ("expected verify=False", lambda: {"outer": Lookahead(OUTER), "verify": True}),
    "a batch with a gradient": (
        r"outer\[1\]\[0\] requires a gradient",
        lambda: {
            "outer": Lookahead(
                [OUTER[0], (OUTER[1][0].clone().requires_grad_(), OUTER[1][1]), *OUTER[2:]]
            )
        },
    ),
    "NaN": (
        "the outer loss is NaN or infinite",
        lambda: {
            "outer": Lookahead([(torch.nan * OUTER[0][0], OUTER[0][1]), *OUTER[1:]]),
            "wrt": "start",
        },
    ),
}


@pytest.mark.parametrize("name", WRONG_OUTER)
def test_outer_batches_that_do_not_go_with_the_steps_are_refused(name: str) -> None:
    word, change = WRONG_OUTER[name]
    student = network()
    before, state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    with pytest.raises(MetaplError, match=word) as said:
        metapl.hypergradient(**given(student, SGD(student.parameters(), lr=0.1), **change()))
    assert "\n" not in str(said.value)
    assert error(before, student.state_dict()) == 0
    assert torch.equal(state, torch.get_rng_state())


class ReadsTeacher(metapl.PseudoLabels):
    """The outer loss reads the teacher, which the problem holds."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "held", teacher)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        return super().outer_loss(outputs, batch) + sum(
            p.square().sum() for p in self.held.parameters()
        )


def test_a_direct_term_is_refused_with_a_loss_after_each_step() -> None:
    case = toy("mlp")
    more: dict[str, Any] = {
        "outer": Lookahead([case.labeled] * 2),
        "inner": Lookahead([case.unlabeled] * 2),
    }
    more |= {
        "problem": ReadsTeacher(case.teacher),
        "inner_optimizer": SGD(case.student.parameters(), lr=0.1),
    }
    with pytest.raises(MetaplError, match="may read the teacher; expected one outer batch"):
        metapl.hypergradient(case.teacher, case.student, **more)
    assert (
        metapl.hypergradient(case.teacher, case.student, **more, wrt="start").outer_losses
        is not None
    )


def test_weights_that_are_none_for_each_batch_are_refused() -> None:
    for weights in ([1.0], [1.0, torch.nan, 1.0, 1.0], torch.ones(STEPS, 1)):
        with pytest.raises(MetaplError, match="one for each outer batch"):
            Lookahead(OUTER, weights=weights)


def test_a_trainer_refuses_outer_batches_of_several_steps(tmp_path: Any) -> None:
    case = toy("mlp")
    trainer = metapl.BilevelTrainer(**case.networks(), mode="forward", lookahead=2)
    ahead = Lookahead([case.unlabeled] * 2)
    with pytest.raises(MetaplError, match=r"metapl.hypergradient\(outer="):
        trainer.step(outer=Lookahead([case.labeled] * 2), inner=ahead)
    student = network()
    folder = Forward(keep_on=str(tmp_path))
    more = {"outer": Lookahead(OUTER), "mode": folder, "compile": True}
    with pytest.raises(MetaplError, match="expected one outer batch"):
        metapl.hypergradient(**given(student, SGD(student.parameters(), lr=0.1), **more))


# -------------------------------------------------------------- a part of the weights, and closures


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("mode", [Forward(), Unrolled()])
def test_the_proposal_for_a_part_of_the_weights_runs_and_is_anil(mode: Any, compile: bool) -> None:
    student = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    inner_optimizer = SGD(student[2].parameters(), lr=0.3, momentum=0.9)
    with pytest.raises(MetaplError, match=r"without 0\.weight, 0\.bias") as said:
        metapl.hypergradient(**given(student, inner_optimizer, wrt="start"))
    assert "\n" not in str(said.value)
    exec(str(said.value).partition("a group with lr=0: ")[2].removesuffix("."), {**locals()})
    found = metapl.hypergradient(
        **given(student, inner_optimizer, mode=mode, compile=compile, wrt="start")
    )
    start, rule, state = reference.weights(student), reference.sgd(0.3, momentum=0.9), None
    path = start
    for pair in INNER:
        head = {name: p for name, p in path.items() if name.startswith("2.")}
        grads = torch.autograd.grad(
            loss_at(student, path, pair), [*head.values()], create_graph=True
        )
        moved, state = rule(head, dict(zip(head, grads, strict=True)), state)
        path = path | moved
    expected = torch.autograd.grad(loss_at(student, path, OUTER[-1]), [*start.values()])
    assert error(found.start, dict(zip(start, expected, strict=True))) < 1e-10
    assert all(
        torch.equal(found.student_params[name], p)
        for name, p in start.items()
        if name.startswith("0.")
    )


def test_the_proposal_runs_for_a_tuple_of_optimizers() -> None:
    student = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    inner_optimizer = (
        torch.optim.Muon([student[2].weight], lr=0.1),
        torch.optim.Adam([student[2].bias], lr=0.1),
    )
    with pytest.raises(MetaplError, match="lr=0") as said:
        metapl.hypergradient(**given(student, inner_optimizer, wrt="start"))
    exec(str(said.value).partition("a group with lr=0: ")[2].removesuffix("."), {**locals()})
    found = metapl.hypergradient(**given(student, inner_optimizer, wrt="start"))
    assert found.start["0.weight"].any()
    assert torch.equal(found.student_params["0.weight"], student[0].weight)
    alone = torch.optim.Muon([student[2].weight], lr=0.1)
    with pytest.raises(MetaplError, match=r"new ones by add_param_group\.$"):
        metapl.hypergradient(**given(student, alone, wrt="start"))


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
    for mode, word in (
        ("forward", "inner_optimizer is LBFGS; expected torch.optim's SGD"),
        ("none", "by a closure"),
    ):
        with pytest.raises(MetaplError, match=word):
            metapl.BilevelTrainer(**case.networks(), mode=mode, inner_optimizer=inner)
    with pytest.raises(MetaplError, match=r"inner_optimizer is LBFGS; expected torch\.optim's SGD"):
        metapl.hypergradient(**given(network(), torch.optim.LBFGS(network().parameters())))


def test_lbfgs_around_hypergradient_lowers_the_outer_loss() -> None:
    """Initial weights of a convex problem: it ends where the gradient is a thousandth."""
    student = network(nn.Linear(4, 3))
    inner = SGD(student.parameters(), lr=0.1)
    lbfgs = torch.optim.LBFGS(student.parameters(), max_iter=20, line_search_fn="strong_wolfe")
    losses, sizes = list[float](), list[float]()

    def closure() -> Tensor:
        found = metapl.hypergradient(**given(student, inner, wrt="start"))
        for name, p in student.named_parameters():
            p.grad = found.start[name]
        losses.append(float(found.outer_loss))
        sizes.append(float(reference.flat(found.start).norm()))
        return found.outer_loss

    for _ in range(2):
        lbfgs.step(closure)
    assert min(losses) < 0.3 * losses[0]
    assert min(sizes) < 0.05 * sizes[0]
