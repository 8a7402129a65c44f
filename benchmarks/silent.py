"""Who is silently wrong: hypergradients of unusual students, by metapl, by others and by hand.

    python benchmarks/silent.py                     # an hour on one core
    python benchmarks/silent.py --write benchmarks/results/silent.md

A student takes three steps of plain SGD on a teacher's soft labels; asked is the gradient of its
loss on labeled data in the teacher's weights (bergson's trainer: in the weights of the examples,
which is what it differentiates in). Each way is used as its documentation says: TorchOpt's
``MetaSGD``, higher's ``innerloop_ctx``, BOAT's ``Problem``, bergson's ``Trainer``,
``metapl.BilevelTrainer`` and ``metapl.hypergradient``; and ways that people write by hand, of which
two check their gradient along one direction by the difference of two real trainings. A way is

- *right* if it is off by at most 1e-3 (5e-2 in bfloat16) of the derivative by central differences
  of the real thing in float64: the student, trained by ``backward()`` and ``torch.optim.SGD``
  alone, from the same seeds; and *right to 1e-5* by that bound, which no student with a part in
  bfloat16 can keep;
- *refused* if it ends with an error, whose last line is kept;
- *warned* if it is off, and said something by ``warnings``; *wrong* if it is off, and said nothing.

The students with a star have gradients that are off their loss's derivative on purpose, so that no
way can follow it. Each library has an environment of its own, as in ``peers.py``, and each student
a process of its own. A rate that the teacher has learned is given to each way as it takes one: to
TorchOpt and bergson by a closure, to higher by ``override``, to metapl by
``hypergradient(wrt=("teacher", "lr"))``, since a trainer refuses a closure. A third table is of
torch's own derivatives of two operations.
"""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import random
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import peers
import torch
from harness import (
    RESULTS,
    Row,
    apart,
    arguments,
    environment,
    grid,
    loaded,
    parsed,
    show,
    write_json,
)
from rival_attribution import Stream, Weighted
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from metapl.execution.state import RandomState

sys.path.append(str(Path(__file__).parents[1] / "tests" / "library"))
from kinds import KINDS as TESTED
from kinds import C, TwoLayers, embedded, plain, put

RESULT = RESULTS / "silent.json"
STEPS = 3
TOLERANCE = 1e-3
CHECKED_TO = 1e-4
"""What a check by hand lets through: of 1e-3, 1e-4 and 1e-5 the one with none wrong, most right."""
CLOSE = 1e-5
IN_BFLOAT16 = 5e-2
STAR = "\\*"
RATE = peers.LEARNING_RATE = 1.0
Gradient = Sequence[Tensor]


class Swish(torch.autograd.Function):
    """A kernel whose backward is not differentiable, as fused kernels are often wrapped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        s = ctx.x.sigmoid()
        return g * (s + ctx.x * s * (1 - s))


class Marked(Swish):
    """The same with a mark that says so, as PyTorch asks for."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Swish.backward(ctx, g)


def attention(student: Any, x: Tensor) -> Tensor:
    h = student.a(x).unflatten(1, (3, 2))
    return student.b(F.scaled_dot_product_attention(h, h, student.w(h)).flatten(1))


def stochastic_depth(student: Any, x: Tensor) -> Tensor:
    h = student.a(x).tanh()
    return student.b(h + student.c(h).tanh() if torch.rand(()) < 0.5 else h)


def in_bfloat16(student: Any, x: Tensor) -> Tensor:
    return student.b(
        F.linear(*(t.bfloat16() for t in (x, student.a.weight, student.a.bias))).tanh().to(x.dtype)
    )


def normed_in(dtype: torch.dtype) -> Any:
    def forward(student: Any, x: Tensor) -> Tensor:
        h = student.a(x).to(dtype)
        norm = student.n
        return student.b(
            F.layer_norm(h, (6,), norm.weight.to(dtype), norm.bias.to(dtype)).to(x.dtype).tanh()
        )

    return forward


