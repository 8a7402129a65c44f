"""Every mode beside the exact gradient, altered feedback, and which mode is recommended."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
import pytest
import torch
from problems_zoo import everything, same, toy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import metapl
from metapl.ablation import Ablation, Altered, ModeCost, ablate, recommendation
from metapl.ablation.cost import FORMULAS, flops, seconds
from metapl.execution.ranks import ALONE
from metapl.feedback import Difference, Estimator, Forward

EXACT = ("unrolled", "forward", "difference")
QUICK: dict[str, Any] = {"draws": 2, "rounds": 1}


def ablation_of(kind: str = "dropout", modes: Any = None, **options: Any) -> Ablation:
    problem = toy(kind, dtype=torch.float32, rows=8)
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="reinforce")
    return ablate(trainer, problem.labeled, problem.unlabeled, modes, **{**QUICK, **options})


def test_the_figures_are_what_is_known_of_the_modes() -> None:
    modes = ablation_of(draws=16).modes
    assert tuple(modes) == metapl.MODES
    assert isinstance(modes["implicit"], str)
    assert "optimum" in modes["implicit"]
    costs = {name: mode for name, mode in modes.items() if isinstance(mode, ModeCost)}
    for name in EXACT:
        assert costs[name].cosine > 0.9999
        assert costs[name].relative_error < 1e-2
        assert costs[name].noise_to_signal == 0
    noise = {
        name: costs[name].noise_to_signal
        for name in ("reinforce", "reinforce_per_example", "loss_difference")
    }
    assert noise["reinforce_per_example"] < noise["reinforce"]
    assert costs["reinforce_per_example"].cosine > 0.8
    assert costs["none"].relative_error == 1
    assert costs["none"].passes < costs["reinforce"].passes < costs["forward"].passes
    assert all(cost.seconds > 0 and cost.peak_bytes > 0 for cost in costs.values())


def test_nothing_moves_though_it_trains_in_between() -> None:
    problem = toy("batch_norm")
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward")
    for _ in range(2):
        trainer.step(problem.labeled, problem.unlabeled)
    everything_before = everything(problem)
    state = trainer.state_dict()
    result = ablate(
        trainer,
        [problem.labeled] * 2,
        [problem.unlabeled] * 3,
        ["forward", "none"],
        steps=4,
        rounds=1,
    )
    assert result.points == (0, 2, 4)
    assert same(everything_before, everything(problem))
    state_after = trainer.state_dict()
    assert state_after["steps_done"] == state["steps_done"] == 2
    moments_after = state_after["inner"]["state"]
    for name, moments in state["inner"]["state"].items():
        assert torch.equal(moments_after[name]["momentum_buffer"], moments["momentum_buffer"])


def test_the_feedback_of_the_first_mode_that_runs_is_altered() -> None:
    ablation = ablation_of("mlp", ["none", "difference", "unrolled"], draws=20)
    assert [*ablation.altered] == [
        "difference_permuted",
        "difference_class_means",
        "difference_random_sign",
    ]
    figures = {name: mode for name, mode in ablation.altered.items() if isinstance(mode, ModeCost)}
    assert figures["difference_class_means"].noise_to_signal == 0
    assert figures["difference_class_means"].relative_error > 0.01
    signs = figures["difference_random_sign"]
    # Signs are drawn anew for every draw.
    assert signs.noise_to_signal > 0.3
    assert abs(signs.cosine) < 0.9
    assert not ablation_of("mlp", ["reinforce"]).altered
    assert not ablation_of("mlp", ["forward"], altered=False).altered
    assert (
        "forward_permuted"
        in ablation_of("mlp", ["forward", Altered(Forward(), "permuted")]).altered
    )


class RunningMean(metapl.BilevelProblem):
    """Keeps a running mean in an array, outside of the teacher's buffers."""

    def __init__(self) -> None:
        self.mean = numpy.ones(3)

    def exact(self) -> metapl.BilevelProblem:
        return self

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> metapl.Signal:
        logits = teacher(batch)
        self.mean = self.mean / 2 + logits.detach().mean(0).numpy() + 1
        return metapl.Signal(logits * torch.from_numpy(self.mean).to(logits))

    def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return F.cross_entropy(outputs, signal.value.softmax(-1), reduction="none")

    def outer_loss(self, outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


def test_state_that_the_signal_writes_is_named() -> None:
    batch = torch.randn(12, 4), torch.arange(12) % 3
    trainer = metapl.BilevelTrainer(nn.Linear(4, 3), nn.Linear(4, 3), problem=RunningMean())
    with pytest.raises(metapl.MetaplError, match=r"\(mean\); expected .* in a buffer"):
        ablate(trainer, batch, batch[0], ["forward"], **QUICK)


class ClassWeights(nn.Module):
    """Returns a number for each class, as a parameter or as the result of an operation."""

    def __init__(self, *, returns_leaf: bool) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(3))
        self.returns_leaf = returns_leaf

    def forward(self) -> Tensor:
        return self.weights if self.returns_leaf else 1 * self.weights


