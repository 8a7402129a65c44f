"""UDA: its labels against a slow reference, when it begins, and what it leaves as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metapl
from metapl import UDA
from metapl.data import StepBatches
from metapl.problems.base import Signal
from metapl.problems.losses import log_of_shares

NOTHING = Signal(torch.empty(0))


def label(
    logits: list[list[float]],
    temperature: float,
    threshold: float,
    align: float,
    prior: Sequence[float] = (),
) -> list[list[float]]:
    """Return class probabilities by the definition, one number after another."""
    rows = []
    for row in logits:
        powers = [math.exp(value) for value in row]
        rows.append([power / math.fsum(powers) for power in powers])
    classes = range(len(logits[0]))
    means = [math.fsum(row[k] for row in rows) / len(rows) for k in classes]
    labels = []
    for row in rows:
        aims = prior or [1.0] * len(means)
        aligned = [row[k] * (aims[k] / means[k]) ** align if row[k] else 0.0 for k in classes]
        p = [value / math.fsum(aligned) for value in aligned]
        if temperature == 0:
            sharp = [float(k == p.index(max(p))) for k in classes]
        else:
            powers = [value ** (1 / temperature) for value in p]
            sharp = [power / math.fsum(powers) for power in powers]
        labels.append([value if max(p) > threshold else 0.0 for value in sharp])
    return labels


def logits(rows: int = 12, classes: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0)).to(dtype)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a network with statistics and noise, so that a pass leaves traces."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 5)).to(
        dtype
    )


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    weak, strong = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(2)).to(dtype)
    return weak, strong


def labeled() -> tuple[Tensor, Tensor]:
    return pair()[0], torch.arange(12) % 5


def loss(uda: UDA, model: nn.Module, inner: Any, step: int = 0, signal: Signal = NOTHING) -> Tensor:
    return uda(model, outer=None, inner=inner, signal=signal, step=step)


@pytest.mark.parametrize("align", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.6])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_the_labels_are_those_of_the_definition(
    temperature: float, threshold: float, align: float
) -> None:
    uda = UDA(temperature, threshold, align=align)
    weak_logits = logits()
    expected = torch.tensor(
        label(weak_logits.tolist(), temperature, threshold, align), dtype=torch.float64
    )
    target = uda.target(weak_logits)
    torch.testing.assert_close(target, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        uda.target(weak_logits.float()), expected.float(), rtol=1e-5, atol=1e-6
    )
    kept_rows = int(target.any(1).sum())
    assert kept_rows == 12 if threshold == 0 else 0 < kept_rows < 12, (
        "the threshold leaves out some, and not all"
    )
    assert torch.equal(uda.target(weak_logits[torch.arange(11, -1, -1)]).flip(0), target) or align


@pytest.mark.parametrize("align", [0.0, 0.5, 1.0])
def test_the_labels_are_spread_like_the_prior(align: float) -> None:
    prior = (0.4, 0.3, 0.15, 0.1, 0.05)
    uda = UDA(0.5, 0.4, align=align, prior=prior)
    weak_logits = logits()
    expected = torch.tensor(
        label(weak_logits.tolist(), 0.5, 0.4, align, prior), dtype=torch.float64
    )
    torch.testing.assert_close(uda.target(weak_logits), expected, rtol=1e-12, atol=1e-14)
    even = UDA(0.5, 0.4, align=align).target(weak_logits)
    assert torch.equal(uda.target(weak_logits), even) == (align == 0)
    torch.testing.assert_close(
        UDA(0.5, 0.4, align=align, prior=(0.2,) * 5).target(weak_logits), even
    )


@pytest.mark.parametrize("threshold", [0.0, 0.6])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_the_threshold_of_the_authors_is_on_the_sharpened_labels(
    temperature: float, threshold: float
) -> None:
    """Their code keeps max softmax(logits / τ) >= β."""
    scores = logits()
    sharpened = (scores / temperature).softmax(1)
    is_kept = sharpened.max(1).values >= threshold
    target = UDA(temperature, threshold, threshold_on="sharpened").target(scores)
    torch.testing.assert_close(target, sharpened * is_kept[:, None], rtol=1e-12, atol=1e-14)
    assert (
        threshold == 0
        or temperature == 1
        or not torch.equal(target, UDA(temperature, threshold).target(scores))
    )


def test_a_label_that_reaches_the_threshold_by_sharpening_is_kept() -> None:
    """A label (0.5, 0.3, 0.2) at the temperature 0.5 is 0.66 for the first class.

    What equals the threshold is kept too, by >=.
    """
    scores = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    assert not UDA(0.5, 0.6).target(scores).any()
    assert UDA(0.5, 0.6, threshold_on="sharpened").target(scores)[0, 0] == pytest.approx(
        0.25 / 0.38
    )
    even = torch.zeros(1, 2, dtype=torch.float64)
    assert not UDA(1.0, 0.5).target(even).any()
    assert UDA(1.0, 0.5, threshold_on="sharpened").target(even).tolist() == [[0.5, 0.5]]


def test_a_one_hot_target_has_no_sharpened_threshold() -> None:
    with pytest.raises(metapl.MetaplError, match="with temperature=0, of one-hot targets"):
        UDA(0.0, 0.95, threshold_on="sharpened")


# ---------------------------------------------------------------------------- the loss, by the step


@pytest.mark.parametrize(
    "uda", [UDA(0.4, 0.3), UDA(0.0, 0.3), UDA(0.4, 0.3, align=0.5), UDA(0.0, 0.25, align=1.0)]
)
@pytest.mark.parametrize("has_outputs", [False, True])
def test_the_loss_and_its_gradient_are_those_of_the_strong_view(
    uda: UDA, has_outputs: bool
) -> None:
    """With the weak view's outputs from the signal, or made here."""
    model = network().eval()
    weak, strong = pair()
    outputs = model(weak)
    target = torch.tensor(
        label(outputs.tolist(), uda.temperature, uda.threshold, uda.align), dtype=torch.float64
    )
    assert 0 < target.sum() < 12
    expected = -(target * model(strong).log_softmax(1)).sum() / 12
    signal = Signal(outputs.softmax(1), outputs=outputs) if has_outputs else NOTHING
    value = loss(uda, model, (weak, strong), signal=signal)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    grads = [
        torch.autograd.grad(gradient, list(model.parameters()), retain_graph=True)
        for gradient in (value, expected)
    ]
    for gradient, expected_gradient in zip(*grads, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)
    views = weak.clone().requires_grad_(), strong.clone().requires_grad_()
    loss(uda, model, views).backward()
    assert views[0].grad is None
    assert views[1].grad is not None
    assert views[1].grad.any()


