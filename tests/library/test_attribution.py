"""What each training example did.

Against double backward by hand, and against trainings without the examples.
"""

from __future__ import annotations

import copy
import csv
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import reference
import safetensors.torch
import torch
import torchopt
from captures import as_functions, without_inductor
from problems_zoo import product
from reference import error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import metapl
from metapl import MetaplError, attribute, metasmoothness
from metapl.attribution import attribute as attribute_file
from metapl.attribution.attribute import Attribution, Metasmoothness
from metapl.execution.state import RandomState, replayed
from metapl.functional.graphs import _CACHE
from metapl.problems import EqualWeights, NextToken

N = 24
STEPS = 9


def data(seed: int, rows: int = N) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 6, generator=draw).double()
    return inputs, torch.randint(0, 3, (rows,), generator=draw)


# A rate of 0.1 that falls to 0 in a line.
FALLING = {"lr": 0.1 * (1 - torch.arange(STEPS, dtype=torch.float64)[:, None] / STEPS)}
TRAIN = data(0)
OUTER = data(1, 5)


def student(kind: str = "mlp") -> nn.Module:
    torch.manual_seed(0)
    middle = {"mlp": nn.GELU(), "batch_norm": nn.BatchNorm1d(8), "dropout": nn.Dropout(0.3)}[kind]
    return nn.Sequential(nn.Linear(6, 8), middle, nn.Tanh(), nn.Linear(8, 3)).double()


def optimizer_of(network: nn.Module, rule: str) -> torch.optim.Optimizer:
    if rule == "sgd":
        return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.AdamW(network.parameters(), lr=0.1, eps=1e-3)


def scored(network: nn.Module, rule: str = "sgd", **options: Any) -> Attribution:
    """Return the attribution of a training of nine steps, but for what the options say."""
    torch.manual_seed(3)
    arguments: dict[str, Any] = {
        "train": TRAIN,
        "outer": OUTER,
        "optimizer": optimizer_of(network, rule),
        "steps": STEPS,
        "batch_size": 8,
        "smoothing": 0.0,
        **options,
    }
    return attribute(network, **arguments)


def by_hand(
    network: nn.Module,
    order: Tensor,
    optimizer: str,
    factor: Callable[[int], float],
    clip: float = 1e9,
) -> tuple[Tensor, Tensor]:
    """Return −dL/dw by double backward through the training, and the losses L_j.

    Dropout has the masks of the training that is scored.
    """
    w = torch.ones(N, dtype=torch.float64, requires_grad=True)
    theta = reference.weights(network)
    state = None
    torch.manual_seed(3)
    for step, chosen in enumerate(order):
        z = reference.outputs_at(network, theta, TRAIN[0][chosen])
        loss = (w[chosen] * F.cross_entropy(z, TRAIN[1][chosen], reduction="none")).mean()
        lr = 0.1 * factor(step)
        rule = reference.sgd(lr, 0.9)
        if optimizer == "adamw":
            rule = reference.adamw(lr=lr, eps=1e-3, weight_decay=0.01)
        theta, state = reference.stepped(loss, theta, reference.clipped(clip, rule), state)
    losses = F.cross_entropy(
        reference.outputs_at(network, theta, OUTER[0]), OUTER[1], reduction="none"
    )
    rows = [torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses]
    return -torch.stack(rows), losses.detach()


@pytest.mark.parametrize(
    ("kind", "optimizer", "scheduled", "clip"),
    product(
        ["mlp", "batch_norm"],
        ["sgd", "adamw"],
        [False, True],
        [None, 0.3],
        usual=["mlp", "sgd", True, 0.3],
    ),
)
@pytest.mark.filterwarnings("ignore:scores may not say what removals do")
def test_the_scores_are_the_derivatives(
    kind: str, optimizer: str, scheduled: bool, clip: float | None
) -> None:
    network = student(kind)
    state_before = copy.deepcopy(network.state_dict())
    settings = FALLING if scheduled else None
    attribution = scored(network, optimizer, settings=settings, clip_norm=clip)

    def factor(step: int) -> float:
        return 1 - step / STEPS if scheduled else 1.0

    exact, losses = by_hand(
        copy.deepcopy(network), attribution.order, optimizer, factor, clip or 1e9
    )
    assert error(attribution.scores, exact.mean(0)) < 1e-7
    assert error(attribution.outer_loss, losses.mean()) < 1e-10
    assert all(torch.equal(t, state_before[name]) for name, t in network.state_dict().items())


