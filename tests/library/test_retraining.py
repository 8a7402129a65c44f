"""Trainings without examples: in stacks they are those alone; what cannot be stacked says so."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
import torch
from problems_zoo import product
from reference import error
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from metapl import MetaplError, attribute
from metapl.attribution import removals
from metapl.attribution.attribute import Attribution
from metapl.attribution.removals import DatamodelingScore, WithWeights, datamodeling_score
from metapl.problems import EqualWeights, NextToken

N = 24
STEPS = 9
SETS = [[1, 2], [5], [7, 8, 9], [20], [0, 3, 11, 13]]
FALLING = {"lr": 0.1 * (1 - torch.arange(STEPS, dtype=torch.float64)[:, None] / STEPS)}


def data(seed: int, rows: int = N) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 6, generator=draw).double()
    return inputs, torch.randint(0, 3, (rows,), generator=draw)


class Stacked(nn.Module):
    """Counts its passes in a buffer, and adds a frozen weight, a shared one and a complex start."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.last = nn.Linear(8, 3)
        self.again = self.last
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        hidden = torch.tanh(self.first(x) + self.frozen)
        outputs: Tensor = self.last(hidden) + self.again(hidden) / self.passes
        return outputs


class Branching(nn.Module):
    """Asks its inputs which way to go, which no transform can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x)
        return outputs if float(outputs.detach().sum()) > 0 else -outputs


def student(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "own":
        return Stacked().double()
    if kind == "branching":
        return Branching().double()
    middle: dict[str, nn.Module] = {
        "mlp": nn.GELU(),
        "batch_norm": nn.BatchNorm1d(8),
        "dropout": nn.Dropout(0.3),
    }
    return nn.Sequential(nn.Linear(6, 8), middle[kind], nn.Tanh(), nn.Linear(8, 3)).double()


def optimizer_of(network: nn.Module, rule: str) -> torch.optim.Optimizer:
    weights = [p for p in network.parameters() if p.requires_grad]
    if rule == "sgd":
        return torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    if rule == "nesterov":
        return torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    if rule == "adamw":
        return torch.optim.AdamW(weights, lr=0.1, eps=1e-3)
    return torch.optim.Adam(weights, lr=0.01, eps=1e-6, amsgrad=True)


def scored(network: nn.Module, rule: str = "sgd", **options: Any) -> Attribution:
    torch.manual_seed(3)
    arguments: dict[str, Any] = {
        "train": data(0),
        "outer": data(1, 5),
        "optimizer": optimizer_of(network, rule),
        "steps": STEPS,
        "batch_size": 8,
        **options,
    }
    return attribute(network, **arguments)


def compare_with_alone(
    attribution: Attribution, sets: list[Any] = SETS, **options: Any
) -> DatamodelingScore:
    """Return the score of trainings in stacks of two at most; they are those alone."""
    alone = attribution.validate(sets, at_once=1)
    stacked = attribution.validate(sets, at_once=2, **options)
    assert alone.execution == "one by one"
    assert stacked.execution.startswith("in stacks of 2")
    assert error(stacked.retrained, alone.retrained) < 1e-6
    assert stacked.spearman == pytest.approx(alone.spearman)
    return stacked


@pytest.mark.parametrize(
    ("kind", "rule", "scheduled", "clip"),
    product(
        ["mlp", "batch_norm", "dropout", "own"],
        ["sgd", "nesterov", "adamw", "adam"],
        [False, True],
        [None, 0.3],
        usual=["batch_norm", "sgd", True, 0.3],
    ),
)
@pytest.mark.filterwarnings("ignore:scores may not say what removals do")
def test_trainings_in_stacks_are_those_alone(
    kind: str, rule: str, scheduled: bool, clip: float | None
) -> None:
    settings = FALLING if scheduled else None
    compare_with_alone(scored(student(kind), rule, settings=settings, clip_norm=clip))


def with_a_bias_before_batch_norm() -> tuple[nn.Sequential, Attribution]:
    """Return a network under Adam, and its scores; rounding moves the bias as far as others."""
    torch.manual_seed(1)
    pictures = torch.randn(60, 1, 6, 6)
    labels = torch.randint(3, (60,))
    layers = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))
    attribution = attribute(
        network,
        (pictures[:40], labels[:40]),
        (pictures[40:], labels[40:]),
        optimizer=torch.optim.AdamW(network.parameters(), lr=0.005),
        steps=10,
        batch_size=10,
        generator=torch.Generator().manual_seed(1),
        progress=False,
    )
    return network, attribution


def test_a_bias_before_batch_norm_is_stacked_under_adam() -> None:
    _, attribution = with_a_bias_before_batch_norm()
    stacked = attribution.validate(SETS, progress=False)
    alone = attribution.validate(SETS, at_once=1, progress=False)
    assert stacked.execution == "in stacks of 6"
    assert alone.execution == "one by one"
    torch.testing.assert_close(stacked.retrained, alone.retrained, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("kind", ["dropout", "batch_norm"])
def test_each_outer_loss_is_that_of_the_training_alone(kind: str) -> None:
    compare_with_alone(scored(student(kind), each=True))


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_sequences_and_tokens_are_removed_in_stacks(per: Any) -> None:
    ids = torch.randint(0, 5, (10, 4), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 5)).double()
    attribution = scored(
        network, train=(ids, ids), outer=(ids[:3], ids[:3]), batch_size=4, problem=NextToken(per)
    )
    sets: list[Any] = [[1], [2, 3], [7]]
    if per == "token":
        is_second = torch.zeros(10, 4, dtype=torch.bool)
        is_second[:, 1] = True
        sets.append(is_second)
    compare_with_alone(attribution, sets)


class Decayed(EqualWeights):
    """A loss that reads the weights of a network which is known from elsewhere."""

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        losses = F.cross_entropy(outputs, batch[1], reduction="none")
        squares = [p.square().sum() for p in PENALIZED[0].parameters()]
        return signal.value * losses + 0.01 * torch.stack(squares).sum()


PENALIZED: list[nn.Module] = []


def test_a_loss_that_reads_the_network_finds_each_training_s_own_weights() -> None:
    network = student("mlp")
    PENALIZED[:] = [network]
    compare_with_alone(scored(network, problem=Decayed()))


def test_a_training_goes_on_from_the_optimizer_s_state_and_moves_nothing() -> None:
    network = student("batch_norm")
    optimizer = optimizer_of(network, "adamw")
    x, y = data(0)
    F.cross_entropy(network(x), y).backward()
    optimizer.step()
    attribution = scored(network, optimizer=optimizer)
    weights = {name: t.clone() for name, t in network.state_dict().items()}
    generator_state = torch.get_rng_state()
    compare_with_alone(attribution)
    assert all(torch.equal(t, weights[name]) for name, t in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator_state)


def test_trainings_without_examples_have_the_rate_of_the_scored_one() -> None:
    network = student("mlp")
    optimizer = optimizer_of(network, "sgd")
    attribution = scored(network, optimizer=optimizer)
    optimizer.param_groups[0]["lr"] = 1e-3
    compare_with_alone(attribution)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "rule"), [("dropout", "sgd"), ("batch_norm", "adamw")])
@pytest.mark.filterwarnings("ignore:scores may not say what removals do")
def test_compiled_stacks_are_trainings_alone(kind: str, rule: str) -> None:
    # Six trainings and the one on all examples are four stacks, of which the last is filled up.
    score = compare_with_alone(scored(student(kind), rule), [*SETS, [2]], compile=True)
    assert score.execution == "in stacks of 2, compiled"


def test_stacks_are_compiled_from_so_many_steps_on(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def captured(function: Any, device: torch.device, sources: object) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(removals, "Captured", captured)
    attribution = scored(student("mlp"))
    monkeypatch.setattr(removals, "COMPILED_FROM", 5 * STEPS + 1)
    assert attribution.validate(SETS).execution == "in stacks of 6"
    assert not compiled
    monkeypatch.setattr(removals, "COMPILED_FROM", 5 * STEPS)
    assert attribution.validate(SETS).execution == "in stacks of 6, compiled"
    assert attribution.validate(SETS, compile=False).execution == "in stacks of 6"
    assert len(compiled) == 1


def test_what_cannot_be_compiled_is_stacked_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def captured(function: Any, device: torch.device, sources: object) -> Any:
        def refuse(*arguments: Any) -> Any:
            raise RuntimeError("no compiler here")

        return refuse

    monkeypatch.setattr(removals, "Captured", captured)
    monkeypatch.setattr(removals, "COMPILED_FROM", 1)
    attribution = scored(student("mlp"))
    assert attribution.validate(SETS).execution == "in stacks of 6, not compiled: no compiler here"
    with pytest.raises(MetaplError, match="compiled in stacks: no compiler here; leave compile"):
        attribution.validate(SETS, compile=True)


def test_what_cannot_be_stacked_is_trained_alone_and_says_so() -> None:
    attribution = scored(student("branching"))
    alone = attribution.validate(SETS, at_once=1)
    with pytest.warns(UserWarning, match="cannot be stacked, and are taken one by one: .*vmap"):
        score = attribution.validate(SETS)
    assert torch.equal(score.retrained, alone.retrained)
    assert score.execution.startswith("one by one: ")
    with pytest.raises(MetaplError, match="cannot be compiled in stacks: .*; leave compile out"):
        attribution.validate(SETS, compile=True)
    with pytest.raises(MetaplError, match="at_once is 1"):
        attribution.validate(SETS, compile=True, at_once=1)

    network = student("mlp").float()
    with torch.autocast("cpu", torch.bfloat16):
        attribution = scored(network, train=in_type(torch.float32), outer=in_type(torch.float32))
    with pytest.warns(UserWarning, match="the training is under autocast"):
        attribution.validate(SETS)
    half = in_type(torch.bfloat16)
    attribution = scored(student("mlp").bfloat16(), train=half, outer=half)
    with pytest.warns(UserWarning, match="weights in half precision"):
        attribution.validate(SETS)


def in_type(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = data(0)
    return x.to(dtype), y


def test_a_stack_that_leads_elsewhere_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a removed example leaves its batch's size too, which is another training."""

    class ByTheRest(WithWeights):
        def signal(self, teacher: Any, batch: Any, *outputs: Any, **options: Any) -> Any:
            weights, rest = batch
            of_rest = weights * len(weights) / weights.sum()
            return super().signal(teacher, (of_rest, rest), *outputs, **options)

    # Single trainings have the problem by a name of their own.
    monkeypatch.setattr(removals, "WithWeights", ByTheRest)
    attribution = scored(student("mlp"))
    # The first batches of the training have to lose an example.
    first = [[int(number)] for number in attribution.order[0][:3]]
    with pytest.warns(UserWarning, match="2 steps in a stack lead elsewhere than alone"):
        assert attribution.validate(first).execution.startswith("one by one")