def physics(student: Any, x: Tensor) -> Tensor:
    """Return the outputs and their slopes in the first input.

    The losses of physics-informed networks take them so.
    """
    x = x.clone().requires_grad_()
    u = student.plain(x)
    return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, :1]


def graph_convolution(student: Any, x: Tensor) -> Tensor:
    """Return the outputs where rows are nodes of a ring, which hear from their neighbours."""
    rows = torch.arange(len(x))
    heard = torch.zeros_like(x).index_add(0, rows, x.roll(1, 0)).index_add(0, rows, x.roll(-1, 0))
    return student.b(student.a(x + heard).tanh())


def packed(student: Any, x: Tensor) -> Tensor:
    lengths = 1 + torch.arange(len(x)) % 2
    sequences = student.a(x).unflatten(1, (2, 3))
    outputs, _ = student.g(
        pack_padded_sequence(sequences, lengths, batch_first=True, enforce_sorted=False)
    )
    return student.b(pad_packed_sequence(outputs, batch_first=True)[0].sum(1))


def twice(student: Any, x: Tensor) -> Tensor:
    return student.b(student.block_again(student.block(student.a(x))))


def one_block(student: Any) -> None:
    student.block = student.block_again = nn.Sequential(nn.Linear(6, 6), nn.Tanh())


def connectionist(student: Any, x: Tensor) -> Tensor:
    """Return the logits, scaled by a score of an alignment."""
    frames = student.c(student.a(x).tanh()).unflatten(1, (4, C)).log_softmax(-1).transpose(0, 1)
    sizes = torch.full((len(x),), 4), torch.full((len(x),), 2)
    scores = F.ctc_loss(frames, torch.ones(len(x), 2, dtype=torch.long), *sizes, reduction="none")
    return student.plain(x) * (1 + 0.1 * scores[:, None])


def sampled_grid(student: Any, x: Tensor) -> Tensor:
    places = F.affine_grid(
        0.3 * student.a(x).view(-1, 2, 3), [len(x), 1, 2, 3], align_corners=False
    )
    return student.b(F.grid_sample(x.view(-1, 1, 2, 2), places, align_corners=False).flatten(1))


def solved(student: Any, x: Tensor) -> Tensor:
    return student.b(torch.linalg.solve(torch.eye(6) + student.c.weight, student.a(x).T).T)


def mapped(student: Any, x: Tensor) -> Tensor:
    return student.b(torch.func.vmap(lambda row: student.n(row[None])[0])(student.a(x)).tanh())


