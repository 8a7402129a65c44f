"""Verification: what it says of students, problems and planted faults, mode by mode.

Other tests hold when a trainer verifies.
"""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from feed_sources import same
from kinds import KINDS, PROBLEMS, C, Problem, TwoLayers, norms, plain, put, rounded
from problems_zoo import product, toy, unmoved
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import Lookahead, MetaplError, PseudoLabels
from metapl.feedback import Forward, Implicit, Reinforce, estimator
from metapl.feedback.hypergradient import Request, through_steps
from metapl.guards.verification import (
    GradientCheck,
    VerificationWarning,
    check,
    real_step,
    verdict,
)
from metapl.guards.verification.contract import CONTRACT
from metapl.problems.base import field_name

COLUMNS: dict[str, tuple[Any, int]] = {
    "tangent": (Forward(by="tangent"), 1),
    "graph": (Forward(by="graph"), 1),
    "reinforce": ("reinforce", 1),
    "unrolled": ("unrolled", 1),
    "unrolled, 3 steps": ("unrolled", 3),
    "pure": ("forward", 1),
    "pure, unrolled, 3 steps": ("unrolled", 3),
}
LETTERS = {"R": "right", "A": "allowed", "X": "refused"}


def checked(student: nn.Module, mode: Any = "forward", steps: int = 1, **options: Any) -> str:
    """Return the status; it is ``"refused"`` too where the mode itself refuses."""
    try:
        return check_of(student, mode, steps, **options).status
    except MetaplError:
        return "refused"


def check_of(
    student: nn.Module, mode: Any = "forward", steps: int = 1, **options: Any
) -> GradientCheck:
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))
    batches = [torch.randn(8, 4) for _ in range(steps)]
    defaults: dict[str, Any] = {
        "outer": (torch.randn(8, 4), torch.randint(C, (8,))),
        "inner": batches[0] if steps == 1 else Lookahead(batches),
        "inner_optimizer": torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9),
    }
    problem = options.get("problem")
    if isinstance(problem, Problem):
        vars(problem)["teacher"] = teacher
    return metapl.check_gradient(teacher, student, mode=mode, **{**defaults, **options})


def verify_by(patch: pytest.MonkeyPatch, gradient: Callable[..., Any]) -> None:
    """Let verification find a mode's gradient by a function.

    The function has the networks and options by name.
    """

    def through(request: Request) -> Any:
        found = gradient(
            request.teacher,
            request.student,
            outer=request.outer,
            inner=request.inner,
            mode=request.mode,
            problem=request.problem,
            inner_optimizer=request.inner_optimizer,
            generator=request.generator,
            clip_norm=request.clip_norm,
        )
        is_lookahead = isinstance(found.feedback, tuple)
        of_steps = found.feedback if is_lookahead else (found.feedback,)
        field = "value" if estimator(request.mode).credits == "signal" else "log_prob"
        h_of_steps = []
        for h in of_steps:
            is_dict = isinstance(h, dict)
            h_of_steps.append(
                {field_name(key): t for key, t in h.items()} if is_dict else {field: h}
            )
        return found, h_of_steps

    patch.setattr(real_step, "with_feedback", through)


def by_the_eager_road(teacher: Any, student: Any, *, outer: Any, inner: Any, **options: Any) -> Any:
    """Find a gradient as verification does."""
    return through_steps(
        Request(teacher=teacher, student=student, outer=outer, inner=inner, **options)
    )


