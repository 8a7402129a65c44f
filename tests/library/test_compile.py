"""``compile=True`` takes the eager trainer's steps, or refuses in one line.

Modules and optimizers own their weights and states, as on the eager road.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from captures import as_functions, without_inductor
from kinds import KINDS, C, TwoLayers
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
from torch.fx import GraphModule
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch_versions import require_torch

import metapl
from metapl import MetaplError
from metapl.execution.compare import TRIES
from metapl.feedback import Reinforce
from metapl.functional import compared_step, compiled, graphs, operations, training
from metapl.guards.verification import VerificationWarning


@pytest.fixture(autouse=True)
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """Capture without Inductor, where the mechanics matter; return the graphs.

    Tests that need a compiler have one.
    """
    if request.node.get_closest_marker("skipif") or "without_a_compiler" in request.node.name:
        return []
    return without_inductor(monkeypatch)


def adamw(network: nn.Module) -> Any:
    """Return AdamW with an ε above the rounding error of a gradient that is 0.

    Such is the gradient of a bias before batch normalization.
    """
    return torch.optim.AdamW(network.parameters(), lr=0.01, eps=1e-4)


def sgd(network: nn.Module) -> Any:
    """Return SGD whose second step is unlike the first."""
    return torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, dampening=0.1)


def pair(
    mode: Any, build: Any = None, views: bool = False, **options: Any
) -> list[tuple[Any, metapl.BilevelTrainer]]:
    """Return an eager trainer and a compiled one, alike, each with its case.

    Args:
        build: makes the optimizer of a network; None: the default ones.
        options: of the trainers.
    """
    pairs: list[tuple[Any, metapl.BilevelTrainer]] = []
    for compile in (False, True):
        case = toy("batch_norm", teacher=noisy_teacher, views=views)
        trainer = metapl.BilevelTrainer(
            **case.networks(),
            mode=mode,
            compile=compile,
            generator=torch.Generator().manual_seed(5),
            inner_optimizer=build(case.student) if build else None,
            outer_optimizer=build(case.teacher) if build else None,
            **options,
        )
        pairs.append((case, trainer))
    return pairs


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
def test_compiled_steps_are_eager_steps(
    mode: Any, options: dict[str, Any], traced: list[GraphModule]
) -> None:
    """Compare reports, weights, statistics, optimizers' states and generators.

    Four rates are taken by one graph.
    """
    pairs = pair(mode, **options)
    torch.manual_seed(2)
    for number in range(4):
        generator_state = torch.get_rng_state()
        seen: list[list[Tensor]] = []
        for case, trainer in pairs:
            torch.set_rng_state(generator_state)
            for optimizer in trainer.schedulable:
                optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
            inner = case.unlabeled
            if trainer.lookahead > 1:
                inner = metapl.Lookahead([case.unlabeled] * trainer.lookahead)
            report = trainer.step(case.labeled, inner)
            of_report = tree_leaves((report.feedback, report.student_outputs))
            seen.append([*of_report, *everything(case, *trainer.schedulable)])
        for eager, compiled_one in zip(*seen, strict=True):
            torch.testing.assert_close(eager.double(), compiled_one.double(), rtol=1e-9, atol=1e-12)
    assert len(traced) == 1


def test_a_report_is_read_when_later_steps_are_over(traced: list[GraphModule]) -> None:
    """A compiled step makes its report when it is read; of a copy too, and with a print."""
    reports = []
    for case, trainer in pair("forward"):
        torch.manual_seed(2)
        report = trainer.step(**case.data())
        trainer.step(**case.data())
        reports.append(report)
    eager, compiled_one = reports
    copies = [copy.copy(compiled_one), pickle.loads(pickle.dumps(compiled_one))]
    assert repr(copies.pop(0)).startswith("StepReport(step=0, inner_loss=")
    assert compiled_one.as_dict() == pickle.loads(pickle.dumps(compiled_one)).as_dict()
    for report in (compiled_one, *copies):
        assert report.as_dict() == pytest.approx(eager.as_dict())
        torch.testing.assert_close(report.signal.value, eager.signal.value)
        assert not report.flag
        assert not hasattr(report, "another")


def other_parameter(case: Any, trainer: metapl.BilevelTrainer) -> None:
    layer = next(part for part in case.student.modules() if isinstance(part, nn.Linear))
    old_weight = layer.weight
    layer.weight = nn.Parameter(0.9 * old_weight.detach())
    params = trainer.inner_optimizer.param_groups[0]["params"]
    is_old = [p is old_weight for p in params]
    params[is_old.index(True)] = layer.weight


def other_memory(case: Any, trainer: metapl.BilevelTrainer) -> None:
    for p in (*case.student.parameters(), *case.teacher.parameters()):
        p.data = 0.9 * p.data


def earlier_state(case: Any, trainer: metapl.BilevelTrainer) -> None:
    state = copy.deepcopy(trainer.state_dict())
    trainer.step(**case.data())
    trainer.load_state_dict(state)


def rate_as_tensor(case: Any, trainer: metapl.BilevelTrainer) -> None:
    for optimizer in trainer.schedulable:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.02, dtype=torch.float64)


def frozen_part(case: Any, trainer: metapl.BilevelTrainer) -> None:
    case.student[0].requires_grad_(requires_grad=False)


CHANGES: dict[str, Any] = {
    "other parameters": other_parameter,
    "other memory": other_memory,
    "an earlier state": earlier_state,
    "no optimizer's state": lambda case, trainer: trainer.inner_optimizer.state.clear(),
    "a rate that is a tensor": rate_as_tensor,
    "a frozen part": frozen_part,
}


@pytest.mark.parametrize("backend", ["plain", pytest.param("captured", marks=pytest.mark.long)])
@pytest.mark.parametrize("change", CHANGES)
# A first step by this optimizer is another one than the others, for each of the two networks.
@pytest.mark.filterwarnings("ignore:a step is recorded for the third time")
def test_what_is_changed_between_steps_counts(
    change: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare weights, statistics and optimizers' states with those of the eager road."""
    if backend == "plain":
        as_functions(monkeypatch)
    ends = []
    for case, trainer in pair("forward", sgd):
        torch.manual_seed(2)
        trainer.step(**case.data())
        trainer.step(**case.data())
        torch.manual_seed(3)
        CHANGES[change](case, trainer)
        for number in range(3):
            torch.manual_seed(number)
            trainer.step(**case.data())
        ends.append(everything(case, *trainer.schedulable))
    for eager, compiled_one in zip(*ends, strict=True):
        torch.testing.assert_close(eager.double(), compiled_one.double(), rtol=1e-9, atol=1e-12)