LEARNED_RATE = "a learned rate"
COMPILED_STUDENT = "a compiled student"
# the arguments of TwoLayers: a forward, and what is added to two linear layers
KINDS: dict[str, tuple[Any, ...]] = {
    "two layers": (plain,),
    "tied weights": TESTED["a shared layer"][1:],
    "a frozen layer": TESTED["a frozen layer"][1:],
    "batch norm": (lambda s, x: s.b(s.n(s.a(x)).tanh()), put("n", lambda s: nn.BatchNorm1d(6))),
    "dropout": (lambda s, x: s.b(F.dropout(s.a(x).tanh(), 0.3)),),
    "stochastic depth": (stochastic_depth, put("c", lambda s: nn.Linear(6, 6))),
    "default (fused) attention": (attention, put("w", lambda s: nn.Linear(2, 2))),
    "bfloat16 inside": (in_bfloat16,),
    "a gradient in its input": TESTED["a gradient in its input"][1:],
    "a kernel with a backward of its own": (lambda s, x: s.b(Swish.apply(s.a(x))),),
    "a checkpoint": TESTED["a checkpoint"][1:],
    "a checkpoint with dropout": TESTED["masks in a checkpoint"][1:],
    "a reentrant checkpoint": TESTED["a reentrant checkpoint"][1:],
    "weight norm": TESTED["weight norm"][1:],
    "weight norm, the old one": TESTED["the old weight norm"][1:],
    "spectral norm": TESTED["spectral norm"][1:],
    "a sparse embedding": (embedded, put("e", lambda s: nn.Embedding(2, C, sparse=True))),
    "an embedding within max_norm": TESTED["an embedding within max_norm"][1:],
    "an embedding beyond max_norm": TESTED["an embedding beyond max_norm"][1:],
    "weights clamped in forward": TESTED["clamped weights"][1:],
    "a weight's memory in a list": TESTED["a tensor in a weight's memory"][1:],
    "a hook on an output": TESTED["a hook that scales outputs"][1:],
    "a hook on an activation's gradient": TESTED["a hook on an activation"][1:],
    "a hook on a parameter's "
    "gradient": (plain, lambda s: s.a.weight.register_hook(lambda g: 2 * g)),
    "a hook on a module's backward pass": TESTED["a hook on a backward pass"][1:],
    "a buffer made by the first pass": TESTED["a buffer made by the first pass"][1:],
    "a count in an attribute": TESTED["an attribute that counts"][1:],
    "Python's random numbers": TESTED["python's random numbers"][1:],
    "an input changed in place": TESTED["an input in place"][1:],
    "a captured teacher": (lambda s, x: s.plain(x) + 0.3 * s.held[0](x),),
    "a momentum encoder": TESTED["a momentum encoder"][1:],
    "an average in a buffer": TESTED["an average in a buffer"][1:],
    "rounding, straight-through": TESTED["straight-through"][1:],
    "a codebook of moving averages": TESTED["a codebook"][1:],
    "a physics-informed network": (physics,),
    "a graph convolution": (graph_convolution,),
    "packed sequences in a GRU": (packed, put("g", lambda s: nn.GRU(3, 6, batch_first=True))),
    "a block used twice": (twice, one_block),
    LEARNED_RATE: (plain,),
    COMPILED_STUDENT: (plain,),
    "CTC": (connectionist, put("c", lambda s: nn.Linear(6, 4 * C))),
    "grid_sample": (sampled_grid,),
    "a backward that is once_differentiable": (lambda s, x: s.b(Marked.apply(s.a(x))),),
    "linalg.solve": (solved, put("c", lambda s: nn.Linear(6, 6, bias=False))),
    "GroupNorm under vmap": (mapped, put("n", lambda s: nn.GroupNorm(2, 6))),
    "bfloat16 in a LayerNorm": (normed_in(torch.bfloat16), put("n", lambda s: nn.LayerNorm(6))),
}  # fmt: skip
WITHOUT_BFLOAT16 = {
    "bfloat16 inside": KINDS["two layers"],
    "bfloat16 in a LayerNorm": (normed_in(torch.float64), *KINDS["bfloat16 in a LayerNorm"][1:]),
}
# Whose passes all need a graph.
TAKES_GRADIENTS = (
    "a gradient in its input",
    "a physics-informed network",
)
# whose own gradient is not the derivative of their loss, or leaves out state that passes carry on
ON_PURPOSE = (
    *("spectral norm", "a hook on an activation's gradient", "a hook on a module's backward pass"),
    *(
        "a momentum encoder",
        "an average in a buffer",
        "rounding, straight-through",
        "a codebook of moving averages",
    ),
)


def case(
    kind: str, exact: bool = False
) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor], Tensor]:
    """Return teacher, student, a labeled batch and an unlabeled one.

    Generators begin anew. ``exact``: without bfloat16.
    """
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))
    with warnings.catch_warnings():
        # The old norm is deprecated.
        warnings.simplefilter("ignore")
        student = TwoLayers(
            *(WITHOUT_BFLOAT16 if exact and kind in WITHOUT_BFLOAT16 else KINDS)[kind]
        )
    if kind == COMPILED_STUDENT and not exact:
        # Of the compiler only the part that decides about derivatives; what follows makes kernels
        # for a minute.
        student.compile(backend="aot_eager")
    peers.LEARNING_RATE = RATE
    if kind == LEARNED_RATE:
        teacher.log_rate = nn.Parameter(torch.tensor(-0.1))
        peers.LEARNING_RATE = teacher.log_rate.exp()
    vars(student)["held" if "captured" in kind else "_none"] = [teacher]
    labeled, unlabeled = (torch.randn(8, 4), torch.randint(C, (8,))), torch.randn(8, 4)
    seed_all()
    return teacher, student, labeled, unlabeled


