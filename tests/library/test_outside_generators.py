"""Students and teachers that draw from Python's and NumPy's global generators.

A pass that is run again has its own draws again; a step advances the generators as its passes
forward would; the outer loss draws from a stream apart.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from problems_zoo import CLASSES, OPTIMISERS, Toy, gradient, product, toy, trainer_for, values
from reference import Tree, cross_entropy, error, own_stream, stepped
from test_replays import put
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError
from metapl.execution.state import RandomState
from metapl.feedback import Difference, Forward
from metapl.runs import checkpoint

# Rows of the inner batch. The outer one has a row more.
ROWS = 6
RULE = OPTIMISERS["torch_sgd_nesterov"]


def coin(h: Tensor) -> Tensor:
    """Apply stochastic depth."""
    return h + h.sin() if random.random() < 0.5 else h


def noise(h: Tensor) -> Tensor:
    return h + 0.3 * torch.from_numpy(numpy.random.randn(*h.shape)).to(h)  # noqa: NPY002


def draw_from_all_three(h: Tensor) -> Tensor:
    """Draw from all three generators, from one of them by a cached normal number."""
    scale = 1 + 0.2 * random.gauss(0, 1) + 0.1 * numpy.random.standard_normal()  # noqa: NPY002
    return F.dropout(h, 0.2) * scale


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a coin of Python's": coin,
    "noise of NumPy's": noise,
    "both": draw_from_all_three,
}


class Drawing(nn.Module):
    """Two layers with draws between them, of batches of so many ``rows``; None: of all."""

    def __init__(self, draw: Callable[[Tensor], Tensor], rows: int | None = ROWS) -> None:
        super().__init__()
        self.body = nn.Linear(16, 6)
        self.head = nn.Linear(6, CLASSES)
        self.draw = draw
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1)).tanh()
        if self.rows in (None, len(x)):
            h = self.draw(h)
        return self.head(h)


def seed() -> None:
    torch.manual_seed(11)
    random.seed(12)
    numpy.random.seed(13)  # noqa: NPY002


def outside() -> Any:
    return random.getstate(), checkpoint.plain_states(numpy.random.get_state(legacy=False))  # noqa: NPY002


def case(draw: Callable[[Tensor], Tensor], rows: int | None = ROWS) -> Toy:
    base = toy("mlp", rows=ROWS)
    torch.manual_seed(5)
    return Toy(base.teacher, Drawing(draw, rows).double(), base.labeled, base.unlabeled, 0)


def by_hand(problem: Toy, steps: int) -> tuple[Tree, Any]:
    """Go backward twice through the module itself; return the generators after its inner passes."""
    teacher = copy.deepcopy(problem.teacher)
    student = copy.deepcopy(problem.student)
    theta = dict(student.named_parameters())
    phi = dict(teacher.named_parameters())
    state = None
    seed()
    for _ in range(steps):
        put(student, theta)
        z = student(problem.unlabeled)
        loss = cross_entropy(teacher(problem.unlabeled).softmax(-1), z).mean()
        theta, state = stepped(loss, theta, RULE.rule, state)
    generators_after = outside()
    put(student, theta)
    torch.set_rng_state(own_stream(torch.get_rng_state()))
    loss = F.cross_entropy(student(problem.labeled[0]), problem.labeled[1])
    return dict(
        zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True)
    ), generators_after


WAYS: dict[str, tuple[Any, int]] = {
    "tangent": (Forward(by="tangent"), 1),
    "graph": (Forward(by="graph"), 1),
    "unrolled": ("unrolled", 1),
    "difference": ("difference", 1),
    "one-sided difference": (Difference(one_sided=True), 1),
    "forward, three steps": ("forward", 3),
    "unrolled, three steps": ("unrolled", 3),
    "forward, recomputed": (Forward(keep_every=2), 3),
}


@pytest.mark.parametrize(
    ("way", "draw"), product(WAYS, DRAWS, usual=("both", "tangent", "forward, recomputed"))
)
def test_the_gradient_is_that_of_double_backward(way: str, draw: str) -> None:
    """The first call and the second, at which the library knows whether the student draws."""
    problem = case(DRAWS[draw])
    mode, steps = WAYS[way]
    bound = 1e-4 if "difference" in way else 1e-9
    expected, generators_after = by_hand(problem, steps)
    batches = None if steps == 1 else [problem.unlabeled] * steps
    for _ in range(2):
        seed()
        result = gradient(problem, mode, batches, inner_optimizer=RULE.build(problem.student))
        assert error(result.grads, expected) < bound
        assert outside() == generators_after


def status_of(problem: Toy, mode: str) -> str:
    """Return what verification says of the gradient."""
    check = metapl.check_gradient(
        **problem.networks(),
        **problem.data(),
        inner_optimizer=RULE.build(problem.student),
        mode=mode,
    )
    return check.status


@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference"])
def test_it_passes_verification(mode: str) -> None:
    for draw in DRAWS.values():
        problem = case(draw, None)
        seed()
        generators_before = outside()
        assert status_of(problem, mode) == "right"
        assert outside() == generators_before


def test_passes_draw_what_no_other_pass_draws() -> None:
    """The inner and the outer pass of a step, those of the next, and the caller between them."""
    log: list[float] = []

    def logged(h: Tensor) -> Tensor:
        log.append(random.random())
        log.append(float(numpy.random.rand()))  # noqa: NPY002
        return h

    for mode in ("forward", Forward(by="tangent"), "difference", "unrolled"):
        log.clear()
        problem = case(logged, None)
        trainer = trainer_for(problem, mode)
        seed()
        for _ in range(3):
            trainer.step(**problem.data())
            log.append(random.random())
        # Replays have the numbers of what they replay.
        assert len(set(log)) == 3 * (2 * 2 + 1)


def test_a_teacher_that_is_computed_again_has_its_draws_again() -> None:
    problem = toy("mlp", rows=ROWS, teacher=lambda: Drawing(draw_from_all_three, None))

    def gradient_and_generators(*, recompute: bool) -> tuple[Tree, Any]:
        seed()
        twin = copy.deepcopy(problem)
        result = gradient(
            twin,
            "unrolled",
            inner_optimizer=RULE.build(twin.student),
            recompute_teacher=recompute,
        )
        return result.grads, outside()

    expected, generators = gradient_and_generators(recompute=False)
    recomputed, generators_of_recomputed = gradient_and_generators(recompute=True)
    assert error(recomputed, expected) < 1e-9
    assert generators_of_recomputed == generators


def test_what_is_refused_leaves_the_generators_as_they_were() -> None:
    problem = case(draw_from_all_three, None)
    trainer = trainer_for(problem)
    for number in range(2):
        seed()
        generators_before = outside()
        with pytest.raises(MetaplError):
            trainer.step(problem.labeled, problem.unlabeled * float("nan"))
        assert outside() == generators_before
        if number == 0:
            trainer.step(**problem.data())


def test_it_is_found_anew_where_the_modes_change() -> None:
    """A student that begins to draw when it is put into training mode, as stochastic depth does."""

    class Deep(Drawing):
        def forward(self, x: Tensor) -> Tensor:
            self.rows = None if self.training else -1
            return super().forward(x)

    problem = case(draw_from_all_three)
    student = Deep(draw_from_all_three).double()
    problem = Toy(problem.teacher, student, problem.labeled, problem.unlabeled, 0)
    trainer = trainer_for(problem, Forward(by="tangent"))
    student.eval()
    trainer.step(**problem.data())
    student.train()
    for _ in range(3):
        trainer.step(**problem.data())


def test_a_quiet_network_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a step must not cost what the states take to be read."""
    problem = toy("dropout")
    trainer = trainer_for(problem, Forward(by="tangent"))
    trainer.step(**problem.data())
    gradient(problem)

    def asked() -> Any:
        raise AssertionError("the state of Python's generator was read")

    monkeypatch.setattr(random, "getstate", asked)
    trainer.step(**problem.data())
    gradient(problem)


