"""Scores by adjoints of Adam that are smoother than its steps, and what is said of scores.

The reference is the whole training in one graph of autograd, in which the division by √n̂ + ε has a
backward of its own.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captures import as_functions
from problems_zoo import product
from reference import error, outputs_at, weights
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError
from metapl.attribution.attribute import Attribution, mean_of
from metapl.attribution.recording import RecordedAttribution

N = 16
STEPS = 5
BATCH = 6
EPS = 1e-6

draw = torch.Generator().manual_seed(0)
X = torch.randn(N, 6, generator=draw, dtype=torch.float64)
Y = torch.randint(0, 3, (N,), generator=draw)
OUTER = torch.randn(5, 6, generator=draw, dtype=torch.float64), torch.arange(5) % 3
RULES: dict[str, dict[str, Any]] = {
    "AdamW": {"weight_decay": 0.1},
    "AdamW, amsgrad": {"weight_decay": 0.1, "amsgrad": True},
    "Adam": {"weight_decay": 0.1},
}


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def optimizer_of(network: nn.Module, rule: str) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if rule.startswith("AdamW") else torch.optim.Adam
    return kind(network.parameters(), lr=0.05, eps=EPS, **RULES[rule])


def attributed(network: nn.Module, optimizer: Any, smoothing: float, **options: Any) -> Attribution:
    arguments: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, **options}
    return metapl.attribute(
        network, (X, Y), OUTER, optimizer=optimizer, smoothing=smoothing, **arguments
    )


def recorded(network: nn.Module, optimizer: Any, order: Tensor, out: Path) -> metapl.Recording:
    """Return the recording of a loop over batches of these examples."""
    with metapl.record(network, optimizer, out=out, train=(X, Y), states_every=2) as recording:
        for rows in order:
            optimizer.zero_grad()
            F.cross_entropy(network(X[rows]), Y[rows]).backward()
            optimizer.step()
    return recording


class SmoothedDivision(torch.autograd.Function):
    """m̂/(√n̂ + ε), whose backward is that of m̂/(√n̂ + ε + c·rms(√n̂))."""

    @staticmethod
    def forward(ctx: Any, m_hat: Tensor, n_hat: Tensor, smoothing: float) -> Tensor:
        root = n_hat.sqrt()
        ctx.save_for_backward(m_hat, root, root + EPS + smoothing * n_hat.mean().sqrt())
        return m_hat / (root + EPS)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Any:  # type: ignore[override]
        m_hat, root, divisor = ctx.saved_tensors
        return bar / divisor, -bar * m_hat / (2 * root * divisor**2), None


def by_hand(network: nn.Module, order: Tensor, rule: str, smoothing: float) -> Tensor:
    """Return −dL/dw through the training, whose division has the backward above."""
    options = RULES[rule]
    w = torch.ones(N, dtype=torch.float64, requires_grad=True)
    theta = weights(network)
    m = {name: torch.zeros_like(t) for name, t in theta.items()}
    n = dict(m)
    top = dict(m)
    for k, rows in enumerate(order):
        z = outputs_at(network, theta, X[rows])
        loss = (w[rows] * F.cross_entropy(z, Y[rows], reduction="none")).mean()
        gradients = torch.autograd.grad(loss, [*theta.values()], create_graph=True)
        new: dict[str, Tensor] = {}
        for (name, t), gradient in zip(theta.items(), gradients, strict=True):
            d, decayed = gradient + 0.1 * t, t
            if rule.startswith("AdamW"):
                d, decayed = gradient, t * (1 - 0.05 * 0.1)
            m[name] = 0.9 * m[name] + 0.1 * d
            n[name] = 0.999 * n[name] + 0.001 * d**2
            top[name] = torch.where(n[name] >= top[name], n[name], top[name])
            second = top[name] if "amsgrad" in options else n[name]
            m_hat, n_hat = m[name] / (1 - 0.9 ** (k + 1)), second / (1 - 0.999 ** (k + 1))
            new[name] = decayed - 0.05 * SmoothedDivision.apply(m_hat, n_hat, smoothing)
        theta = new
    judged = F.cross_entropy(outputs_at(network, theta, OUTER[0]), OUTER[1])
    return -torch.autograd.grad(judged, w)[0]


@pytest.mark.parametrize(
    ("rule", "road", "smoothing"),
    product(
        RULES,
        ["eager", "by two graphs", "recorded"],
        [0.0, 0.3],
        usual=["AdamW", "AdamW, amsgrad", "eager", "by two graphs", "recorded", 0.3],
    ),
)
def test_smoothed_scores_are_those_of_another_backward(
    rule: str, road: str, smoothing: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is the same to the last bit."""
    network = student()
    exact = attributed(network, optimizer_of(network, rule), 0.0)
    expected = by_hand(network, exact.order, rule, smoothing)
    if road == "by two graphs":
        as_functions(monkeypatch)
    if road == "recorded":
        model = copy.deepcopy(network)
        recording = recorded(model, optimizer_of(model, rule), exact.order, tmp_path / "r")
        found: Attribution = recording.attribute(OUTER, smoothing=smoothing, progress=False)
    else:
        found = attributed(
            network, optimizer_of(network, rule), smoothing, compile=road == "by two graphs"
        )
    assert error(found.scores, expected) < 1e-9
    if road == "eager":
        assert all(t.equal(exact.student_params[name]) for name, t in found.student_params.items())
        # Settings of each step, and states that are computed again.
        scheduled = attributed(
            network,
            optimizer_of(network, rule),
            smoothing,
            settings={"lr": torch.full((STEPS, 1), 0.05, dtype=torch.float64)},
            mode=metapl.feedback.Forward(keep_every=2),
        )
        assert error(scheduled.scores, expected) < 1e-9
    if smoothing:
        assert error(found.scores, exact.scores) > 0.01


