"""Paths of many steps: the training that they are, the states that they keep, what they read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_zoo import product
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import Lookahead, MetaplError
from metapl.core import keeping
from metapl.feedback import Forward
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
    # It cycles the momentum too.
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=7),
    "function": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 - k / STEPS),
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
    lookahead: Lookahead,
    mode: Forward,
    clip_norm: float | None = None,
) -> metapl.Hypergradient:
    torch.manual_seed(5)
    return metapl.hypergradient(
        None,
        student,
        outer=batch(-1),
        inner=lookahead,
        inner_optimizer=optimizer,
        problem=EqualWeights(),
        mode=mode,
        clip_norm=clip_norm,
    )


@pytest.mark.parametrize(
    ("optimizer", "schedule", "clip"),
    product(OPTIMIZERS, ["constant", *SCHEDULES], (None, 0.5), usual=("adam", "one_cycle", 0.5)),
)
def test_the_path_is_the_training_bit_for_bit(
    optimizer: str, schedule: str, clip: float | None
) -> None:
    student = network()
    inner_optimizer = OPTIMIZERS[optimizer](student.parameters())
    settings = None
    if schedule != "constant":
        scheduler = SCHEDULES[schedule](inner_optimizer)
        epoch_before = scheduler.last_epoch
        settings = metapl.scheduled_settings(scheduler, steps=STEPS)
        # The scheduler stays where it stands.
        assert epoch_before == scheduler.last_epoch
    state_before = copy.deepcopy(inner_optimizer.state_dict())
    result = gradient(
        student,
        inner_optimizer,
        Lookahead(batch, steps=STEPS, settings=settings),
        mode=Forward(keep="tree"),
        clip_norm=clip,
    )

    plain = network()
    torch.manual_seed(5)
    plain_optimizer = OPTIMIZERS[optimizer](plain.parameters())
    plain_scheduler = None
    if schedule != "constant":
        plain_scheduler = SCHEDULES[schedule](plain_optimizer)
    for number in range(STEPS):
        x, y = batch(number)
        plain_optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        plain_optimizer.step()
        if plain_scheduler is not None:
            plain_scheduler.step()
    for name, p in plain.named_parameters():
        assert torch.equal(result.student_params[name], p), name
    assert str(state_before) == str(inner_optimizer.state_dict())


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
        pytest.param("adamw_amsgrad", None, marks=pytest.mark.long),
        pytest.param("adamw_amsgrad", 1, marks=pytest.mark.long),
        pytest.param("nesterov", None, marks=pytest.mark.long),
        pytest.param("nesterov", 1, marks=pytest.mark.long),
        pytest.param("nesterov", 20, marks=pytest.mark.long),
    ],
)
def test_what_is_kept_changes_nothing(optimizer: str, truncate: int | None) -> None:
    student = network()
    inner = OPTIMIZERS[optimizer](student.parameters())
    shares = 1 - torch.arange(STEPS, dtype=torch.float64) / STEPS
    settings = {"lr": inner.param_groups[0]["lr"] * shares[:, None]}
    in_memory = Lookahead([batch(number) for number in range(STEPS)], settings=settings)
    expected = gradient(student, inner, in_memory, mode=Forward(keep_every=1, truncate=truncate))
    for name, options in WAYS.items():
        read_again = Lookahead(batch, steps=STEPS, settings=settings)
        result = gradient(student, inner, read_again, mode=Forward(truncate=truncate, **options))
        pairs = zip(result.feedback, expected.feedback, strict=True)
        assert all(torch.equal(h, h_expected) for h, h_expected in pairs), name


@pytest.mark.parametrize(("kind", "accumulate"), [("soft", 1), ("hard", 2)])
def test_teachers_whose_passes_are_computed_again(kind: Any, accumulate: int) -> None:
    """The networks have dropout and batch norm, and most steps are computed again."""
    results = []
    for lookahead, mode in (
        (Lookahead([batch(k)[0] for k in range(STEPS)]), Forward(keep_every=1)),
        (Lookahead(lambda k: batch(k)[0], steps=STEPS), Forward(keep="tree")),
    ):
        student = network()
        draws = torch.Generator().manual_seed(3)
        result = metapl.hypergradient(
            network(),
            student,
            outer=batch(-1),
            inner=lookahead,
            mode=mode,
            problem=metapl.PseudoLabels(kind),
            inner_optimizer=OPTIMIZERS["adam"](student.parameters()),
            generator=draws,
            accumulate=accumulate,
            recompute_teacher=True,
        )
        results.append((result.feedback, result.grads, result.student_params, draws.get_state()))
    assert [h.shape for h in results[0][0]] == [(8, 3)] * STEPS
    leaves = [torch.utils._pytree.tree_leaves(result) for result in results]
    assert all(torch.equal(a, b) for a, b in zip(*leaves, strict=True))


def in_the_same_tensors() -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return a function that writes each batch over the last one."""
    tensors = batch(0)

    def overwritten(number: int) -> tuple[Tensor, Tensor]:
        for t, values in zip(tensors, batch(number), strict=True):
            t.copy_(values)
        return tensors

    return overwritten


