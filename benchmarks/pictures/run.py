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
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.pictures.problems import half, make, named

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"

Row = dict[str, Any]


def run(problem: str, method: str, seed: int, minutes: float, settings: Row) -> Row:
    """One training; its accuracies on the test set."""
    import torch

    from metapl.apps.experiments.jobs import Job
    from metapl.apps.experiments.settle import REHEARSED, settled, steps_within
    from metapl.apps.recipes import ImageFolders
    from metapl.runs.environment import environment

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(named(problem), seed, place / "pictures")
        parts = {part: str(place / "pictures" / part) for part in ("labeled", "unlabeled", "test")}
        since = time.process_time()
        recipe = ImageFolders(**parts, seed=seed, method=method, minutes=minutes)  # type: ignore[arg-type]
        recipe = _with(recipe, settings | {"steps": REHEARSED, "precision": settings.get("precision", "bfloat16")})
        complete = settled(recipe)
        steps = settings.get("steps") or steps_within(complete, minutes, time.process_time)
        complete = settled(_with(recipe, {"steps": steps}))
        result = Job(complete, method, place / "run", resume=False, threads=1).run()
    accuracies = {name: value for name, value in result.items() if name.endswith("test_accuracy")}
    return {
        "half": named(problem).half,
        "problem": problem,
        "method": method,
        "seed": seed,
        "minutes": minutes,
        "settings": settings,
        "steps": complete.steps,
        "recolor": complete.changes.recolor,
        "image_size": complete.image_size,
        "delivered": result["delivered"],
        "seconds": round(time.process_time() - since, 1),
        **accuracies,
        "made_with": environment(),
    }


def _with(recipe: Any, settings: Row) -> Any:
    """The recipe with other fields, its own or its method's; FIELD may be PART.FIELD."""
    for name, value in settings.items():
        first, dot, rest = name.partition(".")
        if not hasattr(recipe, first):
            recipe = dataclasses.replace(recipe, method=_with(recipe.method, {name: value}))
            continue
        inner = _with(getattr(recipe, first), {rest: value}) if dot else value
        recipe = dataclasses.replace(recipe, **{first: inner})
    return recipe


def _key(row: Row) -> str:
    names = ("problem", "method", "seed", "minutes", "settings")
    return json.dumps([row[name] for name in names], sort_keys=True)


def read(file: Path) -> list[Row]:
    """The rows of a raw file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


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
        running = [pool.submit(run, *one, given.minutes, dict(given.set)) for one in todo]
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