@pytest.mark.long
def test_a_compiled_adjoint_is_smoothed_as_the_eager_one() -> None:
    network = student()
    found = attributed(network, optimizer_of(network, "AdamW"), 0.3, compile=True)
    expected = by_hand(network, found.order, "AdamW", 0.3)
    assert error(found.scores, expected) < 1e-9


def test_of_several_optimizers_those_of_adams_kind_are_smoothed() -> None:
    network = student()
    first, second = network[0], network[2]
    by_sgd = torch.optim.SGD(first.parameters(), lr=0.05)
    by_adam = torch.optim.AdamW(second.parameters(), lr=0.05, eps=EPS)
    groups_before = copy.deepcopy(by_adam.param_groups)
    found = [attributed(network, (by_sgd, by_adam), c).scores for c in (0.0, 0.3)]
    assert error(found[0], found[1]) > 0.01
    for group, group_before in zip(by_adam.param_groups, groups_before, strict=True):
        assert group.keys() == group_before.keys()
    # Behind one optimizer over all weights, whose rates say which of them move.
    still = {"params": [*first.parameters()], "lr": 0.0}
    moving = {"params": [*second.parameters()]}
    alone = attributed(network, torch.optim.AdamW([still, moving], lr=0.05, eps=EPS), 0.3).scores
    still_sgd = torch.optim.SGD(first.parameters(), lr=0.0)
    assert error(attributed(network, (still_sgd, by_adam), 0.3).scores, alone) < 1e-12


def test_a_smoothing_of_what_has_no_second_moments_is_refused(tmp_path: Path) -> None:
    network = student()
    by_sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    expected = r"smoothing=0.3 was given with SGD, .* expected Adam or AdamW, or smoothing=0"
    with pytest.raises(MetaplError, match=expected):
        attributed(network, by_sgd, 0.3)
    recording = recorded(network, by_sgd, torch.arange(8).view(2, 4), tmp_path / "r")
    with pytest.raises(MetaplError, match=expected):
        recording.attribute(OUTER, smoothing=0.3, progress=False)
    with pytest.raises(MetaplError, match="smoothing=-1.0: expected a number >= 0"):
        attributed(network, by_sgd, -1.0)


# ----------------------------------------------------------------------------------- several seeds


def of_seeds(seeds: int, **options: Any) -> Attribution:
    def make_student() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3)).double()

    def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)

    arguments: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, **options}
    return metapl.attribute(
        make_student, (X, Y), OUTER, optimizer=make_optimizer, seeds=seeds, **arguments
    )