def after_real_steps(
    kind: str, order: str, phi: Tensor | None = None, weights: Tensor | None = None
) -> float:
    """Return the outer loss after the student's real steps.

    The teacher has other weights, ``phi``, or the examples have ``weights``.
    """
    teacher, student, (x, y), u = case(kind, exact=True)
    if phi is not None:
        nn.utils.vector_to_parameters(phi, teacher.parameters())
    rate = float(teacher.log_rate.detach().exp()) if kind == LEARNED_RATE else RATE
    sgd = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=rate)
    with warnings.catch_warnings():
        # Checkpoints warn.
        warnings.simplefilter("ignore")
        for _ in range(STEPS):
            q = teacher(u).softmax(-1).detach()
            losses = F.cross_entropy(student(u), q, reduction="none")
            sgd.zero_grad()
            (losses if weights is None else weights * losses).mean().backward()
            sgd.step()
        # metapl draws the masks of the outer loss from streams of its own.
        if order == "branched":
            RandomState.now(torch.device("cpu")).branch().restore()
        with torch.enable_grad() if kind in TAKES_GRADIENTS else torch.no_grad():
            return float(F.cross_entropy(student(x), y))


def truth(kind: str, order: str) -> Tensor:
    """Return the derivative of :func:`after_real_steps` by central differences.

    Differences of two sizes have to agree.
    """
    teacher, _, _, u = case(kind)
    phi = nn.utils.parameters_to_vector(teacher.parameters()).detach()
    slopes = []
    name, point = ("weights", torch.ones(len(u))) if order == "weights" else ("phi", phi)
    for move in (1e-5, 3e-6):
        ends = [
            [after_real_steps(kind, order, **{name: point + d}) for d in (e, -e)]
            for e in move * torch.eye(len(point))
        ]
        slopes.append(torch.tensor([(plus - minus) / (2 * move) for plus, minus in ends]))
    if torch.dist(*slopes) > 1e-2 * TOLERANCE * slopes[0].norm():
        raise SystemExit(
            f"{kind}: the differences do not agree, so that there is nothing to compare with"
        )
    return slopes[0]


def at_the_end(student: Any, teacher: nn.Module, labeled: Any) -> Gradient:
    return torch.autograd.grad(
        F.cross_entropy(student(labeled[0]), labeled[1]), list(teacher.parameters())
    )


def by_swapping(teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor) -> Gradient:
    """Go backward twice through the module itself, the moved weight put in each weight's place."""
    places = []
    for part in student.modules():
        for name, p in part.named_parameters(recurse=False):
            if p.requires_grad:
                places.append((part, name))
    params = [getattr(part, name) for part, name in places]
    for _ in range(STEPS):
        loss = F.cross_entropy(student(u), teacher(u).softmax(-1))
        grads = torch.autograd.grad(loss, params, create_graph=True)
        params = [p - peers.LEARNING_RATE * g for p, g in zip(params, grads, strict=True)]
        for (part, name), p in zip(places, params, strict=True):
            part._parameters[name] = p  # type: ignore[assignment]
    return at_the_end(student, teacher, labeled)


def seed_all() -> None:
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(1)


