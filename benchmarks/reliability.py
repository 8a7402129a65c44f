"""What does a measurement before the attribution say about how well it will predict retraining?

    python benchmarks/reliability.py             # goes on where it was stopped
    python benchmarks/reliability.py --write benchmarks/results/reliability.md
    python benchmarks/reliability.py --calibrate # writes metapl/training/calibration.py

``benchmarks/attribution.py`` has measured, for 31 trainings, the rank correlation between predicted
and real changes of the loss when 1 % of the examples are removed. Here the measurements of
`metapl.reliability`, and others that might have become part of it, are taken of the same trainings,
on one seed each. A ridge regression on the logarithms of one or two of them predicts Fisher's z of
the correlation; which ones is chosen anew for each training that is left out. The trainings of
``UNSEEN`` take no part in this. They were named and committed before any of them was run.

The rows of attribution.jsonl are older than these: the weights at the start and the data are the
same, and the order of the batches is another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attribution as study
import torch
from harness import RESULTS, Row, arguments, go_on, parsed
from scipy.stats import spearmanr
from torch import Tensor

from metapl.training import reliability as library
from metapl.training.attribution import agreement_of_signs

RAW = RESULTS / "reliability.jsonl"
SHARE = 0.01

# The cheapest trainings come first.
CALIBRATION: tuple[tuple[str, int], ...] = (
    *((name, 500) for name in study.METASMOOTH),
    ("a rate that falls to zero", 100),
    *((name, study.SMOOTH_STEPS) for name in study.SMOOTH_NAMED),
    ("a rate that falls to zero", 2000),
    ("convolutional", 500),
)
SEED_OF_STEPS = {100: 0, 2000: 0}

# Nobody has tuned anything for these six trainings. Each has one seed, and 25 removals of 1 %.
UNSEEN: dict[str, Row] = {
    "width 32, rate 0.06": {**study.BASE, "width": 32, "lr": 0.06},
    "Tanh, width 128, rate 0.3 without momentum": {
        **study.BASE,
        "act": "Tanh",
        "width": 128,
        "lr": 0.3,
        "momentum": 0.0,
    },
    "width 96, AdamW at 0.003, ε = 1e-6": {
        **study.BASE,
        "width": 96,
        "rule": "adam",
        "lr": 0.003,
        "eps": 1e-6,
        "decay": 0.01,
    },
    "SiLU, width 48, rate 0.2 that falls": {
        **study.BASE,
        "act": "SiLU",
        "width": 48,
        "lr": 0.2,
        "momentum": 0.8,
        "falls": True,
    },
    "convolutional, width 8, rate 0.1 that falls": {
        **study.CONVOLUTIONAL,
        "width": 8,
        "lr": 0.1,
    },
    "convolutional, width 8, SiLU, batch norm, rate 0.1 that falls": {
        **study.CONVOLUTIONAL,
        "width": 8,
        "act": "SiLU",
        "norm": "batch",
        "lr": 0.1,
    },
}
UNSEEN_STEPS = dict(zip(UNSEEN, (400, 600, 300, 500, 300, 250), strict=True))
UNSEEN_SEED = 300
# What made a convolutional network predictable on the seeds 100 to 102, on seeds that are fresh.
RECIPE = "convolutional: batch norm, rate 0.03, small outputs"
RECIPE_SEEDS = (200, 201)


class Milestones(library.ProbedTraining):
    """A probed training that keeps the weights after some of its steps, as vectors.

    Attributes:
        weights_after: by the number of steps, those of every training since the beginning.
    """

    def __init__(self, *arguments: Any, milestones: Sequence[int], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.weights_after: dict[int, list[Tensor]] = {steps: [] for steps in milestones}
        self._taken = 0

    def _take_step(self, network: Any, *rest: Any) -> None:
        super()._take_step(network, *rest)
        steps = self._taken % len(self.order) + 1
        self._taken += 1
        if steps in self.weights_after:
            weights = [p.detach().flatten() for p in network.parameters()]
            self.weights_after[steps].append(torch.cat(weights))


# ------------------------------------------------------------------------------------ measurements


def setting_of(name: str) -> Row:
    """Return the options of a training by its name."""
    return {**study.SETTINGS, **study.SMOOTH_NAMED, **UNSEEN}[name]


def training_of(
    make: Callable[..., Any], setting: Row, steps: int, seed: int, seed_of_order: int, **more: Any
) -> tuple[Any, Any]:
    """Return a weighted training of a setting, and its optimizer's settings by step."""
    train, outer = study.data(seed, setting.get("half") == "weights")
    options = study.training(setting, seed, steps)
    options["generator"] = torch.Generator().manual_seed(seed_of_order)
    training = make(
        options.pop("student"), train, outer, problem=None, clip_norm=None, **options, **more
    )
    return training, options["settings"]