def test_the_scores_of_each_outer_example_are_the_derivatives() -> None:
    """A batch norm in train mode has the statistics of all outer examples, as for their mean."""
    network = student("batch_norm")
    attribution = scored(network, each=True)
    exact, losses = by_hand(copy.deepcopy(network), attribution.order, "sgd", lambda _: 1.0)
    assert error(attribution.scores, exact) < 1e-7
    assert error(attribution.outer_loss, losses) < 1e-10
    sets = [[1, 2], [5], [7, 8, 9]]
    of_all = scored(network).validate(sets).retrained
    assert error(attribution.validate(sets).retrained.mean(1), of_all) < 1e-10


class Causal(nn.Module):
    """Logits of the next token, from the mean of those so far."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(5, 6).double()
        self.last = nn.Linear(6, 5).double()

    def forward(self, ids: Tensor) -> Tensor:
        counts = torch.arange(1, ids.shape[1] + 1, dtype=torch.float64)[:, None]
        logits: Tensor = self.last(torch.tanh(self.words(ids).cumsum(1) / counts))
        return logits


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(
    "road", ["eager", "by two graphs", pytest.param("captured", marks=pytest.mark.long)]
)
def test_the_scores_of_tokens_are_the_derivatives(
    each: bool, road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if road == "by two graphs":
        as_functions(monkeypatch)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (6, 4), generator=draw)
    judged = torch.randint(0, 5, (3, 4), generator=draw)
    labels = ids.clone()
    # One sequence is padded, and one is empty.
    labels[0, 2:] = -100
    labels[4] = -100
    network = Causal()
    options: dict[str, Any] = {
        "train": (ids, labels),
        "outer": (judged, judged),
        "steps": 5,
        "batch_size": 4,
        "each": each,
        "compile": road != "eager",
    }
    attribution = scored(network, problem=NextToken(per="token"), **options)

    def losses(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Return the losses of tokens, (B, T), with 0 for the first of each sequence."""
        z = functional_call(network, params, (x,))
        of_token = F.cross_entropy(z[:, :-1].mT, y[:, 1:], reduction="none", ignore_index=-100)
        return torch.cat([torch.zeros(len(x), 1).double(), of_token], 1)

    def judged_after(w: Tensor) -> Tensor:
        """Return the outer losses after a training by SGD with momentum."""
        params = reference.weights(network)
        state = None
        for chosen in attribution.order:
            of_tokens = w[chosen] * losses(params, ids[chosen], labels[chosen])
            loss = (of_tokens.sum(1) / (labels[chosen, 1:] != -100).sum(1).clamp_min(1)).mean()
            params, state = reference.stepped(loss, params, reference.sgd(0.1, 0.9), state)
        of_outer = losses(params, judged, judged)[:, 1:].mean(1)
        return of_outer if each else of_outer.mean()

    exact = -torch.autograd.functional.jacobian(judged_after, torch.ones(6, 4).double())
    assert attribution.scores.shape == ((3, 6, 4) if each else (6, 4))
    assert error(attribution.scores, exact) < 1e-7
    if road != "eager":
        return
    of_sequences = scored(Causal(), problem=NextToken(), **options)
    assert error(attribution.scores.sum(-1), of_sequences.scores) < 1e-10
    assert attribution.top(3)[0].tolist() == of_sequences.top(3)[0].tolist()
    assert error(attribution.predict([1, 3]), of_sequences.predict([1, 3])) < 1e-10

    # Without some sequences, and without one token of each.
    is_third = torch.zeros(6, 4, dtype=torch.bool)
    is_third[:, 2] = True
    with pytest.raises(MetaplError, match="count=-1; expected 0 or more"):
        attribution.top(-1)
    with pytest.raises(MetaplError, match="given 1 sets of examples; expected three or more"):
        attribution.validate([[1, 3]])
    agreement = attribution.validate([[1, 3], [2], is_third])
    retrained = of_sequences.validate([[1, 3], [2], [5]]).retrained
    assert error(agreement.retrained[:2], retrained[:2]) < 1e-10
    without_third = judged_after(1.0 - is_third.double()) - attribution.outer_loss
    assert error(agreement.retrained[2], without_third) < 1e-10
    assert error(agreement.predicted[2], exact[..., 2].sum(-1)) < 1e-7

    smoothness = [
        metasmoothness(
            network,
            (ids, labels),
            (judged, judged),
            problem=problem,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            steps=5,
            batch_size=4,
        )
        for problem in (NextToken(), NextToken(per="token"))
    ]
    assert smoothness[0].agreement == pytest.approx(smoothness[1].agreement)


