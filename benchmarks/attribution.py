"""What does removing training examples do, and who predicts it? `metapl.attribute` beside rivals.

    python benchmarks/attribution.py             # goes on where it was stopped
    python benchmarks/attribution.py --write benchmarks/results/attribution.md

1,000 of scikit-learn's digits train a network, the other 797 judge it; 25 random sets of 1, 2, 5
and 10 % of the examples are removed, and the network is trained again without each by the loop
below, which uses nothing of metapl. Every method gives each example a score; Spearman's correlation
between the sums over the removed examples and what the trainings say is the linear datamodeling
score. On seeds 100 to 102: the settings of the training, metasmoothness beside what it should
predict, and what makes a convolutional network predictable. Then, at the settings that were chosen,
every method on seeds 0 to 4.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from harness import NONE, RESULTS, Row, append, arguments, grid, interval, parsed, read, show
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn import functional as F

import metapl
from metapl.feedback import Forward

RAW = RESULTS / "attribution.jsonl"
EXAMPLES, BATCH, SHARES, REMOVALS = 1000, 100, (0.01, 0.02, 0.05, 0.1), 25
TUNING_SEEDS, SEEDS = (100, 101, 102), (0, 1, 2, 3, 4)
CHECKPOINTS, DAMPING = 10, 1e-3


class Convolutional(nn.Module):
    """Two convolutions as products with patches, which a stack of networks shares.

    ``norm``, before the activation: of the batch, whose statistics it always takes, or of four
    groups of channels; ``outputs``: the factor of the last layer's weights at the start.
    """

    def __init__(
        self, act: nn.Module, width: int, norm: str = "", pool: str = "avg", outputs: float = 1.0
    ) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, width), nn.Linear(9 * width, 2 * width)
        self.last, self.act = nn.Linear(2 * width, 10), act
        self.pool = F.avg_pool2d if pool == "avg" else F.max_pool2d
        makes: dict[str, Callable[[int], nn.Module]] = {
            "": lambda _: nn.Identity(),
            "batch": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
            "group": lambda channels: nn.GroupNorm(4, channels),
        }
        self.norms = nn.ModuleList([makes[norm](width), makes[norm](2 * width)])
        with torch.no_grad():
            self.last.weight.mul_(outputs), self.last.bias.mul_(outputs)

    def forward(self, x: Tensor) -> Tensor:
        images = x.view(len(x), 1, 8, 8)
        for layer, norm in zip((self.first, self.second), self.norms, strict=True):
            side = images.shape[-1]
            patches = F.unfold(images, 3, padding=1).mT
            images = self.pool(self.act(norm(layer(patches).mT.reshape(len(x), -1, side, side))), 2)
        return self.last(images.mean((2, 3)))


def mlp(act: nn.Module, width: int, norm: str = "", outputs: float = 1.0) -> nn.Module:
    """Return a network of one hidden layer, whose last layer is scaled by ``outputs``.

    ``norm``: a batch norm "before" or "after" the activation, by the statistics of the batch.
    """
    of_batch = [nn.BatchNorm1d(width, track_running_stats=False)] if norm else []
    middle = [act, *of_batch] if norm == "after" else [*of_batch, act]
    last = nn.Linear(width, 10)
    with torch.no_grad():
        last.weight.mul_(outputs), last.bias.mul_(outputs)
    return nn.Sequential(nn.Linear(64, width), *middle, last)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "convolutional": Convolutional}


# What a training is: each differs in little from the first one.
BASE: Row = {
    "network": "mlp",
    "act": "GELU",
    "width": 256,
    "rule": "sgd",
    "lr": 0.03,
    "momentum": 0.9,
}
SETTINGS: dict[str, Row] = {
    "rate 0.03": BASE,
    "a third of the rate": {**BASE, "lr": 0.01},
    "three times the rate": {**BASE, "lr": 0.1},
    "ten times the rate": {**BASE, "lr": 0.3},
    "a rate that falls to zero": {**BASE, "falls": True},
    "ReLU": {**BASE, "act": "ReLU"},
    "width 64": {**BASE, "width": 64},
    "Adam, ε = 1e-8": {**BASE, "rule": "adam", "lr": 0.001, "eps": 1e-8},
    "Adam, ε = 1e-3": {**BASE, "rule": "adam", "lr": 0.001, "eps": 1e-3},
    "batch norm before the activation": {**BASE, "norm": "before"},
    "batch norm after the activation": {**BASE, "norm": "after"},
    "small outputs at the start": {**BASE, "outputs": 0.1},
    "bfloat16 autocast": {**BASE, "half": "autocast"},
    "bfloat16 weights": {**BASE, "half": "weights"},
    "convolutional": {**BASE, "network": "convolutional", "width": 16, "lr": 0.2, "falls": True},
}
METASMOOTH = [*SETTINGS][:-1]
CONVOLUTIONAL = SETTINGS["convolutional"]
LOW = {**CONVOLUTIONAL, "lr": 0.03}
# The advice of Engstrom et al. (2025), piece by piece.
SMOOTH: dict[str, Row] = {
    "as above": CONVOLUTIONAL,
    "max pooling": {**CONVOLUTIONAL, "pool": "max"},
    "ReLU": {**CONVOLUTIONAL, "act": "ReLU"},
    "a constant rate": {**CONVOLUTIONAL, "falls": False},
    "small outputs at the start": {**CONVOLUTIONAL, "outputs": 0.1},
    "twice the width": {**CONVOLUTIONAL, "width": 32},
    "batch norm": {**CONVOLUTIONAL, "norm": "batch"},
    "group norm": {**CONVOLUTIONAL, "norm": "group"},
    "rate 0.03": LOW,
    "batch norm, rate 0.03": {**LOW, "norm": "batch"},
    "group norm, rate 0.03": {**LOW, "norm": "group"},
    "batch norm, rate 0.03, small outputs": {**LOW, "norm": "batch", "outputs": 0.1},
    "batch norm, rate 0.03, max pooling, ReLU": {
        **LOW,
        "norm": "batch",
        "pool": "max",
        "act": "ReLU",
    },
    "batch norm, rate 0.01": {**LOW, "norm": "batch", "lr": 0.01},
}
SMOOTH_NAMED = {f"convolutional: {name}": setting for name, setting in SMOOTH.items()}
SMOOTH_STEPS, SMOOTH_REMOVALS = 300, 12
FEW = (0.01, 0.05)
FINAL: dict[tuple[str, int], tuple[float, ...]] = {
    ("a rate that falls to zero", 100): SHARES,
    ("a rate that falls to zero", 500): SHARES,
    ("a rate that falls to zero", 2000): SHARES,
    ("three times the rate", 500): SHARES,
    ("convolutional", 500): FEW,
}


def data(seed: int, half: bool = False) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(x / 16, dtype=torch.bfloat16 if half else torch.float32)[order]
    y = torch.tensor(y)[order]
    return (x[:EXAMPLES], y[:EXAMPLES]), (x[EXAMPLES:], y[EXAMPLES:])


def built(setting: Row, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    options = {name: setting[name] for name in ("norm", "pool", "outputs") if name in setting}
    build = NETWORKS[setting["network"]]
    network = build(getattr(nn, setting["act"])(), setting["width"], **options)
    if setting.get("half") == "weights":
        network = network.bfloat16()
    optimizer: torch.optim.Optimizer
    if setting["rule"] == "adam":
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=setting["lr"],
            eps=setting["eps"],
            weight_decay=setting.get("decay", 0.0),
        )
    else:
        optimizer = torch.optim.SGD(
            network.parameters(), lr=setting["lr"], momentum=setting["momentum"]
        )
    return network, optimizer


def factor(setting: Row, step: int, steps: int) -> float:
    return 1 - step / steps if setting.get("falls") else 1.0


def losses_of(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each example, (B,).

    That of a sequence, with logits (B, T, V), is the mean over its words but the first.
    """
    if outputs.ndim == 3:
        outputs, y = outputs[:, :-1].transpose(1, 2), y[:, 1:]
    return F.cross_entropy(outputs, y, reduction="none").view(len(y), -1).mean(1)


