"""What a whole step of BilevelTrainer costs beside the same mode written by hand in plain torch.

    python benchmarks/step.py                                         # the step as it is, on five networks
    python benchmarks/step.py --parts eager,compiled,stacked          # compiled as one graph, and 32 seeds at once
    python benchmarks/step.py --networks tiny,mlp                     # the rows of the others stay
    python benchmarks/step.py --write benchmarks/results/step.md

A step is a student's and a teacher's, both by SGD with Nesterov momentum, and the teacher has its own loss. Times are
of the processor, on one thread. Ways take turns: each takes some steps a round, and a ratio is the median over rounds
of one way's time over that of the same mode by hand in the same round, beside the quartiles. A stacked step is
``torch.func.vmap`` of the trainer's function over 32 seeds with a batch each, and its time is that of one seed.
Compiling is not in the times: it is given in seconds, with an empty cache, and as the number of steps after which it
has paid, against the same that is not compiled. Apart is how far the teacher is from the one trained by hand, over how
far it has gone, after three steps. Counted are the files and functions of metapl that the third step enters.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import NONE, RESULTS, Row, arguments, described, grid, loaded, parsed, show, write_json
from peers import CAUSAL, case
from torch import Tensor, nn
from torch._inductor.utils import clear_caches
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of the profiler, which would write into the terminal
RESULT = RESULTS / "step.json"
RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4
SEEDS = 32
HAND, EAGER, COMPILED = "by hand", "as it is", "compiled"
STACKED, BOTH = f"{SEEDS} stacked", f"{SEEDS} stacked, compiled"
MODES, WAYS = ("forward", "reinforce", "unrolled"), (EAGER, COMPILED, STACKED, BOTH)
PARTS = {"eager": (EAGER,), "compiled": (COMPILED,), "stacked": (STACKED, BOTH)}
NETWORKS = {  # name in a table, and steps of each way in a round
    "tiny": ("MLP 16-16-4, batch 32", 40),
    "mlp": ("MLP 64-64-10, batch 64", 30),
    "transformer": ("transformer, 2 layers of 64", 4),
    "causal": (CAUSAL, 3),
    "wrn": ("WRN-28-2, batch 8", 1),
}

Step = Callable[[], Any]
Pair = tuple[nn.Module, nn.Module]
Data = tuple[tuple[Tensor, Tensor], Tensor]


def networks(name: str) -> tuple[Pair, Data]:
    """Teacher and student; a labeled and an unlabeled batch."""
    if name == "tiny":
        torch.manual_seed(0)
        teacher, student = (nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)) for _ in range(2))
        return (teacher, student), ((torch.randn(32, 16), torch.randint(0, 4, (32,))), torch.randn(32, 16))
    known = {"mlp": "MLP", "transformer": "transformer", "causal": CAUSAL, "wrn": "WRN-28-2"}
    teacher, student, (x, y), u = case(known[name], "cpu")
    return (teacher, student), ((x[:8], y[:8]), u[:8]) if name == "wrn" else ((x, y), u)


def optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)


def by_hand(mode: str, pair: Pair, data: Data) -> Step:
    """The step as one would write it for one pair of networks, checks and all else left out."""
    (teacher, student), ((x, y), u) = pair, data
    inner, outer = optimizer(student), optimizer(teacher)
    params: dict[str, Tensor] = dict(student.named_parameters())
    weights, learned, own = [*params.values()], [*teacher.parameters()], nn.CrossEntropyLoss(label_smoothing=0.1)
    slope = -RATE * (1 + MOMENTUM)  # of θ' in g; in the first step, whose momentum begins with g, too

    def move(by: torch.optim.Optimizer, of: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        for p, g in zip(of, grads, strict=True):
            p.grad = g.detach()
        by.step()

    def teach(loss: Tensor) -> None:
        move(outer, learned, torch.autograd.grad(loss + own(teacher(x), y), learned))

    def reinforce() -> None:
        logits = teacher(u)
        labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        g = torch.autograd.grad(F.cross_entropy(student(u), labels), weights)
        move(inner, weights, g)
        v = torch.autograd.grad(F.cross_entropy(student(x), y), weights)
        h = -slope * torch.stack([(a * b).sum() for a, b in zip(v, g, strict=True)]).sum()
        teach(h * F.cross_entropy(logits, labels, reduction="sum"))

    def forward() -> None:
        q = teacher(u).softmax(-1)
        signal, z = q.detach().requires_grad_(), student(u)
        g = torch.autograd.grad(F.cross_entropy(z, signal), weights)
        before = [p.detach().clone() for p in weights]
        move(inner, weights, g)
        v = torch.autograd.grad(F.cross_entropy(student(x), y), weights)
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(p, slope * d) for n, p, d in zip(params, before, v, strict=True)}
            tangent = forward_ad.unpack_dual(functional_call(student, duals, (u,))).tangent
        leaf = z.detach().requires_grad_()
        (of_z,) = torch.autograd.grad(F.cross_entropy(leaf, signal), leaf, create_graph=True)
        (h,) = torch.autograd.grad(of_z, signal, tangent)
        teach((h * q).sum())

    def unrolled() -> None:
        g = torch.autograd.grad(F.cross_entropy(student(u), teacher(u).softmax(-1)), weights, create_graph=True)
        after = {}
        for (name, p), g_p in zip(params.items(), g, strict=True):
            d = g_p + DECAY * p
            before = inner.state[p].get("momentum_buffer") if p in inner.state else None
            after[name] = p - RATE * (d + MOMENTUM * (d if before is None else MOMENTUM * before + d))
        teach(F.cross_entropy(functional_call(student, after, (x,)), y))
        move(inner, weights, g)

    step = {"forward": forward, "reinforce": reinforce, "unrolled": unrolled}[mode]
    # CPU kernels of attention have no second derivative and no forward mode.
    needs = mode != "reinforce" and not isinstance(student, nn.Sequential)
    return sdpa_kernel(SDPBackend.MATH)(step) if needs else step


def trainer(mode: str, pair: Pair, **options: Any) -> metapl.BilevelTrainer:
    optimizers = {"inner_optimizer": optimizer(pair[1]), "outer_optimizer": optimizer(pair[0])}
    losses = (metapl.CrossEntropy(label_smoothing=0.1),)
    return metapl.BilevelTrainer(*pair, mode, teacher_losses=losses, **optimizers, **options)


def way_of(name: str, mode: str, network: str) -> tuple[Step, nn.Module]:
    """A way with networks and optimizers of its own, and its teacher."""
    pair, data = networks(network)
    if name == HAND:
        return by_hand(mode, pair, data), pair[0]
    if name in (EAGER, COMPILED):
        one = trainer(mode, pair, compile=name == COMPILED)
        return lambda: one.step(*data), pair[0]
    found = [(trainer(mode, pair).functional(), data) for pair, data in (networks(network) for _ in range(SEEDS))]
    step = torch.func.vmap(found[0][0][0], randomness="different")
    step = torch.compile(step, fullgraph=True) if name == BOTH else step
    state = [metapl.functional.stack([state for (_, state), _ in found])]  # type: ignore[attr-defined]
    x, y, u = (torch.stack(of_seeds) for of_seeds in zip(*((x, y, u) for _, ((x, y), u) in found), strict=True))

    def all_seeds() -> None:
        state[0], _ = step(state[0], (x, y), u)

    return all_seeds, pair[0]


def entered(step: Step) -> Row:
    """How many files and functions of metapl a step enters: what ``def`` or ``lambda`` makes, not comprehensions."""
    found, root = set[tuple[str, int]](), str(Path(metapl.__file__).parent)

    def look(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        named = not code.co_name.startswith("<") or code.co_name == "<lambda>"
        if event == "call" and named and code.co_filename.startswith(root):
            found.add((code.co_filename, code.co_firstlineno))

    sys.setprofile(look)
    try:
        step()
    finally:
        sys.setprofile(None)
    return {"files": len({file for file, _ in found}), "functions": len(found)}


def warmed(name: str, mode: str, network: str) -> tuple[Step, Tensor, Row]:
    """A way after three steps, where its teacher has gone to, and what there is to say of it beside times."""
    facts: Row = {}
    if name in (COMPILED, BOTH):  # with nothing compiled before, in this process and on the disk
        clear_caches()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    step, teacher = way_of(name, mode, network)
    before = nn.utils.parameters_to_vector(teacher.parameters()).detach().clone()
    since = time.perf_counter()
    step()
    if name in (COMPILED, BOTH):
        facts["cold_seconds"] = time.perf_counter() - since
    step()
    if name == EAGER:
        facts |= entered(step)
    else:
        step()
    return step, nn.utils.parameters_to_vector(teacher.parameters()).detach() - before, facts


def measure(network: str, mode: str, ways: Sequence[str], rounds: int) -> list[Row]:
    """A row for each way, all in turns with the same by hand."""
    torch._dynamo.reset()  # which counts how often a function has been compiled anew
    ready = {name: warmed(name, mode, network) for name in (HAND, *ways)}
    calls = NETWORKS[network][1] if rounds > 1 else 1
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (step, _, _) in ready.items():
            since = time.process_time()
            for _ in range(calls):
                step()
            each = 1e3 * (time.process_time() - since) / calls
            times[name].append(each / SEEDS if name in (STACKED, BOTH) else each)
    rows = []
    for name in ways:
        ratios = [a / b for a, b in zip(times[name], times[HAND], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else 3 * ratios
        row = {"label": metapl.__version__, "network": network, "mode": mode, "way": name, "ratio": middle}
        row |= {
            "quartiles": [low, high],
            "ms": statistics.median(times[name]),
            "ms_by_hand": statistics.median(times[HAND]),
        }
        row |= {"rounds": rounds, "steps": calls, **ready[name][2]}
        if mode != "reinforce" and name in (EAGER, COMPILED):  # labels are drawn otherwise by hand
            gone = ready[HAND][1]
            row["apart"] = float((ready[name][1] - gone).norm() / gone.norm())
        if "cold_seconds" in row:
            plain, seeds = (STACKED, SEEDS) if name == BOTH else (EAGER if EAGER in times else HAND, 1)
            saved = (statistics.median(times[plain]) - row["ms"]) * seeds / 1e3
            row["pays_after"] = round(row["cold_seconds"] / saved) if saved > 0 else None
        rows.append(row | {"measured_on": described()})
    return rows


def table(result: Row) -> str:
    """A row for each way and mode."""
    lines = []
    for row in result["rows"]:
        (low, high), pays = row["quartiles"], row.get("pays_after")
        cells = [row["label"], NETWORKS[row["network"]][0], f"`{row['mode']}`", row["way"], f"{row['ms']:.3g}"]
        cells += [f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
        cells.append(f"{row['files']}, {row['functions']}" if "files" in row else NONE)
        cells.append(f"{row['cold_seconds']:.0f}" if "cold_seconds" in row else NONE)
        cells.append(NONE if "cold_seconds" not in row else f"{pays:,} steps" if pays else "never")
        lines.append([*cells, f"{row['apart']:.0e}" if "apart" in row else NONE])
    head = ["metapl", "network", "mode", "way", "ms", "times by hand", "quartiles", "files, functions"]
    return grid([*head, "compiling, s", "pays after", "apart"], lines, names=4)


def main() -> None:
    parser = arguments(__doc__, RESULT)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="the rows of other networks stay")
    parser.add_argument("--parts", default="eager", help=f"of {','.join(PARTS)}; the rows of the others stay")
    given = parsed(parser)
    torch.set_num_threads(1)
    if given.runs:
        names, rounds = (["tiny"], 1) if given.miniature else (given.networks.split(","), 15)
        ways = [way for part in given.parts.split(",") for way in PARTS[part]]
        rows = [row for name in names for mode in MODES for row in measure(name, mode, ways, rounds)]
        old = loaded(given.out)["rows"] if given.out.exists() else []
        known = {tuple(row[key] for key in ("label", "network", "mode", "way")): row for row in [*old, *rows]}
        order = sorted(known, key=lambda k: (k[0], [*NETWORKS].index(k[1]), k[2], WAYS.index(k[3])))
        write_json(given.out, {"rows": [known[key] for key in order]})
    show(given.write, "step", table(loaded(given.out)))


if __name__ == "__main__":
    main()
