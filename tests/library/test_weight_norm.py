"""Weight norm has the derivatives of its formula, and not those of PyTorch's kernel.

The old one is refused.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from problems_zoo import CLASSES, OPTIMISERS, Toy, gradient, toy, trainer_for, values
from reference import Tree, cross_entropy, error, own_stream, stepped
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F

import metapl
from metapl.execution.state import Slots
from metapl.execution.weight_norm import Composite
from metapl.feedback import Forward, Implicit

RULE = OPTIMISERS["torch_sgd_nesterov"]
DIMS = [0, 1, 2, -1]


@pytest.mark.parametrize("dim", DIMS)
def test_the_formula_is_the_kernels_value_and_has_its_derivatives(dim: int) -> None:
    torch.manual_seed(0)
    v = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    g = torch.rand_like(torch.norm_except_dim(v, 2, dim)).requires_grad_()
    formula = Composite(dim)
    assert torch.allclose(formula(g, v), torch._weight_norm(v, g, dim), 1e-14, 1e-14)
    assert torch.autograd.gradcheck(formula, (g, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(formula, (g, v))


def test_the_kernels_second_derivative_is_wrong() -> None:
    """Where this fails, PyTorch's kernel can be taken again."""
    v = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    g = torch.rand(2, 1, dtype=torch.float64)
    with pytest.raises(GradcheckError):
        torch.autograd.gradgradcheck(lambda v: torch._weight_norm(v, g, 0), (v,))


normed = nn.utils.parametrizations.weight_norm
NAME_OF_G = "parametrizations.weight.original0"
NAME_OF_V = "parametrizations.weight.original1"


def student(width: int = 6) -> nn.Module:
    """Return a network with a norm for each row, for each column, and for a whole matrix."""
    torch.manual_seed(4)
    first = normed(nn.Linear(16, width))
    second = normed(nn.Linear(width, 5), dim=1)
    third = normed(nn.Linear(5, CLASSES), dim=None)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, nn.Tanh(), third).double()


def written_out(theta: Tree, x: Tensor) -> Tensor:
    """Return the outputs of :func:`student`, with the norms written out."""
    h = x.flatten(1)
    for layer, dims in ((1, (1,)), (3, (0,)), (5, (0, 1))):
        g = theta[f"{layer}.{NAME_OF_G}"]
        v = theta[f"{layer}.{NAME_OF_V}"]
        weight = g * v / v.square().sum(dims, keepdim=True).sqrt()
        h = F.linear(h if layer == 1 else h.tanh(), weight, theta[f"{layer}.bias"])
    return h


def case(width: int = 6) -> Toy:
    base = toy("mlp", rows=6)
    return Toy(base.teacher, student(width), base.labeled, base.unlabeled, 0)


def by_hand(problem: Toy, steps: int) -> Tree:
    """Return the teacher's gradient by double backward through the formula."""
    teacher = copy.deepcopy(problem.teacher)
    phi = dict(teacher.named_parameters())
    theta = dict(problem.student.named_parameters())
    state = None
    for _ in range(steps):
        z = written_out(theta, problem.unlabeled)
        loss = cross_entropy(teacher(problem.unlabeled).softmax(-1), z).mean()
        theta, state = stepped(loss, theta, RULE.rule, state)
    torch.set_rng_state(own_stream(torch.get_rng_state()))
    loss = F.cross_entropy(written_out(theta, problem.labeled[0]), problem.labeled[1])
    return dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))