def retrained(
    setting: Row, seed: int, order: Tensor, train: Any, outer: Any, weights: Tensor
) -> Tensor:
    """Return the outer losses, (S, N), of a stack of networks trained with weighted examples.

    Each network has its own weights of the examples, a row of ``weights``.
    """
    network, _ = built(setting, seed)
    params = {
        n: p.detach().expand(len(weights), *p.shape).clone() for n, p in network.named_parameters()
    }
    first = {n: torch.zeros_like(p) for n, p in params.items()}
    second = {n: torch.zeros_like(p) for n, p in params.items()}
    (x, y), steps = train, len(order)

    def loss(p: dict[str, Tensor], w: Tensor, chosen: Tensor) -> Tensor:
        return (w * losses_of(functional_call(network, p, (x[chosen],)).float(), y[chosen])).mean()

    gradients = vmap(grad(loss), in_dims=(0, 0, None))
    for step, chosen in enumerate(order):
        lr = setting["lr"] * factor(setting, step, steps)
        for n, g in gradients(params, weights[:, chosen], chosen).items():
            if setting["rule"] == "sgd":
                first[n].mul_(setting["momentum"]).add_(g)
                params[n].sub_(first[n], alpha=lr)
                continue
            first[n].lerp_(g, 0.1)
            second[n].mul_(0.999).addcmul_(g, g, value=0.001)
            root = (second[n] / (1 - 0.999 ** (step + 1))).sqrt_().add_(setting["eps"])
            params[n].mul_(1 - lr * setting.get("decay", 0.0)).sub_(
                lr / (1 - 0.9 ** (step + 1)) * first[n] / root
            )
    judged = vmap(
        lambda p: losses_of(functional_call(network, p, (outer[0],)).float(), outer[1]).mean()
    )
    return judged(params)


