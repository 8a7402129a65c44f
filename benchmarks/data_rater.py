"""What a rater of sequences finds, what a language model gains by it, and what its gradient costs.

    python benchmarks/data_rater.py              # seeds 10 to 14; ten minutes of one core
    python benchmarks/data_rater.py --write benchmarks/results/data_rater.md

The problem is that of ``examples/data_rater.py``, whose settings were chosen on seeds 0 and 1.
Beside the rater stand two scores that need no learning, from the same texts: the mean
log-probability of a sequence's neighbours by counts in the outer text, and its difference from that
by counts in the mixture (Moore and Lewis, 2010). Then one outer step over five student steps of
AdamW, by metapl and by others, each in turn in this process: processor time, the allocator's peak
beyond what was held before, and the distance of the gradient from double backward by hand in
float64. Rows that are there are not repeated.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import NONE, RESULTS, Row, arguments, every, go_on, grid, interval, parsed, read, show
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl
from metapl.ablation.cost import peak_bytes
from metapl.problems import DataRater

RAW = RESULTS / "data_rater.jsonl"
SEEDS, OTHER_SEEDS, STEPS, ROUNDS = (10, 11, 12, 13, 14), (10, 11, 12), 100, 5
AHEAD = 5
WIDTH = 128
RATE = 1e-3
BY_HAND = "double backward by hand"
FORWARD = "metapl, forward"
UNROLLED = "metapl, unrolled"
TORCHOPT = "TorchOpt"
EVERYTHING = "everything"
CLEAN = "documentation alone"
RATED = "the half of each batch that is rated best"
OUTER = "the half that is likeliest by counts in the outer text"
BOTH = "the half that is likeliest beside counts in the mixture"


class Mean(nn.Module):
    """A rater that is a transformer as the students are.

    The mean over the places of one of its outputs.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        return self.network(ids)[..., 0].mean(1)