class Reentrant(nn.Module):
    """A layer behind a checkpoint that Dynamo does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=True)


class DropoutInCheckpoint(nn.Module):
    """A layer with dropout behind a checkpoint, as language models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def test_dropout_in_a_checkpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint puts generators back before it runs again, which no graph does."""
    without_inductor(monkeypatch)
    case = toy("mlp")
    case.student.append(DropoutInCheckpoint())
    trainer = metapl.BilevelTrainer(**case.networks(), mode="forward", compile=True)
    with pytest.raises(MetaplError, match="DropoutInCheckpoint has a checkpoint: dropout in it"):
        trainer.step(case.labeled, case.unlabeled)


# By what is refused: the trainer's options.
REFUSED: dict[str, dict[str, Any]] = {
    "a reentrant checkpoint": {},
    "a transform": {"inner_optimizer": torchopt.sgd(0.1, momentum=0.9)},
    "accumulate": {"accumulate": 2},
    "implicit": {"mode": "implicit"},
    "four steps": {"lookahead": 4},
}


def test_a_setting_may_become_0_and_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has no weight decay of 0 among its settings."""
    without_inductor(monkeypatch)
    ends = []
    for compiles in (True, False):
        case = toy("mlp")
        inner = torch.optim.SGD(case.student.parameters(), lr=0.1, momentum=0.9)
        trainer = metapl.BilevelTrainer(
            case.teacher, case.student, "forward", inner_optimizer=inner, compile=compiles
        )
        for decay in (0.3, 0.3, 0.0, 0.0, 0.3):
            inner.param_groups[0]["weight_decay"] = decay
            trainer.step(case.labeled, case.unlabeled)
        ends.append(nn.utils.parameters_to_vector(case.student.parameters()).detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_compiled_steps_leave_optimizers_and_gradients_as_eager_ones_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_functions(monkeypatch)
    networks = [nn.Linear(4, 3), nn.Linear(4, 3)]
    trainer = metapl.BilevelTrainer(*networks, "forward", compile=True)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in trainer.schedulable]
    weights = [p for network in networks for p in network.parameters()]
    for p in weights:
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            trainer.step((torch.randn(6, 4), torch.arange(6) % 3), torch.randn(6, 4))
            for scheduler in schedulers:
                scheduler.step()
    assert [o.param_groups[0]["lr"] for o in trainer.schedulable] == [0.0125, 0.0125]
    assert all(p.grad is None for p in weights)