def loss_of(
    network: nn.Module, params: dict[str, Tensor], batch: Any, reduction: str = "mean"
) -> Tensor:
    x, y = batch
    return F.cross_entropy(functional_call(network, params, (x,)), y, reduction=reduction)


def along(
    network: nn.Module, params: dict[str, Tensor], train: Any, v: dict[str, Tensor]
) -> Tensor:
    """Return ⟨∇ℓ_i, v⟩ of every training example."""
    return jvp(lambda p: loss_of(network, p, train, "none"), (params,), (v,))[1].detach()


def plain(setting: Row, seed: int, order: Tensor, train: Any) -> Iterator[dict[str, Tensor]]:
    """Yield the weights before each step of the training, and at its end.

    The last one is the network's own.
    """
    network, optimizer = built(setting, seed)
    for step, chosen in enumerate(order):
        yield {n: p.detach() for n, p in network.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = setting["lr"] * factor(setting, step, len(order))
        optimizer.zero_grad()
        F.cross_entropy(network(train[0][chosen]), train[1][chosen]).backward()
        optimizer.step()
    yield {n: p.detach() for n, p in network.named_parameters()}


def training(setting: Row, seed: int, steps: int) -> Row:
    """Return the arguments of `metapl.attribute` and `metapl.metasmoothness` but for the data."""
    network, optimizer = built(setting, seed)
    settings = None
    if setting.get("falls"):
        factors = [factor(setting, step, steps) for step in range(steps)]
        settings = {"lr": setting["lr"] * torch.tensor(factors, dtype=torch.float64)[:, None]}
    return {
        "student": network,
        "optimizer": optimizer,
        "steps": steps,
        "batch_size": BATCH,
        "settings": settings,
        "generator": torch.Generator().manual_seed(seed),
    }


def by_attribute(setting: Row, seed: int, order: Tensor, train: Any, outer: Any) -> Tensor:
    options = training(setting, seed, len(order))
    with warnings.catch_warnings():
        # Some settings are rough on purpose.
        warnings.simplefilter("ignore")
        attribution = metapl.attribute(train=train, outer=outer, smoothing=0.0, **options)
    assert torch.equal(attribution.order, order)
    return attribution.scores


def by_dot_products(
    setting: Row, seed: int, order: Tensor, train: Any, outer: Any, checkpoints: int
) -> Tensor:
    """Return TracIn's scores without its rates.

    Σ ⟨∇ℓ_i, ∇L⟩ at checkpoints spread over the training, the last of them at its end.
    """
    network, _ = built(setting, seed)
    steps_of_checkpoints = {
        len(order) * (number + 1) // checkpoints for number in range(checkpoints)
    }
    outer_gradient = grad(lambda params: loss_of(network, params, outer))
    scores = torch.zeros(EXAMPLES)
    for step, params in enumerate(plain(setting, seed, order, train)):
        if step in steps_of_checkpoints:
            checkpoint = {name: p.clone() for name, p in params.items()}
            scores += along(network, checkpoint, train, outer_gradient(checkpoint))
    return scores


def by_one_step(setting: Row, seed: int, order: Tensor, train: Any, outer: Any) -> Tensor:
    """Return the feedback of a look-ahead of one step, summed over every step of the training."""
    from metapl.problems import EqualWeights

    network, optimizer = built(setting, seed)
    trainer = metapl.BilevelTrainer(
        None, network, Forward(), problem=EqualWeights(), inner_optimizer=optimizer
    )
    scores = torch.zeros(EXAMPLES)
    for step, chosen in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = setting["lr"] * factor(setting, step, len(order))
        h = trainer.step(outer=outer, inner=(train[0][chosen], train[1][chosen])).feedback
        scores.index_add_(0, chosen, h)
    return scores


def by_influence(setting: Row, seed: int, order: Tensor, train: Any, outer: Any) -> Tensor:
    """Return the influence on the last layer at the training's end, ⟨∇ℓ_i, (H + λ)⁻¹ ∇L⟩."""
    network, _ = built(setting, seed)
    *_, params = plain(setting, seed, order, train)
    names = [*params][-2:]
    sizes = [params[n].numel() for n in names]
    flat = torch.cat([params[n].flatten() for n in names])

    def with_last(vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split(sizes)
        return {
            **params,
            **{n: part.view_as(params[n]) for n, part in zip(names, parts, strict=True)},
        }

    def loss(vector: Tensor, batch: Any) -> Tensor:
        return loss_of(network, with_last(vector), batch)

    curved = hessian(loss)(flat, train).double() + DAMPING * torch.eye(len(flat))
    direction = with_last(torch.linalg.solve(curved, grad(loss)(flat, outer).double()).float())
    moved = {n: direction[n] if n in names else torch.zeros_like(p) for n, p in params.items()}
    return along(network, params, train, moved)


INFLUENCE = "influence functions, last layer"
METHODS: dict[str, Callable[..., Tensor]] = {
    "attribute": by_attribute,
    "one-step look-ahead, every step": by_one_step,
    "gradient dot products, 10 checkpoints": partial(by_dot_products, checkpoints=CHECKPOINTS),
    "gradient dot products, at the end": partial(by_dot_products, checkpoints=1),
    INFLUENCE: by_influence,
}


def order_of(many: int, steps: int, batch: int, seed: int) -> Tensor:
    """Return the rows of each batch, (K, B), as attribute draws them."""
    draw = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(many, generator=draw) for _ in range(-(-steps * batch // many))]
    return torch.cat(passes)[: steps * batch].view(steps, batch)


def removed(
    many: int, shares: Sequence[float], removals: int, seed: int
) -> tuple[list[Tensor], Tensor]:
    """Return so many random sets of each share of the examples, and the rows of weights.

    The first row is of all examples, each other one of all without a set.
    """
    draw = torch.Generator().manual_seed(seed + 1000)
    sets = [
        torch.randperm(many, generator=draw)[: round(s * many)]
        for s in shares
        for _ in range(removals)
    ]
    weights = torch.ones(1 + len(sets), many)
    for row, chosen in zip(weights[1:], sets, strict=True):
        row[chosen] = 0
    return sets, weights


def row_of(
    name: str,
    steps: int,
    seed: int,
    methods: tuple[str, ...],
    shares: tuple[float, ...],
    removals: int = REMOVALS,
) -> Row:
    setting = {**SETTINGS, **SMOOTH_NAMED}[name]
    train, outer = data(seed, setting.get("half") == "weights")
    order = order_of(EXAMPLES, steps, BATCH, seed)
    sets, weights = removed(EXAMPLES, shares, removals, seed)
    start = time.process_time()
    losses = retrained(setting, seed, order, train, outer, weights)
    row: Row = {
        "setting": name,
        "steps": steps,
        "seed": seed,
        "loss": float(losses[0]),
        "scores": {},
        "seconds": {},
    }
    row["seconds"]["trainings"] = time.process_time() - start
    start = time.process_time()
    *_, params = plain(setting, seed, order, train)
    row["seconds"]["one training"] = time.process_time() - start
    outputs = functional_call(built(setting, seed)[0], params, (outer[0],))
    row["accuracy"] = float((outputs.argmax(1) == outer[1]).float().mean())
    changes = (losses[1:] - losses[0]).tolist()
    for method in methods:
        start = time.process_time()
        scores = METHODS[method](setting, seed, order, train, outer)
        row["seconds"][method] = time.process_time() - start
        predicted = [float(scores[chosen].sum()) for chosen in sets]
        correlations = {}
        for number, share in enumerate(shares):
            of_share = slice(number * removals, (number + 1) * removals)
            spearman = float(spearmanr(predicted[of_share], changes[of_share])[0])
            pearson = float(pearsonr(predicted[of_share], changes[of_share])[0])
            correlations[f"{share:g}"] = (spearman, pearson)
        row["scores"][method] = correlations
    return row


def smoothness(name: str, steps: int, seed: int) -> Row:
    """Return the agreement of definition 2 and three outer losses, in the default direction.

    They are those of a training's first tenth and, of the first seed, of the whole.
    """
    setting = SETTINGS[name]
    train, outer = data(seed, setting.get("half") == "weights")
    row: Row = {"setting": name, "steps": steps, "seed": seed}
    for part, name in ((1, "metasmoothness"), (10, "first tenth"))[seed in TUNING_SEEDS[1:] :]:
        options = training(setting, seed, steps) | {"steps": steps // part}
        start = time.process_time()
        measured = metapl.metasmoothness(train=train, outer=outer, **options)
        row[name] = {"agreement": measured.agreement, "losses": measured.outer_loss.tolist()}
        row[name]["seconds"] = time.process_time() - start
    return row


def asked(miniature: bool) -> Iterator[Any]:
    if miniature:
        yield "convolutional", 12, 0, tuple(METHODS), SHARES
        return
    for name, seed in itertools.product(SETTINGS, TUNING_SEEDS):
        yield name, 500, seed, ("attribute",), FEW
        if name in METASMOOTH:
            yield name, 500, seed
    for name, seed in itertools.product(SMOOTH_NAMED, TUNING_SEEDS):
        yield name, SMOOTH_STEPS, seed, ("attribute",), (0.01,), SMOOTH_REMOVALS
    for ((name, steps), shares), seed in itertools.product(FINAL.items(), SEEDS):
        yield name, steps, seed, tuple(METHODS), shares


def mean(rows: list[Row], method: str, share: float) -> str:
    values = []
    for row in rows:
        if correlations := row["scores"][method].get(f"{share:g}"):
            spearman, _ = correlations
            values.append(spearman)
    return f"{statistics.fmean(values):.2f}" if values else NONE


def above_influence(rows: list[Row], share: float) -> str:
    """Return how far attribute's correlation is above influence functions', by paired seeds.

    The 95 % interval is behind it.
    """
    key = f"{share:g}"
    by_attribute = []
    by_influence = []
    for row in rows:
        if key in row["scores"][INFLUENCE]:
            by_attribute.append(row["scores"]["attribute"][key][0])
            by_influence.append(row["scores"][INFLUENCE][key][0])
    if len(by_attribute) < 2:
        return NONE
    return interval(by_attribute, by_influence, form="+.2f")


def tables(rows: list[Row]) -> dict[str, str]:
    """Return the tables by their marks in the page."""
    smoothness_rows = [r for r in rows if "scores" not in r]
    rows = [r for r in rows if "scores" in r]
    tuning = [r for r in rows if r["seed"] in TUNING_SEEDS]
    lines: list[list[Any]] = []
    columns: list[tuple[float, ...]] = []
    for name in METASMOOTH:
        scored = [r for r in tuning if r["setting"] == name]
        measured = [r for r in smoothness_rows if r["setting"] == name]
        if scored and measured:
            loss = statistics.fmean(r["loss"] for r in scored)
            agreements = [
                statistics.fmean(r[part]["agreement"] for r in measured if part in r)
                for part in ("metasmoothness", "first tenth")
            ]
            of_training, of_first_tenth = agreements
            removed = [mean(scored, "attribute", share) for share in FEW]
            cells = [f"{of_training:.3f}", f"{of_first_tenth:.4f}"]
            lines.append([name, f"{loss:.3f}", *removed, len(scored), *cells])
            columns.append((of_training, of_first_tenth, *map(float, removed)))
    final = []
    for name, steps in FINAL:
        mine = [
            r for r in rows if r["seed"] in SEEDS and (r["setting"], r["steps"]) == (name, steps)
        ]
        if not mine:
            continue
        for method in METHODS:
            cells = [mean(mine, method, share) for share in SHARES]
            cost = statistics.median(
                r["seconds"][method] / r["seconds"]["one training"] for r in mine
            )
            final.append([name, f"{steps:,}", len(mine), method, *cells, f"{cost:.1f}"])
        cells = [above_influence(mine, share) for share in SHARES]
        final.append(
            [name, f"{steps:,}", len(mine), "*attribute − influence functions*", *cells, ""]
        )
    correlations = [NONE] * 4
    if len(columns) > 2:
        of_trainings, of_first_tenths, *shares = zip(*columns, strict=True)
        correlations = []
        for agreement, share in itertools.product((of_trainings, of_first_tenths), shares):
            correlations.append(f"{spearmanr(agreement, share)[0]:.2f}")
    at_1, at_5, at_1_by_tenth, at_5_by_tenth = correlations
    correlated = (
        f"Over these {len(columns)} trainings Spearman's correlation between metasmoothness and "
        f"these figures is {at_1} at 1 % and {at_5} at 5 %, of the first tenth {at_1_by_tenth} "
        f"and {at_5_by_tenth}."
    )
    # These rows say what makes a convolutional network predictable.
    smooth = []
    for name in SMOOTH:
        mine = [r for r in tuning if r["setting"] == f"convolutional: {name}"]
        if mine:
            loss = statistics.fmean(r["loss"] for r in mine)
            accuracy = statistics.fmean(r["accuracy"] for r in mine)
            values = [r["scores"]["attribute"]["0.01"][0] for r in mine]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells = [
                f"{loss:.3f}",
                f"{100 * accuracy:.1f}",
                f"{statistics.fmean(values):.2f}{spread}",
            ]
            smooth.append([name, len(mine), *cells])
    heads = (
        ["training", "steps", "seeds", "method", *(f"{100 * s:g} %" for s in SHARES), "trainings"],
        [
            "training",
            "loss",
            "1 % removed",
            "5 % removed",
            "seeds",
            "metasmoothness",
            "of the first tenth",
        ],
        ["convolutional network", "seeds", "loss", "accuracy", "1 % removed"],
    )
    by_method, by_setting, by_piece = map(grid, heads, (final, lines, smooth), ("lrrl", 1, 1))
    return {
        "attribution": by_method,
        "attribution-settings": f"{by_setting}\n\n{correlated}",
        "attribution-smooth": by_piece,
    }


def main() -> None:
    args = parsed(arguments(__doc__, RAW))
    torch.set_num_threads(1)
    rows = read(args.out)
    done = {(r["setting"], r["steps"], r["seed"], "scores" in r) for r in rows}
    jobs = asked(args.miniature) if args.runs else ()
    for job in jobs:
        has_scores = len(job) > 3
        if (*job[:3], has_scores) not in done:
            is_half = SETTINGS.get(job[0], {}).get("half") == "autocast"
            with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
                rows.append(row_of(*job) if has_scores else smoothness(*job))
            append(args.out, rows[-1])
            print(*job[:3], rows[-1].get("loss", rows[-1]), file=sys.stderr, flush=True)
    for mark, table in tables(rows).items():
        show(args.write, mark, table)


if __name__ == "__main__":
    main()
