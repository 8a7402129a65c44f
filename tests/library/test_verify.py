"""Verification: what it says of students, problems and planted faults, mode by mode.

Beside that is when a trainer asks it.
"""

from __future__ import annotations

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
from kinds import KINDS, PROBLEMS, C, Own, Problem, norms, plain, put, rounded
from problems_zoo import product, toy, unmoved
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import Lookahead, MetaplError, PseudoLabels
from metapl.feedback import Forward, Implicit, Reinforce
from metapl.feedback.hypergradient import Request, through_steps
from metapl.training.verification import GradientCheck, VerificationWarning, check, real_step
from metapl.training.verification.contract import CONTRACT

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
    sgd = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9)
    x = [torch.randn(8, 4) for _ in range(steps)]
    given: dict[str, Any] = {
        "labeled": (torch.randn(8, 4), torch.randint(C, (8,))),
        "inner_optimizer": sgd,
    }
    given |= {"unlabeled": x[0] if steps == 1 else Lookahead(x), "mode": mode, **options}
    problem = given.get("problem")
    if isinstance(problem, Problem):
        vars(problem)["teacher"] = teacher
    return metapl.check_gradient(given.pop("teacher", teacher), student, **given)


def verify_by(patch: pytest.MonkeyPatch, gradient: Callable[..., Any]) -> None:
    """Let verification find a mode's gradient by a function.

    The function has the networks and options by name.
    """

    def through(request: Request) -> Any:
        return gradient(
            request.teacher,
            request.student,
            labeled=request.outer,
            unlabeled=request.inner,
            mode=request.mode,
            problem=request.problem,
            inner_optimizer=request.inner_optimizer,
            generator=request.generator,
            clip_norm=request.clip_norm,
        )

    patch.setattr(real_step, "through_steps", through)


def by_the_eager_road(
    teacher: Any, student: Any, *, labeled: Any, unlabeled: Any, **options: Any
) -> Any:
    """Find a gradient as verification does."""
    return through_steps(
        Request(teacher=teacher, student=student, outer=labeled, inner=unlabeled, **options)
    )


def by_the_pure_step(
    teacher: Any, student: Any, *, unlabeled: Any, labeled: Any, **options: Any
) -> Any:
    """Return what ``metapl.hypergradient`` does, by the pure step of a trainer.

    The teacher's gradient is that of its step.
    """
    options["inner_optimizer"], outer = (
        options["inner_optimizer"].optimizer,
        torch.optim.SGD(teacher.parameters(), 1.0),
    )
    options |= {
        "outer_optimizer": outer,
        "teacher_losses": (),
        "lookahead": len(unlabeled),
        "verify": False,
    }
    weight = 1e-4  # for a clip_norm, which is for both networks, and here for the student's alone
    try:
        step, state = metapl.BilevelTrainer(
            teacher, student, feedback_weight=weight, **options
        ).functional()
        with torch.no_grad():
            moved, report = step(
                state, labeled, unlabeled[0] if len(unlabeled) == 1 else tuple(unlabeled)
            )
    except (RuntimeError, AttributeError) as error:  # functional_call gives a module plain tensors
        raise MetaplError("no function") from error
    assert report.flag < 0.1
    h = tuple(report.feedback) if isinstance(report.feedback, list) else (report.feedback,)
    grads = {n: (p - moved.teacher.params[n]) / weight for n, p in state.teacher.params.items()}
    return SimpleNamespace(feedback=h, grads=grads, direct={}, outer_loss=report.outer_loss)


def rows_of(kinds: dict[str, tuple[Any, ...]], long: set[str]) -> list[Any]:
    """Return each kind in every column.

    By default in the first column of each of its letters, of both roads.
    """
    rows = []
    for kind, (letters, *_) in kinds.items():
        expected = dict(zip(COLUMNS, letters.replace(" ", ""), strict=True))
        first = {letter: column for column, letter in reversed(expected.items())}
        few = {column: letter for column, letter in expected.items() if column in first.values()}
        few |= {"pure": expected["pure"]} if expected["pure"] != expected["graph"] else {}
        if kind not in long:
            rows.append(pytest.param(kind, few, id=kind))
        rows.append(
            pytest.param(kind, expected, id=f"{kind}, every column", marks=pytest.mark.long)
        )
    return rows


def statuses(
    expected: dict[str, str], student: Callable[[], nn.Module], patch: Any, **options: Any
) -> None:
    """Compare the statuses in these columns."""
    found = {}
    for column in expected:
        mode, steps = COLUMNS[column]
        if column.startswith("pure"):
            verify_by(patch, by_the_pure_step)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old norms are deprecated
            made = student()
        status = checked(made, mode, steps, **options)
        found[column] = next((letter for letter, name in LETTERS.items() if name == status), status)
    assert found == expected


