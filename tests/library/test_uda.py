"""UDA: its labels against a slow reference, when it begins, and what it leaves as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl import UDA, BilevelTrainer, CrossEntropy, LossTrainer, MetaplError
from metapl.problems.base import Signal

NOTHING = Signal(torch.empty(0))


def label(
    logits: list[list[float]], temperature: float, threshold: float, align: float, prior: Sequence[float] = ()
) -> list[list[float]]:
    """Class probabilities by the definition, one number after another."""
    rows = []
    for row in logits:
        powers = [math.exp(value) for value in row]
        rows.append([power / math.fsum(powers) for power in powers])
    classes = range(len(logits[0]))
    means = [math.fsum(row[k] for row in rows) / len(rows) for k in classes]
    found = []
    for row in rows:
        aims = prior or [1.0] * len(means)
        aligned = [row[k] * (aims[k] / means[k]) ** align if row[k] else 0.0 for k in classes]
        p = [value / math.fsum(aligned) for value in aligned]
        if temperature == 0:
            sharp = [float(k == p.index(max(p))) for k in classes]
        else:
            powers = [value ** (1 / temperature) for value in p]
            sharp = [power / math.fsum(powers) for power in powers]
        found.append([value if max(p) > threshold else 0.0 for value in sharp])
    return found


def logits(rows: int = 12, classes: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0)).to(dtype)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """With statistics and noise, so that a pass leaves traces."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 5)).to(dtype)


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    weak, strong = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(2)).to(dtype)
    return weak, strong


def labeled() -> tuple[Tensor, Tensor]:
    return pair()[0], torch.arange(12) % 5


def loss(uda: UDA, model: nn.Module, unlabeled: Any, step: int = 0, signal: Signal = NOTHING) -> Tensor:
    return uda(model, labeled=None, unlabeled=unlabeled, signal=signal, step=step)


# ---------------------------------------------------------------------------------------------------------- the labels


