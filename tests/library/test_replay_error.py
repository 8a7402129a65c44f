"""Steps of a path that are computed again.

Deterministic algorithms are asked for. A state that comes out otherwise than it was kept stands in
the result, or is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import test_long_paths
import torch
from captures import as_functions
from test_long_paths import network
from torch import Tensor, nn

import metapl
from metapl import Lookahead, MetaplError
from metapl.core import replays
from metapl.core.replays import ReplayCheck, state_digest
from metapl.execution.numerics import deterministic
from metapl.feedback import Forward
from metapl.functional import graphs, training
from metapl.problems import EqualWeights

STEPS = 12
CPU = torch.device("cpu")
WAYS = {
    "every third": Forward(keep_every=3),
    "tree": Forward(keep="tree"),
    "host": Forward(keep_every=5, keep_on="cpu"),
}
BLOCKS = pytest.mark.parametrize("way", WAYS)


class Noisy(nn.Module):
    """A layer whose outputs have noise of a generator of its own, which nobody rewinds."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.size = size
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        y: Tensor = self.layer(x)
        return y + self.size * noise

    def __deepcopy__(self, memo: Any) -> Noisy:
        return type(self)(self.size).to(self.layer.weight.dtype)


class NoisyGradient(Noisy):
    """A layer whose outputs are a function and whose gradients are not.

    Such are the gradients of sums by atomic additions.
    """

    def forward(self, x: Tensor) -> Tensor:
        def with_noise(g: Tensor) -> Tensor:
            noise = torch.randn(g.shape, generator=self.generator, dtype=g.dtype)
            return g * (1 + self.size * noise)

        y: Tensor = self.layer(x)
        if y.requires_grad:
            y.register_hook(with_noise)
        return y


class Counting(nn.Module):
    """A layer that is scaled by the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.layer(x)
        return (1 + 1e-5 * self.calls) * y


def student_of(first: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(first or nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def gradient(
    student: nn.Module, mode: Forward, steps: int = STEPS, **options: Any
) -> metapl.Hypergradient:
    dtype = next(student.parameters()).dtype

    def batch(number: int) -> tuple[Tensor, Tensor]:
        x, y = test_long_paths.batch(number)
        return x.to(dtype), y

    torch.manual_seed(5)
    return metapl.hypergradient(
        None,
        student,
        outer=batch(-1),
        inner=Lookahead(batch, steps=steps),
        inner_optimizer=torch.optim.Adam(student.parameters(), lr=0.01),
        problem=EqualWeights(),
        mode=mode,
        # Some students differ from their copies, and calls are counted.
        **{"verify": False, **options},
    )


@pytest.fixture
def graphs_as_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the two graphs of a compiled path as plain functions."""
    monkeypatch.setattr(graphs, "_CACHE", {})
    as_functions(monkeypatch)


@BLOCKS
@pytest.mark.parametrize("compile", [False, True])
def test_a_student_that_is_a_function_replays_bit_for_bit(
    way: str, compile: bool, graphs_as_functions: None
) -> None:
    # With dropout and batch norm.
    student = network().double()
    assert gradient(student, WAYS[way], compile=compile).replay_error == 0.0


@BLOCKS
def test_small_noise_stands_in_the_result(way: str) -> None:
    result = gradient(student_of(Noisy(1e-9)), WAYS[way])
    assert 1e-13 < result.replay_error < 1e-8


PLANTED = pytest.mark.parametrize(
    "planted", [Noisy(1e-3), NoisyGradient(1e-3), Counting()], ids=lambda p: type(p).__name__
)


@BLOCKS
@PLANTED
def test_a_state_that_comes_out_otherwise_is_refused_and_nothing_moves(
    way: str, planted: nn.Module
) -> None:
    # In float32, where outputs may differ by some thousandths before the passes themselves are
    # refused.
    student = student_of(copy.deepcopy(planted), torch.float32)
    state_before = copy.deepcopy(student.state_dict())
    with pytest.raises(
        MetaplError, match=r"computed again, and their state differs by .*replay_tolerance="
    ):
        gradient(student, WAYS[way])
    assert all(torch.equal(t, state_before[name]) for name, t in student.state_dict().items())
    assert not torch.are_deterministic_algorithms_enabled()


@BLOCKS
@PLANTED
def test_it_is_allowed_by_a_tolerance(way: str, planted: nn.Module) -> None:
    student = student_of(copy.deepcopy(planted), torch.float32)
    assert 1e-6 < gradient(student, WAYS[way], replay_tolerance=0.1).replay_error < 1e-1


def test_a_tolerance_is_zero_or_more() -> None:
    with pytest.raises(MetaplError, match="replay_tolerance"):
        gradient(student_of(), WAYS["tree"], replay_tolerance=-1.0)
    assert gradient(student_of(), WAYS["tree"], replay_tolerance=0.0).replay_error == 0.0


def test_passes_with_other_outputs_are_refused_whatever_the_tolerance() -> None:
    with pytest.raises(MetaplError, match="returns other outputs"):
        gradient(student_of(Noisy(1e-3)), WAYS["tree"], replay_tolerance=0.1)


def test_where_all_states_are_kept_nothing_is_computed_again() -> None:
    assert gradient(student_of(Noisy(1e-9)), Forward(keep_every=1)).replay_error == 0.0


