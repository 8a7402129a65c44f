"""The image recipe and its rivals on the generated problems, at the same time each.

    python -m benchmarks.pictures.run --half seen --methods uda supervised --minutes 1.5
    python -m benchmarks.pictures.run --half unseen --methods ... --minutes 1.5     # once, when all is tuned
    python -m benchmarks.pictures.tables

Each run is ``metapl train images`` with its defaults, or with the settings of ``--set FIELD=VALUE``, on folders that
the problem wrote: one thread, as many steps as fit into the minutes of processor time by the recipe's own measurement.
One default is replaced: the precision is bfloat16 unless it is set. A row of the raw file is one run, with the machine
and the versions it was made with; runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import ast
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS, Row, environment, go_on
from benchmarks.pictures.drawing import Problem
from benchmarks.pictures.problems import arrays, half, make, named
from metapl.apps.compare import Job
from metapl.apps.images import METHODS, Images
from metapl.apps.look import REHEARSED, settled, steps_within
from metapl.apps.pictures import EvaluationBatches
from metapl.apps.run import EndedRun
from metapl.apps.settings import flat, replaced
from metapl.apps.train import evaluated


def run(problem: str | Problem, method: str, seed: int, minutes: float, settings: Row) -> Row:
    """One training; its accuracies on the test set, and what it was like along the run."""
    torch.set_num_threads(1)
    problem = named(problem) if isinstance(problem, str) else problem
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(problem, seed, place / "pictures")
        since = time.process_time()
        asked = {"seed": seed, "minutes": minutes, "steps": REHEARSED, "precision": "bfloat16"} | settings
        config, method_ = settled(*configured(place / "pictures", method, asked), say=lambda text: None)
        if "steps" not in settings:
            asked["steps"] = steps_within(config, method_, minutes, time.process_time)
            config, method_ = settled(*configured(place / "pictures", method, asked), say=lambda text: None)
        result = Job(config, method_, place / "run", resume=False, threads=1).run()
        seconds = time.process_time() - since
        labels = labeled_by(config, place, problem, seed)
    return {
        "half": problem.half,
        "steps": config.fitting.steps,
        "recolor": config.pictures.recolor,
        "image_size": config.pictures.image_size,
        "delivered": result["delivered"],
        "seconds": round(seconds, 1),
        **{name: value for name, value in result.items() if name.endswith(("test_accuracy", "control_accuracy"))},
        **labels,
        "made_with": environment(),
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


def configured(pictures: Path, name: str, settings: Row) -> tuple[Any, Any]:
    """The pictures that a problem wrote, and a method, with these settings, each the one's or the other's."""
    method: Any = METHODS[name]
    labeled, unlabeled, test = (str(pictures / part) for part in ("labeled", "unlabeled", "test"))
    config = Images(labeled=labeled, unlabeled=unlabeled, test=test)
    if unknown := settings.keys() - flat(config).keys() - flat(method).keys():
        raise SystemExit(f"--set {', '.join(sorted(unknown))}: neither the pictures nor the method have that")
    return replaced(config, **settings), replaced(method, **settings)


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
    jobs = (
        {"problem": problem, "method": method, "seed": seed, "minutes": given.minutes, "settings": dict(given.set)}
        for seed in given.seeds
        for problem in given.problems or [problem.name for problem in half(given.half)]
        for method in given.methods
    )
    go_on(file, jobs, run, workers=given.jobs)


if __name__ == "__main__":
    main()