def with_noise(number: int) -> tuple[Tensor, Tensor]:
    x, y = batch(number)
    return x + torch.rand(()), y


WRONG: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "another batch": lambda _: Lookahead(with_noise, steps=STEPS),
    "batches in the same tensors": lambda _: Lookahead(in_the_same_tensors(), steps=3),
    "no steps": lambda _: Lookahead(batch),
    "more steps than batches": lambda _: Lookahead([batch(0)], steps=2),
    "a scheduler that needs a metric": lambda o: Lookahead(
        batch,
        steps=STEPS,
        settings=metapl.scheduled_settings(
            torch.optim.lr_scheduler.ReduceLROnPlateau(o), steps=STEPS
        ),
    ),
    "a scheduler that is not converted": lambda o: Lookahead(
        batch,
        steps=STEPS,
        settings=torch.optim.lr_scheduler.StepLR(o, 1),  # type: ignore[arg-type]
    ),
    "settings that are no tensor": lambda _: Lookahead(
        batch,
        steps=STEPS,
        settings={"lr": [0.1] * STEPS},  # type: ignore[list-item]
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_paths_are_refused(case: str) -> None:
    student = network()
    inner = OPTIMIZERS["adam"](student.parameters())
    state_before = copy.deepcopy(student.state_dict())
    with pytest.raises(MetaplError):
        gradient(student, inner, WRONG[case](inner), Forward(keep_every=8))
    assert all(torch.equal(t, state_before[name]) for name, t in student.state_dict().items())


def test_the_default_keeps_what_half_of_the_free_memory_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = network()
    monkeypatch.setattr(keeping, "free_bytes", lambda _: 200_000)
    inner = OPTIMIZERS["adam"](student.parameters())
    result = gradient(student, inner, Lookahead(batch, steps=60), mode=Forward())
    assert result.kept == "one step in 8, of 60"


@pytest.mark.parametrize("compile", [False, True])
def test_a_path_longer_than_memory_is_refused_before_its_first_step(
    compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = network()
    steps_read: set[int] = set()

    def read(number: int) -> tuple[Tensor, Tensor]:
        steps_read.add(number)
        return batch(number)

    for free, mode, word in (
        (100_000, Forward(keep_every=1), "keep_every=8"),
        (20_000, Forward(keep="tree"), "expected fewer steps"),
        (20_000, Forward(), "expected fewer steps"),
    ):
        monkeypatch.setattr(keeping, "free_bytes", lambda _, free=free: free)
        with pytest.raises(MetaplError, match=word):
            metapl.hypergradient(
                None,
                student,
                outer=batch(-1),
                inner=Lookahead(read, steps=60),
                inner_optimizer=OPTIMIZERS["adam"](student.parameters()),
                problem=EqualWeights(),
                mode=mode,
                compile=compile,
                # It would read three batches.
                verify=False,
            )
    assert steps_read <= {0}