def test_rounding_of_one_weight_excuses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a stack whose last layer moves otherwise, beside a bias that rounding moves."""
    network, attribution = with_a_bias_before_batch_norm()
    take = removals.StackedTrainings._take

    def taken_elsewhere(*arguments: Any, **options: Any) -> Any:
        losses, members = take(*arguments, **options)
        weight = members.params["5.weight"]
        way = weight - network[5].weight.detach()
        params = {**members.params, "5.weight": weight + 0.05 * way}
        return losses, members._replace(params=params)

    monkeypatch.setattr(removals.StackedTrainings, "_take", taken_elsewhere)
    with pytest.warns(UserWarning, match="2 steps in a stack lead elsewhere than alone"):
        assert attribution.validate(SETS, progress=False).execution.startswith("one by one")


class LayerDrop(nn.Module):
    """Leaves a layer out at random, by a number that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.middle = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if not self.training or float(torch.rand(())) < 0.45:
            hidden = hidden + torch.tanh(self.middle(hidden))
        outputs: Tensor = self.last(hidden)
        return outputs


def test_a_network_that_reads_a_number_is_trained_one_by_one() -> None:
    torch.manual_seed(0)
    attribution = scored(LayerDrop().double(), "adamw")
    alone = attribution.validate(SETS, at_once=1)
    with pytest.warns(UserWarning, match="cannot be stacked.* reads the value of a tensor"):
        score = attribution.validate(SETS)
    assert score.execution.startswith("one by one")
    assert torch.equal(score.retrained, alone.retrained)
    with pytest.raises(MetaplError, match="cannot be compiled in stacks"):
        attribution.validate(SETS, compile=True)