def test_every_example_is_drawn_once_a_pass_and_the_order_is_the_generators() -> None:
    order = scored(student()).order
    assert order.shape == (STEPS, 8)
    assert sorted(order[:3].flatten().tolist()) == list(range(N))
    assert torch.equal(order, scored(student(), generator=torch.Generator().manual_seed(0)).order)
    assert not torch.equal(
        order, scored(student(), generator=torch.Generator().manual_seed(1)).order
    )


def trained(
    network: nn.Module,
    order: Tensor,
    w: Tensor,
    rate: Callable[[int], float],
    clip: float | None = None,
) -> tuple[nn.Module, Tensor]:
    """Return the network and its outer loss after a plain loop on weighted examples."""
    plain = copy.deepcopy(network)
    optimizer = torch.optim.SGD(plain.parameters(), momentum=0.9)
    torch.manual_seed(3)
    for step, chosen in enumerate(order):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        outputs = plain(TRAIN[0][chosen])
        losses = F.cross_entropy(outputs, TRAIN[1][chosen], reduction="none")
        (w[chosen] * losses).mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), clip or torch.inf)
        optimizer.step()
    with torch.no_grad(), replayed(RandomState.now(torch.device("cpu")).branch()):
        return plain, F.cross_entropy(plain(OUTER[0]), OUTER[1])


@pytest.mark.parametrize(
    ("kind", "clip"), [("mlp", None), ("mlp", 0.3), ("dropout", None), ("batch_norm", None)]
)
def test_trainings_without_examples_are_those_of_a_plain_loop(
    kind: str, clip: float | None
) -> None:
    network = student(kind)
    attribution = scored(network, settings=FALLING, clip_norm=clip)
    sets = [[1, 2], [5], [7, 8, 9]]
    agreement = attribution.validate(sets)

    def loss_without(removed: list[int]) -> Tensor:
        weights = torch.ones(N, dtype=torch.float64)
        weights[removed] = 0.0
        _, loss = trained(
            network, attribution.order, weights, rate=lambda k: 0.1 * (1 - k / STEPS), clip=clip
        )
        return loss

    loss_with_all = loss_without([])
    changes = torch.stack([loss_without(removed) - loss_with_all for removed in sets])
    predicted = torch.stack([attribution.predict(removed) for removed in sets])
    assert error(attribution.outer_loss, loss_with_all) < 1e-12
    assert error(agreement.retrained, changes) < 1e-10
    assert error(agreement.predicted, predicted) < 1e-12


def test_metasmoothness_is_its_definition_and_falls_with_the_rate() -> None:
    v = torch.linspace(-1, 1, N, dtype=torch.float64)
    order = scored(student(), steps=30).order

    def smoothness(rate: float, direction: Tensor) -> Metasmoothness:
        network = student()
        return metasmoothness(
            network,
            TRAIN,
            OUTER,
            optimizer=torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9),
            steps=30,
            batch_size=8,
            step=0.2,
            direction=direction,
        )

    def by_definition(rate: float) -> tuple[float, Tensor]:
        weights: list[Tensor] = []
        losses: list[Tensor] = []
        for h in (0.0, 0.2, 0.4):
            network, loss = trained(student(), order, 1 + h * v, rate=lambda _: rate)
            weights.append(nn.utils.parameters_to_vector(network.parameters()).detach())
            losses.append(loss)
        theta_0, theta_h, theta_2h = weights
        moved = (theta_2h - theta_0).abs()
        signs = torch.sign(theta_h - theta_0) * torch.sign(theta_2h - theta_h)
        return float((moved / moved.sum() * signs).sum()), torch.stack(losses)

    agreements: dict[float, float] = {}
    for rate in (0.02, 2.0):
        result = smoothness(rate, v)
        agreement, losses = by_definition(rate)
        assert result.agreement == pytest.approx(agreement, abs=1e-12)
        assert error(result.outer_loss, losses) < 1e-10
        agreements[rate] = result.agreement
    assert agreements[0.02] > 0.99
    assert agreements[2.0] < 0.6
    with pytest.raises(MetaplError):
        smoothness(2.0, 0 * v)