class Balanced(metapl.BilevelProblem):
    signal_has_rows = False

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> metapl.Signal:
        return metapl.Signal(teacher())

    def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return signal.value[batch[1]] * F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


def test_a_teacher_that_returns_its_parameter_costs_what_another_does() -> None:
    batch = torch.randn(12, 4), torch.arange(12) % 3
    passes: list[float] = []
    for returns_leaf in (True, False):
        teacher = ClassWeights(returns_leaf=returns_leaf)
        trainer = metapl.BilevelTrainer(teacher, nn.Linear(4, 3), "forward", problem=Balanced())
        cost = ablate(trainer, batch, batch, ["forward"], **QUICK).modes["forward"]
        assert isinstance(cost, ModeCost)
        passes.append(cost.passes)
    assert passes[0] == passes[1]


OWN = torch.Generator().manual_seed(1)
OWN_OF_NUMPY = numpy.random.default_rng(1)


def drawn_by_numpy(t: Tensor) -> Tensor:
    return torch.from_numpy(numpy.random.randn(*t.shape)).to(t)  # noqa: NPY002


def drawn_by_python(t: Tensor) -> Tensor:
    numbers = [random.gauss(0, 1) for _ in range(t.numel())]
    return torch.tensor(numbers).reshape(t.shape).to(t)


def drawn_by_a_generator(t: Tensor) -> Tensor:
    return torch.randn(t.shape, generator=OWN).to(t)


def drawn_by_a_generator_of_numpy(t: Tensor) -> Tensor:
    return torch.from_numpy(OWN_OF_NUMPY.standard_normal(t.shape)).to(t)


class SeededNoise:
    """Draws the same numbers at each call of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=torch.Generator().manual_seed(self.seed)).to(t)


DRAWS = [
    drawn_by_numpy,
    drawn_by_python,
    drawn_by_a_generator,
    drawn_by_a_generator_of_numpy,
]


@dataclass(frozen=True)
class NoisyForward(Forward):
    """The exact feedback, and noise of a quarter of its size."""

    draw: Any = None
    seed: int = 0
    name: ClassVar[str] = "noisy"

    def feedback(self, path: Any, state: Any) -> Any:
        draw = self.draw or SeededNoise(self.seed)

        def noisy(_: str, h: Tensor) -> Tensor:
            return h + h.norm() / h.numel() ** 0.5 * draw(h) / 4

        feedback, state = super().feedback(path, state)
        return [by_step.mapped(noisy) for by_step in feedback], state


@pytest.mark.parametrize("draw", [*DRAWS, None])
def test_an_estimator_draws_from_any_generator(draw: Any) -> None:
    generators = random.getstate(), numpy.random.get_state(legacy=False)["state"]["pos"]  # noqa: NPY002
    mode = NoisyForward(draw=draw)
    figures = ablation_of("mlp", [mode, "forward"], draws=16, altered=False)
    noisy = figures.modes["noisy"]
    assert isinstance(noisy, ModeCost)
    assert 0.1 < noisy.noise_to_signal < 1
    # The error of the mean over 16 draws.
    assert noisy.relative_error < 0.8 * noisy.noise_to_signal
    assert figures.recommended == "forward"
    assert figures.modes["forward"].noise_to_signal == 0  # type: ignore[union-attr]
    assert generators == (
        random.getstate(),
        numpy.random.get_state(legacy=False)["state"]["pos"],  # noqa: NPY002
    )


class NoisyLoss(metapl.PseudoLabels):
    """Weighs each example by a draw."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Tensor:
        losses = super().inner_loss(outputs, signal, batch)
        return losses * self.draw(losses).square()


