"""The stacked steps that the study of two moons is made with are those of the library."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metapl
from metapl.feedback import Reinforce
from metapl.models import mlp
from metapl.problems.base import Signal
from metapl.problems.losses import UDA, CrossEntropy

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
try:
    from two_moons_stack import Batch, Method, Tree, TwoMoons, TwoMoonsRuns, mcnemar, moons_of, stacked
finally:
    del sys.path[0]

pytestmark = pytest.mark.docs

METHODS: tuple[Method, ...] = ("supervised", "pseudo_labels", "mpl", "none")
SEEDS = (3, 1, 4)
TINY: dict[str, Any] = {"points": 40, "unlabeled_batch": 5, "init_scale": 0.9, "steps": 4}
"""Weights of this size make second derivatives that matter."""

SETTINGS = {
    "exact": {},
    "exact, a weight": {"feedback_weight": 7.0, "activation": "tanh"},
    "exact, a ratio": {"feedback_ratio": 0.5},
    "exact, no own losses": {"supervised_loss": False, "activation": "relu"},
    "exact, noise": {"input_noise": 0.3},
    "exact, UDA": {"input_noise": 0.3, "uda_weight": 2.0, "uda_temperature": 0.4},
    "exact, UDA and a ratio": {"input_noise": 0.3, "uda_weight": 2.0, "feedback_ratio": 2.0, "supervised_loss": False},
    "three steps ahead": {"lookahead": 3, "student_lr": 0.8},
    "two steps ahead, UDA": {"lookahead": 2, "input_noise": 0.2, "uda_weight": 1.0, "feedback_weight": 3.0},
    "Algorithm 1": {"mode": "reinforce", "feedback_weight": 5.0},
    "Algorithm 1, UDA and a ratio": {"mode": "reinforce", "input_noise": 0.3, "uda_weight": 2.0, "feedback_ratio": 0.5},
    "no feedback": {"feedback_weight": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Given(metapl.PseudoLabels):
    """Hard labels that a uniform number decides, as in the stack, in the place of those that the library draws."""

    uniform: Tensor | None = None

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: torch.Generator | None
    ) -> Signal:
        drawn = super().signal(teacher, batch, student_outputs, generator=generator)
        if self.uniform is None:
            return drawn
        assert drawn.outputs is not None
        log_q = drawn.outputs.log_softmax(-1)
        value = (self.uniform >= log_q[:, 0].exp()).long()
        return dataclasses.replace(drawn, value=value, log_prob=log_q.gather(1, value[:, None])[:, 0])


def modules(tree: Tree, recipe: TwoMoons) -> list[nn.Sequential]:
    """The networks of a stack as the library knows them."""
    kinds = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
    networks = []
    for run in range(len(next(iter(tree.values())))):
        network = mlp([2, *recipe.hidden, 2], kinds[recipe.activation]).double()
        layers = [module for module in network if isinstance(module, nn.Linear)]
        with torch.no_grad():
            for i, layer in enumerate(layers):
                layer.weight.copy_(tree[f"{i}.weight"][run].T)
                layer.bias.copy_(tree[f"{i}.bias"][run])
        networks.append(network)
    return networks


def close(tree: Tree, run: int, named: dict[str, Tensor]) -> None:
    """A network of the stack has the library's tensors, to 1e-10."""
    tensors = list(named.values())
    for i in range(len(tensors) // 2):
        weight, bias = tensors[2 * i : 2 * i + 2]
        torch.testing.assert_close(tree[f"{i}.weight"][run], weight.detach().T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(tree[f"{i}.bias"][run], bias.detach(), rtol=1e-10, atol=1e-12)


def inner(batch: Batch, run: int, lookahead: int) -> Any:
    """The unlabeled batch of a run as the library takes it."""
    weak = batch.weak[run].chunk(lookahead)
    steps = weak if batch.strong is None else list(zip(weak, batch.strong[run].chunk(lookahead), strict=True))
    return metapl.Lookahead(list(steps)) if lookahead > 1 else steps[0]


def problem(recipe: TwoMoons, batch: Batch, run: int) -> Given:
    return Given(uniform=None if batch.uniform is None else batch.uniform[run])


def trainer(recipe: TwoMoons, teacher: nn.Module, student: nn.Module) -> metapl.BilevelTrainer:
    """The library's, with a recipe's settings."""
    losses: tuple[Any, ...] = (CrossEntropy(),) if recipe.supervised_loss else ()
    if recipe.uda_weight:
        losses += (UDA(temperature=recipe.uda_temperature, weight=recipe.uda_weight),)
    size = (
        {"feedback_weight": recipe.feedback_weight}
        if recipe.feedback_ratio is None
        else {"feedback_ratio": recipe.feedback_ratio}
    )
    return metapl.BilevelTrainer(
        teacher,
        student,
        Reinforce() if recipe.mode == "reinforce" else "forward",
        problem=Given(),
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=recipe.student_lr),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=recipe.teacher_lr),
        teacher_losses=losses,
        **size,  # type: ignore[arg-type]
    )


