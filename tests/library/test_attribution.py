"""What each training example did.

Against double backward by hand, and against trainings without the examples.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from problems_zoo import product
from reference import error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import metapl
from metapl import MetaplError, attribute, metasmoothness
from metapl.execution.state import RandomState, replayed
from metapl.problems import EqualWeights, NextToken
from metapl.training.attribution import Attribution

N, STEPS = 24, 9


def data(seed: int, rows: int = N) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=draw).double(), torch.randint(
        0, 3, (rows,), generator=draw
    )


TRAIN, OUTER = data(0), data(1, 5)


def student(kind: str = "mlp") -> nn.Module:
    torch.manual_seed(0)
    middle = {"mlp": nn.GELU(), "batch_norm": nn.BatchNorm1d(8), "dropout": nn.Dropout(0.3)}[kind]
    return nn.Sequential(nn.Linear(6, 8), middle, nn.Tanh(), nn.Linear(8, 3)).double()


def found(network: nn.Module, by: str = "sgd", **options: Any) -> Attribution:
    torch.manual_seed(3)
    make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[by]
    how = {"momentum": 0.9} if by == "sgd" else {"eps": 1e-3}
    inner = make(network.parameters(), lr=0.1, **how)
    given = {"train": TRAIN, "outer": OUTER, "steps": STEPS, "batch_size": 8, **options}
    return attribute(network, **{"optimizer": inner, **given})


def by_hand(
    network: nn.Module,
    order: Tensor,
    optimizer: str,
    factor: Callable[[int], float],
    clip: float = 1e9,
) -> tuple[Tensor, Tensor]:
    """−dL/dw by double backward through the training, and the losses L_j.

    Dropout from the same masks.
    """
    w, theta, state = (
        torch.ones(N, dtype=torch.float64, requires_grad=True),
        reference.weights(network),
        None,
    )
    torch.manual_seed(3)
    for step, chosen in enumerate(order):
        z, lr = reference.at(network, theta, TRAIN[0][chosen]), 0.1 * factor(step)
        loss = (w[chosen] * F.cross_entropy(z, TRAIN[1][chosen], reduction="none")).mean()
        rule = (
            reference.sgd(lr, 0.9)
            if optimizer == "sgd"
            else reference.adamw(lr=lr, eps=1e-3, weight_decay=0.01)
        )
        theta, state = reference.stepped(loss, theta, reference.clipped(clip, rule), state)
    losses = F.cross_entropy(reference.at(network, theta, OUTER[0]), OUTER[1], reduction="none")
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
def test_the_scores_are_the_derivatives(
    kind: str, optimizer: str, scheduled: bool, clip: float | None
) -> None:
    network = student(kind)
    before = copy.deepcopy(network.state_dict())
    schedule = (lambda k: 1 - k / STEPS) if scheduled else None
    attribution = found(network, optimizer, schedule=schedule, clip_norm=clip)
    factor = schedule or (lambda _: 1.0)
    exact, losses = by_hand(
        copy.deepcopy(network), attribution.order, optimizer, factor, clip or 1e9
    )
    assert error(attribution.scores, exact.mean(0)) < 1e-7
    assert error(attribution.outer_loss, losses.mean()) < 1e-10
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_of_each_outer_example() -> None:
    """A batch norm in train mode has the statistics of all outer examples.

    So it is in the outer loss of all of them.
    """
    network = student("batch_norm")
    attribution = found(network, each=True)
    exact, losses = by_hand(copy.deepcopy(network), attribution.order, "sgd", lambda _: 1.0)
    assert error(attribution.scores, exact) < 1e-7
    assert error(attribution.outer_loss, losses) < 1e-10
    sets = [[1, 2], [5], [7, 8, 9]]
    of_all = found(network).validate(sets).retrained
    assert error(attribution.validate(sets).retrained.mean(1), of_all) < 1e-10


class Causal(nn.Module):
    """Logits of the next token, from the mean of those so far."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(5, 6).double(), nn.Linear(6, 5).double()

    def forward(self, ids: Tensor) -> Tensor:
        counts = torch.arange(1, ids.shape[1] + 1, dtype=torch.float64)[:, None]
        logits: Tensor = self.last(torch.tanh(self.words(ids).cumsum(1) / counts))
        return logits


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(
    "how", ["eager", "by two graphs", pytest.param("captured", marks=pytest.mark.long)]
)
def test_the_scores_of_tokens_are_the_derivatives(
    each: bool, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "by two graphs":
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    draw = torch.Generator().manual_seed(0)
    ids, judged = (torch.randint(0, 5, (rows, 4), generator=draw) for rows in (6, 3))
    labels = ids.clone()
    labels[0, 2:] = labels[4] = -100  # padded, and empty
    network = Causal()
    given: dict[str, Any] = {
        "train": (ids, labels),
        "outer": (judged, judged),
        "steps": 5,
        "batch_size": 4,
    }
    given |= {"each": each, "compile": how != "eager"}
    attribution = found(network, problem=NextToken(per="token"), **given)

    def losses(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """(B, T): of each token after the first."""
        z = functional_call(network, params, (x,))
        of_token = F.cross_entropy(z[:, :-1].mT, y[:, 1:], reduction="none", ignore_index=-100)
        return torch.cat([torch.zeros(len(x), 1).double(), of_token], 1)

    def judged_after(w: Tensor) -> Tensor:
        """Return the outer losses after a training by SGD with momentum."""
        params, state = reference.weights(network), None
        for chosen in attribution.order:
            of_tokens = w[chosen] * losses(params, ids[chosen], labels[chosen])
            loss = (of_tokens.sum(1) / (labels[chosen, 1:] != -100).sum(1).clamp_min(1)).mean()
            params, state = reference.stepped(loss, params, reference.sgd(0.1, 0.9), state)
        of_outer = losses(params, judged, judged)[:, 1:].mean(1)
        return of_outer if each else of_outer.mean()

    exact = -torch.autograd.functional.jacobian(judged_after, torch.ones(6, 4).double())
    assert attribution.scores.shape == ((3, 6, 4) if each else (6, 4))
    assert error(attribution.scores, exact) < 1e-7
    if how != "eager":
        return
    of_sequences = found(Causal(), problem=NextToken(), **given)
    assert error(attribution.scores.sum(-1), of_sequences.scores) < 1e-10
    assert attribution.top(3)[0].tolist() == of_sequences.top(3)[0].tolist()
    assert error(attribution.predict([1, 3]), of_sequences.predict([1, 3])) < 1e-10
    third_tokens = torch.zeros(6, 4, dtype=torch.bool)
    third_tokens[:, 2] = True
    agreement = attribution.validate([[1, 3], [2], third_tokens])
    assert (
        error(agreement.retrained[:2], of_sequences.validate([[1, 3], [2], [5]]).retrained[:2])
        < 1e-10
    )
    assert (
        error(
            agreement.retrained[2],
            judged_after(1.0 - third_tokens.double()) - attribution.outer_loss,
        )
        < 1e-10
    )
    assert error(agreement.predicted[2], exact[..., 2].sum(-1)) < 1e-7
    plain: dict[str, Any] = {
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
        "steps": 5,
        "batch_size": 4,
    }
    of_problem = [NextToken(), NextToken(per="token")]
    smooth = [
        metasmoothness(network, (ids, labels), (judged, judged), problem=problem, **plain)
        for problem in of_problem
    ]
    assert smooth[0].agreement == pytest.approx(smooth[1].agreement)


def test_every_example_is_drawn_once_a_pass_and_the_order_is_the_generators() -> None:
    order = found(student()).order
    assert order.shape == (STEPS, 8)
    assert sorted(order[:3].flatten().tolist()) == list(range(N))
    assert torch.equal(order, found(student(), generator=torch.Generator().manual_seed(0)).order)
    assert not torch.equal(
        order, found(student(), generator=torch.Generator().manual_seed(1)).order
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
        (
            w[chosen] * F.cross_entropy(plain(TRAIN[0][chosen]), TRAIN[1][chosen], reduction="none")
        ).mean().backward()
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
    network, ones = student(kind), torch.ones(N, dtype=torch.float64)
    attribution = found(network, schedule=lambda k: 1 - k / STEPS, clip_norm=clip)
    sets = [[1, 2], [5], [7, 8, 9]]
    agreement = attribution.validate(sets)
    all_but: list[Any] = [[], *sets]
    losses = []
    for left_out in all_but:
        weights = ones.index_fill(0, torch.tensor(left_out, dtype=torch.long), 0.0)
        _, loss = trained(
            network, attribution.order, weights, lambda k: 0.1 * (1 - k / STEPS), clip
        )
        losses.append(loss)
    whole, *without = losses
    assert error(attribution.outer_loss, whole) < 1e-12
    assert error(agreement.retrained, torch.stack(without) - whole) < 1e-10
    assert (
        error(agreement.predicted, torch.stack([attribution.predict(chosen) for chosen in sets]))
        < 1e-12
    )


def test_metasmoothness_is_its_definition_and_falls_with_the_rate() -> None:
    v, agreements = torch.linspace(-1, 1, N, dtype=torch.float64), dict[float, float]()
    order = found(student(), steps=30).order
    for rate in (0.02, 2.0):
        network = student()
        given: dict[str, Any] = {"steps": 30, "batch_size": 8, "step": 0.2, "direction": v}
        inner = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
        smooth = metasmoothness(network, TRAIN, OUTER, optimizer=inner, **given)
        ends = [
            trained(network, order, 1 + h * v, lambda _, rate=rate: rate) for h in (0.0, 0.2, 0.4)
        ]  # type: ignore[misc]
        weights = [nn.utils.parameters_to_vector(plain.parameters()).detach() for plain, _ in ends]
        d = (weights[2] - weights[0]).abs()
        signs = [torch.sign(after - before) for before, after in itertools.pairwise(weights)]
        assert smooth.agreement == pytest.approx(
            float((d / d.sum() * signs[0] * signs[1]).sum()), abs=1e-12
        )
        assert error(smooth.outer_loss, torch.stack([loss for _, loss in ends])) < 1e-10
        agreements[rate] = smooth.agreement
    assert agreements[0.02] > 0.99
    assert agreements[2.0] < 0.6
    with pytest.raises(MetaplError):
        metasmoothness(network, TRAIN, OUTER, optimizer=inner, **{**given, "direction": 0 * v})


def test_a_rough_training_is_told_before_it_is_differentiated() -> None:
    def scores(rate: float, dtype: torch.dtype) -> Tensor:
        network = student().to(dtype)
        rows: dict[str, Any] = {
            "train": (TRAIN[0].to(dtype), TRAIN[1]),
            "outer": (OUTER[0].to(dtype), OUTER[1]),
        }
        inner = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
        return attribute(network, **rows, optimizer=inner, steps=100, batch_size=8).scores

    for rate, dtype in ((2.0, torch.float32), (0.02, torch.bfloat16)):
        with pytest.warns(UserWarning, match="metasmoothness"):
            scores(rate, dtype)
    scores(0.02, torch.float32)  # no warning


def test_arrays_and_data_sets_are_taken_as_tensors_are() -> None:
    expected = found(student()).scores
    x, y = TRAIN
    for train in ((x.numpy(), y.numpy()), TensorDataset(x, y), [(x[i], y[i]) for i in range(N)]):
        assert torch.equal(
            found(student(), train=train, outer=TensorDataset(*OUTER)).scores, expected
        )


@pytest.mark.parametrize("case", ["bfloat16", "autocast", "outer_batch", "a graph in a module"])
def test_a_training_with_all_examples_is_the_one_that_was_differentiated(case: str) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    train, outer = ((x.to(dtype), y) for x, y in (TRAIN, OUTER))
    if case == "a graph in a module":
        network.left = network(train[0])
    problem = Named() if case == "outer_batch" else EqualWeights()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        attribution = found(network, train=train, outer=outer, problem=problem)
    whole = attribution._losses_with(torch.ones(N))
    assert attribution.scores.dtype == torch.float32
    assert error(whole, attribution.outer_loss) < 1e-6


class Named(EqualWeights):
    """Whose outer batch is a dict."""

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
    attribution = found(student())
    helpful, harmful = attribution.top(3)
    assert attribution.scores[helpful[0]] == attribution.scores.max()
    assert attribution.scores[harmful[0]] == attribution.scores.min()
    attribution.save(tmp_path / "made" / "scores.pt")
    saved = torch.load(tmp_path / "made" / "scores.pt")
    assert torch.equal(saved["scores"], attribution.scores)
    assert torch.equal(saved["order"], attribution.order)
    assert "24" in repr(attribution)


class Noisy(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.rand((), dtype=x.dtype), y


X, Y = TRAIN
OTHERS = nn.Linear(2, 2)
REFUSED: dict[str, dict[str, Any]] = {
    "inputs alone": {"train": X},
    "unequal rows": {"train": (X, Y[:3])},
    "a later NaN": {"train": (X.index_fill(0, torch.tensor([20]), torch.nan), Y)},
    "an infinite outer input": {"outer": (X * torch.inf, Y)},
    "labels that are no classes": {"train": (X, Y + 3)},
    "a class of schedules": {"schedule": torch.optim.lr_scheduler.CosineAnnealingLR},
    "a clip": {"clip_norm": 0.0},
    "weights that are not 1": {"problem": Twice()},
    "views that differ in a few steps": {"train": Noisy(X, Y), "steps": 3},
    "views that differ": {
        "train": Noisy(X, Y),
        "steps": 60,
        "mode": metapl.feedback.Forward(keep_every=8),
    },
    "another network's optimizer": {"optimizer": torch.optim.SGD(OTHERS.parameters(), lr=0.1)},
    "another optimizer's schedule": {
        "schedule": torch.optim.lr_scheduler.StepLR(torch.optim.SGD(OTHERS.parameters()), 1)
    },
    "a rate that diverges": {"schedule": lambda k: 1e308, "steps": 9},
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_data_are_refused(case: str) -> None:
    with pytest.raises(MetaplError):
        found(student(), "sgd", **REFUSED[case])
