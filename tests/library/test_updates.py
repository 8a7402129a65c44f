"""The functional updates against the optimisers, and their pullbacks against autograd.

Differences are compared too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import reference
import torch
import torchopt
from problems_zoo import OPTIMISERS, product, toy, values, warm
from reference import error
from torch.utils import _pytree as pytree

import metapl
from metapl.execution.layout import Layout
from metapl.execution.local import LocalStudent
from metapl.execution.state import trainable
from metapl.feedback.lookahead import InnerBatches
from metapl.feedback.path import take_steps
from metapl.updates import Clipped, Update, update_of

TORCH = [name for name in OPTIMISERS if name.startswith("torch_")]


def gradients(student: torch.nn.Module, seed: int = 11) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=draw, dtype=p.dtype)
        for n, p in student.named_parameters()
    }


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", TORCH)
def test_the_functional_update_is_the_optimisers_own_step(name: str, steps: int) -> None:
    """In θ′ and, over three more steps, in the state."""
    problem = toy("batch_norm")
    student = problem.student
    real, _, _ = warm(problem, OPTIMISERS[name], steps)
    functional = update_of(real, trainable(student))
    params, state = values(student), functional.read_state()
    for seed in range(3):
        g = gradients(student, seed)
        moved = params, state = functional.update(params, g, state)
        functional.commit(trainable(student), g, lambda moved=moved: moved)
        assert error(params, values(student)) < 1e-14
    assert all(p.grad is None for p in student.parameters())


def check_pullback(functional: Any, student: torch.nn.Module, tolerance: float = 1e-10) -> None:
    """w = (∂U/∂g)ᵀ v by the library, and by autograd through ``update``."""
    params, state = values(student), functional.read_state()
    g = {n: t.requires_grad_() for n, t in gradients(student, 21).items()}
    v = gradients(student, 22)
    moved, _ = functional.update(params, g, state)
    by_autograd = torch.autograd.grad(sum((moved[n] * v[n]).sum() for n in v), list(g.values()))
    w = functional.pullback(params, {n: t.detach() for n, t in g.items()}, state, v)
    assert error(w, dict(zip(g, by_autograd, strict=True))) < tolerance


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_pullback_is_the_updates_vjp(name: str, steps: int) -> None:
    problem = toy("mlp")
    real, state, _ = warm(problem, OPTIMISERS[name], steps)
    check_pullback(update_of(real, trainable(problem.student), state), problem.student)


@pytest.mark.parametrize("name", ["torch_sgd_nesterov", "torch_adamw", "torchopt_sgd_nesterov"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_an_update_behind_a_clip_is_that_of_clipped_gradients(max_norm: float, name: str) -> None:
    """Return the values of ``torch.nn.utils.clip_grad_norm_``.

    Beside them are the optimiser's own step on them, and its derivative.
    """
    problem = toy("mlp")
    real, state, _ = warm(problem, OPTIMISERS[name], 2)
    student = problem.student
    functional = Clipped(update_of(real, trainable(student), state), max_norm)
    g = gradients(student)
    moved, new_state = functional.update(values(student), g, functional.read_state())
    for n, p in student.named_parameters():
        p.grad = g[n].clone()
    torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm)
    clipped = {n: p.grad for n, p in student.named_parameters()}
    expected, _ = functional.inner.update(values(student), clipped, functional.read_state())
    assert (
        error(moved, expected) < 1e-7
    )  # clip_grad_norm_ adds the norms of the parameters in another order
    check_pullback(functional, student)
    functional.commit(trainable(student), g, lambda: (moved, new_state))
    assert error(values(student), moved) < 1e-14


@pytest.mark.parametrize(
    ("name", "steps", "clip"), product(OPTIMISERS, (0, 3), (None, 0.5), usual=[3, None])
)
def test_adjoints_over_three_steps_are_those_of_the_rule_unrolled(
    name: str, steps: int, clip: float | None
) -> None:
    """Through θ and through the optimizer's state, whose rule is written out in the reference.

    A gradient that depends on θ stands for the student, so that θ's own cotangent counts.
    """
    optimiser = OPTIMISERS[name]
    problem = toy("mlp")
    real, state, rule_state = warm(problem, optimiser, steps)
    update = update_of(real, trainable(problem.student), state)
    update = update if clip is None else Clipped(update, clip)
    rule = optimiser.rule if clip is None else reference.clipped(clip, optimiser.rule)
    pull = {n: torch.randn(p.shape, dtype=p.dtype) for n, p in problem.student.named_parameters()}

    def gradient(
        theta: dict[str, torch.Tensor], given: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {n: torch.tanh(theta[n]) * 0.3 + given[n] for n in theta}

    givens = [
        {n: g.requires_grad_() for n, g in gradients(problem.student, seed).items()}
        for seed in (41, 42, 43)
    ]
    theta: Any = values(problem.student)
    for given in givens:
        theta, rule_state = rule(theta, gradient(theta, given), rule_state)
    expected = torch.autograd.grad(
        sum((theta[n] * pull[n]).sum() for n in pull),
        [g for given in givens for g in given.values()],
    )

    theta, state = values(problem.student), update.read_state()
    records = []
    for given in givens:
        g = {n: t.detach() for n, t in gradient(theta, given).items()}
        records.append((theta, g, state))
        theta, state = update.update(theta, g, state)
    bar, state_bar, found = pull, None, []
    for theta, g, state in reversed(records):
        cotangents = update.vjp(theta, g, state, bar, state_bar)
        found.append(cotangents.gradient)
        bar = {
            n: t + 0.3 * (1 - torch.tanh(theta[n]) ** 2) * cotangents.gradient[n]
            for n, t in cotangents.params.items()
        }
        state_bar = cotangents.state
    flat = [w[n] for w in reversed(found) for n in w]
    for one, other in zip(flat, expected, strict=True):
        assert error({"": one}, {"": other}) < optimiser.tolerance


ADAMS: list[dict[str, Any]] = [{"maximize": True}, {"weight_decay": 0.1, "lr": torch.tensor(0.02)}]
SGDS: list[dict[str, Any]] = [
    {"maximize": True},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "maximize": True, "lr": torch.tensor(0.02)},
]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, options) for kind in (torch.optim.Adam, torch.optim.AdamW) for options in ADAMS),
        *((torch.optim.SGD, options) for options in SGDS),
    ],
)
def test_an_adjoint_in_closed_form_is_autograds(
    kind: Any, options: dict[str, Any], steps: int
) -> None:
    """The pullback from all cotangents, with groups of their own.

    There are a weight without a gradient, and entries that are exactly zero.
    """
    student = toy("mlp").student
    first, *rest = student.parameters()
    optimizer = kind(
        [{"params": [first], "weight_decay": 0.3}, {"params": rest}], **{"lr": 0.02, **options}
    )
    update, theta, bar = (
        update_of(optimizer, trainable(student)),
        values(student),
        gradients(student, 5),
    )
    without, *_ = reversed(theta)
    state = update.read_state()
    for seed in range(steps):
        theta, state = update.update(theta, gradients(student, seed), state)
    g = {n: t for n, t in gradients(student, 9).items() if n != without}
    next(iter(g.values())).view(-1)[0] = 0.0
    draw = torch.Generator().manual_seed(3)

    def drawn(t: torch.Tensor) -> Any:
        return torch.randn(t.shape, generator=draw, dtype=t.dtype) if t.ndim else None

    cotangent = pytree.tree_map(drawn, update.update(theta, g, state)[1])
    found, expected = (
        vjp(theta, g, state, bar, cotangent) for vjp in (update.vjp, partial(Update.vjp, update))
    )
    assert error(found.gradient, expected.gradient) < 1e-13
    assert error(found.params, expected.params) < 1e-13
    for one, other in zip(
        *(pytree.tree_leaves(bar.state) for bar in (found, expected)), strict=True
    ):
        assert one is None if other is None or not other.ndim else error(one, other) < 1e-13


def reached(problem: Any, update: Any, keep_graph: bool = False) -> Any:
    """Return the step of a student on soft labels."""
    (step,) = take_steps(
        LocalStudent(Layout(problem.student), double_backward=keep_graph),
        update,
        metapl.PseudoLabels(kind="soft"),
        outer_batch=problem.labeled,
        inner_batches=InnerBatches.of_one_step(problem.unlabeled),
        teach=lambda x, z: metapl.Signal(problem.teacher(x).softmax(-1)),
        keep_graph=keep_graph,
    ).steps
    return step


SGD = {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
IN_HALF: dict[str, tuple[Any, reference.Rule]] = {
    "sgd": (lambda p: torch.optim.SGD(p, **SGD), reference.sgd(**SGD)),
    "adam": (lambda p: torch.optim.Adam(p, 1e-3), reference.adam(1e-3)),
    "adam_decay": (
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
        reference.adam(0.01, weight_decay=0.1),
    ),
    "adamw": (
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        reference.adamw(lr=0.01, weight_decay=0.1),
    ),
    "torchopt_sgd": (lambda p: torchopt.sgd(0.3, momentum=0.9), reference.sgd(0.3, momentum=0.9)),
    "torchopt_adam": (lambda p: torchopt.adam(1e-3), reference.adam(1e-3)),
}


def stored(real: Any, student: torch.nn.Module) -> Any:
    """Return the state of a ``torch.optim`` optimizer in double, as the reference has it."""
    held = (
        {n: real.state[p] for n, p in student.named_parameters()} if hasattr(real, "state") else {}
    )
    if not any(held.values()):
        return None
    if "exp_avg" not in held["1.weight"]:
        return {n: s["momentum_buffer"].double() for n, s in held.items()}
    m, n = (
        {name: s[key].double() for name, s in held.items()} for key in ("exp_avg", "exp_avg_sq")
    )
    zeros = {name: torch.zeros_like(t) for name, t in m.items()}
    return {"t": int(held["1.weight"]["step"]), "m": m, "n": n, "top": zeros}


@pytest.mark.parametrize(
    ("dtype", "name", "steps", "clip"),
    [
        row
        for row in product(
            (torch.bfloat16, torch.float16), IN_HALF, (0, 2), (None, 0.02),
            usual=[torch.bfloat16, "sgd", "adamw", "torchopt_sgd", 2, None],
        )
        # whose squares float16 does not hold
        if "adam" not in row.values[1] or row.values[0] == torch.bfloat16
        if "torchopt" not in row.values[1] or row.values[2] == 0
    ],
)  # fmt: skip
def test_adjoints_of_weights_in_half_are_those_in_double(
    dtype: Any, name: str, steps: int, clip: float | None
) -> None:
    """From the state as it is stored; in half, a fresh Adam's would be rounding alone."""
    problem, (build, rule) = toy("mlp", dtype=dtype), IN_HALF[name]
    real = build(problem.student.parameters())
    for seed in range(steps):
        for n, g in gradients(problem.student, seed).items():
            problem.student.get_parameter(n).grad = g
        real.step()
        real.zero_grad()
    update = update_of(real, trainable(problem.student))
    update = update if clip is None else Clipped(update, clip)
    rule = rule if clip is None else reference.clipped(clip, rule)
    v = gradients(problem.student, 22)
    step = reached(problem, update)
    theta, g = (
        {n: t.double().requires_grad_() for n, t in tree.items()}
        for tree in (step.params, step.gradient)
    )
    moved, _ = rule(theta, g, stored(real, problem.student))
    expected = torch.autograd.grad(
        sum((moved[n] * v[n].double()).sum() for n in v), [*g.values(), *theta.values()]
    )
    of_g, of_theta = (
        dict(zip(g, part, strict=True)) for part in (expected[: len(g)], expected[len(g) :])
    )
    assert error(step.pullback(v), of_g) < 5e-3
    assert error(step.vjp(v).gradient, of_g) < 5e-3
    assert error(step.vjp(v).params, of_theta) < 5e-3
    kept = reached(problem, update, keep_graph=True)
    through = torch.autograd.grad(
        [kept.updated[0][n] for n in v], list(kept.grads.values()), list(v.values())
    )
    assert error(dict(zip(kept.grads, through, strict=True)), of_g) < 5e-3
    as_it_is, _ = update.update(kept.params, kept.gradient, kept.state)
    assert all(torch.equal(kept.updated[0][n], t) for n, t in as_it_is.items())