LONG = {
    "a momentum encoder",
    "a hook on an activation",
    "a detached average",
    "an average in a buffer",
    "a codebook",
}
LONG |= {
    "a binary layer",
    "a doubled backward",
    "the old weight norm",
    "an average of earlier passes",
}
LONG |= {
    "masks in a checkpoint",
    "a reentrant checkpoint of a function",
    "an embedding within max_norm",
}
LONG |= {"numpy's random numbers", "weights written by numpy", "clamped weights", "float32 alone"}


@pytest.mark.parametrize(("kind", "expected"), rows_of(KINDS, LONG))
def test_kinds_of_students(
    kind: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses(expected, lambda: Own(*KINDS[kind][1:]), monkeypatch)


@pytest.mark.parametrize(("kind", "expected"), rows_of(PROBLEMS, set()))
def test_kinds_of_problems(
    kind: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, change, options = PROBLEMS[kind]
    statuses(expected, lambda: Own(plain), monkeypatch, problem=Problem(**change), **options)


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
    "gru": lambda: model(Own(gru, put("cell", lambda s: nn.GRUCell(2, 5))), head=5),
    "transformer": lambda: model(
        rows, nn.TransformerEncoderLayer(2, 1, 4, 0.1, batch_first=True), head=4
    ),
    "default attention": lambda: model(
        rows, Own(attention, put("w", lambda s: nn.Linear(2, 2))), head=4
    ),
    "embeddings": lambda: model(
        Own(lambda s, x: s.e((x > 0).long()), put("e", lambda s: nn.Embedding(2, 2))), head=8
    ),
    "a residual": lambda: model(
        Own(lambda s, x: x + s.w(x).tanh(), put("w", lambda s: nn.Linear(4, 4))), head=4
    ),
    "an orthogonal layer": lambda: model(norms.orthogonal(nn.Linear(4, 6))),
    "a zero in a relu": lambda: model(nn.Linear(4, 6), Own(lambda s, x: (0 * x).relu() + x)),
}
MODES = [mode for mode in metapl.MODES if mode not in ("implicit", "none")]
EACH = [*MODES, Forward(by="tangent")]


@pytest.mark.parametrize(
    ("student", "modes"),
    [pytest.param(name, EACH[i % len(EACH) :][:1], id=name) for i, name in enumerate(CLEAN)]
    + [
        pytest.param(name, EACH, id=f"{name}, every mode", marks=pytest.mark.long) for name in CLEAN
    ],
)
def test_clean_students_are_right_in_every_mode(student: str, modes: list[Any]) -> None:
    for mode in modes:
        torch.manual_seed(0)
        found = check_of(CLEAN[student](), mode)
        assert (mode, found.status) == (mode, "right"), str(found)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adam,
        *(
            pytest.param(one, marks=pytest.mark.long)
            for one in (torch.optim.AdamW, torch.optim.SGD)
        ),
    ],
)
def test_a_fresh_adam_which_is_a_sign_and_relus_at_zero(optimizer: Any) -> None:
    torch.manual_seed(0)
    networks = [model(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 6), nn.ReLU()) for _ in range(2)]
    for p in networks[0].parameters():
        nn.init.zeros_(p) if p.ndim == 1 else None
    x = torch.randn(16, 4) * (torch.arange(16) % 2)[:, None]  # half of the inputs are blank
    given = {"labeled": (torch.randn(16, 4), torch.arange(16) % C), "unlabeled": x}
    for mode in MODES:
        inner = optimizer(networks[1].parameters(), lr=1e-3)
        found = metapl.check_gradient(*networks, **given, mode=mode, inner_optimizer=inner)
        assert (mode, found.status) == (mode, "right"), str(found)