WAYS: dict[str, tuple[Any, int]] = {
    "graph": (Forward(by="graph"), 1),
    "tangent": (Forward(by="tangent"), 1),
    "unrolled": ("unrolled", 1),
    "forward, three steps": ("forward", 3),
    "unrolled, three steps": ("unrolled", 3),
    "forward, recomputed": (Forward(keep_every=2), 3),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_the_formula(way: str) -> None:
    problem = case()
    mode, steps = WAYS[way]
    batches = None if steps == 1 else [problem.unlabeled] * steps
    result = gradient(problem, mode, batches, inner_optimizer=RULE.build(problem.student))
    assert error(result.grads, by_hand(problem, steps)) < 1e-12


def test_it_is_right_above_the_size_up_to_which_a_graph_is_kept() -> None:
    problem = case(width=1800)
    assert sum(p.numel() for p in problem.student.parameters()) > 2**15
    result = gradient(problem, "forward", inner_optimizer=RULE.build(problem.student))
    assert error(result.grads, by_hand(problem, 1)) < 1e-12


def test_the_network_is_as_it_was() -> None:
    problem = case()
    network = problem.student
    weights_before = values(network)
    parts = [*network.modules()]
    modes = (
        "forward",
        Forward(by="tangent"),
        "unrolled",
        "difference",
        Implicit(iterations=1, damping=10.0),
    )
    for mode in modes:
        assert gradient(problem, mode).grads
        if not isinstance(mode, Implicit):
            trainer = trainer_for(problem, mode, inner_optimizer=RULE.build(network))
            step, state = trainer.functional()
            step(state, *problem.data().values())
    assert [*network.modules()] == parts
    assert error(values(network), weights_before) == 0.0


def test_a_training_is_the_same_by_all_modes() -> None:
    ends = []
    for mode in (Forward(by="tangent"), Forward(by="graph"), "unrolled"):
        problem = case()
        trainer = trainer_for(
            problem, mode, inner_optimizer=RULE.build(problem.student), verify=True
        )
        for _ in range(10):
            trainer.step(**problem.data())
        of_teacher = {f"teacher {name}": t for name, t in values(problem.teacher).items()}
        ends.append(values(problem.student) | of_teacher)
    by_tangent, by_graph, by_double_backward = ends
    assert error(by_tangent, by_double_backward) < 1e-9
    assert error(by_graph, by_double_backward) < 1e-9


def test_the_pure_step_over_three_steps_is_that_of_the_formula() -> None:
    problem = case()
    trainer = trainer_for(
        problem, "unrolled", inner_optimizer=RULE.build(problem.student), lookahead=3
    )
    step, state = trainer.functional()
    _, report = step(state, problem.labeled, (problem.unlabeled,) * 3)
    eager = trainer.step(problem.labeled, metapl.Lookahead([problem.unlabeled] * 3))
    assert error(dict(enumerate(report.feedback)), dict(enumerate(eager.feedback))) < 1e-12


@pytest.mark.long
def test_compiled_it_is_that_of_the_formula() -> None:
    problem = case()
    result = gradient(
        problem,
        "forward",
        [problem.unlabeled] * 3,
        inner_optimizer=RULE.build(problem.student),
        compile=True,
    )
    assert error(result.grads, by_hand(problem, 3)) < 1e-10


def test_a_network_without_it_has_nothing_to_exchange() -> None:
    assert not Slots(toy("batch_norm").student).formulas
    assert len(Slots(student()).formulas) == 3


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_old_one_is_refused(role: str) -> None:
    problem = toy("mlp")
    networks = problem.networks()
    first = next(part for part in networks[role].modules() if isinstance(part, nn.Linear))
    with warnings.catch_warnings():
        # It is deprecated.
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(first)
    with pytest.raises(
        metapl.MetaplError,
        match=rf"the {role}'s .*weight has .*expected torch.nn.utils.parametrizations.weight_norm",
    ):
        metapl.BilevelTrainer(**networks)


def test_verification_takes_the_formula_for_the_terms_of_implicit() -> None:
    problem = case()
    check = metapl.check_gradient(
        **problem.networks(),
        **problem.data(),
        mode=Implicit("neumann", iterations=3, step_size=0.5),
        inner_optimizer=RULE.build(problem.student),
    )
    # The student is not at its optimum.
    assert check.status in ("right", "allowed")