def test_a_step_is_compared_until_one_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_other_than_eager = compiled.refuse_other_than_eager
    comparisons = itertools.count()

    def counted(*arguments: Any, **options: Any) -> bool:
        next(comparisons)
        return refuse_other_than_eager(*arguments, **options)

    monkeypatch.setattr(compiled, "refuse_other_than_eager", counted)
    case = toy("mlp")
    as_functions(monkeypatch)
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    trainer = metapl.BilevelTrainer(
        case.teacher, case.student, "forward", inner_optimizer=inner, compile=True
    )
    # A warm-up begins with 0, by which h is 0 on both roads.
    for rate in (0.0, 0.1, 0.2):
        inner.param_groups[0]["lr"] = rate
        trainer.step(case.labeled, case.unlabeled)
    assert next(comparisons) == 2


@pytest.mark.parametrize(("most", "warns"), [(5_000, False), (100, True)])
def test_compiling_many_operations_is_advised_against(
    monkeypatch: pytest.MonkeyPatch, most: int, *, warns: bool
) -> None:
    """Before the compiler begins; the step is taken."""
    monkeypatch.setattr(operations, "MANY_OPERATIONS", most)
    monkeypatch.setattr(graphs, "_CACHE", {})
    networks = [nn.Sequential(*(nn.Linear(4, 4) for _ in range(2))) for _ in range(2)]
    trainer = metapl.BilevelTrainer(*networks, "forward", compile=True)
    batches = (torch.randn(4, 4), torch.arange(4)), torch.randn(4, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.step(*batches)
        trainer.step(*batches)
    texts = [str(warning.message) for warning in caught if "operations" in str(warning.message)]
    assert len(texts) == (1 if warns else 0)
    if warns:
        assert "leave compile out" in texts[0]
    assert trainer.steps_done == 2


def reverse_groups(trainer: metapl.BilevelTrainer) -> None:
    trainer.inner_optimizer.param_groups.reverse()


def merge_groups(trainer: metapl.BilevelTrainer) -> None:
    first, second = trainer.inner_optimizer.param_groups
    first["params"] += second["params"]
    trainer.inner_optimizer.param_groups.remove(second)


def move_to_another_group(trainer: metapl.BilevelTrainer) -> None:
    first, second = trainer.inner_optimizer.param_groups
    second["params"].append(first["params"].pop())


def maximize(trainer: metapl.BilevelTrainer) -> None:
    trainer.inner_optimizer.param_groups[0]["maximize"] = True


def change_betas_in_place(trainer: metapl.BilevelTrainer) -> None:
    trainer.inner_optimizer.param_groups[0]["betas"][0] = 0.1


def change_rate(trainer: metapl.BilevelTrainer) -> None:
    trainer.inner_optimizer.param_groups[1]["lr"] = 0.05


def register_buffer(trainer: metapl.BilevelTrainer) -> None:
    trainer.student.register_buffer("steps", torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    "change",
    [
        reverse_groups,
        merge_groups,
        move_to_another_group,
        maximize,
        change_betas_in_place,
        change_rate,
        register_buffer,
    ],
)
def test_what_changes_between_steps_is_seen(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[metapl.BilevelTrainer], None]
) -> None:
    """Compare with an eager trainer after each step; the change is taken back at the end."""
    as_functions(monkeypatch)
    trainers = []
    for compile in (False, True):
        torch.manual_seed(0)
        teacher, student = (nn.Linear(4, 3).double() for _ in range(2))
        groups: list[dict[str, Any]] = [
            {"params": [student.weight], "betas": [0.9, 0.99]},
            {"params": [student.bias], "lr": 0.1},
        ]
        inner = torch.optim.Adam(groups, lr=0.01, eps=1e-3)
        trainers.append(
            metapl.BilevelTrainer(
                teacher, student, mode="forward", inner_optimizer=inner, compile=compile
            )
        )
    labeled = torch.randn(6, 4).double(), torch.arange(6) % 3
    unlabeled = torch.randn(6, 4).double()

    def step() -> None:
        for trainer in trainers:
            trainer.step(labeled, unlabeled)
        eager, compiled_trainer = trainers
        for network, other in zip(
            (eager.student, eager.teacher),
            (compiled_trainer.student, compiled_trainer.teacher),
            strict=True,
        ):
            torch.testing.assert_close(other.state_dict(), network.state_dict())

    for _ in range(2):
        step()
    for trainer in trainers:
        change(trainer)
    for _ in range(2):
        step()
    if change in (reverse_groups, move_to_another_group):
        for trainer in trainers:
            trainer.inner_optimizer.param_groups.reverse()
    step()


