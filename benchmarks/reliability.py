"""What does a measurement before the attribution say about how well it will predict retraining?

    python benchmarks/reliability.py             # goes on where it was stopped
    python benchmarks/reliability.py --write benchmarks/results/reliability.md
    python benchmarks/reliability.py --calibrate metapl/attribution/calibration.py

The rows of ``benchmarks/ordinary.py`` are read from ordinary.jsonl, beside the file of ``--out``.

``benchmarks/attribution.py`` has measured, for 31 trainings, the rank correlation between predicted
and real changes of the loss when 1 % of the examples are removed. Here several measurements are
taken of the same trainings, on one seed each, and each of them, or two together, predicts Fisher's
z of the correlation by a ridge regression. A training is always predicted by a line that was fitted
without it. `metapl.reliability` reads the best of them, the bend of the first half, and the number
of steps.

Its first two lines read the bend alone. The trainings of ``UNSEEN`` took no part in the first line.
They were named, and committed, before any of them was run and before the line had coefficients. The
second line was fitted to them too, and those of ``SECOND``, named before they were run and after
that, tested it. The line of today is fitted to all of these and to the 24 trainings of
``benchmarks/ordinary.py``; what tests it is named there.

The rows of attribution.jsonl are older than these: the data and the weights at the start are the
same, and the order of the batches is another. They are of 25 removals each, and of 12 where the
training has 300 steps.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import attribution as study
import numpy as np
import torch
from harness import RESULTS, Row, arguments, go_on, grid, parsed, read, show
from scipy.stats import spearmanr
from torch import Tensor

import metapl
from metapl.attribution.attribute import agreement_of_signs
from metapl.attribution.calibration import Calibration
from metapl.attribution.reliability import (
    PERTURBATION,
    Reliability,
    bend_of,
    predicted,
    upper_end,
)
from metapl.attribution.removals import rank_correlations
from metapl.attribution.weighted import WeightedTraining, copied_without_graphs
from metapl.engines.eager import EagerEngine
from metapl.execution.batch import map_tensors
from metapl.execution.numerics import HALF, deterministic, wide
from metapl.execution.state import RandomState, replayed, trainable, with_contents_of
from metapl.feedback import Forward
from metapl.updates import Settings, Update

RAW = RESULTS / "reliability.jsonl"
SHARE = 0.01
# At how many steps the gradient is taken before and after the step.
PROBES = 20
# The most steps of the first tenth, as for the warning of attribute.
FIRST_STEPS = 50
# Correlations of 25 numbers near 1 say little about Fisher's z, and those of 12 less.
HIGHEST = 0.98
RIDGE = 1.0
COVERAGE = 0.9
# Of the first two lines, and of the line of today before its interval was tested anew.
FIRST_COVERAGE = 0.8

# The cheapest trainings come first.
CALIBRATION: tuple[tuple[str, int, int], ...] = (
    *((name, 500, 100) for name in study.METASMOOTH),
    ("a rate that falls to zero", 100, 0),
    *((name, study.SMOOTH_STEPS, 100) for name in study.SMOOTH_NAMED),
    ("a rate that falls to zero", 2000, 0),
    ("convolutional", 500, 0),
)
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
# Three of these six fell into their intervals. The line was then fitted to them too, and six more
# trainings were named for it.
SECOND: dict[str, Row] = {
    "width 24, rate 0.15": {**study.BASE, "width": 24, "lr": 0.15},
    "ReLU, width 64, rate 0.1 that falls": {
        **study.BASE,
        "act": "ReLU",
        "width": 64,
        "lr": 0.1,
        "falls": True,
    },
    "Tanh, width 48, AdamW at 0.002, ε = 1e-8": {
        **study.BASE,
        "act": "Tanh",
        "width": 48,
        "rule": "adam",
        "lr": 0.002,
        "eps": 1e-8,
    },
    "SiLU, width 64, rate 0.5 without momentum": {
        **study.BASE,
        "act": "SiLU",
        "width": 64,
        "lr": 0.5,
        "momentum": 0.0,
    },
    "convolutional, width 6, batch norm, rate 0.05 that falls": {
        **study.CONVOLUTIONAL,
        "width": 6,
        "norm": "batch",
        "lr": 0.05,
    },
    "convolutional, width 8, Tanh, rate 0.2 that falls": {
        **study.CONVOLUTIONAL,
        "width": 8,
        "act": "Tanh",
    },
}
SECOND_STEPS = dict(zip(SECOND, (300, 400, 300, 400, 200, 250), strict=True))
SECOND_SEED = 400
# What made a convolutional network predictable on the seeds 100 to 102, on seeds that are fresh.
RECIPE = "convolutional: batch norm, rate 0.03, small outputs"
RECIPE_SEEDS = (200, 201)


# ------------------------------------------------------------------------------- measurements


class ProbedTraining(WeightedTraining):
    """A training that measures at some of its steps how much a step changes its own gradient.

    Attributes:
        changes: ‖∇ℓ_k(θ_{k+1}) − ∇ℓ_k(θ_k)‖ / ‖∇ℓ_k(θ_k)‖ of each probed step so far, where ℓ_k is
            the mean loss of the batch of step k, with the same dropout masks.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.changes = list[float]()
        self._step = 0
        self._probed = probed_steps(len(self.order))

    def _take_step(
        self, student: EagerEngine, rule: Update, weights: Tensor, numbers: Tensor
    ) -> None:
        is_probed = self._step in self._probed
        self._step += 1
        if not is_probed:
            super()._take_step(student, rule, weights, numbers)
            return
        start = RandomState.now(self.start.device)
        gradient = self._gradient(student, weights, numbers, start)
        super()._take_step(student, rule, weights, numbers)
        gradient_after = self._gradient(student, weights, numbers, start)
        size = float(gradient.norm())
        change = float((gradient_after - gradient).norm())
        self.changes.append(change / size if size else 0.0)

    def _gradient(
        self, student: EagerEngine, weights: Tensor, numbers: Tensor, start: RandomState
    ) -> Tensor:
        """Return the gradient of the batch's mean loss as a vector, and leave no trace."""
        state = student.slots.snapshot()
        with replayed(start):
            gradient = self.gradient(student, weights, numbers)
        state.restore()
        parts = [gradient.get(name, torch.zeros_like(p)) for name, p in student.params.items()]
        return torch.cat([wide(part).flatten().double() for part in parts])


