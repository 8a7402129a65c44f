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
from problems_zoo import toy, unmoved
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import metapl
from metapl import Lookahead, MetaplError, PseudoLabels, Signal
from metapl.feedback import Forward, Implicit, Reinforce
from metapl.training import verify
from metapl.training.verify import GradientCheck, VerificationWarning

C = 3
NEW_STEP = False  # True once a step watches nothing: the rows of LATER then hold, and those of TODAY no longer
COLUMNS: dict[str, tuple[Any, int]] = {
    "forward": ("forward", 1),
    "unrolled": ("unrolled", 1),
    "reinforce": ("reinforce", 1),
    "per example": ("reinforce_per_example", 1),
    "unrolled, 3 steps": ("unrolled", 3),
}
LETTERS = {"R": "right", "A": "allowed", "X": "refused"}


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
    if isinstance(problem, ReadsTeacher):
        object.__setattr__(problem, "teacher", teacher)
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


def lists(student: Any, x: Tensor) -> Tensor:
    student.seen.append(1)
    return student.plain(x) * (1 + 0.1 * len(student.seen))


def lazy(student: Any, x: Tensor) -> Tensor:
    if "mean" not in student._buffers:
        student.register_buffer("mean", x.mean(0).detach())
    return student.plain(x - student.mean)