@pytest.mark.parametrize("draw", DRAWS)
def test_a_loss_that_draws_from_another_generator_has_no_exact_gradient(draw: Any) -> None:
    problem = toy("mlp", dtype=torch.float32, rows=8)
    trainer = metapl.BilevelTrainer(**problem.networks(), problem=NoisyLoss(draw))
    text = "draws from Python's or NumPy's global generator|random numbers of a generator of its"
    with pytest.raises(metapl.MetaplError, match=text):
        ablate(trainer, problem.labeled, problem.unlabeled, ["forward"], **QUICK)


def test_the_operations_are_those_of_pytorch_own_counter() -> None:
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x = torch.randn(4, 5, requires_grad=True)

    def step() -> None:
        network(x).square().sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    # Each product of the forward pass has two in the backward pass.
    assert flops(step) == counter.get_total_flops() == 3 * 2 * 4 * (5 * 7 + 7 * 3)


class TooLarge(Difference):
    """Asks for more memory than there is."""

    def feedback(self, path: Any, state: Any) -> Any:
        raise MemoryError


def by_products(network: nn.RNNBase, x: Tensor) -> Tensor:
    """Run recurrent layers by matrix products, of which PyTorch's counter knows each."""
    layer = x
    for number in range(network.num_layers):
        directions = []
        for suffix in ["", "_reverse"][: 1 + network.bidirectional]:
            from_input = getattr(network, f"weight_ih_l{number}{suffix}")
            from_state = getattr(network, f"weight_hh_l{number}{suffix}")
            state = torch.zeros(x.shape[1], network.hidden_size, requires_grad=True)
            states = []
            for row in layer:
                gates = (row @ from_input.T + state @ from_state.T).tanh()
                state = gates.unflatten(1, (-1, network.hidden_size)).sum(1)
                states.append(state)
            directions.append(torch.stack(states))
        layer = torch.cat(directions, -1)
    return layer


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True, "bias": False}])
def test_recurrent_layers_cost_what_their_products_do(kind: Any, options: Any) -> None:
    network = kind(5, 7, **options)
    x = torch.randn(6, 4, 5, requires_grad=True)
    state = torch.zeros(network.num_layers * (1 + network.bidirectional), 4, 7, requires_grad=True)
    states = (state, state) if kind is nn.LSTM else state
    operations = flops(lambda: network(x, states))
    assert operations == flops(lambda: by_products(network, x)) > 0
    with_gradients = flops(lambda: network(x, states)[0].sum().backward())
    assert with_gradients == flops(lambda: by_products(network, x).sum().backward())
    assert with_gradients == 3 * operations


def test_fused_layers_of_a_device_cost_what_their_products_do() -> None:
    aten = torch.ops.aten
    inputs = torch.Size([6, 4, 5])
    weights = [torch.Size(shape) for shape in ([28, 5], [28, 7], [28], [28])]
    products = 2 * 6 * 4 * 28 * (5 + 7)
    assert FORMULAS[aten._cudnn_rnn](inputs, weights) == products
    backward = FORMULAS[aten._cudnn_rnn_backward]
    assert backward(inputs, weights, [True, True, True, True]) == 2 * products
    assert backward(inputs, weights, [True, True, True, False]) == products


