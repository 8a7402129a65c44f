"""``compile=True``.

The eager trainer's steps, in modules and optimizers that own them; or one refusal.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from kinds import KINDS, C, Own
from problems_zoo import everything, noisy_teacher, same, toy
from test_attribution import Named
from test_functional import (
    FEATURES,
    MODES,
    OPTIMIZERS,
    batches,
    build,
    but_for_bfloat16,
    error,
    fits,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

import metapl
from metapl import MetaplError
from metapl.execution.numerics import no_fast_path
from metapl.feedback import Reinforce
from metapl.functional import compiled
from metapl.training.verification import VerificationWarning


@pytest.fixture(autouse=True)
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor, where the mechanics matter."""
    if "without_a_compiler" not in request.node.name:
        monkeypatch.setattr(compiled, "BACKEND", {"backend": "aot_eager"})
        monkeypatch.setattr(compiled, "backend_of", lambda device: compiled.BACKEND)


def adamw(network: nn.Module) -> Any:
    """With an ε above the rounding that is the gradient of a bias before batch normalization."""
    return torch.optim.AdamW(network.parameters(), lr=0.01, eps=1e-4)


def sgd(network: nn.Module) -> Any:
    """Whose second step is unlike the first."""
    return torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, dampening=0.1)


def pair(
    mode: Any, build: Any = None, views: bool = False, **options: Any
) -> list[tuple[Any, metapl.BilevelTrainer]]:
    """An eager trainer and a compiled one, alike."""
    made = []
    for on in (False, True):
        case = toy("batch_norm", teacher=noisy_teacher, views=views)
        given = {
            "mode": mode,
            "compile": on,
            "generator": torch.Generator().manual_seed(5),
            **options,
        }
        if build:
            given |= {
                "inner_optimizer": build(case.student),
                "outer_optimizer": build(case.teacher),
            }
        made.append((case, metapl.BilevelTrainer(**case.networks(), **given)))
    return made


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        (Reinforce(baseline=0.9), {}),
        pytest.param(
            "forward", {"build": adamw, "views": True, "clip_norm": 0.5}, marks=pytest.mark.long
        ),
        pytest.param(
            "reinforce_per_example", {"lookahead": 1, "build": adamw}, marks=pytest.mark.long
        ),
        pytest.param("unrolled", {"lookahead": 2}, marks=pytest.mark.long),
        pytest.param("none", {"views": True}, marks=pytest.mark.long),
    ],
)
def test_compiled_steps_are_eager_steps(mode: Any, options: dict[str, Any]) -> None:
    """Reports, weights, statistics, optimizers' states and generators, over four rates with one
    graph; and on with a state that was stored."""
    (eager, plain), (case, on) = pair(mode, **options)
    torch.manual_seed(2)
    before = counters["stats"]["unique_graphs"]
    for number in range(4):
        start, reports = torch.get_rng_state(), []
        for one, trainer in ((eager, plain), (case, on)):
            torch.set_rng_state(start)
            for optimizer in trainer.schedulable:
                optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
            inner = (
                metapl.Lookahead([one.unlabeled] * trainer.lookahead)
                if trainer.lookahead > 1
                else one.unlabeled
            )
            reports.append(trainer.step(one.labeled, inner))
        seen = [
            torch.utils._pytree.tree_leaves((report.feedback, report.student_outputs))
            for report in reports
        ]
        for a, b in zip(*seen, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        theirs, ours = (
            everything(one, *trainer.schedulable) for one, trainer in ((eager, plain), (case, on))
        )
        assert all(
            torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-12)
            for a, b in zip(theirs, ours, strict=True)
        )
    assert counters["stats"]["unique_graphs"] == before + 1


def other_parameter(case: Any, trainer: metapl.BilevelTrainer) -> None:
    layer = next(part for part in case.student.modules() if isinstance(part, nn.Linear))
    old, layer.weight = layer.weight, nn.Parameter(0.9 * layer.weight.detach())
    params = trainer.inner_optimizer.param_groups[0]["params"]
    params[[p is old for p in params].index(True)] = layer.weight


def other_memory(case: Any, trainer: metapl.BilevelTrainer) -> None:
    for p in (*case.student.parameters(), *case.teacher.parameters()):
        p.data = 0.9 * p.data