def problem() -> Any:
    """Return the example, a module of the same name as this one."""
    spec: Any = importlib.util.spec_from_file_location(
        "example", Path(__file__).parents[1] / "examples/data_rater.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counted(example: Any, ids: Tensor) -> Tensor:
    """Return log p(next character | character) of each pair.

    It is by counts of neighbours, one more of each.
    """
    words = example.WORDS
    counts = (
        torch.bincount((words * ids[:, :-1] + ids[:, 1:]).flatten(), minlength=words**2).view(
            words, words
        )
        + 1.0
    )
    return (counts / counts.sum(1, keepdim=True)).log().flatten()


def gain(example: Any, rater: str, seed: int, steps: int) -> Row:
    data = example.Data(seed)
    start = time.process_time()
    torch.manual_seed(seed)
    network = example.Rater(torch.zeros(example.WORDS**2))
    rate = 0.03
    if rater == "transformer":
        network = Mean(example.Transformer())
        rate = 1e-3
    example.learn_rater(network, data, seed, steps, rate=rate)
    row: Row = {
        "steps": steps,
        "rate": rate,
        "torch": torch.__version__,
        "seconds": time.process_time() - start,
    }
    row["scores"], row["auc"] = example.scores_by_source(network, data)
    if rater == "pairs":
        start = time.process_time()
        outer = counted(example, data.outer)
        mixed = counted(example, data.mixture(len(data.outer))[0])
        row["seconds_of_counts"] = time.process_time() - start
        raters = {RATED: network, OUTER: example.Rater(outer), BOTH: example.Rater(outer - mixed)}
        row["auc_of_counts"] = {
            name: example.scores_by_source(raters[name], data)[1] for name in (OUTER, BOTH)
        }
        batches: dict[str, Callable[[], Tensor]] = {
            EVERYTHING: lambda: data.mixture(example.BATCH)[0],
            **{name: partial(example.best_half, network, data) for name, network in raters.items()},
            CLEAN: lambda: data.some(data.clean, example.BATCH),
        }
        row["perplexity"] = {
            n: example.perplexity(batch, data, seed, 3 * steps) for n, batch in batches.items()
        }
    text = torch.cat([data.clean, data.outer, data.test]).sort(0).values, data.code
    row["corpus"] = hashlib.sha256(
        b"".join(t.to(torch.uint8).numpy().tobytes() for t in text)
    ).hexdigest()[:12]
    return row


def inner_loss(student: Callable[[Tensor], Tensor], rater: nn.Module, ids: Tensor) -> Tensor:
    losses = F.cross_entropy(student(ids)[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)
    return rater(ids).softmax(0) @ losses


def outer_loss(outputs: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def by_hand(
    rater: nn.Module, student: nn.Module, outer: Tensor, inner: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return the rater's gradient by AdamW written out.

    The root's derivative is kept finite at 0, where the characters are that a batch lacks.
    """
    params: dict[str, Tensor] = dict(student.named_parameters())
    first, second = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
    for step, ids in enumerate(inner, 1):
        leaves = params
        loss = inner_loss(
            lambda x, leaves=leaves: functional_call(student, leaves, (x,)), rater, ids
        )  # type: ignore[misc]
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        moved = {}
        for (name, p), g in zip(params.items(), grads, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g.square()
            root = (second[name] / (1 - 0.999**step) + torch.finfo(p.dtype).tiny).sqrt() + 1e-8
            moved[name] = p * (1 - 0.01 * RATE) - RATE / (1 - 0.9**step) * first[name] / root
        params = moved
    loss = outer_loss(functional_call(student, params, (outer,)), outer)
    return torch.autograd.grad(loss, list(rater.parameters()))


def by_torchopt(
    rater: nn.Module, student: nn.Module, outer: Tensor, inner: Sequence[Tensor]
) -> Sequence[Tensor]:
    import torchopt

    # The same number as by hand.
    tiny = torch.finfo(torch.float32).tiny
    optimizer = torchopt.MetaAdamW(
        student, lr=RATE, weight_decay=0.01, eps_root=tiny, moment_requires_grad=True
    )
    state_before = torchopt.extract_state_dict(student, by="reference", with_buffers=True)
    try:
        for ids in inner:
            optimizer.step(inner_loss(student, rater, ids))
        return torch.autograd.grad(outer_loss(student(outer), outer), list(rater.parameters()))
    finally:
        torchopt.recover_state_dict(student, state_before)


def by_metapl(mode: Any) -> Callable[..., Sequence[Tensor]]:
    def gradient(
        rater: nn.Module, student: nn.Module, outer: Tensor, inner: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.01)
        options: Row = {
            "outer": outer,
            "inner": metapl.Lookahead(inner),
            "inner_optimizer": optimizer,
            # Steps are timed.
            "verify": False,
        }
        return list(
            metapl.hypergradient(
                rater, student, mode=mode, problem=DataRater(), **options
            ).grads.values()
        )

    return gradient


WAYS: dict[str, Callable[..., Sequence[Tensor]]] = {
    BY_HAND: by_hand,
    TORCHOPT: by_torchopt,
    UNROLLED: by_metapl("unrolled"),
    FORWARD: by_metapl("forward"),
}


def costs(example: Any, rounds: int, width: int) -> list[Row]:
    """Return the costs of one outer step, with each kernel of attention."""
    torch.manual_seed(0)
    example.WIDTH = width
    data = example.Data(0)
    rater = example.Rater(torch.zeros(example.WORDS**2))
    student = example.Transformer()
    nn.init.normal_(rater.values, std=0.1)
    outer = data.some(data.outer, 16)
    inner = [data.mixture(16)[0] for _ in range(AHEAD)]
    double = copy.deepcopy((rater, student))
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.cat(
            [g.flatten() for g in by_hand(*(network.double() for network in double), outer, inner)]
        )
    rows = list[Row]()
    for attention, kernel in (("default", nullcontext()), ("math", sdpa_kernel(SDPBackend.MATH))):
        measured = list[tuple[Row, Callable[[], Sequence[Tensor]]]]()
        with kernel:
            for name, gradient in WAYS.items():
                row: Row = {"way": name, "attention": attention, "width": width, "seconds": []}
                run = partial(gradient, rater, student, outer, inner)
                rows.append(row)
                try:
                    row["error"] = float(
                        (torch.cat([g.flatten().double() for g in run()]) - exact).norm()
                        / exact.norm()
                    )
                    row["bytes"] = peak_bytes(run, torch.device("cpu"))
                    measured.append((row, run))
                except RuntimeError as error:
                    row["reason"] = str(error).splitlines()[0]
            # The ways are measured by turns.
            for row, run in measured * rounds:
                start = time.process_time()
                run()
                row["seconds"].append(time.process_time() - start)
    return rows


def tables(rows: list[Row]) -> dict[str, str]:
    """Return the tables by their marks in the page."""
    gains = [r for r in rows if r["kind"] == "gain" and r["rater"] == "pairs"]
    titles = {
        EVERYTHING: "everything",
        RATED: "the half of each batch that the rater puts first",
        OUTER: "the half that is likeliest by bigrams of the outer text",
        BOTH: "the half by the difference of log-likelihoods, outer text − mixture (bigrams)",
        CLEAN: "documentation alone",
    }
    lines = []
    for name, title in titles.items():
        reached = {
            other: [r["perplexity"][other] for r in gains] for other in (name, EVERYTHING, RATED)
        }
        cells = [
            NONE if name == other else interval(reached[name], reached[other])
            for other in (EVERYTHING, RATED)
        ]
        lines.append([title, f"{statistics.fmean(reached[name]):.2f}", *cells])
    rows_by_name = {
        "a rater: a score for each pair of characters": [r["auc"] for r in gains],
        "a rater: a transformer": [
            r["auc"] for r in rows if r["kind"] == "gain" and r["rater"] == "transformer"
        ],
        "bigrams of the outer text": [r["auc_of_counts"][OUTER] for r in gains],
        "the difference, outer text − mixture": [r["auc_of_counts"][BOTH] for r in gains],
    }
    scores = [
        [n, len(areas), *(interval([a[k] for a in areas]) for k in (1, 0))]
        for n, areas in rows_by_name.items()
        if areas
    ]
    measured = [r for r in rows if r["kind"] == "cost"]
    ways = []
    (hand,) = (r for r in measured if (r["way"], r["attention"]) == (BY_HAND, "math"))
    for r in measured:
        cells = ["stops", NONE, NONE, NONE]
        if "reason" not in r:
            cells = [
                f"{min(r['seconds']) / min(hand['seconds']):.2f}",
                f"{r['bytes'] / hand['bytes']:.2f}",
            ]
            cells += [f"{r['bytes'] / 1e6:.0f}", f"{r['error']:.0e}"]
        ways.append([r["way"], r["attention"], *cells])
    head = [
        "perplexity of a character after training on",
        "mean",
        "minus everything",
        "minus the rated half",
    ]
    return {
        "data_rater": grid(head, lines),
        "data_rater-scores": grid(
            ["scores", "seeds", "AUC against shuffled text", "against source code"], scores
        ),
        "data_rater-costs": grid(
            ["gradient", "attention", "time", "memory", "MB", "error"], ways, names=2
        ),
    }


def main() -> None:
    args = parsed(arguments(__doc__, RAW))
    torch.set_num_threads(1)
    if args.runs:
        steps, rounds, width, most = (
            (4, 1, 16, 1) if args.miniature else (STEPS, ROUNDS, WIDTH, None)
        )
        example = problem()
        raters = [*every(rater="pairs", seed=SEEDS), *every(rater="transformer", seed=OTHER_SEEDS)]
        jobs: list[Row] = [{"kind": "gain", **job} for job in raters[:most]]

        def run(kind: str, **job: Any) -> Row | list[Row]:
            return (
                costs(example, rounds, width)
                if kind == "cost"
                else gain(example, **job, steps=steps)
            )

        go_on(args.out, [*jobs, {"kind": "cost"}], run)
    for mark, table in tables(read(args.out)).items():
        show(args.write, mark, table)


if __name__ == "__main__":
    main()