def by_swapping_with_check(copied: bool) -> Any:
    """Return :func:`by_swapping` with a check of its derivative along one direction.

    It is compared with the difference of two real trainings: of copies of the networks, or of
    themselves, whose state is put back. More than :data:`CHECKED_TO` between them is refused.
    """

    def gradient(teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor) -> Gradient:
        draw = torch.Generator().manual_seed(0)
        direction = [torch.randn(p.shape, generator=draw) for p in teacher.parameters()]

        def loss_after(move: float) -> float:
            pair = (teacher, student)
            teacher_moved, trained = copy.deepcopy(pair) if copied else pair
            states = copy.deepcopy([network.state_dict() for network in (teacher_moved, trained)])
            seed_all()
            with torch.no_grad():
                for p, d in zip(teacher_moved.parameters(), direction, strict=True):
                    p.add_(d, alpha=move)
            learned = getattr(teacher_moved, "log_rate", None)
            rate = RATE if learned is None else learned.exp().item()
            sgd = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=rate)
            for _ in range(STEPS):
                sgd.zero_grad()
                F.cross_entropy(trained(u), teacher_moved(u).softmax(-1).detach()).backward()
                sgd.step()
            loss = F.cross_entropy(trained(labeled[0]), labeled[1]).item()
            for network, state in zip((teacher_moved, trained), states, strict=True):
                network.load_state_dict(state, strict=False)
            return loss

        quotient = (loss_after(1e-5) - loss_after(-1e-5)) / 2e-5
        seed_all()
        grads = by_swapping(teacher, student, labeled, u)
        slope = sum((g * d).sum().item() for g, d in zip(grads, direction, strict=True))
        if not abs(slope - quotient) <= CHECKED_TO * abs(quotient):
            raise ValueError(
                f"the derivative is {slope:.3g}, the difference quotient {quotient:.3g}"
            )
        return grads

    return gradient


def scheduled(rate: Any) -> Any:
    """Return a rate as TorchOpt takes it: a learned one by a closure."""
    return (lambda step: rate) if isinstance(rate, Tensor) else rate


def by_torchopt(teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor) -> Gradient:
    """Return the gradient by ``torchopt.MetaSGD``."""
    import torchopt

    inner = torchopt.MetaSGD(student, lr=scheduled(peers.LEARNING_RATE))
    for _ in range(STEPS):
        inner.step(F.cross_entropy(student(u), teacher(u).softmax(-1)))
    return at_the_end(student, teacher, labeled)


def by_bergson(teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor) -> Gradient:
    """Call ``train`` and ``backward`` of ``bergson.magic.Trainer``, as its command does.

    Checkpoints lie in a folder.
    """
    import torchopt
    from bergson.magic.trainer import BackwardState, Trainer

    model, train = Weighted(student), (u, teacher(u).softmax(-1).detach())
    stream = Stream({"train": train, "order": torch.arange(len(u)).expand(STEPS, -1)})
    trainer, state = Trainer.initialize(model, torchopt.sgd(scheduled(peers.LEARNING_RATE)))
    with tempfile.TemporaryDirectory() as folder:
        state = trainer.train(state, stream, save_dir=folder, save_mode="all")
        with state.activate(model) as params:
            loss = F.cross_entropy(student(labeled[0]), labeled[1])
            grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        begin = BackwardState(grads, [], torch.zeros_like(stream.weights))
        return [trainer.backward(folder, stream, begin, state, save_mode="all").weight_grads]


def by_higher(teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor) -> Gradient:
    """Return the gradient by ``higher.innerloop_ctx``; its ``override`` takes a learned rate."""
    import higher

    rate = peers.LEARNING_RATE
    override = {"lr": [rate]} if isinstance(rate, Tensor) else None
    inner = torch.optim.SGD(student.parameters(), lr=float(rate))
    with higher.innerloop_ctx(student, inner, copy_initial_weights=False, override=override) as (
        patched,
        stepping,
    ):
        for _ in range(STEPS):
            stepping.step(F.cross_entropy(patched(u), teacher(u).softmax(-1)))
        return at_the_end(patched, teacher, labeled)


def trainer_of(teacher: nn.Module, student: nn.Module, mode: Any, **options: Any) -> Any:
    """Return a trainer whose teacher moves by minus its gradient, at the rate that is set."""
    import metapl

    return metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        lookahead=STEPS,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=peers.LEARNING_RATE),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=1.0),
        teacher_losses=(),
        **options,
    )