def earlier(case: Any, trainer: metapl.BilevelTrainer) -> None:
    state = copy.deepcopy(trainer.state_dict())
    trainer.step(**case.data())
    trainer.load_state_dict(state)


def groups(name: str, value: Any) -> Any:
    return lambda case, trainer: [
        g.update({name: value}) for o in trainer.schedulable for g in o.param_groups
    ]


CHANGES: dict[str, Any] = {
    "other parameters": other_parameter,
    "other memory": other_memory,
    "an earlier state": earlier,
    "no optimizer's state": lambda case, trainer: trainer.inner_optimizer.state.clear(),
    "a rate that is a tensor": groups("lr", torch.tensor(0.02, dtype=torch.float64)),
    "a frozen part": lambda case, trainer: case.student[0].requires_grad_(False),
}


@pytest.mark.parametrize("how", ["plain", pytest.param("captured", marks=pytest.mark.long)])
@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_between_steps_counts(
    what: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the eager road: weights, statistics and optimizers' states."""
    if how == "plain":
        monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    ends = []
    for case, trainer in pair("forward", sgd):
        torch.manual_seed(2)
        trainer.step(**case.data())
        trainer.step(**case.data())
        torch.manual_seed(3)
        CHANGES[what](case, trainer)
        for number in range(3):
            torch.manual_seed(number)
            trainer.step(**case.data())
        ends.append(everything(case, *trainer.schedulable))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-9, atol=1e-12)


class Again(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=True)


def appended(part: nn.Module) -> Any:
    return lambda case: case.student.append(part)


REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "a reentrant checkpoint": (appended(Again()), {}),
    "a transform": (None, {"inner_optimizer": torchopt.sgd(0.1, momentum=0.9)}),
    "accumulate": (None, {"accumulate": 2}),
    "implicit": (None, {"mode": "implicit"}),
    "four steps": (None, {"lookahead": 4}),
}


def test_a_step_is_compared_until_one_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, real = list[str](), compiled.refuse_other
    monkeypatch.setattr(
        compiled, "refuse_other", lambda *given: compared.append("") or real(*given)
    )
    case = toy("mlp")
    monkeypatch.setattr(torch, "compile", lambda step, **how: step)
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    trainer = metapl.BilevelTrainer(
        case.teacher, case.student, "forward", inner_optimizer=inner, compile=True
    )
    for rate in (0.0, 0.1, 0.2):  # a warm-up begins with 0, by which h is 0 on both roads
        inner.param_groups[0]["lr"] = rate
        trainer.step(case.labeled, case.unlabeled)
    assert len(compared) == 2


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_captured_is_refused_at_the_first_step_and_nothing_moves(what: str) -> None:
    change, options = REFUSED[what]
    case = toy("mlp")
    if change is not None:
        change(case)
    trainer = metapl.BilevelTrainer(
        **case.networks(), **{"mode": "forward", **options}, compile=True
    )
    before = everything(case)
    inner = metapl.Lookahead([case.unlabeled] * 4) if trainer.lookahead == 4 else case.unlabeled
    with pytest.raises(
        RuntimeError if what == "a reentrant checkpoint" else MetaplError
    ):  # the former is torch's
        trainer.step(case.labeled, inner)
    assert same(before, everything(case))


@pytest.mark.long
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="with a compiler there is a graph to compile"
)
def test_without_a_compiler_one_error_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path)
    )  # what was compiled before needs no compiler
    (_, _), (case, trainer) = pair("reinforce")
    before = everything(case)
    nowhere = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)})
    with nowhere, pytest.raises(MetaplError, match="compile"):
        trainer.step(**case.data())
    assert same(before, everything(case))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_network_alone_is_compiled_too(accumulate: int) -> None:
    """The weights and statistics of the eager training, dropout included.

    The graphs are counted.
    """
    ends = []
    for on in (False, True):
        torch.manual_seed(1)
        network = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)
        )
        sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        trainer = metapl.LossTrainer(network, optimizer=sgd, accumulate=accumulate, compile=on)
        graphs = counters["stats"]["unique_graphs"]
        for _ in range(3):
            trainer.step((torch.randn(8, 5), torch.arange(8) % 3))
        assert (counters["stats"]["unique_graphs"] > graphs) == on
        ends.append([t.double() for t in network.state_dict().values()])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