def test_a_rough_training_is_told_before_it_is_differentiated() -> None:
    def scores(rate: float, dtype: torch.dtype) -> Tensor:
        network = student().to(dtype)
        return attribute(
            network,
            (TRAIN[0].to(dtype), TRAIN[1]),
            (OUTER[0].to(dtype), OUTER[1]),
            optimizer=torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9),
            steps=100,
            batch_size=8,
        ).scores

    for rate, dtype in ((2.0, torch.float32), (0.02, torch.bfloat16)):
        tells_more = pytest.warns(match="below 0") if rate == 2.0 else nullcontext()
        with tells_more, pytest.warns(UserWarning, match="metasmoothness"):
            scores(rate, dtype)
    # Of a smooth training there is no warning, which would be an error here.
    scores(0.02, torch.float32)


@pytest.mark.parametrize(("kind", "rate"), [("mlp", 0.5), ("dropout", 0.5), ("tokens", 3.0)])
@pytest.mark.parametrize("each", [False, True])
def test_compiled_steps_see_the_roughness_of_the_training_itself(
    kind: str, rate: float, each: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take it by the graphs of the scores, of which there are no others."""
    monkeypatch.setattr(attribute_file, "SMOOTH", 2.0)
    graphs = without_inductor(monkeypatch)
    _CACHE.clear()
    ids = torch.randint(0, 5, (N, 4), generator=torch.Generator().manual_seed(0))
    texts: list[str] = []
    for compiles in (False, True):
        network = Causal() if kind == "tokens" else student(kind)
        options: dict[str, Any] = {}
        if kind == "tokens":
            options = {"train": (ids, ids), "outer": (ids[:3], ids[:3]), "problem": NextToken()}
        options["optimizer"] = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            scored(network, steps=100, each=each, compile=compiles, **options)
        assert Path(told[0].filename) == Path(__file__)
        texts.append(str(told[0].message))
    assert texts[0] == texts[1]
    assert "metasmoothness of the first 10 of 100 steps is 0." in texts[0]
    assert len(graphs) == 2


def test_compiled_steps_name_the_rows_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is seen some steps later."""
    without_inductor(monkeypatch)
    inputs, labels = data(0, 400)
    inputs[300] = torch.nan
    options: dict[str, Any] = {"train": (inputs, labels), "steps": 50, "compile": True}
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).view(50, 8)
    step = int((order == 300).any(1).nonzero())
    with pytest.raises(MetaplError, match=rf"inner\[{step}\]\[0\]: 1 of 8 rows has NaN"):
        scored(student(), **options)


class Scaled(EqualWeights):
    """An outer loss of one's own, which may be below zero."""

    def outer_loss(self, outputs: Any, batch: Any) -> Tensor:
        return super().outer_loss(outputs, batch) - 1


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", ["attribute", "record"])
def test_scores_that_predict_a_loss_below_zero_are_told(
    kind: str, each: bool, tmp_path: Path
) -> None:
    """A momentum of 0.9 makes what a removal does grow beyond any loss."""
    network = student()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9)
    torch.manual_seed(3)
    loop = copy.deepcopy((network, optimizer))

    def attributed() -> Attribution:
        if kind == "attribute":
            options: dict[str, Any] = {"steps": 30, "batch_size": 8, "each": each}
            return attribute(network, TRAIN, TRAIN, optimizer=optimizer, **options)
        model, its_optimizer = loop
        with metapl.record(model, its_optimizer, out=tmp_path / "r", train=TRAIN) as recording:
            draw = torch.Generator().manual_seed(0)
            for _ in range(30):
                rows = torch.randperm(N, generator=draw)[:8]
                its_optimizer.zero_grad()
                F.cross_entropy(model(TRAIN[0][rows]), TRAIN[1][rows]).backward()
                its_optimizer.step()
        return recording.attribute(TRAIN, each=each, progress=False)

    with pytest.warns(UserWarning, match=r"would be -.* without the 2 most harmful .* below 0"):
        found = attributed()
    harm = found.predict(found.top(2)[1]).mean()
    assert harm < -found.outer_loss.mean()


