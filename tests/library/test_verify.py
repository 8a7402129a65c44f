"""Verification: what it says of students, problems and planted faults, mode by mode, and when a trainer asks it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from problems_zoo import product, toy, unmoved
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import metapl
from metapl import Lookahead, MetaplError, PseudoLabels, Signal
from metapl.feedback import Forward, Implicit, Reinforce
from metapl.training import verify
from metapl.training.verify import GradientCheck, VerificationWarning

C = 3
COLUMNS: dict[str, tuple[Any, int]] = {
    "tangent": (Forward(by="tangent"), 1),
    "graph": (Forward(by="graph"), 1),
    "reinforce": ("reinforce", 1),
    "unrolled": ("unrolled", 1),
    "unrolled, 3 steps": ("unrolled", 3),
}
LETTERS = {"R": "right", "A": "allowed", "X": "refused"}  # "-": not run


class Own(nn.Module):
    """A student of two layers, with what a kind adds to it."""

    def __init__(self, forward: Callable[[Any, Any], Tensor], add: Callable[[Any], Any] = lambda student: None) -> None:
        super().__init__()
        self.a, self.b, self.own_forward = nn.Linear(4, 6), nn.Linear(6, C), forward
        add(self)

    def plain(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())

    def forward(self, x: Any) -> Tensor:
        return self.own_forward(self, x)


def checked(student: nn.Module, mode: Any = "forward", steps: int = 1, **options: Any) -> str:
    """The status; ``"refused"`` too where the mode itself refuses."""
    try:
        return check(student, mode, steps, **options).status
    except MetaplError:
        return "refused"


def check(student: nn.Module, mode: Any = "forward", steps: int = 1, **options: Any) -> GradientCheck:
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))
    sgd = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9)
    x = [torch.randn(8, 4) for _ in range(steps)]
    given: dict[str, Any] = {"labeled": (torch.randn(8, 4), torch.randint(C, (8,))), "inner_optimizer": sgd}
    given |= {"unlabeled": x[0] if steps == 1 else Lookahead(x), "mode": mode, **options}
    problem = given.get("problem")
    if isinstance(problem, Problem):
        vars(problem)["teacher"] = teacher
    return metapl.check_gradient(given.pop("teacher", teacher), student, **given)


# ------------------------------------------------------------------------------------------------------------ students


class Function(torch.autograd.Function):
    """The identity, with a backward and a jvp that may be wrong."""

    @staticmethod
    def forward(x: Tensor, by: float, dual: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.by, ctx.dual = inputs[1:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.by * g, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *rest: Any) -> Tensor:
        return ctx.dual * t


def counts(student: Any, x: Tensor) -> Tensor:
    student.n += 1
    return student.plain(x) * (1 + 0.1 * student.n)


def lazy(student: Any, x: Tensor) -> Tensor:
    if "mean" not in student._buffers:
        student.register_buffer("mean", x.mean(0).detach())
    return student.plain(x - student.mean)


def written(how: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    return lambda student, x: (how(student.a.weight), student.plain(x))[1]


def average(student: Any, x: Tensor) -> Tensor:
    h = student.a(x).tanh()
    with torch.no_grad():
        student.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
    return student.b(h - student.mean)


def momentum_encoder(student: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        for p, q in zip(student.slow.parameters(), student.a.parameters(), strict=True):
            p.mul_(0.9).add_(q, alpha=0.1)
        t = student.slow(x).tanh()
    return student.b(student.a(x).tanh() + t)


def codebook(student: Any, x: Tensor) -> Tensor:
    h = student.a(x).tanh()
    code = (h.detach()[:, None] - student.codes[None]).square().sum(-1).argmin(1)
    q = student.codes[code]
    with torch.no_grad():
        for j in code.unique():
            student.codes[j] = 0.9 * student.codes[j] + 0.1 * h[code == j].mean(0)
    return student.b(h + (q - h).detach())


def hooked(student: Any, x: Tensor) -> Tensor:
    h = student.a(x).tanh()
    if h.requires_grad:
        h.register_hook(lambda g: 2 * g)
    return student.b(h)


def slopes(student: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        z = student.plain(x)
        (g,) = torch.autograd.grad(z.logsumexp(-1).sum(), x, create_graph=True)
    return z + g[:, :C]


def rounded(t: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
    return t + (how(t) - t).detach()


def put(name: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda student: setattr(student, name, make(student))


def shared(student: Any) -> None:
    student.c = student.d = nn.Linear(6, 6)


class Counting:
    n = 0

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        self.n += 1
        return output * (1 + 0.1 * self.n)


def embedded(student: Any, x: Tensor) -> Tensor:
    return student.plain(x) + student.e((x[:, 0] > 0).long())


def plain(student: Any, x: Tensor) -> Tensor:
    return student.plain(x)


def scaled(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output * 1.5


def doubled(module: Any, inputs: Any, outputs: Any) -> Any:
    return tuple(None if g is None else 2 * g for g in inputs)


norms, old = nn.utils.parametrizations, nn.utils
KINDS: dict[str, tuple[Any, ...]] = {  # by COLUMNS
    "plain": ("RRRRR", plain),
    "a frozen layer": ("RRRRR", plain, lambda s: s.a.requires_grad_(False)),
    "a shared layer": ("RRRRR", lambda s, x: s.b(s.c(s.d(s.a(x)).tanh())), shared),
    "a hook that scales outputs": ("RRRRR", plain, lambda s: s.a.register_forward_hook(scaled)),
    "a buffer that counts": ("RRRRR", counts, lambda s: s.register_buffer("n", torch.zeros(()))),
    "a buffer made by the first pass": ("RRRRR", lazy),
    "a gradient in its input": ("RRRRR", slopes),
    "a checkpoint": ("RRRRX", lambda s, x: s.b(checkpoint(lambda t: s.a(t).tanh(), x, use_reentrant=False))),
    "a reentrant checkpoint": (
        "XXXXX", lambda s, x: s.b(checkpoint(s.a, x.clone().requires_grad_(), use_reentrant=True))),
    "masks in a checkpoint": (
        "RRRRX", lambda s, x: s.b(checkpoint(lambda t: F.dropout(s.a(t).tanh(), 0.3), x, use_reentrant=False))),
    "an embedding within max_norm": (
        "RRRRR", embedded, put("e", lambda s: nn.Embedding(2, C, max_norm=50))),
    "float32 within": ("RRRRR", lambda s, x: s.b(s.a(x).float().tanh().to(x.dtype))),
    "float32 alone": ("RRRRR", lambda s, x: s.plain(x) + x @ torch.ones(4, C)),
    "weight norm": ("XRRRX", plain, put("a", lambda s: norms.weight_norm(s.a))),  # torch's second derivative is wrong
    "the old weight norm": ("XRRRX", plain, put("a", lambda s: old.weight_norm(s.a))),
    "spectral norm": ("XAAAA", plain, put("a", lambda s: norms.spectral_norm(s.a))),
    "straight-through": ("AAAAA", lambda s, x: s.b(rounded(3 * s.a(x).tanh(), torch.round))),
    "a binary layer": ("AAAAA", lambda s, x: s.b(rounded(s.a(x).tanh(), torch.sign))),
    "a detached average": ("AAAAA", lambda s, x: s.plain(x) - s.plain(x).mean(0).detach()),
    "a detached branch": ("AAAAA", lambda s, x: s.plain(x) + s.plain(x).detach().softmax(-1)),
    "a doubled backward": ("AAAAA", lambda s, x: Function.apply(s.plain(x), 2.0, 2.0)),
    "a codebook": ("AAAAA", codebook, lambda s: s.register_buffer("codes", 0.5 * torch.randn(5, 6))),
    "an average in a buffer": ("XAAAA", average, lambda s: s.register_buffer("mean", torch.zeros(6))),
    "a momentum encoder": ("XAAAA", momentum_encoder, put("slow", lambda s: nn.Linear(4, 6).requires_grad_(False))),
    "a hook on an activation": ("XAAAA", hooked),
    "a hook on a backward pass": ("XAAAA", plain, lambda s: s.b.register_full_backward_hook(doubled)),
    "another jvp than backward": ("XRRRR", lambda s, x: Function.apply(s.plain(x), 1.0, 0.5)),
    # These are refused by the modes, and in the steps, that repeat a pass.
    "an attribute that counts": ("XRRRR", counts, put("n", lambda s: 0)),
    "a hook that counts": ("XRRRR", plain, lambda s: s.a.register_forward_hook(Counting())),
    "an input in place": ("XRRRR", lambda s, x: s.plain(x.mul_(1.1))),
    "a generator of its own": (
        "XRRRR", lambda s, x: s.plain(x) + torch.rand(C, generator=s.g).to(x), put("g", lambda s: torch.Generator())),
    "python's random numbers": ("XXXXX", lambda s, x: s.plain(x) * (1 + 0.1 * random.random())),
    "numpy's random numbers": ("XXXXX", lambda s, x: s.plain(x) * (1 + 0.1 * numpy.random.rand())),  # noqa: NPY002
    "weights written by .data": ("XXXXX", written(lambda w: w.data.mul_(0.9))),
    "weights written by numpy": ("XXXXX", written(lambda w: w.detach().numpy().__imul__(0.9))),
    "clamped weights": ("XXXXX", written(lambda w: w.data.clamp_(-0.2, 0.2))),
    "weights that decay slowly": ("XXXXX", written(lambda w: w.data.mul_(1 - 1e-9))),
    "an embedding beyond max_norm": (
        "XXXXX", embedded, put("e", lambda s: nn.Embedding(2, C, max_norm=0.5))),
    "a tensor in a weight's memory": (
        "XXXXX", lambda s, x: s.plain(x) + (x @ s.held[0].T)[:, :C], put("held", lambda s: [s.a.weight.detach()])),
}  # fmt: skip


def statuses(expected: str, student: Callable[[], nn.Module], **options: Any) -> None:
    """Compare the statuses in all columns."""
    found = ""
    for column, letter in zip(COLUMNS, expected, strict=True):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old norms are deprecated
            made = student()
        status = checked(made, *COLUMNS[column], **options) if letter != "-" else "-"
        found += next((one for one, name in LETTERS.items() if name == status), status)
    assert found == expected


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_students(kind: str) -> None:
    expected, *how = KINDS[kind]
    statuses(expected, lambda: Own(*how))


# ------------------------------------------------------------------------------------------------------------ problems


class Problem(PseudoLabels):
    """Pseudo-labels with other losses, or another signal: functions of what the library's have, by name."""

    def __init__(self, **change: Any) -> None:
        super().__init__()
        vars(self).update(change=change, matrix=change.pop("matrix", None), teacher=None)

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        found, change = super().signal(teacher, batch, student_outputs, generator=generator), vars(self)["change"]
        if self.kind == "hard":
            return change["hard"](found) if "hard" in change else found
        return Signal(change["soft"](self, teacher, batch)) if "soft" in change else found

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        losses, change = super().inner_loss(outputs, signal, batch), vars(self)["change"]
        return change["inner"](self, losses, outputs, batch, params) if "inner" in change else losses

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        loss, change = super().outer_loss(outputs, batch), vars(self)["change"]
        return change["outer"](self, loss, outputs, batch) if "outer" in change else loss


