"""Does the teacher's feedback help on the digits? Every mode, baseline and control, tuned alike, over 20 seeds.

    python benchmarks/digits_study.py                        # tune, then run; goes on where it was stopped
    python benchmarks/digits_study.py --write benchmarks/results/digits_study.md
    python benchmarks/digits_study.py --miniature --out FILE # all of it in seconds, to see that it runs

Tuning: each method has 12 configurations, each run on 5 seeds, and the one whose best student by validation (197
labeled images) is best on average is chosen. Final runs: the chosen configuration on 20 other seeds, where nothing is
selected: no validation image is read, and the student that is kept, and finetuned, is the average of its weights at the
last step. Only these runs look at the test set, once. Every method sees the same batches from the same initial weights
for a seed. At 4 labels a class the settings tuned at 2 are used as they are, for all methods alike. Every run is a row
of the raw file, so the tables and the picture are made from it alone; a row without a method says what those below it
were made with.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from machine import arguments, parsed, results

from metapl.apps.digits import METHODS, Digits, fitting
from metapl.apps.fitting import fit
from metapl.apps.machine.environment import environment
from metapl.apps.methods import Data, Training
from metapl.apps.settings import flat, replaced
from metapl.training import FitResult, Trainer
from metapl.training.loss_trainer import LossTrainer

HERE = Path(__file__).parent
RAW = HERE / "results" / "digits_study.jsonl"
EMA_DECAY = 0.995
"""Of the averaged student in the final runs; the tuning runs select a checkpoint and have no average."""

Config = dict[str, Any]
Key = tuple[str, str, int, int, bool]


@dataclass(frozen=True)
class Size:
    """How much is run: training and finetuning steps, seeds, configurations of each method."""

    steps: int
    finetune_steps: int
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    configurations: int


FULL = Size(
    steps=1500, finetune_steps=200, tuning_seeds=tuple(range(100, 105)), seeds=tuple(range(20)), configurations=12
)
MINIATURE = Size(steps=4, finetune_steps=2, tuning_seeds=(100,), seeds=(0, 1), configurations=1)


@dataclass(frozen=True)
class Entry:
    """A method of the study: what it is called, which of the library's methods it is, its mode and its grid of 12."""

    title: str
    method: str
    grid: tuple[Config, ...]
    mode: str = "forward"
    labels: str | None = None
    tuned_as: str | None = None
    """The entry whose settings it takes, where it computes the same gradient."""


def _grid(**axes: tuple[Any, ...]) -> tuple[Config, ...]:
    return tuple(dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values()))


EXACT = _grid(student_lr=(0.5, 1.0), teacher_lr=(0.03, 0.06), weight=(0.3, 1.0, 3.0))
NOISY = _grid(student_lr=(0.5, 1.0), weight=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0))
ALONE = _grid(teacher_lr=(0.03, 0.06, 0.12, 0.25), label_smoothing=(0.0, 0.1, 0.2))
FIXED = _grid(student_lr=(0.25, 0.5, 1.0), teacher_lr=(0.06, 0.12), temperature=(0.5, 1.0))

