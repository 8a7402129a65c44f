"""Hyperparameters by the derivative through whole trainings, beside searches of equal cost.

    python benchmarks/hyperparameters.py          # tunes both on other seeds first
    python benchmarks/hyperparameters.py --write benchmarks/results/hyperparameters.md

The trainings are those of examples/learned_hyperparameters.py, six of them, and of
examples/learned_schedule.py: learning rate and weight decay at three times in three layers. From
their starts, 8 rounds of Adam on the logarithms. Random search draws them uniformly around the same
start, and trains by a plain loop of PyTorch for as much processor time, on one thread. Bayesian
search has as many trainings as random search, ten of them as drawn; what its Gaussian process takes
is not counted. A (1+1) evolution strategy has as many too, the first at the start: normal
logarithms around the best ones, whose width grows by a half after a better training and falls by a
tenth after another one. Each training begins at the same weights, with the same batches and draws;
of all trainings of an arm, the one with the lowest validation loss counts. Adam's rate and the
width of the draws, 4 values each, are chosen by this loss on the tuning seeds; for the evolution
strategy, which came later, in the same way. Test digits are read in the final runs alone. Beside
these arms stands one training with the six at their start, which learns the validation digits too.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from harness import (
    NONE,
    RESULTS,
    Row,
    arguments,
    best,
    environment,
    go_on,
    grid,
    interval,
    parsed,
    read,
    show,
)
from torch.nn import functional as F

import metapl
from metapl.errors import MetaplError
from metapl.pictures import load_digits_split

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import learned_hyperparameters
import learned_schedule
from learned_hyperparameters import Hyperparameters

RAW = RESULTS / "hyperparameters.jsonl"
STUDIES: dict[str, Any] = {"hyperparameters": learned_hyperparameters, "schedule": learned_schedule}
TUNING_SEEDS = {"hyperparameters": (100, 101), "schedule": (100,)}
SEEDS = {"hyperparameters": range(10, 18), "schedule": range(10, 15)}
ROUNDS = 8
BAYESIAN = "Bayesian search"
EVOLUTION = "evolution strategy"
SETTINGS = {
    "metagradients": (0.1, 0.3, 1.0, 3.0),
    "random search": (0.5, 1.0, 2.0, 4.0),
    BAYESIAN: (0.5, 1.0, 2.0, 4.0),
    EVOLUTION: (0.1, 0.3, 0.6, 1.0),
}
# In the schedule random search is ahead already.
ARMS = {"hyperparameters": tuple(SETTINGS), "schedule": ("metagradients", "random search")}
UNTUNED = "the start of both"
# The validation digits are labels too.
ALL_LABELS = "the start, all labels"
Logs = dict[str, torch.Tensor]
# The validation loss, the logarithms, and the network.
Found = tuple[float, Logs, Any]


def around_start(study: str, width: float, generator: torch.Generator | None = None) -> Logs:
    """Return the logarithms, drawn uniformly this far around the start."""
    start = {name: torch.as_tensor(t) for name, t in STUDIES[study].START.items()}
    start = start if study == "schedule" else {name: t.log() for name, t in start.items()}
    return {
        name: t + width * (2 * torch.rand(t.shape, generator=generator) - 1)
        for name, t in start.items()
    }


def values(study: str, logs: Logs) -> Any:
    """Return what is learned, by name: in the signal, or of each step and layer."""
    if study == "schedule":
        return learned_schedule.settings(logs)
    return Hyperparameters().signal(cast("Any", logs), None, None, generator=None).value


def trained(study: str, split: Any, seed: int, logs: Logs, *, is_all: bool = False) -> Found:
    """Train without a derivative, by plain PyTorch, and return what is found.

    Args:
        is_all: whether the validation digits are learned too.
    """
    student, optimizer, batches = STUDIES[study].begin(split, seed)
    if is_all:
        x, y = (torch.cat(parts) for parts in zip(split.labeled, split.validation, strict=True))
        generator = torch.Generator().manual_seed(seed)
        size = len(batches), len(batches[0][1])
        batches = [(x[i], y[i]) for i in torch.randint(len(y), size, generator=generator)]
    problem = Hyperparameters()
    params = dict(student.named_parameters())
    settings_of_study = values(study, logs)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        if study == "schedule":
            for layer, group in enumerate(optimizer.param_groups):
                group.update({name: t[step, layer].item() for name, t in settings_of_study.items()})
            F.cross_entropy(student(batch[0]), batch[1]).backward()
        else:
            optimizer.param_groups[0]["lr"] = 0.1 * learned_hyperparameters.falling(step)
            signal = metapl.Signal(settings_of_study)
            outputs = student(problem.student_input(batch, signal))
            problem.inner_loss(outputs, signal, batch, params).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return (
            F.cross_entropy(student(split.validation[0]), split.validation[1]).item(),
            logs,
            student,
        )


@torch.no_grad()
def judged(student: torch.nn.Module, split: Any) -> tuple[float, float]:
    """Return loss and accuracy in % on digits that neither training nor validation has seen."""
    x = torch.cat([split.test[0], split.unlabeled])
    y = torch.cat([split.test[1], split.unlabeled_truth])
    return F.cross_entropy(student(x), y).item(), 100 * (
        student(x).argmax(1) == y
    ).double().mean().item()


def proposed(study: str, width: float, results: list[Found], generator: torch.Generator) -> Logs:
    """Return the draw of 1,000 with the highest expected improvement, by a Gaussian process.

    The first ten are as drawn.
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    if len(results) < 10:
        return around_start(study, width, generator)
    draws = [around_start(study, width, generator) for _ in range(1000)]
    losses = torch.tensor([loss if loss < 10 else 10.0 for loss, _, _ in results]).log()
    kernel = Matern(nu=2.5, length_scale=width) + WhiteKernel(1e-3)
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    process.fit(vectors([logs for _, logs, _ in results]), losses.numpy())
    mean, deviation = map(torch.tensor, process.predict(vectors(draws), return_std=True))
    gain = losses.min() - mean
    normal = torch.distributions.Normal(0.0, 1.0)
    z = gain / deviation
    improvement = gain * normal.cdf(z) + deviation * normal.log_prob(z).exp()
    return draws[int(improvement.argmax())]


