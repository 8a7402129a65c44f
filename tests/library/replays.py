"""A gradient by plain double backward on the modules themselves, beside those of the modes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from problems_zoo import OPTIMISERS, Toy, everything, same, toy
from reference import error, own_stream
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl
from metapl.feedback import Difference, Forward, ReinforcePerExample

RULE = OPTIMISERS["torch_sgd_nesterov"]

WAYS: dict[str, Any] = {
    "unrolled": "unrolled",
    "graph": Forward(by="graph"),
    "tangent": Forward(by="tangent"),
    "difference": "difference",
    "one_sided": Difference(one_sided=True),
    "per_example": "reinforce_per_example",
    "per_example_by_difference": ReinforcePerExample(tangent="difference"),
}
BY_DIFFERENCE = ("difference", "one_sided", "per_example_by_difference")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(5)  # not the seed of the teachers


def case(student: nn.Module, teacher: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> Toy:
    base = toy("mlp", dtype=dtype, rows=6)
    labeled = base.labeled[0][:6], base.labeled[1][:6]
    student = student.double() if dtype == torch.float64 else student.to(dtype)  # the former leaves complex numbers
    return Toy(base.teacher if teacher is None else teacher, student, labeled, base.unlabeled, 0)


def put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Other tensors in the places of parameters, in each place of one that is held twice."""
    own = dict(module.named_parameters())
    at = {id(own[name]): t for name, t in tensors.items()}
    for part in module.modules():
        part._parameters.update({n: at[id(p)] for n, p in part._parameters.items() if id(p) in at})


def twin(module: nn.Module) -> nn.Module:
    """A copy, of modules too whose weight is an attribute with a graph."""
    held = [t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor)]
    kept = {id(t): t.detach().clone() for t in held}
    return copy.deepcopy(module, kept)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what a pass may move: buffers, and parameters that are not learned."""
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    return {name: t.detach().clone() for name, t in [*module.named_buffers(), *frozen.items()]}


@sdpa_kernel(SDPBackend.MATH)
def plainly(problem: Toy, kind: str = "soft") -> tuple[reference.Tree, dict[str, Tensor]]:
    """The teacher's gradient by double backward on the student itself, and the student's state after its inner pass.

    ``kind`` is ``"soft"``, or ``"score"`` as in the reference.
    """
    teacher, student = twin(problem.teacher), twin(problem.student)
    theta = {name: p for name, p in student.named_parameters() if p.requires_grad}
    phi = dict(teacher.named_parameters())
    z = student(problem.unlabeled)
    after_inner = torch.get_rng_state()
    log_q = teacher(problem.unlabeled).log_softmax(-1)
    drawn = reference.drawn(log_q.exp()) if kind == "score" else None
    leaf = log_q.detach().exp() if drawn is None else torch.ones(len(z), dtype=z.dtype)
    leaf.requires_grad_()
    losses = reference.cross_entropy(leaf, z) if drawn is None else leaf * F.cross_entropy(z, drawn, reduction="none")
    g = torch.autograd.grad(losses.mean(), list(theta.values()), create_graph=True, materialize_grads=True)
    moved, _ = RULE.rule(theta, dict(zip(theta, g, strict=True)), None)
    later = twin(student)  # as its backward pass leaves it, in which a checkpoint runs again
    state = state_of(later)
    torch.set_rng_state(own_stream(after_inner))
    put(later, {name: nn.Parameter(p.detach()) for name, p in moved.items()})
    at = {name: p for name, p in later.named_parameters() if p.requires_grad}
    outer = F.cross_entropy(later(problem.labeled[0]), problem.labeled[1])
    v = torch.autograd.grad(outer, list(at.values()), materialize_grads=True)  # while θ′ is there for checkpoints
    (told,) = torch.autograd.grad(list(moved.values()), leaf, v)
    spoken = log_q.exp() if drawn is None else log_q.gather(-1, drawn[:, None])[:, 0]
    grads = torch.autograd.grad((told * spoken).sum(), list(phi.values()))
    return dict(zip(phi, grads, strict=True)), state


def found(problem: Toy, way: str) -> metapl.Hypergradient:
    inner = RULE.build(problem.student)
    return metapl.hypergradient(**problem.networks(), **problem.data(), mode=WAYS[way], inner_optimizer=inner)


def check_exact(problem: Toy, way: str) -> None:
    """The gradient is right, a call moves nothing, and a step moves the state as the one inner pass does."""
    bound = 1e-4 if way in BY_DIFFERENCE else 1e-9
    problem.draw_from_start()
    expected, state = plainly(problem, "score" if "per_example" in way else "soft")
    problem.draw_from_start()
    before = everything(problem, generator=False)
    assert error(found(problem, way).grads, expected) < bound
    assert same(before, everything(problem, generator=False))
    problem.draw_from_start()
    inner = RULE.build(problem.student)
    trainer = metapl.BilevelTrainer(
        **problem.networks(), mode=WAYS[way], inner_optimizer=inner, teacher_losses=(), verify=False
    )
    trainer.step(**problem.data())
    after = state_of(problem.student)
    assert state.keys() == after.keys()
    assert all(torch.allclose(after[name], t, 0, 0) for name, t in state.items())


def check_refused(problem: Toy, way: str) -> None:
    """Refused by both calls, before anything moved."""
    inner = RULE.build(problem.student)
    problem.draw_from_start()
    before = everything(problem, inner)
    with pytest.raises(metapl.MetaplError):
        metapl.hypergradient(**problem.networks(), **problem.data(), mode=WAYS[way], inner_optimizer=inner)
    assert same(before, everything(problem, inner))
    trainer = metapl.BilevelTrainer(**problem.networks(), mode=WAYS[way], inner_optimizer=inner, verify=False)
    with pytest.raises(metapl.MetaplError):
        trainer.step(**problem.data())
    assert same(before, everything(problem, inner))
    assert trainer.steps_done == 0