ENTRIES: dict[str, Entry] = {
    "mpl": Entry("MPL, forward", "mpl", EXACT),
    "unrolled": Entry("MPL, unrolled", "mpl", (), mode="unrolled", tuned_as="mpl"),
    "difference": Entry("MPL, difference", "mpl", (), mode="difference", tuned_as="mpl"),
    "forward_hard": Entry("MPL, forward, hard labels", "mpl", EXACT, labels="hard"),
    "reinforce_per_example": Entry("MPL, reinforce_per_example", "mpl", EXACT, mode="reinforce_per_example"),
    "reinforce": Entry("MPL, reinforce (Algorithm 1)", "mpl", NOISY, mode="reinforce"),
    "loss_difference": Entry("MPL, loss_difference", "mpl", NOISY, mode="loss_difference"),
    "none": Entry(
        "same loop, no feedback", "none", _grid(student_lr=(0.25, 0.5, 1.0, 2.0), teacher_lr=(0.03, 0.06, 0.12))
    ),
    "supervised": Entry("supervised, labeled data only", "supervised", ALONE),
    "pseudo_labels": Entry("pseudo labels, fixed teacher, soft", "pseudo_labels", FIXED),
    "pseudo_labels_hard": Entry("pseudo labels, fixed teacher, hard", "pseudo_labels_hard", FIXED),
    "uda": Entry("UDA alone", "uda", _grid(teacher_lr=(0.03, 0.06, 0.12), uda_weight=(0.5, 1.0, 2.0, 4.0))),
    "permuted": Entry("control: feedback permuted over the batch", "permuted", EXACT),
    "class_means": Entry("control: class means of the feedback only", "class_means", EXACT),
    "random_sign": Entry("control: feedback with random signs", "random_sign", EXACT),
}
AT_FOUR = ("mpl", "none", "supervised", "pseudo_labels", "pseudo_labels_hard", "uda")


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    config: Config
    seed: int
    labels_per_class: int
    final: bool

    @property
    def key(self) -> Key:
        return self.method, json.dumps(self.config, sort_keys=True), self.seed, self.labels_per_class, self.final


def settings_of(job: Job, size: Size) -> tuple[Digits, Any]:
    """The digits, and the method, with a configuration of the grid."""
    entry, config = ENTRIES[job.method], job.config
    kept = {"ema_decay": EMA_DECAY if job.final else None, "finetune_steps": size.finetune_steps}
    rates = {"student_lr": config.get("student_lr", 0.5), "lr": config.get("teacher_lr", 0.06)}
    of = fitting(seed=job.seed, steps=size.steps, log_every=size.steps, **kept, **rates)
    method: Any = METHODS[entry.method]
    asked = {
        "mode": entry.mode,
        "feedback_weight": config.get("weight", 1.0),
        **{name: config[name] for name in ("temperature", "label_smoothing", "uda_weight") if name in config},
        **({} if entry.labels is None else {"pseudo_labels": entry.labels}),
    }
    method = replaced(method, **{name: value for name, value in asked.items() if name in flat(method)})
    return Digits(labels_per_class=job.labels_per_class, fitting=of), method


@lru_cache(maxsize=3)
def drawn(seed: int, labels_per_class: int, size: Size) -> Data:
    """The data with their batches drawn once: they are the same for every method."""
    data = Digits(labels_per_class=labels_per_class, fitting=fitting(seed=seed)).data(print, False, None)
    return dataclasses.replace(
        data,
        labeled=[data.labeled[t] for t in range(size.steps)],
        unlabeled=[data.unlabeled[t] for t in range(size.steps)],
        finetuning=[data.finetuning[t] for t in range(size.finetune_steps)],
        truth=None,
    )


def training(config: Digits, data: Data, fit: Callable[..., FitResult]) -> Training:
    """What a method trains, without a folder, from the weights that the seed gives."""
    torch.manual_seed(config.fitting.seed)
    teacher, student = (config.network() for _ in range(2))
    return Training(
        config=config,
        data=data,
        teacher=teacher,
        student=student,
        optimizer=config.optimizer,
        options=config.trainer_options(),
        fit=fit,
        label=lambda network: {},
        laid_out=lambda network, small=False: network,
        seed=torch.manual_seed,
    )


def one_run(job: Job, size: Size) -> dict[str, Any]:
    """Train one method once: tuning runs read the validation images, final runs the test images."""
    torch.set_num_threads(1)
    since = time.perf_counter()
    config, method = settings_of(job, size)
    data = drawn(job.seed, job.labels_per_class, size)
    data = dataclasses.replace(data, **{"validation" if job.final else "test": None})
    looked_at = {"validation": data.validation, "select": not job.final, "progress": False}

    def phase(*sources: Any, **own: Any) -> FitResult:
        return fit(*sources, **{"steps": size.steps, **config.fitting.options(), **looked_at, **own})

    trained = method.train(training(config, data, phase))
    found = (
        _tested(trained.trainer, data, config)
        if job.final
        else {"validation_accuracy": trained.result.validation_accuracy}
    )
    return dataclasses.asdict(job) | found | {"seconds": round(time.perf_counter() - since, 2)}