@pytest.mark.parametrize("each", [False, True])
def test_scores_of_several_seeds_are_the_mean_of_trainings_that_differ(each: bool) -> None:
    state = torch.get_rng_state()
    found = of_seeds(3, each=each)
    assert torch.get_rng_state().equal(state)
    alone: list[Attribution] = []
    for seed in range(3):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3)).double()
        alone.append(
            metapl.attribute(
                network,
                (X, Y),
                OUTER,
                optimizer=torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
                steps=STEPS,
                batch_size=BATCH,
                generator=torch.Generator().manual_seed(seed),
                each=each,
            )
        )
    assert error(found.scores, sum(a.scores for a in alone) / 3) < 1e-12
    assert error(found.outer_loss, sum(a.outer_loss for a in alone) / 3) < 1e-12
    assert found.order.equal(torch.stack([a.order for a in alone]))
    assert not found.order[0].equal(found.order[1])
    correlations: list[float] = []
    for first, second in ((0, 1), (0, 2), (1, 2)):
        for rows in zip(
            alone[first].scores.reshape(-1, N), alone[second].scores.reshape(-1, N), strict=True
        ):
            correlations.append(float(spearmanr(*map(Tensor.tolist, rows)).statistic))
    assert found.agreement == pytest.approx(sum(correlations) / len(correlations), abs=1e-12)
    # The trainings without examples are those of all seeds.
    sets = [[1, 2], [5], [7, 8, 9]]
    changes = [a.validate(sets, progress=False).retrained for a in alone]
    validated = found.validate(sets, top=0.2, progress=False)
    assert error(validated.retrained, sum(changes) / 3) < 1e-9
    assert error(validated.predicted, torch.stack([found.predict(rows) for rows in sets])) < 1e-12
    assert len(found.of_seeds) == 3
    assert f"agreement={found.agreement:.4g}" in repr(found).replace("\n", " ")


def test_one_start_for_several_seeds_is_refused() -> None:
    network = student()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(MetaplError, match="seeds=2 was given with one Sequential, .* functions"):
        attributed(network, optimizer, 0.0, seeds=2)
    with pytest.raises(MetaplError, match="student is a function, and optimizer a SGD; .*lambda"):
        attributed(student, optimizer, 0.0, seeds=2)  # type: ignore[arg-type]
    # The way out where all seeds begin at the same weights: their orders differ.
    found = metapl.attribute(
        lambda: copy.deepcopy(network),
        (X, Y),
        OUTER,
        optimizer=lambda copied: torch.optim.SGD(copied.parameters(), lr=0.1),
        steps=STEPS,
        batch_size=BATCH,
        seeds=2,
    )
    first, second = found.of_seeds
    assert not first.order.equal(second.order)
    assert first.scores.equal(attributed(network, optimizer, 0.0).scores)


def test_results_of_other_examples_have_no_mean() -> None:
    network = student()
    by_sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    found = attributed(network, by_sgd, 0.0)
    with pytest.raises(MetaplError, match="1 results were given, .* expected two or more"):
        mean_of([found])
    fewer_steps = attributed(network, by_sgd, 0.0, steps=2)
    with pytest.raises(MetaplError, match="2 results were given, .* of as many steps"):
        mean_of([found, fewer_steps])


def test_recordings_have_a_mean_where_their_examples_are_those_of_a_data_set(
    tmp_path: Path,
) -> None:
    def attributed_recording(seed: int, train: Any) -> RecordedAttribution:
        network = student()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        batches = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).split(4)
        data = Labeled(network) if train is None else network
        out = tmp_path / f"{seed} {train is None}"
        with metapl.record(data, optimizer, out=out, train=train) as recording:
            for rows in batches:
                optimizer.zero_grad()
                if train is None:
                    data(X[rows], Y[rows])["loss"].backward()
                else:
                    F.cross_entropy(data(X[rows]), Y[rows]).backward()
                optimizer.step()
        outer = OUTER if train is not None else {"x": OUTER[0], "labels": OUTER[1]}
        return recording.attribute(outer, progress=False)

    results = [attributed_recording(seed, (X, Y)) for seed in (0, 1)]
    found = mean_of(results)
    assert error(found.scores, (results[0].scores + results[1].scores) / 2) < 1e-12
    assert found.columns()["draws"] == [2] * N
    assert error(found.weights(dataset=(X, Y)), found.weights()) < 1e-12
    by_sight = [attributed_recording(seed, None) for seed in (0, 1)]
    with pytest.raises(MetaplError, match="without train=, .* expected recordings with the same"):
        mean_of(by_sight)


class Labeled(nn.Module):
    """A network that is called with labels."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


# ------------------------------------------------------------------------- what scores are worth


def warned_by(call: Callable[[], Any]) -> list[str]:
    """Return what a call warns of the worth of its scores."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if text.startswith("scores may not say")]


class OwnLoss(metapl.problems.EqualWeights):
    """A loss of a user's own, of which nothing is known."""

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1]) - 0.5