def test_attention_and_products_with_vectors_cost_what_they_compute() -> None:
    q = torch.randn(2, 3, 5, 4, requires_grad=True)
    assert flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * (2 * 3 * 5 * 5 * 4)
    matrix, vector = torch.randn(6, 4), torch.randn(4)
    assert flops(lambda: matrix @ vector) == 2 * 6 * 4


def test_a_mode_that_cannot_run_has_its_reason_below_the_table() -> None:
    result = ablation_of("mlp", ["unrolled", TooLarge(), "implicit"])
    assert result.recommended == "unrolled"
    assert "MemoryError" in str(reason := result.modes["difference"])
    assert json.loads(result.to_json())["modes"]["difference"] == {"reason": reason}
    table = result.table()
    assert max(map(len, table.splitlines())) <= 80
    assert " ".join(str(result.modes["implicit"]).split()) in " ".join(table.split())
    assert str(result).startswith(table)
    assert " ".join(result.recommendation.split()) in " ".join(str(result).split())
    assert max(map(len, [*str(result).splitlines(), *repr(result).splitlines()])) <= 80
    lines = {line.split()[0]: line for line in table.splitlines() if line}
    assert lines["difference"].endswith("[1]")
    assert lines["implicit"].endswith("[2]")
    assert lines["unrolled"].split()[1] == "1.000"
    assert isinstance(result.altered["unrolled_permuted"], ModeCost)


def trained() -> Ablation:
    """Return an ablation at three points, with a mode that cannot run and with controls."""
    problem = toy("mlp", dtype=torch.float32, rows=8)
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward")
    sources: Any = [problem.labeled] * 3, [problem.unlabeled] * 3
    return ablate(
        trainer, *sources, ["difference", "forward", "implicit", "reinforce"], steps=2, **QUICK
    )


def test_figures_of_several_points_are_the_means_of_those_at_each() -> None:
    result = trained()
    assert result.points == (0, 1, 2)
    mode = result.modes["reinforce"]
    assert isinstance(mode, ModeCost)
    errors = torch.tensor(
        [distance.relative_error for distance in mode.by_point], dtype=torch.float64
    )
    assert len(set(errors.tolist())) == 3
    assert mode.relative_error == pytest.approx(errors.square().mean().sqrt().item())
    assert mode.cosine == pytest.approx(sum(distance.cosine for distance in mode.by_point) / 3)


def test_an_ablation_is_read_back_from_its_json() -> None:
    result = trained()
    assert Ablation.from_json(result.to_json()) == result
    infinite = Ablation({"own": ModeCost(math.nan, 0.5, 1.0, 9.0, 0.01, 1000)}, "none", (0,))
    read = Ablation.from_json(infinite.to_json()).modes["own"]
    assert isinstance(read, ModeCost)
    assert math.isnan(read.cosine)
    for text in ("{", "[]", "{}", '{"modes": {"own": {"passes": 1}}, "altered": {}, "points": []}'):
        with pytest.raises(metapl.MetaplError, match=r"expected that of Ablation\.to_json"):
            Ablation.from_json(text)


def test_the_figure_has_each_mode_at_each_point_and_what_it_costs() -> None:
    result = trained()
    figure = result.plot()
    distances, *costs = figure.axes
    rows = result.modes | result.altered
    names = [label.get_text().replace("\n", "") for label in distances.get_yticklabels()]
    assert names == [*rows]
    assert [text.get_text() for text in distances.get_legend().get_texts()] == [
        "step 0",
        "step 1",
        "step 2",
    ]
    that_ran = {name: cost for name, cost in rows.items() if isinstance(cost, ModeCost)}
    assert [*rows][2] == "implicit"
    assert len(that_ran) == len(rows) - 1
    marks = [line for line in distances.lines if str(line.get_label()).startswith("step")]
    for number, (marked, reaching) in enumerate(zip(marks, distances.collections, strict=True)):
        by_point = [cost.by_point[number] for cost in that_ran.values()]
        assert [*marked.get_xdata()] == [distance.relative_error for distance in by_point]
        segments = reaching.get_segments()  # type: ignore[attr-defined]
        assert [segment[1, 0] for segment in segments] == [
            distance.of_one_draw for distance in by_point
        ]
        assert [round(place) for place in marked.get_ydata()] == [0, 1, 3, 4, 5, 6]
    values = {
        "passes a call": [cost.passes for cost in that_ran.values()],
        "time, ms": [1e3 * cost.seconds for cost in that_ran.values()],
        "peak, KB": [1e-3 * cost.peak_bytes for cost in that_ran.values()],
    }
    assert [axes.get_title(loc="left") for axes in costs] == [*values]
    for axes, expected in zip(costs, values.values(), strict=True):
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(expected)  # type: ignore[attr-defined]
    bold = [
        label.get_text()
        for label in distances.get_yticklabels()
        if label.get_fontweight() == "bold"
    ]
    assert bold == [result.recommended]