def by_metapl(mode: Any, **options: Any) -> Any:
    """Return the gradient by ``metapl.BilevelTrainer``: the teacher moves by minus it.

    With a learned rate, which a trainer does not take, it is by :func:`by_hypergradient`.
    """
    by_function = by_hypergradient(mode, **options)

    def gradient(teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor) -> Gradient:
        import metapl

        rate = peers.LEARNING_RATE
        if isinstance(rate, Tensor):
            return by_function(teacher, student, labeled, u)
        trainer = trainer_of(teacher, student, mode, **options)
        weights_before = [p.detach().clone() for p in teacher.parameters()]
        trainer.step(labeled, metapl.Lookahead([u] * STEPS))
        return [
            old - p.detach() for old, p in zip(weights_before, teacher.parameters(), strict=True)
        ]

    return gradient


def by_stack(teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor) -> Gradient:
    """Return the gradient by a stack of one step, which is recorded and mapped.

    A stack takes no learned rate.
    """
    from metapl.functional import stack

    step, state = trainer_of(teacher, student, "forward").functional()
    inner = tuple(u[None] for _ in range(STEPS))
    outer = tuple(t[None] for t in labeled)
    before = stack([state])
    after, _ = torch.func.vmap(step, randomness="different")(before, outer, inner)
    moved = after.teacher.params
    return [old[0] - moved[name][0] for name, old in before.teacher.params.items()]


def by_hypergradient(mode: Any, **options: Any) -> Any:
    """Return the gradient by ``metapl.hypergradient``.

    With a learned rate it is asked for in the rate too, whose own graph goes on.
    """

    def gradient(teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor) -> Gradient:
        import metapl

        rate = peers.LEARNING_RATE
        is_learned = isinstance(rate, Tensor)
        result = metapl.hypergradient(
            teacher,
            student,
            outer=labeled,
            inner=metapl.Lookahead([u] * STEPS),
            mode=mode,
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=float(rate)),
            wrt=("teacher", "lr") if is_learned else ("teacher",),
            **options,
        )
        if not is_learned:
            return list(result.grads.values())
        through_rate = torch.autograd.grad(
            rate,
            list(teacher.parameters()),
            result.settings["lr"].sum(),
            allow_unused=True,
            materialize_grads=True,
        )
        return [
            by_signal + by_rate
            for by_signal, by_rate in zip(result.grads.values(), through_rate, strict=True)
        ]

    return gradient


# The module of a library, the order of what it draws, and its gradient.
WAYS: dict[str, tuple[str, str, Any]] = {
    "by hand, functional_call": ("torch", "", lambda *given: peers.by_hand(*given, STEPS)),
    "by hand, weights swapped": ("torch", "", by_swapping),
    "by hand, checked on copies": ("torch", "", by_swapping_with_check(copied=True)),
    "by hand, checked in place": ("torch", "", by_swapping_with_check(copied=False)),
    "TorchOpt 0.7.3": ("torchopt", "", by_torchopt),
    "higher 0.2.1": ("higher", "", by_higher),
    "BOAT 1.1.1": ("boat_torch", "", lambda *given: peers.by_boat(*given, STEPS)),
    "bergson 2.5.1": ("bergson.magic.trainer", "weights", by_bergson),
    "metapl, forward": ("metapl", "branched", by_metapl("forward")),
    "metapl, unrolled": ("metapl", "branched", by_metapl("unrolled")),
    "metapl, forward, verify=False": ("metapl", "branched", by_metapl("forward", verify=False)),
    "metapl, forward, compiled": ("metapl", "", by_metapl("forward", compile=True)),
    "metapl, forward, stacked": ("metapl", "", by_stack),
    "metapl.hypergradient": ("metapl", "branched", by_hypergradient("forward")),
    "metapl.hypergradient, verify=False": (
        "metapl",
        "branched",
        by_hypergradient("forward", verify=False),
    ),
}


