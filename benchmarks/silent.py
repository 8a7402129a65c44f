"""Who is silently wrong: the hypergradient of unusual students, by metapl, by other libraries and by hand.

    python benchmarks/silent.py                     # a quarter of an hour on one core
    python benchmarks/silent.py --write benchmarks/results/silent.md

A student takes three steps of plain SGD on a teacher's soft labels; asked is the gradient of its loss on labeled data
in the teacher's weights (bergson's trainer: in the weights of the examples, which is what it differentiates in). Each
way is used as its documentation says: TorchOpt's ``MetaSGD``, higher's ``innerloop_ctx``, BOAT's ``Problem``, bergson's
``Trainer``, ``metapl.BilevelTrainer``; and two ways that people write by hand. A way is

- *right* if it is off by at most 1e-3 (5e-2 in bfloat16) of the derivative by central differences of the real thing in
  float64: the student, trained by ``backward()`` and ``torch.optim.SGD`` alone, from the same seeds;
- *refused* if it ends with an error, whose last line is kept;
- *warned* if it is off, and said something by ``warnings``; *wrong* if it is off, and said nothing.

The students with a star have gradients that are off their loss's derivative on purpose, so that no way can follow it.
Each library has an environment of its own, as in ``peers.py``, and each student a process of its own.
"""

from __future__ import annotations

import hashlib
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
from harness import RESULTS, Row, apart, arguments, environment, grid, loaded, parsed, show, write_json
from rival_attribution import Stream, Weighted
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1] / "tests" / "library"))
from kinds import KINDS as TESTED
from kinds import C, Own, embedded, plain, put

RESULT = RESULTS / "silent.json"
STEPS, TOLERANCE, IN_BFLOAT16, STAR = 3, 1e-3, 5e-2, "\\*"
RATE = peers.LEARNING_RATE = 1.0
Gradient = Sequence[Tensor]


class Swish(torch.autograd.Function):
    """A kernel with a backward of its own, which is not differentiable, as fused kernels are often wrapped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        s = ctx.x.sigmoid()
        return g * (s + ctx.x * s * (1 - s))


def attention(student: Any, x: Tensor) -> Tensor:
    h = student.a(x).unflatten(1, (3, 2))
    return student.b(F.scaled_dot_product_attention(h, h, student.w(h)).flatten(1))


def stochastic_depth(student: Any, x: Tensor) -> Tensor:
    h = student.a(x).tanh()
    return student.b(h + student.c(h).tanh() if torch.rand(()) < 0.5 else h)


def in_bfloat16(student: Any, x: Tensor) -> Tensor:
    return student.b(F.linear(*(t.bfloat16() for t in (x, student.a.weight, student.a.bias))).tanh().to(x.dtype))


KINDS: dict[str, tuple[Any, ...]] = {  # the arguments of Own: a forward, and what is added to two linear layers
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
    "a hook on a parameter's gradient": (plain, lambda s: s.a.weight.register_hook(lambda g: 2 * g)),
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
}  # fmt: skip
ON_PURPOSE = (  # whose own gradient is not the derivative of their loss, or leaves out state that passes carry on
    *("spectral norm", "a hook on an activation's gradient", "a hook on a module's backward pass"),
    *("a momentum encoder", "an average in a buffer", "rounding, straight-through", "a codebook of moving averages"),
)


def case(kind: str, exact: bool = False) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor], Tensor]:
    """Teacher, student, a labeled batch and an unlabeled one; generators begin anew. ``exact``: without bfloat16."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old norm is deprecated
        student = Own(*KINDS["two layers" if exact and kind == "bfloat16 inside" else kind])
    vars(student)["held" if "captured" in kind else "_none"] = [teacher]
    labeled, unlabeled = (torch.randn(8, 4), torch.randint(C, (8,))), torch.randn(8, 4)
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(1)
    return teacher, student, labeled, unlabeled


def after_real_steps(kind: str, order: str, phi: Tensor | None = None, weights: Tensor | None = None) -> float:
    """The outer loss after the student's real steps, of a teacher with other weights, or with weights of examples."""
    teacher, student, (x, y), u = case(kind, exact=True)
    if phi is not None:
        nn.utils.vector_to_parameters(phi, teacher.parameters())
    sgd = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checkpoints
        for _ in range(STEPS):
            q = teacher(u).softmax(-1).detach()
            losses = F.cross_entropy(student(u), q, reduction="none")
            sgd.zero_grad()
            (losses if weights is None else weights * losses).mean().backward()
            sgd.step()
        if order == "branched":  # metapl draws the masks of the outer loss from a stream of its own
            digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(digest, "little") >> 1)
        with torch.no_grad() if kind != "a gradient in its input" else torch.enable_grad():
            return float(F.cross_entropy(student(x), y))