def half(t: Tensor) -> Tensor:
    return (t + t.detach()) / 2


def writes(self: Any, losses: Tensor, outputs: Tensor, batch: Any, params: Any) -> Tensor:
    next(iter(params.values())).data.mul_(0.9)
    return losses


def logit(s: Any) -> Tensor:
    return s.outputs.gather(-1, s.value[:, None])[:, 0]


learned = {"matrix": nn.Parameter(torch.eye(C) + 0.1)}
with_teacher = {"inner": lambda self, losses, z, x, params: losses + 0.1 * (z * self.teacher(x)).sum(1)}
batchwise = {"inner": lambda self, losses, z, x, params: losses * z.square().mean()}
penalty = {"inner": lambda self, losses, z, x, params: losses + 0.01 * sum(p.square().sum() for p in params.values())}
PROBLEMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a clip": ("RRRRR", {}, {"clip_norm": 0.1}),
    "micro-batches": ("RRR--", {}, {"accumulate": 2}),
    "a pair in micro-batches": ("RRR--", {"outer": lambda self, loss, z, b: (4 * loss, 4)}, {"accumulate": 2}),
    "a sum in micro-batches": ("XXX--", {"outer": lambda self, loss, z, b: loss * len(z)}, {"accumulate": 2}),
    "a loss of the batch": ("RRRRR", batchwise, {}),
    "a loss of the batch in micro-batches": ("XXX--", batchwise, {"accumulate": 2}),
    "a penalty on weights": ("RRRRR", penalty, {}),
    "a parameter in the signal": (
        "RRRRR", {"soft": lambda self, t, x: (t(x) @ self.matrix).softmax(-1), **learned}, {}),
    "a parameter in a loss": (
        "XXXXX", {"inner": lambda self, losses, z, *rest: losses * (z @ self.matrix).square().sum(1), **learned}, {}),
    "an inner loss of the teacher": ("XXXXX", with_teacher, {}),
    "an outer loss of the teacher": (
        "XXXXX", {"outer": lambda self, loss, z, b: loss + 0.1 * (z * self.teacher(b[0])).mean()}, {}),
    "a loss that writes weights": ("XXXXX", {"inner": writes}, {}),
    "half a signal": ("AARAA", {"soft": lambda self, t, x: half(t(x).softmax(-1))}, {}),
    "a layer's signal": ("AARAA", {"soft": lambda self, t, x: t[-1](t[:-1](x).detach()).softmax(-1)}, {}),
    "a hard signal, straight-through": (
        "AARAA", {"soft": lambda self, t, x: rounded(t(x).softmax(-1), torch.round)}, {}),
    "a wrong backward in the signal": (
        "XXRXX", {"soft": lambda self, t, x: Function.apply(t(x), 2.0, 2.0).softmax(-1)}, {}),
    "a log_prob that is none": ("RRXRR", {"hard": lambda s: replace(s, log_prob=logit(s))}, {}),
    "a logit without probs": ("RRXRR", {"hard": lambda s: Signal(s.value, logit(s) + 2)}, {}),
    "a smoothed log_prob": ("RRXRR", {"hard": lambda s: replace(s, log_prob=0.9 * s.log_prob - 0.1)}, {}),
    "half a log_prob": ("RRXRR", {"hard": lambda s: replace(s, log_prob=half(s.log_prob))}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROBLEMS)