class Traced(nn.Module):
    """A layer and a weight, which ``torch.fx`` copies into other tables."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) @ self.weight


def test_a_copy_reads_the_tables_of_its_own_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a graph module hold other tables than the copies of those tables."""
    as_functions(monkeypatch)
    labeled = torch.randn(8, 4), torch.arange(8) % 3
    unlabeled = torch.randn(8, 4)
    student = torch.fx.symbolic_trace(Traced())
    inner = torch.optim.SGD(student.parameters(), lr=0.5)
    trainer = metapl.BilevelTrainer(nn.Linear(4, 3), student, "unrolled", inner_optimizer=inner)
    trainer.step(labeled, unlabeled)
    twin = copy.deepcopy(trainer)
    reports = [which.step(labeled, unlabeled) for which in (trainer, twin)]
    torch.testing.assert_close(reports[1].feedback, reports[0].feedback)
    # The first compiled step is compared with that of a copy.
    metapl.BilevelTrainer(nn.Linear(4, 3), student, "forward", compile=True).step(
        labeled, unlabeled
    )


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_captured_is_refused_at_the_first_step_and_nothing_moves(
    reason: str,
) -> None:
    case = toy("mlp")
    expected: type[Exception] = MetaplError
    if reason == "a reentrant checkpoint":
        case.student.append(Reentrant())
        # It is torch that refuses it, in the eager step.
        expected = RuntimeError
    options: dict[str, Any] = {"mode": "forward", **REFUSED[reason]}
    trainer = metapl.BilevelTrainer(**case.networks(), **options, compile=True)
    tensors_before = everything(case)
    inner = case.unlabeled
    if trainer.lookahead == 4:
        inner = metapl.Lookahead([case.unlabeled] * 4)
    with pytest.raises(expected):
        trainer.step(case.labeled, inner)
    assert same(tensors_before, everything(case))


def test_an_operation_without_a_second_derivative_is_named() -> None:
    """The eager step finds its ż in forward mode, and takes it."""
    networks = [nn.Sequential(nn.Linear(4, 4), nn.Hardsigmoid()) for _ in range(2)]
    batches = (torch.randn(4, 4), torch.arange(4)), torch.randn(4, 4)
    metapl.BilevelTrainer(*networks, mode="forward").step(*batches)
    trainer = metapl.BilevelTrainer(*networks, mode="forward", compile=True)
    with pytest.raises(MetaplError, match="aten::hardsigmoid_backward lacks a derivative"):
        trainer.step(*batches)


@pytest.mark.long
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="with a compiler there is a graph to compile"
)
def test_without_a_compiler_one_error_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # What was compiled before, and is in the cache, needs no compiler.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (_, _), (case, trainer) = pair("reinforce")
    tensors_before = everything(case)
    nowhere = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)})
    with nowhere, pytest.raises(MetaplError, match="compile"):
        trainer.step(**case.data())
    assert same(tensors_before, everything(case))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_network_alone_is_compiled_too(accumulate: int) -> None:
    """Compare weights and statistics with the eager training's, dropout included.

    The graphs are counted.
    """
    ends = []
    for compile in (False, True):
        torch.manual_seed(1)
        network = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)
        )
        sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        trainer = metapl.LossTrainer(network, optimizer=sgd, accumulate=accumulate, compile=compile)
        graphs_before = counters["stats"]["unique_graphs"]
        for _ in range(3):
            trainer.step((torch.randn(8, 5), torch.arange(8) % 3))
        assert (counters["stats"]["unique_graphs"] > graphs_before) == compile
        ends.append([t.double() for t in network.state_dict().values()])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


# 7, 4 and 9 have no common factor, so that all pairs come.
ROWS = [(MODES[i % 7], [*OPTIMIZERS][i % 4], FEATURES[(i + 5) % 9]) for i in range(32)]
MIXED = [row for row in ROWS if fits(row[0], row[2])][:24]
MUON = ("forward", "muon_and_adamw", "batch_norm")
QUICK = ("forward", "adamw", "groups")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor needs a C++ compiler"
)