@pytest.mark.parametrize("way", [*WAYS, "all"])
def test_compiled_paths_look_too(
    way: str, graphs_as_functions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The comparison with the eager road would refuse the student first.
    monkeypatch.setattr(training, "refuse_other_gradient", lambda *arguments: None)
    mode = WAYS.get(way, Forward(keep_every=1))
    result = gradient(student_of(Noisy(1e-9)), mode, compile=True)
    assert 1e-13 < result.replay_error < 1e-8
    with pytest.raises(MetaplError, match="computed again"):
        gradient(student_of(Counting()), mode, compile=True)


def test_every_end_of_a_block_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[int] = []
    compare = ReplayCheck.compare

    def watched(self: ReplayCheck, number: int, *state: Any) -> None:
        assert number in self.digests
        reached.append(number)
        compare(self, number, *state)

    monkeypatch.setattr(ReplayCheck, "compare", watched)
    gradient(student_of(), Forward(keep_every=5))
    # Of twelve steps the last is not computed again: its own state is an end.
    assert reached == [11, 10, 5]
    reached.clear()
    gradient(student_of(), Forward(keep="tree"), steps=23)
    assert reached == [22, 20, 10]


def test_attribution_has_the_error_and_the_precision() -> None:
    torch.manual_seed(0)
    rows = torch.randn(12, 6)
    labels = torch.arange(12) % 3

    def scores(student: nn.Module, **options: Any) -> metapl.training.Attribution:
        examples = rows.to(next(student.parameters()).dtype), labels
        return metapl.attribute(
            student,
            examples,
            examples,
            optimizer=torch.optim.SGD(student.parameters(), 0.1),
            steps=6,
            batch_size=6,
            mode=Forward(keep_every=2),
            progress=False,
            # Their copies are others.
            verify=False,
            **options,
        )

    assert scores(student_of()).replay_error == 0.0
    assert scores(student_of()).float32_products == {
        "matrix products": "ieee",
        "convolutions": "ieee",
    }
    assert 1e-13 < scores(student_of(Noisy(1e-9))).replay_error < 1e-8
    with pytest.raises(MetaplError, match="computed again"):
        scores(student_of(Counting(), torch.float32))
    assert scores(student_of(Counting(), torch.float32), replay_tolerance=0.1).replay_error > 1e-6


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, bool]]]:
    """Yield whether deterministic algorithms, or warnings alone, were asked for in each pass."""
    seen: list[tuple[bool, bool]] = []
    forward = nn.Tanh.forward

    def watched(self: nn.Tanh, x: Tensor) -> Tensor:
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        seen.append((torch.are_deterministic_algorithms_enabled(), warns))
        return forward(self, x)

    monkeypatch.setattr(nn.Tanh, "forward", watched)
    yield seen
    torch.use_deterministic_algorithms(mode=False)


@pytest.mark.parametrize("compile", [False, True])
def test_paths_ask_for_deterministic_algorithms(
    compile: bool,
    graphs_as_functions: None,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[tuple[bool, bool]],
) -> None:
    monkeypatch.setattr(training, "refuse_other_gradient", lambda *arguments: None)
    gradient(student_of(), Forward(keep_every=3), compile=compile)
    assert asked
    assert {*asked} == {(True, True)}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    asked.clear()
    # The caller wants errors.
    torch.use_deterministic_algorithms(mode=True)
    gradient(student_of(), Forward(keep_every=3), compile=compile)
    assert {*asked} == {(True, False)}
    assert torch.are_deterministic_algorithms_enabled()


def test_the_setting_is_put_back_after_an_error() -> None:
    def failing() -> None:
        with deterministic(CPU):
            assert torch.are_deterministic_algorithms_enabled()
            raise ValueError("as planted")

    with pytest.raises(ValueError, match="as planted"):
        failing()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("piece", [replays.PIECE, 256 * 40])
def test_a_digest_says_how_far_apart_two_states_are(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "PIECE", piece)
    torch.manual_seed(0)
    sizes = {"weight": (300, 500), "bias": (500,), "scale": ()}
    weights = {name: torch.randn(size) for name, size in sizes.items()}
    momentum = [{"momentum": torch.randn(700)}, {"step": torch.tensor(3.0)}, None]
    # Changes of either sign, and of one.
    for change in (torch.randn(300, 500), torch.ones(300, 500)):
        moved = {**weights, "weight": weights["weight"] + 1e-4 * change}
        difference = torch.cat(
            [(moved[n] - t).double().flatten() for n, t in weights.items()]
        ).norm()
        digests = state_digest(weights, momentum), state_digest(moved, momentum)
        distance = (digests[0] - digests[1]).norm(dim=1)
        assert float(distance[0]) == pytest.approx(float(difference), rel=0.2)
        assert distance[1] == 0
    with_one_change = {name: t.clone() for name, t in weights.items()}
    with_one_change["bias"][7] = torch.nextafter(with_one_change["bias"][7], torch.tensor(9.0))
    assert not torch.equal(state_digest(with_one_change, momentum), state_digest(weights, momentum))
    assert torch.equal(
        state_digest(weights, momentum), state_digest(copy.deepcopy(weights), momentum)
    )
    small = {"weight": torch.randn(10, 10, dtype=torch.float64)}
    assert torch.equal(state_digest(small, None)[0].abs()[:100], small["weight"].abs().flatten())
