"""Students and problems of unusual kinds, and what verification says of each.

The verdicts stand in the columns of test_verify.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metapl import PseudoLabels, Signal

C = 3


class TwoLayers(nn.Module):
    """A student of two layers, with a forward of its kind, and with what the kind adds to it."""

    def __init__(
        self,
        forward: Callable[[Any, Any], Tensor],
        add: Callable[[Any], Any] = lambda student: None,
    ) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, C)
        self.forward_of_kind = forward
        add(self)

    def plain(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())

    def forward(self, x: Any) -> Tensor:
        return self.forward_of_kind(self, x)


class Function(torch.autograd.Function):
    """The identity, whose backward and jvp are multiplied by a factor, and so may be wrong."""

    @staticmethod
    def forward(x: Tensor, factor_of_backward: float, factor_of_jvp: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.factor_of_backward, ctx.factor_of_jvp = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.factor_of_backward * g, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:
        return ctx.factor_of_jvp * t


def counts(student: Any, x: Tensor) -> Tensor:
    student.n += 1
    return student.plain(x) * (1 + 0.1 * student.n)


def lazy(student: Any, x: Tensor) -> Tensor:
    if "mean" not in student._buffers:
        student.register_buffer("mean", x.mean(0).detach())
    return student.plain(x - student.mean)


def writing(write: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """Return a forward that first writes to a weight."""

    def forward(student: Any, x: Tensor) -> Tensor:
        write(student.a.weight)
        return student.plain(x)

    return forward


def average(student: Any, x: Tensor) -> Tensor:
    h = student.a(x).tanh()
    with torch.no_grad():
        student.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
    return student.b(h - student.mean)


def lagging(student: Any, x: Tensor) -> Tensor:
    h = student.a(x).tanh()
    # The mean is that of earlier passes.
    z = student.b(h - student.mean)
    with torch.no_grad():
        student.mean.mul_(0.5).add_(h.mean(0), alpha=0.5)
    return z


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


def rounded(t: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the operation's result with the gradient of the identity."""
    return t + (operation(t) - t).detach()


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


