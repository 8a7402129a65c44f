"""The image recipe and its rivals on the generated problems, at the same time each.

    python -m benchmarks.pictures.run --half seen --methods uda supervised --minutes 1.5
    python -m benchmarks.pictures.run --half unseen --methods ... --minutes 1.5    # once, at last
    python -m benchmarks.pictures.tables

Each run is ``metapl train images`` with its defaults, or with the settings of ``--set
FIELD=VALUE``, on folders that the problem wrote: one thread, as many steps as fit into the minutes
of processor time by the recipe's own measurement. One default is replaced: the precision is
bfloat16 unless it is set. A row of the raw file is one run, with the machine and the versions it
was made with; runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import ast
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, Row, environment, go_on
from benchmarks.pictures.drawing import Problem
from benchmarks.pictures.problems import half, make, named
from metapl.apps.images import METHODS, Images
from metapl.apps.look import choose_settings
from metapl.apps.settings import flag_values, with_flags
from metapl.apps.several_runs import Job


def run(problem: str | Problem, method: str, seed: int, minutes: float, settings: Row) -> Row:
    """Train once; return a row with the accuracies on the test set."""
    torch.set_num_threads(1)
    problem = named(problem) if isinstance(problem, str) else problem
    with tempfile.TemporaryDirectory() as folder:
        make(problem, seed, Path(folder) / "pictures")
        asked = {"seed": seed, "precision": "bfloat16"} | settings
        row = train_within(Path(folder), method=method, minutes=minutes, settings=asked)
    return {"half": problem.half, **row, "made_with": environment()}


def train_within(place: Path, *, method: str, minutes: float, settings: Row) -> Row:
    """Train on the folders in PLACE/pictures; return steps, what was chosen, and accuracies.

    Args:
        minutes: of processor time, into which as many steps fit as the settings do not say.
        settings: of the pictures, the fitting and the method, beside their defaults.
    """
    since = time.process_time()
    pictures = place / "pictures"
    config, method_ = choose_settings(
        *configured(pictures, method, {"minutes": minutes} | settings),
        say=lambda text: None,
        clock=time.process_time,
    )
    result = Job(config, method_, place / "run", resume=False, threads=1).run()
    seconds = time.process_time() - since
    return {
        "steps": result["steps"],
        "recolor": config.pictures.recolor,
        "image_size": config.pictures.image_size,
        "chosen": result.get("chosen"),
        "delivered": result["delivered"],
        "seconds": round(seconds, 1),
        **{
            name: value
            for name, value in result.items()
            if name.endswith(("test_accuracy", "control_accuracy"))
        },
    }


def configured(pictures: Path, name: str, settings: Row) -> tuple[Any, Any]:
    """Return the pictures that a problem wrote, and a method, with these settings.

    Each setting belongs to one or the other.
    """
    method: Any = METHODS[name]
    labeled, unlabeled, test = (str(pictures / part) for part in ("labeled", "unlabeled", "test"))
    config = Images(labeled=labeled, unlabeled=unlabeled, test=test)
    if unknown := settings.keys() - flag_values(config).keys() - flag_values(method).keys():
        raise SystemExit(
            f"--set {', '.join(sorted(unknown))}: neither the pictures nor the method have that"
        )
    return with_flags(config, **settings), with_flags(method, **settings)


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--half", choices=("seen", "unseen"), default="seen")
    parser.add_argument(
        "--problems", nargs="+", default=[], help="of the half; all of it by default"
    )
    parser.add_argument("--methods", nargs="+", default=["uda"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--minutes", type=float, default=1.5, help="of processor time on one core, a run"
    )
    parser.add_argument("--set", nargs="+", type=_setting, default=[], metavar="FIELD=VALUE")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, help="the raw file; benchmarks/results/pictures_HALF.jsonl by default"
    )
    given = parser.parse_args()
    file = given.out or RESULTS / f"pictures_{given.half}.jsonl"
    jobs = (
        {
            "problem": problem,
            "method": method,
            "seed": seed,
            "minutes": given.minutes,
            "settings": dict(given.set),
        }
        for seed in given.seeds
        for problem in given.problems or [problem.name for problem in half(given.half)]
        for method in given.methods
    )
    go_on(file, jobs, run, workers=given.jobs)


if __name__ == "__main__":
    main()