@pytest.mark.parametrize("align", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.6])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_the_labels_are_those_of_the_definition(temperature: float, threshold: float, align: float) -> None:
    uda, given = UDA(temperature, threshold, align=align), logits()
    expected = torch.tensor(label(given.tolist(), temperature, threshold, align), dtype=torch.float64)
    found = uda.target(given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(uda.target(given.float()), expected.float(), rtol=1e-5, atol=1e-6)
    kept = int(found.any(1).sum())
    assert kept == 12 if threshold == 0 else 0 < kept < 12, "the threshold leaves out some, and not all"
    assert torch.equal(uda.target(given[torch.arange(11, -1, -1)]).flip(0), found) or align
    # A shift of all logits of an example changes nothing.
    torch.testing.assert_close(uda.target(given + torch.arange(12)[:, None]), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("align", [0.0, 0.5, 1.0])
def test_the_labels_are_spread_like_the_prior(align: float) -> None:
    prior = (0.4, 0.3, 0.15, 0.1, 0.05)
    uda, given = UDA(0.5, 0.4, align=align, prior=prior), logits()
    expected = torch.tensor(label(given.tolist(), 0.5, 0.4, align, prior), dtype=torch.float64)
    torch.testing.assert_close(uda.target(given), expected, rtol=1e-12, atol=1e-14)
    even = UDA(0.5, 0.4, align=align).target(given)
    assert torch.equal(uda.target(given), even) == (align == 0)
    torch.testing.assert_close(UDA(0.5, 0.4, align=align, prior=(0.2,) * 5).target(given), even)


def test_of_equal_logits_full_alignment_leaves_the_prior() -> None:
    found = UDA(align=1.0, prior=(0.7, 0.2, 0.1)).target(torch.zeros(4, 3))
    torch.testing.assert_close(found, torch.tensor([0.7, 0.2, 0.1]).expand(4, 3))


@pytest.mark.parametrize("prior", [(0.5, 0.4), (1.0, 0.0), (1.5, -0.5), ()])
def test_a_prior_that_is_none_is_refused(prior: tuple[float, ...]) -> None:
    with pytest.raises(MetaplError, match="expected a prior of shares above 0 that sum to 1"):
        UDA(align=0.5, prior=prior)


def test_a_prior_of_other_classes_is_refused() -> None:
    with pytest.raises(MetaplError, match="2 shares and the network 5 classes; expected as many"):
        UDA(align=0.5, prior=(0.5, 0.5)).target(logits())


@pytest.mark.parametrize("align", [0.0, 0.5])
def test_a_temperature_of_0_is_the_limit_of_small_ones(align: float) -> None:
    hard = UDA(0.0, align=align).target(logits())
    assert torch.equal(hard, F.one_hot(hard.argmax(1), 5).double())
    off = [(UDA(t, align=align).target(logits()) - hard).abs().max().item() for t in (0.3, 0.1, 0.03, 1e-3)]
    assert off == sorted(off, reverse=True)
    assert off[0] > 0.01
    assert off[-1] < 1e-12
    assert torch.equal(UDA(1e-30, align=align).target(logits()), hard)


def test_of_equal_classes_a_temperature_of_0_takes_one() -> None:
    assert UDA(0.0).target(torch.zeros(2, 4)).sum(1).tolist() == [1.0, 1.0]


def test_without_alignment_it_is_the_softmax_at_the_temperature() -> None:
    given = logits()
    kept = (given.softmax(1).amax(1, keepdim=True) > 0.6).double()
    torch.testing.assert_close(UDA(0.4, 0.6).target(given), (given / 0.4).softmax(1) * kept, rtol=1e-13, atol=1e-15)


def test_full_alignment_turns_a_batch_of_one_kind_to_no_label_at_all() -> None:
    """Whatever all examples agree on says nothing of one of them."""
    given = logits(1, 5).expand(7, 5)
    torch.testing.assert_close(UDA(align=1.0).target(given), torch.full((7, 5), 0.2, dtype=torch.float64))
    assert not UDA(threshold=0.5, align=1.0).target(given).any()


def test_alignment_makes_frequent_classes_rarer() -> None:
    given = logits() + torch.tensor([4.0, 0, 0, 0, 0])
    shares = [UDA(align=align).target(given).mean(0)[0].item() for align in (0.0, 0.5, 1.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.5 > shares[2]


# -------------------------------------------------------------------------------------------------- improbable classes


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("align", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("low", [-math.inf, -300.0])
def test_a_class_without_probability_gets_none(low: float, align: float, temperature: float) -> None:
    """exp(-300) is 0 in float32."""
    given = logits(dtype=torch.float32)
    without = UDA(temperature, align=align).target(given[:, :4])
    given[:, 4] = low
    found = UDA(temperature, align=align).target(given)
    assert found.isfinite().all()
    if align == 1.0 and low > -math.inf:  # then it is as frequent as the others, however improbable it was
        assert temperature == 0.0 or found.mean(0)[4] > 0.1
        return
    assert found[:, 4].max() < 1e-30
    torch.testing.assert_close(found[:, :4], without)


def test_a_class_that_is_impossible_for_some_examples_alone() -> None:
    given = logits(dtype=torch.float32)
    given[:5, 4] = -math.inf
    found = UDA(0.5, align=0.5).target(given)
    assert found.isfinite().all()
    assert not found[:5, 4].any()
    assert found[5:, 4].all()


class Masked(nn.Module):
    """The last class is out of the question."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(5)
        mask[4] = -math.inf
        return self.inner(x) + mask


@pytest.mark.parametrize("uda", [UDA(), UDA(0.0, 0.3, align=0.5), UDA(0.5, 0.99)])
def test_an_impossible_class_spoils_neither_loss_nor_gradient(uda: UDA) -> None:
    model = Masked()
    value = loss(uda, model, pair(torch.float32))
    value.backward()
    assert value.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_network_that_gives_nan_gives_a_loss_of_nan() -> None:
    """Also for examples that are left out: the trainers look for it."""
    model = nn.Linear(6, 5)
    weak, strong = pair(torch.float32)
    strong[0] = math.nan
    assert loss(UDA(threshold=0.999), model, (weak, strong)).isnan()


# ------------------------------------------------------------------------------------------------ the loss, by the step


@pytest.mark.parametrize("uda", [UDA(0.4, 0.3), UDA(0.0, 0.3), UDA(0.4, 0.3, align=0.5), UDA(0.0, 0.25, align=1.0)])
@pytest.mark.parametrize("made", [False, True])
def test_the_loss_and_its_gradient_are_those_of_the_strong_view(uda: UDA, made: bool) -> None:
    """With the weak view's outputs from the signal, or made here."""
    model, (weak, strong) = network().eval(), pair()
    outputs = model(weak)
    target = torch.tensor(label(outputs.tolist(), uda.temperature, uda.threshold, uda.align), dtype=torch.float64)
    assert 0 < target.sum() < 12
    expected = -(target * model(strong).log_softmax(1)).sum() / 12
    signal = Signal(outputs.softmax(1), outputs=outputs) if made else NOTHING
    found = loss(uda, model, (weak, strong), signal=signal)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    seen = weak.clone().requires_grad_(), strong.clone().requires_grad_()
    loss(uda, model, seen).backward()
    assert seen[0].grad is None
    assert seen[1].grad is not None
    assert seen[1].grad.any()


@pytest.mark.parametrize("uda", [UDA(0.4, 0.3, align=0.5), UDA(0.0, 0.3, align=0.5)])
def test_float32_and_bfloat16_are_near_it(uda: UDA) -> None:
    expected = loss(uda, network().eval(), pair()).item()
    model = network(torch.float32).eval()
    assert loss(uda, model, pair(torch.float32)).item() == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(uda, model, pair(torch.float32))
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(expected, rel=0.05)
    half.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def counted(model: nn.Module) -> list[bool]:
    """Whether each pass has a graph."""
    passes: list[bool] = []
    model.register_forward_hook(lambda module, args, output: passes.append(output.requires_grad))
    return passes


def test_before_the_start_there_is_no_pass_and_nothing_moves() -> None:
    model, uda = network(), UDA(start=3)
    passes, random = counted(model), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(3):
        value = loss(uda, model, pair(), step)
        assert value.shape == ()
        assert value.item() == 0
        assert not value.requires_grad
    assert passes == []
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loss(uda, model, pair(), 3)
    assert passes == [False, True]
    assert not torch.equal(torch.get_rng_state(), random)
    assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])


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
    whole = loss(UDA(weight=1.5), model, pair()).item()
    found = [loss(UDA(weight=1.5, ramp=ramp, start=start), model, pair(), step).item() for step in range(7)]
    assert found == pytest.approx([whole * share for share in shares], rel=1e-12)


class OfTokens(nn.Module):
    """Reads numbers of tokens, alone or in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 5)

    def forward(self, x: Any) -> Tensor:
        tokens = x["tokens"] if isinstance(x, dict) else x
        outputs: Tensor = self.head(self.table(tokens).mean(1))
        return outputs


@pytest.mark.parametrize("kind", ["tokens", "dict"])
def test_inputs_of_every_kind_wait_for_the_start(kind: str) -> None:
    tokens = torch.randint(0, 9, (10, 4), generator=torch.Generator().manual_seed(0))
    x: Any = tokens if kind == "tokens" else {"tokens": tokens}
    model = OfTokens()
    trainer = LossTrainer(model, (CrossEntropy(), UDA(start=1)), optimizer=torch.optim.SGD(model.parameters(), 0.1))
    reports = [trainer.step((x, torch.arange(10) % 5), (x, x)).as_dict() for _ in range(2)]
    assert reports[0]["loss_uda"] == 0
    assert reports[0]["loss"] == reports[0]["loss_cross_entropy"]
    assert reports[1]["loss_uda"] > 0


# -------------------------------------------------------------------------------------------------------- in a trainer


def test_before_the_start_a_step_is_one_on_the_labels_alone() -> None:
    """To the last bit, with the noise, the statistics and the optimizer."""
    states = []
    for losses in ((CrossEntropy(),), (CrossEntropy(), UDA(0.5, start=3))):
        model = network()
        trainer = LossTrainer(model, losses, optimizer=torch.optim.AdamW(model.parameters(), 0.01), clip_norm=1.0)
        torch.manual_seed(3)
        for _ in range(3):
            trainer.step(labeled(), pair())
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("kind", ["one network", "a waiting student", "a teacher"])
def test_alone_it_learns_nothing_before_the_start_and_something_then(kind: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer: Any
    if kind == "one network":
        trainer = LossTrainer(model, (UDA(start=2),), optimizer=optimizer, clip_norm=1.0)
        step = trainer.step
    else:
        options: dict[str, Any] = {"teacher_losses": (UDA(start=2),), "outer_optimizer": optimizer, "clip_norm": 1.0}
        trainer = BilevelTrainer(model, network(), "none", **options)
        step = trainer.teacher_step if kind == "a waiting student" else trainer.step
    begun = [p.detach().clone() for p in model.parameters()]
    for number in range(3):
        report = step(labeled(), pair())
        assert math.isfinite(sum(value for name, value in report.as_dict().items() if "uda" in name))
        moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), begun, strict=True))
        assert moved == (number == 2)