@pytest.mark.parametrize(
    ("cls", "options", "dtype"),
    product(
        (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW),
        ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"maximize": True}),
        (torch.float32, torch.bfloat16),
        usual=[torch.optim.AdamW, {}, torch.bfloat16],
    ),
    ids=str,
)
def test_steps_by_every_implementation_and_under_a_scheduler(
    cls: Any, options: Any, dtype: torch.dtype
) -> None:
    """None of them is taken for another rule, also by a clip and over three steps."""
    problem = toy("mlp", dtype=dtype)
    inner = cls(problem.student.parameters(), lr=1e-3, weight_decay=0.01, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    inner.step = inner.step  # what accelerate leaves behind
    trainer = metapl.BilevelTrainer(
        **problem.networks(),
        mode="forward",
        inner_optimizer=inner,
        clip_norm=0.5,
        teacher_losses=(),
    )
    for _ in range(2):
        trainer.step(**problem.data())
        scheduler.step()
    trainer.step(problem.labeled, metapl.Lookahead([problem.unlabeled] * 3))
    assert inner.param_groups[0]["lr"] == pytest.approx(2.5e-4)


def test_a_weight_without_a_momentum_buffer_that_the_first_step_does_not_reach() -> None:
    """Some states hold None in its place; with respect to the rates, too."""

    class Student(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x[0, 0] > 0 else x[:, :2] * self.weight[0, 0]

    torch.manual_seed(0)
    teacher, student = torch.nn.Linear(3, 2).double(), Student(3, 2).double()
    inner = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for p in student.parameters():
        inner.state[p]["momentum_buffer"] = None
    batches = [(sign * torch.ones(1, 3) + 0.1 * torch.randn(4, 3)).double() for sign in (-1, 1, 1)]
    found = [
        metapl.hypergradient(
            *(teacher, student),
            labeled=(
                torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double(),
                torch.arange(4) % 2,
            ),
            unlabeled=metapl.Lookahead(batches),
            inner_optimizer=inner,
            mode=mode,
            wrt=("teacher", "lr"),
        )
        for mode in ("forward", "unrolled")
    ]
    assert error(found[0].grads, found[1].grads) < 1e-9