@pytest.mark.parametrize(
    ("solver", "kind"), [("cg", "soft"), ("neumann", "hard"), ("identity", "soft")]
)
def test_implicit_beside_double_backward(
    solver: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = Implicit(solver=solver, damping=1.0, step_size=0.1, iterations=5)
    problem = PseudoLabels(kind=kind)
    assert checked(Own(plain), mode, problem=problem) == "right"
    plant(monkeypatch, "a hundredth")
    assert checked(Own(plain), mode, problem=problem) == "refused"


def result(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Return a call in which the mode's h is changed, and so the teacher's gradient."""

    def call(real: Any, *networks: Any, **given: Any) -> Any:
        found = real(*networks, **given)
        h = tuple(map(change, found.feedback))
        grads = {n: change(g) for n, g in found.grads.items()}
        return replace(found, feedback=h, grads=grads)

    return call


def given(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
    """Return a call in which what the mode computes from is changed, beside the real step."""
    return lambda real, *networks, **options: real(*networks, **(options | change(options)))


def views(change: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    return given(
        lambda options: {"unlabeled": Lookahead([change(*views) for views in options["unlabeled"]])}
    )


def other_option(name: str, value: Any) -> Callable[..., Any]:
    def change(options: dict[str, Any]) -> dict[str, Any]:
        options["inner_optimizer"].optimizer.param_groups[0][name] = value
        return {}

    return given(change)


def state_forgotten(options: dict[str, Any]) -> dict[str, Any]:
    options["inner_optimizer"].optimizer.state.clear()
    return {}


def first_lost(real: Any, *networks: Any, **options: Any) -> Any:
    found = real(*networks, **options)
    first = next(iter(found.grads))
    return replace(found, grads=found.grads | {first: torch.zeros_like(found.grads[first])})


def in_eval(real: Any, teacher: Any, student: Any, **options: Any) -> Any:
    return real(teacher, student.eval(), **options)


def other_masks(real: Any, *networks: Any, **options: Any) -> Any:
    torch.rand(1)
    return real(*networks, **options)


FAULTS: dict[str, Callable[..., Any]] = {
    "none": given(lambda o: {}),
    "none, with a clip": given(lambda o: {}),
    "the sign": result(torch.neg),
    "a mean for a sum": result(lambda t: t / 8),
    "a hundredth": result(lambda t: 1.01 * t),
    "5e-5": result(lambda t: (1 + 5e-5) * t),
    "an offset": result(lambda t: t + 1e-3 * t.abs().max()),
    "float16": result(lambda t: (16384 * t).half().to(t) / 16384),
    "a parameter lost": first_lost,
    "another rate": other_option("lr", 0.101),
    "no momentum": other_option("momentum", 0.0),
    "another momentum": other_option("momentum", 0.9001),
    "no decay": other_option("weight_decay", 0.0),
    "no nesterov": other_option("nesterov", value=False),
    "a velocity forgotten": given(state_forgotten),
    "ascent": other_option("maximize", value=True),
    "no clip": given(lambda o: {"clip_norm": None}),
    "another clip": given(lambda o: {"clip_norm": 0.0501}),
    "labels of the other view": views(lambda weak, strong: (strong, weak)),
    "the weak view learned": views(lambda weak, strong: (weak, weak)),
    "other labels": given(lambda o: {"labeled": (o["labeled"][0], o["labeled"][1].roll(1))}),
    "a row of the outer batch lost": given(
        lambda o: {"labeled": tuple(t[:-1] for t in o["labeled"])}
    ),
    "a temperature": given(lambda o: {"problem": replace(o["problem"], temperature=1.001)}),
    "smoothing forgotten": given(lambda o: {"problem": replace(o["problem"], label_smoothing=0.0)}),
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
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}
    sgd = torch.optim.SGD(case.student.parameters(), **options)
    for p in case.student.parameters():
        p.grad = torch.ones_like(p)
    sgd.step()
    given = {
        **case.data(),
        "inner_optimizer": sgd,
        "problem": PseudoLabels(label_smoothing=0.1),
        "clip_norm": 0.05,
    }
    given |= {"mode": mode} | ({} if "clip" in fault else {"clip_norm": None})
    plant(monkeypatch, fault)
    assert metapl.check_gradient(case.teacher, case.student, **given).passed is fault.startswith(
        "none"
    )


def test_what_a_short_type_hides_is_not_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small rate.

    And of sampled labels too, whose drowned numbers count as zero in float64.
    """
    plant(monkeypatch, "the sign")
    for dtype, lr in ((torch.bfloat16, 0.3), (torch.float32, 1e-4)):
        for mode in ("forward", "reinforce_per_example"):
            torch.manual_seed(0)
            student = Own(lambda s, x, dtype=dtype: s.b(s.a(x).tanh().to(dtype).to(x)))
            sgd = torch.optim.SGD(student.parameters(), lr=lr)
            assert check_of(student, mode, inner_optimizer=sgd).status == "cannot tell"


@pytest.mark.parametrize("mode", ["forward", "reinforce", "reinforce_per_example"])
def test_a_way_past_the_signal_is_seen_where_the_loss_hardly_moves(mode: str) -> None:
    """Under a fresh AdamW, whose step is a sign."""
    torch.manual_seed(0)
    inner = {
        "inner": lambda self, losses, z, x, params: losses * (1 + self.teacher(x).softmax(1)[:, 0])
    }
    student = Own(plain)
    adam = torch.optim.AdamW(student.parameters(), lr=1e-4)
    found = check_of(student, mode, problem=Problem(**inner), inner_optimizer=adam)
    assert found.status == "refused", str(found)
    assert "past the signal" in found.verdict


def trainer(
    student: nn.Module | None = None, mode: Any = "forward", **options: Any
) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    student = Own(plain) if student is None else student
    batches = {
        "labeled": (torch.randn(8, 4), torch.randint(C, (8,))),
        "unlabeled": torch.randn(8, 4),
    }
    return metapl.BilevelTrainer(nn.Linear(4, C), student, mode, **options), batches


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the modes that have been verified."""
    seen, real = list[str](), check.verify_step
    monkeypatch.setattr(
        check,
        "verify_step",
        lambda step, mode, *parts: seen.append(mode.name) or real(step, mode, *parts),
    )
    return seen


def test_the_first_step_and_each_new_fingerprint(verified: list[str]) -> None:
    made, batches = trainer()
    for act in (
        made.student.train,
        made.student.eval,
        made.student.train,
        lambda: made.student.a.requires_grad_(requires_grad=False),
    ):
        act()
        made.step(**batches)
        made.step(**batches)
    assert len(verified) == 3
    resumed, _ = trainer()
    made.student.a.requires_grad_(requires_grad=True)
    resumed.load_state_dict(made.state_dict())
    resumed.step(**batches)
    assert len(verified) == 3
    assert resumed.state_dict()["verification"]["verdict"].startswith("right")


@pytest.mark.parametrize(("setting", "times"), [(True, 1), ("warn", 1), (False, 0), (0, 0), (2, 2)])
def test_settings(setting: Any, times: int, verified: list[str]) -> None:
    made, batches = trainer(verify=setting)
    for _ in range(4):
        made.step(**batches)
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
    random.seed(0)  # two draws of it may be alike
    found = ""
    for mode, steps in ((Forward(by="tangent"), 1), (Forward(by="graph"), 1), ("difference", 10)):
        student = Own(
            lambda s, x: forward(s, x) if s.late else s.plain(x), put("late", lambda s: False)
        )
        made, batches = trainer(student, mode)
        made.step(**batches)
        student.late = True
        try:
            for _ in range(steps):
                made.step(**batches)
            found += "-"
        except MetaplError:
            found += "X"
    assert re.fullmatch(expected, found), found


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
    made = metapl.BilevelTrainer(case.teacher, case.student, mode, inner_optimizer=inner)
    python = random.getstate()
    with unmoved(case, made.inner_optimizer, made.outer_optimizer):
        for _ in range(2):
            with pytest.raises(MetaplError, match="mode"):
                made.step(**case.data())
    assert random.getstate() == python


def test_a_warning_names_the_reason() -> None:
    made, batches = trainer(Own(lambda s, x: s.b(rounded(3 * s.a(x).tanh(), torch.round))))
    with pytest.warns(VerificationWarning, match="straight-through"):
        made.step(**batches)
    made.step(**batches)


def test_large_networks_are_told_of_in_one_line(
    verified: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(check, "MOST_WEIGHTS", 10)
    made, batches = trainer()
    for _ in range(2):
        made.step(**batches)
    assert (verified, len(caplog.records)) == ([], 1)
    assert made.verification.verdict.startswith("not verified: networks of ")


def test_a_hypergradient_verifies_where_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, verified: list[str]
) -> None:
    case = toy()
    given = {**case.data(), "inner_optimizer": torch.optim.SGD(case.student.parameters(), lr=0.1)}
    metapl.hypergradient(case.teacher, case.student, **given)
    metapl.hypergradient(case.teacher, case.student, **given, verify=True)
    assert verified == ["forward"]
    plant(monkeypatch, "the sign")
    with pytest.raises(MetaplError, match="mode"):
        metapl.hypergradient(case.teacher, case.student, **given, verify=True)


def test_a_hook_on_the_optimizers_step_is_part_of_the_real_step() -> None:
    """Which is on no other optimizer: the mode knows the rule alone."""
    student = Own(plain)
    sgd = torch.optim.SGD(student.parameters(), lr=0.3)
    assert check_of(student, inner_optimizer=sgd).status == "right"
    sgd.register_step_post_hook(
        lambda one, *_: torch._foreach_mul_([p.data for p in one.param_groups[0]["params"]], 2)
    )
    assert check_of(student, inner_optimizer=sgd).status == "refused"


def test_the_page_has_the_contract_as_a_table() -> None:
    page = (Path(metapl.__file__).parents[1] / "docs" / "contract.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page[page.index("| `CONTRACT`") :], re.MULTILINE)
    assert rows[1 : 1 + len(CONTRACT)] == [breach.__name__ for breach in CONTRACT]


def test_h_is_verified_before_it_is_shaped() -> None:
    for mode in (
        Forward(normalization="cosine"),
        Reinforce(similarity="cosine"),
        Reinforce(baseline=0.9),
    ):
        assert check_of(Own(plain), mode).status == "right"
    assert check_of(Own(plain), "none").status == "nothing to verify"
