"""Look-aheads that keep every m-th step, and compute the others again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems_zoo import OPTIMISERS, STUDENTS, Toy, product, toy, unmoved, warm
from reference import error
from test_lookahead import batches
from torch import Tensor, nn

import metapl
from metapl import Lookahead
from metapl.ablation.cost import peak_bytes
from metapl.feedback import Forward


def gradient(problem: Toy, inner: Any, inner_state: Any, ahead: list[Any], mode: Any) -> metapl.Hypergradient:
    problem.draw_from_start()
    return metapl.hypergradient(
        **problem.networks(),
        labeled=problem.labeled,
        unlabeled=Lookahead(ahead),
        mode=mode,
        problem=metapl.PseudoLabels(kind="soft"),
        inner_optimizer=inner,
        inner_state=inner_state,
    )


@pytest.mark.parametrize(
    ("keep_every", "student", "optimiser"),
    product(
        (2, 3, 9),
        STUDENTS,
        ("torch_sgd_nesterov", "torch_adamw", "torchopt_clip_momentum"),
        usual=(2, 3, "mlp", "torch_adamw"),
    ),
)
def test_the_feedback_is_that_of_all_steps_kept(keep_every: int, student: str, optimiser: str) -> None:
    problem, rule = toy(student), OPTIMISERS[optimiser]
    ahead = batches(5, problem)
    inner, inner_state, _ = warm(problem, rule, 2)
    expected = gradient(problem, inner, inner_state, ahead, Forward())
    with unmoved(problem, *([inner] if rule.torch_class else []), generator=False):
        found = gradient(problem, inner, inner_state, ahead, Forward(keep_every=keep_every))
    assert error(found.grads, expected.grads) < 1e-13
    for h, exact in zip(found.feedback, expected.feedback, strict=True):
        assert error(h, exact) < 1e-13
    assert error(found.student_params, expected.student_params) == 0


@pytest.mark.parametrize("truncate", [1, 2, 3, 4])
def test_with_truncation(truncate: int) -> None:
    problem = toy("batch_norm")
    inner, ahead = OPTIMISERS["torch_adamw"].build(problem.student), batches(5, problem)
    expected = gradient(problem, inner, None, ahead, Forward(truncate=truncate))
    found = gradient(problem, inner, None, ahead, Forward(truncate=truncate, keep_every=3))
    assert error(found.grads, expected.grads) < 1e-13


@pytest.mark.parametrize(
    ("options", "optimiser"),
    product(
        ({}, {"accumulate": 2}, {"clip_norm": 0.1}, {"recompute_teacher": True}),
        ("torch_sgd_nesterov", "torch_adam_amsgrad", "torch_adamw"),
        usual=({}, "torch_adamw"),
    ),
    ids=str,
)
def test_a_trainer_goes_the_same_way(options: dict[str, Any], optimiser: str) -> None:
    """In the weights, the running statistics and the optimizers' states, over three of its steps."""
    found = []
    for mode in (Forward(), Forward(keep_every=2)):
        problem = toy("batch_norm")
        inner = OPTIMISERS[optimiser].build(problem.student)
        trainer = metapl.BilevelTrainer(**problem.networks(), mode=mode, inner_optimizer=inner, verify=False, **options)
        x, y = problem.labeled
        for _ in range(3):
            trainer.step((x[:4], y[:4]), Lookahead(batches(5, problem)))
        found.append(copy.deepcopy(trainer.state_dict()))
    a, *others = (tensors(state) for state in found)
    for b in others:
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[name], b[name], rtol=1e-10, atol=1e-12) for name in a)


def tensors(state: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {prefix: state}
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {name: t for key, value in pairs for name, t in tensors(value, f"{prefix}.{key}").items()}


def test_it_takes_less_memory_where_the_weights_are_most_of_it() -> None:
    """32 steps of a network with many weights for few examples."""
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(8, 2000), nn.Tanh(), nn.Linear(2000, 4)) for _ in range(2))
    data = {
        "labeled": (torch.randn(2, 8), torch.tensor([0, 3])),
        "unlabeled": Lookahead([torch.randn(2, 8) for _ in range(32)]),
        "inner_optimizer": torch.optim.Adam(student.parameters(), lr=1e-3, eps=1e-3),
    }

    def held(mode: Forward) -> int:
        return peak_bytes(lambda: metapl.hypergradient(teacher, student, **data, mode=mode), torch.device("cpu"))

    assert held(Forward(keep_every=6)) < 0.6 * held(Forward())