ROWS = [
    (MODES[i % 7], [*OPTIMIZERS][i % 4], FEATURES[(i + 5) % 9]) for i in range(32)
]  # 7, 4 and 9 have no factor
MIXED = [(mode, optimizer, feature) for mode, optimizer, feature in ROWS if fits(mode, feature)][
    :24
]
MUON = "forward", "muon_and_adamw", "batch_norm"
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor needs a C++ compiler"
)


@pytest.mark.parametrize(
    ("backend", "mode", "optimizer", "feature"),
    [
        pytest.param(
            "aot_eager", *row, marks=[pytest.mark.long] * (row != ("forward", "adamw", "groups"))
        )
        for row in (*MIXED, MUON)
    ]
    + [
        pytest.param("inductor", *row, marks=[needs_compiler, pytest.mark.long])
        for row in (*MIXED[:9], MUON)
    ],
)
def test_a_step_is_captured_whole(backend: str, mode: str, optimizer: str, feature: str) -> None:
    """In one graph, with the labels and masks of the plain function, and no new one for another rate."""
    trainer, data = build(mode, optimizer, feature), batches(feature)
    step, state = trainer.functional()
    options = {"options": {"fallback_random": True}} if backend == "inductor" else {}
    before = counters["stats"]["unique_graphs"]
    captured = torch.compile(step, fullgraph=True, backend=backend, dynamic=False, **options)
    for _ in range(2):
        with torch.no_grad(), no_fast_path(math=True):
            torch.manual_seed(4)
            expected = step(state, *data)
            torch.manual_seed(4)
            found = captured(state, *data)
        found, expected = (
            (s, r._replace(outer_loss=r.flag) if mode == "none" else r)
            for s, r in (found, expected)
        )
        given = (
            but_for_bfloat16(found, expected)
            if optimizer == "muon_and_adamw"
            else (found, expected)
        )
        assert error(*given) < (1e-6 if mode == "difference" else 1e-9)
        state = expected[0]
        state.inner.settings[0]["lr"] = state.inner.settings[0]["lr"] / 2
    assert counters["stats"]["unique_graphs"] == before + 1


STATUSES = {  # a first step with compile=True: taken, taken with a warning, or refused
    "a buffer that counts": "R",
    "straight-through": "A",
    "a checkpoint": "X",
    "an attribute that counts": "X",
    "weights written by .data": "X",
}


@pytest.mark.parametrize(
    ("kind", "how"),
    [("straight-through", "plain"), ("weights written by .data", "plain")]
    + [pytest.param(kind, "captured", marks=pytest.mark.long) for kind in STATUSES],
)
def test_kinds_of_students_compiled(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "plain":
        monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    torch.manual_seed(0)
    batches = {
        "labeled": (torch.randn(8, 4), torch.randint(C, (8,))),
        "unlabeled": torch.randn(8, 4),
    }
    made = metapl.BilevelTrainer(nn.Linear(4, C), Own(*KINDS[kind][1:]), "forward", compile=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", VerificationWarning)
        try:
            made.step(**batches)
            status = "A" if found else "R"
        except MetaplError:
            status = "X"
    # Dynamo takes checkpoints as torch has them before 2.13, and the step is the eager one: it is
    # compared.
    if kind == "a checkpoint" and torch.__version__ < TorchVersion("2.13"):
        assert status == "R"
    else:
        assert status == STATUSES[kind]
    assert torch._C._autograd._saved_tensors_hooks_is_enabled()  # checkpoints go on


def test_an_outer_batch_is_read_once_on_both_roads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a problem that makes a dict of it, which it cannot read again."""
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    labeled, unlabeled = ((torch.randn(n, 4), torch.arange(n) % 3) for n in (5, 6))
    ends = []
    for on in (False, True):
        torch.manual_seed(0)
        network = nn.Linear(4, 3)
        given: Any = {
            "inner_optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
            "problem": Named(),
            "compile": on,
        }
        one = metapl.hypergradient(
            None, network, labeled=labeled, unlabeled=unlabeled, mode="forward", **given
        )
        step = metapl.BilevelTrainer(None, network, "forward", **given).step(labeled, unlabeled)
        ends.append([one.feedback, step.feedback, network.weight.detach()])
    torch.testing.assert_close(*ends)