def by_the_pure_step(teacher: Any, student: Any, *, inner: Any, outer: Any, **options: Any) -> Any:
    """Return what ``metapl.hypergradient`` does, by the pure step of a trainer.

    The teacher's gradient is that of its step.
    """
    # The rate of 1 makes the step the gradient. A clip_norm is for both networks, and is meant here
    # for the student's alone: so small a weight keeps the teacher's gradient within it.
    weight = 1e-4
    inner_optimizer = options.pop("inner_optimizer").optimizer
    is_lookahead = len(inner) > 1
    try:
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            inner_optimizer=inner_optimizer,
            outer_optimizer=torch.optim.SGD(teacher.parameters(), 1.0),
            teacher_losses=(),
            feedback_weight=weight,
            lookahead=len(inner),
            verify=False,
            **options,
        )
        step, state = trainer.functional()
        with torch.no_grad():
            inner = tuple(inner) if is_lookahead else inner[0]
            next_state, report = step(state, outer, inner)
    except (RuntimeError, AttributeError) as error:
        # functional_call gives a module plain tensors, which some modules cannot take.
        raise MetaplError("no function") from error
    assert report.flag < 0.1
    h = tuple(report.feedback) if isinstance(report.feedback, list) else (report.feedback,)
    grads = {}
    for name, p in state.teacher.params.items():
        grads[name] = (p - next_state.teacher.params[name]) / weight
    return SimpleNamespace(
        feedback=h, grads=grads, direct={}, numbers={}, outer_loss=report.outer_loss
    )


def rows_of(kinds: dict[str, tuple[Any, ...]], long: set[str]) -> list[Any]:
    """Return the rows of each kind: its name, and the letters that are expected by column.

    A long row has every column. The other has the first column of each letter, and the pure road
    where its letter differs from the eager one's.
    """
    rows = []
    for kind, (letters, *_) in kinds.items():
        expected = dict(zip(COLUMNS, letters.replace(" ", ""), strict=True))
        first_columns: dict[str, str] = {}
        for column, letter in expected.items():
            first_columns.setdefault(letter, column)
        few = {column: expected[column] for column in COLUMNS if column in first_columns.values()}
        if expected["pure"] != expected["graph"]:
            few["pure"] = expected["pure"]
        if kind not in long:
            rows.append(pytest.param(kind, few, id=kind))
        rows.append(
            pytest.param(kind, expected, id=f"{kind}, every column", marks=pytest.mark.long)
        )
    return rows


def assert_statuses(
    expected: dict[str, str],
    build_student: Callable[[], nn.Module],
    patch: pytest.MonkeyPatch,
    **options: Any,
) -> None:
    """Compare the statuses in these columns."""
    letters = {name: letter for letter, name in LETTERS.items()}
    statuses = {}
    for column in expected:
        mode, steps = COLUMNS[column]
        if column.startswith("pure"):
            verify_by(patch, by_the_pure_step)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            # The old norms are deprecated.
            warnings.simplefilter("ignore")
            student = build_student()
        status = checked(student, mode, steps, **options)
        statuses[column] = letters.get(status, status)
    assert statuses == expected


LONG = {
    "a momentum encoder",
    "a hook on an activation",
    "a detached average",
    "an average in a buffer",
    "a codebook",
    "a binary layer",
    "a doubled backward",
    "the old weight norm",
    "an average of earlier passes",
    "masks in a checkpoint",
    "a reentrant checkpoint of a function",
    "an embedding within max_norm",
    "numpy's random numbers",
    "weights written by numpy",
    "clamped weights",
    "float32 alone",
}