def varied(study: str, width: float, results: list[Found], generator: torch.Generator) -> Logs:
    """Return the best logarithms so far with normal draws added, or the start where none is."""
    if not results:
        return around_start(study, 0.0)
    lowest, best_logs = math.inf, results[0][1]
    for number, (loss, logs, _) in enumerate(results):
        is_better = loss < lowest
        if is_better:
            lowest, best_logs = loss, logs
        if number:
            width *= 1.5 if is_better else 0.9
    return {
        name: t + width * torch.randn(t.shape, generator=generator) for name, t in best_logs.items()
    }


def vectors(settings: list[Logs]) -> Any:
    """Return settings as rows of an array."""
    return torch.stack([torch.cat([t.flatten() for t in logs.values()]) for logs in settings])


def row_of(
    study: str, arm: str, setting: float | None, seed: int, final: bool, raw: Path, rounds: int
) -> Row:
    split = load_digits_split(10, seed)
    since = time.process_time()
    descent, search, *_ = SETTINGS
    # A search goes on for as long as the descents of this seed took.
    if arm in (BAYESIAN, EVOLUTION):
        same = (
            r
            for r in of_study(read(raw), study)
            if (r["arm"], r["seed"], r["final"]) == (search, seed, final)
        )
        trainings = round(statistics.median(row["trainings"] for row in same))
        results = []
        generator = torch.Generator().manual_seed(seed)
        propose = proposed if arm == BAYESIAN else varied
        for _ in range(trainings):
            logs = propose(study, cast("float", setting), results, generator)
            results.append(trained(study, split, seed, logs))
    elif arm == search:
        same = (
            r
            for r in of_study(read(raw), study)
            if (r["arm"], r["seed"], r["final"]) == (descent, seed, final)
        )
        budget = statistics.median(row["seconds"] for row in same)
        results = []
        generator = torch.Generator().manual_seed(seed)
        while time.process_time() - since < budget:
            results.append(
                trained(study, split, seed, around_start(study, cast("float", setting), generator))
            )
    elif arm == descent:
        results = []
        # A round may diverge, and the ones before it count.
        with suppress(MetaplError):
            results.extend(STUDIES[study].learn(split, seed, rounds, setting))
    else:
        start = around_start(study, 0.0)
        results = [trained(study, split, seed, start, is_all=arm == ALL_LABELS)]
    row: Row = {"trainings": len(results), "seconds": time.process_time() - since}
    row["validation_loss"], logs, student = min(results, key=lambda result: result[0])
    learned = logs if study == "schedule" else values(study, logs)
    row["six" if study == "hyperparameters" else "logs"] = {
        name: [round(v, 6) for v in t.flatten().tolist()] for name, t in learned.items()
    }
    if final:
        row["test_loss"], row["accuracy"] = judged(student, split)
    return row | {"made_with": environment()}


