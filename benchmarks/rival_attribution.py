"""Influence through whole trainings by metapl and by bergson: does it predict what removals do?

    python -m venv rival && rival/bin/pip install bergson==2.5.1
    python benchmarks/rival_attribution.py --rival-python rival/bin/python
    python benchmarks/rival_attribution.py --write benchmarks/results/rival_attribution.md

Both get the same training in float64 from a file: initial weights, examples, the rows of batches.
bergson's Trainer, optimizers, checkpoints and backward pass run as they are; in the place of its
data stream, which is for tokenized data sets, stand these arrays. Each library has a process of its
own, in which its ways take turns with a plain training by the same library. Without --rival-python
the rows of bergson say that they were skipped.

The linear datamodeling score is Spearman's correlation, over random sets of 1, 5 and 10 % of the
examples, between the predicted outer loss, L + Σ score_i (MAGIC's φ(1) - Σ τ_i), and that of
trainings without them by the loop of benchmarks/attribution.py, which uses nothing of metapl, in
float32. The transformer and its sequences are those of ``examples/data_rater.py``; in the committed
rows they were another and docstrings of 32 words (at commit 34cbc0d7).
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attribution
import data_rater
import torch
from attribution import BASE, factor, losses_of
from harness import (
    NONE,
    RESULTS,
    Row,
    apart,
    arguments,
    environment,
    go_on,
    grid,
    parsed,
    read,
    show,
)
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl
from metapl.ablation.cost import peak_bytes
from metapl.feedback import Forward

RAW = RESULTS / "rival_attribution.jsonl"
SHARES, REMOVALS, SEEDS = (0.01, 0.05, 0.1), 30, (0, 1, 2)
TEXT = data_rater.problem()
NARROW = "sqrt, default type float32"
LIBRARIES = {
    "metapl": ("compiled, all kept", "all kept", "every √K-th", "tree"),
    "bergson": ("all", "sqrt", "log", NARROW),
}
FALLS: Row = {**BASE, "width": 64, "falls": True, "batch": 100}
WORDS = FALLS | {
    "network": "words",
    "width": 32,
    "batch": 10,
    "rule": "adam",
    "lr": 1e-3,
    "eps": 1e-8,
    "decay": 0.01,
}
SETTINGS = {"perceptron, SGD": FALLS, "causal transformer, AdamW": WORDS}
SETTINGS["causal transformer, AdamW, ε = 1e-3"] = WORDS | {"eps": 1e-3}
# Each has steps and rounds.
COSTS = {"perceptron, SGD": (500, 3), "causal transformer, AdamW": (50, 1)}
SCORED = (
    ("perceptron, SGD", 100),
    ("perceptron, SGD", 500),
    *((name, 50) for name in [*SETTINGS][1:]),
)


TEXT.WIDTH = WORDS["width"]
attribution.NETWORKS["words"] = lambda act, width: TEXT.Transformer()


def training(setting: Row, steps: int, seed: int, dtype: torch.dtype) -> Row:
    """Return the examples, (N, ...), the outer ones, each batch's rows, (K, B), and the weights.

    The weights are the initial ones.
    """
    if setting["network"] == "words":
        text = TEXT.Data(seed)
        pairs = (text.clean[:500],) * 2, (text.outer[:100],) * 2
    else:
        pairs = tuple((x.to(dtype), y) for x, y in attribution.data(seed))
    order = attribution.order_of(len(pairs[0][0]), steps, setting["batch"], seed)
    weights = {
        name: t.to(dtype) for name, t in attribution.built(setting, seed)[0].state_dict().items()
    }
    return {
        "setting": setting,
        "seed": seed,
        "train": pairs[0],
        "outer": pairs[1],
        "order": order,
        "weights": weights,
    }


def begun(inputs: Row) -> tuple[nn.Module, torch.optim.Optimizer]:
    network, optimizer = attribution.built(inputs["setting"], inputs["seed"])
    network.to(next(iter(inputs["weights"].values())).dtype).load_state_dict(inputs["weights"])
    return network, optimizer


# A compiled training is known by its problem, student and optimizer, which are kept here.
KEPT_TRAININGS = dict[Tensor, Any]()


def by_metapl(inputs: Row, way: str = "") -> Any:
    """Return scores, (N,), and the outer loss; no way: a plain training."""
    (network, optimizer), (x, y), order, setting = (
        begun(inputs),
        inputs["train"],
        inputs["order"],
        inputs["setting"],
    )
    if not way:
        for step, rows in enumerate(order):
            optimizer.param_groups[0]["lr"] = setting["lr"] * factor(setting, step, len(order))
            optimizer.zero_grad()
            losses_of(network(x[rows]), y[rows]).mean().backward()
            optimizer.step()
        return None
    problem: Any = metapl.problems.NextToken() if setting["network"] == "words" else None
    network, optimizer, problem = KEPT_TRAININGS.setdefault(x, (network, optimizer, problem))
    modes = {
        "tree": Forward(keep="tree"),
        "every √K-th": Forward(keep_every=max(2, math.isqrt(len(order)))),
    }
    factors = [factor(setting, step, len(order)) for step in range(len(order))]
    rates = setting["lr"] * torch.tensor(factors, dtype=torch.float64)[:, None]
    with warnings.catch_warnings():
        # Exact scores are what the rival has, also at Adam's usual eps.
        warnings.simplefilter("ignore")
        attribution_of = metapl.attribute(
            network,
            inputs["train"],
            inputs["outer"],
            optimizer=optimizer,
            steps=len(order),
            batch_size=setting["batch"],
            settings={"lr": rates},
            generator=torch.Generator().manual_seed(inputs["seed"]),
            problem=problem,
            mode=modes.get(way, Forward(keep_every=1)),
            smoothing=0.0,
            compile=way.startswith("compiled"),
            progress=False,
        )
    assert torch.equal(attribution_of.order, order)
    return attribution_of.scores, attribution_of.outer_loss


class Stream:
    """What bergson's Trainer asks of a data stream."""

    requires_grad = True
    device = torch.device("cpu")

    def __init__(self, inputs: Row) -> None:
        (self.x, self.y), self.order = inputs["train"], inputs["order"]
        self.weights = nn.Parameter(torch.ones(len(self.x), dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> Row:
        rows = self.order[step]
        return {"input_ids": self.x[rows], "y": self.y[rows], "weights": self.weights[rows]}


class Weighted(nn.Module):
    """What bergson's Trainer calls: the loss of a batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, y: Tensor, weights: Tensor | float = 1.0) -> Tensor:
        return (weights * losses_of(self.network(input_ids), y)).mean()


def by_bergson(inputs: Row, way: str = "") -> Any:
    """Return scores and outer loss likewise; bergson's save modes are the ways."""
    import torchopt
    from bergson.magic.trainer import BackwardState, Trainer

    # TorchOpt's step counts become tensors of the default type, and with them rates and bias
    # corrections.
    torch.set_default_dtype(torch.float32 if way == NARROW else torch.float64)
    setting = inputs["setting"]
    steps = len(inputs["order"])
    mode = way.split(",")[0] or "all"
    rate = partial(lambda step: setting["lr"] * factor(setting, step, steps))
    rule = torchopt.sgd(rate, momentum=setting["momentum"])
    # The root of zero has no derivative, so AdamW's has a small number under it.
    if setting["rule"] == "adam":
        rule = torchopt.adamw(
            rate, eps=setting["eps"], eps_root=1e-30, weight_decay=setting["decay"]
        )
    with sdpa_kernel(SDPBackend.MATH), tempfile.TemporaryDirectory() as folder:
        trainer, state = Trainer.initialize(Weighted(begun(inputs)[0]), rule)
        stream = Stream(inputs)
        keep_on = folder if way else None
        state = trainer.train(
            state.detach_(), stream, inplace=True, save_dir=keep_on, save_mode=mode
        )
        if not way:
            return None
        with state.activate(trainer.model) as params:
            outer = trainer.model(*inputs["outer"])
            grads = dict(
                zip(params, torch.autograd.grad(outer, list(params.values())), strict=True)
            )
        zeros = [torch.zeros_like(t) for t in state.differentiable_tensors()[len(grads) :]]
        adjoint = BackwardState(grads, zeros, torch.zeros_like(stream.weights))
        adjoint = trainer.backward(folder, stream, adjoint, state, inplace=True, save_mode=mode)
    return -adjoint.weight_grads.detach(), outer.detach()


def measure(library: str, inputs: Row, rounds: int, ways: tuple[str, ...]) -> list[Row]:
    """Measure some ways of a library, in the process that it is called in.

    What a first call loads or compiles is not timed.
    """
    score: Any = {"metapl": by_metapl, "bergson": by_bergson}[library]
    rows: dict[str, Row] = {way: {"way": way, "seconds": [], "plain_seconds": []} for way in ways}
    scores_by_way = {
        way: score(inputs | {"order": inputs["order"][:3]}, way) for way in ("", *ways)
    }
    for _ in range(rounds):
        for way, row in rows.items():
            for name, way_of_column in (("plain_seconds", ""), ("seconds", way)):
                start = time.process_time()
                scores_by_way[way_of_column] = score(inputs, way_of_column)
                row[name].append(time.process_time() - start)
    for way, row in rows.items():
        row["bytes"] = peak_bytes(partial(score, inputs, way), torch.device("cpu"))
        row |= {"scores": scores_by_way[way][0].tolist(), "loss": float(scores_by_way[way][1])}
        row |= {"torch": torch.__version__, "version": version(library)}
    return list(rows.values())


def costs(case: str, steps: int, rounds: int, python: Path | None, miniature: bool) -> list[Row]:
    """Return the rows of a training, with errors beside metapl with all states kept.

    One round leaves the first way out.
    """
    inputs = training(SETTINGS[case], steps, 0, torch.float64)
    scores = dict[str, Tensor]()
    rows = list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(inputs, Path(folder) / "training.pt")
        for library, ways_of_library in LIBRARIES.items():
            ways = ways_of_library[1:] if rounds == 1 else ways_of_library
            if library == "bergson" and python is None:
                rows.append({"library": library, "reason": "skipped: no --rival-python"})
                continue
            use = (
                f"rival_attribution.measure({library!r}, torch.load('{folder}/training.pt'), "
                f"{rounds}, {ways!r})"
            )
            with_library = str(python) if library == "bergson" else sys.executable
            try:
                measured_rows = (
                    measure(library, inputs, rounds, ways)
                    if miniature
                    else apart(use, with_library)
                )
            except RuntimeError as error:
                rows.append(
                    {"library": library, "reason": f"stops: {str(error).splitlines()[-1][:150]}"}
                )
                continue
            for row_of_library in measured_rows:
                scores[row_of_library["way"]] = torch.tensor(
                    row_of_library.pop("scores"), dtype=torch.float64
                )
                rows.append({"library": library, **row_of_library})
    for row in rows:
        if row.get("way"):
            of_way = scores[row["way"]]
            exact = scores["all kept"]
            row["error"] = float((of_way - exact).abs().max() / exact.abs().max())
            row["cosine"] = float(F.cosine_similarity(of_way, exact, dim=0))
    return rows


def lds(case: str, steps: int, seed: int, removals: int) -> Row:
    inputs = training(SETTINGS[case], steps, seed, torch.float32)
    start = time.process_time()
    scores, loss = by_metapl(inputs, "all kept")
    row: Row = {"removals": removals, "seconds": {"scores": time.process_time() - start}}
    sets, weights = attribution.removed(len(scores), SHARES, removals, seed)
    start = time.process_time()
    with sdpa_kernel(SDPBackend.MATH):
        retraining = (
            inputs["setting"],
            seed,
            inputs["order"],
            inputs["train"],
            inputs["outer"],
            weights,
        )
        base, *without = attribution.retrained(*retraining).double()
    row["seconds"]["trainings"] = time.process_time() - start
    row |= {
        "loss": float(base),
        "loss_difference": float((loss - base).abs()),
        "spearman": {},
        "changes": {},
    }
    for number, share in enumerate(SHARES):
        of_share = range(number * removals, (number + 1) * removals)
        predicted = [float(scores[sets[i]].sum()) for i in of_share]
        true = [float(without[i] - base) for i in of_share]
        row["spearman"][f"{share:g}"] = float(spearmanr(predicted, true)[0])
        row["changes"][f"{share:g}"] = {"predicted": predicted, "retrained": true}
    return row


def tables(rows: list[Row]) -> dict[str, str]:
    """Return the tables by their marks in the page."""
    lines = []
    measured = [row for row in rows if row["kind"] == "cost"]
    torchs = {
        row["case"]: statistics.median(row["plain_seconds"])
        for row in measured
        if row.get("way") == "all kept"
    }
    for row in measured:
        cells = [row.get("reason"), NONE, NONE, NONE]
        if "reason" not in row:
            ratio = statistics.median(
                a / b for a, b in zip(row["seconds"], row["plain_seconds"], strict=True)
            )
            of_torch = statistics.median(row["seconds"]) / torchs[row["case"]]
            cells = [
                f"{row['error']:.0e}",
                f"{ratio:.1f}",
                f"{of_torch:.1f}",
                f"{row['bytes'] / 1e6:.1f}",
            ]
        by_key = (
            row["library"]
            if "reason" in row
            else f"{row['library']} {row['version']}, {row['way']}"
        )
        lines.append([row["case"], row["steps"], by_key, *cells])
    head = [
        "training",
        "K",
        "by",
        "error",
        "time / plain",
        "time / torch's plain",
        "peak memory, MB",
    ]
    costs = grid(head, lines, "lrl")
    scored = [row for row in rows if row["kind"] == "lds"]
    lines = []
    for name, steps in dict.fromkeys((row["case"], row["steps"]) for row in scored):
        same = [row for row in scored if (row["case"], row["steps"]) == (name, steps)]
        columns = [[row["spearman"][f"{share:g}"] for row in same] for share in SHARES]
        ranges = [
            f"{statistics.fmean(column):.2f} ({min(column):.2f} to {max(column):.2f})"
            for column in columns
        ]
        lines.append(
            [
                name,
                steps,
                len(same),
                f"{statistics.fmean(row['loss'] for row in same):.3f}",
                *ranges,
            ]
        )
    scores = grid(["training", "K", "seeds", "loss", *(f"{100 * s:g} %" for s in SHARES)], lines)
    return {"rival_attribution": costs, "rival_attribution-scores": scores}


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument(
        "--rival-python", type=Path, metavar="FILE", help="an interpreter that has bergson"
    )
    args = parsed(parser)
    torch.set_num_threads(1)
    sizes = dict.fromkeys(COSTS, (3, 1)) if args.miniature else COSTS
    scored = (
        [(case, 3, 0) for case in COSTS]
        if args.miniature
        else [(*training_of, seed) for training_of in SCORED for seed in SEEDS]
    )
    jobs: list[Row] = [
        {"kind": "cost", "case": case, "steps": steps} for case, (steps, _) in sizes.items()
    ]
    jobs += [
        {"kind": "lds", "case": case, "steps": steps, "seed": seed} for case, steps, seed in scored
    ]

    def measured(kind: str, **job: Any) -> Row | list[Row]:
        if kind == "lds":
            return lds(**job, removals=4 if args.miniature else REMOVALS)
        return costs(
            **job,
            rounds=sizes[job["case"]][1],
            python=args.rival_python,
            miniature=args.miniature,
        )

    if args.runs:
        go_on(args.out, jobs, measured, machine=environment())
    for mark, table in tables(read(args.out, "kind")).items():
        show(args.write, mark, table)


if __name__ == "__main__":
    main()
