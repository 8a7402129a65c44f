"""The estimators of docs/write-an-estimator.md, wherever the library's own run.

What they give is compared with their formulas by double backward, which share no code with them;
their draws are those of the key in their state.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import sharded_cases
import torch
from page_estimators import CLASSES
from problems_zoo import product
from ranks import Ranks
from test_direct_term import LR, ReadsModule, close
from test_direct_term import networks as networks_of_direct_term
from test_own_estimators import RATE, batches, by_hand, networks, traced
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.func import functional_call
from torch.nn import functional as F

import metapl
from metapl import MetaplError
from metapl.ablation import ModeCost
from metapl.core.draws import Draws
from metapl.execution.shards import number_of_shard
from metapl.feedback import Estimator

__all__ = ["traced"]

LastLayer = CLASSES["LastLayer"]
SketchedW = CLASSES["SketchedW"]
Antithetic = CLASSES["Antithetic"]
MODES: dict[str, Estimator] = {
    "last_layer": LastLayer("2"),
    "sketched_w": SketchedW(),
    "antithetic": Antithetic(),
}


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trainer_of(name: str, seed: int = 5, **options: Any) -> metapl.BilevelTrainer:
    teacher, student = networks()
    return metapl.BilevelTrainer(
        teacher,
        student,
        MODES[name],
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=RATE),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.1),
        teacher_losses=(),
        generator=seeded(seed),
        **{"verify": False, **options},
    )


def expected_of(name: str, key: Tensor) -> Tensor:
    """Return h of the first step by the formula, double backward, and the draws of a key."""
    step = by_hand()
    draws = Draws(key)
    if name == "last_layer":
        return step.along({n: t for n, t in step.w.items() if n.startswith("2.")})
    if name == "sketched_w":
        kept = {n: 2 * t * (draws.uniform_like(t) < 0.5) for n, t in step.w.items()}
        return step.along(kept)
    noise = 0.1 * draws.normal_like(step.q)
    slope = (loss_after(step.q + noise) - loss_after(step.q - noise)) / (2 * 0.1**2)
    return -slope * noise


def loss_after(q: Tensor) -> Tensor:
    """Return the outer loss after a step of SGD on a signal."""
    _, student = networks()
    (x, y), (u,) = batches(1)
    theta = {name: p.detach().requires_grad_() for name, p in student.named_parameters()}
    loss = -(q * functional_call(student, theta, (u,)).log_softmax(-1)).sum(-1).mean()
    gradients = torch.autograd.grad(loss, list(theta.values()))
    moved = {name: t - RATE * g for (name, t), g in zip(theta.items(), gradients, strict=True)}
    return F.cross_entropy(functional_call(student, moved, (x,)), y).detach()


ROADS = ("eager", "micro-batches", "pure", "compiled")
NO_KEY = torch.zeros(2, dtype=torch.int64)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("name", "road"), product(MODES, ROADS, usual=["sketched_w", "eager", "pure", "micro-batches"])
)
def test_every_road_has_what_the_formula_gives(name: str, road: str) -> None:
    options: dict[str, Any] = {"micro-batches": {"accumulate": 2}, "compiled": {"compile": True}}
    trainer = trainer_of(name, **options.get(road, {}))
    key = trainer.mode_state.get("draws", NO_KEY)
    labeled, (u,) = batches(1)
    if road == "pure":
        step, state = trainer.functional()
        _, pure_report = step(state, labeled, u)
        h = pure_report.feedback
    else:
        h = trainer.step(labeled, u).feedback
    assert close({"h": h}, {"h": expected_of(name, key)}, 1e-9)


@pytest.mark.parametrize("name", ["sketched_w", "antithetic"])
def test_draws_differ_by_seed_and_step_and_are_the_same_for_a_seed(name: str) -> None:
    labeled, (u,) = batches(1)
    runs = []
    for seed in (5, 5, 6):
        trainer = trainer_of(name, seed)
        start = trainer.state_dict()
        runs.append([trainer.step(labeled, u).feedback])
        trainer.load_state_dict({**start, "mode_state": trainer.mode_state})
        runs[-1].append(trainer.step(labeled, u).feedback)
    first, again, other = runs
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    # At the same weights.
    assert not torch.allclose(first[0], first[1], rtol=0.1)
    assert not torch.allclose(first[0], other[0], rtol=0.1)


@pytest.mark.parametrize("name", MODES)
def test_a_stack_has_the_steps_of_each_seed(name: str) -> None:
    labeled, (u,) = batches(1)
    step, first = trainer_of(name, 1).functional()
    _, second = trainer_of(name, 2).functional()
    stacked = metapl.functional.stack([first, second])
    both = torch.func.vmap(step, in_dims=(0, None, None))
    _, report = both(stacked, labeled, u)
    for number, state in enumerate((first, second)):
        _, single = step(state, labeled, u)
        assert close({"h": report.feedback[number]}, {"h": single.feedback}, 1e-10)
    is_same = torch.allclose(*report.feedback)
    assert is_same == (not MODES[name].draws)


def with_dropout() -> nn.Module:
    torch.manual_seed(1)
    student = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
    return student.double()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ["sketched_w", pytest.param("antithetic", marks=pytest.mark.long)])
def test_a_compiled_step_of_a_student_with_masks_is_the_eager_one(name: str) -> None:
    """A trainer compares its first compiled step with the eager one, and would refuse it."""
    labeled, (u,) = batches(1)

    def trainer_by(seed: int) -> metapl.BilevelTrainer:
        torch.manual_seed(3)
        student = with_dropout()
        return metapl.BilevelTrainer(
            networks()[0],
            student,
            MODES[name],
            compile=True,
            verify=False,
            generator=seeded(seed),
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=RATE),
        )

    # One trainer takes the first step of all of them, by one graph.
    trainer = trainer_by(0)
    ends = []
    for seed in (5, 5, 6):
        trainer.load_state_dict(trainer_by(seed).state_dict())
        torch.manual_seed(4)
        ends.append(trainer.step(labeled, u).feedback)
    assert torch.equal(ends[0], ends[1])
    assert not torch.allclose(ends[0], ends[2], rtol=0.1)


@pytest.mark.parametrize("name", MODES)
def test_each_has_the_direct_term(name: str) -> None:
    teacher, student, outer, inner = networks_of_direct_term()
    problem = ReadsModule(teacher)
    result = metapl.hypergradient(
        teacher,
        student,
        outer=outer,
        inner=inner[0],
        problem=problem,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=LR),
        mode=MODES[name],
        generator=seeded(),
        # A shortcut, and an estimator that draws, are off the gradient.
        verify=False,
    )
    signal = problem.signal(teacher, inner[0], None, generator=None)
    outputs = functional_call(student, result.student_params, (outer[0],))
    total = problem.outer_loss(outputs, outer) - (result.feedback * signal.value).sum()
    parameters = dict(teacher.named_parameters())
    grads = torch.autograd.grad(
        total, [*parameters.values()], allow_unused=True, materialize_grads=True
    )
    assert close(result.grads, dict(zip(parameters, grads, strict=True)), 1e-10)
    assert float(result.direct["scale.weight"].norm()) > 0
    assert float(result.feedback.norm()) > 0


def test_a_study_has_the_error_and_the_noise_of_each() -> None:
    labeled, (u,) = batches(1)
    study = metapl.ablate(
        trainer_of("last_layer"),
        labeled,
        u,
        ["forward", *MODES.values()],
        draws=20,
        rounds=1,
        altered=False,
    )
    costs = {name: cost for name, cost in study.modes.items() if isinstance(cost, ModeCost)}
    assert [*costs] == ["forward", *MODES]
    assert costs["last_layer"].noise_to_signal == 0
    assert 0 < costs["last_layer"].relative_error < 1
    for name in ("sketched_w", "antithetic"):
        # The square of the noise of a mean of 20 draws is 1/20 of theirs.
        noise = costs[name].noise_to_signal
        assert noise > 0.3
        assert costs[name].relative_error < 2.5 * noise / 20**0.5
    assert study.recommended == "forward"


def checked(mode: Estimator, student: nn.Module) -> Any:
    teacher, _ = networks()
    labeled, (u,) = batches(1)
    return metapl.check_gradient(
        teacher,
        student,
        outer=labeled,
        inner=u,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=RATE),
        mode=mode,
    )


def test_verification_says_of_each_how_far_it_is_off() -> None:
    torch.manual_seed(0)
    one_layer = nn.Sequential(nn.Linear(4, 3)).double()
    assert checked(LastLayer("0"), one_layer).status == "right"
    assert checked(SketchedW(share=1.0), one_layer).status == "right"
    for mode in MODES.values():
        check = checked(mode, networks()[1])
        assert check.status == "refused"
        assert "off the loss after real steps" in check.verdict
        assert ("likely the draws of the mode" in check.verdict) == mode.draws


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, "page_estimators")
    yield ranks
    ranks.close()


@pytest.mark.long
def test_two_ranks_of_a_sharded_student_have_the_rows_of_one_process(two: Ranks) -> None:
    modes: list[Any] = [LastLayer("head"), SketchedW(share=1.0), SketchedW(), Antithetic(1e-4)]
    by_rank = two.run("sharded", modes=modes)
    joined = [torch.cat([h for h, _ in of_ranks]) for of_ranks in zip(*by_rank, strict=True)]
    (labeled, unlabeled), *_ = sharded_cases.batches(1)

    def alone(mode: Any) -> Tensor:
        return sharded_cases.built(mode, None).step(labeled, unlabeled).feedback

    exact = alone("forward")
    last_layer, whole, sketched, antithetic = joined
    assert close({"h": last_layer}, {"h": alone(LastLayer("head"))}, 1e-9)
    assert close({"h": whole}, {"h": exact}, 1e-9)
    # Half of w differs from w, and is not far from it.
    assert 0.01 < float((sketched - exact).norm() / exact.norm()) < 3
    # For a short noise ε, h = ε ⟨ε, h of forward⟩, with noise of each rank's own for its rows.
    rows = len(exact) // 2
    keys = [of_rank[3][1] for of_rank in by_rank]
    noise = torch.cat([Draws(key, rank).normal_like(exact[:rows]) for rank, key in enumerate(keys)])
    assert not torch.allclose(noise[:rows], noise[rows:])
    assert close({"h": antithetic}, {"h": noise * (noise * exact).sum()}, 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["ddp", "replicate"])
def test_copies_of_the_weights_draw_the_same_for_them(two: Ranks, layout: str) -> None:
    modes: list[Any] = [LastLayer("head"), SketchedW(), Antithetic(1e-4)]
    by_rank = two.run("sharded", modes=modes, layout=layout)
    last_layer, sketched, antithetic = (
        torch.cat([h for h, _ in of_ranks]) for of_ranks in zip(*by_rank, strict=True)
    )
    (labeled, unlabeled), *_ = sharded_cases.batches(1)

    def alone(mode: Any) -> Tensor:
        return sharded_cases.built(mode, None).step(labeled, unlabeled).feedback

    assert close({"h": last_layer}, {"h": alone(LastLayer("head"))}, 1e-9)
    assert close({"h": sketched}, {"h": alone(SketchedW())}, 1e-9)
    # The signal has rows of its own in each process, and noise of its own for them.
    rows = len(antithetic) // 2
    assert not torch.allclose(antithetic[:rows], antithetic[rows:])


class Mesh(NamedTuple):
    """What is asked of a mesh of processes."""

    shape: tuple[int, ...]
    coordinate: tuple[int, ...]

    def get_coordinate(self) -> tuple[int, ...]:
        return self.coordinate


@pytest.mark.parametrize(
    ("placements", "number"),
    [
        ((Shard(0), Shard(1)), 1 * 3 + 2),
        ((Replicate(), Shard(0)), 2),
        ((Shard(0), Replicate()), 1),
        ((Replicate(), Replicate()), 0),
    ],
)
def test_processes_along_a_replicated_dimension_hold_the_same_part(
    placements: tuple[Any, ...], number: int
) -> None:
    mesh = Mesh((2, 3), (1, 2))
    part = SimpleNamespace(device_mesh=mesh, placements=placements, to_local=None)
    assert number_of_shard([nn.Parameter(torch.ones(2)), part]) == number


# ------------------------------------------------------------------------------------------ draws


def test_draws_are_even_normal_and_unlike_those_of_other_keys() -> None:
    numbers = 20_000
    like = torch.empty(numbers, dtype=torch.float64)
    samples = []
    for key in ((0, 0), (0, 1), (1, 0), (1, 1), (2**31 - 1, 7)):
        draws = Draws(torch.tensor(key))
        samples += [draws.uniform_like(like), draws.uniform_like(like)]
        normal = draws.normal_like(like)
        assert abs(float(normal.mean())) < 4 / numbers**0.5
        assert abs(float(normal.std()) - 1) < 4 / (2 * numbers) ** 0.5
    samples.append(Draws(torch.tensor((0, 0)), rank=1).uniform_like(like))
    for sample in samples:
        counts = torch.histc(sample, bins=20, min=0, max=1)
        # χ² of 19 degrees of freedom is above 50 once in 10,000 samples.
        assert float(((counts - numbers / 20) ** 2 / (numbers / 20)).sum()) < 50
        neighbors = torch.corrcoef(torch.stack([sample[1:], sample[:-1]]))[0, 1]
        assert abs(float(neighbors)) < 4 / numbers**0.5
    correlations = torch.corrcoef(torch.stack(samples)) - torch.eye(len(samples))
    assert float(correlations.abs().max()) < 5 / numbers**0.5


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_uniform_draws_are_neither_0_nor_1(dtype: torch.dtype) -> None:
    like = torch.empty(200_000, dtype=dtype)
    uniform = Draws(torch.tensor((0, 0))).uniform_like(like)
    assert uniform.dtype == dtype
    assert 0 < float(uniform.min())
    assert float(uniform.max()) < 1
    # Most of their range is there.
    assert float(uniform.max()) > 0.99


def test_draws_without_a_word_and_by_torch_are_refused() -> None:
    labeled, (u,) = batches(1)
    teacher, student = networks()
    inputs: dict[str, Any] = {
        "outer": labeled,
        "inner": u,
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=RATE),
    }

    class Silent(SketchedW):  # type: ignore[misc, valid-type]
        draws = False

    with pytest.raises(MetaplError, match="expected draws = True in its class"):
        metapl.hypergradient(teacher, student, **inputs, mode=Silent())

    class ByTorch(SketchedW):  # type: ignore[misc, valid-type]
        def feedback(self, path: Any, state: Any) -> Any:
            torch.rand(())
            return super().feedback(path, state)

    with pytest.raises(
        MetaplError, match="default generator; expected draws = True in the class, and path.draws"
    ):
        metapl.hypergradient(teacher, student, **inputs, mode=ByTorch())


class Weights(metapl.BilevelProblem):
    """A problem that draws its signal by the generator of labels, and is no distribution."""

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> metapl.Signal:
        noise = torch.rand(len(batch), dtype=batch.dtype, generator=generator)
        return metapl.Signal(teacher(batch)[:, 0].sigmoid() + noise)

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return signal.value * outputs.logsumexp(-1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.usefixtures("traced")
def test_a_problem_that_draws_by_the_generator_is_named_where_it_is_compiled() -> None:
    labeled, (u,) = batches(1)
    trainer = trainer_of("last_layer", compile=True, problem=Weights())
    with pytest.raises(MetaplError, match=r"of which Weights draws .* torch\.manual_seed"):
        trainer.step(labeled, u)
