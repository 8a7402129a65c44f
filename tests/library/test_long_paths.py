"""Paths of many steps.

The training that they are, the states that they keep, the batches that they read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems_zoo import product
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import Lookahead, MetaplError
from metapl.feedback import Forward, keeping
from metapl.problems import EqualWeights

STEPS = 24
Optimizer = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adam_rate_in_a_tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
}
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "constant": lambda _: None,
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "warm_restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 40),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.99),
        ],
        milestones=[5],
    ),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, 7),  # of momentum too
    "function": lambda _: lambda k: 1 - k / STEPS,
}


def batch(number: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(number)
    return torch.randn(8, 6, generator=draw), torch.randint(0, 3, (8,), generator=draw)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def gradient(
    student: nn.Module,
    optimizer: Any,
    ahead: Lookahead,
    mode: Forward,
    clip_norm: float | None = None,
) -> metapl.Hypergradient:
    torch.manual_seed(5)
    given = {
        "outer": batch(-1),
        "inner": ahead,
        "problem": EqualWeights(),
        "inner_optimizer": optimizer,
    }
    return metapl.hypergradient(None, student, mode=mode, clip_norm=clip_norm, **given)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "clip"),
    product(OPTIMIZERS, SCHEDULES, (None, 0.5), usual=("adam", "one_cycle", 0.5)),
)
def test_the_path_is_the_training_bit_for_bit(
    optimizer: str, schedule: str, clip: float | None
) -> None:
    student, plain = network(), network()
    inner = OPTIMIZERS[optimizer](student.parameters())
    scheduled = SCHEDULES[schedule](inner)
    before = copy.deepcopy((inner.state_dict(), getattr(scheduled, "last_epoch", None)))
    found = gradient(
        student,
        inner,
        Lookahead(batch, steps=STEPS, schedule=scheduled),
        Forward(keep="tree"),
        clip,
    )

    torch.manual_seed(5)
    own = OPTIMIZERS[optimizer](plain.parameters())
    later = SCHEDULES[schedule](own)
    later = torch.optim.lr_scheduler.LambdaLR(own, later) if schedule == "function" else later
    for number in range(STEPS):
        x, y = batch(number)
        own.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        own.step()
        if later is not None:
            later.step()
    for name, p in plain.named_parameters():
        assert torch.equal(found.student_params[name], p), name
    assert str(before) == str((inner.state_dict(), getattr(scheduled, "last_epoch", None)))


WAYS: dict[str, dict[str, Any]] = {
    "all": {"keep_every": 1},
    "every": {"keep_every": 11},
    "tree": {"keep": "tree"},
    "host": {"keep": "tree", "keep_on": "cpu"},
    "chosen": {},
}


@pytest.mark.parametrize(
    ("optimizer", "truncate"),
    [
        ("adamw_amsgrad", 20),
        *(
            pytest.param(name, of, marks=pytest.mark.long)
            for name in ("nesterov", "adamw_amsgrad")
            for of in (None, 1)
        ),
        pytest.param("nesterov", 20, marks=pytest.mark.long),
    ],
)
def test_what_is_kept_changes_nothing(optimizer: str, truncate: int | None) -> None:
    student = network()
    inner = OPTIMIZERS[optimizer](student.parameters())
    held = Lookahead([batch(number) for number in range(STEPS)], schedule=lambda k: 1 - k / STEPS)
    expected = gradient(student, inner, held, Forward(keep_every=1, truncate=truncate)).feedback
    for name, options in WAYS.items():
        made = Lookahead(batch, steps=STEPS, schedule=held.schedule)
        found = gradient(student, inner, made, Forward(truncate=truncate, **options)).feedback
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name


@pytest.mark.parametrize(("kind", "accumulate"), [("soft", 1), ("hard", 2)])
def test_teachers_whose_passes_are_computed_again(kind: Any, accumulate: int) -> None:
    """Dropout, batch norm and drawn labels, on lazy batches.

    Most steps are computed again.
    """
    found = []
    for ahead, mode in (
        (Lookahead([batch(k)[0] for k in range(STEPS)]), Forward(keep_every=1)),
        (Lookahead(lambda k: batch(k)[0], steps=STEPS), Forward(keep="tree")),
    ):
        student, teacher, draws = network(), network(), torch.Generator().manual_seed(3)
        result = metapl.hypergradient(
            teacher,
            student,
            outer=batch(-1),
            inner=ahead,
            mode=mode,
            problem=metapl.PseudoLabels(kind),
            inner_optimizer=OPTIMIZERS["adam"](student.parameters()),
            generator=draws,
            accumulate=accumulate,
            recompute_teacher=True,
        )
        found.append((result.feedback, result.grads, result.student_params, draws.get_state()))
    assert [h.shape for h in found[0][0]] == [(8, 3)] * STEPS
    leaves = [torch.utils._pytree.tree_leaves(one) for one in found]
    assert all(torch.equal(a, b) for a, b in zip(*leaves, strict=True))


def reused() -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches in one and the same tensors."""
    held = batch(0)

    def made(number: int) -> tuple[Tensor, Tensor]:
        for t, new in zip(held, batch(number), strict=True):
            t.copy_(new)
        return held

    return made


WRONG: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "another batch": lambda _: Lookahead(
        lambda k: (batch(k)[0] + torch.rand(()), batch(k)[1]), steps=STEPS
    ),
    "batches in the same tensors": lambda _: Lookahead(reused(), steps=3),
    "no steps": lambda _: Lookahead(batch),
    "more steps than batches": lambda _: Lookahead([batch(0)], steps=2),
    "a schedule that needs a metric": lambda o: Lookahead(
        batch, steps=STEPS, schedule=torch.optim.lr_scheduler.ReduceLROnPlateau(o)
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_paths_are_refused(case: str) -> None:
    student = network()
    inner = OPTIMIZERS["adam"](student.parameters())
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(MetaplError):
        gradient(student, inner, WRONG[case](inner), Forward(keep_every=8))
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())


def test_the_default_keeps_what_half_of_the_free_memory_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = network()
    monkeypatch.setattr(keeping, "free_bytes", lambda _: 200_000)
    found = gradient(
        student, OPTIMIZERS["adam"](student.parameters()), Lookahead(batch, steps=60), Forward()
    )
    assert found.kept == "one step in 8, of 60"


@pytest.mark.parametrize("compile", [False, True])
def test_a_path_longer_than_memory_is_refused_before_its_first_step(
    compile: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    student, read = network(), set[int]()
    ahead = Lookahead(lambda k: (read.add(k), batch(k))[1], steps=60)  # type: ignore[func-returns-value]
    given: Any = {"outer": batch(-1), "inner": ahead, "problem": EqualWeights(), "compile": compile}
    given["inner_optimizer"] = OPTIMIZERS["adam"](student.parameters())
    monkeypatch.setattr(keeping.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    for free, mode, word in (
        (100_000, Forward(keep_every=1), "keep_every=8"),
        (20_000, Forward(keep="tree"), "keep_on= with a folder"),
        (20_000, Forward(), "keep_on= with a folder"),
        (100_000, Forward(keep_on=str(tmp_path)), "disk"),
    ):
        monkeypatch.setattr(keeping, "free_bytes", lambda _, free=free: free)
        word = "compile" if mode.keep_on and not compile else word
        with pytest.raises(MetaplError, match=word):
            metapl.hypergradient(None, student, mode=mode, **given)
    assert read <= {0}