norms = nn.utils.parametrizations
old_norms = nn.utils
# Each kind has a letter for each of COLUMNS in test_verify.py, after the space those of a step
# as a function, and the arguments of TwoLayers.
KINDS: dict[str, tuple[Any, ...]] = {
    "plain": ("RRRRR RR", plain),
    "a frozen layer": ("RRRRR RR", plain, lambda s: s.a.requires_grad_(requires_grad=False)),
    "a shared layer": ("RRRRR RR", lambda s, x: s.b(s.c(s.d(s.a(x)).tanh())), shared),
    "a hook that scales outputs": ("RRRRR RR", plain, lambda s: s.a.register_forward_hook(scaled)),
    "a buffer that counts": ("RRRRR RR", counts, lambda s: s.register_buffer("n", torch.zeros(()))),
    # Of a step as a function it has to be there before: the state of a step has no place for it.
    "a buffer made by the first pass": ("RRRRR XX", lazy),
    "a gradient in its input": ("RRRRR RR", slopes),
    "a checkpoint": (
        "RRRRX RX",
        lambda s, x: s.b(checkpoint(lambda t: s.a(t).tanh(), x, use_reentrant=False)),
    ),
    "a reentrant checkpoint": (
        "XXXXX XX",
        lambda s, x: s.b(checkpoint(s.a, x.clone().requires_grad_(), use_reentrant=True)),
    ),
    # autograd.grad does not see its weights.
    "a reentrant checkpoint of a function": (
        "XXXXX XX",
        lambda s, x: s.b(
            checkpoint(lambda t: s.a(t).tanh(), x.clone().requires_grad_(), use_reentrant=True)
        ),
    ),
    "masks in a checkpoint": (
        "RRRRX XX",
        lambda s, x: s.b(
            checkpoint(lambda t: F.dropout(s.a(t).tanh(), 0.3), x, use_reentrant=False)
        ),
    ),
    "an embedding within max_norm": (
        "RRRRR XX",
        embedded,
        put("e", lambda s: nn.Embedding(2, C, max_norm=50)),
    ),
    "float32 within": ("RRRRR RR", lambda s, x: s.b(s.a(x).float().tanh().to(x.dtype))),
    "an attribute of a weight": (
        "RRRRR XX",
        lambda s, x: s.plain(x) * s.a.weight.scale,
        lambda s: setattr(s.a.weight, "scale", 0.5),
    ),
    "float32 alone": ("RRRRR XX", lambda s, x: s.plain(x) + x @ torch.ones(4, C)),
    "weight norm": ("RRRRR RR", plain, put("a", lambda s: norms.weight_norm(s.a))),
    "the old weight norm": ("XXXXX XX", plain, put("a", lambda s: old_norms.weight_norm(s.a))),
    "spectral norm": ("XAAAA AA", plain, put("a", lambda s: norms.spectral_norm(s.a))),
    "straight-through": ("AAAAA AA", lambda s, x: s.b(rounded(3 * s.a(x).tanh(), torch.round))),
    "a binary layer": ("AAAAA AA", lambda s, x: s.b(rounded(s.a(x).tanh(), torch.sign))),
    "a detached average": ("AAAAA AA", lambda s, x: s.plain(x) - s.plain(x).mean(0).detach()),
    "a detached branch": ("AAAAA AA", lambda s, x: s.plain(x) + s.plain(x).detach().softmax(-1)),
    "a doubled backward": ("AAAAA AA", lambda s, x: Function.apply(s.plain(x), 2.0, 2.0)),
    "a codebook": (
        "AAAAA AA",
        codebook,
        lambda s: s.register_buffer("codes", 0.5 * torch.randn(5, 6)),
    ),
    "an average in a buffer": (
        "XAAAA AA",
        average,
        lambda s: s.register_buffer("mean", torch.zeros(6)),
    ),
    "an average of earlier passes": (
        "RRRRA RA",
        lagging,
        lambda s: s.register_buffer("mean", torch.zeros(6)),
    ),
    "a momentum encoder": (
        "XAAAA AA",
        momentum_encoder,
        put("slow", lambda s: nn.Linear(4, 6).requires_grad_(requires_grad=False)),
    ),
    "a hook on an activation": ("XAAAA AA", hooked),
    "a hook on a backward pass": (
        "XAAAA AA",
        plain,
        lambda s: s.b.register_full_backward_hook(doubled),
    ),
    "another jvp than backward": ("XRRRR RR", lambda s, x: Function.apply(s.plain(x), 1.0, 0.5)),
    # These are refused by the modes, and in the steps, that repeat a pass.
    "an attribute that counts": ("XRRRR XX", counts, put("n", lambda s: 0)),
    "a hook that counts": ("XRRRR XX", plain, lambda s: s.a.register_forward_hook(Counting())),
    "an input in place": ("XXXXX XX", lambda s, x: s.plain(x.mul_(1.1))),
    "a generator of its own": (
        "XRRRR XX",
        lambda s, x: s.plain(x) + torch.rand(C, generator=s.g).to(x),
        put("g", lambda s: torch.Generator()),
    ),
    # These are refused by name.
    "python's random numbers": ("XXXXX XX", lambda s, x: s.plain(x) * (1 + 0.1 * random.random())),
    "numpy's random numbers": (
        "XXXXX XX",
        lambda s, x: s.plain(x) * (1 + 0.1 * numpy.random.rand()),  # noqa: NPY002
    ),
    "weights written by .data": ("XXXXX XX", writing(lambda w: w.data.mul_(0.9))),
    "weights written by numpy": ("XXXXX XX", writing(lambda w: w.detach().numpy().__imul__(0.9))),
    "clamped weights": ("XXXXX XX", writing(lambda w: w.data.clamp_(-0.2, 0.2))),
    "weights that decay slowly": ("XXXXX XX", writing(lambda w: w.data.mul_(1 - 1e-9))),
    "an embedding beyond max_norm": (
        "XXXXX XX",
        embedded,
        put("e", lambda s: nn.Embedding(2, C, max_norm=0.5)),
    ),
    "a tensor in a weight's memory": (
        "XXXXX XX",
        lambda s, x: s.plain(x) + (x @ s.views[0].T)[:, :C],
        put("views", lambda s: [s.a.weight.detach()]),
    ),
}


class Problem(PseudoLabels):
    """Pseudo-labels whose signal and losses functions may change.

    Their names are ``hard``, ``soft``, ``inner`` and ``outer``. All but ``soft`` take what the
    library's method returns. A ``matrix`` is a parameter of the problem.
    """

    def __init__(self, matrix: nn.Parameter | None = None, **change: Any) -> None:
        super().__init__()
        # A problem is frozen, so its attributes are written past the dataclass.
        vars(self).update(change=change, matrix=matrix, teacher=None)

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        signal = super().signal(teacher, batch, student_outputs, generator=generator)
        change = vars(self)["change"]
        if self.kind == "hard" and "hard" in change:
            return change["hard"](signal)
        if self.kind == "soft" and "soft" in change:
            return Signal(change["soft"](self, teacher, batch))
        return signal

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        losses = super().inner_loss(outputs, signal, batch)
        change = vars(self)["change"]
        if "inner" in change:
            return change["inner"](self, losses, outputs, batch, params)
        return losses

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        loss = super().outer_loss(outputs, batch)
        change = vars(self)["change"]
        if "outer" in change:
            return change["outer"](self, loss, outputs, batch)
        return loss