def test_a_loss_that_may_be_below_zero_is_not_judged_by_it() -> None:
    network = student()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9)
    options: dict[str, Any] = {"steps": 30, "batch_size": 8, "problem": Scaled()}
    # It is judged by how much it has changed.
    with pytest.warns(UserWarning, match=r"do: their sizes add up to 86\.\d, and the outer loss"):
        found = attribute(network, TRAIN, TRAIN, optimizer=optimizer, **options)
    assert found.predict(found.top(2)[1]) < -found.outer_loss - 1


def test_arrays_and_data_sets_are_taken_as_tensors_are() -> None:
    expected = scored(student()).scores
    x, y = TRAIN
    for train in ((x.numpy(), y.numpy()), TensorDataset(x, y), [(x[i], y[i]) for i in range(N)]):
        scores = scored(student(), train=train, outer=TensorDataset(*OUTER)).scores
        assert torch.equal(scores, expected)


@pytest.mark.parametrize("case", ["bfloat16", "autocast", "outer_batch", "a graph in a module"])
def test_a_training_with_all_examples_is_the_one_that_was_differentiated(case: str) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    train, outer = ((x.to(dtype), y) for x, y in (TRAIN, OUTER))
    if case == "a graph in a module":
        network.graph = network(train[0])
    problem = Named() if case == "outer_batch" else EqualWeights()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        attribution = scored(network, train=train, outer=outer, problem=problem)
    loss_with_all = attribution._losses_with(torch.ones(N))
    assert attribution.scores.dtype == torch.float32
    assert error(loss_with_all, attribution.outer_loss) < 1e-6


class Named(EqualWeights):
    """A problem whose outer batch is a dict."""

    def outer_batch(self, batch: Any) -> Any:
        return {"x": batch[0], "y": batch[1]}

    def outer_input(self, batch: Any) -> Any:
        return batch["x"]

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch["y"])


class Twice(EqualWeights):
    def signal(
        self, teacher: Any, batch: Any, student_outputs: Tensor, *, generator: Any
    ) -> metapl.Signal:
        return metapl.Signal(2 * student_outputs.new_ones(len(student_outputs)))