@needs_compiler
def test_columns_of_a_larger_table_are_read_where_they_lie() -> None:
    """A first step is taken on copies, whose columns a graph would read beyond their end."""
    ends = []
    for compile in (False, True):
        torch.manual_seed(1)
        teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            "forward",
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.1),
            compile=compile,
        )
        table = torch.randn(10, 9)
        labels = torch.randint(3, (10, 2))
        for _ in range(2):
            trainer.step((table[:, 2:6], labels[:, 1]), torch.randn(12, 9)[:, :8:2])
        ends.append(nn.utils.parameters_to_vector(teacher.parameters()).detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_a_sum_is_compiled_apart_from_the_product_before_it() -> None:
    """Inductor would join them to ``addmm``, which copies the summand first."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    def sums(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, x, weight).tanh() + x @ weight

    step = metapl.functional.recorded(sums, compile=True)
    given = torch.randn(5, 4), torch.randn(4, 3), torch.randn(3)
    with fresh_cache():
        result, codes = run_and_get_code(step, *given)
    products = [line for line in "".join(codes).splitlines() if "mm_out(" in line]
    assert len(products) == 2
    assert not any("addmm" in line for line in products)
    torch.testing.assert_close(result, sums(*given))


@pytest.mark.parametrize(
    ("dtype", "products"), [(torch.float32, ["mm", "mm"]), (torch.bfloat16, ["addmm", "mm"])]
)
def test_a_sum_in_half_precision_is_rounded_once(dtype: torch.dtype, products: list[str]) -> None:
    def sums(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [torch.addmm(bias, x, weight).tanh() + x @ weight]

    given = [torch.randn(shape, dtype=dtype) for shape in ((5, 4), (4, 3), (3,))]
    graph = operations.graph_of(sums, given)
    apart = operations.with_sums_apart(graph)
    kinds = [str(node.target).split(".")[1] for node in apart.graph.nodes if "mm" in node.name]
    assert kinds == products
    torch.testing.assert_close(apart(*given), graph(*given))


@needs_compiler
def test_a_cast_to_half_precision_rounds_compiled_too() -> None:
    """Inductor would leave out one that is cast back."""
    require_torch("2.12", "a graph keeps the cast")

    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().float() - x

    x = torch.randn(50)
    assert torch.equal(metapl.functional.recorded(rounded, compile=True)(x), rounded(x))


@pytest.mark.long
@needs_compiler
def test_tasks_that_are_columns_are_compiled() -> None:
    torch.manual_seed(0)
    network = nn.Linear(4, 3)
    x, y = torch.randn(5, 12, 4), torch.randint(3, (5, 12))
    found = [
        metapl.hypergradient(
            None,
            network,
            outer=(x[:, 8:], y[:, 8:]),
            inner=(x[:, :8], y[:, :8]),
            problem=metapl.problems.EqualWeights(),
            inner_optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            wrt="start",
            tasks=True,
            compile=compile,
        ).start["weight"]
        for compile in (False, True)
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "mode", "optimizer", "feature"),
    [pytest.param("replay", *QUICK)]
    + [pytest.param("replay", *row, marks=pytest.mark.long) for row in (*MIXED, MUON)]
    + [
        pytest.param("inductor", *row, marks=[needs_compiler, pytest.mark.long])
        for row in (*MIXED[:9], MUON)
    ],
)
def test_a_step_is_recorded_whole(backend: str, mode: str, optimizer: str, feature: str) -> None:
    """One graph has the labels and masks of the plain function, and serves another rate too."""
    data = batches(feature)
    step, state = build(mode, optimizer, feature).functional()
    captured = metapl.functional.recorded(step, compile=backend == "inductor")
    for _ in range(2):
        with torch.no_grad():
            torch.manual_seed(4)
            next_state, report = step(state, *data)
            torch.manual_seed(4)
            captured_state, captured_report = captured(state, *data)
        if mode == "none":
            # It has no outer loss, which is NaN.
            report = report._replace(outer_loss=report.flag)
            captured_report = captured_report._replace(outer_loss=captured_report.flag)
        outcomes = (captured_state, captured_report), (next_state, report)
        if optimizer == "muon_and_adamw":
            outcomes = but_for_bfloat16(*outcomes)
        assert error(*outcomes) < (1e-6 if mode == "difference" else 1e-9)
        state = next_state
        state.inner.settings[0]["lr"] = state.inner.settings[0]["lr"] / 2
    assert captured.recordings == 1


# A first step with compile=True is (R) taken, (A) taken with a warning, or (X) refused.
STATUSES = {
    "a buffer that counts": "R",
    "straight-through": "A",
    "a checkpoint": "R",
    "an attribute that counts": "X",
    "weights written by .data": "X",
}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("straight-through", "plain"), ("weights written by .data", "plain")]
    + [pytest.param(kind, "captured", marks=pytest.mark.long) for kind in STATUSES],
)
def test_kinds_of_students_compiled(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "plain":
        as_functions(monkeypatch)
    torch.manual_seed(0)
    labeled = torch.randn(8, 4), torch.randint(C, (8,))
    unlabeled = torch.randn(8, 4)
    trainer = metapl.BilevelTrainer(
        nn.Linear(4, C), TwoLayers(*KINDS[kind][1:]), "forward", compile=True
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VerificationWarning)
        try:
            trainer.step(labeled, unlabeled)
            status = "A" if caught else "R"
        except MetaplError:
            status = "X"
    # Dynamo takes checkpoints as torch has them before 2.13, and the step is the eager one: it is
    # compared.
    if kind == "a checkpoint" and torch.__version__ < TorchVersion("2.13"):
        assert status == "R"
    else:
        assert status == STATUSES[kind]
    # Checkpoints go on.
    assert torch._C._autograd._saved_tensors_hooks_is_enabled()


def test_an_outer_batch_is_read_once_on_both_roads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem makes a dict of it, which it could not read once more."""
    as_functions(monkeypatch)
    labeled = torch.randn(5, 4), torch.arange(5) % 3
    unlabeled = torch.randn(6, 4), torch.arange(6) % 3
    ends = []
    for compile in (False, True):
        torch.manual_seed(0)
        network = nn.Linear(4, 3)
        options: dict[str, Any] = {
            "mode": "forward",
            "inner_optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
            "problem": Named(),
            "compile": compile,
        }
        gradient = metapl.hypergradient(None, network, outer=labeled, inner=unlabeled, **options)
        report = metapl.BilevelTrainer(None, network, **options).step(labeled, unlabeled)
        ends.append([gradient.feedback, report.feedback, network.weight.detach()])
    torch.testing.assert_close(*ends)


def normed_network() -> nn.Module:
    """Return a network with biases before batch norms, whose gradients are 0 but for rounding."""
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def test_a_bias_before_a_norm_is_no_reason_at_any_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    as_functions(monkeypatch)
    with_other_bits = 0
    for seed in range(30):
        torch.manual_seed(seed)
        teacher, student = normed_network(), normed_network()
        optimizers = [
            torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
            for network in (student, teacher)
        ]
        outer, inner = (torch.randn(24, 6), torch.arange(24) % 3), torch.randn(30, 6)
        states = []
        twin = copy.deepcopy((teacher, student, optimizers))
        for networks, compile in ((twin, False), ((teacher, student, optimizers), True)):
            trainer = metapl.BilevelTrainer(
                networks[0],
                networks[1],
                "forward",
                inner_optimizer=networks[2][0],
                outer_optimizer=networks[2][1],
                compile=compile,
                verify=False,
            )
            trainer.step(outer, inner)
            states.append([p.detach() for p in networks[1].parameters()])
        with_other_bits += not same(states[0], states[1])
        for eager, by_graph in zip(*states, strict=True):
            torch.testing.assert_close(by_graph, eager, rtol=1e-4, atol=1e-6)
    assert with_other_bits, "the roads round alike, and nothing was tested"


@pytest.mark.parametrize(
    ("make", "decay", "backend"),
    [
        (torch.optim.SGD, 0.0, "plain"),
        (torch.optim.SGD, 1e-4, "plain"),
        (torch.optim.AdamW, 0.0, "captured"),
        (torch.optim.AdamW, 1e-4, "captured"),
    ],
)
def test_a_layer_that_no_loss_reaches_stays_and_does_not_decay(
    make: Any, decay: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an eager step, whose optimizer gets no gradient of it."""
    if backend == "plain":
        as_functions(monkeypatch)

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    torch.manual_seed(0)
    teacher, student = Unused(), Unused()
    optimizers = {
        "inner_optimizer": make(student.parameters(), lr=1e-2, weight_decay=decay),
        "outer_optimizer": make(teacher.parameters(), lr=1e-2, weight_decay=decay),
    }
    trainer = metapl.BilevelTrainer(
        teacher, student, "forward", **optimizers, compile=True, verify=False
    )
    batches = (torch.randn(6, 4), torch.arange(6) % 3), torch.randn(6, 4)
    for network in (teacher, student):
        before = copy.deepcopy(network)
        trainer.step(*batches)
        assert torch.equal(network.unused.weight, before.unused.weight)
        assert not torch.equal(network.used.weight, before.used.weight)


@pytest.mark.parametrize("entry", ["trainer", "hypergradient", "attribute"])
def test_the_third_shape_is_said_with_the_way_out(entry: str) -> None:
    torch.manual_seed(0)
    teacher = nn.Linear(4, 3)
    student = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    outer = torch.randn(8, 4), torch.arange(8) % 3
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    trainer = metapl.BilevelTrainer(
        teacher, student, "forward", inner_optimizer=optimizer, compile=True, verify=False
    )

    def take(rows: int) -> None:
        if entry == "trainer":
            trainer.step(outer, torch.randn(rows, 4))
        elif entry == "hypergradient":
            metapl.hypergradient(
                teacher,
                student,
                outer=outer,
                inner=torch.randn(rows, 4),
                inner_optimizer=optimizer,
                compile=True,
            )
        else:
            data = torch.randn(2 * rows, 4), torch.arange(2 * rows) % 3
            metapl.attribute(
                student,
                data,
                outer,
                optimizer=optimizer,
                steps=2,
                batch_size=rows,
                compile=True,
                progress=False,
            )

    take(9)
    take(11)
    with pytest.warns(UserWarning, match=r"\(11, 4\).* is a tensor \(13, 4\)") as caught:
        take(13)
    assert all("drop_last=True" in str(warning.message) for warning in caught)
    # It is said once.
    take(15)


class Rising(metapl.BilevelProblem):
    """Weights that count more with each step, by a tensor that the problem writes to."""

    def __init__(self) -> None:
        self.step = torch.zeros(())

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Any:
        self.step += 1
        return metapl.Signal(teacher(batch[0]).sigmoid().squeeze(1) * (1 - 0.5**self.step))

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return signal.value * nn.functional.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def test_a_problem_that_writes_state_is_named() -> None:
    batch = torch.randn(8, 4), torch.arange(8) % 3
    problem = Rising()
    trainer = metapl.BilevelTrainer(
        nn.Linear(4, 1), nn.Linear(4, 3), "forward", problem=problem, compile=True
    )
    with pytest.raises(MetaplError, match=r"Rising writes state \(step\)"):
        trainer.step(batch, batch)
    assert float(problem.step) == 0.0


def test_a_batch_that_is_not_finite_moves_nothing() -> None:
    """In a later step, whose graph was compared."""
    torch.manual_seed(0)
    networks = [nn.Linear(4, 3), nn.Linear(4, 3)]
    trainer = metapl.BilevelTrainer(*networks, "forward", compile=True)
    outer, inner = (torch.randn(6, 4), torch.arange(6) % 3), torch.randn(6, 4)
    trainer.step(outer, inner)
    before = copy.deepcopy([network.state_dict() for network in networks])
    broken = inner.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(MetaplError, match="inner inputs: 1 of 6 rows has NaN; expected"):
        trainer.step(outer, broken)
    assert trainer.steps_done == 1
    after = [network.state_dict() for network in networks]
    assert same(tree_leaves(before), tree_leaves(after))
    trainer.step(outer, inner)
    assert trainer.steps_done == 2


def test_every_capture_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that comes later has another graph, which the first comparison says nothing of."""
    refuse_other_than_eager = compiled.refuse_other_than_eager
    comparisons = itertools.count()

    def counted(*arguments: Any, **options: Any) -> bool:
        next(comparisons)
        return refuse_other_than_eager(*arguments, **options)

    monkeypatch.setattr(compiled, "refuse_other_than_eager", counted)
    torch.manual_seed(0)
    networks = [nn.Linear(4, 3), nn.Linear(4, 3)]
    trainer = metapl.BilevelTrainer(*networks, "forward", compile=True)
    outer = torch.randn(6, 4), torch.arange(6) % 3
    for rows in (6, 5, 6, 5):
        trainer.step(outer, torch.randn(rows, 4))
    assert next(comparisons) == 2


@contextmanager
def other_digits(network: nn.Module) -> Iterator[None]:
    """Change the last digit of each weight in this block, as a graph that adds in another order."""
    generator = torch.Generator().manual_seed(1)
    weights = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1 + 1.2e-7 * torch.randn(p.shape, generator=generator))
    yield
    network.load_state_dict(weights)


def drowned_in_rounding(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of a trainer with a fresh Adam, and batches by which rounding decides h.

    Some columns have gradients of about 1e-9, since they are orthogonal to the residuals of a class
    and have no weight yet. Adam divides them by their own size and its ε of 1e-8.
    """
    torch.manual_seed(seed)
    student = nn.Linear(16, 4)
    x = torch.randn(64, 16)
    y = torch.arange(64) % 4
    with torch.no_grad():
        student.weight[:, :4] = 0.0
        residuals = student(x).softmax(1)[:, 0] - (y == 0).float()
        unit = (residuals / residuals.norm()).double()
        columns = x[:, :4].double()
        x[:, :4] = columns - unit[:, None] * (unit @ columns)
    options = {
        "teacher": metapl.problems.Table(torch.zeros(64)),
        "student": student,
        "problem": metapl.problems.ExampleWeights(),
        "inner_optimizer": torch.optim.AdamW(student.parameters(), lr=3e-3),
        "verify": False,
    }
    return options, {"outer": (torch.randn(40, 16), y[:40]), "inner": (x, y, torch.arange(64))}


@pytest.mark.parametrize("has_moments", [False, True])
def test_a_step_that_rounding_drowns_is_compared_again(
    has_moments: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_of_copy = compared_step.step_of_copy
    refuse_gaps = compared_step.refuse_gaps
    gaps: list[float] = []

    def step_of_other_digits(trainer: Any, *batches: Any) -> Any:
        with other_digits(trainer.student):
            return step_of_copy(trainer, *batches)

    def noted(of_graph: Any, eager: Any, *arguments: Any, **options: Any) -> None:
        if options.get("by_rounding") is None:
            gap = compared_step.distance(of_graph["h"], eager["h"])
            gaps.append(float(gap / compared_step.norm(eager["h"])))
        refuse_gaps(of_graph, eager, *arguments, **options)

    as_functions(monkeypatch)
    monkeypatch.setattr(compared_step, "step_of_copy", step_of_other_digits)
    monkeypatch.setattr(compared_step, "refuse_gaps", noted)
    comparisons: list[int] = []
    for seed in range(4):
        options, batches = drowned_in_rounding(seed)
        if has_moments:
            metapl.BilevelTrainer(**options).step(**batches)
        trainer = metapl.BilevelTrainer(**options, compile=True)
        count_before = len(gaps)
        for _ in range(5):
            trainer.step(**batches)
        comparisons.append(len(gaps) - count_before)
    # Beyond the tolerance of 2 % nothing can be told, and the next step is compared.
    is_drowned = not has_moments
    assert (max(gaps) > 0.02) == is_drowned
    assert (max(comparisons) > 1) == is_drowned


def test_that_rounding_drowns_all_comparisons_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons = itertools.count()

    def drowned(*trees: Any, by_rounding: Any = None, **_: Any) -> None:
        if by_rounding is None:
            next(comparisons)
            raise MetaplError("compiled, h is 0.1 off its eager value; leave compile out.")

    as_functions(monkeypatch)
    monkeypatch.setattr(compared_step, "refuse_gaps", drowned)
    options, batches = drowned_in_rounding(0)
    trainer = metapl.BilevelTrainer(**options, compile=True)
    for _ in range(TRIES):
        trainer.step(**batches)
    with pytest.warns(UserWarning, match=r"cannot tell whether compiled steps are right.* digit"):
        trainer.step(**batches)
    trainer.step(**batches)
    assert next(comparisons) == 1 + TRIES


def test_a_whole_training_that_rounding_drowns_is_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager_gradient = training.eager_gradient
    gaps: list[float] = []

    def gradient_at_other_digits(request: Any, one_step: Any) -> Any:
        found = eager_gradient(request, one_step)
        with other_digits(request.student):
            found_there = eager_gradient(request, one_step)
        h, h_there = found.feedback[0], found_there.feedback[0]
        gaps.append(float((h - h_there).norm() / h.norm()))
        return found_there

    as_functions(monkeypatch)
    monkeypatch.setattr(training, "eager_gradient", gradient_at_other_digits)
    for seed in range(4):
        options, batches = drowned_in_rounding(seed)
        batches["inner"] = metapl.Lookahead([batches["inner"]] * 4)
        with pytest.warns(UserWarning, match="cannot tell whether compiled steps are right"):
            metapl.hypergradient(**options, **batches, compile=True)
    # Three eager gradients each time: the compared one, the same again, and that at other digits.
    assert len(gaps) == 3 * 4 * (1 + TRIES)
    assert max(gaps) > 0.02


class Sparse(nn.Module):
    """An embedding whose gradient is sparse, which no recording adds to a dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, sparse=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).tanh())


def test_what_fails_where_it_is_recorded_is_said_in_one_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    ids = torch.arange(6) % 5
    student = Sparse()
    inner = torch.optim.SGD(student.parameters(), lr=0.1)
    trainer = metapl.BilevelTrainer(
        nn.Sequential(nn.Embedding(5, 3)), student, "forward", inner_optimizer=inner, compile=True
    )
    with pytest.raises(MetaplError, match="cannot take this step: .*; leave compile out"):
        trainer.step((ids, ids % 3), ids)
    assert "Traceback" not in capfd.readouterr().err
