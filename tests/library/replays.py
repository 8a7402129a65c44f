"""A gradient by plain double backward on the modules themselves, beside those of the modes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from problems_zoo import ANYWHERE, OPTIMISERS, Toy, everything, same, toy
from reference import error, own_stream
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl
from metapl.feedback import Difference, ReinforcePerExample

RULE = OPTIMISERS["torch_sgd_nesterov"]


TOLERANCE = {"unrolled": 1e-9, "forward": 1e-9, "difference": 1e-4}


EXACT = list(TOLERANCE)


ALL: dict[str, Any] = {
    **{mode: mode for mode in ANYWHERE},
    "difference_one_sided": Difference(one_sided=True),
    "reinforce_per_example_by_difference": ReinforcePerExample(tangent="difference"),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(5)  # not the seed of the teachers


def case(student: nn.Module, teacher: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> Toy:
    base = toy("mlp", dtype=dtype, rows=6)
    return Toy(base.teacher if teacher is None else teacher, student, base.labeled, base.unlabeled, 0)


def put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, t in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = t


def twin(module: nn.Module) -> nn.Module:
    """A copy, of modules too whose weight is an attribute with a graph."""
    held = [t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor)]
    kept = {id(t): t.detach().clone() for t in held}
    return copy.deepcopy(module, kept)


@sdpa_kernel(SDPBackend.MATH)
def plainly(problem: Toy, kind: str = "soft") -> tuple[reference.Tree, dict[str, Tensor]]:
    """The teacher's gradient by double backward on the student itself, and the student's buffers after its inner pass.

    ``kind`` is ``"soft"``, or ``"score"`` as in the reference.
    """
    teacher, student = twin(problem.teacher), twin(problem.student)
    theta, phi = dict(student.named_parameters()), dict(teacher.named_parameters())
    z = student(problem.unlabeled)
    after_inner = torch.get_rng_state()
    log_q = teacher(problem.unlabeled).log_softmax(-1)
    drawn = torch.multinomial(log_q.detach().exp(), 1) if kind == "score" else None
    leaf = log_q.detach().exp() if drawn is None else torch.ones(len(z), dtype=z.dtype)
    leaf.requires_grad_()
    losses = (
        reference.cross_entropy(leaf, z) if drawn is None else leaf * F.cross_entropy(z, drawn[:, 0], reduction="none")
    )
    g = torch.autograd.grad(losses.mean(), list(theta.values()), create_graph=True)
    buffers = {name: b.detach().clone() for name, b in student.named_buffers()}
    moved, _ = RULE.rule(theta, dict(zip(theta, g, strict=True)), None)
    torch.set_rng_state(own_stream(after_inner))
    put(student, moved)
    outer = F.cross_entropy(student(problem.labeled[0]), problem.labeled[1])
    v = torch.autograd.grad(outer, list(moved.values()))  # while θ′ is there for checkpoints
    put(student, theta)
    (told,) = torch.autograd.grad(list(moved.values()), leaf, v)
    spoken = log_q.exp() if drawn is None else log_q.gather(-1, drawn)[:, 0]
    grads = torch.autograd.grad((told * spoken).sum(), list(phi.values()))
    return dict(zip(phi, grads, strict=True)), buffers


def found(problem: Toy, mode: str) -> metapl.Hypergradient:
    inner = RULE.build(problem.student)
    return metapl.hypergradient(**problem.networks(), **problem.data(), mode=ALL[mode], inner_optimizer=inner)


def check_exact(problem: Toy, mode: str, plain: Toy | None = None) -> None:
    """The gradient is right, a call moves nothing, and a step moves the buffers as the one inner pass does."""
    kind = "score" if "per_example" in mode else "soft"
    problem.draw_from_start()
    expected, buffers = plainly(problem if plain is None else plain, kind)
    problem.draw_from_start()
    before = everything(problem, generator=False)
    grads = found(problem, mode).grads
    assert same(before, everything(problem, generator=False))
    assert error(grads, expected) < (1e-4 if "difference" in mode else TOLERANCE.get(mode, 1e-9))
    problem.draw_from_start()
    inner = RULE.build(problem.student)
    metapl.BilevelTrainer(**problem.networks(), mode=ALL[mode], inner_optimizer=inner, teacher_losses=()).step(
        **problem.data()
    )
    after = dict(problem.student.named_buffers())
    assert buffers.keys() == after.keys()
    assert all(torch.equal(after[name], b) for name, b in buffers.items())


def check_refused(problem: Toy, mode: str, match: str) -> None:
    """Refused by both calls, before anything moved."""
    inner = RULE.build(problem.student)
    problem.draw_from_start()
    before = everything(problem, inner)
    with pytest.raises(metapl.MetaplError, match=match):
        metapl.hypergradient(**problem.networks(), **problem.data(), mode=ALL[mode], inner_optimizer=inner)
    assert same(before, everything(problem, inner))
    trainer = metapl.BilevelTrainer(**problem.networks(), mode=ALL[mode], inner_optimizer=inner)
    with pytest.raises(metapl.MetaplError, match=match):
        trainer.step(**problem.data())
    assert same(before, everything(problem, inner))
    assert trainer.steps_done == 0