def runs(**changes: Any) -> TwoMoonsRuns:
    return TwoMoonsRuns(TwoMoons(**{**TINY, **changes}), SEEDS, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- the library's mathematics


@pytest.mark.parametrize(
    "changes", [{}, {"lookahead": 3, "student_lr": 0.8}, {"mode": "reinforce"}, {"input_noise": 0.3}]
)
def test_the_gradient_of_each_network_of_the_stack_is_the_library_s(changes: dict[str, Any]) -> None:
    together = runs(supervised_loss=False, **changes)
    recipe = together.recipe
    teacher, student = together.initial("teacher"), together.initial("student")
    batch = next(together.batches(1))
    gradient, moved = stacked(together.steps.teacher_gradient, teacher, student, batch=batch)(
        teacher, student, batch=batch
    )
    for run, (one_teacher, one_student) in enumerate(
        zip(modules(teacher, recipe), modules(student, recipe), strict=True)
    ):
        alone = metapl.hypergradient(
            one_teacher,
            one_student,
            labeled=(batch.labeled[run], batch.targets[run].argmax(-1)),
            unlabeled=inner(batch, run, recipe.lookahead),
            mode="reinforce" if recipe.mode == "reinforce" else "unrolled",
            problem=problem(recipe, batch, run),
            inner_optimizer=torch.optim.SGD(one_student.parameters(), lr=recipe.student_lr),
        )
        assert all(t.abs().max() > 0 for t in alone.grads.values())
        close(gradient, run, alone.grads)
        close(moved, run, alone.student_params)


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_a_stack_ends_where_the_library_ends_one_seed_after_another(changes: dict[str, Any]) -> None:
    together = runs(**changes)
    recipe, count = together.recipe, together.recipe.steps
    first = together.initial("teacher"), together.initial("student")
    last = together.teachers_and_students()
    teachers, students = (modules(tree, recipe) for tree in first)
    for run in range(len(SEEDS)):
        alone = trainer(recipe, teachers[run], students[run])
        for batch in together.batches(count):
            alone.problem = problem(recipe, batch, run).for_modes(alone.mode.labels)
            labeled = batch.labeled[run], batch.targets[run].argmax(-1)
            alone.step(labeled=labeled, unlabeled=inner(batch, run, recipe.lookahead))
        for tree, network in zip(last, (teachers[run], students[run]), strict=True):
            close(tree, run, dict(network.named_parameters()))


def test_a_seed_ends_beside_others_as_it_does_alone() -> None:
    recipe = TwoMoons(**TINY, input_noise=0.2, uda_weight=1.0, feedback_ratio=1.0, pretrain_steps=2)
    together, alone = (TwoMoonsRuns(recipe, seeds, dtype=torch.float64) for seeds in (SEEDS, SEEDS[1:2]))
    for method in METHODS:
        found, expected = together.run(method), alone.run(method)
        assert found.accuracy[1:2] == expected.accuracy
        for name, t in expected.networks.items():
            torch.testing.assert_close(found.networks[name][1:2], t)
            assert not torch.allclose(found.networks[name][:1], t)


def test_the_control_is_the_loop_without_feedback_and_each_method_ends_elsewhere() -> None:
    recipe = TwoMoons(**TINY, feedback_weight=50.0, student_lr=1.0)
    together = TwoMoonsRuns(recipe, SEEDS)
    ends = [together.run(method).networks["0.weight"] for method in METHODS]
    for i, first in enumerate(ends):
        for second in ends[i + 1 :]:
            assert not torch.allclose(first, second)
    silent = TwoMoonsRuns(dataclasses.replace(recipe, feedback_weight=0.0), SEEDS)
    assert torch.equal(silent.run("mpl").networks["0.weight"], ends[METHODS.index("none")])


def test_both_networks_are_trained_on_the_labeled_points_before() -> None:
    warm, cold = (
        TwoMoonsRuns(
            TwoMoons(**{**TINY, "steps": 1, "init_scale": 0.5, "pretrain_steps": count}, student_lr=0.5), SEEDS
        )
        for count in (300, 0)
    )

    def loss(runs: TwoMoonsRuns, tree: Tree) -> float:
        logits = torch.func.vmap(runs.network)(tree, runs.labeled)
        return float(-(runs.targets * logits.log_softmax(-1)).sum(-1).mean())

    for after, before in zip(warm.teachers_and_students(), cold.teachers_and_students(), strict=True):
        assert loss(warm, after) < loss(cold, before) - 0.05


# ------------------------------------------------------------------------------------------------------------- the data


def test_the_points_of_a_seed_are_its_own_and_the_labels_where_they_are_asked_for() -> None:
    for placement in ("random", "spread"):
        moons, again, other = (moons_of(TwoMoons(placement=placement), seed) for seed in (5, 5, 6))  # type: ignore[arg-type]
        assert torch.equal(moons.points, again.points)
        assert torch.equal(moons.labeled, again.labeled)
        assert not torch.equal(moons.points, other.points)
        assert moons.classes.bincount().tolist() == [1000, 1000]
        assert moons.classes[moons.labeled].tolist() == [0, 0, 0, 1, 1, 1]
        assert sorted([*moons.labeled.tolist(), *moons.unlabeled.tolist()]) == list(range(2000))
    centers = torch.tensor([[3**0.5 / 2, 0.5], [0, 1], [-(3**0.5) / 2, 0.5]])
    expected = torch.cat([centers, torch.tensor([1.0, 0.5]) - centers])
    assert (moons.points[moons.labeled] - expected).norm(dim=1).max() < 0.1


def test_mcnemar_s_test_looks_at_the_pairs_of_which_one_succeeds() -> None:
    assert mcnemar([1.0, 1.0, 1.0, 0.8], [0.8, 0.8, 1.0, 0.8]) == (2, 0, 0.5)