def words(rate: float, problem: Any = None) -> Attribution:
    """Return the scores of rare words in a training whose rate may be too high."""
    generator = torch.Generator().manual_seed(0)
    shares = 1 / (1 + torch.arange(500.0))
    ids = torch.multinomial(shares.expand(440, 500), 8, replacement=True, generator=generator)
    labels = torch.randn(500, 5, generator=generator)[ids].mean(1).argmax(1)

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(500, 16)
            self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))

        def forward(self, ids: Tensor) -> Any:
            return self.body(self.embed(ids).mean(1))

    torch.manual_seed(0)
    network = Words()
    return metapl.attribute(
        network,
        (ids[:400], labels[:400]),
        (ids[400:], labels[400:]),
        optimizer=torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9),
        steps=99,
        batch_size=20,
        problem=problem,
        progress=False,
    )


def test_effects_that_add_up_to_more_than_a_loss_can_change_are_told() -> None:
    """At 0.3 removals have a rank correlation of 0.46 with the scores, and at 0.1 of 0.90."""
    (warning,) = warned_by(lambda: words(0.3))
    assert re.search(r"their sizes add up to 3\.\d+, and the outer loss, 1\.\d+ before", warning)
    assert warned_by(lambda: words(0.1)) == []
    # Effects of another loss may add up to more, and not to many times its size.
    assert warned_by(lambda: words(0.3, OwnLoss())) == []
    (warning,) = warned_by(lambda: words(1.0, OwnLoss()))
    assert "their sizes add up to" in warning


@pytest.mark.parametrize("road", ["attribute", "record"])
def test_the_usual_eps_of_adam_is_told_where_nothing_is_smoothed(road: str, tmp_path: Path) -> None:
    def said(eps: float, smoothing: float) -> list[str]:
        network = student()
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, eps=eps)
        if road == "attribute":
            return warned_by(lambda: attributed(network, optimizer, smoothing))
        order = torch.arange(12).view(3, 4)
        recording = recorded(network, optimizer, order, tmp_path / f"{eps} {smoothing}")
        return warned_by(lambda: recording.attribute(OUTER, smoothing=smoothing, progress=False))

    (warning,) = said(1e-8, 0.0)
    assert "Adam's eps is 1e-08" in warning
    assert "try smoothing=0.1" in warning
    assert said(1e-8, 0.3) == said(1e-6, 0.0) == []


def test_seeds_that_do_not_agree_are_told_in_the_same_line() -> None:
    """With labels by chance and few steps, no example does the same in two seeds."""

    def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(network.parameters(), lr=0.05)

    def attributed_to(outer: Any) -> Attribution:
        return metapl.attribute(
            lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).double(),
            (X, Y),
            outer,
            optimizer=make_optimizer,
            steps=3,
            batch_size=4,
            smoothing=0.0,
            seeds=3,
        )

    (warning,) = warned_by(lambda: attributed_to(OUTER))
    assert re.search(r"the 3 seeds have a rank correlation of -?0\.[0-2]\d .*; Adam's eps", warning)
    # Of a linear model in whole batches they agree.
    agreeing = metapl.attribute(
        lambda: nn.Linear(6, 3).double(),
        (X, Y),
        (X, Y),
        optimizer=lambda network: torch.optim.SGD(network.parameters(), lr=0.5),
        steps=20,
        batch_size=N,
        seeds=2,
    )
    assert agreeing.agreement is not None
    assert agreeing.agreement > 0.9


# ------------------------------------------------------------------------ reliability of recordings


def test_the_reliability_of_a_recording_is_that_of_the_same_training(tmp_path: Path) -> None:
    def training() -> tuple[nn.Module, torch.optim.Optimizer]:
        network = student()
        return network, torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)

    network, optimizer = training()
    estimate = metapl.reliability(
        network, (X, Y), OUTER, optimizer=optimizer, steps=STEPS, batch_size=BATCH, progress=False
    )
    order = attributed(network, optimizer, 0.0).order
    recording = recorded(*training(), order, tmp_path / "r")
    found = recording.reliability(progress=False)
    assert found.steps == STEPS
    assert found.bend == pytest.approx(estimate.bend, rel=1e-9)
    assert found.agreement == pytest.approx(estimate.agreement, abs=1e-12)
    assert str(found) == str(estimate)
    # Nothing of the recording moves.
    again = metapl.Recording.open(tmp_path / "r", student(), train=(X, Y))
    assert again.reliability(progress=False) == found
