"""The functional updates against the optimisers themselves, and their adjoints.

Adjoints are compared with autograd, and with the rules of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torchopt
from problems_zoo import OPTIMISERS, product, toy, values, warm
from reference import error
from torch import nn
from torch.utils import _pytree as pytree

import metapl
from metapl.core.lookahead import InnerBatches
from metapl.core.path import Path
from metapl.engines.eager import EagerEngine
from metapl.execution.layout import Layout
from metapl.execution.state import trainable
from metapl.updates import Clipped, Update, update_of

TORCH = [name for name in OPTIMISERS if name.startswith("torch_")]


def gradients(student: torch.nn.Module, seed: int = 11) -> dict[str, torch.Tensor]:
    """Return random numbers in the shapes of the student's weights, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in student.named_parameters()
    }


def returning(value: Any) -> Callable[[], Any]:
    return lambda: value


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", TORCH)
def test_the_functional_update_is_the_optimisers_own_step(name: str, steps: int) -> None:
    """They agree in θ′ and, over three more steps, in the state."""
    problem = toy("batch_norm")
    student = problem.student
    optimizer, _, _ = warm(problem, OPTIMISERS[name], steps)
    functional = update_of(optimizer, trainable(student))
    params = values(student)
    state = functional.read_state()
    for seed in range(3):
        g = gradients(student, seed)
        params, state = functional.update(params, g, state)
        functional.commit(trainable(student), g, returning((params, state)))
        assert error(params, values(student)) < 1e-14
    assert all(p.grad is None for p in student.parameters())


def check_pullback(functional: Any, student: torch.nn.Module, tolerance: float = 1e-10) -> None:
    """Compare w = (∂U/∂g)ᵀ v by the library with autograd through ``update``."""
    params = values(student)
    state = functional.read_state()
    g = {name: t.requires_grad_() for name, t in gradients(student, 21).items()}
    v = gradients(student, 22)
    new_params, _ = functional.update(params, g, state)
    along_v = sum((new_params[name] * v[name]).sum() for name in v)
    by_autograd = torch.autograd.grad(along_v, list(g.values()))
    w = functional.pullback(params, {name: t.detach() for name, t in g.items()}, state, v)
    assert error(w, dict(zip(g, by_autograd, strict=True))) < tolerance


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_pullback_is_the_updates_vjp(name: str, steps: int) -> None:
    problem = toy("mlp")
    optimizer, state, _ = warm(problem, OPTIMISERS[name], steps)
    check_pullback(update_of(optimizer, trainable(problem.student), state), problem.student)