def _tested(trained: Trainer, data: Data, config: Digits) -> dict[str, Any]:
    """The test accuracy of the student, and of the same student after finetuning to the last step."""
    tested = {"selected": False, "test_accuracy": trained.evaluate(data.test).accuracy}
    tuner = LossTrainer(trained.student, optimizer=config.finetuner(trained.student))
    steps = config.fitting.finetune_steps
    tuner.fit(data.finetuning, steps=steps, validation=None, log_every=steps, progress=False)
    return tested | {"finetuned_test_accuracy": tuner.evaluate(data.test).accuracy}


# ------------------------------------------------------------------------------------------------------ running it all


def read(raw: Path = RAW) -> list[dict[str, Any]]:
    """What has been run so far; final runs that select a checkpoint are of an earlier study, and do not mix."""
    if not raw.exists():
        return []
    rows = [row for line in raw.read_text().splitlines() if "method" in (row := json.loads(line))]
    if len({row.get("selected", True) for row in rows if row["final"]}) > 1:
        raise SystemExit(f"{raw} has final runs that select a checkpoint beside runs that do not; remove the former")
    return rows


def run_missing(jobs: list[Job], size: Size, raw: Path, workers: int) -> None:
    """Run what the raw file does not hold yet, a row each."""
    fields = [field.name for field in dataclasses.fields(Job)]
    done = {Job(**{name: row[name] for name in fields}).key for row in read(raw)}
    missing = [job for job in jobs if job.key not in done]
    if not missing:
        return
    raw.parent.mkdir(parents=True, exist_ok=True)
    since = time.monotonic()
    with raw.open("a") as file:
        made_with = {"made_with": environment(), "steps": size.steps, "final_ema_decay": EMA_DECAY}
        file.write(json.dumps(made_with) + "\n")
        for number, row in enumerate(results(one_run, [(job, size) for job in missing], workers), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if number % 20 == 0 or number == len(missing):
                print(f"{number}/{len(missing)} runs, {time.monotonic() - since:.0f} s", flush=True)


def chosen(found: list[dict[str, Any]], size: Size = FULL) -> dict[str, Config]:
    """For each method the configuration with the best mean validation accuracy over the tuning seeds."""
    best: dict[str, Config] = {}
    for name, entry in ENTRIES.items():
        if entry.grid:
            tuning = [r for r in found if r["method"] == name and not r["final"]]
            best[name] = max(
                entry.grid[: size.configurations],
                key=lambda c: statistics.fmean(r["validation_accuracy"] for r in tuning if r["config"] == c),
            )
    return best | {name: best[e.tuned_as] for name, e in ENTRIES.items() if e.tuned_as is not None}


def study(size: Size, raw: Path, workers: int) -> None:
    """Tune every method, then run each on the seeds that nobody has looked at."""
    tuning = [
        Job(name, config, seed, 2, final=False)
        for seed in size.tuning_seeds
        for name, entry in ENTRIES.items()
        for config in entry.grid[: size.configurations]
    ]
    print(f"tuning: {len(tuning)} runs", flush=True)
    run_missing(tuning, size, raw, workers)
    best = chosen(read(raw), size)
    for name, config in best.items():
        print(f"  {name}: {config}")
    final = [Job(name, best[name], seed, 2, final=True) for seed in size.seeds for name in ENTRIES]
    final += [Job(name, best[name], seed, 4, final=True) for seed in size.seeds for name in AT_FOUR]
    print(f"final: {len(final)} runs", flush=True)
    run_missing(final, size, raw, workers)


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the tables there; draw the picture")
    given = parsed(parser)
    if given.write is not None:
        from digits_tables import write

        write(given.write, given.out)
    else:
        study(MINIATURE if given.miniature else FULL, given.out, given.workers)


if __name__ == "__main__":
    main()
