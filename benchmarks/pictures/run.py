"""The image recipe and its rivals on the generated problems, at the same time each.

    python -m benchmarks.pictures.run --half seen --methods uda supervised --minutes 1.5
    python -m benchmarks.pictures.run --half unseen --methods ... --minutes 1.5     # once, when all is tuned
    python -m benchmarks.pictures.tables --half unseen

Each run is ``metapl train images`` with its defaults, or with the settings of ``--set FIELD=VALUE``, on folders that
the problem wrote: one thread, as many steps as fit into the minutes of processor time by the recipe's own measurement.
One default is replaced: the precision is bfloat16 unless it is set. A row of the raw
file is one run, with the machine and the versions it was made with; runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import RESULTS, Row, environment, read
from benchmarks.pictures.drawing import Problem
from benchmarks.pictures.problems import arrays, half, make, named
from metapl.apps.compare import Job
from metapl.apps.images import METHODS, Images
from metapl.apps.look import REHEARSED, settled, steps_within
from metapl.apps.networks import parameter_groups
from metapl.apps.pictures import EvaluationBatches
from metapl.apps.run import EndedRun
from metapl.apps.settings import Role, flat, replaced
from metapl.apps.train import evaluated


def run(problem: Problem, method: str, seed: int, minutes: float, settings: Row) -> Row:
    """One training; its accuracies on the test set, and what it was like along the run."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(problem, seed, place / "pictures")
        since = time.process_time()
        first = {"seed": seed, "minutes": minutes, "steps": REHEARSED, "precision": "bfloat16"}
        config, named = settled(*configured(place / "pictures", method, first | settings), quiet)
        if "steps" not in settings:
            steps = steps_within(config, named, minutes, time.process_time)
            config, named = settled(*configured(place / "pictures", method, first | settings | {"steps": steps}), quiet)
        result = Job(config, named, place / "run", resume=False, threads=1).run()
        seconds = time.process_time() - since
        seen = along(place / "run") | labeled_by(config, place, problem, seed)
    accuracies = {name: value for name, value in result.items() if name.endswith(("test_accuracy", "control_accuracy"))}
    return {
        "half": problem.half,
        "problem": problem.name,
        "method": method,
        "seed": seed,
        "minutes": minutes,
        "settings": settings,
        "steps": config.fitting.steps,
        "recolor": config.pictures.recolor,
        "image_size": config.pictures.image_size,
        "delivered": result["delivered"],
        "seconds": round(seconds, 1),
        **accuracies,
        **seen,
        "made_with": environment(),
    }


def along(folder: Path) -> Row:
    """What a run with a teacher logged in the second half of its steps, on average."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in logged if row.get("feedback_std") is not None]
    late = [row for row in rows if row["step"] > rows[-1]["step"] / 2]
    return {
        name: round(statistics.fmean(row[name] for row in late), 4)
        for name in ("feedback_weight", "agreement", "outer_loss", "inner_loss")
        if late and name in late[0]
    }


def labeled_by(config: Any, place: Path, problem: Problem, seed: int) -> Row:
    """How well the network that labeled the unlabeled pictures does that at the end: the share of right labels, and the
    share that would have to be called otherwise for the classes' frequencies to be right; foreign pictures aside."""
    trained = EndedRun.load(place / "run")
    network = trained.network("teacher" if "teacher" in trained.networks else "student")
    number_of = {name: number for number, name in enumerate(trained.classes)}
    truth = arrays(problem, seed).unlabeled_labels
    own = np.flatnonzero(truth >= 0)
    truth = np.array([number_of[problem.classes[label]] for label in truth[own]])
    files = sorted((place / "pictures" / "unlabeled").iterdir())
    images = config.pictures.images([str(files[number]) for number in own], None)
    found = evaluated(network, EvaluationBatches(images, torch.from_numpy(truth), 256))
    counts = np.asarray(found.confusion)
    error = np.abs(counts.sum(0) - counts.sum(1)).sum() / (2 * len(own))
    return {"labels_right": round(found.accuracy, 4), "frequency_error": round(float(error), 4)}


def quiet(text: str) -> None:
    """What the looking says is not shown."""


@dataclass(frozen=True, kw_only=True)
class BySgd(Images):
    """The pictures with SGD for both networks."""

    def optimizer(self, role: Role, module: nn.Module, lr: float | None = None) -> torch.optim.Optimizer:
        groups = parameter_groups(module, 5e-4, on_norms=False)
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)


def configured(pictures: Path, name: str, settings: Row) -> tuple[Any, Any]:
    """The pictures that a problem wrote, and a method, with these settings, each the one's or the other's."""
    method: Any = METHODS[name]
    kind = BySgd if settings.get("sgd") else Images
    config = kind(**{part: str(pictures / part) for part in ("labeled", "unlabeled", "test")})  # type: ignore[arg-type]
    if unknown := settings.keys() - flat(config).keys() - flat(method).keys() - {"sgd"}:
        raise SystemExit(f"--set {', '.join(sorted(unknown))}: neither the pictures nor the method have that")
    return replaced(config, **settings), replaced(method, **settings)


def _key(row: Row) -> str:
    names = ("problem", "method", "seed", "minutes", "settings")
    return json.dumps([row[name] for name in names], sort_keys=True)


def missing(given: argparse.Namespace, rows: list[Row]) -> Iterator[tuple[str, str, int]]:
    """The runs that are asked for and not there."""
    there = {_key(row) for row in rows if "problem" in row}
    problems = given.problems or [problem.name for problem in half(given.half)]
    for seed in given.seeds:
        for problem in problems:
            for method in given.methods:
                row = {"problem": problem, "method": method, "seed": seed, "minutes": given.minutes}
                if _key(row | {"settings": dict(given.set)}) not in there:
                    yield problem, method, seed


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("seen", "unseen"), default="seen")
    parser.add_argument("--problems", nargs="+", default=[], help="of the half; all of it by default")
    parser.add_argument("--methods", nargs="+", default=["uda"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=1.5, help="of processor time on one core, a run")
    parser.add_argument("--set", nargs="+", type=_setting, default=[], metavar="FIELD=VALUE")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the raw file; benchmarks/results/pictures_HALF.jsonl by default")
    given = parser.parse_args()
    file = given.out or RESULTS / f"pictures_{given.half}.jsonl"
    todo = list(missing(given, read(file)))
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(run, named(name), *one, given.minutes, dict(given.set)) for name, *one in todo]
        for number, done in enumerate(as_completed(running), 1):
            row = done.result()
            with file.open("a") as raw:
                raw.write(json.dumps(row) + "\n")
            reached = " ".join(f"{k.removesuffix('test_accuracy')}{100 * row[k]:.1f}" for k in row if "test_acc" in k)
            print(
                f"[{number}/{len(todo)}] {row['problem']} {row['method']} {row['steps']} steps: {reached}", flush=True
            )


if __name__ == "__main__":
    main()