@pytest.mark.parametrize("name", ["torch_sgd_nesterov", "torch_adamw", "torchopt_sgd_nesterov"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_an_update_behind_a_clip_is_that_of_clipped_gradients(max_norm: float, name: str) -> None:
    """It takes the values of ``torch.nn.utils.clip_grad_norm_``.

    The optimiser's own step on these, and its derivative, are compared too.
    """
    problem = toy("mlp")
    optimizer, state, _ = warm(problem, OPTIMISERS[name], 2)
    student = problem.student
    functional = Clipped(update_of(optimizer, trainable(student), state), max_norm)
    g = gradients(student)
    new_params, new_state = functional.update(values(student), g, functional.read_state())
    for path, p in student.named_parameters():
        p.grad = g[path].clone()
    torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm)
    clipped = {path: p.grad for path, p in student.named_parameters()}
    expected, _ = functional.inner.update(values(student), clipped, functional.read_state())
    # clip_grad_norm_ adds the norms of the parameters in another order.
    assert error(new_params, expected) < 1e-7
    check_pullback(functional, student)
    functional.commit(trainable(student), g, lambda: (new_params, new_state))
    assert error(values(student), new_params) < 1e-14


@pytest.mark.parametrize(
    ("name", "steps", "clip"), product(OPTIMISERS, (0, 3), (None, 0.5), usual=[3, None])
)
def test_adjoints_over_three_steps_are_those_of_the_rule_unrolled(
    name: str, steps: int, clip: float | None
) -> None:
    """Cotangents go through θ and through the optimizer's state.

    The rule is written out in the reference. A gradient that depends on θ stands for the student,
    so that θ's own cotangent counts.
    """
    optimiser = OPTIMISERS[name]
    problem = toy("mlp")
    optimizer, state, rule_state = warm(problem, optimiser, steps)
    update = update_of(optimizer, trainable(problem.student), state)
    rule = optimiser.rule
    if clip is not None:
        update = Clipped(update, clip)
        rule = reference.clipped(clip, rule)
    v = {
        path: torch.randn(p.shape, dtype=p.dtype) for path, p in problem.student.named_parameters()
    }
    offsets_by_step = [
        {path: t.requires_grad_() for path, t in gradients(problem.student, seed).items()}
        for seed in (41, 42, 43)
    ]

    def gradient(
        theta: dict[str, torch.Tensor], offsets: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {path: torch.tanh(theta[path]) * 0.3 + offsets[path] for path in theta}

    theta: Any = values(problem.student)
    for offsets in offsets_by_step:
        theta, rule_state = rule(theta, gradient(theta, offsets), rule_state)
    expected = torch.autograd.grad(
        sum((theta[path] * v[path]).sum() for path in v),
        [t for offsets in offsets_by_step for t in offsets.values()],
    )

    theta = values(problem.student)
    state = update.read_state()
    taken = []
    for offsets in offsets_by_step:
        g = {path: t.detach() for path, t in gradient(theta, offsets).items()}
        taken.append((theta, g, state))
        theta, state = update.update(theta, g, state)
    theta_bar = v
    state_bar = None
    w_by_step = []
    for theta, g, state in reversed(taken):
        cotangents = update.vjp(theta, g, state, theta_bar, state_bar)
        w_by_step.append(cotangents.gradient)
        theta_bar = {}
        for path, t in cotangents.params.items():
            slope = 0.3 * (1 - torch.tanh(theta[path]) ** 2)
            theta_bar[path] = t + slope * cotangents.gradient[path]
        state_bar = cotangents.state
    in_offsets = [t for w in reversed(w_by_step) for t in w.values()]
    for ours, theirs in zip(in_offsets, expected, strict=True):
        assert error({"": ours}, {"": theirs}) < optimiser.tolerance


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
    """It is compared from all cotangents.

    With groups of their own, a weight without a gradient, and entries that are exactly zero.
    """
    student = toy("mlp").student
    first, *later_weights = student.parameters()
    groups = [{"params": [first], "weight_decay": 0.3}, {"params": later_weights}]
    optimizer = kind(groups, **{"lr": 0.02, **options})
    update = update_of(optimizer, trainable(student))
    theta = values(student)
    v = gradients(student, 5)
    last_name, *_ = reversed(theta)
    state = update.read_state()
    for seed in range(steps):
        theta, state = update.update(theta, gradients(student, seed), state)
    g = {name: t for name, t in gradients(student, 9).items() if name != last_name}
    next(iter(g.values())).view(-1)[0] = 0.0
    generator = torch.Generator().manual_seed(3)

    def drawn(t: torch.Tensor) -> Any:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.ndim else None

    _, new_state = update.update(theta, g, state)
    state_bar = pytree.tree_map(drawn, new_state)
    in_closed_form = update.vjp(theta, g, state, v, state_bar)
    by_autograd = Update.vjp(update, theta, g, state, v, state_bar)
    assert error(in_closed_form.gradient, by_autograd.gradient) < 1e-13
    assert error(in_closed_form.params, by_autograd.params) < 1e-13
    ours = pytree.tree_leaves(in_closed_form.state)
    theirs = pytree.tree_leaves(by_autograd.state)
    for bar, expected in zip(ours, theirs, strict=True):
        if expected is None or not expected.ndim:
            assert bar is None
        else:
            assert error(bar, expected) < 1e-13


def step_on_soft_labels(problem: Any, update: Any, keep_graph: bool = False) -> Any:
    """Return the step of a student on the teacher's soft labels."""
    path = Path(
        EagerEngine(Layout(problem.student), double_backward=keep_graph),
        update,
        problem=metapl.PseudoLabels(kind="soft"),
        outer_batch=problem.labeled,
        inner_batches=InnerBatches.of_one_step(problem.unlabeled),
        teach=lambda x, z: metapl.Signal(problem.teacher(x).softmax(-1)),
        mode=metapl.feedback.Forward(),
    )
    path.take_steps()
    (step,) = path.steps
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


def stored(optimizer: Any, student: torch.nn.Module) -> Any:
    """Return the state of a ``torch.optim`` optimizer in double, as the reference's rules have it.

    None for a fresh one, and for a TorchOpt transform.
    """
    if not hasattr(optimizer, "state"):
        return None
    states = {name: optimizer.state[p] for name, p in student.named_parameters()}
    if not any(states.values()):
        return None
    if "exp_avg" not in states["1.weight"]:
        return {name: state["momentum_buffer"].double() for name, state in states.items()}
    m = {name: state["exp_avg"].double() for name, state in states.items()}
    n = {name: state["exp_avg_sq"].double() for name, state in states.items()}
    zeros = {name: torch.zeros_like(t) for name, t in m.items()}
    return {"t": int(states["1.weight"]["step"]), "m": m, "n": n, "top": zeros}


@pytest.mark.parametrize(
    ("dtype", "name", "steps", "clip"),
    [
        row
        for row in product(
            (torch.bfloat16, torch.float16),
            IN_HALF,
            (0, 2),
            (None, 0.02),
            usual=[torch.bfloat16, "sgd", "adamw", "torchopt_sgd", 2, None],
        )
        # Adam's squares do not fit into float16.
        if "adam" not in row.values[1] or row.values[0] == torch.bfloat16
        if "torchopt" not in row.values[1] or row.values[2] == 0
    ],
)
def test_adjoints_of_weights_in_half_are_those_in_double(
    dtype: Any, name: str, steps: int, clip: float | None
) -> None:
    """They are from the state as it is stored; in half, a fresh Adam's would be rounding alone."""
    problem = toy("mlp", dtype=dtype)
    build, rule = IN_HALF[name]
    optimizer = build(problem.student.parameters())
    for seed in range(steps):
        for path, g in gradients(problem.student, seed).items():
            problem.student.get_parameter(path).grad = g
        optimizer.step()
        optimizer.zero_grad()
    update = update_of(optimizer, trainable(problem.student))
    if clip is not None:
        update = Clipped(update, clip)
        rule = reference.clipped(clip, rule)
    v = gradients(problem.student, 22)
    step = step_on_soft_labels(problem, update)

    theta = {path: t.double().requires_grad_() for path, t in step.params.items()}
    g = {path: t.double().requires_grad_() for path, t in step.gradient.items()}
    new_params, _ = rule(theta, g, stored(optimizer, problem.student))
    along_v = sum((new_params[path] * v[path].double()).sum() for path in v)
    of_g = dict(zip(g, torch.autograd.grad(along_v, [*g.values()], retain_graph=True), strict=True))
    of_theta = dict(zip(theta, torch.autograd.grad(along_v, [*theta.values()]), strict=True))
    assert error(step.pullback(v), of_g) < 5e-3
    assert error(step.vjp(v).gradient, of_g) < 5e-3
    assert error(step.vjp(v).params, of_theta) < 5e-3

    with_graph = step_on_soft_labels(problem, update, keep_graph=True)
    moved, _ = with_graph.updated
    through_graph = torch.autograd.grad(
        [moved[path] for path in v], list(with_graph.descent.gradient.values()), list(v.values())
    )
    assert error(dict(zip(with_graph.descent.gradient, through_graph, strict=True)), of_g) < 5e-3
    as_it_is, _ = update.update(with_graph.params, with_graph.gradient, with_graph.state)
    assert all(torch.equal(moved[path], t) for path, t in as_it_is.items())


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
    """None of them is taken for another rule, also behind a clip and over three steps."""
    problem = toy("mlp", dtype=dtype)
    inner = cls(problem.student.parameters(), lr=1e-3, weight_decay=0.01, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    # accelerate leaves such an attribute behind.
    inner.step = inner.step
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
    teacher = torch.nn.Linear(3, 2).double()
    student = Student(3, 2).double()
    inner = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for p in student.parameters():
        inner.state[p]["momentum_buffer"] = None
    batches = [(sign * torch.ones(1, 3) + 0.1 * torch.randn(4, 3)).double() for sign in (-1, 1, 1)]
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double()

    def gradient(mode: str) -> Any:
        return metapl.hypergradient(
            teacher,
            student,
            outer=(inputs, torch.arange(4) % 2),
            inner=metapl.Lookahead(batches),
            inner_optimizer=inner,
            mode=mode,
            wrt=("teacher", "lr"),
        ).grads

    assert error(gradient("forward"), gradient("unrolled")) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_of_a_look_ahead_have_the_bits_of_sgd_and_leave_gradients(
    momentum: float, dtype: torch.dtype
) -> None:
    """On lists torch's step with Nesterov momentum writes to the gradients."""
    torch.manual_seed(0)
    weights = {"p": nn.Parameter(torch.randn(37, dtype=dtype))}
    twin = nn.Parameter(weights["p"].detach().clone())
    options: dict[str, Any] = {"lr": 0.037, "momentum": momentum, "nesterov": momentum > 0}
    optimizer = torch.optim.SGD(weights.values(), **options, foreach=True)
    by_torch = torch.optim.SGD([twin], **options, foreach=True)
    update = update_of(optimizer, weights)
    params = {"p": weights["p"].detach()}
    state = update.read_state()
    for _ in range(3):
        g = torch.randn(37, dtype=dtype)
        kept = g.clone()
        params, state = update.stepped(params, {"p": g}, state)
        assert torch.equal(g, kept)
        twin.grad = kept
        by_torch.step()
        assert torch.equal(params["p"], twin)