@pytest.mark.parametrize(("kind", "expected"), rows_of(KINDS, LONG))
def test_kinds_of_students(
    kind: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_statuses(expected, lambda: TwoLayers(*KINDS[kind][1:]), monkeypatch)


@pytest.mark.parametrize(("kind", "expected"), rows_of(PROBLEMS, set()))
def test_kinds_of_problems(
    kind: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, change, options = PROBLEMS[kind]
    problem = Problem(**change)
    assert_statuses(expected, lambda: TwoLayers(plain), monkeypatch, problem=problem, **options)


def gru(student: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 5)
    for part in x.chunk(2, 1):
        h = student.cell(part, h)
    return h


def model(*layers: nn.Module, head: int = 6) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(head, C))


def attention(student: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, student.w(x))


rows = nn.Unflatten(1, (2, 2))
CLEAN: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, C),
    "relu": lambda: model(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()),
    "gelu": lambda: model(nn.Linear(4, 6), nn.GELU()),
    "silu without bias": lambda: model(nn.Linear(4, 6, bias=False), nn.SiLU()),
    "softplus": lambda: model(nn.Linear(4, 6), nn.Softplus()),
    "batch norm": lambda: model(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()),
    "batch norm, eval": lambda: model(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval(),
    "layer norm": lambda: model(nn.Linear(4, 6), nn.LayerNorm(6)),
    "group norm": lambda: model(nn.Linear(4, 6), nn.GroupNorm(2, 6)),
    "rms norm": lambda: model(nn.Linear(4, 6), nn.RMSNorm(6)),
    "dropout": lambda: model(nn.Dropout(0.2), nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4)),
    "convolution": lambda: model(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), head=18
    ),
    "pooling": lambda: model(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 1), nn.MaxPool1d(2)),
    "gru": lambda: model(TwoLayers(gru, put("cell", lambda s: nn.GRUCell(2, 5))), head=5),
    "transformer": lambda: model(
        rows, nn.TransformerEncoderLayer(2, 1, 4, 0.1, batch_first=True), head=4
    ),
    "default attention": lambda: model(
        rows, TwoLayers(attention, put("w", lambda s: nn.Linear(2, 2))), head=4
    ),
    "embeddings": lambda: model(
        TwoLayers(lambda s, x: s.e((x > 0).long()), put("e", lambda s: nn.Embedding(2, 2))), head=8
    ),
    "a residual": lambda: model(
        TwoLayers(lambda s, x: x + s.w(x).tanh(), put("w", lambda s: nn.Linear(4, 4))), head=4
    ),
    "an orthogonal layer": lambda: model(norms.orthogonal(nn.Linear(4, 6))),
    "a zero in a relu": lambda: model(nn.Linear(4, 6), TwoLayers(lambda s, x: (0 * x).relu() + x)),
}
MODES = [mode for mode in metapl.MODES if mode not in ("implicit", "direct", "none")]
MODES_AND_TANGENT = [*MODES, Forward(by="tangent")]


def clean_rows() -> list[Any]:
    """Return a row of each clean student in one mode, in turn, and a long one in all modes."""
    rows = []
    for number, name in enumerate(CLEAN):
        mode = MODES_AND_TANGENT[number % len(MODES_AND_TANGENT)]
        rows.append(pytest.param(name, [mode], id=name))
    for name in CLEAN:
        marks = pytest.mark.long
        rows.append(pytest.param(name, MODES_AND_TANGENT, id=f"{name}, every mode", marks=marks))
    return rows


@pytest.mark.parametrize(("student", "modes"), clean_rows())
def test_clean_students_are_right_in_every_mode(student: str, modes: list[Any]) -> None:
    for mode in modes:
        torch.manual_seed(0)
        gradient_check = check_of(CLEAN[student](), mode)
        assert (mode, gradient_check.status) == (mode, "right"), str(gradient_check)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adam,
        pytest.param(torch.optim.AdamW, marks=pytest.mark.long),
        pytest.param(torch.optim.SGD, marks=pytest.mark.long),
    ],
)
def test_a_fresh_adam_which_is_a_sign_and_relus_at_zero(optimizer: Any) -> None:
    torch.manual_seed(0)
    teacher = model(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 6), nn.ReLU())
    student = model(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 6), nn.ReLU())
    for p in teacher.parameters():
        if p.ndim == 1:
            nn.init.zeros_(p)
    # Half of the inputs are blank, so that there the units stand at zero.
    x = torch.randn(16, 4) * (torch.arange(16) % 2)[:, None]
    labeled = (torch.randn(16, 4), torch.arange(16) % C)
    for mode in MODES:
        gradient_check = metapl.check_gradient(
            teacher,
            student,
            outer=labeled,
            inner=x,
            mode=mode,
            inner_optimizer=optimizer(student.parameters(), lr=1e-3),
        )
        assert (mode, gradient_check.status) == (mode, "right"), str(gradient_check)