def truth(kind: str, order: str) -> Tensor:
    """The derivative of :func:`after_real_steps` by central differences of two sizes, which have to agree."""
    teacher, _, _, u = case(kind)
    phi, found = nn.utils.parameters_to_vector(teacher.parameters()).detach(), []
    name, at = ("weights", torch.ones(len(u))) if order == "weights" else ("phi", phi)
    for move in (1e-5, 3e-6):
        ends = [[after_real_steps(kind, order, **{name: at + d}) for d in (e, -e)] for e in move * torch.eye(len(at))]
        found.append(torch.tensor([(ahead - behind) / (2 * move) for ahead, behind in ends]))
    if torch.dist(*found) > 1e-2 * TOLERANCE * found[0].norm():
        raise SystemExit(f"{kind}: the differences do not agree, so that there is nothing to compare with")
    return found[0]


def at_the_end(student: Any, teacher: nn.Module, labeled: Any) -> Gradient:
    return torch.autograd.grad(F.cross_entropy(student(labeled[0]), labeled[1]), list(teacher.parameters()))


def by_swapping(teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor) -> Gradient:
    """Double backward by the module itself, in which each weight's place is given the moved weight."""
    own = [(part, *one) for part in student.modules() for one in part.named_parameters(recurse=False)]
    places = [(part, name) for part, name, p in own if p.requires_grad]
    params = [getattr(part, name) for part, name in places]
    for _ in range(STEPS):
        loss = F.cross_entropy(student(u), teacher(u).softmax(-1))
        grads = torch.autograd.grad(loss, params, create_graph=True)
        params = [p - RATE * g for p, g in zip(params, grads, strict=True)]
        for (part, name), p in zip(places, params, strict=True):
            part._parameters[name] = p  # type: ignore[assignment]
    return at_the_end(student, teacher, labeled)


def by_torchopt(teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor) -> Gradient:
    """``torchopt.MetaSGD``."""
    import torchopt

    inner = torchopt.MetaSGD(student, lr=RATE)
    for _ in range(STEPS):
        inner.step(F.cross_entropy(student(u), teacher(u).softmax(-1)))
    return at_the_end(student, teacher, labeled)


def by_bergson(teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor) -> Gradient:
    """``train`` and ``backward`` of ``bergson.magic.Trainer``, with checkpoints in a folder, as its command uses it."""
    import torchopt
    from bergson.magic.trainer import BackwardState, Trainer

    model, train = Weighted(student), (u, teacher(u).softmax(-1).detach())
    stream = Stream({"train": train, "order": torch.arange(len(u)).expand(STEPS, -1)})
    trainer, state = Trainer.initialize(model, torchopt.sgd(RATE))
    with tempfile.TemporaryDirectory() as folder:
        state = trainer.train(state, stream, save_dir=folder, save_mode="all")
        with state.activate(model) as params:
            loss = F.cross_entropy(student(labeled[0]), labeled[1])
            grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        begin = BackwardState(grads, [], torch.zeros_like(stream.weights))
        return [trainer.backward(folder, stream, begin, state, save_mode="all").weight_grads]


def by_metapl(mode: Any, **options: Any) -> Any:
    """``metapl.BilevelTrainer``: the teacher moves by minus its gradient."""

    def gradient(teacher: nn.Module, student: nn.Module, labeled: Any, u: Tensor) -> Gradient:
        import metapl

        inner, outer = (torch.optim.SGD(n.parameters(), lr) for n, lr in ((student, RATE), (teacher, 1.0)))
        given = {"inner_optimizer": inner, "outer_optimizer": outer, "teacher_losses": (), **options}
        before = [p.detach().clone() for p in teacher.parameters()]
        trainer = metapl.BilevelTrainer(teacher, student, mode, lookahead=STEPS, **given)
        trainer.step(labeled, metapl.Lookahead([u] * STEPS))
        return [old - p.detach() for old, p in zip(before, teacher.parameters(), strict=True)]

    return gradient


COMPILED = "metapl, forward, compiled"
CAPTURED = (  # each compiles for half a minute
    *("two layers", "dropout", "default (fused) attention", "a kernel with a backward of its own", "a checkpoint"),
    *("weights clamped in forward", "rounding, straight-through"),
)
WAYS: dict[str, tuple[str, str, Any]] = {  # the module of a library, the order of what it draws, and its gradient
    "by hand, functional_call": ("torch", "", lambda *given: peers.by_hand(*given, STEPS)),
    "by hand, weights swapped": ("torch", "", by_swapping),
    "TorchOpt 0.7.3": ("torchopt", "", by_torchopt),
    "higher 0.2.1": ("higher", "", lambda *given: peers.by_higher(*given, STEPS)),
    "BOAT 1.1.1": ("boat_torch", "", lambda *given: peers.by_boat(*given, STEPS)),
    "bergson 2.5.1": ("bergson.magic.trainer", "weights", by_bergson),
    "metapl, forward": ("metapl", "branched", by_metapl("forward")),
    "metapl, unrolled": ("metapl", "branched", by_metapl("unrolled")),
    "metapl, forward, verify=False": ("metapl", "branched", by_metapl("forward", verify=False)),
    COMPILED: ("metapl", "", by_metapl("forward", compile=True)),
}