def test_a_state_is_stored_and_branches() -> None:
    seed()
    random.gauss(0, 1)
    state = RandomState.now(torch.device("cpu"))

    def draws() -> tuple[float, float, float]:
        return random.random(), random.gauss(0, 1), float(numpy.random.randn())  # noqa: NPY002

    def first_draw_of_branch(start: RandomState) -> float:
        start.branch().restore()
        return random.random()

    drawn = draws()
    stored_values = checkpoint.decoded(*stored(state.values()))
    RandomState(torch.device("cpu"), **stored_values).restore()
    assert draws() == drawn
    without_outside = state._replace(python=None, numpy=None)
    assert state.branch().cpu.equal(without_outside.branch().cpu)
    first = first_draw_of_branch(state)
    assert first != drawn[0]
    assert first_draw_of_branch(state) == first
    other = state._replace(python=random.Random(5).getstate())
    assert first_draw_of_branch(other) != first


def stored(tree: Any) -> tuple[str, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    return json.dumps(checkpoint.encoded(tree, tensors)), tensors


def test_another_bit_generator_of_numpy_is_taken_as_it_is() -> None:
    bit_generator = numpy.random.get_bit_generator()
    numpy.random.set_bit_generator(numpy.random.PCG64(3))
    try:
        problem = case(noise, None)
        assert status_of(problem, "forward") == "right"
    finally:
        numpy.random.set_bit_generator(bit_generator)


def test_trainings_by_two_modes_are_the_same() -> None:
    """Of a student with stochastic depth.

    Replays of one mode, and none of the other, leave the same draws.
    """
    ends = []
    for mode in (Forward(by="tangent"), "unrolled"):
        problem = case(coin, None)
        trainer = trainer_for(
            problem, mode, inner_optimizer=RULE.build(problem.student), verify=True
        )
        seed()
        losses = [float(trainer.step(**problem.data()).scalars["outer_loss"]) for _ in range(30)]
        assert losses[-1] < losses[0]
        ends.append(problem)
    by_tangent, unrolled = ends
    assert error(values(by_tangent.student), values(unrolled.student)) < 1e-7
    assert error(values(by_tangent.teacher), values(unrolled.teacher)) < 1e-7


def test_a_student_without_draws_has_the_bits_that_it_had() -> None:
    """Torch's stream of the outer pass does not depend on the other generators."""

    def gradient_after(python_seed: int) -> Tree:
        problem = toy("dropout")
        random.seed(python_seed)
        torch.manual_seed(3)
        return gradient(problem).grads

    assert error(gradient_after(1), gradient_after(2)) == 0.0