def counted(model: nn.Module) -> list[bool]:
    """Return a list that has, for each pass to come, whether it has a graph."""
    passes: list[bool] = []
    model.register_forward_hook(lambda module, args, output: passes.append(output.requires_grad))
    return passes


def test_before_the_start_there_is_no_pass_and_nothing_moves() -> None:
    model = network()
    uda = UDA(start=3)
    passes = counted(model)
    random = torch.get_rng_state()
    first_state = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(3):
        value = loss(uda, model, pair(), step)
        assert value.shape == ()
        assert value.item() == 0
        assert not value.requires_grad
    assert passes == []
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, first_state[name]) for name, value in model.state_dict().items())
    loss(uda, model, pair(), 3)
    assert passes == [False, True]
    assert not torch.equal(torch.get_rng_state(), random)
    assert not torch.equal(model.state_dict()["1.running_mean"], first_state["1.running_mean"])


class Noted(StepBatches[Any]):
    """Pairs of views, which note for which steps they were made."""

    steps = None

    def __init__(self) -> None:
        self.made: list[int] = []

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        self.made.append(step)
        weak, strong = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(step))
        return weak, strong


class UndeclaredUDA(UDA):
    """A loss of a user's own, which does not say when it reads the inner batch."""


def fitted(uda: UDA, source: Noted, folder: Path, *, resumes: bool) -> dict[str, Tensor]:
    """Return the weights after seven steps of a fit, which may be resumed after two."""
    x, y = labeled()
    model = network(torch.float32)
    trainer = metapl.LossTrainer(
        model,
        (metapl.CrossEntropy(), uda),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    options: Any = {"schedule": "constant", "progress": False, "out": folder}
    if resumes:
        trainer.fit([(x.float(), y)], source, steps=2, **options)
    trainer.fit([(x.float(), y)], source, steps=7, resume=resumes, **options)
    return model.state_dict()


@pytest.mark.parametrize("resumes", [False, True])
def test_a_fit_makes_no_inner_batch_before_the_start(resumes: bool, tmp_path: Path) -> None:
    """The weights are those of a fit that makes all of them."""
    sparing = Noted()
    weights = fitted(UDA(start=4), sparing, tmp_path / "sparing", resumes=resumes)
    making_all = Noted()
    expected = fitted(UndeclaredUDA(start=4), making_all, tmp_path / "all", resumes=resumes)
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    # The first one is made in any case, and once more where the fit is resumed.
    resumed = [0] if resumes else []
    assert sparing.made == [0, *resumed, 4, 5, 6]
    assert making_all.made == [0, 1, *resumed, 2, 3, 4, 5, 6]


def test_a_fit_without_pairs_is_refused_in_its_first_step() -> None:
    x, y = labeled()
    model = network()
    trainer = metapl.LossTrainer(
        model,
        (metapl.CrossEntropy(), UDA(start=4)),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    for inner in (None, [x]):
        with pytest.raises(metapl.MetaplError, match=r"^step 1: .*expected .*\(weak, strong\)"):
            trainer.fit([(x, y)], inner, steps=7, progress=False)


@pytest.mark.parametrize(
    ("start", "ramp", "shares"),
    [
        (0, 0, [1, 1, 1, 1, 1, 1, 1]),
        (0, 4, [0, 0.25, 0.5, 0.75, 1, 1, 1]),
        (2, 0, [0, 0, 1, 1, 1, 1, 1]),
        (2, 4, [0, 0, 0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_the_ramp_begins_at_the_start(start: int, ramp: int, shares: list[float]) -> None:
    model = network().eval()
    full_loss = loss(UDA(weight=1.5), model, pair()).item()
    losses = [
        loss(UDA(weight=1.5, ramp=ramp, start=start), model, pair(), step).item()
        for step in range(7)
    ]
    assert losses == pytest.approx([full_loss * share for share in shares], rel=1e-12)


def test_shares_that_are_kept_belong_to_no_transform() -> None:
    """A tensor that a transform has made may not be read after it."""
    shares = (0.125, 0.875)
    dtype = torch.float64
    device = torch.device("cpu")

    def weighted(x: Tensor) -> Tensor:
        return (x * log_of_shares(shares, dtype, device)).sum()

    x = torch.ones(2, dtype=dtype)
    gradient = torch.func.grad(weighted)(x)
    kept = log_of_shares(shares, dtype, device)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(kept)
    assert torch.equal(gradient, torch.tensor(shares, dtype=dtype).log())
