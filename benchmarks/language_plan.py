"""What it takes to rate the data of a language model of 7 billion weights, and how near such a plan is to a small one.

    python benchmarks/language_plan.py              # half an hour of one core
    python benchmarks/language_plan.py --only near    # the small network's rows; the others stay
    python benchmarks/language_plan.py --write docs/plan.md

A rater of 0.1 billion weights scores the sequences from which a network as Llama's learns by two steps of AdamW. The
plans are steps rehearsed on tensors without values; beside them stands double backward written by hand, counted in the
same way. The small network takes the same steps in this process: what is there before, and what the allocator adds.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import machine
import torch
from data_rater import by_hand
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import metapl
from metapl.ablation.cost import peak_bytes
from metapl.apps.planning import rehearse
from metapl.apps.planning.rehearsal import Held, laid_out, stage
from metapl.distributed import Mesh
from metapl.problems import DataRater

RESULT = Path(__file__).parent / "results" / "language_plan.json"
HERE = torch.device("cpu")
BY_HAND = "double backward"
Row = dict[str, Any]

# Words, width, heads, hidden width, blocks: of the student, then of the rater; sequences in a batch, and their length.
LARGE = {"student": (32_000, 4096, 32, 11_008, 32), "rater": (32_000, 640, 10, 1728, 16), "batch": (2, 2048)}
SMALL = {"student": (4000, 256, 4, 688, 8), "rater": (4000, 64, 4, 172, 4), "batch": (4, 128)}
TINY = {"student": (50, 16, 2, 32, 2), "rater": (50, 8, 2, 16, 1), "batch": (2, 16)}


# --------------------------------------------------------------------------------------------------------- the networks


class Block(nn.Module):
    """A block of a decoder as Llama has it, without the rotation of places, which has no weights."""

    def __init__(self, width: int, heads: int, hidden: int, again: bool) -> None:
        super().__init__()
        self.heads, self.again = heads, again
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def run(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.between(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.again else self.run(x)


class Model(nn.Module):
    """Logits (B, T, outputs); with ``again``, each block is run again in the backward pass."""

    def __init__(
        self, words: int, width: int, heads: int, hidden: int, depth: int, outputs: int, again: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, again) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, outputs, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Rater(Model):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids)[..., 0].mean(1)


def networks(sizes: Row, again: bool) -> list[nn.Module]:
    words = sizes["student"][0]
    return [Rater(*sizes["rater"], outputs=1), Model(*sizes["student"], outputs=words, again=again)]


# ---------------------------------------------------------------------------------------------------------- their steps


def adamw(network: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(network.parameters(), lr=1e-4)


def trainer(precision: str, mode: str = "forward") -> Callable[..., metapl.BilevelTrainer]:
    def train(rater: nn.Module, student: nn.Module) -> metapl.BilevelTrainer:
        options: Row = {"problem": DataRater(), "precision": precision}
        return metapl.BilevelTrainer(
            rater, student, mode, inner_optimizer=adamw(student), outer_optimizer=adamw(rater), **options
        )

    return train


def tokens(sizes: Row, steps: int) -> list[Tensor]:
    """The outer batch, and those of the student's steps."""
    return [torch.randint(sizes["student"][0], sizes["batch"]) for _ in range(1 + steps)]


def batches(sizes: Row, steps: int) -> tuple[Tensor, Any]:
    outer, *inner = tokens(sizes, steps)
    return outer, metapl.Lookahead(inner) if steps > 1 else inner[0]


def autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()


def double_backward(rater: nn.Module, student: nn.Module, given: Sequence[Tensor], precision: str) -> Any:
    """The fused kernels of attention have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH), autocast(precision):
        return by_hand(rater, student, given[0], given[1:])


def lying(*held: Any) -> int:
    """Bytes of parameters and other tensors."""
    trees = [[*one.parameters()] if isinstance(one, nn.Module) else one for one in held]
    return sum(t.nbytes for t in pytree.tree_leaves(trees) if isinstance(t, Tensor))


def planned(way: str, sizes: Row, steps: int, again: bool, precision: str, shards: int = 1) -> Row:
    """Bytes at the fullest moment: of weights, gradients and the optimizers', for the feedback, and all."""
    with torch.device("meta"):
        built = networks(sizes, again)
    if way == BY_HAND:
        with stage(Mesh()):
            rater, student = (laid_out(network, Mesh()) for network in built)
            given = tokens(sizes, steps)
            states = 2 * lying(rater, student)  # of the optimizers
            with Held() as held, held.phase("step"):
                held.name([*rater.parameters(), *student.parameters()], "weights")
                held.name(given, "activations")
                _ = double_backward(rater, student, given, precision)
        found = dict(held.phases["step"].peak) | {"optimizer": states}
        flops = held.flops
    else:
        step = rehearse(built, trainer(precision, way), lambda: batches(sizes, steps), Mesh(shard=shards))
        found, flops = max(step.phases.values(), key=lambda phase: sum(phase.values())), step.flops
    return {"held": found, "planned": sum(found.values()), "flops": flops}