def test_kinds_of_problems(kind: str) -> None:
    expected, change, options = PROBLEMS[kind]
    statuses(expected, lambda: Own(plain), problem=Problem(**change), **options)


# -------------------------------------------------------------------------------------------- clean students, by mode


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
    "convolution": lambda: model(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), head=18),
    "pooling": lambda: model(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 1), nn.MaxPool1d(2)),
    "gru": lambda: model(Own(gru, put("cell", lambda s: nn.GRUCell(2, 5))), head=5),
    "transformer": lambda: model(rows, nn.TransformerEncoderLayer(2, 1, 4, 0.1, batch_first=True), head=4),
    "default attention": lambda: model(rows, Own(attention, put("w", lambda s: nn.Linear(2, 2))), head=4),
    "embeddings": lambda: model(Own(lambda s, x: s.e((x > 0).long()), put("e", lambda s: nn.Embedding(2, 2))), head=8),
    "a residual": lambda: model(Own(lambda s, x: x + s.w(x).tanh(), put("w", lambda s: nn.Linear(4, 4))), head=4),
    "an orthogonal layer": lambda: model(norms.orthogonal(nn.Linear(4, 6))),
    "a zero in a relu": lambda: model(nn.Linear(4, 6), Own(lambda s, x: (0 * x).relu() + x)),
}
MODES = [mode for mode in metapl.MODES if mode not in ("implicit", "none")]