def judged(way: str, kind: str, exact: Tensor) -> Row:
    """Return what a way says of a student, in this process."""
    with warnings.catch_warnings(record=True) as warnings_seen:
        warnings.simplefilter("always")
        try:
            gradient_vector = torch.cat([g.detach().flatten() for g in WAYS[way][2](*case(kind))])
        # Whatever a library raises is its refusal.
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return {
                "outcome": "refused",
                "said": f"{type(error).__name__}: {(lines or [''])[-1][:300]}",
            }
    off = float(torch.dist(gradient_vector, exact) / exact.norm())
    if off <= (IN_BFLOAT16 if "bfloat16" in kind else TOLERANCE):
        return {"outcome": "right", "error": off}
    about = [
        str(warning.message)[:300]
        for warning in warnings_seen
        if not issubclass(warning.category, DeprecationWarning | FutureWarning)
    ]
    # Of bergson's checkpoints.
    said = [words for words in about if not words.startswith("torch.distributed")]
    return (
        {"outcome": "warned", "error": off, "said": said[-1]}
        if said
        else {"outcome": "wrong", "error": off}
    )


def solve_of(a: Tensor) -> Tensor:
    return torch.linalg.solve(a, torch.arange(4.0)).square().sum()


OPERATIONS = {"linalg.solve": solve_of, "linalg.det": torch.linalg.det}


def second_derivatives_of_torch() -> list[Row]:
    """Return how far torch's second derivatives along a direction are from differences.

    The differences are those of its first derivatives; there are three orders.
    """
    rows = []
    for name, operation in OPERATIONS.items():
        draw = torch.Generator().manual_seed(0)
        point = torch.eye(4) + 0.3 * torch.randn(4, 4, generator=draw)
        along = torch.randn(4, 4, generator=draw)

        def gradient(
            a: Tensor, *, create_graph: bool = False, operation: Any = operation
        ) -> Tensor:
            return torch.autograd.grad(operation(a), a, create_graph=create_graph)[0]

        plus, minus = (gradient((point + side * 1e-6 * along).requires_grad_()) for side in (1, -1))
        exact = (plus - minus) / 2e-6
        results = dict[str, Tensor]()
        a = point.clone().requires_grad_()
        results["reverse over reverse"] = torch.autograd.grad(
            (gradient(a, create_graph=True) * along).sum(), a
        )[0]
        with warnings.catch_warnings(), forward_ad.dual_level():
            # The first dual number of a process warns.
            warnings.simplefilter("ignore")
            dual = forward_ad.make_dual(a, along)
            results["reverse over forward"] = torch.autograd.grad(
                forward_ad.unpack_dual(operation(dual)).tangent, a
            )[0]
            slope = forward_ad.unpack_dual(gradient(dual, create_graph=True)).tangent
            results["forward over reverse"] = slope.detach()
        rows += [
            {"operation": name, "order": order, "error": float(torch.dist(t, exact) / exact.norm())}
            for order, t in results.items()
        ]
    return rows


def answer(way: str, kinds: Sequence[str], truths: str) -> list[Row]:
    """Return a row for each student; each has a process of its own, which may die."""
    # They are imported once, and not in each process.
    for name in ("torch._dynamo", WAYS[way][0]):
        importlib.import_module(name)
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    exact = torch.load(truths)
    rows = list[Row]()
    for kind in kinds:
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(
            target=lambda kind_of_case=kind, pipe=sender: pipe.send(
                judged(way, kind_of_case, exact[kind_of_case, WAYS[way][1]])
            )
        )
        process.start()
        sender.close()
        try:
            row = receiver.recv()
        except EOFError:
            process.join()
            row = {"outcome": "refused", "said": f"the process died ({process.exitcode})"}
        rows.append({"kind": kind, "way": way, **row})
        process.join()
    return rows