def measured(way: str, sizes: Row, steps: int, again: bool, precision: str) -> int:
    torch.manual_seed(0)
    rater, student = networks(sizes, again)
    given = tokens(sizes, steps)
    states = 2 * lying(rater, student)
    if way == BY_HAND:

        def run() -> Any:
            return double_backward(rater, student, given, precision)
    else:
        train = trainer(precision, way)(rater, student)

        def run() -> Any:
            return train.step(given[0], metapl.Lookahead(given[1:]) if steps > 1 else given[1])

    run()
    peaks = []
    for _ in range(2):
        gc.collect()
        peaks.append(peak_bytes(run, HERE))
    return lying(rater, student, given) + states + min(peaks)


def way(name: str, steps: int, again: bool = True, precision: str = "float32") -> Row:
    return {"way": name, "steps": steps, "again": again, "precision": precision}


SMALL_CASES = [
    *(
        way(name, steps, again)
        for name, steps in (("forward", 1), ("forward", 2), (BY_HAND, 2))
        for again in (False, True)
    ),
    *(way(name, 2, True, "bfloat16") for name in ("forward", BY_HAND)),
]
LARGE_CASES = [
    *(way("forward", 1, precision="bfloat16") | {"shards": shards} for shards in (1, 8, 64)),
    *(way(name, 2, False, "bfloat16") for name in ("forward", BY_HAND)),
    *(way(name, steps, precision="bfloat16") for name in ("forward", BY_HAND) for steps in (2, 4, 8)),
    way("forward", 2, precision="bfloat16") | {"shards": 8},
]


def done(miniature: bool, kinds: Sequence[str]) -> Iterator[Row]:
    small, large = (TINY, TINY) if miniature else (SMALL, LARGE)
    for case in SMALL_CASES if "near" in kinds else ():
        yield {"kind": "near", **case, **planned(sizes=small, **case), "measured": measured(sizes=small, **case)}
    for case in (LARGE_CASES[1:5] if miniature else LARGE_CASES) if "large" in kinds else ():
        yield {"kind": "large", "shards": 1, **case, **planned(sizes=large, **case)}


# ----------------------------------------------------------------------------------------------------------- the tables


def table(result: Row) -> str:
    """The large network's plans, then the small one's beside what was measured."""
    rows, sizes = result["rows"], result["sizes"]
    lines = [
        "| gradient | steps | blocks | ranks | weights | gradients | optimizers | kept for it | passes | sum | PFLOP |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["kind"] == "large":
            held = [row["held"].get(name, 0) for name in ("weights", "gradients", "optimizer", "feedback")]
            cells = [f"{size / 1e9:.1f}" for size in (*held, row["held"]["activations"], row["planned"])]
            first = [named(row), str(row["steps"]), blocks(row), str(row["shards"])]
            lines.append(f"| {' | '.join([*first, *cells])} | {row['flops'] / 1e15:.2f} |")
    counts = " and ".join(f"{result['weights'][role] / 1e9:.2f} billion" for role in ("student", "rater"))
    sequences, length = sizes["large"]["batch"]
    lines += [
        "",
        f"Student and rater of {counts} weights in float32, passes in bfloat16 under autocast, AdamW, {sequences} "
        f"sequences of {length:,} tokens in each batch of a rank. GB at the fullest moment: `kept for it` are weights "
        "and moments of the student's steps, and what is passed back through them; `passes` everything else, of double "
        "backward its whole graph; blocks are kept for the backward pass, or run again in it; PFLOP of one rank. "
        "Rehearsed, not run.",
        "",
        "| gradient | steps | blocks | precision | planned, MB | measured, MB | |",
        "|---|---:|---|---|---:|---:|---:|",
    ]
    for row in rows:
        if row["kind"] == "near":
            cells = [named(row), str(row["steps"]), blocks(row), row["precision"]]
            cells += [f"{row[size] / 1e6:.1f}" for size in ("planned", "measured")]
            lines.append(f"| {' | '.join(cells)} | {row['planned'] / row['measured'] - 1:+.1%} |")
    words, width, _, _, depth = sizes["small"]["student"]
    lines += [
        "",
        f"The same of {depth} blocks of width {width} and {words:,} words, in one process on a CPU, torch "
        f"{result['torch']}. `python benchmarks/language_plan.py`; raw: `benchmarks/results/language_plan.json`.",
    ]
    return "\n".join(lines)


def named(row: Row) -> str:
    return row["way"] if row["way"] == BY_HAND else f"`{row['way']}`"


def blocks(row: Row) -> str:
    return "run again" if row["again"] else "kept"


def main() -> None:
    parser = machine.arguments(__doc__, RESULT, page=True)
    kinds = ("near", "large")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="the rows of the other kind stay")
    given = machine.parsed(parser)
    if given.write:
        machine.write_between_marks(given.write, "language_plan", table(json.loads(given.out.read_text())))
        return
    torch.set_num_threads(1)
    there = [] if given.miniature or not given.out.exists() else json.loads(given.out.read_text())["rows"]
    rows = [row for row in there if row["kind"] not in given.only]
    for row in done(given.miniature, given.only):
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    sizes = {"large": LARGE, "small": SMALL}
    with torch.device("meta"):
        counts = [sum(p.numel() for p in network.parameters()) for network in networks(LARGE, again=False)]
    weights = dict(zip(("rater", "student"), counts, strict=True))
    machine.write_json(given.out, {"rows": rows, "sizes": sizes, "weights": weights, "torch": torch.__version__})
    print(table(json.loads(given.out.read_text())))


if __name__ == "__main__":
    main()