@pytest.mark.parametrize("student", CLEAN)
def test_clean_students_are_right_in_every_mode(student: str) -> None:
    for mode in [*MODES, Forward(by="tangent")]:
        torch.manual_seed(0)
        found = check(CLEAN[student](), mode)
        assert (mode, found.status) == (mode, "right"), str(found)


@pytest.mark.parametrize("solver", ["cg", "neumann", "identity"])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_implicit_beside_double_backward(solver: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, problem = Implicit(solver=solver, damping=1.0, step_size=0.1, iterations=5), PseudoLabels(kind=kind)
    assert checked(Own(plain), mode, problem=problem) == "right"
    plant(monkeypatch, "a hundredth")
    assert checked(Own(plain), mode, problem=problem) == "refused"


# ------------------------------------------------------------------------------------------------------ planted faults


def result(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Of the mode's h, and so of the teacher's gradient."""

    def call(real: Any, *networks: Any, **given: Any) -> Any:
        found = real(*networks, **given)
        return replace(found, feedback=change(found.feedback), grads={n: change(g) for n, g in found.grads.items()})

    return call


def given(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
    """Of what the mode computes from, beside the real step."""
    return lambda real, *networks, **options: real(*networks, **(options | change(options)))


def other_option(name: str, value: Any) -> Callable[..., Any]:
    def change(options: dict[str, Any]) -> dict[str, Any]:
        options["inner_optimizer"].param_groups[0][name] = value
        return {}

    return given(change)


def state_forgotten(options: dict[str, Any]) -> dict[str, Any]:
    options["inner_optimizer"].state.clear()
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
    "no nesterov": other_option("nesterov", False),
    "a velocity forgotten": given(state_forgotten),
    "ascent": other_option("maximize", True),
    "no clip": given(lambda o: {"clip_norm": None}),
    "another clip": given(lambda o: {"clip_norm": 0.0501}),
    "labels of the other view": given(lambda o: {"unlabeled": o["unlabeled"][::-1]}),
    "the weak view learned": given(lambda o: {"unlabeled": o["unlabeled"][:1] * 2}),
    "other labels": given(lambda o: {"labeled": (o["labeled"][0], o["labeled"][1].roll(1))}),
    "a row of the outer batch lost": given(lambda o: {"labeled": tuple(t[:-1] for t in o["labeled"])}),
    "a temperature": given(lambda o: {"problem": replace(o["problem"], temperature=1.001)}),
    "smoothing forgotten": given(lambda o: {"problem": replace(o["problem"], label_smoothing=0.0)}),
    "other masks": other_masks,
    "eval": in_eval,
}


def plant(patch: pytest.MonkeyPatch, fault: str) -> None:
    real = verify.hypergradient
    patch.setattr(verify, "hypergradient", lambda *networks, **options: FAULTS[fault](real, *networks, **options))


@pytest.mark.parametrize(("mode", "fault"), product(["forward", "reinforce", "unrolled"], FAULTS, usual=["forward"]))
def test_planted_faults_are_refused(fault: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = toy("dropout", views=True, rows=6)
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}
    sgd = torch.optim.SGD(case.student.parameters(), **options)
    for p in case.student.parameters():
        p.grad = torch.ones_like(p)
    sgd.step()
    given = {**case.data(), "inner_optimizer": sgd, "problem": PseudoLabels(label_smoothing=0.1), "clip_norm": 0.05}
    given |= {"mode": mode} | ({} if "clip" in fault else {"clip_norm": None})
    assert metapl.check_gradient(case.teacher, case.student, **given).passed
    plant(monkeypatch, fault)
    assert metapl.check_gradient(case.teacher, case.student, **given).passed is False


# -------------------------------------------------------------------------------------------------- when it is asked


def trainer(student: nn.Module | None = None, mode: Any = "forward", **options: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    student = Own(plain) if student is None else student
    batches = {"labeled": (torch.randn(8, 4), torch.randint(C, (8,))), "unlabeled": torch.randn(8, 4)}
    return metapl.BilevelTrainer(nn.Linear(4, C), student, mode, **options), batches


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes that have been verified."""
    seen, real = list[str](), verify.verified
    monkeypatch.setattr(verify, "verified", lambda step, mode: seen.append(mode.name) or real(step, mode))
    return seen


def test_the_first_step_and_each_new_fingerprint(verified: list[str]) -> None:
    made, batches = trainer()
    for act in (
        made.student.train,
        made.student.eval,
        made.student.train,
        lambda: made.student.a.requires_grad_(False),
    ):
        act()
        made.step(**batches)
        made.step(**batches)
    assert len(verified) == 3
    resumed, _ = trainer()
    made.student.a.requires_grad_(True)
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


@pytest.mark.parametrize("mode", ["forward", "loss_difference"])
def test_a_refusal_moves_nothing_and_comes_again(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = toy("dropout")
    plant(monkeypatch, "the sign")
    made = metapl.BilevelTrainer(case.teacher, case.student, mode)
    python = random.getstate()
    with unmoved(case, made.inner_optimizer, made.outer_optimizer):
        for _ in range(2):
            with pytest.raises(MetaplError, match="off the loss"):
                made.step(**case.data())
    assert random.getstate() == python


def test_a_warning_names_the_reason() -> None:
    made, batches = trainer(Own(lambda s, x: s.b(rounded(3 * s.a(x).tanh(), torch.round))))
    with pytest.warns(VerificationWarning, match="straight-through"):
        made.step(**batches)
    made.step(**batches)


def test_hooks_of_parameters_are_refused_when_a_trainer_is_built() -> None:
    student = Own(plain)
    student.a.weight.register_hook(lambda g: 2 * g)
    with pytest.raises(MetaplError, match=r"a\.weight"):
        trainer(student)


def test_large_networks_are_told_of_in_one_line(
    verified: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(verify, "MOST_WEIGHTS", 10)
    made, batches = trainer()
    for _ in range(2):
        made.step(**batches)
    assert (verified, len(caplog.records)) == ([], 1)


def test_what_drowns_in_rounding_cannot_be_told() -> None:
    student = Own(plain)
    found = check(student, inner_optimizer=torch.optim.SGD(student.parameters(), lr=1e-12))
    assert (found.status, found.passed) == ("cannot tell", None)


def test_h_is_verified_before_it_is_shaped() -> None:
    for mode in (Forward(normalization="cosine"), Reinforce(similarity="cosine"), Reinforce(baseline=0.9)):
        assert check(Own(plain), mode).status == "right"
    assert check(Own(plain), "none").status == "nothing to verify"


def test_a_hypergradient_verifies_where_it_is_asked(monkeypatch: pytest.MonkeyPatch, verified: list[str]) -> None:
    case = toy()
    given = {**case.data(), "inner_optimizer": torch.optim.SGD(case.student.parameters(), lr=0.1)}
    metapl.hypergradient(case.teacher, case.student, **given)
    metapl.hypergradient(case.teacher, case.student, **given, verify=True)
    assert verified == ["forward"]
    plant(monkeypatch, "the sign")
    with pytest.raises(MetaplError, match="off the loss"):
        metapl.hypergradient(case.teacher, case.student, **given, verify=True)


@pytest.mark.parametrize("setting", ["yes", -1, 1.5, None])
def test_a_setting_that_is_none(setting: Any) -> None:
    with pytest.raises(MetaplError, match="verify"):
        trainer(verify=setting)


def test_calls_that_are_none() -> None:
    made, batches = trainer()
    for call in ((made, made.student), (made.teacher,), (made.teacher, made.student)):
        with pytest.raises(MetaplError):
            metapl.check_gradient(*call, **batches)
    with pytest.raises(MetaplError):
        metapl.check_gradient(made)
    assert metapl.check_gradient(made, **batches, mode="unrolled").passed