def run(args: Any) -> None:
    """Write all rows, way by way; the exact derivatives are found by this process."""
    torch.set_num_threads(1)
    kinds = (
        ("two layers", "weights clamped in forward", "rounding, straight-through")
        if args.miniature
        else (*KINDS,)
    )
    exact = dict[tuple[str, str], Tensor]()
    result = {"rows": [], "not_installed": {}, "measured_on": environment()}
    if args.ways:
        result = loaded(args.out)
        result["rows"] = [row for row in result["rows"] if row["way"] not in args.ways]
        result.setdefault("measured_later", {}).update(dict.fromkeys(args.ways, environment()))
    torch.set_default_dtype(torch.float64)
    result["torch"] = second_derivatives_of_torch()
    with tempfile.TemporaryDirectory() as folder:
        truths = Path(folder) / "truths.pt"
        few = ("by hand, functional_call", "metapl, forward") if args.miniature else WAYS
        for way in args.ways or few:
            python, reason = installed(way, Path(folder))
            if reason:
                result["not_installed"][way] = reason
                continue
            order = WAYS[way][1]
            for kind in (kind for kind in kinds if (kind, order) not in exact):
                drawn = order != "branched" or after_real_steps(kind, order) != after_real_steps(
                    kind, ""
                )
                key = kind, order if drawn else ""
                exact[kind, order] = exact[key] if key in exact else truth(*key)
            torch.save(exact, truths)
            result["rows"] += apart(f"silent.answer({way!r}, {kinds!r}, {str(truths)!r})", python)
            write_json(args.out, result)
    torch.set_default_dtype(torch.float32)


def installed(way: str, folder: Path) -> tuple[str, str]:
    """Return the interpreter that has a way's library, or the reason why there is none."""
    module = WAYS[way][0].split(".")[0]
    if module in ("torch", "metapl"):
        return sys.executable, ""
    packages = peers.PEERS[way][0] if way in peers.PEERS else ("bergson==2.5.1",)
    try:
        return peers.installed(packages, folder / module, alone=way in peers.PEERS), ""
    except RuntimeError as error:
        return "", str(error)


def table(result: Row) -> str:
    """Return tables of how often each way is right, and of what it says of each student."""
    rows = {(row["kind"], row["way"]): row for row in result["rows"]}
    ways = [way for way in WAYS if any(way == w for _, w in rows)]
    outcomes = ("right", "refused", "warned", "wrong")
    lines = []
    for way in ways:
        rows_of_way = [row for (_, w), row in rows.items() if w == way]
        counts = [sum(row["outcome"] == outcome for row in rows_of_way) for outcome in outcomes]
        counts.insert(
            1, sum(row["outcome"] == "right" and row["error"] <= CLOSE for row in rows_of_way)
        )
        purpose = sum(
            row["outcome"] == "wrong" and row["kind"] in ON_PURPOSE for row in rows_of_way
        )
        lines.append([way, len(rows_of_way), *counts, purpose])
    bounds = ["right", "to 1e-5"]
    counted = grid(
        ["way", "students", *bounds, "refused", "warned", "silently wrong", "on purpose"], lines
    )
    lines = []
    for kind in (kind for kind in KINDS if any(kind == k for k, _ in rows)):
        cells = []
        for row in (rows.get((kind, way), {}) for way in ways):
            # Beyond rounding and differences.
            off = f", {row['error']:.0e}" if row.get("error", 0) > 1e-6 else ""
            cells.append(
                f"**wrong{off}**" if row.get("outcome") == "wrong" else row.get("outcome", "") + off
            )
        lines.append([kind + STAR * (kind in ON_PURPOSE), *cells])
    table_of_ways = grid(["student", *ways], lines, names=1 + len(ways))
    tables = [counted, table_of_ways]
    # Rows that were made before torch's own derivatives were asked for have none of them.
    of_torch = [
        [row["operation"], row["order"], f"{row['error']:.0e}"] for row in result.get("torch", ())
    ]
    if of_torch:
        tables.append(grid(["torch's own second derivative", "order", "off by"], of_torch, names=2))
    return "\n\n".join(tables) + peers.missing(result)


def main() -> None:
    parser = arguments(__doc__, RESULT)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], help="the rows of the others stay")
    args = parsed(parser)
    if args.runs:
        run(args)
    show(args.write, "silent", table(loaded(args.out)))


if __name__ == "__main__":
    main()