def test_a_figure_of_400_pixels_has_letters_of_ten_and_no_two_names_touch() -> None:
    figure = trained().plot()
    figure.set_dpi(100)
    figure.draw_without_rendering()
    assert figure.bbox.width == 400
    distances, costs, *_ = figure.axes
    for axes in (distances, costs):
        places = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert min(place.x0 for place in places) >= 0
        assert all(lower.y1 <= upper.y0 + 1 for upper, lower in itertools.pairwise(places))
        assert all(
            label.get_fontsize() * 100 / 72 >= 10
            for label in axes.get_yticklabels() + axes.get_xticklabels()
        )


def test_a_figure_without_matplotlib_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        metapl.MetaplError, match=r"matplotlib, which `pip install '.*\[apps\]'` installs"
    ):
        Ablation({}, "none", (0,)).plot()


def test_a_call_that_waits_for_a_core_is_timed_by_what_it_computes() -> None:
    assert seconds(lambda: time.sleep(0.2), torch.device("cpu")) < 0.1


def cost(seconds: float, peak: int = 100_000, error: float = 0.0, noise: float = 0.0) -> ModeCost:
    return ModeCost(1.0, error, noise, 10.0, seconds, peak)


SAMPLED = {
    "reinforce": cost(0.02, 90_000, 2.0, 19.0),
    "reinforce_per_example": cost(0.03, 100_000, 0.1, 1.5),
}
NONE = {"none": cost(0.001, 10_000, 1.0)}


@pytest.mark.parametrize(
    ("modes", "taken"),
    [
        # The fastest of the exact ones, though difference is faster and nearly exact.
        (
            {
                "unrolled": cost(0.040),
                "forward": cost(0.030),
                "difference": cost(0.020, error=1e-4),
            },
            "forward",
        ),
        ({"unrolled": cost(0.020), "forward": cost(0.030)}, "unrolled"),
        # Within 10 %, memory decides; within 10 % in both, forward.
        ({"unrolled": cost(0.0290, 300_000), "forward": cost(0.0310, 150_000)}, "forward"),
        ({"unrolled": cost(0.0310, 100_000), "forward": cost(0.0290, 150_000)}, "unrolled"),
        ({"unrolled": cost(0.0290, 100_000), "forward": cost(0.0310, 105_000)}, "forward"),
        # Just beyond the tolerance.
        ({"unrolled": cost(0.0290), "forward": cost(0.0320)}, "unrolled"),
        # A gradient near zero.
        (
            {"unrolled": "no second derivative", "forward": cost(0.03, error=0.024)},
            "forward",
        ),
        # A mode that is not exact here.
        (
            {"forward": cost(0.03, error=0.5), "difference": cost(0.04, error=1e-4)},
            "difference",
        ),
        # A mode with noise.
        (
            {"forward": cost(0.03, error=1e-5, noise=2e-3), "unrolled": cost(0.05)},
            "unrolled",
        ),
        # The nearest in one draw.
        ({"forward": "it cannot"}, "reinforce_per_example"),
    ],
)
def test_of_exact_modes_time_decides_then_memory_then_forward(
    modes: dict[str, ModeCost | str], taken: str
) -> None:
    name, text = recommendation({**modes, **SAMPLED, **NONE}, ("forward", "unrolled"), ("none",))
    assert name == taken
    assert text.startswith(f"Take {taken}: ")
    assert (
        "Algorithm 1's scalar (reinforce) takes 20 ms, and error and noise of one draw are 19 times"
        in text
    )