def measured(name: str, steps: int, seed: int) -> Row:
    """Return every measurement of a training, and the processor time of each."""
    setting = setting_of(name)
    is_half = setting.get("half") == "autocast"
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        return measured_in_precision(setting, steps, seed)


def measured_in_precision(setting: Row, steps: int, seed: int) -> Row:
    """Return the measurements of a training in the precision that the caller has set."""
    seconds: Row = {}
    row: Row = {"seconds": seconds}
    few = library.count_of_first_steps(steps)
    parts = {"tenth": few, "half": steps // 2, "whole": steps}

    start = time.process_time()
    training, settings = training_of(
        Milestones, setting, steps, seed, seed, milestones=[*parts.values()]
    )
    _, losses = training.trained_along(library.PERTURBATION, None, steps, progress=False)
    seconds["three trainings"] = time.process_time() - start
    row["loss"] = float(losses[0])
    for part, count in parts.items():
        thetas = training.weights_after[count]
        agreement, _ = agreement_of_signs(*thetas)
        row[part] = {"agreement": agreement, "bend": library.bend_of(*thetas)}
    row["changes"] = training.changes
    row["curvature"] = library.curvature_of(training.changes, steps)

    order = training.order[:few]
    start = time.process_time()
    scores = library.scores_of_first_steps(training, order, settings)
    seconds["first scores"] = time.process_time() - start
    start = time.process_time()
    precise = library.scores_of_first_steps(
        training, order, settings, library.other_precision(training)
    )
    seconds["first scores in another precision"] = time.process_time() - start
    start = time.process_time()
    other, _ = training_of(library.WeightedTraining, setting, steps, seed, seed + 500)
    reordered = library.scores_of_first_steps(training, other.order[:few], settings)
    seconds["first scores in another order"] = time.process_time() - start
    is_drawn = library.drawn_in(order, study.EXAMPLES)
    is_drawn_twice = is_drawn & library.drawn_in(other.order[:few], study.EXAMPLES)
    row["precisions"] = library.rank_agreement(scores, precise, is_drawn)
    row["orders"] = library.rank_agreement(scores, reordered, is_drawn_twice)
    return row


def retrained(name: str, steps: int, seed: int) -> Row:
    """Return the rank correlation between predicted and real changes, at 1 % removed."""
    setting = setting_of(name)
    train, outer = study.data(seed)
    order = study.order_of(study.EXAMPLES, steps, study.BATCH, seed)
    sets, weights = study.removed(study.EXAMPLES, (SHARE,), study.REMOVALS, seed)
    losses = study.retrained(setting, seed, order, train, outer, weights)
    scores = study.by_attribute(setting, seed, order, train, outer)
    predicted = [float(scores[chosen].sum()) for chosen in sets]
    changes = (losses[1:] - losses[0]).tolist()
    return {"correlation": float(spearmanr(predicted, changes)[0])}


def run(name: str, steps: int, seed: int, kind: str) -> Row:
    """Return the row of a training: its measurements, and but for calibration its correlation."""
    row = measured(name, steps, seed)
    if kind != "calibration":
        row |= retrained(name, steps, seed)
    return row


def jobs(miniature: bool) -> Iterator[Row]:
    """Yield the setting, steps, seed and kind of each row."""
    if miniature:
        yield {"name": "width 64", "steps": 20, "seed": 100, "kind": "calibration"}
        return
    for name, steps in CALIBRATION:
        seed = SEED_OF_STEPS.get(steps, study.TUNING_SEEDS[0])
        if name == "convolutional":
            seed = study.SEEDS[0]
        yield {"name": name, "steps": steps, "seed": seed, "kind": "calibration"}
    for name, steps in UNSEEN_STEPS.items():
        yield {"name": name, "steps": steps, "seed": UNSEEN_SEED, "kind": "unseen"}
    for seed in RECIPE_SEEDS:
        yield {"name": RECIPE, "steps": study.SMOOTH_STEPS, "seed": seed, "kind": "recipe"}


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument("--kind", help="take only the rows of this kind", default="")
    args = parsed(parser)
    torch.set_num_threads(1)
    if args.runs:
        chosen = (job for job in jobs(args.miniature) if args.kind in ("", job["kind"]))
        go_on(args.out, chosen, run)


if __name__ == "__main__":
    main()