def half(t: Tensor) -> Tensor:
    return (t + t.detach()) / 2


def writes(self: Any, losses: Tensor, outputs: Tensor, batch: Any, params: Any) -> Tensor:
    next(iter(params.values())).data.mul_(0.9)
    return losses


def logit(s: Any) -> Tensor:
    return s.outputs.gather(-1, s.value[:, None])[:, 0]


learned = {"matrix": nn.Parameter(torch.eye(C) + 0.1)}
with_teacher = {
    "inner": lambda self, losses, z, x, params: losses + 0.1 * (z * self.teacher(x)).sum(1)
}
batchwise = {"inner": lambda self, losses, z, x, params: losses * z.square().mean()}
penalty = {
    "inner": lambda self, losses, z, x, params: (
        losses + 0.01 * sum(p.square().sum() for p in params.values())
    )
}
# Each has its letters, the changes of Problem, and options of the call.
PROBLEMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a clip": ("RRRRR RR", {}, {"clip_norm": 0.1}),
    "micro-batches": ("RRRRR RR", {}, {"accumulate": 2}),
    "a pair in micro-batches": (
        "RRRRR RR",
        {"outer": lambda self, loss, z, b: (4 * loss, 4)},
        {"accumulate": 2},
    ),
    "a sum in micro-batches": (
        "XXXXX XX",
        {"outer": lambda self, loss, z, b: loss * len(z)},
        {"accumulate": 2},
    ),
    "a pair that is no mean": (
        "XXXXX XX",
        {"outer": lambda self, loss, z, b: (loss, len(z))},
        {"accumulate": 2},
    ),
    "a loss of the batch": ("RRRRR RR", batchwise, {}),
    "a loss of the batch in micro-batches": ("XXXXX XX", batchwise, {"accumulate": 2}),
    "a penalty on weights": ("RRRRR RR", penalty, {}),
    # No teacher has it, so that nothing would learn it.
    "a parameter in the signal": (
        "XXXXX XX",
        {"soft": lambda self, t, x: (t(x) @ self.matrix).softmax(-1), **learned},
        {},
    ),
    # The eager road finds the leaf in the loss's graph and refuses. The pure road has no graph to
    # look at: verification says how far off the teacher is, and that it is read past the signal.
    "a parameter in a loss": (
        "XXXXX XX",
        {
            "inner": lambda self, losses, z, x, params: losses * (z @ self.matrix).square().sum(1),
            **learned,
        },
        {},
    ),
    "an inner loss of the teacher": ("XXXXX XX", with_teacher, {}),
    "an outer loss of the teacher": (
        "RRRRR XX",
        {"outer": lambda self, loss, z, b: loss + 0.1 * (z * self.teacher(b[0])).mean()},
        {},
    ),
    "a loss that writes weights": ("XXXXX XX", {"inner": writes}, {}),
    "half a signal": ("AARAA AA", {"soft": lambda self, t, x: half(t(x).softmax(-1))}, {}),
    "a layer's signal": (
        "AARAA AA",
        {"soft": lambda self, t, x: t[-1](t[:-1](x).detach()).softmax(-1)},
        {},
    ),
    "a hard signal, straight-through": (
        "AARAA AA",
        {"soft": lambda self, t, x: rounded(t(x).softmax(-1), torch.round)},
        {},
    ),
    "a wrong backward in the signal": (
        "XXRXX XX",
        {"soft": lambda self, t, x: Function.apply(t(x), 2.0, 2.0).softmax(-1)},
        {},
    ),
    "a log_prob that is none": ("RRXRR RR", {"hard": lambda s: replace(s, log_prob=logit(s))}, {}),
    "a logit without probs": ("RRXRR RR", {"hard": lambda s: Signal(s.value, logit(s) + 2)}, {}),
    "a smoothed log_prob": (
        "RRXRR RR",
        {"hard": lambda s: replace(s, log_prob=0.9 * s.log_prob - 0.1)},
        {},
    ),
    "half a log_prob": ("RRXRR RR", {"hard": lambda s: replace(s, log_prob=half(s.log_prob))}, {}),
}