def chosen(rows: list[Row], arm: str) -> float:
    """Return the setting with the lowest mean validation loss on the tuning seeds."""
    tuning = (row for row in rows if row["arm"] == arm and not row["final"])
    return float(best(tuning, "setting", lambda row: -row["validation_loss"]))


def of_study(rows: list[Row], study: str) -> list[Row]:
    return [row for row in rows if row["study"] == study]


def untuned(study: str) -> tuple[str, ...]:
    """Return the arms that have no setting."""
    return (UNTUNED, ALL_LABELS) if study == "hyperparameters" else (UNTUNED,)


def jobs(study: str, raw: Path, few: int | None) -> Iterator[Row]:
    """Yield the tuning, and the final runs with the settings that it chose."""
    for seed in TUNING_SEEDS[study][:few]:
        for arm in ARMS[study]:
            for setting in SETTINGS[arm][:few]:
                yield {"study": study, "arm": arm, "setting": setting, "seed": seed, "final": False}
    rows = of_study(read(raw), study)
    for seed in (0, 1) if few else SEEDS[study]:
        for arm in (*untuned(study), *ARMS[study]):
            setting = None if arm in untuned(study) else chosen(rows, arm)
            yield {"study": study, "arm": arm, "setting": setting, "seed": seed, "final": True}


def table(rows: list[Row]) -> str:
    """Return a table of the final runs of a study, and the differences to the first arm."""
    study = rows[0]["study"]
    arms = ARMS[study]
    names = {
        "validation_loss": "validation loss",
        "test_loss": "test loss",
        "accuracy": "test accuracy, %",
    }
    columns = {
        (arm, key): [
            r[key] for r in sorted(rows, key=lambda r: r["seed"]) if r["final"] and r["arm"] == arm
        ]
        for arm in (*untuned(study), *arms)
        for key in (*names, "trainings", "seconds")
    }
    lines = []
    for arm in (*untuned(study), *arms):
        shown = {
            "trainings": ".0f",
            "seconds": ".1f",
            **dict.fromkeys(names, ".3f"),
            "accuracy": ".1f",
        }
        cells = {key: f"{statistics.fmean(columns[arm, key]):{to}}" for key, to in shown.items()}
        if arm == ALL_LABELS:
            # It has learned them.
            cells["validation_loss"] = NONE
        lines.append([arm, *(cells[key] for key in shown)])
    for other in (*arms[1:], *untuned(study)):
        cells = []
        for key in names:
            pair = columns["metagradients", key], columns[other, key]
            cells.append(interval(*pair, form="+.1f" if key == "accuracy" else "+.3f"))
        if other == ALL_LABELS:
            cells[0] = NONE
        lines.append([f"*metagradients − {other}*", "", "", *cells])
    shown = grid(["", "trainings", "processor time, s", *names.values()], lines)
    return shown.replace("|  |", "| |").replace("|  |", "| |")


def main() -> None:
    args = parsed(arguments(__doc__, RAW))
    torch.set_num_threads(1)
    for study in STUDIES:
        if args.runs:
            few = 1 if args.miniature else None
            go_on(
                args.out,
                jobs(study, args.out, few),
                partial(row_of, raw=args.out, rounds=few or ROUNDS),
            )
        show(args.write, study, table(of_study(read(args.out), study)))


if __name__ == "__main__":
    main()