def probed_steps(steps: int) -> set[int]:
    """Return the numbers of at most :data:`PROBES` steps, evenly spread, the last one among them.

    >>> sorted(probed_steps(5)), len(probed_steps(500)), max(probed_steps(500))
    ([0, 1, 2, 3, 4], 20, 499)
    """
    count = min(steps, PROBES)
    return {(number + 1) * steps // count - 1 for number in range(count)}


class Milestones(ProbedTraining):
    """A probed training that keeps the weights after some of its steps, as vectors.

    Attributes:
        weights_after: by the number of steps, those of every training since the beginning.
    """

    def __init__(self, *arguments: Any, milestones: Sequence[int], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.weights_after: dict[int, list[Tensor]] = {steps: [] for steps in milestones}
        self._taken = 0

    def _take_step(self, student: EagerEngine, *rest: Any) -> None:
        super()._take_step(student, *rest)
        steps = self._taken % len(self.order) + 1
        self._taken += 1
        if steps in self.weights_after:
            weights = [p.detach().flatten() for p in student.parameters.values()]
            self.weights_after[steps].append(torch.cat(weights))


def curvature_of(changes: Sequence[float], steps: int) -> float:
    """Return how much the steps of a training change their own gradients, in all.

    It is K times the mean of ‖∇ℓ_k(θ_{k+1}) − ∇ℓ_k(θ_k)‖ / ‖∇ℓ_k(θ_k)‖ over the steps that were
    probed. Of plain gradient descent at the rate η, on a loss with the Hessian H, it is near the
    sum of η ‖H g‖ / ‖g‖ over the steps: rate times curvature, times the length of the training.
    """
    return steps * sum(changes) / len(changes)


def count_of_first_steps(steps: int) -> int:
    """Return how many steps the first tenth has: 50 at most, one at least."""
    return max(1, min(steps // 10, FIRST_STEPS))


def scores_of_first_steps(
    training: WeightedTraining,
    order: Tensor,
    settings: Settings | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return what each example does to the outer loss after the first steps alone, (N,).

    Args:
        order: the examples of these steps, (k, B).
        settings: of the optimizer in each step of the whole training.
        dtype: the type of weights and data, without autocast; None: as they are.

    Cost: the attribution of these steps.
    """
    network, optimizer = copied_without_graphs(*training.begun)
    if dtype is not None:
        network.to(dtype)
        # This casts what the optimizer holds.
        optimizer.load_state_dict(optimizer.state_dict())

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if dtype is not None and t.is_floating_point() else t

    first_settings = None
    if settings is not None:
        first_settings = {name: first_rows(values, len(order)) for name, values in settings.items()}
    device_type = training.start.device.type
    autocast: AbstractContextManager[object] = nullcontext()
    if dtype is not None:
        autocast = torch.autocast(device_type, enabled=False)
    with (
        with_contents_of(network, training.layout.network),
        replayed(training.start),
        autocast,
        deterministic(training.start.device),
    ):
        result = metapl.hypergradient(
            None,
            network,
            outer=map_tensors(cast, training.outer_batch),
            inner=metapl.Lookahead(
                lambda number: map_tensors(cast, training.batch(order[number])),
                steps=len(order),
                settings=first_settings,
            ),
            mode=Forward(),
            problem=training.problem,
            inner_optimizer=optimizer,
            clip_norm=training.clip_norm,
            # It is the reference.
            verify=False,
        )
    scores = torch.zeros(len(training.data), dtype=torch.float64)
    for numbers, feedback in zip(order, result.feedback, strict=True):
        by_example = feedback.detach().double().cpu().reshape(len(numbers), -1).sum(1)
        scores.index_add_(0, numbers.cpu(), by_example)
    return scores


def first_rows(values: Tensor | Sequence[Tensor], steps: int) -> Tensor | list[Tensor]:
    """Return the settings of the first steps, of one tensor or of a tensor for each group."""
    if isinstance(values, Tensor):
        return values[:steps]
    return [value[:steps] for value in values]


def other_precision(training: WeightedTraining) -> torch.dtype:
    """Return the precision that scores are compared in.

    It is the next wider one: float32 of a student in half precision or under autocast, and float64
    of one in float32. Of one in float64 it is float32.
    """
    dtype = next(iter(trainable(training.layout.network).values())).dtype
    if dtype in HALF or training.is_in_autocast or dtype == torch.float64:
        return torch.float32
    return torch.float64


def rank_agreement(first: Tensor, second: Tensor, drawn: Tensor) -> float:
    """Return Spearman's correlation between two lists of scores, over the examples ``drawn``.

    NaN where fewer than three were drawn, or where all scores of a list are equal.
    """
    if int(drawn.sum()) < 3:
        return math.nan
    rows = (first[drawn][None].numpy(), second[drawn][None].numpy())
    return float(rank_correlations(*rows)[0])


def drawn_in(order: Tensor, examples: int) -> Tensor:
    """Return which examples some step has drawn, as booleans."""
    is_drawn = torch.zeros(examples, dtype=torch.bool)
    is_drawn[order.cpu().flatten()] = True
    return is_drawn


def setting_of(name: str) -> Row:
    """Return the options of a training by its name."""
    return {**study.SETTINGS, **study.SMOOTH_NAMED, **UNSEEN, **SECOND}[name]


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


def in_float32(setting: Row) -> Row:
    """Return a setting without weights in bfloat16, as `metapl.reliability` asks for."""
    if setting.get("half") == "weights":
        return {name: value for name, value in setting.items() if name != "half"}
    return setting


def measured(setting: Row, steps: int, seed: int) -> Row:
    """Return every measurement of a training, and the processor time of each."""
    is_half = setting.get("half") == "autocast"
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        return measured_in_precision(setting, steps, seed)


def measured_in_precision(setting: Row, steps: int, seed: int) -> Row:
    """Return the measurements of a training in the precision that the caller has set."""
    seconds: Row = {}
    row: Row = {"seconds": seconds}
    few = count_of_first_steps(steps)
    parts = {"tenth": few, "half": steps // 2, "whole": steps}

    start = time.process_time()
    training, settings = training_of(
        Milestones, setting, steps, seed, seed, milestones=[*parts.values()]
    )
    _, losses = training.trained_along(PERTURBATION, None, steps, progress=False)
    seconds["three trainings"] = time.process_time() - start
    row["loss"] = float(losses[0])
    for part, count in parts.items():
        thetas = training.weights_after[count]
        agreement, _ = agreement_of_signs(*thetas)
        row[part] = {"agreement": agreement, "bend": bend_of(*thetas)}
    row["changes"] = training.changes
    row["curvature"] = curvature_of(training.changes, steps)

    order = training.order[:few]
    start = time.process_time()
    scores = scores_of_first_steps(training, order, settings)
    seconds["first scores"] = time.process_time() - start
    start = time.process_time()
    precise = scores_of_first_steps(training, order, settings, other_precision(training))
    seconds["first scores in another precision"] = time.process_time() - start
    start = time.process_time()
    other, _ = training_of(WeightedTraining, setting, steps, seed, seed + 500)
    reordered = scores_of_first_steps(training, other.order[:few], settings)
    seconds["first scores in another order"] = time.process_time() - start
    is_drawn = drawn_in(order, study.EXAMPLES)
    is_drawn_twice = is_drawn & drawn_in(other.order[:few], study.EXAMPLES)
    row["precisions"] = rank_agreement(scores, precise, is_drawn)
    row["orders"] = rank_agreement(scores, reordered, is_drawn_twice)
    return row


def retrained(setting: Row, steps: int, seed: int) -> float:
    """Return the rank correlation between predicted and real changes, at 1 % removed."""
    train, outer = study.data(seed)
    order = study.order_of(study.EXAMPLES, steps, study.BATCH, seed)
    sets, weights = study.removed(study.EXAMPLES, (SHARE,), study.REMOVALS, seed)
    losses = study.retrained(setting, seed, order, train, outer, weights)
    scores = study.by_attribute(setting, seed, order, train, outer)
    predicted_changes = [float(scores[chosen].sum()) for chosen in sets]
    changes = (losses[1:] - losses[0]).tolist()
    return float(spearmanr(predicted_changes, changes)[0])


def run(name: str, steps: int, seed: int, kind: str) -> Row:
    """Return the row of a training.

    It has the correlation with retraining too, unless attribution.jsonl has it.
    """
    if kind == "rounding":
        return measured(setting_of(name), steps, seed)
    setting = in_float32(setting_of(name))
    row = measured(setting, steps, seed)
    if (name, steps) not in known_correlations():
        row["correlation"] = retrained(setting, steps, seed)
    elif kind != "calibration":
        row["correlation"] = retrained(setting, steps, seed)
    return row


def jobs(*, is_miniature: bool) -> Iterator[Row]:
    """Yield the setting, steps, seed and kind of each row.

    A row of rounding is of weights in bfloat16 as they are, which `metapl.reliability` refuses.
    """
    if is_miniature:
        names = ("width 64", "ten times the rate", "ReLU", "Adam, ε = 1e-8")
        for steps, name in enumerate(names, start=10):
            yield {"name": name, "steps": steps, "seed": 100, "kind": "calibration"}
        yield {"name": [*UNSEEN][0], "steps": 12, "seed": UNSEEN_SEED, "kind": "unseen"}
        yield {"name": [*SECOND][0], "steps": 12, "seed": SECOND_SEED, "kind": "second"}
        return
    for name, steps, seed in CALIBRATION:
        yield {"name": name, "steps": steps, "seed": seed, "kind": "calibration"}
    yield {"name": "bfloat16 weights", "steps": 500, "seed": 100, "kind": "rounding"}
    for name, steps in UNSEEN_STEPS.items():
        yield {"name": name, "steps": steps, "seed": UNSEEN_SEED, "kind": "unseen"}
    for name, steps in SECOND_STEPS.items():
        yield {"name": name, "steps": steps, "seed": SECOND_SEED, "kind": "second"}
    for seed in RECIPE_SEEDS:
        yield {"name": RECIPE, "steps": study.SMOOTH_STEPS, "seed": seed, "kind": "recipe"}


# --------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Feature:
    """A number that a regression may read.

    Args:
        read: takes it from a row.
        costs: the parts of the row's seconds that it needs, with a factor for each.
    """

    read: Callable[[Row], float]
    costs: dict[str, float]


def logarithm_of_bend(part: str) -> Callable[[Row], float]:
    """Return a function that reads log10 of the bend of a part of the training."""
    return lambda row: math.log10(row[part]["bend"])


def logarithm_of_roughness(part: str) -> Callable[[Row], float]:
    """Return a function that reads log10 of 1 − Ŝ of a part of the training."""
    return lambda row: math.log10(1 - row[part]["agreement"] + 1e-5)


THREE = "three trainings"
HALF_BEND = "bend of the first half"
LENGTH = "number of steps"
# What `metapl.reliability` reads, and what its first two lines read.
OF_LINE = (HALF_BEND, LENGTH)
OF_FIRST_LINES = (HALF_BEND,)
FEATURES: dict[str, Feature] = {
    HALF_BEND: Feature(logarithm_of_bend("half"), {THREE: 0.5}),
    LENGTH: Feature(lambda row: math.log10(row["steps"]), {}),
    "bend of the first tenth": Feature(logarithm_of_bend("tenth"), {THREE: 0.1}),
    "bend of the whole": Feature(logarithm_of_bend("whole"), {THREE: 1.0}),
    "metasmoothness of the first tenth": Feature(logarithm_of_roughness("tenth"), {THREE: 0.1}),
    "metasmoothness of the whole": Feature(logarithm_of_roughness("whole"), {THREE: 1.0}),
    "curvature along the path": Feature(lambda row: math.log10(row["curvature"]), {THREE: 1 / 3}),
    "two precisions, first tenth": Feature(
        lambda row: math.log10(1 - row["precisions"] + 1e-6),
        {"first scores": 1.0, "first scores in another precision": 1.0},
    ),
    "two orders, first tenth": Feature(
        lambda row: math.atanh(min(row["orders"], 0.999)),
        {"first scores": 1.0, "first scores in another order": 1.0},
    ),
}


@cache
def known_correlations() -> dict[tuple[str, int], list[float]]:
    """Return the rank correlations of attribute at 1 % removed, by setting and steps."""
    correlations: dict[tuple[str, int], list[float]] = {}
    for row in read(study.RAW, "scores"):
        spearman, _ = row["scores"]["attribute"][f"{SHARE:g}"]
        correlations.setdefault((row["setting"], row["steps"]), []).append(spearman)
    return correlations


def correlations_of(row: Row) -> list[float]:
    """Return the rank correlations that belong to a row, one for each seed that has one."""
    if "correlation" in row:
        return [row["correlation"]]
    return known_correlations()[row["name"], row["steps"]]


def fisher(correlation: float) -> float:
    """Return Fisher's z of a correlation, which is counted as 0.98 above that."""
    return math.atanh(max(-HIGHEST, min(correlation, HIGHEST)))


def target_of(row: Row) -> float:
    """Return the mean of Fisher's z over the seeds."""
    return statistics.fmean(fisher(correlation) for correlation in correlations_of(row))


@dataclass(frozen=True)
class Line:
    """A linear function of features: the intercept, and a slope for each."""

    intercept: float
    slopes: np.ndarray

    def at(self, features: np.ndarray) -> np.ndarray:
        """Return its values at the rows of a matrix, (S, F)."""
        values: np.ndarray = self.intercept + features @ self.slopes
        return values


def ridge(features: np.ndarray, targets: np.ndarray) -> Line:
    """Return the ridge regression on standardized features; the intercept is not shrunk.

    A feature that is the same everywhere has the slope 0.
    """
    means = features.mean(0)
    spreads = features.std(0)
    scales = np.where(spreads > 0, spreads, 1.0)
    standardized = (features - means) / scales
    mean = targets.mean()
    products = standardized.T @ standardized + RIDGE * np.eye(features.shape[1])
    slopes = np.linalg.solve(products, standardized.T @ (targets - mean)) / scales
    return Line(float(mean - means @ slopes), slopes)


def matrices(rows: Sequence[Row], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of rows, (S, F), and Fisher's z of their correlations, (S,)."""
    features = np.array([[FEATURES[name].read(row) for name in names] for row in rows])
    return features, np.array([target_of(row) for row in rows])


def predicted_without_each(rows: Sequence[Row], names: Sequence[str]) -> np.ndarray:
    """Return z of each training by the line that is fitted to all others, (S,)."""
    features, targets = matrices(rows, names)
    predictions = np.empty(len(rows))
    for number in range(len(rows)):
        others = np.arange(len(rows)) != number
        line = ridge(features[others], targets[others])
        predictions[number] = line.at(features[number : number + 1])[0]
    return predictions


def half_width(rows: Sequence[Row], predictions: np.ndarray, coverage: float = COVERAGE) -> float:
    """Return how far z of a single seed is from its prediction, for 90 % of the trainings.

    Each training counts once, whatever its number of seeds, and one more counts as infinitely far,
    as for conformal intervals.
    """
    distances = list[tuple[float, float]]()
    for row, prediction in zip(rows, predictions, strict=True):
        correlations = correlations_of(row)
        for correlation in correlations:
            distance = abs(fisher(correlation) - float(prediction))
            distances.append((distance, 1 / len(correlations)))
    covered = 0.0
    for distance, weight in sorted(distances):
        covered += weight
        if covered >= coverage * (len(rows) + 1) - 1e-9:
            return distance
    return math.inf


def calibrated(
    rows: Sequence[Row], names: Sequence[str] = OF_LINE, coverage: float = COVERAGE
) -> Calibration:
    """Return the coefficients of `metapl.reliability` from the rows of calibration.

    Args:
        names: :data:`OF_LINE`, or :data:`OF_FIRST_LINES`, which has no slope of the steps.
        coverage: nominally, of the interval.
    """
    features, targets = matrices(rows, names)
    line = ridge(features, targets)
    slopes = dict(zip(names, line.slopes.tolist(), strict=True))
    bends = [row["half"]["bend"] for row in rows]
    steps = [row["steps"] for row in rows]
    return Calibration(
        intercept=round(line.intercept, 4),
        slope=round(slopes[HALF_BEND], 4),
        slope_of_steps=round(slopes.get(LENGTH, 0.0), 4),
        least=float(f"{min(bends):.4g}"),
        most=float(f"{max(bends):.4g}"),
        least_steps=min(steps),
        most_steps=max(steps),
        half_width=round(half_width(rows, predicted_without_each(rows, names), coverage), 4),
        highest=HIGHEST,
        trainings=len(rows),
    )


def write_calibration(page: Path, calibration: Calibration) -> None:
    """Put the coefficients into the file that the library reads."""
    head, mark, _ = page.read_text().partition("CALIBRATION = Calibration(\n")
    lines = [f"    {name}={value!r},\n" for name, value in calibration._asdict().items()]
    page.write_text(head + mark + "".join(lines) + ")\n")


# -------------------------------------------------------------------------------------- tables


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    """Return the rows of a kind."""
    return [row for row in rows if row.get("kind") == kind]


def rows_of_second_line(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that the second line was fitted to."""
    return [*of_kind(rows, "calibration"), *of_kind(rows, "unseen")]


def rows_of_line(rows: Sequence[Row], ordinary_rows: Sequence[Row]) -> list[Row]:
    """Return the rows that the line of `metapl.reliability` is fitted to."""
    return [*rows_of_second_line(rows), *of_kind(rows, "second"), *ordinary_rows]


def read_ordinary(file: Path) -> list[Row]:
    """Return the rows of ``benchmarks/ordinary.py`` in the form of this script's own.

    Those of a kind are left out: they test the line.
    """
    rows = list[Row]()
    for row in read(file, "correlation"):
        if "kind" not in row:
            half = {"bend": row["bend"]}
            columns = {name: row[name] for name in ("name", "steps", "correlation")}
            rows.append({**columns, "kind": "ordinary", "half": half})
    return rows


def expectation(estimate: Reliability) -> str:
    """Return an expected correlation with its interval, as a table has it."""
    return f"{estimate.correlation:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def table_of_trainings(rows: Sequence[Row]) -> str:
    """Return the trainings of the calibration, each as it is expected without it."""
    predictions = predicted_without_each(rows, OF_LINE)
    width = half_width(rows, predictions)
    lines = list[list[str]]()
    for row, z in sorted(zip(rows, predictions, strict=True), key=bend_of_pair):
        correlations = correlations_of(row)
        high = upper_end(z + width, HIGHEST)
        ends = f"{math.tanh(z - width):.2f} to {high:.2f}"
        cells = [f"{row['half']['bend']:.3f}", f"{math.tanh(z):.2f} ({ends})"]
        measured_mean = f"{statistics.fmean(correlations):.2f}"
        lines.append(
            [row["name"], f"{row['steps']:,}", *cells, measured_mean, str(len(correlations))]
        )
    return grid(["training", "steps", "bend", "expected", "measured", "seeds"], lines)


def bend_of_pair(pair: tuple[Row, Any]) -> float:
    """Return the bend of the row of a pair."""
    row, _ = pair
    return float(row["half"]["bend"])


def table_of_tests(rows: Sequence[Row]) -> str:
    """Return what the first two lines expected of trainings that took no part, and what came out.

    The first six are expected by the first line, which was fitted without them, the second six and
    the recipe by the second line. Both read the bend alone.
    """
    first_line = calibrated(of_kind(rows, "calibration"), OF_FIRST_LINES, FIRST_COVERAGE)
    line = calibrated(rows_of_second_line(rows), OF_FIRST_LINES, FIRST_COVERAGE)
    lines = list[list[str]]()
    for kind, calibration in (("unseen", first_line), ("second", line), ("recipe", line)):
        for row in of_kind(rows, kind):
            estimate = expected_of(row, calibration)
            cells = [f"{row['half']['bend']:.3f}", expectation(estimate)]
            is_inside = "yes" if holds(estimate, row) else "no"
            cells += [f"{row['correlation']:.2f}", is_inside]
            title = f"{TITLES[kind]}: {row['name'].removeprefix('convolutional: ')}"
            lines.append([title, f"{row['steps']:,}", *cells])
    table = grid(["training", "steps", "bend", "expected", "measured", "inside"], lines)
    first = of_kind(rows, "unseen")
    second = of_kind(rows, "second")
    inside = sum(holds(expected_of(row, first_line), row) for row in first)
    without_end = first_line._replace(highest=1.0)
    as_printed = sum(holds(expected_of(row, without_end), row) for row in first)
    inside_of_second = sum(holds(expected_of(row, line), row) for row in second)
    return (
        f"{table}\n\nOf the first {len(first)}, {inside} are inside; {as_printed} are as it was "
        f"printed then, when no interval ended at 1. Of the second {len(second)}, "
        f"{inside_of_second} are inside."
    )


TITLES = {"unseen": "first", "second": "second", "recipe": "recipe"}


def expected_of(row: Row, calibration: Calibration) -> Reliability:
    """Return what a calibration expects of the training of a row."""
    half = row["half"]
    return predicted(half["bend"], half["agreement"], row["steps"], calibration)


def holds(estimate: Reliability, row: Row) -> bool:
    """Return whether the measured correlation is in the interval."""
    return bool(estimate.low <= row["correlation"] <= estimate.high)


def cost_of(feature: Feature, rows: Sequence[Row]) -> float:
    """Return what a measurement takes, in plain trainings; the median over the rows."""
    ratios = list[float]()
    for row in rows:
        seconds = sum(factor * row["seconds"][part] for part, factor in feature.costs.items())
        ratios.append(seconds / (row["seconds"][THREE] / 3))
    return statistics.median(ratios)


def error_of(rows: Sequence[Row], names: Sequence[str]) -> float:
    """Return the root of the mean squared error of z, of lines without each training."""
    _, targets = matrices(rows, names)
    return root_mean_square(predicted_without_each(rows, names) - targets)


def table_of_measurements(rows: Sequence[Row]) -> str:
    """Return what each measurement says of the correlation, alone and beside the bend."""
    lines = list[list[str]]()
    _, targets = matrices(rows, [HALF_BEND])
    for name, feature in FEATURES.items():
        values = [feature.read(row) for row in rows]
        beside = "" if name == HALF_BEND else f"{error_of(rows, [HALF_BEND, name]):.2f}"
        cells = [f"{float(spearmanr(values, targets)[0]):.2f}", f"{error_of(rows, [name]):.2f}"]
        lines.append([name, *cells, beside, f"{cost_of(feature, rows):.1f}"])
    head = ["measurement", "rank correlation", "error", "error with the bend", "trainings"]
    without = f"Without any measurement the error is {spread_of(rows):.2f}."
    return f"{grid(head, lines)}\n\n{without}"


def spread_of(rows: Sequence[Row]) -> float:
    """Return the error of z of a guess that measures nothing: the mean of all other trainings."""
    targets = [target_of(row) for row in rows]
    return float(np.std(targets)) * len(rows) / (len(rows) - 1)


def table_of_errors(fitted: Sequence[Row]) -> str:
    """Return the error of z of the line and of the bend alone, over all trainings and by bench.

    Each training is predicted by a line that is fitted to all others, whichever bench they are of.
    """
    _, targets = matrices(fitted, OF_LINE)
    is_ordinary = np.array([row["kind"] == "ordinary" for row in fitted])
    is_any = np.full(len(fitted), fill_value=True)
    groups = {"all": is_any, "this bench": ~is_ordinary, "ordinary": is_ordinary}
    # A miniature has no ordinary ones.
    groups = {name: group for name, group in groups.items() if group.any()}
    columns = list[list[str]]()
    for names in (OF_LINE, OF_FIRST_LINES):
        misses = predicted_without_each(fitted, names) - targets
        columns.append([f"{root_mean_square(misses[group]):.2f}" for group in groups.values()])
    counts = [f"{int(group.sum())}" for group in groups.values()]
    head = ["trainings", "number", "bend and steps", "bend alone"]
    return grid(head, zip(groups, counts, *columns, strict=True))


def root_mean_square(values: np.ndarray) -> float:
    """Return the root of the mean square."""
    return float(np.sqrt(np.mean(values**2)))


def tables(rows: Sequence[Row], ordinary_rows: Sequence[Row]) -> dict[str, str]:
    """Return the tables by their marks in the page."""
    fitted = rows_of_line(rows, ordinary_rows)
    # Only the trainings of this bench have all measurements.
    measured_rows = [*rows_of_second_line(rows), *of_kind(rows, "second")]
    return {
        "reliability": table_of_trainings(fitted),
        "reliability-errors": table_of_errors(fitted),
        "reliability-tests": table_of_tests(rows),
        "reliability-measurements": table_of_measurements(measured_rows),
    }


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument("--kind", default="", help="run only the rows of this kind")
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="write the coefficients there; runs nothing"
    )
    args = parsed(parser)
    torch.set_num_threads(1)
    ordinary_rows = read_ordinary(args.out.with_name("ordinary.jsonl"))
    if args.calibrate:
        if not ordinary_rows:
            parser.error(f"no rows in {args.out.with_name('ordinary.jsonl')}; the line needs them")
        fitted = rows_of_line(read(args.out), ordinary_rows)
        write_calibration(args.calibrate, calibrated(fitted))
        return
    if args.runs:
        asked = jobs(is_miniature=args.miniature)
        go_on(args.out, (job for job in asked if args.kind in ("", job["kind"])), run)
    for mark, table in tables(read(args.out), ordinary_rows).items():
        show(args.write, mark, table)


if __name__ == "__main__":
    main()