@pytest.mark.parametrize(
    ("solver", "kind"), [("cg", "soft"), ("neumann", "hard"), ("identity", "soft")]
)
def test_implicit_beside_double_backward(
    solver: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = Implicit(solver=solver, damping=1.0, step_size=0.1, iterations=5)
    problem = PseudoLabels(kind=kind)
    # It is the derivative, of a student that is not at its optimum.
    expected = "right" if solver == "identity" else "allowed"
    assert checked(TwoLayers(plain), mode, problem=problem) == expected
    plant(monkeypatch, "a hundredth")
    assert checked(TwoLayers(plain), mode, problem=problem) == "refused"


Fault = Callable[..., Any]
"""A call of a real gradient function with its networks and options, in which something is wrong."""


def with_result(change: Callable[[Tensor], Tensor]) -> Fault:
    """Return a call in which the mode's h is changed, and so the teacher's gradient."""

    def call(real: Any, *networks: Any, **options: Any) -> Any:
        gradient = real(*networks, **options)
        h = tuple(map(change, gradient.feedback))
        grads = {name: change(g) for name, g in gradient.grads.items()}
        return replace(gradient, feedback=h, grads=grads)

    return call


def with_options(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Fault:
    """Return a call in which what the mode computes from is changed, beside the real step."""
    return lambda real, *networks, **options: real(*networks, **(options | change(options)))


def with_views(change: Callable[[Tensor, Tensor], Any]) -> Fault:
    def changed(options: dict[str, Any]) -> dict[str, Any]:
        batches = [change(weak, strong) for weak, strong in options["inner"]]
        return {"inner": Lookahead(batches)}

    return with_options(changed)


def with_setting(name: str, value: Any) -> Fault:
    def change(options: dict[str, Any]) -> dict[str, Any]:
        options["inner_optimizer"].optimizer.param_groups[0][name] = value
        return {}

    return with_options(change)


def clear_state(options: dict[str, Any]) -> dict[str, Any]:
    options["inner_optimizer"].optimizer.state.clear()
    return {}


def without_last_row(options: dict[str, Any]) -> dict[str, Any]:
    x, y = options["outer"]
    return {"outer": (x[:-1], y[:-1])}


def with_rolled_labels(options: dict[str, Any]) -> dict[str, Any]:
    x, y = options["outer"]
    return {"outer": (x, y.roll(1))}


def without_first_gradient(real: Any, *networks: Any, **options: Any) -> Any:
    gradient = real(*networks, **options)
    name = next(iter(gradient.grads))
    zeros = torch.zeros_like(gradient.grads[name])
    return replace(gradient, grads=gradient.grads | {name: zeros})


def in_eval(real: Any, teacher: Any, student: Any, **options: Any) -> Any:
    return real(teacher, student.eval(), **options)


def other_masks(real: Any, *networks: Any, **options: Any) -> Any:
    torch.rand(1)
    return real(*networks, **options)


FAULTS: dict[str, Fault] = {
    "none": with_options(lambda o: {}),
    "none, with a clip": with_options(lambda o: {}),
    "the sign": with_result(torch.neg),
    "a mean for a sum": with_result(lambda t: t / 8),
    "a hundredth": with_result(lambda t: 1.01 * t),
    "5e-5": with_result(lambda t: (1 + 5e-5) * t),
    "an offset": with_result(lambda t: t + 1e-3 * t.abs().max()),
    "float16": with_result(lambda t: (16384 * t).half().to(t) / 16384),
    "a parameter lost": without_first_gradient,
    "another rate": with_setting("lr", 0.101),
    "no momentum": with_setting("momentum", 0.0),
    "another momentum": with_setting("momentum", 0.9001),
    "no decay": with_setting("weight_decay", 0.0),
    "no nesterov": with_setting("nesterov", value=False),
    "a velocity forgotten": with_options(clear_state),
    "ascent": with_setting("maximize", value=True),
    "no clip": with_options(lambda o: {"clip_norm": None}),
    "another clip": with_options(lambda o: {"clip_norm": 0.0501}),
    "labels of the other view": with_views(lambda weak, strong: (strong, weak)),
    "the weak view learned": with_views(lambda weak, strong: (weak, weak)),
    "other labels": with_options(with_rolled_labels),
    "a row of the outer batch lost": with_options(without_last_row),
    "a temperature": with_options(lambda o: {"problem": replace(o["problem"], temperature=1.001)}),
    "smoothing forgotten": with_options(
        lambda o: {"problem": replace(o["problem"], label_smoothing=0.0)}
    ),
    "other masks": other_masks,
    "eval": in_eval,
}


def plant(patch: pytest.MonkeyPatch, fault: str) -> None:
    """Let verification find a gradient with a fault."""

    def with_fault(*networks: Any, **options: Any) -> Any:
        return FAULTS[fault](by_the_eager_road, *networks, **options)

    verify_by(patch, with_fault)


@pytest.mark.parametrize(
    ("mode", "fault"), product(["forward", "reinforce", "unrolled"], FAULTS, usual=["forward"])
)
def test_planted_faults_are_refused(fault: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = toy("dropout", views=True, rows=6)
    sgd = torch.optim.SGD(
        case.student.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05
    )
    for p in case.student.parameters():
        p.grad = torch.ones_like(p)
    sgd.step()
    plant(monkeypatch, fault)
    gradient_check = metapl.check_gradient(
        **case.networks(),
        **case.data(),
        mode=mode,
        inner_optimizer=sgd,
        problem=PseudoLabels(label_smoothing=0.1),
        clip_norm=0.05 if "clip" in fault else None,
    )
    assert gradient_check.passed is fault.startswith("none")


def test_what_a_short_type_hides_is_not_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small rate moves what a short type rounds away.

    So it is with sampled labels too, whose drowned numbers count as zero in float64.
    """
    plant(monkeypatch, "the sign")
    for dtype, lr in ((torch.bfloat16, 0.3), (torch.float32, 1e-4)):
        for mode in ("forward", "reinforce_per_example"):
            torch.manual_seed(0)
            student = TwoLayers(lambda s, x, dtype=dtype: s.b(s.a(x).tanh().to(dtype).to(x)))
            sgd = torch.optim.SGD(student.parameters(), lr=lr)
            assert check_of(student, mode, inner_optimizer=sgd).status == "cannot tell"


@pytest.mark.parametrize("mode", ["forward", "reinforce", "reinforce_per_example"])
def test_a_way_past_the_signal_is_seen_where_the_loss_hardly_moves(mode: str) -> None:
    """It hardly moves under a fresh AdamW, whose step is a sign."""
    torch.manual_seed(0)

    def weighted_by_teacher(problem: Any, losses: Tensor, z: Any, x: Any, params: Any) -> Tensor:
        return losses * (1 + problem.teacher(x).softmax(1)[:, 0])

    student = TwoLayers(plain)
    adam = torch.optim.AdamW(student.parameters(), lr=1e-4)
    problem = Problem(inner=weighted_by_teacher)
    gradient_check = check_of(student, mode, problem=problem, inner_optimizer=adam)
    assert gradient_check.status == "refused", str(gradient_check)
    assert "past the signal" in gradient_check.verdict


def build(
    student: nn.Module | None = None, mode: Any = "forward", **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Return a trainer, and the batches of its steps."""
    torch.manual_seed(0)
    if student is None:
        student = TwoLayers(plain)
    batches = {
        "outer": (torch.randn(8, 4), torch.randint(C, (8,))),
        "inner": torch.randn(8, 4),
    }
    return metapl.BilevelTrainer(nn.Linear(4, C), student, mode, **options), batches


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the modes that have been verified."""
    modes: list[str] = []
    verify_step = verdict.verify_step

    def noting(step: Any, mode: Any, *parts: Any) -> Any:
        modes.append(mode.name)
        return verify_step(step, mode, *parts)

    monkeypatch.setattr(verdict, "verify_step", noting)
    return modes


def test_the_first_step_and_each_new_fingerprint(verified: list[str]) -> None:
    trainer, batches = build()

    def freeze_first_layer() -> None:
        trainer.student.a.requires_grad_(requires_grad=False)

    student = trainer.student
    for act in (student.train, student.eval, student.train, freeze_first_layer):
        act()
        trainer.step(**batches)
        trainer.step(**batches)
    assert len(verified) == 3
    resumed, _ = build()
    trainer.student.a.requires_grad_(requires_grad=True)
    resumed.load_state_dict(trainer.state_dict())
    resumed.step(**batches)
    assert len(verified) == 3
    assert resumed.state_dict()["verification"]["verdict"].startswith("right")


@pytest.mark.parametrize(("setting", "times"), [(True, 1), ("warn", 1), (False, 0), (0, 0), (2, 2)])
def test_settings(setting: Any, times: int, verified: list[str]) -> None:
    trainer, batches = build(verify=setting)
    for _ in range(4):
        trainer.step(**batches)
    assert len(verified) == times


def reversed_slopes(student: Any, x: Tensor) -> Tensor:
    z = student.plain(x)
    if z.requires_grad:
        z.register_hook(torch.neg)
    return z


# What a later step refuses, by tangent and by graph; and what one of ten refuses by differences,
# whose slopes may be as far off as those of a hook that doubles a gradient.
LATE: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "a hook on an activation": ("X--", KINDS["a hook on an activation"][1]),
    "a hook that reverses a gradient": ("X-X", reversed_slopes),
    "another jvp than backward": ("X--", KINDS["another jvp than backward"][1]),
    "python's random numbers": ("X-X", KINDS["python's random numbers"][1]),
    "weights written by .data": ("X-X", KINDS["weights written by .data"][1]),
    "an input in place": ("X-X", KINDS["an input in place"][1]),
    "straight-through": ("--.", KINDS["straight-through"][1]),
    "outputs that are not finite": ("XXX", lambda s, x: s.plain(x) / 0),
}


@pytest.mark.parametrize("kind", LATE)
def test_what_begins_after_the_first_step_is_seen_by_the_flag(kind: str) -> None:
    expected, forward = LATE[kind]
    # Two draws of Python's generator may be alike.
    random.seed(0)

    def plain_at_first(student: Any, x: Tensor) -> Tensor:
        return forward(student, x) if student.is_late else student.plain(x)

    letters = ""
    for mode, steps in ((Forward(by="tangent"), 1), (Forward(by="graph"), 1), ("difference", 10)):
        student = TwoLayers(plain_at_first, put("is_late", lambda s: False))
        trainer, batches = build(student, mode)
        trainer.step(**batches)
        student.is_late = True
        try:
            for _ in range(steps):
                trainer.step(**batches)
            letters += "-"
        except MetaplError:
            letters += "X"
    assert re.fullmatch(expected, letters), letters


@pytest.mark.parametrize(
    ("mode", "rate"), [("forward", 0.1), ("loss_difference", 0.1), ("forward", 0.0)]
)
def test_a_refusal_moves_nothing_and_comes_again(
    mode: Any, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict is the same where the first rate is 0, as that of a warm-up.

    By it any gradient would be right.
    """
    case = toy("dropout")
    plant(monkeypatch, "the sign")
    inner = torch.optim.SGD(case.student.parameters(), lr=rate)
    trainer = metapl.BilevelTrainer(case.teacher, case.student, mode, inner_optimizer=inner)
    random_state = random.getstate()
    with unmoved(case, trainer.inner_optimizer, trainer.outer_optimizer):
        for _ in range(2):
            with pytest.raises(MetaplError, match="mode"):
                trainer.step(**case.data())
    assert random.getstate() == random_state


def test_the_rates_of_a_warm_up_are_verified_at_their_full_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[float] = []
    judge = verdict.judge

    def noted(copies: Any, *arguments: Any, **options: Any) -> Any:
        found = judge(copies, *arguments, **options)
        seen.append(copies.update.optimizer.param_groups[0]["lr"])
        return found

    monkeypatch.setattr(verdict, "judge", noted)
    case = toy()
    inner = torch.optim.SGD(case.student.parameters(), lr=0.2)
    torch.optim.lr_scheduler.LambdaLR(inner, lambda step: (step + 1) / 100)
    assert inner.param_groups[0]["lr"] == 0.002
    trainer = metapl.BilevelTrainer(case.teacher, case.student, inner_optimizer=inner)
    trainer.step(**case.data())
    assert seen == [0.2]
    assert trainer.verification.verdict.startswith("right")
    assert inner.param_groups[0]["lr"] == 0.002


def test_what_cannot_be_told_is_tried_again_in_the_next_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And a warning comes with the last time."""
    statuses: list[Any] = ["cannot tell"] * 2 + ["right"]
    precision = "float64"

    def judged(*_: Any) -> GradientCheck:
        return GradientCheck(statuses.pop(0), "in words", precision=precision)

    monkeypatch.setattr(check, "check_step", judged)
    trainer, batches = build()
    for left in (2, 1, 0, 0):
        trainer.step(**batches)
        assert len(statuses) == left
    assert trainer.verification.verdict == "right: in words"
    statuses += ["cannot tell"] * 5
    trainer, batches = build()
    for _ in range(3):
        trainer.step(**batches)
    with pytest.warns(VerificationWarning, match="cannot tell: in words"):
        trainer.step(**batches)
    trainer.step(**batches)
    assert len(statuses) == 1
    # No copies could be made, as where memory is short: another try would find the same.
    precision = ""
    trainer, batches = build()
    with pytest.warns(VerificationWarning, match="cannot tell: in words"):
        trainer.step(**batches)
    assert not statuses


def test_a_warning_names_the_reason() -> None:
    trainer, batches = build(TwoLayers(lambda s, x: s.b(rounded(3 * s.a(x).tanh(), torch.round))))
    with pytest.warns(VerificationWarning, match="straight-through"):
        trainer.step(**batches)
    trainer.step(**batches)


def test_large_networks_are_told_of_in_one_line(
    verified: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(check, "MOST_WEIGHTS", 10)
    trainer, batches = build()
    for _ in range(2):
        trainer.step(**batches)
    assert (verified, len(caplog.records)) == ([], 1)
    assert trainer.verification.verdict.startswith("not verified: networks of ")


def test_hooks_on_the_optimizers_step_are_not_called_on_copies() -> None:
    """An average by a hook would have their weights in it, and a scheduler their steps."""
    student = TwoLayers(plain)
    sgd = torch.optim.SGD(student.parameters(), lr=0.3)
    calls: list[Any] = []
    sgd.register_step_pre_hook(lambda *_: calls.append("before"))
    sgd.register_step_post_hook(lambda *_: calls.append("after"))
    trainer, batches = build(student, inner_optimizer=sgd)
    for number in range(3):
        trainer.step(**batches)
        assert calls == ["before", "after"] * (number + 1)
    assert metapl.check_gradient(trainer, **batches).status == "right"
    with pytest.warns(UserWarning, match=r"hooks on the step .* \(SGD\), are not called here"):
        metapl.hypergradient(trainer.teacher, student, **batches, inner_optimizer=sgd)
    assert calls == ["before", "after"] * 3


def double_weights(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    torch._foreach_mul_([p.data for p in optimizer.param_groups[0]["params"]], 2)


def halve(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    torch._foreach_mul_([p.grad for p in optimizer.param_groups[0]["params"]], 0.5)


def replace_step(optimizer: torch.optim.Optimizer) -> None:
    real = optimizer.step
    optimizer.step = lambda *args: (halve(optimizer), real(*args))  # type: ignore[method-assign]


LATE_STEPS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "before": (
        lambda o: o.register_step_pre_hook(halve),
        r"a hook on the step .*\(SGD\), moves the student",
    ),
    "after": (
        lambda o: o.register_step_post_hook(double_weights),
        r"a hook on the step .*\(SGD\), moves the student",
    ),
    "replaced": (replace_step, r"a step\(\) in its place \(SGD\), moves the student"),
}


@pytest.mark.parametrize("kind", LATE_STEPS)
@pytest.mark.parametrize("is_one_of_two", [False, True])
def test_an_optimizers_step_that_changes_later_is_refused(
    kind: str, *, is_one_of_two: bool
) -> None:
    change, words = LATE_STEPS[kind]
    student = TwoLayers(plain)
    sgd = torch.optim.SGD(student.a.parameters() if is_one_of_two else student.parameters(), lr=0.3)
    optimizers = [sgd]
    if is_one_of_two:
        optimizers.append(torch.optim.AdamW(student.b.parameters()))
    trainer, batches = build(student, inner_optimizer=optimizers if is_one_of_two else sgd)
    trainer.step(**batches)
    change(sgd)
    before = copy.deepcopy(trainer.state_dict())
    for _ in range(2):
        with pytest.raises(MetaplError, match=words):
            trainer.step(**batches)
    # That the rule was found right is known by then.
    assert same({**trainer.state_dict(), "verification": before["verification"]}, before)


def test_a_rate_below_zero_is_verified_as_it_is() -> None:
    trainer, batches = build()
    trainer.inner_optimizer.param_groups[0]["lr"] = -0.1
    trainer.step(**batches)
    assert trainer.verification.verdict.startswith("right")


def test_a_scheduler_or_a_hook_that_changes_nothing_is_allowed(verified: list[str]) -> None:
    trainer, batches = build()
    sgd = trainer.inner_optimizer
    trainer.step(**batches)
    sgd.register_step_post_hook(lambda *_: None)
    torch.optim.lr_scheduler.StepLR(sgd, 1)
    for _ in range(3):
        trainer.step(**batches)
    assert len(verified) == 2


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_weight_that_the_optimizer_holds_twice_is_named(kind: Any) -> None:
    student = TwoLayers(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = kind([*student.parameters(), student.a.weight], lr=0.1)
    words = r"likely a weight that the inner optimizer holds twice \(a.weight\)"
    assert re.search(words, str(check_of(student, inner_optimizer=optimizer)))


def test_the_page_has_the_contract_as_a_table() -> None:
    page = (Path(metapl.__file__).parents[1] / "docs" / "contract.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page[page.index("| `CONTRACT`") :], re.MULTILINE)
    assert rows[1 : 1 + len(CONTRACT)] == [breach.__name__ for breach in CONTRACT]


class OneMean(metapl.problems.EqualWeights):
    """Cross-entropy by its mean over the batch, times the weight of each example."""

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return torch.as_tensor(signal.value * F.cross_entropy(outputs, batch[1]))


class MeanOfWeighted(metapl.problems.EqualWeights):
    """The mean of the weighted losses, in each row: its derivative is that of losses by example."""

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        losses = super().inner_loss(outputs, signal, batch, params)
        return losses.mean().expand(len(losses))


@pytest.mark.parametrize("call", ["step", "hypergradient", "attribute"])
def test_a_loss_without_reduction_none_is_refused_at_the_first_step(call: str) -> None:
    torch.manual_seed(0)
    student = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    x = torch.randn(6, 4)
    batch = x, torch.arange(6) % 3

    def run(problem: metapl.problems.EqualWeights, inner: Any = batch) -> None:
        if call == "step":
            trainer = metapl.BilevelTrainer(
                None, student, "forward", problem=problem, inner_optimizer=optimizer
            )
            trainer.step(outer=batch, inner=inner)
        elif call == "hypergradient":
            batches = {"outer": batch, "inner": inner}
            metapl.hypergradient(
                None, student, **batches, problem=problem, inner_optimizer=optimizer
            )
        else:
            batches = {"train": inner, "outer": batch}
            metapl.attribute(
                student, **batches, optimizer=optimizer, steps=2, batch_size=6, problem=problem
            )

    before = [p.detach().clone() for p in student.parameters()]
    with pytest.raises(MetaplError, match="inner_loss is a mean; expected one loss per example"):
        run(OneMean())
    assert all(map(torch.equal, before, student.parameters()))
    # The same feedback on all examples is right where the examples are one.
    same = x[:1].expand(6, 4).contiguous(), torch.zeros(6, dtype=torch.long)
    run(metapl.problems.EqualWeights(), same)
    run(MeanOfWeighted())


def test_h_is_verified_before_it_is_shaped() -> None:
    for mode in (
        Forward(normalization="cosine"),
        Reinforce(similarity="cosine"),
        Reinforce(baseline=0.9),
    ):
        assert check_of(TwoLayers(plain), mode).status == "right"
    assert check_of(TwoLayers(plain), "none").status == "nothing to verify"


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_probabilities_in_the_place_of_logits_are_said_at_the_users_line(role: str) -> None:
    networks = {name: nn.Sequential(nn.Linear(4, 3)) for name in ("teacher", "student")}
    networks[role].append(nn.Softmax(1))
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    trainer = metapl.BilevelTrainer(**networks)
    with pytest.warns(VerificationWarning, match=f"the {role} returns probabilities") as warned:
        trainer.step((x, y), x)
    assert [w.filename for w in warned] == [__file__]
    assert trainer.steps_done == 1