def judged(way: str, kind: str, exact: Tensor) -> Row:
    """What a way says of a student, in this process."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = torch.cat([g.detach().flatten() for g in WAYS[way][2](*case(kind))])
        except Exception as error:  # whatever a library raises is its refusal
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return {"outcome": "refused", "said": f"{type(error).__name__}: {(lines or [''])[-1][:300]}"}
    off = float(torch.dist(found, exact) / exact.norm())
    if off <= (IN_BFLOAT16 if "bfloat16" in kind else TOLERANCE):
        return {"outcome": "right", "error": off}
    about = [str(one.message)[:300] for one in told if not issubclass(one.category, DeprecationWarning | FutureWarning)]
    said = [words for words in about if not words.startswith("torch.distributed")]  # of bergson's checkpoints
    return {"outcome": "warned", "error": off, "said": said[-1]} if said else {"outcome": "wrong", "error": off}


def answer(way: str, kinds: Sequence[str], truths: str) -> list[Row]:
    """A row for each student; each has a process of its own, which may die."""
    for name in ("torch._dynamo", WAYS[way][0]):  # once, and not in each process
        importlib.import_module(name)
    torch.set_num_threads(1)
    fork, exact, rows = multiprocessing.get_context("fork"), torch.load(truths), list[Row]()
    for kind in kinds:
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=lambda at=kind, to=sender: to.send(judged(way, at, exact[at, WAYS[way][1]])))
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


def run(given: Any) -> None:
    """All rows, written way by way; the exact derivatives are found by this process."""
    torch.set_num_threads(1)
    kinds = ("two layers", "weights clamped in forward", "rounding, straight-through") if given.miniature else (*KINDS,)
    exact, result = dict[tuple[str, str], Tensor](), {"rows": [], "not_installed": {}, "measured_on": environment()}
    with tempfile.TemporaryDirectory() as folder:
        truths = Path(folder) / "truths.pt"
        for way in ("by hand, functional_call", "metapl, forward") if given.miniature else WAYS:
            python, reason = installed(way, Path(folder))
            if reason:
                result["not_installed"][way] = reason
                continue
            order, asked = WAYS[way][1], [kind for kind in kinds if way != COMPILED or kind in CAPTURED]
            for kind in (kind for kind in asked if (kind, order) not in exact):
                drawn = order != "branched" or after_real_steps(kind, order) != after_real_steps(kind, "")
                at = kind, order if drawn else ""
                exact[kind, order] = exact[at] if at in exact else truth(*at)
            torch.save(exact, truths)
            result["rows"] += apart(f"silent.answer({way!r}, {asked!r}, {str(truths)!r})", python)
            write_json(given.out, result)
    torch.set_default_dtype(torch.float32)


def installed(way: str, folder: Path) -> tuple[str, str]:
    """The interpreter that has a way's library, or the reason why there is none."""
    module = WAYS[way][0].split(".")[0]
    if module in ("torch", "metapl"):
        return sys.executable, ""
    packages = peers.PEERS[way][0] if way in peers.PEERS else ("bergson==2.5.1",)
    try:
        return peers.installed(packages, folder / module, alone=way in peers.PEERS), ""
    except RuntimeError as error:
        return "", str(error)


def table(result: Row) -> str:
    """How often each way is right, and what it says of each student."""
    rows = {(row["kind"], row["way"]): row for row in result["rows"]}
    ways, outcomes = [way for way in WAYS if any(way == w for _, w in rows)], ("right", "refused", "warned", "wrong")
    lines = []
    for way in ways:
        found = [row for (_, w), row in rows.items() if w == way]
        counts = [sum(row["outcome"] == what for row in found) for what in outcomes]
        purpose = sum(row["outcome"] == "wrong" and row["kind"] in ON_PURPOSE for row in found)
        lines.append([way, len(found), *counts, purpose])
    counted = grid(["way", "students", "right", "refused", "warned", "silently wrong", "on purpose"], lines)
    lines = []
    for kind in (kind for kind in KINDS if any(kind == k for k, _ in rows)):
        cells = []
        for row in (rows.get((kind, way), {}) for way in ways):
            off = f", {row['error']:.0e}" if row.get("error", 0) > 1e-6 else ""  # beyond rounding and differences
            cells.append(f"**wrong{off}**" if row.get("outcome") == "wrong" else row.get("outcome", "") + off)
        lines.append([kind + STAR * (kind in ON_PURPOSE), *cells])
    each = grid(["student", *ways], lines, names=1 + len(ways))
    return f"{counted}\n\n{each}" + peers.missing(result)


def main() -> None:
    given = parsed(arguments(__doc__, RESULT))
    if given.runs:
        run(given)
    show(given.write, "silent", table(loaded(given.out)))


if __name__ == "__main__":
    main()