def test_no_feedback_and_the_gradient_at_an_optimum_are_never_recommended() -> None:
    modes: dict[str, ModeCost | str] = {"own": ModeCost(1.0, 0.5, 1.0, 9.0, 0.01, 1000)}
    assert recommendation(modes, (), ())[0] == "own"
    assert recommendation({"forward": "it cannot", **modes}, ("forward",), ("own",))[0] is None
    assert ablation_of("mlp", ["none"]).recommended is None


class Steps(Estimator):
    """An estimator whose feedback is known."""

    name = "known"
    labels = ("soft",)

    def __init__(self, h: Tensor, part: Any = "value") -> None:
        self.h = h
        self.part = part

    def feedback(self, path: Any, state: Any) -> Any:
        return [metapl.feedback.base.Feedback(self.h, self.part)], state


def altered(
    h: Tensor,
    alteration: Any,
    seed: int = 0,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """Return h as it is altered in four steps.

    The signal is of sampled labels, or differentiable.
    """
    soft = torch.zeros(len(h)) if weights is None else weights
    signal = (
        metapl.Signal(soft)
        if labels is None
        else metapl.Signal(labels, log_prob=torch.zeros(len(h)))
    )
    fields = {
        "signal": signal,
        "has_rows": lambda name: True,
        "student": type("Student", (), {"ranks": ALONE}),
    }
    step = type("Step", (), fields)
    estimator = Altered(Steps(h), alteration, seed)
    state = estimator.init()
    feedback_by_step = []
    for _ in range(4):
        (feedback,), state = estimator.feedback(type("Path", (), {"steps": [step]}), state)  # type: ignore[arg-type]
        feedback_by_step.append(feedback.h)
    return feedback_by_step


H = torch.tensor([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0], [6.0, -6.0]])


def test_permuted_gives_the_rows_to_others() -> None:
    altered_by_step = altered(H, "permuted")
    for altered_h in altered_by_step:
        assert sorted(altered_h[:, 0].tolist()) == [1, 2, 3, 6]
        assert torch.equal(altered_h[:, 1], -altered_h[:, 0])
    assert len({tuple(altered_h[:, 0].tolist()) for altered_h in altered_by_step}) > 1
    assert all(
        torch.equal(a, b) for a, b in zip(altered_by_step, altered(H, "permuted"), strict=True)
    )
    of_another_seed = altered(H, "permuted", seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(altered_by_step, of_another_seed, strict=True))


def test_class_means_leave_nothing_of_the_single_example() -> None:
    for altered_h in altered(H, "class_means"):
        assert torch.equal(altered_h, torch.tensor([[3.0, -3.0]] * 4))
    labels = torch.tensor([0, 1, 0, 1])
    for altered_h in altered(torch.tensor([1.0, 2.0, 5.0, 8.0]), "class_means", labels=labels):
        assert altered_h.tolist() == [3, 5, 3, 5]
    # Equal weights are no class.
    weights = torch.tensor([0.1, 0.2, 0.3, 0.3])
    for altered_h in altered(torch.tensor([1.0, 2.0, 5.0, 8.0]), "class_means", weights=weights):
        assert altered_h.tolist() == [4, 4, 4, 4]


def test_random_sign_flips_whole_rows() -> None:
    altered_by_step = torch.stack(altered(H, "random_sign"))
    signs = altered_by_step[..., 0] / H[:, 0]
    assert torch.equal(altered_by_step, H * signs[..., None])
    assert set(signs.flatten().tolist()) == {-1, 1}
    assert len({tuple(sign.tolist()) for sign in signs}) > 1