def test_a_stack_whose_later_steps_lead_elsewhere_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: whole trainings end elsewhere, and the first steps that are compared do not."""
    losses = removals.StackedTrainings.losses

    def losses_elsewhere(*arguments: Any, **options: Any) -> Tensor:
        return 1.01 * losses(*arguments, **options)

    monkeypatch.setattr(removals.StackedTrainings, "losses", losses_elsewhere)
    attribution = scored(student("mlp"))
    alone = attribution.validate(SETS, at_once=1)
    with pytest.warns(UserWarning, match="on all examples ends at an outer loss of .* in a stack"):
        score = attribution.validate(SETS)
    assert score.execution.startswith("one by one: the training on all examples")
    assert torch.equal(score.retrained, alone.retrained)


def test_nothing_may_be_removed() -> None:
    attribution = scored(student("mlp"))
    assert attribution.predict([]) == 0
    score = attribution.validate([[], [0], [1, 2]])
    assert abs(score.retrained[0]) < 1e-12
    assert score.retrained[1] != 0


def test_stacks_are_as_large_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    network = student("mlp")
    weights = sum(p.nbytes for p in network.parameters())
    attribution = scored(network)
    monkeypatch.setattr(removals, "free_bytes", lambda device: 2 * 6 * weights * 3)
    assert attribution.validate(SETS).execution == "in stacks of 3"
    monkeypatch.setattr(removals, "free_bytes", lambda device: 2 * 6 * weights)
    with pytest.warns(UserWarning, match="holds no two of them"):
        attribution.validate(SETS)


@pytest.mark.parametrize("each", [False, True])
def test_the_query_loss_difference_is_a_training_without_the_highest_scores(each: bool) -> None:
    attribution = scored(student("mlp"), each=each)
    score = attribution.validate(SETS, top=0.1)
    # A tenth of 24 examples is two.
    if each:
        changes = []
        for number, scores in enumerate(attribution.scores):
            highest = scores.argsort(descending=True)[:2]
            retrained = attribution.validate([highest, [0], [1]], at_once=1).retrained
            changes.append(float(retrained[0, number]))
        low, high = score.qld_interval or (0.0, 0.0)
        assert low < numpy.mean(changes) < high
    else:
        highest = attribution.scores.argsort(descending=True)[:2]
        retrained = attribution.validate([highest, [0], [1]], at_once=1).retrained
        changes = [float(retrained[0])]
        assert score.qld_interval is None
    assert score.qld == pytest.approx(numpy.mean(changes), rel=1e-6)
    assert score.retrained.shape[0] == len(SETS)
    assert attribution.validate(SETS).qld is None


@pytest.mark.parametrize("top", [0.0, -0.1, 1.0, 2.0])
def test_a_share_of_the_highest_scores_is_below_one(top: float) -> None:
    with pytest.raises(MetaplError, match="top"):
        scored(student("mlp")).validate(SETS, top=top)


def test_the_correlations_are_scipys() -> None:
    draw = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 6, (20, 3), generator=draw).double()
    retrained = predicted + torch.randint(0, 6, (20, 3), generator=draw)
    score = datamodeling_score(predicted, retrained)
    pairs = [*zip(predicted.T.numpy(), retrained.T.numpy(), strict=True)]
    spearman = numpy.mean([stats.spearmanr(*pair)[0] for pair in pairs])
    pearson = numpy.mean([stats.pearsonr(*pair)[0] for pair in pairs])
    assert score.spearman == pytest.approx(spearman)
    assert score.pearson == pytest.approx(pearson)
    low, high = score.interval
    assert low < spearman < high


def test_the_interval_is_that_of_scipys_bootstrap() -> None:
    """Of one outer loss, where only removals are drawn."""
    random = numpy.random.default_rng(1)
    predicted = random.normal(size=60)
    retrained = predicted + random.normal(size=60)
    expected = stats.bootstrap(
        (predicted, retrained),
        lambda a, b: stats.spearmanr(a, b)[0],
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        random_state=0,
    ).confidence_interval
    score = datamodeling_score(torch.tensor(predicted), torch.tensor(retrained))
    for end, expected_end in zip(score.interval, expected, strict=True):
        assert end == pytest.approx(expected_end, abs=0.03)


def test_an_interval_of_equal_numbers_is_not_a_number() -> None:
    score = datamodeling_score(torch.zeros(4), torch.arange(4.0))
    assert all(map(numpy.isnan, itertools.chain([score.spearman], score.interval)))