def written(how: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def forward(student: Any, x: Tensor) -> Tensor:
        how(student.a.weight)
        return student.plain(x)

    return forward


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


def in_place(student: Any, x: Tensor) -> Tensor:
    x.mul_(1.1)
    return student.plain(x)


def slopes(student: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        z = student.plain(x)
        (g,) = torch.autograd.grad(z.logsumexp(-1).sum(), x, create_graph=True)
    return z + g[:, :C]


def rounded(t: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
    return t + (how(t) - t).detach()


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[Any], None]:
    def add(student: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            student.a = norm(student.a)

    return add


def put(name: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda student: setattr(student, name, make(student))


def doubling(student: Any) -> None:
    student.b.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else 2 * g for g in gi))


class Counting:
    n = 0

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        self.n += 1
        return output * (1 + 0.1 * self.n)


def plain(student: Any, x: Tensor) -> Tensor:
    return student.plain(x)


in_norms, old = nn.utils.parametrizations, nn.utils
KINDS: dict[str, tuple[Any, ...]] = {  # by COLUMNS
    "plain": ("RRRRR", plain),
    "a frozen layer": ("RRRRR", plain, lambda s: s.a.requires_grad_(False)),
    "a shared layer": ("RRRRR", lambda s, x: s.b(s.c(s.d(s.a(x)).tanh())), lambda s: put("d", lambda s: s.c)(put("c", lambda s: nn.Linear(6, 6))(s) or s)),
    "a hook that scales outputs": ("RRRRR", plain, lambda s: s.a.register_forward_hook(lambda m, i, o: o * 1.5)),
    "a buffer that counts": ("RRRRR", counts, lambda s: s.register_buffer("n", torch.zeros(()))),
    "a buffer made by the first pass": ("RRRRR", lazy),
    "a gradient in its input": ("RRRRR", slopes),
    "a checkpoint": ("RRRRX", lambda s, x: s.b(checkpoint(lambda t: F.dropout(s.a(t).tanh(), 0.3), x, use_reentrant=False))),
    "float32 within": ("RRRRR", lambda s, x: s.b(s.a(x).float().tanh().to(x.dtype))),
    "float32 alone": ("RRRRR", lambda s, x: s.plain(x) + x @ torch.ones(4, C)),
    "weight norm": ("XRRXX", plain, normed(in_norms.weight_norm)),
    "the old weight norm": ("XRRXX", plain, normed(old.weight_norm)),
    "spectral norm": ("AAAAA", plain, normed(in_norms.spectral_norm)),
    "straight-through": ("AAAAA", lambda s, x: s.b(rounded(3 * s.a(x).tanh(), torch.round))),
    "a binary layer": ("AAAAA", lambda s, x: s.b(rounded(s.a(x).tanh(), torch.sign))),
    "a detached average": ("AAAAA", lambda s, x: s.plain(x) - s.plain(x).mean(0).detach()),
    "a branch under no_grad": ("AAAAA", lambda s, x: s.plain(x) + s.plain(x).detach().softmax(-1)),
    "a doubled backward": ("AAAAA", lambda s, x: Function.apply(s.plain(x), 2.0, 2.0)),
    "an average in a buffer": ("AAAAA", average, lambda s: s.register_buffer("mean", torch.zeros(6))),
    "a codebook": ("AAAAA", codebook, lambda s: s.register_buffer("codes", 0.5 * torch.randn(5, 6))),
    "a momentum encoder": ("AAAAX", momentum_encoder, put("slow", lambda s: nn.Linear(4, 6).requires_grad_(False))),
    "another jvp than backward": ("XRRXR", lambda s, x: Function.apply(s.plain(x), 1.0, 0.5)),
    "python's random numbers": ("XXXXX", lambda s, x: s.plain(x) * (1 + 0.1 * random.random())),
    "numpy's random numbers": ("XXXXX", lambda s, x: s.plain(x) * (1 + 0.1 * numpy.random.rand())),  # noqa: NPY002
    "weights written by .data": ("XXXXX", written(lambda w: w.data.mul_(0.9))),
    "weights written by numpy": ("XXXXX", written(lambda w: w.detach().numpy().__imul__(0.9))),
    "clamped weights": ("XXXXX", written(lambda w: w.data.clamp_(-0.2, 0.2))),
    "weights that decay slowly": ("XXXXX", written(lambda w: w.data.mul_(1 - 1e-9))),
    "max_norm": ("XXXXX", lambda s, x: s.plain(x) + s.e((x[:, 0] > 0).long()), put("e", lambda s: nn.Embedding(2, C, max_norm=0.5))),
    "a tensor in a weight's memory": ("XXXXX", lambda s, x: s.plain(x) + (x @ s.held[0].T)[:, :C], put("held", lambda s: [s.a.weight.detach()])),
}  # fmt: skip
TODAY: dict[str, tuple[Any, ...]] = {
    "an input in place": ("XXXXX", in_place),
    "a hook on an activation": ("XAAXX", hooked),
    "a hook on a backward pass": ("XAAXX", plain, doubling),
    "an own generator": ("XRRXR", lambda s, x: s.plain(x) + torch.rand(C, generator=s.g).to(x), put("g", lambda s: torch.Generator().manual_seed(1))),
    "a hook that counts": ("XRRXR", plain, lambda s: s.a.register_forward_hook(Counting())),
    "an attribute that counts": ("RRRRR", counts, put("n", lambda s: 0)),
    "a list that grows": ("RRRRR", lists, put("seen", lambda s: [])),
}  # fmt: skip
LATER: dict[str, tuple[Any, ...]] = {
    "an attribute that counts": ("XRRXR", counts, put("n", lambda s: 0)),
    "a list that grows": ("XRRXR", lists, put("seen", lambda s: [])),
    "a hook that counts": ("XRRXR", plain, lambda s: s.a.register_forward_hook(Counting())),
}
"""What begins, or is met, in the step that watches nothing; switched on with it."""
ROWS = KINDS | (LATER if NEW_STEP else TODAY)


@pytest.mark.parametrize("kind", ROWS)
def test_kinds_of_students(kind: str) -> None:
    expected, *how = ROWS[kind]
    found = {}
    for column in COLUMNS:
        torch.manual_seed(0)
        found[column] = checked(Own(*how), *COLUMNS[column])
    assert found == {column: LETTERS[letter] for column, letter in zip(COLUMNS, expected, strict=True)}


# ------------------------------------------------------------------------------------------------------------ problems


class ReadsTeacher(PseudoLabels):
    """An inner loss that reads the teacher."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return super().inner_loss(outputs, signal, batch) + 0.1 * (outputs * vars(self)["teacher"](batch)).sum(1)


class OuterReadsTeacher(ReadsTeacher):
    inner_loss = PseudoLabels.inner_loss

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().outer_loss(outputs, batch) + 0.1 * (outputs * vars(self)["teacher"](batch[0])).mean()


class Learns(PseudoLabels):
    """A problem with a parameter of its own, which the signal depends on; or a loss does."""

    def __init__(self, in_loss: bool) -> None:
        super().__init__()
        vars(self).update(matrix=nn.Parameter(torch.eye(C) + 0.1), in_loss=in_loss)

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        if vars(self)["in_loss"] or self.kind == "hard":
            return super().signal(teacher, batch, student_outputs, generator=generator)
        return Signal((teacher(batch) @ vars(self)["matrix"]).softmax(-1))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        outputs = outputs @ vars(self)["matrix"] if vars(self)["in_loss"] else outputs
        return super().inner_loss(outputs, signal, batch)


class Writes(PseudoLabels):
    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        next(iter(params.values())).data.mul_(0.9)
        return super().inner_loss(outputs, signal, batch)


class Said(PseudoLabels):
    """Another signal: a function of the teacher's logits, soft; or of the library's, drawn."""

    def __init__(self, soft: Any = None, hard: Any = None) -> None:
        super().__init__()
        vars(self).update(soft=soft, hard=hard)

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        soft, hard = vars(self)["soft"], vars(self)["hard"]
        if self.kind != "hard":
            return Signal(soft(teacher, batch)) if soft else super().signal(teacher, batch, None, generator=generator)
        found = super().signal(teacher, batch, None, generator=generator)
        return hard(found) if hard else found


class Batchwise(PseudoLabels):
    """Losses that are no means over examples."""

    def __init__(self, which: str) -> None:
        super().__init__()
        vars(self).update(which=which)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        losses = super().inner_loss(outputs, signal, batch)
        return losses * outputs.square().mean() if vars(self)["which"] == "inner" else losses

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        total = F.cross_entropy(outputs, batch[1], reduction="sum")
        which = vars(self)["which"]
        return (total, len(outputs)) if which == "pair" else total if which == "outer" else total / len(outputs)


def half(t: Tensor) -> Tensor:
    return (t + t.detach()) / 2


PROBLEMS: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "the library's": ("RRRRR", PseudoLabels, {}),
    "two micro-batches": ("RRRRR", PseudoLabels, {"accumulate": 2}),
    "a clip": ("RRRRR", PseudoLabels, {"clip_norm": 0.1}),
    "a pair, two micro-batches": ("RRRRR", lambda: Batchwise("pair"), {"accumulate": 2}),
    "a loss of the batch": ("RRRRR", lambda: Batchwise("inner"), {}),
    "a loss of the batch, two micro-batches": ("XXXXX", lambda: Batchwise("inner"), {"accumulate": 2}),
    "a sum, two micro-batches": ("XXXXX", lambda: Batchwise("outer"), {"accumulate": 2}),
    "a parameter in the signal": ("RRRRR", lambda: Learns(False), {}),
    "a parameter in the loss": ("XXXXX", lambda: Learns(True), {}),
    "an inner loss of the teacher": ("XXXXX", ReadsTeacher, {}),
    "an outer loss of the teacher": ("XXXXX", OuterReadsTeacher, {}),
    "a loss that writes weights": ("XXXXX", Writes, {}),
    "half a signal": ("AARRA", lambda: Said(lambda t, x: half(t(x).softmax(-1))), {}),
    "a layer's signal": ("AARRA", lambda: Said(lambda t, x: t[-1](t[:-1](x).detach()).softmax(-1)), {}),
    "a wrong backward in the signal": ("XXRRX", lambda: Said(lambda t, x: Function.apply(t(x), 2.0, 2.0).softmax(-1)), {}),
    "a log_prob that is none": ("RRXXR", lambda: Said(hard=lambda s: replace(s, log_prob=s.outputs.gather(-1, s.value[:, None])[:, 0])), {}),
    "a logit without probs": ("RRXXR", lambda: Said(hard=lambda s: Signal(s.value, s.outputs.gather(-1, s.value[:, None])[:, 0] + 2)), {}),
    "a smoothed log_prob": ("RRXXR", lambda: Said(hard=lambda s: replace(s, log_prob=0.9 * s.log_prob + 0.1 * s.probs.log().mean(-1))), {}),
    "half a log_prob": ("RRXXR", lambda: Said(hard=lambda s: replace(s, log_prob=half(s.log_prob))), {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the problem.s .*_loss is")
@pytest.mark.parametrize("kind", PROBLEMS)
def test_kinds_of_problems(kind: str) -> None:
    expected, problem, options = PROBLEMS[kind]
    torch.manual_seed(0)
    found = {c: checked(Own(plain), *COLUMNS[c], problem=problem(), **options) for c in COLUMNS}
    assert found == {column: LETTERS[letter] for column, letter in zip(COLUMNS, expected, strict=True)}


# -------------------------------------------------------------------------------------------- clean students, by mode


class GRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 5)
        for part in x.chunk(2, 1):
            h = self.cell(part, h)
        return self.head(h)


def model(*layers: nn.Module, head: int = 6) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(head, C))


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
    "gru": GRU,
    "transformer": lambda: model(rows, nn.TransformerEncoderLayer(2, 1, 4, 0.1, batch_first=True), head=4),
    "default attention": lambda: model(rows, Own(lambda s, x: F.scaled_dot_product_attention(x, x, s.w(x)), put("w", lambda s: nn.Linear(2, 2))), head=4),
    "embeddings": lambda: model(Own(lambda s, x: s.e((x > 0).long()).flatten(1), put("e", lambda s: nn.Embedding(2, 2))), head=8),
    "a residual": lambda: model(Own(lambda s, x: x + s.w(x).tanh(), put("w", lambda s: nn.Linear(4, 4))), head=4),
    "dicts": lambda: Own(lambda s, x: s.plain(torch.cat([*x.values()], 1)) if isinstance(x, dict) else s.plain(x)),
    "an orthogonal layer": lambda: model(in_norms.orthogonal(nn.Linear(4, 6))),
    "zeros": lambda: model(nn.Linear(4, 6), nn.ReLU(), Own(plain, lambda s: [nn.init.zeros_(p) for p in s.parameters()]) if False else nn.Identity()),
}  # fmt: skip
MODES = [mode for mode in metapl.MODES if mode not in ("implicit", "none")]


@pytest.mark.parametrize("student", CLEAN)
def test_clean_students_are_right_in_every_mode(student: str) -> None:
    for mode in MODES:
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


@pytest.mark.parametrize("mode", ["forward", "unrolled", "reinforce", "reinforce_per_example"])
@pytest.mark.parametrize("fault", FAULTS)
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
    assert metapl.check_gradient(made, **batches, mode="reinforce").passed