def test_what_helps_most_and_what_is_saved(tmp_path: Path) -> None:
    attribution = scored(student())
    helpful, harmful = attribution.top(3)
    assert attribution.scores[helpful[0]] == attribution.scores.max()
    assert attribution.scores[harmful[0]] == attribution.scores.min()
    with pytest.raises(MetaplError, match=r"format of safetensors; .* such as scores\.safetensors"):
        attribution.save(tmp_path / "made" / "scores.pt")
    assert not [*tmp_path.iterdir()]
    attribution.save(tmp_path / "made" / "scores.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "made" / "scores.safetensors")
    assert torch.equal(saved["scores"], attribution.scores)
    assert torch.equal(saved["order"], attribution.order)
    weights = {f"student_params/{name}": t for name, t in attribution.student_params.items()}
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    assert {*saved} == {"scores", "order", "outer_loss", *weights}
    assert "24" in repr(attribution)


def test_scores_are_a_table_in_csv_without_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    found = scored(student(), each=True)
    scores = found.scores.mean(0)
    file = tmp_path / "made" / "scores.csv"
    found.save_table(file, rate=0.5)
    rows = [*csv.DictReader(file.read_text().splitlines())]
    assert [*rows[0]] == ["example", "score", "weight", "draws"]
    assert [int(row["example"]) for row in rows] == [*range(N)]
    assert [float(row["score"]) for row in rows] == scores.tolist()
    drawn = found.order.flatten().tolist()
    assert [int(row["draws"]) for row in rows] == [drawn.count(number) for number in range(N)]
    weights = (1 + 0.5 * scores / scores.square().mean().sqrt()).clamp_min(0)
    weights = weights / weights.mean()
    assert [float(row["weight"]) for row in rows] == pytest.approx(weights.tolist(), rel=1e-12)
    assert found.weights(rate=0.5).tolist() == pytest.approx(weights.tolist(), rel=1e-12)
    with pytest.raises(MetaplError, match="pyarrow"):
        found.save_table(tmp_path / "scores.parquet")
    with pytest.raises(MetaplError, match=r"expected a name\.csv or name\.parquet"):
        found.save_table(tmp_path / "scores.txt")
    with pytest.raises(MetaplError, match="rate=0: expected a number > 0"):
        found.weights(rate=0)


class Noisy(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.rand((), dtype=x.dtype), y


X, Y = TRAIN
OTHER_NETWORK = nn.Linear(2, 2)
OF_ANOTHER_NETWORK = torch.optim.SGD(OTHER_NETWORK.parameters(), lr=0.1)
REFUSED: dict[str, dict[str, Any]] = {
    "inputs alone": {"train": X},
    "unequal rows": {"train": (X, Y[:3])},
    "a later NaN": {"train": (X.index_fill(0, torch.tensor([20]), torch.nan), Y)},
    "an infinite outer input": {"outer": (X * torch.inf, Y)},
    "labels that are no classes": {"train": (X, Y + 3)},
    "a class of schedulers": {"settings": torch.optim.lr_scheduler.CosineAnnealingLR},
    "a clip": {"clip_norm": 0.0},
    "weights that are not 1": {"problem": Twice()},
    "views that differ in a few steps": {"train": Noisy(X, Y), "steps": 3},
    "views that differ": {
        "train": Noisy(X, Y),
        "steps": 60,
        "mode": metapl.feedback.Forward(keep_every=8),
    },
    "another network's optimizer": {"optimizer": OF_ANOTHER_NETWORK},
    "a function": {"settings": lambda step: 1.0},
    "settings of fewer steps": {"settings": {"lr": FALLING["lr"][1:]}},
    "a rate that diverges": {
        "settings": {"lr": torch.full((9, 1), 1e307, dtype=torch.float64)},
        "steps": 9,
    },
}


@pytest.mark.parametrize("optimizer", [torchopt.sgd(0.1), "sgd", None])
def test_what_is_no_optimizer_of_torch_is_refused(optimizer: Any) -> None:
    for ask in (attribute, metasmoothness, metapl.reliability):
        with pytest.raises(MetaplError, match=r"^optimizer is .*; expected SGD, Adam, AdamW"):
            ask(student(), (X, Y), outer=(X, Y), optimizer=optimizer, steps=2, batch_size=4)


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_data_are_refused(case: str) -> None:
    with pytest.raises(MetaplError):
        scored(student(), "sgd", **REFUSED[case])


class ShortEmbeddings(nn.Module):
    """Embeddings that the forward shortens where they are too long."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, max_norm=0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).mean(1))


class ByData(nn.Linear):
    """A layer whose forward shrinks its weights past autograd and past their versions."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = 0.99 * self.weight.data
        return super().forward(x)


@pytest.mark.parametrize(
    ("network", "inputs", "name"),
    [
        (ShortEmbeddings, torch.arange(5 * N).view(N, 5) % 20, "embed.weight"),
        (lambda: nn.Sequential(ByData(6, 3)), TRAIN[0].float(), "0.weight"),
    ],
)
def test_a_forward_that_writes_to_weights_is_refused(
    network: Callable[[], nn.Module], inputs: Tensor, name: str
) -> None:
    torch.manual_seed(0)
    student = network()
    weights_before = [p.detach().clone() for p in student.parameters()]
    examples = inputs, TRAIN[1]
    with pytest.raises(MetaplError, match=f"writes to {name}"):
        scored(student, train=examples, outer=examples)
    for p, weight in zip(student.parameters(), weights_before, strict=True):
        assert torch.equal(p, weight)


def test_buffers_that_passes_move_and_read_are_warned_of() -> None:
    """Spectral norm's vectors are; running statistics are not, where the batch's own count."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
    network = nn.Sequential(layer, nn.GELU(), nn.Linear(8, 3)).double()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scored(network)
    texts = " ".join(str(warning.message) for warning in seen)
    assert "_v, which its passes move" in texts
    assert "off the loss after real steps" in texts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored(student("batch_norm"))
